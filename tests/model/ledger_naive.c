/**
 * The naive ledger: what each operation should answer, and what it should do; see ledger_naive.h.
 */
#include "ledger_naive.h"

#include "ledger_block.h"

#include <string.h>

/* ---- what there is -------------------------------------------------------------------------------------------------
 */

static uint32_t pages_for(const struct naive *n, uint32_t tokens)
{
    return (tokens + n->geometry.page_tokens - 1) / n->geometry.page_tokens;
}

static bool session_is(const struct naive *n, struct kvp_session_id id)
{
    const struct naive_session *session = &n->state.sessions[id.slot];
    return session->state != KVP_SESSION_FREE && session->generation == id.generation && id.generation != 0;
}

static bool seq_is(const struct naive *n, struct kvp_seq_id id)
{
    const struct naive_seq *seq = &n->state.seqs[id.slot];
    return seq->state == KVP_SEQ_OPEN && seq->generation == id.generation;
}

static bool job_is(const struct naive *n, struct kvp_job_id id)
{
    return n->state.jobs[id.slot].open && n->state.jobs[id.slot].generation == id.generation;
}

static bool key_is(const struct naive *n, uint32_t attachment, uint32_t key)
{
    for (uint32_t i = 0; i < NAIVE_SEQS; i++) {
        const struct naive_seq *seq = &n->state.seqs[i];
        if (seq->state == KVP_SEQ_OPEN && seq->attachment == attachment && seq->key == key)
            return true;
    }
    return false;
}

bool naive_slot_left(const struct naive *n)
{
    for (uint32_t i = 0; i < n->geometry.max_sequences; i++) {
        if (n->state.seqs[i].state == KVP_SEQ_FREE)
            return true;
    }
    return false;
}

static uint32_t retiring_of(const struct naive *n, uint32_t attachment)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < NAIVE_SEQS; i++)
        found += n->state.seqs[i].state == KVP_SEQ_RETIRING && n->state.seqs[i].attachment == attachment;
    return found;
}

static enum kvp_status live_attachment(const struct naive *n, uint32_t attachment)
{
    uint32_t state = n->state.attachments[attachment].state;
    return state == KVP_ATTACHMENT_FREE ? KVP_ENOENT : state == KVP_ATTACHMENT_LIVE ? KVP_OK : KVP_ESESSION;
}

static bool changeable(const struct naive *n, const struct naive_seq *seq)
{
    return seq->job == KVP_NONE && n->state.attachments[seq->attachment].state == KVP_ATTACHMENT_LIVE;
}

/* ---- what should be answered ---------------------------------------------------------------------------------------
 */

static enum kvp_status expect_attach(const struct naive *n, const struct naive_op *op)
{
    if (!session_is(n, op->session) || n->state.sessions[op->session.slot].state != KVP_SESSION_OPEN)
        return KVP_ESESSION;
    if (n->state.sessions[op->session.slot].attachments != 0)
        return KVP_EEXIST;
    return op->attachment == KVP_NONE ? KVP_OK : live_attachment(n, op->attachment);
}

static enum kvp_status expect_detach(const struct naive *n, uint32_t attachment)
{
    enum kvp_status status = live_attachment(n, attachment);
    if (status != KVP_OK)
        return status;
    bool busy = n->state.attachments[attachment].sequences != 0 || retiring_of(n, attachment) != 0;
    for (uint32_t i = 0; i < NAIVE_ATTACHMENTS; i++)
        busy |= i != attachment && n->state.attachments[i].state != KVP_ATTACHMENT_FREE &&
                n->state.attachments[i].leader == attachment;
    return busy ? KVP_EBUSY : KVP_OK;
}

/* Whether a cut in the middle of that page takes a fresh one. */
static bool cut_copies(const struct naive *n, const struct naive_seq *seq, uint32_t reserved)
{
    if (reserved % n->geometry.page_tokens == 0)
        return false;
    uint32_t page = seq->row[reserved / n->geometry.page_tokens];
    return n->sealed[page] || n->state.pages[page].references > 1;
}

