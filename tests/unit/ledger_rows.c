/**
 * Rows: growing, cutting, sealing, sharing, owed copies, reclaiming.
 */
#include "ledger_block.h"

static const struct kvp_pool_geometry small = {
    .pages = 32, .page_tokens = 4, .reserved_pages = 0, .max_sequences = 8, .row_pages = 16};
static const struct kvp_after none = {0};

static enum kvp_status grow(struct ledger_bed *bed, struct kvp_seq_id seq, uint32_t reserved, uint32_t *reterr_short)
{
    return kvp_seq_reserve(bed->ledger, bed->pool, seq, reserved, false, none, reterr_short);
}

static enum kvp_status cut(struct ledger_bed *bed, struct kvp_seq_id seq, uint32_t reserved, struct kvp_after after)
{
    uint32_t short_pages;
    return kvp_seq_reserve(bed->ledger, bed->pool, seq, reserved, true, after, &short_pages);
}

static bool observe(struct ledger_bed *bed, struct kvp_seq_id seq, uint32_t tokens)
{
    bool changed = false;
    ck_assert_int_eq(kvp_seq_observe(bed->ledger, bed->pool, seq, tokens, &changed), KVP_OK);
    return changed;
}

static struct kvp_seq_id fork_seq(struct ledger_bed *bed, struct kvp_seq_id parent, uint64_t key, uint32_t tokens)
{
    struct kvp_seq_id child = {0};
    uint32_t short_pages;
    ck_assert_int_eq(kvp_seq_fork(bed->ledger, bed->pool, parent, bed->attachment, key, tokens, &child, &short_pages),
                     KVP_OK);
    return child;
}

static uint32_t page_at(struct ledger_bed *bed, struct kvp_seq_id seq, uint32_t index)
{
    return kvp_seq_row(bed->ledger, bed->pool, seq.slot)[index];
}

static void assert_page(struct ledger_bed *bed, uint32_t page, enum kvp_page_state state, uint32_t references)
{
    struct kvp_page_view view = ledger_bed_page(bed, page);
    ck_assert_int_eq(view.state, state);
    ck_assert_uint_eq(view.references, references);
}

START_TEST(a_row_grows_by_free_pages_as_reserved_needs_them)
{
    struct ledger_bed bed;
    uint32_t short_pages = 0;
    struct kvp_pool_geometry reserving = small;
    reserving.reserved_pages = 3;
    ledger_bed_make(&bed, reserving, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 0, 0);
    uint32_t version = ledger_bed_view(&bed, seq).version;
    for (uint32_t tokens = 1; tokens <= 64; tokens++) {
        ck_assert_int_eq(grow(&bed, seq, tokens, &short_pages), KVP_OK);
        ck_assert_uint_eq(ledger_bed_view(&bed, seq).row_pages, (tokens + 3) / 4);
        ck_assert_uint_ge(page_at(&bed, seq, (tokens - 1) / 4), 3);
        assert_page(&bed, page_at(&bed, seq, (tokens - 1) / 4), KVP_PAGE_HELD, 1);
    }
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).version, version);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 32 - 3 - 16);
    assert_page(&bed, 2, KVP_PAGE_RESERVED, 0);
    ck_assert_int_eq(grow(&bed, seq, 65, &short_pages), KVP_EINVAL);
    ck_assert_int_eq(grow(&bed, seq, 63, &short_pages), KVP_EINVAL);
    ck_assert_int_eq(grow(&bed, seq, 64, &short_pages), KVP_OK);
    struct kvp_page_view view;
    ck_assert_int_eq(kvp_page_get(bed.ledger, bed.pool, 32, &view), KVP_EINVAL);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_pool_without_enough_pages_says_how_many_are_missing_and_changes_nothing)
{
    struct ledger_bed bed;
    uint32_t short_pages = 0;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    ledger_bed_seq(&bed, bed.attachment, 1, 64, 0);
    struct kvp_seq_id second = ledger_bed_seq(&bed, bed.attachment, 2, 44, 43);
    struct kvp_seq_id third = ledger_bed_seq(&bed, bed.attachment, 3, 8, 0);
    kvp_txn_commit(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(grow(&bed, third, 40, &short_pages), KVP_ENOPAGES);
    ck_assert_uint_eq(short_pages, 5);
    kvp_txn_abort(bed.ledger);
    ck_assert_uint_eq(ledger_bed_view(&bed, third).reserved, 8);
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(grow(&bed, third, 20, &short_pages), KVP_OK);
    struct kvp_seq_id child;
    short_pages = 0;
    ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, second, bed.attachment, 4, 43, &child, &short_pages),
                     KVP_ENOPAGES);
    ck_assert_uint_eq(short_pages, 1);
    kvp_txn_abort(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(written_rises_to_reserved_at_most_never_falls_and_seals_full_pages)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 10, 0);
    ck_assert(!observe(&bed, seq, 0));
    ck_assert(observe(&bed, seq, 7));
    ck_assert(!observe(&bed, seq, 7));
    ck_assert(!observe(&bed, seq, 3));
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, 7);
    assert_page(&bed, page_at(&bed, seq, 0), KVP_PAGE_SEALED, 1);
    assert_page(&bed, page_at(&bed, seq, 1), KVP_PAGE_HELD, 1);
    ck_assert(observe(&bed, seq, UINT32_MAX));
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, 10);
    assert_page(&bed, page_at(&bed, seq, 1), KVP_PAGE_SEALED, 1);
    assert_page(&bed, page_at(&bed, seq, 2), KVP_PAGE_HELD, 1);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

