/**
 * Eviction: in which order CACHED pages become free ones.
 *
 * A page goes only when no published page extends it: a chain leaves from its end. Each tenant has a list a class, most
 * recently released first. A row lets go of its pages from the last to the first, so that within a list a page comes
 * after all that extend it, and the end of a list is a leaf. Not so where two writers of a block left one page behind
 * that is older than what extends it: such a page is taken out of its list when it comes to the end (parked), and put
 * back there when its last child is gone. A transaction parks KVP_PARKS_MAX of them; an eviction that meets more is stuck
 * until others have parked the rest.
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

/* Whether a page can be in the list of that tenant and class. */
static inline bool is_listed(const struct pool_map *m, uint32_t tenant, uint32_t class, uint32_t page)
{
    return is_cached(m, page) && PAGE_TENANT(m->pages[page]) == tenant + 1 && USE_CLASS(m->entries[page].use) == class;
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
                                      const uint64_t *list, uint32_t page)
{
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

/* The same, of the last page of a list. */
static enum kvp_status list_take_last(struct kvp_ledger *ledger, const struct pool_map *m, struct list_cut *cut,
                                      const uint64_t *list, uint32_t page)
{
    if (cut->list == list && cut->next == page + 1) {
        cut->next = 0;
        return KVP_OK;
    }
    if (cut->list != list || cut->next != 0)
        list_cut_end(ledger, m, cut);
    if (!linked_before(m, list, page))
        return KVP_ECORRUPT;
    *cut = (struct list_cut){list, LINK_PREV(m->entries[page].links), 0};
    return KVP_OK;
}

/* The last page of a list, of which a run may be cut out; + 1, 0: it is empty. */
static uint32_t list_last(const uint64_t *list, const struct list_cut *cut)
{
    return cut->list == list && cut->next == 0 ? cut->prev : HEAD_LAST(*list);
}

/* ---- cached, and found again ---------------------------------------------------------------------------------------
 */

enum kvp_status cache_page(struct kvp_ledger *ledger, const struct pool_map *m, struct list_run *run, uint32_t tenant,
                           uint32_t page)
{
    uint64_t use = policy_cached(ledger, m, page);
    put64(ledger, &m->entries[page].use, use);
    return list_put_first(ledger, m, run, &m->tenants[tenant].lists[USE_CLASS(use)], page);
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
    TRY(list_put_first(ledger, m, &run, list_of(m, page), page));
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

/* Put a page behind the last of its list, of which a run may be cut out at the end: it closes the cut. */
static enum kvp_status list_put_back(struct kvp_ledger *ledger, const struct pool_map *m, struct list_cut *cut,
                                     uint32_t page)
{
    const uint64_t *list = list_of(m, page);
    if (cut->list != list || cut->next != 0 || cut->prev == 0) {
        list_cut_end(ledger, m, cut);
        return list_put_last(ledger, m, page);
    }
    put64(ledger, &m->entries[page].links, LINKS_WORD(0, cut->prev));
    put64(ledger, list, HEAD_WORD(HEAD_FIRST(*list), page + 1));
    cut->next = page + 1;
    return KVP_OK;
}

/* A page's last child is gone: if it was parked, it is at the end of its list again. */
static enum kvp_status now_a_leaf(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                  uint32_t page, bool *ret_put_back)
{
    uint64_t use = m->entries[page].use;
    *ret_put_back = is_cached(m, page) && (use & USE_PARKED);
    if (!*ret_put_back)
        return KVP_OK;
    put64(ledger, &m->entries[page].use, use & ~USE_PARKED);
    return list_put_back(ledger, m, &drop->cut, page);
}

/* Memory that the evictions after this page's will need: a list's pages lie anywhere, and so do their slots. The next are
 * the one before it in its list, and the one that it extends, which may be parked. */
static PREFETCHER void prefetch_victims(const struct pool_map *m, uint32_t page)
{
    uint32_t before = LINK_PREV(m->entries[page].links) - 1, parent = ENTRY_PARENT(m->entries[page].family) - 1;
    if (before < m->pool->pages) {
        prefetch_index(m, before);
        uint32_t second = LINK_PREV(m->entries[before].links) - 1;
        if (second < m->pool->pages)
            prefetch_page(m, second);
    }
    if (parent != before && parent < m->pool->pages)
        prefetch_index(m, parent);
}

/* Of a page that was taken out of its list. @param ret_put_back  the page that came to the end of a list by it, or
 * KVP_NONE */
static enum kvp_status evict_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                  uint32_t page, uint32_t *ret_put_back)
{
    uint32_t parent;
    bool put_back = false;
    policy_evicted(ledger, m, page);
    TRY(unpublish(ledger, m, page, &parent));
    TRY(free_page(ledger, m, drop, page));
    drop->evicted++;
    if (parent != KVP_NONE && ENTRY_CHILDREN(m->entries[parent].family) == 0)
        TRY(now_a_leaf(ledger, m, drop, parent, &put_back));
    *ret_put_back = put_back ? parent : KVP_NONE;
    return KVP_OK;
}

/* How many pages of a tenant may be evicted. */
static uint32_t may_evict(const struct pool_map *m, const struct page_drop *drop, uint32_t index,
                          struct evict_scope scope)
{
    const struct block_tenant *tenant = &m->tenants[index];
    uint32_t evicted = drop->tenant == index ? drop->evicted : 0; /* not counted yet; of its pages no others are */
    uint32_t cached = tenant->cached - evicted, pages = tenant->pages - evicted;
    if (index == scope.taker || (scope.forced && !scope.own))
        return cached;
    if (scope.own || pages <= tenant->guaranteed)
        return 0;
    return cached < pages - tenant->guaranteed ? cached : pages - tenant->guaranteed;
}

/* Take a page that is no leaf out of the end of its list. Out of line, for it is rare and big. */
static __attribute__((noinline)) enum kvp_status park(struct kvp_ledger *ledger, const struct pool_map *m,
                                                      struct list_cut *cut, const uint64_t *list, uint32_t page)
{
    TRY(txn_room(ledger, 2 * ROOM_SMALL));
    TRY(list_take_last(ledger, m, cut, list, page));
    put64(ledger, &m->entries[page].use, m->entries[page].use | USE_PARKED);
    return KVP_OK;
}

/* The page at the end of a list that is a leaf, parking those in front of it that are not. KVP_NONE: the list is empty,
 * or it is stuck. */
static inline enum kvp_status list_leaf(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                        uint32_t tenant, uint32_t class, uint32_t *ret_page)
{
    const uint64_t *list = &m->tenants[tenant].lists[class];
    uint32_t last;
    *ret_page = KVP_NONE;
    while ((last = list_last(list, &drop->cut)) != 0) {
        uint32_t page = last - 1;
        if (!is_listed(m, tenant, class, page))
            return KVP_ECORRUPT;
        if (ENTRY_CHILDREN(m->entries[page].family) == 0) {
            *ret_page = page;
            return KVP_OK;
        }
        drop->stuck = ledger->txn_parks == KVP_PARKS_MAX;
        if (drop->stuck)
            return KVP_OK;
        TRY(park(ledger, m, &drop->cut, list, page));
        ledger->txn_parks++;
    }
    return KVP_OK;
}

/* The pages at the ends of a tenant's lists, which are leaves, and how long they stay: the next victim is one of them
 * as long as it leaves before `others`. */
struct victims {
    uint32_t tenant; /* KVP_TENANTS_MAX: all tenants are to be looked at */
    unsigned moved;  /* a bit a list: it may end in another page now */
    uint32_t pages[KVP_CLASSES];
    int64_t stays[KVP_CLASSES]; /* INT64_MAX: the list is empty */
    int64_t others;             /* the least of the other tenants' */
};
#define ALL_LISTS ((1u << KVP_CLASSES) - 1)

/* Look at the lists that moved. @return the class of the page that leaves first */
static enum kvp_status look_at_ends(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                    struct victims *victims, uint32_t *ret_class)
{
    const uint64_t *lists = m->tenants[victims->tenant].lists;
    for (; victims->moved != 0; victims->moved &= victims->moved - 1) {
        uint32_t class = (uint32_t)__builtin_ctz(victims->moved), page = KVP_NONE;
        if (lists[class] != 0)
            TRY(list_leaf(ledger, m, drop, victims->tenant, class, &page));
        victims->pages[class] = page;
        victims->stays[class] = page != KVP_NONE ? policy_stays(m, page) : INT64_MAX;
        if (page != KVP_NONE)
            prefetch_index(m, page);
    }
    *ret_class = 0;
    for (uint32_t class = 1; class < KVP_CLASSES; class ++) {
        if (victims->stays[class] < victims->stays[*ret_class])
            *ret_class = class;
    }
    return KVP_OK;
}

static enum kvp_status search_victims(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                      struct evict_scope scope, struct victims *victims, uint32_t *ret_class)
{
    int64_t least = INT64_MAX;
    victims->tenant = KVP_TENANTS_MAX;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX && m->tenants[i].used; i++) {
        struct victims some = {.tenant = i, .moved = ALL_LISTS, .others = least};
        uint32_t class;
        if (may_evict(m, drop, i, scope) == 0)
            continue;
        TRY(look_at_ends(ledger, m, drop, &some, &class));
        if (some.stays[class] < least) {
            *victims = some;
            *ret_class = class;
            least = some.stays[class];
        } else if (some.stays[class] < victims->others) {
            victims->others = some.stays[class];
        }
    }
    return KVP_OK;
}

