/**
 * Pools by name: create, describe, list, delete; and the translation of specs and descriptions to and from messages.
 *
 * A description is one block of memory: the struct, then the planes, their layouts, the list of devices, and last the
 * strings. What comes from the daemon is checked before it is believed: every enum and the layout, which must be what
 * kvp_layout_compute makes of the geometry.
 */
#include "internal.h"
#include "pools.h"

#include <stdlib.h>
#include <string.h>

/* The values of kvp_layout.h are those of the messages. */
_Static_assert((int)KVP_DTYPE_F32 == (int)KVPOOL__V1__DTYPE__DTYPE_F32 &&
                   (int)KVP_DTYPE_U8 == (int)KVPOOL__V1__DTYPE__DTYPE_U8,
               "dtypes");
_Static_assert((int)KVP_COMPONENT_K == (int)KVPOOL__V1__COMPONENT__COMPONENT_K &&
                   (int)KVP_COMPONENT_KPE == (int)KVPOOL__V1__COMPONENT__COMPONENT_KPE,
               "components");
_Static_assert((int)KVP_POLICY_LRU == (int)KVPOOL__V1__POLICY__POLICY_LRU &&
                   (int)KVP_BLOCK_HASH_XXH3 == (int)KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3 &&
                   (int)KVP_ZERO_OFF == (int)KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_OFF,
               "policies, hashes");
_Static_assert((int)KVP_ORDER_HND == (int)KVPOOL__V1__ORDER__ORDER_HND &&
                   (int)KVP_PLACEMENT_PAGE == (int)KVPOOL__V1__PLACEMENT__PLACEMENT_PAGE,
               "orders and placements");

/* ---- from a message ---------------------------------------------------------------------------------------------- */

/* Bytes handed out of one block, one behind the other. */
struct block {
    unsigned char *at;
};

static void *take(struct block *block, size_t bytes)
{
    void *taken = block->at;

    block->at += (bytes + 7) & ~(size_t)7;
    return taken;
}

static const char *take_string(struct block *block, const char *string)
{
    size_t bytes = strlen(string) + 1;

    return memcpy(take(block, bytes), string, bytes);
}

static size_t block_bytes(const Kvpool__V1__PoolSpec *spec, const Kvpool__V1__CacheInfo *cache)
{
    size_t bytes = sizeof(struct kvp_pool_info) + spec->n_planes * (sizeof(struct kvp_plane_spec) + 8) +
                   spec->n_planes * sizeof(struct kvp_plane_layout) + spec->n_devices * sizeof(char *) +
                   spec->n_tenants * (sizeof(struct kvp_tenant_share) + 8) + strlen(spec->name) + strlen(spec->model) +
                   64;

    for (size_t i = 0; i < spec->n_devices; i++)
        bytes += strlen(spec->devices[i]) + 8;
    if (cache != NULL)
        bytes += cache->n_tenants * sizeof(struct kvp_tenant_use) + 8;
    return bytes;
}

/* The layout as it is computed here, if the daemon says the same. */
static enum kvp_status check_layout(const Kvpool__V1__PoolInfo *from, const struct kvp_pool_spec *spec,
                                    struct kvp_plane_layout *planes)
{
    struct kvp_layout_totals totals;
    char text[160];
    enum kvp_status status = kvp_layout_compute(&spec->layout, planes, &totals, text, sizeof(text));

    if (status != KVP_OK)
        return kvp_fail(KVP_EPROTO, "the pool that the daemon describes can not be: %s", text);
    if (from->n_layout != spec->layout.n_planes || from->page_bytes != totals.page_bytes)
        return kvp_fail(KVP_EMISMATCH, "the daemon lays pool %s out by another rule than this library", spec->name);
    for (size_t i = 0; i < from->n_layout; i++)
        if (from->layout[i]->offset != planes[i].offset || from->layout[i]->page_stride != planes[i].page_stride ||
            from->layout[i]->token_stride != planes[i].token_stride ||
            from->layout[i]->head_stride != planes[i].head_stride)
            return kvp_fail(KVP_EMISMATCH, "the daemon lays plane %zu of pool %s out by another rule than this library",
                            i, spec->name);
    return KVP_OK;
}

