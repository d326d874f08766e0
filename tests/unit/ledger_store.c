/**
 * The block, its stores and transactions: format, open, abort, recovery, the log's end, and that nothing else stores.
 */
#include "layout.h"
#include "ledger_block.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct kvp_pool_geometry small = {
    .pages = 16, .page_tokens = 4, .reserved_pages = 1, .max_sequences = 4, .row_pages = 8};

static struct kvp_session_id open_session(struct kvp_ledger *ledger)
{
    struct kvp_session_id session = {0};
    struct kvp_session_spec spec = {.kind = KVP_SESSION_SOCKET};
    ck_assert_int_eq(kvp_session_open(ledger, &spec, &session), KVP_OK);
    return session;
}

static enum kvp_status reopen(struct ledger_block *block, const char **reterr_why)
{
    return kvp_ledger_open(&block->ledger, block->view, block->store, block->bytes, reterr_why);
}

START_TEST(format_makes_an_empty_ledger_of_epoch_1_and_open_counts_the_epoch_up)
{
    struct ledger_block block;
    const char *why = NULL;
    ledger_block_open(&block, kvp_ledger_root_bytes());
    ck_assert_uint_eq(kvp_ledger_epoch(&block.ledger), 1);
    ck_assert_uint_eq(kvp_ledger_instance(&block.ledger).bytes[2], 0x70);
    ledger_block_assert_clean(&block.ledger);
    ck_assert_int_eq(reopen(&block, &why), KVP_OK);
    ck_assert_uint_eq(kvp_ledger_epoch(&block.ledger), 2);
    ck_assert_uint_eq(kvp_ledger_instance(&block.ledger).bytes[2], 0x70);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(format_refuses_sizes_and_addresses_that_can_not_be)
{
    struct ledger_block block;
    struct kvp_ledger ledger;
    struct kvp_uuid instance = {{0}};
    size_t root = kvp_ledger_root_bytes();
    ledger_block_map(&block, root + 64);
    ck_assert_int_eq(kvp_ledger_format(&ledger, block.view, block.store, root - 8, instance), KVP_EINVAL);
    ck_assert_int_eq(kvp_ledger_format(&ledger, block.view, block.store, root + 4, instance), KVP_EINVAL);
    ck_assert_int_eq(kvp_ledger_format(&ledger, block.view, block.store, KVP_LEDGER_BYTES_MAX + 8, instance),
                     KVP_EINVAL);
    ck_assert_int_eq(kvp_ledger_format(&ledger, block.view + 8, block.store, root, instance), KVP_EINVAL);
    ck_assert_int_eq(kvp_ledger_format(&ledger, block.view, block.store + 8, root, instance), KVP_EINVAL);
    ck_assert_int_eq(kvp_ledger_format(&ledger, NULL, block.store, root, instance), KVP_EINVAL);
    ledger_block_close(&block);
}
END_TEST

START_TEST(open_refuses_what_is_no_ledger_or_another_version_or_size_and_says_why)
{
    struct ledger_block block;
    const char *why = NULL;
    ledger_block_map(&block, kvp_ledger_root_bytes() + 4096);
    ck_assert_int_eq(reopen(&block, &why), KVP_ECORRUPT);
    ck_assert_str_eq(why, "there is no ledger in it");
    ck_assert_int_eq(kvp_ledger_open(&block.ledger, block.view, block.store, 4096, &why), KVP_EMISMATCH);
    ck_assert_str_eq(why, "its size or address can not be a ledger's");
    struct kvp_uuid instance = {{0}};
    ck_assert_int_eq(kvp_ledger_format(&block.ledger, block.view, block.store, block.bytes, instance), KVP_OK);
    ck_assert_int_eq(kvp_ledger_open(&block.ledger, block.view, block.store, block.bytes - 4096, &why), KVP_EMISMATCH);
    ck_assert_str_eq(why, "its size is not the one that it was made with");
    struct block_header *header = (struct block_header *)block.store;
    header->version++;
    ck_assert_int_eq(reopen(&block, &why), KVP_EMISMATCH);
    ck_assert_str_eq(why, "it is of another format version");
    header->version--;
    header->epoch = 0;
    ck_assert_int_eq(reopen(&block, &why), KVP_ECORRUPT);
    ck_assert_str_eq(why, "its epoch is 0");
    ledger_block_close(&block);
}
END_TEST

START_TEST(open_refuses_a_log_that_can_not_be_and_changes_nothing)
{
    struct ledger_block block;
    const char *why = NULL;
    ledger_block_open(&block, kvp_ledger_root_bytes());
    struct block_header *header = (struct block_header *)block.store;
    struct block_log_entry *log = (struct block_log_entry *)(block.store + LOG_OFFSET);
    header->log_count = KVP_TXN_STORES_MAX + 1ull;
    ck_assert_int_eq(reopen(&block, &why), KVP_ECORRUPT);
    ck_assert_str_eq(why, "its undo log counts more entries than it has room for");
    const uint64_t bad[] = {0, LOG_OFFSET, SESSIONS_OFFSET + 2, SESSIONS_OFFSET + 5, block.bytes, UINT64_MAX - 3};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        header->log_count = 2;
        log[1] = (struct block_log_entry){SESSIONS_OFFSET, 77};
        log[0] = (struct block_log_entry){bad[i], 5};
        ck_assert_int_eq(reopen(&block, &why), KVP_ECORRUPT);
        ck_assert_str_eq(why, "its undo log names a word that no transaction changes");
        ck_assert_uint_eq(sessions_of(&block.ledger)[0].state, 0);
    }
    header->log_count = 0;
    ck_assert_int_eq(reopen(&block, &why), KVP_OK);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(open_refuses_a_pool_record_that_can_not_be)
{
    struct ledger_bed bed;
    const char *why = NULL;
    ledger_bed_make(&bed, small, false);
    struct block_pool *pools = (struct block_pool *)(bed.block.store + POOLS_OFFSET);
    const struct {
        uint32_t *word;
        uint32_t value;
    } bad[] = {
        {&pools[0].state, 9},
        {&pools[0].generation, 0},
        {&pools[0].pages, 0},
        {&pools[0].pages, KVP_PAGES_MAX},
        {&pools[0].page_tokens, 0},
        {&pools[0].row_pages, 1u << 30},
        {&pools[0].reserved_pages, 16},
        {(uint32_t *)&pools[0].extent_offset, 0},
        {(uint32_t *)&pools[0].extent_offset + 1, 77},
        {(uint32_t *)&pools[0].extent_bytes, 4096},
        {(uint32_t *)&pools[0].name[7] + 1, 0x41000000},
        {&pools[0].blob_bytes, KVP_POOL_BLOB_BYTES + 1},
        {&pools[0].pages_used, 17},
        {&pools[0].pages_used, 0},
        {&pools[0].sequences_used, 5},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint32_t good = *bad[i].word;
        *bad[i].word = bad[i].value;
        ck_assert_int_eq(reopen(&bed.block, &why), KVP_ECORRUPT);
        ck_assert_uint_gt(ledger_block_audit(bed.ledger, false), 0);
        *bad[i].word = good;
    }
    pools[1] = pools[0];
    ck_assert_int_eq(reopen(&bed.block, &why), KVP_ECORRUPT);
    ck_assert_str_eq(why, "two pools' extents overlap");
    memset(&pools[1], 0, sizeof(pools[1]));
    ck_assert_int_eq(reopen(&bed.block, &why), KVP_OK);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(abort_restores_every_word_of_a_transaction)
{
    struct ledger_bed bed;
    struct kvp_session_view view;
    ledger_bed_make(&bed, small, false);
    unsigned char *before = malloc(bed.block.bytes);
    ck_assert_ptr_nonnull(before);
    memcpy(before, bed.block.view, bed.block.bytes);
    kvp_txn_begin(bed.ledger);
    struct kvp_session_id session = open_session(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 20, 18);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, (struct kvp_after){1, 2}), KVP_OK);
    kvp_txn_abort(bed.ledger);
    ck_assert_int_eq(kvp_session_get(bed.ledger, session, &view), KVP_ESESSION);
    const struct block_pool *pool = &pools_of(bed.ledger)[0];
    ck_assert_int_eq(memcmp(before, bed.block.view, LOG_OFFSET), 0);
    ck_assert_int_eq(memcmp(before + SESSIONS_OFFSET, bed.block.view + SESSIONS_OFFSET, ROOT_BYTES - SESSIONS_OFFSET),
                     0);
    size_t rows = (size_t)((const unsigned char *)kvp_seq_row(bed.ledger, bed.pool, 0) - bed.block.view);
    ck_assert_int_eq(
        memcmp(before + pool->extent_offset, bed.block.view + pool->extent_offset, rows - pool->extent_offset), 0);
    free(before);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(open_rolls_back_a_transaction_that_was_not_committed)
{
    struct ledger_bed bed;
    const char *why = NULL;
    struct kvp_seq_id found;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    ledger_bed_seq(&bed, bed.attachment, 1, 20, 18);
    kvp_txn_commit(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ledger_bed_seq(&bed, bed.attachment, 2, 9, 9);
    ck_assert_int_eq(reopen(&bed.block, &why), KVP_OK);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, bed.attachment, 1, &found), KVP_OK);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, bed.attachment, 2, &found), KVP_ENOENT);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 10);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_transaction_over_the_logs_size_is_refused_and_its_abort_restores_all)
{
    struct ledger_bed bed;
    struct kvp_pool_geometry large = {.pages = 2u << 20, .page_tokens = 1, .max_sequences = 2, .row_pages = 2u << 20};
    ledger_bed_make(&bed, large, false);
    uint32_t short_pages = 0;
    bool changed = false;
    struct kvp_after none = {0};
    struct kvp_seq_id seq = {0}, child;
    kvp_txn_begin(bed.ledger);
    seq = ledger_bed_seq(&bed, bed.attachment, 1, KVP_TXN_STORES_MAX / 2 - 200, 0);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, KVP_TXN_STORES_MAX, false, none, &short_pages),
                     KVP_ELIMIT);
    kvp_txn_commit(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, KVP_TXN_STORES_MAX - 400, false, none, &short_pages),
                     KVP_OK);
    kvp_txn_commit(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, KVP_TXN_STORES_MAX + 1000, false, none, &short_pages),
                     KVP_OK);
    kvp_txn_commit(bed.ledger);
    /* More seals than one transaction holds: it goes as far as it can, the next one goes on. */
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, UINT32_MAX, &changed), KVP_OK);
    ck_assert(changed);
    uint32_t written = ledger_bed_view(&bed, seq).written;
    ck_assert_uint_lt(written, KVP_TXN_STORES_MAX);
    ck_assert_uint_gt(written, KVP_TXN_STORES_MAX - 200);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, UINT32_MAX, &changed), KVP_ELIMIT);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, KVP_TXN_STORES_MAX + 1100, false, none, &short_pages),
                     KVP_ELIMIT);
    kvp_txn_abort(bed.ledger);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, 0);
    ledger_block_assert_clean(bed.ledger);
    for (int i = 0; i < 2; i++) {
        kvp_txn_begin(bed.ledger);
        ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, UINT32_MAX, &changed), KVP_OK);
        kvp_txn_commit(bed.ledger);
    }
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, KVP_TXN_STORES_MAX + 1000);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(
        kvp_seq_fork(bed.ledger, bed.pool, seq, bed.attachment, 2, KVP_TXN_STORES_MAX, &child, &short_pages),
        KVP_ELIMIT);
    kvp_txn_abort(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_store_past_the_one_function_faults)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        *(volatile uint32_t *)&((struct block_pool *)(uintptr_t)pools_of(bed.ledger))->state = KVP_POOL_LOST;
        _exit(0);
    }
    int status = 0;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    ledger_bed_end(&bed);
}
END_TEST

