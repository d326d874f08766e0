/* The GPU's part of work.h: the current device's, by the runtime. */
#include "work.h"

#include <cuda_runtime.h>

#define THREADS         256
#define SCRIBBLE_BLOCKS 32

static cudaStream_t stream, other; /* what is scribbled has a stream of its own */
static cudaError_t last = cudaSuccess;

static bool ok(cudaError_t result)
{
    if (result != cudaSuccess)
        last = result;
    return result == cudaSuccess;
}

static bool open_streams(void)
{
    return stream != nullptr || (ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) &&
                                 ok(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking)));
}

__device__ __forceinline__ unsigned long long mix(unsigned long long x)
{
    return KVP_WORK_MIX(x);
}

__global__ void fill_kernel(unsigned long long *words, uint64_t n, uint64_t salt)
{
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
        words[i] = mix(salt + i);
}

/* A block a page. */
__global__ void sum_kernel(const unsigned char *base, uint64_t stride, uint64_t words, const int32_t *pages,
                           unsigned long long *sum)
{
    const unsigned long long *at =
        reinterpret_cast<const unsigned long long *>(base + (uint64_t)pages[blockIdx.x] * stride);
    unsigned long long own = 0;

    for (uint64_t i = threadIdx.x; i < words; i += blockDim.x)
        own += mix(at[i] + blockIdx.x * words * 8 + i);
    atomicAdd(sum, own);
}

__global__ void scribble_kernel(volatile unsigned long long *words, uint64_t n, unsigned long long ns)
{
    unsigned long long from, now, value = 0;

    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(from));
    do {
        value++;
        for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
            words[i] = value;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - from < ns);
}

static void *cuda_alloc(uint64_t bytes)
{
    void *at = nullptr;

    return open_streams() && ok(cudaMalloc(&at, bytes)) ? at : nullptr;
}

static void *cuda_stream(void)
{
    open_streams();
    return stream;
}

static bool cuda_fill(void *at, uint64_t bytes, uint64_t salt)
{
    if (!open_streams())
        return false;
    fill_kernel<<<1024, THREADS, 0, stream>>>(static_cast<unsigned long long *>(at), bytes / 8, salt);
    return ok(cudaGetLastError());
}

static bool cuda_sum(const void *base, uint64_t stride, uint64_t bytes, const int32_t *pages, uint32_t n,
                     uint64_t *ret_sum)
{
    static int32_t *ids;
    static unsigned long long *sum;
    static uint32_t room;
    unsigned long long result = 0;

    if (!open_streams())
        return false;
    if (n > room) {
        if (!ok(cudaMalloc(&ids, n * sizeof(*ids))) || (sum == nullptr && !ok(cudaMalloc(&sum, sizeof(*sum)))))
            return false;
        room = n;
    }
    if (!ok(cudaMemcpyAsync(ids, pages, n * sizeof(*ids), cudaMemcpyHostToDevice, stream)) ||
        !ok(cudaMemsetAsync(sum, 0, sizeof(*sum), stream)))
        return false;
    sum_kernel<<<n, THREADS, 0, stream>>>(static_cast<const unsigned char *>(base), stride, bytes / 8, ids, sum);
    if (!ok(cudaGetLastError()) || !ok(cudaMemcpyAsync(&result, sum, sizeof(result), cudaMemcpyDeviceToHost, stream)) ||
        !ok(cudaStreamSynchronize(stream)))
        return false;
    *ret_sum = result;
    return true;
}

static bool cuda_read(void *ret_host, const void *at, uint64_t bytes)
{
    return open_streams() && ok(cudaMemcpyAsync(ret_host, at, bytes, cudaMemcpyDeviceToHost, stream)) &&
           ok(cudaStreamSynchronize(stream));
}

static bool cuda_scribble(void *at, uint64_t bytes, double seconds)
{
    unsigned long long before, now;

    if (!cuda_read(&before, at, sizeof(before)))
        return false;
    scribble_kernel<<<SCRIBBLE_BLOCKS, THREADS, 0, other>>>(static_cast<unsigned long long *>(at), bytes / 8,
                                                            (unsigned long long)(seconds * 1e9));
    if (!ok(cudaGetLastError()))
        return false;
    do {
        if (!cuda_read(&now, at, sizeof(now)))
            return false;
    } while (now == before && cudaStreamQuery(other) == cudaErrorNotReady);
    return true;
}

static bool cuda_sync(void)
{
    return open_streams() && ok(cudaStreamSynchronize(stream));
}

static const char *cuda_error(void)
{
    return cudaGetErrorString(last);
}

extern "C" const struct work work_cuda = {cuda_alloc,    cuda_stream, cuda_fill, cuda_sum,
                                          cuda_scribble, cuda_read,   cuda_sync, cuda_error};
