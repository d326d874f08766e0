/**
 * The CUDA backend: one GPU, by its primary context; a worker is a thread with a stream of its own.
 *
 *     pinned, half 0 ──copy engine──► device, half 0 ──┐
 *     pinned, half 1 ──copy engine──► device, half 1 ──┴─► kernel ─► slab          done value
 *       ▲ packed by the CPU while the other half is on its way                       ▲ stored by the stream
 *
 * Rows that lie in host memory are packed, with their slots, into pinned memory and moved by the copy engines (a kernel
 * that reads host memory would slow the processes that compute); rows on the GPU are read where they are. Halves grow to
 * what the largest piece of work needed. The completion value is the stream's last act, so that another stream that
 * waits for it proceeds without a CPU; the worker then waits on an event that blocks its thread and nobody else.
 *
 * An error in the context ends the program: see kvp_exec_error.fatal. After any failure the stream is drained before
 * `run` returns, so that nothing touches what the caller then frees.
 */
#include "cuda_device.h"
#include "nvml.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES (8ull << 20) /* of rows and slots, in one half */
#define HALF_MIN    (256ull << 10)
#define ALIGNMENT   256ull

/* ---- the device -------------------------------------------------------------------------------------------------- */

static void format_uuid(const CUuuid *uuid, char ret_id[KVP_EXEC_DEVICE_BYTES])
{
    const unsigned char *b = (const unsigned char *)uuid->bytes;

    snprintf(ret_id, KVP_EXEC_DEVICE_BYTES, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
             b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
}

static enum kvp_status find_device(const char *id, CUdevice *ret_number, struct kvp_exec_device_info *ret_info,
                                   struct kvp_exec_error *reterr)
{
    enum kvp_status status;
    int n;

    KVP_CUDA_CALL(done, cuDeviceGetCount, &n);
    for (int i = 0; i < n; i++) {
        CUdevice number;
        CUuuid uuid;

        KVP_CUDA_CALL(done, cuDeviceGet, &number, i);
        KVP_CUDA_CALL(done, cuDeviceGetUuid, &uuid, number);
        format_uuid(&uuid, ret_info->id);
        if (id[0] == 0 || strcmp(id, ret_info->id) == 0) {
            *ret_number = number;
            return KVP_OK;
        }
    }
    return kvp_exec_fail(reterr, KVP_ENODEV, "none of the %d GPUs here is %.64s", n, id[0] != 0 ? id : "usable");
done:
    return status;
}

static enum kvp_status need(CUdevice number, CUdevice_attribute attribute, const char *what,
                            struct kvp_exec_error *reterr)
{
    enum kvp_status status;
    int value;

    KVP_CUDA_CALL(done, cuDeviceGetAttribute, &value, attribute, number);
    return value != 0 ? KVP_OK : kvp_exec_fail(reterr, KVP_ENODEV, "the GPU or its driver has no %s", what);
done:
    return status;
}

static enum kvp_status describe(struct kvp_exec_device *device, struct kvp_exec_device_info *ret_info,
                                struct kvp_exec_error *reterr)
{
    CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                      .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                      .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device->number}};
    enum kvp_status status;
    size_t bytes, granularity;
    int writes;

    status = need(device->number, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management",
                  reterr);
    if (status == KVP_OK)
        status = need(device->number, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                      "export of memory as fds", reterr);
    if (status != KVP_OK)
        return status;
    KVP_CUDA_CALL(done, cuDeviceGetName, ret_info->name, sizeof(ret_info->name), device->number);
    KVP_CUDA_CALL(done, cuDeviceTotalMem, &bytes, device->number);
    KVP_CUDA_CALL(done, cuMemGetAllocationGranularity, &granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    KVP_CUDA_CALL(done, cuDeviceGetAttribute, &writes, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS,
                  device->number);
    ret_info->bytes = bytes;
    device->granularity = granularity;
    device->stream_writes = writes != 0;
    return KVP_OK;
done:
    return status;
}

static enum kvp_status cuda_open(const char *id, struct kvp_exec_device **ret_device,
                                 struct kvp_exec_device_info *ret_info, struct kvp_exec_error *reterr)
{
    struct kvp_exec_device_info info = {0};
    struct kvp_exec_device *device = calloc(1, sizeof(*device));
    enum kvp_status status;

