/**
 * Pools: geometry, extents, names, states, deletion.
 */
#include "layout.h"
#include "ledger_block.h"

#include <string.h>

static const struct kvp_pool_geometry small = {
    .pages = 32, .page_tokens = 4, .reserved_pages = 2, .max_sequences = 8, .row_pages = 8};
static const struct kvp_after none = {0};

static enum kvp_status create(struct kvp_ledger *ledger, const char *name, struct kvp_pool_geometry geometry,
                              struct kvp_pool_id *ret_pool)
{
    struct kvp_pool_spec spec = {.geometry = geometry, .name = name};
    return kvp_pool_create(ledger, &spec, ret_pool);
}

START_TEST(a_pool_keeps_all_that_it_was_made_with)
{
    struct ledger_block block;
    struct kvp_pool_view view;
    struct kvp_pool_id pool = {0}, found = {0};
    char name[KVP_NAME_BYTES_MAX + 1];
    static unsigned char blob[KVP_POOL_BLOB_BYTES];
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    memset(name, 'n', KVP_NAME_BYTES_MAX);
    name[KVP_NAME_BYTES_MAX] = '\0';
    for (size_t i = 0; i < sizeof(blob); i++)
        blob[i] = (unsigned char)(i * 7 + 1);
    struct kvp_pool_spec spec = {.geometry = small,
                                 .needs_after = true,
                                 .layout_digest = {5, 6},
                                 .name = name,
                                 .blob = blob,
                                 .blob_bytes = sizeof(blob) - 3};
    kvp_txn_begin(&block.ledger);
    ck_assert_int_eq(kvp_pool_create(&block.ledger, &spec, &pool), KVP_OK);
    kvp_txn_commit(&block.ledger);
    ck_assert_int_eq(kvp_pool_get(&block.ledger, pool, &view), KVP_OK);
    ck_assert_int_eq(view.state, KVP_POOL_LIVE);
    ck_assert(view.needs_after && view.layout_digest[0] == 5 && view.layout_digest[1] == 6);
    ck_assert_int_eq(memcmp(&view.geometry, &small, sizeof(small)), 0);
    ck_assert_str_eq(view.name, name);
    ck_assert_uint_eq(view.blob_bytes, sizeof(blob) - 3);
    ck_assert_int_eq(memcmp(view.blob, blob, view.blob_bytes), 0);
    ck_assert_uint_eq(view.free_pages, 30);
    ck_assert_uint_eq(view.extent_offset, kvp_ledger_root_bytes());
    ck_assert_int_eq(kvp_pool_by_name(&block.ledger, name, &found), KVP_OK);
    ck_assert_uint_eq(found.generation, pool.generation);
    ck_assert_int_eq(kvp_pool_by_name(&block.ledger, "other", &found), KVP_ENOENT);
    ck_assert_int_eq(kvp_pool_at(&block.ledger, pool.slot, &view), KVP_OK);
    ck_assert_int_eq(kvp_pool_at(&block.ledger, 1, &view), KVP_ENOENT);
    ck_assert_int_eq(kvp_pool_at(&block.ledger, KVP_POOLS_MAX, &view), KVP_ENOENT);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(a_geometry_out_of_range_is_refused)
{
    struct ledger_block block;
    struct kvp_pool_id pool;
    uint64_t offset, bytes;
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    const struct kvp_pool_geometry bad[] = {
        {0, 4, 0, 8, 8, 0},
        {KVP_PAGES_MAX + 1, 4, 0, 8, 8, 0},
        {32, 0, 0, 8, 8, 0},
        {32, KVP_PAGE_TOKENS_MAX + 1, 0, 8, 8, 0},
        {32, 4, 32, 8, 8, 0},
        {32, 4, 0, 0, 8, 0},
        {32, 4, 0, KVP_SEQUENCES_MAX + 1, 8, 0},
        {32, 4, 0, 8, 0, 0},
        {32, 4, 0, 8, KVP_SEQUENCE_TOKENS_MAX + 1, 0},
        {32, 4, 0, 8, 8, 2},
    };
    kvp_txn_begin(&block.ledger);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        ck_assert_int_eq(kvp_pool_extent(&block.ledger, &bad[i], &offset, &bytes), KVP_EINVAL);
        ck_assert_int_eq(create(&block.ledger, "p", bad[i], &pool), KVP_EINVAL);
    }
    struct kvp_pool_geometry large = {32, 4, 0, KVP_SEQUENCES_MAX, KVP_SEQUENCE_TOKENS_MAX, 1};
    ck_assert_int_eq(kvp_pool_extent(&block.ledger, &large, &offset, &bytes), KVP_ELIMIT);
    kvp_txn_commit(&block.ledger);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(a_name_or_description_out_of_range_or_taken_is_refused)
{
    struct ledger_block block;
    struct kvp_pool_id pool;
    char name[KVP_NAME_BYTES_MAX + 2] = {0};
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    memset(name, 'n', sizeof(name) - 1);
    kvp_txn_begin(&block.ledger);
    ck_assert_int_eq(create(&block.ledger, NULL, small, &pool), KVP_EINVAL);
    ck_assert_int_eq(create(&block.ledger, "", small, &pool), KVP_EINVAL);
    ck_assert_int_eq(create(&block.ledger, name, small, &pool), KVP_EINVAL);
    struct kvp_pool_spec spec = {.geometry = small, .name = "p", .blob = name, .blob_bytes = KVP_POOL_BLOB_BYTES + 1};
    ck_assert_int_eq(kvp_pool_create(&block.ledger, &spec, &pool), KVP_EINVAL);
    ck_assert_int_eq(create(&block.ledger, "p", small, &pool), KVP_OK);
    ck_assert_int_eq(create(&block.ledger, "p", small, &pool), KVP_EEXIST);
    kvp_txn_commit(&block.ledger);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(extents_are_placed_first_fit_and_never_overlap)
{
    struct ledger_block block;
    struct kvp_pool_id pools[4] = {{0}}, next;
    struct kvp_pool_view views[4];
    uint64_t offset, bytes;
    const char *names[] = {"a", "b", "c", "d"};
    ledger_block_open(&block, kvp_ledger_root_bytes() + (1u << 20));
    uint32_t made = 0;
    kvp_txn_begin(&block.ledger);
    for (; made < 4; made++) {
        ck_assert_int_eq(kvp_pool_extent(&block.ledger, &small, &offset, &bytes), KVP_OK);
        ck_assert_uint_eq(offset % 4096, 0);
        ck_assert_uint_eq(bytes % 4096, 0);
        ck_assert_int_eq(create(&block.ledger, names[made], small, &pools[made]), KVP_OK);
        ck_assert_int_eq(kvp_pool_get(&block.ledger, pools[made], &views[made]), KVP_OK);
        ck_assert(views[made].extent_offset == offset && views[made].extent_bytes == bytes);
        if (made > 0)
            ck_assert_uint_eq(offset, views[made - 1].extent_offset + views[made - 1].extent_bytes);
    }
    kvp_txn_commit(&block.ledger);
    kvp_txn_begin(&block.ledger);
    ck_assert_int_eq(kvp_pool_delete(&block.ledger, pools[1]), KVP_OK);
    kvp_txn_commit(&block.ledger);
    struct kvp_pool_geometry wide = small;
    wide.pages = 2000;
    ck_assert_int_eq(kvp_pool_extent(&block.ledger, &wide, &offset, &bytes), KVP_OK);
    ck_assert_uint_eq(offset, views[3].extent_offset + views[3].extent_bytes);
    kvp_txn_begin(&block.ledger);
    ck_assert_int_eq(create(&block.ledger, "e", small, &next), KVP_OK);
    kvp_txn_commit(&block.ledger);
    ck_assert_uint_eq(next.slot, pools[1].slot);
    ck_assert_uint_ne(next.generation, pools[1].generation);
    ck_assert_int_eq(kvp_pool_get(&block.ledger, next, &views[0]), KVP_OK);
    ck_assert_uint_eq(views[0].extent_offset, views[1].extent_offset);
    ck_assert_int_eq(kvp_pool_get(&block.ledger, pools[1], &views[0]), KVP_ENOENT);
    struct kvp_pool_geometry large = small;
    large.pages = 64u << 10;
    ck_assert_int_eq(kvp_pool_extent(&block.ledger, &large, &offset, &bytes), KVP_ELIMIT);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(pools_are_refused_beyond_their_limit)
{
    struct ledger_block block;
    struct kvp_pool_id pool;
    struct kvp_pool_geometry tiny = {1, 1, 0, 1, 1, 0};
    ledger_block_open(&block, kvp_ledger_root_bytes() + (4u << 20));
    kvp_txn_begin(&block.ledger);
    for (int i = 0; i <= KVP_POOLS_MAX; i++) {
        char name[4] = {(char)('a' + i / 10), (char)('0' + i % 10), 0, 0};
        ck_assert_int_eq(create(&block.ledger, name, tiny, &pool), i < KVP_POOLS_MAX ? KVP_OK : KVP_ELIMIT);
    }
    kvp_txn_commit(&block.ledger);
    ledger_block_assert_clean(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(making_the_largest_pool_touches_none_of_its_pages)
{
    struct ledger_block block;
    struct kvp_pool_id pool;
    struct kvp_pool_geometry large = {KVP_PAGES_MAX, 16, 0, 16, 64, 0};
    ledger_block_open(&block, kvp_ledger_root_bytes() + (2560ull << 20));
    kvp_txn_begin(&block.ledger);
    ck_assert_int_eq(create(&block.ledger, "large", large, &pool), KVP_OK);
    ck_assert_uint_lt(block.ledger.txn_stores, 64);
    kvp_txn_commit(&block.ledger);
    ledger_block_close(&block);
}
END_TEST

START_TEST(a_pool_is_deleted_when_nothing_is_attached_open_retiring_or_in_hand)
{
    struct ledger_bed bed;
    struct kvp_job_id job;
    bool more;
    ledger_bed_make(&bed, small, false);
    struct kvp_job_spec spec = {.pool = bed.pool};
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_EBUSY);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 8);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, none), KVP_OK);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_EBUSY);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 9, &more), KVP_OK);
    ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &job), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_EBUSY);
    ck_assert_int_eq(kvp_job_close(bed.ledger, job, true), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_OK);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_ENOENT);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_lost_pool_lets_go_and_refuses_everything_else)
{
    struct ledger_bed bed;
    struct kvp_session_id other;
    struct kvp_seq_id child;
    struct kvp_job_id job, refused;
    uint32_t short_pages, attachment, left;
    bool flag;
    ledger_bed_make(&bed, small, true);
    uint32_t second = ledger_bed_attach(&bed, &other);
    struct kvp_job_spec spec = {.pool = bed.pool};
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = ledger_bed_seq(&bed, bed.attachment, 1, 8, 8);
    struct kvp_seq_id dead = ledger_bed_seq(&bed, second, 1, 8, 2);
    ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &job), KVP_OK);
    ck_assert_int_eq(kvp_job_add(bed.ledger, job, dead, 8), KVP_OK);
    ck_assert_int_eq(kvp_session_end(bed.ledger, other), KVP_OK);
    ck_assert_int_eq(kvp_pool_set_lost(bed.ledger, bed.pool), KVP_OK);
    ck_assert_int_eq(kvp_pool_set_lost(bed.ledger, bed.pool), KVP_OK);
    ck_assert_int_eq(kvp_seq_open(bed.ledger, bed.pool, bed.attachment, 2, false, &child), KVP_ELOST);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 9, false, none, &short_pages), KVP_ELOST);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, 9, &flag), KVP_ELOST);
    ck_assert_int_eq(kvp_seq_set_pending(bed.ledger, bed.pool, seq, 8, (struct kvp_after){1, 1}), KVP_ELOST);
    ck_assert_int_eq(kvp_seq_fork(bed.ledger, bed.pool, seq, bed.attachment, 2, 4, &child, &short_pages), KVP_ELOST);
    ck_assert_int_eq(kvp_seq_transfer(bed.ledger, bed.pool, seq, bed.attachment), KVP_ELOST);
    ck_assert_int_eq(kvp_attach(bed.ledger, bed.pool, bed.session, KVP_NONE, &attachment), KVP_ELOST);
    ck_assert_int_eq(kvp_job_open(bed.ledger, &spec, &refused), KVP_ELOST);
    ck_assert_int_eq(kvp_job_add(bed.ledger, job, seq, 8), KVP_ELOST);
    ck_assert_int_eq(kvp_job_close(bed.ledger, job, true), KVP_OK);
    ck_assert_uint_eq(ledger_bed_view(&bed, dead).written, 2);
    ck_assert_int_eq(kvp_seq_close(bed.ledger, bed.pool, seq, none), KVP_OK);
    ck_assert_int_eq(kvp_detach(bed.ledger, bed.pool, bed.attachment), KVP_OK);
    ck_assert_int_eq(kvp_attachment_release(bed.ledger, bed.pool, second, true, 9, &left), KVP_OK);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 99, &flag), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_block_assert_clean(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_pool_delete(bed.ledger, bed.pool), KVP_OK);
    ck_assert_int_eq(kvp_pool_set_lost(bed.ledger, bed.pool), KVP_ENOENT);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

LEDGER_SUITE("ledger_pools", a_pool_keeps_all_that_it_was_made_with, a_geometry_out_of_range_is_refused,
             a_name_or_description_out_of_range_or_taken_is_refused, extents_are_placed_first_fit_and_never_overlap,
             pools_are_refused_beyond_their_limit, making_the_largest_pool_touches_none_of_its_pages,
             a_pool_is_deleted_when_nothing_is_attached_open_retiring_or_in_hand,
             a_lost_pool_lets_go_and_refuses_everything_else)
