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

static const uint64_t *list_of(const struct pool_map *m, uint32_t page)
{
    return &m->tenants[PAGE_TENANT(m->pages[page]) - 1].lists[USE_CLASS(m->entries[page].use)];
}

/* The page of a link, if it can be in a list. */
static uint32_t linked_page(const struct pool_map *m, uint32_t link)
{
    return link != 0 && is_cached(m, link - 1) ? link - 1 : KVP_NONE;
}

void list_run_end(struct kvp_ledger *ledger, const struct pool_map *m, struct list_run *run)
{
    if (run->list == NULL)
        return;
    put64(ledger, &m->entries[run->first - 1].links, LINKS_WORD(run->next, 0));
    put64(ledger, run->list, HEAD_WORD(run->first, run->last));
    run->list = NULL;
}

static enum kvp_status list_put_first(struct kvp_ledger *ledger, const struct pool_map *m, struct list_run *run,
                                      uint32_t page)
{
    const uint64_t *list = list_of(m, page);
    if (run->list == list) {
        put64(ledger, &m->entries[run->first - 1].links, LINKS_WORD(run->next, page + 1));
        run->next = run->first;
        run->first = page + 1;
        return KVP_OK;
    }
    list_run_end(ledger, m, run);
    uint32_t first = HEAD_FIRST(*list);
    if (first != 0) {
        if (linked_page(m, first) == KVP_NONE)
            return KVP_ECORRUPT;
        put64(ledger, &m->entries[first - 1].links, LINKS_WORD(LINK_NEXT(m->entries[first - 1].links), page + 1));
    }
    *run = (struct list_run){list, page + 1, first, first != 0 ? HEAD_LAST(*list) : page + 1};
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

void list_cut_end(struct kvp_ledger *ledger, const struct pool_map *m, struct list_cut *cut)
{
    const uint64_t *list = cut->list;
    uint32_t prev = cut->prev, next = cut->next;
    if (list == NULL)
        return;
    if (next != 0)
        put64(ledger, &m->entries[next - 1].links, LINKS_WORD(LINK_NEXT(m->entries[next - 1].links), prev));
    if (prev != 0)
        put64(ledger, &m->entries[prev - 1].links, LINKS_WORD(next, LINK_PREV(m->entries[prev - 1].links)));
    if (next == 0 || prev == 0)
        put64(ledger, list, HEAD_WORD(prev == 0 ? next : HEAD_FIRST(*list), next == 0 ? prev : HEAD_LAST(*list)));
    cut->list = NULL;
}

/* Whether what stands behind a page in its list, and before it, knows of it. */
static bool linked_behind(const struct pool_map *m, const uint64_t *list, uint32_t page)
{
    uint32_t link = LINK_NEXT(m->entries[page].links), next = linked_page(m, link);
    return link == 0 ? HEAD_LAST(*list) == page + 1 : next != KVP_NONE && LINK_PREV(m->entries[next].links) == page + 1;
}

static bool linked_before(const struct pool_map *m, const uint64_t *list, uint32_t page)
{
    uint32_t link = LINK_PREV(m->entries[page].links), prev = linked_page(m, link);
    return link == 0 ? HEAD_FIRST(*list) == page + 1
                     : prev != KVP_NONE && LINK_NEXT(m->entries[prev].links) == page + 1;
}

/* Take a page out of its list; one beside the cut widens it. */
static enum kvp_status list_take(struct kvp_ledger *ledger, const struct pool_map *m, struct list_cut *cut,
                                 uint32_t page)
{
    const uint64_t *list = list_of(m, page);
    uint64_t links = m->entries[page].links;
    bool is_next = cut->list == list && cut->next == page + 1, is_prev = cut->list == list && cut->prev == page + 1;
    if (!is_next && !is_prev)
        list_cut_end(ledger, m, cut);
    if ((!is_prev && !linked_behind(m, list, page)) || (!is_next && !linked_before(m, list, page)))
        return KVP_ECORRUPT;
    if (is_next)
        cut->next = LINK_NEXT(links);
    else if (is_prev)
        cut->prev = LINK_PREV(links);
    else
        *cut = (struct list_cut){list, LINK_PREV(links), LINK_NEXT(links)};
    return KVP_OK;
}

/* The last page of a list, of which a run may be cut out; + 1, 0: it is empty. */
static uint32_t list_last(const uint64_t *list, const struct list_cut *cut)
{
    return cut->list == list && cut->next == 0 ? cut->prev : HEAD_LAST(*list);
}

/* ---- cached, and found again ---------------------------------------------------------------------------------------
 */

enum kvp_status cache_page(struct kvp_ledger *ledger, const struct pool_map *m, struct list_run *run, uint32_t page)
{
    put64(ledger, &m->entries[page].use, policy_cached(ledger, m, page));
    return list_put_first(ledger, m, run, page);
}

enum kvp_status relist_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint64_t use)
{
    uint64_t before = m->entries[page].use;
    if ((before & USE_PARKED) || USE_CLASS(before) == USE_CLASS(use)) {
        put64(ledger, &m->entries[page].use, use | (before & USE_PARKED));
        return KVP_OK;
    }
    struct list_cut cut = {.list = NULL};
    struct list_run run = {.list = NULL};
    TRY(list_take(ledger, m, &cut, page));
    list_cut_end(ledger, m, &cut);
    put64(ledger, &m->entries[page].use, use);
    TRY(list_put_first(ledger, m, &run, page));
    list_run_end(ledger, m, &run);
    return KVP_OK;
}

