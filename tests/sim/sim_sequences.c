/**
 * Sequences of core_sim: what each says, how it is written, and the calls on it, wrong ones among them.
 */
#include "sim.h"

struct sequence sequences[SEQUENCES];
struct shell_call *waiting[WAITING_MAX];
static uint64_t next_key = 1;

enum kvp_status look(const struct sequence *s, struct kvp_seq_view *ret_view)
{
    return kvp_seq_get(&shell->ledger, pool_id(), (struct kvp_seq_id){(uint32_t)s->handle, (uint32_t)(s->handle >> 32)},
                       ret_view);
}

static const uint32_t *row_of(const struct sequence *s)
{
    return kvp_seq_row(&shell->ledger, pool_id(), (uint32_t)s->handle);
}

static unsigned tenant_of(const struct sequence *s)
{
    return clients[s->owner].tenant;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

/* The pool: one plane of one head of 8 bytes, NHD: token t of a page lies at (page · PAGE + t) · 8. */
static unsigned char *token_at(uint32_t page, uint32_t t)
{
    return shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, 0}) + ((uint64_t)page * PAGE + t) * 8;
}

uint64_t token_in(uint32_t page, uint32_t t)
{
    uint64_t bytes;
    memcpy(&bytes, token_at(page, t), sizeof(bytes));
    return bytes;
}

/* What the sequence says next. */
static uint64_t next_token(const struct sequence *s, uint32_t t)
{
    if (s->tells)
        return story_token(tenant_of(s), s->story, t);
    return (uint64_t)below(UINT32_MAX) << 32 | below(UINT32_MAX);
}

static void check_sequence(const struct sequence *s)
{
    struct kvp_seq_view view;
    ck_assert_int_eq(look(s, &view), KVP_OK);
    const uint32_t *row = row_of(s);
    for (uint32_t t = 0; t < s->written; t++) {
        uint32_t page = row[t / PAGE];
        if (view.copy.tokens != 0 && page == view.copy.destination)
            page = view.copy.source;
        MUST(token_in(page, t % PAGE) == s->token[t], "key %llu: token %u of %u is %#llx, must be %#llx",
             (unsigned long long)s->key, t, s->written, (unsigned long long)token_in(page, t % PAGE),
             (unsigned long long)s->token[t]);
    }
}

void check_tokens(void)
{
    for (unsigned i = 0; i < SEQUENCES; i++) {
        if (sequences[i].used)
            check_sequence(&sequences[i]);
    }
}

/* A worker writes in place: the copy that is owed, the tokens, then the word. */
static void write_in_place(struct sequence *s, uint32_t to)
{
    struct kvp_seq_view view;
    ck_assert_int_eq(look(s, &view), KVP_OK);
    const uint32_t *row = row_of(s);
    if (view.copy.tokens != 0)
        memcpy(token_at(view.copy.destination, 0), token_at(view.copy.source, 0), view.copy.tokens * 8);
    for (uint32_t t = s->written; t < to; t++) {
        s->token[t] = next_token(s, t);
        memcpy(token_at(row[t / PAGE], t % PAGE), &s->token[t], 8);
    }
    note_written(tenant_of(s), row, s->token, s->written, to);
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
    MUST(view.written == before || view.written == after, "%u tokens, neither %u nor %u", view.written, before, after);
    if (view.written > s->written) {
        check_zeroed(s);
        note_written(tenant_of(s), row_of(s), s->token, s->written, view.written);
    }
    s->written = view.written;
    s->busy_to = 0;
}

void check_lengths(void)
{
    for (unsigned i = 0; i < SEQUENCES; i++) {
        struct sequence *s = &sequences[i];
        struct kvp_seq_view view;
        if (!s->used)
            continue;
        if (look(s, &view) != KVP_OK) {
            MUST(!clients[s->owner].open, "an open sequence of a living session is gone");
            s->used = false;
            continue;
        }
        settle_busy(s);
        MUST(view.reserved == s->reserved, "key %llu: %u tokens reserved, must be %u", (unsigned long long)s->key,
             view.reserved, s->reserved);
        MUST(s->busy_to != 0 || view.written == s->written, "key %llu: %u tokens written, must be %u",
             (unsigned long long)s->key, view.written, s->written);
    }
}

void drop_sequences(unsigned owner)
{
    for (unsigned i = 0; i < SEQUENCES; i++) {
        if (sequences[i].used && sequences[i].owner == owner)
            sequences[i].used = false;
    }
}

/* ---- open -------------------------------------------------------------------------------------------------------- */

