/* A real kvpoold for a test; see daemon.h. */
#include "daemon.h"

#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ARGUMENTS_MAX 24

uint64_t test_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void test_folder(char ret_dir[200])
{
    const char *tmp = getenv("TMPDIR");

    snprintf(ret_dir, 200, "%.60s/kvpool-test.XXXXXX", tmp != NULL ? tmp : "/tmp");
    ck_assert_ptr_nonnull(mkdtemp(ret_dir));
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static void become_daemon(char *const *argv, const char *const *environment, int pass_fd)
{
    char pid[16];

    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves no daemon behind */
    for (; environment != NULL && *environment != NULL; environment++)
        putenv((char *)(uintptr_t)*environment);
    if (pass_fd >= 0) {
        if (pass_fd == 3 ? fcntl(3, F_SETFD, 0) != 0 : dup2(pass_fd, 3) != 3)
            _exit(126);
        snprintf(pid, sizeof(pid), "%d", (int)getpid());
        setenv("LISTEN_PID", pid, 1);
        setenv("LISTEN_FDS", "1", 1);
    }
    execv(argv[0], argv);
    _exit(127);
}

/* A program in $KVPOOL_BIN_DIR, or in ../bin seen from this program. */
static void find_program(const char *name, char ret_program[PATH_MAX])
{
    const char *bin = getenv("KVPOOL_BIN_DIR");
    char self[PATH_MAX - 16];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);

    ck_assert_int_gt(n, 0);
    self[n] = 0;
    *strrchr(self, '/') = 0;
    if (bin != NULL)
        snprintf(ret_program, PATH_MAX, "%.4000s/%s", bin, name);
    else
        snprintf(ret_program, PATH_MAX, "%.4000s/../bin/%s", self, name);
}

/* @param argv  [n] so far, room for ARGUMENTS_MAX */
static void spawn(struct test_daemon *daemon, const char *dir, char **argv, unsigned n, const char *const *arguments,
                  const char *const *environment, int pass_fd)
{
    int log[2];

    if (dir == NULL)
        test_folder(daemon->dir);
    else if (dir != daemon->dir)
        snprintf(daemon->dir, sizeof(daemon->dir), "%s", dir);
    snprintf(daemon->socket, sizeof(daemon->socket), "%s/kvpool.sock", daemon->dir);
    for (; arguments != NULL && *arguments != NULL; arguments++) {
        ck_assert_uint_lt(n, ARGUMENTS_MAX - 1);
        argv[n++] = (char *)(uintptr_t)*arguments;
    }
    argv[n] = NULL;
    ck_assert_int_eq(pipe2(log, O_CLOEXEC), 0);
    daemon->pid = fork();
    ck_assert_int_ge(daemon->pid, 0);
    if (daemon->pid == 0) {
        dup2(log[1], STDERR_FILENO);
        become_daemon(argv, environment, pass_fd);
    }
    close(log[1]);
    daemon->log = log[0];
}

void test_daemon_spawn(struct test_daemon *daemon, const char *dir, const char *const *arguments,
                       const char *const *environment, int pass_fd)
{
    char program[PATH_MAX];
    char *argv[ARGUMENTS_MAX] = {program, (char *)"--backend", (char *)"host", (char *)"--runtime-dir", daemon->dir};

    find_program("kvpoold", program);
    spawn(daemon, dir, argv, 5, arguments, environment, pass_fd);
}

void test_keeper_start(struct test_daemon *daemon, const char *const *arguments)
{
    char keeper[PATH_MAX], program[PATH_MAX];
    char *argv[ARGUMENTS_MAX] = {keeper, (char *)"--", program, (char *)"--backend", (char *)"host",
                                 (char *)"--runtime-dir", daemon->dir};

    find_program("kvpool-keeper", keeper);
    find_program("kvpoold", program);
    spawn(daemon, NULL, argv, 7, arguments, NULL, -1);
    ck_assert_msg(test_daemon_says(daemon, "serves in"), "the daemon does not start");
}

