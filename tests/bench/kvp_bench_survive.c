/**
 * What surviving costs, in the core alone (no socket, no process): Advance with the undo log and without it, and how
 * long another session's call is held up while a dead worker's pages are taken back, and while the ledger is audited.
 *
 *   advance   256 sequences get room for one token more, by a call of kvp_core_call; one in 16 takes a page
 *   stall     a session with 100 000 pages dies; until they are free, each tick with a call of another session behind it
 *   audit     of a pool with a million pages in use: each tick, a call behind it, until it is over; the snapshot is read
 *             by another thread meanwhile
 *
 * The build without the log (kvp_bench_survive_unlogged) is the same source over an allocator that saves no old words;
 * it prints its figure alone. The two run in turns, five times; each figure is the median. --json: one object with the
 * keys advance_us, advance_unlogged_us, undo_log_ratio, reclaimed_pages, stall_max_us, stall_p99_us, reclaim_ms,
 * audited_pages, audit_stall_max_us, audit_stall_p99_us, audit_copy_ms, audit_ms.
 */
#include "core_shell.h"
#include "state.h"

#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BATCH  256u
#define STEPS  512u
#define ROUNDS 9
#define RUNS   5
#define PAGES  100000u
#define TICKS  1000000
#define AUDITED (1u << 20) /* pages */

static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof(values[0]), compare);
    return values[n / 2];
}

/* The answer is of no interest but for its status, and neither is the clock. */
static enum kvp_status answered;

static void quiet_reply(void *ctx, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                        const struct kvp_thing *things, unsigned n_things)
{
    (void)ctx, (void)call, (void)reply, (void)things, (void)n_things;
    answered = status;
}

static void call(struct shell *shell, struct kvp_caller caller, ProtobufCMessage *body)
{
    struct kvp_call one = {.caller = caller, .message = {.method = KVPOOL__V1__METHOD__METHOD_ADVANCE, .body = body}};

    answered = KVP_EINTERNAL;
    kvp_core_call(shell->core, &one);
    ck_assert_int_eq(answered, KVP_OK);
}

/* From here on calls are answered to nobody. */
static void silence(struct shell *shell)
{
    static struct kvp_actions quiet;

    quiet = *shell->core->act;
    quiet.reply = quiet_reply;
    shell->core->act = &quiet;
}

/* ---- Advance ----------------------------------------------------------------------------------------------------- */

static double advance_us(void)
{
    const struct pool_of pool = {.name = "p", .pages = BATCH * 512, .page_tokens = 16, .layers = 1,
                                 .max_sequences = BATCH, .max_sequence_tokens = 8192};
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    static double us[ROUNDS];
    static uint64_t seqs[BATCH];
    uint32_t reserved[BATCH] = {0};
    struct shell *shell = shell_begin("host");
    struct kvp_caller caller = shell_connect(shell, 1000, 41);

    shell_make_pool(shell, caller, &pool);
    shell_attach(shell, caller, "p");
    for (uint32_t i = 0; i < BATCH; i++)
        ck_assert_int_eq(shell_open(shell, caller, "p", i + 1, false, &seqs[i]), KVP_OK);
    silence(shell);
    request.pool = (char *)"p";
    request.seqs = seqs;
    request.reserved = reserved;
    request.n_seqs = request.n_reserved = BATCH;
    for (int round = -1; round < ROUNDS; round++) {
        double from = now_us();

        for (uint32_t step = 0; step < STEPS; step++) {
            for (uint32_t i = 0; i < BATCH; i++)
                reserved[i]++;
            request.call_id++;
            call(shell, caller, &request.base);
        }
        if (round >= 0)
            us[round] = (now_us() - from) / STEPS;
    }
    return median(us, ROUNDS); /* the shell ends with the program */
}

#ifdef KVPOOL_NO_UNDO_LOG

static bool json = true;

START_TEST(measure)
{
    printf("%.3f\n", advance_us());
}
END_TEST

#else

/* By the program beside this one. */
static double advance_unlogged_us(void)
{
    char self[PATH_MAX], command[PATH_MAX + 40];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    double us = 0;
    FILE *out;

    ck_assert_int_gt(n, 0);
    self[n] = 0;
    snprintf(command, sizeof(command), "'%s/kvp_bench_survive_unlogged'", dirname(self));
    out = popen(command, "r");
    ck_assert_ptr_nonnull(out);
    ck_assert_int_eq(fscanf(out, "%lf", &us), 1);
    ck_assert_int_eq(pclose(out), 0);
    return us;
}

