/**
 * Mapping: a session attaches to a pool and is handed what it maps; and registers memory of its own.
 *
 * Attach commits the attachment first, then asks for a progress page, which is named by the attachment's index; an
 * attachment without a page is what a session has that only calls, or maps metadata alone. `mapped` is set before a slab is
 * handed out: from then on, only proof that its process has ended makes its pages free again.
 *
 * Buffers are numbered 1..KVP_BUFFERS_MAX in a session. A buffer is imported by its device's executor before it is
 * registered, so that what can't be imported is refused here; other executors import it when a job of theirs needs it.
 * The ledger names it then, and a later daemon goes on with it.
 */
#include "op.h"

/* ---- Attach: checks ---------------------------------------------------------------------------------------------- */

static enum kvp_status check_expectations(struct kvp_core *core, const struct pool_state *pool,
                                          const Kvpool__V1__AttachRequest *request)
{
    struct kvp_pool_view view;
    TRY(kvp_pool_get(core->ledger, pool->id, &view));
    if (request->layout_digest.len != 0) {
        uint64_t digest[2] = {0, 0};
        if (request->layout_digest.len != sizeof(digest))
            return core_refuse(core, KVP_EINVAL, "layout_digest: %zu bytes, must be 0 or %zu",
                               request->layout_digest.len, sizeof(digest));
        memcpy(digest, request->layout_digest.data, sizeof(digest));
        if (digest[0] != view.layout_digest[0] || digest[1] != view.layout_digest[1])
            return core_refuse(core, KVP_EMISMATCH,
                               "layout_digest: %016llx%016llx, that of pool \"%s\" is %016llx%016llx",
                               (unsigned long long)digest[0], (unsigned long long)digest[1], pool->spec->name,
                               (unsigned long long)view.layout_digest[0], (unsigned long long)view.layout_digest[1]);
    }
    if (request->model[0] != '\0' && strcmp(request->model, pool->spec->model) != 0)
        return core_refuse(core, KVP_EMISMATCH, "model: \"%.100s\", that of pool \"%s\" is \"%s\"", request->model,
                           pool->spec->name, pool->spec->model);
    if (request->abi_version != 0 && request->abi_version != KVP_ABI_VERSION)
        return core_refuse(core, KVP_EMISMATCH, "abi_version: %u, this daemon's tables are of version %u",
                           request->abi_version, KVP_ABI_VERSION);
    return KVP_OK;
}

static enum kvp_status check_door(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool)
{
    if (turn->call->caller.door == KVP_DOOR_SOCKET || pool->legacy)
        return KVP_OK;
    return core_refuse(
        core, KVP_EINVAL,
        "Attach to pool \"%s\" needs the session socket: gRPC can pass no fds; on a GPU, a pool with memory "
        "MEMORY_LEGACY_IPC can be attached to over gRPC",
        pool->spec->name);
}

/* The attachment whose group is joined; KVP_NONE: none. */
static enum kvp_status find_group(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool,
                                  uint64_t join, bool metadata_only, uint32_t *ret_leader)
{
    struct kvp_session_view session;
    *ret_leader = KVP_NONE;
    if (join == 0)
        return KVP_OK;
    if (kvp_session_get(core->ledger, session_id(join), &session) != KVP_OK ||
        kvp_attachment_of(core->ledger, pool->id, session.id, ret_leader) != KVP_OK)
        return core_refuse(core, KVP_ENOENT, "join: session %#llx is not attached to pool \"%s\"",
                           (unsigned long long)join, pool->spec->name);
    if (session.spec.tenant != turn->session.spec.tenant)
        return core_refuse(core, KVP_EPERM, "join: session %#llx is another tenant's", (unsigned long long)join);
    if (turn->call->caller.door != KVP_DOOR_SOCKET)
        return core_refuse(core, KVP_EINVAL, "join: a group's progress pages need the session socket");
    if (metadata_only)
        return core_refuse(core, KVP_EINVAL, "join: who maps metadata alone writes no rank's part");
    return KVP_OK;
}

/* ---- Attach: what is obtained ------------------------------------------------------------------------------------ */

