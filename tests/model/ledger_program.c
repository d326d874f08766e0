/**
 * Random programs for the ledger: choosing operations, running them, reading what came of it; see ledger_naive.h.
 */
#include "ledger_naive.h"

#include "ledger_block.h"

#include <stdio.h>
#include <string.h>

uint32_t naive_random(uint64_t *rng, uint32_t below)
{
    *rng += 0x9e3779b97f4a7c15ull;
    uint64_t x = *rng;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (uint32_t)((x ^ x >> 31) >> 32) % below;
}

void naive_start(struct naive *naive, struct kvp_ledger *ledger, uint64_t *rng)
{
    memset(naive, 0, sizeof(*naive));
    naive->geometry = (struct kvp_pool_geometry){
        .pages = 4 + naive_random(rng, NAIVE_PAGES - 3),
        .page_tokens = 1 + naive_random(rng, 6),
        .reserved_pages = naive_random(rng, 3),
        .max_sequences = 2 + naive_random(rng, NAIVE_SEQS - 1),
        .row_pages = 1 + naive_random(rng, NAIVE_ROW),
        .page_digests = naive_random(rng, 2),
    };
    naive->needs_after = naive_random(rng, 2);
    naive->region_bytes = naive_random(rng, 64);
    naive->zero_on_reuse = naive_random(rng, 2);
    naive->adaptive = naive_random(rng, 2);
    struct kvp_pool_spec spec = {.geometry = naive->geometry,
                                 .needs_after = naive->needs_after,
                                 .policy = naive->adaptive ? KVP_POLICY_ADAPTIVE : KVP_POLICY_LRU,
                                 .zero_on_reuse = naive->zero_on_reuse,
                                 .name = "p",
                                 .region_bytes = naive->region_bytes};
    kvp_txn_begin(ledger);
    REQUIRE(kvp_pool_create(ledger, &spec, &naive->pool) == KVP_OK);
    kvp_txn_commit(ledger);
    naive_read(ledger, naive->pool, &naive->state);
}

/* ---- choosing ------------------------------------------------------------------------------------------------------
 */

/* One of the slots in which `words[slot * stride]` is wanted; any at all if there is none, or once in a while. */
static uint32_t pick(uint64_t *rng, const uint32_t *words, size_t stride, uint32_t n, uint32_t wanted)
{
    uint32_t first = naive_random(rng, n);
    if (naive_random(rng, 20) == 0)
        return first;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = (first + i) % n;
        if (words[slot * stride] == wanted)
            return slot;
    }
    return first;
}

#define PICK(rng, array, n, field, wanted)                                                                             \
    pick(rng, &(array)[0].field, sizeof((array)[0]) / sizeof(uint32_t), n, wanted)

static enum naive_kind choose_kind(uint64_t *rng)
{
    static const uint8_t weights[NAIVE_KINDS] = {
        [NAIVE_SESSION_OPEN] = 5, [NAIVE_SESSION_END] = 2, [NAIVE_ATTACH] = 6,       [NAIVE_DETACH] = 1,
        [NAIVE_OUTCOME] = 4,      [NAIVE_OPEN] = 12,       [NAIVE_RESERVE] = 26,     [NAIVE_OBSERVE] = 18,
        [NAIVE_PENDING] = 6,      [NAIVE_FORK] = 14,       [NAIVE_TRANSFER] = 5,     [NAIVE_CLOSE] = 8,
        [NAIVE_RETIRED] = 6,      [NAIVE_RECLAIM] = 8,     [NAIVE_RELEASE] = 4,      [NAIVE_JOB_OPEN] = 3,
        [NAIVE_JOB_ADD] = 5,      [NAIVE_JOB_CLOSE] = 4,   [NAIVE_OPEN_CACHED] = 10, [NAIVE_SET_KEYS] = 14,
        [NAIVE_PIN] = 4,          [NAIVE_UNPIN] = 3,       [NAIVE_EVICT] = 3,        [NAIVE_EVICT_PREFIX] = 2,
        [NAIVE_CLEANED] = 3,      [NAIVE_SHARE] = 1,       [NAIVE_REGION_MAKE] = 5,  [NAIVE_REGION_MAP] = 5,
        [NAIVE_REGION_UNMAP] = 4, [NAIVE_REGION_DROP] = 4, [NAIVE_MARK] = 10,        [NAIVE_DIGEST] = 8,
    };
    uint32_t total = 0;
    for (int kind = 0; kind < NAIVE_KINDS; kind++)
        total += weights[kind];
    uint32_t at = naive_random(rng, total);
    int kind = 0;
    while (at >= weights[kind])
        at -= weights[kind++];
    return (enum naive_kind)kind;
}

