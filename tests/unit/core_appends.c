/**
 * Append on request, buffers and index jobs: the bytes where they belong, lengths that count only what is written,
 * executors that fail and die in the middle.
 */
#include "core_shell.h"

#include <string.h>

static const struct pool_of small = {.name = "p", .pages = 16, .page_tokens = 4, .layers = 2, .max_sequences = 8};
static const struct pool_of legacy = {
    .name = "p", .pages = 16, .page_tokens = 4, .layers = 2, .max_sequences = 8, .legacy = true};
static struct shell *shell;
static struct kvp_caller a, grpc;
static uint64_t seq;
static char token[64];

#define TOKEN_BYTES (2 * 4 * 2) /* heads, dim, fp16: of one plane */
#define PLANES      4
#define INLINE_MAX  (64 * TOKEN_BYTES * PLANES)

static void begin_with(const char *backend, const struct pool_of *pool)
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    shell = shell_begin(backend);
    a = shell_connect(shell, 1000, 41);
    grpc = shell_grpc(1000, 90);
    shell_make_pool(shell, a, pool);
    shell_attach(shell, a, "p");
    ck_assert_int_eq(shell_open(shell, a, "p", 1, false, &seq), KVP_OK);
    struct shell_call *call = shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_OPEN_SESSION, &request.base);
    ck_assert_int_eq(call->status, KVP_OK);
    snprintf(token, sizeof(token), "%s", ((const Kvpool__V1__OpenSessionReply *)call->reply)->session);
    shell_call_free(shell, call);
}

static void begin(void)
{
    begin_with("host", &small);
}

static void begin_legacy(void)
{
    begin_with("cuda", &legacy);
}

static void end(void)
{
    shell_end(shell);
}

static enum kvp_status finish(struct shell_call *call)
{
    enum kvp_status status = call->status;
    shell_call_free(shell, call);
    return status;
}

/* The byte of a token: of plane p, position t in the sequence with that key. */
static unsigned char pattern(uint64_t key, size_t plane, uint32_t position, size_t byte)
{
    return (unsigned char)(key * 131 + plane * 31 + position * 7 + byte + 1);
}

static size_t fill_inline(unsigned char *to, uint64_t key, uint32_t at, uint32_t tokens)
{
    size_t n = 0;
    for (size_t p = 0; p < PLANES; p++) {
        for (uint32_t t = 0; t < tokens; t++) {
            for (size_t i = 0; i < TOKEN_BYTES; i++)
                to[n++] = pattern(key, p, at + t, i);
        }
    }
    return n;
}

static struct shell_call *append_as(struct kvp_caller caller, const char *session, uint64_t handle, uint64_t key,
                                    uint32_t at, uint32_t tokens, uint64_t call_id)
{
    static unsigned char bytes[INLINE_MAX];
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    request.session = (char *)session;
    request.call_id = call_id;
    request.pool = (char *)"p";
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = &handle;
    request.at = &at;
    request.tokens = &tokens;
    request.inline_ = (ProtobufCBinaryData){fill_inline(bytes, key, at, tokens), bytes};
    return shell_send(shell, caller, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base, NULL);
}

static struct shell_call *append(uint32_t at, uint32_t tokens, uint64_t call_id)
{
    return append_as(a, "", seq, 1, at, tokens, call_id);
}