/* ---- cutting -------------------------------------------------------------------------------------------------------
 */

START_TEST(a_cut_moves_the_version_and_gives_pages_back_at_once_on_a_pool_that_needs_no_after)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 30, 6);
    uint32_t version = ledger_bed_view(&bed, seq).version;
    ck_assert_int_eq(cut(&bed, seq, 13, none), KVP_OK);
    struct kvp_seq_view view = ledger_bed_view(&bed, seq);
    ck_assert(view.reserved == 13 && view.written == 6 && view.row_pages == 4 && view.version == version + 2);
    ck_assert_int_eq(cut(&bed, seq, 13, none), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).version, version + 2);
    ck_assert_int_eq(cut(&bed, seq, 5, none), KVP_OK);
    view = ledger_bed_view(&bed, seq);
    ck_assert(view.reserved == 5 && view.written == 5 && view.row_pages == 2 && view.copy.tokens == 0);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 30);
    ck_assert_int_eq(cut(&bed, seq, 0, none), KVP_OK);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 32);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_cut_with_a_value_moves_the_pages_to_a_row_of_their_own_that_retires)
{
    struct ledger_bed bed;
    struct kvp_seq_view ghost;
    struct kvp_seq_id found;
    bool more;
    ledger_bed_make(&bed, small, true);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 30, 6);
    uint32_t cut_page = page_at(&bed, seq, 4);
    ck_assert_int_eq(cut(&bed, seq, 13, none), KVP_EINVAL);
    ck_assert_int_eq(cut(&bed, seq, 29, none), KVP_OK);
    ck_assert_int_eq(cut(&bed, seq, 13, (struct kvp_after){4, 9}), KVP_OK);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 24);
    uint32_t slot = kvp_retiring_first(bed.ledger, bed.pool);
    ck_assert_int_eq(kvp_seq_at(bed.ledger, bed.pool, slot, &ghost), KVP_OK);
    ck_assert(ghost.state == KVP_SEQ_RETIRING && ghost.row_pages == 4 && ghost.after.value == 9);
    ck_assert_uint_eq(kvp_seq_row(bed.ledger, bed.pool, slot)[0], cut_page);
    ck_assert_int_eq(kvp_seq_by_key(bed.ledger, bed.pool, bed.attachment, 0, &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_retired(bed.ledger, bed.pool, slot), KVP_OK);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 99, &more), KVP_OK);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 28);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_large_cut_is_reclaimed_in_slices_and_one_without_a_slot_is_refused)
{
    struct ledger_bed bed;
    bool more = false;
    struct kvp_pool_geometry large = {
        .pages = 4096, .page_tokens = 1, .reserved_pages = 0, .max_sequences = 2, .row_pages = 4096};
    ledger_bed_make(&bed, large, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 4000, 0);
    ck_assert_int_eq(cut(&bed, seq, 4000 - KVP_RECLAIM_SLICE, none), KVP_OK);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 96 + KVP_RECLAIM_SLICE);
    ck_assert_int_eq(cut(&bed, seq, 1000, none), KVP_OK);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 96 + KVP_RECLAIM_SLICE);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 1000, &more), KVP_OK);
    ck_assert(more);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 96 + KVP_RECLAIM_SLICE + 1000);
    ck_assert_int_eq(cut(&bed, seq, 500, (struct kvp_after){1, 1}), KVP_ELIMIT);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 1000, &more), KVP_OK);
    ck_assert(!more);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 3096);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_cut_into_a_sealed_page_takes_a_fresh_one_and_owes_the_part_kept)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 12, 12);
    uint32_t sealed = page_at(&bed, seq, 1);
    ck_assert_int_eq(cut(&bed, seq, 7, none), KVP_OK);
    struct kvp_seq_view view = ledger_bed_view(&bed, seq);
    ck_assert(view.written == 7 && view.copy.tokens == 3 && view.copy.source == sealed);
    ck_assert_uint_eq(view.copy.destination, page_at(&bed, seq, 1));
    ck_assert_uint_ne(view.copy.destination, sealed);
    assert_page(&bed, sealed, KVP_PAGE_SEALED, 1);
    assert_page(&bed, view.copy.destination, KVP_PAGE_HELD, 1);
    uint32_t short_pages;
    ck_assert_int_eq(grow(&bed, seq, 9, &short_pages), KVP_OK);
    ck_assert(observe(&bed, seq, 8));
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).copy.tokens, 0);
    assert_page(&bed, sealed, KVP_PAGE_FREE, 0);
    assert_page(&bed, page_at(&bed, seq, 1), KVP_PAGE_SEALED, 1);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

