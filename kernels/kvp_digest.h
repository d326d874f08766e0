/**
 * The page digest's arithmetic, for C and CUDA alike.
 *
 * A page is a list of rows: plane by plane, token by token, head by head, each row the dim · sizeof(dtype) bytes of one
 * (token, head), cut into little-endian 64-bit words, the last one filled up with zero bytes. Word number i of the page
 * (counted over all rows) adds
 *
 *     lane 0:  lo32(k) · hi32(k) + w        with k = w ^ key0(i)
 *     lane 1:  lo32(k) · hi32(k) + rot32(w) with k = w ^ key1(i)
 *
 * to two 64-bit sums. Addition commutes, so any number of threads may share the work in any order; the key makes the
 * place of a word count. Each sum is then mixed with the number of words. 32 · 32 → 64 bit products are what both a GPU
 * and a CPU's vector units have.
 */
#ifndef KVP_DIGEST_H
#define KVP_DIGEST_H

#include <stdint.h>

#ifdef __CUDACC__
#define KVP_DIGEST_INLINE static __host__ __device__ inline
#else
#define KVP_DIGEST_INLINE static inline
#endif

#define KVP_DIGEST_STEP0 0x9e3779b97f4a7c15ull
#define KVP_DIGEST_STEP1 0xc2b2ae3d27d4eb4full
#define KVP_DIGEST_SEED0 0x165667b19e3779f9ull
#define KVP_DIGEST_SEED1 0x27d4eb2f165667c5ull

/* keys: key(i) = seed + i · step, so a loop over words adds one step a word */
KVP_DIGEST_INLINE uint64_t kvp_digest_key0(uint64_t word_index)
{
    return KVP_DIGEST_SEED0 + word_index * KVP_DIGEST_STEP0;
}

KVP_DIGEST_INLINE uint64_t kvp_digest_key1(uint64_t word_index)
{
    return KVP_DIGEST_SEED1 + word_index * KVP_DIGEST_STEP1;
}

KVP_DIGEST_INLINE uint64_t kvp_digest_lane0(uint64_t word, uint64_t key0)
{
    uint64_t keyed = word ^ key0;

    return (uint64_t)(uint32_t)keyed * (uint32_t)(keyed >> 32) + word;
}

KVP_DIGEST_INLINE uint64_t kvp_digest_lane1(uint64_t word, uint64_t key1)
{
    uint64_t keyed = word ^ key1;

    return (uint64_t)(uint32_t)keyed * (uint32_t)(keyed >> 32) + (word << 32 | word >> 32);
}

/* the last mix, of a sum and the page's number of words (murmur3's 64-bit finaliser) */
KVP_DIGEST_INLINE uint64_t kvp_digest_finish(uint64_t sum, uint64_t words)
{
    uint64_t h = sum ^ (words * KVP_DIGEST_STEP0);

    h ^= h >> 33;
    h *= 0xff51afd7ed558ccdull;
    h ^= h >> 33;
    h *= 0xc4ceb9fe1a85ec53ull;
    h ^= h >> 33;
    return h;
}

#endif
