/**
 * Rows of elements to fp8 and back: see rows.h.
 *
 * Each loop is written once, as a macro over a target, and compiled for each of the widths of widths.h.
 */
#include "rows.h"

#include "../kvp_layout.h"
#include "convert.h"
#include "widths.h"

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

#define QUANTISE(target, name, wide, fp8)                                                                              \
    target static void name(uint8_t *restrict to, const void *restrict from, uint64_t n, float scale)                  \
    {                                                                                                                  \
        for (uint64_t i = 0; i < n; i++)                                                                               \
            to[i] = kvp_##fp8##_of_float(load_##wide(from, i) / scale);                                                \
    }

#define DEQUANTISE(target, name, wide, fp8)                                                                            \
    target static void name(void *restrict to, const uint8_t *restrict from, uint64_t n, float scale)                  \
    {                                                                                                                  \
        for (uint64_t i = 0; i < n; i++)                                                                               \
            store_##wide(to, i, kvp_float_of_##fp8(from[i]) * scale);                                                  \
    }

/* The order of magnitudes is the order of their bits. */
#define AMAX(target, name, wide)                                                                                       \
    target static float name(const void *restrict from, uint64_t n)                                                    \
    {                                                                                                                  \
        int32_t largest = 0;                                                                                           \
        for (uint64_t i = 0; i < n; i++) {                                                                             \
            int32_t bits = (int32_t)(kvp_bits_of_float(load_##wide(from, i)) & 0x7fffffff);                            \
            int32_t finite = bits < 0x7f7fffff ? bits : 0x7f7fffff;                                                    \
            int32_t counted = finite & -(int32_t)(bits <= 0x7f800000);                                                 \
            largest = counted > largest ? counted : largest;                                                           \
        }                                                                                                              \
        return kvp_float_of_bits((uint32_t)largest);                                                                   \
    }

#define ROWS_AT(target, width, wide)                                                                                   \
    QUANTISE(target, quantise_##wide##_e4m3_##width, wide, e4m3)                                                       \
    QUANTISE(target, quantise_##wide##_e5m2_##width, wide, e5m2)                                                       \
    DEQUANTISE(target, dequantise_##wide##_e4m3_##width, wide, e4m3)                                                   \
    DEQUANTISE(target, dequantise_##wide##_e5m2_##width, wide, e5m2)                                                   \
    AMAX(target, amax_##wide##_##width, wide)
#define ROWS_OF(wide)                                                                                                  \
    ROWS_AT(KVP_PLAIN, plain, wide)                                                                                    \
    ROWS_AT(KVP_AVX2, avx2, wide)                                                                                      \
    ROWS_AT(KVP_AVX512, avx512, wide)

ROWS_OF(f32)
ROWS_OF(f16)
ROWS_OF(bf16)

/* clang-format off */
#define WIDTHS(name) {name##_plain, name##_avx2, name##_avx512}
#define BY_FP8(name) {WIDTHS(name##_e4m3), WIDTHS(name##_e5m2)}
/* clang-format on */

/* [wide dtype][fp8 dtype][width] */
static const kvp_quantise_row quantise_rows[3][2][KVP_WIDTHS] = {
    BY_FP8(quantise_f32),
    BY_FP8(quantise_f16),
    BY_FP8(quantise_bf16),
};
static const kvp_dequantise_row dequantise_rows[3][2][KVP_WIDTHS] = {
    BY_FP8(dequantise_f32),
    BY_FP8(dequantise_f16),
    BY_FP8(dequantise_bf16),
};
static const kvp_amax_row amax_rows[3][KVP_WIDTHS] = {
    WIDTHS(amax_f32),
    WIDTHS(amax_f16),
    WIDTHS(amax_bf16),
};

kvp_quantise_row kvp_quantise_row_for(uint32_t wide, uint32_t fp8)
{
    return quantise_rows[wide - KVP_DTYPE_F32][fp8 - KVP_DTYPE_FP8_E4M3][kvp_cpu_width()];
}

kvp_amax_row kvp_amax_row_for(uint32_t wide)
{
    return amax_rows[wide - KVP_DTYPE_F32][kvp_cpu_width()];
}

kvp_dequantise_row kvp_dequantise_row_for(uint32_t wide, uint32_t fp8)
{
    return dequantise_rows[wide - KVP_DTYPE_F32][fp8 - KVP_DTYPE_FP8_E4M3][kvp_cpu_width()];
}
