/**
 * The index functions by call: lengths, CSR page table, batch indices; for those who map no table, or want them in a
 * registered buffer by the executor's kernel. What the reply lists is checked for its sizes before it is copied.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

enum kvp_status kvp_get_seq_lens(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs, uint32_t *ret_tokens)
{
    Kvpool__V1__GetSeqLensRequest request = KVPOOL__V1__GET_SEQ_LENS_REQUEST__INIT;
    const Kvpool__V1__GetSeqLensReply *reply;
    enum kvp_status status = kvp_check_batch("kvp_get_seq_lens", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, seqs, wire);
    request.pool = (char *)pool->info->spec.name;
    request.n_seqs = n;
    request.seqs = wire;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_GET_SEQ_LENS, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__GetSeqLensReply *)rpc.reply;
        status = kvp_rpc_check_count("lengths", reply->n_lengths, n);
        if (status == KVP_OK)
            memcpy(ret_tokens, reply->lengths, n * sizeof(*ret_tokens));
    }
    kvp_rpc_release(&rpc);
    return status;
}

static enum kvp_status take_page_table(const Kvpool__V1__GetPageTableReply *reply, uint32_t n, uint32_t max_indices,
                                       int32_t *ret_kv_indptr, int32_t *ret_kv_indices, int32_t *ret_kv_last_page_len,
                                       uint32_t *reterr_indices)
{
    if (reply->n_kv_indptr != (size_t)n + 1 || reply->n_kv_last_page_len != n || reply->kv_indptr[n] < 0 ||
        reply->n_kv_indices != (size_t)reply->kv_indptr[n])
        return kvp_fail(KVP_EPROTO, "the reply's page table of %u sequences is not whole", n);
    if (reply->n_kv_indices > max_indices) {
        if (reterr_indices != NULL)
            *reterr_indices = (uint32_t)reply->n_kv_indices;
        return kvp_fail(KVP_ELIMIT, "the page table has %zu ids; there is room for %u", reply->n_kv_indices,
                        max_indices);
    }
    memcpy(ret_kv_indptr, reply->kv_indptr, ((size_t)n + 1) * sizeof(*ret_kv_indptr));
    memcpy(ret_kv_last_page_len, reply->kv_last_page_len, n * sizeof(*ret_kv_last_page_len));
    if (reply->n_kv_indices > 0)
        memcpy(ret_kv_indices, reply->kv_indices, reply->n_kv_indices * sizeof(*ret_kv_indices));
    return KVP_OK;
}

enum kvp_status kvp_get_page_table(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                   const uint32_t *tokens, uint32_t max_indices, int32_t *ret_kv_indptr,
                                   int32_t *ret_kv_indices, int32_t *ret_kv_last_page_len, uint32_t *reterr_indices)
{
    Kvpool__V1__GetPageTableRequest request = KVPOOL__V1__GET_PAGE_TABLE_REQUEST__INIT;
    enum kvp_status status = kvp_check_batch("kvp_get_page_table", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, seqs, wire);
    request.pool = (char *)pool->info->spec.name;
    request.n_seqs = n;
    request.seqs = wire;
    request.n_lengths = tokens != NULL ? n : 0;
    request.lengths = (uint32_t *)tokens;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_GET_PAGE_TABLE, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK)
        status = take_page_table((const Kvpool__V1__GetPageTableReply *)rpc.reply, n, max_indices, ret_kv_indptr,
                                 ret_kv_indices, ret_kv_last_page_len, reterr_indices);
    kvp_rpc_release(&rpc);
    return status;
}

/* ---- batch indices ----------------------------------------------------------------------------------------------- */

enum { OUTPUT_BATCH_INDICES, OUTPUT_POSITIONS, OUTPUT_SLOTS, OUTPUT_INDPTR, OUTPUT_INDICES, OUTPUT_LAST, OUTPUT_LENS };

static void fill_request(Kvpool__V1__GetBatchIndicesRequest *request, const struct kvp_pool *pool, uint32_t n,
                         uint64_t *wire, const uint32_t *tokens, const uint32_t *start)
{
    request->pool = (char *)pool->info->spec.name;
    request->n_seqs = request->n_tokens = n;
    request->seqs = wire;
    request->tokens = (uint32_t *)tokens;
    request->n_start = start != NULL ? n : 0;
    request->start = (uint32_t *)start;
}

