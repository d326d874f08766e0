/**
 * The device's half of the case matrix in a build without CUDA: it names what it does not run.
 */
#include "kernels_matrix.h"

static int never(char *why, size_t why_bytes)
{
    (void)why;
    (void)why_bytes;
    return -1;
}

const struct device_test device_tests[DEVICE_TESTS] = {
    {"cuda graph captured once and replayed at three sizes", never},
    {"cuda fp8 of every half", never},
    {"cuda pool of more than 2^32 elements", never},
};

const char *device_open(void)
{
    return "built without CUDA";
}

void device_close(void)
{
}

enum kvp_status device_run_case(const struct kernel_case *original, unsigned char *ret_bytes, char *why,
                                size_t why_bytes)
{
    (void)original;
    (void)ret_bytes;
    (void)why;
    (void)why_bytes;
    return KVP_ENODEV;
}