/* @param ret_class  of which victims->pages[class] is the next victim, unless victims->tenant is KVP_TENANTS_MAX: no page
 *                   may go */
static enum kvp_status find_victims(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                    struct evict_scope scope, struct victims *victims, uint32_t *ret_class)
{
    bool known = victims->tenant != KVP_TENANTS_MAX && may_evict(m, drop, victims->tenant, scope) != 0;
    if (known)
        TRY(look_at_ends(ledger, m, drop, victims, ret_class));
    if (!known || victims->stays[*ret_class] >= victims->others)
        TRY(search_victims(ledger, m, drop, scope, victims, ret_class));
    return KVP_OK;
}

/* Up to n pages from the end of one list, as long as they leave before those at the ends of the others. */
static enum kvp_status evict_run(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop,
                                 struct victims *victims, uint32_t class, uint32_t n, uint64_t room_after,
                                 uint32_t *ret_evicted)
{
    const uint64_t *list = &m->tenants[victims->tenant].lists[class];
    uint32_t page = victims->pages[class], put_back = KVP_NONE, evicted = 0;
    int64_t others = victims->others;
    for (uint32_t other = 0; other < KVP_CLASSES; other++) {
        if (other != class && victims->stays[other] < others)
            others = victims->stays[other];
    }
    victims->moved |= 1u << class;
    do {
        TRY(txn_room(ledger, room_after + 2 * ROOM_SMALL));
        prefetch_victims(m, page);
        TRY(list_take_last(ledger, m, &drop->cut, list, page));
        TRY(evict_page(ledger, m, drop, page, &put_back));
        if (++evicted == n || put_back != KVP_NONE)
            break;
        TRY(list_leaf(ledger, m, drop, victims->tenant, class, &page));
    } while (page != KVP_NONE && policy_stays(m, page) < others);
    if (put_back != KVP_NONE)
        victims->moved |= 1u << USE_CLASS(m->entries[put_back].use);
    *ret_evicted = evicted;
    return KVP_OK;
}

