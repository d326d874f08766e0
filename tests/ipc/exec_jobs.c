/**
 * kvpool-exec's jobs on the host backend, against a naive reference over every byte of the slab: append inline and from
 * buffers, copies, index results, and the order between sessions.
 */
#include "exec_peer.h"
#include "seed.h"

#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define JOB     KVPOOL__V1__METHOD__METHOD_EXEC_JOB
#define SESSION 77

static struct exec_peer peer;
static uint64_t seed;

static void setup(void)
{
    seed = test_seed();
    printf("seed %" PRIu64 "\n", seed);
    exec_peer_start(&peer, "host");
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);
}

static void teardown(void)
{
    ck_assert_int_eq(exec_peer_end(&peer), 0);
}

static void make_pool(struct exec_pool *pool, const struct exec_shape *shape)
{
    exec_pool_make(pool, 1, shape);
    exec_pool_create(pool, &peer);
}

static enum kvp_status do_job(const Kvpool__V1__ExecJobRequest *job)
{
    return exec_peer_status(&peer, JOB, &job->base, NULL, 0);
}

static void import_buffer(int fd, uint32_t buffer, uint64_t offset, uint64_t bytes, enum kvp_status want)
{
    Kvpool__V1__ExecBufferImportRequest import = KVPOOL__V1__EXEC_BUFFER_IMPORT_REQUEST__INIT;

    import.session_id = SESSION;
    import.buffer = buffer;
    import.device = "host";
    import.offset = offset;
    import.bytes = bytes;
    ck_assert_int_eq(exec_peer_status(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT, &import.base, &fd, 1),
                     want);
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

START_TEST(append_inline_gives_the_bytes_of_the_reference_in_every_layout)
{
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_shapes[_i]);
    for (unsigned i = 0; i < 8; i++) {
        exec_batch_make(&batch, &pool, i + 1, SESSION, 1 + i % 5, &seed);
        batch.job.done_timeline = 16 * 3;
        batch.job.done_value = i + 1;
        if (batch.nnz == 0)
            batch.job.inline_.len = 0;
        ck_assert_int_eq(do_job(&batch.job), KVP_OK);
        ck_assert_uint_eq(pool.timelines[16 * 3].value, i + 1);
        exec_batch_want(&batch, &pool, batch.bytes);
        exec_pool_check(&pool, exec_shapes[_i].name);
        exec_batch_free(&batch);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(digests_are_those_of_the_pages_bytes_in_every_layout)
{
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_shapes[_i]);
    exec_pool_check_digests(&pool, &peer, "as it was made");
    for (unsigned i = 0; i < 3; i++) {
        do {
            exec_batch_make(&batch, &pool, i + 1, SESSION, 1 + i, &seed);
        } while (batch.nnz == 0);
        ck_assert_int_eq(do_job(&batch.job), KVP_OK);
        exec_batch_want(&batch, &pool, batch.bytes);
        exec_pool_check_digests(&pool, &peer, exec_shapes[_i].name);
        exec_batch_free(&batch);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(append_takes_strided_slices_of_a_registered_buffer)
{
    static struct exec_batch batch;
    struct exec_pool pool;
    unsigned char *at;
    void *mapped;

    make_pool(&pool, &exec_shapes[_i]);
    for (unsigned i = 0; i < 4; i++) {
        uint64_t bytes, offset = 4096 * i + 48;
        int fd;

        do {
            exec_batch_make(&batch, &pool, i + 1, SESSION, 1 + i, &seed);
        } while (batch.nnz == 0);
        bytes = exec_batch_interleave(&batch, &pool, 24 * i);
        fd = exec_memfd(offset + bytes, &mapped);
        at = mapped;
        for (uint64_t b = 0; b < bytes; b++)
            at[offset + b] = (unsigned char)exec_random(&seed);
        import_buffer(fd, i + 1, offset, bytes, KVP_OK);
        batch.job.inline_.len = 0;
        batch.job.buffer = i + 1;
        ck_assert_int_eq(do_job(&batch.job), KVP_OK);
        exec_batch_want(&batch, &pool, at + offset);
        exec_pool_check(&pool, exec_shapes[_i].name);
        munmap(mapped, offset + bytes);
        close(fd);
        exec_batch_free(&batch);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(append_takes_a_source_with_heads_outside_tokens)
{
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_shapes[_i]);
    do {
        exec_batch_make(&batch, &pool, 1, SESSION, 3, &seed);
    } while (batch.nnz == 0);
    for (uint32_t p = 0; p < pool.layout.n_planes; p++) { /* [heads, nnz, dim], as many bytes as [nnz, heads, dim] */
        batch.token_strides[p] = batch.head_strides[p];
        batch.head_strides[p] *= batch.nnz;
    }
    batch.job.n_plane_offsets = batch.job.n_token_strides = batch.job.n_head_strides = pool.layout.n_planes;
    batch.job.plane_offsets = batch.offsets;
    batch.job.token_strides = batch.token_strides;
    batch.job.head_strides = batch.head_strides;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    exec_pool_check(&pool, exec_shapes[_i].name);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(append_larger_than_a_datagram_travels_in_a_memfd)
{
    static struct exec_batch batch;
    struct exec_pool pool;
    struct exec_shape shape = exec_plain;

    shape.pages = 256;
    make_pool(&pool, &shape);
    do {
        exec_batch_make(&batch, &pool, 1, SESSION, 1, &seed);
    } while (batch.n_bytes < 4 * KVP_DATAGRAM_BYTES_MAX);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    exec_pool_check(&pool, "large");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(copies_come_before_the_append_and_in_their_order)
{
    uint32_t sources[] = {1, 2, 3, 9}, destinations[] = {2, 3, 4, 1}, tokens[] = {16, 7, 5, 16};
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain);
    exec_batch_make(&batch, &pool, 1, SESSION, 1, &seed);
    batch.tokens[0] = 16 * 12; /* pages 0..11 get bytes of their own */
    batch.start[0] = 0;
    batch.indptr[1] = 12;
    for (int32_t i = 0; i < 12; i++)
        batch.indices[i] = i;
    batch.nnz = batch.tokens[0];
    free(batch.bytes);
    batch.n_bytes = 0;
    for (uint32_t p = 0; p < pool.layout.n_planes; p++) {
        batch.offsets[p] = batch.n_bytes;
        batch.n_bytes += batch.nnz * batch.token_strides[p];
    }
    batch.bytes = malloc(batch.n_bytes);
    ck_assert_ptr_nonnull(batch.bytes);
    for (uint64_t i = 0; i < batch.n_bytes; i++)
        batch.bytes[i] = (unsigned char)exec_random(&seed);
    batch.job.n_kv_indices = 12;
    batch.job.inline_.data = batch.bytes;
    batch.job.inline_.len = batch.n_bytes;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);

    /* a chain 1 → 2 → 3 → 4, then 9 → 1; and two tokens behind the seven that were copied to page 3 */
    batch.job.job = 2;
    batch.job.n_copy_sources = batch.job.n_copy_destinations = batch.job.n_copy_tokens = 4;
    batch.job.copy_sources = sources;
    batch.job.copy_destinations = destinations;
    batch.job.copy_tokens = tokens;
    batch.start[0] = 7;
    batch.tokens[0] = batch.nnz = 2;
    batch.indptr[1] = 1;
    batch.indices[0] = 3;
    batch.job.n_kv_indices = 1;
    batch.job.inline_.len = 0;
    for (uint32_t p = 0; p < pool.layout.n_planes; p++) {
        batch.offsets[p] = batch.job.inline_.len;
        batch.job.inline_.len += 2 * batch.token_strides[p];
    }
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    for (unsigned i = 0; i < 4; i++)
        exec_pool_want_copy(&pool, sources[i], destinations[i], tokens[i]);
    exec_batch_want(&batch, &pool, batch.bytes);
    exec_pool_check(&pool, "copies, then the append");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- zeros ------------------------------------------------------------------------------------------------------- */

static void zero_job(Kvpool__V1__ExecJobRequest *job, uint64_t number, size_t n, uint32_t *pages)
{
    kvpool__v1__exec_job_request__init(job);
    job->job = number;
    job->kind = KVPOOL__V1__JOB_KIND__JOB_ZERO;
    job->session_id = SESSION;
    job->pool_id = 1;
    job->n_zero_pages = n;
    job->zero_pages = pages;
    job->done_timeline = 16;
    job->done_value = number;
}

START_TEST(pages_are_zeroed_wholly_and_alone_in_every_layout)
{
    uint32_t zeroed[] = {0, 5, 2, 5, 0}, sources[] = {1}, destinations[] = {2}, tokens[] = {3};
    Kvpool__V1__ExecJobRequest job;
    struct exec_pool pool;

    make_pool(&pool, &exec_shapes[_i]);
    zeroed[4] = pool.layout.pages - 1;
    tokens[0] = pool.layout.page_tokens < 3 ? pool.layout.page_tokens : 3;
    for (uint64_t i = 0; i < pool.slab_bytes; i++)
        pool.slab[i] = pool.want[i] = (unsigned char)exec_random(&seed);
    zero_job(&job, 1, 5, zeroed);
    ck_assert_int_eq(do_job(&job), KVP_OK);
    ck_assert_uint_eq(pool.timelines[16].value, 1);
    for (unsigned i = 0; i < 5; i++)
        exec_pool_want_zero(&pool, zeroed[i]);
    exec_pool_check(&pool, exec_shapes[_i].name);
    /* ahead of copies onto the same page */
    zero_job(&job, 2, 3, zeroed);
    job.n_copy_sources = job.n_copy_destinations = job.n_copy_tokens = 1;
    job.copy_sources = sources;
    job.copy_destinations = destinations;
    job.copy_tokens = tokens;
    ck_assert_int_eq(do_job(&job), KVP_OK);
    exec_pool_want_copy(&pool, 1, 2, tokens[0]);
    exec_pool_check(&pool, exec_shapes[_i].name);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_page_to_zero_that_is_not_the_pools_is_refused_and_nothing_is_zeroed)
{
    Kvpool__V1__ExecJobRequest job;
    struct exec_pool pool;
    uint32_t zeroed[] = {0, 0};

    make_pool(&pool, &exec_plain);
    zeroed[1] = pool.layout.pages;
    pool.slab[0] = pool.want[0] = 9;
    zero_job(&job, 1, 2, zeroed);
    ck_assert_int_eq(do_job(&job), KVP_EINVAL);
    ck_assert_uint_eq(pool.timelines[16].value, 0);
    exec_pool_check(&pool, "a refused job");
    exec_pool_free(&pool);
}
END_TEST

/* ---- index ------------------------------------------------------------------------------------------------------- */

START_TEST(index_results_in_a_buffer_are_those_of_the_definition)
{
    enum { BYTES = 1 << 20 };
    static struct exec_batch batch;
    uint64_t offsets[7];
    struct exec_pool pool;
    unsigned char *at;
    uint32_t j = 0, pages = 0;
    void *mapped;
    int fd = exec_memfd(BYTES, &mapped);

    at = mapped;
    memset(at, 0xee, BYTES);
    make_pool(&pool, &exec_plain);
    import_buffer(fd, 5, 0, BYTES, KVP_OK);
    exec_batch_make(&batch, &pool, 1, SESSION, 7, &seed);
    for (unsigned k = 0; k < 7; k++)
        offsets[k] = 65536 * (k + 1);
    batch.job.kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
    batch.job.inline_.len = 0;
    batch.job.buffer = 5;
    batch.job.n_output_offsets = 7;
    batch.job.output_offsets = offsets;
    batch.job.wanted = 127;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    for (uint32_t b = 0; b < batch.batch; b++) {
        uint32_t after = batch.start[b] + batch.tokens[b], n = (after + 15) / 16;
        const int32_t *row = batch.indices + batch.indptr[b];

        for (uint32_t t = 0; t < batch.tokens[b]; t++, j++) {
            uint32_t position = batch.start[b] + t;

            ck_assert_int_eq(((int32_t *)(at + offsets[0]))[j], (int32_t)b);
            ck_assert_int_eq(((int32_t *)(at + offsets[1]))[j], (int32_t)position);
            ck_assert_int_eq(((int64_t *)(at + offsets[2]))[j], row[position / 16] * 16 + (int)(position % 16));
        }
        ck_assert_int_eq(((int32_t *)(at + offsets[3]))[b], (int32_t)pages);
        for (uint32_t i = 0; i < n; i++)
            ck_assert_int_eq(((int32_t *)(at + offsets[4]))[pages + i], row[i]);
        pages += n;
        ck_assert_int_eq(((int32_t *)(at + offsets[3]))[b + 1], (int32_t)pages);
        ck_assert_int_eq(((int32_t *)(at + offsets[5]))[b], (int32_t)(n > 0 ? after - (n - 1) * 16 : 0));
        ck_assert_int_eq(((int32_t *)(at + offsets[6]))[b], (int32_t)after);
    }
    ck_assert_uint_eq(at[offsets[0] + 4 * j], 0xee); /* nothing behind the last */
    ck_assert_uint_eq(at[offsets[4] + 4 * pages], 0xee);
    ck_assert_uint_eq(at[offsets[6] + 4 * batch.batch], 0xee);
    ck_assert_uint_eq(at[65535], 0xee);
    munmap(mapped, BYTES);
    close(fd);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(an_output_that_is_not_wanted_is_not_written)
{
    static struct exec_batch batch;
    uint64_t offsets[7] = {0, 1024, 2048, 3072, 0, 0, 0};
    unsigned char untouched[1024];
    struct exec_pool pool;
    void *at;
    int fd = exec_memfd(8192, &at);

    memset(at, 0xee, 8192);
    memset(untouched, 0xee, sizeof(untouched));
    make_pool(&pool, &exec_plain);
    import_buffer(fd, 1, 0, 8192, KVP_OK);
    exec_batch_make(&batch, &pool, 1, SESSION, 1, &seed);
    batch.start[0] = 0;
    batch.tokens[0] = 5;
    batch.job.kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
    batch.job.inline_.len = 0;
    batch.job.buffer = 1;
    batch.job.n_output_offsets = 7;
    batch.job.output_offsets = offsets;
    batch.job.wanted = 2; /* positions alone */
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    ck_assert_mem_eq(at, untouched, 1024);
    for (int32_t i = 0; i < 5; i++)
        ck_assert_int_eq(((int32_t *)at)[256 + i], i);
    ck_assert_mem_eq((unsigned char *)at + 2048, untouched, 1024);
    munmap(at, 8192);
    close(fd);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_buffer_that_can_only_be_read_is_a_source_and_no_target)
{
    static struct exec_batch batch;
    uint64_t offsets[7] = {0};
    struct exec_pool pool;
    char path[64];
    void *at;
    int fd, reader;

    make_pool(&pool, &exec_plain);
    do {
        exec_batch_make(&batch, &pool, 1, SESSION, 2, &seed);
    } while (batch.nnz == 0);
    fd = exec_memfd(batch.n_bytes, &at);
    memcpy(at, batch.bytes, batch.n_bytes);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    reader = open(path, O_RDONLY | O_CLOEXEC);
    ck_assert_int_ge(reader, 0);
    import_buffer(reader, 1, 0, batch.n_bytes, KVP_OK);
    batch.job.inline_.len = 0;
    batch.job.buffer = 1;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    exec_pool_check(&pool, "read-only source");
    batch.job.job = 2;
    batch.job.kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
    batch.job.n_output_offsets = 7;
    batch.job.output_offsets = offsets;
    batch.job.wanted = 1;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    ck_assert_mem_eq(at, batch.bytes, batch.n_bytes);
    munmap(at, batch.n_bytes);
    close(fd);
    close(reader);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- order ------------------------------------------------------------------------------------------------------- */

START_TEST(a_job_that_waits_for_a_value_holds_up_no_other_session)
{
    static struct exec_batch waits, passes;
    struct exec_pool pool;
    struct exec_answer answer;
    uint64_t first, second;

    make_pool(&pool, &exec_plain);
    exec_batch_make(&waits, &pool, 1, SESSION, 1, &seed);
    exec_batch_make(&passes, &pool, 2, SESSION + 1, 1, &seed);
    waits.job.wait_timeline = passes.job.done_timeline = 33;
    waits.job.wait_value = 10;
    passes.job.done_timeline = 16;
    passes.job.done_value = 4;
    waits.tokens[0] = passes.tokens[0] = 0;
    waits.job.inline_.len = passes.job.inline_.len = 0;
    __atomic_store_n(&pool.timelines[33].value, 9, __ATOMIC_RELEASE);
    first = exec_peer_send(&peer, JOB, &waits.job.base, NULL, 0);
    for (unsigned i = 0; i < 50; i++) {
        passes.job.job = 100 + i;
        second = exec_peer_send(&peer, JOB, &passes.job.base, NULL, 0);
        answer = exec_peer_next(&peer);
        ck_assert_uint_eq(answer.tag, second);
        ck_assert_int_eq(answer.status, KVP_OK);
        exec_answer_free(&answer);
    }
    ck_assert(exec_peer_quiet(&peer));
    ck_assert_uint_eq(pool.timelines[16].value, 4);
    __atomic_store_n(&pool.timelines[33].value, 10, __ATOMIC_RELEASE);
    answer = exec_peer_next(&peer);
    ck_assert_uint_eq(answer.tag, first);
    ck_assert_int_eq(answer.status, KVP_OK);
    exec_answer_free(&answer);
    exec_batch_free(&waits);
    exec_batch_free(&passes);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(sixty_four_sessions_that_wait_hold_up_no_other)
{
    enum { WAITERS = 64 };
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_answer answer;
    struct exec_pool pool;
    uint64_t tag;

    make_pool(&pool, &exec_plain);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.pool_id = pool.id;
    for (unsigned i = 0; i < WAITERS; i++) {
        job.job = i + 1;
        job.session_id = 1000 + i;
        job.wait_timeline = i;
        job.wait_value = 1;
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    }
    job.job = 500;
    job.session_id = 5;
    job.wait_value = 0;
    tag = exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    answer = exec_peer_next(&peer);
    ck_assert_uint_eq(answer.tag, tag);
    exec_answer_free(&answer);
    for (unsigned i = WAITERS; i-- > 0;) { /* released backwards, answered backwards */
        __atomic_store_n(&pool.timelines[i].value, 1, __ATOMIC_RELEASE);
        answer = exec_peer_next(&peer);
        ck_assert_int_eq(answer.status, KVP_OK);
        ck_assert_uint_eq(((const Kvpool__V1__ExecJobReply *)answer.body)->job, i + 1);
        exec_answer_free(&answer);
    }
    exec_pool_free(&pool);
}
END_TEST

START_TEST(jobs_of_one_session_run_in_the_order_in_which_they_came)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    uint32_t source, destination, tokens = 16;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain);
    for (uint64_t i = 0; i < pool.places[0].page_stride; i++) /* page 0 of plane 0 travels along all the others */
        pool.slab[pool.places[0].offset + i] = pool.want[pool.places[0].offset + i] = (unsigned char)(i * 7 + 1);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.session_id = SESSION;
    job.pool_id = pool.id;
    job.n_copy_sources = job.n_copy_destinations = job.n_copy_tokens = 1;
    job.copy_sources = &source;
    job.copy_destinations = &destination;
    job.copy_tokens = &tokens;
    for (source = 0, destination = 1; destination < 64; source++, destination++) {
        job.job = destination;
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    }
    for (uint64_t i = 1; i < 64; i++) {
        struct exec_answer answer = exec_peer_next(&peer);

        ck_assert_int_eq(answer.status, KVP_OK);
        ck_assert_uint_eq(((const Kvpool__V1__ExecJobReply *)answer.body)->job, i);
        exec_answer_free(&answer);
        exec_pool_want_copy(&pool, (uint32_t)i - 1, (uint32_t)i, 16);
    }
    exec_pool_check(&pool, "a chain of jobs");
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_wait_that_the_daemon_ended_for_its_dead_owner_fails_the_job)
{
    static struct exec_batch batch;
    struct exec_answer answer;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain);
    do {
        exec_batch_make(&batch, &pool, 1, SESSION, 1, &seed);
    } while (batch.nnz == 0);
    batch.job.wait_timeline = 40;
    batch.job.wait_value = 3;
    batch.job.done_timeline = 32;
    batch.job.done_value = 1;
    exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0);
    kvp_timeline_lose(&pool.timelines[40], 2, 3, (uint64_t)-KVP_ESESSION);
    __atomic_store_n(&pool.timelines[40].value, 3, __ATOMIC_RELEASE);
    answer = exec_peer_next(&peer);
    ck_assert_int_eq(answer.status, KVP_ESESSION);
    exec_answer_free(&answer);
    ck_assert_uint_eq(pool.timelines[32].value, 0);
    ck_assert_uint_eq(pool.timelines[32].error, (uint64_t)-KVP_ESESSION); /* said before a later job stores its value */
    ck_assert_uint_eq(kvp_timeline_lost(&pool.timelines[32], 1), (uint64_t)-KVP_ESESSION);
    ck_assert_uint_eq(kvp_timeline_lost(&pool.timelines[32], 2), 0);
    exec_pool_check(&pool, "nothing is written");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(dropping_a_slab_ends_the_jobs_that_wait_on_it)
{
    Kvpool__V1__ExecSlabDropRequest drop = KVPOOL__V1__EXEC_SLAB_DROP_REQUEST__INIT;
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_answer answer;
    struct exec_pool pool;
    unsigned lost = 0;

    make_pool(&pool, &exec_plain);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.session_id = SESSION;
    job.pool_id = drop.pool_id = pool.id;
    job.wait_value = 1;
    for (job.job = 1; job.job <= 3; job.job++)
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    exec_peer_send(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP, &drop.base, NULL, 0);
    for (unsigned i = 0; i < 4; i++) {
        answer = exec_peer_next(&peer);
        lost += answer.status == KVP_ELOST;
        exec_answer_free(&answer);
    }
    ck_assert_uint_eq(lost, 3);
    job.wait_value = 0;
    ck_assert_int_eq(do_job(&job), KVP_ENOENT);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_job_asked_for_again_is_answered_and_not_run_again)
{
    static struct exec_batch batch;
    Kvpool__V1__ExecJobRequest ask = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_answer answer;
    struct exec_pool pool;
    uint64_t again;

    make_pool(&pool, &exec_plain);
    do {
        exec_batch_make(&batch, &pool, 9, SESSION, 1, &seed);
    } while (batch.nnz == 0);
    batch.job.wait_value = 1;
    exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0);
    again = exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0); /* while it is open: this one is answered */
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);     /* so both have been taken */
    __atomic_store_n(&pool.timelines[0].value, 1, __ATOMIC_RELEASE);
    answer = exec_peer_next(&peer);
    ck_assert_uint_eq(answer.tag, again);
    ck_assert_int_eq(answer.status, KVP_OK);
    exec_answer_free(&answer);
    memset(pool.slab, 0, pool.slab_bytes); /* `want` too is still all zero */
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_pool_check(&pool, "answered from memory");
    ask.job = 9;
    ck_assert_int_eq(do_job(&ask), KVP_OK);
    ask.job = 10;
    ck_assert_int_eq(do_job(&ask), KVP_ENOENT);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("kvpool-exec: jobs");
    TCase *jobs = tcase_create("jobs");
    const int n_shapes = (int)exec_n_shapes;
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(jobs, setup, teardown);
    tcase_set_timeout(jobs, 60);
    tcase_add_loop_test(jobs, append_inline_gives_the_bytes_of_the_reference_in_every_layout, 0, n_shapes);
    tcase_add_loop_test(jobs, digests_are_those_of_the_pages_bytes_in_every_layout, 0, n_shapes);
    tcase_add_loop_test(jobs, append_takes_strided_slices_of_a_registered_buffer, 0, n_shapes);
    tcase_add_loop_test(jobs, append_takes_a_source_with_heads_outside_tokens, 0, n_shapes);
    tcase_add_test(jobs, append_larger_than_a_datagram_travels_in_a_memfd);
    tcase_add_test(jobs, copies_come_before_the_append_and_in_their_order);
    tcase_add_loop_test(jobs, pages_are_zeroed_wholly_and_alone_in_every_layout, 0, (int)exec_n_shapes);
    tcase_add_test(jobs, a_page_to_zero_that_is_not_the_pools_is_refused_and_nothing_is_zeroed);
    tcase_add_test(jobs, index_results_in_a_buffer_are_those_of_the_definition);
    tcase_add_test(jobs, an_output_that_is_not_wanted_is_not_written);
    tcase_add_test(jobs, a_buffer_that_can_only_be_read_is_a_source_and_no_target);
    tcase_add_test(jobs, a_job_that_waits_for_a_value_holds_up_no_other_session);
    tcase_add_test(jobs, sixty_four_sessions_that_wait_hold_up_no_other);
    tcase_add_test(jobs, jobs_of_one_session_run_in_the_order_in_which_they_came);
    tcase_add_test(jobs, a_wait_that_the_daemon_ended_for_its_dead_owner_fails_the_job);
    tcase_add_test(jobs, dropping_a_slab_ends_the_jobs_that_wait_on_it);
    tcase_add_test(jobs, a_job_asked_for_again_is_answered_and_not_run_again);
    suite_add_tcase(suite, jobs);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
