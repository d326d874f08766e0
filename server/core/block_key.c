/**
 * The hash behind block keys, built so that a long prefix costs some 30 ns a block. See block_key.h.
 *
 * Keyed (the default). Three AES-128 permutations E1, E2, E3 and offsets O0, O1, … come from the pool's secret; all else
 * that a key depends on is in the start value of its chain. Of a block that is the words w0, w1, … of 16 bytes (its
 * tokens as little-endian 32-bit numbers, or the engine's key; zeros at the end):
 *
 *     digest   d = E1(w0 ^ O0) ^ E1(w1 ^ O1) ^ … ^ extra      all blocks at once       (the hash of PMAC)
 *     chain    c = E2(d ^ c of the block before)              one AES a block          (CBC)
 *     key      k = E3(c)                                      all blocks at once       (the last step of EMAC)
 *
 *     start    c of no block = E2 in CBC over {domain, tenant, length}, {digest of the layout}
 *     extra    E3 of the chain over its words, begun with its own domain and length; 0 of none
 *     an engine's key stands for all before it already: k = E3(d ^ start), of the key's own domain and length
 *
 * Without the secret nobody can choose tokens so that two prefixes get one key, better than by chance at 2^64 blocks: the
 * digest of words of a fixed number is that of PMAC (Black, Rogaway: A Block-Cipher Mode of Operation for Parallelizable
 * Message Authentication, 2002), a chain whose end is encrypted by another key is a pseudo-random function of messages
 * of any length, all prefixes of one another included (Petrank, Rackoff: CBC MAC for Real-Time Data Sources, 2000; ISO
 * 9797-1, algorithm 2). Keys may be shown; chain values are not, and are had back from a key by the inverse of E3, so
 * that a sequence goes on from its last page's key.
 *
 * Measured, one core of an EPYC, pages of 16 tokens, ns a block (80 bytes with the parent): one HMAC-SHA256 307, keyed
 * BLAKE2b 423, CMAC 236, SipHash-128 92 (all EVP_MAC, their contexts reused), CBC over all 58; this 30; XXH3-128 18.
 *
 * XXH3 (for one tenant): k = XXH3-128(k of the block before · extra · words), seeded by the secret; the same domains. Not
 * made to withstand who chooses tokens.
 *
 * {0, 0} is no key to the ledger, so it becomes {1, 0}: once in 2^128 the blocks behind such a one are not found.
 */
#include "block_key.h"

#include "state.h"

#include <openssl/evp.h>
#include <xxhash.h>

#define WORD_BYTES  16u
#define CHUNK_BYTES 16384u /* worked on at a time, so that it stays in the first cache */

enum domain { DOMAIN_TOKENS = 1, DOMAIN_KEYS = 2, DOMAIN_EXTRA = 3 };
enum cipher { DIGEST, CHAIN, FINISH, UNFINISH, CIPHERS };

/* The chain's value before the first block of a message. */
struct start {
    uint32_t domain, tenant, length;
    struct kvp_block_key value;
};

struct block_hasher {
    struct block_hasher_spec spec;
    uint32_t page_words; /* of 16 bytes */
    EVP_CIPHER_CTX *ciphers[CIPHERS];
    struct kvp_block_key last;     /* of CHAIN: what it adds to its next word */
    struct kvp_block_key *offsets; /* [page_words, 2 at least] */
    struct start starts[2];        /* as used last: of tokens, of keys */
    unsigned char *words;          /* scratch: CHUNK_BYTES, a page and a half at least */
};

static void add(struct kvp_block_key *to, struct kvp_block_key other)
{
    to->word[0] ^= other.word[0];
    to->word[1] ^= other.word[1];
}

/* ---- libcrypto --------------------------------------------------------------------------------------------------- */

