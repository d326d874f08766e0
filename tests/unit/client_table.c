/**
 * Reading the table without a call: against a table of the test's own, changed by a thread that keeps the rules of
 * kvp_abi.h, and by hands that break off in the middle.
 */
#include "internal.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#define SEQUENCES 4u
#define ROW_PAGES 64u
#define STATES    20000u /* to read, */
#define VERSIONS  200u   /* of so many versions */

static struct {
    struct kvp_table_header header;
    struct kvp_table_head heads[SEQUENCES];
    uint32_t rows[SEQUENCES][ROW_PAGES];
} table;
static _Atomic uint64_t words[SEQUENCES], own[SEQUENCES];
static struct kvp_client client;
static struct kvp_pool_info info = {.spec = {.name = "test"}};
static struct kvp_pool pool;

static const struct kvp_seq seq = {.slot = 1, .generation = 5};

static void set_up(void)
{
    memset(&table, 0, sizeof(table));
    memset((void *)words, 0, sizeof(words));
    memset((void *)own, 0, sizeof(own));
    table.header = (struct kvp_table_header){.magic = KVP_TABLE_MAGIC,
                                             .abi_version = KVP_ABI_VERSION,
                                             .state = KVP_TABLE_LIVE,
                                             .max_sequences = SEQUENCES,
                                             .row_pages = ROW_PAGES,
                                             .row_stride = sizeof(table.rows[0])};
    table.heads[1] = (struct kvp_table_head){.version = 2, .generation = 5};
    client.fork_generation = kvp_fork_generation;
    pool = (struct kvp_pool){.client = &client,
                             .info = &info,
                             .header = &table.header,
                             .heads = table.heads,
                             .rows = (const unsigned char *)table.rows,
                             .words = words,
                             .own = own};
}

static void store(uint32_t *at, uint32_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

/* ---- lengths ----------------------------------------------------------------------------------------------------- */

static uint32_t length_now(void)
{
    uint32_t tokens = UINT32_MAX;

    ck_assert_int_eq(kvp_seq_len(&pool, seq, &tokens), KVP_OK);
    return tokens;
}

START_TEST(a_length_is_the_newer_of_the_table_and_the_own_word)
{
    table.heads[1].length = 10;
    ck_assert_uint_eq(length_now(), 10);
    own[1] = KVP_PROGRESS_WORD(2, 100);
    words[1] = KVP_PROGRESS_WORD(2, 12);
    ck_assert_uint_eq(length_now(), 12);
    table.heads[1].length = 15;
    ck_assert_uint_eq(length_now(), 15);
}
END_TEST

START_TEST(a_word_of_another_version_or_owner_does_not_count)
{
    table.heads[1].length = 10;
    own[1] = KVP_PROGRESS_WORD(2, 100);
    words[1] = KVP_PROGRESS_WORD(4, 50);
    ck_assert_uint_eq(length_now(), 10);
    words[1] = KVP_PROGRESS_WORD(2, 50);
    own[1] = 0;
    ck_assert_uint_eq(length_now(), 10);
    own[1] = KVP_PROGRESS_WORD(2, 100);
    table.heads[1].version = 4;
    ck_assert_uint_eq(length_now(), 10);
}
END_TEST

START_TEST(a_word_over_what_is_reserved_is_clamped)
{
    own[1] = KVP_PROGRESS_WORD(2, 30);
    words[1] = KVP_PROGRESS_WORD(2, 31);
    ck_assert_uint_eq(length_now(), 30);
}
END_TEST

/* ---- handles and states ------------------------------------------------------------------------------------------ */

START_TEST(a_handle_of_another_generation_or_out_of_range_is_stale)
{
    const struct kvp_seq wrong[] = {{1, 4}, {1, 6}, {1, 0}, {0, 1}, {SEQUENCES, 5}, {UINT32_MAX, UINT32_MAX}};
    uint32_t n;

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        ck_assert_int_eq(kvp_seq_len(&pool, wrong[i], &n), KVP_ESTALE);
        ck_assert_int_eq(kvp_row(&pool, wrong[i], 0, NULL, &n), KVP_ESTALE);
    }
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "is none of pool test"));
}
END_TEST

START_TEST(a_row_left_in_the_middle_of_a_change_is_said_to_be_so)
{
    uint32_t n;

    table.heads[1].version = 3;
    ck_assert_int_eq(kvp_seq_len(&pool, seq, &n), KVP_EAGAIN);
    ck_assert_int_eq(kvp_row(&pool, seq, 0, NULL, &n), KVP_EAGAIN);
}
END_TEST

