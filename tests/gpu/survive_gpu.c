/**
 * Death on a GPU: daemon, executor and workers are killed while the GPU works, and what must survive does.
 *
 *   survive_gpu [host]      with `host` on the host backend, but for what only a GPU can show
 *
 * Each test starts a daemon of its own under kvpool-keeper, and workers (survive_workers.c), which are processes that
 * execute this program again; survive_house.c starts and ends them. Numbered lines say how far a test is and what was
 * measured; then a line a test, "passed NAME", "FAILED NAME: why" or "skipped NAME: why", and last "N passed, N failed,
 * N skipped". Exit status 0, 1 where something failed, 77 where nothing ran. All of it ends within LIMIT_S, whatever
 * happens.
 *
 * KVPOOL_SURVIVE_GIB is the size of the large pool (64); where there is not so much memory, half of it is tried.
 */
#include "survive_house.h"

#ifdef KVP_WORK_CUDA
#include "nvml.h"
#endif

#include <glob.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT_S 240
#define SKIPPED 77
#define KILLS   10 /* of the daemon, half of them in an append with a copy */
#define DEATHS  6  /* of workers, to be measured */
#define DEAD_MS 150
#define LAG_MS  20.0 /* the most that a dead worker's pages may take after pidfd and NVML agree */

/* ---- 1: the daemon ----------------------------------------------------------------------------------------------- */

/* @return from the kill to the first answer, ms; less the time for which the keeper was held */
static double kill_daemon(bool in_append, bool hold, unsigned *ret_in_flight, unsigned long long *ret_meanwhile)
{
    struct slot *appends = slot_of(2);
    unsigned long long before;
    struct kvp_stats *stats;
    double began, until, held = 0;
    pid_t pid;
    int pidfd;

    while ((pid = daemon_pid()) == 0)
        sleep_us(500);
    pidfd = pidfd_of(pid);
    if (in_append) {
        await(2, &appends->in_call, "an append on request");
        sleep_us(random() % 8000);
    } else {
        sleep_us(random() % 20000);
    }
    if (hold)
        kill(t.keeper, SIGSTOP);
    began = now_ms();
    before = atomic_load(&slot_of(0)->iterations) + atomic_load(&slot_of(1)->iterations);
    *ret_in_flight += atomic_load(&appends->in_call);
    kill(pid, SIGKILL);
    await_end(pidfd);
    if (hold) {
        until = began + WAIT_MS;
        do { /* they may have to wait for a core */
            sleep_us(DEAD_MS * 1000);
            *ret_meanwhile = atomic_load(&slot_of(0)->iterations) + atomic_load(&slot_of(1)->iterations) - before;
        } while (*ret_meanwhile == 0 && now_ms() < until);
        held = now_ms() - began;
        kill(t.keeper, SIGCONT);
    }
    well("first call after the kill", kvp_get_stats(t.client, &stats));
    kvp_stats_free(stats);
    return now_ms() - began - held;
}

static void kill_it_often(void)
{
    unsigned long long meanwhile = 0;
    double pauses[KILLS], p50;
    unsigned in_flight = 0;

    for (unsigned i = 0; i < KILLS; i++) {
        unsigned long long before[2] = {atomic_load(&slot_of(0)->iterations), atomic_load(&slot_of(1)->iterations)};
        bool hold = i % 5 == 4;

        pauses[i] = kill_daemon(i % 2 == 0, hold, &in_flight, &meanwhile);
        for (unsigned w = 0; w < 3; w++)
            check_worker(w);
        if (hold) {
            step("no daemon for %d ms or more: the workers computed %llu times meanwhile", DEAD_MS, meanwhile);
            if (meanwhile == 0)
                failed("the workers stood still while there was no daemon");
        }
        for (unsigned w = 0; w < 2; w++) { /* and after it */
            double until = now_ms() + WAIT_MS;

            while (atomic_load(&slot_of(w)->iterations) <= before[w]) {
                check_worker(w);
                if (now_ms() > until)
                    failed("worker %u computes no more", w);
                sleep_us(200);
            }
        }
    }
    p50 = median(pauses, KILLS);
    step("%d kills of the daemon, %u with an append on request (a page copied, tokens written) in flight: first answer "
         "after p50 %.1f ms, most %.1f ms",
         KILLS, in_flight, p50, pauses[KILLS - 1]);
}

