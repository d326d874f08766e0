/**
 * What core_cache.c and core_tenants.c share: a small pool with sessions of two users, a prompt, and the calls that name
 * its blocks by tokens or by keys. Every check here aborts the test (ck_assert).
 */
#ifndef KVP_CORE_CACHE_CALLS_H
#define KVP_CORE_CACHE_CALLS_H

#include "core_shell.h"

#define T          4u /* tokens in a page */
#define PAGE_BYTES (T * 2 * 4 * 2)
#define TOKENS_MAX 256

extern const struct pool_of small;
extern struct shell *shell;
extern struct kvp_caller a, b, other; /* two of user 1000, one of user 2000 */
extern uint32_t prompt[TOKENS_MAX];   /* token i is 100 + i */

/* A shell with these callers, the pool and the prompt. */
void cache_begin_with(const char *backend, const struct pool_of *pool);
/* The same with the small pool, on host memory. */
void cache_begin(void);
void cache_end(void);
/* The daemon is killed and started again; the callers are still there. */
void restart(void);

#define CALL(caller, NAME, request) shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_##NAME, &(request).base)

/* Free the call. @return its status */
enum kvp_status finish(struct shell_call *call);
/* The call failed with this status, and its error says so. Frees it. */
void assert_refused(struct shell_call *call, enum kvp_status status, const char *part);

/* ---- calls with blocks ------------------------------------------------------------------------------------------- */

/* Blocks of one sequence by its tokens. */
struct named {
    Kvpool__V1__Blocks blocks;
    uint32_t count, first;
};
Kvpool__V1__Blocks *by_tokens(struct named *named, const uint32_t *tokens, uint32_t n, uint32_t first);
Kvpool__V1__Blocks *by_keys(struct named *named, const void *keys, uint32_t key_bytes, uint32_t n);

struct shell_call *open_blocks(struct kvp_caller caller, uint64_t key, Kvpool__V1__Blocks *blocks, uint64_t call_id);
/* @return tokens taken along */
uint32_t open_prompt(struct kvp_caller caller, uint64_t key, uint32_t tokens, uint64_t *ret_seq);
struct shell_call *advance_blocks(struct kvp_caller caller, uint64_t seq, uint32_t reserved, uint32_t written,
                                  Kvpool__V1__Blocks *blocks, uint64_t call_id);
/* The first n tokens of the prompt, in a sequence, written and named. */
uint64_t write_prompt(struct kvp_caller caller, uint64_t key, uint32_t tokens);
void close_ok(struct kvp_caller caller, uint64_t seq);
/* The first n tokens of the prompt are cached, and nobody holds them. */
void cache_prompt(struct kvp_caller caller, uint32_t tokens);

struct shell_call *match_call(struct kvp_caller caller, Kvpool__V1__Blocks *blocks, bool with_pages);
/* @return tokens that are cached */
uint32_t match(struct kvp_caller caller, Kvpool__V1__Blocks *blocks);
uint32_t match_prompt(struct kvp_caller caller, uint32_t tokens);

struct kvp_cache_view cache_view(void);

#endif
