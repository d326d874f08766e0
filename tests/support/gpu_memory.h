/**
 * GPU memory as a worker of kvpool has it: slabs mapped by fd or by legacy handle, buffers of its own to share.
 *
 * For tests. The CUDA runtime is linked statically; the driver's own functions are found through it. Whatever must not
 * fail ends the test by ck_assert. Never call these in a process that will fork again.
 */
#ifndef GPU_MEMORY_H
#define GPU_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

/** Is there a GPU? Asked in a process of its own, so that the caller may still fork. */
bool gpu_present(void);
/** "GPU-…" of the first GPU; text of KVP_EXEC_DEVICE_BYTES. */
void gpu_first(char ret_id[64]);

/** Map `bytes` of what an fd shares (rounded up to the driver's granularity); the fd stays the caller's. */
void *gpu_map_fd(int fd, uint64_t bytes);
void *gpu_map_ipc(const unsigned char handle[64]);
/** Memory of this process that can be shared: zeroed. @param ret_fd its fd */
void *gpu_shared_by_fd(uint64_t bytes, int *ret_fd);
void *gpu_shared_by_ipc(uint64_t bytes, unsigned char ret_handle[64]);

void gpu_write(void *device, const void *host, uint64_t bytes);
void gpu_read(void *host, const void *device, uint64_t bytes);
void gpu_fill(void *device, int byte, uint64_t bytes);
/** Wait for all that this process has enqueued. */
void gpu_sync(void);
void *gpu_stream(void);

/* Timelines of a pool, mapped here: @return where a stream finds them. */
uint64_t gpu_register(void *at, uint64_t bytes);
void gpu_stream_write(void *stream, uint64_t address, uint64_t value);
void gpu_stream_wait(void *stream, uint64_t address, uint64_t value);
void gpu_read_behind(void *host, const void *device, uint64_t bytes, void *stream);    /* enqueued, then waited for */
void gpu_write_behind(void *device, const void *pinned, uint64_t bytes, void *stream); /* enqueued alone */
void *gpu_pinned(uint64_t bytes);

#endif
