/**
 * Operations on whole pages on the host: copy, gather to and scatter from a flat buffer, zero.
 *
 * Each takes a list of pages and works on (entry, plane) pairs, shared out over threads by entry. An entry whose page
 * id is negative is padding; one out of range is reported with its place in the list, once, and skipped. The pages of a
 * list are distinct where they are written, so threads write disjoint bytes.
 */
#include "pages.h"

#include "../kvp_check.h"
#include "address.h"
#include "parallel.h"
#include "strided.h"

static struct kvp_side page_side(const struct kvp_plane_view *plane, int32_t page)
{
    return (struct kvp_side){
        .base = (unsigned char *)plane->base + (int64_t)page * plane->page_stride,
        .outer_stride = plane->token_stride,
        .inner_stride = plane->head_stride,
    };
}

static uint64_t row_bytes(const struct kvp_plane_view *plane)
{
    return (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
}

/* ---- copy -------------------------------------------------------------------------------------------------------- */

static void copy_entries(void *context, uint64_t first, uint64_t last)
{
    const struct kvp_copy_job *job = context;
    for (uint64_t i = first; i < last; i++) {
        struct kvp_page_copy copy = job->copies[i];
        if (copy.source < 0 || copy.destination < 0)
            continue;
        if ((uint32_t)copy.source >= job->source_pages || (uint32_t)copy.destination >= job->destination_pages) {
            int32_t bad = (uint32_t)copy.source >= job->source_pages ? copy.source : copy.destination;
            kvp_report(job->errors, KVP_BAD_PAGE, (int64_t)i, bad);
            continue;
        }
        uint32_t tokens = copy.tokens < job->page_tokens ? copy.tokens : job->page_tokens;
        for (uint32_t p = 0; p < job->n_planes && tokens > 0; p++) {
            kvp_copy_block(page_side(&job->destinations[p], copy.destination), page_side(&job->sources[p], copy.source),
                           tokens, job->sources[p].heads, row_bytes(&job->sources[p]), job->stores);
        }
    }
    kvp_copy_fence(job->stores);
}

void kvp_copy_pages(const struct kvp_copy_job *job, uint32_t n, int threads)
{
    struct kvp_copy_job shared = *job;
    uint64_t bytes = n * kvp_flat_page_bytes(job->sources, job->n_planes, job->page_tokens);
    shared.stores = kvp_stores_for(bytes);
    kvp_host_parallel(threads, n, 1, bytes, copy_entries, &shared);
}

enum kvp_status kvp_host_page_copy(const struct kvp_page_copy_args *args, int threads)
{
    enum kvp_status status = kvp_check_page_copy(args);
    if (status != KVP_OK)
        return status;
    kvp_copy_pages(
        &(struct kvp_copy_job){
            .sources = args->sources,
            .destinations = args->destinations,
            .n_planes = args->n_planes,
            .page_tokens = args->page_tokens,
            .source_pages = args->source_pages,
            .destination_pages = args->destination_pages,
            .copies = args->copies,
            .errors = args->errors,
        },
        args->n, threads);
    return KVP_OK;
}

/* ---- gather and scatter ------------------------------------------------------------------------------------------ */

struct flat_job {
    const struct kvp_page_flat_args *args;
    int into_pool;
    enum kvp_stores stores;
};

static int page_is_usable(int32_t page, uint32_t pages, struct kvp_error_ring *errors, uint64_t entry)
{
    if (page < 0)
        return 0;
    if ((uint32_t)page < pages)
        return 1;
    kvp_report(errors, KVP_BAD_PAGE, (int64_t)entry, page);
    return 0;
}

static void move_flat_entries(void *context, uint64_t first, uint64_t last)
{
    const struct flat_job *job = context;
    const struct kvp_page_flat_args *args = job->args;
    for (uint64_t i = first; i < last; i++) {
        if (!page_is_usable(args->page_ids[i], args->pages, args->errors, i))
            continue;
        unsigned char *at = (unsigned char *)args->flat + (int64_t)i * args->flat_stride;
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->planes[p];
            uint64_t row = row_bytes(plane);
            struct kvp_side flat = {
                .base = at,
                .outer_stride = (int64_t)kvp_token_bytes(plane),
                .inner_stride = (int64_t)row,
            };
            struct kvp_side pool = page_side(plane, args->page_ids[i]);
            if (job->into_pool)
                kvp_copy_block(pool, flat, args->page_tokens, plane->heads, row, job->stores);
            else
                kvp_copy_block(flat, pool, args->page_tokens, plane->heads, row, job->stores);
            at += kvp_token_bytes(plane) * args->page_tokens;
        }
    }
    kvp_copy_fence(job->stores);
}

static enum kvp_status move_flat(const struct kvp_page_flat_args *args, int into_pool, int threads)
{
    enum kvp_status status = kvp_check_page_flat(args);
    if (status != KVP_OK)
        return status;
    uint64_t bytes = args->n * kvp_flat_page_bytes(args->planes, args->n_planes, args->page_tokens);
    struct flat_job job = {.args = args, .into_pool = into_pool, .stores = kvp_stores_for(bytes)};
    kvp_host_parallel(threads, args->n, 1, bytes, move_flat_entries, &job);
    return KVP_OK;
}

enum kvp_status kvp_host_page_gather(const struct kvp_page_flat_args *args, int threads)
{
    return move_flat(args, 0, threads);
}

enum kvp_status kvp_host_page_scatter(const struct kvp_page_flat_args *args, int threads)
{
    return move_flat(args, 1, threads);
}

/* ---- zero -------------------------------------------------------------------------------------------------------- */

static void zero_entries(void *context, uint64_t first, uint64_t last)
{
    const struct kvp_page_zero_args *args = context;
    for (uint64_t i = first; i < last; i++) {
        if (!page_is_usable(args->page_ids[i], args->pages, args->errors, i))
            continue;
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->planes[p];
            kvp_zero_block(page_side(plane, args->page_ids[i]), args->page_tokens, plane->heads, row_bytes(plane));
        }
    }
}

enum kvp_status kvp_host_page_zero(const struct kvp_page_zero_args *args, int threads)
{
    enum kvp_status status = kvp_check_page_zero(args);
    if (status != KVP_OK)
        return status;
    struct kvp_page_zero_args shared = *args;
    uint64_t bytes = args->n * kvp_flat_page_bytes(args->planes, args->n_planes, args->page_tokens);
    kvp_host_parallel(threads, args->n, 1, bytes, zero_entries, &shared);
    return KVP_OK;
}
