/**
 * The prefix cache of core_sim's model: which blocks the index knows, by looking at the bytes of the pages that it lists.
 *
 * A block is a number: of a tenant, a way of naming, and a story up to there. What the index lists is taken over page by
 * page, and must be right: the page holds the bytes of one block, one block has one key and one page, and behind its
 * parent. What a living sequence has named and written must be known, and stays known as long as it is held or pinned.
 * Which of the others are evicted is the core's choice: how many, and whose, is not.
 */
#include "sim.h"

#define CODES    (TENANTS * 2 * STORIES * ROW)
#define PINS     12
#define NO_ACTOR TENANTS

struct pin {
    bool used;
    unsigned tenant;
    struct story story;
    uint32_t blocks, lease_ms;
    uint64_t until_ms;
};

static uint32_t page_of[CODES]; /* + 1; 0: not known */
static uint32_t code_of[PAGES]; /* + 1; 0: not known */
static struct kvp_block_key key_of[CODES];
static bool has_key[CODES];
static unsigned long gone_in[CODES]; /* the last step in which its page was evicted */
static struct {
    unsigned tenant; /* + 1; 0: nobody wrote there */
    uint64_t token;
} soil[PAGES][PAGE]; /* what was written last */
static struct pin pins[PINS];
static unsigned actor = NO_ACTOR;

/* ---- stories ----------------------------------------------------------------------------------------------------- */

struct story any_story(void)
{
    return (struct story){below(STORIES), below(3) == 0};
}

uint32_t story_shares(unsigned a, unsigned b)
{
    if (a == b)
        return ROW;
    return 2 * (a == 0 ? b : b == 0 ? a : a < b ? a : b);
}

/* Story s has its first 2 · s blocks in common with story 0. */
static unsigned told_by(struct story story, uint32_t block)
{
    return block < 2 * story.number ? 0 : story.number;
}

static uint32_t code(unsigned tenant, struct story story, uint32_t block)
{
    return ((tenant * 2 + story.opaque) * STORIES + told_by(story, block)) * ROW + block;
}

static uint64_t token_of(uint32_t block_code, uint32_t t)
{
    uint64_t x = (block_code * PAGE + t + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    return x ^ x >> 27;
}

uint64_t story_token(unsigned tenant, struct story story, uint32_t at)
{
    return token_of(code(tenant, story, at / PAGE), at % PAGE);
}

Kvpool__V1__Blocks *story_blocks(struct story story, uint32_t first, uint32_t n)
{
    static struct named named;
    static uint32_t tokens[SEQ_TOKENS + PAGE];
    static uint64_t keys[ROW];
    uint32_t partial = below(PAGE);
    for (uint32_t i = 0; i < n * PAGE + partial; i++) {
        uint32_t block = first + i / PAGE;
        tokens[i] = told_by(story, block) * 1000 + first * PAGE + i;
        if (i / PAGE < n)
            keys[i / PAGE] = told_by(story, block) * 1000 + block;
    }
    if (!story.opaque)
        return by_tokens(&named, tokens, n * PAGE + partial, first);
    by_keys(&named, keys, sizeof(keys[0]), n);
    named.first = first;
    named.blocks.n_first = first != 0;
    return &named.blocks;
}

/* ---- what is known ----------------------------------------------------------------------------------------------- */

uint32_t known_blocks(unsigned tenant, struct story story, uint32_t n)
{
    uint32_t found = 0;
    while (found < n && page_of[code(tenant, story, found)] != 0)
        found++;
    return found;
}

static bool holds_block(uint32_t page, uint32_t block_code)
{
    for (uint32_t t = 0; t < PAGE; t++) {
        if (token_in(page, t) != token_of(block_code, t))
            return false;
    }
    return true;
}

static uint32_t block_in(uint32_t page)
{
    uint32_t found = 0;
    while (found < CODES && !holds_block(page, found))
        found++;
    MUST(found < CODES, "page %u is known, and holds no block of any story", page);
    return found;
}

static void take_over(const struct kvp_cache_entry *entry)
{
    uint32_t page = entry->page, found = block_in(page);
    MUST(page_of[found] == 0, "block %u is known by pages %u and %u", found, page_of[found] - 1, page);
    for (uint32_t i = 0; i < CODES; i++) {
        bool same = has_key[i] && memcmp(&key_of[i], &entry->key, sizeof(entry->key)) == 0;
        MUST(!same || i == found, "blocks %u and %u have one key", i, found);
    }
    MUST(!has_key[found] || memcmp(&key_of[found], &entry->key, sizeof(entry->key)) == 0, "block %u has two keys",
         found);
    key_of[found] = entry->key;
    has_key[found] = true;
    page_of[found] = page + 1;
    code_of[page] = found + 1;
}

/* An entry of what was taken over: its bytes, its tenant, and the page of the block before. */
static void check_entry(const struct kvp_cache_entry *entry)
{
    uint32_t found = code_of[entry->page] - 1, block = found % ROW;
    MUST(holds_block(entry->page, found), "page %u of block %u has other bytes now", entry->page, found);
    MUST(entry->tenant == TENANT + found / (CODES / TENANTS) * TENANT, "page %u of block %u is listed as tenant %u's",
         entry->page, found, entry->tenant);
    MUST((entry->parent == KVP_NONE) == (block == 0), "page %u is block %u of a prefix, with parent %u", entry->page,
         block, entry->parent);
    if (block == 0)
        return;
    struct story story = {found / ROW % STORIES, found / ROW / STORIES % 2};
    MUST(code_of[entry->parent] == code(found / (CODES / TENANTS), story, block - 1) + 1,
         "page %u of block %u extends page %u of block %u", entry->page, found, entry->parent,
         code_of[entry->parent] - 1);
}

static bool entry_at(uint32_t page, struct kvp_cache_entry *ret_entry)
{
    return kvp_cache_at(&shell->ledger, pool_id(), page, ret_entry) == KVP_OK;
}

static uint32_t pages_of_second(void)
{
    struct kvp_tenant_view view;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        if (kvp_tenant_at(&shell->ledger, pool_id(), i, &view) == KVP_OK && view.id == 2 * TENANT)
            return view.pages;
    }
    return 0;
}

