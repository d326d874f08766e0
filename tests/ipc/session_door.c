/**
 * The session socket against real processes: whatever comes in, the daemon answers, keeps nothing, and lives on.
 */
#include "daemon.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define GET_STATS KVPOOL__V1__METHOD__METHOD_GET_STATS

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

/* Fails unless it is answered. */
static uint64_t stats_calls(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    uint64_t calls = stats->calls;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return calls;
}

/* Sessions that live over the session socket, as the daemon counts them. */
static size_t stats_sessions(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    size_t n = stats->n_sessions;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return n;
}

/* Ask until there are so many: the daemon learns of deaths by events of its own. */
static void wait_for_sessions(int socket, size_t wanted)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS;
    size_t n;

    while ((n = stats_sessions(socket)) != wanted) {
        ck_assert_msg(test_now_ms() < until, "%zu sessions are left, not %zu", n, wanted);
        sched_yield();
    }
}

static void send_bytes(int socket, const void *bytes, size_t n, const int *fds, unsigned n_fds)
{
    struct kvp_wire_packet packet = {.bytes = (void *)(uintptr_t)bytes, .n = n, .memfd = -1};

    ck_assert_int_eq(kvp_wire_send(socket, &packet, fds, n_fds), KVP_OK);
}

static void expect_error(int socket, enum kvp_status status, uint64_t tag, const char *text)
{
    struct test_reply reply;

    test_receive(socket, &kvpool__v1__get_stats_reply__descriptor, &reply);
    ck_assert_str_eq(kvp_status_name(reply.status), kvp_status_name(status));
    ck_assert_uint_eq(reply.tag, tag);
    ck_assert_msg(strstr(reply.text, text) != NULL, "%s", reply.text);
    test_reply_free(&reply);
}

static struct kvp_envelope envelope(uint16_t method, uint32_t bytes, uint64_t tag)
{
    return (struct kvp_envelope){.magic = KVP_ENVELOPE_MAGIC, .method = method, .bytes = bytes, .tag = tag};
}

START_TEST(a_connected_process_is_a_session_and_gets_answers)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(connection);

    ck_assert_str_eq(stats->backend, "host");
    ck_assert_uint_eq(stats->n_sessions, 1);
    ck_assert_uint_eq(stats->sessions[0]->pid, (uint32_t)getpid());
    ck_assert_uint_eq(stats->sessions[0]->uid, getuid());
    ck_assert_uint_eq(stats->sessions[0]->lease, 0);
    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
}
END_TEST

START_TEST(a_message_that_is_none_is_refused_and_the_connection_lives_on)
{
    struct kvp_envelope head = envelope(GET_STATS, 0, 7);
    unsigned char bytes[256];

    memset(bytes, 0xff, sizeof(bytes));
    send_bytes(connection, bytes, 3, NULL, 0); /* shorter than an envelope */
    expect_error(connection, KVP_EPROTO, 0, "not a message");
    send_bytes(connection, bytes, sizeof(bytes), NULL, 0); /* wrong magic */
    expect_error(connection, KVP_EPROTO, 0, "not a message");
    head.bytes = 100; /* more than there is */
    send_bytes(connection, &head, sizeof(head), NULL, 0);
    expect_error(connection, KVP_EPROTO, 7, "not a message");
    memcpy(bytes, &head, sizeof(head));
    send_bytes(connection, bytes, sizeof(head) + 101, NULL, 0); /* less than there is */
    expect_error(connection, KVP_EPROTO, 7, "not a message");
    send_bytes(connection, bytes, sizeof(head) + 100, NULL, 0); /* 100 bytes of 0xff */
    expect_error(connection, KVP_EPROTO, 7, "is not a message of GetStatsRequest");
    stats_calls(connection);
}
END_TEST

