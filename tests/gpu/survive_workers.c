/**
 * The workers of survive_gpu, by their roles:
 *
 *   compute    fills sequences of pool "big"; then again and again sums what it wrote, and decodes a token in place
 *   append     forks a sequence with an open page and appends to the child on request, so that an executor copies a page
 *              and writes tokens; reads every byte back; closes it
 *   scribble   stores to a page of its own in "small" by one long kernel, until it is killed; scribble-fork leaves a child
 *   watch      looks at that page all the time, and notes when it changed last
 *   own        writes durable sequences in "small"; at a command it scribbles, to be killed so
 *   probe      gets a context, or does not
 *   beside     sums pages of "small", until its context is lost
 *   claim      takes the durable sequences of `own` by their secret, and sums them
 */
#include "survive_gpu.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

struct worker {
    const struct plan *plan;
    struct shared *shared;
    struct slot *slot;
    unsigned index;
    const char *endpoint;
    const struct work *work;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_step *step;
    struct kvp_plane_view first; /* plane 0 */
    uint32_t planes, row_bytes;
    void *source; /* step_tokens of every plane */
    struct kvp_seq seqs[SEQS_MAX];
};

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

struct kvp_pool_spec survive_spec(const struct plan *plan, bool big, struct kvp_plane_spec *planes)
{
    for (uint32_t i = 0; i < 2 * plan->layers; i++)
        planes[i] = (struct kvp_plane_spec){.layer = i / 2,
                                            .component = i % 2 == 0 ? KVP_COMPONENT_K : KVP_COMPONENT_V,
                                            .heads = plan->heads,
                                            .dim = plan->dim,
                                            .dtype = KVP_DTYPE_F16};
    return (struct kvp_pool_spec){.name = big ? "big" : "small",
                                  .layout = {.pages = big ? plan->big_pages : plan->small_pages,
                                             .page_tokens = plan->page_tokens,
                                             .n_planes = 2 * plan->layers,
                                             .planes = planes},
                                  .max_sequences = 256,
                                  .linger_ms = 600000,
                                  .page_digests = big};
}

static bool fail(struct worker *w, const char *format, ...)
{
    va_list args;

    if (atomic_load(&w->slot->failed) == 0) {
        va_start(args, format);
        vsnprintf(w->slot->text, TEXT_MAX, format, args);
        va_end(args);
        atomic_store(&w->slot->failed, 1);
    }
    return false;
}

/* A call of kvpool's must succeed. @return whether it did */
static bool well(struct worker *w, const char *what, enum kvp_status status)
{
    return status == KVP_OK || fail(w, "%s: %s (%s)", what, kvp_error_text(), kvp_status_name(status));
}

static bool done(struct worker *w, const char *what, bool ok)
{
    return ok || fail(w, "%s: %s", what, w->work->error());
}

static void nap(void)
{
    struct timespec pause = {.tv_nsec = 200000};

    nanosleep(&pause, NULL);
}

/* ---- a worker's beginning ---------------------------------------------------------------------------------------- */

static bool attach(struct worker *w, const char *pool, const char *session)
{
    struct kvp_connect_options options = {
        .connect_ms = WAIT_MS, .reconnect_ms = WAIT_MS, .call_ms = WAIT_MS, .session = session};

    return well(w, "connect", kvp_connect(w->endpoint, &options, &w->client)) &&
           well(w, "attach", kvp_attach(w->client, pool, NULL, &w->pool)) &&
           well(w, "plane", kvp_pool_plane(w->pool, 0, 0, &w->first));
}

static bool make_step(struct worker *w, uint32_t pages)
{
    w->source = w->work->alloc((uint64_t)w->planes * w->plan->step_tokens * w->row_bytes);
    return done(w, "memory", w->source != NULL) &&
           well(w, "step", kvp_step_create(w->pool, 0, 1, w->plan->step_tokens, pages, &w->step));
}

/* n tokens behind `start`, by this process's own kernels: no call, and the stream is not waited for. */
static bool append_in_place(struct worker *w, struct kvp_seq seq, uint32_t start, uint32_t n)
{
    struct kvp_token_view sources[KVP_PLANES_MAX];
    void *stream = w->work->stream();

    for (uint32_t p = 0; p < w->planes; p++)
        sources[p] = (struct kvp_token_view){(unsigned char *)w->source + (uint64_t)p * n * w->row_bytes, w->row_bytes,
                                             w->row_bytes / w->plan->heads};
    return well(w, "step_begin", kvp_step_begin(w->step, 1, &seq, &n, &start, stream)) &&
           well(w, "append", kvp_append(w->step, 0, w->planes, sources, stream)) &&
           well(w, "progress", kvp_progress(w->step, stream));
}

