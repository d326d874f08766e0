/**
 * kvpool demo: the main job on real input, and whether it came out right.
 *
 * Makes a pool of its own, sized by the memory at hand; starts two workers (demo_worker.c) as processes of their own;
 * watches them for the time asked for; then counts: corrupted bytes that the workers found in each other's pages, and
 * pages that are not free again when both are gone. Either is a failure, as is a worker that dies.
 *
 * The model is shaped like an 8B one: 32 layers of 8 K and V heads of 128, fp16, pages of 16 tokens (128 KiB a token).
 * Where memory is short of what the trace needs, it gets fewer layers, and says so.
 */
#include "cli.h"
#include "demo.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECONDS_DEFAULT   10
#define POOL_PREFIX       "demo-" /* and the pid */
#define WATCH_MS          50
#define POOL_BYTES_MAX    (4ull << 30)
#define POOL_BYTES_WANTED (2ull << 30) /* enough, if the longest request fits: more would only be touched once */
#define POOL_TOKENS_MIN   8192u        /* with all layers; fewer layers rather than fewer tokens */
#define SLACK_PAGES       8u           /* forks for checking take one each */
#define READY_MS          60000u
#define END_MS            60000u /* workers that were told to stop end within */
#define RETURN_MS         15000u /* pages come back within: those of a killed worker take longest */
#define BAR_WIDTH         30

struct demo_process {
    pid_t pid;
    int pidfd; /* -1: reaped */
    int status;
};

struct demo {
    struct cli *cli;
    struct demo_board *board;
    int board_fd;
    struct demo_process workers[DEMO_WORKERS];
    uint64_t seconds;
    uint32_t free_before, peak_pages, pages, leaked_pages;
    uint32_t longest; /* tokens of the trace's longest request */
    double elapsed_s;
    bool worker_failed;
    struct kvp_pool *kept_pool; /* --inject-fault: where a page is kept */
    struct kvp_seq kept;
};

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    (void)number;
    interrupted = 1;
}

static uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void pause_ms(unsigned ms)
{
    poll(NULL, 0, (int)ms);
}

/* ---- the pool ---------------------------------------------------------------------------------------------------- */

/* A number in a file, behind a word if there is one. UINT64_MAX: no such file or number ("max"). */
static uint64_t number_in_file(const char *path, const char *word)
{
    uint64_t number = UINT64_MAX;
    char line[256];
    FILE *file = fopen(path, "r");

    if (file == NULL)
        return number;
    while (number == UINT64_MAX && fgets(line, sizeof(line), file) != NULL)
        if (strncmp(line, word, strlen(word)) == 0 && sscanf(line + strlen(word), "%" SCNu64, &number) != 1)
            number = UINT64_MAX;
    fclose(file);
    return number;
}

/* A quarter of the memory that is left, of the machine or of the control group. */
static uint64_t memory_budget(void)
{
    uint64_t left_kib = number_in_file("/proc/meminfo", "MemAvailable:");
    uint64_t limit = number_in_file("/sys/fs/cgroup/memory.max", "");
    uint64_t used = number_in_file("/sys/fs/cgroup/memory.current", "");
    uint64_t left = left_kib == UINT64_MAX ? 1ull << 30 : left_kib * 1024;

    if (limit != UINT64_MAX && used != UINT64_MAX && (limit > used ? limit - used : 0) < left)
        left = limit > used ? limit - used : 0;
    return left / 4 < POOL_BYTES_MAX ? left / 4 : POOL_BYTES_MAX;
}

static enum kvp_status create_pool(struct demo *demo, uint32_t layers, uint32_t pages, struct kvp_pool_info **ret_info)
{
    struct kvp_plane_spec planes[2 * DEMO_LAYERS_MAX];
    struct kvp_pool_spec spec = {
        .name = demo->board->pool,
        .model = "8B-shaped demo",
        .layout = {.pages = pages, .page_tokens = DEMO_PAGE_TOKENS, .n_planes = 2 * layers, .planes = planes},
        .max_sequence_tokens = demo->longest + DEMO_PAGE_TOKENS};