/* Every byte of the first n tokens is what was appended. */
static void check_bytes(uint64_t handle, uint64_t key, uint32_t n)
{
    Kvpool__V1__GetPageTableRequest request = KVPOOL__V1__GET_PAGE_TABLE_REQUEST__INIT;
    Kvpool__V1__DescribePoolRequest describe = KVPOOL__V1__DESCRIBE_POOL_REQUEST__INIT;
    request.pool = describe.pool = (char *)"p";
    request.n_seqs = 1;
    request.seqs = &handle;
    struct shell_call *rows = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_PAGE_TABLE, &request.base);
    struct shell_call *pool = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, &describe.base);
    ck_assert_int_eq(rows->status, KVP_OK);
    const Kvpool__V1__GetPageTableReply *table = (const Kvpool__V1__GetPageTableReply *)rows->reply;
    const Kvpool__V1__PoolInfo *info = ((const Kvpool__V1__DescribePoolReply *)pool->reply)->pool;
    const unsigned char *slab = shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, 0});
    ck_assert_uint_ge(table->lengths[0], n);
    for (size_t p = 0; p < PLANES; p++) {
        const Kvpool__V1__PlaneLayout *l = info->layout[p];
        for (uint32_t t = 0; t < n; t++) {
            uint64_t page = (uint64_t)table->kv_indices[t / 4];
            const unsigned char *at = slab + l->offset + page * l->page_stride + t % 4 * l->token_stride;
            for (size_t i = 0; i < TOKEN_BYTES; i++)
                ck_assert_msg(at[i] == pattern(key, p, t, i), "plane %zu, token %u, byte %zu", p, t, i);
        }
    }
    shell_call_free(shell, rows);
    shell_call_free(shell, pool);
}

static struct shell_call *append_behind(uint32_t timeline, uint64_t value)
{
    static unsigned char bytes[INLINE_MAX];
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    uint32_t at = 0, tokens = 1;
    request.call_id = 1;
    request.pool = (char *)"p";
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = &seq;
    request.at = &at;
    request.tokens = &tokens;
    request.inline_ = (ProtobufCBinaryData){fill_inline(bytes, 1, 0, 1), bytes};
    request.wait_timeline = timeline;
    request.wait_value = value;
    return shell_send(shell, a, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base, NULL);
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

START_TEST(what_a_dead_session_was_to_reach_is_ended_before_the_work_that_waits_for_it)
{
    struct kvp_timeline *own = &shell_timelines(shell)[1];
    shell->hold_jobs = true; /* as an executor does that waits */
    ck_assert_int_eq(finish(append_behind(1, own->value + 5)), KVP_OK);
    kvp_core_disconnected(shell->core, a.session);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 10);
    ck_assert_uint_eq(own->error, (uint64_t)-KVP_ESESSION);
    ck_assert_uint_eq(shell_timelines(shell)[0].error, 0);
    shell->fail_job = KVP_ESESSION;
    shell_jobs_run(shell, 1);
    shell_run_ms(shell, 10);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "p"), KVP_OK);
}
END_TEST

START_TEST(nobody_waits_for_a_timeline_that_nobody_owns)
{
    ck_assert_int_eq(finish(append_behind(7 * KVP_TIMELINES_MAX, 1)), KVP_EINVAL);
    ck_assert_int_eq(finish(append_behind(KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX, 1)), KVP_EINVAL);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
}
END_TEST

START_TEST(an_append_is_answered_at_intent_and_counts_when_it_is_done)
{
    shell->hold_jobs = true;
    struct shell_call *call = append(0, 6, 1);
    ck_assert(call->answered);
    ck_assert_int_eq(call->status, KVP_OK);
    const Kvpool__V1__AppendReply *reply = (const Kvpool__V1__AppendReply *)call->reply;
    ck_assert_uint_eq(reply->written[0], 6);
    ck_assert_uint_eq(reply->value, 1);
    shell_call_free(shell, call);
    shell_pump(shell);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 20, 0), KVP_EBUSY);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_EBUSY);
    ck_assert_int_eq(finish(append(0, 1, 2)), KVP_EBUSY);
    shell_jobs_run(shell, 1);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 1);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 6);
    check_bytes(seq, 1, 6);
    ck_assert_int_eq(finish(append(6, 5, 3)), KVP_OK);
    shell_pump(shell);
    shell_jobs_run(shell, 1);
    shell_pump(shell);
    check_bytes(seq, 1, 11);
}
END_TEST

START_TEST(who_saw_the_timeline_sees_the_tokens)
{
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 4, 0)), KVP_OK);
    shell_pump(shell);
    shell_jobs_run(shell, 1); /* the timeline is written; the core has not read the answer */
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 1);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 20, 0), KVP_OK);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4);
}
END_TEST

