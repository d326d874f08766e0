/**
 * Sessions: opened by connecting or by OpenSession, kept by calls, ended by CloseSession; and the claim on what a dead
 * one left.
 *
 * The token of a session by lease is 128 random bits as 32 hexadecimal digits; the resume secret is 16 random bytes. A
 * claim takes the durable sequences of the dead session whose secret it shows, in one transaction with the new session:
 * it is refused with KVP_EBUSY until nothing writes their pages any more.
 */
#include "op.h"

#include <stdio.h>

#define NAME_BYTES_MAX 31

static enum kvp_status secrets(struct kvp_core *core, struct kvp_session_spec *spec)
{
    uint64_t random[4];
    if (!core->act->random(core->ctx, random, sizeof(random)))
        return core_refuse(core, KVP_EINTERNAL, "no random bytes for the session's secrets");
    memcpy(spec->token, random, sizeof(spec->token));
    memcpy(spec->resume_secret, random + 2, sizeof(spec->resume_secret));
    return KVP_OK;
}

static void session_made(struct kvp_core *core, struct kvp_session_id id)
{
    struct session_state *state = &core->sessions[id.slot];
    core_buffers_drop(core, (struct kvp_session_id){id.slot, state->generation});
    free(state->buffers);
    memset(state, 0, sizeof(*state));
    state->generation = id.generation;
}

enum kvp_status kvp_core_connect(struct kvp_core *core, const struct kvp_caller *caller, uint64_t start_time,
                                 struct kvp_session_id *ret_session)
{
    struct kvp_session_spec spec = {
        .kind = KVP_SESSION_SOCKET,
        .uid = caller->uid,
        .gid = caller->gid,
        .pid = caller->pid,
        .tenant = caller->uid,
        .start_time = start_time,
    };
    if (core->draining)
        return KVP_EAGAIN;
    TRY(secrets(core, &spec));
    memset(spec.token, 0, sizeof(spec.token));
    snprintf(spec.name, sizeof(spec.name), "pid %u", caller->pid);
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_session_open(core->ledger, &spec, ret_session);
    if (status != KVP_OK)
        return core_abort(core, status);
    kvp_txn_commit(core->ledger);
    session_made(core, *ret_session);
    core->sessions[ret_session->slot].connected = true;
    return KVP_OK;
}

/* ---- claims ------------------------------------------------------------------------------------------------------ */

/* The ENDING session with that secret, compared in constant time; of the same user. */
static enum kvp_status find_claimed(struct kvp_core *core, const ProtobufCBinaryData *secret, uint32_t uid,
                                    struct kvp_session_view *ret_session)
{
    uint64_t words[2];
    bool found = false, alive = false;
    struct kvp_session_view dead = {0};
    if (secret->len != sizeof(words))
        return core_refuse(core, KVP_EINVAL, "resume_secret: %zu bytes, must be %zu", secret->len, sizeof(words));
    memcpy(words, secret->data, sizeof(words));
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        if (kvp_session_at(core->ledger, slot, &view) != KVP_OK)
            continue;
        bool same = ((view.spec.resume_secret[0] ^ words[0]) | (view.spec.resume_secret[1] ^ words[1])) == 0;
        alive |= same && view.state == KVP_SESSION_OPEN;
        if (same && view.state == KVP_SESSION_ENDING) {
            dead = view;
            found = true;
        }
    }
    if (alive)
        return core_refuse(core, KVP_EBUSY, "resume_secret: its session has not ended");
    if (!found)
        return core_refuse(core, KVP_ENOENT, "resume_secret: no dead session with that secret is remembered");
    if (dead.spec.uid != uid)
        return core_refuse(core, KVP_EPERM, "resume_secret: it was given to another user");
    *ret_session = dead;
    return KVP_OK;
}

