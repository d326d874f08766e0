/**
 * Regions: named ranges of bytes in a pool's slabs, in the room behind the pages, for engines that shape their own
 * tensors.
 *
 *              make                  map, by an attachment (LIVE)
 *   (unused) ────────► kept ─────────────────────────────────────► kept and mapped
 *       ▲               │ ▲                                            │
 *       └──── drop ─────┘ └── unmapped by the last: unmap, or freed ───┘
 *
 * A region belongs to a tenant and outlives whoever mapped it. A DEAD attachment has its regions mapped until it is
 * freed, that is until nothing writes for it any more; so a range is never given to another while it may be written.
 *
 * One table for all pools; the regions of a pool are a list in the order of rank and offset, in which a new one takes
 * the first gap that is large enough. Looking a name up walks it: mapping happens at an engine's start.
 */
#include "internal.h"

#include <string.h>

static enum kvp_status name_words(const char *name, uint64_t ret_words[8])
{
    size_t bytes = name == NULL ? 0 : strnlen(name, KVP_NAME_BYTES_MAX + 1);
    if (bytes == 0 || bytes > KVP_NAME_BYTES_MAX)
        return KVP_EINVAL;
    memset(ret_words, 0, 8 * sizeof(uint64_t));
    memcpy(ret_words, name, bytes);
    return KVP_OK;
}

/* The region at a link of a pool's list, NULL at its end. `steps` counts, so that no walk goes on for ever. */
static enum kvp_status follow(const struct kvp_ledger *ledger, const struct pool_map *m, uint32_t link, uint32_t *steps,
                              const struct block_region **ret_region)
{
    *ret_region = NULL;
    if (link == 0)
        return KVP_OK;
    if (link > KVP_REGIONS_MAX || (*steps)++ == KVP_REGIONS_MAX)
        return KVP_ECORRUPT;
    const struct block_region *region = &regions_of(ledger)[link - 1];
    if (region->pool_slot != m->slot || region->pool_generation != m->pool->generation)
        return KVP_ECORRUPT;
    *ret_region = region;
    return KVP_OK;
}

static enum kvp_status find_name(const struct kvp_ledger *ledger, const struct pool_map *m, uint32_t rank,
                                 const uint64_t name[8], const struct block_region **ret_region)
{
    uint32_t steps = 0;
    TRY(follow(ledger, m, m->pool->regions, &steps, ret_region));
    while (*ret_region != NULL && ((*ret_region)->rank != rank || memcmp((*ret_region)->name, name, 64) != 0))
        TRY(follow(ledger, m, (*ret_region)->next, &steps, ret_region));
    return KVP_OK;
}

/* A region that is there, and its pool. */
static enum kvp_status find_region(const struct kvp_ledger *ledger, uint32_t region, const struct pool_map **ret_map,
                                   const struct block_region **ret_region)
{
    if (region >= KVP_REGIONS_MAX)
        return KVP_ENOENT;
    *ret_region = &regions_of(ledger)[region];
    return map_pool(ledger, (struct kvp_pool_id){(*ret_region)->pool_slot, (*ret_region)->pool_generation}, ret_map);
}

/* ---- make, drop ----------------------------------------------------------------------------------------------------
 */

/* The first gap of a rank's room: where it begins, and the link that the region in it hangs on. */
static enum kvp_status find_gap(const struct kvp_ledger *ledger, const struct pool_map *m,
                                const struct kvp_region_spec *spec, const uint32_t **ret_link, uint64_t *ret_offset,
                                uint64_t *reterr_missing)
{
    const uint32_t *link = &m->pool->regions;
    uint64_t begin = 0, largest = 0;
    for (uint32_t steps = 0;;) {
        const struct block_region *region;
        TRY(follow(ledger, m, *link, &steps, &region));
        if (region != NULL && region->rank < spec->rank) {
            link = &region->next;
            continue;
        }
        bool last = region == NULL || region->rank != spec->rank;
        uint64_t end = last ? m->pool->region_bytes : region->offset;
        uint64_t gap = end > begin ? end - begin : 0;
        if (gap >= spec->bytes) {
            *ret_link = link;
            *ret_offset = begin;
            return KVP_OK;
        }
        largest = gap > largest ? gap : largest;
        if (last) {
            *reterr_missing = spec->bytes - largest;
            return KVP_ELIMIT;
        }
        begin = ALIGN_UP(region->offset + region->bytes, spec->align);
        link = &region->next;
    }
}

