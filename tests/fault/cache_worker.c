/** The worker of kill_cache; see cache_worker.h. */
#include "cache_worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FAMILIES   8u
#define LENGTH_MAX 200u /* tokens of a sequence */
#define PAGES_MAX  (LENGTH_MAX / CACHE_TOKENS + 1)
#define OPEN_MAX   3u
#define ROW_BYTES  (CACHE_HEADS * CACHE_DIM * 2u)
#define PAGE_BYTES (CACHE_PLANES * CACHE_TOKENS * ROW_BYTES)
#define TAG(uid)   (0x5a00000000000000ull | (uint64_t)(uid) << 32)
#define TAG_BITS   0xffffffff00000000ull

struct prompt {
    uint32_t n;
    uint32_t tokens[LENGTH_MAX];
    uint64_t stamps[LENGTH_MAX]; /* of all tokens up to each */
};

struct open_seq {
    struct kvp_seq seq;
    struct prompt prompt;
    uint32_t written;
};

struct cache_work {
    const struct cache_job *job;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_step *step;
    struct kvp_point after; /* the last that was signalled */
    uint64_t random, next_key, tag;
    struct open_seq open[OPEN_MAX];
    unsigned n_open;
    unsigned char *pages;  /* [PAGES_MAX · PAGE_BYTES] read */
    unsigned char *staged; /* [planes][LENGTH_MAX · ROW_BYTES] to be written */
    bool failed;
};

uint64_t cache_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static uint32_t below(struct cache_work *w, uint32_t n)
{
    return (uint32_t)(cache_random(&w->random) % n);
}

static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t state = a ^ b * 0xff51afd7ed558ccdull;

    return cache_random(&state);
}

void cache_make_pool(struct kvp_client *client)
{
    struct kvp_plane_spec planes[CACHE_PLANES];
    struct kvp_pool_spec spec = {.name = CACHE_POOL, .max_sequences = 128, .max_sequence_tokens = LENGTH_MAX};

    for (unsigned p = 0; p < CACHE_PLANES; p++)
        planes[p] = (struct kvp_plane_spec){.layer = p / 2,
                                            .component = p % 2 ? KVP_COMPONENT_V : KVP_COMPONENT_K,
                                            .heads = CACHE_HEADS,
                                            .dim = CACHE_DIM,
                                            .dtype = KVP_DTYPE_F16};
    spec.layout = (struct kvp_layout_spec){
        .pages = CACHE_PAGES, .page_tokens = CACHE_TOKENS, .n_planes = CACHE_PLANES, .planes = planes};
    if (kvp_pool_create(client, &spec, NULL) != KVP_OK) {
        fprintf(stderr, "kill_cache: pool: %s\n", kvp_error_text());
        exit(1);
    }
}

/* ---- prompts and bytes ------------------------------------------------------------------------------------------- */

/* A path: a family, and at each page one of two ways, of which the first is taken more often. */
static void make_prompt(struct cache_work *w, struct prompt *prompt)
{
    uint64_t path = below(w, FAMILIES) + 1, stamp = w->tag;

    prompt->n = 1 + below(w, LENGTH_MAX);
    for (uint32_t i = 0; i < prompt->n; i++) {
        if (i % CACHE_TOKENS == 0)
            path = mix(path, below(w, 5) == 0);
        prompt->tokens[i] = (uint32_t)mix(path, i);
        stamp = mix(stamp, prompt->tokens[i]);
        prompt->stamps[i] = stamp;
    }
}

static void fill_row(const struct cache_work *w, uint64_t stamp, unsigned plane, unsigned char *ret_row)
{
    uint64_t state = stamp + plane, word = w->tag | (cache_random(&state) & ~TAG_BITS);

    for (unsigned i = 0; i < ROW_BYTES; i += 8, word = cache_random(&state))
        memcpy(ret_row + i, &word, 8);
}

static void broke(struct cache_work *w, const char *what)
{
    fprintf(stderr, "kill_cache: worker %d: %s: %s\n", (int)getpid(), what, kvp_error_text());
    atomic_fetch_add(&w->job->shared->failed, 1);
    w->failed = true;
}

static const unsigned char *row_read(const struct cache_work *w, unsigned plane, uint32_t token)
{
    return w->pages + token / CACHE_TOKENS * PAGE_BYTES +
           (plane * CACHE_TOKENS + token % CACHE_TOKENS) * (size_t)ROW_BYTES;
}