/* ---- the way back ------------------------------------------------------------------------------------------------ */

struct stall {
    double max_us, p99_us, reclaim_ms;
};

static struct stall measure_stall(void)
{
    const struct pool_of pool = {.name = "p", .pages = PAGES + 64, .page_tokens = 16, .layers = 1, .max_sequences = 256,
                                 .max_sequence_tokens = 16000};
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    static double us[TICKS];
    struct shell *shell = shell_begin("host");
    struct kvp_caller dead = shell_connect(shell, 1000, 41), other = shell_connect(shell, 1000, 42);
    uint32_t reserved = 0;
    uint64_t seq;
    double from;
    int n = 0;

    shell_make_pool(shell, dead, &pool);
    shell_attach(shell, dead, "p");
    shell_attach(shell, other, "p");
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    for (uint32_t i = 0; i < PAGES / 1000; i++) {
        uint64_t owned;

        ck_assert_int_eq(shell_open(shell, dead, "p", i + 1, false, &owned), KVP_OK);
        ck_assert_int_eq(shell_advance(shell, dead, "p", owned, 16000, 0), KVP_OK);
    }
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 64);
    silence(shell);
    request.pool = (char *)"p";
    request.seqs = &seq;
    request.reserved = &reserved;
    request.n_seqs = request.n_reserved = 1;
    from = now_us();
    kvp_core_process_ended(shell->core, dead.session);
    do {
        double start = now_us();

        kvp_core_tick(shell->core, shell->now_ms);
        reserved++;
        request.call_id++;
        call(shell, other, &request.base);
        us[n++] = now_us() - start;
    } while (shell->core->pools[0].reclaim_due || shell->core->ending != 0);
    struct stall stall = {.reclaim_ms = (now_us() - from) / 1e3};
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_get(&shell->ledger, shell->core->pools[0].id, &view), KVP_OK);
    ck_assert_uint_eq(view.free_pages, PAGES + 64 - (reserved + 15) / 16);
    qsort(us, (size_t)n, sizeof(us[0]), compare);
    stall.max_us = us[n - 1];
    stall.p99_us = us[(n - 1) * 99 / 100];
    return stall;
}

/* ---- the audit --------------------------------------------------------------------------------------------------- */

/* As the daemon's auditor does: a thread of its own, memory of small pages, given back by that thread. */
static struct kvp_ledger snapshot;
static struct kvp_audit_report report;
static pthread_t reader;
static atomic_bool read_to_the_end;

static void *read_snapshot(void *arg)
{
    void *scratch = malloc(kvp_audit_scratch_bytes(&snapshot));

    report.violations = kvp_audit(&snapshot, scratch, NULL, NULL);
    free(scratch);
    munmap((void *)(uintptr_t)snapshot.view, snapshot.bytes);
    atomic_store(&read_to_the_end, true);
    return arg;
}

static unsigned char *make_memory(void *ctx, uint64_t used)
{
    size_t bytes = ((struct shell *)ctx)->block_bytes;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    (void)used;
    ck_assert_ptr_ne(at, MAP_FAILED);
    madvise(at, bytes, MADV_NOHUGEPAGE);
    return at;
}

static void start_reading(void *ctx, const struct kvp_ledger *taken)
{
    (void)ctx;
    snapshot = *taken;
    ck_assert_int_eq(pthread_create(&reader, NULL, read_snapshot, NULL), 0);
}

struct audit {
    double max_us, p99_us, copy_ms, ms;
};

static struct audit measure_audit(void)
{
    const struct pool_of pool = {.name = "p", .pages = AUDITED + 64, .page_tokens = 16, .layers = 1,
                                 .max_sequences = 1040, .max_sequence_tokens = 16384};
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    Kvpool__V1__AuditRequest ask = KVPOOL__V1__AUDIT_REQUEST__INIT;
    struct kvp_call asked = {.message = {.method = KVPOOL__V1__METHOD__METHOD_AUDIT, .body = &ask.base}};
    struct shell *shell = shell_begin("host");
    struct kvp_caller owner = shell_connect(shell, 1000, 41), other = shell_connect(shell, 1000, 42);
    static struct kvp_actions slow;
    static double us[TICKS];
    uint32_t reserved = 0;
    struct audit result = {0};
    uint64_t seq;
    double from;
    int n = 0;

