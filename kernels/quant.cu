/**
 * Quantising append and dequantising gather: as append.cu moves bytes, these move values between wide floats and fp8.
 *
 * Planes of one shape share a launch; planes of other shapes (MLA's ckv and kpe) take another. Three kernels:
 *
 *     scale known     teams of lanes as in append.cu; a lane takes UNROLL packs of 16 elements, its head's scale is
 * read while they come scale computed  a team of 2^k lanes takes one head of one token: the packs that two rounds cover
 * stay in registers, amax goes round the team by shuffles, any further packs are read again gather          the first
 * one, the other way
 *
 * A pack is 16 elements where dim, pointers and strides allow 16-byte accesses, else one element.
 */
#include "address.cuh"
#include "fp8.cuh"
#include "gather_bytes.h"

#define UNROLL       2
#define SMALL_PLANES 4
#define MANY_PLANES  128

struct plane_pointers {
    char *plane;
    char *flat;
    char *scale; /* of the tensor, the heads, or the scale plane; NULL: 1 */
};

template <int PLANES> struct quant_params {
    struct address address;
    struct kvp_error_ring *errors;
    int64_t page_stride, token_stride, head_stride; /* of the planes */
    int64_t flat_token_stride, flat_head_stride;
    int64_t scale_page_stride, scale_token_stride, scale_head_stride;
    uint32_t scale_mode; /* enum kvp_scale_mode */
    uint32_t packs;      /* of a token; of a head where the scale is computed */
    uint32_t team_log2;
    uint32_t first_token, tokens;
    bool e5m2;
    struct fast_div chunks; /* of a token; its heads where the scale is computed */
    struct fast_div packs_per_head;
    struct fast_div blocks; /* of a plane */
    struct plane_pointers pointers[PLANES];
};

template <int PLANES>
__device__ __forceinline__ float known_scale(const quant_params<PLANES> &p, const char *scale, uint32_t head)
{
    if (p.scale_mode == KVP_SCALE_NONE)
        return 1.0f;
    return reinterpret_cast<const float *>(scale)[p.scale_mode == KVP_SCALE_HEAD ? head : 0];
}

/* Where a token lies, reported once where it lies nowhere; false: skip it. */
template <int PLANES>
__device__ __forceinline__ bool place_token(const quant_params<PLANES> &p, int64_t token, bool reporter,
                                            struct place *ret_place)
{
    if (p.address.at.nnz_device && token >= token_count(p.address))
        return false;
    *ret_place = find_place(p.address, token);
    if (ret_place->page >= 0)
        return true;
    if (ret_place->kind && reporter)
        report(p.errors, ret_place->kind, token, ret_place->value);
    return false;
}

template <int PLANES, typename S, int N>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) quant_kernel(const __grid_constant__ quant_params<PLANES> p)
{
    uint32_t plane = quotient(blockIdx.x, p.blocks), block = blockIdx.x - plane * p.blocks.divisor;
    uint32_t lane = threadIdx.x & ((1u << p.team_log2) - 1);
    uint32_t item = block * (KVP_BLOCK_THREADS >> p.team_log2) + (threadIdx.x >> p.team_log2);
    uint32_t local = quotient(item, p.chunks), chunk = item - local * p.chunks.divisor;
    uint32_t first = (chunk * UNROLL << p.team_log2) + lane;
    int64_t token = (int64_t)p.first_token + local;
    const struct plane_pointers &pointers = p.pointers[plane];
    uint32_t head[UNROLL], rest[UNROLL];
    struct place place;
    pack<S, N> data[UNROLL];
    float scale[UNROLL];

    if (local >= p.tokens)
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        uint32_t v = first + ((uint32_t)u << p.team_log2);

        head[u] = quotient(v, p.packs_per_head);
        rest[u] = (v - head[u] * p.packs_per_head.divisor) * N;
        scale[u] = 1.0f;
        if (v < p.packs) {
            data[u] = load_pack<pack<S, N>>(pointers.flat + token * p.flat_token_stride + head[u] * p.flat_head_stride +
                                            rest[u] * sizeof(S));
            scale[u] = known_scale(p, pointers.scale, head[u]);
        }
    }
    if (!place_token(p, token, plane == 0 && first == 0, &place))
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (first + ((uint32_t)u << p.team_log2) < p.packs)
            store_pack(pointers.plane + place.page * p.page_stride + place.offset * p.token_stride +
                           head[u] * p.head_stride + rest[u],
                       quantise<S, N>(data[u], divisor_of(scale[u]), p.e5m2));
    }
}