/* A sequence of `tokens`, written and looked at, so that its full pages are sealed. */
static bool write_sequence(struct worker *w, uint64_t key, unsigned flags, uint32_t tokens, struct kvp_seq *ret_seq)
{
    uint32_t n, length = 0;

    if (!well(w, "open", kvp_seq_open(w->pool, 1, &key, flags, ret_seq)) ||
        !well(w, "advance", kvp_advance(w->pool, 1, ret_seq, &tokens, NULL, 0, NULL, NULL, NULL)))
        return false;
    for (uint32_t at = 0; at < tokens; at += n) {
        n = tokens - at < w->plan->step_tokens ? tokens - at : w->plan->step_tokens;
        if (!done(w, "fill", w->work->fill(w->source, (uint64_t)w->planes * n * w->row_bytes, key << 32 | at)) ||
            !append_in_place(w, *ret_seq, at, n))
            return false;
        atomic_fetch_add(&w->slot->tokens, n);
    }
    return done(w, "sync", w->work->sync()) && well(w, "length", kvp_get_seq_lens(w->pool, 1, ret_seq, &length)) &&
           (length == tokens || fail(w, "%u tokens were written, the length is %u", tokens, length));
}

/* The sum over plane 0 of the first pages of a sequence. */
static bool sum_of(struct worker *w, struct kvp_seq seq, uint32_t most, uint64_t *ret_sum)
{
    static int32_t pages[65536];
    uint32_t n;

    if (!well(w, "row", kvp_row(w->pool, seq, 65536, pages, &n)))
        return false;
    return done(w, "sum",
                w->work->sum(w->first.base, (uint64_t)w->first.page_stride,
                             (uint64_t)w->plan->page_tokens * w->row_bytes, pages, n < most ? n : most, ret_sum));
}

/* ---- compute ----------------------------------------------------------------------------------------------------- */

static bool compute_once(struct worker *w, uint64_t expected, struct kvp_seq live, uint32_t *length)
{
    uint64_t sum;

    if (!sum_of(w, w->seqs[0], 256, &sum))
        return false;
    if (sum != expected)
        atomic_fetch_add(&w->slot->wrong, 1);
    if (*length < LIVE_MOST) {
        if (!append_in_place(w, live, *length, 1) || !done(w, "sync", w->work->sync()))
            return false;
        (*length)++;
    }
    atomic_fetch_add(&w->slot->iterations, 1);
    return true;
}

static void compute(struct worker *w)
{
    uint32_t pages = w->plan->fill_tokens / w->plan->page_tokens + 1, room = LIVE_MOST, length = 0, said = 0;
    uint64_t key = LIVE_KEY, expected;
    struct kvp_seq live;

    if (!attach(w, "big", NULL) || !make_step(w, pages > room ? pages : room))
        return;
    for (uint32_t i = 0; i < w->plan->fill_seqs; i++)
        if (!write_sequence(w, i + 1, 0, w->plan->fill_tokens, &w->seqs[i]))
            return;
    if (!well(w, "open", kvp_seq_open(w->pool, 1, &key, 0, &live)) ||
        !well(w, "advance", kvp_advance(w->pool, 1, &live, &room, NULL, 0, NULL, NULL, NULL)) ||
        !sum_of(w, w->seqs[0], 256, &expected))
        return;
    atomic_store(&w->slot->ready, 1);
    while (atomic_load(&w->slot->command) == COMMAND_NONE)
        if (!compute_once(w, expected, live, &length))
            return;
    if (!well(w, "length", kvp_get_seq_lens(w->pool, 1, &live, &said)))
        return;
    if (said != length)
        fail(w, "%u tokens were decoded, the daemon counts %u", length, said);
    if (kvp_step_errors(w->step, NULL) != 0)
        fail(w, "a kernel skipped tokens");
    atomic_store(&w->slot->finished, 1);
}

/* ---- append on request ------------------------------------------------------------------------------------------- */

#define PARENT_TOKENS(plan) ((plan)->page_tokens + (plan)->page_tokens / 2) /* its second page is open */

static unsigned char byte_at(uint32_t salt, uint32_t plane, uint32_t position, uint32_t at)
{
    return (unsigned char)(salt * 59 + plane * 31 + position * 7 + at);
}

