/**
 * GetSeqLens over gRPC on a Unix socket, beside a bare echo of the same thread model and the same message sizes, in one
 * run: rounds of calls go to one and to the other in turn, so that both see the same machine.
 *
 *     kvp_bench_grpc [--batch SEQUENCES] [--rounds N] [--calls-per-round N] [--check]
 *
 * Prints one JSON object: p50 and p99 of both in µs, and the ratio of the p50s (bar: 1.2). --check: exit 1 over the bar.
 * Starts both servers itself; kvpoold is $KVPOOL_BIN_DIR/kvpoold.
 */
#include "daemon.h"
#include "grpc_echo.h"
#include "rpc_client.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RATIO_BAR      1.2
#define SERVICE        "/kvpool.v1.KvPool/"
#define MESSAGE_BYTES_MAX 65536

struct options {
    unsigned batch, rounds, calls;
    bool check;
};

struct side {
    struct rpc_client client;
    double *us;
    unsigned n;
};

static void fail(const char *what)
{
    fprintf(stderr, "kvp_bench_grpc: %s\n", what);
    exit(2);
}

static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

/* ---- calls ----------------------------------------------------------------------------------------------------------- */

/* A call that must be done; the reply unpacked where a type is given. */
static ProtobufCMessage *call(struct rpc_client *client, const char *path, const ProtobufCMessage *request,
                              const ProtobufCMessageDescriptor *type)
{
    unsigned char bytes[MESSAGE_BYTES_MAX];
    ProtobufCMessage *reply = NULL;
    struct rpc_answer answer;
    size_t n = protobuf_c_message_get_packed_size(request);

    if (n > sizeof(bytes))
        fail("a request that is too large");
    protobuf_c_message_pack(request, bytes);
    rpc_client_call(client, path, bytes, n, 20000, NULL, &answer);
    if (answer.code != GRPC_STATUS_OK)
        fail(answer.text);
    if (type != NULL)
        reply = protobuf_c_message_unpack(type, NULL, answer.reply_bytes, answer.reply);
    free(answer.reply);
    return reply;
}

static char *open_session(struct rpc_client *client)
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    Kvpool__V1__OpenSessionReply *reply =
        (void *)call(client, SERVICE "OpenSession", &request.base, &kvpool__v1__open_session_reply__descriptor);
    char *token;

    if (reply == NULL)
        fail("no session");
    token = strdup(reply->session);
    kvpool__v1__open_session_reply__free_unpacked(reply, NULL);
    return token;
}

static void create_pool(struct rpc_client *client, char *session)
{
    Kvpool__V1__Plane plane = KVPOOL__V1__PLANE__INIT, *planes[] = {&plane};
    Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;

    plane.component = KVPOOL__V1__COMPONENT__COMPONENT_CKV;
    plane.heads = 1;
    plane.dim = 16;
    plane.dtype = KVPOOL__V1__DTYPE__DTYPE_F16;
    spec.name = "bench";
    spec.pages = 4096;
    spec.page_tokens = 16;
    spec.n_planes = 1;
    spec.planes = planes;
    request.session = session;
    request.spec = &spec;
    call(client, SERVICE "CreatePool", &request.base, NULL);
}

/* Sequences with tokens; the GetSeqLens request for all of them, packed. */
static size_t prepare(struct rpc_client *client, unsigned batch, unsigned char *to)
{
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__AdvanceRequest advance = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    Kvpool__V1__GetSeqLensRequest request = KVPOOL__V1__GET_SEQ_LENS_REQUEST__INIT;
    Kvpool__V1__OpenSequencesReply *opened;
    uint64_t keys[KVP_BATCH_MAX];
    uint32_t tokens[KVP_BATCH_MAX];
    char *session = open_session(client);
    size_t n;

    create_pool(client, session);
    for (unsigned i = 0; i < batch; i++) {
        keys[i] = i + 1;
        tokens[i] = i % 32;
    }
    open.session = advance.session = session;
    open.pool = advance.pool = request.pool = "bench";
    open.n_keys = batch;
    open.keys = keys;
    opened = (void *)call(client, SERVICE "OpenSequences", &open.base, &kvpool__v1__open_sequences_reply__descriptor);
    if (opened == NULL || opened->n_seqs != batch)
        fail("no sequences");
    advance.n_seqs = request.n_seqs = batch;
    advance.seqs = request.seqs = opened->seqs;
    advance.n_reserved = advance.n_written = batch;
    advance.reserved = advance.written = tokens;
    call(client, SERVICE "Advance", &advance.base, NULL);
    n = kvpool__v1__get_seq_lens_request__pack(&request, to);
    kvpool__v1__open_sequences_reply__free_unpacked(opened, NULL);
    free(session);
    return n;
}

/* ---- the echo ---------------------------------------------------------------------------------------------------------- */

static pid_t start_echo(char folder[200], char path[240], size_t reply_bytes)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char fd_text[16], bytes_text[24];
    pid_t child;

    test_folder(folder);
    snprintf(path, 240, "%s/echo.sock", folder);
    if (fd < 0 || strlen(path) >= sizeof(address.sun_path))
        fail("no socket");
    strcpy(address.sun_path, path);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(fd, 16) != 0)
        fail("the echo's socket");
    fcntl(fd, F_SETFD, 0);
    snprintf(fd_text, sizeof(fd_text), "%d", fd);
    snprintf(bytes_text, sizeof(bytes_text), "%zu", reply_bytes);
    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl("/proc/self/exe", "kvp_bench_grpc", "--echo", fd_text, bytes_text, (char *)NULL);
        _exit(127);
    }
    close(fd);
    if (child < 0)
        fail("no process for the echo");
    return child;
}

