/**
 * Eviction: in which order CACHED pages become free ones.
 *
 * A page goes only when no published page extends it: a chain leaves from its end. Each tenant has a list a class, most
 * recently released first. A row lets go of its pages from the last to the first, so that within a list a page comes
 * after all that extend it, and the end of a list is a leaf. Not so where two writers of a block left one page behind
 * that is older than what extends it: such a page is taken out of its list when it comes to the end (parked), and put
 * back there when its last child is gone.
 *
 * The victim is the one of the lists' ends that the policy gives the least (policy.c), of the lists that the taker may
 * evict from: its own tenant's, and those of tenants that have more than their guaranteed share. Under policy lru every
 * page is of class 0, and that is the least recently used leaf.
 */
#include "internal.h"

#define LINK_NEXT(links)       ((uint32_t)(links))
#define LINK_PREV(links)       ((uint32_t)((links) >> 32))
#define LINKS_WORD(next, prev) ((uint64_t)(prev) << 32 | (next))
#define HEAD_FIRST(list)       ((uint32_t)(list))
#define HEAD_LAST(list)        ((uint32_t)((list) >> 32))
#define HEAD_WORD(first, last) ((uint64_t)(last) << 32 | (first))

/* ---- lists ---------------------------------------------------------------------------------------------------------
 */

bool is_cached(const struct pool_map *m, uint32_t page)
{
    return is_used_page(m, page) && PAGE_REFS(m->pages[page]) == 0 && PAGE_PUBLISHED(m->pages[page]) &&
           PAGE_TENANT(m->pages[page]) - 1 < KVP_TENANTS_MAX;
}

static const uint64_t *list_of(const struct pool_map *m, uint32_t page)
{
    return &m->tenants[PAGE_TENANT(m->pages[page]) - 1].lists[USE_CLASS(m->entries[page].use)];
}

/* The page of a link, if it can be in a list. */
static uint32_t linked_page(const struct pool_map *m, uint32_t link)
{
    return link != 0 && is_cached(m, link - 1) ? link - 1 : KVP_NONE;
}

static enum kvp_status list_put_first(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const uint64_t *list = list_of(m, page);
    uint32_t first = HEAD_FIRST(*list);
    put64(ledger, &m->entries[page].links, LINKS_WORD(first, 0));
    if (first == 0) {
        put64(ledger, list, HEAD_WORD(page + 1, page + 1));
        return KVP_OK;
    }
    if (linked_page(m, first) == KVP_NONE)
        return KVP_ECORRUPT;
    put64(ledger, &m->entries[first - 1].links, LINKS_WORD(LINK_NEXT(m->entries[first - 1].links), page + 1));
    put64(ledger, list, HEAD_WORD(page + 1, HEAD_LAST(*list)));
    return KVP_OK;
}

static enum kvp_status list_put_last(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const uint64_t *list = list_of(m, page);
    uint32_t last = HEAD_LAST(*list);
    put64(ledger, &m->entries[page].links, LINKS_WORD(0, last));
    if (last == 0) {
        put64(ledger, list, HEAD_WORD(page + 1, page + 1));
        return KVP_OK;
    }
    if (linked_page(m, last) == KVP_NONE)
        return KVP_ECORRUPT;
    put64(ledger, &m->entries[last - 1].links, LINKS_WORD(page + 1, LINK_PREV(m->entries[last - 1].links)));
    put64(ledger, list, HEAD_WORD(HEAD_FIRST(*list), page + 1));
    return KVP_OK;
}

