/**
 * How sessions end in the core: end-of-file, pidfd, lease; quarantine, NVML's word, an operator's; durable sequences
 * and who claims them; what others see.
 */
#include "core_shell.h"

#include <string.h>

static const struct pool_of small = {
    .name = "p", .pages = 16, .page_tokens = 4, .layers = 1, .max_sequences = 8, .linger_ms = 1000};
static struct shell *shell;
static struct kvp_caller a, grpc;
static uint32_t attachment_a;
static uint64_t seq;

static void begin_on(const char *backend)
{
    shell = shell_begin(backend);
    a = shell_connect(shell, 1000, 41);
    grpc = shell_grpc(1000, 90);
    shell_make_pool(shell, a, &small);
    attachment_a = shell_attach(shell, a, "p");
    ck_assert_int_eq(shell_open(shell, a, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 8, 5), KVP_OK);
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

static uint32_t state_of(uint64_t handle)
{
    Kvpool__V1__ListSequencesRequest request = KVPOOL__V1__LIST_SEQUENCES_REQUEST__INIT;
    uint32_t state = KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_FREE;
    request.pool = (char *)"p";
    request.all = true;
    struct shell_call *call = CALL(grpc, LIST_SEQUENCES, request);
    const Kvpool__V1__ListSequencesReply *reply = (const Kvpool__V1__ListSequencesReply *)call->reply;
    for (size_t i = 0; i < reply->n_seqs; i++) {
        if (reply->seqs[i] == handle)
            state = reply->states[i];
    }
    shell_call_free(shell, call);
    return state;
}

static uint64_t word(struct kvp_session_id id)
{
    return (uint64_t)id.generation << 32 | id.slot;
}

static struct shell_call *release(uint64_t session)
{
    Kvpool__V1__ReleaseQuarantineRequest request = KVPOOL__V1__RELEASE_QUARANTINE_REQUEST__INIT;
    request.pool = (char *)"p";
    request.session_id = session;
    return CALL(grpc, RELEASE_QUARANTINE, request);
}

/* The last line of the log is a warning that holds this. */
static void expect_said(const char *format, uint64_t session)
{
    char text[256];
    snprintf(text, sizeof(text), format, (unsigned long long)session);
    ck_assert_msg(strncmp(shell->log_last, "<4>", 3) == 0 && strstr(shell->log_last, text) != NULL, "not \"%s\": %s",
                  text, shell->log_last);
}

static struct shell_call *keep_alive(struct kvp_caller caller, const char *session)
{
    Kvpool__V1__KeepAliveRequest request = KVPOOL__V1__KEEP_ALIVE_REQUEST__INIT;
    request.session = (char *)session;
    return CALL(caller, KEEP_ALIVE, request);
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

START_TEST(end_of_file_alone_frees_nothing_and_the_pidfd_does)
{
    uint32_t free_pages = shell_free_pages(shell, "p");
    kvp_core_disconnected(shell->core, a.session);
    shell_run_ms(shell, 5000);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), free_pages);
    ck_assert_uint_eq(state_of(seq), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_QUARANTINED);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
    ck_assert_uint_eq(shell_length(shell, grpc, "p", seq), 5);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(state_of(seq), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_FREE);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_PROGRESS), 0);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "p"), KVP_OK);
}
END_TEST

