/**
 * Pools: made, described, listed, deleted.
 *
 * CreatePool obtains, one behind the other, what a pool is made of; each stage is left when its event comes, and the
 * handler starts again from its checks:
 *
 *   START ─► EXECUTORS ─► SLABS (one a device: made, its fd kept) ─► TABLES (table and timelines) ─► the transaction
 *
 * One pool is made at a time, so that the ledger's next place and id stay what they are. Whatever fails, or when the
 * caller goes, everything obtained is given back.
 */
#include "op.h"

#include <stdio.h>

enum stage { STAGE_START = 0, STAGE_EXECUTORS, STAGE_SLABS, STAGE_TABLES };

/* The pool under way. */
struct making {
    struct kvp_pool_id id;
    Kvpool__V1__PoolSpec *spec;
    uint64_t slab_bytes;
    uint32_t n_slabs, made; /* made: the slab that is being made, or the count when all are */
    bool asked;             /* … it was asked for */
    struct slab_state slabs[KVP_GPUS_MAX];
};

static uint64_t timelines_bytes(void)
{
    return (uint64_t)KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX * sizeof(struct kvp_timeline);
}

/* ---- giving back ------------------------------------------------------------------------------------------------- */

static void drop_slab(struct kvp_core *core, const struct making *making, uint32_t rank)
{
    uint32_t executor = making->slabs[rank].executor;
    Kvpool__V1__ExecSlabDropRequest drop = KVPOOL__V1__EXEC_SLAB_DROP_REQUEST__INIT;
    drop.pool_id = ID_WORD(making->id);
    if (core->executors[executor].state == EXECUTOR_READY)
        core_exec_send(core, executor, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP, EXEC_TAG(TAG_FORGET, 0), &drop.base,
                       NULL, 0);
}

static void undo_making(struct kvp_core *core, struct op *op)
{
    struct making *making = op->own;
    if (making->id.generation != 0) {
        for (uint32_t rank = 0; rank < making->n_slabs && rank < making->made + making->asked; rank++)
            drop_slab(core, making, rank);
    }
    core_spec_free(making->spec);
}

/* ---- stages ------------------------------------------------------------------------------------------------------ */

