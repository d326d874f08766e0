/**
 * Operations: what there is (GetStats), whether the ledger is sound (Audit), and the operator's word that a dead writer
 * is gone where nothing here can prove it (ReleaseQuarantine).
 */
#include "op.h"

#include <stdio.h>

/* ---- GetStats ---------------------------------------------------------------------------------------------------- */

static enum kvp_status stat_pools(struct kvp_core *core, Kvpool__V1__GetStatsReply *reply)
{
    Kvpool__V1__PoolInfo *infos = core_alloc(core, KVP_POOLS_MAX, sizeof(*infos));
    reply->pools = core_alloc(core, KVP_POOLS_MAX, sizeof(*reply->pools));
    if (infos == NULL || reply->pools == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        if (pool->id.generation == 0 || pool->table == NULL)
            continue;
        TRY(core_pool_info(core, pool, &infos[reply->n_pools]));
        reply->pools[reply->n_pools] = &infos[reply->n_pools];
        reply->n_pools++;
    }
    return KVP_OK;
}

static uint32_t sequences_of(const struct kvp_core *core, struct kvp_session_id session)
{
    uint32_t n = 0;
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct kvp_attachment_view view;
        uint32_t attachment;
        if (core->pools[slot].id.generation != 0 &&
            kvp_attachment_of(core->ledger, core->pools[slot].id, session, &attachment) == KVP_OK &&
            kvp_attachment_get(core->ledger, core->pools[slot].id, attachment, &view) == KVP_OK)
            n += view.sequences;
    }
    return n;
}

static enum kvp_status stat_sessions(struct kvp_core *core, Kvpool__V1__GetStatsReply *reply)
{
    Kvpool__V1__SessionInfo *infos = core_alloc(core, KVP_SESSIONS_MAX, sizeof(*infos));
    char(*names)[32] = core_alloc(core, KVP_SESSIONS_MAX, sizeof(*names));
    reply->sessions = core_alloc(core, KVP_SESSIONS_MAX, sizeof(*reply->sessions));
    if (infos == NULL || names == NULL || reply->sessions == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(core->ledger, slot, &view) != KVP_OK)
            continue;
        Kvpool__V1__SessionInfo *info = &infos[reply->n_sessions];
        kvpool__v1__session_info__init(info);
        memcpy(names[reply->n_sessions], view.spec.name, sizeof(view.spec.name));
        info->name = names[reply->n_sessions];
        info->session_id = ID_WORD(view.id);
        info->pid = view.spec.pid;
        info->uid = view.spec.uid;
        info->lease = view.spec.kind == KVP_SESSION_LEASE;
        info->lease_left_ms = info->lease ? core_lease_left(core, slot) : 0;
        info->ending = view.state == KVP_SESSION_ENDING;
        info->sequences = sequences_of(core, view.id);
        info->attachments = view.attachments;
        reply->sessions[reply->n_sessions++] = info;
    }
    return KVP_OK;
}