static enum kvp_status list_take(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const uint64_t *list = list_of(m, page);
    uint64_t links = m->entries[page].links, head = *list;
    uint32_t next = linked_page(m, LINK_NEXT(links)), prev = linked_page(m, LINK_PREV(links));
    if ((LINK_NEXT(links) == 0 ? HEAD_LAST(head) != page + 1
                               : next == KVP_NONE || LINK_PREV(m->entries[next].links) != page + 1) ||
        (LINK_PREV(links) == 0 ? HEAD_FIRST(head) != page + 1
                               : prev == KVP_NONE || LINK_NEXT(m->entries[prev].links) != page + 1))
        return KVP_ECORRUPT;
    if (next != KVP_NONE)
        put64(ledger, &m->entries[next].links, LINKS_WORD(LINK_NEXT(m->entries[next].links), LINK_PREV(links)));
    if (prev != KVP_NONE)
        put64(ledger, &m->entries[prev].links, LINKS_WORD(LINK_NEXT(links), LINK_PREV(m->entries[prev].links)));
    if (next == KVP_NONE || prev == KVP_NONE)
        put64(ledger, list,
              HEAD_WORD(prev == KVP_NONE ? LINK_NEXT(links) : HEAD_FIRST(head),
                        next == KVP_NONE ? LINK_PREV(links) : HEAD_LAST(head)));
    return KVP_OK;
}

/* ---- cached, and found again ---------------------------------------------------------------------------------------
 */

enum kvp_status cache_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    put64(ledger, &m->entries[page].use, policy_cached(ledger, m, page));
    return list_put_first(ledger, m, page);
}

enum kvp_status relist_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint64_t use)
{
    uint64_t before = m->entries[page].use;
    if ((before & USE_PARKED) || USE_CLASS(before) == USE_CLASS(use)) {
        put64(ledger, &m->entries[page].use, use | (before & USE_PARKED));
        return KVP_OK;
    }
    TRY(list_take(ledger, m, page));
    put64(ledger, &m->entries[page].use, use);
    return list_put_first(ledger, m, page);
}

enum kvp_status find_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    uint64_t use = m->entries[page].use;
    uint32_t hits = USE_HITS(use) < USE_HITS_MAX ? USE_HITS(use) + 1 : USE_HITS_MAX;
    if (PAGE_REFS(m->pages[page]) == 0) {
        if (!is_cached(m, page))
            return KVP_ECORRUPT;
        policy_found(ledger, m, page);
        if (!(use & USE_PARKED))
            TRY(list_take(ledger, m, page));
        const struct block_tenant *tenant = &m->tenants[PAGE_TENANT(m->pages[page]) - 1];
        put32(ledger, &tenant->cached, tenant->cached - 1);
        put32(ledger, &m->pool->cached, m->pool->cached - 1);
    }
    if (PAGE_REFS(m->pages[page]) == PAGE_REFS_MAX)
        return KVP_ECORRUPT;
    put64(ledger, &m->pages[page], m->pages[page] + PAGE_ONE_REF);
    put64(ledger, &m->entries[page].use, USE_WORD(USE_STAMP(use), USE_CLASS(use), hits, USE_PLAIN));
    return KVP_OK;
}

/* ---- eviction ------------------------------------------------------------------------------------------------------
 */

/* A page's last child is gone: if it was parked, it is at the end of its list again. */
static enum kvp_status now_a_leaf(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    uint64_t use = m->entries[page].use;
    if (!is_cached(m, page) || !(use & USE_PARKED))
        return KVP_OK;
    put64(ledger, &m->entries[page].use, use & ~USE_PARKED);
    return list_put_last(ledger, m, page);
}

enum kvp_status evict_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop, uint32_t page)
{
    uint32_t parent;
    const struct block_tenant *tenant = &m->tenants[PAGE_TENANT(m->pages[page]) - 1];
    policy_evicted(ledger, m, page);
    TRY(list_take(ledger, m, page));
    TRY(unpublish(ledger, m, page, &parent));
    put32(ledger, &tenant->cached, tenant->cached - 1);
    put32(ledger, &m->pool->cached, m->pool->cached - 1);
    put64(ledger, &m->pool->evictions, m->pool->evictions + 1);
    TRY(free_page(ledger, m, drop, page));
    drop_counts(ledger, m, drop);
    return parent == KVP_NONE || ENTRY_CHILDREN(m->entries[parent].family) != 0 ? KVP_OK
                                                                                : now_a_leaf(ledger, m, parent);
}

static bool may_evict(const struct block_tenant *tenant, uint32_t index, struct evict_scope scope)
{
    if (tenant->cached == 0)
        return false;
    return index == scope.taker || (!scope.own && (scope.forced || tenant->pages > tenant->guaranteed));
}

