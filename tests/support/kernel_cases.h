/**
 * Generated cases for the kernels: from a seed to the arguments of one operation and all the memory it touches.
 *
 * All data of a case (pool, sources, index arrays, scales, outputs, error ring) lies in one block of bytes, filled with
 * random poison first, with a gap of poison in front of and behind each part:
 *
 *     ░░░ pool ░░ source 0 ░░░ source 1 ░ positions ░░ … ░░ ring ░░░
 *
 * So the block can be copied, given to the reference, the host kernels or a device, and compared byte for byte: what
 * may not change is compared with the same right as what must. kernel_case_move makes the arguments point into a copy.
 *
 * What a case never has, because its result is not defined: two tokens for one place, a copy's page among those
 * appended, a page twice in a list that is written.
 */
#ifndef KERNEL_CASES_H
#define KERNEL_CASES_H

#include <stddef.h>

#include "kvp_kernels.h"

#define CASE_PLANES_MAX 8
#define CASE_BYTES_MAX  (16u << 20)

enum kernel_op {
    OP_APPEND,
    OP_QUANT_APPEND,
    OP_GATHER,
    OP_INDEX,
    OP_PROGRESS,
    OP_PAGE_COPY,
    OP_PAGE_GATHER,
    OP_PAGE_SCATTER,
    OP_PAGE_ZERO,
    OP_PAGE_DIGEST,
    OP_COUNT,
};

struct kernel_case {
    enum kernel_op op;
    int threads;                 /* for kvp_host_X */
    unsigned char *bytes;        /* where the arguments point */
    size_t used;                 /* bytes of it */
    struct kvp_error_ring *ring; /* in `bytes`, or NULL */
    struct kvp_plane_view planes[CASE_PLANES_MAX];
    struct kvp_plane_view others[CASE_PLANES_MAX]; /* scale planes, or a second pool */
    struct kvp_token_view flats[CASE_PLANES_MAX];
    const float *scales[CASE_PLANES_MAX];
    union {
        struct kvp_append_args append;
        struct kvp_quant_append_args quant;
        struct kvp_gather_args gather;
        struct kvp_index_args index;
        struct kvp_progress_args progress;
        struct kvp_page_copy_args copy;
        struct kvp_page_flat_args flat;
        struct kvp_page_zero_args zero;
        struct kvp_page_digest_args digest;
    } args;
};

/** Make case `number` of `seed` in `bytes` (CASE_BYTES_MAX of them, 4096-byte aligned). */
void kernel_case_make(struct kernel_case *ret_case, uint64_t seed, uint64_t number, unsigned char *bytes);

/** The same case, pointing into a copy of its bytes at `bytes` and reporting to `ring` (NULL: none). */
void kernel_case_move(const struct kernel_case *from, unsigned char *bytes, struct kvp_error_ring *ring,
                      struct kernel_case *ret_case);

/** Carry it out by the reference. */
void kernel_case_by_reference(const struct kernel_case *kernel_case);

/** Carry it out by the host kernels. */
enum kvp_status kernel_case_by_host(const struct kernel_case *kernel_case);

const char *kernel_op_name(enum kernel_op op);

#endif
