/**
 * The device's half of the case matrix: cases in device memory, a captured graph, every half, a pool
 * past 2^32 elements.
 *
 * One stream and one block of CASE_BYTES_MAX on the current device, between device_open and device_close; one thread.
 */
#include "kernels_matrix.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel_reference.h"

static cudaStream_t stream;
static unsigned char *device_bytes;
static char reason[160];

/* Evaluate a runtime call; on failure say which and leave by `label`. */
#define CUDA(call, label)                                                                                              \
    do {                                                                                                               \
        cudaError_t error_ = (call);                                                                                   \
        if (error_ != cudaSuccess) {                                                                                   \
            snprintf(why, why_bytes, "%s: %s", #call, cudaGetErrorString(error_));                                     \
            goto label;                                                                                                \
        }                                                                                                              \
    } while (0)

#define KERNEL(call, label)                                                                                            \
    do {                                                                                                               \
        enum kvp_status status_ = (call);                                                                              \
        if (status_ != KVP_OK) {                                                                                       \
            snprintf(why, why_bytes, "%.60s: %s", #call, kvp_status_name(status_));                                    \
            goto label;                                                                                                \
        }                                                                                                              \
    } while (0)

const char *device_open(void)
{
    int count = 0;
    char *why = reason;
    size_t why_bytes = sizeof reason;
    CUDA(cudaGetDeviceCount(&count), no_device);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), no_device);
    CUDA(cudaMalloc((void **)&device_bytes, CASE_BYTES_MAX), destroy_stream);
    return NULL;

destroy_stream:
    (void)cudaStreamDestroy(stream);
    stream = NULL;
no_device:
    return reason;
}

void device_close(void)
{
    if (device_bytes == NULL)
        return;
    (void)cudaFree(device_bytes);
    (void)cudaStreamDestroy(stream);
    device_bytes = NULL;
}

static enum kvp_status launch(const struct kernel_case *moved)
{
    switch (moved->op) {
    case OP_APPEND:
        return kvp_cuda_append(&moved->args.append, stream);
    case OP_QUANT_APPEND:
        return kvp_cuda_quant_append(&moved->args.quant, stream);
    case OP_GATHER:
        return kvp_cuda_gather(&moved->args.gather, stream);
    case OP_INDEX:
        return kvp_cuda_index(&moved->args.index, stream);
    case OP_PROGRESS:
        return kvp_cuda_progress(&moved->args.progress, stream);
    case OP_PAGE_COPY:
        return kvp_cuda_page_copy(&moved->args.copy, stream);
    case OP_PAGE_GATHER:
        return kvp_cuda_page_gather(&moved->args.flat, stream);
    case OP_PAGE_SCATTER:
        return kvp_cuda_page_scatter(&moved->args.flat, stream);
    case OP_PAGE_ZERO:
        return kvp_cuda_page_zero(&moved->args.zero, stream);
    default:
        return kvp_cuda_page_digest(&moved->args.digest, stream);
    }
}

enum kvp_status device_run_case(const struct kernel_case *original, unsigned char *ret_bytes, char *why,
                                size_t why_bytes)
{
    struct kernel_case moved;
    kernel_case_move(original, device_bytes, NULL, &moved);
    kernel_case_move(original, device_bytes, moved.ring, &moved);
    CUDA(cudaMemcpyAsync(device_bytes, original->bytes, original->used, cudaMemcpyHostToDevice, stream), fail);
    KERNEL(launch(&moved), fail);
    CUDA(cudaMemcpyAsync(ret_bytes, device_bytes, original->used, cudaMemcpyDeviceToHost, stream), fail);
    CUDA(cudaStreamSynchronize(stream), fail);
    return KVP_OK;

fail:
    return KVP_EDEVICE;
}

/* ---- a decode step in a graph ------------------------------------------------------------------------------------ */