enum kvp_status kvp_region_make(struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct kvp_region_spec *spec,
                                uint32_t *ret_region, uint64_t *reterr_missing)
{
    const struct block_region *found, *regions = regions_of(ledger);
    const uint32_t *link;
    uint64_t name[8], offset;
    uint32_t slot = 0;
    const struct pool_map *m;
    TRY(name_words(spec->name, name));
    if (spec->rank >= KVP_GPUS_MAX || spec->bytes == 0 || spec->bytes > KVP_REGION_BYTES_MAX || spec->align == 0 ||
        (spec->align & (spec->align - 1)) != 0 || spec->align > KVP_REGION_BYTES_MAX)
        return KVP_EINVAL;
    TRY(map_live_pool(ledger, pool, &m));
    TRY(find_name(ledger, m, spec->rank, name, &found));
    if (found != NULL)
        return KVP_EEXIST;
    TRY(find_gap(ledger, m, spec, &link, &offset, reterr_missing));
    while (slot < KVP_REGIONS_MAX && regions[slot].pool_generation != 0)
        slot++;
    if (slot == KVP_REGIONS_MAX) {
        *reterr_missing = 0;
        return KVP_ELIMIT;
    }
    TRY(txn_room(ledger, ROOM_SMALL));
    const struct block_region *made = &regions[slot];
    put32(ledger, &made->pool_slot, pool.slot);
    put32(ledger, &made->pool_generation, pool.generation);
    put32(ledger, &made->rank, spec->rank);
    put32(ledger, &made->tenant, spec->tenant);
    put64(ledger, &made->offset, offset);
    put64(ledger, &made->bytes, spec->bytes);
    for (int i = 0; i < 8; i++)
        put64(ledger, &made->name[i], name[i]);
    for (int i = 0; i < KVP_ATTACHMENTS_MAX / 64; i++)
        put64(ledger, &made->mapped[i], 0);
    put32(ledger, &made->next, *link);
    put32(ledger, link, slot + 1);
    put32(ledger, &m->pool->region_count, m->pool->region_count + 1);
    *ret_region = slot;
    return KVP_OK;
}

enum kvp_status kvp_region_drop(struct kvp_ledger *ledger, uint32_t region)
{
    const struct block_region *record, *at;
    const struct pool_map *m;
    TRY(find_region(ledger, region, &m, &record));
    for (int i = 0; i < KVP_ATTACHMENTS_MAX / 64; i++) {
        if (record->mapped[i] != 0)
            return KVP_EBUSY;
    }
    const uint32_t *link = &m->pool->regions;
    for (uint32_t steps = 0;; link = &at->next) {
        TRY(follow(ledger, m, *link, &steps, &at));
        if (at == NULL)
            return KVP_ECORRUPT;
        if (at == record)
            break;
    }
    TRY(txn_room(ledger, ROOM_SMALL));
    put32(ledger, link, record->next);
    put32(ledger, &record->pool_generation, 0);
    put32(ledger, &m->pool->region_count, m->pool->region_count - 1);
    return KVP_OK;
}

enum kvp_status regions_forget(struct kvp_ledger *ledger, const struct pool_map *m)
{
    const struct block_region *region;
    uint32_t steps = 0;
    TRY(follow(ledger, m, m->pool->regions, &steps, &region));
    while (region != NULL) {
        const struct block_region *gone = region;
        TRY(follow(ledger, m, gone->next, &steps, &region));
        put32(ledger, &gone->pool_generation, 0);
    }
    if (steps != 0) {
        put32(ledger, &m->pool->regions, 0);
        put32(ledger, &m->pool->region_count, 0);
    }
    return KVP_OK;
}

/* ---- who has it mapped ---------------------------------------------------------------------------------------------
 */

