/**
 * Sessions, the outcomes of their calls, and attachments: every function, every refusal.
 */
#include "ledger_block.h"

#include <string.h>

static const struct kvp_pool_geometry small = {
    .pages = 32, .page_tokens = 4, .reserved_pages = 0, .max_sequences = 8, .row_pages = 8};
static const struct kvp_after none = {0};

static struct kvp_session_spec lease(uint64_t token)
{
    return (struct kvp_session_spec){.kind = KVP_SESSION_LEASE, .lease_ms = 500, .token = {token, ~token}};
}

static struct kvp_session_id open_as(struct ledger_bed *bed, struct kvp_session_spec spec)
{
    struct kvp_session_id session = {0};
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_session_open(bed->ledger, &spec, &session), KVP_OK);
    kvp_txn_commit(bed->ledger);
    return session;
}

static void end_session(struct ledger_bed *bed, struct kvp_session_id session)
{
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_session_end(bed->ledger, session), KVP_OK);
    kvp_txn_commit(bed->ledger);
}

static struct kvp_buffer_view some_buffer(struct kvp_session_id session, uint32_t number)
{
    struct kvp_buffer_view buffer = {
        .session = session, .number = number, .bytes = 100 + number, .offset = 7, .has_ipc = number % 2 == 0};
    strcpy(buffer.device, "GPU-a name of a device");
    memset(buffer.ipc, (int)number, sizeof(buffer.ipc));
    return buffer;
}

static enum kvp_status put_buffer(struct ledger_bed *bed, struct kvp_session_id session, uint32_t number)
{
    struct kvp_buffer_view buffer = some_buffer(session, number);
    kvp_txn_begin(bed->ledger);
    enum kvp_status status = kvp_buffer_put(bed->ledger, &buffer);
    kvp_txn_commit(bed->ledger);
    return status;
}

