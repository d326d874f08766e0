/**
 * What the library needs of the CUDA driver, found at run time. Without a driver, or in a build without CUDA, the host
 * backend works and a CUDA pool is refused with KVP_ENODEV.
 *
 * A kvp_cuda_pool is what an attached CUDA pool has beside its mappings: the primary context of each rank's GPU, and
 * the device addresses of table, progress page and timelines, which are registered host memory.
 */
#ifndef KVP_CLIENT_CUDA_H
#define KVP_CLIENT_CUDA_H

#include "internal.h"

struct kvp_cuda_pool;

/** @retval KVP_ENODEV  no driver here, or the library was built without CUDA */
enum kvp_status kvp_cuda_open(struct kvp_cuda_pool **ret_cuda);
void kvp_cuda_close(struct kvp_cuda_pool *cuda);

/** Map a slab by its fd (>= 0, stays the caller's) or its legacy handle [64]. @retval KVP_ENODEV  its GPU is not here
 */
enum kvp_status kvp_cuda_import(struct kvp_cuda_pool *cuda, uint32_t rank, struct kvp_slab *slab, int fd,
                                const void *ipc_handle);
void kvp_cuda_release(struct kvp_cuda_pool *cuda, uint32_t rank, struct kvp_slab *slab);

/** The number of a rank's GPU in this process, as the driver and the CUDA runtime count; -1: it is not mapped. */
int kvp_cuda_device(const struct kvp_cuda_pool *cuda, uint32_t rank);
/** Wait for all that is enqueued on a rank's GPU by this process. */
void kvp_cuda_settle(struct kvp_cuda_pool *cuda, uint32_t rank);

/** Mapped host memory that the GPUs are to reach: registered once, found by its place. */
enum kvp_cuda_shared { KVP_CUDA_TABLE, KVP_CUDA_PROGRESS, KVP_CUDA_TIMELINES, KVP_CUDA_SHARED };
enum kvp_status kvp_cuda_share(struct kvp_cuda_pool *cuda, enum kvp_cuda_shared which,
                               const struct kvp_mapping *mapping);
uint64_t kvp_cuda_address(const struct kvp_cuda_pool *cuda, enum kvp_cuda_shared which);

/** Stream memory operations on the 64-bit word at a device address. */
enum kvp_status kvp_cuda_wait_value(struct kvp_cuda_pool *cuda, uint64_t address, uint64_t value, void *stream);
enum kvp_status kvp_cuda_write_value(struct kvp_cuda_pool *cuda, uint64_t address, uint64_t value, void *stream);

/** Memory of a rank's GPU; pinned memory of the host, which all GPUs reach at its address. Zeroed. */
enum kvp_status kvp_cuda_alloc(struct kvp_cuda_pool *cuda, uint32_t rank, size_t bytes, void **ret_memory);
void kvp_cuda_free(struct kvp_cuda_pool *cuda, uint32_t rank, void *memory);
enum kvp_status kvp_cuda_alloc_pinned(struct kvp_cuda_pool *cuda, size_t bytes, void **ret_memory);
void kvp_cuda_free_pinned(struct kvp_cuda_pool *cuda, void *memory);

/* The rest runs between enter and leave, which make the rank's context the current one. */
enum kvp_status kvp_cuda_enter(struct kvp_cuda_pool *cuda, uint32_t rank);
void kvp_cuda_leave(struct kvp_cuda_pool *cuda);
enum kvp_status kvp_cuda_copy_in(void *device, const void *host, size_t bytes, void *stream);
enum kvp_status kvp_cuda_sync(void *stream);
/** Events, by which a step knows that its staging memory is free again. */
enum kvp_status kvp_cuda_event_make(void **ret_event);
enum kvp_status kvp_cuda_event_record(void *event, void *stream);
enum kvp_status kvp_cuda_event_wait(void *event);
void kvp_cuda_event_free(void *event);

/* The launchers of kvp_kernels.h; all NULL in a build without CUDA, where no pool has a kvp_cuda_pool. */
struct kvp_cuda_kernels {
    enum kvp_status (*append)(const struct kvp_append_args *args, void *stream);
    enum kvp_status (*index)(const struct kvp_index_args *args, void *stream);
    enum kvp_status (*progress)(const struct kvp_progress_args *args, void *stream);
    enum kvp_status (*page_copy)(const struct kvp_page_copy_args *args, void *stream);
    enum kvp_status (*page_gather)(const struct kvp_page_flat_args *args, void *stream);
};
extern const struct kvp_cuda_kernels kvp_cuda_kernels;

#endif
