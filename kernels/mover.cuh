/**
 * Moving bytes between pages: loads and stores with their cache hints, and the copy of a part of a page, which append
 * (copy on write) and the page operations share.
 */
#ifndef KVP_MOVER_CUH
#define KVP_MOVER_CUH

#include "device.cuh"

#define PAGE_UNROLL 4

/* Read what is not read again: it should not push anything out of the caches. */
template <typename V> __device__ __forceinline__ V load_once(const char *at)
{
    return __ldcs(reinterpret_cast<const V *>(at));
}

/* Written once: evicting it first leaves room for what is still to be read (5 to 10 % of an append's time). */
template <typename V> __device__ __forceinline__ void store(char *at, V value)
{
    __stcs(reinterpret_cast<V *>(at), value);
}

/* One plane of a source and of a destination pool, equal in heads, dim and dtype. Strides in bytes. */
struct page_shape {
    int64_t source_page_stride, source_token_stride, source_head_stride;
    int64_t destination_page_stride, destination_token_stride, destination_head_stride;
    uint32_t source_pages, destination_pages;
    uint32_t page_tokens;
    struct fast_div vectors_per_token;
    struct fast_div vectors_per_head; /* all of a token's, where its heads lie together on both sides */
    struct fast_div blocks;           /* for one page */
};

static inline struct page_shape page_shape_of(const struct kvp_plane_view *source,
                                              const struct kvp_plane_view *destination, uint32_t page_tokens,
                                              uint32_t vector_bytes)
{
    int64_t head_bytes = (int64_t)source->dim * kvp_dtype_bytes(source->dtype);
    uint32_t head_vectors = (uint32_t)(head_bytes / vector_bytes), token_vectors = head_vectors * source->heads;
    uint32_t block_vectors = KVP_BLOCK_THREADS * PAGE_UNROLL;
    struct page_shape s = {};

    s.source_page_stride = source->page_stride;
    s.source_token_stride = source->token_stride;
    s.source_head_stride = source->head_stride;
    s.destination_page_stride = destination->page_stride;
    s.destination_token_stride = destination->token_stride;
    s.destination_head_stride = destination->head_stride;
    s.page_tokens = page_tokens;
    if (source->head_stride == head_bytes && destination->head_stride == head_bytes)
        head_vectors = token_vectors;
    s.vectors_per_head = fast_div_of(head_vectors);
    s.vectors_per_token = fast_div_of(token_vectors);
    s.blocks = fast_div_of((uint32_t)(((uint64_t)page_tokens * token_vectors + block_vectors - 1) / block_vectors));
    return s;
}

/* Block `part` of the first `tokens` tokens of a page; source NULL stores zeros. */
template <typename V, bool ZERO>
__device__ __forceinline__ void move_page_part(const struct page_shape &s, const char *source, char *destination,
                                               uint32_t tokens, uint32_t part)
{
    uint32_t vectors = tokens * s.vectors_per_token.divisor;
    uint32_t first = part * (KVP_BLOCK_THREADS * PAGE_UNROLL) + threadIdx.x;
    int64_t to[PAGE_UNROLL];
    V data[PAGE_UNROLL];

#pragma unroll
    for (int u = 0; u < PAGE_UNROLL; u++) {
        uint32_t v = first + u * KVP_BLOCK_THREADS;
        uint32_t token = quotient(v, s.vectors_per_token), in_token = v - token * s.vectors_per_token.divisor;
        uint32_t head = quotient(in_token, s.vectors_per_head);
        int64_t rest = (in_token - head * s.vectors_per_head.divisor) * (int64_t)sizeof(V);

        to[u] = token * s.destination_token_stride + head * s.destination_head_stride + rest;
        data[u] = V{};
        if (!ZERO && v < vectors)
            data[u] = load_once<V>(source + token * s.source_token_stride + head * s.source_head_stride + rest);
    }
#pragma unroll
    for (int u = 0; u < PAGE_UNROLL; u++) {
        if (first + u * KVP_BLOCK_THREADS < vectors)
            store<V>(destination + to[u], data[u]);
    }
}

/* Block `item` of a list of copies: entry item / blocks, part item % blocks. Reports to `errors` once an entry. */
template <typename V>
__device__ __forceinline__ void copy_page_part(const struct page_shape &s, const char *source, char *destination,
                                               const struct kvp_page_copy *copies, uint32_t first_entry, uint32_t item,
                                               struct kvp_error_ring *errors)
{
    uint32_t entry = quotient(item, s.blocks), part = item - entry * s.blocks.divisor;
    struct kvp_page_copy copy = copies[first_entry + entry];
    bool bad_source = copy.source >= 0 && (uint32_t)copy.source >= s.source_pages;

    if (copy.source < 0 || copy.destination < 0)
        return;
    if (bad_source || (uint32_t)copy.destination >= s.destination_pages) {
        if (part == 0 && threadIdx.x == 0)
            report(errors, KVP_BAD_PAGE, first_entry + entry, bad_source ? copy.source : copy.destination);
        return;
    }
    move_page_part<V, false>(s, source + copy.source * s.source_page_stride,
                             destination + copy.destination * s.destination_page_stride,
                             min(copy.tokens, s.page_tokens), part);
}

#endif
