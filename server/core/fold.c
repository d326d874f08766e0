/**
 * What streams report: progress words, timelines; and what follows when they do.
 *
 * A worker's stream stores {version, tokens} into its progress page behind its append kernels. The core looks when it
 * is asked something of the row, or of what is cached while the row has named pages that are not written, and when a
 * session ends; never when idle. A word of another version than the row's is ignored,
 * one over `reserved` is clamped by the ledger. With tensor parallelism the least of the group's words counts: and none
 * from the end of one of its ranks on, until another joins in its place, since nobody writes that rank's part.
 *
 * Every tick while something waits: rows that retire, transfers under way (`pending`: a list of slots, whose entries
 * may be stale), rows to reclaim, a slice a tick.
 */
#include "op.h"

bool core_timeline_reached(const struct pool_state *pool, struct kvp_after after)
{
    if (after.timeline >= KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX)
        return false;
    return __atomic_load_n(&pool->timelines[after.timeline].value, __ATOMIC_ACQUIRE) >= after.value;
}

/* ---- progress words ---------------------------------------------------------------------------------------------- */

/* @return false: the attachment has no progress page */
static bool word_of(const struct pool_state *pool, uint32_t attachment, const struct kvp_seq_view *view,
                    uint32_t *ret_tokens)
{
    const uint64_t *progress = pool->attachments[attachment].progress;
    if (progress == NULL)
        return false;
    uint64_t word = __atomic_load_n(&progress[view->id.slot], __ATOMIC_ACQUIRE);
    *ret_tokens = KVP_PROGRESS_VERSION(word) == view->version ? KVP_PROGRESS_TOKENS(word) : 0;
    return true;
}

/* The least of the words of those in the owner's group that have a progress page; 0 while the group lacks a rank. */
static uint32_t group_tokens(const struct kvp_core *core, const struct pool_state *pool,
                             const struct kvp_seq_view *view)
{
    struct kvp_attachment_view owner, member;
    uint32_t least = UINT32_MAX, tokens;
    if (kvp_attachment_get(core->ledger, pool->id, view->attachment, &owner) != KVP_OK || owner.lacking != 0)
        return 0;
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        if (pool->attachments[i].progress == NULL || kvp_attachment_get(core->ledger, pool->id, i, &member) != KVP_OK ||
            member.leader != owner.leader)
            continue;
        if (word_of(pool, i, view, &tokens) && tokens < least)
            least = tokens;
    }
    return least == UINT32_MAX ? 0 : least;
}

uint32_t core_fold_tokens(const struct kvp_core *core, const struct pool_state *pool, const struct kvp_seq_view *view)
{
    uint32_t tokens = 0;
    if (pool->joined != 0)
        tokens = group_tokens(core, pool, view);
    else
        word_of(pool, view->attachment, view, &tokens);
    if (view->pending_tokens > tokens && core_timeline_reached(pool, view->after) &&
        kvp_timeline_lost(&pool->timelines[view->after.timeline], view->after.value) == 0)
        tokens = view->pending_tokens;
    if (tokens > view->reserved)
        tokens = view->reserved;
    return tokens > view->written ? tokens : view->written;
}

/* One transaction of words. @param ret_more  it was full before all were seen whole */
static enum kvp_status fold_some(struct kvp_core *core, struct pool_state *pool, struct kvp_seq_view *views, uint32_t n,
                                 bool *ret_more)
{
    struct kvp_ledger *ledger = core->ledger;
    bool open = false, changed;
    *ret_more = false;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t tokens = core_fold_tokens(core, pool, &views[i]);
        if (tokens == views[i].written)
            continue;
        if (!open)
            kvp_txn_begin(ledger);
        enum kvp_status status = kvp_seq_observe(ledger, pool->id, views[i].id, tokens, &changed);
        if (status == KVP_ELIMIT && open) {
            *ret_more = true;
            break;
        }
        open = true;
        if (status != KVP_OK && status != KVP_ELOST)
            return core_abort(core, core_refuse_plain(core, status, "folding a progress word"));
        views[i].written = status == KVP_OK ? tokens : 0;
        views[i].copy.tokens = UINT32_MAX; /* to be read anew, and published */
    }
    if (!open)
        return KVP_OK;
    kvp_txn_commit(ledger);
    for (uint32_t i = 0; i < n; i++) {
        if (views[i].copy.tokens != UINT32_MAX)
            continue;
        uint32_t wanted = views[i].written;
        TRY(kvp_seq_get(ledger, pool->id, views[i].id, &views[i]));
        core_publish_view(core, pool, &views[i]);
        *ret_more |= views[i].written < wanted;
    }
    return KVP_OK;
}