/* Whole words, as one call. In a context that is set up this can not fail. */
static void run(EVP_CIPHER_CTX *context, size_t n, const void *words, void *ret_words)
{
    int bytes = (int)(n * WORD_BYTES), written = 0;
    CORE_ASSERT(EVP_CipherUpdate(context, ret_words, &written, words, bytes) == 1 && written == bytes);
}

static EVP_CIPHER_CTX *cipher_open(const EVP_CIPHER *type, const void *key, bool encrypt)
{
    static const unsigned char zeros[WORD_BYTES];
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context == NULL || EVP_CipherInit_ex(context, type, NULL, key, zeros, encrypt) != 1 ||
        EVP_CIPHER_CTX_set_padding(context, 0) != 1) {
        EVP_CIPHER_CTX_free(context);
        return NULL;
    }
    return context;
}

/* Subkeys and offsets: the secret's AES of the numbers 1, 2, 3, and 2^32 + j. */
static enum kvp_status derive(struct block_hasher *hasher)
{
    struct kvp_block_key keys[3] = {{{1, 0}}, {{2, 0}}, {{3, 0}}};
    uint32_t n_offsets = hasher->page_words > 2 ? hasher->page_words : 2;
    EVP_CIPHER_CTX *secret = cipher_open(EVP_aes_128_ecb(), hasher->spec.secret, true);
    if (secret == NULL)
        return KVP_EINTERNAL;
    for (uint32_t j = 0; j < n_offsets; j++)
        hasher->offsets[j] = (struct kvp_block_key){{(1ull << 32) + j, 0}};
    run(secret, 3, keys, keys);
    run(secret, n_offsets, hasher->offsets, hasher->offsets);
    EVP_CIPHER_CTX_free(secret);
    hasher->ciphers[DIGEST] = cipher_open(EVP_aes_128_ecb(), &keys[0], true);
    hasher->ciphers[CHAIN] = cipher_open(EVP_aes_128_cbc(), &keys[1], true);
    hasher->ciphers[FINISH] = cipher_open(EVP_aes_128_ecb(), &keys[2], true);
    hasher->ciphers[UNFINISH] = cipher_open(EVP_aes_128_ecb(), &keys[2], false);
    for (int i = 0; i < CIPHERS; i++) {
        if (hasher->ciphers[i] == NULL)
            return KVP_EINTERNAL;
    }
    return KVP_OK;
}

enum kvp_status core_hasher_open(const struct block_hasher_spec *spec, struct block_hasher **ret_hasher)
{
    struct block_hasher *hasher = calloc(1, sizeof(*hasher));
    if (hasher == NULL)
        return KVP_ENOMEM;
    hasher->spec = *spec;
    hasher->page_words = (spec->page_tokens + 3) / 4;
    size_t page_bytes = (size_t)hasher->page_words * WORD_BYTES;
    hasher->words = calloc(1, CHUNK_BYTES + page_bytes);
    hasher->offsets = calloc(hasher->page_words + 2, sizeof(*hasher->offsets));
    enum kvp_status status = KVP_ENOMEM;
    if (hasher->words != NULL && hasher->offsets != NULL)
        status = spec->xxh3 ? KVP_OK : derive(hasher);
    if (status != KVP_OK) {
        core_hasher_close(hasher);
        return status;
    }
    *ret_hasher = hasher;
    return KVP_OK;
}

void core_hasher_close(struct block_hasher *hasher)
{
    if (hasher == NULL)
        return;
    for (int i = 0; i < CIPHERS; i++)
        EVP_CIPHER_CTX_free(hasher->ciphers[i]);
    free(hasher->offsets);
    free(hasher->words);
    free(hasher);
}

/* ---- the chain --------------------------------------------------------------------------------------------------- */

/* n words, chained behind `before`, in place. A CBC context goes on from its own last word: that is taken out again. */
static void chain(struct block_hasher *hasher, struct kvp_block_key before, size_t n, struct kvp_block_key *words)
{
    add(&before, hasher->last);
    add(&words[0], before);
    run(hasher->ciphers[CHAIN], n, words, words);
    hasher->last = words[n - 1];
}

