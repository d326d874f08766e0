/**
 * The prefix index: which page holds the block of a key.
 *
 *   slots    [2 P] open addressing, linear probing: page + 1 | upper 32 bits of the key; the home of a key is where these
 *            bits lie in 0 … 2^32, so that a slot can be moved without a look at its entry. A removed slot is closed by
 *            moving back those that it parted from their home: there are no marks of what was.
 *   entries  [P] by page: the key, the parent, how many published pages extend it
 *
 * A page gets its key by set_keys (keyed), and is published when it is sealed, or at once if it is. Where two pages have
 * one key, the first that was sealed is published; the other stays keyed alone. A published page's parent is published
 * and the same tenant's, and stays as long as it has children: so a chain in the index is whole down to its first block.
 * What a row goes on with after it came to another tenant is not published.
 *
 * When a page is published whose row's page before it is not (it was the second of its key, and the first was evicted
 * since), that one is published first: publish walks back to where the chain is known, and forward again.
 *
 * The keys' bits are taken as evenly spread: a search looks at two or three slots. At most 6 logged stores a publish.
 */
#include "internal.h"

#define SLOT_PAGE(slot)        ((uint32_t)(slot)-1)
#define SLOT_TAG(slot)         ((uint32_t)((slot) >> 32))
#define SLOT_WORD(tag, page)   ((uint64_t)(tag) << 32 | ((page) + 1))
#define FAMILY_WORD(parent, n) ((uint64_t)(n) << 32 | (parent))
#define STORES_PUBLISH         6u
#define STORES_FOUND           8u
#define PREFETCH_SLOTS         12u
#define PREFETCH_ENTRIES       6u

/* ---- the table -----------------------------------------------------------------------------------------------------
 */

static inline uint32_t slot_after(const struct pool_map *m, uint32_t slot)
{
    return slot + 1 == m->slot_count ? 0 : slot + 1;
}

static inline bool has_key(const struct pool_map *m, uint32_t page, const struct kvp_block_key *key)
{
    return m->entries[page].key[0] == key->word[0] && m->entries[page].key[1] == key->word[1];
}

/* The published page of a key, or KVP_NONE. @param ret_slot  its slot; of none, the empty one that it would get */
static inline uint32_t find(const struct pool_map *m, const struct kvp_block_key *key, uint32_t *ret_slot)
{
    uint32_t tag = KEY_TAG(key->word), slot = home_of(m, tag), found = KVP_NONE;
    for (uint32_t steps = 0; steps < m->slot_count && m->slots[slot] != 0; steps++) {
        uint32_t page = SLOT_PAGE(m->slots[slot]);
        if (SLOT_TAG(m->slots[slot]) == tag && is_used_page(m, page) && PAGE_PUBLISHED(m->pages[page]) &&
            has_key(m, page, key)) {
            found = page;
            break;
        }
        slot = slot_after(m, slot);
    }
    *ret_slot = slot;
    return found;
}

uint32_t find_block(const struct pool_map *m, uint32_t tenant, const struct kvp_block_key *key)
{
    uint32_t slot, page = find(m, key, &slot);
    if (page == KVP_NONE)
        return KVP_NONE;
    uint32_t index = PAGE_TENANT(m->pages[page]) - 1;
    return index < KVP_TENANTS_MAX && m->tenants[index].id == tenant ? page : KVP_NONE;
}

/* Whether a slot whose home is `home` may lie at `hole` instead of at `slot`: is home not in (hole, slot], going round? */
static inline bool may_move(uint32_t home, uint32_t hole, uint32_t slot)
{
    return hole <= slot ? home <= hole || home > slot : home <= hole && home > slot;
}

static enum kvp_status remove_slot(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const block_slot *slots = m->slots;
    uint32_t tag = KEY_TAG(m->entries[page].key), hole = home_of(m, tag), steps = 0;
    for (; slots[hole] != SLOT_WORD(tag, page); steps++) {
        if (slots[hole] == 0 || steps == m->slot_count)
            return KVP_ECORRUPT;
        hole = slot_after(m, hole);
    }
    uint32_t slot = slot_after(m, hole);
    for (; slots[slot] != 0 && steps < m->slot_count; steps++, slot = slot_after(m, slot)) {
        if (!may_move(home_of(m, SLOT_TAG(slots[slot])), hole, slot))
            continue;
        TRY(txn_room(ledger, ROOM_SMALL));
        put64(ledger, &slots[hole], slots[slot]);
        hole = slot;
    }
    put64(ledger, &slots[hole], 0);
    return KVP_OK;
}

/* ---- publishing ----------------------------------------------------------------------------------------------------
 */

