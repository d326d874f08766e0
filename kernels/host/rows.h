/**
 * The inner loops of quantising append and dequantising gather: one row of elements at a time.
 *
 * Chosen once a call by data type and by what the CPU has; a row is dense on both sides and has one scale.
 */
#ifndef KVP_HOST_ROWS_H
#define KVP_HOST_ROWS_H

#include <stdint.h>

/** Store n elements of `from`, each divided by `scale`, as fp8 at `to`. */
typedef void (*kvp_quantise_row)(uint8_t *to, const void *from, uint64_t n, float scale);

/** The largest magnitude of n elements: NaN counts as 0, infinity as FLT_MAX. */
typedef float (*kvp_amax_row)(const void *from, uint64_t n);

/** Store n fp8 elements of `from`, each multiplied by `scale`, at `to`. */
typedef void (*kvp_dequantise_row)(void *to, const uint8_t *from, uint64_t n, float scale);

/* `wide` is KVP_DTYPE_F32, _F16 or _BF16; `fp8` KVP_DTYPE_FP8_E4M3 or _E5M2: the caller has checked. */
kvp_quantise_row kvp_quantise_row_for(uint32_t wide, uint32_t fp8);
kvp_amax_row kvp_amax_row_for(uint32_t wide);
kvp_dequantise_row kvp_dequantise_row_for(uint32_t wide, uint32_t fp8);

#endif
