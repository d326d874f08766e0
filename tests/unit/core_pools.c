/**
 * The core's pools and sessions: made, described, deleted; opened, kept, closed; who may do what.
 */
#include "core_shell.h"

#include <string.h>

static const struct pool_of small = {.name = "p", .pages = 16, .page_tokens = 4, .layers = 2, .max_sequences = 8};
static struct shell *shell;
static struct kvp_caller grpc;

static void begin(void)
{
    shell = shell_begin("host");
    grpc = shell_grpc(1000, 77);
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

/* A session by lease; its token stays valid until the next call of this. */
static const char *open_lease(struct kvp_caller caller, uint32_t lease_ms)
{
    static char token[64];
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    request.lease_ms = lease_ms;
    struct shell_call *call = CALL(caller, OPEN_SESSION, request);
    ck_assert_int_eq(call->status, KVP_OK);
    snprintf(token, sizeof(token), "%s", ((const Kvpool__V1__OpenSessionReply *)call->reply)->session);
    shell_call_free(shell, call);
    return token;
}

static enum kvp_status keep_alive(struct kvp_caller caller, const char *token)
{
    Kvpool__V1__KeepAliveRequest request = KVPOOL__V1__KEEP_ALIVE_REQUEST__INIT;
    request.session = (char *)token;
    return finish(CALL(caller, KEEP_ALIVE, request));
}

/* ---- pools ------------------------------------------------------------------------------------------------------- */

START_TEST(a_pool_is_made_described_listed_and_deleted)
{
    struct shell_call *call = shell_create_pool(shell, grpc, &small);
    ck_assert_int_eq(call->status, KVP_OK);
    const Kvpool__V1__PoolInfo *info = ((const Kvpool__V1__CreatePoolReply *)call->reply)->pool;
    ck_assert_uint_eq(info->n_layout, 4);
    ck_assert_uint_eq(info->free_pages, 16);
    ck_assert_uint_eq(info->spec->max_sequence_tokens, 64);
    ck_assert_uint_eq(info->layout_digest.len, 16);
    ck_assert_str_eq(info->spec->devices[0], "host");
    ck_assert_str_eq(info->backend, "host");
    shell_call_free(shell, call);
    const struct kvp_table_header *table = (const void *)shell_thing(shell, (struct kvp_thing){KVP_THING_TABLE, 0, 0});
    ck_assert_uint_eq(table->magic, KVP_TABLE_MAGIC);
    ck_assert_uint_eq(table->state, KVP_TABLE_LIVE);
    ck_assert_uint_eq(table->row_pages, 16);
    Kvpool__V1__ListPoolsRequest list = KVPOOL__V1__LIST_POOLS_REQUEST__INIT;
    call = CALL(grpc, LIST_POOLS, list);
    ck_assert_uint_eq(((const Kvpool__V1__ListPoolsReply *)call->reply)->n_names, 1);
    shell_call_free(shell, call);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "p"), KVP_OK);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "p"), KVP_ENOENT);
    for (const char *kind = "tlps"; *kind != '\0'; kind++)
        ck_assert_uint_eq(shell_thing_count(shell, (enum kvp_thing_kind) * kind), 0);
    ck_assert_ptr_null(shell->executors[0].slabs[0].memory);
}
END_TEST

static void expect_differs(struct pool_of other, const char *fields)
{
    char text[200];
    struct shell_call *call = shell_create_pool(shell, grpc, &other);
    snprintf(text, sizeof(text), "name: pool \"p\" exists and differs from what is asked in %s", fields);
    ck_assert_int_eq(call->status, KVP_EEXIST);
    ck_assert_str_eq(shell_error(call), text);
    shell_call_free(shell, call);
}

START_TEST(the_same_pool_is_answered_and_another_of_its_name_is_refused_with_what_differs)
{
    struct pool_of more = small, tenants = small;
    Kvpool__V1__TenantShare share = KVPOOL__V1__TENANT_SHARE__INIT;
    share.tenant = 7;
    tenants.tenants[0] = &share;
    more.pages = 17;
    more.layers = 3;
    more.page_digests = true;
    shell_make_pool(shell, grpc, &small);
    shell_make_pool(shell, grpc, &small);
    expect_differs(more, "pages, planes, max_sequence_tokens, page_digests");
    expect_differs(tenants, "tenants");
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_SLAB), 1);
}
END_TEST