static void put_mapped(struct kvp_ledger *ledger, const struct block_region *region, uint32_t attachment, bool mapped)
{
    const uint64_t *word = &region->mapped[attachment / 64];
    uint64_t bit = 1ull << attachment % 64, value = mapped ? *word | bit : *word & ~bit;
    if (value != *word)
        put64(ledger, word, value);
}

enum kvp_status kvp_region_map(struct kvp_ledger *ledger, uint32_t region, uint32_t attachment)
{
    const struct block_region *record;
    const struct pool_map *m;
    TRY(find_region(ledger, region, &m, &record));
    TRY(map_live_pool(ledger, (struct kvp_pool_id){m->slot, m->pool->generation}, &m));
    TRY(find_live_attachment(m, attachment));
    TRY(txn_room(ledger, ROOM_SMALL));
    put_mapped(ledger, record, attachment, true);
    return KVP_OK;
}

enum kvp_status kvp_region_unmap(struct kvp_ledger *ledger, uint32_t region, uint32_t attachment)
{
    const struct block_region *record;
    const struct pool_map *m;
    TRY(find_region(ledger, region, &m, &record));
    if (attachment >= KVP_ATTACHMENTS_MAX || m->attachments[attachment].state == KVP_ATTACHMENT_FREE)
        return KVP_ENOENT;
    TRY(txn_room(ledger, ROOM_SMALL));
    put_mapped(ledger, record, attachment, false);
    return KVP_OK;
}

enum kvp_status regions_unmap(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment)
{
    const struct block_region *region;
    uint32_t steps = 0;
    TRY(follow(ledger, m, m->pool->regions, &steps, &region));
    while (region != NULL) {
        put_mapped(ledger, region, attachment, false);
        TRY(follow(ledger, m, region->next, &steps, &region));
    }
    return KVP_OK;
}

/* ---- look-ups ------------------------------------------------------------------------------------------------------
 */

enum kvp_status kvp_region_find(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t rank,
                                const char *name, uint32_t *ret_region)
{
    const struct block_region *found;
    uint64_t words[8];
    const struct pool_map *m;
    TRY(map_pool(ledger, pool, &m));
    if (name_words(name, words) != KVP_OK)
        return KVP_ENOENT;
    TRY(find_name(ledger, m, rank, words, &found));
    if (found == NULL)
        return KVP_ENOENT;
    *ret_region = (uint32_t)(found - regions_of(ledger));
    return KVP_OK;
}

enum kvp_status kvp_region_get(const struct kvp_ledger *ledger, uint32_t region, struct kvp_region_view *ret_view)
{
    const struct block_region *record;
    uint32_t mapped = 0;
    const struct pool_map *m;
    TRY(find_region(ledger, region, &m, &record));
    for (int i = 0; i < KVP_ATTACHMENTS_MAX / 64; i++)
        mapped += (uint32_t)__builtin_popcountll(record->mapped[i]);
    *ret_view = (struct kvp_region_view){
        .pool = {record->pool_slot, record->pool_generation},
        .name = (const char *)record->name,
        .rank = record->rank,
        .tenant = record->tenant,
        .offset = record->offset,
        .bytes = record->bytes,
        .mapped = mapped,
    };
    return KVP_OK;
}

uint32_t kvp_region_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool)
{
    const struct pool_map *m;
    if (map_pool(ledger, pool, &m) != KVP_OK || m->pool->regions == 0 || m->pool->regions > KVP_REGIONS_MAX)
        return KVP_NONE;
    return m->pool->regions - 1;
}

uint32_t kvp_region_next(const struct kvp_ledger *ledger, uint32_t region)
{
    if (region >= KVP_REGIONS_MAX)
        return KVP_NONE;
    uint32_t next = regions_of(ledger)[region].next;
    return next == 0 || next > KVP_REGIONS_MAX ? KVP_NONE : next - 1;
}

