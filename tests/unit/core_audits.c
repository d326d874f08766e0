/**
 * The ledger audited while it is served: when, how often, of which moment, and what comes of it.
 */
#include "core_shell.h"

#include "layout.h"
#include "state.h"

#include <string.h>

#define AUDIT_MS 60000u

static const struct pool_of small = {.name = "p", .pages = 16, .page_tokens = 4, .layers = 1, .max_sequences = 8};
static struct shell *shell;
static struct kvp_caller worker, grpc;

static void begin(void)
{
    shell = shell_begin("host");
    worker = shell_connect(shell, 1000, 41);
    grpc = shell_grpc(1000, 90);
    shell_make_pool(shell, worker, &small);
}

static void end(void)
{
    shell_end(shell);
}

static Kvpool__V1__GetStatsReply stats(void)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    struct shell_call *call = shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_GET_STATS, &request.base);
    ck_assert_int_eq(call->status, KVP_OK);
    Kvpool__V1__GetStatsReply reply = *(const Kvpool__V1__GetStatsReply *)call->reply; /* its numbers */
    shell_call_free(shell, call);
    return reply;
}

static struct shell_call *ask(void)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    return shell_send(shell, grpc, KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base, NULL);
}

static uint32_t violations_of(const struct shell_call *call)
{
    ck_assert(call->answered);
    ck_assert_int_eq(call->status, KVP_OK);
    const Kvpool__V1__AuditReply *reply = (const Kvpool__V1__AuditReply *)call->reply;
    ck_assert_int_eq(reply->clean, reply->count == 0);
    ck_assert_int_eq(reply->n_violations > 0, reply->count > 0);
    return reply->count;
}

/* A page's record that must be empty: it was never handed out. */
static uint64_t *spare_record(void)
{
    struct kvp_pool_view view;
    shell->spoiled = true;
    ck_assert_int_eq(kvp_pool_at(&shell->ledger, 0, &view), KVP_OK);
    return (uint64_t *)(void *)(shell->block + view.extent_offset) + view.geometry.pages - 1;
}

/* One tick, when the next is due. */
static void tick(void)
{
    ck_assert(shell->wake_ms != UINT64_MAX);
    if (shell->wake_ms > shell->now_ms)
        shell->now_ms = shell->wake_ms;
    shell_tick(shell);
}

static void restart_with_audits_each(uint32_t audit_ms)
{
    struct kvp_session_id sessions[] = {worker.session};
    shell->config.audit_ms = audit_ms;
    shell_restart(shell, sessions, 1);
}

START_TEST(a_changed_ledger_is_audited_in_its_time_and_an_unchanged_one_is_left_alone)
{
    uint64_t seq;
    restart_with_audits_each(AUDIT_MS);
    shell_run_ms(shell, 3600 * 1000);
    ck_assert_uint_eq(stats().audits, 0); /* what was adopted was audited before */
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
    for (uint32_t i = 1; i <= 3; i++) {
        ck_assert_int_eq(shell_open(shell, worker, "p", 2 * i, false, &seq), KVP_OK);
        shell_run_ms(shell, 0); /* the last one is long ago */
        ck_assert_uint_eq(stats().audits, 2 * i - 1);
        ck_assert_uint_eq(stats().last_audit_unix_ms, shell->now_ms);
        ck_assert_int_eq(shell_open(shell, worker, "p", 2 * i + 1, false, &seq), KVP_OK);
        shell_run_ms(shell, AUDIT_MS - 1);
        ck_assert_uint_eq(stats().audits, 2 * i - 1);
        shell_run_ms(shell, 1);
        ck_assert_uint_eq(stats().audits, 2 * i);
        ck_assert_uint_eq(stats().last_audit_violations, 0);
        ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
        shell_run_ms(shell, 3600 * 1000);
        ck_assert_uint_eq(stats().audits, 2 * i);
    }
}
END_TEST

START_TEST(without_an_interval_only_calls_have_it_audited)
{
    uint64_t seq;
    ck_assert_int_eq(shell_open(shell, worker, "p", 1, false, &seq), KVP_OK);
    shell_run_ms(shell, 3600 * 1000);
    ck_assert_uint_eq(stats().audits, 0);
    struct shell_call *call = ask();
    shell_run_ms(shell, 0);
    ck_assert_uint_eq(violations_of(call), 0);
    shell_call_free(shell, call);
    ck_assert_uint_eq(stats().audits, 1);
}
END_TEST

START_TEST(calls_are_carried_out_while_a_snapshot_is_taken_and_two_that_ask_share_it)
{
    struct shell_call *first = ask(), *second = NULL;
    unsigned slices = 0;
    uint64_t seq;
    while (!first->answered) {
        tick();
        if (slices++ == 3)
            second = ask();
        if (slices < 8)
            ck_assert_int_eq(shell_open(shell, worker, "p", slices, false, &seq), KVP_OK);
        if (shell->wake_ms != shell->now_ms)
            shell_pump(shell);
    }
    ck_assert_uint_ge(slices, 8); /* the root part alone is several megabytes */
    ck_assert_uint_eq(violations_of(first), 0);
    ck_assert_uint_eq(violations_of(second), 0);
    ck_assert_uint_eq(shell->snapshots, 1);
    shell_call_free(shell, first);
    shell_call_free(shell, second);
}
END_TEST

