/**
 * The audit finds each kind of planted violation; and a ledger with any words destroyed is refused or used without a
 * crash or hang.
 *
 * A violation is planted through the writable mapping, seen by the text that names it, and taken back.
 */
#include "internal.h"
#include "ledger_block.h"

#include <stdio.h>
#include <string.h>

static const struct kvp_pool_geometry small = {
    .pages = 32, .page_tokens = 4, .reserved_pages = 2, .max_sequences = 8, .row_pages = 8};

/*
 * Slots: 0 parent (written 10 of 12), 1 its child (owes a copy), 2 of another session, 3 with a job, 4 RETIRING, 5
 * RECLAIM, 6 FREE, 7 never used. Pages: 0 and 1 reserved; some free ones are on the list. Regions: 0 and 1 of rank 0, at
 * 0 and 112, mapped by both sessions and by the second; 2 of rank 1.
 */
struct rich {
    struct ledger_bed bed;
    uint32_t second;
    struct block_pool *pool;
    struct block_seq *seqs;
    uint32_t *rows, *buckets;
    uint64_t *pages;
    struct block_attachment *attachments;
    struct block_session *sessions;
    struct block_job *jobs;
    struct block_region *regions;
};

static void *writable(struct rich *rich, const void *in_view)
{
    return rich->bed.block.store + ((const unsigned char *)in_view - rich->bed.block.view);
}

static void find_words(struct rich *rich)
{
    const struct pool_map *m = pool_at(rich->bed.ledger, rich->bed.pool.slot);
    rich->pool = writable(rich, m->pool);
    rich->pages = writable(rich, m->pages);
    rich->attachments = writable(rich, m->attachments);
    rich->seqs = writable(rich, m->seqs);
    rich->buckets = writable(rich, m->buckets);
    rich->rows = writable(rich, m->rows);
    rich->sessions = writable(rich, sessions_of(rich->bed.ledger));
    rich->jobs = writable(rich, jobs_of(rich->bed.ledger));
    rich->regions = writable(rich, regions_of(rich->bed.ledger));
}

static void make_regions(const struct rich *rich)
{
    const struct kvp_region_spec specs[] = {{"a", 0, 1, 100, 16}, {"b", 0, 1, 100, 16}, {"a", 1, 1, 100, 16}};
    uint64_t missing;
    uint32_t region;
    for (uint32_t i = 0; i < 3; i++) {
        ck_assert_int_eq(kvp_region_make(rich->bed.ledger, rich->bed.pool, &specs[i], &region, &missing), KVP_OK);
        ck_assert_uint_eq(region, i);
        ck_assert_int_eq(kvp_region_map(rich->bed.ledger, region, rich->second), KVP_OK);
    }
    ck_assert_int_eq(kvp_region_map(rich->bed.ledger, 0, rich->bed.attachment), KVP_OK);
}

static void make_rich(struct rich *rich)
{
    struct ledger_bed *bed = &rich->bed;
    struct kvp_session_id other;
    struct kvp_seq_id child;
    struct kvp_job_id job;
    uint32_t short_pages;
    bool more;
    ledger_bed_make(bed, small, false);
    rich->second = ledger_bed_attach(bed, &other);
    struct kvp_job_spec spec = {.kind = 1, .pool = bed->pool};
    kvp_txn_begin(bed->ledger);
    struct kvp_seq_id parent = ledger_bed_seq(bed, bed->attachment, 1, 12, 10);
    ck_assert_int_eq(kvp_seq_fork(bed->ledger, bed->pool, parent, bed->attachment, 2, 9, &child, &short_pages), KVP_OK);
    ledger_bed_seq(bed, rich->second, 3, 8, 8);
    struct kvp_seq_id working = ledger_bed_seq(bed, bed->attachment, 4, 8, 0);
    ck_assert_int_eq(kvp_job_open(bed->ledger, &spec, &job), KVP_OK);
    ck_assert_int_eq(kvp_job_add(bed->ledger, job, working, 8), KVP_OK);
    struct kvp_seq_id retiring = ledger_bed_seq(bed, bed->attachment, 5, 8, 8);
    ck_assert_int_eq(kvp_seq_close(bed->ledger, bed->pool, retiring, (struct kvp_after){1, 1}), KVP_OK);
    struct kvp_seq_id reclaimed = ledger_bed_seq(bed, bed->attachment, 6, 8, 8);
    struct kvp_seq_id gone = ledger_bed_seq(bed, bed->attachment, 7, 16, 8);
    ck_assert_int_eq(kvp_seq_close(bed->ledger, bed->pool, gone, (struct kvp_after){0}), KVP_OK);
    ck_assert_int_eq(kvp_pool_reclaim(bed->ledger, bed->pool, 99, &more), KVP_OK);
    ck_assert_int_eq(kvp_seq_close(bed->ledger, bed->pool, reclaimed, (struct kvp_after){0}), KVP_OK);
    make_regions(rich);
    kvp_txn_commit(bed->ledger);
    ledger_block_assert_clean(bed->ledger);
    find_words(rich);
    ck_assert_uint_eq(rich->seqs[0].key, 1);
    ck_assert_uint_eq(rich->attachments[0].state, KVP_ATTACHMENT_LIVE);
}

