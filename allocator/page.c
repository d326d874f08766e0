/**
 * Pages: an 8-byte record each, and the free list through them.
 *
 *   63      62 … 32      31 … 0
 *   sealed  references   link (next free page, KVP_NONE at the end)
 *
 *            take (1 reference)        seal (its tokens were seen)
 *   FREE ──────────────────────► HELD ────────────────────────────► SEALED
 *     ▲                            │                                   │  share: + 1 reference
 *     └────────────────────────────┴───────── last reference dropped ──┘  drop:  − 1 reference
 *
 * References come from rows, in whatever state their sequence is, and from owed copies, whose source they hold; from
 * nothing else. RETIRING and QUARANTINED are states of the row that holds the reference (seq.c), not of the page. A
 * HELD page has one row; it may have owed copies beside it (a child's, of the part that was forked).
 *
 * Free pages: those on the list, and those from pool.pages_used on, which were never handed out and whose records are
 * zero. The list is first in, last out; a pop or push stores the page's record, and the list's head once a batch.
 */
#include "internal.h"

#define PAGE_RECORD(sealed, refs, link) ((uint64_t)(sealed) << 63 | (uint64_t)(refs) << 32 | (link))
#define PAGE_REFS_MAX                   0x7fffffffu

#define LIST_FIRST(list)        ((uint32_t)(list))
#define LIST_COUNT(list)        ((uint32_t)((list) >> 32))
#define LIST_WORD(first, count) ((uint64_t)(count) << 32 | (first))

uint32_t free_pages(const struct pool_map *m)
{
    return LIST_COUNT(m->pool->free_list) + (m->pool->pages - m->pool->pages_used);
}

/* Whether an id can stand in a row: never a reserved page, never one that was not handed out. */
static bool is_used_page(const struct pool_map *m, uint32_t page)
{
    return page >= m->pool->reserved_pages && page < m->pool->pages_used;
}

enum kvp_status take_pages(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t seq_slot, uint32_t first,
                           uint32_t n, uint32_t *reterr_short)
{
    const struct block_seq *seq = &m->seqs[seq_slot];
    uint32_t available = free_pages(m);
    if (n > available) {
        *reterr_short = n - available;
        return KVP_ENOPAGES;
    }
    uint64_t list = m->pool->free_list;
    uint32_t page = LIST_FIRST(list), count = LIST_COUNT(list);
    uint32_t used = m->pool->pages_used;
    uint32_t listed = n < count ? n : count;
    for (uint32_t i = 0; i < listed; i++) {
        if (!is_used_page(m, page) || PAGE_REFS(m->pages[page]) != 0)
            return KVP_ECORRUPT;
        uint32_t next = PAGE_LINK(m->pages[page]);
        if (next < m->pool->pages)
            __builtin_prefetch(&m->pages[next], 1);
        put64(ledger, &m->pages[page], PAGE_RECORD(0, 1, 0));
        put_row(ledger, m, seq, first + i, page);
        page = next;
    }
    if (listed != 0)
        put64(ledger, &m->pool->free_list, LIST_WORD(page, count - listed));
    for (uint32_t i = listed; i < n; i++) {
        put64(ledger, &m->pages[used], PAGE_RECORD(0, 1, 0));
        put_row(ledger, m, seq, first + i, used++);
    }
    if (n != listed)
        put32(ledger, &m->pool->pages_used, used);
    return KVP_OK;
}

enum kvp_status share_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    if (!is_used_page(m, page))
        return KVP_ECORRUPT;
    uint64_t record = m->pages[page];
    if (PAGE_REFS(record) == 0 || PAGE_REFS(record) == PAGE_REFS_MAX)
        return KVP_ECORRUPT;
    put64(ledger, &m->pages[page], record + PAGE_RECORD(0, 1, 0));
    return KVP_OK;
}

enum kvp_status seal_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    if (!is_used_page(m, page) || PAGE_REFS(m->pages[page]) == 0)
        return KVP_ECORRUPT;
    if (!PAGE_SEALED(m->pages[page]))
        put64(ledger, &m->pages[page], m->pages[page] | PAGE_RECORD(1, 0, 0));
    return KVP_OK;
}

struct page_drop drop_begin(const struct pool_map *m)
{
    return (struct page_drop){.free_list = m->pool->free_list, .changed = false};
}

enum kvp_status drop_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop, uint32_t page)
{
    if (!is_used_page(m, page))
        return KVP_ECORRUPT;
    uint64_t record = m->pages[page];
    if (PAGE_REFS(record) == 0)
        return KVP_ECORRUPT;
    if (PAGE_REFS(record) > 1) {
        put64(ledger, &m->pages[page], record - PAGE_RECORD(0, 1, 0));
        return KVP_OK;
    }
    put64(ledger, &m->pages[page], PAGE_RECORD(0, 0, LIST_FIRST(drop->free_list)));
    drop->free_list = LIST_WORD(page, LIST_COUNT(drop->free_list) + 1);
    drop->changed = true;
    return KVP_OK;
}

void drop_end(struct kvp_ledger *ledger, const struct pool_map *m, const struct page_drop *drop)
{
    if (drop->changed)
        put64(ledger, &m->pool->free_list, drop->free_list);
}

enum kvp_status kvp_page_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page,
                             struct kvp_page_view *ret_view)
{
    struct pool_map m;
    TRY(map_pool(ledger, pool, &m));
    if (page >= m.pool->pages)
        return KVP_EINVAL;
    struct kvp_page_view view = {.state = KVP_PAGE_FREE, .references = PAGE_REFS(m.pages[page])};
    if (page < m.pool->reserved_pages)
        view.state = KVP_PAGE_RESERVED;
    else if (view.references != 0)
        view.state = PAGE_SEALED(m.pages[page]) ? KVP_PAGE_SEALED : KVP_PAGE_HELD;
    *ret_view = view;
    return KVP_OK;
}
