/**
 * How a worker of the demo serves requests, as an engine would.
 *
 *           admit                 prompt written           all written            the other has checked it
 *   (trace) ─────► JOB_PREFILL ─────────────► JOB_DECODE ─────────────► JOB_CHECKING ─────────────────► closed
 *
 * One turn: admit a request if there is room; begin an Advance for all that need more of it; one step over a chunk of
 * one prompt and one token of every request that decodes; wait for the Advance, which had the step's time. So the step
 * itself makes no call. Pages of prompts are named by keys: what the cache has of a prompt, of whichever worker's, comes
 * with its sequence, and only the rest is written.
 *
 * Room: the pool is shared by quota. A worker counts the pages that its sequences can come to have, shared or not, so
 * that both never run out of pages together; cached pages that nobody holds make room by themselves.
 */
#include "demo_worker.h"

#include <time.h>

/* ---- small things ------------------------------------------------------------------------------------------------ */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static bool active(const struct job *job)
{
    return job->state == JOB_PREFILL || job->state == JOB_DECODE;
}

unsigned demo_count_jobs(const struct worker *w, enum job_state state)
{
    unsigned n = 0;

    for (unsigned i = 0; i < JOBS_MAX; i++)
        n += w->jobs[i].state == state;
    return n;
}

enum kvp_status demo_close_job(struct worker *w, struct job *job)
{
    job->state = JOB_FREE;
    return kvp_seq_close(w->pool, 1, &job->seq, &w->done);
}

/* ---- what pages hold --------------------------------------------------------------------------------------------- */

/* The pages of a request's prompt that are of known blocks. */
static uint32_t prompt_pages(const struct worker *w, const struct demo_request *request)
{
    uint64_t tokens = (uint64_t)request->n_blocks * w->trace.block_tokens;

    return (uint32_t)(tokens < request->input_length ? tokens : request->input_length) / DEMO_PAGE_TOKENS;
}

/* A block of the trace is one or several pages; as it stands for all before it, so do they. */
static void name_pages(const struct worker *w, const struct demo_request *request, uint32_t first, uint32_t n,
                       struct page_key *ret_keys)
{
    uint32_t block_pages = w->trace.block_tokens / DEMO_PAGE_TOKENS;

    for (uint32_t i = 0; i < n; i++)
        ret_keys[i] = (struct page_key){request->blocks[(first + i) / block_pages], first + i};
}

/* How many pages of a prompt, from the first without a name on, can get theirs when so many tokens are reserved. */
static uint32_t pages_to_name(const struct worker *w, const struct job *job, uint32_t reserved)
{
    uint32_t pages = prompt_pages(w, &w->trace.requests[job->request]), room = reserved / DEMO_PAGE_TOKENS;

    pages = pages < room ? pages : room;
    return pages > job->named ? pages - job->named : 0;
}

/* ---- admission --------------------------------------------------------------------------------------------------- */

/* Its sequence, with what is cached of the prompt; and room for the first chunk, by an Advance of its own. */
static enum kvp_status open_job(struct worker *w, struct job *job)
{
    const struct demo_request *request = &w->trace.requests[job->request];
    uint32_t n = prompt_pages(w, request), cached = 0, reserved, samples;
    struct kvp_blocks blocks = {.counts = &n, .keys = w->keys, .key_bytes = sizeof(*w->keys)};
    uint64_t key = w->next_key++, before;
    enum kvp_status status;

    name_pages(w, request, 0, n, w->keys);
    status = kvp_seq_open_blocks(w->pool, 1, &key, 0, &blocks, &job->seq, &cached);
    if (status != KVP_OK)
        return status;
    job->from = job->written = job->reserved = cached;
    job->named = cached / DEMO_PAGE_TOKENS;
    reserved = job->total - cached < CHUNK_TOKENS ? job->total : cached + CHUNK_TOKENS;
    n = pages_to_name(w, job, reserved);
    name_pages(w, request, job->named, n, w->keys);
    blocks.first = &job->named;
    before = now_ns();
    status = kvp_advance_blocks(w->pool, 1, &job->seq, &reserved, &blocks, NULL, 0, NULL, NULL, NULL);
    if (status != KVP_OK && status != KVP_ENOPAGES) /* then the next turns ask again */
        return status;
    samples = (uint32_t)atomic_fetch_add(&w->me->samples, 1);
    if (samples < DEMO_SAMPLES_MAX)
        atomic_store(&w->me->advance_ns[samples], (uint32_t)(now_ns() - before));
    if (status == KVP_OK) {
        job->reserved = reserved;
        job->named += n;
    }
    atomic_fetch_add(&w->me->hit_tokens, cached);
    job->state = job->written < request->input_length ? JOB_PREFILL : JOB_DECODE;
    return KVP_OK;
}

static struct job *free_job(struct worker *w)
{
    for (unsigned i = 0; i < JOBS_MAX; i++)
        if (w->jobs[i].state == JOB_FREE)
            return &w->jobs[i];
    return NULL;
}

