/**
 * The page digest: the sums of kvp_digest.h by many blocks, joined by 64-bit atomic additions.
 *
 * Three launches: clear the sums, add up every part of every page, mix. A block takes a part of one page of one plane;
 * words are read in pairs where everything is 16-byte aligned, else byte by byte.
 */
#include "kvp_digest.h"
#include "mover.cuh"

#define LAUNCH_PLANES 64
#define BLOCK_ROUNDS  8 /* vectors a thread takes */

struct plane_words {
    const char *base;
    int64_t page_stride, token_stride, head_stride;
    uint64_t first_word; /* of the plane's rows, within the page */
    uint32_t row_bytes;  /* of one (token, head) */
    uint32_t row_words;
    uint32_t vectors; /* of a page: pairs of words, or words */
    struct fast_div row_vectors;
    struct fast_div heads;
};

struct digest_params {
    unsigned long long *sums; /* [entries][2] */
    struct kvp_error_ring *errors;
    const int32_t *page_ids;
    uint32_t pages;
    uint32_t first_entry, entries;
    struct fast_div blocks; /* of the largest plane's page */
    struct fast_div blocks_per_plane;
    struct plane_words planes[LAUNCH_PLANES];
};

struct finish_params {
    unsigned long long *sums;
    const int32_t *page_ids;
    uint32_t pages, n;
    uint64_t words; /* of a page; 0: clear the sums instead */
};

/* Word `at` of a row, filled up with zeros behind the row's end. */
__device__ __forceinline__ uint64_t load_word(const char *row, uint32_t at, uint32_t row_bytes)
{
    uint64_t word = 0;

    for (uint32_t i = 0; i < 8 && at * 8 + i < row_bytes; i++)
        word |= (uint64_t)(uint8_t)row[at * 8 + i] << (8 * i);
    return word;
}

template <bool PAIRS>
__device__ __forceinline__ void add_part(const struct plane_words &w, const char *page, uint32_t part, uint64_t sum[2])
{
#pragma unroll(PAIRS ? 4 : 1)
    for (uint32_t round = 0; round < BLOCK_ROUNDS; round++) {
        uint32_t v = (part * BLOCK_ROUNDS + round) * KVP_BLOCK_THREADS + threadIdx.x;
        uint32_t row = quotient(v, w.row_vectors), at = v - row * w.row_vectors.divisor;
        uint32_t token = quotient(row, w.heads), head = row - token * w.heads.divisor;
        const char *from = page + token * w.token_stride + head * w.head_stride;
        uint64_t index = w.first_word + (uint64_t)row * w.row_words + (PAIRS ? 2 * at : at);

        if (v >= w.vectors)
            break;
        if (PAIRS) {
            ulonglong2 pair = __ldcs(reinterpret_cast<const ulonglong2 *>(from) + at);

            sum[0] +=
                kvp_digest_lane0(pair.x, kvp_digest_key0(index)) + kvp_digest_lane0(pair.y, kvp_digest_key0(index + 1));
            sum[1] +=
                kvp_digest_lane1(pair.x, kvp_digest_key1(index)) + kvp_digest_lane1(pair.y, kvp_digest_key1(index + 1));
        } else {
            uint64_t word = load_word(from, at, w.row_bytes);

            sum[0] += kvp_digest_lane0(word, kvp_digest_key0(index));
            sum[1] += kvp_digest_lane1(word, kvp_digest_key1(index));
        }
    }
}

template <bool PAIRS>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) digest_kernel(const __grid_constant__ digest_params p)
{
    __shared__ unsigned long long block_sums[2];
    uint32_t plane = quotient(blockIdx.x, p.blocks_per_plane);
    uint32_t item = blockIdx.x - plane * p.blocks_per_plane.divisor;
    uint32_t entry = quotient(item, p.blocks), part = item - entry * p.blocks.divisor;
    const struct plane_words &w = p.planes[plane];
    uint64_t sum[2] = {0, 0};
    int32_t id;

    entry += p.first_entry;
    id = p.page_ids[entry];
    if (id < 0)
        return;
    if ((uint32_t)id >= p.pages) {
        if (plane == 0 && part == 0 && threadIdx.x == 0)
            report(p.errors, KVP_BAD_PAGE, entry, id);
        return;
    }
    if (threadIdx.x < 2)
        block_sums[threadIdx.x] = 0;
    __syncthreads();
    add_part<PAIRS>(w, w.base + id * w.page_stride, part, sum);
    for (uint32_t step = 16; step; step /= 2) {
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], step);
        sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], step);
    }
    if (threadIdx.x % 32 == 0) {
        atomicAdd(&block_sums[0], (unsigned long long)sum[0]);
        atomicAdd(&block_sums[1], (unsigned long long)sum[1]);
    }
    __syncthreads();
    if (threadIdx.x < 2)
        atomicAdd(&p.sums[2 * (uint64_t)entry + threadIdx.x], block_sums[threadIdx.x]);
}

