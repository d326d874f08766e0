/**
 * What libkvpool makes of lost connections, restarted daemons, fork() and many threads.
 */
#include "client_house.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 4
#define ROUNDS  200

/* A client of the daemon in a session by lease, with "p" attached. */
static void open_by_lease(struct kvp_session_info *session, struct kvp_client **ret_client, struct kvp_pool **ret_pool)
{
    struct kvp_connect_options options = {0};

    ck_ok(kvp_session_open(client, 60000, "", NULL, 0, session));
    options.session = session->token;
    ck_ok(kvp_connect(daemon_.socket, &options, ret_client));
    ck_ok(kvp_attach(*ret_client, "p", NULL, ret_pool));
}

/* ---- the connection ---------------------------------------------------------------------------------------------- */

START_TEST(a_session_of_the_connection_ends_with_it_and_its_pools_say_so)
{
    struct kvp_seq seq = open_one(pool, 1);
    uint32_t reserved = 8, length;
    char **names;
    size_t n;

    write_tokens(pool, seq, 0, 6, 1);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL)); /* else its pages stay in quarantine as long as this process lives */
    ck_assert_int_eq(shutdown(connection_fd(), SHUT_RDWR), 0);
    ck_assert_int_eq(kvp_advance(pool, 1, &seq, &reserved, NULL, 0, NULL, NULL, NULL), KVP_ESESSION);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "attach it again"));
    ck_assert_int_eq(kvp_seq_len(pool, seq, &length), KVP_ESESSION);
    ck_assert_int_eq(kvp_pool_state(pool), KVP_ESESSION);
    ck_ok(kvp_pool_list(client, &names, &n)); /* the client is connected again, in a new session */
    ck_assert_uint_eq(n, 1);
    free(names);
    ck_ok(kvp_detach(pool));
    ck_ok(kvp_attach(client, "p", NULL, &pool));
}
END_TEST

START_TEST(a_call_that_belongs_to_no_session_is_repeated_on_the_next_connection)
{
    struct kvp_pool_spec spec = house_spec();

    spec.name = "again";
    ck_assert_int_eq(shutdown(connection_fd(), SHUT_RDWR), 0);
    ck_ok(kvp_pool_create(client, &spec, NULL));
    ck_assert_int_eq(shutdown(connection_fd(), SHUT_RDWR), 0);
    ck_ok(kvp_pool_delete(client, "again"));
}
END_TEST

START_TEST(a_session_by_lease_goes_on_over_a_lost_connection)
{
    struct kvp_session_info session;
    struct kvp_client *leased;
    struct kvp_advance *advance;
    struct kvp_pool *theirs;
    uint32_t reserved = 12, n;
    struct kvp_seq seq;

    open_by_lease(&session, &leased, &theirs);
    seq = open_one(theirs, 1);
    write_tokens(theirs, seq, 0, 6, 9);
    ck_ok(kvp_advance_begin(theirs, 1, &seq, &reserved, NULL, 0, &advance));
    ck_assert_int_eq(shutdown(connection_fd(), SHUT_RDWR), 0);
    ck_ok(kvp_advance_wait(advance, NULL, NULL, NULL)); /* asked again under the same call id */
    ck_ok(kvp_row(theirs, seq, 0, NULL, &n));
    ck_assert_uint_eq(n, 3);
    check_tokens(theirs, seq, 0, 6, 9);
    write_tokens(theirs, seq, 6, 6, 9);
    check_tokens(theirs, seq, 0, 12, 9);
    ck_ok(kvp_seq_close(theirs, 1, &seq, NULL));
    ck_ok(kvp_detach(theirs));
    ck_ok(kvp_session_close(client, session.token));
    kvp_disconnect(leased);
}
END_TEST

