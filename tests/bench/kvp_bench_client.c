/**
 * libkvpool's costs: a length read from the table, a row of 64 pages, Advance of 256 sequences beside a bare SEQPACKET
 * echo of the same message sizes in the same run, and an attach.
 *
 *     kvp_bench_client [--trials N] [--rounds N] [--json] [--check]
 *
 * A trial starts daemon and echo anew, and makes `rounds` calls to each, one to the one and one to the other in turn,
 * so that both see the same machine. Each Advance is real: every sequence gets room for one token more. Where the
 * kernel puts the processes lasts for a trial, so the ratio that counts is the median of the trials' ratios of p50s.
 *
 * Bars: 20 ns a length, ratio 1.5. --check: exit 1 over a bar.
 */
#include "bench_daemon.h"
#include "kvpool.h"
#include "kvpool.pb-c.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define LENGTH_BAR_NS 20.0
#define RATIO_BAR     1.5
#define SEQUENCES     256u
#define PAGE_TOKENS   16u
#define ROW_PAGES     64u
#define PAGES         (SEQUENCES * 128u)
#define ROUNDS_MAX    1000u /* and as many tokens a sequence: behind ROW_PAGES pages, 1000 more fit in 128 */
#define TRIALS_MAX    99u
#define LENGTH_READS  4000000u
#define ROW_READS     200000u
#define ATTACHES      20u

struct options {
    unsigned trials, rounds;
    bool json, check;
};

struct figures {
    double length_ns, row_ns, attach_us, detach_us;
    double advance_p50_us, advance_p99_us, echo_p50_us, echo_p99_us, ratio;
};

static double now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static void must(enum kvp_status status, const char *what)
{
    char text[600];

    if (status == KVP_OK)
        return;
    snprintf(text, sizeof(text), "%s: %s (%s)", what, kvp_error_text(), kvp_status_name(status));
    bench_fail(text);
}
#define MUST(call) must(call, #call)

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double quantile(double *values, unsigned n, double q)
{
    qsort(values, n, sizeof(*values), by_size);
    return values[(unsigned)(q * (n - 1))];
}

/* ---- the echo ---------------------------------------------------------------------------------------------------- */

struct echo {
    pid_t pid;
    int socket;
    size_t request_bytes, reply_bytes;
};

/* The sizes of an Advance of SEQUENCES and its answer, envelopes included. */
static void message_sizes(size_t *ret_request, size_t *ret_reply)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    Kvpool__V1__AdvanceReply reply = KVPOOL__V1__ADVANCE_REPLY__INIT;
    static uint64_t words[SEQUENCES];
    static uint32_t halves[SEQUENCES];

    request.call_id = 1;
    request.pool = (char *)"bench";
    request.n_seqs = request.n_reserved = SEQUENCES;
    request.seqs = words;
    request.reserved = halves;
    reply.n_written = reply.n_versions = SEQUENCES;
    reply.written = reply.versions = halves;
    *ret_request = sizeof(struct kvp_envelope) + protobuf_c_message_get_packed_size(&request.base);
    *ret_reply = sizeof(struct kvp_envelope) + protobuf_c_message_get_packed_size(&reply.base);
}

static _Noreturn void serve_echo(int socket, size_t reply_bytes)
{
    static unsigned char buffer[KVP_DATAGRAM_BYTES_MAX];

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (recv(socket, buffer, sizeof(buffer), 0) > 0)
        if (send(socket, buffer, reply_bytes, MSG_NOSIGNAL) < 0)
            break;
    _exit(0);
}

static void echo_start(struct echo *echo)
{
    int pair[2];

    message_sizes(&echo->request_bytes, &echo->reply_bytes);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        bench_fail("socketpair");
    echo->pid = fork();
    if (echo->pid < 0)
        bench_fail("fork");
    if (echo->pid == 0) {
        close(pair[0]);
        serve_echo(pair[1], echo->reply_bytes);
    }
    close(pair[1]);
    echo->socket = pair[0];
}

static double echo_once(const struct echo *echo)
{
    static unsigned char buffer[KVP_DATAGRAM_BYTES_MAX];
    double before = now_ns();

    if (send(echo->socket, buffer, echo->request_bytes, MSG_NOSIGNAL) != (ssize_t)echo->request_bytes ||
        recv(echo->socket, buffer, sizeof(buffer), 0) != (ssize_t)echo->reply_bytes)
        bench_fail("the echo does not answer");
    return now_ns() - before;
}

