/**
 * The layout rule of kvp_layout.h: check a geometry, place its planes, digest it.
 *
 * All sums are 64-bit and checked; the limits of kvp_limits.h keep one plane's page below 2^41 bytes, so only sums over
 * pages and planes can overflow.
 */
#include "kvp_layout.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#define LAYOUT_RULE_VERSION 1u
#define TENSOR_ALIGN        256u
#define PLANE_ALIGN         16u
#define SLAB_BYTES_MAX      ((uint64_t)INT64_MAX)

struct text {
    char *buffer;
    size_t bytes;
};

__attribute__((format(printf, 3, 4))) static enum kvp_status refuse(struct text *text, enum kvp_status status,
                                                                    const char *format, ...)
{
    va_list list;

    if (text->buffer && text->bytes) {
        va_start(list, format);
        vsnprintf(text->buffer, text->bytes, format, list);
        va_end(list);
    }
    return status;
}

uint32_t kvp_dtype_bytes(uint32_t dtype)
{
    switch (dtype) {
    case KVP_DTYPE_F32:
        return 4;
    case KVP_DTYPE_F16:
    case KVP_DTYPE_BF16:
        return 2;
    case KVP_DTYPE_FP8_E4M3:
    case KVP_DTYPE_FP8_E5M2:
    case KVP_DTYPE_U8:
        return 1;
    default:
        return 0;
    }
}

static enum kvp_status check_plane(const struct kvp_layout_spec *spec, uint32_t p, struct text *text)
{
    const struct kvp_plane_spec *plane = &spec->planes[p];

    if (plane->component < KVP_COMPONENT_K || plane->component > KVP_COMPONENT_KPE)
        return refuse(text, KVP_EINVAL, "plane %u: component %u is none of K, V, CKV, KPE", p, plane->component);
    if (plane->heads < 1 || plane->heads > KVP_HEADS_MAX)
        return refuse(text, KVP_EINVAL, "plane %u: heads %u is not in 1..%u", p, plane->heads, KVP_HEADS_MAX);
    if (plane->dim < 1 || plane->dim > KVP_DIM_MAX)
        return refuse(text, KVP_EINVAL, "plane %u: dim %u is not in 1..%u", p, plane->dim, KVP_DIM_MAX);
    if (!kvp_dtype_bytes(plane->dtype))
        return refuse(text, KVP_EINVAL, "plane %u: dtype %u is unknown", p, plane->dtype);
    for (uint32_t q = 0; q < p; q++) {
        if (spec->planes[q].layer == plane->layer && spec->planes[q].component == plane->component)
            return refuse(text, KVP_EINVAL, "planes %u and %u are the same component %u of layer %u", q, p,
                          plane->component, plane->layer);
    }
    return KVP_OK;
}

static enum kvp_status check_spec(const struct kvp_layout_spec *spec, struct text *text)
{
    enum kvp_status status;

    if (spec->pages < 1 || spec->pages > KVP_PAGES_MAX)
        return refuse(text, KVP_EINVAL, "pages %u is not in 1..%u", spec->pages, KVP_PAGES_MAX);
    if (spec->page_tokens < 1 || spec->page_tokens > KVP_PAGE_TOKENS_MAX)
        return refuse(text, KVP_EINVAL, "page_tokens %u is not in 1..%u", spec->page_tokens, KVP_PAGE_TOKENS_MAX);
    if (spec->n_planes < 1 || spec->n_planes > KVP_PLANES_MAX)
        return refuse(text, KVP_EINVAL, "%u planes is not in 1..%u", spec->n_planes, KVP_PLANES_MAX);
    if (spec->order != KVP_ORDER_NHD && spec->order != KVP_ORDER_HND)
        return refuse(text, KVP_EINVAL, "order %u is neither NHD nor HND", spec->order);
    if (spec->placement != KVP_PLACEMENT_LAYER && spec->placement != KVP_PLACEMENT_PAGE)
        return refuse(text, KVP_EINVAL, "placement %u is neither layer nor page", spec->placement);
    if (spec->joined > 1)
        return refuse(text, KVP_EINVAL, "joined %u is neither 0 nor 1", spec->joined);
    if (spec->joined && spec->placement != KVP_PLACEMENT_LAYER)
        return refuse(text, KVP_EINVAL, "joined goes with placement layer only");
    for (uint32_t p = 0; p < spec->n_planes; p++) {
        status = check_plane(spec, p, text);
        if (status != KVP_OK)
            return status;
    }
    return KVP_OK;
}