enum kvp_status core_fold(struct kvp_core *core, struct pool_state *pool, struct kvp_seq_view *views, uint32_t n)
{
    bool more = true;
    while (more)
        TRY(fold_some(core, pool, views, n, &more));
    return KVP_OK;
}

void core_fold_attachment(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    enum { CHUNK = 64 };
    struct kvp_seq_view views[CHUNK];
    uint32_t slot = kvp_attachment_first(core->ledger, pool->id, attachment);
    while (slot != KVP_NONE) {
        uint32_t n = 0;
        for (; slot != KVP_NONE && n < CHUNK; slot = kvp_attachment_next(core->ledger, pool->id, slot)) {
            if (kvp_seq_at(core->ledger, pool->id, slot, &views[n]) == KVP_OK)
                n++;
        }
        if (core_fold(core, pool, views, n) != KVP_OK) {
            core_log(core, 3, "the last words of attachment %u of pool %s were not folded: %s", attachment,
                     pool->spec->name, core->error_text);
            return;
        }
    }
}

/* ---- pages that have names already ------------------------------------------------------------------------------- */

static bool has_unwritten_names(const struct pool_state *pool, const struct kvp_seq_view *view)
{
    return (uint64_t)view->keyed * pool->spec->page_tokens > view->written;
}

void core_named_add(struct pool_state *pool, const struct kvp_seq_view *view)
{
    if (pool->is_named[view->id.slot] || !has_unwritten_names(pool, view))
        return;
    pool->is_named[view->id.slot] = true;
    pool->named[pool->n_named++] = view->id.slot;
}

static enum kvp_status see_one(struct kvp_core *core, struct pool_state *pool, uint32_t slot, bool *ret_unwritten)
{
    struct kvp_seq_view view;
    *ret_unwritten = kvp_seq_at(core->ledger, pool->id, slot, &view) == KVP_OK && view.state == KVP_SEQ_OPEN &&
                     has_unwritten_names(pool, &view);
    if (!*ret_unwritten || core_fold_tokens(core, pool, &view) == view.written)
        return KVP_OK;
    TRY(core_fold(core, pool, &view, 1));
    *ret_unwritten = has_unwritten_names(pool, &view);
    return KVP_OK;
}

enum kvp_status core_see_named(struct kvp_core *core, struct pool_state *pool)
{
    uint32_t n = pool->n_named < KVP_BATCH_MAX ? pool->n_named : KVP_BATCH_MAX;
    for (; n > 0; n--) {
        uint32_t at = pool->named_next < pool->n_named ? pool->named_next : 0, slot = pool->named[at];
        bool unwritten;
        TRY(see_one(core, pool, slot, &unwritten));
        pool->named_next = unwritten ? at + 1 : at;
        if (unwritten)
            continue;
        pool->is_named[slot] = false;
        pool->named[at] = pool->named[--pool->n_named];
    }
    return KVP_OK;
}

/* ---- transfers under way ----------------------------------------------------------------------------------------- */

void core_pending_add(struct kvp_core *core, struct pool_state *pool, uint32_t slot)
{
    for (uint32_t i = 0; i < pool->n_pending; i++) {
        if (pool->pending[i] == slot)
            return;
    }
    CORE_ASSERT(pool->n_pending < pool->spec->max_sequences);
    pool->pending[pool->n_pending++] = slot;
    core_due(core, core->now_ms + 1);
}

static void pending_tick(struct kvp_core *core, struct pool_state *pool)
{
    for (uint32_t i = 0; i < pool->n_pending;) {
        struct kvp_seq_view view;
        bool waits = kvp_seq_at(core->ledger, pool->id, pool->pending[i], &view) == KVP_OK &&
                     view.state == KVP_SEQ_OPEN && view.pending_tokens != 0;
        if (waits && core_fold(core, pool, &view, 1) == KVP_OK)
            waits = view.pending_tokens != 0;
        if (waits)
            i++;
        else
            pool->pending[i] = pool->pending[--pool->n_pending];
    }
    if (pool->n_pending != 0)
        core_due(core, core->now_ms + 1);
}

