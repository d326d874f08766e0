/**
 * kvpool replay: what the prefix cache hits on a trace of requests (trace.h), by the real calls at full speed.
 *
 * The pool has as many pages as --blocks says, else one for each different block of the trace. With --embedded no daemon
 * is asked: the same core and ledger work in this process. A run can be compared with a simulator to the block: requests
 * one after the other, each looked up, inserted and let go of before the next.
 */
#include "cli.h"
#include "replay.h"

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BAR_WIDTH      30
#define PLOT_PAGES_MIN 16u

/* One run of the command. */
struct session {
    struct cli *cli;
    const char *path;
    struct trace trace;
    struct replay_numbers numbers;
    uint32_t longest;
    uint64_t input_tokens;
    const char *doing; /* beside the bar; NULL: there is no bar */
};

static struct session *shown; /* whose progress is drawn */
static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    (void)number;
    interrupted = 1;
}

/* ---- what is asked for ------------------------------------------------------------------------------------------- */

static bool take_policy(const struct cli *cli, enum replay_policy *ret_policy)
{
    const char *word = cli_value(cli, CLI_POLICY);

    *ret_policy = REPLAY_ADAPTIVE;
    if (word == NULL || strcmp(word, "adaptive") == 0)
        return true;
    *ret_policy = REPLAY_LRU;
    if (strcmp(word, "lru") == 0)
        return true;
    cli_usage(cli, "--policy: `%s' is neither adaptive nor lru", word);
    return false;
}

static bool take_trace(struct session *s)
{
    if (!trace_read(s->path, &s->trace))
        return false;
    s->longest = 1;
    for (size_t i = 0; i < s->trace.n; i++) {
        const struct trace_request *r = &s->trace.requests[i];

        s->input_tokens += r->input_length;
        if (r->n_blocks > KVP_CALL_PAGES_MAX) {
            fprintf(stderr, "kvpool: trace %s, line %zu: %u blocks, at most %u in a call\n", s->path, r->line,
                    r->n_blocks, KVP_CALL_PAGES_MAX);
            return false;
        }
        if (r->n_blocks > s->longest)
            s->longest = r->n_blocks;
    }
    if (!replay_number(&s->trace, s->path, &s->numbers))
        return false;
    if (s->numbers.n_unique == 0 || s->numbers.n_unique > KVP_PAGES_MAX) {
        fprintf(stderr, "kvpool: trace %s has %u different blocks, must be 1 to %u\n", s->path, s->numbers.n_unique,
                KVP_PAGES_MAX);
        return false;
    }
    return true;
}

/* ---- a run ------------------------------------------------------------------------------------------------------- */

static bool show_progress(const struct replay *replay, size_t n_requests)
{
    size_t full = n_requests * BAR_WIDTH / replay->trace->n;
    char bar[BAR_WIDTH + 1];

    if (shown->doing != NULL) {
        memset(bar, '.', BAR_WIDTH);
        memset(bar, '#', full);
        bar[BAR_WIDTH] = 0;
        fprintf(stderr, "\r[%s] %3zu %%  %s, %u blocks\033[K", bar, n_requests * 100 / replay->trace->n, shown->doing,
                replay->pages);
    }
    return !interrupted;
}

static bool make_times(const struct session *s, struct replay_times *ret_times)
{
    *ret_times = (struct replay_times){calloc(s->trace.n, sizeof(uint32_t)), calloc(s->trace.n, sizeof(uint32_t))};
    if (ret_times->hits != NULL && ret_times->open_ns != NULL)
        return true;
    cli_failed("replay", KVP_ENOMEM);
    free(ret_times->hits);
    free(ret_times->open_ns);
    return false;
}

/* @return the exit status; what went wrong is said on stderr */
static int run_once(struct session *s, uint32_t pages, enum replay_policy policy, struct replay_result *result)
{
    struct replay replay = {
        .trace = &s->trace, .pages = pages, .policy = policy, .longest = s->longest, .progress = show_progress};
    struct replay_error why = {.what = "starting"};
    enum kvp_status status;

    shown = s;
    s->doing = isatty(STDERR_FILENO) ? policy == REPLAY_LRU ? "lru" : "adaptive" : NULL;
    if (cli_value(s->cli, CLI_EMBEDDED) != NULL)
        status = replay_embedded(&replay, result, &why);
    else
        status = replay_daemon(&replay, s->cli->client, result, &why);
    if (s->doing != NULL)
        fputs("\r\033[K", stderr);
    if (status == KVP_OK)
        return 0;
    if (interrupted)
        fputs("kvpool: replay: interrupted\n", stderr);
    else
        fprintf(stderr, "kvpool: replay: %s: %s (%s)\n", why.what, why.text[0] != 0 ? why.text : kvp_strerror(status),
                kvp_status_name(status));
    return 1;
}

