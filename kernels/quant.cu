/**
 * Quantising append and dequantising gather: as append.cu moves bytes, these move values between wide floats and fp8.
 *
 * A launch takes planes of up to SHAPES shapes (MLA's ckv and kpe are two), one range of blocks after the other. Three
 * kernels:
 *
 *   - scale known: teams of lanes as in append.cu. A lane takes UNROLL packs of 16 elements; its head's scale is read
 *     while they come.
 *   - scale computed: a team of 2^k lanes takes one head of one token. The packs that two rounds cover stay in registers,
 *     amax goes round the team by shuffles, any further packs are read again.
 *   - gather: the first one, the other way.
 *
 * A pack is 16 elements where dim, pointers and strides allow 16-byte accesses, else one element.
 */
#include "address.cuh"
#include "fp8.cuh"
#include "gather_bytes.h"

#define UNROLL       2
#define SMALL_PLANES 4
#define MANY_PLANES  128
#define SHAPES       4

struct plane_pointers {
    char *plane;
    char *flat;
    char *scale; /* of the tensor, the heads, or the scale plane; NULL: 1 */
};

struct shape {
    int64_t page_stride, token_stride, head_stride; /* of the planes */
    int64_t flat_token_stride, flat_head_stride;
    int64_t scale_page_stride, scale_token_stride, scale_head_stride;
    uint32_t packs; /* of a token; of a head where the scale is computed */
    uint32_t team_log2;
    uint32_t first_plane;
    uint32_t planes;
    uint32_t end_block;     /* of its range; the first begins where the one before ends */
    struct fast_div chunks; /* of a token; its heads where the scale is computed */
    struct fast_div packs_per_head;
    struct fast_div blocks; /* of a plane */
};

template <int PLANES> struct quant_params {
    uint32_t scale_mode; /* enum kvp_scale_mode */
    uint32_t first_token, tokens;
    uint32_t shapes;
    bool e5m2;
    struct shape shape[SHAPES];
    struct plane_pointers pointers[PLANES];
    struct kvp_error_ring *errors;
    struct address address;
};

/* What a thread works on. */
struct work {
    const struct shape *shape;
    uint32_t plane; /* in the launch */
    uint32_t token; /* in the launch */
    uint32_t chunk; /* of the token, or its head */
    uint32_t lane;  /* in the team */
};

template <int PLANES> __device__ __forceinline__ struct work work_of(const quant_params<PLANES> &p)
{
    uint32_t begin = 0, n = 0, block, item;
    struct work w;

    while (blockIdx.x >= p.shape[n].end_block)
        begin = p.shape[n++].end_block;
    const struct shape &s = p.shape[n];
    w.shape = &s;
    w.plane = quotient(blockIdx.x - begin, s.blocks);
    block = blockIdx.x - begin - w.plane * s.blocks.divisor;
    w.plane += s.first_plane;
    item = block * (KVP_BLOCK_THREADS >> s.team_log2) + (threadIdx.x >> s.team_log2);
    w.token = quotient(item, s.chunks);
    w.chunk = item - w.token * s.chunks.divisor;
    w.lane = threadIdx.x & ((1u << s.team_log2) - 1);
    return w;
}

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

/* Blocks of 256 threads on a multiprocessor: floats take more registers than halves do. */
template <typename S> constexpr int RESIDENT_BLOCKS = sizeof(S) == 4 ? 3 : 4;

