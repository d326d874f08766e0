/**
 * The kernels once more, naively: what the host and device kernels are compared with.
 *
 * Each takes the same arguments as kvp_host_X and does what kvp_kernels.h says, one token, head and byte at a time,
 * from the header's words alone: it shares no code with kernels/. fp8 is done in double precision from the list of all
 * values that the format has. All pointers are host memory; single thread; slow on purpose.
 */
#ifndef KERNEL_REFERENCE_H
#define KERNEL_REFERENCE_H

#include "kvp_kernels.h"

void reference_append(const struct kvp_append_args *args);
void reference_quant_append(const struct kvp_quant_append_args *args);
void reference_gather(const struct kvp_gather_args *args);
void reference_index(const struct kvp_index_args *args);
void reference_progress(const struct kvp_progress_args *args);
void reference_page_copy(const struct kvp_page_copy_args *args);
void reference_page_gather(const struct kvp_page_flat_args *args);
void reference_page_scatter(const struct kvp_page_flat_args *args);
void reference_page_zero(const struct kvp_page_zero_args *args);
void reference_page_digest(const struct kvp_page_digest_args *args);

/** The fp8 code of `value`: to nearest, ties to the even code, saturating; a NaN is 0x7f with no sign. */
uint8_t reference_fp8(double value, uint32_t dtype);

/** The value of an fp8 code, infinities and NaN of E5M2 included. */
double reference_fp8_value(uint8_t code, uint32_t dtype);

/** The value of one element of F32, F16 or BF16. */
double reference_wide_value(const void *element, uint32_t dtype);

#endif
