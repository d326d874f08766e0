/**
 * kvpool-exec on a GPU, by real processes: slabs made by it and mapped by others, appends, copies and index results
 * against the naive reference over every byte of the slab, order between streams of different processes, its death.
 *
 * The parent of all tests never touches CUDA, and each test forks whom it needs before it does. Without a GPU every test
 * is listed as skipped, by name, and the exit status is 77. The seed is printed, and taken from KVPOOL_TEST_SEED.
 */
#include "exec_peer.h"
#include "gpu_memory.h"

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define JOB     KVPOOL__V1__METHOD__METHOD_EXEC_JOB
#define IMPORT  KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT
#define CREATE  KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE
#define SESSION 77
#define SKIPPED 77

static struct exec_peer peer;
static uint64_t seed;

static void setup(void)
{
    const char *given = getenv("KVPOOL_TEST_SEED");

    seed = given != NULL ? strtoull(given, NULL, 0) : (uint64_t)getpid();
    printf("seed %llu\n", (unsigned long long)seed);
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
}

static void teardown(void)
{
    ck_assert_int_eq(exec_peer_end(&peer), 0);
}

static void make_pool(struct exec_pool *pool, const struct exec_shape *shape, bool legacy)
{
    struct exec_shape own = *shape;

    own.legacy = legacy;
    exec_pool_make(pool, 1, &own);
    exec_pool_create(pool, &peer);
}

static void *attach(const struct exec_pool *pool)
{
    return pool->slab_fd >= 0 ? gpu_map_fd(pool->slab_fd, pool->driver_bytes) : gpu_map_ipc(pool->ipc);
}

/* Every byte of the slab, the page behind its planes and what the driver rounded up included. */
static void check_slab(const struct exec_pool *pool, const void *mapped, const char *what)
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

static enum kvp_status do_job(const Kvpool__V1__ExecJobRequest *job)
{
    return exec_peer_status(&peer, JOB, &job->base, NULL, 0);
}