struct wanted {
    const char *text;
    bool seen;
};

static void look_for(void *arg, const char *violation)
{
    struct wanted *wanted = arg;
    wanted->seen |= strstr(violation, wanted->text) != NULL;
}

static void assert_found(struct rich *rich, const char *text)
{
    struct wanted wanted = {text, false};
    uint64_t scratch[8192];
    ck_assert_uint_le(kvp_audit_scratch_bytes(rich->bed.ledger), sizeof(scratch));
    uint64_t violations = kvp_audit(rich->bed.ledger, scratch, look_for, &wanted);
    if (!wanted.seen) {
        ledger_block_audit(rich->bed.ledger, true);
        ck_abort_msg("no violation says: %s", text);
    }
    ck_assert_uint_gt(violations, 0);
    ck_assert_uint_eq(kvp_audit(rich->bed.ledger, scratch, NULL, NULL), violations);
}

#define PLANT(word, value, text)                                                                                       \
    do {                                                                                                               \
        __typeof__(word) good = (word);                                                                                \
        (word) = (__typeof__(word))(value);                                                                            \
        assert_found(&rich, text);                                                                                     \
        (word) = good;                                                                                                 \
        ledger_block_assert_clean(rich.bed.ledger);                                                                    \
    } while (0)

START_TEST(the_audit_finds_what_is_wrong_with_the_header_the_log_and_sessions)
{
    struct rich rich;
    make_rich(&rich);
    struct block_header *header = (struct block_header *)rich.bed.block.store;
    PLANT(header->epoch, 0, "header: a constant");
    PLANT(header->log_count, 3, "log: 3 entries outside a transaction");
    kvp_txn_begin(rich.bed.ledger);
    assert_found(&rich, "log: a transaction is open");
    kvp_txn_commit(rich.bed.ledger);
    PLANT(rich.sessions[0].state, 7, "session 0: state 7");
    PLANT(rich.sessions[0].generation, 0, "session 0: state 1 generation 0");
    PLANT(rich.sessions[0].kind, 0, "session 0: kind 0 can not be");
    PLANT(rich.sessions[0].attachments, 2, "session 0: counts 2 attachments, has 1");
    PLANT(rich.sessions[0].attached[0], 2, "session 0: its attachment in pool 0 is not its own");
    PLANT(rich.sessions[0].attached[0], 1000, "session 0: its attachment in pool 0 is not its own");
    PLANT(rich.sessions[0].attached[9], 1, "session 0: its attachment in pool 9 is not its own");
    PLANT(rich.sessions[0].state, KVP_SESSION_FREE, "session 0: its attachment in pool 0 is not its own");
    PLANT(rich.sessions[0].state, KVP_SESSION_ENDING, "attachment 0: state 1 of a session in state 2");
    struct block_session ending = {.state = KVP_SESSION_ENDING, .generation = 1, .kind = KVP_SESSION_SOCKET};
    rich.sessions[9] = ending;
    assert_found(&rich, "session 9: ending, with nothing left to release");
    memset(&rich.sessions[9], 0, sizeof(ending));
    ledger_bed_end(&rich.bed);
}
END_TEST

