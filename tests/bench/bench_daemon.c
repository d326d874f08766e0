/** Starts and stops a kvpoold for a bench; see bench_daemon.h. That it serves is read from its log. */
#include "bench_daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define START_MS 30000

_Noreturn void bench_fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, what);
    exit(2);
}

void bench_folder(char ret_folder[64])
{
    strcpy(ret_folder, "/tmp/kvpool-bench-XXXXXX");
    if (mkdtemp(ret_folder) == NULL)
        bench_fail("no folder under /tmp");
}

/* Read its log until a line says that it serves. */
static void await_serving(struct bench_daemon *daemon)
{
    struct pollfd ready = {.fd = daemon->log, .events = POLLIN};
    char text[8192];
    size_t n = 0;

    do {
        ssize_t got;

        if (poll(&ready, 1, START_MS) != 1)
            bench_fail("kvpoold does not serve in time");
        got = read(daemon->log, text + n, sizeof(text) - 1 - n);
        if (got <= 0) {
            fputs(n > 0 ? text : "", stderr);
            bench_fail("kvpoold ended at its start");
        }
        n += (size_t)got;
        text[n] = 0;
    } while (strstr(text, " serves in ") == NULL);
}

void bench_daemon_start(struct bench_daemon *ret_daemon)
{
    const char *programs = getenv("KVPOOL_BIN_DIR");
    struct bench_daemon *daemon = ret_daemon;
    char path[4096];
    int ends[2];

    if (programs == NULL)
        bench_fail("KVPOOL_BIN_DIR is not set: the folder of kvpoold");
    snprintf(path, sizeof(path), "%s/kvpoold", programs);
    bench_folder(daemon->folder);
    if (pipe2(ends, O_CLOEXEC) != 0)
        bench_fail("no pipe");
    daemon->pid = fork();
    if (daemon->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        dup2(ends[1], STDERR_FILENO);
        execl(path, "kvpoold", "--backend", "host", "--runtime-dir", daemon->folder, (char *)NULL);
        _exit(127);
    }
    if (daemon->pid < 0)
        bench_fail("no process for kvpoold");
    close(ends[1]);
    daemon->log = ends[0];
    await_serving(daemon);
}

void bench_daemon_stop(struct bench_daemon *daemon)
{
    int status = 0;

    if (kill(daemon->pid, SIGTERM) != 0 || waitpid(daemon->pid, &status, 0) != daemon->pid || status != 0)
        bench_fail("kvpoold did not end well");
    close(daemon->log);
    if (rmdir(daemon->folder) != 0)
        bench_fail("kvpoold left something in its folder");
}
