/**
 * Pools as the core knows them: the ledger's description unpacked and laid out, and what DescribePool says of one.
 *
 * A pool's state is made when it is created, or when a ledger is adopted, and goes with its deletion.
 */
#include "op.h"

#include "block_key.h"

#define SLAB_ALIGN_HOST 4096ull
#define SLAB_ALIGN_CUDA (2ull << 20) /* the granularity of cuMemCreate, so that importers know the size to map */

#define ALIGN_UP(value, align) (((uint64_t)(value) + (align)-1) / (align) * (align))

enum kvp_status core_pool_load(struct kvp_core *core, struct kvp_pool_id id, Kvpool__V1__PoolSpec *take_spec)
{
    struct pool_state *pool = &core->pools[id.slot];
    struct kvp_layout_totals totals;
    struct kvp_plane_layout *planes;
    uint64_t digest[2];
    TRY(core_spec_layout(core, take_spec, &planes, &totals, digest));
    struct attachment_state *attachments = calloc(KVP_ATTACHMENTS_MAX, sizeof(*attachments));
    uint32_t *pending = calloc(take_spec->max_sequences, sizeof(*pending));
    uint32_t *named = calloc(take_spec->max_sequences, sizeof(*named));
    bool *is_named = calloc(take_spec->max_sequences, sizeof(*is_named));
    uint64_t *pin_until_ms = calloc(take_spec->max_sequences, sizeof(*pin_until_ms));
    if (attachments == NULL || pending == NULL || named == NULL || is_named == NULL || pin_until_ms == NULL) {
        free(planes);
        free(attachments);
        free(pending);
        free(named);
        free(is_named);
        free(pin_until_ms);
        return core_refuse(core, KVP_ENOMEM, "no memory for the pool's state");
    }
    memset(pool, 0, sizeof(*pool));
    pool->id = id;
    pool->spec = take_spec;
    memcpy(pool->digest, digest, sizeof(digest));
    pool->planes = planes;
    pool->host = core->host;
    pool->legacy = take_spec->memory == KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    pool->page_bytes = totals.page_bytes;
    pool->region_align = core->host ? SLAB_ALIGN_HOST : SLAB_ALIGN_CUDA;
    pool->region_offset = ALIGN_UP(totals.slab_bytes, pool->region_align);
    pool->region_bytes = ALIGN_UP(take_spec->region_bytes, pool->region_align);
    pool->slab_bytes = pool->region_offset + pool->region_bytes;
    pool->attachments = attachments;
    pool->pending = pending;
    pool->named = named;
    pool->is_named = is_named;
    pool->pin_until_ms = pin_until_ms;
    pool->pins_check_ms = NEVER;
    pool->n_slabs = (uint32_t)take_spec->n_devices;
    if (take_spec->page_digests)
        core->digests.pools |= 1ull << id.slot;
    return KVP_OK;
}

void core_pool_unload(struct kvp_core *core, uint32_t slot)
{
    struct pool_state *pool = &core->pools[slot];
    if (pool->id.generation == 0)
        return;
    core_spec_free(pool->spec);
    free(pool->planes);
    free(pool->attachments);
    free(pool->pending);
    free(pool->named);
    free(pool->is_named);
    free(pool->pin_until_ms);
    core_hasher_close(pool->hasher);
    free(pool->stand_in_table);
    free(pool->stand_in_timelines);
    memset(pool, 0, sizeof(*pool));
    core->digests.pools &= ~(1ull << slot);
    core->digests.wanted &= ~(1ull << slot);
    core->digests.pass &= ~(1ull << slot);
}

enum kvp_status core_pool_by_name(struct kvp_core *core, const char *name, struct pool_state **ret_pool)
{
    struct kvp_pool_id id;
    if (name[0] == '\0')
        return core_refuse(core, KVP_EINVAL, "pool: no name is given");
    if (strlen(name) > KVP_NAME_BYTES_MAX || kvp_pool_by_name(core->ledger, name, &id) != KVP_OK)
        return core_refuse(core, KVP_ENOENT, "pool: there is no \"%.*s\"", KVP_NAME_BYTES_MAX, name);
    struct pool_state *pool = &core->pools[id.slot];
    if (pool->id.generation != id.generation || pool->table == NULL)
        return core_refuse(core, KVP_EAGAIN, "pool: \"%s\" is not adopted yet", name);
    *ret_pool = pool;
    return KVP_OK;
}

enum kvp_status core_pool_live(struct kvp_core *core, const char *name, struct pool_state **ret_pool)
{
    TRY(core_pool_by_name(core, name, ret_pool));
    enum kvp_status status = kvp_pool_live(core->ledger, (*ret_pool)->id);
    if (status == KVP_ELOST)
        return core_refuse(core, KVP_ELOST, "pool: the memory of \"%s\" is lost; delete it and make it again", name);
    return status;
}

/* ---- DescribePool ------------------------------------------------------------------------------------------------ */