/* ---- forks ---------------------------------------------------------------------------------------------------------
 */

START_TEST(a_fork_at_a_pages_end_shares_pages_and_owes_nothing)
{
    struct ledger_bed bed;
    uint32_t short_pages;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id parent = ledger_bed_seq(&bed, bed.attachment, 1, 12, 10);
    struct kvp_seq_id child = fork_seq(&bed, parent, 2, 8);
    struct kvp_seq_view view = ledger_bed_view(&bed, child);
    ck_assert(view.written == 8 && view.reserved == 8 && view.row_pages == 2 && view.copy.tokens == 0);
    for (uint32_t i = 0; i < 2; i++) {
        ck_assert_uint_eq(page_at(&bed, child, i), page_at(&bed, parent, i));
        assert_page(&bed, page_at(&bed, child, i), KVP_PAGE_SEALED, 2);
    }
    ck_assert_int_eq(grow(&bed, child, 9, &short_pages), KVP_OK);
    ck_assert_uint_ne(page_at(&bed, child, 2), page_at(&bed, parent, 2));
    struct kvp_seq_id empty = fork_seq(&bed, parent, 3, 0);
    ck_assert_uint_eq(ledger_bed_view(&bed, empty).row_pages, 0);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_fork_is_refused_of_unwritten_tokens_and_with_a_key_that_is_open)
{
    struct ledger_bed bed;
    struct kvp_seq_id child;
    uint32_t short_pages;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id parent = ledger_bed_seq(&bed, bed.attachment, 1, 12, 10);
    ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, parent, bed.attachment, 2, 11, &child, &short_pages),
                     KVP_EINVAL);
    ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, parent, bed.attachment, 1, 8, &child, &short_pages),
                     KVP_EEXIST);
    ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, parent, 9, 2, 8, &child, &short_pages), KVP_ENOENT);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_fork_in_a_page_owes_a_copy_that_holds_its_source_whatever_the_parent_does)
{
    struct ledger_bed bed;
    bool more;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id parent = ledger_bed_seq(&bed, bed.attachment, 1, 12, 6);
    uint32_t open_page = page_at(&bed, parent, 1);
    struct kvp_seq_id child = fork_seq(&bed, parent, 2, 5);
    struct kvp_seq_view view = ledger_bed_view(&bed, child);
    ck_assert(view.copy.source == open_page && view.copy.tokens == 1 && view.written == 5);
    ck_assert_uint_eq(view.copy.destination, page_at(&bed, child, 1));
    ck_assert_uint_eq(page_at(&bed, parent, 1), open_page);
    assert_page(&bed, open_page, KVP_PAGE_HELD, 2);
    ck_assert(observe(&bed, parent, 12));
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, parent, none), KVP_OK);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 99, &more), KVP_OK);
    assert_page(&bed, open_page, KVP_PAGE_SEALED, 1);
    ck_assert(!observe(&bed, child, 5));
    ck_assert_uint_eq(ledger_bed_view(&bed, child).copy.tokens, 1);
    uint32_t short_pages;
    ck_assert_int_eq(grow(&bed, child, 6, &short_pages), KVP_OK);
    ck_assert(observe(&bed, child, 6));
    assert_page(&bed, open_page, KVP_PAGE_FREE, 0);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_parent_cut_into_the_page_that_a_child_copies_from_takes_a_fresh_one)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id parent = ledger_bed_seq(&bed, bed.attachment, 1, 8, 7);
    uint32_t open_page = page_at(&bed, parent, 1);
    struct kvp_seq_id child = fork_seq(&bed, parent, 2, 7);
    ck_assert_int_eq(cut(&bed, parent, 5, none), KVP_OK);
    struct kvp_seq_view view = ledger_bed_view(&bed, parent);
    ck_assert(view.copy.source == open_page && view.copy.tokens == 1 && view.copy.destination != open_page);
    ck_assert(ledger_bed_view(&bed, child).copy.source == open_page && ledger_bed_view(&bed, child).copy.tokens == 3);
    assert_page(&bed, open_page, KVP_PAGE_HELD, 2);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_fork_of_a_sequence_that_owes_a_copy_owes_it_from_the_same_source)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id parent = ledger_bed_seq(&bed, bed.attachment, 1, 8, 7);
    uint32_t open_page = page_at(&bed, parent, 1);
    struct kvp_seq_id child = fork_seq(&bed, parent, 2, 7);
    struct kvp_seq_id grandchild = fork_seq(&bed, child, 3, 6);
    struct kvp_seq_view view = ledger_bed_view(&bed, grandchild);
    ck_assert(view.copy.source == open_page && view.copy.tokens == 2);
    assert_page(&bed, open_page, KVP_PAGE_HELD, 3);
    assert_page(&bed, page_at(&bed, child, 1), KVP_PAGE_HELD, 1);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_cut_before_the_owed_copy_is_made_shortens_or_ends_it)
{
    struct ledger_bed bed;
    bool more;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id parent = ledger_bed_seq(&bed, bed.attachment, 1, 8, 7);
    uint32_t open_page = page_at(&bed, parent, 1);
    struct kvp_seq_id child = fork_seq(&bed, parent, 2, 7);
    uint32_t destination = page_at(&bed, child, 1);
    ck_assert_int_eq(cut(&bed, child, 5, none), KVP_OK);
    struct kvp_seq_view view = ledger_bed_view(&bed, child);
    ck_assert(view.copy.source == open_page && view.copy.destination == destination && view.copy.tokens == 1);
    ck_assert_int_eq(cut(&bed, child, 4, none), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, child).copy.tokens, 0);
    assert_page(&bed, open_page, KVP_PAGE_HELD, 1);
    assert_page(&bed, destination, KVP_PAGE_FREE, 0);
    /* With a value, the source is held until it is reached: the copy may be under way. */
    struct kvp_seq_id second = fork_seq(&bed, parent, 3, 7);
    ck_assert_int_eq(cut(&bed, second, 3, (struct kvp_after){1, 1}), KVP_OK);
    assert_page(&bed, open_page, KVP_PAGE_HELD, 2);
    view = ledger_bed_view(&bed, second);
    ck_assert(view.copy.source == page_at(&bed, parent, 0) && view.copy.tokens == 3);
    ck_assert_int_eq(kvp_seq_retired(bed.ledger, bed.pool, kvp_retiring_first(bed.ledger, bed.pool)), KVP_OK);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 9, &more), KVP_OK);
    assert_page(&bed, open_page, KVP_PAGE_HELD, 1);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_row_cut_and_regrown_in_one_transaction_is_restored_by_its_abort)
{
    struct ledger_bed bed;
    uint32_t before[4], short_pages;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 16, 3);
    kvp_txn_commit(bed.ledger);
    for (uint32_t i = 0; i < 4; i++)
        before[i] = page_at(&bed, seq, i);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(cut(&bed, seq, 4, none), KVP_OK);
    ledger_bed_seq(&bed, bed.attachment, 2, 8, 0);
    ck_assert_int_eq(grow(&bed, seq, 16, &short_pages), KVP_OK);
    ck_assert_uint_ne(page_at(&bed, seq, 2), before[2]);
    kvp_txn_abort(bed.ledger);
    for (uint32_t i = 0; i < 4; i++)
        ck_assert_uint_eq(page_at(&bed, seq, i), before[i]);
    ledger_bed_end(&bed);
}
END_TEST