/* @return 0: not in the list, from which one can be missing when a child before it is reaped under the reading */
static pid_t listed_child(const struct test_daemon *daemon)
{
    char path[64];
    FILE *file;
    int pid = 0;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", (int)daemon->pid, (int)daemon->pid);
    file = fopen(path, "re");
    ck_assert_ptr_nonnull(file);
    while (fscanf(file, "%d", &pid) == 1) { /* an executor whose daemon died is a child too */
        char name[64] = "", comm[64];
        FILE *of;

        snprintf(comm, sizeof(comm), "/proc/%d/comm", pid);
        of = fopen(comm, "re");
        if (of != NULL && fscanf(of, "%63s", name) == 1 && strcmp(name, "kvpoold") == 0) {
            fclose(of);
            break;
        }
        if (of != NULL)
            fclose(of);
        pid = 0;
    }
    fclose(file);
    return pid;
}

pid_t test_keeper_child(const struct test_daemon *daemon)
{
    pid_t pid = 0;

    for (int tries = 0; tries < 10 && pid == 0; tries++)
        pid = listed_child(daemon);
    return pid;
}

int test_keeper_stop(struct test_daemon *daemon)
{
    static const char *const names[] = {"kvpool.sock", "grpc.sock"};
    char path[300];
    int code;

    kill(daemon->pid, SIGTERM);
    code = test_daemon_wait(daemon);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        snprintf(path, sizeof(path), "%s/%s", daemon->dir, names[i]);
        unlink(path);
    }
    ck_assert_msg(rmdir(daemon->dir) == 0, "%s: %s", daemon->dir, strerror(errno));
    return code;
}

bool test_daemon_says(struct test_daemon *daemon, const char *text)
{
    static char seen[65536];
    uint64_t until = test_now_ms() + TEST_WAIT_MS;
    size_t n = 0;

    for (;;) {
        struct pollfd poll_fd = {.fd = daemon->log, .events = POLLIN};
        uint64_t now = test_now_ms();
        ssize_t got;

        ck_assert_msg(now < until, "the daemon did not say \"%s\" in time, but: %s", text, seen);
        if (poll(&poll_fd, 1, (int)(until - now)) != 1)
            continue;
        got = read(daemon->log, seen + n, 1); /* one by one: what follows stays for the next who reads */
        if (got <= 0) {
            seen[n] = 0;
            fprintf(stderr, "the daemon ended, saying: %s\n", seen);
            return false;
        }
        seen[++n] = 0;
        if (strstr(seen, text) != NULL)
            return true;
        if (seen[n - 1] == '\n' || n == sizeof(seen) - 1)
            n = 0;
    }
}

void test_daemon_start(struct test_daemon *daemon, const char *dir, const char *const *arguments)
{
    test_daemon_spawn(daemon, dir, arguments, NULL, -1);
    ck_assert_msg(test_daemon_says(daemon, "serves in"), "the daemon does not start");
}

int test_daemon_wait(struct test_daemon *daemon)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS;
    char text[4096];
    int status;

    /* Its log ends when it does. (Executors hold it too, and end with the daemon.) */
    for (;;) {
        struct pollfd poll_fd = {.fd = daemon->log, .events = POLLIN};
        uint64_t now = test_now_ms();
        ssize_t n;

        ck_assert_msg(now < until, "the daemon does not end");
        if (poll(&poll_fd, 1, (int)(until - now)) != 1)
            continue;
        n = read(daemon->log, text, sizeof(text));
        if (n <= 0)
            break;
        if (getenv("KVPOOL_TEST_VERBOSE") != NULL)
            fwrite(text, 1, (size_t)n, stderr);
    }
    close(daemon->log);
    ck_assert_int_eq(waitpid(daemon->pid, &status, 0), daemon->pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int test_daemon_stop(struct test_daemon *daemon)
{
    int code;

    kill(daemon->pid, SIGTERM);
    code = test_daemon_wait(daemon);
    ck_assert_msg(rmdir(daemon->dir) == 0, "%s: %s", daemon->dir, strerror(errno));
    return code;
}

/* ---- talk -------------------------------------------------------------------------------------------------------- */

int test_connect(const struct test_daemon *daemon)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {.tv_sec = TEST_WAIT_MS / 1000};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    ck_assert_int_ge(fd, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%.100s", daemon->socket);
    ck_assert_int_eq(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), 0);
    ck_assert_msg(connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0, "%s: %s", address.sun_path,
                  strerror(errno));
    return fd;
}

void test_send(int socket, uint16_t method, uint64_t tag, const ProtobufCMessage *body, const int *fds, unsigned n_fds)
{
    struct kvp_wire_packet packet;

    ck_assert_int_eq(kvp_wire_pack(method, 0, KVP_OK, tag, body, &packet), KVP_OK);
    ck_assert_int_eq(kvp_wire_send(socket, &packet, fds, n_fds), KVP_OK);
    kvp_wire_packet_free(&packet);
}

