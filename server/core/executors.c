/**
 * Executors: processes that do the work that touches a device, started when there is some, and started again.
 *
 *            need            up              hello answered
 *   IDLE ─────────► STARTING ───► HELLO ─────────────────────► READY
 *     ▲                 │           │  no hello in time           │
 *     │                 │           └────────► STOPPING           │
 *     └──────────────── gone ◄──────────────────┴─────────────────┘
 *
 * One a device. What an executor was given is counted by its `starts`: a slab, a buffer or a job that was given to an
 * earlier start is given again before it is used. One that ends KVP_EXEC_ATTEMPTS times in a row without a hello is
 * left alone for a while, longer each time; who needs it meanwhile is told KVP_ENODEV and why.
 *
 * Memory for legacy handles is the executor's own: with it, those pools are lost.
 */
#include "op.h"

#include <stdio.h>

#define RETRY_MS     1000u
#define RETRY_MS_MAX 30000u
#define LISTING_MS   5u /* between two listings of processes */

static void copy_text(char *to, size_t bytes, const char *from)
{
    snprintf(to, bytes, "%s", from);
}

/* ---- finding, starting ------------------------------------------------------------------------------------------- */

enum kvp_status core_exec_slot(struct kvp_core *core, const char *device, uint32_t *ret_executor)
{
    uint32_t unused = KVP_GPUS_MAX;
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        struct executor *executor = &core->executors[i];
        if (!executor->used) {
            unused = unused < i ? unused : i;
            continue;
        }
        if (strcmp(executor->device, device) == 0 || (device[0] == '\0' && executor->first)) {
            *ret_executor = i;
            return KVP_OK;
        }
    }
    if (unused == KVP_GPUS_MAX)
        return core_refuse(core, KVP_ELIMIT, "devices: %d are in use, no room for \"%s\"", KVP_GPUS_MAX, device);
    struct executor *executor = &core->executors[unused];
    executor->used = true;
    executor->first = device[0] == '\0';
    copy_text(executor->device, sizeof(executor->device), device);
    copy_text(executor->backend, sizeof(executor->backend), core->config.backend);
    *ret_executor = unused;
    return KVP_OK;
}

static void start(struct kvp_core *core, uint32_t slot)
{
    struct executor *executor = &core->executors[slot];
    executor->state = EXECUTOR_STARTING;
    executor->starts++;
    executor->deadline_ms = core->now_ms + core->config.executor_start_ms;
    core_due(core, executor->deadline_ms);
    core->act->exec_start(core->ctx, slot, executor->device);
}

enum kvp_status core_exec_need(struct kvp_core *core, const char *device, uint32_t *ret_executor)
{
    uint32_t slot;
    TRY(core_exec_slot(core, device, &slot));
    struct executor *executor = &core->executors[slot];
    if (executor->state == EXECUTOR_IDLE) {
        if (executor->retry_ms > core->now_ms)
            return core_refuse(core, KVP_ENODEV, "the executor for device \"%s\" does not start: %s", executor->device,
                               executor->why);
        start(core, slot);
    }
    *ret_executor = slot;
    return executor->state == EXECUTOR_READY ? KVP_OK : KVP_WAIT;
}

void kvp_core_exec_up(struct kvp_core *core, uint32_t slot, uint32_t pid)
{
    struct executor *executor = &core->executors[slot];
    if (slot >= KVP_GPUS_MAX || executor->state != EXECUTOR_STARTING)
        return;
    executor->state = EXECUTOR_HELLO;
    executor->pid = pid;
    Kvpool__V1__ExecHelloRequest hello = KVPOOL__V1__EXEC_HELLO_REQUEST__INIT;
    hello.abi_version = KVP_ABI_VERSION;
    hello.backend = executor->backend;
    core_exec_send(core, slot, KVPOOL__V1__METHOD__METHOD_EXEC_HELLO, EXEC_TAG(TAG_HELLO, executor->starts),
                   &hello.base, NULL, 0);
    core_settle(core);
}

void core_exec_send(struct kvp_core *core, uint32_t executor, uint16_t method, uint64_t tag,
                    const ProtobufCMessage *body, const struct kvp_thing *things, unsigned n_things)
{
    core->act->exec_send(core->ctx, executor, method, tag, body, things, n_things);
}

/* ---- the end of one ---------------------------------------------------------------------------------------------- */