    if (device == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a device");
    if (pthread_mutex_init(&device->lock, NULL) != 0) {
        status = kvp_exec_fail(reterr, KVP_ENOMEM, "no lock for a device");
        goto free_device;
    }
    status = kvp_cuda_driver_load(reterr);
    if (status == KVP_OK)
        status = find_device(id, &device->number, &info, reterr);
    if (status == KVP_OK)
        status = describe(device, &info, reterr);
    if (status != KVP_OK)
        goto destroy_lock;
    KVP_CUDA_CALL(destroy_lock, cuDevicePrimaryCtxRetain, &device->context, device->number);
    KVP_CUDA_CALL(release_context, cuCtxSetCurrent, device->context);
    *ret_info = info;
    *ret_device = device;
    return KVP_OK;

release_context:
    kvp_cuda.cuDevicePrimaryCtxRelease(device->number);
destroy_lock:
    pthread_mutex_destroy(&device->lock);
free_device:
    free(device);
    reterr->fatal = false; /* nothing is open that could be lost */
    return status;
}

static void cuda_close(struct kvp_exec_device *device)
{
    kvp_cuda.cuDevicePrimaryCtxRelease(device->number);
    pthread_mutex_destroy(&device->lock);
    free(device);
}

static enum kvp_status cuda_processes(const struct kvp_exec_device_info *info, uint32_t *ret_pids, unsigned room,
                                      unsigned *ret_n)
{
    return info->id[0] != 0 ? kvp_nvml_processes(info->id, ret_pids, room, ret_n) : KVP_EAGAIN;
}

/* ---- a worker ---------------------------------------------------------------------------------------------------- */

struct half {
    unsigned char *host; /* pinned */
    CUdeviceptr device;
    uint64_t bytes; /* of each */
    CUevent passed; /* the stream is done with it */
};

struct kvp_exec_worker {
    struct kvp_exec_device *device;
    CUstream stream;
    CUevent ended;
    struct half halves[2];
    struct kvp_plane_view planes[KVP_PLANES_MAX];
    struct kvp_token_view sources[KVP_PLANES_MAX];
};

static void half_free(struct half *half)
{
    if (half->host != NULL)
        kvp_cuda.cuMemFreeHost(half->host);
    if (half->device != 0)
        kvp_cuda.cuMemFree(half->device);
    half->host = NULL;
    half->device = 0;
    half->bytes = 0;
}

/* Room for `bytes` in a half that the stream is done with. */
static enum kvp_status half_need(struct half *half, uint64_t bytes, struct kvp_exec_error *reterr)
{
    uint64_t room = half->bytes > 0 ? half->bytes : HALF_MIN;
    enum kvp_status status;

    if (half->bytes >= bytes)
        return KVP_OK;
    while (room < bytes)
        room *= 2;
    half_free(half);
    KVP_CUDA_CALL(undo, cuMemAllocHost, (void **)&half->host, room);
    KVP_CUDA_CALL(undo, cuMemAlloc, &half->device, room);
    half->bytes = room;
    return KVP_OK;
undo:
    half_free(half);
    return status;
}

static void cuda_worker_close(struct kvp_exec_worker *worker)
{
    for (unsigned i = 0; i < 2; i++) {
        half_free(&worker->halves[i]);
        if (worker->halves[i].passed != NULL)
            kvp_cuda.cuEventDestroy(worker->halves[i].passed);
    }
    if (worker->ended != NULL)
        kvp_cuda.cuEventDestroy(worker->ended);
    if (worker->stream != NULL)
        kvp_cuda.cuStreamDestroy(worker->stream);
    free(worker);
}

static enum kvp_status cuda_worker_open(struct kvp_exec_device *device, struct kvp_exec_worker **ret_worker,
                                        struct kvp_exec_error *reterr)
{
    const unsigned event_flags = CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC;
    struct kvp_exec_worker *worker = calloc(1, sizeof(*worker));
    enum kvp_status status;

