/**
 * Blocks that a call names, checked and hashed: for each of its sequences a run of block keys. Private to server/core.
 */
#ifndef KVP_CORE_BLOCKS_H
#define KVP_CORE_BLOCKS_H

#include "op.h"

/* In the call's memory. */
struct call_blocks {
    size_t n;                   /* sequences; 0: the call names no blocks */
    const size_t *at;           /* [n + 1] the keys of sequence i are keys[at[i]] … keys[at[i + 1] - 1] */
    const uint32_t *first;      /* [n] the page that the first of them is of */
    struct kvp_block_key *keys; /* [at[n]] */
};

/**
 * The blocks of a call over n sequences.
 * @param blocks  NULL, or without entries: none
 * @param views   [n] the sequences whose pages they are, for keys of pages behind others; NULL: all prefixes
 */
enum kvp_status core_blocks(struct kvp_core *core, struct pool_state *pool, uint32_t tenant,
                            const Kvpool__V1__Blocks *blocks, size_t n, const struct kvp_seq_view *views,
                            struct call_blocks *ret_blocks);

/* Blocks of sequence i. */
static inline size_t core_block_count(const struct call_blocks *blocks, size_t i)
{
    return blocks->n == 0 ? 0 : blocks->at[i + 1] - blocks->at[i];
}

/* Who asks, of calls that need no session. */
uint32_t core_tenant(const struct turn *turn);

#endif