START_TEST(the_last_words_of_a_dead_writer_count)
{
    struct kvp_caller b = shell_connect(shell, 1000, 42);
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    uint64_t key = 3;
    struct kvp_seq_view view;
    struct kvp_pool_id pool;
    ck_assert_int_eq(kvp_pool_by_name(&shell->ledger, "p", &pool), KVP_OK);
    ck_assert_int_eq(
        kvp_seq_get(&shell->ledger, pool, (struct kvp_seq_id){(uint32_t)seq, (uint32_t)(seq >> 32)}, &view), KVP_OK);
    shell_progress(shell, attachment_a)[(uint32_t)seq] = KVP_PROGRESS_WORD(view.version, 7);
    kvp_core_disconnected(shell->core, a.session);
    request.pool = (char *)"p";
    request.n_parents = request.n_keys = 1;
    request.parents = &seq;
    request.keys = &key;
    struct shell_call *call = CALL(b, FORK, request);
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(((const Kvpool__V1__ForkReply *)call->reply)->written[0], 7);
    uint64_t child = ((const Kvpool__V1__ForkReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 13); /* the child's two, and the source of its copy */
    ck_assert_int_eq(shell_close(shell, b, "p", child), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(who_waits_for_a_dead_owners_timeline_is_told)
{
    struct kvp_timeline *timeline = &shell_timelines(shell)[attachment_a * KVP_TIMELINES_MAX + 3];
    timeline->value = 10;
    kvp_core_disconnected(shell->core, a.session);
    shell_run_ms(shell, 10);
    ck_assert_uint_eq(timeline->value, 10);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 10);
    ck_assert_uint_gt(timeline->value, 1000000);
    ck_assert_uint_eq(timeline->error, (uint64_t)-KVP_ESESSION);
    struct kvp_caller b = shell_connect(shell, 1000, 42);
    uint64_t before = timeline->value;
    ck_assert_uint_eq(shell_attach(shell, b, "p"), attachment_a);
    ck_assert_uint_eq(timeline->error, 0);
    ck_assert_uint_eq(timeline->value, before);
    ck_assert_uint_eq(kvp_timeline_lost(timeline, 10), 0); /* that one was reached, */
    ck_assert_uint_eq(kvp_timeline_lost(timeline, 11), (uint64_t)-KVP_ESESSION);
    ck_assert_uint_eq(kvp_timeline_lost(timeline, before), (uint64_t)-KVP_ESESSION);
    ck_assert_uint_eq(kvp_timeline_lost(timeline, before + 1), 0); /* and this one is the next owner's */
}
END_TEST

START_TEST(a_session_that_mapped_nothing_is_released_at_once)
{
    uint64_t other;
    struct kvp_caller b = shell_connect(shell, 1000, 42);
    ck_assert_int_eq(shell_open(shell, b, "p", 1, false, &other), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, b, "p", other, 12, 12), KVP_OK);
    kvp_core_disconnected(shell->core, b.session);
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
}
END_TEST

START_TEST(an_operator_can_end_a_quarantine_but_not_of_a_living_process)
{
    struct shell_call *call = release(word(a.session));
    ck_assert_uint_eq(((const Kvpool__V1__ReleaseQuarantineReply *)call->reply)->pages, 0);
    ck_assert_int_eq(finish(call), KVP_OK);
    kvp_core_disconnected(shell->core, a.session);
    call = release(word(a.session));
    ck_assert_int_eq(call->status, KVP_EBUSY);
    ck_assert_ptr_nonnull(strstr(shell_error(call), "process 41"));
    shell_call_free(shell, call);
    ck_assert_int_eq(finish(release(0)), KVP_OK);
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
}
END_TEST

START_TEST(a_dead_leaders_pages_come_back_when_its_ranks_have_ended_or_detached)
{
    struct kvp_caller ranks[2] = {shell_connect(shell, 1000, 42), shell_connect(shell, 1000, 43)};
    const struct kvp_session_id sessions[] = {ranks[0].session, ranks[1].session};
    Kvpool__V1__AttachRequest join = KVPOOL__V1__ATTACH_REQUEST__INIT;
    join.pool = (char *)"p";
    join.abi_version = KVP_ABI_VERSION;
    join.join = word(a.session);
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(finish(CALL(ranks[i], ATTACH, join)), KVP_OK);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    Kvpool__V1__DetachRequest detach = KVPOOL__V1__DETACH_REQUEST__INIT;
    detach.pool = (char *)"p";
    ck_assert_int_eq(finish(CALL(ranks[0], DETACH, detach)), KVP_OK);
    shell_restart(shell, sessions, 2);
    kvp_core_process_ended(shell->core, a.session); /* as its pidfd says again */
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    kvp_core_disconnected(shell->core, ranks[1].session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    kvp_core_process_ended(shell->core, ranks[1].session);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

START_TEST(many_sequences_of_a_dead_session_come_back_in_slices)
{
    struct pool_of large = {.name = "large", .pages = 6000, .page_tokens = 1, .layers = 1, .max_sequences = 2000};
    uint64_t keys[1000], seqs[1000];
    uint32_t reserved[1000];
    struct kvp_caller b = shell_connect(shell, 1000, 42);
    shell_make_pool(shell, b, &large);
    shell_attach(shell, b, "large");
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__AdvanceRequest advance = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    for (uint64_t i = 0; i < 1000; i++) {
        keys[i] = i;
        reserved[i] = 6;
    }
    open.pool = advance.pool = (char *)"large";
    open.n_keys = advance.n_seqs = advance.n_reserved = 1000;
    open.keys = keys;
    struct shell_call *call = CALL(b, OPEN_SEQUENCES, open);
    ck_assert_int_eq(call->status, KVP_OK);
    memcpy(seqs, ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs, sizeof(seqs));
    shell_call_free(shell, call);
    advance.seqs = seqs;
    advance.reserved = reserved;
    ck_assert_int_eq(finish(CALL(b, ADVANCE, advance)), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, "large"), 0);
    kvp_core_process_ended(shell->core, b.session);
    shell_tick(shell);
    uint32_t after_one = shell_free_pages(shell, "large");
    ck_assert_uint_gt(after_one, 0);
    ck_assert_uint_le(after_one, KVP_RECLAIM_SLICE);
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(shell_free_pages(shell, "large"), 6000);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "large"), KVP_OK);
}
END_TEST

