/**
 * A worker of the demo: serves its share of the requests as an engine would, and checks the other worker's pages.
 *
 *           admit                 prompt written           all written            the other has checked it
 *   (trace) ─────► JOB_PREFILL ─────────────► JOB_DECODE ─────────────► JOB_CHECKING ─────────────► JOB_KEPT ──► closed
 *                                                                                                   evicted, or at the
 * end
 *
 * One turn of its loop: answer the other worker; admit requests while there is room; begin an Advance for all that need
 * more of it; one step over a chunk of one prompt and one token of every request that decodes; wait for the Advance,
 * which had the step's time. So the step itself makes no call. A request whose prompt begins like an earlier one's
 * starts as a fork of that, and only writes the rest.
 *
 * Room: the pool is shared by quota. A worker counts the pages that its sequences can come to have, shared or not, and
 * evicts kept ones, least recently used first, so that both never run out of pages together.
 */
#include "cli.h"
#include "demo.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define JOBS_MAX         256
#define CHUNK_TOKENS     128u /* of a prompt in one step */
#define LOOKAHEAD_TOKENS 32u  /* room ahead of a request that decodes */
#define STEP_TOKENS      (CHUNK_TOKENS + DEMO_ACTIVE_MAX)
#define IDLE_MS          20
#define TIMELINE         1u /* of this session: where its appends end */
#define WAIT_MS          30000u
#define CHECK_KEY        (1ull << 62) /* keys of forks for checking */

enum job_state { JOB_FREE, JOB_PREFILL, JOB_DECODE, JOB_CHECKING, JOB_KEPT };

struct job {
    enum job_state state;
    struct kvp_seq seq;
    size_t request;
    uint32_t from;              /* tokens that came by fork */
    uint32_t written, reserved; /* tokens */
    uint32_t total;             /* tokens when it is done */
    uint32_t pages;             /* that it can come to have */
    uint64_t used;              /* when, in turns */
};

enum message_kind { MESSAGE_CHECK = 1, MESSAGE_CHECKED = 2, MESSAGE_BYE = 3 };
struct message {
    uint32_t kind, job;
    struct kvp_seq seq;
    uint64_t request;
    uint32_t from, to;
};

struct worker {
    uint32_t index;
    struct demo_board *board;
    struct demo_worker_board *me;
    struct demo_trace trace;
    int peer;
    bool peer_bye;  /* it will ask for no more checks */
    bool peer_gone; /* it is dead: the run ends */
    bool fault_due;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_step *step;
    struct demo_checker *checker;
    struct kvp_point done; /* of the last step */
    struct {
        unsigned char *bytes;
        struct kvp_point free_at;
    } sources[2];
    unsigned next_source;
    size_t layer_stride; /* between layers in sources; 0: each layer is appended before the next is made (host) */
    struct job jobs[JOBS_MAX];
    uint32_t pages; /* of all jobs */
    size_t next;    /* request to look at */
    uint64_t turn, next_key;
};

/* ---- small things --------------------------------------------------------------------------------------------------
 */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static bool stopped(const struct worker *w)
{
    return atomic_load_explicit(&w->board->stop, memory_order_relaxed) != 0 || w->peer_gone;
}

static bool active(const struct job *job)
{
    return job->state == JOB_PREFILL || job->state == JOB_DECODE;
}

static unsigned count_jobs(const struct worker *w, enum job_state state)
{
    unsigned n = 0;

    for (unsigned i = 0; i < JOBS_MAX; i++)
        n += w->jobs[i].state == state;
    return n;
}

static enum kvp_status close_job(struct worker *w, struct job *job)
{
    w->pages -= job->pages;
    job->state = JOB_FREE;
    return kvp_seq_close(w->pool, 1, &job->seq, &w->done);
}

/* ---- the other worker ----------------------------------------------------------------------------------------------
 */

/* The other one being gone is no failure of this one: the run ends. */
static void send_message(struct worker *w, const struct message *message)
{
    if (!w->peer_gone && send(w->peer, message, sizeof(*message), MSG_NOSIGNAL) != (ssize_t)sizeof(*message))
        w->peer_gone = true;
}

