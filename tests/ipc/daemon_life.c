/**
 * kvpoold as an operator and a service manager see it: start, refusal to start, stop, and what it tells.
 */
#include "daemon.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static struct test_daemon server;

static void path_in(const char *dir, const char *name, char ret_path[300])
{
    snprintf(ret_path, 300, "%s/%s", dir, name);
}

static void expect_served(void)
{
    int socket = test_connect(&server);

    kvpool__v1__get_stats_reply__free_unpacked(test_stats(socket), NULL);
    close(socket);
}

START_TEST(sigterm_ends_it_with_0_and_removes_what_it_made)
{
    struct stat st;
    char path[300];

    test_daemon_start(&server, NULL, NULL);
    ck_assert_int_eq(stat(server.socket, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0660);
    path_in(server.dir, "grpc.sock", path);
    ck_assert_int_eq(stat(path, &st), 0);
    expect_served();
    ck_assert_int_eq(test_daemon_stop(&server), 0); /* which finds the folder empty */
}
END_TEST

START_TEST(a_connected_client_does_not_hold_its_end_up)
{
    static const char *const arguments[] = {"--set", "daemon.stop_ms=600000", NULL}; /* longer than is waited for it */
    int socket;

    test_daemon_start(&server, NULL, arguments);
    socket = test_connect(&server);
    kvpool__v1__get_stats_reply__free_unpacked(test_stats(socket), NULL);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
    ck_assert(test_hung_up(socket));
    close(socket);
}
END_TEST

START_TEST(options_reach_the_sockets)
{
    static const char *const arguments[] = {"--set", "grpc.enabled=no", "--set", "daemon.socket_mode=0600", NULL};
    struct stat st;
    char path[300];

    test_daemon_start(&server, NULL, arguments);
    ck_assert_int_eq(stat(server.socket, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    path_in(server.dir, "grpc.sock", path);
    ck_assert_int_ne(stat(path, &st), 0);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}
END_TEST

START_TEST(a_second_daemon_on_the_same_folder_is_refused)
{
    struct test_daemon second;

    test_daemon_start(&server, NULL, NULL);
    test_daemon_spawn(&second, server.dir, NULL, NULL, -1);
    ck_assert(test_daemon_says(&second, "another kvpoold has this folder"));
    ck_assert_int_eq(test_daemon_wait(&second), 1);
    expect_served();
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}
END_TEST

START_TEST(a_killed_daemons_sockets_are_replaced)
{
    test_daemon_start(&server, NULL, NULL);
    kill(server.pid, SIGKILL);
    ck_assert_int_eq(test_daemon_wait(&server), 128 + SIGKILL);
    test_daemon_start(&server, server.dir, NULL);
    expect_served();
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}
END_TEST

/* A socket of that name in the folder, as somebody else listens on it. */
static int listen_in(const char *dir, const char *name, int type, struct sockaddr_un *ret_address)
{
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    char path[300];

    path_in(dir, name, path);
    *ret_address = (struct sockaddr_un){.sun_family = AF_UNIX};
    snprintf(ret_address->sun_path, sizeof(ret_address->sun_path), "%.100s", path);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)ret_address, sizeof(*ret_address)), 0);
    ck_assert_int_eq(listen(fd, 16), 0);
    return fd;
}

START_TEST(a_socket_that_somebody_listens_on_is_not_replaced)
{
    struct sockaddr_un address;
    struct pollfd asked = {.events = POLLIN};
    char dir[200];

    test_folder(dir);
    asked.fd = listen_in(dir, "kvpool.sock", SOCK_SEQPACKET, &address);
    test_daemon_spawn(&server, dir, NULL, NULL, -1);
    ck_assert(test_daemon_says(&server, "somebody listens there"));
    ck_assert_int_eq(test_daemon_wait(&server), 1);
    ck_assert_int_eq(poll(&asked, 1, 0), 1); /* it is found by its name still */
    ck_assert_int_eq(unlink(address.sun_path), 0);
    ck_assert_int_eq(rmdir(dir), 0);
    close(asked.fd);
}
END_TEST

START_TEST(a_file_in_the_place_of_a_socket_is_not_touched)
{
    char dir[200], path[300];
    struct stat st;
    int fd;

    test_folder(dir);
    path_in(dir, "kvpool.sock", path);
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    ck_assert_int_ge(fd, 0);
    close(fd);
    test_daemon_spawn(&server, dir, NULL, NULL, -1);
    ck_assert(test_daemon_says(&server, "can not be replaced by a socket"));
    ck_assert_int_eq(test_daemon_wait(&server), 1);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert(S_ISREG(st.st_mode));
    unlink(path);
    ck_assert_int_eq(rmdir(dir), 0);
}
END_TEST

