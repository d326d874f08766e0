/**
 * What calls over sequences have in common: handles checked and looked at, owners, `after` values, owed copies, and the
 * texts of what the ledger refuses.
 *
 * A batch is checked whole before anything changes. Words are folded first, so that every check sees the written tokens
 * as they are now. A sequence whose job has told its end on its timeline, but not yet here, makes the call wait for
 * that: so who saw the timeline sees the tokens.
 */
#include "op.h"

#include <stdio.h>

enum kvp_status core_length_check(struct kvp_core *core, const char *what, size_t n, size_t expected)
{
    if (n == expected)
        return KVP_OK;
    return core_refuse(core, KVP_EINVAL, "%s: %zu entries, must be as many as sequences: %zu", what, n, expected);
}

bool core_rows_left(const struct kvp_core *core, const struct pool_state *pool)
{
    struct kvp_pool_view view;
    return kvp_pool_get(core->ledger, pool->id, &view) == KVP_OK &&
           view.open_sequences + view.retiring_sequences + view.cache.pins < pool->spec->max_sequences;
}

enum kvp_status core_seq_refuse(struct kvp_core *core, const struct pool_state *pool, enum kvp_status status,
                                const char *what, size_t i, uint64_t handle)
{
    unsigned long long h = handle;
    switch (status) {
    case KVP_ESTALE:
        return core_refuse(core, status, "%s[%zu]: %#llx is no open sequence of pool \"%s\"", what, i, h,
                           pool->spec->name);
    case KVP_EBUSY:
        return core_refuse(core, status, "%s[%zu]: %#llx has an Append under way, or its owner has ended", what, i, h);
    case KVP_ELIMIT:
        if (core_rows_left(core, pool))
            return core_refuse(core, status,
                               "%s[%zu]: %#llx: the call changes more than the %u words of one transaction; ask for "
                               "fewer pages at a time",
                               what, i, h, KVP_TXN_STORES_MAX);
        return core_refuse(core, status, "%s[%zu]: %#llx: all %u rows of pool \"%s\" are in use", what, i, h,
                           pool->spec->max_sequences, pool->spec->name);
    default:
        return core_refuse(core, status, "%s[%zu]: %#llx: %s", what, i, h, kvp_status_text(status));
    }
}

enum kvp_status core_given_check(struct kvp_core *core, size_t i, const struct kvp_seq_view *view)
{
    if (view->pending_tokens == 0)
        return KVP_OK;
    return core_refuse(core, KVP_EBUSY, "seqs[%zu]: %#llx waits for what its giver's stream still writes", i,
                       (unsigned long long)ID_WORD(view->id));
}

enum kvp_status core_made_and_closed(struct kvp_core *core, size_t i, uint64_t key)
{
    return core_refuse(core, KVP_ESTALE, "keys[%zu]: %llu was opened by this call before, and was closed since", i,
                       (unsigned long long)key);
}

enum kvp_status core_refuse_or_wait(struct kvp_core *core, struct turn *turn, const struct pool_state *pool,
                                    enum kvp_status status, const char *what, size_t i, uint64_t handle)
{
    if (status == KVP_ELIMIT && pool->reclaim_due)
        return core_wait(core, turn, WAIT_RECLAIM, pool->id.slot);
    return core_seq_refuse(core, pool, status, what, i, handle);
}

enum kvp_status core_short(struct kvp_core *core, struct turn *turn, const struct pool_state *pool, uint32_t wanted)
{
    unsigned long long missing = core->error_missing;
    if (pool->reclaim_due)
        return core_wait(core, turn, WAIT_RECLAIM, pool->id.slot);
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        struct kvp_tenant_view tenant;
        if (kvp_tenant_at(core->ledger, pool->id, i, &tenant) == KVP_OK && tenant.id == turn->session.spec.tenant &&
            tenant.quota_pages != 0 && (uint64_t)tenant.pages + wanted > tenant.quota_pages)
            return core_refuse(core, KVP_ENOPAGES, "tenant %u has a quota of %u pages in pool \"%s\": %llu are missing",
                               tenant.id, tenant.quota_pages, pool->spec->name, missing);
    }
    return core_refuse(core, KVP_ENOPAGES, "pool \"%s\" is short of %llu pages", pool->spec->name, missing);
}

enum kvp_status core_reclaimed(struct kvp_core *core, struct turn *turn, struct pool_state *pool)
{
    if (pool->reclaim_due)
        core_reclaim_slice(core, pool);
    return pool->reclaim_due ? core_wait(core, turn, WAIT_RECLAIM, pool->id.slot) : KVP_OK;
}

