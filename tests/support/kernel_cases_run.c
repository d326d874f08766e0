/**
 * Generated cases for the kernels: moving a case to a copy of its memory, and running it. See kernel_cases.h.
 */
#include "kernel_cases.h"

#include "kernel_reference.h"

struct shift {
    const unsigned char *from;
    unsigned char *to;
};

static void *shifted(const struct shift *by, const void *pointer)
{
    return pointer == NULL ? NULL : by->to + ((const unsigned char *)pointer - by->from);
}

#define SHIFT(by, field) ((field) = shifted((by), (field)))

static void shift_address(const struct shift *by, struct kvp_address *at)
{
    SHIFT(by, at->nnz_device);
    SHIFT(by, at->batch_indices);
    SHIFT(by, at->positions);
    SHIFT(by, at->kv_indptr);
    SHIFT(by, at->kv_indices);
    SHIFT(by, at->slot_mapping);
    SHIFT(by, at->page_table);
    SHIFT(by, at->table.heads);
    SHIFT(by, at->table.rows);
    SHIFT(by, at->seq_slots);
    SHIFT(by, at->append_indptr);
    SHIFT(by, at->start_lengths);
    SHIFT(by, at->row_counts);
    SHIFT(by, at->row_versions);
}

static void shift_index(const struct shift *by, struct kvp_index_args *args)
{
    SHIFT(by, args->batch_device);
    SHIFT(by, args->append_lengths);
    SHIFT(by, args->append_indptr);
    SHIFT(by, args->table.heads);
    SHIFT(by, args->table.rows);
    SHIFT(by, args->seq_slots);
    SHIFT(by, args->start_lengths);
    SHIFT(by, args->progress);
    SHIFT(by, args->row_counts);
    SHIFT(by, args->row_versions);
    SHIFT(by, args->in_kv_indptr);
    SHIFT(by, args->in_kv_indices);
    SHIFT(by, args->in_last_page_len);
    SHIFT(by, args->in_page_table);
    SHIFT(by, args->in_page_counts);
    SHIFT(by, args->ret_seq_lens);
    SHIFT(by, args->ret_kv_indptr);
    SHIFT(by, args->ret_kv_indices);
    SHIFT(by, args->ret_kv_last_page_len);
    SHIFT(by, args->ret_append_indptr);
    SHIFT(by, args->ret_batch_indices);
    SHIFT(by, args->ret_positions);
    SHIFT(by, args->ret_slot_mapping);
    SHIFT(by, args->ret_nnz);
}

static void shift_args(const struct shift *by, struct kvp_error_ring *ring, struct kernel_case *moved)
{
    switch (moved->op) {
    case OP_APPEND:
        moved->args.append.planes = moved->planes;
        moved->args.append.sources = moved->flats;
        SHIFT(by, moved->args.append.copies);
        shift_address(by, &moved->args.append.at);
        moved->args.append.errors = ring;
        break;
    case OP_QUANT_APPEND:
        moved->args.quant.planes = moved->planes;
        moved->args.quant.sources = moved->flats;
        moved->args.quant.scales = moved->scales;
        moved->args.quant.scale_planes = moved->others;
        shift_address(by, &moved->args.quant.at);
        moved->args.quant.errors = ring;
        break;
    case OP_GATHER:
        moved->args.gather.planes = moved->planes;
        moved->args.gather.destinations = moved->flats;
        moved->args.gather.scales = moved->scales;
        moved->args.gather.scale_planes = moved->others;
        shift_address(by, &moved->args.gather.at);
        moved->args.gather.errors = ring;
        break;
    case OP_INDEX:
        shift_index(by, &moved->args.index);
        moved->args.index.errors = ring;
        break;
    case OP_PROGRESS:
        SHIFT(by, moved->args.progress.progress);
        SHIFT(by, moved->args.progress.n_device);
        SHIFT(by, moved->args.progress.seq_slots);
        SHIFT(by, moved->args.progress.versions);
        SHIFT(by, moved->args.progress.lengths);
        moved->args.progress.errors = ring;
        break;
    case OP_PAGE_COPY:
        moved->args.copy.sources = moved->planes;
        moved->args.copy.destinations = moved->others;
        SHIFT(by, moved->args.copy.copies);
        moved->args.copy.errors = ring;
        break;
    case OP_PAGE_ZERO:
        moved->args.zero.planes = moved->planes;
        SHIFT(by, moved->args.zero.page_ids);
        moved->args.zero.errors = ring;
        break;
    case OP_PAGE_DIGEST:
        moved->args.digest.planes = moved->planes;
        SHIFT(by, moved->args.digest.page_ids);
        SHIFT(by, moved->args.digest.ret_digests);
        moved->args.digest.errors = ring;
        break;
    default:
        moved->args.flat.planes = moved->planes;
        SHIFT(by, moved->args.flat.page_ids);
        SHIFT(by, moved->args.flat.flat);
        moved->args.flat.errors = ring;
    }
}

