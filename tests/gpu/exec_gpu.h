/**
 * The parts of exec_gpu: what its tests share, and the two files of them.
 *
 * Every test has an executor on the GPU, started for it, and is a process of its own that has not touched CUDA: it forks
 * whom it needs before it does. Whatever must not fail here ends the test by ck_assert.
 */
#ifndef EXEC_GPU_H
#define EXEC_GPU_H

#include "exec_peer.h"
#include "gpu_memory.h"

#include <check.h>

#define JOB     KVPOOL__V1__METHOD__METHOD_EXEC_JOB
#define SESSION 77

extern struct exec_peer peer; /* the executor */
extern uint64_t seed;

/* A pool of each layout, by fd, then by legacy handle: all at one executor, since each process that opens CUDA costs. */
#define LAYOUTS (2 * exec_n_shapes)
extern struct exec_pool pools[64];
extern struct exec_batch batches[64];
void make_all(void);
void free_all(void);
const char *name_of(unsigned i);

void make_pool(struct exec_pool *pool, const struct exec_shape *shape, bool legacy);
/** Map a slab here, as a worker does. */
void *attach(const struct exec_pool *pool);
/** Every byte of it is as it must be: the page behind its planes, and what the driver rounded up, included. */
void check_slab(const struct exec_pool *pool, const void *mapped, const char *what);
void make_batch(struct exec_batch *batch, const struct exec_pool *pool, uint64_t job, uint32_t sequences,
                uint32_t nnz_min);
enum kvp_status do_job(const Kvpool__V1__ExecJobRequest *job);
/** Give an executor a buffer, by fd or (ipc not NULL) by legacy handle. */
enum kvp_status import(struct exec_peer *to, uint32_t buffer, const char *device, int fd, unsigned char *ipc,
                       uint64_t offset, uint64_t bytes);
void random_bytes(unsigned char *at, uint64_t n);

/** Run it in a process of its own. */
pid_t process(void (*body)(void *arg), void *arg);
void ends_well(pid_t pid);

/* The tests: name and how often, for `add` to run or to skip. */
typedef void exec_gpu_add(const char *name, const TTest *test, int n);
void exec_gpu_jobs(exec_gpu_add *add);    /* exec_gpu_jobs.c */
void exec_gpu_workers(exec_gpu_add *add); /* exec_gpu_workers.c */

#endif
