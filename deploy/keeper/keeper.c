/**
 * kvpool-keeper: keeps kvpoold's file descriptors over its death and starts it again, where there is no systemd.
 *
 * A supervisor for containers and development. It speaks the part of systemd's service protocol that kvpoold uses
 * (sd_notify(3), sd_listen_fds(3)), so that the daemon does not know which of the two it runs under:
 *
 *   from the daemon, a datagram on $NOTIFY_SOCKET, lines of:
 *     READY=1                  it serves
 *     STATUS=text              what it is doing, for the log
 *     WATCHDOG=1               it lives; missing for WATCHDOG_USEC it is killed
 *     FDSTORE=1 [FDNAME=n]     keep the fds that come along, under that name (at most --fds; never polled: FDPOLL=0)
 *     FDSTOREREMOVE=1 FDNAME=n close those of that name
 *     BARRIER=1                close the fd that comes along: all before it has been seen to
 *   to the daemon, at its start: the kept fds from 3 on, LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES.
 *
 *             ┌───────────────── daemon died after READY: at once ──────────────────┐
 *             ▼                                                                     │
 *   start ─ STARTING ── READY=1 ──► SERVING ── exit, signal, watchdog ──────────────┤
 *             │ died before READY: wait 0.1 s … 5 s                                 │
 *             └── and never served before: exit with its code                       │
 *   SIGTERM, SIGINT ──► STOPPING (SIGTERM to the daemon, SIGKILL after --stop-ms) ──► kept fds closed, exit 0
 *
 * It is a subreaper, so that an executor whose daemon died becomes its child, and is reaped. With the last copy of its
 * socket closed here, the executor ends too. It holds no CUDA context, and allocates nothing after the start.
 */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FDS_MAX        8192
#define NAME_BYTES     32
#define NAMES_BYTES    (FDS_MAX * 15) /* LISTEN_FDNAMES is one string of the environment: under 128 KiB */
#define MESSAGE_FDS    253            /* SCM_MAX_FD */
#define BACKOFF_MIN_MS 100
#define BACKOFF_MAX_MS 5000

enum state { STARTING, SERVING, WAITING, STOPPING };

struct kept {
    int fd;
    char name[NAME_BYTES];
};

static struct keeper {
    enum state state;
    pid_t daemon;         /* 0: none */
    bool served;          /* a daemon was READY once */
    int notify;           /* the datagram socket */
    int signals;          /* signalfd */
    char **command;       /* NULL-terminated */
    unsigned backoff_ms;
    uint64_t due_ms;      /* WAITING: start then; STOPPING: kill then */
    uint64_t watchdog_ms; /* 0: none */
    uint64_t alive_ms;    /* when the daemon last said so */
    uint64_t stop_ms;
    unsigned fds_max, n_kept;
    struct kept kept[FDS_MAX];
    char names[NAMES_BYTES];
    struct sockaddr_un address;
    socklen_t address_bytes;
} keeper;

static uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

#define SAY(level, format, ...) kvp_log(level, "kvpool-keeper: " format, __VA_ARGS__)

static void fail(const char *what)
{
    SAY(LOG_ERR, "%s: %s", what, strerror(errno));
    exit(1);
}

/* ---- the store --------------------------------------------------------------------------------------------------- */

static size_t names_bytes(void)
{
    size_t n = 0;

    for (unsigned i = 0; i < keeper.n_kept; i++)
        n += strlen(keeper.kept[i].name) + 1;
    return n;
}

static void keep(int fd, const char *name)
{
    if (keeper.n_kept == keeper.fds_max || names_bytes() + strlen(name) + 2 > sizeof(keeper.names)) {
        SAY(LOG_ERR, "the store is full, with %u file descriptors: %s is not kept", keeper.n_kept, name);
        close(fd);
        return;
    }
    keeper.kept[keeper.n_kept].fd = fd;
    snprintf(keeper.kept[keeper.n_kept].name, NAME_BYTES, "%s", name);
    keeper.n_kept++;
}

static void drop(const char *name)
{
    unsigned left = 0;

    for (unsigned i = 0; i < keeper.n_kept; i++) {
        if (strcmp(keeper.kept[i].name, name) == 0)
            close(keeper.kept[i].fd);
        else
            keeper.kept[left++] = keeper.kept[i];
    }
    keeper.n_kept = left;
}

