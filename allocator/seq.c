/**
 * Sequences: slots, keys, owners, and the way back.
 *
 *          open, fork          close with a value              value reached, or its owner released
 *   FREE ─────────────► OPEN ──────────────────────► RETIRING ───────────────────────────────► RECLAIM ──► FREE
 *                        │                              ▲                                         ▲   row empty
 *                        │         ghost of a cut: with a value, or without one ──────────────────┤
 *                        └─ close without a value, release of its DEAD owner ─────────────────────┘
 *
 * A slot is in exactly one list by next and prev: its attachment's (OPEN), the pool's retiring, reclaim or pins, or by
 * next alone the free list; slots from pool.sequences_used on were never used. OPEN ones are in a bucket too, by
 * (attachment, key), which is unique. A row that retires keeps its slot: so nobody gets its progress word too early. A
 * ghost is the slot that takes the pages which a truncation cut off: it was never open, and has no key.
 *
 * A pin is a slot too, in the pool's list of pins: see pin.c.
 *
 * An OPEN sequence of a DEAD attachment is frozen: it is reclaimed by release, or claimed by a transfer; its written
 * tokens may be observed, and forked from.
 *
 * The row itself, sharing and copies: row.c.
 */
#include "internal.h"

uint32_t linked_slot(const struct pool_map *m, uint32_t link)
{
    return link == 0 || link > m->pool->max_sequences ? KVP_NONE : link - 1;
}

void list_push(struct kvp_ledger *ledger, const struct pool_map *m, const uint32_t *head, const struct block_seq *seq)
{
    uint32_t next = linked_slot(m, *head);
    put32(ledger, &seq->next, *head);
    put32(ledger, &seq->prev, 0);
    if (next != KVP_NONE)
        put32(ledger, &m->seqs[next].prev, slot_of(m, seq) + 1);
    put32(ledger, head, slot_of(m, seq) + 1);
}

enum kvp_status list_remove(struct kvp_ledger *ledger, const struct pool_map *m, const uint32_t *head,
                            const struct block_seq *seq)
{
    uint32_t self = slot_of(m, seq) + 1;
    uint32_t next = linked_slot(m, seq->next), prev = linked_slot(m, seq->prev);
    if (prev == KVP_NONE ? *head != self : m->seqs[prev].next != self)
        return KVP_ECORRUPT;
    if (prev == KVP_NONE)
        put32(ledger, head, seq->next);
    else
        put32(ledger, &m->seqs[prev].next, seq->next);
    if (next != KVP_NONE)
        put32(ledger, &m->seqs[next].prev, seq->prev);
    return KVP_OK;
}

/* ---- keys ----------------------------------------------------------------------------------------------------------
 */

static const uint32_t *bucket_of(const struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment,
                                 uint64_t key)
{
    uint64_t x = key ^ header_of(ledger)->instance[0] ^ ((uint64_t)attachment + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return &m->buckets[(x ^ x >> 31) & m->bucket_mask];
}

const struct block_seq *find_key(const struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment,
                                 uint64_t key)
{
    uint32_t slot = linked_slot(m, *bucket_of(ledger, m, attachment, key));
    for (uint32_t steps = 0; slot != KVP_NONE && steps < m->pool->max_sequences; steps++) {
        const struct block_seq *seq = &m->seqs[slot];
        if (seq->key == key && seq->attachment == attachment && seq->state == KVP_SEQ_OPEN)
            return seq;
        slot = linked_slot(m, seq->bucket_next);
    }
    return NULL;
}

static void bucket_insert(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq)
{
    const uint32_t *bucket = bucket_of(ledger, m, seq->attachment, seq->key);
    put32(ledger, &seq->bucket_next, *bucket);
    put32(ledger, bucket, slot_of(m, seq) + 1);
}

static enum kvp_status bucket_remove(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq)
{
    const uint32_t *link = bucket_of(ledger, m, seq->attachment, seq->key);
    for (uint32_t steps = 0; steps < m->pool->max_sequences; steps++) {
        uint32_t slot = linked_slot(m, *link);
        if (slot == KVP_NONE)
            break;
        if (&m->seqs[slot] == seq) {
            put32(ledger, link, seq->bucket_next);
            return KVP_OK;
        }
        link = &m->seqs[slot].bucket_next;
    }
    return KVP_ECORRUPT;
}

/* ---- slots ---------------------------------------------------------------------------------------------------------
 */

enum kvp_status take_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq **ret_seq)
{
    uint32_t slot = linked_slot(m, m->pool->sequences_free);
    if (slot != KVP_NONE) {
        if (m->seqs[slot].state != KVP_SEQ_FREE || m->seqs[slot].row_pages != 0)
            return KVP_ECORRUPT;
        put32(ledger, &m->pool->sequences_free, m->seqs[slot].next);
    } else if (m->pool->sequences_used < m->pool->max_sequences) {
        slot = m->pool->sequences_used;
        put32(ledger, &m->pool->sequences_used, slot + 1);
    } else {
        return KVP_ELIMIT;
    }
    const struct block_seq *seq = &m->seqs[slot];
    const uint32_t *zeroed[] = {&seq->durable,        &seq->reserved,       &seq->written, &seq->copy_source,
                                &seq->pending_tokens, &seq->after_timeline, &seq->job,     &seq->job_next,
                                &seq->job_tokens,     &seq->bucket_next,    &seq->keyed};
    for (size_t i = 0; i < sizeof(zeroed) / sizeof(zeroed[0]); i++) {
        if (*zeroed[i] != 0)
            put32(ledger, zeroed[i], 0);
    }
    put64(ledger, &seq->key, 0);
    put64(ledger, &seq->after_value, 0);
    put32(ledger, &seq->generation, next_generation(seq->generation));
    *ret_seq = seq;
    return KVP_OK;
}