static struct kvp_block_key xxh3(const struct block_hasher *hasher, const void *bytes, size_t n)
{
    XXH128_hash_t hash = XXH3_128bits_withSeed(bytes, n, hasher->spec.secret[0]);
    return (struct kvp_block_key){{hash.low64, hash.high64}};
}

static struct kvp_block_key begin(struct block_hasher *hasher, enum domain domain, uint32_t tenant, uint32_t length)
{
    struct kvp_block_key words[3] = {{{(uint64_t)tenant << 32 | domain, length}},
                                     {{hasher->spec.digest[0], hasher->spec.digest[1]}},
                                     {{hasher->spec.secret[1], 0}}};
    if (hasher->spec.xxh3)
        return xxh3(hasher, words, sizeof(words));
    chain(hasher, (struct kvp_block_key){{0, 0}}, 2, words);
    return words[1];
}

/* The same, remembered: calls mostly come from one tenant. */
static struct kvp_block_key begin_again(struct block_hasher *hasher, enum domain domain, uint32_t tenant,
                                        uint32_t length)
{
    struct start *start = &hasher->starts[domain - DOMAIN_TOKENS];
    if (start->domain != domain || start->tenant != tenant || start->length != length)
        *start = (struct start){domain, tenant, length, begin(hasher, domain, tenant, length)};
    return start->value;
}

