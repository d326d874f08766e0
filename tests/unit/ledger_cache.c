/**
 * The prefix cache in the ledger: publishing, finding, the order of eviction, tenants' shares, pins.
 *
 * Pools here are of policy lru, in which every victim is known. A story is told by letters, one a block, the last one for
 * all that follow: "ab" has its first block in common with "a". tests/model compares all of it with a naive cache.
 */
#include "internal.h"
#include "ledger_block.h"

#include <string.h>

#define TOKENS 4 /* of a page */

static const struct kvp_after none = {0};

static void make(struct ledger_bed *bed, uint32_t pages)
{
    struct kvp_pool_spec spec = {
        .geometry = {pages, TOKENS, 0, 16, 32, 0}, .policy = KVP_POLICY_LRU, .zero_on_reuse = true, .name = "lru"};
    ledger_bed_make(bed, (struct kvp_pool_geometry){1, 1, 0, 1, 1, 0}, false);
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_pool_create(bed->ledger, &spec, &bed->pool), KVP_OK);
    ck_assert_int_eq(kvp_attach(bed->ledger, bed->pool, bed->session, KVP_NONE, &bed->attachment), KVP_OK);
    kvp_txn_commit(bed->ledger);
}

/* The session of another tenant, attached. */
static uint32_t attach_tenant(struct ledger_bed *bed, uint32_t tenant)
{
    struct kvp_session_spec spec = {.kind = KVP_SESSION_SOCKET, .pid = 101, .tenant = tenant, .name = "other"};
    struct kvp_session_id session;
    uint32_t attachment = KVP_NONE;
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_session_open(bed->ledger, &spec, &session), KVP_OK);
    ck_assert_int_eq(kvp_attach(bed->ledger, bed->pool, session, KVP_NONE, &attachment), KVP_OK);
    kvp_txn_commit(bed->ledger);
    return attachment;
}

/* Keys of the first blocks: block i is told by the story's letter i, or its last. */
static void keys_of(const char *story, size_t blocks, struct kvp_block_key *keys)
{
    uint64_t x = 0;
    size_t letters = strlen(story);
    for (size_t i = 0; i < blocks; i++) {
        x = (x ^ (unsigned char)story[i < letters ? i : letters - 1]) * 0x9e3779b97f4a7c15ull;
        x ^= x >> 29;
        keys[i] = (struct kvp_block_key){{x * 0xbf58476d1ce4e5b9ull, x}};
    }
}

/* A sequence of a story, with what is known of it taken along. */
static struct kvp_seq_id open_story(struct ledger_bed *bed, uint32_t attachment, uint64_t key, const char *story,
                                    size_t blocks, size_t *ret_found)
{
    struct kvp_block_key keys[32] = {{{0}}};
    struct kvp_seq_id seq = {0};
    keys_of(story, blocks, keys);
    ck_assert_int_eq(kvp_seq_open_cached(bed->ledger, bed->pool, attachment, key, false, blocks, keys, &seq, ret_found),
                     KVP_OK);
    return seq;
}

static enum kvp_status write_story(struct ledger_bed *bed, struct kvp_seq_id seq, const char *story, size_t blocks,
                                   uint32_t *reterr_short)
{
    struct kvp_block_key keys[32] = {{{0}}};
    size_t block;
    bool changed;
    keys_of(story, blocks, keys);
    TRY(kvp_seq_reserve(bed->ledger, bed->pool, seq, (uint32_t)blocks * TOKENS, false, none, reterr_short));
    TRY(kvp_seq_set_keys(bed->ledger, bed->pool, seq, 0, blocks, keys, &block));
    return kvp_seq_observe(bed->ledger, bed->pool, seq, (uint32_t)blocks * TOKENS, &changed);
}

static void close_seq(struct ledger_bed *bed, struct kvp_seq_id seq)
{
    bool more;
    ck_assert_int_eq(kvp_seq_close(bed->ledger, bed->pool, seq, none), KVP_OK);
    ck_assert_int_eq(kvp_pool_reclaim(bed->ledger, bed->pool, 1000, &more), KVP_OK);
}

