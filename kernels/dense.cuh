/**
 * The append kernel of the common case: bytes in 16-byte vectors, a token's heads together on both sides, nothing else
 * to do in the launch.
 *
 * Its parameters are laid out in the order of their use, so that a block fetches three or four lines of them; the form
 * of address that FlashInfer's users have (CSR of int32) is compiled in, the others go through find_place. The launch
 * may begin while the kernel before it ends (launch_early).
 */
#ifndef KVP_DENSE_CUH
#define KVP_DENSE_CUH

#include "address.cuh"
#include "mover.cuh"

/*
 * Vectors that a thread moves: few make the chain of a decode step short, and leave room for the many blocks of a long
 * prefill; in between, where all blocks are there at once, more of them under way in each are up to 8 % faster.
 */
#define DENSE_UNROLL     2
#define DENSE_UNROLL_MID 4
#define MID_BLOCKS_MIN   160 /* in blocks at DENSE_UNROLL */
#define MID_BLOCKS_MAX   2048

#define GROUPS 4 /* plane shapes in a launch */

struct plane_pointers {
    char *plane;
    char *flat;
};

/* Planes of one shape: 64 bytes. Fields as in struct group of append.cu. */
struct dense_group {
    int64_t page_stride;
    int64_t token_stride;
    int64_t flat_token_stride;
    uint32_t vectors;
    uint32_t team_log2;
    uint32_t first_plane;
    uint32_t end_block;
    struct fast_div chunks;
    struct fast_div blocks_per_plane;
};

template <int PLANES> struct dense_params {
    const void *slot_mapping;
    const int32_t *batch_indices;
    const int32_t *positions;
    const int32_t *kv_indptr;
    const int32_t *kv_indices;
    const void *nnz_device;
    uint32_t tokens;
    uint32_t first_token;
    uint32_t batch;
    uint32_t pages;
    uint32_t wide;
    struct fast_div page_tokens;
    struct dense_group group[GROUPS];
    struct plane_pointers pointers[PLANES];
    struct kvp_error_ring *errors;
    struct address address;
};

enum dense_address {
    DENSE_ANY,
    DENSE_CSR32, /* CSR of int32: what FlashInfer's users have */
    DENSE_SLOTS, /* slot mapping: what kvpool's index step and vLLM give */
};

/* find_place for a CSR of int32. */
template <int PLANES>
__device__ __forceinline__ struct place find_place_csr32(const struct dense_params<PLANES> &p, uint32_t token)
{
    int32_t b = p.batch_indices[token], position = p.positions[token], first, end, id;
    uint32_t k = quotient((uint32_t)position, p.page_tokens);

    if (b < 0 || position < 0)
        return no_place(0, 0);
    if ((uint32_t)b >= p.batch)
        return no_place(KVP_BAD_BATCH, b);
    first = p.kv_indptr[b];
    end = p.kv_indptr[b + 1];
    if (position == INT32_MAX || first < 0 || (int64_t)k >= (int64_t)end - first)
        return no_place(KVP_BAD_POSITION, position);
    id = p.kv_indices[(int64_t)first + k];
    if ((uint32_t)id >= p.pages)
        return no_place(KVP_BAD_PAGE, id);
    return {id, (uint32_t)position - k * p.page_tokens.divisor, 0, 0};
}

/* The place of a good slot below 2^31; false: look closer. */
__device__ __forceinline__ bool place_in_slot(const void *slots, bool wide, uint32_t pages,
                                              const struct fast_div &page_tokens, uint32_t token,
                                              struct place *ret_place)
{
    int64_t slot = load_index(slots, token, wide);
    uint32_t k = quotient((uint32_t)slot, page_tokens);

    if (slot < 0 || slot >= INT32_MAX || k >= pages)
        return false;
    *ret_place = {(int32_t)k, (uint32_t)slot - k * page_tokens.divisor, 0, 0};
    return true;
}

/* Whether the launch counts token, and where it lies. */
template <int PLANES, enum dense_address ADDRESS>
__device__ __forceinline__ struct place find_place_dense(const struct dense_params<PLANES> &p, uint32_t token)
{
    struct place place;

    if (p.nnz_device && token >= token_count(p.address))
        return no_place(0, 0);
    if (ADDRESS == DENSE_CSR32)
        return find_place_csr32<PLANES>(p, token);
    if (ADDRESS == DENSE_SLOTS && place_in_slot(p.slot_mapping, p.wide, p.pages, p.page_tokens, token, &place))
        return place;
    return find_place(p.address, token);
}

template <int PLANES, enum dense_address ADDRESS, uint32_t UNROLL>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) dense_kernel(const __grid_constant__ dense_params<PLANES> p)
{
    uint32_t begin = 0, n = 0;

    while (blockIdx.x >= p.group[n].end_block)
        begin = p.group[n++].end_block;
    const struct dense_group &g = p.group[n];
    uint32_t block = blockIdx.x - begin, plane = quotient(block, g.blocks_per_plane);
    uint32_t lane = threadIdx.x & ((1u << g.team_log2) - 1), step = 16u << g.team_log2;
    uint32_t item = (block - plane * g.blocks_per_plane.divisor) * (KVP_BLOCK_THREADS >> g.team_log2) +
                    (threadIdx.x >> g.team_log2);
    uint32_t local = quotient(item, g.chunks),
             first = ((item - local * g.chunks.divisor) * UNROLL << g.team_log2) + lane;
    uint32_t token = p.first_token + local, vectors = local < p.tokens ? g.vectors : 0;
    const struct plane_pointers &pointers = p.pointers[plane + g.first_plane];
    const char *from = pointers.flat + token * g.flat_token_stride + first * 16ll;
    uint4 data[UNROLL];
    struct place place;
    char *to;

    wait_for_stream();
    if (vectors == 0)
        return;
#pragma unroll
    for (uint32_t u = 0; u < UNROLL; u++) {
        if (first + (u << g.team_log2) < vectors)
            data[u] = load_once<uint4>(from + u * step);
    }
    place = find_place_dense<PLANES, ADDRESS>(p, token);
    if (place.page < 0) {
        if (place.kind && plane + g.first_plane == 0 && first == 0)
            report(p.errors, place.kind, token, place.value);
        return;
    }
    to = pointers.plane + place.page * g.page_stride + place.offset * g.token_stride + first * 16ll;
#pragma unroll
    for (uint32_t u = 0; u < UNROLL; u++) {
        if (first + (u << g.team_log2) < vectors)
            store<uint4>(to + u * step, data[u]);
    }
}

#endif