static struct kvp_block_key key_of(const struct pool_map *m, uint32_t page)
{
    return (struct kvp_block_key){{m->entries[page].key[0], m->entries[page].key[1]}};
}

/* The published page that stands for a row's page: itself, or the one that was there before it.
 * @param ret_slot  of none: the slot that the page would get */
static uint32_t known_page(const struct pool_map *m, uint32_t page, uint32_t *ret_slot)
{
    if (PAGE_PUBLISHED(m->pages[page]))
        return page;
    struct kvp_block_key key = key_of(m, page);
    return PAGE_KEYED(m->pages[page]) ? find(m, &key, ret_slot) : KVP_NONE;
}

static bool same_tenant(const struct pool_map *m, uint32_t a, uint32_t b)
{
    return PAGE_TENANT(m->pages[a]) == PAGE_TENANT(m->pages[b]);
}

/* What the page published last is related to. */
static void publish_family(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run)
{
    if (run->published != 0)
        put64(ledger, &m->entries[run->last].family, run->family);
}

void publish_end(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run)
{
    publish_family(ledger, m, run);
    if (run->published != 0)
        put32(ledger, &m->pool->published, m->pool->published + run->published);
}

/* Publish a keyed page, sealed or to be sealed by it, whose key no page is published under. @param slot  an empty one */
static enum kvp_status publish_one(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run,
                                   uint32_t page, uint32_t parent, uint32_t slot)
{
    uint32_t hits = policy_published(ledger, m, page, parent);
    if (m->slots[slot] != 0)
        return KVP_ECORRUPT;
    put64(ledger, &m->slots[slot], SLOT_WORD(KEY_TAG(m->entries[page].key), page));
    if (hits != 0)
        put64(ledger, &m->entries[page].use, USE_WORD(0, 0, hits, USE_PLAIN));
    if (run->published != 0 && parent == run->last)
        run->family += FAMILY_WORD(0, 1);
    else if (parent != KVP_NONE)
        put64(ledger, &m->entries[parent].family, m->entries[parent].family + FAMILY_WORD(0, 1));
    publish_family(ledger, m, run);
    run->last = page;
    run->family = FAMILY_WORD(parent == KVP_NONE ? 0 : parent + 1, 0);
    run->published++;
    put64(ledger, &m->pages[page], (m->pages[page] & ~PAGE_DIRTY) | PAGE_SEALED_BIT | PAGE_PUBLISHED_BIT);
    return KVP_OK;
}

/* Publish page `index` of a row, and what is missing before it. Leaves them as they are when the log has no room. */
static enum kvp_status publish(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run,
                               const uint32_t *row, uint32_t index)
{
    uint32_t first = index, parent = KVP_NONE, slot = 0;
    if (known_page(m, row[index], &slot) != KVP_NONE)
        return KVP_OK;
    while (first > 0) {
        if (!is_used_page(m, row[first - 1]))
            return KVP_ECORRUPT;
        parent = known_page(m, row[first - 1], &slot);
        if (parent != KVP_NONE)
            break;
        if (!PAGE_KEYED(m->pages[row[first - 1]]) || !PAGE_SEALED(m->pages[row[first - 1]]))
            return KVP_OK;
        first--;
    }
    for (; first <= index; first++) {
        if (parent != KVP_NONE && !same_tenant(m, parent, row[first]))
            return KVP_OK;
        if (txn_room(ledger, STORES_PUBLISH + ROOM_SMALL) != KVP_OK)
            return KVP_OK;
        uint32_t known = known_page(m, row[first], &slot);
        if (known == KVP_NONE)
            TRY(publish_one(ledger, m, run, row[first], parent, slot));
        parent = known == KVP_NONE ? row[first] : known;
    }
    return KVP_OK;
}

enum kvp_status seal_page(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run,
                          const uint32_t *row, uint32_t index)
{
    uint32_t page = row[index], slot;
    if (!is_used_page(m, page) || PAGE_REFS(m->pages[page]) == 0)
        return KVP_ECORRUPT;
    uint64_t record = m->pages[page];
    if (PAGE_SEALED(record))
        return KVP_OK;
    ledger->seals += m->digests != NULL;
    if (record & PAGE_DIRTY)
        put32(ledger, &m->pool->dirty, m->pool->dirty - 1);
    struct kvp_block_key key = key_of(m, page); /* known_page, of one that is not published */
    if (PAGE_KEYED(record) && find(m, &key, &slot) == KVP_NONE && index > 0 && is_used_page(m, row[index - 1]) &&
        PAGE_PUBLISHED(m->pages[row[index - 1]]) && same_tenant(m, page, row[index - 1]))
        return publish_one(ledger, m, run, page, row[index - 1], slot);
    put64(ledger, &m->pages[page], (record & ~PAGE_DIRTY) | PAGE_SEALED_BIT);
    return PAGE_KEYED(record) ? publish(ledger, m, run, row, index) : KVP_OK;
}