/* What an OpenSequences that succeeded made: with a story, the longest prefix of it that is known. */
static void take_opened(struct sequence *s, const Kvpool__V1__OpenSequencesReply *reply, uint32_t blocks)
{
    s->used = true;
    s->handle = reply->seqs[0];
    s->version = reply->versions[0];
    s->reserved = s->written = reply->written[0];
    s->named = s->written / PAGE;
    if (!s->tells) {
        MUST(s->written == 0, "a sequence that names no blocks begins with %u tokens", s->written);
        return;
    }
    uint32_t least = known_blocks(tenant_of(s), s->story, blocks);
    refresh_cache(); /* what ended while the call waited may have made more known */
    uint32_t most = known_blocks(tenant_of(s), s->story, blocks), taken = reply->cached[0] / PAGE;
    MUST(taken >= least && taken <= most && reply->cached[0] % PAGE == 0,
         "%u tokens are taken along, of %u to %u blocks that are known", reply->cached[0], least, most);
    MUST(s->written == taken * PAGE && reply->reserved[0] == taken * PAGE, "%u tokens, of which %u are written",
         reply->reserved[0], s->written);
    for (uint32_t t = 0; t < s->written; t++)
        s->token[t] = next_token(s, t);
    counts[DONE_HIT] += taken;
    check_sequence(s);
}

void step_open(void)
{
    struct client *c = any_client();
    struct sequence *s = free_sequence();
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    uint32_t blocks = 1 + below(ROW);
    if (c == NULL || s == NULL)
        return;
    *s = (struct sequence){.key = next_key++, .owner = (unsigned)(c - clients), .tells = below(4) != 0};
    s->story = any_story();
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_keys = 1;
    request.keys = &s->key;
    request.blocks = s->tells ? story_blocks(s->story, 0, blocks) : NULL;
    struct shell_call *call = CLIENT_CALL(c, OPEN_SEQUENCES, request);
    enum kvp_status status = call->status;
    if (status == KVP_OK)
        take_opened(s, (const Kvpool__V1__OpenSequencesReply *)call->reply, blocks);
    else
        ck_assert_int_eq(status, KVP_ELIMIT);
    shell_call_free(shell, call);
    if (status != KVP_OK || below(4) != 0)
        return;
    if (below(2) == 0)
        request.call_id = ++c->call_id; /* a key that is open, not a reply that was lost */
    call = CLIENT_CALL(c, OPEN_SEQUENCES, request);
    const Kvpool__V1__OpenSequencesReply *reply = (const Kvpool__V1__OpenSequencesReply *)call->reply;
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(reply->seqs[0], s->handle);
    ck_assert_uint_eq(reply->written[0], s->written);
    if (s->tells)
        ck_assert_uint_eq(reply->cached[0], s->written);
    shell_call_free(shell, call);
}

/* ---- advance ----------------------------------------------------------------------------------------------------- */

/* Name blocks of pages that so many tokens fill; some, or none. @return pages named then */
static uint32_t name_pages(const struct sequence *s, uint32_t reserved, Kvpool__V1__Blocks **ret_blocks)
{
    uint32_t named = s->named < reserved / PAGE ? s->named : reserved / PAGE, first = below(2) ? named : 0;
    uint32_t n = below(3) == 0 ? reserved / PAGE : first + below(reserved / PAGE - first + 1);
    *ret_blocks = NULL;
    if (!s->tells || n <= first || below(4) == 0)
        return named;
    *ret_blocks = story_blocks(s->story, first, n - first);
    return n > named ? n : named;
}

/* What is left of a sequence may go on as another story that begins so. */
static void cut(struct sequence *s, uint32_t reserved)
{
    unsigned other = below(STORIES);
    s->named = s->named < reserved / PAGE ? s->named : reserved / PAGE;
    for (uint32_t i = s->named; i < ROW; i++)
        s->known[i] = KNOWN_NOT;
    if (s->tells && story_shares(s->story.number, other) * PAGE >= reserved)
        s->story.number = other;
}

/* The same call again and again until no job of its fails. */
static struct shell_call *advance(struct client *c, const Kvpool__V1__AdvanceRequest *request)
{
    struct shell_call *call = CLIENT_CALL(c, ADVANCE, *request);
    while (call->status == KVP_EDEVICE) {
        shell_call_free(shell, call);
        call = CLIENT_CALL(c, ADVANCE, *request);
    }
    return call;
}