/* The page at the end of a list that is a leaf, parking those in front of it that are not. KVP_NONE: the list is empty. */
static enum kvp_status list_leaf(struct kvp_ledger *ledger, const struct pool_map *m, const uint64_t *list,
                                 uint32_t *ret_page)
{
    *ret_page = KVP_NONE;
    while (HEAD_LAST(*list) != 0) {
        uint32_t page = linked_page(m, HEAD_LAST(*list));
        if (page == KVP_NONE || list_of(m, page) != list)
            return KVP_ECORRUPT;
        if (ENTRY_CHILDREN(m->entries[page].family) == 0) {
            *ret_page = page;
            return KVP_OK;
        }
        TRY(txn_room(ledger, 2 * ROOM_SMALL));
        TRY(list_take(ledger, m, page));
        put64(ledger, &m->entries[page].use, m->entries[page].use | USE_PARKED);
    }
    return KVP_OK;
}

static enum kvp_status find_victim(struct kvp_ledger *ledger, const struct pool_map *m, struct evict_scope scope,
                                   uint32_t *ret_page)
{
    int64_t least = INT64_MAX;
    *ret_page = KVP_NONE;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX && m->tenants[i].used; i++) {
        if (!may_evict(&m->tenants[i], i, scope))
            continue;
        for (uint32_t class = 0; class < KVP_CLASSES; class ++) {
            uint32_t page;
            if (m->tenants[i].lists[class] == 0)
                continue;
            TRY(list_leaf(ledger, m, &m->tenants[i].lists[class], &page));
            if (page != KVP_NONE && policy_stays(m, page) < least) {
                *ret_page = page;
                least = policy_stays(m, page);
            }
        }
    }
    return KVP_OK;
}

enum kvp_status evict_pages(struct kvp_ledger *ledger, const struct pool_map *m, struct evict_scope scope, uint32_t n,
                            uint64_t room_after, uint32_t *ret_evicted)
{
    uint32_t evicted = 0;
    struct page_drop drop = drop_begin(m);
    for (; evicted < n; evicted++) {
        uint32_t page;
        TRY(txn_room(ledger, room_after + 2 * ROOM_SMALL));
        TRY(find_victim(ledger, m, scope, &page));
        if (page == KVP_NONE)
            break;
        TRY(evict_page(ledger, m, &drop, page));
    }
    drop_end(ledger, m, &drop);
    *ret_evicted = evicted;
    return KVP_OK;
}

/* ---- calls ---------------------------------------------------------------------------------------------------------
 */

enum kvp_status kvp_cache_evict(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, uint32_t n,
                                uint32_t *ret_evicted, bool *ret_more)
{
    struct pool_map m;
    struct evict_scope scope = {.taker = KVP_TENANTS_MAX, .forced = true};
    TRY(map_live_pool(ledger, pool, &m));
    if (tenant != KVP_NONE) {
        if (tenant_index(&m, tenant, &scope.taker) != KVP_OK) {
            *ret_evicted = 0;
            *ret_more = false;
            return KVP_OK;
        }
        scope.own = true;
    }
    uint32_t room = txn_room_left(ledger) / ROOM_SMALL;
    uint32_t wanted = n < room ? n : room;
    TRY(evict_pages(ledger, &m, scope, wanted, 0, ret_evicted));
    *ret_more = *ret_evicted == wanted && wanted < n;
    return KVP_OK;
}

enum kvp_status kvp_cache_evict_prefix(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                                       const struct kvp_block_key *keys, uint32_t *ret_evicted)
{
    struct pool_map m;
    uint32_t evicted = 0;
    TRY(map_live_pool(ledger, pool, &m));
    struct page_drop drop = drop_begin(&m);
    for (size_t i = n; i-- > 0 && txn_room(ledger, 3 * ROOM_SMALL) == KVP_OK;) {
        uint32_t page = find_block(&m, tenant, &keys[i]);
        if (page == KVP_NONE)
            continue;
        if (!is_cached(&m, page) || ENTRY_CHILDREN(m.entries[page].family) != 0)
            break;
        TRY(evict_page(ledger, &m, &drop, page));
        evicted++;
    }
    drop_end(ledger, &m, &drop);
    *ret_evicted = evicted;
    return KVP_OK;
}
