/**
 * The case matrix of the kernels: a few thousand generated cases, on the host always, and on the GPU where one is.
 *
 *     kernels_matrix [--cases N] [--seed S] [--only CASE] [--host-only]
 *
 * Each case (tests/support/kernel_cases.h) is carried out by the naive reference and by the kernels, in copies of the
 * same poisoned bytes, which must then be equal to the last byte: pool, guards, inputs and outputs. Violations are
 * compared as sets, since their order is not defined. On a GPU the same cases run through kvp_cuda_X, and three
 * tests more: a captured graph replayed at three sizes, fp8 of every half, and a pool of over 2^32 elements.
 *
 * The last line is "N passed, N failed, N skipped". What needs a GPU and finds none is listed as skipped, by name.
 */
#include "kernels_matrix.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RING_CAPACITY  (1u << 16)
#define FAILURES_SHOWN 10
#define DEFAULT_CASES  4000
#define DEFAULT_SEED   20260101

struct memory {
    unsigned char *original;
    unsigned char *expected;
    unsigned char *actual;
    struct kvp_error_ring *violations; /* the reference's */
};

struct options {
    uint64_t cases;
    uint64_t seed;
    uint64_t first;
    int host_only;
};

static unsigned passed, failed, skipped;

static void outcome(int good, const char *name, const char *why)
{
    if (good) {
        passed++;
        return;
    }
    failed++;
    if (failed <= FAILURES_SHOWN)
        printf("FAILED  %s: %s\n", name, why);
}

static void skip(const char *name, const char *why)
{
    skipped++;
    printf("skipped %s: %s\n", name, why);
}

static int compare_records(const void *a, const void *b)
{
    const struct kvp_error_record *x = a, *y = b;
    if (x->token != y->token)
        return x->token < y->token ? -1 : 1;
    if (x->kind != y->kind)
        return x->kind < y->kind ? -1 : 1;
    return x->value < y->value ? -1 : x->value > y->value;
}

/* Each record found is one of those expected, none twice; all of them where there was room. */
static int rings_agree(struct kvp_error_ring *found, struct kvp_error_ring *expected, char *why, size_t why_bytes)
{
    uint64_t kept = found->count < found->capacity ? found->count : found->capacity, k = 0;
    if (found->count != expected->count) {
        snprintf(why, why_bytes, "%llu violations counted, %llu expected", (unsigned long long)found->count,
                 (unsigned long long)expected->count);
        return 0;
    }
    qsort(found->records, kept, sizeof found->records[0], compare_records);
    qsort(expected->records, expected->count, sizeof expected->records[0], compare_records);
    for (uint64_t i = 0; i < kept; i++, k++) {
        while (k < expected->count && compare_records(&found->records[i], &expected->records[k]) != 0)
            k++;
        if (k == expected->count || found->records[i].reserved != 0) {
            snprintf(why, why_bytes, "violation %u of token %lld with value %lld was not expected",
                     found->records[i].kind, (long long)found->records[i].token, (long long)found->records[i].value);
            return 0;
        }
    }
    return 1;
}

/* Compare what a backend made of the case in memory->actual. */
static int as_expected(const struct kernel_case *original, const struct memory *memory, char *why, size_t why_bytes)
{
    if (original->ring != NULL) {
        size_t at = (size_t)((unsigned char *)original->ring - original->bytes);
        struct kvp_error_ring *found = (struct kvp_error_ring *)(memory->actual + at);
        if (found->capacity != original->ring->capacity) {
            snprintf(why, why_bytes, "the ring's capacity was changed");
            return 0;
        }
        if (!rings_agree(found, memory->violations, why, why_bytes))
            return 0;
        memcpy(found, original->ring, sizeof *found + found->capacity * sizeof found->records[0]);
    }
    if (memcmp(memory->actual, memory->expected, original->used) == 0)
        return 1;
    size_t i = 0;
    while (memory->actual[i] == memory->expected[i])
        i++;
    int touched = memory->actual[i] != original->bytes[i], wanted = memory->expected[i] != original->bytes[i];
    snprintf(why, why_bytes, "byte %zu of %zu is 0x%02x instead of 0x%02x (%s)", i, original->used, memory->actual[i],
             memory->expected[i],
             !touched ? "not written"
             : wanted ? "wrong"
                      : "should not be written");
    return 0;
}