template <int PLANES, typename S, int N>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS, RESIDENT_BLOCKS<S>)
    quant_kernel(const __grid_constant__ quant_params<PLANES> p)
{
    const struct work w = work_of(p);
    const struct shape &s = *w.shape;
    const struct plane_pointers &pointers = p.pointers[w.plane];
    uint32_t first = (w.chunk * UNROLL << s.team_log2) + w.lane;
    int64_t token = (int64_t)p.first_token + w.token;
    uint32_t head[UNROLL], rest[UNROLL];
    struct place place;
    pack<S, N> data[UNROLL];
    float scale[UNROLL];

    wait_for_stream();
    if (w.token >= p.tokens)
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        uint32_t v = first + ((uint32_t)u << s.team_log2);

        head[u] = quotient(v, s.packs_per_head);
        rest[u] = (v - head[u] * s.packs_per_head.divisor) * N;
        scale[u] = 1.0f;
        if (v < s.packs) {
            data[u] = load_pack<S, N>(pointers.flat + token * s.flat_token_stride + head[u] * s.flat_head_stride +
                                      rest[u] * sizeof(S));
            scale[u] = known_scale(p, pointers.scale, head[u]);
        }
    }
    if (!place_token(p, token, w.plane == 0 && first == 0, &place))
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (first + ((uint32_t)u << s.team_log2) < s.packs)
            store_pack(pointers.plane + place.page * s.page_stride + place.offset * s.token_stride +
                           head[u] * s.head_stride + rest[u],
                       quantise<S, N>(data[u], scale[u], p.e5m2));
    }
}

/* The largest magnitude: NaN ignored (as fmaxf does), infinity counted as FLT_MAX. */
template <typename S, int N> __device__ __forceinline__ float amax_of(const pack<S, N> &x, float amax)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        amax = fmaxf(amax, fabsf(value_of(x, i)));
    return fminf(amax, FLT_MAX);
}

template <int PLANES, typename S, int N>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS, RESIDENT_BLOCKS<S>)
    quant_computed_kernel(const __grid_constant__ quant_params<PLANES> p)
{
    const struct work w = work_of(p);
    const struct shape &s = *w.shape;
    const struct plane_pointers &pointers = p.pointers[w.plane];
    uint32_t team = 1u << s.team_log2, lane = w.lane, head = w.chunk;
    int64_t token = (int64_t)p.first_token + w.token;
    const char *from = pointers.flat + token * s.flat_token_stride + head * s.flat_head_stride;
    bool live = w.token < p.tokens;
    pack<S, N> data[UNROLL];
    struct place place;
    float amax = 0, scale;
    char *to;

    wait_for_stream();
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (live && lane + u * team < s.packs)
            data[u] = load_pack<S, N>(from + (lane + u * team) * (N * sizeof(S)));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (live && lane + u * team < s.packs)
            amax = amax_of<S, N>(data[u], amax);
    }
    for (uint32_t v = lane + UNROLL * team; live && v < s.packs; v += team)
        amax = amax_of<S, N>(load_pack<S, N>(from + v * (N * sizeof(S))), amax);
    for (uint32_t step = team / 2; step; step /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    if (!live || !place_token(p, token, w.plane == 0 && head == 0 && lane == 0, &place))
        return;
    scale = __fdiv_rn(amax, p.e5m2 ? 57344.0f : 448.0f);
    scale = scale == 0 ? 1.0f : scale;
    if (lane == 0)
        *reinterpret_cast<float *>(pointers.scale + place.page * s.scale_page_stride +
                                   place.offset * s.scale_token_stride + head * s.scale_head_stride) = scale;
    to = pointers.plane + place.page * s.page_stride + place.offset * s.token_stride + head * s.head_stride;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (lane + u * team < s.packs)
            store_pack(to + (lane + u * team) * N, quantise<S, N>(data[u], scale, p.e5m2));
    }
    for (uint32_t v = lane + UNROLL * team; v < s.packs; v += team)
        store_pack(to + v * N, quantise<S, N>(load_pack<S, N>(from + v * (N * sizeof(S))), scale, p.e5m2));
}

