/**
 * The checks of kvp_check.h: every field that the kernels rely on, against what kvp_kernels.h says of it.
 *
 * Sizes are held so small that no kernel has to fear an overflow: fewer than 2^31 tokens, list entries and sequences,
 * no plane's page of 2^31 bytes or more, and no plane, source or buffer reaching over 2^62 bytes from its base.
 */
#include "kvp_check.h"

#include <stdbool.h>
#include <stddef.h>

#define COUNT_MAX ((int64_t)INT32_MAX)
#define REACH_MAX ((int64_t)1 << 62)

/* (n − 1) · stride, or REACH_MAX where that is more or negative. */
static int64_t reach(int64_t n, int64_t stride)
{
    int64_t bytes;

    if (stride < 0 || n < 1 || __builtin_mul_overflow(n - 1, stride, &bytes) || bytes > REACH_MAX)
        return REACH_MAX;
    return bytes;
}

static bool aligned(const void *base, uint64_t bytes)
{
    return (uintptr_t)base % bytes == 0;
}

static bool count_fits(int64_t n)
{
    return n >= 0 && n <= COUNT_MAX;
}

static bool plane_fits(const struct kvp_plane_view *plane, uint32_t pages, uint32_t page_tokens)
{
    uint32_t element = kvp_dtype_bytes(plane->dtype);

    if ((uint64_t)plane->heads * plane->dim > (uint64_t)INT32_MAX / 4 ||
        (uint64_t)plane->heads * plane->dim * element * page_tokens > INT32_MAX)
        return false;
    return plane->base && element && plane->heads >= 1 && plane->heads <= KVP_HEADS_MAX && plane->dim >= 1 &&
           plane->dim <= KVP_DIM_MAX && reach(pages, plane->page_stride) < REACH_MAX / 4 &&
           reach(page_tokens, plane->token_stride) < REACH_MAX / 4 &&
           reach(plane->heads, plane->head_stride) < REACH_MAX / 4;
}

static bool planes_fit(const struct kvp_plane_view *planes, uint32_t n_planes, uint32_t pages, uint32_t page_tokens)
{
    if (!planes || n_planes < 1 || n_planes > KVP_PLANES_MAX || pages < 1 || pages > KVP_PAGES_MAX || page_tokens < 1 ||
        page_tokens > KVP_PAGE_TOKENS_MAX)
        return false;
    for (uint32_t p = 0; p < n_planes; p++) {
        if (!plane_fits(&planes[p], pages, page_tokens))
            return false;
    }
    return true;
}

/* Flat tensors beside the planes; `element` bytes of alignment are needed of each. */
static bool tokens_fit(const struct kvp_token_view *views, const struct kvp_plane_view *planes, uint32_t n_planes,
                       int64_t nnz, uint32_t element)
{
    if (nnz == 0)
        return true;
    if (!views)
        return false;
    for (uint32_t p = 0; p < n_planes; p++) {
        if (!views[p].base || reach(nnz, views[p].token_stride) >= REACH_MAX / 4 ||
            reach(planes[p].heads, views[p].head_stride) >= REACH_MAX / 4)
            return false;
        if (!aligned(views[p].base, element) || views[p].token_stride % element || views[p].head_stride % element)
            return false;
    }
    return true;
}

static bool rows_fit(const struct kvp_rows *table, const int32_t *seq_slots, const uint32_t *row_versions)
{
    return table->rows && seq_slots && table->max_sequences >= 1 && table->row_pages >= 1 &&
           table->row_stride % 4 == 0 && table->row_stride >= 4ull * table->row_pages &&
           table->max_sequences <= INT32_MAX && reach(table->max_sequences, (int64_t)table->row_stride) < REACH_MAX &&
           (!row_versions || table->heads);
}

static bool address_fits(const struct kvp_address *at)
{
    if (!count_fits(at->nnz))
        return false;
    if (at->nnz == 0)
        return true;
    if (at->index_bits != 32 && at->index_bits != 64)
        return false;
    if (at->kind == KVP_ADDRESS_SLOTS)
        return at->slot_mapping != NULL;
    if (!count_fits(at->batch))
        return false;
    switch (at->kind) {
    case KVP_ADDRESS_CSR:
        return at->batch_indices && at->positions && at->kv_indptr && at->kv_indices;
    case KVP_ADDRESS_TABLE:
        return at->batch_indices && at->positions && at->page_table && at->page_table_pages >= 1 &&
               at->page_table_pages <= at->page_table_stride &&
               reach(at->batch + 1, at->page_table_stride) < REACH_MAX / 8;
    case KVP_ADDRESS_ROWS:
        return rows_fit(&at->table, at->seq_slots, at->row_versions) &&
               (at->batch_indices ? at->positions != NULL : at->start_lengths != NULL);
    default:
        return false;
    }
}

