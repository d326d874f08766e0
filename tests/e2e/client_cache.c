/**
 * libkvpool's prefix cache against a real daemon: what one client computed is found by another.
 */
#include "client_house.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROMPT 19u /* tokens: 4 pages and a part */

static uint32_t prompt[64];
static struct kvp_client *other;
static struct kvp_pool *theirs;

static void setup(void)
{
    house_open();
    ck_ok(kvp_connect(daemon_.socket, NULL, &other));
    ck_ok(kvp_attach(other, "p", NULL, &theirs));
    for (uint32_t i = 0; i < 64; i++)
        prompt[i] = 1000 + i;
}

static void teardown(void)
{
    uint64_t evicted;

    ck_ok(kvp_detach(theirs));
    kvp_disconnect(other);
    ck_ok(kvp_evict(client, "p", 0, 0, NULL, false, &evicted));
    house_close();
}

static struct kvp_blocks by_tokens(const uint32_t *count)
{
    return (struct kvp_blocks){.counts = count, .tokens = prompt};
}

/* The prompt in a sequence, named, its bytes written in this process. */
static struct kvp_seq write_prompt(void)
{
    uint32_t count = PROMPT, cached = 7;
    struct kvp_blocks blocks = by_tokens(&count);
    uint64_t key = 1;
    struct kvp_seq seq;

    ck_ok(kvp_seq_open_blocks(pool, 1, &key, 0, &blocks, &seq, &cached));
    ck_assert_uint_eq(cached, 0);
    ck_ok(kvp_advance_blocks(pool, 1, &seq, &count, &blocks, NULL, 0, NULL, NULL, NULL));
    write_tokens(pool, seq, 0, PROMPT, 7);
    return seq;
}

START_TEST(a_prompt_that_one_client_wrote_is_taken_along_by_another_with_its_bytes)
{
    struct kvp_seq seq = write_prompt(), found;
    uint32_t count = PROMPT, cached, length;
    struct kvp_blocks blocks = by_tokens(&count);
    uint64_t key = 5;

    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
    ck_ok(kvp_seq_open_blocks(theirs, 1, &key, 0, &blocks, &found, &cached));
    ck_assert_uint_eq(cached, 16);
    ck_ok(kvp_seq_len(theirs, found, &length));
    ck_assert_uint_eq(length, 16);
    check_tokens(theirs, found, 0, 16, 7);
    write_tokens(theirs, found, 16, 3, 7); /* and goes on behind it */
    ck_ok(kvp_seq_len(theirs, found, &length));
    ck_assert_uint_eq(length, PROMPT);
    check_tokens(theirs, found, 0, PROMPT, 7);
    ck_ok(kvp_seq_open_blocks(theirs, 1, &key, 0, &blocks, &found, &cached)); /* a repeat */
    ck_assert_uint_eq(cached, 16);
    ck_ok(kvp_seq_close(theirs, 1, &found, NULL));
}
END_TEST