START_TEST(over_grpc_an_append_is_answered_when_it_is_done)
{
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    uint64_t key = 5;
    open.session = token;
    open.pool = (char *)"p";
    open.n_keys = 1;
    open.keys = &key;
    struct shell_call *call = shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_OPEN_SEQUENCES, &open.base);
    uint64_t mine = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    shell->hold_jobs = true;
    call = append_as(grpc, token, mine, key, 0, 7, 9);
    shell_pump(shell);
    ck_assert(!call->answered);
    struct shell_call *repeat = append_as(grpc, token, mine, key, 0, 7, 9);
    ck_assert(!repeat->answered);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 1);
    shell_jobs_run(shell, 1);
    shell_pump(shell);
    ck_assert(call->answered && repeat->answered);
    ck_assert_uint_eq(((const Kvpool__V1__AppendReply *)call->reply)->value, 1);
    ck_assert_int_eq(finish(call), KVP_OK);
    ck_assert_int_eq(finish(repeat), KVP_OK);
    ck_assert_int_eq(finish(append_as(grpc, token, mine, key, 0, 7, 9)), KVP_OK);
    ck_assert_uint_eq(shell->executors[0].jobs_done, 1);
    check_bytes(mine, key, 7);
}
END_TEST

START_TEST(an_append_at_another_length_changes_nothing)
{
    ck_assert_int_eq(finish(append(0, 3, 0)), KVP_OK);
    shell_pump(shell);
    struct shell_call *call = append(4, 2, 0);
    ck_assert_int_eq(call->status, KVP_EMISMATCH);
    ck_assert_str_eq(shell_error(call), "at[0]: 4 tokens are expected, 3 are written");
    shell_call_free(shell, call);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 3);
}
END_TEST

START_TEST(wrong_appends_are_refused_before_anything_changes)
{
    unsigned char bytes[INLINE_MAX] = {0};
    uint32_t at = 0, tokens = 2, many = 70;
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    request.pool = (char *)"p";
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = &seq;
    request.at = &at;
    request.tokens = &tokens;
    struct {
        size_t bytes;
        uint32_t buffer, rank;
        uint32_t *tokens;
        size_t n_at;
        enum kvp_status status;
        const char *text;
    } wrong[] = {
        {0, 0, 0, &tokens, 1, KVP_EINVAL, "either inline or in a buffer"},
        {64, 1, 0, &tokens, 1, KVP_EINVAL, "either inline or in a buffer"},
        {127, 0, 0, &tokens, 1, KVP_EINVAL, "inline: 127 bytes, 2 tokens of 4 planes are 128"},
        {0, 3, 0, &tokens, 1, KVP_ENOENT, "no buffer 3"},
        {128, 0, 1, &tokens, 1, KVP_EINVAL, "rank: 1"},
        {128, 0, 0, &at, 1, KVP_EINVAL, "tokens: 0 in all"},
        {128, 0, 0, &many, 1, KVP_EINVAL, "tokens[0]: 70 behind 0, at most 64"},
        {128, 0, 0, &tokens, 0, KVP_EINVAL, "at: 0 entries"},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        request.inline_ = (ProtobufCBinaryData){wrong[i].bytes, bytes};
        request.buffer = wrong[i].buffer;
        request.rank = wrong[i].rank;
        request.tokens = wrong[i].tokens;
        request.n_at = wrong[i].n_at;
        struct shell_call *call = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base);
        ck_assert_msg(call->status == wrong[i].status, "%zu: %s", i, kvp_status_name(call->status));
        ck_assert_msg(strstr(shell_error(call), wrong[i].text) != NULL, "%s", shell_error(call));
        shell_call_free(shell, call);
    }
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(shell->executors[0].jobs_done, 0);
}
END_TEST

