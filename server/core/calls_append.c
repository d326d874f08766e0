/**
 * Append: tokens written on request, by the executor.
 *
 *   one transaction: room, the job and its sequences, the outcome {timeline, value}
 *        │ session socket: answered here, the caller waits for the timeline
 *        ▼
 *   the executor copies what is owed, writes the tokens, then the timeline
 *        ▼
 *   a second transaction: the tokens are written (jobs.c); gRPC is answered here
 *
 * While the job is open its sequences refuse other changes. A repeat finds its job under way, or the tokens written;
 * when neither is so the job had failed, nothing was changed, and it is done now. Where pages came from another tenant,
 * a transaction for the room alone comes first, after which they are zeroed (zero.c).
 *
 * A pool over several GPUs takes an Append for each rank, in rising order; that of the last rank makes the tokens
 * written.
 */
#include "op.h"

/* What a request came to, once checked. */
struct append {
    struct pool_state *pool;
    struct kvp_seq_view *views;
    const struct buffer_state *buffer;
    uint32_t attachment;
    uint64_t nnz;
    uint64_t pages; /* of all rows, after it */
    bool last_rank;
};

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static enum kvp_status check_tokens(struct kvp_core *core, const Kvpool__V1__AppendRequest *request,
                                    struct append *append)
{
    const Kvpool__V1__PoolSpec *spec = append->pool->spec;
    for (size_t i = 0; i < request->n_seqs; i++) {
        uint64_t end = (uint64_t)request->at[i] + request->tokens[i];
        if (end > spec->max_sequence_tokens)
            return core_refuse(core, KVP_EINVAL, "tokens[%zu]: %u behind %u, at most %u tokens in a sequence", i,
                               request->tokens[i], request->at[i], spec->max_sequence_tokens);
        append->nnz += request->tokens[i];
        append->pages += (end + spec->page_tokens - 1) / spec->page_tokens;
    }
    if (append->nnz == 0 || append->nnz > KVP_CALL_TOKENS_MAX)
        return core_refuse(core, KVP_EINVAL, "tokens: %llu in all, must be 1 to %u", (unsigned long long)append->nnz,
                           KVP_CALL_TOKENS_MAX);
    if (append->pages > KVP_CALL_PAGES_MAX)
        return core_refuse(core, KVP_EINVAL, "seqs: rows of %llu pages in all, at most %u in a call",
                           (unsigned long long)append->pages, KVP_CALL_PAGES_MAX);
    return KVP_OK;
}

static uint64_t token_bytes(const Kvpool__V1__Plane *plane)
{
    return (uint64_t)plane->heads * plane->dim * kvp_dtype_bytes((uint32_t)plane->dtype);
}

static enum kvp_status check_inline(struct kvp_core *core, const Kvpool__V1__AppendRequest *request,
                                    const struct append *append)
{
    uint64_t expected = 0;
    for (size_t p = 0; p < append->pool->spec->n_planes; p++)
        expected += append->nnz * token_bytes(append->pool->spec->planes[p]);
    if (request->inline_.len != expected)
        return core_refuse(core, KVP_EINVAL, "inline: %zu bytes, %llu tokens of %zu planes are %llu",
                           request->inline_.len, (unsigned long long)append->nnz, append->pool->spec->n_planes,
                           (unsigned long long)expected);
    if (request->n_plane_offsets + request->n_token_strides + request->n_head_strides != 0)
        return core_refuse(core, KVP_EINVAL, "plane_offsets, token_strides, head_strides: only with a buffer");
    return KVP_OK;
}

/* Does plane p of the source lie within the buffer? *offset is where it starts when the request does not say. */
static enum kvp_status check_plane(struct kvp_core *core, const Kvpool__V1__AppendRequest *request,
                                   const struct append *append, size_t p, uint64_t *offset)
{
    const Kvpool__V1__Plane *plane = append->pool->spec->planes[p];
    uint64_t element = kvp_dtype_bytes((uint32_t)plane->dtype), head = plane->dim * element;
    uint64_t token_stride = request->n_token_strides != 0 ? request->token_strides[p] : token_bytes(plane);
    uint64_t head_stride = request->n_head_strides != 0 ? request->head_strides[p] : head;
    uint64_t start = request->n_plane_offsets != 0 ? request->plane_offsets[p] : *offset;
    uint64_t tokens_end, heads_end, end;
    bool over = __builtin_mul_overflow(append->nnz - 1, token_stride, &tokens_end) ||
                __builtin_mul_overflow((uint64_t)plane->heads - 1, head_stride, &heads_end) ||
                __builtin_add_overflow(tokens_end, heads_end, &end) || __builtin_add_overflow(end, head, &end) ||
                __builtin_add_overflow(end, start, &end);
    if (over || end > append->buffer->bytes)
        return core_refuse(core, KVP_EINVAL, "plane %zu: ends at byte %llu of the source, buffer %u has %llu", p,
                           over ? ~0ull : (unsigned long long)end, request->buffer,
                           (unsigned long long)append->buffer->bytes);
    if (start % element != 0 || token_stride % element != 0 || head_stride % element != 0)
        return core_refuse(core, KVP_EINVAL,
                           "plane %zu: offset and strides must be multiples of its elements' %llu bytes", p,
                           (unsigned long long)element);
    *offset += append->nnz * token_bytes(plane);
    return KVP_OK;
}