static void end_by_abort(void (*wrong)(struct ledger_bed *bed))
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        wrong(&bed);
        _exit(0);
    }
    int status = 0;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    ledger_bed_end(&bed);
}

static void begin_twice(struct ledger_bed *bed)
{
    kvp_txn_begin(bed->ledger);
    kvp_txn_begin(bed->ledger);
}

static void commit_outside(struct ledger_bed *bed)
{
    kvp_txn_commit(bed->ledger);
}

static void change_outside(struct ledger_bed *bed)
{
    kvp_session_end(bed->ledger, bed->session);
}

START_TEST(a_change_outside_a_transaction_ends_the_program_in_release_builds_too)
{
    end_by_abort(begin_twice);
    end_by_abort(commit_outside);
    end_by_abort(change_outside);
}
END_TEST

LEDGER_SUITE("ledger_store", format_makes_an_empty_ledger_of_epoch_1_and_open_counts_the_epoch_up,
             format_refuses_sizes_and_addresses_that_can_not_be,
             open_refuses_what_is_no_ledger_or_another_version_or_size_and_says_why,
             open_refuses_a_log_that_can_not_be_and_changes_nothing, open_refuses_a_pool_record_that_can_not_be,
             abort_restores_every_word_of_a_transaction, open_rolls_back_a_transaction_that_was_not_committed,
             a_transaction_over_the_logs_size_is_refused_and_its_abort_restores_all,
             a_store_past_the_one_function_faults,
             a_change_outside_a_transaction_ends_the_program_in_release_builds_too)
