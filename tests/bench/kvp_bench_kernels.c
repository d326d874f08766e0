/**
 * kvp_bench_kernels: how fast the kernels are, beside a plain copy measured in the same run.
 *
 *     kvp_bench_kernels [--json] [--backend auto|cuda|host] [--threads N] [--filter TEXT] [--replays N]
 *
 * Each case is a shape of FlashInfer's page benchmark, or a bar of kvpool's own. A case has `sets` of sources,
 * destinations and indices, which its launches take in turn, so that together they exceed the caches wherever one
 * launch is large enough for that to be possible. Bytes are those of K/V read and written; indices are not counted.
 *
 * --json prints a list of {case, tokens, us, gb_per_s, share_of_copy}; the first row is the copy itself.
 */
#include "bench_backend.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_TOKENS 16
#define LAUNCHES    32 /* in a graph */
#define SETS_MAX    32
#define PLANES_MAX  64

struct output {
    struct bench bench;
    const char *filter;
    bool json;
    unsigned rows;
};

static bool wanted(const struct output *out, const char *name)
{
    return !out->filter || strstr(name, out->filter);
}

static void print_row(struct output *out, const char *name, uint32_t tokens, double us, double bytes)
{
    double gb_per_s = us > 0 ? bytes / us * 1e-3 : 0, share = gb_per_s / out->bench.ceiling_gb_per_s;

    if (out->json)
        printf("%s\n  {\"case\": \"%s\", \"tokens\": %u, \"us\": %.3f, \"gb_per_s\": %.1f, \"share_of_copy\": %.4f}",
               out->rows ? "," : "[", name, tokens, us, gb_per_s, share);
    else
        printf("%-44s %8u %11.2f us %9.1f GB/s %7.1f %%\n", name, tokens, us, gb_per_s, 100 * share);
    out->rows++;
    fflush(stdout);
}

static void *must(void *memory)
{
    if (!memory) {
        fprintf(stderr, "kvp_bench_kernels: out of memory\n");
        exit(1);
    }
    return memory;
}

/* 0…n−1 in an order that a fixed seed gives. */
static int32_t *shuffled(uint32_t n)
{
    int32_t *ids = must(malloc((n ? n : 1) * sizeof(*ids)));
    uint64_t x = 88172645463325252ull;

    for (uint32_t i = 0; i < n; i++)
        ids[i] = (int32_t)i;
    for (uint32_t i = n; i > 1; i--) {
        uint32_t k;
        int32_t t;

        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        k = (uint32_t)(x % i);
        t = ids[i - 1];
        ids[i - 1] = ids[k];
        ids[k] = t;
    }
    return ids;
}