void free_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq)
{
    put32(ledger, &seq->state, KVP_SEQ_FREE);
    put32(ledger, &seq->next, m->pool->sequences_free);
    put32(ledger, &m->pool->sequences_free, slot_of(m, seq) + 1);
}

static void own(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t attachment)
{
    const struct block_attachment *owner = &m->attachments[attachment];
    put32(ledger, &seq->attachment, attachment);
    bucket_insert(ledger, m, seq);
    list_push(ledger, m, &owner->first, seq);
    put32(ledger, &owner->sequences, owner->sequences + 1);
}

static enum kvp_status disown(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq)
{
    if (seq->attachment >= KVP_ATTACHMENTS_MAX)
        return KVP_ECORRUPT;
    const struct block_attachment *owner = &m->attachments[seq->attachment];
    TRY(bucket_remove(ledger, m, seq));
    TRY(list_remove(ledger, m, &owner->first, seq));
    put32(ledger, &owner->sequences, owner->sequences - 1);
    return KVP_OK;
}

void open_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t attachment,
               uint64_t key, bool durable)
{
    put64(ledger, &seq->key, key);
    if (durable)
        put32(ledger, &seq->durable, 1);
    put32(ledger, &seq->version, seq->version + 2);
    put32(ledger, &seq->state, KVP_SEQ_OPEN);
    own(ledger, m, seq, attachment);
    put32(ledger, &m->pool->open_count, m->pool->open_count + 1);
}

/* ---- the way back --------------------------------------------------------------------------------------------------
 */

void retire_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t attachment,
                 struct kvp_after after)
{
    bool waits = after.value != 0;
    put64(ledger, &seq->after_value, after.value);
    put32(ledger, &seq->after_timeline, after.timeline);
    put32(ledger, &seq->attachment, waits ? attachment : KVP_NONE);
    put32(ledger, &seq->state, waits ? KVP_SEQ_RETIRING : KVP_SEQ_RECLAIM);
    list_push(ledger, m, waits ? &m->pool->retiring : &m->pool->reclaim, seq);
    put32(ledger, &m->pool->retiring_count, m->pool->retiring_count + 1);
    if (waits)
        put32(ledger, &m->attachments[attachment].retiring, m->attachments[attachment].retiring + 1);
}

enum kvp_status retire_open(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                            struct kvp_after after)
{
    TRY(disown(ledger, m, seq));
    put32(ledger, &m->pool->open_count, m->pool->open_count - 1);
    retire_slot(ledger, m, seq, seq->attachment, after);
    return KVP_OK;
}

enum kvp_status reclaim_retired(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq)
{
    if (seq->attachment >= KVP_ATTACHMENTS_MAX)
        return KVP_ECORRUPT;
    const struct block_attachment *owner = &m->attachments[seq->attachment];
    TRY(list_remove(ledger, m, &m->pool->retiring, seq));
    put32(ledger, &owner->retiring, owner->retiring - 1);
    put32(ledger, &seq->attachment, KVP_NONE);
    put32(ledger, &seq->state, KVP_SEQ_RECLAIM);
    list_push(ledger, m, &m->pool->reclaim, seq);
    return KVP_OK;
}

