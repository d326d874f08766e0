/**
 * Block keys: the same keys in every release, however a prefix is cut into calls, and different ones for whatever
 * differs.
 *
 * The constants were computed by another program: AES written out after FIPS 197 in Python, and Python's xxhash.
 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "block_key.h"

#define BLOCKS_MAX 1024
#define TENANT     1000

static uint32_t tokens[BLOCKS_MAX * 64];
static struct kvp_block_key keys[BLOCKS_MAX], others[BLOCKS_MAX];
static unsigned char engine_keys[BLOCKS_MAX * 32];
static const char lora[] = "lora 7, image 0123456789";

static struct block_hasher *hasher_of(bool xxh3, uint32_t page_tokens)
{
    struct block_hasher_spec spec = {.xxh3 = xxh3,
                                     .secret = {0x0123456789abcdef, 0xfedcba9876543210},
                                     .digest = {0x1111111111111111, 0x2222222222222222},
                                     .page_tokens = page_tokens};
    struct block_hasher *hasher;
    ck_assert_int_eq(core_hasher_open(&spec, &hasher), KVP_OK);
    return hasher;
}

static void setup(void)
{
    for (uint32_t i = 0; i < sizeof(tokens) / sizeof(tokens[0]); i++)
        tokens[i] = i * 2654435761u;
    for (uint32_t i = 0; i < sizeof(engine_keys); i++)
        engine_keys[i] = (unsigned char)(i * 131 + i / 256);
    memset(others, 0, sizeof(others));
}

static bool same(struct kvp_block_key a, struct kvp_block_key b)
{
    return a.word[0] == b.word[0] && a.word[1] == b.word[1];
}

static void hash(struct block_hasher *hasher, uint32_t tenant, const char *extra, const struct kvp_block_key *parent,
                 size_t n, const uint32_t *from, struct kvp_block_key *ret_keys)
{
    struct block_mix mix = core_hash_mix(hasher, tenant, extra, extra == NULL ? 0 : strlen(extra));
    core_hash_tokens(hasher, &mix, parent, n, from, ret_keys);
}

static void assert_key(struct kvp_block_key key, uint64_t low, uint64_t high)
{
    ck_assert_msg(key.word[0] == low && key.word[1] == high, "%#llx, %#llx", (unsigned long long)key.word[0],
                  (unsigned long long)key.word[1]);
}

START_TEST(keys_of_tokens_are_the_same_in_every_release)
{
    struct block_hasher *sixteen = hasher_of(false, 16), *five = hasher_of(false, 5);
    hash(sixteen, TENANT, NULL, NULL, 3, tokens, keys);
    assert_key(keys[0], 0x32d44faf72334645, 0xf5362d0511fad6e2);
    assert_key(keys[1], 0xeb47fe345cee006d, 0x420e8f2208b056bd);
    assert_key(keys[2], 0xe854707c8eb90f74, 0xc36057f74ae844a3);
    hash(sixteen, TENANT, lora, NULL, 3, tokens, keys);
    assert_key(keys[2], 0xc1a9e36eeaacb363, 0x7c409d733a804b67);
    hash(five, TENANT, NULL, NULL, 3, tokens, keys);
    assert_key(keys[0], 0xc30609ffec3c97af, 0x0b0e69e29fe23077);
    assert_key(keys[2], 0x44db2adbf1711d90, 0x4a1a71a59537c757);
    hash(five, TENANT, lora, NULL, 3, tokens, keys);
    assert_key(keys[2], 0x9b21f800261edeb3, 0xaa5aa814cf8cb664);
    core_hasher_close(sixteen);
    core_hasher_close(five);
}
END_TEST

START_TEST(keys_of_engines_keys_are_the_same_in_every_release)
{
    struct block_hasher *hasher = hasher_of(false, 16);
    struct block_mix mix = core_hash_mix(hasher, TENANT, NULL, 0), other = core_hash_mix(hasher, TENANT + 1, "x", 1);
    unsigned char counting[32];
    for (unsigned i = 0; i < sizeof(counting); i++)
        counting[i] = (unsigned char)i;
    core_hash_keys(hasher, &mix, 1, counting, 8, keys);
    assert_key(keys[0], 0x9499e08f8d9cf199, 0xd5933257f4864456);
    core_hash_keys(hasher, &mix, 1, counting, 32, keys);
    assert_key(keys[0], 0xc846433c529b5968, 0x9eab32a1d3294a1f);
    core_hash_keys(hasher, &other, 1, counting, 20, keys);
    assert_key(keys[0], 0xb3d93a3746d03ac0, 0x0291650fbaeb1cfe);
    core_hasher_close(hasher);
}
END_TEST

START_TEST(keys_by_xxh3_are_the_same_in_every_release)
{
    struct block_hasher *hasher = hasher_of(true, 16);
    struct block_mix mix = core_hash_mix(hasher, TENANT, NULL, 0);
    unsigned char counting[32];
    for (unsigned i = 0; i < sizeof(counting); i++)
        counting[i] = (unsigned char)i;
    hash(hasher, TENANT, NULL, NULL, 3, tokens, keys);
    assert_key(keys[2], 0x5311ed40e7aee885, 0x3e12e347f323203f);
    hash(hasher, TENANT, lora, NULL, 3, tokens, keys);
    assert_key(keys[2], 0x6ef6ba9284f59335, 0x564c792c7ba07b4e);
    core_hash_keys(hasher, &mix, 1, counting, 32, keys);
    assert_key(keys[0], 0x59f14e70123b8967, 0x85d441627767b6e3);
    core_hasher_close(hasher);
}
END_TEST

/* Page sizes that fill words or do not, and that make a chunk of scratch hold many pages, a few, one. */
static const uint32_t sizes[] = {1, 3, 4, 16, 50, 64, 4096};
#define SIZES ((int)(sizeof(sizes) / sizeof(sizes[0])))

