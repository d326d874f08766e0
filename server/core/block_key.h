/**
 * Block keys: from token ids, or from keys that an engine made, to the 128 bits by which the prefix index knows a page.
 * Private to server/core. One thread; a hasher belongs to a pool and has the scratch memory it works in.
 */
#ifndef KVP_CORE_BLOCK_KEY_H
#define KVP_CORE_BLOCK_KEY_H

#include "kvp_ledger.h"

struct block_hasher;

/* What the keys of a pool depend on, beside the blocks. */
struct block_hasher_spec {
    bool xxh3;          /* XXH3-128 in place of AES */
    uint64_t secret[2]; /* of the pool */
    uint64_t digest[2]; /* of its layout */
    uint32_t page_tokens;
};

/** @retval KVP_ENOMEM @retval KVP_EINTERNAL  libcrypto has no AES */
enum kvp_status core_hasher_open(const struct block_hasher_spec *spec, struct block_hasher **ret_hasher);
void core_hasher_close(struct block_hasher *hasher); /* NULL is fine */

/* What every block of a call depends on: who asks, and `extra`. Zero of no extra. */
struct block_mix {
    uint32_t tenant;
    struct kvp_block_key extra;
};
struct block_mix core_hash_mix(struct block_hasher *hasher, uint32_t tenant, const void *extra, size_t extra_bytes);

/**
 * Keys of n blocks of one sequence, from their tokens.
 * @param parent    key of the block before them; NULL: they are the first
 * @param tokens    [n · page_tokens]
 * @param ret_keys  [n]
 */
void core_hash_tokens(struct block_hasher *hasher, const struct block_mix *mix, const struct kvp_block_key *parent,
                      size_t n, const uint32_t *tokens, struct kvp_block_key *ret_keys);
/**
 * Keys of n blocks of one sequence or several, from the engine's own.
 * @param keys      [n · key_bytes]; key_bytes at most KVP_BLOCK_KEY_BYTES_MAX
 */
void core_hash_keys(struct block_hasher *hasher, const struct block_mix *mix, size_t n, const void *keys,
                    uint32_t key_bytes, struct kvp_block_key *ret_keys);

#endif
