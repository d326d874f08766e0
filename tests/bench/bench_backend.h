/**
 * Where a kernel bench runs: memory, and the time of one launch, on a GPU or on the host.
 *
 * bench_time_us calls a step for each of n launches and gives the median time of one. On CUDA the n launches are
 * captured once into a graph, whose replays are timed by events; on the host they are called and timed by the clock. A
 * step gets its number, so that it can rotate through buffers larger than the caches. Everything that fails ends the
 * program with a message: a bench has no use for half a result.
 */
#ifndef KVP_BENCH_BACKEND_H
#define KVP_BENCH_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvp_kernels.h"

struct bench {
    bool cuda;
    int threads;             /* of the host backend */
    char device[128];        /* its name */
    size_t cache_bytes;      /* the largest cache: buffers rotate through four times as much */
    double ceiling_gb_per_s; /* a large copy, bytes read and written */
    unsigned replays;        /* timed repeats */
};

/* One operation on the bench's backend. */
#ifdef KVP_BENCH_CUDA
#define BENCH_RUN(bench, operation, args, stream)                                                                      \
    ((bench)->cuda ? kvp_cuda_##operation(args, stream) : kvp_host_##operation(args, (bench)->threads))
#else
#define BENCH_RUN(bench, operation, args, stream) ((void)(stream), kvp_host_##operation(args, (bench)->threads))
#endif

/* a launch: step(context, number, stream) */
typedef enum kvp_status (*bench_step)(void *context, unsigned number, void *stream);

/* Choose the backend: "cuda", "host", or "auto"; false where there is no GPU for "cuda". Measures the ceiling. */
bool bench_open(struct bench *bench, const char *backend, int threads);

/* On the host, measure the ceiling again: on a shared machine it is another one a few seconds later. */
void bench_renew_ceiling(struct bench *bench);

/* Memory filled with random bytes; on CUDA device memory. */
void *bench_alloc(struct bench *bench, size_t bytes);
void bench_free(struct bench *bench, void *memory);

/* The same filled with numbers of a dtype (F16 and BF16: 2^-5 to 2^3, either sign; F32: positive, so that they serve as
 * scales too): a division takes its time by its operands. */
void *bench_alloc_numbers(struct bench *bench, size_t bytes, uint32_t dtype);

/* Memory with these bytes in it. */
void *bench_upload(struct bench *bench, const void *from, size_t bytes);

/* Host memory that the device reads in place through a read-only registration (CUDA), or a copy (host). */
void *bench_upload_registered(struct bench *bench, const void *from, size_t bytes, void **ret_handle);
void bench_free_registered(struct bench *bench, void *handle, size_t bytes);

/* The time of one device-to-device copy of so many bytes, in a graph like the launches; 0 on the host. */
double bench_copy_us(struct bench *bench, size_t bytes);

double bench_time_us(struct bench *bench, bench_step step, void *context, unsigned launches);

#endif