/* Give up the pages of a row from `keep` on, and the source of a copy that is owed there. @return that page + 1, or 0 */
static uint32_t drop_pages(struct naive_seq *seq, uint32_t keep, uint32_t page_tokens)
{
    uint32_t source = 0;
    if (seq->copy_tokens != 0 && seq->written / page_tokens >= keep) {
        source = seq->copy_source + 1;
        seq->copy_source = seq->copy_destination = seq->copy_tokens = 0;
    }
    for (uint32_t i = keep; i < seq->row_pages; i++)
        seq->row[i] = 0;
    seq->row_pages = keep;
    return source;
}

static enum kvp_status expect_cut(const struct naive *n, const struct naive_seq *seq, const struct naive_op *op)
{
    uint32_t keep = pages_for(n, op->tokens);
    bool cuts = keep < seq->row_pages;
    if (cuts && n->needs_after && op->after.value == 0)
        return KVP_EINVAL;
    if (cuts && op->after.value != 0 && !naive_slot_left(n))
        return KVP_ELIMIT;
    if (!cut_copies(n, seq, op->tokens))
        return KVP_OK;
    struct naive after = *n;
    uint32_t missing;
    if (op->after.value == 0) {
        drop_pages(&after.state.seqs[op->seq.slot], keep, n->geometry.page_tokens);
        naive_settle(&after);
    }
    return naive_room(&after, naive_tenant_of(n, seq->attachment), 1, &missing);
}

static enum kvp_status expect_reserve(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (!seq_is(n, op->seq))
        return KVP_ESTALE;
    if (op->tokens > n->geometry.row_pages * n->geometry.page_tokens)
        return KVP_EINVAL;
    if (op->tokens == seq->reserved)
        return KVP_OK;
    if (op->tokens < seq->reserved && !op->flag)
        return KVP_EINVAL;
    if (!changeable(n, seq))
        return KVP_EBUSY;
    if (op->tokens < seq->reserved)
        return expect_cut(n, seq, op);
    uint32_t missing;
    return naive_room(n, naive_tenant_of(n, seq->attachment), pages_for(n, op->tokens) - seq->row_pages, &missing);
}

enum kvp_status naive_expect_open(const struct naive *n, const struct naive_op *op)
{
    enum kvp_status status = live_attachment(n, op->attachment);
    if (status != KVP_OK)
        return status;
    if (key_is(n, op->attachment, op->key))
        return KVP_EEXIST;
    return naive_slot_left(n) ? KVP_OK : KVP_ELIMIT;
}

static enum kvp_status expect_fork(const struct naive *n, const struct naive_op *op)
{
    if (!seq_is(n, op->seq))
        return KVP_ESTALE;
    enum kvp_status status = live_attachment(n, op->attachment);
    if (status != KVP_OK)
        return status;
    if (op->tokens > n->state.seqs[op->seq.slot].written)
        return KVP_EINVAL;
    status = naive_expect_open(n, op);
    if (status != KVP_OK)
        return status;
    uint32_t missing;
    bool part = op->tokens % n->geometry.page_tokens != 0;
    return part ? naive_room(n, naive_tenant_of(n, op->attachment), 1, &missing) : KVP_OK;
}

static enum kvp_status expect_pending(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (!seq_is(n, op->seq))
        return KVP_ESTALE;
    if (op->after.value == 0 || op->tokens > seq->reserved)
        return KVP_EINVAL;
    return changeable(n, seq) ? KVP_OK : KVP_EBUSY;
}

static enum kvp_status expect_transfer(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (!seq_is(n, op->seq))
        return KVP_ESTALE;
    enum kvp_status status = live_attachment(n, op->attachment);
    if (status != KVP_OK || seq->attachment == op->attachment)
        return status;
    if (seq->job != KVP_NONE)
        return KVP_EBUSY;
    return key_is(n, op->attachment, seq->key) ? KVP_EEXIST : KVP_OK;
}