/* ---- starting the daemon ----------------------------------------------------------------------------------------- */

/* After fork, one thread: the kept fds come to lie at 3, 4, …, in two steps so that none is overwritten on its way. */
static void exec_daemon(void)
{
    int above = 3 + (int)keeper.n_kept;
    char text[32];
    size_t at = 0;
    sigset_t none;

    for (unsigned i = 0; i < keeper.n_kept; i++)
        if (keeper.kept[i].fd < above && (keeper.kept[i].fd = fcntl(keeper.kept[i].fd, F_DUPFD, above)) < 0)
            _exit(126);
    for (unsigned i = 0; i < keeper.n_kept; i++) {
        if (dup2(keeper.kept[i].fd, 3 + (int)i) < 0) /* the copy is not close-on-exec */
            _exit(126);
        at += (size_t)snprintf(keeper.names + at, sizeof(keeper.names) - at, "%s%s", i > 0 ? ":" : "",
                               keeper.kept[i].name);
    }
    keeper.names[at] = 0;
    snprintf(text, sizeof(text), "%ld", (long)getpid());
    setenv("LISTEN_PID", text, 1);
    if (keeper.watchdog_ms > 0)
        setenv("WATCHDOG_PID", text, 1);
    if (keeper.n_kept > 0) { /* none is said by saying nothing: sd_listen_fds(3) takes LISTEN_FDS=0 for an error */
        snprintf(text, sizeof(text), "%u", keeper.n_kept);
        setenv("LISTEN_FDS", text, 1);
        setenv("LISTEN_FDNAMES", keeper.names, 1);
    } else {
        unsetenv("LISTEN_FDS");
        unsetenv("LISTEN_FDNAMES");
    }
    if (close_range((unsigned)above, ~0u, 0) != 0)
        _exit(126);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    execvp(keeper.command[0], keeper.command);
    SAY(LOG_ERR, "%s: %s", keeper.command[0], strerror(errno));
    _exit(127);
}

static void start_daemon(void)
{
    pid_t pid = fork();

    if (pid == 0)
        exec_daemon();
    if (pid < 0) {
        SAY(LOG_ERR, "fork: %s; tried again in %u ms", strerror(errno), keeper.backoff_ms);
        keeper.state = WAITING;
        keeper.due_ms = now_ms() + keeper.backoff_ms;
        return;
    }
    keeper.daemon = pid;
    keeper.state = STARTING;
    keeper.alive_ms = now_ms();
}

/* ---- what the daemon says ---------------------------------------------------------------------------------------- */

static void heard(char *text, int *fds, unsigned n_fds)
{
    char *name = NULL, *rest = NULL;
    bool store = false, remove = false, barrier = false;

    for (char *line = strtok_r(text, "\n", &rest); line != NULL; line = strtok_r(NULL, "\n", &rest)) {
        if (strcmp(line, "READY=1") == 0 && keeper.state == STARTING) {
            keeper.state = SERVING;
            keeper.served = true;
            keeper.backoff_ms = BACKOFF_MIN_MS;
        } else if (strcmp(line, "WATCHDOG=1") == 0) {
            keeper.alive_ms = now_ms();
        } else if (strcmp(line, "FDSTORE=1") == 0) {
            store = true;
        } else if (strcmp(line, "FDSTOREREMOVE=1") == 0) {
            remove = true;
        } else if (strcmp(line, "BARRIER=1") == 0) {
            barrier = true;
        } else if (strncmp(line, "FDNAME=", 7) == 0) {
            name = line + 7;
        }
    }
    if (name != NULL && (strlen(name) >= NAME_BYTES || strchr(name, ':') != NULL))
        name = NULL;
    if (remove && name != NULL)
        drop(name);
    for (unsigned i = 0; i < n_fds; i++) {
        if (store && !barrier)
            keep(fds[i], name != NULL ? name : "stored");
        else
            close(fds[i]); /* which is what a barrier waits for */
    }
}