/* Move an attachment's durable sequences to the claimer's. */
static enum kvp_status claim_pool(struct kvp_core *core, struct pool_state *pool, uint32_t from,
                                  struct kvp_session_id to)
{
    uint32_t attachment = KVP_NONE;
    uint32_t slot = kvp_attachment_first(core->ledger, pool->id, from);
    while (slot != KVP_NONE) {
        struct kvp_seq_view view;
        uint32_t next = kvp_attachment_next(core->ledger, pool->id, slot);
        TRY(kvp_seq_at(core->ledger, pool->id, slot, &view));
        slot = next;
        if (!view.durable)
            continue;
        if (view.job != KVP_NONE)
            return core_refuse(core, KVP_EBUSY, "resume_secret: an Append of the dead session is still under way");
        if (attachment == KVP_NONE)
            TRY(kvp_attach(core->ledger, pool->id, to, KVP_NONE, &attachment));
        TRY(kvp_seq_transfer(core->ledger, pool->id, view.id, attachment));
    }
    return KVP_OK;
}

static enum kvp_status claim(struct kvp_core *core, const struct kvp_session_view *dead, struct kvp_session_id to)
{
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        struct kvp_pool_view view;
        uint32_t from;
        if (pool->id.generation == 0 || kvp_pool_get(core->ledger, pool->id, &view) != KVP_OK ||
            view.state != KVP_POOL_LIVE || kvp_attachment_of(core->ledger, pool->id, dead->id, &from) != KVP_OK)
            continue;
        if (!core_attachment_quiet(core, pool, from))
            return core_refuse(core, KVP_EBUSY, "resume_secret: the dead process is not proven to be gone; try again");
        TRY(claim_pool(core, pool, from, to));
    }
    return KVP_OK;
}

/* Last words first: they may not have been folded yet. */
static void claim_fold(struct kvp_core *core, struct kvp_session_id dead)
{
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        uint32_t from;
        if (pool->id.generation != 0 && kvp_attachment_of(core->ledger, pool->id, dead, &from) == KVP_OK &&
            core_attachment_quiet(core, pool, from))
            core_fold_attachment(core, pool, from);
    }
}

static void claim_publish(struct kvp_core *core, struct kvp_session_id session)
{
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        struct pool_state *pool = &core->pools[slot];
        uint32_t attachment;
        if (pool->id.generation == 0 || kvp_attachment_of(core->ledger, pool->id, session, &attachment) != KVP_OK)
            continue;
        uint32_t seq = kvp_attachment_first(core->ledger, pool->id, attachment);
        for (; seq != KVP_NONE; seq = kvp_attachment_next(core->ledger, pool->id, seq))
            core_publish_seq(core, pool, seq);
    }
}

/* ---- OpenSession ------------------------------------------------------------------------------------------------- */

static enum kvp_status fill_spec(struct kvp_core *core, const struct turn *turn,
                                 const Kvpool__V1__OpenSessionRequest *request, struct kvp_session_spec *ret_spec)
{
    const struct kvp_caller *caller = &turn->call->caller;
    uint32_t lease_ms = request->lease_ms != 0 ? request->lease_ms : core->config.lease_default_ms;
    if (lease_ms < KVP_LEASE_MS_MIN || lease_ms > KVP_LEASE_MS_MAX)
        return core_refuse(core, KVP_EINVAL, "lease_ms: %u, must be %d to %d", lease_ms, KVP_LEASE_MS_MIN,
                           KVP_LEASE_MS_MAX);
    if (strlen(request->name) > NAME_BYTES_MAX)
        return core_refuse(core, KVP_EINVAL, "name: %zu bytes, at most %d", strlen(request->name), NAME_BYTES_MAX);
    *ret_spec = (struct kvp_session_spec){
        .kind = KVP_SESSION_LEASE,
        .uid = caller->known ? caller->uid : KVP_UID_UNKNOWN,
        .gid = caller->known ? caller->gid : KVP_UID_UNKNOWN,
        .pid = caller->known ? caller->pid : 0,
        .tenant = caller->known ? caller->uid : KVP_UID_UNKNOWN,
        .lease_ms = lease_ms,
    };
    snprintf(ret_spec->name, sizeof(ret_spec->name), "%s", request->name);
    return secrets(core, ret_spec);
}

