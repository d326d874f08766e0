/**
 * Sessions, and the outcomes of their calls.
 *
 *          open              end, attachments left          last attachment released
 *   FREE ───────► OPEN ─────────────────────────► ENDING ────────────────────────────► FREE
 *                   └──── end, no attachment ──────────────────────────────────────────►
 *
 * A session knows its attachment in each pool (attached[]), so that its end is O(attachments). Opening one scans the
 * table of KVP_SESSIONS_MAX: it happens once a process.
 */
#include "internal.h"

#include <string.h>

enum kvp_status find_session(const struct kvp_ledger *ledger, struct kvp_session_id session,
                             const struct block_session **ret_session)
{
    if (session.slot >= KVP_SESSIONS_MAX || session.generation == 0)
        return KVP_ESESSION;
    const struct block_session *record = &sessions_of(ledger)[session.slot];
    if (record->state == KVP_SESSION_FREE || record->generation != session.generation)
        return KVP_ESESSION;
    *ret_session = record;
    return KVP_OK;
}

static void put_spec(struct kvp_ledger *ledger, const struct block_session *record, const struct kvp_session_spec *spec)
{
    uint64_t name[4] = {0};
    memcpy(name, spec->name, strnlen(spec->name, sizeof(name) - 1));
    put32(ledger, &record->kind, spec->kind);
    put32(ledger, &record->uid, spec->uid);
    put32(ledger, &record->gid, spec->gid);
    put32(ledger, &record->pid, spec->pid);
    put32(ledger, &record->tenant, spec->tenant);
    put32(ledger, &record->lease_ms, spec->lease_ms);
    for (int i = 0; i < 2; i++) {
        put64(ledger, &record->token[i], spec->token[i]);
        put64(ledger, &record->resume_secret[i], spec->resume_secret[i]);
    }
    put64(ledger, &record->start_time, spec->start_time);
    for (int i = 0; i < 4; i++)
        put64(ledger, &record->name[i], name[i]);
}

enum kvp_status kvp_session_open(struct kvp_ledger *ledger, const struct kvp_session_spec *spec,
                                 struct kvp_session_id *ret_session)
{
    if (spec->kind != KVP_SESSION_SOCKET && spec->kind != KVP_SESSION_LEASE)
        return KVP_EINVAL;
    const struct block_session *sessions = sessions_of(ledger);
    uint32_t slot = 0;
    while (slot < KVP_SESSIONS_MAX && sessions[slot].state != KVP_SESSION_FREE)
        slot++;
    if (slot == KVP_SESSIONS_MAX)
        return KVP_ELIMIT;
    TRY(txn_room(ledger, ROOM_SMALL));
    const struct block_session *record = &sessions[slot];
    uint32_t generation = next_generation(record->generation);
    put_spec(ledger, record, spec);
    put32(ledger, &record->outcomes, 0);
    put32(ledger, &record->generation, generation);
    put32(ledger, &record->state, KVP_SESSION_OPEN);
    *ret_session = (struct kvp_session_id){slot, generation};
    return KVP_OK;
}

static struct kvp_session_view view_of(const struct block_session *record, uint32_t slot)
{
    struct kvp_session_view view = {
        .id = {slot, record->generation},
        .state = (enum kvp_session_state)record->state,
        .spec = {.kind = (enum kvp_session_kind)record->kind,
                 .uid = record->uid,
                 .gid = record->gid,
                 .pid = record->pid,
                 .tenant = record->tenant,
                 .lease_ms = record->lease_ms,
                 .token = {record->token[0], record->token[1]},
                 .resume_secret = {record->resume_secret[0], record->resume_secret[1]},
                 .start_time = record->start_time},
        .attachments = record->attachments,
    };
    memcpy(view.spec.name, record->name, sizeof(view.spec.name));
    view.spec.name[sizeof(view.spec.name) - 1] = '\0';
    return view;
}

enum kvp_status kvp_session_get(const struct kvp_ledger *ledger, struct kvp_session_id session,
                                struct kvp_session_view *ret_view)
{
    const struct block_session *record;
    TRY(find_session(ledger, session, &record));
    *ret_view = view_of(record, session.slot);
    return KVP_OK;
}

enum kvp_status kvp_session_at(const struct kvp_ledger *ledger, uint32_t slot, struct kvp_session_view *ret_view)
{
    if (slot >= KVP_SESSIONS_MAX || sessions_of(ledger)[slot].state == KVP_SESSION_FREE)
        return KVP_ENOENT;
    *ret_view = view_of(&sessions_of(ledger)[slot], slot);
    return KVP_OK;
}