/* One datagram. Only the daemon itself is listened to: not its children, not a daemon that has died. */
static bool hear(void)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int) * MESSAGE_FDS)];
    } control;
    char text[4096];
    struct iovec iov = {text, sizeof(text) - 1};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n = recvmsg(keeper.notify, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    int fds[MESSAGE_FDS];
    unsigned n_fds = 0;
    pid_t from = 0;

    if (n < 0)
        return errno == EINTR;
    text[n] = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            n_fds = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(c), n_fds * sizeof(int));
        } else if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_CREDENTIALS) {
            struct ucred peer;

            memcpy(&peer, CMSG_DATA(c), sizeof(peer));
            from = peer.pid;
        }
    }
    if (from != keeper.daemon || from == 0)
        text[0] = 0;
    heard(text, fds, n_fds);
    return true;
}

/* ---- its death --------------------------------------------------------------------------------------------------- */

static void say_ended(int status, pid_t pid, const char *then)
{
    const char *how = WIFEXITED(status) ? "exited with" : "died of signal";
    int number = WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status);

    SAY(keeper.state == STOPPING ? LOG_INFO : LOG_WARNING, "the daemon (pid %d) %s %d%s", (int)pid, how, number, then);
}

static void daemon_died(int status)
{
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    pid_t pid = keeper.daemon;

    keeper.daemon = 0;
    if (keeper.state == STOPPING) {
        say_ended(status, pid, "; what was kept is given up");
        exit(0);
    }
    if (keeper.state == SERVING) {
        say_ended(status, pid, ", and is started again, with all that is kept");
        start_daemon();
        return;
    }
    if (!keeper.served) {
        say_ended(status, pid, " and never served");
        exit(code != 0 ? code : 1);
    }
    say_ended(status, pid, " before it was ready, and is started again in a moment; what is kept stays");
    keeper.state = WAITING;
    keeper.due_ms = now_ms() + keeper.backoff_ms;
    keeper.backoff_ms = keeper.backoff_ms * 2 < BACKOFF_MAX_MS ? keeper.backoff_ms * 2 : BACKOFF_MAX_MS;
}

static void reap(void)
{
    int status, ended = 0;
    bool died = false;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == keeper.daemon) {
            died = true;
            ended = status;
        }
    }
    if (!died)
        return;
    while (hear()) /* what it said before it died still counts: a thing may have been parked last */
        continue;
    daemon_died(ended);
}

static void stop(void)
{
    if (keeper.daemon == 0)
        exit(0);
    keeper.state = STOPPING;
    keeper.due_ms = now_ms() + keeper.stop_ms;
    kill(keeper.daemon, SIGTERM);
}

static void signalled(void)
{
    struct signalfd_siginfo info;

    while (read(keeper.signals, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        if (info.ssi_signo == SIGCHLD)
            reap();
        else if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT)
            stop();
        else if (keeper.daemon > 0)
            kill(keeper.daemon, (int)info.ssi_signo);
    }
}

/* What is due by the clock. @return ms until the next thing is, -1: never */
static int due(void)
{
    uint64_t now = now_ms(), next = UINT64_MAX;

    if (keeper.state == WAITING && now >= keeper.due_ms)
        start_daemon();
    if (keeper.state == STOPPING && now >= keeper.due_ms) {
        SAY(LOG_WARNING, "the daemon (pid %d) did not stop in %llu ms (--stop-ms): killed", (int)keeper.daemon,
            (unsigned long long)keeper.stop_ms);
        kill(keeper.daemon, SIGKILL);
        keeper.due_ms = now + keeper.stop_ms;
    }
    if (keeper.state == SERVING && keeper.watchdog_ms > 0 && now >= keeper.alive_ms + keeper.watchdog_ms) {
        SAY(LOG_WARNING, "the daemon (pid %d) was silent for %llu ms (--watchdog-ms): killed", (int)keeper.daemon,
            (unsigned long long)keeper.watchdog_ms);
        kill(keeper.daemon, SIGKILL);
        keeper.alive_ms = now;
    }
    if (keeper.state == WAITING || keeper.state == STOPPING)
        next = keeper.due_ms;
    else if (keeper.state == SERVING && keeper.watchdog_ms > 0)
        next = keeper.alive_ms + keeper.watchdog_ms;
    return next == UINT64_MAX ? -1 : next <= now ? 0 : (int)(next - now);
}

/* ---- start ------------------------------------------------------------------------------------------------------- */