/* A whole request: open, write, close. @return the blocks found */
static size_t request(struct ledger_bed *bed, uint32_t attachment, const char *story, size_t blocks)
{
    size_t found = 0;
    uint32_t short_pages = 0;
    kvp_txn_begin(bed->ledger);
    struct kvp_seq_id seq = open_story(bed, attachment, 99, story, blocks, &found);
    ck_assert_int_eq(write_story(bed, seq, story, blocks, &short_pages), KVP_OK);
    close_seq(bed, seq);
    kvp_txn_commit(bed->ledger);
    ledger_block_assert_clean(bed->ledger);
    return found;
}

static size_t known(const struct ledger_bed *bed, uint32_t tenant, const char *story, size_t blocks)
{
    struct kvp_block_key keys[32] = {{{0}}};
    size_t found = 0;
    keys_of(story, blocks, keys);
    ck_assert_int_eq(kvp_cache_match(bed->ledger, bed->pool, tenant, blocks, keys, &found, NULL), KVP_OK);
    return found;
}

static struct kvp_pool_view view_of(const struct ledger_bed *bed)
{
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_get(bed->ledger, bed->pool, &view), KVP_OK);
    return view;
}

START_TEST(what_one_sequence_wrote_the_next_one_finds)
{
    struct ledger_bed bed;
    make(&bed, 16);
    ck_assert_uint_eq(request(&bed, bed.attachment, "a", 5), 0);
    ck_assert_uint_eq(view_of(&bed).cache.cached_pages, 5);
    ck_assert_uint_eq(known(&bed, 0, "a", 7), 5);
    ck_assert_uint_eq(request(&bed, bed.attachment, "a", 7), 5);
    ck_assert_uint_eq(request(&bed, bed.attachment, "aab", 6), 2);
    ck_assert_uint_eq(known(&bed, 7, "a", 7), 0);
    ck_assert_uint_eq(view_of(&bed).cache.lookup_blocks, 18);
    ck_assert_uint_eq(view_of(&bed).cache.hit_blocks, 7);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_page_counts_only_when_it_is_written_and_has_a_key)
{
    struct ledger_bed bed;
    struct kvp_block_key keys[32] = {{{0}}};
    uint32_t short_pages;
    size_t found, block = 9;
    bool changed;
    make(&bed, 16);
    keys_of("a", 4, keys);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = open_story(&bed, bed.attachment, 1, "a", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 14, false, none, &short_pages), KVP_OK);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, seq, 0, 4, keys, &block), KVP_EINVAL);
    ck_assert_uint_eq(block, 3);
    kvp_txn_abort(bed.ledger);
    kvp_txn_begin(bed.ledger);
    seq = open_story(&bed, bed.attachment, 1, "a", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 14, false, none, &short_pages), KVP_OK);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, seq, 0, 2, keys, &block), KVP_OK);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 0);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, 13, &changed), KVP_OK);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 2);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, seq, 2, 1, keys + 2, &block), KVP_OK);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 3);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, seq, 0, 3, keys, &block), KVP_OK);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, seq, 1, 1, keys, &block), KVP_EMISMATCH);
    close_seq(&bed, seq);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(view_of(&bed).cache.cached_pages, 3);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 13);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(of_two_writers_of_a_block_one_page_stays)
{
    struct ledger_bed bed;
    uint32_t short_pages;
    size_t found;
    make(&bed, 16);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id first = open_story(&bed, bed.attachment, 1, "a", 3, &found);
    struct kvp_seq_id second = open_story(&bed, bed.attachment, 2, "a", 3, &found);
    ck_assert_int_eq(write_story(&bed, first, "a", 3, &short_pages), KVP_OK);
    ck_assert_int_eq(write_story(&bed, second, "a", 3, &short_pages), KVP_OK);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 10);
    close_seq(&bed, second);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 13);
    close_seq(&bed, first);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 13);
    ck_assert_uint_eq(known(&bed, 0, "a", 3), 3);
    ledger_bed_end(&bed);
}
END_TEST

