/**
 * The naive ledger's cache: tenants, the prefix index, pins and eviction, as plainly as possible; see ledger_naive.h.
 *
 * Which pages are evicted is the allocator's choice: how many, that each was nobody's, that nothing known extends it, and
 * whose it may be, is not.
 */
#include "ledger_naive.h"

#include "ledger_block.h"

#include <string.h>

/* ---- keys ----------------------------------------------------------------------------------------------------------
 */

uint32_t naive_code(uint32_t tenant, uint32_t story, uint32_t block)
{
    return 1 + (tenant - NAIVE_TENANT_ID) * 1000 + block * 10 + (block < story ? 0 : story);
}

struct kvp_block_key naive_key(uint32_t code)
{
    uint64_t rng = code;
    uint64_t high = naive_random(&rng, UINT32_MAX), low = naive_random(&rng, UINT32_MAX);
    if (code % 3 == 0)
        high &= 0xc0000000u;
    return (struct kvp_block_key){{high << 32 | low, (uint64_t)low << 32 | code}};
}

void naive_keys(uint32_t tenant, uint32_t story, uint32_t first, uint32_t n, struct kvp_block_key *ret_keys)
{
    for (uint32_t i = 0; i < n; i++)
        ret_keys[i] = naive_key(naive_code(tenant, story, first + i));
}

/* The published page of a block, + 1; 0: none. */
static uint32_t find(const struct naive *n, uint32_t code)
{
    for (uint32_t page = 0; page < NAIVE_PAGES; page++) {
        if (n->state.pages[page].published && n->keys[page] == code)
            return page + 1;
    }
    return 0;
}

/* The same, if it is that tenant's. */
static uint32_t find_for(const struct naive *n, uint32_t asks, uint32_t code)
{
    uint32_t page = find(n, code);
    return page != 0 && n->state.tenants[n->state.pages[page - 1].tenant - 1].id == asks ? page : 0;
}

static uint32_t match(const struct naive *n, uint32_t asks, uint32_t keys_of, uint32_t story, uint32_t blocks)
{
    uint32_t found = 0;
    while (found < blocks && find_for(n, asks, naive_code(keys_of, story, found)) != 0)
        found++;
    return found;
}

/* ---- tenants -------------------------------------------------------------------------------------------------------
 */

uint32_t naive_tenant_of(const struct naive *n, uint32_t attachment)
{
    uint32_t id = n->state.sessions[n->state.attachments[attachment].session_slot].tenant, index = 0;
    while (index + 1 < NAIVE_TENANTS && n->state.tenants[index].id != id)
        index++;
    return index;
}

uint32_t naive_tenant_place(struct naive *n, uint32_t id)
{
    uint32_t index = 0;
    while (n->state.tenants[index].id != id && n->state.tenants[index].id != 0)
        index++;
    n->state.tenants[index].id = id;
    return index;
}

static enum kvp_status expect_share(const struct naive *n, const struct naive_op *op)
{
    uint32_t sum = op->budget;
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++)
        sum += n->state.tenants[i].id != op->tenant ? n->state.tenants[i].guaranteed : 0;
    bool over = op->tokens != 0 && op->budget > op->tokens;
    return over || sum > n->geometry.pages - n->geometry.reserved_pages ? KVP_EINVAL : KVP_OK;
}

/* ---- eviction ------------------------------------------------------------------------------------------------------
 */

static bool extended(const struct naive *n, uint32_t page)
{
    for (uint32_t other = 0; other < NAIVE_PAGES; other++) {
        if (n->state.pages[other].published && n->state.pages[other].parent == page + 1)
            return true;
    }
    return false;
}

static void evict(struct naive *n, uint32_t page)
{
    struct naive_page *gone = &n->state.pages[page];
    REQUIRE(gone->published && gone->references == 0);
    REQUIRE(!extended(n, page));
    gone->published = 0;
    n->keys[page] = 0;
    n->state.evictions++;
    n->state.free_pages++;
    n->state.tenants[gone->tenant - 1].pages--;
}

/* How many pages of a tenant could be evicted, one after the other. */
static uint32_t evictable(const struct naive *n, uint32_t tenant)
{
    struct naive copy = *n;
    uint32_t found = 0;
    for (bool again = true; again;) {
        again = false;
        for (uint32_t page = 0; page < n->geometry.pages; page++) {
            const struct naive_page *seen = &copy.state.pages[page];
            if (!seen->published || seen->references != 0 || seen->tenant != tenant + 1 || extended(&copy, page))
                continue;
            evict(&copy, page);
            found++;
            again = true;
        }
    }
    return found;
}

