/**
 * A real kvpoold for a test: started in a folder of its own, waited for, spoken to over raw session sockets, stopped.
 *
 * Functions fail the test (Check) where something is not as it must be. The program is $KVPOOL_BIN_DIR/kvpoold, or ../bin/kvpoold seen from the test.
 */
#ifndef KVP_TEST_DAEMON_H
#define KVP_TEST_DAEMON_H

#include "kvp_wire.h"
#include "kvpool.pb-c.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define TEST_WAIT_MS 60000 /* for what must happen; an overloaded machine is not a failure */

struct test_daemon {
    pid_t pid;
    char dir[200];    /* made for it, unless it was there */
    char socket[240]; /* dir/kvpool.sock */
    int log;          /* its stderr */
};

/* A new, empty folder under $TMPDIR. */
void test_folder(char ret_dir[200]);

/**
 * Start it and wait until it serves.
 * @param dir        to run in; NULL: a new one
 * @param arguments  [up to 16] more of the command line, NULL-terminated; NULL: none
 */
void test_daemon_start(struct test_daemon *daemon, const char *dir, const char *const *arguments);
/* The same, without waiting. `environment`: NAME=VALUE, NULL-terminated, or NULL. pass_fd: becomes its fd 3, with
 * LISTEN_FDS=1; -1: none */
void test_daemon_spawn(struct test_daemon *daemon, const char *dir, const char *const *arguments,
                       const char *const *environment, int pass_fd);
/* The same as test_daemon_start, under kvpool-keeper: `pid` is the keeper's. What the daemon binds stays in the folder
 * when it ends, for its successor. */
void test_keeper_start(struct test_daemon *daemon, const char *const *arguments);
/* The daemon that the keeper runs now; 0: none. */
pid_t test_keeper_child(const struct test_daemon *daemon);
/* SIGTERM to the keeper; @return its exit code. The folder is removed with what is in it. */
int test_keeper_stop(struct test_daemon *daemon);

/* Read its log until a line holds `text`. @return false: it ended first */
bool test_daemon_says(struct test_daemon *daemon, const char *text);

/* SIGTERM; @return its exit code, or 128 + signal. The folder is removed, which fails unless it is empty. */
int test_daemon_stop(struct test_daemon *daemon);
/* Wait for its end, whatever brings it; the folder stays. */
int test_daemon_wait(struct test_daemon *daemon);

/* A connection to the session socket: blocking, with a time limit. */
int test_connect(const struct test_daemon *daemon);

/* Send one message as it is. */
void test_send(int socket, uint16_t method, uint64_t tag, const ProtobufCMessage *body, const int *fds, unsigned n_fds);

struct test_reply {
    enum kvp_status status;
    uint16_t method;
    uint64_t tag;
    ProtobufCMessage *body; /* of the type asked for, or Error */
    char text[256];         /* of an Error */
    int fds[KVP_MESSAGE_FDS_MAX];
    unsigned n_fds;
};
/* Wait for one reply; free it by test_reply_free. */
void test_receive(int socket, const ProtobufCMessageDescriptor *type, struct test_reply *ret_reply);
void test_reply_free(struct test_reply *reply);
/* Both; fails unless the reply is to this call. Answers to earlier ones, said again, are skipped. */
void test_call(int socket, uint16_t method, const ProtobufCMessage *body, const ProtobufCMessageDescriptor *type,
               struct test_reply *ret_reply);

/* GetStats over that connection; fails unless it is answered. Free it by kvpool__v1__get_stats_reply__free_unpacked. */
Kvpool__V1__GetStatsReply *test_stats(int socket);

/* End-of-file within the time limit. */
bool test_hung_up(int socket);

/* Open fds of a process. */
unsigned test_fd_count(pid_t pid);
/* Wait until it has so many: one of its threads may hold another for a moment. */
void test_expect_fd_count(pid_t pid, unsigned wanted);
/* A line of /proc/PID/status, in KiB: "VmRSS", "RssAnon". */
unsigned test_resident_kib(pid_t pid, const char *field);

/* Monotonic, in ms. */
uint64_t test_now_ms(void);

#endif
