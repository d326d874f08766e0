/**
 * A step: the pool's kernels over a batch, on the caller's stream, without a call to the daemon.
 *
 *   staging (host, pinned)          inputs (device)                    outputs (device)
 *   slots versions counts    copy   slots versions counts    index     seq_lens kv_indptr kv_indices …
 *   start rows, of step i   ──────► start rows              ──────►    batch_indices positions slot_mapping
 *                                          │                                 │ append, a layer at a time
 *                                          └──────── progress ◄──────────────┘
 *
 * On host pools all three are plain memory. On CUDA pools the staging memory is a ring of KVP_STEPS_AHEAD, each given
 * back by an event on the stream, since the host fills in the next step while the GPU is at the ones before; inputs and
 * outputs need no ring, as one stream uses them in order.
 *
 * What the host knows it checks before anything is enqueued: handles, the row's version and page count (taken here, so
 * that the kernel reads a row only as far as it was then), what is reserved. What only the GPU knows goes to the error
 * ring. One thread at a time uses a step.
 */
#include "cuda.h"
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define RING_RECORDS 16

struct staging {
    void *memory;
    void *event; /* CUDA */
};

enum input { SLOTS, VERSIONS, COUNTS, START, ROWS, INPUTS }; /* 4 bytes each, [n] */

struct kvp_step {
    struct kvp_pool *pool;
    uint32_t rank;
    uint32_t max_batch, max_tokens, max_pages;
    struct kvp_plane_view *planes; /* [n_planes] */
    struct staging staging[KVP_STEPS_AHEAD];
    unsigned next_staging;
    uint32_t *inputs;      /* [INPUTS · n] */
    unsigned char *device; /* inputs and outputs */
    struct kvp_error_ring *ring;
    uint64_t errors_told; /* of host pools: violations that a call has failed with */
    /* the step that is begun */
    uint32_t n, nnz;
    struct kvp_rows rows;
    uint64_t *progress;
    int32_t *seq_lens, *kv_indptr, *kv_indices, *kv_last_page_len, *append_indptr, *batch_indices, *positions;
    int64_t *slot_mapping;
};

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static size_t staging_bytes(const struct kvp_step *step)
{
    size_t inputs = (size_t)INPUTS * step->max_batch * sizeof(uint32_t);
    size_t copies = step->max_batch * sizeof(struct kvp_page_copy);
    size_t pages = step->max_pages * sizeof(int32_t);

    inputs = inputs > copies ? inputs : copies;
    return inputs > pages ? inputs : pages;
}

/* Hand out the arrays of one block. With `at` NULL nothing is set and the block's size is returned. */
static size_t place_outputs(struct kvp_step *step, unsigned char *at)
{
    struct {
        void *slot;
        size_t bytes;
    } arrays[] = {
        {&step->slot_mapping, step->max_tokens * sizeof(int64_t)},
        {&step->inputs, (size_t)INPUTS * step->max_batch * sizeof(uint32_t)},
        {&step->seq_lens, step->max_batch * sizeof(int32_t)},
        {&step->kv_indptr, (step->max_batch + 1) * sizeof(int32_t)},
        {&step->kv_indices, step->max_pages * sizeof(int32_t)},
        {&step->kv_last_page_len, step->max_batch * sizeof(int32_t)},
        {&step->append_indptr, (step->max_batch + 1) * sizeof(int32_t)},
        {&step->batch_indices, step->max_tokens * sizeof(int32_t)},
        {&step->positions, step->max_tokens * sizeof(int32_t)},
    };
    size_t offset = 0;

    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++) {
        if (at != NULL) {
            void *array = at + offset;

            memcpy(arrays[i].slot, &array, sizeof(array));
        }
        offset += (arrays[i].bytes + 255) & ~(size_t)255;
    }
    return offset;
}

static enum kvp_status make_memory(struct kvp_step *step)
{
    struct kvp_pool *pool = step->pool;
    size_t bytes = place_outputs(step, NULL);
    enum kvp_status status;
    void *memory;

