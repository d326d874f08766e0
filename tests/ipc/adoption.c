/**
 * A daemon after a daemon: killed, stopped or replaced under kvpool-keeper, while its clients stay connected.
 */
#include "pool_calls.h"

#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct test_daemon keeper;
static int connection;

static void setup(void)
{
    test_keeper_start(&keeper, NULL);
    connection = test_connect(&keeper);
}

static void teardown(void)
{
    close(connection);
    ck_assert_int_eq(test_keeper_stop(&keeper), 0);
}

static uint64_t epoch_of(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    uint64_t epoch = stats->epoch;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return epoch;
}

static uint32_t free_pages(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    uint32_t pages;

    ck_assert_uint_eq(stats->n_pools, 1);
    pages = stats->pools[0]->free_pages;
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return pages;
}

/* Signal the daemon and wait until it is gone; the keeper starts the next one. */
static void end_daemon(int signal_number)
{
    pid_t pid = test_keeper_child(&keeper);
    int pidfd;

    ck_assert_int_gt(pid, 0);
    pidfd = test_pidfd((uint32_t)pid);
    kill(pid, signal_number);
    test_wait_for_end(pidfd);
}

START_TEST(a_killed_daemon_is_followed_by_one_that_has_everything)
{
    struct test_pool pool;
    struct stat before, after;
    uint8_t instance[16];
    uint64_t seq, epoch, worst_ms = 0;

    ck_assert_int_eq(fstat(connection, &before), 0);
    test_create_pool(connection, "p", KVP_OK, "");
    test_map_pool(connection, "p", &pool);
    memcpy(instance, pool.table->instance, sizeof(instance));
    epoch = epoch_of(connection);
    seq = test_open_sequence(connection, "p", 1);
    for (uint32_t i = 0; i < 10; i++) {
        uint64_t start;

        test_append(connection, "p", seq, 20 * i, 20, 0xab, pool.timelines);
        end_daemon(SIGKILL);
        start = test_now_ms();
        ck_assert_uint_eq(test_length(connection, "p", seq), 20 * (i + 1)); /* over the connection there was */
        if (test_now_ms() - start > worst_ms)
            worst_ms = test_now_ms() - start;
        ck_assert_uint_eq(test_count_bytes(&pool, 0xab), 20 * (i + 1) * TEST_TOKEN_BYTES);
        ck_assert_uint_eq(epoch_of(connection), epoch + i + 1);
        ck_assert_uint_eq(pool.table->epoch, epoch + i + 1); /* in the mapping there was */
        ck_assert_uint_eq(pool.table->state, KVP_TABLE_LIVE);
        ck_assert_mem_eq(pool.table->instance, instance, sizeof(instance));
        test_expect_clean_audit(connection);
    }
    ck_assert_int_eq(fstat(connection, &after), 0);
    ck_assert_uint_eq(before.st_ino, after.st_ino);
    printf("worst pause of 10 kills: %llu ms\n", (unsigned long long)worst_ms);
    test_unmap_pool(&pool);
}
END_TEST

START_TEST(the_pause_of_an_adoption_is_told)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(connection);
    struct timespec now;
    uint64_t from_ms, pause_us, at_ms, now_ms;

    ck_assert_uint_eq(stats->adoptions, 0);
    ck_assert_uint_eq(stats->last_pause_us, 0);
    ck_assert_uint_eq(stats->last_pause_unix_ms, 0);
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    from_ms = test_now_ms();
    end_daemon(SIGKILL);
    stats = test_stats(connection);
    pause_us = stats->last_pause_us;
    at_ms = stats->last_pause_unix_ms;
    clock_gettime(CLOCK_REALTIME, &now);
    now_ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    ck_assert_uint_eq(stats->adoptions, 1);
    ck_assert_uint_gt(pause_us, 0);
    ck_assert_uint_le(pause_us / 1000, test_now_ms() - from_ms + 11); /* a tick of the kernel's, and what is cut off */
    ck_assert_uint_le(now_ms - at_ms, test_now_ms() - from_ms + 1);
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    stats = test_stats(connection);
    ck_assert_uint_eq(stats->last_pause_us, pause_us); /* it is over */
    ck_assert_uint_eq(stats->last_pause_unix_ms, at_ms);
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
}
END_TEST

