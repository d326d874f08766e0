/**
 * What the CUDA kernels share: division by a number known at launch, vector types, the error ring, the launch itself.
 *
 * private to the .cu files here. Device functions assume arguments that kvp_check.h let pass.
 */
#ifndef KVP_DEVICE_CUH
#define KVP_DEVICE_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#include "kvp_check.h"

#define KVP_BLOCK_THREADS 256
#define KVP_SMALL_GRID    128 /* blocks: at most about one a multiprocessor */

/*
 * n / divisor for n < 2^31 by a multiplication (Granlund and Montgomery 1994): multiplier = ⌈2^(31 + l) / divisor⌉ with
 * l = ⌈log2 divisor⌉, and the quotient is the high word shifted by l − 1. A divisor of 1 has multiplier 0.
 */
struct fast_div {
    uint32_t divisor;
    uint32_t multiplier;
    uint32_t shift;
};

static inline struct fast_div fast_div_of(uint32_t divisor)
{
    struct fast_div d = {divisor, 0, 0};
    uint32_t log2 = 0;

    if (divisor <= 1)
        return d;
    while ((1ull << log2) < divisor)
        log2++;
    d.multiplier = (uint32_t)(((1ull << (31 + log2)) + divisor - 1) / divisor);
    d.shift = log2 - 1;
    return d;
}

__device__ __forceinline__ uint32_t quotient(uint32_t n, const struct fast_div &d)
{
    return d.multiplier ? __umulhi(n, d.multiplier) >> d.shift : n;
}

/* The unsigned type of a vector of BYTES bytes. */
template <int BYTES> struct vector_of;
template <> struct vector_of<16> {
    using type = uint4;
};
template <> struct vector_of<8> {
    using type = uint2;
};
template <> struct vector_of<4> {
    using type = uint32_t;
};
template <> struct vector_of<2> {
    using type = uint16_t;
};
template <> struct vector_of<1> {
    using type = uint8_t;
};

/* Entry i of an index array of 32- or 64-bit integers. */
__device__ __forceinline__ int64_t load_index(const void *array, int64_t i, bool wide)
{
    return wide ? static_cast<const int64_t *>(array)[i] : static_cast<const int32_t *>(array)[i];
}

__device__ __forceinline__ void report(struct kvp_error_ring *ring, uint32_t kind, int64_t token, int64_t value)
{
    unsigned long long at;

    if (!ring)
        return;
    at = atomicAdd(reinterpret_cast<unsigned long long *>(&ring->count), 1ull);
    if (at < ring->capacity) {
        ring->records[at].kind = kind;
        ring->records[at].reserved = 0;
        ring->records[at].token = token;
        ring->records[at].value = value;
    }
}

/* The widest vector of 1, 2, 4, 8 or 16 bytes that divides everything or-ed into `bits`. */
static inline uint32_t widest_vector(uint64_t bits)
{
    uint32_t width = 16;

    while (bits % width)
        width /= 2;
    return width;
}

/* What has to be divisible by the vector width for a plane to be moved in vectors. */
static inline uint64_t plane_alignment_bits(const struct kvp_plane_view *plane)
{
    return (uint64_t)(uintptr_t)plane->base | (uint64_t)plane->page_stride | (uint64_t)plane->token_stride |
           (plane->heads > 1 ? (uint64_t)plane->head_stride : 0) | (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
}

/* Enqueue; the launch's own error, and nothing older, decides. */
template <typename P>
static inline enum kvp_status launch(void (*kernel)(P), const P &params, uint32_t blocks, uint32_t threads,
                                     size_t shared_bytes, void *stream)
{
    void *arguments[] = {const_cast<P *>(&params)};

    if (cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(blocks), dim3(threads), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream)) != cudaSuccess) {
        (void)cudaGetLastError(); /* so that the caller's next check does not find it */
        return KVP_EDEVICE;
    }
    return KVP_OK;
}

/*
 * The same with programmatic dependent launch, where the device knows it: the blocks may start, and compute what needs
 * no memory, while the kernel before them in the stream ends. Such a kernel calls wait_for_stream() in every thread
 * before it touches memory.
 */
template <typename P>
static inline enum kvp_status launch_early(void (*kernel)(P), const P &params, uint32_t blocks, uint32_t threads,
                                           size_t shared_bytes, void *stream)
{
    void *arguments[] = {const_cast<P *>(&params)};
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    int device, major = 0;

    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return KVP_EDEVICE;
    }
    if (major < 9)
        return launch(kernel, params, blocks, threads, shared_bytes, stream);
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), arguments) != cudaSuccess) {
        (void)cudaGetLastError();
        return KVP_EDEVICE;
    }
    return KVP_OK;
}

/*
 * Until everything before this kernel in its stream is done and visible. A small grid then lets the next kernel's
 * blocks come and wait; a large one does not, since they would settle where its first blocks end, unevenly.
 */
__device__ __forceinline__ void wait_for_stream(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (gridDim.x <= KVP_SMALL_GRID)
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