static enum kvp_status stat_executors(struct kvp_core *core, Kvpool__V1__GetStatsReply *reply)
{
    Kvpool__V1__ExecutorInfo *infos = core_alloc(core, KVP_GPUS_MAX, sizeof(*infos));
    reply->executors = core_alloc(core, KVP_GPUS_MAX, sizeof(*reply->executors));
    if (infos == NULL || reply->executors == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (uint32_t slot = 0; slot < KVP_GPUS_MAX; slot++) {
        struct executor *executor = &core->executors[slot];
        if (!executor->used)
            continue;
        Kvpool__V1__ExecutorInfo *info = &infos[reply->n_executors];
        kvpool__v1__executor_info__init(info);
        info->device = executor->device;
        info->backend = executor->backend;
        info->pid = executor->pid;
        info->starts = executor->starts;
        info->jobs_done = executor->jobs_done;
        for (uint32_t i = 0; core->open_jobs != 0 && i < KVP_JOBS_MAX; i++)
            info->jobs += core->jobs[i].id.generation != 0 && core->jobs[i].executor == slot;
        reply->executors[reply->n_executors++] = info;
    }
    return KVP_OK;
}

enum kvp_status call_get_stats(struct kvp_core *core, struct turn *turn)
{
    Kvpool__V1__GetStatsReply reply = KVPOOL__V1__GET_STATS_REPLY__INIT;
    struct kvp_uuid instance = kvp_ledger_instance(core->ledger);
    reply.version = (char *)core->config.version;
    reply.epoch = kvp_ledger_epoch(core->ledger);
    reply.adoptions = (uint32_t)(reply.epoch - 1);
    reply.instance = (ProtobufCBinaryData){sizeof(instance.bytes), instance.bytes};
    reply.uptime_ms = core->now_ms - core->started_ms;
    reply.backend = (char *)core->config.backend;
    reply.last_pause_us = core->pause_us;
    reply.last_pause_unix_ms = core->pause_unix_ms;
    reply.calls = core->counts.calls;
    reply.calls_failed = core->counts.calls_failed;
    reply.keeper = core->keeper;
    reply.audits = core->audit.done;
    reply.last_audit_unix_ms = core->audit.report.unix_ms;
    reply.last_audit_ms = (uint32_t)(core->audit.over_ms - core->audit.began_ms);
    reply.last_audit_violations = core->audit.report.violations;
    TRY(stat_pools(core, &reply));
    TRY(stat_sessions(core, &reply));
    TRY(stat_executors(core, &reply));
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- Audit ------------------------------------------------------------------------------------------------------- */

/* What a reply points to, while it is sent. */
struct audit_texts {
    char *violations[KVP_VIOLATIONS_SHOWN];
    char damage[KVP_VIOLATIONS_SHOWN][KVP_NAME_BYTES_MAX + 64];
    char *pools[DIGEST_DAMAGED_MAX];
    uint32_t pages[DIGEST_DAMAGED_MAX];
};

static const char *name_of(const struct kvp_core *core, struct kvp_pool_id id)
{
    const struct pool_state *pool = &core->pools[id.slot];
    return pool->id.generation == id.generation ? pool->spec->name : ""; /* it was deleted since */
}

static void tell_damage(struct kvp_core *core, struct audit_texts *texts, Kvpool__V1__AuditReply *reply)
{
    const struct digest_check *check = &core->digests.check;
    size_t shown = check->damaged < DIGEST_DAMAGED_MAX ? check->damaged : DIGEST_DAMAGED_MAX;
    reply->pages_checked = check->checked;
    reply->pages_without_digest = check->missing;
    reply->pages_damaged = check->damaged;
    reply->n_damaged_pools = reply->n_damaged_pages = shown;
    reply->damaged_pools = texts->pools;
    reply->damaged_pages = texts->pages;
    for (size_t i = 0; i < shown; i++) {
        texts->pools[i] = (char *)name_of(core, check->pages[i].pool);
        texts->pages[i] = check->pages[i].page;
        if (reply->n_violations == KVP_VIOLATIONS_SHOWN)
            continue;
        char *text = texts->damage[reply->n_violations];
        snprintf(text, sizeof(texts->damage[0]), "pool %s page %u: its bytes are not those that were sealed",
                 texts->pools[i], texts->pages[i]);
        texts->violations[reply->n_violations++] = text;
    }
}

/* Of the ledger, and the pages' bytes, as they are now or a little later; the loop goes on meanwhile. */
enum kvp_status call_audit(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__AuditRequest *request = (const Kvpool__V1__AuditRequest *)turn->body;
    Kvpool__V1__AuditReply reply = KVPOOL__V1__AUDIT_REPLY__INIT;
    const struct kvp_audit_report *report = &core->audit.report;
    struct op *op;
    TRY(core_op(core, turn, &op));
    if (op->stage == 0 && request->digests) {
        op->stage = 1;
        return core_wait(core, turn, WAIT_DIGESTS, core_digests_ask(core));
    }
    if (op->stage == 1 && core->digests.check.status != KVP_OK)
        return core_refuse(core, core->digests.check.status, "digests: %s", core->digests.check.text);
    if (op->stage < 2) {
        op->stage = 2;
        return core_wait(core, turn, WAIT_AUDIT, core_audit_ask(core));
    }
    if (report->status != KVP_OK)
        return core_refuse(core, report->status, "no memory for an audit: a copy of %zu bytes of the ledger",
                           kvp_snapshot_bytes(core->ledger));
    struct audit_texts *texts = core_alloc(core, 1, sizeof(*texts));
    if (texts == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (unsigned i = 0; i < report->n_texts; i++)
        texts->violations[i] = (char *)report->texts[i];
    reply.n_violations = report->n_texts;
    reply.violations = texts->violations;
    uint64_t count = report->violations;
    if (request->digests) {
        tell_damage(core, texts, &reply);
        count += reply.pages_damaged;
    }
    reply.clean = count == 0;
    reply.count = count > UINT32_MAX ? UINT32_MAX : (uint32_t)count;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- ReleaseQuarantine ------------------------------------------------------------------------------------------- */

/* @return whether the attachment is of a dead session, and still in quarantine */
static bool in_quarantine(struct kvp_core *core, struct pool_state *pool, uint32_t attachment,
                          struct kvp_session_view *ret_session)
{
    struct kvp_attachment_view view;
    return kvp_attachment_get(core->ledger, pool->id, attachment, &view) == KVP_OK &&
           view.state == KVP_ATTACHMENT_DEAD && !core_attachment_quiet(core, pool, attachment) &&
           kvp_session_get(core->ledger, view.session, ret_session) == KVP_OK;
}

enum kvp_status call_release_quarantine(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__ReleaseQuarantineRequest *request = (const Kvpool__V1__ReleaseQuarantineRequest *)turn->body;
    Kvpool__V1__ReleaseQuarantineReply reply = KVPOOL__V1__RELEASE_QUARANTINE_REPLY__INIT;
    struct pool_state *pool;
    TRY(core_pool_by_name(core, request->pool, &pool));
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        struct kvp_session_view session;
        if (!in_quarantine(core, pool, i, &session) ||
            (request->session_id != 0 && ID_WORD(session.id) != request->session_id))
            continue;
        bool socket = session.spec.kind == KVP_SESSION_SOCKET;
        bool ended = core->sessions[session.id.slot].process_ended;
        if (request->session_id != 0 && socket && !ended)
            return core_refuse(core, KVP_EBUSY, "session_id: process %u of session %#llx still runs", session.spec.pid,
                               (unsigned long long)request->session_id);
        if (request->session_id == 0 && !ended)
            continue;
        pool->attachments[i].forced = true;
        reply.pages += core_attachment_pages(core, pool, i);
        core_log(core, 4, "pool %s: the quarantine of session %llx (pid %u) is released by an operator",
                 pool->spec->name, (unsigned long long)ID_WORD(session.id), session.spec.pid);
    }
    core_due(core, core->now_ms);
    return core_answer(core, turn, &reply.base, NULL, 0);
}