    for (uint32_t i = 0; i < 2 * layers; i++)
        planes[i] = (struct kvp_plane_spec){.layer = i / 2,
                                            .component = KVP_COMPONENT_K + i % 2,
                                            .heads = DEMO_KV_HEADS,
                                            .dim = DEMO_HEAD_DIM,
                                            .dtype = KVP_DTYPE_F16};
    return kvp_pool_create(demo->cli->client, &spec, ret_info);
}

/* As many layers as leave room for twice the longest request and more; as many pages as the budget holds. */
static enum kvp_status size_pool(struct demo *demo, struct kvp_pool_info **ret_info)
{
    uint64_t budget = memory_budget();
    uint64_t tokens = (uint64_t)demo->longest * 5 / 2 + SLACK_PAGES * DEMO_PAGE_TOKENS;
    enum kvp_status status = KVP_ENOMEM;

    if (tokens < POOL_TOKENS_MIN)
        tokens = POOL_TOKENS_MIN;
    snprintf(demo->board->pool, sizeof(demo->board->pool), POOL_PREFIX "%d", (int)getpid());
    for (uint32_t layers = DEMO_LAYERS_MAX; layers > 0 && status == KVP_ENOMEM;) {
        uint64_t page_bytes = (uint64_t)layers * 2 * DEMO_PAGE_TOKENS * DEMO_ROW_BYTES;
        uint64_t pages = budget / page_bytes;

        if (pages * DEMO_PAGE_TOKENS < tokens) {
            layers /= 2;
            continue;
        }
        if (pages > POOL_BYTES_WANTED / page_bytes && pages * DEMO_PAGE_TOKENS > tokens)
            pages = POOL_BYTES_WANTED / page_bytes * DEMO_PAGE_TOKENS > tokens ? POOL_BYTES_WANTED / page_bytes
                                                                               : tokens / DEMO_PAGE_TOKENS + 1;
        demo->board->layers = layers;
        status = create_pool(demo, layers, (uint32_t)pages, ret_info);
        budget /= 2;
    }
    if (status == KVP_ENOMEM)
        fprintf(stderr, "kvpool: demo: %" PRIu64 " tokens are needed, which do not fit the memory at hand\n", tokens);
    else if (status != KVP_OK)
        cli_failed("demo: creating its pool", status);
    return status;
}

/* ---- the workers ------------------------------------------------------------------------------------------------- */

static void exec_worker(const struct demo *demo, int index, int peer)
{
    const char *trace = cli_value(demo->cli, CLI_TRACE);
    char number[16], board_fd[16], peer_fd[16];
    char *argv[12];
    int n = 0;

    snprintf(number, sizeof(number), "%d", index);
    snprintf(board_fd, sizeof(board_fd), "%d", demo->board_fd);
    snprintf(peer_fd, sizeof(peer_fd), "%d", peer);
    argv[n++] = (char *)"kvpool";
    if (demo->cli->endpoint != NULL) {
        argv[n++] = (char *)"-e";
        argv[n++] = (char *)demo->cli->endpoint;
    }
    argv[n++] = (char *)"demo-worker";
    if (trace != NULL) {
        argv[n++] = (char *)"--trace";
        argv[n++] = (char *)trace;
    }
    argv[n++] = number;
    argv[n++] = board_fd;
    argv[n++] = peer_fd;
    argv[n] = NULL;
    execv("/proc/self/exe", argv);
    fprintf(stderr, "kvpool: demo: starting a worker: %s\n", strerror(errno));
    _exit(127);
}

/* The worker ends with its parent, leaves Ctrl-C to it, and inherits the board and its end of the pair alone. */
static bool start_worker(struct demo *demo, int index, const int pair[2])
{
    struct demo_process *process = &demo->workers[index];
    pid_t parent = getpid();

    process->pid = fork();
    if (process->pid == 0) {
        signal(SIGINT, SIG_IGN);
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
            _exit(127);
        close(pair[1 - index]);
        exec_worker(demo, index, pair[index]);
    }
    if (process->pid > 0)
        process->pidfd = (int)syscall(SYS_pidfd_open, process->pid, 0);
    if (process->pid < 0 || process->pidfd < 0) {
        fprintf(stderr, "kvpool: demo: starting a worker: %s\n", strerror(errno));
        return false;
    }
    return true;
}

