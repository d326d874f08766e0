/**
 * The core's sequences: opened, given room, forked, handed over, closed; all or nothing; progress words folded; the
 * table.
 */
#include "core_shell.h"

#include <string.h>

static const struct pool_of small = {.name = "p", .pages = 16, .page_tokens = 4, .layers = 1, .max_sequences = 8};
static struct shell *shell;
static struct kvp_caller a, b;
static uint32_t attachment_a, attachment_b;

static void begin_on(const char *backend)
{
    shell = shell_begin(backend);
    a = shell_connect(shell, 1000, 41);
    b = shell_connect(shell, 1000, 42);
    shell_make_pool(shell, a, &small);
    attachment_a = shell_attach(shell, a, "p");
    attachment_b = shell_attach(shell, b, "p");
}

static void begin(void)
{
    begin_on("host");
}

static void begin_cuda(void)
{
    begin_on("cuda");
}

static void end(void)
{
    shell_end(shell);
}

#define CALL(caller, NAME, request) shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_##NAME, &(request).base)

static enum kvp_status finish(struct shell_call *call)
{
    enum kvp_status status = call->status;
    shell_call_free(shell, call);
    return status;
}

static uint64_t open_one(struct kvp_caller caller, uint64_t key)
{
    uint64_t seq = 0;
    ck_assert_int_eq(shell_open(shell, caller, "p", key, false, &seq), KVP_OK);
    return seq;
}

static void advance_ok(struct kvp_caller caller, uint64_t seq, uint32_t reserved, uint32_t written)
{
    ck_assert_int_eq(shell_advance(shell, caller, "p", seq, reserved, written), KVP_OK);
}

static struct shell_call *advance_many(struct kvp_caller caller, size_t n, uint64_t *seqs, uint32_t *reserved,
                                       bool truncate, uint64_t call_id)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    request.pool = (char *)"p";
    request.call_id = call_id;
    request.n_seqs = request.n_reserved = n;
    request.seqs = seqs;
    request.reserved = reserved;
    request.truncate = truncate;
    return CALL(caller, ADVANCE, request);
}

static struct shell_call *fork_one(struct kvp_caller caller, uint64_t parent, uint64_t key, uint64_t call_id)
{
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    request.pool = (char *)"p";
    request.call_id = call_id;
    request.n_parents = request.n_keys = 1;
    request.parents = &parent;
    request.keys = &key;
    return CALL(caller, FORK, request);
}

static struct shell_call *transfer_one(struct kvp_caller caller, uint64_t seq, struct kvp_caller to, uint32_t timeline,
                                       uint64_t value, uint32_t tokens)
{
    Kvpool__V1__TransferRequest request = KVPOOL__V1__TRANSFER_REQUEST__INIT;
    request.pool = (char *)"p";
    request.n_seqs = 1;
    request.seqs = &seq;
    request.to = (uint64_t)to.session.generation << 32 | to.session.slot;
    request.timeline = timeline;
    request.value = value;
    request.n_tokens = tokens != 0;
    request.tokens = &tokens;
    return CALL(caller, TRANSFER, request);
}

static const struct kvp_table_head *head_of(uint64_t seq)
{
    const unsigned char *table = shell_thing(shell, (struct kvp_thing){KVP_THING_TABLE, 0, 0});
    const struct kvp_table_header *header = (const void *)table;
    return (const struct kvp_table_head *)(const void *)(table + header->heads_offset) + (uint32_t)seq;
}

static const int32_t *row_of(uint64_t seq)
{
    const unsigned char *table = shell_thing(shell, (struct kvp_thing){KVP_THING_TABLE, 0, 0});
    const struct kvp_table_header *header = (const void *)table;
    return (const int32_t *)(const void *)(table + header->rows_offset + header->row_stride * (uint32_t)seq);
}

static void report_progress(uint32_t attachment, uint64_t seq, uint32_t tokens)
{
    shell_progress(shell, attachment)[(uint32_t)seq] = KVP_PROGRESS_WORD(head_of(seq)->version, tokens);
}

