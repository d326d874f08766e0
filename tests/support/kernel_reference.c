/**
 * The kernels once more, naively: see kernel_reference.h.
 */
#include "kernel_reference.h"

#include <math.h>
#include <string.h>

static unsigned char *element_at(const struct kvp_plane_view *plane, int64_t page, int64_t token, int64_t head)
{
    return (unsigned char *)plane->base + page * plane->page_stride + token * plane->token_stride +
           head * plane->head_stride;
}

static unsigned char *flat_at(const struct kvp_token_view *view, int64_t token, int64_t head)
{
    return (unsigned char *)view->base + token * view->token_stride + head * view->head_stride;
}

static size_t element_bytes(uint32_t dtype)
{
    return dtype == KVP_DTYPE_F32 ? 4 : dtype == KVP_DTYPE_F16 || dtype == KVP_DTYPE_BF16 ? 2 : 1;
}

static int64_t index_at(const void *array, uint32_t bits, int64_t i)
{
    int32_t narrow;
    int64_t wide;
    if (bits == 32) {
        memcpy(&narrow, (const char *)array + i * 4, 4);
        return narrow;
    }
    memcpy(&wide, (const char *)array + i * 8, 8);
    return wide;
}

static void put_index(void *array, uint32_t bits, int64_t i, int64_t value)
{
    int32_t narrow = (int32_t)value;
    if (array == NULL)
        return;
    if (bits == 32)
        memcpy((char *)array + i * 4, &narrow, 4);
    else
        memcpy((char *)array + i * 8, &value, 8);
}

static void report(struct kvp_error_ring *ring, uint32_t kind, int64_t token, int64_t value)
{
    if (ring == NULL)
        return;
    if (ring->count < ring->capacity)
        ring->records[ring->count] = (struct kvp_error_record){.kind = kind, .token = token, .value = value};
    ring->count++;
}

static int64_t bounded(int64_t n, const void *device, uint32_t bits)
{
    if (device != NULL && index_at(device, bits, 0) < n)
        n = index_at(device, bits, 0);
    return n < 0 ? 0 : n;
}

/* ---- where a token goes ------------------------------------------------------------------------------------------ */

struct pool {
    int64_t pages, page_tokens;
    struct kvp_error_ring *errors;
};

/* How many ids of row `slot` count. */
static int64_t ids_in_row(const struct kvp_rows *table, const uint32_t *row_counts, int64_t b, int64_t slot)
{
    int64_t count = table->row_pages;
    if (row_counts != NULL)
        count = row_counts[b];
    else if (table->heads != NULL)
        count = table->heads[slot].row_pages;
    return count < table->row_pages ? count : table->row_pages;
}

static int64_t row_id(const struct kvp_rows *table, int64_t slot, int64_t nth)
{
    return index_at((const char *)table->rows + slot * (int64_t)table->row_stride, 32, nth);
}

/* The sequence of token j and its position; 0 for padding. */
static int sequence_of_token(const struct kvp_address *at, int64_t j, int64_t *ret_b, int64_t *ret_position)
{
    uint32_t bits = at->index_bits;
    if (at->batch_indices != NULL) {
        *ret_b = index_at(at->batch_indices, bits, j);
        *ret_position = index_at(at->positions, bits, j);
        return *ret_b >= 0 && *ret_position >= 0;
    }
    for (int64_t b = 0; b < at->batch; b++) {
        int64_t from = at->append_indptr == NULL ? b : index_at(at->append_indptr, bits, b);
        int64_t to = at->append_indptr == NULL ? b + 1 : index_at(at->append_indptr, bits, b + 1);
        if (j >= from && j < to) {
            int64_t start = index_at(at->start_lengths, bits, b);
            *ret_b = b;
            *ret_position = start + j - from;
            return start >= 0;
        }
    }
    return 0;
}

