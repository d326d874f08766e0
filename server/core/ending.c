/**
 * How sessions end, and when a dead one's memory comes back.
 *
 *   OPEN ── end-of-file, pidfd, lease, CloseSession ──► ENDING ── every attachment released ──► gone
 *
 *   an attachment of an ENDING session:
 *     quarantine ── quiet ──► its timelines end, its last words are folded ──► released, a slice a tick
 *                                                            durable sequences stay until linger_ms is over, or claimed
 *
 * Quiet means that nothing writes its pages any more:
 *   it mapped nothing (no Attach)        at once
 *   the pool's memory is lost            at once
 *   a host pool                          its pidfd fired
 *   a GPU's                              its pidfd fired, and NVML, which listed the process while it lived, lists it
 *                                        no more in a listing asked for after that
 *   a session by lease that attached     when ReleaseQuarantine says so: nothing here proves who mapped the pool
 *   one that others have joined          as before, and each of them has detached, or is as quiet
 * What it was given by a transfer that waits for its giver's value is written by another: it is released after that.
 */
#include "op.h"

#define LISTING_MS        5u     /* between listings while a dead session waits for one */
#define ASK_SEEN_MS       500u   /* between the first questions whether NVML lists a process */
#define ASK_SEEN_LATER_MS 30000u /* … and after that */
#define ASK_SEEN_OFTEN    20u
#define QUARANTINE_SAY_MS 10000u /* NVML lists a dead process for so long: it is said */
#define RELEASE_SLICE     256u   /* sequences a tick and attachment */

/* ---- leases ------------------------------------------------------------------------------------------------------ */

void core_lease_renew(struct kvp_core *core, const struct kvp_session_view *session)
{
    if (session->spec.kind != KVP_SESSION_LEASE)
        return;
    uint64_t until = core->now_ms + session->spec.lease_ms;
    core->sessions[session->id.slot].lease_until_ms = until;
    if (until < core->lease_check_ms) {
        core->lease_check_ms = until;
        core_due(core, until);
    }
}

uint32_t core_lease_left(const struct kvp_core *core, uint32_t slot)
{
    uint64_t until = core->sessions[slot].lease_until_ms;
    return until > core->now_ms ? (uint32_t)(until - core->now_ms) : 0;
}

static void leases_tick(struct kvp_core *core)
{
    if (core->lease_check_ms > core->now_ms) {
        core_due(core, core->lease_check_ms);
        return;
    }
    core->lease_check_ms = NEVER;
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(core->ledger, slot, &view) != KVP_OK || view.state != KVP_SESSION_OPEN ||
            view.spec.kind != KVP_SESSION_LEASE)
            continue;
        uint64_t until = core->sessions[slot].lease_until_ms;
        if (until <= core->now_ms) {
            core_log(core, 5, "the lease of session %llx (name %s) has ended", (unsigned long long)ID_WORD(view.id),
                     view.spec.name);
            core_session_end(core, view.id);
        } else if (until < core->lease_check_ms) {
            core->lease_check_ms = until;
        }
    }
    core_due(core, core->lease_check_ms);
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

static void session_gone(struct kvp_core *core, struct kvp_session_id session)
{
    struct session_state *state = &core->sessions[session.slot];
    core_buffers_drop(core, session);
    free(state->buffers);
    memset(state, 0, sizeof(*state));
}

void core_session_end(struct kvp_core *core, struct kvp_session_id session)
{
    struct kvp_session_view view;
    uint32_t pools = 0, sequences = 0;
    if (kvp_session_get(core->ledger, session, &view) != KVP_OK || view.state != KVP_SESSION_OPEN)
        return;
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        struct kvp_attachment_view attached;
        uint32_t attachment;
        if (pool->id.generation == 0 || kvp_attachment_of(core->ledger, pool->id, session, &attachment) != KVP_OK)
            continue;
        core_fold_attachment(core, pool, attachment);
        pools++;
        if (kvp_attachment_get(core->ledger, pool->id, attachment, &attached) == KVP_OK)
            sequences += attached.sequences;
    }
    if (pools > 0)
        core_log(core, 6, "session %llx (pid %u, name %s) has ended: it had %u sequences, in %u pools",
                 (unsigned long long)ID_WORD(session), view.spec.pid, view.spec.name, sequences, pools);
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_session_end(core->ledger, session);
    CORE_ASSERT(status == KVP_OK);
    kvp_txn_commit(core->ledger);
    if (kvp_session_get(core->ledger, session, &view) != KVP_OK) {
        session_gone(core, session);
        return;
    }
    core->ending++;
    core_due(core, core->now_ms);
}

