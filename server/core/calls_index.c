/**
 * The index functions on request: lengths, the CSR page table, batch indices with positions and slots.
 *
 * Into the reply the core computes them itself, from the ledger's rows. Into a registered buffer the executor's kernel
 * writes them, as a job of its own that no sequence waits for: on the session socket the answer comes at intent, with
 * the completion value; over gRPC when it is done.
 */
#include "op.h"

#define OUTPUTS        7
#define OUTPUT_SLOTS   2u /* the one whose elements are int64 */
#define WANTED_DEFAULT 7u

/* ---- GetSeqLens -------------------------------------------------------------------------------------------------- */

enum kvp_status call_get_seq_lens(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__GetSeqLensRequest *request = (const Kvpool__V1__GetSeqLensRequest *)turn->body;
    Kvpool__V1__GetSeqLensReply reply = KVPOOL__V1__GET_SEQ_LENS_REPLY__INIT;
    struct pool_state *pool;
    struct kvp_seq_view *views;
    TRY(core_pool_by_name(core, request->pool, &pool));
    TRY(core_batch(core, turn, pool, "seqs", request->n_seqs, request->seqs, 0, &views));
    reply.lengths = core_alloc(core, request->n_seqs, sizeof(uint32_t));
    if (reply.lengths == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (size_t i = 0; i < request->n_seqs; i++)
        reply.lengths[i] = views[i].written;
    reply.n_lengths = request->n_seqs;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- rows as CSR ------------------------------------------------------------------------------------------------- */

struct csr {
    int32_t *indptr, *indices;
    size_t n_indices;
};

/* The pages that hold the first lengths[i] tokens of each sequence. */
static enum kvp_status fill_csr(struct kvp_core *core, const struct pool_state *pool, const struct kvp_seq_view *views,
                                const uint32_t *lengths, size_t n, struct csr *ret_csr)
{
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += core_pages_for(pool, lengths[i]);
    if (total > KVP_CALL_PAGES_MAX)
        return core_refuse(core, KVP_EINVAL, "seqs: rows of %llu pages in all, at most %u in a call",
                           (unsigned long long)total, KVP_CALL_PAGES_MAX);
    ret_csr->indptr = core_alloc(core, n + 1, sizeof(int32_t));
    ret_csr->indices = core_alloc(core, total, sizeof(int32_t));
    if (ret_csr->indptr == NULL || ret_csr->indices == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t *row = kvp_seq_row(core->ledger, pool->id, views[i].id.slot);
        uint32_t pages = core_pages_for(pool, lengths[i]);
        for (uint32_t k = 0; k < pages; k++)
            ret_csr->indices[at++] = (int32_t)row[k];
        ret_csr->indptr[i + 1] = (int32_t)at;
    }
    ret_csr->n_indices = at;
    return KVP_OK;
}

/* ---- GetPageTable ------------------------------------------------------------------------------------------------ */

enum kvp_status call_get_page_table(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__GetPageTableRequest *request = (const Kvpool__V1__GetPageTableRequest *)turn->body;
    Kvpool__V1__GetPageTableReply reply = KVPOOL__V1__GET_PAGE_TABLE_REPLY__INIT;
    struct pool_state *pool;
    struct kvp_seq_view *views;
    struct csr csr;
    size_t n = request->n_seqs;
    TRY(core_pool_by_name(core, request->pool, &pool));
    if (request->n_lengths != 0)
        TRY(core_length_check(core, "lengths", request->n_lengths, n));
    TRY(core_batch(core, turn, pool, "seqs", n, request->seqs, 0, &views));
    uint32_t *lengths = core_alloc(core, n, sizeof(*lengths));
    int32_t *last = core_alloc(core, n, sizeof(*last));
    if (lengths == NULL || last == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (size_t i = 0; i < n; i++) {
        lengths[i] = request->n_lengths != 0 ? request->lengths[i] : views[i].written;
        if (lengths[i] > views[i].reserved)
            return core_refuse(core, KVP_EINVAL, "lengths[%zu]: %u tokens, but %u are reserved", i, lengths[i],
                               views[i].reserved);
        if (lengths[i] != 0)
            last[i] = (int32_t)((lengths[i] - 1) % pool->spec->page_tokens + 1);
    }
    TRY(fill_csr(core, pool, views, lengths, n, &csr));
    reply.n_kv_indptr = n + 1;
    reply.kv_indptr = csr.indptr;
    reply.n_kv_indices = csr.n_indices;
    reply.kv_indices = csr.indices;
    reply.n_kv_last_page_len = reply.n_lengths = n;
    reply.kv_last_page_len = last;
    reply.lengths = lengths;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- GetBatchIndices: checks ------------------------------------------------------------------------------------- */

struct batch_indices {
    struct pool_state *pool;
    struct kvp_seq_view *views;
    size_t n;
    uint64_t nnz;
    uint32_t *start, *end; /* of each sequence, in tokens */
};

static enum kvp_status check_wanted(struct kvp_core *core, const Kvpool__V1__GetBatchIndicesRequest *request)
{
    if (request->wanted >= 1u << OUTPUTS)
        return core_refuse(core, KVP_EINVAL, "wanted: %#x, must be below %#x", request->wanted, 1u << OUTPUTS);
    if (request->buffer == 0 && (request->wanted & ~WANTED_DEFAULT) != 0)
        return core_refuse(core, KVP_EINVAL, "wanted: %#x, but without a buffer there are only the outputs of %#x",
                           request->wanted, WANTED_DEFAULT);
    return KVP_OK;
}

static enum kvp_status check_batch_indices(struct kvp_core *core, const Kvpool__V1__GetBatchIndicesRequest *request,
                                           struct batch_indices *batch)
{
    batch->start = core_alloc(core, batch->n, sizeof(uint32_t));
    batch->end = core_alloc(core, batch->n, sizeof(uint32_t));
    if (batch->start == NULL || batch->end == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    for (size_t i = 0; i < batch->n; i++) {
        uint32_t start = request->n_start != 0 ? request->start[i] : batch->views[i].written;
        uint64_t end = (uint64_t)start + request->tokens[i];
        if (end > batch->views[i].reserved)
            return core_refuse(core, KVP_EINVAL, "tokens[%zu]: %u behind %u, but %u are reserved", i,
                               request->tokens[i], start, batch->views[i].reserved);
        batch->start[i] = start;
        batch->end[i] = (uint32_t)end;
        batch->nnz += request->tokens[i];
    }
    if (batch->nnz > KVP_CALL_TOKENS_MAX)
        return core_refuse(core, KVP_EINVAL, "tokens: %llu in all, at most %u", (unsigned long long)batch->nnz,
                           KVP_CALL_TOKENS_MAX);
    return KVP_OK;
}

/* ---- into the reply ---------------------------------------------------------------------------------------------- */

static enum kvp_status indices_reply(struct kvp_core *core, struct turn *turn, const struct batch_indices *batch)
{
    Kvpool__V1__GetBatchIndicesReply reply = KVPOOL__V1__GET_BATCH_INDICES_REPLY__INIT;
    uint32_t page_tokens = batch->pool->spec->page_tokens;
    reply.batch_indices = core_alloc(core, batch->nnz, sizeof(int32_t));
    reply.positions = core_alloc(core, batch->nnz, sizeof(int32_t));
    reply.slots = core_alloc(core, batch->nnz, sizeof(int64_t));
    if (reply.batch_indices == NULL || reply.positions == NULL || reply.slots == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    size_t at = 0;
    for (size_t i = 0; i < batch->n; i++) {
        const uint32_t *row = kvp_seq_row(core->ledger, batch->pool->id, batch->views[i].id.slot);
        for (uint32_t position = batch->start[i]; position < batch->end[i]; position++, at++) {
            reply.batch_indices[at] = (int32_t)i;
            reply.positions[at] = (int32_t)position;
            reply.slots[at] = (int64_t)row[position / page_tokens] * page_tokens + position % page_tokens;
        }
    }
    reply.n_batch_indices = reply.n_positions = reply.n_slots = at;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

/* ---- into a buffer ----------------------------------------------------------------------------------------------- */

static enum kvp_status check_outputs(struct kvp_core *core, const struct buffer_state *buffer,
                                     const uint64_t offsets[OUTPUTS], uint32_t wanted,
                                     const struct batch_indices *batch, uint64_t pages)
{
    static const char *const names[OUTPUTS] = {"batch_indices", "positions",        "slots",   "kv_indptr",
                                               "kv_indices",    "kv_last_page_len", "seq_lens"};
    const uint64_t counts[OUTPUTS] = {batch->nnz, batch->nnz, batch->nnz, batch->n + 1, pages, batch->n, batch->n};
    for (unsigned i = 0; i < OUTPUTS; i++) {
        uint64_t element = i == OUTPUT_SLOTS ? sizeof(int64_t) : sizeof(int32_t), bytes = counts[i] * element;
        if (!(wanted & 1u << i))
            continue;
        if (offsets[i] % element != 0)
            return core_refuse(core, KVP_EINVAL, "%s_offset: %llu, must be a multiple of %llu", names[i],
                               (unsigned long long)offsets[i], (unsigned long long)element);
        if (bytes > buffer->bytes || offsets[i] > buffer->bytes - bytes)
            return core_refuse(core, KVP_EINVAL, "%s_offset: %llu bytes at %llu, the buffer has %llu", names[i],
                               (unsigned long long)bytes, (unsigned long long)offsets[i],
                               (unsigned long long)buffer->bytes);
    }
    return KVP_OK;
}

/* The slab on the buffer's device; the first, if it is on none of them. */
static uint32_t rank_of(const struct pool_state *pool, const struct buffer_state *buffer)
{
    for (uint32_t rank = 0; rank < pool->n_slabs; rank++) {
        if (strcmp(pool->slabs[rank].device, buffer->device) == 0)
            return rank;
    }
    return 0;
}

static enum kvp_status fill_job(struct kvp_core *core, const Kvpool__V1__GetBatchIndicesRequest *request,
                                const struct batch_indices *batch, const struct buffer_state *buffer,
                                Kvpool__V1__ExecJobRequest *job)
{
    struct csr csr;
    TRY(fill_csr(core, batch->pool, batch->views, batch->end, batch->n, &csr));
    uint64_t *offsets = core_alloc(core, OUTPUTS, sizeof(*offsets));
    if (offsets == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the job");
    const uint64_t given[OUTPUTS] = {request->batch_indices_offset, request->positions_offset,
                                     request->slots_offset,         request->kv_indptr_offset,
                                     request->kv_indices_offset,    request->kv_last_page_len_offset,
                                     request->seq_lens_offset};
    memcpy(offsets, given, sizeof(given));
    job->wanted = request->wanted != 0 ? request->wanted : WANTED_DEFAULT;
    TRY(check_outputs(core, buffer, offsets, job->wanted, batch, csr.n_indices));
    job->kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
    job->pool_id = ID_WORD(batch->pool->id);
    job->rank = rank_of(batch->pool, buffer);
    job->n_kv_indptr = batch->n + 1;
    job->kv_indptr = csr.indptr;
    job->n_kv_indices = csr.n_indices;
    job->kv_indices = csr.indices;
    job->n_start = job->n_tokens = batch->n;
    job->start = batch->start;
    job->tokens = request->tokens;
    job->buffer = request->buffer;
    job->n_output_offsets = OUTPUTS;
    job->output_offsets = offsets;
    return KVP_OK;
}

static enum kvp_status answer_done(struct kvp_core *core, struct turn *turn, uint32_t timeline, uint64_t value)
{
    Kvpool__V1__GetBatchIndicesReply reply = KVPOOL__V1__GET_BATCH_INDICES_REPLY__INIT;
    reply.timeline = timeline;
    reply.value = value;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

static enum kvp_status open_index_job(struct kvp_core *core, struct turn *turn, const struct batch_indices *batch,
                                      Kvpool__V1__ExecJobRequest *request, struct kvp_job_id *ret_job)
{
    uint32_t attachment;
    TRY(core_attachment(core, turn, batch->pool, true, &attachment));
    struct kvp_job_spec spec = {
        .kind = KVPOOL__V1__JOB_KIND__JOB_INDEX,
        .session = turn->session.id,
        .pool = batch->pool->id,
        .timeline = attachment * KVP_TIMELINES_MAX,
        .value = core_job_next_value(core, batch->pool, attachment),
    };
    enum kvp_status status = kvp_job_open(core->ledger, &spec, ret_job);
    if (status == KVP_ELIMIT)
        return core_refuse(core, KVP_EAGAIN, "jobs: %d are under way, the most there may be", KVP_JOBS_MAX);
    TRY(status);
    request->job = ID_WORD(*ret_job);
    request->session_id = ID_WORD(turn->session.id);
    request->done_timeline = spec.timeline;
    request->done_value = spec.value;
    return core_job_take(core, *ret_job, request);
}

static enum kvp_status indices_job(struct kvp_core *core, struct turn *turn,
                                   const Kvpool__V1__GetBatchIndicesRequest *request, const struct batch_indices *batch)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct buffer_state *buffer;
    struct kvp_job_id id;
    struct pool_state *pool;
    TRY(core_need_session(core, turn));
    TRY(core_pool_live(core, request->pool, &pool));
    TRY(core_buffer(core, turn->session.id, request->buffer, &buffer));
    TRY(fill_job(core, request, batch, buffer, &job));
    kvp_txn_begin(core->ledger);
    enum kvp_status status = open_index_job(core, turn, batch, &job, &id);
    if (status != KVP_OK)
        return core_abort(core, status);
    kvp_txn_commit(core->ledger);
    TRY(core_job_await(core, turn, id, job.done_timeline, job.done_value));
    return answer_done(core, turn, job.done_timeline, job.done_value);
}

enum kvp_status call_get_batch_indices(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__GetBatchIndicesRequest *request = (const Kvpool__V1__GetBatchIndicesRequest *)turn->body;
    struct batch_indices batch = {.n = request->n_seqs};
    if (turn->op != NULL && turn->op->job.generation != 0) {
        if (turn->op->result != KVP_OK)
            return core_refuse(core, turn->op->result, "the results are not written: %s", turn->op->text);
        return answer_done(core, turn, turn->op->job_timeline, turn->op->job_value);
    }
    TRY(core_pool_by_name(core, request->pool, &batch.pool));
    TRY(core_length_check(core, "tokens", request->n_tokens, batch.n));
    if (request->n_start != 0)
        TRY(core_length_check(core, "start", request->n_start, batch.n));
    TRY(check_wanted(core, request));
    TRY(core_batch(core, turn, batch.pool, "seqs", batch.n, request->seqs, 0, &batch.views));
    TRY(check_batch_indices(core, request, &batch));
    return request->buffer == 0 ? indices_reply(core, turn, &batch) : indices_job(core, turn, request, &batch);
}