/* A pool of that name: the same is answered, another is refused. KVP_ENOENT: there is none. */
static enum kvp_status answer_existing(struct kvp_core *core, struct turn *turn, const Kvpool__V1__PoolSpec *filled)
{
    struct kvp_pool_id id;
    struct pool_state *pool;
    char differing[300];
    if (kvp_pool_by_name(core->ledger, filled->name, &id) != KVP_OK)
        return KVP_ENOENT;
    TRY(core_pool_by_name(core, filled->name, &pool));
    TRY(core_spec_compare(filled, pool->spec, sizeof(differing), differing));
    if (differing[0] != 0)
        return core_refuse(core, KVP_EEXIST, "name: pool \"%s\" exists and differs from what is asked in %s",
                           filled->name, differing);
    Kvpool__V1__PoolInfo info;
    TRY(core_pool_info(core, pool, &info));
    Kvpool__V1__CreatePoolReply reply = KVPOOL__V1__CREATE_POOL_REPLY__INIT;
    reply.pool = &info;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

static enum kvp_status begin_making(struct kvp_core *core, struct op *op, Kvpool__V1__PoolSpec *take_spec)
{
    struct making *making = calloc(1, sizeof(*making));
    if (making == NULL) {
        core_spec_free(take_spec);
        return core_refuse(core, KVP_ENOMEM, "no memory for a pool that is made");
    }
    making->spec = take_spec;
    making->n_slabs = take_spec->n_devices != 0 ? (uint32_t)take_spec->n_devices : 1;
    op->own = making;
    op->undo = undo_making;
    op->stage = STAGE_EXECUTORS;
    core->pool_maker = op;
    return KVP_OK;
}

/* All executors ready; then the description names its devices, and the pool its place. */
static enum kvp_status need_executors(struct kvp_core *core, struct turn *turn)
{
    struct making *making = turn->op->own;
    for (uint32_t rank = 0; rank < making->n_slabs; rank++) {
        const char *device = making->spec->n_devices != 0 ? making->spec->devices[rank] : core->host ? "host" : "";
        uint32_t executor = 0;
        enum kvp_status status = core_exec_need(core, device, &executor);
        if (status == KVP_WAIT)
            return core_wait(core, turn, WAIT_EXECUTOR, executor);
        TRY(status);
        making->slabs[rank].executor = executor;
        snprintf(making->slabs[rank].device, sizeof(making->slabs[rank].device), "%s",
                 core->executors[executor].device);
    }
    if (making->spec->n_devices == 0) {
        making->spec->devices = calloc(1, sizeof(char *));
        char *name = strdup(making->slabs[0].device);
        if (making->spec->devices == NULL || name == NULL) {
            free(name);
            return core_refuse(core, KVP_ENOMEM, "no memory for the pool's description");
        }
        making->spec->devices[0] = name;
        making->spec->n_devices = 1;
    }
    struct kvp_pool_id id;
    enum kvp_status status = kvp_pool_next_id(core->ledger, &id);
    if (status == KVP_OK)
        status = core_pool_load(core, id, making->spec);
    else
        core_refuse(core, status, "pools: %d exist, the most there may be", KVP_POOLS_MAX);
    TRY(status);
    /* Only sizes were wanted: the state proper comes with the transaction. */
    making->slab_bytes = core->pools[id.slot].slab_bytes;
    core->pools[id.slot].spec = NULL;
    core_pool_unload(core, id.slot);
    making->id = id;
    turn->op->stage = STAGE_SLABS;
    return KVP_OK;
}

/* The executor's answer: take its fd, or the handle. */
static void slab_arrived(struct kvp_core *core, struct op *op, struct kvp_message *message)
{
    struct making *making = op->own;
    struct slab_state *slab = &making->slabs[making->made];
    const Kvpool__V1__ExecSlabCreateReply *reply = (const Kvpool__V1__ExecSlabCreateReply *)message->body;
    bool legacy = making->spec->memory == KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    if (reply == NULL || reply->base.descriptor != &kvpool__v1__exec_slab_create_reply__descriptor ||
        (legacy ? reply->ipc_handle.len != KVP_IPC_HANDLE_BYTES : message->n_fds != 1) ||
        reply->bytes < making->slab_bytes) {
        op->result = KVP_EDEVICE;
        snprintf(op->text, sizeof(op->text), "the executor's answer holds no slab of %llu bytes",
                 (unsigned long long)making->slab_bytes);
        return;
    }
    slab->bytes = reply->bytes;
    slab->held = core->executors[slab->executor].starts;
    slab->has_ipc = legacy;
    if (legacy)
        memcpy(slab->ipc, reply->ipc_handle.data, KVP_IPC_HANDLE_BYTES);
    else
        core_op_keep(core, op, (struct kvp_thing){KVP_THING_SLAB, making->id.slot, making->made}, message, 0);
    if (!legacy) {
        op->ready = false;
        op->wait = WAIT_THING;
        op->key = op->serial;
    }
}

static enum kvp_status ask_slab(struct kvp_core *core, struct turn *turn)
{
    struct op *op = turn->op;
    struct making *making = op->own;
    struct slab_state *slab = &making->slabs[making->made];
    Kvpool__V1__ExecSlabCreateRequest request = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    request.pool_id = ID_WORD(making->id);
    request.rank = making->made;
    request.spec = making->spec;
    request.bytes = making->slab_bytes;
    request.device = slab->device;
    making->asked = true;
    op->result = KVP_OK;
    op->executor = slab->executor;
    op->arrived = slab_arrived;
    enum kvp_status status = core_wait(core, turn, WAIT_REPLY, op->serial);
    core_exec_send(core, slab->executor, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, EXEC_TAG(TAG_CREATE, op->serial),
                   &request.base, NULL, 0);
    return status;
}

static enum kvp_status need_slabs(struct kvp_core *core, struct turn *turn)
{
    struct op *op = turn->op;
    struct making *making = op->own;
    if (op->result != KVP_OK)
        return core_refuse(core, op->result, "slab %u on device \"%s\": %s", making->made,
                           making->slabs[making->made].device, op->text);
    if (making->asked && op->things_awaited != 0)
        return core_wait(core, turn, WAIT_THING, op->serial);
    if (making->asked) {
        making->made++;
        making->asked = false;
    }
    if (making->made < making->n_slabs)
        return ask_slab(core, turn);
    op->stage = STAGE_TABLES;
    core_op_make(core, op, (struct kvp_thing){KVP_THING_TABLE, making->id.slot, 0}, core_table_bytes(making->spec));
    core_op_make(core, op, (struct kvp_thing){KVP_THING_TIMELINES, making->id.slot, 0}, timelines_bytes());
    return core_wait(core, turn, WAIT_THING, op->serial);
}

/* ---- the transaction --------------------------------------------------------------------------------------------- */

static enum kvp_status commit_pool(struct kvp_core *core, struct turn *turn, const struct making *making,
                                   const struct kvp_pool_geometry *geometry, const uint8_t *blob, size_t blob_bytes)
{
    struct kvp_plane_layout *planes;
    struct kvp_layout_totals totals;
    struct kvp_pool_spec spec = {
        .geometry = *geometry,
        .needs_after = !core->host,
        .name = making->spec->name,
        .blob = blob,
        .blob_bytes = (uint32_t)blob_bytes,
        .policy = (enum kvp_policy)making->spec->policy,
        .zero_on_reuse = making->spec->zero_on_reuse == KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_ON,
        .hash = (uint32_t)making->spec->block_hash,
        .region_bytes = core->pools[making->id.slot].region_bytes,
    };
    if (!core->act->random(core->ctx, spec.hash_key, sizeof(spec.hash_key)))
        return core_refuse(core, KVP_EINTERNAL, "no random bytes for the pool's block hash");
    TRY(core_spec_layout(core, making->spec, &planes, &totals, spec.layout_digest));
    free(planes);
    struct kvp_pool_id id;
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_pool_create(core->ledger, &spec, &id);
    for (size_t i = 0; status == KVP_OK && i < making->spec->n_tenants; i++) {
        const Kvpool__V1__TenantShare *share = making->spec->tenants[i];
        status = kvp_tenant_set(core->ledger, id, share->tenant, share->quota_pages, share->guaranteed_pages);
    }
    if (status != KVP_OK) {
        core_refuse(core, status, "the pool's record: %s", kvp_status_text(status));
        return core_abort(core, status);
    }
    CORE_ASSERT(id.slot == making->id.slot && id.generation == making->id.generation);
    return core_commit(core, turn, ID_WORD(id), 0);
}

/* Everything is there: back the extent, commit, and hand what was obtained to the pool's state. */
static enum kvp_status finish_pool(struct kvp_core *core, struct turn *turn)
{
    struct op *op = turn->op;
    struct making *making = op->own;
    const Kvpool__V1__PoolSpec *spec = making->spec;
    struct kvp_pool_geometry geometry = {
        .pages = spec->pages,
        .page_tokens = spec->page_tokens,
        .reserved_pages = spec->reserved_pages,
        .max_sequences = spec->max_sequences,
        .row_pages = core_row_pages(spec),
        .page_digests = spec->page_digests,
    };
    uint64_t offset, bytes;
    enum kvp_status status = kvp_pool_extent(core->ledger, &geometry, &offset, &bytes);
    if (status != KVP_OK)
        return core_refuse(core, status, "the ledger has no room for a pool of %u pages and %u rows of %u pages",
                           geometry.pages, geometry.max_sequences, geometry.row_pages);
    size_t blob_bytes = kvpool__v1__pool_spec__get_packed_size(spec);
    uint8_t *blob = core_alloc(core, 1, blob_bytes);
    if (blob == NULL || blob_bytes > KVP_POOL_BLOB_BYTES)
        return core_refuse(core, KVP_ENOMEM, "no memory for the pool's description");
    kvpool__v1__pool_spec__pack(spec, blob);
    status = core->act->ledger_back(core->ctx, offset, bytes);
    if (status != KVP_OK)
        return core_refuse(core, status, "the ledger could not be backed by %llu bytes more",
                           (unsigned long long)bytes);
    status = core_pool_load(core, making->id, making->spec);
    if (status == KVP_OK) {
        status = commit_pool(core, turn, making, &geometry, blob, blob_bytes);
        if (status != KVP_OK) {
            core->pools[making->id.slot].spec = NULL;
            core_pool_unload(core, making->id.slot);
        }
    }
    if (status != KVP_OK) {
        core->act->ledger_unback(core->ctx, offset, bytes);
        return status;
    }
    struct pool_state *pool = &core->pools[making->id.slot];
    const struct op_thing *table = core_op_thing(op, (struct kvp_thing){KVP_THING_TABLE, pool->id.slot, 0});
    const struct op_thing *timelines = core_op_thing(op, (struct kvp_thing){KVP_THING_TIMELINES, pool->id.slot, 0});
    memcpy(pool->slabs, making->slabs, sizeof(pool->slabs));
    pool->table = table->address;
    pool->table_bytes = table->bytes;
    pool->timelines = timelines->address;
    op->n_things = 0;
    op->undo = NULL;
    core_publish_header(core, pool, KVP_TABLE_LIVE);
    core_log(core, 6, "pool %s is made: %u pages of %u tokens, %llu bytes on %u device(s)", pool->spec->name,
             pool->spec->pages, pool->spec->page_tokens, (unsigned long long)pool->slabs[0].bytes, pool->n_slabs);
    return KVP_OK;
}

static enum kvp_status need_tables(struct kvp_core *core, struct turn *turn)
{
    struct op *op = turn->op;
    if (op->things_awaited != 0)
        return core_wait(core, turn, WAIT_THING, op->serial);
    if (op->result != KVP_OK)
        return core_refuse(core, op->result, "%s", op->text);
    return finish_pool(core, turn);
}

enum kvp_status call_create_pool(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__CreatePoolRequest *request = (const Kvpool__V1__CreatePoolRequest *)turn->body;
    Kvpool__V1__PoolSpec *filled;
    if (turn->op == NULL || turn->op->stage == STAGE_START) {
        TRY(core_spec_fill(core, request->spec, &filled));
        enum kvp_status status = answer_existing(core, turn, filled);
        struct op *op = NULL;
        if (status == KVP_ENOENT) {
            struct kvp_plane_layout *planes;
            struct kvp_layout_totals totals;
            uint64_t digest[2];
            status = core_spec_layout(core, filled, &planes, &totals, digest);
            if (status == KVP_OK)
                free(planes);
            if (status == KVP_OK && core->pool_maker != NULL)
                status = core_wait(core, turn, WAIT_MAKER, 0);
            if (status == KVP_OK)
                status = core_op(core, turn, &op);
            if (status == KVP_OK)
                status = begin_making(core, op, filled);
            if (status == KVP_OK)
                filled = NULL;
        }
        core_spec_free(filled);
        if (op == NULL || status != KVP_OK)
            return status;
    }
    if (turn->op->stage == STAGE_EXECUTORS)
        TRY(need_executors(core, turn));
    TRY(turn->op->stage == STAGE_SLABS ? need_slabs(core, turn) : need_tables(core, turn));
    filled = core->pools[((struct making *)turn->op->own)->id.slot].spec;
    return answer_existing(core, turn, filled);
}

/* ---- DescribePool, ListPools, DeletePool ------------------------------------------------------------------------- */

enum kvp_status call_describe_pool(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__DescribePoolRequest *request = (const Kvpool__V1__DescribePoolRequest *)turn->body;
    struct pool_state *pool;
    Kvpool__V1__PoolInfo info;
    TRY(core_pool_by_name(core, request->pool, &pool));
    TRY(core_pool_info(core, pool, &info));
    Kvpool__V1__DescribePoolReply reply = KVPOOL__V1__DESCRIBE_POOL_REPLY__INIT;
    reply.pool = &info;
    TRY(core_region_list(core, pool, &reply.n_regions, &reply.regions));
    return core_answer(core, turn, &reply.base, NULL, 0);
}

enum kvp_status call_list_pools(struct kvp_core *core, struct turn *turn)
{
    char *names[KVP_POOLS_MAX];
    Kvpool__V1__ListPoolsReply reply = KVPOOL__V1__LIST_POOLS_REPLY__INIT;
    reply.names = names;
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct kvp_pool_view view;
        if (kvp_pool_at(core->ledger, slot, &view) == KVP_OK)
            names[reply.n_names++] = (char *)view.name;
    }
    return core_answer(core, turn, &reply.base, NULL, 0);
}