static bool known(const struct kvp_core *core, struct kvp_session_id session)
{
    return session.slot < KVP_SESSIONS_MAX && session.generation != 0 &&
           core->sessions[session.slot].generation == session.generation;
}

void kvp_core_disconnected(struct kvp_core *core, struct kvp_session_id session)
{
    if (!known(core, session))
        return;
    core->sessions[session.slot].connected = false;
    core_session_end(core, session);
    core_settle(core);
}

void kvp_core_process_ended(struct kvp_core *core, struct kvp_session_id session)
{
    if (!known(core, session))
        return;
    core->sessions[session.slot].process_ended = true;
    core->sessions[session.slot].listing = core->listings + 1;
    core_session_end(core, session);
    core_due(core, core->now_ms);
    core_settle(core);
}

/* ---- quiet ------------------------------------------------------------------------------------------------------- */

static bool listed(const struct executor *executor, uint32_t pid)
{
    for (uint32_t i = 0; i < executor->n_pids; i++) {
        if (executor->pids[i] == pid)
            return true;
    }
    return false;
}

/* Its own process writes no more. */
static bool gone(const struct kvp_core *core, const struct pool_state *pool, uint32_t attachment)
{
    const struct attachment_state *state = &pool->attachments[attachment];
    struct kvp_attachment_view view;
    struct kvp_session_view session;
    if (!state->mapped || state->forced || state->released)
        return true;
    if (kvp_attachment_get(core->ledger, pool->id, attachment, &view) != KVP_OK ||
        kvp_session_get(core->ledger, view.session, &session) != KVP_OK)
        return true;
    const struct session_state *process = &core->sessions[view.session.slot];
    if (session.spec.kind != KVP_SESSION_SOCKET || !process->process_ended)
        return false;
    if (pool->host)
        return true;
    if (!view.nvml_seen)
        return false;
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        const struct executor *executor = &core->executors[pool->slabs[rank].executor];
        if (!executor->listing_known || executor->listing < process->listing || listed(executor, session.spec.pid))
            return false;
    }
    return true;
}

/* The ranks of the group that it leads write its sequences' pages, too. */
static bool ranks_gone(const struct kvp_core *core, const struct pool_state *pool, uint32_t attachment)
{
    for (uint32_t i = 0; pool->joined != 0 && i < KVP_ATTACHMENTS_MAX; i++) {
        struct kvp_attachment_view view;
        if (i != attachment && kvp_attachment_get(core->ledger, pool->id, i, &view) == KVP_OK &&
            view.leader == attachment && !gone(core, pool, i))
            return false;
    }
    return true;
}

bool core_attachment_quiet(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    const struct attachment_state *state = &pool->attachments[attachment];
    struct kvp_pool_view in_ledger;
    if (state->forced || state->released)
        return true;
    if (kvp_pool_get(core->ledger, pool->id, &in_ledger) == KVP_OK && in_ledger.state == KVP_POOL_LOST)
        return true;
    return gone(core, pool, attachment) && ranks_gone(core, pool, attachment);
}

/* Have the devices of a pool listed, so that a process may be proven quiet, or seen. */
static void ask_listings(struct kvp_core *core, const struct pool_state *pool)
{
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        uint32_t executor;
        if (core_exec_need(core, pool->slabs[rank].device, &executor) == KVP_OK)
            core_exec_ask_listing(core, executor);
    }
}

static void mark_seen(struct kvp_core *core, struct pool_state *pool, const struct executor *executor)
{
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        struct kvp_attachment_view view;
        struct kvp_session_view session;
        if (!pool->attachments[i].mapped || kvp_attachment_get(core->ledger, pool->id, i, &view) != KVP_OK ||
            view.state != KVP_ATTACHMENT_LIVE || view.nvml_seen ||
            kvp_session_get(core->ledger, view.session, &session) != KVP_OK || !listed(executor, session.spec.pid))
            continue;
        kvp_txn_begin(core->ledger);
        if (kvp_attachment_set_nvml_seen(core->ledger, pool->id, i) == KVP_OK)
            kvp_txn_commit(core->ledger);
        else
            kvp_txn_abort(core->ledger);
        pool->attachments[i].ask_nvml_ms = NEVER;
    }
}

void core_listing_arrived(struct kvp_core *core, uint32_t executor)
{
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        bool serves = false;
        for (uint32_t rank = 0; rank < pool->n_slabs; rank++)
            serves |= pool->slabs[rank].executor == executor;
        if (pool->id.generation != 0 && !pool->host && serves)
            mark_seen(core, pool, &core->executors[executor]);
    }
    if (core->ending != 0)
        core_due(core, core->now_ms);
}