/* Of others' pages, for a tenant that needs them. */
static uint32_t evictable_by(const struct naive *n, uint32_t tenant)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++) {
        const struct naive_tenant *other = &n->state.tenants[i];
        uint32_t spare = other->pages > other->guaranteed ? other->pages - other->guaranteed : 0;
        uint32_t can = i == tenant || spare == 0 ? 0 : evictable(n, i);
        found += can < spare ? can : spare;
    }
    return found;
}

static uint32_t over_quota(const struct naive *n, uint32_t tenant, uint32_t need)
{
    const struct naive_tenant *taker = &n->state.tenants[tenant];
    return taker->quota != 0 && taker->pages + need > taker->quota ? taker->pages + need - taker->quota : 0;
}

enum kvp_status naive_room(const struct naive *n, uint32_t tenant, uint32_t need, uint32_t *reterr_short)
{
    uint32_t over = over_quota(n, tenant, need);
    if (need == 0 || (over == 0 && need <= n->state.free_pages))
        return KVP_OK;
    uint32_t own = evictable(n, tenant);
    if (own < over) {
        *reterr_short = over - own;
        return KVP_ENOPAGES;
    }
    uint32_t there = n->state.free_pages + own + evictable_by(n, tenant);
    *reterr_short = need > there ? need - there : 0;
    return need > there ? KVP_ENOPAGES : KVP_OK;
}

/* Evict the pages that the ledger evicted, leaves first. @return how many of the tenant's own */
static uint32_t take_over(struct naive *n, uint32_t tenant, const struct naive_state *now, uint32_t *ret_others)
{
    uint32_t own = 0;
    *ret_others = 0;
    for (bool again = true; again;) {
        again = false;
        for (uint32_t page = 0; page < n->geometry.pages; page++) {
            const struct naive_page *seen = &n->state.pages[page];
            if (!seen->published || seen->references != 0 || now->pages[page].state == KVP_PAGE_CACHED ||
                extended(n, page))
                continue;
            own += seen->tenant == tenant + 1;
            *ret_others += seen->tenant != tenant + 1;
            evict(n, page);
            again = true;
        }
    }
    for (uint32_t page = 0; page < n->geometry.pages; page++)
        REQUIRE(now->pages[page].state == KVP_PAGE_CACHED || n->state.pages[page].state != KVP_PAGE_CACHED ||
                !n->state.pages[page].published);
    return own;
}

void naive_make_room(struct naive *n, uint32_t tenant, uint32_t need, const struct naive_state *now)
{
    struct naive_tenant before[NAIVE_TENANTS];
    if (need == 0)
        return;
    memcpy(before, n->state.tenants, sizeof(before));
    uint32_t over = over_quota(n, tenant, need), others;
    uint32_t there = n->state.free_pages + over;
    uint32_t own = take_over(n, tenant, now, &others);
    REQUIRE(own >= over);
    REQUIRE(own + others == over + (need > there ? need - there : 0));
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++) {
        const struct naive_tenant *seen = &n->state.tenants[i];
        REQUIRE(i == tenant || seen->pages == before[i].pages || seen->pages >= seen->guaranteed);
    }
}

void naive_taken(struct naive *n, uint32_t page, uint32_t tenant)
{
    struct naive_page *taken = &n->state.pages[page];
    bool others = taken->tenant != 0 && taken->tenant != tenant + 1;
    taken->dirty = n->zero_on_reuse && (others || taken->dirty);
    taken->tenant = tenant + 1;
    taken->hits = 0;
    n->keys[page] = 0;
    n->sealed[page] = false;
    n->state.pages[page].digest = 0;
}

/* ---- publishing ----------------------------------------------------------------------------------------------------
 */

static void publish(struct naive *n, const struct naive_seq *seq, uint32_t index)
{
    uint32_t page = seq->row[index], parent = 0;
    if (find(n, n->keys[page]) != 0)
        return;
    if (index > 0 && find(n, n->keys[seq->row[index - 1]]) == 0) {
        uint32_t before = seq->row[index - 1];
        REQUIRE(n->sealed[before] && n->keys[before] != 0);
        publish(n, seq, index - 1);
    }
    if (index > 0)
        parent = find(n, n->keys[seq->row[index - 1]]);
    if (index > 0 && (parent == 0 || n->state.pages[parent - 1].tenant != n->state.pages[page].tenant))
        return;
    n->state.pages[page].published = 1;
    n->state.pages[page].parent = parent;
}

void naive_seal(struct naive *n, const struct naive_seq *seq, uint32_t index)
{
    uint32_t page = seq->row[index];
    if (n->sealed[page])
        return;
    n->sealed[page] = true;
    n->state.pages[page].dirty = 0;
    if (n->keys[page] != 0)
        publish(n, seq, index);
}

