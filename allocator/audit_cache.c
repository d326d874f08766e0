/**
 * The audit of a pool's pages and prefix index: references, free list, tenants, keys, the index's table, eviction lists.
 *
 * Runs behind the walk over the rows (audit_pool.c), which has counted each page's references in its mark. A second word
 * a page counts the published pages that extend it; in the end these counts are taken down leaf by leaf, and what is
 * then left extends itself.
 */
#include "pool_audit.h"

static void audit_free_list(struct pool_audit *a)
{
    const struct block_pool *pool = a->m.pool;
    uint32_t page = (uint32_t)pool->free_list, count = (uint32_t)(pool->free_list >> 32);
    for (uint32_t i = 0; i < count; i++) {
        if (!is_used_page(&a->m, page)) {
            audit_report(a->audit, "pool %u free list: ends after %u of %u pages", a->m.slot, i, count);
            return;
        }
        if (a->audit->page_marks[page] & MARK_FREE) {
            REPORT(a, "page", page, "is on the free list twice");
            return;
        }
        a->audit->page_marks[page] |= MARK_FREE;
        page = PAGE_LINK(a->m.pages[page]);
    }
    if (page != KVP_NONE)
        audit_report(a->audit, "pool %u free list: goes on after %u pages", a->m.slot, count);
}

/* ---- one page ------------------------------------------------------------------------------------------------------
 */

/* A page in use: what it counts for. @return whether its tenant can be */
static bool audit_tenant_of(struct pool_audit *a, uint32_t page)
{
    uint64_t record = a->m.pages[page];
    uint32_t tenant = PAGE_TENANT(record) - 1;
    if (tenant >= KVP_TENANTS_MAX || !a->m.tenants[tenant].used) {
        REPORT(a, "page", page, "its tenant %u has no place", tenant);
        return false;
    }
    bool cached = is_cached(&a->m, page);
    a->tenant_pages[tenant] += cached || PAGE_REFS(record) != 0;
    a->tenant_cached[tenant] += cached;
    return true;
}

static void audit_published(struct pool_audit *a, uint32_t page)
{
    const struct block_entry *entry = &a->m.entries[page];
    struct kvp_block_key key = {{entry->key[0], entry->key[1]}};
    uint64_t record = a->m.pages[page];
    uint32_t parent = ENTRY_PARENT(entry->family);
    a->published++;
    if (!PAGE_SEALED(record) || !PAGE_KEYED(record))
        REPORT(a, "page", page, "published, and %s", PAGE_SEALED(record) ? "without a key" : "not sealed");
    if (audit_tenant_of(a, page) && find_block(&a->m, a->m.tenants[PAGE_TENANT(record) - 1].id, &key) != page)
        REPORT(a, "page", page, "is not the one found by its block key");
    if (parent == 0)
        return;
    if (!is_used_page(&a->m, parent - 1) || !PAGE_PUBLISHED(a->m.pages[parent - 1]) ||
        PAGE_TENANT(a->m.pages[parent - 1]) != PAGE_TENANT(record))
        REPORT(a, "page", page, "extends page %u, which is not published", parent - 1);
    else
        a->audit->page_children[parent - 1]++;
}

static void audit_page(struct pool_audit *a, uint32_t page)
{
    uint64_t record = a->m.pages[page];
    uint32_t mark = a->audit->page_marks[page], refs = PAGE_REFS(record);
    if (refs != (mark & MARK_REFS))
        REPORT(a, "page", page, "counts %u references, has %u", refs, mark & MARK_REFS);
    bool used = refs != 0 || PAGE_PUBLISHED(record);
    if (used == ((mark & MARK_FREE) != 0))
        REPORT(a, "page", page, "%s",
               mark & MARK_FREE ? "in use and on the free list" : "free and not on the free list");
    if (!used && (PAGE_SEALED(record) || PAGE_KEYED(record)))
        REPORT(a, "page", page, "free and %s", PAGE_SEALED(record) ? "sealed" : "keyed");
    if (used && (record & PAGE_DIRTY) && PAGE_SEALED(record))
        REPORT(a, "page", page, "dirty and sealed");
    if (a->m.digests != NULL && a->m.digests[page] != 0 && !PAGE_SEALED(record))
        REPORT(a, "page", page, "has a digest, and is not sealed");
    a->dirty += used && (record & PAGE_DIRTY);
    if (PAGE_PUBLISHED(record))
        audit_published(a, page);
    else
        audit_tenant_of(a, page);
}

/* ---- the index -----------------------------------------------------------------------------------------------------
 */

