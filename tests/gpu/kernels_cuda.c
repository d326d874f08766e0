/**
 * What of the CUDA kernels only a GPU can show, beside the case matrix: fp8 over every half, the division that is not
 * IEEE's own, the progress store and the page table in registered host memory, the largest index step, two GPUs.
 *
 * Without a GPU every test is listed as skipped, by name, and the exit status is 77. The seed is printed, and taken
 * from the environment (KVP_TEST_SEED).
 */
#include <check.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel_reference.h"
#include "kvp_kernels.h"

#define SKIPPED 77

static uint64_t seed = 20260711;

static uint64_t random_word(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed * 0x2545f4914f6cdd1dull;
}

static void must(cudaError_t error)
{
    ck_assert_msg(error == cudaSuccess, "%s", cudaGetErrorString(error));
}

static void *device_alloc(size_t bytes)
{
    void *memory;

    must(cudaMalloc(&memory, bytes));
    must(cudaMemset(memory, 0xa5, bytes));
    return memory;
}

static void *device_copy(const void *from, size_t bytes)
{
    void *memory = device_alloc(bytes);

    must(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
    return memory;
}

/* ---- fp8 --------------------------------------------------------------------------------------------------------- */

/* One plane of n tokens of 16 elements, token j in its place j: what the kernel makes of `source`. */
static void quantise_on_device(const void *source, uint32_t tokens, uint32_t source_dtype, uint32_t dtype, float scale,
                               uint8_t *ret_codes)
{
    uint32_t element = kvp_dtype_bytes(source_dtype);
    struct kvp_plane_view plane = {NULL, 16 * 16, 16, 16, 1, 16, dtype, 0};
    struct kvp_token_view view = {NULL, 16 * element, 16 * element};
    const float *scales[1] = {device_copy(&scale, sizeof(scale))};
    struct kvp_quant_append_args args = {0};
    int32_t *slots = malloc(tokens * sizeof(*slots));

    ck_assert_ptr_nonnull(slots);
    for (uint32_t t = 0; t < tokens; t++)
        slots[t] = (int32_t)t;
    plane.base = device_alloc(tokens * 16);
    view.base = device_copy(source, (size_t)tokens * 16 * element);
    args.planes = &plane;
    args.sources = &view;
    args.n_planes = 1;
    args.pages = (tokens + 15) / 16;
    args.page_tokens = 16;
    args.source_dtype = source_dtype;
    args.scale_mode = KVP_SCALE_TENSOR;
    args.scales = scales;
    args.at.kind = KVP_ADDRESS_SLOTS;
    args.at.index_bits = 32;
    args.at.nnz = tokens;
    args.at.slot_mapping = device_copy(slots, tokens * sizeof(*slots));
    ck_assert_int_eq(kvp_cuda_quant_append(&args, NULL), KVP_OK);
    must(cudaMemcpy(ret_codes, plane.base, tokens * 16, cudaMemcpyDeviceToHost));
    must(cudaFree(plane.base));
    must(cudaFree(view.base));
    must(cudaFree((void *)scales[0]));
    must(cudaFree((void *)args.at.slot_mapping));
    free(slots);
}

START_TEST(every_half_becomes_the_fp8_code_that_a_double_precision_oracle_gives)
{
    static const uint32_t dtypes[] = {KVP_DTYPE_FP8_E4M3, KVP_DTYPE_FP8_E5M2};
    static const uint32_t sources[] = {KVP_DTYPE_F16, KVP_DTYPE_BF16};
    static const float scales[] = {1.0f, 0.37f, 3.1415926f, 1e-4f, 117.0f, 0x1p-70f, 1e30f, -2.0f, 0.0f, INFINITY};
    uint16_t *values = malloc(65536 * sizeof(*values));
    uint8_t *codes = malloc(65536);

    ck_assert(values && codes);
    for (uint32_t i = 0; i < 65536; i++)
        values[i] = (uint16_t)i;
    for (size_t d = 0; d < 2; d++) {
        for (size_t s = 0; s < sizeof(scales) / sizeof(scales[0]); s++) {
            for (size_t w = 0; w < 2; w++) {
                quantise_on_device(values, 4096, sources[w], dtypes[d], scales[s], codes);
                for (uint32_t i = 0; i < 65536; i++) {
                    float quotient = (float)reference_wide_value(&values[i], sources[w]) / scales[s];
                    uint8_t code = reference_fp8(quotient, dtypes[d]);

                    ck_assert_msg(codes[i] == code, "input %04x / %g as dtype %u: %02x instead of %02x", i,
                                  (double)scales[s], dtypes[d], codes[i], code);
                }
            }
        }
    }
    free(values);
    free(codes);
}
END_TEST

START_TEST(the_quotient_of_any_floats_is_the_correctly_rounded_one)
{
    const uint32_t n = 1u << 18;
    float *values = malloc(n * sizeof(*values));
    uint8_t *codes = malloc(n);

    ck_assert(values && codes);
    for (uint32_t round = 0; round < 24; round++) {
        uint32_t scale_bits = (uint32_t)random_word() & 0x007fffff, exponent = 127 + round * 5 - 60;
        uint32_t dtype = round % 2 ? KVP_DTYPE_FP8_E4M3 : KVP_DTYPE_FP8_E5M2;
        float scale;

        scale_bits |= exponent << 23;
        memcpy(&scale, &scale_bits, 4);
        for (uint32_t i = 0; i < n; i++) {
            /* half of them near a number that lies between two codes, times the scale: there rounding shows */
            uint32_t bits = (uint32_t)random_word();
            float middle = (1.0f + (float)(random_word() % 64) / 32.0f) * ldexpf(1.0f, (int)(random_word() % 20) - 10);

            memcpy(&values[i], &bits, 4);
            if (i % 2) {
                values[i] = middle * scale;
                memcpy(&bits, &values[i], 4);
                bits += (uint32_t)(random_word() % 5) - 2;
                memcpy(&values[i], &bits, 4);
            }
        }
        quantise_on_device(values, n / 16, KVP_DTYPE_F32, dtype, scale, codes);
        for (uint32_t i = 0; i < n; i++) {
            uint8_t code = reference_fp8(values[i] / scale, dtype);

            ck_assert_msg(codes[i] == code, "%a / %a as dtype %u: %02x instead of %02x", (double)values[i],
                          (double)scale, dtype, codes[i], code);
        }
    }
    free(values);
    free(codes);
}
END_TEST

/* ---- host memory ------------------------------------------------------------------------------------------------- */

/* A memfd of `bytes` bytes, mapped. */
static void *map_memfd(int fd, size_t bytes, int protection)
{
    void *memory = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);

    ck_assert_ptr_ne(memory, MAP_FAILED);
    return memory;
}

