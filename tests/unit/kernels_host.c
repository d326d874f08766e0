/**
 * The host kernels where the case matrix does not look: large calls on several threads, empty calls, refused
 * arguments, the index step against numbers worked out by hand, and what a call leaves behind.
 */
#include <check.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel_reference.h"

static void fill(void *bytes, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        ((unsigned char *)bytes)[i] = (unsigned char)(seed >> 56);
    }
}

/* ---- large calls ------------------------------------------------------------------------------------------------- */

/* A pool, its copy for the reference, and a source, each of over KVP_HOST_STREAM_BYTES. */
struct large {
    uint32_t heads, dim, page_tokens, pages;
    int hnd, off; /* `off`: bytes by which base and source are misaligned */
    int64_t tokens;
    size_t bytes;
    unsigned char *pool, *expected, *source;
    int64_t *slots;
    struct kvp_plane_view plane;
    struct kvp_token_view flat;
};

static void make_large(struct large *large)
{
    int64_t row = large->dim * 2, token = row * large->heads;
    large->pages = (uint32_t)(large->tokens / large->page_tokens) + 3;
    large->bytes = (size_t)large->pages * large->page_tokens * (size_t)token + 128;
    large->pool = malloc(large->bytes);
    large->expected = malloc(large->bytes);
    large->source = malloc(large->bytes);
    large->slots = malloc((size_t)large->tokens * sizeof *large->slots);
    ck_assert(large->pool && large->expected && large->source && large->slots);
    memset(large->pool, 0xa7, large->bytes);
    memset(large->expected, 0xa7, large->bytes);
    fill(large->source, large->bytes, 7);
    for (int64_t j = 0; j < large->tokens; j++) { /* every other page first, so that runs end */
        int64_t nth = j / large->page_tokens, pages = large->pages - 3;
        int64_t page = nth < pages / 2 ? 2 * nth + 1 : 2 * (nth - pages / 2);
        large->slots[j] = page * large->page_tokens + j % large->page_tokens;
    }
    large->plane = (struct kvp_plane_view){
        .base = large->pool + 64 + large->off,
        .page_stride = token * large->page_tokens,
        .token_stride = large->hnd ? row : token,
        .head_stride = large->hnd ? row * large->page_tokens : row,
        .heads = large->heads,
        .dim = large->dim,
        .dtype = KVP_DTYPE_F16,
    };
    large->flat = (struct kvp_token_view){large->source + large->off, token, row};
}

static void free_large(struct large *large)
{
    free(large->pool);
    free(large->expected);
    free(large->source);
    free(large->slots);
}

static struct kvp_append_args append_large(const struct large *large)
{
    return (struct kvp_append_args){
        .planes = &large->plane,
        .sources = &large->flat,
        .n_planes = 1,
        .pages = large->pages,
        .page_tokens = large->page_tokens,
        .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = large->tokens, .slot_mapping = large->slots},
    };
}

static const struct large shapes[] = {
    {.heads = 8, .dim = 128, .page_tokens = 16, .tokens = 9000},
    {.heads = 8, .dim = 128, .page_tokens = 16, .tokens = 9000, .hnd = 1},
    {.heads = 1, .dim = 128, .page_tokens = 64, .tokens = 70000, .off = 2},
    {.heads = 3, .dim = 33, .page_tokens = 3, .tokens = 100000, .hnd = 1, .off = 6},
    {.heads = 5, .dim = 100, .page_tokens = 16, .tokens = 20000, .off = 8},
};

START_TEST(a_large_append_stores_every_byte_on_any_number_of_threads)
{
    for (int threads = 0; threads < 4; threads++) {
        struct large large = shapes[_i];
        make_large(&large);
        struct kvp_append_args args = append_large(&large);
        ck_assert_int_eq(kvp_host_append(&args, threads), KVP_OK);
        struct kvp_plane_view plane = large.plane;
        plane.base = large.expected + 64 + large.off;
        args.planes = &plane;
        reference_append(&args);
        ck_assert(memcmp(large.pool, large.expected, large.bytes) == 0);
        free_large(&large);
    }
}
END_TEST

