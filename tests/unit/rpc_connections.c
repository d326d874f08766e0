/**
 * Connections at the gRPC door: how many, for how long, over TCP and TLS, and how the door stops with them open.
 */
#include "rpc_harness.h"

#include <errno.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

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
    door.config.grace_ms = 300000;
    begun = uv_hrtime();
    serve(stay_connected);
    ck_assert_uint_lt((uv_hrtime() - begun) / 1000000, 150000);
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
    struct timeval limit = {.tv_sec = 60};
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

        rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", bytes, pack_lengths(1, bytes), CALL_MS, NULL, &answer);
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

/* ---- TLS --------------------------------------------------------------------------------------------------------- */

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
    rpc_client_call(&client, "/kvpool.v1.KvPool/GetSeqLens", bytes, pack_lengths(1, bytes), CALL_MS, NULL, &answer);
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

/* ----------------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    Suite *suite = suite_create("connections at the gRPC door");
    TCase *t = tcase_create("connections");

    tcase_set_timeout(t, 60);
    tcase_add_test(t, stopping_withdraws_the_calls_in_hand_after_the_grace);
    tcase_add_test(t, stopping_does_not_wait_for_connections_without_a_call);
    tcase_add_test(t, a_connection_over_the_limit_is_ended_and_room_comes_back_with_those_that_end);
    tcase_add_test(t, a_silent_connection_is_ended);
    tcase_add_test(t, a_connection_that_speaks_something_else_is_ended);
    tcase_add_test(t, a_caller_over_tcp_is_nobody_known);
    tcase_add_test(t, plaintext_beyond_loopback_and_half_a_tls_are_refused_at_the_start);
    if (system("command -v openssl >/dev/null") == 0)
        tcase_add_test(t, over_tls_a_client_needs_a_certificate);
    else
        printf("skipped: over_tls_a_client_needs_a_certificate (no openssl program)\n");
    suite_add_tcase(suite, t);
    return rpc_tests_main(argc, argv, suite);
}
