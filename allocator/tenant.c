/**
 * Tenants of a pool: who pays for its pages, how many it may have, and how many others leave it.
 *
 * A place is given at a tenant's first attachment, or when its share is set, and is never given to another: the records
 * of free pages name it (page.c). `pages` is what the tenant has in rows and in the cache; `cached` is what of it lies
 * in its eviction lists, or is parked (evict.c). A quota bounds what it takes from now on. A guaranteed share bounds what
 * others evict of it.
 */
#include "internal.h"

enum kvp_status tenant_index(const struct pool_map *m, uint32_t id, uint32_t *ret_index)
{
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        if (m->tenants[i].used && m->tenants[i].id == id) {
            *ret_index = i;
            return KVP_OK;
        }
    }
    return KVP_ENOENT;
}

enum kvp_status tenant_place(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t id, uint32_t *ret_index)
{
    if (tenant_index(m, id, ret_index) == KVP_OK)
        return KVP_OK;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        if (m->tenants[i].used)
            continue;
        TRY(txn_room(ledger, ROOM_SMALL));
        put32(ledger, &m->tenants[i].id, id);
        put32(ledger, &m->tenants[i].used, 1);
        *ret_index = i;
        return KVP_OK;
    }
    return KVP_ELIMIT;
}

enum kvp_status kvp_tenant_set(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t id, uint32_t quota_pages,
                               uint32_t guaranteed_pages)
{
    const struct pool_map *m;
    uint32_t index;
    TRY(map_live_pool(ledger, pool, &m));
    if (quota_pages != 0 && guaranteed_pages > quota_pages)
        return KVP_EINVAL;
    uint64_t guaranteed = guaranteed_pages;
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        if (m->tenants[i].used && m->tenants[i].id != id)
            guaranteed += m->tenants[i].guaranteed;
    }
    if (guaranteed > m->pool->pages - m->pool->reserved_pages)
        return KVP_EINVAL;
    TRY(tenant_place(ledger, m, id, &index));
    TRY(txn_room(ledger, ROOM_SMALL));
    put32(ledger, &m->tenants[index].quota, quota_pages);
    put32(ledger, &m->tenants[index].guaranteed, guaranteed_pages);
    return KVP_OK;
}

enum kvp_status kvp_tenant_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t index,
                              struct kvp_tenant_view *ret_view)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (index >= KVP_TENANTS_MAX || !m->tenants[index].used)
        return KVP_ENOENT;
    const struct block_tenant *tenant = &m->tenants[index];
    *ret_view = (struct kvp_tenant_view){
        .id = tenant->id,
        .pages = tenant->pages,
        .cached_pages = tenant->cached,
        .quota_pages = tenant->quota,
        .guaranteed_pages = tenant->guaranteed,
    };
    return KVP_OK;
}
