/**
 * Append, and its way back: tokens from flat tensors into the planes of a paged cache (or out of them), all planes in
 * one launch, the copies of copy-on-write beside them.
 *
 * Shape of the launch. Planes that agree in everything but their pointers form a group; a launch takes up to GROUPS
 * groups and, by kernel parameter, KVP_LAUNCH_PLANES pointers (a small launch carries 4, which costs less). The grid is
 * one-dimensional: for each group planes · blocks of tokens, then planes · blocks of copies.
 *
 *     a thread     moves up to UNROLL vectors of a token, all loads before the first store, and
 *                  before it asks for the token's place, so that the two latencies overlap
 *     a team       of 2^k lanes (4..32) moves one chunk of a token, up to UNROLL · 2^k vectors: small tokens
 *                  (H = 1, MLA's kpe) share a warp, large ones take several chunks
 *
 * The vector is the widest of 16, 8, 4, 2, 1 bytes that every pointer and stride of the launch allows: the only
 * compile-time case beside the direction and the number of pointers. What engines do at every layer, 16-byte vectors
 * and heads that lie together on both sides, has a kernel of its own (dense.cuh): at decode sizes an append is as long
 * as its chain of latencies, of which the parameters that a block has to fetch are one.
 */
#include "address.cuh"
#include "mover.cuh"
#include "dense.cuh"
#include "gather_bytes.h"

#define UNROLL       4 /* vectors that a thread of append_kernel moves */
#define SMALL_PLANES 4

/* Planes of one shape. Vectors are counted per token. */
struct group {
    struct page_shape page; /* of the plane, as both sides of a copy */
    int64_t token_stride;   /* of the flat tensor, bytes */
    int64_t head_stride;
    uint32_t vectors;
    uint32_t team_log2;
    uint32_t first_plane;
    uint32_t token_blocks; /* of one plane */
    uint32_t copy_blocks;
    uint32_t end_block; /* of the group's range in the grid; the first begins where the one before ends */
    uint32_t planes;
    struct fast_div chunks; /* of a token */
    struct fast_div vectors_per_head;
    struct fast_div blocks_per_plane; /* token_blocks + copy_blocks */
};

template <int PLANES> struct append_params {
    struct address address;
    struct kvp_error_ring *errors;
    const struct kvp_page_copy *copies;
    uint32_t first_copy;
    uint32_t first_token; /* of this launch; a call of very many vectors takes several */
    uint32_t tokens;
    uint32_t groups;
    struct group group[GROUPS];
    struct plane_pointers pointers[PLANES];
};

template <int PLANES, bool GATHER, typename V>
__device__ __forceinline__ void move_chunk(const append_params<PLANES> &p, const struct group &g,
                                           const struct plane_pointers &pointers, uint32_t block, bool first_plane)
{
    uint32_t team = 1u << g.team_log2, lane = threadIdx.x & (team - 1);
    uint32_t item = block * (KVP_BLOCK_THREADS >> g.team_log2) + (threadIdx.x >> g.team_log2);
    uint32_t local = quotient(item, g.chunks), chunk = item - local * g.chunks.divisor;
    uint32_t first = (chunk * UNROLL << g.team_log2) + lane;
    int64_t token = (int64_t)p.first_token + local;
    char *flat = pointers.flat + token * g.token_stride, *cell;
    int64_t flat_at[UNROLL], cell_at[UNROLL];
    struct place place;
    V data[UNROLL];

    if (local >= p.tokens)
        return;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        uint32_t v = first + ((uint32_t)u << g.team_log2);
        uint32_t head = quotient(v, g.vectors_per_head), rest = v - head * g.vectors_per_head.divisor;

        flat_at[u] = head * g.head_stride + rest * (int64_t)sizeof(V);
        cell_at[u] = head * g.page.destination_head_stride + rest * (int64_t)sizeof(V);
        if (!GATHER && v < g.vectors)
            data[u] = load_once<V>(flat + flat_at[u]);
    }
    if (p.address.at.nnz_device && token >= token_count(p.address))
        return;
    place = find_place(p.address, token);
    if (place.page < 0) {
        if (place.kind && first_plane && first == 0)
            report(p.errors, place.kind, token, place.value);
        return;
    }
    cell =
        pointers.plane + place.page * g.page.destination_page_stride + place.offset * g.page.destination_token_stride;
    if (GATHER) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (first + ((uint32_t)u << g.team_log2) < g.vectors)
                data[u] = load_once<V>(cell + cell_at[u]);
        }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        if (first + ((uint32_t)u << g.team_log2) < g.vectors)
            store<V>((GATHER ? flat + flat_at[u] : cell + cell_at[u]), data[u]);
    }
}

