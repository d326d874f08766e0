/**
 * A ledger that an earlier daemon left: what is in it is taken over, what was parked is matched as the shell announces
 * it, and at the first tick it is served.
 *
 *   create      pools are laid out from their descriptions, leases start anew in full
 *   announced   tables, timelines and progress pages with their addresses, slabs, buffers; connections; executors,
 *               which are greeted again
 *   MEETING     ticks, until every executor that was kept has said hello, or has not within ADOPT_MS;
 *               a pool that lacks its table, its timelines or a slab is LOST; the others are published again
 *   ASKING      each job that is open is asked for at the executors of its pool, with a second hello behind the
 *               questions; a job that none of them knows has failed: the request is still on its socket, and does it
 *               again
 *   SERVING     sessions whose connection was not announced have ended; calls that waited are carried out
 *
 * Nothing is asked for again that is there, and nothing is dropped that the ledger names. What is announced and is not
 * named was parked ahead of a transaction that did not come, and goes.
 */
#include "op.h"

#include <stdio.h>

#define ADOPT_MS 1000u /* for an executor's hello: it answers at once, unless it hangs */

/* ---- create ------------------------------------------------------------------------------------------------------ */

/* What is stored twice must agree: the description, and what the ledger laid its extent out by. */
static bool same_shape(const struct kvp_core *core, const struct kvp_pool_view *view,
                       const Kvpool__V1__PoolSpec *spec)
{
    const struct kvp_pool_geometry *geometry = &view->geometry;
    const uint64_t *digest = core->pools[view->id.slot].digest;
    return strcmp(spec->name, view->name) == 0 && spec->page_tokens == geometry->page_tokens &&
           spec->reserved_pages == geometry->reserved_pages && core_row_pages(spec) == geometry->row_pages &&
           spec->page_digests == (geometry->page_digests != 0) &&
           digest[0] == view->layout_digest[0] && digest[1] == view->layout_digest[1];
}

static enum kvp_status adopt_pool(struct kvp_core *core, const struct kvp_pool_view *view)
{
    Kvpool__V1__PoolSpec *spec = kvpool__v1__pool_spec__unpack(NULL, view->blob_bytes, view->blob);
    if (spec == NULL || spec->n_devices == 0 || spec->n_devices > KVP_GPUS_MAX ||
        spec->max_sequences != view->geometry.max_sequences || spec->pages != view->geometry.pages) {
        core_spec_free(spec);
        return core_refuse(core, KVP_ECORRUPT, "pool %s: its description can not be read", view->name);
    }
    enum kvp_status status = core_pool_load(core, view->id, spec);
    if (status != KVP_OK) {
        core_spec_free(spec);
        return status == KVP_ENOMEM ? status : KVP_ECORRUPT;
    }
    if (view->needs_after == core->host)
        return core_refuse(core, KVP_ECORRUPT, "pool %s: it is not of the %s backend", view->name,
                           core->config.backend);
    if (!same_shape(core, view, spec))
        return core_refuse(core, KVP_ECORRUPT, "pool %s: its description is not that of its pages", view->name);
    struct pool_state *pool = &core->pools[view->id.slot];
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        struct slab_state *slab = &pool->slabs[rank];
        snprintf(slab->device, sizeof(slab->device), "%s", spec->devices[rank]);
    }
    core_joined_count(core, pool);
    return KVP_OK;
}

static void adopt_session(struct kvp_core *core, const struct kvp_session_view *view)
{
    struct session_state *state = &core->sessions[view->id.slot];
    state->generation = view->id.generation;
    if (view->state == KVP_SESSION_ENDING)
        core->ending++;
    else
        core_lease_renew(core, view);
}

enum kvp_status core_adopt(struct kvp_core *core)
{
    if (kvp_ledger_epoch(core->ledger) == 1)
        return KVP_OK;
    core->adopting = ADOPT_MEETING;
    core_due(core, core->now_ms);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct kvp_pool_view view;
        if (kvp_pool_at(core->ledger, slot, &view) == KVP_OK)
            TRY(adopt_pool(core, &view));
    }
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(core->ledger, slot, &view) == KVP_OK)
            adopt_session(core, &view);
    }
    for (uint32_t i = 0; i < KVP_BUFFERS_ALL_MAX; i++) {
        struct kvp_buffer_view view;
        if (kvp_buffer_at(core->ledger, i, &view) == KVP_OK)
            TRY(core_buffer_adopt(core, &view));
    }
    return KVP_OK;
}

/* ---- announced --------------------------------------------------------------------------------------------------- */