static int place_of_token(const struct kvp_address *at, const struct pool *pool, int64_t j, int64_t *ret_page,
                          int64_t *ret_offset)
{
    uint32_t bits = at->index_bits;
    int64_t b, position, page;
    if (at->kind == KVP_ADDRESS_SLOTS) {
        int64_t slot = index_at(at->slot_mapping, bits, j);
        if (slot < 0)
            return 0;
        page = slot / pool->page_tokens;
        position = slot;
    } else {
        if (!sequence_of_token(at, j, &b, &position))
            return 0;
        if (b >= at->batch) {
            report(pool->errors, KVP_BAD_BATCH, j, b);
            return 0;
        }
        if (position >= INT32_MAX) { /* behind the last page of any sequence */
            report(pool->errors, KVP_BAD_POSITION, j, position);
            return 0;
        }
        int64_t nth = position / pool->page_tokens, count, slot = 0, first = 0;
        if (at->kind == KVP_ADDRESS_CSR) {
            first = index_at(at->kv_indptr, bits, b);
            count = index_at(at->kv_indptr, bits, b + 1) - first;
        } else if (at->kind == KVP_ADDRESS_TABLE) {
            count = at->page_table_pages;
        } else {
            slot = at->seq_slots[b];
            if (slot < 0)
                return 0;
            if (slot >= at->table.max_sequences) {
                report(pool->errors, KVP_BAD_SLOT, j, slot);
                return 0;
            }
            if (at->row_versions != NULL && at->table.heads[slot].version != at->row_versions[b]) {
                report(pool->errors, KVP_BAD_VERSION, j, at->table.heads[slot].version);
                return 0;
            }
            count = ids_in_row(&at->table, at->row_counts, b, slot);
        }
        if (nth >= count) {
            report(pool->errors, KVP_BAD_POSITION, j, position);
            return 0;
        }
        page = at->kind == KVP_ADDRESS_CSR     ? index_at(at->kv_indices, bits, first + nth)
               : at->kind == KVP_ADDRESS_TABLE ? index_at(at->page_table, bits, b * at->page_table_stride + nth)
                                               : row_id(&at->table, slot, nth);
    }
    if (page < 0 || page >= pool->pages) {
        report(pool->errors, KVP_BAD_PAGE, j, page);
        return 0;
    }
    *ret_page = page;
    *ret_offset = position % pool->page_tokens;
    return 1;
}

/* ---- append and gather of bytes ---------------------------------------------------------------------------------- */

static void copy_pages(const struct kvp_page_copy_args *args)
{
    for (uint32_t i = 0; i < args->n; i++) {
        struct kvp_page_copy copy = args->copies[i];
        if (copy.source < 0 || copy.destination < 0)
            continue;
        if (copy.source >= (int64_t)args->source_pages) {
            report(args->errors, KVP_BAD_PAGE, i, copy.source);
            continue;
        }
        if (copy.destination >= (int64_t)args->destination_pages) {
            report(args->errors, KVP_BAD_PAGE, i, copy.destination);
            continue;
        }
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->sources[p];
            for (uint32_t t = 0; t < copy.tokens && t < args->page_tokens; t++) {
                for (uint32_t h = 0; h < plane->heads; h++)
                    memmove(element_at(&args->destinations[p], copy.destination, t, h),
                            element_at(plane, copy.source, t, h), plane->dim * element_bytes(plane->dtype));
            }
        }
    }
}

void reference_page_copy(const struct kvp_page_copy_args *args)
{
    copy_pages(args);
}

static void move_token(const struct kvp_plane_view *plane, const struct kvp_token_view *flat, int64_t j, int64_t page,
                       int64_t offset, int into_pool)
{
    for (uint32_t h = 0; h < plane->heads; h++) {
        unsigned char *pool_row = element_at(plane, page, offset, h);
        unsigned char *flat_row = flat_at(flat, j, h);
        for (size_t i = 0; i < plane->dim * element_bytes(plane->dtype); i++) {
            if (into_pool)
                pool_row[i] = flat_row[i];
            else
                flat_row[i] = pool_row[i];
        }
    }
}