static enum kvp_status expect_close(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (!seq_is(n, op->seq))
        return KVP_ESTALE;
    if (n->needs_after && op->after.value == 0 && seq->row_pages != 0)
        return KVP_EINVAL;
    return changeable(n, seq) ? KVP_OK : KVP_EBUSY;
}

static enum kvp_status expect_job_add(const struct naive *n, const struct naive_op *op)
{
    const struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (!job_is(n, op->job))
        return KVP_ENOENT;
    if (!seq_is(n, op->seq))
        return KVP_ESTALE;
    if (!changeable(n, seq))
        return KVP_EBUSY;
    return op->tokens < seq->written || op->tokens > seq->reserved ? KVP_EINVAL : KVP_OK;
}

/* The first place of a rank's room with so many bytes free; KVP_NONE: there is none. */
static uint32_t place_of(const struct naive *n, const struct naive_op *op)
{
    for (uint32_t at = 0; at + op->bytes <= n->region_bytes; at += op->align) {
        bool free = true;
        for (uint32_t i = 0; i < NAIVE_REGIONS * NAIVE_RANKS && free; i++) {
            const struct naive_region *region = &n->state.regions[i];
            free = !region->used || region->rank != op->rank || region->offset + region->bytes <= at ||
                   at + op->bytes <= region->offset;
        }
        if (free)
            return at;
    }
    return KVP_NONE;
}

static enum kvp_status expect_region(const struct naive *n, const struct naive_op *op)
{
    const struct naive_region *region = &n->state.regions[op->region];
    if (op->kind == NAIVE_REGION_MAKE) {
        if (op->bytes == 0)
            return KVP_EINVAL;
        for (uint32_t i = 0; i < NAIVE_REGIONS * NAIVE_RANKS; i++) {
            const struct naive_region *other = &n->state.regions[i];
            if (other->used && other->rank == op->rank && other->name == op->name)
                return KVP_EEXIST;
        }
        return place_of(n, op) == KVP_NONE ? KVP_ELIMIT : KVP_OK;
    }
    if (!region->used)
        return KVP_ENOENT;
    if (op->kind == NAIVE_REGION_MAP)
        return live_attachment(n, op->attachment);
    if (op->kind == NAIVE_REGION_UNMAP)
        return n->state.attachments[op->attachment].state == KVP_ATTACHMENT_FREE ? KVP_ENOENT : KVP_OK;
    return region->mapped != 0 ? KVP_EBUSY : KVP_OK;
}

enum kvp_status naive_expect(const struct naive *naive, const struct naive_op *op)
{
    uint32_t attachment_state = op->attachment == KVP_NONE ? 0 : naive->state.attachments[op->attachment].state;
    switch (op->kind) {
    case NAIVE_SESSION_END:
    case NAIVE_OUTCOME:
        return session_is(naive, op->session) ? KVP_OK : KVP_ESESSION;
    case NAIVE_ATTACH:
        return expect_attach(naive, op);
    case NAIVE_DETACH:
        return expect_detach(naive, op->attachment);
    case NAIVE_OPEN:
        return naive_expect_open(naive, op);
    case NAIVE_RESERVE:
        return expect_reserve(naive, op);
    case NAIVE_OBSERVE:
        return seq_is(naive, op->seq) ? KVP_OK : KVP_ESTALE;
    case NAIVE_PENDING:
        return expect_pending(naive, op);
    case NAIVE_FORK:
        return expect_fork(naive, op);
    case NAIVE_TRANSFER:
        return expect_transfer(naive, op);
    case NAIVE_CLOSE:
        return expect_close(naive, op);
    case NAIVE_RETIRED:
        return naive->state.seqs[op->seq.slot].state == KVP_SEQ_RETIRING ? KVP_OK : KVP_ENOENT;
    case NAIVE_RELEASE:
        return attachment_state == KVP_ATTACHMENT_FREE   ? KVP_ENOENT
               : attachment_state == KVP_ATTACHMENT_LIVE ? KVP_EBUSY
                                                         : KVP_OK;
    case NAIVE_JOB_ADD:
        return expect_job_add(naive, op);
    case NAIVE_JOB_CLOSE:
        return job_is(naive, op->job) ? KVP_OK : KVP_ENOENT;
    case NAIVE_REGION_MAKE:
    case NAIVE_REGION_MAP:
    case NAIVE_REGION_UNMAP:
    case NAIVE_REGION_DROP:
        return expect_region(naive, op);
    case NAIVE_MARK:
        if (!naive->geometry.page_digests)
            return KVP_ENOENT;
        return op->page < naive->geometry.pages && naive->sealed[op->page] &&
                       naive->state.pages[op->page].digest < NAIVE_DIGEST_FIRST
                   ? KVP_OK
                   : KVP_EINVAL;
    case NAIVE_DIGEST:
        return naive->geometry.page_digests ? KVP_OK : KVP_ENOENT;
    case NAIVE_SESSION_OPEN:
    case NAIVE_RECLAIM:
    case NAIVE_JOB_OPEN:
        return KVP_OK;
    default:
        return naive_expect_cache(naive, op);
    }
}