/* An fd is as good as the next; what it holds was checked when it was registered. */
static bool take_buffer(struct kvp_core *core, struct kvp_thing thing)
{
    if (thing.a >= KVP_SESSIONS_MAX || thing.b > KVP_BUFFERS_MAX || core->sessions[thing.a].buffers == NULL)
        return false;
    struct buffer_state *buffer = &core->sessions[thing.a].buffers[thing.b];
    if (!buffer->used || buffer->has_ipc)
        return false;
    buffer->parked = true;
    return true;
}

/* @return whether the ledger names it */
static bool take_thing(struct kvp_core *core, struct kvp_thing thing, void *address, uint64_t bytes)
{
    struct kvp_attachment_view attachment;
    if (thing.kind == KVP_THING_BUFFER)
        return take_buffer(core, thing);
    if (thing.a >= KVP_POOLS_MAX || core->pools[thing.a].id.generation == 0)
        return false;
    struct pool_state *pool = &core->pools[thing.a];
    switch (thing.kind) {
    case KVP_THING_TABLE:
        if (bytes < core_table_bytes(pool->spec) || address == NULL)
            return false;
        pool->table = address;
        pool->table_bytes = bytes;
        return true;
    case KVP_THING_TIMELINES:
        if (bytes < KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX * sizeof(struct kvp_timeline) || address == NULL)
            return false;
        pool->timelines = address;
        return true;
    case KVP_THING_PROGRESS:
        if (bytes < pool->spec->max_sequences * sizeof(uint64_t) || address == NULL ||
            kvp_attachment_get(core->ledger, pool->id, thing.b, &attachment) != KVP_OK)
            return false;
        pool->attachments[thing.b].progress = address;
        pool->attachments[thing.b].mapped = true; /* who was handed a progress page was handed slabs */
        pool->attachments[thing.b].ask_nvml_ms = pool->host || attachment.nvml_seen ? NEVER : core->now_ms;
        return true;
    case KVP_THING_SLAB:
        if (thing.b >= pool->n_slabs || (pool->host && bytes < pool->slab_bytes))
            return false;
        pool->slabs[thing.b].bytes = pool->slab_bytes;
        return true;
    case KVP_THING_BUFFER:
        break;
    }
    return false;
}

void core_adopt_thing(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                      uint64_t bytes)
{
    if (core->adopting && status == KVP_OK && take_thing(core, thing, address, bytes))
        return;
    core_log(core, 6, "%c%u.%u was kept, and nothing in the ledger is held by it: given up", thing.kind, thing.a,
             thing.b);
    core->act->thing_drop(core->ctx, thing);
}

void kvp_core_session_adopted(struct kvp_core *core, struct kvp_session_id session)
{
    if (session.slot < KVP_SESSIONS_MAX && session.generation != 0 &&
        core->sessions[session.slot].generation == session.generation)
        core->sessions[session.slot].connected = true;
}

void kvp_core_exec_adopted(struct kvp_core *core, uint32_t slot)
{
    if (core->adopting == ADOPT_DONE || slot >= KVP_GPUS_MAX)
        return;
    struct executor *executor = &core->executors[slot];
    executor->used = true;
    executor->state = EXECUTOR_STARTING;
    executor->starts = 1;
    executor->deadline_ms = core->now_ms + ADOPT_MS;
    snprintf(executor->device, sizeof(executor->device), "kept %u", slot); /* until it says its name */
    snprintf(executor->backend, sizeof(executor->backend), "%s", core->config.backend);
    core_due(core, executor->deadline_ms);
    kvp_core_exec_up(core, slot, 0);
}

/* ---- serving ----------------------------------------------------------------------------------------------------- */

/* The memory of a lost pool's table and timelines, where there is none: nobody else sees it. */
static bool stand_in(struct pool_state *pool)
{
    if (pool->table == NULL)
        pool->table = pool->stand_in_table = calloc(1, core_table_bytes(pool->spec));
    if (pool->timelines == NULL)
        pool->timelines = pool->stand_in_timelines =
            calloc(KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX, sizeof(struct kvp_timeline));
    return pool->table != NULL && pool->timelines != NULL;
}

static void lose(struct kvp_core *core, struct pool_state *pool, const char *why)
{
    kvp_txn_begin(core->ledger);
    CORE_ASSERT(kvp_pool_set_lost(core->ledger, pool->id) == KVP_OK);
    kvp_txn_commit(core->ledger);
    core_log(core, 2, "pool %s is lost: %s", pool->spec->name, why);
}