START_TEST(a_count_over_the_rows_room_is_never_followed)
{
    int32_t pages[ROW_PAGES];
    uint32_t n;

    table.heads[1].row_pages = ROW_PAGES + 1;
    ck_assert_int_eq(kvp_row(&pool, seq, ROW_PAGES, pages, &n), KVP_EAGAIN);
}
END_TEST

START_TEST(a_lost_or_deleted_pool_and_a_lost_session_are_told_apart)
{
    uint32_t n;

    table.header.state = KVP_TABLE_LOST;
    ck_assert_int_eq(kvp_seq_len(&pool, seq, &n), KVP_ELOST);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "the memory of pool test is gone"));
    table.header.state = KVP_TABLE_DELETED;
    ck_assert_int_eq(kvp_row(&pool, seq, 0, NULL, &n), KVP_ELOST);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "was deleted"));
    table.header.state = KVP_TABLE_LIVE;
    pool.gone = KVP_ESESSION;
    ck_assert_int_eq(kvp_pool_state(&pool), KVP_ESESSION);
    ck_assert_int_eq(kvp_seq_len(&pool, seq, &n), KVP_ESESSION);
}
END_TEST

START_TEST(a_forked_child_is_told_that_the_session_is_not_its_own)
{
    uint32_t n;

    client.fork_generation = kvp_fork_generation - 1;
    ck_assert_int_eq(kvp_seq_len(&pool, seq, &n), KVP_ESESSION);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "connect again after fork()"));
}
END_TEST

/* ---- rows -------------------------------------------------------------------------------------------------------- */

START_TEST(a_row_is_copied_as_far_as_there_is_room_and_counted_whole)
{
    int32_t pages[ROW_PAGES] = {0};
    uint32_t n;

    for (uint32_t i = 0; i < 10; i++)
        table.rows[1][i] = 100 + i;
    table.heads[1].row_pages = 10;
    ck_assert_int_eq(kvp_row(&pool, seq, 4, pages, &n), KVP_OK);
    ck_assert_uint_eq(n, 10);
    ck_assert_int_eq(pages[3], 103);
    ck_assert_int_eq(pages[4], 0);
    ck_assert_int_eq(kvp_row(&pool, seq, 0, NULL, &n), KVP_OK);
    ck_assert_uint_eq(n, 10);
}
END_TEST

/* ---- batches ----------------------------------------------------------------------------------------------------- */

/* Sequence i of generation i + 1 in slot i, its pages 100 · i + 99, + 98, …; 3 tokens a page. */
static void fill_table(const uint32_t *tokens, struct kvp_seq *ret_seqs)
{
    info.spec.layout.page_tokens = 3;
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        ret_seqs[i] = (struct kvp_seq){.slot = i, .generation = i + 1};
        table.heads[i] = (struct kvp_table_head){
            .version = 2, .generation = i + 1, .length = tokens[i], .row_pages = (tokens[i] + 2) / 3 + 1};
        for (uint32_t k = 0; k < ROW_PAGES; k++)
            table.rows[i][k] = 100 * i + 99 - k;
    }
}

START_TEST(a_batchs_page_table_is_its_rows_one_behind_the_other)
{
    const uint32_t tokens[SEQUENCES] = {4, 0, 6, 1}, more[SEQUENCES] = {6, 3, 9, 3};
    const int32_t indptr[] = {0, 2, 2, 4, 5}, indices[] = {99, 98, 299, 298, 399}, last[] = {1, 0, 3, 1};
    const int32_t more_indptr[] = {0, 2, 3, 6, 7};
    int32_t got_indptr[SEQUENCES + 1], got[8], got_last[SEQUENCES];
    struct kvp_seq seqs[SEQUENCES];
    uint32_t lens[SEQUENCES], room = 0;

    fill_table(tokens, seqs);
    ck_assert_int_eq(kvp_seq_lens(&pool, SEQUENCES, seqs, lens), KVP_OK);
    ck_assert_mem_eq(lens, tokens, sizeof(lens));
    ck_assert_int_eq(kvp_page_table(&pool, SEQUENCES, seqs, NULL, 5, got_indptr, got, got_last, &room), KVP_OK);
    ck_assert_mem_eq(got_indptr, indptr, sizeof(indptr));
    ck_assert_mem_eq(got, indices, sizeof(indices));
    ck_assert_mem_eq(got_last, last, sizeof(last));
    ck_assert_int_eq(kvp_page_table(&pool, SEQUENCES, seqs, more, 7, got_indptr, got, got_last, &room), KVP_OK);
    ck_assert_mem_eq(got_indptr, more_indptr, sizeof(more_indptr));
    ck_assert_int_eq(got[2], 199);
    ck_assert_int_eq(kvp_page_table(&pool, SEQUENCES, seqs, more, 4, got_indptr, got, got_last, &room), KVP_ELIMIT);
    ck_assert_uint_eq(room, 7);
    ck_assert_int_eq(kvp_page_table(&pool, 0, NULL, NULL, 0, got_indptr, NULL, NULL, NULL), KVP_OK);
    ck_assert_int_eq(got_indptr[0], 0);
}
END_TEST