    for (int i = 0; i < KVP_STEPS_AHEAD; i++) {
        status = kvp_host_alloc(pool, staging_bytes(step), &step->staging[i].memory);
        if (status == KVP_OK && pool->cuda != NULL)
            status = kvp_cuda_event_make(&step->staging[i].event);
        if (status != KVP_OK)
            return status;
    }
    status = kvp_host_alloc(pool, sizeof(*step->ring) + RING_RECORDS * sizeof(step->ring->records[0]), &memory);
    if (status != KVP_OK)
        return status;
    step->ring = memory;
    step->ring->capacity = RING_RECORDS;
    status = pool->cuda != NULL ? kvp_cuda_alloc(pool->cuda, step->rank, bytes, &memory)
                                : kvp_host_alloc(pool, bytes, &memory);
    if (status != KVP_OK)
        return status;
    step->device = memory;
    place_outputs(step, memory);
    return KVP_OK;
}

/* Table and progress page as the kernels reach them. */
static enum kvp_status share_tables(struct kvp_step *step)
{
    struct kvp_pool *pool = step->pool;
    const unsigned char *table = pool->table.address;
    enum kvp_status status = KVP_OK;

    step->progress = pool->progress.address;
    if (pool->cuda != NULL) {
        pthread_mutex_lock(&pool->client->lock);
        status = kvp_cuda_share(pool->cuda, KVP_CUDA_TABLE, &pool->table);
        if (status == KVP_OK)
            status = kvp_cuda_share(pool->cuda, KVP_CUDA_PROGRESS, &pool->progress);
        pthread_mutex_unlock(&pool->client->lock);
        if (status != KVP_OK)
            return status;
        table = (const unsigned char *)(uintptr_t)kvp_cuda_address(pool->cuda, KVP_CUDA_TABLE);
        step->progress = (uint64_t *)(uintptr_t)kvp_cuda_address(pool->cuda, KVP_CUDA_PROGRESS);
    }
    step->rows = (struct kvp_rows){.heads = (const void *)(table + pool->header->heads_offset),
                                   .rows = (const void *)(table + pool->header->rows_offset),
                                   .row_stride = pool->header->row_stride,
                                   .max_sequences = pool->header->max_sequences,
                                   .row_pages = pool->header->row_pages};
    return KVP_OK;
}