/* ---- what should happen --------------------------------------------------------------------------------------------
 */

/* Count every reference again, and what follows from that. */
void naive_settle(struct naive *n)
{
    struct naive_state *s = &n->state;
    s->free_pages = s->open_sequences = s->retiring_sequences = s->n_regions = 0;
    for (uint32_t i = 0; i < NAIVE_REGIONS * NAIVE_RANKS; i++)
        s->n_regions += s->regions[i].used;
    uint32_t before[NAIVE_PAGES];
    for (uint32_t page = 0; page < NAIVE_PAGES; page++) {
        before[page] = s->pages[page].references;
        s->pages[page].references = 0;
    }
    for (uint32_t i = 0; i < NAIVE_ATTACHMENTS; i++)
        s->attachments[i].sequences = 0;
    for (uint32_t slot = 0; slot < NAIVE_SEQS; slot++) {
        struct naive_seq *seq = &s->seqs[slot];
        for (uint32_t i = 0; i < seq->row_pages; i++)
            s->pages[seq->row[i]].references++;
        if (seq->copy_tokens != 0)
            s->pages[seq->copy_source].references++;
        if (n->held[slot] != 0)
            s->pages[n->held[slot] - 1].references++;
        s->open_sequences += seq->state == KVP_SEQ_OPEN;
        s->retiring_sequences += seq->state == KVP_SEQ_RETIRING || seq->state == KVP_SEQ_RECLAIM;
        if (seq->state == KVP_SEQ_OPEN)
            s->attachments[seq->attachment].sequences++;
        seq->listed = seq->state == KVP_SEQ_OPEN || seq->state == KVP_SEQ_RETIRING || seq->state == KVP_SEQ_PIN;
        seq->found_key = seq->state == KVP_SEQ_OPEN;
    }
    naive_settle_cache(n, before);
}

/* Take over ids [first, row_pages) of a row: each was free, and stands there once. */
static void adopt_pages(struct naive *n, uint32_t slot, uint32_t first, const struct naive_state *now)
{
    struct naive_seq *seq = &n->state.seqs[slot];
    uint32_t tenant = naive_tenant_of(n, seq->attachment);
    naive_make_room(n, tenant, seq->row_pages - first, now);
    for (uint32_t i = first; i < seq->row_pages; i++) {
        uint32_t page = now->seqs[slot].row[i];
        REQUIRE(page < n->geometry.pages);
        REQUIRE(page >= n->geometry.reserved_pages);
        REQUIRE(n->state.pages[page].references == 0);
        for (uint32_t j = first; j < i; j++)
            REQUIRE(seq->row[j] != page);
        REQUIRE(!n->state.pages[page].published);
        naive_taken(n, page, tenant);
        seq->row[i] = page;
    }
}