START_TEST(a_prefix_has_the_same_keys_however_it_is_cut_into_calls)
{
    uint32_t page_tokens = sizes[_i / 2];
    struct block_hasher *hasher = hasher_of(_i % 2 == 1, page_tokens);
    size_t n = sizeof(tokens) / sizeof(tokens[0]) / page_tokens;
    n = n < BLOCKS_MAX ? n : BLOCKS_MAX;
    hash(hasher, TENANT, lora, NULL, n, tokens, keys);
    unsigned seed = 7;
    for (size_t at = 0, m; at < n; at += m) {
        struct kvp_block_key between;
        m = 1 + (size_t)rand_r(&seed) % (n - at < 40 ? n - at : 40);
        hash(hasher, TENANT, lora, at == 0 ? NULL : &others[at - 1], m, tokens + at * page_tokens, others + at);
        hash(hasher, TENANT + 1, NULL, NULL, 1, tokens, &between);
    }
    for (size_t i = 0; i < n; i++)
        ck_assert_msg(same(keys[i], others[i]), "block %zu of %zu, pages of %u tokens", i, n, page_tokens);
    core_hasher_close(hasher);
}
END_TEST

START_TEST(a_change_in_one_token_changes_the_keys_of_its_block_and_of_all_behind)
{
    struct block_hasher *hasher = hasher_of(_i == 1, 16);
    hash(hasher, TENANT, NULL, NULL, 300, tokens, keys);
    tokens[100 * 16 + 15] ^= 1u << 31;
    hash(hasher, TENANT, NULL, NULL, 300, tokens, others);
    for (size_t i = 0; i < 300; i++)
        ck_assert_msg(same(keys[i], others[i]) == (i < 100), "block %zu", i);
    core_hasher_close(hasher);
}
END_TEST