enum kvp_status kvp_step_create(struct kvp_pool *pool, uint32_t rank, uint32_t max_batch, uint32_t max_tokens,
                                uint32_t max_pages, struct kvp_step **ret_step)
{
    uint32_t n_planes = pool->info->spec.layout.n_planes;
    enum kvp_status status = kvp_pool_usable(pool);
    struct kvp_step *step;

    if (status != KVP_OK)
        return status;
    if (kvp_slab(pool, rank) == NULL)
        return kvp_fail(KVP_EINVAL, "rank %u of pool %s is not mapped", rank, pool->info->spec.name);
    if (max_batch == 0 || max_batch > KVP_INDEX_BATCH_MAX || max_tokens == 0 || max_tokens > INT32_MAX ||
        max_pages == 0 || max_pages > INT32_MAX)
        return kvp_fail(KVP_EINVAL,
                        "a step of %u sequences, %u tokens, %u pages; sequences are 1..%d, the others from 1",
                        max_batch, max_tokens, max_pages, KVP_INDEX_BATCH_MAX);
    step = calloc(1, sizeof(*step));
    if (step == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a step");
    step->pool = pool;
    step->rank = rank;
    step->max_batch = max_batch;
    step->max_tokens = max_tokens;
    step->max_pages = max_pages;
    step->planes = calloc(n_planes, sizeof(*step->planes));
    if (step->planes == NULL)
        status = kvp_fail(KVP_ENOMEM, "no memory for a step");
    for (uint32_t i = 0; i < n_planes && status == KVP_OK; i++)
        status = kvp_pool_plane(pool, rank, i, &step->planes[i]);
    if (status == KVP_OK && pool->cuda != NULL)
        status = kvp_cuda_enter(pool->cuda, rank);
    if (status == KVP_OK) {
        status = make_memory(step);
        if (status == KVP_OK)
            status = share_tables(step);
        if (pool->cuda != NULL)
            kvp_cuda_leave(pool->cuda);
    }
    if (status != KVP_OK) {
        kvp_step_destroy(step);
        return status;
    }
    *ret_step = step;
    return KVP_OK;
}

void kvp_step_destroy(struct kvp_step *step)
{
    struct kvp_cuda_pool *cuda;
    bool entered;

    if (step == NULL)
        return;
    cuda = step->pool->cuda;
    entered = cuda != NULL && kvp_cuda_enter(cuda, step->rank) == KVP_OK;
    for (int i = 0; i < KVP_STEPS_AHEAD; i++) {
        if (entered && step->staging[i].event != NULL) {
            kvp_cuda_event_wait(step->staging[i].event);
            kvp_cuda_event_free(step->staging[i].event);
        }
        if (step->staging[i].memory != NULL)
            kvp_host_free(step->pool, step->staging[i].memory);
    }
    if (entered)
        kvp_cuda_leave(cuda);
    if (step->ring != NULL)
        kvp_host_free(step->pool, step->ring);
    if (step->device != NULL && cuda != NULL)
        kvp_cuda_free(cuda, step->rank, step->device);
    else if (step->device != NULL)
        kvp_host_free(step->pool, step->device);
    free(step->planes);
    free(step);
}

/* ---- around a launch --------------------------------------------------------------------------------------------- */

static enum kvp_status enter(struct kvp_step *step)
{
    enum kvp_status status = kvp_pool_usable(step->pool);

    return status == KVP_OK && step->pool->cuda != NULL ? kvp_cuda_enter(step->pool->cuda, step->rank) : status;
}

/* Host kernels are done when they return: what they had to skip is told at once. */
static enum kvp_status leave(struct kvp_step *step, const char *what, enum kvp_status status)
{
    const struct kvp_error_record *first = &step->ring->records[0];
    uint64_t errors = step->ring->count;

    if (step->pool->cuda != NULL) {
        kvp_cuda_leave(step->pool->cuda);
        return status == KVP_OK ? KVP_OK
                                : kvp_fail(status, "the %s could not be enqueued: %s", what, kvp_status_text(status));
    }
    if (status != KVP_OK)
        return kvp_fail(status, "the %s was refused: %s", what, kvp_status_text(status));
    if (errors == step->errors_told)
        return KVP_OK;
    step->errors_told = errors;
    return kvp_fail(KVP_EMISMATCH, "the %s skipped what has no place in its row (kind %u, entry %lld, value %lld)",
                    what, first->kind, (long long)first->token, (long long)first->value);
}

static enum kvp_status take_staging(struct kvp_step *step, struct staging **ret_staging)
{
    struct staging *staging = &step->staging[step->next_staging];
    enum kvp_status status = staging->event != NULL ? kvp_cuda_event_wait(staging->event) : KVP_OK;

    if (status != KVP_OK)
        return status;
    step->next_staging = (step->next_staging + 1) % KVP_STEPS_AHEAD;
    *ret_staging = staging;
    return KVP_OK;
}

static enum kvp_status give_staging(struct staging *staging, void *stream)
{
    return staging->event != NULL ? kvp_cuda_event_record(staging->event, stream) : KVP_OK;
}

/* ---- begin ------------------------------------------------------------------------------------------------------- */

/* Fill in the inputs of one sequence. Where start is NULL the host backend knows it now, CUDA when the kernel runs. */
static enum kvp_status fill_input(struct kvp_step *step, uint32_t n, uint32_t i, struct kvp_seq seq, uint32_t tokens,
                                  const uint32_t *start, uint32_t *inputs)
{
    uint32_t version, row_pages, from = start != NULL ? start[i] : 0, reserved;
    enum kvp_status status = kvp_table_row_head(step->pool, seq, &version, &row_pages);
    bool known = start != NULL || step->pool->cuda == NULL;

    if (status == KVP_OK && start == NULL && known)
        status = kvp_seq_len(step->pool, seq, &from);
    if (status != KVP_OK)
        return status;
    reserved = kvp_table_reserved(step->pool, seq.slot, version);
    if (known && (uint64_t)from + tokens > reserved)
        return kvp_fail(KVP_EMISMATCH, "%u tokens behind %u of sequence %u.%u: %u are reserved", tokens, from, seq.slot,
                        seq.generation, reserved);
    inputs[SLOTS * n + i] = seq.slot;
    inputs[VERSIONS * n + i] = version;
    inputs[COUNTS * n + i] = tokens;
    inputs[START * n + i] = from;
    inputs[ROWS * n + i] = row_pages;
    return KVP_OK;
}

static enum kvp_status run_index(struct kvp_step *step, bool with_start, void *stream)
{
    uint32_t n = step->n, *in = step->inputs;
    const struct kvp_index_args args = {.source = KVP_INDEX_ROWS,
                                        .index_bits = 32,
                                        .slot_bits = 64,
                                        .pages = step->pool->info->spec.layout.pages,
                                        .page_tokens = step->pool->info->spec.layout.page_tokens,
                                        .batch = n,
                                        .nnz = step->nnz,
                                        .kv_capacity = step->max_pages,
                                        .append_lengths = in + COUNTS * n,
                                        .table = step->rows,
                                        .seq_slots = (const int32_t *)(in + SLOTS * n),
                                        .start_lengths = with_start ? in + START * n : NULL,
                                        .progress = step->progress,
                                        .row_counts = in + ROWS * n,
                                        .row_versions = in + VERSIONS * n,
                                        .ret_seq_lens = step->seq_lens,
                                        .ret_kv_indptr = step->kv_indptr,
                                        .ret_kv_indices = step->kv_indices,
                                        .ret_kv_last_page_len = step->kv_last_page_len,
                                        .ret_append_indptr = step->append_indptr,
                                        .ret_batch_indices = step->batch_indices,
                                        .ret_positions = step->positions,
                                        .ret_slot_mapping = step->slot_mapping,
                                        .errors = step->ring};

    return step->pool->cuda != NULL ? kvp_cuda_kernels.index(&args, stream) : kvp_host_index(&args, 1);
}

enum kvp_status kvp_step_begin(struct kvp_step *step, uint32_t n, const struct kvp_seq *seqs, const uint32_t *tokens,
                               const uint32_t *start, void *stream)
{
    bool cuda = step->pool->cuda != NULL;
    struct staging *staging;
    enum kvp_status status;
    uint64_t nnz = 0;

    step->n = step->nnz = 0; /* whoever goes on after a refusal writes nothing, and not once more what was before */
    if (n > step->max_batch)
        return kvp_fail(KVP_EINVAL, "a step of %u sequences; it was made for %u", n, step->max_batch);
    for (uint32_t i = 0; i < n; i++)
        nnz += tokens[i];
    if (nnz > step->max_tokens)
        return kvp_fail(KVP_EINVAL, "a step of %llu tokens; it was made for %u", (unsigned long long)nnz,
                        step->max_tokens);
    status = enter(step);
    if (status != KVP_OK)
        return status;
    status = take_staging(step, &staging);
    for (uint32_t i = 0; i < n && status == KVP_OK; i++)
        status = fill_input(step, n, i, seqs[i], tokens[i], start, staging->memory);
    if (status != KVP_OK) {
        if (cuda)
            kvp_cuda_leave(step->pool->cuda);
        return status;
    }
    step->n = n;
    step->nnz = (uint32_t)nnz;
    if (cuda)
        status = kvp_cuda_copy_in(step->inputs, staging->memory, (size_t)INPUTS * n * sizeof(uint32_t), stream);
    else
        memcpy(step->inputs, staging->memory, (size_t)INPUTS * n * sizeof(uint32_t));
    if (status == KVP_OK)
        status = run_index(step, start != NULL || !cuda, stream);
    if (status == KVP_OK)
        status = give_staging(staging, stream);
    status = leave(step, "index step", status);
    if (status != KVP_OK)
        step->n = step->nnz = 0;
    return status;
}

void kvp_step_view(const struct kvp_step *step, struct kvp_step_view *ret_view)
{
    *ret_view = (struct kvp_step_view){.n = step->n,
                                       .nnz = step->nnz,
                                       .seq_lens = step->seq_lens,
                                       .kv_indptr = step->kv_indptr,
                                       .kv_indices = step->kv_indices,
                                       .kv_last_page_len = step->kv_last_page_len,
                                       .append_indptr = step->append_indptr,
                                       .batch_indices = step->batch_indices,
                                       .positions = step->positions,
                                       .slot_mapping = step->slot_mapping};
}

/* ---- append, progress, pages ------------------------------------------------------------------------------------- */

enum kvp_status kvp_append(struct kvp_step *step, uint32_t first_plane, uint32_t n_planes,
                           const struct kvp_token_view *sources, void *stream)
{
    const struct kvp_layout_spec *layout = &step->pool->info->spec.layout;
    const struct kvp_append_args args = {
        .planes = step->planes + first_plane,
        .sources = sources,
        .n_planes = n_planes,
        .pages = layout->pages,
        .page_tokens = layout->page_tokens,
        .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = step->nnz, .slot_mapping = step->slot_mapping},
        .errors = step->ring};
    enum kvp_status status;

    if (n_planes == 0 || first_plane >= layout->n_planes || n_planes > layout->n_planes - first_plane)
        return kvp_fail(KVP_EINVAL, "planes %u + %u of the %u of pool %s", first_plane, n_planes, layout->n_planes,
                        step->pool->info->spec.name);
    status = enter(step);
    if (status != KVP_OK)
        return status;
    status = step->pool->cuda != NULL ? kvp_cuda_kernels.append(&args, stream) : kvp_host_append(&args, 0);
    return leave(step, "append", status);
}

