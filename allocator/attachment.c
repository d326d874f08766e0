/**
 * Attachments: a session in a pool, the owner of sequences.
 *
 *          attach            its session ends           release, nothing left
 *   FREE ─────────► LIVE ───────────────────────► DEAD ──────────────────────► FREE
 *     ▲              │
 *     └── detach ────┘   owns nothing, nothing retires, nobody joined
 *
 * The OPEN sequences of a DEAD attachment are frozen and their pages in quarantine: that is derived from its state, and
 * ends with kvp_attachment_release, when nothing writes for it any more. RETIRING rows of an attachment wait for its
 * timelines: so it can't be detached before they are reclaimed, and releasing it reclaims them.
 */
#include "internal.h"

enum kvp_status find_live_attachment(const struct pool_map *m, uint32_t attachment)
{
    if (attachment >= KVP_ATTACHMENTS_MAX || m->attachments[attachment].state == KVP_ATTACHMENT_FREE)
        return KVP_ENOENT;
    return m->attachments[attachment].state == KVP_ATTACHMENT_LIVE ? KVP_OK : KVP_ESESSION;
}

enum kvp_status kvp_attach(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_session_id session,
                           uint32_t join, uint32_t *ret_attachment)
{
    const struct pool_map *m;
    const struct block_session *record;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_session(ledger, session, &record));
    if (record->state != KVP_SESSION_OPEN)
        return KVP_ESESSION;
    if (record->attached[m->slot] != 0)
        return KVP_EEXIST;
    if (join != KVP_NONE)
        TRY(find_live_attachment(m, join));
    uint32_t index = 0;
    while (index < KVP_ATTACHMENTS_MAX && m->attachments[index].state != KVP_ATTACHMENT_FREE)
        index++;
    if (index == KVP_ATTACHMENTS_MAX)
        return KVP_ELIMIT;
    uint32_t tenant;
    TRY(tenant_place(ledger, m, record->tenant, &tenant));
    TRY(txn_room(ledger, ROOM_SMALL));
    const struct block_attachment *made = &m->attachments[index];
    put32(ledger, &made->session_slot, session.slot);
    put32(ledger, &made->session_generation, session.generation);
    put32(ledger, &made->leader, join == KVP_NONE ? index : m->attachments[join].leader);
    put32(ledger, &made->sequences, 0);
    put32(ledger, &made->first, 0);
    put32(ledger, &made->retiring, 0);
    put32(ledger, &made->nvml_seen, 0);
    put32(ledger, &made->tenant, tenant);
    put32(ledger, &made->lacking, 0);
    const struct block_attachment *leader = &m->attachments[made->leader];
    if (leader->lacking != 0)
        put32(ledger, &leader->lacking, leader->lacking - 1);
    put32(ledger, &made->state, KVP_ATTACHMENT_LIVE);
    put32(ledger, &m->pool->attachments, m->pool->attachments + 1);
    put32(ledger, &record->attached[m->slot], index + 1);
    put32(ledger, &record->attachments, record->attachments + 1);
    *ret_attachment = index;
    return KVP_OK;
}

#define ROOM_FREE (ROOM_SMALL + KVP_ATTACHMENTS_MAX + KVP_REGIONS_MAX) /* what free_attachment may store */

/* LIVE or DEAD -> FREE. Those that joined it stand alone from then on, whom it joined lacks it; regions that it had
 * mapped stay. */
static enum kvp_status free_attachment(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t index)
{
    const struct block_attachment *gone = &m->attachments[index];
    const struct block_session *session;
    struct kvp_session_id id = {gone->session_slot, gone->session_generation};
    if (find_session(ledger, id, &session) != KVP_OK)
        return KVP_ECORRUPT;
    TRY(txn_room(ledger, ROOM_FREE));
    TRY(regions_unmap(ledger, m, index));
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        if (i != index && m->attachments[i].state != KVP_ATTACHMENT_FREE && m->attachments[i].leader == index)
            put32(ledger, &m->attachments[i].leader, i);
    }
    if (gone->leader != index && gone->leader < KVP_ATTACHMENTS_MAX)
        put32(ledger, &m->attachments[gone->leader].lacking, m->attachments[gone->leader].lacking + 1);
    put32(ledger, &gone->state, KVP_ATTACHMENT_FREE);
    put32(ledger, &m->pool->attachments, m->pool->attachments - 1);
    session_detached(ledger, session, m->slot);
    return KVP_OK;
}