enum kvp_status unpublish(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint32_t *ret_parent)
{
    uint32_t parent = ENTRY_PARENT(m->entries[page].family);
    TRY(remove_slot(ledger, m, page));
    if (parent != 0) {
        if (!is_used_page(m, parent - 1) || ENTRY_CHILDREN(m->entries[parent - 1].family) == 0)
            return KVP_ECORRUPT;
        put64(ledger, &m->entries[parent - 1].family, m->entries[parent - 1].family - FAMILY_WORD(0, 1));
    }
    *ret_parent = parent == 0 ? KVP_NONE : parent - 1;
    return KVP_OK;
}

/* ---- keys of a row -------------------------------------------------------------------------------------------------
 */

static enum kvp_status set_key(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run,
                               const uint32_t *row, uint32_t index, const struct kvp_block_key *key)
{
    uint32_t page = row[index];
    if (!is_used_page(m, page) || PAGE_REFS(m->pages[page]) == 0)
        return KVP_ECORRUPT;
    if (PAGE_KEYED(m->pages[page])) {
        if (!has_key(m, page, key))
            return KVP_EMISMATCH;
    } else {
        put64(ledger, &m->entries[page].key[0], key->word[0]);
        put64(ledger, &m->entries[page].key[1], key->word[1]);
        put64(ledger, &m->entries[page].use, 0);
        put64(ledger, &m->pages[page], m->pages[page] | PAGE_KEYED_BIT);
        prefetch_index(m, page);
    }
    return PAGE_SEALED(m->pages[page]) ? publish(ledger, m, run, row, index) : KVP_OK;
}

enum kvp_status kvp_seq_set_keys(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                 uint32_t first, size_t n, const struct kvp_block_key *keys, size_t *reterr_block)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    if (m->attachments[found->attachment].state != KVP_ATTACHMENT_LIVE)
        return KVP_EBUSY;
    uint32_t full = found->reserved / m->pool->page_tokens;
    if (full > found->row_pages)
        return KVP_ECORRUPT;
    *reterr_block = 0;
    if (first > found->keyed)
        return KVP_EINVAL;
    const uint32_t *row = row_of(m, seq.slot);
    struct publish_run run = {.published = 0};
    for (size_t i = 0; i < n; i++) {
        *reterr_block = i;
        if (first + (uint64_t)i >= full || (keys[i].word[0] == 0 && keys[i].word[1] == 0))
            return KVP_EINVAL;
        TRY(txn_room(ledger, 2 * STORES_PUBLISH + ROOM_SMALL));
        TRY(set_key(ledger, m, &run, row, first + (uint32_t)i, &keys[i]));
    }
    publish_end(ledger, m, &run);
    if (first + (uint64_t)n > found->keyed)
        put32(ledger, &found->keyed, first + (uint32_t)n);
    return KVP_OK;
}

enum kvp_status kvp_seq_block_key(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                  uint32_t block, struct kvp_block_key *ret_key)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    if (block >= found->keyed || block >= found->row_pages)
        return KVP_ENOENT;
    uint32_t page = row_of(m, seq.slot)[block];
    if (!is_used_page(m, page))
        return KVP_ECORRUPT;
    *ret_key = key_of(m, page);
    return KVP_OK;
}

/* ---- look-ups ------------------------------------------------------------------------------------------------------
 */

/* Memory that the look-ups of keys [from, to), of n, will need: the slots, and once they are near the entries. */
static PREFETCHER void prefetch_slots(const struct pool_map *m, size_t from, size_t to, size_t n,
                                      const struct kvp_block_key *keys)
{
    for (size_t i = from; i < to && i < n; i++)
        __builtin_prefetch(&m->slots[home_of(m, KEY_TAG(keys[i].word))]);
}

static PREFETCHER void prefetch_entries(const struct pool_map *m, size_t from, size_t to, size_t n,
                                        const struct kvp_block_key *keys)
{
    for (size_t i = from; i < to && i < n; i++) {
        uint32_t page = SLOT_PAGE(m->slots[home_of(m, KEY_TAG(keys[i].word))]);
        if (page < m->pool->pages)
            prefetch_page(m, page);
    }
}

/* Before the look-up of key i, in order from 0. */
static PREFETCHER void prefetch_ahead(const struct pool_map *m, size_t i, size_t n, const struct kvp_block_key *keys)
{
    prefetch_slots(m, i + PREFETCH_SLOTS, i + PREFETCH_SLOTS + 1, n, keys);
    prefetch_entries(m, i + PREFETCH_ENTRIES, i + PREFETCH_ENTRIES + 1, n, keys);
}