static enum kvp_status expect_keys(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (seq->state != KVP_SEQ_OPEN || seq->generation != op->seq.generation)
        return KVP_ESTALE;
    if (n->state.attachments[seq->attachment].state != KVP_ATTACHMENT_LIVE)
        return KVP_EBUSY;
    if (op->first > seq->keyed)
        return KVP_EINVAL;
    for (uint32_t i = 0; i < op->blocks; i++) {
        if (op->first + i >= seq->reserved / n->geometry.page_tokens)
            return KVP_EINVAL;
        uint32_t has = n->keys[seq->row[op->first + i]];
        if (has != 0 && has != naive_code(op->keys_of, op->story, op->first + i))
            return KVP_EMISMATCH;
    }
    return KVP_OK;
}

static void apply_keys(struct naive *n, const struct naive_op *op)
{
    struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    for (uint32_t i = op->first; i < op->first + op->blocks; i++) {
        uint32_t page = seq->row[i];
        if (n->keys[page] == 0) {
            n->keys[page] = naive_code(op->keys_of, op->story, i);
            n->state.pages[page].hits = 0;
        }
        if (n->sealed[page])
            publish(n, seq, i);
        seq->keys[i] = n->keys[page];
    }
    if (op->first + op->blocks > seq->keyed)
        seq->keyed = op->first + op->blocks;
}

/* ---- calls ---------------------------------------------------------------------------------------------------------
 */

/* Put the pages of a story's first blocks into an empty row. */
static void take_known(struct naive *n, const struct naive_op *op, struct naive_seq *seq, uint32_t blocks)
{
    for (uint32_t i = 0; i < blocks; i++) {
        uint32_t page = find(n, naive_code(op->keys_of, op->story, i)) - 1;
        seq->row[i] = page;
        if (n->state.pages[page].hits < 15)
            n->state.pages[page].hits++;
    }
    seq->row_pages = blocks;
}

static void apply_open(struct naive *n, const struct naive_op *op)
{
    struct naive_seq *seq = naive_open(n, op);
    uint32_t asks = n->state.tenants[naive_tenant_of(n, op->attachment)].id;
    uint32_t longest = op->blocks < n->geometry.row_pages ? op->blocks : n->geometry.row_pages;
    uint32_t found = match(n, asks, op->keys_of, op->story, longest);
    REQUIRE(op->ret_left == found);
    take_known(n, op, seq, found);
    seq->durable = op->flag;
    seq->reserved = seq->written = found * n->geometry.page_tokens;
    seq->keyed = found;
    for (uint32_t i = 0; i < found; i++)
        seq->keys[i] = n->keys[seq->row[i]];
    n->tick++;
    n->state.lookups += op->blocks;
    n->state.hits += found;
}

/* The slot of a pin that ends in that page, or NAIVE_SEQS. */
static uint32_t pin_of(const struct naive *n, uint32_t page)
{
    for (uint32_t i = 0; i < NAIVE_SEQS; i++) {
        const struct naive_seq *seq = &n->state.seqs[i];
        if (seq->state == KVP_SEQ_PIN && seq->row[seq->row_pages - 1] == page)
            return i;
    }
    return NAIVE_SEQS;
}

static enum kvp_status expect_pin(const struct naive *n, const struct naive_op *op)
{
    if (op->blocks == 0 || match(n, op->tenant, op->keys_of, op->story, op->blocks) != op->blocks)
        return KVP_ENOENT;
    if (pin_of(n, find(n, naive_code(op->keys_of, op->story, op->blocks - 1)) - 1) != NAIVE_SEQS)
        return KVP_OK;
    return op->blocks > n->geometry.row_pages || !naive_slot_left(n) ? KVP_ELIMIT : KVP_OK;
}

static void apply_pin(struct naive *n, const struct naive_op *op)
{
    uint32_t slot = pin_of(n, find(n, naive_code(op->keys_of, op->story, op->blocks - 1)) - 1);
    if (slot == NAIVE_SEQS) {
        struct naive_seq *pin = naive_take(n, op->ret_slot);
        *pin = (struct naive_seq){.state = KVP_SEQ_PIN, .generation = pin->generation};
        take_known(n, op, pin, op->blocks);
        slot = op->ret_slot;
    }
    REQUIRE(slot == op->ret_slot);
    n->state.seqs[slot].value = 1 + op->budget;
}

static enum kvp_status expect_unpin(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    return seq->state == KVP_SEQ_PIN && seq->generation == op->seq.generation ? KVP_OK : KVP_ESTALE;
}

static void apply_unpin(struct naive *n, const struct naive_op *op)
{
    struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    seq->state = KVP_SEQ_RECLAIM;
    seq->attachment = seq->job = KVP_NONE;
    seq->version = n->seq_versions[op->seq.slot];
    seq->value = 0;
}

