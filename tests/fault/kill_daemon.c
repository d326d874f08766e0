/**
 * Kill the daemon again and again, and show that nothing was lost.
 *
 *   kill_daemon [--kills N] [--seed S] [--json]      200 kills, seed 1
 *
 * Under kvpool-keeper, FAULT_WORKERS worker processes work on a pool (worker.h) while the daemon dies of SIGKILL: half
 * the times at a random moment, half at one of the four moments of a call that matter (kill_point.h). Then a judge
 * replays the workers' logs: what was acknowledged must be in the ledger, once. The last line of stdout is one JSON
 * object: kills, kills_at {after_peek, after_commit, before_reply, after_reply}, lost_calls, repeated_calls,
 * corrupt_bytes, leaked_pages, worker_restarts, pause_p50_ms, pause_p99_ms. Exits 1 if anything was lost.
 *
 * KVPOOL_TEST_KEEP=1 leaves the folder with the workers' logs where it is.
 *
 * A pause is from the kill to the answer of the first call made after it, by this process, over its own session.
 */
#include "kill_point.h"
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define KILLS_MAX 100000

struct trial {
    char folder[128], endpoint[160], word_path[160];
    unsigned kills, done;
    uint64_t random, seed;
    bool json;
    struct fault_shared *shared;
    atomic_uint *word;
    pid_t keeper, workers[FAULT_WORKERS];
    struct kvp_client *client;
    unsigned at[5];
    double *pauses_ms;
    unsigned long long lost, repeated, damaged, compared;
    unsigned restarts;
};

static struct trial trial;
static pid_t main_pid; /* children that exit remove nothing */

/* At every exit: nothing is left running, nor in the folder. KVPOOL_TEST_KEEP leaves the folder to look at. */
static void clean_up(void)
{
    char command[256];
    int status;

    if (getpid() != main_pid)
        return;
    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        if (trial.workers[i] > 0 && kill(trial.workers[i], SIGKILL) == 0)
            waitpid(trial.workers[i], &status, 0);
    if (trial.keeper > 0 && kill(trial.keeper, SIGTERM) == 0)
        waitpid(trial.keeper, &status, 0);
    if (trial.folder[0] == 0)
        return;
    if (getenv("KVPOOL_TEST_KEEP") != NULL) {
        fprintf(stderr, "kill_daemon: %s is kept\n", trial.folder);
        return;
    }
    snprintf(command, sizeof(command), "rm -rf '%s'", trial.folder);
    if (system(command) != 0)
        fprintf(stderr, "kill_daemon: %s can not be removed\n", trial.folder);
}

static void fail(const char *what)
{
    fprintf(stderr, "kill_daemon: %s: %s %s\n", what, kvp_error_text(), errno != 0 ? strerror(errno) : "");
    exit(1);
}

static double now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void *map_file(const char *path, size_t bytes)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void *at;

    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0)
        fail(path);
    at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    close(fd);
    return at;
}

/* $KVPOOL_BIN_DIR is BUILD/bin; the daemon with kill points is a test program, in BUILD/tests. */
static const char *program(const char *name, char *path, size_t n)
{
    const char *folder = getenv("KVPOOL_BIN_DIR");

    snprintf(path, n, "%s/../%s", folder != NULL ? folder : "build/release/bin", name);
    return path;
}

static void start_keeper(struct trial *t)
{
    char keeper[256], daemon[256], executor[300] = "executor.path=";

    program("bin/kvpool-exec", executor + strlen(executor), sizeof(executor) - strlen(executor));
    setenv("KVPOOL_KILL_WORD", t->word_path, 1);
    t->keeper = fork();
    if (t->keeper == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        execl(program("bin/kvpool-keeper", keeper, sizeof(keeper)), "kvpool-keeper", "--",
              program("tests/kvpoold-hooks", daemon, sizeof(daemon)), "--runtime-dir", t->folder, "--backend", "host",
              "--set", "log.level=warning", "--set", executor, (char *)NULL);
        _exit(127);
    }
    if (t->keeper < 0)
        fail("fork");
}

static void start_workers(struct trial *t)
{
    for (unsigned i = 0; i < FAULT_WORKERS; i++) {
        char log[192];
        struct fault_job job = {.shared = t->shared, .endpoint = t->endpoint, .log_path = log, .index = i,
                                .seed = t->seed * 1000 + i, .transfers = true, .keep_at_end = true};

        snprintf(log, sizeof(log), "%s/worker%u.log", t->folder, i);
        t->workers[i] = fork();
        if (t->workers[i] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            _exit(fault_worker(&job));
        }
        if (t->workers[i] < 0)
            fail("fork");
    }
}

