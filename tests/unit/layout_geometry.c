/**
 * The layout rule, as daemon, executor and client rely on it: offsets and strides, refusals, the digest.
 *
 * Strides are compared with numbers worked out by hand, and with the rule that no two elements of a pool may share a
 * byte, which is checked by marking every byte.
 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "kvp_layout.h"

static struct kvp_plane_spec planes[KVP_PLANES_MAX];
static struct kvp_plane_layout layout[KVP_PLANES_MAX];
static struct kvp_layout_totals totals;
static struct kvp_layout_spec spec;
static char text[200];

/* Two layers of K and V: 10 pages of 16 tokens, 8 heads of 128 halves. */
static void setup(void)
{
    for (uint32_t p = 0; p < 4; p++)
        planes[p] = (struct kvp_plane_spec){p / 2, KVP_COMPONENT_K + p % 2, 8, 128, KVP_DTYPE_F16};
    spec = (struct kvp_layout_spec){10, 16, 4, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, 0, planes};
    memset(&totals, 0, sizeof totals);
    strcpy(text, "");
}

static enum kvp_status compute(void)
{
    return kvp_layout_compute(&spec, layout, &totals, text, sizeof text);
}

static void assert_plane(uint32_t p, uint64_t offset, uint64_t page, uint64_t token, uint64_t head)
{
    ck_assert_uint_eq(layout[p].offset, offset);
    ck_assert_uint_eq(layout[p].page_stride, page);
    ck_assert_uint_eq(layout[p].token_stride, token);
    ck_assert_uint_eq(layout[p].head_stride, head);
}

START_TEST(nhd_by_layer_makes_each_plane_a_tensor_of_its_own)
{
    ck_assert_int_eq(compute(), KVP_OK);
    for (uint32_t p = 0; p < 4; p++)
        assert_plane(p, p * 327680, 32768, 2048, 256);
    ck_assert_uint_eq(totals.slab_bytes, 4 * 327680);
    ck_assert_uint_eq(totals.page_bytes, 4 * 32768);
}
END_TEST

START_TEST(hnd_swaps_the_strides_of_tokens_and_heads)
{
    spec.order = KVP_ORDER_HND;
    ck_assert_int_eq(compute(), KVP_OK);
    assert_plane(0, 0, 32768, 256, 4096);
}
END_TEST

START_TEST(joined_layers_hold_k_and_v_of_a_page_side_by_side)
{
    spec.joined = 1;
    ck_assert_int_eq(compute(), KVP_OK);
    assert_plane(0, 0, 65536, 2048, 256);
    assert_plane(1, 32768, 65536, 2048, 256);
    assert_plane(2, 655360, 65536, 2048, 256);
    assert_plane(3, 655360 + 32768, 65536, 2048, 256);
}
END_TEST

START_TEST(planes_of_different_shapes_are_not_joined)
{
    spec.joined = 1;
    planes[1].dim = 64;
    planes[3].dtype = KVP_DTYPE_BF16;
    ck_assert_int_eq(compute(), KVP_OK);
    assert_plane(0, 0, 32768, 2048, 256);
    assert_plane(1, 327680, 16384, 1024, 128);
    ck_assert_uint_eq(layout[2].page_stride, 32768);
    ck_assert_uint_eq(layout[3].page_stride, 32768);
}
END_TEST

START_TEST(joined_mla_planes_are_one_tensor_of_both_widths)
{
    planes[0] = (struct kvp_plane_spec){0, KVP_COMPONENT_CKV, 1, 512, KVP_DTYPE_BF16};
    planes[1] = (struct kvp_plane_spec){0, KVP_COMPONENT_KPE, 1, 64, KVP_DTYPE_BF16};
    spec.n_planes = 2;
    spec.joined = 1;
    ck_assert_int_eq(compute(), KVP_OK);
    ck_assert_uint_eq(layout[0].token_stride, 1152);
    ck_assert_uint_eq(layout[1].token_stride, 1152);
    ck_assert_uint_eq(layout[1].offset, 1024);
    ck_assert_uint_eq(layout[0].page_stride, 16 * 1152);
    ck_assert_uint_eq(totals.slab_bytes, 10 * 16 * 1152);
}
END_TEST