START_TEST(an_unknown_method_and_a_reply_are_refused_by_name)
{
    struct kvp_envelope head = envelope(63, 0, 8);

    send_bytes(connection, &head, sizeof(head), NULL, 0);
    expect_error(connection, KVP_ENOSYS, 8, "no method 63");
    head.method = KVPOOL__V1__METHOD__METHOD_EXEC_JOB; /* the executor's, not a client's */
    send_bytes(connection, &head, sizeof(head), NULL, 0);
    expect_error(connection, KVP_ENOSYS, 8, "no method 70");
    head.method = 0;
    send_bytes(connection, &head, sizeof(head), NULL, 0);
    expect_error(connection, KVP_ENOSYS, 8, "no method 0");
    head = envelope(GET_STATS, 0, 9);
    head.flags = KVP_ENVELOPE_REPLY;
    send_bytes(connection, &head, sizeof(head), NULL, 0);
    expect_error(connection, KVP_EPROTO, 9, "not a request");
    head.flags = 0x8000;
    send_bytes(connection, &head, sizeof(head), NULL, 0);
    expect_error(connection, KVP_EPROTO, 9, "not a request");
    stats_calls(connection);
}
END_TEST

START_TEST(a_string_that_is_not_utf8_is_refused)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    struct test_reply reply;

    request.session = (char *)"\xc0\xaf";
    test_call(connection, GET_STATS, &request.base, &kvpool__v1__get_stats_reply__descriptor, &reply);
    ck_assert_int_eq(reply.status, KVP_EPROTO);
    test_reply_free(&reply);
    stats_calls(connection);
}
END_TEST

/* Sent as bytes: no library packs a NUL into a string. */
static void expect_string_refused(uint16_t method, const char *body, size_t n)
{
    struct kvp_envelope head = envelope(method, (uint32_t)n, 21);
    unsigned char bytes[128];

    ck_assert_uint_le(sizeof(head) + n, sizeof(bytes));
    memcpy(bytes, &head, sizeof(head));
    memcpy(bytes + sizeof(head), body, n);
    send_bytes(connection, bytes, sizeof(head) + n, NULL, 0);
    expect_error(connection, KVP_EPROTO, 21, "NUL");
}

START_TEST(a_string_with_a_nul_in_it_is_refused_and_not_cut)
{
    static const char last[] = "\x1a\x02n\0", middle[] = "\x1a\x03n\0x", twice[] = "\x1a\x02n\0\x1a\x01n";
    static const char inside[] = "\x1a\x07\x0a\x05" "ab\0cd", behind[] = "\x22\x01\x00\x1a\x03n\0x";
    static const uint16_t lens = KVPOOL__V1__METHOD__METHOD_GET_SEQ_LENS;

    expect_string_refused(lens, last, sizeof(last) - 1);
    expect_string_refused(lens, middle, sizeof(middle) - 1);
    expect_string_refused(lens, twice, sizeof(twice) - 1);
    expect_string_refused(lens, behind, sizeof(behind) - 1); /* behind a field of another kind, which may hold zeroes */
    expect_string_refused(KVPOOL__V1__METHOD__METHOD_CREATE_POOL, inside, sizeof(inside) - 1);
    stats_calls(connection);
}
END_TEST

static int make_memfd(size_t bytes, int seals)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    if (seals != 0)
        ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

START_TEST(a_body_in_a_memfd_is_taken_only_sealed_and_of_its_size)
{
    static const struct {
        size_t memfd_bytes;
        uint32_t said_bytes;
        int seals;
    } wrong[] = {
        {8192, 4096, 0},                                      /* can still be written and cut */
        {8192, 4096, F_SEAL_WRITE},                           /* … cut */
        {8192, 4096, F_SEAL_SHRINK},                          /* … written */
        {4095, 4096, F_SEAL_WRITE | F_SEAL_SHRINK},           /* too small */
        {8192, 0, F_SEAL_WRITE | F_SEAL_SHRINK},              /* nothing */
        {8192, KVP_MESSAGE_BYTES_MAX + 1, F_SEAL_WRITE | F_SEAL_SHRINK},
        {8192, UINT32_MAX, F_SEAL_WRITE | F_SEAL_SHRINK},
    };
    unsigned before = (stats_calls(connection), test_fd_count(server.pid));
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    struct test_reply reply;
    char *session;

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct kvp_envelope head = envelope(GET_STATS, wrong[i].said_bytes, i);
        int fd = make_memfd(wrong[i].memfd_bytes, wrong[i].seals);

        head.flags = KVP_ENVELOPE_MEMFD;
        send_bytes(connection, &head, sizeof(head), &fd, 1);
        close(fd);
        expect_error(connection, KVP_EPROTO, i, "not a message");
    }
    /* a right one, of 1 MiB: a session token of that length is none of ours, but the message is read */
    session = malloc((1 << 20) + 1);
    ck_assert_ptr_nonnull(session);
    memset(session, 'a', 1 << 20);
    session[1 << 20] = 0;
    request.session = session;
    test_call(connection, GET_STATS, &request.base, &kvpool__v1__get_stats_reply__descriptor, &reply);
    ck_assert_int_ne(reply.status, KVP_EPROTO);
    test_reply_free(&reply);
    free(session);
    stats_calls(connection);
    test_expect_fd_count(server.pid, before);
}
END_TEST

