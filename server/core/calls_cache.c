/**
 * The prefix cache on request: asked (Match), kept (Pin), emptied (Evict), listed (ListCache). It is filled and used by
 * calls_advance.c.
 *
 * All are of one tenant, the caller's: what another's pages hold is no match. The ledger keeps a pin's lease in ms; when
 * it ends is known here alone, so that a daemon that adopts begins it anew. Evict of so many pages frees a slice a turn
 * and lets others be served between them; how many went so far is in the call's outcome, so that a repeat after a restart
 * goes on from there. The blocks of prefixes, KVP_CALL_PAGES_MAX at most, go in one turn.
 */
#include "blocks.h"

#define LIST_SCAN         65536u /* pages looked at for one part of a listing */
#define KEY_BYTES         16u
#define EVICT_UNFINISHED  1u   /* in the outcome of an Evict */
#define UNPINS_REMEMBERED 128u /* of a call that ended pins, which there were: bits of its outcome */

static enum kvp_status need_blocks(struct kvp_core *core, const Kvpool__V1__Blocks *blocks)
{
    if (blocks == NULL || blocks->n_counts == 0 || blocks->n_counts > KVP_BATCH_MAX)
        return core_refuse(core, KVP_EINVAL, "blocks: of %zu prefixes, must be 1 to %d in a call",
                           blocks == NULL ? 0 : blocks->n_counts, KVP_BATCH_MAX);
    return KVP_OK;
}

/* ---- Match ------------------------------------------------------------------------------------------------------- */

