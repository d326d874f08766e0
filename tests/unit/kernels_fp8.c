/**
 * fp8 on the host, element by element: quantising append and dequantising gather against a double-precision oracle.
 *
 * Every half and every bfloat, both formats, several scales; the floats at and beside each rounding border; every fp8
 * code on its way back.
 */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernel_reference.h"

#define ALL     65536
#define DIM     256
#define TOKENS  (ALL / DIM)
#define FORMATS 2

static const uint32_t formats[FORMATS] = {KVP_DTYPE_FP8_E4M3, KVP_DTYPE_FP8_E5M2};

static uint8_t codes[ALL];
static int32_t slots[TOKENS];

static struct kvp_plane_view plane_of(void *bytes, uint32_t fp8, uint32_t dim)
{
    return (struct kvp_plane_view){.base = bytes,
                                   .page_stride = dim,
                                   .token_stride = dim,
                                   .head_stride = dim,
                                   .heads = 1,
                                   .dim = dim,
                                   .dtype = fp8};
}

static struct kvp_address address_of(int64_t tokens)
{
    for (int32_t j = 0; j < tokens; j++)
        slots[j] = j;
    return (struct kvp_address){.kind = KVP_ADDRESS_SLOTS, .index_bits = 32, .nnz = tokens, .slot_mapping = slots};
}

/* Quantise `tokens` · DIM elements into `codes`, one page a token. */
static void quantise(void *elements, uint32_t wide, uint32_t fp8, float scale, int64_t tokens)
{
    struct kvp_plane_view plane = plane_of(codes, fp8, DIM);
    int64_t row = DIM * (int64_t)kvp_dtype_bytes(wide);
    struct kvp_token_view source = {elements, row, row};
    const float *scales[] = {&scale};
    struct kvp_quant_append_args args = {
        .planes = &plane,
        .sources = &source,
        .n_planes = 1,
        .pages = TOKENS,
        .page_tokens = 1,
        .source_dtype = wide,
        .scale_mode = scale == 1.0f ? KVP_SCALE_NONE : KVP_SCALE_TENSOR,
        .scales = scales,
        .at = address_of(tokens),
    };
    memset(codes, 0xcc, sizeof codes);
    ck_assert_int_eq(kvp_host_quant_append(&args, 1), KVP_OK);
}

static void assert_nearest(const void *elements, uint32_t wide, uint32_t fp8, float scale, uint32_t n)
{
    uint32_t bytes = kvp_dtype_bytes(wide);
    for (uint32_t i = 0; i < n; i++) {
        double value = reference_wide_value((const char *)elements + i * bytes, wide);
        uint8_t expected = reference_fp8((float)(value / (double)scale), fp8);
        if (codes[i] != expected) /* an assertion that holds is a write of Check's all the same */
            ck_abort_msg("element %u, %a / %a: 0x%02x instead of 0x%02x", i, value, scale, codes[i], expected);
    }
}

static void assert_all_16_bit_elements(uint32_t wide)
{
    static const float scales[] = {1.0f, 0.0371f, 3.0f, 0x1p-20f, 1e-30f, 448.0f, -2.5f};
    static uint16_t elements[ALL];
    for (uint32_t i = 0; i < ALL; i++)
        elements[i] = (uint16_t)i;
    for (size_t f = 0; f < FORMATS; f++) {
        for (size_t s = 0; s < sizeof scales / sizeof scales[0]; s++) {
            quantise(elements, wide, formats[f], scales[s], TOKENS);
            assert_nearest(elements, wide, formats[f], scales[s], ALL);
        }
    }
}

START_TEST(every_half_becomes_the_nearest_fp8)
{
    assert_all_16_bit_elements(KVP_DTYPE_F16);
}
END_TEST

START_TEST(every_bfloat_becomes_the_nearest_fp8)
{
    assert_all_16_bit_elements(KVP_DTYPE_BF16);
}
END_TEST