/* The largest magnitude: NaN ignored, infinity counted as FLT_MAX. */
template <typename S, int N> __device__ __forceinline__ float amax_of(const pack<S, N> &x, float amax)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        amax =
            fmaxf(amax, fminf(fabsf(to_float(x.value[i])), to_float(x.value[i]) == to_float(x.value[i]) ? FLT_MAX : 0));
    return amax;
}

template <int PLANES, typename S, int N>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS)
    quant_computed_kernel(const __grid_constant__ quant_params<PLANES> p)
{
    uint32_t plane = quotient(blockIdx.x, p.blocks), block = blockIdx.x - plane * p.blocks.divisor;
    uint32_t team = 1u << p.team_log2, lane = threadIdx.x & (team - 1);
    uint32_t item = block * (KVP_BLOCK_THREADS >> p.team_log2) + (threadIdx.x >> p.team_log2);
    uint32_t local = quotient(item, p.chunks), head = item - local * p.chunks.divisor;
    int64_t token = (int64_t)p.first_token + local;
    const struct plane_pointers &pointers = p.pointers[plane];
    const char *from = pointers.flat + token * p.flat_token_stride + head * p.flat_head_stride;
    bool live = local < p.tokens;
    pack<S, N> data[UNROLL];
    struct place place;
    struct divisor d;
    float amax = 0, scale;
    char *to;

#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (live && lane + u * team < p.packs)
            data[u] = load_pack<pack<S, N>>(from + (lane + u * team) * (N * sizeof(S)));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (live && lane + u * team < p.packs)
            amax = amax_of<S, N>(data[u], amax);
    }
    for (uint32_t v = lane + UNROLL * team; live && v < p.packs; v += team)
        amax = amax_of<S, N>(load_pack<pack<S, N>>(from + v * (N * sizeof(S))), amax);
    for (uint32_t step = team / 2; step; step /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    if (!live || !place_token(p, token, plane == 0 && head == 0 && lane == 0, &place))
        return;
    scale = __fdiv_rn(amax, p.e5m2 ? 57344.0f : 448.0f);
    scale = scale == 0 ? 1.0f : scale;
    if (lane == 0)
        *reinterpret_cast<float *>(pointers.scale + place.page * p.scale_page_stride +
                                   place.offset * p.scale_token_stride + head * p.scale_head_stride) = scale;
    d = divisor_of(scale);
    to = pointers.plane + place.page * p.page_stride + place.offset * p.token_stride + head * p.head_stride;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (lane + u * team < p.packs)
            store_pack(to + (lane + u * team) * N, quantise<S, N>(data[u], d, p.e5m2));
    }
    for (uint32_t v = lane + UNROLL * team; v < p.packs; v += team)
        store_pack(to + v * N, quantise<S, N>(load_pack<pack<S, N>>(from + v * (N * sizeof(S))), d, p.e5m2));
}

template <int PLANES, typename S, int N>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) dequant_kernel(const __grid_constant__ quant_params<PLANES> p)
{
    uint32_t plane = quotient(blockIdx.x, p.blocks), block = blockIdx.x - plane * p.blocks.divisor;
    uint32_t lane = threadIdx.x & ((1u << p.team_log2) - 1);
    uint32_t item = block * (KVP_BLOCK_THREADS >> p.team_log2) + (threadIdx.x >> p.team_log2);
    uint32_t local = quotient(item, p.chunks), chunk = item - local * p.chunks.divisor;
    uint32_t first = (chunk * UNROLL << p.team_log2) + lane;
    int64_t token = (int64_t)p.first_token + local;
    const struct plane_pointers &pointers = p.pointers[plane];
    struct place place;

    if (local >= p.tokens || !place_token(p, token, plane == 0 && first == 0, &place))
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        uint32_t v = first + ((uint32_t)u << p.team_log2), head = quotient(v, p.packs_per_head);
        uint32_t rest = (v - head * p.packs_per_head.divisor) * N;
        float scale;

        if (v >= p.packs)
            break;
        if (p.scale_mode == KVP_SCALE_COMPUTED)
            scale = *reinterpret_cast<const float *>(pointers.scale + place.page * p.scale_page_stride +
                                                     place.offset * p.scale_token_stride + head * p.scale_head_stride);
        else
            scale = known_scale(p, pointers.scale, head);
        store_pack(
            pointers.flat + token * p.flat_token_stride + head * p.flat_head_stride + rest * sizeof(S),
            dequantise<S, N>(load_pack<pack<uint8_t, N>>(pointers.plane + place.page * p.page_stride +
                                                         place.offset * p.token_stride + head * p.head_stride + rest),
                             scale, p.e5m2));
    }
}