static enum kvp_status check_source(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                    struct append *append)
{
    size_t planes = append->pool->spec->n_planes;
    size_t given[3] = {request->n_plane_offsets, request->n_token_strides, request->n_head_strides};
    static const char *const names[3] = {"plane_offsets", "token_strides", "head_strides"};
    if ((request->inline_.len != 0) == (request->buffer != 0))
        return core_refuse(core, KVP_EINVAL, "the tokens' bytes must come either inline or in a buffer");
    if (request->buffer == 0)
        return check_inline(core, request, append);
    for (int i = 0; i < 3; i++) {
        if (given[i] != 0 && given[i] != planes)
            return core_refuse(core, KVP_EINVAL, "%s: %zu, must be none or one a plane: %zu", names[i], given[i],
                               planes);
    }
    struct buffer_state *buffer;
    TRY(core_buffer(core, turn->session.id, request->buffer, &buffer));
    append->buffer = buffer;
    uint64_t offset = 0;
    for (size_t p = 0; p < planes; p++)
        TRY(check_plane(core, request, append, p, &offset));
    return KVP_OK;
}

/* Somebody must be there who can reach what the job waits for: when its owner dies, that is said on the timeline. */
static enum kvp_status check_waited(struct kvp_core *core, const Kvpool__V1__AppendRequest *request,
                                    const struct pool_state *pool)
{
    struct kvp_attachment_view owner;
    if (core_timeline_reached(pool, (struct kvp_after){request->wait_timeline, request->wait_value}))
        return KVP_OK;
    if (kvp_attachment_get(core->ledger, pool->id, request->wait_timeline / KVP_TIMELINES_MAX, &owner) == KVP_OK &&
        owner.state == KVP_ATTACHMENT_LIVE)
        return KVP_OK;
    return core_refuse(core, KVP_EINVAL, "wait_timeline: %u is no attached session's, and has not reached %llu",
                       request->wait_timeline, (unsigned long long)request->wait_value);
}

static enum kvp_status check_append(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                    struct append *append)
{
    TRY(core_length_check(core, "at", request->n_at, request->n_seqs));
    TRY(core_length_check(core, "tokens", request->n_tokens, request->n_seqs));
    if (request->rank >= append->pool->n_slabs)
        return core_refuse(core, KVP_EINVAL, "rank: %u, pool \"%s\" has %u slabs", request->rank,
                           append->pool->spec->name, append->pool->n_slabs);
    if (request->wait_value != 0 && request->wait_timeline >= KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX)
        return core_refuse(core, KVP_EINVAL, "wait_timeline: %u, at most %d", request->wait_timeline,
                           KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX - 1);
    if (request->wait_value != 0)
        TRY(check_waited(core, request, append->pool));
    append->last_rank = request->rank + 1 == append->pool->n_slabs;
    TRY(check_tokens(core, request, append));
    return check_source(core, turn, request, append);
}

static enum kvp_status check_lengths(struct kvp_core *core, const Kvpool__V1__AppendRequest *request,
                                     const struct append *append)
{
    for (size_t i = 0; i < request->n_seqs; i++) {
        if (request->at[i] != append->views[i].written)
            return core_refuse(core, KVP_EMISMATCH, "at[%zu]: %u tokens are expected, %u are written", i,
                               request->at[i], append->views[i].written);
        TRY(core_given_check(core, i, &append->views[i]));
    }
    return KVP_OK;
}

/* ---- the job ----------------------------------------------------------------------------------------------------- */

/* Within the transaction: the rows as they will be. */
static enum kvp_status fill_rows(struct kvp_core *core, const Kvpool__V1__AppendRequest *request,
                                 const struct append *append, Kvpool__V1__ExecJobRequest *job)
{
    size_t n = request->n_seqs;
    job->kv_indptr = core_alloc(core, n + 1, sizeof(int32_t));
    job->kv_indices = core_alloc(core, append->pages, sizeof(int32_t));
    if (job->kv_indptr == NULL || job->kv_indices == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the job");
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t pages = core_pages_for(append->pool, request->at[i] + request->tokens[i]);
        const uint32_t *row = kvp_seq_row(core->ledger, append->pool->id, append->views[i].id.slot);
        for (uint32_t k = 0; k < pages; k++)
            job->kv_indices[at++] = (int32_t)row[k];
        job->kv_indptr[i + 1] = (int32_t)at;
    }
    job->n_kv_indptr = n + 1;
    job->n_kv_indices = at;
    job->n_start = job->n_tokens = n;
    job->start = request->at;
    job->tokens = request->tokens;
    return KVP_OK;
}

