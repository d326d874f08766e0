/**
 * The index functions over a batch without a call: lengths, CSR page table, batch indices, from the published table.
 * What kvp_get_seq_lens, kvp_get_page_table and kvp_get_batch_indices answer by call; each row is read as one state.
 */
#include "internal.h"

#define CHUNK_PAGES 64u /* ids read at a time where a token's page is wanted */

enum kvp_status kvp_seq_lens(const struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs, uint32_t *ret_tokens)
{
    for (uint32_t i = 0; i < n; i++) {
        enum kvp_status status = kvp_seq_len(pool, seqs[i], &ret_tokens[i]);

        if (status != KVP_OK)
            return status;
    }
    return KVP_OK;
}

static enum kvp_status refuse_length(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t row_pages,
                                     uint64_t tokens)
{
    return kvp_fail(KVP_EINVAL, "sequence %u.%u has pages for %llu tokens, not %llu", seq.slot, seq.generation,
                    (unsigned long long)row_pages * pool->info->spec.layout.page_tokens, (unsigned long long)tokens);
}

enum kvp_status kvp_page_table(const struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                               const uint32_t *tokens, uint32_t max_indices, int32_t *ret_kv_indptr,
                               int32_t *ret_kv_indices, int32_t *ret_kv_last_page_len, uint32_t *reterr_indices)
{
    uint32_t page = pool->info->spec.layout.page_tokens, at = 0;

    ret_kv_indptr[0] = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t length = tokens != NULL ? tokens[i] : 0, pages, row_pages, room;
        enum kvp_status status = tokens != NULL ? KVP_OK : kvp_seq_len(pool, seqs[i], &length);

        if (status != KVP_OK)
            return status;
        pages = length / page + (length % page != 0);
        room = at < max_indices ? max_indices - at : 0;
        status = kvp_row(pool, seqs[i], pages < room ? pages : room, room > 0 ? ret_kv_indices + at : NULL, &row_pages);
        if (status != KVP_OK)
            return status;
        if (row_pages < pages)
            return refuse_length(pool, seqs[i], row_pages, length);
        if (pages > INT32_MAX - at)
            return kvp_fail(KVP_EINVAL, "the page table of %u sequences has over %d ids", n, INT32_MAX);
        at += pages;
        ret_kv_indptr[i + 1] = (int32_t)at;
        ret_kv_last_page_len[i] = length > 0 ? (int32_t)((length - 1) % page + 1) : 0;
    }
    if (at <= max_indices)
        return KVP_OK;
    if (reterr_indices != NULL)
        *reterr_indices = at;
    return kvp_fail(KVP_ELIMIT, "the page table has %u ids; there is room for %u", at, max_indices);
}

/* The slots of `tokens` tokens from position `first` on. @param ret_slots  NULL: only checked */
static enum kvp_status fill_slots(const struct kvp_pool *pool, struct kvp_seq seq, uint64_t first, uint32_t tokens,
                                  int64_t *ret_slots)
{
    uint32_t page = pool->info->spec.layout.page_tokens, row_pages = 0, have = 0;
    int32_t ids[CHUNK_PAGES];

    for (uint64_t position = first; position < first + tokens; position++) {
        uint32_t wanted = (uint32_t)(position / page);

        if (wanted >= have) {
            enum kvp_status status = kvp_table_ids(pool, seq, wanted, CHUNK_PAGES, ids, &row_pages);

            if (status != KVP_OK)
                return status;
            have = wanted + CHUNK_PAGES;
        }
        if (wanted >= row_pages)
            return refuse_length(pool, seq, row_pages, first + tokens);
        if (ret_slots != NULL)
            *ret_slots++ = (int64_t)ids[wanted - (have - CHUNK_PAGES)] * page + (int64_t)(position % page);
    }
    return KVP_OK;
}

enum kvp_status kvp_batch_indices(const struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                  const uint32_t *tokens, const uint32_t *start, int32_t *ret_batch_indices,
                                  int32_t *ret_positions, int64_t *ret_slots)
{
    uint64_t at = 0;

    for (uint32_t i = 0; i < n; i++) {
        uint32_t first = start != NULL ? start[i] : 0;
        enum kvp_status status = start != NULL ? KVP_OK : kvp_seq_len(pool, seqs[i], &first);

        if (status == KVP_OK && first > KVP_SEQUENCE_TOKENS_MAX - (uint64_t)tokens[i])
            status = kvp_fail(KVP_EINVAL, "%u tokens behind %u; a sequence has at most %d", tokens[i], first,
                              KVP_SEQUENCE_TOKENS_MAX);
        if (status == KVP_OK)
            status = fill_slots(pool, seqs[i], first, tokens[i], ret_slots != NULL ? ret_slots + at : NULL);
        if (status != KVP_OK)
            return status;
        for (uint32_t k = 0; k < tokens[i]; k++, at++) {
            if (ret_batch_indices != NULL)
                ret_batch_indices[at] = (int32_t)i;
            if (ret_positions != NULL)
                ret_positions[at] = (int32_t)(first + k);
        }
    }
    return KVP_OK;
}
