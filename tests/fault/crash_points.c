/**
 * Crash points: stop at every store to the ledger, as a kill would, recover a copy, and see what is left.
 *
 * For each transaction of a random program: run it once beside the naive model, which knows the states before and
 * after; then, for every n, run it again from the same memory and leave at the n-th store by longjmp. A copy of the
 * memory is recovered; it must pass the audit and be in exactly the state before. Now and then the recovery too is
 * stopped, at each of its stores, and done again: it must come to the same bytes.
 *
 * --programs and --seed: see seed.h. A sanitizer's run takes fewer programs, and as many stores of each.
 */
#include "layout.h"
#include "ledger_block.h"
#include "ledger_image.h"
#include "ledger_naive.h"
#include "seed.h"

#include <setjmp.h>

#define WARM_UP      60
#define TRANSACTIONS 60
#define COMMITS      11 /* to one that is aborted */

static uint64_t first_seed;
#ifdef __SANITIZE_ADDRESS__
static unsigned programs = 12;
#else
static unsigned programs = 40;
#endif

/* ---- stopping ------------------------------------------------------------------------------------------------------
 */

static jmp_buf stopped;
static uint64_t stores, stop_at;
static const struct kvp_ledger *watched; /* whose log says how many stores there must be: four a word, with its entry */
static uint32_t most_logged;

static void on_store(void *arg)
{
    (void)arg;
    if (watched != NULL && watched->txn_stores > most_logged)
        most_logged = watched->txn_stores;
    if (stores++ == stop_at)
        longjmp(stopped, 1);
}

static void watch_stores(uint64_t stop)
{
    stores = 0;
    stop_at = stop;
    kvp_store_hook = on_store;
}

static uint64_t unwatch_stores(void)
{
    kvp_store_hook = NULL;
    return stores;
}

/* ---- recovery ------------------------------------------------------------------------------------------------------
 */

/* Stop the recovery of `killed` at each of its stores; done again it must come to what `recovered` holds. */
static uint64_t stop_recovery_everywhere(struct ledger_block *victim, const struct ledger_image *killed,
                                         const struct ledger_image *recovered)
{
    volatile uint64_t points = 0;
    for (volatile uint64_t at = 0;; at++) {
        ledger_image_restore(killed, victim);
        if (setjmp(stopped) == 0) {
            watch_stores(at);
            ledger_block_recover(victim);
            unwatch_stores();
            return points;
        }
        unwatch_stores();
        ledger_block_recover(victim);
        if (!ledger_image_is(recovered, victim))
            ck_abort_msg("a recovery stopped at store %llu", (unsigned long long)at);
        points++;
    }
}

/* ---- programs ------------------------------------------------------------------------------------------------------
 */

struct bed {
    struct ledger_block live, victim;
    struct ledger_image before, after, killed, recovered;
    struct naive naive;
    uint64_t points, recovery_points;
};

/* Run a random transaction beside the model. The stores that it made. */
static uint64_t run_first(struct bed *bed, uint64_t *rng, struct naive_transaction *ret_transaction)
{
    watch_stores(UINT64_MAX);
    watched = &bed->live.ledger;
    most_logged = 0;
    *ret_transaction = naive_transact(&bed->naive, &bed->live.ledger, COMMITS, rng);
    watched = NULL;
    ck_assert_msg(stores >= 4ull * most_logged,
                  "%" PRIu64 " stores seen, of a transaction that logged %" PRIu32 " words", stores, most_logged);
    return unwatch_stores();
}

/* The live block was left at a store: recover a copy of it. */
static void check_killed(struct bed *bed, const struct naive_state *before, uint64_t at, bool stop_recovery)
{
    struct naive_state now;
    ledger_image_save(&bed->killed, &bed->live);
    ledger_image_restore(&bed->killed, &bed->victim);
    ledger_block_recover(&bed->victim);
    ledger_block_assert_clean(&bed->victim.ledger);
    naive_read(&bed->victim.ledger, bed->naive.pool, &now);
    if (!naive_same(&now, before, true))
        ck_abort_msg("killed at store %llu", (unsigned long long)at);
    bed->points++;
    if (!stop_recovery)
        return;
    ledger_image_save(&bed->recovered, &bed->victim);
    bed->recovery_points += stop_recovery_everywhere(&bed->victim, &bed->killed, &bed->recovered);
}

static void run_transaction(struct bed *bed, uint64_t *rng)
{
    struct naive_transaction transaction;
    struct naive_state before = bed->naive.state;
    struct kvp_ledger handle = bed->live.ledger;
    ledger_image_save(&bed->before, &bed->live);
    const uint64_t total = run_first(bed, rng, &transaction);
    struct kvp_ledger handle_after = bed->live.ledger;
    ledger_image_save(&bed->after, &bed->live);
    for (volatile uint64_t at = 0; at < total; at++) {
        ledger_image_restore(&bed->before, &bed->live);
        bed->live.ledger = handle;
        if (setjmp(stopped) == 0) {
            watch_stores(at);
            naive_transact_again(&bed->live.ledger, bed->naive.pool, &transaction);
            ck_abort_msg("a transaction made fewer stores when it was run again");
        }
        unwatch_stores();
        check_killed(bed, &before, at, (at + total) % 3 == 0);
    }
    ledger_image_restore(&bed->after, &bed->live);
    bed->live.ledger = handle_after;
    struct naive_state now;
    naive_read(&bed->live.ledger, bed->naive.pool, &now);
    ck_assert(naive_same(&now, &bed->naive.state, true));
    ledger_image_restore(&bed->after, &bed->victim);
    ledger_block_recover(&bed->victim);
    naive_read(&bed->victim.ledger, bed->naive.pool, &now);
    ck_assert(naive_same(&now, &bed->naive.state, true));
}

