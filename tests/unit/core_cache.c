/**
 * The core's prefix cache: blocks named by tokens or by keys, taken along when a sequence is opened, published by Advance
 * and by progress words; Match, ListCache, Pin, Evict.
 */
#include "core_cache_calls.h"

#include <string.h>

static struct shell_call *pin_call(struct kvp_caller caller, uint32_t tokens, uint32_t lease_ms)
{
    Kvpool__V1__PinRequest request = KVPOOL__V1__PIN_REQUEST__INIT;
    struct named named;
    request.pool = (char *)"p";
    request.blocks = by_tokens(&named, prompt, tokens, 0);
    request.lease_ms = lease_ms;
    return CALL(caller, PIN, request);
}

static uint32_t pin_prompt(struct kvp_caller caller, uint32_t tokens, uint32_t lease_ms)
{
    struct shell_call *call = pin_call(caller, tokens, lease_ms);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    uint32_t pinned = ((const Kvpool__V1__PinReply *)call->reply)->pinned[0];
    shell_call_free(shell, call);
    return pinned;
}

static struct shell_call *evict_call(struct kvp_caller caller, uint32_t pages, Kvpool__V1__Blocks *blocks, bool all)
{
    Kvpool__V1__EvictRequest request = KVPOOL__V1__EVICT_REQUEST__INIT;
    request.pool = (char *)"p";
    request.pages = pages;
    request.blocks = blocks;
    request.all = all;
    return CALL(caller, EVICT, request);
}

static uint64_t evict(struct kvp_caller caller, uint32_t pages, Kvpool__V1__Blocks *blocks, bool all)
{
    struct shell_call *call = evict_call(caller, pages, blocks, all);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    uint64_t evicted = ((const Kvpool__V1__EvictReply *)call->reply)->pages;
    shell_call_free(shell, call);
    return evicted;
}

/* ---- taken along ------------------------------------------------------------------------------------------------- */

START_TEST(a_written_prefix_is_taken_along_by_another_session_of_the_tenant)
{
    uint64_t seq;
    ck_assert_uint_eq(open_prompt(a, 1, 12, &seq), 0);
    close_ok(a, seq);
    cache_prompt(a, 12);
    ck_assert_uint_eq(open_prompt(b, 7, 12, &seq), 12);
    ck_assert_uint_eq(shell_length(shell, b, "p", seq), 12);
    prompt[7]++;
    ck_assert_uint_eq(open_prompt(b, 8, 12, &seq), 4);
    ck_assert_uint_eq(open_prompt(a, 9, 3, &seq), 0);
    struct kvp_cache_view view = cache_view();
    ck_assert_uint_eq(view.lookup_blocks, 3 + 3 + 3 + 3);
    ck_assert_uint_eq(view.hit_blocks, 3 + 1);
}
END_TEST

START_TEST(tokens_that_fill_no_page_are_left_out_of_account)
{
    uint64_t seq;
    struct named named;
    open_prompt(a, 1, 11, &seq);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 11, 11, by_tokens(&named, prompt, 11, 0), 0)), KVP_OK);
    ck_assert_uint_eq(match_prompt(a, 11), 8);
    ck_assert_uint_eq(match_prompt(a, 12), 8);
    ck_assert_uint_eq(match_prompt(a, 7), 4);
}
END_TEST

START_TEST(only_written_pages_are_found)
{
    uint64_t seq;
    struct named named;
    open_prompt(a, 1, 12, &seq);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 12, 0, by_tokens(&named, prompt, 12, 0), 0)), KVP_OK);
    ck_assert_uint_eq(match_prompt(a, 12), 0);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, 12, 9), KVP_OK);
    ck_assert_uint_eq(match_prompt(a, 12), 8);
}
END_TEST

START_TEST(a_page_completed_in_decode_is_found_once_its_progress_word_is_there)
{
    uint32_t attachment = shell_attach(shell, a, "p");
    struct named named;
    uint64_t seq, theirs;
    open_prompt(a, 1, 8, &seq);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 12, 8, by_tokens(&named, prompt, 8, 0), 0)), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 20, 0, by_tokens(&named, prompt + 8, 12, 2), 0)), KVP_OK);
    ck_assert_uint_eq(match_prompt(b, 20), 8);
    shell_progress(shell, attachment)[(uint32_t)seq] = KVP_PROGRESS_WORD(2, 13);
    ck_assert_uint_eq(match_prompt(b, 20), 12);
    restart();
    shell_progress(shell, attachment)[(uint32_t)seq] = KVP_PROGRESS_WORD(2, 16);
    ck_assert_uint_eq(pin_prompt(b, 16, 1000), 16);
    shell_progress(shell, attachment)[(uint32_t)seq] = KVP_PROGRESS_WORD(2, 20);
    ck_assert_uint_eq(open_prompt(b, 7, 20, &theirs), 20);
    close_ok(b, theirs);
}
END_TEST

