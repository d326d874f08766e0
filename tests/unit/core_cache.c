/**
 * The core's prefix cache: blocks named by tokens or by keys, taken along when a sequence is opened, published by Advance
 * and by progress words; Match, Pin, Evict, ListCache; tenants, and pages that are zeroed between them.
 */
#include "core_shell.h"

#include <string.h>

#define T          4u /* tokens in a page */
#define PAGE_BYTES (T * 2 * 4 * 2)
#define TOKENS_MAX 256

static const struct pool_of small = {.name = "p", .pages = 16, .page_tokens = T, .layers = 1, .max_sequences = 8};
static struct shell *shell;
static struct kvp_caller a, b, other; /* two of user 1000, one of user 2000 */
static uint32_t prompt[TOKENS_MAX];   /* token i is 100 + i */

static void begin_with(const char *backend, const struct pool_of *pool)
{
    shell = shell_begin(backend);
    a = shell_connect(shell, 1000, 41);
    b = shell_connect(shell, 1000, 42);
    other = shell_connect(shell, 2000, 43);
    shell_make_pool(shell, a, pool);
    for (uint32_t i = 0; i < TOKENS_MAX; i++)
        prompt[i] = 100 + i;
}

static void begin(void)
{
    begin_with("host", &small);
}

static void end(void)
{
    shell_end(shell);
}

#define CALL(caller, NAME, request) shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_##NAME, &(request).base)

static enum kvp_status finish(struct shell_call *call)
{
    enum kvp_status status = call->status;
    shell_call_free(shell, call);
    return status;
}

static void assert_refused(struct shell_call *call, enum kvp_status status, const char *part)
{
    ck_assert_msg(call->status == status, "%s, not %s", kvp_status_name(call->status), kvp_status_name(status));
    ck_assert_msg(strstr(shell_error(call), part) != NULL, "\"%s\" does not say \"%s\"", shell_error(call), part);
    shell_call_free(shell, call);
}

/* ---- calls with blocks ------------------------------------------------------------------------------------------- */

/* Blocks of one sequence by its tokens. */
struct named {
    Kvpool__V1__Blocks blocks;
    uint32_t count, first;
};

static Kvpool__V1__Blocks *by_tokens(struct named *named, const uint32_t *tokens, uint32_t n, uint32_t first)
{
    kvpool__v1__blocks__init(&named->blocks);
    named->count = n;
    named->first = first;
    named->blocks.n_counts = 1;
    named->blocks.counts = &named->count;
    named->blocks.n_first = first != 0;
    named->blocks.first = &named->first;
    named->blocks.n_tokens = n;
    named->blocks.tokens = (uint32_t *)tokens;
    return &named->blocks;
}

static Kvpool__V1__Blocks *by_keys(struct named *named, const void *keys, uint32_t key_bytes, uint32_t n)
{
    by_tokens(named, NULL, 0, 0);
    named->count = n;
    named->blocks.keys = (ProtobufCBinaryData){(size_t)n * key_bytes, (uint8_t *)keys};
    named->blocks.key_bytes = key_bytes;
    return &named->blocks;
}

static struct shell_call *open_blocks(struct kvp_caller caller, uint64_t key, Kvpool__V1__Blocks *blocks,
                                      uint64_t call_id)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    request.pool = (char *)"p";
    request.call_id = call_id;
    request.n_keys = 1;
    request.keys = &key;
    request.blocks = blocks;
    return CALL(caller, OPEN_SEQUENCES, request);
}

/* @return tokens taken along */
static uint32_t open_prompt(struct kvp_caller caller, uint64_t key, uint32_t tokens, uint64_t *ret_seq)
{
    struct named named;
    struct shell_call *call = open_blocks(caller, key, by_tokens(&named, prompt, tokens, 0), 0);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    const Kvpool__V1__OpenSequencesReply *reply = (const Kvpool__V1__OpenSequencesReply *)call->reply;
    ck_assert_uint_eq(reply->n_cached, 1);
    uint32_t cached = reply->cached[0];
    ck_assert_uint_eq(reply->written[0], cached);
    ck_assert_uint_eq(reply->reserved[0], cached);
    *ret_seq = reply->seqs[0];
    shell_call_free(shell, call);
    return cached;
}

static struct shell_call *advance_blocks(struct kvp_caller caller, uint64_t seq, uint32_t reserved, uint32_t written,
                                         Kvpool__V1__Blocks *blocks, uint64_t call_id)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    request.pool = (char *)"p";
    request.call_id = call_id;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &seq;
    request.reserved = &reserved;
    request.n_written = written != 0;
    request.written = &written;
    request.blocks = blocks;
    return CALL(caller, ADVANCE, request);
}

/* The first n tokens of the prompt, in a sequence, written and named. */
static uint64_t write_prompt(struct kvp_caller caller, uint64_t key, uint32_t tokens)
{
    struct named named;
    uint64_t seq;
    open_prompt(caller, key, tokens, &seq);
    ck_assert_int_eq(finish(advance_blocks(caller, seq, tokens, tokens, by_tokens(&named, prompt, tokens, 0), 0)),
                     KVP_OK);
    return seq;
}

static void close_ok(struct kvp_caller caller, uint64_t seq)
{
    ck_assert_int_eq(shell_close(shell, caller, "p", seq), KVP_OK);
}

/* The first n tokens of the prompt are cached, and nobody holds them. */
static void cache_prompt(struct kvp_caller caller, uint32_t tokens)
{
    close_ok(caller, write_prompt(caller, 999, tokens));
}