/* A story and a part of it; most often the one that the sequence tells, from where its keys end. */
static void choose_blocks(const struct naive *naive, struct naive_op *op, uint64_t *rng)
{
    const struct naive_seq *seq = &naive->state.seqs[op->seq.slot];
    op->story = naive_random(rng, 8) == 0 ? naive_random(rng, NAIVE_STORIES) : seq->key % NAIVE_STORIES;
    if (op->kind != NAIVE_SET_KEYS)
        op->story = naive_random(rng, NAIVE_STORIES);
    op->tenant = NAIVE_TENANT_ID + naive_random(rng, NAIVE_TENANTS);
    if (op->kind == NAIVE_EVICT && naive_random(rng, 2))
        op->tenant = KVP_NONE;
    op->page = naive_random(rng, naive->geometry.pages + 1);
    op->blocks = naive_random(rng, NAIVE_ROW + 1);
    op->keys_of = op->tenant;
    uint32_t owner = op->kind == NAIVE_SET_KEYS ? seq->attachment : op->attachment;
    bool asks = op->kind == NAIVE_SET_KEYS || op->kind == NAIVE_OPEN_CACHED;
    if (asks && owner < NAIVE_ATTACHMENTS && naive->state.attachments[owner].state != KVP_ATTACHMENT_FREE)
        op->keys_of = naive->state.tenants[naive_tenant_of(naive, owner)].id;
    if (naive_random(rng, 10) == 0)
        op->keys_of = NAIVE_TENANT_ID + naive_random(rng, NAIVE_TENANTS);
    if (op->kind == NAIVE_SET_KEYS) {
        uint32_t full = seq->reserved / naive->geometry.page_tokens;
        op->first = naive_random(rng, 4) == 0 ? naive_random(rng, NAIVE_ROW) : seq->keyed;
        op->blocks = naive_random(rng, full >= op->first ? full - op->first + 1 + (naive_random(rng, 10) == 0) : 2);
    }
    bool known = op->kind == NAIVE_PIN || op->kind == NAIVE_EVICT_PREFIX;
    if (known && naive_random(rng, 10) != 0 && op->tenant != KVP_NONE)
        op->blocks = naive_random(rng, naive->state.matches[op->tenant - NAIVE_TENANT_ID][op->story] + 1);
}

