/**
 * Rows: the page lists of sequences; how they grow, are cut, sealed, shared and given back.
 *
 *   row    [0 … written/T)  SEALED, may be shared    |  [written/T … reserved/T]  HELD, this sequence's alone to write
 *
 * An OPEN row has exactly the pages that `reserved` needs. A page in it is SEALED if and only if `written` covers it
 * whole. Its first `keyed` pages have block keys (prefix.c).
 *
 * An owed copy: after a fork, or a cut, in the middle of a page that is not this sequence's alone, the row holds a
 * fresh page there, whose first tokens have to be copied from the source page. Those tokens count as written: the
 * sequence starts with `written` at their end. The copy is settled when `written` is observed to rise above that, since
 * the sequence's writer copies before it appends; until then the source is held by a reference of its own. So a copy's
 * destination is always row[written / T], its length written mod T, and only its source is stored; a cut that leaves a
 * part of it shortens it by that, and a cut in front of it ends it. A fork of a sequence that owes copies from the
 * same source as it, since the bytes are not at its own page until then.
 *
 * Row ids are not logged where they are dead: at and beyond the count that the row had when the transaction began, or
 * at any time in it (the slot's word `shrunk` keeps that count, under the transaction's serial number). A serial number
 * that an earlier process used already makes stores logged that need not be, never the other way.
 */
#include "internal.h"

#define SHRUNK_TXN(word)               ((uint32_t)(word))
#define SHRUNK_PAGES(word)             ((uint32_t)((word) >> 32))
#define SHRUNK_WORD(txn, n)            ((uint64_t)(n) << 32 | (txn))
#define PAGES_FOR(tokens, page_tokens) (((tokens) + (page_tokens)-1) / (page_tokens))

void put_row(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t index,
             uint32_t page)
{
    KVP_ASSERT(index < m->pool->row_pages);
    const uint32_t *word = row_of(m, slot_of(m, seq)) + index;
    bool was_longer = SHRUNK_TXN(seq->shrunk) == ledger->txn_serial && index < SHRUNK_PAGES(seq->shrunk);
    if (index < seq->row_pages || was_longer)
        put32(ledger, word, page);
    else
        put32_dead(ledger, word, page);
}

void shrink_row(struct kvp_ledger *ledger, const struct block_seq *seq, uint32_t row_pages)
{
    uint32_t longest = seq->row_pages;
    if (SHRUNK_TXN(seq->shrunk) == ledger->txn_serial && SHRUNK_PAGES(seq->shrunk) > longest)
        longest = SHRUNK_PAGES(seq->shrunk);
    put64(ledger, &seq->shrunk, SHRUNK_WORD(ledger->txn_serial, longest));
    put32(ledger, &seq->row_pages, row_pages);
}

void owed_copy(const struct pool_map *m, const struct block_seq *seq, struct kvp_page_copy *ret_copy)
{
    uint32_t page_tokens = m->pool->page_tokens;
    bool owes = seq->copy_source != 0 && seq->state == KVP_SEQ_OPEN && seq->written / page_tokens < seq->row_pages;
    ret_copy->source = owes ? seq->copy_source - 1 : KVP_NONE;
    ret_copy->destination = owes ? row_of(m, slot_of(m, seq))[seq->written / page_tokens] : KVP_NONE;
    ret_copy->tokens = owes ? seq->written % page_tokens : 0;
}

/* ---- reserve -------------------------------------------------------------------------------------------------------
 */

static enum kvp_status grow(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                            uint32_t reserved, uint32_t *reterr_short)
{
    uint32_t needed = PAGES_FOR(reserved, m->pool->page_tokens);
    if (needed < seq->row_pages)
        return KVP_ECORRUPT;
    uint32_t n = needed - seq->row_pages;
    TRY(txn_room(ledger, ROOM_SMALL + 2 * (uint64_t)n));
    if (n != 0) {
        TRY(take_pages(ledger, m, slot_of(m, seq), seq->row_pages, n, reterr_short));
        put32(ledger, &seq->row_pages, needed);
    }
    put32(ledger, &seq->reserved, reserved);
    return KVP_OK;
}

