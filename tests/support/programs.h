/**
 * Which random programs a test runs: the same ones every time, and in long runs ($KVPOOL_TEST_LONG) more, from a seed
 * of the clock. Program i has seed first + i; a failure names it.
 */
#ifndef TEST_PROGRAMS_H
#define TEST_PROGRAMS_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LONG_RUN 10 /* times as many */

/**
 * --seed S takes the seeds from S on, --programs N runs that many.
 * @param programs  how many in a short run; on return, how many to run
 * @return the first seed
 */
static inline uint64_t programs_choose(int argc, char **argv, unsigned *programs)
{
    uint64_t first_seed = 1;

    if (getenv("KVPOOL_TEST_LONG") != NULL) {
        first_seed = (uint64_t)time(NULL) * 1000003u;
        *programs *= LONG_RUN;
    }
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--seed") == 0)
            first_seed = strtoull(argv[i + 1], NULL, 0);
        if (strcmp(argv[i], "--programs") == 0)
            *programs = (unsigned)strtoul(argv[i + 1], NULL, 0);
    }
    printf("%u programs from seed %" PRIu64 " on\n", *programs, first_seed);
    fflush(stdout);
    return first_seed;
}

#endif
