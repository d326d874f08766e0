/**
 * Pools: their records in the root part, and where their extents lie in the block.
 *
 *   FREE ──create──► LIVE ──set_lost──► LOST
 *     ▲                └────delete────────┘   only with no attachment, no sequence in any state, and no open job;
 *                                              of a LIVE one, no region either
 *
 * An extent is placed first-fit between those of other pools and is made of zeroed memory: a page, a sequence and a
 * bucket of zeros are never-used ones, so creating a pool stores its record and nothing else. A pool that a transaction
 * deletes gives its slot and its place back to the next kvp_pool_create; its caller must have zeroed that memory, which
 * it can only after the commit.
 *
 * A LOST pool lets things go (close, release, detach, reclaim) and refuses everything else with KVP_ELOST.
 */
#include "internal.h"

#include <string.h>

#define SLOTS_PER_PAGE 2u /* of the index: half of them are empty at least, so that a search is short */

/* Of a geometry that is in range. */
static struct extent_shape shape_of(uint32_t pages, uint32_t max_sequences, uint32_t row_pages, bool page_digests)
{
    struct extent_shape shape = {.bucket_count =
                                     max_sequences == 1 ? 1 : 1u << (32 - __builtin_clz(max_sequences - 1))};
    shape.entries = ALIGN_UP((uint64_t)pages * sizeof(block_page), KVP_PART_ALIGN);
    shape.slots = ALIGN_UP(shape.entries + (uint64_t)pages * sizeof(struct block_entry), KVP_PART_ALIGN);
    shape.followers = ALIGN_UP(shape.slots + (uint64_t)pages * SLOTS_PER_PAGE * sizeof(block_slot), KVP_PART_ALIGN);
    shape.ghosts = ALIGN_UP(shape.followers + (uint64_t)pages * sizeof(uint32_t), KVP_PART_ALIGN);
    uint64_t ghosts = pages < KVP_GHOST_WAYS ? KVP_GHOST_WAYS : pages;
    shape.policy = ALIGN_UP(shape.ghosts + ghosts * sizeof(uint32_t), KVP_PART_ALIGN);
    shape.digests = ALIGN_UP(shape.policy + sizeof(struct block_policy), KVP_PART_ALIGN);
    shape.tenants = ALIGN_UP(shape.digests + (page_digests ? pages * sizeof(uint64_t) : 0), KVP_PART_ALIGN);
    shape.attachments = ALIGN_UP(shape.tenants + KVP_TENANTS_MAX * sizeof(struct block_tenant), KVP_PART_ALIGN);
    shape.sequences = shape.attachments + KVP_ATTACHMENTS_MAX * sizeof(struct block_attachment);
    shape.buckets = shape.sequences + (uint64_t)max_sequences * sizeof(struct block_seq);
    shape.rows = ALIGN_UP(shape.buckets + (uint64_t)shape.bucket_count * sizeof(uint32_t), KVP_PART_ALIGN);
    uint64_t end = shape.rows + (uint64_t)max_sequences * row_pages * sizeof(uint32_t);
    shape.bytes = ALIGN_UP(end, KVP_EXTENT_ALIGN);
    return shape;
}

enum kvp_status shape_extent(const struct kvp_pool_geometry *geometry, struct extent_shape *ret_shape)
{
    const struct kvp_pool_geometry *g = geometry;
    if (g->pages < 1 || g->pages > KVP_PAGES_MAX || g->page_tokens < 1 || g->page_tokens > KVP_PAGE_TOKENS_MAX ||
        g->reserved_pages >= g->pages || g->max_sequences < 1 || g->max_sequences > KVP_SEQUENCES_MAX ||
        g->row_pages < 1 || g->row_pages > KVP_SEQUENCE_TOKENS_MAX || g->page_digests > 1)
        return KVP_EINVAL;
    *ret_shape = shape_of(g->pages, g->max_sequences, g->row_pages, g->page_digests);
    return KVP_OK;
}

