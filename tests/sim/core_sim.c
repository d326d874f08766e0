/**
 * The core under simulated sessions: random calls, wrong ones included, writers in place and on request, deaths of
 * sessions, executors and the daemon itself, completions that come late; against a model that keeps a byte for every
 * token.
 *
 *   core_sim [SEED [STEPS]]
 *
 * After each step what the core says of a sequence is what the model knows; at every hundredth the ledger is audited
 * and every written token of every sequence is looked up in the slab: a token that counts and is not there ends the
 * run. At the end all sessions end, and every page must be back. The same seed does the same.
 */
#include "core_shell.h"

#include <string.h>

#define SESSIONS   6
#define SEQUENCES  48
#define TOKENS_MAX 64
#define PAGES      96
#define PAGE       4
#define POOL       "p"

struct client {
    bool open, attached, lease, eof;
    struct kvp_caller caller;
    char token[40];
    uint64_t id;
    uint32_t attachment;
    uint64_t call_id;
    uint32_t pid;
};

struct sequence {
    bool used;
    uint64_t handle, key;
    unsigned owner;
    uint32_t reserved, written, version;
    uint32_t busy_to;                /* an Append under way ends there; 0: none */
    unsigned char token[TOKENS_MAX]; /* the value of every byte of it */
};

static struct shell *shell;
static struct client clients[SESSIONS];
static struct sequence sequences[SEQUENCES];
static struct shell_call *waiting[8];
static struct kvp_session_id dead[4096]; /* whose process has ended: an adopting shell finds that out again */
static unsigned n_dead;
static uint64_t rng, next_key = 1;
static uint32_t next_pid = 100;
static unsigned long counts[16];
enum {
    DONE_ADVANCE,
    DONE_APPEND,
    DONE_FORK,
    DONE_TRANSFER,
    DONE_CLOSE,
    DONE_WRONG,
    DONE_DEATH,
    DONE_EXECUTOR,
    DONE_RESTART
};

static uint32_t below(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 32) % n;
}

#define CALL(client, NAME, request)                                                                                    \
    shell_call(shell, (client)->caller, KVPOOL__V1__METHOD__METHOD_##NAME, &(request).base)

static enum kvp_status finish(struct shell_call *call)
{
    enum kvp_status status = call->status;
    shell_call_free(shell, call);
    return status;
}

static struct kvp_pool_id pool_id(void)
{
    struct kvp_pool_id id;
    ck_assert_int_eq(kvp_pool_by_name(&shell->ledger, POOL, &id), KVP_OK);
    return id;
}

static enum kvp_status look(const struct sequence *s, struct kvp_seq_view *ret_view)
{
    return kvp_seq_get(&shell->ledger, pool_id(), (struct kvp_seq_id){(uint32_t)s->handle, (uint32_t)(s->handle >> 32)},
                       ret_view);
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

/* The pool: one plane of one head of 8 bytes, NHD: token t of a page lies at (page · PAGE + t) · 8. */
static unsigned char *token_at(uint32_t page, uint32_t t)
{
    return shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, 0}) + ((uint64_t)page * PAGE + t) * 8;
}

static void check_tokens(const struct sequence *s)
{
    struct kvp_seq_view view;
    ck_assert_int_eq(look(s, &view), KVP_OK);
    const uint32_t *row = kvp_seq_row(&shell->ledger, pool_id(), view.id.slot);
    for (uint32_t t = 0; t < s->written; t++) {
        uint32_t page = row[t / PAGE];
        if (view.copy.tokens != 0 && page == view.copy.destination)
            page = view.copy.source;
        const unsigned char *at = token_at(page, t % PAGE);
        for (int i = 0; i < 8; i++)
            ck_assert_msg(at[i] == s->token[t], "key %llu: token %u of %u is %u, must be %u",
                          (unsigned long long)s->key, t, s->written, at[i], s->token[t]);
    }
}