/* Give up the pages of a row from `keep` on, and with them the source of the copy that is owed to one of them. */
static enum kvp_status cut_pages(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                                 uint32_t keep, struct kvp_after after)
{
    const uint32_t *row = row_of(m, slot_of(m, seq));
    uint32_t n = seq->row_pages - keep;
    uint32_t source = seq->copy_source != 0 && seq->written / m->pool->page_tokens >= keep ? seq->copy_source : 0;
    if (after.value != 0 || n > KVP_RECLAIM_SLICE) {
        const struct block_seq *ghost;
        TRY(take_slot(ledger, m, &ghost));
        for (uint32_t i = 0; i < n; i++)
            put_row(ledger, m, ghost, i, row[keep + i]);
        put32(ledger, &ghost->row_pages, n);
        put32(ledger, &ghost->copy_source, source);
        retire_slot(ledger, m, ghost, seq->attachment, after);
    } else {
        TRY(txn_room(ledger, 2 * ROOM_SMALL + STORES_DROP * (uint64_t)n));
        struct page_drop drop = drop_begin(m);
        for (uint32_t i = seq->row_pages; i-- > keep;)
            TRY(drop_page(ledger, m, &drop, row[i]));
        if (source != 0)
            TRY(drop_page(ledger, m, &drop, source - 1));
        drop_end(ledger, m, &drop);
    }
    shrink_row(ledger, seq, keep);
    if (source != 0)
        put32(ledger, &seq->copy_source, 0);
    return KVP_OK;
}

static enum kvp_status cut(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                           uint32_t reserved, struct kvp_after after, uint32_t *reterr_short)
{
    uint32_t keep = PAGES_FOR(reserved, m->pool->page_tokens);
    if (keep > seq->row_pages)
        return KVP_ECORRUPT;
    if (keep < seq->row_pages && m->pool->needs_after && after.value == 0)
        return KVP_EINVAL;
    TRY(txn_room(ledger, 2 * ROOM_SMALL + (seq->row_pages - keep)));
    if (keep < seq->row_pages)
        TRY(cut_pages(ledger, m, seq, keep, after));
    uint32_t written = seq->written < reserved ? seq->written : reserved;
    if (reserved % m->pool->page_tokens != 0) {
        uint32_t page = row_of(m, slot_of(m, seq))[keep - 1];
        if (page >= m->pool->pages)
            return KVP_ECORRUPT;
        if (PAGE_SEALED(m->pages[page]) || PAGE_REFS(m->pages[page]) > 1) {
            if (written <= (keep - 1) * m->pool->page_tokens || seq->copy_source != 0)
                return KVP_ECORRUPT;
            TRY(take_pages(ledger, m, slot_of(m, seq), keep - 1, 1, reterr_short));
            put32(ledger, &seq->copy_source, page + 1);
        } else if (PAGE_KEYED(m->pages[page])) {
            put64(ledger, &m->pages[page], m->pages[page] & ~PAGE_KEYED_BIT);
        }
    }
    if (seq->keyed > reserved / m->pool->page_tokens)
        put32(ledger, &seq->keyed, reserved / m->pool->page_tokens);
    if (written != seq->written)
        put32(ledger, &seq->written, written);
    put32(ledger, &seq->reserved, reserved);
    put32(ledger, &seq->version, seq->version + 2);
    if (seq->pending_tokens > reserved)
        clear_pending(ledger, seq);
    return KVP_OK;
}

enum kvp_status kvp_seq_reserve(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                uint32_t reserved, bool truncate, struct kvp_after after, uint32_t *reterr_short)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    if (reserved > (uint64_t)m->pool->row_pages * m->pool->page_tokens || reserved > KVP_SEQUENCE_TOKENS_MAX)
        return KVP_EINVAL;
    if (reserved == found->reserved)
        return KVP_OK;
    if (reserved < found->reserved && !truncate)
        return KVP_EINVAL;
    TRY(seq_changeable(m, found));
    if (reserved > found->reserved)
        return grow(ledger, m, found, reserved, reterr_short);
    return cut(ledger, m, found, reserved, after, reterr_short);
}

/* ---- observe -------------------------------------------------------------------------------------------------------
 */

enum kvp_status observe_seq(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                            uint32_t tokens, bool *ret_changed)
{
    uint32_t page_tokens = m->pool->page_tokens;
    uint32_t written = tokens < seq->reserved ? tokens : seq->reserved;
    if (written <= seq->written) {
        *ret_changed = false;
        return KVP_OK;
    }
    TRY(txn_room(ledger, ROOM_SMALL + STORES_SEAL));
    uint32_t page = seq->written / page_tokens, end = written / page_tokens;
    if (end > seq->row_pages)
        return KVP_ECORRUPT;
    const uint32_t *row = row_of(m, slot_of(m, seq));
    struct publish_run run = {.published = 0};
    for (; page < end && txn_room_left(ledger) >= ROOM_SMALL + STORES_SEAL; page++)
        TRY(seal_page(ledger, m, &run, row, page));
    publish_end(ledger, m, &run);
    if (page < end)
        written = page * page_tokens;
    if (seq->copy_source != 0) {
        struct page_drop drop = drop_begin(m);
        TRY(drop_page(ledger, m, &drop, seq->copy_source - 1));
        drop_end(ledger, m, &drop);
        put32(ledger, &seq->copy_source, 0);
    }
    put32(ledger, &seq->written, written);
    if (seq->pending_tokens != 0 && seq->pending_tokens <= written)
        clear_pending(ledger, seq);
    *ret_changed = true;
    return KVP_OK;
}

