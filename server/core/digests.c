/**
 * Page digests: taken of pages that were sealed, and compared when an operator asks.
 *
 *   pass     walks the page records of a pool for sealed pages without a digest, a slice a tick: again whenever pages were
 *            sealed since the last one began, and at the start, so that what an earlier daemon did not get to is found
 *   check    walks all pools for pages with one; an Audit call with `digests` asks for it, and shares it with who asked
 *            before it began
 *
 *   pass or check ─► pages found ─► BATCH ─► JOB_DIGEST to the executor of each rank ─► all answered: kept, or compared
 *                                     ▲            │ one died: asked again, KVP_JOB_ATTEMPTS times
 *                                     └────────────┘
 *
 * One batch at a time, of a pass and of the check by turns. A page may be given up, and be taken by another, while its
 * bytes are read: a digest is kept only where the mark of its batch still is (kvp_digest_begin), and compared only where
 * the one that was kept still is.
 *
 * A pool over several GPUs has a page on each: its digest is the sum of theirs, each turned by its rank.
 */
#include "op.h"

#include <assert.h>
#include <stdio.h>

#define LOOKS       16384u         /* page records in one tick: some 50 us */
#define BATCH_BYTES (256ull << 20) /* read for one batch, or a page */
#define PASS_MS     20u            /* from the end of a pass to the next, and a millisecond for each of its ticks */
#define RETRY_MS    10000u         /* after executors could not do it */
#define LOGGED      8u             /* damaged pages of a check */

static_assert(KVP_POOLS_MAX == 64, "a bit a pool");

static struct pool_state *pool_of_batch(struct kvp_core *core)
{
    struct pool_state *pool = &core->pools[core->digests.batch.pool.slot];
    return pool->id.generation == core->digests.batch.pool.generation ? pool : NULL;
}

static bool keeps_digests(const struct kvp_core *core, const struct pool_state *pool)
{
    struct kvp_pool_view view;
    return pool->id.generation != 0 && pool->table != NULL && pool->spec->page_digests &&
           kvp_pool_get(core->ledger, pool->id, &view) == KVP_OK && view.state == KVP_POOL_LIVE;
}

/* ---- a batch ----------------------------------------------------------------------------------------------------- */

static uint32_t batch_room(const struct pool_state *pool)
{
    uint64_t pages = BATCH_BYTES / (pool->page_bytes * pool->n_slabs);
    return pages < 1 ? 1 : pages < DIGEST_BATCH_MAX ? (uint32_t)pages : DIGEST_BATCH_MAX;
}

static uint64_t mark_of(const struct kvp_core *core)
{
    return (kvp_ledger_epoch(core->ledger) << 32 | core->digests.batch.serial) & ~KVP_DIGEST_BIT;
}

static uint64_t tag_of(const struct kvp_core *core, uint32_t rank)
{
    return (kvp_ledger_epoch(core->ledger) & 0xffff) << 40 | (uint64_t)core->digests.batch.serial << 8 | rank;
}

static void batch_begin(struct kvp_core *core, const struct pool_state *pool, enum digest_work work)
{
    struct digest_batch *batch = &core->digests.batch;
    batch->serial += batch->serial == UINT32_MAX ? 2 : 1; /* never 0: no mark is */
    batch->work = work;
    batch->pool = pool->id;
    batch->left = (1u << pool->n_slabs) - 1;
    batch->attempts = 0;
    memset(batch->sent, 0, sizeof(batch->sent));
    memset(batch->sums, 0, sizeof(batch->sums));
}

static void check_end(struct kvp_core *core, enum kvp_status status, const char *text)
{
    struct digest_check *check = &core->digests.check;
    check->active = false;
    check->done = check->begun;
    check->status = status;
    snprintf(check->text, sizeof(check->text), "%s", text);
    core_wake(core, WAIT_DIGESTS, check->done);
}

static void batch_fail(struct kvp_core *core, enum kvp_status status, const char *text)
{
    struct digest_batch *batch = &core->digests.batch;
    struct pool_state *pool = pool_of_batch(core);
    enum digest_work work = batch->work;
    batch->work = DIGEST_NONE;
    if (pool == NULL)
        return;
    core_log(core, 4, "digests of pages of pool %s can not be taken: %s", pool->spec->name, text);
    if (work == DIGEST_CHECK) {
        check_end(core, status, text);
        return;
    }
    core->digests.wanted |= 1ull << pool->id.slot;
    core->digests.pass &= ~(1ull << pool->id.slot);
    pool->digests_next_ms = core->now_ms + RETRY_MS;
}

static void keep(struct kvp_core *core, const struct pool_state *pool)
{
    const struct digest_batch *batch = &core->digests.batch;
    kvp_txn_begin(core->ledger);
    if (kvp_digest_put(core->ledger, pool->id, batch->n, batch->pages, mark_of(core), batch->sums) == KVP_OK)
        kvp_txn_commit(core->ledger);
    else
        kvp_txn_abort(core->ledger);
}