static enum kvp_status plane_layouts(struct kvp_core *core, const struct pool_state *pool,
                                     Kvpool__V1__PoolInfo *ret_info)
{
    size_t n = pool->spec->n_planes;
    Kvpool__V1__PlaneLayout *layouts = core_alloc(core, n, sizeof(*layouts));
    ret_info->layout = core_alloc(core, n, sizeof(*ret_info->layout));
    if (layouts == NULL || ret_info->layout == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    ret_info->n_layout = n;
    for (size_t i = 0; i < n; i++) {
        kvpool__v1__plane_layout__init(&layouts[i]);
        layouts[i].offset = pool->planes[i].offset;
        layouts[i].page_stride = pool->planes[i].page_stride;
        layouts[i].token_stride = pool->planes[i].token_stride;
        layouts[i].head_stride = pool->planes[i].head_stride;
        ret_info->layout[i] = &layouts[i];
    }
    return KVP_OK;
}

/* What dead writers still hold: O(their sequences). */
static void count_quarantine(struct kvp_core *core, struct pool_state *pool, Kvpool__V1__PoolInfo *info)
{
    struct kvp_attachment_view attachment;
    struct kvp_seq_view seq;
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        if (kvp_attachment_get(core->ledger, pool->id, i, &attachment) != KVP_OK ||
            attachment.state != KVP_ATTACHMENT_DEAD)
            continue;
        info->quarantined_sequences += attachment.sequences;
        uint32_t slot = kvp_attachment_first(core->ledger, pool->id, i);
        for (; slot != KVP_NONE; slot = kvp_attachment_next(core->ledger, pool->id, slot)) {
            if (kvp_seq_at(core->ledger, pool->id, slot, &seq) == KVP_OK)
                info->quarantined_pages += seq.row_pages;
        }
    }
}

static enum kvp_status tenants_of(struct kvp_core *core, const struct pool_state *pool, Kvpool__V1__CacheInfo *cache)
{
    Kvpool__V1__TenantUse *uses = core_alloc(core, KVP_TENANTS_MAX, sizeof(*uses));
    cache->tenants = core_alloc(core, KVP_TENANTS_MAX, sizeof(*cache->tenants));
    if (uses == NULL || cache->tenants == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (uint32_t i = 0; i < KVP_TENANTS_MAX; i++) {
        struct kvp_tenant_view view;
        if (kvp_tenant_at(core->ledger, pool->id, i, &view) != KVP_OK)
            continue;
        Kvpool__V1__TenantUse *use = &uses[cache->n_tenants];
        kvpool__v1__tenant_use__init(use);
        use->tenant = view.id;
        use->pages = view.pages;
        use->cached_pages = view.cached_pages;
        use->quota_pages = view.quota_pages;
        use->guaranteed_pages = view.guaranteed_pages;
        cache->tenants[cache->n_tenants++] = use;
    }
    return KVP_OK;
}

static enum kvp_status cache_info(struct kvp_core *core, const struct pool_state *pool,
                                  const struct kvp_cache_view *view, Kvpool__V1__PoolInfo *info)
{
    Kvpool__V1__CacheInfo *cache = core_alloc(core, 1, sizeof(*cache));
    if (cache == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    kvpool__v1__cache_info__init(cache);
    cache->published_pages = view->published;
    cache->cached_pages = view->cached_pages;
    cache->dirty_pages = view->dirty_pages;
    cache->pins = view->pins;
    cache->lookup_blocks = view->lookup_blocks;
    cache->hit_blocks = view->hit_blocks;
    cache->publishes = view->publishes;
    cache->evictions = view->evictions;
    info->cache = cache;
    return tenants_of(core, pool, cache);
}

enum kvp_status core_pool_info(struct kvp_core *core, struct pool_state *pool, Kvpool__V1__PoolInfo *ret_info)
{
    struct kvp_pool_view view;
    TRY(kvp_pool_get(core->ledger, pool->id, &view));
    kvpool__v1__pool_info__init(ret_info);
    TRY(plane_layouts(core, pool, ret_info));
    uint64_t *digest = core_alloc(core, 2, sizeof(*digest));
    if (digest == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    memcpy(digest, view.layout_digest, sizeof(view.layout_digest));
    ret_info->layout_digest = (ProtobufCBinaryData){16, (uint8_t *)digest};
    ret_info->spec = pool->spec;
    ret_info->slab_bytes = pool->slabs[0].bytes != 0 ? pool->slabs[0].bytes : pool->slab_bytes;
    ret_info->page_bytes = pool->page_bytes;
    ret_info->state =
        view.state == KVP_POOL_LIVE ? KVPOOL__V1__POOL_STATE__POOL_LIVE : KVPOOL__V1__POOL_STATE__POOL_LOST;
    ret_info->pool_id = ID_WORD(pool->id);
    ret_info->free_pages = view.free_pages;
    ret_info->sequences = view.open_sequences;
    ret_info->attachments = view.attachments;
    ret_info->backend = (char *)(pool->host ? "host" : "cuda");
    ret_info->row_pages = view.geometry.row_pages;
    ret_info->retiring_sequences = view.retiring_sequences;
    count_quarantine(core, pool, ret_info);
    return cache_info(core, pool, &view.cache, ret_info);
}