static struct kvp_pool_geometry geometry_of(const struct block_pool *pool)
{
    return (struct kvp_pool_geometry){
        .pages = pool->pages,
        .page_tokens = pool->page_tokens,
        .reserved_pages = pool->reserved_pages,
        .max_sequences = pool->max_sequences,
        .row_pages = pool->row_pages,
        .page_digests = pool->page_digests,
    };
}

static void map_slot(struct kvp_ledger *ledger, uint32_t slot)
{
    const struct block_pool *pool = &pools_of(ledger)[slot];
    struct extent_shape shape =
        shape_of(pool->pages, pool->max_sequences, pool->row_pages, pool->page_digests != 0);
    const unsigned char *extent = ledger->view + pool->extent_offset;
    ledger->maps[slot] = (struct pool_map){
        .pool = pool,
        .slot = slot,
        .bucket_mask = shape.bucket_count - 1,
        .slot_count = pool->pages * SLOTS_PER_PAGE,
        .pages = (const block_page *)(const void *)extent,
        .entries = (const struct block_entry *)(const void *)(extent + shape.entries),
        .slots = (const block_slot *)(const void *)(extent + shape.slots),
        .followers = (const uint32_t *)(const void *)(extent + shape.followers),
        .ghosts = (const uint32_t *)(const void *)(extent + shape.ghosts),
        .policy = (const struct block_policy *)(const void *)(extent + shape.policy),
        .digests = pool->page_digests != 0 ? (const uint64_t *)(const void *)(extent + shape.digests) : NULL,
        .tenants = (const struct block_tenant *)(const void *)(extent + shape.tenants),
        .attachments = (const struct block_attachment *)(const void *)(extent + shape.attachments),
        .seqs = (const struct block_seq *)(const void *)(extent + shape.sequences),
        .buckets = (const uint32_t *)(const void *)(extent + shape.buckets),
        .rows = (const uint32_t *)(const void *)(extent + shape.rows),
    };
}

enum kvp_status find_pool(const struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct block_pool **ret_pool)
{
    if (pool.slot >= KVP_POOLS_MAX || pool.generation == 0)
        return KVP_ENOENT;
    const struct block_pool *record = &pools_of(ledger)[pool.slot];
    if (record->state == KVP_POOL_FREE || record->generation != pool.generation)
        return KVP_ENOENT;
    *ret_pool = record;
    return KVP_OK;
}

enum kvp_status map_pool(const struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct pool_map **ret_map)
{
    const struct block_pool *record;
    TRY(find_pool(ledger, pool, &record));
    *ret_map = pool_at(ledger, pool.slot);
    return KVP_OK;
}

enum kvp_status map_live_pool(const struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct pool_map **ret_map)
{
    TRY(map_pool(ledger, pool, ret_map));
    return (*ret_map)->pool->state == KVP_POOL_LIVE ? KVP_OK : KVP_ELOST;
}

const char *check_pool_record(const struct kvp_ledger *ledger, uint32_t slot)
{
    const struct block_pool *pools = pools_of(ledger);
    const struct block_pool *pool = &pools[slot];
    if (pool->state == KVP_POOL_FREE)
        return NULL;
    if (pool->state > KVP_POOL_LOST || pool->generation == 0)
        return "a pool's state can not be";
    struct kvp_pool_geometry geometry = geometry_of(pool);
    struct extent_shape shape;
    if (shape_extent(&geometry, &shape) != KVP_OK)
        return "a pool's geometry is out of range";
    if (pool->extent_bytes != shape.bytes || pool->extent_offset % KVP_EXTENT_ALIGN != 0 ||
        pool->extent_offset < ROOT_BYTES || shape.bytes > ledger->bytes ||
        pool->extent_offset > ledger->bytes - shape.bytes)
        return "a pool's extent is not where it can be";
    for (uint32_t i = 0; i < slot; i++) {
        if (pools[i].state != KVP_POOL_FREE && pools[i].extent_offset < pool->extent_offset + pool->extent_bytes &&
            pool->extent_offset < pools[i].extent_offset + pools[i].extent_bytes)
            return "two pools' extents overlap";
    }
    if (pool->name[0] == 0 || pool->name[7] >> 56 != 0)
        return "a pool's name can not be";
    if (pool->blob_bytes > KVP_POOL_BLOB_BYTES)
        return "a pool's description is too long";
    if (pool->policy > KVP_POLICY_LRU)
        return "a pool's eviction policy can not be";
    if (pool->region_bytes > KVP_REGION_BYTES_MAX || pool->region_count > KVP_REGIONS_MAX)
        return "a pool's regions can not be";
    if (pool->pages_used < pool->reserved_pages || pool->pages_used > pool->pages ||
        pool->sequences_used > pool->max_sequences)
        return "a pool's watermark is out of range";
    return NULL;
}