enum kvp_status kvp_seq_observe(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                uint32_t tokens, bool *ret_changed)
{
    const struct pool_map *m;
    const struct block_seq *found;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, seq, &found));
    return observe_seq(ledger, m, found, tokens, ret_changed);
}

/* ---- fork ----------------------------------------------------------------------------------------------------------
 */

static enum kvp_status share_row(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *parent,
                                 const struct block_seq *child, uint32_t tokens, uint32_t *reterr_short)
{
    const uint32_t *row = row_of(m, slot_of(m, parent));
    uint32_t full = tokens / m->pool->page_tokens;
    bool part = tokens % m->pool->page_tokens != 0;
    if (full + part > parent->row_pages)
        return KVP_ECORRUPT;
    for (uint32_t i = 0; i < full; i++) {
        TRY(share_page(ledger, m, row[i]));
        if (!PAGE_SEALED(m->pages[row[i]]))
            return KVP_ECORRUPT;
        put_row(ledger, m, child, i, row[i]);
    }
    if (part) {
        bool owes = parent->copy_source != 0 && parent->written / m->pool->page_tokens == full;
        uint32_t source = owes ? parent->copy_source - 1 : row[full];
        TRY(share_page(ledger, m, source));
        TRY(take_pages(ledger, m, slot_of(m, child), full, 1, reterr_short));
        put32(ledger, &child->copy_source, source + 1);
    }
    put32(ledger, &child->row_pages, full + part);
    put32(ledger, &child->reserved, tokens);
    put32(ledger, &child->written, tokens);
    put32(ledger, &child->keyed, parent->keyed < full ? parent->keyed : full);
    return KVP_OK;
}

enum kvp_status kvp_seq_fork(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id parent,
                             uint32_t attachment, uint64_t key, uint32_t tokens, struct kvp_seq_id *ret_child,
                             uint32_t *reterr_short)
{
    const struct pool_map *m;
    const struct block_seq *found, *child;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_seq(m, parent, &found));
    TRY(find_live_attachment(m, attachment));
    if (tokens > found->written)
        return KVP_EINVAL;
    if (find_key(ledger, m, attachment, key) != NULL)
        return KVP_EEXIST;
    TRY(txn_room(ledger, 2 * ROOM_SMALL + 2 * (uint64_t)(tokens / m->pool->page_tokens)));
    TRY(take_slot(ledger, m, &child));
    open_slot(ledger, m, child, attachment, key, found->durable != 0 && found->attachment == attachment);
    TRY(share_row(ledger, m, found, child, tokens, reterr_short));
    *ret_child = (struct kvp_seq_id){slot_of(m, child), child->generation};
    return KVP_OK;
}

/* ---- reclaim -------------------------------------------------------------------------------------------------------
 */

/* Drop up to n references of a row, from its end; when it is empty, free its slot. */
static enum kvp_status reclaim_row(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                                   uint32_t n, struct page_drop *drop)
{
    const uint32_t *row = row_of(m, slot_of(m, seq));
    uint32_t left = seq->row_pages - n;
    for (uint32_t i = seq->row_pages; i-- > left;)
        TRY(drop_page(ledger, m, drop, row[i]));
    if (n != 0)
        shrink_row(ledger, seq, left);
    if (left != 0)
        return KVP_OK;
    if (seq->copy_source != 0) {
        TRY(drop_page(ledger, m, drop, seq->copy_source - 1));
        put32(ledger, &seq->copy_source, 0);
    }
    TRY(list_remove(ledger, m, &m->pool->reclaim, seq));
    free_slot(ledger, m, seq);
    put32(ledger, &m->pool->retiring_count, m->pool->retiring_count - 1);
    return KVP_OK;
}

enum kvp_status kvp_pool_reclaim(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t budget, bool *ret_more)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    struct page_drop drop = drop_begin(m);
    while (budget > 0 && m->pool->reclaim != 0 && txn_room_left(ledger) > 2 * ROOM_SMALL) {
        uint32_t slot = linked_slot(m, m->pool->reclaim);
        if (slot == KVP_NONE || m->seqs[slot].state != KVP_SEQ_RECLAIM || m->seqs[slot].row_pages > m->pool->row_pages)
            return KVP_ECORRUPT;
        uint32_t room = (txn_room_left(ledger) - 2 * ROOM_SMALL) / STORES_DROP;
        uint32_t n = m->seqs[slot].row_pages;
        n = n < budget ? n : budget;
        n = n < room ? n : room;
        if (n == 0 && m->seqs[slot].row_pages != 0)
            break;
        TRY(reclaim_row(ledger, m, &m->seqs[slot], n, &drop));
        budget -= n > 0 ? n : 1;
    }
    drop_end(ledger, m, &drop);
    *ret_more = m->pool->reclaim != 0;
    return KVP_OK;
}