static void echo_stop(struct echo *echo)
{
    close(echo->socket);
    if (waitpid(echo->pid, NULL, 0) != echo->pid)
        bench_fail("the echo does not end");
}

/* ---- kvpool ------------------------------------------------------------------------------------------------------ */

struct world {
    struct bench_daemon daemon;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_seq seqs[SEQUENCES];
    uint32_t reserved[SEQUENCES];
};

static void set_up(struct world *w)
{
    struct kvp_plane_spec plane = {0, KVP_COMPONENT_K, 1, 16, KVP_DTYPE_U8};
    struct kvp_pool_spec spec = {
        .name = "bench",
        .layout = {.pages = PAGES, .page_tokens = PAGE_TOKENS, .n_planes = 1, .planes = &plane},
        .max_sequence_tokens = PAGES / SEQUENCES * PAGE_TOKENS};
    uint64_t keys[SEQUENCES];
    char endpoint[128];

    bench_daemon_start(&w->daemon);
    snprintf(endpoint, sizeof(endpoint), "%s/kvpool.sock", w->daemon.folder);
    MUST(kvp_connect(endpoint, NULL, &w->client));
    MUST(kvp_pool_create(w->client, &spec, NULL));
    MUST(kvp_attach(w->client, "bench", NULL, &w->pool));
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        keys[i] = i;
        w->reserved[i] = ROW_PAGES * PAGE_TOKENS;
    }
    MUST(kvp_seq_open(w->pool, SEQUENCES, keys, 0, w->seqs));
    MUST(kvp_advance(w->pool, SEQUENCES, w->seqs, w->reserved, NULL, 0, NULL, NULL, NULL));
}

static void tear_down(struct world *w)
{
    MUST(kvp_seq_close(w->pool, SEQUENCES, w->seqs, NULL));
    MUST(kvp_detach(w->pool));
    kvp_disconnect(w->client);
    bench_daemon_stop(&w->daemon);
}

static double advance_once(struct world *w)
{
    double before;

    for (uint32_t i = 0; i < SEQUENCES; i++)
        w->reserved[i]++;
    before = now_ns();
    MUST(kvp_advance(w->pool, SEQUENCES, w->seqs, w->reserved, NULL, 0, NULL, NULL, NULL));
    return now_ns() - before;
}

static void measure_calls(struct world *w, const struct options *options, struct figures *ret_figures)
{
    static double advance[ROUNDS_MAX], echo[ROUNDS_MAX];
    unsigned warm = options->rounds / 10;
    struct echo peer;

    echo_start(&peer);
    for (unsigned i = 0; i < warm; i++)
        echo_once(&peer);
    for (unsigned i = 0; i < options->rounds; i++) {
        advance[i] = advance_once(w) / 1e3;
        echo[i] = echo_once(&peer) / 1e3;
    }
    echo_stop(&peer);
    ret_figures->advance_p50_us = quantile(advance, options->rounds, 0.5);
    ret_figures->advance_p99_us = quantile(advance, options->rounds, 0.99);
    ret_figures->echo_p50_us = quantile(echo, options->rounds, 0.5);
    ret_figures->echo_p99_us = quantile(echo, options->rounds, 0.99);
    ret_figures->ratio = ret_figures->advance_p50_us / ret_figures->echo_p50_us;
}

static void measure_reads(struct world *w, struct figures *ret_figures)
{
    static int32_t pages[ROW_PAGES];
    uint32_t tokens, sum = 0, n;
    double before = now_ns();

    for (uint32_t i = 0; i < LENGTH_READS; i++) {
        if (kvp_seq_len(w->pool, w->seqs[i % SEQUENCES], &tokens) != KVP_OK)
            bench_fail("kvp_seq_len");
        sum += tokens;
    }
    ret_figures->length_ns = (now_ns() - before) / LENGTH_READS;
    if (sum != 0)
        bench_fail("nothing was written, and a length is not 0");
    before = now_ns();
    for (uint32_t i = 0; i < ROW_READS; i++)
        if (kvp_row(w->pool, w->seqs[i % SEQUENCES], ROW_PAGES, pages, &n) != KVP_OK || n != ROW_PAGES)
            bench_fail("kvp_row");
    ret_figures->row_ns = (now_ns() - before) / ROW_READS;
}