START_TEST(a_pause_is_not_longer_because_nobody_calls)
{
    struct timespec idle = {.tv_nsec = 300 * 1000000};
    Kvpool__V1__GetStatsReply *stats;
    uint64_t from_ms, served_ms;

    /* A connection that was not yet parked ends with its daemon: one that was answered is. */
    kvpool__v1__get_stats_reply__free_unpacked(test_stats(connection), NULL);
    from_ms = test_now_ms();
    end_daemon(SIGKILL);
    ck_assert(test_daemon_says(&keeper, "serves in"));
    served_ms = test_now_ms();
    nanosleep(&idle, NULL);
    stats = test_stats(connection);
    ck_assert_uint_gt(stats->last_pause_us, 0);
    ck_assert_uint_le(stats->last_pause_us / 1000, served_ms - from_ms + 11);
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
}
END_TEST

START_TEST(a_terminated_daemon_is_replaced_without_a_word_to_its_clients)
{
    struct test_pool pool;
    uint64_t seq;

    test_create_pool(connection, "p", KVP_OK, "");
    test_map_pool(connection, "p", &pool);
    seq = test_open_sequence(connection, "p", 1);
    test_append(connection, "p", seq, 0, 20, 0xab, pool.timelines);
    end_daemon(SIGTERM);
    test_append(connection, "p", seq, 20, 20, 0xab, pool.timelines);
    ck_assert_uint_eq(test_count_bytes(&pool, 0xab), 40 * TEST_TOKEN_BYTES);
    test_expect_clean_audit(connection);
    test_unmap_pool(&pool);
}
END_TEST

static int make_memfd(size_t bytes, int seals)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

/* Memory of tokens whose bytes are `fill`, registered: its number. */
static uint32_t register_tokens(uint32_t tokens, unsigned char fill)
{
    Kvpool__V1__RegisterBufferRequest request = KVPOOL__V1__REGISTER_BUFFER_REQUEST__INIT;
    unsigned char bytes[TEST_TOKEN_BYTES];
    int fd = make_memfd(4096 + tokens * TEST_TOKEN_BYTES, F_SEAL_SHRINK | F_SEAL_GROW);
    struct test_reply reply;
    uint32_t number;

    memset(bytes, fill, sizeof(bytes));
    for (uint32_t i = 0; i < tokens; i++)
        ck_assert_int_eq(pwrite(fd, bytes, sizeof(bytes), (off_t)(4096 + i * sizeof(bytes))), sizeof(bytes));
    request.device = (char *)(uintptr_t)"host";
    request.bytes = tokens * TEST_TOKEN_BYTES;
    request.offset = 4096;
    test_send(connection, METHOD(REGISTER_BUFFER), 1, &request.base, &fd, 1);
    test_receive(connection, &kvpool__v1__register_buffer_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    number = ((Kvpool__V1__RegisterBufferReply *)(void *)reply.body)->buffer;
    test_reply_free(&reply);
    close(fd);
    return number;
}

static enum kvp_status unregister(uint32_t number)
{
    Kvpool__V1__UnregisterBufferRequest request = KVPOOL__V1__UNREGISTER_BUFFER_REQUEST__INIT;
    struct test_reply reply;
    enum kvp_status status;

    request.buffer = number;
    test_call(connection, METHOD(UNREGISTER_BUFFER), &request.base, &kvpool__v1__unregister_buffer_reply__descriptor,
              &reply);
    status = reply.status;
    test_reply_free(&reply);
    return status;
}

START_TEST(registered_buffers_outlive_the_daemon_and_its_executor)
{
    struct test_pool pool;
    uint32_t a, b;
    uint64_t seq;

    test_create_pool(connection, "p", KVP_OK, "");
    test_map_pool(connection, "p", &pool);
    seq = test_open_sequence(connection, "p", 1);
    a = register_tokens(20, 0xab);
    b = register_tokens(20, 0xcd);
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t executor = test_executor_pid(connection);

        if (i == 2 && executor != 0)
            kill((pid_t)executor, SIGKILL);
        end_daemon(SIGKILL);
        test_append_buffer(connection, "p", seq, 40 * i, 20, a, pool.timelines);
        test_append_buffer(connection, "p", seq, 40 * i + 20, 20, b, pool.timelines);
        ck_assert_uint_eq(test_count_bytes(&pool, 0xab), 20 * (i + 1) * TEST_TOKEN_BYTES);
        ck_assert_uint_eq(test_count_bytes(&pool, 0xcd), 20 * (i + 1) * TEST_TOKEN_BYTES);
        test_expect_clean_audit(connection);
    }
    ck_assert_int_eq(unregister(a), KVP_OK);
    end_daemon(SIGKILL);
    ck_assert_int_eq(unregister(a), KVP_ENOENT);
    ck_assert_uint_eq(register_tokens(20, 0xef), a);
    ck_assert_int_eq(unregister(a), KVP_OK);
    ck_assert_int_eq(unregister(b), KVP_OK);
    test_expect_clean_audit(connection);
    test_unmap_pool(&pool);
}
END_TEST

