/**
 * Kill workers again and again, and show that their memory comes back and nobody else notices.
 *
 *   kill_worker [--kills N] [--seed S] [--json]      500 kills, seed 1
 *
 * FAULT_WORKERS worker processes work on a pool (worker.h); one after another is killed with SIGKILL at a random moment
 * and replaced by a new one. Reusable is from the kill until the daemon has released the dead session: its pages are
 * free then. The last line of stdout is one JSON object: kills, lost_pages, leaked_pages, corrupt_bytes,
 * reusable_p50_ms, reusable_p99_ms. Lost pages are free ones that nobody can have: the pool's pages, less those that are
 * free when all workers are gone, are leaked; what can then not be allocated again in one sequence after another is lost.
 */
#include "worker.h"

#include <errno.h>
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
    char folder[128], endpoint[160];
    unsigned kills, done;
    uint64_t random, seed;
    bool json;
    struct fault_shared *shared;
    pid_t daemon, workers[FAULT_WORKERS];
    unsigned started;
    struct kvp_client *client;
    double *reusable_ms;
    unsigned long long corrupt;
    unsigned wrong_exits;
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
    if (trial.daemon > 0 && kill(trial.daemon, SIGTERM) == 0)
        waitpid(trial.daemon, &status, 0);
    if (trial.folder[0] == 0)
        return;
    if (getenv("KVPOOL_TEST_KEEP") != NULL) {
        fprintf(stderr, "kill_worker: %s is kept\n", trial.folder);
        return;
    }
    snprintf(command, sizeof(command), "rm -rf '%s'", trial.folder);
    if (system(command) != 0)
        fprintf(stderr, "kill_worker: %s can not be removed\n", trial.folder);
}

static void fail(const char *what)
{
    fprintf(stderr, "kill_worker: %s: %s %s\n", what, kvp_error_text(), errno != 0 ? strerror(errno) : "");
    exit(1);
}

static double now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void start_daemon(struct trial *t)
{
    const char *folder = getenv("KVPOOL_BIN_DIR");
    char path[256];

    snprintf(path, sizeof(path), "%s/kvpoold", folder != NULL ? folder : "build/release/bin");
    t->daemon = fork();
    if (t->daemon == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        execl(path, "kvpoold", "--runtime-dir", t->folder, "--backend", "host", "--set", "log.level=warning", "--set",
              "ledger.audit_s=1", (char *)NULL);
        _exit(127);
    }
    if (t->daemon < 0)
        fail("fork");
}

static void start_worker(struct trial *t, unsigned i)
{
    struct fault_job job = {.shared = t->shared, .endpoint = t->endpoint, .index = i,
                            .seed = t->seed * 100000 + t->started++};

    memset(&t->shared->workers[i], 0, sizeof(t->shared->workers[i]));
    t->workers[i] = fork();
    if (t->workers[i] == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        _exit(fault_worker(&job));
    }
    if (t->workers[i] < 0)
        fail("fork");
}

static bool session_is_there(struct trial *t, uint64_t session_id)
{
    struct kvp_stats *stats;
    bool there = false;

    if (kvp_get_stats(t->client, &stats) != KVP_OK)
        fail("stats");
    for (uint32_t i = 0; i < stats->n_sessions; i++)
        there |= stats->sessions[i].session_id == session_id;
    kvp_stats_free(stats);
    return there;
}

static void wait_ready(struct trial *t, unsigned i)
{
    struct timespec pause = {.tv_nsec = 500000};
    double until = now_ms() + 60000;

    while (atomic_load(&t->shared->workers[i].ready) == 0) {
        if (now_ms() > until)
            fail("a worker does not start");
        nanosleep(&pause, NULL);
    }
}

static void kill_once(struct trial *t)
{
    unsigned i = (unsigned)(fault_random(&t->random) % FAULT_WORKERS);
    struct timespec pause = {.tv_nsec = (long)(fault_random(&t->random) % 8000000)};
    uint64_t session;
    double began;
    int status;

    wait_ready(t, i);
    session = atomic_load(&t->shared->workers[i].session_id);
    nanosleep(&pause, NULL);
    began = now_ms();
    kill(t->workers[i], SIGKILL);
    if (waitpid(t->workers[i], &status, 0) != t->workers[i] || !WIFSIGNALED(status)) {
        t->wrong_exits++; /* it had ended by itself: it saw something wrong */
        t->workers[i] = 0;
        t->corrupt += atomic_load(&t->shared->workers[i].corrupt_bytes);
    } else {
        t->workers[i] = 0;
        pause.tv_nsec = 200000;
        while (session_is_there(t, session)) {
            if (now_ms() > began + 60000)
                fail("a dead session stays");
            nanosleep(&pause, NULL);
        }
        t->corrupt += atomic_load(&t->shared->workers[i].corrupt_bytes);
        t->reusable_ms[t->done++] = now_ms() - began;
    }
    start_worker(t, i);
}

static void stop_workers(struct trial *t)
{
    int status;

    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        wait_ready(t, i);
    atomic_store(&t->shared->stop, 1);
    for (unsigned i = 0; i < FAULT_WORKERS; i++) {
        if (waitpid(t->workers[i], &status, 0) != t->workers[i] || status != 0)
            t->wrong_exits++;
        t->workers[i] = 0;
        t->corrupt += atomic_load(&t->shared->workers[i].corrupt_bytes);
    }
}