#define STEP_BATCH  32
#define STEP_NNZ    256
#define STEP_PAGES  512
#define STEP_TOKENS 16
#define STEP_HEADS  4
#define STEP_DIM    64
#define STEP_ROW    16 /* ids in a row */
#define STEP_KV     (STEP_BATCH * STEP_ROW)
#define STEP_PLANE  ((size_t)STEP_PAGES * STEP_TOKENS * STEP_HEADS * STEP_DIM * 2)

/* All data of the step, the same on host and device. */
struct step_data {
    unsigned char front[256];
    unsigned char planes[2][STEP_PLANE];
    unsigned char back[256];
    unsigned char sources[2][STEP_NNZ * STEP_HEADS * STEP_DIM * 2];
    int32_t rows[STEP_BATCH][STEP_ROW];
    int32_t seq_slots[STEP_BATCH];
    uint32_t versions[STEP_BATCH];
    int32_t starts[STEP_BATCH];
    int32_t lengths[STEP_BATCH];
    int32_t batch;
    int32_t nnz;
    int32_t seq_lens[STEP_BATCH];
    int32_t kv_indptr[STEP_BATCH + 1];
    int32_t kv_indices[STEP_KV];
    int32_t last_page_len[STEP_BATCH];
    int32_t append_indptr[STEP_BATCH + 1];
    int32_t batch_indices[STEP_NNZ];
    int32_t positions[STEP_NNZ];
    uint64_t progress[STEP_BATCH];
    int64_t slot_mapping[STEP_NNZ];
};

struct step {
    struct kvp_index_args index;
    struct kvp_append_args append;
    struct kvp_progress_args progress;
    struct kvp_plane_view planes[2];
    struct kvp_token_view sources[2];
};

static void describe_step(struct step_data *data, struct step *step)
{
    int64_t row = STEP_DIM * 2, token = STEP_HEADS * row;
    for (int p = 0; p < 2; p++) {
        step->planes[p] = (struct kvp_plane_view){data->planes[p], STEP_TOKENS * token, token, row, STEP_HEADS,
                                                  STEP_DIM,        KVP_DTYPE_F16,       0};
        step->sources[p] = (struct kvp_token_view){data->sources[p], token, row};
    }
    step->index = (struct kvp_index_args){
        .source = KVP_INDEX_ROWS,
        .index_bits = 32,
        .slot_bits = 64,
        .pages = STEP_PAGES,
        .page_tokens = STEP_TOKENS,
        .batch = STEP_BATCH,
        .nnz = STEP_NNZ,
        .kv_capacity = STEP_KV,
        .batch_device = &data->batch,
        .append_lengths = data->lengths,
        .table = {.rows = data->rows[0],
                  .row_stride = sizeof data->rows[0],
                  .max_sequences = STEP_BATCH,
                  .row_pages = STEP_ROW},
        .seq_slots = data->seq_slots,
        .start_lengths = data->starts,
        .ret_seq_lens = data->seq_lens,
        .ret_kv_indptr = data->kv_indptr,
        .ret_kv_indices = data->kv_indices,
        .ret_kv_last_page_len = data->last_page_len,
        .ret_append_indptr = data->append_indptr,
        .ret_batch_indices = data->batch_indices,
        .ret_positions = data->positions,
        .ret_slot_mapping = data->slot_mapping,
        .ret_nnz = &data->nnz,
    };
    step->append = (struct kvp_append_args){
        .planes = step->planes,
        .sources = step->sources,
        .n_planes = 2,
        .pages = STEP_PAGES,
        .page_tokens = STEP_TOKENS,
        .at = {.kind = KVP_ADDRESS_CSR,
               .index_bits = 32,
               .nnz = STEP_NNZ,
               .nnz_device = &data->nnz,
               .batch_indices = data->batch_indices,
               .positions = data->positions,
               .batch = STEP_BATCH,
               .kv_indptr = data->kv_indptr,
               .kv_indices = data->kv_indices},
    };
    step->progress = (struct kvp_progress_args){
        .progress = data->progress,
        .max_sequences = STEP_BATCH,
        .index_bits = 32,
        .n = STEP_BATCH,
        .n_device = &data->batch,
        .seq_slots = data->seq_slots,
        .versions = data->versions,
        .lengths = data->seq_lens,
    };
}