START_TEST(what_it_can_not_do_it_says_and_exits_1)
{
    static const char *const wrong[][4] = {
        {"--set", "daemon.backend=tpu", NULL, "must be one of: auto host cuda"},
        {"--set", "ledger.bytes=1", NULL, "must be a number from 64M to 64G"},
        {"--config", "/nowhere/kvpoold.conf", NULL, "/nowhere/kvpoold.conf: No such file"},
        {"--set", "daemon.socket_group=no-such-group", NULL, "no such group"},
        {"--set", "grpc.listen=0.0.0.0:7410", NULL, "not a loopback address"},
        {"--runtime-dir", "/nowhere/at/all", NULL, "/nowhere/at/all"},
    };
    char dir[200];

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        test_folder(dir);
        test_daemon_spawn(&server, dir, wrong[i], NULL, -1);
        ck_assert_msg(test_daemon_says(&server, wrong[i][3]), "%s %s", wrong[i][0], wrong[i][1]);
        ck_assert_int_eq(test_daemon_wait(&server), 1);
        ck_assert_int_eq(rmdir(dir), 0);
    }
}
END_TEST

START_TEST(connections_over_the_limit_are_turned_away_with_the_reason)
{
    static const char *const arguments[] = {"--set", "limits.connections=3", NULL};
    struct test_reply reply;
    int sockets[4];

    test_daemon_start(&server, NULL, arguments);
    for (int i = 0; i < 3; i++) {
        sockets[i] = test_connect(&server);
        kvpool__v1__get_stats_reply__free_unpacked(test_stats(sockets[i]), NULL);
    }
    sockets[3] = test_connect(&server);
    test_receive(sockets[3], &kvpool__v1__get_stats_reply__descriptor, &reply);
    ck_assert_int_eq(reply.status, KVP_ELIMIT);
    ck_assert_str_eq(reply.text, "limits.connections is reached");
    test_reply_free(&reply);
    ck_assert(test_hung_up(sockets[3]));
    for (int i = 0; i < 4; i++)
        close(sockets[i]);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}
END_TEST

/* All that it still says, to its end. */
static void read_log_to_the_end(char *ret_log, size_t size)
{
    size_t n = 0;
    ssize_t got;

    while ((got = read(server.log, ret_log + n, size - 1 - n)) > 0)
        n += (size_t)got;
    ret_log[n] = 0;
}

/* The status of a first call, and its text. A daemon that turned the connection away may have closed it before the call
 * is sent, or without reading it: that is told once, by EPIPE or ECONNRESET, and what it said is there all the same. */
static enum kvp_status knock(int socket, char ret_text[256])
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    static struct kvp_wire_frame frame;
    struct kvp_wire_packet packet;
    Kvpool__V1__Error *error;
    enum kvp_status status;

    ret_text[0] = 0;
    ck_assert_int_eq(kvp_wire_pack(KVPOOL__V1__METHOD__METHOD_GET_STATS, 0, KVP_OK, 1, &request.base, &packet), KVP_OK);
    kvp_wire_send(socket, &packet, NULL, 0);
    kvp_wire_packet_free(&packet);
    status = kvp_wire_receive(socket, false, &frame);
    if (status == KVP_EDISCONNECTED)
        status = kvp_wire_receive(socket, false, &frame);
    ck_assert_msg(status == KVP_OK, "no answer: %s", kvp_status_name(status));
    status = frame.envelope.status;
    if (status != KVP_OK) {
        error = kvpool__v1__error__unpack(NULL, frame.envelope.bytes, frame.bytes);
        ck_assert_ptr_nonnull(error);
        snprintf(ret_text, 256, "%s", error->message);
        kvpool__v1__error__free_unpacked(error, NULL);
    }
    kvp_wire_release(&frame);
    return status;
}

#define FILLING_MAX 64