LEDGER_SUITE("ledger_rows", a_row_grows_by_free_pages_as_reserved_needs_them,
             a_pool_without_enough_pages_says_how_many_are_missing_and_changes_nothing,
             written_rises_to_reserved_at_most_never_falls_and_seals_full_pages,
             a_cut_moves_the_version_and_gives_pages_back_at_once_on_a_pool_that_needs_no_after,
             a_cut_with_a_value_moves_the_pages_to_a_row_of_their_own_that_retires,
             a_large_cut_is_reclaimed_in_slices_and_one_without_a_slot_is_refused,
             a_cut_into_a_sealed_page_takes_a_fresh_one_and_owes_the_part_kept,
             a_fork_at_a_pages_end_shares_pages_and_owes_nothing,
             a_fork_is_refused_of_unwritten_tokens_and_with_a_key_that_is_open,
             a_fork_in_a_page_owes_a_copy_that_holds_its_source_whatever_the_parent_does,
             a_parent_cut_into_the_page_that_a_child_copies_from_takes_a_fresh_one,
             a_fork_of_a_sequence_that_owes_a_copy_owes_it_from_the_same_source,
             a_cut_before_the_owed_copy_is_made_shortens_or_ends_it,
             a_row_cut_and_regrown_in_one_transaction_is_restored_by_its_abort)