START_TEST(a_batchs_indices_name_each_tokens_place_over_many_pages)
{
    const uint32_t tokens[SEQUENCES] = {189, 0, 5, 2}, each[SEQUENCES] = {3, 1, 0, 4};
    int32_t batch[8], positions[8];
    struct kvp_seq seqs[SEQUENCES];
    int64_t slots[192];
    uint32_t at = 0, whole = 192, none = 0;

    fill_table(tokens, seqs);
    ck_assert_int_eq(kvp_batch_indices(&pool, SEQUENCES, seqs, each, NULL, batch, positions, slots), KVP_OK);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        for (uint32_t k = 0; k < each[i]; k++, at++) {
            uint32_t position = tokens[i] + k;

            ck_assert_int_eq(batch[at], (int)i);
            ck_assert_int_eq(positions[at], (int)position);
            ck_assert_int_eq(slots[at], (int64_t)table.rows[i][position / 3] * 3 + position % 3);
        }
    }
    memset(batch, -1, sizeof(batch));
    ck_assert_int_eq(kvp_batch_indices(&pool, SEQUENCES, seqs, each, NULL, batch, NULL, NULL), KVP_OK);
    ck_assert_int_eq(batch[at - 1], SEQUENCES - 1);
    ck_assert_int_eq(kvp_batch_indices(&pool, SEQUENCES, seqs, each, NULL, NULL, NULL, slots), KVP_OK);
    int32_t *wide = calloc(2 * whole, sizeof(*wide));
    ck_assert_ptr_nonnull(wide);
    ck_assert_int_eq(kvp_batch_indices(&pool, 1, seqs, &whole, &none, wide, wide + whole, slots), KVP_OK);
    for (uint32_t k = 0; k < whole; k++)
        ck_assert_int_eq(slots[k], (int64_t)table.rows[0][k / 3] * 3 + k % 3);
    free(wide);
}
END_TEST

START_TEST(a_batch_with_a_wrong_sequence_or_length_is_refused)
{
    const uint32_t tokens[SEQUENCES] = {4, 0, 6, 1}, over[SEQUENCES] = {4, 4, 6, 1}, most[1] = {UINT32_MAX};
    int32_t indptr[SEQUENCES + 1], indices[16], last[SEQUENCES];
    struct kvp_seq seqs[SEQUENCES];
    uint32_t lens[SEQUENCES];
    int64_t slots[16];

    fill_table(tokens, seqs);
    ck_assert_int_eq(kvp_page_table(&pool, SEQUENCES, seqs, over, 16, indptr, indices, last, NULL), KVP_EINVAL);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "sequence 1.2 has pages for 3 tokens, not 4"));
    ck_assert_int_eq(kvp_batch_indices(&pool, 1, seqs + 1, over, NULL, indices, indices, slots), KVP_EINVAL);
    ck_assert_int_eq(kvp_batch_indices(&pool, 1, seqs, most, NULL, indices, indices, slots), KVP_EINVAL);
    ck_assert_int_eq(kvp_batch_indices(&pool, 1, seqs + 1, over, NULL, NULL, NULL, NULL), KVP_EINVAL);
    ck_assert_int_eq(kvp_page_table(&pool, 1, seqs, most, 16, indptr, indices, last, NULL), KVP_EINVAL);
    seqs[2].generation++;
    ck_assert_int_eq(kvp_seq_lens(&pool, SEQUENCES, seqs, lens), KVP_ESTALE);
    ck_assert_int_eq(kvp_page_table(&pool, SEQUENCES, seqs, NULL, 16, indptr, indices, last, NULL), KVP_ESTALE);
    ck_assert_int_eq(kvp_batch_indices(&pool, 1, seqs + 2, tokens, NULL, indices, indices, slots), KVP_ESTALE);
}
END_TEST