static void compare(struct kvp_core *core, const struct pool_state *pool)
{
    const struct digest_batch *batch = &core->digests.batch;
    struct digest_check *check = &core->digests.check;
    for (uint32_t i = 0; i < batch->n; i++) {
        if (kvp_digest_of(core->ledger, pool->id, batch->pages[i]) != batch->words[i])
            continue;
        check->checked++;
        if ((batch->sums[i] | KVP_DIGEST_BIT) == batch->words[i])
            continue;
        if (check->damaged < DIGEST_DAMAGED_MAX)
            check->pages[check->damaged] = (struct damaged_page){pool->id, batch->pages[i]};
        if (check->damaged++ < LOGGED)
            core_log(core, 2, "pool %s page %u: its bytes are not those that were sealed", pool->spec->name,
                     batch->pages[i]);
    }
}

static void batch_done(struct kvp_core *core)
{
    struct pool_state *pool = pool_of_batch(core);
    if (pool != NULL && core->digests.batch.work == DIGEST_TAKE)
        keep(core, pool);
    else if (pool != NULL)
        compare(core, pool);
    core->digests.batch.work = DIGEST_NONE;
}

/* Ask the executors of those ranks that were not asked, as far as they are there. */
static void batch_send(struct kvp_core *core)
{
    struct digest_batch *batch = &core->digests.batch;
    struct pool_state *pool = pool_of_batch(core);
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    if (pool == NULL) {
        batch_fail(core, KVP_ENOENT, "the pool is gone");
        return;
    }
    job.kind = KVPOOL__V1__JOB_KIND__JOB_DIGEST;
    job.pool_id = ID_WORD(pool->id);
    job.n_digest_pages = batch->n;
    job.digest_pages = batch->pages;
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        uint32_t executor;
        if (batch->sent[rank] != 0)
            continue;
        enum kvp_status status = core_exec_need(core, pool->slabs[rank].device, &executor);
        if (status == KVP_WAIT)
            continue;
        if (status == KVP_OK && core_exec_adopt(core, pool, rank) != KVP_OK)
            status = core_refuse(core, KVP_ELOST, "the pool's memory is lost");
        if (status != KVP_OK) {
            batch_fail(core, status, core->error_text);
            return;
        }
        batch->sent[rank] = core->executors[executor].starts;
        job.rank = rank;
        core_exec_send(core, executor, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, EXEC_TAG(TAG_DIGEST, tag_of(core, rank)),
                       &job.base, NULL, 0);
    }
}

static uint64_t turned(uint64_t digest, uint32_t rank)
{
    return digest << rank | (rank == 0 ? 0 : digest >> (64 - rank));
}

void core_digests_reply(struct kvp_core *core, uint32_t executor, uint64_t low, enum kvp_status status,
                        const struct kvp_message *message, const char *text)
{
    struct digest_batch *batch = &core->digests.batch;
    uint32_t rank = (uint32_t)low & 0xff;
    if (batch->work == DIGEST_NONE || rank >= KVP_GPUS_MAX || low != tag_of(core, rank) ||
        (batch->left & 1u << rank) == 0 || batch->sent[rank] != core->executors[executor].starts)
        return;
    const Kvpool__V1__ExecJobReply *reply = (const Kvpool__V1__ExecJobReply *)message->body;
    if (status == KVP_OK && reply->n_digests != batch->n) {
        status = KVP_EPROTO;
        text = "the executor's answer has not as many as were asked for";
    }
    if (status != KVP_OK) {
        batch_fail(core, status, text);
        return;
    }
    for (uint32_t i = 0; i < batch->n; i++)
        batch->sums[i] += turned(reply->digests[i], rank);
    batch->left &= ~(1u << rank);
    if (batch->left == 0)
        batch_done(core);
}

void core_digests_executor_gone(struct kvp_core *core, uint32_t executor)
{
    struct digest_batch *batch = &core->digests.batch;
    const struct pool_state *pool = pool_of_batch(core);
    bool asked = false;
    for (uint32_t rank = 0; batch->work != DIGEST_NONE && pool != NULL && rank < pool->n_slabs; rank++) {
        if (pool->slabs[rank].executor != executor || (batch->left & 1u << rank) == 0 || batch->sent[rank] == 0)
            continue;
        batch->sent[rank] = 0;
        asked = true;
    }
    if (asked && ++batch->attempts >= KVP_JOB_ATTEMPTS)
        batch_fail(core, KVP_EDEVICE, "the executor died over them again and again");
}

/* The pages in the batch's list. */
static void batch_start(struct kvp_core *core, const struct pool_state *pool, enum digest_work work)
{
    struct digest_batch *batch = &core->digests.batch;
    enum kvp_status status = KVP_OK;
    batch_begin(core, pool, work);
    if (work == DIGEST_TAKE) {
        kvp_txn_begin(core->ledger);
        status = kvp_digest_begin(core->ledger, pool->id, batch->n, batch->pages, mark_of(core));
        if (status == KVP_OK)
            kvp_txn_commit(core->ledger);
        else
            kvp_txn_abort(core->ledger);
    }
    if (status == KVP_OK)
        batch_send(core);
    else
        batch_fail(core, status, kvp_status_text(status));
}

