/**
 * Kill the daemon and its workers again and again, and show that a hit is what it says.
 *
 *   kill_cache [--kills N] [--seed S] [--backend host|cuda] [--tenants] [--json]     150 kills, seed 1, host
 *
 * Under kvpool-keeper, two worker processes ask for prompts that share prefixes, in a pool too small for all of them
 * (cache_worker.h). In turn the daemon, a worker and the executor die of SIGKILL, and a new worker takes the dead one's
 * place. Every page that a prompt finds in the cache is compared byte by byte. With --tenants the workers are two users,
 * in whose pages the other's bytes must never be seen; that takes root, and is skipped by name (exit 77) without.
 *
 * In the end everything that is cached is asked for and compared once more, then evicted: all pages must be free, and
 * the audit clean. The last line of stdout is one JSON object: kills (of the daemon), worker_kills, executor_kills,
 * opens, hits, hit_tokens, written_tokens, evictions, jobs, corrupt_bytes, foreign_rows, failed, leaked_pages,
 * violations. Exits 1 if anything was wrong.
 *
 * On the host half of the daemon's kills are at one of the moments of kill_point.h.
 */
#include "cache_worker.h"
#include "kill_point.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORKERS      2
#define KILLS_MAX    100000
#define LAST_LOOKUPS 400
#define SKIPPED      77

struct trial {
    char folder[128], endpoint[160], word_path[160];
    unsigned kills, done, daemon_kills, worker_kills, executor_kills, points;
    uint64_t random, seed;
    bool json, tenants, cuda;
    struct cache_shared *shared;
    atomic_uint *word;
    pid_t keeper, workers[WORKERS];
    struct kvp_client *client;
};

static struct trial trial;
static pid_t main_pid; /* children that exit remove nothing */

static void clean_up(void)
{
    char command[256];
    int status;

    if (getpid() != main_pid)
        return;
    for (unsigned i = 0; i < WORKERS; i++)
        if (trial.workers[i] > 0 && kill(trial.workers[i], SIGKILL) == 0)
            waitpid(trial.workers[i], &status, 0);
    if (trial.keeper > 0 && kill(trial.keeper, SIGTERM) == 0)
        waitpid(trial.keeper, &status, 0);
    if (trial.folder[0] == 0)
        return;
    snprintf(command, sizeof(command), "rm -rf '%s'", trial.folder);
    if (system(command) != 0)
        fprintf(stderr, "kill_cache: %s can not be removed\n", trial.folder);
}

_Noreturn static void fail(const char *what)
{
    fprintf(stderr, "kill_cache: %s: %s %s\n", what, kvp_error_text(), errno != 0 ? strerror(errno) : "");
    exit(1);
}

static double now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

/* ---- processes --------------------------------------------------------------------------------------------------- */

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
              program(t->cuda ? "bin/kvpoold" : "tests/kvpoold-hooks", daemon, sizeof(daemon)), "--runtime-dir",
              t->folder, "--backend", t->cuda ? "cuda" : "host", "--set", "log.level=warning", "--set",
              "daemon.socket_mode=0666", "--set", executor, (char *)NULL);
        _exit(127);
    }
    if (t->keeper < 0)
        fail("fork");
}

/* Workers of one user, or each of its own. */
static unsigned uid_of(const struct trial *t, unsigned i)
{
    return t->tenants ? 30001 + i : 0;
}

static pid_t start_worker(struct trial *t, unsigned i, unsigned lookups)
{
    struct cache_job job = {.shared = t->shared,
                            .endpoint = t->endpoint,
                            .seed = cache_random(&t->random),
                            .uid = uid_of(t, i),
                            .lookups = lookups};
    pid_t pid = fork();

    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        _exit(cache_worker(&job));
    }
    if (pid < 0)
        fail("fork");
    return pid;
}

/* The daemon is the keeper's child; an executor that lost its daemon may be another. */
static pid_t daemon_pid(struct trial *t)
{
    char path[64], name[64];
    FILE *file, *comm;
    int pid, found = 0;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", t->keeper, t->keeper);
    file = fopen(path, "re");
    while (file != NULL && found == 0 && fscanf(file, "%d", &pid) == 1) {
        snprintf(path, sizeof(path), "/proc/%d/comm", pid);
        comm = fopen(path, "re");
        if (comm != NULL && fscanf(comm, "%63s", name) == 1 && strncmp(name, "kvpoold", 7) == 0)
            found = pid;
        if (comm != NULL)
            fclose(comm);
    }
    if (file != NULL)
        fclose(file);
    return found;
}

/* ---- killing ----------------------------------------------------------------------------------------------------- */

/* At the next call's point; when no call passes it in time, at once. */
static void kill_daemon(struct trial *t)
{
    struct timespec pause = {.tv_nsec = 50000};
    double until = now_ms() + 2000;
    struct kvp_stats *stats;
    pid_t pid = daemon_pid(t);

    if (pid == 0)
        return;
    if (!t->cuda && t->points++ % 2 == 0) {
        atomic_store(t->word, 1 + t->points / 2 % 4);
        while (atomic_load(t->word) != 0 && now_ms() < until)
            nanosleep(&pause, NULL);
    } else if (kill(pid, SIGKILL) != 0) {
        return;
    }
    if (kvp_get_stats(t->client, &stats) != KVP_OK)
        fail("first call after the kill");
    kvp_stats_free(stats);
    t->daemon_kills++;
    t->done++;
}

