/**
 * Page digests: a word a page beside its record, in pools made so.
 *
 *              begin (mark)               put (the same mark)
 *   0, sealed ─────────────► mark, sealed ────────────────────► digest, sealed
 *       ▲                       │  begin (a later mark)              │
 *       └───────────────────────┴──────────── the page is free ──────┘
 *
 * Whoever takes a digest reads the bytes long after he has chosen the page: by then it may be free, and be somebody
 * else's. His mark tells: it goes with the page's life, and no two takers have the same. A mark that its taker left
 * behind (he died) is no digest: the next one writes over it.
 */
#include "internal.h"

void forget_digest(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    if (m->digests[page] != 0)
        put64(ledger, &m->digests[page], 0);
}

static enum kvp_status map_digests(const struct kvp_ledger *ledger, struct kvp_pool_id pool,
                                   const struct pool_map **ret_map)
{
    TRY(map_pool(ledger, pool, ret_map));
    return (*ret_map)->digests != NULL ? KVP_OK : KVP_ENOENT;
}

enum kvp_status kvp_digest_scan(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t *cursor,
                                uint32_t looks, uint32_t room, uint32_t *ret_pages, uint64_t *ret_words,
                                uint32_t *ret_n)
{
    const struct pool_map *m;
    TRY(map_digests(ledger, pool, &m));
    uint32_t page = *cursor, n = 0;
    for (; page < m->pool->pages_used && looks > 0 && n < room; page++, looks--) {
        uint64_t word = m->digests[page];
        bool taken = (word & KVP_DIGEST_BIT) != 0;
        if (!PAGE_SEALED(m->pages[page]) || taken != (ret_words != NULL))
            continue;
        if (ret_words != NULL)
            ret_words[n] = word;
        ret_pages[n++] = page;
    }
    *cursor = page >= m->pool->pages_used ? m->pool->pages : page;
    *ret_n = n;
    return KVP_OK;
}

enum kvp_status kvp_digest_begin(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t n, const uint32_t *pages,
                                 uint64_t mark)
{
    const struct pool_map *m;
    TRY(map_digests(ledger, pool, &m));
    TRY(txn_room(ledger, n));
    for (uint32_t i = 0; i < n; i++) {
        if (!is_used_page(m, pages[i]) || !PAGE_SEALED(m->pages[pages[i]]) || m->digests[pages[i]] & KVP_DIGEST_BIT)
            return KVP_EINVAL;
        put64(ledger, &m->digests[pages[i]], mark);
    }
    return KVP_OK;
}

enum kvp_status kvp_digest_put(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t n, const uint32_t *pages,
                               uint64_t mark, const uint64_t *digests)
{
    const struct pool_map *m;
    TRY(map_digests(ledger, pool, &m));
    TRY(txn_room(ledger, n));
    for (uint32_t i = 0; i < n; i++) {
        if (is_used_page(m, pages[i]) && m->digests[pages[i]] == mark)
            put64(ledger, &m->digests[pages[i]], digests[i] | KVP_DIGEST_BIT);
    }
    return KVP_OK;
}

uint64_t kvp_digest_of(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page)
{
    const struct pool_map *m;
    return map_digests(ledger, pool, &m) == KVP_OK && page < m->pool->pages ? m->digests[page] : 0;
}
