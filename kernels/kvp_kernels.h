/**
 * The kernels of kvpool: append, gather, index, progress and page operations over a paged KV cache.
 *
 * Each operation is one struct of arguments and two functions: kvp_cuda_X enqueues it on a CUDA stream, kvp_host_X does
 * it on the CPU before it returns. Both give the same bytes. Plain C; no torch, no daemon: any cache that can be said
 * in strides will do.
 *
 * Pointers. `host` arrays (planes, sources, scales: a few entries that describe tensors) are read during the call.
 * Everything else is `data`: for kvp_cuda_X it lies in device memory, or in pinned or registered host memory that the
 * current device can reach, and must live until the stream has passed; for kvp_host_X it is plain memory.
 *
 * Launch. kvp_cuda_X works on the current device and `stream` (a cudaStream_t; NULL is the default stream). It neither
 * allocates nor synchronises, and can be captured into a graph: counts that vary between replays are read from
 * device memory (…_device), the count given on the host being their bound. From compute capability 9.0 on append,
 * gather, index and progress use programmatic dependent launch: they wait for the stream before they touch memory, and
 * a kernel enqueued behind them that is launched so must do the same. kvp_host_X takes the number of threads; ≤ 0
 * chooses by the size of the work. Both may be called by any thread; two calls that touch the same bytes are the
 * caller's to order.
 *
 * Status. Arguments are checked before anything is launched: KVP_EINVAL. A launch that fails is KVP_EDEVICE (CUDA),
 * a thread or memory that can not be had KVP_ENOMEM (host). What is wrong with single tokens is only known when the
 * kernel runs: such a token is skipped, and counted in the error ring.
 *
 * Skipping. A negative batch index, position or slot is padding: skipped, silently. A page id outside 0…pages−1
 * (negative ones too), a position behind the sequence's last page, a batch index ≥ batch, a sequence slot
 * ≥ max_sequences, a stale row version: skipped, and reported. Whatever the arguments say, nothing is stored outside
 * the planes.
 */
#ifndef KVP_KERNELS_H
#define KVP_KERNELS_H

#include <stdint.h>

#include "kvp_abi.h"
#include "kvp_layout.h"
#include "kvp_limits.h"
#include "kvp_status.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default) /* exported by libkvpool.so, which carries them */

#define KVP_INDEX_BATCH_MAX 4096 /* sequences in one index step */
#define KVP_LAUNCH_PLANES   256  /* planes in one launch; a call with more launches as often as it takes */

/* ---- what the operations share ----------------------------------------------------------------------------------- */

/* One plane, or any tensor of the form [page, token, head, element] whose last dimension is dense. Strides in bytes, ≥
 * 0; heads, dim and page_tokens such that the bytes of one page of it stay below 2^31. */
struct kvp_plane_view {
    void *base; /* page 0 (data) */
    int64_t page_stride;
    int64_t token_stride;
    int64_t head_stride;
    uint32_t heads;
    uint32_t dim;      /* elements of one head */
    uint32_t dtype;    /* enum kvp_dtype */
    uint32_t reserved; /* 0 */
};

/* A flat tensor [token, head, element], dense in its last dimension: what is appended, or gathered into. */
struct kvp_token_view {
    void *base;           /* token 0 (data); append only reads it */
    int64_t token_stride; /* bytes; a slice of a fused QKV tensor is said by it */
    int64_t head_stride;  /* bytes */
};

/* The first `tokens` tokens of one page to another, in every plane. Tokens above the page size count as all. */
struct kvp_page_copy {
    int32_t source;      /* page id; either one negative: skipped */
    int32_t destination; /* page id */
    uint32_t tokens;
    uint32_t reserved; /* 0 */
};

enum kvp_violation {
    KVP_BAD_PAGE = 1,     /* value: the page id */
    KVP_BAD_POSITION = 2, /* value: the position; it lies behind the sequence's pages */
    KVP_BAD_BATCH = 3,    /* value: the batch index */
    KVP_BAD_SLOT = 4,     /* value: the sequence slot */
    KVP_BAD_VERSION = 5,  /* value: the row's version in the table */
    KVP_BAD_CAPACITY = 6, /* value: entries needed; the output is cut at its capacity */
};

struct kvp_error_record {
    uint32_t kind; /* enum kvp_violation */
    uint32_t reserved;
    int64_t token; /* its number in the call; for page operations the entry of the list, for index the sequence */
    int64_t value;
};

/*
 * Violations, each counted once however many planes there are. The caller sets capacity, and count to 0 when it wants
 * to start anew. `count` may pass `capacity`; records beyond are lost. The order of records is not defined.
 */