/* ---- calls ---------------------------------------------------------------------------------------------------------
 */

enum kvp_status find_seq(const struct pool_map *m, struct kvp_seq_id seq, const struct block_seq **ret_seq)
{
    if (seq.slot >= m->pool->max_sequences || seq.generation == 0)
        return KVP_ESTALE;
    const struct block_seq *found = &m->seqs[seq.slot];
    if (found->state != KVP_SEQ_OPEN || found->generation != seq.generation)
        return KVP_ESTALE;
    if (found->row_pages > m->pool->row_pages || found->attachment >= KVP_ATTACHMENTS_MAX)
        return KVP_ECORRUPT;
    *ret_seq = found;
    return KVP_OK;
}

enum kvp_status seq_changeable(const struct pool_map *m, const struct block_seq *seq)
{
    bool owner_lives = m->attachments[seq->attachment].state == KVP_ATTACHMENT_LIVE;
    return seq->job == 0 && owner_lives ? KVP_OK : KVP_EBUSY;
}

enum kvp_status kvp_seq_open(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment, uint64_t key,
                             bool durable, struct kvp_seq_id *ret_seq)
{
    const struct pool_map *m;
    const struct block_seq *seq;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_live_attachment(m, attachment));
    if (find_key(ledger, m, attachment, key) != NULL)
        return KVP_EEXIST;
    TRY(txn_room(ledger, ROOM_SMALL));
    TRY(take_slot(ledger, m, &seq));
    open_slot(ledger, m, seq, attachment, key, durable);
    *ret_seq = (struct kvp_seq_id){slot_of(m, seq), seq->generation};
    return KVP_OK;
}

enum kvp_status kvp_seq_by_key(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                               uint64_t key, struct kvp_seq_id *ret_seq)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (attachment >= KVP_ATTACHMENTS_MAX || m->attachments[attachment].state == KVP_ATTACHMENT_FREE)
        return KVP_ENOENT;
    const struct block_seq *seq = find_key(ledger, m, attachment, key);
    if (seq == NULL)
        return KVP_ENOENT;
    *ret_seq = (struct kvp_seq_id){slot_of(m, seq), seq->generation};
    return KVP_OK;
}

/* Field by field: a view that is put together on the stack and copied costs more than all the rest of a look-up. */
static void fill_view(const struct pool_map *m, const struct block_seq *restrict seq,
                      struct kvp_seq_view *restrict ret_view)
{
    bool open = seq->state == KVP_SEQ_OPEN;
    ret_view->id.slot = slot_of(m, seq);
    ret_view->id.generation = seq->generation;
    ret_view->state = (enum kvp_seq_state)seq->state;
    ret_view->key = seq->key;
    ret_view->attachment = seq->attachment;
    ret_view->durable = seq->durable != 0;
    ret_view->reserved = open ? seq->reserved : 0;
    ret_view->written = open ? seq->written : 0;
    ret_view->version = seq->version;
    ret_view->row_pages = seq->row_pages;
    ret_view->keyed = open ? seq->keyed : 0;
    ret_view->job = seq->job == 0 ? KVP_NONE : seq->job - 1;
    ret_view->job_tokens = seq->job_tokens;
    ret_view->after.timeline = seq->after_timeline;
    ret_view->after.value = seq->after_value;
    ret_view->pending_tokens = open ? seq->pending_tokens : 0;
    owed_copy(m, seq, &ret_view->copy);
}

enum kvp_status kvp_seq_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                            struct kvp_seq_view *ret_view)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    fill_view(m, found, ret_view);
    return KVP_OK;
}

enum kvp_status kvp_seq_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot,
                           struct kvp_seq_view *ret_view)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (slot >= m->pool->max_sequences || m->seqs[slot].state == KVP_SEQ_FREE || m->seqs[slot].state == KVP_SEQ_PIN)
        return KVP_ENOENT;
    if (m->seqs[slot].row_pages > m->pool->row_pages)
        return KVP_ECORRUPT;
    fill_view(m, &m->seqs[slot], ret_view);
    return KVP_OK;
}

