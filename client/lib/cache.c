/**
 * The prefix cache by call: match, pin, evict, list; and blocks as they travel.
 *
 * Sequences take cached prefixes along, and name their pages' blocks, by the calls of sequences.c.
 */
#include "internal.h"

#include <string.h>

#define KEY_BYTES 16u

Kvpool__V1__Blocks *kvp_blocks_to_wire(uint32_t n, const struct kvp_blocks *blocks, Kvpool__V1__Blocks *wire)
{
    size_t sum = 0;

    if (blocks == NULL)
        return NULL;
    for (uint32_t i = 0; i < n; i++)
        sum += blocks->counts[i];
    kvpool__v1__blocks__init(wire);
    wire->n_counts = n;
    wire->counts = (uint32_t *)blocks->counts;
    wire->n_first = blocks->first != NULL ? n : 0;
    wire->first = (uint32_t *)blocks->first;
    if (blocks->tokens != NULL) {
        wire->n_tokens = sum;
        wire->tokens = (uint32_t *)blocks->tokens;
    } else if (blocks->keys != NULL) {
        wire->keys = (ProtobufCBinaryData){sum * blocks->key_bytes, (uint8_t *)blocks->keys};
        wire->key_bytes = blocks->key_bytes;
    }
    wire->extra = (ProtobufCBinaryData){blocks->extra_bytes, (uint8_t *)blocks->extra};
    return wire;
}

enum kvp_status kvp_match(struct kvp_client *client, const char *pool, uint32_t n, const struct kvp_blocks *blocks,
                          uint32_t *ret_cached, uint32_t max_pages, int32_t *ret_pages)
{
    Kvpool__V1__MatchRequest request = KVPOOL__V1__MATCH_REQUEST__INIT;
    const Kvpool__V1__MatchReply *reply;
    enum kvp_status status = kvp_check_batch("kvp_match", n);
    Kvpool__V1__Blocks wire;
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    request.pool = (char *)pool;
    request.blocks = kvp_blocks_to_wire(n, blocks, &wire);
    request.with_pages = ret_pages != NULL;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_MATCH, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__MatchReply *)rpc.reply;
        status = kvp_rpc_check_count("prefixes", reply->n_cached, n);
        if (status == KVP_OK && reply->n_pages > max_pages)
            status = kvp_fail(KVP_ELIMIT, "%zu pages are cached, there is room for %u", reply->n_pages, max_pages);
        for (uint32_t i = 0; status == KVP_OK && i < n; i++)
            ret_cached[i] = reply->cached[i];
        for (size_t i = 0; status == KVP_OK && i < reply->n_pages; i++)
            ret_pages[i] = (int32_t)reply->pages[i];
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_pin(struct kvp_client *client, const char *pool, uint32_t n, const struct kvp_blocks *blocks,
                        uint32_t lease_ms, uint32_t *ret_pinned)
{
    Kvpool__V1__PinRequest request = KVPOOL__V1__PIN_REQUEST__INIT;
    const Kvpool__V1__PinReply *reply;
    enum kvp_status status = kvp_check_batch("kvp_pin", n);
    Kvpool__V1__Blocks wire;
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    request.pool = (char *)pool;
    request.blocks = kvp_blocks_to_wire(n, blocks, &wire);
    request.lease_ms = lease_ms;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_PIN, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__PinReply *)rpc.reply;
        status = kvp_rpc_check_count("prefixes", reply->n_pinned, n);
        for (uint32_t i = 0; status == KVP_OK && ret_pinned != NULL && i < n; i++)
            ret_pinned[i] = reply->pinned[i];
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_evict(struct kvp_client *client, const char *pool, uint32_t pages, uint32_t n,
                          const struct kvp_blocks *blocks, bool all, uint64_t *ret_pages)
{
    Kvpool__V1__EvictRequest request = KVPOOL__V1__EVICT_REQUEST__INIT;
    enum kvp_status status = n == 0 ? KVP_OK : kvp_check_batch("kvp_evict", n);
    Kvpool__V1__Blocks wire;
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    request.pool = (char *)pool;
    request.pages = pages;
    request.blocks = n == 0 ? NULL : kvp_blocks_to_wire(n, blocks, &wire);
    request.all = all;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_EVICT, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK && ret_pages != NULL)
        *ret_pages = ((const Kvpool__V1__EvictReply *)rpc.reply)->pages;
    kvp_rpc_release(&rpc);
    return status;
}

static enum kvp_status check_listing(const Kvpool__V1__ListCacheReply *reply, uint32_t limit)
{
    size_t n = reply->n_pages;

    if (n > limit || reply->keys.len != n * KEY_BYTES || reply->n_parents != n || reply->n_children != n ||
        reply->n_references != n || reply->n_tenants != n || reply->n_hits != n || reply->n_ages != n)
        return kvp_fail(KVP_EPROTO, "the reply's listing of %zu pages is not whole", n);
    return KVP_OK;
}

enum kvp_status kvp_list_cache(struct kvp_client *client, const char *pool, uint32_t max, uint32_t *from_page,
                               struct kvp_cached_page *ret_pages, uint32_t *ret_n)
{
    Kvpool__V1__ListCacheRequest request = KVPOOL__V1__LIST_CACHE_REQUEST__INIT;
    const Kvpool__V1__ListCacheReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;

    if (max == 0)
        return kvp_fail(KVP_EINVAL, "kvp_list_cache has no room for an entry");
    request.pool = (char *)pool;
    request.from_page = *from_page;
    request.limit = max < KVP_LIST_MAX ? max : KVP_LIST_MAX;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_LIST_CACHE, &request.base, NULL, 0, &rpc);
    reply = (const Kvpool__V1__ListCacheReply *)rpc.reply;
    if (status == KVP_OK)
        status = check_listing(reply, request.limit);
    if (status == KVP_OK) {
        for (size_t i = 0; i < reply->n_pages; i++) {
            ret_pages[i] = (struct kvp_cached_page){.page = (int32_t)reply->pages[i],
                                                    .parent = (int32_t)reply->parents[i],
                                                    .children = reply->children[i],
                                                    .references = reply->references[i],
                                                    .tenant = reply->tenants[i],
                                                    .hits = reply->hits[i],
                                                    .age = reply->ages[i]};
            memcpy(ret_pages[i].key, reply->keys.data + i * KEY_BYTES, KEY_BYTES);
        }
        *ret_n = (uint32_t)reply->n_pages;
        *from_page = reply->next_page;
    }
    kvp_rpc_release(&rpc);
    return status;
}