    if (worker == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a worker");
    worker->device = device;
    KVP_CUDA_CALL(close_worker, cuCtxSetCurrent, device->context);
    KVP_CUDA_CALL(close_worker, cuStreamCreate, &worker->stream, CU_STREAM_NON_BLOCKING);
    KVP_CUDA_CALL(close_worker, cuEventCreate, &worker->ended, event_flags);
    for (unsigned i = 0; i < 2; i++)
        KVP_CUDA_CALL(close_worker, cuEventCreate, &worker->halves[i].passed, event_flags);
    *ret_worker = worker;
    return KVP_OK;

close_worker:
    cuda_worker_close(worker);
    return status;
}

/* ---- parts of work ----------------------------------------------------------------------------------------------- */

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static enum kvp_status launched(enum kvp_status status, const char *what, struct kvp_exec_error *reterr)
{
    if (status == KVP_OK)
        return KVP_OK;
    return kvp_exec_fail(reterr, status, "the %s kernel could not be launched: %s", what, kvp_status_text(status));
}

/* Send the first `bytes` of a half on their way. */
static enum kvp_status upload(struct kvp_exec_worker *worker, struct half *half, uint64_t bytes,
                              struct kvp_exec_error *reterr)
{
    enum kvp_status status = KVP_OK;

    KVP_CUDA_CALL(done, cuMemcpyHtoDAsync, half->device, half->host, bytes, worker->stream);
done:
    return status;
}

static enum kvp_status run_zeros(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                 struct kvp_exec_error *reterr)
{
    struct half *half = &worker->halves[1]; /* the other one takes copies */
    uint64_t bytes = work->n_zero * sizeof(*work->zero_pages);
    struct kvp_page_zero_args args = {.planes = worker->planes,
                                      .n_planes = work->spec->n_planes,
                                      .pages = work->spec->pages,
                                      .page_tokens = work->spec->page_tokens,
                                      .n = work->n_zero};
    enum kvp_status status;

    if (work->n_zero == 0)
        return KVP_OK;
    status = half_need(half, bytes, reterr);
    if (status != KVP_OK)
        return status;
    memcpy(half->host, work->zero_pages, bytes);
    args.page_ids = (const int32_t *)half->device;
    status = upload(worker, half, bytes, reterr);
    if (status == KVP_OK)
        status = launched(kvp_cuda_page_zero(&args, worker->stream), "page zero", reterr);
    if (status == KVP_OK)
        KVP_CUDA_CALL(done, cuEventRecord, half->passed, worker->stream);
done:
    return status;
}

static enum kvp_status run_copies(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                  struct kvp_exec_error *reterr)
{
    uint32_t n = work->n_groups > 0 ? work->group_ends[work->n_groups - 1] : 0, from = 0;
    struct half *half = &worker->halves[0];
    enum kvp_status status;