static bool peer_hung_up(const struct worker *w)
{
    struct pollfd at = {.fd = w->peer, .events = POLLIN};

    return poll(&at, 1, 0) == 1 && (at.revents & POLLHUP) != 0;
}

static enum kvp_status answer_check(struct worker *w, const struct message *message)
{
    struct message answer = {.kind = MESSAGE_CHECKED, .job = message->job};
    uint64_t pages, bad;
    enum kvp_status status;

    if (message->request >= w->trace.n || message->from > message->to)
        return KVP_EPROTO;
    status = demo_check(w->checker, message->seq, CHECK_KEY | w->next_key++, &w->trace, message->request, message->from,
                        message->to, &pages, &bad);
    if (status != KVP_OK) { /* its sequences may be gone because it is */
        w->peer_gone = w->peer_gone || peer_hung_up(w);
        return w->peer_gone ? KVP_OK : status;
    }
    atomic_fetch_add(&w->me->checked_pages, pages);
    atomic_fetch_add(&w->me->corrupt_bytes, bad);
    send_message(w, &answer);
    return KVP_OK;
}

static enum kvp_status take_message(struct worker *w, const struct message *message)
{
    struct job *job;

    switch (message->kind) {
    case MESSAGE_CHECK:
        return answer_check(w, message);
    case MESSAGE_CHECKED:
        if (message->job >= JOBS_MAX || w->jobs[message->job].state != JOB_CHECKING)
            return KVP_EPROTO;
        job = &w->jobs[message->job];
        job->state = JOB_KEPT;
        atomic_fetch_add(&w->me->requests, 1);
        return KVP_OK;
    case MESSAGE_BYE:
        w->peer_bye = true;
        return KVP_OK;
    default:
        return KVP_EPROTO;
    }
}

/* Take what is there; wait for it up to timeout_ms. Once the other is gone, what it was to check stays unchecked. */
static enum kvp_status serve_peer(struct worker *w, int timeout_ms)
{
    struct pollfd at = {.fd = w->peer, .events = POLLIN};
    enum kvp_status status = KVP_OK;

    while (!w->peer_gone && status == KVP_OK && poll(&at, 1, timeout_ms) == 1) {
        struct message message;
        ssize_t got = recv(w->peer, &message, sizeof(message), 0);

        timeout_ms = 0;
        if (got == (ssize_t)sizeof(message))
            status = take_message(w, &message);
        else if (got >= 0 || errno != EINTR)
            w->peer_gone = true;
    }
    for (unsigned i = 0; w->peer_gone && i < JOBS_MAX; i++)
        if (w->jobs[i].state == JOB_CHECKING)
            w->jobs[i].state = JOB_KEPT;
    return status;
}

/* ---- admission -----------------------------------------------------------------------------------------------------
 */

/* How many tokens of a request's prompt an earlier one has written. */
static uint32_t shared_tokens(const struct worker *w, const struct job *job, const struct demo_request *request)
{
    const struct demo_request *other = &w->trace.requests[job->request];
    uint32_t n = 0, tokens;

    while (n < other->n_blocks && n < request->n_blocks && other->blocks[n] == request->blocks[n])
        n++;
    tokens = n * w->trace.block_tokens;
    if (tokens > other->input_length)
        tokens = other->input_length;
    if (tokens > request->input_length)
        tokens = request->input_length;
    return tokens < job->written ? tokens : job->written;
}

static struct job *find_parent(struct worker *w, const struct demo_request *request, uint32_t *ret_tokens)
{
    struct job *best = NULL;

    *ret_tokens = 0;
    for (unsigned i = 0; i < JOBS_MAX; i++) {
        uint32_t tokens;

        if (w->jobs[i].state < JOB_DECODE)
            continue;
        tokens = shared_tokens(w, &w->jobs[i], request);
        if (tokens > *ret_tokens) {
            *ret_tokens = tokens;
            best = &w->jobs[i];
        }
    }
    return best;
}

static enum kvp_status evict_one(struct worker *w, bool *ret_evicted)
{
    struct job *oldest = NULL;

    for (unsigned i = 0; i < JOBS_MAX; i++)
        if (w->jobs[i].state == JOB_KEPT && (oldest == NULL || w->jobs[i].used < oldest->used))
            oldest = &w->jobs[i];
    *ret_evicted = oldest != NULL;
    return oldest != NULL ? close_job(w, oldest) : KVP_OK;
}