START_TEST(progress_words_reach_a_registered_memfd_behind_the_append)
{
    int fd = memfd_create("progress", MFD_CLOEXEC);
    int32_t slots[] = {5, -1, 0, 63, 64}, lengths[] = {17, 3, 1 << 24, -1, 8};
    uint32_t versions[] = {2, 4, 0xfffffffe, 6, 8};
    struct kvp_error_ring *ring = device_alloc(sizeof(*ring) + 4 * sizeof(ring->records[0])), *seen;
    struct kvp_error_ring empty = {.count = 0, .capacity = 4};
    struct kvp_progress_args args = {0};
    uint64_t *words;
    void *device;

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, 4096), 0);
    words = map_memfd(fd, 4096, PROT_READ | PROT_WRITE);
    memset(words, 0x11, 4096);
    must(cudaHostRegister(words, 4096, cudaHostRegisterMapped));
    must(cudaHostGetDevicePointer(&device, words, 0));
    must(cudaMemcpy(ring, &empty, sizeof(empty), cudaMemcpyHostToDevice));
    args.progress = device;
    args.max_sequences = 64;
    args.index_bits = 32;
    args.n = 5;
    args.seq_slots = device_copy(slots, sizeof(slots));
    args.versions = device_copy(versions, sizeof(versions));
    args.lengths = device_copy(lengths, sizeof(lengths));
    args.errors = ring;
    ck_assert_int_eq(kvp_cuda_progress(&args, NULL), KVP_OK);
    must(cudaDeviceSynchronize());
    for (uint32_t i = 0; i < 512; i++) {
        uint64_t expected = 0x1111111111111111ull;

        if (i == 5)
            expected = KVP_PROGRESS_WORD(2, 17);
        if (i == 0)
            expected = KVP_PROGRESS_WORD(0xfffffffe, 1 << 24);
        ck_assert_uint_eq(words[i], expected);
    }
    seen = malloc(sizeof(*seen) + 4 * sizeof(seen->records[0]));
    ck_assert_ptr_nonnull(seen);
    must(cudaMemcpy(seen, ring, sizeof(*seen) + sizeof(seen->records[0]), cudaMemcpyDeviceToHost));
    ck_assert_uint_eq(seen->count, 1);
    ck_assert_uint_eq(seen->records[0].kind, KVP_BAD_SLOT);
    ck_assert_int_eq(seen->records[0].token, 4);
    ck_assert_int_eq(seen->records[0].value, 64);
    free(seen);
    must(cudaHostUnregister(words));
    munmap(words, 4096);
    close(fd);
    must(cudaFree(ring));
    must(cudaFree((void *)args.seq_slots));
    must(cudaFree((void *)args.versions));
    must(cudaFree((void *)args.lengths));
}
END_TEST