static void lose_pool(struct kvp_core *core, struct pool_state *pool, const char *why)
{
    kvp_txn_begin(core->ledger);
    CORE_ASSERT(kvp_pool_set_lost(core->ledger, pool->id) == KVP_OK);
    kvp_txn_commit(core->ledger);
    core_publish_header(core, pool, KVP_TABLE_LOST);
    core_jobs_fail_pool(core, pool->id, KVP_ELOST, "the pool's memory is lost");
    core_log(core, 2, "pool %s is lost: %s", pool->spec->name, why);
}

static void lose_pools(struct kvp_core *core, uint32_t slot)
{
    for (uint32_t i = 0; i < KVP_POOLS_MAX; i++) {
        struct pool_state *pool = &core->pools[i];
        bool held = false;
        for (uint32_t rank = 0; rank < pool->n_slabs; rank++)
            held |= pool->slabs[rank].executor == slot && pool->slabs[rank].held != 0;
        if (pool->id.generation == 0 || !pool->legacy || !held || pool->table == NULL)
            continue;
        lose_pool(core, pool, "its memory was its executor's (legacy handles), which ended");
    }
}

void kvp_core_exec_gone(struct kvp_core *core, uint32_t slot)
{
    struct executor *executor = &core->executors[slot];
    if (slot >= KVP_GPUS_MAX || executor->state == EXECUTOR_IDLE)
        return;
    bool was_ready = executor->state == EXECUTOR_READY;
    if (executor->state != EXECUTOR_STOPPING)
        copy_text(executor->why, sizeof(executor->why), was_ready ? "it ended" : "it ended before it said hello");
    executor->state = EXECUTOR_IDLE;
    executor->pid = 0;
    executor->failures = was_ready ? 0 : executor->failures + 1;
    executor->retry_ms = 0;
    executor->listing_asked = 0;
    if (executor->failures >= KVP_EXEC_ATTEMPTS) {
        uint32_t doublings = executor->failures - KVP_EXEC_ATTEMPTS;
        uint64_t wait = doublings < 5 ? (uint64_t)RETRY_MS << doublings : RETRY_MS_MAX;
        executor->retry_ms = core->now_ms + (wait < RETRY_MS_MAX ? wait : RETRY_MS_MAX);
    }
    core_log(core, 4, "the executor for device \"%s\" is gone: %s", executor->device, executor->why);
    if (was_ready)
        lose_pools(core, slot);
    core_ops_executor_gone(core, slot, "the executor ended before it answered");
    core_jobs_executor_gone(core, slot);
    core_digests_executor_gone(core, slot);
    core_wake(core, WAIT_EXECUTOR, slot);
    core_settle(core);
}

void core_exec_tick(struct kvp_core *core)
{
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        struct executor *executor = &core->executors[i];
        if (executor->state != EXECUTOR_STARTING && executor->state != EXECUTOR_HELLO)
            continue;
        if (executor->deadline_ms > core->now_ms) {
            core_due(core, executor->deadline_ms);
            continue;
        }
        snprintf(executor->why, sizeof(executor->why), "it did not say hello within %u ms",
                 core->config.executor_start_ms);
        executor->state = EXECUTOR_STOPPING;
        core->act->exec_stop(core->ctx, i);
    }
}

/* ---- answers ----------------------------------------------------------------------------------------------------- */

static const char *error_text(enum kvp_status status, const struct kvp_message *message)
{
    if (message->body != NULL && message->body->descriptor == &kvpool__v1__error__descriptor)
        return ((const Kvpool__V1__Error *)message->body)->message;
    return kvp_status_text(status);
}

static void said_hello(struct kvp_core *core, uint32_t slot, enum kvp_status status, const struct kvp_message *message)
{
    struct executor *executor = &core->executors[slot];
    if (executor->state != EXECUTOR_HELLO)
        return;
    const Kvpool__V1__ExecHelloReply *hello = (const Kvpool__V1__ExecHelloReply *)message->body;
    if (status != KVP_OK || hello->base.descriptor != &kvpool__v1__exec_hello_reply__descriptor)
        snprintf(executor->why, sizeof(executor->why), "%s", error_text(status, message));
    else if (hello->abi_version != KVP_ABI_VERSION || hello->n_devices == 0)
        snprintf(executor->why, sizeof(executor->why),
                 "it is of ABI version %u, this daemon of %u, and has %zu devices", hello->abi_version, KVP_ABI_VERSION,
                 hello->n_devices);
    else {
        executor->state = EXECUTOR_READY;
        executor->failures = 0;
        executor->pid = hello->pid;
        copy_text(executor->device, sizeof(executor->device), hello->devices[0]);
        copy_text(executor->backend, sizeof(executor->backend), hello->backend);
        core_log(core, 6, "the executor for device \"%s\" runs: pid %u", executor->device, executor->pid);
        core_wake(core, WAIT_EXECUTOR, slot);
        return;
    }
    executor->state = EXECUTOR_STOPPING;
    core->act->exec_stop(core->ctx, slot);
}