enum kvp_status kvp_check_append(const struct kvp_append_args *args)
{
    if (!args || !planes_fit(args->planes, args->n_planes, args->pages, args->page_tokens) ||
        !address_fits(&args->at) || !tokens_fit(args->sources, args->planes, args->n_planes, args->at.nnz, 1))
        return KVP_EINVAL;
    if (args->n_copies > COUNT_MAX || (args->n_copies && !args->copies))
        return KVP_EINVAL;
    return KVP_OK;
}

static bool is_fp8(uint32_t dtype)
{
    return dtype == KVP_DTYPE_FP8_E4M3 || dtype == KVP_DTYPE_FP8_E5M2;
}

static bool is_wide_float(uint32_t dtype)
{
    return dtype == KVP_DTYPE_F32 || dtype == KVP_DTYPE_F16 || dtype == KVP_DTYPE_BF16;
}

static bool scales_fit(uint32_t mode, const float *const *scales, const struct kvp_plane_view *scale_planes,
                       const struct kvp_plane_view *planes, uint32_t n_planes, uint32_t pages, uint32_t page_tokens)
{
    switch (mode) {
    case KVP_SCALE_NONE:
        return true;
    case KVP_SCALE_TENSOR:
    case KVP_SCALE_HEAD:
        for (uint32_t p = 0; scales && p < n_planes; p++) {
            if (!scales[p] || !aligned(scales[p], 4))
                return false;
        }
        return scales != NULL;
    case KVP_SCALE_COMPUTED:
        if (!planes_fit(scale_planes, n_planes, pages, page_tokens))
            return false;
        for (uint32_t p = 0; p < n_planes; p++) {
            const struct kvp_plane_view *s = &scale_planes[p];

            if (s->dtype != KVP_DTYPE_F32 || s->heads != planes[p].heads || s->dim != 1 || !aligned(s->base, 4) ||
                s->page_stride % 4 || s->token_stride % 4 || s->head_stride % 4)
                return false;
        }
        return true;
    default:
        return false;
    }
}

enum kvp_status kvp_check_quant_append(const struct kvp_quant_append_args *args)
{
    if (!args || !planes_fit(args->planes, args->n_planes, args->pages, args->page_tokens) ||
        !address_fits(&args->at) || !is_wide_float(args->source_dtype) ||
        !tokens_fit(args->sources, args->planes, args->n_planes, args->at.nnz, kvp_dtype_bytes(args->source_dtype)) ||
        !scales_fit(args->scale_mode, args->scales, args->scale_planes, args->planes, args->n_planes, args->pages,
                    args->page_tokens))
        return KVP_EINVAL;
    for (uint32_t p = 0; p < args->n_planes; p++) {
        if (!is_fp8(args->planes[p].dtype) || args->planes[p].dtype != args->planes[0].dtype)
            return KVP_EINVAL;
    }
    return KVP_OK;
}

enum kvp_status kvp_check_gather(const struct kvp_gather_args *args)
{
    if (!args || !planes_fit(args->planes, args->n_planes, args->pages, args->page_tokens) || !address_fits(&args->at))
        return KVP_EINVAL;
    if (args->dtype == 0) {
        if (args->scale_mode != KVP_SCALE_NONE ||
            !tokens_fit(args->destinations, args->planes, args->n_planes, args->at.nnz, 1))
            return KVP_EINVAL;
        return KVP_OK;
    }
    if (!is_wide_float(args->dtype) ||
        !tokens_fit(args->destinations, args->planes, args->n_planes, args->at.nnz, kvp_dtype_bytes(args->dtype)) ||
        !scales_fit(args->scale_mode, args->scales, args->scale_planes, args->planes, args->n_planes, args->pages,
                    args->page_tokens))
        return KVP_EINVAL;
    for (uint32_t p = 0; p < args->n_planes; p++) {
        if (!is_fp8(args->planes[p].dtype) || args->planes[p].dtype != args->planes[0].dtype)
            return KVP_EINVAL;
    }
    return KVP_OK;
}