START_TEST(pages_completed_in_decode_are_named_behind_those_of_the_prompt)
{
    struct kvp_seq seq = write_prompt();
    uint32_t count = 24 - 16, first = 4, reserved = 24, whole = 24, cached;
    struct kvp_blocks more = {.counts = &count, .first = &first, .tokens = prompt + 16}, all = by_tokens(&whole);
    struct kvp_advance *advance;

    ck_ok(kvp_advance_blocks_begin(pool, 1, &seq, &reserved, &more, NULL, 0, &advance));
    ck_ok(kvp_advance_wait(advance, NULL, NULL, NULL));
    ck_ok(kvp_match(other, "p", 1, &all, &cached, 0, NULL));
    ck_assert_uint_eq(cached, 16);
    write_tokens(pool, seq, PROMPT, 5, 7);
    ck_ok(kvp_get_seq_lens(pool, 1, &seq, &cached));
    ck_ok(kvp_match(other, "p", 1, &all, &cached, 0, NULL));
    ck_assert_uint_eq(cached, 24);
    first = 9;
    ck_assert_int_eq(kvp_advance_blocks(pool, 1, &seq, &reserved, &more, NULL, 0, NULL, NULL, NULL), KVP_EINVAL);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "first[0] is page 9, but only the first 6 pages have keys"));
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(match_lists_pages_where_there_is_room_for_them)
{
    struct kvp_seq seq = write_prompt();
    uint32_t count = PROMPT, cached, n;
    struct kvp_blocks blocks = by_tokens(&count);
    int32_t pages[4], row[8];

    ck_ok(kvp_get_seq_lens(pool, 1, &seq, &cached));
    ck_ok(kvp_match(other, "p", 1, &blocks, &cached, 4, pages));
    ck_assert_uint_eq(cached, 16);
    ck_ok(kvp_row(pool, seq, 8, row, &n));
    ck_assert_mem_eq(pages, row, sizeof(pages));
    ck_assert_int_eq(kvp_match(other, "p", 1, &blocks, &cached, 3, pages), KVP_ELIMIT);
    ck_assert_int_eq(kvp_match(other, "nowhere", 1, &blocks, &cached, 0, NULL), KVP_ENOENT);
    ck_assert_int_eq(kvp_match(other, "p", 0, &blocks, &cached, 0, NULL), KVP_EINVAL);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(a_prefix_that_no_message_holds_is_refused_with_both_sizes)
{
    uint32_t count = KVP_MESSAGE_BYTES_MAX / sizeof(uint32_t), cached;
    uint32_t *tokens = calloc(count, sizeof(*tokens));
    struct kvp_blocks blocks = {.counts = &count, .tokens = tokens};

    ck_assert_ptr_nonnull(tokens);
    ck_assert_int_eq(kvp_match(client, "p", 1, &blocks, &cached, 0, NULL), KVP_ELIMIT);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "Match of 67108"));
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "does not fit a message, of 67108864 at most"));
    free(tokens);
}
END_TEST

START_TEST(an_engines_keys_name_pages_too)
{
    unsigned char keys[3 * 32];
    uint32_t count = 3, reserved = 12, cached;
    struct kvp_blocks blocks = {.counts = &count, .keys = keys, .key_bytes = 32};
    struct kvp_seq seq = open_one(pool, 3);

    for (unsigned i = 0; i < sizeof(keys); i++)
        keys[i] = (unsigned char)(i * 7);
    ck_ok(kvp_advance_blocks(pool, 1, &seq, &reserved, &blocks, NULL, 0, NULL, NULL, NULL));
    write_tokens(pool, seq, 0, 12, 9);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
    ck_ok(kvp_match(other, "p", 1, &blocks, &cached, 0, NULL));
    ck_assert_uint_eq(cached, 12);
    blocks.extra = "lora";
    blocks.extra_bytes = 4;
    ck_ok(kvp_match(other, "p", 1, &blocks, &cached, 0, NULL));
    ck_assert_uint_eq(cached, 0);
}
END_TEST

START_TEST(a_pinned_prefix_stays_when_the_rest_is_evicted)
{
    struct kvp_seq seq = write_prompt();
    uint32_t eight = 8, count = PROMPT, tokens;
    struct kvp_blocks prefix = by_tokens(&eight), all = by_tokens(&count);
    uint64_t evicted;

    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
    ck_ok(kvp_pin(client, "p", 1, &prefix, 60000, &tokens));
    ck_assert_uint_eq(tokens, 8);
    ck_ok(kvp_evict(client, "p", 0, 0, NULL, false, &evicted));
    ck_assert_uint_eq(evicted, 2);
    ck_ok(kvp_match(other, "p", 1, &all, &tokens, 0, NULL));
    ck_assert_uint_eq(tokens, 8);
    ck_assert_int_eq(kvp_pin(client, "p", 1, &all, 60000, &tokens), KVP_ENOENT);
    ck_ok(kvp_pin(client, "p", 1, &prefix, 0, &tokens));
    ck_assert_uint_eq(tokens, 8);
    ck_ok(kvp_evict(client, "p", 0, 1, &prefix, false, &evicted));
    ck_assert_uint_eq(evicted, 2);
}
END_TEST

