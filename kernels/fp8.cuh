/**
 * Between wide floats and fp8, sixteen or one at a time: the arithmetic of struct kvp_quant_append_args and
 * struct kvp_gather_args.
 *
 * The division is IEEE's, but not at IEEE's price. With y = RN(1 / s), q = RN(x · y) is within two units in the last
 * place of x / s; a step q ← RN(q − y · (q · s − x)), the remainder exact by fma, brings it within one, and a second
 * one makes it the correctly rounded quotient (Markstein 1990): five operations instead of some twenty. It needs that
 * nothing overflows: where a scale lies outside [2^-64, 2^64], or a quotient of the pack is not below 2^20 (infinities
 * and NaN among them), the pack is divided plainly. A quotient so small that its remainder underflows is far below half
 * of the smallest fp8 number; the remainder's sign is such that −0 stays −0.
 */
#ifndef KVP_FP8_CUH
#define KVP_FP8_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <float.h>
#include <string.h>
#include <type_traits>

#include "host/convert.h"
#include "mover.cuh"

/* N values of type T as they lie in memory: one, or whole 16-byte vectors, which stay in registers as such. */
template <typename T, int N> struct pack {
    uint4 vector[N * sizeof(T) / 16];
};
template <typename T> struct pack<T, 1> {
    T value;
};

template <typename T, int N> __device__ __forceinline__ pack<T, N> load_pack(const char *at)
{
    pack<T, N> result;

    if constexpr (N == 1) {
        result.value = *reinterpret_cast<const T *>(at);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < sizeof(result) / 16; i++)
            result.vector[i] = load_once<uint4>(at + 16 * i);
    }
    return result;
}

template <typename T, int N> __device__ __forceinline__ void store_pack(char *at, const pack<T, N> &value)
{
    if constexpr (N == 1) {
        *reinterpret_cast<T *>(at) = value.value;
    } else {
#pragma unroll
        for (uint32_t i = 0; i < sizeof(value) / 16; i++)
            store<uint4>(at + 16 * i, value.vector[i]);
    }
}

/* The 32-bit word i of a pack. */
template <typename T, int N> __device__ __forceinline__ uint32_t word_of(const pack<T, N> &x, int i)
{
    const uint4 &v = x.vector[i / 4];

    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
}

template <typename T, int N> __device__ __forceinline__ void set_word(pack<T, N> *x, int i, uint32_t word)
{
    uint4 &v = x->vector[i / 4];

    (i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w) = word;
}

__device__ __forceinline__ float half_to_float(uint32_t bits)
{
    return __half2float(__ushort_as_half((unsigned short)bits));
}

/* Value i of a pack; i is known when it is compiled. */
template <typename T, int N> __device__ __forceinline__ float value_of(const pack<T, N> &x, int i)
{
    if constexpr (N == 1 && sizeof(T) == 4)
        return x.value;
    else if constexpr (N == 1)
        return static_cast<float>(x.value);
    else if constexpr (sizeof(T) == 4)
        return __uint_as_float(word_of(x, i));
    else if constexpr (std::is_same<T, __half>::value)
        return half_to_float(word_of(x, i / 2) >> (i % 2 * 16));
    else
        return __uint_as_float(i % 2 ? word_of(x, i / 2) & 0xffff0000u : word_of(x, i / 2) << 16);
}

/* The bits of x in type T, rounded to nearest even. */
template <typename T> __device__ __forceinline__ uint32_t bits_from_float(float x)
{
    if constexpr (sizeof(T) == 4)
        return __float_as_uint(x);
    else if constexpr (std::is_same<T, __half>::value)
        return __half_as_ushort(__float2half_rn(x));
    else
        return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__device__ __forceinline__ uint8_t to_fp8(float x, bool e5m2)
{
#if __CUDA_ARCH__ >= 890
    if (x != x)
        return 0x7f;
    return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, e5m2 ? __NV_E5M2 : __NV_E4M3);
#else
    /* there is no instruction: the toolkit's code goes by doubles, several times as long as the host's */
    return e5m2 ? kvp_e5m2_of_float(x) : kvp_e4m3_of_float(x);
#endif
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

/* N quotients as fp8. */
template <int N> __device__ __forceinline__ pack<uint8_t, N> pack_fp8(const float (&q)[N], bool e5m2)
{
    pack<uint8_t, N> out;

#pragma unroll
    for (int i = 0; i < N / 4; i++)
        set_word(&out, i,
                 to_fp8_pair(q[4 * i], q[4 * i + 1], e5m2) | (uint32_t)to_fp8_pair(q[4 * i + 2], q[4 * i + 3], e5m2)
                                                                 << 16);
    return out;
}

template <typename S, int N>
__device__ __forceinline__ pack<uint8_t, N> quantise(const pack<S, N> &x, float scale, bool e5m2)
{
    if constexpr (N == 1) {
        return {to_fp8(__fdiv_rn(value_of(x, 0), scale), e5m2)};
    } else {
        float q[N], inverse = __frcp_rn(scale), largest = scale >= 0x1p-64f && scale <= 0x1p64f ? 0 : INFINITY;

#pragma unroll
        for (int i = 0; i < N; i++) {
            float value = value_of(x, i);

            q[i] = value * inverse;
            asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(largest), "f"(fabsf(q[i])));
            q[i] = fmaf(-fmaf(q[i], scale, -value), inverse, q[i]);
            q[i] = fmaf(-fmaf(q[i], scale, -value), inverse, q[i]);
        }
        if (!(largest < 0x1p20f)) {
#pragma unroll
            for (int i = 0; i < N; i++)
                q[i] = __fdiv_rn(value_of(x, i), scale);
        }
        /* the choice of format is the same for a whole launch: two loops, not a choice in each step */
        return e5m2 ? pack_fp8<N>(q, true) : pack_fp8<N>(q, false);
    }
}

template <typename T, int N>
__device__ __forceinline__ pack<T, N> dequantise(const pack<uint8_t, N> &x, float scale, bool e5m2)
{
    const __nv_fp8_interpretation_t format = e5m2 ? __NV_E5M2 : __NV_E4M3;
    pack<T, N> out;

    if constexpr (N == 1) {
        uint32_t bits = bits_from_float<T>(__half2float(__half(__nv_cvt_fp8_to_halfraw(x.value, format))) * scale);

        memcpy(&out, &bits, sizeof(out));
    } else {
        constexpr int PER_WORD = 4 / sizeof(T);
#pragma unroll
        for (int w = 0; w < N / PER_WORD; w++) {
            uint32_t word = 0;

#pragma unroll
            for (int k = 0; k < PER_WORD; k++) {
                int i = w * PER_WORD + k;
                uint32_t code = word_of(x, i / 4) >> (i % 4 * 8) & 0xff;
                __half half = __half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, format));

                word |= bits_from_float<T>(__half2float(half) * scale) << (k * 16);
            }
            set_word(&out, w, word);
        }
    }
    return out;
}

#endif