static long free_pages(struct trial *t)
{
    struct timespec pause = {.tv_nsec = 5000000};
    double until = now_ms() + 60000;
    struct kvp_pool_info *info;
    long pages;

    do {
        if (kvp_pool_describe(t->client, FAULT_POOL, &info) != KVP_OK)
            fail("describe");
        pages = info->free_pages;
        kvp_pool_info_free(info);
        nanosleep(&pause, NULL);
    } while (pages != FAULT_PAGES && now_ms() < until);
    return pages;
}

/* Take every page in sequences of the greatest length. @return pages that could be had */
static long take_all(struct trial *t)
{
    struct kvp_attach_options options = {.metadata_only = true};
    uint32_t row_pages = FAULT_LENGTH_MAX / FAULT_TOKENS, tokens = row_pages * FAULT_TOKENS, short_of;
    long taken = 0, left = FAULT_PAGES;
    struct kvp_pool *pool;
    struct kvp_seq seq;

    if (kvp_attach(t->client, FAULT_POOL, &options, &pool) != KVP_OK)
        fail("attach");
    for (uint64_t key = 1; left > 0; key++) {
        uint32_t want = left < (long)row_pages ? (uint32_t)left * FAULT_TOKENS : tokens;

        if (kvp_seq_open(pool, 1, &key, 0, &seq) != KVP_OK)
            fail("open");
        if (kvp_advance(pool, 1, &seq, &want, NULL, 0, NULL, NULL, &short_of) != KVP_OK)
            break;
        taken += want / FAULT_TOKENS;
        left -= want / FAULT_TOKENS;
    }
    return taken; /* the session's end gives them back */
}

/* Those that the daemon makes by itself, each second, count as well. @return violations */
static uint32_t audits_found(struct trial *t)
{
    struct kvp_stats *stats;
    uint32_t violations, before;

    if (kvp_get_stats(t->client, &stats) != KVP_OK)
        fail("stats");
    before = (uint32_t)stats->last_audit_violations;
    kvp_stats_free(stats);
    if (kvp_audit(t->client, &violations, NULL, NULL) != KVP_OK)
        fail("audit");
    return before + violations;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void parse(struct trial *t, int argc, char **argv)
{
    static const struct option options[] = {{"kills", required_argument, NULL, 'k'},
                                            {"seed", required_argument, NULL, 's'},
                                            {"json", no_argument, NULL, 'j'},
                                            {NULL, 0, NULL, 0}};
    int option;

    t->kills = 500;
    t->seed = 1;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'k' && atol(optarg) > 0 && atol(optarg) <= KILLS_MAX) {
            t->kills = (unsigned)atol(optarg);
        } else if (option == 's') {
            t->seed = strtoull(optarg, NULL, 0);
        } else if (option == 'j') {
            t->json = true;
        } else {
            fprintf(stderr, "usage: kill_worker [--kills 1..%d] [--seed S] [--json]\n", KILLS_MAX);
            exit(2);
        }
    }
    t->random = t->seed;
}

int main(int argc, char **argv)
{
    struct trial *t = &trial;
    struct kvp_connect_options options = {.connect_ms = 20000};
    const char *temp = getenv("TMPDIR");
    uint32_t violations = 0;
    long free_now, taken;
    double p50, p99;

    parse(t, argc, argv);
    if (!t->json)
        printf("seed %llu\n", (unsigned long long)t->seed);
    fflush(stdout);
    snprintf(t->folder, sizeof(t->folder), "%s/kill_worker.XXXXXX", temp != NULL ? temp : "/tmp");
    if (mkdtemp(t->folder) == NULL) {
        perror(t->folder);
        return 1;
    }
    main_pid = getpid();
    atexit(clean_up);
    snprintf(t->endpoint, sizeof(t->endpoint), "%.127s/kvpool.sock", t->folder);
    t->shared = mmap(NULL, sizeof(*t->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    t->reusable_ms = calloc(t->kills, sizeof(double));
    if (t->shared == MAP_FAILED || t->reusable_ms == NULL)
        fail("memory");
    start_daemon(t);
    if (kvp_connect(t->endpoint, &options, &t->client) != KVP_OK)
        fail("connect");
    fault_make_pool(t->client);
    atomic_store(&t->shared->go, 1);
    for (unsigned i = 0; i < FAULT_WORKERS; i++)
        start_worker(t, i);
    while (t->done < t->kills && t->wrong_exits == 0)
        kill_once(t);
    stop_workers(t);
    free_now = free_pages(t);
    taken = take_all(t);
    violations = audits_found(t);
    qsort(t->reusable_ms, t->done, sizeof(double), by_value);
    p50 = t->done > 0 ? t->reusable_ms[t->done / 2] : 0;
    p99 = t->done > 0 ? t->reusable_ms[t->done * 99 / 100] : 0;
    if (!t->json)
        printf("%u workers killed; pages reusable after p50 %.1f ms, p99 %.1f ms; audit: %u violations; %u workers saw "
               "something wrong\n",
               t->done, p50, p99, violations, t->wrong_exits);
    printf("{\"kills\": %u, \"lost_pages\": %ld, \"leaked_pages\": %ld, \"corrupt_bytes\": %llu, "
           "\"reusable_p50_ms\": %.2f, \"reusable_p99_ms\": %.2f}\n",
           t->done, free_now - taken, (long)FAULT_PAGES - free_now, t->corrupt, p50, p99);
    kvp_disconnect(t->client);
    return t->wrong_exits + violations == 0 && t->corrupt == 0 && free_now == FAULT_PAGES && taken == free_now ? 0 : 1;
}
