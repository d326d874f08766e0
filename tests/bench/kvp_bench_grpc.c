/**
 * GetSeqLens over gRPC on a Unix socket, beside a bare echo of the same thread model and the same message sizes, in one
 * run: short rounds of calls go to one and to the other in turn, so that both see the same machine.
 *
 *     kvp_bench_grpc [--batch SEQUENCES] [--trials N] [--rounds N] [--calls N] [--check]
 *
 * A trial starts both servers anew (kvpoold is $KVPOOL_BIN_DIR/kvpoold) and makes `rounds` rounds of `calls` calls to
 * each. Where the kernel puts their threads, together or apart, is worth 40 % to either, and lasts for a trial: so the
 * ratio that counts is the median of the trials' ratios of p50s.
 *
 * Prints one JSON object: that ratio (bar: 1.2), each trial's, and the medians of p50 and p99 in µs. --check: exit 1
 * over the bar.
 */
#include "bench_daemon.h"
#include "grpc_echo.h"
#include "kvp_limits.h"
#include "kvpool.pb-c.h"
#include "rpc_client.h"

#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RATIO_BAR      1.2
#define SERVICE        "/kvpool.v1.KvPool/"
#define MESSAGE_BYTES_MAX 65536
#define TRIALS_MAX     101

struct options {
    unsigned batch, trials, rounds, calls;
    bool check;
};

struct figures {
    double echo_p50, echo_p99, kvpool_p50, kvpool_p99, ratio;
    size_t request_bytes, reply_bytes;
};

struct side {
    struct rpc_client client;
    double *us;
    unsigned n;
};

static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* A call that must be done; the reply unpacked where a type is given. */
static ProtobufCMessage *call(struct rpc_client *client, const char *path, const ProtobufCMessage *request,
                              const ProtobufCMessageDescriptor *type)
{
    unsigned char bytes[MESSAGE_BYTES_MAX];
    ProtobufCMessage *reply = NULL;
    struct rpc_answer answer;
    size_t n = protobuf_c_message_get_packed_size(request);

    if (n > sizeof(bytes))
        bench_fail("a request that is too large");
    protobuf_c_message_pack(request, bytes);
    rpc_client_call(client, path, bytes, n, 20000, NULL, &answer);
    if (answer.code != GRPC_STATUS_OK)
        bench_fail(answer.text);
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
        bench_fail("no session");
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
        bench_fail("no sequences");
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

/* ---- the echo ---------------------------------------------------------------------------------------------------- */

static pid_t start_echo(char folder[64], char path[80], size_t reply_bytes)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char fd_text[16], bytes_text[24];
    pid_t child;

    bench_folder(folder);
    snprintf(path, 80, "%s/echo.sock", folder);
    if (fd < 0 || strlen(path) >= sizeof(address.sun_path))
        bench_fail("no socket");
    strcpy(address.sun_path, path);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(fd, 16) != 0)
        bench_fail("the echo's socket");
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
        bench_fail("no process for the echo");
    return child;
}

static void stop_echo(pid_t echo, const char *folder, const char *path)
{
    kill(echo, SIGKILL);
    waitpid(echo, NULL, 0);
    unlink(path);
    rmdir(folder);
}

/* ---- measuring --------------------------------------------------------------------------------------------------- */