/* Copies of as many bytes as some appends move: what a launch of that size can reach at best. */
static void bench_copies(struct output *out)
{
    static const struct {
        const char *name;
        size_t bytes;
    } copies[] = {{"copy_like_h1_d128_5000", 5000 * 512}, /* K and V of 5000 tokens */
                  {"copy_like_h1_d128_16384", 16384 * 512},
                  {"copy_like_h1_d128_65536", 65536 * 512}, /* 32 layers of 256 tokens at H = 8 are as many */
                  {"copy_like_mla_65536", 65536 * 1152}};

    for (size_t i = 0; out->bench.cuda && i < sizeof(copies) / sizeof(copies[0]); i++) {
        if (wanted(out, copies[i].name))
            print_row(out, copies[i].name, 0, bench_copy_us(&out->bench, copies[i].bytes),
                      2.0 * (double)copies[i].bytes);
    }
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

/* A shape: planes of `layers` layers, each with the listed dims (K and V, or ckv and kpe). */
struct append_case {
    const char *name;
    uint32_t layers, heads, dims[2];
    uint32_t dtype, source_dtype; /* differ: quantising append */
    uint32_t scale_mode;
    uint32_t batch;
    const uint32_t *lengths; /* [batch]; NULL: all `each` */
    uint32_t each;
    bool one_launch;    /* all layers at once, or a launch for each */
    bool with_progress; /* a progress launch behind each append */
    bool slots;         /* addressed by a slot mapping, as the index step gives it, instead of CSR */
};

struct append_set {
    struct kvp_append_args append; /* addresses and planes serve both kinds */
    struct kvp_quant_append_args quant;
    struct kvp_plane_view planes[PLANES_MAX];
    struct kvp_plane_view scale_planes[PLANES_MAX];
    struct kvp_token_view sources[PLANES_MAX];
    const float *scales[PLANES_MAX];
    void *indices[5];
};

struct append_run {
    struct bench *bench;
    const struct append_case *shape;
    struct append_set *sets;
    uint32_t n_sets;
    uint32_t planes; /* of a set */
    struct kvp_progress_args progress;
};

static uint32_t case_tokens(const struct append_case *c)
{
    uint32_t tokens = 0;

    for (uint32_t b = 0; b < c->batch; b++)
        tokens += c->lengths ? c->lengths[b] : c->each;
    return tokens;
}

static enum kvp_status append_planes(const struct append_run *run, const struct append_set *set, uint32_t first,
                                     uint32_t n, void *stream)
{
    if (run->shape->dtype != run->shape->source_dtype) {
        struct kvp_quant_append_args args = set->quant;

        args.planes += first;
        args.sources += first;
        args.scales += first;
        args.scale_planes += first;
        args.n_planes = n;
        return BENCH_RUN(run->bench, quant_append, &args, stream);
    }
    struct kvp_append_args args = set->append;

    args.planes += first;
    args.sources += first;
    args.n_planes = n;
    return BENCH_RUN(run->bench, append, &args, stream);
}

static enum kvp_status append_step(void *context, unsigned number, void *stream)
{
    struct append_run *run = context;
    const struct append_set *set = &run->sets[number % run->n_sets];
    uint32_t n = run->shape->one_launch ? run->planes : 2;
    enum kvp_status status = KVP_OK;

    for (uint32_t first = 0; status == KVP_OK && first < run->planes; first += n)
        status = append_planes(run, set, first, n, stream);
    if (status == KVP_OK && run->shape->with_progress)
        status = BENCH_RUN(run->bench, progress, &run->progress, stream);
    return status;
}

/* The indices of set `s`: its own part of a shuffled pool, CSR over int32. */
static void make_indices(struct append_run *run, uint32_t s, const int32_t *ids, uint32_t set_pages, uint32_t pages)
{
    const struct append_case *c = run->shape;
    struct append_set *set = &run->sets[s];
    uint32_t tokens = case_tokens(c), j = 0, page = 0;
    int32_t *batch_indices = must(malloc(tokens * 4)), *positions = must(malloc(tokens * 4));
    int32_t *indptr = must(calloc(c->batch + 1, 4));
    int64_t *slots = must(malloc(tokens * 8));

    for (uint32_t b = 0; b < c->batch; b++) {
        uint32_t length = c->lengths ? c->lengths[b] : c->each;

        for (uint32_t t = 0; t < length; t++, j++) {
            batch_indices[j] = (int32_t)b;
            positions[j] = (int32_t)t;
            slots[j] = (int64_t)ids[(size_t)s * set_pages + page + t / PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS;
        }
        page += (length + PAGE_TOKENS - 1) / PAGE_TOKENS;
        indptr[b + 1] = (int32_t)page;
    }
    set->indices[0] = bench_upload(run->bench, batch_indices, tokens * 4);
    set->indices[1] = bench_upload(run->bench, positions, tokens * 4);
    set->indices[2] = bench_upload(run->bench, indptr, (c->batch + 1) * 4);
    set->indices[3] = bench_upload(run->bench, ids + (size_t)s * set_pages, set_pages * 4);
    set->indices[4] = bench_upload(run->bench, slots, tokens * 8);
    set->append.planes = set->planes;
    set->append.sources = set->sources;
    set->append.pages = pages;
    set->append.page_tokens = PAGE_TOKENS;
    set->append.at.kind = c->slots ? KVP_ADDRESS_SLOTS : KVP_ADDRESS_CSR;
    set->append.at.index_bits = c->slots ? 64 : 32;
    set->append.at.slot_mapping = set->indices[4];
    set->append.at.nnz = tokens;
    set->append.at.batch = c->batch;
    set->append.at.batch_indices = set->indices[0];
    set->append.at.positions = set->indices[1];
    set->append.at.kv_indptr = set->indices[2];
    set->append.at.kv_indices = set->indices[3];
    set->quant.planes = set->planes;
    set->quant.sources = set->sources;
    set->quant.scales = set->scales;
    set->quant.scale_planes = set->scale_planes;
    set->quant.pages = pages;
    set->quant.page_tokens = PAGE_TOKENS;
    set->quant.source_dtype = c->source_dtype;
    set->quant.scale_mode = c->scale_mode;
    set->quant.at = set->append.at;
    free(batch_indices);
    free(positions);
    free(indptr);
    free(slots);
}

/* The tensors: one pool for all sets, and a source for each. Bytes: [0] planes, [1] sources, [2] scales. */
static void make_tensors(struct append_run *run, uint32_t pages, char *memory[3])
{
    const struct append_case *c = run->shape;
    uint32_t tokens = case_tokens(c), element = kvp_dtype_bytes(c->dtype), wide = kvp_dtype_bytes(c->source_dtype);
    char *plane = memory[0], *scale = memory[2] + 4096, *source = memory[1];

    for (uint32_t p = 0; p < run->planes; p++) {
        uint32_t dim = c->dims[p % 2];
        int64_t head = (int64_t)dim * element, token = head * c->heads;
        struct kvp_plane_view view = {plane, token * PAGE_TOKENS, token, head, c->heads, dim, c->dtype, 0};
        struct kvp_plane_view scales = {
            scale, 4ll * c->heads * PAGE_TOKENS, 4ll * c->heads, 4, c->heads, 1, KVP_DTYPE_F32, 0};

        for (uint32_t s = 0; s < run->n_sets; s++) {
            run->sets[s].planes[p] = view;
            run->sets[s].scale_planes[p] = scales;
            run->sets[s].scales[p] = (const float *)memory[2];
            run->sets[s].sources[p].base = source;
            run->sets[s].sources[p].token_stride = (int64_t)dim * wide * c->heads;
            run->sets[s].sources[p].head_stride = (int64_t)dim * wide;
            source += (size_t)tokens * c->heads * dim * wide;
        }
        plane += (size_t)view.page_stride * pages;
        if (c->scale_mode == KVP_SCALE_COMPUTED)
            scale += (size_t)scales.page_stride * pages;
    }
}

static void make_progress(struct append_run *run, void *memory[4])
{
    uint32_t batch = run->shape->batch;
    int32_t *slots = shuffled(batch);

    memory[0] = bench_alloc(run->bench, batch * 8);
    memory[1] = bench_upload(run->bench, slots, batch * 4);
    memory[2] = bench_upload(run->bench, slots, batch * 4);
    memory[3] = bench_upload(run->bench, slots, batch * 4);
    run->progress =
        (struct kvp_progress_args){memory[0], batch, 32, batch, NULL, memory[1], memory[2], memory[3], NULL};
    free(slots);
}

static void bench_append(struct output *out, const struct append_case *c)
{
    uint32_t tokens = case_tokens(c), set_pages = 0, launches = LAUNCHES, pages;
    double width = (double)c->heads * (c->dims[0] + c->dims[1]) * c->layers;
    double bytes = tokens * width * (kvp_dtype_bytes(c->dtype) + kvp_dtype_bytes(c->source_dtype)), us;
    struct append_run run = {&out->bench, c, NULL, 0, 2 * c->layers, {0}};
    size_t plane_bytes, source_bytes, scale_bytes = 4096;
    void *progress[4];
    char *memory[3];
    int32_t *ids;

    if (!wanted(out, c->name))
        return;
    for (uint32_t b = 0; b < c->batch; b++)
        set_pages += ((c->lengths ? c->lengths[b] : c->each) + PAGE_TOKENS - 1) / PAGE_TOKENS;
    run.n_sets = (uint32_t)(4.0 * (double)out->bench.cache_bytes / bytes) + 2;
    run.n_sets = run.n_sets > SETS_MAX ? SETS_MAX : run.n_sets;
    if (bytes > 2e8 || !out->bench.cuda)
        launches = run.n_sets < 4 ? 4 : run.n_sets;
    if (c->layers > 1)
        launches = 8;
    pages = set_pages * run.n_sets;
    run.sets = must(calloc(run.n_sets, sizeof(*run.sets)));
    ids = shuffled(pages);
    for (uint32_t s = 0; s < run.n_sets; s++)
        make_indices(&run, s, ids, set_pages, pages);
    plane_bytes = (size_t)(width * kvp_dtype_bytes(c->dtype)) * PAGE_TOKENS * pages;
    source_bytes = (size_t)(width * kvp_dtype_bytes(c->source_dtype)) * tokens * run.n_sets;
    memory[0] = bench_alloc(&out->bench, plane_bytes);
    memory[1] = bench_alloc_numbers(&out->bench, source_bytes, c->source_dtype);
    if (c->scale_mode == KVP_SCALE_COMPUTED)
        scale_bytes += (size_t)run.planes * c->heads * PAGE_TOKENS * pages * 4;
    memory[2] = bench_alloc_numbers(&out->bench, scale_bytes, KVP_DTYPE_F32);
    make_tensors(&run, pages, memory);
    make_progress(&run, progress);
    bench_renew_ceiling(&out->bench);
    us = bench_time_us(&out->bench, append_step, &run, launches);
    print_row(out, c->name, tokens, us, bytes);
    for (int i = 0; i < 3; i++)
        bench_free(&out->bench, memory[i]);
    for (int i = 0; i < 4; i++)
        bench_free(&out->bench, progress[i]);
    for (uint32_t s = 0; s < run.n_sets; s++) {
        for (int i = 0; i < 5; i++)
            bench_free(&out->bench, run.sets[s].indices[i]);
    }
    free(ids);
    free(run.sets);
}

static const uint32_t mixed_lengths[] = {4993, 1, 1, 1, 1, 1, 1, 1};

/* FlashInfer's shapes: a model's heads and dims, times its request lengths. */
static void bench_standard(struct output *out)
{
    static const struct {
        const char *name;
        uint32_t heads, dim;
    } models[] = {{"l1b_h8_d64", 8, 64}, {"l8b_h8_d128", 8, 128}, {"l70b_tp8_h1_d128", 1, 128}};
    static const struct {
        const char *name;
        uint32_t batch;
        const uint32_t *lengths;
        uint32_t each;
    } loads[] = {{"8x1", 8, NULL, 1},         {"256x1", 256, NULL, 1},    {"4993+7x1", 8, mixed_lengths, 0},
                 {"1x5000", 1, NULL, 5000},   {"8x625", 8, NULL, 625},    {"1x16384", 1, NULL, 16384},
                 {"64x1024", 64, NULL, 1024}, {"64x4096", 64, NULL, 4096}};
    char name[64];

    for (size_t m = 0; m < sizeof(models) / sizeof(models[0]); m++) {
        for (size_t l = 0; l < sizeof(loads) / sizeof(loads[0]); l++) {
            struct append_case c = {.name = name, .layers = 1, .heads = models[m].heads};

            c.dims[0] = c.dims[1] = models[m].dim;
            c.dtype = c.source_dtype = KVP_DTYPE_F16;
            c.batch = loads[l].batch;
            c.lengths = loads[l].lengths;
            c.each = loads[l].each;

            snprintf(name, sizeof(name), "append_%s_%s", models[m].name, loads[l].name);
            bench_append(out, &c);
        }
    }
    for (size_t l = 0; l < sizeof(loads) / sizeof(loads[0]); l++) {
        struct append_case c = {.name = name, .layers = 1, .heads = 1, .dims = {512, 64}};

        c.dtype = c.source_dtype = KVP_DTYPE_F16;
        c.batch = loads[l].batch;
        c.lengths = loads[l].lengths;
        c.each = loads[l].each;

        snprintf(name, sizeof(name), "append_mla_512_64_%s", loads[l].name);
        bench_append(out, &c);
    }
}

/* 256 tokens of one decode step through 32 layers. */
static void bench_layers(struct output *out)
{
    static const struct {
        const char *name;
        bool one_launch, with_progress, slots;
    } forms[] = {{"32_launches", false, false, false},
                 {"one_launch", true, false, false},
                 {"one_launch_slots", true, false, true},
                 {"one_launch_slots_progress", true, true, true}};
    static const uint32_t heads[] = {1, 8};
    char name[64];

    for (size_t h = 0; h < 2; h++) {
        for (size_t f = 0; f < sizeof(forms) / sizeof(forms[0]); f++) {
            struct append_case c = {.name = name, .layers = 32, .heads = heads[h], .dims = {128, 128}};

            c.dtype = c.source_dtype = KVP_DTYPE_F16;
            c.batch = 256;
            c.each = 1;
            c.one_launch = forms[f].one_launch;
            c.with_progress = forms[f].with_progress;
            c.slots = forms[f].slots;
            snprintf(name, sizeof(name), "append_32layers_h%u_%s", heads[h], forms[f].name);
            bench_append(out, &c);
        }
    }
}

static void bench_quant(struct output *out)
{
    static const char *const modes[] = {"none", "tensor", "head", "computed"};
    static const struct {
        const char *name;
        uint32_t source, target;
    } types[] = {{"f16_e4m3", KVP_DTYPE_F16, KVP_DTYPE_FP8_E4M3},
                 {"bf16_e4m3", KVP_DTYPE_BF16, KVP_DTYPE_FP8_E4M3},
                 {"bf16_e5m2", KVP_DTYPE_BF16, KVP_DTYPE_FP8_E5M2},
                 {"f32_e4m3", KVP_DTYPE_F32, KVP_DTYPE_FP8_E4M3}};
    char name[64];

    for (size_t t = 0; t < sizeof(types) / sizeof(types[0]); t++) {
        for (uint32_t m = KVP_SCALE_TENSOR; m <= KVP_SCALE_COMPUTED; m++) {
            struct append_case c = {.name = name, .layers = 1, .heads = 8, .dims = {128, 128}};

            c.dtype = types[t].target;
            c.source_dtype = types[t].source;
            c.scale_mode = m;
            c.batch = 64;
            c.each = 1024;

            snprintf(name, sizeof(name), "append_quant_%s_%s", types[t].name, modes[m]);
            bench_append(out, &c);
        }
    }
    struct append_case mla = {.name = name, .layers = 1, .heads = 1, .dims = {512, 64}};

    mla.dtype = KVP_DTYPE_FP8_E4M3;
    mla.source_dtype = KVP_DTYPE_BF16;
    mla.scale_mode = KVP_SCALE_TENSOR;
    mla.batch = 64;
    mla.each = 1024;
    snprintf(name, sizeof(name), "append_quant_mla_bf16_e4m3_tensor");
    bench_append(out, &mla);
}

/* ---- index ------------------------------------------------------------------------------------------------------- */

struct index_run {
    struct bench *bench;
    struct kvp_index_args args;
};

static enum kvp_status index_step(void *context, unsigned number, void *stream)
{
    struct index_run *run = context;

    (void)number;
    return BENCH_RUN(run->bench, index, &run->args, stream);
}

static void bench_index_case(struct output *out, const char *name, uint32_t batch, uint32_t context_tokens,
                             uint32_t each, bool registered)
{
    uint32_t nnz = batch * each, row_pages = (context_tokens + each + PAGE_TOKENS - 1) / PAGE_TOKENS;
    uint32_t pages = batch * row_pages;
    int32_t *ids = shuffled(pages), *slots = shuffled(batch), *starts = must(malloc(batch * 4));
    size_t row_bytes = (size_t)pages * 4;
    struct index_run run = {&out->bench, {0}};
    struct kvp_index_args *a = &run.args;
    void *memory[11] = {NULL}, *handle = NULL;
    int n = 0;

    if (wanted(out, name)) {
        for (uint32_t b = 0; b < batch; b++)
            starts[b] = (int32_t)context_tokens;
        a->source = KVP_INDEX_ROWS;
        a->index_bits = 32;
        a->slot_bits = 64;
        a->pages = pages;
        a->page_tokens = PAGE_TOKENS;
        a->batch = batch;
        a->nnz = nnz;
        a->kv_capacity = pages;
        a->append_each = each;
        a->table.row_stride = (uint64_t)row_pages * 4;
        a->table.max_sequences = batch;
        a->table.row_pages = row_pages;
        if (registered)
            a->table.rows = bench_upload_registered(&out->bench, ids, row_bytes, &handle);
        else
            a->table.rows = memory[n++] = bench_upload(&out->bench, ids, row_bytes);
        a->seq_slots = memory[n++] = bench_upload(&out->bench, slots, batch * 4);
        a->start_lengths = memory[n++] = bench_upload(&out->bench, starts, batch * 4);
        a->ret_seq_lens = memory[n++] = bench_alloc(&out->bench, batch * 4);
        a->ret_kv_indptr = memory[n++] = bench_alloc(&out->bench, (batch + 1) * 4);
        a->ret_kv_indices = memory[n++] = bench_alloc(&out->bench, pages * 4);
        a->ret_kv_last_page_len = memory[n++] = bench_alloc(&out->bench, batch * 4);
        a->ret_batch_indices = memory[n++] = bench_alloc(&out->bench, nnz * 4);
        a->ret_positions = memory[n++] = bench_alloc(&out->bench, nnz * 4);
        a->ret_slot_mapping = memory[n++] = bench_alloc(&out->bench, (size_t)nnz * 8);
        print_row(out, name, nnz, bench_time_us(&out->bench, index_step, &run, LAUNCHES),
                  8.0 * pages + 16.0 * nnz + 12.0 * batch);
        while (n > 0)
            bench_free(&out->bench, memory[--n]);
        if (registered)
            bench_free_registered(&out->bench, handle, row_bytes);
    }
    free(ids);
    free(slots);
    free(starts);
}

static void bench_index(struct output *out)
{
    static const uint32_t contexts[] = {1024, 32768}, each[] = {1, 256};
    char name[64];

    for (int registered = 0; registered < 2; registered++) {
        for (size_t c = 0; c < 2; c++) {
            for (size_t e = 0; e < 2; e++) {
                snprintf(name, sizeof(name), "index_b256_%uk_%s", contexts[c] / 1024, registered ? "table" : "rows");
                bench_index_case(out, name, 256, contexts[c], each[e], registered);
            }
        }
    }
}

/* ---- pages ------------------------------------------------------------------------------------------------------- */

enum page_operation {
    PAGE_COPY,
    PAGE_GATHER,
    PAGE_ZERO,
    PAGE_DIGEST,
};

struct page_run {
    struct bench *bench;
    enum page_operation operation;
    struct kvp_page_copy_args copy;
    struct kvp_page_flat_args flat;
    struct kvp_page_zero_args zero;
    struct kvp_page_digest_args digest;
};

static enum kvp_status page_step(void *context, unsigned number, void *stream)
{
    struct page_run *run = context;

    (void)number;
    switch (run->operation) {
    case PAGE_COPY:
        return BENCH_RUN(run->bench, page_copy, &run->copy, stream);
    case PAGE_GATHER:
        return BENCH_RUN(run->bench, page_gather, &run->flat, stream);
    case PAGE_ZERO:
        return BENCH_RUN(run->bench, page_zero, &run->zero, stream);
    default:
        return BENCH_RUN(run->bench, page_digest, &run->digest, stream);
    }
}

/* 4096 pages of K and V, 32 KiB each, out of 8192. */
static void bench_pages(struct output *out)
{
    static const struct {
        const char *name;
        double passes; /* over the bytes: read and written, or one */
    } operations[] = {{"page_copy_32k", 2}, {"page_gather_32k", 2}, {"page_zero_32k", 1}, {"page_digest_32k", 1}};
    const uint32_t n = 4096, pages = 2 * n, heads = 8, dim = 128, page_bytes = PAGE_TOKENS * heads * dim * 2;
    struct kvp_plane_view planes[2];
    struct page_run run = {&out->bench, PAGE_COPY, {0}, {0}, {0}, {0}};
    struct kvp_page_copy *copies;
    void *pool, *flat, *list, *id_list, *digests;
    int32_t *ids;

    if (!wanted(out, "page_copy_32k") && !wanted(out, "page_gather_32k") && !wanted(out, "page_zero_32k") &&
        !wanted(out, "page_digest_32k"))
        return;
    copies = must(calloc(n, sizeof(*copies)));
    ids = shuffled(pages);
    for (uint32_t i = 0; i < n; i++)
        copies[i] = (struct kvp_page_copy){ids[i], ids[n + i], PAGE_TOKENS, 0};
    pool = bench_alloc(&out->bench, (size_t)2 * pages * page_bytes);
    flat = bench_alloc(&out->bench, (size_t)2 * n * page_bytes);
    list = bench_upload(&out->bench, copies, n * sizeof(*copies));
    id_list = bench_upload(&out->bench, ids, n * sizeof(*ids));
    digests = bench_alloc(&out->bench, n * sizeof(struct kvp_digest));
    for (uint32_t p = 0; p < 2; p++)
        planes[p] = (struct kvp_plane_view){(char *)pool + (size_t)p * pages * page_bytes,
                                            page_bytes,
                                            heads * dim * 2,
                                            dim * 2,
                                            heads,
                                            dim,
                                            KVP_DTYPE_F16,
                                            0};
    run.copy = (struct kvp_page_copy_args){planes, planes, 2, PAGE_TOKENS, pages, pages, n, 0, list, NULL};
    run.flat = (struct kvp_page_flat_args){planes, 2, pages, PAGE_TOKENS, n, id_list, flat, 2 * page_bytes, NULL};
    run.zero = (struct kvp_page_zero_args){planes, 2, pages, PAGE_TOKENS, n, id_list, NULL};
    run.digest = (struct kvp_page_digest_args){planes, 2, pages, PAGE_TOKENS, n, id_list, digests, NULL};
    for (int o = PAGE_COPY; o <= PAGE_DIGEST; o++) {
        if (!wanted(out, operations[o].name))
            continue;
        run.operation = (enum page_operation)o;
        print_row(out, operations[o].name, n * PAGE_TOKENS, bench_time_us(&out->bench, page_step, &run, 4),
                  operations[o].passes * 2.0 * n * page_bytes);
    }
    bench_free(&out->bench, pool);
    bench_free(&out->bench, flat);
    bench_free(&out->bench, list);
    bench_free(&out->bench, id_list);
    bench_free(&out->bench, digests);
    free(copies);
    free(ids);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"json", no_argument, NULL, 'j'},          {"backend", required_argument, NULL, 'b'},
        {"threads", required_argument, NULL, 't'}, {"filter", required_argument, NULL, 'f'},
        {"replays", required_argument, NULL, 'r'}, {NULL, 0, NULL, 0}};
    struct output out = {.json = false};
    const char *backend = "auto";
    int threads = 0, replays = 0, option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'j') {
            out.json = true;
        } else if (option == 'b') {
            backend = optarg;
        } else if (option == 't') {
            threads = atoi(optarg);
        } else if (option == 'f') {
            out.filter = optarg;
        } else if (option == 'r') {
            replays = atoi(optarg);
        } else {
            fprintf(stderr,
                    "usage: %s [--json] [--backend auto|cuda|host] [--threads N] [--filter TEXT] "
                    "[--replays N]\n",
                    argv[0]);
            return 2;
        }
    }
    if (!bench_open(&out.bench, backend, threads)) {
        fprintf(stderr, "kvp_bench_kernels: no GPU for --backend cuda\n");
        return 1;
    }
    if (replays > 0)
        out.bench.replays = (unsigned)replays;
    if (!out.json)
        printf("%s, a copy moves %.0f GB/s (read and written)\n", out.bench.device, out.bench.ceiling_gb_per_s);
    else
        print_row(&out, "copy", 0, 2e-3 * (1 << 30) / out.bench.ceiling_gb_per_s, 2.0 * (1 << 30));
    bench_copies(&out);
    bench_standard(&out);
    bench_layers(&out);
    bench_quant(&out);
    bench_index(&out);
    bench_pages(&out);
    if (out.json)
        printf("\n]\n");
    return 0;
}