/* Room. @return false: there is none, or an Append is under way */
static bool make_room(struct sequence *s, struct client *c, Kvpool__V1__AdvanceRequest *request)
{
    uint32_t reserved = request->reserved[0];
    struct sequence after = *s;
    if (reserved < s->reserved)
        cut(&after, reserved);
    request->call_id = ++c->call_id;
    request->truncate = reserved < s->reserved;
    after.named = name_pages(&after, reserved, &request->blocks);
    note_actor(c->tenant);
    struct shell_call *call = advance(c, request);
    enum kvp_status status = call->status;
    settle_busy(s);
    if (status == KVP_ENOPAGES)
        ck_assert_uint_gt(shell_missing(call), 0);
    if (status == KVP_OK) {
        after.busy_to = s->busy_to;
        after.written = s->written < reserved ? s->written : reserved;
        after.reserved = reserved;
        after.version = ((const Kvpool__V1__AdvanceReply *)call->reply)->versions[0];
        *s = after;
        ck_assert_uint_eq(((const Kvpool__V1__AdvanceReply *)call->reply)->written[0], s->written);
        check_zeroed(s);
    } else {
        ck_assert_msg(status == KVP_ENOPAGES || status == KVP_ELIMIT || (status == KVP_EBUSY && s->busy_to != 0), "%s",
                      shell_error(call));
    }
    shell_call_free(shell, call);
    return status == KVP_OK;
}

