/**
 * Page digests, end to end: what libkvpool's kernels wrote is digested when it is sealed; a byte changed behind that,
 * through a worker's own mapping, is reported with its page, and nothing else ever is: not after the daemon's death, nor
 * its executor's.
 */
#include "client_house.h"

#include "pool_calls.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

static void begin(void)
{
    struct kvp_connect_options options = {.reconnect_ms = TEST_WAIT_MS};
    struct kvp_pool_spec spec = house_spec();

    test_keeper_start(&daemon_, NULL);
    ck_ok(kvp_connect(daemon_.socket, &options, &client));
    spec.page_digests = true;
    ck_ok(kvp_pool_create(client, &spec, NULL));
    ck_ok(kvp_attach(client, "p", NULL, &pool));
}

static void end(void)
{
    kvp_disconnect(client);
    ck_assert_int_eq(test_keeper_stop(&daemon_), 0);
}

/* n tokens behind `start`, which the daemon looks at: so it seals what is full. */
static void write_and_look(struct kvp_seq seq, uint32_t start, uint32_t n, unsigned salt)
{
    uint32_t length;

    write_tokens(pool, seq, start, n, salt);
    ck_ok(kvp_get_seq_lens(pool, 1, &seq, &length));
    ck_assert_uint_eq(length, start + n);
}

/* An audit that finds every sealed page's digest taken. It is asked for until it does: they are taken behind the calls. */
static struct kvp_page_audit *whole_audit(void)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS;
    struct kvp_page_audit *audit;

    for (;;) {
        ck_ok(kvp_audit_pages(client, &audit));
        if (audit->pages_without_digest == 0)
            return audit;
        ck_assert_uint_lt(test_now_ms(), until);
        free(audit);
    }
}

static void expect_sound(uint64_t pages)
{
    struct kvp_page_audit *audit = whole_audit();

    ck_assert_msg(audit->violations == 0, "%s", audit->n_texts > 0 ? audit->texts[0] : "?");
    ck_assert_uint_eq(audit->pages_damaged, 0);
    ck_assert_uint_eq(audit->n_damaged, 0);
    ck_assert_uint_eq(audit->pages_checked, pages);
    free(audit);
}

/* The first byte of a plane in a sequence's page. */
static unsigned char *byte_of(struct kvp_seq seq, uint32_t index, uint32_t plane, uint32_t *ret_page)
{
    struct kvp_plane_view view;
    int32_t pages[PAGES];
    uint32_t n;

    ck_ok(kvp_row(pool, seq, PAGES, pages, &n));
    ck_assert_uint_lt(index, n);
    ck_ok(kvp_pool_plane(pool, 0, plane, &view));
    *ret_page = (uint32_t)pages[index];
    return (unsigned char *)view.base + pages[index] * view.page_stride;
}

static void expect_damage(uint32_t page)
{
    struct kvp_page_audit *audit = whole_audit();

    ck_assert_uint_eq(audit->pages_damaged, 1);
    ck_assert_uint_eq(audit->violations, 1);
    ck_assert_uint_eq(audit->n_damaged, 1);
    ck_assert_str_eq(audit->damaged_pools[0], "p");
    ck_assert_uint_eq(audit->damaged_pages[0], page);
    ck_assert_ptr_nonnull(strstr(audit->texts[0], "its bytes are not those that were sealed"));
    free(audit);
}

START_TEST(a_byte_changed_in_a_sealed_page_is_reported_with_its_page_and_nothing_else_is)
{
    struct kvp_seq seq = open_one(pool, 1);
    unsigned char *byte;
    uint32_t page;

    write_and_look(seq, 0, 5 * PAGE_TOKENS + 2, 3); /* the last page is open: nobody answers for it yet */
    expect_sound(5);
    for (uint32_t plane = 0; plane < PLANES; plane++) {
        byte = byte_of(seq, plane, plane, &page);
        *byte ^= 0x10;
        expect_damage(page);
        *byte ^= 0x10;
    }
    byte = byte_of(seq, 5, 0, &page);
    *byte ^= 0x10;
    expect_sound(5);
    write_and_look(seq, 5 * PAGE_TOKENS + 2, 2, 3); /* and now it is sealed, as it is */
    expect_sound(6);
    check_tokens(pool, seq, 0, 5 * PAGE_TOKENS, 3);
}
END_TEST

static void end_process(pid_t pid)
{
    int pidfd = test_pidfd((uint32_t)pid);

    kill(pid, SIGKILL);
    test_wait_for_end(pidfd);
}

START_TEST(digests_are_right_after_the_daemon_and_its_executor_were_killed)
{
    struct kvp_stats *stats;
    struct kvp_seq seqs[6];
    uint32_t page;

    for (uint32_t i = 0; i < 6; i++) {
        seqs[i] = open_one(pool, i + 1);
        write_and_look(seqs[i], 0, 3 * PAGE_TOKENS, 40 + i);
        if (i % 2 == 0)
            end_process(test_keeper_child(&daemon_));
        ck_ok(kvp_get_stats(client, &stats));
        if (i % 3 == 1)
            end_process((pid_t)stats->executors[0].pid);
        kvp_stats_free(stats);
    }
    expect_sound(6 * 3);
    for (uint32_t i = 0; i < 6; i++) {
        unsigned char *byte = byte_of(seqs[i], i % 3, i % PLANES, &page);

        *byte ^= 1;
        expect_damage(page);
        *byte ^= 1;
    }
    ck_ok(kvp_seq_close(pool, 3, seqs, NULL));
    for (;;) { /* their pages come back in the daemon's own time */
        struct kvp_page_audit *audit = whole_audit();
        bool gone = audit->pages_checked == 3 * 3;

        free(audit);
        if (gone)
            break;
    }
    expect_sound(3 * 3);
}
END_TEST

START_TEST(a_pool_that_keeps_no_digests_has_none_compared)
{
    struct kvp_pool_spec spec = house_spec();
    struct kvp_pool *plain;
    struct kvp_seq seq;

    spec.name = "plain";
    ck_ok(kvp_pool_create(client, &spec, NULL));
    ck_ok(kvp_attach(client, "plain", NULL, &plain));
    seq = open_one(plain, 1);
    write_tokens(plain, seq, 0, 3 * PAGE_TOKENS, 3);
    expect_sound(0);
    ck_ok(kvp_seq_close(plain, 1, &seq, NULL));
    ck_ok(kvp_detach(plain));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_digests");
    TCase *tests = tcase_create("digests");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_checked_fixture(tests, begin, end);
    tcase_add_test(tests, a_byte_changed_in_a_sealed_page_is_reported_with_its_page_and_nothing_else_is);
    tcase_add_test(tests, digests_are_right_after_the_daemon_and_its_executor_were_killed);
    tcase_add_test(tests, a_pool_that_keeps_no_digests_has_none_compared);
    suite_add_tcase(suite, tests);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