enum kvp_status kvp_cache_match(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                                const struct kvp_block_key *keys, size_t *ret_blocks, uint32_t *ret_pages)
{
    const struct pool_map *m;
    TRY(map_live_pool(ledger, pool, &m));
    size_t blocks = 0;
    prefetch_slots(m, 0, PREFETCH_SLOTS, n, keys);
    for (; blocks < n; blocks++) {
        prefetch_ahead(m, blocks, n, keys);
        uint32_t page = find_block(m, tenant, &keys[blocks]);
        if (page == KVP_NONE)
            break;
        if (ret_pages != NULL)
            ret_pages[blocks] = page;
    }
    *ret_blocks = blocks;
    return KVP_OK;
}

enum kvp_status take_known(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                           uint32_t tenant, size_t n, const struct kvp_block_key *keys, uint32_t *ret_pages)
{
    uint32_t room = (txn_room_left(ledger) - ROOM_SMALL) / STORES_FOUND;
    n = n < m->pool->row_pages ? n : m->pool->row_pages;
    n = n < room ? n : room;
    uint32_t taken = 0;
    struct page_find find = {.found = 0};
    for (; taken < n; taken++) {
        prefetch_ahead(m, taken, n, keys);
        uint32_t page = find_block(m, tenant, &keys[taken]);
        if (page == KVP_NONE)
            break;
        TRY(find_page(ledger, m, &find, page));
        put_row(ledger, m, seq, taken, page);
    }
    find_end(ledger, m, &find);
    put32(ledger, &seq->row_pages, taken);
    *ret_pages = taken;
    return KVP_OK;
}

enum kvp_status kvp_seq_open_cached(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                                    uint64_t key, bool durable, size_t n, const struct kvp_block_key *keys,
                                    struct kvp_seq_id *ret_seq, size_t *ret_blocks)
{
    const struct pool_map *m;
    const struct block_seq *seq;
    struct kvp_seq_id made;
    uint32_t taken;
    TRY(map_live_pool(ledger, pool, &m));
    prefetch_slots(m, 0, PREFETCH_SLOTS, n, keys);
    TRY(kvp_seq_open(ledger, pool, attachment, key, durable, &made));
    TRY(find_seq(m, made, &seq));
    TRY(txn_room(ledger, 2 * ROOM_SMALL));
    uint32_t tenant = m->attachments[attachment].tenant;
    if (tenant >= KVP_TENANTS_MAX)
        return KVP_ECORRUPT;
    put32(ledger, &m->pool->tick, m->pool->tick + 1);
    TRY(take_known(ledger, m, seq, m->tenants[tenant].id, n, keys, &taken));
    TRY(policy_opened(ledger, m, n, taken, row_of(m, made.slot)));
    uint64_t tokens = (uint64_t)taken * m->pool->page_tokens;
    if (tokens > KVP_SEQUENCE_TOKENS_MAX)
        return KVP_EINVAL;
    put32(ledger, &seq->reserved, (uint32_t)tokens);
    put32(ledger, &seq->written, (uint32_t)tokens);
    put32(ledger, &seq->keyed, taken);
    put64(ledger, &m->pool->lookup_blocks, m->pool->lookup_blocks + n);
    put64(ledger, &m->pool->hit_blocks, m->pool->hit_blocks + taken);
    *ret_seq = made;
    *ret_blocks = taken;
    return KVP_OK;
}

enum kvp_status kvp_cache_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page,
                             struct kvp_cache_entry *ret_entry)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (!is_used_page(m, page) || !PAGE_PUBLISHED(m->pages[page]))
        return KVP_ENOENT;
    const struct block_entry *entry = &m->entries[page];
    uint32_t tenant = PAGE_TENANT(m->pages[page]) - 1;
    if (tenant >= KVP_TENANTS_MAX)
        return KVP_ECORRUPT;
    *ret_entry = (struct kvp_cache_entry){
        .page = page,
        .key = key_of(m, page),
        .parent = ENTRY_PARENT(entry->family) == 0 ? KVP_NONE : ENTRY_PARENT(entry->family) - 1,
        .children = ENTRY_CHILDREN(entry->family),
        .references = PAGE_REFS(m->pages[page]),
        .tenant = m->tenants[tenant].id,
        .hits = USE_HITS(entry->use),
        .age = PAGE_REFS(m->pages[page]) == 0 ? m->pool->tick - USE_STAMP(entry->use) : 0,
    };
    return KVP_OK;
}
