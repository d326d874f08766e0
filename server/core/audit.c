/**
 * The ledger audited while it is served: a snapshot is taken in slices, and another thread walks it.
 *
 *   IDLE ──due, or asked──► COPYING ──a slice a tick──► READING ──kvp_core_audited──► IDLE
 *                             ▲ └ a pool was made: from the start, in new memory
 *
 * Due is an audit audit_ms after the one before, if the ledger has changed since: a daemon that nobody calls sleeps. An
 * Audit call is answered from a snapshot that is complete after the call came, shared with whoever asked before that.
 *
 * A ledger with violations is served on. What they are is logged, told by Audit and counted in GetStats; the next start
 * will refuse this ledger, so what matters should be moved elsewhere while it can be read.
 */
#include "op.h"

#define SLICE_BYTES ((size_t)64 << 10) /* copied in one tick: some 50 us, page faults included */
#define LOGGED      8

/* It could not be made: over, with that status. */
static void give_up(struct kvp_core *core, enum kvp_status status)
{
    struct audit_state *audit = &core->audit;
    audit->phase = AUDIT_IDLE;
    audit->taken++;
    audit->done = audit->taken;
    audit->changes = core->ledger->changes;
    audit->over_ms = core->now_ms;
    audit->report.status = status;
    core_log(core, 3, "the ledger is not audited: %s", kvp_status_text(status));
    core_wake(core, WAIT_AUDIT, audit->done);
}

static void begin(struct kvp_core *core)
{
    struct audit_state *audit = &core->audit;
    audit->began_ms = core->now_ms;
    audit->memory = core->act->snapshot_make(core->ctx, kvp_snapshot_bytes(core->ledger));
    if (audit->memory == NULL) {
        give_up(core, KVP_ENOMEM);
        return;
    }
    audit->phase = AUDIT_COPYING;
    kvp_snapshot_begin(core->ledger, audit->memory);
}

static void copy_slice(struct kvp_core *core)
{
    struct audit_state *audit = &core->audit;
    struct kvp_ledger snapshot;
    bool taken = false;
    if (kvp_snapshot_step(core->ledger, SLICE_BYTES, &taken, &snapshot) != KVP_OK) {
        core->act->snapshot_drop(core->ctx, audit->memory);
        begin(core);
    }
    if (!taken) {
        core_due(core, core->now_ms);
        return;
    }
    audit->phase = AUDIT_READING;
    audit->memory = NULL;
    audit->taken++;
    audit->changes = core->ledger->changes;
    core->act->snapshot_audit(core->ctx, &snapshot);
}

static bool is_due(const struct kvp_core *core)
{
    const struct audit_state *audit = &core->audit;
    return audit->wanted > audit->taken || (core->config.audit_ms != 0 && core->ledger->changes != audit->changes &&
                                            core->now_ms >= audit->over_ms + core->config.audit_ms);
}

uint64_t core_audit_ask(struct kvp_core *core)
{
    core->audit.wanted = core->audit.taken + 1;
    return core->audit.wanted;
}

void core_audit_tick(struct kvp_core *core)
{
    if (core->audit.phase == AUDIT_IDLE && is_due(core))
        begin(core);
    if (core->audit.phase == AUDIT_COPYING)
        copy_slice(core);
}

void core_audit_settle(struct kvp_core *core)
{
    const struct audit_state *audit = &core->audit;
    if (audit->phase != AUDIT_IDLE || core->adopting != ADOPT_DONE)
        return;
    if (audit->wanted > audit->taken)
        core_due(core, core->now_ms);
    else if (core->config.audit_ms != 0 && core->ledger->changes != audit->changes)
        core_due(core, audit->over_ms + core->config.audit_ms);
}

void kvp_core_audited(struct kvp_core *core, const struct kvp_audit_report *report)
{
    struct audit_state *audit = &core->audit;
    CORE_ASSERT(audit->phase == AUDIT_READING);
    audit->phase = AUDIT_IDLE;
    audit->done = audit->taken;
    audit->over_ms = core->now_ms;
    audit->report = *report;
    for (unsigned i = 0; i < report->n_texts && i < LOGGED; i++)
        core_log(core, 3, "the ledger: %s", report->texts[i]);
    if (report->violations != 0)
        core_log(core, 2,
                 "the audit found %llu violations; the ledger is served on, and will be refused at the next start",
                 (unsigned long long)report->violations);
    core_wake(core, WAIT_AUDIT, audit->done);
    core_settle(core);
}

void core_audit_end(struct kvp_core *core)
{
    if (core->audit.phase != AUDIT_COPYING)
        return;
    kvp_snapshot_give_up(core->ledger);
    core->act->snapshot_drop(core->ctx, core->audit.memory);
}