/* Tokens from..from + n of a story, plane by plane. */
static void tell(const struct worker *w, unsigned char *to, uint32_t salt, uint32_t from, uint32_t n)
{
    for (uint32_t p = 0; p < w->planes; p++)
        for (uint32_t t = from; t < from + n; t++)
            for (uint32_t i = 0; i < w->row_bytes; i++)
                *to++ = byte_at(salt, p, t, i);
}

static bool on_request(struct worker *w, struct kvp_seq seq, uint32_t at, uint32_t n, const unsigned char *bytes)
{
    struct kvp_append_request request = {
        .n = 1, .seqs = &seq, .at = &at, .tokens = &n, .bytes = bytes, .bytes_n = (size_t)w->planes * n * w->row_bytes};
    struct kvp_point point;
    bool ok;

    atomic_store(&w->slot->in_call, 1);
    ok = well(w, "append on request", kvp_append_on_request(w->pool, &request, &point, NULL)) &&
         well(w, "its end", kvp_timeline_wait(w->pool, point, WAIT_MS));
    atomic_store(&w->slot->in_call, 0);
    return ok;
}

/* Every byte of the child: the parent's story, then its own. `flat` is what kvp_read_pages gives. */
static void compare(struct worker *w, const unsigned char *flat, uint32_t parent_salt, uint32_t salt, uint32_t tokens)
{
    uint32_t T = w->plan->page_tokens;
    uint64_t page_bytes = (uint64_t)w->planes * T * w->row_bytes;

    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t p = 0; p < w->planes; p++) {
            const unsigned char *row = flat + t / T * page_bytes + ((uint64_t)p * T + t % T) * w->row_bytes;
            uint32_t of = t < PARENT_TOKENS(w->plan) ? parent_salt : salt;

            for (uint32_t i = 0; i < w->row_bytes; i++)
                if (row[i] != byte_at(of, p, t, i))
                    atomic_fetch_add(&w->slot->wrong, 1);
        }
}

static bool close_child(struct worker *w, struct kvp_seq child, uint64_t *value)
{
    struct kvp_point point = {.value = ++*value};

    return well(w, "timeline", kvp_timeline_id(w->pool, 1, &point.timeline)) &&
           well(w, "signal", kvp_timeline_signal(w->pool, point, w->work->stream())) &&
           well(w, "close", kvp_seq_close(w->pool, 1, &child, &point));
}

static bool append_once(struct worker *w, struct kvp_seq parent, uint32_t salt, unsigned char *bytes, void *flat,
                        uint64_t *value)
{
    uint32_t n = w->plan->request_tokens, at = PARENT_TOKENS(w->plan), n_copies, n_pages, length = 0;
    int32_t pages[1024];
    struct kvp_page_copy copy;
    struct kvp_seq child;
    uint64_t key = salt;

    if (!well(w, "fork", kvp_fork(w->pool, 1, &parent, &key, NULL, &child, &copy, &n_copies, NULL)))
        return false;
    if (n_copies != 1)
        return fail(w, "the child owes %u copies", n_copies);
    tell(w, bytes, salt, at, n);
    if (!on_request(w, child, at, n, bytes) || !well(w, "length", kvp_get_seq_lens(w->pool, 1, &child, &length)) ||
        !well(w, "row", kvp_row(w->pool, child, 1024, pages, &n_pages)))
        return false;
    if (length != at + n)
        return fail(w, "%u tokens were appended behind %u, the length is %u", n, at, length);
    if (!well(w, "read", kvp_read_pages(w->step, n_pages, pages, flat, w->work->stream())))
        return false;
    compare(w, flat, 1, salt, at + n);
    atomic_fetch_add(&w->slot->tokens, n);
    atomic_fetch_add(&w->slot->iterations, 1);
    return close_child(w, child, value);
}

static void append(struct worker *w)
{
    uint32_t at = PARENT_TOKENS(w->plan), most = at + w->plan->request_tokens, pages = most / w->plan->page_tokens + 1;
    unsigned char *bytes = malloc((size_t)w->planes * most * w->row_bytes);
    uint64_t key = 1, value = 0;
    struct kvp_seq parent;
    void *flat;

    if (bytes == NULL || !attach(w, "big", NULL) || !make_step(w, pages) ||
        !well(w, "memory",
              kvp_host_alloc(w->pool, (size_t)pages * w->planes * w->plan->page_tokens * w->row_bytes, &flat)) ||
        !well(w, "open", kvp_seq_open(w->pool, 1, &key, 0, &parent)))
        return;
    tell(w, bytes, 1, 0, at);
    if (!on_request(w, parent, 0, at, bytes))
        return;
    atomic_store(&w->slot->ready, 1);
    for (uint32_t salt = 2; atomic_load(&w->slot->command) == COMMAND_NONE; salt++)
        if (!append_once(w, parent, salt, bytes, flat, &value))
            return;
    atomic_store(&w->slot->finished, 1);
}

