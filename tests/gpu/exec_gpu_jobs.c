/**
 * kvpool-exec's jobs on a GPU: appends from everywhere, copies, index results, and their order.
 */
#include "exec_gpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- append on request ------------------------------------------------------------------------------------------- */

START_TEST(append_inline_gives_the_bytes_of_the_reference_in_every_layout_by_both_handles)
{
    uint64_t job = 0;

    make_all();
    for (unsigned i = 0; i < LAYOUTS; i++) {
        void *mapped = attach(&pools[i]);

        for (unsigned k = 0; k < 6; k++) {
            make_batch(&batches[i], &pools[i], ++job, 1 + k % 5, 1);
            batches[i].job.done_timeline = 48;
            batches[i].job.done_value = k + 1;
            ck_assert_int_eq(do_job(&batches[i].job), KVP_OK);
            ck_assert_uint_eq(pools[i].timelines[48].value, k + 1);
            exec_batch_want(&batches[i], &pools[i], batches[i].bytes);
            check_slab(&pools[i], mapped, name_of(i));
        }
    }
    free_all();
}
END_TEST

START_TEST(digests_by_the_gpus_kernel_equal_the_hosts_in_every_layout_by_both_handles)
{
    uint64_t job = 0;

    make_all();
    for (unsigned i = 0; i < LAYOUTS; i++) {
        exec_pool_check_digests(&pools[i], &peer, "as it was made");
        make_batch(&batches[i], &pools[i], ++job, 4, 1);
        ck_assert_int_eq(do_job(&batches[i].job), KVP_OK);
        exec_batch_want(&batches[i], &pools[i], batches[i].bytes);
        exec_pool_check_digests(&pools[i], &peer, name_of(i));
    }
    free_all();
}
END_TEST

enum buffer_kind { BY_MEMFD, BY_FD, BY_HANDLE, BUFFER_KINDS };

/* One append from a buffer: rows with gaps, at an odd place in what is shared. */
static void append_from(unsigned i, enum buffer_kind kind, uint64_t job, char *device, void *mapped)
{
    uint64_t bytes, offset = 4096 * kind + 48;
    struct exec_batch *batch = &batches[i];
    unsigned char *source, handle[64];
    void *host, *shared;
    int fd = -1;

    make_batch(batch, &pools[i], job, 1 + kind, 1);
    bytes = exec_batch_interleave(batch, &pools[i], 24 * kind);
    source = malloc(bytes);
    ck_assert_ptr_nonnull(source);
    random_bytes(source, bytes);
    if (kind == BY_MEMFD) {
        fd = exec_memfd(offset + bytes, &host);
        memcpy((unsigned char *)host + offset, source, bytes);
        munmap(host, offset + bytes);
    } else {
        shared = kind == BY_FD ? gpu_shared_by_fd(offset + bytes, &fd) : gpu_shared_by_ipc(offset + bytes, handle);
        gpu_write((unsigned char *)shared + offset, source, bytes);
    }
    ck_assert_int_eq(import(&peer, kind + 1, kind == BY_MEMFD ? "host" : device, fd, kind == BY_HANDLE ? handle : NULL,
                            offset, bytes),
                     KVP_OK);
    batch->job.inline_.len = 0;
    batch->job.buffer = kind + 1;
    ck_assert_int_eq(do_job(&batch->job), KVP_OK);
    exec_batch_want(batch, &pools[i], source);
    check_slab(&pools[i], mapped, name_of(i));
    free(source);
    if (fd >= 0)
        close(fd);
}

START_TEST(append_takes_strided_slices_of_buffers_of_every_kind)
{
    uint64_t job = 0;
    char device[64];

    make_all();
    gpu_first(device);
    for (unsigned i = 0; i < LAYOUTS; i++) {
        void *mapped = attach(&pools[i]);

        for (enum buffer_kind kind = BY_MEMFD; kind < BUFFER_KINDS; kind++)
            append_from(i, kind, ++job, device, mapped);
    }
    free_all();
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

/* ---- zeros ------------------------------------------------------------------------------------------------------- */

START_TEST(pages_are_zeroed_wholly_and_alone_ahead_of_copies_and_the_append)
{
    static struct exec_batch batch;
    uint32_t sources[] = {1}, destinations[] = {2}, tokens[] = {3}, zeroed[] = {0, 5, 2, 5, 9};
    struct exec_pool pool;
    void *mapped;

    make_pool(&pool, &exec_plain, false);
    mapped = attach(&pool);
    random_bytes(pool.want, pool.totals.slab_bytes);
    gpu_write(mapped, pool.want, pool.slab_bytes);
    make_batch(&batch, &pool, 1, 3, 1);
    batch.job.n_zero_pages = 5;
    batch.job.zero_pages = zeroed;
    batch.job.n_copy_sources = batch.job.n_copy_destinations = batch.job.n_copy_tokens = 1;
    batch.job.copy_sources = sources;
    batch.job.copy_destinations = destinations;
    batch.job.copy_tokens = tokens;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    for (unsigned i = 0; i < 5; i++)
        exec_pool_want_zero(&pool, zeroed[i]);
    exec_pool_want_copy(&pool, 1, 2, 3);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, mapped, "zeros, copies, then the append");
    batch.job.job = 2;
    batch.job.kind = KVPOOL__V1__JOB_KIND__JOB_ZERO;
    batch.job.n_copy_sources = batch.job.n_copy_destinations = batch.job.n_copy_tokens = 0;
    batch.job.n_zero_pages = 4;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    for (unsigned i = 0; i < 4; i++)
        exec_pool_want_zero(&pool, zeroed[i]);
    check_slab(&pool, mapped, "zeros alone");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- index on request -------------------------------------------------------------------------------------------- */

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

/* ---- order ------------------------------------------------------------------------------------------------------- */

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

#define ADD(name, n) add(#name, name, n)

void exec_gpu_jobs(exec_gpu_add *add)
{
    ADD(append_inline_gives_the_bytes_of_the_reference_in_every_layout_by_both_handles, 1);
    ADD(append_takes_strided_slices_of_buffers_of_every_kind, 1);
    ADD(digests_by_the_gpus_kernel_equal_the_hosts_in_every_layout_by_both_handles, 1);
    ADD(append_of_many_pieces_gives_the_bytes_of_the_reference, 1);
    ADD(copies_come_before_the_append_and_in_their_order, 1);
    ADD(pages_are_zeroed_wholly_and_alone_ahead_of_copies_and_the_append, 1);
    ADD(index_results_by_the_gpus_kernel_equal_the_hosts, 1);
    ADD(streams_of_two_processes_order_an_append_by_timelines, 1);
    ADD(sessions_that_wait_hold_up_no_other, 1);
}