START_TEST(file_descriptors_that_no_one_wants_are_refused_and_closed)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    unsigned before = (stats_calls(connection), test_fd_count(server.pid));
    int fds[KVP_MESSAGE_FDS_MAX];

    for (unsigned i = 0; i < KVP_MESSAGE_FDS_MAX; i++)
        fds[i] = connection;
    test_send(connection, GET_STATS, 11, &request.base, fds, 1);
    expect_error(connection, KVP_EPROTO, 11, "GetStats takes 0 file descriptors; 1 came");
    test_send(connection, GET_STATS, 12, &request.base, fds, KVP_MESSAGE_FDS_MAX);
    expect_error(connection, KVP_EPROTO, 12, "64 came");
    stats_calls(connection);
    test_expect_fd_count(server.pid, before);
}
END_TEST

START_TEST(requests_sent_together_are_answered_in_their_order)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    uint64_t calls = 0;

    for (uint64_t tag = 1; tag <= 100; tag++)
        test_send(connection, GET_STATS, tag, &request.base, NULL, 0);
    for (uint64_t tag = 1; tag <= 100; tag++) {
        struct test_reply reply;

        test_receive(connection, &kvpool__v1__get_stats_reply__descriptor, &reply);
        ck_assert_int_eq(reply.status, KVP_OK);
        ck_assert_uint_eq(reply.tag, tag);
        ck_assert_uint_gt(((Kvpool__V1__GetStatsReply *)(void *)reply.body)->calls + 1, calls);
        calls = ((Kvpool__V1__GetStatsReply *)(void *)reply.body)->calls;
        test_reply_free(&reply);
    }
}
END_TEST

START_TEST(a_peer_that_never_reads_hurts_no_one)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    int silent = test_connect(&server);
    uint64_t before, sent = 0, answered;
    struct kvp_wire_packet packet;
    unsigned resident = test_resident_kib(server.pid, "RssAnon");

    before = stats_calls(connection);
    ck_assert_uint_gt(resident, 0);
    ck_assert_int_eq(fcntl(silent, F_SETFL, O_RDWR | O_NONBLOCK), 0);
    ck_assert_int_eq(kvp_wire_pack(GET_STATS, 0, KVP_OK, 1, &request.base, &packet), KVP_OK);
    /* until neither direction takes any more: the daemon has stopped reading, and its own socket is full */
    for (;;) {
        struct pollfd writable = {.fd = silent, .events = POLLOUT};

        while (kvp_wire_send(silent, &packet, NULL, 0) == KVP_OK)
            sent++;
        stats_calls(connection); /* the daemon has looked at the silent one in between */
        if (poll(&writable, 1, 100) == 0)
            break;
    }
    kvp_wire_packet_free(&packet);
    for (int i = 0; i < 1000; i++)
        stats_calls(connection);
    answered = stats_calls(connection) - before;
    ck_assert_uint_lt(answered, sent + 3000);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* which keep what is freed */
    ck_assert_uint_lt(test_resident_kib(server.pid, "RssAnon"), resident + 4096);
#endif

    /* and when it reads after all, it gets every answer */
    ck_assert_int_eq(fcntl(silent, F_SETFL, O_RDWR), 0);
    for (uint64_t i = 0; i < sent; i++) {
        struct test_reply reply;

        test_receive(silent, &kvpool__v1__get_stats_reply__descriptor, &reply);
        ck_assert_int_eq(reply.status, KVP_OK);
        test_reply_free(&reply);
    }
    close(silent);
}
END_TEST