/* One that wrote three blocks which another had written before it, and whose pages are evicted. */
static struct kvp_seq_id second_writer(struct ledger_bed *bed)
{
    uint32_t short_pages, evicted;
    size_t found;
    bool more;
    struct kvp_seq_id first = open_story(bed, bed->attachment, 1, "a", 3, &found);
    struct kvp_seq_id second = open_story(bed, bed->attachment, 2, "a", 3, &found);
    ck_assert_int_eq(write_story(bed, first, "a", 3, &short_pages), KVP_OK);
    ck_assert_int_eq(write_story(bed, second, "a", 3, &short_pages), KVP_OK);
    close_seq(bed, first);
    ck_assert_int_eq(kvp_cache_evict(bed->ledger, bed->pool, KVP_NONE, 10, &evicted, &more), KVP_OK);
    ck_assert_uint_eq(evicted, 3);
    return second;
}

START_TEST(a_second_writers_pages_are_published_when_the_first_ones_are_gone)
{
    struct ledger_bed bed;
    uint32_t short_pages;
    make(&bed, 16);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id second = second_writer(&bed);
    ck_assert_uint_eq(known(&bed, 0, "a", 3), 0);
    ck_assert_int_eq(write_story(&bed, second, "a", 4, &short_pages), KVP_OK);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 4);
    close_seq(&bed, second);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(view_of(&bed).cache.cached_pages, 4);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_key_that_a_row_has_twice_is_published_once_when_the_first_ones_are_gone)
{
    struct ledger_bed bed;
    struct kvp_block_key keys[4];
    uint32_t short_pages, evicted, pages[4];
    size_t found, block;
    bool more, changed;
    make(&bed, 16);
    keys_of("abc", 4, keys);
    keys[3] = keys[2];
    keys[2] = keys[1]; /* a b b c: an engine may name its blocks so */
    ck_assert_uint_eq(request(&bed, bed.attachment, "ab", 2), 0);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = open_story(&bed, bed.attachment, 1, "ab", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 4 * TOKENS, false, none, &short_pages), KVP_OK);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, seq, 0, 4, keys, &block), KVP_OK);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, 3 * TOKENS, &changed), KVP_OK);
    ck_assert_int_eq(kvp_cache_evict(bed.ledger, bed.pool, KVP_NONE, 10, &evicted, &more), KVP_OK);
    ck_assert_uint_eq(evicted, 2);
    ck_assert_int_eq(kvp_seq_observe(bed.ledger, bed.pool, seq, 4 * TOKENS, &changed), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ledger_block_assert_clean(bed.ledger);
    ck_assert_int_eq(kvp_cache_match(bed.ledger, bed.pool, 0, 4, keys, &found, pages), KVP_OK);
    ck_assert_uint_eq(found, 4);
    ck_assert_uint_eq(pages[1], pages[2]);
    kvp_txn_begin(bed.ledger);
    close_seq(&bed, seq);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(view_of(&bed).cache.cached_pages, 3);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_second_writers_pages_are_published_when_they_are_named_again)
{
    struct ledger_bed bed;
    struct kvp_block_key keys[3];
    size_t block;
    make(&bed, 16);
    keys_of("a", 3, keys);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id second = second_writer(&bed);
    ck_assert_int_eq(kvp_seq_set_keys(bed.ledger, bed.pool, second, 2, 1, &keys[2], &block), KVP_OK);
    ck_assert_uint_eq(known(&bed, 0, "a", 3), 3);
    close_seq(&bed, second);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(view_of(&bed).cache.cached_pages, 3);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_page_that_is_extended_stays_and_leaves_after_what_extends_it)
{
    struct ledger_bed bed;
    uint32_t short_pages, evicted;
    size_t found;
    bool more;
    make(&bed, 16);
    kvp_txn_begin(bed.ledger);
    /* The first writer lets go of the published first page; the second one goes on behind its own copy of it. */
    struct kvp_seq_id first = open_story(&bed, bed.attachment, 1, "a", 1, &found);
    struct kvp_seq_id second = open_story(&bed, bed.attachment, 2, "a", 1, &found);
    ck_assert_int_eq(write_story(&bed, first, "a", 1, &short_pages), KVP_OK);
    ck_assert_int_eq(write_story(&bed, second, "a", 3, &short_pages), KVP_OK);
    close_seq(&bed, first);
    ck_assert_int_eq(kvp_cache_evict(bed.ledger, bed.pool, KVP_NONE, 10, &evicted, &more), KVP_OK);
    ck_assert_uint_eq(evicted, 0);
    close_seq(&bed, second);
    kvp_txn_commit(bed.ledger);
    ledger_block_assert_clean(bed.ledger);
    for (uint32_t left = 3; left > 0; left--) {
        ck_assert_uint_eq(known(&bed, 0, "a", 3), left);
        kvp_txn_begin(bed.ledger);
        ck_assert_int_eq(kvp_cache_evict(bed.ledger, bed.pool, KVP_NONE, 1, &evicted, &more), KVP_OK);
        kvp_txn_commit(bed.ledger);
        ck_assert_uint_eq(evicted, 1);
        ledger_block_assert_clean(bed.ledger);
    }
    ck_assert_uint_eq(known(&bed, 0, "a", 3), 0);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(the_least_recently_used_chain_leaves_first_from_its_end)
{
    struct ledger_bed bed;
    make(&bed, 10);
    request(&bed, bed.attachment, "a", 4);
    request(&bed, bed.attachment, "b", 4);
    request(&bed, bed.attachment, "a", 2);
    ck_assert_uint_eq(request(&bed, bed.attachment, "c", 3), 0);
    /* 2 were free: one of a's end leaves, which was used longer ago than b. */
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 3);
    ck_assert_uint_eq(known(&bed, 0, "b", 4), 4);
    request(&bed, bed.attachment, "d", 2);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 2);
    ck_assert_uint_eq(known(&bed, 0, "b", 4), 3);
    request(&bed, bed.attachment, "e", 4);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 1);
    ck_assert_uint_eq(known(&bed, 0, "b", 4), 0);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(reserving_evicts_all_that_it_needs_or_changes_nothing)
{
    struct ledger_bed bed;
    uint32_t short_pages = 0;
    size_t found;
    make(&bed, 10);
    request(&bed, bed.attachment, "a", 6);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id holder = open_story(&bed, bed.attachment, 1, "a", 2, &found);
    ck_assert_uint_eq(found, 2);
    struct kvp_seq_id seq = open_story(&bed, bed.attachment, 2, "b", 0, &found);
    kvp_txn_commit(bed.ledger);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 11 * TOKENS, false, none, &short_pages), KVP_ENOPAGES);
    ck_assert_uint_eq(short_pages, 3);
    kvp_txn_abort(bed.ledger);
    ck_assert_uint_eq(known(&bed, 0, "a", 6), 6);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 8 * TOKENS, false, none, &short_pages), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(known(&bed, 0, "a", 6), 2);
    kvp_txn_begin(bed.ledger);
    close_seq(&bed, holder);
    kvp_txn_commit(bed.ledger);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(cutting_into_a_published_page_owes_a_copy)
{
    struct ledger_bed bed;
    uint32_t short_pages;
    size_t found;
    make(&bed, 8);
    request(&bed, bed.attachment, "a", 3);
    kvp_txn_begin(bed.ledger);
    struct kvp_seq_id seq = open_story(&bed, bed.attachment, 1, "a", 3, &found);
    uint32_t last = kvp_seq_row(bed.ledger, bed.pool, seq.slot)[2];
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 2 * TOKENS + 1, true, none, &short_pages), KVP_OK);
    struct kvp_seq_view view = ledger_bed_view(&bed, seq);
    ck_assert_uint_eq(view.copy.source, last);
    ck_assert_uint_eq(view.copy.tokens, 1);
    ck_assert_uint_eq(view.keyed, 2);
    close_seq(&bed, seq);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(known(&bed, 0, "a", 3), 3);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_tenant_finds_its_own_pages_alone_and_gets_others_dirty)
{
    struct ledger_bed bed;
    struct kvp_seq_id seq;
    uint32_t short_pages;
    size_t found;
    make(&bed, 4);
    uint32_t other = attach_tenant(&bed, 7);
    request(&bed, bed.attachment, "a", 4);
    kvp_txn_begin(bed.ledger);
    seq = open_story(&bed, other, 1, "a", 4, &found);
    ck_assert_uint_eq(found, 0);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 2 * TOKENS, false, none, &short_pages), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 2);
    ck_assert_uint_eq(view_of(&bed).cache.dirty_pages, 2);
    uint32_t page = kvp_seq_row(bed.ledger, bed.pool, seq.slot)[0];
    ck_assert(ledger_bed_page(&bed, page).dirty);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_page_cleaned(bed.ledger, bed.pool, page), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(view_of(&bed).cache.dirty_pages, 1);
    kvp_txn_begin(bed.ledger);
    close_seq(&bed, seq);
    /* Given back without having been zeroed, it is dirty for its first tenant too. */
    seq = open_story(&bed, bed.attachment, 2, "b", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 2 * TOKENS, false, none, &short_pages), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(view_of(&bed).cache.dirty_pages, 2);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_quota_bounds_a_tenant_and_a_guaranteed_share_protects_it)
{
    struct ledger_bed bed;
    struct kvp_seq_id seq;
    uint32_t short_pages = 0;
    size_t found;
    make(&bed, 12);
    uint32_t other = attach_tenant(&bed, 7);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_tenant_set(bed.ledger, bed.pool, 7, 6, 3), KVP_OK);
    ck_assert_int_eq(kvp_tenant_set(bed.ledger, bed.pool, 0, 0, 10), KVP_EINVAL);
    ck_assert_int_eq(kvp_tenant_set(bed.ledger, bed.pool, 7, 2, 3), KVP_EINVAL);
    kvp_txn_commit(bed.ledger);
    request(&bed, other, "a", 4);
    request(&bed, other, "b", 4);
    /* 8 pages, but 6 at most: the end of the older one was evicted, though 6 more are free. */
    ck_assert_uint_eq(known(&bed, 7, "a", 4), 2);
    ck_assert_uint_eq(known(&bed, 7, "b", 4), 4);
    kvp_txn_begin(bed.ledger);
    seq = open_story(&bed, other, 1, "c", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 7 * TOKENS, false, none, &short_pages), KVP_ENOPAGES);
    ck_assert_uint_eq(short_pages, 1);
    kvp_txn_abort(bed.ledger);
    kvp_txn_begin(bed.ledger);
    seq = open_story(&bed, bed.attachment, 1, "c", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 10 * TOKENS, false, none, &short_pages), KVP_ENOPAGES);
    ck_assert_uint_eq(short_pages, 1);
    kvp_txn_abort(bed.ledger);
    kvp_txn_begin(bed.ledger);
    seq = open_story(&bed, bed.attachment, 1, "c", 0, &found);
    ck_assert_int_eq(kvp_seq_reserve(bed.ledger, bed.pool, seq, 9 * TOKENS, false, none, &short_pages), KVP_OK);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(known(&bed, 7, "a", 4) + known(&bed, 7, "b", 4), 3);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(a_pinned_prefix_is_not_evicted_until_its_pin_ends)
{
    struct ledger_bed bed;
    struct kvp_block_key keys[32] = {{{0}}};
    struct kvp_seq_id pin, again, found_pin;
    struct kvp_pin_view view;
    uint32_t evicted;
    size_t blocks;
    bool more;
    make(&bed, 8);
    request(&bed, bed.attachment, "a", 4);
    keys_of("a", 6, keys);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_pin(bed.ledger, bed.pool, 0, 6, keys, 50, &pin, &blocks), KVP_ENOENT);
    ck_assert_uint_eq(blocks, 4);
    ck_assert_int_eq(kvp_pin(bed.ledger, bed.pool, 0, 2, keys, 50, &pin, &blocks), KVP_OK);
    ck_assert_int_eq(kvp_pin(bed.ledger, bed.pool, 0, 2, keys, 70, &again, &blocks), KVP_OK);
    ck_assert(pin.slot == again.slot && pin.generation == again.generation);
    ck_assert_int_eq(kvp_pin_at(bed.ledger, bed.pool, pin.slot, &view), KVP_OK);
    ck_assert(view.lease_ms == 70 && view.blocks == 2 && view.tenant == 0);
    ck_assert_int_eq(kvp_pin_find(bed.ledger, bed.pool, 0, 3, keys, &found_pin), KVP_ENOENT);
    ck_assert_int_eq(kvp_pin_find(bed.ledger, bed.pool, 0, 2, keys, &found_pin), KVP_OK);
    ck_assert_int_eq(kvp_cache_evict(bed.ledger, bed.pool, KVP_NONE, 10, &evicted, &more), KVP_OK);
    ck_assert_uint_eq(evicted, 2);
    kvp_txn_commit(bed.ledger);
    ledger_block_assert_clean(bed.ledger);
    ck_assert_uint_eq(known(&bed, 0, "a", 4), 2);
    kvp_txn_begin(bed.ledger);
    ck_assert_int_eq(kvp_pin_end(bed.ledger, bed.pool, pin), KVP_OK);
    ck_assert_int_eq(kvp_pin_end(bed.ledger, bed.pool, pin), KVP_ESTALE);
    ck_assert_int_eq(kvp_pool_reclaim(bed.ledger, bed.pool, 10, &more), KVP_OK);
    ck_assert_int_eq(kvp_cache_evict_prefix(bed.ledger, bed.pool, 0, 2, keys, &evicted), KVP_OK);
    ck_assert_uint_eq(evicted, 2);
    kvp_txn_commit(bed.ledger);
    ck_assert_uint_eq(ledger_bed_free_pages(&bed), 8);
    ledger_bed_end(&bed);
}
END_TEST