template <int PLANES, bool GATHER, typename V>
__global__ void __launch_bounds__(KVP_BLOCK_THREADS) append_kernel(const __grid_constant__ append_params<PLANES> p)
{
    uint32_t begin = 0, n = 0, plane, block;

    while (blockIdx.x >= p.group[n].end_block)
        begin = p.group[n++].end_block;
    const struct group &g = p.group[n];
    block = blockIdx.x - begin;
    plane = quotient(block, g.blocks_per_plane);
    block -= plane * g.blocks_per_plane.divisor;
    plane += g.first_plane;
    if (block < g.token_blocks) {
        move_chunk<PLANES, GATHER, V>(p, g, p.pointers[plane], block, plane == 0);
    } else if (!GATHER) {
        copy_page_part<V>(g.page, p.pointers[plane].plane, p.pointers[plane].plane, p.copies, p.first_copy,
                          block - g.token_blocks, plane == 0 ? p.errors : nullptr);
    }
}

static_assert(UNROLL == DENSE_UNROLL_MID, "one set of teams serves both kernels");

/* ---- the host's part --------------------------------------------------------------------------------------------- */

/* One call's arguments, of either direction. */
struct call {
    const struct kvp_plane_view *planes;
    const struct kvp_token_view *flat;
    uint32_t n_planes, pages, page_tokens, n_copies;
    const struct kvp_page_copy *copies;
    const struct kvp_address *at;
    struct kvp_error_ring *errors;
    uint32_t vector_bytes;
    bool gather;
    void *stream;
};

static bool same_shape(const struct call *call, uint32_t a, uint32_t b)
{
    const struct kvp_plane_view *p = &call->planes[a], *q = &call->planes[b];

    if (p->page_stride != q->page_stride || p->token_stride != q->token_stride || p->head_stride != q->head_stride ||
        p->heads != q->heads || p->dim != q->dim || kvp_dtype_bytes(p->dtype) != kvp_dtype_bytes(q->dtype))
        return false;
    return call->at->nnz == 0 || (call->flat[a].token_stride == call->flat[b].token_stride &&
                                  call->flat[a].head_stride == call->flat[b].head_stride);
}

static struct group group_of(const struct call *call, uint32_t plane)
{
    struct kvp_plane_view view = call->planes[plane];
    struct kvp_token_view flat = {NULL, 0, 0};
    struct group g = {};
    uint32_t head_vectors;
    int64_t head_bytes = (int64_t)view.dim * kvp_dtype_bytes(view.dtype);

    if (call->at->nnz)
        flat = call->flat[plane];
    if (view.heads == 1 || (view.head_stride == head_bytes && (flat.head_stride == head_bytes || !call->at->nnz))) {
        head_bytes *= view.heads; /* the heads of a token lie together on both sides: one head */
        view.heads = 1;
    }
    head_vectors = (uint32_t)(head_bytes / call->vector_bytes);
    g.vectors = head_vectors * view.heads;
    g.vectors_per_head = fast_div_of(head_vectors);
    g.token_stride = flat.token_stride;
    g.head_stride = flat.head_stride;
    g.page = page_shape_of(&call->planes[plane], &call->planes[plane], call->page_tokens, call->vector_bytes);
    g.page.source_pages = g.page.destination_pages = call->pages;
    return g;
}

