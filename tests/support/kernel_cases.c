/**
 * Generated cases for the kernels: the generator. See kernel_cases.h; kernel_cases_run.c moves and runs them.
 *
 * A case is built from four choices, each from the same stream of random numbers: a pool (from kvp_layout, or planes
 * with free strides and misaligned bases), sequences that share out its pages, tokens of these sequences in one form of
 * address (with faults strewn in), and the operation with its options.
 */
#include "kernel_cases.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEQUENCES_MAX  16
#define TOKENS_MAX     640
#define PAGES_MAX      64
#define PAGE_BYTES_MAX (192u << 10)
#define POOL_BYTES_MAX (384u << 10)

struct sequence {
    int64_t ids[PAGES_MAX];
    int64_t pages;
    int64_t first; /* position of its first token in this call */
    int64_t count;
};

struct builder {
    struct kernel_case *out;
    uint64_t random;
    uint32_t pages, page_tokens, n_planes;
    uint32_t bits; /* of index arrays */
    struct sequence sequences[SEQUENCES_MAX];
    int64_t batch;
    int32_t spare[PAGES_MAX]; /* pages that no sequence holds */
    uint32_t n_spare;
    int faulty; /* wrong ids and positions are strewn in */
};

static uint64_t draw(struct builder *build, uint64_t below)
{
    build->random ^= build->random << 13;
    build->random ^= build->random >> 7;
    build->random ^= build->random << 17;
    return (build->random * 0x2545f4914f6cdd1dull >> 32) % below;
}

static int chance(struct builder *build, uint64_t percent)
{
    return draw(build, 100) < percent;
}

#define PICK(build, array) ((array)[draw(build, sizeof(array) / sizeof((array)[0]))])

/* Poison from a stream of its own, eight bytes at a time. */
static void poison(unsigned char *bytes, size_t size, uint64_t state)
{
    for (size_t i = 0; i < size; i += 8) {
        state += 0x9e3779b97f4a7c15ull;
        uint64_t mixed = (state ^ state >> 30) * 0xbf58476d1ce4e5b9ull;
        mixed ^= mixed >> 27;
        memcpy(bytes + i, &mixed, size - i < 8 ? size - i : 8);
    }
}

/* A part of the case's bytes, `off` bytes behind a multiple of `align`, poison around it. */
static void *take(struct builder *build, uint64_t size, uint64_t align, uint64_t off)
{
    size_t at = build->out->used + 64 + draw(build, 192);
    at = (at + align - 1) / align * align + off;
    if (at + size + 512 > CASE_BYTES_MAX) {
        fprintf(stderr, "kernel_cases: a case of %zu bytes is over CASE_BYTES_MAX\n", at + (size_t)size);
        abort();
    }
    poison(build->out->bytes + build->out->used, at + size + 256 - build->out->used, build->random);
    build->out->used = at + size + 256;
    return build->out->bytes + at;
}

static void *take_indices(struct builder *build, int64_t n)
{
    return take(build, (uint64_t)n * build->bits / 8, 8, 0);
}

static void set(struct builder *build, void *indices, int64_t i, int64_t value)
{
    if (build->bits == 64)
        ((int64_t *)indices)[i] = value;
    else
        ((int32_t *)indices)[i] = (int32_t)value;
}

/* An id that no pool has. */
static int64_t bad_page(struct builder *build)
{
    int64_t bad[] = {build->pages, build->pages + 1, -1, INT32_MAX, INT32_MIN};
    return PICK(build, bad);
}

/* ---- pools ------------------------------------------------------------------------------------------------------- */

static void choose_spec(struct builder *build, uint32_t fp8, struct kvp_plane_spec *planes)
{
    static const uint32_t page_sizes[] = {1, 3, 16, 64, 128};
    static const uint32_t heads[] = {1, 1, 2, 3, 4, 5, 8, 8, 16, 32, 40, 64, 128};
    static const uint32_t dims[] = {64, 80, 96, 128, 128, 192, 256, 512, 576, 1, 3, 7, 33, 100, 127};
    static const uint32_t dtypes[] = {KVP_DTYPE_F32,      KVP_DTYPE_F16,      KVP_DTYPE_F16, KVP_DTYPE_BF16,
                                      KVP_DTYPE_FP8_E4M3, KVP_DTYPE_FP8_E5M2, KVP_DTYPE_U8};
    uint64_t page_bytes;
    do {
        int mla = chance(build, 25), same = chance(build, 60);
        build->page_tokens = PICK(build, page_sizes);
        build->n_planes = chance(build, 10) ? CASE_PLANES_MAX : 1 + (uint32_t)draw(build, 4);
        page_bytes = 0;
        for (uint32_t p = 0; p < build->n_planes; p++) {
            struct kvp_plane_spec *plane = &planes[p];
            *plane = (struct kvp_plane_spec){
                .layer = p / 2,
                .component = (mla ? KVP_COMPONENT_CKV : KVP_COMPONENT_K) + p % 2,
                .heads = mla ? 1 : PICK(build, heads),
                .dim = PICK(build, dims),
                .dtype = fp8 != 0 ? fp8 : PICK(build, dtypes),
            };
            if (p > 0 && same) {
                plane->heads = planes[0].heads;
                plane->dim = mla && p % 2 ? plane->dim : planes[0].dim;
                plane->dtype = planes[0].dtype;
            }
            page_bytes += (uint64_t)plane->heads * plane->dim * kvp_dtype_bytes(plane->dtype) * build->page_tokens;
        }
    } while (page_bytes > PAGE_BYTES_MAX);
    uint64_t most = POOL_BYTES_MAX / page_bytes;
    build->pages = 1 + (uint32_t)draw(build, most < PAGES_MAX ? most : PAGES_MAX);
}