/* A batch whose words cover more pages than one transaction can publish, of pages of one token. */
START_TEST(words_of_more_pages_than_a_transaction_holds_are_all_seen)
{
    enum { SEQS = 90, TOKENS = 4096 };
    static const struct pool_of large = {.name = "p",
                                         .pages = SEQS * TOKENS,
                                         .page_tokens = 1,
                                         .layers = 1,
                                         .max_sequences = SEQS + 1,
                                         .max_sequence_tokens = TOKENS};
    static uint32_t tokens[TOKENS];
    Kvpool__V1__GetSeqLensRequest request = KVPOOL__V1__GET_SEQ_LENS_REQUEST__INIT;
    uint64_t seqs[SEQS];
    struct named named;
    cache_end();
    cache_begin_with("host", &large);
    uint32_t attachment = shell_attach(shell, a, "p");
    for (uint32_t i = 0; i < SEQS; i++) {
        for (uint32_t k = 0; k < TOKENS; k++)
            tokens[k] = i * TOKENS + k;
        ck_assert_int_eq(shell_open(shell, a, "p", i, false, &seqs[i]), KVP_OK);
        ck_assert_int_eq(finish(advance_blocks(a, seqs[i], TOKENS, 0, by_tokens(&named, tokens, TOKENS, 0), 0)),
                         KVP_OK);
        shell_progress(shell, attachment)[(uint32_t)seqs[i]] = KVP_PROGRESS_WORD(2, TOKENS);
    }
    request.pool = (char *)"p";
    request.n_seqs = SEQS;
    request.seqs = seqs;
    struct shell_call *call = CALL(a, GET_SEQ_LENS, request);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    const Kvpool__V1__GetSeqLensReply *reply = (const Kvpool__V1__GetSeqLensReply *)call->reply;
    for (uint32_t i = 0; i < SEQS; i++)
        ck_assert_uint_eq(reply->lengths[i], TOKENS);
    shell_call_free(shell, call);
    ck_assert_uint_eq(cache_view().published, SEQS * TOKENS);
}
END_TEST

/* As many pages as a call may take are more than one transaction evicts and takes: said, and done in two. */
START_TEST(advance_that_evicts_too_many_pages_changes_nothing_and_says_so)
{
    static const struct pool_of large = {.name = "p",
                                         .pages = KVP_CALL_PAGES_MAX,
                                         .page_tokens = 1,
                                         .layers = 1,
                                         .max_sequences = 4,
                                         .max_sequence_tokens = KVP_CALL_PAGES_MAX};
    static uint32_t tokens[KVP_CALL_PAGES_MAX];
    struct named named;
    uint64_t seq;
    cache_end();
    cache_begin_with("host", &large);
    for (uint32_t i = 0; i < KVP_CALL_PAGES_MAX; i++)
        tokens[i] = i;
    Kvpool__V1__Blocks *blocks = by_tokens(&named, tokens, KVP_CALL_PAGES_MAX, 0);
    ck_assert_int_eq(shell_open(shell, a, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(a, seq, KVP_CALL_PAGES_MAX, 0, blocks, 0)), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, KVP_CALL_PAGES_MAX, KVP_CALL_PAGES_MAX), KVP_OK);
    close_ok(a, seq);
    ck_assert_uint_eq(match(a, blocks), KVP_CALL_PAGES_MAX);
    ck_assert_int_eq(shell_open(shell, a, "p", 2, false, &seq), KVP_OK);
    assert_refused(advance_blocks(a, seq, KVP_CALL_PAGES_MAX, 0, NULL, 0), KVP_ELIMIT,
                   "changes more than the 1048576 words of one transaction; ask for fewer pages");
    ck_assert_uint_eq(match(a, blocks), KVP_CALL_PAGES_MAX);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, KVP_CALL_PAGES_MAX / 2, 0), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "p", seq, KVP_CALL_PAGES_MAX, 0), KVP_OK);
}
END_TEST

