/**
 * Snapshots: a copy of the ledger at one moment, taken in slices between transactions.
 *
 *   0                          copied                                             end
 *   ├── as it is now: stores go ─┼── as it was when the memory was made: zeros ──────┤
 *   │   to the ledger and here   │   (stores go to the ledger alone)                 │
 *
 * Each step copies on from `copied`, outside any transaction; so at the end of a step everything below it is the ledger's
 * committed state, and store.h keeps it so. When `copied` has passed the last extent, the copy is the ledger.
 *
 * Copied are the root part but for the log, which is empty, and each extent up to its rows; of a row only the ids that
 * count: those beyond are stored before they do. Chunks of zeros are not touched in the copy, where they are zeros
 * already. A pool's record that can not be is skipped with its extent: the audit of the copy says so.
 *
 * A new pool's memory is zeroed by its caller, behind the ledger's back; the copy may hold an earlier pool there. So
 * kvp_pool_create makes a snapshot stale: rare, and cheaper to begin again.
 */
#include "internal.h"

#include <string.h>

#define CHUNK      4096u
#define ROW_BUDGET 128u /* what a row costs beside its ids: its sequence's record is looked at */

void kvp_snapshot_begin(struct kvp_ledger *ledger, unsigned char *memory)
{
    KVP_ASSERT(!ledger->in_txn);
    ledger->copy = memory;
    ledger->copied = 0;
    ledger->copy_stale = false;
}

void kvp_snapshot_give_up(struct kvp_ledger *ledger)
{
    ledger->copy = NULL;
    ledger->copied = 0;
}

size_t kvp_snapshot_bytes(const struct kvp_ledger *ledger)
{
    uint64_t end = ROOT_BYTES;
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        const struct block_pool *pool = &pools_of(ledger)[slot];
        if (pool->state != KVP_POOL_FREE && check_pool_record(ledger, slot) == NULL &&
            pool->extent_offset + pool->extent_bytes > end)
            end = pool->extent_offset + pool->extent_bytes;
    }
    return end;
}

static bool is_zero(const unsigned char *bytes, size_t n)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, n - 1) == 0;
}

/* Copy on until `end`, at most `budget` bytes. @return what is left of the budget */
static size_t copy_until(struct kvp_ledger *ledger, uint64_t end, size_t budget)
{
    while (ledger->copied < end && budget > 0) {
        uint64_t at = ledger->copied, n = CHUNK - at % CHUNK;
        n = n < end - at ? n : end - at;
        if (!is_zero(ledger->view + at, n))
            memcpy(ledger->copy + at, ledger->view + at, n);
        ledger->copied = at + n;
        budget -= budget < n ? budget : n;
    }
    return budget;
}

static void skip_to(struct kvp_ledger *ledger, uint64_t offset)
{
    if (ledger->copied < offset)
        ledger->copied = offset;
}

static size_t copy_root(struct kvp_ledger *ledger, size_t budget)
{
    budget = copy_until(ledger, LOG_OFFSET, budget);
    if (ledger->copied >= LOG_OFFSET)
        skip_to(ledger, SESSIONS_OFFSET);
    return copy_until(ledger, ROOT_BYTES, budget);
}

static size_t copy_rows(struct kvp_ledger *ledger, const struct pool_map *m, size_t budget)
{
    uint64_t rows = offset_of(ledger, m->rows), row_bytes = (uint64_t)m->pool->row_pages * sizeof(uint32_t);
    skip_to(ledger, rows);
    for (uint64_t slot = (ledger->copied - rows) / row_bytes; slot < m->pool->sequences_used && budget > 0; slot++) {
        uint64_t ids = m->seqs[slot].row_pages;
        uint64_t row = rows + slot * row_bytes;
        skip_to(ledger, row);
        budget = copy_until(ledger, row + (ids <= m->pool->row_pages ? ids * sizeof(uint32_t) : row_bytes), budget);
        budget -= budget < ROW_BUDGET ? budget : ROW_BUDGET;
    }
    return budget;
}

static size_t copy_extent(struct kvp_ledger *ledger, const struct pool_map *m, size_t budget)
{
    const struct block_pool *pool = m->pool;
    skip_to(ledger, pool->extent_offset);
    budget = copy_until(ledger, offset_of(ledger, m->rows), budget);
    if (budget > 0)
        budget = copy_rows(ledger, m, budget);
    if (budget > 0)
        skip_to(ledger, pool->extent_offset + pool->extent_bytes);
    return budget;
}

/* The pool whose extent is the first that is not copied to its end; KVP_NONE: none is left. */
static uint32_t next_pool(const struct kvp_ledger *ledger)
{
    const struct block_pool *pools = pools_of(ledger);
    uint32_t next = KVP_NONE;
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        if (pools[slot].state == KVP_POOL_FREE ||
            (next != KVP_NONE && pools[slot].extent_offset >= pools[next].extent_offset) ||
            check_pool_record(ledger, slot) != NULL ||
            pools[slot].extent_offset + pools[slot].extent_bytes <= ledger->copied)
            continue;
        next = slot;
    }
    return next;
}

enum kvp_status kvp_snapshot_step(struct kvp_ledger *ledger, size_t budget, bool *ret_taken,
                                  struct kvp_ledger *ret_snapshot)
{
    KVP_ASSERT(!ledger->in_txn && ledger->copy != NULL && budget > 0);
    if (ledger->copy_stale) {
        kvp_snapshot_give_up(ledger);
        return KVP_EAGAIN;
    }
    uint32_t slot = KVP_NONE;
    budget = copy_root(ledger, budget);
    while (budget > 0 && (slot = next_pool(ledger)) != KVP_NONE)
        budget = copy_extent(ledger, pool_at(ledger, slot), budget);
    *ret_taken = budget > 0 && slot == KVP_NONE;
    if (!*ret_taken)
        return KVP_OK;
    *ret_snapshot = (struct kvp_ledger){.view = ledger->copy, .bytes = ledger->bytes};
    map_pools(ret_snapshot);
    kvp_snapshot_give_up(ledger);
    return KVP_OK;
}