static void lay_out(struct builder *build, const struct kvp_plane_spec *planes)
{
    struct kvp_layout_spec spec = {
        .pages = build->pages,
        .page_tokens = build->page_tokens,
        .n_planes = build->n_planes,
        .order = chance(build, 50) ? KVP_ORDER_NHD : KVP_ORDER_HND,
        .placement = chance(build, 60) ? KVP_PLACEMENT_LAYER : KVP_PLACEMENT_PAGE,
        .planes = planes,
    };
    struct kvp_plane_layout layout[CASE_PLANES_MAX];
    struct kvp_layout_totals totals;
    char text[160];
    spec.joined = spec.placement == KVP_PLACEMENT_LAYER && chance(build, 50);
    if (kvp_layout_compute(&spec, layout, &totals, text, sizeof text) != KVP_OK) {
        fprintf(stderr, "kernel_cases: %s\n", text);
        abort();
    }
    void *slab = take(build, totals.slab_bytes, 256, 0);
    for (uint32_t p = 0; p < build->n_planes; p++)
        build->out->planes[p] = kvp_plane_view_of(&spec, layout, p, slab);
}

static int64_t pad(struct builder *build, uint32_t element)
{
    const int64_t pads[] = {0, 0, 0, element, 2 * element, 16, 48};
    int64_t bytes = PICK(build, pads);
    return bytes - bytes % element;
}

static uint64_t misaligned(struct builder *build, uint32_t element)
{
    static const uint64_t offs[] = {0, 0, 2, 4, 8};
    uint64_t off = PICK(build, offs);
    return off - off % element;
}

/* A plane with free strides: NHD or HND, with gaps, its base where no tensor library would put it. */
static void place_freely(struct builder *build, const struct kvp_plane_spec *spec, struct kvp_plane_view *ret_view)
{
    uint32_t element = kvp_dtype_bytes(spec->dtype);
    int64_t row = (int64_t)spec->dim * element, tokens = build->page_tokens, heads = spec->heads;
    struct kvp_plane_view view = {.heads = spec->heads, .dim = spec->dim, .dtype = spec->dtype};
    if (chance(build, 50)) {
        view.head_stride = row + pad(build, element);
        view.token_stride = heads * view.head_stride + pad(build, element);
        view.page_stride = tokens * view.token_stride + pad(build, element);
    } else {
        view.token_stride = row + pad(build, element);
        view.head_stride = tokens * view.token_stride + pad(build, element);
        view.page_stride = heads * view.head_stride + pad(build, element);
    }
    view.base = take(build, (uint64_t)view.page_stride * build->pages, 64, misaligned(build, element));
    *ret_view = view;
}

/* fp8: 0, or the one dtype of all planes */
static void make_pool(struct builder *build, uint32_t fp8)
{
    struct kvp_plane_spec planes[CASE_PLANES_MAX];
    choose_spec(build, fp8, planes);
    if (chance(build, 60)) {
        lay_out(build, planes);
    } else {
        for (uint32_t p = 0; p < build->n_planes; p++)
            place_freely(build, &planes[p], &build->out->planes[p]);
    }
}

/* Flat tensors of `element` bytes an element (0: the planes' own) for n tokens. */
static void make_flats(struct builder *build, int64_t n, uint32_t element)
{
    int64_t tokens = n > 0 ? n : 1;
    for (uint32_t p = 0; p < build->n_planes; p++) {
        const struct kvp_plane_view *plane = &build->out->planes[p];
        uint32_t size = element != 0 ? element : kvp_dtype_bytes(plane->dtype);
        int64_t row = (int64_t)plane->dim * size;
        struct kvp_token_view view;
        if (chance(build, 20)) { /* [head, token, element] */
            view.token_stride = row + pad(build, size);
            view.head_stride = tokens * view.token_stride + pad(build, size);
        } else { /* dense, or a slice of a tensor of three such parts */
            view.head_stride = row + (chance(build, 80) ? 0 : pad(build, size));
            view.token_stride = plane->heads * view.head_stride * (chance(build, 50) ? 1 : 3);
        }
        int64_t last = (tokens - 1) * view.token_stride + (plane->heads - 1) * view.head_stride;
        view.base = take(build, (uint64_t)(last + row), 64, misaligned(build, size));
        build->out->flats[p] = view;
    }
}