START_TEST(buffers_are_remembered_until_they_are_removed_or_their_session_ends)
{
    struct ledger_bed bed;
    struct kvp_buffer_view view;
    ledger_bed_make(&bed, small, false);
    struct kvp_session_id session = open_as(&bed, lease(1));
    for (uint32_t number = 1; number <= KVP_BUFFERS_MAX; number++)
        ck_assert_int_eq(put_buffer(&bed, session, number), KVP_OK);
    ck_assert_int_eq(put_buffer(&bed, session, 3), KVP_EEXIST);
    ck_assert_int_eq(put_buffer(&bed, session, 0), KVP_EINVAL);
    ck_assert_int_eq(put_buffer(&bed, session, KVP_BUFFERS_MAX + 1), KVP_EINVAL);
    ledger_block_assert_clean(bed.ledger);
    for (uint32_t number = 1; number <= KVP_BUFFERS_MAX; number++) {
        struct kvp_buffer_view wanted = some_buffer(session, number);
        ck_assert_int_eq(kvp_buffer_get(bed.ledger, session, number, &view), KVP_OK);
        ck_assert_uint_eq(view.bytes, wanted.bytes);
        ck_assert_uint_eq(view.offset, wanted.offset);
        ck_assert(view.has_ipc == wanted.has_ipc);
        ck_assert_str_eq(view.device, wanted.device);
        ck_assert_mem_eq(view.ipc, wanted.ipc, sizeof(view.ipc));
    }
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_buffer_remove(bed.ledger, session, 3), KVP_OK);
    ck_assert_int_eq(kvp_buffer_remove(bed.ledger, session, 3), KVP_ENOENT);
    kvp_txn_abort(bed.ledger);
    ck_assert_int_eq(kvp_buffer_get(bed.ledger, session, 3, &view), KVP_OK);
    end_session(&bed, session);
    ck_assert_int_eq(kvp_buffer_get(bed.ledger, session, 1, &view), KVP_ESESSION);
    session = open_as(&bed, lease(1));
    ck_assert_int_eq(kvp_buffer_get(bed.ledger, session, 1, &view), KVP_ENOENT);
    ck_assert_int_eq(kvp_buffer_at(bed.ledger, 0, &view), KVP_ENOENT);
    ledger_block_assert_clean(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(the_table_of_buffers_can_be_full)
{
    struct ledger_bed bed;
    struct kvp_session_id session = {0};
    ledger_bed_make(&bed, small, false);
    for (uint32_t i = 0; i < KVP_BUFFERS_ALL_MAX; i++) {
        if (i % KVP_BUFFERS_MAX == 0)
            session = open_as(&bed, lease(i + 1));
        ck_assert_int_eq(put_buffer(&bed, session, i % KVP_BUFFERS_MAX + 1), KVP_OK);
    }
    struct kvp_session_id more = open_as(&bed, lease(1u << 20));
    ck_assert_int_eq(put_buffer(&bed, more, 1), KVP_ELIMIT);
    ledger_block_assert_clean(bed.ledger);
    end_session(&bed, session);
    ck_assert_int_eq(put_buffer(&bed, more, 1), KVP_OK);
    ledger_block_assert_clean(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_session_keeps_all_that_it_was_opened_with)
{
    struct ledger_bed bed;
    struct kvp_session_view view, at;
    ledger_bed_make(&bed, small, false);
    struct kvp_session_spec spec = {.kind = KVP_SESSION_LEASE,
                                    .uid = 1,
                                    .gid = 2,
                                    .pid = 3,
                                    .tenant = 4,
                                    .lease_ms = 5,
                                    .token = {6, 7},
                                    .resume_secret = {8, 9},
                                    .start_time = 10,
                                    .name = "a name of thirty-one characters"};
    struct kvp_session_id session = open_as(&bed, spec);
    ck_assert_int_eq(kvp_session_get(bed.ledger, session, &view), KVP_OK);
    ck_assert_int_eq(view.state, KVP_SESSION_OPEN);
    ck_assert_int_eq(view.spec.kind, KVP_SESSION_LEASE);
    ck_assert_uint_eq(view.spec.uid, 1);
    ck_assert_uint_eq(view.spec.gid, 2);
    ck_assert_uint_eq(view.spec.pid, 3);
    ck_assert_uint_eq(view.spec.tenant, 4);
    ck_assert_uint_eq(view.spec.lease_ms, 5);
    ck_assert(view.spec.token[0] == 6 && view.spec.token[1] == 7);
    ck_assert(view.spec.resume_secret[0] == 8 && view.spec.resume_secret[1] == 9);
    ck_assert_uint_eq(view.spec.start_time, 10);
    ck_assert_str_eq(view.spec.name, spec.name);
    ck_assert_uint_eq(view.attachments, 0);
    ck_assert_int_eq(kvp_session_at(bed.ledger, session.slot, &at), KVP_OK);
    ck_assert_uint_eq(at.id.generation, session.generation);
    ck_assert_int_eq(kvp_session_at(bed.ledger, 700, &at), KVP_ENOENT);
    ck_assert_int_eq(kvp_session_at(bed.ledger, KVP_SESSIONS_MAX, &at), KVP_ENOENT);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_session_id_is_good_until_its_session_ends_and_never_again)
{
    struct ledger_bed bed;
    struct kvp_session_view view;
    ledger_bed_make(&bed, small, false);
    struct kvp_session_id session = open_as(&bed, lease(1));
    struct kvp_session_id wrong[] = {{session.slot, session.generation + 1}, {session.slot, 0}, {KVP_SESSIONS_MAX, 1}};
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(kvp_session_get(bed.ledger, wrong[i], &view), KVP_ESESSION);
    end_session(&bed, session);
    ck_assert_int_eq(kvp_session_get(bed.ledger, session, &view), KVP_ESESSION);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_session_end(bed.ledger, session), KVP_ESESSION);
    kvp_txn_abort(bed.ledger);
    struct kvp_session_id next = open_as(&bed, lease(2));
    ck_assert_uint_eq(next.slot, session.slot);
    ck_assert_uint_ne(next.generation, session.generation);
    ck_assert_int_eq(kvp_session_get(bed.ledger, session, &view), KVP_ESESSION);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(sessions_are_refused_beyond_their_limit_and_of_an_unknown_kind)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    struct kvp_session_spec spec = lease(1);
    struct kvp_session_id session;
    kvp_txn_begin(bed.ledger);
    for (int i = 1; i < KVP_SESSIONS_MAX; i++)
        ck_assert_int_eq(kvp_session_open(bed.ledger, &spec, &session), KVP_OK);
    ck_assert_int_eq(kvp_session_open(bed.ledger, &spec, &session), KVP_ELIMIT);
    spec.kind = (enum kvp_session_kind)3;
    ck_assert_int_eq(kvp_session_open(bed.ledger, &spec, &session), KVP_EINVAL);
    kvp_txn_abort(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_token_finds_the_open_session_by_lease_and_no_other)
{
    struct ledger_bed bed;
    struct kvp_session_id found = {0};
    ledger_bed_make(&bed, small, false);
    struct kvp_session_spec socket = lease(7);
    socket.kind = KVP_SESSION_SOCKET;
    open_as(&bed, socket);
    struct kvp_session_id session = open_as(&bed, lease(8));
    const uint64_t good[2] = {8, ~8ull}, half[2] = {8, 8}, of_socket[2] = {7, ~7ull};
    ck_assert_int_eq(kvp_session_by_token(bed.ledger, good, &found), KVP_OK);
    ck_assert_uint_eq(found.slot, session.slot);
    ck_assert_int_eq(kvp_session_by_token(bed.ledger, half, &found), KVP_ESESSION);
    ck_assert_int_eq(kvp_session_by_token(bed.ledger, of_socket, &found), KVP_ESESSION);
    end_session(&bed, session);
    ck_assert_int_eq(kvp_session_by_token(bed.ledger, good, &found), KVP_ESESSION);
    ledger_bed_end(&bed);
}
END_TEST

/* ---- outcomes ------------------------------------------------------------------------------------------------------
 */

static void put_outcome(struct ledger_bed *bed, struct kvp_session_id session, uint64_t call_id)
{
    struct kvp_outcome outcome = {.call_id = call_id, .method = 5, .status = KVP_ENOPAGES, .values = {call_id * 2, 9}};
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_outcome_put(bed->ledger, session, &outcome), KVP_OK);
    kvp_txn_commit(bed->ledger);
}

START_TEST(a_session_by_lease_remembers_its_last_64_outcomes)
{
    struct ledger_bed bed;
    struct kvp_outcome outcome;
    ledger_bed_make(&bed, small, false);
    struct kvp_session_id session = open_as(&bed, lease(1));
    for (uint64_t call = 1; call <= 100; call++)
        put_outcome(&bed, session, call);
    put_outcome(&bed, session, 90);
    for (uint64_t call = 1; call <= 100; call++) {
        bool kept = call > 100 - KVP_OUTCOMES_MAX;
        ck_assert_int_eq(kvp_outcome_get(bed.ledger, session, call, &outcome), kept ? KVP_OK : KVP_ENOENT);
        if (!kept)
            continue;
        ck_assert_uint_eq(outcome.call_id, call);
        ck_assert_uint_eq(outcome.method, 5);
        ck_assert_int_eq(outcome.status, KVP_ENOPAGES);
        ck_assert(outcome.values[0] == call * 2 && outcome.values[1] == 9);
    }
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_socket_session_remembers_its_last_outcome_and_its_successor_none)
{
    struct ledger_bed bed;
    struct kvp_outcome outcome = {0};
    ledger_bed_make(&bed, small, false);
    struct kvp_session_spec spec = {.kind = KVP_SESSION_SOCKET};
    struct kvp_session_id session = open_as(&bed, spec);
    ck_assert_int_eq(kvp_outcome_get(bed.ledger, session, 0, &outcome), KVP_ENOENT);
    put_outcome(&bed, session, 41);
    put_outcome(&bed, session, 42);
    ck_assert_int_eq(kvp_outcome_get(bed.ledger, session, 42, &outcome), KVP_OK);
    ck_assert_int_eq(kvp_outcome_get(bed.ledger, session, 41, &outcome), KVP_ENOENT);
    end_session(&bed, session);
    ck_assert_int_eq(kvp_outcome_get(bed.ledger, session, 42, &outcome), KVP_ESESSION);
    struct kvp_session_id next = open_as(&bed, spec);
    ck_assert_uint_eq(next.slot, session.slot);
    ck_assert_int_eq(kvp_outcome_get(bed.ledger, next, 42, &outcome), KVP_ENOENT);
    kvp_txn_begin(bed.ledger);
    outcome.call_id = 0;
    ck_assert_int_eq(kvp_outcome_put(bed.ledger, next, &outcome), KVP_EINVAL);
    ck_assert_int_eq(kvp_outcome_put(bed.ledger, session, &outcome), KVP_ESESSION);
    kvp_txn_abort(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

/* ---- attachments ---------------------------------------------------------------------------------------------------
 */

START_TEST(a_session_attaches_once_to_a_pool_and_is_found_there)
{
    struct ledger_bed bed;
    struct kvp_attachment_view view;
    uint32_t found = KVP_NONE, again = KVP_NONE;
    ledger_bed_make(&bed, small, false);
    ck_assert_int_eq(kvp_attachment_of(bed.ledger, bed.pool, bed.session, &found), KVP_OK);
    ck_assert_uint_eq(found, bed.attachment);
    ck_assert_int_eq(kvp_attachment_get(bed.ledger, bed.pool, found, &view), KVP_OK);
    ck_assert_int_eq(view.state, KVP_ATTACHMENT_LIVE);
    ck_assert_uint_eq(view.session.slot, bed.session.slot);
    ck_assert_uint_eq(view.leader, found);
    ck_assert(!view.nvml_seen);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_attach(bed.ledger, bed.pool, bed.session, KVP_NONE, &again), KVP_EEXIST);
    struct kvp_pool_id no_pool = {bed.pool.slot, bed.pool.generation + 1};
    struct kvp_session_id no_session = {5, 1};
    ck_assert_int_eq(kvp_attach(bed.ledger, no_pool, bed.session, KVP_NONE, &again), KVP_ENOENT);
    ck_assert_int_eq(kvp_attach(bed.ledger, bed.pool, no_session, KVP_NONE, &again), KVP_ESESSION);
    ck_assert_int_eq(kvp_attachment_set_nvml_seen(bed.ledger, bed.pool, found), KVP_OK);
    ck_assert_int_eq(kvp_attachment_set_nvml_seen(bed.ledger, bed.pool, 9), KVP_ENOENT);
    kvp_txn_commit(bed.ledger);
    ck_assert_int_eq(kvp_attachment_get(bed.ledger, bed.pool, found, &view), KVP_OK);
    ck_assert(view.nvml_seen);
    struct kvp_session_id lone = open_as(&bed, lease(1));
    ck_assert_int_eq(kvp_attachment_of(bed.ledger, bed.pool, lone, &again), KVP_ENOENT);
    ck_assert_int_eq(kvp_attachment_of(bed.ledger, bed.pool, no_session, &again), KVP_ESESSION);
    ck_assert_int_eq(kvp_attachment_get(bed.ledger, bed.pool, KVP_ATTACHMENTS_MAX, &view), KVP_ENOENT);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(attachments_are_refused_beyond_their_limit)
{
    struct ledger_bed bed;
    ledger_bed_make(&bed, small, false);
    struct kvp_session_spec spec = lease(1);
    struct kvp_session_id session;
    uint32_t attachment;
    kvp_txn_begin(bed.ledger);
    for (int i = 1; i <= KVP_ATTACHMENTS_MAX; i++) {
        ck_assert_int_eq(kvp_session_open(bed.ledger, &spec, &session), KVP_OK);
        ck_assert_int_eq(kvp_attach(bed.ledger, bed.pool, session, KVP_NONE, &attachment),
                         i < KVP_ATTACHMENTS_MAX ? KVP_OK : KVP_ELIMIT);
    }
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

static uint32_t join(struct ledger_bed *bed, uint32_t leader, struct kvp_session_id *ret_session)
{
    uint32_t attachment = KVP_NONE;
    *ret_session = open_as(bed, lease(leader + 100));
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_attach(bed->ledger, bed->pool, *ret_session, leader, &attachment), KVP_OK);
    kvp_txn_commit(bed->ledger);
    return attachment;
}

START_TEST(who_joins_a_member_joins_its_leader_and_stands_alone_when_that_is_released)
{
    struct ledger_bed bed;
    struct kvp_attachment_view view;
    struct kvp_session_id session;
    uint32_t left = 9, refused;
    ledger_bed_make(&bed, small, false);
    uint32_t second = join(&bed, bed.attachment, &session);
    uint32_t third = join(&bed, second, &session);
    ck_assert_int_eq(kvp_attachment_get(bed.ledger, bed.pool, third, &view), KVP_OK);
    ck_assert_uint_eq(view.leader, bed.attachment);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_EBUSY);
    kvp_txn_abort(bed.ledger);
    end_session(&bed, bed.session);
    struct kvp_session_id late = open_as(&bed, lease(1));
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_attach(bed.ledger, bed.pool, late, bed.attachment, &refused), KVP_ESESSION);
    ck_assert_int_eq(kvp_attach(bed.ledger, bed.pool, late, 77, &refused), KVP_ENOENT);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 1, &left), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(left, 0);
    ck_assert_int_eq(kvp_attachment_get(bed.ledger, bed.pool, third, &view), KVP_OK);
    ck_assert_uint_eq(view.leader, third);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(detach_is_refused_while_sequences_are_owned_or_rows_retire)
{
    struct ledger_bed bed;
    bool more;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 8);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, (struct kvp_after){1, 5}), KVP_OK);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_retired(bed.ledger, bed.pool, seq.slot), KVP_OK);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_ENOENT);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 100, &more), KVP_OK);
    kvp_txn_commit(bed.ledger);
    struct kvp_session_view view;
    ck_assert_int_eq(kvp_session_get(bed.ledger, bed.session, &view), KVP_OK);
    ck_assert_uint_eq(view.attachments, 0);
    ledger_bed_end(&bed);
}
END_TEST