START_TEST(engines_keys_of_every_size_are_found_and_match_no_tokens)
{
    unsigned char keys[2 * KVP_BLOCK_KEY_BYTES_MAX];
    struct named named;
    for (uint32_t i = 0; i < sizeof(keys); i++)
        keys[i] = (unsigned char)i;
    for (uint32_t n = KVP_BLOCK_KEY_BYTES_MIN; n <= KVP_BLOCK_KEY_BYTES_MAX; n++) {
        uint64_t seq;
        ck_assert_int_eq(shell_open(shell, a, "p", n, false, &seq), KVP_OK);
        ck_assert_uint_eq(match(b, by_keys(&named, keys, n, 2)), 0);
        ck_assert_int_eq(finish(advance_blocks(a, seq, 8, 8, by_keys(&named, keys, n, 2), 0)), KVP_OK);
        close_ok(a, seq);
        ck_assert_uint_eq(match(b, by_keys(&named, keys, n, 2)), 8);
        ck_assert_uint_eq(match(b, by_tokens(&named, (const uint32_t *)(void *)keys, 8, 0)), 0);
        evict(a, 0, NULL, false);
    }
}
END_TEST

START_TEST(extra_is_part_of_every_block)
{
    struct named named;
    uint64_t seq;
    Kvpool__V1__Blocks *blocks = by_tokens(&named, prompt, 8, 0);
    blocks->extra = (ProtobufCBinaryData){4, (uint8_t *)"lora"};
    struct shell_call *call = open_blocks(a, 1, blocks, 0);
    seq = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    ck_assert_int_eq(finish(call), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 8, 8, blocks, 0)), KVP_OK);
    ck_assert_uint_eq(match(a, blocks), 8);
    ck_assert_uint_eq(match_prompt(a, 8), 0);
}
END_TEST

START_TEST(an_open_key_says_with_which_of_the_blocks_its_row_begins)
{
    uint64_t seq = write_prompt(a, 1, 12), again;
    struct named named;
    struct shell_call *call = open_blocks(a, 1, by_tokens(&named, prompt, 16, 0), 0);
    const Kvpool__V1__OpenSequencesReply *reply = (const Kvpool__V1__OpenSequencesReply *)call->reply;
    ck_assert_uint_eq(reply->cached[0], 12);
    ck_assert_uint_eq(reply->seqs[0], seq);
    shell_call_free(shell, call);
    prompt[5]++;
    call = open_blocks(a, 1, by_tokens(&named, prompt, 16, 0), 0);
    ck_assert_uint_eq(((const Kvpool__V1__OpenSequencesReply *)call->reply)->cached[0], 4);
    shell_call_free(shell, call);
    /* a repeat of the call that took a prefix along says the same, though the prefix grew meanwhile */
    prompt[5]--;
    call = open_blocks(b, 2, by_tokens(&named, prompt, 16, 0), 77);
    again = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    shell_call_free(shell, call);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 16, 16, by_tokens(&named, prompt, 16, 0), 0)), KVP_OK);
    call = open_blocks(b, 2, by_tokens(&named, prompt, 16, 0), 77);
    reply = (const Kvpool__V1__OpenSequencesReply *)call->reply;
    ck_assert_uint_eq(reply->seqs[0], again);
    ck_assert_uint_eq(reply->cached[0], 12);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_batch_takes_a_prefix_for_each_of_its_sequences)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__Blocks blocks = KVPOOL__V1__BLOCKS__INIT;
    uint32_t tokens[24], counts[3] = {9, 0, 15};
    uint64_t keys[3] = {1, 2, 3};
    cache_prompt(a, 16);
    for (uint32_t i = 0; i < 24; i++)
        tokens[i] = i < 9 ? prompt[i] : prompt[i - 9];
    blocks.n_counts = 3;
    blocks.counts = counts;
    blocks.n_tokens = 24;
    blocks.tokens = tokens;
    request.pool = (char *)"p";
    request.n_keys = 3;
    request.keys = keys;
    request.blocks = &blocks;
    struct shell_call *call = CALL(b, OPEN_SEQUENCES, request);
    const Kvpool__V1__OpenSequencesReply *reply = (const Kvpool__V1__OpenSequencesReply *)call->reply;
    ck_assert_uint_eq(reply->n_cached, 3);
    ck_assert_uint_eq(reply->cached[0], 8);
    ck_assert_uint_eq(reply->cached[1], 0);
    ck_assert_uint_eq(reply->cached[2], 12);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(two_writers_of_a_block_keep_one_page)
{
    struct named named;
    uint64_t one, two;
    open_prompt(a, 1, 8, &one);
    open_prompt(b, 2, 8, &two);
    ck_assert_int_eq(finish(advance_blocks(a, one, 8, 8, by_tokens(&named, prompt, 8, 0), 0)), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(b, two, 8, 8, by_tokens(&named, prompt, 8, 0), 0)), KVP_OK);
    ck_assert_uint_eq(cache_view().published, 2);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 12);
    close_ok(a, one);
    close_ok(b, two);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    ck_assert_uint_eq(cache_view().cached_pages, 2);
}
END_TEST

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

