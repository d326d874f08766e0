/**
 * Sequences opened and given room: OpenSequences and Advance, with the blocks that their pages hold, or will hold.
 *
 * Each is one ledger transaction over its whole batch. What it asks for is a state: a key that is open, room that is
 * there, a page that is known by its key. So a repeat finds it done.
 *
 * A prefix that is cached is taken along when its sequence is made. Rows given up come first: what they hold counts as
 * used until they have let go of it, and the order of that is the order of eviction.
 */
#include "blocks.h"

/* ---- OpenSequences ----------------------------------------------------------------------------------------------- */

/* Of the blocks of entry i, how many leading ones the row begins with. */
static size_t leading_blocks(const struct kvp_core *core, const struct pool_state *pool, struct kvp_seq_id seq,
                             const struct call_blocks *blocks, size_t i)
{
    const struct kvp_block_key *wanted = blocks->keys + blocks->at[i];
    size_t n = core_block_count(blocks, i), k = 0;
    struct kvp_block_key key;
    while (k < n && kvp_seq_block_key(core->ledger, pool->id, seq, (uint32_t)k, &key) == KVP_OK &&
           key.word[0] == wanted[k].word[0] && key.word[1] == wanted[k].word[1])
        k++;
    return k;
}

static enum kvp_status open_one(struct kvp_core *core, const struct pool_state *pool, uint32_t attachment,
                                bool repeated, const Kvpool__V1__OpenSequencesRequest *request,
                                const struct call_blocks *blocks, size_t i, struct kvp_seq_id *ret_seq,
                                size_t *ret_cached)
{
    bool durable = request->durable != 0;
    enum kvp_status status = kvp_seq_by_key(core->ledger, pool->id, attachment, request->keys[i], ret_seq);
    *ret_cached = 0;
    if (status == KVP_OK && blocks->n != 0)
        *ret_cached = leading_blocks(core, pool, *ret_seq, blocks, i);
    if (status != KVP_ENOENT)
        return status;
    if (repeated)
        return core_made_and_closed(core, i, request->keys[i]);
    if (core_block_count(blocks, i) == 0)
        return kvp_seq_open(core->ledger, pool->id, attachment, request->keys[i], durable, ret_seq);
    return kvp_seq_open_cached(core->ledger, pool->id, attachment, request->keys[i], durable,
                               core_block_count(blocks, i), blocks->keys + blocks->at[i], ret_seq, ret_cached);
}

static enum kvp_status open_all(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                const Kvpool__V1__OpenSequencesRequest *request, const struct call_blocks *blocks,
                                struct kvp_seq_view *views, uint32_t *cached)
{
    uint32_t attachment;
    TRY(core_attachment(core, turn, pool, true, &attachment));
    for (size_t i = 0; i < request->n_keys; i++) {
        size_t n;
        enum kvp_status status = open_one(core, pool, attachment, turn->repeated, request, blocks, i, &views[i].id, &n);
        if (status == KVP_ELIMIT)
            core_refuse(core, status, "keys[%zu]: all %u rows of pool \"%s\" are in use", i, pool->spec->max_sequences,
                        pool->spec->name);
        else if (status != KVP_OK && status != KVP_ESTALE)
            core_refuse(core, status, "keys[%zu]: %s", i, kvp_status_text(status));
        TRY(status);
        cached[i] = (uint32_t)n * pool->spec->page_tokens;
    }
    return KVP_OK;
}