static enum kvp_status import(struct exec_peer *to, uint32_t buffer, const char *device, int fd, unsigned char *ipc,
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

/* Run it in a process of its own. */
static pid_t process(void (*body)(void *arg), void *arg)
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

static void ends_well(pid_t pid)
{
    int status;

    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the process ended with wait status %#x", status);
}

static void make_batch(struct exec_batch *batch, const struct exec_pool *pool, uint64_t job, uint32_t sequences,
                       uint32_t nnz_min)
{
    do {
        exec_batch_make(batch, pool, job, SESSION, sequences, &seed);
    } while (batch->nnz < nnz_min);
}

static void random_bytes(unsigned char *at, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        at[i] = (unsigned char)exec_random(&seed);
}

/* ---- append on request --------------------------------------------------------------------------------------------- */

/* The loop counts shapes, first with fds, then with legacy handles. */
static void make_looped(struct exec_pool *pool, int i)
{
    make_pool(pool, &exec_shapes[(unsigned)i % exec_n_shapes], (unsigned)i >= exec_n_shapes);
}

START_TEST(append_inline_gives_the_bytes_of_the_reference_in_every_layout_by_both_handles)
{
    static struct exec_batch batch;
    struct exec_pool pool;
    void *mapped;

    make_looped(&pool, _i);
    mapped = attach(&pool);
    for (unsigned i = 0; i < 6; i++) {
        make_batch(&batch, &pool, i + 1, 1 + i % 5, 1);
        batch.job.done_timeline = 48;
        batch.job.done_value = i + 1;
        ck_assert_int_eq(do_job(&batch.job), KVP_OK);
        ck_assert_uint_eq(pool.timelines[48].value, i + 1);
        exec_batch_want(&batch, &pool, batch.bytes);
        check_slab(&pool, mapped, "inline");
        exec_batch_free(&batch);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(append_takes_strided_slices_of_buffers_of_every_kind)
{
    static struct exec_batch batch;
    struct exec_pool pool;
    char device[64];
    void *mapped;

    make_looped(&pool, _i);
    mapped = attach(&pool);
    gpu_first(device);
    for (unsigned kind = 0; kind < 3; kind++) { /* host memory, GPU memory by fd, by legacy handle */
        uint64_t bytes, offset = 4096 * kind + 48;
        unsigned char *source, handle[64];
        void *host, *shared = NULL;
        int fd = -1;

        make_batch(&batch, &pool, kind + 1, 1 + kind, 1);
        bytes = exec_batch_interleave(&batch, &pool, 24 * kind);
        source = malloc(bytes);
        ck_assert_ptr_nonnull(source);
        random_bytes(source, bytes);
        if (kind == 0) {
            fd = exec_memfd(offset + bytes, &host);
            memcpy((unsigned char *)host + offset, source, bytes);
            munmap(host, offset + bytes);
        } else {
            shared = kind == 1 ? gpu_shared_by_fd(offset + bytes, &fd) : gpu_shared_by_ipc(offset + bytes, handle);
            gpu_write((unsigned char *)shared + offset, source, bytes);
        }
        ck_assert_int_eq(import(&peer, kind + 1, kind == 0 ? "host" : device, fd, kind == 2 ? handle : NULL, offset, bytes),
                         KVP_OK);
        batch.job.inline_.len = 0;
        batch.job.buffer = kind + 1;
        ck_assert_int_eq(do_job(&batch.job), KVP_OK);
        exec_batch_want(&batch, &pool, source);
        check_slab(&pool, mapped, kind == 0 ? "host memory" : kind == 1 ? "fd" : "legacy handle");
        free(source);
        if (fd >= 0)
            close(fd);
        exec_batch_free(&batch);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(append_of_many_pieces_gives_the_bytes_of_the_reference)
{
    struct exec_shape shape = exec_plain;
    static struct exec_batch batch;
    struct exec_pool pool;
    void *mapped;

    shape.pages = 2048; /* 64 MiB of pages; the pieces that go through pinned memory have 8 MiB */
    make_pool(&pool, &shape, false);
    mapped = attach(&pool);
    make_batch(&batch, &pool, 1, 1, 20000);
    ck_assert_uint_gt(batch.n_bytes, 32u << 20);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, mapped, "40 MiB");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(copies_come_before_the_append_and_in_their_order)
{
    uint32_t sources[] = {1, 2, 3, 9}, destinations[] = {2, 3, 4, 1}, tokens[] = {16, 7, 5, 16};
    static struct exec_batch batch;
    struct exec_pool pool;
    void *mapped;

    make_pool(&pool, &exec_plain, false);
    mapped = attach(&pool);
    random_bytes(pool.want, pool.totals.slab_bytes);
    gpu_write(mapped, pool.want, pool.slab_bytes);
    make_batch(&batch, &pool, 1, 3, 1);
    batch.job.n_copy_sources = batch.job.n_copy_destinations = batch.job.n_copy_tokens = 4;
    batch.job.copy_sources = sources;
    batch.job.copy_destinations = destinations;
    batch.job.copy_tokens = tokens;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    for (unsigned i = 0; i < 4; i++)
        exec_pool_want_copy(&pool, sources[i], destinations[i], tokens[i]);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, mapped, "copies, then the append");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- index on request ---------------------------------------------------------------------------------------------- */

enum { INDEX_BYTES = 1 << 20 };

/* All seven outputs in a target filled with 0xee, by an executor. */
static void index_by(struct exec_peer *by, const struct exec_batch *batch, uint64_t *offsets)
{
    Kvpool__V1__ExecJobRequest job = batch->job;

    job.kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
    job.inline_.len = 0;
    job.buffer = 5;
    job.n_output_offsets = 7;
    job.output_offsets = offsets;
    job.wanted = 127;
    ck_assert_int_eq(exec_peer_status(by, JOB, &job.base, NULL, 0), KVP_OK);
}

START_TEST(index_results_by_the_gpus_kernel_equal_the_hosts)
{
    uint64_t offsets[7] = {65536, 131072, 196608, 327680, 393216, 458752, 524288};
    static unsigned char on_gpu[INDEX_BYTES], empty[INDEX_BYTES];
    static struct exec_batch batch;
    struct exec_peer host;
    struct exec_pool pool, twin;
    void *by_host, *by_cuda, *shared;
    int host_fd = exec_memfd(INDEX_BYTES, &by_host), cuda_fd = exec_memfd(INDEX_BYTES, &by_cuda), fd;
    char device[64];

    memset(empty, 0xee, sizeof(empty));
    exec_peer_start(&host, "host");
    ck_assert_int_eq(exec_peer_hello(&host, "host"), KVP_OK);
    make_pool(&pool, &exec_plain, false);
    exec_pool_make(&twin, 1, &exec_plain);
    exec_pool_create(&twin, &host);
    shared = gpu_shared_by_fd(INDEX_BYTES, &fd);
    gpu_first(device);
    ck_assert_int_eq(import(&peer, 5, "host", cuda_fd, NULL, 0, INDEX_BYTES), KVP_OK);
    ck_assert_int_eq(import(&host, 5, "host", host_fd, NULL, 0, INDEX_BYTES), KVP_OK);
    for (uint64_t i = 0; i < 40; i++) {
        exec_batch_make(&batch, &pool, 2 * i + 1, SESSION, 1 + (uint32_t)(i % 16), &seed);
        memset(by_host, 0xee, INDEX_BYTES);
        memset(by_cuda, 0xee, INDEX_BYTES);
        gpu_write(shared, empty, INDEX_BYTES);
        index_by(&host, &batch, offsets);
        index_by(&peer, &batch, offsets);
        ck_assert_mem_eq(by_host, by_cuda, INDEX_BYTES);
        ck_assert_int_eq(import(&peer, 5, device, fd, NULL, 0, INDEX_BYTES), KVP_OK); /* takes the place of the other */
        batch.job.job++;
        index_by(&peer, &batch, offsets);
        gpu_read(on_gpu, shared, INDEX_BYTES);
        ck_assert_mem_eq(by_host, on_gpu, INDEX_BYTES);
        ck_assert_int_eq(import(&peer, 5, "host", cuda_fd, NULL, 0, INDEX_BYTES), KVP_OK);
    }
    ck_assert_int_eq(exec_peer_end(&host), 0);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
    exec_pool_free(&twin);
}
END_TEST

/* ---- workers ------------------------------------------------------------------------------------------------------- */

struct work {
    struct exec_pool *pool;
    struct exec_batch *batch;
    int fd; /* of a socket pair, or -1 */
};

/* As a worker appends: its own kernel, on its own stream, over the mapped slab. */
static void append_in_place(const struct exec_pool *pool, const struct exec_batch *batch, unsigned char *slab)
{
    uint32_t page_tokens = pool->layout.page_tokens;
    struct kvp_plane_view planes[EXEC_PLANES_MAX];
    struct kvp_token_view sources[EXEC_PLANES_MAX];
    int64_t *slots = gpu_pinned(sizeof(*slots) * batch->nnz);
    unsigned char *rows = gpu_pinned(batch->n_bytes);
    struct kvp_append_args args = {.planes = planes,
                                   .sources = sources,
                                   .n_planes = pool->layout.n_planes,
                                   .pages = pool->layout.pages,
                                   .page_tokens = page_tokens,
                                   .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = batch->nnz}};
    uint32_t j = 0;

    for (uint32_t b = 0; b < batch->batch; b++)
        for (uint32_t t = 0; t < batch->tokens[b]; t++) {
            uint32_t position = batch->start[b] + t;

            slots[j++] = (int64_t)batch->indices[(uint32_t)batch->indptr[b] + position / page_tokens] * page_tokens +
                         position % page_tokens;
        }
    memcpy(rows, batch->bytes, batch->n_bytes);
    args.at.slot_mapping = slots;
    for (uint32_t p = 0; p < args.n_planes; p++) {
        planes[p] = kvp_plane_view_of(&pool->layout, pool->places, p, slab);
        sources[p] = (struct kvp_token_view){rows + batch->offsets[p], (int64_t)batch->token_strides[p],
                                             (int64_t)batch->head_strides[p]};
    }
    ck_assert_int_eq(kvp_cuda_append(&args, gpu_stream()), KVP_OK);
    gpu_sync();
}

static void worker_writes(void *arg)
{
    struct work *w = arg;
    unsigned char *slab = attach(w->pool);

    gpu_fill(slab, 0xa5, w->pool->slab_bytes); /* so that a byte stored where it does not belong shows anywhere */
    append_in_place(w->pool, w->batch, slab);
    ck_assert_int_eq(send(w->fd, "w", 1, 0), 1);
    pause(); /* killed here: the memory must not care */
}

static void worker_reads(void *arg)
{
    struct work *w = arg;
    char byte;
    void *slab = attach(w->pool);

    ck_assert_int_eq(recv(w->fd, &byte, 1, 0), 1);
    check_slab(w->pool, slab, "as another worker reads it");
}

START_TEST(what_one_worker_writes_by_its_own_kernel_another_reads_in_place_guards_included)
{
    static struct exec_batch batch;
    struct exec_pool pool;
    pid_t writer, reader;
    int pair[2];

    make_looped(&pool, _i);
    make_batch(&batch, &pool, 1, 4, 1);
    memset(pool.want, 0xa5, pool.slab_bytes);
    exec_batch_want(&batch, &pool, batch.bytes);
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    reader = process(worker_reads, &(struct work){&pool, &batch, pair[1]});
    writer = process(worker_writes, &(struct work){&pool, &batch, pair[0]});
    ends_well(reader);
    kill(writer, SIGKILL);
    waitpid(writer, NULL, 0);
    ck_assert_int_eq(send(pair[0], "w", 1, 0), 1); /* and a newcomer, after the writer's death */
    ends_well(process(worker_reads, &(struct work){&pool, &batch, pair[1]}));
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

static void reads_by_64_bytes(void *arg)
{
    struct work *w = arg;

    close(w->pool->timelines_fd);
    close(w->pool->table_fd); /* nothing but the bytes of the message is left to it */
    ck_assert_int_lt(w->pool->slab_fd, 0);
    check_slab(w->pool, gpu_map_ipc(w->pool->ipc), "by the legacy handle");
}

START_TEST(a_process_that_has_only_the_64_bytes_attaches_and_reads)
{
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, true);
    make_batch(&batch, &pool, 1, 3, 1);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    ends_well(process(reads_by_64_bytes, &(struct work){&pool, &batch, -1}));
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- order --------------------------------------------------------------------------------------------------------- */

#define TIMELINES_BYTES (sizeof(struct kvp_timeline) * KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX)

/*
 * A stream of this process writes the source, then its timeline; the executor's append waits for that, and a stream of
 * this process waits for the executor's: no CPU stands between.
 */
START_TEST(streams_of_two_processes_order_an_append_by_timelines)
{
    static struct exec_batch batch;
    struct exec_pool pool;
    unsigned char *shared, *pinned, *back, *slab;
    void *writes, *reads;
    uint64_t timelines, tag;
    struct exec_answer answer;
    char device[64];
    int fd;

    make_pool(&pool, &exec_plain, false);
    slab = attach(&pool);
    gpu_first(device);
    timelines = gpu_register(pool.timelines, TIMELINES_BYTES);
    writes = gpu_stream();
    reads = gpu_stream();
    back = gpu_pinned(pool.slab_bytes);
    for (uint64_t i = 1; i <= 100; i++) {
        make_batch(&batch, &pool, i, 2, 1);
        shared = gpu_shared_by_fd(batch.n_bytes, &fd);
        pinned = gpu_pinned(batch.n_bytes);
        memcpy(pinned, batch.bytes, batch.n_bytes);
        ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, batch.n_bytes), KVP_OK);
        batch.job.inline_.len = 0;
        batch.job.buffer = 1;
        batch.job.n_plane_offsets = pool.layout.n_planes;
        batch.job.plane_offsets = batch.offsets;
        batch.job.wait_timeline = 33;
        batch.job.done_timeline = 32;
        batch.job.wait_value = batch.job.done_value = i;
        tag = exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0);
        ck_assert_uint_eq(pool.timelines[32].value, i - 1);
        gpu_stream_wait(reads, timelines + 32 * sizeof(struct kvp_timeline), i);
        gpu_write_behind(shared, pinned, batch.n_bytes, writes);
        gpu_stream_write(writes, timelines + 33 * sizeof(struct kvp_timeline), i);
        gpu_read_behind(back, slab, pool.slab_bytes, reads);
        exec_batch_want(&batch, &pool, batch.bytes);
        ck_assert_mem_eq(back, pool.want, pool.slab_bytes);
        answer = exec_peer_next(&peer);
        ck_assert_uint_eq(answer.tag, tag);
        ck_assert_int_eq(answer.status, KVP_OK);
        exec_answer_free(&answer);
        close(fd);
        exec_batch_free(&batch);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(sessions_that_wait_hold_up_no_other)
{
    enum { WAITERS = 64 };
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    static struct exec_batch batch;
    struct exec_answer answer;
    struct exec_pool pool;
    void *mapped;

    make_pool(&pool, &exec_plain, false);
    mapped = attach(&pool);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.pool_id = pool.id;
    for (unsigned i = 0; i < WAITERS; i++) {
        job.job = i + 1;
        job.session_id = 1000 + i;
        job.wait_timeline = i;
        job.wait_value = 1;
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    }
    make_batch(&batch, &pool, 500, 2, 1);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, mapped, "beside 64 that wait");
    for (unsigned i = WAITERS; i-- > 0;) {
        __atomic_store_n(&pool.timelines[i].value, 1, __ATOMIC_RELEASE);
        answer = exec_peer_next(&peer);
        ck_assert_int_eq(answer.status, KVP_OK);
        ck_assert_uint_eq(((const Kvpool__V1__ExecJobReply *)answer.body)->job, i + 1);
        exec_answer_free(&answer);
    }
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- its death ----------------------------------------------------------------------------------------------------- */

START_TEST(killed_in_mid_append_its_slab_lives_and_the_next_one_does_it_again)
{
    struct exec_shape shape = exec_plain;
    static struct exec_batch batch;
    struct exec_pool pool;

    shape.pages = 2048;
    make_pool(&pool, &shape, false);
    make_batch(&batch, &pool, 1, 1, 20000);
    batch.job.done_timeline = 16;
    batch.job.done_value = 7;
    exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0);
    /* at each run at another moment of it: while it unpacks, prepares, copies, or has just ended */
    for (uint64_t spins = exec_random(&seed) % 20000; spins > 0 && exec_peer_quiet(&peer); spins--)
        ;
    exec_peer_kill(&peer);
    ck_assert(pool.timelines[16].value == 0 || pool.timelines[16].value == 7);
    pool.timelines[16].value = 0;
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_OK);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    ck_assert_uint_eq(pool.timelines[16].value, 7);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, attach(&pool), "done again by the next one");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_slab_outlives_every_process_that_has_cuda_open)
{
    static struct exec_batch first, second;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, false);
    make_batch(&first, &pool, 1, 2, 1);
    ck_assert_int_eq(do_job(&first.job), KVP_OK);
    exec_batch_want(&first, &pool, first.bytes);
    ck_assert_int_eq(exec_peer_end(&peer), 0); /* now the fd alone holds it, in a process that never called CUDA */
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_OK);
    make_batch(&second, &pool, 2, 2, 1);
    ck_assert_int_eq(do_job(&second.job), KVP_OK);
    exec_batch_want(&second, &pool, second.bytes);
    check_slab(&pool, attach(&pool), "after its maker's end");
    exec_batch_free(&first);
    exec_batch_free(&second);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_slab_for_legacy_handles_dies_with_its_executor_and_that_is_said)
{
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, true);
    exec_peer_kill(&peer);
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, false), KVP_ELOST);
    exec_pool_free(&pool);
}
END_TEST