START_TEST(the_audit_finds_what_is_wrong_with_sequences_and_rows)
{
    struct rich rich;
    make_rich(&rich);
    uint32_t *row = rich.rows;
    PLANT(rich.seqs[0].state, 9, "sequence 0: state 9");
    PLANT(rich.seqs[0].row_pages, 9, "sequence 0: state 1 with 9 pages can not be");
    PLANT(rich.seqs[0].row_pages, 2, "sequence 0: written 10, reserved 12, 2 pages");
    PLANT(rich.seqs[0].written, 13, "sequence 0: written 13");
    PLANT(rich.seqs[0].generation, 0, "sequence 0: generation 0");
    PLANT(rich.seqs[0].version, 3, "version 3 can not be");
    PLANT(rich.seqs[0].pending_tokens, 12, "sequence 0: pending tokens 12 can not be");
    PLANT(rich.seqs[0].after_value, 5, "sequence 0: pending tokens 0 can not be");
    PLANT(rich.seqs[0].attachment, 99, "sequence 0: its owner 99 is not attached");
    PLANT(rich.seqs[0].attachment, rich.second, "sequence 0: is not the one found by its key");
    PLANT(rich.seqs[0].key, 2, "sequence 0: is not the one found by its key");
    PLANT(rich.seqs[0].written, 12, "is full and not sealed");
    PLANT(rich.seqs[0].written, 7, "is sealed too early");
    PLANT(row[0], 0, "sequence 0: holds page 0, which was never handed out");
    PLANT(row[0], 31, "sequence 0: holds page 31, which was never handed out");
    PLANT(row[8 + 2], row[2], "is another row's to write");
    PLANT(rich.seqs[1].copy_source, row[8 + 2] + 1, "sequence 1: owes a copy from page");
    PLANT(rich.seqs[2].copy_source, row[0] + 1, "sequence 2: owes a copy from page");
    PLANT(rich.seqs[1].copy_source, 0, "references, has");
    PLANT(rich.seqs[4].after_value, 0, "sequence 4: retires, and waits for nothing");
    PLANT(rich.seqs[5].attachment, 0, "sequence 5: to be reclaimed or a pin, and has an owner");
    PLANT(rich.seqs[6].row_pages, 1, "sequence 6: free, and holds pages");
    PLANT(rich.seqs[7].state, 1, "sequence 7: is beyond the watermark, and was used");
    ledger_bed_end(&rich.bed);
}
END_TEST

START_TEST(the_audit_finds_what_is_wrong_with_lists_keys_and_counts)
{
    struct rich rich;
    make_rich(&rich);
    PLANT(rich.pool->sequences_free, 0, "sequence 6: is in no list");
    PLANT(rich.pool->sequences_free, 1, "sequence 0: does not belong in the free list");
    PLANT(rich.pool->sequences_free, 99, "free list: link 99 leads nowhere");
    PLANT(rich.pool->retiring, 0, "sequence 4: is in no list");
    PLANT(rich.pool->reclaim, 5, "sequence 4: is in the reclaim list and in another, or twice");
    PLANT(rich.seqs[5].next, 6, "sequence 5: is in the reclaim list and in another, or twice");
    PLANT(rich.seqs[4].prev, 3, "sequence 4: its back link in the retiring list is wrong");
    PLANT(rich.attachments[0].first, 0, "attachment 0: counts 3 sequences, has 0");
    PLANT(rich.attachments[0].sequences, 4, "attachment 0: counts 4 sequences, has 3");
    PLANT(rich.attachments[0].retiring, 0, "attachment 0: counts 0 retiring rows, has 1");
    PLANT(rich.attachments[0].leader, 44, "attachment 0: its leader 44 leads no group");
    rich.attachments[1].leader = 0;
    PLANT(rich.attachments[1].lacking, 1, "attachment 1: leads no group, and lacks 1 ranks");
    rich.attachments[1].leader = 1;
    PLANT(rich.attachments[0].session_slot, 1, "attachment 0: its session 1 does not know it");
    PLANT(rich.attachments[0].state, KVP_ATTACHMENT_FREE, "attachment 0: free, and 1 rows wait for its timelines");
    PLANT(rich.pool->open_count, 9, "counts 9 open sequences, has 4");
    PLANT(rich.pool->retiring_count, 9, "counts 9 retiring sequences, has 2");
    PLANT(rich.pool->attachments, 9, "counts 9 attachments, has 2");
    for (uint32_t i = 0; i < 8; i++) {
        if (rich.buckets[i] == 0) {
            PLANT(rich.buckets[i], 5, "leads to no open sequence");
            PLANT(rich.buckets[i], 1, "entries, 4 open sequences");
            break;
        }
    }
    ledger_bed_end(&rich.bed);
}
END_TEST

