/**
 * Regions: names, places, who has them mapped, and what their pool's end does to them.
 */
#include "layout.h"
#include "ledger_block.h"

#include <stdio.h>
#include <string.h>

static const struct kvp_pool_geometry small = {
    .pages = 8, .page_tokens = 4, .reserved_pages = 0, .max_sequences = 4, .row_pages = 4};

/* In the open transaction. KVP_NONE: refused. */
static uint32_t make(const struct ledger_bed *bed, const char *name, uint32_t rank, uint64_t bytes, uint64_t align)
{
    struct kvp_region_spec spec = {name, rank, 7, bytes, align};
    uint32_t region = KVP_NONE;
    uint64_t missing;
    return kvp_region_make(bed->ledger, bed->pool, &spec, &region, &missing) == KVP_OK ? region : KVP_NONE;
}

static struct kvp_region_view view_of(const struct ledger_bed *bed, uint32_t region)
{
    struct kvp_region_view view = {0};
    ck_assert_int_eq(kvp_region_get(bed->ledger, region, &view), KVP_OK);
    return view;
}

START_TEST(a_region_keeps_its_name_rank_tenant_and_place)
{
    struct ledger_bed bed;
    char longest[KVP_NAME_BYTES_MAX + 1];
    struct kvp_region_view view;
    struct kvp_pool_view pool;
    uint32_t found;
    memset(longest, 'n', KVP_NAME_BYTES_MAX);
    longest[KVP_NAME_BYTES_MAX] = '\0';
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    uint32_t first = make(&bed, longest, 0, 100, 64), second = make(&bed, "kv/1", 0, 28, 64);
    uint32_t other = make(&bed, longest, 15, 1024, 64);
    kvp_txn_commit(bed.ledger);
    view = view_of(&bed, first);
    ck_assert(view.rank == 0 && view.tenant == 7 && view.offset == 0 && view.bytes == 100 && view.mapped == 0);
    ck_assert(view.pool.slot == bed.pool.slot && view.pool.generation == bed.pool.generation);
    ck_assert_str_eq(view.name, longest);
    ck_assert_uint_eq(view_of(&bed, second).offset, 128);
    ck_assert(view_of(&bed, other).offset == 0 && view_of(&bed, other).rank == 15);
    ck_assert_int_eq(kvp_region_find(bed.ledger, bed.pool, 0, "kv/1", &found), KVP_OK);
    ck_assert_uint_eq(found, second);
    ck_assert_int_eq(kvp_region_find(bed.ledger, bed.pool, 15, longest, &found), KVP_OK);
    ck_assert_uint_eq(found, other);
    ck_assert_int_eq(kvp_region_find(bed.ledger, bed.pool, 1, "kv/1", &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_find(bed.ledger, bed.pool, 0, "kv", &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_find(bed.ledger, bed.pool, 0, "", &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_pool_get(bed.ledger, bed.pool, &pool), KVP_OK);
    ck_assert(pool.regions == 3 && pool.region_bytes == 1024);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(what_can_not_be_a_region_is_refused)
{
    struct ledger_bed bed;
    char long_name[KVP_NAME_BYTES_MAX + 2] = {0};
    struct kvp_region_spec spec;
    uint64_t missing = 9;
    uint32_t region;
    memset(long_name, 'n', sizeof(long_name) - 1);
    const struct kvp_region_spec wrong[] = {
        {NULL, 0, 7, 8, 1},         {"", 0, 7, 8, 1},
        {long_name, 0, 7, 8, 1},    {"r", KVP_GPUS_MAX, 7, 8, 1},
        {"r", 0, 7, 0, 1},          {"r", 0, 7, 8, 0},
        {"r", 0, 7, 8, 12},         {"r", 0, 7, KVP_REGION_BYTES_MAX + 1, 1},
        {"r", 0, 7, 8, 1ull << 47},
    };
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &wrong[i], &region, &missing), KVP_EINVAL);
    spec = (struct kvp_region_spec){"r", 0, 7, 8, 1};
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_OK);
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_EEXIST);
    ck_assert_uint_eq(missing, 9);
    bed.pool.generation++;
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_find(bed.ledger, bed.pool, 0, "r", &region), KVP_ENOENT);
    ck_assert_uint_eq(kvp_region_first(bed.ledger, bed.pool), KVP_NONE);
    ck_assert_int_eq(kvp_region_map(bed.ledger, 1, bed.attachment), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_map(bed.ledger, KVP_REGIONS_MAX, bed.attachment), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_map(bed.ledger, 0, bed.attachment + 1), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_map(bed.ledger, 0, KVP_ATTACHMENTS_MAX), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_unmap(bed.ledger, 0, KVP_ATTACHMENTS_MAX), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, 1), KVP_ENOENT);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_region_takes_the_first_gap_that_is_large_enough)
{
    struct ledger_bed bed;
    struct kvp_region_spec spec = {"big", 0, 7, 400, 32};
    uint64_t missing;
    uint32_t region;
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    uint32_t a = make(&bed, "a", 0, 256, 32), b = make(&bed, "b", 0, 250, 32), c = make(&bed, "c", 0, 200, 32);
    ck_assert(view_of(&bed, a).offset == 0 && view_of(&bed, b).offset == 256 && view_of(&bed, c).offset == 512);
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_ELIMIT);
    ck_assert_uint_eq(missing, 400 - (1024 - 736)); /* c ends at 712; the next place is 736 */
    ck_assert_int_eq(kvp_region_drop(bed.ledger, b), KVP_OK);
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_ELIMIT);
    ck_assert_uint_eq(missing, 400 - (1024 - 736));
    ck_assert_uint_eq(view_of(&bed, make(&bed, "d", 0, 128, 32)).offset, 256);
    ck_assert_uint_eq(view_of(&bed, make(&bed, "e", 0, 129, 32)).offset, 736);
    ck_assert_uint_eq(view_of(&bed, make(&bed, "f", 0, 128, 32)).offset, 384);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, a), KVP_OK);
    ck_assert_uint_eq(view_of(&bed, make(&bed, "g", 0, 256, 32)).offset, 0);
    spec.bytes = 1025;
    spec.rank = 3;
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_ELIMIT);
    ck_assert_uint_eq(missing, 1);
    const char *order = "gdfce";
    for (region = kvp_region_first(bed.ledger, bed.pool); region != KVP_NONE;
         region = kvp_region_next(bed.ledger, region))
        ck_assert_int_eq(view_of(&bed, region).name[0], *order++);
    ck_assert_int_eq(*order, '\0');
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(the_table_of_regions_is_full_at_its_limit)
{
    struct ledger_bed bed;
    struct kvp_region_spec spec = {"one more", 0, 7, 1, 1};
    uint64_t missing = 9;
    uint32_t region;
    char name[16];
    ledger_bed_make(&bed, small, false);
    for (uint32_t i = 0; i < KVP_REGIONS_MAX; i++) {
        snprintf(name, sizeof(name), "r%u", i);
        kvp_txn_begin(bed.ledger);
        ck_assert_uint_eq(make(&bed, name, i / 1024, 1, 1), i);
        kvp_txn_commit(bed.ledger);
    }
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    spec.rank = 4;
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_ELIMIT);
    ck_assert_uint_eq(missing, 0);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, 77), KVP_OK);
    ck_assert_int_eq(kvp_region_make(bed.ledger, bed.pool, &spec, &region, &missing), KVP_OK);
    ck_assert_uint_eq(region, 77);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_region_that_is_mapped_is_not_dropped)
{
    struct ledger_bed bed;
    struct kvp_session_id other;
    ledger_bed_make(&bed, small, false);
    uint32_t second = ledger_bed_attach(&bed, &other);
    kvp_txn_begin(bed.ledger);
    uint32_t region = make(&bed, "r", 0, 8, 8);
    ck_assert_int_eq(kvp_region_map(bed.ledger, region, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_region_map(bed.ledger, region, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_region_map(bed.ledger, region, second), KVP_OK);
    ck_assert_uint_eq(view_of(&bed, region).mapped, 2);
    ck_assert(kvp_region_mapped_by(bed.ledger, region, second) && !kvp_region_mapped_by(bed.ledger, region, 200));
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_EBUSY);
    ck_assert_int_eq(kvp_region_unmap(bed.ledger, region, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_region_unmap(bed.ledger, region, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_EBUSY);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, second), KVP_OK);
    ck_assert_uint_eq(view_of(&bed, region).mapped, 0);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_dead_attachment_has_its_regions_mapped_until_it_is_released)
{
    struct ledger_bed bed;
    uint32_t left;
    ledger_bed_make(&bed, small, true);
    kvp_txn_begin(bed.ledger);
    uint32_t region = make(&bed, "r", 0, 8, 8), kept = make(&bed, "s", 0, 8, 8);
    ck_assert_int_eq(kvp_region_map(bed.ledger, region, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_region_map(bed.ledger, kept, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_session_end(bed.ledger, bed.session), KVP_OK);
    ck_assert_int_eq(kvp_region_map(bed.ledger, region, bed.attachment), KVP_ESESSION);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_EBUSY);
    ck_assert_int_eq(kvp_region_unmap(bed.ledger, region, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, bed.attachment, true, 9, &left), KVP_OK);
    ck_assert_uint_eq(view_of(&bed, kept).mapped, 0);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_pool_with_regions_is_deleted_when_they_are_dropped_or_it_is_lost)
{
    struct ledger_bed bed;
    struct kvp_region_view view;
    struct kvp_pool_id again;
    struct kvp_pool_spec spec = {.geometry = small, .name = "again", .region_bytes = 64};
    ledger_bed_make(&bed, small, false);
    kvp_txn_begin(bed.ledger);
    uint32_t region = make(&bed, "r", 0, 8, 8);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_EBUSY);
    kvp_txn_commit(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_OK);
    kvp_txn_abort(bed.ledger);
    ck_assert_uint_eq(view_of(&bed, region).bytes, 8);
    kvp_txn_begin(bed.ledger);
    make(&bed, "s", 1, 8, 8);
    ck_assert_int_eq(kvp_pool_set_lost(bed.ledger, bed.pool), KVP_OK);
    ck_assert_uint_eq(make(&bed, "t", 0, 8, 8), KVP_NONE);
    ck_assert_int_eq(kvp_region_map(bed.ledger, region, 0), KVP_ELOST);
    ck_assert_int_eq(kvp_region_drop(bed.ledger, region), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_OK);
    kvp_txn_commit(bed.ledger);
    for (uint32_t i = 0; i < KVP_REGIONS_MAX; i++)
        ck_assert_int_eq(kvp_region_get(bed.ledger, i, &view), KVP_ENOENT);
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    spec.region_bytes = KVP_REGION_BYTES_MAX + 1;
    ck_assert_int_eq(kvp_pool_create(bed.ledger, &spec, &again), KVP_EINVAL);
    spec.region_bytes = KVP_REGION_BYTES_MAX;
    ck_assert_int_eq(kvp_pool_create(bed.ledger, &spec, &again), KVP_OK);
    ck_assert_uint_eq(again.slot, bed.pool.slot);
    ck_assert_uint_eq(kvp_region_first(bed.ledger, again), KVP_NONE);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

LEDGER_SUITE("ledger_regions", a_region_keeps_its_name_rank_tenant_and_place, what_can_not_be_a_region_is_refused,
             a_region_takes_the_first_gap_that_is_large_enough, the_table_of_regions_is_full_at_its_limit,
             a_region_that_is_mapped_is_not_dropped, a_dead_attachment_has_its_regions_mapped_until_it_is_released,
             a_pool_with_regions_is_deleted_when_they_are_dropped_or_it_is_lost)
