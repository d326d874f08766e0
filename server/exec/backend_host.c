/**
 * The host backend: slabs are memfds, kernels run on the CPU, a store is a store.
 *
 * A slab is mode 0600, allocated as a whole, and sealed against shrinking and growing, so that no process that maps it
 * can take its memory away from another. The kernels bring their own threads; a worker here has no state.
 */
#include "backend.h"
#include "memory.h"

#include <string.h>
#include <unistd.h>

/* There is one host and it has no state: these stand for it. */
struct kvp_exec_device {
    char unused;
};
struct kvp_exec_worker {
    char unused;
};
static struct kvp_exec_device the_host;
static struct kvp_exec_worker a_worker;

static enum kvp_status host_open(const char *id, struct kvp_exec_device **ret_device,
                                 struct kvp_exec_device_info *ret_info, struct kvp_exec_error *reterr)
{
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);

    if (id[0] != 0 && strcmp(id, "host") != 0)
        return kvp_exec_fail(reterr, KVP_ENODEV, "the host backend has one device, \"host\"; there is no %.64s", id);
    *ret_info = (struct kvp_exec_device_info){.id = "host", .name = "host memory"};
    if (pages > 0 && page_bytes > 0)
        ret_info->bytes = (uint64_t)pages * (uint64_t)page_bytes;
    *ret_device = &the_host;
    return KVP_OK;
}

static void host_close(struct kvp_exec_device *device)
{
    (void)device;
}

static enum kvp_status host_slab_create(struct kvp_exec_device *device, uint64_t bytes, bool legacy_ipc,
                                        struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr)
{
    struct kvp_exec_memory memory = {.bytes = bytes, .fd = -1};
    enum kvp_status status;
    void *at;

    (void)device;
    if (legacy_ipc)
        return kvp_exec_fail(reterr, KVP_EINVAL, "legacy handles are of GPU memory; a host slab has none");
    status = kvp_exec_memfd("kvp-slab", bytes, &memory.fd, reterr);
    if (status != KVP_OK)
        return status;
    status = kvp_exec_map(memory.fd, bytes, 0, &at, &memory.writable, reterr);
    if (status != KVP_OK) {
        close(memory.fd);
        return status;
    }
    memory.host = at;
    *ret_memory = memory;
    return KVP_OK;
}

static enum kvp_status host_slab_adopt(struct kvp_exec_device *device, int fd, uint64_t bytes,
                                       struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr)
{
    (void)device;
    return kvp_exec_map_at(fd, 0, bytes, 0, ret_memory, reterr);
}

static enum kvp_status host_buffer_import(struct kvp_exec_device *device, bool on_host, int fd,
                                          const unsigned char *ipc, uint64_t offset, uint64_t bytes,
                                          struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr)
{
    (void)device;
    if (!on_host || ipc != NULL)
        return kvp_exec_fail(reterr, KVP_ENODEV, "the host backend takes host memory alone");
    return kvp_exec_map_at(fd, offset, bytes, KVP_EXEC_MAP_SEALED | KVP_EXEC_MAP_READ, ret_memory, reterr);
}

static void host_memory_drop(struct kvp_exec_device *device, struct kvp_exec_memory *memory)
{
    (void)device;
    kvp_exec_unmap(memory);
    if (memory->fd >= 0)
        close(memory->fd);
}

static void host_timelines(struct kvp_exec_device *device, void *at, uint64_t bytes)
{
    (void)device, (void)at, (void)bytes;
}

static void host_timelines_drop(struct kvp_exec_device *device, void *at)
{
    (void)device, (void)at;
}

static enum kvp_status host_worker_open(struct kvp_exec_device *device, struct kvp_exec_worker **ret_worker,
                                        struct kvp_exec_error *reterr)
{
    (void)device, (void)reterr;
    *ret_worker = &a_worker;
    return KVP_OK;
}

static void host_worker_close(struct kvp_exec_worker *worker)
{
    (void)worker;
}

/* ---- work -------------------------------------------------------------------------------------------------------- */

struct views {
    struct kvp_plane_view planes[KVP_PLANES_MAX];
    struct kvp_token_view sources[KVP_PLANES_MAX];
};

static enum kvp_status run_zeros(const struct kvp_exec_work *work, const struct views *views)
{
    struct kvp_page_zero_args args = {.planes = views->planes,
                                      .n_planes = work->spec->n_planes,
                                      .pages = work->spec->pages,
                                      .page_tokens = work->spec->page_tokens,
                                      .n = work->n_zero,
                                      .page_ids = work->zero_pages};

    return work->n_zero > 0 ? kvp_host_page_zero(&args, 0) : KVP_OK;
}

static enum kvp_status run_copies(const struct kvp_exec_work *work, const struct views *views)
{
    enum kvp_status status = KVP_OK;
    uint32_t from = 0;