struct block_mix core_hash_mix(struct block_hasher *hasher, uint32_t tenant, const void *extra, size_t extra_bytes)
{
    struct block_mix mix = {.tenant = tenant};
    struct kvp_block_key words[KVP_BLOCK_EXTRA_BYTES_MAX / WORD_BYTES + 1];
    size_t n = (extra_bytes + WORD_BYTES - 1) / WORD_BYTES;
    CORE_ASSERT(extra_bytes <= KVP_BLOCK_EXTRA_BYTES_MAX);
    if (extra_bytes == 0)
        return mix;
    words[n] = (struct kvp_block_key){{0, 0}}; /* the last of them may be filled in part only */
    words[0] = begin(hasher, DOMAIN_EXTRA, tenant, (uint32_t)extra_bytes);
    memcpy(&words[1], extra, extra_bytes);
    if (hasher->spec.xxh3) {
        mix.extra = xxh3(hasher, words, (n + 1) * WORD_BYTES);
        return mix;
    }
    chain(hasher, words[0], n, &words[1]);
    run(hasher->ciphers[FINISH], 1, &words[n], &mix.extra);
    return mix;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* Blocks of `bytes` each as words; the rest of a block's last word is zero. Offsets are added. */
static void to_words(struct block_hasher *hasher, size_t n, const unsigned char *blocks, size_t bytes)
{
    size_t whole = bytes / WORD_BYTES, rest = bytes % WORD_BYTES;
    struct kvp_block_key *words = (struct kvp_block_key *)(void *)hasher->words;
    for (size_t i = 0; i < n; i++, blocks += rest) {
        for (size_t j = 0; j < whole; j++, blocks += WORD_BYTES) {
            memcpy(words, blocks, WORD_BYTES);
            add(words++, hasher->offsets[j]);
        }
        if (rest != 0) {
            struct kvp_block_key word = {{0, 0}};
            if (rest == sizeof(uint64_t)) /* of keys of 8 or 24 bytes: one move instead of a loop over bytes */
                memcpy(&word, blocks, sizeof(uint64_t));
            else
                memcpy(&word, blocks, rest);
            add(&word, hasher->offsets[whole]);
            *words++ = word;
        }
    }
}

static void digest(struct block_hasher *hasher, struct kvp_block_key extra, size_t n, const void *blocks, size_t bytes,
                   struct kvp_block_key *ret_digests)
{
    size_t n_words = (bytes + WORD_BYTES - 1) / WORD_BYTES;
    struct kvp_block_key *words = (struct kvp_block_key *)(void *)hasher->words;
    to_words(hasher, n, blocks, bytes);
    run(hasher->ciphers[DIGEST], n * n_words, words, words);
    for (size_t i = 0; i < n; i++) {
        struct kvp_block_key sum = extra;
        for (size_t j = 0; j < n_words; j++)
            add(&sum, *words++);
        ret_digests[i] = sum;
    }
}

static void no_zero(size_t n, struct kvp_block_key *keys)
{
    for (size_t i = 0; i < n; i++)
        keys[i].word[0] += (keys[i].word[0] | keys[i].word[1]) == 0;
}

/* The hash of one block behind `before`; xxh3 only. */
static struct kvp_block_key xxh3_block(struct block_hasher *hasher, struct kvp_block_key before,
                                       const struct block_mix *mix, const void *bytes, size_t n)
{
    struct kvp_block_key *words = (struct kvp_block_key *)(void *)hasher->words;
    words[0] = before;
    words[1] = mix->extra;
    memcpy(&words[2], bytes, n);
    return xxh3(hasher, words, 2 * WORD_BYTES + n);
}

static size_t per_chunk(size_t block_bytes)
{
    size_t words = (block_bytes + WORD_BYTES - 1) / WORD_BYTES;
    return words * WORD_BYTES >= CHUNK_BYTES ? 1 : CHUNK_BYTES / (words * WORD_BYTES);
}

void core_hash_tokens(struct block_hasher *hasher, const struct block_mix *mix, const struct kvp_block_key *parent,
                      size_t n, const uint32_t *tokens, struct kvp_block_key *ret_keys)
{
    size_t page_tokens = hasher->spec.page_tokens, bytes = page_tokens * sizeof(*tokens), chunk = per_chunk(bytes);
    struct kvp_block_key before;
    if (parent == NULL)
        before = begin_again(hasher, DOMAIN_TOKENS, mix->tenant, hasher->spec.page_tokens);
    else if (hasher->spec.xxh3)
        before = *parent;
    else
        run(hasher->ciphers[UNFINISH], 1, parent, &before);
    for (size_t i = 0; hasher->spec.xxh3 && i < n; i++)
        before = ret_keys[i] = xxh3_block(hasher, before, mix, tokens + i * page_tokens, bytes);
    for (size_t i = 0, m; !hasher->spec.xxh3 && i < n; i += m) {
        m = n - i < chunk ? n - i : chunk;
        digest(hasher, mix->extra, m, tokens + i * page_tokens, bytes, ret_keys + i);
        chain(hasher, before, m, ret_keys + i);
        before = ret_keys[i + m - 1];
        run(hasher->ciphers[FINISH], m, ret_keys + i, ret_keys + i);
    }
    no_zero(n, ret_keys);
}

void core_hash_keys(struct block_hasher *hasher, const struct block_mix *mix, size_t n, const void *keys,
                    uint32_t key_bytes, struct kvp_block_key *ret_keys)
{
    const unsigned char *bytes = keys;
    struct kvp_block_key start = begin_again(hasher, DOMAIN_KEYS, mix->tenant, key_bytes), sum = start;
    size_t chunk = per_chunk(key_bytes);
    add(&sum, mix->extra);
    for (size_t i = 0; hasher->spec.xxh3 && i < n; i++)
        ret_keys[i] = xxh3_block(hasher, start, mix, bytes + i * key_bytes, key_bytes);
    for (size_t i = 0, m; !hasher->spec.xxh3 && i < n; i += m) {
        m = n - i < chunk ? n - i : chunk;
        digest(hasher, sum, m, bytes + i * key_bytes, key_bytes, ret_keys + i);
        run(hasher->ciphers[FINISH], m, ret_keys + i, ret_keys + i);
    }
    no_zero(n, ret_keys);
}