START_TEST(tenants_extras_secrets_and_layouts_have_keys_of_their_own)
{
    struct block_hasher_spec spec = {
        .xxh3 = _i == 1, .secret = {0x0123456789abcdef, 0xfedcba9876543210}, .digest = {1, 2}, .page_tokens = 16};
    struct block_hasher *hasher = hasher_of(_i == 1, 16), *other;
    hash(hasher, TENANT, NULL, NULL, 1, tokens, &keys[0]);
    hash(hasher, TENANT + 1, NULL, NULL, 1, tokens, &keys[1]);
    hash(hasher, TENANT, "a", NULL, 1, tokens, &keys[2]);
    struct block_mix zero = core_hash_mix(hasher, TENANT, "a\0", 2), one = core_hash_mix(hasher, TENANT + 1, "a", 1);
    core_hash_tokens(hasher, &zero, NULL, 1, tokens, &keys[3]);
    core_hash_tokens(hasher, &one, NULL, 1, tokens, &keys[4]);
    ck_assert_int_eq(core_hasher_open(&spec, &other), KVP_OK);
    hash(other, TENANT, NULL, NULL, 1, tokens, &keys[5]);
    core_hasher_close(other);
    spec.digest[0] = spec.digest[1] = 0x1111111111111111;
    spec.secret[1]++;
    ck_assert_int_eq(core_hasher_open(&spec, &other), KVP_OK);
    hash(other, TENANT, NULL, NULL, 1, tokens, &keys[6]);
    core_hasher_close(other);
    /* the engine's key that has the bytes of the block's tokens, and keys that are one another's beginning */
    struct block_mix none = core_hash_mix(hasher, TENANT, NULL, 0);
    memset(engine_keys, 0, 16);
    core_hash_keys(hasher, &none, 1, engine_keys, 8, &keys[7]);
    core_hash_keys(hasher, &none, 1, engine_keys, 16, &keys[8]);
    core_hash_keys(hasher, &none, 1, tokens, 32, &keys[9]);
    core_hash_keys(hasher, &zero, 1, tokens, 32, &keys[10]);
    for (int i = 0; i < 11; i++)
        for (int k = 0; k < i; k++)
            ck_assert_msg(!same(keys[i], keys[k]), "%d and %d", i, k);
    core_hasher_close(hasher);
}
END_TEST

START_TEST(an_engines_keys_are_hashed_each_by_itself)
{
    struct block_hasher *hasher = hasher_of(_i == 1, 16);
    struct block_mix mix = core_hash_mix(hasher, TENANT, lora, strlen(lora));
    for (uint32_t key_bytes = KVP_BLOCK_KEY_BYTES_MIN; key_bytes <= KVP_BLOCK_KEY_BYTES_MAX; key_bytes++) {
        size_t n = sizeof(engine_keys) / key_bytes < BLOCKS_MAX ? sizeof(engine_keys) / key_bytes : BLOCKS_MAX;
        core_hash_keys(hasher, &mix, n, engine_keys, key_bytes, keys);
        for (size_t i = 0; i < n; i++) {
            core_hash_keys(hasher, &mix, 1, engine_keys + i * key_bytes, key_bytes, &others[0]);
            ck_assert_msg(same(keys[i], others[0]), "key %zu of %u bytes", i, key_bytes);
        }
    }
    core_hasher_close(hasher);
}
END_TEST

int main(void)
{
    TCase *block = tcase_create("block keys");
    tcase_add_checked_fixture(block, setup, NULL);
    tcase_add_test(block, keys_of_tokens_are_the_same_in_every_release);
    tcase_add_test(block, keys_of_engines_keys_are_the_same_in_every_release);
    tcase_add_test(block, keys_by_xxh3_are_the_same_in_every_release);
    tcase_add_loop_test(block, a_prefix_has_the_same_keys_however_it_is_cut_into_calls, 0, 2 * SIZES);
    tcase_add_loop_test(block, a_change_in_one_token_changes_the_keys_of_its_block_and_of_all_behind, 0, 2);
    tcase_add_loop_test(block, tenants_extras_secrets_and_layouts_have_keys_of_their_own, 0, 2);
    tcase_add_loop_test(block, an_engines_keys_are_hashed_each_by_itself, 0, 2);
    Suite *suite = suite_create("block keys");
    suite_add_tcase(suite, block);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