/* A second session: attach and detach, slab and tables. */
static void measure_attach(struct world *w, struct figures *ret_figures)
{
    double attach[ATTACHES], detach[ATTACHES];
    struct kvp_client *client;
    struct kvp_pool *pool;
    char endpoint[128];

    snprintf(endpoint, sizeof(endpoint), "%s/kvpool.sock", w->daemon.folder);
    MUST(kvp_connect(endpoint, NULL, &client));
    for (unsigned i = 0; i < ATTACHES; i++) {
        double before = now_ns();

        MUST(kvp_attach(client, "bench", NULL, &pool));
        attach[i] = (now_ns() - before) / 1e3;
        before = now_ns();
        MUST(kvp_detach(pool));
        detach[i] = (now_ns() - before) / 1e3;
    }
    kvp_disconnect(client);
    ret_figures->attach_us = quantile(attach, ATTACHES, 0.5);
    ret_figures->detach_us = quantile(detach, ATTACHES, 0.5);
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static double median_of(const struct figures *trials, unsigned n, size_t offset)
{
    double values[TRIALS_MAX];

    for (unsigned i = 0; i < n; i++)
        memcpy(&values[i], (const char *)&trials[i] + offset, sizeof(double));
    return quantile(values, n, 0.5);
}
#define MEDIAN(field) median_of(trials, options->trials, offsetof(struct figures, field))

static void print(const struct options *options, const struct figures *trials)
{
    const struct {
        const char *key;
        double value;
    } lines[] = {{"seq_len_ns", MEDIAN(length_ns)},
                 {"seq_len_bar_ns", LENGTH_BAR_NS},
                 {"row_64_pages_ns", MEDIAN(row_ns)},
                 {"advance_256_p50_us", MEDIAN(advance_p50_us)},
                 {"advance_256_p99_us", MEDIAN(advance_p99_us)},
                 {"echo_p50_us", MEDIAN(echo_p50_us)},
                 {"echo_p99_us", MEDIAN(echo_p99_us)},
                 {"ratio", MEDIAN(ratio)},
                 {"ratio_bar", RATIO_BAR},
                 {"attach_us", MEDIAN(attach_us)},
                 {"detach_us", MEDIAN(detach_us)}};
    size_t n = sizeof(lines) / sizeof(lines[0]);

    if (options->json)
        printf("{\n  \"trials\": %u,\n", options->trials);
    for (size_t i = 0; i < n; i++)
        printf(options->json ? "  \"%s\": %.2f%s\n" : "%-20s %10.2f%s\n", lines[i].key, lines[i].value,
               options->json && i + 1 < n ? "," : "");
    if (options->json)
        printf("}\n");
}

static int run(const struct options *options)
{
    static struct figures trials[TRIALS_MAX];
    static struct world world;

    for (unsigned i = 0; i < options->trials; i++) {
        world = (struct world){0};
        set_up(&world);
        measure_reads(&world, &trials[i]);
        measure_attach(&world, &trials[i]);
        measure_calls(&world, options, &trials[i]);
        tear_down(&world);
    }
    print(options, trials);
    return options->check && (MEDIAN(length_ns) > LENGTH_BAR_NS || MEDIAN(ratio) > RATIO_BAR) ? 1 : 0;
}

static bool parse(int argc, char **argv, struct options *options)
{
    for (int i = 1; i < argc; i++) {
        unsigned *number = strcmp(argv[i], "--trials") == 0   ? &options->trials
                           : strcmp(argv[i], "--rounds") == 0 ? &options->rounds
                                                              : NULL;

        if (strcmp(argv[i], "--json") == 0)
            options->json = true;
        else if (strcmp(argv[i], "--check") == 0)
            options->check = true;
        else if (number == NULL || ++i == argc || sscanf(argv[i], "%u", number) != 1)
            return false;
    }
    return options->trials >= 1 && options->trials <= TRIALS_MAX && options->rounds >= 10 &&
           options->rounds <= ROUNDS_MAX;
}

int main(int argc, char **argv)
{
    struct options options = {.trials = 5, .rounds = 1000};

    if (!parse(argc, argv, &options)) {
        fprintf(stderr, "kvp_bench_client [--trials 1..%u] [--rounds 10..%u] [--json] [--check]\n", TRIALS_MAX,
                ROUNDS_MAX);
        return 2;
    }
    return run(&options);
}