struct naive_seq *naive_take(struct naive *n, uint32_t slot)
{
    REQUIRE(slot < n->geometry.max_sequences);
    struct naive_seq *seq = &n->state.seqs[slot];
    REQUIRE(seq->state == KVP_SEQ_FREE);
    *seq =
        (struct naive_seq){.generation = ++n->seq_generations[slot], .version = n->seq_versions[slot], .job = KVP_NONE};
    return seq;
}

struct naive_seq *naive_open(struct naive *n, const struct naive_op *op)
{
    struct naive_seq *seq = naive_take(n, op->ret_slot);
    seq->version = n->seq_versions[op->ret_slot] += 2;
    seq->state = KVP_SEQ_OPEN;
    seq->key = op->key;
    seq->attachment = op->attachment;
    return seq;
}

static void give_up(struct naive *n, uint32_t slot, uint32_t attachment, struct kvp_after after)
{
    struct naive_seq *seq = &n->state.seqs[slot];
    if (seq->copy_tokens != 0)
        n->held[slot] = seq->copy_source + 1;
    seq->state = after.value != 0 ? KVP_SEQ_RETIRING : KVP_SEQ_RECLAIM;
    seq->attachment = after.value != 0 ? attachment : KVP_NONE;
    seq->timeline = after.timeline;
    seq->value = (uint32_t)after.value;
    seq->reserved = seq->written = seq->pending = seq->keyed = 0;
    memset(seq->keys, 0, sizeof(seq->keys));
    seq->copy_source = seq->copy_destination = seq->copy_tokens = 0;
}

static void end_copy(struct naive_seq *seq)
{
    seq->copy_source = seq->copy_destination = seq->copy_tokens = 0;
}

static void end_pending(struct naive_seq *seq)
{
    seq->pending = seq->timeline = seq->value = 0;
}

static void apply_cut(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    uint32_t keep = pages_for(n, op->tokens), full = op->tokens / n->geometry.page_tokens;
    bool copies = cut_copies(n, seq, op->tokens);
    uint32_t row[NAIVE_ROW], row_pages = seq->row_pages;
    memcpy(row, seq->row, sizeof(row));
    uint32_t source = drop_pages(seq, keep, n->geometry.page_tokens);
    if (keep < row_pages && op->after.value != 0) {
        uint32_t slot = 0;
        while (n->state.seqs[slot].state != KVP_SEQ_FREE || now->seqs[slot].state == KVP_SEQ_FREE)
            slot++;
        struct naive_seq *ghost = naive_take(n, slot);
        ghost->row_pages = row_pages - keep;
        for (uint32_t i = 0; i < ghost->row_pages; i++)
            ghost->row[i] = row[keep + i];
        give_up(n, slot, seq->attachment, op->after);
        n->held[slot] = source;
    }
    if (!copies && full < keep)
        n->keys[seq->row[full]] = 0;
    seq->keyed = seq->keyed < full ? seq->keyed : full;
    for (uint32_t i = seq->keyed; i < NAIVE_ROW; i++)
        seq->keys[i] = 0;
    seq->reserved = op->tokens;
    seq->written = seq->written < op->tokens ? seq->written : op->tokens;
    seq->version = n->seq_versions[op->seq.slot] += 2;
    if (seq->pending > seq->reserved)
        end_pending(seq);
    if (copies) {
        naive_settle(n);
        uint32_t page = seq->row[keep - 1];
        adopt_pages(n, op->seq.slot, keep - 1, now);
        seq->copy_source = page;
        seq->copy_destination = seq->row[keep - 1];
    }
    if (copies || seq->copy_tokens != 0)
        seq->copy_tokens = seq->written % n->geometry.page_tokens;
}

static void apply_reserve(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    if (op->tokens < seq->reserved) {
        apply_cut(n, op, now);
        return;
    }
    uint32_t first = seq->row_pages;
    seq->reserved = op->tokens;
    seq->row_pages = pages_for(n, op->tokens);
    adopt_pages(n, op->seq.slot, first, now);
}

