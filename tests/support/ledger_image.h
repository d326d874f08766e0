/**
 * A copy of all that a small ledger has in its block: what a killed process leaves, to be recovered elsewhere.
 *
 * Small is what ledger_naive.h makes: its sessions and jobs, one pool, and transactions of fewer than
 * IMAGE_LOG_ENTRIES stores. That nothing lies elsewhere is asserted by ledger_image_assert_nothing_elsewhere.
 */
#ifndef LEDGER_IMAGE_H
#define LEDGER_IMAGE_H

#include "ledger_block.h"

#define IMAGE_RANGES      7
#define IMAGE_LOG_ENTRIES 2048u

struct ledger_image {
    struct {
        uint64_t offset, bytes;
    } ranges[IMAGE_RANGES]; /* the log first */
    unsigned char *bytes;
};

void ledger_image_make(struct ledger_image *image, uint64_t extent_bytes);
void ledger_image_free(struct ledger_image *image);
void ledger_image_save(struct ledger_image *image, const struct ledger_block *block);
void ledger_image_restore(const struct ledger_image *image, struct ledger_block *block);

/* Whether the block holds the same bytes, the log's dead entries included. */
bool ledger_image_equals(const struct ledger_image *image, const struct ledger_block *block);
/* Whether the block holds what the image does, apart from the log's dead entries and the epoch. */
bool ledger_image_is(const struct ledger_image *image, const struct ledger_block *block);

void ledger_image_assert_nothing_elsewhere(const struct ledger_image *image, const struct ledger_block *block);

/* Adopt what is in the block, as a new daemon would. Fails the test when that is refused. */
void ledger_block_recover(struct ledger_block *block);

#endif