static void fill_spec(const Kvpool__V1__PoolSpec *from, struct block *block, struct kvp_pool_spec *spec)
{
    struct kvp_plane_spec *planes = take(block, from->n_planes * sizeof(*planes));
    const char **devices = take(block, from->n_devices * sizeof(*devices));
    struct kvp_tenant_share *tenants = take(block, from->n_tenants * sizeof(*tenants));

    for (size_t i = 0; i < from->n_tenants; i++)
        tenants[i] = (struct kvp_tenant_share){from->tenants[i]->tenant, from->tenants[i]->quota_pages,
                                               from->tenants[i]->guaranteed_pages};
    for (size_t i = 0; i < from->n_planes; i++)
        planes[i] = (struct kvp_plane_spec){.layer = from->planes[i]->layer,
                                            .component = (uint32_t)from->planes[i]->component,
                                            .heads = from->planes[i]->heads,
                                            .dim = from->planes[i]->dim,
                                            .dtype = (uint32_t)from->planes[i]->dtype};
    for (size_t i = 0; i < from->n_devices; i++)
        devices[i] = take_string(block, from->devices[i]);
    *spec = (struct kvp_pool_spec){
        .name = take_string(block, from->name),
        .model = take_string(block, from->model),
        .layout = {.pages = from->pages,
                   .page_tokens = from->page_tokens,
                   .n_planes = (uint32_t)from->n_planes,
                   .order = from->order != 0 ? (uint32_t)from->order : KVP_ORDER_NHD,
                   .placement = from->placement != 0 ? (uint32_t)from->placement : KVP_PLACEMENT_LAYER,
                   .joined = from->joined,
                   .planes = planes},
        .reserved_pages = from->reserved_pages,
        .max_sequences = from->max_sequences,
        .max_sequence_tokens = from->max_sequence_tokens,
        .devices = devices,
        .n_devices = (uint32_t)from->n_devices,
        .legacy_ipc = from->memory == KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC,
        .region_bytes = from->region_bytes,
        .linger_ms = from->linger_ms,
        .page_digests = from->page_digests,
        .policy = (uint32_t)from->policy,
        .block_hash = (uint32_t)from->block_hash,
        .zero_on_reuse = (uint32_t)from->zero_on_reuse,
        .tenants = tenants,
        .n_tenants = (uint32_t)from->n_tenants};
}

static void fill_cache(const Kvpool__V1__CacheInfo *from, struct block *block, struct kvp_cache_info *cache)
{
    struct kvp_tenant_use *tenants = take(block, from->n_tenants * sizeof(*tenants));

    for (size_t i = 0; i < from->n_tenants; i++)
        tenants[i] = (struct kvp_tenant_use){.tenant = from->tenants[i]->tenant,
                                             .pages = from->tenants[i]->pages,
                                             .cached_pages = from->tenants[i]->cached_pages,
                                             .quota_pages = from->tenants[i]->quota_pages,
                                             .guaranteed_pages = from->tenants[i]->guaranteed_pages};
    *cache = (struct kvp_cache_info){.published_pages = from->published_pages,
                                     .cached_pages = from->cached_pages,
                                     .dirty_pages = from->dirty_pages,
                                     .pins = from->pins,
                                     .lookup_blocks = from->lookup_blocks,
                                     .hit_blocks = from->hit_blocks,
                                     .publishes = from->publishes,
                                     .evictions = from->evictions,
                                     .tenants = tenants,
                                     .n_tenants = (uint32_t)from->n_tenants};
}

enum kvp_status kvp_pool_info_from(const Kvpool__V1__PoolInfo *from, struct kvp_pool_info **ret_info)
{
    struct kvp_plane_layout *planes;
    struct kvp_pool_info *info;
    enum kvp_status status;
    struct block block;