/* Did NVML list the processes that map GPU pools? It must have, while they live, for its silence to mean anything. */
static void seen_tick(struct kvp_core *core)
{
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        if (pool->id.generation == 0 || pool->host)
            continue;
        for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
            struct attachment_state *state = &pool->attachments[i];
            if (!state->mapped || state->ask_nvml_ms == NEVER)
                continue;
            if (state->ask_nvml_ms <= core->now_ms) {
                ask_listings(core, pool);
                state->ask_nvml_ms =
                    core->now_ms + (++state->nvml_asks < ASK_SEEN_OFTEN ? ASK_SEEN_MS : ASK_SEEN_LATER_MS);
            }
            core_due(core, state->ask_nvml_ms);
        }
    }
}

uint64_t core_attachment_pages(const struct kvp_core *core, const struct pool_state *pool, uint32_t attachment)
{
    uint64_t pages = 0;
    uint32_t slot = kvp_attachment_first(core->ledger, pool->id, attachment);
    for (; slot != KVP_NONE; slot = kvp_attachment_next(core->ledger, pool->id, slot)) {
        struct kvp_seq_view view;
        if (kvp_seq_at(core->ledger, pool->id, slot, &view) == KVP_OK)
            pages += view.row_pages;
    }
    return pages;
}

/* ---- release ----------------------------------------------------------------------------------------------------- */

void core_joined_count(struct kvp_core *core, struct pool_state *pool)
{
    pool->joined = 0;
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        struct kvp_attachment_view view;
        if (kvp_attachment_get(core->ledger, pool->id, i, &view) == KVP_OK && (view.leader != i || view.lacking != 0))
            pool->joined++;
    }
}

void core_fold_last_words(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    struct kvp_attachment_view view;
    core_fold_attachment(core, pool, attachment);
    if (kvp_attachment_get(core->ledger, pool->id, attachment, &view) == KVP_OK && view.leader != attachment)
        core_fold_attachment(core, pool, view.leader);
}

void core_attachment_gone(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    struct attachment_state *state = &pool->attachments[attachment];
    if (state->progress != NULL)
        core->act->thing_drop(core->ctx, (struct kvp_thing){KVP_THING_PROGRESS, pool->id.slot, attachment});
    memset(state, 0, sizeof(*state));
    core_joined_count(core, pool);
    if (core->ending != 0)
        core_due(core, core->now_ms);
}

/* The sequences that the next slice of release will take. */
static uint32_t next_slice(struct kvp_core *core, struct pool_state *pool, uint32_t attachment, bool with_durable,
                           uint32_t ret_slots[RELEASE_SLICE])
{
    uint32_t n = 0, slot = kvp_attachment_first(core->ledger, pool->id, attachment);
    for (; slot != KVP_NONE && n < RELEASE_SLICE; slot = kvp_attachment_next(core->ledger, pool->id, slot)) {
        struct kvp_seq_view view;
        if (kvp_seq_at(core->ledger, pool->id, slot, &view) == KVP_OK && view.job == KVP_NONE &&
            (with_durable || !view.durable))
            ret_slots[n++] = slot;
    }
    return n;
}

static void release_slice(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    uint64_t linger_until_ms = pool->attachments[attachment].linger_until_ms;
    bool with_durable = core->now_ms >= linger_until_ms;
    uint32_t slots[RELEASE_SLICE], left = 0;
    uint32_t n = next_slice(core, pool, attachment, with_durable, slots);
    kvp_txn_begin(core->ledger);
    enum kvp_status status =
        kvp_attachment_release(core->ledger, pool->id, attachment, with_durable, RELEASE_SLICE, &left);
    if (status != KVP_OK) {
        kvp_txn_abort(core->ledger);
        core_log(core, 2, "attachment %u of pool %s can not be released: %s", attachment, pool->spec->name,
                 kvp_status_name(status));
        return;
    }
    kvp_txn_commit(core->ledger);
    for (uint32_t i = 0; i < n; i++)
        core_publish_seq(core, pool, slots[i]);
    struct kvp_attachment_view view;
    bool gone = kvp_attachment_get(core->ledger, pool->id, attachment, &view) != KVP_OK;
    if (n != 0 || gone) {
        pool->reclaim_due = true;
        core_due(core, core->now_ms);
    }
    if (gone)
        core_attachment_gone(core, pool, attachment);
    else if (!with_durable)
        core_due(core, linger_until_ms);
    else if (left != 0 && core->open_jobs == 0)
        core_due(core, core->now_ms);
}