template <int PLANES, typename S, int N>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) dequant_kernel(const __grid_constant__ quant_params<PLANES> p)
{
    const struct work w = work_of(p);
    const struct shape &s = *w.shape;
    const struct plane_pointers &pointers = p.pointers[w.plane];
    uint32_t first = (w.chunk * UNROLL << s.team_log2) + w.lane;
    int64_t token = (int64_t)p.first_token + w.token;
    struct place place;

    wait_for_stream();
    if (w.token >= p.tokens || !place_token(p, token, w.plane == 0 && first == 0, &place))
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        uint32_t v = first + ((uint32_t)u << s.team_log2), head = quotient(v, s.packs_per_head);
        uint32_t rest = (v - head * s.packs_per_head.divisor) * N;
        float scale;

        if (v >= s.packs)
            break;
        if (p.scale_mode == KVP_SCALE_COMPUTED)
            scale = *reinterpret_cast<const float *>(pointers.scale + place.page * s.scale_page_stride +
                                                     place.offset * s.scale_token_stride + head * s.scale_head_stride);
        else
            scale = known_scale(p, pointers.scale, head);
        store_pack(pointers.flat + token * s.flat_token_stride + head * s.flat_head_stride + rest * sizeof(S),
                   dequantise<S, N>(load_pack<uint8_t, N>(pointers.plane + place.page * s.page_stride +
                                                          place.offset * s.token_stride + head * s.head_stride + rest),
                                    scale, p.e5m2));
    }
}

/* ---- the host's part --------------------------------------------------------------------------------------------- */

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

static struct shape shape_of(const struct call *call, uint32_t plane)
{
    const struct kvp_plane_view *view = &call->planes[plane];
    uint32_t head_packs = view->dim / call->pack, team = 1, wanted;
    struct shape s = {};

    s.page_stride = view->page_stride;
    s.token_stride = view->token_stride;
    s.head_stride = view->head_stride;
    s.flat_token_stride = call->flat[plane].token_stride;
    s.flat_head_stride = call->flat[plane].head_stride;
    if (call->scale_mode == KVP_SCALE_COMPUTED) {
        s.scale_page_stride = call->scale_planes[plane].page_stride;
        s.scale_token_stride = call->scale_planes[plane].token_stride;
        s.scale_head_stride = call->scale_planes[plane].head_stride;
    }
    s.packs_per_head = fast_div_of(head_packs);
    s.packs = call->direction == QUANT_COMPUTED ? head_packs : head_packs * view->heads;
    wanted = (s.packs + UNROLL - 1) / UNROLL;
    while (team < 32 && team < wanted)
        team *= 2;
    s.team_log2 = (uint32_t)__builtin_ctz(team);
    s.chunks =
        fast_div_of(call->direction == QUANT_COMPUTED ? view->heads : (s.packs + team * UNROLL - 1) / (team * UNROLL));
    return s;
}