START_TEST(the_audit_finds_what_is_wrong_with_pages)
{
    struct rich rich;
    make_rich(&rich);
    uint32_t first = (uint32_t)rich.pool->free_list;
    uint32_t held = rich.rows[2];
    PLANT(rich.pages[held], rich.pages[held] + (1ull << 32), "references, has");
    PLANT(rich.pages[held], 0, "page");
    PLANT(rich.pages[first], rich.pages[first] | 1ull << 63, "free and sealed");
    PLANT(rich.pages[first], first, "is on the free list twice");
    PLANT(rich.pages[first], held, "in use and on the free list");
    PLANT(rich.pages[1], 1ull << 32, "page 1: reserved or never handed out, and its record is not empty");
    PLANT(rich.pages[31], 5, "page 31: reserved or never handed out, and its record is not empty");
    PLANT(rich.pool->free_list, rich.pool->free_list + (1ull << 32), "free list: ends after");
    PLANT(rich.pool->free_list, rich.pool->free_list - (1ull << 32), "free list: goes on after");
    PLANT(rich.pool->free_list, KVP_NONE, "free and not on the free list");
    PLANT(rich.pool->pages_used, 3, "which was never handed out");
    PLANT(rich.pool->pages_used, 99, "pool 0: a pool's watermark is out of range");
    ledger_bed_end(&rich.bed);
}
END_TEST

START_TEST(the_audit_finds_what_is_wrong_with_jobs)
{
    struct rich rich;
    make_rich(&rich);
    PLANT(rich.jobs[0].open, 0, "waits for job 0, which is not its pool's");
    PLANT(rich.jobs[0].pool_generation, 9, "job 0: its pool is not there");
    PLANT(rich.jobs[0].generation, 0, "job 0: a count can not be");
    PLANT(rich.jobs[0].sequences, 2, "job 0: counts 2 sequences, 1 wait for it");
    PLANT(rich.jobs[0].first, 0, "job 0: its list is not closed after 1 sequences");
    PLANT(rich.jobs[0].last, 1, "job 0: its list is not closed after 1 sequences");
    PLANT(rich.jobs[0].first, 1, "job 0: sequence 0 of its list does not wait for it");
    PLANT(rich.seqs[3].job, 7, "sequence 3: waits for job 6, which is not its pool's");
    PLANT(rich.seqs[3].job, 0, "job 0: counts 1 sequences, 0 wait for it");
    PLANT(rich.seqs[3].job_tokens, 9, "sequence 3: its job writes 9 tokens, over reserved");
    ledger_bed_end(&rich.bed);
}
END_TEST