/* A worker writes in place: the copy that is owed, the tokens, then the word. */
static void write_in_place(struct sequence *s, uint32_t to)
{
    struct kvp_seq_view view;
    ck_assert_int_eq(look(s, &view), KVP_OK);
    const uint32_t *row = kvp_seq_row(&shell->ledger, pool_id(), view.id.slot);
    if (view.copy.tokens != 0)
        memcpy(token_at(view.copy.destination, 0), token_at(view.copy.source, 0), view.copy.tokens * 8);
    for (uint32_t t = s->written; t < to; t++) {
        s->token[t] = (unsigned char)below(256);
        memset(token_at(row[t / PAGE], t % PAGE), s->token[t], 8);
    }
}

/* ---- what the model knows ---------------------------------------------------------------------------------------- */

static struct sequence *any_sequence(void)
{
    unsigned from = below(SEQUENCES);
    for (unsigned i = 0; i < SEQUENCES; i++) {
        struct sequence *s = &sequences[(from + i) % SEQUENCES];
        if (s->used && clients[s->owner].open)
            return s;
    }
    return NULL;
}

static struct sequence *free_sequence(void)
{
    for (unsigned i = 0; i < SEQUENCES; i++) {
        if (!sequences[i].used)
            return &sequences[i];
    }
    return NULL;
}

/* An Append may have ended, well or not; what counts must be what was asked for, or what was. */
static void settle_busy(struct sequence *s)
{
    struct kvp_seq_view view;
    if (s->busy_to == 0 || look(s, &view) != KVP_OK || view.job != KVP_NONE)
        return;
    /* a call that waited for its end may have cut it already */
    uint32_t before = s->written < view.reserved ? s->written : view.reserved;
    uint32_t after = s->busy_to < view.reserved ? s->busy_to : view.reserved;
    ck_assert_msg(view.written == before || view.written == after, "%u tokens, neither %u nor %u", view.written, before,
                  after);
    s->written = view.written;
    s->busy_to = 0;
}

static void check_lengths(void)
{
    for (unsigned i = 0; i < SEQUENCES; i++) {
        struct sequence *s = &sequences[i];
        struct kvp_seq_view view;
        if (!s->used)
            continue;
        if (look(s, &view) != KVP_OK) {
            ck_assert_msg(!clients[s->owner].open, "an open sequence of a living session is gone");
            s->used = false;
            continue;
        }
        settle_busy(s);
        ck_assert_uint_eq(view.reserved, s->reserved);
        if (s->busy_to == 0)
            ck_assert_uint_eq(view.written, s->written);
    }
}

static void drop_sequences(unsigned owner)
{
    for (unsigned i = 0; i < SEQUENCES; i++) {
        if (sequences[i].used && sequences[i].owner == owner)
            sequences[i].used = false;
    }
}

/* ---- steps: sessions --------------------------------------------------------------------------------------------- */

static void open_client(unsigned n)
{
    struct client *c = &clients[n];
    drop_sequences(n);
    *c = (struct client){.open = true, .lease = below(3) == 0, .pid = next_pid++};
    if (c->lease) {
        Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
        c->caller = shell_grpc(1000, c->pid);
        request.lease_ms = 3600000;
        struct shell_call *call = CALL(c, OPEN_SESSION, request);
        ck_assert_int_eq(call->status, KVP_OK);
        const Kvpool__V1__OpenSessionReply *reply = (const Kvpool__V1__OpenSessionReply *)call->reply;
        snprintf(c->token, sizeof(c->token), "%s", reply->session);
        c->id = reply->session_id;
        shell_call_free(shell, call);
        return;
    }
    c->caller = shell_connect(shell, 1000, c->pid);
    c->id = (uint64_t)c->caller.session.generation << 32 | c->caller.session.slot;
    if (below(4) != 0) {
        c->attachment = shell_attach(shell, c->caller, POOL);
        c->attached = true;
    }
}