__global__ void __launch_bounds__(KVP_BLOCK_THREADS) finish_kernel(const __grid_constant__ finish_params p)
{
    uint64_t i = (uint64_t)blockIdx.x * KVP_BLOCK_THREADS + threadIdx.x;

    if (i >= 2 * (uint64_t)p.n)
        return;
    if (p.words == 0)
        p.sums[i] = 0;
    else if ((uint32_t)p.page_ids[i / 2] < p.pages)
        p.sums[i] = kvp_digest_finish(p.sums[i], p.words);
}

/* ---- the host's part --------------------------------------------------------------------------------------------- */

static struct plane_words plane_words_of(const struct kvp_plane_view *plane, uint32_t page_tokens, uint64_t first_word,
                                         bool pairs)
{
    struct plane_words w = {};

    w.base = static_cast<const char *>(plane->base);
    w.page_stride = plane->page_stride;
    w.token_stride = plane->token_stride;
    w.head_stride = plane->head_stride;
    w.first_word = first_word;
    w.row_bytes = plane->dim * kvp_dtype_bytes(plane->dtype);
    w.row_words = (w.row_bytes + 7) / 8;
    w.row_vectors = fast_div_of(pairs ? w.row_words / 2 : w.row_words);
    w.heads = fast_div_of(plane->heads);
    w.vectors = page_tokens * plane->heads * w.row_vectors.divisor;
    return w;
}

/* The planes of one launch, whose words begin at *words; on return behind them. */
static enum kvp_status add_planes(const struct kvp_page_digest_args *args, uint32_t first, uint32_t n, bool pairs,
                                  uint64_t *words, void *stream)
{
    const uint32_t block_vectors = KVP_BLOCK_THREADS * BLOCK_ROUNDS;
    enum kvp_status status = KVP_OK;
    uint32_t blocks = 1, share;
    struct digest_params p;

    p.sums = reinterpret_cast<unsigned long long *>(args->ret_digests);
    p.errors = first ? nullptr : args->errors;
    p.page_ids = args->page_ids;
    p.pages = args->pages;
    for (uint32_t i = 0; i < n; i++) {
        p.planes[i] = plane_words_of(&args->planes[first + i], args->page_tokens, *words, pairs);
        *words += (uint64_t)args->page_tokens * args->planes[first + i].heads * p.planes[i].row_words;
        if ((p.planes[i].vectors + block_vectors - 1) / block_vectors > blocks)
            blocks = (p.planes[i].vectors + block_vectors - 1) / block_vectors;
    }
    p.blocks = fast_div_of(blocks);
    share = (1u << 30) / n / blocks;
    share = share ? share : 1;
    for (p.first_entry = 0; status == KVP_OK && p.first_entry < args->n; p.first_entry += p.entries) {
        p.entries = args->n - p.first_entry < share ? args->n - p.first_entry : share;
        p.blocks_per_plane = fast_div_of(p.entries * blocks);
        status = pairs ? launch(digest_kernel<true>, p, n * p.entries * blocks, KVP_BLOCK_THREADS, 0, stream)
                       : launch(digest_kernel<false>, p, n * p.entries * blocks, KVP_BLOCK_THREADS, 0, stream);
    }
    return status;
}

extern "C" enum kvp_status kvp_cuda_page_digest(const struct kvp_page_digest_args *args, void *stream)
{
    enum kvp_status status = kvp_check_page_digest(args);
    struct finish_params finish;
    uint64_t bits = 0, words = 0;
    uint32_t blocks;

    if (status != KVP_OK || args->n == 0)
        return status;
    finish.sums = reinterpret_cast<unsigned long long *>(args->ret_digests);
    finish.page_ids = args->page_ids;
    finish.pages = args->pages;
    finish.n = args->n;
    finish.words = 0;
    blocks = (uint32_t)((2 * (uint64_t)args->n + KVP_BLOCK_THREADS - 1) / KVP_BLOCK_THREADS);
    for (uint32_t i = 0; i < args->n_planes; i++)
        bits |= plane_alignment_bits(&args->planes[i]);
    status = launch(finish_kernel, finish, blocks, KVP_BLOCK_THREADS, 0, stream);
    for (uint32_t i = 0; status == KVP_OK && i < args->n_planes; i += LAUNCH_PLANES)
        status = add_planes(args, i, args->n_planes - i < LAUNCH_PLANES ? args->n_planes - i : LAUNCH_PLANES,
                            widest_vector(bits) == 16, &words, stream);
    finish.words = words;
    if (status == KVP_OK)
        status = launch(finish_kernel, finish, blocks, KVP_BLOCK_THREADS, 0, stream);
    return status;
}