static bool index_source_fits(const struct kvp_index_args *args)
{
    switch (args->source) {
    case KVP_INDEX_ROWS:
        return rows_fit(&args->table, args->seq_slots, args->row_versions) &&
               (args->start_lengths || args->progress || args->table.heads);
    case KVP_INDEX_CSR:
        return args->in_kv_indptr && args->in_last_page_len &&
               (args->in_kv_indices || (!args->ret_kv_indices && !args->ret_slot_mapping));
    case KVP_INDEX_TABLE:
        return args->in_page_table && args->in_last_page_len && args->in_page_table_pages >= 1 &&
               args->in_page_table_pages <= args->in_page_table_stride && args->in_page_table_pages <= COUNT_MAX &&
               reach(args->batch + 1, args->in_page_table_stride) < REACH_MAX / 8;
    default:
        return false;
    }
}

enum kvp_status kvp_check_index(const struct kvp_index_args *args)
{
    if (!args || (args->index_bits != 32 && args->index_bits != 64) || args->batch < 0 ||
        args->batch > KVP_INDEX_BATCH_MAX || !count_fits(args->nnz) || !count_fits(args->kv_capacity) ||
        args->pages < 1 || args->pages > KVP_PAGES_MAX || args->page_tokens < 1 ||
        args->page_tokens > KVP_PAGE_TOKENS_MAX || args->all_tokens > 1)
        return KVP_EINVAL;
    if (args->ret_slot_mapping && args->slot_bits != 32 && args->slot_bits != 64)
        return KVP_EINVAL;
    if (args->append_each < 0 || args->append_each > COUNT_MAX)
        return KVP_EINVAL;
    if (args->batch > 0 && !index_source_fits(args))
        return KVP_EINVAL;
    return KVP_OK;
}

enum kvp_status kvp_check_progress(const struct kvp_progress_args *args)
{
    if (!args || !count_fits(args->n) || (args->index_bits != 32 && args->index_bits != 64))
        return KVP_EINVAL;
    if (args->n && (!args->progress || !args->seq_slots || !args->versions || !args->lengths ||
                    args->max_sequences < 1 || args->max_sequences > INT32_MAX))
        return KVP_EINVAL;
    return KVP_OK;
}

enum kvp_status kvp_check_page_copy(const struct kvp_page_copy_args *args)
{
    if (!args || !planes_fit(args->sources, args->n_planes, args->source_pages, args->page_tokens) ||
        !planes_fit(args->destinations, args->n_planes, args->destination_pages, args->page_tokens) ||
        args->n > COUNT_MAX || (args->n && !args->copies))
        return KVP_EINVAL;
    for (uint32_t p = 0; p < args->n_planes; p++) {
        if (args->sources[p].heads != args->destinations[p].heads ||
            args->sources[p].dim != args->destinations[p].dim || args->sources[p].dtype != args->destinations[p].dtype)
            return KVP_EINVAL;
    }
    return KVP_OK;
}

uint64_t kvp_flat_page_bytes(const struct kvp_plane_view *planes, uint32_t n_planes, uint32_t page_tokens)
{
    uint64_t bytes = 0;

    for (uint32_t p = 0; p < n_planes; p++)
        bytes += (uint64_t)planes[p].heads * planes[p].dim * kvp_dtype_bytes(planes[p].dtype) * page_tokens;
    return bytes;
}

/* A list of page ids over one pool's planes. */
static bool list_fits(const struct kvp_plane_view *planes, uint32_t n_planes, uint32_t pages, uint32_t page_tokens,
                      uint32_t n, const int32_t *page_ids)
{
    return planes_fit(planes, n_planes, pages, page_tokens) && n <= COUNT_MAX && (!n || page_ids);
}

enum kvp_status kvp_check_page_flat(const struct kvp_page_flat_args *args)
{
    if (!args || !list_fits(args->planes, args->n_planes, args->pages, args->page_tokens, args->n, args->page_ids))
        return KVP_EINVAL;
    if (args->n && (!args->flat || reach(args->n, args->flat_stride) >= REACH_MAX / 4 ||
                    (uint64_t)args->flat_stride < kvp_flat_page_bytes(args->planes, args->n_planes, args->page_tokens)))
        return KVP_EINVAL;
    return KVP_OK;
}

enum kvp_status kvp_check_page_zero(const struct kvp_page_zero_args *args)
{
    if (!args || !list_fits(args->planes, args->n_planes, args->pages, args->page_tokens, args->n, args->page_ids))
        return KVP_EINVAL;
    return KVP_OK;
}

enum kvp_status kvp_check_page_digest(const struct kvp_page_digest_args *args)
{
    if (!args || !list_fits(args->planes, args->n_planes, args->pages, args->page_tokens, args->n, args->page_ids) ||
        (args->n && (!args->ret_digests || !aligned(args->ret_digests, 8))))
        return KVP_EINVAL;
    return KVP_OK;
}