static enum kvp_status open_reply(struct kvp_core *core, struct turn *turn, const struct kvp_seq_view *views, size_t n,
                                  bool with_blocks, uint32_t *cached)
{
    Kvpool__V1__OpenSequencesReply reply = KVPOOL__V1__OPEN_SEQUENCES_REPLY__INIT;
    struct columns columns;
    TRY(core_columns(core, views, n, &columns));
    reply.n_seqs = reply.n_reserved = reply.n_written = reply.n_versions = n;
    reply.seqs = columns.seqs;
    reply.reserved = columns.reserved;
    reply.written = columns.written;
    reply.versions = columns.versions;
    reply.n_cached = with_blocks ? n : 0;
    reply.cached = cached;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

enum kvp_status call_open_sequences(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__OpenSequencesRequest *request = (const Kvpool__V1__OpenSequencesRequest *)turn->body;
    struct pool_state *pool;
    struct call_blocks blocks;
    size_t n = request->n_keys;
    TRY(core_pool_live(core, request->pool, &pool));
    if (n == 0 || n > KVP_BATCH_MAX)
        return core_refuse(core, KVP_EINVAL, "keys: %zu, must be 1 to %d in a call", n, KVP_BATCH_MAX);
    TRY(core_blocks(core, pool, turn->session.spec.tenant, request->blocks, n, NULL, &blocks));
    struct kvp_seq_view *views = core_alloc(core, n, sizeof(*views));
    uint32_t *cached = core_alloc(core, n, sizeof(*cached));
    if (views == NULL || cached == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    if (blocks.n != 0) {
        TRY(core_reclaimed(core, turn, pool));
        TRY(core_see_named(core, pool));
    }
    kvp_txn_begin(core->ledger);
    enum kvp_status status = open_all(core, turn, pool, request, &blocks, views, cached);
    if (status != KVP_OK) {
        core_abort(core, status);
        bool worth_waiting = status == KVP_ELIMIT && pool->reclaim_due;
        return worth_waiting ? core_wait(core, turn, WAIT_RECLAIM, pool->id.slot) : status;
    }
    TRY(core_commit(core, turn, n, 0));
    TRY(core_publish_views(core, pool, views, n));
    TRY(core_fold(core, pool, views, (uint32_t)n));
    return open_reply(core, turn, views, n, blocks.n != 0, cached);
}

/* ---- Advance ----------------------------------------------------------------------------------------------------- */

/* How many pages the sequences from `from` on take; what they give up is not counted. */
static uint64_t batch_pages(const struct pool_state *pool, const struct kvp_seq_view *views, const uint32_t *reserved,
                            size_t from, size_t n)
{
    uint64_t pages = 0;
    for (size_t k = from; k < n; k++) {
        uint32_t needed = core_pages_for(pool, reserved[k]);
        if (needed > views[k].row_pages)
            pages += needed - views[k].row_pages;
    }
    return pages;
}

static enum kvp_status check_advance(struct kvp_core *core, const struct pool_state *pool,
                                     const Kvpool__V1__AdvanceRequest *request, const struct call_blocks *blocks,
                                     const struct kvp_seq_view *views)
{
    for (size_t i = 0; i < request->n_seqs; i++) {
        uint32_t reserved = request->reserved[i], full = reserved / pool->spec->page_tokens;
        size_t n = core_block_count(blocks, i);
        if (reserved > pool->spec->max_sequence_tokens)
            return core_refuse(core, KVP_EINVAL, "reserved[%zu]: %u tokens, at most %u in pool \"%s\"", i, reserved,
                               pool->spec->max_sequence_tokens, pool->spec->name);
        if (reserved < views[i].reserved && !request->truncate)
            return core_refuse(core, KVP_EINVAL, "reserved[%zu]: %u tokens, less than the %u now, without truncate", i,
                               reserved, views[i].reserved);
        if (reserved < views[i].reserved)
            TRY(core_given_check(core, i, &views[i]));
        if (request->n_written != 0 && request->written[i] > reserved)
            return core_refuse(core, KVP_EINVAL, "written[%zu]: %u tokens, more than the %u reserved", i,
                               request->written[i], reserved);
        if (n != 0 && blocks->first[i] + (uint64_t)n > full)
            return core_refuse(core, KVP_EINVAL,
                               "blocks: %zu of seqs[%zu] from page %u on, but the %u tokens reserved fill %u pages", n,
                               i, blocks->first[i], reserved, full);
    }
    return KVP_OK;
}

static enum kvp_status set_keys(struct kvp_core *core, const struct pool_state *pool, struct kvp_seq_id seq,
                                const struct call_blocks *blocks, size_t i)
{
    size_t n = core_block_count(blocks, i), block = 0;
    if (n == 0)
        return KVP_OK;
    enum kvp_status status =
        kvp_seq_set_keys(core->ledger, pool->id, seq, blocks->first[i], n, blocks->keys + blocks->at[i], &block);
    if (status == KVP_EMISMATCH)
        return core_refuse(core, status, "blocks: page %zu of seqs[%zu] is known to hold another block",
                           blocks->first[i] + block, i);
    if (status == KVP_EINVAL)
        return core_refuse(core, status, "blocks: page %zu of seqs[%zu] can not get a key: pages before it have none",
                           blocks->first[i] + block, i);
    if (status != KVP_OK)
        return core_seq_refuse(core, pool, status, "seqs", i, ID_WORD(seq));
    return KVP_OK;
}

static enum kvp_status advance_one(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                   const Kvpool__V1__AdvanceRequest *request, const struct call_blocks *blocks,
                                   const struct kvp_seq_view *views, const struct kvp_after *after, size_t i)
{
    uint32_t reserved = request->reserved[i], pages = core_pages_for(pool, reserved), short_pages = 0;
    bool changed;
    if (pages < views[i].row_pages && !pool->host && after[i].value == 0)
        return core_refuse(core, KVP_EINVAL, "after: seqs[%zu] gives up pages; on a GPU that needs a timeline value",
                           i);
    enum kvp_status status =
        kvp_seq_reserve(core->ledger, pool->id, views[i].id, reserved, request->truncate != 0, after[i], &short_pages);
    if (status == KVP_ENOPAGES) {
        core->error_missing = short_pages + batch_pages(pool, views, request->reserved, i + 1, request->n_seqs);
        return core_short(core, turn, pool, pages > views[i].row_pages ? pages - views[i].row_pages : 1);
    }
    if (status == KVP_OK)
        TRY(set_keys(core, pool, views[i].id, blocks, i));
    if (status == KVP_OK && request->n_written != 0)
        status = kvp_seq_observe(core->ledger, pool->id, views[i].id, request->written[i], &changed);
    if (status != KVP_OK)
        return core_refuse_or_wait(core, turn, pool, status, "seqs", i, request->seqs[i]);
    return KVP_OK;
}

static enum kvp_status advance_reply(struct kvp_core *core, struct turn *turn, const struct kvp_seq_view *views,
                                     size_t n)
{
    struct columns columns;
    struct copies copies;
    TRY(core_columns(core, views, n, &columns));
    TRY(core_copies(core, views, n, &copies));
    Kvpool__V1__AdvanceReply reply = KVPOOL__V1__ADVANCE_REPLY__INIT;
    reply.n_written = reply.n_versions = n;
    reply.written = columns.written;
    reply.versions = columns.versions;
    reply.n_copy_seqs = reply.n_copy_sources = reply.n_copy_destinations = reply.n_copy_tokens = copies.n;
    reply.copy_seqs = copies.seqs;
    reply.copy_sources = copies.sources;
    reply.copy_destinations = copies.destinations;
    reply.copy_tokens = copies.tokens;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* The one transaction, and what follows from it. Views are read anew. */
static enum kvp_status advance_all(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                   const Kvpool__V1__AdvanceRequest *request, uint32_t attachment,
                                   struct kvp_seq_view *views)
{
    struct kvp_after *after;
    struct call_blocks blocks;
    size_t n = request->n_seqs;
    TRY(core_after(core, pool, attachment, n, request->n_after_timelines, request->after_timelines,
                   request->n_after_values, request->after_values, &after));
    TRY(core_blocks(core, pool, turn->session.spec.tenant, request->blocks, n, views, &blocks));
    TRY(check_advance(core, pool, request, &blocks, views));
    TRY(core_reclaimed_for(core, turn, pool, batch_pages(pool, views, request->reserved, 0, n)));
    kvp_txn_begin(core->ledger);
    for (size_t i = 0; i < n; i++) {
        enum kvp_status status = advance_one(core, turn, pool, request, &blocks, views, after, i);
        if (status != KVP_OK)
            return core_abort_taking(core, turn, pool, status);
    }
    TRY(core_commit(core, turn, n, 0));
    if (request->truncate) {
        pool->reclaim_due = true;
        core_due(core, core->now_ms);
    }
    TRY(core_publish_views(core, pool, views, n));
    for (size_t i = 0; i < n && blocks.n != 0; i++)
        core_named_add(pool, &views[i]);
    return KVP_OK;
}

enum kvp_status call_advance(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__AdvanceRequest *request = (const Kvpool__V1__AdvanceRequest *)turn->body;
    struct pool_state *pool;
    struct kvp_seq_view *views;
    uint32_t attachment;
    TRY(core_zero_ended(core, turn));
    turn->repeated |= turn->op != NULL && turn->op->zeroing;
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(core_attachment(core, turn, pool, false, &attachment));
    TRY(core_length_check(core, "reserved", request->n_reserved, request->n_seqs));
    if (request->n_written != 0)
        TRY(core_length_check(core, "written", request->n_written, request->n_seqs));
    TRY(core_batch(core, turn, pool, "seqs", request->n_seqs, request->seqs, BATCH_OWNED | BATCH_DISTINCT | BATCH_FREE,
                   &views));
    if (!turn->repeated)
        TRY(advance_all(core, turn, pool, request, attachment, views));
    TRY(core_zero(core, turn, pool, attachment, views, request->n_seqs));
    return advance_reply(core, turn, views, request->n_seqs);
}