void reference_append(const struct kvp_append_args *args)
{
    struct pool pool = {args->pages, args->page_tokens, args->errors};
    copy_pages(&(struct kvp_page_copy_args){
        .sources = args->planes,
        .destinations = args->planes,
        .n_planes = args->n_planes,
        .page_tokens = args->page_tokens,
        .source_pages = args->pages,
        .destination_pages = args->pages,
        .n = args->n_copies,
        .copies = args->copies,
        .errors = args->errors,
    });
    int64_t n = bounded(args->at.nnz, args->at.nnz_device, args->at.index_bits);
    for (int64_t j = 0; j < n; j++) {
        int64_t page, offset;
        if (!place_of_token(&args->at, &pool, j, &page, &offset))
            continue;
        for (uint32_t p = 0; p < args->n_planes; p++)
            move_token(&args->planes[p], &args->sources[p], j, page, offset, 1);
    }
}

/* ---- fp8 --------------------------------------------------------------------------------------------------------- */

double reference_fp8_value(uint8_t code, uint32_t dtype)
{
    int e4m3 = dtype == KVP_DTYPE_FP8_E4M3;
    int mantissa_bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
    int exponent = (code & 0x7f) >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    double sign = code & 0x80 ? -1.0 : 1.0;
    if (e4m3 ? (code & 0x7f) == 0x7f : exponent == 31 && mantissa != 0)
        return NAN;
    if (!e4m3 && exponent == 31)
        return sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

uint8_t reference_fp8(double value, uint32_t dtype)
{
    uint8_t top = dtype == KVP_DTYPE_FP8_E4M3 ? 0x7e : 0x7b; /* the largest finite code */
    uint8_t sign = signbit(value) ? 0x80 : 0;
    double magnitude = fabs(value);
    if (isnan(value))
        return 0x7f;
    if (magnitude >= reference_fp8_value(top, dtype))
        return top | sign;
    uint8_t low = 0, high = top; /* value(low) <= magnitude < value(high): codes are in the order of their values */
    while (high - low > 1) {
        uint8_t middle = (uint8_t)((low + high) / 2);
        if (reference_fp8_value(middle, dtype) <= magnitude)
            low = middle;
        else
            high = middle;
    }
    double below = magnitude - reference_fp8_value(low, dtype), above = reference_fp8_value(high, dtype) - magnitude;
    uint8_t code = below < above ? low : above < below ? high : low % 2 == 0 ? low : high;
    return code | sign;
}

double reference_wide_value(const void *element, uint32_t dtype)
{
    if (dtype == KVP_DTYPE_F32) {
        float value;
        memcpy(&value, element, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, element, 2);
    int mantissa_bits = dtype == KVP_DTYPE_F16 ? 10 : 7, bias = dtype == KVP_DTYPE_F16 ? 15 : 127;
    int exponents = dtype == KVP_DTYPE_F16 ? 31 : 255;
    int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
    double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == exponents)
        return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

/* Round a float to a 16-bit format of so many mantissa bits: to nearest even, by counting in its last place. */
static uint16_t narrow(float value, int mantissa_bits, int bias)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    int exponent;
    if (isnan(value))
        return 0x7fff;
    uint16_t infinity = (uint16_t)((2 * bias + 1) << mantissa_bits);
    if (isinf(value))
        return infinity | sign;
    (void)frexp(fabs((double)value), &exponent); /* value in [2^(exponent-1), 2^exponent) */
    int least = 1 - bias - mantissa_bits;        /* place of the smallest number's bit */
    int place = exponent - 1 - mantissa_bits;    /* of the last bit kept */
    if (value == 0.0f || place < least)
        place = least;
    double steps = nearbyint(ldexp(fabs((double)value), -place)); /* nearest even is the default mode */
    double code = steps + ldexp(place - least, mantissa_bits);
    return (uint16_t)(code >= infinity ? infinity : code) | sign;
}

static float scale_at(uint32_t mode, const float *const *scales, const struct kvp_plane_view *planes, uint32_t p,
                      int64_t page, int64_t offset, int64_t head)
{
    float scale = 1.0f;
    if (mode == KVP_SCALE_TENSOR)
        scale = scales[p][0];
    else if (mode == KVP_SCALE_HEAD)
        scale = scales[p][head];
    else if (mode == KVP_SCALE_COMPUTED)
        memcpy(&scale, element_at(&planes[p], page, offset, head), 4);
    return scale;
}

static float compute_scale(const unsigned char *row, uint32_t n, uint32_t dtype, double largest)
{
    double amax = 0;
    for (uint32_t i = 0; i < n; i++) {
        double magnitude = fabs(reference_wide_value(row + i * element_bytes(dtype), dtype));
        if (isinf(magnitude))
            magnitude = 0x1.fffffep127;
        if (magnitude > amax) /* false for a NaN */
            amax = magnitude;
    }
    float scale = (float)amax / (float)largest;
    return scale == 0.0f ? 1.0f : scale;
}

void reference_quant_append(const struct kvp_quant_append_args *args)
{
    struct pool pool = {args->pages, args->page_tokens, args->errors};
    int64_t n = bounded(args->at.nnz, args->at.nnz_device, args->at.index_bits);
    for (int64_t j = 0; j < n; j++) {
        int64_t page, offset;
        if (!place_of_token(&args->at, &pool, j, &page, &offset))
            continue;
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->planes[p];
            for (uint32_t h = 0; h < plane->heads; h++) {
                const unsigned char *row = flat_at(&args->sources[p], j, h);
                if (args->scale_mode == KVP_SCALE_COMPUTED) {
                    float scale = compute_scale(row, plane->dim, args->source_dtype,
                                                plane->dtype == KVP_DTYPE_FP8_E4M3 ? 448 : 57344);
                    memcpy(element_at(&args->scale_planes[p], page, offset, h), &scale, 4);
                }
                float scale = scale_at(args->scale_mode, args->scales, args->scale_planes, p, page, offset, h);
                for (uint32_t i = 0; i < plane->dim; i++) {
                    double value =
                        reference_wide_value(row + i * element_bytes(args->source_dtype), args->source_dtype);
                    /* in double and then to float is the same as one division in float (53 ≥ 2 · 24 + 2 bits) */
                    float quotient = (float)(value / (double)scale);
                    element_at(plane, page, offset, h)[i] = reference_fp8(quotient, plane->dtype);
                }
            }
        }
    }
}

