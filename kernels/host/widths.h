/**
 * Vector widths that one loop is compiled for: the plain instruction set and, on x86-64, AVX2 and AVX-512.
 *
 * A loop is written once as a macro or inline function and given each target in turn; which of the three runs is asked
 * of the CPU when it is chosen. Elsewhere the three are the same.
 */
#ifndef KVP_HOST_WIDTHS_H
#define KVP_HOST_WIDTHS_H

#define KVP_WIDTHS 3
#define KVP_PLAIN
#if defined(__x86_64__)
#define KVP_AVX2   __attribute__((target("avx2")))
#define KVP_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd")))
#else
#define KVP_AVX2
#define KVP_AVX512
#endif

/** The widest that this CPU has: 0 plain, 1 AVX2, 2 AVX-512. */
static inline int kvp_cpu_width(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        return 2;
    return __builtin_cpu_supports("avx2") ? 1 : 0;
#else
    return 0;
#endif
}

#endif