/* ---- death ---------------------------------------------------------------------------------------------------------
 */

START_TEST(an_ended_session_freezes_its_sequences_until_they_are_released_in_slices)
{
    struct ledger_bed bed;
    struct kvp_session_view session;
    struct kvp_attachment_view view;
    uint32_t left = 0, short_pages;
    bool changed = false, more;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id first = ledger_bed_seq(&bed, bed.attachment, 1, 8, 4);
    ledger_bed_seq(&bed, bed.attachment, 2, 8, 8);
    struct kvp_seq_id waiting = ledger_bed_seq(&bed, bed.attachment, 3, 8, 8);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, waiting, (struct kvp_after){1, 5}), KVP_OK);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 9, &left), KVP_EBUSY);
    kvp_txn_commit(bed.ledger);
    end_session(&bed, bed.session);
    end_session(&bed, bed.session);
    ck_assert_int_eq(kvp_session_get(bed.ledger, bed.session, &session), KVP_OK);
    ck_assert_int_eq(session.state, KVP_SESSION_ENDING);
    ck_assert_int_eq(kvp_attachment_get(bed.ledger, bed.pool, bed.attachment, &view), KVP_OK);
    ck_assert_int_eq(view.state, KVP_ATTACHMENT_DEAD);

    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id refused;
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, 9, false, &refused), KVP_ESESSION);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, first, 20, false, none, &short_pages), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, first, none), KVP_EBUSY);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, first, 8, (struct kvp_after){1, 1}), KVP_EBUSY);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_ESESSION);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, first, 6, &changed), KVP_OK);
    ck_assert(changed);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 1, &left), KVP_OK);
    ck_assert_uint_eq(left, 2);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 0, &left), KVP_OK);
    ck_assert_uint_eq(left, 2);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 2, &left), KVP_OK);
    ck_assert_uint_eq(left, 0);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 2, &left), KVP_ENOENT);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 100, &more), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert(!more);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 32);
    ck_assert_int_eq(kvp_session_get(bed.ledger, bed.session, &session), KVP_ESESSION);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(durable_sequences_outlive_their_session_until_they_are_claimed_or_released)
{
    struct ledger_bed bed;
    struct kvp_session_view session;
    struct kvp_session_id heir;
    struct kvp_seq_id kept = {0}, lost = {0};
    uint32_t left = 9;
    ledger_bed_make(&bed, small, false);
    uint32_t to = ledger_bed_attach(&bed, &heir);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, 1, true, &kept), KVP_OK);
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, 2, true, &lost), KVP_OK);
    ledger_bed_seq(&bed, bed.attachment, 3, 8, 8);
    kvp_txn_commit(bed.ledger);
    end_session(&bed, bed.session);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, false, 9, &left), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(left, 0);
    ck_assert(ledger_bed_view(&bed, kept).durable);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, kept, to), KVP_OK);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, true, 9, &left), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(ledger_bed_view(&bed, kept).attachment, to);
    struct kvp_seq_view view;
    ck_assert_int_eq(kvp_seq_get(bed.ledger, bed.pool, lost, &view), KVP_ESTALE);
    ck_assert_int_eq(kvp_session_get(bed.ledger, bed.session, &session), KVP_ESESSION);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(the_fork_of_a_durable_sequence_is_durable_in_its_own_session_alone)
{
    struct ledger_bed bed;
    struct kvp_session_id reader;
    struct kvp_seq_id parent, plain, children[3];
    uint32_t short_pages;
    ledger_bed_make(&bed, small, false);
    uint32_t other = ledger_bed_attach(&bed, &reader);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, 1, true, &parent), KVP_OK);
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, 2, false, &plain), KVP_OK);
    struct kvp_seq_id parents[] = {parent, parent, plain};
    uint32_t owners[] = {bed.attachment, other, bed.attachment};
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, parents[i], owners[i], 10 + i, 0, &children[i],
                                      &short_pages),
                         KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert(ledger_bed_view(&bed, children[0]).durable);
    ck_assert(!ledger_bed_view(&bed, children[1]).durable);
    ck_assert(!ledger_bed_view(&bed, children[2]).durable);
    ledger_bed_end(&bed);
}
END_TEST

LEDGER_SUITE("ledger_sessions", a_session_keeps_all_that_it_was_opened_with,
             a_session_id_is_good_until_its_session_ends_and_never_again,
             sessions_are_refused_beyond_their_limit_and_of_an_unknown_kind,
             a_token_finds_the_open_session_by_lease_and_no_other, a_session_by_lease_remembers_its_last_64_outcomes,
             a_socket_session_remembers_its_last_outcome_and_its_successor_none,
             a_session_attaches_once_to_a_pool_and_is_found_there, attachments_are_refused_beyond_their_limit,
             who_joins_a_member_joins_its_leader_and_stands_alone_when_that_is_released,
             detach_is_refused_while_sequences_are_owned_or_rows_retire,
             an_ended_session_freezes_its_sequences_until_they_are_released_in_slices,
             durable_sequences_outlive_their_session_until_they_are_claimed_or_released,
             the_fork_of_a_durable_sequence_is_durable_in_its_own_session_alone,
             buffers_are_remembered_until_they_are_removed_or_their_session_ends, the_table_of_buffers_can_be_full)