static void fill_source(const Kvpool__V1__AppendRequest *request, Kvpool__V1__ExecJobRequest *job)
{
    job->inline_ = request->inline_;
    job->buffer = request->buffer;
    job->n_plane_offsets = request->n_plane_offsets;
    job->plane_offsets = request->plane_offsets;
    job->n_token_strides = request->n_token_strides;
    job->token_strides = request->token_strides;
    job->n_head_strides = request->n_head_strides;
    job->head_strides = request->head_strides;
    job->wait_timeline = request->wait_timeline;
    job->wait_value = request->wait_value;
}

/* How many pages the sequences from `from` on take. */
static uint64_t append_pages(const Kvpool__V1__AppendRequest *request, const struct append *append, size_t from)
{
    uint64_t pages = 0;
    for (size_t k = from; k < request->n_seqs; k++) {
        uint32_t needed = core_pages_for(append->pool, request->at[k] + request->tokens[k]);
        if (needed > append->views[k].row_pages)
            pages += needed - append->views[k].row_pages;
    }
    return pages;
}

static enum kvp_status reserve_all(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                   const struct append *append)
{
    struct pool_state *pool = append->pool;
    for (size_t i = 0; i < request->n_seqs; i++) {
        uint32_t end = request->at[i] + request->tokens[i], short_pages = 0;
        if (end <= append->views[i].reserved)
            continue;
        enum kvp_status status = kvp_seq_reserve(core->ledger, pool->id, append->views[i].id, end, false,
                                                 (struct kvp_after){0}, &short_pages);
        if (status == KVP_ENOPAGES) {
            core->error_missing = short_pages + append_pages(request, append, i + 1);
            return core_short(core, turn, pool, core_pages_for(pool, end) - append->views[i].row_pages);
        }
        if (status != KVP_OK)
            return core_seq_refuse(core, pool, status, "seqs", i, request->seqs[i]);
    }
    return KVP_OK;
}

/* All of the first transaction but its commit. */
static enum kvp_status make_job(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                const struct append *append, struct kvp_job_spec *spec, struct kvp_job_id *ret_job)
{
    struct copies copies;
    TRY(core_copies(core, append->views, request->n_seqs, &copies));
    enum kvp_status status = kvp_job_open(core->ledger, spec, ret_job);
    if (status == KVP_ELIMIT)
        return core_refuse(core, KVP_EAGAIN, "jobs: %d are under way, the most there may be", KVP_JOBS_MAX);
    for (size_t i = 0; status == KVP_OK && i < request->n_seqs; i++) {
        uint32_t end = append->last_rank ? request->at[i] + request->tokens[i] : request->at[i];
        status = kvp_job_add(core->ledger, *ret_job, append->views[i].id, end);
        if (status != KVP_OK)
            return core_seq_refuse(core, append->pool, status, "seqs", i, request->seqs[i]);
    }
    TRY(status);
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    job.job = ID_WORD(*ret_job);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_APPEND;
    job.session_id = ID_WORD(turn->session.id);
    job.pool_id = ID_WORD(append->pool->id);
    job.rank = request->rank;
    TRY(fill_rows(core, request, append, &job));
    fill_source(request, &job);
    job.n_copy_sources = job.n_copy_destinations = job.n_copy_tokens = copies.n;
    job.copy_sources = copies.sources;
    job.copy_destinations = copies.destinations;
    job.copy_tokens = copies.tokens;
    job.done_timeline = spec->timeline;
    job.done_value = spec->value;
    return core_job_take(core, *ret_job, &job);
}