template <int PLANES, typename S, int N>
static enum kvp_status launch_direction(const quant_params<PLANES> &p, uint32_t blocks, const struct call *call)
{
    switch (call->direction) {
    case QUANT:
        return launch_early(quant_kernel<PLANES, S, N>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    case QUANT_COMPUTED:
        return launch_early(quant_computed_kernel<PLANES, S, N>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    default:
        return launch_early(dequant_kernel<PLANES, S, N>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    }
}

/* One element at a time is slow as it is: its kernels come with the many pointers alone. */
template <int PLANES, typename S>
static enum kvp_status launch_pack(const quant_params<PLANES> &p, uint32_t blocks, const struct call *call)
{
    if constexpr (PLANES == MANY_PLANES) {
        if (call->pack == 1)
            return launch_direction<PLANES, S, 1>(p, blocks, call);
    }
    return launch_direction<PLANES, S, 16>(p, blocks, call);
}

template <int PLANES>
static enum kvp_status launch_dtype(const quant_params<PLANES> &p, uint32_t blocks, const struct call *call)
{
    if (call->wide_dtype == KVP_DTYPE_F32)
        return launch_pack<PLANES, float>(p, blocks, call);
    if (call->wide_dtype == KVP_DTYPE_F16)
        return launch_pack<PLANES, __half>(p, blocks, call);
    return launch_pack<PLANES, __nv_bfloat16>(p, blocks, call);
}

static struct plane_pointers pointers_of(const struct call *call, uint32_t plane)
{
    const void *scale = NULL;

    if (call->scale_mode == KVP_SCALE_COMPUTED)
        scale = call->scale_planes[plane].base;
    else if (call->scale_mode != KVP_SCALE_NONE)
        scale = call->scales[plane];
    return {static_cast<char *>(call->planes[plane].base), static_cast<char *>(call->flat[plane].base),
            (char *)const_cast<void *>(scale)};
}

/* Launch `planes` planes, shape by shape in `order`, in as many launches as their tokens need. */
template <int PLANES>
static enum kvp_status launch_planes(const struct call *call, const struct shape *shapes, uint32_t n_shapes,
                                     const uint32_t *order, uint32_t planes, struct kvp_error_ring *errors)
{
    uint32_t tokens = (uint32_t)call->at->nnz, most_chunks = 1, share;
    enum kvp_status status = KVP_OK;
    quant_params<PLANES> p;

    p.address = address_of(call->at, call->pages, call->page_tokens);
    p.errors = errors;
    p.scale_mode = call->scale_mode;
    p.e5m2 = call->planes[0].dtype == KVP_DTYPE_FP8_E5M2;
    p.shapes = n_shapes;
    for (uint32_t i = 0; i < PLANES; i++)
        p.pointers[i] = i < planes ? pointers_of(call, order[i]) : plane_pointers{nullptr, nullptr, nullptr};
    for (uint32_t i = 0; i < n_shapes; i++) {
        p.shape[i] = shapes[i];
        most_chunks = shapes[i].chunks.divisor > most_chunks ? shapes[i].chunks.divisor : most_chunks;
    }
    share = (1u << 30) / planes / most_chunks;
    share = share ? share : 1;
    for (p.first_token = 0; status == KVP_OK && p.first_token < tokens; p.first_token += p.tokens) {
        uint32_t blocks = 0;

        p.tokens = tokens - p.first_token < share ? tokens - p.first_token : share;
        for (uint32_t i = 0; i < n_shapes; i++) {
            uint32_t items_per_block = KVP_BLOCK_THREADS >> p.shape[i].team_log2;

            p.shape[i].blocks =
                fast_div_of((p.tokens * p.shape[i].chunks.divisor + items_per_block - 1) / items_per_block);
            blocks += p.shape[i].planes * p.shape[i].blocks.divisor;
            p.shape[i].end_block = blocks;
        }
        status = launch_dtype<PLANES>(p, blocks, call);
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

/* The planes of one launch, from `next` on: their shapes, and their order by shape. Returns the plane after the last.
 */
static uint32_t take_planes(const struct call *call, uint32_t next, struct shape *ret_shapes, uint32_t *ret_n_shapes,
                            uint32_t *ret_order, uint32_t *ret_planes)
{
    uint32_t begin = next, n = 0, planes = 0, first_of[SHAPES];
    uint8_t shape_of_plane[MANY_PLANES];

    for (; next < call->n_planes && next - begin < MANY_PLANES; next++) {
        uint32_t s = 0;

        while (s < n && !same_shape(call, first_of[s], next))
            s++;
        if (s == SHAPES)
            break;
        if (s == n) {
            first_of[n] = next;
            ret_shapes[n++] = shape_of(call, next);
        }
        ret_shapes[s].planes++;
        shape_of_plane[next - begin] = (uint8_t)s;
    }
    for (uint32_t s = 0; s < n; s++) {
        ret_shapes[s].first_plane = planes;
        for (uint32_t i = begin; i < next; i++) {
            if (shape_of_plane[i - begin] == s)
                ret_order[planes++] = i;
        }
    }
    *ret_n_shapes = n;
    *ret_planes = planes;
    return next;
}

static enum kvp_status run(struct call *call)
{
    uint32_t order[MANY_PLANES], planes, n_shapes;
    struct kvp_error_ring *errors = call->errors;
    enum kvp_status status = KVP_OK;
    struct shape shapes[SHAPES];

    if (call->at->nnz == 0)
        return KVP_OK;
    call->pack = pack_of(call);
    for (uint32_t next = 0; status == KVP_OK && next < call->n_planes;) {
        next = take_planes(call, next, shapes, &n_shapes, order, &planes);
        status = planes <= SMALL_PLANES && call->pack != 1
                     ? launch_planes<SMALL_PLANES>(call, shapes, n_shapes, order, planes, errors)
                     : launch_planes<MANY_PLANES>(call, shapes, n_shapes, order, planes, errors);
        errors = nullptr; /* each violation once: the first planes have reported it */
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
