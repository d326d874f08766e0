/**
 * Page operations: copy by a list, gather and scatter to a flat buffer, zero.
 *
 * All four are one kernel over (list entry, part of a page) × planes: what differs is how an entry names its two pages.
 * A block moves KVP_BLOCK_THREADS · PAGE_UNROLL vectors. A kernel takes up to 64 planes by parameter.
 */
#include "mover.cuh"

#define LAUNCH_PLANES 64

enum page_list {
    LIST_COPIES,  /* struct kvp_page_copy */
    LIST_GATHER,  /* page ids[i] → flat i */
    LIST_SCATTER, /* flat i → page ids[i] */
    LIST_ZERO,    /* zeros → page ids[i] */
};

struct plane_move {
    struct page_shape shape;
    const char *source;
    char *destination;
};

struct pages_params {
    struct kvp_error_ring *errors;
    const struct kvp_page_copy *copies;
    const int32_t *page_ids;
    uint32_t list; /* enum page_list */
    uint32_t first_entry;
    uint32_t entries;
    struct fast_div blocks; /* of the largest plane's page */
    struct fast_div blocks_per_plane;
    struct plane_move planes[LAUNCH_PLANES];
};

template <typename V>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) pages_kernel(const __grid_constant__ pages_params p)
{
    uint32_t plane = quotient(blockIdx.x, p.blocks_per_plane);
    uint32_t item = blockIdx.x - plane * p.blocks_per_plane.divisor;
    uint32_t entry = quotient(item, p.blocks), part = item - entry * p.blocks.divisor;
    const struct plane_move &move = p.planes[plane];
    const struct page_shape &s = move.shape;
    struct kvp_page_copy copy;

    entry += p.first_entry;
    if (p.list == LIST_COPIES) {
        copy = p.copies[entry];
    } else {
        int32_t id = p.page_ids[entry];

        copy = {id, id, s.page_tokens, 0};
        if (id >= 0 && p.list == LIST_GATHER)
            copy.destination = (int32_t)entry;
        if (id >= 0 && p.list == LIST_SCATTER)
            copy.source = (int32_t)entry;
    }
    if (copy.source < 0 || copy.destination < 0 || part >= s.blocks.divisor)
        return;
    if ((uint32_t)copy.source >= s.source_pages || (uint32_t)copy.destination >= s.destination_pages) {
        if (p.errors && plane == 0 && part == 0 && threadIdx.x == 0)
            report(p.errors, KVP_BAD_PAGE, entry,
                   (uint32_t)copy.source >= s.source_pages ? copy.source : copy.destination);
        return;
    }
    const char *source = move.source + copy.source * s.source_page_stride;
    char *destination = move.destination + copy.destination * s.destination_page_stride;

    if (p.list == LIST_ZERO)
        move_page_part<V, true>(s, nullptr, destination, s.page_tokens, part);
    else
        move_page_part<V, false>(s, source, destination, min(copy.tokens, s.page_tokens), part);
}

/* ---- the host's part --------------------------------------------------------------------------------------------- */

struct call {
    enum page_list list;
    uint32_t n_planes, page_tokens, n, source_pages, destination_pages;
    const struct kvp_page_copy *copies;
    const int32_t *page_ids;
    struct kvp_error_ring *errors;
    void *stream;
};

/* The planes of one launch. */
static enum kvp_status launch_list(const struct call *call, const struct kvp_plane_view *sources,
                                   const struct kvp_plane_view *destinations, uint32_t n, struct kvp_error_ring *errors)
{
    enum kvp_status status = KVP_OK;
    uint32_t blocks = 1, width, share;
    struct pages_params p;
    uint64_t bits = 0;

    for (uint32_t i = 0; i < n; i++)
        bits |= plane_alignment_bits(&sources[i]) | plane_alignment_bits(&destinations[i]);
    width = widest_vector(bits);
    width = width >= 4 && width < 16 ? 4 : width == 2 ? 1 : width;
    p.errors = errors;
    p.copies = call->copies;
    p.page_ids = call->page_ids;
    p.list = call->list;
    for (uint32_t i = 0; i < n; i++) {
        p.planes[i].shape = page_shape_of(&sources[i], &destinations[i], call->page_tokens, width);
        p.planes[i].shape.source_pages = call->source_pages;
        p.planes[i].shape.destination_pages = call->destination_pages;
        p.planes[i].source = static_cast<const char *>(sources[i].base);
        p.planes[i].destination = static_cast<char *>(destinations[i].base);
        if (p.planes[i].shape.blocks.divisor > blocks)
            blocks = p.planes[i].shape.blocks.divisor;
    }
    p.blocks = fast_div_of(blocks);
    share = (1u << 30) / n / blocks;
    share = share ? share : 1;
    for (p.first_entry = 0; status == KVP_OK && p.first_entry < call->n; p.first_entry += p.entries) {
        p.entries = call->n - p.first_entry < share ? call->n - p.first_entry : share;
        p.blocks_per_plane = fast_div_of(p.entries * blocks);
        if (width == 16)
            status = launch(pages_kernel<uint4>, p, n * p.entries * blocks, KVP_BLOCK_THREADS, 0, call->stream);
        else if (width == 4)
            status = launch(pages_kernel<uint32_t>, p, n * p.entries * blocks, KVP_BLOCK_THREADS, 0, call->stream);
        else
            status = launch(pages_kernel<uint8_t>, p, n * p.entries * blocks, KVP_BLOCK_THREADS, 0, call->stream);
    }
    return status;
}

