/**
 * Reading the published table without a call: lengths and page ids.
 *
 * The protocol is that of kvp_abi.h, "Reading a row": a version that is even and the same before and after what was
 * read means that it is one state. Every load is an acquire, so none moves past the version that ends the reading; on
 * x86-64 that costs nothing. An odd or a changed version is read again, TRIES times: the daemon changes a row in well
 * under a microsecond, and one that was killed in between leaves it odd until its next start.
 *
 * The owner knows more than the table: its progress word tells what was written before the daemon has looked. The word
 * counts if its version is the row's, and up to what this session has reserved under that version (pool->own).
 */
#include "internal.h"

#define TRIES 64

static inline uint32_t load32(const uint32_t *at)
{
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

enum kvp_status kvp_pool_usable(const struct kvp_pool *pool)
{
    int gone = atomic_load_explicit(&pool->gone, memory_order_acquire);

    if (pool->client->fork_generation != kvp_fork_generation)
        return kvp_fail(KVP_ESESSION,
                        "the session belongs to the process that forked this one; connect again after fork()");
    if (gone == KVP_ESESSION)
        return kvp_fail(KVP_ESESSION, "the session that attached pool %s is over; attach it again",
                        pool->info->spec.name);
    if (gone != KVP_OK)
        return kvp_fail(gone, "pool %s was attached from a ledger that is no more", pool->info->spec.name);
    switch (load32(&pool->header->state)) {
    case KVP_TABLE_LIVE:
        return KVP_OK;
    case KVP_TABLE_LOST:
        return kvp_fail(KVP_ELOST, "the memory of pool %s is gone", pool->info->spec.name);
    default:
        return kvp_fail(KVP_ELOST, "pool %s was deleted", pool->info->spec.name);
    }
}

enum kvp_status kvp_pool_state(const struct kvp_pool *pool)
{
    return kvp_pool_usable(pool);
}

/* Slow and cold: everything that can be said against a handle. */
static enum kvp_status __attribute__((noinline, cold)) refuse(const struct kvp_pool *pool, struct kvp_seq seq)
{
    enum kvp_status status = kvp_pool_usable(pool);

    if (status != KVP_OK)
        return status;
    if (seq.slot >= pool->header->max_sequences || seq.generation == 0)
        return kvp_fail(KVP_ESTALE, "sequence %u.%u is none of pool %s", seq.slot, seq.generation,
                        pool->info->spec.name);
    if (load32(&pool->heads[seq.slot].generation) != seq.generation)
        return kvp_fail(KVP_ESTALE, "sequence %u.%u is closed", seq.slot, seq.generation);
    return kvp_fail(KVP_EAGAIN, "the row of sequence %u.%u was being changed at each of %d looks", seq.slot,
                    seq.generation, TRIES);
}

static inline bool readable(const struct kvp_pool *pool, struct kvp_seq seq)
{
    return atomic_load_explicit(&pool->gone, memory_order_relaxed) == KVP_OK &&
           load32(&pool->header->state) == KVP_TABLE_LIVE && pool->client->fork_generation == kvp_fork_generation &&
           seq.slot < pool->header->max_sequences && seq.generation != 0;
}

/* What this session has reported of a row of that version. */
static inline uint32_t own_tokens(const struct kvp_pool *pool, uint32_t slot, uint32_t version)
{
    uint64_t own = atomic_load_explicit(&pool->own[slot], memory_order_acquire);
    uint64_t word;

    if (KVP_PROGRESS_VERSION(own) != version || pool->words == NULL)
        return 0;
    word = atomic_load_explicit(&pool->words[slot], memory_order_acquire);
    if (KVP_PROGRESS_VERSION(word) != version)
        return 0;
    return KVP_PROGRESS_TOKENS(word) < KVP_PROGRESS_TOKENS(own) ? KVP_PROGRESS_TOKENS(word) : KVP_PROGRESS_TOKENS(own);
}

enum kvp_status kvp_seq_len(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t *ret_tokens)
{
    const struct kvp_table_head *head;

    if (!readable(pool, seq))
        return refuse(pool, seq);
    head = &pool->heads[seq.slot];
    for (int i = 0; i < TRIES; i++) {
        uint32_t version = load32(&head->version);
        uint32_t length = load32(&head->length);
        uint32_t generation = load32(&head->generation);
        uint32_t own = own_tokens(pool, seq.slot, version);

        if ((version & 1) != 0 || load32(&head->version) != version)
            continue;
        if (generation != seq.generation)
            return refuse(pool, seq);
        *ret_tokens = length > own ? length : own;
        return KVP_OK;
    }
    return refuse(pool, seq);
}

enum kvp_status kvp_table_ids(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t first, uint32_t max,
                              int32_t *ret_pages, uint32_t *ret_n)
{
    const struct kvp_table_head *head;
    const uint32_t *row;

    if (!readable(pool, seq))
        return refuse(pool, seq);
    head = &pool->heads[seq.slot];
    row = (const uint32_t *)(const void *)(pool->rows + pool->header->row_stride * seq.slot);
    for (int i = 0; i < TRIES; i++) {
        uint32_t version = load32(&head->version);
        uint32_t n = load32(&head->row_pages);
        uint32_t generation = load32(&head->generation);

        if ((version & 1) != 0 || n > pool->header->row_pages)
            continue;
        for (uint32_t k = first; k < n && k - first < max; k++)
            ret_pages[k - first] = (int32_t)load32(&row[k]);
        if (load32(&head->version) != version)
            continue;
        if (generation != seq.generation)
            return refuse(pool, seq);
        *ret_n = n;
        return KVP_OK;
    }
    return refuse(pool, seq);
}

enum kvp_status kvp_row(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t max, int32_t *ret_pages,
                        uint32_t *ret_n)
{
    return kvp_table_ids(pool, seq, 0, max, ret_pages, ret_n);
}

enum kvp_status kvp_table_row_head(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t *ret_version,
                                   uint32_t *ret_row_pages)
{
    const struct kvp_table_head *head;

    if (!readable(pool, seq))
        return refuse(pool, seq);
    head = &pool->heads[seq.slot];
    for (int i = 0; i < TRIES; i++) {
        uint32_t version = load32(&head->version);
        uint32_t row_pages = load32(&head->row_pages);
        uint32_t generation = load32(&head->generation);

        if ((version & 1) != 0 || load32(&head->version) != version)
            continue;
        if (generation != seq.generation)
            return refuse(pool, seq);
        *ret_version = version;
        *ret_row_pages = row_pages;
        return KVP_OK;
    }
    return refuse(pool, seq);
}

uint32_t kvp_table_reserved(const struct kvp_pool *pool, uint32_t slot, uint32_t version)
{
    uint64_t own = atomic_load_explicit(&pool->own[slot], memory_order_acquire);

    return KVP_PROGRESS_VERSION(own) == version ? KVP_PROGRESS_TOKENS(own) : UINT32_MAX;
}