/* ---- the host's part ------------------------------------------------------------------------------------------ */

enum direction {
    QUANT,
    QUANT_COMPUTED,
    DEQUANT,
};

/* One call's arguments, of either direction. */
struct call {
    const struct kvp_plane_view *planes;
    const struct kvp_token_view *flat;
    const float *const *scales;
    const struct kvp_plane_view *scale_planes;
    const struct kvp_address *at;
    struct kvp_error_ring *errors;
    uint32_t n_planes, pages, page_tokens;
    uint32_t wide_dtype; /* of the flat tensors */
    uint32_t scale_mode;
    enum direction direction;
    uint32_t pack; /* elements: 16 or 1 */
    void *stream;
};

static bool same_shape(const struct call *call, uint32_t a, uint32_t b)
{
    const struct kvp_plane_view *p = &call->planes[a], *q = &call->planes[b];

    if (p->page_stride != q->page_stride || p->token_stride != q->token_stride || p->head_stride != q->head_stride ||
        p->heads != q->heads || p->dim != q->dim || call->flat[a].token_stride != call->flat[b].token_stride ||
        call->flat[a].head_stride != call->flat[b].head_stride)
        return false;
    if (call->scale_mode != KVP_SCALE_COMPUTED)
        return true;
    p = &call->scale_planes[a];
    q = &call->scale_planes[b];
    return p->page_stride == q->page_stride && p->token_stride == q->token_stride && p->head_stride == q->head_stride;
}

template <int PLANES> static void set_shape(const struct call *call, uint32_t plane, quant_params<PLANES> *p)
{
    const struct kvp_plane_view *view = &call->planes[plane];
    uint32_t head_packs = view->dim / call->pack, team = 1;

    p->page_stride = view->page_stride;
    p->token_stride = view->token_stride;
    p->head_stride = view->head_stride;
    p->flat_token_stride = call->flat[plane].token_stride;
    p->flat_head_stride = call->flat[plane].head_stride;
    p->scale_page_stride = p->scale_token_stride = p->scale_head_stride = 0;
    if (call->scale_mode == KVP_SCALE_COMPUTED) {
        p->scale_page_stride = call->scale_planes[plane].page_stride;
        p->scale_token_stride = call->scale_planes[plane].token_stride;
        p->scale_head_stride = call->scale_planes[plane].head_stride;
    }
    p->packs_per_head = fast_div_of(head_packs);
    if (call->direction == QUANT_COMPUTED) {
        while (team < 32 && team < head_packs)
            team *= 2;
        p->packs = head_packs;
        p->chunks = fast_div_of(view->heads);
    } else {
        p->packs = head_packs * view->heads;
        while (team < 32 && team * UNROLL < p->packs)
            team *= 2;
        p->chunks = fast_div_of((p->packs + team * UNROLL - 1) / (team * UNROLL));
    }
    p->team_log2 = (uint32_t)__builtin_ctz(team);
    p->scale_mode = call->scale_mode;
    p->e5m2 = view->dtype == KVP_DTYPE_FP8_E5M2;
}