static void store_wide(unsigned char *at, uint32_t dtype, float value)
{
    if (dtype == KVP_DTYPE_F32) {
        uint32_t all_ones = 0x7fffffff;
        memcpy(at, isnan(value) ? (const void *)&all_ones : (const void *)&value, 4);
        return;
    }
    uint16_t code = dtype == KVP_DTYPE_F16 ? narrow(value, 10, 15) : narrow(value, 7, 127);
    memcpy(at, &code, 2);
}

void reference_gather(const struct kvp_gather_args *args)
{
    struct pool pool = {args->pages, args->page_tokens, args->errors};
    int64_t n = bounded(args->at.nnz, args->at.nnz_device, args->at.index_bits);
    for (int64_t j = 0; j < n; j++) {
        int64_t page, offset;
        if (!place_of_token(&args->at, &pool, j, &page, &offset))
            continue;
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->planes[p];
            if (args->dtype == 0) {
                move_token(plane, &args->destinations[p], j, page, offset, 0);
                continue;
            }
            for (uint32_t h = 0; h < plane->heads; h++) {
                float scale = scale_at(args->scale_mode, args->scales, args->scale_planes, p, page, offset, h);
                for (uint32_t i = 0; i < plane->dim; i++) {
                    double value = reference_fp8_value(element_at(plane, page, offset, h)[i], plane->dtype);
                    store_wide(flat_at(&args->destinations[p], j, h) + i * element_bytes(args->dtype), args->dtype,
                               (float)(value * (double)scale));
                }
            }
        }
    }
}