void kernel_case_move(const struct kernel_case *from, unsigned char *bytes, struct kvp_error_ring *ring,
                      struct kernel_case *ret_case)
{
    struct shift by = {.from = from->bytes, .to = bytes};
    *ret_case = *from;
    ret_case->bytes = bytes;
    SHIFT(&by, ret_case->ring);
    for (uint32_t p = 0; p < CASE_PLANES_MAX; p++) {
        SHIFT(&by, ret_case->planes[p].base);
        SHIFT(&by, ret_case->others[p].base);
        SHIFT(&by, ret_case->flats[p].base);
        SHIFT(&by, ret_case->scales[p]);
    }
    shift_args(&by, ring, ret_case);
}

void kernel_case_by_reference(const struct kernel_case *kernel_case)
{
    switch (kernel_case->op) {
    case OP_APPEND:
        reference_append(&kernel_case->args.append);
        break;
    case OP_QUANT_APPEND:
        reference_quant_append(&kernel_case->args.quant);
        break;
    case OP_GATHER:
        reference_gather(&kernel_case->args.gather);
        break;
    case OP_INDEX:
        reference_index(&kernel_case->args.index);
        break;
    case OP_PROGRESS:
        reference_progress(&kernel_case->args.progress);
        break;
    case OP_PAGE_COPY:
        reference_page_copy(&kernel_case->args.copy);
        break;
    case OP_PAGE_GATHER:
        reference_page_gather(&kernel_case->args.flat);
        break;
    case OP_PAGE_SCATTER:
        reference_page_scatter(&kernel_case->args.flat);
        break;
    case OP_PAGE_ZERO:
        reference_page_zero(&kernel_case->args.zero);
        break;
    default:
        reference_page_digest(&kernel_case->args.digest);
    }
}

enum kvp_status kernel_case_by_host(const struct kernel_case *kernel_case)
{
    int threads = kernel_case->threads;
    switch (kernel_case->op) {
    case OP_APPEND:
        return kvp_host_append(&kernel_case->args.append, threads);
    case OP_QUANT_APPEND:
        return kvp_host_quant_append(&kernel_case->args.quant, threads);
    case OP_GATHER:
        return kvp_host_gather(&kernel_case->args.gather, threads);
    case OP_INDEX:
        return kvp_host_index(&kernel_case->args.index, threads);
    case OP_PROGRESS:
        return kvp_host_progress(&kernel_case->args.progress, threads);
    case OP_PAGE_COPY:
        return kvp_host_page_copy(&kernel_case->args.copy, threads);
    case OP_PAGE_GATHER:
        return kvp_host_page_gather(&kernel_case->args.flat, threads);
    case OP_PAGE_SCATTER:
        return kvp_host_page_scatter(&kernel_case->args.flat, threads);
    case OP_PAGE_ZERO:
        return kvp_host_page_zero(&kernel_case->args.zero, threads);
    default:
        return kvp_host_page_digest(&kernel_case->args.digest, threads);
    }
}

const char *kernel_op_name(enum kernel_op op)
{
    static const char *const names[OP_COUNT] = {
        "append",    "quant_append", "gather",       "index",     "progress",
        "page_copy", "page_gather",  "page_scatter", "page_zero", "page_digest",
    };
    return (unsigned)op < OP_COUNT ? names[op] : "?";
}
