/**
 * The one table of calls: what both doors know of a method, and who carries it out; and what is the same for all of
 * them: whose call it is, whether it was made before.
 */
#include "op.h"

#include <assert.h>
#include <stddef.h>

struct entry {
    handler *handle;
    bool needs_session; /* at every door; over TCP all but OpenSession do */
};

/* X(NUMBER, Name, lower_name, changes, over_tcp, needs_session) */
#define CALLS(X)                                                                                                       \
    X(OPEN_SESSION, OpenSession, open_session, false, true, false)                                                     \
    X(KEEP_ALIVE, KeepAlive, keep_alive, false, true, true)                                                            \
    X(CLOSE_SESSION, CloseSession, close_session, true, true, true)                                                    \
    X(CREATE_POOL, CreatePool, create_pool, true, false, false)                                                        \
    X(DESCRIBE_POOL, DescribePool, describe_pool, false, true, false)                                                  \
    X(LIST_POOLS, ListPools, list_pools, false, true, false)                                                           \
    X(DELETE_POOL, DeletePool, delete_pool, true, false, false)                                                        \
    X(ATTACH, Attach, attach, true, false, true)                                                                       \
    X(DETACH, Detach, detach, true, true, true)                                                                        \
    X(REGISTER_BUFFER, RegisterBuffer, register_buffer, true, false, true)                                             \
    X(UNREGISTER_BUFFER, UnregisterBuffer, unregister_buffer, true, false, true)                                       \
    X(OPEN_SEQUENCES, OpenSequences, open_sequences, true, true, true)                                                 \
    X(LIST_SEQUENCES, ListSequences, list_sequences, false, true, false)                                               \
    X(ADVANCE, Advance, advance, true, true, true)                                                                     \
    X(APPEND, Append, append, true, true, true)                                                                        \
    X(FORK, Fork, fork, true, true, true)                                                                              \
    X(TRANSFER, Transfer, transfer, true, true, true)                                                                  \
    X(CLOSE_SEQUENCES, CloseSequences, close_sequences, true, true, true)                                              \
    X(GET_SEQ_LENS, GetSeqLens, get_seq_lens, false, true, false)                                                      \
    X(GET_PAGE_TABLE, GetPageTable, get_page_table, false, true, false)                                                \
    X(GET_BATCH_INDICES, GetBatchIndices, get_batch_indices, false, true, false)                                       \
    X(GET_STATS, GetStats, get_stats, false, true, false)                                                              \
    X(AUDIT, Audit, audit, false, true, false)                                                                         \
    X(RELEASE_QUARANTINE, ReleaseQuarantine, release_quarantine, true, false, false)                                   \
    X(MATCH, Match, match, false, true, false)                                                                         \
    X(PIN, Pin, pin, true, true, true)                                                                                 \
    X(EVICT, Evict, evict, true, false, false)                                                                         \
    X(LIST_CACHE, ListCache, list_cache, false, true, false)                                                           \
    X(MAP_REGION, MapRegion, map_region, true, false, true)                                                            \
    X(UNMAP_REGION, UnmapRegion, unmap_region, true, false, true)

#define METHOD(NUMBER, Name, lower, changes_, over_tcp_, needs)                                                        \
    {.number = KVPOOL__V1__METHOD__METHOD_##NUMBER,                                                                    \
     .name = #Name,                                                                                                    \
     .request = &kvpool__v1__##lower##_request__descriptor,                                                            \
     .reply = &kvpool__v1__##lower##_reply__descriptor,                                                                \
     .changes = (changes_),                                                                                            \
     .over_tcp = (over_tcp_)},
const struct kvp_method kvp_methods[] = {CALLS(METHOD)};
const unsigned kvp_method_count = sizeof(kvp_methods) / sizeof(kvp_methods[0]);

#define ENTRY(NUMBER, Name, lower, changes_, over_tcp_, needs) {.handle = call_##lower, .needs_session = (needs)},
static const struct entry entries[] = {CALLS(ENTRY)};

