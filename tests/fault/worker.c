/** The random worker of the fault tests; see worker.h. */
#include "worker.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct own {
    struct kvp_seq seq;
    uint64_t key;
    uint32_t reserved, written;
    bool copy_owed;
    struct kvp_page_copy copy;
    uint64_t stamps[FAULT_LENGTH_MAX];
};

struct worker {
    const struct fault_job *job;
    struct fault_stats *stats;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_step *step;
    struct kvp_plane_view planes[FAULT_PLANES];
    struct own own[FAULT_OWN_MAX + 1]; /* one more, for what is given at the end */
    unsigned n_own;
    uint64_t random, next_key, next_stamp, call;
    int log;
    bool failed;
    unsigned char staged[FAULT_PLANES][FAULT_LENGTH_MAX * FAULT_ROW_BYTES];
};

uint64_t fault_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static uint32_t below(struct worker *w, uint32_t n)
{
    return (uint32_t)(fault_random(&w->random) % n);
}

static void fill_row(uint64_t stamp, unsigned plane, unsigned char *ret_row)
{
    uint64_t state = stamp * FAULT_PLANES + plane;

    for (unsigned i = 0; i < FAULT_ROW_BYTES; i += 8) {
        uint64_t word = fault_random(&state);

        memcpy(ret_row + i, &word, 8);
    }
}

void fault_make_pool(struct kvp_client *client)
{
    struct kvp_plane_spec planes[FAULT_PLANES];
    struct kvp_pool_spec spec = {.name = FAULT_POOL, .max_sequences = 1024, .max_sequence_tokens = FAULT_LENGTH_MAX,
                                 .page_digests = true};
    enum kvp_status status;

    for (unsigned p = 0; p < FAULT_PLANES; p++)
        planes[p] = (struct kvp_plane_spec){.layer = p / 2, .component = p % 2 ? KVP_COMPONENT_V : KVP_COMPONENT_K,
                                            .heads = FAULT_HEADS, .dim = FAULT_DIM, .dtype = KVP_DTYPE_F16};
    spec.layout = (struct kvp_layout_spec){.pages = FAULT_PAGES, .page_tokens = FAULT_TOKENS, .n_planes = FAULT_PLANES,
                                           .order = KVP_ORDER_NHD, .placement = KVP_PLACEMENT_LAYER, .planes = planes};
    status = kvp_pool_create(client, &spec, NULL);
    if (status != KVP_OK) {
        fprintf(stderr, "fault: pool: %s: %s\n", kvp_status_name(status), kvp_error_text());
        exit(1);
    }
}

/* ---- the log: one line before a call, one after it --------------------------------------------------------------- */

static void log_before(struct worker *w, const char *op, const struct own *own, uint32_t a)
{
    char line[160];
    int n = snprintf(line, sizeof(line), "%llu b %s %llx %u\n", (unsigned long long)++w->call, op,
                     (unsigned long long)own->key, a);

    if (w->log >= 0 && write(w->log, line, (size_t)n) != n)
        w->failed = true;
}

static bool log_after(struct worker *w, const char *op, const struct own *own, enum kvp_status status)
{
    char line[160];
    int n = snprintf(line, sizeof(line), "%llu a %s %llx %u %u %s\n", (unsigned long long)w->call, op,
                     (unsigned long long)own->key, own->reserved, own->written, kvp_status_name(status));

    if (w->log >= 0 && write(w->log, line, (size_t)n) != n)
        w->failed = true;
    atomic_fetch_add(&w->stats->calls, 1);
    if (status == KVP_OK)
        return true;
    if (status == KVP_ENOPAGES)
        return false;
    fprintf(stderr, "worker %u: call %llu %s of %llx: %s: %s\n", w->job->index, (unsigned long long)w->call, op,
            (unsigned long long)own->key, kvp_status_name(status), kvp_error_text());
    atomic_fetch_add(&w->stats->failed, 1);
    w->failed = true;
    return false;
}