/* Its sequence: a fork of the parent, or an empty one; and room for the first chunk, by an Advance of its own. */
static enum kvp_status open_job(struct worker *w, struct job *job, const struct job *parent, uint32_t tokens)
{
    uint64_t key = w->next_key++, before;
    struct kvp_page_copy copy;
    uint32_t n_copies = 0, samples;
    enum kvp_status status;

    if (parent != NULL) /* what it is to share must be seen to be written */
        status = kvp_timeline_wait(w->pool, w->done, WAIT_MS);
    else
        status = kvp_seq_open(w->pool, 1, &key, 0, &job->seq);
    if (status == KVP_OK && parent != NULL)
        status = kvp_fork(w->pool, 1, &parent->seq, &key, &tokens, &job->seq, &copy, &n_copies, NULL);
    if (status == KVP_OK)
        status = kvp_copy_owed(w->step, n_copies, &copy, NULL);
    if (status != KVP_OK)
        return status;
    job->from = job->written = tokens;
    job->reserved = job->total - tokens < CHUNK_TOKENS ? job->total : tokens + CHUNK_TOKENS;
    before = now_ns();
    status = kvp_advance(w->pool, 1, &job->seq, &job->reserved, NULL, 0, &copy, &n_copies, NULL);
    if (status == KVP_ENOPAGES) /* the next turns ask again */
        job->reserved = tokens;
    else if (status != KVP_OK)
        return status;
    samples = (uint32_t)atomic_fetch_add(&w->me->samples, 1);
    if (samples < DEMO_SAMPLES_MAX)
        atomic_store(&w->me->advance_ns[samples], (uint32_t)(now_ns() - before));
    atomic_fetch_add(&w->me->reused_tokens, tokens);
    job->state = job->written < w->trace.requests[job->request].input_length ? JOB_PREFILL : JOB_DECODE;
    w->pages += job->pages;
    return KVP_OK;
}

static struct job *free_job(struct worker *w)
{
    for (unsigned i = 0; i < JOBS_MAX; i++)
        if (w->jobs[i].state == JOB_FREE)
            return &w->jobs[i];
    return NULL;
}

/* Pages of what can not be evicted. */
static uint32_t pinned_pages(const struct worker *w)
{
    uint32_t pages = 0;

    for (unsigned i = 0; i < JOBS_MAX; i++)
        if (w->jobs[i].state != JOB_FREE && w->jobs[i].state != JOB_KEPT)
            pages += w->jobs[i].pages;
    return pages;
}

static bool more_requests(struct worker *w)
{
    while (w->next < w->trace.n && w->trace.requests[w->next].worker != w->index)
        w->next++;
    return w->next < w->trace.n && !stopped(w);
}

static enum kvp_status admit(struct worker *w)
{
    while (more_requests(w) && count_jobs(w, JOB_PREFILL) + count_jobs(w, JOB_DECODE) < DEMO_ACTIVE_MAX) {
        const struct demo_request *request = &w->trace.requests[w->next];
        uint32_t total = request->input_length + request->output_length, tokens;
        uint32_t pages = (total + DEMO_PAGE_TOKENS - 1) / DEMO_PAGE_TOKENS + 1;
        struct job *job = free_job(w), *parent;
        enum kvp_status status = KVP_OK;
        bool evicted = true;

        if (pages > w->board->quota_pages) {
            w->next++;
            continue;
        }
        if (pinned_pages(w) + pages > w->board->quota_pages)
            return KVP_OK;
        if (job == NULL) {
            status = evict_one(w, &evicted);
            if (status != KVP_OK || !evicted)
                return status;
            job = free_job(w);
        }
        parent = find_parent(w, request, &tokens);
        if (parent != NULL)
            parent->used = w->turn;
        *job = (struct job){.request = w->next, .total = total, .pages = pages, .used = w->turn};
        status = open_job(w, job, parent, tokens);
        while (status == KVP_OK && evicted && w->pages > w->board->quota_pages)
            status = evict_one(w, &evicted);
        if (status != KVP_OK)
            return status;
        w->next++;
    }
    return KVP_OK;
}