enum kvp_status kvp_session_by_token(const struct kvp_ledger *ledger, const uint64_t token[2],
                                     struct kvp_session_id *ret_session)
{
    const struct block_session *sessions = sessions_of(ledger);
    uint32_t found = KVP_NONE;
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        uint64_t differs = (sessions[slot].token[0] ^ token[0]) | (sessions[slot].token[1] ^ token[1]);
        bool open_lease = sessions[slot].state == KVP_SESSION_OPEN && sessions[slot].kind == KVP_SESSION_LEASE;
        if (open_lease & (differs == 0))
            found = slot;
    }
    if (found == KVP_NONE)
        return KVP_ESESSION;
    *ret_session = (struct kvp_session_id){found, sessions[found].generation};
    return KVP_OK;
}

enum kvp_status kvp_session_end(struct kvp_ledger *ledger, struct kvp_session_id session)
{
    const struct block_session *record;
    TRY(find_session(ledger, session, &record));
    if (record->state == KVP_SESSION_ENDING)
        return KVP_OK;
    TRY(txn_room(ledger, ROOM_SMALL + KVP_POOLS_MAX));
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        if (record->attached[slot] == 0)
            continue;
        if (record->attached[slot] > KVP_ATTACHMENTS_MAX || pools_of(ledger)[slot].state == KVP_POOL_FREE)
            return KVP_ECORRUPT;
        put32(ledger, &pool_at(ledger, slot)->attachments[record->attached[slot] - 1].state, KVP_ATTACHMENT_DEAD);
    }
    put32(ledger, &record->state, record->attachments == 0 ? KVP_SESSION_FREE : KVP_SESSION_ENDING);
    return KVP_OK;
}

void session_detached(struct kvp_ledger *ledger, const struct block_session *session, uint32_t pool_slot)
{
    put32(ledger, &session->attached[pool_slot], 0);
    put32(ledger, &session->attachments, session->attachments - 1);
    if (session->attachments == 0 && session->state == KVP_SESSION_ENDING)
        put32(ledger, &session->state, KVP_SESSION_FREE);
}

/* ---- outcomes ------------------------------------------------------------------------------------------------------
 */

static uint32_t ring_places(const struct block_session *session)
{
    return session->kind == KVP_SESSION_LEASE ? KVP_OUTCOMES_MAX : 1;
}

/* The place in the ring where a call's outcome is; KVP_NONE: nowhere. */
static uint32_t find_outcome(const struct block_session *session, const struct block_outcome *ring, uint64_t call_id)
{
    for (uint32_t i = 0; i < ring_places(session); i++) {
        if (ring[i].call_id == call_id && ring[i].generation == session->generation)
            return i;
    }
    return KVP_NONE;
}

enum kvp_status kvp_outcome_put(struct kvp_ledger *ledger, struct kvp_session_id session,
                                const struct kvp_outcome *outcome)
{
    const struct block_session *record;
    TRY(find_session(ledger, session, &record));
    if (outcome->call_id == 0)
        return KVP_EINVAL;
    TRY(txn_room(ledger, ROOM_SMALL));
    const struct block_outcome *ring = outcomes_of(ledger, session.slot);
    uint32_t place = find_outcome(record, ring, outcome->call_id);
    if (place == KVP_NONE) {
        place = record->outcomes % ring_places(record);
        put32(ledger, &record->outcomes, record->outcomes + 1);
    }
    const struct block_outcome *entry = &ring[place];
    put64(ledger, &entry->call_id, outcome->call_id);
    put32(ledger, &entry->generation, record->generation);
    put32(ledger, &entry->method, outcome->method);
    put32(ledger, &entry->status, (uint32_t)outcome->status);
    put64(ledger, &entry->values[0], outcome->values[0]);
    put64(ledger, &entry->values[1], outcome->values[1]);
    return KVP_OK;
}

enum kvp_status kvp_outcome_get(const struct kvp_ledger *ledger, struct kvp_session_id session, uint64_t call_id,
                                struct kvp_outcome *ret_outcome)
{
    const struct block_session *record;
    TRY(find_session(ledger, session, &record));
    const struct block_outcome *ring = outcomes_of(ledger, session.slot);
    uint32_t place = call_id == 0 ? KVP_NONE : find_outcome(record, ring, call_id);
    if (place == KVP_NONE)
        return KVP_ENOENT;
    *ret_outcome = (struct kvp_outcome){
        .call_id = call_id,
        .method = ring[place].method,
        .status = (int32_t)ring[place].status,
        .values = {ring[place].values[0], ring[place].values[1]},
    };
    return KVP_OK;
}