void map_pools(struct kvp_ledger *ledger)
{
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        if (pools_of(ledger)[slot].state != KVP_POOL_FREE && check_pool_record(ledger, slot) == NULL)
            map_slot(ledger, slot);
    }
}

/* ---- create, delete ------------------------------------------------------------------------------------------------
 */

/* First fit: from the root's end, behind every extent that is in the way, until none is. */
static enum kvp_status place_extent(const struct kvp_ledger *ledger, uint64_t bytes, uint64_t *ret_offset)
{
    const struct block_pool *pools = pools_of(ledger);
    uint64_t offset = ROOT_BYTES;
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX;) {
        const struct block_pool *pool = &pools[slot++];
        if (pool->state == KVP_POOL_FREE || pool->extent_offset >= offset + bytes ||
            pool->extent_offset + pool->extent_bytes <= offset)
            continue;
        offset = pool->extent_offset + pool->extent_bytes;
        slot = 0;
    }
    if (bytes > ledger->bytes || offset > ledger->bytes - bytes)
        return KVP_ELIMIT;
    *ret_offset = offset;
    return KVP_OK;
}

static enum kvp_status free_pool_slot(const struct kvp_ledger *ledger, uint32_t *ret_slot)
{
    const struct block_pool *pools = pools_of(ledger);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        if (pools[slot].state == KVP_POOL_FREE) {
            *ret_slot = slot;
            return KVP_OK;
        }
    }
    return KVP_ELIMIT;
}

enum kvp_status kvp_pool_extent(const struct kvp_ledger *ledger, const struct kvp_pool_geometry *geometry,
                                uint64_t *ret_offset, uint64_t *ret_bytes)
{
    struct extent_shape shape;
    uint32_t slot;
    TRY(shape_extent(geometry, &shape));
    TRY(free_pool_slot(ledger, &slot));
    TRY(place_extent(ledger, shape.bytes, ret_offset));
    *ret_bytes = shape.bytes;
    return KVP_OK;
}

enum kvp_status kvp_pool_next_id(const struct kvp_ledger *ledger, struct kvp_pool_id *ret_pool)
{
    uint32_t slot;
    TRY(free_pool_slot(ledger, &slot));
    *ret_pool = (struct kvp_pool_id){slot, next_generation(pools_of(ledger)[slot].generation)};
    return KVP_OK;
}

static void put_geometry(struct kvp_ledger *ledger, const struct block_pool *pool,
                         const struct kvp_pool_geometry *geometry)
{
    put32(ledger, &pool->pages, geometry->pages);
    put32(ledger, &pool->page_tokens, geometry->page_tokens);
    put32(ledger, &pool->reserved_pages, geometry->reserved_pages);
    put32(ledger, &pool->max_sequences, geometry->max_sequences);
    put32(ledger, &pool->row_pages, geometry->row_pages);
    put32(ledger, &pool->page_digests, geometry->page_digests);
    put64(ledger, &pool->free_list, KVP_NONE);
    put32(ledger, &pool->pages_used, geometry->reserved_pages);
    put32(ledger, &pool->sequences_used, 0);
    put32(ledger, &pool->sequences_free, 0);
    put32(ledger, &pool->retiring, 0);
    put32(ledger, &pool->reclaim, 0);
    put32(ledger, &pool->open_count, 0);
    put32(ledger, &pool->retiring_count, 0);
    put32(ledger, &pool->attachments, 0);
}