enum kvp_status kvp_get_batch_indices(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                      const uint32_t *tokens, const uint32_t *start, int32_t *ret_batch_indices,
                                      int32_t *ret_positions, int64_t *ret_slots)
{
    Kvpool__V1__GetBatchIndicesRequest request = KVPOOL__V1__GET_BATCH_INDICES_REQUEST__INIT;
    const Kvpool__V1__GetBatchIndicesReply *reply;
    enum kvp_status status = kvp_check_batch("kvp_get_batch_indices", n);
    uint64_t wire[KVP_BATCH_MAX], nnz = 0;
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, seqs, wire);
    fill_request(&request, pool, n, wire, tokens, start);
    for (uint32_t i = 0; i < n; i++)
        nnz += tokens[i];
    request.wanted = (ret_batch_indices != NULL ? 1u << OUTPUT_BATCH_INDICES : 0) |
                     (ret_positions != NULL ? 1u << OUTPUT_POSITIONS : 0) |
                     (ret_slots != NULL ? 1u << OUTPUT_SLOTS : 0);
    status =
        kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base, NULL, 0, &rpc);
    if (status != KVP_OK)
        goto release;
    reply = (const Kvpool__V1__GetBatchIndicesReply *)rpc.reply;
    if ((ret_batch_indices != NULL && reply->n_batch_indices != nnz) ||
        (ret_positions != NULL && reply->n_positions != nnz) || (ret_slots != NULL && reply->n_slots != nnz)) {
        status = kvp_fail(KVP_EPROTO, "the reply's indices are not those of %llu tokens", (unsigned long long)nnz);
        goto release;
    }
    if (nnz > 0 && ret_batch_indices != NULL)
        memcpy(ret_batch_indices, reply->batch_indices, nnz * sizeof(*ret_batch_indices));
    if (nnz > 0 && ret_positions != NULL)
        memcpy(ret_positions, reply->positions, nnz * sizeof(*ret_positions));
    if (nnz > 0 && ret_slots != NULL)
        memcpy(ret_slots, reply->slots, nnz * sizeof(*ret_slots));

release:
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_get_batch_indices_into(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                           const uint32_t *tokens, const uint32_t *start, uint32_t buffer,
                                           const struct kvp_index_outputs *outputs, struct kvp_point *ret_done)
{
    Kvpool__V1__GetBatchIndicesRequest request = KVPOOL__V1__GET_BATCH_INDICES_REQUEST__INIT;
    struct {
        uint64_t from, *to;
    } offsets[] = {
        [OUTPUT_BATCH_INDICES] = {outputs->batch_indices, &request.batch_indices_offset},
        [OUTPUT_POSITIONS] = {outputs->positions, &request.positions_offset},
        [OUTPUT_SLOTS] = {outputs->slots, &request.slots_offset},
        [OUTPUT_INDPTR] = {outputs->kv_indptr, &request.kv_indptr_offset},
        [OUTPUT_INDICES] = {outputs->kv_indices, &request.kv_indices_offset},
        [OUTPUT_LAST] = {outputs->kv_last_page_len, &request.kv_last_page_len_offset},
        [OUTPUT_LENS] = {outputs->seq_lens, &request.seq_lens_offset},
    };
    enum kvp_status status = kvp_check_batch("kvp_get_batch_indices_into", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct kvp_rpc rpc;

    for (size_t i = 0; i < sizeof(offsets) / sizeof(offsets[0]); i++) {
        if (offsets[i].from == UINT64_MAX)
            continue;
        *offsets[i].to = offsets[i].from;
        request.wanted |= 1u << i;
    }
    if (status == KVP_OK && (buffer == 0 || request.wanted == 0))
        status = kvp_fail(KVP_EINVAL, "kvp_get_batch_indices_into wants a buffer and an output");
    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, seqs, wire);
    fill_request(&request, pool, n, wire, tokens, start);
    request.buffer = buffer;
    status =
        kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_GET_BATCH_INDICES, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        const Kvpool__V1__GetBatchIndicesReply *reply = (const Kvpool__V1__GetBatchIndicesReply *)rpc.reply;

        *ret_done = (struct kvp_point){.timeline = reply->timeline, .value = reply->value};
    }
    kvp_rpc_release(&rpc);
    return status;
}
