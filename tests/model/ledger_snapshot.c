/**
 * Snapshots under random programs: while one is taken, in steps of random sizes with random transactions between them,
 * nothing is lost and nothing is torn. At the moment at which it is taken it holds every word of the ledger that counts,
 * shows what the naive ledger shows, and passes the audit; and transactions after that do not reach it.
 *
 * --programs and --seed: see seed.h.
 */
#include "layout.h"
#include "ledger_block.h"
#include "ledger_naive.h"
#include "seed.h"

#include <sys/mman.h>

#define SNAPSHOTS 8 /* of one program */

static uint64_t first_seed;
static unsigned programs = 15;

static unsigned char *zeroed(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(at != MAP_FAILED);
    return at;
}

/* A pool before the program's and one behind it, a hole between: extents are walked by their place, not their slot. */
static void make_neighbours(struct kvp_ledger *ledger)
{
    static const char *const names[] = {"first", "hole", "behind"};
    struct kvp_pool_spec spec = {.geometry = {.pages = 700, .page_tokens = 2, .max_sequences = 3, .row_pages = 5}};
    struct kvp_pool_id pools[3];
    kvp_txn_begin(ledger);
    for (int i = 0; i < 3; i++) {
        spec.name = names[i];
        REQUIRE(kvp_pool_create(ledger, &spec, &pools[i]) == KVP_OK);
    }
    REQUIRE(kvp_pool_delete(ledger, pools[1]) == KVP_OK);
    REQUIRE(kvp_pool_delete(ledger, pools[0]) == KVP_OK);
    kvp_txn_commit(ledger);
}

static void same_words(const struct kvp_ledger *ledger, const struct kvp_ledger *snapshot, uint64_t from, uint64_t to)
{
    for (; from < to; from += 4)
        if (memcmp(ledger->view + from, snapshot->view + from, 4) != 0)
            ck_abort_msg("the word at %llu is not the ledger's", (unsigned long long)from);
}

/* All but the log and what is dead in rows. */
static void assert_same_words(const struct kvp_ledger *ledger, const struct kvp_ledger *snapshot)
{
    same_words(ledger, snapshot, 0, LOG_OFFSET);
    same_words(ledger, snapshot, SESSIONS_OFFSET, ROOT_BYTES);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct kvp_pool_view view;
        if (kvp_pool_at(ledger, slot, &view) != KVP_OK)
            continue;
        const uint32_t *rows = kvp_seq_row(ledger, view.id, 0);
        same_words(ledger, snapshot, view.extent_offset, (uint64_t)((const unsigned char *)rows - ledger->view));
        for (uint32_t i = 0; i < view.geometry.max_sequences; i++) {
            struct kvp_seq_view seq;
            const uint32_t *row = rows + (size_t)i * view.geometry.row_pages;
            uint64_t at = (uint64_t)((const unsigned char *)row - ledger->view);
            if (kvp_seq_at(ledger, view.id, i, &seq) == KVP_OK)
                same_words(ledger, snapshot, at, at + seq.row_pages * 4ull);
        }
    }
}

static void take_one(struct naive *naive, struct kvp_ledger *ledger, uint64_t *rng)
{
    uint32_t largest = 1u << (3 + naive_random(rng, 20));
    unsigned char *memory = zeroed(ledger->bytes);
    struct kvp_ledger snapshot;
    struct naive_state seen;
    bool taken = false;
    kvp_snapshot_begin(ledger, memory);
    for (unsigned step = 0; !taken; step++) {
        for (uint32_t n = naive_random(rng, 3); n > 0; n--)
            naive_transact(naive, ledger, 9, rng);
        REQUIRE(kvp_snapshot_step(ledger, 1 + naive_random(rng, largest), &taken, &snapshot) == KVP_OK);
        if (step == 2000) /* the small steps have shown what they can */
            largest = 1u << 16;
    }
    assert_same_words(ledger, &snapshot);
    ledger_block_assert_clean(&snapshot);
    naive_read(&snapshot, naive->pool, &seen);
    REQUIRE(naive_same(&seen, &naive->state, true));
    for (uint32_t n = 0; n < 20; n++)
        naive_transact(naive, ledger, 9, rng);
    struct naive_state later;
    naive_read(&snapshot, naive->pool, &later);
    REQUIRE(naive_same(&seen, &later, true));
    REQUIRE(munmap(memory, ledger->bytes) == 0);
}