static uint32_t pages_in_use(const struct worker *w)
{
    uint32_t pages = 0;

    for (unsigned i = 0; i < JOBS_MAX; i++)
        if (w->jobs[i].state != JOB_FREE)
            pages += w->jobs[i].pages;
    return pages;
}

bool demo_more_requests(struct worker *w)
{
    while (w->next < w->trace.n && w->trace.requests[w->next].worker != w->index)
        w->next++;
    return w->next < w->trace.n && !demo_stopped(w);
}

/* Of prompts one at a time, so that each finds in the cache what those before it wrote. */
static enum kvp_status admit(struct worker *w)
{
    while (demo_more_requests(w) && demo_count_jobs(w, JOB_PREFILL) == 0 &&
           demo_count_jobs(w, JOB_DECODE) < DEMO_ACTIVE_MAX) {
        const struct demo_request *request = &w->trace.requests[w->next];
        uint32_t total = request->input_length + request->output_length;
        uint32_t pages = (total + DEMO_PAGE_TOKENS - 1) / DEMO_PAGE_TOKENS + 1;
        struct job *job = free_job(w);
        enum kvp_status status;

        if (pages > w->board->quota_pages) {
            w->next++;
            continue;
        }
        if (job == NULL || pages_in_use(w) + pages > w->board->quota_pages)
            return KVP_OK;
        *job = (struct job){.request = w->next, .total = total, .pages = pages};
        status = open_job(w, job);
        if (status != KVP_OK)
            return status;
        w->next++;
    }
    return KVP_OK;
}

/* ---- room -------------------------------------------------------------------------------------------------------- */

struct wants {
    uint32_t n;
    struct job *jobs[DEMO_ACTIVE_MAX];
    struct kvp_seq seqs[DEMO_ACTIVE_MAX];
    uint32_t reserved[DEMO_ACTIVE_MAX];
    uint32_t first[DEMO_ACTIVE_MAX], counts[DEMO_ACTIVE_MAX]; /* of pages to be named */
    struct kvp_advance *advance;
};

/* What a job should have room for when the coming step is done. */
static uint32_t wanted(const struct job *job)
{
    uint32_t ahead = job->state == JOB_PREFILL ? 2 * CHUNK_TOKENS : LOOKAHEAD_TOKENS;

    if (job->state == JOB_DECODE && job->reserved - job->written >= LOOKAHEAD_TOKENS / 2)
        return job->reserved;
    return job->total - job->written < ahead ? job->total : job->written + ahead;
}

static enum kvp_status begin_advance(struct worker *w, struct wants *wants)
{
    struct kvp_blocks blocks = {
        .counts = wants->counts, .first = wants->first, .keys = w->keys, .key_bytes = sizeof(*w->keys)};
    uint32_t n_keys = 0;

    wants->n = 0;
    wants->advance = NULL;
    for (unsigned i = 0; i < JOBS_MAX && wants->n < DEMO_ACTIVE_MAX; i++) {
        struct job *job = &w->jobs[i];

        if (!active(job) || wanted(job) <= job->reserved)
            continue;
        wants->jobs[wants->n] = job;
        wants->seqs[wants->n] = job->seq;
        wants->reserved[wants->n] = wanted(job);
        wants->first[wants->n] = job->named;
        wants->counts[wants->n] = pages_to_name(w, job, wanted(job));
        name_pages(w, &w->trace.requests[job->request], job->named, wants->counts[wants->n], w->keys + n_keys);
        n_keys += wants->counts[wants->n];
        wants->n++;
    }
    if (wants->n == 0)
        return KVP_OK;
    return kvp_advance_blocks_begin(w->pool, wants->n, wants->seqs, wants->reserved, &blocks, NULL, 0, &wants->advance);
}

static enum kvp_status end_advance(struct wants *wants)
{
    struct kvp_page_copy copies[DEMO_ACTIVE_MAX];
    uint32_t n_copies, missing;
    enum kvp_status status;