/* ---- sequences and tokens ---------------------------------------------------------------------------------------- */

/* Share out the pages, so that no place belongs to two sequences. */
static void make_sequences(struct builder *build)
{
    int32_t order[PAGES_MAX];
    for (uint32_t i = 0; i < build->pages; i++) {
        uint32_t k = (uint32_t)draw(build, i + 1);
        order[i] = order[k];
        order[k] = (int32_t)i;
    }
    uint32_t next = 0;
    build->batch = chance(build, 5) ? 0 : 1 + (int64_t)draw(build, SEQUENCES_MAX);
    for (int64_t b = 0; b < build->batch; b++) {
        struct sequence *sequence = &build->sequences[b];
        uint32_t wanted = (uint32_t)draw(build, 6);
        if (wanted > build->pages - next)
            wanted = build->pages - next;
        *sequence = (struct sequence){.pages = wanted};
        for (uint32_t i = 0; i < wanted; i++)
            sequence->ids[i] = order[next++];
        if (build->faulty && wanted > 0 && chance(build, 20))
            sequence->ids[draw(build, wanted)] = bad_page(build);
    }
    for (build->n_spare = 0; next < build->pages; next++)
        build->spare[build->n_spare++] = order[next];
}

/* What of each sequence this call touches: nothing, one token, a part, all; now and then one token too many. */
static int64_t make_tokens(struct builder *build, int64_t most)
{
    int64_t total = 0;
    for (int64_t b = 0; b < build->batch; b++) {
        struct sequence *sequence = &build->sequences[b];
        int64_t room = sequence->pages * build->page_tokens;
        if (build->faulty && chance(build, 10))
            room += 1 + (int64_t)draw(build, 2) * build->page_tokens;
        sequence->first = room > 0 ? (int64_t)draw(build, (uint64_t)room) : 0;
        sequence->count = room - sequence->first;
        if (chance(build, 30))
            sequence->count = sequence->count > 0;
        else if (chance(build, 10))
            sequence->count = 0;
        if (sequence->count > most - total)
            sequence->count = most - total;
        total += sequence->count;
    }
    return total;
}

static int64_t token_limit(const struct builder *build, uint32_t element)
{
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < build->n_planes; p++) {
        const struct kvp_plane_view *plane = &build->out->planes[p];
        bytes += (uint64_t)plane->heads * plane->dim * (element != 0 ? element : kvp_dtype_bytes(plane->dtype));
    }
    uint64_t most = 2 * POOL_BYTES_MAX / bytes;
    return most > TOKENS_MAX ? TOKENS_MAX : (int64_t)most + 1;
}

struct token {
    int64_t b, position;
};

/* The tokens in a list, with padding and wrong batch indices between them, in order or not. */
static int64_t list_tokens(struct builder *build, struct token *tokens, int64_t most)
{
    int64_t n = 0;
    for (int64_t b = 0; b < build->batch; b++) {
        for (int64_t i = 0; i < build->sequences[b].count && n < most; i++)
            tokens[n++] = (struct token){b, build->sequences[b].first + i};
    }
    for (int64_t extra = (int64_t)draw(build, 4); extra > 0 && n < most; extra--) {
        const struct token odd[] = {{-1, 0}, {0, -1}, {-1, -1}, {INT32_MIN, 7}};
        tokens[n++] = PICK(build, odd);
        if (build->faulty && chance(build, 50))
            tokens[n - 1] = (struct token){build->batch + (int64_t)draw(build, 3), 0};
        if (build->faulty && build->batch > 0 && chance(build, 25))
            tokens[n - 1] = (struct token){(int64_t)draw(build, (uint64_t)build->batch), INT32_MAX};
    }
    if (chance(build, 40)) {
        for (int64_t i = n - 1; i > 0; i--) {
            int64_t k = (int64_t)draw(build, (uint64_t)i + 1);
            struct token token = tokens[i];
            tokens[i] = tokens[k];
            tokens[k] = token;
        }
    }
    return n;
}

static void put_token_arrays(struct builder *build, struct kvp_address *at, const struct token *tokens)
{
    void *batch_indices = take_indices(build, at->nnz), *positions = take_indices(build, at->nnz);
    for (int64_t j = 0; j < at->nnz; j++) {
        set(build, batch_indices, j, tokens[j].b);
        set(build, positions, j, tokens[j].position);
    }
    at->batch_indices = batch_indices;
    at->positions = positions;
}

static void put_slots(struct builder *build, struct kvp_address *at, const struct token *tokens)
{
    void *slots = take_indices(build, at->nnz);
    for (int64_t j = 0; j < at->nnz; j++) {
        int64_t b = tokens[j].b, position = tokens[j].position, page = bad_page(build), slot = -1;
        int known = b >= 0 && b < build->batch && position >= 0;
        if (known && position / build->page_tokens < build->sequences[b].pages)
            page = build->sequences[b].ids[position / build->page_tokens];
        if (page >= 0 && position >= 0)
            slot = page * build->page_tokens + position % build->page_tokens;
        if (build->bits == 32 && slot > INT32_MAX)
            slot = INT32_MAX;
        set(build, slots, j, slot);
    }
    at->slot_mapping = slots;
}