/* @return what a pool lacks; NULL: nothing */
static const char *missing_of(struct kvp_core *core, struct pool_state *pool)
{
    if (pool->table == NULL || pool->timelines == NULL)
        return "its table or its timelines were not kept";
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        struct slab_state *slab = &pool->slabs[rank];
        if (core_exec_slot(core, slab->device, &slab->executor) != KVP_OK)
            return "there are too many devices";
        const struct executor *executor = &core->executors[slab->executor];
        if (pool->legacy && executor->state != EXECUTOR_READY)
            return "its memory was its executor's (legacy handles), which ended";
        if (pool->legacy) {
            slab->bytes = pool->slab_bytes;
            slab->held = executor->starts;
            core_exec_recall_slab(core, pool, rank);
        }
        if (slab->bytes == 0)
            return "its memory was not kept";
    }
    return NULL;
}

/* Legacy handles are handed out without a progress page: nothing tells who has one. */
static void suppose_mapped(struct kvp_core *core, struct pool_state *pool)
{
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        struct kvp_attachment_view view;
        struct attachment_state *state = &pool->attachments[i];
        if (kvp_attachment_get(core->ledger, pool->id, i, &view) != KVP_OK || state->mapped)
            continue;
        state->mapped = true;
        state->ask_nvml_ms = view.nvml_seen ? NEVER : core->now_ms;
    }
}

static void serve_pool(struct kvp_core *core, struct pool_state *pool)
{
    struct kvp_pool_view view;
    const char *missing = missing_of(core, pool);
    if (kvp_pool_get(core->ledger, pool->id, &view) != KVP_OK)
        return;
    if (missing != NULL && view.state == KVP_POOL_LIVE)
        lose(core, pool, missing);
    if (!stand_in(pool)) {
        core_log(core, 2, "pool %s: no memory for its state; it is not served", pool->spec->name);
        return;
    }
    if (pool->legacy)
        suppose_mapped(core, pool);
    core_publish_header(core, pool, missing == NULL && view.state == KVP_POOL_LIVE ? KVP_TABLE_LIVE : KVP_TABLE_LOST);
    core_publish_all(core, pool);
    for (uint32_t slot = 0; slot < pool->spec->max_sequences; slot++) {
        struct kvp_seq_view seq;
        if (kvp_seq_at(core->ledger, pool->id, slot, &seq) != KVP_OK || seq.state != KVP_SEQ_OPEN)
            continue;
        if (seq.pending_tokens != 0)
            core_pending_add(core, pool, slot);
        core_named_add(pool, &seq);
    }
    core_pins_adopt(core, pool);
    pool->reclaim_due = true;
}

static void lose_buffers(struct kvp_core *core)
{
    for (uint32_t i = 0; i < KVP_BUFFERS_ALL_MAX; i++) {
        struct kvp_buffer_view view;
        if (kvp_buffer_at(core->ledger, i, &view) != KVP_OK)
            continue;
        const struct buffer_state *buffer = &core->sessions[view.session.slot].buffers[view.number];
        if (buffer->used && !buffer->has_ipc && !buffer->parked)
            core_buffer_lost(core, &view);
    }
}

static void end_unconnected(struct kvp_core *core)
{
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(core->ledger, slot, &view) != KVP_OK || view.state != KVP_SESSION_OPEN ||
            view.spec.kind != KVP_SESSION_SOCKET || core->sessions[slot].connected)
            continue;
        core_log(core, 5, "session %llx (pid %u) has no connection any more", (unsigned long long)ID_WORD(view.id),
                 view.spec.pid);
        core_session_end(core, view.id);
    }
}

/* Has every executor that was kept answered the hello that it was sent last, or ended? */
static bool all_met(const struct kvp_core *core)
{
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        if (core->executors[i].state == EXECUTOR_HELLO || core->executors[i].state == EXECUTOR_STARTING)
            return false;
    }
    return true;
}

/* A second hello behind the questions: its answer comes after theirs. */
static void greet_again(struct kvp_core *core)
{
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        struct executor *executor = &core->executors[i];
        if (executor->state != EXECUTOR_READY)
            continue;
        executor->state = EXECUTOR_STARTING;
        executor->deadline_ms = core->now_ms + ADOPT_MS;
        core_due(core, executor->deadline_ms);
        kvp_core_exec_up(core, i, executor->pid);
    }
}

void core_adopt_step(struct kvp_core *core)
{
    if (core->adopting == ADOPT_MEETING && all_met(core)) {
        for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
            if (core->pools[slot].id.generation != 0)
                serve_pool(core, &core->pools[slot]);
        }
        lose_buffers(core);
        core->adopting = ADOPT_ASKING;
        if (core_jobs_ask(core))
            greet_again(core);
    }
    if (core->adopting == ADOPT_ASKING && all_met(core)) {
        core->adopting = ADOPT_DONE;
        core_jobs_asked(core);
        end_unconnected(core);
        core_due(core, core->now_ms);
        core_wake(core, WAIT_ADOPT, 0);
    }
}

void core_adopt_tick(struct kvp_core *core)
{
    core->announced = true;
}
