/**
 * From a token's number to its place: the four forms of struct kvp_address.
 *
 * find_place reads at most three dependent words for a token (batch index, its range of ids, the id). All lanes that
 * move one token ask for the same words, which a warp's load answers once. It checks everything that it reads before it
 * is used as an index.
 */
#ifndef KVP_ADDRESS_CUH
#define KVP_ADDRESS_CUH

#include "device.cuh"

/* struct kvp_address as the kernel wants it */
struct address {
    struct kvp_address at;
    struct fast_div page_tokens;
    uint32_t pages;
    bool wide;
};

static inline struct address address_of(const struct kvp_address *at, uint32_t pages, uint32_t page_tokens)
{
    struct address a = {*at, fast_div_of(page_tokens), pages, at->index_bits == 64};

    return a;
}

struct place {
    int32_t page;    /* in range, or −1: skip the token */
    uint32_t offset; /* token within the page */
    uint32_t kind;   /* where page is −1: the violation, or 0 for padding */
    int64_t value;
};

__device__ __forceinline__ struct place no_place(uint32_t kind, int64_t value)
{
    return {-1, 0, kind, value};
}

/* The number of tokens that count. */
__device__ __forceinline__ int64_t token_count(const struct address &a)
{
    int64_t n = a.at.nnz;

    if (a.at.nnz_device) {
        int64_t given = load_index(a.at.nnz_device, 0, a.wide);

        n = given < n ? given : n;
    }
    return n;
}

/* The sequence b whose range [indptr[b], indptr[b + 1]) holds j, or −1. */
__device__ __forceinline__ int64_t sequence_of(const struct address &a, int64_t j)
{
    int64_t low = 0, high = a.at.batch; /* the answer is in [low, high) */

    if (!a.at.append_indptr)
        return j < a.at.batch ? j : -1;
    if (a.at.batch == 0 || j < load_index(a.at.append_indptr, 0, a.wide) ||
        j >= load_index(a.at.append_indptr, a.at.batch, a.wide))
        return -1;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;

        if (load_index(a.at.append_indptr, middle, a.wide) <= j)
            low = middle;
        else
            high = middle;
    }
    return low;
}

__device__ __forceinline__ struct place place_in_row(const struct address &a, int64_t b, int64_t position, uint32_t k,
                                                     uint32_t offset)
{
    const struct kvp_rows &table = a.at.table;
    int32_t slot = a.at.seq_slots[b];
    uint32_t ids = table.row_pages;
    int32_t page;

    if (slot < 0)
        return no_place(0, 0);
    if ((uint32_t)slot >= table.max_sequences)
        return no_place(KVP_BAD_SLOT, slot);
    if (a.at.row_counts)
        ids = min(ids, a.at.row_counts[b]);
    if (table.heads && (a.at.row_versions || !a.at.row_counts)) {
        uint4 head = *reinterpret_cast<const uint4 *>(&table.heads[slot]); /* version, row_pages, length, generation */

        if (a.at.row_versions && head.x != a.at.row_versions[b])
            return no_place(KVP_BAD_VERSION, head.x);
        if (!a.at.row_counts)
            ids = min(ids, head.y);
    }
    if (k >= ids)
        return no_place(KVP_BAD_POSITION, position);
    page = reinterpret_cast<const int32_t *>(reinterpret_cast<const char *>(table.rows) +
                                             (uint64_t)slot * table.row_stride)[k];
    if ((uint32_t)page >= a.pages)
        return no_place(KVP_BAD_PAGE, page);
    return {page, offset, 0, 0};
}

__device__ __forceinline__ struct place find_place(const struct address &a, int64_t j)
{
    int64_t b, position, id;
    uint32_t k, offset;

    if (a.at.kind == KVP_ADDRESS_SLOTS) {
        int64_t slot = load_index(a.at.slot_mapping, j, a.wide);

        if (slot < 0)
            return no_place(0, 0);
        if (slot < INT32_MAX) {
            k = quotient((uint32_t)slot, a.page_tokens);
            offset = (uint32_t)slot - k * a.page_tokens.divisor;
        } else if (slot < (int64_t)a.pages * a.page_tokens.divisor) {
            k = (uint32_t)((uint64_t)slot / a.page_tokens.divisor);
            offset = (uint32_t)((uint64_t)slot % a.page_tokens.divisor);
        } else {
            return no_place(KVP_BAD_PAGE, slot / a.page_tokens.divisor);
        }
        if (k >= a.pages)
            return no_place(KVP_BAD_PAGE, k);
        return {(int32_t)k, offset, 0, 0};
    }
    if (a.at.batch_indices) {
        b = load_index(a.at.batch_indices, j, a.wide);
        position = load_index(a.at.positions, j, a.wide);
    } else {
        b = sequence_of(a, j);
        if (b < 0)
            return no_place(0, 0);
        position = load_index(a.at.start_lengths, b, a.wide);
        if (position >= 0)
            position += a.at.append_indptr ? j - load_index(a.at.append_indptr, b, a.wide) : 0;
    }
    if (b < 0 || position < 0)
        return no_place(0, 0);
    if (b >= a.at.batch)
        return no_place(KVP_BAD_BATCH, b);
    if (position >= INT32_MAX)
        return no_place(KVP_BAD_POSITION, position);
    k = quotient((uint32_t)position, a.page_tokens);
    offset = (uint32_t)position - k * a.page_tokens.divisor;
    if (a.at.kind == KVP_ADDRESS_ROWS)
        return place_in_row(a, b, position, k, offset);
    if (a.at.kind == KVP_ADDRESS_CSR) {
        int64_t first = load_index(a.at.kv_indptr, b, a.wide), end = load_index(a.at.kv_indptr, b + 1, a.wide);

        if (first < 0 || k >= end - first)
            return no_place(KVP_BAD_POSITION, position);
        id = load_index(a.at.kv_indices, first + k, a.wide);
    } else {
        if (k >= a.at.page_table_pages)
            return no_place(KVP_BAD_POSITION, position);
        id = load_index(a.at.page_table, b * a.at.page_table_stride + k, a.wide);
    }
    if (id < 0 || id >= a.pages)
        return no_place(KVP_BAD_PAGE, id);
    return {(int32_t)id, offset, 0, 0};
}

#endif
