/**
 * The index step on the host: lengths, page lists, batch indices, positions and slots of a batch, in one call.
 *
 * First every sequence is measured (start, length, pages, where its ids lie) and the sums of pages and listed tokens
 * are taken; then the outputs are filled. Filling is shared out by page id and by token, never by sequence, so that one
 * long sequence among short ones costs nothing extra.
 *
 *     sequence      0        1   2            batch
 *     pages      |▓▓▓▓▓▓▓|▓▓▓|▓▓▓▓▓▓▓▓▓▓▓▓▓|  kv_indptr     = sums of ⌈length / page_tokens⌉
 *     listed     |▓▓|▓|▓▓▓▓▓▓▓▓▓▓▓|░░░░░░░|   append_indptr = sums of tokens listed; ░ is padding up to nnz
 *
 * A sequence that is reported, or not there, has length 0. Any thread may call.
 */
#include <stdlib.h>

#include "../kvp_check.h"
#include "address.h"
#include "parallel.h"

#define STACK_BATCH 256 /* sequences measured without malloc */

/* One sequence, measured. */
struct measured {
    int64_t length;
    int64_t listed_from; /* position of the first token listed */
    int64_t listed_sum;  /* tokens listed of the sequences before it */
    int64_t page_sum;    /* pages of the sequences before it */
    const void *ids;     /* its page ids… */
    uint32_t ids_bits;   /* …as integers of this width */
};

struct step {
    const struct kvp_index_args *args;
    struct measured *sequences; /* [batch + 1]; the last holds the sums */
};

/* What a sequence says of itself before the counts are checked. */
struct claim {
    int64_t start;
    int64_t count;
    int64_t pages;
    const void *ids;
    uint32_t ids_bits;
    int missing; /* padding, or reported already */
};

static int64_t count_of(const struct kvp_index_args *args, int64_t b)
{
    int64_t count = args->append_each;
    if (args->append_lengths != NULL) {
        count = kvp_index_at(args->append_lengths, args->index_bits, b);
    } else if (args->append_indptr != NULL) {
        count = kvp_wrap_sub(kvp_index_at(args->append_indptr, args->index_bits, b + 1),
                             kvp_index_at(args->append_indptr, args->index_bits, b));
    }
    return count > 0 ? count : 0;
}

static int64_t row_start(const struct kvp_index_args *args, int64_t b, int32_t slot)
{
    if (args->start_lengths != NULL)
        return kvp_index_at(args->start_lengths, args->index_bits, b);
    if (args->progress != NULL) {
        uint64_t word = __atomic_load_n(&args->progress[slot], __ATOMIC_ACQUIRE);
        if (args->row_versions == NULL || KVP_PROGRESS_VERSION(word) == args->row_versions[b])
            return KVP_PROGRESS_TOKENS(word);
    }
    return args->table.heads == NULL ? 0 : __atomic_load_n(&args->table.heads[slot].length, __ATOMIC_ACQUIRE);
}

static struct claim claim_of_row(const struct kvp_index_args *args, int64_t b)
{
    struct claim missing = {.missing = 1};
    const struct kvp_rows *table = &args->table;
    int32_t slot = args->seq_slots[b];
    if (slot < 0)
        return missing;
    if ((uint32_t)slot >= table->max_sequences) {
        kvp_report(args->errors, KVP_BAD_SLOT, b, slot);
        return missing;
    }
    const struct kvp_table_head *head = table->heads == NULL ? NULL : &table->heads[slot];
    if (head != NULL && args->row_versions != NULL) {
        uint32_t version = __atomic_load_n(&head->version, __ATOMIC_ACQUIRE);
        if (version != args->row_versions[b]) {
            kvp_report(args->errors, KVP_BAD_VERSION, b, version);
            return missing;
        }
    }
    uint32_t pages = table->row_pages;
    if (args->row_counts != NULL)
        pages = args->row_counts[b];
    else if (head != NULL)
        pages = __atomic_load_n(&head->row_pages, __ATOMIC_ACQUIRE);
    return (struct claim){
        .start = row_start(args, b, slot),
        .count = count_of(args, b),
        .pages = pages < table->row_pages ? pages : table->row_pages,
        .ids = (const char *)table->rows + (uint64_t)slot * table->row_stride,
        .ids_bits = 32,
    };
}

static const void *advance_ids(const void *ids, uint32_t bits, int64_t entries)
{
    return ids == NULL ? NULL : (const char *)ids + entries * (int64_t)(bits / 8);
}