START_TEST(a_failed_append_leaves_the_length_and_tells_the_timeline)
{
    shell->fail_job = KVP_EDEVICE;
    struct shell_call *call = append(0, 6, 4);
    ck_assert_int_eq(finish(call), KVP_OK);
    shell_pump(shell);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 1);
    ck_assert_uint_eq(shell_timelines(shell)[0].error, (uint64_t)-KVP_EDEVICE);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
    ck_assert_int_eq(finish(append(0, 6, 4)), KVP_OK); /* the same call: it had not been done */
    ck_assert_uint_eq(shell_timelines(shell)[0].error, 0);
    shell_pump(shell);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 2);
    ck_assert_uint_eq(kvp_timeline_lost(&shell_timelines(shell)[0], 1),
                      (uint64_t)-KVP_EDEVICE); /* whenever one looks */
    ck_assert_uint_eq(kvp_timeline_lost(&shell_timelines(shell)[0], 2), 0);
    check_bytes(seq, 1, 6);
}
END_TEST

START_TEST(a_failed_value_waits_for_those_before_it)
{
    uint64_t other;
    ck_assert_int_eq(shell_open(shell, a, "p", 2, false, &other), KVP_OK);
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 4, 0)), KVP_OK);
    ck_assert_int_eq(finish(append_as(a, "", other, 2, 0, 4, 0)), KVP_OK);
    shell_pump(shell);
    struct shell_job *jobs = shell->executors[0].jobs, first = jobs[0];
    jobs[0] = jobs[1];
    jobs[1] = first;
    shell->fail_job = KVP_EDEVICE;
    shell_jobs_run(shell, 1); /* the second one fails before the first is done */
    shell_pump(shell);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 0);
    shell_jobs_run(shell, 1);
    shell_pump(shell);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 2);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4);
    ck_assert_uint_eq(shell_length(shell, a, "p", other), 0);
}
END_TEST

START_TEST(an_executor_that_dies_in_the_middle_is_replaced_and_the_append_done_again)
{
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 6, 0)), KVP_OK);
    shell_pump(shell);
    for (int i = 0; i < 2; i++) {
        shell_executor_kill(shell, 0);
        shell_pump(shell);
        ck_assert_uint_eq(shell->executors[0].n_jobs, 1);
        ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
    }
    ck_assert_uint_eq(shell->executors[0].starts, 3);
    shell_jobs_run(shell, 1);
    shell_pump(shell);
    check_bytes(seq, 1, 6);
}
END_TEST

/* Its bytes and its value are there when the executor dies; its answer is not. */
static void do_without_answer(void)
{
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 4, 0)), KVP_OK);
    shell_pump(shell);
    shell_timelines(shell)[0].value = 1;
    shell_executor_kill(shell, 0);
}

START_TEST(an_append_whose_executor_died_over_the_answer_is_done_and_not_done_again)
{
    do_without_answer();
    ck_assert(shell_step(shell)); /* the core knows; the next one is not there yet */
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 20, 0), KVP_OK);
    shell_pump(shell);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 0);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4);
}
END_TEST

START_TEST(an_append_whose_executor_and_daemon_died_over_the_answer_is_done)
{
    const struct kvp_session_id sessions[] = {a.session};
    do_without_answer();
    shell_restart(shell, sessions, 1);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 4);
    ck_assert_uint_eq(shell_timelines(shell)[0].error, 0);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 20, 0), KVP_OK);
}
END_TEST

START_TEST(an_append_that_failed_before_a_later_one_was_done_is_not_taken_for_done_by_its_value)
{
    const struct kvp_session_id sessions[] = {a.session};
    uint64_t other;
    ck_assert_int_eq(shell_open(shell, a, "p", 2, false, &other), KVP_OK);
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 4, 0)), KVP_OK);
    ck_assert_int_eq(finish(append_as(a, "", other, 2, 0, 4, 0)), KVP_OK);
    shell_pump(shell);
    shell->fail_job = KVP_EINVAL;
    shell_jobs_run(shell, 2); /* the answers are not read */
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 2);
    shell_executor_kill(shell, 0);
    shell_restart(shell, sessions, 1);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
    ck_assert_uint_ne(shell_timelines(shell)[0].error, 0);
}
END_TEST

