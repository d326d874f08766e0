/**
 * Sequences: opening, keys, transfer, closing, retiring.
 */
#include "ledger_block.h"

static const struct kvp_pool_geometry small = {
    .pages = 32, .page_tokens = 4, .reserved_pages = 0, .max_sequences = 6, .row_pages = 8};
static const struct kvp_after none = {0};

static enum kvp_status open_key(struct ledger_bed *bed, uint32_t attachment, uint64_t key, struct kvp_seq_id *ret_seq)
{
    return kvp_seq_open(bed->ledger, bed->pool, attachment, key, false, ret_seq);
}

START_TEST(a_sequence_opens_empty_and_is_found_by_its_key)
{
    struct ledger_bed bed;
    struct kvp_seq_id seq = {0}, found = {0};
    struct kvp_seq_view at;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, UINT64_MAX, true, &seq), KVP_OK);
    kvp_txn_commit(bed.ledger);
    struct kvp_seq_view view = ledger_bed_view(&bed, seq);
    ck_assert_int_eq(view.state, KVP_SEQ_OPEN);
    ck_assert(view.key == UINT64_MAX && view.durable && view.attachment == bed.attachment);
    ck_assert(view.reserved == 0 && view.written == 0 && view.row_pages == 0 && view.pending_tokens == 0);
    ck_assert(view.version == 2 && view.job == KVP_NONE && view.copy.tokens == 0);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, bed.attachment, UINT64_MAX, &found), KVP_OK);
    ck_assert(found.slot == seq.slot && found.generation == seq.generation);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, bed.attachment, 0, &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, 7, UINT64_MAX, &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, seq.slot, &at), KVP_OK);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, seq.slot + 1, &at), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, small.max_sequences, &at), KVP_ENOENT);
    ck_assert_ptr_null(kvp_seq_row(bed.ledger, bed.pool, small.max_sequences));
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_key_is_open_once_in_an_attachment_and_again_in_another)
{
    struct ledger_bed bed;
    struct kvp_session_id other;
    struct kvp_seq_id first = {0}, again, elsewhere = {0}, found = {0};
    ledger_bed_make(&bed, small, false);
    uint32_t second = ledger_bed_attach(&bed, &other);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 5, &first), KVP_OK);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 5, &again), KVP_EEXIST);
    ck_assert_int_eq(open_key(&bed, second, 5, &elsewhere), KVP_OK);
    ck_assert_int_eq(open_key(&bed, 99, 5, &again), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, second, 5, &found), KVP_OK);
    ck_assert_uint_eq(found.slot, elsewhere.slot);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, first, none), KVP_OK);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 5, &again), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(sequences_are_refused_beyond_the_pools_rows_those_that_retire_included)
{
    struct ledger_bed bed;
    struct kvp_seq_id seqs[7] = {{0}};
    bool more;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    for (uint32_t i = 0; i < 6; i++)
        ck_assert_int_eq(open_key(&bed, bed.attachment, i, &seqs[i]), KVP_OK);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 6, &seqs[6]), KVP_ELIMIT);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seqs[2], none), KVP_OK);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 6, &seqs[6]), KVP_ELIMIT);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 0, &more), KVP_OK);
    ck_assert(more);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 1, &more), KVP_OK);
    ck_assert(!more);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 6, &seqs[6]), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(seqs[6].slot, seqs[2].slot);
    ck_assert_uint_ne(seqs[6].generation, seqs[2].generation);
    ck_assert_uint_gt(ledger_bed_view(&bed, seqs[6]).version, 2);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_handle_that_is_not_current_is_refused_by_every_call)
{
    struct ledger_bed bed;
    uint32_t short_pages;
    bool changed;
    struct kvp_seq_view view;
    struct kvp_job_id job = {0};
    ledger_bed_make(&bed, small, false);
    struct kvp_job_spec spec = {.pool = bed.pool};
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 8);
    ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &job), KVP_OK);
    struct kvp_seq_id closed = ledger_bed_seq(&bed, bed.attachment, 2, 8, 8);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, closed, none), KVP_OK);
    const struct kvp_seq_id bad[] = {closed, {seq.slot, seq.generation + 1}, {seq.slot, 0}, {5, 1},
                                     {6, 1}, {UINT32_MAX, UINT32_MAX}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct kvp_seq_id child;
        ck_assert_int_eq(kvp_seq_get(bed.ledger, bed.pool, bad[i], &view), KVP_ESTALE);
        ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, bad[i], 4, true, none, &short_pages), KVP_ESTALE);
        ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, bad[i], 4, &changed), KVP_ESTALE);
        ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, bad[i], 4, (struct kvp_after){1, 1}), KVP_ESTALE);
        ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, bad[i], bed.attachment, 9, 4, &child, &short_pages),
                         KVP_ESTALE);
        ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, bad[i], bed.attachment), KVP_ESTALE);
        ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, bad[i], none), KVP_ESTALE);
        ck_assert_int_eq(kvp_job_add(bed.ledger, job, bad[i], 4), KVP_ESTALE);
    }
    struct kvp_pool_id no_pool = {bed.pool.slot, bed.pool.generation + 1};
    ck_assert_int_eq(kvp_seq_get(bed.ledger, no_pool, seq, &view), KVP_ENOENT);
    ck_assert_uint_eq(kvp_attachment_first(bed.ledger, no_pool, bed.attachment), KVP_NONE);
    ck_assert_uint_eq(kvp_retiring_first(bed.ledger, no_pool), KVP_NONE);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(the_walk_of_an_attachment_meets_each_of_its_sequences_once)
{
    struct ledger_bed bed;
    struct kvp_session_id other;
    struct kvp_seq_id seq;
    uint32_t met = 0;
    ledger_bed_make(&bed, small, false);
    uint32_t second = ledger_bed_attach(&bed, &other);
    kvp_txn_begin(bed.ledger);
    for (uint32_t i = 0; i < 5; i++)
        ck_assert_int_eq(open_key(&bed, i == 2 ? second : bed.attachment, i, &seq), KVP_OK);
    kvp_txn_commit(bed.ledger);
    for (uint32_t slot = kvp_attachment_first(bed.ledger, bed.pool, bed.attachment); slot != KVP_NONE;
         slot = kvp_attachment_next(bed.ledger, bed.pool, slot))
        met |= 1u << slot;
    ck_assert_uint_eq(met, 0x1b);
    ck_assert_uint_eq(kvp_attachment_first(bed.ledger, bed.pool, 9), KVP_NONE);
    ck_assert_uint_eq(kvp_attachment_next(bed.ledger, bed.pool, 5), KVP_NONE);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_transfer_moves_the_key_the_pages_and_the_version)
{
    struct ledger_bed bed;
    struct kvp_session_id other;
    struct kvp_seq_id found, taken;
    ledger_bed_make(&bed, small, false);
    uint32_t second = ledger_bed_attach(&bed, &other);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 5, 10, 9);
    uint32_t page = kvp_seq_row(bed.ledger, bed.pool, seq.slot)[2];
    ck_assert_int_eq(open_key(&bed, second, 6, &taken), KVP_OK);
    uint32_t version = ledger_bed_view(&bed, seq).version;
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, second), KVP_OK);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, second), KVP_OK);
    kvp_txn_commit(bed.ledger);
    struct kvp_seq_view view = ledger_bed_view(&bed, seq);
    ck_assert_uint_eq(view.version, version + 2);
    ck_assert(view.attachment == second && view.reserved == 10 && view.written == 9);
    ck_assert_uint_eq(kvp_seq_row(bed.ledger, bed.pool, seq.slot)[2], page);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, bed.attachment, 5, &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, second, 5, &found), KVP_OK);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_transfer_is_refused_to_nobody_to_the_dead_and_where_its_key_is_open)
{
    struct ledger_bed bed;
    struct kvp_session_id other, dying;
    struct kvp_seq_id taken;
    ledger_bed_make(&bed, small, false);
    uint32_t second = ledger_bed_attach(&bed, &other);
    uint32_t third = ledger_bed_attach(&bed, &dying);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 5, 10, 9);
    ck_assert_int_eq(open_key(&bed, second, 5, &taken), KVP_OK);
    ck_assert_int_eq(kvp_session_end(bed.ledger, dying), KVP_OK);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, second), KVP_EEXIST);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, third), KVP_ESESSION);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, 100), KVP_ENOENT);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_close_without_value_reclaims_and_one_with_a_value_retires_until_it_is_reached)
{
    struct ledger_bed bed;
    struct kvp_seq_view view;
    bool more;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id now = ledger_bed_seq(&bed, bed.attachment, 1, 8, 8);
    struct kvp_seq_id later = ledger_bed_seq(&bed, bed.attachment, 2, 8, 8);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, now, none), KVP_OK);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, later, (struct kvp_after){3, 7}), KVP_OK);
    ck_assert_int_eq(kvp_seq_retired(bed.ledger, bed.pool, now.slot), KVP_ENOENT);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 100, &more), KVP_OK);
    ck_assert(!more);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 30);
    ck_assert_uint_eq(kvp_retiring_first(bed.ledger, bed.pool), later.slot);
    ck_assert_uint_eq(kvp_retiring_next(bed.ledger, bed.pool, later.slot), KVP_NONE);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, later.slot, &view), KVP_OK);
    ck_assert_int_eq(view.state, KVP_SEQ_RETIRING);
    ck_assert(view.after.timeline == 3 && view.after.value == 7 && view.attachment == bed.attachment);
    ck_assert_int_eq(kvp_seq_retired(bed.ledger, bed.pool, later.slot), KVP_OK);
    ck_assert_int_eq(kvp_seq_retired(bed.ledger, bed.pool, later.slot), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, later.slot, &view), KVP_OK);
    ck_assert_int_eq(view.state, KVP_SEQ_RECLAIM);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 1, &more), KVP_OK);
    ck_assert(more);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 1, &more), KVP_OK);
    ck_assert(!more);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 32);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, later.slot, &view), KVP_ENOENT);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_pool_that_needs_after_refuses_a_close_of_pages_without_a_value)
{
    struct ledger_bed bed;
    struct kvp_seq_id empty;
    ledger_bed_make(&bed, small, true);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 8);
    ck_assert_int_eq(open_key(&bed, bed.attachment, 2, &empty), KVP_OK);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, none), KVP_EINVAL);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, (struct kvp_after){0, 1}), KVP_OK);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, empty, none), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(pending_tokens_wait_for_their_value_and_are_forgotten_when_they_are_there_or_cut_off)
{
    struct ledger_bed bed;
    struct kvp_after after = {2, 30};
    uint32_t short_pages;
    bool changed;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 20, 3);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 21, after), KVP_EINVAL);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 12, none), KVP_EINVAL);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 3, after), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).pending_tokens, 0);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 12, after), KVP_OK);
    struct kvp_seq_view view = ledger_bed_view(&bed, seq);
    ck_assert(view.pending_tokens == 12 && view.written == 3 && view.after.value == 30 && view.after.timeline == 2);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, 11, &changed), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).pending_tokens, 12);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, 12, &changed), KVP_OK);
    view = ledger_bed_view(&bed, seq);
    ck_assert(view.pending_tokens == 0 && view.after.value == 0);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 20, after), KVP_OK);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 19, true, none, &short_pages), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).pending_tokens, 0);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 18, after), KVP_OK);
    ck_assert_int_eq(kvp_session_end(bed.ledger, bed.session), KVP_OK);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 12, after), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_end_pending(bed.ledger, bed.pool, seq), KVP_OK);
    view = ledger_bed_view(&bed, seq);
    ck_assert(view.pending_tokens == 0 && view.after.value == 0 && view.written == 12);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

LEDGER_SUITE("ledger_sequences", a_sequence_opens_empty_and_is_found_by_its_key,
             a_key_is_open_once_in_an_attachment_and_again_in_another,
             sequences_are_refused_beyond_the_pools_rows_those_that_retire_included,
             a_handle_that_is_not_current_is_refused_by_every_call,
             the_walk_of_an_attachment_meets_each_of_its_sequences_once,
             a_transfer_moves_the_key_the_pages_and_the_version,
             a_transfer_is_refused_to_nobody_to_the_dead_and_where_its_key_is_open,
             a_close_without_value_reclaims_and_one_with_a_value_retires_until_it_is_reached,
             a_pool_that_needs_after_refuses_a_close_of_pages_without_a_value,
             pending_tokens_wait_for_their_value_and_are_forgotten_when_they_are_there_or_cut_off)
