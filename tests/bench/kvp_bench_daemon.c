/**
 * kvp_bench_daemon: what kvpoold costs: its start, its memory, its idle time, a call on the session socket.
 *
 * The call is measured beside a floor in the same run: a process that receives and sends SEQPACKET messages of the same
 * sizes and does nothing else. Arguments: [--json].
 */
#include "daemon.h"

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STARTS 20
#define CALLS  20000

struct figures {
    double start_p50_ms, start_max_ms;
    unsigned resident_kib, anonymous_kib;
    double idle_cpu_percent;
    double call_p50_us, call_p99_us, echo_p50_us;
};

static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

/* From fork to the first answer. */
static void measure_start(struct figures *figures)
{
    static double ms[STARTS];
    struct test_daemon server;

    for (int i = 0; i < STARTS; i++) {
        double from = now_us();
        int socket;

        test_daemon_start(&server, NULL, NULL);
        socket = test_connect(&server);
        kvpool__v1__get_stats_reply__free_unpacked(test_stats(socket), NULL);
        ms[i] = (now_us() - from) / 1e3;
        close(socket);
        ck_assert_int_eq(test_daemon_stop(&server), 0);
    }
    qsort(ms, STARTS, sizeof(ms[0]), compare);
    figures->start_p50_ms = ms[STARTS / 2];
    figures->start_max_ms = ms[STARTS - 1];
}

static double cpu_seconds(pid_t pid)
{
    struct timespec used;
    clockid_t clock;

    ck_assert_int_eq(clock_getcpuclockid(pid, &clock), 0);
    ck_assert_int_eq(clock_gettime(clock, &used), 0);
    return (double)used.tv_sec + (double)used.tv_nsec / 1e9;
}

static void measure_idle(const struct test_daemon *server, struct figures *figures)
{
    struct timespec span = {.tv_sec = 3};
    double before = cpu_seconds(server->pid);

    nanosleep(&span, NULL); /* the span that is measured */
    figures->idle_cpu_percent = (cpu_seconds(server->pid) - before) / 3 * 100;
    figures->resident_kib = test_resident_kib(server->pid, "VmRSS");
    figures->anonymous_kib = test_resident_kib(server->pid, "RssAnon");
}

static void measure_round_trips(int socket, const void *request, size_t request_bytes, double *ret_us)
{
    static char reply[KVP_DATAGRAM_BYTES_MAX];

    for (int i = 0; i < CALLS; i++) {
        double from = now_us();

        ck_assert_int_eq(send(socket, request, request_bytes, 0), (ssize_t)request_bytes);
        ck_assert_int_gt(recv(socket, reply, sizeof(reply), 0), 0);
        ret_us[i] = now_us() - from;
    }
    qsort(ret_us, CALLS, sizeof(ret_us[0]), compare);
}

static void echo(int socket, size_t reply_bytes)
{
    static char bytes[KVP_DATAGRAM_BYTES_MAX];

    while (recv(socket, bytes, sizeof(bytes), 0) > 0)
        if (send(socket, bytes, reply_bytes, 0) < 0)
            break;
    _exit(0);
}

static void measure_call(const struct test_daemon *server, struct figures *figures)
{
    Kvpool__V1__ListPoolsRequest request = KVPOOL__V1__LIST_POOLS_REQUEST__INIT;
    static double us[CALLS];
    struct kvp_wire_packet packet;
    int pair[2], socket = test_connect(server);
    pid_t pid;

    ck_assert_int_eq(
        kvp_wire_pack(KVPOOL__V1__METHOD__METHOD_LIST_POOLS, 0, KVP_OK, 1, &request.base, &packet), KVP_OK);
    measure_round_trips(socket, packet.bytes, packet.n, us);
    figures->call_p50_us = us[CALLS / 2];
    figures->call_p99_us = us[CALLS / 100 * 99];

    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        close(pair[0]);
        echo(pair[1], packet.n);
    }
    close(pair[1]);
    measure_round_trips(pair[0], packet.bytes, packet.n, us);
    figures->echo_p50_us = us[CALLS / 2];
    close(pair[0]);
    ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
    kvp_wire_packet_free(&packet);
    close(socket);
}

static void print(const struct figures *f)
{
    printf("start to first answer   p50 %.1f ms, max %.1f ms of %d\n", f->start_p50_ms, f->start_max_ms, STARTS);
    printf("resident                %.1f MiB, of it anonymous %.1f MiB\n", f->resident_kib / 1024.0,
           f->anonymous_kib / 1024.0);
    printf("idle                    %.3f %% of a CPU\n", f->idle_cpu_percent);
    printf("empty call              p50 %.1f us, p99 %.1f us; bare echo p50 %.1f us: ratio %.2f\n", f->call_p50_us,
           f->call_p99_us, f->echo_p50_us, f->call_p50_us / f->echo_p50_us);
}

static void print_json(const struct figures *f)
{
    printf("{\"start_p50_ms\": %.2f, \"start_max_ms\": %.2f, \"resident_kib\": %u, \"anonymous_kib\": %u, "
           "\"idle_cpu_percent\": %.3f, \"call_p50_us\": %.2f, \"call_p99_us\": %.2f, \"echo_p50_us\": %.2f}\n",
           f->start_p50_ms, f->start_max_ms, f->resident_kib, f->anonymous_kib, f->idle_cpu_percent, f->call_p50_us,
           f->call_p99_us, f->echo_p50_us);
}

static bool json;

/* The helpers of tests report by Check, which wants to run what calls them. */
START_TEST(measure)
{
    struct test_daemon server;
    struct figures figures = {0};

    measure_start(&figures);
    test_daemon_start(&server, NULL, NULL);
    measure_idle(&server, &figures);
    measure_call(&server, &figures);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
    (json ? print_json : print)(&figures);
}
END_TEST

int main(int argc, char **argv)
{
    Suite *suite = suite_create("bench");
    TCase *bench = tcase_create("daemon");
    SRunner *runner;
    int failed;

    json = argc > 1 && strcmp(argv[1], "--json") == 0;
    tcase_add_test(bench, measure);
    suite_add_tcase(suite, bench);
    runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, json ? CK_SILENT : CK_MINIMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