bool kvp_region_mapped_by(const struct kvp_ledger *ledger, uint32_t region, uint32_t attachment)
{
    return region < KVP_REGIONS_MAX && attachment < KVP_ATTACHMENTS_MAX &&
           (regions_of(ledger)[region].mapped[attachment / 64] >> attachment % 64 & 1) != 0;
}

/* ---- audit ---------------------------------------------------------------------------------------------------------
 */

/* Note a region's name. @return whether another of its pool and rank has it */
static bool name_taken(struct audit *audit, uint32_t slot)
{
    const struct block_region *regions = regions_of(audit->ledger), *region = &regions[slot];
    uint64_t hash = region->rank ^ (uint64_t)region->pool_slot << 32;
    for (int i = 0; i < 8; i++)
        hash = (hash ^ region->name[i]) * 0x9e3779b97f4a7c15ull ^ hash >> 29;
    uint32_t at = (uint32_t)(hash >> 32) % AUDIT_NAMES;
    for (; audit->region_names[at] != 0; at = (at + 1) % AUDIT_NAMES) {
        const struct block_region *other = &regions[audit->region_names[at] - 1];
        if (other->pool_slot == region->pool_slot && other->rank == region->rank &&
            memcmp(other->name, region->name, sizeof(region->name)) == 0)
            return true;
    }
    audit->region_names[at] = slot + 1;
    return false;
}

static void audit_one(struct audit *audit, const struct pool_map *m, uint32_t slot, const struct block_region *before)
{
    const struct block_region *region = &regions_of(audit->ledger)[slot];
    if (region->rank >= KVP_GPUS_MAX || region->name[0] == 0 || region->name[7] >> 56 != 0)
        audit_report(audit, "region %u: its rank %u or its name can not be", slot, region->rank);
    if (region->bytes == 0 || region->offset > m->pool->region_bytes ||
        region->bytes > m->pool->region_bytes - region->offset)
        audit_report(audit, "region %u: %llu bytes at %llu are not in the %llu that pool %u has for regions", slot,
                     (unsigned long long)region->bytes, (unsigned long long)region->offset,
                     (unsigned long long)m->pool->region_bytes, m->slot);
    if (before != NULL && (region->rank < before->rank ||
                           (region->rank == before->rank && region->offset < before->offset + before->bytes)))
        audit_report(audit, "region %u: overlaps region %u, or stands behind it by mistake", slot,
                     (uint32_t)(before - regions_of(audit->ledger)));
    if (name_taken(audit, slot))
        audit_report(audit, "region %u: another of pool %u has its name", slot, m->slot);
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        if (kvp_region_mapped_by(audit->ledger, slot, i) && m->attachments[i].state == KVP_ATTACHMENT_FREE)
            audit_report(audit, "region %u: mapped by attachment %u, which is free", slot, i);
    }
}

void audit_pool_regions(struct audit *audit, uint32_t pool_slot)
{
    const struct block_region *regions = regions_of(audit->ledger), *before = NULL, *region;
    uint32_t steps = 0;
    const struct pool_map *m = pool_at(audit->ledger, pool_slot);
    enum kvp_status status = follow(audit->ledger, m, m->pool->regions, &steps, &region);
    for (; status == KVP_OK && region != NULL;
         before = region, status = follow(audit->ledger, m, region->next, &steps, &region)) {
        uint32_t slot = (uint32_t)(region - regions);
        if (audit->region_marks[slot]) {
            audit_report(audit, "region %u: is in the list of pool %u twice", slot, pool_slot);
            return;
        }
        audit->region_marks[slot] = 1;
        audit_one(audit, m, slot, before);
    }
    if (status != KVP_OK)
        audit_report(audit, "pool %u: its list of regions leads nowhere after %u", pool_slot, steps);
    else if (steps != m->pool->region_count)
        audit_report(audit, "pool %u: counts %u regions, has %u", pool_slot, m->pool->region_count, steps);
}

void audit_regions(struct audit *audit)
{
    for (uint32_t slot = 0; slot < KVP_REGIONS_MAX; slot++) {
        if (regions_of(audit->ledger)[slot].pool_generation != 0 && !audit->region_marks[slot])
            audit_report(audit, "region %u: is in no pool's list", slot);
    }
}
