/**
 * The index step: everything that attention wants to know about a batch, in one launch.
 *
 * Every block computes the sums over the whole batch for itself (a load and a scan: at 256 sequences about a
 * microsecond, cheaper than a second launch or a wait between blocks), keeps them in shared memory, and then writes its
 * even share of the token outputs and of the page outputs, finding each entry's sequence by bisection. Work is so
 * balanced by token and by page; the sequence outputs are written by the first block.
 *
 *     shared memory   token_sum[batch + 1]   tokens listed before sequence b
 *                     page_sum[batch + 1]    pages before sequence b
 *                     start[batch]           position of the sequence's first listed token
 *
 * Where heads or progress words are read they may lie in host memory, once a block: few blocks then.
 * Sums saturate at 2^31 − 1; capacities are below that.
 */
#include "device.cuh"

#define INDEX_THREADS 512
#define FAR_BLOCKS    16 /* where each block reads words of host memory */
#define SUM_MAX       0x7fffffffu

#define PAGE_UNROLL 4 /* page ids that a thread has under way */

struct index_params {
    struct kvp_index_args a;
    struct fast_div page_tokens;
    uint32_t token_blocks; /* of the grid; 0 where no token output is wanted */
};

struct sequence {
    uint32_t length; /* after the append */
    uint32_t first;  /* position of the first listed token */
    uint32_t listed;
    uint32_t pages;
};

__device__ __forceinline__ uint32_t add_saturating(uint32_t a, uint32_t b)
{
    return min(a + b, SUM_MAX); /* both ≤ SUM_MAX */
}

__device__ __forceinline__ void store_index(void *array, int64_t i, int64_t value, bool wide)
{
    if (wide)
        static_cast<int64_t *>(array)[i] = value;
    else
        static_cast<int32_t *>(array)[i] = (int32_t)value;
}

/* Tokens appended to b. */
__device__ __forceinline__ int64_t count_of(const struct kvp_index_args &a, int64_t b, bool wide)
{
    int64_t count = a.append_each;

    if (a.append_lengths)
        count = load_index(a.append_lengths, b, wide);
    else if (a.append_indptr)
        count = load_index(a.append_indptr, b + 1, wide) - load_index(a.append_indptr, b, wide);
    return count > 0 ? count : 0;
}

/* Leading ids ≥ 0 of a row, counted by a warp. */
__device__ __forceinline__ uint32_t leading_pages(const struct kvp_index_args &a, int64_t b, bool wide)
{
    uint32_t lane = threadIdx.x & 31, pages = (uint32_t)a.in_page_table_pages;

    for (uint32_t k = 0; k < pages; k += 32) {
        bool bad = k + lane >= pages || load_index(a.in_page_table, b * a.in_page_table_stride + k + lane, wide) < 0;
        uint32_t ends = __ballot_sync(0xffffffffu, bad);

        if (ends)
            return k + (uint32_t)__ffs((int)ends) - 1;
    }
    return pages;
}

/* start and available pages of b from kvpool's table; false: the sequence is empty */
__device__ __forceinline__ bool read_row(const struct kvp_index_args &a, int64_t b, bool wide,
                                         struct kvp_error_ring *errors, int64_t *ret_start, int64_t *ret_pages)
{
    int32_t slot = a.seq_slots[b];
    uint4 head = {0, a.table.row_pages, 0, 0}; /* version, row_pages, length, generation */
    uint64_t word;

    if (slot < 0)
        return false;
    if ((uint32_t)slot >= a.table.max_sequences) {
        report(errors, KVP_BAD_SLOT, b, slot);
        return false;
    }
    if (a.table.heads && (a.row_versions || !a.row_counts || !a.start_lengths))
        head = *reinterpret_cast<const uint4 *>(&a.table.heads[slot]);
    if (a.row_versions && head.x != a.row_versions[b]) {
        report(errors, KVP_BAD_VERSION, b, head.x);
        return false;
    }
    *ret_start = head.z;
    if (a.start_lengths) {
        *ret_start = load_index(a.start_lengths, b, wide);
    } else if (a.progress) {
        word = a.progress[slot];
        if (!a.row_versions || (uint32_t)(word >> 32) == a.row_versions[b])
            *ret_start = (uint32_t)word;
    }
    *ret_pages = min(a.table.row_pages, a.row_counts ? a.row_counts[b] : head.y);
    return true;
}