static enum kvp_status refuse_busy(struct kvp_core *core, const struct pool_state *pool)
{
    struct kvp_pool_view view;
    TRY(kvp_pool_get(core->ledger, pool->id, &view));
    return core_refuse(core, KVP_EBUSY,
                       "pool: \"%s\" has %u sessions attached, %u sequences open, %u whose pages are not back yet, %u "
                       "regions, or work "
                       "under way",
                       pool->spec->name, view.attachments, view.open_sequences, view.retiring_sequences, view.regions);
}

enum kvp_status call_delete_pool(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__DeletePoolRequest *request = (const Kvpool__V1__DeletePoolRequest *)turn->body;
    Kvpool__V1__DeletePoolReply reply = KVPOOL__V1__DELETE_POOL_REPLY__INIT;
    struct pool_state *pool;
    struct kvp_pool_view view;
    if (turn->repeated)
        return core_answer(core, turn, &reply.base, NULL, 0);
    TRY(core_pool_by_name(core, request->pool, &pool));
    TRY(kvp_pool_get(core->ledger, pool->id, &view));
    if (view.attachments == 0 && view.open_sequences == 0 && pool->reclaim_due)
        return core_wait(core, turn, WAIT_RECLAIM, pool->id.slot);
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_pool_delete(core->ledger, pool->id);
    if (status != KVP_OK) {
        core_abort(core, status);
        return status == KVP_EBUSY ? refuse_busy(core, pool) : core_refuse_plain(core, status, "pool");
    }
    core_log(core, 6, "pool %s is deleted", pool->spec->name);
    __atomic_store_n(&((struct kvp_table_header *)(void *)pool->table)->state, (uint32_t)KVP_TABLE_DELETED,
                     __ATOMIC_RELEASE);
    TRY(core_commit(core, turn, 0, 0));
    core_exec_drop_slabs(core, pool);
    for (uint32_t rank = 0; rank < pool->n_slabs && !pool->legacy; rank++)
        core->act->thing_drop(core->ctx, (struct kvp_thing){KVP_THING_SLAB, pool->id.slot, rank});
    core->act->thing_drop(core->ctx, (struct kvp_thing){KVP_THING_TABLE, pool->id.slot, 0});
    core->act->thing_drop(core->ctx, (struct kvp_thing){KVP_THING_TIMELINES, pool->id.slot, 0});
    core->act->ledger_unback(core->ctx, view.extent_offset, view.extent_bytes);
    core_pool_unload(core, pool->id.slot);
    return core_answer(core, turn, &reply.base, NULL, 0);
}