static struct naive_op choose_any(const struct naive *naive, uint64_t *rng)
{
    const struct naive_state *s = &naive->state;
    uint32_t limit = naive->geometry.row_pages * naive->geometry.page_tokens;
    struct naive_op op = {.kind = choose_kind(rng)};
    uint32_t session = PICK(rng, s->sessions, NAIVE_SESSIONS, state, KVP_SESSION_OPEN);
    uint32_t attachment_state = op.kind == NAIVE_RELEASE ? KVP_ATTACHMENT_DEAD : KVP_ATTACHMENT_LIVE;
    uint32_t seq_state = op.kind == NAIVE_RETIRED ? KVP_SEQ_RETIRING
                         : op.kind == NAIVE_UNPIN ? KVP_SEQ_PIN
                                                  : KVP_SEQ_OPEN;
    uint32_t seq = PICK(rng, s->seqs, naive->geometry.max_sequences, state, seq_state);
    uint32_t job = PICK(rng, s->jobs, NAIVE_JOBS, open, 1);
    uint32_t stale = naive_random(rng, 40) == 0;
    op.session = (struct kvp_session_id){session, s->sessions[session].generation + stale};
    op.session_kind = KVP_SESSION_SOCKET + naive_random(rng, 2);
    op.attachment = PICK(rng, s->attachments, NAIVE_ATTACHMENTS, state, attachment_state);
    op.seq = (struct kvp_seq_id){seq, s->seqs[seq].generation + stale};
    op.job = (struct kvp_job_id){job, s->jobs[job].generation + stale};
    op.key = naive_random(rng, 6);
    op.tokens = naive_random(rng, limit + 2);
    op.budget = naive_random(rng, 8);
    op.call = 1 + naive_random(rng, NAIVE_CALLS);
    op.flag = naive_random(rng, 2);
    choose_blocks(naive, &op, rng);
    bool sessions_full = s->sessions[PICK(rng, s->sessions, NAIVE_SESSIONS, state, KVP_SESSION_FREE)].state != 0;
    if (op.kind == NAIVE_SESSION_OPEN && sessions_full)
        op.kind = NAIVE_OUTCOME;
    if (op.kind == NAIVE_JOB_OPEN && s->jobs[PICK(rng, s->jobs, NAIVE_JOBS, open, 0)].open)
        op.kind = NAIVE_JOB_CLOSE;
    op.region = PICK(rng, s->regions, NAIVE_REGIONS * NAIVE_RANKS, used, 1);
    op.name = naive_random(rng, NAIVE_REGIONS);
    op.rank = naive_random(rng, NAIVE_RANKS);
    op.bytes = naive_random(rng, 20);
    op.align = 1u << naive_random(rng, 4);
    if (op.kind == NAIVE_ATTACH && naive_random(rng, 2))
        op.attachment = KVP_NONE;
    if (op.kind == NAIVE_FORK && s->seqs[seq].written != 0 && naive_random(rng, 10) != 0)
        op.tokens = naive_random(rng, s->seqs[seq].written + 1);
    if (op.kind == NAIVE_PENDING || op.kind == NAIVE_JOB_ADD)
        op.tokens = s->seqs[seq].written + naive_random(rng, s->seqs[seq].reserved - s->seqs[seq].written + 2);
    if (op.kind == NAIVE_RESERVE && naive_random(rng, 3) == 0)
        op.tokens = s->seqs[seq].written - naive_random(rng, s->seqs[seq].written < 4 ? s->seqs[seq].written + 1 : 4);
    if (op.kind == NAIVE_RESERVE)
        op.flag = naive_random(rng, 8) != 0;
    if (naive_random(rng, 4) < (naive->needs_after ? 3 : 1))
        op.after = (struct kvp_after){naive_random(rng, 4), 1 + naive_random(rng, 9)};
    return op;
}

struct naive_op naive_choose(const struct naive *naive, uint64_t *rng)
{
    struct naive_op op = choose_any(naive, rng);
    for (uint32_t tries = naive_random(rng, 6); tries > 0 && naive_expect(naive, &op) != KVP_OK; tries--)
        op = choose_any(naive, rng);
    return op;
}

/* ---- running -------------------------------------------------------------------------------------------------------
 */

static enum kvp_status run_session(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op)
{
    struct kvp_session_id made = {0};
    struct kvp_session_spec spec = {
        .kind = (enum kvp_session_kind)op->session_kind, .pid = 1, .tenant = op->tenant, .name = "n"};
    struct kvp_outcome outcome = {.call_id = op->call, .method = 3, .status = -1, .values = {op->tokens + 1, 2}};
    enum kvp_status status;
    switch (op->kind) {
    case NAIVE_SESSION_OPEN:
        status = kvp_session_open(ledger, &spec, &made);
        op->ret_slot = made.slot;
        return status;
    case NAIVE_SESSION_END:
        return kvp_session_end(ledger, op->session);
    case NAIVE_ATTACH:
        return kvp_attach(ledger, pool, op->session, op->attachment, &op->ret_slot);
    case NAIVE_DETACH:
        return kvp_detach(ledger, pool, op->attachment);
    case NAIVE_RELEASE:
        return kvp_attachment_release(ledger, pool, op->attachment, op->flag, op->budget, &op->ret_left);
    default:
        return kvp_outcome_put(ledger, op->session, &outcome);
    }
}

static enum kvp_status run_job(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op)
{
    struct kvp_job_spec spec = {.kind = 1, .pool = pool, .call_id = op->call};
    struct kvp_job_id made = {0};
    enum kvp_status status;
    switch (op->kind) {
    case NAIVE_JOB_OPEN:
        status = kvp_job_open(ledger, &spec, &made);
        op->ret_slot = made.slot;
        return status;
    case NAIVE_JOB_ADD:
        return kvp_job_add(ledger, op->job, op->seq, op->tokens);
    default:
        return kvp_job_close(ledger, op->job, op->flag);
    }
}