enum kvp_status kvp_detach(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    TRY(find_live_attachment(m, attachment));
    if (m->attachments[attachment].sequences != 0 || m->attachments[attachment].retiring != 0)
        return KVP_EBUSY;
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        if (i != attachment && m->attachments[i].state != KVP_ATTACHMENT_FREE && m->attachments[i].leader == attachment)
            return KVP_EBUSY;
    }
    return free_attachment(ledger, m, attachment);
}

enum kvp_status kvp_attachment_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                                   struct kvp_attachment_view *ret_view)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (attachment >= KVP_ATTACHMENTS_MAX || m->attachments[attachment].state == KVP_ATTACHMENT_FREE)
        return KVP_ENOENT;
    const struct block_attachment *record = &m->attachments[attachment];
    *ret_view = (struct kvp_attachment_view){
        .state = (enum kvp_attachment_state)record->state,
        .session = {record->session_slot, record->session_generation},
        .leader = record->leader,
        .sequences = record->sequences,
        .nvml_seen = record->nvml_seen != 0,
        .lacking = record->lacking,
    };
    return KVP_OK;
}

enum kvp_status kvp_attachment_of(const struct kvp_ledger *ledger, struct kvp_pool_id pool,
                                  struct kvp_session_id session, uint32_t *ret_attachment)
{
    const struct block_pool *in;
    const struct block_session *record;
    TRY(find_pool(ledger, pool, &in));
    TRY(find_session(ledger, session, &record));
    if (record->attached[pool.slot] == 0)
        return KVP_ENOENT;
    *ret_attachment = record->attached[pool.slot] - 1;
    return KVP_OK;
}

enum kvp_status kvp_attachment_set_nvml_seen(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    TRY(find_live_attachment(m, attachment));
    TRY(txn_room(ledger, ROOM_SMALL));
    if (!m->attachments[attachment].nvml_seen)
        put32(ledger, &m->attachments[attachment].nvml_seen, 1);
    return KVP_OK;
}

/* ---- release -------------------------------------------------------------------------------------------------------
 */

/* Move sequences to RECLAIM while the budget lasts; count those that are to go and are still there. */
static enum kvp_status release_sequences(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment,
                                         bool with_durable, uint32_t *budget, uint32_t *ret_left)
{
    uint32_t left = 0, steps = 0;
    uint32_t slot = linked_slot(m, m->attachments[attachment].first);
    while (slot != KVP_NONE) {
        const struct block_seq *seq = &m->seqs[slot];
        if (steps++ == m->pool->max_sequences || seq->state != KVP_SEQ_OPEN)
            return KVP_ECORRUPT;
        slot = linked_slot(m, seq->next);
        if (seq->durable && !with_durable)
            continue;
        if (seq->job != 0 || *budget == 0 || txn_room_left(ledger) < ROOM_SMALL + ROOM_FREE) {
            left++;
            continue;
        }
        TRY(retire_open(ledger, m, seq, (struct kvp_after){0}));
        (*budget)--;
    }
    *ret_left = left;
    return KVP_OK;
}

/* The rows that wait for its timelines need not: its GPU work is over. */
static enum kvp_status release_retiring(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment,
                                        uint32_t *budget)
{
    uint32_t steps = 0;
    uint32_t slot = linked_slot(m, m->pool->retiring);
    while (slot != KVP_NONE && m->attachments[attachment].retiring != 0) {
        const struct block_seq *seq = &m->seqs[slot];
        if (steps++ == m->pool->max_sequences || seq->state != KVP_SEQ_RETIRING)
            return KVP_ECORRUPT;
        slot = linked_slot(m, seq->next);
        if (seq->attachment != attachment)
            continue;
        if (*budget == 0 || txn_room_left(ledger) < ROOM_SMALL + ROOM_FREE)
            break;
        TRY(reclaim_retired(ledger, m, seq));
        (*budget)--;
    }
    return KVP_OK;
}

enum kvp_status kvp_attachment_release(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                                       bool with_durable, uint32_t budget, uint32_t *ret_left)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (attachment >= KVP_ATTACHMENTS_MAX || m->attachments[attachment].state == KVP_ATTACHMENT_FREE)
        return KVP_ENOENT;
    const struct block_attachment *record = &m->attachments[attachment];
    if (record->state != KVP_ATTACHMENT_DEAD)
        return KVP_EBUSY;
    TRY(txn_room(ledger, ROOM_FREE));
    uint32_t left;
    TRY(release_sequences(ledger, m, attachment, with_durable, &budget, &left));
    TRY(release_retiring(ledger, m, attachment, &budget));
    left += record->retiring;
    if (record->sequences == 0 && record->retiring == 0)
        TRY(free_attachment(ledger, m, attachment));
    *ret_left = left;
    return KVP_OK;
}