static void kill_worker(struct trial *t)
{
    unsigned i = (unsigned)(cache_random(&t->random) % WORKERS);
    uint64_t released;
    int status;

    if (kill(t->workers[i], SIGKILL) != 0 || waitpid(t->workers[i], &status, 0) != t->workers[i])
        fail("killing a worker");
    if (WIFEXITED(status)) {
        fprintf(stderr, "kill_cache: a worker had ended by itself, with %d\n", WEXITSTATUS(status));
        atomic_fetch_add(&t->shared->failed, 1);
    }
    /* it was waited for: so its context is gone. NVML need not ever have listed it. */
    if (t->cuda && kvp_release_quarantine(t->client, CACHE_POOL, 0, &released) != KVP_OK)
        fail("releasing a dead worker's pages");
    t->workers[i] = start_worker(t, i, 0);
    t->worker_kills++;
    t->done++;
}

static void kill_executor(struct trial *t)
{
    struct kvp_stats *stats;

    if (kvp_get_stats(t->client, &stats) != KVP_OK)
        fail("statistics");
    for (uint32_t i = 0; i < stats->n_executors; i++)
        if (stats->executors[i].pid != 0 && kill((pid_t)stats->executors[i].pid, SIGKILL) == 0)
            t->executor_kills++;
    kvp_stats_free(stats);
    t->done++;
}

/* Somebody has been served since the last kill. */
static void await_work(struct trial *t)
{
    unsigned long long before = atomic_load(&t->shared->opens);
    struct timespec pause = {.tv_nsec = 500000};
    double until = now_ms() + 60000;

    while (atomic_load(&t->shared->opens) == before && atomic_load(&t->shared->failed) == 0) {
        if (now_ms() > until)
            fail("nobody is served");
        nanosleep(&pause, NULL);
    }
}

static void kill_all(struct trial *t)
{
    double until = now_ms() + 120000 + 3000.0 * t->kills;

    while (t->done < t->kills && atomic_load(&t->shared->failed) == 0) {
        struct timespec pause = {.tv_nsec = (long)(2000000 + cache_random(&t->random) % 20000000)};

        if (now_ms() > until)
            fail("the kills take too long");
        await_work(t);
        nanosleep(&pause, NULL);
        if (t->done % 8 == 7)
            kill_executor(t);
        else if (t->done % 3 == 2)
            kill_worker(t);
        else
            kill_daemon(t);
    }
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

static void await_workers(struct trial *t)
{
    int status;

    for (unsigned i = 0; i < WORKERS; i++) {
        if (t->workers[i] > 0 && (waitpid(t->workers[i], &status, 0) != t->workers[i] || status != 0))
            atomic_fetch_add(&t->shared->failed, 1);
        t->workers[i] = 0;
    }
}

/* Pages that do not come back when all that is cached is evicted; pins end with their leases. */
static long leaked_pages(struct trial *t, struct kvp_cache_info *ret_cache)
{
    struct timespec pause = {.tv_nsec = 5000000};
    double until = now_ms() + 60000;
    long leaked;

    do {
        struct kvp_pool_info *info;

        if (kvp_evict(t->client, CACHE_POOL, 0, 0, NULL, true, NULL) != KVP_OK ||
            kvp_pool_describe(t->client, CACHE_POOL, &info) != KVP_OK)
            fail("evicting");
        leaked = (long)CACHE_PAGES - (long)info->free_pages;
        *ret_cache = info->cache;
        kvp_pool_info_free(info);
        nanosleep(&pause, NULL);
    } while (leaked != 0 && now_ms() < until);
    return leaked;
}

static unsigned long long jobs_done(struct trial *t)
{
    struct kvp_stats *stats;
    unsigned long long n = 0;

    if (kvp_get_stats(t->client, &stats) != KVP_OK)
        fail("statistics");
    for (uint32_t i = 0; i < stats->n_executors; i++)
        n += stats->executors[i].jobs_done;
    kvp_stats_free(stats);
    return n;
}

static int report(struct trial *t, unsigned long long before, long leaked, const struct kvp_cache_info *cache,
                  uint32_t violations)
{
    struct cache_shared *s = t->shared;
    unsigned long long wrong = atomic_load(&s->corrupt_bytes) + atomic_load(&s->foreign_rows) + atomic_load(&s->failed);
    bool vacuous = atomic_load(&s->hit_tokens) == 0 || cache->evictions == 0 || t->worker_kills == 0;

    printf("{\"kills\": %u, \"worker_kills\": %u, \"executor_kills\": %u, \"opens\": %llu, \"hits\": %llu, "
           "\"hit_tokens\": %llu, "
           "\"written_tokens\": %llu, \"evictions\": %llu, \"jobs\": %llu, \"corrupt_bytes\": %llu, "
           "\"foreign_rows\": %llu, \"failed\": %llu, \"leaked_pages\": %ld, \"violations\": %u}\n",
           t->daemon_kills, t->worker_kills, t->executor_kills, (unsigned long long)atomic_load(&s->opens),
           (unsigned long long)atomic_load(&s->hits), (unsigned long long)atomic_load(&s->hit_tokens),
           (unsigned long long)atomic_load(&s->written_tokens), (unsigned long long)cache->evictions, before,
           (unsigned long long)atomic_load(&s->corrupt_bytes), (unsigned long long)atomic_load(&s->foreign_rows),
           (unsigned long long)atomic_load(&s->failed), leaked, violations);
    if (vacuous)
        fprintf(stderr, "kill_cache: nothing was found, evicted or killed: that shows nothing\n");
    return wrong == 0 && leaked == 0 && violations == 0 && !vacuous ? 0 : 1;
}

static void parse(struct trial *t, int argc, char **argv)
{
    static const struct option options[] = {
        {"kills", required_argument, NULL, 'k'},   {"seed", required_argument, NULL, 's'},
        {"backend", required_argument, NULL, 'b'}, {"tenants", no_argument, NULL, 't'},
        {"json", no_argument, NULL, 'j'},          {NULL, 0, NULL, 0}};
    int option;

    t->kills = getenv("KVPOOL_TEST_LONG") != NULL ? 3000 : 150;
    t->seed = 1;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'k' && atol(optarg) > 0 && atol(optarg) <= KILLS_MAX) {
            t->kills = (unsigned)atol(optarg);
        } else if (option == 's') {
            t->seed = strtoull(optarg, NULL, 0);
        } else if (option == 'b' && (strcmp(optarg, "host") == 0 || strcmp(optarg, "cuda") == 0)) {
            t->cuda = strcmp(optarg, "cuda") == 0;
        } else if (option == 't') {
            t->tenants = true;
        } else if (option == 'j') {
            t->json = true;
        } else {
            fprintf(stderr, "usage: kill_cache [--kills 1..%d] [--seed S] [--backend host|cuda] [--tenants] [--json]\n",
                    KILLS_MAX);
            exit(2);
        }
    }
    t->random = t->seed;
    if (t->tenants && geteuid() != 0) {
        printf("skipped kill_cache --tenants: it takes root to be two users\n");
        exit(SKIPPED);
    }
    if (t->cuda && access("/dev/nvidiactl", F_OK) != 0) {
        printf("skipped kill_cache --backend cuda: there is no GPU\n");
        exit(SKIPPED);
    }
}

