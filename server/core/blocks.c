/**
 * Blocks that calls name: counts checked against what came, tokens and engines' keys turned into block keys, by the
 * pool's hasher (block_key.h), which is made when it is first needed.
 *
 * A run that starts behind other pages goes on from the key of the page before it, which the ledger has.
 */
#include "blocks.h"

#include "block_key.h"

uint32_t core_tenant(const struct turn *turn)
{
    const struct kvp_caller *caller = &turn->call->caller;
    if (turn->has_session)
        return turn->session.spec.tenant;
    return caller->known ? caller->uid : KVP_UID_UNKNOWN;
}

/* ---- the hasher -------------------------------------------------------------------------------------------------- */

static enum kvp_status need_hasher(struct kvp_core *core, struct pool_state *pool)
{
    struct kvp_pool_view view;
    if (pool->hasher != NULL)
        return KVP_OK;
    TRY(kvp_pool_get(core->ledger, pool->id, &view));
    struct block_hasher_spec spec = {.xxh3 = pool->spec->block_hash == KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3,
                                     .secret = {view.cache.hash_key[0], view.cache.hash_key[1]},
                                     .digest = {view.layout_digest[0], view.layout_digest[1]},
                                     .page_tokens = pool->spec->page_tokens};
    enum kvp_status status = core_hasher_open(&spec, &pool->hasher);
    if (status == KVP_ENOMEM)
        return core_refuse(core, status, "no memory for the pool's block hash");
    if (status != KVP_OK)
        return core_refuse(core, status, "blocks: libcrypto has no AES-128 here");
    return KVP_OK;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static enum kvp_status check_content(struct kvp_core *core, const Kvpool__V1__Blocks *blocks)
{
    if ((blocks->n_tokens != 0) && (blocks->keys.len != 0 || blocks->key_bytes != 0))
        return core_refuse(core, KVP_EINVAL, "blocks: %zu tokens and %zu bytes of keys, must be one or the other",
                           blocks->n_tokens, blocks->keys.len);
    if (blocks->extra.len > KVP_BLOCK_EXTRA_BYTES_MAX)
        return core_refuse(core, KVP_EINVAL, "blocks: extra of %zu bytes, at most %d", blocks->extra.len,
                           KVP_BLOCK_EXTRA_BYTES_MAX);
    if (blocks->keys.len == 0)
        return KVP_OK;
    if (blocks->key_bytes < KVP_BLOCK_KEY_BYTES_MIN || blocks->key_bytes > KVP_BLOCK_KEY_BYTES_MAX)
        return core_refuse(core, KVP_EINVAL, "blocks: key_bytes %u, must be %d to %d", blocks->key_bytes,
                           KVP_BLOCK_KEY_BYTES_MIN, KVP_BLOCK_KEY_BYTES_MAX);
    if (blocks->keys.len % blocks->key_bytes != 0)
        return core_refuse(core, KVP_EINVAL, "blocks: %zu bytes of keys are no multiple of key_bytes, %u",
                           blocks->keys.len, blocks->key_bytes);
    return KVP_OK;
}

static enum kvp_status check_first(struct kvp_core *core, const struct kvp_seq_view *views, size_t i, uint32_t first)
{
    if (first == 0)
        return KVP_OK;
    if (views == NULL)
        return core_refuse(core, KVP_EINVAL, "blocks: first[%zu] is %u, must be 0 in this call", i, first);
    if (first > views[i].keyed)
        return core_refuse(core, KVP_EINVAL, "blocks: first[%zu] is page %u, but only the first %u pages have keys", i,
                           first, views[i].keyed);
    return KVP_OK;
}

/* Where each sequence's blocks begin, in blocks. @param page_tokens  entries a block: 1 of keys */
static enum kvp_status check_counts(struct kvp_core *core, const Kvpool__V1__Blocks *blocks, size_t n,
                                    const struct kvp_seq_view *views, uint32_t page_tokens, size_t *ret_at)
{
    bool keys = blocks->keys.len != 0;
    uint64_t given = keys ? blocks->keys.len / blocks->key_bytes : blocks->n_tokens, sum = 0;
    if (blocks->n_counts != n)
        return core_refuse(core, KVP_EINVAL, "blocks: %zu counts, must be as many as sequences: %zu", blocks->n_counts,
                           n);
    if (blocks->n_first != 0 && blocks->n_first != n)
        return core_refuse(core, KVP_EINVAL, "blocks: %zu entries in first, must be none or as many as sequences: %zu",
                           blocks->n_first, n);
    for (size_t i = 0; i < n; i++) {
        sum += blocks->counts[i];
        ret_at[i + 1] = ret_at[i] + (keys ? blocks->counts[i] : blocks->counts[i] / page_tokens);
        if (blocks->n_first != 0)
            TRY(check_first(core, views, i, blocks->first[i]));
    }
    if (sum != given)
        return core_refuse(core, KVP_EINVAL, "blocks: the counts are of %llu %s, but %llu came",
                           (unsigned long long)sum, keys ? "keys" : "tokens", (unsigned long long)given);
    if (ret_at[n] > KVP_CALL_PAGES_MAX)
        return core_refuse(core, KVP_EINVAL, "blocks: %zu, at most %u in a call", ret_at[n], KVP_CALL_PAGES_MAX);
    return KVP_OK;
}

/* ---- hashing ----------------------------------------------------------------------------------------------------- */

static enum kvp_status hash_tokens(struct kvp_core *core, struct pool_state *pool, const struct block_mix *mix,
                                   const Kvpool__V1__Blocks *blocks, const struct kvp_seq_view *views,
                                   const struct call_blocks *call)
{
    const uint32_t *tokens = blocks->tokens;
    for (size_t i = 0; i < call->n; tokens += blocks->counts[i++]) {
        struct kvp_block_key parent;
        bool behind = call->first[i] != 0;
        if (behind) {
            enum kvp_status status =
                kvp_seq_block_key(core->ledger, pool->id, views[i].id, call->first[i] - 1, &parent);
            if (status != KVP_OK)
                return core_refuse_plain(core, status, "blocks: the key of the page before");
        }
        core_hash_tokens(pool->hasher, mix, behind ? &parent : NULL, core_block_count(call, i), tokens,
                         call->keys + call->at[i]);
    }
    return KVP_OK;
}

enum kvp_status core_blocks(struct kvp_core *core, struct pool_state *pool, uint32_t tenant,
                            const Kvpool__V1__Blocks *blocks, size_t n, const struct kvp_seq_view *views,
                            struct call_blocks *ret_blocks)
{
    *ret_blocks = (struct call_blocks){.n = 0};
    if (blocks == NULL || (blocks->n_counts == 0 && blocks->n_tokens == 0 && blocks->keys.len == 0))
        return KVP_OK;
    size_t *at = core_alloc(core, n + 1, sizeof(*at));
    uint32_t *none = core_alloc(core, n, sizeof(*none));
    if (at == NULL || none == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    TRY(check_content(core, blocks));
    TRY(check_counts(core, blocks, n, views, pool->spec->page_tokens, at));
    TRY(need_hasher(core, pool));
    struct call_blocks call = {.n = n,
                               .at = at,
                               .first = blocks->n_first != 0 ? blocks->first : none,
                               .keys = core_alloc(core, at[n] + 1, sizeof(*call.keys))};
    if (call.keys == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the call");
    struct block_mix mix = core_hash_mix(pool->hasher, tenant, blocks->extra.data, blocks->extra.len);
    if (blocks->keys.len != 0)
        core_hash_keys(pool->hasher, &mix, at[n], blocks->keys.data, blocks->key_bytes, call.keys);
    else
        TRY(hash_tokens(core, pool, &mix, blocks, views, &call));
    *ret_blocks = call;
    return KVP_OK;
}