/* ---- room ----------------------------------------------------------------------------------------------------------
 */

struct wants {
    uint32_t n;
    struct job *jobs[DEMO_ACTIVE_MAX];
    struct kvp_seq seqs[DEMO_ACTIVE_MAX];
    uint32_t reserved[DEMO_ACTIVE_MAX];
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
    wants->n = 0;
    wants->advance = NULL;
    for (unsigned i = 0; i < JOBS_MAX && wants->n < DEMO_ACTIVE_MAX; i++) {
        struct job *job = &w->jobs[i];

        if (!active(job) || wanted(job) <= job->reserved)
            continue;
        wants->jobs[wants->n] = job;
        wants->seqs[wants->n] = job->seq;
        wants->reserved[wants->n] = wanted(job);
        wants->n++;
    }
    if (wants->n == 0)
        return KVP_OK;
    return kvp_advance_begin(w->pool, wants->n, wants->seqs, wants->reserved, NULL, 0, &wants->advance);
}

static enum kvp_status end_advance(struct worker *w, struct wants *wants)
{
    struct kvp_page_copy copies[DEMO_ACTIVE_MAX];
    uint32_t n_copies, missing;
    enum kvp_status status;
    bool evicted;

    if (wants->advance == NULL)
        return KVP_OK;
    status = kvp_advance_wait(wants->advance, copies, &n_copies, &missing);
    for (uint32_t i = 0; i < wants->n && status == KVP_OK; i++)
        wants->jobs[i]->reserved = wants->reserved[i];
    return status == KVP_ENOPAGES ? evict_one(w, &evicted) : status;
}

/* ---- a step --------------------------------------------------------------------------------------------------------
 */

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
        job->used = w->turn;
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

        if (!active(job) || (job->written < job->total && !stopped(w)))
            continue;
        if (!waited) { /* the GPU has to be done with it before the daemon counts it */
            enum kvp_status status = kvp_timeline_wait(w->pool, w->done, WAIT_MS);

            if (status != KVP_OK)
                return status;
            waited = true;
        }
        job->state = w->peer_gone ? JOB_KEPT : JOB_CHECKING;
        send_message(w, &message);
    }
    return KVP_OK;
}

/* ---- the loop ------------------------------------------------------------------------------------------------------
 */

static enum kvp_status one_turn(struct worker *w, bool *ret_idle)
{
    struct wants wants;
    struct batch batch;
    enum kvp_status status, ended;

    w->turn++;
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
    ended = end_advance(w, &wants);
    if (status == KVP_OK)
        status = ended;
    return status == KVP_OK ? hand_over(w) : status;
}

static enum kvp_status close_kept(struct worker *w)
{
    enum kvp_status status = KVP_OK;
    bool evicted = true;

    while (status == KVP_OK && evicted)
        status = evict_one(w, &evicted);
    return status;
}

static enum kvp_status work(struct worker *w)
{
    const struct message bye = {.kind = MESSAGE_BYE};
    enum kvp_status status = KVP_OK;
    bool idle = false;

    while (status == KVP_OK) {
        bool done = !more_requests(w) && count_jobs(w, JOB_PREFILL) + count_jobs(w, JOB_DECODE) == 0;

        if (done && count_jobs(w, JOB_CHECKING) == 0)
            break;
        status = serve_peer(w, done || idle ? IDLE_MS : 0);
        if (status == KVP_OK && !done)
            status = one_turn(w, &idle);
    }
    if (status == KVP_OK)
        status = close_kept(w);
    if (status != KVP_OK)
        return status;
    if (kvp_step_errors(w->step, NULL) != 0) {
        fprintf(stderr, "kvpool: demo worker %u: its kernels had to skip tokens\n", w->index);
        return KVP_EMISMATCH;
    }
    send_message(w, &bye);
    while (status == KVP_OK && !w->peer_bye && !w->peer_gone)
        status = serve_peer(w, 1000);
    return status;
}

/* ---- start and end -------------------------------------------------------------------------------------------------
 */

static enum kvp_status set_up(struct worker *w)
{
    enum kvp_status status = kvp_attach(w->client, w->board->pool, NULL, &w->pool);
    const struct kvp_pool_info *info;
    size_t layer_bytes = (size_t)2 * STEP_TOKENS * DEMO_ROW_BYTES;