    if (from == NULL || from->spec == NULL)
        return kvp_fail(KVP_EPROTO, "the reply describes no pool");
    info = calloc(1, block_bytes(from->spec, from->cache));
    if (info == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for the description of a pool");
    block.at = (unsigned char *)(info + 1);
    planes = take(&block, from->spec->n_planes * sizeof(*planes));
    fill_spec(from->spec, &block, &info->spec);
    status = check_layout(from, &info->spec, planes);
    if (status != KVP_OK) {
        free(info);
        return status;
    }
    info->planes = planes;
    if (from->cache != NULL)
        fill_cache(from->cache, &block, &info->cache);
    if (from->layout_digest.len == sizeof(info->layout_digest))
        memcpy(info->layout_digest, from->layout_digest.data, sizeof(info->layout_digest));
    info->slabs = from->spec->n_devices > 0 ? (uint32_t)from->spec->n_devices : 1;
    info->slab_bytes = from->slab_bytes;
    info->page_bytes = from->page_bytes;
    info->pool_id = from->pool_id;
    info->row_pages = from->row_pages;
    info->free_pages = from->free_pages;
    info->sequences = from->sequences;
    info->retiring_sequences = from->retiring_sequences;
    info->quarantined_sequences = from->quarantined_sequences;
    info->attachments = from->attachments;
    info->quarantined_pages = from->quarantined_pages;
    info->cuda = strcmp(from->backend, "cuda") == 0;
    info->lost = from->state == KVPOOL__V1__POOL_STATE__POOL_LOST;
    info->deleting = from->state == KVPOOL__V1__POOL_STATE__POOL_DELETING;
    *ret_info = info;
    return KVP_OK;
}

void kvp_pool_info_free(struct kvp_pool_info *info)
{
    free(info);
}

enum kvp_status kvp_strings_from(char *const *strings, size_t n, char ***ret_strings)
{
    size_t bytes = n * sizeof(char *) + 1;
    char **copy, *at;

    for (size_t i = 0; i < n; i++)
        bytes += strlen(strings[i]) + 1;
    copy = malloc(bytes);
    if (copy == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a list of %zu", n);
    at = (char *)(copy + n);
    for (size_t i = 0; i < n; i++) {
        copy[i] = strcpy(at, strings[i]);
        at += strlen(at) + 1;
    }
    *ret_strings = copy;
    return KVP_OK;
}

/* ---- the calls --------------------------------------------------------------------------------------------------- */

/* The planes of a spec as messages: structs and the pointers to them in one block. */
static enum kvp_status planes_to(const struct kvp_layout_spec *layout, Kvpool__V1__PoolSpec *spec, void **ret_block)
{
    Kvpool__V1__Plane **pointers = malloc(layout->n_planes * (sizeof(*pointers) + sizeof(**pointers)) + 1);
    Kvpool__V1__Plane *planes = (Kvpool__V1__Plane *)(pointers + layout->n_planes);

