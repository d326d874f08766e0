/**
 * Page digests: taken of every page that is sealed, kept through deaths, and compared with what the bytes are.
 */
#include "core_shell.h"

#include "state.h"

#include <string.h>

static const struct pool_of kept = {
    .name = "p", .pages = 64, .page_tokens = 4, .layers = 1, .max_sequences = 16, .page_digests = true};
static const struct pool_of unkept = {.name = "plain", .pages = 16, .page_tokens = 4, .layers = 1, .max_sequences = 8};
static struct shell *shell;
static struct kvp_caller worker, grpc;

static void begin_with(const struct pool_of *pool)
{
    shell = shell_begin("host");
    worker = shell_connect(shell, 1000, 41);
    grpc = shell_grpc(1000, 90);
    shell_make_pool(shell, worker, pool);
    shell_attach(shell, worker, "p");
}

static void begin(void)
{
    begin_with(&kept);
}

static void end(void)
{
    shell_end(shell);
}

struct checked {
    uint64_t checked, missing, damaged;
    uint32_t page; /* the first that is damaged */
};

static struct checked what_of(const struct shell_call *call)
{
    ck_assert(call->answered);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    const Kvpool__V1__AuditReply *reply = (const Kvpool__V1__AuditReply *)call->reply;
    ck_assert_uint_eq(reply->n_damaged_pages, reply->pages_damaged);
    ck_assert_uint_eq(reply->n_damaged_pools, reply->pages_damaged);
    ck_assert_uint_eq(reply->count, reply->pages_damaged);
    ck_assert_int_eq(reply->clean, reply->pages_damaged == 0);
    if (reply->pages_damaged != 0)
        ck_assert_str_eq(reply->damaged_pools[0], "p");
    return (struct checked){reply->pages_checked, reply->pages_without_digest, reply->pages_damaged,
                            reply->pages_damaged != 0 ? reply->damaged_pages[0] : 0};
}

static struct shell_call *ask(void)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    request.digests = true;
    return shell_send(shell, grpc, KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base, NULL);
}

static struct checked check(void)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    request.digests = true;
    struct shell_call *call = shell_call(shell, grpc, KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base);
    struct checked result = what_of(call);
    shell_call_free(shell, call);
    return result;
}

#define PAGE_BYTES 64u /* of the first plane: 4 tokens, 2 heads, dim 4, fp16 */

/* The first plane's bytes of a page of the first pool, on that rank. */
static unsigned char *byte_of(uint32_t rank, uint32_t page)
{
    return shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, rank}) + page * PAGE_BYTES;
}

/* A sequence of n full pages, whose bytes are there. @return its handle */
static uint64_t write_pages(uint64_t key, uint32_t n)
{
    struct kvp_seq_view view;
    uint64_t seq;
    ck_assert_int_eq(shell_open(shell, worker, "p", key, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, worker, "p", seq, n * 4, 0), KVP_OK);
    ck_assert_int_eq(kvp_seq_get(&shell->ledger, shell->core->pools[0].id, seq_id(seq), &view), KVP_OK);
    shell_progress(shell, 0)[(uint32_t)seq] = (uint64_t)view.version << 32 | (n * 4); /* as a worker's stream says it */
    ck_assert_uint_eq(shell_length(shell, worker, "p", seq), n * 4);
    return seq;
}

START_TEST(every_page_that_is_sealed_gets_a_digest_and_damage_is_found_by_its_page)
{
    uint64_t seq = write_pages(1, 5);
    shell_run_ms(shell, 100);
    struct checked all = check();
    ck_assert_uint_eq(all.checked, 5);
    ck_assert_uint_eq(all.missing, 0);
    ck_assert_uint_eq(all.damaged, 0);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX); /* and then it sleeps */
    byte_of(0, 3)[1] ^= 1;
    all = check();
    ck_assert_uint_eq(all.checked, 5);
    ck_assert_uint_eq(all.damaged, 1);
    ck_assert_uint_eq(all.page, 3);
    byte_of(0, 3)[1] ^= 1;
    ck_assert_uint_eq(check().damaged, 0);
    ck_assert_int_eq(shell_close(shell, worker, "p", seq), KVP_OK);
    shell_run_ms(shell, 100);
    byte_of(0, 3)[1] ^= 1;
    ck_assert_uint_eq(check().checked, 0); /* it is nobody's page now */
}
END_TEST

