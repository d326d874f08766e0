/** A kvpoold for a bench: started in a folder of its own, waited for, stopped. Ends the program where that fails. */
#ifndef KVP_BENCH_DAEMON_H
#define KVP_BENCH_DAEMON_H

#include <sys/types.h>

struct bench_daemon {
    pid_t pid;
    char folder[64];
    int log; /* its stderr */
};

/** $KVPOOL_BIN_DIR/kvpoold on the host backend; it serves when this returns, on folder/kvpool.sock and grpc.sock. */
void bench_daemon_start(struct bench_daemon *ret_daemon);
/** SIGTERM; it must end with 0 and leave its folder empty. */
void bench_daemon_stop(struct bench_daemon *daemon);

/** A new folder under /tmp. */
void bench_folder(char ret_folder[64]);
/** Say what failed, and end the program with 2. */
_Noreturn void bench_fail(const char *what);

#endif