START_TEST(by_page_all_planes_of_a_page_lie_together)
{
    spec.placement = KVP_PLACEMENT_PAGE;
    ck_assert_int_eq(compute(), KVP_OK);
    for (uint32_t p = 0; p < 4; p++)
        assert_plane(p, p * 32768, 4 * 32768, 2048, 256);
    ck_assert_uint_eq(totals.slab_bytes, 10 * 4 * 32768);
}
END_TEST

START_TEST(tensors_start_at_multiples_of_256_and_planes_of_a_page_at_16)
{
    planes[0].heads = planes[2].heads = 1;
    planes[0].dim = planes[2].dim = 3; /* 6 bytes a token: 960 bytes a plane, 96 a page */
    ck_assert_int_eq(compute(), KVP_OK);
    ck_assert_uint_eq(layout[1].offset, 1024);
    ck_assert_uint_eq(layout[3].offset % 256, 0);
    spec.placement = KVP_PLACEMENT_PAGE;
    spec.page_tokens = 1;
    ck_assert_int_eq(compute(), KVP_OK);
    ck_assert_uint_eq(layout[0].offset, 0);
    ck_assert_uint_eq(layout[1].offset, 16);
    ck_assert_uint_eq(layout[2].offset, 16 + 2048);
    ck_assert_uint_eq(layout[3].offset, 32 + 2048);
    ck_assert_uint_eq(layout[0].page_stride % 16, 0);
}
END_TEST

/* Mark every byte of every element: none twice, none outside the slab. */
static void assert_no_byte_is_shared(void)
{
    unsigned char *marks = calloc(1, totals.slab_bytes);
    uint64_t marked = 0;
    ck_assert_ptr_nonnull(marks);
    for (uint32_t p = 0; p < spec.n_planes; p++) {
        uint64_t row = planes[p].dim * kvp_dtype_bytes(planes[p].dtype);
        for (uint64_t i = 0; i < (uint64_t)spec.pages * spec.page_tokens * planes[p].heads; i++) {
            uint64_t head = i % planes[p].heads, token = i / planes[p].heads % spec.page_tokens;
            uint64_t page = i / planes[p].heads / spec.page_tokens;
            uint64_t at = layout[p].offset + page * layout[p].page_stride + token * layout[p].token_stride +
                          head * layout[p].head_stride;
            ck_assert_uint_le(at + row, totals.slab_bytes);
            ck_assert_ptr_null(memchr(marks + at, 1, row));
            memset(marks + at, 1, row);
            marked += row;
        }
    }
    ck_assert_uint_eq(marked, totals.page_bytes * spec.pages);
    free(marks);
}

START_TEST(no_two_elements_share_a_byte_in_any_layout)
{
    static const uint32_t dims[] = {1, 3, 64, 7, 80};
    for (uint32_t choice = 0; choice < 8 * 25; choice++) {
        spec.order = choice % 2 ? KVP_ORDER_NHD : KVP_ORDER_HND;
        spec.placement = choice / 2 % 2 ? KVP_PLACEMENT_LAYER : KVP_PLACEMENT_PAGE;
        spec.joined = spec.placement == KVP_PLACEMENT_LAYER && choice / 4 % 2;
        spec.pages = 5;
        spec.page_tokens = 1 + choice % 7;
        for (uint32_t p = 0; p < 4; p++) {
            int mla = choice % 3 == 0;
            planes[p].component = (mla ? KVP_COMPONENT_CKV : KVP_COMPONENT_K) + p % 2;
            planes[p].heads = mla ? 1 : 1 + (choice + p / 2) % 5;
            planes[p].dim = dims[choice / 8 % 5 * (p % 2) + choice % 5 * (1 - p % 2)];
            planes[p].dtype = KVP_DTYPE_F32 + (choice + p / 2) % 6;
        }
        ck_assert_int_eq(compute(), KVP_OK);
        assert_no_byte_is_shared();
    }
}
END_TEST