START_TEST(a_kill_at_any_store_leaves_the_state_before_or_after_the_transaction)
{
    static struct bed bed;
    uint64_t rng = first_seed + (uint64_t)_i;
    ledger_block_open(&bed.live, kvp_ledger_root_bytes() + (1u << 20));
    ledger_block_map(&bed.victim, bed.live.bytes);
    naive_start(&bed.naive, &bed.live.ledger, &rng);
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_get(&bed.live.ledger, bed.naive.pool, &view), KVP_OK);
    struct ledger_image *images[] = {&bed.before, &bed.after, &bed.killed, &bed.recovered};
    for (int i = 0; i < 4; i++)
        ledger_image_make(images[i], view.extent_bytes);
    for (int i = 0; i < WARM_UP; i++) {
        struct naive_transaction transaction;
        run_first(&bed, &rng, &transaction);
    }
    for (int i = 0; i < TRANSACTIONS; i++)
        run_transaction(&bed, &rng);
    ledger_image_assert_nothing_elsewhere(&bed.before, &bed.live);
    printf("seed %llu: %llu points, %llu in recoveries\n", (unsigned long long)first_seed + (unsigned)_i,
           (unsigned long long)bed.points, (unsigned long long)bed.recovery_points);
    for (int i = 0; i < 4; i++)
        ledger_image_free(images[i]);
    ledger_block_close(&bed.live);
    ledger_block_close(&bed.victim);
}
END_TEST

/* ---- what the programs do not do --------------------------------------------------------------------------------- */

START_TEST(a_kill_while_a_pool_is_made_or_deleted_leaves_it_there_or_not)
{
    struct ledger_block block;
    struct kvp_pool_spec spec = {
        .geometry = {8, 4, 0, 4, 4, 0}, .name = "pool", .blob = "spec bytes", .blob_bytes = 10};
    struct kvp_pool_id pool = {0};
    struct kvp_pool_view view;
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    for (volatile uint64_t at = 0; pool.generation == 0; at++) {
        if (setjmp(stopped) == 0) {
            watch_stores(at);
            kvp_txn_begin(&block.ledger);
            ck_assert_int_eq(kvp_pool_create(&block.ledger, &spec, &pool), KVP_OK);
            kvp_txn_commit(&block.ledger);
            unwatch_stores();
            continue;
        }
        pool = (struct kvp_pool_id){0};
        unwatch_stores();
        ledger_block_recover(&block);
        ledger_block_assert_clean(&block.ledger);
        ck_assert_int_eq(kvp_pool_at(&block.ledger, 0, &view), KVP_ENOENT);
    }
    for (volatile bool done = false, first = true; !done; first = false) {
        if (setjmp(stopped) == 0) {
            watch_stores(first ? 3 : UINT64_MAX);
            kvp_txn_begin(&block.ledger);
            ck_assert_int_eq(kvp_pool_delete(&block.ledger, pool), KVP_OK);
            kvp_txn_commit(&block.ledger);
            done = true;
        }
        unwatch_stores();
        ledger_block_recover(&block);
        ledger_block_assert_clean(&block.ledger);
        ck_assert_int_eq(kvp_pool_get(&block.ledger, pool, &view), done ? KVP_ENOENT : KVP_OK);
    }
    ledger_block_close(&block);
}
END_TEST

START_TEST(a_kill_while_a_ledger_is_formatted_leaves_none_or_a_whole_one)
{
    struct kvp_uuid instance = {{1}};
    volatile bool done = false;
    for (volatile uint64_t at = 0; !done; at++) {
        struct ledger_block block;
        const char *why;
        ledger_block_map(&block, kvp_ledger_root_bytes());
        if (setjmp(stopped) == 0) {
            watch_stores(at);
            ck_assert_int_eq(kvp_ledger_format(&block.ledger, block.view, block.store, block.bytes, instance), KVP_OK);
            done = true;
        }
        unwatch_stores();
        enum kvp_status status = kvp_ledger_open(&block.ledger, block.view, block.store, block.bytes, &why);
        ck_assert_int_eq(status, done ? KVP_OK : KVP_ECORRUPT);
        ledger_block_close(&block);
    }
}
END_TEST

int main(int argc, char **argv)
{
    first_seed = programs_choose(argc, argv, &programs);
    Suite *suite = suite_create("crash_points");
    TCase *tcase = tcase_create("points");
    tcase_set_timeout(tcase, 600);
    tcase_add_test(tcase, a_kill_while_a_ledger_is_formatted_leaves_none_or_a_whole_one);
    tcase_add_test(tcase, a_kill_while_a_pool_is_made_or_deleted_leaves_it_there_or_not);
    tcase_add_loop_test(tcase, a_kill_at_any_store_leaves_the_state_before_or_after_the_transaction, 0, (int)programs);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