enum kvp_status call_open_session(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__OpenSessionRequest *request = (const Kvpool__V1__OpenSessionRequest *)turn->body;
    struct kvp_session_spec spec;
    struct kvp_session_view dead = {0};
    struct kvp_session_id id;
    bool claims = request->resume_secret.len != 0;
    TRY(fill_spec(core, turn, request, &spec));
    if (claims) {
        TRY(find_claimed(core, &request->resume_secret, spec.uid, &dead));
        claim_fold(core, dead.id);
    }
    kvp_txn_begin(core->ledger);
    enum kvp_status status = kvp_session_open(core->ledger, &spec, &id);
    if (status == KVP_ELIMIT)
        core_refuse(core, status, "sessions: %d are open, the most there may be", KVP_SESSIONS_MAX);
    if (status == KVP_OK && claims)
        status = claim(core, &dead, id);
    if (status != KVP_OK)
        return core_abort(core, status);
    kvp_txn_commit(core->ledger);
    session_made(core, id);
    struct kvp_session_view session;
    TRY(kvp_session_get(core->ledger, id, &session));
    core_lease_renew(core, &session);
    if (claims) {
        claim_publish(core, id);
        core_due(core, core->now_ms);
    }

    char token[33];
    snprintf(token, sizeof(token), "%016llx%016llx", (unsigned long long)spec.token[0],
             (unsigned long long)spec.token[1]);
    struct kvp_uuid instance = kvp_ledger_instance(core->ledger);
    Kvpool__V1__OpenSessionReply reply = KVPOOL__V1__OPEN_SESSION_REPLY__INIT;
    reply.session = token;
    reply.session_id = ID_WORD(id);
    reply.resume_secret = (ProtobufCBinaryData){sizeof(spec.resume_secret), (uint8_t *)spec.resume_secret};
    reply.lease_ms = spec.lease_ms;
    reply.epoch = kvp_ledger_epoch(core->ledger);
    reply.instance = (ProtobufCBinaryData){sizeof(instance.bytes), instance.bytes};
    reply.version = (char *)core->config.version;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- KeepAlive, CloseSession ------------------------------------------------------------------------------------- */

enum kvp_status call_keep_alive(struct kvp_core *core, struct turn *turn)
{
    struct kvp_uuid instance = kvp_ledger_instance(core->ledger);
    uint64_t secret[2] = {turn->session.spec.resume_secret[0], turn->session.spec.resume_secret[1]};
    Kvpool__V1__KeepAliveReply reply = KVPOOL__V1__KEEP_ALIVE_REPLY__INIT;
    reply.lease_ms = turn->session.spec.lease_ms;
    reply.session_id = ID_WORD(turn->session.id);
    reply.epoch = kvp_ledger_epoch(core->ledger);
    reply.instance = (ProtobufCBinaryData){sizeof(instance.bytes), instance.bytes};
    reply.resume_secret = (ProtobufCBinaryData){sizeof(secret), (uint8_t *)secret};
    return core_answer(core, turn, &reply.base, NULL, 0);
}

enum kvp_status call_close_session(struct kvp_core *core, struct turn *turn)
{
    struct kvp_session_id session = turn->session.id;
    bool connection = turn->session.spec.kind == KVP_SESSION_SOCKET;
    core_session_end(core, session);
    Kvpool__V1__CloseSessionReply reply = KVPOOL__V1__CLOSE_SESSION_REPLY__INIT;
    enum kvp_status status = core_answer(core, turn, &reply.base, NULL, 0);
    if (connection)
        core->act->session_hangup(core->ctx, session);
    return status;
}