/* @return pages of the second tenant that were evicted */
static void forget_gone(void)
{
    struct kvp_cache_entry entry;
    bool seconds = false;
    for (uint32_t page = 0; page < PAGES; page++) {
        if (code_of[page] == 0)
            continue;
        bool same = entry_at(page, &entry) && memcmp(&entry.key, &key_of[code_of[page] - 1], sizeof(entry.key)) == 0;
        if (same)
            continue;
        seconds |= (code_of[page] - 1) / (CODES / TENANTS) == 1;
        counts[DONE_MADE_ROOM]++;
        gone_in[code_of[page] - 1] = step_number;
        page_of[code_of[page] - 1] = 0;
        code_of[page] = 0;
    }
    if (seconds && actor == 0)
        MUST(pages_of_second() >= GUARANTEED, "a tenant with a guarantee of %u pages was left %u", GUARANTEED,
             pages_of_second());
    actor = NO_ACTOR;
}

void note_actor(unsigned tenant)
{
    actor = tenant;
    for (unsigned i = 0; i < WAITING_MAX; i++) {
        if (waiting[i] != NULL)
            actor = NO_ACTOR; /* it may have been that one */
    }
}

/* ---- what must be known ------------------------------------------------------------------------------------------ */

static void check_named(struct sequence *s, const uint32_t *row)
{
    for (uint32_t i = 0; i < ROW; i++) {
        uint32_t block = code(clients[s->owner].tenant, s->story, i);
        if (i >= s->named || (i + 1) * PAGE > s->written) {
            s->known[i] = KNOWN_NOT;
        } else if (page_of[block] != 0) {
            bool own = page_of[block] == row[i] + 1;
            MUST(own || s->known[i] != KNOWN_OWN, "block %u of key %llu was known by its page %u, now by page %u", i,
                 (unsigned long long)s->key, row[i], page_of[block] - 1);
            s->known[i] = own ? KNOWN_OWN : KNOWN_BY_ANOTHER;
        } else { /* of two writers of a block, the other one's page was known, and went */
            bool was = s->known[i] >= KNOWN_BY_ANOTHER || (s->known[i] == KNOWN_NOT && gone_in[block] == step_number);
            MUST(was, "block %u of key %llu is %s", i, (unsigned long long)s->key,
                 s->known[i] == KNOWN_OWN ? "not known any more, though it is held" : "named and full, and not known");
            s->known[i] = KNOWN_LOST;
        }
    }
}

/* A page has one tenant, and of the first there are no more than its quota. */
static void count_page(unsigned char taken[PAGES], uint32_t page, unsigned tenant)
{
    MUST(taken[page] == 0 || taken[page] == tenant + 1, "page %u is of both tenants", page);
    taken[page] = (unsigned char)(tenant + 1);
}