static enum kvp_status run_cache(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op)
{
    struct kvp_block_key keys[NAIVE_ROW + 2];
    struct kvp_seq_id made = {0};
    size_t blocks = 0;
    enum kvp_status status;
    naive_keys(op->keys_of, op->story, op->kind == NAIVE_SET_KEYS ? op->first : 0, op->blocks, keys);
    switch (op->kind) {
    case NAIVE_OPEN_CACHED:
        status = kvp_seq_open_cached(ledger, pool, op->attachment, op->key, op->flag, op->blocks, keys, &made, &blocks);
        break;
    case NAIVE_SET_KEYS:
        return kvp_seq_set_keys(ledger, pool, op->seq, op->first, op->blocks, keys, &blocks);
    case NAIVE_PIN:
        status = kvp_pin(ledger, pool, op->tenant, op->blocks, keys, 1 + op->budget, &made, &blocks);
        break;
    case NAIVE_UNPIN:
        return kvp_pin_end(ledger, pool, op->seq);
    case NAIVE_EVICT:
        return kvp_cache_evict(ledger, pool, op->tenant, op->budget, &op->ret_left, &op->ret_flag);
    case NAIVE_EVICT_PREFIX:
        return kvp_cache_evict_prefix(ledger, pool, op->tenant, op->blocks, keys, &op->ret_left);
    case NAIVE_CLEANED:
        return kvp_page_cleaned(ledger, pool, op->page);
    default:
        return kvp_tenant_set(ledger, pool, op->tenant, op->tokens, op->budget);
    }
    op->ret_slot = made.slot;
    op->ret_left = (uint32_t)blocks;
    return status;
}

static enum kvp_status run_region(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op)
{
    char name[] = {'r', (char)('0' + op->name), 0};
    struct kvp_region_spec spec = {name, op->rank, op->key, op->bytes, op->align};
    uint64_t missing;
    switch (op->kind) {
    case NAIVE_REGION_MAKE:
        return kvp_region_make(ledger, pool, &spec, &op->ret_slot, &missing);
    case NAIVE_REGION_MAP:
        return kvp_region_map(ledger, op->region, op->attachment);
    case NAIVE_REGION_UNMAP:
        return kvp_region_unmap(ledger, op->region, op->attachment);
    default:
        return kvp_region_drop(ledger, op->region);
    }
}

static enum kvp_status run_digest(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op)
{
    uint64_t digest = NAIVE_DIGEST_FIRST + op->tokens;
    if (op->kind == NAIVE_MARK)
        return kvp_digest_begin(ledger, pool, 1, &op->page, op->call);
    return kvp_digest_put(ledger, pool, 1, &op->page, op->call, &digest);
}

enum kvp_status naive_run(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op)
{
    if (op->kind >= NAIVE_OPEN_CACHED)
        return run_cache(ledger, pool, op);
    struct kvp_seq_id made = {0};
    enum kvp_status status;
    switch (op->kind) {
    case NAIVE_OPEN:
        status = kvp_seq_open(ledger, pool, op->attachment, op->key, op->flag, &made);
        op->ret_slot = made.slot;
        return status;
    case NAIVE_RESERVE:
        return kvp_seq_reserve(ledger, pool, op->seq, op->tokens, op->flag, op->after, &op->ret_short);
    case NAIVE_OBSERVE:
        return kvp_seq_observe(ledger, pool, op->seq, op->tokens, &op->ret_flag);
    case NAIVE_PENDING:
        return kvp_seq_set_pending(ledger, pool, op->seq, op->tokens, op->after);
    case NAIVE_FORK:
        status = kvp_seq_fork(ledger, pool, op->seq, op->attachment, op->key, op->tokens, &made, &op->ret_short);
        op->ret_slot = made.slot;
        return status;
    case NAIVE_TRANSFER:
        return kvp_seq_transfer(ledger, pool, op->seq, op->attachment);
    case NAIVE_CLOSE:
        return kvp_seq_close(ledger, pool, op->seq, op->after);
    case NAIVE_RETIRED:
        return kvp_seq_retired(ledger, pool, op->seq.slot);
    case NAIVE_RECLAIM:
        return kvp_pool_reclaim(ledger, pool, op->budget, &op->ret_flag);
    case NAIVE_JOB_OPEN:
    case NAIVE_JOB_ADD:
    case NAIVE_JOB_CLOSE:
        return run_job(ledger, pool, op);
    case NAIVE_REGION_MAKE:
    case NAIVE_REGION_MAP:
    case NAIVE_REGION_UNMAP:
    case NAIVE_REGION_DROP:
        return run_region(ledger, pool, op);
    case NAIVE_MARK:
    case NAIVE_DIGEST:
        return run_digest(ledger, pool, op);
    default:
        return run_session(ledger, pool, op);
    }
}