static void end_client(unsigned n)
{
    struct client *c = &clients[n];
    counts[DONE_DEATH]++;
    if (c->lease) {
        Kvpool__V1__CloseSessionRequest request = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
        request.session = c->token;
        ck_assert_int_eq(finish(CALL(c, CLOSE_SESSION, request)), KVP_OK);
        c->open = false;
    } else if (!c->eof && below(2) == 0) {
        kvp_core_disconnected(shell->core, c->caller.session);
        c->open = false;
        c->eof = true;
    } else {
        kvp_core_process_ended(shell->core, c->caller.session);
        dead[n_dead++ % 4096] = c->caller.session;
        c->open = c->eof = false;
    }
}

static void step_session(void)
{
    unsigned n = below(SESSIONS);
    if (!clients[n].open && !clients[n].eof)
        open_client(n);
    else if (clients[n].eof || below(6) == 0)
        end_client(n);
}

/* ---- steps: sequences -------------------------------------------------------------------------------------------- */

static void step_open(void)
{
    unsigned n = below(SESSIONS);
    struct client *c = &clients[n];
    struct sequence *s = free_sequence();
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    if (!c->open || s == NULL)
        return;
    uint64_t key = next_key++;
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_keys = 1;
    request.keys = &key;
    struct shell_call *call = CALL(c, OPEN_SEQUENCES, request);
    if (call->status == KVP_OK) {
        *s = (struct sequence){.used = true, .key = key, .owner = n};
        s->handle = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
        s->version = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->versions[0];
    } else {
        ck_assert_int_eq(call->status, KVP_ELIMIT);
    }
    shell_call_free(shell, call);
}

/* Room, and tokens in place: by the word, or said in the call. */
static void step_advance(void)
{
    struct sequence *s = any_sequence();
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    if (s == NULL)
        return;
    struct client *c = &clients[s->owner];
    uint32_t reserved = below(TOKENS_MAX + 1), written;
    bool cuts = reserved < s->reserved;
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &s->handle;
    request.reserved = &reserved;
    request.truncate = cuts;
    struct shell_call *call = CALL(c, ADVANCE, request);
    enum kvp_status status = call->status;
    settle_busy(s);
    if (status == KVP_ENOPAGES)
        ck_assert_uint_gt(shell_missing(call), 0);
    if (status == KVP_OK) {
        s->reserved = reserved;
        s->written = s->written < reserved ? s->written : reserved;
        s->version = ((const Kvpool__V1__AdvanceReply *)call->reply)->versions[0];
        ck_assert_uint_eq(((const Kvpool__V1__AdvanceReply *)call->reply)->written[0], s->written);
    } else {
        ck_assert_msg(status == KVP_ENOPAGES || status == KVP_ELIMIT || (status == KVP_EBUSY && s->busy_to != 0), "%s",
                      shell_error(call));
    }
    shell_call_free(shell, call);
    if (status != KVP_OK || s->written == s->reserved || below(2) == 0)
        return;
    counts[DONE_ADVANCE]++;
    written = s->written + 1 + below(s->reserved - s->written);
    write_in_place(s, written);
    if (c->attached) {
        shell_progress(shell, c->attachment)[(uint32_t)s->handle] = KVP_PROGRESS_WORD(s->version, written);
    } else {
        request.call_id = ++c->call_id;
        request.n_written = 1;
        request.written = &written;
        ck_assert_int_eq(finish(CALL(c, ADVANCE, request)), KVP_OK);
    }
    ck_assert_uint_eq(shell_length(shell, shell_grpc(1, 1), POOL, s->handle), written);
    s->written = written;
}

static void keep_waiting(struct shell_call *call)
{
    for (unsigned i = 0; i < 8; i++) {
        if (waiting[i] == NULL) {
            waiting[i] = call;
            return;
        }
    }
    shell_call_gone(shell, call);
}

static void collect_waiting(void)
{
    for (unsigned i = 0; i < 8; i++) {
        if (waiting[i] == NULL)
            continue;
        if (waiting[i]->answered)
            shell_call_free(shell, waiting[i]);
        else if (below(20) == 0)
            shell_call_gone(shell, waiting[i]);
        else
            continue;
        waiting[i] = NULL;
    }
}

