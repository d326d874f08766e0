/**
 * Attaching a pool: what Attach answers is checked and mapped.
 *
 *   message          fds                     here
 *   pool info        -                       pool->info, the layout computed again and compared
 *   slabs [rank]     a memfd (host)          mmap, read and write
 *                    a VMM handle (CUDA)     cuda.c: imported, mapped, access set
 *                    none, but 64 bytes      cuda.c: legacy handle opened
 *   table            memfd, read-only        mmap, read; its header must agree with the message
 *   progress         memfd                   mmap, read and write; none with metadata_only
 *   timelines        memfd                   mmap, read and write; on CUDA registered with the driver
 *
 * All or nothing: on failure what was mapped is unmapped, and the daemon is told to detach again (a session by lease
 * may have it attached from before, and keeps it). A pool stays in its client's list until kvp_detach or
 * kvp_disconnect; when the session is found to be gone, it is marked there, once and for good.
 */
#include "cuda.h"
#include "internal.h"
#include "pools.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- mapping ----------------------------------------------------------------------------------------------------- */

static enum kvp_status map_fd(const char *what, int fd, bool writable, size_t at_least, struct kvp_mapping *ret_mapping)
{
    struct stat st;
    void *address;

    if (fd < 0)
        return kvp_fail(KVP_EPROTO, "the reply of Attach carries no %s", what);
    if (fstat(fd, &st) != 0)
        return kvp_fail(KVP_EPROTO, "the fd of the %s is of no use: %s", what, strerror(errno));
    if (st.st_size <= 0 || (uint64_t)st.st_size < at_least)
        return kvp_fail(KVP_EPROTO, "the %s has %lld bytes, not %zu", what, (long long)st.st_size, at_least);
    address = mmap(NULL, (size_t)st.st_size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED)
        return kvp_fail(KVP_ENOMEM, "the %s of %lld bytes can not be mapped: %s", what, (long long)st.st_size,
                        strerror(errno));
    /* A core dump of this process leaves the pool out: other users' pages, and hours of writing for a large one. */
    madvise(address, (size_t)st.st_size, MADV_DONTDUMP);
    *ret_mapping = (struct kvp_mapping){address, (size_t)st.st_size};
    return KVP_OK;
}

static void unmap(struct kvp_mapping *mapping)
{
    if (mapping->address != NULL)
        munmap(mapping->address, mapping->bytes);
    mapping->address = NULL;
}

/* Every later access relies on these bounds. */
static enum kvp_status check_table(const struct kvp_pool *pool)
{
    const struct kvp_table_header *header = pool->header;
    uint64_t bytes = pool->table.bytes;

    if (header->magic != KVP_TABLE_MAGIC || header->abi_version != KVP_ABI_VERSION)
        return kvp_fail(KVP_EMISMATCH, "the table of pool %s is of ABI version %u; this library reads %u",
                        pool->info->spec.name, header->abi_version, KVP_ABI_VERSION);
    if (memcmp(header->layout_digest, pool->info->layout_digest, sizeof(header->layout_digest)) != 0)
        return kvp_fail(KVP_EMISMATCH, "the table is of another pool than %s", pool->info->spec.name);
    if (header->max_sequences == 0 || header->max_sequences > KVP_SEQUENCES_MAX || header->row_pages > KVP_PAGES_MAX ||
        header->heads_offset % sizeof(struct kvp_table_head) != 0 || header->heads_offset > bytes ||
        header->rows_offset > bytes || header->rows_offset % sizeof(int32_t) != 0 ||
        header->row_stride % sizeof(int32_t) != 0 || header->row_stride < header->row_pages * sizeof(int32_t) ||
        header->heads_offset + header->max_sequences * sizeof(struct kvp_table_head) > bytes ||
        header->row_stride > (bytes - header->rows_offset) / header->max_sequences)
        return kvp_fail(KVP_EPROTO, "the table of pool %s does not fit its %llu bytes", pool->info->spec.name,
                        (unsigned long long)bytes);
    return KVP_OK;
}

static enum kvp_status map_tables(struct kvp_pool *pool, const Kvpool__V1__AttachReply *reply, const int fds[3])
{
    enum kvp_status status = map_fd("table", fds[0], false, sizeof(struct kvp_table_header), &pool->table);