struct kvp_error_ring {
    uint64_t count;
    uint32_t capacity;
    uint32_t reserved;
    struct kvp_error_record records[]; /* [capacity] */
};

/* kvpool's table as kvp_abi.h has it, or any array of rows of int32 page ids. */
struct kvp_rows {
    const struct kvp_table_head *heads; /* [max_sequences] (data); NULL: no row count, no version, no length there */
    const int32_t *rows;                /* (data) */
    uint64_t row_stride;                /* bytes, a multiple of 4 */
    uint32_t max_sequences;
    uint32_t row_pages; /* ids in a row */
};

/* How a token finds its place. */
enum kvp_address_kind {
    KVP_ADDRESS_CSR = 1,   /* batch_indices, positions → kv_indices[kv_indptr[b] + position / page_tokens] */
    KVP_ADDRESS_SLOTS = 2, /* slot_mapping: page · page_tokens + offset */
    KVP_ADDRESS_ROWS = 3,  /* sequence b → rows[seq_slots[b]]; see below */
    KVP_ADDRESS_TABLE = 4, /* batch_indices, positions → page_table[b · page_table_stride + position / page_tokens] */
};

/*
 * Token j of nnz. Fields that the kind does not name are ignored. "index" arrays hold index_bits wide signed integers.
 *
 * KVP_ADDRESS_ROWS takes b and the position from batch_indices and positions; where batch_indices is NULL, from
 * append_indptr (b is the sequence whose range holds j; a j behind the last range is padding) and start_lengths:
 * position = start_lengths[b] + j − append_indptr[b]. append_indptr NULL then means one token a sequence: b = j. A
 * negative start length is padding.
 * A row's ids are valid up to row_counts[b] (taken at enqueue), else heads[slot].row_pages, else row_pages.
 */
struct kvp_address {
    uint32_t kind;          /* enum kvp_address_kind */
    uint32_t index_bits;    /* 32 or 64 */
    int64_t nnz;            /* tokens, padding included; < 2^31. 0 is allowed and does nothing */
    const void *nnz_device; /* index [1], or NULL: only the first min(nnz, *nnz_device) tokens count */

    const void *batch_indices; /* index [nnz] */
    const void *positions;     /* index [nnz] */
    int64_t batch;             /* sequences; a batch index must be below it */

    const void *kv_indptr;  /* CSR: index [batch + 1] */
    const void *kv_indices; /* CSR: index [kv_indptr[batch]] */

    const void *slot_mapping; /* SLOTS: index [nnz] */

    const void *page_table;    /* TABLE: index [batch, page_table_stride] */
    int64_t page_table_stride; /* TABLE: entries from sequence to sequence */
    int64_t page_table_pages;  /* TABLE: entries of a sequence that may be read, ≤ page_table_stride */

    struct kvp_rows table;        /* ROWS */
    const int32_t *seq_slots;     /* ROWS: [batch]; negative: padding */
    const void *append_indptr;    /* ROWS: index [batch + 1], or NULL */
    const void *start_lengths;    /* ROWS: index [batch], where batch_indices is NULL */
    const uint32_t *row_counts;   /* ROWS: [batch], or NULL */
    const uint32_t *row_versions; /* ROWS: [batch], or NULL; else a row of another version is stale (needs heads) */
};

/* ---- append ------------------------------------------------------------------------------------------------------ */

/*
 * Store nnz tokens into their places, in all planes. Bytes are moved as they are: source and plane have one dtype.
 * Planes may differ in heads, dim, dtype and strides: standard K and V, all layers of a model, MLA's ckv and kpe (two
 * planes of 1 head, in two caches or, by their strides, in one joined cache).
 *
 * `copies` (copy on write) are carried out in the same launch, in no order with the tokens: a copy's destination
 * tokens, and its source, must not be among those appended.
 */
