/**
 * Rows of elements to fp8 and back: see rows.h.
 *
 * Each loop is written once, as an inline function, and compiled for the plain instruction set and, on x86-64, for AVX2
 * too. Which of the two runs is asked of the CPU when the loop is chosen.
 */
#include "rows.h"

#include "../kvp_layout.h"
#include "convert.h"

#if defined(__x86_64__)
#define WIDE_TARGET __attribute__((target("avx2")))
#define HAVE_WIDE() __builtin_cpu_supports("avx2")
#else
#define WIDE_TARGET
#define HAVE_WIDE() 0
#endif

KVP_INLINE float load_f32(const void *row, uint64_t i)
{
    return ((const float *)row)[i];
}

KVP_INLINE float load_f16(const void *row, uint64_t i)
{
    return kvp_float_of_half(((const uint16_t *)row)[i]);
}

KVP_INLINE float load_bf16(const void *row, uint64_t i)
{
    return kvp_float_of_bfloat(((const uint16_t *)row)[i]);
}

KVP_INLINE void store_f32(void *row, uint64_t i, float value)
{
    ((float *)row)[i] = kvp_canonical_nan(value);
}

KVP_INLINE void store_f16(void *row, uint64_t i, float value)
{
    ((uint16_t *)row)[i] = kvp_half_of_float(value);
}

KVP_INLINE void store_bf16(void *row, uint64_t i, float value)
{
    ((uint16_t *)row)[i] = kvp_bfloat_of_float(value);
}

#define QUANTISE(target, name, wide, fp8)                                                        \
    target static void name(uint8_t *restrict to, const void *restrict from, uint64_t n, float scale) \
    {                                                                                            \
        for (uint64_t i = 0; i < n; i++)                                                         \
            to[i] = kvp_##fp8##_of_float(load_##wide(from, i) / scale);                          \
    }

#define DEQUANTISE(target, name, wide, fp8)                                                      \
    target static void name(void *restrict to, const uint8_t *restrict from, uint64_t n, float scale) \
    {                                                                                            \
        for (uint64_t i = 0; i < n; i++)                                                         \
            store_##wide(to, i, kvp_float_of_##fp8(from[i]) * scale);                            \
    }

/* The order of magnitudes is the order of their bits. */
#define AMAX(target, name, wide)                                                   \
    target static float name(const void *restrict from, uint64_t n)                \
    {                                                                              \
        uint32_t largest = 0;                                                      \
        for (uint64_t i = 0; i < n; i++) {                                         \
            uint32_t bits = kvp_bits_of_float(load_##wide(from, i)) & 0x7fffffff;  \
            uint32_t finite = bits < 0x7f7fffffu ? bits : 0x7f7fffffu;             \
            uint32_t counted = bits > 0x7f800000u ? 0 : finite;                    \
            largest = counted > largest ? counted : largest;                       \
        }                                                                          \
        return kvp_float_of_bits(largest);                                         \
    }

#define ROWS_OF(wide)                                                   \
    QUANTISE(, quantise_##wide##_e4m3, wide, e4m3)                      \
    QUANTISE(, quantise_##wide##_e5m2, wide, e5m2)                      \
    QUANTISE(WIDE_TARGET, quantise_##wide##_e4m3_wide, wide, e4m3)      \
    QUANTISE(WIDE_TARGET, quantise_##wide##_e5m2_wide, wide, e5m2)      \
    DEQUANTISE(, dequantise_##wide##_e4m3, wide, e4m3)                  \
    DEQUANTISE(, dequantise_##wide##_e5m2, wide, e5m2)                  \
    DEQUANTISE(WIDE_TARGET, dequantise_##wide##_e4m3_wide, wide, e4m3)  \
    DEQUANTISE(WIDE_TARGET, dequantise_##wide##_e5m2_wide, wide, e5m2)  \
    AMAX(, amax_##wide, wide)                                           \
    AMAX(WIDE_TARGET, amax_##wide##_wide, wide)

ROWS_OF(f32)
ROWS_OF(f16)
ROWS_OF(bf16)

/* [wide dtype][fp8 dtype][has AVX2] */
#define BOTH_WIDTHS(name)            \
    {                                \
        name, name##_wide            \
    }
#define BY_FP8(name)                                          \
    {                                                         \
        BOTH_WIDTHS(name##_e4m3), BOTH_WIDTHS(name##_e5m2)    \
    }
static const kvp_quantise_row quantise_rows[3][2][2] = {
    BY_FP8(quantise_f32),
    BY_FP8(quantise_f16),
    BY_FP8(quantise_bf16),
};
static const kvp_dequantise_row dequantise_rows[3][2][2] = {
    BY_FP8(dequantise_f32),
    BY_FP8(dequantise_f16),
    BY_FP8(dequantise_bf16),
};
static const kvp_amax_row amax_rows[3][2] = {
    BOTH_WIDTHS(amax_f32),
    BOTH_WIDTHS(amax_f16),
    BOTH_WIDTHS(amax_bf16),
};

kvp_quantise_row kvp_quantise_row_for(uint32_t wide, uint32_t fp8)
{
    return quantise_rows[wide - KVP_DTYPE_F32][fp8 - KVP_DTYPE_FP8_E4M3][HAVE_WIDE() != 0];
}

kvp_amax_row kvp_amax_row_for(uint32_t wide)
{
    return amax_rows[wide - KVP_DTYPE_F32][HAVE_WIDE() != 0];
}

kvp_dequantise_row kvp_dequantise_row_for(uint32_t wide, uint32_t fp8)
{
    return dequantise_rows[wide - KVP_DTYPE_F32][fp8 - KVP_DTYPE_FP8_E4M3][HAVE_WIDE() != 0];
}