START_TEST(a_large_gather_brings_back_what_was_appended)
{
    struct large large = shapes[_i];
    make_large(&large);
    struct kvp_append_args args = append_large(&large);
    ck_assert_int_eq(kvp_host_append(&args, 0), KVP_OK);
    struct kvp_token_view back = {large.expected + large.off, large.flat.token_stride, large.flat.head_stride};
    struct kvp_gather_args gather = {
        .planes = &large.plane,
        .destinations = &back,
        .n_planes = 1,
        .pages = large.pages,
        .page_tokens = large.page_tokens,
        .at = args.at,
    };
    ck_assert_int_eq(kvp_host_gather(&gather, 0), KVP_OK);
    ck_assert_mem_eq(back.base, large.flat.base, (size_t)(large.tokens * large.flat.token_stride));
    ck_assert_uint_eq(large.expected[large.off + large.tokens * large.flat.token_stride], 0xa7);
    free_large(&large);
}
END_TEST

START_TEST(large_page_copies_and_digests_agree_on_any_number_of_threads)
{
    struct large large = {.heads = 4, .dim = 96, .page_tokens = 16, .tokens = 48000};
    make_large(&large);
    fill(large.pool, large.bytes, 3);
    memcpy(large.expected, large.pool, large.bytes);
    uint32_t n = large.pages / 2;
    struct kvp_page_copy *copies = calloc(n, sizeof *copies);
    int32_t *ids = calloc(large.pages, sizeof *ids);
    struct kvp_digest *found = calloc(large.pages, sizeof *found), *expected = calloc(large.pages, sizeof *expected);
    ck_assert(copies && ids && found && expected);
    for (uint32_t i = 0; i < n; i++)
        copies[i] = (struct kvp_page_copy){.source = (int32_t)i, .destination = (int32_t)(n + i), .tokens = 1 + i % 16};
    for (uint32_t i = 0; i < large.pages; i++)
        ids[i] = (int32_t)i;
    struct kvp_plane_view plane = large.plane;
    plane.base = large.expected + 64;
    struct kvp_page_copy_args copy = {.sources = &large.plane,
                                      .destinations = &large.plane,
                                      .n_planes = 1,
                                      .page_tokens = 16,
                                      .source_pages = large.pages,
                                      .destination_pages = large.pages,
                                      .n = n,
                                      .copies = copies};
    ck_assert_int_eq(kvp_host_page_copy(&copy, 3), KVP_OK);
    copy.sources = copy.destinations = &plane;
    reference_page_copy(&copy);
    ck_assert(memcmp(large.pool, large.expected, large.bytes) == 0);
    struct kvp_page_digest_args digest = {.planes = &large.plane,
                                          .n_planes = 1,
                                          .pages = large.pages,
                                          .page_tokens = 16,
                                          .n = large.pages,
                                          .page_ids = ids,
                                          .ret_digests = found};
    ck_assert_int_eq(kvp_host_page_digest(&digest, 3), KVP_OK);
    digest.ret_digests = expected;
    reference_page_digest(&digest);
    ck_assert(memcmp(found, expected, large.pages * sizeof *found) == 0);
    free(copies);
    free(ids);
    free(found);
    free(expected);
    free_large(&large);
}
END_TEST

static int threads_of_this_process(void)
{
    DIR *folder = opendir("/proc/self/task");
    int n = 0;
    ck_assert_ptr_nonnull(folder);
    while (readdir(folder) != NULL)
        n++;
    closedir(folder);
    return n - 2;
}

START_TEST(a_call_leaves_no_thread_behind_and_works_in_a_forked_child)
{
    struct large large = shapes[0];
    make_large(&large);
    struct kvp_append_args args = append_large(&large);
    int status;
    ck_assert_int_eq(kvp_host_append(&args, 2), KVP_OK); /* a sanitizer starts a thread of its own with the first */
    int before = threads_of_this_process();
    ck_assert_int_eq(kvp_host_append(&args, 4), KVP_OK);
    /* a joined thread's entry goes a moment after the join: wait for that, up to the test's time limit */
    while (threads_of_this_process() > before)
        ;
    memcpy(large.expected, large.pool, large.bytes);
    pid_t child = fork();
    if (child == 0) {
        memset(large.pool, 0xa7, large.bytes);
        int good = kvp_host_append(&args, 4) == KVP_OK && memcmp(large.pool, large.expected, large.bytes) == 0;
        _exit(good ? 0 : 1);
    }
    ck_assert_int_gt(child, 0);
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    free_large(&large);
}
END_TEST

