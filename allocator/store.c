/**
 * Transactions, and what is done with a block as a whole: made, adopted, rolled back.
 *
 *   commit   log_count = 0
 *   abort    words restored from the last entry to the first · fence · log_count = 0
 *
 * Recovery does what an abort does; until it has stored log_count = 0 it can die and be done again, since restoring a
 * word twice restores it. The stores, and the log that they write, are store.h's.
 */
#include "internal.h"

#include <string.h>

#ifdef KVPOOL_TEST_HOOKS
void (*kvp_store_hook)(void *arg);
void *kvp_store_hook_arg;
#endif

void copy_word(struct kvp_ledger *ledger, uint64_t offset, size_t size)
{
    memcpy(ledger->copy + offset, ledger->store + offset, size);
}

void kvp_txn_begin(struct kvp_ledger *ledger)
{
    KVP_ASSERT(!ledger->in_txn && ledger->txn_stores == 0);
    ledger->in_txn = true;
    ledger->txn_stores_end = KVP_TXN_STORES_MAX;
    ledger->txn_parks = 0;
    ledger->txn_serial++;
}

static void txn_over(struct kvp_ledger *ledger)
{
    ledger->txn_stores = ledger->txn_stores_end = 0;
    ledger->in_txn = false;
}

void kvp_txn_commit(struct kvp_ledger *ledger)
{
    KVP_ASSERT(ledger->in_txn);
    if (ledger->txn_stores != 0) {
        store64(ledger, offsetof(struct block_header, log_count), 0);
        ledger->changes++;
    }
    txn_over(ledger);
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
    txn_over(ledger);
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
    map_pools(&found);
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