/* The session's attachment, made if there is none; a group can only be joined by a new one. */
static enum kvp_status obtain_attachment(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                         uint64_t join, bool metadata_only, uint32_t *ret_attachment)
{
    struct kvp_attachment_view view, leader_view;
    uint32_t leader;
    TRY(find_group(core, turn, pool, join, metadata_only, &leader));
    enum kvp_status status = kvp_attachment_of(core->ledger, pool->id, turn->session.id, ret_attachment);
    if (status == KVP_OK) {
        TRY(kvp_attachment_get(core->ledger, pool->id, *ret_attachment, &view));
        if (leader == KVP_NONE)
            return KVP_OK;
        TRY(kvp_attachment_get(core->ledger, pool->id, leader, &leader_view));
        if (view.leader != leader_view.leader)
            return core_refuse(core, KVP_EBUSY, "join: this session is attached already, outside that group");
        return KVP_OK;
    }
    TRY(core_tenant_check(core, turn, pool));
    kvp_txn_begin(core->ledger);
    status = kvp_attach(core->ledger, pool->id, turn->session.id, leader, ret_attachment);
    if (status == KVP_ELIMIT)
        core_refuse(core, status, "pool: \"%s\" has %d sessions attached, the most there may be", pool->spec->name,
                    KVP_ATTACHMENTS_MAX);
    else if (status != KVP_OK)
        core_refuse_plain(core, status, "Attach");
    if (status != KVP_OK)
        return core_abort(core, status);
    TRY(core_commit(core, turn, *ret_attachment, 0));
    core_joined_count(core, pool);
    return KVP_OK;
}

/* KVP_WAIT until it is there. */
static enum kvp_status obtain_progress(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                       uint32_t attachment)
{
    struct attachment_state *state = &pool->attachments[attachment];
    struct kvp_thing thing = {KVP_THING_PROGRESS, pool->id.slot, attachment};
    struct op *op;
    if (state->progress != NULL || turn->call->caller.door != KVP_DOOR_SOCKET)
        return KVP_OK;
    TRY(core_op(core, turn, &op));
    if (op->stage == 0) {
        op->stage = 1;
        core_op_make(core, op, thing, (uint64_t)pool->spec->max_sequences * sizeof(uint64_t));
        return core_wait(core, turn, WAIT_THING, op->serial);
    }
    if (op->result != KVP_OK)
        return core_refuse(core, op->result, "%s", op->text);
    const struct op_thing *page = core_op_thing(op, thing);
    if (page == NULL)
        return core_wait(core, turn, WAIT_THING, op->serial);
    state->progress = page->address;
    op->n_things = 0;
    return KVP_OK;
}

static enum kvp_status attach_reply(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                    uint32_t attachment, bool metadata_only)
{
    Kvpool__V1__PoolInfo info;
    Kvpool__V1__Slab slabs[KVP_GPUS_MAX], *slab_list[KVP_GPUS_MAX];
    struct kvp_thing things[KVP_GPUS_MAX + 3];
    unsigned n = 0;
    bool fds = turn->call->caller.door == KVP_DOOR_SOCKET;
    TRY(core_pool_info(core, pool, &info));
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        struct slab_state *slab = &pool->slabs[rank];
        kvpool__v1__slab__init(&slabs[rank]);
        slab_list[rank] = &slabs[rank];
        slabs[rank].device = slab->device;
        slabs[rank].bytes = slab->bytes;
        slabs[rank].fd_index = -1;
        if (metadata_only)
            continue;
        if (pool->legacy) {
            slabs[rank].ipc_handle = (ProtobufCBinaryData){KVP_IPC_HANDLE_BYTES, slab->ipc};
        } else if (fds) {
            slabs[rank].fd_index = (int32_t)n;
            things[n++] = (struct kvp_thing){KVP_THING_SLAB, pool->id.slot, rank};
        }
    }
    struct kvp_uuid instance = kvp_ledger_instance(core->ledger);
    Kvpool__V1__AttachReply reply = KVPOOL__V1__ATTACH_REPLY__INIT;
    reply.pool = &info;
    reply.n_slabs = pool->n_slabs;
    reply.slabs = slab_list;
    reply.table_fd_index = fds ? (int32_t)n : -1;
    reply.timelines_fd_index = fds ? (int32_t)n + 1 : -1;
    reply.progress_fd_index = fds && !metadata_only ? (int32_t)n + 2 : -1;
    if (fds) {
        things[n++] = (struct kvp_thing){KVP_THING_TABLE, pool->id.slot, 0};
        things[n++] = (struct kvp_thing){KVP_THING_TIMELINES, pool->id.slot, 0};
    }
    if (fds && !metadata_only)
        things[n++] = (struct kvp_thing){KVP_THING_PROGRESS, pool->id.slot, attachment};
    reply.attachment = attachment;
    reply.epoch = kvp_ledger_epoch(core->ledger);
    reply.instance = (ProtobufCBinaryData){sizeof(instance.bytes), instance.bytes};
    reply.session_id = ID_WORD(turn->session.id);
    return core_answer(core, turn, &reply.base, things, n);
}