/* ---- open, advance ----------------------------------------------------------------------------------------------- */

START_TEST(a_key_that_is_open_returns_its_handle)
{
    uint64_t seq = open_one(a, 7);
    ck_assert_uint_eq(open_one(a, 7), seq);
    ck_assert_uint_ne(open_one(b, 7), seq);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_uint_ne(open_one(a, 7), seq);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 4, 0), KVP_ESTALE);
}
END_TEST

START_TEST(more_sequences_than_rows_are_refused_and_none_is_opened)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    uint64_t keys[2000];
    for (uint64_t i = 0; i < 2000; i++)
        keys[i] = i;
    request.pool = (char *)"p";
    request.keys = keys;
    request.n_keys = 9;
    ck_assert_int_eq(finish(CALL(a, OPEN_SEQUENCES, request)), KVP_ELIMIT);
    request.n_keys = 2000;
    struct shell_call *call = CALL(a, OPEN_SEQUENCES, request);
    ck_assert_int_eq(call->status, KVP_EINVAL);
    ck_assert_str_eq(shell_error(call), "keys: 2000, must be 1 to 1024 in a call");
    shell_call_free(shell, call);
    request.n_keys = 8;
    ck_assert_int_eq(finish(CALL(a, OPEN_SEQUENCES, request)), KVP_OK);
}
END_TEST

START_TEST(advance_grows_the_row_and_the_table_shows_it)
{
    uint64_t seq = open_one(a, 1);
    uint32_t version = head_of(seq)->version;
    ck_assert_uint_eq(version % 2, 0);
    ck_assert_uint_eq(head_of(seq)->generation, (uint32_t)(seq >> 32));
    advance_ok(a, seq, 9, 0);
    ck_assert_uint_eq(head_of(seq)->row_pages, 3);
    ck_assert_uint_eq(head_of(seq)->version, version);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 13);
    ck_assert_int_ne(row_of(seq)[0], row_of(seq)[1]);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 8, 0), KVP_EINVAL);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 65, 0), KVP_EINVAL);
    ck_assert_int_eq(shell_advance(shell, b, "p", seq, 9, 0), KVP_EPERM);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_uint_eq(head_of(seq)->generation, 0);
    ck_assert_uint_eq(head_of(seq)->version, version + 2);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(advance_is_all_or_nothing_when_one_sequence_is_stale)
{
    uint64_t seqs[3] = {open_one(a, 1), open_one(a, 2), 0};
    uint32_t reserved[3] = {4, 4, 4};
    seqs[2] = seqs[1] + (1ull << 32);
    struct shell_call *call = advance_many(a, 3, seqs, reserved, false, 0);
    ck_assert_int_eq(call->status, KVP_ESTALE);
    ck_assert_ptr_nonnull(strstr(shell_error(call), "seqs[2]"));
    shell_call_free(shell, call);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    seqs[2] = seqs[0];
    ck_assert_int_eq(finish(advance_many(a, 3, seqs, reserved, false, 0)), KVP_EINVAL);
}
END_TEST

START_TEST(a_short_pool_says_how_many_pages_the_whole_batch_misses)
{
    uint64_t seqs[3] = {open_one(a, 1), open_one(a, 2), open_one(a, 3)};
    uint32_t reserved[3] = {40, 40, 20};
    struct shell_call *call = advance_many(a, 3, seqs, reserved, false, 0);
    ck_assert_int_eq(call->status, KVP_ENOPAGES);
    ck_assert_uint_eq(shell_missing(call), 10 + 10 + 5 - 16);
    shell_call_free(shell, call);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(head_of(seqs[0])->row_pages, 0);
}
END_TEST

