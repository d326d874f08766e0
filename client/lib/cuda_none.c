/**
 * cuda.h in a build without CUDA: no pool can be opened on a GPU, so none of the rest is reached.
 */
#include "cuda.h"

#include <stdlib.h>

const struct kvp_cuda_kernels kvp_cuda_kernels = {0};

enum kvp_status kvp_cuda_open(struct kvp_cuda_pool **ret_cuda)
{
    (void)ret_cuda;
    return kvp_fail(KVP_ENODEV, "a pool on a GPU: this library was built without CUDA");
}

/* Only a pool that kvp_cuda_open made can get here. */
static _Noreturn void unreachable(void)
{
    abort();
}

void kvp_cuda_close(struct kvp_cuda_pool *cuda)
{
    (void)cuda;
    unreachable();
}

enum kvp_status kvp_cuda_import(struct kvp_cuda_pool *cuda, uint32_t rank, struct kvp_slab *slab, int fd,
                                const void *ipc_handle)
{
    (void)cuda, (void)rank, (void)slab, (void)fd, (void)ipc_handle;
    unreachable();
}

void kvp_cuda_release(struct kvp_cuda_pool *cuda, uint32_t rank, struct kvp_slab *slab)
{
    (void)cuda, (void)rank, (void)slab;
    unreachable();
}

int kvp_cuda_device(const struct kvp_cuda_pool *cuda, uint32_t rank)
{
    (void)cuda, (void)rank;
    unreachable();
}

void kvp_cuda_settle(struct kvp_cuda_pool *cuda, uint32_t rank)
{
    (void)cuda, (void)rank;
    unreachable();
}

enum kvp_status kvp_cuda_share(struct kvp_cuda_pool *cuda, enum kvp_cuda_shared which,
                               const struct kvp_mapping *mapping)
{
    (void)cuda, (void)which, (void)mapping;
    unreachable();
}

uint64_t kvp_cuda_address(const struct kvp_cuda_pool *cuda, enum kvp_cuda_shared which)
{
    (void)cuda, (void)which;
    unreachable();
}

enum kvp_status kvp_cuda_wait_value(struct kvp_cuda_pool *cuda, uint64_t address, uint64_t value, void *stream)
{
    (void)cuda, (void)address, (void)value, (void)stream;
    unreachable();
}

enum kvp_status kvp_cuda_write_value(struct kvp_cuda_pool *cuda, uint64_t address, uint64_t value, void *stream)
{
    (void)cuda, (void)address, (void)value, (void)stream;
    unreachable();
}

enum kvp_status kvp_cuda_alloc(struct kvp_cuda_pool *cuda, uint32_t rank, size_t bytes, void **ret_memory)
{
    (void)cuda, (void)rank, (void)bytes, (void)ret_memory;
    unreachable();
}

void kvp_cuda_free(struct kvp_cuda_pool *cuda, uint32_t rank, void *memory)
{
    (void)cuda, (void)rank, (void)memory;
    unreachable();
}

enum kvp_status kvp_cuda_alloc_pinned(struct kvp_cuda_pool *cuda, size_t bytes, void **ret_memory)
{
    (void)cuda, (void)bytes, (void)ret_memory;
    unreachable();
}

void kvp_cuda_free_pinned(struct kvp_cuda_pool *cuda, void *memory)
{
    (void)cuda, (void)memory;
    unreachable();
}

enum kvp_status kvp_cuda_enter(struct kvp_cuda_pool *cuda, uint32_t rank)
{
    (void)cuda, (void)rank;
    unreachable();
}

void kvp_cuda_leave(struct kvp_cuda_pool *cuda)
{
    (void)cuda;
    unreachable();
}

enum kvp_status kvp_cuda_copy_in(void *device, const void *host, size_t bytes, void *stream)
{
    (void)device, (void)host, (void)bytes, (void)stream;
    unreachable();
}

enum kvp_status kvp_cuda_sync(void *stream)
{
    (void)stream;
    unreachable();
}

enum kvp_status kvp_cuda_event_make(void **ret_event)
{
    (void)ret_event;
    unreachable();
}

enum kvp_status kvp_cuda_event_record(void *event, void *stream)
{
    (void)event, (void)stream;
    unreachable();
}

enum kvp_status kvp_cuda_event_wait(void *event)
{
    (void)event;
    unreachable();
}

void kvp_cuda_event_free(void *event)
{
    (void)event;
    unreachable();
}
