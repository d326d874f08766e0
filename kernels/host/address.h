/**
 * From a token's number to its place in the pool: the host's half of struct kvp_address, and of the error ring.
 *
 * Every place that comes out lies within the pool: page < pages, offset < page_tokens. What is padding, or was
 * reported, has no place. Memory that other processes write (table heads, device counts) is read once a token or call,
 * by atomic loads.
 */
#ifndef KVP_HOST_ADDRESS_H
#define KVP_HOST_ADDRESS_H

#include "../kvp_kernels.h"

#define KVP_NO_PLACE       UINT32_MAX /* the page of a token that is skipped */
#define KVP_RESOLVE_TOKENS 512        /* places resolved at a time: they stay in the first-level cache */

struct kvp_place {
    uint32_t page; /* KVP_NO_PLACE: skip the token */
    uint32_t offset;
};

struct kvp_pool_shape {
    uint32_t pages;
    uint32_t page_tokens;
    struct kvp_error_ring *errors;
};

/** Count a violation, and record it while there is room. Thread-safe; `ring` may be NULL. */
void kvp_report(struct kvp_error_ring *ring, enum kvp_violation kind, int64_t token, int64_t value);

/** Tokens that count in this call: nnz, or what nnz_device says where that is less. */
uint64_t kvp_address_tokens(const struct kvp_address *at);

/**
 * Find the places of the tokens [first, first + n).
 *
 * @param ret_places  [n]
 *
 * Thread-safe. Each violation is reported once a call of this function: resolve every token once.
 */
void kvp_resolve(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint64_t first, uint32_t n,
                 struct kvp_place *ret_places);

/** Entry i of an array of 32- or 64-bit signed integers. */
static inline int64_t kvp_index_at(const void *array, uint32_t bits, int64_t i)
{
    return bits == 64 ? ((const int64_t *)array)[i] : ((const int32_t *)array)[i];
}

/** The same for a count that another thread or device may be writing. */
static inline int64_t kvp_index_load(const void *array, uint32_t bits)
{
    return bits == 64 ? __atomic_load_n((const int64_t *)array, __ATOMIC_ACQUIRE)
                      : __atomic_load_n((const int32_t *)array, __ATOMIC_ACQUIRE);
}

/** Sums of numbers that came from outside: what overflows wraps, and fails the range check that follows. */
static inline int64_t kvp_wrap_add(int64_t a, int64_t b)
{
    return (int64_t)((uint64_t)a + (uint64_t)b);
}

static inline int64_t kvp_wrap_sub(int64_t a, int64_t b)
{
    return (int64_t)((uint64_t)a - (uint64_t)b);
}

#endif