static void apply_evict(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    uint32_t can = 0, others;
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++) {
        if (n->state.tenants[i].id != 0 && (op->tenant == KVP_NONE || n->state.tenants[i].id == op->tenant))
            can += evictable(n, i);
    }
    uint32_t evicted = take_over(n, NAIVE_TENANTS, now, &others) + others;
    REQUIRE(evicted == op->ret_left);
    REQUIRE(evicted == (op->budget < can ? op->budget : can));
    REQUIRE(!op->ret_flag);
}

static void apply_evict_prefix(struct naive *n, const struct naive_op *op)
{
    uint32_t evicted = 0;
    for (uint32_t i = op->blocks; i-- > 0;) {
        uint32_t page = find_for(n, op->tenant, naive_code(op->keys_of, op->story, i));
        if (page == 0)
            continue;
        if (n->state.pages[page - 1].references != 0 || extended(n, page - 1))
            break;
        evict(n, page - 1);
        evicted++;
    }
    REQUIRE(evicted == op->ret_left);
}

enum kvp_status naive_expect_cache(const struct naive *n, const struct naive_op *op)
{
    switch (op->kind) {
    case NAIVE_OPEN_CACHED:
        return naive_expect_open(n, op);
    case NAIVE_SET_KEYS:
        return expect_keys(n, op);
    case NAIVE_PIN:
        return expect_pin(n, op);
    case NAIVE_UNPIN:
        return expect_unpin(n, op);
    case NAIVE_CLEANED:
        return op->page < n->geometry.pages && n->state.pages[op->page].references != 0 ? KVP_OK : KVP_EINVAL;
    case NAIVE_SHARE:
        return expect_share(n, op);
    default:
        return KVP_OK;
    }
}

void naive_apply_cache(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    uint32_t index;
    switch (op->kind) {
    case NAIVE_OPEN_CACHED:
        apply_open(n, op);
        break;
    case NAIVE_SET_KEYS:
        apply_keys(n, op);
        break;
    case NAIVE_PIN:
        apply_pin(n, op);
        break;
    case NAIVE_UNPIN:
        apply_unpin(n, op);
        break;
    case NAIVE_EVICT:
        apply_evict(n, op, now);
        break;
    case NAIVE_EVICT_PREFIX:
        apply_evict_prefix(n, op);
        break;
    case NAIVE_CLEANED:
        n->state.pages[op->page].dirty = 0;
        break;
    default:
        index = naive_tenant_place(n, op->tenant);
        n->state.tenants[index].quota = op->tokens;
        n->state.tenants[index].guaranteed = op->budget;
    }
}

/* ---- what follows from the references ------------------------------------------------------------------------------
 */

static void settle_page(struct naive *n, uint32_t page, uint32_t before)
{
    struct naive_page *seen = &n->state.pages[page];
    bool held = seen->references != 0;
    if (!held && !seen->published)
        n->sealed[page] = false, n->keys[page] = seen->digest = 0;
    if (!held && before != 0)
        n->stamps[page] = n->tick;
    seen->state = page < n->geometry.reserved_pages ? KVP_PAGE_RESERVED
                  : held                            ? (n->sealed[page] ? KVP_PAGE_SEALED : KVP_PAGE_HELD)
                  : seen->published                 ? KVP_PAGE_CACHED
                                                    : KVP_PAGE_FREE;
    seen->key = seen->published ? n->keys[page] : 0;
    seen->children = 0;
    seen->age = seen->published && !held ? n->tick - n->stamps[page] : 0;
    if (!seen->published)
        seen->parent = seen->hits = 0;
    n->state.free_pages += seen->state == KVP_PAGE_FREE;
    n->state.cached += seen->state == KVP_PAGE_CACHED;
    n->state.published += seen->published;
    n->state.dirty += seen->dirty && held;
    if (held || seen->published) {
        n->state.tenants[seen->tenant - 1].pages++;
        n->state.tenants[seen->tenant - 1].cached += !held;
    }
}

void naive_settle_cache(struct naive *n, const uint32_t before[NAIVE_PAGES])
{
    struct naive_state *s = &n->state;
    s->cached = s->published = s->dirty = s->pins = 0;
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++)
        s->tenants[i].pages = s->tenants[i].cached = 0;
    for (uint32_t page = 0; page < n->geometry.pages; page++)
        settle_page(n, page, before[page]);
    for (uint32_t page = 0; page < n->geometry.pages; page++) {
        if (s->pages[page].parent != 0)
            s->pages[s->pages[page].parent - 1].children++;
    }
    for (uint32_t i = 0; i < NAIVE_SEQS; i++)
        s->pins += s->seqs[i].state == KVP_SEQ_PIN;
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++) {
        for (uint32_t story = 0; story < NAIVE_STORIES; story++)
            s->matches[i][story] = match(n, NAIVE_TENANT_ID + i, NAIVE_TENANT_ID + i, story, NAIVE_ROW);
    }
}