/* ---- what must be refused, and is survived ------------------------------------------------------------------------- */

START_TEST(what_is_no_memory_of_this_gpu_is_refused_and_the_executor_lives)
{
    Kvpool__V1__ExecSlabCreateRequest create = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    static struct exec_batch batch;
    unsigned char garbage[64], handle[64];
    struct exec_pool pool, none;
    char device[64];
    void *at;
    int memfd = exec_memfd(4 << 20, &at), fd;

    make_pool(&pool, &exec_plain, false);
    gpu_first(device);
    random_bytes(garbage, sizeof(garbage));
    gpu_shared_by_fd(4 << 20, &fd);
    gpu_shared_by_ipc(4 << 20, handle);
    ck_assert_int_eq(import(&peer, 1, device, memfd, NULL, 0, 1 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, peer.socket, NULL, 0, 1 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, -1, garbage, 0, 1 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, 64 << 20), KVP_EINVAL); /* more than there is */
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 64 << 20, 1), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, 1 << 20), KVP_EINVAL); /* less: the driver maps all or nothing */
    ck_assert_int_eq(import(&peer, 1, device, -1, handle, 0, 64 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, -1, handle, UINT64_MAX - 3, 8), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, "GPU-00000000-0000-0000-0000-000000000000", fd, NULL, 0, 4096), KVP_ENODEV);
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, 4 << 20), KVP_OK);
    ck_assert_int_eq(import(&peer, 2, device, fd, NULL, 1 << 20, 3 << 20), KVP_OK); /* the same again, and its end */
    ck_assert_int_eq(import(&peer, 3, device, -1, handle, 1 << 20, 3 << 20), KVP_OK);
    ck_assert_int_eq(import(&peer, 4, device, -1, handle, 0, 1 << 20), KVP_OK);

    exec_pool_make(&none, 9, &exec_plain);
    create.pool_id = 9;
    create.spec = &none.spec;
    create.bytes = 1ull << 45; /* more than any GPU has */
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_ENOMEM);
    make_batch(&batch, &pool, 1, 2, 1); /* and it works as before */
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, attach(&pool), "after all that");
    munmap(at, 4 << 20);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
    exec_pool_free(&none);
}
END_TEST