START_TEST(each_value_out_of_range_is_refused_with_the_value_and_the_limit)
{
    const struct {
        uint32_t *field;
        uint32_t value;
        const char *text;
    } cases[] = {
        {&spec.pages, 0, "pages 0 is not in 1..33554432"},
        {&spec.pages, KVP_PAGES_MAX + 1, "pages 33554433 is not in 1..33554432"},
        {&spec.page_tokens, 0, "page_tokens 0 is not in 1..4096"},
        {&spec.page_tokens, KVP_PAGE_TOKENS_MAX + 1, "page_tokens 4097 is not in 1..4096"},
        {&spec.n_planes, 0, "0 planes is not in 1..1024"},
        {&spec.n_planes, KVP_PLANES_MAX + 1, "1025 planes is not in 1..1024"},
        {&spec.order, 0, "order 0"},
        {&spec.order, 3, "order 3"},
        {&spec.placement, 0, "placement 0"},
        {&spec.placement, 3, "placement 3"},
        {&spec.joined, 2, "joined 2"},
        {&planes[2].component, 0, "plane 2: component 0"},
        {&planes[2].component, 5, "plane 2: component 5"},
        {&planes[2].heads, 0, "plane 2: heads 0 is not in 1..1024"},
        {&planes[2].heads, KVP_HEADS_MAX + 1, "plane 2: heads 1025 is not in 1..1024"},
        {&planes[3].dim, 0, "plane 3: dim 0 is not in 1..65536"},
        {&planes[3].dim, KVP_DIM_MAX + 1, "plane 3: dim 65537 is not in 1..65536"},
        {&planes[0].dtype, 0, "plane 0: dtype 0"},
        {&planes[0].dtype, 7, "plane 0: dtype 7"},
        {&planes[3].component, KVP_COMPONENT_K, "planes 2 and 3"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint32_t before = *cases[i].field;
        *cases[i].field = cases[i].value;
        strcpy(text, "");
        ck_assert_int_eq(compute(), KVP_EINVAL);
        ck_assert_msg(strstr(text, cases[i].text) != NULL, "\"%s\" does not say \"%s\"", text, cases[i].text);
        *cases[i].field = before;
    }
    ck_assert_int_eq(compute(), KVP_OK);
    spec.placement = KVP_PLACEMENT_PAGE;
    spec.joined = 1;
    ck_assert_int_eq(compute(), KVP_EINVAL);
    ck_assert_ptr_nonnull(strstr(text, "joined"));
}
END_TEST

START_TEST(a_slab_that_64_bits_can_not_hold_is_refused_in_every_placement)
{
    spec.pages = KVP_PAGES_MAX;
    spec.page_tokens = KVP_PAGE_TOKENS_MAX;
    for (uint32_t p = 0; p < 4; p++) {
        planes[p].heads = KVP_HEADS_MAX;
        planes[p].dim = KVP_DIM_MAX;
    }
    for (uint32_t choice = 0; choice < 3; choice++) {
        spec.placement = choice == 2 ? KVP_PLACEMENT_PAGE : KVP_PLACEMENT_LAYER;
        spec.joined = choice == 1;
        ck_assert_int_eq(compute(), KVP_ELIMIT);
        ck_assert_ptr_nonnull(strstr(text, "limit of 9223372036854775807 bytes"));
    }
    spec.pages = 1u << 20; /* each plane fits in 2^59 bytes; sixteen of them do not fit together */
    spec.placement = KVP_PLACEMENT_LAYER;
    spec.joined = 0;
    spec.n_planes = 16;
    for (uint32_t p = 0; p < 16; p++)
        planes[p] = (struct kvp_plane_spec){p, KVP_COMPONENT_K, KVP_HEADS_MAX, KVP_DIM_MAX, KVP_DTYPE_F16};
    ck_assert_int_eq(compute(), KVP_ELIMIT);
    ck_assert_ptr_nonnull(strstr(text, "at plane 15"));
    spec.n_planes = 15;
    ck_assert_int_eq(compute(), KVP_OK);
    ck_assert_uint_eq(totals.slab_bytes, 15ull << 59);
}
END_TEST

START_TEST(a_short_text_buffer_or_none_is_respected)
{
    char small[8];
    memset(small, 'x', sizeof small);
    spec.pages = 0;
    ck_assert_int_eq(kvp_layout_compute(&spec, layout, NULL, small, 5), KVP_EINVAL);
    ck_assert_str_eq(small, "page");
    ck_assert_int_eq(small[5], 'x');
    ck_assert_int_eq(kvp_layout_compute(&spec, layout, NULL, NULL, 0), KVP_EINVAL);
}
END_TEST

START_TEST(the_digest_of_a_geometry_is_the_same_in_every_release)
{
    uint64_t digest[2];
    kvp_layout_digest(&spec, digest);
    ck_assert_uint_eq(digest[0], 0xda5c31e91e08c30eull);
    ck_assert_uint_eq(digest[1], 0x119800002dc43f10ull);
}
END_TEST

START_TEST(the_digest_tells_any_field_apart)
{
    uint32_t *fields[] = {
        &spec.pages,      &spec.page_tokens,    &spec.order,      &spec.placement, &spec.joined,
        &planes[0].layer, &planes[1].component, &planes[1].heads, &planes[3].dim,  &planes[3].dtype,
    };
    uint64_t before[2], after[2];
    kvp_layout_digest(&spec, before);
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        *fields[i] += 1;
        kvp_layout_digest(&spec, after);
        ck_assert(after[0] != before[0] && after[1] != before[1]);
        *fields[i] -= 1;
    }
    spec.n_planes = 3;
    kvp_layout_digest(&spec, after);
    ck_assert(after[0] != before[0] && after[1] != before[1]);
    spec.n_planes = 4;
    kvp_layout_digest(&spec, after);
    ck_assert(after[0] == before[0] && after[1] == before[1]);
}
END_TEST