struct kvp_append_args {
    const struct kvp_plane_view *planes;  /* host [n_planes] */
    const struct kvp_token_view *sources; /* host [n_planes] */
    uint32_t n_planes;                    /* 1..KVP_PLANES_MAX */
    uint32_t pages;                       /* P, 1..KVP_PAGES_MAX */
    uint32_t page_tokens;                 /* T, 1..KVP_PAGE_TOKENS_MAX */
    uint32_t n_copies;
    const struct kvp_page_copy *copies; /* data [n_copies], or NULL */
    struct kvp_address at;
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_append(const struct kvp_append_args *args, void *stream);
enum kvp_status kvp_host_append(const struct kvp_append_args *args, int threads);

enum kvp_scale_mode {
    KVP_SCALE_NONE = 0,     /* scale 1 */
    KVP_SCALE_TENSOR = 1,   /* scales[p] is float [1] (data) */
    KVP_SCALE_HEAD = 2,     /* scales[p] is float [heads] (data) */
    KVP_SCALE_COMPUTED = 3, /* one a token and head, stored beside the page in scale_planes[p] */
};

/*
 * Quantising append: F32, F16 or BF16 into planes of FP8_E4M3 or FP8_E5M2 (all planes one of the two).
 *
 *     quotient = (float)x / scale           one IEEE single-precision division
 *     stored   = quotient, rounded to nearest even, saturated to ±448 (E4M3) or ±57344 (E5M2), infinities too;
 *                a NaN becomes 0x7F
 *
 * KVP_SCALE_COMPUTED: amax is the largest |x| of the token's head (NaN ignored, infinity counted as FLT_MAX),
 * scale = amax / 448 or 57344 in one division, or 1 where that is 0.
 */
struct kvp_quant_append_args {
    const struct kvp_plane_view *planes;  /* host [n_planes]; dtype FP8_E4M3 or FP8_E5M2 */
    const struct kvp_token_view *sources; /* host [n_planes] */
    uint32_t n_planes;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t source_dtype;                     /* KVP_DTYPE_F32, _F16 or _BF16 */
    uint32_t scale_mode;                       /* enum kvp_scale_mode */
    uint32_t reserved;                         /* 0 */
    const float *const *scales;                /* host [n_planes] of data; TENSOR and HEAD */
    const struct kvp_plane_view *scale_planes; /* host [n_planes], dtype F32, heads as the plane, dim 1; COMPUTED */
    struct kvp_address at;
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_quant_append(const struct kvp_quant_append_args *args, void *stream);
enum kvp_status kvp_host_quant_append(const struct kvp_quant_append_args *args, int threads);

/*
 * The way back: read nnz tokens from their places into flat tensors, of the planes' dtype (moved as bytes), or from
 * FP8 into F32, F16 or BF16: (float)stored · scale in single precision, then rounded to nearest even; any NaN becomes
 * the positive one of all ones. What belongs to a skipped token is left as it was.
 */
struct kvp_gather_args {
    const struct kvp_plane_view *planes;       /* host [n_planes] */
    const struct kvp_token_view *destinations; /* host [n_planes] */
    uint32_t n_planes;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t dtype;                            /* 0: bytes as they are (scale_mode NONE); else F32, F16 or BF16 */
    uint32_t scale_mode;                       /* enum kvp_scale_mode */
    uint32_t reserved;                         /* 0 */
    const float *const *scales;                /* as above */
    const struct kvp_plane_view *scale_planes; /* as above */
    struct kvp_address at;
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_gather(const struct kvp_gather_args *args, void *stream);
enum kvp_status kvp_host_gather(const struct kvp_gather_args *args, int threads);

/* ---- index ------------------------------------------------------------------------------------------------------- */

enum kvp_index_source {
    KVP_INDEX_ROWS = 1,  /* seq_slots over kvpool's table; start from start_lengths, progress or the table's heads */
    KVP_INDEX_CSR = 2,   /* in_kv_indptr, in_kv_indices, in_last_page_len, all as they are after the append */
    KVP_INDEX_TABLE = 3, /* in_page_table [batch, stride], in_last_page_len before the append */
};

/*
 * All that an attention step wants to know, in one launch. For each sequence b of the batch
 *
 *     count[b]   tokens appended in this step: append_lengths[b], or append_indptr[b + 1] − append_indptr[b], or
 *                append_each; negative counts as 0
 *     start[b]   tokens before it
 *       ROWS     start_lengths[b]; or the low 32 bits of progress[seq_slots[b]], where its high 32 bits are
 *                row_versions[b] (or row_versions is NULL), else heads[slot].length; or heads[slot].length
 *       CSR      after − count, where after = (pages_b − 1) · page_tokens + in_last_page_len[b], or 0 without pages
 *       TABLE    (n_b − 1) · page_tokens + in_last_page_len[b], or 0 where n_b = 0; n_b is in_page_counts[b], or the
 *                number of leading ids ≥ 0 of the row where that is NULL
 *     length[b]  start + count, and with all_tokens set: the tokens listed are 0…length−1, not start…length−1
 *
 * A sequence whose slot is negative (ROWS) is empty: start, count and length 0. So is one that is reported, with b as
 * its token: slot out of range, stale version, a start below 0 (BAD_POSITION, value: the start), or a length over its
 * pages (BAD_POSITION, value: the length; CSR: pages_b pages, TABLE: n_b, ROWS: as in struct kvp_address).
 *
 * Every output may be NULL. Outputs of index_bits, if not said otherwise:
 *
 *     ret_seq_lens          [batch]      length
 *     ret_kv_indptr         [batch + 1]  sums of pages, ⌈length / page_tokens⌉
 *     ret_kv_indices        [kv_capacity] the page ids; entries behind the last are left as they were
 *     ret_kv_last_page_len  [batch]      (length − 1) mod page_tokens + 1, or 0
 *     ret_append_indptr     [batch + 1]  sums of tokens listed
 *     ret_batch_indices     [nnz]        the sequence of token j; −1 for the padding behind the last token
 *     ret_positions         [nnz]        its position; 0 for the padding
 *     ret_slot_mapping      [nnz]        slot_bits wide: page · page_tokens + offset; −1 for the padding, and for a
 *                                        token whose page id is out of range (reported BAD_PAGE)
 *     ret_nnz               [1]          tokens listed, before the cut at nnz
 *
 * With batch_device the sequences from *batch_device to batch count as empty (their lengths are 0, the sums go on).
 * The work is balanced by token and page, not by sequence. Inputs and outputs may not overlap.
 */
struct kvp_index_args {
    uint32_t source;     /* enum kvp_index_source */
    uint32_t index_bits; /* 32 or 64: inputs and outputs */
    uint32_t slot_bits;  /* 32 or 64: ret_slot_mapping */
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t all_tokens; /* 0 or 1 */
    int64_t batch;       /* 0..KVP_INDEX_BATCH_MAX */
    int64_t nnz;         /* entries of the token outputs; < 2^31 */
    int64_t kv_capacity; /* entries of ret_kv_indices; < 2^31 */