extern "C" enum kvp_status kvp_cuda_page_copy(const struct kvp_page_copy_args *args, void *stream)
{
    enum kvp_status status = kvp_check_page_copy(args);
    struct call call = {};

    if (status != KVP_OK)
        return status;
    call.list = LIST_COPIES;
    call.page_tokens = args->page_tokens;
    call.n = args->n;
    call.source_pages = args->source_pages;
    call.destination_pages = args->destination_pages;
    call.copies = args->copies;
    call.stream = stream;
    for (uint32_t i = 0; status == KVP_OK && i < args->n_planes; i += LAUNCH_PLANES)
        status = launch_list(&call, args->sources + i, args->destinations + i,
                             args->n_planes - i < LAUNCH_PLANES ? args->n_planes - i : LAUNCH_PLANES,
                             i ? nullptr : args->errors);
    return status;
}

/* Gather and scatter: the flat buffer is a pool of n pages, whose planes' views are made here. */
static enum kvp_status run_flat(const struct kvp_page_flat_args *args, enum page_list list, void *stream)
{
    enum kvp_status status = kvp_check_page_flat(args);
    struct kvp_plane_view flat[LAUNCH_PLANES];
    struct call call = {};
    uint64_t offset = 0;

    if (status != KVP_OK || args->n == 0)
        return status;
    call.list = list;
    call.page_tokens = args->page_tokens;
    call.n = args->n;
    call.source_pages = list == LIST_GATHER ? args->pages : args->n;
    call.destination_pages = list == LIST_GATHER ? args->n : args->pages;
    call.page_ids = args->page_ids;
    call.stream = stream;
    for (uint32_t i = 0; status == KVP_OK && i < args->n_planes; i += LAUNCH_PLANES) {
        uint32_t n = args->n_planes - i < LAUNCH_PLANES ? args->n_planes - i : LAUNCH_PLANES;

        for (uint32_t k = 0; k < n; k++) {
            const struct kvp_plane_view *plane = &args->planes[i + k];

            flat[k] = *plane;
            flat[k].base = static_cast<char *>(args->flat) + offset;
            flat[k].page_stride = args->flat_stride;
            flat[k].head_stride = (int64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
            flat[k].token_stride = flat[k].head_stride * plane->heads;
            offset += (uint64_t)flat[k].token_stride * args->page_tokens;
        }
        status = launch_list(&call, list == LIST_GATHER ? args->planes + i : flat,
                             list == LIST_GATHER ? flat : args->planes + i, n, i ? nullptr : args->errors);
    }
    return status;
}

extern "C" enum kvp_status kvp_cuda_page_gather(const struct kvp_page_flat_args *args, void *stream)
{
    return run_flat(args, LIST_GATHER, stream);
}

extern "C" enum kvp_status kvp_cuda_page_scatter(const struct kvp_page_flat_args *args, void *stream)
{
    return run_flat(args, LIST_SCATTER, stream);
}

extern "C" enum kvp_status kvp_cuda_page_zero(const struct kvp_page_zero_args *args, void *stream)
{
    enum kvp_status status = kvp_check_page_zero(args);
    struct call call = {};

    if (status != KVP_OK)
        return status;
    call.list = LIST_ZERO;
    call.page_tokens = args->page_tokens;
    call.n = args->n;
    call.source_pages = call.destination_pages = args->pages;
    call.page_ids = args->page_ids;
    call.stream = stream;
    for (uint32_t i = 0; status == KVP_OK && i < args->n_planes; i += LAUNCH_PLANES)
        status = launch_list(&call, args->planes + i, args->planes + i,
                             args->n_planes - i < LAUNCH_PLANES ? args->n_planes - i : LAUNCH_PLANES,
                             i ? nullptr : args->errors);
    return status;
}
