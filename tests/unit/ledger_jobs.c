/**
 * Jobs: opening, the sequences that wait for them, their end.
 */
#include "ledger_block.h"

static const struct kvp_pool_geometry small = {
    .pages = 32, .page_tokens = 4, .reserved_pages = 0, .max_sequences = 8, .row_pages = 8};
static const struct kvp_after none = {0};

static struct kvp_job_id open_job(struct ledger_bed *bed)
{
    struct kvp_job_id job = {0};
    struct kvp_job_spec spec = {
        .kind = 1, .session = bed->session, .pool = bed->pool, .call_id = 7, .timeline = 3, .value = 9};
    ck_assert_int_eq(kvp_job_open(bed->ledger, &spec, &job), KVP_OK);
    return job;
}

START_TEST(a_job_keeps_what_it_was_opened_with_and_its_sequences_in_order)
{
    struct ledger_bed bed;
    struct kvp_job_view view, at;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_job_id job = open_job(&bed);
    struct kvp_seq_id seqs[3];
    for (uint32_t i = 0; i < 3; i++)
        seqs[i] = ledger_bed_seq(&bed, bed.attachment, i, 8, 0);
    const uint32_t order[] = {1, 2, 0};
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_int_eq(kvp_job_add(bed.ledger, job, seqs[order[i]], 4 + i), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_int_eq(kvp_job_get(bed.ledger, job, &view), KVP_OK);
    ck_assert(view.spec.kind == 1 && view.spec.session.slot == bed.session.slot && view.spec.call_id == 7);
    ck_assert(view.spec.pool.generation == bed.pool.generation && view.spec.timeline == 3 && view.spec.value == 9);
    ck_assert_int_eq(kvp_job_at(bed.ledger, job.slot, &at), KVP_OK);
    ck_assert_uint_eq(at.id.generation, job.generation);
    ck_assert_int_eq(kvp_job_at(bed.ledger, 5, &at), KVP_ENOENT);
    ck_assert_int_eq(kvp_job_at(bed.ledger, KVP_JOBS_MAX, &at), KVP_ENOENT);
    uint32_t slot = kvp_job_first(bed.ledger, job);
    for (uint32_t i = 0; i < 3; i++, slot = kvp_job_next(bed.ledger, job, slot)) {
        ck_assert_uint_eq(slot, seqs[order[i]].slot);
        struct kvp_seq_view seq = ledger_bed_view(&bed, seqs[order[i]]);
        ck_assert(seq.job == job.slot && seq.job_tokens == 4 + i);
    }
    ck_assert_uint_eq(slot, KVP_NONE);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_sequence_with_a_job_can_not_be_changed_closed_or_transferred)
{
    struct ledger_bed bed;
    struct kvp_session_id other;
    uint32_t short_pages;
    ledger_bed_make(&bed, small, false);
    uint32_t second = ledger_bed_attach(&bed, &other);
    kvp_txn_begin(bed.ledger);
    struct kvp_job_id job = open_job(&bed), next = open_job(&bed);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 2);
    ck_assert_int_eq(kvp_job_add(bed.ledger, job, seq, 9), KVP_EINVAL);
    ck_assert_int_eq(kvp_job_add(bed.ledger, job, seq, 1), KVP_EINVAL);
    ck_assert_int_eq(kvp_job_add(bed.ledger, job, seq, 8), KVP_OK);
    ck_assert_int_eq(kvp_job_add(bed.ledger, next, seq, 8), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 9, false, none, &short_pages), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 7, true, none, &short_pages), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 8, false, none, &short_pages), KVP_OK);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 8, (struct kvp_after){1, 1}), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, second), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, none), KVP_EBUSY);
    ck_assert_int_eq(kvp_job_close(bed.ledger, job, false), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, 2);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).job, KVP_NONE);
    ck_assert_int_eq(kvp_job_add(bed.ledger, next, seq, 7), KVP_OK);
    ck_assert_int_eq(kvp_job_close(bed.ledger, next, true), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, 7);
    ck_assert_int_eq(kvp_job_close(bed.ledger, next, true), KVP_ENOENT);
    ck_assert_int_eq(kvp_job_add(bed.ledger, next, seq, 7), KVP_ENOENT);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, none), KVP_OK);
    kvp_txn_commit(bed.ledger);
    struct kvp_job_view view;
    ck_assert_int_eq(kvp_job_get(bed.ledger, job, &view), KVP_ENOENT);
    ck_assert_uint_eq(kvp_job_first(bed.ledger, job), KVP_NONE);
    ck_assert_uint_eq(kvp_job_next(bed.ledger, job, seq.slot), KVP_NONE);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_job_outlives_its_session_and_its_sequences_wait_for_it)
{
    struct ledger_bed bed;
    struct kvp_session_view session;
    uint32_t left = 0;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_job_id job = open_job(&bed);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 0);
    ledger_bed_seq(&bed, bed.attachment, 2, 8, 0);
    ck_assert_int_eq(kvp_job_add(bed.ledger, job, seq, 8), KVP_OK);
    ck_assert_int_eq(kvp_session_end(bed.ledger, bed.session), KVP_OK);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, true, 99, &left), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(left, 1);
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    struct kvp_job_id second = {0};
    struct kvp_job_spec spec = {.session = bed.session, .pool = bed.pool};
    ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &second), KVP_OK);
    ck_assert_int_eq(kvp_job_close(bed.ledger, job, true), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, seq).written, 8);
    ck_assert_int_eq(kvp_job_add(bed.ledger, second, seq, 8), KVP_EBUSY);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, true, 99, &left), KVP_OK);
    ck_assert_uint_eq(left, 0);
    kvp_txn_commit(bed.ledger);
    ck_assert_int_eq(kvp_session_get(bed.ledger, bed.session, &session), KVP_ESESSION);
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &job), KVP_ESESSION);
    ck_assert_int_eq(kvp_job_close(bed.ledger, second, true), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(jobs_are_refused_beyond_their_limits)
{
    struct ledger_bed bed;
    struct kvp_job_id jobs[2], job;
    struct kvp_pool_geometry large = {
        .pages = 1u << 18, .page_tokens = 1, .reserved_pages = 0, .max_sequences = 2000, .row_pages = 1u << 17};
    struct ledger_block block;
    struct kvp_session_id session;
    struct kvp_job_spec spec = {.kind = 2};
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    for (int i = 0; i <= KVP_JOBS_MAX; i++)
        ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &job), i < KVP_JOBS_MAX ? KVP_OK : KVP_ELIMIT);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);

    ledger_block_open(&block, kvp_ledger_root_bytes() + (2ull << 30));
    struct kvp_pool_spec pool_spec = {.geometry = large, .name = "large"};
    struct kvp_session_spec session_spec = {.kind = KVP_SESSION_SOCKET};
    struct ledger_bed wide = {.block = block};
    wide.ledger = &wide.block.ledger;
    kvp_txn_begin(wide.ledger);
    ck_assert_int_eq(kvp_session_open(wide.ledger, &session_spec, &session), KVP_OK);
    ck_assert_int_eq(kvp_pool_create(wide.ledger, &pool_spec, &wide.pool), KVP_OK);
    ck_assert_int_eq(kvp_attach(wide.ledger, wide.pool, session, KVP_NONE, &wide.attachment), KVP_OK);
    spec.pool = wide.pool;
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(kvp_job_open(wide.ledger, &spec, &jobs[i]), KVP_OK);
    for (uint32_t i = 0; i <= KVP_BATCH_MAX; i++) {
        struct kvp_seq_id seq = ledger_bed_seq(&wide, wide.attachment, i, 1, 0);
        ck_assert_int_eq(kvp_job_add(wide.ledger, jobs[0], seq, 1), i < KVP_BATCH_MAX ? KVP_OK : KVP_ELIMIT);
    }
    struct kvp_seq_id most = ledger_bed_seq(&wide, wide.attachment, 5000, KVP_CALL_PAGES_MAX, 0);
    struct kvp_seq_id one = ledger_bed_seq(&wide, wide.attachment, 5001, 1, 0);
    ck_assert_int_eq(kvp_job_add(wide.ledger, jobs[1], most, KVP_CALL_PAGES_MAX), KVP_OK);
    ck_assert_int_eq(kvp_job_add(wide.ledger, jobs[1], one, 1), KVP_ELIMIT);
    kvp_txn_commit(wide.ledger);
    for (int i = 0; i < 2; i++) {
        kvp_txn_begin(wide.ledger);
        ck_assert_int_eq(kvp_job_close(wide.ledger, jobs[i], true), KVP_OK);
        kvp_txn_commit(wide.ledger);
    }
    ck_assert_uint_eq(ledger_bed_view(&wide, most).written, KVP_CALL_PAGES_MAX);
    ledger_bed_end(&wide);
}
END_TEST

LEDGER_SUITE("ledger_jobs", a_job_keeps_what_it_was_opened_with_and_its_sequences_in_order,
             a_sequence_with_a_job_can_not_be_changed_closed_or_transferred,
             a_job_outlives_its_session_and_its_sequences_wait_for_it, jobs_are_refused_beyond_their_limits)
