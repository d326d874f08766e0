/**
 * The audit of a daemon that serves: a word of its ledger, changed behind its back, is found, by the call and by the
 * audit that it makes by itself; and it goes on serving.
 */
#include "layout.h" /* where a word is that must be empty */
#include "pool_calls.h"

#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define RECORD_OFFSET (ROOT_BYTES + (TEST_PAGES - 1) * sizeof(block_page)) /* the first pool's last page */

/* As an operator could: the ledger is a memory object of the daemon's. */
static int open_ledger(pid_t daemon)
{
    char folder[64], path[PATH_MAX], link[PATH_MAX];
    int fd = -1;
    DIR *dir;

    snprintf(folder, sizeof(folder), "/proc/%d/fd", (int)daemon);
    dir = opendir(folder);
    ck_assert_ptr_nonnull(dir);
    for (const struct dirent *entry = readdir(dir); entry != NULL && fd < 0; entry = readdir(dir)) {
        ssize_t n;

        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        n = readlink(path, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = 0;
        if (strncmp(link, "/memfd:kvpool-ledger", 20) == 0)
            fd = open(path, O_RDWR | O_CLOEXEC);
    }
    closedir(dir);
    ck_assert_int_ge(fd, 0);
    return fd;
}

static void store_record(int ledger, uint64_t record)
{
    ck_assert_int_eq(pwrite(ledger, &record, sizeof(record), (off_t)RECORD_OFFSET), sizeof(record));
}

/* @return the violations; the first one's text holds `text` */
static uint32_t audit(int socket, const char *text)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    const Kvpool__V1__AuditReply *reply;
    struct test_reply answer;
    uint32_t count;

    test_call(socket, METHOD(AUDIT), &request.base, &kvpool__v1__audit_reply__descriptor, &answer);
    ck_assert_msg(answer.status == KVP_OK, "%s", answer.text);
    reply = (const Kvpool__V1__AuditReply *)(void *)answer.body;
    count = reply->count;
    if (count > 0)
        ck_assert_msg(strstr(reply->violations[0], text) != NULL, "%s", reply->violations[0]);
    test_reply_free(&answer);
    return count;
}

START_TEST(a_word_changed_behind_its_back_is_found_by_the_call_and_the_daemon_serves_on)
{
    struct test_daemon daemon;
    struct test_pool pool;
    uint64_t seq;
    int socket, ledger;

    test_daemon_start(&daemon, NULL, NULL);
    socket = test_connect(&daemon);
    test_create_pool(socket, "p", KVP_OK, "");
    test_map_pool(socket, "p", &pool);
    ledger = open_ledger(daemon.pid);
    ck_assert_uint_eq(audit(socket, ""), 0);
    store_record(ledger, 1);
    ck_assert_uint_eq(audit(socket, "page 63"), 1);
    seq = test_open_sequence(socket, "p", 1);
    test_append(socket, "p", seq, 0, 20, 0xab, pool.timelines);
    ck_assert_uint_eq(test_length(socket, "p", seq), 20);
    ck_assert_uint_eq(audit(socket, "page 63"), 1);
    store_record(ledger, 0);
    ck_assert_uint_eq(audit(socket, ""), 0);
    close(ledger);
    test_unmap_pool(&pool);
    close(socket);
    ck_assert_int_eq(test_daemon_stop(&daemon), 0);
}
END_TEST

START_TEST(it_is_found_by_the_audit_that_the_daemon_makes_by_itself)
{
    static const char *const arguments[] = {"--set", "ledger.audit_s=1", NULL};
    Kvpool__V1__GetStatsReply *stats;
    struct test_daemon daemon;
    int socket, ledger;

    test_daemon_start(&daemon, NULL, arguments);
    socket = test_connect(&daemon);
    test_create_pool(socket, "p", KVP_OK, "");
    ledger = open_ledger(daemon.pid);
    store_record(ledger, 1);
    test_open_sequence(socket, "p", 1);
    ck_assert(test_daemon_says(&daemon, "the audit found 1 violations"));
    stats = test_stats(socket);
    ck_assert_uint_ge(stats->audits, 1);
    ck_assert_uint_eq(stats->last_audit_violations, 1);
    ck_assert_uint_gt(stats->last_audit_unix_ms, 0);
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    close(ledger);
    close(socket);
    ck_assert_int_eq(test_daemon_stop(&daemon), 0);
}
END_TEST

START_TEST(it_ends_in_order_while_an_audit_is_under_way)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    struct test_daemon daemon;
    int socket;

    test_daemon_start(&daemon, NULL, NULL);
    socket = test_connect(&daemon);
    test_create_pool(socket, "p", KVP_OK, "");
    test_send(socket, METHOD(AUDIT), 7, &request.base, NULL, 0);
    ck_assert_int_eq(test_daemon_stop(&daemon), 0);
    close(socket);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("audits");
    TCase *tests = tcase_create("of a daemon that serves");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, a_word_changed_behind_its_back_is_found_by_the_call_and_the_daemon_serves_on);
    tcase_add_test(tests, it_is_found_by_the_audit_that_the_daemon_makes_by_itself);
    tcase_add_test(tests, it_ends_in_order_while_an_audit_is_under_way);
    suite_add_tcase(suite, tests);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