START_TEST(an_append_over_which_executors_die_again_and_again_is_failed)
{
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 6, 0)), KVP_OK);
    shell_pump(shell);
    for (int i = 0; i < 3; i++) {
        shell_executor_kill(shell, 0);
        shell_pump(shell);
    }
    ck_assert_uint_eq(shell_timelines(shell)[0].error, (uint64_t)-KVP_EDEVICE);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 1);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 0);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
}
END_TEST

START_TEST(an_append_to_a_fork_brings_the_owed_copy_along)
{
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    uint64_t key = 1, child;
    struct kvp_caller b = shell_connect(shell, 1000, 42);
    ck_assert_int_eq(finish(append(0, 6, 0)), KVP_OK);
    shell_pump(shell);
    request.pool = (char *)"p";
    request.n_parents = request.n_keys = 1;
    request.parents = &seq;
    request.keys = &key;
    struct shell_call *call = shell_call(shell, b, KVPOOL__V1__METHOD__METHOD_FORK, &request.base);
    child = ((const Kvpool__V1__ForkReply *)call->reply)->seqs[0];
    ck_assert_int_eq(finish(call), KVP_OK);
    ck_assert_int_eq(finish(append_as(b, "", child, 1, 6, 3, 0)), KVP_OK);
    shell_pump(shell);
    check_bytes(child, 1, 9);
    check_bytes(seq, 1, 6);
}
END_TEST

START_TEST(a_caller_that_goes_does_not_stop_its_append)
{
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    uint64_t key = 5;
    open.session = token;
    open.pool = (char *)"p";
    open.n_keys = 1;
    open.keys = &key;
    struct shell_call *call = shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_OPEN_SEQUENCES, &open.base);
    uint64_t mine = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    shell->hold_jobs = true;
    call = append_as(grpc, token, mine, key, 0, 7, 9);
    shell_call_gone(shell, call);
    shell_pump(shell);
    shell_jobs_run(shell, 1);
    shell_pump(shell);
    ck_assert_uint_eq(shell_length(shell, a, "p", mine), 7);
}
END_TEST

START_TEST(the_sequences_of_a_dead_session_stay_until_its_append_ends)
{
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 6, 0)), KVP_OK);
    shell_pump(shell);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 50);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    shell_jobs_run(shell, 1);
    shell_run_ms(shell, 50);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "p"), KVP_OK);
}
END_TEST

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

static struct shell_call *register_buffer(struct kvp_caller caller, struct shell_memory *memory, uint64_t offset,
                                          uint64_t call_id)
{
    Kvpool__V1__RegisterBufferRequest request = KVPOOL__V1__REGISTER_BUFFER_REQUEST__INIT;
    request.call_id = call_id;
    request.device = (char *)"host";
    request.bytes = memory->size - offset;
    request.offset = offset;
    struct shell_call *call =
        shell_send(shell, caller, KVPOOL__V1__METHOD__METHOD_REGISTER_BUFFER, &request.base, memory);
    shell_pump(shell);
    ck_assert(call->answered);
    return call;
}

static uint32_t buffer_ok(struct shell_memory *memory, uint64_t offset, uint64_t call_id)
{
    struct shell_call *call = register_buffer(a, memory, offset, call_id);
    ck_assert_int_eq(call->status, KVP_OK);
    uint32_t number = ((const Kvpool__V1__RegisterBufferReply *)call->reply)->buffer;
    shell_call_free(shell, call);
    return number;
}

static void drop_memory(struct shell_memory *memory)
{
    ck_assert_uint_eq(memory->holders, 1);
    free(memory->bytes);
    free(memory);
}

