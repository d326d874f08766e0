/**
 * What the prefix cache costs in the core alone (no socket, no process), for prefixes of 1 000 blocks of 16 tokens, in a
 * pool in which 100 of them are cached.
 *
 *   match      Match by token ids, by an engine's keys of 32 bytes, by token ids in a pool that hashes by XXH3, the same
 *              prefix again and again; of it the hash alone; and each of the 100 in turn (cold), which memory is slow for
 *   open       OpenSequences that takes such a prefix along, and CloseSequences of it; the same, and each in turn
 *   publish    Advance that says a sequence's pages are written, with block keys for them and without: the difference, a
 *              page; by keys and by tokens
 *   peer       the same bytes of tokens by one EVP_MAC SipHash-128 a block, its context reused: what hashing block by
 *              block by libcrypto would cost
 *
 * Medians of 15 rounds. --json: one object with the keys match_tokens_us, match_keys_us, match_xxh3_us, match_cold_us,
 * hash_tokens_us, hash_keys_us, hash_xxh3_us, siphash_us, hash_ratio (hash_tokens_us to siphash_us), open_us, close_us,
 * open_cold_us, close_cold_us, publish_keys_ns, publish_tokens_ns, seal_ns.
 */
#include "block_key.h"
#include "core_shell.h"
#include "state.h"

#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <time.h>

#define T         16u
#define BLOCKS    1000u
#define PREFIXES  100u
#define ROUNDS    15
#define KEY_BYTES 32u

static uint32_t tokens[PREFIXES][BLOCKS * T];
static unsigned char keys[PREFIXES][BLOCKS * KEY_BYTES];
static struct shell *shell;
static struct kvp_caller caller;

/* Of this process's own time: one thread, which waits for nobody. */
static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof(values[0]), compare);
    return values[n / 2];
}

/* ---- calls that are answered to nobody --------------------------------------------------------------------------- */

static enum kvp_status answered;
static uint64_t seq;
static uint32_t cached;

static void quiet_reply(void *ctx, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                        const struct kvp_thing *things, unsigned n_things)
{
    (void)ctx, (void)call, (void)things, (void)n_things;
    answered = status;
    if (reply->descriptor == &kvpool__v1__open_sequences_reply__descriptor) {
        const Kvpool__V1__OpenSequencesReply *opened = (const Kvpool__V1__OpenSequencesReply *)reply;

        seq = opened->seqs[0];
        cached = opened->n_cached != 0 ? opened->cached[0] : 0;
    } else if (reply->descriptor == &kvpool__v1__match_reply__descriptor) {
        cached = ((const Kvpool__V1__MatchReply *)reply)->cached[0];
    }
}

static void silence(void)
{
    static struct kvp_actions quiet;

    quiet = *shell->core->act;
    quiet.reply = quiet_reply;
    shell->core->act = &quiet;
}

/* @return how long it took; in us */
static double call(uint16_t method, ProtobufCMessage *body)
{
    struct kvp_call one = {.caller = caller, .message = {.method = method, .body = body}};
    double from = now_us();

    answered = KVP_EINTERNAL;
    kvp_core_call(shell->core, &one);
    from = now_us() - from;
    ck_assert_int_eq(answered, KVP_OK);
    while (shell->wake_ms <= shell->now_ms)
        shell_tick(shell);
    return from;
}
#define CALL(NAME, request) call(KVPOOL__V1__METHOD__METHOD_##NAME, &(request).base)

static Kvpool__V1__Blocks blocks_of(uint32_t prefix, bool by_keys, uint32_t *count)
{
    Kvpool__V1__Blocks blocks = KVPOOL__V1__BLOCKS__INIT;

    *count = by_keys ? BLOCKS : BLOCKS * T;
    blocks.n_counts = 1;
    blocks.counts = count;
    if (by_keys) {
        blocks.keys = (ProtobufCBinaryData){BLOCKS * KEY_BYTES, keys[prefix]};
        blocks.key_bytes = KEY_BYTES;
    } else {
        blocks.n_tokens = BLOCKS * T;
        blocks.tokens = tokens[prefix];
    }
    return blocks;
}

static double open_one(Kvpool__V1__Blocks *blocks)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    static uint64_t key;

    key++;
    request.pool = (char *)"p";
    request.n_keys = 1;
    request.keys = &key;
    request.blocks = blocks;
    return CALL(OPEN_SEQUENCES, request);
}

static double close_one(void)
{
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;

    request.pool = (char *)"p";
    request.n_seqs = 1;
    request.seqs = &seq;
    return CALL(CLOSE_SEQUENCES, request);
}

static double advance(uint32_t written, Kvpool__V1__Blocks *blocks)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    uint32_t reserved = BLOCKS * T;

    request.pool = (char *)"p";
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &seq;
    request.reserved = &reserved;
    request.n_written = 1;
    request.written = &written;
    request.blocks = blocks;
    return CALL(ADVANCE, request);
}

