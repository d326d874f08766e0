/**
 * Tenants of the core's pools: what one has cached is never another's, quotas and guarantees, and pages that are zeroed
 * before another tenant gets them.
 */
#include "core_cache_calls.h"

#include <string.h>

/* ---- tenants ----------------------------------------------------------------------------------------------------- */

START_TEST(the_same_tokens_of_two_tenants_never_match)
{
    uint64_t seq;
    unsigned char keys[16] = {1};
    struct named named;
    cache_prompt(a, 8);
    ck_assert_uint_eq(match_prompt(other, 8), 0);
    ck_assert_uint_eq(open_prompt(other, 1, 8, &seq), 0);
    ck_assert_int_eq(finish(advance_blocks(other, seq, 8, 8, by_keys(&named, keys, 8, 2), 0)), KVP_OK);
    ck_assert_uint_eq(match(other, by_keys(&named, keys, 8, 2)), 8);
    ck_assert_uint_eq(match(a, by_keys(&named, keys, 8, 2)), 0);
}
END_TEST

START_TEST(a_pool_that_hashes_by_xxh3_is_one_tenants_alone)
{
    struct pool_of pool = small;
    uint64_t seq;
    pool.name = "q";
    pool.block_hash = KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3;
    shell_make_pool(shell, a, &pool);
    ck_assert_int_eq(shell_open(shell, a, "q", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_close(shell, a, "q", seq), KVP_OK);
    ck_assert_int_eq(shell_open(shell, b, "q", 1, false, &seq), KVP_OK);
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    uint64_t key = 1;
    request.pool = (char *)"q";
    request.n_keys = 1;
    request.keys = &key;
    assert_refused(CALL(other, OPEN_SEQUENCES, request), KVP_EPERM, "is tenant 1000's alone; this session is of 2000");
    Kvpool__V1__AttachRequest attach = KVPOOL__V1__ATTACH_REQUEST__INIT;
    attach.pool = (char *)"q";
    assert_refused(CALL(other, ATTACH, attach), KVP_EPERM, "is tenant 1000's alone");
    Kvpool__V1__TenantShare one = KVPOOL__V1__TENANT_SHARE__INIT, two = KVPOOL__V1__TENANT_SHARE__INIT;
    two.tenant = 2;
    pool.tenants[0] = &one;
    pool.tenants[1] = &two;
    pool.name = "r";
    assert_refused(shell_create_pool(shell, a, &pool), KVP_EINVAL, "tenants with block_hash XXH3: 2, must be 0 to 1");
}
END_TEST

START_TEST(shares_that_can_not_be_are_refused)
{
    struct pool_of pool = small;
    Kvpool__V1__TenantShare one = KVPOOL__V1__TENANT_SHARE__INIT, two = KVPOOL__V1__TENANT_SHARE__INIT;
    pool.name = "q";
    pool.reserved_pages = 2;
    pool.tenants[0] = &one;
    pool.tenants[1] = &two;
    assert_refused(shell_create_pool(shell, a, &pool), KVP_EINVAL, "tenants[1]: 0 stands twice");
    two.tenant = 5;
    two.quota_pages = 3;
    two.guaranteed_pages = 4;
    assert_refused(shell_create_pool(shell, a, &pool), KVP_EINVAL,
                   "tenants[1]: 4 pages guaranteed, more than its quota of 3");
    two.quota_pages = 0;
    one.guaranteed_pages = 11;
    assert_refused(shell_create_pool(shell, a, &pool), KVP_EINVAL,
                   "tenants: 15 pages guaranteed in all, the pool has 14 to give");
    pool.policy = (Kvpool__V1__Policy)2;
    assert_refused(shell_create_pool(shell, a, &pool), KVP_EINVAL, "policy: 2, must be 0 to 1");
}
END_TEST

/* A pool in which user 1000 has a quota of 6 pages and user 2000 a guarantee of 4. */
static void begin_shares(void)
{
    static Kvpool__V1__TenantShare one, two;
    struct pool_of pool = small;
    kvpool__v1__tenant_share__init(&one);
    kvpool__v1__tenant_share__init(&two);
    one.tenant = 1000;
    one.quota_pages = 6;
    two.tenant = 2000;
    two.guaranteed_pages = 4;
    pool.tenants[0] = &one;
    pool.tenants[1] = &two;
    cache_begin_with("host", &pool);
}

START_TEST(a_quota_is_told_from_a_pool_that_is_full)
{
    uint64_t seq, second;
    cache_prompt(a, 16);
    ck_assert_int_eq(shell_open(shell, a, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 16, 0), KVP_OK); /* two of its cached pages give way */
    ck_assert_uint_eq(match_prompt(a, 16), 8);
    ck_assert_int_eq(shell_open(shell, b, "p", 1, false, &second), KVP_OK);
    struct shell_call *call = advance_blocks(b, second, 20, 0, NULL, 0);
    ck_assert_uint_eq(shell_missing(call), 3);
    assert_refused(call, KVP_ENOPAGES, "tenant 1000 has a quota of 6 pages in pool \"p\": 3 are missing");
    ck_assert_uint_eq(match_prompt(a, 16), 8);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    call = advance_blocks(other, seq, 64, 0, NULL, 0);
    assert_refused(call, KVP_ENOPAGES, "pool \"p\" is short of 4 pages");
}
END_TEST

START_TEST(use_is_told_for_each_tenant)
{
    cache_prompt(a, 8);
    uint64_t seq = write_prompt(other, 1, 12);
    Kvpool__V1__DescribePoolRequest request = KVPOOL__V1__DESCRIBE_POOL_REQUEST__INIT;
    request.pool = (char *)"p";
    struct shell_call *call = CALL(a, DESCRIBE_POOL, request);
    const Kvpool__V1__CacheInfo *cache = ((const Kvpool__V1__DescribePoolReply *)call->reply)->pool->cache;
    ck_assert_uint_eq(cache->published_pages, 5);
    ck_assert_uint_eq(cache->cached_pages, 2);
    ck_assert_uint_eq(cache->publishes, 5);
    ck_assert_uint_eq(cache->n_tenants, 2);
    ck_assert_uint_eq(cache->tenants[0]->tenant, 1000);
    ck_assert_uint_eq(cache->tenants[0]->pages, 2);
    ck_assert_uint_eq(cache->tenants[0]->cached_pages, 2);
    ck_assert_uint_eq(cache->tenants[0]->quota_pages, 6);
    ck_assert_uint_eq(cache->tenants[1]->pages, 3);
    ck_assert_uint_eq(cache->tenants[1]->guaranteed_pages, 4);
    shell_call_free(shell, call);
    close_ok(other, seq);
}
END_TEST

/* ---- zeroing ----------------------------------------------------------------------------------------------------- */

static unsigned char *page_bytes(uint32_t rank, uint32_t plane, uint32_t page)
{
    unsigned char *slab = shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, rank});
    ck_assert_ptr_nonnull(slab);
    return slab + (plane * small.pages + page) * (uint64_t)PAGE_BYTES;
}

