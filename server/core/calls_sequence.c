/**
 * Sequences forked, handed over, closed, listed. Opening them and giving them room is calls_advance.c.
 *
 * Each call is one ledger transaction over its whole batch; only the folding of progress words comes before, and
 * publishing after it. What a call asks for is a state: a child that exists, an owner that is the one wanted, a handle
 * that is closed. So a repeat finds it done.
 */
#include "op.h"

/* ---- Fork -------------------------------------------------------------------------------------------------------- */

static enum kvp_status fork_all(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                const Kvpool__V1__ForkRequest *request, const struct kvp_seq_view *parents,
                                struct kvp_seq_view *children)
{
    uint32_t attachment;
    TRY(core_attachment(core, turn, pool, true, &attachment));
    for (size_t i = 0; i < request->n_parents; i++) {
        uint32_t tokens = request->n_tokens != 0 ? request->tokens[i] : parents[i].written;
        uint32_t short_pages = 0;
        if (tokens > parents[i].written)
            return core_refuse(core, KVP_EINVAL, "tokens[%zu]: %u, but %u are written", i, tokens, parents[i].written);
        enum kvp_status status = kvp_seq_fork(core->ledger, pool->id, parents[i].id, attachment, request->keys[i],
                                              tokens, &children[i].id, &short_pages);
        if (status == KVP_EEXIST)
            return core_refuse(core, status, "keys[%zu]: %llu is open in this session", i,
                               (unsigned long long)request->keys[i]);
        if (status == KVP_ENOPAGES) {
            core->error_missing = short_pages;
            for (size_t k = i + 1; k < request->n_parents; k++) {
                uint32_t part = request->n_tokens != 0 ? request->tokens[k] : parents[k].written;
                core->error_missing += part % pool->spec->page_tokens != 0;
            }
            return core_short(core, turn, pool, 1);
        }
        if (status != KVP_OK)
            return core_refuse_or_wait(core, turn, pool, status, "parents", i, request->parents[i]);
    }
    return KVP_OK;
}

/* A repeat: the children are found by their keys. */
static enum kvp_status find_children(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                     const Kvpool__V1__ForkRequest *request, struct kvp_seq_view *children)
{
    uint32_t attachment;
    TRY(core_attachment(core, turn, pool, false, &attachment));
    for (size_t i = 0; i < request->n_keys; i++) {
        struct kvp_seq_id id;
        if (kvp_seq_by_key(core->ledger, pool->id, attachment, request->keys[i], &id) != KVP_OK)
            return core_made_and_closed(core, i, request->keys[i]);
        TRY(kvp_seq_get(core->ledger, pool->id, id, &children[i]));
    }
    return KVP_OK;
}