START_TEST(the_cache_is_described_and_listed)
{
    struct kvp_seq seq = write_prompt();
    struct kvp_cached_page pages[3];
    struct kvp_pool_info *info;
    uint32_t from = 0, n, found = 0, firsts = 0;

    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
    do {
        ck_ok(kvp_list_cache(client, "p", 3, &from, pages, &n));
        for (uint32_t i = 0; i < n; i++) {
            found++;
            firsts += pages[i].parent == -1;
            ck_assert_uint_eq(pages[i].references, 0);
            ck_assert_uint_eq(pages[i].tenant, getuid());
        }
    } while (from != 0);
    ck_assert_uint_eq(found, 4);
    ck_assert_uint_eq(firsts, 1);
    ck_ok(kvp_pool_describe(client, "p", &info));
    ck_assert_uint_eq(info->cache.cached_pages, 4);
    ck_assert_uint_eq(info->cache.lookup_blocks, 4);
    ck_assert_uint_eq(info->cache.n_tenants, 1);
    ck_assert_uint_eq(info->cache.tenants[0].pages, 4);
    kvp_pool_info_free(info);
}
END_TEST

START_TEST(a_pools_cache_is_made_as_asked)
{
    struct kvp_tenant_share share = {getuid(), 10, 2};
    struct kvp_pool_spec spec = house_spec();
    struct kvp_pool_info *info;

    spec.name = "q";
    spec.policy = KVP_POLICY_LRU;
    spec.block_hash = KVP_BLOCK_HASH_XXH3;
    spec.zero_on_reuse = KVP_ZERO_OFF;
    spec.tenants = &share;
    spec.n_tenants = 1;
    ck_ok(kvp_pool_create(client, &spec, &info));
    ck_assert_uint_eq(info->spec.policy, KVP_POLICY_LRU);
    ck_assert_uint_eq(info->spec.block_hash, KVP_BLOCK_HASH_XXH3);
    ck_assert_uint_eq(info->spec.zero_on_reuse, KVP_ZERO_OFF);
    ck_assert_uint_eq(info->spec.n_tenants, 1);
    ck_assert_uint_eq(info->spec.tenants[0].quota_pages, 10);
    ck_assert_uint_eq(info->cache.tenants[0].guaranteed_pages, 2);
    kvp_pool_info_free(info);
    ck_ok(kvp_pool_create(client, &spec, NULL));
    share.quota_pages = 11;
    ck_assert_int_eq(kvp_pool_create(client, &spec, NULL), KVP_EEXIST);
    ck_ok(kvp_pool_delete(client, "q"));
    spec.n_tenants = KVP_TENANTS_MAX + 1;
    ck_assert_int_eq(kvp_pool_create(client, &spec, NULL), KVP_EINVAL);
}
END_TEST

int main(void)
{
    TCase *cache = tcase_create("cache");
    Suite *suite = suite_create("libkvpool: the prefix cache");
    SRunner *runner;
    int failed;

    tcase_add_checked_fixture(cache, setup, teardown);
    tcase_set_timeout(cache, 60);
    tcase_add_test(cache, a_prompt_that_one_client_wrote_is_taken_along_by_another_with_its_bytes);
    tcase_add_test(cache, pages_completed_in_decode_are_named_behind_those_of_the_prompt);
    tcase_add_test(cache, match_lists_pages_where_there_is_room_for_them);
    tcase_add_test(cache, a_prefix_that_no_message_holds_is_refused_with_both_sizes);
    tcase_add_test(cache, an_engines_keys_name_pages_too);
    tcase_add_test(cache, a_pinned_prefix_stays_when_the_rest_is_evicted);
    tcase_add_test(cache, the_cache_is_described_and_listed);
    tcase_add_test(cache, a_pools_cache_is_made_as_asked);
    suite_add_tcase(suite, cache);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