/* Ready; or finished, with nothing on its way between two of them. */
static bool all(struct trial *t, bool finished)
{
    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        if ((finished && atomic_load(&t->shared->mail[i].full) != 0) ||
            atomic_load(finished ? &t->shared->workers[i].finished : &t->shared->workers[i].ready) == 0)
            return false;
    return true;
}

/* The worker processes that ended although nobody asked them to. */
static void count_restarts(struct trial *t)
{
    int status;

    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        if (t->workers[i] > 0 && waitpid(t->workers[i], &status, WNOHANG) == t->workers[i]) {
            t->restarts++;
            t->workers[i] = 0;
        }
}

static void wait_for(struct trial *t, bool finished)
{
    struct timespec pause = {.tv_nsec = 1000000};
    double until = now_ms() + 60000;

    while (!all(t, finished) && t->restarts == 0) {
        if (now_ms() > until)
            fail(finished ? "workers do not finish" : "workers do not start");
        nanosleep(&pause, NULL);
        count_restarts(t);
    }
}

/* ---- killing ----------------------------------------------------------------------------------------------------- */

/* The daemon is the keeper's child; an executor that lost its daemon may be another. */
static pid_t daemon_pid(struct trial *t)
{
    char path[64], name[64];
    FILE *file;
    int pid;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", t->keeper, t->keeper);
    file = fopen(path, "re");
    while (file != NULL && fscanf(file, "%d", &pid) == 1) {
        FILE *comm;

        snprintf(path, sizeof(path), "/proc/%d/comm", pid);
        comm = fopen(path, "re");
        if (comm == NULL)
            continue;
        if (fscanf(comm, "%63s", name) == 1 && strncmp(name, "kvpoold", 7) == 0) {
            fclose(comm);
            fclose(file);
            return pid;
        }
        fclose(comm);
    }
    if (file != NULL)
        fclose(file);
    return 0;
}

static void kill_once(struct trial *t)
{
    struct timespec pause = {.tv_nsec = (long)(1000000 + fault_random(&t->random) % 12000000)};
    unsigned point = t->done % 2 == 0 ? KVP_KILL_NONE : 1 + t->done / 2 % 4;
    struct kvp_stats *stats;
    double began, until;
    pid_t pid;

    nanosleep(&pause, NULL);
    pid = daemon_pid(t);
    if (pid == 0)
        return;
    began = now_ms();
    if (point == KVP_KILL_NONE) {
        if (kill(pid, SIGKILL) != 0)
            return;
    } else {
        atomic_store(t->word, point);
        for (until = began + 60000; atomic_load(t->word) != 0;) {
            if (now_ms() > until)
                fail("the daemon did not pass the kill point");
            pause.tv_nsec = 50000;
            nanosleep(&pause, NULL);
        }
        began = now_ms();
    }
    if (kvp_get_stats(t->client, &stats) != KVP_OK)
        fail("first call after the kill");
    t->pauses_ms[t->done] = now_ms() - began;
    kvp_stats_free(stats);
    t->at[point]++;
    t->done++;
}

/* ---- judging ----------------------------------------------------------------------------------------------------- */

struct expected {
    uint64_t key;
    uint32_t reserved, written;
    unsigned worker;
    bool open, seen;
};

struct judge {
    struct expected *entries;
    size_t n, room;
};

static struct expected *find(struct judge *judge, uint64_t key, unsigned worker)
{
    for (size_t i = judge->n; i-- > 0;)
        if (judge->entries[i].key == key && judge->entries[i].worker == worker)
            return &judge->entries[i];
    if (judge->n == judge->room) {
        judge->room = judge->room != 0 ? 2 * judge->room : 1024;
        judge->entries = realloc(judge->entries, judge->room * sizeof(*judge->entries));
        if (judge->entries == NULL)
            fail("memory");
    }
    judge->entries[judge->n] = (struct expected){.key = key, .worker = worker};
    return &judge->entries[judge->n++];
}