START_TEST(a_repeated_advance_is_answered_and_not_done_again)
{
    uint64_t seq = open_one(a, 1);
    uint32_t reserved = 8;
    ck_assert_int_eq(finish(advance_many(a, 1, &seq, &reserved, false, 100)), KVP_OK);
    uint32_t less = 4;
    ck_assert_int_eq(finish(advance_many(a, 1, &seq, &less, true, 101)), KVP_OK);
    uint32_t version = head_of(seq)->version;
    ck_assert_int_eq(finish(advance_many(a, 1, &seq, &less, true, 101)), KVP_OK);
    ck_assert_uint_eq(head_of(seq)->version, version);
    struct shell_call *call = fork_one(a, seq, 2, 101);
    ck_assert_int_eq(call->status, KVP_EINVAL);
    ck_assert_ptr_nonnull(strstr(shell_error(call), "call_id: 101"));
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_repeat_makes_no_sequence_in_place_of_one_that_was_closed_since)
{
    uint64_t key = 2, parent = open_one(a, 1), seq;
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    open.pool = (char *)"p";
    open.call_id = 7;
    open.keys = &key;
    open.n_keys = 1;
    struct shell_call *call = CALL(a, OPEN_SEQUENCES, open);
    seq = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    ck_assert_int_eq(finish(CALL(a, OPEN_SEQUENCES, open)), KVP_OK);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_int_eq(finish(CALL(a, OPEN_SEQUENCES, open)), KVP_ESTALE);
    advance_ok(a, parent, 4, 4);
    call = fork_one(a, parent, key, 8);
    seq = ((const Kvpool__V1__ForkReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    ck_assert_int_eq(finish(fork_one(a, parent, key, 8)), KVP_OK);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_int_eq(finish(fork_one(a, parent, key, 8)), KVP_ESTALE);
    ck_assert_int_eq(shell_close(shell, a, "p", parent), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(progress_words_of_this_version_count_and_no_others)
{
    uint64_t seq = open_one(a, 1);
    advance_ok(a, seq, 8, 0);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 0);
    report_progress(attachment_b, seq, 8);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 0);
    shell_progress(shell, attachment_a)[(uint32_t)seq] = KVP_PROGRESS_WORD(head_of(seq)->version + 2, 8);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 0);
    report_progress(attachment_a, seq, 5);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 5);
    ck_assert_uint_eq(head_of(seq)->length, 5);
    report_progress(attachment_a, seq, 3);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 5);
    report_progress(attachment_a, seq, 4000);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 8);
}
END_TEST

static uint32_t join_group(struct kvp_caller rank, struct kvp_caller leader)
{
    Kvpool__V1__AttachRequest request = KVPOOL__V1__ATTACH_REQUEST__INIT;
    request.pool = (char *)"p";
    request.abi_version = KVP_ABI_VERSION;
    request.join = (uint64_t)leader.session.generation << 32 | leader.session.slot;
    struct shell_call *call = CALL(rank, ATTACH, request);
    ck_assert_int_eq(call->status, KVP_OK);
    uint32_t attachment = ((const Kvpool__V1__AttachReply *)call->reply)->attachment;
    shell_call_free(shell, call);
    return attachment;
}

START_TEST(the_least_word_of_a_group_counts)
{
    uint32_t attachment1 = join_group(shell_connect(shell, 1000, 43), a);
    uint64_t seq = open_one(a, 1);
    advance_ok(a, seq, 8, 0);
    report_progress(attachment_a, seq, 6);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
    report_progress(attachment1, seq, 4);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4);
}
END_TEST