/* ---- passes ------------------------------------------------------------------------------------------------------ */

static void pass_slice(struct kvp_core *core, uint32_t slot)
{
    struct digests *digests = &core->digests;
    struct pool_state *pool = &core->pools[slot];
    if ((digests->pass >> slot & 1) == 0) {
        digests->wanted &= ~(1ull << slot);
        digests->pass |= 1ull << slot;
        pool->digests_cursor = 0;
    }
    if (!keeps_digests(core, pool) ||
        kvp_digest_scan(core->ledger, pool->id, &pool->digests_cursor, LOOKS, batch_room(pool), digests->batch.pages,
                        NULL, &digests->batch.n) != KVP_OK) {
        digests->pass &= ~(1ull << slot);
        return;
    }
    if (pool->digests_cursor >= pool->spec->pages) {
        digests->pass &= ~(1ull << slot);
        pool->digests_next_ms = core->now_ms + PASS_MS + pool->spec->pages / LOOKS;
    }
    if (digests->batch.n != 0)
        batch_start(core, pool, DIGEST_TAKE);
}

/* When the next slice of a pass may be done, and of which pool. NEVER: none is to be done */
static uint64_t pass_due(const struct kvp_core *core, uint32_t *ret_slot)
{
    const struct digests *digests = &core->digests;
    uint64_t due_ms = NEVER;
    for (uint64_t left = digests->wanted | digests->pass; left != 0; left &= left - 1) {
        uint32_t slot = (uint32_t)__builtin_ctzll(left);
        uint64_t at_ms = digests->pass >> slot & 1 ? 0 : core->pools[slot].digests_next_ms;
        if (at_ms >= due_ms)
            continue;
        due_ms = at_ms;
        *ret_slot = slot;
    }
    return due_ms;
}

/* ---- the check --------------------------------------------------------------------------------------------------- */

uint64_t core_digests_ask(struct kvp_core *core)
{
    core->digests.check.wanted = core->digests.check.begun + 1;
    core_due(core, core->now_ms);
    return core->digests.check.wanted;
}

/* Sealed pages of a part of a pool that have no digest yet. */
static uint64_t count_missing(const struct kvp_core *core, const struct pool_state *pool, uint32_t from, uint32_t to)
{
    uint32_t pages[DIGEST_BATCH_MAX], n;
    uint64_t missing = 0;
    while (from < to &&
           kvp_digest_scan(core->ledger, pool->id, &from, to - from, DIGEST_BATCH_MAX, pages, NULL, &n) == KVP_OK)
        missing += n;
    return missing;
}

static void check_slice(struct kvp_core *core)
{
    struct digest_batch *batch = &core->digests.batch;
    struct digest_check *check = &core->digests.check;
    if (!check->active) {
        *check = (struct digest_check){
            .active = true, .wanted = check->wanted, .begun = check->begun + 1, .done = check->done};
        return;
    }
    while (check->slot < KVP_POOLS_MAX && !keeps_digests(core, &core->pools[check->slot]))
        check->slot++, check->cursor = 0;
    if (check->slot == KVP_POOLS_MAX) {
        check_end(core, KVP_OK, "");
        return;
    }
    const struct pool_state *pool = &core->pools[check->slot];
    uint32_t from = check->cursor;
    CORE_ASSERT(kvp_digest_scan(core->ledger, pool->id, &check->cursor, LOOKS, batch_room(pool), batch->pages,
                                batch->words, &batch->n) == KVP_OK);
    check->missing += count_missing(core, pool, from, check->cursor);
    if (check->cursor >= pool->spec->pages)
        check->slot++, check->cursor = 0;
    if (batch->n != 0)
        batch_start(core, pool, DIGEST_CHECK);
}

/* ---- what is to be done ------------------------------------------------------------------------------------------ */

void core_digests_tick(struct kvp_core *core)
{
    struct digests *digests = &core->digests;
    uint32_t slot = 0;
    if (digests->batch.work != DIGEST_NONE)
        return;
    bool check = digests->check.active || digests->check.wanted > digests->check.begun;
    bool pass = pass_due(core, &slot) <= core->now_ms;
    if (pass && (!check || digests->pass_is_next)) {
        digests->pass_is_next = false;
        pass_slice(core, slot);
    } else if (check) {
        digests->pass_is_next = true;
        check_slice(core);
    }
}

bool core_digests_settle(struct kvp_core *core)
{
    struct digests *digests = &core->digests;
    uint64_t done = digests->check.done;
    uint32_t slot = 0;
    if (core->adopting != ADOPT_DONE)
        return false;
    if (digests->seals != core->ledger->seals) {
        digests->seals = core->ledger->seals;
        digests->wanted |= digests->pools;
    }
    if (digests->batch.work != DIGEST_NONE)
        batch_send(core);
    if (digests->batch.work != DIGEST_NONE)
        return false;
    if (digests->check.active || digests->check.wanted > digests->check.begun)
        core_due(core, core->now_ms);
    else if ((digests->wanted | digests->pass) != 0)
        core_due(core, pass_due(core, &slot));
    return digests->check.done != done;
}
