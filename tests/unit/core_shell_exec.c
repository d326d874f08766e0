/**
 * Executors that a test can hold, fail and kill: they keep slabs and buffers as real memory, and do append, copy, zero
 * and index jobs on it byte by byte, from the messages alone.
 */
#include "core_shell_exec.h"

#include <stdio.h>
#include <string.h>

/* ---- life -------------------------------------------------------------------------------------------------------- */

void shell_exec_start(void *ctx, uint32_t slot, const char *device)
{
    struct shell *shell = ctx;
    struct shell_executor *executor = &shell->executors[slot];
    ck_assert_msg(!executor->running, "executor %u is started twice", slot);
    executor->running = !shell->refuse_start;
    executor->starts++;
    executor->pid = 5000 + executor->starts;
    snprintf(executor->device, sizeof(executor->device), "%s",
             device[0] != '\0' ? device : "GPU-00000000-0000-0000-0000-000000000001");
    struct shell_event event = {
        .kind = shell->refuse_start ? EVENT_GONE : EVENT_UP, .executor = slot, .start = executor->starts};
    shell_event(shell, &event);
}

void shell_exec_clear(struct shell_executor *executor)
{
    for (unsigned i = 0; i < SHELL_SLABS_MAX; i++) {
        struct shell_slab *slab = &executor->slabs[i];
        shell_memory_release(slab->memory);
        shell_memory_release(slab->timelines);
        if (slab->spec != NULL)
            kvpool__v1__pool_spec__free_unpacked(slab->spec, NULL);
    }
    memset(executor->slabs, 0, sizeof(executor->slabs));
    for (unsigned i = 0; i < 256; i++)
        shell_memory_release(executor->buffers[i].memory);
    memset(executor->buffers, 0, sizeof(executor->buffers));
    memset(executor->remembered, 0, sizeof(executor->remembered));
    for (unsigned i = 0; i < executor->n_jobs; i++)
        kvpool__v1__exec_job_request__free_unpacked(executor->jobs[i].request, NULL);
    executor->n_jobs = 0;
}

void shell_executor_kill(struct shell *shell, uint32_t slot)
{
    struct shell_executor *executor = &shell->executors[slot];
    if (!executor->running)
        return;
    executor->running = false;
    shell_exec_clear(executor);
    struct shell_event event = {.kind = EVENT_GONE, .executor = slot};
    shell_event(shell, &event);
}

void shell_exec_stop(void *ctx, uint32_t slot)
{
    shell_executor_kill(ctx, slot);
}

/* ---- answers ----------------------------------------------------------------------------------------------------- */

static void reply(struct shell *shell, uint32_t slot, uint16_t method, uint64_t tag, enum kvp_status status,
                  const ProtobufCMessage *body, struct shell_memory *fd)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    if (status != KVP_OK) {
        error.status = status;
        error.message = (char *)"the test says no";
        body = &error.base;
    }
    size_t n = protobuf_c_message_get_packed_size(body);
    uint8_t *packed = malloc(n + 1);
    ck_assert_ptr_nonnull(packed);
    protobuf_c_message_pack(body, packed);
    struct shell_event event = {.kind = EVENT_REPLY,
                                .executor = slot,
                                .start = shell->executors[slot].starts,
                                .method = method,
                                .tag = tag,
                                .status = status,
                                .fd = fd};
    event.body = protobuf_c_message_unpack(body->descriptor, NULL, n, packed);
    ck_assert_ptr_nonnull(event.body);
    free(packed);
    if (fd != NULL)
        fd->holders++;
    shell_event(shell, &event);
}

static struct shell_slab *slab_of(struct shell_executor *executor, uint64_t pool, uint32_t rank, bool make)
{
    for (unsigned i = 0; i < SHELL_SLABS_MAX; i++) {
        struct shell_slab *slab = &executor->slabs[i];
        if (slab->used && slab->pool == pool && slab->rank == rank)
            return slab;
    }
    for (unsigned i = 0; make && i < SHELL_SLABS_MAX; i++) {
        if (!executor->slabs[i].used) {
            executor->slabs[i] = (struct shell_slab){.used = true, .pool = pool, .rank = rank};
            return &executor->slabs[i];
        }
    }
    return NULL;
}

