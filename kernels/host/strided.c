/**
 * Copies of strided blocks: see strided.h.
 *
 * Rows of the sizes that attention heads have get a loop of their own, in which the compiler expands memcpy to vector
 * moves; all others call it. Streamed stores are made of whole 64-byte lines, since a line that is stored in parts
 * costs a read of memory: a run's ends that fill no line are stored as usual.
 */
#include "strided.h"

#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define LINE_BYTES     64
#define PREFETCH_BYTES 1024 /* the hardware's own prefetch starts anew with each run and 4 KiB page */

static void swap_loops(struct kvp_side *side)
{
    int64_t stride = side->outer_stride;
    side->outer_stride = side->inner_stride;
    side->inner_stride = stride;
}

#if defined(__SSE2__)
static void stream_run(unsigned char *to, const unsigned char *from, uint64_t bytes)
{
    uint64_t head = -(uintptr_t)to % LINE_BYTES;
    if (bytes < head + LINE_BYTES) {
        memcpy(to, from, bytes);
        return;
    }
    memcpy(to, from, head);
    to += head;
    from += head;
    bytes -= head;
    for (; bytes >= LINE_BYTES; bytes -= LINE_BYTES, to += LINE_BYTES, from += LINE_BYTES) {
        __builtin_prefetch(from + PREFETCH_BYTES);
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)(to + 16), b);
        _mm_stream_si128((__m128i *)(to + 32), c);
        _mm_stream_si128((__m128i *)(to + 48), d);
    }
    memcpy(to, from, bytes);
}

void kvp_copy_fence(enum kvp_stores stores)
{
    if (stores == KVP_STORES_STREAMED)
        _mm_sfence();
}
#else
static void stream_run(unsigned char *to, const unsigned char *from, uint64_t bytes)
{
    memcpy(to, from, bytes);
}

void kvp_copy_fence(enum kvp_stores stores)
{
    (void)stores;
}
#endif

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

static void stream_runs(struct kvp_side to, struct kvp_side from, uint64_t outer, uint64_t inner, uint64_t bytes)
{
    for (uint64_t i = 0; i < outer; i++) {
        for (uint64_t k = 0; k < inner; k++)
            stream_run(to.base + (int64_t)i * to.outer_stride + (int64_t)k * to.inner_stride,
                       from.base + (int64_t)i * from.outer_stride + (int64_t)k * from.inner_stride, bytes);
    }
}

void kvp_copy_block(struct kvp_side to, struct kvp_side from, uint64_t outer, uint64_t inner, uint64_t bytes,
                    enum kvp_stores stores)
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
            bytes *= outer;
            outer = 1;
        }
    }
    if (stores == KVP_STORES_STREAMED) {
        stream_runs(to, from, outer, inner, bytes);
        return;
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
