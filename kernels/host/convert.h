/**
 * Element conversions of the host kernels: fp16, bf16, fp32 to fp8 and back, in code that the compiler vectorises.
 *
 * No branch and no table: every case (subnormal, normal, over the range, NaN) is computed and selected. The rounding
 * is to nearest even in the integer domain for normal numbers, and by the float adder (a magic addend whose last place
 * is the format's smallest step) for subnormal ones. It assumes the default rounding mode and no flush to zero.
 *
 *   format  exponent  mantissa  largest   smallest step  NaN
 *   e4m3    4, bias 7   3       448       2^-9           0x7f
 *   e5m2    5, bias 15  2       57344     2^-16          0x7f
 *
 * To fp8, what is over the largest finite number, infinities included, becomes it with its sign; any NaN becomes
 * the positive one of all ones, as a GPU makes it.
 */
#ifndef KVP_HOST_CONVERT_H
#define KVP_HOST_CONVERT_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KVP_INLINE __host__ __device__ __forceinline__
#else
#define KVP_INLINE static inline __attribute__((always_inline))
#endif

KVP_INLINE float kvp_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

KVP_INLINE uint32_t kvp_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/*
 * A small float's magnitude, its mantissa moved to the top of a float's, to that float. `least` is its smallest normal
 * number; a subnormal one is added to it in the integer domain and it taken off in the float domain, which is exact.
 * (A product with a power of two would do both at once, but subnormal floats cost an x86 CPU some 150 cycles.)
 */
KVP_INLINE float kvp_widen(uint32_t shifted, uint32_t rebias, float least)
{
    float normal = kvp_float_of_bits(shifted + (rebias << 23));
    float subnormal = kvp_float_of_bits(shifted + kvp_bits_of_float(least)) - least;
    return shifted < 1u << 23 ? subnormal : normal;
}

KVP_INLINE float kvp_float_of_half(uint16_t half)
{
    uint32_t magnitude = half & 0x7fff;
    uint32_t bits = kvp_bits_of_float(kvp_widen(magnitude << 13, 112, 0x1p-14f));
    bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0;
    return kvp_float_of_bits(bits | (uint32_t)(half & 0x8000) << 16);
}

KVP_INLINE float kvp_float_of_bfloat(uint16_t value)
{
    return kvp_float_of_bits((uint32_t)value << 16);
}

/* `drop` mantissa bits fall off; `rebias` is 127 minus the format's bias. */
KVP_INLINE uint8_t kvp_fp8_of_float(float value, int drop, uint32_t rebias, float largest, float least_normal,
                                    float magic)
{
    uint32_t bits = kvp_bits_of_float(value);
    uint32_t sign = bits >> 24 & 0x80;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t nan = magnitude > 0x7f800000u;
    uint32_t top = kvp_bits_of_float(largest);
    uint32_t capped = magnitude > top ? top : magnitude;
    uint32_t normal = (capped + ((1u << (drop - 1)) - 1) + (capped >> drop & 1)) >> drop;
    normal -= rebias << (23 - drop);
    uint32_t subnormal = kvp_bits_of_float(kvp_float_of_bits(capped) + magic) - kvp_bits_of_float(magic);
    uint32_t result = capped < kvp_bits_of_float(least_normal) ? subnormal : normal;
    return (uint8_t)(nan ? 0x7f : result | sign);
}

KVP_INLINE uint8_t kvp_e4m3_of_float(float value)
{
    return kvp_fp8_of_float(value, 20, 120, 448.0f, 0x1p-6f, 0x1p14f);
}

KVP_INLINE uint8_t kvp_e5m2_of_float(float value)
{
    return kvp_fp8_of_float(value, 21, 112, 57344.0f, 0x1p-14f, 0x1p7f);
}

/* ---- the way back ------------------------------------------------------------------------------------------------ */

KVP_INLINE float kvp_float_of_e4m3(uint8_t value)
{
    uint32_t magnitude = value & 0x7f;
    uint32_t bits = kvp_bits_of_float(kvp_widen(magnitude << 20, 120, 0x1p-6f));
    bits = magnitude == 0x7f ? 0x7fffffffu : bits;
    return kvp_float_of_bits(bits | (uint32_t)(value & 0x80) << 24);
}

KVP_INLINE float kvp_float_of_e5m2(uint8_t value)
{
    return kvp_float_of_half((uint16_t)(value << 8));
}

KVP_INLINE float kvp_canonical_nan(float value)
{
    return value != value ? kvp_float_of_bits(0x7fffffffu) : value;
}

/* As above, with infinities in place of saturation. */
KVP_INLINE uint16_t kvp_half_of_float(float value)
{
    uint32_t bits = kvp_bits_of_float(value);
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t top = kvp_bits_of_float(65536.0f);
    uint32_t capped = magnitude > top ? top : magnitude;
    uint32_t normal = ((capped + 0xfff + (capped >> 13 & 1)) >> 13) - (112u << 10);
    uint32_t subnormal = kvp_bits_of_float(kvp_float_of_bits(capped) + 0.5f) - kvp_bits_of_float(0.5f);
    uint32_t result = capped < kvp_bits_of_float(0x1p-14f) ? subnormal : normal;
    return (uint16_t)(magnitude > 0x7f800000u ? 0x7fff : result | (bits >> 16 & 0x8000));
}

KVP_INLINE uint16_t kvp_bfloat_of_float(float value)
{
    uint32_t bits = kvp_bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? 0x7fff : rounded);
}

#endif