static void stop_echo(pid_t echo, const char *folder, const char *path)
{
    kill(echo, SIGKILL);
    waitpid(echo, NULL, 0);
    unlink(path);
    rmdir(folder);
}

/* ---- measuring --------------------------------------------------------------------------------------------------------- */

static void open_side(struct side *side, const char *path, unsigned n)
{
    char target[260];

    snprintf(target, sizeof(target), "unix:%s", path);
    rpc_client_open(&side->client, target, NULL);
    side->us = calloc(n, sizeof(*side->us));
    side->n = 0;
    if (side->us == NULL)
        fail("out of memory");
}

static void close_side(struct side *side)
{
    rpc_client_close(&side->client);
    free(side->us);
}

static void measure(struct side *side, const unsigned char *bytes, size_t n, unsigned calls, size_t reply_bytes,
                    bool count)
{
    for (unsigned i = 0; i < calls; i++) {
        struct rpc_answer answer;
        double begun = now_us(), us;

        rpc_client_call(&side->client, SERVICE "GetSeqLens", bytes, n, 20000, NULL, &answer);
        us = now_us() - begun;
        if (answer.code != GRPC_STATUS_OK)
            fail(answer.text);
        if (answer.reply_bytes != reply_bytes)
            fail("the replies differ in size");
        free(answer.reply);
        if (count)
            side->us[side->n++] = us;
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double quantile(struct side *side, double q)
{
    qsort(side->us, side->n, sizeof(*side->us), by_value);
    return side->us[(size_t)(q * (side->n - 1))];
}

static int run(const struct options *options)
{
    static unsigned char bytes[MESSAGE_BYTES_MAX];
    size_t reply_bytes = options->batch * sizeof(uint32_t), n;
    char folder[200], echo_path[240], grpc_path[240];
    struct test_daemon daemon;
    struct side echo_side, kvpool_side;
    double ratio;
    pid_t echo;

    reply_bytes += reply_bytes < 128 ? 2 : 3; /* tag and length of the packed field */
    test_daemon_start(&daemon, NULL, NULL);
    echo = start_echo(folder, echo_path, reply_bytes);
    snprintf(grpc_path, sizeof(grpc_path), "%.200s/grpc.sock", daemon.dir);
    grpc_init();
    open_side(&kvpool_side, grpc_path, options->rounds * options->calls);
    open_side(&echo_side, echo_path, options->rounds * options->calls);
    n = prepare(&kvpool_side.client, options->batch, bytes);
    for (unsigned round = 0; round <= options->rounds; round++) { /* the first warms up */
        measure(&echo_side, bytes, n, options->calls, reply_bytes, round > 0);
        measure(&kvpool_side, bytes, n, options->calls, reply_bytes, round > 0);
    }
    ratio = quantile(&kvpool_side, 0.5) / quantile(&echo_side, 0.5);
    printf("{\"bench\": \"grpc_get_seq_lens\", \"batch\": %u, \"calls\": %u, \"request_bytes\": %zu, "
           "\"reply_bytes\": %zu, \"echo_p50_us\": %.1f, \"echo_p99_us\": %.1f, \"kvpoold_p50_us\": %.1f, "
           "\"kvpoold_p99_us\": %.1f, \"ratio\": %.3f, \"bar\": %.1f}\n",
           options->batch, kvpool_side.n, n, reply_bytes, quantile(&echo_side, 0.5), quantile(&echo_side, 0.99),
           quantile(&kvpool_side, 0.5), quantile(&kvpool_side, 0.99), ratio, RATIO_BAR);
    close_side(&kvpool_side);
    close_side(&echo_side);
    grpc_shutdown_blocking();
    stop_echo(echo, folder, echo_path);
    if (test_daemon_stop(&daemon) != 0)
        fail("kvpoold did not end well");
    return options->check && ratio > RATIO_BAR ? 1 : 0;
}

int main(int argc, char **argv)
{
    struct options options = {.batch = 64, .rounds = 20, .calls = 200};

    if (argc == 4 && strcmp(argv[1], "--echo") == 0) {
        grpc_echo_serve(atoi(argv[2]), strtoul(argv[3], NULL, 10));
        return 1;
    }
    for (int i = 1; i < argc; i++) {
        unsigned value = i + 1 < argc ? (unsigned)strtoul(argv[i + 1], NULL, 10) : 0;

        if (strcmp(argv[i], "--check") == 0) {
            options.check = true;
            continue;
        }
        if (strcmp(argv[i], "--batch") == 0 && value >= 1 && value <= KVP_BATCH_MAX)
            options.batch = value;
        else if (strcmp(argv[i], "--rounds") == 0 && value >= 1 && value <= 100000)
            options.rounds = value;
        else if (strcmp(argv[i], "--calls-per-round") == 0 && value >= 1 && value <= 100000)
            options.calls = value;
        else
            fail("usage: kvp_bench_grpc [--batch SEQUENCES] [--rounds N] [--calls-per-round N] [--check]");
        i++;
    }
    return run(&options);
}