static uint64_t token_bytes(const struct kvp_plane_spec *plane)
{
    return (uint64_t)plane->heads * plane->dim * kvp_dtype_bytes(plane->dtype);
}

/* The strides within a page of a plane that lies by itself. */
static void place_in_page(const struct kvp_layout_spec *spec, uint32_t p, struct kvp_plane_layout *ret)
{
    const struct kvp_plane_spec *plane = &spec->planes[p];
    uint64_t head_bytes = (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);

    if (spec->order == KVP_ORDER_NHD) {
        ret->head_stride = head_bytes;
        ret->token_stride = head_bytes * plane->heads;
    } else {
        ret->head_stride = head_bytes * spec->page_tokens;
        ret->token_stride = head_bytes;
    }
}

/* The plane that p lies joined with, or p. The answer is the same from both sides. */
static uint32_t partner_of(const struct kvp_layout_spec *spec, uint32_t p)
{
    static const uint32_t other[] = {0, KVP_COMPONENT_V, KVP_COMPONENT_K, KVP_COMPONENT_KPE, KVP_COMPONENT_CKV};
    const struct kvp_plane_spec *a = &spec->planes[p], *b;

    if (!spec->joined)
        return p;
    for (uint32_t q = 0; q < spec->n_planes; q++) {
        b = &spec->planes[q];
        if (b->layer != a->layer || b->component != other[a->component])
            continue;
        if (a->dtype != b->dtype || a->heads != b->heads)
            return p;
        if (a->component <= KVP_COMPONENT_V)
            return a->dim == b->dim ? q : p;
        return a->heads == 1 ? q : p;
    }
    return p;
}

/* *total rounded up to align, its old value out, then `bytes` more; false on overflow. */
static int take(uint64_t *total, uint64_t align, uint64_t bytes, uint64_t *ret_offset)
{
    uint64_t offset, end;

    if (__builtin_add_overflow(*total, align - 1, &offset))
        return 0;
    offset -= offset % align;
    if (__builtin_add_overflow(offset, bytes, &end) || end > SLAB_BYTES_MAX)
        return 0;
    *ret_offset = offset;
    *total = end;
    return 1;
}

static enum kvp_status place_by_layer(const struct kvp_layout_spec *spec, struct kvp_plane_layout *planes,
                                      struct kvp_layout_totals *totals, struct text *text)
{
    for (uint32_t p = 0; p < spec->n_planes; p++) {
        uint32_t q = partner_of(spec, p), first, second;
        uint64_t page_bytes = token_bytes(&spec->planes[p]) * spec->page_tokens, both, bytes, offset;
        int mla = spec->planes[p].component >= KVP_COMPONENT_CKV;

        totals->page_bytes += page_bytes;
        if (q < p)
            continue; /* placed with its partner */
        both = q == p ? page_bytes : page_bytes + token_bytes(&spec->planes[q]) * spec->page_tokens;
        if (__builtin_mul_overflow(both, (uint64_t)spec->pages, &bytes) ||
            !take(&totals->slab_bytes, TENSOR_ALIGN, bytes, &offset))
            return refuse(text, KVP_ELIMIT, "the slab of %u pages passes the limit of %llu bytes at plane %u",
                          spec->pages, (unsigned long long)SLAB_BYTES_MAX, p);
        first = spec->planes[p].component < spec->planes[q].component ? p : q;
        second = first == p ? q : p;
        place_in_page(spec, first, &planes[first]);
        planes[first].offset = offset;
        planes[first].page_stride = both;
        if (q == p)
            continue;
        place_in_page(spec, second, &planes[second]);
        planes[second].page_stride = both;
        if (mla) { /* one [P, T, ckv + kpe] tensor; 1 head, so the order is no matter */
            planes[second].offset = offset + token_bytes(&spec->planes[first]);
            planes[first].token_stride = planes[second].token_stride = both / spec->page_tokens;
            planes[first].head_stride = token_bytes(&spec->planes[first]);
            planes[second].head_stride = token_bytes(&spec->planes[second]);
        } else {
            planes[second].offset = offset + page_bytes;
        }
    }
    return KVP_OK;
}