START_TEST(the_audit_finds_what_is_wrong_with_regions)
{
    struct rich rich;
    make_rich(&rich);
    PLANT(rich.regions[0].rank, KVP_GPUS_MAX, "region 0: its rank 16 or its name can not be");
    PLANT(rich.regions[0].name[0], 0, "region 0: its rank 0 or its name can not be");
    PLANT(rich.regions[0].name[7], UINT64_MAX, "region 0: its rank 0 or its name can not be");
    PLANT(rich.regions[1].bytes, 0, "region 1: 0 bytes at 112 are not in the 1024");
    PLANT(rich.regions[1].bytes, 913, "region 1: 913 bytes at 112 are not in the 1024");
    PLANT(rich.regions[1].offset, UINT64_MAX - 5, "are not in the 1024");
    PLANT(rich.pool->region_bytes, 200, "region 1: 100 bytes at 112 are not in the 200 that pool 0 has for regions");
    PLANT(rich.regions[0].bytes, 113, "region 1: overlaps region 0");
    PLANT(rich.regions[1].offset, 0, "region 1: overlaps region 0");
    PLANT(rich.regions[0].rank, 1, "region 1: overlaps region 0, or stands behind it by mistake");
    PLANT(rich.regions[1].name[0], 'a', "region 1: another of pool 0 has its name");
    PLANT(rich.regions[2].mapped[3], 1ull << 63, "region 2: mapped by attachment 255, which is free");
    PLANT(rich.regions[2].next, 1, "region 0: is in the list of pool 0 twice");
    PLANT(rich.regions[2].next, 9, "pool 0: its list of regions leads nowhere after 4");
    PLANT(rich.regions[1].pool_generation, 0, "pool 0: its list of regions leads nowhere after 2");
    PLANT(rich.pool->regions, UINT32_MAX, "pool 0: its list of regions leads nowhere after 0");
    PLANT(rich.pool->regions, 2, "region 0: is in no pool's list");
    PLANT(rich.pool->region_count, 9, "pool 0: counts 9 regions, has 3");
    PLANT(rich.pool->region_count, KVP_REGIONS_MAX + 1, "pool 0: a pool's regions can not be");
    ledger_bed_end(&rich.bed);
}
END_TEST

/* ---- destruction ---------------------------------------------------------------------------------------------------
 */

static uint32_t random_of(uint64_t *rng, uint32_t below)
{
    *rng = *rng * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(*rng >> 33) % below;
}

static void use_regions(const struct ledger_bed *bed, uint64_t *rng)
{
    struct kvp_region_spec spec = {"c", random_of(rng, 2), 1, 1 + random_of(rng, 900), 1};
    struct kvp_region_view view;
    uint64_t missing;
    uint32_t region, listed = 0;
    for (region = kvp_region_first(bed->ledger, bed->pool); region != KVP_NONE && listed < 9; listed++)
        region = kvp_region_next(bed->ledger, region);
    enum kvp_status statuses[] = {
        kvp_region_make(bed->ledger, bed->pool, &spec, &region, &missing),
        kvp_region_find(bed->ledger, bed->pool, 0, "b", &region),
        kvp_region_get(bed->ledger, 1, &view),
        kvp_region_map(bed->ledger, 1, 0),
        kvp_region_unmap(bed->ledger, 1, 0),
        kvp_region_unmap(bed->ledger, 1, 1),
        kvp_region_drop(bed->ledger, 1),
        kvp_pool_delete(bed->ledger, bed->pool),
    };
    for (size_t i = 0; i < sizeof(statuses) / sizeof(statuses[0]); i++)
        ck_assert_str_ne(kvp_status_name(statuses[i]), "KVP_?");
}