START_TEST(end_of_file_ends_it_with_jobs_open)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, false);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.pool_id = pool.id;
    job.wait_value = 1; /* for ever */
    for (job.job = 1; job.job <= 8; job.job++) {
        job.session_id = job.job / 2;
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    }
    exec_pool_free(&pool);
} /* teardown closes the socket, and it must end with 0 */
END_TEST

/* ---- whom the GPU serves ------------------------------------------------------------------------------------------- */

static bool listed(pid_t pid)
{
    Kvpool__V1__ExecProcessesRequest request = KVPOOL__V1__EXEC_PROCESSES_REQUEST__INIT;
    struct exec_answer answer =
        exec_peer_call(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, &request.base, NULL, 0);
    const Kvpool__V1__ExecProcessesReply *reply = (const void *)answer.body;
    bool found = false;

    ck_assert_int_eq(answer.status, KVP_OK);
    ck_assert_msg(reply->known, "NVML does not answer");
    for (size_t i = 0; i < reply->n_pids; i++)
        found |= reply->pids[i] == (uint32_t)pid;
    exec_answer_free(&answer);
    return found;
}

static void has_a_context(void *arg)
{
    gpu_sync();
    ck_assert_int_eq(send(*(int *)arg, "c", 1, 0), 1);
    pause();
}

