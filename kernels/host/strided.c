/**
 * Copies of strided blocks: see strided.h.
 *
 * Rows of the sizes that attention heads have get a loop of their own, in which the compiler expands memcpy to vector
 * moves; all others call it.
 */
#include "strided.h"

#include <string.h>

static void swap_loops(struct kvp_side *side)
{
    int64_t stride = side->outer_stride;
    side->outer_stride = side->inner_stride;
    side->inner_stride = stride;
}

static inline __attribute__((always_inline)) void copy_runs(struct kvp_side to, struct kvp_side from, uint64_t outer,
                                                            uint64_t inner, uint64_t bytes)
{
    for (uint64_t i = 0; i < outer; i++) {
        unsigned char *target = to.base + (int64_t)i * to.outer_stride;
        const unsigned char *source = from.base + (int64_t)i * from.outer_stride;
        for (uint64_t k = 0; k < inner; k++)
            memcpy(target + (int64_t)k * to.inner_stride, source + (int64_t)k * from.inner_stride, bytes);
    }
}

void kvp_copy_block(struct kvp_side to, struct kvp_side from, uint64_t outer, uint64_t inner, uint64_t bytes)
{
    int64_t run = (int64_t)bytes;
    if (inner > 1 && outer > 1 && (to.inner_stride != run || from.inner_stride != run) && to.outer_stride == run &&
        from.outer_stride == run) {
        swap_loops(&to);
        swap_loops(&from);
        uint64_t count = outer;
        outer = inner;
        inner = count;
    }
    if (inner == 1 || (to.inner_stride == run && from.inner_stride == run)) {
        bytes *= inner;
        run = (int64_t)bytes;
        inner = 1;
        if (outer == 1 || (to.outer_stride == run && from.outer_stride == run)) {
            memcpy(to.base, from.base, outer * bytes);
            return;
        }
    }
    switch (bytes) {
    case 64:
        copy_runs(to, from, outer, inner, 64);
        break;
    case 128:
        copy_runs(to, from, outer, inner, 128);
        break;
    case 256:
        copy_runs(to, from, outer, inner, 256);
        break;
    default:
        copy_runs(to, from, outer, inner, bytes);
    }
}

void kvp_zero_block(struct kvp_side to, uint64_t outer, uint64_t inner, uint64_t bytes)
{
    if (to.inner_stride != (int64_t)bytes && to.outer_stride == (int64_t)bytes) {
        swap_loops(&to);
        uint64_t count = outer;
        outer = inner;
        inner = count;
    }
    if (inner == 1 || to.inner_stride == (int64_t)bytes) {
        bytes *= inner;
        inner = 1;
        if (outer == 1 || to.outer_stride == (int64_t)bytes) {
            bytes *= outer;
            outer = 1;
        }
    }
    for (uint64_t i = 0; i < outer; i++) {
        for (uint64_t k = 0; k < inner; k++)
            memset(to.base + (int64_t)i * to.outer_stride + (int64_t)k * to.inner_stride, 0, bytes);
    }
}