static Kvpool__V1__PoolSpec *copy_spec(const Kvpool__V1__PoolSpec *spec)
{
    size_t n = kvpool__v1__pool_spec__get_packed_size(spec);
    uint8_t *packed = malloc(n + 1);
    ck_assert_ptr_nonnull(packed);
    kvpool__v1__pool_spec__pack(spec, packed);
    Kvpool__V1__PoolSpec *copy = kvpool__v1__pool_spec__unpack(NULL, n, packed);
    free(packed);
    ck_assert_ptr_nonnull(copy);
    return copy;
}

/* ---- requests but jobs ------------------------------------------------------------------------------------------- */

static void create_slab(struct shell *shell, uint32_t slot, uint64_t tag, const Kvpool__V1__ExecSlabCreateRequest *r)
{
    Kvpool__V1__ExecSlabCreateReply answer = KVPOOL__V1__EXEC_SLAB_CREATE_REPLY__INIT;
    uint8_t handle[64] = {7};
    enum kvp_status status = shell->fail_slab;
    shell->fail_slab = KVP_OK;
    if (status != KVP_OK) {
        reply(shell, slot, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, tag, status, NULL, NULL);
        return;
    }
    struct shell_slab *slab = slab_of(&shell->executors[slot], r->pool_id, r->rank, true);
    if (slab->memory == NULL) {
        slab->memory = shell_memory(r->bytes);
        slab->spec = copy_spec(r->spec);
    }
    bool legacy = r->spec->memory == KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    answer.device = shell->executors[slot].device;
    answer.bytes = r->bytes;
    answer.has_fd = !legacy;
    if (legacy)
        answer.ipc_handle = (ProtobufCBinaryData){sizeof(handle), handle};
    reply(shell, slot, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, tag, KVP_OK, &answer.base,
          legacy ? NULL : slab->memory);
}

static struct shell_memory *thing_memory(struct shell *shell, struct kvp_thing thing)
{
    struct shell_thing *found = shell_find_thing(shell, thing);
    ck_assert_msg(found != NULL && found->ready, "an executor is given a thing that is not there");
    found->memory->holders++;
    return found->memory;
}

static void adopt_slab(struct shell *shell, uint32_t slot, const Kvpool__V1__ExecSlabAdoptRequest *r,
                       const struct kvp_thing *things, unsigned n_things)
{
    struct shell_slab *slab = slab_of(&shell->executors[slot], r->pool_id, r->rank, true);
    ck_assert_uint_eq(n_things, r->has_slab_fd ? 3 : 2);
    if (r->has_slab_fd) {
        ck_assert_int_eq(things[0].kind, KVP_THING_SLAB);
        shell_memory_release(slab->memory);
        slab->memory = thing_memory(shell, things[0]);
        if (slab->spec == NULL)
            slab->spec = copy_spec(r->spec);
        things++;
    }
    ck_assert_ptr_nonnull(slab->memory);
    ck_assert_int_eq(things[0].kind, KVP_THING_TIMELINES);
    ck_assert_int_eq(things[1].kind, KVP_THING_TABLE);
    shell_memory_release(slab->timelines);
    slab->timelines = thing_memory(shell, things[0]);
}

static void drop_slab(struct shell_executor *executor, uint64_t pool)
{
    for (unsigned i = 0; i < SHELL_SLABS_MAX; i++) {
        struct shell_slab *slab = &executor->slabs[i];
        if (!slab->used || slab->pool != pool)
            continue;
        shell_memory_release(slab->memory);
        shell_memory_release(slab->timelines);
        kvpool__v1__pool_spec__free_unpacked(slab->spec, NULL);
        memset(slab, 0, sizeof(*slab));
    }
}

