/**
 * Regions: mapped by name, unmapped or given up, listed.
 *
 * The daemon places a region and remembers it; its bytes are its users' alone. Who may give one up, or have it for
 * itself: a session of its tenant, while no other has it mapped. A dead session has, until nothing writes for it any
 * more (ending.c); then its claims here are taken back when they are met, though its attachment may linger.
 */
#include "op.h"

/* KVP_OK: the region of that name is there, and the caller's tenant's. KVP_ENOENT without a text: there is none. */
static enum kvp_status find_region(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool,
                                   uint32_t rank, const char *name, uint32_t *ret_region,
                                   struct kvp_region_view *ret_view)
{
    TRY(core_name_check(core, name));
    if (rank >= pool->n_slabs)
        return core_refuse(core, KVP_EINVAL, "rank: %u, pool \"%s\" has %u slabs", rank, pool->spec->name,
                           pool->n_slabs);
    TRY(kvp_region_find(core->ledger, pool->id, rank, name, ret_region));
    enum kvp_status status = kvp_region_get(core->ledger, *ret_region, ret_view);
    if (status != KVP_OK)
        return core_refuse_plain(core, status, "the region");
    if (ret_view->tenant != turn->session.spec.tenant)
        return core_refuse(core, KVP_EPERM, "name: region \"%s\" belongs to another tenant, %u", name,
                           ret_view->tenant);
    return KVP_OK;
}

/* In the transaction: nobody but `mine` has it mapped; who is dead and quiet is not counted, and let go. */
static enum kvp_status need_alone(struct kvp_core *core, struct pool_state *pool, uint32_t region, const char *name,
                                  uint32_t mine)
{
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        struct kvp_attachment_view view;
        struct kvp_session_view session;
        if (i == mine || !kvp_region_mapped_by(core->ledger, region, i))
            continue;
        TRY(kvp_attachment_get(core->ledger, pool->id, i, &view));
        TRY(kvp_session_get(core->ledger, view.session, &session));
        if (view.state == KVP_ATTACHMENT_LIVE)
            return core_refuse(core, KVP_EBUSY, "name: region \"%s\" is mapped by session %#llx, of process %u", name,
                               (unsigned long long)ID_WORD(session.id), session.spec.pid);
        if (!core_attachment_quiet(core, pool, i))
            return core_refuse(core, KVP_EAGAIN,
                               "name: region \"%s\" was mapped by session %#llx, of process %u, which died and is not "
                               "proven gone",
                               name, (unsigned long long)ID_WORD(session.id), session.spec.pid);
        TRY(kvp_region_unmap(core->ledger, region, i));
    }
    return KVP_OK;
}

/* ---- MapRegion --------------------------------------------------------------------------------------------------- */

static enum kvp_status make_region(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool,
                                   const Kvpool__V1__MapRegionRequest *request, uint32_t *ret_region)
{
    struct kvp_region_spec spec = {.name = request->name,
                                   .rank = request->rank,
                                   .tenant = turn->session.spec.tenant,
                                   .bytes = request->bytes,
                                   .align = pool->region_align};
    unsigned long long missing;
    if (request->bytes == 0)
        return core_refuse(core, KVP_ENOENT, "name: pool \"%s\" has no region \"%s\" in slab %u", pool->spec->name,
                           request->name, request->rank);
    if (request->bytes > pool->region_bytes)
        return core_refuse(core, KVP_EINVAL, "bytes: %llu, pool \"%s\" has %llu for regions",
                           (unsigned long long)request->bytes, pool->spec->name,
                           (unsigned long long)pool->region_bytes);
    enum kvp_status status = kvp_region_make(core->ledger, pool->id, &spec, ret_region, &core->error_missing);
    missing = core->error_missing;
    if (status == KVP_ELIMIT && missing == 0)
        return core_refuse(core, status, "regions: %d exist, the most there may be", KVP_REGIONS_MAX);
    if (status == KVP_ELIMIT)
        return core_refuse(core, status,
                           "bytes: %llu for region \"%s\"; the largest gap between the regions of pool \"%s\" is of "
                           "%llu, %llu are missing",
                           (unsigned long long)request->bytes, request->name, pool->spec->name,
                           (unsigned long long)(request->bytes - missing), missing);
    return status == KVP_OK ? KVP_OK : core_refuse_plain(core, status, "the region");
}

/* In the transaction. */
static enum kvp_status map_region(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                  const Kvpool__V1__MapRegionRequest *request, uint32_t *ret_region, bool *ret_existed)
{
    struct kvp_region_view view;
    uint32_t attachment;
    TRY(core_attachment(core, turn, pool, true, &attachment));
    enum kvp_status status = find_region(core, turn, pool, request->rank, request->name, ret_region, &view);
    *ret_existed = status == KVP_OK;
    if (status == KVP_ENOENT)
        status = make_region(core, turn, pool, request, ret_region);
    TRY(status);
    if (*ret_existed && request->bytes != 0 && request->bytes != view.bytes)
        return core_refuse(core, KVP_EMISMATCH, "bytes: %llu, region \"%s\" of pool \"%s\" has %llu",
                           (unsigned long long)request->bytes, request->name, pool->spec->name,
                           (unsigned long long)view.bytes);
    if (request->exclusive)
        TRY(need_alone(core, pool, *ret_region, request->name, attachment));
    status = kvp_region_map(core->ledger, *ret_region, attachment);
    return status == KVP_OK ? KVP_OK : core_refuse_plain(core, status, "the region");
}