__device__ __forceinline__ struct sequence read_sequence(const struct index_params &p, int64_t b, int64_t batch,
                                                         const uint32_t *counted_pages, struct kvp_error_ring *errors)
{
    const struct kvp_index_args &a = p.a;
    const bool wide = a.index_bits == 64;
    int64_t start = 0, pages = 0, count, length;

    if (b >= batch)
        return {0, 0, 0, 0};
    count = count_of(a, b, wide);
    if (a.source == KVP_INDEX_ROWS) {
        if (!read_row(a, b, wide, errors, &start, &pages))
            return {0, 0, 0, 0};
    } else if (a.source == KVP_INDEX_CSR) {
        pages = load_index(a.in_kv_indptr, b + 1, wide) - load_index(a.in_kv_indptr, b, wide);
        pages = pages > 0 ? pages : 0;
        start = pages > 0 ? (pages - 1) * a.page_tokens + load_index(a.in_last_page_len, b, wide) : 0;
        start -= count;
    } else {
        pages = a.in_page_counts ? load_index(a.in_page_counts, b, wide) : counted_pages[b];
        pages = pages > a.in_page_table_pages ? a.in_page_table_pages : pages;
        start = pages > 0 ? (pages - 1) * a.page_tokens + load_index(a.in_last_page_len, b, wide) : 0;
        pages = pages > 0 ? pages : 0;
    }
    length = start + count;
    if (start < 0 || length > pages * a.page_tokens || length > SUM_MAX) {
        report(errors, KVP_BAD_POSITION, b, start < 0 ? start : length);
        return {0, 0, 0, 0};
    }
    return {(uint32_t)length, a.all_tokens ? 0 : (uint32_t)start, a.all_tokens ? (uint32_t)length : (uint32_t)count,
            quotient((uint32_t)length + a.page_tokens - 1, p.page_tokens)};
}

/* The sums before this thread's pair over the block, which are added to *carry. */
__device__ __forceinline__ uint2 scan_block(uint2 value, uint2 *carry, uint2 *warp_sums)
{
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint2 sum = value, before = *carry, exclusive, warps;

    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t x = __shfl_up_sync(0xffffffffu, sum.x, step), y = __shfl_up_sync(0xffffffffu, sum.y, step);

        if (lane >= step)
            sum = {add_saturating(sum.x, x), add_saturating(sum.y, y)};
    }
    if (lane == 31)
        warp_sums[warp] = sum;
    exclusive = {__shfl_up_sync(0xffffffffu, sum.x, 1), __shfl_up_sync(0xffffffffu, sum.y, 1)};
    if (lane == 0)
        exclusive = {0, 0};
    __syncthreads();
    warps = lane < INDEX_THREADS / 32 ? warp_sums[lane] : uint2{0, 0};
    __syncthreads(); /* warp_sums is used again */
    for (uint32_t step = 1; step < INDEX_THREADS / 32; step *= 2) {
        uint32_t x = __shfl_up_sync(0xffffffffu, warps.x, step), y = __shfl_up_sync(0xffffffffu, warps.y, step);

        if (lane >= step)
            warps = {add_saturating(warps.x, x), add_saturating(warps.y, y)};
    }
    if (warp > 0) {
        before.x = add_saturating(before.x, __shfl_sync(0xffffffffu, warps.x, warp - 1));
        before.y = add_saturating(before.y, __shfl_sync(0xffffffffu, warps.y, warp - 1));
    }
    carry->x = add_saturating(carry->x, __shfl_sync(0xffffffffu, warps.x, INDEX_THREADS / 32 - 1));
    carry->y = add_saturating(carry->y, __shfl_sync(0xffffffffu, warps.y, INDEX_THREADS / 32 - 1));
    return {add_saturating(before.x, exclusive.x), add_saturating(before.y, exclusive.y)};
}