START_TEST(what_a_rank_that_left_did_not_write_never_counts_until_another_joins_in_its_place)
{
    struct kvp_caller rank1 = shell_connect(shell, 1000, 43), rank2 = shell_connect(shell, 1000, 44);
    const struct kvp_session_id sessions[] = {a.session, b.session, rank2.session};
    uint32_t attachment1 = join_group(rank1, a);
    uint64_t seq = open_one(a, 1);
    advance_ok(a, seq, 16, 0);
    report_progress(attachment_a, seq, 6);
    report_progress(attachment1, seq, 4);
    kvp_core_process_ended(shell->core, rank1.session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4); /* its last word, */
    report_progress(attachment_a, seq, 9);
    shell_restart(shell, sessions, 3);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4); /* and no more */
    attachment1 = join_group(rank2, a);
    report_progress(attachment1, seq, 8);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 8);

    report_progress(attachment1, seq, 9);
    Kvpool__V1__DetachRequest detach = KVPOOL__V1__DETACH_REQUEST__INIT;
    detach.pool = (char *)"p";
    ck_assert_int_eq(finish(CALL(rank2, DETACH, detach)), KVP_OK);
    report_progress(attachment_a, seq, 12);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 9);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
}
END_TEST

START_TEST(a_truncation_moves_the_version_and_owes_the_copy_of_a_sealed_page)
{
    uint64_t seq = open_one(a, 1);
    advance_ok(a, seq, 8, 8);
    uint32_t version = head_of(seq)->version, reserved = 6;
    struct shell_call *call = advance_many(a, 1, &seq, &reserved, true, 0);
    ck_assert_int_eq(call->status, KVP_OK);
    const Kvpool__V1__AdvanceReply *reply = (const Kvpool__V1__AdvanceReply *)call->reply;
    ck_assert_uint_eq(reply->written[0], 6);
    ck_assert_uint_eq(reply->versions[0], version + 2);
    ck_assert_uint_eq(reply->n_copy_seqs, 1);
    ck_assert_uint_eq(reply->copy_tokens[0], 2);
    ck_assert_uint_eq(reply->copy_destinations[0], (uint32_t)row_of(seq)[1]);
    shell_call_free(shell, call);
    ck_assert_uint_eq(head_of(seq)->version, version + 2);
    advance_ok(a, seq, 8, 7);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
}
END_TEST

/* ---- fork, transfer ---------------------------------------------------------------------------------------------- */

START_TEST(a_fork_shares_full_pages_and_owes_the_copy_of_the_part)
{
    uint64_t seq = open_one(a, 1), child = 0;
    advance_ok(a, seq, 12, 10);
    for (int repeat = 0; repeat < 2; repeat++) {
        struct shell_call *call = fork_one(b, seq, 9, 55);
        ck_assert_int_eq(call->status, KVP_OK);
        const Kvpool__V1__ForkReply *reply = (const Kvpool__V1__ForkReply *)call->reply;
        if (repeat)
            ck_assert_uint_eq(reply->seqs[0], child);
        child = reply->seqs[0];
        ck_assert_uint_eq(reply->written[0], 10);
        ck_assert_uint_eq(reply->n_copy_seqs, 1);
        ck_assert_uint_eq(reply->copy_sources[0], (uint32_t)row_of(seq)[2]);
        ck_assert_uint_eq(reply->copy_tokens[0], 2);
        shell_call_free(shell, call);
    }
    ck_assert_int_eq(row_of(child)[0], row_of(seq)[0]);
    ck_assert_int_ne(row_of(child)[2], row_of(seq)[2]);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 12);
    ck_assert_int_eq(finish(fork_one(b, seq, 9, 0)), KVP_EEXIST);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 12);
    advance_ok(b, child, 12, 11);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 13);
    ck_assert_int_eq(shell_close(shell, b, "p", child), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(sequences_of_another_tenant_are_neither_forked_nor_given)
{
    struct kvp_caller stranger = shell_connect(shell, 2000, 50);
    uint64_t seq = open_one(a, 1);
    shell_attach(shell, stranger, "p");
    advance_ok(a, seq, 4, 4);
    ck_assert_int_eq(finish(fork_one(stranger, seq, 1, 0)), KVP_EPERM);
    ck_assert_int_eq(finish(transfer_one(a, seq, stranger, 0, 0, 0)), KVP_EPERM);
    ck_assert_int_eq(finish(transfer_one(b, seq, b, 0, 0, 0)), KVP_EPERM);
    ck_assert_uint_eq(shell_length(shell, stranger, "p", seq), 4);
}
END_TEST

START_TEST(a_transfer_hands_over_what_is_written_now)
{
    uint64_t seq = open_one(a, 1);
    advance_ok(a, seq, 8, 0);
    report_progress(attachment_a, seq, 5);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, 0, 0, 0)), KVP_OK);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, 0, 0, 0)), KVP_OK);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 5);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 12, 0), KVP_EPERM);
    advance_ok(b, seq, 12, 0);
    report_progress(attachment_b, seq, 6);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 6);
}
END_TEST