/* User 1000 has written bytes into n pages of every slab, and given them back. */
static void soil(uint32_t n, uint32_t ranks)
{
    uint64_t seq;
    uint32_t free_pages = shell_free_pages(shell, "p");
    ck_assert_int_eq(shell_open(shell, a, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, n * T, 0), KVP_OK);
    for (uint32_t rank = 0; rank < ranks; rank++)
        for (uint32_t page = 0; page < small.pages; page++)
            for (uint32_t plane = 0; plane < 2; plane++)
                memset(page_bytes(rank, plane, page), 0xee, PAGE_BYTES);
    struct kvp_after after = {0, 1};
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    request.pool = (char *)"p";
    request.n_seqs = 1;
    request.seqs = &seq;
    if (strcmp(shell->config.backend, "cuda") == 0) {
        uint32_t attachment;
        ck_assert_int_eq(kvp_attachment_of(&shell->ledger, (struct kvp_pool_id){0, 1}, a.session, &attachment), KVP_OK);
        after.timeline = attachment * KVP_TIMELINES_MAX + 1;
        shell_timelines(shell)[after.timeline].value = 1;
        request.n_after_timelines = request.n_after_values = 1;
        request.after_timelines = &after.timeline;
        request.after_values = &after.value;
    }
    ck_assert_int_eq(finish(CALL(a, CLOSE_SEQUENCES, request)), KVP_OK);
    shell_run_ms(shell, 5);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), free_pages);
}