    if (status != KVP_OK)
        return status;
    pool->header = pool->table.address;
    status = check_table(pool);
    if (status != KVP_OK)
        return status;
    pool->heads = (const void *)((const unsigned char *)pool->table.address + pool->header->heads_offset);
    pool->rows = (const unsigned char *)pool->table.address + pool->header->rows_offset;
    if (reply->progress_fd_index >= 0)
        status = map_fd("progress page", fds[1], true, pool->header->max_sequences * sizeof(uint64_t), &pool->progress);
    if (status != KVP_OK)
        return status;
    pool->words = pool->progress.address;
    status = map_fd("timelines", fds[2], true, sizeof(struct kvp_timeline) * KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX,
                    &pool->timelines);
    if (status != KVP_OK)
        return status;
    pool->lines = pool->timelines.address;
    pool->own = calloc(pool->header->max_sequences, sizeof(*pool->own));
    if (pool->own == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for %u sequences", pool->header->max_sequences);
    if (reply->attachment >= KVP_ATTACHMENTS_MAX)
        return kvp_fail(KVP_EPROTO, "attachment %u is none of 0..%d", reply->attachment, KVP_ATTACHMENTS_MAX - 1);
    pool->attachment = reply->attachment;
    pool->session_id = reply->session_id;
    memcpy(pool->instance, pool->header->instance, sizeof(pool->instance));
    return KVP_OK;
}

static enum kvp_status map_slab(struct kvp_pool *pool, const Kvpool__V1__Slab *from, uint32_t rank, int fd)
{
    struct kvp_slab *slab = &pool->slabs[rank];
    const void *handle = from->ipc_handle.len == 64 ? from->ipc_handle.data : NULL;
    struct kvp_mapping mapping;
    enum kvp_status status;

    snprintf(slab->device, sizeof(slab->device), "%s", from->device);
    slab->bytes = from->bytes;
    if (from->bytes < pool->info->slab_bytes)
        return kvp_fail(KVP_EPROTO, "a slab of pool %s has %llu bytes, not %llu", pool->info->spec.name,
                        (unsigned long long)from->bytes, (unsigned long long)pool->info->slab_bytes);
    if (pool->cuda != NULL) {
        if (fd < 0 && handle == NULL)
            return kvp_fail(KVP_EPROTO, "the reply of Attach carries no slab");
        return kvp_cuda_import(pool->cuda, rank, slab, fd, handle);
    }
    status = map_fd("slab", fd, true, from->bytes, &mapping);
    if (status != KVP_OK)
        return status;
    slab->address = mapping.address;
    slab->bytes = mapping.bytes;
    return KVP_OK;
}

static enum kvp_status map_slabs(struct kvp_pool *pool, const Kvpool__V1__AttachReply *reply, uint32_t ranks,
                                 struct kvp_rpc *rpc)
{
    enum kvp_status status = KVP_OK;

    if (reply->n_slabs != pool->info->slabs || reply->n_slabs > KVP_GPUS_MAX)
        return kvp_fail(KVP_EPROTO, "the reply of Attach lists %zu slabs of %u", reply->n_slabs, pool->info->slabs);
    for (uint32_t rank = 0; rank < pool->info->slabs && status == KVP_OK; rank++) {
        int fd;

        if (ranks != 0 && (ranks & 1u << rank) == 0)
            continue;
        fd = kvp_rpc_take_fd(rpc, reply->slabs[rank]->fd_index);
        status = map_slab(pool, reply->slabs[rank], rank, fd);
        if (fd >= 0)
            close(fd);
    }
    return status;
}

void kvp_pool_free(struct kvp_pool *pool)
{
    for (uint32_t i = 0; pool->slabs != NULL && i < pool->info->slabs; i++) {
        if (pool->slabs[i].address == NULL)
            continue;
        if (pool->cuda != NULL)
            kvp_cuda_release(pool->cuda, i, &pool->slabs[i]);
        else
            munmap(pool->slabs[i].address, pool->slabs[i].bytes);
    }
    if (pool->cuda != NULL)
        kvp_cuda_close(pool->cuda);
    unmap(&pool->table);
    unmap(&pool->progress);
    unmap(&pool->timelines);
    free(pool->own);
    free(pool->slabs);
    kvp_pool_info_free(pool->info);
    free(pool);
}

/* ---- attach ------------------------------------------------------------------------------------------------------ */

/* Make the pool of what Attach answered. */
static enum kvp_status take_answer(struct kvp_client *client, const struct kvp_attach_options *options,
                                   struct kvp_rpc *rpc, struct kvp_pool **ret_pool)
{
    const Kvpool__V1__AttachReply *reply = (const Kvpool__V1__AttachReply *)rpc->reply;
    struct kvp_pool *pool = calloc(1, sizeof(*pool));
    enum kvp_status status;
    int fds[3];