/* Pages [first, n) of a row into w->pages, at their places. */
static bool read_pages(struct cache_work *w, struct kvp_seq seq, uint32_t first, uint32_t n)
{
    int32_t row[PAGES_MAX];
    uint32_t got = 0;

    if (kvp_row(w->pool, seq, PAGES_MAX, row, &got) == KVP_OK && got >= n &&
        (first == n ||
         kvp_read_pages(w->step, n - first, row + first, w->pages + (size_t)first * PAGE_BYTES, NULL) == KVP_OK))
        return true;
    broke(w, "reading pages");
    return false;
}

/* The first n tokens are there, byte by byte. */
static void verify(struct cache_work *w, const struct open_seq *own, uint32_t n)
{
    unsigned char row[ROW_BYTES];
    unsigned long long wrong = 0;

    if (!read_pages(w, own->seq, 0, (n + CACHE_TOKENS - 1) / CACHE_TOKENS))
        return;
    for (uint32_t t = 0; t < n; t++) {
        for (unsigned p = 0; p < CACHE_PLANES; p++) {
            const unsigned char *at = row_read(w, p, t);

            fill_row(w, own->prompt.stamps[t], p, row);
            for (unsigned i = 0; i < ROW_BYTES; i++)
                wrong += at[i] != row[i];
        }
    }
    if (wrong != 0)
        fprintf(stderr, "kill_cache: worker %d: %llu wrong bytes in %u tokens\n", (int)getpid(), wrong, n);
    atomic_fetch_add(&w->job->shared->corrupt_bytes, wrong);
}

/* Pages that are ours from now on hold nothing of another user's. */
static void look_for_foreign(struct cache_work *w, const struct open_seq *own, uint32_t first, uint32_t n)
{
    unsigned long long foreign = 0;

    if (!read_pages(w, own->seq, first, n))
        return;
    for (uint32_t t = first * CACHE_TOKENS; t < n * CACHE_TOKENS; t++) {
        for (unsigned p = 0; p < CACHE_PLANES; p++) {
            uint64_t word;

            memcpy(&word, row_read(w, p, t), 8);
            foreign += word != 0 && (word & TAG_BITS) != w->tag;
        }
    }
    atomic_fetch_add(&w->job->shared->foreign_rows, foreign);
}

/* ---- the calls --------------------------------------------------------------------------------------------------- */

/* On a GPU pages are given up behind a point; all of this process's work is over when it is reached. */
static bool pass_point(struct cache_work *w)
{
    w->after.value++;
    if (kvp_timeline_signal(w->pool, w->after, NULL) == KVP_OK)
        return true;
    broke(w, "signalling");
    return false;
}

static void close_one(struct cache_work *w, unsigned i)
{
    if (!pass_point(w))
        return;
    if (kvp_seq_close(w->pool, 1, &w->open[i].seq, &w->after) != KVP_OK)
        broke(w, "closing");
    w->open[i] = w->open[--w->n_open];
}

static struct kvp_blocks blocks_of(const struct prompt *prompt, const uint32_t *count)
{
    return (struct kvp_blocks){.counts = count, .tokens = prompt->tokens};
}

/* Tokens up to `to`, by this process's kernels. */
static void write_tokens(struct cache_work *w, struct open_seq *own, uint32_t to)
{
    uint32_t n = to - own->written;
    struct kvp_token_view sources[CACHE_PLANES];

    if (n == 0 || w->failed)
        return;
    for (unsigned p = 0; p < CACHE_PLANES; p++) {
        unsigned char *at = w->staged + (size_t)p * LENGTH_MAX * ROW_BYTES;

        for (uint32_t t = 0; t < n; t++)
            fill_row(w, own->prompt.stamps[own->written + t], p, at + (size_t)t * ROW_BYTES);
        sources[p] = (struct kvp_token_view){at, ROW_BYTES, CACHE_DIM * 2};
    }
    if (kvp_step_begin(w->step, 1, &own->seq, &n, &own->written, NULL) != KVP_OK ||
        kvp_append(w->step, 0, CACHE_PLANES, sources, NULL) != KVP_OK || kvp_progress(w->step, NULL) != KVP_OK ||
        kvp_stream_sync(w->pool, 0, NULL) != KVP_OK) {
        broke(w, "writing");
        return;
    }
    own->written = to;
    atomic_fetch_add(&w->job->shared->written_tokens, n);
}

/* The same by the executor. @return whether it was done: there may be no room, or the daemon was killed before an
 * executor had the work, which is said by KVP_EDEVICE and changes nothing */