/* A transfer whose giver died before its value came brings nothing: what was written is what there is. */
static void pending_cancel(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    for (uint32_t i = 0; i < pool->n_pending; i++) {
        struct kvp_seq_view view;
        if (kvp_seq_at(core->ledger, pool->id, pool->pending[i], &view) != KVP_OK || view.state != KVP_SEQ_OPEN ||
            view.pending_tokens == 0 || view.after.timeline / KVP_TIMELINES_MAX != attachment)
            continue;
        if (core_fold(core, pool, &view, 1) != KVP_OK || view.pending_tokens == 0)
            continue;
        kvp_txn_begin(core->ledger);
        if (kvp_seq_end_pending(core->ledger, pool->id, view.id) == KVP_OK)
            kvp_txn_commit(core->ledger);
        else
            kvp_txn_abort(core->ledger);
    }
}

/* ---- the way back ------------------------------------------------------------------------------------------------ */

static void retiring_tick(struct kvp_core *core, struct pool_state *pool)
{
    struct kvp_ledger *ledger = core->ledger;
    uint32_t slot = kvp_retiring_first(ledger, pool->id), next, budget = core->config.reclaim_slice;
    bool open = false, left = false;
    for (; slot != KVP_NONE; slot = next) {
        struct kvp_seq_view view;
        next = kvp_retiring_next(ledger, pool->id, slot);
        if (kvp_seq_at(ledger, pool->id, slot, &view) != KVP_OK)
            continue;
        left = true;
        if (!core_timeline_reached(pool, view.after) || budget == 0)
            continue;
        if (!open)
            kvp_txn_begin(ledger);
        open = true;
        if (kvp_seq_retired(ledger, pool->id, slot) != KVP_OK) {
            kvp_txn_abort(ledger);
            core_due(core, core->now_ms + 1);
            return;
        }
        budget--;
        pool->reclaim_due = true;
    }
    if (open)
        kvp_txn_commit(ledger);
    if (left)
        core_due(core, core->now_ms + 1);
}

void core_reclaim_slice(struct kvp_core *core, struct pool_state *pool)
{
    bool more = false;
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_pool_reclaim(core->ledger, pool->id, core->config.reclaim_slice, &more);
    if (status == KVP_OK) {
        kvp_txn_commit(core->ledger);
    } else {
        kvp_txn_abort(core->ledger);
        core_log(core, 2, "pages of pool %s can not be reclaimed: %s", pool->spec->name, kvp_status_name(status));
    }
    pool->reclaim_due = status == KVP_OK && more;
    if (pool->reclaim_due)
        core_due(core, core->now_ms);
    core_wake(core, WAIT_RECLAIM, pool->id.slot);
}

void core_pool_tick(struct kvp_core *core, struct pool_state *pool)
{
    if (pool->n_pending != 0)
        pending_tick(core, pool);
    core_pins_tick(core, pool);
    retiring_tick(core, pool);
    if (pool->reclaim_due)
        core_reclaim_slice(core, pool);
}

/* ---- the end of a timeline --------------------------------------------------------------------------------------- */

/*
 * Streams of others may wait for values that are not known here: so the value moves by more than any distance between a
 * value awaited and the one reached, and the next owner of the timeline goes on from there.
 */
#define TIMELINE_LEAP (1ull << 32)

void core_timelines_end(struct kvp_core *core, struct pool_state *pool, uint32_t attachment, uint32_t first, uint32_t n)
{
    pending_cancel(core, pool, attachment);
    for (uint32_t k = first; k < first + n; k++) {
        struct kvp_timeline *timeline = &pool->timelines[attachment * KVP_TIMELINES_MAX + k];
        uint64_t value = __atomic_load_n(&timeline->value, __ATOMIC_ACQUIRE);
        kvp_timeline_lose(timeline, value, value + TIMELINE_LEAP, (uint64_t)-KVP_ESESSION);
        __atomic_store_n(&timeline->value, value + TIMELINE_LEAP, __ATOMIC_RELEASE);
    }
}