static enum kvp_status answer_mapped(struct kvp_core *core, struct turn *turn, const struct pool_state *pool,
                                     uint32_t region, bool existed)
{
    Kvpool__V1__MapRegionReply reply = KVPOOL__V1__MAP_REGION_REPLY__INIT;
    struct kvp_region_view view;
    TRY(kvp_region_get(core->ledger, region, &view));
    reply.offset = pool->region_offset + view.offset;
    reply.bytes = view.bytes;
    reply.existed = existed;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

enum kvp_status call_map_region(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__MapRegionRequest *request = (const Kvpool__V1__MapRegionRequest *)turn->body;
    struct kvp_region_view view;
    struct pool_state *pool;
    uint32_t region;
    bool existed;
    TRY(core_pool_live(core, request->pool, &pool));
    if (turn->repeated && find_region(core, turn, pool, request->rank, request->name, &region, &view) == KVP_OK)
        return answer_mapped(core, turn, pool, region, turn->outcome.values[0] != 0);
    kvp_txn_begin(core->ledger);
    enum kvp_status status = map_region(core, turn, pool, request, &region, &existed);
    if (status != KVP_OK)
        return core_abort(core, status);
    TRY(core_commit(core, turn, existed, 0));
    return answer_mapped(core, turn, pool, region, existed);
}

/* ---- UnmapRegion ------------------------------------------------------------------------------------------------- */

/* In the transaction. */
static enum kvp_status unmap_region(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                    const Kvpool__V1__UnmapRegionRequest *request, uint32_t region)
{
    uint32_t attachment = KVP_NONE;
    enum kvp_status status = kvp_attachment_of(core->ledger, pool->id, turn->session.id, &attachment);
    if (status == KVP_OK)
        status = kvp_region_unmap(core->ledger, region, attachment);
    if (status != KVP_OK && status != KVP_ENOENT)
        return core_refuse_plain(core, status, "the region");
    if (request->keep)
        return KVP_OK;
    TRY(need_alone(core, pool, region, request->name, KVP_NONE));
    status = kvp_region_drop(core->ledger, region);
    return status == KVP_OK ? KVP_OK : core_refuse_plain(core, status, "the region");
}

enum kvp_status call_unmap_region(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__UnmapRegionRequest *request = (const Kvpool__V1__UnmapRegionRequest *)turn->body;
    Kvpool__V1__UnmapRegionReply reply = KVPOOL__V1__UNMAP_REGION_REPLY__INIT;
    struct kvp_region_view view;
    struct pool_state *pool;
    uint32_t region;
    if (turn->repeated)
        return core_answer(core, turn, &reply.base, NULL, 0);
    TRY(core_pool_by_name(core, request->pool, &pool));
    enum kvp_status status = find_region(core, turn, pool, request->rank, request->name, &region, &view);
    if (status == KVP_ENOENT)
        return core_answer(core, turn, &reply.base, NULL, 0);
    TRY(status);
    kvp_txn_begin(core->ledger);
    status = unmap_region(core, turn, pool, request, region);
    if (status != KVP_OK)
        return core_abort(core, status);
    TRY(core_commit(core, turn, 0, 0));
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- listing ----------------------------------------------------------------------------------------------------- */

enum kvp_status core_region_list(struct kvp_core *core, const struct pool_state *pool, size_t *ret_n,
                                 Kvpool__V1__RegionInfo ***ret_regions)
{
    struct kvp_pool_view in_ledger;
    TRY(kvp_pool_get(core->ledger, pool->id, &in_ledger));
    Kvpool__V1__RegionInfo *infos = core_alloc(core, in_ledger.regions + 1, sizeof(*infos));
    *ret_regions = core_alloc(core, in_ledger.regions + 1, sizeof(**ret_regions));
    if (infos == NULL || *ret_regions == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    size_t n = 0;
    uint32_t region = kvp_region_first(core->ledger, pool->id);
    for (; region != KVP_NONE && n < in_ledger.regions; region = kvp_region_next(core->ledger, region), n++) {
        struct kvp_region_view view;
        TRY(kvp_region_get(core->ledger, region, &view));
        kvpool__v1__region_info__init(&infos[n]);
        infos[n].name = (char *)view.name;
        infos[n].rank = view.rank;
        infos[n].offset = pool->region_offset + view.offset;
        infos[n].bytes = view.bytes;
        infos[n].tenant = view.tenant;
        infos[n].mapped = view.mapped;
        (*ret_regions)[n] = &infos[n];
    }
    *ret_n = n;
    return KVP_OK;
}