/* ---- empty and refused calls ------------------------------------------------------------------------------------- */

static unsigned char page_bytes[4 * 16 * 8];
static struct kvp_plane_view small_plane;
static struct kvp_token_view small_source;
static int32_t small_slots[4];

static struct kvp_append_args small_append(void)
{
    memset(page_bytes, 0x55, sizeof page_bytes);
    small_plane = (struct kvp_plane_view){page_bytes, 16 * 8, 8, 8, 1, 4, KVP_DTYPE_F16, 0};
    small_source = (struct kvp_token_view){small_slots, 0, 0};
    return (struct kvp_append_args){
        .planes = &small_plane,
        .sources = &small_source,
        .n_planes = 1,
        .pages = 4,
        .page_tokens = 16,
        .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 32, .nnz = 1, .slot_mapping = small_slots},
    };
}

START_TEST(no_tokens_and_no_sequences_are_no_error)
{
    struct kvp_append_args append = small_append();
    append.at = (struct kvp_address){.kind = KVP_ADDRESS_CSR, .index_bits = 32};
    append.sources = NULL;
    ck_assert_int_eq(kvp_host_append(&append, 0), KVP_OK);
    int32_t indptr[1] = {9}, counted[1] = {9}, pages[1] = {9}, indices[3] = {9, 9, 9};
    struct kvp_index_args index = {
        .source = KVP_INDEX_CSR,
        .index_bits = 32,
        .pages = 4,
        .page_tokens = 16,
        .nnz = 3,
        .ret_kv_indptr = pages,
        .ret_append_indptr = indptr,
        .ret_batch_indices = indices,
        .ret_nnz = counted,
    };
    ck_assert_int_eq(kvp_host_index(&index, 0), KVP_OK);
    ck_assert_int_eq(indptr[0], 0);
    ck_assert_int_eq(pages[0], 0);
    ck_assert_int_eq(counted[0], 0);
    for (int j = 0; j < 3; j++)
        ck_assert_int_eq(indices[j], -1);
    struct kvp_progress_args progress = {.index_bits = 32};
    ck_assert_int_eq(kvp_host_progress(&progress, 0), KVP_OK);
    struct kvp_page_zero_args zero = {.planes = &small_plane, .n_planes = 1, .pages = 4, .page_tokens = 16};
    ck_assert_int_eq(kvp_host_page_zero(&zero, 0), KVP_OK);
    for (size_t i = 0; i < sizeof page_bytes; i++)
        ck_assert_uint_eq(page_bytes[i], 0x55);
}
END_TEST

START_TEST(arguments_out_of_range_are_refused_and_nothing_is_stored)
{
    for (int wrong = 0; wrong < 14; wrong++) {
        struct kvp_append_args args = small_append();
        switch (wrong) {
        case 0:
            args.planes = NULL;
            break;
        case 1:
            args.n_planes = 0;
            break;
        case 2:
            args.n_planes = KVP_PLANES_MAX + 1;
            break;
        case 3:
            args.pages = 0;
            break;
        case 4:
            args.page_tokens = 0;
            break;
        case 5:
            args.page_tokens = KVP_PAGE_TOKENS_MAX + 1;
            break;
        case 6:
            small_plane.dtype = 99;
            break;
        case 7:
            small_plane.heads = 0;
            break;
        case 8:
            small_plane.dim = 0;
            break;
        case 9:
            small_plane.page_stride = -8;
            break;
        case 10:
            args.at.kind = 77;
            break;
        case 11:
            args.at.index_bits = 16;
            break;
        case 12:
            args.at.slot_mapping = NULL;
            break;
        default:
            args.at.nnz = -1;
            break;
        }
        ck_assert_msg(kvp_host_append(&args, 0) == KVP_EINVAL, "wrong argument %d was taken", wrong);
        for (size_t i = 0; i < sizeof page_bytes; i++)
            ck_assert_uint_eq(page_bytes[i], 0x55);
    }
    struct kvp_append_args args = small_append();
    ck_assert_int_eq(kvp_host_append(&args, 0), KVP_OK);
    ck_assert_uint_eq(page_bytes[0], 0);
}
END_TEST