enum kvp_status core_reclaimed_for(struct kvp_core *core, struct turn *turn, struct pool_state *pool, uint64_t pages)
{
    struct kvp_pool_view view;
    if (!pool->reclaim_due || kvp_pool_get(core->ledger, pool->id, &view) != KVP_OK || pages <= view.free_pages)
        return KVP_OK;
    return core_reclaimed(core, turn, pool);
}

/* ---- attachments ------------------------------------------------------------------------------------------------- */

enum kvp_status core_attachment(struct kvp_core *core, struct turn *turn, struct pool_state *pool, bool make,
                                uint32_t *ret_attachment)
{
    struct kvp_session_id session = turn->session.id;
    enum kvp_status status = kvp_attachment_of(core->ledger, pool->id, session, ret_attachment);
    if (status == KVP_ENOENT && make) {
        TRY(core_tenant_check(core, turn, pool));
        status = kvp_attach(core->ledger, pool->id, session, KVP_NONE, ret_attachment);
        if (status == KVP_ELIMIT)
            return core_refuse(core, status, "pool: \"%s\" has %d sessions attached, the most there may be",
                               pool->spec->name, KVP_ATTACHMENTS_MAX);
    }
    if (status == KVP_ENOENT)
        return core_refuse(core, status, "pool: this session is not attached to \"%s\"", pool->spec->name);
    return status == KVP_OK ? KVP_OK : core_refuse_plain(core, status, "the session's attachment");
}

enum kvp_status core_tenant_check(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool)
{
    if (pool->spec->block_hash != KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3)
        return KVP_OK;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        struct kvp_tenant_view tenant;
        if (kvp_tenant_at(core->ledger, pool->id, i, &tenant) == KVP_OK && tenant.id != turn->session.spec.tenant)
            return core_refuse(core, KVP_EPERM,
                               "pool: \"%s\" hashes blocks by XXH3, and so is tenant %u's alone; this session is of %u",
                               pool->spec->name, tenant.id, turn->session.spec.tenant);
    }
    return KVP_OK;
}

/* ---- batches ----------------------------------------------------------------------------------------------------- */

static enum kvp_status check_tenant(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                    const struct kvp_seq_view *view, const char *what, size_t i)
{
    struct kvp_attachment_view owner;
    struct kvp_session_view session;
    TRY(kvp_attachment_get(core->ledger, pool->id, view->attachment, &owner));
    TRY(kvp_session_get(core->ledger, owner.session, &session));
    if (session.spec.tenant == turn->session.spec.tenant)
        return KVP_OK;
    return core_refuse(core, KVP_EPERM, "%s[%zu]: %#llx belongs to another tenant", what, i,
                       (unsigned long long)ID_WORD(view->id));
}

static enum kvp_status check_one(struct kvp_core *core, struct turn *turn, struct pool_state *pool, const char *what,
                                 size_t i, unsigned flags, uint32_t attachment, const struct kvp_seq_view *view)
{
    unsigned long long handle = ID_WORD(view->id);
    if ((flags & BATCH_OWNED) && view->attachment != attachment)
        return core_refuse(core, KVP_EPERM, "%s[%zu]: %#llx belongs to another session", what, i, handle);
    if (flags & BATCH_TENANT)
        TRY(check_tenant(core, turn, pool, view, what, i));
    if (flags & BATCH_DISTINCT) {
        if (core->mark[view->id.slot] == core->mark_serial)
            return core_refuse(core, KVP_EINVAL, "%s[%zu]: %#llx stands twice", what, i, handle);
        core->mark[view->id.slot] = core->mark_serial;
    }
    bool zeroed = (flags & BATCH_FREE) && view->job != KVP_NONE && core_job_zeroes(core, view->job);
    if (view->job != KVP_NONE && (zeroed || core_job_about_to_end(core, view->job)))
        return core_wait(core, turn, WAIT_JOB, view->job);
    if ((flags & BATCH_FREE) && view->job != KVP_NONE)
        return core_refuse(core, KVP_EBUSY, "%s[%zu]: %#llx has an Append under way", what, i, handle);
    return KVP_OK;
}

static void next_mark(struct kvp_core *core)
{
    if (++core->mark_serial == 0) {
        memset(core->mark, 0, sizeof(core->mark));
        core->mark_serial = 1;
    }
}