/* kv_indptr and kv_indices, the first list not always at entry 0. */
static void put_csr(struct builder *build, const void **ret_indptr, const void **ret_indices)
{
    int64_t entries = (int64_t)draw(build, 3);
    void *indptr = take_indices(build, build->batch + 1), *indices = take_indices(build, entries + PAGES_MAX);
    for (int64_t b = 0; b < build->batch; b++) {
        set(build, indptr, b, entries);
        for (int64_t i = 0; i < build->sequences[b].pages; i++)
            set(build, indices, entries++, build->sequences[b].ids[i]);
    }
    set(build, indptr, build->batch, entries);
    *ret_indptr = indptr;
    *ret_indices = indices;
}

/* page_table [batch, stride]; what a sequence has no page for is −1. */
static void put_page_table(struct builder *build, const void **ret_table, int64_t *ret_stride, int64_t *ret_pages)
{
    int64_t pages = 6, stride = pages + (int64_t)draw(build, 4);
    void *table = take_indices(build, (build->batch + 1) * stride);
    for (int64_t b = 0; b < build->batch; b++) {
        for (int64_t i = 0; i < pages; i++)
            set(build, table, b * stride + i, i < build->sequences[b].pages ? build->sequences[b].ids[i] : -1);
    }
    *ret_table = table;
    *ret_stride = stride;
    *ret_pages = pages;
}

struct rows_choice {
    const int32_t *seq_slots;
    const uint32_t *row_counts;
    const uint32_t *row_versions;
};

/* kvpool's table: rows and, mostly, heads; counts and versions given apart or not; stale, wrong and absent slots. */
static struct rows_choice put_rows(struct builder *build, struct kvp_rows *ret_table)
{
    uint32_t rows = SEQUENCES_MAX + (uint32_t)draw(build, 5), row_pages = 6 + (uint32_t)draw(build, 5);
    uint64_t stride = 4ull * (row_pages + draw(build, 3));
    int with_heads = chance(build, 75), with_counts = chance(build, 50);
    struct kvp_table_head *heads = take(build, rows * sizeof *heads, 16, 0);
    unsigned char *ids = take(build, rows * stride, 64, 0);
    int32_t *slots = take(build, sizeof *slots * (size_t)(build->batch + 1), 8, 0);
    uint32_t *counts = take(build, sizeof *counts * (size_t)(build->batch + 1), 8, 0);
    uint32_t *versions = take(build, sizeof *versions * (size_t)(build->batch + 1), 8, 0);
    uint32_t turn = (uint32_t)draw(build, rows);
    for (int64_t b = 0; b < build->batch; b++) {
        const struct sequence *sequence = &build->sequences[b];
        uint32_t slot = (turn + 7 * (uint32_t)b) % rows;
        for (uint32_t used = 0; used < b; used++) { /* 7 and the number of rows may share a factor */
            if ((uint32_t)slots[used] == slot) {
                slot = (slot + 1) % rows;
                used = UINT32_MAX;
            }
        }
        int32_t *row = (int32_t *)(ids + slot * stride);
        for (uint32_t i = 0; i < row_pages; i++)
            row[i] = i < sequence->pages ? (int32_t)sequence->ids[i] : -1;
        slots[b] = (int32_t)slot;
        counts[b] = (uint32_t)sequence->pages;
        versions[b] = 2 * (uint32_t)draw(build, 9);
        heads[slot] = (struct kvp_table_head){.version = versions[b], .row_pages = counts[b], .generation = 1};
        heads[slot].length = (uint32_t)sequence->first;
    }
    for (int64_t b = 0; b < build->batch; b++) {
        if (build->faulty && chance(build, 10))
            versions[b]++;
        if (chance(build, 8))
            slots[b] = -1;
        else if (build->faulty && chance(build, 5))
            slots[b] = chance(build, 50) ? (int32_t)rows : INT32_MAX;
    }
    *ret_table = (struct kvp_rows){
        .heads = with_heads ? heads : NULL,
        .rows = (const int32_t *)ids,
        .row_stride = stride,
        .max_sequences = rows,
        .row_pages = row_pages,
    };
    return (struct rows_choice){
        .seq_slots = slots,
        .row_counts = with_counts ? counts : NULL,
        .row_versions = with_heads && chance(build, 50) ? versions : NULL,
    };
}

