/**
 * Calls on sequences: open, advance, fork, transfer, close, list.
 *
 * Each packs its batch into the parallel arrays of the message, on the stack (KVP_BATCH_MAX entries of 8 bytes), and
 * keeps from the answer what reading without a call needs: for each slot the row's version and what is reserved, so
 * that the session's own progress word can be believed (table.c).
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- arrays ------------------------------------------------------------------------------------------------------ */

enum kvp_status kvp_check_batch(const char *call, uint32_t n)
{
    if (n == 0 || n > KVP_BATCH_MAX)
        return kvp_fail(KVP_EINVAL, "%s of %u sequences; a batch has 1..%d", call, n, KVP_BATCH_MAX);
    return KVP_OK;
}

void kvp_seqs_to_wire(uint32_t n, const struct kvp_seq *seqs, uint64_t *wire)
{
    for (uint32_t i = 0; i < n; i++)
        wire[i] = kvp_seq_to_wire(seqs[i]);
}

struct after_arrays {
    uint32_t timelines[KVP_BATCH_MAX];
    uint64_t values[KVP_BATCH_MAX];
    uint32_t n;
};

/* One pair for the whole batch where all are the same. */
static void after_to_wire(uint32_t n, const struct kvp_point *after, struct after_arrays *arrays)
{
    bool same = true;

    arrays->n = 0;
    if (after == NULL)
        return;
    for (uint32_t i = 0; i < n; i++) {
        arrays->timelines[i] = after[i].timeline;
        arrays->values[i] = after[i].value;
        same = same && after[i].timeline == after[0].timeline && after[i].value == after[0].value;
    }
    arrays->n = same ? 1 : n;
}

/* The four arrays of owed copies, as Advance and Fork answer them. */
struct copy_arrays {
    size_t n_seqs, n_sources, n_destinations, n_tokens;
    const uint32_t *sources, *destinations, *tokens;
};

static enum kvp_status take_copies(const struct copy_arrays *from, uint32_t n, struct kvp_page_copy *ret_copies,
                                   uint32_t *ret_n_copies)
{
    if (from->n_seqs > n || from->n_sources != from->n_seqs || from->n_destinations != from->n_seqs ||
        from->n_tokens != from->n_seqs)
        return kvp_fail(KVP_EPROTO, "the reply lists %zu page copies of %u sequences", from->n_seqs, n);
    if (ret_copies == NULL || ret_n_copies == NULL)
        return KVP_OK;
    for (size_t i = 0; i < from->n_seqs; i++)
        ret_copies[i] = (struct kvp_page_copy){.source = (int32_t)from->sources[i],
                                               .destination = (int32_t)from->destinations[i],
                                               .tokens = from->tokens[i]};
    *ret_n_copies = (uint32_t)from->n_seqs;
    return KVP_OK;
}

/*
 * What an answer says of a row. Answers may be taken in another order than they were given: a later version is the later
 * state, and under one version a row only grows. 0: nothing was said yet; versions wrap.
 */
static void remember(struct kvp_pool *pool, uint32_t slot, uint32_t version, uint32_t reserved)
{
    uint64_t said = KVP_PROGRESS_WORD(version, reserved), known;

    if (slot >= pool->header->max_sequences)
        return;
    known = atomic_load_explicit(&pool->own[slot], memory_order_relaxed);
    do {
        int32_t later = (int32_t)(version - KVP_PROGRESS_VERSION(known));

        if (known != 0 && (later < 0 || (later == 0 && reserved <= KVP_PROGRESS_TOKENS(known))))
            return;
    } while (!atomic_compare_exchange_weak_explicit(&pool->own[slot], &known, said, memory_order_release,
                                                    memory_order_relaxed));
}