START_TEST(blocks_that_can_not_be_are_refused_with_the_value_and_the_limit)
{
    struct named named;
    uint64_t seq = write_prompt(a, 1, 8);
    unsigned char keys[33 * 2] = {1};
    static const unsigned char extra[KVP_BLOCK_EXTRA_BYTES_MAX + 1];
    by_tokens(&named, prompt, 8, 0)->n_counts = 0;
    assert_refused(open_blocks(a, 2, &named.blocks, 0), KVP_EINVAL, "0 counts");
    by_tokens(&named, prompt, 8, 0);
    named.count = 9;
    assert_refused(open_blocks(a, 2, &named.blocks, 0), KVP_EINVAL, "the counts are of 9 tokens, but 8 came");
    assert_refused(open_blocks(a, 2, by_tokens(&named, prompt, 8, 1), 0), KVP_EINVAL, "first[0] is 1, must be 0");
    assert_refused(open_blocks(a, 2, by_keys(&named, keys, 7, 1), 0), KVP_EINVAL, "key_bytes 7, must be 8 to 32");
    assert_refused(open_blocks(a, 2, by_keys(&named, keys, 33, 1), 0), KVP_EINVAL, "key_bytes 33, must be 8 to 32");
    by_keys(&named, keys, 8, 2)->keys.len = 15;
    assert_refused(open_blocks(a, 2, &named.blocks, 0), KVP_EINVAL, "15 bytes of keys are no multiple of key_bytes, 8");
    by_keys(&named, keys, 8, 2)->keys.len = 8;
    assert_refused(open_blocks(a, 2, &named.blocks, 0), KVP_EINVAL, "the counts are of 2 keys, but 1 came");
    by_tokens(&named, prompt, 8, 0)->key_bytes = 8;
    assert_refused(open_blocks(a, 2, &named.blocks, 0), KVP_EINVAL, "must be one or the other");
    by_tokens(&named, prompt, 8, 0)->extra = (ProtobufCBinaryData){sizeof(extra), (uint8_t *)extra};
    assert_refused(open_blocks(a, 2, &named.blocks, 0), KVP_EINVAL, "extra of 4097 bytes, at most 4096");
    assert_refused(advance_blocks(a, seq, 20, 0, by_tokens(&named, prompt, 4, 3), 0), KVP_EINVAL,
                   "first[0] is page 3, but only the first 2 pages have keys");
    assert_refused(advance_blocks(a, seq, 11, 0, by_tokens(&named, prompt + 8, 4, 2), 0), KVP_EINVAL,
                   "1 of seqs[0] from page 2 on, but the 11 tokens reserved fill 2 pages");
    assert_refused(match_call(a, NULL, false), KVP_EINVAL, "of 0 prefixes, must be 1 to 1024");
    assert_refused(pin_call(a, 8, 99), KVP_EINVAL, "lease_ms: 99, must be 0 or 100 to 86400000");
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 8);
}
END_TEST

START_TEST(a_page_keeps_the_key_that_it_has_and_a_refused_batch_changes_nothing)
{
    struct named named;
    uint64_t one = write_prompt(a, 1, 8), two, seqs[2];
    uint32_t reserved[2] = {16, 16}, counts[2] = {4, 4}, first[2] = {0, 1}, tokens[8];
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    Kvpool__V1__Blocks blocks = KVPOOL__V1__BLOCKS__INIT;
    ck_assert_int_eq(shell_open(shell, a, "p", 2, false, &two), KVP_OK);
    memcpy(tokens, prompt + 100, sizeof(tokens));
    seqs[0] = two;
    seqs[1] = one;
    request.pool = (char *)"p";
    request.n_seqs = request.n_reserved = blocks.n_counts = blocks.n_first = 2;
    request.seqs = seqs;
    request.reserved = reserved;
    request.blocks = &blocks;
    blocks.counts = counts;
    blocks.first = first;
    blocks.n_tokens = 8;
    blocks.tokens = tokens;
    assert_refused(CALL(a, ADVANCE, request), KVP_EMISMATCH, "page 1 of seqs[1] is known to hold another block");
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 14);
    ck_assert_int_eq(finish(advance_blocks(a, one, 8, 0, by_tokens(&named, prompt + 4, 4, 1), 0)), KVP_OK);
    ck_assert_uint_eq(match_prompt(a, 8), 8);
}
END_TEST