template <int PLANES, typename S, int N>
static enum kvp_status launch_direction(const quant_params<PLANES> &p, uint32_t blocks, const struct call *call)
{
    switch (call->direction) {
    case QUANT:
        return launch(quant_kernel<PLANES, S, N>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    case QUANT_COMPUTED:
        return launch(quant_computed_kernel<PLANES, S, N>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    default:
        return launch(dequant_kernel<PLANES, S, N>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    }
}

template <int PLANES, typename S>
static enum kvp_status launch_pack(const quant_params<PLANES> &p, uint32_t blocks, const struct call *call)
{
    return call->pack == 16 ? launch_direction<PLANES, S, 16>(p, blocks, call)
                            : launch_direction<PLANES, S, 1>(p, blocks, call);
}

/* Launch the `n` planes of one shape that `members` names, in as many launches as their tokens need. */
template <int PLANES>
static enum kvp_status launch_members(const struct call *call, const uint32_t *members, uint32_t n,
                                      struct kvp_error_ring *errors)
{
    uint32_t tokens = (uint32_t)call->at->nnz, items_per_block, share;
    enum kvp_status status = KVP_OK;
    quant_params<PLANES> p;

    p.address = address_of(call->at, call->pages, call->page_tokens);
    p.errors = errors;
    set_shape(call, members[0], &p);
    for (uint32_t i = 0; i < n; i++) {
        const void *scale = NULL;

        if (call->scale_mode == KVP_SCALE_COMPUTED)
            scale = call->scale_planes[members[i]].base;
        else if (call->scale_mode != KVP_SCALE_NONE)
            scale = call->scales[members[i]];
        p.pointers[i] = {static_cast<char *>(call->planes[members[i]].base),
                         static_cast<char *>(call->flat[members[i]].base), (char *)const_cast<void *>(scale)};
    }
    for (uint32_t i = n; i < PLANES; i++)
        p.pointers[i] = {nullptr, nullptr, nullptr};
    items_per_block = KVP_BLOCK_THREADS >> p.team_log2;
    share = (1u << 30) / n / p.chunks.divisor;
    share = share ? share : 1;
    for (p.first_token = 0; status == KVP_OK && p.first_token < tokens; p.first_token += p.tokens) {
        p.tokens = tokens - p.first_token < share ? tokens - p.first_token : share;
        p.blocks = fast_div_of((p.tokens * p.chunks.divisor + items_per_block - 1) / items_per_block);
        if (call->wide_dtype == KVP_DTYPE_F32)
            status = launch_pack<PLANES, float>(p, n * p.blocks.divisor, call);
        else if (call->wide_dtype == KVP_DTYPE_F16)
            status = launch_pack<PLANES, __half>(p, n * p.blocks.divisor, call);
        else
            status = launch_pack<PLANES, __nv_bfloat16>(p, n * p.blocks.divisor, call);
    }
    return status;
}

/* Sixteen elements to an access, where everything is so aligned. */
static uint32_t pack_of(const struct call *call)
{
    uint64_t bits = 0;

    for (uint32_t i = 0; i < call->n_planes; i++) {
        bits |= plane_alignment_bits(&call->planes[i]) | (uint64_t)(uintptr_t)call->flat[i].base |
                (uint64_t)call->flat[i].token_stride;
        bits |= call->planes[i].heads > 1 ? (uint64_t)call->flat[i].head_stride : 0;
    }
    return widest_vector(bits) == 16 ? 16 : 1;
}

static enum kvp_status run(struct call *call)
{
    uint32_t members[MANY_PLANES], done[(KVP_PLANES_MAX + 31) / 32] = {};
    enum kvp_status status = KVP_OK;

    if (call->at->nnz == 0)
        return KVP_OK;
    call->pack = pack_of(call);
    for (uint32_t first = 0; status == KVP_OK && first < call->n_planes; first++) {
        uint32_t n = 0;

        if (done[first / 32] >> (first % 32) & 1)
            continue;
        for (uint32_t i = first; i < call->n_planes && n < MANY_PLANES; i++) {
            if ((done[i / 32] >> (i % 32) & 1) || !same_shape(call, first, i))
                continue;
            done[i / 32] |= 1u << (i % 32);
            members[n++] = i;
        }
        status = n <= SMALL_PLANES ? launch_members<SMALL_PLANES>(call, members, n, first ? nullptr : call->errors)
                                   : launch_members<MANY_PLANES>(call, members, n, first ? nullptr : call->errors);
    }
    return status;
}

extern "C" enum kvp_status kvp_cuda_quant_append(const struct kvp_quant_append_args *args, void *stream)
{
    enum kvp_status status = kvp_check_quant_append(args);
    struct call call = {};

    if (status != KVP_OK)
        return status;
    call.planes = args->planes;
    call.flat = args->sources;
    call.scales = args->scales;
    call.scale_planes = args->scale_planes;
    call.at = &args->at;
    call.errors = args->errors;
    call.n_planes = args->n_planes;
    call.pages = args->pages;
    call.page_tokens = args->page_tokens;
    call.wide_dtype = args->source_dtype;
    call.scale_mode = args->scale_mode;
    call.direction = args->scale_mode == KVP_SCALE_COMPUTED ? QUANT_COMPUTED : QUANT;
    call.stream = stream;
    return run(&call);
}

extern "C" enum kvp_status kvp_cuda_gather(const struct kvp_gather_args *args, void *stream)
{
    enum kvp_status status = kvp_check_gather(args);
    struct call call = {};

    if (status != KVP_OK)
        return status;
    if (args->dtype == 0)
        return kvp_cuda_gather_bytes(args, stream);
    call.planes = args->planes;
    call.flat = args->destinations;
    call.scales = args->scales;
    call.scale_planes = args->scale_planes;
    call.at = &args->at;
    call.errors = args->errors;
    call.n_planes = args->n_planes;
    call.pages = args->pages;
    call.page_tokens = args->page_tokens;
    call.wide_dtype = args->dtype;
    call.scale_mode = args->scale_mode;
    call.direction = DEQUANT;
    call.stream = stream;
    return run(&call);
}
