/**
 * Pools over the session socket, with a real executor: what the daemon makes, hands out, loses and starts again.
 */
#include "pool_calls.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static struct test_daemon server;
static int connection;

static void setup(void)
{
    test_daemon_start(&server, NULL, NULL);
    connection = test_connect(&server);
}

static void teardown(void)
{
    close(connection);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}

START_TEST(an_attached_process_gets_memory_that_can_not_be_cut_or_fault)
{
    const Kvpool__V1__AttachReply *attached;
    struct test_reply reply;
    struct test_pool pool;

    test_create_pool(connection, "p", KVP_OK, "");
    test_attach(connection, "p", &reply);
    attached = (const Kvpool__V1__AttachReply *)(void *)reply.body;
    ck_assert_uint_eq(reply.n_fds, 4);
    for (unsigned i = 0; i < reply.n_fds; i++) {
        struct stat st;

        ck_assert_int_eq(fstat(reply.fds[i], &st), 0);
        ck_assert_uint_eq(st.st_mode & 0777, 0600);
        ck_assert_int_eq(fcntl(reply.fds[i], F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW),
                         F_SEAL_SHRINK | F_SEAL_GROW);
        ck_assert_int_ge(st.st_blocks * 512, st.st_size); /* all of it is backed */
        ck_assert_int_ne(ftruncate(reply.fds[i], 0), 0);
    }
    ck_assert_ptr_eq(mmap(NULL, 4096, PROT_WRITE, MAP_SHARED, reply.fds[attached->table_fd_index], 0), MAP_FAILED);
    ck_assert_int_eq(errno, EACCES);
    test_reply_free(&reply);
    test_map_pool(connection, "p", &pool); /* a second Attach is answered with the same */
    ck_assert_uint_eq(pool.table->magic, KVP_TABLE_MAGIC);
    ck_assert_uint_eq(pool.table->state, KVP_TABLE_LIVE);
    ck_assert_uint_eq(pool.table->bytes, pool.table_bytes);
    ck_assert_uint_eq(pool.table->pages, TEST_PAGES);
    test_unmap_pool(&pool);
    test_expect_clean_audit(connection);
}
END_TEST

START_TEST(appended_bytes_are_written_by_the_executor_and_read_in_place)
{
    struct test_pool pool;
    uint64_t seq;

    test_create_pool(connection, "p", KVP_OK, "");
    test_map_pool(connection, "p", &pool);
    seq = test_open_sequence(connection, "p", 1);
    test_append(connection, "p", seq, 0, 20, 0xab, pool.timelines);
    ck_assert_uint_eq(test_count_bytes(&pool, 0xab), 20 * TEST_TOKEN_BYTES);
    ck_assert_uint_eq(test_length(connection, "p", seq), 20);
    ck_assert_uint_ne(test_executor_pid(connection), 0);
    ck_assert_uint_ne(test_executor_pid(connection), (uint32_t)server.pid);
    test_unmap_pool(&pool);
    test_expect_clean_audit(connection);
}
END_TEST

START_TEST(a_killed_executor_is_replaced_and_the_pool_lives_on)
{
    struct test_pool pool;
    uint32_t first;
    uint64_t seq;
    int pidfd;

    test_create_pool(connection, "p", KVP_OK, "");
    test_map_pool(connection, "p", &pool);
    seq = test_open_sequence(connection, "p", 1);
    test_append(connection, "p", seq, 0, 20, 0xab, pool.timelines);
    first = test_executor_pid(connection);
    pidfd = test_pidfd(first);
    kill((pid_t)first, SIGKILL);
    test_wait_for_end(pidfd);
    test_append(connection, "p", seq, 20, 20, 0xab, pool.timelines);
    ck_assert_uint_eq(test_count_bytes(&pool, 0xab), 40 * TEST_TOKEN_BYTES);
    ck_assert_uint_ne(test_executor_pid(connection), first);
    ck_assert_uint_ne(test_executor_pid(connection), 0);
    test_unmap_pool(&pool);
    test_expect_clean_audit(connection);
}
END_TEST

START_TEST(an_executor_ends_with_its_daemon)
{
    int pidfd;

    test_create_pool(connection, "p", KVP_OK, "");
    pidfd = test_pidfd(test_executor_pid(connection));
    kill(server.pid, SIGKILL);
    test_wait_for_end(pidfd);
    ck_assert_int_eq(test_daemon_wait(&server), 128 + SIGKILL);
    test_daemon_start(&server, server.dir, NULL); /* for the teardown */
}
END_TEST