static struct claim claim_of_csr(const struct kvp_index_args *args, int64_t b)
{
    int64_t from = kvp_index_at(args->in_kv_indptr, args->index_bits, b);
    int64_t pages = kvp_wrap_sub(kvp_index_at(args->in_kv_indptr, args->index_bits, b + 1), from);
    struct claim claim = {.count = count_of(args, b), .ids_bits = args->index_bits};
    int64_t after = 0;
    if (from >= 0 && pages > 0) {
        claim.pages = pages = pages < INT32_MAX ? pages : INT32_MAX;
        claim.ids = advance_ids(args->in_kv_indices, args->index_bits, from);
        after =
            kvp_wrap_add((pages - 1) * args->page_tokens, kvp_index_at(args->in_last_page_len, args->index_bits, b));
    }
    claim.start = kvp_wrap_sub(after, claim.count);
    return claim;
}

static struct claim claim_of_table(const struct kvp_index_args *args, int64_t b)
{
    const void *ids = advance_ids(args->in_page_table, args->index_bits, b * args->in_page_table_stride);
    int64_t pages = 0;
    if (args->in_page_counts != NULL) {
        pages = kvp_index_at(args->in_page_counts, args->index_bits, b);
    } else {
        while (pages < args->in_page_table_pages && kvp_index_at(ids, args->index_bits, pages) >= 0)
            pages++;
    }
    if (pages > args->in_page_table_pages)
        pages = args->in_page_table_pages;
    struct claim claim = {.count = count_of(args, b), .ids = ids, .ids_bits = args->index_bits};
    if (pages > 0) {
        claim.pages = pages;
        claim.start =
            kvp_wrap_add((pages - 1) * args->page_tokens, kvp_index_at(args->in_last_page_len, args->index_bits, b));
    }
    return claim;
}

static struct claim claim_of(const struct kvp_index_args *args, int64_t b)
{
    if (args->source == KVP_INDEX_ROWS)
        return claim_of_row(args, b);
    return args->source == KVP_INDEX_CSR ? claim_of_csr(args, b) : claim_of_table(args, b);
}

/* Measure all sequences; those from `live` on are empty. */
static void measure(const struct step *step, int64_t live)
{
    const struct kvp_index_args *args = step->args;
    int64_t pages = 0, listed = 0;
    for (int64_t b = 0; b < args->batch; b++) {
        struct claim claim = b < live ? claim_of(args, b) : (struct claim){.missing = 1};
        int64_t length = claim.missing ? 0 : kvp_wrap_add(claim.start, claim.count);
        if (claim.start < 0 || length < claim.start || length > claim.pages * args->page_tokens) {
            kvp_report(args->errors, KVP_BAD_POSITION, b, claim.start < 0 ? claim.start : length);
            claim.start = claim.count = length = 0;
        }
        step->sequences[b] = (struct measured){
            .length = length,
            .listed_from = args->all_tokens ? 0 : claim.start,
            .listed_sum = listed,
            .page_sum = pages,
            .ids = claim.ids,
            .ids_bits = claim.ids_bits,
        };
        pages += (length + args->page_tokens - 1) / args->page_tokens;
        listed += args->all_tokens ? length : claim.count;
    }
    step->sequences[args->batch] = (struct measured){.listed_sum = listed, .page_sum = pages};
}

static void put(void *array, uint32_t bits, int64_t i, int64_t value)
{
    if (array == NULL)
        return;
    if (bits == 64)
        ((int64_t *)array)[i] = value;
    else
        ((int32_t *)array)[i] = (int32_t)value;
}

static void put_sequences(const struct step *step)
{
    const struct kvp_index_args *args = step->args;
    for (int64_t b = 0; b < args->batch; b++) {
        int64_t length = step->sequences[b].length;
        put(args->ret_seq_lens, args->index_bits, b, length);
        put(args->ret_kv_last_page_len, args->index_bits, b, length > 0 ? (length - 1) % args->page_tokens + 1 : 0);
    }
    for (int64_t b = 0; b <= args->batch; b++) {
        put(args->ret_kv_indptr, args->index_bits, b, step->sequences[b].page_sum);
        put(args->ret_append_indptr, args->index_bits, b, step->sequences[b].listed_sum);
    }
    put(args->ret_nnz, args->index_bits, 0, step->sequences[args->batch].listed_sum);
}