/* ---- index and progress ------------------------------------------------------------------------------------------ */

struct sequence {
    int64_t start, count, length, pages;
    const void *ids; /* page ids, ids_bits wide */
    uint32_t ids_bits;
};

static int64_t appended(const struct kvp_index_args *args, int64_t b)
{
    uint32_t bits = args->index_bits;
    int64_t count = args->append_each;
    if (args->append_lengths != NULL)
        count = index_at(args->append_lengths, bits, b);
    else if (args->append_indptr != NULL)
        count = index_at(args->append_indptr, bits, b + 1) - index_at(args->append_indptr, bits, b);
    return count < 0 ? 0 : count;
}

/* 0 where the sequence is empty without a word, or reported. */
static int sequence_in_rows(const struct kvp_index_args *args, int64_t b, struct sequence *ret)
{
    int64_t slot = args->seq_slots[b];
    if (slot < 0)
        return 0;
    if (slot >= args->table.max_sequences) {
        report(args->errors, KVP_BAD_SLOT, b, slot);
        return 0;
    }
    const struct kvp_table_head *heads = args->table.heads;
    if (args->row_versions != NULL && heads != NULL && heads[slot].version != args->row_versions[b]) {
        report(args->errors, KVP_BAD_VERSION, b, heads[slot].version);
        return 0;
    }
    ret->start = heads == NULL ? 0 : heads[slot].length;
    if (args->start_lengths != NULL)
        ret->start = index_at(args->start_lengths, args->index_bits, b);
    else if (args->progress != NULL &&
             (args->row_versions == NULL || args->progress[slot] >> 32 == args->row_versions[b]))
        ret->start = (int64_t)(args->progress[slot] & 0xffffffffu);
    ret->pages = ids_in_row(&args->table, args->row_counts, b, slot);
    ret->ids = (const char *)args->table.rows + slot * (int64_t)args->table.row_stride;
    ret->ids_bits = 32;
    return 1;
}

static void sequence_in_lists(const struct kvp_index_args *args, int64_t b, struct sequence *ret)
{
    uint32_t bits = args->index_bits;
    int64_t last = index_at(args->in_last_page_len, bits, b);
    ret->ids_bits = bits;
    if (args->source == KVP_INDEX_CSR) {
        int64_t from = index_at(args->in_kv_indptr, bits, b);
        ret->pages = index_at(args->in_kv_indptr, bits, b + 1) - from;
        ret->ids = (const char *)args->in_kv_indices + from * bits / 8;
        ret->start = (ret->pages > 0 ? (ret->pages - 1) * args->page_tokens + last : 0) - ret->count;
        return;
    }
    ret->ids = (const char *)args->in_page_table + b * args->in_page_table_stride * bits / 8;
    if (args->in_page_counts != NULL) {
        ret->pages = index_at(args->in_page_counts, bits, b);
    } else {
        while (ret->pages < args->in_page_table_pages && index_at(ret->ids, bits, ret->pages) >= 0)
            ret->pages++;
    }
    ret->start = ret->pages > 0 ? (ret->pages - 1) * args->page_tokens + last : 0;
}

static struct sequence measure(const struct kvp_index_args *args, int64_t b)
{
    struct sequence none = {0}, found = {.count = appended(args, b)};
    if (args->source != KVP_INDEX_ROWS)
        sequence_in_lists(args, b, &found);
    else if (!sequence_in_rows(args, b, &found))
        return none;
    found.length = found.start + found.count;
    if (found.start < 0) {
        report(args->errors, KVP_BAD_POSITION, b, found.start);
        return none;
    }
    if (found.length > found.pages * args->page_tokens) {
        report(args->errors, KVP_BAD_POSITION, b, found.length);
        return none;
    }
    return found;
}