static bool apply_observe(struct naive *n, uint32_t slot, uint32_t tokens)
{
    struct naive_seq *seq = &n->state.seqs[slot];
    tokens = tokens < seq->reserved ? tokens : seq->reserved;
    if (tokens <= seq->written)
        return false;
    seq->written = tokens;
    for (uint32_t i = 0; i < tokens / n->geometry.page_tokens; i++)
        naive_seal(n, seq, i);
    end_copy(seq);
    if (seq->pending != 0 && seq->pending <= tokens)
        end_pending(seq);
    return true;
}

static void apply_fork(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    const struct naive_seq *parent = &n->state.seqs[op->seq.slot];
    struct naive_seq *child = naive_open(n, op);
    child->durable = parent->durable && parent->attachment == child->attachment;
    uint32_t full = op->tokens / n->geometry.page_tokens;
    child->reserved = child->written = op->tokens;
    child->row_pages = pages_for(n, op->tokens);
    for (uint32_t i = 0; i < full; i++)
        child->row[i] = parent->row[i];
    child->keyed = parent->keyed < full ? parent->keyed : full;
    for (uint32_t i = 0; i < child->keyed; i++)
        child->keys[i] = parent->keys[i];
    adopt_pages(n, op->ret_slot, full, now);
    if (full == child->row_pages)
        return;
    child->copy_tokens = op->tokens % n->geometry.page_tokens;
    child->copy_destination = child->row[full];
    child->copy_source = parent->row[full];
    if (parent->copy_tokens != 0 && parent->copy_destination == parent->row[full])
        child->copy_source = parent->copy_source;
}

static void apply_pending(struct naive *n, const struct naive_op *op)
{
    struct naive_seq *seq = &n->state.seqs[op->seq.slot];
    end_pending(seq);
    if (op->tokens <= seq->written)
        return;
    seq->pending = op->tokens;
    seq->timeline = op->after.timeline;
    seq->value = (uint32_t)op->after.value;
}

/* Which rows come first is the allocator's choice; how much goes is not. */
static void apply_reclaim(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    uint32_t spent = 0, left = 0;
    for (uint32_t slot = 0; slot < n->geometry.max_sequences; slot++) {
        struct naive_seq *seq = &n->state.seqs[slot];
        if (seq->state != KVP_SEQ_RECLAIM)
            continue;
        uint32_t keep = now->seqs[slot].row_pages;
        REQUIRE(keep <= seq->row_pages);
        spent += seq->row_pages - keep;
        if (now->seqs[slot].state == KVP_SEQ_FREE) {
            spent += seq->row_pages == 0;
            memset(seq, 0, sizeof(*seq));
            n->held[slot] = 0;
            continue;
        }
        left++;
        for (uint32_t i = keep; i < seq->row_pages; i++)
            seq->row[i] = 0;
        seq->row_pages = keep;
    }
    REQUIRE(spent <= op->budget);
    REQUIRE(op->ret_flag == (left != 0));
    if (left != 0)
        REQUIRE(spent == op->budget);
}

static void free_attachment(struct naive *n, uint32_t attachment)
{
    struct naive_attachment *gone = &n->state.attachments[attachment];
    struct naive_session *session = &n->state.sessions[gone->session_slot];
    for (uint32_t i = 0; i < NAIVE_ATTACHMENTS; i++) {
        if (n->state.attachments[i].state != KVP_ATTACHMENT_FREE && n->state.attachments[i].leader == attachment)
            n->state.attachments[i].leader = i;
    }
    session->attachments--;
    if (session->state == KVP_SESSION_ENDING)
        memset(session, 0, sizeof(*session));
    for (uint32_t i = 0; i < NAIVE_REGIONS * NAIVE_RANKS; i++)
        n->state.regions[i].mapped &= ~(1u << attachment);
    memset(gone, 0, sizeof(*gone));
    n->state.attached--;
}