START_TEST(a_row_of_another_version_than_the_table_has_is_skipped_and_reported)
{
    struct kvp_append_args args = small_append();
    struct kvp_table_head heads[2] = {{.version = 4, .row_pages = 2}, {.version = 6, .row_pages = 2}};
    int32_t rows[2][2] = {{1, 2}, {3, 0}}, slots[2] = {0, 1}, starts[2] = {0, 17};
    uint32_t versions[2] = {2, 6};
    struct kvp_error_ring *errors = calloc(1, sizeof *errors + 4 * sizeof errors->records[0]);
    int64_t sources[2] = {0x1111111111111111, 0x2222222222222222};
    small_source = (struct kvp_token_view){sources, 8, 8};
    args.at = (struct kvp_address){
        .kind = KVP_ADDRESS_ROWS,
        .index_bits = 32,
        .nnz = 2,
        .batch = 2,
        .table = {heads, rows[0], sizeof rows[0], 2, 2},
        .seq_slots = slots,
        .start_lengths = starts,
        .row_versions = versions,
    };
    ck_assert_ptr_nonnull(errors);
    errors->capacity = 4;
    args.errors = errors;
    ck_assert_int_eq(kvp_host_append(&args, 0), KVP_OK);
    ck_assert_uint_eq(errors->count, 1);
    ck_assert_uint_eq(errors->records[0].kind, KVP_BAD_VERSION);
    ck_assert_int_eq(errors->records[0].token, 0);
    ck_assert_int_eq(errors->records[0].value, 4);
    for (size_t i = 0; i < sizeof page_bytes; i++) /* page 0, token 1 is position 17 of row {3, 0} */
        ck_assert_uint_eq(page_bytes[i], i / 8 == 1 ? 0x22 : 0x55);
    free(errors);
}
END_TEST

/* ---- the index step, by hand ------------------------------------------------------------------------------------- */

START_TEST(batch_indices_and_positions_are_those_of_flashinfers_own_example)
{
    /* get_batch_indices_positions([0, 1, 3, 6, 10], seq_lens [5, 5, 5, 5], nnz 10) */
    int32_t append_indptr[] = {0, 1, 3, 6, 10}, kv_indptr[] = {0, 1, 2, 3, 4}, last[] = {5, 5, 5, 5};
    int32_t batch_indices[10], positions[10], lengths[4];
    struct kvp_index_args args = {
        .source = KVP_INDEX_CSR,
        .index_bits = 32,
        .pages = 8,
        .page_tokens = 16,
        .batch = 4,
        .nnz = 10,
        .append_indptr = append_indptr,
        .in_kv_indptr = kv_indptr,
        .in_last_page_len = last,
        .ret_seq_lens = lengths,
        .ret_batch_indices = batch_indices,
        .ret_positions = positions,
    };
    static const int32_t expected_batch[] = {0, 1, 1, 2, 2, 2, 3, 3, 3, 3};
    static const int32_t expected_positions[] = {4, 3, 4, 2, 3, 4, 1, 2, 3, 4};
    ck_assert_int_eq(kvp_host_index(&args, 0), KVP_OK);
    ck_assert_mem_eq(batch_indices, expected_batch, sizeof expected_batch);
    ck_assert_mem_eq(positions, expected_positions, sizeof expected_positions);
    for (int b = 0; b < 4; b++)
        ck_assert_int_eq(lengths[b], 5);
}
END_TEST

START_TEST(the_two_dimensional_form_puts_the_next_token_behind_the_last)
{
    /* two pages and 3 tokens of the second; one page and none of it; no page at all */
    int64_t table[3][4] = {{5, 2, -1, -1}, {7, -1, -1, -1}, {-1, -1, -1, -1}}, last[] = {3, 0, 1};
    int64_t counts[] = {1, 1, 0}, lengths[3], slots[4], indptr[4], indices[4], last_out[3];
    struct kvp_index_args args = {
        .source = KVP_INDEX_TABLE,
        .index_bits = 64,
        .slot_bits = 64,
        .pages = 8,
        .page_tokens = 16,
        .batch = 3,
        .nnz = 4,
        .kv_capacity = 4,
        .append_lengths = counts,
        .in_last_page_len = last,
        .in_page_table = table,
        .in_page_table_stride = 4,
        .in_page_table_pages = 4,
        .ret_seq_lens = lengths,
        .ret_slot_mapping = slots,
        .ret_kv_indptr = indptr,
        .ret_kv_indices = indices,
        .ret_kv_last_page_len = last_out,
    };
    static const int64_t expected_lengths[] = {20, 1, 0}, expected_slots[] = {2 * 16 + 3, 7 * 16, -1, -1};
    static const int64_t expected_indptr[] = {0, 2, 3, 3}, expected_indices[] = {5, 2, 7}, expected_last[] = {4, 1, 0};
    ck_assert_int_eq(kvp_host_index(&args, 0), KVP_OK);
    ck_assert_mem_eq(lengths, expected_lengths, sizeof lengths);
    ck_assert_mem_eq(slots, expected_slots, sizeof slots);
    ck_assert_mem_eq(indptr, expected_indptr, sizeof indptr);
    ck_assert_mem_eq(indices, expected_indices, sizeof expected_indices);
    ck_assert_mem_eq(last_out, expected_last, sizeof last_out);
}
END_TEST