static void read_log(struct trial *t, struct judge *judge, unsigned worker)
{
    char path[192], kind, op[16], status[32];
    unsigned long long call, key;
    unsigned reserved, written;
    char line[256];
    FILE *file;

    snprintf(path, sizeof(path), "%s/worker%u.log", t->folder, worker);
    file = fopen(path, "re");
    if (file == NULL)
        fail(path);
    while (fgets(line, sizeof(line), file) != NULL) {
        struct expected *entry;

        if (sscanf(line, "%llu %c %15s %llx %u %u %31s", &call, &kind, op, &key, &reserved, &written, status) != 7 ||
            kind == 'b' || strcmp(status, "KVP_OK") != 0)
            continue;
        entry = find(judge, key, worker);
        entry->open = strcmp(op, "close") != 0 && strcmp(op, "give") != 0;
        entry->reserved = reserved;
        entry->written = written;
    }
    fclose(file);
}

static unsigned worker_of(struct trial *t, uint64_t session_id)
{
    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        if (atomic_load(&t->shared->workers[i].session_id) == session_id)
            return i;
    return FAULT_WORKERS;
}

static void judge(struct trial *t)
{
    struct kvp_attach_options options = {.metadata_only = true};
    struct kvp_seq_info infos[256];
    struct judge judge = {0};
    struct kvp_pool *pool;
    uint32_t from = 0, n;

    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        read_log(t, &judge, i);
    if (kvp_attach(t->client, FAULT_POOL, &options, &pool) != KVP_OK)
        fail("attach");
    do {
        if (kvp_seq_list(pool, true, 256, &from, infos, &n) != KVP_OK)
            fail("list");
        for (uint32_t i = 0; i < n; i++) {
            struct expected *entry;

            if (infos[i].state != KVP_SEQ_OPEN)
                continue;
            entry = find(&judge, infos[i].key, worker_of(t, infos[i].session_id));
            if (!entry->open || entry->seen || infos[i].written > entry->written || infos[i].reserved > entry->reserved)
                t->repeated++;
            else if (infos[i].written < entry->written || infos[i].reserved < entry->reserved)
                t->lost++;
            entry->seen = true;
        }
    } while (from != 0);
    for (size_t i = 0; i < judge.n; i++)
        if (judge.entries[i].open && !judge.entries[i].seen)
            t->lost++;
    free(judge.entries);
    if (kvp_detach(pool) != KVP_OK)
        fail("detach");
}

/* The bytes of all sealed pages, against what they were when they were sealed: once their digests are taken. */
static void compare_pages(struct trial *t)
{
    struct kvp_page_audit *audit;
    double until = now_ms() + 60000;
    uint64_t missing;

    do {
        if (kvp_audit_pages(t->client, &audit) != KVP_OK)
            fail("audit of pages");
        missing = audit->pages_without_digest;
        t->compared = audit->pages_checked;
        t->damaged = audit->pages_damaged;
        free(audit);
    } while (missing != 0 && now_ms() < until);
    t->damaged += missing;
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static long leaked_pages(struct trial *t)
{
    struct timespec pause = {.tv_nsec = 5000000};
    double until = now_ms() + 60000;
    long leaked;

    do {
        struct kvp_pool_info *info;

        if (kvp_pool_describe(t->client, FAULT_POOL, &info) != KVP_OK)
            fail("describe");
        leaked = (long)FAULT_PAGES - (long)info->free_pages;
        kvp_pool_info_free(info);
        nanosleep(&pause, NULL);
    } while (leaked != 0 && now_ms() < until);
    return leaked;
}

static int report(struct trial *t, long leaked, uint32_t violations)
{
    unsigned long long corrupt = 0, tokens = 0, verified = 0, calls = 0;
    double p50, p99;

    for (unsigned i = 0; i < FAULT_WORKERS; i++) {
        corrupt += atomic_load(&t->shared->workers[i].corrupt_bytes);
        tokens += atomic_load(&t->shared->workers[i].tokens);
        verified += atomic_load(&t->shared->workers[i].verified_tokens);
        calls += atomic_load(&t->shared->workers[i].calls);
    }
    qsort(t->pauses_ms, t->done, sizeof(double), by_value);
    p50 = t->done > 0 ? t->pauses_ms[t->done / 2] : 0;
    p99 = t->done > 0 ? t->pauses_ms[t->done * 99 / 100] : 0;
    if (!t->json)
        printf("%u kills of the daemon, %llu calls, %llu tokens written, %llu verified; pause p50 %.1f ms, p99 %.1f ms, "
               "most %.1f ms; audit: %u violations; %llu sealed pages compared with their digests, %llu wrong\n",
               t->done, calls, tokens, verified, p50, p99, t->done > 0 ? t->pauses_ms[t->done - 1] : 0, violations,
               t->compared, t->damaged);
    printf("{\"kills\": %u, \"kills_at\": {\"after_peek\": %u, \"after_commit\": %u, \"before_reply\": %u, "
           "\"after_reply\": %u}, \"lost_calls\": %llu, \"repeated_calls\": %llu, \"corrupt_bytes\": %llu, "
           "\"leaked_pages\": %ld, \"worker_restarts\": %u, \"pause_p50_ms\": %.2f, \"pause_p99_ms\": %.2f}\n",
           t->done, t->at[1], t->at[2], t->at[3], t->at[4], t->lost, t->repeated, corrupt, leaked, t->restarts, p50,
           p99);
    return t->lost + t->repeated + corrupt + t->damaged + t->restarts + violations == 0 && leaked == 0 && tokens > 0 ? 0 : 1;
}

static void parse(struct trial *t, int argc, char **argv)
{
    static const struct option options[] = {{"kills", required_argument, NULL, 'k'},
                                            {"seed", required_argument, NULL, 's'},
                                            {"json", no_argument, NULL, 'j'},
                                            {NULL, 0, NULL, 0}};
    int option;

    t->kills = getenv("KVPOOL_TEST_LONG") != NULL ? 5000 : 200;
    t->seed = 1;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'k' && atol(optarg) > 0 && atol(optarg) <= KILLS_MAX) {
            t->kills = (unsigned)atol(optarg);
        } else if (option == 's') {
            t->seed = strtoull(optarg, NULL, 0);
        } else if (option == 'j') {
            t->json = true;
        } else {
            fprintf(stderr, "usage: kill_daemon [--kills 1..%d] [--seed S] [--json]\n", KILLS_MAX);
            exit(2);
        }
    }
    t->random = t->seed;
}