START_TEST(an_append_from_a_buffer_reads_it_with_its_strides)
{
    struct shell_memory *memory = shell_memory(8192);
    uint32_t at = 0, tokens = 5, number = buffer_ok(memory, 128, 3);
    ck_assert_uint_eq(buffer_ok(memory, 128, 3), number);
    uint64_t offsets[PLANES], strides[PLANES];
    for (size_t p = 0; p < PLANES; p++) {
        offsets[p] = p * 1000;
        strides[p] = 40;
        for (uint32_t t = 0; t < tokens; t++) {
            for (size_t i = 0; i < TOKEN_BYTES; i++)
                memory->bytes[128 + p * 1000 + t * 40 + i] = pattern(1, p, t, i);
        }
    }
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    request.pool = (char *)"p";
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = &seq;
    request.at = &at;
    request.tokens = &tokens;
    request.buffer = number;
    request.n_plane_offsets = request.n_token_strides = PLANES;
    request.plane_offsets = offsets;
    request.token_strides = strides;
    offsets[3] = 8192 - 128 - 4 * 40 - TOKEN_BYTES + 2;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base)), KVP_EINVAL);
    offsets[3] = 3000;
    strides[0] = 1ull << 63;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base)), KVP_EINVAL);
    strides[0] = 41;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base)), KVP_EINVAL);
    strides[0] = 40;
    shell_executor_kill(shell, 0);
    shell_pump(shell);
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base)), KVP_OK);
    shell_pump(shell);
    check_bytes(seq, 1, 5);
    Kvpool__V1__UnregisterBufferRequest drop = KVPOOL__V1__UNREGISTER_BUFFER_REQUEST__INIT;
    drop.buffer = number;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_UNREGISTER_BUFFER, &drop.base)), KVP_OK);
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_UNREGISTER_BUFFER, &drop.base)),
                     KVP_ENOENT);
    drop_memory(memory);
}
END_TEST

START_TEST(buffers_are_limited_and_go_with_their_session)
{
    struct shell_memory *memory = shell_memory(64);
    for (int i = 0; i < KVP_BUFFERS_MAX; i++)
        buffer_ok(memory, 0, 0);
    struct shell_call *call = register_buffer(a, memory, 0, 0);
    ck_assert_int_eq(finish(call), KVP_ELIMIT);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_BUFFER), KVP_BUFFERS_MAX);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_BUFFER), 0);
    drop_memory(memory);
}
END_TEST

START_TEST(index_results_into_a_buffer_are_those_of_the_reply)
{
    struct shell_memory *memory = shell_memory(4096);
    uint32_t tokens = 5, number = buffer_ok(memory, 0, 0);
    Kvpool__V1__GetBatchIndicesRequest request = KVPOOL__V1__GET_BATCH_INDICES_REQUEST__INIT;
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 9, 3), KVP_OK);
    request.pool = (char *)"p";
    request.n_seqs = request.n_tokens = 1;
    request.seqs = &seq;
    request.tokens = &tokens;
    struct shell_call *into_reply = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base);
    const Kvpool__V1__GetBatchIndicesReply *expected = (const Kvpool__V1__GetBatchIndicesReply *)into_reply->reply;
    ck_assert_uint_eq(expected->n_slots, 5);
    for (uint32_t wanted = 8; wanted != 0; wanted <<= 1) { /* without a buffer there are the first three */
        request.wanted = wanted | 1;
        ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base)),
                         KVP_EINVAL);
    }
    request.buffer = number;
    request.wanted = 128; /* no output at all */
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base)),
                     KVP_EINVAL);
    request.wanted = 0;
    request.positions_offset = 100;
    request.slots_offset = 4092;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base)),
                     KVP_EINVAL);
    request.slots_offset = 4080;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base)),
                     KVP_EINVAL);
    request.slots_offset = 200;
    struct shell_call *call = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base);
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(((const Kvpool__V1__GetBatchIndicesReply *)call->reply)->value, 1);
    shell_call_free(shell, call);
    shell_pump(shell);
    ck_assert_uint_eq(shell_timelines(shell)[0].value, 1);
    ck_assert_mem_eq(memory->bytes, expected->batch_indices, 5 * 4);
    ck_assert_mem_eq(memory->bytes + 100, expected->positions, 5 * 4);
    ck_assert_mem_eq(memory->bytes + 200, expected->slots, 5 * 8);
    shell_call_free(shell, into_reply);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 20);
    drop_memory(memory);
}
END_TEST