/* ---- scribble, watch --------------------------------------------------------------------------------------------- */

/* A page of this process's own, in plane 0. @return NULL: it failed */
static void *own_page(struct worker *w, uint64_t key, int32_t *ret_page)
{
    uint32_t tokens = 64 * w->plan->page_tokens, n;
    struct kvp_seq seq;
    int32_t pages[64];

    if (!well(w, "open", kvp_seq_open(w->pool, 1, &key, 0, &seq)) ||
        !well(w, "advance", kvp_advance(w->pool, 1, &seq, &tokens, NULL, 0, NULL, NULL, NULL)) ||
        !well(w, "row", kvp_row(w->pool, seq, 64, pages, &n)))
        return NULL;
    *ret_page = pages[0];
    return (unsigned char *)w->first.base + (uint64_t)pages[0] * (uint64_t)w->first.page_stride;
}

/* A child without exec, which has what its parent had open. */
static void leave_child(struct worker *w)
{
    pid_t child = fork();

    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, 0);
        alarm(WAIT_MS / 1000);
        for (;;)
            pause();
    }
    atomic_store(&w->slot->child, child);
}

static bool scribble_on(struct worker *w, double seconds)
{
    int32_t page = 0;
    void *at = own_page(w, 77, &page);

    if (at == NULL ||
        !done(w, "scribble", w->work->scribble(at, (uint64_t)w->plan->page_tokens * w->row_bytes, seconds)))
        return false;
    atomic_store(&w->slot->page, page + 1);
    return true;
}

static void scribble(struct worker *w, bool with_child)
{
    if (!attach(w, "small", NULL))
        return;
    if (with_child)
        leave_child(w);
    if (!scribble_on(w, 20))
        return;
    atomic_store(&w->slot->ready, 1);
    for (;;)
        pause(); /* killed here */
}

static void watch(struct worker *w)
{
    struct slot *other = &w->shared->slots[0]; /* the scribbler's */
    uint64_t seen = 0, now, looked = now_ns();

    if (!attach(w, "small", NULL) || !done(w, "sync", w->work->sync()))
        return;
    atomic_store(&w->slot->ready, 1);
    while (atomic_load(&w->slot->command) == COMMAND_NONE) {
        int page = atomic_load(&other->page);
        uint64_t begins = now_ns();

        if (page == 0) {
            nap();
            continue;
        }
        if (!done(w, "read",
                  w->work->read(&now,
                                (unsigned char *)w->first.base + (uint64_t)(page - 1) * (uint64_t)w->first.page_stride,
                                sizeof(now))))
            return;
        if (now != seen)
            atomic_store(&w->slot->changed_ns, looked); /* it was not so yet when the last look began */
        seen = now;
        looked = begins;
        atomic_store(&w->slot->looked_ns, looked);
        atomic_fetch_add(&w->slot->iterations, 1);
    }
    atomic_store(&w->slot->finished, 1);
}

/* ---- own, beside, claim ------------------------------------------------------------------------------------------ */

#define OWN_SEQS 4u

static void own(struct worker *w)
{
    uint32_t tokens = w->plan->small_pages / 16 * w->plan->page_tokens;
    struct kvp_session_info info;

    if (!attach(w, "small", NULL) || !make_step(w, tokens / w->plan->page_tokens + 1) ||
        !well(w, "session", kvp_session_info(w->client, &info)))
        return;
    memcpy(w->slot->secret, info.resume_secret, sizeof(w->slot->secret));
    w->slot->secret_bytes = info.resume_secret_bytes;
    for (uint32_t i = 0; i < OWN_SEQS; i++)
        if (!write_sequence(w, i + 1, KVP_DURABLE, tokens, &w->seqs[i]) ||
            !sum_of(w, w->seqs[i], UINT32_MAX, &w->slot->sums[i]))
            return;
    atomic_store(&w->slot->ready, 1);
    while (atomic_load(&w->slot->command) == COMMAND_NONE)
        nap();
    scribble_on(w, 20);
    for (;;)
        pause();
}

