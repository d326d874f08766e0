/**
 * Every instruction a kill: the ledger as it was compiled, stepped through one instruction at a time.
 *
 * The store hooks of crash_points.c can't show what the compiler reordered around a store. So here a child runs
 * transactions of a random program under ptrace, this process steps it, and whenever an instruction has changed the
 * ledger's memory, a copy of that is recovered: it must pass the audit, and be in the state before the transaction, or,
 * from some instruction on and then to the end, in the state after it.
 *
 * --programs and --seed: see seed.h. Skipped, by name, where ptrace is not allowed.
 */
#include "ledger_block.h"
#include "ledger_image.h"
#include "ledger_naive.h"
#include "seed.h"

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#define WARM_UP      40
#define TRANSACTIONS 3
#define COMMITS      7 /* to one that is aborted */

static uint64_t first_seed;
static unsigned programs = 20;

struct bed {
    struct ledger_block live, victim;
    struct ledger_image before, after, seen;
    struct naive naive;
    uint64_t instructions, changes;
};

/* The child is between two instructions. @return whether what it leaves is the state after */
static bool recovered_is_after(struct bed *bed, const struct naive_state *before, const struct naive_state *after)
{
    struct naive_state now;
    ledger_image_save(&bed->seen, &bed->live);
    ledger_image_restore(&bed->seen, &bed->victim);
    ledger_block_recover(&bed->victim);
    ledger_block_assert_clean(&bed->victim.ledger);
    naive_read(&bed->victim.ledger, bed->naive.pool, &now);
    bed->changes++;
    if (naive_same(&now, after, false))
        return true;
    if (!naive_same(&now, before, true))
        ck_abort_msg("killed at instruction %llu: neither before nor after", (unsigned long long)bed->instructions);
    return false;
}

static pid_t start_child(struct bed *bed, const struct naive_transaction *transaction)
{
    pid_t pid = fork();
    if (pid == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(77);
        raise(SIGSTOP);
        naive_transact_again(&bed->live.ledger, bed->naive.pool, transaction);
        _exit(0);
    }
    ck_assert_int_gt(pid, 0);
    return pid;
}

static void step_through(struct bed *bed, const struct naive_transaction *transaction, const struct naive_state *before,
                         const struct naive_state *after)
{
    bool same = naive_same(before, after, false), is_after = false;
    pid_t pid = start_child(bed, transaction);
    int status;
    ledger_image_save(&bed->seen, &bed->live);
    for (;;) {
        ck_assert_int_eq(waitpid(pid, &status, 0), pid);
        if (!WIFSTOPPED(status))
            break;
        if (!ledger_image_equals(&bed->seen, &bed->live)) {
            bool now_after = recovered_is_after(bed, before, after);
            if (is_after && !now_after && !same)
                ck_abort_msg("instruction %llu took a commit back", (unsigned long long)bed->instructions);
            is_after = now_after;
        }
        bed->instructions++;
        ck_assert_int_eq(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL), 0);
    }
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    ck_assert(ledger_image_is(&bed->after, &bed->live));
}

START_TEST(a_kill_at_any_instruction_leaves_the_state_before_or_after_the_transaction)
{
    static struct bed bed;
    uint64_t rng = first_seed + (uint64_t)_i;
    struct kvp_pool_view view;
    memset(&bed, 0, sizeof(bed));
    ledger_block_open(&bed.live, kvp_ledger_root_bytes() + (1u << 20));
    ledger_block_map(&bed.victim, bed.live.bytes);
    naive_start(&bed.naive, &bed.live.ledger, &rng);
    ck_assert_int_eq(kvp_pool_get(&bed.live.ledger, bed.naive.pool, &view), KVP_OK);
    struct ledger_image *images[] = {&bed.before, &bed.after, &bed.seen};
    for (int i = 0; i < 3; i++)
        ledger_image_make(images[i], view.extent_bytes);
    for (int i = 0; i < WARM_UP; i++)
        naive_transact(&bed.naive, &bed.live.ledger, COMMITS, &rng);
    for (int i = 0; i < TRANSACTIONS;) {
        struct naive_state before = bed.naive.state;
        struct kvp_ledger handle = bed.live.ledger;
        ledger_image_save(&bed.before, &bed.live);
        struct naive_transaction transaction = naive_transact(&bed.naive, &bed.live.ledger, COMMITS, &rng);
        struct kvp_ledger handle_after = bed.live.ledger;
        if (ledger_image_equals(&bed.before, &bed.live))
            continue; /* refused before its first store */
        i++;
        ledger_image_save(&bed.after, &bed.live);
        ledger_image_restore(&bed.before, &bed.live);
        bed.live.ledger = handle;
        step_through(&bed, &transaction, &before, &bed.naive.state);
        ledger_image_restore(&bed.after, &bed.live);
        bed.live.ledger = handle_after;
    }
    ledger_image_assert_nothing_elsewhere(&bed.before, &bed.live);
    printf("seed %llu: %llu instructions, %llu of them stores that were recovered from\n",
           (unsigned long long)first_seed + (unsigned)_i, (unsigned long long)bed.instructions,
           (unsigned long long)bed.changes);
    ck_assert_uint_gt(bed.changes, TRANSACTIONS);
    for (int i = 0; i < 3; i++)
        ledger_image_free(images[i]);
    ledger_block_close(&bed.live);
    ledger_block_close(&bed.victim);
}
END_TEST

static bool may_trace(void)
{
    int status = 0;
    pid_t pid = fork();
    if (pid == 0)
        _exit(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0 ? 0 : 77);
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(int argc, char **argv)
{
    if (!may_trace()) {
        printf("skipped: a_kill_at_any_instruction_leaves_the_state_before_or_after_the_transaction: no ptrace here\n");
        return 77;
    }
    first_seed = programs_choose(argc, argv, &programs);
    Suite *suite = suite_create("single_step");
    TCase *tcase = tcase_create("instructions");
    tcase_set_timeout(tcase, 600);
    tcase_add_loop_test(tcase, a_kill_at_any_instruction_leaves_the_state_before_or_after_the_transaction, 0,
                        (int)programs);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