const uint32_t *kvp_seq_row(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot)
{
    const struct pool_map *m;
    if (map_pool(ledger, pool, &m) != KVP_OK || slot >= m->pool->max_sequences)
        return NULL;
    return row_of(m, slot);
}

void clear_pending(struct kvp_ledger *ledger, const struct block_seq *seq)
{
    put32(ledger, &seq->pending_tokens, 0);
    put32(ledger, &seq->after_timeline, 0);
    put64(ledger, &seq->after_value, 0);
}

enum kvp_status kvp_seq_set_pending(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                    uint32_t tokens, struct kvp_after after)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    if (after.value == 0 || tokens > found->reserved)
        return KVP_EINVAL;
    TRY(seq_changeable(m, found));
    TRY(txn_room(ledger, ROOM_SMALL));
    bool waits = tokens > found->written;
    put32(ledger, &found->pending_tokens, waits ? tokens : 0);
    put32(ledger, &found->after_timeline, waits ? after.timeline : 0);
    put64(ledger, &found->after_value, waits ? after.value : 0);
    return KVP_OK;
}

enum kvp_status kvp_seq_end_pending(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    TRY(txn_room(ledger, ROOM_SMALL));
    clear_pending(ledger, found);
    return KVP_OK;
}

enum kvp_status kvp_seq_transfer(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                 uint32_t to_attachment)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    TRY(find_live_attachment(m, to_attachment));
    if (found->attachment == to_attachment)
        return KVP_OK;
    if (found->job != 0)
        return KVP_EBUSY;
    if (find_key(ledger, m, to_attachment, found->key) != NULL)
        return KVP_EEXIST;
    TRY(txn_room(ledger, ROOM_SMALL));
    TRY(disown(ledger, m, found));
    own(ledger, m, found, to_attachment);
    put32(ledger, &found->version, found->version + 2);
    return KVP_OK;
}

enum kvp_status kvp_seq_close(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                              struct kvp_after after)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    if (m->pool->state == KVP_POOL_LIVE && m->pool->needs_after && after.value == 0 && found->row_pages != 0)
        return KVP_EINVAL;
    TRY(seq_changeable(m, found));
    TRY(txn_room(ledger, ROOM_SMALL));
    return retire_open(ledger, m, found, after);
}

/* ---- walks ---------------------------------------------------------------------------------------------------------
 */

/* The slot of a link, if it is in that state. */
static uint32_t linked_in_state(const struct pool_map *m, uint32_t link, enum kvp_seq_state state)
{
    uint32_t slot = linked_slot(m, link);
    return slot != KVP_NONE && m->seqs[slot].state == state ? slot : KVP_NONE;
}

uint32_t kvp_attachment_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment)
{
    const struct pool_map *m;
    if (map_pool(ledger, pool, &m) != KVP_OK || attachment >= KVP_ATTACHMENTS_MAX ||
        m->attachments[attachment].state == KVP_ATTACHMENT_FREE)
        return KVP_NONE;
    return linked_in_state(m, m->attachments[attachment].first, KVP_SEQ_OPEN);
}

static uint32_t next_in_state(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot,
                              enum kvp_seq_state state)
{
    const struct pool_map *m;
    if (map_pool(ledger, pool, &m) != KVP_OK || slot >= m->pool->max_sequences || m->seqs[slot].state != (uint32_t)state)
        return KVP_NONE;
    return linked_in_state(m, m->seqs[slot].next, state);
}

uint32_t kvp_attachment_next(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot)
{
    return next_in_state(ledger, pool, slot, KVP_SEQ_OPEN);
}

uint32_t kvp_retiring_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool)
{
    const struct pool_map *m;
    if (map_pool(ledger, pool, &m) != KVP_OK)
        return KVP_NONE;
    return linked_in_state(m, m->pool->retiring, KVP_SEQ_RETIRING);
}

uint32_t kvp_retiring_next(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot)
{
    return next_in_state(ledger, pool, slot, KVP_SEQ_RETIRING);
}

enum kvp_status kvp_seq_retired(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (slot >= m->pool->max_sequences || m->seqs[slot].state != KVP_SEQ_RETIRING)
        return KVP_ENOENT;
    TRY(txn_room(ledger, ROOM_SMALL));
    return reclaim_retired(ledger, m, &m->seqs[slot]);
}