START_TEST(dtypes_have_the_sizes_of_their_elements)
{
    static const uint32_t bytes[] = {0, 4, 2, 2, 1, 1, 1, 0};
    for (uint32_t dtype = 0; dtype < 8; dtype++)
        ck_assert_uint_eq(kvp_dtype_bytes(dtype), bytes[dtype]);
}
END_TEST

int main(void)
{
    TCase *geometry = tcase_create("geometry");
    tcase_add_checked_fixture(geometry, setup, NULL);
    tcase_add_test(geometry, nhd_by_layer_makes_each_plane_a_tensor_of_its_own);
    tcase_add_test(geometry, hnd_swaps_the_strides_of_tokens_and_heads);
    tcase_add_test(geometry, joined_layers_hold_k_and_v_of_a_page_side_by_side);
    tcase_add_test(geometry, planes_of_different_shapes_are_not_joined);
    tcase_add_test(geometry, joined_mla_planes_are_one_tensor_of_both_widths);
    tcase_add_test(geometry, by_page_all_planes_of_a_page_lie_together);
    tcase_add_test(geometry, tensors_start_at_multiples_of_256_and_planes_of_a_page_at_16);
    tcase_add_test(geometry, no_two_elements_share_a_byte_in_any_layout);
    tcase_add_test(geometry, each_value_out_of_range_is_refused_with_the_value_and_the_limit);
    tcase_add_test(geometry, a_slab_that_64_bits_can_not_hold_is_refused_in_every_placement);
    tcase_add_test(geometry, a_short_text_buffer_or_none_is_respected);
    tcase_add_test(geometry, the_digest_of_a_geometry_is_the_same_in_every_release);
    tcase_add_test(geometry, the_digest_tells_any_field_apart);
    tcase_add_test(geometry, dtypes_have_the_sizes_of_their_elements);
    Suite *suite = suite_create("layout");
    suite_add_tcase(suite, geometry);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