START_TEST(the_index_step_reads_a_page_table_that_is_registered_read_only)
{
    const uint32_t sequences = 100, row_pages = 12, page_tokens = 4, pages = 5000;
    size_t heads_bytes = sequences * sizeof(struct kvp_table_head), bytes = heads_bytes + sequences * row_pages * 4;
    int fd = memfd_create("table", MFD_CLOEXEC);
    struct kvp_index_args args = {0}, host;
    int32_t slots[64], starts[64], outputs[4][64 * 12 + 1];
    struct kvp_table_head *heads;
    unsigned char *table, *mapped;
    void *device, *device_outputs;
    int32_t *rows;

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    table = map_memfd(fd, bytes, PROT_READ | PROT_WRITE);
    heads = (struct kvp_table_head *)table;
    rows = (int32_t *)(table + heads_bytes);
    for (uint32_t s = 0; s < sequences; s++)
        heads[s] = (struct kvp_table_head){2, row_pages, (uint32_t)(random_word() % 40), 1};
    for (uint32_t i = 0; i < sequences * row_pages; i++)
        rows[i] = (int32_t)(random_word() % pages);
    for (uint32_t b = 0; b < 64; b++) {
        slots[b] = b % 9 == 4 ? -1 : (int32_t)(random_word() % sequences);
        starts[b] = (int32_t)(random_word() % 40);
    }
    mapped = map_memfd(fd, bytes, PROT_READ);
    must(cudaHostRegister(mapped, bytes, cudaHostRegisterMapped | cudaHostRegisterReadOnly));
    must(cudaHostGetDevicePointer(&device, mapped, 0));
    device_outputs = device_alloc(sizeof(outputs));
    args.source = KVP_INDEX_ROWS;
    args.index_bits = args.slot_bits = 32;
    args.pages = pages;
    args.page_tokens = page_tokens;
    args.batch = 64;
    args.nnz = 200;
    args.kv_capacity = 64 * 12;
    args.append_each = 3;
    args.table.row_stride = row_pages * 4;
    args.table.max_sequences = sequences;
    args.table.row_pages = row_pages;
    for (int with_starts = 0; with_starts < 2; with_starts++) {
        memset(outputs, 0xa5, sizeof(outputs));
        host = args;
        host.table.heads = heads;
        host.table.rows = rows;
        host.seq_slots = slots;
        host.start_lengths = with_starts ? starts : NULL;
        host.ret_kv_indices = outputs[0];
        host.ret_slot_mapping = outputs[1];
        host.ret_positions = outputs[2];
        host.ret_seq_lens = outputs[3];
        reference_index(&host);
        host = args;
        host.table.heads = device;
        host.table.rows = (const int32_t *)((const char *)device + heads_bytes);
        host.seq_slots = device_copy(slots, sizeof(slots));
        host.start_lengths = with_starts ? device_copy(starts, sizeof(starts)) : NULL;
        host.ret_kv_indices = device_outputs;
        host.ret_slot_mapping = (char *)device_outputs + sizeof(outputs[0]);
        host.ret_positions = (char *)device_outputs + 2 * sizeof(outputs[0]);
        host.ret_seq_lens = (char *)device_outputs + 3 * sizeof(outputs[0]);
        must(cudaMemset(device_outputs, 0xa5, sizeof(outputs)));
        ck_assert_int_eq(kvp_cuda_index(&host, NULL), KVP_OK);
        for (int o = 0; o < 4; o++) {
            int32_t found[64 * 12 + 1];

            must(cudaMemcpy(found, (char *)device_outputs + (size_t)o * sizeof(found), sizeof(found),
                            cudaMemcpyDeviceToHost));
            ck_assert_mem_eq(found, outputs[o], sizeof(found));
        }
        must(cudaFree((void *)host.seq_slots));
        must(cudaFree((void *)host.start_lengths));
    }
    must(cudaFree(device_outputs));
    must(cudaHostUnregister(mapped));
    munmap(mapped, bytes);
    munmap(table, bytes);
    close(fd);
}
END_TEST

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