/* ---- Match, ListCache --------------------------------------------------------------------------------------------- */

START_TEST(match_lists_the_pages_and_changes_nothing)
{
    struct named named;
    cache_prompt(a, 12);
    struct kvp_cache_view before = cache_view();
    struct shell_call *call = match_call(b, by_tokens(&named, prompt, 16, 0), true);
    const Kvpool__V1__MatchReply *reply = (const Kvpool__V1__MatchReply *)call->reply;
    ck_assert_uint_eq(reply->cached[0], 12);
    ck_assert_uint_eq(reply->n_pages, 3);
    for (size_t i = 0; i < 3; i++) {
        struct kvp_cache_entry entry;
        ck_assert_int_eq(kvp_cache_at(&shell->ledger, (struct kvp_pool_id){0, 1}, reply->pages[i], &entry), KVP_OK);
        ck_assert_uint_eq(entry.parent, i == 0 ? KVP_NONE : reply->pages[i - 1]);
    }
    shell_call_free(shell, call);
    struct kvp_cache_view after = cache_view();
    ck_assert_uint_eq(after.lookup_blocks, before.lookup_blocks);
    ck_assert_uint_eq(after.hit_blocks, before.hit_blocks);
    ck_assert_uint_eq(after.cached_pages, 3);
}
END_TEST

START_TEST(a_connection_without_a_session_matches_as_its_user)
{
    cache_prompt(a, 8);
    ck_assert_uint_eq(match_prompt(shell_grpc(1000, 99), 8), 8);
    ck_assert_uint_eq(match_prompt(shell_grpc(2000, 99), 8), 0);
}
END_TEST

START_TEST(the_cache_is_listed_in_parts)
{
    uint64_t seq = write_prompt(a, 1, 12);
    cache_prompt(a, 16);
    Kvpool__V1__ListCacheRequest request = KVPOOL__V1__LIST_CACHE_REQUEST__INIT;
    request.pool = (char *)"p";
    request.limit = 3;
    unsigned found = 0, held = 0, parents = 0;
    for (unsigned parts = 0; parts < 5; parts++) {
        struct shell_call *call = CALL(other, LIST_CACHE, request);
        ck_assert_int_eq(call->status, KVP_OK);
        const Kvpool__V1__ListCacheReply *reply = (const Kvpool__V1__ListCacheReply *)call->reply;
        ck_assert_uint_le(reply->n_pages, 3);
        ck_assert_uint_eq(reply->keys.len, 16 * reply->n_pages);
        for (size_t i = 0; i < reply->n_pages; i++) {
            found++;
            held += reply->references[i];
            parents += reply->parents[i] != KVP_NONE;
            ck_assert_uint_eq(reply->tenants[i], 1000);
        }
        request.from_page = reply->next_page;
        shell_call_free(shell, call);
        if (request.from_page == 0)
            break;
    }
    ck_assert_uint_eq(request.from_page, 0);
    ck_assert_uint_eq(found, 4);
    ck_assert_uint_eq(held, 3);
    ck_assert_uint_eq(parents, 3);
    request.limit = KVP_LIST_MAX + 1;
    assert_refused(CALL(other, LIST_CACHE, request), KVP_EINVAL, "limit: 4097, at most 4096");
    close_ok(a, seq);
}
END_TEST

/* ---- Pin --------------------------------------------------------------------------------------------------------- */

START_TEST(a_pin_that_finds_no_place_says_which_limit_it_met)
{
    cache_prompt(a, 36);
    for (uint32_t n = 1; n <= small.max_sequences; n++)
        ck_assert_uint_eq(pin_prompt(a, n * T, 1000), n * T);
    assert_refused(pin_call(a, 9 * T, 1000), KVP_ELIMIT, "finds all 8 rows of pool \"p\" in use");
    ck_assert_uint_eq(cache_view().pins, small.max_sequences);
}
END_TEST

