/** The house of the gRPC door's tests; see rpc_harness.h. */
#include "rpc_harness.h"

#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* ---- a core that does as the method says ------------------------------------------------------------------------- */

const struct kvp_method kvp_methods[] = {
    {KVPOOL__V1__METHOD__METHOD_GET_SEQ_LENS, "GetSeqLens", &kvpool__v1__get_seq_lens_request__descriptor,
     &kvpool__v1__get_seq_lens_reply__descriptor, false, true},
    {KVPOOL__V1__METHOD__METHOD_APPEND, "Append", &kvpool__v1__append_request__descriptor,
     &kvpool__v1__append_reply__descriptor, true, true},
    {KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, "DescribePool", &kvpool__v1__describe_pool_request__descriptor,
     &kvpool__v1__describe_pool_reply__descriptor, false, true},
};
const unsigned kvp_method_count = 3;

struct fake_core core;

const struct kvp_method *kvp_method_by_name(const char *name)
{
    for (unsigned i = 0; i < kvp_method_count; i++)
        if (strcmp(kvp_methods[i].name, name) == 0)
            return &kvp_methods[i];
    return NULL;
}

static void answer_lengths(struct kvp_call *call)
{
    const Kvpool__V1__GetSeqLensRequest *request = (const void *)call->message.body;
    Kvpool__V1__GetSeqLensReply reply = KVPOOL__V1__GET_SEQ_LENS_REPLY__INIT;
    uint32_t lengths[KVP_BATCH_MAX];

    ck_assert_uint_le(request->n_seqs, KVP_BATCH_MAX);
    for (size_t i = 0; i < request->n_seqs; i++)
        lengths[i] = (uint32_t)request->seqs[i];
    reply.n_lengths = request->n_seqs;
    reply.lengths = lengths;
    kvp_rpc_reply(core.rpc, call, KVP_OK, &reply.base);
}

void kvp_core_call(struct kvp_core *unused, struct kvp_call *call)
{
    (void)unused;
    core.calls++;
    core.caller = call->caller;
    core.deadline_ms = call->deadline_ms;
    if (call->message.method == KVPOOL__V1__METHOD__METHOD_GET_SEQ_LENS) {
        answer_lengths(call);
    } else if (call->message.method == KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL) {
        Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;

        error.message = "no pool \"kv\xc3\" \xc3\xa4\n"; /* a character cut off, and a whole one */
        error.missing = 7;
        kvp_rpc_reply(core.rpc, call, KVP_ENOENT, &error.base);
    } else {
        core.kept++;
    }
}

void kvp_core_call_gone(struct kvp_core *unused, struct kvp_call *call)
{
    (void)unused;
    (void)call;
    core.gone++;
}

/* ---- a door, a client's thread, a loop --------------------------------------------------------------------------- */

struct door door;

