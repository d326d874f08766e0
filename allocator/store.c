/**
 * The stores: the only code that writes to the block, and the undo log around it.
 *
 *   logged store   entry {where, old} · fence · log_count + 1 (release) · fence · word · fence
 *   commit         log_count = 0
 *   abort          words restored from the last entry to the first · fence · log_count = 0
 *
 * A process that dies leaves its stores in program order: so at any instruction the log holds what every changed word
 * was. The fences are for the compiler alone. Recovery does what an abort does; until it has stored log_count = 0 it
 * can die and be done again, since restoring a word twice restores it. Without the log go: words that are dead before
 * the transaction (put32_dead), the epoch, and the header of a new ledger, whose magic is stored last.
 *
 * While a snapshot is taken (snapshot.c), a word that lies in the part copied so far is stored there as well.
 *
 * One thread, between kvp_txn_begin and its commit or abort. At most KVP_TXN_STORES_MAX logged stores in a transaction.
 */
#include "internal.h"

#include <stdatomic.h>
#include <string.h>

#ifdef KVPOOL_TEST_HOOKS
void (*kvp_store_hook)(void *arg);
void *kvp_store_hook_arg;
#define STORE_HOOK()                                                                                                   \
    do {                                                                                                               \
        if (kvp_store_hook != NULL)                                                                                    \
            kvp_store_hook(kvp_store_hook_arg);                                                                        \
    } while (0)
#else
#define STORE_HOOK() ((void)0)
#endif

static inline void store32(struct kvp_ledger *ledger, uint64_t offset, uint32_t value)
{
    KVP_ASSERT(offset % 4 == 0 && offset <= ledger->bytes - 4);
    STORE_HOOK();
    atomic_signal_fence(memory_order_seq_cst);
    __atomic_store_n((uint32_t *)(void *)(ledger->store + offset), value, __ATOMIC_RELEASE);
    atomic_signal_fence(memory_order_seq_cst);
}

/* An aligned word of the block; what lies in the root part, as header and log do, is within it. */
static inline void store_word(unsigned char *word, uint64_t value)
{
    STORE_HOOK();
    atomic_signal_fence(memory_order_seq_cst);
    __atomic_store_n((uint64_t *)(void *)word, value, __ATOMIC_RELEASE);
    atomic_signal_fence(memory_order_seq_cst);
}

static inline void store64(struct kvp_ledger *ledger, uint64_t offset, uint64_t value)
{
    KVP_ASSERT(offset % 8 == 0 && offset <= ledger->bytes - 8);
    store_word(ledger->store + offset, value);
}

/* A word of the part that a snapshot under way has copied. Out of line: all that a store pays for it is one branch. */
static __attribute__((noinline, cold)) void copy_word(struct kvp_ledger *ledger, uint64_t offset, size_t size)
{
    memcpy(ledger->copy + offset, ledger->store + offset, size);
}

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
    KVP_ASSERT(ledger->in_txn && n < KVP_TXN_STORES_MAX);
    unsigned char *entry = root + LOG_OFFSET + (uint64_t)n * sizeof(struct block_log_entry);
    ledger->txn_stores = n + 1;
    store_word(entry + offsetof(struct block_log_entry, where), where);
    store_word(entry + offsetof(struct block_log_entry, old), old);
    store_word(root + offsetof(struct block_header, log_count), n + 1);
}
#endif

static inline uint64_t offset_of(const struct kvp_ledger *ledger, const void *word)
{
    return (uint64_t)((const unsigned char *)word - ledger->view);
}

void put32(struct kvp_ledger *ledger, const uint32_t *word, uint32_t value)
{
    uint64_t offset = offset_of(ledger, word);
    log_old(ledger, offset, *word);
    change32(ledger, offset, value);
}

void put64(struct kvp_ledger *ledger, const uint64_t *word, uint64_t value)
{
    uint64_t offset = offset_of(ledger, word);
    log_old(ledger, offset | 1, *word);
    change64(ledger, offset, value);
}

void put32_dead(struct kvp_ledger *ledger, const uint32_t *word, uint32_t value)
{
    KVP_ASSERT(ledger->in_txn);
    change32(ledger, offset_of(ledger, word), value);
}

uint32_t txn_room_left(const struct kvp_ledger *ledger)
{
    KVP_ASSERT(ledger->in_txn);
    return KVP_TXN_STORES_MAX - ledger->txn_stores;
}

enum kvp_status txn_room(const struct kvp_ledger *ledger, uint64_t stores)
{
    return stores <= txn_room_left(ledger) ? KVP_OK : KVP_ELIMIT;
}

void kvp_txn_begin(struct kvp_ledger *ledger)
{
    KVP_ASSERT(!ledger->in_txn && ledger->txn_stores == 0);
    ledger->in_txn = true;
    ledger->txn_serial++;
}

void kvp_txn_commit(struct kvp_ledger *ledger)
{
    KVP_ASSERT(ledger->in_txn);
    if (ledger->txn_stores != 0) {
        store64(ledger, offsetof(struct block_header, log_count), 0);
        ledger->changes++;
    }
    ledger->txn_stores = 0;
    ledger->in_txn = false;
}