START_TEST(a_pin_keeps_its_prefix_until_its_lease_ends)
{
    cache_prompt(a, 16);
    ck_assert_uint_eq(pin_prompt(a, 8, 1000), 8);
    ck_assert_uint_eq(cache_view().pins, 1);
    ck_assert_uint_eq(evict(a, 0, NULL, false), 2);
    ck_assert_uint_eq(match_prompt(a, 16), 8);
    shell_run_ms(shell, 600);
    ck_assert_uint_eq(pin_prompt(b, 8, 1000), 8);
    shell_run_ms(shell, 999);
    ck_assert_uint_eq(cache_view().pins, 1);
    shell_run_ms(shell, 2);
    ck_assert_uint_eq(cache_view().pins, 0);
    ck_assert_uint_eq(evict(a, 0, NULL, false), 2);
    ck_assert_uint_eq(shell->wake_ms, UINT64_MAX);
}
END_TEST

START_TEST(a_pin_is_ended_by_a_lease_of_none_and_only_by_its_tenant)
{
    cache_prompt(a, 8);
    cache_prompt(other, 8);
    ck_assert_uint_eq(pin_prompt(a, 8, 1000), 8);
    ck_assert_uint_eq(pin_prompt(other, 8, 0), 0);
    ck_assert_uint_eq(cache_view().pins, 1);
    ck_assert_uint_eq(pin_prompt(b, 8, 0), 8);
    ck_assert_uint_eq(pin_prompt(b, 8, 0), 0);
    ck_assert_uint_eq(cache_view().pins, 0);
}
END_TEST

START_TEST(a_prefix_that_is_not_all_cached_is_not_pinned)
{
    cache_prompt(a, 8);
    assert_refused(pin_call(a, 16, 1000), KVP_ENOENT, "of the 4 of prefix 0 the first 2 are cached");
    assert_refused(pin_call(a, 3, 1000), KVP_EINVAL, "prefix 0 has no whole block");
    ck_assert_uint_eq(cache_view().pins, 0);
}
END_TEST

START_TEST(a_restart_begins_the_leases_of_pins_anew)
{
    cache_prompt(a, 8);
    pin_prompt(a, 8, 1000);
    shell_run_ms(shell, 900);
    restart();
    shell_run_ms(shell, 900);
    ck_assert_uint_eq(cache_view().pins, 1);
    shell_run_ms(shell, 200);
    ck_assert_uint_eq(cache_view().pins, 0);
}
END_TEST

START_TEST(everything_that_was_cached_is_found_after_a_restart)
{
    uint64_t seq;
    cache_prompt(a, 12);
    restart();
    ck_assert_uint_eq(match_prompt(b, 12), 12);
    ck_assert_uint_eq(open_prompt(b, 3, 12, &seq), 12);
}
END_TEST

/* ---- Evict ------------------------------------------------------------------------------------------------------- */

START_TEST(evict_takes_so_many_pages_from_the_ends)
{
    cache_prompt(a, 16);
    ck_assert_uint_eq(evict(a, 1, NULL, false), 1);
    ck_assert_uint_eq(match_prompt(a, 16), 12);
    ck_assert_uint_eq(evict(a, 2, NULL, false), 2);
    ck_assert_uint_eq(evict(a, 5, NULL, false), 1);
    ck_assert_uint_eq(match_prompt(a, 16), 0);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 16);
}
END_TEST

/* A pool of 64 pages, of which Evict lets go of five a turn; 50 of them are cached. */
static void begin_sliced(void)
{
    static const struct pool_of large = {
        .name = "p", .pages = 64, .page_tokens = T, .layers = 1, .max_sequences = 8, .max_sequence_tokens = 256};
    shell_end(shell);
    shell = shell_begin_sliced("host", 5);
    a = shell_connect(shell, 1000, 41);
    shell_make_pool(shell, a, &large);
    cache_prompt(a, 200);
}

START_TEST(evict_of_more_than_a_slice_goes_on_until_it_is_done)
{
    begin_sliced();
    ck_assert_uint_eq(evict(a, 23, NULL, false), 23);
    ck_assert_uint_eq(match_prompt(a, 200), 27 * T);
    ck_assert_uint_eq(evict(a, 0, NULL, false), 27);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 64);
}
END_TEST

START_TEST(an_evict_that_a_restart_cuts_off_goes_on_where_it_was)
{
    Kvpool__V1__EvictRequest request = KVPOOL__V1__EVICT_REQUEST__INIT;
    begin_sliced();
    request.pool = (char *)"p";
    request.call_id = 5;
    request.pages = 23;
    struct shell_call *call = shell_send(shell, a, KVPOOL__V1__METHOD__METHOD_EVICT, &request.base, NULL);
    while (cache_view().evictions == 0)
        shell_tick(shell);
    ck_assert(!call->answered);
    shell_restart(shell, &a.session, 1);
    for (int repeat = 0; repeat < 2; repeat++) {
        call = CALL(a, EVICT, request);
        ck_assert_int_eq(call->status, KVP_OK);
        ck_assert_uint_eq(((const Kvpool__V1__EvictReply *)call->reply)->pages, 23);
        shell_call_free(shell, call);
        ck_assert_uint_eq(match_prompt(a, 200), 27 * T);
    }
}
END_TEST