/* The last sequence whose part of the sum starts at or before `entry`; `batch` where all parts end before it. */
static int64_t sequence_at(const struct step *step, int64_t entry, int by_pages)
{
    int64_t low = 0, high = step->args->batch;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        const struct measured *next = &step->sequences[middle + 1];
        if ((by_pages ? next->page_sum : next->listed_sum) <= entry)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void fill_pages(void *context, uint64_t first, uint64_t last)
{
    const struct step *step = context;
    const struct kvp_index_args *args = step->args;
    int64_t entry = (int64_t)first, end = (int64_t)last;
    for (int64_t b = sequence_at(step, entry, 1); entry < end; b++) {
        const struct measured *sequence = &step->sequences[b];
        int64_t next = step->sequences[b + 1].page_sum < end ? step->sequences[b + 1].page_sum : end;
        for (; entry < next; entry++) {
            put(args->ret_kv_indices, args->index_bits, entry,
                kvp_index_at(sequence->ids, sequence->ids_bits, entry - sequence->page_sum));
        }
    }
}

/* Listed tokens [token, next), all of one sequence. */
static void fill_run(const struct step *step, int64_t b, int64_t token, int64_t next)
{
    const struct kvp_index_args *args = step->args;
    const struct measured *sequence = &step->sequences[b];
    int64_t position = sequence->listed_from + token - sequence->listed_sum;
    if (args->ret_batch_indices != NULL) {
        for (int64_t j = token; j < next; j++)
            put(args->ret_batch_indices, args->index_bits, j, b);
    }
    if (args->ret_positions != NULL) {
        for (int64_t j = token; j < next; j++)
            put(args->ret_positions, args->index_bits, j, position + j - token);
    }
    if (args->ret_slot_mapping == NULL)
        return;
    while (token < next) {
        int64_t offset = position % args->page_tokens;
        int64_t page = kvp_index_at(sequence->ids, sequence->ids_bits, position / args->page_tokens);
        int usable = page >= 0 && page < args->pages;
        for (; offset < args->page_tokens && token < next; offset++, position++, token++) {
            if (!usable)
                kvp_report(args->errors, KVP_BAD_PAGE, token, page);
            put(args->ret_slot_mapping, args->slot_bits, token, usable ? page * args->page_tokens + offset : -1);
        }
    }
}

static void fill_tokens(void *context, uint64_t first, uint64_t last)
{
    const struct step *step = context;
    const struct kvp_index_args *args = step->args;
    int64_t token = (int64_t)first, end = (int64_t)last;
    for (int64_t b = sequence_at(step, token, 0); token < end && b < args->batch; b++) {
        int64_t next = step->sequences[b + 1].listed_sum < end ? step->sequences[b + 1].listed_sum : end;
        fill_run(step, b, token, next);
        token = next;
    }
    for (; token < end; token++) {
        put(args->ret_batch_indices, args->index_bits, token, -1);
        put(args->ret_positions, args->index_bits, token, 0);
        put(args->ret_slot_mapping, args->slot_bits, token, -1);
    }
}

static void fill(struct step *step, int threads)
{
    const struct kvp_index_args *args = step->args;
    const struct measured *sums = &step->sequences[args->batch];
    put_sequences(step);
    if (args->ret_kv_indices != NULL) {
        int64_t entries = sums->page_sum < args->kv_capacity ? sums->page_sum : args->kv_capacity;
        if (sums->page_sum > args->kv_capacity)
            kvp_report(args->errors, KVP_BAD_CAPACITY, 0, sums->page_sum);
        kvp_host_parallel(threads, (uint64_t)entries, 1024, (uint64_t)entries * 16, fill_pages, step);
    }
    if (args->ret_batch_indices != NULL || args->ret_positions != NULL || args->ret_slot_mapping != NULL) {
        if (sums->listed_sum > args->nnz)
            kvp_report(args->errors, KVP_BAD_CAPACITY, 0, sums->listed_sum);
        kvp_host_parallel(threads, (uint64_t)args->nnz, 1024, (uint64_t)args->nnz * 24, fill_tokens, step);
    }
}

enum kvp_status kvp_host_index(const struct kvp_index_args *args, int threads)
{
    enum kvp_status status = kvp_check_index(args);
    if (status != KVP_OK)
        return status;
    int64_t live = args->batch;
    if (args->batch_device != NULL) {
        int64_t counted = kvp_index_load(args->batch_device, args->index_bits);
        live = counted < live ? counted : live;
    }
    struct measured few[STACK_BATCH + 1];
    struct step step = {.args = args, .sequences = few};
    if (args->batch > STACK_BATCH) {
        step.sequences = malloc(((size_t)args->batch + 1) * sizeof *step.sequences);
        if (step.sequences == NULL)
            return KVP_ENOMEM;
    }
    measure(&step, live);
    fill(&step, threads);
    if (step.sequences != few)
        free(step.sequences);
    return KVP_OK;
}