static void fill_step(struct step_data *data)
{
    unsigned char *bytes = (unsigned char *)data;
    for (size_t i = 0; i < sizeof *data; i++)
        bytes[i] = (unsigned char)(i * 2654435761u >> 13);
    for (int b = 0; b < STEP_BATCH; b++) {
        for (int i = 0; i < STEP_ROW; i++)
            data->rows[b][i] = (b * STEP_ROW + i) * 5 % STEP_PAGES; /* 5 and 512 share no factor */
        data->seq_slots[b] = (b + 11) % STEP_BATCH;
        data->versions[b] = (uint32_t)(2 * b);
        data->starts[b] = 3 * b;
        data->lengths[b] = 0;
    }
}

static int replay_sizes(struct step_data *host, struct step_data *device, struct step_data *back, cudaGraphExec_t graph,
                        char *why, size_t why_bytes)
{
    static const int sizes[3][2] = {{32, 1}, {5, 40}, {0, 0}}; /* sequences, tokens of each */
    struct step step;
    describe_step(host, &step);
    for (int i = 0; i < 3; i++) {
        host->batch = sizes[i][0];
        for (int b = 0; b < STEP_BATCH; b++) {
            host->starts[b] += host->lengths[b];
            host->lengths[b] = b < sizes[i][0] ? sizes[i][1] : 0;
        }
        size_t from = offsetof(struct step_data, starts), to = offsetof(struct step_data, nnz);
        CUDA(cudaMemcpyAsync((char *)device + from, (char *)host + from, to - from, cudaMemcpyHostToDevice, stream),
             fail);
        CUDA(cudaGraphLaunch(graph, stream), fail);
        CUDA(cudaMemcpyAsync(back, device, sizeof *back, cudaMemcpyDeviceToHost, stream), fail);
        CUDA(cudaStreamSynchronize(stream), fail);
        reference_index(&step.index);
        reference_append(&step.append);
        reference_progress(&step.progress);
        for (size_t k = 0; k < sizeof *host; k++) {
            if (((unsigned char *)host)[k] != ((unsigned char *)back)[k]) {
                snprintf(why, why_bytes, "byte %zu differs after the replay with %d sequences", k, sizes[i][0]);
                goto fail;
            }
        }
    }
    return 0;

fail:
    return -1;
}

static int graph_serves_every_size(char *why, size_t why_bytes)
{
    struct step_data *host = malloc(sizeof *host), *back = malloc(sizeof *back), *device = NULL;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    struct step step;
    int result = -1;
    snprintf(why, why_bytes, "out of memory");
    if (host == NULL || back == NULL)
        goto free_host;
    fill_step(host);
    CUDA(cudaMalloc((void **)&device, sizeof *device), free_host);
    CUDA(cudaMemcpy(device, host, sizeof *device, cudaMemcpyHostToDevice), free_device);
    CUDA(cudaDeviceSynchronize(), free_device); /* our stream does not wait for the default one */
    describe_step(device, &step);
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), free_device);
    enum kvp_status first = kvp_cuda_index(&step.index, stream), second = kvp_cuda_append(&step.append, stream);
    enum kvp_status third = kvp_cuda_progress(&step.progress, stream);
    CUDA(cudaStreamEndCapture(stream, &graph), free_device);
    KERNEL(first != KVP_OK ? first : second != KVP_OK ? second : third, destroy_graph);
    CUDA(cudaGraphInstantiateWithFlags(&exec, graph, 0), destroy_graph);
    result = replay_sizes(host, device, back, exec, why, why_bytes);
    (void)cudaGraphExecDestroy(exec);
