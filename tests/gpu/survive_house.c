/** What surrounds survive_gpu's tests: see survive_house.h. */
#include "survive_house.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct survive_run t;

struct slot *slot_of(unsigned i)
{
    return &t.shared->slots[i];
}

/* ---- saying ------------------------------------------------------------------------------------------------------ */

void step(const char *format, ...)
{
    va_list args;

    printf("    %u.%u ", t.number, ++t.steps);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
}

void failed(const char *format, ...)
{
    va_list args;

    printf("FAILED  %s: behind step %u.%u: ", t.test, t.number, t.steps);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
    t.result = FAILED;
    longjmp(t.out, 1);
}

void skipped(const char *why)
{
    printf("skipped %s: %s\n", t.test, why);
    fflush(stdout);
    t.result = LEFT_OUT;
    longjmp(t.out, 1);
}

void well(const char *what, enum kvp_status status)
{
    if (status != KVP_OK)
        failed("%s: %s (%s)", what, kvp_error_text(), kvp_status_name(status));
}

/* ---- time -------------------------------------------------------------------------------------------------------- */

double now_ms(void)
{
    return (double)now_ns() / 1e6;
}

void sleep_us(long us)
{
    struct timespec pause = {us / 1000000, us % 1000000 * 1000};

    nanosleep(&pause, NULL);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double median(double *values, unsigned n)
{
    qsort(values, n, sizeof(values[0]), by_value);
    return values[n / 2];
}

/* ---- processes --------------------------------------------------------------------------------------------------- */

void end_process(pid_t *pid, int signal_number)
{
    double until = now_ms() + 10000;
    int status;

    if (*pid <= 0)
        return;
    kill(*pid, signal_number);
    kill(*pid, SIGCONT);
    while (waitpid(*pid, &status, WNOHANG) == 0) {
        if (now_ms() > until)
            kill(*pid, SIGKILL);
        sleep_us(500);
    }
    *pid = 0;
}

static void stop_mps(void);

void clean_up(void)
{
    char command[128];

    for (unsigned i = 0; i < SLOTS; i++) {
        pid_t child = t.shared != NULL ? atomic_load(&t.shared->slots[i].child) : 0;

        end_process(&t.workers[i], SIGKILL);
        if (child > 0) {
            kill(child, SIGKILL);
            waitpid(child, NULL, 0);
        }
    }
    if (t.client != NULL)
        kvp_disconnect(t.client);
    t.client = NULL;
    end_process(&t.keeper, SIGTERM);
    stop_mps();
    while (waitpid(-1, NULL, WNOHANG) > 0) /* executors that a dead daemon left to this subreaper */
        continue;
    if (t.folder[0] == 0)
        return;
    snprintf(command, sizeof(command), "rm -rf '%s'", t.folder);
    if (system(command) != 0)
        fprintf(stderr, "%s can not be removed\n", t.folder);
    t.folder[0] = 0;
}

void time_is_over(int number)
{
    static char text[160];
    int n = snprintf(text, sizeof(text),
                     "FAILED  %s: behind step %u.%u: the time is over\n%u passed, %u failed, %u skipped\n", t.test,
                     t.number, t.steps, t.passed, t.failed + 1, t.skipped);

    (void)number;
    if (write(STDOUT_FILENO, text, (size_t)n) < 0)
        _exit(1);
    for (unsigned i = 0; i < SLOTS; i++)
        if (t.workers[i] > 0)
            kill(t.workers[i], SIGKILL);
    if (t.keeper > 0) {
        kill(t.keeper, SIGCONT);
        kill(t.keeper, SIGTERM);
    }
    for (unsigned i = 0; i < SLOTS; i++)
        if (atomic_load(&slot_of(i)->child) > 0)
            kill(atomic_load(&slot_of(i)->child), SIGKILL);
    if (t.mps && fork() == 0)
        execl("/bin/sh", "sh", "-c", "echo quit -t 5 | timeout 20 nvidia-cuda-mps-control", (char *)NULL);
    _exit(1);
}

static const char *program(const char *name, char path[256])
{
    const char *folder = getenv("KVPOOL_BIN_DIR");
    char self[200];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);

    if (folder != NULL) {
        snprintf(path, 256, "%s/%s", folder, name);
        return path;
    }
    self[n > 0 ? n : 0] = 0;
    *strrchr(self, '/') = 0;
    snprintf(path, 256, "%s/../bin/%s", self, name);
    return path;
}