START_TEST(an_entry_of_the_index_and_its_slots_take_at_most_64_bytes_a_page)
{
    struct ledger_bed bed;
    make(&bed, 1000);
    const struct pool_map *m = pool_at(bed.ledger, bed.pool.slot);
    ck_assert_uint_le(((const unsigned char *)m->policy - (const unsigned char *)m->entries) / 1000, 64);
    ledger_bed_end(&bed);
}
END_TEST

LEDGER_SUITE("ledger_cache", what_one_sequence_wrote_the_next_one_finds,
             a_page_counts_only_when_it_is_written_and_has_a_key, of_two_writers_of_a_block_one_page_stays,
             a_second_writers_pages_are_published_when_the_first_ones_are_gone,
             a_key_that_a_row_has_twice_is_published_once_when_the_first_ones_are_gone,
             a_second_writers_pages_are_published_when_they_are_named_again,
             a_page_that_is_extended_stays_and_leaves_after_what_extends_it,
             the_least_recently_used_chain_leaves_first_from_its_end,
             reserving_evicts_all_that_it_needs_or_changes_nothing, cutting_into_a_published_page_owes_a_copy,
             a_tenant_finds_its_own_pages_alone_and_gets_others_dirty,
             a_quota_bounds_a_tenant_and_a_guaranteed_share_protects_it,
             a_pinned_prefix_is_not_evicted_until_its_pin_ends,
             an_entry_of_the_index_and_its_slots_take_at_most_64_bytes_a_page)