static void put_cache(struct kvp_ledger *ledger, const struct block_pool *pool, const struct kvp_pool_spec *spec)
{
    put32(ledger, &pool->policy, spec->policy);
    put32(ledger, &pool->zero_on_reuse, spec->zero_on_reuse);
    put32(ledger, &pool->hash, spec->hash);
    const uint32_t *counts[] = {&pool->tick,  &pool->published, &pool->cached,
                                &pool->dirty, &pool->pins,      &pool->pin_count};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++)
        put32(ledger, counts[i], 0);
    put64(ledger, &pool->hash_key[0], spec->hash_key[0]);
    put64(ledger, &pool->hash_key[1], spec->hash_key[1]);
    const uint64_t *totals[] = {&pool->lookup_blocks, &pool->hit_blocks, &pool->evictions};
    for (size_t i = 0; i < sizeof(totals) / sizeof(totals[0]); i++)
        put64(ledger, totals[i], 0);
}

static void put_blob(struct kvp_ledger *ledger, const struct block_pool *pool, const void *blob, uint32_t bytes)
{
    put32(ledger, &pool->blob_bytes, bytes);
    for (uint32_t at = 0; at < bytes; at += 8) {
        uint64_t word = 0;
        memcpy(&word, (const unsigned char *)blob + at, bytes - at < 8 ? bytes - at : 8);
        put64(ledger, &pool->blob[at / 8], word);
    }
}

enum kvp_status kvp_pool_create(struct kvp_ledger *ledger, const struct kvp_pool_spec *spec,
                                struct kvp_pool_id *ret_pool)
{
    size_t name_bytes = spec->name == NULL ? 0 : strnlen(spec->name, KVP_NAME_BYTES_MAX + 1);
    if (name_bytes == 0 || name_bytes > KVP_NAME_BYTES_MAX || spec->blob_bytes > KVP_POOL_BLOB_BYTES ||
        spec->policy > KVP_POLICY_LRU || spec->region_bytes > KVP_REGION_BYTES_MAX)
        return KVP_EINVAL;
    struct kvp_pool_id found;
    if (kvp_pool_by_name(ledger, spec->name, &found) == KVP_OK)
        return KVP_EEXIST;
    uint64_t offset, bytes;
    uint32_t slot;
    TRY(kvp_pool_extent(ledger, &spec->geometry, &offset, &bytes));
    TRY(free_pool_slot(ledger, &slot));
    TRY(txn_room(ledger, ROOM_SMALL + KVP_POOL_BLOB_BYTES / 8));
    const struct block_pool *pool = &pools_of(ledger)[slot];
    uint32_t generation = next_generation(pool->generation);
    uint64_t name[8] = {0};
    memcpy(name, spec->name, name_bytes);
    for (int i = 0; i < 8; i++)
        put64(ledger, &pool->name[i], name[i]);
    put_geometry(ledger, pool, &spec->geometry);
    put_cache(ledger, pool, spec);
    put32(ledger, &pool->needs_after, spec->needs_after);
    put64(ledger, &pool->layout_digest[0], spec->layout_digest[0]);
    put64(ledger, &pool->layout_digest[1], spec->layout_digest[1]);
    put64(ledger, &pool->extent_offset, offset);
    put64(ledger, &pool->extent_bytes, bytes);
    put_blob(ledger, pool, spec->blob, spec->blob_bytes);
    put64(ledger, &pool->region_bytes, spec->region_bytes);
    put32(ledger, &pool->regions, 0);
    put32(ledger, &pool->region_count, 0);
    put32(ledger, &pool->generation, generation);
    put32(ledger, &pool->state, KVP_POOL_LIVE);
    map_slot(ledger, slot);
    ledger->copy_stale = true;
    *ret_pool = (struct kvp_pool_id){slot, generation};
    return KVP_OK;
}