static struct shell_call *match_call(struct kvp_caller caller, Kvpool__V1__Blocks *blocks, bool with_pages)
{
    Kvpool__V1__MatchRequest request = KVPOOL__V1__MATCH_REQUEST__INIT;
    request.pool = (char *)"p";
    request.blocks = blocks;
    request.with_pages = with_pages;
    return CALL(caller, MATCH, request);
}

static uint32_t match(struct kvp_caller caller, Kvpool__V1__Blocks *blocks)
{
    struct shell_call *call = match_call(caller, blocks, false);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    const Kvpool__V1__MatchReply *reply = (const Kvpool__V1__MatchReply *)call->reply;
    ck_assert_uint_eq(reply->n_cached, 1);
    uint32_t cached = reply->cached[0];
    shell_call_free(shell, call);
    return cached;
}

static uint32_t match_prompt(struct kvp_caller caller, uint32_t tokens)
{
    struct named named;
    return match(caller, by_tokens(&named, prompt, tokens, 0));
}

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

static struct kvp_cache_view cache_view(void)
{
    struct kvp_pool_id id;
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_by_name(&shell->ledger, "p", &id), KVP_OK);
    ck_assert_int_eq(kvp_pool_get(&shell->ledger, id, &view), KVP_OK);
    return view.cache;
}

static void restart(void)
{
    struct kvp_session_id sessions[] = {a.session, b.session, other.session};
    shell_restart(shell, sessions, 3);
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

START_TEST(a_page_completed_in_decode_is_found_once_its_progress_word_is_seen)
{
    uint32_t attachment = shell_attach(shell, a, "p");
    struct named named;
    uint64_t seq;
    open_prompt(a, 1, 8, &seq);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 12, 8, by_tokens(&named, prompt, 8, 0), 0)), KVP_OK);
    ck_assert_int_eq(finish(advance_blocks(a, seq, 16, 0, by_tokens(&named, prompt + 8, 5, 2), 0)), KVP_OK);
    ck_assert_uint_eq(match_prompt(b, 12), 8);
    shell_progress(shell, attachment)[(uint32_t)seq] = KVP_PROGRESS_WORD(2, 13);
    ck_assert_uint_eq(shell_length(shell, a, "p", seq), 13);
    ck_assert_uint_eq(match_prompt(b, 12), 12);
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

START_TEST(evict_of_more_than_a_slice_goes_on_until_it_is_done)
{
    static const struct pool_of large = {
        .name = "p", .pages = 64, .page_tokens = T, .layers = 1, .max_sequences = 8, .max_sequence_tokens = 256};
    shell_end(shell);
    shell = shell_begin_sliced("host", 5);
    a = shell_connect(shell, 1000, 41);
    shell_make_pool(shell, a, &large);
    cache_prompt(a, 200);
    ck_assert_uint_eq(evict(a, 23, NULL, false), 23);
    ck_assert_uint_eq(match_prompt(a, 200), 27 * T);
    ck_assert_uint_eq(evict(a, 0, NULL, false), 27);
    ck_assert_uint_eq(shell_free_pages(shell, "p"), 64);
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
    begin_with("host", &pool);
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
    begin_with("host", &pool);
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
    begin_with("cuda", &pool);
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
    TCase *along = tcase_create("taken along"), *call = tcase_create("calls"), *shares = tcase_create("shares"),
          *zero = tcase_create("zeroing"), *slabs = tcase_create("slabs");
    tcase_add_checked_fixture(along, begin, end);
    tcase_add_checked_fixture(call, begin, end);
    tcase_add_checked_fixture(shares, begin_shares, end);
    tcase_add_checked_fixture(zero, begin, end);
    tcase_add_test(along, a_written_prefix_is_taken_along_by_another_session_of_the_tenant);
    tcase_add_test(along, tokens_that_fill_no_page_are_left_out_of_account);
    tcase_add_test(along, only_written_pages_are_found);
    tcase_add_test(along, a_page_completed_in_decode_is_found_once_its_progress_word_is_seen);
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
    tcase_add_test(call, a_pin_keeps_its_prefix_until_its_lease_ends);
    tcase_add_test(call, a_pin_is_ended_by_a_lease_of_none_and_only_by_its_tenant);
    tcase_add_test(call, a_prefix_that_is_not_all_cached_is_not_pinned);
    tcase_add_test(call, a_restart_begins_the_leases_of_pins_anew);
    tcase_add_test(call, everything_that_was_cached_is_found_after_a_restart);
    tcase_add_test(call, evict_takes_so_many_pages_from_the_ends);
    tcase_add_test(call, evict_of_more_than_a_slice_goes_on_until_it_is_done);
    tcase_add_test(call, evict_of_a_prefix_stops_at_what_is_held_or_extended);
    tcase_add_test(call, only_root_and_the_daemons_user_evict_what_is_others);
    tcase_add_test(call, what_is_cached_gives_way_to_what_is_needed);
    tcase_add_test(call, the_same_tokens_of_two_tenants_never_match);
    tcase_add_test(call, a_pool_that_hashes_by_xxh3_is_one_tenants_alone);
    tcase_add_test(call, shares_that_can_not_be_are_refused);
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
    Suite *suite = suite_create("core: cache");
    suite_add_tcase(suite, along);
    suite_add_tcase(suite, call);
    suite_add_tcase(suite, shares);
    suite_add_tcase(suite, zero);
    suite_add_tcase(suite, slabs);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