enum kvp_status call_match(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__MatchRequest *request = (const Kvpool__V1__MatchRequest *)turn->body;
    Kvpool__V1__MatchReply reply = KVPOOL__V1__MATCH_REPLY__INIT;
    struct pool_state *pool;
    struct call_blocks blocks;
    uint32_t tenant = core_tenant(turn);
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(need_blocks(core, request->blocks));
    size_t n = request->blocks->n_counts;
    TRY(core_blocks(core, pool, tenant, request->blocks, n, NULL, &blocks));
    TRY(core_see_named(core, pool));
    reply.cached = core_alloc(core, n, sizeof(*reply.cached));
    if (request->with_pages)
        reply.pages = core_alloc(core, blocks.at[n] + 1, sizeof(*reply.pages));
    if (reply.cached == NULL || (request->with_pages && reply.pages == NULL))
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (size_t i = 0; i < n; i++) {
        size_t found = 0;
        uint32_t *pages = request->with_pages ? reply.pages + reply.n_pages : NULL;
        enum kvp_status status = kvp_cache_match(core->ledger, pool->id, tenant, core_block_count(&blocks, i),
                                                 blocks.keys + blocks.at[i], &found, pages);
        if (status != KVP_OK)
            return core_refuse_plain(core, status, "the prefix index");
        reply.cached[i] = (uint32_t)found * pool->spec->page_tokens;
        reply.n_pages += request->with_pages ? found : 0;
    }
    reply.n_cached = n;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- Pin --------------------------------------------------------------------------------------------------------- */

static void pin_due(struct kvp_core *core, struct pool_state *pool, uint64_t until_ms)
{
    if (until_ms < pool->pins_check_ms)
        pool->pins_check_ms = until_ms;
    core_due(core, pool->pins_check_ms);
}

static void pin_renew(struct kvp_core *core, struct pool_state *pool, uint32_t slot, uint32_t lease_ms)
{
    pool->pin_until_ms[slot] = core->now_ms + lease_ms;
    pin_due(core, pool, pool->pin_until_ms[slot]);
}

void core_pins_adopt(struct kvp_core *core, struct pool_state *pool)
{
    struct kvp_pin_view pin;
    uint32_t slot = kvp_pin_first(core->ledger, pool->id);
    for (; slot != KVP_NONE; slot = kvp_pin_next(core->ledger, pool->id, slot)) {
        if (kvp_pin_at(core->ledger, pool->id, slot, &pin) == KVP_OK)
            pin_renew(core, pool, slot, pin.lease_ms);
    }
}

static void pin_over(struct kvp_core *core, struct pool_state *pool, uint32_t slot)
{
    struct kvp_pin_view pin;
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_pin_at(core->ledger, pool->id, slot, &pin);
    if (status == KVP_OK)
        status = kvp_pin_end(core->ledger, pool->id, pin.id);
    CORE_ASSERT(status == KVP_OK);
    kvp_txn_commit(core->ledger);
    pool->reclaim_due = true;
    core_log(core, 6, "the lease of a pin of tenant %u in pool %s has ended: %u blocks", pin.tenant, pool->spec->name,
             pin.blocks);
}

void core_pins_tick(struct kvp_core *core, struct pool_state *pool)
{
    if (pool->pins_check_ms <= core->now_ms) {
        uint32_t slot = kvp_pin_first(core->ledger, pool->id), next;
        pool->pins_check_ms = NEVER;
        for (; slot != KVP_NONE; slot = next) {
            next = kvp_pin_next(core->ledger, pool->id, slot);
            if (pool->pin_until_ms[slot] <= core->now_ms)
                pin_over(core, pool, slot);
            else
                pin_due(core, pool, pool->pin_until_ms[slot]);
        }
    }
    core_due(core, pool->pins_check_ms);
}

static enum kvp_status pin_one(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                               const struct call_blocks *blocks, size_t i, uint32_t lease_ms,
                               struct kvp_seq_id *ret_pin)
{
    size_t n = core_block_count(blocks, i), found = 0;
    enum kvp_status status = kvp_pin(core->ledger, pool->id, turn->session.spec.tenant, n, blocks->keys + blocks->at[i],
                                     lease_ms, ret_pin, &found);
    if (status == KVP_ENOENT && n == 0)
        return core_refuse(core, KVP_EINVAL, "blocks: prefix %zu has no whole block", i);
    if (status == KVP_ENOENT)
        return core_refuse(core, status, "blocks: of the %zu of prefix %zu the first %zu are cached, a pin needs all",
                           n, i, found);
    if (status == KVP_ELIMIT && pool->reclaim_due)
        return core_wait(core, turn, WAIT_RECLAIM, pool->id.slot);
    if (status == KVP_ELIMIT && n > core_row_pages(pool->spec))
        return core_refuse(core, status, "blocks: prefix %zu of %zu blocks is longer than a row's %u pages", i, n,
                           core_row_pages(pool->spec));
    if (status == KVP_ELIMIT && !core_rows_left(core, pool))
        return core_refuse(core, status, "blocks: prefix %zu finds all %u rows of pool \"%s\" in use", i,
                           pool->spec->max_sequences, pool->spec->name);
    if (status == KVP_ELIMIT)
        return core_refuse(core, status, "blocks: prefix %zu would be one more than the %d pins that a pool may have",
                           i, KVP_PINS_MAX);
    return status == KVP_OK ? KVP_OK : core_refuse_plain(core, status, "the pin");
}

/* End the pin of prefix i, if there is one. @param ret_ended  whether there was */
static enum kvp_status unpin_one(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool,
                                 const struct call_blocks *blocks, size_t i, bool *ret_ended)
{
    struct kvp_seq_id pin;
    enum kvp_status status = kvp_pin_find(core->ledger, pool->id, turn->session.spec.tenant,
                                          core_block_count(blocks, i), blocks->keys + blocks->at[i], &pin);
    *ret_ended = status == KVP_OK;
    if (status == KVP_ENOENT)
        return KVP_OK;
    if (status == KVP_OK)
        status = kvp_pin_end(core->ledger, pool->id, pin);
    return status == KVP_OK ? KVP_OK : core_refuse_plain(core, status, "the pin");
}

static enum kvp_status pin_all(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                               const Kvpool__V1__PinRequest *request, const struct call_blocks *blocks,
                               struct kvp_seq_id *pins, bool *there)
{
    for (size_t i = 0; i < blocks->n; i++) {
        there[i] = true;
        if (request->lease_ms != 0)
            TRY(pin_one(core, turn, pool, blocks, i, request->lease_ms, &pins[i]));
        else
            TRY(unpin_one(core, turn, pool, blocks, i, &there[i]));
    }
    return KVP_OK;
}

/* Make the pins, or end them. @param there  which of them there are, or were */
static enum kvp_status pin_now(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                               const Kvpool__V1__PinRequest *request, const struct call_blocks *blocks, bool *there)
{
    uint64_t were[2] = {0};
    struct kvp_seq_id *pins = core_alloc(core, blocks->n, sizeof(*pins));
    if (pins == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    TRY(core_see_named(core, pool));
    kvp_txn_begin(core->ledger);
    enum kvp_status status = pin_all(core, turn, pool, request, blocks, pins, there);
    if (status != KVP_OK)
        return core_abort(core, status);
    for (size_t i = 0; i < blocks->n && i < UNPINS_REMEMBERED; i++)
        were[i / 64] |= (uint64_t)there[i] << i % 64;
    TRY(core_commit(core, turn, were[0], were[1]));
    for (size_t i = 0; i < blocks->n && request->lease_ms != 0; i++)
        pin_renew(core, pool, pins[i].slot, request->lease_ms);
    if (request->lease_ms == 0) {
        pool->reclaim_due = true;
        core_due(core, core->now_ms);
    }
    return KVP_OK;
}

enum kvp_status call_pin(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__PinRequest *request = (const Kvpool__V1__PinRequest *)turn->body;
    Kvpool__V1__PinReply reply = KVPOOL__V1__PIN_REPLY__INIT;
    struct pool_state *pool;
    struct call_blocks blocks;
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(need_blocks(core, request->blocks));
    if (request->lease_ms != 0 && (request->lease_ms < KVP_LEASE_MS_MIN || request->lease_ms > KVP_LEASE_MS_MAX))
        return core_refuse(core, KVP_EINVAL, "lease_ms: %u, must be 0 or %d to %d", request->lease_ms, KVP_LEASE_MS_MIN,
                           KVP_LEASE_MS_MAX);
    size_t n = request->blocks->n_counts;
    TRY(core_blocks(core, pool, turn->session.spec.tenant, request->blocks, n, NULL, &blocks));
    bool *there = core_alloc(core, n, sizeof(*there));
    reply.pinned = core_alloc(core, n, sizeof(*reply.pinned));
    if (there == NULL || reply.pinned == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    if (!turn->repeated)
        TRY(pin_now(core, turn, pool, request, &blocks, there));
    for (size_t i = 0; i < n; i++) {
        bool was = i < UNPINS_REMEMBERED && (turn->outcome.values[i / 64] >> i % 64 & 1) != 0;
        bool is = turn->repeated ? request->lease_ms != 0 || was : there[i];
        reply.pinned[i] = is ? (uint32_t)core_block_count(&blocks, i) * pool->spec->page_tokens : 0;
    }
    reply.n_pinned = n;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- Evict ------------------------------------------------------------------------------------------------------- */

/* Whose pages: the caller's, or with `all` everybody's. */
static enum kvp_status evict_scope(struct kvp_core *core, const struct turn *turn,
                                   const Kvpool__V1__EvictRequest *request, uint32_t *ret_tenant)
{
    uint32_t uid = turn->call->caller.uid;
    *ret_tenant = core_tenant(turn);
    if (!request->all)
        return KVP_OK;
    if (request->blocks != NULL)
        return core_refuse(core, KVP_EINVAL, "all: blocks are of one tenant, the caller's");
    if (uid != 0 && uid != core->config.uid)
        return core_refuse(core, KVP_EPERM, "all: user %u may evict its own pages alone; all is for root and user %u",
                           uid, core->config.uid);
    *ret_tenant = KVP_NONE;
    return KVP_OK;
}

/* One slice. @return KVP_WAIT: there is more to do */
static enum kvp_status evict_slice(struct kvp_core *core, struct turn *turn, struct pool_state *pool, uint32_t tenant,
                                   uint32_t pages, uint64_t *done)
{
    uint64_t left = pages == 0 ? UINT32_MAX : pages - *done;
    uint32_t wanted = left < core->config.reclaim_slice ? (uint32_t)left : core->config.reclaim_slice, evicted;
    bool more;
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_cache_evict(core->ledger, pool->id, tenant, wanted, &evicted, &more);
    if (status != KVP_OK)
        return core_abort(core, core_refuse_plain(core, status, "the cache"));
    *done += evicted;
    if ((evicted == wanted || more) && left > evicted) {
        struct op *op;
        TRY(core_commit(core, turn, *done, EVICT_UNFINISHED));
        TRY(core_op(core, turn, &op));
        op->done = *done;
        pool->reclaim_due = true;
        core_due(core, core->now_ms);
        return core_wait(core, turn, WAIT_RECLAIM, pool->id.slot);
    }
    return core_commit(core, turn, *done, 0);
}

static enum kvp_status evict_prefixes(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                      uint32_t tenant, const Kvpool__V1__Blocks *named, uint64_t *ret_pages)
{
    struct call_blocks blocks;
    TRY(need_blocks(core, named));
    TRY(core_blocks(core, pool, tenant, named, named->n_counts, NULL, &blocks));
    kvp_txn_begin(core->ledger);
    for (size_t i = 0; i < blocks.n; i++) {
        uint32_t evicted = 0;
        enum kvp_status status = kvp_cache_evict_prefix(core->ledger, pool->id, tenant, core_block_count(&blocks, i),
                                                        blocks.keys + blocks.at[i], &evicted);
        if (status != KVP_OK)
            return core_abort(core, core_refuse_plain(core, status, "the cache"));
        *ret_pages += evicted;
    }
    return core_commit(core, turn, *ret_pages, 0);
}

enum kvp_status call_evict(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__EvictRequest *request = (const Kvpool__V1__EvictRequest *)turn->body;
    Kvpool__V1__EvictReply reply = KVPOOL__V1__EVICT_REPLY__INIT;
    struct pool_state *pool;
    uint32_t tenant;
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(evict_scope(core, turn, request, &tenant));
    if (request->blocks != NULL && request->pages != 0)
        return core_refuse(core, KVP_EINVAL, "pages: %u, must be 0 with blocks", request->pages);
    if (turn->repeated)
        reply.pages = turn->outcome.values[0];
    else if (turn->op != NULL)
        reply.pages = turn->op->done;
    if (turn->repeated && turn->outcome.values[1] != EVICT_UNFINISHED)
        return core_answer(core, turn, &reply.base, NULL, 0);
    TRY(core_reclaimed(core, turn, pool));
    if (request->blocks != NULL)
        TRY(evict_prefixes(core, turn, pool, tenant, request->blocks, &reply.pages));
    else
        TRY(evict_slice(core, turn, pool, tenant, request->pages, &reply.pages));
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- ListCache --------------------------------------------------------------------------------------------------- */

/* Columns of a listing of up to `limit` pages, in the call's memory. */
static enum kvp_status list_columns(struct kvp_core *core, uint32_t limit, Kvpool__V1__ListCacheReply *reply)
{
    uint32_t **columns[] = {&reply->pages,   &reply->parents, &reply->children, &reply->references,
                            &reply->tenants, &reply->hits,    &reply->ages};
    uint32_t *words = core_alloc(core, limit, sizeof(columns) / sizeof(columns[0]) * sizeof(*words));
    reply->keys.data = core_alloc(core, limit, KEY_BYTES);
    if (words == NULL || reply->keys.data == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (size_t i = 0; i < sizeof(columns) / sizeof(columns[0]); i++)
        *columns[i] = words + i * limit;
    return KVP_OK;
}

enum kvp_status call_list_cache(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__ListCacheRequest *request = (const Kvpool__V1__ListCacheRequest *)turn->body;
    Kvpool__V1__ListCacheReply reply = KVPOOL__V1__LIST_CACHE_REPLY__INIT;
    struct pool_state *pool;
    uint32_t n = 0, page = request->from_page;
    TRY(core_pool_by_name(core, request->pool, &pool));
    uint32_t limit = request->limit != 0 ? request->limit : KVP_LIST_MAX, pages = pool->spec->pages;
    if (limit > KVP_LIST_MAX)
        return core_refuse(core, KVP_EINVAL, "limit: %u, at most %d", limit, KVP_LIST_MAX);
    TRY(list_columns(core, limit, &reply));
    uint32_t end = page < pages && pages - page > LIST_SCAN ? page + LIST_SCAN : pages;
    for (; page < end && n < limit; page++) {
        struct kvp_cache_entry entry;
        if (kvp_cache_at(core->ledger, pool->id, page, &entry) != KVP_OK)
            continue;
        reply.pages[n] = page;
        memcpy(reply.keys.data + n * KEY_BYTES, entry.key.word, KEY_BYTES);
        reply.parents[n] = entry.parent;
        reply.children[n] = entry.children;
        reply.references[n] = entry.references;
        reply.tenants[n] = entry.tenant;
        reply.hits[n] = entry.hits;
        reply.ages[n] = entry.age;
        n++;
    }
    reply.n_pages = reply.n_parents = reply.n_children = reply.n_references = n;
    reply.n_tenants = reply.n_hits = reply.n_ages = n;
    reply.keys.len = n * KEY_BYTES;
    reply.next_page = page < pages ? page : 0;
    return core_answer(core, turn, &reply.base, NULL, 0);
}