/* ---- reading -------------------------------------------------------------------------------------------------------
 */

static void read_sessions(const struct kvp_ledger *ledger, struct naive_state *state)
{
    for (uint32_t slot = 0; slot < NAIVE_SESSIONS; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(ledger, slot, &view) != KVP_OK)
            continue;
        struct naive_session *session = &state->sessions[slot];
        session->state = view.state;
        session->generation = view.id.generation;
        session->kind = view.spec.kind;
        session->attachments = view.attachments;
        session->tenant = view.spec.tenant;
        for (uint32_t call = 1; call <= NAIVE_CALLS; call++) {
            struct kvp_outcome outcome;
            if (kvp_outcome_get(ledger, view.id, call, &outcome) == KVP_OK)
                session->outcomes[call - 1] = (uint32_t)outcome.values[0];
        }
    }
}

static void read_attachments(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_state *state)
{
    for (uint32_t i = 0; i < NAIVE_ATTACHMENTS; i++) {
        struct kvp_attachment_view view;
        if (kvp_attachment_get(ledger, pool, i, &view) != KVP_OK)
            continue;
        uint32_t found;
        REQUIRE(kvp_attachment_of(ledger, pool, view.session, &found) == KVP_OK);
        REQUIRE(found == i);
        state->attachments[i] = (struct naive_attachment){view.state,  view.session.slot, view.session.generation,
                                                          view.leader, view.sequences,    view.nvml_seen};
        for (uint32_t slot = kvp_attachment_first(ledger, pool, i); slot != KVP_NONE;
             slot = kvp_attachment_next(ledger, pool, slot))
            state->seqs[slot].listed++;
    }
    for (uint32_t slot = kvp_retiring_first(ledger, pool); slot != KVP_NONE;
         slot = kvp_retiring_next(ledger, pool, slot))
        state->seqs[slot].listed++;
    for (uint32_t slot = kvp_pin_first(ledger, pool); slot != KVP_NONE; slot = kvp_pin_next(ledger, pool, slot))
        state->seqs[slot].listed++;
}

static void read_seq(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot, struct naive_seq *seq)
{
    struct kvp_seq_view view, open_view;
    struct kvp_pin_view pin;
    if (kvp_pin_at(ledger, pool, slot, &pin) == KVP_OK) {
        *seq = (struct naive_seq){.state = KVP_SEQ_PIN,
                                  .generation = pin.id.generation,
                                  .row_pages = pin.blocks,
                                  .value = pin.lease_ms,
                                  .listed = seq->listed};
        memcpy(seq->row, kvp_seq_row(ledger, pool, slot), pin.blocks * sizeof(uint32_t));
        return;
    }
    if (kvp_seq_at(ledger, pool, slot, &view) != KVP_OK)
        return;
    bool open = view.state == KVP_SEQ_OPEN;
    REQUIRE(kvp_seq_get(ledger, pool, view.id, &open_view) == (open ? KVP_OK : KVP_ESTALE));
    *seq = (struct naive_seq){
        .state = view.state,
        .generation = view.id.generation,
        .key = (uint32_t)view.key,
        .attachment = view.attachment,
        .durable = view.durable,
        .reserved = view.reserved,
        .written = view.written,
        .version = view.version,
        .row_pages = view.row_pages,
        .job = view.job,
        .job_tokens = view.job_tokens,
        .timeline = view.after.timeline,
        .value = (uint32_t)view.after.value,
        .pending = view.pending_tokens,
        .copy_source = view.copy.tokens ? view.copy.source : 0,
        .copy_destination = view.copy.tokens ? view.copy.destination : 0,
        .copy_tokens = view.copy.tokens,
        .listed = seq->listed,
        .keyed = view.keyed,
    };
    for (uint32_t i = 0; i < view.keyed; i++) {
        struct kvp_block_key key;
        REQUIRE(kvp_seq_block_key(ledger, pool, view.id, i, &key) == KVP_OK);
        seq->keys[i] = (uint32_t)key.word[1];
    }
    struct kvp_seq_id by_key;
    if (open && kvp_seq_by_key(ledger, pool, view.attachment, view.key, &by_key) == KVP_OK)
        seq->found_key = by_key.slot == slot && by_key.generation == view.id.generation;
    const uint32_t *row = kvp_seq_row(ledger, pool, slot);
    for (uint32_t i = 0; i < view.row_pages; i++)
        seq->row[i] = row[i];
}