    if (pool == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a pool");
    pool->client = client;
    status = kvp_pool_info_from(reply->pool, &pool->info);
    if (status != KVP_OK) {
        free(pool);
        return status;
    }
    fds[0] = kvp_rpc_take_fd(rpc, reply->table_fd_index);
    fds[1] = kvp_rpc_take_fd(rpc, reply->progress_fd_index);
    fds[2] = kvp_rpc_take_fd(rpc, reply->timelines_fd_index);
    status = map_tables(pool, reply, fds);
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (status == KVP_OK && !options->metadata_only) {
        pool->slabs = calloc(pool->info->slabs, sizeof(*pool->slabs));
        if (pool->slabs == NULL)
            status = kvp_fail(KVP_ENOMEM, "no memory for %u slabs", pool->info->slabs);
        if (status == KVP_OK && pool->info->cuda)
            status = kvp_cuda_open(&pool->cuda);
        if (status == KVP_OK)
            status = map_slabs(pool, reply, options->ranks, rpc);
        if (status == KVP_OK && pool->cuda != NULL)
            status = kvp_cuda_share(pool->cuda, KVP_CUDA_TIMELINES, &pool->timelines);
    }
    if (status != KVP_OK) {
        kvp_pool_free(pool);
        return status;
    }
    *ret_pool = pool;
    return KVP_OK;
}

static enum kvp_status tell_detach(struct kvp_client *client, struct kvp_pool *pool, const char *name)
{
    Kvpool__V1__DetachRequest request = KVPOOL__V1__DETACH_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.pool = (char *)name;
    status = kvp_rpc_call(client, pool, KVPOOL__V1__METHOD__METHOD_DETACH, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}

/* The session may have ended between the answer and now; then the pool was born dead. */
static void link_pool(struct kvp_client *client, struct kvp_pool *pool)
{
    pthread_mutex_lock(&client->lock);
    pool->next = client->pools;
    client->pools = pool;
    if (client->session_id != pool->session_id || memcmp(client->instance, pool->instance, sizeof(pool->instance)) != 0)
        kvp_pool_session_lost(pool, client->instance);
    pthread_mutex_unlock(&client->lock);
}

enum kvp_status kvp_attach(struct kvp_client *client, const char *name, const struct kvp_attach_options *options,
                           struct kvp_pool **ret_pool)
{
    static const struct kvp_attach_options defaults;
    Kvpool__V1__AttachRequest request = KVPOOL__V1__ATTACH_REQUEST__INIT;
    struct kvp_pool *pool = NULL;
    enum kvp_status status;
    struct kvp_rpc rpc;