START_TEST(a_pool_that_keeps_none_is_not_read_and_costs_nothing)
{
    struct kvp_pool_view with, without;
    shell_make_pool(shell, worker, &unkept);
    ck_assert_int_eq(kvp_pool_at(&shell->ledger, 0, &with), KVP_OK);
    ck_assert_int_eq(kvp_pool_at(&shell->ledger, 1, &without), KVP_OK);
    ck_assert_uint_eq(with.geometry.page_digests, 1);
    ck_assert_uint_eq(without.geometry.page_digests, 0);
    unsigned before = shell->executors[0].jobs_done;
    ck_assert_uint_eq(check().checked, 0);
    ck_assert_uint_eq(shell->executors[0].jobs_done, before);
}
END_TEST

START_TEST(a_page_that_is_reused_while_its_digest_is_taken_keeps_none_of_the_earlier_bytes)
{
    shell->hold_jobs = true;
    uint64_t first = write_pages(1, 3);
    memset(byte_of(0, 0), 1, 3 * PAGE_BYTES);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 1); /* with the pages as they are now */
    ck_assert_int_eq(shell_close(shell, worker, "p", first), KVP_OK);
    shell_run_ms(shell, 100);
    write_pages(2, 3);
    shell_jobs_run(shell, 1);
    shell_pump(shell);
    memset(byte_of(0, 0), 2, 3 * PAGE_BYTES); /* the digest that was taken is not that of these bytes */
    shell_run_ms(shell, 100);
    struct shell_call *call = ask();
    for (int i = 0; i < 20 && !call->answered; i++) {
        shell_jobs_run(shell, 1);
        shell_run_ms(shell, 1);
    }
    struct checked all = what_of(call);
    ck_assert_uint_eq(all.checked, 3);
    ck_assert_uint_eq(all.damaged, 0);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_page_that_goes_while_it_is_compared_is_not_reported)
{
    uint64_t seq = write_pages(1, 3);
    shell_run_ms(shell, 100);
    shell->hold_jobs = true;
    struct shell_call *call = ask();
    shell_run_ms(shell, 1);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 1);
    ck_assert_int_eq(shell_close(shell, worker, "p", seq), KVP_OK);
    shell_run_ms(shell, 10);
    memset(byte_of(0, 0), 7, 3 * PAGE_BYTES);
    shell->hold_jobs = false;
    shell_jobs_run(shell, 1);
    shell_run_ms(shell, 10);
    struct checked all = what_of(call);
    ck_assert_uint_eq(all.checked, 0);
    ck_assert_uint_eq(all.damaged, 0);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_digest_that_a_dead_executor_was_taking_is_taken_by_the_next)
{
    shell->hold_jobs = true;
    write_pages(1, 3);
    shell_run_ms(shell, 100);
    shell_executor_kill(shell, 0);
    shell->hold_jobs = false;
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(check().checked, 3);
    ck_assert_uint_eq(check().missing, 0);
}
END_TEST

START_TEST(executors_that_die_over_it_again_and_again_are_left_alone_for_a_while)
{
    shell->hold_jobs = true;
    write_pages(1, 3);
    for (int i = 0; i < KVP_JOB_ATTEMPTS; i++) {
        shell_run_ms(shell, 100);
        ck_assert_uint_eq(shell->executors[0].n_jobs, 1);
        shell_executor_kill(shell, 0);
        shell_run_ms(shell, 0);
    }
    shell_run_ms(shell, 5000);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 0);
    shell->hold_jobs = false;
    ck_assert_uint_eq(check().missing, 3);
    shell_run_ms(shell, 6000);
    ck_assert_uint_eq(check().checked, 3);
}
END_TEST