START_TEST(floats_at_and_beside_each_rounding_border_become_the_nearest_fp8)
{
    static float elements[TOKENS * DIM];
    for (size_t f = 0; f < FORMATS; f++) {
        uint32_t n = 0;
        for (uint32_t code = 0; code < 0x7c; code++) {
            double low = reference_fp8_value((uint8_t)code, formats[f]);
            double high = reference_fp8_value((uint8_t)(code + 1), formats[f]);
            float middle = (float)(isinf(high) ? low * 1.0625 : (low + high) / 2);
            const float near[] = {(float)low, nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
            for (size_t i = 0; i < 4; i++) {
                elements[n++] = near[i];
                elements[n++] = -near[i];
            }
        }
        for (; n % DIM != 0; n++)
            elements[n] = n % 2 ? INFINITY : NAN;
        quantise(elements, KVP_DTYPE_F32, formats[f], 1.0f, n / DIM);
        assert_nearest(elements, KVP_DTYPE_F32, formats[f], 1.0f, n);
    }
}
END_TEST

START_TEST(what_is_over_the_range_saturates_and_nan_stays_nan)
{
    static float elements[DIM] = {448.0f, 449.0f, 464.0f, 480.0f, 1e38f, INFINITY, -INFINITY, NAN, 57344.0f, 65536.0f};
    quantise(elements, KVP_DTYPE_F32, KVP_DTYPE_FP8_E4M3, 1.0f, 1);
    static const uint8_t e4m3[] = {0x7e, 0x7e, 0x7e, 0x7e, 0x7e, 0x7e, 0xfe, 0x7f, 0x7e, 0x7e, 0x00};
    ck_assert_mem_eq(codes, e4m3, sizeof e4m3);
    quantise(elements, KVP_DTYPE_F32, KVP_DTYPE_FP8_E5M2, 1.0f, 1);
    static const uint8_t e5m2[] = {0x5f, 0x5f, 0x5f, 0x60, 0x7b, 0x7b, 0xfb, 0x7f, 0x7b, 0x7b, 0x00};
    ck_assert_mem_eq(codes, e5m2, sizeof e5m2);
}
END_TEST

/* All 256 codes, as one token of DIM elements. */
static void dequantise(void *elements, uint32_t wide, uint32_t fp8, float scale)
{
    static uint8_t all[DIM];
    for (uint32_t code = 0; code < DIM; code++)
        all[code] = (uint8_t)code;
    struct kvp_plane_view plane = plane_of(all, fp8, DIM);
    struct kvp_token_view destination = {elements, DIM * 4, DIM * 4};
    const float *scales[] = {&scale};
    struct kvp_gather_args args = {
        .planes = &plane,
        .destinations = &destination,
        .n_planes = 1,
        .pages = 1,
        .page_tokens = 1,
        .dtype = wide,
        .scale_mode = KVP_SCALE_TENSOR,
        .scales = scales,
        .at = address_of(1),
    };
    ck_assert_int_eq(kvp_host_gather(&args, 1), KVP_OK);
}

START_TEST(every_fp8_comes_back_as_its_value_in_each_wide_type)
{
    static const uint32_t wides[] = {KVP_DTYPE_F32, KVP_DTYPE_F16, KVP_DTYPE_BF16};
    static float elements[DIM];
    for (size_t f = 0; f < FORMATS; f++) {
        for (size_t w = 0; w < 3; w++) {
            dequantise(elements, wides[w], formats[f], 1.0f);
            for (uint32_t code = 0; code < DIM; code++) {
                double expected = reference_fp8_value((uint8_t)code, formats[f]);
                double found = reference_wide_value((char *)elements + code * kvp_dtype_bytes(wides[w]), wides[w]);
                ck_assert(isnan(expected) ? isnan(found) : found == expected && !signbit(found) == !signbit(expected));
            }
        }
    }
}
END_TEST

START_TEST(quantising_what_was_dequantised_gives_the_same_code)
{
    static float elements[DIM];
    for (size_t f = 0; f < FORMATS; f++) {
        dequantise(elements, KVP_DTYPE_F32, formats[f], 0.3f);
        quantise(elements, KVP_DTYPE_F32, formats[f], 0.3f, 1);
        for (uint32_t code = 0; code < DIM; code++) {
            double value = reference_fp8_value((uint8_t)code, formats[f]);
            if (!isnan(value) && !isinf(value))
                ck_assert_uint_eq(codes[code], code);
        }
    }
}
END_TEST

START_TEST(a_computed_scale_makes_the_largest_element_the_largest_number)
{
    static const float largest[FORMATS] = {448.0f, 57344.0f};
    static float elements[2][2][DIM]; /* token, head */
    float scales[2][2];
    for (int i = 0; i < DIM; i++) {
        elements[0][0][i] = (float)(i - 100);
        elements[0][1][i] = 0.0f;
        elements[1][0][i] = i == 7 ? NAN : 1e-3f * (float)i;
        elements[1][1][i] = i == 9 ? -INFINITY : 1.0f;
    }
    for (size_t f = 0; f < FORMATS; f++) {
        struct kvp_plane_view plane = plane_of(codes, formats[f], DIM);
        plane.heads = 2;
        plane.token_stride = plane.page_stride = 2 * DIM;
        struct kvp_plane_view scale_plane = {scales, 8, 8, 4, 2, 1, KVP_DTYPE_F32, 0};
        struct kvp_token_view source = {elements, sizeof elements[0], sizeof elements[0][0]};
        struct kvp_quant_append_args args = {
            .planes = &plane,
            .sources = &source,
            .n_planes = 1,
            .pages = 2,
            .page_tokens = 1,
            .source_dtype = KVP_DTYPE_F32,
            .scale_mode = KVP_SCALE_COMPUTED,
            .scale_planes = &scale_plane,
            .at = address_of(2),
        };
        ck_assert_int_eq(kvp_host_quant_append(&args, 1), KVP_OK);
        uint8_t top = formats[f] == KVP_DTYPE_FP8_E4M3 ? 0x7e : 0x7b;
        ck_assert_float_eq(scales[0][0], 155.0f / largest[f]);
        ck_assert_uint_eq(codes[255], top);
        ck_assert_float_eq(scales[0][1], 1.0f);
        ck_assert_uint_eq(codes[DIM + 3], 0);
        ck_assert_float_eq(scales[1][0], 1e-3f * 255.0f / largest[f]);
        ck_assert_uint_eq(codes[2 * DIM + 7], 0x7f);
        ck_assert_uint_eq(codes[2 * DIM + 255], top);
        ck_assert_float_eq(scales[1][1], 0x1.fffffep127f / largest[f]);
        ck_assert_uint_eq(codes[3 * DIM + 9], top | 0x80);
    }
}
END_TEST

int main(void)
{
    TCase *fp8 = tcase_create("fp8");
    tcase_set_timeout(fp8, 60);
    tcase_add_test(fp8, every_half_becomes_the_nearest_fp8);
    tcase_add_test(fp8, every_bfloat_becomes_the_nearest_fp8);
    tcase_add_test(fp8, floats_at_and_beside_each_rounding_border_become_the_nearest_fp8);
    tcase_add_test(fp8, what_is_over_the_range_saturates_and_nan_stays_nan);
    tcase_add_test(fp8, every_fp8_comes_back_as_its_value_in_each_wide_type);
    tcase_add_test(fp8, quantising_what_was_dequantised_gives_the_same_code);
    tcase_add_test(fp8, a_computed_scale_makes_the_largest_element_the_largest_number);
    Suite *suite = suite_create("kernels_fp8");
    suite_add_tcase(suite, fp8);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
