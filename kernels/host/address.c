/**
 * From a token's number to its place: see address.h.
 *
 * One loop for each way of addressing and each width of the indices, made from inline functions by constant arguments.
 * A token is reported for the first thing that is wrong with it, in the order: batch index, a position that no sequence
 * can have, sequence slot, row version, position, page id. The device's kernels check in the same order.
 */
#include "address.h"

#define INLINE static inline __attribute__((always_inline))

void kvp_report(struct kvp_error_ring *ring, enum kvp_violation kind, int64_t token, int64_t value)
{
    if (ring == NULL)
        return;
    uint64_t entry = __atomic_fetch_add(&ring->count, 1, __ATOMIC_RELAXED);
    if (entry < ring->capacity)
        ring->records[entry] = (struct kvp_error_record){.kind = kind, .token = token, .value = value};
}

uint64_t kvp_address_tokens(const struct kvp_address *at)
{
    int64_t tokens = at->nnz;
    if (at->nnz_device != NULL) {
        int64_t counted = kvp_index_load(at->nnz_device, at->index_bits);
        tokens = counted < tokens ? counted : tokens;
    }
    return tokens > 0 ? (uint64_t)tokens : 0;
}

INLINE struct kvp_place no_place(void)
{
    return (struct kvp_place){.page = KVP_NO_PLACE};
}

INLINE struct kvp_place refuse(const struct kvp_pool_shape *shape, enum kvp_violation kind, uint64_t token,
                               int64_t value)
{
    kvp_report(shape->errors, kind, (int64_t)token, value);
    return no_place();
}

INLINE struct kvp_place place_on_page(const struct kvp_pool_shape *shape, uint64_t token, int64_t page, uint32_t offset)
{
    if (page < 0 || page >= shape->pages)
        return refuse(shape, KVP_BAD_PAGE, token, page);
    return (struct kvp_place){.page = (uint32_t)page, .offset = offset};
}

/* CSR and TABLE: the sequence's page ids are ids[first…first + count). */
INLINE struct kvp_place place_in_list(const struct kvp_pool_shape *shape, uint64_t token, const void *ids,
                                      uint32_t bits, int64_t first, int64_t count, uint32_t position)
{
    uint32_t nth = position / shape->page_tokens;
    if (first < 0 || nth >= count)
        return refuse(shape, KVP_BAD_POSITION, token, position);
    return place_on_page(shape, token, kvp_index_at(ids, bits, first + nth), position % shape->page_tokens);
}

INLINE struct kvp_place place_in_row(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint64_t token,
                                     int64_t b, uint32_t position)
{
    int64_t slot = at->seq_slots[b];
    if (slot < 0)
        return no_place();
    if (slot >= at->table.max_sequences)
        return refuse(shape, KVP_BAD_SLOT, token, slot);
    const struct kvp_table_head *head = at->table.heads == NULL ? NULL : &at->table.heads[slot];
    if (at->row_versions != NULL && head != NULL) {
        uint32_t version = __atomic_load_n(&head->version, __ATOMIC_ACQUIRE);
        if (version != at->row_versions[b])
            return refuse(shape, KVP_BAD_VERSION, token, version);
    }
    uint32_t count = at->table.row_pages;
    if (at->row_counts != NULL)
        count = at->row_counts[b];
    else if (head != NULL)
        count = __atomic_load_n(&head->row_pages, __ATOMIC_ACQUIRE);
    if (count > at->table.row_pages)
        count = at->table.row_pages;
    uint32_t nth = position / shape->page_tokens;
    if (nth >= count)
        return refuse(shape, KVP_BAD_POSITION, token, position);
    const int32_t *row = (const int32_t *)((const char *)at->table.rows + (uint64_t)slot * at->table.row_stride);
    return place_on_page(shape, token, __atomic_load_n(&row[nth], __ATOMIC_RELAXED), position % shape->page_tokens);
}