void test_receive(int socket, const ProtobufCMessageDescriptor *type, struct test_reply *reply)
{
    static struct kvp_wire_frame frame;
    enum kvp_status status = kvp_wire_receive(socket, false, &frame);

    ck_assert_msg(status == KVP_OK, "no reply: %s", kvp_status_name(status));
    ck_assert_uint_ne(frame.envelope.flags & KVP_ENVELOPE_REPLY, 0);
    memset(reply, 0, sizeof(*reply));
    reply->status = frame.envelope.status;
    reply->method = frame.envelope.method;
    reply->tag = frame.envelope.tag;
    reply->body = protobuf_c_message_unpack(reply->status == KVP_OK ? type : &kvpool__v1__error__descriptor, NULL,
                                            frame.envelope.bytes, frame.bytes);
    ck_assert_ptr_nonnull(reply->body);
    if (reply->status != KVP_OK)
        snprintf(reply->text, sizeof(reply->text), "%s", ((Kvpool__V1__Error *)(void *)reply->body)->message);
    memcpy(reply->fds, frame.fds, sizeof(int) * frame.n_fds);
    reply->n_fds = frame.n_fds;
    frame.n_fds = 0;
    kvp_wire_release(&frame);
}

void test_reply_free(struct test_reply *reply)
{
    protobuf_c_message_free_unpacked(reply->body, NULL);
    for (unsigned i = 0; i < reply->n_fds; i++)
        close(reply->fds[i]);
}

void test_call(int socket, uint16_t method, const ProtobufCMessage *body, const ProtobufCMessageDescriptor *type,
               struct test_reply *ret_reply)
{
    static uint64_t tag = 1000;
    static struct kvp_wire_frame frame;

    test_send(socket, method, ++tag, body, NULL, 0);
    /* a daemon killed behind an answer leaves the request where it is, and its successor answers again */
    while (kvp_wire_receive(socket, true, &frame) == KVP_OK && frame.envelope.tag > 1000 && frame.envelope.tag < tag) {
        kvp_wire_release(&frame);
        ck_assert_int_eq(kvp_wire_consume(socket), KVP_OK);
    }
    kvp_wire_release(&frame);
    test_receive(socket, type, ret_reply);
    ck_assert_uint_eq(ret_reply->method, method);
    ck_assert_uint_eq(ret_reply->tag, tag);
}

Kvpool__V1__GetStatsReply *test_stats(int socket)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    struct test_reply reply;

    test_call(socket, KVPOOL__V1__METHOD__METHOD_GET_STATS, &request.base, &kvpool__v1__get_stats_reply__descriptor,
              &reply);
    ck_assert_msg(reply.status == KVP_OK, "GetStats: %s", reply.text);
    return (Kvpool__V1__GetStatsReply *)(void *)reply.body;
}

bool test_hung_up(int socket)
{
    struct pollfd poll_fd = {.fd = socket, .events = POLLRDHUP};

    return poll(&poll_fd, 1, TEST_WAIT_MS) == 1 && (poll_fd.revents & (POLLHUP | POLLRDHUP)) != 0;
}

/* ---- what a process uses ----------------------------------------------------------------------------------------- */

unsigned test_fd_count(pid_t pid)
{
    char path[40];
    unsigned n = 0;
    DIR *dir;

    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    dir = opendir(path);
    ck_assert_ptr_nonnull(dir);
    for (const struct dirent *entry = readdir(dir); entry != NULL; entry = readdir(dir))
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

void test_expect_fd_count(pid_t pid, unsigned wanted)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS;
    unsigned n;

    while ((n = test_fd_count(pid)) != wanted) {
        ck_assert_msg(test_now_ms() < until, "%d has %u file descriptors open, not %u", (int)pid, n, wanted);
        sched_yield();
    }
}

unsigned test_resident_kib(pid_t pid, const char *field)
{
    char path[40], line[256];
    unsigned kib = 0;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    file = fopen(path, "re");
    ck_assert_ptr_nonnull(file);
    while (fgets(line, sizeof(line), file) != NULL)
        if (strncmp(line, field, strlen(field)) == 0 && line[strlen(field)] == ':')
            kib = (unsigned)strtoul(line + strlen(field) + 1, NULL, 10);
    fclose(file);
    return kib;
}