static enum kvp_status fork_reply(struct kvp_core *core, struct turn *turn, const struct kvp_seq_view *children,
                                  size_t n)
{
    struct columns columns;
    struct copies copies;
    TRY(core_columns(core, children, n, &columns));
    TRY(core_copies(core, children, n, &copies));
    Kvpool__V1__ForkReply reply = KVPOOL__V1__FORK_REPLY__INIT;
    reply.n_seqs = reply.n_written = reply.n_versions = n;
    reply.seqs = columns.seqs;
    reply.written = columns.written;
    reply.versions = columns.versions;
    reply.n_copy_seqs = reply.n_copy_sources = reply.n_copy_destinations = reply.n_copy_tokens = copies.n;
    reply.copy_seqs = copies.seqs;
    reply.copy_sources = copies.sources;
    reply.copy_destinations = copies.destinations;
    reply.copy_tokens = copies.tokens;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

static enum kvp_status fork_new(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                const Kvpool__V1__ForkRequest *request, struct kvp_seq_view *children)
{
    struct kvp_seq_view *parents;
    size_t n = request->n_parents;
    TRY(core_batch(core, turn, pool, "parents", n, request->parents, BATCH_TENANT, &parents));
    kvp_txn_begin(core->ledger);
    enum kvp_status status = fork_all(core, turn, pool, request, parents, children);
    if (status != KVP_OK)
        return core_abort_taking(core, turn, pool, status);
    TRY(core_commit(core, turn, n, 0));
    return core_publish_views(core, pool, children, n);
}

enum kvp_status call_fork(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__ForkRequest *request = (const Kvpool__V1__ForkRequest *)turn->body;
    struct pool_state *pool;
    uint32_t attachment;
    size_t n = request->n_parents;
    TRY(core_zero_ended(core, turn));
    turn->repeated |= turn->op != NULL && turn->op->zeroing;
    TRY(core_pool_live(core, request->pool, &pool));
    if (request->n_keys != n)
        return core_refuse(core, KVP_EINVAL, "keys: %zu, must be as many as parents: %zu", request->n_keys, n);
    if (request->n_tokens != 0)
        TRY(core_length_check(core, "tokens", request->n_tokens, n));
    struct kvp_seq_view *children = core_alloc(core, n + 1, sizeof(*children));
    if (children == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    TRY(turn->repeated ? find_children(core, turn, pool, request, children)
                       : fork_new(core, turn, pool, request, children));
    TRY(core_attachment(core, turn, pool, false, &attachment));
    TRY(core_zero(core, turn, pool, attachment, children, n));
    return fork_reply(core, turn, children, n);
}

/* ---- Transfer ---------------------------------------------------------------------------------------------------- */

static enum kvp_status find_receiver(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool,
                                     uint64_t to, uint32_t *ret_attachment)
{
    struct kvp_session_view session;
    struct kvp_attachment_view view;
    if (kvp_session_get(core->ledger, session_id(to), &session) != KVP_OK || session.state != KVP_SESSION_OPEN)
        return core_refuse(core, KVP_ENOENT, "to: session %#llx is not open", (unsigned long long)to);
    if (session.spec.tenant != turn->session.spec.tenant)
        return core_refuse(core, KVP_EPERM, "to: session %#llx is another tenant's", (unsigned long long)to);
    if (kvp_attachment_of(core->ledger, pool->id, session.id, ret_attachment) != KVP_OK ||
        kvp_attachment_get(core->ledger, pool->id, *ret_attachment, &view) != KVP_OK ||
        view.state != KVP_ATTACHMENT_LIVE)
        return core_refuse(core, KVP_ENOENT, "to: session %#llx is not attached to pool \"%s\"", (unsigned long long)to,
                           pool->spec->name);
    return KVP_OK;
}

static enum kvp_status check_transfer(struct kvp_core *core, const Kvpool__V1__TransferRequest *request,
                                      const struct kvp_seq_view *views, uint32_t from)
{
    if (request->value != 0 && request->timeline / KVP_TIMELINES_MAX != from)
        return core_refuse(core, KVP_EINVAL, "timeline: %u, this session's are %u to %u", request->timeline,
                           from * KVP_TIMELINES_MAX, from * KVP_TIMELINES_MAX + KVP_TIMELINES_MAX - 1);
    for (size_t i = 0; i < request->n_tokens; i++) {
        if (request->tokens[i] > views[i].reserved)
            return core_refuse(core, KVP_EINVAL, "tokens[%zu]: %u, but %u are reserved", i, request->tokens[i],
                               views[i].reserved);
        if (request->value == 0 && request->tokens[i] > views[i].written)
            return core_refuse(core, KVP_EINVAL,
                               "tokens[%zu]: %u, but %u are written, and no value is to be waited for", i,
                               request->tokens[i], views[i].written);
    }
    return KVP_OK;
}

static enum kvp_status transfer_all(struct kvp_core *core, struct pool_state *pool,
                                    const Kvpool__V1__TransferRequest *request, const struct kvp_seq_view *views,
                                    uint32_t to)
{
    struct kvp_after after = {request->timeline, request->value};
    for (size_t i = 0; i < request->n_seqs; i++) {
        if (views[i].attachment == to)
            continue;
        enum kvp_status status = kvp_seq_transfer(core->ledger, pool->id, views[i].id, to);
        if (status == KVP_EEXIST)
            return core_refuse(core, status, "seqs[%zu]: key %llu is open in the receiving session", i,
                               (unsigned long long)views[i].key);
        if (status == KVP_OK && after.value != 0 && request->n_tokens != 0)
            status = kvp_seq_set_pending(core->ledger, pool->id, views[i].id, request->tokens[i], after);
        if (status != KVP_OK)
            return core_seq_refuse(core, pool, status, "seqs", i, request->seqs[i]);
    }
    return KVP_OK;
}

enum kvp_status call_transfer(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__TransferRequest *request = (const Kvpool__V1__TransferRequest *)turn->body;
    struct pool_state *pool;
    struct kvp_seq_view *views;
    struct columns columns;
    uint32_t from, to;
    size_t n = request->n_seqs;
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(core_attachment(core, turn, pool, false, &from));
    TRY(find_receiver(core, turn, pool, request->to, &to));
    if (request->n_tokens != 0)
        TRY(core_length_check(core, "tokens", request->n_tokens, n));
    TRY(core_batch(core, turn, pool, "seqs", n, request->seqs, BATCH_DISTINCT | BATCH_FREE | BATCH_TENANT, &views));
    for (size_t i = 0; i < n; i++) {
        if (views[i].attachment != from && views[i].attachment != to)
            return core_refuse(core, KVP_EPERM, "seqs[%zu]: %#llx belongs to another session", i,
                               (unsigned long long)request->seqs[i]);
    }
    if (!turn->repeated) {
        TRY(check_transfer(core, request, views, from));
        kvp_txn_begin(core->ledger);
        enum kvp_status status = transfer_all(core, pool, request, views, to);
        if (status != KVP_OK)
            return core_abort(core, status);
        TRY(core_commit(core, turn, n, 0));
        TRY(core_publish_views(core, pool, views, n));
        for (size_t i = 0; i < n; i++) {
            if (views[i].pending_tokens != 0)
                core_pending_add(core, pool, views[i].id.slot);
        }
    }
    TRY(core_columns(core, views, n, &columns));
    Kvpool__V1__TransferReply reply = KVPOOL__V1__TRANSFER_REPLY__INIT;
    reply.n_versions = n;
    reply.versions = columns.versions;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- CloseSequences ---------------------------------------------------------------------------------------------- */

/* The handles that are still open; one of another generation, or closed, is fine. */
static size_t still_open(struct kvp_core *core, const struct pool_state *pool,
                         const Kvpool__V1__CloseSequencesRequest *request, uint64_t *ret_handles, size_t *ret_index)
{
    size_t n = 0;
    for (size_t i = 0; i < request->n_seqs; i++) {
        struct kvp_seq_view view;
        if (kvp_seq_get(core->ledger, pool->id, seq_id(request->seqs[i]), &view) != KVP_OK)
            continue;
        ret_index[n] = i;
        ret_handles[n++] = request->seqs[i];
    }
    return n;
}

static enum kvp_status close_all(struct kvp_core *core, struct pool_state *pool, const struct kvp_seq_view *views,
                                 const size_t *index, size_t n, const struct kvp_after *after)
{
    struct kvp_pool_view view;
    TRY(kvp_pool_get(core->ledger, pool->id, &view));
    bool needs_after = view.needs_after && view.state == KVP_POOL_LIVE;
    for (size_t k = 0; k < n; k++) {
        if (needs_after && after[index[k]].value == 0 && views[k].row_pages != 0)
            return core_refuse(core, KVP_EINVAL,
                               "after: seqs[%zu] has pages; on a GPU closing it needs a timeline value", index[k]);
        if (view.state == KVP_POOL_LIVE)
            TRY(core_given_check(core, index[k], &views[k]));
        enum kvp_status status = kvp_seq_close(core->ledger, pool->id, views[k].id, after[index[k]]);
        if (status == KVP_ESTALE)
            continue; /* it stands in the batch twice */
        if (status != KVP_OK)
            return core_seq_refuse(core, pool, status, "seqs", index[k], ID_WORD(views[k].id));
    }
    return KVP_OK;
}

enum kvp_status call_close_sequences(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__CloseSequencesRequest *request = (const Kvpool__V1__CloseSequencesRequest *)turn->body;
    Kvpool__V1__CloseSequencesReply reply = KVPOOL__V1__CLOSE_SEQUENCES_REPLY__INIT;
    struct pool_state *pool;
    struct kvp_seq_view *views;
    struct kvp_after *after;
    uint32_t attachment;
    TRY(core_pool_by_name(core, request->pool, &pool));
    if (request->n_seqs == 0 || request->n_seqs > KVP_BATCH_MAX)
        return core_refuse(core, KVP_EINVAL, "seqs: %zu handles, must be 1 to %d in a call", request->n_seqs,
                           KVP_BATCH_MAX);
    uint64_t *handles = core_alloc(core, request->n_seqs, sizeof(*handles));
    size_t *index = core_alloc(core, request->n_seqs, sizeof(*index));
    if (handles == NULL || index == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    size_t n = still_open(core, pool, request, handles, index);
    if (turn->repeated || n == 0)
        return core_answer(core, turn, &reply.base, NULL, 0);
    TRY(core_attachment(core, turn, pool, false, &attachment));
    TRY(core_after(core, pool, attachment, request->n_seqs, request->n_after_timelines, request->after_timelines,
                   request->n_after_values, request->after_values, &after));
    TRY(core_batch(core, turn, pool, "seqs", n, handles, BATCH_OWNED | BATCH_FREE, &views));
    kvp_txn_begin(core->ledger);
    enum kvp_status status = close_all(core, pool, views, index, n, after);
    if (status != KVP_OK)
        return core_abort(core, status);
    TRY(core_commit(core, turn, n, 0));
    for (size_t k = 0; k < n; k++)
        core_publish_seq(core, pool, views[k].id.slot);
    pool->reclaim_due = true;
    core_reclaim_slice(core, pool);
    core_due(core, core->now_ms);
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- ListSequences ----------------------------------------------------------------------------------------------- */

static uint32_t state_of(struct kvp_core *core, struct pool_state *pool, const struct kvp_seq_view *view)
{
    struct kvp_attachment_view owner;
    if (view->state != KVP_SEQ_OPEN)
        return KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_RETIRING;
    if (kvp_attachment_get(core->ledger, pool->id, view->attachment, &owner) == KVP_OK &&
        owner.state == KVP_ATTACHMENT_DEAD) {
        bool lingers = view->durable && core_attachment_quiet(core, pool, view->attachment);
        return lingers ? KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_LINGERING
                       : KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_QUARANTINED;
    }
    return view->job != KVP_NONE ? KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_BUSY
                                 : KVPOOL__V1__SEQUENCE_STATE__SEQUENCE_OPEN;
}

static uint64_t owner_of(struct kvp_core *core, const struct pool_state *pool, const struct kvp_seq_view *view)
{
    struct kvp_attachment_view owner;
    if (view->attachment == KVP_NONE || kvp_attachment_get(core->ledger, pool->id, view->attachment, &owner) != KVP_OK)
        return 0;
    return ID_WORD(owner.session);
}

static enum kvp_status list_page(struct kvp_core *core, struct pool_state *pool, uint32_t from, uint32_t limit,
                                 uint32_t only_attachment, struct kvp_seq_view *ret_views, size_t *ret_n,
                                 uint32_t *ret_next)
{
    size_t n = 0;
    uint32_t slot = from;
    for (; slot < pool->spec->max_sequences && n < limit; slot++) {
        struct kvp_seq_view view;
        if (kvp_seq_at(core->ledger, pool->id, slot, &view) != KVP_OK)
            continue;
        bool own = view.state == KVP_SEQ_OPEN && view.attachment == only_attachment;
        if (only_attachment != KVP_NONE && !own)
            continue;
        if (view.state == KVP_SEQ_OPEN)
            TRY(core_fold(core, pool, &view, 1));
        ret_views[n++] = view;
    }
    *ret_n = n;
    *ret_next = slot < pool->spec->max_sequences ? slot : 0;
    return KVP_OK;
}

enum kvp_status call_list_sequences(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__ListSequencesRequest *request = (const Kvpool__V1__ListSequencesRequest *)turn->body;
    Kvpool__V1__ListSequencesReply reply = KVPOOL__V1__LIST_SEQUENCES_REPLY__INIT;
    struct pool_state *pool;
    struct columns columns;
    uint32_t attachment = KVP_NONE;
    size_t n;
    TRY(core_pool_by_name(core, request->pool, &pool));
    uint32_t limit = request->limit != 0 ? request->limit : KVP_LIST_MAX;
    if (limit > KVP_LIST_MAX)
        return core_refuse(core, KVP_EINVAL, "limit: %u, at most %d", limit, KVP_LIST_MAX);
    if (!request->all) {
        TRY(core_need_session(core, turn));
        if (kvp_attachment_of(core->ledger, pool->id, turn->session.id, &attachment) != KVP_OK)
            return core_answer(core, turn, &reply.base, NULL, 0);
    }
    struct kvp_seq_view *views = core_alloc(core, limit, sizeof(*views));
    if (views == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    TRY(list_page(core, pool, request->from_slot, limit, attachment, views, &n, &reply.next_slot));
    TRY(core_columns(core, views, n, &columns));
    uint64_t *keys = core_alloc(core, n, 2 * sizeof(*keys));
    uint32_t *states = core_alloc(core, n, sizeof(*states));
    if (keys == NULL || states == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (size_t i = 0; i < n; i++) {
        keys[i] = views[i].key;
        keys[n + i] = owner_of(core, pool, &views[i]);
        states[i] = state_of(core, pool, &views[i]);
    }
    reply.n_seqs = reply.n_keys = reply.n_reserved = reply.n_written = n;
    reply.n_versions = reply.n_session_ids = reply.n_states = n;
    reply.seqs = columns.seqs;
    reply.keys = keys;
    reply.reserved = columns.reserved;
    reply.written = columns.written;
    reply.versions = columns.versions;
    reply.session_ids = keys + n;
    reply.states = states;
    return core_answer(core, turn, &reply.base, NULL, 0);
}
