/**
 * The device's half of the case matrix: kernels_matrix_cuda.c where the toolkit is, kernels_matrix_none.c elsewhere.
 */
#ifndef KERNELS_MATRIX_H
#define KERNELS_MATRIX_H

#include <stddef.h>

#include "kernel_cases.h"

/* A test that only a GPU can run: 0 passed, 1 skipped, −1 failed; the reason in `why`. */
struct device_test {
    const char *name;
    int (*run)(char *why, size_t why_bytes);
};

#define DEVICE_TESTS 3
extern const struct device_test device_tests[DEVICE_TESTS];

/** Take the GPU into use: NULL, or why there is none. */
const char *device_open(void);
void device_close(void);

/** Run a case on the GPU, in a copy of its bytes there, and bring the bytes to `ret_bytes`; `why` on failure. */
enum kvp_status device_run_case(const struct kernel_case *original, unsigned char *ret_bytes, char *why,
                                size_t why_bytes);

#endif