/* ROWS without token arrays: append_indptr and start_lengths, or one token a sequence. */
static void put_appends(struct builder *build, struct kvp_address *at)
{
    void *indptr = take_indices(build, build->batch + 1), *starts = take_indices(build, build->batch);
    int64_t sum = chance(build, 20) ? 2 : 0;
    for (int64_t b = 0; b < build->batch; b++) {
        set(build, indptr, b, sum);
        set(build, starts, b, chance(build, 5) ? -1 - (int64_t)draw(build, 4) : build->sequences[b].first);
        sum += build->sequences[b].count;
    }
    set(build, indptr, build->batch, sum);
    at->start_lengths = starts;
    at->append_indptr = indptr;
    at->nnz = sum + (int64_t)draw(build, 4);
    if (chance(build, 25)) {
        at->append_indptr = NULL;
        at->nnz = build->batch + (int64_t)draw(build, 3);
    }
}

static void make_address(struct builder *build, struct kvp_address *at, uint32_t element)
{
    struct token tokens[TOKENS_MAX + 8];
    memset(at, 0, sizeof *at);
    make_sequences(build);
    make_tokens(build, token_limit(build, element));
    at->kind = 1 + (uint32_t)draw(build, 4);
    at->index_bits = build->bits;
    at->batch = build->batch;
    if (at->kind == KVP_ADDRESS_ROWS) {
        struct rows_choice choice = put_rows(build, &at->table);
        at->seq_slots = choice.seq_slots;
        at->row_counts = choice.row_counts;
        at->row_versions = choice.row_versions;
    }
    if (at->kind == KVP_ADDRESS_ROWS && chance(build, 60)) {
        put_appends(build, at);
    } else {
        at->nnz = list_tokens(build, tokens, TOKENS_MAX);
        if (at->kind == KVP_ADDRESS_SLOTS)
            put_slots(build, at, tokens);
        else
            put_token_arrays(build, at, tokens);
    }
    if (at->kind == KVP_ADDRESS_CSR)
        put_csr(build, &at->kv_indptr, &at->kv_indices);
    if (at->kind == KVP_ADDRESS_TABLE)
        put_page_table(build, &at->page_table, &at->page_table_stride, &at->page_table_pages);
    if (chance(build, 30)) {
        void *counted = take_indices(build, 1);
        const int64_t counts[] = {at->nnz / 2, at->nnz, at->nnz + 9, 0, -3};
        set(build, counted, 0, PICK(build, counts));
        at->nnz_device = counted;
    }
}

/* ---- operations -------------------------------------------------------------------------------------------------- */

static struct kvp_page_copy *make_copies(struct builder *build, uint32_t *ret_n, uint32_t other_pages)
{
    uint32_t n = 0, most = build->n_spare / 2;
    struct kvp_page_copy *copies = take(build, sizeof *copies * (PAGES_MAX + 4), 8, 0);
    for (; n < most && chance(build, 85); n++) {
        copies[n] = (struct kvp_page_copy){
            .source = build->spare[build->n_spare - 1 - draw(build, most)],
            .destination = build->spare[n],
            .tokens = (uint32_t)draw(build, build->page_tokens + 3u),
        };
    }
    for (uint32_t extra = (uint32_t)draw(build, 3); extra > 0; extra--, n++) {
        copies[n] =
            (struct kvp_page_copy){.source = -1, .destination = (int32_t)draw(build, build->pages), .tokens = 1};
        if (chance(build, 50))
            copies[n] = (struct kvp_page_copy){.source = (int32_t)build->pages, .destination = 0, .tokens = 1};
        else if (chance(build, 50))
            copies[n] = (struct kvp_page_copy){.destination = (int32_t)other_pages, .tokens = 1};
    }
    *ret_n = n;
    return copies;
}

static void make_append(struct builder *build)
{
    struct kvp_append_args *args = &build->out->args.append;
    make_pool(build, 0);
    make_address(build, &args->at, 0);
    make_flats(build, args->at.nnz, 0);
    args->n_planes = build->n_planes;
    args->pages = build->pages;
    args->page_tokens = build->page_tokens;
    args->errors = build->out->ring;
    if (chance(build, 30))
        args->copies = make_copies(build, &args->n_copies, build->pages);
}

/* Random bits are mostly huge or tiny numbers: draw the exponents of some nearer to 1. */
static void tame(const struct kvp_token_view *view, const struct kvp_plane_view *plane, int64_t tokens, uint32_t dtype)
{
    for (int64_t j = 0; j < tokens; j++) {
        for (uint32_t h = 0; h < plane->heads; h++) {
            unsigned char *row = (unsigned char *)view->base + j * view->token_stride + h * view->head_stride;
            for (uint32_t i = 0; i < plane->dim; i++) {
                if (dtype == KVP_DTYPE_F32) {
                    uint32_t *bits = (uint32_t *)row + i;
                    *bits = (*bits & 0x807fffffu) | (uint32_t)(112 + (*bits >> 23) % 26) << 23;
                } else if (dtype == KVP_DTYPE_BF16) {
                    uint16_t *bits = (uint16_t *)row + i;
                    *bits = (uint16_t)((*bits & 0x807f) | (112 + (*bits >> 7) % 26) << 7);
                }
            }
        }
    }
}