static void read_jobs(const struct kvp_ledger *ledger, struct naive_state *state)
{
    for (uint32_t slot = 0; slot < NAIVE_JOBS; slot++) {
        struct kvp_job_view view, again;
        if (kvp_job_at(ledger, slot, &view) != KVP_OK)
            continue;
        REQUIRE(kvp_job_get(ledger, view.id, &again) == KVP_OK);
        struct naive_job *job = &state->jobs[slot];
        job->open = 1;
        job->generation = view.id.generation;
        for (uint32_t seq = kvp_job_first(ledger, view.id); seq != KVP_NONE; seq = kvp_job_next(ledger, view.id, seq))
            job->slots[job->sequences++] = seq;
    }
}

static void read_page(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page, struct naive_page *ret)
{
    struct kvp_page_view seen;
    struct kvp_cache_entry entry;
    REQUIRE(kvp_page_get(ledger, pool, page, &seen) == KVP_OK);
    *ret = (struct naive_page){
        .state = seen.state, .references = seen.references, .tenant = seen.tenant + 1, .dirty = seen.dirty};
    ret->digest = (uint32_t)kvp_digest_of(ledger, pool, page);
    if (kvp_cache_at(ledger, pool, page, &entry) != KVP_OK)
        return;
    REQUIRE(entry.page == page && entry.references == seen.references);
    ret->published = 1;
    ret->key = (uint32_t)entry.key.word[1];
    ret->parent = entry.parent + 1;
    ret->children = entry.children;
    ret->hits = entry.hits;
    ret->age = entry.age;
}

static void read_cache(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_state *state)
{
    for (uint32_t i = 0; i < NAIVE_TENANTS; i++) {
        struct kvp_tenant_view view;
        struct kvp_block_key keys[NAIVE_ROW];
        if (kvp_tenant_at(ledger, pool, i, &view) == KVP_OK)
            state->tenants[i] =
                (struct naive_tenant){view.id, view.pages, view.cached_pages, view.quota_pages, view.guaranteed_pages};
        for (uint32_t story = 0; story < NAIVE_STORIES; story++) {
            size_t blocks;
            naive_keys(NAIVE_TENANT_ID + i, story, 0, NAIVE_ROW, keys);
            REQUIRE(kvp_cache_match(ledger, pool, NAIVE_TENANT_ID + i, NAIVE_ROW, keys, &blocks, NULL) == KVP_OK);
            state->matches[i][story] = (uint32_t)blocks;
        }
    }
}

static void read_regions(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_state *state)
{
    for (uint32_t slot = 0; slot < NAIVE_REGIONS * NAIVE_RANKS; slot++) {
        struct kvp_region_view view;
        uint32_t found;
        if (kvp_region_get(ledger, slot, &view) != KVP_OK)
            continue;
        REQUIRE(kvp_region_find(ledger, pool, view.rank, view.name, &found) == KVP_OK);
        REQUIRE(found == slot);
        struct naive_region *region = &state->regions[slot];
        *region = (struct naive_region){.used = 1,
                                        .name = (uint32_t)(view.name[1] - '0'),
                                        .rank = view.rank,
                                        .tenant = view.tenant,
                                        .offset = (uint32_t)view.offset,
                                        .bytes = (uint32_t)view.bytes};
        for (uint32_t i = 0; i < NAIVE_ATTACHMENTS; i++)
            region->mapped |= (uint32_t)kvp_region_mapped_by(ledger, slot, i) << i;
        REQUIRE(view.mapped == (uint32_t)__builtin_popcount(region->mapped));
    }
    uint32_t slot = kvp_region_first(ledger, pool);
    for (uint32_t steps = 0; slot != KVP_NONE; slot = kvp_region_next(ledger, slot)) {
        REQUIRE(steps++ < NAIVE_REGIONS * NAIVE_RANKS);
        state->regions[slot].listed++;
    }
}