enum kvp_status kvp_progress(struct kvp_step *step, void *stream)
{
    uint32_t n = step->n, *in = step->inputs;
    const struct kvp_progress_args args = {.progress = step->progress,
                                           .max_sequences = step->rows.max_sequences,
                                           .index_bits = 32,
                                           .n = n,
                                           .seq_slots = (const int32_t *)(in + SLOTS * n),
                                           .versions = in + VERSIONS * n,
                                           .lengths = step->seq_lens,
                                           .errors = step->ring};
    enum kvp_status status = enter(step);

    if (status != KVP_OK)
        return status;
    status = step->pool->cuda != NULL ? kvp_cuda_kernels.progress(&args, stream) : kvp_host_progress(&args, 1);
    return leave(step, "progress", status);
}

enum kvp_status kvp_copy_owed(struct kvp_step *step, uint32_t n, const struct kvp_page_copy *copies, void *stream)
{
    const struct kvp_layout_spec *layout = &step->pool->info->spec.layout;
    struct kvp_page_copy_args args = {.sources = step->planes,
                                      .destinations = step->planes,
                                      .n_planes = layout->n_planes,
                                      .page_tokens = layout->page_tokens,
                                      .source_pages = layout->pages,
                                      .destination_pages = layout->pages,
                                      .n = n,
                                      .errors = step->ring};
    struct staging *staging;
    enum kvp_status status;