START_TEST(a_pending_transfer_counts_when_its_value_is_reached)
{
    uint64_t seq = open_one(a, 1);
    uint32_t timeline = attachment_a * KVP_TIMELINES_MAX + 2;
    advance_ok(a, seq, 8, 2);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, attachment_b * KVP_TIMELINES_MAX, 5, 8)), KVP_EINVAL);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, timeline, 5, 9)), KVP_EINVAL);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, timeline, 5, 8)), KVP_OK);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 2);
    shell_timelines(shell)[timeline].value = 5;
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(head_of(seq)->length, 8);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

START_TEST(a_pending_transfer_of_a_dead_giver_brings_nothing)
{
    uint64_t seq = open_one(a, 1);
    uint32_t timeline = attachment_a * KVP_TIMELINES_MAX + 1;
    advance_ok(a, seq, 8, 2);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, timeline, 5, 8)), KVP_OK);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 2);
    ck_assert_uint_ge(shell_timelines(shell)[timeline].value, 5);
    ck_assert_uint_ne(shell_timelines(shell)[timeline].error, 0);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
    advance_ok(b, seq, 8, 8);
}
END_TEST

START_TEST(a_pending_transfer_brings_nothing_when_giver_and_receiver_died_and_another_has_the_givers_place)
{
    const struct pool_of lingering = {
        .name = "p", .pages = 16, .page_tokens = 4, .layers = 1, .max_sequences = 8, .linger_ms = 1000};
    uint64_t seq = 0;
    shell_end(shell);
    shell = shell_begin("host");
    a = shell_connect(shell, 1000, 41);
    b = shell_connect(shell, 1000, 42);
    struct kvp_caller c = shell_connect(shell, 1000, 43);
    shell_make_pool(shell, a, &lingering);
    attachment_a = shell_attach(shell, a, "p");
    shell_attach(shell, b, "p");
    ck_assert_int_eq(shell_open(shell, a, "p", 1, true, &seq), KVP_OK);
    advance_ok(a, seq, 8, 2);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, attachment_a * KVP_TIMELINES_MAX + 1, 5, 8)), KVP_OK);
    kvp_core_process_ended(shell->core, b.session);
    shell_run_ms(shell, 20);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_attach(shell, c, "p"), attachment_a);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_length(shell, c, "p", seq), 2);
}
END_TEST

