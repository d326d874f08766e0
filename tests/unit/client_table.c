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
    tcase_add_test(tcase, what_is_read_while_a_row_changes_is_always_one_state);
    suite_add_tcase(suite, tcase);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