    if (wants->advance == NULL)
        return KVP_OK;
    status = kvp_advance_wait(wants->advance, copies, &n_copies, &missing);
    for (uint32_t i = 0; i < wants->n && status == KVP_OK; i++) {
        wants->jobs[i]->reserved = wants->reserved[i];
        wants->jobs[i]->named += wants->counts[i];
    }
    return status == KVP_ENOPAGES ? KVP_OK : status; /* the next turn asks again */
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

struct batch {
    uint32_t n, nnz;
    struct job *jobs[DEMO_ACTIVE_MAX];
    struct kvp_seq seqs[DEMO_ACTIVE_MAX];
    uint32_t start[DEMO_ACTIVE_MAX], tokens[DEMO_ACTIVE_MAX];
};

/* A chunk of one prompt, and one token of each that decodes; as far as there is room. */
static void choose_batch(struct worker *w, struct batch *batch)
{
    bool prefill = false;

    batch->n = batch->nnz = 0;
    for (unsigned i = 0; i < JOBS_MAX && batch->n < DEMO_ACTIVE_MAX; i++) {
        struct job *job = &w->jobs[i];
        uint32_t most = 1;

        if (!active(job) || job->written >= job->reserved || (job->state == JOB_PREFILL && prefill))
            continue;
        if (job->state == JOB_PREFILL) {
            uint32_t rest = w->trace.requests[job->request].input_length - job->written;

            prefill = true;
            most = rest < CHUNK_TOKENS ? rest : CHUNK_TOKENS;
        }
        if (most > job->reserved - job->written)
            most = job->reserved - job->written;
        batch->jobs[batch->n] = job;
        batch->seqs[batch->n] = job->seq;
        batch->start[batch->n] = job->written;
        batch->tokens[batch->n] = most;
        batch->nnz += most;
        batch->n++;
    }
}

/* The K and V rows of a layer for all tokens of the batch, as the model would have made them. */
static void make_layer(struct worker *w, const struct batch *batch, uint32_t layer, unsigned char *bytes)
{
    for (uint32_t c = 0; c < 2; c++) {
        unsigned char *row = bytes + (size_t)c * STEP_TOKENS * DEMO_ROW_BYTES;

        for (uint32_t i = 0; i < batch->n; i++)
            for (uint32_t t = 0; t < batch->tokens[i]; t++, row += DEMO_ROW_BYTES) {
                uint32_t position = batch->start[i] + t;

                demo_fill(row, demo_content_key(&w->trace, batch->jobs[i]->request, position), 2 * layer + c, position);
            }
    }
    if (w->fault_due) {
        w->fault_due = false;
        bytes[DEMO_ROW_BYTES / 2] ^= 0x40;
    }
}

static enum kvp_status append_layers(struct worker *w, const struct batch *batch, unsigned char *bytes)
{
    for (uint32_t layer = 0; layer < w->board->layers; layer++) {
        unsigned char *at = bytes + layer * w->layer_stride;
        const struct kvp_token_view sources[2] = {
            {at, DEMO_ROW_BYTES, DEMO_HEAD_DIM * 2},
            {at + (size_t)STEP_TOKENS * DEMO_ROW_BYTES, DEMO_ROW_BYTES, DEMO_HEAD_DIM * 2}};
        enum kvp_status status;

        make_layer(w, batch, layer, at);
        status = kvp_append(w->step, 2 * layer, 2, sources, NULL);
        if (status != KVP_OK)
            return status;
    }
    return KVP_OK;
}

static enum kvp_status run_step(struct worker *w, const struct batch *batch)
{
    unsigned source = w->next_source++ % 2;
    enum kvp_status status = kvp_timeline_wait(w->pool, w->sources[source].free_at, WAIT_MS);

    if (status == KVP_OK)
        status = kvp_step_begin(w->step, batch->n, batch->seqs, batch->tokens, batch->start, NULL);
    if (status == KVP_OK)
        status = append_layers(w, batch, w->sources[source].bytes);
    if (status == KVP_OK)
        status = kvp_progress(w->step, NULL);
    w->done.value++;
    if (status == KVP_OK)
        status = kvp_timeline_signal(w->pool, w->done, NULL);
    if (status != KVP_OK)
        return status;
    w->sources[source].free_at = w->done;
    for (uint32_t i = 0; i < batch->n; i++) {
        struct job *job = batch->jobs[i];

        job->written += batch->tokens[i];
        if (job->state == JOB_PREFILL && job->written >= w->trace.requests[job->request].input_length)
            job->state = JOB_DECODE;
    }
    atomic_fetch_add(&w->me->tokens, batch->nnz);
    atomic_fetch_add(&w->me->bytes, (uint64_t)batch->nnz * w->board->layers * 2 * DEMO_ROW_BYTES);
    return KVP_OK;
}

/* What is all written, or at the end whatever is, goes to the other worker to be checked. */
static enum kvp_status hand_over(struct worker *w)
{
    bool waited = false;

    for (unsigned i = 0; i < JOBS_MAX; i++) {
        struct job *job = &w->jobs[i];
        struct message message = {.kind = MESSAGE_CHECK,
                                  .job = i,
                                  .seq = job->seq,
                                  .request = job->request,
                                  .from = job->from,
                                  .to = job->written};

        if (!active(job) || (job->written < job->total && !demo_stopped(w)))
            continue;
        if (!waited) { /* the GPU has to be done with it before the daemon counts it */
            enum kvp_status status = kvp_timeline_wait(w->pool, w->done, WAIT_MS);

            if (status != KVP_OK)
                return status;
            waited = true;
        }
        job->state = JOB_CHECKING;
        demo_send(w, &message);
    }
    return KVP_OK;
}

/* ---- a turn ------------------------------------------------------------------------------------------------------ */

enum kvp_status demo_serve_turn(struct worker *w, bool *ret_idle)
{
    struct wants wants;
    struct batch batch;
    enum kvp_status status, ended;

    *ret_idle = true;
    status = admit(w);
    if (status == KVP_OK)
        status = begin_advance(w, &wants);
    if (status != KVP_OK)
        return status;
    choose_batch(w, &batch);
    if (batch.n > 0) {
        *ret_idle = false;
        status = run_step(w, &batch);
    }
    ended = end_advance(&wants);
    if (status == KVP_OK)
        status = ended;
    return status == KVP_OK ? hand_over(w) : status;
}