START_TEST(requests_sent_to_nobody_are_answered_by_the_next)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    uint64_t epoch = epoch_of(connection);
    int newcomer;

    kill(keeper.pid, SIGSTOP); /* nobody is started until it goes on */
    end_daemon(SIGKILL);
    for (uint64_t tag = 1; tag <= 20; tag++)
        test_send(connection, METHOD(GET_STATS), tag, &request.base, NULL, 0);
    newcomer = test_connect(&keeper); /* the listening socket is kept too */
    kill(keeper.pid, SIGCONT);
    for (uint64_t tag = 1; tag <= 20;) {
        struct test_reply reply;

        test_receive(connection, &kvpool__v1__get_stats_reply__descriptor, &reply);
        ck_assert_int_eq(reply.status, KVP_OK);
        if (reply.tag > 1000) { /* the answer to epoch_of, said again: the daemon died before it took the request off */
            test_reply_free(&reply);
            continue;
        }
        ck_assert_uint_eq(reply.tag, tag++);
        ck_assert_uint_eq(((Kvpool__V1__GetStatsReply *)(void *)reply.body)->epoch, epoch + 1);
        test_reply_free(&reply);
    }
    ck_assert_uint_eq(epoch_of(newcomer), epoch + 1);
    close(newcomer);
}
END_TEST

START_TEST(a_worker_that_dies_while_there_is_no_daemon_is_not_forgotten)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS;
    uint32_t free_before;
    int ready[2];
    pid_t worker;
    char byte;

    test_create_pool(connection, "p", KVP_OK, "");
    free_before = free_pages(connection);
    ck_assert_int_eq(pipe(ready), 0);
    worker = fork();
    ck_assert_int_ge(worker, 0);
    if (worker == 0) {
        int socket = test_connect(&keeper);
        struct test_pool pool;

        test_map_pool(socket, "p", &pool);
        test_append(socket, "p", test_open_sequence(socket, "p", 1), 0, 100, 0xab, pool.timelines);
        if (write(ready[1], "", 1) != 1)
            _exit(1);
        for (;;)
            pause();
    }
    ck_assert_int_eq(read(ready[0], &byte, 1), 1);
    ck_assert_uint_lt(free_pages(connection), free_before);
    kill(keeper.pid, SIGSTOP);
    end_daemon(SIGKILL);
    kill(worker, SIGKILL);
    ck_assert_int_eq(waitpid(worker, NULL, 0), worker);
    kill(keeper.pid, SIGCONT);
    while (free_pages(connection) != free_before) {
        ck_assert_msg(test_now_ms() < until, "the dead worker's pages do not come back");
        sched_yield();
    }
    test_expect_clean_audit(connection);
}
END_TEST

START_TEST(what_is_closed_is_not_kept)
{
    unsigned before = (epoch_of(connection), test_fd_count(keeper.pid)) + 2; /* an executor's socket and pidfd to come */

    for (int i = 0; i < 5; i++) {
        int other = test_connect(&keeper);

        test_create_pool(other, "p", KVP_OK, "");
        test_delete_pool(other, "p");
        close(other);
    }
    end_daemon(SIGKILL);
    epoch_of(connection);
    test_expect_fd_count(keeper.pid, before);
    test_expect_clean_audit(connection);
}
END_TEST

START_TEST(the_keepers_end_gives_the_memory_up)
{
    int pidfd, executor;

    test_create_pool(connection, "p", KVP_OK, "");
    pidfd = test_pidfd((uint32_t)test_keeper_child(&keeper));
    executor = test_pidfd(test_executor_pid(connection));
    ck_assert_int_eq(test_keeper_stop(&keeper), 0);
    test_wait_for_end(pidfd);
    test_wait_for_end(executor);
    ck_assert(test_hung_up(connection));
    close(connection);
    setup(); /* for the teardown */
}
END_TEST

static Kvpool__V1__Keeper keeper_of(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    Kvpool__V1__Keeper said = stats->keeper;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return said;
}