destroy_graph:
    (void)cudaGraphDestroy(graph);
free_device:
    (void)cudaFree(device);
free_host:
    free(host);
    free(back);
    return result;
}

/* ---- fp8 --------------------------------------------------------------------------------------------------------- */

#define HALVES     65536
#define HALF_DIM   128
#define HALF_COUNT (HALVES / HALF_DIM) /* tokens, one a page */

/* Quantise all halves, which lie at `bytes`, to fp8 behind them; the scale behind that, then the slots. */
static enum kvp_status quantise_halves(unsigned char *bytes, uint32_t fp8)
{
    unsigned char *codes = bytes + 2 * HALVES, *scale = codes + HALVES, *slots = scale + 256;
    struct kvp_plane_view plane = {codes, HALF_DIM, HALF_DIM, HALF_DIM, 1, HALF_DIM, fp8, 0};
    struct kvp_token_view source = {bytes, 2 * HALF_DIM, 2 * HALF_DIM};
    const float *scales[] = {(const float *)scale};
    struct kvp_quant_append_args args = {
        .planes = &plane,
        .sources = &source,
        .n_planes = 1,
        .pages = HALF_COUNT,
        .page_tokens = 1,
        .source_dtype = KVP_DTYPE_F16,
        .scale_mode = KVP_SCALE_TENSOR,
        .scales = scales,
        .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 32, .nnz = HALF_COUNT, .slot_mapping = slots},
    };
    return kvp_cuda_quant_append(&args, stream);
}

static int every_half_becomes_the_nearest_fp8(char *why, size_t why_bytes)
{
    static const uint32_t formats[] = {KVP_DTYPE_FP8_E4M3, KVP_DTYPE_FP8_E5M2};
    static const float scales[] = {1.0f, 0.0371f, 3.0f, 0x1p-20f, 1e-30f, 448.0f, -2.5f};
    static uint16_t halves[HALVES];
    static uint8_t codes[HALVES];
    static int32_t slots[HALF_COUNT];
    unsigned char *bytes = device_bytes;
    for (uint32_t i = 0; i < HALVES; i++)
        halves[i] = (uint16_t)i;
    for (int32_t j = 0; j < HALF_COUNT; j++)
        slots[j] = j;
    CUDA(cudaMemcpy(bytes, halves, sizeof halves, cudaMemcpyHostToDevice), fail);
    CUDA(cudaMemcpy(bytes + 3 * HALVES + 256, slots, sizeof slots, cudaMemcpyHostToDevice), fail);
    for (size_t k = 0; k < 2 * sizeof scales / sizeof scales[0]; k++) {
        uint32_t fp8 = formats[k % 2];
        float scale = scales[k / 2];
        CUDA(cudaMemcpy(bytes + 3 * HALVES, &scale, sizeof scale, cudaMemcpyHostToDevice), fail);
        CUDA(cudaDeviceSynchronize(), fail);
        KERNEL(quantise_halves(bytes, fp8), fail);
        CUDA(cudaStreamSynchronize(stream), fail);
        CUDA(cudaMemcpy(codes, bytes + 2 * HALVES, sizeof codes, cudaMemcpyDeviceToHost), fail);
        for (uint32_t i = 0; i < HALVES; i++) {
            double value = reference_wide_value(&halves[i], KVP_DTYPE_F16);
            uint8_t expected = reference_fp8((float)(value / (double)scale), fp8);
            if (codes[i] != expected) {
                snprintf(why, why_bytes, "%a / %a: 0x%02x instead of 0x%02x", value, scale, codes[i], expected);
                goto fail;
            }
        }
    }
    return 0;

fail:
    return -1;
}

/* ---- a pool of more than 2^32 elements --------------------------------------------------------------------------- */