void start_worker(unsigned i, const char *role)
{
    char index[8], fd[8], self[256];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);

    self[n > 0 ? n : 0] = 0;
    memset(slot_of(i), 0, sizeof(struct slot));
    snprintf(index, sizeof(index), "%u", i);
    snprintf(fd, sizeof(fd), "%d", t.shared_fd);
    t.workers[i] = fork();
    if (t.workers[i] == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        fcntl(t.shared_fd, F_SETFD, 0);
        execl(self, self, "--role", role, index, fd, t.endpoint, (char *)NULL);
        _exit(127);
    }
    if (t.workers[i] < 0)
        failed("fork: %s", strerror(errno));
}

void check_worker(unsigned i)
{
    int status;

    if (atomic_load(&slot_of(i)->failed) != 0)
        failed("worker %u: %s", i, slot_of(i)->text);
    if (t.workers[i] > 0 && waitpid(t.workers[i], &status, WNOHANG) == t.workers[i]) {
        t.workers[i] = 0;
        if (atomic_load(&slot_of(i)->failed) != 0)
            failed("worker %u: %s", i, slot_of(i)->text);
        if (atomic_load(&slot_of(i)->finished) == 0)
            failed("worker %u ended, wait status %#x", i, (unsigned)status);
    }
}

void await(unsigned i, atomic_uint *word, const char *what)
{
    double until = now_ms() + WAIT_MS;

    while (atomic_load(word) == 0) {
        check_worker(i);
        if (now_ms() > until)
            failed("worker %u: %s: not in %d s", i, what, WAIT_MS / 1000);
        sleep_us(200);
    }
}

void start_daemon(const char *executor_environment)
{
    struct kvp_connect_options options = {.connect_ms = 30000, .reconnect_ms = WAIT_MS, .call_ms = WAIT_MS};
    char keeper[256], daemon[256], environment[200];

    snprintf(environment, sizeof(environment), "executor.environment=%s", executor_environment);
    t.keeper = fork();
    if (t.keeper == 0) {
        int log = open(t.log, O_WRONLY | O_CREAT | O_APPEND, 0600);

        prctl(PR_SET_PDEATHSIG, SIGTERM);
        dup2(log, STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        unsetenv("CUDA_MPS_PIPE_DIRECTORY"); /* the executor is told, if it is to have it */
        execl(program("kvpool-keeper", keeper), "kvpool-keeper", "--", program("kvpoold", daemon), "--runtime-dir",
              t.folder, "--backend", t.shared->plan.cuda ? "cuda" : "host", "--set", "log.level=notice", "--set",
              "ledger.audit_s=1", "--set", environment, (char *)NULL);
        _exit(127);
    }
    if (t.keeper < 0)
        failed("fork: %s", strerror(errno));
    well("connect", kvp_connect(t.endpoint, &options, &t.client));
}

pid_t daemon_pid(void)
{
    char path[64], name[32];
    FILE *file;
    int pid, found = 0;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", (int)t.keeper, (int)t.keeper);
    file = fopen(path, "re");
    while (file != NULL && found == 0 && fscanf(file, "%d", &pid) == 1) {
        FILE *comm;

        snprintf(path, sizeof(path), "/proc/%d/comm", pid);
        comm = fopen(path, "re");
        if (comm != NULL && fscanf(comm, "%31s", name) == 1 && strcmp(name, "kvpoold") == 0)
            found = pid;
        if (comm != NULL)
            fclose(comm);
    }
    if (file != NULL)
        fclose(file);
    return found;
}

int pidfd_of(pid_t pid)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);

    if (pidfd < 0)
        failed("pidfd of %d: %s", (int)pid, strerror(errno));
    return pidfd;
}

void await_end(int pidfd)
{
    struct pollfd ended = {.fd = pidfd, .events = POLLIN};

    if (poll(&ended, 1, WAIT_MS) != 1)
        failed("a killed process does not end");
    close(pidfd);
}

/* ---- what the daemon says ---------------------------------------------------------------------------------------- */

uint32_t free_pages(const char *pool)
{
    struct kvp_pool_info *info;
    uint32_t pages;

    well("describe", kvp_pool_describe(t.client, pool, &info));
    pages = info->free_pages;
    kvp_pool_info_free(info);
    return pages;
}