static bool start_workers(struct demo *demo)
{
    bool good = true;
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) != 0) {
        fprintf(stderr, "kvpool: demo: a socket pair: %s\n", strerror(errno));
        return false;
    }
    for (int i = 0; i < DEMO_WORKERS && good; i++)
        good = start_worker(demo, i, pair);
    close(pair[0]);
    close(pair[1]);
    return good;
}

/* Wait up to timeout_ms for an end; reap who ended. @return how many still run */
static unsigned watch_workers(struct demo *demo, int timeout_ms)
{
    struct pollfd at[DEMO_WORKERS];
    unsigned running = 0;

    for (int i = 0; i < DEMO_WORKERS; i++)
        at[i] = (struct pollfd){.fd = demo->workers[i].pidfd, .events = POLLIN};
    poll(at, DEMO_WORKERS, timeout_ms);
    for (int i = 0; i < DEMO_WORKERS; i++) {
        struct demo_process *process = &demo->workers[i];

        if (process->pidfd < 0)
            continue;
        if (waitpid(process->pid, &process->status, WNOHANG) != process->pid) {
            running++;
            continue;
        }
        close(process->pidfd);
        process->pidfd = -1;
        if (WIFEXITED(process->status) && WEXITSTATUS(process->status) == 0)
            continue;
        demo->worker_failed = true;
        if (WIFSIGNALED(process->status))
            fprintf(stderr, "kvpool: demo: worker %d (pid %d) was killed by signal %d\n", i, (int)process->pid,
                    WTERMSIG(process->status));
    }
    return running;
}

/* ---- watching ---------------------------------------------------------------------------------------------------- */

static uint64_t sum(const struct demo *demo, size_t offset)
{
    uint64_t total = 0;

    for (int i = 0; i < DEMO_WORKERS; i++) {
        const char *at = (const char *)&demo->board->workers[i] + offset;

        total += atomic_load((const _Atomic uint64_t *)(const void *)at);
    }
    return total;
}
#define SUM(demo, field) sum(demo, offsetof(struct demo_worker_board, field))

static void draw_bar(const struct demo *demo, uint64_t ms)
{
    uint64_t total_ms = demo->seconds * 1000;
    unsigned full = total_ms == 0 || ms >= total_ms ? BAR_WIDTH : (unsigned)(ms * BAR_WIDTH / total_ms);
    char bar[BAR_WIDTH + 1], rate[CLI_AMOUNT_BYTES];

    memset(bar, '.', BAR_WIDTH);
    memset(bar, '#', full);
    bar[BAR_WIDTH] = 0;
    fprintf(stderr, "\r[%s] %5.1f s  %" PRIu64 " requests  %" PRIu64 " tokens  %s/s   ", bar, (double)ms / 1000,
            SUM(demo, requests), SUM(demo, tokens), cli_bytes_text(ms > 0 ? SUM(demo, bytes) * 1000 / ms : 0, rate));
}

static bool note_pages(struct demo *demo, uint32_t *ret_free)
{
    struct kvp_pool_info *info;
    enum kvp_status status = kvp_pool_describe(demo->cli->client, demo->board->pool, &info);

    if (status != KVP_OK) {
        cli_failed("demo: asking for its pool", status);
        return false;
    }
    *ret_free = info->free_pages + info->cache.cached_pages; /* what is cached makes room when it is needed */
    if (*ret_free < demo->free_before && demo->free_before - *ret_free > demo->peak_pages)
        demo->peak_pages = demo->free_before - *ret_free;
    kvp_pool_info_free(info);
    return true;
}

static bool all_ready(const struct demo *demo)
{
    for (int i = 0; i < DEMO_WORKERS; i++)
        if (atomic_load(&demo->board->workers[i].ready) == 0)
            return false;
    return true;
}