static void run_case(const struct options *options, uint64_t number, const struct memory *memory, int on_device)
{
    struct kernel_case original, moved;
    char name[96], why[160];
    kernel_case_make(&original, options->seed, number, memory->original);
    kernel_case_move(&original, memory->original, original.ring, &original);

    memcpy(memory->expected, memory->original, original.used);
    memory->violations->count = 0;
    memory->violations->capacity = RING_CAPACITY;
    kernel_case_move(&original, memory->expected, original.ring == NULL ? NULL : memory->violations, &moved);
    kernel_case_by_reference(&moved);

    snprintf(name, sizeof name, "host %s (case %llu)", kernel_op_name(original.op), (unsigned long long)number);
    memcpy(memory->actual, memory->original, original.used);
    kernel_case_move(&original, memory->actual, NULL, &moved);
    kernel_case_move(&original, memory->actual, moved.ring, &moved);
    enum kvp_status status = kernel_case_by_host(&moved);
    snprintf(why, sizeof why, "%s", kvp_status_name(status));
    outcome(status == KVP_OK && as_expected(&original, memory, why, sizeof why), name, why);
    if (!on_device)
        return;
    snprintf(name, sizeof name, "cuda %s (case %llu)", kernel_op_name(original.op), (unsigned long long)number);
    status = device_run_case(&original, memory->actual, why, sizeof why);
    outcome(status == KVP_OK && as_expected(&original, memory, why, sizeof why), name, why);
}

static int parse(int argc, char **argv, struct options *ret_options)
{
    struct options options = {.cases = DEFAULT_CASES, .seed = DEFAULT_SEED};
    for (int i = 1; i < argc; i++) {
        int more = i + 1 < argc;
        if (strcmp(argv[i], "--cases") == 0 && more)
            options.cases = strtoull(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--seed") == 0 && more)
            options.seed = strtoull(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--only") == 0 && more) {
            options.first = strtoull(argv[++i], NULL, 0);
            options.cases = 1;
        } else if (strcmp(argv[i], "--host-only") == 0)
            options.host_only = 1;
        else
            return -1;
    }
    *ret_options = options;
    return 0;
}

static void run_device_tests(const char *absent)
{
    for (unsigned i = 0; i < DEVICE_TESTS; i++) {
        char why[160] = "";
        int result = absent != NULL ? 1 : device_tests[i].run(why, sizeof why);
        if (result > 0)
            skip(device_tests[i].name, absent != NULL ? absent : why);
        else
            outcome(result == 0, device_tests[i].name, why);
    }
}

int main(int argc, char **argv)
{
    struct options options;
    if (parse(argc, argv, &options) != 0) {
        fprintf(stderr, "usage: %s [--cases N] [--seed S] [--only CASE] [--host-only]\n", argv[0]);
        return 2;
    }
    struct memory memory = {
        .original = aligned_alloc(4096, CASE_BYTES_MAX),
        .expected = aligned_alloc(4096, CASE_BYTES_MAX),
        .actual = aligned_alloc(4096, CASE_BYTES_MAX),
        .violations = malloc(sizeof *memory.violations + RING_CAPACITY * sizeof memory.violations->records[0]),
    };
    if (memory.original == NULL || memory.expected == NULL || memory.actual == NULL || memory.violations == NULL) {
        fprintf(stderr, "kernels_matrix: out of memory\n");
        return 1;
    }
    const char *absent = options.host_only ? "--host-only was given" : device_open();
    printf("seed %llu, %llu cases\n", (unsigned long long)options.seed, (unsigned long long)options.cases);
    for (uint64_t i = 0; i < options.cases; i++)
        run_case(&options, options.first + i, &memory, absent == NULL);
    if (absent != NULL)
        skip("cuda case matrix", absent);
    run_device_tests(absent);
    device_close();
    free(memory.original);
    free(memory.expected);
    free(memory.actual);
    free(memory.violations);
    printf("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
    return failed != 0;
}