/* Whether a context is to be had. */
static void probe(struct worker *w)
{
    if (done(w, "memory", w->work->alloc(4096) != NULL))
        atomic_store(&w->slot->finished, 1);
}

/* That its context is lost is no failure: it is what is waited for, and ends it. */
static void beside(struct worker *w)
{
    int32_t pages[] = {0, 1, 2, 3};
    uint64_t sum;

    if (!attach(w, "small", NULL))
        return;
    while (atomic_load(&w->slot->command) == COMMAND_NONE) {
        if (!w->work->sum(w->first.base, (uint64_t)w->first.page_stride, (uint64_t)w->plan->page_tokens * w->row_bytes,
                          pages, 4, &sum)) {
            snprintf(w->slot->text, TEXT_MAX, "%s", w->work->error());
            break;
        }
        atomic_store(&w->slot->ready, 1);
        atomic_fetch_add(&w->slot->iterations, 1);
    }
    atomic_store(&w->slot->finished, 1);
}

/* A session by lease with what a dead one left, once that is proven to be gone. */
static bool claim_session(struct worker *w, const struct slot *dead, struct kvp_session_info *ret_info)
{
    struct kvp_connect_options options = {.connect_ms = WAIT_MS, .call_ms = WAIT_MS};
    uint64_t until = now_ns() + (uint64_t)WAIT_MS * 1000000u;
    struct kvp_client *client;
    enum kvp_status status;

    if (!well(w, "connect", kvp_connect(w->endpoint, &options, &client)))
        return false;
    do {
        status = kvp_session_open(client, WAIT_MS, "claim", dead->secret, dead->secret_bytes, ret_info);
        nap();
    } while (status == KVP_EBUSY && now_ns() < until);
    kvp_disconnect(client);
    return well(w, "claim", status);
}

static void claim(struct worker *w)
{
    struct slot *dead = &w->shared->slots[0];
    uint64_t keys[OWN_SEQS], sum;
    uint32_t lengths[OWN_SEQS], tokens = w->plan->small_pages / 16 * w->plan->page_tokens;
    struct kvp_session_info info;

    for (uint32_t i = 0; i < OWN_SEQS; i++)
        keys[i] = i + 1;
    if (!claim_session(w, dead, &info) || !attach(w, "small", info.token) ||
        !well(w, "open", kvp_seq_open(w->pool, OWN_SEQS, keys, KVP_DURABLE, w->seqs)) ||
        !well(w, "lengths", kvp_get_seq_lens(w->pool, OWN_SEQS, w->seqs, lengths)))
        return;
    for (uint32_t i = 0; i < OWN_SEQS; i++) {
        if (lengths[i] != tokens) {
            fail(w, "sequence %u has %u tokens, not %u", i + 1, lengths[i], tokens);
            return;
        }
        if (!sum_of(w, w->seqs[i], UINT32_MAX, &sum))
            return;
        if (sum != dead->sums[i])
            atomic_fetch_add(&w->slot->wrong, 1);
        atomic_fetch_add(&w->slot->tokens, tokens);
    }
    atomic_store(&w->slot->finished, 1);
}

/* ---- who it is --------------------------------------------------------------------------------------------------- */

int survive_worker(const char *role, struct shared *shared, unsigned index, const char *endpoint)
{
    static struct worker worker;
    struct worker *w = &worker;

    *w = (struct worker){.plan = &shared->plan,
                         .shared = shared,
                         .slot = &shared->slots[index],
                         .index = index,
                         .endpoint = endpoint,
                         .work = &work_host,
                         .planes = 2 * shared->plan.layers,
                         .row_bytes = shared->plan.heads * shared->plan.dim * 2};
#ifdef KVP_WORK_CUDA
    if (shared->plan.cuda)
        w->work = &work_cuda;
#endif
    if (strcmp(role, "compute") == 0)
        compute(w);
    else if (strcmp(role, "append") == 0)
        append(w);
    else if (strcmp(role, "scribble") == 0)
        scribble(w, false);
    else if (strcmp(role, "scribble-fork") == 0)
        scribble(w, true);
    else if (strcmp(role, "watch") == 0)
        watch(w);
    else if (strcmp(role, "own") == 0)
        own(w);
    else if (strcmp(role, "probe") == 0)
        probe(w);
    else if (strcmp(role, "beside") == 0)
        beside(w);
    else if (strcmp(role, "claim") == 0)
        claim(w);
    else
        fail(w, "there is no role %s", role);
    return atomic_load(&w->slot->failed) != 0;
}