#define BIG_HEADS      8
#define BIG_DIM        128
#define BIG_TOKENS     16
#define BIG_PAGE_BYTES ((size_t)BIG_HEADS * BIG_DIM * BIG_TOKENS * 2)
#define BIG_PAGES      ((uint32_t)(((1ull << 33) / BIG_PAGE_BYTES) + 64)) /* 2^33 bytes are 2^32 elements */
#define BIG_POISON     0xa5
#define BIG_TOUCHED    6

static struct kvp_plane_view big_view(void *base)
{
    int64_t row = BIG_DIM * 2, token = BIG_HEADS * row;
    return (struct kvp_plane_view){base, (int64_t)BIG_PAGE_BYTES, token, row, BIG_HEADS, BIG_DIM, KVP_DTYPE_F16, 0};
}

static const uint32_t big_touched[BIG_TOUCHED] = {
    0, 1, BIG_PAGES / 2, BIG_PAGES - 65, BIG_PAGES - 64, BIG_PAGES - 1, /* 64 from the end: element 2^32 */
};

/* Fill a few pages all over the pool, from `sources`, which holds them one behind the other. */
static int append_to_big(unsigned char *pool, unsigned char *sources, int64_t *slots, char *why, size_t why_bytes)
{
    int64_t n = BIG_TOUCHED * BIG_TOKENS + 1, host_slots[BIG_TOUCHED * BIG_TOKENS + 1];
    for (int64_t j = 0; j + 1 < n; j++)
        host_slots[j] = (int64_t)big_touched[j / BIG_TOKENS] * BIG_TOKENS + j % BIG_TOKENS;
    host_slots[n - 1] = (int64_t)BIG_PAGES * BIG_TOKENS; /* the guard page: must be refused */
    struct kvp_plane_view plane = big_view(pool);
    struct kvp_token_view source = {sources, BIG_HEADS * BIG_DIM * 2, BIG_DIM * 2};
    struct kvp_append_args args = {
        .planes = &plane,
        .sources = &source,
        .n_planes = 1,
        .pages = BIG_PAGES,
        .page_tokens = BIG_TOKENS,
        .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = n, .slot_mapping = slots},
    };
    CUDA(cudaMemcpy(slots, host_slots, sizeof host_slots, cudaMemcpyHostToDevice), fail);
    CUDA(cudaDeviceSynchronize(), fail); /* our stream does not wait for the default one */
    KERNEL(kvp_cuda_append(&args, stream), fail);
    CUDA(cudaStreamSynchronize(stream), fail);
    return 0;

fail:
    return -1;
}

static struct kvp_digest page_digest(unsigned char *page)
{
    struct kvp_plane_view plane = big_view(page);
    struct kvp_digest digest;
    int32_t id = 0;
    reference_page_digest(&(struct kvp_page_digest_args){.planes = &plane,
                                                         .n_planes = 1,
                                                         .pages = 1,
                                                         .page_tokens = BIG_TOKENS,
                                                         .n = 1,
                                                         .page_ids = &id,
                                                         .ret_digests = &digest});
    return digest;
}