/* Room, and tokens in place: by the word, or said in the call. */
void step_advance(void)
{
    struct sequence *s = any_sequence();
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    if (s == NULL)
        return;
    struct client *c = &clients[s->owner];
    uint32_t reserved = below(SEQ_TOKENS + 1), written;
    request.session = c->token;
    request.pool = (char *)POOL;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &s->handle;
    request.reserved = &reserved;
    if (!make_room(s, c, &request) || s->written == s->reserved || below(2) == 0)
        return;
    counts[DONE_ADVANCE]++;
    written = s->written + 1 + below(s->reserved - s->written);
    write_in_place(s, written);
    if (c->attached) {
        shell_progress(shell, c->attachment)[(uint32_t)s->handle] = KVP_PROGRESS_WORD(s->version, written);
    } else {
        uint32_t named = name_pages(s, reserved, &request.blocks);
        request.call_id = ++c->call_id;
        request.n_written = 1;
        request.written = &written;
        ck_assert_int_eq(finish(CLIENT_CALL(c, ADVANCE, request)), KVP_OK);
        s->named = named;
    }
    ck_assert_uint_eq(shell_length(shell, shell_grpc(1, 1), POOL, s->handle), written);
    s->written = written;
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

static void keep_waiting(struct shell_call *call)
{
    for (unsigned i = 0; i < WAITING_MAX; i++) {
        if (waiting[i] == NULL) {
            waiting[i] = call;
            return;
        }
    }
    shell_call_gone(shell, call);
}

/* Whether pages of the sequence are being zeroed: its room is there, its Append comes after that. */
static bool zeroing(const struct sequence *s)
{
    struct kvp_seq_view view;
    struct kvp_job_view job;
    return look(s, &view) == KVP_OK && view.job != KVP_NONE && kvp_job_at(&shell->ledger, view.job, &job) == KVP_OK &&
           job.spec.kind == KVPOOL__V1__JOB_KIND__JOB_ZERO;
}

/* An Append that has room and waits for zeroed pages: until it has them, or it is left to its fate, and the sequence. */
static void await_zeroed(struct sequence *s, struct shell_call *call)
{
    if (zeroing(s) && below(4) == 0)
        s->used = false;
    while (s->used && !call->answered && zeroing(s)) {
        if (!shell_step(shell))
            shell_jobs_run(shell, 1);
    }
}

void step_append(void)
{
    struct sequence *s = any_sequence();
    uint64_t values[SEQ_TOKENS];
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    if (s == NULL || s->written == SEQ_TOKENS)
        return;
    struct client *c = &clients[s->owner];
    uint32_t at = s->written, tokens = 1 + below(SEQ_TOKENS - s->written);
    bool was_busy = s->busy_to != 0;
    for (uint32_t t = 0; t < tokens; t++)
        values[t] = next_token(s, at + t);
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = &s->handle;
    request.at = &at;
    request.tokens = &tokens;
    request.inline_ = (ProtobufCBinaryData){tokens * 8, (uint8_t *)values};
    note_actor(c->tenant);
    struct shell_call *call = shell_send(shell, c->caller, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base, NULL);
    struct kvp_seq_view view;
    if (!was_busy)
        await_zeroed(s, call);
    if (!s->used) {
        if (c->lease)
            keep_waiting(call);
        else
            shell_call_gone(shell, call); /* a connection has one call at a time */
        return;
    }
    ck_assert_int_eq(look(s, &view), KVP_OK);
    if (call->answered && call->status == KVP_EDEVICE) {
        s->reserved = s->reserved > at + tokens ? s->reserved : at + tokens; /* what was to be zeroed is its room */
    } else if (call->answered ? call->status == KVP_OK : view.job != KVP_NONE && !was_busy) {
        counts[DONE_APPEND]++;
        s->busy_to = at + tokens;
        s->reserved = s->reserved > s->busy_to ? s->reserved : s->busy_to;
        memcpy(s->token + at, values, tokens * 8);
    }
    if (call->answered) {
        enum kvp_status status = call->status;
        ck_assert_msg(status == KVP_OK || status == KVP_ENOPAGES || status == KVP_EMISMATCH || status == KVP_EDEVICE ||
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

/* ---- fork, transfer, close --------------------------------------------------------------------------------------- */

/* Twice: the second finds it done. A child goes on as its parent's story does, or says what nobody else says. */
void step_fork(void)
{
    struct sequence *parent = any_sequence(), *s = free_sequence();
    struct client *c = any_client();
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    if (parent == NULL || s == NULL || c == NULL || parent->busy_to != 0)
        return;
    uint64_t key = next_key++;
    uint32_t tokens = below(parent->written + 1);
    bool may = c->tenant == tenant_of(parent);
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_parents = request.n_keys = request.n_tokens = 1;
    request.parents = &parent->handle;
    request.keys = &key;
    request.tokens = &tokens;
    note_actor(c->tenant);
    for (int repeat = 0; repeat < 2; repeat++) {
        struct shell_call *call = CLIENT_CALL(c, FORK, request);
        if (call->status == KVP_OK) {
            const Kvpool__V1__ForkReply *reply = (const Kvpool__V1__ForkReply *)call->reply;
            MUST(may, "a sequence of another tenant was forked");
            if (repeat)
                ck_assert_uint_eq(reply->seqs[0], s->handle);
            *s = (struct sequence){.used = true,
                                   .key = key,
                                   .owner = (unsigned)(c - clients),
                                   .handle = reply->seqs[0],
                                   .reserved = tokens,
                                   .written = tokens,
                                   .version = reply->versions[0],
                                   .tells = parent->tells && key % 4 != 0,
                                   .story = parent->story};
            memcpy(s->token, parent->token, tokens * 8);
            check_zeroed(s);
            counts[DONE_FORK]++;
        } else if (call->status == KVP_EDEVICE) {
            repeat--; /* a page was not zeroed: again */
        } else {
            MUST(!repeat && (call->status == KVP_ENOPAGES || call->status == KVP_ELIMIT ||
                             (call->status == KVP_EPERM && !may)),
                 "%s", shell_error(call));
            repeat = 2;
        }
        shell_call_free(shell, call);
    }
}

void step_transfer(void)
{
    struct sequence *s = any_sequence();
    unsigned n = below(SESSIONS);
    Kvpool__V1__TransferRequest request = KVPOOL__V1__TRANSFER_REQUEST__INIT;
    if (s == NULL || !clients[n].open)
        return;
    struct client *c = &clients[s->owner];
    bool may = clients[n].tenant == c->tenant;
    request.session = c->token;
    request.call_id = ++c->call_id;
    request.pool = (char *)POOL;
    request.n_seqs = 1;
    request.seqs = &s->handle;
    request.to = clients[n].id;
    struct shell_call *call = CLIENT_CALL(c, TRANSFER, request);
    settle_busy(s);
    if (call->status == KVP_OK) {
        MUST(may, "a sequence went to another tenant");
        counts[DONE_TRANSFER]++;
        s->owner = n;
        s->version = ((const Kvpool__V1__TransferReply *)call->reply)->versions[0];
    } else {
        ck_assert_msg(call->status == KVP_ENOENT || (call->status == KVP_EPERM && !may) ||
                          (call->status == KVP_EBUSY && s->busy_to != 0),
                      "%s", shell_error(call));
    }
    shell_call_free(shell, call);
}

void step_close(void)
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
    enum kvp_status status = finish(CLIENT_CALL(c, CLOSE_SEQUENCES, request));
    settle_busy(s);
    ck_assert(status == KVP_OK || (status == KVP_EBUSY && s->busy_to != 0));
    s->used = status != KVP_OK;
    counts[DONE_CLOSE] += status == KVP_OK;
}

/* Calls that must fail, and change nothing. */
void step_wrong(void)
{
    struct sequence *s = any_sequence();
    unsigned n = below(SESSIONS);
    if (s == NULL || !clients[n].open)
        return;
    counts[DONE_WRONG]++;
    uint64_t handle = s->handle;
    uint32_t reserved = below(SEQ_TOKENS), seven = 7;
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
        reserved = SEQ_TOKENS + 1 + below(1000);
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
    ck_assert_int_ne(finish(CLIENT_CALL(&clients[n], ADVANCE, request)), KVP_OK);
}
