/**
 * The gRPC door by itself: the real door and a real client over real sockets, and in the core's place a few lines that
 * answer, fail or keep a call, and count what they see.
 *
 * The loop runs in the test's own thread, the client in another one; the client's end stops the door and the loop.
 */
#include "rpc.h"
#include "rpc_client.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- a core that does as the method says ---------------------------------------------------------------------------- */

/* GetSeqLens: lengths = 1 for each sequence. Append: kept, never answered. DescribePool: fails. Others: empty reply. */
const struct kvp_method kvp_methods[] = {
    {KVPOOL__V1__METHOD__METHOD_GET_SEQ_LENS, "GetSeqLens", &kvpool__v1__get_seq_lens_request__descriptor,
     &kvpool__v1__get_seq_lens_reply__descriptor, false, true},
    {KVPOOL__V1__METHOD__METHOD_APPEND, "Append", &kvpool__v1__append_request__descriptor,
     &kvpool__v1__append_reply__descriptor, true, true},
    {KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, "DescribePool", &kvpool__v1__describe_pool_request__descriptor,
     &kvpool__v1__describe_pool_reply__descriptor, false, true},
};
const unsigned kvp_method_count = 3;

static struct {
    struct kvp_rpc *rpc;
    _Atomic unsigned calls, gone, kept;
    struct kvp_caller caller;
    _Atomic uint64_t deadline_ms;
} core;

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

/* ---- a door, a client's thread, a loop -------------------------------------------------------------------------------- */

static struct door {
    char folder[64], path[96], target[112];
    int listen_fd;
    uv_loop_t loop;
    uv_async_t done;
    uv_timer_t look;
    bool at_once; /* stop though calls are in hand */
    unsigned looks;
    struct kvp_rpc_config config;
    struct kvp_rpc_stats stats;
    bool stopped;
    void (*client)(void);
} door;

static void open_folder(void)
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

static void close_folder(void)
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
    if (!door.at_once && (door.stats.calls > 0 || door.stats.connections > 0) && ++door.looks < 5000)
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

/* Run the client against a door of door.config; returns when the door has stopped. */
static void serve(void (*client)(void))
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

/* ---- calls of the client ---------------------------------------------------------------------------------------------- */

static size_t pack_lengths(unsigned n, unsigned char *to)
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

static void lengths_are_answered(struct rpc_client *client)
{
    unsigned char bytes[512];
    Kvpool__V1__GetSeqLensReply *reply;
    struct rpc_answer answer;

    rpc_client_call(client, "/kvpool.v1.KvPool/GetSeqLens", bytes, pack_lengths(3, bytes), 10000, NULL, &answer);
    ck_assert_msg(answer.code == GRPC_STATUS_OK, "%d: %s", answer.code, answer.text);
    reply = kvpool__v1__get_seq_lens_reply__unpack(NULL, answer.reply_bytes, answer.reply);
    ck_assert_ptr_nonnull(reply);
    ck_assert_uint_eq(reply->n_lengths, 3);
    ck_assert_uint_eq(reply->lengths[2], 3);
    kvpool__v1__get_seq_lens_reply__free_unpacked(reply, NULL);
    free(answer.reply);
}

/* A call that must fail: its code, a piece of its text, and its status in kvp-status-bin. */
static void call_fails(struct rpc_client *client, const char *path, const void *bytes, size_t n, const char *encoding,
                       grpc_status_code code, const char *text, enum kvp_status status)
{
    struct rpc_answer answer;
    Kvpool__V1__Error *error;

    rpc_client_call(client, path, bytes, n, 10000, encoding, &answer);
    ck_assert_msg(answer.code == code, "%d: %s", answer.code, answer.text);
    ck_assert_msg(strstr(answer.text, text) != NULL, "%s", answer.text);
    ck_assert_ptr_null(answer.reply);
    error = kvpool__v1__error__unpack(NULL, answer.error_bytes, answer.error);
    ck_assert_ptr_nonnull(error);
    ck_assert_int_eq(error->status, status);
    ck_assert(strstr(answer.text, error->message) != NULL);
    kvpool__v1__error__free_unpacked(error, NULL);
}