START_TEST(a_session_by_lease_that_is_over_is_over_for_its_pools_too)
{
    struct kvp_session_info session;
    struct kvp_client *leased;
    struct kvp_pool *theirs;
    uint32_t tokens;
    struct kvp_seq seq;

    open_by_lease(&session, &leased, &theirs);
    seq = open_one(theirs, 1);
    ck_ok(kvp_seq_close(theirs, 1, &seq, NULL));
    ck_assert_int_eq(shutdown(connection_fd(), SHUT_RDWR), 0);
    ck_ok(kvp_session_close(client, session.token));
    ck_assert_int_eq(kvp_get_seq_lens(theirs, 1, &seq, &tokens), KVP_ESESSION);
    ck_assert_int_eq(kvp_pool_state(theirs), KVP_ESESSION);
    ck_ok(kvp_detach(theirs));
    kvp_disconnect(leased);
}
END_TEST

/* ---- the daemon -------------------------------------------------------------------------------------------------- */

START_TEST(a_daemon_that_starts_with_another_ledger_means_that_pools_are_lost)
{
    const char *const arguments[] = {"--backend", "host", NULL};
    struct kvp_pool_spec spec = house_spec();
    struct kvp_seq seq = open_one(pool, 1);
    uint32_t reserved = 4;
    char dir[200];

    strcpy(dir, daemon_.dir);
    ck_assert_int_eq(kill(daemon_.pid, SIGKILL), 0);
    ck_assert_int_eq(test_daemon_wait(&daemon_), 128 + SIGKILL);
    test_daemon_start(&daemon_, dir, arguments);
    ck_assert_int_eq(kvp_advance(pool, 1, &seq, &reserved, NULL, 0, NULL, NULL, NULL), KVP_ELOST);
    ck_assert_int_eq(kvp_pool_state(pool), KVP_ELOST);
    ck_ok(kvp_detach(pool));
    ck_ok(kvp_pool_create(client, &spec, NULL));
    ck_ok(kvp_attach(client, "p", NULL, &pool));
}
END_TEST

START_TEST(without_a_daemon_calls_fail_within_the_time_to_reconnect)
{
    struct kvp_connect_options options = {.reconnect_ms = 200};
    const char *const arguments[] = {"--backend", "host", NULL};
    struct kvp_pool_spec spec = house_spec();
    struct kvp_client *other;
    char **names, dir[200];
    uint64_t before_ms;
    size_t n;

    strcpy(dir, daemon_.dir);
    ck_ok(kvp_connect(daemon_.socket, &options, &other));
    ck_assert_int_eq(kill(daemon_.pid, SIGKILL), 0);
    ck_assert_int_eq(test_daemon_wait(&daemon_), 128 + SIGKILL);
    before_ms = test_now_ms();
    ck_assert_int_eq(kvp_pool_list(other, &names, &n), KVP_EDISCONNECTED);
    ck_assert_uint_ge(test_now_ms() - before_ms, 150);
    ck_assert_uint_lt(test_now_ms() - before_ms, TEST_WAIT_MS);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), daemon_.socket));
    test_daemon_start(&daemon_, dir, arguments);
    ck_ok(kvp_pool_list(other, &names, &n));
    free(names);
    kvp_disconnect(other);
    ck_ok(kvp_detach(pool));
    ck_ok(kvp_pool_create(client, &spec, NULL));
    ck_ok(kvp_attach(client, "p", NULL, &pool));
}
END_TEST

START_TEST(connecting_where_nobody_listens_is_said)
{
    struct kvp_client *other;
    char path[300];

    ck_assert_int_eq(kvp_connect("/nowhere/at/all.sock", NULL, &other), KVP_EDISCONNECTED);
    memset(path, 'x', sizeof(path));
    path[sizeof(path) - 1] = 0;
    ck_assert_int_eq(kvp_connect(path, NULL, &other), KVP_EINVAL);
}
END_TEST

/* ---- fork, threads ----------------------------------------------------------------------------------------------- */