    shell_make_pool(shell, owner, &pool);
    shell_attach(shell, owner, "p");
    shell_attach(shell, other, "p");
    for (uint32_t i = 0; i < AUDITED / 1024; i++) {
        ck_assert_int_eq(shell_open(shell, owner, "p", i + 1, false, &seq), KVP_OK);
        ck_assert_int_eq(shell_advance(shell, owner, "p", seq, 16384, 0), KVP_OK);
    }
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    silence(shell);
    slow = *shell->core->act;
    slow.snapshot_make = make_memory;
    slow.snapshot_audit = start_reading;
    shell->core->act = &slow;
    request.pool = (char *)"p";
    request.seqs = &seq;
    request.reserved = &reserved;
    request.n_seqs = request.n_reserved = 1;
    from = now_us();
    kvp_core_call(shell->core, &asked);
    while (!atomic_load(&read_to_the_end)) {
        double start = now_us();

        kvp_core_tick(shell->core, shell->now_ms);
        reserved = (reserved + 1) % 1000;
        request.truncate = reserved == 0;
        request.call_id++;
        call(shell, other, &request.base);
        if (n < TICKS)
            us[n++] = now_us() - start;
        if (shell->core->audit.phase == AUDIT_COPYING)
            result.copy_ms = (now_us() - from) / 1e3;
    }
    pthread_join(reader, NULL);
    kvp_core_audited(shell->core, &report);
    result.ms = (now_us() - from) / 1e3;
    ck_assert_int_eq(answered, KVP_OK);
    ck_assert_uint_eq(report.violations, 0);
    qsort(us, (size_t)n, sizeof(us[0]), compare);
    result.max_us = us[n - 1];
    result.p99_us = us[(n - 1) * 99 / 100];
    return result;
}

static bool json;

START_TEST(measure)
{
    struct audit audit = measure_audit();
    double logged[RUNS], unlogged[RUNS], with, without;
    struct stall stall = measure_stall();

    for (int i = 0; i < RUNS; i++) {
        logged[i] = advance_us();
        unlogged[i] = advance_unlogged_us();
    }
    with = median(logged, RUNS);
    without = median(unlogged, RUNS);
    if (json)
        printf("{\"advance_us\": %.2f, \"advance_unlogged_us\": %.2f, \"undo_log_ratio\": %.3f, "
               "\"reclaimed_pages\": %u, \"stall_max_us\": %.1f, \"stall_p99_us\": %.1f, \"reclaim_ms\": %.2f, "
               "\"audited_pages\": %u, \"audit_stall_max_us\": %.1f, \"audit_stall_p99_us\": %.1f, "
               "\"audit_copy_ms\": %.2f, \"audit_ms\": %.2f}\n",
               with, without, with / without, PAGES, stall.max_us, stall.p99_us, stall.reclaim_ms, AUDITED,
               audit.max_us, audit.p99_us, audit.copy_ms, audit.ms);
    else
        printf("Advance of %u sequences   %.2f us, without the undo log %.2f us: %+.1f %%\n"
               "%u pages taken back    in %.2f ms; a call meanwhile took %.1f us at most, p99 %.1f us\n"
               "%u pages audited      in %.2f ms, copied in %.2f ms of these; a call meanwhile took %.1f us at most, "
               "p99 %.1f us\n",
               BATCH, with, without, (with / without - 1) * 100, PAGES, stall.reclaim_ms, stall.max_us, stall.p99_us,
               AUDITED, audit.ms, audit.copy_ms, audit.max_us, audit.p99_us);
}
END_TEST

#endif

int main(int argc, char **argv)
{
    Suite *suite = suite_create("bench");
    TCase *bench = tcase_create("survive");
    SRunner *runner;
    int failed;

    json |= argc > 1 && strcmp(argv[1], "--json") == 0;
    tcase_add_test(bench, measure);
    suite_add_tcase(suite, bench);
    runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, json ? CK_SILENT : CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