/* Teams and blocks of one plane of the group, for so many tokens, with so many vectors to a thread. */
static void set_blocks(struct group *g, uint32_t tokens, uint32_t n_copies, uint32_t unroll)
{
    uint32_t team = 4, items_per_block;

    while (team < 32 && team * unroll < g->vectors)
        team *= 2;
    g->team_log2 = (uint32_t)__builtin_ctz(team);
    g->chunks = fast_div_of((g->vectors + team * unroll - 1) / (team * unroll));
    items_per_block = KVP_BLOCK_THREADS >> g->team_log2;
    g->token_blocks = (uint32_t)(((uint64_t)tokens * g->chunks.divisor + items_per_block - 1) / items_per_block);
    g->copy_blocks = n_copies * g->page.blocks.divisor;
    g->blocks_per_plane = fast_div_of(g->token_blocks + g->copy_blocks);
}

/* The same for all groups; returns the blocks of the launch. */
static uint32_t set_all_blocks(struct append_params<KVP_LAUNCH_PLANES> *p, uint32_t n_copies, uint32_t unroll)
{
    uint32_t blocks = 0;

    for (uint32_t g = 0; g < p->groups; g++) {
        set_blocks(&p->group[g], p->tokens, n_copies, unroll);
        blocks += p->group[g].planes * p->group[g].blocks_per_plane.divisor;
        p->group[g].end_block = blocks;
    }
    return blocks;
}

/* Whether the launch can be the dense kernel's. */
static bool is_dense(const struct append_params<KVP_LAUNCH_PLANES> &p, const struct call *call)
{
    if (call->gather || call->vector_bytes != 16 || call->n_copies)
        return false;
    for (uint32_t g = 0; g < p.groups; g++) {
        if (p.group[g].vectors_per_head.divisor != p.group[g].vectors)
            return false;
    }
    return true;
}