START_TEST(what_a_killed_daemon_did_not_get_to_is_found_by_the_next_and_nothing_is_mixed_up)
{
    const struct kvp_session_id sessions[] = {worker.session};
    write_pages(1, 3);
    shell_run_ms(shell, 100); /* these have theirs */
    shell->hold_jobs = true;
    write_pages(2, 4);
    shell_run_ms(shell, 100); /* these are asked for … */
    ck_assert_uint_eq(shell->executors[0].n_jobs, 1);
    write_pages(3, 2); /* … and these are not */
    shell_restart(shell, sessions, 1);
    shell->hold_jobs = false;
    shell_jobs_run(shell, SHELL_JOBS_MAX); /* the old batch is answered to the new daemon */
    shell_run_ms(shell, 200);
    struct checked all = check();
    ck_assert_uint_eq(all.checked, 9);
    ck_assert_uint_eq(all.missing, 0);
    ck_assert_uint_eq(all.damaged, 0);
    byte_of(0, 8)[0] ^= 1;
    ck_assert_uint_eq(check().page, 8);
}
END_TEST

START_TEST(an_earlier_daemons_batch_of_the_same_number_and_size_is_not_taken_for_this_ones)
{
    const struct kvp_session_id sessions[] = {worker.session};
    uint64_t held;
    shell->hold_jobs = true;
    uint64_t first = write_pages(1, 3);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 1); /* pages 0 to 2 */
    ck_assert_int_eq(shell_close(shell, worker, "p", first), KVP_OK);
    shell_run_ms(shell, 100);
    ck_assert_int_eq(shell_open(shell, worker, "p", 2, false, &held), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, worker, "p", held, 12, 0), KVP_OK);
    write_pages(3, 3);
    memset(byte_of(0, 3), 9, 3 * PAGE_BYTES);
    shell_restart(shell, sessions, 1);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(shell->executors[0].n_jobs, 2); /* the new daemon's first batch: pages 3 to 5 */
    shell->hold_jobs = false;
    shell_jobs_run(shell, 2);
    shell_run_ms(shell, 100);
    struct checked all = check();
    ck_assert_uint_eq(all.checked, 3);
    ck_assert_uint_eq(all.damaged, 0);
}
END_TEST

START_TEST(damage_on_any_gpu_of_a_pool_is_found)
{
    struct pool_of both = kept;
    shell_end(shell);
    both.devices[0] = "GPU-00000000-0000-0000-0000-000000000001";
    both.devices[1] = "GPU-00000000-0000-0000-0000-000000000002";
    shell = shell_begin("cuda");
    worker = shell_connect(shell, 1000, 41);
    shell_make_pool(shell, worker, &both);
    shell_attach(shell, worker, "p");
    write_pages(1, 5);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(check().checked, 5);
    ck_assert_uint_eq(check().damaged, 0);
    for (uint32_t rank = 0; rank < 2; rank++) {
        byte_of(rank, 2 + rank)[5] ^= 0x80;
        ck_assert_uint_eq(check().page, 2 + rank);
        byte_of(rank, 2 + rank)[5] ^= 0x80;
    }
    ck_assert_uint_eq(check().damaged, 0);
    /* what is changed on both alike is damage, too */
    byte_of(0, 1)[0] ^= 1;
    byte_of(1, 1)[0] ^= 1;
    ck_assert_uint_eq(check().damaged, 1);
}
END_TEST