/* ---- while it changes -------------------------------------------------------------------------------------------- */

static _Atomic bool stop;

/*
 * The daemon's part: the row grows a page at a time under one version (ids first, then the count), and is cut to a new
 * content under a new one. The ids of a version all carry it; the length is the count's tokens.
 */
static void *change_rows(void *arg)
{
    uint32_t version = 2, random = 1;

    (void)arg;
    while (!stop) {
        for (uint32_t n = 0; n < ROW_PAGES; n++) {
            store(&table.rows[1][n], version << 8 | n);
            store(&table.heads[1].row_pages, n + 1);
            store(&table.heads[1].length, version << 8 | (n + 1));
            random = random * 1664525u + 1013904223u;
            for (volatile uint32_t spin = random >> 24; spin > 0; spin--)
                ; /* so that a reader can see each state, and none is sure of it */
        }
        store(&table.heads[1].version, version + 1);
        store(&table.heads[1].row_pages, 0);
        store(&table.heads[1].length, (version + 2) << 8);
        version += 2;
        store(&table.heads[1].version, version);
    }
    return NULL;
}

/* What a reading that took none of the changes in between must look like. */
static bool one_state(const int32_t *pages, uint32_t n)
{
    uint32_t version = (uint32_t)pages[0] >> 8;
    bool good = version % 2 == 0;

    for (uint32_t k = 0; k < n; k++)
        good = good && (uint32_t)pages[k] == (version << 8 | k);
    return good;
}

START_TEST(what_is_read_while_a_row_changes_is_always_one_state)
{
    uint32_t states_read = 0, versions_read = 0, last = 0, wrong = 0, failed = 0, tokens, n;
    int32_t pages[ROW_PAGES];
    pthread_t writer;

    store(&table.heads[1].length, 2 << 8);
    stop = false;
    ck_assert_int_eq(pthread_create(&writer, NULL, change_rows, NULL), 0);
    while (states_read < STATES || versions_read < VERSIONS) {
        enum kvp_status status = kvp_row(&pool, seq, ROW_PAGES, pages, &n);

        failed += status != KVP_OK && status != KVP_EAGAIN;
        if (status == KVP_OK && n > 0) {
            wrong += !one_state(pages, n);
            states_read++;
            versions_read += (uint32_t)pages[0] >> 8 != last;
            last = (uint32_t)pages[0] >> 8;
        }
        status = kvp_seq_len(&pool, seq, &tokens);
        failed += status != KVP_OK && status != KVP_EAGAIN;
        if (status == KVP_OK)
            wrong += (tokens >> 8) % 2 != 0 || (tokens & 0xff) > ROW_PAGES;
    }
    stop = true;
    ck_assert_int_eq(pthread_join(writer, NULL), 0);
    ck_assert_uint_eq(wrong, 0);
    ck_assert_uint_eq(failed, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_table");
    TCase *tcase = tcase_create("table");
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(tcase, set_up, NULL);
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, a_length_is_the_newer_of_the_table_and_the_own_word);
    tcase_add_test(tcase, a_word_of_another_version_or_owner_does_not_count);
    tcase_add_test(tcase, a_word_over_what_is_reserved_is_clamped);
    tcase_add_test(tcase, a_handle_of_another_generation_or_out_of_range_is_stale);
    tcase_add_test(tcase, a_row_left_in_the_middle_of_a_change_is_said_to_be_so);
    tcase_add_test(tcase, a_count_over_the_rows_room_is_never_followed);
    tcase_add_test(tcase, a_lost_or_deleted_pool_and_a_lost_session_are_told_apart);
    tcase_add_test(tcase, a_forked_child_is_told_that_the_session_is_not_its_own);
    tcase_add_test(tcase, a_row_is_copied_as_far_as_there_is_room_and_counted_whole);
    tcase_add_test(tcase, a_batchs_page_table_is_its_rows_one_behind_the_other);
    tcase_add_test(tcase, a_batchs_indices_name_each_tokens_place_over_many_pages);
    tcase_add_test(tcase, a_batch_with_a_wrong_sequence_or_length_is_refused);
    tcase_add_test(tcase, what_is_read_while_a_row_changes_is_always_one_state);
    suite_add_tcase(suite, tcase);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