START_TEST(a_pool_that_can_not_be_is_refused_with_the_value_and_the_limit)
{
    static const struct {
        struct pool_of pool;
        const char *text;
    } wrong[] = {
        {{.name = "", .pages = 4, .page_tokens = 4, .layers = 1}, "name: 0 bytes"},
        {{.name = "a b", .pages = 4, .page_tokens = 4, .layers = 1}, "name: byte 1"},
        {{.name = "p", .pages = 0, .page_tokens = 4, .layers = 1}, "pages: 0, must be 1 to"},
        {{.name = "p", .pages = 4, .page_tokens = 5000, .layers = 1}, "page_tokens: 5000, must be 1 to 4096"},
        {{.name = "p", .pages = 4, .page_tokens = 4, .layers = 0}, "planes: 0"},
        {{.name = "p", .pages = 4, .page_tokens = 4, .layers = 1, .max_sequences = 70000}, "max_sequences: 70000"},
        {{.name = "p", .pages = 4, .page_tokens = 4, .layers = 1, .max_sequence_tokens = 1u << 25},
         "max_sequence_tokens"},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct shell_call *call = shell_create_pool(shell, grpc, &wrong[i].pool);
        ck_assert_int_eq(call->status, KVP_EINVAL);
        ck_assert_msg(strstr(shell_error(call), wrong[i].text) != NULL, "%s", shell_error(call));
        shell_call_free(shell, call);
    }
    struct pool_of legacy = small;
    legacy.legacy = true;
    struct shell_call *call = shell_create_pool(shell, grpc, &legacy);
    ck_assert_int_eq(call->status, KVP_ENODEV);
    shell_call_free(shell, call);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_TABLE), 0);
}
END_TEST

/* What a failure at each stage leaves behind: nothing, and the next pool is made. */
START_TEST(a_pool_that_fails_half_made_leaves_nothing)
{
    for (int stage = 0; stage < 3; stage++) {
        enum kvp_status expected = stage == 0 ? KVP_EDEVICE : KVP_ENOMEM;
        if (stage == 0)
            shell->fail_slab = KVP_EDEVICE;
        if (stage == 1)
            shell->fail_thing = KVP_ENOMEM;
        if (stage == 2)
            shell->fail_back = KVP_ENOMEM;
        struct shell_call *call = shell_create_pool(shell, grpc, &small);
        ck_assert_int_eq(call->status, expected);
        shell_call_free(shell, call);
        shell_pump(shell);
        for (const char *kind = "tls"; *kind != '\0'; kind++)
            ck_assert_uint_eq(shell_thing_count(shell, (enum kvp_thing_kind) * kind), 0);
        ck_assert_ptr_null(shell->executors[0].slabs[0].memory);
        shell_audit(shell);
    }
    shell_make_pool(shell, grpc, &small);
}
END_TEST

static struct shell_call *send_create(const char *name)
{
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    Kvpool__V1__Plane plane = KVPOOL__V1__PLANE__INIT, *planes[1] = {&plane};
    plane.component = KVPOOL__V1__COMPONENT__COMPONENT_CKV;
    plane.heads = 1;
    plane.dim = 8;
    plane.dtype = KVPOOL__V1__DTYPE__DTYPE_BF16;
    spec.name = (char *)name;
    spec.pages = spec.page_tokens = 4;
    spec.n_planes = 1;
    spec.planes = planes;
    request.spec = &spec;
    return shell_send(shell, grpc, KVPOOL__V1__METHOD__METHOD_CREATE_POOL, &request.base, NULL);
}

START_TEST(a_caller_that_goes_at_any_moment_leaves_no_half_made_pool)
{
    for (unsigned steps = 0;; steps++) {
        struct shell_call *call = send_create("gone");
        for (unsigned i = 0; i < steps && !call->answered; i++)
            shell_step(shell);
        if (call->answered) {
            ck_assert_int_eq(finish(call), KVP_OK);
            break;
        }
        shell_call_gone(shell, call);
        shell_pump(shell);
        ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_SLAB), 0);
        ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_TABLE), 0);
        shell_audit(shell);
        ck_assert_uint_lt(steps, 50);
    }
}
END_TEST

START_TEST(pools_asked_for_together_are_made_one_behind_the_other)
{
    struct shell_call *calls[3] = {send_create("a"), send_create("b"), send_create("a")};
    shell_pump(shell);
    for (int i = 0; i < 3; i++) {
        ck_assert(calls[i]->answered);
        ck_assert_int_eq(finish(calls[i]), KVP_OK);
    }
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_SLAB), 2);
}
END_TEST