/* ---- open -------------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_seq_open(struct kvp_pool *pool, uint32_t n, const uint64_t *keys, unsigned flags,
                             struct kvp_seq *ret_seqs)
{
    return kvp_seq_open_blocks(pool, n, keys, flags, NULL, ret_seqs, NULL);
}

enum kvp_status kvp_seq_open_blocks(struct kvp_pool *pool, uint32_t n, const uint64_t *keys, unsigned flags,
                                    const struct kvp_blocks *blocks, struct kvp_seq *ret_seqs, uint32_t *ret_cached)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__Blocks wire;
    const Kvpool__V1__OpenSequencesReply *reply;
    enum kvp_status status = kvp_check_batch("kvp_seq_open", n);
    struct kvp_rpc rpc;

    if (status == KVP_OK && (flags & ~(unsigned)KVP_DURABLE) != 0)
        status = kvp_fail(KVP_EINVAL, "flags 0x%x are none of kvp_seq_open", flags);
    if (status != KVP_OK)
        return status;
    request.pool = (char *)pool->info->spec.name;
    request.n_keys = n;
    request.keys = (uint64_t *)keys;
    request.durable = (flags & KVP_DURABLE) != 0;
    request.blocks = kvp_blocks_to_wire(n, blocks, &wire);
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_OPEN_SEQUENCES, &request.base, NULL, 0, &rpc);
    if (status != KVP_OK)
        goto release;
    reply = (const Kvpool__V1__OpenSequencesReply *)rpc.reply;
    status = kvp_rpc_check_count("sequences", reply->n_seqs, n);
    if (status == KVP_OK)
        status = kvp_rpc_check_count("versions", reply->n_versions, n);
    if (status == KVP_OK)
        status = kvp_rpc_check_count("reservations", reply->n_reserved, n);
    if (status == KVP_OK && blocks != NULL)
        status = kvp_rpc_check_count("cached prefixes", reply->n_cached, n);
    if (status != KVP_OK)
        goto release;
    for (uint32_t i = 0; i < n; i++) {
        if (ret_cached != NULL)
            ret_cached[i] = blocks != NULL ? reply->cached[i] : 0;
        ret_seqs[i] = kvp_seq_from_wire(reply->seqs[i]);
        remember(pool, ret_seqs[i].slot, reply->versions[i], reply->reserved[i]);
    }

release:
    kvp_rpc_release(&rpc);
    return status;
}

/* ---- advance ----------------------------------------------------------------------------------------------------- */

/* An advance under way keeps what its answer is about. */
struct kvp_advance {
    struct kvp_pool *pool;
    struct kvp_rpc rpc;
    uint32_t n;
    uint32_t slots[KVP_BATCH_MAX];
    uint32_t reserved[KVP_BATCH_MAX];
};

static enum kvp_status begin(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs, const uint32_t *reserved,
                             const struct kvp_blocks *blocks, const struct kvp_point *after, unsigned flags,
                             struct kvp_advance *advance)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    Kvpool__V1__Blocks blocks_wire;
    enum kvp_status status = kvp_check_batch("kvp_advance", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct after_arrays points;

    if (status == KVP_OK && (flags & ~(unsigned)KVP_TRUNCATE) != 0)
        status = kvp_fail(KVP_EINVAL, "flags 0x%x are none of kvp_advance", flags);
    if (status != KVP_OK)
        return status;
    advance->pool = pool;
    advance->n = n;
    for (uint32_t i = 0; i < n; i++) {
        advance->slots[i] = seqs[i].slot;
        advance->reserved[i] = reserved[i];
    }
    kvp_seqs_to_wire(n, seqs, wire);
    after_to_wire(n, after, &points);
    request.pool = (char *)pool->info->spec.name;
    request.n_seqs = n;
    request.seqs = wire;
    request.n_reserved = n;
    request.reserved = advance->reserved;
    request.truncate = (flags & KVP_TRUNCATE) != 0;
    request.n_after_timelines = request.n_after_values = points.n;
    request.after_timelines = points.timelines;
    request.after_values = points.values;
    request.blocks = kvp_blocks_to_wire(n, blocks, &blocks_wire);
    return kvp_rpc_begin(pool->client, pool, KVPOOL__V1__METHOD__METHOD_ADVANCE, &request.base, NULL, 0, &advance->rpc);
}

