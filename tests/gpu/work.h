/**
 * Work for survive_gpu's workers to do beside kvpool's own kernels: memory filled and summed, and a page scribbled on for
 * seconds. On a GPU (work_cuda.cu), or the same by threads of the host (work_host.c), so that the test itself can be run
 * where there is no GPU.
 *
 * One thread; each process has one stream. A function that returns false has failed, and `error` says why; on a GPU
 * whose context is lost all do from then on.
 */
#ifndef KVP_TEST_WORK_H
#define KVP_TEST_WORK_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct work {
    /* Memory of this process. NULL: none is to be had */
    void *(*alloc)(uint64_t bytes);
    /* The stream that all of it is enqueued on, for kvpool's functions; NULL on the host. */
    void *(*stream)(void);
    /* Words that differ: word i is made of salt and i. Enqueued. */
    bool (*fill)(void *at, uint64_t bytes, uint64_t salt);
    /* A sum over n pages of `bytes` bytes each, at base + page · stride, that any changed word changes. Waits. */
    bool (*sum)(const void *base, uint64_t stride, uint64_t bytes, const int32_t *pages, uint32_t n, uint64_t *ret_sum);
    /* Store to all of `bytes` again and again, for so long. Returns when it has begun; one at a time. */
    bool (*scribble)(void *at, uint64_t bytes, double seconds);
    /* Waits, but not for what is scribbled. */
    bool (*read)(void *ret_host, const void *at, uint64_t bytes);
    bool (*sync)(void);
    const char *(*error)(void);
};

extern const struct work work_host;
#ifdef KVP_WORK_CUDA
extern const struct work work_cuda;
#endif

/* What both make of a word. */
#define KVP_WORK_MIX(x) (((x) ^ ((x) >> 31)) * 0x9e3779b97f4a7c15ull)

#ifdef __cplusplus
}
#endif

#endif