void open_folder(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    strcpy(door.folder, "/tmp/kvp-rpc-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(door.folder));
    snprintf(door.path, sizeof(door.path), "%s/grpc.sock", door.folder);
    snprintf(door.target, sizeof(door.target), "unix:%s", door.path);
    strcpy(address.sun_path, door.path);
    door.listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(door.listen_fd, 0);
    ck_assert_int_eq(bind(door.listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(listen(door.listen_fd, 64), 0);
    door.config = (struct kvp_rpc_config){.unix_listen_fd = door.listen_fd};
}

void close_folder(void)
{
    close(door.listen_fd);
    unlink(door.path);
    ck_assert_int_eq(rmdir(door.folder), 0);
}

static void on_stopped(void *arg)
{
    (void)arg;
    door.stopped = true;
    uv_close((uv_handle_t *)&door.done, NULL);
    uv_close((uv_handle_t *)&door.look, NULL);
}

/* The door hears a little later than the client that a call and a connection have ended. */
static void on_look(uv_timer_t *timer)
{
    door.stats = kvp_rpc_stats(core.rpc);
    if (!door.at_once && (door.stats.calls > 0 || door.stats.connections > 0) && ++door.looks < 60000)
        return;
    uv_timer_stop(timer);
    kvp_rpc_stop(core.rpc, on_stopped, NULL);
}

static void on_done(uv_async_t *async)
{
    (void)async;
    uv_timer_start(&door.look, on_look, 0, 1);
}

static void *run_client(void *arg)
{
    (void)arg;
    door.client();
    uv_async_send(&door.done);
    return NULL;
}

void serve(void (*client)(void))
{
    pthread_t thread;

    door.client = client;
    grpc_init();
    ck_assert_int_eq(uv_loop_init(&door.loop), 0);
    ck_assert_int_eq(uv_async_init(&door.loop, &door.done, on_done), 0);
    ck_assert_int_eq(uv_timer_init(&door.loop, &door.look), 0);
    ck_assert_int_eq(kvp_rpc_start(&door.loop, NULL, &door.config, &core.rpc), KVP_OK);
    ck_assert_int_eq(pthread_create(&thread, NULL, run_client, NULL), 0);
    ck_assert_int_eq(uv_run(&door.loop, UV_RUN_DEFAULT), 0);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    ck_assert_int_eq(uv_loop_close(&door.loop), 0);
    ck_assert(door.stopped);
    ck_assert(door.at_once || (door.stats.calls == 0 && door.stats.connections == 0 && door.stats.held_bytes == 0));
    grpc_shutdown_blocking();
}

/* ---- calls of the client ----------------------------------------------------------------------------------------- */

size_t pack_lengths(unsigned n, unsigned char *to)
{
    Kvpool__V1__GetSeqLensRequest request = KVPOOL__V1__GET_SEQ_LENS_REQUEST__INIT;
    uint64_t seqs[16];

    for (unsigned i = 0; i < n; i++)
        seqs[i] = i + 1;
    request.pool = "kv";
    request.n_seqs = n;
    request.seqs = seqs;
    return kvpool__v1__get_seq_lens_request__pack(&request, to);
}

void lengths_are_answered(struct rpc_client *client)
{
    unsigned char bytes[512];
    Kvpool__V1__GetSeqLensReply *reply;
    struct rpc_answer answer;

    rpc_client_call(client, "/kvpool.v1.KvPool/GetSeqLens", bytes, pack_lengths(3, bytes), CALL_MS, NULL, &answer);
    ck_assert_msg(answer.code == GRPC_STATUS_OK, "%d: %s", answer.code, answer.text);
    reply = kvpool__v1__get_seq_lens_reply__unpack(NULL, answer.reply_bytes, answer.reply);
    ck_assert_ptr_nonnull(reply);
    ck_assert_uint_eq(reply->n_lengths, 3);
    ck_assert_uint_eq(reply->lengths[2], 3);
    kvpool__v1__get_seq_lens_reply__free_unpacked(reply, NULL);
    free(answer.reply);
}

void call_fails(struct rpc_client *client, const char *path, const void *bytes, size_t n, const char *encoding,
                grpc_status_code code, const char *text, enum kvp_status status)
{
    struct rpc_answer answer;
    Kvpool__V1__Error *error;

    rpc_client_call(client, path, bytes, n, CALL_MS, encoding, &answer);
    ck_assert_msg(answer.code == code, "%d: %s", answer.code, answer.text);
    ck_assert_msg(strstr(answer.text, text) != NULL, "%s", answer.text);
    ck_assert_ptr_null(answer.reply);
    error = kvpool__v1__error__unpack(NULL, answer.error_bytes, answer.error);
    ck_assert_ptr_nonnull(error);
    ck_assert_int_eq(error->status, status);
    ck_assert(strstr(answer.text, error->message) != NULL);
    kvpool__v1__error__free_unpacked(error, NULL);
}

void until(_Atomic unsigned *count, unsigned n)
{
    struct timespec pause = {.tv_nsec = 1000000};

    for (unsigned i = 0; *count < n; i++) {
        ck_assert_msg(i < 60000, "%u of %u", *count, n);
        nanosleep(&pause, NULL);
    }
}

/* ---- the program ------------------------------------------------------------------------------------------------- */

/* The client that is killed. */
static int keep_calling(const char *target)
{
    struct rpc_client client;
    struct rpc_answer answer;

    grpc_init();
    rpc_client_open(&client, target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/Append", "", 0, 0, NULL, &answer);
    return 1;
}

int rpc_tests_main(int argc, char **argv, Suite *suite)
{
    SRunner *runner;
    int failed;

    if (argc == 3 && strcmp(argv[1], "--keep-calling") == 0)
        return keep_calling(argv[2]);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
