/* Copies of a small ledger; see ledger_image.h. */
#include "ledger_image.h"

#include "layout.h"
#include "ledger_naive.h"

#include <stdlib.h>
#include <string.h>

void ledger_image_make(struct ledger_image *image, uint64_t extent_bytes)
{
    const struct {
        uint64_t offset, bytes;
    } ranges[IMAGE_RANGES] = {
        {LOG_OFFSET, IMAGE_LOG_ENTRIES * sizeof(struct block_log_entry)},
        {0, sizeof(struct block_header)},
        {SESSIONS_OFFSET, NAIVE_SESSIONS * sizeof(struct block_session)},
        {OUTCOMES_OFFSET, (uint64_t)NAIVE_SESSIONS * KVP_OUTCOMES_MAX * sizeof(struct block_outcome)},
        {POOLS_OFFSET, offsetof(struct block_pool, blob) + 128},
        {REGIONS_OFFSET, NAIVE_REGIONS * NAIVE_RANKS * sizeof(struct block_region)},
        {JOBS_OFFSET, NAIVE_JOBS * sizeof(struct block_job)},
    };
    uint64_t total = extent_bytes;
    for (int i = 0; i < IMAGE_RANGES; i++) {
        image->ranges[i].offset = ranges[i].offset;
        image->ranges[i].bytes = ranges[i].bytes;
        total += ranges[i].bytes;
    }
    image->ranges[IMAGE_RANGES - 1].bytes = ROOT_BYTES + extent_bytes - JOBS_OFFSET;
    total += image->ranges[IMAGE_RANGES - 1].bytes;
    image->bytes = malloc(total);
    ck_assert_ptr_nonnull(image->bytes);
}

void ledger_image_save(struct ledger_image *image, const struct ledger_block *block)
{
    unsigned char *to = image->bytes;
    for (int i = 0; i < IMAGE_RANGES; to += image->ranges[i++].bytes)
        memcpy(to, block->view + image->ranges[i].offset, image->ranges[i].bytes);
}

void ledger_image_restore(const struct ledger_image *image, struct ledger_block *block)
{
    const unsigned char *from = image->bytes;
    for (int i = 0; i < IMAGE_RANGES; from += image->ranges[i++].bytes)
        memcpy(block->store + image->ranges[i].offset, from, image->ranges[i].bytes);
}

void ledger_image_free(struct ledger_image *image)
{
    free(image->bytes);
}

/* Whether a block holds what an image does, apart from the log's dead entries and the epoch. */
bool ledger_image_is(const struct ledger_image *image, const struct ledger_block *block)
{
    const size_t epoch = offsetof(struct block_header, epoch);
    const unsigned char *bytes = image->bytes + image->ranges[0].bytes;
    for (int i = 1; i < IMAGE_RANGES; bytes += image->ranges[i++].bytes) {
        const unsigned char *other = block->view + image->ranges[i].offset;
        size_t skip = i == 1 ? epoch + sizeof(uint64_t) : 0;
        if (i == 1 && memcmp(bytes, other, epoch) != 0)
            return false;
        if (memcmp(bytes + skip, other + skip, image->ranges[i].bytes - skip) != 0)
            return false;
    }
    return true;
}

/* Nothing is stored outside the ranges; so a copy of them is a copy of the ledger. */
void ledger_image_assert_nothing_elsewhere(const struct ledger_image *image, const struct ledger_block *block)
{
    for (uint64_t at = 0; at < block->bytes; at += 8) {
        bool covered = false;
        for (int i = 0; i < IMAGE_RANGES && !covered; i++) {
            covered = at - image->ranges[i].offset < image->ranges[i].bytes;
            if (covered)
                at = (image->ranges[i].offset + image->ranges[i].bytes - 8) & ~7ull;
        }
        uint64_t word;
        memcpy(&word, block->view + at, 8);
        if (!covered && word != 0)
            ck_abort_msg("a store at %llu", (unsigned long long)at);
    }
}

bool ledger_image_equals(const struct ledger_image *image, const struct ledger_block *block)
{
    const unsigned char *bytes = image->bytes;
    for (int i = 0; i < IMAGE_RANGES; bytes += image->ranges[i++].bytes) {
        if (memcmp(bytes, block->view + image->ranges[i].offset, image->ranges[i].bytes) != 0)
            return false;
    }
    return true;
}

void ledger_block_recover(struct ledger_block *block)
{
    const char *why = "";
    enum kvp_status status = kvp_ledger_open(&block->ledger, block->view, block->store, block->bytes, &why);
    if (status != KVP_OK)
        ck_abort_msg("recovery: %s", why);
}