int main(int argc, char **argv)
{
    struct trial *t = &trial;
    struct kvp_connect_options options = {.connect_ms = 20000, .reconnect_ms = 60000, .call_ms = 60000};
    const char *temp = getenv("TMPDIR");
    uint32_t violations = 0;
    int status, result;
    long leaked;

    parse(t, argc, argv);
    if (!t->json)
        printf("seed %llu\n", (unsigned long long)t->seed);
    fflush(stdout);
    snprintf(t->folder, sizeof(t->folder), "%s/kill_daemon.XXXXXX", temp != NULL ? temp : "/tmp");
    if (mkdtemp(t->folder) == NULL) {
        perror(t->folder);
        return 1;
    }
    main_pid = getpid();
    atexit(clean_up);
    snprintf(t->endpoint, sizeof(t->endpoint), "%.127s/kvpool.sock", t->folder);
    snprintf(t->word_path, sizeof(t->word_path), "%.127s/kill", t->folder);
    t->word = map_file(t->word_path, 4096);
    t->shared = mmap(NULL, sizeof(*t->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    t->pauses_ms = calloc(t->kills, sizeof(double));
    if (t->shared == MAP_FAILED || t->pauses_ms == NULL)
        fail("memory");
    start_keeper(t);
    start_workers(t); /* before this process has a client: they are forked */
    if (kvp_connect(t->endpoint, &options, &t->client) != KVP_OK)
        fail("connect");
    fault_make_pool(t->client);
    atomic_store(&t->shared->go, 1);
    wait_for(t, false);
    while (t->done < t->kills && t->restarts == 0) {
        kill_once(t);
        count_restarts(t);
    }
    atomic_store(&t->shared->stop, 1);
    wait_for(t, true);
    if (t->restarts == 0)
        judge(t);
    compare_pages(t);
    atomic_store(&t->shared->stop, 2);
    for (unsigned i = 0; i < FAULT_WORKERS; i++) {
        if (t->workers[i] > 0 && (waitpid(t->workers[i], &status, 0) != t->workers[i] || status != 0))
            t->restarts++;
        t->workers[i] = 0;
    }
    leaked = leaked_pages(t);
    if (kvp_audit(t->client, &violations, NULL, NULL) != KVP_OK)
        fail("audit");
    result = report(t, leaked, violations);
    kvp_disconnect(t->client);
    return result;
}