/* The digest of every page, the guard pages in front and behind included, against what it must be. */
static int check_big(unsigned char *slab, unsigned char *sources, int32_t *ids, struct kvp_digest *digests, char *why,
                     size_t why_bytes)
{
    uint32_t n = BIG_PAGES + 2;
    int32_t *host_ids = malloc(n * sizeof *host_ids);
    struct kvp_digest *found = malloc(n * sizeof *found), *expected = malloc(n * sizeof *expected);
    unsigned char *page = malloc(BIG_PAGE_BYTES);
    struct kvp_plane_view plane = big_view(slab);
    int result = -1;
    snprintf(why, why_bytes, "out of memory");
    if (host_ids == NULL || found == NULL || expected == NULL || page == NULL)
        goto free_all;
    memset(page, BIG_POISON, BIG_PAGE_BYTES);
    for (uint32_t i = 0; i < n; i++) {
        host_ids[i] = (int32_t)i;
        expected[i] = i == 0 ? page_digest(page) : expected[0];
    }
    for (uint32_t i = 0; i < BIG_TOUCHED; i++)
        expected[big_touched[i] + 1] = page_digest(sources + i * BIG_PAGE_BYTES);
    CUDA(cudaMemcpy(ids, host_ids, n * sizeof *ids, cudaMemcpyHostToDevice), free_all);
    CUDA(cudaDeviceSynchronize(), free_all);
    struct kvp_page_digest_args args = {.planes = &plane,
                                        .n_planes = 1,
                                        .pages = n,
                                        .page_tokens = BIG_TOKENS,
                                        .n = n,
                                        .page_ids = ids,
                                        .ret_digests = digests};
    KERNEL(kvp_cuda_page_digest(&args, stream), free_all);
    CUDA(cudaMemcpyAsync(found, digests, n * sizeof *found, cudaMemcpyDeviceToHost, stream), free_all);
    CUDA(cudaStreamSynchronize(stream), free_all);
    for (uint32_t i = 0; i < n; i++) {
        if (memcmp(&found[i], &expected[i], sizeof found[i]) != 0) {
            snprintf(why, why_bytes, "page %d of %u has another digest than it should", (int)i - 1, BIG_PAGES);
            goto free_all;
        }
    }
    result = 0;
free_all:
    free(host_ids);
    free(found);
    free(expected);
    free(page);
    return result;
}

static int pool_may_pass_2_to_the_32_elements(char *why, size_t why_bytes)
{
    size_t free_bytes, total_bytes, slab_bytes = (BIG_PAGES + 2) * BIG_PAGE_BYTES;
    size_t source_bytes = BIG_TOUCHED * BIG_PAGE_BYTES, token_bytes = BIG_PAGE_BYTES / BIG_TOKENS;
    size_t digest_bytes = (BIG_PAGES + 2) * sizeof(struct kvp_digest), id_bytes = (BIG_PAGES + 2) * sizeof(int32_t);
    unsigned char *slab = NULL, *small = NULL, *host = malloc(source_bytes + token_bytes);
    int result = -1;
    snprintf(why, why_bytes, "out of memory");
    if (host == NULL)
        goto free_all;
    CUDA(cudaMemGetInfo(&free_bytes, &total_bytes), free_all);
    if (free_bytes < slab_bytes + (256u << 20)) {
        snprintf(why, why_bytes, "%zu MiB of device memory are free, %zu needed", free_bytes >> 20, slab_bytes >> 20);
        result = 1;
        goto free_all;
    }
    for (size_t i = 0; i < source_bytes + token_bytes; i++)
        host[i] = (unsigned char)(i * 2654435761u >> 15);
    /* one block: digests, slots, sources, ids */
    size_t slots_at = digest_bytes, sources_at = slots_at + 4096, ids_at = sources_at + source_bytes + token_bytes;
    CUDA(cudaMalloc((void **)&slab, slab_bytes), free_all);
    CUDA(cudaMalloc((void **)&small, ids_at + id_bytes), free_all);
    CUDA(cudaMemset(slab, BIG_POISON, slab_bytes), free_all);
    CUDA(cudaMemcpy(small + sources_at, host, source_bytes + token_bytes, cudaMemcpyHostToDevice), free_all);
    if (append_to_big(slab + BIG_PAGE_BYTES, small + sources_at, (int64_t *)(small + slots_at), why, why_bytes) != 0)
        goto free_all;
    result = check_big(slab, host, (int32_t *)(small + ids_at), (struct kvp_digest *)small, why, why_bytes);
free_all:
    (void)cudaFree(slab);
    (void)cudaFree(small);
    free(host);
    return result;
}

const struct device_test device_tests[DEVICE_TESTS] = {
    {"cuda graph captured once and replayed at three sizes", graph_serves_every_size},
    {"cuda fp8 of every half", every_half_becomes_the_nearest_fp8},
    {"cuda pool of more than 2^32 elements", pool_may_pass_2_to_the_32_elements},
};
