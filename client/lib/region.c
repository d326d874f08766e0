/**
 * Regions: a range of the mapped slab by its name.
 *
 * The daemon says where a region lies; that it is in the slab as it is mapped here is checked before its address is
 * handed out. Nothing is kept of it: it is unmapped by its name.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

enum kvp_status kvp_region_map(struct kvp_pool *pool, uint32_t rank, const char *name, uint64_t bytes, unsigned flags,
                               struct kvp_region *ret_region)
{
    Kvpool__V1__MapRegionRequest request = KVPOOL__V1__MAP_REGION_REQUEST__INIT;
    const Kvpool__V1__MapRegionReply *reply;
    unsigned char *slab = kvp_slab(pool, rank);
    enum kvp_status status;
    struct kvp_rpc rpc;

    if (slab == NULL)
        return kvp_fail(KVP_EINVAL, "rank %u of pool %s is not mapped", rank, pool->info->spec.name);
    if ((flags & ~KVP_REGION_EXCLUSIVE) != 0)
        return kvp_fail(KVP_EINVAL, "flags %#x are none of kvp_region_map", flags);
    request.pool = (char *)pool->info->spec.name;
    request.name = (char *)(name != NULL ? name : "");
    request.rank = rank;
    request.bytes = bytes;
    request.exclusive = (flags & KVP_REGION_EXCLUSIVE) != 0;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__MapRegionReply *)rpc.reply;
        if (reply->offset > pool->slabs[rank].bytes || reply->bytes > pool->slabs[rank].bytes - reply->offset)
            status = kvp_fail(KVP_EPROTO, "region %s of %llu bytes at %llu is not in the slab of %llu", name,
                              (unsigned long long)reply->bytes, (unsigned long long)reply->offset,
                              (unsigned long long)pool->slabs[rank].bytes);
        else
            *ret_region = (struct kvp_region){.address = slab + reply->offset,
                                              .offset = reply->offset,
                                              .bytes = reply->bytes,
                                              .existed = reply->existed != 0};
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_region_unmap(struct kvp_pool *pool, uint32_t rank, const char *name, unsigned flags)
{
    Kvpool__V1__UnmapRegionRequest request = KVPOOL__V1__UNMAP_REGION_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    if ((flags & ~KVP_REGION_KEEP) != 0)
        return kvp_fail(KVP_EINVAL, "flags %#x are none of kvp_region_unmap", flags);
    request.pool = (char *)pool->info->spec.name;
    request.name = (char *)(name != NULL ? name : "");
    request.rank = rank;
    request.keep = (flags & KVP_REGION_KEEP) != 0;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_UNMAP_REGION, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}

/* ---- listing ----------------------------------------------------------------------------------------------------- */

/* One block: the list, then the names. */
static enum kvp_status take_list(const Kvpool__V1__DescribePoolReply *from, struct kvp_region_info **ret_regions)
{
    size_t bytes = from->n_regions * sizeof(struct kvp_region_info) + 1;
    struct kvp_region_info *regions;
    char *at;

    for (size_t i = 0; i < from->n_regions; i++)
        bytes += strlen(from->regions[i]->name) + 1;
    regions = malloc(bytes);
    if (regions == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a list of %zu regions", from->n_regions);
    at = (char *)(regions + from->n_regions);
    for (size_t i = 0; i < from->n_regions; i++) {
        const Kvpool__V1__RegionInfo *r = from->regions[i];

        regions[i] = (struct kvp_region_info){.name = strcpy(at, r->name),
                                              .rank = r->rank,
                                              .tenant = r->tenant,
                                              .mapped = r->mapped,
                                              .offset = r->offset,
                                              .bytes = r->bytes};
        at += strlen(at) + 1;
    }
    *ret_regions = regions;
    return KVP_OK;
}

enum kvp_status kvp_region_list(struct kvp_client *client, const char *pool, struct kvp_region_info **ret_regions,
                                size_t *ret_n)
{
    Kvpool__V1__DescribePoolRequest request = KVPOOL__V1__DESCRIBE_POOL_REQUEST__INIT;
    const Kvpool__V1__DescribePoolReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.pool = (char *)pool;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__DescribePoolReply *)rpc.reply;
        status = take_list(reply, ret_regions);
        if (status == KVP_OK)
            *ret_n = reply->n_regions;
    }
    kvp_rpc_release(&rpc);
    return status;
}