/* What this worker's own kernels wrote: no call, so no answer to wait for. */
static void log_written(struct worker *w, const struct own *own)
{
    char line[80];
    int n = snprintf(line, sizeof(line), "%llu w write %llx %u %u KVP_OK\n", (unsigned long long)w->call,
                     (unsigned long long)own->key, own->reserved, own->written);

    if (w->log >= 0 && write(w->log, line, (size_t)n) != n)
        w->failed = true;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

/* Read a sequence in place, through its row in the published table, and compare every byte. */
static void verify(struct worker *w, const struct own *own)
{
    int32_t pages[FAULT_LENGTH_MAX / FAULT_TOKENS + 1];
    uint32_t n_pages = 0, from = own->copy_owed ? own->copy.tokens : 0;
    unsigned char row[FAULT_ROW_BYTES];

    if (kvp_row(w->pool, own->seq, FAULT_LENGTH_MAX / FAULT_TOKENS + 1, pages, &n_pages) != KVP_OK ||
        n_pages * FAULT_TOKENS < own->written) {
        if (own->written == 0)
            return;
        fprintf(stderr, "worker %u: the row of %llx has %u pages for %u tokens: %s\n", w->job->index,
                (unsigned long long)own->key, n_pages, own->written, kvp_error_text());
        w->failed = true;
        return;
    }
    for (uint32_t t = 0; t < own->written; t++) {
        if (from > 0 && t / FAULT_TOKENS == (own->written - 1) / FAULT_TOKENS)
            break; /* its last page is still to be copied */
        for (unsigned p = 0; p < FAULT_PLANES; p++) {
            const unsigned char *at = (const unsigned char *)w->planes[p].base +
                                      (uint64_t)pages[t / FAULT_TOKENS] * w->planes[p].page_stride +
                                      t % FAULT_TOKENS * w->planes[p].token_stride;

            fill_row(own->stamps[t], p, row);
            if (memcmp(at, row, FAULT_ROW_BYTES) == 0)
                continue;
            for (unsigned i = 0; i < FAULT_ROW_BYTES; i++)
                if (at[i] != row[i])
                    atomic_fetch_add(&w->stats->corrupt_bytes, 1);
        }
    }
    atomic_fetch_add(&w->stats->verified_tokens, own->written);
}

/* New stamps for n tokens behind `written`, and their bytes staged, plane by plane. */
static void stage(struct worker *w, struct own *own, uint32_t n)
{
    for (uint32_t t = 0; t < n; t++) {
        own->stamps[own->written + t] = (uint64_t)w->job->index << 56 | ++w->next_stamp;
        for (unsigned p = 0; p < FAULT_PLANES; p++)
            fill_row(own->stamps[own->written + t], p, w->staged[p] + t * FAULT_ROW_BYTES);
    }
}

static bool settle_copy(struct worker *w, struct own *own)
{
    if (!own->copy_owed)
        return true;
    if (kvp_copy_owed(w->step, 1, &own->copy, NULL) != KVP_OK) {
        fprintf(stderr, "worker %u: copy: %s\n", w->job->index, kvp_error_text());
        w->failed = true;
        return false;
    }
    own->copy_owed = false;
    return true;
}

static void take_copies(struct own *own, const struct kvp_page_copy *copies, uint32_t n)
{
    if (n > 0 && !own->copy_owed) {
        own->copy_owed = true;
        own->copy = copies[0];
    }
}

/* ---- the calls --------------------------------------------------------------------------------------------------- */

static void do_open(struct worker *w)
{
    struct own *own = &w->own[w->n_own];

    if (w->n_own >= FAULT_OWN_MAX)
        return;
    memset(own, 0, sizeof(*own));
    own->key = (uint64_t)w->job->index << 32 | ++w->next_key;
    log_before(w, "open", own, 0);
    if (log_after(w, "open", own, kvp_seq_open(w->pool, 1, &own->key, 0, &own->seq)))
        w->n_own++;
}

/* Room by Advance, then the tokens by this process's own kernels. */
static void do_write(struct worker *w, struct own *own)
{
    uint32_t n = 1 + below(w, 48), n_copies = 0, to;
    struct kvp_token_view sources[FAULT_PLANES];
    struct kvp_page_copy copy;
    enum kvp_status status;

    if (own->written + n > FAULT_LENGTH_MAX)
        return;
    to = own->written + n;
    log_before(w, "advance", own, to);
    status = kvp_advance(w->pool, 1, &own->seq, &to, NULL, 0, &copy, &n_copies, NULL);
    if (status == KVP_OK)
        own->reserved = to > own->reserved ? to : own->reserved;
    if (!log_after(w, "advance", own, status))
        return;
    take_copies(own, &copy, n_copies);
    if (!settle_copy(w, own))
        return;
    stage(w, own, n);
    for (unsigned p = 0; p < FAULT_PLANES; p++)
        sources[p] = (struct kvp_token_view){w->staged[p], FAULT_ROW_BYTES, FAULT_DIM * 2};
    if (kvp_step_begin(w->step, 1, &own->seq, &n, &own->written, NULL) != KVP_OK ||
        kvp_append(w->step, 0, FAULT_PLANES, sources, NULL) != KVP_OK || kvp_progress(w->step, NULL) != KVP_OK) {
        fprintf(stderr, "worker %u: write: %s\n", w->job->index, kvp_error_text());
        w->failed = true;
        return;
    }
    own->written += n;
    log_written(w, own);
    atomic_fetch_add(&w->stats->tokens, n);
}

/* The tokens by the executor: all of it one call. */
static void do_append(struct worker *w, struct own *own)
{
    uint32_t n = 1 + below(w, 24);
    static unsigned char bytes[FAULT_PLANES * 24 * FAULT_ROW_BYTES];
    struct kvp_append_request request = {.n = 1, .seqs = &own->seq, .at = &own->written, .tokens = &n, .bytes = bytes};
    struct kvp_point done;
    enum kvp_status status;

    if (own->written + n > FAULT_LENGTH_MAX)
        return;
    stage(w, own, n);
    for (unsigned p = 0; p < FAULT_PLANES; p++)
        memcpy(bytes + (size_t)p * n * FAULT_ROW_BYTES, w->staged[p], (size_t)n * FAULT_ROW_BYTES);
    request.bytes_n = (size_t)FAULT_PLANES * n * FAULT_ROW_BYTES;
    log_before(w, "append", own, own->written + n);
    status = kvp_append_on_request(w->pool, &request, &done, NULL);
    if (status == KVP_OK)
        status = kvp_timeline_wait(w->pool, done, 60000);
    if (status == KVP_OK) {
        own->written += n;
        own->reserved = own->written > own->reserved ? own->written : own->reserved;
        own->copy_owed = false; /* the executor did it first */
        atomic_fetch_add(&w->stats->tokens, n);
    }
    log_after(w, "append", own, status);
}

static void do_fork(struct worker *w, struct own *parent)
{
    struct own *child = &w->own[w->n_own];
    struct kvp_page_copy copy;
    uint32_t n_copies = 0, tokens;
    enum kvp_status status;

    if (w->n_own >= FAULT_OWN_MAX || parent->copy_owed)
        return;
    memset(child, 0, sizeof(*child));
    child->key = (uint64_t)w->job->index << 32 | ++w->next_key;
    tokens = below(w, parent->written + 1);
    log_before(w, "fork", child, tokens);
    status = kvp_fork(w->pool, 1, &parent->seq, &child->key, &tokens, &child->seq, &copy, &n_copies, NULL);
    if (status == KVP_OK)
        child->written = child->reserved = tokens;
    if (!log_after(w, "fork", child, status))
        return;
    memcpy(child->stamps, parent->stamps, sizeof(child->stamps));
    take_copies(child, &copy, n_copies);
    w->n_own++;
}

static void do_truncate(struct worker *w, struct own *own)
{
    uint32_t to = below(w, own->written + 1), n_copies = 0;
    struct kvp_page_copy copy;
    enum kvp_status status;

    if (own->copy_owed)
        return;
    log_before(w, "truncate", own, to);
    status = kvp_advance(w->pool, 1, &own->seq, &to, NULL, KVP_TRUNCATE, &copy, &n_copies, NULL);
    if (status == KVP_OK)
        own->written = own->reserved = to;
    if (!log_after(w, "truncate", own, status))
        return;
    take_copies(own, &copy, n_copies);
}

static void forget(struct worker *w, struct own *own)
{
    *own = w->own[--w->n_own];
}

static void do_close(struct worker *w, struct own *own)
{
    log_before(w, "close", own, 0);
    if (log_after(w, "close", own, kvp_seq_close(w->pool, 1, &own->seq, NULL)))
        forget(w, own);
}

static void do_give(struct worker *w, struct own *own)
{
    unsigned to = (w->job->index + 1) % FAULT_WORKERS;
    struct fault_mail *mail = &w->job->shared->mail[to];

    if (!w->job->transfers || atomic_load(&mail->full) != 0 || own->copy_owed)
        return;
    log_before(w, "give", own, to);
    if (!log_after(w, "give", own,
                   kvp_transfer(w->pool, 1, &own->seq, atomic_load(&w->job->shared->workers[to].session_id), NULL, NULL)))
        return;
    mail->key = own->key;
    mail->written = own->written;
    mail->reserved = own->reserved;
    memcpy(mail->stamps, own->stamps, sizeof(mail->stamps));
    atomic_store(&mail->full, 1);
    forget(w, own);
}

static void do_take(struct worker *w)
{
    struct fault_mail *mail = &w->job->shared->mail[w->job->index];
    struct own *own = &w->own[w->n_own];

    if (w->n_own > FAULT_OWN_MAX || atomic_load(&mail->full) == 0)
        return;
    memset(own, 0, sizeof(*own));
    own->key = mail->key;
    own->written = mail->written;
    own->reserved = mail->reserved;
    memcpy(own->stamps, mail->stamps, sizeof(own->stamps));
    log_before(w, "take", own, own->written);
    if (log_after(w, "take", own, kvp_seq_open(w->pool, 1, &own->key, 0, &own->seq)))
        w->n_own++;
    atomic_store(&mail->full, 0);
}

static void do_ask(struct worker *w, struct own *own)
{
    uint32_t length = 0;
    enum kvp_status status;

    log_before(w, "ask", own, own->written);
    status = kvp_get_seq_lens(w->pool, 1, &own->seq, &length);
    if (log_after(w, "ask", own, status) && length != own->written) {
        fprintf(stderr, "worker %u: %llx has %u tokens, the daemon says %u\n", w->job->index,
                (unsigned long long)own->key, own->written, length);
        w->failed = true;
    }
}

static void do_one(struct worker *w)
{
    struct own *own;
    uint32_t dice = below(w, 100);

    do_take(w);
    if (w->n_own == 0 || dice < 8) {
        do_open(w);
        return;
    }
    own = &w->own[below(w, w->n_own)];
    if (dice < 45)
        do_write(w, own);
    else if (dice < 53)
        do_append(w, own);
    else if (dice < 60)
        do_fork(w, own);
    else if (dice < 66)
        do_truncate(w, own);
    else if (dice < 72)
        do_close(w, own);
    else if (dice < 78)
        do_give(w, own);
    else if (dice < 85)
        do_ask(w, own);
    else
        verify(w, own);
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

/* The sockets of this process, as the kernel numbers them: another inode is another connection. */
static uint64_t sockets_sum(void)
{
    DIR *folder = opendir("/proc/self/fd");
    uint64_t sum = 0;
    struct dirent *entry;

    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        char to[64];
        ssize_t n = readlinkat(dirfd(folder), entry->d_name, to, sizeof(to) - 1);

        if (n > 8 && memcmp(to, "socket:[", 8) == 0) {
            to[n] = 0;
            sum += strtoull(to + 8, NULL, 10);
        }
    }
    if (folder != NULL)
        closedir(folder);
    return sum;
}

static bool attach(struct worker *w)
{
    struct kvp_connect_options options = {.connect_ms = 60000, .reconnect_ms = 60000, .call_ms = 60000};
    struct kvp_session_info info;

    if (kvp_connect(w->job->endpoint, &options, &w->client) != KVP_OK ||
        kvp_session_info(w->client, &info) != KVP_OK || kvp_attach(w->client, FAULT_POOL, NULL, &w->pool) != KVP_OK ||
        kvp_step_create(w->pool, 0, 4, FAULT_LENGTH_MAX, 4 * (FAULT_LENGTH_MAX / FAULT_TOKENS + 1), &w->step) != KVP_OK)
        return false;
    for (unsigned p = 0; p < FAULT_PLANES; p++)
        if (kvp_pool_plane(w->pool, 0, p, &w->planes[p]) != KVP_OK)
            return false;
    atomic_store(&w->stats->session_id, info.session_id);
    atomic_store(&w->stats->ready, 1);
    return true;
}

static void finish(struct worker *w)
{
    struct timespec pause = {.tv_nsec = 1000000};

    atomic_store(&w->stats->finished, 1);
    while (atomic_load(&w->job->shared->stop) != 2 && !w->failed) { /* the judge looks at what is open */
        if (w->n_own > FAULT_OWN_MAX && atomic_load(&w->job->shared->mail[w->job->index].full) != 0)
            do_close(w, &w->own[0]); /* room for what a neighbour still gave */
        do_take(w);
        nanosleep(&pause, NULL);
    }
    for (unsigned i = 0; i < w->n_own; i++)
        verify(w, &w->own[i]);
    while (w->n_own > 0 && !w->failed)
        do_close(w, &w->own[0]);
}

int fault_worker(const struct fault_job *job)
{
    struct worker *w = calloc(1, sizeof(*w));
    struct timespec pause = {.tv_nsec = 1000000};
    uint64_t sockets;
    void *slab;

    if (w == NULL)
        return 1;
    w->job = job;
    w->stats = &job->shared->workers[job->index];
    w->random = job->seed;
    w->log = job->log_path != NULL ? open(job->log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    while (atomic_load(&job->shared->go) == 0)
        nanosleep(&pause, NULL);
    if (!attach(w)) {
        fprintf(stderr, "worker %u: attach: %s\n", job->index, kvp_error_text());
        return 1;
    }
    sockets = sockets_sum();
    slab = kvp_slab(w->pool, 0);
    for (unsigned i = 0; i < FAULT_WORKERS && job->transfers; i++)
        while (atomic_load(&job->shared->workers[i].ready) == 0)
            nanosleep(&pause, NULL);
    while (atomic_load(&job->shared->stop) == 0 && !w->failed)
        do_one(w);
    if (job->keep_at_end)
        finish(w);
    if (sockets_sum() != sockets || kvp_slab(w->pool, 0) != slab) {
        fprintf(stderr, "worker %u: another socket, or the slab is mapped elsewhere\n", job->index);
        w->failed = true;
    }
    kvp_step_destroy(w->step);
    kvp_detach(w->pool);
    kvp_disconnect(w->client);
    return w->failed ? 1 : 0;
}
