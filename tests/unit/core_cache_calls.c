/**
 * Calls of the core's cache tests. See core_cache_calls.h.
 */
#include "core_cache_calls.h"

#include <string.h>

const struct pool_of small = {.name = "p", .pages = 16, .page_tokens = T, .layers = 1, .max_sequences = 8};
struct shell *shell;
struct kvp_caller a, b, other;
uint32_t prompt[TOKENS_MAX];

void cache_begin_with(const char *backend, const struct pool_of *pool)
{
    shell = shell_begin(backend);
    a = shell_connect(shell, 1000, 41);
    b = shell_connect(shell, 1000, 42);
    other = shell_connect(shell, 2000, 43);
    shell_make_pool(shell, a, pool);
    for (uint32_t i = 0; i < TOKENS_MAX; i++)
        prompt[i] = 100 + i;
}

void cache_begin(void)
{
    cache_begin_with("host", &small);
}

void cache_end(void)
{
    shell_end(shell);
}

enum kvp_status finish(struct shell_call *call)
{
    enum kvp_status status = call->status;
    shell_call_free(shell, call);
    return status;
}

void assert_refused(struct shell_call *call, enum kvp_status status, const char *part)
{
    ck_assert_msg(call->status == status, "%s, not %s", kvp_status_name(call->status), kvp_status_name(status));
    ck_assert_msg(strstr(shell_error(call), part) != NULL, "\"%s\" does not say \"%s\"", shell_error(call), part);
    shell_call_free(shell, call);
}

/* ---- calls with blocks ------------------------------------------------------------------------------------------- */

Kvpool__V1__Blocks *by_tokens(struct named *named, const uint32_t *tokens, uint32_t n, uint32_t first)
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

Kvpool__V1__Blocks *by_keys(struct named *named, const void *keys, uint32_t key_bytes, uint32_t n)
{
    by_tokens(named, NULL, 0, 0);
    named->count = n;
    named->blocks.keys = (ProtobufCBinaryData){(size_t)n * key_bytes, (uint8_t *)keys};
    named->blocks.key_bytes = key_bytes;
    return &named->blocks;
}

struct shell_call *open_blocks(struct kvp_caller caller, uint64_t key, Kvpool__V1__Blocks *blocks, uint64_t call_id)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    request.pool = (char *)"p";
    request.call_id = call_id;
    request.n_keys = 1;
    request.keys = &key;
    request.blocks = blocks;
    return CALL(caller, OPEN_SEQUENCES, request);
}

uint32_t open_prompt(struct kvp_caller caller, uint64_t key, uint32_t tokens, uint64_t *ret_seq)
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

struct shell_call *advance_blocks(struct kvp_caller caller, uint64_t seq, uint32_t reserved, uint32_t written,
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

uint64_t write_prompt(struct kvp_caller caller, uint64_t key, uint32_t tokens)
{
    struct named named;
    uint64_t seq;
    open_prompt(caller, key, tokens, &seq);
    ck_assert_int_eq(finish(advance_blocks(caller, seq, tokens, tokens, by_tokens(&named, prompt, tokens, 0), 0)),
                     KVP_OK);
    return seq;
}

void close_ok(struct kvp_caller caller, uint64_t seq)
{
    ck_assert_int_eq(shell_close(shell, caller, "p", seq), KVP_OK);
}

void cache_prompt(struct kvp_caller caller, uint32_t tokens)
{
    close_ok(caller, write_prompt(caller, 999, tokens));
}

struct shell_call *match_call(struct kvp_caller caller, Kvpool__V1__Blocks *blocks, bool with_pages)
{
    Kvpool__V1__MatchRequest request = KVPOOL__V1__MATCH_REQUEST__INIT;
    request.pool = (char *)"p";
    request.blocks = blocks;
    request.with_pages = with_pages;
    return CALL(caller, MATCH, request);
}

uint32_t match(struct kvp_caller caller, Kvpool__V1__Blocks *blocks)
{
    struct shell_call *call = match_call(caller, blocks, false);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    const Kvpool__V1__MatchReply *reply = (const Kvpool__V1__MatchReply *)call->reply;
    ck_assert_uint_eq(reply->n_cached, 1);
    uint32_t cached = reply->cached[0];
    shell_call_free(shell, call);
    return cached;
}

uint32_t match_prompt(struct kvp_caller caller, uint32_t tokens)
{
    struct named named;
    return match(caller, by_tokens(&named, prompt, tokens, 0));
}

struct kvp_cache_view cache_view(void)
{
    struct kvp_pool_id id;
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_by_name(&shell->ledger, "p", &id), KVP_OK);
    ck_assert_int_eq(kvp_pool_get(&shell->ledger, id, &view), KVP_OK);
    return view.cache;
}

void restart(void)
{
    struct kvp_session_id sessions[] = {a.session, b.session, other.session};
    shell_restart(shell, sessions, 3);
}
