/**
 * One opened GPU: what cuda_memory.c (its memory) and backend_cuda.c (its work) share.
 *
 * The main thread opens and closes it and owns all fields but `timelines`, which worker threads look up under the lock.
 * Every thread that calls the driver has the primary context current: the main thread by kvp_exec_backend.open, a
 * worker by worker_open. The primary context is the one that the kernels' runtime library uses, too.
 */
#ifndef KVP_EXEC_CUDA_DEVICE_H
#define KVP_EXEC_CUDA_DEVICE_H

#include "cuda_driver.h"

#include <pthread.h>

struct kvp_cuda_timelines;
struct kvp_cuda_opened;

struct kvp_exec_device {
    CUdevice number;
    CUcontext context;
    uint64_t granularity;           /* of cuMemCreate */
    bool stream_writes;             /* streams can store 64-bit values */
    struct kvp_cuda_opened *opened; /* legacy handles of others, counted */
    pthread_mutex_t lock;
    struct kvp_cuda_timelines *timelines; /* registered for the GPU to store to */
};

enum kvp_status kvp_cuda_slab_create(struct kvp_exec_device *device, uint64_t bytes, bool legacy_ipc,
                                     struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr);
enum kvp_status kvp_cuda_slab_adopt(struct kvp_exec_device *device, int fd, uint64_t bytes,
                                    struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr);
enum kvp_status kvp_cuda_buffer_import(struct kvp_exec_device *device, bool on_host, int fd, const unsigned char *ipc,
                                       uint64_t offset, uint64_t bytes, struct kvp_exec_memory *ret_memory,
                                       struct kvp_exec_error *reterr);
void kvp_cuda_memory_drop(struct kvp_exec_device *device, struct kvp_exec_memory *memory);
void kvp_cuda_timelines_adopt(struct kvp_exec_device *device, void *at, uint64_t bytes);
void kvp_cuda_timelines_drop(struct kvp_exec_device *device, void *at);
/** Where the GPU finds a timeline; 0: it can not store there. Any thread. */
CUdeviceptr kvp_cuda_timeline(struct kvp_exec_device *device, const struct kvp_timeline *timeline);

#endif