/* ---- leases ------------------------------------------------------------------------------------------------------ */

static struct shell_call *open_session(struct kvp_caller caller, const uint8_t *secret, uint32_t lease_ms)
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    request.lease_ms = lease_ms;
    request.resume_secret = (ProtobufCBinaryData){secret != NULL ? 16 : 0, (uint8_t *)secret};
    return CALL(caller, OPEN_SESSION, request);
}

static uint64_t open_by_lease(const char *session, uint64_t key)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    request.session = (char *)session;
    request.pool = (char *)"p";
    request.n_keys = 1;
    request.keys = &key;
    struct shell_call *call = CALL(grpc, OPEN_SEQUENCES, request);
    ck_assert_int_eq(call->status, KVP_OK);
    uint64_t handle = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    return handle;
}

START_TEST(a_lapsed_lease_that_attached_stays_in_quarantine_until_an_operator_says_so)
{
    struct shell_call *call = open_session(grpc, NULL, 500);
    const Kvpool__V1__OpenSessionReply *session = (const Kvpool__V1__OpenSessionReply *)call->reply;
    Kvpool__V1__AttachRequest attach = KVPOOL__V1__ATTACH_REQUEST__INIT;
    struct kvp_caller b = shell_connect(shell, 1000, 42);
    attach.session = session->session;
    attach.pool = (char *)"p";
    ck_assert_int_eq(finish(CALL(b, ATTACH, attach)), KVP_OK); /* by the session socket, under the token */
    uint64_t handle = open_by_lease(session->session, 8), id = session->session_id;
    shell_call_free(shell, call);
    shell_run_ms(shell, 1000);
    ck_assert_uint_eq(state_of(handle), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_QUARANTINED);
    expect_said("0 pages of session %llx (pid 90) stay in quarantine: it was by lease", id);
    expect_said("kvpool quarantine release p %llx", id);
    ck_assert_int_eq(finish(release(0)), KVP_OK);
    shell_run_ms(shell, 10);
    ck_assert_uint_eq(state_of(handle), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_QUARANTINED);
    ck_assert_int_eq(finish(release(id)), KVP_OK);
    shell_run_ms(shell, 10);
    ck_assert_uint_eq(state_of(handle), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_FREE);
}
END_TEST