/* A connection takes two: whether the first that is turned away lacks both or one is _i's. */
START_TEST(without_file_descriptors_connections_are_turned_away_with_the_reason_and_few_lines)
{
    struct rlimit limit = {.rlim_cur = 0};
    int filling[FILLING_MAX], n = 0, socket;
    char log[8192], text[256];
    unsigned lines = 0;

    test_daemon_start(&server, NULL, NULL);
    limit.rlim_cur = limit.rlim_max = test_fd_count(server.pid) + 8 + (unsigned)_i;
    ck_assert_int_eq(prlimit(server.pid, RLIMIT_NOFILE, &limit, NULL), 0);
    for (;;) {
        ck_assert_int_lt(n, FILLING_MAX);
        filling[n] = test_connect(&server);
        if (knock(filling[n++], text) != KVP_OK)
            break;
    }
    ck_assert_int_ge(n, 2); /* one was served, before there were no more */
    for (int i = 0; i < 50; i++) {
        socket = test_connect(&server);
        ck_assert_str_eq(kvp_status_name(knock(socket, text)), "KVP_ENOMEM");
        ck_assert_msg(strstr(text, "file descriptor") != NULL, "%s", text);
        ck_assert(test_hung_up(socket));
        close(socket);
    }
    ck_assert_int_eq(knock(filling[0], text), KVP_OK); /* who was there is served on */
    for (int i = 0; i < n; i++)
        close(filling[i]);
    kill(server.pid, SIGTERM);
    read_log_to_the_end(log, sizeof(log));
    for (const char *at = log; (at = strstr(at, "turned away")) != NULL; at++)
        lines++;
    ck_assert_msg(lines >= 1 && lines <= 5, "%u lines in: %s", lines, log);
    ck_assert_msg(strstr(log, "error:") == NULL, "%s", log); /* nor does it fall behind */
    ck_assert_int_eq(test_daemon_wait(&server), 0);
    ck_assert_int_eq(rmdir(server.dir), 0);
}
END_TEST

START_TEST(why_it_does_not_start_is_said_once_and_not_as_something_else)
{
    char dir[200], path[300], log[4096];

    test_folder(dir);
    path_in(dir, "kvpool.lock", path);
    ck_assert_int_eq(mkdir(path, 0700), 0); /* in the place of the lock */
    test_daemon_spawn(&server, dir, NULL, NULL, -1);
    read_log_to_the_end(log, sizeof(log));
    ck_assert_msg(strstr(log, "kvpool.lock: Is a directory\n") != NULL, "%s", log);
    ck_assert_msg(strstr(log, "kvpoold does not start\n") != NULL, "%s", log);
    ck_assert_msg(strstr(log, kvp_status_text(KVP_EINVAL)) == NULL, "%s", log);
    ck_assert_int_eq(test_daemon_wait(&server), 1);
    ck_assert_int_eq(rmdir(path), 0);
    ck_assert_int_eq(rmdir(dir), 0);
}
END_TEST

START_TEST(with_too_few_file_descriptors_it_says_how_many_there_must_be)
{
    struct rlimit few = {.rlim_cur = 20, .rlim_max = 20};
    char dir[200], log[4096];

    test_folder(dir);
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &few), 0);
    test_daemon_spawn(&server, dir, NULL, NULL, -1);
    read_log_to_the_end(log, sizeof(log));
    ck_assert_msg(strstr(log, "20 file descriptors are allowed (LimitNOFILE=, ulimit -n): the least is 64\n") != NULL,
                  "%s", log);
    ck_assert_int_eq(test_daemon_wait(&server), 1);
    ck_assert_int_eq(rmdir(dir), 0);
}
END_TEST

START_TEST(a_socket_that_systemd_passed_is_used_and_left_alone)
{
    struct sockaddr_un address;
    char dir[200];
    struct stat st;
    int fd;

    test_folder(dir);
    fd = listen_in(dir, "passed.sock", SOCK_SEQPACKET, &address);
    test_daemon_spawn(&server, dir, NULL, NULL, fd);
    ck_assert(test_daemon_says(&server, "serves in"));
    ck_assert_int_ne(stat(server.socket, &st), 0); /* none of its own */
    snprintf(server.socket, sizeof(server.socket), "%s", address.sun_path);
    expect_served();
    kill(server.pid, SIGTERM);
    ck_assert_int_eq(test_daemon_wait(&server), 0);
    ck_assert_int_eq(unlink(address.sun_path), 0); /* it was left */
    ck_assert_int_eq(rmdir(dir), 0);
    close(fd);
}
END_TEST