/* ---- measures ---------------------------------------------------------------------------------------------------- */

static void begin(Kvpool__V1__BlockHash hash, bool by_keys)
{
    const struct pool_of pool = {.name = "p",
                                 .pages = (PREFIXES + 20) * BLOCKS,
                                 .page_tokens = T,
                                 .layers = 1,
                                 .max_sequences = 16,
                                 .max_sequence_tokens = BLOCKS * T,
                                 .policy = KVPOOL__V1__POLICY__POLICY_LRU,
                                 .block_hash = hash};

    shell = shell_begin("host");
    caller = shell_connect(shell, 1000, 41);
    shell_make_pool(shell, caller, &pool);
    silence();
    for (uint32_t i = 0; i < PREFIXES; i++) {
        uint32_t count;
        Kvpool__V1__Blocks blocks = blocks_of(i, by_keys, &count);

        open_one(NULL);
        advance(BLOCKS * T, &blocks);
        close_one();
    }
}

static double match_us(bool by_keys, uint32_t prefixes)
{
    double us[ROUNDS];

    for (int round = 0; round < ROUNDS; round++) {
        us[round] = 0;
        for (uint32_t i = 0; i < prefixes; i++) {
            Kvpool__V1__MatchRequest request = KVPOOL__V1__MATCH_REQUEST__INIT;
            uint32_t count;
            Kvpool__V1__Blocks blocks = blocks_of(i * 37 % prefixes, by_keys, &count);

            request.pool = (char *)"p";
            request.blocks = &blocks;
            us[round] += CALL(MATCH, request) / prefixes;
            ck_assert_uint_eq(cached, BLOCKS * T);
        }
    }
    return median(us, ROUNDS);
}

static double hash_us(bool by_keys)
{
    static struct kvp_block_key made[BLOCKS];
    struct block_hasher *hasher = shell->core->pools[0].hasher;
    double us[ROUNDS];

    for (int round = 0; round < ROUNDS; round++) {
        double from = now_us();

        for (uint32_t i = 0; i < PREFIXES; i++) {
            struct block_mix mix = core_hash_mix(hasher, 1000, NULL, 0);

            if (by_keys)
                core_hash_keys(hasher, &mix, BLOCKS, keys[0], KEY_BYTES, made);
            else
                core_hash_tokens(hasher, &mix, NULL, BLOCKS, tokens[0], made);
        }
        us[round] = (now_us() - from) / PREFIXES;
    }
    return median(us, ROUNDS);
}

static double siphash_us(void)
{
    size_t size = 16, n;
    OSSL_PARAM params[] = {OSSL_PARAM_construct_size_t(OSSL_MAC_PARAM_SIZE, &size), OSSL_PARAM_construct_end()};
    unsigned char key[16] = {1}, message[16 + T * 4] = {0};
    EVP_MAC *mac = EVP_MAC_fetch(NULL, "SIPHASH", NULL);
    EVP_MAC_CTX *context = EVP_MAC_CTX_new(mac);
    double us[ROUNDS];
    bool ok = true;

    ck_assert_ptr_nonnull(context);
    ck_assert_int_eq(EVP_MAC_init(context, key, sizeof(key), params), 1);
    for (int round = 0; round < ROUNDS; round++) {
        double from = now_us();

        for (uint32_t i = 0; i < BLOCKS; i++) {
            memcpy(message + 16, &tokens[0][i * T], T * 4);
            ok = ok && EVP_MAC_init(context, NULL, 0, NULL) && EVP_MAC_update(context, message, sizeof(message)) &&
                 EVP_MAC_final(context, message, &n, 16);
        }
        us[round] = now_us() - from;
    }
    ck_assert(ok);
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(mac);
    return median(us, ROUNDS);
}

static void open_close_us(uint32_t prefixes, double *ret_open_us, double *ret_close_us)
{
    static double opens[ROUNDS], closes[ROUNDS];

    for (int round = 0; round < ROUNDS; round++) {
        opens[round] = closes[round] = 0;
        for (uint32_t i = 0; i < prefixes; i++) {
            uint32_t count;
            Kvpool__V1__Blocks blocks = blocks_of(i * 37 % prefixes, false, &count);

            opens[round] += open_one(&blocks) / prefixes;
            ck_assert_uint_eq(cached, BLOCKS * T);
            closes[round] += close_one() / prefixes;
        }
    }
    *ret_open_us = median(opens, ROUNDS);
    *ret_close_us = median(closes, ROUNDS);
}

enum naming { UNNAMED, BY_KEYS, BY_TOKENS };