START_TEST(a_batch_of_thousands_of_sequences_and_tokens_is_indexed_on_several_threads)
{
    enum { BATCH = KVP_INDEX_BATCH_MAX, ROW = 8, PAGES = BATCH * ROW };
    int32_t(*rows)[ROW] = calloc(BATCH, sizeof *rows), *slots = calloc(BATCH, 4), *starts = calloc(BATCH, 4);
    int32_t *counts = calloc(BATCH, 4), *found = calloc(4 * PAGES * 4, 4), *expected = calloc(4 * PAGES * 4, 4);
    ck_assert(rows && slots && starts && counts && found && expected);
    for (int32_t b = 0; b < BATCH; b++) {
        for (int32_t i = 0; i < ROW; i++)
            rows[b][i] = (b * ROW + i) * 7 % PAGES;
        slots[b] = BATCH - 1 - b;
        starts[b] = b % 60;
        counts[b] = b % 9;
    }
    struct kvp_index_args args = {
        .source = KVP_INDEX_ROWS,
        .index_bits = 32,
        .slot_bits = 32,
        .pages = PAGES,
        .page_tokens = 16,
        .batch = BATCH,
        .nnz = 4 * BATCH,
        .kv_capacity = PAGES,
        .append_lengths = counts,
        .table = {NULL, rows[0], sizeof rows[0], BATCH, ROW},
        .seq_slots = slots,
        .start_lengths = starts,
    };
    for (int by_reference = 0; by_reference < 2; by_reference++) {
        int32_t *out = by_reference ? expected : found;
        args.ret_batch_indices = out;
        args.ret_positions = out + 4 * PAGES;
        args.ret_slot_mapping = out + 2 * 4 * PAGES;
        args.ret_kv_indices = out + 3 * 4 * PAGES;
        args.ret_kv_indptr = out + 3 * 4 * PAGES + PAGES;
        if (by_reference)
            reference_index(&args);
        else
            ck_assert_int_eq(kvp_host_index(&args, 4), KVP_OK);
    }
    ck_assert(memcmp(found, expected, 4 * PAGES * 4 * sizeof *found) == 0);
    free(rows);
    free(slots);
    free(starts);
    free(counts);
    free(found);
    free(expected);
}
END_TEST

int main(void)
{
    TCase *host = tcase_create("host");
    tcase_set_timeout(host, 100);
    tcase_add_loop_test(host, a_large_append_stores_every_byte_on_any_number_of_threads, 0, 5);
    tcase_add_loop_test(host, a_large_gather_brings_back_what_was_appended, 0, 5);
    tcase_add_test(host, large_page_copies_and_digests_agree_on_any_number_of_threads);
    tcase_add_test(host, a_call_leaves_no_thread_behind_and_works_in_a_forked_child);
    tcase_add_test(host, no_tokens_and_no_sequences_are_no_error);
    tcase_add_test(host, arguments_out_of_range_are_refused_and_nothing_is_stored);
    tcase_add_test(host, a_row_of_another_version_than_the_table_has_is_skipped_and_reported);
    tcase_add_test(host, batch_indices_and_positions_are_those_of_flashinfers_own_example);
    tcase_add_test(host, the_two_dimensional_form_puts_the_next_token_behind_the_last);
    tcase_add_test(host, a_batch_of_thousands_of_sequences_and_tokens_is_indexed_on_several_threads);
    Suite *suite = suite_create("kernels_host");
    suite_add_tcase(suite, host);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