static void until(_Atomic unsigned *count, unsigned n)
{
    struct timespec pause = {.tv_nsec = 1000000};

    for (unsigned i = 0; *count < n; i++) {
        ck_assert_msg(i < 20000, "%u of %u", *count, n);
        nanosleep(&pause, NULL);
    }
}

/* ---- the tests -------------------------------------------------------------------------------------------------------- */

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
    rpc_client_call(&client, "/kvpool.v1.KvPool/DescribePool", "", 0, 10000, NULL, &answer);
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
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(an_unknown_method_and_a_malformed_message_are_answered_and_the_connection_lives_on)
{
    open_folder();
    serve(call_nonsense);
    ck_assert_uint_eq(core.calls, 1);
    ck_assert_uint_eq(door.stats.unknown, 2);
    ck_assert_uint_eq(door.stats.malformed, 2);
    close_folder();
}
END_TEST

static void call_compressed(void)
{
    static unsigned char zeroes[4096];
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", zeroes, sizeof(zeroes), 10000, "gzip", &answer);
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
    rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", zeroes, sizeof(zeroes), 10000, NULL, &answer);
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

static void call_and_wait(void)
{
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/Append", "", 0, 200, NULL, &answer);
    ck_assert_int_eq(answer.code, GRPC_STATUS_DEADLINE_EXCEEDED);
    until(&core.gone, 1);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_call_past_its_callers_deadline_is_withdrawn_from_the_core)
{
    open_folder();
    serve(call_and_wait);
    ck_assert_uint_eq(core.kept, 1);
    ck_assert_uint_eq(core.gone, 1);
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

static pthread_t late;

static void *call_late(void *arg)
{
    struct rpc_client client;
    struct rpc_answer answer;

    (void)arg;
    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/kvpool.v1.KvPool/Append", "", 0, 0, NULL, &answer);
    ck_assert_int_ne(answer.code, GRPC_STATUS_OK);
    rpc_client_close(&client);
    return NULL;
}

static void start_late(void)
{
    ck_assert_int_eq(pthread_create(&late, NULL, call_late, NULL), 0);
    until(&core.kept, 1);
}

START_TEST(stopping_withdraws_the_calls_in_hand_after_the_grace)
{
    open_folder();
    grpc_init();
    door.at_once = true;
    serve(start_late);
    ck_assert_int_eq(pthread_join(late, NULL), 0);
    grpc_shutdown_blocking();
    ck_assert_uint_eq(core.gone, 1);
    close_folder();
}
END_TEST

static int connect_raw(void);
static struct rpc_client idle_client;
static int idle_fd;

static void stay_connected(void)
{
    rpc_client_open(&idle_client, door.target, NULL);
    lengths_are_answered(&idle_client);
    idle_fd = connect_raw();
}

START_TEST(stopping_does_not_wait_for_connections_without_a_call)
{
    uint64_t begun;

    open_folder();
    grpc_init();
    door.at_once = true;
    door.config.grace_ms = 30000;
    begun = uv_hrtime();
    serve(stay_connected);
    ck_assert_uint_lt((uv_hrtime() - begun) / 1000000, 15000);
    rpc_client_close(&idle_client);
    close(idle_fd);
    grpc_shutdown_blocking();
    close_folder();
}
END_TEST

static int connect_raw(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, door.path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

/* Read to the end of the stream, which the door must bring about. */
static void until_ended(int fd)
{
    struct timeval limit = {.tv_sec = 20};
    char bytes[512];
    ssize_t n;

    ck_assert_int_eq(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), 0);
    do {
        n = read(fd, bytes, sizeof(bytes));
    } while (n > 0);
    ck_assert_msg(n == 0 || errno == ECONNRESET, "%s", strerror(errno));
}

static void connect_too_often(void)
{
    struct rpc_client client;
    int fds[4];

    for (unsigned i = 0; i < 4; i++)
        fds[i] = connect_raw();
    until_ended(fds[3]); /* the fourth, of three */
    for (unsigned i = 0; i < 4; i++)
        close(fds[i]);
    rpc_client_open(&client, door.target, NULL);
    for (unsigned i = 0; i < 200; i++) { /* until the door has seen that they are gone */
        struct timespec pause = {.tv_nsec = 10000000};
        unsigned char bytes[512];
        struct rpc_answer answer;

        rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", bytes, pack_lengths(1, bytes), 5000, NULL, &answer);
        free(answer.reply);
        if (answer.code == GRPC_STATUS_OK)
            break;
        nanosleep(&pause, NULL);
    }
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_connection_over_the_limit_is_ended_and_room_comes_back_with_those_that_end)
{
    open_folder();
    door.config.max_connections = 3;
    serve(connect_too_often);
    ck_assert_uint_ge(door.stats.refused, 1);
    close_folder();
}
END_TEST

static void stay_silent(void)
{
    int fd = connect_raw();

    until_ended(fd);
    close(fd);
}

START_TEST(a_silent_connection_is_ended)
{
    open_folder();
    door.config.idle_ms = 500;
    serve(stay_silent);
    close_folder();
}
END_TEST

static void speak_otherwise(void)
{
    static const char *const words[] = {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01\xfc\x03\x03",
                                        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"};
    struct rpc_client client;

    for (unsigned i = 0; i < 3; i++) {
        int fd = connect_raw();

        ck_assert_int_eq(send(fd, words[i], strlen(words[i]), MSG_NOSIGNAL), (ssize_t)strlen(words[i]));
        until_ended(fd);
        close(fd);
    }
    rpc_client_open(&client, door.target, NULL);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_connection_that_speaks_something_else_is_ended)
{
    open_folder();
    door.config.idle_ms = 2000;
    serve(speak_otherwise);
    ck_assert_uint_eq(core.calls, 1);
    close_folder();
}
END_TEST

/* ---- many at once ---------------------------------------------------------------------------------------------------- */

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
            rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", bytes, n, 20000, NULL, &answer);
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

static void call_over_tcp(void)
{
    struct rpc_client client;
    char target[64];

    snprintf(target, sizeof(target), "ipv4:127.0.0.1:%u", kvp_rpc_tcp_port(core.rpc));
    rpc_client_open(&client, target, NULL);
    lengths_are_answered(&client);
    rpc_client_close(&client);
}

START_TEST(a_caller_over_tcp_is_nobody_known)
{
    open_folder();
    door.config.tcp_address = "127.0.0.1:0";
    serve(call_over_tcp);
    ck_assert_uint_eq(core.calls, 1);
    ck_assert_int_eq(core.caller.door, KVP_DOOR_TCP);
    ck_assert(!core.caller.known);
    close_folder();
}
END_TEST

static void start_fails(const struct kvp_rpc_config *config, enum kvp_status status)
{
    struct kvp_rpc *rpc = NULL;
    uv_loop_t loop;

    ck_assert_int_eq(uv_loop_init(&loop), 0);
    ck_assert_int_eq(kvp_rpc_start(&loop, NULL, config, &rpc), status);
    ck_assert_ptr_null(rpc);
    ck_assert_int_eq(uv_run(&loop, UV_RUN_DEFAULT), 0);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}

START_TEST(plaintext_beyond_loopback_and_half_a_tls_are_refused_at_the_start)
{
    struct kvp_rpc_config config = {.unix_listen_fd = -1, .tcp_address = "0.0.0.0:0"};

    start_fails(&config, KVP_EINVAL);
    config.tcp_address = "no address";
    start_fails(&config, KVP_EINVAL);
    config.tcp_address = "127.0.0.1:0";
    config.tls_cert = "/dev/null";
    start_fails(&config, KVP_EINVAL);
    config.tls_key = config.tls_ca = "/dev/null";
    start_fails(&config, KVP_ENODEV);
}
END_TEST

static void ask_health(void)
{
    static const unsigned char ours[] = "\x0a\x10kvpool.v1.KvPool", other[] = "\x0a\x05other";
    struct rpc_client client;
    struct rpc_answer answer;

    rpc_client_open(&client, door.target, NULL);
    rpc_client_call(&client, "/grpc.health.v1.Health/Check", ours, sizeof(ours) - 1, 10000, NULL, &answer);
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

/* ---- TLS -------------------------------------------------------------------------------------------------------------- */

static char *file_text(const char *name)
{
    char path[128], *text = calloc(1, 16384);
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", door.folder, name);
    file = fopen(path, "r");
    ck_assert_ptr_nonnull(file);
    ck_assert_ptr_nonnull(text);
    ck_assert_uint_gt(fread(text, 1, 16383, file), 0);
    fclose(file);
    return text;
}

static void call_over_tls(void)
{
    char *ca = file_text("ca.pem"), *cert = file_text("one.pem"), *key = file_text("one.key"), target[64];
    grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
    unsigned char bytes[512];
    struct rpc_client client;
    struct rpc_answer answer;

    snprintf(target, sizeof(target), "ipv4:127.0.0.1:%u", kvp_rpc_tcp_port(core.rpc));
    rpc_client_open(&client, target, grpc_ssl_credentials_create(ca, &pair, NULL, NULL));
    lengths_are_answered(&client);
    rpc_client_close(&client);
    rpc_client_open(&client, target, grpc_ssl_credentials_create(ca, NULL, NULL, NULL));
    rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", bytes, pack_lengths(1, bytes), 10000, NULL, &answer);
    ck_assert_int_eq(answer.code, GRPC_STATUS_UNAVAILABLE);
    rpc_client_close(&client);
    free(ca);
    free(cert);
    free(key);
}

START_TEST(over_tls_a_client_needs_a_certificate)
{
    static const char *names[] = {"ca.pem", "ca.key", "ca.srl", "one.pem", "one.key", "one.csr", "one.ext"};
    char command[1024], cert[128], key[128], ca[128], path[128];

    open_folder();
    snprintf(command, sizeof(command),
             "cd %s && exec >/dev/null 2>&1 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
             "-keyout ca.key -out ca.pem -days 2 -subj /CN=ca && openssl req -newkey ec -pkeyopt "
             "ec_paramgen_curve:P-256 -nodes -keyout one.key -out one.csr -subj /CN=one && "
             "echo subjectAltName=IP:127.0.0.1 >one.ext && openssl x509 -req -in one.csr -CA ca.pem -CAkey ca.key "
             "-CAcreateserial -out one.pem -days 2 -extfile one.ext",
             door.folder);
    ck_assert_int_eq(system(command), 0);
    snprintf(cert, sizeof(cert), "%s/one.pem", door.folder);
    snprintf(key, sizeof(key), "%s/one.key", door.folder);
    snprintf(ca, sizeof(ca), "%s/ca.pem", door.folder);
    door.config.tcp_address = "127.0.0.1:0";
    door.config.tls_cert = cert;
    door.config.tls_key = key;
    door.config.tls_ca = ca;
    serve(call_over_tls);
    ck_assert_uint_eq(core.calls, 1);
    ck_assert_int_eq(core.caller.door, KVP_DOOR_TCP);
    ck_assert(!core.caller.known);
    for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        snprintf(path, sizeof(path), "%s/%s", door.folder, names[i]);
        unlink(path);
    }
    close_folder();
}
END_TEST

/* ---------------------------------------------------------------------------------------------------------------------- */

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

static Suite *suite(void)
{
    Suite *s = suite_create("the gRPC door");
    TCase *t = tcase_create("door");

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
    tcase_add_test(t, stopping_withdraws_the_calls_in_hand_after_the_grace);
    tcase_add_test(t, stopping_does_not_wait_for_connections_without_a_call);
    tcase_add_test(t, a_connection_over_the_limit_is_ended_and_room_comes_back_with_those_that_end);
    tcase_add_test(t, a_silent_connection_is_ended);
    tcase_add_test(t, a_connection_that_speaks_something_else_is_ended);
    tcase_add_test(t, each_call_of_many_clients_at_once_is_answered_or_withdrawn_and_nothing_is_left);
    tcase_add_test(t, a_caller_over_tcp_is_nobody_known);
    tcase_add_test(t, plaintext_beyond_loopback_and_half_a_tls_are_refused_at_the_start);
    tcase_add_test(t, the_standard_health_service_says_serving);
    if (system("command -v openssl >/dev/null") == 0)
        tcase_add_test(t, over_tls_a_client_needs_a_certificate);
    else
        printf("skipped: over_tls_a_client_needs_a_certificate (no openssl program)\n");
    suite_add_tcase(s, t);
    return s;
}

int main(int argc, char **argv)
{
    SRunner *runner;
    int failed;

    if (argc == 3 && strcmp(argv[1], "--keep-calling") == 0)
        return keep_calling(argv[2]);
    runner = srunner_create(suite());
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