/* The executor, too, in an append. */
static void kill_executor(void)
{
    unsigned long long before = atomic_load(&slot_of(2)->iterations);
    double began, until = now_ms() + WAIT_MS;
    pid_t pid = executor_pid();
    int pidfd;

    if (pid <= 0)
        failed("no executor runs");
    pidfd = pidfd_of(pid);
    await(2, &slot_of(2)->in_call, "an append on request");
    sleep_us(random() % 3000);
    began = now_ms();
    kill(pid, SIGKILL);
    await_end(pidfd);
    while (atomic_load(&slot_of(2)->iterations) <= before + 1) { /* the one that was in flight, and one more */
        check_worker(2);
        if (now_ms() > until)
            failed("no append ends after the executor's death");
        sleep_us(200);
    }
    step("the executor killed in an append: done again by the next one, %.0f ms to the append behind it",
         now_ms() - began);
}

static void a_daemon_killed_over_a_large_pool_keeps_every_sealed_page_and_the_workers_compute_on(void)
{
    const struct plan *plan = &t.shared->plan;
    unsigned long long wrong = 0, iterations = 0;
    double from = now_ms();
    uint64_t filled;

    start_daemon("");
    make_pool(true);
    for (unsigned i = 0; i < 2; i++)
        start_worker(i, "compute");
    start_worker(2, "append");
    for (unsigned i = 0; i < 3; i++)
        await(i, &slot_of(i)->ready, "fills its sequences");
    filled = 2ull * plan->fill_seqs * plan->fill_tokens / plan->page_tokens;
    step("workers wrote %llu pages, in %.1f s with their start", (unsigned long long)filled, (now_ms() - from) / 1e3);
    if (compare_digests() < filled)
        failed("fewer pages are sealed than were written");
    kill_it_often();
    kill_executor();
    if (compare_digests() < filled)
        failed("sealed pages are gone");
    for (unsigned i = 0; i < 3; i++)
        atomic_store(&slot_of(i)->command, COMMAND_STOP);
    for (unsigned i = 0; i < 3; i++) {
        await(i, &slot_of(i)->finished, "ends");
        wrong += atomic_load(&slot_of(i)->wrong);
        iterations += atomic_load(&slot_of(i)->iterations);
    }
    step("%llu rounds of the workers, %llu appends on request read back, %llu wrong sums or bytes", iterations,
         atomic_load(&slot_of(2)->iterations), wrong);
    if (wrong != 0)
        failed("%llu wrong sums or bytes", wrong);
}

/* ---- 2 and 3: a worker in mid-kernel ----------------------------------------------------------------------------- */

/* When NVML lists a process no more, asked again and again by a thread. */
static struct {
    pthread_t thread;
    atomic_bool stop, listed;
    atomic_uint asks;
    pid_t pid;
    atomic_ullong gone_ns; /* 0: it is listed, or was never */
} nvml;

#ifdef KVP_WORK_CUDA
static void *ask_nvml(void *arg)
{
    static uint32_t pids[4096];

    while (!atomic_load(&nvml.stop)) {
        unsigned n = 0;
        bool listed = false;

        if (kvp_nvml_processes(t.uuid, pids, 4096, &n) != KVP_OK)
            continue;
        for (unsigned i = 0; i < n; i++)
            listed |= pids[i] == (uint32_t)nvml.pid;
        if (listed)
            atomic_store(&nvml.listed, true);
        else if (atomic_load(&nvml.listed) && atomic_load(&nvml.gone_ns) == 0)
            atomic_store(&nvml.gone_ns, now_ns());
        atomic_fetch_add(&nvml.asks, 1);
    }
    return arg;
}
#else
static void *ask_nvml(void *arg)
{
    return arg;
}
#endif