    const void *batch_device;   /* index [1], or NULL */
    const void *append_lengths; /* index [batch], or NULL */
    const void *append_indptr;  /* index [batch + 1], or NULL */
    int64_t append_each;        /* where both are NULL; ≥ 0 */

    struct kvp_rows table;        /* ROWS */
    const int32_t *seq_slots;     /* ROWS: [batch] */
    const void *start_lengths;    /* ROWS: index [batch], or NULL */
    const uint64_t *progress;     /* ROWS: [max_sequences] progress words (kvp_abi.h), or NULL */
    const uint32_t *row_counts;   /* ROWS: [batch], or NULL: as in struct kvp_address */
    const uint32_t *row_versions; /* ROWS: [batch], or NULL: as in struct kvp_address; checked where heads are given */

    const void *in_kv_indptr;     /* CSR: index [batch + 1] */
    const void *in_kv_indices;    /* CSR: index; may be NULL where neither ids nor slots are wanted */
    const void *in_last_page_len; /* CSR, TABLE: index [batch] */
    const void *in_page_table;    /* TABLE: index [batch, in_page_table_stride] */
    int64_t in_page_table_stride; /* TABLE: entries */
    int64_t in_page_table_pages;  /* TABLE: entries of a sequence that may be read */
    const void *in_page_counts;   /* TABLE: index [batch], or NULL */

