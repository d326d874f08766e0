/**
 * `kvpool replay` against a daemon: a pool is made for the run, on tiny pages, and deleted after it.
 *
 * The session maps the pool as a worker does, and reports what is written by its progress page; nothing is written into
 * the pages, which are of one byte.
 */
#include "cli.h"
#include "replay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define POOL_PREFIX "replay-" /* and the pid */
#define ROWS        4u        /* one that is open, and what was closed and is being let go of */

struct run {
    const struct replay *replay;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_step *step;
    char name[KVP_NAME_BYTES_MAX + 1];
    struct replay_error *error;
};

static enum kvp_status failed(const struct run *run, const char *what, enum kvp_status status)
{
    if (status != KVP_OK) {
        run->error->what = what;
        snprintf(run->error->text, sizeof(run->error->text), "%s", kvp_error_text());
    }
    return status;
}

static enum kvp_status make_pool(struct run *run)
{
    static const struct kvp_plane_spec plane = {
        .component = KVP_COMPONENT_K, .heads = 1, .dim = 1, .dtype = KVP_DTYPE_FP8_E4M3};
    const struct kvp_pool_spec spec = {
        .name = run->name,
        .layout = {.pages = run->replay->pages, .page_tokens = 1, .n_planes = 1, .planes = &plane},
        .max_sequences = ROWS,
        .max_sequence_tokens = run->replay->longest,
        .policy = run->replay->policy == REPLAY_LRU ? KVP_POLICY_LRU : KVP_POLICY_ADAPTIVE};
    const struct kvp_attach_options metadata = {.metadata_only = false};
    enum kvp_status status;

    snprintf(run->name, sizeof(run->name), POOL_PREFIX "%d", (int)getpid());
    status = failed(run, "making the pool", kvp_pool_create(run->client, &spec, NULL));
    if (status == KVP_OK)
        status = failed(run, "attaching the pool", kvp_attach(run->client, run->name, &metadata, &run->pool));
    if (status == KVP_OK)
        status = failed(run, "preparing steps",
                        kvp_step_create(run->pool, 0, 1, run->replay->longest, run->replay->longest, &run->step));
    return status;
}

static uint32_t ns_between(const struct timespec *from, const struct timespec *to)
{
    int64_t ns = (int64_t)(to->tv_sec - from->tv_sec) * 1000000000 + (to->tv_nsec - from->tv_nsec);

    return ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

/* Room for all, what the rest holds, and the word that it is written. */
static enum kvp_status fill(struct run *run, struct kvp_seq seq, const uint64_t *blocks, uint32_t cached, uint32_t n)
{
    uint32_t more = n - cached;
    struct kvp_blocks named = {
        .counts = &more, .first = &cached, .keys = blocks + cached, .key_bytes = REPLAY_KEY_BYTES};
    enum kvp_status status;

    status = failed(run, "Advance", kvp_advance_blocks(run->pool, 1, &seq, &n, &named, NULL, 0, NULL, NULL, NULL));
    if (status == KVP_OK)
        status = failed(run, "a step", kvp_step_begin(run->step, 1, &seq, &more, &cached, NULL));
    if (status == KVP_OK)
        status = failed(run, "a step", kvp_progress(run->step, NULL));
    return status;
}

static enum kvp_status serve(struct run *run, size_t i, struct replay_times *times)
{
    const uint64_t *blocks = trace_blocks(run->replay->trace, i);
    uint32_t n = run->replay->trace->requests[i].n_blocks, kept = n < run->replay->pages ? n : run->replay->pages;
    struct kvp_blocks named = {.counts = &n, .keys = blocks, .key_bytes = REPLAY_KEY_BYTES};
    struct timespec before, after;
    uint64_t key = i + 1;
    enum kvp_status status;
    struct kvp_seq seq;

    times->hits[i] = 0;
    clock_gettime(CLOCK_MONOTONIC, &before);
    status = failed(run, "OpenSequences",
                    kvp_seq_open_blocks(run->pool, 1, &key, 0, n > 0 ? &named : NULL, &seq, &times->hits[i]));
    clock_gettime(CLOCK_MONOTONIC, &after);
    times->open_ns[i] = ns_between(&before, &after);
    if (status == KVP_OK && times->hits[i] < kept)
        status = fill(run, seq, blocks, times->hits[i], kept);
    if (status == KVP_OK)
        status = failed(run, "CloseSequences", kvp_seq_close(run->pool, 1, &seq, NULL));
    return status;
}

static enum kvp_status serve_all(struct run *run, struct replay_result *result)
{
    const struct replay *replay = run->replay;
    enum kvp_status status = KVP_OK;
    struct timespec start, stop;

    clock_gettime(CLOCK_MONOTONIC, &start);
    for (size_t i = 0; status == KVP_OK && i < replay->trace->n; i++) {
        if (i % REPLAY_PROGRESS_EVERY == 0 && !replay->progress(replay, i))
            return KVP_ETIMEDOUT;
        status = serve(run, i, &result->times);
    }
    clock_gettime(CLOCK_MONOTONIC, &stop);
    result->seconds = (double)(stop.tv_sec - start.tv_sec) + (double)(stop.tv_nsec - start.tv_nsec) / 1e9;
    return status;
}

static enum kvp_status count_evictions(struct run *run, uint64_t *ret_evictions)
{
    struct kvp_pool_info *info;
    enum kvp_status status = failed(run, "DescribePool", kvp_pool_describe(run->client, run->name, &info));

    if (status != KVP_OK)
        return status;
    *ret_evictions = info->cache.evictions;
    kvp_pool_info_free(info);
    return KVP_OK;
}

/* A sequence may be open, of a run that failed: the pool then goes when this process has ended, with the next run. */
static void give_up_pool(struct run *run)
{
    kvp_step_destroy(run->step);
    if (run->pool != NULL && kvp_detach(run->pool) != KVP_OK)
        return;
    kvp_pool_delete(run->client, run->name);
}

enum kvp_status replay_daemon(const struct replay *replay, struct kvp_client *client, struct replay_result *result,
                              struct replay_error *reterr_why)
{
    struct run run = {.replay = replay, .client = client, .error = reterr_why};
    enum kvp_status status;

    cli_delete_abandoned_pools(client, POOL_PREFIX);
    status = make_pool(&run);
    if (status == KVP_OK)
        status = serve_all(&run, result);
    if (status == KVP_OK)
        status = count_evictions(&run, &result->evictions);
    give_up_pool(&run);
    return status;
}