START_TEST(an_executor_that_does_not_start_is_said_and_tried_again_later)
{
    shell->refuse_start = true;
    struct shell_call *call = shell_create_pool(shell, grpc, &small);
    ck_assert_int_eq(call->status, KVP_ENODEV);
    ck_assert_ptr_nonnull(strstr(shell_error(call), "before it said hello"));
    shell_call_free(shell, call);
    ck_assert_uint_eq(shell->executors[0].starts, 3);
    ck_assert_int_eq(finish(shell_create_pool(shell, grpc, &small)), KVP_ENODEV);
    ck_assert_uint_eq(shell->executors[0].starts, 3);
    shell->refuse_start = false;
    shell_run_ms(shell, 2000);
    shell_make_pool(shell, grpc, &small);
}
END_TEST

START_TEST(a_pool_in_use_is_not_deleted)
{
    uint64_t seq;
    struct kvp_caller worker = shell_connect(shell, 1000, 42);
    shell_make_pool(shell, worker, &small);
    ck_assert_int_eq(shell_open(shell, worker, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_delete_pool(shell, worker, "p"), KVP_EBUSY);
    kvp_core_process_ended(shell->core, worker.session);
    shell_run_ms(shell, 10);
    ck_assert_int_eq(shell_delete_pool(shell, grpc, "p"), KVP_OK);
}
END_TEST

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

START_TEST(a_lease_is_kept_by_calls_and_ends_without_them)
{
    const char *token = open_lease(grpc, 1000);
    for (int i = 0; i < 5; i++) {
        shell_run_ms(shell, 800);
        ck_assert_int_eq(keep_alive(grpc, token), KVP_OK);
    }
    shell_run_ms(shell, 1100);
    ck_assert_int_eq(keep_alive(grpc, token), KVP_ESESSION);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

START_TEST(a_token_is_bound_to_its_user_and_works_at_both_doors)
{
    struct kvp_caller other = shell_grpc(1001, 78), worker = shell_connect(shell, 1000, 5);
    const char *token = open_lease(grpc, 0);
    ck_assert_int_eq(keep_alive(worker, token), KVP_OK);
    ck_assert_int_eq(keep_alive(other, token), KVP_EPERM);
    ck_assert_int_eq(keep_alive(shell_tcp(), token), KVP_EPERM);
    ck_assert_int_eq(keep_alive(grpc, "00000000000000000000000000000000"), KVP_ESESSION);
    ck_assert_int_eq(keep_alive(grpc, "nonsense"), KVP_ESESSION);
    ck_assert_int_eq(keep_alive(grpc, ""), KVP_ESESSION);
    ck_assert_int_eq(keep_alive(worker, ""), KVP_OK);
    Kvpool__V1__CloseSessionRequest request = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
    request.session = (char *)token;
    ck_assert_int_eq(finish(CALL(grpc, CLOSE_SESSION, request)), KVP_OK);
    ck_assert_int_eq(keep_alive(grpc, token), KVP_ESESSION);
}
END_TEST

START_TEST(a_session_socket_closes_its_session_and_is_hung_up)
{
    struct kvp_caller worker = shell_connect(shell, 1000, 5);
    Kvpool__V1__CloseSessionRequest request = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
    ck_assert_int_eq(finish(CALL(worker, CLOSE_SESSION, request)), KVP_OK);
    ck_assert_uint_eq(shell->hung_up.generation, worker.session.generation);
    ck_assert_int_eq(keep_alive(worker, ""), KVP_ESESSION);
    kvp_core_disconnected(shell->core, worker.session);
}
END_TEST

START_TEST(over_tcp_pools_are_not_made_and_not_mapped)
{
    Kvpool__V1__AttachRequest attach = KVPOOL__V1__ATTACH_REQUEST__INIT;
    Kvpool__V1__GetStatsRequest stats = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    shell_make_pool(shell, grpc, &small);
    struct shell_call *call = shell_create_pool(shell, shell_tcp(), &small);
    ck_assert_int_eq(finish(call), KVP_EPERM);
    ck_assert_int_eq(finish(CALL(shell_tcp(), GET_STATS, stats)), KVP_ESESSION);
    attach.session = (char *)open_lease(shell_tcp(), 0);
    attach.pool = (char *)"p";
    ck_assert_int_eq(finish(CALL(shell_tcp(), ATTACH, attach)), KVP_EPERM);
    stats.session = attach.session;
    ck_assert_int_eq(finish(CALL(shell_tcp(), GET_STATS, stats)), KVP_OK);
}
END_TEST

START_TEST(without_a_session_calls_say_how_to_get_one)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    shell_make_pool(shell, grpc, &small);
    request.pool = (char *)"p";
    struct shell_call *call = CALL(grpc, OPEN_SEQUENCES, request);
    ck_assert_int_eq(call->status, KVP_ESESSION);
    ck_assert_ptr_nonnull(strstr(shell_error(call), "OpenSession"));
    shell_call_free(shell, call);
}
END_TEST

START_TEST(numbers_out_of_range_are_refused_with_their_limits)
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    request.lease_ms = 5;
    ck_assert_int_eq(finish(CALL(grpc, OPEN_SESSION, request)), KVP_EINVAL);
    request.lease_ms = 1000;
    request.name = (char *)"a name that is longer than what thirty-one bytes hold";
    ck_assert_int_eq(finish(CALL(grpc, OPEN_SESSION, request)), KVP_EINVAL);
}
END_TEST