static void step_append(void)
{
    struct sequence *s = any_sequence();
    unsigned char bytes[TOKENS_MAX * 8];
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    if (s == NULL || s->written == TOKENS_MAX)
        return;
    struct client *c = &clients[s->owner];
    uint32_t at = s->written, tokens = 1 + below(TOKENS_MAX - s->written);
    bool was_busy = s->busy_to != 0;
    unsigned char values[TOKENS_MAX];
    for (uint32_t t = 0; t < tokens; t++) {
        values[t] = (unsigned char)below(256);
        memset(bytes + t * 8, values[t], 8);
    }
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = &s->handle;
    request.at = &at;
    request.tokens = &tokens;
    request.inline_ = (ProtobufCBinaryData){tokens * 8, bytes};
    struct shell_call *call = shell_send(shell, c->caller, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base, NULL);
    struct kvp_seq_view view;
    ck_assert_int_eq(look(s, &view), KVP_OK);
    if (call->answered ? call->status == KVP_OK : view.job != KVP_NONE && !was_busy) {
        counts[DONE_APPEND]++;
        s->busy_to = at + tokens;
        s->reserved = s->reserved > s->busy_to ? s->reserved : s->busy_to;
        memcpy(s->token + at, values, tokens);
    }
    if (call->answered) {
        enum kvp_status status = call->status;
        ck_assert_msg(status == KVP_OK || status == KVP_ENOPAGES || status == KVP_EMISMATCH ||
                          (status == KVP_EBUSY && was_busy),
                      "%s", shell_error(call));
        if (status == KVP_EMISMATCH)
            ck_assert(was_busy);
        shell_call_free(shell, call);
    } else if (s->busy_to != at + tokens || was_busy) {
        shell_call_gone(shell, call); /* it waits for pages, or for another's end: not modelled further */
    } else {
        keep_waiting(call);
    }
}

static void step_fork(void)
{
    struct sequence *parent = any_sequence(), *s = free_sequence();
    unsigned n = below(SESSIONS);
    struct client *c = &clients[n];
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    if (parent == NULL || s == NULL || !c->open || parent->busy_to != 0)
        return;
    uint64_t key = next_key++;
    uint32_t tokens = below(parent->written + 1);
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_parents = request.n_keys = request.n_tokens = 1;
    request.parents = &parent->handle;
    request.keys = &key;
    request.tokens = &tokens;
    for (int repeat = 0; repeat < 2; repeat++) {
        struct shell_call *call = CALL(c, FORK, request);
        if (call->status == KVP_OK) {
            const Kvpool__V1__ForkReply *reply = (const Kvpool__V1__ForkReply *)call->reply;
            if (repeat)
                ck_assert_uint_eq(reply->seqs[0], s->handle);
            *s = (struct sequence){.used = true,
                                   .key = key,
                                   .owner = n,
                                   .handle = reply->seqs[0],
                                   .reserved = tokens,
                                   .written = tokens,
                                   .version = reply->versions[0]};
            memcpy(s->token, parent->token, tokens);
            counts[DONE_FORK]++;
        } else {
            ck_assert(!repeat && (call->status == KVP_ENOPAGES || call->status == KVP_ELIMIT));
            repeat = 2;
        }
        shell_call_free(shell, call);
    }
}

static void step_transfer(void)
{
    struct sequence *s = any_sequence();
    unsigned n = below(SESSIONS);
    Kvpool__V1__TransferRequest request = KVPOOL__V1__TRANSFER_REQUEST__INIT;
    if (s == NULL || !clients[n].open)
        return;
    struct client *c = &clients[s->owner];
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_seqs = 1;
    request.seqs = &s->handle;
    request.to = clients[n].id;
    struct shell_call *call = CALL(c, TRANSFER, request);
    settle_busy(s);
    if (call->status == KVP_OK) {
        counts[DONE_TRANSFER]++;
        s->owner = n;
        s->version = ((const Kvpool__V1__TransferReply *)call->reply)->versions[0];
    } else {
        ck_assert_msg(call->status == KVP_ENOENT || (call->status == KVP_EBUSY && s->busy_to != 0), "%s",
                      shell_error(call));
    }
    shell_call_free(shell, call);
}