    if (pointers == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a message");
    for (uint32_t i = 0; i < layout->n_planes; i++) {
        kvpool__v1__plane__init(&planes[i]);
        planes[i].layer = layout->planes[i].layer;
        planes[i].component = (Kvpool__V1__Component)layout->planes[i].component;
        planes[i].heads = layout->planes[i].heads;
        planes[i].dim = layout->planes[i].dim;
        planes[i].dtype = (Kvpool__V1__DType)layout->planes[i].dtype;
        pointers[i] = &planes[i];
    }
    spec->n_planes = layout->n_planes;
    spec->planes = pointers;
    *ret_block = pointers;
    return KVP_OK;
}

/* The cache's part of a spec. @param shares, pointers  [KVP_TENANTS_MAX], valid as long as the message */
static enum kvp_status cache_to(const struct kvp_pool_spec *spec, Kvpool__V1__PoolSpec *to,
                                Kvpool__V1__TenantShare *shares, Kvpool__V1__TenantShare **pointers)
{
    if (spec->n_tenants > KVP_TENANTS_MAX)
        return kvp_fail(KVP_EINVAL, "%u tenants; a pool has at most %d", spec->n_tenants, KVP_TENANTS_MAX);
    for (uint32_t i = 0; i < spec->n_tenants; i++) {
        kvpool__v1__tenant_share__init(&shares[i]);
        shares[i].tenant = spec->tenants[i].tenant;
        shares[i].quota_pages = spec->tenants[i].quota_pages;
        shares[i].guaranteed_pages = spec->tenants[i].guaranteed_pages;
        pointers[i] = &shares[i];
    }
    to->policy = (Kvpool__V1__Policy)spec->policy;
    to->block_hash = (Kvpool__V1__BlockHash)spec->block_hash;
    to->zero_on_reuse = (Kvpool__V1__ZeroOnReuse)spec->zero_on_reuse;
    to->n_tenants = spec->n_tenants;
    to->tenants = pointers;
    return KVP_OK;
}

enum kvp_status kvp_pool_create(struct kvp_client *client, const struct kvp_pool_spec *spec,
                                struct kvp_pool_info **ret_info)
{
    Kvpool__V1__TenantShare shares[KVP_TENANTS_MAX], *pointers[KVP_TENANTS_MAX];
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    Kvpool__V1__PoolSpec to = KVPOOL__V1__POOL_SPEC__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;
    void *block = NULL;

    if (spec->layout.n_planes > KVP_PLANES_MAX)
        return kvp_fail(KVP_EINVAL, "%u planes; a pool has at most %d", spec->layout.n_planes, KVP_PLANES_MAX);
    status = cache_to(spec, &to, shares, pointers);
    if (status == KVP_OK)
        status = planes_to(&spec->layout, &to, &block);
    if (status != KVP_OK)
        return status;
    to.name = (char *)(spec->name != NULL ? spec->name : "");
    to.model = (char *)(spec->model != NULL ? spec->model : "");
    to.pages = spec->layout.pages;
    to.page_tokens = spec->layout.page_tokens;
    to.order = (Kvpool__V1__Order)spec->layout.order;
    to.placement = (Kvpool__V1__Placement)spec->layout.placement;
    to.joined = spec->layout.joined != 0;
    to.reserved_pages = spec->reserved_pages;
    to.max_sequences = spec->max_sequences;
    to.max_sequence_tokens = spec->max_sequence_tokens;
    to.n_devices = spec->n_devices;
    to.devices = (char **)spec->devices;
    to.memory = spec->legacy_ipc ? KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC : KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT;
    to.region_bytes = spec->region_bytes;
    to.linger_ms = spec->linger_ms;
    to.page_digests = spec->page_digests;
    request.spec = &to;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_CREATE_POOL, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK && ret_info != NULL)
        status = kvp_pool_info_from(((Kvpool__V1__CreatePoolReply *)rpc.reply)->pool, ret_info);
    kvp_rpc_release(&rpc);
    free(block);
    return status;
}

enum kvp_status kvp_pool_describe(struct kvp_client *client, const char *name, struct kvp_pool_info **ret_info)
{
    Kvpool__V1__DescribePoolRequest request = KVPOOL__V1__DESCRIBE_POOL_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.pool = (char *)name;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK)
        status = kvp_pool_info_from(((Kvpool__V1__DescribePoolReply *)rpc.reply)->pool, ret_info);
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_pool_list(struct kvp_client *client, char ***ret_names, size_t *ret_n)
{
    Kvpool__V1__ListPoolsRequest request = KVPOOL__V1__LIST_POOLS_REQUEST__INIT;
    const Kvpool__V1__ListPoolsReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;

    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_LIST_POOLS, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__ListPoolsReply *)rpc.reply;
        status = kvp_strings_from(reply->names, reply->n_names, ret_names);
        if (status == KVP_OK)
            *ret_n = reply->n_names;
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_pool_delete(struct kvp_client *client, const char *name)
{
    Kvpool__V1__DeletePoolRequest request = KVPOOL__V1__DELETE_POOL_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.pool = (char *)name;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_DELETE_POOL, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}