static void watch_nvml(pid_t pid)
{
    double until = now_ms() + 5000;

    nvml.pid = pid;
    atomic_store(&nvml.stop, false);
    atomic_store(&nvml.listed, false);
    atomic_store(&nvml.gone_ns, 0);
    if (!t.shared->plan.cuda)
        return;
    if (pthread_create(&nvml.thread, NULL, ask_nvml, NULL) != 0)
        failed("no thread");
    while (!atomic_load(&nvml.listed) && now_ms() < until)
        sleep_us(500);
}

static void stop_nvml(void)
{
    if (!t.shared->plan.cuda)
        return;
    atomic_store(&nvml.stop, true);
    pthread_join(nvml.thread, NULL);
}

/* Until all pages of "small" are free. @return when, ns */
static uint64_t await_free(void)
{
    double until = now_ms() + WAIT_MS;

    while (free_pages("small") != t.shared->plan.small_pages) {
        if (now_ms() > until)
            failed("%u of %u pages of the dead worker stay in quarantine",
                   t.shared->plan.small_pages - free_pages("small"), t.shared->plan.small_pages);
        sleep_us(100);
    }
    return now_ns();
}

/* Nothing was stored to the page after `free_ns`. The watcher looks on for a while, to be sure. */
static void expect_quiet_by(uint64_t free_ns, uint64_t killed_ns)
{
    struct slot *watcher = slot_of(1);
    uint64_t looked = atomic_load(&watcher->iterations) + 200;
    double until = now_ms() + WAIT_MS;
    uint64_t changed;

    while (atomic_load(&watcher->looked_ns) < free_ns + 100000000 || atomic_load(&watcher->iterations) < looked) {
        check_worker(1);
        if (now_ms() > until)
            failed("the watcher looks no more");
        sleep_us(1000);
    }
    changed = atomic_load(&watcher->changed_ns);
    if (changed == 0)
        failed("the watcher saw no store at all");
    step("last store seen %.1f ms after the kill, pages free after %.1f ms",
         changed > killed_ns ? (double)(changed - killed_ns) / 1e6 : 0, (double)(free_ns - killed_ns) / 1e6);
    if (changed > free_ns)
        failed("the page changed %.1f ms after it was free", (double)(changed - free_ns) / 1e6);
}

static void start_watcher(void)
{
    start_worker(1, "watch");
    await(1, &slot_of(1)->ready, "attaches");
}

/* One death in mid-kernel. @return ms from when pidfd and NVML agree to the pages' being free */
static double die_in_kernel(void)
{
    uint64_t killed, ended, proven, freed;
    bool listed;
    int pidfd;

    start_worker(0, "scribble");
    await(0, &slot_of(0)->ready, "scribbles");
    watch_nvml(t.workers[0]);
    listed = atomic_load(&nvml.listed);
    if (t.shared->plan.cuda && !listed) {
        stop_nvml();
        skipped("NVML does not list processes of this pid namespace");
    }
    sleep_us(600000); /* the daemon asks whether NVML lists it, twice a second */
    if (free_pages("small") == t.shared->plan.small_pages)
        failed("the worker holds no page");
    pidfd = pidfd_of(t.workers[0]);
    killed = now_ns();
    kill(t.workers[0], SIGKILL);
    await_end(pidfd);
    ended = now_ns();
    freed = await_free();
    while (listed && atomic_load(&nvml.gone_ns) == 0 && now_ns() < freed + 2000000000)
        sleep_us(200);
    stop_nvml();
    if (listed && atomic_load(&nvml.gone_ns) == 0)
        failed("the pages are free, and NVML lists the process still");
    proven = listed && atomic_load(&nvml.gone_ns) > ended ? atomic_load(&nvml.gone_ns) : ended;
    waitpid(t.workers[0], NULL, 0);
    t.workers[0] = 0;
    expect_quiet_by(freed, killed);
    printf("        pidfd after %.1f ms, NVML after %.1f ms, pages free %.1f ms behind both\n",
           (double)(ended - killed) / 1e6, listed ? ((double)atomic_load(&nvml.gone_ns) - (double)killed) / 1e6 : 0,
           ((double)freed - (double)proven) / 1e6);
    return ((double)freed - (double)proven) / 1e6;
}