START_TEST(checks_asked_for_together_are_one_and_a_pool_deleted_meanwhile_is_no_matter)
{
    uint64_t seq = write_pages(1, 3);
    shell_run_ms(shell, 100);
    shell->hold_jobs = true;
    struct shell_call *first = ask(), *second = ask();
    shell_run_ms(shell, 1);
    struct shell_call *late = ask(); /* that one has begun: this is another */
    ck_assert_uint_eq(shell->executors[0].n_jobs, 1);
    ck_assert_int_eq(shell_close(shell, worker, "p", seq), KVP_OK);
    Kvpool__V1__DetachRequest detach = KVPOOL__V1__DETACH_REQUEST__INIT;
    detach.pool = (char *)"p";
    shell_run_ms(shell, 10);
    struct shell_call *call = shell_send(shell, worker, KVPOOL__V1__METHOD__METHOD_DETACH, &detach.base, NULL);
    ck_assert_int_eq(call->status, KVP_OK);
    shell_call_free(shell, call);
    ck_assert_int_eq(shell_delete_pool(shell, worker, "p"), KVP_OK);
    shell->hold_jobs = false;
    shell_executor_kill(shell, 0);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(what_of(first).checked, 0);
    ck_assert_uint_eq(what_of(second).checked, 0);
    ck_assert_uint_eq(what_of(late).checked, 0);
    ck_assert_uint_eq(shell->core->digests.check.begun, 2);
    shell_call_free(shell, first);
    shell_call_free(shell, second);
    shell_call_free(shell, late);
}
END_TEST

START_TEST(who_asks_again_and_again_does_not_hold_up_the_taking)
{
    static const struct pool_of large = {
        .name = "p", .pages = 640, .page_tokens = 4, .layers = 1, .max_sequences = 16, .page_digests = true};
    struct shell_call *calls[12];
    shell_end(shell);
    begin_with(&large);
    write_pages(1, 300);
    shell_run_ms(shell, 200);
    shell->hold_jobs = true;
    calls[0] = ask();
    shell_run_ms(shell, 1);
    write_pages(2, 300);
    shell_run_ms(shell, 100);
    for (int i = 1; i < 12; i++) { /* always one more before the last is over */
        calls[i] = ask();
        shell_jobs_run(shell, 1);
        shell_run_ms(shell, 1);
    }
    shell->hold_jobs = false;
    shell_jobs_run(shell, 1);
    for (int i = 0; i < 12; i++)
        shell_run_ms(shell, 1);
    ck_assert_uint_eq(what_of(calls[11]).missing, 0);
    ck_assert_uint_eq(what_of(calls[11]).checked, 600);
    for (int i = 0; i < 12; i++)
        shell_call_free(shell, calls[i]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_digests");
    TCase *t = tcase_create("digests");
    tcase_add_checked_fixture(t, begin, end);
    tcase_add_test(t, every_page_that_is_sealed_gets_a_digest_and_damage_is_found_by_its_page);
    tcase_add_test(t, a_pool_that_keeps_none_is_not_read_and_costs_nothing);
    tcase_add_test(t, a_page_that_is_reused_while_its_digest_is_taken_keeps_none_of_the_earlier_bytes);
    tcase_add_test(t, a_page_that_goes_while_it_is_compared_is_not_reported);
    tcase_add_test(t, a_digest_that_a_dead_executor_was_taking_is_taken_by_the_next);
    tcase_add_test(t, executors_that_die_over_it_again_and_again_are_left_alone_for_a_while);
    tcase_add_test(t, what_a_killed_daemon_did_not_get_to_is_found_by_the_next_and_nothing_is_mixed_up);
    tcase_add_test(t, an_earlier_daemons_batch_of_the_same_number_and_size_is_not_taken_for_this_ones);
    tcase_add_test(t, damage_on_any_gpu_of_a_pool_is_found);
    tcase_add_test(t, checks_asked_for_together_are_one_and_a_pool_deleted_meanwhile_is_no_matter);
    tcase_add_test(t, who_asks_again_and_again_does_not_hold_up_the_taking);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