static void step_close(void)
{
    struct sequence *s = any_sequence();
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    if (s == NULL)
        return;
    struct client *c = &clients[s->owner];
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_seqs = 1;
    request.seqs = &s->handle;
    enum kvp_status status = finish(CALL(c, CLOSE_SEQUENCES, request));
    settle_busy(s);
    ck_assert(status == KVP_OK || (status == KVP_EBUSY && s->busy_to != 0));
    s->used = status != KVP_OK;
    counts[DONE_CLOSE] += status == KVP_OK;
}

/* Calls that must fail, and change nothing. */
static void step_wrong(void)
{
    struct sequence *s = any_sequence();
    unsigned n = below(SESSIONS);
    if (s == NULL || !clients[n].open)
        return;
    counts[DONE_WRONG]++;
    uint64_t handle = s->handle;
    uint32_t reserved = below(TOKENS_MAX), seven = 7;
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    request.session = clients[n].token;
    request.pool = (char *)POOL;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &handle;
    request.reserved = &reserved;
    switch (below(5)) {
    case 0:
        handle += 1ull << 32;
        break;
    case 1:
        handle = (uint64_t)below(UINT32_MAX) << 32 | below(UINT32_MAX);
        break;
    case 2:
        reserved = TOKENS_MAX + 1 + below(1000);
        break;
    case 3:
        request.n_reserved = 0;
        break;
    default:
        request.n_written = 1;
        request.written = &seven;
        reserved = below(7);
        request.truncate = true;
        break;
    }
    ck_assert_int_ne(finish(CALL(&clients[n], ADVANCE, request)), KVP_OK);
}

/* ---- steps: time, executors, the daemon -------------------------------------------------------------------------- */

static void step_executor(void)
{
    switch (below(8)) {
    case 0:
        shell_executor_kill(shell, 0);
        counts[DONE_EXECUTOR]++;
        break;
    case 1:
        shell->fail_job = KVP_EDEVICE;
        break;
    default:
        shell_jobs_run(shell, 1 + below(4));
        break;
    }
    for (unsigned i = below(6); i > 0; i--)
        shell_step(shell);
}

static void step_restart(void)
{
    struct kvp_session_id sessions[SESSIONS];
    unsigned n = 0;
    for (unsigned i = 0; i < SESSIONS; i++) {
        if (clients[i].open && !clients[i].lease)
            sessions[n++] = clients[i].caller.session;
    }
    memset(waiting, 0, sizeof(waiting));
    shell_restart(shell, sessions, n);
    for (unsigned i = 0; i < n_dead && i < 4096; i++)
        kvp_core_process_ended(shell->core, dead[i]);
    counts[DONE_RESTART]++;
}