static void listed(struct kvp_core *core, uint32_t slot, uint64_t number, enum kvp_status status,
                   const struct kvp_message *message)
{
    struct executor *executor = &core->executors[slot];
    if (executor->listing_asked != number)
        return;
    executor->listing_asked = 0;
    executor->listing = number;
    executor->listing_known = false;
    if (status == KVP_OK && message->body != NULL &&
        message->body->descriptor == &kvpool__v1__exec_processes_reply__descriptor) {
        const Kvpool__V1__ExecProcessesReply *reply = (const Kvpool__V1__ExecProcessesReply *)message->body;
        executor->listing_known = reply->known && reply->n_pids <= KVP_PIDS_MAX;
        executor->n_pids = executor->listing_known ? (uint32_t)reply->n_pids : 0;
        for (uint32_t i = 0; i < executor->n_pids; i++)
            executor->pids[i] = reply->pids[i];
    }
    core_listing_arrived(core, slot);
}

static void adopted(struct kvp_core *core, uint64_t low, enum kvp_status status, const struct kvp_message *message)
{
    uint32_t pool_slot = (uint32_t)(low >> 8), rank = (uint32_t)low & 0xff;
    if (status == KVP_OK || pool_slot >= KVP_POOLS_MAX || rank >= KVP_GPUS_MAX)
        return;
    core->pools[pool_slot].slabs[rank].adopted = 0;
    core_log(core, 3, "the executor did not adopt slab %u of pool %s: %s", rank,
             core->pools[pool_slot].spec != NULL ? core->pools[pool_slot].spec->name : "?",
             error_text(status, message));
}

/* The legacy handle of a slab that an adopted executor holds. */
static void recalled(struct kvp_core *core, uint64_t low, enum kvp_status status, const struct kvp_message *message)
{
    uint32_t pool_slot = (uint32_t)(low >> 8), rank = (uint32_t)low & 0xff;
    if (pool_slot >= KVP_POOLS_MAX || core->pools[pool_slot].id.generation == 0 ||
        rank >= core->pools[pool_slot].n_slabs)
        return;
    struct pool_state *pool = &core->pools[pool_slot];
    const Kvpool__V1__ExecSlabCreateReply *reply = (const Kvpool__V1__ExecSlabCreateReply *)message->body;
    if (status == KVP_OK && reply->ipc_handle.len == KVP_IPC_HANDLE_BYTES) {
        memcpy(pool->slabs[rank].ipc, reply->ipc_handle.data, KVP_IPC_HANDLE_BYTES);
        pool->slabs[rank].has_ipc = true;
        return;
    }
    lose_pool(core, pool, error_text(status, message));
}

void core_exec_recall_slab(struct kvp_core *core, struct pool_state *pool, uint32_t rank)
{
    Kvpool__V1__ExecSlabCreateRequest request = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    request.pool_id = ID_WORD(pool->id);
    request.rank = rank;
    request.spec = pool->spec;
    request.bytes = pool->slabs[rank].bytes;
    request.device = pool->slabs[rank].device;
    core_exec_send(core, pool->slabs[rank].executor, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE,
                   EXEC_TAG(TAG_RECALL, (uint64_t)pool->id.slot << 8 | rank), &request.base, NULL, 0);
}

static void op_answered(struct kvp_core *core, uint64_t serial, enum kvp_status status, struct kvp_message *message)
{
    struct op *op = core_op_by_serial(core, serial);
    if (op == NULL || op->wait != WAIT_REPLY)
        return;
    op->result = status;
    op->ready = true;
    if (status != KVP_OK)
        snprintf(op->text, sizeof(op->text), "%s", error_text(status, message));
    else if (op->arrived != NULL)
        op->arrived(core, op, message);
}