START_TEST(pages_that_rows_are_giving_back_come_before_cached_ones)
{
    uint64_t seq;
    begin_sliced();
    for (uint64_t key = 1; key <= 2; key++) {
        ck_assert_int_eq(shell_open(shell, a, "p", key, false, &seq), KVP_OK);
        ck_assert_int_eq(shell_advance(shell, a, "p", seq, 13 * T, 0), KVP_OK);
        close_ok(a, seq); /* 5 of its 13 pages are back at once; 14 were free */
    }
    ck_assert_uint_eq(cache_view().evictions, 0);
    ck_assert_uint_eq(match_prompt(a, 200), 200);
}
END_TEST

/* Two writers of the same blocks, of which the first one's stay cached, and the second goes on behind them: so none of
 * the cached ones may go, and all are at the end of their list. What looks for one that may does it in slices. */
START_TEST(pages_that_others_extend_are_passed_over_in_slices)
{
    enum { BLOCKS = 2 * KVP_PARKS_MAX, PAGES = 2 * BLOCKS + 2 };
    static const struct pool_of large = {.name = "p",
                                         .pages = PAGES,
                                         .page_tokens = 1,
                                         .layers = 1,
                                         .max_sequences = 8,
                                         .max_sequence_tokens = BLOCKS + 2};
    static uint32_t tokens[BLOCKS + 1];
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    struct named named;
    uint64_t first, second, third;
    uint32_t wanted = 2;
    cache_end();
    cache_begin_with("host", &large);
    for (uint32_t i = 0; i <= BLOCKS; i++)
        tokens[i] = i;
    Kvpool__V1__Blocks *blocks = by_tokens(&named, tokens, BLOCKS, 0);
    ck_assert_int_eq(shell_open(shell, a, "p", 1, false, &first), KVP_OK);
    ck_assert_int_eq(shell_open(shell, a, "p", 2, false, &second), KVP_OK);
    ck_assert_int_eq(shell_open(shell, b, "p", 3, false, &third), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(a, first, BLOCKS, BLOCKS, blocks, 0)), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(a, second, BLOCKS, BLOCKS, blocks, 0)), KVP_OK);
    blocks = by_tokens(&named, tokens + BLOCKS, 1, BLOCKS);
    ck_assert_int_eq(finish(advance_blocks(a, second, BLOCKS + 1, BLOCKS + 1, blocks, 0)), KVP_OK);
    close_ok(a, first);
    while (cache_view().cached_pages != BLOCKS)
        shell_tick(shell);
    request.pool = (char *)"p";
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &third;
    request.reserved = &wanted;
    struct shell_call *call = shell_send(shell, b, KVPOOL__V1__METHOD__METHOD_ADVANCE, &request.base, NULL);
    ck_assert(!call->answered);
    shell_run_ms(shell, 1);
    ck_assert(call->answered);
    assert_refused(call, KVP_ENOPAGES, "is short of 1 pages");
    ck_assert_uint_eq(evict(a, 0, NULL, false), 0);
    close_ok(a, second);
    ck_assert_int_eq(shell_advance(shell, b, "p", third, BLOCKS + 2, 0), KVP_OK);
    ck_assert_uint_eq(evict(a, 0, NULL, false), BLOCKS);
}
END_TEST

START_TEST(evict_of_a_prefix_stops_at_what_is_held_or_extended)
{
    struct named named;
    cache_prompt(a, 16);
    uint64_t seq;
    open_prompt(a, 5, 8, &seq);
    ck_assert_uint_eq(evict(a, 0, by_tokens(&named, prompt, 16, 0), false), 2);
    ck_assert_uint_eq(match_prompt(a, 16), 8);
    close_ok(a, seq);
    ck_assert_uint_eq(evict(a, 0, by_tokens(&named, prompt, 4, 0), false), 0);
    ck_assert_uint_eq(evict(a, 0, by_tokens(&named, prompt, 8, 0), false), 2);
}
END_TEST