START_TEST(who_asks_when_the_snapshot_is_taken_already_gets_another_one)
{
    struct shell_call *first = ask(), *second;
    while (shell->core->audit.phase != AUDIT_READING)
        tick();
    *spare_record() = 1;
    second = ask();
    shell_run_ms(shell, 0);
    ck_assert_uint_eq(violations_of(first), 0); /* of the moment before */
    ck_assert_uint_eq(violations_of(second), 1);
    ck_assert_uint_eq(shell->snapshots, 2);
    *spare_record() = 0;
    shell_call_free(shell, first);
    shell_call_free(shell, second);
}
END_TEST

START_TEST(violations_are_told_counted_and_logged_and_calls_go_on)
{
    uint64_t seq;
    restart_with_audits_each(AUDIT_MS);
    *spare_record() = 1;
    unsigned lines = shell->log_lines;
    ck_assert_int_eq(shell_open(shell, worker, "p", 1, false, &seq), KVP_OK);
    shell_run_ms(shell, AUDIT_MS);
    ck_assert_uint_eq(stats().last_audit_violations, 1);
    ck_assert_uint_eq(shell->log_lines, lines + 2); /* which, and how many */
    ck_assert_int_eq(shell_open(shell, worker, "p", 2, false, &seq), KVP_OK);
    struct shell_call *call = ask();
    shell_run_ms(shell, 0);
    ck_assert_uint_eq(violations_of(call), 1);
    ck_assert_ptr_nonnull(strstr(((const Kvpool__V1__AuditReply *)call->reply)->violations[0], "page 15"));
    shell_call_free(shell, call);
    *spare_record() = 0;
    shell_run_ms(shell, AUDIT_MS);
    ck_assert_uint_eq(stats().last_audit_violations, 1); /* nothing has changed that it would know of */
    ck_assert_int_eq(shell_open(shell, worker, "p", 3, false, &seq), KVP_OK);
    shell_run_ms(shell, AUDIT_MS);
    ck_assert_uint_eq(stats().last_audit_violations, 0);
}
END_TEST

START_TEST(a_pool_made_while_a_snapshot_is_taken_is_in_it)
{
    struct pool_of late = small;
    struct shell_call *call = ask();
    late.name = "late";
    for (int i = 0; i < 5; i++)
        tick();
    ck_assert_int_eq(shell->core->audit.phase, AUDIT_COPYING);
    shell_make_pool(shell, worker, &late);
    shell_run_ms(shell, 0);
    ck_assert_uint_eq(violations_of(call), 0);
    ck_assert_uint_eq(shell->snapshots, 2);
    ck_assert_uint_eq(stats().audits, 1);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(without_memory_for_a_snapshot_the_call_is_refused_and_the_next_one_finds_some)
{
    struct shell_call *call = ask();
    shell->fail_snapshot = true;
    shell_run_ms(shell, 0);
    ck_assert_int_eq(call->status, KVP_ENOMEM);
    ck_assert_ptr_nonnull(strstr(shell_error(call), "no memory for an audit"));
    shell_call_free(shell, call);
    shell->fail_snapshot = false;
    call = ask();
    shell_run_ms(shell, 0);
    ck_assert_uint_eq(violations_of(call), 0);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_caller_that_goes_and_a_daemon_that_ends_leave_no_snapshot_behind)
{
    struct shell_call *call = ask();
    for (int i = 0; i < 3; i++)
        tick();
    shell_call_gone(shell, call);
    shell_run_ms(shell, 0);
    ck_assert_uint_eq(stats().audits, 1);
    ask();
    for (int i = 0; i < 3; i++)
        tick();
    ck_assert(shell->snapshot_out);
} /* and shell_end finds that it was dropped */
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_audits");
    TCase *t = tcase_create("audits");
    tcase_add_checked_fixture(t, begin, end);
    tcase_add_test(t, a_changed_ledger_is_audited_in_its_time_and_an_unchanged_one_is_left_alone);
    tcase_add_test(t, without_an_interval_only_calls_have_it_audited);
    tcase_add_test(t, calls_are_carried_out_while_a_snapshot_is_taken_and_two_that_ask_share_it);
    tcase_add_test(t, who_asks_when_the_snapshot_is_taken_already_gets_another_one);
    tcase_add_test(t, violations_are_told_counted_and_logged_and_calls_go_on);
    tcase_add_test(t, a_pool_made_while_a_snapshot_is_taken_is_in_it);
    tcase_add_test(t, without_memory_for_a_snapshot_the_call_is_refused_and_the_next_one_finds_some);
    tcase_add_test(t, a_caller_that_goes_and_a_daemon_that_ends_leave_no_snapshot_behind);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