pid_t executor_pid(void)
{
    struct kvp_stats *stats;
    pid_t pid;

    well("stats", kvp_get_stats(t.client, &stats));
    pid = stats->n_executors > 0 ? (pid_t)stats->executors[0].pid : 0;
    kvp_stats_free(stats);
    return pid;
}

void make_pool(bool big)
{
    struct kvp_plane_spec planes[KVP_PLANES_MAX];
    struct kvp_pool_spec spec = survive_spec(&t.shared->plan, big, planes);
    struct kvp_pool_info *info;
    double from = now_ms();
    enum kvp_status status = kvp_pool_create(t.client, &spec, &info);

    while (big && status == KVP_ENOMEM && t.shared->plan.big_pages > 4096) {
        t.shared->plan.big_pages /= 2;
        t.shared->plan.fill_tokens /= 2;
        spec.layout.pages = t.shared->plan.big_pages;
        status = kvp_pool_create(t.client, &spec, &info);
    }
    well("create", status);
    if (t.shared->plan.cuda)
        snprintf(t.uuid, sizeof(t.uuid), "%s", info->spec.devices[0]);
    step("pool of %.2f GiB made in %.0f ms: %u pages, %s", (double)info->slab_bytes / (1 << 30), now_ms() - from,
         info->spec.layout.pages, t.shared->plan.cuda ? t.uuid : "host");
    kvp_pool_info_free(info);
}

uint64_t compare_digests(void)
{
    double from = now_ms(), until = from + WAIT_MS, took;
    struct kvp_page_audit *audit;
    uint64_t checked, missing;

    for (long pause_us = 50000;; pause_us += pause_us / 2) {
        from = now_ms();
        well("audit of pages", kvp_audit_pages(t.client, &audit));
        took = now_ms() - from;
        checked = audit->pages_checked;
        missing = audit->pages_without_digest;
        if (audit->violations != 0)
            failed("%u violations; the first: %s", audit->violations, audit->n_texts > 0 ? audit->texts[0] : "?");
        free(audit);
        if (missing == 0)
            break;
        if (now_ms() > until)
            failed("%llu pages have no digest", (unsigned long long)missing);
        sleep_us(pause_us);
    }
    step("the bytes of %llu sealed pages are those that were sealed; ledger clean; compared in %.0f ms",
         (unsigned long long)checked, took);
    return checked;
}

/* ---- MPS ----------------------------------------------------------------------------------------------------------- */

static void control_mps(const char *line)
{
    char command[200];

    snprintf(command, sizeof(command), "echo %s | timeout 20 nvidia-cuda-mps-control >>'%s' 2>&1", line, t.log);
    if (system(command) != 0)
        printf("        nvidia-cuda-mps-control %s failed\n", line);
}

void start_mps(void)
{
    char folder[100];

    if (system("command -v nvidia-cuda-mps-control >/dev/null 2>&1") != 0)
        skipped("there is no nvidia-cuda-mps-control");
    snprintf(folder, sizeof(folder), "%s/mps", t.folder);
    if (mkdir(folder, 0700) != 0)
        failed("%s: %s", folder, strerror(errno));
    setenv("CUDA_MPS_PIPE_DIRECTORY", folder, 1);
    setenv("CUDA_MPS_LOG_DIRECTORY", folder, 1);
    if (system("timeout 20 nvidia-cuda-mps-control -d >/dev/null 2>&1") != 0)
        skipped("nvidia-cuda-mps-control does not start here");
    t.mps = true;
    start_worker(7, "probe");
    while (atomic_load(&slot_of(7)->finished) == 0) {
        if (atomic_load(&slot_of(7)->failed) != 0) {
            step("no context under MPS: %s", slot_of(7)->text);
            skipped("MPS gives no context here");
        }
        check_worker(7);
        sleep_us(1000);
    }
    end_process(&t.workers[7], SIGKILL);
    step("MPS is started");
}

static void stop_mps(void)
{
    if (t.mps)
        control_mps("quit -t 5");
    t.mps = false;
    unsetenv("CUDA_MPS_PIPE_DIRECTORY");
    unsetenv("CUDA_MPS_LOG_DIRECTORY");
}

/* An append by the executor, tried until one that works is there. */