static void assert_zero(uint64_t seq, uint32_t first, uint32_t pages, uint32_t ranks)
{
    const uint32_t *row = kvp_seq_row(&shell->ledger, (struct kvp_pool_id){0, 1}, (uint32_t)seq);
    static const unsigned char zeros[PAGE_BYTES];
    for (uint32_t rank = 0; rank < ranks; rank++)
        for (uint32_t i = first; i < pages; i++)
            for (uint32_t plane = 0; plane < 2; plane++)
                ck_assert_msg(memcmp(page_bytes(rank, plane, row[i]), zeros, PAGE_BYTES) == 0,
                              "page %u of the row is not zero on slab %u", i, rank);
    ck_assert_uint_eq(cache_view().dirty_pages, 0);
}

static uint32_t unzeroed(void)
{
    static const unsigned char zeros[PAGE_BYTES];
    uint32_t n = 0;
    for (uint32_t page = 0; page < small.pages; page++)
        n += memcmp(page_bytes(0, 0, page), zeros, PAGE_BYTES) != 0;
    return n;
}

START_TEST(pages_of_another_tenant_are_zeroed_before_advance_answers)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, other, "p", seq, 30, 0), KVP_OK);
    assert_zero(seq, 0, 8, 1);
    ck_assert_uint_eq(shell->executors[0].jobs_done, 1);
    ck_assert_uint_eq(unzeroed(), 8);
    ck_assert_int_eq(shell_advance(shell, other, "p", seq, 32, 0), KVP_OK);
    ck_assert_uint_eq(shell->executors[0].jobs_done, 1);
    close_ok(other, seq);
}
END_TEST

START_TEST(pages_that_stay_with_their_tenant_are_not_zeroed)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, b, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, b, "p", seq, 64, 0), KVP_OK);
    ck_assert_uint_eq(unzeroed(), 16);
    ck_assert_uint_eq(shell->executors[0].jobs_done, 0);
}
END_TEST

START_TEST(a_pool_made_so_keeps_the_bytes)
{
    struct pool_of pool = small;
    uint64_t seq;
    pool.zero_on_reuse = KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_OFF;
    shell_end(shell);
    cache_begin_with("host", &pool);
    soil(16, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, other, "p", seq, 64, 0), KVP_OK);
    ck_assert_uint_eq(unzeroed(), 16);
}
END_TEST

static Kvpool__V1__AppendRequest append_of(uint64_t *seq, uint32_t *at, uint32_t *tokens, unsigned char *bytes)
{
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    memset(bytes, 0x55, (size_t)*tokens * 2 * 2 * 4 * 2);
    request.pool = (char *)"p";
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.seqs = seq;
    request.at = at;
    request.tokens = tokens;
    request.inline_ = (ProtobufCBinaryData){(size_t)*tokens * 2 * 2 * 4 * 2, bytes};
    return request;
}

START_TEST(append_zeroes_first_and_leaves_the_rest_of_its_last_page_zero)
{
    uint64_t seq;
    uint32_t at = 0, tokens = 6;
    unsigned char bytes[64 * 32];
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    Kvpool__V1__AppendRequest request = append_of(&seq, &at, &tokens, bytes);
    request.call_id = 5;
    ck_assert_int_eq(finish(CALL(other, APPEND, request)), KVP_OK);
    shell_pump(shell);
    ck_assert_uint_eq(shell_length(shell, other, "p", seq), 6);
    const uint32_t *row = kvp_seq_row(&shell->ledger, (struct kvp_pool_id){0, 1}, (uint32_t)seq);
    for (uint32_t byte = 0; byte < PAGE_BYTES; byte++) {
        ck_assert_uint_eq(page_bytes(0, 0, row[0])[byte], 0x55);
        ck_assert_uint_eq(page_bytes(0, 1, row[1])[byte], byte < PAGE_BYTES / 2 ? 0x55 : 0);
    }
    ck_assert_int_eq(finish(CALL(other, APPEND, request)), KVP_OK); /* a repeat: nothing is done */
    ck_assert_uint_eq(shell->executors[0].jobs_done, 2);
    ck_assert_uint_eq(shell_length(shell, other, "p", seq), 6);
}
END_TEST

