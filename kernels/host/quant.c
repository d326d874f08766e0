/**
 * Quantising append and dequantising gather on the host.
 *
 * Tokens are taken in blocks as append.c takes them; a token is then converted row by row, a row being one head, or all
 * heads of a token where they lie dense on both sides and share a scale. Any thread may call; large calls are shared
 * out over threads.
 */
#include "../kvp_check.h"
#include "address.h"
#include "pages.h"
#include "parallel.h"
#include "rows.h"

/* Both directions in one form. */
struct conversion {
    const struct kvp_plane_view *planes;
    const struct kvp_token_view *flats;
    uint32_t n_planes;
    uint32_t wide_bytes; /* of an element of the flat tensors */
    uint32_t scale_mode;
    const float *const *scales;
    const struct kvp_plane_view *scale_planes;
    struct kvp_pool_shape shape;
    const struct kvp_address *at;
    kvp_quantise_row quantise; /* NULL: gather */
    kvp_amax_row amax;
    kvp_dequantise_row dequantise;
    float largest; /* of the fp8 format */
};

static float *stored_scale(const struct conversion *job, uint32_t p, struct kvp_place place, uint32_t head)
{
    const struct kvp_plane_view *view = &job->scale_planes[p];
    return (float *)((char *)view->base + (int64_t)place.page * view->page_stride +
                     (int64_t)place.offset * view->token_stride + (int64_t)head * view->head_stride);
}

static float computed_scale(const struct conversion *job, const void *row, uint64_t n)
{
    float scale = job->amax(row, n) / job->largest;
    return scale == 0.0f ? 1.0f : scale;
}

static float scale_of_head(const struct conversion *job, uint32_t p, struct kvp_place place, uint32_t head)
{
    switch (job->scale_mode) {
    case KVP_SCALE_TENSOR:
        return job->scales[p][0];
    case KVP_SCALE_HEAD:
        return job->scales[p][head];
    case KVP_SCALE_COMPUTED:
        return *stored_scale(job, p, place, head);
    default:
        return 1.0f;
    }
}

static void convert_token(const struct conversion *job, uint32_t p, uint64_t token, struct kvp_place place)
{
    const struct kvp_plane_view *plane = &job->planes[p];
    const struct kvp_token_view *flat = &job->flats[p];
    uint8_t *pool =
        (uint8_t *)plane->base + (int64_t)place.page * plane->page_stride + (int64_t)place.offset * plane->token_stride;
    char *wide = (char *)flat->base + (int64_t)token * flat->token_stride;
    uint32_t heads = plane->heads;
    uint64_t n = plane->dim;
    int one_scale = job->scale_mode == KVP_SCALE_NONE || job->scale_mode == KVP_SCALE_TENSOR;
    if (one_scale && plane->head_stride == (int64_t)n && flat->head_stride == (int64_t)(n * job->wide_bytes)) {
        n *= heads;
        heads = 1;
    }
    for (uint32_t h = 0; h < heads; h++) {
        uint8_t *narrow_row = pool + (int64_t)h * plane->head_stride;
        void *wide_row = wide + (int64_t)h * flat->head_stride;
        if (job->quantise == NULL) {
            job->dequantise(wide_row, narrow_row, n, scale_of_head(job, p, place, h));
            continue;
        }
        if (job->scale_mode == KVP_SCALE_COMPUTED)
            *stored_scale(job, p, place, h) = computed_scale(job, wide_row, n);
        job->quantise(narrow_row, wide_row, n, scale_of_head(job, p, place, h));
    }
}

static void convert_range(void *context, uint64_t first, uint64_t last)
{
    const struct conversion *job = context;
    struct kvp_place places[KVP_RESOLVE_TOKENS];
    while (first < last) {
        uint32_t n = last - first < KVP_RESOLVE_TOKENS ? (uint32_t)(last - first) : KVP_RESOLVE_TOKENS;
        kvp_resolve(job->at, &job->shape, first, n, places);
        for (uint32_t p = 0; p < job->n_planes; p++) {
            for (uint32_t i = 0; i < n; i++) {
                if (places[i].page != KVP_NO_PLACE)
                    convert_token(job, p, first + i, places[i]);
            }
        }
        first += n;
    }
}

static void convert_tokens(struct conversion *job, int threads)
{
    uint64_t tokens = kvp_address_tokens(job->at);
    uint64_t token_bytes = 0;
    for (uint32_t p = 0; p < job->n_planes; p++)
        token_bytes += kvp_token_bytes(&job->planes[p]) * job->wide_bytes;
    kvp_host_parallel(threads, tokens, 16, tokens * token_bytes, convert_range, job);
}

enum kvp_status kvp_host_quant_append(const struct kvp_quant_append_args *args, int threads)
{
    enum kvp_status status = kvp_check_quant_append(args);
    if (status != KVP_OK)
        return status;
    uint32_t fp8 = args->planes[0].dtype;
    struct conversion job = {
        .planes = args->planes,
        .flats = args->sources,
        .n_planes = args->n_planes,
        .wide_bytes = kvp_dtype_bytes(args->source_dtype),
        .scale_mode = args->scale_mode,
        .scales = args->scales,
        .scale_planes = args->scale_planes,
        .shape = {.pages = args->pages, .page_tokens = args->page_tokens, .errors = args->errors},
        .at = &args->at,
        .quantise = kvp_quantise_row_for(args->source_dtype, fp8),
        .amax = kvp_amax_row_for(args->source_dtype),
        .largest = fp8 == KVP_DTYPE_FP8_E4M3 ? 448.0f : 57344.0f,
    };
    convert_tokens(&job, threads);
    return KVP_OK;
}

enum kvp_status kvp_host_gather(const struct kvp_gather_args *args, int threads)
{
    enum kvp_status status = kvp_check_gather(args);
    if (status != KVP_OK)
        return status;
    if (args->dtype == 0) {
        kvp_gather_bytes(args, threads);
        return KVP_OK;
    }
    struct conversion job = {
        .planes = args->planes,
        .flats = args->destinations,
        .n_planes = args->n_planes,
        .wide_bytes = kvp_dtype_bytes(args->dtype),
        .scale_mode = args->scale_mode,
        .scales = args->scales,
        .scale_planes = args->scale_planes,
        .shape = {.pages = args->pages, .page_tokens = args->page_tokens, .errors = args->errors},
        .at = &args->at,
        .dequantise = kvp_dequantise_row_for(args->dtype, args->planes[0].dtype),
    };
    convert_tokens(&job, threads);
    return KVP_OK;
}