static void import_buffer(struct shell *shell, uint32_t slot, const Kvpool__V1__ExecBufferImportRequest *r,
                          const struct kvp_thing *things, unsigned n_things)
{
    struct shell_executor *executor = &shell->executors[slot];
    unsigned i = 0;
    ck_assert_uint_eq(n_things, 1);
    while (executor->buffers[i].used)
        i++;
    ck_assert_uint_lt(i, 256);
    executor->buffers[i] = (struct shell_buffer){.used = true,
                                                 .session = r->session_id,
                                                 .buffer = r->buffer,
                                                 .offset = r->offset,
                                                 .bytes = r->bytes,
                                                 .memory = thing_memory(shell, things[0])};
}

static void drop_buffers(struct shell_executor *executor, const Kvpool__V1__ExecBufferDropRequest *r)
{
    for (unsigned i = 0; i < 256; i++) {
        struct shell_buffer *buffer = &executor->buffers[i];
        if (!buffer->used || buffer->session != r->session_id || (r->buffer != 0 && buffer->buffer != r->buffer))
            continue;
        shell_memory_release(buffer->memory);
        memset(buffer, 0, sizeof(*buffer));
    }
}

static struct shell_buffer *buffer_of(struct shell_executor *executor, uint64_t session, uint32_t number)
{
    for (unsigned i = 0; i < 256; i++) {
        struct shell_buffer *buffer = &executor->buffers[i];
        if (buffer->used && buffer->session == session && buffer->buffer == number)
            return buffer;
    }
    return NULL;
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

struct placed {
    struct kvp_plane_layout planes[KVP_PLANES_MAX];
    const Kvpool__V1__PoolSpec *spec;
    unsigned char *slab;
    uint64_t slab_bytes;
};

static void place(const struct shell_slab *slab, struct placed *ret)
{
    static struct kvp_plane_spec specs[KVP_PLANES_MAX];
    struct kvp_layout_spec layout = {.pages = slab->spec->pages,
                                     .page_tokens = slab->spec->page_tokens,
                                     .n_planes = (uint32_t)slab->spec->n_planes,
                                     .order = (uint32_t)slab->spec->order,
                                     .placement = (uint32_t)slab->spec->placement,
                                     .joined = slab->spec->joined != 0,
                                     .planes = specs};
    for (size_t i = 0; i < slab->spec->n_planes; i++) {
        const Kvpool__V1__Plane *p = slab->spec->planes[i];
        specs[i] = (struct kvp_plane_spec){p->layer, (uint32_t)p->component, p->heads, p->dim, (uint32_t)p->dtype};
    }
    char text[100];
    ck_assert_int_eq(kvp_layout_compute(&layout, ret->planes, NULL, text, sizeof(text)), KVP_OK);
    ret->spec = slab->spec;
    ret->slab = slab->memory->bytes;
    ret->slab_bytes = slab->memory->size;
}

static unsigned char *element_at(const struct placed *placed, size_t plane, uint32_t page, uint32_t token,
                                 uint32_t head)
{
    const struct kvp_plane_layout *l = &placed->planes[plane];
    uint64_t at = l->offset + page * l->page_stride + token * l->token_stride + head * l->head_stride;
    ck_assert_uint_lt(at, placed->slab_bytes);
    return placed->slab + at;
}

static uint64_t head_bytes(const Kvpool__V1__Plane *plane)
{
    return (uint64_t)plane->dim * kvp_dtype_bytes((uint32_t)plane->dtype);
}

static void do_zeros(const Kvpool__V1__ExecJobRequest *r, const struct placed *placed)
{
    for (size_t i = 0; i < r->n_zero_pages; i++) {
        for (size_t p = 0; p < placed->spec->n_planes; p++) {
            const Kvpool__V1__Plane *plane = placed->spec->planes[p];
            for (uint32_t t = 0; t < placed->spec->page_tokens; t++) {
                for (uint32_t h = 0; h < plane->heads; h++)
                    memset(element_at(placed, p, r->zero_pages[i], t, h), 0, head_bytes(plane));
            }
        }
    }
}

static void do_copies(const Kvpool__V1__ExecJobRequest *r, const struct placed *placed)
{
    for (size_t i = 0; i < r->n_copy_sources; i++) {
        for (size_t p = 0; p < placed->spec->n_planes; p++) {
            const Kvpool__V1__Plane *plane = placed->spec->planes[p];
            for (uint32_t t = 0; t < r->copy_tokens[i]; t++) {
                for (uint32_t h = 0; h < plane->heads; h++)
                    memmove(element_at(placed, p, r->copy_destinations[i], t, h),
                            element_at(placed, p, r->copy_sources[i], t, h), head_bytes(plane));
            }
        }
    }
}

static void do_append(struct shell_executor *executor, const Kvpool__V1__ExecJobRequest *r, const struct placed *placed)
{
    uint64_t nnz = 0, base = 0;
    const unsigned char *source = r->inline_.data;
    if (r->buffer != 0) {
        struct shell_buffer *buffer = buffer_of(executor, r->session_id, r->buffer);
        ck_assert_msg(buffer != NULL, "the executor was not given buffer %u", r->buffer);
        source = buffer->memory->bytes + buffer->offset;
    }
    for (size_t b = 0; b < r->n_tokens; b++)
        nnz += r->tokens[b];
    for (size_t p = 0; p < placed->spec->n_planes; p++) {
        const Kvpool__V1__Plane *plane = placed->spec->planes[p];
        uint64_t head = head_bytes(plane), start = r->n_plane_offsets != 0 ? r->plane_offsets[p] : base;
        uint64_t token_stride = r->n_token_strides != 0 ? r->token_strides[p] : plane->heads * head;
        uint64_t head_stride = r->n_head_strides != 0 ? r->head_strides[p] : head, j = 0;
        for (size_t b = 0; b < r->n_tokens; b++) {
            for (uint32_t t = 0; t < r->tokens[b]; t++, j++) {
                uint32_t position = r->start[b] + t, T = placed->spec->page_tokens;
                int32_t page = r->kv_indices[r->kv_indptr[b] + (int32_t)(position / T)];
                ck_assert_int_lt(r->kv_indptr[b] + (int32_t)(position / T), r->kv_indptr[b + 1]);
                for (uint32_t h = 0; h < plane->heads; h++)
                    memcpy(element_at(placed, p, (uint32_t)page, position % T, h),
                           source + start + j * token_stride + h * head_stride, head);
            }
        }
        base += nnz * plane->heads * head;
    }
}

static void do_index(struct shell_executor *executor, const Kvpool__V1__ExecJobRequest *r, uint32_t T)
{
    struct shell_buffer *buffer = buffer_of(executor, r->session_id, r->buffer);
    ck_assert_ptr_nonnull(buffer);
    unsigned char *to = buffer->memory->bytes + buffer->offset;
    const uint64_t *at = r->output_offsets;
    uint64_t j = 0;
    ck_assert_uint_eq(r->n_output_offsets, 7);
    for (size_t b = 0; b < r->n_tokens; b++) {
        for (uint32_t t = 0; t < r->tokens[b]; t++, j++) {
            int32_t position = (int32_t)(r->start[b] + t), index = (int32_t)b;
            int64_t slot = (int64_t)r->kv_indices[r->kv_indptr[b] + position / (int32_t)T] * T + position % (int32_t)T;
            if (r->wanted & 1)
                memcpy(to + at[0] + j * 4, &index, 4);
            if (r->wanted & 2)
                memcpy(to + at[1] + j * 4, &position, 4);
            if (r->wanted & 4)
                memcpy(to + at[2] + j * 8, &slot, 8);
        }
        int32_t length = (int32_t)(r->start[b] + r->tokens[b]);
        if (r->wanted & 64)
            memcpy(to + at[6] + b * 4, &length, 4);
    }
}

/* Not the kernels' digest, but one of the same bytes. @param ret_digests  [r->n_digest_pages] */
static void do_digests(const Kvpool__V1__ExecJobRequest *r, const struct placed *placed, uint64_t *ret_digests)
{
    for (size_t i = 0; i < r->n_digest_pages; i++) {
        ret_digests[i] = 14695981039346656037ull;
        for (size_t p = 0; p < placed->spec->n_planes; p++) {
            const Kvpool__V1__Plane *plane = placed->spec->planes[p];
            for (uint32_t t = 0; t < placed->spec->page_tokens; t++) {
                for (uint32_t h = 0; h < plane->heads; h++) {
                    const unsigned char *at = element_at(placed, p, r->digest_pages[i], t, h);
                    for (uint64_t b = 0; b < head_bytes(plane); b++)
                        ret_digests[i] = (ret_digests[i] ^ at[b]) * 1099511628211ull;
                }
            }
        }
    }
}

static void run_job(struct shell *shell, uint32_t slot, struct shell_job *job)
{
    struct shell_executor *executor = &shell->executors[slot];
    const Kvpool__V1__ExecJobRequest *r = job->request;
    static struct placed placed;
    Kvpool__V1__ExecJobReply answer = KVPOOL__V1__EXEC_JOB_REPLY__INIT;
    uint64_t digests[KVP_BATCH_MAX];
    struct shell_slab *slab = slab_of(executor, r->pool_id, r->rank, false);
    ck_assert_msg(slab != NULL && slab->timelines != NULL, "the executor was not given the slab and timelines");
    struct kvp_timeline *timeline = (struct kvp_timeline *)(void *)slab->timelines->bytes + r->done_timeline;
    enum kvp_status status = shell->fail_job;
    shell->fail_job = KVP_OK;
    if (status != KVP_OK && r->done_value != 0)
        kvp_timeline_lose(timeline, r->done_value - 1, r->done_value, (uint64_t)-status);
    if (status == KVP_OK) {
        place(slab, &placed);
        do_zeros(r, &placed);
        do_copies(r, &placed);
        if (r->kind == KVPOOL__V1__JOB_KIND__JOB_APPEND)
            do_append(executor, r, &placed);
        else if (r->kind == KVPOOL__V1__JOB_KIND__JOB_INDEX)
            do_index(executor, r, slab->spec->page_tokens);
        do_digests(r, &placed, digests);
        answer.n_digests = r->n_digest_pages;
        answer.digests = digests;
        ck_assert_msg(r->done_value == 0 || r->done_value > timeline->value, "a timeline falls");
        if (r->done_value != 0)
            timeline->value = r->done_value;
    }
    answer.job = r->job;
    executor->remembered[executor->jobs_done % SHELL_JOBS_MAX].job = r->job;
    executor->remembered[executor->jobs_done++ % SHELL_JOBS_MAX].status = status;
    reply(shell, slot, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, job->tag, status, &answer.base, NULL);
    kvpool__v1__exec_job_request__free_unpacked(job->request, NULL);
}

void shell_jobs_run(struct shell *shell, unsigned n)
{
    for (uint32_t slot = 0; slot < KVP_GPUS_MAX; slot++) {
        struct shell_executor *executor = &shell->executors[slot];
        for (unsigned i = 0; i < n && executor->n_jobs != 0; i++) {
            struct shell_job job = executor->jobs[0];
            memmove(&executor->jobs[0], &executor->jobs[1], --executor->n_jobs * sizeof(job));
            run_job(shell, slot, &job);
        }
    }
}

/* What came of a job that an earlier daemon gave it: the question has no bytes, only the number. */
static void tell_job(struct shell *shell, uint32_t slot, uint64_t tag, uint64_t job)
{
    struct shell_executor *executor = &shell->executors[slot];
    Kvpool__V1__ExecJobReply answer = KVPOOL__V1__EXEC_JOB_REPLY__INIT;
    enum kvp_status status = KVP_ENOENT;
    answer.job = job;
    for (unsigned i = 0; i < executor->n_jobs; i++) {
        if (executor->jobs[i].request->job == job) {
            executor->jobs[i].tag = tag;
            return;
        }
    }
    for (unsigned i = 0; i < SHELL_JOBS_MAX; i++) {
        if (executor->remembered[i].job == job)
            status = executor->remembered[i].status;
    }
    reply(shell, slot, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, tag, status, &answer.base, NULL);
}

static void take_job(struct shell *shell, uint32_t slot, uint64_t tag, const ProtobufCMessage *body)
{
    struct shell_executor *executor = &shell->executors[slot];
    const Kvpool__V1__ExecJobRequest *request = (const Kvpool__V1__ExecJobRequest *)body;
    if (request->kind == KVPOOL__V1__JOB_KIND__JOB_NONE) {
        tell_job(shell, slot, tag, request->job);
        return;
    }
    ck_assert_uint_lt(executor->n_jobs, SHELL_JOBS_MAX);
    size_t n = protobuf_c_message_get_packed_size(body);
    uint8_t *packed = malloc(n + 1);
    ck_assert_ptr_nonnull(packed);
    protobuf_c_message_pack(body, packed);
    struct shell_job *job = &executor->jobs[executor->n_jobs++];
    job->tag = tag;
    job->request = kvpool__v1__exec_job_request__unpack(NULL, n, packed);
    free(packed);
    if (!shell->hold_jobs)
        shell_jobs_run(shell, SHELL_JOBS_MAX);
}

/* ---- what is sent ------------------------------------------------------------------------------------------------ */

static void say_hello(struct shell *shell, uint32_t slot, uint64_t tag)
{
    Kvpool__V1__ExecHelloReply answer = KVPOOL__V1__EXEC_HELLO_REPLY__INIT;
    char *devices[1] = {shell->executors[slot].device};
    answer.pid = shell->executors[slot].pid;
    answer.backend = (char *)shell->config.backend;
    answer.n_devices = 1;
    answer.devices = devices;
    answer.abi_version = KVP_ABI_VERSION;
    reply(shell, slot, KVPOOL__V1__METHOD__METHOD_EXEC_HELLO, tag, KVP_OK, &answer.base, NULL);
}

static void list_processes(struct shell *shell, uint32_t slot, uint64_t tag)
{
    Kvpool__V1__ExecProcessesReply answer = KVPOOL__V1__EXEC_PROCESSES_REPLY__INIT;
    answer.known = shell->listing_known;
    answer.n_pids = shell->n_pids;
    answer.pids = shell->pids;
    reply(shell, slot, KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, tag, KVP_OK, &answer.base, NULL);
}

void shell_exec_send(void *ctx, uint32_t slot, uint16_t method, uint64_t tag, const ProtobufCMessage *body,
                     const struct kvp_thing *things, unsigned n_things)
{
    struct shell *shell = ctx;
    struct shell_executor *executor = &shell->executors[slot];
    Kvpool__V1__ExecSlabAdoptReply adopted = KVPOOL__V1__EXEC_SLAB_ADOPT_REPLY__INIT;
    Kvpool__V1__ExecSlabDropReply slab_dropped = KVPOOL__V1__EXEC_SLAB_DROP_REPLY__INIT;
    Kvpool__V1__ExecBufferImportReply imported = KVPOOL__V1__EXEC_BUFFER_IMPORT_REPLY__INIT;
    Kvpool__V1__ExecBufferDropReply buffer_dropped = KVPOOL__V1__EXEC_BUFFER_DROP_REPLY__INIT;
    if (!executor->running)
        return;
    switch (method) {
    case KVPOOL__V1__METHOD__METHOD_EXEC_HELLO:
        say_hello(shell, slot, tag);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE:
        create_slab(shell, slot, tag, (const Kvpool__V1__ExecSlabCreateRequest *)body);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT:
        adopt_slab(shell, slot, (const Kvpool__V1__ExecSlabAdoptRequest *)body, things, n_things);
        reply(shell, slot, method, tag, KVP_OK, &adopted.base, NULL);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP:
        drop_slab(executor, ((const Kvpool__V1__ExecSlabDropRequest *)body)->pool_id);
        reply(shell, slot, method, tag, KVP_OK, &slab_dropped.base, NULL);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT:
        import_buffer(shell, slot, (const Kvpool__V1__ExecBufferImportRequest *)body, things, n_things);
        reply(shell, slot, method, tag, KVP_OK, &imported.base, NULL);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP:
        drop_buffers(executor, (const Kvpool__V1__ExecBufferDropRequest *)body);
        reply(shell, slot, method, tag, KVP_OK, &buffer_dropped.base, NULL);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_JOB:
        take_job(shell, slot, tag, body);
        break;
    case KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES:
        list_processes(shell, slot, tag);
        break;
    default:
        ck_abort_msg("method %u is sent to an executor", method);
    }
}