static enum kvp_status answer_append(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                     uint32_t timeline, uint64_t value)
{
    Kvpool__V1__AppendReply reply = KVPOOL__V1__APPEND_REPLY__INIT;
    reply.written = core_alloc(core, request->n_seqs, sizeof(uint32_t));
    if (reply.written == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the reply");
    for (size_t i = 0; i < request->n_seqs; i++)
        reply.written[i] = request->at[i] + request->tokens[i];
    reply.n_written = request->n_seqs;
    reply.timeline = timeline;
    reply.value = value;
    return core_answer(core, turn, &reply.base, NULL, 0);
}

static enum kvp_status answer_job(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                  struct kvp_job_id job, uint32_t timeline, uint64_t value)
{
    TRY(core_job_await(core, turn, job, timeline, value));
    return answer_append(core, turn, request, timeline, value);
}

/* ---- repeats ----------------------------------------------------------------------------------------------------- */

/* KVP_ENOENT: it failed, and is to be done now. */
static enum kvp_status answer_repeat(struct kvp_core *core, struct turn *turn, const struct pool_state *pool,
                                     const Kvpool__V1__AppendRequest *request)
{
    uint32_t timeline = (uint32_t)turn->outcome.values[0];
    for (uint32_t slot = 0; slot < KVP_JOBS_MAX; slot++) {
        struct kvp_job_view job;
        if (kvp_job_at(core->ledger, slot, &job) != KVP_OK || job.spec.call_id != turn->call_id ||
            !same_session(job.spec.session, turn->session.id))
            continue;
        return answer_job(core, turn, request, job.id, timeline, turn->outcome.values[1]);
    }
    for (size_t i = 0; i < request->n_seqs; i++) {
        struct kvp_seq_view view;
        if (i >= request->n_at || i >= request->n_tokens ||
            kvp_seq_get(core->ledger, pool->id, seq_id(request->seqs[i]), &view) != KVP_OK ||
            view.written < (uint64_t)request->at[i] + request->tokens[i])
            return KVP_ENOENT;
    }
    return answer_append(core, turn, request, timeline, turn->outcome.values[1]);
}

/* ---- the call ---------------------------------------------------------------------------------------------------- */

/* The job that this call waited for has ended. */
static enum kvp_status answer_ended(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request)
{
    if (turn->op->result != KVP_OK)
        return core_refuse(core, turn->op->result, "the tokens are not written: %s", turn->op->text);
    return answer_append(core, turn, request, turn->op->job_timeline, turn->op->job_value);
}

/* All that is checked of a request that is to be done now. */
static enum kvp_status look(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                            struct append *append)
{
    TRY(check_append(core, turn, request, append));
    TRY(core_attachment(core, turn, append->pool, false, &append->attachment));
    TRY(core_batch(core, turn, append->pool, "seqs", request->n_seqs, request->seqs,
                   BATCH_OWNED | BATCH_DISTINCT | BATCH_FREE, &append->views));
    return check_lengths(core, request, append);
}

/* Pages of another tenant: their room is committed first, so that they can be zeroed. */
static enum kvp_status zero_first(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                  const struct append *append)
{
    kvp_txn_commit(core->ledger);
    TRY(core_publish_views(core, append->pool, append->views, request->n_seqs));
    TRY(core_zero(core, turn, append->pool, append->attachment, append->views, request->n_seqs));
    kvp_txn_begin(core->ledger);
    return KVP_OK;
}

/* The first transaction: room, and the job. */
static enum kvp_status begin_job(struct kvp_core *core, struct turn *turn, const Kvpool__V1__AppendRequest *request,
                                 struct append *append, struct kvp_job_spec *spec, struct kvp_job_id *ret_job)
{
    TRY(core_reclaimed_for(core, turn, append->pool, append_pages(request, append, 0)));
    kvp_txn_begin(core->ledger);
    enum kvp_status status = reserve_all(core, turn, request, append);
    if (status == KVP_OK && core_zero_due(core, append->pool))
        TRY(zero_first(core, turn, request, append));
    spec->value = core_job_next_value(core, append->pool, append->attachment);
    if (status == KVP_OK)
        status = make_job(core, turn, request, append, spec, ret_job);
    if (status != KVP_OK)
        return core_abort_taking(core, turn, append->pool, status);
    status = core_commit(core, turn, spec->timeline, spec->value);
    if (status != KVP_OK)
        core_job_forget(core, *ret_job);
    return status;
}

enum kvp_status call_append(struct kvp_core *core, struct turn *turn)
{
    const Kvpool__V1__AppendRequest *request = (const Kvpool__V1__AppendRequest *)turn->body;
    struct append append = {0};
    struct kvp_job_id job = {0, 0};
    TRY(core_zero_ended(core, turn));
    if (turn->op != NULL && turn->op->job.generation != 0)
        return answer_ended(core, turn, request);
    TRY(core_pool_live(core, request->pool, &append.pool));
    if (turn->repeated) {
        enum kvp_status status = answer_repeat(core, turn, append.pool, request);
        if (status != KVP_ENOENT)
            return status;
    }
    TRY(look(core, turn, request, &append));
    struct kvp_job_spec spec = {
        .kind = KVPOOL__V1__JOB_KIND__JOB_APPEND,
        .session = turn->session.id,
        .pool = append.pool->id,
        .call_id = turn->call_id,
        .timeline = append.attachment * KVP_TIMELINES_MAX,
    };
    TRY(begin_job(core, turn, request, &append, &spec, &job));
    if (turn->op != NULL)
        turn->op->zeroing = false;
    for (size_t i = 0; i < request->n_seqs; i++)
        core_publish_seq(core, append.pool, append.views[i].id.slot);
    return answer_job(core, turn, request, job, spec.timeline, spec.value);
}
