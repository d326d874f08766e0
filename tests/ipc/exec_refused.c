/**
 * What kvpool-exec must refuse in a job, on the host backend: each wrong field by itself, with the slab unchanged.
 */
#include "exec_peer.h"
#include "seed.h"

#include <check.h>
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

static void bad_pool(Kvpool__V1__ExecJobRequest *r)
{
    r->pool_id = 99;
}
static void bad_rank(Kvpool__V1__ExecJobRequest *r)
{
    r->rank = 1;
}
static void bad_kind(Kvpool__V1__ExecJobRequest *r)
{
    r->kind = (Kvpool__V1__JobKind)17;
}
static void page_too_high(Kvpool__V1__ExecJobRequest *r)
{
    r->kv_indices[0] = 64;
}
static void page_negative(Kvpool__V1__ExecJobRequest *r)
{
    r->kv_indices[0] = -1;
}
static void row_ends_missing(Kvpool__V1__ExecJobRequest *r)
{
    r->n_kv_indptr--;
}
static void row_ends_falling(Kvpool__V1__ExecJobRequest *r)
{
    r->kv_indptr[1] = INT32_MAX;
}
static void row_start_not_zero(Kvpool__V1__ExecJobRequest *r)
{
    r->kv_indptr[0] = -5;
}
static void pages_missing(Kvpool__V1__ExecJobRequest *r)
{
    r->n_kv_indices--;
}
static void starts_missing(Kvpool__V1__ExecJobRequest *r)
{
    r->n_start--;
}
static void tokens_over_the_row(Kvpool__V1__ExecJobRequest *r)
{
    r->start[0] = 16 * 64;
}
static void tokens_wrap(Kvpool__V1__ExecJobRequest *r)
{
    r->start[0] = UINT32_MAX;
}
static void inline_short(Kvpool__V1__ExecJobRequest *r)
{
    r->inline_.len--;
}
static void inline_and_buffer(Kvpool__V1__ExecJobRequest *r)
{
    r->buffer = 1;
}
static void no_source(Kvpool__V1__ExecJobRequest *r)
{
    r->inline_.len = 0;
}
static void no_such_buffer(Kvpool__V1__ExecJobRequest *r)
{
    r->inline_.len = 0, r->buffer = 3;
}
static void wait_out_of_range(Kvpool__V1__ExecJobRequest *r)
{
    r->wait_timeline = 4096, r->wait_value = 1;
}
static void done_out_of_range(Kvpool__V1__ExecJobRequest *r)
{
    r->done_timeline = UINT32_MAX, r->done_value = 1;
}

static uint64_t many[4] = {1ull << 63, UINT64_MAX, 0, 0};
static void offset_wraps(Kvpool__V1__ExecJobRequest *r)
{
    r->n_plane_offsets = 4, r->plane_offsets = many;
}
static void too_few_offsets(Kvpool__V1__ExecJobRequest *r)
{
    r->n_plane_offsets = 3, r->plane_offsets = many;
}
static void strides_alone(Kvpool__V1__ExecJobRequest *r)
{
    r->n_token_strides = 4, r->token_strides = many;
}
static void stride_wraps(Kvpool__V1__ExecJobRequest *r)
{
    static uint64_t none[4];

    r->n_plane_offsets = r->n_token_strides = 4;
    r->plane_offsets = none;
    r->token_strides = many;
}

static uint32_t pair[2] = {0, 64}, one[2] = {1, 1}, seventeen[2] = {17, 17};
static void copies(Kvpool__V1__ExecJobRequest *r, uint32_t *sources, uint32_t *destinations, uint32_t *tokens)
{
    r->n_copy_sources = r->n_copy_destinations = r->n_copy_tokens = 2;
    r->copy_sources = sources;
    r->copy_destinations = destinations;
    r->copy_tokens = tokens;
}
static void copy_source_too_high(Kvpool__V1__ExecJobRequest *r)
{
    copies(r, pair, one, one);
}
static void copy_target_too_high(Kvpool__V1__ExecJobRequest *r)
{
    copies(r, one, pair, one);
}
static void copy_onto_itself(Kvpool__V1__ExecJobRequest *r)
{
    copies(r, one, one, one);
}
static void copy_of_17_tokens(Kvpool__V1__ExecJobRequest *r)
{
    copies(r, pair, one, seventeen), r->n_copy_sources = 1;
}

static void digests_of_none(Kvpool__V1__ExecJobRequest *r)
{
    r->kind = KVPOOL__V1__JOB_KIND__JOB_DIGEST;
}

static void digests_of_too_many(Kvpool__V1__ExecJobRequest *r)
{
    static uint32_t pages[KVP_BATCH_MAX + 1];

    r->kind = KVPOOL__V1__JOB_KIND__JOB_DIGEST;
    r->digest_pages = pages;
    r->n_digest_pages = KVP_BATCH_MAX + 1;
}

