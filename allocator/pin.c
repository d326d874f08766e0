/**
 * Pins: prefixes that stay, whatever is evicted, until they are ended.
 *
 *   FREE ──pin──► PIN ──end──► RECLAIM ──► FREE
 *
 * A pin is a slot whose row holds the pages of a prefix, in the pool's list of pins by next and prev. It has no owner, no
 * key and no length; its lease is the caller's to watch. There is one a prefix: two that end in the same page are the
 * same.
 */
#include "internal.h"

/* The pin of a prefix whose last page that is, or NULL. */
static const struct block_seq *find_pin(const struct pool_map *m, uint32_t page)
{
    uint32_t slot = linked_slot(m, m->pool->pins);
    for (uint32_t steps = 0; slot != KVP_NONE && steps < KVP_PINS_MAX; steps++) {
        const struct block_seq *pin = &m->seqs[slot];
        if (pin->state != KVP_SEQ_PIN || pin->row_pages == 0 || pin->row_pages > m->pool->row_pages)
            return NULL;
        if (row_of(m, slot)[pin->row_pages - 1] == page)
            return pin;
        slot = linked_slot(m, pin->next);
    }
    return NULL;
}

/* The page of the last block of a prefix that is wholly known. */
static enum kvp_status last_page(const struct kvp_ledger *ledger, const struct pool_map *m, struct kvp_pool_id pool,
                                 uint32_t tenant, size_t n, const struct kvp_block_key *keys, size_t *ret_blocks,
                                 uint32_t *ret_page)
{
    TRY(kvp_cache_match(ledger, pool, tenant, n, keys, ret_blocks, NULL));
    if (n == 0 || *ret_blocks != n)
        return KVP_ENOENT;
    *ret_page = find_block(m, tenant, &keys[n - 1]);
    return KVP_OK;
}

enum kvp_status kvp_pin(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                        const struct kvp_block_key *keys, uint32_t lease_ms, struct kvp_seq_id *ret_pin,
                        size_t *ret_blocks)
{
    const struct pool_map *m;
    uint32_t page, taken;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(last_page(ledger, m, pool, tenant, n, keys, ret_blocks, &page));
    TRY(txn_room(ledger, 2 * ROOM_SMALL));
    const struct block_seq *pin = find_pin(m, page);
    if (pin == NULL) {
        if (m->pool->pin_count >= KVP_PINS_MAX || n > m->pool->row_pages)
            return KVP_ELIMIT;
        TRY(take_slot(ledger, m, &pin));
        TRY(take_known(ledger, m, pin, tenant, n, keys, &taken));
        if (taken != n)
            return KVP_ELIMIT;
        put32(ledger, &pin->attachment, KVP_NONE);
        put32(ledger, &pin->state, KVP_SEQ_PIN);
        list_push(ledger, m, &m->pool->pins, pin);
        put32(ledger, &m->pool->pin_count, m->pool->pin_count + 1);
    }
    put64(ledger, &pin->after_value, lease_ms);
    *ret_pin = (struct kvp_seq_id){slot_of(m, pin), pin->generation};
    return KVP_OK;
}

enum kvp_status kvp_pin_find(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                             const struct kvp_block_key *keys, struct kvp_seq_id *ret_pin)
{
    const struct pool_map *m;
    uint32_t page;
    size_t blocks;
    TRY(map_pool(ledger, pool, &m));
    TRY(last_page(ledger, m, pool, tenant, n, keys, &blocks, &page));
    const struct block_seq *pin = find_pin(m, page);
    if (pin == NULL)
        return KVP_ENOENT;
    *ret_pin = (struct kvp_seq_id){slot_of(m, pin), pin->generation};
    return KVP_OK;
}

enum kvp_status kvp_pin_end(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id pin)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (pin.slot >= m->pool->max_sequences || pin.generation == 0 || m->seqs[pin.slot].state != KVP_SEQ_PIN ||
        m->seqs[pin.slot].generation != pin.generation)
        return KVP_ESTALE;
    const struct block_seq *found = &m->seqs[pin.slot];
    TRY(txn_room(ledger, ROOM_SMALL));
    TRY(list_remove(ledger, m, &m->pool->pins, found));
    put32(ledger, &m->pool->pin_count, m->pool->pin_count - 1);
    retire_slot(ledger, m, found, KVP_NONE, (struct kvp_after){0});
    return KVP_OK;
}

static uint32_t pin_slot(const struct pool_map *m, uint32_t link)
{
    uint32_t slot = linked_slot(m, link);
    return slot != KVP_NONE && m->seqs[slot].state == KVP_SEQ_PIN ? slot : KVP_NONE;
}

uint32_t kvp_pin_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool)
{
    const struct pool_map *m;
    return map_pool(ledger, pool, &m) == KVP_OK ? pin_slot(m, m->pool->pins) : KVP_NONE;
}

uint32_t kvp_pin_next(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot)
{
    const struct pool_map *m;
    if (map_pool(ledger, pool, &m) != KVP_OK || slot >= m->pool->max_sequences || m->seqs[slot].state != KVP_SEQ_PIN)
        return KVP_NONE;
    return pin_slot(m, m->seqs[slot].next);
}

enum kvp_status kvp_pin_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot,
                           struct kvp_pin_view *ret_view)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (slot >= m->pool->max_sequences || m->seqs[slot].state != KVP_SEQ_PIN)
        return KVP_ENOENT;
    const struct block_seq *pin = &m->seqs[slot];
    uint32_t page = pin->row_pages == 0 || pin->row_pages > m->pool->row_pages ? KVP_NONE : row_of(m, slot)[0];
    if (page == KVP_NONE || !is_used_page(m, page) || PAGE_TENANT(m->pages[page]) - 1 >= KVP_TENANTS_MAX)
        return KVP_ECORRUPT;
    *ret_view = (struct kvp_pin_view){
        .id = {slot, pin->generation},
        .tenant = m->tenants[PAGE_TENANT(m->pages[page]) - 1].id,
        .lease_ms = (uint32_t)pin->after_value,
        .blocks = pin->row_pages,
    };
    return KVP_OK;
}