static enum kvp_status place_by_page(const struct kvp_layout_spec *spec, struct kvp_plane_layout *planes,
                                     struct kvp_layout_totals *totals, struct text *text)
{
    uint64_t stride = 0, padded, bytes;

    for (uint32_t p = 0; p < spec->n_planes; p++) {
        uint64_t page_bytes = token_bytes(&spec->planes[p]) * spec->page_tokens;

        place_in_page(spec, p, &planes[p]);
        if (!take(&stride, PLANE_ALIGN, page_bytes, &planes[p].offset))
            return refuse(text, KVP_ELIMIT, "a page passes the limit of %llu bytes at plane %u",
                          (unsigned long long)SLAB_BYTES_MAX, p);
        totals->page_bytes += page_bytes;
    }
    padded = (stride + TENSOR_ALIGN - 1) / TENSOR_ALIGN * TENSOR_ALIGN;
    if ((padded - stride) > stride / 64)
        padded = (stride + PLANE_ALIGN - 1) / PLANE_ALIGN * PLANE_ALIGN;
    if (__builtin_mul_overflow(padded, (uint64_t)spec->pages, &bytes) || bytes > SLAB_BYTES_MAX)
        return refuse(text, KVP_ELIMIT, "%u pages of %llu bytes pass the limit of %llu bytes", spec->pages,
                      (unsigned long long)padded, (unsigned long long)SLAB_BYTES_MAX);
    for (uint32_t p = 0; p < spec->n_planes; p++)
        planes[p].page_stride = padded;
    totals->slab_bytes = bytes;
    return KVP_OK;
}

enum kvp_status kvp_layout_compute(const struct kvp_layout_spec *spec, struct kvp_plane_layout *ret_planes,
                                   struct kvp_layout_totals *ret_totals, char *reterr_text, size_t text_bytes)
{
    struct text text = {reterr_text, text_bytes};
    struct kvp_layout_totals totals = {0, 0};
    enum kvp_status status;

    status = check_spec(spec, &text);
    if (status != KVP_OK)
        return status;
    memset(ret_planes, 0, spec->n_planes * sizeof(*ret_planes));
    if (spec->placement == KVP_PLACEMENT_LAYER)
        status = place_by_layer(spec, ret_planes, &totals, &text);
    else
        status = place_by_page(spec, ret_planes, &totals, &text);
    if (status == KVP_OK && ret_totals)
        *ret_totals = totals;
    return status;
}

void kvp_layout_digest(const struct kvp_layout_spec *spec, uint64_t ret_digest[2])
{
    unsigned char words[4 * (7 + 5 * KVP_PLANES_MAX)], *out = words;
    const uint32_t head[] = {LAYOUT_RULE_VERSION, spec->pages,     spec->page_tokens, spec->n_planes,
                             spec->order,         spec->placement, spec->joined};
    XXH128_hash_t hash;

    for (size_t i = 0; i < sizeof(head) / sizeof(head[0]); i++, out += 4) {
        for (int b = 0; b < 4; b++)
            out[b] = (unsigned char)(head[i] >> (8 * b));
    }
    for (uint32_t p = 0; p < spec->n_planes && p < KVP_PLANES_MAX; p++) {
        const struct kvp_plane_spec *plane = &spec->planes[p];
        const uint32_t fields[] = {plane->layer, plane->component, plane->heads, plane->dim, plane->dtype};

        for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++, out += 4) {
            for (int b = 0; b < 4; b++)
                out[b] = (unsigned char)(fields[i] >> (8 * b));
        }
    }
    hash = XXH3_128bits(words, (size_t)(out - words));
    ret_digest[0] = hash.low64;
    ret_digest[1] = hash.high64;
}
