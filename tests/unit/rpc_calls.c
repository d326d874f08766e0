/**
 * Calls at the gRPC door: who makes them, how they fail, what is refused before the core sees it, how they end early.
 */
#include "rpc_harness.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void call_lengths(void)
{
    struct rpc_client client;

    rpc_client_open(&client, door.target, NULL);
    for (unsigned i = 0; i < 50; i++)
        lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_call_reaches_the_core_with_the_kernels_word_on_who_calls)
{
    open_folder();
    serve(call_lengths);
    ck_assert_uint_eq(core.calls, 50);
    ck_assert_uint_eq(core.gone, 0);
    ck_assert_int_eq(core.caller.door, KVP_DOOR_GRPC);
    ck_assert(core.caller.known);
    ck_assert_uint_eq(core.caller.pid, (uint32_t)getpid());
    ck_assert_uint_eq(core.caller.uid, getuid());
    ck_assert_uint_eq(core.caller.gid, getgid());
    ck_assert_uint_gt(core.deadline_ms, 0);
    ck_assert_uint_eq(core.caller.session.slot, 0);
    close_folder();
}
END_TEST

static void call_and_fail(void)
{
    struct rpc_client client;
    struct rpc_answer answer;
    Kvpool__V1__Error *error;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/DescribePool", "", 0, CALL_MS, NULL, &answer);
    ck_assert_int_eq(answer.code, GRPC_STATUS_NOT_FOUND);
    ck_assert_str_eq(answer.text, "KVP_ENOENT: no pool \"kv?\" \xc3\xa4\n");
    error = kvpool__v1__error__unpack(NULL, answer.error_bytes, answer.error);
    ck_assert_ptr_nonnull(error);
    ck_assert_int_eq(error->status, KVP_ENOENT);
    ck_assert_str_eq(error->message, "no pool \"kv?\" \xc3\xa4\n");
    ck_assert_uint_eq(error->missing, 7);
    kvpool__v1__error__free_unpacked(error, NULL);
    rpc_client_close(&client);
}

START_TEST(a_failure_carries_its_code_its_text_and_an_error_in_the_trailing_metadata)
{
    open_folder();
    serve(call_and_fail);
    close_folder();
}
END_TEST