static void apply_release(struct naive *n, const struct naive_op *op, const struct naive_state *now)
{
    uint32_t spent = 0, left = 0, stuck = 0;
    for (uint32_t slot = 0; slot < n->geometry.max_sequences; slot++) {
        struct naive_seq *seq = &n->state.seqs[slot];
        bool mine = seq->attachment == op->attachment;
        bool goes =
            mine && ((seq->state == KVP_SEQ_OPEN && (op->flag || !seq->durable)) || seq->state == KVP_SEQ_RETIRING);
        if (!goes)
            continue;
        if (now->seqs[slot].state != KVP_SEQ_RECLAIM) {
            left++;
            stuck += seq->job != KVP_NONE;
            continue;
        }
        REQUIRE(seq->job == KVP_NONE);
        spent++;
        if (seq->state == KVP_SEQ_OPEN)
            give_up(n, slot, 0, (struct kvp_after){0});
        seq->state = KVP_SEQ_RECLAIM;
        seq->attachment = KVP_NONE;
    }
    REQUIRE(spent <= op->budget);
    if (left > stuck)
        REQUIRE(spent == op->budget);
    REQUIRE(op->ret_left == left);
    naive_settle(n);
    if (n->state.attachments[op->attachment].sequences == 0 && retiring_of(n, op->attachment) == 0)
        free_attachment(n, op->attachment);
}

static void apply_session(struct naive *n, const struct naive_op *op)
{
    uint32_t slot = op->kind == NAIVE_SESSION_OPEN ? op->ret_slot : op->session.slot;
    struct naive_session *session = &n->state.sessions[slot];
    if (op->kind == NAIVE_OUTCOME) {
        if (session->kind == KVP_SESSION_SOCKET)
            memset(session->outcomes, 0, sizeof(session->outcomes));
        session->outcomes[op->call - 1] = op->tokens + 1;
        return;
    }
    if (op->kind == NAIVE_SESSION_OPEN) {
        REQUIRE(session->state == KVP_SESSION_FREE);
        *session = (struct naive_session){.state = KVP_SESSION_OPEN,
                                          .generation = ++n->session_generations[slot],
                                          .kind = op->session_kind,
                                          .tenant = op->tenant};
        return;
    }
    if (session->attachments == 0) {
        memset(session, 0, sizeof(*session));
        return;
    }
    session->state = KVP_SESSION_ENDING;
    for (uint32_t i = 0; i < NAIVE_ATTACHMENTS; i++) {
        if (n->state.attachments[i].state != KVP_ATTACHMENT_FREE && n->state.attachments[i].session_slot == slot)
            n->state.attachments[i].state = KVP_ATTACHMENT_DEAD;
    }
}

static void apply_attach(struct naive *n, const struct naive_op *op)
{
    struct naive_attachment *made = &n->state.attachments[op->ret_slot];
    REQUIRE(op->ret_slot < NAIVE_ATTACHMENTS);
    REQUIRE(made->state == KVP_ATTACHMENT_FREE);
    uint32_t leader = op->attachment == KVP_NONE ? op->ret_slot : n->state.attachments[op->attachment].leader;
    *made = (struct naive_attachment){KVP_ATTACHMENT_LIVE, op->session.slot, op->session.generation, leader, 0, 0};
    naive_tenant_place(n, n->state.sessions[op->session.slot].tenant);
    n->state.sessions[op->session.slot].attachments++;
    n->state.attached++;
}

static void apply_job(struct naive *n, const struct naive_op *op)
{
    uint32_t slot = op->kind == NAIVE_JOB_OPEN ? op->ret_slot : op->job.slot;
    struct naive_job *job = &n->state.jobs[slot];
    if (op->kind == NAIVE_JOB_OPEN) {
        REQUIRE(job->open == 0);
        *job = (struct naive_job){.open = 1, .generation = ++n->job_generations[slot]};
        return;
    }
    if (op->kind == NAIVE_JOB_ADD) {
        job->slots[job->sequences++] = op->seq.slot;
        n->state.seqs[op->seq.slot].job = slot;
        n->state.seqs[op->seq.slot].job_tokens = op->tokens;
        return;
    }
    for (uint32_t i = 0; i < job->sequences; i++) {
        struct naive_seq *seq = &n->state.seqs[job->slots[i]];
        if (op->flag)
            apply_observe(n, job->slots[i], seq->job_tokens);
        seq->job = KVP_NONE;
        seq->job_tokens = 0;
    }
    memset(job, 0, sizeof(*job));
}