static enum kvp_status wait_for(struct kvp_advance *advance, struct kvp_page_copy *ret_copies, uint32_t *ret_n_copies,
                                uint32_t *reterr_short)
{
    const Kvpool__V1__AdvanceReply *reply;
    enum kvp_status status = kvp_rpc_wait(advance->pool->client, &advance->rpc);

    if (status == KVP_ENOPAGES && reterr_short != NULL)
        *reterr_short = (uint32_t)advance->rpc.missing;
    if (status != KVP_OK)
        return status;
    reply = (const Kvpool__V1__AdvanceReply *)advance->rpc.reply;
    status = kvp_rpc_check_count("versions", reply->n_versions, advance->n);
    if (status == KVP_OK) {
        const struct copy_arrays copies = {reply->n_copy_seqs,   reply->n_copy_sources, reply->n_copy_destinations,
                                           reply->n_copy_tokens, reply->copy_sources,   reply->copy_destinations,
                                           reply->copy_tokens};

        status = take_copies(&copies, advance->n, ret_copies, ret_n_copies);
    }
    for (uint32_t i = 0; status == KVP_OK && i < advance->n; i++)
        remember(advance->pool, advance->slots[i], reply->versions[i], advance->reserved[i]);
    return status;
}

enum kvp_status kvp_advance(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs, const uint32_t *reserved,
                            const struct kvp_point *after, unsigned flags, struct kvp_page_copy *ret_copies,
                            uint32_t *ret_n_copies, uint32_t *reterr_short)
{
    return kvp_advance_blocks(pool, n, seqs, reserved, NULL, after, flags, ret_copies, ret_n_copies, reterr_short);
}

enum kvp_status kvp_advance_blocks(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                   const uint32_t *reserved, const struct kvp_blocks *blocks,
                                   const struct kvp_point *after, unsigned flags, struct kvp_page_copy *ret_copies,
                                   uint32_t *ret_n_copies, uint32_t *reterr_short)
{
    struct kvp_advance advance;
    enum kvp_status status = begin(pool, n, seqs, reserved, blocks, after, flags, &advance);

    if (status != KVP_OK)
        return status;
    status = wait_for(&advance, ret_copies, ret_n_copies, reterr_short);
    kvp_rpc_release(&advance.rpc);
    return status;
}

enum kvp_status kvp_advance_begin(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                  const uint32_t *reserved, const struct kvp_point *after, unsigned flags,
                                  struct kvp_advance **ret_advance)
{
    return kvp_advance_blocks_begin(pool, n, seqs, reserved, NULL, after, flags, ret_advance);
}

enum kvp_status kvp_advance_blocks_begin(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                         const uint32_t *reserved, const struct kvp_blocks *blocks,
                                         const struct kvp_point *after, unsigned flags,
                                         struct kvp_advance **ret_advance)
{
    struct kvp_advance *advance = malloc(sizeof(*advance));
    enum kvp_status status;