static bool append_tokens(struct cache_work *w, struct open_seq *own, uint32_t to)
{
    uint32_t n = to - own->written;
    struct kvp_append_request request = {
        .n = 1, .seqs = &own->seq, .at = &own->written, .tokens = &n, .bytes = w->staged};
    struct kvp_point done;
    enum kvp_status status;

    if (n == 0)
        return true;
    request.bytes_n = (size_t)CACHE_PLANES * n * ROW_BYTES;
    for (unsigned p = 0; p < CACHE_PLANES; p++)
        for (uint32_t t = 0; t < n; t++)
            fill_row(w, own->prompt.stamps[own->written + t], p, w->staged + ((size_t)p * n + t) * ROW_BYTES);
    status = kvp_append_on_request(w->pool, &request, &done, NULL);
    if (status == KVP_ENOPAGES)
        return false;
    if (status == KVP_OK)
        status = kvp_timeline_wait(w->pool, done, 60000);
    if (status != KVP_OK) {
        if (status != KVP_EDEVICE)
            broke(w, "appending on request");
        return false;
    }
    own->written = to;
    atomic_fetch_add(&w->job->shared->written_tokens, n);
    return true;
}

/* Room for the first `tokens` of the prompt, and what its pages from `first` on hold. @return false: no room */
static bool name_tokens(struct cache_work *w, struct open_seq *own, uint32_t first, uint32_t tokens)
{
    uint32_t count = tokens - first * CACHE_TOKENS, rows = 0;
    struct kvp_blocks blocks = {.counts = &count, .first = &first, .tokens = own->prompt.tokens + first * CACHE_TOKENS};
    int32_t row[PAGES_MAX];
    enum kvp_status status;

    if (kvp_row(w->pool, own->seq, PAGES_MAX, row, &rows) != KVP_OK)
        broke(w, "the row");
    status = kvp_advance_blocks(w->pool, 1, &own->seq, &tokens, &blocks, NULL, 0, NULL, NULL, NULL);
    if (status == KVP_OK)
        look_for_foreign(w, own, rows, (tokens + CACHE_TOKENS - 1) / CACHE_TOKENS);
    else if (status != KVP_ENOPAGES)
        broke(w, "advancing");
    return status == KVP_OK;
}

/* Cut to a part, and write something else behind it: the pages that were found by others stay as they were. */
static void rewrite(struct cache_work *w, struct open_seq *own)
{
    uint32_t keep = below(w, own->written + 1), n_copies = 0;
    struct kvp_page_copy copy;
    struct prompt old = own->prompt;

    if (!pass_point(w))
        return;
    switch (kvp_advance(w->pool, 1, &own->seq, &keep, &w->after, KVP_TRUNCATE, &copy, &n_copies, NULL)) {
    case KVP_OK:
        break;
    case KVP_ENOPAGES:
        return;
    default:
        broke(w, "truncating");
        return;
    }
    if (n_copies > 0 && kvp_copy_owed(w->step, n_copies, &copy, NULL) != KVP_OK)
        broke(w, "copying");
    own->written = keep;
    for (uint32_t i = keep; i < old.n; i++) { /* other tokens behind what is kept */
        own->prompt.tokens[i] = old.tokens[i] ^ 0x40000000u;
        own->prompt.stamps[i] = mix(i > 0 ? own->prompt.stamps[i - 1] : w->tag, own->prompt.tokens[i]);
    }
    if (name_tokens(w, own, keep / CACHE_TOKENS, own->prompt.n))
        write_tokens(w, own, own->prompt.n);
    verify(w, own, own->written);
}

/* A prompt: what is cached of it is checked, the rest is named and written, or left half done. */
static void serve(struct cache_work *w)
{
    struct open_seq *own = &w->open[w->n_open];
    uint64_t key = (uint64_t)getpid() << 32 | ++w->next_key;
    uint32_t cached = 0, count, half;
    struct kvp_blocks blocks;

    make_prompt(w, &own->prompt);
    count = own->prompt.n;
    blocks = blocks_of(&own->prompt, &count);
    if (kvp_seq_open_blocks(w->pool, 1, &key, 0, &blocks, &own->seq, &cached) != KVP_OK) {
        broke(w, "opening");
        return;
    }
    w->n_open++;
    own->written = cached;
    atomic_fetch_add(&w->job->shared->opens, 1);
    atomic_fetch_add(&w->job->shared->hits, cached != 0);
    atomic_fetch_add(&w->job->shared->hit_tokens, cached);
    verify(w, own, cached);
    half = cached + below(w, count - cached + 1);
    if (w->job->lookups != 0 || below(w, 12) == 0)
        return;
    if (below(w, 6) == 0) { /* the executor reserves, too; names come after the bytes */
        if (append_tokens(w, own, half) && half >= CACHE_TOKENS)
            name_tokens(w, own, 0, half);
        return;
    }
    if (!name_tokens(w, own, 0, half) || below(w, 12) == 0)
        return;
    write_tokens(w, own, half);
    if (below(w, 3) != 0 && name_tokens(w, own, half / CACHE_TOKENS, count)) /* as decode does */
        write_tokens(w, own, count);
    if (below(w, 5) == 0 && !w->failed)
        rewrite(w, own);
}

