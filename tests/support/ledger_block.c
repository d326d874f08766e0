/**
 * A ledger for tests; see ledger_block.h.
 */
#include "ledger_block.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void ledger_block_map(struct ledger_block *block, size_t bytes)
{
    *block = (struct ledger_block){.bytes = bytes};
    block->fd = memfd_create("ledger", MFD_CLOEXEC);
    ck_assert_int_ge(block->fd, 0);
    ck_assert_int_eq(ftruncate(block->fd, (off_t)bytes), 0);
    void *view = mmap(NULL, bytes, PROT_READ, MAP_SHARED, block->fd, 0);
    void *store = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, block->fd, 0);
    ck_assert_ptr_ne(view, MAP_FAILED);
    ck_assert_ptr_ne(store, MAP_FAILED);
    block->view = view;
    block->store = store;
}

void ledger_block_open(struct ledger_block *block, size_t bytes)
{
    ledger_block_map(block, bytes);
    struct kvp_uuid instance = {{0x6b, 0x76, 0x70, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}};
    ck_assert_int_eq(kvp_ledger_format(&block->ledger, block->view, block->store, bytes, instance), KVP_OK);
}

void ledger_block_close(struct ledger_block *block)
{
    ck_assert_int_eq(munmap(block->view, block->bytes), 0);
    ck_assert_int_eq(munmap(block->store, block->bytes), 0);
    ck_assert_int_eq(close(block->fd), 0);
}

static void print_violation(void *arg, const char *violation)
{
    (void)arg;
    printf("  audit: %s\n", violation);
}

uint64_t ledger_block_audit(const struct kvp_ledger *ledger, bool print)
{
    void *scratch = malloc(kvp_audit_scratch_bytes(ledger));
    REQUIRE(scratch != NULL);
    uint64_t violations = kvp_audit(ledger, scratch, print ? print_violation : NULL, NULL);
    free(scratch);
    return violations;
}

void ledger_block_assert_clean(const struct kvp_ledger *ledger)
{
    REQUIRE(ledger_block_audit(ledger, true) == 0);
}

void ledger_bed_make(struct ledger_bed *bed, struct kvp_pool_geometry geometry, bool needs_after)
{
    ledger_block_open(&bed->block, kvp_ledger_root_bytes() + (256u << 20));
    bed->ledger = &bed->block.ledger;
    struct kvp_pool_spec spec = {.geometry = geometry, .needs_after = needs_after, .name = "bed", .region_bytes = 1024};
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_pool_create(bed->ledger, &spec, &bed->pool), KVP_OK);
    kvp_txn_commit(bed->ledger);
    bed->attachment = ledger_bed_attach(bed, &bed->session);
}

void ledger_bed_end(struct ledger_bed *bed)
{
    ledger_block_assert_clean(bed->ledger);
    ledger_block_close(&bed->block);
}

uint32_t ledger_bed_attach(struct ledger_bed *bed, struct kvp_session_id *ret_session)
{
    struct kvp_session_spec spec = {.kind = KVP_SESSION_SOCKET, .pid = 100, .name = "worker"};
    uint32_t attachment = KVP_NONE;
    kvp_txn_begin(bed->ledger);
    ck_assert_int_eq(kvp_session_open(bed->ledger, &spec, ret_session), KVP_OK);
    ck_assert_int_eq(kvp_attach(bed->ledger, bed->pool, *ret_session, KVP_NONE, &attachment), KVP_OK);
    kvp_txn_commit(bed->ledger);
    return attachment;
}

struct kvp_seq_id ledger_bed_seq(struct ledger_bed *bed, uint32_t attachment, uint64_t key, uint32_t reserved,
                                 uint32_t written)
{
    struct kvp_seq_id seq = {0};
    struct kvp_after none = {0};
    uint32_t short_pages;
    bool changed;
    ck_assert_int_eq(kvp_seq_open(bed->ledger, bed->pool, attachment, key, false, &seq), KVP_OK);
    ck_assert_int_eq(kvp_seq_reserve(bed->ledger, bed->pool, seq, reserved, false, none, &short_pages), KVP_OK);
    ck_assert_int_eq(kvp_seq_observe(bed->ledger, bed->pool, seq, written, &changed), KVP_OK);
    return seq;
}

struct kvp_seq_view ledger_bed_view(const struct ledger_bed *bed, struct kvp_seq_id seq)
{
    struct kvp_seq_view view = {0};
    ck_assert_int_eq(kvp_seq_get(bed->ledger, bed->pool, seq, &view), KVP_OK);
    return view;
}

struct kvp_page_view ledger_bed_page(const struct ledger_bed *bed, uint32_t page)
{
    struct kvp_page_view view = {0};
    ck_assert_int_eq(kvp_page_get(bed->ledger, bed->pool, page, &view), KVP_OK);
    return view;
}

uint32_t ledger_bed_free_pages(const struct ledger_bed *bed)
{
    struct kvp_pool_view view = {0};
    ck_assert_int_eq(kvp_pool_get(bed->ledger, bed->pool, &view), KVP_OK);
    return view.free_pages;
}

int ledger_suite(const char *name, const TTest *const tests[], size_t n)
{
    Suite *suite = suite_create(name);
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 60);
    for (size_t i = 0; i < n; i++)
        tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