static void make_scales(struct builder *build, uint32_t mode)
{
    static const float odd[] = {1e-30f, 1e30f, 0x1p-140f, 0.0f, -0.5f};
    for (uint32_t p = 0; p < build->n_planes; p++) {
        const struct kvp_plane_view *plane = &build->out->planes[p];
        if (mode == KVP_SCALE_COMPUTED) {
            struct kvp_plane_spec spec = {.heads = plane->heads, .dim = 1, .dtype = KVP_DTYPE_F32};
            place_freely(build, &spec, &build->out->others[p]);
            continue;
        }
        uint32_t n = mode == KVP_SCALE_TENSOR ? 1 : plane->heads;
        float *scales = take(build, n * sizeof *scales, 4, 0);
        for (uint32_t i = 0; i < n; i++)
            scales[i] = chance(build, 5) ? PICK(build, odd) : (float)(1 + draw(build, 100000)) / 4096.0f;
        build->out->scales[p] = scales;
    }
}

static void make_quant(struct builder *build, enum kernel_op op)
{
    static const uint32_t wides[] = {KVP_DTYPE_F32, KVP_DTYPE_F16, KVP_DTYPE_BF16};
    uint32_t fp8 = chance(build, 50) ? KVP_DTYPE_FP8_E4M3 : KVP_DTYPE_FP8_E5M2;
    uint32_t wide = PICK(build, wides), mode = (uint32_t)draw(build, 4), element = kvp_dtype_bytes(wide);
    struct kvp_address at;
    make_pool(build, fp8);
    make_address(build, &at, element);
    make_flats(build, at.nnz, element);
    make_scales(build, mode);
    if (op == OP_QUANT_APPEND) {
        for (uint32_t p = 0; p < build->n_planes && chance(build, 70); p++)
            tame(&build->out->flats[p], &build->out->planes[p], at.nnz, wide);
        build->out->args.quant = (struct kvp_quant_append_args){
            .n_planes = build->n_planes,
            .pages = build->pages,
            .page_tokens = build->page_tokens,
            .source_dtype = wide,
            .scale_mode = mode,
            .at = at,
            .errors = build->out->ring,
        };
        return;
    }
    build->out->args.gather = (struct kvp_gather_args){
        .n_planes = build->n_planes,
        .pages = build->pages,
        .page_tokens = build->page_tokens,
        .dtype = wide,
        .scale_mode = mode,
        .at = at,
        .errors = build->out->ring,
    };
}

static void make_gather(struct builder *build)
{
    struct kvp_gather_args *args = &build->out->args.gather;
    if (chance(build, 60)) {
        make_quant(build, OP_GATHER);
        return;
    }
    make_pool(build, 0);
    make_address(build, &args->at, 0);
    make_flats(build, args->at.nnz, 0);
    args->n_planes = build->n_planes;
    args->pages = build->pages;
    args->page_tokens = build->page_tokens;
    args->errors = build->out->ring;
}

/* An output that is wanted four times of five. */
static void *output(struct builder *build, int64_t n, uint32_t bits)
{
    return chance(build, 80) ? take(build, (uint64_t)n * bits / 8, 8, 0) : NULL;
}

static void make_index_inputs(struct builder *build, struct kvp_index_args *args)
{
    int64_t batch = build->batch;
    void *last = take_indices(build, batch), *counts = take_indices(build, batch), *starts = take_indices(build, batch);
    for (int64_t b = 0; b < batch; b++) {
        int64_t page_tokens = build->page_tokens;
        int64_t in_last = 1 + (int64_t)draw(build, (uint64_t)page_tokens + (build->faulty ? 1u : 0u));
        set(build, last, b, build->faulty && chance(build, 5) ? -2 * page_tokens - 1 : in_last);
        set(build, counts, b, build->sequences[b].pages);
        set(build, starts, b, build->faulty && chance(build, 5) ? -5 : build->sequences[b].first);
    }
    args->in_last_page_len = last;
    if (args->source == KVP_INDEX_CSR) {
        put_csr(build, &args->in_kv_indptr, &args->in_kv_indices);
    } else if (args->source == KVP_INDEX_TABLE) {
        put_page_table(build, &args->in_page_table, &args->in_page_table_stride, &args->in_page_table_pages);
        args->in_page_counts = chance(build, 50) ? counts : NULL;
    } else {
        struct rows_choice choice = put_rows(build, &args->table);
        uint64_t *progress = take(build, 8ull * args->table.max_sequences, 8, 0);
        for (int64_t b = 0; b < batch; b++) {
            int64_t slot = choice.seq_slots[b];
            uint32_t version = choice.row_versions != NULL && chance(build, 80) ? choice.row_versions[b] : 99;
            if (slot >= 0 && slot < args->table.max_sequences)
                progress[slot] = KVP_PROGRESS_WORD(version, build->sequences[b].first);
        }
        args->seq_slots = choice.seq_slots;
        args->row_counts = choice.row_counts;
        args->row_versions = choice.row_versions;
        int with_starts = args->table.heads == NULL || chance(build, 50);
        args->start_lengths = with_starts ? starts : NULL;
        /* without versions any word counts, one of a slot that was never written too: only where all are known */
        args->progress = chance(build, 50) ? progress : NULL;
    }
}