enum kvp_status evict_pages(struct kvp_ledger *ledger, const struct pool_map *m, struct evict_scope scope, uint32_t n,
                            uint64_t room_after, uint32_t *ret_evicted, bool *ret_stuck)
{
    uint32_t evicted = 0;
    struct page_drop drop = drop_begin(m);
    struct victims victims = {.tenant = KVP_TENANTS_MAX};
    while (evicted < n && !drop.stuck) {
        uint32_t class = 0, most, some;
        TRY(find_victims(ledger, m, &drop, scope, &victims, &class));
        if (victims.tenant == KVP_TENANTS_MAX || drop.stuck)
            break;
        most = may_evict(m, &drop, victims.tenant, scope);
        TRY(evict_run(ledger, m, &drop, &victims, class, most < n - evicted ? most : n - evicted, room_after, &some));
        evicted += some;
    }
    drop_end(ledger, m, &drop);
    *ret_evicted = evicted;
    *ret_stuck = drop.stuck && evicted < n;
    return KVP_OK;
}

/* ---- calls ---------------------------------------------------------------------------------------------------------
 */

enum kvp_status kvp_cache_evict(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, uint32_t n,
                                uint32_t *ret_evicted, bool *ret_more)
{
    const struct pool_map *m;
    struct evict_scope scope = {.taker = KVP_TENANTS_MAX, .forced = true};
    TRY(map_live_pool(ledger, pool, &m));
    if (tenant != KVP_NONE) {
        if (tenant_index(m, tenant, &scope.taker) != KVP_OK) {
            *ret_evicted = 0;
            *ret_more = false;
            return KVP_OK;
        }
        scope.own = true;
    }
    uint32_t room = txn_room_left(ledger) / ROOM_SMALL;
    uint32_t wanted = n < room ? n : room;
    bool stuck;
    TRY(evict_pages(ledger, m, scope, wanted, 0, ret_evicted, &stuck));
    *ret_more = stuck || (*ret_evicted == wanted && wanted < n);
    return KVP_OK;
}

enum kvp_status kvp_cache_park(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t *ret_parked)
{
    const struct pool_map *m;
    TRY(map_live_pool(ledger, pool, &m));
    struct page_drop drop = drop_begin(m);
    for (uint32_t i = 0; i < KVP_TENANTS_MAX && m->tenants[i].used && !drop.stuck; i++) {
        uint32_t page;
        for (uint32_t class = 0; class < KVP_CLASSES && !drop.stuck; class ++)
            TRY(list_leaf(ledger, m, &drop, i, class, &page));
    }
    drop_end(ledger, m, &drop);
    *ret_parked = ledger->txn_parks;
    return KVP_OK;
}

enum kvp_status kvp_cache_evict_prefix(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                                       const struct kvp_block_key *keys, uint32_t *ret_evicted)
{
    const struct pool_map *m;
    uint32_t evicted = 0;
    TRY(map_live_pool(ledger, pool, &m));
    struct page_drop drop = drop_begin(m);
    for (size_t i = n; i-- > 0 && txn_room(ledger, 3 * ROOM_SMALL) == KVP_OK;) {
        uint32_t page = find_block(m, tenant, &keys[i]), put_back;
        if (page == KVP_NONE)
            continue;
        if (!is_cached(m, page) || ENTRY_CHILDREN(m->entries[page].family) != 0)
            break;
        TRY(list_take(ledger, m, &drop.cut, page));
        TRY(evict_page(ledger, m, &drop, page, &put_back));
        evicted++;
    }
    drop_end(ledger, m, &drop);
    *ret_evicted = evicted;
    return KVP_OK;
}