#define HEAD(NUMBER, Name, lower, changes_, over_tcp_, needs)                                                          \
    static_assert(offsetof(Kvpool__V1__##Name##Request, session) == offsetof(struct request_head, session) &&          \
                      offsetof(Kvpool__V1__##Name##Request, call_id) == offsetof(struct request_head, call_id),        \
                  #Name);
CALLS(HEAD)

const struct kvp_method *kvp_method_by_number(uint16_t number)
{
    return number >= 1 && number <= kvp_method_count ? &kvp_methods[number - 1] : NULL;
}

const struct kvp_method *kvp_method_by_name(const char *service_name)
{
    for (unsigned i = 0; i < kvp_method_count; i++) {
        if (strcmp(kvp_methods[i].name, service_name) == 0)
            return &kvp_methods[i];
    }
    return NULL;
}

handler *core_handler(uint16_t method)
{
    return kvp_method_by_number(method) == NULL ? NULL : entries[method - 1].handle;
}

/* ---- whose call -------------------------------------------------------------------------------------------------- */

static bool parse_token(const char *text, uint64_t ret_token[2])
{
    ret_token[0] = ret_token[1] = 0;
    for (int i = 0; i < 32; i++) {
        char c = text[i];
        uint64_t digit;
        if (c >= '0' && c <= '9')
            digit = (uint64_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            digit = (uint64_t)(c - 'a') + 10;
        else
            return false;
        ret_token[i / 16] = ret_token[i / 16] << 4 | digit;
    }
    return text[32] == '\0';
}

static enum kvp_status session_of_token(struct kvp_core *core, struct turn *turn, const char *text)
{
    uint64_t token[2];
    struct kvp_session_id id;
    if (!parse_token(text, token) || kvp_session_by_token(core->ledger, token, &id) != KVP_OK)
        return core_refuse(core, KVP_ESESSION, "session: the token is of no open session; its lease may have ended");
    TRY(kvp_session_get(core->ledger, id, &turn->session));
    const struct kvp_caller *caller = &turn->call->caller;
    uint32_t uid = caller->known ? caller->uid : KVP_UID_UNKNOWN;
    if (turn->session.spec.uid != uid)
        return core_refuse(core, KVP_EPERM, "session: the token was given to another user");
    turn->has_session = true;
    return KVP_OK;
}

enum kvp_status core_need_session(struct kvp_core *core, const struct turn *turn)
{
    if (turn->has_session)
        return KVP_OK;
    return core_refuse(core, KVP_ESESSION,
                       "%s needs a session: give the token of OpenSession, or connect to the session socket",
                       kvp_methods[turn->method - 1].name);
}

/* A call that was done is not done again: its handler answers from the outcome and the state. */
static enum kvp_status find_outcome(struct kvp_core *core, struct turn *turn)
{
    if (!turn->has_session || turn->call_id == 0 || !kvp_methods[turn->method - 1].changes)
        return KVP_OK;
    if (kvp_outcome_get(core->ledger, turn->session.id, turn->call_id, &turn->outcome) != KVP_OK)
        return KVP_OK;
    if (turn->outcome.method != turn->method) {
        const struct kvp_method *used = kvp_method_by_number((uint16_t)turn->outcome.method);
        return core_refuse(core, KVP_EINVAL, "call_id: %llu was used before, by %s", (unsigned long long)turn->call_id,
                           used != NULL ? used->name : "another call");
    }
    turn->repeated = true;
    return KVP_OK;
}

enum kvp_status core_turn_begin(struct kvp_core *core, struct turn *turn)
{
    const struct kvp_method *method = kvp_method_by_number(turn->method);
    const struct kvp_caller *caller = &turn->call->caller;
    const struct request_head *head = (const struct request_head *)turn->body;
    if (turn->body == NULL || turn->body->descriptor != method->request)
        return core_refuse(core, KVP_EPROTO, "the message is no %sRequest", method->name);
    if (caller->door == KVP_DOOR_TCP && !method->over_tcp)
        return core_refuse(core, KVP_EPERM, "%s is not served over TCP; use a socket of this machine", method->name);
    turn->call_id = head->call_id;
    if (head->session != NULL && head->session[0] != '\0') {
        TRY(session_of_token(core, turn, head->session));
    } else if (caller->door == KVP_DOOR_SOCKET && caller->session.generation != 0) {
        if (kvp_session_get(core->ledger, caller->session, &turn->session) != KVP_OK)
            return core_refuse(core, KVP_ESESSION, "the session of this connection has ended");
        turn->has_session = true;
    }
    if (turn->has_session && turn->session.state != KVP_SESSION_OPEN)
        return core_refuse(core, KVP_ESESSION, "the session has ended");
    if (turn->has_session)
        core_lease_renew(core, &turn->session);
    bool open_session = turn->method == KVPOOL__V1__METHOD__METHOD_OPEN_SESSION;
    if (entries[turn->method - 1].needs_session || (caller->door == KVP_DOOR_TCP && !open_session))
        TRY(core_need_session(core, turn));
    return find_outcome(core, turn);
}