INLINE void resolve_slots(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint32_t bits,
                          uint64_t first, uint32_t n, struct kvp_place *ret_places)
{
    for (uint32_t i = 0; i < n; i++) {
        int64_t slot = kvp_index_at(at->slot_mapping, bits, (int64_t)(first + i));
        if (slot < 0) {
            ret_places[i] = no_place();
            continue;
        }
        /* most slots fit in 32 bits, whose division costs a third */
        if (slot <= UINT32_MAX) {
            uint32_t small = (uint32_t)slot;
            ret_places[i] = place_on_page(shape, first + i, small / shape->page_tokens, small % shape->page_tokens);
        } else {
            ret_places[i] =
                place_on_page(shape, first + i, slot / shape->page_tokens, (uint32_t)(slot % shape->page_tokens));
        }
    }
}

/* The place of sequence b's token at `position`. */
INLINE struct kvp_place place_of(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint32_t bits,
                                 uint64_t token, int64_t b, int64_t position)
{
    if (b < 0 || position < 0)
        return no_place();
    if (b >= at->batch)
        return refuse(shape, KVP_BAD_BATCH, token, b);
    if (position >= INT32_MAX)
        return refuse(shape, KVP_BAD_POSITION, token, position);
    if (at->kind == KVP_ADDRESS_ROWS)
        return place_in_row(at, shape, token, b, (uint32_t)position);
    if (at->kind == KVP_ADDRESS_TABLE)
        return place_in_list(shape, token, at->page_table, bits, b * at->page_table_stride, at->page_table_pages,
                             (uint32_t)position);
    int64_t first = kvp_index_at(at->kv_indptr, bits, b);
    int64_t count = kvp_wrap_sub(kvp_index_at(at->kv_indptr, bits, b + 1), first);
    return place_in_list(shape, token, at->kv_indices, bits, first, count, (uint32_t)position);
}

INLINE void resolve_listed(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint32_t bits,
                           uint64_t first, uint32_t n, struct kvp_place *ret_places)
{
    for (uint32_t i = 0; i < n; i++) {
        int64_t j = (int64_t)(first + i);
        ret_places[i] = place_of(at, shape, bits, (uint64_t)j, kvp_index_at(at->batch_indices, bits, j),
                                 kvp_index_at(at->positions, bits, j));
    }
}

/* The sequence whose range of append_indptr holds token j, or `batch` where none does. */
INLINE int64_t sequence_of(const struct kvp_address *at, uint32_t bits, int64_t j)
{
    int64_t low = 0, high = at->batch;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (kvp_index_at(at->append_indptr, bits, middle + 1) <= j)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Token by token in order, so the sequence is searched for only where the range before is left. */
INLINE void resolve_appended(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint32_t bits,
                             uint64_t first, uint32_t n, struct kvp_place *ret_places)
{
    int64_t b = 0, from = 0, to = 0;
    for (uint32_t i = 0; i < n; i++) {
        int64_t j = (int64_t)(first + i);
        if (at->append_indptr == NULL) {
            b = from = j;
        } else if (j >= to || j < from) {
            b = sequence_of(at, bits, j);
            if (b < at->batch) {
                from = kvp_index_at(at->append_indptr, bits, b);
                to = kvp_index_at(at->append_indptr, bits, b + 1);
            }
        }
        if (b >= at->batch || j < from) {
            ret_places[i] = no_place();
            continue;
        }
        int64_t start = kvp_index_at(at->start_lengths, bits, b);
        ret_places[i] =
            start < 0 ? no_place() : place_of(at, shape, bits, (uint64_t)j, b, kvp_wrap_add(start, j - from));
    }
}

INLINE void resolve(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint32_t bits, uint64_t first,
                    uint32_t n, struct kvp_place *ret_places)
{
    if (at->kind == KVP_ADDRESS_SLOTS)
        resolve_slots(at, shape, bits, first, n, ret_places);
    else if (at->kind == KVP_ADDRESS_ROWS && at->batch_indices == NULL)
        resolve_appended(at, shape, bits, first, n, ret_places);
    else
        resolve_listed(at, shape, bits, first, n, ret_places);
}

void kvp_resolve(const struct kvp_address *at, const struct kvp_pool_shape *shape, uint64_t first, uint32_t n,
                 struct kvp_place *ret_places)
{
    if (at->index_bits == 64)
        resolve(at, shape, 64, first, n, ret_places);
    else
        resolve(at, shape, 32, first, n, ret_places);
}