/* Ask, keep, let go: prefixes of somebody's prompts. */
static void tend(struct cache_work *w)
{
    struct prompt prompt;
    uint32_t count, cached, dice = below(w, 4);
    struct kvp_blocks blocks;
    enum kvp_status status = KVP_OK;

    make_prompt(w, &prompt);
    count = prompt.n;
    if (dice == 3) /* short ones alone: every restart begins their leases anew */
        count = CACHE_TOKENS * (1 + below(w, 2));
    if (count > prompt.n)
        return;
    blocks = blocks_of(&prompt, &count);
    if (dice == 0)
        status = kvp_match(w->client, CACHE_POOL, 1, &blocks, &cached, 0, NULL);
    else if (dice == 1)
        status = kvp_evict(w->client, CACHE_POOL, 1 + below(w, 8), 0, NULL, false, NULL);
    else if (dice == 2)
        status = kvp_evict(w->client, CACHE_POOL, 0, 1, &blocks, false, NULL);
    else
        status = kvp_pin(w->client, CACHE_POOL, 1, &blocks, below(w, 3) == 0 ? 0 : 100 + below(w, 100), NULL);
    if (status != KVP_OK && !(dice == 3 && status == KVP_ENOENT))
        broke(w, "tending the cache");
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static bool attach(struct cache_work *w)
{
    struct kvp_connect_options options = {.connect_ms = 60000, .reconnect_ms = 60000, .call_ms = 60000};

    return kvp_connect(w->job->endpoint, &options, &w->client) == KVP_OK &&
           kvp_attach(w->client, CACHE_POOL, NULL, &w->pool) == KVP_OK &&
           kvp_step_create(w->pool, 0, 4, LENGTH_MAX, 2 * PAGES_MAX, &w->step) == KVP_OK &&
           kvp_host_alloc(w->pool, (size_t)PAGES_MAX * PAGE_BYTES, (void **)&w->pages) == KVP_OK &&
           kvp_host_alloc(w->pool, (size_t)CACHE_PLANES * LENGTH_MAX * ROW_BYTES, (void **)&w->staged) == KVP_OK &&
           kvp_timeline_id(w->pool, 1, &w->after.timeline) == KVP_OK &&
           kvp_timeline_value(w->pool, w->after.timeline, &w->after.value) == KVP_OK;
}

static void work(struct cache_work *w)
{
    unsigned lookups = 0;

    while (!w->failed &&
           (w->job->lookups != 0 ? lookups++ < w->job->lookups : atomic_load(&w->job->shared->stop) == 0)) {
        if (w->n_open == OPEN_MAX || (w->n_open > 0 && below(w, 2) == 0)) {
            unsigned i = below(w, w->n_open);

            if (below(w, 3) == 0)
                verify(w, &w->open[i], w->open[i].written);
            close_one(w, i);
        } else if (w->job->lookups == 0 && below(w, 6) == 0) {
            tend(w);
        } else {
            serve(w);
        }
    }
    while (w->n_open > 0 && !w->failed)
        close_one(w, 0);
}

int cache_worker(const struct cache_job *job)
{
    struct cache_work *w = calloc(1, sizeof(*w));
    struct timespec pause = {.tv_nsec = 1000000};

    if (w == NULL || (job->uid != 0 && (setgid(job->uid) != 0 || setuid(job->uid) != 0)))
        return 1;
    w->job = job;
    w->random = job->seed;
    w->tag = TAG(getuid());
    while (atomic_load(&job->shared->go) == 0)
        nanosleep(&pause, NULL);
    if (!attach(w)) {
        broke(w, "attaching");
        return 1;
    }
    work(w);
    kvp_step_destroy(w->step);
    kvp_host_free(w->pool, w->pages);
    kvp_host_free(w->pool, w->staged);
    if (kvp_detach(w->pool) != KVP_OK && !w->failed)
        broke(w, "detaching");
    kvp_disconnect(w->client);
    return w->failed ? 1 : 0;
}