static void check_sequences(void)
{
    unsigned char taken[PAGES] = {0};
    uint32_t n = 0;
    for (unsigned i = 0; i < SEQUENCES; i++) {
        struct sequence *s = &sequences[i];
        struct kvp_seq_view view;
        if (!s->used || !clients[s->owner].open || look(s, &view) != KVP_OK)
            continue;
        const uint32_t *row = kvp_seq_row(&shell->ledger, pool_id(), view.id.slot);
        if (s->tells)
            check_named(s, row);
        for (uint32_t k = 0; k < view.row_pages; k++)
            count_page(taken, row[k], clients[s->owner].tenant);
    }
    for (uint32_t page = 0; page < PAGES; page++) {
        if (code_of[page] != 0)
            count_page(taken, page, (code_of[page] - 1) / (CODES / TENANTS));
        n += taken[page] == 1;
    }
    MUST(n <= QUOTA, "the tenant with a quota of %u pages has %u", QUOTA, n);
}

static uint32_t pins_left(void)
{
    uint32_t n = 0;
    for (unsigned i = 0; i < PINS; i++) {
        pins[i].used &= shell->now_ms < pins[i].until_ms;
        n += pins[i].used;
    }
    return n;
}

static void check_pins(void)
{
    uint32_t n = pins_left();
    MUST(cache_view().pins >= n, "there are %u pins, and must be %u", cache_view().pins, n);
    for (unsigned i = 0; i < PINS; i++) {
        const struct pin *pin = &pins[i];
        if (!pin->used)
            continue;
        uint32_t known = known_blocks(pin->tenant, pin->story, pin->blocks);
        MUST(known == pin->blocks, "of %u pinned blocks %u are known", pin->blocks, known);
    }
}

void check_pins_ended(void)
{
    uint32_t n = pins_left();
    MUST(cache_view().pins == n, "there are %u pins, and the leases of all but %u have ended", cache_view().pins, n);
}

void renew_pins(uint64_t now_ms)
{
    for (unsigned i = 0; i < PINS; i++)
        pins[i].until_ms = now_ms + pins[i].lease_ms;
}

void refresh_cache(void)
{
    struct kvp_cache_entry entry;
    forget_gone();
    for (uint32_t page = 0; page < PAGES; page++) {
        if (entry_at(page, &entry) && code_of[page] == 0)
            take_over(&entry);
    }
}

void check_cache(void)
{
    struct kvp_cache_entry entry;
    refresh_cache();
    for (uint32_t page = 0; page < PAGES; page++) {
        if (entry_at(page, &entry))
            check_entry(&entry);
    }
    check_sequences();
    check_pins();
}

/* ---- bytes of other tenants -------------------------------------------------------------------------------------- */

void note_written(unsigned tenant, const uint32_t *row, const uint64_t *token, uint32_t from, uint32_t to)
{
    for (uint32_t t = from; t < to; t++) {
        soil[row[t / PAGE]][t % PAGE].tenant = tenant + 1;
        soil[row[t / PAGE]][t % PAGE].token = token[t];
    }
}