START_TEST(a_client_killed_while_its_call_waits_leaves_a_clean_ledger)
{
    for (int i = 0; i < 10; i++) {
        char name[16];
        pid_t pid;

        snprintf(name, sizeof(name), "p%d", i);
        pid = fork();
        ck_assert_int_ge(pid, 0);
        if (pid == 0) {
            test_send_create_pool(test_connect(&server), name, 1);
            kill(getpid(), SIGKILL);
        }
        ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
    }
    test_create_pool(connection, "last", KVP_OK, "");
    test_expect_clean_audit(connection);
}
END_TEST

START_TEST(a_pool_that_is_gone_leaves_no_fd_or_memory)
{
    unsigned before = 0;

    for (int i = 0; i < 5; i++) {
        test_create_pool(connection, "p", KVP_OK, "");
        test_delete_pool(connection, "p");
        if (i == 0)
            before = test_fd_count(server.pid); /* the executor runs from now on */
    }
    test_expect_fd_count(server.pid, before);
    test_expect_clean_audit(connection);
}
END_TEST

/* ---- executors that do not work ---------------------------------------------------------------------------------- */

/* @param removed  the program goes away once the daemon has started, which it would not do without */
static void refuse_with(const char *path, bool removed, const char *start_ms, const char *text)
{
    char setting[300];
    const char *arguments[] = {"--set", setting, "--set", start_ms, NULL};

    snprintf(setting, sizeof(setting), "executor.path=%s", path);
    test_daemon_start(&server, NULL, arguments);
    if (removed)
        ck_assert_int_eq(unlink(path), 0);
    connection = test_connect(&server);
    test_create_pool(connection, "p", KVP_ENODEV, text);
    kvpool__v1__get_stats_reply__free_unpacked(test_stats(connection), NULL);
    test_expect_clean_audit(connection);
    teardown();
}

START_TEST(a_missing_executor_is_said_and_the_daemon_serves_on)
{
    char dir[200], path[240];
    int fd;

    test_folder(dir);
    snprintf(path, sizeof(path), "%s/kvpool-exec", dir);
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0700);
    ck_assert_int_ge(fd, 0);
    close(fd);
    refuse_with(path, true, "executor.start_ms=20000", "");
    ck_assert_int_eq(rmdir(dir), 0);
}
END_TEST

START_TEST(an_executor_that_ends_at_once_is_said_and_the_daemon_serves_on)
{
    refuse_with("/bin/true", false, "executor.start_ms=20000", "ended");
}
END_TEST

START_TEST(an_executor_that_says_nothing_is_given_up_and_killed)
{
    char dir[200], path[256];
    FILE *script;

    test_folder(dir);
    snprintf(path, sizeof(path), "%s/silent", dir);
    script = fopen(path, "w");
    ck_assert_ptr_nonnull(script);
    fputs("#!/bin/sh\nexec sleep 1000\n", script);
    fclose(script);
    ck_assert_int_eq(chmod(path, 0700), 0);
    refuse_with(path, false, "executor.start_ms=300", "300 ms"); /* its stderr, the daemon's log, ends: so it was killed */
    unlink(path);
    rmdir(dir);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("pools");
    TCase *tests = tcase_create("with an executor");
    TCase *without = tcase_create("without one");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, an_attached_process_gets_memory_that_can_not_be_cut_or_fault);
    tcase_add_test(tests, appended_bytes_are_written_by_the_executor_and_read_in_place);
    tcase_add_test(tests, a_killed_executor_is_replaced_and_the_pool_lives_on);
    tcase_add_test(tests, an_executor_ends_with_its_daemon);
    tcase_add_test(tests, a_client_killed_while_its_call_waits_leaves_a_clean_ledger);
    tcase_add_test(tests, a_pool_that_is_gone_leaves_no_fd_or_memory);
    suite_add_tcase(suite, tests);
    tcase_set_timeout(without, 60);
    tcase_add_test(without, a_missing_executor_is_said_and_the_daemon_serves_on);
    tcase_add_test(without, an_executor_that_ends_at_once_is_said_and_the_daemon_serves_on);
    tcase_add_test(without, an_executor_that_says_nothing_is_given_up_and_killed);
    suite_add_tcase(suite, without);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