static void open_side(struct side *side, const char *path, unsigned n)
{
    char target[96];

    snprintf(target, sizeof(target), "unix:%s", path);
    rpc_client_open(&side->client, target, NULL);
    side->us = calloc(n, sizeof(*side->us));
    side->n = 0;
    if (side->us == NULL)
        bench_fail("out of memory");
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
            bench_fail(answer.text);
        if (answer.reply_bytes != reply_bytes)
            bench_fail("the replies differ in size");
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

static struct figures try_once(const struct options *options)
{
    static unsigned char bytes[MESSAGE_BYTES_MAX];
    size_t reply_bytes = options->batch * sizeof(uint32_t), n;
    char folder[64], echo_path[80], grpc_path[80];
    struct side echo_side, kvpool_side;
    struct bench_daemon daemon;
    struct figures figures;
    pid_t echo;

    reply_bytes += reply_bytes < 128 ? 2 : 3; /* tag and length of the packed field */
    bench_daemon_start(&daemon);
    echo = start_echo(folder, echo_path, reply_bytes);
    snprintf(grpc_path, sizeof(grpc_path), "%s/grpc.sock", daemon.folder);
    open_side(&kvpool_side, grpc_path, options->rounds * options->calls);
    open_side(&echo_side, echo_path, options->rounds * options->calls);
    n = prepare(&kvpool_side.client, options->batch, bytes);
    for (unsigned round = 0; round <= options->rounds; round++) { /* the first warms up */
        measure(&echo_side, bytes, n, options->calls, reply_bytes, round > 0);
        measure(&kvpool_side, bytes, n, options->calls, reply_bytes, round > 0);
    }
    figures = (struct figures){.echo_p50 = quantile(&echo_side, 0.5),
                               .echo_p99 = quantile(&echo_side, 0.99),
                               .kvpool_p50 = quantile(&kvpool_side, 0.5),
                               .kvpool_p99 = quantile(&kvpool_side, 0.99),
                               .request_bytes = n,
                               .reply_bytes = reply_bytes};
    figures.ratio = figures.kvpool_p50 / figures.echo_p50;
    close_side(&kvpool_side);
    close_side(&echo_side);
    stop_echo(echo, folder, echo_path);
    bench_daemon_stop(&daemon);
    return figures;
}

static double median(const struct figures *figures, unsigned n, size_t field)
{
    double values[TRIALS_MAX];

    for (unsigned i = 0; i < n; i++)
        memcpy(&values[i], (const char *)&figures[i] + field, sizeof(values[i]));
    qsort(values, n, sizeof(*values), by_value);
    return values[n / 2];
}

static int run(const struct options *options)
{
    struct figures figures[TRIALS_MAX] = {0};
    unsigned n = options->trials;
    double ratio;

    grpc_init();
    for (unsigned i = 0; i < n; i++)
        figures[i] = try_once(options);
    grpc_shutdown_blocking();
    ratio = median(figures, n, offsetof(struct figures, ratio));
    printf("{\"bench\": \"grpc_get_seq_lens\", \"batch\": %u, \"calls\": %u, \"request_bytes\": %zu, "
           "\"reply_bytes\": %zu, \"echo_p50_us\": %.1f, \"echo_p99_us\": %.1f, \"kvpoold_p50_us\": %.1f, "
           "\"kvpoold_p99_us\": %.1f, \"ratio\": %.3f, \"bar\": %.1f, \"ratios\": [",
           options->batch, n * options->rounds * options->calls, figures[0].request_bytes, figures[0].reply_bytes,
           median(figures, n, offsetof(struct figures, echo_p50)),
           median(figures, n, offsetof(struct figures, echo_p99)),
           median(figures, n, offsetof(struct figures, kvpool_p50)),
           median(figures, n, offsetof(struct figures, kvpool_p99)), ratio, RATIO_BAR);
    for (unsigned i = 0; i < n; i++)
        printf("%s%.3f", i > 0 ? ", " : "", figures[i].ratio);
    printf("]}\n");
    return options->check && ratio > RATIO_BAR ? 1 : 0;
}

static bool parse(int argc, char **argv, struct options *ret_options)
{
    const struct {
        const char *name;
        unsigned *value, max;
    } numbers[] = {{"--batch", &ret_options->batch, KVP_BATCH_MAX},
                   {"--trials", &ret_options->trials, TRIALS_MAX},
                   {"--rounds", &ret_options->rounds, 100000},
                   {"--calls", &ret_options->calls, 10000}};

    for (int i = 1; i < argc; i++) {
        size_t k = 0;

        if (strcmp(argv[i], "--check") == 0) {
            ret_options->check = true;
            continue;
        }
        while (k < 4 && strcmp(argv[i], numbers[k].name) != 0)
            k++;
        if (k == 4 || ++i == argc)
            return false;
        *numbers[k].value = (unsigned)strtoul(argv[i], NULL, 10);
        if (*numbers[k].value < 1 || *numbers[k].value > numbers[k].max)
            return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    struct options options = {.batch = 64, .trials = 9, .rounds = 40, .calls = 20};

    if (argc == 4 && strcmp(argv[1], "--echo") == 0) {
        grpc_echo_serve(atoi(argv[2]), strtoul(argv[3], NULL, 10));
        return 1;
    }
    if (!parse(argc, argv, &options))
        bench_fail("usage: kvp_bench_grpc [--batch SEQUENCES] [--trials N] [--rounds N] [--calls N] [--check]");
    return run(&options);
}