START_TEST(a_keeper_that_dies_is_missed_at_once_and_the_daemon_serves_on)
{
    struct test_pool pool, late;
    uint64_t seq;
    int pidfd;
    pid_t pid = test_keeper_child(&keeper);

    test_create_pool(connection, "p", KVP_OK, "");
    test_map_pool(connection, "p", &pool);
    seq = test_open_sequence(connection, "p", 1);
    ck_assert_int_eq(keeper_of(connection), KVPOOL__V1__KEEPER__KEEPER_THERE);
    pidfd = test_pidfd((uint32_t)pid);
    kill(keeper.pid, SIGKILL);
    ck_assert_int_eq(waitpid(keeper.pid, NULL, 0), keeper.pid);
    ck_assert(test_daemon_says(&keeper, "nobody keeps the memory"));
    ck_assert_int_eq(keeper_of(connection), KVPOOL__V1__KEEPER__KEEPER_GONE);
    test_append(connection, "p", seq, 0, 20, 0xab, pool.timelines);
    test_create_pool(connection, "late", KVP_OK, ""); /* which fails where it is waited for to be kept */
    test_map_pool(connection, "late", &late);
    test_unmap_pool(&late);
    test_unmap_pool(&pool);
    kill(pid, SIGTERM);
    test_wait_for_end(pidfd);
    close(keeper.log);
    close(connection);
    ck_assert_int_eq(rmdir(keeper.dir), 0); /* its sockets are gone: nobody comes after it */
    setup();                                /* for the teardown */
}
END_TEST

/* ---- what can not be adopted ------------------------------------------------------------------------------------- */

START_TEST(a_ledger_that_is_none_is_refused_until_it_is_given_up)
{
    static const char *const environment[] = {"LISTEN_FDNAMES=ledger", NULL};
    static const char *const discard[] = {"--discard-state", NULL};
    static const struct {
        size_t bytes;
        int seals;
    } wrong[] = {{1u << 30, F_SEAL_SHRINK | F_SEAL_GROW}, {1u << 30, F_SEAL_SHRINK}, {4096, F_SEAL_SHRINK | F_SEAL_GROW}};
    struct test_daemon server;
    char dir[200];

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        int fd = make_memfd(wrong[i].bytes, wrong[i].seals);

        test_folder(dir);
        test_daemon_spawn(&server, dir, NULL, environment, fd);
        ck_assert(test_daemon_says(&server, "can not be adopted"));
        ck_assert_int_eq(test_daemon_wait(&server), 3);
        test_daemon_spawn(&server, dir, discard, environment, fd);
        ck_assert(test_daemon_says(&server, "serves in"));
        ck_assert_int_eq(test_daemon_stop(&server), 0);
        close(fd);
    }
}
END_TEST

START_TEST(a_thing_without_a_ledger_is_closed)
{
    static const char *const environment[] = {"LISTEN_FDNAMES=t3", NULL};
    struct test_daemon server;
    int fd = make_memfd(4096, F_SEAL_SHRINK | F_SEAL_GROW), socket;

    test_daemon_spawn(&server, NULL, NULL, environment, fd);
    ck_assert(test_daemon_says(&server, "serves in"));
    socket = test_connect(&server);
    test_expect_clean_audit(socket);
    close(socket);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
    close(fd);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("adoption");
    TCase *tests = tcase_create("under the keeper");
    TCase *refused = tcase_create("what can not be adopted");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, a_killed_daemon_is_followed_by_one_that_has_everything);
    tcase_add_test(tests, the_pause_of_an_adoption_is_told);
    tcase_add_test(tests, a_pause_is_not_longer_because_nobody_calls);
    tcase_add_test(tests, a_terminated_daemon_is_replaced_without_a_word_to_its_clients);
    tcase_add_test(tests, registered_buffers_outlive_the_daemon_and_its_executor);
    tcase_add_test(tests, requests_sent_to_nobody_are_answered_by_the_next);
    tcase_add_test(tests, a_worker_that_dies_while_there_is_no_daemon_is_not_forgotten);
    tcase_add_test(tests, what_is_closed_is_not_kept);
    tcase_add_test(tests, the_keepers_end_gives_the_memory_up);
    tcase_add_test(tests, a_keeper_that_dies_is_missed_at_once_and_the_daemon_serves_on);
    suite_add_tcase(suite, tests);
    tcase_set_timeout(refused, 60);
    tcase_add_test(refused, a_ledger_that_is_none_is_refused_until_it_is_given_up);
    tcase_add_test(refused, a_thing_without_a_ledger_is_closed);
    suite_add_tcase(suite, refused);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