    if (n == 0)
        return KVP_OK;
    status = half_need(half, n * sizeof(*work->copies), reterr);
    if (status != KVP_OK)
        return status;
    memcpy(half->host, work->copies, n * sizeof(*work->copies));
    status = upload(worker, half, n * sizeof(*work->copies), reterr);
    for (uint32_t g = 0; g < work->n_groups && status == KVP_OK; from = work->group_ends[g++]) {
        struct kvp_page_copy_args args = {.sources = worker->planes,
                                          .destinations = worker->planes,
                                          .n_planes = work->spec->n_planes,
                                          .page_tokens = work->spec->page_tokens,
                                          .source_pages = work->spec->pages,
                                          .destination_pages = work->spec->pages,
                                          .n = work->group_ends[g] - from,
                                          .copies = (const struct kvp_page_copy *)half->device + from};

        status = launched(kvp_cuda_page_copy(&args, worker->stream), "page copy", reterr);
    }
    if (status == KVP_OK)
        KVP_CUDA_CALL(done, cuEventRecord, half->passed, worker->stream);
done:
    return status;
}

static uint64_t plane_row_bytes(const struct kvp_plane_spec *plane)
{
    return (uint64_t)plane->heads * plane->dim * kvp_dtype_bytes(plane->dtype);
}

/* Rows from..from + n of plane p, dense, to `to`. */
static void pack_plane(const struct kvp_exec_work *work, uint32_t p, uint32_t from, uint32_t n, unsigned char *to)
{
    const struct kvp_plane_spec *plane = &work->spec->planes[p];
    const struct kvp_exec_source *source = &work->source;
    const unsigned char *row = source->host + source->offsets[p] + from * source->token_strides[p];
    uint64_t bytes = plane_row_bytes(plane), head = (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
    bool dense = plane->heads == 1 || source->head_strides[p] == head;

    if (dense && source->token_strides[p] == bytes) {
        memcpy(to, row, n * bytes);
        return;
    }
    for (uint32_t t = 0; t < n; t++, row += source->token_strides[p], to += bytes) {
        if (dense) {
            memcpy(to, row, bytes);
            continue;
        }
        for (uint32_t h = 0; h < plane->heads; h++)
            memcpy(to + h * head, row + h * source->head_strides[p], head);
    }
}

/* Tokens from..from + n, through a half: slots, then (of a source in host memory) the planes' rows. */
static enum kvp_status append_chunk(struct kvp_exec_worker *worker, const struct kvp_exec_work *work, uint32_t from,
                                    uint32_t n, struct half *half, struct kvp_exec_error *reterr)
{
    const struct kvp_exec_source *source = &work->source;
    uint64_t at = aligned(n * sizeof(int64_t)), need = at;
    struct kvp_append_args args = {.planes = worker->planes,
                                   .sources = worker->sources,
                                   .n_planes = work->spec->n_planes,
                                   .pages = work->spec->pages,
                                   .page_tokens = work->spec->page_tokens,
                                   .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = n}};
    enum kvp_status status;

    KVP_CUDA_CALL(done, cuEventSynchronize, half->passed);
    for (uint32_t p = 0; source->host != NULL && p < work->spec->n_planes; p++)
        need += aligned(n * plane_row_bytes(&work->spec->planes[p]));
    status = half_need(half, need, reterr);
    if (status != KVP_OK)
        return status;
    memcpy(half->host, work->slots + from, n * sizeof(int64_t));
    args.at.slot_mapping = (const void *)half->device;
    for (uint32_t p = 0; p < work->spec->n_planes; p++) {
        const struct kvp_plane_spec *plane = &work->spec->planes[p];
        struct kvp_token_view *view = &worker->sources[p];

        if (source->host == NULL) {
            view->base = (void *)(source->device + source->offsets[p] + from * source->token_strides[p]);
            view->token_stride = (int64_t)source->token_strides[p];
            view->head_stride = (int64_t)source->head_strides[p];
            continue;
        }
        pack_plane(work, p, from, n, half->host + at);
        view->base = (void *)(half->device + at);
        view->token_stride = (int64_t)plane_row_bytes(plane);
        view->head_stride = (int64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
        at += aligned(n * plane_row_bytes(plane));
    }
    status = upload(worker, half, at, reterr);
    if (status == KVP_OK)
        status = launched(kvp_cuda_append(&args, worker->stream), "append", reterr);
    if (status == KVP_OK)
        KVP_CUDA_CALL(done, cuEventRecord, half->passed, worker->stream);
done:
    return status;
}

static enum kvp_status run_append(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                  struct kvp_exec_error *reterr)
{
    uint64_t token_bytes = sizeof(int64_t), chunk;
    enum kvp_status status = KVP_OK;
    unsigned which = 1; /* the first half may still hold copies */

    for (uint32_t p = 0; work->source.host != NULL && p < work->spec->n_planes; p++)
        token_bytes += plane_row_bytes(&work->spec->planes[p]);
    chunk = CHUNK_BYTES > token_bytes ? CHUNK_BYTES / token_bytes : 1;
    for (uint32_t from = 0; from < work->nnz && status == KVP_OK; which ^= 1) {
        uint32_t n = work->nnz - from < chunk ? work->nnz - from : (uint32_t)chunk;

        status = append_chunk(worker, work, from, n, &worker->halves[which], reterr);
        from += n;
    }
    return status;
}

/* Where the kernel stores output k: in the target on the GPU, or in the half from which it is copied to the host. */
static CUdeviceptr output(const struct kvp_exec_index *index, unsigned k, CUdeviceptr scratch)
{
    if ((index->wanted & 1u << k) == 0)
        return 0;
    if (index->target->host == NULL)
        return index->target->device + index->offsets[k];
    for (unsigned i = 0; i < k; i++)
        scratch += aligned(index->bytes[i]);
    return scratch;
}

static enum kvp_status run_index(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                 struct kvp_exec_error *reterr)
{
    const struct kvp_exec_index *index = work->index;
    const struct {
        const int32_t *from;
        uint64_t n;
    } inputs[] = {{index->kv_indptr, (uint64_t)index->batch + 1},
                  {index->last_page_len, index->batch},
                  {index->tokens, index->batch},
                  {index->kv_indices, index->pages}};
    struct half *in = &worker->halves[0], *out = &worker->halves[1];
    uint64_t at[4], need = 0, scratch = ALIGNMENT;
    CUdeviceptr outputs[KVP_EXEC_OUTPUTS];
    enum kvp_status status;

    for (unsigned i = 0; i < 4; i++) {
        at[i] = need;
        need += aligned(inputs[i].n * sizeof(int32_t));
    }
    for (unsigned k = 0; k < KVP_EXEC_OUTPUTS; k++)
        scratch += aligned(index->bytes[k]);
    KVP_CUDA_CALL(done, cuEventSynchronize, in->passed);
    status = half_need(in, need, reterr);
    if (status == KVP_OK && index->target->host != NULL)
        status = half_need(out, scratch, reterr);
    if (status != KVP_OK)
        return status;
    for (unsigned i = 0; i < 4; i++)
        memcpy(in->host + at[i], inputs[i].from, inputs[i].n * sizeof(int32_t));
    for (unsigned k = 0; k < KVP_EXEC_OUTPUTS; k++)
        outputs[k] = output(index, k, out->device);
    status = upload(worker, in, need, reterr);
    if (status == KVP_OK) {
        struct kvp_index_args args = {.source = KVP_INDEX_CSR,
                                      .index_bits = 32,
                                      .slot_bits = 64,
                                      .pages = work->spec->pages,
                                      .page_tokens = work->spec->page_tokens,
                                      .batch = index->batch,
                                      .nnz = index->nnz,
                                      .kv_capacity = index->pages,
                                      .in_kv_indptr = (const void *)(in->device + at[0]),
                                      .in_last_page_len = (const void *)(in->device + at[1]),
                                      .append_lengths = (const void *)(in->device + at[2]),
                                      .in_kv_indices = (const void *)(in->device + at[3]),
                                      .ret_batch_indices = (void *)outputs[0],
                                      .ret_positions = (void *)outputs[1],
                                      .ret_slot_mapping = (void *)outputs[2],
                                      .ret_kv_indptr = (void *)outputs[3],
                                      .ret_kv_indices = (void *)outputs[4],
                                      .ret_kv_last_page_len = (void *)outputs[5],
                                      .ret_seq_lens = (void *)outputs[6]};

        status = launched(kvp_cuda_index(&args, worker->stream), "index", reterr);
    }
    for (unsigned k = 0; k < KVP_EXEC_OUTPUTS && status == KVP_OK; k++)
        if (index->target->host != NULL && outputs[k] != 0 && index->bytes[k] > 0)
            KVP_CUDA_CALL(done, cuMemcpyDtoHAsync, index->target->host + index->offsets[k], outputs[k], index->bytes[k],
                          worker->stream);
done:
    return status;
}

/* Page ids go up in one half; the digests come back by the other, and are there when the stream has ended. */
static enum kvp_status run_digests(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                   struct kvp_exec_error *reterr)
{
    struct half *in = &worker->halves[0], *out = &worker->halves[1];
    uint64_t ids_bytes = work->n_digests * sizeof(*work->digest_pages);
    uint64_t bytes = work->n_digests * sizeof(*work->digests);
    struct kvp_page_digest_args args = {.planes = worker->planes,
                                        .n_planes = work->spec->n_planes,
                                        .pages = work->spec->pages,
                                        .page_tokens = work->spec->page_tokens,
                                        .n = work->n_digests};
    enum kvp_status status;

    if (work->n_digests == 0)
        return KVP_OK;
    KVP_CUDA_CALL(done, cuEventSynchronize, in->passed);
    KVP_CUDA_CALL(done, cuEventSynchronize, out->passed);
    status = half_need(in, ids_bytes, reterr);
    if (status == KVP_OK)
        status = half_need(out, bytes, reterr);
    if (status != KVP_OK)
        return status;
    memcpy(in->host, work->digest_pages, ids_bytes);
    args.page_ids = (const int32_t *)in->device;
    args.ret_digests = (struct kvp_digest *)out->device;
    status = upload(worker, in, ids_bytes, reterr);
    if (status == KVP_OK)
        status = launched(kvp_cuda_page_digest(&args, worker->stream), "page digest", reterr);
    if (status == KVP_OK)
        KVP_CUDA_CALL(done, cuMemcpyDtoHAsync, out->host, out->device, bytes, worker->stream);
done:
    return status;
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

/* The stream stores the completion value where it can reach it. @param ret_stored it will */
static enum kvp_status store_done(struct kvp_exec_worker *worker, const struct kvp_exec_work *work, bool *ret_stored,
                                  struct kvp_exec_error *reterr)
{
    CUdeviceptr at = work->done != NULL ? kvp_cuda_timeline(worker->device, work->done) : 0;
    enum kvp_status status = KVP_OK;

    *ret_stored = at != 0;
    if (at == 0 || __atomic_load_n(&work->done->value, __ATOMIC_ACQUIRE) >= work->done_value)
        return KVP_OK;
    KVP_CUDA_CALL(done, cuStreamWriteValue64, worker->stream, at, work->done_value, CU_STREAM_WRITE_VALUE_DEFAULT);
done:
    return status;
}

/* What failed first is what is told, unless the stream shows that the context is lost. */
static void drain(struct kvp_exec_worker *worker, struct kvp_exec_error *reterr)
{
    struct kvp_exec_error now = {0};
    CUresult result = kvp_cuda.cuStreamSynchronize(worker->stream);

    if (result == CUDA_SUCCESS || reterr->fatal)
        return;
    kvp_cuda_fail(&now, "cuStreamSynchronize", result);
    if (now.fatal)
        *reterr = now;
}

static enum kvp_status cuda_run(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                struct kvp_exec_error *reterr)
{
    bool stored = false;
    enum kvp_status status;

    for (uint32_t p = 0; p < work->spec->n_planes; p++)
        worker->planes[p] = kvp_plane_view_of(work->spec, work->planes, p, (void *)work->slab->device);
    status = run_zeros(worker, work, reterr);
    if (status == KVP_OK)
        status = run_copies(worker, work, reterr);
    if (status == KVP_OK && work->nnz > 0)
        status = run_append(worker, work, reterr);
    if (status == KVP_OK && work->index != NULL)
        status = run_index(worker, work, reterr);
    if (status == KVP_OK)
        status = run_digests(worker, work, reterr);
    if (status == KVP_OK)
        status = store_done(worker, work, &stored, reterr);
    if (status != KVP_OK)
        goto failed;
    KVP_CUDA_CALL(failed, cuEventRecord, worker->ended, worker->stream);
    KVP_CUDA_CALL(failed, cuEventSynchronize, worker->ended);
    if (work->n_digests > 0)
        memcpy(work->digests, worker->halves[1].host, work->n_digests * sizeof(*work->digests));
    if (!stored && work->done != NULL && __atomic_load_n(&work->done->value, __ATOMIC_RELAXED) < work->done_value)
        __atomic_store_n(&work->done->value, work->done_value, __ATOMIC_RELEASE);
    return KVP_OK;

failed:
    drain(worker, reterr);
    return reterr->fatal ? KVP_EDEVICE : status;
}

const struct kvp_exec_backend kvp_exec_cuda = {
    .name = "cuda",
    .workers = 8,
    .open = cuda_open,
    .close = cuda_close,
    .slab_create = kvp_cuda_slab_create,
    .slab_adopt = kvp_cuda_slab_adopt,
    .buffer_import = kvp_cuda_buffer_import,
    .memory_drop = kvp_cuda_memory_drop,
    .timelines_adopt = kvp_cuda_timelines_adopt,
    .timelines_drop = kvp_cuda_timelines_drop,
    .worker_open = cuda_worker_open,
    .worker_close = cuda_worker_close,
    .run = cuda_run,
    .processes = cuda_processes,
};