    if (status != KVP_OK)
        return status;
    info = kvp_pool_info(w->pool);
    w->layer_stride = info->cuda ? layer_bytes : 0;
    for (int i = 0; i < 2 && status == KVP_OK; i++) {
        void *bytes;

        status = kvp_host_alloc(w->pool, info->cuda ? w->board->layers * layer_bytes : layer_bytes, &bytes);
        if (status == KVP_OK)
            w->sources[i].bytes = bytes;
    }
    if (status == KVP_OK)
        status = kvp_step_create(w->pool, 0, DEMO_ACTIVE_MAX, STEP_TOKENS, DEMO_ACTIVE_MAX * info->row_pages, &w->step);
    if (status == KVP_OK)
        status = demo_checker_create(w->pool, w->step, &w->checker);
    if (status == KVP_OK)
        status = kvp_timeline_id(w->pool, TIMELINE, &w->done.timeline);
    if (status == KVP_OK)
        status = kvp_timeline_value(w->pool, w->done.timeline, &w->done.value);
    w->next_key = 1;
    w->fault_due = w->board->inject_fault != 0 && w->index == 0;
    return status;
}

/* After a failure the pool stays attached, to be cleaned up by the daemon when this process ends. */
static enum kvp_status tear_down(struct worker *w, bool detach)
{
    demo_checker_destroy(w->checker);
    kvp_step_destroy(w->step);
    for (int i = 0; i < 2 && w->pool != NULL; i++)
        if (w->sources[i].bytes != NULL)
            kvp_host_free(w->pool, w->sources[i].bytes);
    return detach ? kvp_detach(w->pool) : KVP_OK;
}

static bool parse_fd(const struct cli *cli, const char *text, int *ret_fd)
{
    uint64_t number;

    if (!cli_parse_number(cli, "an fd", text, 0, 1 << 20, &number))
        return false;
    *ret_fd = (int)number;
    return true;
}

static enum kvp_status run(struct worker *w)
{
    enum kvp_status status = set_up(w), ended;

    if (status == KVP_OK) {
        atomic_store(&w->me->ready, 1);
        while (atomic_load(&w->board->go) == 0 && !stopped(w) && status == KVP_OK)
            status = serve_peer(w, IDLE_MS);
        if (status == KVP_OK)
            status = work(w);
    }
    if (status != KVP_OK)
        fprintf(stderr, "kvpool: demo worker %u: %s (%s)\n", w->index, kvp_error_text(), kvp_status_name(status));
    ended = tear_down(w, status == KVP_OK);
    if (ended != KVP_OK)
        fprintf(stderr, "kvpool: demo worker %u: detaching: %s (%s)\n", w->index, kvp_error_text(),
                kvp_status_name(ended));
    return status != KVP_OK ? status : ended;
}

int demo_worker_run(struct cli *cli)
{
    static struct worker worker;
    struct worker *w = &worker;
    enum kvp_status status;
    uint64_t index;
    int board_fd;

    if (!cli_parse_number(cli, "the worker's number", cli->arguments[0], 0, DEMO_WORKERS - 1, &index) ||
        !parse_fd(cli, cli->arguments[1], &board_fd) || !parse_fd(cli, cli->arguments[2], &w->peer))
        return 2;
    w->index = (uint32_t)index;
    w->client = cli->client;
    w->board = mmap(NULL, sizeof(*w->board), PROT_READ | PROT_WRITE, MAP_SHARED, board_fd, 0);
    close(board_fd);
    if (w->board == MAP_FAILED) {
        fprintf(stderr, "kvpool: demo worker %u: mapping the board: %s\n", w->index, strerror(errno));
        return 1;
    }
    w->me = &w->board->workers[index];
    if (cli_value(cli, CLI_TRACE) != NULL ? !demo_trace_read(cli_value(cli, CLI_TRACE), &w->trace)
                                          : !demo_trace_chat(&w->trace))
        return 1;
    status = run(w);
    demo_trace_free(&w->trace);
    close(w->peer);
    if (status == KVP_OK)
        atomic_store(&w->me->finished, 1);
    munmap(w->board, sizeof(*w->board));
    return status == KVP_OK ? 0 : 1;
}
