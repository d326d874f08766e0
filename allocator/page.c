/**
 * Pages: an 8-byte record each, and the free list through them.
 *
 *   63      62     61         60     59 … 53              52 … 32     31 … 0
 *   sealed  keyed  published  dirty  tenant + 1 (0: none)  references  link (next free page, KVP_NONE at the end)
 *
 *            take (1 reference)        seal (its tokens were seen)      ┌── share: + 1 reference
 *   FREE ──────────────────────► HELD ────────────────────────────► SEALED ◄─────────────┐
 *     ▲                            │                                 │    │              │ found by its key
 *     │                            │     last reference dropped,     │    │ … published  │
 *     ├────────────────────────────┴───── not published ─────────────┘    ▼              │
 *     └───────────────────────────────────── evicted ───────────────── CACHED ───────────┘
 *
 * References come from rows, in whatever state their sequence is, from pins, and from owed copies, whose source they
 * hold; from nothing else. RETIRING and QUARANTINED are states of the row that holds the reference (seq.c), not of the
 * page. A HELD page has one row; it may have owed copies beside it (a child's, of the part that was forked). A keyed page
 * has a block key in its index entry; a published one is found by it (prefix.c). CACHED is no reference and published.
 *
 * The tenant is who took the page last: whose it is while it is used, whose bytes it holds when it is free. Taken by
 * another tenant it is dirty, where the pool wants it so, until it was zeroed; free again before that, it stays so.
 *
 * Free pages: those on the list, and those from pool.pages_used on, which were never handed out and whose records are
 * zero. The list is first in, last out; a pop or push stores the page's record, and the list's head once a batch.
 */
#include "internal.h"

#define LIST_FIRST(list)        ((uint32_t)(list))
#define LIST_COUNT(list)        ((uint32_t)((list) >> 32))
#define LIST_WORD(first, count) ((uint64_t)(count) << 32 | (first))

uint32_t free_pages(const struct pool_map *m)
{
    return LIST_COUNT(m->pool->free_list) + (m->pool->pages - m->pool->pages_used);
}

/* ---- taking --------------------------------------------------------------------------------------------------------
 */

/* Make room for n pages of a tenant: first within its quota, then in the pool. */
static enum kvp_status evict_for(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t tenant, uint32_t n,
                                 uint32_t *reterr_short)
{
    const struct block_tenant *taker = &m->tenants[tenant];
    uint32_t evicted;
    bool stuck;
    if (taker->quota != 0 && (uint64_t)taker->pages + n > taker->quota) {
        uint64_t over = (uint64_t)taker->pages + n - taker->quota;
        uint32_t wanted = over < taker->cached ? (uint32_t)over : taker->cached;
        struct evict_scope own = {.taker = tenant, .own = true};
        TRY(evict_pages(ledger, m, own, wanted, 2 * n, &evicted, &stuck));
        if (stuck)
            return KVP_EAGAIN;
        if (evicted < over) {
            *reterr_short = (uint32_t)(over - evicted);
            return KVP_ENOPAGES;
        }
    }
    uint32_t available = free_pages(m);
    if (n > available) {
        struct evict_scope any = {.taker = tenant};
        TRY(evict_pages(ledger, m, any, n - available, 2 * n, &evicted, &stuck));
        if (stuck)
            return KVP_EAGAIN;
        if (evicted < n - available) {
            *reterr_short = n - available - evicted;
            return KVP_ENOPAGES;
        }
    }
    return KVP_OK;
}

/* The record of a page that was free, in its new holder's hands; counts those that are to be zeroed. */
static inline uint64_t taken_record(const struct pool_map *m, uint64_t record, uint32_t tenant, uint32_t *dirty)
{
    bool others = PAGE_TENANT(record) != 0 && PAGE_TENANT(record) != tenant + 1;
    uint64_t taken = PAGE_RECORD(tenant, 1, 0);
    if ((others || (record & PAGE_DIRTY)) && m->pool->zero_on_reuse) {
        (*dirty)++;
        taken |= PAGE_DIRTY;
    }
    return taken;
}

enum kvp_status take_pages(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t seq_slot, uint32_t first,
                           uint32_t n, uint32_t *reterr_short)
{
    const struct block_seq *seq = &m->seqs[seq_slot];
    uint32_t tenant = m->attachments[seq->attachment].tenant;
    if (tenant >= KVP_TENANTS_MAX)
        return KVP_ECORRUPT;
    TRY(evict_for(ledger, m, tenant, n, reterr_short));
    uint64_t list = m->pool->free_list;
    uint32_t page = LIST_FIRST(list), count = LIST_COUNT(list);
    uint32_t used = m->pool->pages_used, dirty = 0;
    uint32_t listed = n < count ? n : count;
    for (uint32_t i = 0; i < listed; i++) {
        if (!is_used_page(m, page) || PAGE_REFS(m->pages[page]) != 0 || PAGE_PUBLISHED(m->pages[page]))
            return KVP_ECORRUPT;
        uint64_t record = m->pages[page];
        if (PAGE_LINK(record) < m->pool->pages)
            __builtin_prefetch(&m->pages[PAGE_LINK(record)], 1);
        put64(ledger, &m->pages[page], taken_record(m, record, tenant, &dirty));
        put_row(ledger, m, seq, first + i, page);
        page = PAGE_LINK(record);
    }
    if (listed != 0)
        put64(ledger, &m->pool->free_list, LIST_WORD(page, count - listed));
    for (uint32_t i = listed; i < n; i++) {
        put64(ledger, &m->pages[used], PAGE_RECORD(tenant, 1, 0));
        put_row(ledger, m, seq, first + i, used++);
    }
    if (n != listed)
        put32(ledger, &m->pool->pages_used, used);
    if (dirty != 0)
        put32(ledger, &m->pool->dirty, m->pool->dirty + dirty);
    put32(ledger, &m->tenants[tenant].pages, m->tenants[tenant].pages + n);
    return KVP_OK;
}

