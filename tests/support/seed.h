/**
 * Where random tests begin: the same in every run, and in long runs ($KVPOOL_TEST_LONG) anywhere, with more of it.
 * $KVPOOL_TEST_SEED says another. Whoever asks prints it.
 */
#ifndef TEST_SEED_H
#define TEST_SEED_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LONG_RUN 10 /* times as many programs */

static inline uint64_t test_seed(void)
{
    const char *given = getenv("KVPOOL_TEST_SEED");

    if (given != NULL)
        return strtoull(given, NULL, 0);
    return getenv("KVPOOL_TEST_LONG") != NULL ? (uint64_t)time(NULL) * 1000003u : 1;
}

/**
 * Which random programs to run: --seed S takes the seeds from S on, --programs N runs that many. Program i has seed
 * first + i; a failure names it.
 * @param programs  how many in a short run; on return, how many to run
 * @return the first seed
 */
static inline uint64_t programs_choose(int argc, char **argv, unsigned *programs)
{
    uint64_t first_seed = test_seed();

    if (getenv("KVPOOL_TEST_LONG") != NULL)
        *programs *= LONG_RUN;
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