    for (uint32_t g = 0; g < work->n_groups && status == KVP_OK; from = work->group_ends[g++]) {
        struct kvp_page_copy_args args = {.sources = views->planes,
                                          .destinations = views->planes,
                                          .n_planes = work->spec->n_planes,
                                          .page_tokens = work->spec->page_tokens,
                                          .source_pages = work->spec->pages,
                                          .destination_pages = work->spec->pages,
                                          .n = work->group_ends[g] - from,
                                          .copies = work->copies + from};

        status = kvp_host_page_copy(&args, 0);
    }
    return status;
}

static enum kvp_status run_append(const struct kvp_exec_work *work, struct views *views)
{
    struct kvp_append_args args = {
        .planes = views->planes,
        .sources = views->sources,
        .n_planes = work->spec->n_planes,
        .pages = work->spec->pages,
        .page_tokens = work->spec->page_tokens,
        .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = work->nnz, .slot_mapping = work->slots}};

    for (uint32_t p = 0; p < work->spec->n_planes; p++)
        views->sources[p] =
            (struct kvp_token_view){.base = (unsigned char *)work->source.host + work->source.offsets[p],
                                    .token_stride = (int64_t)work->source.token_strides[p],
                                    .head_stride = (int64_t)work->source.head_strides[p]};
    return kvp_host_append(&args, 0);
}

static enum kvp_status run_digests(const struct kvp_exec_work *work, const struct views *views)
{
    struct kvp_page_digest_args args = {.planes = views->planes,
                                        .n_planes = work->spec->n_planes,
                                        .pages = work->spec->pages,
                                        .page_tokens = work->spec->page_tokens,
                                        .n = work->n_digests,
                                        .page_ids = work->digest_pages,
                                        .ret_digests = work->digests};

    return work->n_digests > 0 ? kvp_host_page_digest(&args, 0) : KVP_OK;
}

static void *output(const struct kvp_exec_index *index, unsigned k)
{
    return (index->wanted & 1u << k) != 0 ? index->target->host + index->offsets[k] : NULL;
}

static enum kvp_status run_index(const struct kvp_exec_work *work)
{
    const struct kvp_exec_index *index = work->index;
    struct kvp_index_args args = {.source = KVP_INDEX_CSR,
                                  .index_bits = 32,
                                  .slot_bits = 64,
                                  .pages = work->spec->pages,
                                  .page_tokens = work->spec->page_tokens,
                                  .batch = index->batch,
                                  .nnz = index->nnz,
                                  .kv_capacity = index->pages,
                                  .append_lengths = index->tokens,
                                  .in_kv_indptr = index->kv_indptr,
                                  .in_kv_indices = index->kv_indices,
                                  .in_last_page_len = index->last_page_len,
                                  .ret_batch_indices = output(index, 0),
                                  .ret_positions = output(index, 1),
                                  .ret_slot_mapping = output(index, 2),
                                  .ret_kv_indptr = output(index, 3),
                                  .ret_kv_indices = output(index, 4),
                                  .ret_kv_last_page_len = output(index, 5),
                                  .ret_seq_lens = output(index, 6)};

    return kvp_host_index(&args, 0);
}

static enum kvp_status host_run(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                                struct kvp_exec_error *reterr)
{
    struct views views;
    enum kvp_status status;

    (void)worker;
    for (uint32_t p = 0; p < work->spec->n_planes; p++)
        views.planes[p] = kvp_plane_view_of(work->spec, work->planes, p, work->slab->host);
    status = run_zeros(work, &views);
    if (status == KVP_OK)
        status = run_copies(work, &views);
    if (status == KVP_OK && work->nnz > 0)
        status = run_append(work, &views);
    if (status == KVP_OK && work->index != NULL)
        status = run_index(work);
    if (status == KVP_OK)
        status = run_digests(work, &views);
    if (status != KVP_OK)
        return kvp_exec_fail(reterr, status, "a kernel on the host failed: %s", kvp_status_text(status));
    if (work->done != NULL && __atomic_load_n(&work->done->value, __ATOMIC_RELAXED) < work->done_value)
        __atomic_store_n(&work->done->value, work->done_value, __ATOMIC_RELEASE);
    return KVP_OK;
}

static enum kvp_status host_processes(const struct kvp_exec_device_info *info, uint32_t *ret_pids, unsigned room,
                                      unsigned *ret_n)
{
    (void)info, (void)ret_pids, (void)room;
    *ret_n = 0; /* no device serves anyone: a process that ended has stopped writing */
    return KVP_OK;
}

const struct kvp_exec_backend kvp_exec_host = {
    .name = "host",
    .workers = 4,
    .open = host_open,
    .close = host_close,
    .slab_create = host_slab_create,
    .slab_adopt = host_slab_adopt,
    .buffer_import = host_buffer_import,
    .memory_drop = host_memory_drop,
    .timelines_adopt = host_timelines,
    .timelines_drop = host_timelines_drop,
    .worker_open = host_worker_open,
    .worker_close = host_worker_close,
    .run = host_run,
    .processes = host_processes,
};
