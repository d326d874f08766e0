/**
 * Copies of strided blocks: the inner loop of append, gather and the page operations on the host.
 *
 * A block is `outer` × `inner` runs of `bytes`. Where the strides of both sides allow, neighbouring runs are merged
 * first (in either order of the two loops), so that a whole page, or many, is one memcpy. Source and destination never
 * overlap.
 */
#ifndef KVP_HOST_STRIDED_H
#define KVP_HOST_STRIDED_H

#include <stdint.h>

struct kvp_side {
    unsigned char *base;
    int64_t outer_stride; /* bytes */
    int64_t inner_stride; /* bytes */
};

/** Copy outer × inner runs of `bytes` from one side to the other. */
void kvp_copy_block(struct kvp_side to, struct kvp_side from, uint64_t outer, uint64_t inner, uint64_t bytes);

/** The same, with zeros for a source. */
void kvp_zero_block(struct kvp_side to, uint64_t outer, uint64_t inner, uint64_t bytes);

#endif