START_TEST(only_root_and_the_daemons_user_evict_what_is_others)
{
    struct named named;
    cache_prompt(a, 8);
    ck_assert_uint_eq(evict(other, 0, NULL, false), 0);
    shell_restart(shell, (struct kvp_session_id[]){a.session, other.session}, 2);
    assert_refused(evict_call(other, 0, NULL, true), KVP_EPERM, "user 2000 may evict its own pages alone");
    assert_refused(evict_call(shell_grpc(0, 5), 0, by_tokens(&named, prompt, 8, 0), true), KVP_EINVAL, "all: blocks");
    assert_refused(evict_call(a, 1, by_tokens(&named, prompt, 8, 0), false), KVP_EINVAL, "pages: 1, must be 0");
    assert_refused(evict_call(shell_tcp(), 0, NULL, false), KVP_EPERM, "Evict is not served over TCP");
    ck_assert_uint_eq(evict(shell_grpc(0, 5), 0, NULL, true), 2);
}
END_TEST

START_TEST(what_is_cached_gives_way_to_what_is_needed)
{
    uint64_t seq;
    cache_prompt(a, 64);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 0);
    ck_assert_int_eq(shell_open(shell, b, "p", 1, false, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, b, "p", seq, 40, 0), KVP_OK);
    ck_assert_uint_eq(match_prompt(b, 64), 24);
    ck_assert_int_eq(shell_advance(shell, b, "p", seq, 64, 0), KVP_OK);
    ck_assert_uint_eq(match_prompt(b, 64), 0);
    ck_assert_uint_eq(cache_view().evictions, 16);
}
END_TEST

int main(void)
{
    TCase *along = tcase_create("taken along"), *call = tcase_create("calls");
    tcase_add_checked_fixture(along, cache_begin, cache_end);
    tcase_add_checked_fixture(call, cache_begin, cache_end);
    tcase_add_test(along, a_written_prefix_is_taken_along_by_another_session_of_the_tenant);
    tcase_add_test(along, tokens_that_fill_no_page_are_left_out_of_account);
    tcase_add_test(along, only_written_pages_are_found);
    tcase_add_test(along, a_page_completed_in_decode_is_found_once_its_progress_word_is_there);
    tcase_add_test(along, advance_that_evicts_too_many_pages_changes_nothing_and_says_so);
    tcase_add_test(along, words_of_more_pages_than_a_transaction_holds_are_all_seen);
    tcase_add_test(along, engines_keys_of_every_size_are_found_and_match_no_tokens);
    tcase_add_test(along, extra_is_part_of_every_block);
    tcase_add_test(along, an_open_key_says_with_which_of_the_blocks_its_row_begins);
    tcase_add_test(along, a_batch_takes_a_prefix_for_each_of_its_sequences);
    tcase_add_test(along, two_writers_of_a_block_keep_one_page);
    tcase_add_test(along, blocks_that_can_not_be_are_refused_with_the_value_and_the_limit);
    tcase_add_test(along, a_page_keeps_the_key_that_it_has_and_a_refused_batch_changes_nothing);
    tcase_add_test(call, match_lists_the_pages_and_changes_nothing);
    tcase_add_test(call, a_connection_without_a_session_matches_as_its_user);
    tcase_add_test(call, the_cache_is_listed_in_parts);
    tcase_add_test(call, a_pin_that_finds_no_place_says_which_limit_it_met);
    tcase_add_test(call, a_pin_keeps_its_prefix_until_its_lease_ends);
    tcase_add_test(call, a_pin_is_ended_by_a_lease_of_none_and_only_by_its_tenant);
    tcase_add_test(call, a_prefix_that_is_not_all_cached_is_not_pinned);
    tcase_add_test(call, a_restart_begins_the_leases_of_pins_anew);
    tcase_add_test(call, everything_that_was_cached_is_found_after_a_restart);
    tcase_add_test(call, evict_takes_so_many_pages_from_the_ends);
    tcase_add_test(call, evict_of_more_than_a_slice_goes_on_until_it_is_done);
    tcase_add_test(call, an_evict_that_a_restart_cuts_off_goes_on_where_it_was);
    tcase_add_test(call, pages_that_rows_are_giving_back_come_before_cached_ones);
    tcase_add_test(call, pages_that_others_extend_are_passed_over_in_slices);
    tcase_add_test(call, evict_of_a_prefix_stops_at_what_is_held_or_extended);
    tcase_add_test(call, only_root_and_the_daemons_user_evict_what_is_others);
    tcase_add_test(call, what_is_cached_gives_way_to_what_is_needed);
    Suite *suite = suite_create("core: cache");
    suite_add_tcase(suite, along);
    suite_add_tcase(suite, call);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
