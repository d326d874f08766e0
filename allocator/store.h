/**
 * The stores: the only code that writes to the block, and the undo log that they write before it. Private.
 *
 *   logged store   entry {where, old} · fence · log_count + 1 (release) · fence · word · fence
 *
 * A process that dies leaves its stores in program order: so at any instruction the log holds what every changed word
 * was. The fences are for the compiler alone. Without the log go: words that are dead before the transaction
 * (put32_dead), the epoch, and the header of a new ledger, whose magic is stored last.
 *
 * While a snapshot is taken (snapshot.c), a word that lies in the part copied so far is stored there as well.
 *
 * One thread, between kvp_txn_begin and its commit or abort (store.c). At most KVP_TXN_STORES_MAX logged stores in a
 * transaction. In a header, so that a store is compiled into where it is made: there are some twenty of them a page.
 */
#ifndef KVP_STORE_H
#define KVP_STORE_H

#include "layout.h"

#include <stdatomic.h>

#ifdef KVPOOL_TEST_HOOKS
#define STORE_HOOK()                                                                                                   \
    do {                                                                                                               \
        if (kvp_store_hook != NULL)                                                                                    \
            kvp_store_hook(kvp_store_hook_arg);                                                                        \
    } while (0)
#else
#define STORE_HOOK() ((void)0)
#endif

/* An aligned word of the block at an address; what lies in the root part, as header and log do, is within it. */
static inline void store_word(unsigned char *word, uint64_t value)
{
    STORE_HOOK();
    atomic_signal_fence(memory_order_seq_cst);
    __atomic_store_n((uint64_t *)(void *)word, value, __ATOMIC_RELEASE);
    atomic_signal_fence(memory_order_seq_cst);
}

/* One anywhere. The block's size is a multiple of 8: an aligned word that begins in it ends in it. */
static inline void store64(struct kvp_ledger *ledger, uint64_t offset, uint64_t value)
{
    KVP_ASSERT(offset < ledger->bytes);
    store_word(ledger->store + offset, value);
}

static inline void store32(struct kvp_ledger *ledger, uint64_t offset, uint32_t value)
{
    KVP_ASSERT(offset < ledger->bytes);
    STORE_HOOK();
    atomic_signal_fence(memory_order_seq_cst);
    __atomic_store_n((uint32_t *)(void *)(ledger->store + offset), value, __ATOMIC_RELEASE);
    atomic_signal_fence(memory_order_seq_cst);
}

/* A word of the part that a snapshot under way has copied. Out of line: all that a store pays for it is one branch. */
__attribute__((cold)) void copy_word(struct kvp_ledger *ledger, uint64_t offset, size_t size);

/* The same as storeN, of a word that a snapshot may have copied: of any but the header's and the log's. */
static inline void change32(struct kvp_ledger *ledger, uint64_t offset, uint32_t value)
{
    store32(ledger, offset, value);
    if (__builtin_expect(offset < ledger->copied, 0))
        copy_word(ledger, offset, sizeof(value));
}

static inline void change64(struct kvp_ledger *ledger, uint64_t offset, uint64_t value)
{
    store64(ledger, offset, value);
    if (__builtin_expect(offset < ledger->copied, 0))
        copy_word(ledger, offset, sizeof(value));
}

#ifdef KVPOOL_NO_UNDO_LOG /* a bench's, to tell what the log costs: nothing can be undone */
static inline void log_old(struct kvp_ledger *ledger, uint64_t where, uint64_t old)
{
    (void)ledger, (void)where, (void)old;
}
#else
static inline void log_old(struct kvp_ledger *ledger, uint64_t where, uint64_t old)
{
    unsigned char *root = ledger->store;
    uint32_t n = ledger->txn_stores;
    KVP_ASSERT(n < ledger->txn_stores_end);
    unsigned char *entry = root + LOG_OFFSET + (uint64_t)n * sizeof(struct block_log_entry);
    ledger->txn_stores = n + 1;
    store_word(entry + offsetof(struct block_log_entry, where), where);
    store_word(entry + offsetof(struct block_log_entry, old), old);
    store_word(root + offsetof(struct block_header, log_count), n + 1);
}
#endif

static inline uint64_t offset_of(const struct kvp_ledger *ledger, const void *at)
{
    return (uint64_t)((const unsigned char *)at - ledger->view);
}

/* `word` is the address in the view. Logged: undone by an abort. */
static inline void put32(struct kvp_ledger *ledger, const uint32_t *word, uint32_t value)
{
    uint64_t offset = offset_of(ledger, word);
    log_old(ledger, offset, *word);
    change32(ledger, offset, value);
}

static inline void put64(struct kvp_ledger *ledger, const uint64_t *word, uint64_t value)
{
    uint64_t offset = offset_of(ledger, word);
    log_old(ledger, offset | 1, *word);
    change64(ledger, offset, value);
}

/* Not logged: for a word that is dead before the transaction, and so dead again after its rollback; or for a hint, of
 * which any value will do. */
static inline void put32_dead(struct kvp_ledger *ledger, const uint32_t *word, uint32_t value)
{
    KVP_ASSERT(ledger->in_txn);
    change32(ledger, offset_of(ledger, word), value);
}

static inline uint32_t txn_room_left(const struct kvp_ledger *ledger)
{
    KVP_ASSERT(ledger->in_txn);
    return KVP_TXN_STORES_MAX - ledger->txn_stores;
}

/* KVP_ELIMIT unless the open transaction can log that many more stores. */
static inline enum kvp_status txn_room(const struct kvp_ledger *ledger, uint64_t stores)
{
    return stores <= txn_room_left(ledger) ? KVP_OK : KVP_ELIMIT;
}

#endif