    if (n > step->max_batch)
        return kvp_fail(KVP_EINVAL, "%u page copies; the step was made for %u", n, step->max_batch);
    if (n == 0)
        return KVP_OK;
    status = enter(step);
    if (status != KVP_OK)
        return status;
    status = take_staging(step, &staging);
    if (status == KVP_OK) {
        args.copies = memcpy(staging->memory, copies, n * sizeof(*copies));
        status = step->pool->cuda != NULL ? kvp_cuda_kernels.page_copy(&args, stream) : kvp_host_page_copy(&args, 0);
    }
    if (status == KVP_OK)
        status = give_staging(staging, stream);
    return leave(step, "page copy", status);
}

enum kvp_status kvp_read_pages(struct kvp_step *step, uint32_t n, const int32_t *pages, void *ret_bytes, void *stream)
{
    const struct kvp_layout_spec *layout = &step->pool->info->spec.layout;
    struct kvp_page_flat_args args = {
        .planes = step->planes,
        .n_planes = layout->n_planes,
        .pages = layout->pages,
        .page_tokens = layout->page_tokens,
        .n = n,
        .flat = ret_bytes,
        .flat_stride = (int64_t)kvp_flat_page_bytes(step->planes, layout->n_planes, layout->page_tokens),
        .errors = step->ring};
    struct staging *staging;
    enum kvp_status status;

    if (n > step->max_pages)
        return kvp_fail(KVP_EINVAL, "%u pages; the step was made for %u", n, step->max_pages);
    if (n == 0)
        return KVP_OK;
    status = enter(step);
    if (status != KVP_OK)
        return status;
    status = take_staging(step, &staging);
    if (status == KVP_OK) {
        args.page_ids = memcpy(staging->memory, pages, n * sizeof(*pages));
        status =
            step->pool->cuda != NULL ? kvp_cuda_kernels.page_gather(&args, stream) : kvp_host_page_gather(&args, 0);
    }
    if (status == KVP_OK)
        status = give_staging(staging, stream);
    if (status == KVP_OK && step->pool->cuda != NULL)
        status = kvp_cuda_sync(stream);
    return leave(step, "page read", status);
}

uint64_t kvp_step_errors(const struct kvp_step *step, struct kvp_error_record *ret_first)
{
    uint64_t count = __atomic_load_n(&step->ring->count, __ATOMIC_ACQUIRE);

    if (count > 0 && ret_first != NULL)
        *ret_first = step->ring->records[0];
    return count;
}