/* The sequence whose range of `sums` holds i; i is below the last sum. */
__device__ __forceinline__ uint32_t bisect(const uint32_t *sums, uint32_t batch, uint32_t i)
{
    uint32_t low = 0, high = batch;

    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;

        if (sums[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Page k of sequence b. */
__device__ __forceinline__ int64_t page_of(const struct kvp_index_args &a, uint32_t b, uint32_t k, bool wide)
{
    if (a.source == KVP_INDEX_ROWS)
        return reinterpret_cast<const int32_t *>(reinterpret_cast<const char *>(a.table.rows) +
                                                 (uint64_t)a.seq_slots[b] * a.table.row_stride)[k];
    if (a.source == KVP_INDEX_CSR)
        return load_index(a.in_kv_indices, load_index(a.in_kv_indptr, b, wide) + k, wide);
    return load_index(a.in_page_table, b * a.in_page_table_stride + k, wide);
}

__device__ __forceinline__ void write_sequence(const struct kvp_index_args &a, uint32_t b, const struct sequence &s,
                                               uint2 before, bool wide)
{
    if (a.ret_seq_lens)
        store_index(a.ret_seq_lens, b, s.length, wide);
    if (a.ret_kv_last_page_len)
        store_index(a.ret_kv_last_page_len, b, s.length ? s.length - (s.pages - 1) * a.page_tokens : 0, wide);
    if (a.ret_append_indptr)
        store_index(a.ret_append_indptr, b, before.x, wide);
    if (a.ret_kv_indptr)
        store_index(a.ret_kv_indptr, b, before.y, wide);
}

__device__ __forceinline__ void write_totals(const struct kvp_index_args &a, uint2 total, bool wide)
{
    if (a.ret_append_indptr)
        store_index(a.ret_append_indptr, a.batch, total.x, wide);
    if (a.ret_kv_indptr)
        store_index(a.ret_kv_indptr, a.batch, total.y, wide);
    if (a.ret_nnz)
        store_index(a.ret_nnz, 0, total.x, wide);
    if ((a.ret_batch_indices || a.ret_positions || a.ret_slot_mapping) && total.x > a.nnz)
        report(a.errors, KVP_BAD_CAPACITY, 0, total.x);
    if (a.ret_kv_indices && total.y > a.kv_capacity)
        report(a.errors, KVP_BAD_CAPACITY, 0, total.y);
}

__device__ __forceinline__ void write_token(const struct index_params &p, uint32_t j, uint32_t total,
                                            const uint32_t *token_sum, const uint32_t *start, bool wide)
{
    const struct kvp_index_args &a = p.a;
    int64_t slot = -1, b = -1, position = 0;

    if (j < total) {
        b = bisect(token_sum, (uint32_t)a.batch, j);
        position = start[b] + (j - token_sum[b]);
        if (a.ret_slot_mapping) {
            uint32_t k = quotient((uint32_t)position, p.page_tokens);
            int64_t page = page_of(a, (uint32_t)b, k, wide);

            if (page >= 0 && page < a.pages)
                slot = page * a.page_tokens + (position - k * a.page_tokens);
            else
                report(a.errors, KVP_BAD_PAGE, j, page);
        }
    }
    if (a.ret_batch_indices)
        store_index(a.ret_batch_indices, j, b, wide);
    if (a.ret_positions)
        store_index(a.ret_positions, j, position, wide);
    if (a.ret_slot_mapping)
        store_index(a.ret_slot_mapping, j, slot, a.slot_bits == 64);
}

/* This block's share of the page ids, several under way in each thread. */
__device__ __forceinline__ void write_pages(const struct index_params &p, uint32_t total, const uint32_t *page_sum,
                                            bool wide)
{
    const struct kvp_index_args &a = p.a;
    const uint32_t threads = (gridDim.x - p.token_blocks) * INDEX_THREADS;
    const uint32_t end = (uint32_t)min((int64_t)total, a.kv_capacity);

    for (uint32_t i = (blockIdx.x - p.token_blocks) * INDEX_THREADS + threadIdx.x; i < end;
         i += PAGE_UNROLL * threads) {
        int64_t page[PAGE_UNROLL];

#pragma unroll
        for (uint32_t u = 0; u < PAGE_UNROLL; u++) {
            if (i + u * threads < end) {
                uint32_t b = bisect(page_sum, (uint32_t)a.batch, i + u * threads);

                page[u] = page_of(a, b, i + u * threads - page_sum[b], wide);
            }
        }
#pragma unroll
        for (uint32_t u = 0; u < PAGE_UNROLL; u++) {
            if (i + u * threads < end)
                store_index(a.ret_kv_indices, i + u * threads, page[u], wide);
        }
    }
}

__global__ void __launch_bounds__(INDEX_THREADS) index_kernel(const __grid_constant__ index_params p)
{
    extern __shared__ uint32_t shared[];
    __shared__ uint2 warp_sums[INDEX_THREADS / 32];
    const struct kvp_index_args &a = p.a;
    const bool wide = a.index_bits == 64;
    const uint32_t size = (uint32_t)a.batch;
    uint32_t *token_sum = shared, *page_sum = token_sum + size + 1, *start = page_sum + size + 1;
    int64_t batch = a.batch;
    uint2 carry = {0, 0};

    wait_for_stream();
    if (a.batch_device)
        batch = min(batch, (int64_t)load_index(a.batch_device, 0, wide));
    if (a.source == KVP_INDEX_TABLE && !a.in_page_counts) {
        for (uint32_t b = threadIdx.x / 32; b < size; b += INDEX_THREADS / 32) {
            uint32_t pages = leading_pages(a, b, wide);

            if (threadIdx.x % 32 == 0)
                start[b] = pages;
        }
        __syncthreads();
    }
    for (uint32_t tile = 0; tile < size; tile += INDEX_THREADS) {
        uint32_t b = tile + threadIdx.x;
        struct sequence s = {0, 0, 0, 0};
        uint2 before;

        if (b < size)
            s = read_sequence(p, b, batch, start, blockIdx.x == 0 ? a.errors : nullptr);
        before = scan_block({min(s.listed, SUM_MAX), s.pages}, &carry, warp_sums);
        if (b >= size)
            continue;
        token_sum[b] = before.x;
        page_sum[b] = before.y;
        start[b] = s.first;
        if (blockIdx.x == 0)
            write_sequence(a, b, s, before, wide);
    }
    if (threadIdx.x == 0) {
        token_sum[size] = carry.x;
        page_sum[size] = carry.y;
        if (blockIdx.x == 0)
            write_totals(a, carry, wide);
    }
    __syncthreads();
    if (blockIdx.x < p.token_blocks) {
        for (uint32_t j = blockIdx.x * INDEX_THREADS + threadIdx.x; j < a.nnz; j += p.token_blocks * INDEX_THREADS)
            write_token(p, j, carry.x, token_sum, start, wide);
    } else if (a.ret_kv_indices) {
        write_pages(p, carry.y, page_sum, wide);
    }
}

static bool wants_tokens(const struct kvp_index_args *args)
{
    return args->nnz && (args->ret_batch_indices || args->ret_positions || args->ret_slot_mapping);
}

/* Whether each block reads words that may lie in host memory. */
static bool reads_heads(const struct kvp_index_args *args)
{
    return args->source == KVP_INDEX_ROWS &&
           ((args->progress && !args->start_lengths) ||
            (args->table.heads && (args->row_versions || !args->row_counts || !args->start_lengths)));
}

static uint32_t blocks_for(int64_t entries, int64_t per_block, int most)
{
    int64_t blocks = (entries + per_block - 1) / per_block;

    return (uint32_t)(blocks < most ? blocks : most);
}

extern "C" enum kvp_status kvp_cuda_index(const struct kvp_index_args *args, void *stream)
{
    enum kvp_status status = kvp_check_index(args);
    int device, processors, most;
    struct index_params p;
    uint32_t blocks;
    size_t bytes;

    if (status != KVP_OK)
        return status;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return KVP_EDEVICE;
    }
    p.a = *args;
    p.page_tokens = fast_div_of(args->page_tokens);
    bytes = (3 * (size_t)args->batch + 2) * sizeof(uint32_t);
    if (bytes > 48 * 1024 - sizeof(uint2) * (INDEX_THREADS / 32) &&
        cudaFuncSetAttribute(index_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        return KVP_EDEVICE;
    }
    most = reads_heads(args) ? FAR_BLOCKS : processors;
    p.token_blocks = wants_tokens(args) ? blocks_for(args->nnz, INDEX_THREADS, most) : 0;
    blocks = p.token_blocks;
    if (args->ret_kv_indices)
        blocks += blocks_for(args->kv_capacity, INDEX_THREADS, 2 * most);
    return launch_early(index_kernel, p, blocks ? blocks : 1, INDEX_THREADS, bytes, stream);
}