static void pages_of_a_worker_killed_in_mid_kernel_are_free_when_the_gpu_is_quiet_and_soon(void)
{
    double lags[DEATHS], p50;

    start_daemon("");
    make_pool(false);
    start_watcher();
    for (unsigned i = 0; i < DEATHS; i++)
        lags[i] = die_in_kernel();
    p50 = median(lags, DEATHS);
    step("%d deaths in mid-kernel: pages reusable least %.1f ms, p50 %.1f ms, most %.1f ms after pidfd and NVML agree",
         DEATHS, lags[0], p50, lags[DEATHS - 1]);
    /* on the host the daemon waits for a core, with all that runs beside it */
    if ((t.shared->plan.cuda ? p50 : lags[0]) > LAG_MS)
        failed("that is over %.0f ms", LAG_MS);
}

static void pages_of_a_killed_worker_whose_forked_child_lives_stay_in_quarantine(void)
{
    uint32_t all = t.shared->plan.small_pages;
    uint64_t killed, freed;
    int pidfd;
    pid_t child;

    if (!t.shared->plan.cuda)
        skipped("on the host the pidfd is enough");
    start_daemon("");
    make_pool(false);
    start_watcher();
    start_worker(0, "scribble-fork");
    await(0, &slot_of(0)->ready, "scribbles");
    child = atomic_load(&slot_of(0)->child);
    sleep_us(1200000); /* NVML has listed it by then */
    pidfd = pidfd_of(t.workers[0]);
    killed = now_ns();
    kill(t.workers[0], SIGKILL);
    await_end(pidfd);
    waitpid(t.workers[0], NULL, 0);
    t.workers[0] = 0;
    while (now_ns() < killed + 1000000000) {
        if (free_pages("small") == all && kill(child, 0) == 0)
            failed("the pages are free %.0f ms after the kill, and the child lives", (double)(now_ns() - killed) / 1e6);
        sleep_us(1000);
    }
    step("a second after the kill, the child alive: no page is free; the page changed last %.0f ms after the kill",
         ((double)atomic_load(&slot_of(1)->changed_ns) - (double)killed) / 1e6);
    killed = now_ns();
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    atomic_store(&slot_of(0)->child, 0);
    freed = await_free();
    step("%.0f ms after the child's end they are", (double)(freed - killed) / 1e6);
    expect_quiet_by(freed, killed);
}

/* ---- 4: MPS ------------------------------------------------------------------------------------------------------ */

static void append_by_executor(pid_t before)
{
    struct kvp_attach_options options = {.metadata_only = true};
    const struct plan *plan = &t.shared->plan;
    size_t bytes_n = (size_t)2 * plan->layers * plan->heads * plan->dim * 2;
    uint32_t at = 0, n = 1, failures = 0;
    double from = now_ms(), until = from + WAIT_MS;
    enum kvp_status status;
    struct kvp_point point;
    struct kvp_pool *pool;
    uint64_t key = 500;
    struct kvp_seq seq;
    void *bytes = calloc(1, bytes_n);
    struct kvp_append_request request = {
        .n = 1, .seqs = &seq, .at = &at, .tokens = &n, .bytes = bytes, .bytes_n = bytes_n};

    if (bytes == NULL)
        failed("memory");
    well("attach", kvp_attach(t.client, "small", &options, &pool));
    well("open", kvp_seq_open(pool, 1, &key, 0, &seq));
    for (;;) {
        status = kvp_append_on_request(pool, &request, &point, NULL);
        if (status == KVP_OK)
            status = kvp_timeline_wait(pool, point, WAIT_MS);
        if (status == KVP_OK || now_ms() > until)
            break;
        failures++;
        sleep_us(100000);
    }
    well("append on request", status);
    free(bytes);
    step("the executor works: pid %d before, %d now, after %u failures, %.0f ms", (int)before, (int)executor_pid(),
         failures, now_ms() - from);
    point = (struct kvp_point){0};
    well("timeline", kvp_timeline_id(pool, 1, &point.timeline));
    point.value = 1;
    well("signal", kvp_timeline_signal(pool, point, NULL));
    well("close", kvp_seq_close(pool, 1, &seq, &point));
}