template <int PLANES, uint32_t UNROLLED>
static enum kvp_status launch_dense(const struct append_params<KVP_LAUNCH_PLANES> &all, uint32_t blocks,
                                    const struct call *call)
{
    const struct kvp_address *at = call->at;
    struct dense_params<PLANES> p;

    p.batch_indices = static_cast<const int32_t *>(at->batch_indices);
    p.positions = static_cast<const int32_t *>(at->positions);
    p.kv_indptr = static_cast<const int32_t *>(at->kv_indptr);
    p.kv_indices = static_cast<const int32_t *>(at->kv_indices);
    p.slot_mapping = at->slot_mapping;
    p.wide = at->index_bits == 64;
    p.nnz_device = at->nnz_device;
    p.tokens = all.tokens;
    p.first_token = all.first_token;
    p.batch = (uint32_t)at->batch;
    p.pages = all.address.pages;
    p.page_tokens = all.address.page_tokens;
    for (uint32_t i = 0; i < all.groups; i++) {
        const struct group *g = &all.group[i];

        p.group[i] = {g->page.destination_page_stride,
                      g->page.destination_token_stride,
                      g->token_stride,
                      g->vectors,
                      g->team_log2,
                      g->first_plane,
                      g->end_block,
                      g->chunks,
                      g->blocks_per_plane};
    }
    for (uint32_t i = 0; i < PLANES; i++)
        p.pointers[i] = all.pointers[i];
    p.errors = all.errors;
    p.address = all.address;
    if (at->kind == KVP_ADDRESS_CSR && at->index_bits == 32)
        return launch_early(dense_kernel<PLANES, DENSE_CSR32, UNROLLED>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    if (at->kind == KVP_ADDRESS_SLOTS)
        return launch_early(dense_kernel<PLANES, DENSE_SLOTS, UNROLLED>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    return launch_early(dense_kernel<PLANES, DENSE_ANY, UNROLLED>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
}

template <int PLANES, bool GATHER>
static enum kvp_status launch_width(const append_params<PLANES> &p, uint32_t blocks, const struct call *call)
{
    switch (call->vector_bytes) {
    case 16:
        return launch(append_kernel<PLANES, GATHER, uint4>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    case 8:
        return launch(append_kernel<PLANES, GATHER, uint2>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    case 4:
        return launch(append_kernel<PLANES, GATHER, uint32_t>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    case 2:
        return launch(append_kernel<PLANES, GATHER, uint16_t>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    default:
        return launch(append_kernel<PLANES, GATHER, uint8_t>, p, blocks, KVP_BLOCK_THREADS, 0, call->stream);
    }
}

template <int PLANES>
static enum kvp_status launch_planes(const append_params<KVP_LAUNCH_PLANES> &all, uint32_t blocks, uint32_t unroll,
                                     const struct call *call)
{
    append_params<PLANES> p;

    if (unroll == DENSE_UNROLL)
        return launch_dense<PLANES, DENSE_UNROLL>(all, blocks, call);
    if (unroll == DENSE_UNROLL_MID && is_dense(all, call))
        return launch_dense<PLANES, DENSE_UNROLL_MID>(all, blocks, call);
    p.address = all.address;
    p.errors = all.errors;
    p.copies = all.copies;
    p.first_copy = all.first_copy;
    p.first_token = all.first_token;
    p.tokens = all.tokens;
    p.groups = all.groups;
    for (uint32_t g = 0; g < GROUPS; g++)
        p.group[g] = all.group[g];
    for (uint32_t i = 0; i < PLANES; i++)
        p.pointers[i] = all.pointers[i];
    if constexpr (PLANES == SMALL_PLANES) {
        if (call->gather)
            return launch_width<PLANES, true>(p, blocks, call);
    }
    return launch_width<PLANES, false>(p, blocks, call);
}

/* The group of a plane's shape, made where there is none; GROUPS where there is no room for it. */
static uint32_t find_group(const struct call *call, uint32_t plane, const uint32_t first_of[GROUPS], uint32_t groups)
{
    for (uint32_t g = 0; g < groups; g++) {
        if (same_shape(call, first_of[g], plane))
            return g;
    }
    return groups;
}

/* Fill p's groups and pointers with planes from `next` on, as many as fit; returns the plane after the last. */
static uint32_t take_planes(const struct call *call, uint32_t next, struct append_params<KVP_LAUNCH_PLANES> *p,
                            uint32_t *ret_planes)
{
    uint32_t room = call->gather ? SMALL_PLANES : KVP_LAUNCH_PLANES, begin = next, planes = 0;
    uint32_t first_of[GROUPS];
    uint8_t group_of_plane[KVP_LAUNCH_PLANES];

    p->groups = 0;
    for (; next < call->n_planes && planes < room; next++) {
        uint32_t g = find_group(call, next, first_of, p->groups);

        if (g == GROUPS)
            break;
        if (g == p->groups) {
            first_of[g] = next;
            p->group[g] = group_of(call, next);
            p->groups++;
        }
        p->group[g].planes++;
        group_of_plane[planes++] = (uint8_t)g;
    }
    for (uint32_t g = 0, at = 0; g < p->groups; g++) {
        p->group[g].first_plane = at;
        for (uint32_t i = 0; i < planes; i++) {
            if (group_of_plane[i] != g)
                continue;
            p->pointers[at].plane = static_cast<char *>(call->planes[begin + i].base);
            p->pointers[at].flat = call->at->nnz ? static_cast<char *>(call->flat[begin + i].base) : nullptr;
            at++;
        }
    }
    for (uint32_t i = planes; i < KVP_LAUNCH_PLANES; i++)
        p->pointers[i] = {nullptr, nullptr};
    *ret_planes = planes;
    return next;
}

/* How many tokens, or copies, one launch takes at most, so that no product in the kernel passes 2^31. */
static uint32_t launch_share(uint32_t planes, uint64_t work_of_one)
{
    uint64_t share = ((1ull << 30) / planes) / work_of_one;

    return share ? (uint32_t)share : 1;
}

/* The launches for the planes in p: one, if the tokens and copies are not very many. */
static enum kvp_status launch_tokens(const struct call *call, struct append_params<KVP_LAUNCH_PLANES> *p,
                                     uint32_t planes)
{
    uint32_t tokens = (uint32_t)call->at->nnz, copies = call->n_copies, token_share, copy_share;
    uint64_t most_chunks = 1, most_copy_blocks = 1, most;
    enum kvp_status status = KVP_OK;

    for (uint32_t g = 0; g < p->groups; g++) {
        most = (p->group[g].vectors + 7) / 8; /* a team takes 8 at least */
        most_chunks = most > most_chunks ? most : most_chunks;
        most_copy_blocks =
            p->group[g].page.blocks.divisor > most_copy_blocks ? p->group[g].page.blocks.divisor : most_copy_blocks;
    }
    token_share = launch_share(planes, most_chunks);
    copy_share = launch_share(planes, most_copy_blocks);
    p->first_token = p->first_copy = 0;
    while (status == KVP_OK && (p->first_token < tokens || p->first_copy < copies)) {
        uint32_t blocks = 0, unroll = UNROLL, n_copies;

        p->tokens = tokens - p->first_token < token_share ? tokens - p->first_token : token_share;
        n_copies = copies - p->first_copy < copy_share ? copies - p->first_copy : copy_share;
        if (is_dense(*p, call)) {
            blocks = set_all_blocks(p, 0, DENSE_UNROLL);
            unroll = blocks < MID_BLOCKS_MIN || blocks > MID_BLOCKS_MAX ? DENSE_UNROLL : DENSE_UNROLL_MID;
        }
        if (unroll == UNROLL)
            blocks = set_all_blocks(p, n_copies, unroll);
        status = planes <= SMALL_PLANES ? launch_planes<SMALL_PLANES>(*p, blocks, unroll, call)
                                        : launch_planes<KVP_LAUNCH_PLANES>(*p, blocks, unroll, call);
        p->first_token += p->tokens;
        p->first_copy += n_copies;
    }
    return status;
}

static enum kvp_status run(struct call *call)
{
    struct append_params<KVP_LAUNCH_PLANES> p;
    enum kvp_status status = KVP_OK;
    uint64_t bits = 0;

    for (uint32_t i = 0; i < call->n_planes; i++) {
        bits |= plane_alignment_bits(&call->planes[i]);
        if (call->at->nnz) {
            bits |= (uint64_t)(uintptr_t)call->flat[i].base | (uint64_t)call->flat[i].token_stride;
            bits |= call->planes[i].heads > 1 ? (uint64_t)call->flat[i].head_stride : 0;
        }
    }
    call->vector_bytes = widest_vector(bits);
    p.address = address_of(call->at, call->pages, call->page_tokens);
    p.errors = call->errors;
    p.copies = call->copies;
    for (uint32_t next = 0, planes; status == KVP_OK && next < call->n_planes;) {
        next = take_planes(call, next, &p, &planes);
        status = launch_tokens(call, &p, planes);
        p.errors = nullptr; /* each violation once: the first planes have reported it */
    }
    return status;
}

extern "C" enum kvp_status kvp_cuda_append(const struct kvp_append_args *args, void *stream)
{
    enum kvp_status status = kvp_check_append(args);
    struct call call = {};

    if (status != KVP_OK)
        return status;
    call.planes = args->planes;
    call.flat = args->sources;
    call.n_planes = args->n_planes;
    call.pages = args->pages;
    call.page_tokens = args->page_tokens;
    call.n_copies = args->n_copies;
    call.copies = args->copies;
    call.at = &args->at;
    call.errors = args->errors;
    call.stream = stream;
    return run(&call);
}

enum kvp_status kvp_cuda_gather_bytes(const struct kvp_gather_args *args, void *stream)
{
    struct call call = {};

    call.planes = args->planes;
    call.flat = args->destinations;
    call.n_planes = args->n_planes;
    call.pages = args->pages;
    call.page_tokens = args->page_tokens;
    call.at = &args->at;
    call.errors = args->errors;
    call.gather = true;
    call.stream = stream;
    return run(&call);
}