void check_zeroed(const struct sequence *s)
{
    struct kvp_seq_view view;
    unsigned mine = clients[s->owner].tenant + 1;
    ck_assert_int_eq(look(s, &view), KVP_OK);
    const uint32_t *row = kvp_seq_row(&shell->ledger, pool_id(), view.id.slot);
    for (uint32_t t = view.written; t < view.row_pages * PAGE; t++) {
        uint32_t page = row[t / PAGE];
        if (soil[page][t % PAGE].tenant == 0 || soil[page][t % PAGE].tenant == mine)
            continue;
        MUST(token_in(page, t % PAGE) != soil[page][t % PAGE].token, "page %u of key %llu shows another tenant's bytes",
             page, (unsigned long long)s->key);
        soil[page][t % PAGE].tenant = 0;
        counts[DONE_ZEROED]++;
    }
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

void step_match(void)
{
    struct client *c = any_client();
    struct story story = any_story();
    uint32_t blocks = 1 + below(ROW);
    Kvpool__V1__MatchRequest request = KVPOOL__V1__MATCH_REQUEST__INIT;
    if (c == NULL)
        return;
    request.session = c->token;
    request.pool = (char *)POOL;
    request.blocks = story_blocks(story, 0, blocks);
    request.with_pages = true;
    uint32_t known = known_blocks(c->tenant, story, blocks);
    struct shell_call *call = CLIENT_CALL(c, MATCH, request);
    MUST(call->status == KVP_OK, "%s", shell_error(call));
    const Kvpool__V1__MatchReply *reply = (const Kvpool__V1__MatchReply *)call->reply;
    MUST(reply->cached[0] == known * PAGE, "%u tokens match, %u blocks are known", reply->cached[0], known);
    MUST(reply->n_pages == known, "%zu pages for %u blocks", reply->n_pages, known);
    for (uint32_t i = 0; i < known; i++)
        MUST(reply->pages[i] + 1 == page_of[code(c->tenant, story, i)], "block %u matches page %u", i, reply->pages[i]);
    counts[DONE_MATCH] += known != 0;
    shell_call_free(shell, call);
}

/* The pin that ends where this one would, or a free one; NULL: too many. */
static struct pin *pin_for(unsigned tenant, struct story story, uint32_t blocks, bool *ret_there)
{
    struct pin *free_one = NULL;
    for (unsigned i = 0; i < PINS; i++) {
        struct pin *pin = &pins[i];
        *ret_there = pin->used && code(pin->tenant, pin->story, pin->blocks - 1) == code(tenant, story, blocks - 1);
        if (*ret_there)
            return pin;
        if (!pin->used)
            free_one = pin;
    }
    return free_one;
}

static void unpin(struct client *c, struct pin *pin, bool there, Kvpool__V1__PinRequest *request, uint32_t blocks)
{
    struct shell_call *call = CLIENT_CALL(c, PIN, *request);
    MUST(call->status == KVP_OK, "%s", shell_error(call));
    uint32_t was = ((const Kvpool__V1__PinReply *)call->reply)->pinned[0];
    /* in the last moment of its lease it may be there and may not */
    bool sure = !there || shell->now_ms < pin->until_ms;
    MUST(!sure || was == (there ? blocks * PAGE : 0), "%u tokens were pinned, and the model has %s pin", was,
         there ? "a" : "no");
    counts[DONE_UNPIN] += was != 0;
    pin->used = false;
    shell_call_free(shell, call);
}

void step_pin(void)
{
    struct client *c = any_client();
    struct story story = any_story();
    Kvpool__V1__PinRequest request = KVPOOL__V1__PIN_REQUEST__INIT;
    bool there;
    if (c == NULL)
        return;
    uint32_t known = known_blocks(c->tenant, story, ROW);
    uint32_t blocks = known == 0 || below(8) == 0 ? 1 + below(ROW) : 1 + below(known);
    struct pin *pin = pin_for(c->tenant, story, blocks, &there);
    if (pin == NULL)
        return;
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.blocks = story_blocks(story, 0, blocks);
    if (below(3) == 0) {
        unpin(c, pin, there, &request, blocks);
        return;
    }
    request.lease_ms = KVP_LEASE_MS_MIN + below(1000);
    uint64_t now_ms = shell->now_ms;
    struct shell_call *call = CLIENT_CALL(c, PIN, request);
    if (call->status == KVP_OK) {
        refresh_cache(); /* it may have waited for a row, while more became known */
        known = known_blocks(c->tenant, story, blocks);
        MUST(known >= blocks, "%u blocks are pinned, of which %u are known", blocks, known);
        *pin = (struct pin){true, c->tenant, story, blocks, request.lease_ms, now_ms + request.lease_ms};
        counts[DONE_PIN]++;
    } else {
        MUST(call->status == KVP_ELIMIT || (call->status == KVP_ENOENT && known < blocks), "%s", shell_error(call));
    }
    shell_call_free(shell, call);
}

/* Whether the sequence is of a session that lives. */
static bool is_owned(const struct kvp_seq_view *view)
{
    struct kvp_attachment_view attachment;
    return view->state == KVP_SEQ_OPEN &&
           kvp_attachment_get(&shell->ledger, pool_id(), view->attachment, &attachment) == KVP_OK &&
           attachment.state == KVP_ATTACHMENT_LIVE;
}

/* Pages that somebody has; with `all`, those too that are on their way back. */
static void mark_held(bool all, bool held[PAGES])
{
    memset(held, 0, PAGES * sizeof(*held));
    for (uint32_t slot = 0; slot < ROWS; slot++) {
        struct kvp_seq_view view;
        struct kvp_pin_view pin;
        const uint32_t *row = kvp_seq_row(&shell->ledger, pool_id(), slot);
        uint32_t n = 0;
        if (kvp_pin_at(&shell->ledger, pool_id(), slot, &pin) == KVP_OK) {
            n = pin.blocks;
        } else if (kvp_seq_at(&shell->ledger, pool_id(), slot, &view) == KVP_OK && (all || is_owned(&view))) {
            n = view.row_pages;
            if (view.copy.tokens != 0)
                held[view.copy.source] = true;
        }
        for (uint32_t i = 0; i < n; i++)
            held[row[i]] = true;
    }
}

/* Whether nobody has a page, and nothing that is left extends it. */
static bool can_go(uint32_t page, const bool held[PAGES], const bool gone[PAGES])
{
    struct kvp_cache_entry entry;
    if (held[page] || gone[page])
        return false;
    for (uint32_t other = 0; other < PAGES; other++) {
        if (!gone[other] && entry_at(other, &entry) && entry.parent == page)
            return false;
    }
    return true;
}

static uint32_t may_go(unsigned tenant, bool all)
{
    bool held[PAGES], gone[PAGES] = {false};
    uint32_t n = 0;
    mark_held(all, held);
    for (bool again = true; again;) {
        again = false;
        for (uint32_t page = 0; page < PAGES; page++) {
            if (code_of[page] == 0 || (code_of[page] - 1) / (CODES / TENANTS) != tenant || !can_go(page, held, gone))
                continue;
            gone[page] = again = true;
            n++;
        }
    }
    return n;
}

/* The same of a prefix, from its end on. */
static uint32_t may_go_of(unsigned tenant, struct story story, uint32_t blocks, bool all)
{
    bool held[PAGES], gone[PAGES] = {false};
    uint32_t n = 0;
    mark_held(all, held);
    for (uint32_t i = blocks; i-- > 0;) {
        uint32_t page = page_of[code(tenant, story, i)];
        if (page == 0)
            continue;
        if (!can_go(page - 1, held, gone))
            break;
        gone[page - 1] = true;
        n++;
    }
    return n;
}

void step_evict(void)
{
    struct client *c = any_client();
    struct story story = any_story();
    uint32_t blocks = 1 + below(ROW), least, most;
    Kvpool__V1__EvictRequest request = KVPOOL__V1__EVICT_REQUEST__INIT;
    if (c == NULL)
        return;
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    if (below(2) == 0) {
        request.blocks = story_blocks(story, 0, blocks);
        least = may_go_of(c->tenant, story, blocks, true);
        most = may_go_of(c->tenant, story, blocks, false);
    } else {
        request.pages = below(6) == 0 ? 0 : 1 + below(SLICE);
        least = may_go(c->tenant, true);
        most = may_go(c->tenant, false);
        if (request.pages != 0) {
            least = least < request.pages ? least : request.pages;
            most = most < request.pages ? most : request.pages;
        }
    }
    struct shell_call *call = shell_send(shell, c->caller, KVPOOL__V1__METHOD__METHOD_EVICT, &request.base, NULL);
    if (!call->answered) { /* rows are on their way back, or it takes several slices: others are served in between */
        least = 0;
        most = PAGES;
    }
    while (!call->answered)
        shell_run_ms(shell, 1);
    MUST(call->status == KVP_OK, "%s", shell_error(call));
    uint64_t evicted = ((const Kvpool__V1__EvictReply *)call->reply)->pages;
    MUST(least <= evicted && evicted <= most, "%llu pages were evicted, must be %u to %u", (unsigned long long)evicted,
         least, most);
    counts[DONE_EVICT] += evicted;
    shell_call_free(shell, call);
}

/* All that the index knows, in parts of any size. */
void step_list(void)
{
    struct client *c = any_client();
    Kvpool__V1__ListCacheRequest request = KVPOOL__V1__LIST_CACHE_REQUEST__INIT;
    uint32_t listed = 0, known = 0;
    if (c == NULL)
        return;
    request.session = c->token;
    request.pool = (char *)POOL;
    request.limit = 1 + below(PAGES);
    do {
        struct shell_call *call = CLIENT_CALL(c, LIST_CACHE, request);
        MUST(call->status == KVP_OK, "%s", shell_error(call));
        const Kvpool__V1__ListCacheReply *reply = (const Kvpool__V1__ListCacheReply *)call->reply;
        for (size_t i = 0; i < reply->n_pages; i++) {
            uint32_t block = code_of[reply->pages[i]];
            MUST(block != 0 && memcmp(reply->keys.data + 16 * i, &key_of[block - 1], 16) == 0,
                 "page %u is listed with another key", reply->pages[i]);
        }
        listed += (uint32_t)reply->n_pages;
        request.from_page = reply->next_page;
        shell_call_free(shell, call);
    } while (request.from_page != 0);
    for (uint32_t page = 0; page < PAGES; page++)
        known += code_of[page] != 0;
    MUST(listed == known, "%u pages are listed, %u are known", listed, known);
    counts[DONE_LIST]++;
}