static void make_index_outputs(struct builder *build, struct kvp_index_args *args)
{
    int64_t batch = args->batch;
    args->ret_seq_lens = output(build, batch, build->bits);
    args->ret_kv_indptr = output(build, batch + 1, build->bits);
    args->ret_kv_indices = output(build, args->kv_capacity, build->bits);
    args->ret_kv_last_page_len = output(build, batch, build->bits);
    args->ret_append_indptr = output(build, batch + 1, build->bits);
    args->ret_batch_indices = output(build, args->nnz, build->bits);
    args->ret_positions = output(build, args->nnz, build->bits);
    args->ret_slot_mapping = output(build, args->nnz, args->slot_bits);
    args->ret_nnz = output(build, 1, build->bits);
}

static void make_index(struct builder *build)
{
    static const uint32_t page_sizes[] = {1, 3, 16, 64, 128};
    struct kvp_index_args *args = &build->out->args.index;
    build->page_tokens = PICK(build, page_sizes);
    build->pages = 1 + (uint32_t)draw(build, PAGES_MAX);
    make_sequences(build);
    int64_t total = make_tokens(build, INT32_MAX), held = 0;
    args->source = 1 + (uint32_t)draw(build, 3);
    args->index_bits = build->bits;
    args->slot_bits = chance(build, 50) ? 32 : 64;
    args->pages = build->pages;
    args->page_tokens = build->page_tokens;
    args->all_tokens = chance(build, 25);
    args->batch = build->batch;
    void *lengths = take_indices(build, build->batch), *indptr = take_indices(build, build->batch + 1);
    int64_t sum = 0;
    for (int64_t b = 0; b < build->batch; b++) {
        set(build, lengths, b, chance(build, 5) ? -4 : build->sequences[b].count);
        set(build, indptr, b, sum);
        sum += build->sequences[b].count;
        held += build->sequences[b].pages;
    }
    set(build, indptr, build->batch, sum);
    if (chance(build, 50))
        args->append_lengths = lengths;
    else if (chance(build, 50))
        args->append_indptr = indptr;
    args->append_each = (int64_t)draw(build, 3);
    int64_t listed = args->all_tokens ? held * build->page_tokens : total;
    const int64_t sizes[] = {listed, listed + 17, listed / 2, 0};
    args->nnz = PICK(build, sizes);
    args->kv_capacity = chance(build, 80) ? held + (int64_t)draw(build, 5) : held / 2;
    make_index_inputs(build, args);
    if (chance(build, 25)) {
        void *counted = take_indices(build, 1);
        const int64_t counts[] = {build->batch / 2, build->batch, build->batch + 1, 0, -1};
        set(build, counted, 0, PICK(build, counts));
        args->batch_device = counted;
    }
    make_index_outputs(build, args);
    args->errors = build->out->ring;
}

static void make_progress(struct builder *build)
{
    struct kvp_progress_args *args = &build->out->args.progress;
    uint32_t rows = 1 + (uint32_t)draw(build, 200);
    int64_t n = (int64_t)draw(build, rows + 1u);
    uint64_t *progress = take(build, 8ull * rows, 8, 0);
    int32_t *slots = take(build, 4 * (size_t)(n + 1), 8, 0);
    uint32_t *versions = take(build, 4 * (size_t)(n + 1), 8, 0);
    void *lengths = take_indices(build, n);
    for (int64_t i = 0; i < n; i++) {
        slots[i] = (int32_t)(rows - 1 - (uint32_t)i);
        if (chance(build, 10))
            slots[i] = chance(build, 50) ? -1 : (int32_t)rows + (int32_t)draw(build, 2);
        set(build, lengths, i, (int64_t)draw(build, 100000) - 2000);
    }
    *args = (struct kvp_progress_args){
        .progress = progress,
        .max_sequences = rows,
        .index_bits = build->bits,
        .n = n,
        .seq_slots = slots,
        .versions = versions,
        .lengths = lengths,
        .errors = build->out->ring,
    };
    if (chance(build, 30)) {
        void *counted = take_indices(build, 1);
        set(build, counted, 0, (int64_t)draw(build, (uint64_t)n + 3) - 1);
        args->n_device = counted;
    }
}

static void make_page_copy(struct builder *build)
{
    struct kvp_page_copy_args *args = &build->out->args.copy;
    make_pool(build, 0);
    build->batch = 0;
    for (build->n_spare = 0; build->n_spare < build->pages; build->n_spare++)
        build->spare[build->n_spare] = (int32_t)build->n_spare;
    int second = chance(build, 40);
    for (uint32_t p = 0; p < build->n_planes; p++) {
        const struct kvp_plane_view *plane = &build->out->planes[p];
        struct kvp_plane_spec spec = {.heads = plane->heads, .dim = plane->dim, .dtype = plane->dtype};
        build->out->others[p] = *plane;
        if (second)
            place_freely(build, &spec, &build->out->others[p]);
    }
    args->n_planes = build->n_planes;
    args->page_tokens = build->page_tokens;
    args->source_pages = args->destination_pages = build->pages;
    args->copies = make_copies(build, &args->n, build->pages);
    args->errors = build->out->ring;
}