static void prepare(struct trial *t)
{
    const char *temp = getenv("TMPDIR");
    int fd;

    snprintf(t->folder, sizeof(t->folder), "%s/kill_cache.XXXXXX", temp != NULL ? temp : "/tmp");
    if (mkdtemp(t->folder) == NULL) {
        perror(t->folder);
        exit(1);
    }
    main_pid = getpid();
    atexit(clean_up);
    if (chmod(t->folder, 0755) != 0) /* the workers may be other users */
        fail(t->folder);
    snprintf(t->endpoint, sizeof(t->endpoint), "%.127s/kvpool.sock", t->folder);
    snprintf(t->word_path, sizeof(t->word_path), "%.127s/kill", t->folder);
    fd = open(t->word_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, 4096) != 0)
        fail(t->word_path);
    t->word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    t->shared = mmap(NULL, sizeof(*t->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (t->word == MAP_FAILED || t->shared == MAP_FAILED)
        fail("memory");
}

int main(int argc, char **argv)
{
    struct trial *t = &trial;
    struct kvp_connect_options options = {.connect_ms = 20000, .reconnect_ms = 60000, .call_ms = 60000};
    struct kvp_cache_info cache;
    unsigned long long jobs;
    uint32_t violations = 0;
    int result;
    long leaked;

    parse(t, argc, argv);
    if (!t->json)
        printf("seed %llu\n", (unsigned long long)t->seed);
    fflush(stdout);
    prepare(t);
    start_keeper(t);
    if (kvp_connect(t->endpoint, &options, &t->client) != KVP_OK)
        fail("connect");
    cache_make_pool(t->client);
    for (unsigned i = 0; i < WORKERS; i++)
        t->workers[i] = start_worker(t, i, 0);
    atomic_store(&t->shared->go, 1);
    kill_all(t);
    atomic_store(&t->shared->stop, 1);
    await_workers(t);
    for (unsigned i = 0; i < WORKERS; i++)
        t->workers[i] = start_worker(t, i, LAST_LOOKUPS);
    await_workers(t);
    jobs = jobs_done(t);
    leaked = leaked_pages(t, &cache);
    if (kvp_audit(t->client, &violations, NULL, NULL) != KVP_OK)
        fail("audit");
    result = report(t, jobs, leaked, &cache, violations);
    kvp_disconnect(t->client);
    return result;
}