    if (advance == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for an advance");
    status = begin(pool, n, seqs, reserved, blocks, after, flags, advance);
    if (status != KVP_OK) {
        free(advance);
        return status;
    }
    *ret_advance = advance;
    return KVP_OK;
}

enum kvp_status kvp_advance_wait(struct kvp_advance *advance, struct kvp_page_copy *ret_copies, uint32_t *ret_n_copies,
                                 uint32_t *reterr_short)
{
    enum kvp_status status = wait_for(advance, ret_copies, ret_n_copies, reterr_short);

    kvp_rpc_release(&advance->rpc);
    free(advance);
    return status;
}

/* ---- fork, transfer, close --------------------------------------------------------------------------------------- */

enum kvp_status kvp_fork(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *parents, const uint64_t *keys,
                         const uint32_t *tokens, struct kvp_seq *ret_seqs, struct kvp_page_copy *ret_copies,
                         uint32_t *ret_n_copies, uint32_t *reterr_short)
{
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    const Kvpool__V1__ForkReply *reply;
    enum kvp_status status = kvp_check_batch("kvp_fork", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, parents, wire);
    request.pool = (char *)pool->info->spec.name;
    request.n_parents = request.n_keys = n;
    request.parents = wire;
    request.keys = (uint64_t *)keys;
    request.n_tokens = tokens != NULL ? n : 0;
    request.tokens = (uint32_t *)tokens;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_FORK, &request.base, NULL, 0, &rpc);
    if (status == KVP_ENOPAGES && reterr_short != NULL)
        *reterr_short = (uint32_t)rpc.missing;
    if (status != KVP_OK)
        goto release;
    reply = (const Kvpool__V1__ForkReply *)rpc.reply;
    status = kvp_rpc_check_count("sequences", reply->n_seqs, n);
    if (status == KVP_OK)
        status = kvp_rpc_check_count("versions", reply->n_versions, n);
    if (status == KVP_OK)
        status = kvp_rpc_check_count("lengths", reply->n_written, n);
    if (status == KVP_OK) {
        const struct copy_arrays copies = {reply->n_copy_seqs,   reply->n_copy_sources, reply->n_copy_destinations,
                                           reply->n_copy_tokens, reply->copy_sources,   reply->copy_destinations,
                                           reply->copy_tokens};

        status = take_copies(&copies, n, ret_copies, ret_n_copies);
    }
    for (uint32_t i = 0; status == KVP_OK && i < n; i++) {
        ret_seqs[i] = kvp_seq_from_wire(reply->seqs[i]);
        remember(pool, ret_seqs[i].slot, reply->versions[i], tokens != NULL ? tokens[i] : reply->written[i]);
    }

release:
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_transfer(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs, uint64_t to,
                             const struct kvp_point *when, const uint32_t *tokens)
{
    Kvpool__V1__TransferRequest request = KVPOOL__V1__TRANSFER_REQUEST__INIT;
    enum kvp_status status = kvp_check_batch("kvp_transfer", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, seqs, wire);
    request.pool = (char *)pool->info->spec.name;
    request.n_seqs = n;
    request.seqs = wire;
    request.to = to;
    request.timeline = when != NULL ? when->timeline : 0;
    request.value = when != NULL ? when->value : 0;
    request.n_tokens = tokens != NULL ? n : 0;
    request.tokens = (uint32_t *)tokens;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_TRANSFER, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_seq_close(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                              const struct kvp_point *after)
{
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    enum kvp_status status = kvp_check_batch("kvp_seq_close", n);
    uint64_t wire[KVP_BATCH_MAX];
    struct after_arrays points;
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(n, seqs, wire);
    after_to_wire(n, after, &points);
    request.pool = (char *)pool->info->spec.name;
    request.n_seqs = n;
    request.seqs = wire;
    request.n_after_timelines = request.n_after_values = points.n;
    request.after_timelines = points.timelines;
    request.after_values = points.values;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_CLOSE_SEQUENCES, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}

/* ---- list -------------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_seq_list(struct kvp_pool *pool, bool all, uint32_t max, uint32_t *from_slot,
                             struct kvp_seq_info *ret_infos, uint32_t *ret_n)
{
    Kvpool__V1__ListSequencesRequest request = KVPOOL__V1__LIST_SEQUENCES_REQUEST__INIT;
    const Kvpool__V1__ListSequencesReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;

    if (max == 0)
        return kvp_fail(KVP_EINVAL, "kvp_seq_list has no room for an entry");
    request.pool = (char *)pool->info->spec.name;
    request.all = all;
    request.from_slot = *from_slot;
    request.limit = max < KVP_LIST_MAX ? max : KVP_LIST_MAX;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_LIST_SEQUENCES, &request.base, NULL, 0, &rpc);
    if (status != KVP_OK)
        goto release;
    reply = (const Kvpool__V1__ListSequencesReply *)rpc.reply;
    if (reply->n_seqs > request.limit || reply->n_keys != reply->n_seqs || reply->n_reserved != reply->n_seqs ||
        reply->n_written != reply->n_seqs || reply->n_versions != reply->n_seqs ||
        reply->n_session_ids != reply->n_seqs || reply->n_states != reply->n_seqs) {
        status = kvp_fail(KVP_EPROTO, "the reply's listing of %zu sequences is not whole", reply->n_seqs);
        goto release;
    }
    for (size_t i = 0; i < reply->n_seqs; i++)
        ret_infos[i] = (struct kvp_seq_info){.seq = kvp_seq_from_wire(reply->seqs[i]),
                                             .key = reply->keys[i],
                                             .session_id = reply->session_ids[i],
                                             .reserved = reply->reserved[i],
                                             .written = reply->written[i],
                                             .version = reply->versions[i],
                                             .state = (enum kvp_seq_state)reply->states[i]};
    *ret_n = (uint32_t)reply->n_seqs;
    *from_slot = reply->next_slot;

release:
    kvp_rpc_release(&rpc);
    return status;
}
