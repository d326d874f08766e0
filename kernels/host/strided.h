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

/* A call that moves this much leaves nothing of use in the caches: its stores go around them. */
#define KVP_HOST_STREAM_BYTES (16u << 20)

enum kvp_stores {
    KVP_STORES_CACHED,
    KVP_STORES_STREAMED, /* around the caches, where the CPU can: neither reads what it overwrites nor evicts */
};

static inline enum kvp_stores kvp_stores_for(uint64_t call_bytes)
{
    return call_bytes >= KVP_HOST_STREAM_BYTES ? KVP_STORES_STREAMED : KVP_STORES_CACHED;
}

/** Copy outer × inner runs of `bytes` from one side to the other. */
void kvp_copy_block(struct kvp_side to, struct kvp_side from, uint64_t outer, uint64_t inner, uint64_t bytes,
                    enum kvp_stores stores);

/** Order the streamed stores of this thread before whatever it stores next. To be called once behind the copies. */
void kvp_copy_fence(enum kvp_stores stores);

/** The same as kvp_copy_block, with zeros for a source. */
void kvp_zero_block(struct kvp_side to, uint64_t outer, uint64_t inner, uint64_t bytes);

#endif