static int child_is_told(struct kvp_seq seq)
{
    uint32_t reserved = 4, tokens;
    struct kvp_pool *again;
    char **names;
    size_t n;

    if (kvp_advance(pool, 1, &seq, &reserved, NULL, 0, NULL, NULL, NULL) != KVP_ESESSION ||
        kvp_seq_len(pool, seq, &tokens) != KVP_ESESSION || kvp_pool_list(client, &names, &n) != KVP_ESESSION ||
        kvp_attach(client, "p", NULL, &again) != KVP_ESESSION ||
        strstr(kvp_error_text(), "connect again after fork()") == NULL)
        return 1;
    if (kvp_detach(pool) != KVP_OK)
        return 2;
    kvp_disconnect(client);
    if (kvp_connect(daemon_.socket, NULL, &client) != KVP_OK || kvp_pool_list(client, &names, &n) != KVP_OK)
        return 3;
    free(names);
    kvp_disconnect(client);
    return 0;
}

START_TEST(a_forked_child_is_told_and_can_connect_by_itself)
{
    struct kvp_seq seq = open_one(pool, 1);
    int status;
    pid_t pid = fork();

    ck_assert_int_ge(pid, 0);
    if (pid == 0)
        _exit(child_is_told(seq));
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), 0);
    write_tokens(pool, seq, 0, 5, 2);
    check_tokens(pool, seq, 0, 5, 2);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

/* Each thread with sequences of its own, over the one connection. @return the first failure's text, or NULL */
static void *use_client(void *arg)
{
    uint64_t key = 1000 + (uintptr_t)arg;
    struct kvp_advance *advance;
    uint32_t reserved, n;
    struct kvp_seq seq;

    for (uint32_t i = 0; i < ROUNDS; i++) {
        reserved = 1 + i % (2 * PAGE_TOKENS);
        if (kvp_seq_open(pool, 1, &key, 0, &seq) != KVP_OK ||
            kvp_advance_begin(pool, 1, &seq, &reserved, NULL, 0, &advance) != KVP_OK)
            return strdup(kvp_error_text());
        if (i % 3 == 0) {
            struct kvp_stats *stats;

            if (kvp_get_stats(client, &stats) != KVP_OK)
                return strdup(kvp_error_text());
            kvp_stats_free(stats);
        }
        if (kvp_advance_wait(advance, NULL, NULL, NULL) != KVP_OK || kvp_row(pool, seq, 0, NULL, &n) != KVP_OK)
            return strdup(kvp_error_text());
        if (n != (reserved + PAGE_TOKENS - 1) / PAGE_TOKENS)
            return strdup("a row is not what was asked for");
        if (kvp_seq_close(pool, 1, &seq, NULL) != KVP_OK)
            return strdup(kvp_error_text());
    }
    return NULL;
}

START_TEST(threads_share_a_client_and_each_gets_its_own_answers)
{
    pthread_t threads[THREADS];
    void *failed;

    for (uintptr_t i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, use_client, (void *)i), 0);
    for (int i = 0; i < THREADS; i++) {
        ck_assert_int_eq(pthread_join(threads[i], &failed), 0);
        ck_assert_msg(failed == NULL, "thread %d: %s", i, (char *)failed);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_loss");
    TCase *tcase = tcase_create("loss");
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(tcase, house_open, house_close);
    tcase_set_timeout(tcase, 100);
    tcase_add_test(tcase, a_session_of_the_connection_ends_with_it_and_its_pools_say_so);
    tcase_add_test(tcase, a_call_that_belongs_to_no_session_is_repeated_on_the_next_connection);
    tcase_add_test(tcase, a_session_by_lease_goes_on_over_a_lost_connection);
    tcase_add_test(tcase, a_session_by_lease_that_is_over_is_over_for_its_pools_too);
    tcase_add_test(tcase, a_daemon_that_starts_with_another_ledger_means_that_pools_are_lost);
    tcase_add_test(tcase, without_a_daemon_calls_fail_within_the_time_to_reconnect);
    tcase_add_test(tcase, connecting_where_nobody_listens_is_said);
    tcase_add_test(tcase, a_forked_child_is_told_and_can_connect_by_itself);
    tcase_add_test(tcase, threads_share_a_client_and_each_gets_its_own_answers);
    suite_add_tcase(suite, tcase);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