/* ---- memory of the executor's own -------------------------------------------------------------------------------- */

START_TEST(a_pool_for_legacy_handles_is_lost_with_its_executor)
{
    Kvpool__V1__AttachRequest attach = KVPOOL__V1__ATTACH_REQUEST__INIT;
    attach.session = token;
    attach.pool = (char *)"p";
    struct shell_call *call = shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_ATTACH, &attach.base);
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(((const Kvpool__V1__AttachReply *)call->reply)->slabs[0]->ipc_handle.len, 64);
    ck_assert_uint_eq(call->n_things, 0);
    shell_call_free(shell, call);
    shell->hold_jobs = true;
    ck_assert_int_eq(finish(append(0, 4, 0)), KVP_OK);
    shell_pump(shell);
    shell_executor_kill(shell, 0);
    shell_pump(shell);
    const struct kvp_table_header *table = (const void *)shell_thing(shell, (struct kvp_thing){KVP_THING_TABLE, 0, 0});
    ck_assert_uint_eq(table->state, KVP_TABLE_LOST);
    ck_assert_uint_eq(shell_timelines(shell)[0].error, (uint64_t)-KVP_ELOST);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 4, 0), KVP_ELOST);
    ck_assert_int_eq(shell_close(shell, a, "p", seq), KVP_OK);
    Kvpool__V1__DetachRequest detach = KVPOOL__V1__DETACH_REQUEST__INIT;
    detach.pool = (char *)"p";
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_DETACH, &detach.base)), KVP_OK);
    detach.session = token;
    ck_assert_int_eq(finish(shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_DETACH, &detach.base)), KVP_OK);
    ck_assert_int_eq(shell_delete_pool(shell, a, "p"), KVP_OK);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_appends");
    TCase *t = tcase_create("host");
    tcase_add_checked_fixture(t, begin, end);
    tcase_add_test(t, what_a_dead_session_was_to_reach_is_ended_before_the_work_that_waits_for_it);
    tcase_add_test(t, nobody_waits_for_a_timeline_that_nobody_owns);
    tcase_add_test(t, an_append_is_answered_at_intent_and_counts_when_it_is_done);
    tcase_add_test(t, who_saw_the_timeline_sees_the_tokens);
    tcase_add_test(t, over_grpc_an_append_is_answered_when_it_is_done);
    tcase_add_test(t, an_append_at_another_length_changes_nothing);
    tcase_add_test(t, wrong_appends_are_refused_before_anything_changes);
    tcase_add_test(t, a_failed_append_leaves_the_length_and_tells_the_timeline);
    tcase_add_test(t, a_failed_value_waits_for_those_before_it);
    tcase_add_test(t, an_executor_that_dies_in_the_middle_is_replaced_and_the_append_done_again);
    tcase_add_test(t, an_append_whose_executor_died_over_the_answer_is_done_and_not_done_again);
    tcase_add_test(t, an_append_whose_executor_and_daemon_died_over_the_answer_is_done);
    tcase_add_test(t, an_append_that_failed_before_a_later_one_was_done_is_not_taken_for_done_by_its_value);
    tcase_add_test(t, an_append_over_which_executors_die_again_and_again_is_failed);
    tcase_add_test(t, an_append_to_a_fork_brings_the_owed_copy_along);
    tcase_add_test(t, a_caller_that_goes_does_not_stop_its_append);
    tcase_add_test(t, the_sequences_of_a_dead_session_stay_until_its_append_ends);
    tcase_add_test(t, an_append_from_a_buffer_reads_it_with_its_strides);
    tcase_add_test(t, buffers_are_limited_and_go_with_their_session);
    tcase_add_test(t, index_results_into_a_buffer_are_those_of_the_reply);
    suite_add_tcase(suite, t);
    TCase *cuda = tcase_create("legacy handles");
    tcase_add_checked_fixture(cuda, begin_legacy, end);
    tcase_add_test(cuda, a_pool_for_legacy_handles_is_lost_with_its_executor);
    suite_add_tcase(suite, cuda);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