static void step(void)
{
    uint32_t what = below(1000);
    if (what < 60)
        step_session();
    else if (what < 200)
        step_open();
    else if (what < 400)
        step_advance();
    else if (what < 560)
        step_append();
    else if (what < 640)
        step_fork();
    else if (what < 690)
        step_transfer();
    else if (what < 780)
        step_close();
    else if (what < 840)
        step_wrong();
    else if (what < 940)
        step_executor();
    else if (what < 995)
        shell_run_ms(shell, below(20));
    else
        step_restart();
    collect_waiting();
    check_lengths();
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

static void make_pool(void)
{
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    Kvpool__V1__Plane plane = KVPOOL__V1__PLANE__INIT, *planes[1] = {&plane};
    plane.component = KVPOOL__V1__COMPONENT__COMPONENT_CKV;
    plane.heads = 1;
    plane.dim = 8;
    plane.dtype = KVPOOL__V1__DTYPE__DTYPE_U8;
    spec.name = (char *)POOL;
    spec.pages = PAGES;
    spec.page_tokens = PAGE;
    spec.n_planes = 1;
    spec.planes = planes;
    spec.max_sequences = 40;
    spec.max_sequence_tokens = TOKENS_MAX;
    spec.page_digests = true;
    request.spec = &spec;
    ck_assert_int_eq(
        finish(shell_call(shell, shell_grpc(1000, 1), KVPOOL__V1__METHOD__METHOD_CREATE_POOL, &request.base)), KVP_OK);
}

/* No page's bytes are others than those that were sealed. @return pages that were looked at */
static uint64_t check_digests(void)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    request.digests = true;
    shell->fail_job = KVP_OK;
    struct shell_call *call = shell_call(shell, shell_grpc(1000, 1), KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base);
    const Kvpool__V1__AuditReply *reply = (const Kvpool__V1__AuditReply *)call->reply;
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    ck_assert_msg(reply->clean, "%s", reply->n_violations != 0 ? reply->violations[0] : "?");
    uint64_t checked = reply->pages_checked;
    shell_call_free(shell, call);
    return checked;
}

static void check_all(void)
{
    shell_audit(shell);
    for (unsigned i = 0; i < SEQUENCES; i++) {
        if (sequences[i].used)
            check_tokens(&sequences[i]);
    }
}

static void end_all(void)
{
    shell->hold_jobs = false;
    shell_jobs_run(shell, SHELL_JOBS_MAX);
    shell_run_ms(shell, 100);
    for (unsigned i = 0; i < SESSIONS; i++) {
        for (int k = 0; k < 3 && (clients[i].open || clients[i].eof); k++)
            end_client(i);
    }
    shell_run_ms(shell, 3700000);
    ck_assert_uint_eq(shell_free_pages(shell, POOL), PAGES);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_PROGRESS), 0);
    ck_assert_int_eq(shell_delete_pool(shell, shell_grpc(1000, 1), POOL), KVP_OK);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_SLAB), 0);
}

static uint64_t seed = 1;
static unsigned long steps = 6000;

START_TEST(the_core_and_a_naive_model_agree)
{
    rng = seed * 0x9e3779b97f4a7c15ull | 1;
    shell = shell_begin_sliced("host", 8);
    shell->hold_jobs = true;
    shell->config.audit_ms = 30; /* from the first restart on, again and again, of whatever is there */
    uint64_t digests = 0;
    make_pool();
    for (unsigned long i = 1; i <= steps; i++) {
        step();
        if (i % 100 == 0)
            check_all();
        if (i % 500 == 0)
            digests += check_digests();
    }
    end_all();
    unsigned audits = shell->audits;
    ck_assert_uint_gt(audits, 0);
    ck_assert_uint_gt(digests, 0);
    shell_end(shell);
    printf("%lu steps: %lu in place, %lu appends, %lu forks, %lu transfers, %lu closes, %lu wrong calls, "
           "%lu deaths, %lu executors killed, %lu restarts, %u audits, %llu pages compared\n",
           steps, counts[DONE_ADVANCE], counts[DONE_APPEND], counts[DONE_FORK], counts[DONE_TRANSFER],
           counts[DONE_CLOSE], counts[DONE_WRONG], counts[DONE_DEATH], counts[DONE_EXECUTOR], counts[DONE_RESTART],
           audits, (unsigned long long)digests);
}
END_TEST

int main(int argc, char **argv)
{
    if (argc > 1)
        seed = strtoull(argv[1], NULL, 10);
    if (argc > 2)
        steps = strtoul(argv[2], NULL, 10);
    printf("seed %llu, steps %lu\n", (unsigned long long)seed, steps);
    fflush(stdout);
    Suite *suite = suite_create("core_sim");
    TCase *t = tcase_create("sim");
    tcase_set_timeout(t, 0);
    tcase_add_test(t, the_core_and_a_naive_model_agree);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