START_TEST(a_killed_process_leaves_nothing_behind)
{
    unsigned before = (stats_calls(connection), test_fd_count(server.pid));

    for (int i = 0; i < 20; i++) {
        int ready[2];
        pid_t pid;
        char byte;

        ck_assert_int_eq(pipe(ready), 0);
        pid = fork();
        ck_assert_int_ge(pid, 0);
        if (pid == 0) {
            int socket = test_connect(&server);

            stats_calls(socket);
            if (write(ready[1], "", 1) != 1)
                _exit(1);
            for (;;)
                pause();
        }
        ck_assert_int_eq(read(ready[0], &byte, 1), 1);
        kill(pid, SIGKILL);
        ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
        close(ready[0]);
        close(ready[1]);
    }
    wait_for_sessions(connection, 1);
    test_expect_fd_count(server.pid, before);
}
END_TEST

/* A child that was forked without exec keeps the socket open, so that no end-of-file comes: the pidfd tells. */
START_TEST(a_forked_child_that_holds_the_socket_keeps_no_session_alive)
{
    int ready[2], hold[2];
    pid_t parent, child;

    ck_assert_int_eq(pipe(ready), 0);
    ck_assert_int_eq(pipe(hold), 0);
    parent = fork();
    ck_assert_int_ge(parent, 0);
    if (parent == 0) {
        int socket = test_connect(&server);
        pid_t pid;
        char byte;

        stats_calls(socket);
        pid = fork();
        if (pid == 0) {
            close(hold[1]);
            if (read(hold[0], &byte, 1) < 0) /* until the test lets it go */
                _exit(1);
            _exit(0);
        }
        if (write(ready[1], &pid, sizeof(pid)) != (ssize_t)sizeof(pid))
            _exit(1);
        for (;;)
            pause();
    }
    ck_assert_int_eq(read(ready[0], &child, sizeof(child)), sizeof(child));
    ck_assert_uint_eq(stats_sessions(connection), 2);
    kill(parent, SIGKILL);
    ck_assert_int_eq(waitpid(parent, NULL, 0), parent);
    wait_for_sessions(connection, 1);
    ck_assert_int_eq(kill(child, 0), 0); /* it was alive all the while */
    close(hold[1]);
}
END_TEST

START_TEST(two_hundred_connections_are_served_at_once)
{
    static int sockets[200];
    unsigned before = (stats_calls(connection), test_fd_count(server.pid));

    for (int i = 0; i < 200; i++)
        sockets[i] = test_connect(&server);
    for (int i = 0; i < 200; i++)
        stats_calls(sockets[i]);
    ck_assert_uint_eq(stats_sessions(connection), 201);
    for (int i = 0; i < 200; i++)
        close(sockets[i]);
    wait_for_sessions(connection, 1);
    test_expect_fd_count(server.pid, before);
}
END_TEST

START_TEST(a_closed_session_loses_its_connection_behind_the_answer)
{
    Kvpool__V1__CloseSessionRequest request = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
    int other = test_connect(&server);
    struct test_reply reply;

    test_call(other, KVPOOL__V1__METHOD__METHOD_CLOSE_SESSION, &request.base,
              &kvpool__v1__close_session_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    test_reply_free(&reply);
    ck_assert(test_hung_up(other));
    close(other);
    wait_for_sessions(connection, 1);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("session door");
    TCase *tests = tcase_create("one daemon a test");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, a_connected_process_is_a_session_and_gets_answers);
    tcase_add_test(tests, a_message_that_is_none_is_refused_and_the_connection_lives_on);
    tcase_add_test(tests, an_unknown_method_and_a_reply_are_refused_by_name);
    tcase_add_test(tests, a_string_that_is_not_utf8_is_refused);
    tcase_add_test(tests, a_string_with_a_nul_in_it_is_refused_and_not_cut);
    tcase_add_test(tests, a_body_in_a_memfd_is_taken_only_sealed_and_of_its_size);
    tcase_add_test(tests, file_descriptors_that_no_one_wants_are_refused_and_closed);
    tcase_add_test(tests, requests_sent_together_are_answered_in_their_order);
    tcase_add_test(tests, a_peer_that_never_reads_hurts_no_one);
    tcase_add_test(tests, a_killed_process_leaves_nothing_behind);
    tcase_add_test(tests, a_forked_child_that_holds_the_socket_keeps_no_session_alive);
    tcase_add_test(tests, two_hundred_connections_are_served_at_once);
    tcase_add_test(tests, a_closed_session_loses_its_connection_behind_the_answer);
    suite_add_tcase(suite, tests);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