static void find_counts(struct kvp_ledger *ledger, const struct pool_map *m, struct page_find *find)
{
    if (find->found == 0)
        return;
    put32(ledger, &m->tenants[find->tenant].cached, m->tenants[find->tenant].cached - find->found);
    put32(ledger, &m->pool->cached, m->pool->cached - find->found);
    find->found = 0;
}

void find_end(struct kvp_ledger *ledger, const struct pool_map *m, struct page_find *find)
{
    list_cut_end(ledger, m, &find->cut);
    find_counts(ledger, m, find);
}

enum kvp_status find_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_find *find, uint32_t page)
{
    uint64_t use = m->entries[page].use;
    uint32_t hits = USE_HITS(use) < USE_HITS_MAX ? USE_HITS(use) + 1 : USE_HITS_MAX;
    if (PAGE_REFS(m->pages[page]) == 0) {
        if (!is_cached(m, page))
            return KVP_ECORRUPT;
        policy_found(ledger, m, page);
        if (!(use & USE_PARKED))
            TRY(list_take(ledger, m, &find->cut, page));
        uint32_t tenant = PAGE_TENANT(m->pages[page]) - 1;
        if (find->tenant != tenant)
            find_counts(ledger, m, find);
        find->tenant = tenant;
        find->found++;
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
static enum kvp_status now_a_leaf(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                  uint32_t page, bool *ret_put_back)
{
    uint64_t use = m->entries[page].use;
    *ret_put_back = is_cached(m, page) && (use & USE_PARKED);
    if (!*ret_put_back)
        return KVP_OK;
    list_cut_end(ledger, m, &drop->cut);
    put64(ledger, &m->entries[page].use, use & ~USE_PARKED);
    return list_put_last(ledger, m, page);
}

/* @param ret_put_back  another page came to the end of a list by it */
static enum kvp_status evict_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                  uint32_t page, bool *ret_put_back)
{
    uint32_t parent;
    policy_evicted(ledger, m, page);
    TRY(list_take(ledger, m, &drop->cut, page));
    TRY(unpublish(ledger, m, page, &parent));
    TRY(free_page(ledger, m, drop, page));
    drop->evicted++;
    *ret_put_back = false;
    if (parent == KVP_NONE || ENTRY_CHILDREN(m->entries[parent].family) != 0)
        return KVP_OK;
    return now_a_leaf(ledger, m, drop, parent, ret_put_back);
}

static bool may_evict(const struct pool_map *m, const struct page_drop *drop, uint32_t index, struct evict_scope scope)
{
    const struct block_tenant *tenant = &m->tenants[index];
    uint32_t evicted = drop->tenant == index ? drop->evicted : 0; /* not counted yet; of its pages no others are */
    if (tenant->cached == evicted)
        return false;
    return index == scope.taker || (!scope.own && (scope.forced || tenant->pages - evicted > tenant->guaranteed));
}

/* The page at the end of a list that is a leaf, parking those in front of it that are not. KVP_NONE: the list is empty. */
static enum kvp_status list_leaf(struct kvp_ledger *ledger, const struct pool_map *m, struct list_cut *cut,
                                 const uint64_t *list, uint32_t *ret_page)
{
    uint32_t last;
    *ret_page = KVP_NONE;
    while ((last = list_last(list, cut)) != 0) {
        uint32_t page = linked_page(m, last);
        if (page == KVP_NONE || list_of(m, page) != list)
            return KVP_ECORRUPT;
        if (ENTRY_CHILDREN(m->entries[page].family) == 0) {
            *ret_page = page;
            return KVP_OK;
        }
        TRY(txn_room(ledger, 2 * ROOM_SMALL));
        TRY(list_take(ledger, m, cut, page));
        put64(ledger, &m->entries[page].use, m->entries[page].use | USE_PARKED);
    }
    return KVP_OK;
}

/* Where the last victim was found: the next of that list is the next victim as long as it leaves before `others`. */
struct victims {
    const uint64_t *list; /* NULL: all lists are to be looked at */
    uint32_t tenant;
    int64_t others;
};

static enum kvp_status search_victim(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                     struct evict_scope scope, struct victims *victims, uint32_t *ret_page)
{
    int64_t least = INT64_MAX;
    *ret_page = KVP_NONE;
    *victims = (struct victims){.others = INT64_MAX};
    for (uint32_t i = 0; i < KVP_TENANTS_MAX && m->tenants[i].used; i++) {
        if (!may_evict(m, drop, i, scope))
            continue;
        for (uint32_t class = 0; class < KVP_CLASSES; class ++) {
            const uint64_t *list = &m->tenants[i].lists[class];
            uint32_t page;
            if (*list == 0)
                continue;
            TRY(list_leaf(ledger, m, &drop->cut, list, &page));
            int64_t stays = page != KVP_NONE ? policy_stays(m, page) : INT64_MAX;
            if (stays < least) {
                *victims = (struct victims){list, i, least};
                *ret_page = page;
                least = stays;
            } else if (stays < victims->others) {
                victims->others = stays;
            }
        }
    }
    return KVP_OK;
}

static enum kvp_status find_victim(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                   struct evict_scope scope, struct victims *victims, uint32_t *ret_page)
{
    if (victims->list != NULL && may_evict(m, drop, victims->tenant, scope)) {
        TRY(list_leaf(ledger, m, &drop->cut, victims->list, ret_page));
        if (*ret_page != KVP_NONE && policy_stays(m, *ret_page) < victims->others)
            return KVP_OK;
    }
    return search_victim(ledger, m, drop, scope, victims, ret_page);
}

enum kvp_status evict_pages(struct kvp_ledger *ledger, const struct pool_map *m, struct evict_scope scope, uint32_t n,
                            uint64_t room_after, uint32_t *ret_evicted)
{
    uint32_t evicted = 0;
    struct page_drop drop = drop_begin(m);
    struct victims victims = {.list = NULL};
    for (; evicted < n; evicted++) {
        uint32_t page;
        bool put_back;
        TRY(txn_room(ledger, room_after + 2 * ROOM_SMALL));
        TRY(find_victim(ledger, m, &drop, scope, &victims, &page));
        if (page == KVP_NONE)
            break;
        TRY(evict_page(ledger, m, &drop, page, &put_back));
        if (put_back)
            victims.list = NULL;
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
    bool put_back;
    for (size_t i = n; i-- > 0 && txn_room(ledger, 3 * ROOM_SMALL) == KVP_OK;) {
        uint32_t page = find_block(&m, tenant, &keys[i]);
        if (page == KVP_NONE)
            continue;
        if (!is_cached(&m, page) || ENTRY_CHILDREN(m.entries[page].family) != 0)
            break;
        TRY(evict_page(ledger, &m, &drop, page, &put_back));
        evicted++;
    }
    drop_end(ledger, &m, &drop);
    *ret_evicted = evicted;
    return KVP_OK;
}