void naive_read(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_state *ret_state)
{
    struct kvp_pool_view view;
    REQUIRE(kvp_pool_get(ledger, pool, &view) == KVP_OK);
    memset(ret_state, 0, sizeof(*ret_state));
    ret_state->free_pages = view.free_pages;
    ret_state->open_sequences = view.open_sequences;
    ret_state->retiring_sequences = view.retiring_sequences;
    ret_state->attached = view.attachments;
    ret_state->n_regions = view.regions;
    read_sessions(ledger, ret_state);
    read_attachments(ledger, pool, ret_state);
    for (uint32_t slot = 0; slot < view.geometry.max_sequences; slot++)
        read_seq(ledger, pool, slot, &ret_state->seqs[slot]);
    for (uint32_t page = 0; page < view.geometry.pages; page++)
        read_page(ledger, pool, page, &ret_state->pages[page]);
    ret_state->cached = view.cache.cached_pages;
    ret_state->published = view.cache.published;
    ret_state->dirty = view.cache.dirty_pages;
    ret_state->pins = view.cache.pins;
    ret_state->lookups = (uint32_t)view.cache.lookup_blocks;
    ret_state->hits = (uint32_t)view.cache.hit_blocks;
    ret_state->evictions = (uint32_t)view.cache.evictions;
    read_cache(ledger, pool, ret_state);
    read_jobs(ledger, ret_state);
    read_regions(ledger, pool, ret_state);
}

bool naive_same(const struct naive_state *a, const struct naive_state *b, bool print)
{
    if (memcmp(a, b, sizeof(*a)) == 0)
        return true;
    const uint32_t *x = (const uint32_t *)a, *y = (const uint32_t *)b;
    for (size_t i = 0; print && i < sizeof(*a) / sizeof(uint32_t); i++) {
        if (x[i] == y[i])
            continue;
        size_t seq = (i * 4 - offsetof(struct naive_state, seqs)) / sizeof(struct naive_seq);
        printf("  states differ at word %zu: %u and %u", i, x[i], y[i]);
        if (i * 4 >= offsetof(struct naive_state, seqs) && seq < NAIVE_SEQS)
            printf(" (sequence %zu, word %zu)", seq,
                   i - (offsetof(struct naive_state, seqs) + seq * sizeof(struct naive_seq)) / 4);
        printf("\n");
    }
    return false;
}

/* ---- transactions ------------------------------------------------------------------------------------------------ */

struct naive_transaction naive_transact(struct naive *naive, struct kvp_ledger *ledger, uint32_t commits, uint64_t *rng)
{
    struct naive before = *naive;
    struct naive_transaction made = {.n = 1 + naive_random(rng, NAIVE_OPS_MAX),
                                     .aborts = naive_random(rng, 1 + commits) == 0};
    kvp_txn_begin(ledger);
    for (uint32_t i = 0; i < made.n; i++) {
        struct naive_state now;
        made.ops[i] = naive_choose(naive, rng);
        enum kvp_status status = naive_run(ledger, naive->pool, &made.ops[i]);
        ck_assert_int_eq(status, naive_expect(naive, &made.ops[i]));
        if (status != KVP_OK) {
            made.n = i + 1;
            made.aborts = true;
            break;
        }
        naive_read(ledger, naive->pool, &now);
        naive_apply(naive, &made.ops[i], &now);
    }
    if (made.aborts) {
        kvp_txn_abort(ledger);
        *naive = before;
    } else {
        kvp_txn_commit(ledger);
    }
    return made;
}

void naive_transact_again(struct kvp_ledger *ledger, struct kvp_pool_id pool,
                          const struct naive_transaction *transaction)
{
    kvp_txn_begin(ledger);
    for (uint32_t i = 0; i < transaction->n; i++) {
        struct naive_op op = transaction->ops[i];
        (void)naive_run(ledger, pool, &op);
    }
    if (transaction->aborts)
        kvp_txn_abort(ledger);
    else
        kvp_txn_commit(ledger);
}