    void *ret_seq_lens;
    void *ret_kv_indptr;
    void *ret_kv_indices;
    void *ret_kv_last_page_len;
    void *ret_append_indptr;
    void *ret_batch_indices;
    void *ret_positions;
    void *ret_slot_mapping;
    void *ret_nnz;
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_index(const struct kvp_index_args *args, void *stream);
enum kvp_status kvp_host_index(const struct kvp_index_args *args, int threads);

/* ---- progress ---------------------------------------------------------------------------------------------------- */

/*
 * Say how many tokens are written: progress[seq_slots[i]] = versions[i] << 32 | lengths[i], one aligned 8-byte store of
 * system scope each, behind everything enqueued on the stream before it. A negative slot or length is skipped; a slot
 * ≥ max_sequences is reported.
 */
struct kvp_progress_args {
    uint64_t *progress; /* data [max_sequences] */
    uint32_t max_sequences;
    uint32_t index_bits;           /* 32 or 64 */
    int64_t n;                     /* < 2^31 */
    const void *n_device;          /* index [1], or NULL */
    const int32_t *seq_slots;      /* [n] */
    const uint32_t *versions;      /* [n] */
    const void *lengths;           /* index [n]: tokens written (ret_seq_lens of the index step) */
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_progress(const struct kvp_progress_args *args, void *stream);
enum kvp_status kvp_host_progress(const struct kvp_progress_args *args, int threads);

/* ---- pages ------------------------------------------------------------------------------------------------------- */

/*
 * Copy pages by a list, within a pool or from one pool to another, of one device or (peer access enabled by the caller)
 * of two. Planes p of both agree in heads, dim and dtype; strides may differ. A page is not both source and destination
 * in one call.
 */
struct kvp_page_copy_args {
    const struct kvp_plane_view *sources;      /* host [n_planes] */
    const struct kvp_plane_view *destinations; /* host [n_planes]; may be the same array */
    uint32_t n_planes;
    uint32_t page_tokens;
    uint32_t source_pages;
    uint32_t destination_pages;
    uint32_t n;
    uint32_t reserved;                  /* 0 */
    const struct kvp_page_copy *copies; /* data [n] */
    struct kvp_error_ring *errors;      /* data, or NULL */
};
enum kvp_status kvp_cuda_page_copy(const struct kvp_page_copy_args *args, void *stream);
enum kvp_status kvp_host_page_copy(const struct kvp_page_copy_args *args, int threads);

/*
 * Pages to or from a flat buffer. Entry i lies at flat + i · flat_stride as the planes one behind the other, each as a
 * dense [page_tokens, heads, dim], whatever the pool's layout: kvp_flat_page_bytes() bytes. A negative page id is
 * skipped (gather leaves the buffer's part as it was), one ≥ pages is reported.
 */
struct kvp_page_flat_args {
    const struct kvp_plane_view *planes; /* host [n_planes] */
    uint32_t n_planes;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t n;
    const int32_t *page_ids;       /* data [n] */
    void *flat;                    /* data */
    int64_t flat_stride;           /* bytes, ≥ kvp_flat_page_bytes() */
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_page_gather(const struct kvp_page_flat_args *args, void *stream);
enum kvp_status kvp_host_page_gather(const struct kvp_page_flat_args *args, int threads);
enum kvp_status kvp_cuda_page_scatter(const struct kvp_page_flat_args *args, void *stream);
enum kvp_status kvp_host_page_scatter(const struct kvp_page_flat_args *args, int threads);
uint64_t kvp_flat_page_bytes(const struct kvp_plane_view *planes, uint32_t n_planes, uint32_t page_tokens);

/* Zero the pages of a list, in all planes; ids as above. */
struct kvp_page_zero_args {
    const struct kvp_plane_view *planes; /* host [n_planes] */
    uint32_t n_planes;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t n;
    const int32_t *page_ids;       /* data [n] */
    struct kvp_error_ring *errors; /* data, or NULL */
};
enum kvp_status kvp_cuda_page_zero(const struct kvp_page_zero_args *args, void *stream);
enum kvp_status kvp_host_page_zero(const struct kvp_page_zero_args *args, int threads);

/*
 * A 128-bit digest of each page of a list, over its planes in order and the bytes of each (token, head) (kvp_digest.h
 * has the formula): the same on host and device, for any launch shape, order and placement. It finds damage; it is no
 * cryptographic hash. ret_digests of a skipped or reported id are 0, 0. On CUDA ret_digests also holds the partial
 * sums meanwhile; every entry is written.
 */
struct kvp_digest {
    uint64_t word[2];
};
struct kvp_page_digest_args {
    const struct kvp_plane_view *planes; /* host [n_planes] */
    uint32_t n_planes;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t n;
    const int32_t *page_ids;        /* data [n] */
    struct kvp_digest *ret_digests; /* data [n], device memory for kvp_cuda_page_digest */
    struct kvp_error_ring *errors;  /* data, or NULL */
};
enum kvp_status kvp_cuda_page_digest(const struct kvp_page_digest_args *args, void *stream);
enum kvp_status kvp_host_page_digest(const struct kvp_page_digest_args *args, int threads);

/* The view of plane p of a pool whose slab is mapped at `slab`. */
static inline struct kvp_plane_view kvp_plane_view_of(const struct kvp_layout_spec *spec,
                                                      const struct kvp_plane_layout *layout, uint32_t p, void *slab)
{
    struct kvp_plane_view view;

    view.base = (unsigned char *)slab + layout[p].offset;
    view.page_stride = (int64_t)layout[p].page_stride;
    view.token_stride = (int64_t)layout[p].token_stride;
    view.head_stride = (int64_t)layout[p].head_stride;
    view.heads = spec->planes[p].heads;
    view.dim = spec->planes[p].dim;
    view.dtype = spec->planes[p].dtype;
    view.reserved = 0;
    return view;
}

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