/* The token outputs of listed token j: sequence b, position t. */
static void list_token(const struct kvp_index_args *args, const struct sequence *sequence, int64_t j, int64_t b,
                       int64_t t)
{
    int64_t page_tokens = args->page_tokens;
    put_index(args->ret_batch_indices, args->index_bits, j, b);
    put_index(args->ret_positions, args->index_bits, j, t);
    if (args->ret_slot_mapping == NULL)
        return;
    int64_t page = index_at(sequence->ids, sequence->ids_bits, t / page_tokens);
    int good = page >= 0 && page < args->pages;
    if (!good)
        report(args->errors, KVP_BAD_PAGE, j, page);
    put_index(args->ret_slot_mapping, args->slot_bits, j, good ? page * page_tokens + t % page_tokens : -1);
}

void reference_index(const struct kvp_index_args *args)
{
    uint32_t bits = args->index_bits;
    int64_t live = bounded(args->batch, args->batch_device, bits), pages = 0, tokens = 0;
    int64_t page_tokens = args->page_tokens;
    int lists_tokens = args->ret_batch_indices != NULL || args->ret_positions != NULL || args->ret_slot_mapping != NULL;
    for (int64_t b = 0; b < args->batch; b++) {
        struct sequence sequence = {0};
        if (b < live)
            sequence = measure(args, b);
        put_index(args->ret_kv_indptr, bits, b, pages);
        put_index(args->ret_append_indptr, bits, b, tokens);
        put_index(args->ret_seq_lens, bits, b, sequence.length);
        put_index(args->ret_kv_last_page_len, bits, b, sequence.length ? (sequence.length - 1) % page_tokens + 1 : 0);
        for (int64_t i = 0; i < (sequence.length + page_tokens - 1) / page_tokens; i++, pages++) {
            if (pages < args->kv_capacity && args->ret_kv_indices != NULL)
                put_index(args->ret_kv_indices, bits, pages, index_at(sequence.ids, sequence.ids_bits, i));
        }
        for (int64_t t = args->all_tokens ? 0 : sequence.start; t < sequence.length; t++, tokens++) {
            if (tokens < args->nnz)
                list_token(args, &sequence, tokens, b, t);
        }
    }
    put_index(args->ret_kv_indptr, bits, args->batch, pages);
    put_index(args->ret_append_indptr, bits, args->batch, tokens);
    put_index(args->ret_nnz, bits, 0, tokens);
    if (args->ret_kv_indices != NULL && pages > args->kv_capacity)
        report(args->errors, KVP_BAD_CAPACITY, 0, pages);
    if (lists_tokens && tokens > args->nnz)
        report(args->errors, KVP_BAD_CAPACITY, 0, tokens);
    for (int64_t j = tokens; j < args->nnz; j++) {
        put_index(args->ret_batch_indices, bits, j, -1);
        put_index(args->ret_positions, bits, j, 0);
        put_index(args->ret_slot_mapping, args->slot_bits, j, -1);
    }
}

void reference_progress(const struct kvp_progress_args *args)
{
    int64_t n = bounded(args->n, args->n_device, args->index_bits);
    for (int64_t i = 0; i < n; i++) {
        int64_t slot = args->seq_slots[i], tokens = index_at(args->lengths, args->index_bits, i);
        if (slot < 0 || tokens < 0)
            continue;
        if (slot >= args->max_sequences)
            report(args->errors, KVP_BAD_SLOT, i, slot);
        else
            args->progress[slot] = (uint64_t)args->versions[i] * 4294967296u + (uint64_t)tokens;
    }
}

/* ---- pages ------------------------------------------------------------------------------------------------------- */

static int good_page(struct kvp_error_ring *errors, uint32_t entry, int32_t page, uint32_t pages)
{
    if (page < 0)
        return 0;
    if (page >= (int64_t)pages)
        report(errors, KVP_BAD_PAGE, entry, page);
    return page < (int64_t)pages;
}