START_TEST(a_snapshot_is_the_ledger_as_it_is_when_the_last_of_it_is_copied)
{
    uint64_t rng = first_seed + (uint64_t)_i;
    struct ledger_block block;
    struct naive naive;
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    make_neighbours(&block.ledger);
    naive_start(&naive, &block.ledger, &rng);
    for (int i = 0; i < SNAPSHOTS; i++)
        take_one(&naive, &block.ledger, &rng);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(a_pool_made_meanwhile_ends_the_snapshot_and_the_next_one_has_it)
{
    struct kvp_pool_geometry geometry = {.pages = 8, .page_tokens = 4, .max_sequences = 2, .row_pages = 4};
    struct kvp_pool_spec spec = {.geometry = geometry, .name = "late"};
    struct kvp_ledger snapshot;
    struct ledger_bed bed;
    struct kvp_pool_id pool;
    bool taken = false;
    ledger_bed_make(&bed, geometry, false);
    unsigned char *memory = zeroed(bed.ledger->bytes);
    kvp_snapshot_begin(bed.ledger, memory);
    ck_assert_int_eq(kvp_snapshot_step(bed.ledger, 5000, &taken, &snapshot), KVP_OK);
    ck_assert(!taken);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_pool_create(bed.ledger, &spec, &pool), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_int_eq(kvp_snapshot_step(bed.ledger, 5000, &taken, &snapshot), KVP_EAGAIN);
    ck_assert(!taken);
    ck_assert_int_eq(munmap(memory, bed.ledger->bytes), 0);
    memory = zeroed(bed.ledger->bytes);
    kvp_snapshot_begin(bed.ledger, memory);
    ck_assert_int_eq(kvp_snapshot_step(bed.ledger, SIZE_MAX, &taken, &snapshot), KVP_OK);
    ck_assert(taken);
    ck_assert_int_eq(kvp_pool_by_name(&snapshot, "late", &pool), KVP_OK);
    ledger_block_assert_clean(&snapshot);
    ck_assert_int_eq(munmap(memory, bed.ledger->bytes), 0);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(what_is_wrong_in_the_ledger_is_wrong_in_the_snapshot_and_its_audit_says_so)
{
    struct kvp_pool_geometry geometry = {.pages = 16, .page_tokens = 4, .max_sequences = 4, .row_pages = 8};
    struct ledger_bed bed;
    ledger_bed_make(&bed, geometry, false);
    kvp_txn_begin(bed.ledger);
    ledger_bed_seq(&bed, bed.attachment, 7, 20, 18);
    kvp_txn_commit(bed.ledger);
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_get(bed.ledger, bed.pool, &view), KVP_OK);
    const uint64_t places[] = {view.extent_offset + 4,                                      /* a page's references */
                               POOLS_OFFSET + offsetof(struct block_pool, extent_offset),   /* where the pool lies */
                               POOLS_OFFSET + offsetof(struct block_pool, sequences_used)}; /* a watermark */
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        uint32_t *word = (uint32_t *)(void *)(bed.block.store + places[i]);
        unsigned char *memory = zeroed(bed.ledger->bytes);
        struct kvp_ledger snapshot;
        bool taken;
        *word ^= 1u << 12;
        kvp_snapshot_begin(bed.ledger, memory);
        ck_assert_int_eq(kvp_snapshot_step(bed.ledger, SIZE_MAX, &taken, &snapshot), KVP_OK);
        ck_assert(taken);
        ck_assert_uint_ge(ledger_block_audit(&snapshot, false), 1);
        *word ^= 1u << 12;
        ck_assert_int_eq(munmap(memory, bed.ledger->bytes), 0);
    }
    ledger_bed_end(&bed);
}
END_TEST

int main(int argc, char **argv)
{
    first_seed = programs_choose(argc, argv, &programs);
    Suite *suite = suite_create("ledger_snapshot");
    TCase *tcase = tcase_create("programs");
    tcase_set_timeout(tcase, 600);
    tcase_add_loop_test(tcase, a_snapshot_is_the_ledger_as_it_is_when_the_last_of_it_is_copied, 0, (int)programs);
    tcase_add_test(tcase, a_pool_made_meanwhile_ends_the_snapshot_and_the_next_one_has_it);
    tcase_add_test(tcase, what_is_wrong_in_the_ledger_is_wrong_in_the_snapshot_and_its_audit_says_so);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