/* An abstract address of the kernel's choice: nothing to remove, and nobody guesses it before it is bound. */
static void open_notify_socket(void)
{
    int on = 1;
    char name[sizeof(keeper.address.sun_path) + 1];

    keeper.address.sun_family = AF_UNIX;
    keeper.address_bytes = sizeof(keeper.address);
    keeper.notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (keeper.notify < 0 || setsockopt(keeper.notify, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) != 0 ||
        bind(keeper.notify, (struct sockaddr *)&keeper.address, sizeof(sa_family_t)) != 0 ||
        getsockname(keeper.notify, (struct sockaddr *)&keeper.address, &keeper.address_bytes) != 0)
        fail("notify socket");
    snprintf(name, sizeof(name), "@%.*s", (int)(keeper.address_bytes - sizeof(sa_family_t) - 1),
             keeper.address.sun_path + 1);
    setenv("NOTIFY_SOCKET", name, 1);
}

static void open_signals(void)
{
    static const int handled[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2};
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < sizeof(handled) / sizeof(handled[0]); i++)
        sigaddset(&set, handled[i]);
    if (sigprocmask(SIG_BLOCK, &set, NULL) != 0 ||
        (keeper.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)) < 0 ||
        signal(SIGPIPE, SIG_IGN) == SIG_ERR) /* who reads the log may end: the memory must not with it */
        fail("signals");
}

static const struct option options[] = {
    {"watchdog-ms", required_argument, NULL, 'w'}, {"stop-ms", required_argument, NULL, 's'},
    {"fds", required_argument, NULL, 'f'},         {"version", no_argument, NULL, 'v'},
    {"help", no_argument, NULL, 'h'},              {NULL, 0, NULL, 0},
};

static const char help[] =
    "usage: kvpool-keeper [OPTION]... [--] kvpoold [ARGUMENT]...\n"
    "Starts kvpoold, keeps its file descriptors over its death, and starts it again. Where systemd runs, it does this.\n"
    "  --watchdog-ms N  kill a daemon that is silent for so long; 0: never (default 10000)\n"
    "  --stop-ms N      on SIGTERM, how long the daemon may take to stop (default 10000)\n"
    "  --fds N          how many file descriptors are kept (default and most: 8192)\n"
    "  --version, --help\n";

static unsigned long number(const char *name, const char *text, unsigned long most)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);

    if (*text < '0' || *text > '9' || *end != 0 || value > most) {
        fprintf(stderr, "kvpool-keeper: --%s %s: a number from 0 to %lu\n", name, text, most);
        exit(2);
    }
    return value;
}

static void parse(int argc, char **argv)
{
    int option;

    keeper.watchdog_ms = 10000;
    keeper.stop_ms = 10000;
    keeper.fds_max = FDS_MAX;
    while ((option = getopt_long(argc, argv, "+h", options, NULL)) != -1) {
        switch (option) {
        case 'w':
            keeper.watchdog_ms = number("watchdog-ms", optarg, 3600 * 1000);
            break;
        case 's':
            keeper.stop_ms = number("stop-ms", optarg, 3600 * 1000);
            break;
        case 'f':
            keeper.fds_max = (unsigned)number("fds", optarg, FDS_MAX);
            break;
        case 'v':
            puts("kvpool-keeper " KVPOOL_VERSION);
            exit(0);
        case 'h':
            fputs(help, stdout);
            exit(0);
        default:
            fputs(help, stderr);
            exit(2);
        }
    }
    if (optind == argc) {
        fputs(help, stderr);
        exit(2);
    }
    keeper.command = argv + optind;
}

int main(int argc, char **argv)
{
    struct rlimit files;
    char text[32];

    kvp_log_open_standard_files();
    kvp_log_start(LOG_INFO);
    parse(argc, argv);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (prctl(PR_SET_CHILD_SUBREAPER, 1) != 0)
        fail("subreaper");
    open_signals();
    open_notify_socket();
    if (keeper.watchdog_ms > 0) {
        snprintf(text, sizeof(text), "%llu", (unsigned long long)keeper.watchdog_ms * 1000);
        setenv("WATCHDOG_USEC", text, 1);
    }
    keeper.backoff_ms = BACKOFF_MIN_MS;
    start_daemon();
    for (;;) {
        struct pollfd waits[2] = {{keeper.signals, POLLIN, 0}, {keeper.notify, POLLIN, 0}};

        if (poll(waits, 2, due()) < 0 && errno != EINTR)
            fail("poll");
        if (waits[1].revents != 0)
            while (hear())
                continue;
        if (waits[0].revents != 0)
            signalled();
    }
}
