/**
 * The ledger against the naive one: random programs, the whole observable state compared and audited after every step.
 *
 * --programs and --seed: see seed.h.
 */
#include "ledger_block.h"
#include "ledger_naive.h"
#include "seed.h"

#define STEPS 400

static uint64_t first_seed;
static unsigned programs = 100;

static void check_answer(const struct naive *naive, const struct naive_op *op, enum kvp_status status)
{
    enum kvp_status expected = naive_expect(naive, op);
    if (status != expected)
        printf("  kind %d: %s, expected %s\n", op->kind, kvp_status_name(status), kvp_status_name(expected));
    REQUIRE(status == expected);
    if (status == KVP_ENOPAGES)
        REQUIRE(op->ret_short >= 1);
    if (status == KVP_ENOPAGES && op->kind == NAIVE_RESERVE && op->tokens > naive->state.seqs[op->seq.slot].reserved) {
        uint32_t pages = (op->tokens + naive->geometry.page_tokens - 1) / naive->geometry.page_tokens;
        uint32_t needed = pages - naive->state.seqs[op->seq.slot].row_pages;
        uint32_t missing = 0, tenant = naive_tenant_of(naive, naive->state.seqs[op->seq.slot].attachment);
        REQUIRE(naive_room(naive, tenant, needed, &missing) == KVP_ENOPAGES);
        REQUIRE(op->ret_short == missing);
    }
}

static void assert_same(const struct kvp_ledger *ledger, const struct naive *naive)
{
    struct naive_state now;
    naive_read(ledger, naive->pool, &now);
    REQUIRE(naive_same(&now, &naive->state, true));
}

/* One transaction of a few operations; it ends with the first failure or at random, and then nothing has changed. */
static void run_transaction(struct kvp_ledger *ledger, struct naive *naive, uint64_t *rng)
{
    struct naive before = *naive;
    uint32_t n = 1 + naive_random(rng, 4);
    bool abort_it = naive_random(rng, 10) == 0;
    kvp_txn_begin(ledger);
    for (uint32_t i = 0; i < n; i++) {
        struct naive_op op = naive_choose(naive, rng);
        enum kvp_status status = naive_run(ledger, naive->pool, &op);
        check_answer(naive, &op, status);
        if (status != KVP_OK) {
            abort_it = true;
            break;
        }
        struct naive_state now;
        naive_read(ledger, naive->pool, &now);
        naive_apply(naive, &op, &now);
        if (!naive_same(&now, &naive->state, true))
            ck_abort_msg("after an operation of kind %d", op.kind);
    }
    if (abort_it) {
        kvp_txn_abort(ledger);
        *naive = before;
    } else {
        kvp_txn_commit(ledger);
    }
    assert_same(ledger, naive);
}

static void run_program(uint64_t seed)
{
    uint64_t rng = seed;
    struct ledger_block block;
    struct naive naive;
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    naive_start(&naive, &block.ledger, &rng);
    for (uint32_t step = 0; step < STEPS; step++) {
        run_transaction(&block.ledger, &naive, &rng);
        ledger_block_assert_clean(&block.ledger);
    }
    ledger_block_close(&block);
}

START_TEST(a_random_program_leaves_the_ledger_as_the_naive_one_says_and_failures_change_nothing)
{
    run_program(first_seed + (uint64_t)_i);
}
END_TEST

int main(int argc, char **argv)
{
    first_seed = programs_choose(argc, argv, &programs);
    Suite *suite = suite_create("ledger_model");
    TCase *tcase = tcase_create("programs");
    tcase_set_timeout(tcase, 600);
    tcase_add_loop_test(tcase, a_random_program_leaves_the_ledger_as_the_naive_one_says_and_failures_change_nothing, 0,
                        (int)programs);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