enum kvp_status call_attach(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__AttachRequest *request = (const Kvpool__V1__AttachRequest *)turn->body;
    struct pool_state *pool;
    uint32_t attachment;
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(check_expectations(core, pool, request));
    TRY(check_door(core, turn, pool));
    TRY(obtain_attachment(core, turn, pool, request->join, request->metadata_only, &attachment));
    if (!request->metadata_only)
        TRY(obtain_progress(core, turn, pool, attachment));
    struct attachment_state *state = &pool->attachments[attachment];
    if (!state->mapped) {
        for (uint32_t k = 0; k < KVP_TIMELINES_MAX; k++)
            __atomic_store_n(&pool->timelines[attachment * KVP_TIMELINES_MAX + k].error, 0, __ATOMIC_RELEASE);
        state->mapped = !request->metadata_only;
        state->ask_nvml_ms =
            !state->mapped || pool->host || turn->session.spec.kind != KVP_SESSION_SOCKET ? NEVER : core->now_ms;
        if (state->ask_nvml_ms != NEVER)
            core_due(core, core->now_ms);
    }
    return attach_reply(core, turn, pool, attachment, request->metadata_only);
}

/* ---- Detach ------------------------------------------------------------------------------------------------------ */

/* A transfer of its own under way is ended by a value of its timelines: they must stay its. */
static bool awaited_by_transfers(struct kvp_core *core, const struct pool_state *pool, uint32_t attachment)
{
    for (uint32_t i = 0; i < pool->n_pending; i++) {
        struct kvp_seq_view view;
        if (kvp_seq_at(core->ledger, pool->id, pool->pending[i], &view) == KVP_OK && view.state == KVP_SEQ_OPEN &&
            view.pending_tokens != 0 && view.after.timeline / KVP_TIMELINES_MAX == attachment)
            return true;
    }
    return false;
}

