/**
 * Page digests on the host; kvp_digest.h has the formula.
 *
 * The sums over a row are one loop without a branch, whose keys rise by a constant: the compiler makes it vector code,
 * for each of the widths of widths.h. Pages are shared out over threads. A row whose bytes are no multiple of 8 ends in
 * a word filled up with zeros.
 */
#include <string.h>

#include "../kvp_check.h"
#include "../kvp_digest.h"
#include "address.h"
#include "parallel.h"
#include "widths.h"

struct sums {
    uint64_t lane[2];
    uint64_t words; /* so far: the next word's index */
};

static inline void add_word(struct sums *sums, uint64_t word)
{
    sums->lane[0] += kvp_digest_lane0(word, kvp_digest_key0(sums->words));
    sums->lane[1] += kvp_digest_lane1(word, kvp_digest_key1(sums->words));
    sums->words++;
}

#define ADD_WORDS(target, name)                                                                                        \
    target static void name(struct sums *sums, const unsigned char *row, uint64_t words)                               \
    {                                                                                                                  \
        uint64_t lane0 = 0, lane1 = 0;                                                                                 \
        uint64_t key0 = kvp_digest_key0(sums->words), key1 = kvp_digest_key1(sums->words);                             \
        for (uint64_t i = 0; i < words; i++) {                                                                         \
            uint64_t word;                                                                                             \
            memcpy(&word, row + i * 8, 8);                                                                             \
            lane0 += kvp_digest_lane0(word, key0);                                                                     \
            lane1 += kvp_digest_lane1(word, key1);                                                                     \
            key0 += KVP_DIGEST_STEP0;                                                                                  \
            key1 += KVP_DIGEST_STEP1;                                                                                  \
        }                                                                                                              \
        sums->lane[0] += lane0;                                                                                        \
        sums->lane[1] += lane1;                                                                                        \
        sums->words += words;                                                                                          \
    }

ADD_WORDS(KVP_PLAIN, add_words_plain)
ADD_WORDS(KVP_AVX2, add_words_avx2)
ADD_WORDS(KVP_AVX512, add_words_avx512)

typedef void (*add_words)(struct sums *sums, const unsigned char *row, uint64_t words);
static const add_words add_words_at[KVP_WIDTHS] = {add_words_plain, add_words_avx2, add_words_avx512};

static void add_row(struct sums *sums, add_words add, const unsigned char *row, uint64_t bytes)
{
    add(sums, row, bytes / 8);
    if (bytes % 8 != 0) {
        uint64_t word = 0;
        memcpy(&word, row + bytes / 8 * 8, bytes % 8);
        add_word(sums, word);
    }
}

static struct kvp_digest digest_page(const struct kvp_page_digest_args *args, int32_t page)
{
    struct sums sums = {.words = 0};
    add_words add = add_words_at[kvp_cpu_width()];
    for (uint32_t p = 0; p < args->n_planes; p++) {
        const struct kvp_plane_view *plane = &args->planes[p];
        const unsigned char *base = (const unsigned char *)plane->base + (int64_t)page * plane->page_stride;
        uint64_t bytes = (uint64_t)plane->dim * kvp_dtype_bytes(plane->dtype);
        for (uint32_t t = 0; t < args->page_tokens; t++) {
            for (uint32_t h = 0; h < plane->heads; h++)
                add_row(&sums, add, base + (int64_t)t * plane->token_stride + (int64_t)h * plane->head_stride, bytes);
        }
    }
    return (struct kvp_digest){
        .word = {kvp_digest_finish(sums.lane[0], sums.words), kvp_digest_finish(sums.lane[1], sums.words)},
    };
}

static void digest_entries(void *context, uint64_t first, uint64_t last)
{
    const struct kvp_page_digest_args *args = context;
    for (uint64_t i = first; i < last; i++) {
        int32_t page = args->page_ids[i];
        args->ret_digests[i] = (struct kvp_digest){.word = {0, 0}};
        if (page >= 0 && (uint32_t)page < args->pages)
            args->ret_digests[i] = digest_page(args, page);
        else if (page >= 0)
            kvp_report(args->errors, KVP_BAD_PAGE, (int64_t)i, page);
    }
}

enum kvp_status kvp_host_page_digest(const struct kvp_page_digest_args *args, int threads)
{
    enum kvp_status status = kvp_check_page_digest(args);
    if (status != KVP_OK)
        return status;
    struct kvp_page_digest_args shared = *args;
    uint64_t bytes = args->n * kvp_flat_page_bytes(args->planes, args->n_planes, args->page_tokens);
    kvp_host_parallel(threads, args->n, 1, bytes, digest_entries, &shared);
    return KVP_OK;
}
