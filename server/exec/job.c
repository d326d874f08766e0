/**
 * A job: one ExecJobRequest, checked, turned into work for the backend, run in its session's order, answered.
 *
 *     request ──► known job? ──► check ──► prepare ──► queue ──► run ──► reply, remembered
 *                    │ it runs: this request's tag is the one that is answered
 *                    └ it is done: answered at once from what is remembered
 *
 * Nothing in a request is trusted: every count against its limit, every page id against the pool, every stride and
 * offset against the buffer. What passes is prepared in the form that both backends take: a slot for each token, the
 * rows cut to the length after the append, copies in groups in which no page is both read and written. A request of
 * kind JOB_NONE asks what came of a job: a daemon started anew has its number but not its bytes.
 *
 * A failed job says on its timeline that its value is lost, and does not store it: that is the daemon's to do.
 * Main thread only, but for job_run.
 */
#include "exec.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct kvp_exec_job {
    struct kvp_exec_work_item item; /* first */
    struct kvp_exec_job *next_open;
    const struct kvp_exec_backend *backend;
    uint64_t job, tag;
    struct kvp_exec_request *request;
    struct kvp_exec_slab *slab;
    struct kvp_exec_object *buffer; /* NULL: none */
    struct kvp_exec_work work;
    struct kvp_exec_index index;
    /* what the work points to */
    struct kvp_page_copy *copies;
    uint32_t *group_ends;
    int64_t *slots;
    uint64_t *strides; /* offsets, token strides, head strides: [3][planes] */
    int32_t *rows;     /* kv_indptr, last_page_len, tokens, kv_indices */
    struct kvp_digest *digests;
};

