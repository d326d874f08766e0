/**
 * Parts of the host kernels that more than one operation uses: copying pages, and moving tokens as bytes.
 */
#ifndef KVP_HOST_PAGES_H
#define KVP_HOST_PAGES_H

#include "../kvp_kernels.h"
#include "strided.h"

struct kvp_copy_job {
    const struct kvp_plane_view *sources;
    const struct kvp_plane_view *destinations;
    uint32_t n_planes;
    uint32_t page_tokens;
    uint32_t source_pages;
    uint32_t destination_pages;
    const struct kvp_page_copy *copies;
    struct kvp_error_ring *errors;
    enum kvp_stores stores; /* set by kvp_copy_pages */
};

/** Carry out the copies of a list; bad entries are reported and skipped. */
void kvp_copy_pages(const struct kvp_copy_job *job, uint32_t n, int threads);

/** kvp_host_gather without conversion; the arguments are checked. */
void kvp_gather_bytes(const struct kvp_gather_args *args, int threads);

/** Bytes of one token in a plane. */
static inline uint64_t kvp_token_bytes(const struct kvp_plane_view *plane)
{
    return (uint64_t)plane->heads * plane->dim * kvp_dtype_bytes(plane->dtype);
}

#endif