START_TEST(the_largest_index_step_gives_what_the_reference_gives)
{
    const uint32_t batch = KVP_INDEX_BATCH_MAX, pages = 100000, columns = 9, capacity = batch * columns;
    int32_t *table = malloc((size_t)capacity * 4), *counts = malloc(batch * 4), *last = malloc(batch * 4);
    int32_t *expected = malloc((size_t)capacity * 4), *found = malloc((size_t)capacity * 4);
    struct kvp_index_args args = {0}, device;

    ck_assert(table && counts && last && expected && found);
    for (uint32_t i = 0; i < capacity; i++)
        table[i] = random_word() % 8 ? (int32_t)(random_word() % pages) : -1;
    for (uint32_t b = 0; b < batch; b++) {
        counts[b] = (int32_t)(random_word() % 20);
        last[b] = (int32_t)(random_word() % 16) + 1;
    }
    args.source = KVP_INDEX_TABLE;
    args.index_bits = args.slot_bits = 32;
    args.pages = pages;
    args.page_tokens = 16;
    args.batch = batch;
    args.nnz = args.kv_capacity = capacity;
    args.in_page_table_stride = args.in_page_table_pages = columns;
    device = args;
    args.append_lengths = counts;
    args.in_page_table = table;
    args.in_last_page_len = last;
    device.append_lengths = device_copy(counts, batch * 4);
    device.in_page_table = device_copy(table, (size_t)capacity * 4);
    device.in_last_page_len = device_copy(last, batch * 4);
    for (int output = 0; output < 2; output++) {
        void *memory = device_alloc((size_t)capacity * 4);

        memset(expected, 0xa5, (size_t)capacity * 4);
        args.ret_slot_mapping = output == 0 ? expected : NULL;
        args.ret_kv_indices = output == 1 ? expected : NULL;
        device.ret_slot_mapping = output == 0 ? memory : NULL;
        device.ret_kv_indices = output == 1 ? memory : NULL;
        reference_index(&args);
        ck_assert_int_eq(kvp_cuda_index(&device, NULL), KVP_OK);
        must(cudaMemcpy(found, memory, (size_t)capacity * 4, cudaMemcpyDeviceToHost));
        ck_assert_mem_eq(found, expected, (size_t)capacity * 4);
        must(cudaFree(memory));
    }
    must(cudaFree((void *)device.append_lengths));
    must(cudaFree((void *)device.in_page_table));
    must(cudaFree((void *)device.in_last_page_len));
    free(table);
    free(counts);
    free(last);
    free(expected);
    free(found);
}
END_TEST

START_TEST(a_bad_argument_is_refused_and_a_launch_error_leaves_no_trace)
{
    struct kvp_append_args args = {0};

    ck_assert_int_eq(kvp_cuda_append(NULL, NULL), KVP_EINVAL);
    ck_assert_int_eq(kvp_cuda_append(&args, NULL), KVP_EINVAL);
    ck_assert_int_eq(cudaGetLastError(), cudaSuccess);
}
END_TEST