enum kvp_status core_batch(struct kvp_core *core, struct turn *turn, struct pool_state *pool, const char *what,
                           size_t n, const uint64_t *handles, unsigned flags, struct kvp_seq_view **ret_views)
{
    if (n == 0 || n > KVP_BATCH_MAX)
        return core_refuse(core, KVP_EINVAL, "%s: %zu handles, must be 1 to %d in a call", what, n, KVP_BATCH_MAX);
    uint32_t attachment = KVP_NONE;
    if (flags & BATCH_OWNED)
        TRY(core_attachment(core, turn, pool, false, &attachment));
    struct kvp_seq_view *views = core_alloc(core, n, sizeof(*views));
    if (views == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    next_mark(core);
    for (size_t i = 0; i < n; i++) {
        enum kvp_status status = kvp_seq_get(core->ledger, pool->id, seq_id(handles[i]), &views[i]);
        if (status != KVP_OK)
            return core_seq_refuse(core, pool, status, what, i, handles[i]);
        TRY(check_one(core, turn, pool, what, i, flags, attachment, &views[i]));
    }
    TRY(core_fold(core, pool, views, (uint32_t)n));
    *ret_views = views;
    return KVP_OK;
}

/* ---- after ------------------------------------------------------------------------------------------------------- */

enum kvp_status core_after(struct kvp_core *core, const struct pool_state *pool, uint32_t attachment, size_t n,
                           size_t n_timelines, const uint32_t *timelines, size_t n_values, const uint64_t *values,
                           struct kvp_after **ret_after)
{
    struct kvp_after *after = core_alloc(core, n, sizeof(*after));
    if (after == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    if (n_timelines != n_values || (n_values > 1 && n_values != n))
        return core_refuse(core, KVP_EINVAL,
                           "after: %zu timelines and %zu values, must be none, one pair, or one a sequence: %zu",
                           n_timelines, n_values, n);
    *ret_after = after;
    if (pool->host)
        return KVP_OK;
    for (size_t i = 0; i < n_values; i++) {
        if (timelines[i] / KVP_TIMELINES_MAX != attachment)
            return core_refuse(core, KVP_EINVAL, "after_timelines[%zu]: %u, this session's are %u to %u", i,
                               timelines[i], attachment * KVP_TIMELINES_MAX,
                               attachment * KVP_TIMELINES_MAX + KVP_TIMELINES_MAX - 1);
    }
    for (size_t i = 0; i < n && n_values != 0; i++)
        after[i] = (struct kvp_after){timelines[n_values == 1 ? 0 : i], values[n_values == 1 ? 0 : i]};
    return KVP_OK;
}

/* ---- owed copies ------------------------------------------------------------------------------------------------- */

enum kvp_status core_copies(struct kvp_core *core, const struct kvp_seq_view *views, size_t n,
                            struct copies *ret_copies)
{
    size_t first = 0;
    while (first < n && views[first].copy.tokens == 0)
        first++;
    memset(ret_copies, 0, sizeof(*ret_copies));
    if (first == n)
        return KVP_OK;
    size_t most = n - first;
    ret_copies->seqs = core_alloc(core, most, sizeof(*ret_copies->seqs));
    ret_copies->sources = core_alloc(core, most, 3 * sizeof(*ret_copies->sources));
    if (ret_copies->seqs == NULL || ret_copies->sources == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    ret_copies->destinations = ret_copies->sources + most;
    ret_copies->tokens = ret_copies->destinations + most;
    for (size_t i = first; i < n; i++) {
        if (views[i].copy.tokens == 0)
            continue;
        size_t k = ret_copies->n++;
        ret_copies->seqs[k] = ID_WORD(views[i].id);
        ret_copies->sources[k] = views[i].copy.source;
        ret_copies->destinations[k] = views[i].copy.destination;
        ret_copies->tokens[k] = views[i].copy.tokens;
    }
    return KVP_OK;
}

/* ---- replies ----------------------------------------------------------------------------------------------------- */

enum kvp_status core_publish_views(struct kvp_core *core, struct pool_state *pool, struct kvp_seq_view *views, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        TRY(kvp_seq_get(core->ledger, pool->id, views[i].id, &views[i]));
        core_publish_view(core, pool, &views[i]);
    }
    return KVP_OK;
}

enum kvp_status core_columns(struct kvp_core *core, const struct kvp_seq_view *views, size_t n,
                             struct columns *ret_columns)
{
    ret_columns->seqs = core_alloc(core, n, sizeof(uint64_t));
    ret_columns->reserved = core_alloc(core, n, 3 * sizeof(uint32_t));
    if (ret_columns->seqs == NULL || ret_columns->reserved == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    ret_columns->written = ret_columns->reserved + n;
    ret_columns->versions = ret_columns->written + n;
    for (size_t i = 0; i < n; i++) {
        ret_columns->seqs[i] = ID_WORD(views[i].id);
        ret_columns->reserved[i] = views[i].reserved;
        ret_columns->written[i] = views[i].written;
        ret_columns->versions[i] = views[i].version;
    }
    return KVP_OK;
}