START_TEST(grpc_connections_over_the_limit_are_said_in_the_log)
{
    static const char *const arguments[] = {"--set", "grpc.connections=1", NULL};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int clients[2];

    test_daemon_start(&server, NULL, arguments);
    snprintf(address.sun_path, sizeof(address.sun_path), "%.90s/grpc.sock", server.dir);
    for (int i = 0; i < 2; i++) {
        clients[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        ck_assert_int_eq(connect(clients[i], (struct sockaddr *)&address, sizeof(address)), 0);
    }
    ck_assert(test_daemon_says(&server, "warning: grpc: a connection was turned away: grpc.connections is reached"));
    expect_served();
    for (int i = 0; i < 2; i++)
        close(clients[i]);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}
END_TEST

START_TEST(a_grpc_socket_that_systemd_passed_turns_away_who_connects_when_grpc_is_not_enabled)
{
    static const char *const arguments[] = {"--set", "grpc.enabled=no", NULL};
    struct sockaddr_un address;
    int fd, client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct pollfd hung_up = {.fd = client, .events = POLLIN};
    char dir[200], byte;

    test_folder(dir);
    fd = listen_in(dir, "passed.sock", SOCK_STREAM, &address);
    test_daemon_spawn(&server, dir, arguments, NULL, fd);
    ck_assert(test_daemon_says(&server, "who connects is turned away"));
    ck_assert_int_eq(connect(client, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(poll(&hung_up, 1, TEST_WAIT_MS), 1);
    ck_assert_int_eq(read(client, &byte, 1), 0);
    expect_served();
    kill(server.pid, SIGTERM);
    ck_assert_int_eq(test_daemon_wait(&server), 0);
    ck_assert_int_eq(unlink(address.sun_path), 0); /* it was left */
    ck_assert_int_eq(rmdir(dir), 0);
    close(client);
    close(fd);
}
END_TEST

/* ---- a service manager ------------------------------------------------------------------------------------------- */

struct manager {
    int socket;
    char environment[300];
};

static void manager_open(struct manager *manager, const char *dir)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {.tv_sec = TEST_WAIT_MS / 1000};

    snprintf(address.sun_path, sizeof(address.sun_path), "%.90s/notify", dir);
    snprintf(manager->environment, sizeof(manager->environment), "NOTIFY_SOCKET=%s", address.sun_path);
    manager->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(bind(manager->socket, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(setsockopt(manager->socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), 0);
}

/* The next message, and the fd that came along, or -1. */
static void manager_hears(struct manager *manager, char ret_text[512], int *ret_fd)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * 4)];
    } control;
    struct iovec iov = {ret_text, 511};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n = recvmsg(manager->socket, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header;

    ck_assert_msg(n > 0, "the daemon says nothing: %s", strerror(errno));
    ret_text[n] = 0;
    *ret_fd = -1;
    header = CMSG_FIRSTHDR(&message);
    if (header != NULL && header->cmsg_type == SCM_RIGHTS)
        memcpy(ret_fd, CMSG_DATA(header), sizeof(int));
}

/* Skip to the message that holds `text`; fds on the way are closed, which is what a barrier waits for. */
static int manager_waits_for(struct manager *manager, const char *text, char ret_text[512])
{
    int fd;

    for (;;) {
        manager_hears(manager, ret_text, &fd);
        if (strstr(ret_text, text) != NULL)
            return fd;
        if (fd >= 0)
            close(fd);
    }
}

static void manager_start(struct manager *manager, const char *watchdog)
{
    const char *environment[] = {NULL, NULL, NULL};
    char dir[200];

    test_folder(dir);
    manager_open(manager, dir);
    environment[0] = manager->environment;
    environment[1] = watchdog;
    test_daemon_spawn(&server, dir, NULL, environment, -1);
}

static void manager_end(struct manager *manager)
{
    char path[300];

    close(manager->socket);
    unlink(strchr(manager->environment, '=') + 1);
    path_in(server.dir, "kvpool.sock", path);
    ck_assert_int_eq(unlink(path), 0); /* it stays for the next daemon, who is handed the socket */
    path_in(server.dir, "grpc.sock", path);
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(rmdir(server.dir), 0);
}

START_TEST(a_manager_hears_ready_status_watchdog_and_stopping)
{
    struct manager manager;
    char text[512];

    manager_start(&manager, "WATCHDOG_USEC=200000");
    ck_assert_int_eq(manager_waits_for(&manager, "READY=1", text), -1);
    ck_assert_ptr_nonnull(strstr(text, "STATUS=serving on the host backend"));
    close(test_connect(&server)); /* ready was true */
    manager_waits_for(&manager, "WATCHDOG=1", text);
    manager_waits_for(&manager, "WATCHDOG=1", text);
    kill(server.pid, SIGTERM);
    manager_waits_for(&manager, "STOPPING=1", text);
    ck_assert_int_eq(test_daemon_wait(&server), 0);
    manager_end(&manager);
}
END_TEST

/* It is started again at once: a mistake in its configuration must not become a loop of hundreds of starts a minute. */
START_TEST(what_fails_under_a_manager_fails_no_faster_than_once_a_second)
{
    static const char *const wrong[][3] = {{"--set", "daemon.stop_ms=soon"}, {"--no-such-option"}};
    const char *environment[] = {NULL, NULL};
    struct manager manager;
    uint64_t began_ms;
    char dir[200];

    test_folder(dir);
    manager_open(&manager, dir);
    environment[0] = manager.environment;
    began_ms = test_now_ms();
    test_daemon_spawn(&server, dir, wrong[_i], environment, -1);
    ck_assert_int_eq(test_daemon_wait(&server), 1 + _i);
    ck_assert_uint_ge(test_now_ms() - began_ms, 1000);
    close(manager.socket);
    unlink(strchr(manager.environment, '=') + 1);
    ck_assert_int_eq(rmdir(dir), 0);
}
END_TEST

START_TEST(a_connection_is_kept_by_the_manager_before_its_first_request_is_carried_out)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    struct test_reply reply;
    struct manager manager;
    struct pollfd early;
    char text[512];
    int socket, kept, barriers[2], fd;

    manager_start(&manager, NULL);
    manager_waits_for(&manager, "READY=1", text);
    socket = test_connect(&server);
    test_send(socket, KVPOOL__V1__METHOD__METHOD_GET_STATS, 5, &request.base, NULL, 0);
    kept = manager_waits_for(&manager, "FDNAME=c", text);
    ck_assert_int_ge(kept, 0);
    ck_assert_ptr_nonnull(strstr(text, "FDSTORE=1\nFDPOLL=0"));
    barriers[0] = manager_waits_for(&manager, "BARRIER=1", text);
    fd = manager_waits_for(&manager, "FDNAME=q", text);
    ck_assert_int_ge(fd, 0);
    close(fd);
    barriers[1] = manager_waits_for(&manager, "BARRIER=1", text);
    early = (struct pollfd){.fd = socket, .events = POLLIN};
    ck_assert_int_eq(poll(&early, 1, 50), 0); /* the request waits for the barriers */
    close(barriers[0]);
    close(barriers[1]);
    test_receive(socket, &kvpool__v1__get_stats_reply__descriptor, &reply);
    ck_assert_uint_eq(reply.tag, 5);
    test_reply_free(&reply);

    /* the connection's end takes it out of the store again */
    close(socket);
    manager_waits_for(&manager, "FDSTOREREMOVE=1\nFDNAME=c", text);
    manager_waits_for(&manager, "FDSTOREREMOVE=1\nFDNAME=q", text);
    close(kept);
    kill(server.pid, SIGTERM);
    ck_assert_int_eq(test_daemon_wait(&server), 0);
    manager_end(&manager);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("daemon life");
    TCase *tests = tcase_create("start and stop");
    TCase *managed = tcase_create("under a service manager");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, sigterm_ends_it_with_0_and_removes_what_it_made);
    tcase_add_test(tests, a_connected_client_does_not_hold_its_end_up);
    tcase_add_test(tests, options_reach_the_sockets);
    tcase_add_test(tests, a_second_daemon_on_the_same_folder_is_refused);
    tcase_add_test(tests, a_killed_daemons_sockets_are_replaced);
    tcase_add_test(tests, a_socket_that_somebody_listens_on_is_not_replaced);
    tcase_add_test(tests, a_file_in_the_place_of_a_socket_is_not_touched);
    tcase_add_test(tests, what_it_can_not_do_it_says_and_exits_1);
    tcase_add_test(tests, connections_over_the_limit_are_turned_away_with_the_reason);
    tcase_add_loop_test(tests, without_file_descriptors_connections_are_turned_away_with_the_reason_and_few_lines, 0, 2);
    tcase_add_test(tests, why_it_does_not_start_is_said_once_and_not_as_something_else);
    tcase_add_test(tests, with_too_few_file_descriptors_it_says_how_many_there_must_be);
    tcase_add_test(tests, a_socket_that_systemd_passed_is_used_and_left_alone);
    tcase_add_test(tests, grpc_connections_over_the_limit_are_said_in_the_log);
    tcase_add_test(tests, a_grpc_socket_that_systemd_passed_turns_away_who_connects_when_grpc_is_not_enabled);
    suite_add_tcase(suite, tests);
    tcase_set_timeout(managed, 60);
    tcase_add_test(managed, a_manager_hears_ready_status_watchdog_and_stopping);
    tcase_add_loop_test(managed, what_fails_under_a_manager_fails_no_faster_than_once_a_second, 0, 2);
    tcase_add_test(managed, a_connection_is_kept_by_the_manager_before_its_first_request_is_carried_out);
    suite_add_tcase(suite, managed);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
