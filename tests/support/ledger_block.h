/**
 * A ledger for tests, in memory that is mapped twice: `view` read-only, `store` writable. A store that goes around the
 * ledger's one function faults. Aborts the test on any failed system call.
 *
 * struct ledger_bed is what most tests start from: a ledger with one pool, one session and its attachment.
 */
#ifndef LEDGER_BLOCK_H
#define LEDGER_BLOCK_H

#include "kvp_ledger.h"

#include <check.h>

/* As ck_assert, which writes to a file even when all is well: for what runs a million times. */
#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            ck_abort_msg("not so: %s", #condition);                                                                    \
    } while (0)

struct ledger_block {
    int fd;
    size_t bytes;
    unsigned char *view;
    unsigned char *store;
    struct kvp_ledger ledger;
};

/* An empty ledger in `bytes` of sparse memory (over kvp_ledger_root_bytes). */
void ledger_block_open(struct ledger_block *block, size_t bytes);
/* The same memory without a ledger in it. */
void ledger_block_map(struct ledger_block *block, size_t bytes);
void ledger_block_close(struct ledger_block *block);

/* The violations that an audit finds; each is printed if `print`. */
uint64_t ledger_block_audit(const struct kvp_ledger *ledger, bool print);
/* Fails the test unless the audit is clean. */
void ledger_block_assert_clean(const struct kvp_ledger *ledger);

struct ledger_bed {
    struct ledger_block block;
    struct kvp_ledger *ledger; /* &block.ledger */
    struct kvp_pool_id pool;
    struct kvp_session_id session;
    uint32_t attachment;
};

/* Pool "bed" of that geometry, with 1024 bytes for regions, and the session attached; committed. */
void ledger_bed_make(struct ledger_bed *bed, struct kvp_pool_geometry geometry, bool needs_after);
void ledger_bed_end(struct ledger_bed *bed);
/* One more session, attached; committed. */
uint32_t ledger_bed_attach(struct ledger_bed *bed, struct kvp_session_id *ret_session);
/* A sequence with `reserved` tokens reserved and `written` observed; in the open transaction. */
struct kvp_seq_id ledger_bed_seq(struct ledger_bed *bed, uint32_t attachment, uint64_t key, uint32_t reserved,
                                 uint32_t written);
struct kvp_seq_view ledger_bed_view(const struct ledger_bed *bed, struct kvp_seq_id seq);
struct kvp_page_view ledger_bed_page(const struct ledger_bed *bed, uint32_t page);
uint32_t ledger_bed_free_pages(const struct ledger_bed *bed);

/* The whole of main: run these tests, and return the exit status. */
int ledger_suite(const char *name, const TTest *const tests[], size_t n);
#define LEDGER_SUITE(name, ...)                                                                                        \
    int main(void)                                                                                                     \
    {                                                                                                                  \
        const TTest *const tests[] = {__VA_ARGS__};                                                                    \
        return ledger_suite(name, tests, sizeof(tests) / sizeof(tests[0]));                                            \
    }

#endif