START_TEST(pages_that_a_giver_still_writes_are_not_given_up_by_the_receiver)
{
    uint64_t seq = open_one(a, 1);
    uint32_t timeline = attachment_a * KVP_TIMELINES_MAX + 1, cut = 3;
    advance_ok(a, seq, 8, 2);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, timeline, 5, 8)), KVP_OK);
    ck_assert_int_eq(shell_close(shell, b, "p", seq), KVP_EBUSY);
    ck_assert_int_eq(finish(advance_many(b, 1, &seq, &cut, true, 0)), KVP_EBUSY);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    advance_ok(b, seq, 12, 0); /* more room is no matter */
    shell_timelines(shell)[timeline].value = 5;
    ck_assert_int_eq(finish(advance_many(b, 1, &seq, &cut, true, 0)), KVP_OK);
    ck_assert_int_eq(shell_close(shell, b, "p", seq), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(a_dead_receivers_pages_come_back_when_its_giver_has_written_them)
{
    uint64_t seq = open_one(a, 1);
    uint32_t timeline = attachment_a * KVP_TIMELINES_MAX + 1;
    advance_ok(a, seq, 8, 2);
    ck_assert_int_eq(finish(transfer_one(a, seq, b, timeline, 5, 8)), KVP_OK);
    kvp_core_process_ended(shell->core, b.session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    shell_timelines(shell)[timeline].value = 5;
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

/* ---- closing, listing -------------------------------------------------------------------------------------------- */

START_TEST(reclaim_is_sliced_and_calls_wait_for_pages_on_their_way_back)
{
    shell_end(shell);
    shell = shell_begin_sliced("host", 2);
    a = shell_connect(shell, 1000, 41);
    shell_make_pool(shell, a, &small);
    uint64_t seqs[2] = {open_one(a, 1), open_one(a, 2)};
    advance_ok(a, seqs[0], 60, 0);
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    request.pool = (char *)"p";
    request.n_seqs = 1;
    request.seqs = seqs;
    struct shell_call *closing = shell_send(shell, a, KVPOOL__V1__METHOD__METHOD_CLOSE_SEQUENCES, &request.base, NULL);
    ck_assert_int_eq(finish(closing), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 3);
    advance_ok(a, seqs[1], 64, 0);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 0);
}
END_TEST

START_TEST(a_listing_has_pages_and_states)
{
    Kvpool__V1__ListSequencesRequest request = KVPOOL__V1__LIST_SEQUENCES_REQUEST__INIT;
    uint64_t seqs[3] = {open_one(a, 1), open_one(b, 2), open_one(a, 3)};
    request.pool = (char *)"p";
    request.all = true;
    request.limit = 2;
    struct shell_call *call = CALL(shell_grpc(5, 5), LIST_SEQUENCES, request);
    const Kvpool__V1__ListSequencesReply *reply = (const Kvpool__V1__ListSequencesReply *)call->reply;
    ck_assert_uint_eq(reply->n_seqs, 2);
    ck_assert_uint_eq(reply->keys[1], 2);
    request.from_slot = reply->next_slot;
    shell_call_free(shell, call);
    call = CALL(shell_grpc(5, 5), LIST_SEQUENCES, request);
    reply = (const Kvpool__V1__ListSequencesReply *)call->reply;
    ck_assert_uint_eq(reply->n_seqs, 1);
    ck_assert_uint_eq(reply->seqs[0], seqs[2]);
    ck_assert_uint_eq(reply->states[0], KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_OPEN);
    ck_assert_uint_eq(reply->next_slot, 0);
    shell_call_free(shell, call);
    request.all = false;
    request.from_slot = 0;
    call = CALL(b, LIST_SEQUENCES, request);
    ck_assert_uint_eq(((const Kvpool__V1__ListSequencesReply *)call->reply)->n_seqs, 1);
    shell_call_free(shell, call);
    request.limit = 5000;
    ck_assert_int_eq(finish(CALL(b, LIST_SEQUENCES, request)), KVP_EINVAL);
}
END_TEST

START_TEST(on_a_gpu_pages_given_up_need_a_value_and_wait_for_it)
{
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    uint64_t seq = open_one(a, 1), value = 3;
    uint32_t timeline = attachment_a * KVP_TIMELINES_MAX + 1, foreign = attachment_b * KVP_TIMELINES_MAX;
    advance_ok(a, seq, 8, 8);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_EINVAL);
    uint32_t less = 4;
    ck_assert_int_eq(finish(advance_many(a, 1, &seq, &less, true, 0)), KVP_EINVAL);
    request.pool = (char *)"p";
    request.n_seqs = request.n_after_timelines = request.n_after_values = 1;
    request.seqs = &seq;
    request.after_values = &value;
    request.after_timelines = &foreign;
    ck_assert_int_eq(finish(CALL(a, CLOSE_SEQUENCES, request)), KVP_EINVAL);
    request.after_timelines = &timeline;
    ck_assert_int_eq(finish(CALL(a, CLOSE_SEQUENCES, request)), KVP_OK);
    shell_run_ms(shell, 10);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    shell_timelines(shell)[timeline].value = 3;
    shell_run_ms(shell, 3);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(the_page_table_and_the_batch_indices_are_those_of_the_rows)
{
    Kvpool__V1__GetPageTableRequest table = KVPOOL__V1__GET_PAGE_TABLE_REQUEST__INIT;
    Kvpool__V1__GetBatchIndicesRequest indices = KVPOOL__V1__GET_BATCH_INDICES_REQUEST__INIT;
    uint64_t seqs[2] = {open_one(a, 1), open_one(a, 2)};
    advance_ok(a, seqs[0], 12, 9);
    advance_ok(a, seqs[1], 8, 0);
    table.pool = indices.pool = (char *)"p";
    table.n_seqs = indices.n_seqs = 2;
    table.seqs = indices.seqs = seqs;
    struct shell_call *call = CALL(shell_grpc(1, 1), GET_PAGE_TABLE, table);
    const Kvpool__V1__GetPageTableReply *t = (const Kvpool__V1__GetPageTableReply *)call->reply;
    ck_assert_int_eq(t->kv_indptr[1], 3);
    ck_assert_int_eq(t->kv_indptr[2], 3);
    ck_assert_int_eq(t->kv_indices[2], row_of(seqs[0])[2]);
    ck_assert_int_eq(t->kv_last_page_len[0], 1);
    ck_assert_int_eq(t->kv_last_page_len[1], 0);
    shell_call_free(shell, call);
    uint32_t lengths[2] = {13, 1}, tokens[2] = {3, 5};
    table.n_lengths = 2;
    table.lengths = lengths;
    ck_assert_int_eq(finish(CALL(a, GET_PAGE_TABLE, table)), KVP_EINVAL);
    indices.n_tokens = 2;
    indices.tokens = tokens;
    call = CALL(a, GET_BATCH_INDICES, indices);
    const Kvpool__V1__GetBatchIndicesReply *i = (const Kvpool__V1__GetBatchIndicesReply *)call->reply;
    ck_assert_uint_eq(i->n_slots, 8);
    ck_assert_int_eq(i->batch_indices[3], 1);
    ck_assert_int_eq(i->positions[2], 11);
    ck_assert_int_eq(i->slots[2], (int64_t)row_of(seqs[0])[2] * 4 + 3);
    ck_assert_int_eq(i->slots[7], (int64_t)row_of(seqs[1])[1] * 4);
    shell_call_free(shell, call);
    tokens[0] = 4;
    ck_assert_int_eq(finish(CALL(a, GET_BATCH_INDICES, indices)), KVP_EINVAL);
}
END_TEST

START_TEST(attach_checks_what_the_caller_expects)
{
    Kvpool__V1__AttachRequest request = KVPOOL__V1__ATTACH_REQUEST__INIT;
    struct kvp_caller c = shell_connect(shell, 1000, 60);
    uint8_t digest[16] = {1};
    request.pool = (char *)"p";
    request.abi_version = KVP_ABI_VERSION + 1;
    ck_assert_int_eq(finish(CALL(c, ATTACH, request)), KVP_EMISMATCH);
    request.abi_version = KVP_ABI_VERSION;
    request.model = (char *)"another";
    ck_assert_int_eq(finish(CALL(c, ATTACH, request)), KVP_EMISMATCH);
    request.model = (char *)"model";
    request.layout_digest = (ProtobufCBinaryData){16, digest};
    ck_assert_int_eq(finish(CALL(c, ATTACH, request)), KVP_EMISMATCH);
    request.layout_digest.len = 3;
    ck_assert_int_eq(finish(CALL(c, ATTACH, request)), KVP_EINVAL);
    request.layout_digest.len = 0;
    struct shell_call *call = CALL(c, ATTACH, request);
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(call->n_things, 4);
    ck_assert_int_eq(call->things[0].kind, KVP_THING_SLAB);
    const Kvpool__V1__AttachReply *reply = (const Kvpool__V1__AttachReply *)call->reply;
    ck_assert_int_eq(reply->slabs[0]->fd_index, 0);
    ck_assert_int_eq(call->things[reply->progress_fd_index].kind, KVP_THING_PROGRESS);
    shell_call_free(shell, call);
    ck_assert_int_eq(finish(CALL(shell_grpc(1000, 1), ATTACH, request)), KVP_ESESSION);
    Kvpool__V1__DetachRequest detach = KVPOOL__V1__DETACH_REQUEST__INIT;
    detach.pool = (char *)"p";
    unsigned pages = shell_thing_count(shell, KVP_THING_PROGRESS);
    ck_assert_int_eq(finish(CALL(c, DETACH, detach)), KVP_OK);
    ck_assert_int_eq(finish(CALL(c, DETACH, detach)), KVP_OK);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_PROGRESS), pages - 1);
    uint64_t seq = open_one(a, 1);
    ck_assert_int_eq(finish(CALL(a, DETACH, detach)), KVP_EBUSY);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    ck_assert_int_eq(finish(CALL(a, DETACH, detach)), KVP_OK);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_sequences");
    TCase *t = tcase_create("host");
    tcase_add_checked_fixture(t, begin, end);
    tcase_add_test(t, a_key_that_is_open_returns_its_handle);
    tcase_add_test(t, more_sequences_than_rows_are_refused_and_none_is_opened);
    tcase_add_test(t, advance_grows_the_row_and_the_table_shows_it);
    tcase_add_test(t, advance_is_all_or_nothing_when_one_sequence_is_stale);
    tcase_add_test(t, a_short_pool_says_how_many_pages_the_whole_batch_misses);
    tcase_add_test(t, a_repeated_advance_is_answered_and_not_done_again);
    tcase_add_test(t, a_repeat_makes_no_sequence_in_place_of_one_that_was_closed_since);
    tcase_add_test(t, progress_words_of_this_version_count_and_no_others);
    tcase_add_test(t, the_least_word_of_a_group_counts);
    tcase_add_test(t, what_a_rank_that_left_did_not_write_never_counts_until_another_joins_in_its_place);
    tcase_add_test(t, a_truncation_moves_the_version_and_owes_the_copy_of_a_sealed_page);
    tcase_add_test(t, a_fork_shares_full_pages_and_owes_the_copy_of_the_part);
    tcase_add_test(t, sequences_of_another_tenant_are_neither_forked_nor_given);
    tcase_add_test(t, a_transfer_hands_over_what_is_written_now);
    tcase_add_test(t, a_pending_transfer_counts_when_its_value_is_reached);
    tcase_add_test(t, a_pending_transfer_of_a_dead_giver_brings_nothing);
    tcase_add_test(t, a_pending_transfer_brings_nothing_when_giver_and_receiver_died_and_another_has_the_givers_place);
    tcase_add_test(t, pages_that_a_giver_still_writes_are_not_given_up_by_the_receiver);
    tcase_add_test(t, a_dead_receivers_pages_come_back_when_its_giver_has_written_them);
    tcase_add_test(t, reclaim_is_sliced_and_calls_wait_for_pages_on_their_way_back);
    tcase_add_test(t, a_listing_has_pages_and_states);
    tcase_add_test(t, the_page_table_and_the_batch_indices_are_those_of_the_rows);
    tcase_add_test(t, attach_checks_what_the_caller_expects);
    suite_add_tcase(suite, t);
    TCase *cuda = tcase_create("cuda");
    tcase_add_checked_fixture(cuda, begin_cuda, end);
    tcase_add_test(cuda, on_a_gpu_pages_given_up_need_a_value_and_wait_for_it);
    suite_add_tcase(suite, cuda);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