static void digest_page_too_high(Kvpool__V1__ExecJobRequest *r)
{
    static uint32_t pages[] = {0, 1u << 30};

    r->kind = KVPOOL__V1__JOB_KIND__JOB_DIGEST;
    r->digest_pages = pages;
    r->n_digest_pages = 2;
}

static const struct {
    const char *what;
    void (*spoil)(Kvpool__V1__ExecJobRequest *r);
    enum kvp_status want;
} wrongs[] = {
    {"pool", bad_pool, KVP_ENOENT},
    {"rank", bad_rank, KVP_ENOENT},
    {"kind", bad_kind, KVP_EINVAL},
    {"page too high", page_too_high, KVP_EINVAL},
    {"page negative", page_negative, KVP_EINVAL},
    {"row ends missing", row_ends_missing, KVP_EINVAL},
    {"row ends falling", row_ends_falling, KVP_EINVAL},
    {"row start", row_start_not_zero, KVP_EINVAL},
    {"pages missing", pages_missing, KVP_EINVAL},
    {"starts missing", starts_missing, KVP_EINVAL},
    {"tokens over the row", tokens_over_the_row, KVP_EINVAL},
    {"tokens wrap", tokens_wrap, KVP_EINVAL},
    {"inline short", inline_short, KVP_EINVAL},
    {"inline and buffer", inline_and_buffer, KVP_EINVAL},
    {"no source", no_source, KVP_EINVAL},
    {"no such buffer", no_such_buffer, KVP_ENOENT},
    {"wait", wait_out_of_range, KVP_EINVAL},
    {"done", done_out_of_range, KVP_EINVAL},
    {"offset wraps", offset_wraps, KVP_EINVAL},
    {"offsets missing", too_few_offsets, KVP_EINVAL},
    {"strides alone", strides_alone, KVP_EINVAL},
    {"stride wraps", stride_wraps, KVP_EINVAL},
    {"copy source", copy_source_too_high, KVP_EINVAL},
    {"copy destination", copy_target_too_high, KVP_EINVAL},
    {"copy onto itself", copy_onto_itself, KVP_EINVAL},
    {"copy of too many tokens", copy_of_17_tokens, KVP_EINVAL},
    {"digests of no page", digests_of_none, KVP_EINVAL},
    {"digests of too many pages", digests_of_too_many, KVP_EINVAL},
    {"the digest of a page too high", digest_page_too_high, KVP_EINVAL},
};

START_TEST(a_wrong_job_is_refused_and_changes_nothing)
{
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain);
    do {
        exec_batch_make(&batch, &pool, 1, SESSION, 2, &seed);
    } while (batch.tokens[0] == 0 || batch.tokens[1] == 0);
    wrongs[_i].spoil(&batch.job);
    ck_assert_msg(do_job(&batch.job) == wrongs[_i].want, "%s", wrongs[_i].what);
    exec_pool_check(&pool, wrongs[_i].what);
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(index_outputs_must_lie_in_the_buffer_and_be_aligned)
{
    static struct exec_batch batch;
    uint64_t offsets[7] = {0};
    struct exec_pool pool;
    void *at;
    int fd = exec_memfd(4096, &at);

    make_pool(&pool, &exec_plain);
    import_buffer(fd, 1, 0, 4096, KVP_OK);
    exec_batch_make(&batch, &pool, 0, SESSION, 1, &seed);
    batch.start[0] = 0;
    batch.tokens[0] = 4;
    batch.job.kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
    batch.job.inline_.len = 0;
    batch.job.buffer = 1;
    batch.job.n_output_offsets = 7;
    batch.job.output_offsets = offsets;
    batch.job.wanted = 1;
    offsets[0] = 4096 - 16;
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    offsets[0] = 4096 - 12;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    offsets[0] = UINT64_MAX - 3;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    offsets[0] = 2;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    batch.job.wanted = 4;
    offsets[2] = 4;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    batch.job.wanted = 128;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    batch.job.wanted = 1;
    batch.job.n_output_offsets = 6;
    ck_assert_int_eq(do_job(&batch.job), KVP_EINVAL);
    munmap(at, 4096);
    close(fd);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("kvpool-exec: what is refused");
    TCase *wrong = tcase_create("wrong");
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(wrong, setup, teardown);
    tcase_set_timeout(wrong, 60);
    tcase_add_loop_test(wrong, a_wrong_job_is_refused_and_changes_nothing, 0, sizeof(wrongs) / sizeof(wrongs[0]));
    tcase_add_test(wrong, index_outputs_must_lie_in_the_buffer_and_be_aligned);
    suite_add_tcase(suite, wrong);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