static uint64_t hit_blocks(const struct session *s, const struct replay_result *result)
{
    uint64_t hits = 0;

    for (size_t i = 0; i < s->trace.n; i++)
        hits += result->times.hits[i];
    return hits;
}

static double block_rate(const struct session *s, uint64_t hits)
{
    return (double)hits / (double)s->trace.n_blocks;
}

/* ---- the plot ---------------------------------------------------------------------------------------------------- */

/* Capacities by halves, from one with room for all blocks down. */
static unsigned choose_points(const struct session *s, struct replay_point *points)
{
    uint32_t pages[REPLAY_PLOT_POINTS];
    unsigned n = 0;

    for (uint32_t p = s->numbers.n_unique; n < REPLAY_PLOT_POINTS && (n == 0 || p >= PLOT_PAGES_MIN); p /= 2)
        pages[n++] = p;
    for (unsigned i = 0; i < n; i++)
        points[i] = (struct replay_point){.pages = pages[n - 1 - i]};
    return n;
}

static int measure_point(struct session *s, struct replay_point *point, struct replay_result *result)
{
    uint64_t bound;
    int failed = run_once(s, point->pages, REPLAY_LRU, result);

    if (failed != 0)
        return failed;
    point->lru = block_rate(s, hit_blocks(s, result));
    failed = run_once(s, point->pages, REPLAY_ADAPTIVE, result);
    if (failed != 0)
        return failed;
    point->adaptive = block_rate(s, hit_blocks(s, result));
    if (!replay_bound(&s->trace, &s->numbers, point->pages, &bound))
        return cli_failed("replay: the offline optimum", KVP_ENOMEM);
    point->bound = block_rate(s, bound);
    return 0;
}

static int draw(struct session *s, const char *file)
{
    const char *slash = strrchr(s->path, '/'), *name = slash != NULL ? slash + 1 : s->path;
    struct replay_point points[REPLAY_PLOT_POINTS];
    struct replay_result result;
    unsigned n = choose_points(s, points);
    int failed = 0;
    char title[512];

    if (!make_times(s, &result.times))
        return 1;
    for (unsigned i = 0; i < n && failed == 0; i++)
        failed = measure_point(s, &points[i], &result);
    free(result.times.hits);
    free(result.times.open_ns);
    if (failed != 0)
        return failed;
    snprintf(title, sizeof(title), "%s: %zu requests, %zu blocks, %u different", name, s->trace.n, s->trace.n_blocks,
             s->numbers.n_unique);
    return !replay_plot(file, title, block_rate(s, s->trace.n_blocks - s->numbers.n_unique), points, n);
}

/* ---- the report -------------------------------------------------------------------------------------------------- */