START_TEST(fork_and_a_cut_zero_the_page_that_their_copy_goes_to)
{
    uint64_t seq, key = 2, child;
    struct named named;
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(other, seq, 8, 8, by_tokens(&named, prompt, 8, 0), 0)), KVP_OK);
    soil(14, 1);
    close_ok(other, seq);
    open_prompt(other, 1, 8, &seq);
    Kvpool__V1__ForkRequest fork = KVPOOL__V1__FORK_REQUEST__INIT;
    uint32_t tokens = 6, reserved = 6;
    fork.pool = (char *)"p";
    fork.n_parents = fork.n_keys = fork.n_tokens = 1;
    fork.parents = &seq;
    fork.keys = &key;
    fork.tokens = &tokens;
    struct shell_call *call = CALL(other, FORK, fork);
    ck_assert_int_eq(call->status, KVP_OK);
    child = ((const Kvpool__V1__ForkReply *)call->reply)->seqs[0];
    ck_assert_uint_eq(((const Kvpool__V1__ForkReply *)call->reply)->n_copy_seqs, 1);
    shell_call_free(shell, call);
    assert_zero(child, 1, 2, 1);
    Kvpool__V1__AdvanceRequest cut = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    cut.pool = (char *)"p";
    cut.n_seqs = cut.n_reserved = 1;
    cut.seqs = &seq;
    cut.reserved = &reserved;
    cut.truncate = true;
    call = CALL(other, ADVANCE, cut);
    ck_assert_int_eq(call->status, KVP_OK);
    ck_assert_uint_eq(((const Kvpool__V1__AdvanceReply *)call->reply)->n_copy_seqs, 1);
    shell_call_free(shell, call);
    assert_zero(seq, 1, 2, 1);
    ck_assert_uint_eq(shell->executors[0].jobs_done, 2);
    ck_assert_uint_eq(match_prompt(other, 8), 8);
}
END_TEST

/* An Advance of user 2000 over 8 dirty pages, not answered yet: its job is held. */
static struct shell_call *hold_advance(uint64_t *seq, uint64_t call_id)
{
    static uint32_t reserved = 30;
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    shell->hold_jobs = true;
    request.pool = (char *)"p";
    request.call_id = call_id;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = seq;
    request.reserved = &reserved;
    struct shell_call *call = shell_send(shell, other, KVPOOL__V1__METHOD__METHOD_ADVANCE, &request.base, NULL);
    shell_pump(shell);
    ck_assert(!call->answered);
    return call;
}

static void answered_ok(struct shell_call *call)
{
    shell->hold_jobs = false;
    shell_jobs_run(shell, SHELL_JOBS_MAX);
    shell_pump(shell);
    ck_assert(call->answered);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    shell_call_free(shell, call);
}

START_TEST(calls_on_a_sequence_wait_for_its_zeroing)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    struct shell_call *first = hold_advance(&seq, _i == 0 ? 0 : 7), *second;
    uint32_t reserved = 32;
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    request.pool = (char *)"p";
    request.call_id = _i == 0 ? 0 : 8;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &seq;
    request.reserved = &reserved;
    second = shell_send(shell, other, KVPOOL__V1__METHOD__METHOD_ADVANCE, &request.base, NULL);
    shell_pump(shell);
    ck_assert(!second->answered);
    answered_ok(first);
    ck_assert(second->answered);
    ck_assert_int_eq(finish(second), KVP_OK);
    assert_zero(seq, 0, 8, 1);
    close_ok(other, seq);
}
END_TEST

START_TEST(a_daemon_killed_over_a_zeroing_finds_it_done_or_does_it_again)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    hold_advance(&seq, 7);
    if (_i == 1)
        shell_executor_kill(shell, 0);
    restart();
    ck_assert_uint_eq(cache_view().dirty_pages, 8);
    if (_i == 2) { /* the caller does not repeat: the next call sees to it */
        shell->hold_jobs = false;
        ck_assert_int_eq(shell_advance(shell, other, "p", seq, 31, 0), KVP_OK);
    } else {
        answered_ok(hold_advance(&seq, 7));
    }
    assert_zero(seq, 0, 8, 1);
    close_ok(other, seq);
}
END_TEST

START_TEST(an_executor_killed_over_a_zeroing_is_followed_by_one_that_does_it)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    struct shell_call *call = hold_advance(&seq, 7);
    shell_executor_kill(shell, 0);
    shell_run_ms(shell, 10);
    ck_assert(!call->answered);
    answered_ok(call);
    assert_zero(seq, 0, 8, 1);
}
END_TEST

START_TEST(a_zeroing_that_fails_is_told_and_done_by_the_next_call)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    shell->fail_job = KVP_EDEVICE;
    assert_refused(advance_blocks(other, seq, 32, 0, NULL, 0), KVP_EDEVICE, "could not be zeroed: the test says no");
    ck_assert_uint_eq(cache_view().dirty_pages, 8);
    ck_assert_int_eq(shell_advance(shell, other, "p", seq, 32, 0), KVP_OK);
    assert_zero(seq, 0, 8, 1);
}
END_TEST