/* Restore what the log's entries say, last first, and empty it. They were checked, or written by this process. */
static void roll_back(struct kvp_ledger *ledger, uint64_t entries)
{
    const struct block_log_entry *log = log_of(ledger);
    for (uint64_t i = entries; i-- > 0;) {
        if (log[i].where & 1)
            change64(ledger, log[i].where & ~1ull, log[i].old);
        else
            change32(ledger, log[i].where, (uint32_t)log[i].old);
    }
    if (entries != 0)
        store64(ledger, offsetof(struct block_header, log_count), 0);
}

void kvp_txn_abort(struct kvp_ledger *ledger)
{
    KVP_ASSERT(ledger->in_txn);
    roll_back(ledger, ledger->txn_stores);
    ledger->txn_stores = 0;
    ledger->in_txn = false;
}

size_t kvp_ledger_root_bytes(void)
{
    return ROOT_BYTES;
}

static bool addresses_fit(const unsigned char *view, const unsigned char *store, size_t bytes)
{
    return view != NULL && store != NULL && (uintptr_t)view % 64 == 0 && (uintptr_t)store % 64 == 0 && bytes % 8 == 0 &&
           bytes >= ROOT_BYTES && bytes <= KVP_LEDGER_BYTES_MAX;
}

enum kvp_status kvp_ledger_format(struct kvp_ledger *ledger, const unsigned char *view, unsigned char *store,
                                  size_t bytes, struct kvp_uuid instance)
{
    if (!addresses_fit(view, store, bytes))
        return KVP_EINVAL;
    struct kvp_ledger made = {.view = view, .store = store, .bytes = bytes};
    uint64_t words[2];
    memcpy(words, instance.bytes, sizeof(words));
    store32(&made, offsetof(struct block_header, version), KVP_LEDGER_VERSION);
    store32(&made, offsetof(struct block_header, txn_stores_max), KVP_TXN_STORES_MAX);
    store64(&made, offsetof(struct block_header, root_bytes), ROOT_BYTES);
    store64(&made, offsetof(struct block_header, bytes), bytes);
    store64(&made, offsetof(struct block_header, instance[0]), words[0]);
    store64(&made, offsetof(struct block_header, instance[1]), words[1]);
    store64(&made, offsetof(struct block_header, epoch), 1);
    store64(&made, offsetof(struct block_header, magic), KVP_LEDGER_MAGIC);
    *ledger = made;
    return KVP_OK;
}

/* Whether an entry names a word that a transaction can have changed: any behind the log. */
static bool entry_can_be(const struct kvp_ledger *ledger, const struct block_log_entry *entry)
{
    uint64_t offset = entry->where & ~1ull;
    uint64_t size = entry->where & 1 ? 8 : 4;
    return offset % size == 0 && offset >= SESSIONS_OFFSET && offset <= ledger->bytes - size;
}

static enum kvp_status recover(struct kvp_ledger *ledger, const char **reterr_why)
{
    uint64_t entries = header_of(ledger)->log_count;
    if (entries > KVP_TXN_STORES_MAX) {
        *reterr_why = "its undo log counts more entries than it has room for";
        return KVP_ECORRUPT;
    }
    for (uint64_t i = 0; i < entries; i++) {
        if (!entry_can_be(ledger, &log_of(ledger)[i])) {
            *reterr_why = "its undo log names a word that no transaction changes";
            return KVP_ECORRUPT;
        }
    }
    roll_back(ledger, entries);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        const char *why = check_pool_record(ledger, slot);
        if (why != NULL) {
            *reterr_why = why;
            return KVP_ECORRUPT;
        }
    }
    return KVP_OK;
}

enum kvp_status kvp_ledger_open(struct kvp_ledger *ledger, const unsigned char *view, unsigned char *store,
                                size_t bytes, const char **reterr_why)
{
    if (!addresses_fit(view, store, bytes)) {
        *reterr_why = "its size or address can not be a ledger's";
        return KVP_EMISMATCH;
    }
    struct kvp_ledger found = {.view = view, .store = store, .bytes = bytes};
    const struct block_header *header = header_of(&found);
    if (header->magic != KVP_LEDGER_MAGIC) {
        *reterr_why = "there is no ledger in it";
        return KVP_ECORRUPT;
    }
    if (header->version != KVP_LEDGER_VERSION || header->root_bytes != ROOT_BYTES ||
        header->txn_stores_max != KVP_TXN_STORES_MAX) {
        *reterr_why = "it is of another format version";
        return KVP_EMISMATCH;
    }
    if (header->bytes != bytes) {
        *reterr_why = "its size is not the one that it was made with";
        return KVP_EMISMATCH;
    }
    if (header->epoch == 0) {
        *reterr_why = "its epoch is 0";
        return KVP_ECORRUPT;
    }
    TRY(recover(&found, reterr_why));
    store64(&found, offsetof(struct block_header, epoch), header->epoch + 1);
    *ledger = found;
    return KVP_OK;
}

struct kvp_uuid kvp_ledger_instance(const struct kvp_ledger *ledger)
{
    struct kvp_uuid instance;
    memcpy(instance.bytes, header_of(ledger)->instance, sizeof(instance.bytes));
    return instance;
}

uint64_t kvp_ledger_epoch(const struct kvp_ledger *ledger)
{
    return header_of(ledger)->epoch;
}