/* What it takes that a page counts as written; in ns. The pages are those that were free, and are evicted after it. */
static double written_ns(enum naming naming)
{
    Kvpool__V1__EvictRequest evict = KVPOOL__V1__EVICT_REQUEST__INIT;
    static uint32_t fresh[BLOCKS * T];
    static unsigned char fresh_keys[BLOCKS * KEY_BYTES];
    double ns[ROUNDS];

    evict.pool = (char *)"p";
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t count = naming == BY_KEYS ? BLOCKS : BLOCKS * T;
        Kvpool__V1__Blocks blocks = blocks_of(0, naming == BY_KEYS, &count);

        for (uint32_t i = 0; i < BLOCKS * T; i++)
            fresh[i] = 0x80000000u + (uint32_t)round * BLOCKS * T + i;
        for (uint32_t i = 0; i < BLOCKS; i++)
            memcpy(fresh_keys + i * KEY_BYTES, &fresh[i * 8], KEY_BYTES);
        if (naming == BY_KEYS)
            blocks.keys.data = fresh_keys;
        else
            blocks.tokens = fresh;
        open_one(NULL);
        advance(0, NULL);
        ns[round] = advance(BLOCKS * T, naming == UNNAMED ? NULL : &blocks) * 1e3 / BLOCKS;
        close_one();
        evict.blocks = &blocks;
        if (naming != UNNAMED)
            CALL(EVICT, evict);
    }
    return median(ns, ROUNDS);
}

/* ---- the program ------------------------------------------------------------------------------------------------- */

static bool json;

START_TEST(measure)
{
    double match[4], hash[3], opened[2], closed[2], seal, by_keys, by_tokens, sip = siphash_us();

    begin(KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_KEYED, false);
    match[0] = match_us(false, 1);
    match[3] = match_us(false, PREFIXES);
    hash[0] = hash_us(false);
    open_close_us(1, &opened[0], &closed[0]);
    open_close_us(PREFIXES, &opened[1], &closed[1]);
    seal = written_ns(UNNAMED);
    by_keys = written_ns(BY_KEYS) - seal;
    by_tokens = written_ns(BY_TOKENS) - seal;
    begin(KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_KEYED, true);
    match[1] = match_us(true, 1);
    hash[1] = hash_us(true);
    begin(KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3, false);
    match[2] = match_us(false, 1);
    hash[2] = hash_us(false);
    if (json) {
        printf("{\"match_tokens_us\": %.2f, \"match_keys_us\": %.2f, \"match_xxh3_us\": %.2f, \"match_cold_us\": %.2f, "
               "\"hash_tokens_us\": %.2f, \"hash_keys_us\": %.2f, \"hash_xxh3_us\": %.2f, \"siphash_us\": %.2f, "
               "\"hash_ratio\": %.3f, \"open_us\": %.2f, \"close_us\": %.2f, \"open_cold_us\": %.2f, "
               "\"close_cold_us\": %.2f, \"publish_keys_ns\": %.1f, \"publish_tokens_ns\": %.1f, \"seal_ns\": %.1f}\n",
               match[0], match[1], match[2], match[3], hash[0], hash[1], hash[2], sip, hash[0] / sip, opened[0],
               closed[0], opened[1], closed[1], by_keys, by_tokens, seal);
        return;
    }
    printf(
        "Match of %u blocks       by tokens %.1f us, by keys %.1f us, by tokens with XXH3 %.1f us; each of %u in turn "
        "%.1f us\n",
        BLOCKS, match[0], match[1], match[2], PREFIXES, match[3]);
    printf("of it the hash           %.1f us, %.1f us, %.1f us; SipHash block by block %.1f us\n", hash[0], hash[1],
           hash[2], sip);
    printf("OpenSequences with them  %.1f us; CloseSequences %.1f us; each in turn %.1f and %.1f us\n", opened[0],
           closed[0], opened[1], closed[1]);
    printf("publish, a page          by keys %.0f ns, by tokens %.0f ns, beside %.0f ns for a page that is written\n",
           by_keys, by_tokens, seal);
}
END_TEST

int main(int argc, char **argv)
{
    TCase *tcase = tcase_create("bench");
    Suite *suite = suite_create("bench");
    SRunner *runner;
    int failed;

    json = argc > 1 && strcmp(argv[1], "--json") == 0;
    for (uint32_t p = 0, x = 1; p < PREFIXES; p++) {
        for (uint32_t i = 0; i < BLOCKS * T; i++)
            tokens[p][i] = (x = x * 1664525 + 1013904223) >> 8;
        for (uint32_t i = 0; i < BLOCKS * KEY_BYTES; i++)
            keys[p][i] = (unsigned char)((x = x * 1664525 + 1013904223) >> 24);
    }
    tcase_add_test(tcase, measure);
    suite_add_tcase(suite, tcase);
    runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_SILENT);
    failed = srunner_ntests_failed(runner);
    if (failed != 0)
        srunner_print(runner, CK_NORMAL);
    srunner_free(runner);
    return failed != 0;
}