static void call_nonsense(void)
{
    static const unsigned char garbage[] = {0xff, 0xff, 0xff, 0xff, 0x0f, 0x12, 0x34};
    static const unsigned char bad_utf8[] = {0x1a, 0x02, 0xc3, 0x28}; /* field 3, "pool" */
    static const unsigned char cut[] = {0x1a, 0x03, 'n', 0x00, 'x'}; /* the same field; as a C string it would be "n" */
    struct rpc_client client;

    rpc_client_open(&client, door.target, NULL);
    call_fails(&client, "/kvpool.v1.KvPool/Nonsense", "", 0, NULL, GRPC_STATUS_UNIMPLEMENTED, "KvPool/Nonsense",
               KVP_ENOSYS);
    call_fails(&client, "/other.Service/GetSeqLens", "", 0, NULL, GRPC_STATUS_UNIMPLEMENTED, "other.Service",
               KVP_ENOSYS);
    call_fails(&client, "/kvpool.v1.KvPool/GetSeqLens", garbage, sizeof(garbage), NULL, GRPC_STATUS_INVALID_ARGUMENT,
               "kvpool.v1.GetSeqLensRequest", KVP_EPROTO);
    call_fails(&client, "/kvpool.v1.KvPool/GetSeqLens", bad_utf8, sizeof(bad_utf8), NULL,
               GRPC_STATUS_INVALID_ARGUMENT, "UTF-8", KVP_EPROTO);
    call_fails(&client, "/kvpool.v1.KvPool/GetSeqLens", cut, sizeof(cut), NULL, GRPC_STATUS_INVALID_ARGUMENT, "NUL",
               KVP_EPROTO);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(an_unknown_method_and_a_malformed_message_are_answered_and_the_connection_lives_on)
{
    open_folder();
    serve(call_nonsense);
    ck_assert_uint_eq(core.calls, 1);
    ck_assert_uint_eq(door.stats.unknown, 2);
    ck_assert_uint_eq(door.stats.malformed, 3);
    close_folder();
}
END_TEST

static void call_compressed(void)
{
    static unsigned char zeroes[4096];
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", zeroes, sizeof(zeroes), CALL_MS, "gzip", &answer);
    ck_assert_msg(answer.code == GRPC_STATUS_UNIMPLEMENTED, "%d: %s", answer.code, answer.text);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_compressed_message_is_refused_before_it_is_unpacked)
{
    open_folder();
    serve(call_compressed);
    ck_assert_uint_eq(core.calls, 1);
    close_folder();
}
END_TEST

static void call_large(void)
{
    static unsigned char zeroes[70000];
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", zeroes, sizeof(zeroes), CALL_MS, NULL, &answer);
    ck_assert_msg(answer.code == GRPC_STATUS_RESOURCE_EXHAUSTED, "%d: %s", answer.code, answer.text);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_message_over_the_limit_is_refused_and_the_connection_lives_on)
{
    open_folder();
    door.config.max_message_bytes = 65536;
    serve(call_large);
    ck_assert_uint_eq(core.calls, 1);
    close_folder();
}
END_TEST

static void call_many_empty(void)
{
    static unsigned char packed[65536]; /* GetSeqLensRequest: seqs of 49 152 bytes, as many again when unpacked */
    struct rpc_client client;

    packed[0] = 0x22; /* field 4, packed */
    packed[1] = 0x80;
    packed[2] = 0x80;
    packed[3] = 0x03;
    rpc_client_open(&client, door.target, NULL);
    call_fails(&client, "/kvpool.v1.KvPool/GetSeqLens", packed, 4 + 49152, NULL, GRPC_STATUS_RESOURCE_EXHAUSTED,
               "memory to unpack", KVP_ENOMEM);
    call_fails(&client, "/kvpool.v1.KvPool/GetSeqLens", packed, sizeof(packed), NULL, GRPC_STATUS_UNAVAILABLE,
               "are in hand", KVP_EAGAIN);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(requests_over_what_the_door_may_hold_are_refused)
{
    open_folder();
    door.config.max_held_bytes = 65000;
    serve(call_many_empty);
    ck_assert_uint_eq(core.calls, 1);
    close_folder();
}
END_TEST

/* A deadline can pass before the core has seen the call: the next one is longer. */
static void call_and_wait(void)
{
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    lengths_are_answered(&client); /* connected */
    for (unsigned deadline_ms = 200; core.kept == 0; deadline_ms *= 2) {
        rpc_client_call(&client, "/kvpool.v1.KvPool/Append", "", 0, deadline_ms, NULL, &answer);
        ck_assert_int_eq(answer.code, GRPC_STATUS_DEADLINE_EXCEEDED);
    }
    until(&core.gone, 1);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_call_past_its_callers_deadline_is_withdrawn_from_the_core)
{
    open_folder();
    serve(call_and_wait);
    ck_assert_uint_ge(core.kept, 1);
    ck_assert_uint_eq(core.gone, core.kept);
    close_folder();
}
END_TEST

static void call_without_deadline(void)
{
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/Append", "", 0, 0, NULL, &answer);
    ck_assert_int_eq(answer.code, GRPC_STATUS_DEADLINE_EXCEEDED);
    ck_assert_msg(strncmp(answer.text, "KVP_ETIMEDOUT", 13) == 0, "%s", answer.text);
    rpc_client_close(&client);
}

START_TEST(a_call_without_a_deadline_gets_the_doors)
{
    open_folder();
    door.config.default_deadline_ms = 300;
    serve(call_without_deadline);
    ck_assert_uint_eq(core.gone, 1);
    close_folder();
}
END_TEST

static void call_and_die(void)
{
    pid_t child = fork(); /* of a thread that has not used gRPC in a child's way: the child only execs */
    int status;

    ck_assert_int_ge(child, 0);
    if (child == 0) {
        execl("/proc/self/exe", "rpc_door", "--keep-calling", door.target, (char *)NULL);
        _exit(127);
    }
    until(&core.kept, 1);
    ck_assert_int_eq(kill(child, SIGKILL), 0);
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    until(&core.gone, 1);
}

START_TEST(a_call_of_a_killed_client_is_withdrawn_and_its_connection_forgotten)
{
    open_folder();
    serve(call_and_die);
    ck_assert_uint_eq(core.gone, 1);
    close_folder();
}
END_TEST
/* ---- many at once ------------------------------------------------------------------------------------------------ */

#define CROWD       8
#define CROWD_CALLS 150

static void *call_in_the_crowd(void *arg)
{
    unsigned char bytes[512];
    size_t n = pack_lengths(3, bytes);
    struct rpc_client client;
    struct rpc_answer answer;

    (void)arg;
    rpc_client_open(&client, door.target, NULL);
    for (unsigned i = 0; i < CROWD_CALLS; i++) {
        if (i % 10 == 9) {
            rpc_client_call(&client, "/kvpool.v1.KvPool/Append", "", 0, 1 + i % 7, NULL, &answer);
            ck_assert_int_eq(answer.code, GRPC_STATUS_DEADLINE_EXCEEDED);
        } else {
            rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", bytes, n, CALL_MS, NULL, &answer);
            ck_assert_int_eq(answer.code, GRPC_STATUS_OK);
        }
        free(answer.reply);
    }
    rpc_client_close(&client);
    return NULL;
}

static void call_all_at_once(void)
{
    pthread_t threads[CROWD];

    for (unsigned i = 0; i < CROWD; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_in_the_crowd, NULL), 0);
    for (unsigned i = 0; i < CROWD; i++)
        ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
}

START_TEST(each_call_of_many_clients_at_once_is_answered_or_withdrawn_and_nothing_is_left)
{
    open_folder();
    serve(call_all_at_once);
    ck_assert_uint_eq(core.kept, core.gone);
    ck_assert_uint_eq(core.calls - core.kept, CROWD * CROWD_CALLS * 9 / 10);
    close_folder();
}
END_TEST

static void ask_health(void)
{
    static const unsigned char ours[] = "\x0a\x10kvpool.v1.KvPool", other[] = "\x0a\x05other";
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/grpc.health.v1.Health/Check", ours, sizeof(ours) - 1, CALL_MS, NULL, &answer);
    ck_assert_int_eq(answer.code, GRPC_STATUS_OK);
    ck_assert_uint_eq(answer.reply_bytes, 2);
    ck_assert_int_eq(memcmp(answer.reply, "\x08\x01", 2), 0);
    free(answer.reply);
    call_fails(&client, "/grpc.health.v1.Health/Check", other, sizeof(other) - 1, NULL, GRPC_STATUS_NOT_FOUND,
               "other", KVP_ENOENT);
    rpc_client_close(&client);
}

START_TEST(the_standard_health_service_says_serving)
{
    open_folder();
    serve(ask_health);
    close_folder();
}
END_TEST

/* ----------------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    Suite *suite = suite_create("calls at the gRPC door");
    TCase *t = tcase_create("calls");

    tcase_set_timeout(t, 60);
    tcase_add_test(t, a_call_reaches_the_core_with_the_kernels_word_on_who_calls);
    tcase_add_test(t, a_failure_carries_its_code_its_text_and_an_error_in_the_trailing_metadata);
    tcase_add_test(t, an_unknown_method_and_a_malformed_message_are_answered_and_the_connection_lives_on);
    tcase_add_test(t, a_compressed_message_is_refused_before_it_is_unpacked);
    tcase_add_test(t, a_message_over_the_limit_is_refused_and_the_connection_lives_on);
    tcase_add_test(t, requests_over_what_the_door_may_hold_are_refused);
    tcase_add_test(t, a_call_past_its_callers_deadline_is_withdrawn_from_the_core);
    tcase_add_test(t, a_call_without_a_deadline_gets_the_doors);
    tcase_add_test(t, a_call_of_a_killed_client_is_withdrawn_and_its_connection_forgotten);
    tcase_add_test(t, each_call_of_many_clients_at_once_is_answered_or_withdrawn_and_nothing_is_left);
    tcase_add_test(t, the_standard_health_service_says_serving);
    suite_add_tcase(suite, t);
    return rpc_tests_main(argc, argv, suite);
}