static const Kvpool__V1__ExecJobRequest *request_of(const struct kvp_exec_job *job)
{
    return (const void *)job->request->body;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static uint32_t pages_for(uint32_t tokens, uint32_t page_tokens)
{
    return (uint32_t)(((uint64_t)tokens + page_tokens - 1) / page_tokens);
}

/* @param ret_nnz  left as it is with an empty batch */
static enum kvp_status check_rows(const Kvpool__V1__ExecJobRequest *r, const struct kvp_layout_spec *spec,
                                  uint32_t *ret_nnz, struct kvp_exec_error *reterr)
{
    size_t batch = r->n_tokens;
    uint64_t nnz = 0;

    if (batch > KVP_BATCH_MAX || r->n_start != batch || r->n_kv_indptr != (batch > 0 ? batch + 1 : r->n_kv_indptr))
        return kvp_exec_fail(reterr, KVP_EINVAL, "a batch of %zu tokens, %zu starts, %zu row ends: the limit is %d",
                             batch, r->n_start, r->n_kv_indptr, KVP_BATCH_MAX);
    if (batch == 0)
        return KVP_OK;
    if (r->kv_indptr[0] != 0 || r->kv_indptr[batch] < 0 || (size_t)r->kv_indptr[batch] != r->n_kv_indices ||
        r->n_kv_indices > KVP_CALL_PAGES_MAX)
        return kvp_exec_fail(reterr, KVP_EINVAL, "rows from %d to %d do not cover %zu pages (limit %u)",
                             r->kv_indptr[0], r->kv_indptr[batch], r->n_kv_indices, KVP_CALL_PAGES_MAX);
    for (size_t b = 0; b < batch; b++) {
        uint64_t after = (uint64_t)r->start[b] + r->tokens[b];
        int64_t pages = (int64_t)r->kv_indptr[b + 1] - r->kv_indptr[b];

        if (pages < 0 || after > KVP_SEQUENCE_TOKENS_MAX || after > (uint64_t)pages * spec->page_tokens)
            return kvp_exec_fail(reterr, KVP_EINVAL,
                                 "sequence %zu: %" PRIu64 " tokens do not fit its %" PRId64 " pages", b, after, pages);
        nnz += r->tokens[b];
    }
    if (nnz > KVP_CALL_TOKENS_MAX)
        return kvp_exec_fail(reterr, KVP_ELIMIT, "%" PRIu64 " tokens in one job, the limit is %u", nnz,
                             KVP_CALL_TOKENS_MAX);
    for (size_t i = 0; i < r->n_kv_indices; i++)
        if (r->kv_indices[i] < 0 || (uint32_t)r->kv_indices[i] >= spec->pages)
            return kvp_exec_fail(reterr, KVP_EINVAL, "page %d is not one of the pool's %" PRIu32, r->kv_indices[i],
                                 spec->pages);
    *ret_nnz = (uint32_t)nnz;
    return KVP_OK;
}

/* Where each token goes. */
static enum kvp_status prepare_slots(struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    uint32_t page_tokens = job->work.spec->page_tokens;
    size_t j = 0;

    job->slots = malloc(sizeof(*job->slots) * job->work.nnz);
    if (job->slots == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for %" PRIu32 " slots", job->work.nnz);
    for (size_t b = 0; b < r->n_tokens; b++)
        for (uint32_t t = 0; t < r->tokens[b]; t++) {
            uint32_t position = r->start[b] + t;
            int64_t page = r->kv_indices[(uint32_t)r->kv_indptr[b] + position / page_tokens];

            job->slots[j++] = page * page_tokens + position % page_tokens;
        }
    job->work.slots = job->slots;
    return KVP_OK;
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

static bool conflicts(const struct kvp_page_copy *group, uint32_t n, const struct kvp_page_copy *copy)
{
    for (uint32_t i = 0; i < n; i++)
        if (copy->source == group[i].destination || copy->destination == group[i].source ||
            copy->destination == group[i].destination)
            return true;
    return false;
}

static enum kvp_status prepare_copies(struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    const struct kvp_layout_spec *spec = job->work.spec;
    uint32_t n = (uint32_t)r->n_copy_sources, from = 0;

    if (r->n_copy_sources > KVP_BATCH_MAX || r->n_copy_destinations != n || r->n_copy_tokens != n)
        return kvp_exec_fail(reterr, KVP_EINVAL, "%zu copy sources, %zu destinations, %zu tokens: the limit is %d",
                             r->n_copy_sources, r->n_copy_destinations, r->n_copy_tokens, KVP_BATCH_MAX);
    if (n == 0)
        return KVP_OK;
    job->copies = calloc(n, sizeof(*job->copies));
    job->group_ends = calloc(n, sizeof(*job->group_ends));
    if (job->copies == NULL || job->group_ends == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for %" PRIu32 " copies", n);
    for (uint32_t i = 0; i < n; i++) {
        if (r->copy_sources[i] >= spec->pages || r->copy_destinations[i] >= spec->pages ||
            r->copy_sources[i] == r->copy_destinations[i] || r->copy_tokens[i] > spec->page_tokens)
            return kvp_exec_fail(
                reterr, KVP_EINVAL,
                "copy of %" PRIu32 " tokens from page %" PRIu32 " to %" PRIu32 " in %" PRIu32 " pages of %" PRIu32,
                r->copy_tokens[i], r->copy_sources[i], r->copy_destinations[i], spec->pages, spec->page_tokens);
        job->copies[i] = (struct kvp_page_copy){.source = (int32_t)r->copy_sources[i],
                                                .destination = (int32_t)r->copy_destinations[i],
                                                .tokens = r->copy_tokens[i]};
        if (conflicts(job->copies + from, i - from, &job->copies[i])) {
            job->group_ends[job->work.n_groups++] = i;
            from = i;
        }
    }
    job->group_ends[job->work.n_groups++] = n;
    job->work.copies = job->copies;
    job->work.group_ends = job->group_ends;
    return KVP_OK;
}

/* ---- zeros ------------------------------------------------------------------------------------------------------- */

static enum kvp_status prepare_zeros(struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);

    if (r->n_zero_pages > KVP_CALL_PAGES_MAX)
        return kvp_exec_fail(reterr, KVP_EINVAL, "%zu pages to zero, the limit is %u", r->n_zero_pages,
                             KVP_CALL_PAGES_MAX);
    for (size_t i = 0; i < r->n_zero_pages; i++)
        if (r->zero_pages[i] >= job->work.spec->pages)
            return kvp_exec_fail(reterr, KVP_EINVAL, "page %" PRIu32 " to zero is not one of the pool's %" PRIu32,
                                 r->zero_pages[i], job->work.spec->pages);
    job->work.n_zero = (uint32_t)r->n_zero_pages;
    job->work.zero_pages = (const int32_t *)r->zero_pages;
    return KVP_OK;
}

/* ---- digests ----------------------------------------------------------------------------------------------------- */

static enum kvp_status prepare_digests(struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);

    if (r->n_digest_pages == 0 || r->n_digest_pages > KVP_BATCH_MAX)
        return kvp_exec_fail(reterr, KVP_EINVAL, "digests of %zu pages: 1 to %d of them", r->n_digest_pages,
                             KVP_BATCH_MAX);
    for (size_t i = 0; i < r->n_digest_pages; i++)
        if (r->digest_pages[i] >= job->work.spec->pages)
            return kvp_exec_fail(reterr, KVP_EINVAL, "the digest of page %" PRIu32 ": the pool has %" PRIu32,
                                 r->digest_pages[i], job->work.spec->pages);
    job->digests = calloc(r->n_digest_pages, sizeof(*job->digests));
    if (job->digests == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for %zu digests", r->n_digest_pages);
    job->work.n_digests = (uint32_t)r->n_digest_pages;
    job->work.digest_pages = (const int32_t *)r->digest_pages;
    job->work.digests = job->digests;
    return KVP_OK;
}

/* ---- the source of an append ------------------------------------------------------------------------------------- */

static uint64_t row_bytes(const struct kvp_plane_spec *plane)
{
    return (uint64_t)plane->heads * plane->dim * kvp_dtype_bytes(plane->dtype);
}

/* Does offset + (nnz - 1) · token_stride + (heads - 1) · head_stride + one head's bytes pass `bytes`? */
static bool passes(const struct kvp_plane_spec *plane, uint32_t nnz, uint64_t offset, uint64_t token_stride,
                   uint64_t head_stride, uint64_t bytes)
{
    uint64_t tokens, heads, end = (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);

    return token_stride > INT64_MAX || head_stride > INT64_MAX ||
           __builtin_mul_overflow(token_stride, (uint64_t)nnz - 1, &tokens) ||
           __builtin_mul_overflow(head_stride, (uint64_t)plane->heads - 1, &heads) ||
           __builtin_add_overflow(end, offset, &end) || __builtin_add_overflow(end, tokens, &end) ||
           __builtin_add_overflow(end, heads, &end) || end > bytes;
}

/* Offsets and strides as they are given, or of planes that lie packed one behind the other. */
static enum kvp_status prepare_strides(struct kvp_exec_job *job, uint64_t bytes, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    const struct kvp_layout_spec *spec = job->work.spec;
    uint32_t n = spec->n_planes;
    uint64_t *offsets, *token_strides, *head_strides, at = 0;

    if ((r->n_plane_offsets != 0 && r->n_plane_offsets != n) || (r->n_token_strides != 0 && r->n_token_strides != n) ||
        (r->n_head_strides != 0 && r->n_head_strides != n))
        return kvp_exec_fail(reterr, KVP_EINVAL, "%zu offsets, %zu token and %zu head strides for %" PRIu32 " planes",
                             r->n_plane_offsets, r->n_token_strides, r->n_head_strides, n);
    if (r->n_plane_offsets == 0 && (r->n_token_strides != 0 || r->n_head_strides != 0))
        return kvp_exec_fail(reterr, KVP_EINVAL, "strides are given without the planes' offsets");
    job->strides = offsets = calloc(3 * (size_t)n, sizeof(*offsets));
    if (offsets == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for the strides of %" PRIu32 " planes", n);
    token_strides = offsets + n;
    head_strides = token_strides + n;
    for (uint32_t p = 0; p < n; p++) {
        const struct kvp_plane_spec *plane = &spec->planes[p];

        offsets[p] = r->n_plane_offsets != 0 ? r->plane_offsets[p] : at;
        token_strides[p] = r->n_token_strides != 0 ? r->token_strides[p] : row_bytes(plane);
        head_strides[p] =
            r->n_head_strides != 0 ? r->head_strides[p] : (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
        at += row_bytes(plane) * job->work.nnz;
        if (passes(plane, job->work.nnz, offsets[p], token_strides[p], head_strides[p], bytes))
            return kvp_exec_fail(reterr, KVP_EINVAL,
                                 "plane %" PRIu32 " of the source ends behind its %" PRIu64 " bytes", p, bytes);
    }
    if (r->buffer == 0 && r->n_plane_offsets == 0 && at != bytes)
        return kvp_exec_fail(reterr, KVP_EINVAL, "%" PRIu64 " inline bytes, the planes' tokens have %" PRIu64, bytes,
                             at);
    job->work.source.offsets = offsets;
    job->work.source.token_strides = token_strides;
    job->work.source.head_strides = head_strides;
    return KVP_OK;
}

static enum kvp_status need_buffer(struct kvp_exec *exec, struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    struct kvp_exec_object *buffer = kvp_exec_object_get(&exec->buffers, r->session_id, r->buffer);

    if (buffer == NULL)
        return kvp_exec_fail(reterr, KVP_ENOENT, "buffer %" PRIu32 " of the session is not here", r->buffer);
    kvp_exec_object_use(buffer);
    job->buffer = buffer;
    return KVP_OK;
}

static enum kvp_status prepare_source(struct kvp_exec *exec, struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    struct kvp_exec_source *source = &job->work.source;
    enum kvp_status status;

    if ((r->inline_.len > 0) == (r->buffer != 0))
        return kvp_exec_fail(reterr, KVP_EINVAL, "the source of an append is inline bytes or a buffer: one of them");
    if (r->buffer == 0) {
        source->host = r->inline_.data;
        return prepare_strides(job, r->inline_.len, reterr);
    }
    status = need_buffer(exec, job, reterr);
    if (status != KVP_OK)
        return status;
    source->host = job->buffer->memory.host;
    source->device = job->buffer->memory.device;
    return prepare_strides(job, job->buffer->memory.bytes, reterr);
}

/* ---- an index job ------------------------------------------------------------------------------------------------ */

static enum kvp_status check_outputs(const struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const struct kvp_exec_index *index = &job->index;
    const struct kvp_exec_memory *target = index->target;
    uintptr_t base = target->host != NULL ? (uintptr_t)target->host : (uintptr_t)target->device;

    for (unsigned k = 0; k < KVP_EXEC_OUTPUTS; k++) {
        unsigned element = k == 2 ? 8 : 4; /* slots are 64-bit */

        if ((index->wanted & 1u << k) == 0)
            continue;
        if (index->offsets[k] > target->bytes || index->bytes[k] > target->bytes - index->offsets[k])
            return kvp_exec_fail(reterr, KVP_EINVAL,
                                 "output %u of %" PRIu64 " bytes at %" PRIu64 " ends behind the buffer's %" PRIu64, k,
                                 index->bytes[k], index->offsets[k], target->bytes);
        if ((base + index->offsets[k]) % element != 0)
            return kvp_exec_fail(reterr, KVP_EINVAL, "output %u at %" PRIu64 " is not aligned to its %u-byte elements",
                                 k, index->offsets[k], element);
    }
    return KVP_OK;
}

/* The rows cut to the pages that the lengths after the append need: what the index kernel takes. */
static enum kvp_status prepare_rows(struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    uint32_t page_tokens = job->work.spec->page_tokens, batch = (uint32_t)r->n_tokens, pages = 0;
    int32_t *indptr, *last, *tokens, *indices;

    job->rows = calloc(3 * (size_t)batch + 1 + r->n_kv_indices, sizeof(*job->rows));
    if (job->rows == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for %zu pages of rows", r->n_kv_indices);
    indptr = job->rows;
    last = indptr + batch + 1;
    tokens = last + batch;
    indices = tokens + batch;
    for (uint32_t b = 0; b < batch; b++) {
        uint32_t after = r->start[b] + r->tokens[b], n = pages_for(after, page_tokens);

        last[b] = n > 0 ? (int32_t)(after - (n - 1) * page_tokens) : 0;
        tokens[b] = (int32_t)r->tokens[b];
        for (uint32_t i = 0; i < n; i++)
            indices[pages + i] = r->kv_indices[(uint32_t)r->kv_indptr[b] + i];
        pages += n;
        indptr[b + 1] = (int32_t)pages;
    }
    job->index.batch = batch;
    job->index.pages = pages;
    job->index.kv_indptr = indptr;
    job->index.kv_indices = indices;
    job->index.last_page_len = last;
    job->index.tokens = tokens;
    return KVP_OK;
}

static enum kvp_status prepare_index(struct kvp_exec *exec, struct kvp_exec_job *job, uint32_t nnz,
                                     struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    struct kvp_exec_index *index = &job->index;
    enum kvp_status status = need_buffer(exec, job, reterr);

    if (status == KVP_OK)
        status = prepare_rows(job, reterr);
    if (status != KVP_OK)
        return status;
    if (r->wanted >= 1u << KVP_EXEC_OUTPUTS || r->n_output_offsets != KVP_EXEC_OUTPUTS)
        return kvp_exec_fail(reterr, KVP_EINVAL, "outputs %#" PRIx32 " with %zu offsets: there are %d", r->wanted,
                             r->n_output_offsets, KVP_EXEC_OUTPUTS);
    if (!job->buffer->memory.writable)
        return kvp_exec_fail(reterr, KVP_EINVAL, "buffer %" PRIu32 " can only be read", r->buffer);
    index->nnz = nnz;
    index->wanted = r->wanted != 0 ? r->wanted : 7;
    index->target = &job->buffer->memory;
    memcpy(index->offsets, r->output_offsets, sizeof(index->offsets));
    index->bytes[0] = index->bytes[1] = 4ull * nnz;
    index->bytes[2] = 8ull * nnz;
    index->bytes[3] = 4ull * (index->batch + 1);
    index->bytes[4] = 4ull * index->pages;
    index->bytes[5] = index->bytes[6] = 4ull * index->batch;
    job->work.index = index;
    return check_outputs(job, reterr);
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static enum kvp_status prepare_order(struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    struct kvp_timeline *timelines = job->slab->timelines;

    if (timelines == NULL)
        return kvp_exec_fail(reterr, KVP_EMISMATCH, "the pool's slab was not adopted with its timelines");
    if (job->slab->table->state == KVP_TABLE_LOST || job->slab->table->state == KVP_TABLE_DELETED)
        return kvp_exec_fail(reterr, KVP_ELOST, "the pool is lost or deleted");
    if ((r->wait_value != 0 && r->wait_timeline >= KVP_EXEC_TIMELINES) ||
        (r->done_value != 0 && r->done_timeline >= KVP_EXEC_TIMELINES))
        return kvp_exec_fail(reterr, KVP_EINVAL, "timelines %" PRIu32 " and %" PRIu32 ": a pool has %d",
                             r->wait_timeline, r->done_timeline, KVP_EXEC_TIMELINES);
    if (r->wait_value != 0) {
        job->item.task.wait = &timelines[r->wait_timeline];
        job->item.task.wait_value = r->wait_value;
    }
    if (r->done_value != 0) {
        job->work.done = job->item.task.done = &timelines[r->done_timeline];
        job->work.done_value = job->item.task.done_value = r->done_value;
    }
    return KVP_OK;
}

static enum kvp_status prepare(struct kvp_exec *exec, struct kvp_exec_job *job, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecJobRequest *r = request_of(job);
    struct kvp_exec_object *slab = kvp_exec_object_get(&exec->slabs, r->pool_id, r->rank);
    enum kvp_status status;
    uint32_t nnz = 0;

    if (slab == NULL)
        return kvp_exec_fail(reterr, KVP_ENOENT, "slab %" PRIu32 " of the pool is not here", r->rank);
    kvp_exec_object_use(slab);
    job->slab = (struct kvp_exec_slab *)slab;
    job->work.spec = &job->slab->geometry->spec;
    job->work.planes = job->slab->geometry->planes;
    job->work.slab = &slab->memory;
    status = prepare_order(job, reterr);
    if (status == KVP_OK)
        status = check_rows(r, job->work.spec, &nnz, reterr);
    if (status == KVP_OK)
        status = prepare_zeros(job, reterr);
    if (status == KVP_OK)
        status = prepare_copies(job, reterr);
    if (status != KVP_OK || r->kind == KVPOOL__V1__JOB_KIND__JOB_COPY || r->kind == KVPOOL__V1__JOB_KIND__JOB_ZERO)
        return status;
    if (r->kind == KVPOOL__V1__JOB_KIND__JOB_DIGEST)
        return prepare_digests(job, reterr);
    if (r->kind == KVPOOL__V1__JOB_KIND__JOB_INDEX)
        return prepare_index(exec, job, nnz, reterr);
    if (r->kind != KVPOOL__V1__JOB_KIND__JOB_APPEND)
        return kvp_exec_fail(reterr, KVP_EINVAL, "job kind %d is none", (int)r->kind);
    job->work.nnz = nnz;
    if (nnz > 0)
        status = prepare_source(exec, job, reterr);
    return status == KVP_OK && nnz > 0 ? prepare_slots(job, reterr) : status;
}

/* ---- its life ---------------------------------------------------------------------------------------------------- */

static void job_free(struct kvp_exec *exec, struct kvp_exec_job *job)
{
    if (job->slab != NULL)
        kvp_exec_object_release(&exec->slabs, &job->slab->object);
    if (job->buffer != NULL)
        kvp_exec_object_release(&exec->buffers, job->buffer);
    free(job->copies);
    free(job->group_ends);
    free(job->slots);
    free(job->strides);
    free(job->rows);
    free(job->digests);
    if (job->request != NULL)
        kvp_exec_request_free(job->request);
    free(job);
}

static void answer(struct kvp_exec *exec, uint64_t tag, uint64_t job, enum kvp_status status, const char *text)
{
    Kvpool__V1__ExecJobReply reply = KVPOOL__V1__EXEC_JOB_REPLY__INIT;

    reply.job = job;
    if (status == KVP_OK)
        kvp_exec_reply(exec, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, tag, &reply.base, -1);
    else
        kvp_exec_refuse(exec, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, tag, status, text);
}

/* The answer to a job that was done; one that is remembered has no digests. */
static void answer_done(struct kvp_exec *exec, const struct kvp_exec_job *job)
{
    Kvpool__V1__ExecJobReply reply = KVPOOL__V1__EXEC_JOB_REPLY__INIT;
    uint64_t digests[KVP_BATCH_MAX];

    for (uint32_t i = 0; i < job->work.n_digests; i++)
        digests[i] = job->digests[i].word[0];
    reply.job = job->job;
    reply.n_digests = job->work.n_digests;
    reply.digests = digests;
    kvp_exec_reply(exec, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, job->tag, &reply.base, -1);
}

static enum kvp_status job_run(struct kvp_exec_task *task, struct kvp_exec_worker *worker,
                               struct kvp_exec_error *reterr)
{
    struct kvp_exec_job *job = (struct kvp_exec_job *)task;

    return job->backend->run(worker, &job->work, reterr);
}

static void unlink_job(struct kvp_exec *exec, struct kvp_exec_job *job)
{
    struct kvp_exec_job **at = &exec->jobs;

    while (*at != job)
        at = &(*at)->next_open;
    *at = job->next_open;
    exec->n_jobs--;
}

static void job_ended(struct kvp_exec *exec, struct kvp_exec_work_item *item)
{
    struct kvp_exec_job *job = (struct kvp_exec_job *)item;
    struct kvp_exec_outcome *outcome = &exec->outcomes[exec->next_outcome];

    unlink_job(exec, job);
    if (job->job != 0) {
        exec->next_outcome = (exec->next_outcome + 1) % KVP_EXEC_REMEMBERED;
        outcome->job = job->job;
        outcome->status = item->task.status;
        snprintf(outcome->text, sizeof(outcome->text), "%.*s", (int)sizeof(outcome->text) - 1, item->task.error.text);
    }
    if (item->task.status == KVP_OK)
        answer_done(exec, job);
    else
        answer(exec, job->tag, job->job, item->task.status, item->task.error.text);
    job_free(exec, job);
}

static void job_forget(struct kvp_exec *exec, struct kvp_exec_work_item *item)
{
    struct kvp_exec_job *job = (struct kvp_exec_job *)item;

    unlink_job(exec, job);
    job_free(exec, job);
}

/* @return true: the job is known, and this request answered or noted */
static bool known(struct kvp_exec *exec, const Kvpool__V1__ExecJobRequest *r, uint64_t tag)
{
    if (r->job == 0)
        return false;
    for (struct kvp_exec_job *job = exec->jobs; job != NULL; job = job->next_open)
        if (job->job == r->job) {
            job->tag = tag;
            return true;
        }
    for (unsigned i = 0; i < KVP_EXEC_REMEMBERED; i++)
        if (exec->outcomes[i].job == r->job) {
            answer(exec, tag, r->job, exec->outcomes[i].status, exec->outcomes[i].text);
            return true;
        }
    return false;
}

void kvp_exec_job(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    const Kvpool__V1__ExecJobRequest *r = (const void *)request->body;
    struct kvp_exec_error error = {0};
    struct kvp_exec_job *job;
    enum kvp_status status;

    if (known(exec, r, request->tag))
        return;
    if (r->kind == KVPOOL__V1__JOB_KIND__JOB_NONE) {
        kvp_exec_refuse(exec, request->method, request->tag, KVP_ENOENT, "this executor knows no such job");
        return;
    }
    job = exec->n_jobs < KVP_EXEC_JOBS_MAX ? calloc(1, sizeof(*job)) : NULL;
    if (job == NULL) {
        kvp_exec_refuse(exec, request->method, request->tag, KVP_ELIMIT, "too many jobs are open");
        return;
    }
    job->request = request;
    job->backend = exec->backend;
    job->job = r->job;
    job->tag = request->tag;
    job->item.task.device = exec->device;
    job->item.task.session = r->session_id;
    job->item.task.pool = r->pool_id;
    job->item.task.run = job_run;
    job->item.ended = job_ended;
    job->item.forget = job_forget;
    status = prepare(exec, job, &error);
    if (status == KVP_OK && kvp_exec_queue_submit(exec->queue, &job->item.task) != KVP_OK)
        status = kvp_exec_fail(&error, KVP_ENOMEM, "no memory or thread for the job");
    if (status != KVP_OK) {
        kvp_exec_task_failed(&job->item.task, status);
        answer(exec, job->tag, job->job, status, error.text);
        job->request = NULL; /* still the loop's */
        job_free(exec, job);
        return;
    }
    request->kept = true;
    job->next_open = exec->jobs;
    exec->jobs = job;
    exec->n_jobs++;
}