START_TEST(a_draining_core_takes_no_calls)
{
    ck_assert_uint_eq(kvp_core_drain(shell->core), 0);
    ck_assert_int_eq(keep_alive(shell_grpc(1, 1), "x"), KVP_EAGAIN);
    struct kvp_caller caller = {.door = KVP_DOOR_SOCKET, .known = true};
    ck_assert_int_eq(kvp_core_connect(shell->core, &caller, 0, &caller.session), KVP_EAGAIN);
}
END_TEST

START_TEST(stats_and_audit_tell_what_there_is)
{
    Kvpool__V1__GetStatsRequest stats = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    Kvpool__V1__AuditRequest audit = KVPOOL__V1__AUDIT_REQUEST__INIT;
    uint64_t seq;
    struct kvp_caller worker = shell_connect(shell, 1000, 5);
    shell_make_pool(shell, worker, &small);
    ck_assert_int_eq(shell_open(shell, worker, "p", 1, false, &seq), KVP_OK);
    struct shell_call *call = CALL(grpc, GET_STATS, stats);
    const Kvpool__V1__GetStatsReply *reply = (const Kvpool__V1__GetStatsReply *)call->reply;
    ck_assert_uint_eq(reply->n_pools, 1);
    ck_assert_uint_eq(reply->pools[0]->sequences, 1);
    ck_assert_uint_eq(reply->n_sessions, 1);
    ck_assert_uint_eq(reply->sessions[0]->sequences, 1);
    ck_assert_uint_eq(reply->sessions[0]->pid, 5);
    ck_assert_uint_eq(reply->n_executors, 1);
    ck_assert_uint_eq(reply->epoch, 1);
    ck_assert_uint_eq(reply->calls, 2);
    shell_call_free(shell, call);
    call = CALL(grpc, AUDIT, audit);
    ck_assert(((const Kvpool__V1__AuditReply *)call->reply)->clean);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_message_of_another_type_is_refused)
{
    Kvpool__V1__AuditRequest audit = KVPOOL__V1__AUDIT_REQUEST__INIT;
    ck_assert_int_eq(finish(shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_GET_STATS, &audit.base)), KVP_EPROTO);
    ck_assert_ptr_null(kvp_method_by_number(63));
    ck_assert_ptr_null(kvp_method_by_name("Nonsense"));
    for (unsigned i = 0; i < kvp_method_count; i++) {
        ck_assert_ptr_eq(kvp_method_by_number(kvp_methods[i].number), &kvp_methods[i]);
        ck_assert_ptr_eq(kvp_method_by_name(kvp_methods[i].name), &kvp_methods[i]);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_pools");
    TCase *t = tcase_create("pools and sessions");
    tcase_add_checked_fixture(t, begin, end);
    tcase_add_test(t, a_pool_is_made_described_listed_and_deleted);
    tcase_add_test(t, the_same_pool_is_answered_and_another_of_its_name_is_refused_with_what_differs);
    tcase_add_test(t, a_pool_that_can_not_be_is_refused_with_the_value_and_the_limit);
    tcase_add_test(t, a_pool_that_fails_half_made_leaves_nothing);
    tcase_add_test(t, a_caller_that_goes_at_any_moment_leaves_no_half_made_pool);
    tcase_add_test(t, pools_asked_for_together_are_made_one_behind_the_other);
    tcase_add_test(t, an_executor_that_does_not_start_is_said_and_tried_again_later);
    tcase_add_test(t, a_pool_in_use_is_not_deleted);
    tcase_add_test(t, a_lease_is_kept_by_calls_and_ends_without_them);
    tcase_add_test(t, a_token_is_bound_to_its_user_and_works_at_both_doors);
    tcase_add_test(t, a_session_socket_closes_its_session_and_is_hung_up);
    tcase_add_test(t, over_tcp_pools_are_not_made_and_not_mapped);
    tcase_add_test(t, without_a_session_calls_say_how_to_get_one);
    tcase_add_test(t, numbers_out_of_range_are_refused_with_their_limits);
    tcase_add_test(t, a_draining_core_takes_no_calls);
    tcase_add_test(t, stats_and_audit_tell_what_there_is);
    tcase_add_test(t, a_message_of_another_type_is_refused);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