START_TEST(a_process_with_a_context_is_listed_until_it_is_gone)
{
    int pair[2];
    char byte;
    pid_t pid;

    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    pid = process(has_a_context, &pair[1]);
    ck_assert(!listed(1));
    ck_assert_int_eq(recv(pair[0], &byte, 1, 0), 1);
    ck_assert(listed(pid));
    ck_assert(listed(peer.pid));
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    while (listed(pid)) /* the test's time limit ends it otherwise */
        ;
}
END_TEST

#define TESTS(X)                                                                              \
    X(append_inline_gives_the_bytes_of_the_reference_in_every_layout_by_both_handles, LAYOUTS) \
    X(append_takes_strided_slices_of_buffers_of_every_kind, LAYOUTS)                          \
    X(append_of_many_pieces_gives_the_bytes_of_the_reference, 1)                              \
    X(copies_come_before_the_append_and_in_their_order, 1)                                    \
    X(index_results_by_the_gpus_kernel_equal_the_hosts, 1)                                    \
    X(what_one_worker_writes_by_its_own_kernel_another_reads_in_place_guards_included, LAYOUTS) \
    X(a_process_that_has_only_the_64_bytes_attaches_and_reads, 1)                             \
    X(streams_of_two_processes_order_an_append_by_timelines, 1)                               \
    X(sessions_that_wait_hold_up_no_other, 1)                                                 \
    X(killed_in_mid_append_its_slab_lives_and_the_next_one_does_it_again, 5)                  \
    X(a_slab_outlives_every_process_that_has_cuda_open, 1)                                    \
    X(a_slab_for_legacy_handles_dies_with_its_executor_and_that_is_said, 1)                   \
    X(what_is_no_memory_of_this_gpu_is_refused_and_the_executor_lives, 1)                     \
    X(end_of_file_ends_it_with_jobs_open, 1)                                                  \
    X(a_process_with_a_context_is_listed_until_it_is_gone, 1)

int main(void)
{
    const int LAYOUTS = 2 * (int)exec_n_shapes; /* by fd, by legacy handle */
    Suite *suite = suite_create("kvpool-exec on a GPU");
    TCase *tests = tcase_create("gpu");
    bool present = gpu_present();
    SRunner *runner = srunner_create(suite);
    int failed;

    suite_add_tcase(suite, tests);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
#define ADD_TEST(name, n)                            \
    if (present)                                     \
        tcase_add_loop_test(tests, name, 0, n);      \
    else                                             \
        printf("skipped %s: there is no GPU\n", #name);
    TESTS(ADD_TEST)
#undef ADD_TEST
    (void)LAYOUTS;
    srunner_run_all(runner, CK_VERBOSE);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    if (failed > 0)
        return 1;
    return present ? 0 : SKIPPED;
}