/* Every call on every slot; what they answer does not matter. */
static void use_all(struct ledger_bed *bed, uint64_t *rng)
{
    struct kvp_seq_view view;
    struct kvp_seq_id made;
    uint32_t short_pages, left;
    bool flag;
    for (uint32_t slot = 0; slot < 8; slot++) {
        if (kvp_seq_at(bed->ledger, bed->pool, slot, &view) != KVP_OK)
            continue;
        struct kvp_after after = {0, random_of(rng, 2)};
        uint32_t tokens = random_of(rng, 34);
        kvp_txn_begin(bed->ledger);
        enum kvp_status statuses[] = {
            kvp_seq_observe(bed->ledger, bed->pool, view.id, tokens, &flag),
            kvp_seq_fork(bed->ledger, bed->pool, view.id, 0, 70 + slot, tokens, &made, &short_pages),
            kvp_seq_reserve(bed->ledger, bed->pool, view.id, tokens, true, after, &short_pages),
            kvp_seq_transfer(bed->ledger, bed->pool, view.id, 1),
            kvp_seq_close(bed->ledger, bed->pool, view.id, after),
            kvp_seq_retired(bed->ledger, bed->pool, slot),
            kvp_pool_reclaim(bed->ledger, bed->pool, 5, &flag),
            kvp_job_close(bed->ledger, (struct kvp_job_id){0, 1}, true),
            kvp_session_end(bed->ledger, bed->session),
            kvp_attachment_release(bed->ledger, bed->pool, 0, true, 9, &left),
        };
        for (size_t i = 0; i < sizeof(statuses) / sizeof(statuses[0]); i++)
            ck_assert_str_ne(kvp_status_name(statuses[i]), "KVP_?");
        use_regions(bed, rng);
        if (random_of(rng, 2))
            kvp_txn_abort(bed->ledger);
        else
            kvp_txn_commit(bed->ledger);
    }
}

START_TEST(a_ledger_with_words_destroyed_is_refused_or_used_without_a_crash_or_hang)
{
    struct rich rich;
    const char *why;
    uint64_t rng = (uint64_t)_i + 1;
    make_rich(&rich);
    struct ledger_block *block = &rich.bed.block;
    struct range {
        uint64_t offset, bytes;
    } ranges[] = {
        {0, 200},
        {SESSIONS_OFFSET, 2 * sizeof(struct block_session)},
        {POOLS_OFFSET, offsetof(struct block_pool, blob)},
        {JOBS_OFFSET, 128},
        {BUFFERS_OFFSET, 4 * sizeof(struct block_buffer)},
        {REGIONS_OFFSET, 3 * sizeof(struct block_region)},
        {rich.pool->extent_offset, rich.pool->extent_bytes},
        {rich.pool->extent_offset, 256 + 4 * sizeof(struct block_attachment)},
        {(uint64_t)((unsigned char *)rich.seqs - block->store), rich.pool->extent_bytes - 256 - 16384},
    };
    uint32_t words = 1 + random_of(&rng, 6);
    for (uint32_t i = 0; i < words; i++) {
        struct range range = ranges[random_of(&rng, sizeof(ranges) / sizeof(ranges[0]))];
        uint32_t *word = (uint32_t *)(block->store + range.offset + 4 * random_of(&rng, (uint32_t)(range.bytes / 4)));
        const uint32_t values[] = {0, 1, 2, 7, 33, 0x7fffffff, UINT32_MAX, random_of(&rng, 1u << 31), *word ^ 1};
        *word = values[random_of(&rng, sizeof(values) / sizeof(values[0]))];
    }
    if (kvp_ledger_open(&block->ledger, block->view, block->store, block->bytes, &why) == KVP_OK) {
        ledger_block_audit(&block->ledger, false);
        use_all(&rich.bed, &rng);
        ledger_block_audit(&block->ledger, false);
    }
    ledger_block_close(block);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ledger_audit");
    TCase *tcase = tcase_create("planted");
    tcase_add_test(tcase, the_audit_finds_what_is_wrong_with_the_header_the_log_and_sessions);
    tcase_add_test(tcase, the_audit_finds_what_is_wrong_with_sequences_and_rows);
    tcase_add_test(tcase, the_audit_finds_what_is_wrong_with_lists_keys_and_counts);
    tcase_add_test(tcase, the_audit_finds_what_is_wrong_with_pages);
    tcase_add_test(tcase, the_audit_finds_what_is_wrong_with_jobs);
    tcase_add_test(tcase, the_audit_finds_what_is_wrong_with_regions);
    suite_add_tcase(suite, tcase);
    TCase *destroyed = tcase_create("destroyed");
    tcase_add_loop_test(destroyed, a_ledger_with_words_destroyed_is_refused_or_used_without_a_crash_or_hang, 0, 400);
    suite_add_tcase(suite, destroyed);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