enum kvp_status kvp_pool_delete(struct kvp_ledger *ledger, struct kvp_pool_id pool)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (m->pool->attachments != 0 || m->pool->open_count != 0 || m->pool->retiring_count != 0)
        return KVP_EBUSY;
    const struct block_job *jobs = jobs_of(ledger);
    for (uint32_t i = 0; i < KVP_JOBS_MAX; i++) {
        if (jobs[i].open && jobs[i].pool_slot == pool.slot && jobs[i].pool_generation == pool.generation)
            return KVP_EBUSY;
    }
    if (m->pool->region_count != 0 && m->pool->state != KVP_POOL_LOST)
        return KVP_EBUSY;
    TRY(txn_room(ledger, ROOM_SMALL + KVP_REGIONS_MAX));
    TRY(regions_forget(ledger, m)); /* their bytes went with the pool's */
    put32(ledger, &m->pool->state, KVP_POOL_FREE);
    return KVP_OK;
}

enum kvp_status kvp_pool_set_lost(struct kvp_ledger *ledger, struct kvp_pool_id pool)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    TRY(txn_room(ledger, ROOM_SMALL));
    if (m->pool->state != KVP_POOL_LOST)
        put32(ledger, &m->pool->state, KVP_POOL_LOST);
    return KVP_OK;
}

/* ---- look-ups ------------------------------------------------------------------------------------------------------
 */

static const char *name_of(const struct block_pool *pool)
{
    return (const char *)pool->name;
}

static struct kvp_cache_view cache_view_of(const struct block_pool *pool)
{
    return (struct kvp_cache_view){
        .policy = (enum kvp_policy)pool->policy,
        .zero_on_reuse = pool->zero_on_reuse != 0,
        .hash_key = {pool->hash_key[0], pool->hash_key[1]},
        .hash = pool->hash,
        .published = pool->published,
        .cached_pages = pool->cached,
        .dirty_pages = pool->dirty,
        .pins = pool->pin_count,
        .lookup_blocks = pool->lookup_blocks,
        .hit_blocks = pool->hit_blocks,
        .publishes = pool->published + pool->evictions,
        .evictions = pool->evictions,
    };
}

static struct kvp_pool_view view_of(const struct pool_map *m)
{
    const struct block_pool *pool = m->pool;
    return (struct kvp_pool_view){
        .id = {m->slot, pool->generation},
        .state = (enum kvp_pool_state)pool->state,
        .needs_after = pool->needs_after != 0,
        .cache = cache_view_of(pool),
        .geometry = geometry_of(pool),
        .layout_digest = {pool->layout_digest[0], pool->layout_digest[1]},
        .name = name_of(pool),
        .blob = pool->blob,
        .blob_bytes = pool->blob_bytes,
        .extent_offset = pool->extent_offset,
        .extent_bytes = pool->extent_bytes,
        .free_pages = free_pages(m),
        .open_sequences = pool->open_count,
        .retiring_sequences = pool->retiring_count,
        .attachments = pool->attachments,
        .regions = pool->region_count,
        .region_bytes = pool->region_bytes,
    };
}

enum kvp_status kvp_pool_live(const struct kvp_ledger *ledger, struct kvp_pool_id pool)
{
    const struct block_pool *record;
    TRY(find_pool(ledger, pool, &record));
    return record->state == KVP_POOL_LIVE ? KVP_OK : KVP_ELOST;
}

enum kvp_status kvp_pool_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_pool_view *ret_view)
{
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    *ret_view = view_of(m);
    return KVP_OK;
}

enum kvp_status kvp_pool_at(const struct kvp_ledger *ledger, uint32_t slot, struct kvp_pool_view *ret_view)
{
    if (slot >= KVP_POOLS_MAX || pools_of(ledger)[slot].state == KVP_POOL_FREE)
        return KVP_ENOENT;
    *ret_view = view_of(pool_at(ledger, slot));
    return KVP_OK;
}

enum kvp_status kvp_pool_by_name(const struct kvp_ledger *ledger, const char *name, struct kvp_pool_id *ret_pool)
{
    const struct block_pool *pools = pools_of(ledger);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        if (pools[slot].state != KVP_POOL_FREE && strncmp(name_of(&pools[slot]), name, KVP_NAME_BYTES_MAX + 1) == 0) {
            *ret_pool = (struct kvp_pool_id){slot, pools[slot].generation};
            return KVP_OK;
        }
    }
    return KVP_ENOENT;
}