enum kvp_status call_detach(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__DetachRequest *request = (const Kvpool__V1__DetachRequest *)turn->body;
    Kvpool__V1__DetachReply reply = KVPOOL__V1__DETACH_REPLY__INIT;
    struct pool_state *pool;
    uint32_t attachment;
    TRY(core_pool_by_name(core, request->pool, &pool));
    if (kvp_attachment_of(core->ledger, pool->id, turn->session.id, &attachment) != KVP_OK)
        return core_answer(core, turn, &reply.base, NULL, 0);
    if (awaited_by_transfers(core, pool, attachment))
        return core_refuse(core, KVP_EBUSY, "pool: a transfer out of this session is under way in \"%s\"",
                           pool->spec->name);
    for (uint32_t i = 0; core->open_jobs != 0 && i < KVP_JOBS_MAX; i++) {
        if (core->jobs[i].id.generation == 0 || !same_session(core->jobs[i].session, turn->session.id))
            continue;
        if (core_job_about_to_end(core, i))
            return core_wait(core, turn, WAIT_JOB, i);
        return core_refuse(core, KVP_EBUSY, "pool: work of this session is under way");
    }
    core_fold_last_words(core, pool, attachment);
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_detach(core->ledger, pool->id, attachment);
    if (status == KVP_EBUSY)
        core_refuse(core, status,
                    "pool: in \"%s\" this session has sequences open, pages on their way back, or a group's others",
                    pool->spec->name);
    else if (status != KVP_OK)
        core_refuse_plain(core, status, "Detach");
    if (status != KVP_OK)
        return core_abort(core, status);
    TRY(core_commit(core, turn, 0, 0));
    core_attachment_gone(core, pool, attachment);
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

enum kvp_status core_buffer(struct kvp_core *core, struct kvp_session_id session, uint32_t buffer,
                            struct buffer_state **ret_buffer)
{
    const struct session_state *state = &core->sessions[session.slot];
    if (state->generation != session.generation || state->buffers == NULL || buffer == 0 || buffer > KVP_BUFFERS_MAX ||
        !state->buffers[buffer].used)
        return core_refuse(core, KVP_ENOENT, "buffer: this session has no buffer %u", buffer);
    *ret_buffer = &state->buffers[buffer];
    return KVP_OK;
}

void core_buffer_import(struct kvp_core *core, uint32_t executor, struct kvp_session_id session, uint32_t number,
                        struct buffer_state *buffer, uint64_t tag)
{
    Kvpool__V1__ExecBufferImportRequest request = KVPOOL__V1__EXEC_BUFFER_IMPORT_REQUEST__INIT;
    struct kvp_thing thing = {KVP_THING_BUFFER, session.slot, number};
    request.session_id = ID_WORD(session);
    request.buffer = number;
    request.device = buffer->device;
    request.bytes = buffer->bytes;
    request.offset = buffer->offset;
    if (buffer->has_ipc)
        request.ipc_handle = (ProtobufCBinaryData){KVP_IPC_HANDLE_BYTES, buffer->ipc};
    buffer->imported[executor] = core->executors[executor].starts;
    core_exec_send(core, executor, KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT, tag, &request.base, &thing,
                   buffer->has_ipc ? 0 : 1);
}

static void drop_buffer(struct kvp_core *core, struct kvp_session_id session, uint32_t number)
{
    struct buffer_state *buffer = &core->sessions[session.slot].buffers[number];
    if (buffer->parked)
        core->act->thing_drop(core->ctx, (struct kvp_thing){KVP_THING_BUFFER, session.slot, number});
    memset(buffer, 0, sizeof(*buffer));
}

void core_buffers_drop(struct kvp_core *core, struct kvp_session_id session)
{
    struct session_state *state = &core->sessions[session.slot];
    bool any = false;
    if (state->generation != session.generation || state->buffers == NULL)
        return;
    for (uint32_t number = 1; number <= KVP_BUFFERS_MAX; number++) {
        if (!state->buffers[number].used)
            continue;
        drop_buffer(core, session, number);
        any = true;
    }
    if (any)
        core_exec_drop_buffer(core, session, 0);
}

static enum kvp_status check_buffer(struct kvp_core *core, const struct turn *turn,
                                    const Kvpool__V1__RegisterBufferRequest *request)
{
    size_t device_bytes = strlen(request->device);
    if (device_bytes == 0 || device_bytes > KVP_DEVICE_BYTES_MAX)
        return core_refuse(core, KVP_EINVAL, "device: %zu bytes, must be 1 to %d; \"host\" or the UUID of a GPU",
                           device_bytes, KVP_DEVICE_BYTES_MAX);
    if (core->host && strcmp(request->device, "host") != 0)
        return core_refuse(core, KVP_ENODEV, "device: \"%s\" is not served by the host backend", request->device);
    if (request->bytes == 0 || request->offset > UINT64_MAX - request->bytes)
        return core_refuse(core, KVP_EINVAL, "bytes: %llu at offset %llu, must be 1 or more, and end below 2^64",
                           (unsigned long long)request->bytes, (unsigned long long)request->offset);
    if (request->ipc_handle.len != 0 && request->ipc_handle.len != KVP_IPC_HANDLE_BYTES)
        return core_refuse(core, KVP_EINVAL, "ipc_handle: %zu bytes, must be 0 or %d", request->ipc_handle.len,
                           KVP_IPC_HANDLE_BYTES);
    if (request->ipc_handle.len == 0 && turn->call->message.n_fds != 1)
        return core_refuse(core, KVP_EINVAL,
                           "the message carries %u fds, must be 1, or an ipc_handle; gRPC can pass no fds",
                           turn->call->message.n_fds);
    if (request->ipc_handle.len != 0 && core->host)
        return core_refuse(core, KVP_ENODEV, "ipc_handle: the host backend can not open it");
    return KVP_OK;
}

/* A registration under way: its place is taken, so that no other takes it. */
struct registering {
    struct kvp_session_id session;
    uint32_t number;
};

static void undo_registering(struct kvp_core *core, struct op *op)
{
    const struct registering *registering = op->own;
    struct session_state *state = &core->sessions[registering->session.slot];
    if (state->generation != registering->session.generation || state->buffers == NULL)
        return;
    state->buffers[registering->number].parked = false; /* the op drops its thing itself */
    drop_buffer(core, registering->session, registering->number);
    core_exec_drop_buffer(core, registering->session, registering->number);
}

static enum kvp_status take_place(struct kvp_core *core, struct turn *turn,
                                  const Kvpool__V1__RegisterBufferRequest *request, uint32_t *ret_number)
{
    struct session_state *state = &core->sessions[turn->session.id.slot];
    struct op *op;
    TRY(core_op(core, turn, &op));
    if (state->buffers == NULL)
        state->buffers = calloc(KVP_BUFFERS_MAX + 1, sizeof(*state->buffers));
    if (state->buffers == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the session's buffers");
    uint32_t number = 1;
    while (number <= KVP_BUFFERS_MAX && state->buffers[number].used)
        number++;
    if (number > KVP_BUFFERS_MAX)
        return core_refuse(core, KVP_ELIMIT, "buffers: this session has %d, the most there may be", KVP_BUFFERS_MAX);
    struct registering *registering = calloc(1, sizeof(*registering));
    if (registering == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for a buffer that is registered");
    *registering = (struct registering){turn->session.id, number};
    struct buffer_state *buffer = &state->buffers[number];
    *buffer = (struct buffer_state){.used = true, .bytes = request->bytes, .offset = request->offset};
    memcpy(buffer->device, request->device, strlen(request->device) + 1);
    buffer->has_ipc = request->ipc_handle.len != 0;
    if (buffer->has_ipc)
        memcpy(buffer->ipc, request->ipc_handle.data, KVP_IPC_HANDLE_BYTES);
    op->own = registering;
    op->undo = undo_registering;
    *ret_number = number;
    return KVP_OK;
}

/* The executor that imports first: the buffer's GPU's; for host memory the first there is. */
static enum kvp_status need_importer(struct kvp_core *core, struct turn *turn, const char *device,
                                     uint32_t *ret_executor)
{
    const char *of = core->host || strcmp(device, "host") != 0 ? device : "";
    *ret_executor = 0;
    enum kvp_status status = core_exec_need(core, of, ret_executor);
    return status == KVP_WAIT ? core_wait(core, turn, WAIT_EXECUTOR, *ret_executor) : status;
}

/* In the transaction; on failure it is aborted, and the text said. */
static enum kvp_status record_buffer(struct kvp_core *core, struct kvp_session_id session, uint32_t number,
                                     const struct buffer_state *buffer)
{
    struct kvp_buffer_view view = {.session = session,
                                   .number = number,
                                   .bytes = buffer->bytes,
                                   .offset = buffer->offset,
                                   .has_ipc = buffer->has_ipc};
    memcpy(view.device, buffer->device, sizeof(view.device));
    memcpy(view.ipc, buffer->ipc, sizeof(view.ipc));
    enum kvp_status status = kvp_buffer_put(core->ledger, &view);
    if (status == KVP_OK)
        return KVP_OK;
    if (status == KVP_ELIMIT)
        core_refuse(core, status, "buffers: %d are registered, the most there may be", KVP_BUFFERS_ALL_MAX);
    else
        core_refuse_plain(core, status, "RegisterBuffer");
    return core_abort(core, status);
}

enum kvp_status core_buffer_adopt(struct kvp_core *core, const struct kvp_buffer_view *view)
{
    struct session_state *state = &core->sessions[view->session.slot];
    if (state->buffers == NULL)
        state->buffers = calloc(KVP_BUFFERS_MAX + 1, sizeof(*state->buffers));
    if (state->buffers == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for a session's buffers");
    struct buffer_state *buffer = &state->buffers[view->number];
    *buffer =
        (struct buffer_state){.used = true, .has_ipc = view->has_ipc, .bytes = view->bytes, .offset = view->offset};
    memcpy(buffer->device, view->device, sizeof(buffer->device));
    memcpy(buffer->ipc, view->ipc, sizeof(buffer->ipc));
    return KVP_OK;
}

void core_buffer_lost(struct kvp_core *core, const struct kvp_buffer_view *view)
{
    kvp_txn_begin(core->ledger);
    CORE_ASSERT(kvp_buffer_remove(core->ledger, view->session, view->number) == KVP_OK);
    kvp_txn_commit(core->ledger);
    drop_buffer(core, view->session, view->number);
    core_log(core, 4, "buffer %u of session %llx is lost: its memory was not kept", view->number,
             (unsigned long long)ID_WORD(view->session));
}

enum { REGISTER_PLACE = 0, REGISTER_KEPT, REGISTER_IMPORTED };

enum kvp_status call_register_buffer(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__RegisterBufferRequest *request = (const Kvpool__V1__RegisterBufferRequest *)turn->body;
    Kvpool__V1__RegisterBufferReply reply = KVPOOL__V1__REGISTER_BUFFER_REPLY__INIT;
    struct buffer_state *buffer;
    uint32_t number = 0, executor;
    if (turn->repeated && core_buffer(core, turn->session.id, (uint32_t)turn->outcome.values[0], &buffer) == KVP_OK) {
        reply.buffer = (uint32_t)turn->outcome.values[0];
        return core_answer(core, turn, &reply.base, NULL, 0);
    }
    TRY(check_buffer(core, turn, request));
    if (turn->op == NULL || turn->op->own == NULL) {
        TRY(need_importer(core, turn, request->device, &executor));
        TRY(take_place(core, turn, request, &number));
        turn->op->stage = REGISTER_KEPT;
        if (request->ipc_handle.len == 0) {
            core_op_keep(core, turn->op, (struct kvp_thing){KVP_THING_BUFFER, turn->session.id.slot, number},
                         &turn->call->message, 0);
            return core_wait(core, turn, WAIT_THING, turn->op->serial);
        }
    }
    struct op *op = turn->op;
    if (op->result != KVP_OK)
        return core_refuse(core, op->result, "the buffer: %s", op->text);
    if (op->things_awaited != 0)
        return core_wait(core, turn, WAIT_THING, op->serial);
    number = ((struct registering *)op->own)->number;
    buffer = &core->sessions[turn->session.id.slot].buffers[number];
    if (op->stage == REGISTER_KEPT) {
        TRY(need_importer(core, turn, request->device, &executor));
        op->stage = REGISTER_IMPORTED;
        op->executor = executor;
        enum kvp_status status = core_wait(core, turn, WAIT_REPLY, op->serial);
        core_buffer_import(core, executor, turn->session.id, number, buffer, EXEC_TAG(TAG_IMPORT, op->serial));
        return status;
    }
    kvp_txn_begin(core->ledger);
    TRY(record_buffer(core, turn->session.id, number, buffer));
    TRY(core_commit(core, turn, number, 0));
    buffer->parked = !buffer->has_ipc;
    op->n_things = 0;
    op->undo = NULL;
    reply.buffer = number;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

enum kvp_status call_unregister_buffer(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__UnregisterBufferRequest *request = (const Kvpool__V1__UnregisterBufferRequest *)turn->body;
    Kvpool__V1__UnregisterBufferReply reply = KVPOOL__V1__UNREGISTER_BUFFER_REPLY__INIT;
    struct buffer_state *buffer;
    if (turn->repeated)
        return core_answer(core, turn, &reply.base, NULL, 0);
    TRY(core_buffer(core, turn->session.id, request->buffer, &buffer));
    for (uint32_t i = 0; core->open_jobs != 0 && i < KVP_JOBS_MAX; i++) {
        const struct job_state *job = &core->jobs[i];
        if (job->id.generation == 0 || job->buffer != request->buffer || !same_session(job->session, turn->session.id))
            continue;
        if (core_job_about_to_end(core, i))
            return core_wait(core, turn, WAIT_JOB, i);
        return core_refuse(core, KVP_EBUSY, "buffer: %u is in use by work under way", request->buffer);
    }
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_buffer_remove(core->ledger, turn->session.id, request->buffer);
    if (status != KVP_OK) {
        core_refuse_plain(core, status, "UnregisterBuffer");
        return core_abort(core, status);
    }
    TRY(core_commit(core, turn, 0, 0));
    drop_buffer(core, turn->session.id, request->buffer);
    core_exec_drop_buffer(core, turn->session.id, request->buffer);
    return core_answer(core, turn, &reply.base, NULL, 0);
}
