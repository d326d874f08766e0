/**
 * Between wide floats and fp8, sixteen or one at a time: the arithmetic of struct kvp_quant_append_args and
 * struct kvp_gather_args.
 *
 * The division is IEEE's, but not at IEEE's price. With y = RN(1 / s), q0 = RN(x · y) is within two units in the last
 * place of x / s; one step q ← RN(q + y · (x − q · s)), the remainder exact by fma, brings it within one, and a second
 * one makes it the correctly rounded quotient (Markstein 1990): five operations instead of some twenty. It needs that
 * nothing over- or underflows: so a scale must lie in [2^-64, 2^64], else the plain division is taken, and |x| is first
 * cut at s · 2^20, whose quotient saturates like any larger one. A quotient so small that its remainder underflows is
 * far below half of the smallest fp8 number. The sign is put back at the end, since −0 loses it.
 */
#ifndef KVP_FP8_CUH
#define KVP_FP8_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <float.h>

#include "mover.cuh"

/* N values of type T as they lie in memory, read or written in the widest accesses */
template <typename T, int N> struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) pack {
    T value[N];
};

template <typename P> __device__ __forceinline__ P load_pack(const char *at)
{
    P result;

    if constexpr (sizeof(P) >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < sizeof(P) / 16; i++)
            reinterpret_cast<uint4 *>(&result)[i] = load_once<uint4>(at + 16 * i);
    } else {
        result = *reinterpret_cast<const P *>(at);
    }
    return result;
}

template <typename P> __device__ __forceinline__ void store_pack(char *at, const P &value)
{
    if constexpr (sizeof(P) >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < sizeof(P) / 16; i++)
            store<uint4>(at + 16 * i, reinterpret_cast<const uint4 *>(&value)[i]);
    } else {
        *reinterpret_cast<P *>(at) = value;
    }
}

__device__ __forceinline__ float to_float(float x)
{
    return x;
}
__device__ __forceinline__ float to_float(__half x)
{
    return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ __half from_float<__half>(float x)
{
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* A scale, ready to divide by. */
struct divisor {
    float scale, inverse, limit;
    bool plain; /* out of the fast division's range */
};

__device__ __forceinline__ struct divisor divisor_of(float scale)
{
    struct divisor d = {scale, 0, 0, true};

    if (scale >= 0x1p-64f && scale <= 0x1p64f)
        d = {scale, __frcp_rn(scale), scale * 0x1p20f, false};
    return d;
}

__device__ __forceinline__ float divide(float x, const struct divisor &d)
{
    float cut, q;

    if (d.plain)
        return __fdiv_rn(x, d.scale);
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(cut) : "f"(x), "f"(d.limit));
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(cut) : "f"(cut), "f"(-d.limit));
    q = cut * d.inverse;
    q = fmaf(fmaf(-q, d.scale, cut), d.inverse, q);
    q = fmaf(fmaf(-q, d.scale, cut), d.inverse, q);
    return copysignf(q, x);
}

__device__ __forceinline__ uint8_t to_fp8(float x, bool e5m2)
{
    if (x != x)
        return 0x7f;
    return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, e5m2 ? __NV_E5M2 : __NV_E4M3);
}

__device__ __forceinline__ uint16_t to_fp8_pair(float low, float high, bool e5m2)
{
#if __CUDA_ARCH__ >= 890
    /* the instruction makes 0x7F of any NaN */
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, e5m2 ? __NV_E5M2 : __NV_E4M3);
#else
    return (uint16_t)(to_fp8(low, e5m2) | to_fp8(high, e5m2) << 8);
#endif
}

template <typename S, int N>
__device__ __forceinline__ pack<uint8_t, N> quantise(const pack<S, N> &x, const struct divisor &d, bool e5m2)
{
    pack<uint8_t, N> out;

    if constexpr (N == 1) {
        out.value[0] = to_fp8(divide(to_float(x.value[0]), d), e5m2);
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            uint16_t pair =
                to_fp8_pair(divide(to_float(x.value[2 * i]), d), divide(to_float(x.value[2 * i + 1]), d), e5m2);

            out.value[2 * i] = (uint8_t)pair;
            out.value[2 * i + 1] = (uint8_t)(pair >> 8);
        }
    }
    return out;
}

template <typename T, int N>
__device__ __forceinline__ pack<T, N> dequantise(const pack<uint8_t, N> &x, float scale, bool e5m2)
{
    pack<T, N> out;

#pragma unroll
    for (int i = 0; i < N; i++) {
        __half h = __half(__nv_cvt_fp8_to_halfraw(x.value[i], e5m2 ? __NV_E5M2 : __NV_E4M3));

        out.value[i] = from_float<T>(__half2float(h) * scale);
    }
    return out;
}

#endif