/* A list of distinct pages, with padding and wrong ids between them. */
static int32_t *make_page_ids(struct builder *build, uint32_t *ret_n)
{
    uint32_t n = 0;
    int32_t *ids = take(build, 4 * (2 * PAGES_MAX + 1), 8, 0);
    for (uint32_t page = build->pages; page-- > 0;) {
        if (chance(build, 60))
            ids[n++] = (int32_t)page;
        if (chance(build, 10))
            ids[n++] = (int32_t)bad_page(build);
    }
    *ret_n = n;
    return ids;
}

static void make_page_op(struct builder *build, enum kernel_op op)
{
    make_pool(build, 0);
    uint32_t n;
    int32_t *ids = make_page_ids(build, &n);
    if (op == OP_PAGE_ZERO) {
        build->out->args.zero = (struct kvp_page_zero_args){.n = n, .page_ids = ids};
        build->out->args.zero.n_planes = build->n_planes;
        build->out->args.zero.pages = build->pages;
        build->out->args.zero.page_tokens = build->page_tokens;
        build->out->args.zero.errors = build->out->ring;
        return;
    }
    if (op == OP_PAGE_DIGEST) {
        build->out->args.digest = (struct kvp_page_digest_args){.n = n, .page_ids = ids};
        build->out->args.digest.n_planes = build->n_planes;
        build->out->args.digest.pages = build->pages;
        build->out->args.digest.page_tokens = build->page_tokens;
        build->out->args.digest.ret_digests = take(build, n * sizeof(struct kvp_digest), 16, 0);
        build->out->args.digest.errors = build->out->ring;
        return;
    }
    uint64_t page_bytes = kvp_flat_page_bytes(build->out->planes, build->n_planes, build->page_tokens);
    uint64_t stride = page_bytes + (chance(build, 50) ? 0 : draw(build, 40));
    build->out->args.flat = (struct kvp_page_flat_args){
        .n_planes = build->n_planes,
        .pages = build->pages,
        .page_tokens = build->page_tokens,
        .n = n,
        .page_ids = ids,
        .flat = take(build, n * stride, 64, misaligned(build, 1)),
        .flat_stride = (int64_t)stride,
        .errors = build->out->ring,
    };
}

static void make_ring(struct builder *build)
{
    uint32_t capacity = (uint32_t)draw(build, 40);
    if (chance(build, 10))
        return;
    build->out->ring = take(build, sizeof(struct kvp_error_ring) + capacity * sizeof(struct kvp_error_record), 16, 0);
    build->out->ring->count = 0;
    build->out->ring->capacity = capacity;
    build->out->ring->reserved = 0;
}

static enum kernel_op choose_op(struct builder *build)
{
    /* as often as there is to go wrong */
    static const enum kernel_op ops[] = {
        OP_APPEND,       OP_APPEND,       OP_APPEND,       OP_APPEND,    OP_APPEND,      OP_APPEND,
        OP_APPEND,       OP_QUANT_APPEND, OP_QUANT_APPEND, OP_GATHER,    OP_GATHER,      OP_INDEX,
        OP_QUANT_APPEND, OP_INDEX,        OP_INDEX,        OP_INDEX,     OP_INDEX,       OP_PROGRESS,
        OP_PAGE_COPY,    OP_PAGE_COPY,    OP_PAGE_GATHER,  OP_PAGE_ZERO, OP_PAGE_DIGEST, OP_PAGE_SCATTER,
    };
    return PICK(build, ops);
}

void kernel_case_make(struct kernel_case *ret_case, uint64_t seed, uint64_t number, unsigned char *bytes)
{
    struct builder build = {.out = ret_case};
    build.random = (seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xc2b2ae3d27d4eb4full;
    if (build.random == 0)
        build.random = 1;
    for (int i = 0; i < 8; i++)
        (void)draw(&build, 2);
    memset(ret_case, 0, sizeof *ret_case);
    ret_case->bytes = bytes;
    ret_case->op = choose_op(&build);
    ret_case->threads = (int)draw(&build, 4);
    build.bits = chance(&build, 50) ? 32 : 64;
    build.faulty = chance(&build, 40);
    make_ring(&build);
    switch (ret_case->op) {
    case OP_APPEND:
        make_append(&build);
        break;
    case OP_QUANT_APPEND:
        make_quant(&build, OP_QUANT_APPEND);
        break;
    case OP_GATHER:
        make_gather(&build);
        break;
    case OP_INDEX:
        make_index(&build);
        break;
    case OP_PROGRESS:
        make_progress(&build);
        break;
    case OP_PAGE_COPY:
        make_page_copy(&build);
        break;
    default:
        make_page_op(&build, ret_case->op);
    }
    (void)take(&build, 8, 8, 0); /* the last guard */
}