    if (options == NULL)
        options = &defaults;
    request.pool = (char *)name;
    if (options->layout_digest != NULL)
        request.layout_digest = (ProtobufCBinaryData){16, (uint8_t *)options->layout_digest};
    request.model = (char *)(options->model != NULL ? options->model : "");
    request.join = options->join;
    request.abi_version = KVP_ABI_VERSION;
    request.metadata_only = options->metadata_only;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_ATTACH, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        status = take_answer(client, options, &rpc, &pool);
        if (status == KVP_OK) {
            link_pool(client, pool);
            *ret_pool = pool;
        } else {
            char text[512];

            snprintf(text, sizeof(text), "%s", kvp_error_text());
            if (client->token[0] == 0)
                tell_detach(client, NULL, name);
            kvp_fail(status, "%s", text);
        }
    }
    kvp_rpc_release(&rpc);
    return status;
}

static void unlink_pool(struct kvp_client *client, const struct kvp_pool *pool)
{
    for (struct kvp_pool **at = &client->pools; *at != NULL; at = &(*at)->next) {
        if (*at == pool) {
            *at = pool->next;
            break;
        }
    }
}

/* To the daemon, two attachments of a session to a pool are one: it is told of the last one's end. */
static bool unlink_unless_last(struct kvp_client *client, struct kvp_pool *pool)
{
    bool last = true;

    pthread_mutex_lock(&client->lock);
    for (const struct kvp_pool *other = client->pools; other != NULL && last; other = other->next)
        last = other == pool || other->info->pool_id != pool->info->pool_id || atomic_load(&other->gone) != KVP_OK;
    if (!last)
        unlink_pool(client, pool);
    pthread_mutex_unlock(&client->lock);
    return !last;
}

enum kvp_status kvp_detach(struct kvp_pool *pool)
{
    struct kvp_client *client = pool->client;
    bool ours = client->fork_generation == kvp_fork_generation;
    enum kvp_status status = kvp_pool_usable(pool);

    if (status == KVP_OK && unlink_unless_last(client, pool)) {
        kvp_pool_free(pool);
        return KVP_OK;
    }
    if (status == KVP_OK) {
        status = tell_detach(client, pool, pool->info->spec.name);
        if (status == KVP_EBUSY)
            return status;
    }
    if (ours)
        pthread_mutex_lock(&client->lock);
    unlink_pool(client, pool);
    if (ours)
        pthread_mutex_unlock(&client->lock);
    kvp_pool_free(pool);
    return KVP_OK;
}

/* ---- the attached pool ------------------------------------------------------------------------------------------- */

void kvp_pool_session_lost(struct kvp_pool *pool, const uint8_t instance[16])
{
    bool same = memcmp(instance, pool->instance, sizeof(pool->instance)) == 0;
    int alive = KVP_OK;

    atomic_compare_exchange_strong(&pool->gone, &alive, same ? KVP_ESESSION : KVP_ELOST);
}

const struct kvp_pool_info *kvp_pool_info(const struct kvp_pool *pool)
{
    return pool->info;
}

void *kvp_slab(const struct kvp_pool *pool, uint32_t rank)
{
    return pool->slabs != NULL && rank < pool->info->slabs ? pool->slabs[rank].address : NULL;
}

enum kvp_status kvp_pool_plane(const struct kvp_pool *pool, uint32_t rank, uint32_t plane,
                               struct kvp_plane_view *ret_view)
{
    void *slab = kvp_slab(pool, rank);

    if (slab == NULL)
        return kvp_fail(KVP_EINVAL, "rank %u of pool %s is not mapped", rank, pool->info->spec.name);
    if (plane >= pool->info->spec.layout.n_planes)
        return kvp_fail(KVP_EINVAL, "plane %u is none of the %u of pool %s", plane, pool->info->spec.layout.n_planes,
                        pool->info->spec.name);
    *ret_view = kvp_plane_view_of(&pool->info->spec.layout, pool->info->planes, plane, slab);
    return KVP_OK;
}

enum kvp_status kvp_stream_sync(struct kvp_pool *pool, uint32_t rank, void *stream)
{
    enum kvp_status status = kvp_pool_usable(pool);

    if (status != KVP_OK || pool->cuda == NULL)
        return status;
    status = kvp_cuda_enter(pool->cuda, rank);
    if (status != KVP_OK)
        return status;
    status = kvp_cuda_sync(stream);
    kvp_cuda_leave(pool->cuda);
    return status;
}

enum kvp_status kvp_host_alloc(struct kvp_pool *pool, size_t bytes, void **ret_memory)
{
    void *memory;

    if (pool->cuda != NULL)
        return kvp_cuda_alloc_pinned(pool->cuda, bytes, ret_memory);
    memory = calloc(1, bytes > 0 ? bytes : 1);
    if (memory == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for %zu bytes", bytes);
    *ret_memory = memory;
    return KVP_OK;
}

void kvp_host_free(struct kvp_pool *pool, void *memory)
{
    if (pool->cuda != NULL)
        kvp_cuda_free_pinned(pool->cuda, memory);
    else
        free(memory);
}