/* A quarantine that an operator has to end, or that lasts, is said once. */
static void say_quarantine(struct kvp_core *core, struct pool_state *pool, const struct kvp_session_view *session,
                           uint32_t attachment, bool nvml_seen)
{
    struct attachment_state *state = &pool->attachments[attachment];
    bool lease = session->spec.kind == KVP_SESSION_LEASE, itself_gone = gone(core, pool, attachment);
    unsigned long long id = ID_WORD(session->id);
    if (state->quarantined_ms == 0)
        state->quarantined_ms = core->now_ms;
    if (state->quarantine_said || (!lease && nvml_seen && core->now_ms - state->quarantined_ms < QUARANTINE_SAY_MS))
        return;
    state->quarantine_said = true;
    core_log(core, 4,
             "pool %s: %llu pages of session %llx (pid %u) stay in quarantine: %s. If nothing of it runs any more: "
             "kvpool quarantine release %s %llx",
             pool->spec->name, (unsigned long long)core_attachment_pages(core, pool, attachment), id, session->spec.pid,
             lease         ? "it was by lease, which proves no process's end"
             : itself_gone ? "its process ended, and a rank that joined it is not gone"
             : nvml_seen   ? "its process ended, and NVML still lists it"
                           : "its process ended, and NVML had not listed it before",
             pool->spec->name, id);
}

/* An attachment of a dead session for which something may still write. */
static void wait_for_quiet(struct kvp_core *core, struct pool_state *pool, struct kvp_session_id session,
                           uint32_t attachment)
{
    bool ended = core->sessions[session.slot].process_ended;
    struct kvp_attachment_view view;
    struct kvp_session_view dead;
    if (kvp_attachment_get(core->ledger, pool->id, attachment, &view) != KVP_OK ||
        kvp_session_get(core->ledger, session, &dead) != KVP_OK)
        return;
    if (dead.spec.kind == KVP_SESSION_LEASE || (ended && !pool->host))
        say_quarantine(core, pool, &dead, attachment, view.nvml_seen);
    if (!pool->host && ended && view.nvml_seen && !gone(core, pool, attachment)) {
        ask_listings(core, pool);
        core_due(core, core->now_ms + LISTING_MS);
    }
}

/* Does a living giver still write into what the dead session was given? Its word on that comes with the next ms. */
static bool still_written(struct kvp_core *core, const struct pool_state *pool, uint32_t attachment)
{
    if (kvp_pool_live(core->ledger, pool->id) != KVP_OK)
        return false;
    for (uint32_t i = 0; i < pool->n_pending; i++) {
        struct kvp_seq_view view;
        if (kvp_seq_at(core->ledger, pool->id, pool->pending[i], &view) == KVP_OK && view.state == KVP_SEQ_OPEN &&
            view.pending_tokens != 0 && view.attachment == attachment)
            return true;
    }
    return false;
}

static void attachment_tick(struct kvp_core *core, struct pool_state *pool, struct kvp_session_id session,
                            uint32_t attachment)
{
    struct attachment_state *state = &pool->attachments[attachment];
    if (!core_attachment_quiet(core, pool, attachment)) {
        wait_for_quiet(core, pool, session, attachment);
        return;
    }
    if (!state->silenced) {
        core_fold_attachment(core, pool, attachment);
        core_timelines_end(core, pool, attachment, 1, KVP_TIMELINES_MAX - 1);
        state->silenced = true;
    }
    if (!state->released && core_session_has_jobs(core, session))
        return; /* an executor still writes the first timeline; the job's end makes this due */
    if (!state->released) {
        core_fold_last_words(core, pool, attachment);
        core_timelines_end(core, pool, attachment, 0, 1);
        state->linger_until_ms = core->now_ms + pool->spec->linger_ms;
        state->released = true;
    }
    if (still_written(core, pool, attachment))
        core_due(core, core->now_ms + 1);
    else
        release_slice(core, pool, attachment);
}

static void ending_tick(struct kvp_core *core, struct kvp_session_id session)
{
    if (!core_session_has_jobs(core, session))
        core_buffers_drop(core, session);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        uint32_t attachment;
        if (pool->id.generation != 0 && pool->table != NULL &&
            kvp_attachment_of(core->ledger, pool->id, session, &attachment) == KVP_OK)
            attachment_tick(core, pool, session, attachment);
    }
}

void core_sessions_tick(struct kvp_core *core)
{
    leases_tick(core);
    if (!core->host)
        seen_tick(core);
    if (core->ending == 0)
        return;
    core->ending = 0;
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(core->ledger, slot, &view) != KVP_OK || view.state != KVP_SESSION_ENDING)
            continue;
        struct kvp_session_id id = view.id;
        ending_tick(core, id);
        if (kvp_session_get(core->ledger, id, &view) == KVP_OK)
            core->ending++;
        else
            session_gone(core, id);
    }
}