static int by_time(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

/* With the digits that a clock of nanoseconds gives it. */
static double percentile_us(const uint32_t *sorted, size_t n, unsigned percent)
{
    return round((double)sorted[(n - 1) * percent / 100]) / 1000;
}

/* NAN: the size of a block is not known. */
static double token_rate(const struct session *s, const struct replay_result *result)
{
    uint64_t hits = 0;

    if (s->trace.block_tokens == 0)
        return NAN;
    for (size_t i = 0; i < s->trace.n; i++) {
        uint64_t tokens = (uint64_t)result->times.hits[i] * s->trace.block_tokens;

        hits += tokens < s->trace.requests[i].input_length ? tokens : s->trace.requests[i].input_length;
    }
    return (double)hits / (double)s->input_tokens;
}

static int report(const struct session *s, uint32_t pages, enum replay_policy policy, struct replay_result *result)
{
    uint64_t hits = hit_blocks(s, result);
    double tokens = token_rate(s, result), p50, p99;
    const char *word = policy == REPLAY_LRU ? "lru" : "adaptive";

    qsort(result->times.open_ns, s->trace.n, sizeof(*result->times.open_ns), by_time);
    p50 = percentile_us(result->times.open_ns, s->trace.n, 50);
    p99 = percentile_us(result->times.open_ns, s->trace.n, 99);
    if (cli_json(s->cli))
        return cli_print_json(json_pack("{s:I, s:I, s:I, s:f, s:o, s:I, s:f, s:f, s:I, s:s, s:f}", "requests",
                                        (json_int_t)s->trace.n, "blocks", (json_int_t)s->trace.n_blocks, "hit_blocks",
                                        (json_int_t)hits, "block_hit_rate", block_rate(s, hits), "token_hit_rate",
                                        isnan(tokens) ? json_null() : json_real(tokens), "evictions",
                                        (json_int_t)result->evictions, "open_p50_us", p50, "open_p99_us", p99,
                                        "pool_blocks", (json_int_t)pages, "policy", word, "seconds", result->seconds));
    printf("requests            %12zu   of %" PRIu64 " tokens\n", s->trace.n, s->input_tokens);
    printf("blocks              %12zu   %u different", s->trace.n_blocks, s->numbers.n_unique);
    if (s->trace.block_tokens > 0)
        printf(", of %u tokens", s->trace.block_tokens);
    printf("\npool                %12u   blocks, policy %s\n", pages, word);
    printf("hit blocks          %12" PRIu64 "   %.4f of all; %.4f with room for all\n", hits, block_rate(s, hits),
           block_rate(s, s->trace.n_blocks - s->numbers.n_unique));
    if (!isnan(tokens))
        printf("hit tokens          %12.4f   of all\n", tokens);
    printf("evictions           %12" PRIu64 "\n", result->evictions);
    printf("OpenSequences p50   %12.1f us\n", p50);
    printf("OpenSequences p99   %12.1f us\n", p99);
    printf("replayed            %12.2f million blocks/s over %.2f s\n",
           (double)s->trace.n_blocks / result->seconds / 1e6, result->seconds);
    return 0;
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

/* @param pages  0: as many as the trace has different blocks */
static int replay(struct session *s, uint32_t pages, enum replay_policy policy, const char *plot)
{
    struct replay_result result = {.evictions = 0};
    int failed;

    if (!take_trace(s))
        return 1;
    if (pages == 0)
        pages = s->numbers.n_unique;
    if (!make_times(s, &result.times))
        return 1;
    failed = run_once(s, pages, policy, &result);
    if (failed == 0)
        failed = report(s, pages, policy, &result);
    free(result.times.hits);
    free(result.times.open_ns);
    return failed != 0 || plot == NULL ? failed : draw(s, plot);
}

static int run_replay(struct cli *cli)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct session s = {.cli = cli, .path = cli->arguments[0]};
    const char *plot = cli_value(cli, CLI_PLOT);
    enum replay_policy policy;
    uint64_t pages;
    int result;

    if (!take_policy(cli, &policy) || !cli_number(cli, CLI_BLOCKS, 0, 1, KVP_PAGES_MAX, &pages))
        return 2;
    if (plot != NULL && !replay_plot_check(plot))
        return 1;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    result = replay(&s, (uint32_t)pages, policy, plot);
    replay_numbers_free(&s.numbers);
    trace_free(&s.trace);
    return result;
}

static const struct argp_option options[] = {
    {"embedded", CLI_EMBEDDED, NULL, 0, "Ask no daemon: core and ledger work in this process", 0},
    {"blocks", CLI_BLOCKS, "N", 0, "How many blocks the pool has room for (all that the trace has)", 0},
    {"policy", CLI_POLICY, "POLICY", 0, "Which cached block leaves first: adaptive (default) or lru", 0},
    {"plot", CLI_PLOT, "FILE", 0, "Draw hit rate over capacity, by gnuplot: a .png or .svg", 0},
    {0}};

const struct cli_command cli_replay_commands[] = {
    {.words = "replay",
     .arguments = "TRACE",
     .help = "Replay a request trace in the Mooncake format, and tell what the prefix cache hits.",
     .json = "requests, blocks, hit_blocks, block_hit_rate, token_hit_rate (null: the size of a block is not known), "
             "evictions, open_p50_us, open_p99_us, pool_blocks, policy, seconds.",
     .options = options,
     .min_arguments = 1,
     .max_arguments = 1,
     .alone = CLI_EMBEDDED,
     .run = run_replay},
    {0}};
