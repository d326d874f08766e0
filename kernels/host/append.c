/**
 * Append and gather of tokens on the host, bytes as they are; and the copies on write that go with an append.
 *
 * Tokens are taken in blocks: first their places are found, then, plane by plane, neighbours are joined to runs (next
 * token, next place) and each run is one strided copy, which itself becomes one memcpy where the strides allow. A
 * sequence's prefill so moves a page, or several that follow one another, at a time.
 *
 *     token    7  8  9 10 11 12        source   ▓▓▓▓▓▓ ▓▓▓▓▓▓   dense or a slice: source strides
 *     place    p3+14 p3+15 p9+0 …               └─run─┘└─run─┘
 *     plane    page 3 …▓▓   page 9 ▓▓▓▓…        destination strides: NHD, HND, joined
 *
 * Any thread may call; large calls are shared out over threads (parallel.h), which then write disjoint places.
 */
#include "../kvp_check.h"
#include "address.h"
#include "pages.h"
#include "parallel.h"
#include "strided.h"

enum direction {
    INTO_POOL,
    OUT_OF_POOL,
};

struct move {
    const struct kvp_plane_view *planes;
    const struct kvp_token_view *flats;
    uint32_t n_planes;
    enum direction direction;
    enum kvp_stores stores;
    struct kvp_pool_shape shape;
    const struct kvp_address *at;
};

/* `count` tokens from flat token `first` on, at consecutive offsets of one page. */
static void move_run(const struct move *move, uint32_t p, uint64_t first, uint32_t count, struct kvp_place place)
{
    const struct kvp_plane_view *plane = &move->planes[p];
    const struct kvp_token_view *flat = &move->flats[p];
    struct kvp_side pool = {
        .base = (unsigned char *)plane->base + (int64_t)place.page * plane->page_stride +
                (int64_t)place.offset * plane->token_stride,
        .outer_stride = plane->token_stride,
        .inner_stride = plane->head_stride,
    };
    struct kvp_side tokens = {
        .base = (unsigned char *)flat->base + (int64_t)first * flat->token_stride,
        .outer_stride = flat->token_stride,
        .inner_stride = flat->head_stride,
    };
    uint64_t row = (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
    if (move->direction == INTO_POOL)
        kvp_copy_block(pool, tokens, count, plane->heads, row, move->stores);
    else
        kvp_copy_block(tokens, pool, count, plane->heads, row, move->stores);
}

/* How many places from i on follow one another, in a plane whose pages join where `pages_join`. */
static uint32_t run_length(const struct move *move, const struct kvp_place *places, uint32_t i, uint32_t n,
                           int pages_join)
{
    uint32_t k = i + 1;
    for (; k < n; k++) {
        struct kvp_place last = places[k - 1], next = places[k];
        int joined = next.page == last.page && next.offset == last.offset + 1;
        if (!joined && pages_join)
            joined = next.page == last.page + 1 && next.offset == 0 && last.offset + 1 == move->shape.page_tokens;
        if (!joined)
            break;
    }
    return k - i;
}

static void move_block(const struct move *move, uint64_t first, const struct kvp_place *places, uint32_t n)
{
    for (uint32_t p = 0; p < move->n_planes; p++) {
        const struct kvp_plane_view *plane = &move->planes[p];
        int pages_join = plane->page_stride == plane->token_stride * (int64_t)move->shape.page_tokens;
        for (uint32_t i = 0; i < n;) {
            if (places[i].page == KVP_NO_PLACE) {
                i++;
                continue;
            }
            uint32_t count = run_length(move, places, i, n, pages_join);
            move_run(move, p, first + i, count, places[i]);
            i += count;
        }
    }
}

static void move_range(void *context, uint64_t first, uint64_t last)
{
    const struct move *move = context;
    struct kvp_place places[KVP_RESOLVE_TOKENS];
    while (first < last) {
        uint32_t n = last - first < KVP_RESOLVE_TOKENS ? (uint32_t)(last - first) : KVP_RESOLVE_TOKENS;
        kvp_resolve(move->at, &move->shape, first, n, places);
        move_block(move, first, places, n);
        first += n;
    }
    kvp_copy_fence(move->stores);
}

static void move_tokens(struct move *move, int threads)
{
    uint64_t tokens = kvp_address_tokens(move->at);
    uint64_t token_bytes = 0;
    for (uint32_t p = 0; p < move->n_planes; p++)
        token_bytes += kvp_token_bytes(&move->planes[p]);
    move->stores = kvp_stores_for(tokens * token_bytes);
    kvp_host_parallel(threads, tokens, 16, tokens * token_bytes, move_range, move);
}

enum kvp_status kvp_host_append(const struct kvp_append_args *args, int threads)
{
    enum kvp_status status = kvp_check_append(args);
    if (status != KVP_OK)
        return status;
    struct kvp_pool_shape shape = {.pages = args->pages, .page_tokens = args->page_tokens, .errors = args->errors};
    if (args->n_copies > 0) {
        kvp_copy_pages(
            &(struct kvp_copy_job){
                .sources = args->planes,
                .destinations = args->planes,
                .n_planes = args->n_planes,
                .page_tokens = args->page_tokens,
                .source_pages = args->pages,
                .destination_pages = args->pages,
                .copies = args->copies,
                .errors = args->errors,
            },
            args->n_copies, threads);
    }
    struct move move = {
        .planes = args->planes,
        .flats = args->sources,
        .n_planes = args->n_planes,
        .direction = INTO_POOL,
        .shape = shape,
        .at = &args->at,
    };
    move_tokens(&move, threads);
    return KVP_OK;
}

void kvp_gather_bytes(const struct kvp_gather_args *args, int threads)
{
    struct move move = {
        .planes = args->planes,
        .flats = args->destinations,
        .n_planes = args->n_planes,
        .direction = OUT_OF_POOL,
        .shape = {.pages = args->pages, .page_tokens = args->page_tokens, .errors = args->errors},
        .at = &args->at,
    };
    move_tokens(&move, threads);
}