static void move_flat(const struct kvp_page_flat_args *args, int into_pool)
{
    for (uint32_t i = 0; i < args->n; i++) {
        unsigned char *flat = (unsigned char *)args->flat + i * args->flat_stride;
        if (!good_page(args->errors, i, args->page_ids[i], args->pages))
            continue;
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->planes[p];
            size_t row_bytes = plane->dim * element_bytes(plane->dtype);
            for (uint32_t row = 0; row < args->page_tokens * plane->heads; row++, flat += row_bytes) {
                unsigned char *pool = element_at(plane, args->page_ids[i], row / plane->heads, row % plane->heads);
                for (size_t k = 0; k < row_bytes; k++) {
                    if (into_pool)
                        pool[k] = flat[k];
                    else
                        flat[k] = pool[k];
                }
            }
        }
    }
}

void reference_page_gather(const struct kvp_page_flat_args *args)
{
    move_flat(args, 0);
}

void reference_page_scatter(const struct kvp_page_flat_args *args)
{
    move_flat(args, 1);
}

void reference_page_zero(const struct kvp_page_zero_args *args)
{
    for (uint32_t i = 0; i < args->n; i++) {
        if (!good_page(args->errors, i, args->page_ids[i], args->pages))
            continue;
        for (uint32_t p = 0; p < args->n_planes; p++) {
            const struct kvp_plane_view *plane = &args->planes[p];
            for (uint32_t row = 0; row < args->page_tokens * plane->heads; row++)
                memset(element_at(plane, args->page_ids[i], row / plane->heads, row % plane->heads), 0,
                       plane->dim * element_bytes(plane->dtype));
        }
    }
}

/* The formula of the digest, written out: step and seed of each lane, then the final mix. */
static uint64_t lane(uint64_t word, uint64_t number, int which)
{
    static const uint64_t seeds[2] = {0x165667b19e3779f9u, 0x27d4eb2f165667c5u};
    static const uint64_t steps[2] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu};
    uint64_t keyed = word ^ (seeds[which] + number * steps[which]);
    uint64_t product = (keyed % 4294967296u) * (keyed / 4294967296u);
    return product + (which == 0 ? word : word % 4294967296u * 4294967296u + word / 4294967296u);
}

static uint64_t finish(uint64_t sum, uint64_t words)
{
    uint64_t mixed = sum ^ (words * 0x9e3779b97f4a7c15u);
    mixed = (mixed ^ mixed / 8589934592u) * 0xff51afd7ed558ccdu;
    mixed = (mixed ^ mixed / 8589934592u) * 0xc4ceb9fe1a85ec53u;
    return mixed ^ mixed / 8589934592u;
}

static struct kvp_digest page_digest(const struct kvp_page_digest_args *args, int32_t page)
{
    uint64_t sums[2] = {0, 0}, words = 0;
    for (uint32_t p = 0; p < args->n_planes; p++) {
        const struct kvp_plane_view *plane = &args->planes[p];
        size_t bytes = plane->dim * element_bytes(plane->dtype);
        for (uint32_t row = 0; row < args->page_tokens * plane->heads; row++) {
            const unsigned char *at = element_at(plane, page, row / plane->heads, row % plane->heads);
            for (size_t k = 0; k < bytes; k += 8, words++) {
                uint64_t word = 0;
                for (size_t byte = 0; byte < 8 && k + byte < bytes; byte++)
                    word += (uint64_t)at[k + byte] << (8 * byte);
                sums[0] += lane(word, words, 0);
                sums[1] += lane(word, words, 1);
            }
        }
    }
    return (struct kvp_digest){.word = {finish(sums[0], words), finish(sums[1], words)}};
}

void reference_page_digest(const struct kvp_page_digest_args *args)
{
    for (uint32_t i = 0; i < args->n; i++) {
        args->ret_digests[i] = (struct kvp_digest){.word = {0, 0}};
        if (good_page(args->errors, i, args->page_ids[i], args->pages))
            args->ret_digests[i] = page_digest(args, args->page_ids[i]);
    }
}
