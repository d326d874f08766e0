/**
 * kvpool-exec on a GPU, by real processes: what its tests share, and the run of all of them.
 *
 *   exec_gpu_jobs.c     appends, copies and index results against the naive reference, over every byte of the slab; order
 *                       between streams of different processes
 *   exec_gpu_workers.c  slabs in the hands of other processes; its death; what must be refused; whom the GPU serves
 *
 * The parent of all tests never touches CUDA. Without a GPU every test is listed as skipped, by name, and the exit status
 * is 77. The seed is printed, and taken from KVPOOL_TEST_SEED.
 */
#include "exec_gpu.h"
#include "seed.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define IMPORT  KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT
#define SKIPPED 77

struct exec_peer peer;
uint64_t seed;

static void setup(void)
{
    seed = test_seed();
    printf("seed %" PRIu64 "\n", seed);
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
}

static void teardown(void)
{
    ck_assert_int_eq(exec_peer_end(&peer), 0);
}

void make_pool(struct exec_pool *pool, const struct exec_shape *shape, bool legacy)
{
    struct exec_shape own = *shape;

    own.legacy = legacy;
    exec_pool_make(pool, 1, &own);
    exec_pool_create(pool, &peer);
}

void *attach(const struct exec_pool *pool)
{
    return pool->slab_fd >= 0 ? gpu_map_fd(pool->slab_fd, pool->driver_bytes) : gpu_map_ipc(pool->ipc);
}

void check_slab(const struct exec_pool *pool, const void *mapped, const char *what)
{
    unsigned char *bytes = malloc(pool->driver_bytes);

    ck_assert_ptr_nonnull(bytes);
    gpu_read(bytes, mapped, pool->driver_bytes);
    for (uint64_t i = 0; i < pool->driver_bytes; i++) {
        unsigned char want = i < pool->slab_bytes ? pool->want[i] : 0;

        if (bytes[i] != want)
            ck_abort_msg("%s: byte %llu of the slab is %u, not %u", what, (unsigned long long)i, bytes[i], want);
    }
    free(bytes);
}

enum kvp_status do_job(const Kvpool__V1__ExecJobRequest *job)
{
    return exec_peer_status(&peer, JOB, &job->base, NULL, 0);
}

enum kvp_status import(struct exec_peer *to, uint32_t buffer, const char *device, int fd, unsigned char *ipc,
                       uint64_t offset, uint64_t bytes)
{
    Kvpool__V1__ExecBufferImportRequest request = KVPOOL__V1__EXEC_BUFFER_IMPORT_REQUEST__INIT;

    request.session_id = SESSION;
    request.buffer = buffer;
    request.device = (char *)device;
    request.offset = offset;
    request.bytes = bytes;
    if (ipc != NULL)
        request.ipc_handle = (ProtobufCBinaryData){64, ipc};
    return exec_peer_status(to, IMPORT, &request.base, &fd, ipc == NULL);
}

pid_t process(void (*body)(void *arg), void *arg)
{
    pid_t pid;

    fflush(NULL);
    pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        body(arg);
        _exit(0);
    }
    return pid;
}

void ends_well(pid_t pid)
{
    int status;

    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the process ended with wait status %#x", status);
}

void make_batch(struct exec_batch *batch, const struct exec_pool *pool, uint64_t job, uint32_t sequences,
                uint32_t nnz_min)
{
    do {
        exec_batch_make(batch, pool, job, SESSION, sequences, &seed);
    } while (batch->nnz < nnz_min);
}

void random_bytes(unsigned char *at, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        at[i] = (unsigned char)exec_random(&seed);
}

struct exec_pool pools[64];
struct exec_batch batches[64];

void make_all(void)
{
    ck_assert_uint_le(LAYOUTS, sizeof(pools) / sizeof(pools[0]));
    for (unsigned i = 0; i < LAYOUTS; i++) {
        struct exec_shape shape = exec_shapes[i % exec_n_shapes];

        shape.legacy = i >= exec_n_shapes;
        exec_pool_make(&pools[i], i + 1, &shape);
        exec_pool_create(&pools[i], &peer);
    }
}

void free_all(void)
{
    for (unsigned i = 0; i < LAYOUTS; i++) {
        exec_batch_free(&batches[i]);
        exec_pool_free(&pools[i]);
    }
}

const char *name_of(unsigned i)
{
    static char name[64];

    snprintf(name, sizeof(name), "%s, by %s", exec_shapes[i % exec_n_shapes].name,
             i < exec_n_shapes ? "fd" : "legacy handle");
    return name;
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

static TCase *tests;

static void run(const char *name, const TTest *test, int n)
{
    (void)name;
    tcase_add_loop_test(tests, test, 0, n);
}

static void skip(const char *name, const TTest *test, int n)
{
    (void)test, (void)n;
    printf("skipped %s: there is no GPU\n", name);
}

int main(void)
{
    Suite *suite = suite_create("kvpool-exec on a GPU");
    bool present = gpu_present();
    SRunner *runner = srunner_create(suite);
    int failed;

    tests = tcase_create("gpu");
    suite_add_tcase(suite, tests);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    exec_gpu_jobs(present ? run : skip);
    exec_gpu_workers(present ? run : skip);
    srunner_run_all(runner, CK_VERBOSE);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    if (failed > 0)
        return 1;
    return present ? 0 : SKIPPED;
}