START_TEST(a_lapsed_lease_that_mapped_nothing_is_released)
{
    struct shell_call *call = open_session(grpc, NULL, 500);
    uint64_t handle = open_by_lease(((const Kvpool__V1__OpenSessionReply *)call->reply)->session, 8);
    shell_call_free(shell, call);
    shell_run_ms(shell, 400);
    ck_assert_uint_eq(state_of(handle), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_OPEN);
    shell_run_ms(shell, 200);
    ck_assert_uint_eq(state_of(handle), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_FREE);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

START_TEST(durable_sequences_wait_for_who_shows_the_secret)
{
    uint64_t durable;
    uint8_t secret[16];
    ck_assert_int_eq(shell_open(shell, a, "p", 2, true, &durable), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", durable, 8, 6), KVP_OK);
    struct shell_call *call = keep_alive(a, "");
    memcpy(secret, ((const Kvpool__V1__KeepAliveReply *)call->reply)->resume_secret.data, 16);
    shell_call_free(shell, call);
    ck_assert_int_eq(finish(open_session(grpc, secret, 0)), KVP_EBUSY);
    kvp_core_disconnected(shell->core, a.session);
    ck_assert_int_eq(finish(open_session(grpc, secret, 0)), KVP_EBUSY); /* it may still write */
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 500);
    ck_assert_uint_eq(state_of(durable), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_LINGERING);
    ck_assert_uint_eq(state_of(seq), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_FREE);
    ck_assert_int_eq(finish(open_session(shell_grpc(1001, 5), secret, 0)), KVP_EPERM);
    secret[0] ^= 1;
    ck_assert_int_eq(finish(open_session(grpc, secret, 0)), KVP_ENOENT);
    secret[0] ^= 1;
    call = open_session(grpc, secret, 0);
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(open_by_lease(((const Kvpool__V1__OpenSessionReply *)call->reply)->session, 2), durable);
    shell_call_free(shell, call);
    shell_run_ms(shell, 5000);
    ck_assert_uint_eq(state_of(durable), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_OPEN);
    ck_assert_uint_eq(shell_length(shell, grpc, "p", durable), 6);
    ck_assert_int_eq(finish(open_session(grpc, secret, 0)), KVP_ENOENT);
}
END_TEST

START_TEST(durable_sequences_that_nobody_claims_go_after_the_linger_time)
{
    uint64_t durable;
    ck_assert_int_eq(shell_open(shell, a, "p", 2, true, &durable), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", durable, 8, 6), KVP_OK);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 900);
    ck_assert_uint_eq(state_of(durable), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_LINGERING);
    shell_run_ms(shell, 200);
    ck_assert_uint_eq(state_of(durable), KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_FREE);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

/* ---- on a GPU ---------------------------------------------------------------------------------------------------- */

START_TEST(on_a_gpu_the_pidfd_and_nvml_must_agree)
{
    shell->listing_known = true;
    shell->pids[0] = 41;
    shell->n_pids = 1;
    shell_run_ms(shell, 2000); /* NVML lists it while it lives */
    kvp_core_disconnected(shell->core, a.session);
    shell_run_ms(shell, 100);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    shell->listing_known = false;
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    ck_assert_ptr_null(strstr(shell->log_last, "quarantine")); /* a moment is as it should be */
    shell_run_ms(shell, 10000);
    expect_said("session %llx (pid 41) stay in quarantine: its process ended, and NVML still lists it",
                word(a.session));
    shell->listing_known = true;
    shell->n_pids = 0;
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

START_TEST(on_a_gpu_a_process_that_nvml_never_listed_stays_in_quarantine)
{
    shell->listing_known = true;
    shell_run_ms(shell, 2000);
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 10);
    expect_said("pool p: 2 pages of session %llx", word(a.session));
    expect_said("NVML had not listed it before. If nothing of it runs any more: kvpool quarantine release p %llx",
                word(a.session));
    unsigned lines = shell->log_lines;
    shell_run_ms(shell, 10000);
    ck_assert_uint_eq(shell->log_lines, lines); /* once */
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    struct shell_call *call = release(0);
    ck_assert_uint_eq(((const Kvpool__V1__ReleaseQuarantineReply *)call->reply)->pages, 2);
    ck_assert_int_eq(finish(call), KVP_OK);
    shell_run_ms(shell, 20);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_endings");
    TCase *t = tcase_create("host");
    tcase_add_checked_fixture(t, begin, end);
    tcase_add_test(t, end_of_file_alone_frees_nothing_and_the_pidfd_does);
    tcase_add_test(t, the_last_words_of_a_dead_writer_count);
    tcase_add_test(t, who_waits_for_a_dead_owners_timeline_is_told);
    tcase_add_test(t, a_session_that_mapped_nothing_is_released_at_once);
    tcase_add_test(t, an_operator_can_end_a_quarantine_but_not_of_a_living_process);
    tcase_add_test(t, a_dead_leaders_pages_come_back_when_its_ranks_have_ended_or_detached);
    tcase_add_test(t, many_sequences_of_a_dead_session_come_back_in_slices);
    tcase_add_test(t, a_lapsed_lease_that_attached_stays_in_quarantine_until_an_operator_says_so);
    tcase_add_test(t, a_lapsed_lease_that_mapped_nothing_is_released);
    tcase_add_test(t, durable_sequences_wait_for_who_shows_the_secret);
    tcase_add_test(t, durable_sequences_that_nobody_claims_go_after_the_linger_time);
    suite_add_tcase(suite, t);
    TCase *cuda = tcase_create("cuda");
    tcase_add_checked_fixture(cuda, begin_cuda, end);
    tcase_add_test(cuda, on_a_gpu_the_pidfd_and_nvml_must_agree);
    tcase_add_test(cuda, on_a_gpu_a_process_that_nvml_never_listed_stays_in_quarantine);
    suite_add_tcase(suite, cuda);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