/* From the start to the end of both workers. @return false: they had to be killed, or the daemon is gone */
static bool watch(struct demo *demo)
{
    bool bar = isatty(STDERR_FILENO) && !demo->worker_failed;
    uint64_t start_ms = now_ms(), stop_ms = 0;
    unsigned running = DEMO_WORKERS;
    bool good = true;
    uint32_t free_pages;

    while (!all_ready(demo) && running == DEMO_WORKERS && !interrupted && now_ms() - start_ms < READY_MS)
        running = watch_workers(demo, 5);
    start_ms = now_ms();
    atomic_store(&demo->board->go, 1);
    while (running > 0 && good) {
        uint64_t ms = now_ms() - start_ms;

        if (stop_ms == 0 && (ms >= demo->seconds * 1000 || interrupted || demo->worker_failed || !all_ready(demo))) {
            atomic_store(&demo->board->stop, 1);
            stop_ms = ms + 1;
        }
        if (stop_ms != 0 && ms - stop_ms + 1 > END_MS) {
            fprintf(stderr, "kvpool: demo: the workers do not end\n");
            good = false;
            break;
        }
        if (bar)
            draw_bar(demo, ms);
        good = note_pages(demo, &free_pages);
        running = watch_workers(demo, WATCH_MS);
    }
    demo->elapsed_s = (double)(now_ms() - start_ms) / 1000;
    if (bar)
        fputs("\r\033[K", stderr);
    for (int i = 0; i < DEMO_WORKERS && !good; i++)
        if (demo->workers[i].pidfd >= 0)
            kill(demo->workers[i].pid, SIGKILL);
    while (!good && running > 0)
        running = watch_workers(demo, WATCH_MS);
    return good;
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

/* One page that is not given back, to see that it is counted. */
static enum kvp_status keep_a_page(struct demo *demo)
{
    const struct kvp_attach_options options = {.metadata_only = true};
    uint64_t key = 1;
    uint32_t reserved = 1;
    enum kvp_status status = kvp_attach(demo->cli->client, demo->board->pool, &options, &demo->kept_pool);

    if (status == KVP_OK)
        status = kvp_seq_open(demo->kept_pool, 1, &key, 0, &demo->kept);
    if (status == KVP_OK)
        status = kvp_advance(demo->kept_pool, 1, &demo->kept, &reserved, NULL, 0, NULL, NULL, NULL);
    return status;
}

static void give_the_page_back(struct demo *demo)
{
    struct kvp_point after = {0};

    if (demo->kept_pool == NULL)
        return;
    if (kvp_timeline_id(demo->kept_pool, 1, &after.timeline) == KVP_OK &&
        kvp_timeline_value(demo->kept_pool, after.timeline, &after.value) == KVP_OK) {
        after.value++;
        kvp_timeline_signal(demo->kept_pool, after, NULL);
    }
    kvp_seq_close(demo->kept_pool, 1, &demo->kept, &after);
    kvp_detach(demo->kept_pool);
}

/* Pages that are not free again, beside the one that is kept on purpose. They come back as the daemon reclaims them, which
 * takes longer of a killed worker. */
static bool count_leaks(struct demo *demo)
{
    uint64_t deadline_ms = now_ms() + RETURN_MS;
    uint32_t free_pages, kept = demo->board->inject_fault != 0 ? 1 : 0;

    for (;;) {
        if (!note_pages(demo, &free_pages))
            return false;
        demo->leaked_pages = demo->free_before > free_pages ? demo->free_before - free_pages : 0;
        if (demo->leaked_pages <= kept || now_ms() >= deadline_ms)
            return true;
        pause_ms(10);
    }
}

static void delete_pool(struct demo *demo)
{
    uint64_t deadline_ms = now_ms() + RETURN_MS;
    enum kvp_status status;

    do {
        status = kvp_pool_delete(demo->cli->client, demo->board->pool);
        if (status == KVP_EBUSY)
            pause_ms(10);
    } while (status == KVP_EBUSY && now_ms() < deadline_ms);
    if (status != KVP_OK)
        cli_failed("demo: deleting its pool", status);
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

/* Of the round trips of Advance, in microseconds. */
static void percentiles(const struct demo *demo, double *ret_p50, double *ret_p99)
{
    uint32_t *all = malloc(sizeof(*all) * DEMO_WORKERS * DEMO_SAMPLES_MAX);
    size_t n = 0;

    *ret_p50 = *ret_p99 = 0;
    if (all == NULL)
        return;
    for (int i = 0; i < DEMO_WORKERS; i++) {
        uint64_t samples = atomic_load(&demo->board->workers[i].samples);

        for (uint64_t k = 0; k < samples && k < DEMO_SAMPLES_MAX; k++)
            all[n++] = atomic_load(&demo->board->workers[i].advance_ns[k]);
    }
    qsort(all, n, sizeof(*all), by_size);
    if (n > 0) {
        *ret_p50 = all[n / 2] / 1000.0;
        *ret_p99 = all[n * 99 / 100] / 1000.0;
    }
    free(all);
}

/* @return whether a worker never came to serve; the worker itself said on stderr why */
static bool never_served(const struct demo *demo)
{
    bool none = false;

    for (int i = 0; i < DEMO_WORKERS; i++) {
        if (atomic_load(&demo->board->workers[i].ready) != 0)
            continue;
        fprintf(stderr, "kvpool: demo: worker %d did not attach pool %s: nothing was measured\n", i, demo->board->pool);
        none = true;
    }
    return none;
}

static int report(const struct demo *demo)
{
    uint64_t rate = demo->elapsed_s > 0 ? (uint64_t)((double)SUM(demo, bytes) / demo->elapsed_s) : 0;
    uint64_t corrupt = SUM(demo, corrupt_bytes);
    int failed = corrupt != 0 || demo->leaked_pages != 0 || demo->worker_failed;
    char text[CLI_AMOUNT_BYTES];
    double p50, p99;

    percentiles(demo, &p50, &p99);
    if (cli_json(demo->cli))
        return cli_print_json(json_pack("{s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:I, s:I}", "requests",
                                        (json_int_t)SUM(demo, requests), "tokens", (json_int_t)SUM(demo, tokens),
                                        "hit_tokens", (json_int_t)SUM(demo, hit_tokens), "peak_pages",
                                        (json_int_t)demo->peak_pages, "append_bytes_per_s", (json_int_t)rate,
                                        "advance_p50_us", p50, "advance_p99_us", p99, "corrupt_bytes",
                                        (json_int_t)corrupt, "leaked_pages", (json_int_t)demo->leaked_pages)) ||
               failed;
    printf("requests            %12" PRIu64 "\n", SUM(demo, requests));
    printf("tokens              %12" PRIu64 "   and %" PRIu64 " of prompts found in the cache\n", SUM(demo, tokens),
           SUM(demo, hit_tokens));
    printf("pages at peak       %12u   of %u\n", demo->peak_pages, demo->pages);
    printf("pages checked       %12" PRIu64 "   by the other worker, in place\n", SUM(demo, checked_pages));
    printf("appended            %12s/s over %.1f s\n", cli_bytes_text(rate, text), demo->elapsed_s);
    printf("Advance p50         %12.1f us\n", p50);
    printf("Advance p99         %12.1f us\n", p99);
    printf("corrupted bytes     %12" PRIu64 "\n", corrupt);
    printf("leaked pages        %12u\n", demo->leaked_pages);
    return failed;
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

static bool make_board(struct demo *demo)
{
    demo->board_fd = memfd_create("kvpool-demo", 0);
    if (demo->board_fd < 0 || ftruncate(demo->board_fd, sizeof(*demo->board)) != 0) {
        fprintf(stderr, "kvpool: demo: shared memory: %s\n", strerror(errno));
        return false;
    }
    demo->board = mmap(NULL, sizeof(*demo->board), PROT_READ | PROT_WRITE, MAP_SHARED, demo->board_fd, 0);
    if (demo->board == MAP_FAILED) {
        fprintf(stderr, "kvpool: demo: shared memory: %s\n", strerror(errno));
        return false;
    }
    return true;
}

/* The trace is read here to size the pool by it; the workers read it for themselves. */
static bool read_trace(struct demo *demo)
{
    const char *path = cli_value(demo->cli, CLI_TRACE);
    struct demo_trace trace;

    if (path != NULL ? !demo_trace_read(path, &trace) : !demo_trace_chat(&trace))
        return false;
    demo->longest = trace.longest;
    if (!cli_json(demo->cli))
        printf("%s: %zu requests, the longest of %u tokens, blocks of %u\n",
               path != NULL ? path : "built-in chat workload", trace.n, trace.longest, trace.block_tokens);
    demo_trace_free(&trace);
    return true;
}

static void say_pool(const struct demo *demo, const struct kvp_pool_info *info)
{
    char page[CLI_AMOUNT_BYTES], all[CLI_AMOUNT_BYTES];

    printf("pool %s (%s): an 8B-shaped model, %u layers x %d KV heads x %d, fp16; %u pages of %d tokens, %s each: %s\n",
           info->spec.name, info->cuda ? "cuda" : "host", demo->board->layers, DEMO_KV_HEADS, DEMO_HEAD_DIM,
           info->spec.layout.pages, DEMO_PAGE_TOKENS, cli_bytes_text(info->page_bytes, page),
           cli_bytes_text(info->slab_bytes, all));
    if (demo->board->layers < DEMO_LAYERS_MAX)
        printf("scaled: %u of its %d layers, for the memory at hand and the trace's longest request\n",
               demo->board->layers, DEMO_LAYERS_MAX);
    fflush(stdout);
}

static int run_in_pool(struct demo *demo)
{
    enum kvp_status status;
    bool good;

    if (demo->board->inject_fault != 0) {
        status = keep_a_page(demo);
        if (status != KVP_OK)
            return cli_failed("demo: keeping a page", status);
    }
    good = start_workers(demo);
    if (!good) {
        demo->worker_failed = true;
        atomic_store(&demo->board->stop, 1);
    }
    good = watch(demo) && good;
    good = count_leaks(demo) && good;
    if (!interrupted && never_served(demo))
        return 1;
    return report(demo) || !good;
}

static int run_demo(struct cli *cli)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct demo demo = {.cli = cli, .board_fd = -1, .workers = {{.pidfd = -1}, {.pidfd = -1}}};
    struct kvp_pool_info *info;
    int result = 1;

    if (!cli_number(cli, CLI_SECONDS, SECONDS_DEFAULT, 1, 86400, &demo.seconds))
        return 2;
    if (!make_board(&demo) || !read_trace(&demo))
        return 1;
    demo.board->inject_fault = cli_value(cli, CLI_INJECT_FAULT) != NULL ? DEMO_FAULT_INJECT : DEMO_FAULT_NONE;
    cli_delete_abandoned_pools(cli->client, POOL_PREFIX);
    if (size_pool(&demo, &info) != KVP_OK)
        goto unmap_board;
    demo.pages = info->spec.layout.pages;
    demo.free_before = info->free_pages;
    demo.board->quota_pages = (demo.pages - SLACK_PAGES) / DEMO_WORKERS;
    if (!cli_json(cli))
        say_pool(&demo, info);
    kvp_pool_info_free(info);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    result = run_in_pool(&demo);
    give_the_page_back(&demo);
    delete_pool(&demo);

unmap_board:
    munmap(demo.board, sizeof(*demo.board));
    close(demo.board_fd);
    return result;
}

static const struct argp_option demo_options[] = {
    {"trace", CLI_TRACE, "FILE.jsonl", 0, "Requests in the Mooncake format (a built-in chat workload)", 0},
    {"seconds", CLI_SECONDS, "N", 0, "How long to serve, at most (10)", 0},
    {"inject-fault", CLI_INJECT_FAULT, NULL, 0, "Flip one byte and keep one page, to see that it is found: exits 1", 0},
    {0}};

static const struct argp_option worker_options[] = {{"trace", CLI_TRACE, "FILE.jsonl", 0, "As the demo's", 0}, {0}};

const struct cli_command cli_demo_commands[] = {
    {.words = "demo",
     .arguments = "",
     .help = "Serve a request trace by two worker processes that check each other's bytes in place.",
     .json =
         "requests, tokens, hit_tokens, peak_pages, append_bytes_per_s, advance_p50_us, advance_p99_us, corrupt_bytes, "
         "leaked_pages. The exit status is 1 when one of the last two is not 0, or a worker failed.",
     .options = demo_options,
     .run = run_demo},
    {.words = "demo-worker",
     .arguments = "INDEX BOARD-FD PEER-FD",
     .help = "A worker of the demo, started by it.",
     .options = worker_options,
     .min_arguments = 3,
     .max_arguments = 3,
     .hidden = true,
     .run = demo_worker_run},
    {0}};