START_TEST(a_dead_sessions_dirty_pages_stay_so_until_they_are_used_again)
{
    uint64_t seq;
    soil(8, 1);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    hold_advance(&seq, 7);
    kvp_core_disconnected(shell->core, other.session);
    kvp_core_process_ended(shell->core, other.session);
    shell->fail_job = KVP_EDEVICE;
    shell->hold_jobs = false;
    shell_jobs_run(shell, 1);
    shell_run_ms(shell, 100);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
    ck_assert_uint_eq(unzeroed(), 16);
    other = shell_connect(shell, 2000, 44);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, other, "p", seq, 32, 0), KVP_OK);
    assert_zero(seq, 0, 8, 1);
}
END_TEST

START_TEST(pages_are_zeroed_on_every_slab_of_a_pool)
{
    struct pool_of pool = small;
    uint64_t seq;
    pool.devices[0] = "GPU-00000000-0000-0000-0000-00000000000a";
    pool.devices[1] = "GPU-00000000-0000-0000-0000-00000000000b";
    cache_begin_with("cuda", &pool);
    soil(8, 2);
    ck_assert_int_eq(shell_open(shell, other, "p", 1, false, &seq), KVP_OK);
    if (_i == 0) {
        ck_assert_int_eq(shell_advance(shell, other, "p", seq, 30, 0), KVP_OK);
    } else {
        struct shell_call *call = hold_advance(&seq, 7);
        shell_jobs_run(shell, 1); /* the first slab */
        shell_pump(shell);
        ck_assert(!call->answered);
        ck_assert_uint_eq(cache_view().dirty_pages, 8);
        if (_i == 1) {
            shell_executor_kill(shell, 1);
            shell_run_ms(shell, 10);
            answered_ok(call);
        } else { /* nobody knows which slab was done: all of it is done again */
            restart();
            answered_ok(hold_advance(&seq, 7));
        }
    }
    assert_zero(seq, 0, 8, 2);
    shell_end(shell);
}
END_TEST

int main(void)
{
    TCase *tenants = tcase_create("tenants"), *shares = tcase_create("shares"), *zero = tcase_create("zeroing"),
          *slabs = tcase_create("slabs");
    tcase_add_checked_fixture(tenants, cache_begin, cache_end);
    tcase_add_checked_fixture(shares, begin_shares, cache_end);
    tcase_add_checked_fixture(zero, cache_begin, cache_end);
    tcase_add_test(tenants, the_same_tokens_of_two_tenants_never_match);
    tcase_add_test(tenants, a_pool_that_hashes_by_xxh3_is_one_tenants_alone);
    tcase_add_test(tenants, shares_that_can_not_be_are_refused);
    tcase_add_test(shares, a_quota_is_told_from_a_pool_that_is_full);
    tcase_add_test(shares, use_is_told_for_each_tenant);
    tcase_add_test(zero, pages_of_another_tenant_are_zeroed_before_advance_answers);
    tcase_add_test(zero, pages_that_stay_with_their_tenant_are_not_zeroed);
    tcase_add_test(zero, a_pool_made_so_keeps_the_bytes);
    tcase_add_test(zero, append_zeroes_first_and_leaves_the_rest_of_its_last_page_zero);
    tcase_add_test(zero, fork_and_a_cut_zero_the_page_that_their_copy_goes_to);
    tcase_add_loop_test(zero, calls_on_a_sequence_wait_for_its_zeroing, 0, 2);
    tcase_add_loop_test(zero, a_daemon_killed_over_a_zeroing_finds_it_done_or_does_it_again, 0, 3);
    tcase_add_test(zero, an_executor_killed_over_a_zeroing_is_followed_by_one_that_does_it);
    tcase_add_test(zero, a_zeroing_that_fails_is_told_and_done_by_the_next_call);
    tcase_add_test(zero, a_dead_sessions_dirty_pages_stay_so_until_they_are_used_again);
    tcase_add_loop_test(slabs, pages_are_zeroed_on_every_slab_of_a_pool, 0, 3);
    Suite *suite = suite_create("core: tenants");
    suite_add_tcase(suite, tenants);
    suite_add_tcase(suite, shares);
    suite_add_tcase(suite, zero);
    suite_add_tcase(suite, slabs);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