static void expect_same_daemon(pid_t pid, const char *when)
{
    struct kvp_stats *stats;

    well("stats", kvp_get_stats(t.client, &stats));
    if (daemon_pid() != pid || stats->epoch != 1 || stats->last_audit_violations != 0)
        failed("the daemon is another one, or its ledger is not clean, %s", when);
    kvp_stats_free(stats);
}

static void under_mps_a_dead_worker_takes_its_neighbours_and_neither_the_daemon_nor_the_memory(void)
{
    char environment[140];
    unsigned long long rounds;
    double until;
    pid_t daemon, executor;

    if (!t.shared->plan.cuda)
        skipped("there is no GPU");
    start_mps();
    snprintf(environment, sizeof(environment), "CUDA_MPS_PIPE_DIRECTORY=%s/mps", t.folder);
    start_daemon(environment);
    make_pool(false);
    daemon = daemon_pid();
    executor = executor_pid();
    start_worker(0, "own");
    await(0, &slot_of(0)->ready, "writes its sequences");
    start_worker(2, "beside");
    await(2, &slot_of(2)->ready, "computes");
    append_by_executor(executor);
    step("an owner of durable sequences, a neighbour and the executor work under MPS");
    atomic_store(&slot_of(0)->command, COMMAND_DIE_BUSY);
    until = now_ms() + WAIT_MS;
    while (atomic_load(&slot_of(0)->page) == 0) {
        check_worker(0);
        if (now_ms() > until)
            failed("the owner does not scribble");
        sleep_us(500);
    }
    executor = executor_pid();
    rounds = atomic_load(&slot_of(2)->iterations);
    kill(t.workers[0], SIGKILL);
    waitpid(t.workers[0], NULL, 0);
    t.workers[0] = 0;
    until = now_ms() + 15000;
    while (atomic_load(&slot_of(2)->finished) == 0 && now_ms() < until)
        sleep_us(500);
    if (atomic_load(&slot_of(2)->finished) != 0)
        step("the owner was killed in a long kernel; its neighbour's context was lost with it: %s", slot_of(2)->text);
    else
        step("the owner was killed in a long kernel; its neighbour was not hit: %llu rounds since",
             atomic_load(&slot_of(2)->iterations) - rounds);
    atomic_store(&slot_of(2)->command, COMMAND_STOP);
    end_process(&t.workers[2], SIGKILL);
    expect_same_daemon(daemon, "after the death");
    append_by_executor(executor);
    start_worker(3, "claim");
    await(3, &slot_of(3)->finished, "claims the dead owner's sequences");
    step("a restarted worker found %llu tokens of the dead one, %llu sums wrong", atomic_load(&slot_of(3)->tokens),
         atomic_load(&slot_of(3)->wrong));
    if (atomic_load(&slot_of(3)->wrong) != 0)
        failed("the tokens are not those that were written");
    start_worker(4, "beside");
    await(4, &slot_of(4)->ready, "computes");
    expect_same_daemon(daemon, "at the end");
    step("a new neighbour computes, and the daemon is the one that it was");
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

static void show_log(void)
{
    char command[160];

    snprintf(command, sizeof(command), "tail -n 12 '%s' | sed 's/^/    log: /'", t.log);
    fflush(stdout);
    if (system(command) != 0)
        printf("    there is no log\n");
}

static void run(const char *name, void (*test)(void))
{
    const char *temp = getenv("TMPDIR");
    double from = now_ms();

    t.test = name;
    t.number++;
    t.steps = 0;
    snprintf(t.folder, sizeof(t.folder), "%.40s/survive.XXXXXX", temp != NULL ? temp : "/tmp");
    if (mkdtemp(t.folder) == NULL) {
        perror(t.folder);
        exit(1);
    }
    snprintf(t.endpoint, sizeof(t.endpoint), "%s/kvpool.sock", t.folder);
    snprintf(t.log, sizeof(t.log), "%s/log", t.folder);
    for (unsigned i = 0; i < SLOTS; i++)
        memset(slot_of(i), 0, sizeof(struct slot));
    printf("    %u: %s\n", t.number, name);
    fflush(stdout);
    t.result = PASSED;
    if (setjmp(t.out) == 0)
        test();
    if (t.result == FAILED)
        show_log();
    if (t.result == PASSED)
        printf("passed  %s (%.1f s)\n", name, (now_ms() - from) / 1e3);
    t.passed += t.result == PASSED;
    t.failed += t.result == FAILED;
    t.skipped += t.result == LEFT_OUT;
    fflush(stdout);
    clean_up();
}

static bool gpu_is_here(void)
{
    glob_t found;
    bool here = glob("/dev/nvidia[0-9]*", 0, NULL, &found) == 0;

    globfree(&found);
    return here;
}

/* Pages of 2 MiB on a GPU, as of an 8B model; small ones on the host. */
static struct plan plan_of(bool cuda)
{
    const char *gib = getenv("KVPOOL_SURVIVE_GIB");
    uint32_t size = gib != NULL && atoi(gib) > 0 ? (uint32_t)atoi(gib) : 64;

    if (cuda)
        return (struct plan){.cuda = true,
                             .layers = 32,
                             .heads = 8,
                             .dim = 128,
                             .page_tokens = 16,
                             .big_pages = size * 512,
                             .small_pages = 512,
                             .fill_seqs = 6,
                             .fill_tokens = size * 512,
                             .step_tokens = 4096,
                             .request_tokens = 128};
    return (struct plan){.layers = 2,
                         .heads = 2,
                         .dim = 64,
                         .page_tokens = 16,
                         .big_pages = 4096,
                         .small_pages = 512,
                         .fill_seqs = 6,
                         .fill_tokens = 4096,
                         .step_tokens = 512,
                         .request_tokens = 128};
}

static void *map_shared(int fd)
{
    void *at = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (at == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return at;
}

#define RUN(test) run(#test, test)

int main(int argc, char **argv)
{
    bool cuda = argc < 2 || strcmp(argv[1], "host") != 0;

    if (argc == 6 && strcmp(argv[1], "--role") == 0)
        return survive_worker(argv[2], map_shared(atoi(argv[4])), (unsigned)atoi(argv[3]), argv[5]);
    t.test = "survive_gpu";
    if (cuda && !gpu_is_here()) {
        printf("skipped survive_gpu: there is no GPU\n0 passed, 0 failed, 1 skipped\n");
        return SKIPPED;
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGPIPE, SIG_IGN);
    srandom((unsigned)getpid());
    t.shared_fd = memfd_create("survive", MFD_CLOEXEC);
    if (t.shared_fd < 0 || ftruncate(t.shared_fd, sizeof(struct shared)) != 0) {
        perror("memfd");
        return 1;
    }
    t.shared = map_shared(t.shared_fd);
    t.shared->plan = plan_of(cuda);
    signal(SIGALRM, time_is_over);
    alarm(LIMIT_S);
    RUN(a_daemon_killed_over_a_large_pool_keeps_every_sealed_page_and_the_workers_compute_on);
    RUN(pages_of_a_worker_killed_in_mid_kernel_are_free_when_the_gpu_is_quiet_and_soon);
    RUN(pages_of_a_killed_worker_whose_forked_child_lives_stay_in_quarantine);
    RUN(under_mps_a_dead_worker_takes_its_neighbours_and_neither_the_daemon_nor_the_memory);
    printf("%u passed, %u failed, %u skipped\n", t.passed, t.failed, t.skipped);
    return t.failed != 0 ? 1 : t.passed == 0 ? SKIPPED : 0;
}