static void audit_children(struct pool_audit *a)
{
    uint32_t *children = a->audit->page_children;
    for (uint32_t page = 0; page < a->m.pool->pages_used; page++) {
        if (PAGE_PUBLISHED(a->m.pages[page]) && ENTRY_CHILDREN(a->m.entries[page].family) != children[page])
            REPORT(a, "page", page, "counts %u that extend it, has %u", ENTRY_CHILDREN(a->m.entries[page].family),
                   children[page]);
    }
    uint32_t left = a->published;
    for (uint32_t i = 0; i < a->m.pool->pages_used; i++) {
        uint32_t page = i;
        while (PAGE_PUBLISHED(a->m.pages[page]) && children[page] == 0) {
            uint32_t parent = ENTRY_PARENT(a->m.entries[page].family);
            children[page] = KVP_NONE;
            left--;
            if (parent == 0 || !is_used_page(&a->m, parent - 1) || children[parent - 1] == KVP_NONE ||
                children[parent - 1] == 0)
                break;
            page = parent - 1;
            children[page]--;
        }
    }
    if (left != 0)
        audit_report(a->audit, "pool %u: %u published pages extend themselves", a->m.slot, left);
}

static void audit_slots(struct pool_audit *a)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < a->m.slot_count; i++) {
        uint32_t page = (uint32_t)a->m.slots[i] - 1;
        if (a->m.slots[i] == 0)
            continue;
        found++;
        if (!is_used_page(&a->m, page) || !PAGE_PUBLISHED(a->m.pages[page]) ||
            a->m.entries[page].key[0] >> 32 != a->m.slots[i] >> 32)
            audit_report(a->audit, "pool %u index slot %u: leads to page %u, which has another key", a->m.slot, i,
                         page);
    }
    if (found != a->published)
        audit_report(a->audit, "pool %u index: %u slots, %u published pages", a->m.slot, found, a->published);
}

/* Each entry CACHED, of that tenant and class, in no other list, its back link right. */
static void audit_eviction_list(struct pool_audit *a, uint32_t tenant, uint32_t class)
{
    uint64_t list = a->m.tenants[tenant].lists[class];
    uint32_t link = (uint32_t)list, prev = 0;
    while (link != 0) {
        uint32_t page = link - 1;
        if (!is_cached(&a->m, page) || PAGE_TENANT(a->m.pages[page]) - 1 != tenant ||
            USE_CLASS(a->m.entries[page].use) != class || (a->m.entries[page].use & USE_PARKED)) {
            audit_report(a->audit, "pool %u tenant %u list %u: page %u does not belong there", a->m.slot, tenant, class,
                         page);
            return;
        }
        if (a->audit->page_marks[page] & MARK_LISTED) {
            REPORT(a, "page", page, "is in an eviction list twice");
            return;
        }
        if ((uint32_t)(a->m.entries[page].links >> 32) != prev)
            REPORT(a, "page", page, "its back link in the eviction list is wrong");
        a->audit->page_marks[page] |= MARK_LISTED;
        prev = link;
        link = (uint32_t)a->m.entries[page].links;
    }
    if ((uint32_t)(list >> 32) != prev)
        audit_report(a->audit, "pool %u tenant %u list %u: ends at %u, not at %u", a->m.slot, tenant, class, prev,
                     (uint32_t)(list >> 32));
}

static void audit_eviction(struct pool_audit *a)
{
    bool gap = false;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        const struct block_tenant *tenant = &a->m.tenants[i];
        if (tenant->used && gap)
            REPORT(a, "tenant", i, "has a place behind an empty one");
        gap |= !tenant->used;
        for (uint32_t class = 0; class < KVP_CLASSES; class ++) {
            if (tenant->used)
                audit_eviction_list(a, i, class);
        }
        if (tenant->used && (tenant->pages != a->tenant_pages[i] || tenant->cached != a->tenant_cached[i]))
            REPORT(a, "tenant", i, "counts %u pages and %u cached, has %u and %u", tenant->pages, tenant->cached,
                   a->tenant_pages[i], a->tenant_cached[i]);
        a->cached += a->tenant_cached[i];
    }
    for (uint32_t page = 0; page < a->m.pool->pages_used; page++) {
        if (!is_cached(&a->m, page))
            continue;
        bool parked = (a->m.entries[page].use & USE_PARKED) != 0;
        if (parked == ((a->audit->page_marks[page] & MARK_LISTED) != 0))
            REPORT(a, "page", page, "cached, and %s", parked ? "parked in a list" : "in no eviction list");
        if (parked && ENTRY_CHILDREN(a->m.entries[page].family) == 0)
            REPORT(a, "page", page, "parked, and nothing extends it");
    }
}

void audit_pages(struct pool_audit *a)
{
    const struct block_pool *pool = a->m.pool;
    audit_free_list(a);
    for (uint32_t page = 0; page < pool->pages; page++) {
        if (is_used_page(&a->m, page))
            audit_page(a, page);
        else if (a->m.pages[page] != 0)
            REPORT(a, "page", page, "reserved or never handed out, and its record is not empty");
    }
    audit_children(a);
    audit_slots(a);
    audit_eviction(a);
    if (pool->published != a->published || pool->cached != a->cached || pool->dirty != a->dirty)
        audit_report(a->audit, "pool %u: counts %u published, %u cached, %u dirty pages, has %u, %u, %u", a->m.slot,
                     pool->published, pool->cached, pool->dirty, a->published, a->cached, a->dirty);
}