void kvp_core_exec_reply(struct kvp_core *core, uint32_t executor, enum kvp_status status, struct kvp_message *message)
{
    if (executor >= KVP_GPUS_MAX || core->executors[executor].state == EXECUTOR_IDLE)
        return;
    uint64_t low = EXEC_TAG_LOW(message->tag);
    switch (EXEC_TAG_KIND(message->tag)) {
    case TAG_HELLO:
        said_hello(core, executor, status, message);
        break;
    case TAG_CREATE:
    case TAG_IMPORT:
        op_answered(core, low, status, message);
        break;
    case TAG_ADOPT:
        adopted(core, low, status, message);
        break;
    case TAG_JOB:
        core_job_reply(core, executor, low, status, error_text(status, message));
        break;
    case TAG_LISTING:
        listed(core, executor, low, status, message);
        break;
    case TAG_DIGEST:
        core_digests_reply(core, executor, low, status, message, error_text(status, message));
        break;
    case TAG_RECALL:
        recalled(core, low, status, message);
        break;
    case TAG_FORGET:
        break;
    }
    core_settle(core);
}

/* ---- what executors are given, and forget ------------------------------------------------------------------------ */

enum kvp_status core_exec_adopt(struct kvp_core *core, struct pool_state *pool, uint32_t rank)
{
    struct slab_state *slab = &pool->slabs[rank];
    uint32_t start_now = core->executors[slab->executor].starts;
    if (slab->adopted == start_now)
        return KVP_OK;
    bool with_slab = slab->held != start_now;
    if (with_slab && pool->legacy)
        return KVP_ELOST;
    Kvpool__V1__ExecSlabAdoptRequest request = KVPOOL__V1__EXEC_SLAB_ADOPT_REQUEST__INIT;
    request.pool_id = ID_WORD(pool->id);
    request.rank = rank;
    request.spec = pool->spec;
    request.bytes = slab->bytes;
    request.device = slab->device;
    request.has_slab_fd = with_slab;
    struct kvp_thing things[3] = {
        {KVP_THING_SLAB, pool->id.slot, rank},
        {KVP_THING_TIMELINES, pool->id.slot, 0},
        {KVP_THING_TABLE, pool->id.slot, 0},
    };
    core_exec_send(core, slab->executor, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT,
                   EXEC_TAG(TAG_ADOPT, (uint64_t)pool->id.slot << 8 | rank), &request.base,
                   with_slab ? things : things + 1, with_slab ? 3 : 2);
    slab->held = slab->adopted = start_now;
    return KVP_OK;
}

void core_exec_drop_slabs(struct kvp_core *core, const struct pool_state *pool)
{
    Kvpool__V1__ExecSlabDropRequest request = KVPOOL__V1__EXEC_SLAB_DROP_REQUEST__INIT;
    request.pool_id = ID_WORD(pool->id);
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        const struct slab_state *slab = &pool->slabs[rank];
        const struct executor *executor = &core->executors[slab->executor];
        if (slab->held != 0 && slab->held == executor->starts && executor->state == EXECUTOR_READY)
            core_exec_send(core, slab->executor, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP, EXEC_TAG(TAG_FORGET, 0),
                           &request.base, NULL, 0);
    }
}

void core_exec_drop_buffer(struct kvp_core *core, struct kvp_session_id session, uint32_t buffer)
{
    Kvpool__V1__ExecBufferDropRequest request = KVPOOL__V1__EXEC_BUFFER_DROP_REQUEST__INIT;
    request.session_id = ID_WORD(session);
    request.buffer = buffer;
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        if (core->executors[i].state == EXECUTOR_READY)
            core_exec_send(core, i, KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP, EXEC_TAG(TAG_FORGET, 0), &request.base,
                           NULL, 0);
    }
}

void core_exec_ask_listing(struct kvp_core *core, uint32_t slot)
{
    struct executor *executor = &core->executors[slot];
    if (executor->state != EXECUTOR_READY || executor->listing_asked != 0 || executor->listing_next_ms > core->now_ms)
        return;
    executor->listing_next_ms = core->now_ms + LISTING_MS;
    executor->listing_asked = ++core->listings;
    Kvpool__V1__ExecProcessesRequest request = KVPOOL__V1__EXEC_PROCESSES_REQUEST__INIT;
    core_exec_send(core, slot, KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES,
                   EXEC_TAG(TAG_LISTING, executor->listing_asked), &request.base, NULL, 0);
}