static void apply_region(struct naive *n, const struct naive_op *op)
{
    struct naive_region *region = &n->state.regions[op->kind == NAIVE_REGION_MAKE ? op->ret_slot : op->region];
    switch (op->kind) {
    case NAIVE_REGION_MAKE:
        REQUIRE(op->ret_slot < NAIVE_REGIONS * NAIVE_RANKS);
        REQUIRE(!region->used);
        *region = (struct naive_region){.used = 1,
                                        .name = op->name,
                                        .rank = op->rank,
                                        .tenant = op->key,
                                        .offset = place_of(n, op),
                                        .bytes = op->bytes,
                                        .listed = 1};
        break;
    case NAIVE_REGION_MAP:
        region->mapped |= 1u << op->attachment;
        break;
    case NAIVE_REGION_UNMAP:
        region->mapped &= ~(1u << op->attachment);
        break;
    default:
        memset(region, 0, sizeof(*region));
    }
}

void naive_apply(struct naive *naive, const struct naive_op *op, const struct naive_state *now)
{
    struct naive_seq *seq = &naive->state.seqs[op->seq.slot];
    switch (op->kind) {
    case NAIVE_ATTACH:
        apply_attach(naive, op);
        break;
    case NAIVE_DETACH:
        free_attachment(naive, op->attachment);
        break;
    case NAIVE_OPEN:
        naive_open(naive, op)->durable = op->flag;
        break;
    case NAIVE_RESERVE:
        apply_reserve(naive, op, now);
        break;
    case NAIVE_OBSERVE:
        REQUIRE(apply_observe(naive, op->seq.slot, op->tokens) == op->ret_flag);
        break;
    case NAIVE_PENDING:
        apply_pending(naive, op);
        break;
    case NAIVE_FORK:
        apply_fork(naive, op, now);
        break;
    case NAIVE_TRANSFER:
        if (seq->attachment != op->attachment)
            seq->version = naive->seq_versions[op->seq.slot] += 2;
        seq->attachment = op->attachment;
        break;
    case NAIVE_CLOSE:
        give_up(naive, op->seq.slot, seq->attachment, op->after);
        break;
    case NAIVE_RETIRED:
        seq->state = KVP_SEQ_RECLAIM;
        seq->attachment = KVP_NONE;
        break;
    case NAIVE_RECLAIM:
        apply_reclaim(naive, op, now);
        break;
    case NAIVE_RELEASE:
        apply_release(naive, op, now);
        break;
    case NAIVE_JOB_OPEN:
    case NAIVE_JOB_ADD:
    case NAIVE_JOB_CLOSE:
        apply_job(naive, op);
        break;
    case NAIVE_REGION_MAKE:
    case NAIVE_REGION_MAP:
    case NAIVE_REGION_UNMAP:
    case NAIVE_REGION_DROP:
        apply_region(naive, op);
        break;
    case NAIVE_MARK:
        naive->state.pages[op->page].digest = op->call;
        break;
    case NAIVE_DIGEST:
        if (op->page < naive->geometry.pages && naive->state.pages[op->page].digest == op->call)
            naive->state.pages[op->page].digest = NAIVE_DIGEST_FIRST + op->tokens;
        break;
    case NAIVE_SESSION_OPEN:
    case NAIVE_SESSION_END:
    case NAIVE_OUTCOME:
        apply_session(naive, op);
        break;
    default:
        naive_apply_cache(naive, op, now);
    }
    naive_settle(naive);
    for (uint32_t page = 0; naive->adaptive && page < NAIVE_PAGES; page++)
        naive->state.pages[page].hits = now->pages[page].hits;
}