enum kvp_status share_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    if (!is_used_page(m, page))
        return KVP_ECORRUPT;
    uint64_t record = m->pages[page];
    if (PAGE_REFS(record) == 0 || PAGE_REFS(record) == PAGE_REFS_MAX)
        return KVP_ECORRUPT;
    put64(ledger, &m->pages[page], record + PAGE_ONE_REF);
    return KVP_OK;
}

/* ---- giving back ---------------------------------------------------------------------------------------------------
 */

struct page_drop drop_begin(const struct pool_map *m)
{
    return (struct page_drop){.free_list = m->pool->free_list, .tenant = KVP_TENANTS_MAX};
}

/* The counts of the tenant at hand. */
void drop_counts(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop)
{
    if (drop->freed != 0)
        put32(ledger, &m->tenants[drop->tenant].pages, m->tenants[drop->tenant].pages - drop->freed);
    if (drop->evicted != 0) {
        put32(ledger, &m->tenants[drop->tenant].cached, m->tenants[drop->tenant].cached - drop->evicted);
        put32(ledger, &m->pool->cached, m->pool->cached - drop->evicted);
        put32(ledger, &m->pool->published, m->pool->published - drop->evicted);
        put64(ledger, &m->pool->evictions, m->pool->evictions + drop->evicted);
    }
    if (drop->cached != 0) {
        policy_released(ledger, m, drop->cached);
        put32(ledger, &m->tenants[drop->tenant].cached, m->tenants[drop->tenant].cached + drop->cached);
        put32(ledger, &m->pool->cached, m->pool->cached + drop->cached);
    }
    drop->freed = drop->cached = drop->evicted = 0;
}

enum kvp_status free_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop, uint32_t page)
{
    uint64_t record = m->pages[page];
    uint32_t tenant = PAGE_TENANT(record) - 1;
    if (tenant >= KVP_TENANTS_MAX)
        return KVP_ECORRUPT;
    if (drop->tenant != tenant)
        drop_counts(ledger, m, drop);
    drop->tenant = tenant;
    drop->freed++;
    put64(ledger, &m->pages[page], PAGE_RECORD(tenant, 0, LIST_FIRST(drop->free_list)) | (record & PAGE_DIRTY));
    if (m->digests != NULL)
        forget_digest(ledger, m, page);
    if (record & PAGE_DIRTY)
        put32(ledger, &m->pool->dirty, m->pool->dirty - 1);
    drop->free_list = LIST_WORD(page, LIST_COUNT(drop->free_list) + 1);
    drop->changed = true;
    return KVP_OK;
}

enum kvp_status drop_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop, uint32_t page)
{
    if (!is_used_page(m, page))
        return KVP_ECORRUPT;
    uint64_t record = m->pages[page];
    if (PAGE_REFS(record) == 0)
        return KVP_ECORRUPT;
    if (PAGE_REFS(record) > 1) {
        put64(ledger, &m->pages[page], record - PAGE_ONE_REF);
        return KVP_OK;
    }
    if (!PAGE_PUBLISHED(record))
        return free_page(ledger, m, drop, page);
    uint32_t tenant = PAGE_TENANT(record) - 1;
    if (tenant >= KVP_TENANTS_MAX)
        return KVP_ECORRUPT;
    if (drop->tenant != tenant)
        drop_counts(ledger, m, drop);
    drop->tenant = tenant;
    drop->cached++;
    put64(ledger, &m->pages[page], record - PAGE_ONE_REF);
    return cache_page(ledger, m, &drop->run, tenant, page);
}

void drop_end(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop)
{
    list_cut_end(ledger, m, &drop->cut);
    list_run_end(ledger, m, &drop->run);
    drop_counts(ledger, m, drop);
    if (drop->changed)
        put64(ledger, &m->pool->free_list, drop->free_list);
}

/* ---- calls ---------------------------------------------------------------------------------------------------------
 */

enum kvp_status kvp_page_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page,
                             struct kvp_page_view *ret_view)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (page >= m->pool->pages)
        return KVP_EINVAL;
    uint64_t record = m->pages[page];
    struct kvp_page_view view = {.state = KVP_PAGE_FREE, .references = PAGE_REFS(record), .dirty = record & PAGE_DIRTY};
    view.tenant = PAGE_TENANT(record) == 0 ? KVP_NONE : PAGE_TENANT(record) - 1;
    if (page < m->pool->reserved_pages)
        view.state = KVP_PAGE_RESERVED;
    else if (view.references != 0)
        view.state = PAGE_SEALED(record) ? KVP_PAGE_SEALED : KVP_PAGE_HELD;
    else if (PAGE_PUBLISHED(record))
        view.state = KVP_PAGE_CACHED;
    *ret_view = view;
    return KVP_OK;
}

enum kvp_status kvp_page_cleaned(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (!is_used_page(m, page) || PAGE_REFS(m->pages[page]) == 0)
        return KVP_EINVAL;
    TRY(txn_room(ledger, ROOM_SMALL));
    if (m->pages[page] & PAGE_DIRTY) {
        put64(ledger, &m->pages[page], m->pages[page] & ~PAGE_DIRTY);
        put32(ledger, &m->pool->dirty, m->pool->dirty - 1);
    }
    return KVP_OK;
}