/* ---- two GPUs ---------------------------------------------------------------------------------------------------- */

START_TEST(pages_move_between_two_gpus)
{
    const uint32_t pages = 64, page_bytes = 16 * 2 * 64;
    struct kvp_plane_view planes[2] = {{NULL, page_bytes, 128, 64, 2, 64, KVP_DTYPE_U8, 0},
                                       {NULL, page_bytes, 128, 64, 2, 64, KVP_DTYPE_U8, 0}};
    unsigned char *bytes = malloc(pages * page_bytes), *found = malloc(pages * page_bytes);
    struct kvp_page_copy copies[] = {{3, 7, 16, 0}, {9, 0, 5, 0}};
    struct kvp_page_copy_args args = {0};
    void *list;

    ck_assert(bytes && found);
    for (uint32_t i = 0; i < pages * page_bytes; i++)
        bytes[i] = (unsigned char)random_word();
    planes[0].base = device_copy(bytes, pages * page_bytes);
    list = device_copy(copies, sizeof(copies));
    must(cudaSetDevice(1));
    planes[1].base = device_alloc(pages * page_bytes);
    must(cudaSetDevice(0));
    must(cudaDeviceEnablePeerAccess(1, 0));
    args.sources = &planes[0];
    args.destinations = &planes[1];
    args.n_planes = 1;
    args.page_tokens = 16;
    args.source_pages = args.destination_pages = pages;
    args.n = 2;
    args.copies = list;
    ck_assert_int_eq(kvp_cuda_page_copy(&args, NULL), KVP_OK);
    must(cudaMemcpy(found, planes[1].base, pages * page_bytes, cudaMemcpyDefault));
    for (uint32_t i = 0; i < pages * page_bytes; i++) {
        uint32_t page = i / page_bytes, at = i % page_bytes;
        unsigned char expected = 0xa5;

        if (page == 7)
            expected = bytes[3 * page_bytes + at];
        if (page == 0 && at < 5 * 128)
            expected = bytes[9 * page_bytes + at];
        ck_assert_uint_eq(found[i], expected);
    }
    must(cudaFree(planes[0].base));
    must(cudaFree(list));
    must(cudaSetDevice(1));
    must(cudaFree(planes[1].base));
    must(cudaSetDevice(0));
    free(bytes);
    free(found);
}
END_TEST

/* X(test, GPUs that it needs) */
#define TESTS(X)                                                                                                       \
    X(every_half_becomes_the_fp8_code_that_a_double_precision_oracle_gives, 1)                                         \
    X(the_quotient_of_any_floats_is_the_correctly_rounded_one, 1)                                                      \
    X(progress_words_reach_a_registered_memfd_behind_the_append, 1)                                                    \
    X(the_index_step_reads_a_page_table_that_is_registered_read_only, 1)                                               \
    X(the_largest_index_step_gives_what_the_reference_gives, 1)                                                        \
    X(a_bad_argument_is_refused_and_a_launch_error_leaves_no_trace, 1)                                                 \
    X(pages_move_between_two_gpus, 2)

int main(void)
{
    Suite *suite = suite_create("kernels_cuda");
    TCase *tests = tcase_create("gpu");
    SRunner *runner = srunner_create(suite);
    int gpus = 0, failed;

    if (cudaGetDeviceCount(&gpus) != cudaSuccess)
        gpus = 0;
    if (getenv("KVP_TEST_SEED"))
        seed = strtoull(getenv("KVP_TEST_SEED"), NULL, 0) | 1;
    printf("seed %llu\n", (unsigned long long)seed);
    tcase_set_timeout(tests, 0);
    suite_add_tcase(suite, tests);
#define ADD_TEST(name, needed)                                                                                         \
    if (gpus >= (needed))                                                                                              \
        tcase_add_test(tests, name);                                                                                   \
    else                                                                                                               \
        printf("skipped " #name ": %d of %d GPUs\n", gpus, needed);
    TESTS(ADD_TEST)
#undef ADD_TEST
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_VERBOSE);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    if (failed)
        return 1;
    return gpus ? 0 : SKIPPED;
}
