/**
 * The table: what of the ledger the attached processes see without a call (kvp_abi.h, "Reading a row").
 *
 * Written after a transaction has committed, one sequence at a time, and only words that differ: running GPU steps read
 * it, and so a daemon that adopts a ledger publishes everything again and stores next to nothing.
 *
 *   the ledger's version is the table's, no id differs  append: ids, then the count, then the length, with release
 *   else                                                odd version, change, the ledger's version
 *   the sequence is no longer open                      odd version, generation 0, no ids, the version after the
 *                                                       ledger's, which is that of the next to open the slot
 *
 * The ids of a row that was given up stay where they are until the slot is used again, which is not before its pages
 * are unread.
 */
#include "state.h"

#define HEADS_OFFSET           4096u
#define ALIGN_UP(value, align) (((uint64_t)(value) + (align)-1) / (align) * (align))

static uint64_t row_stride(const Kvpool__V1__PoolSpec *spec)
{
    return ALIGN_UP((uint64_t)core_row_pages(spec) * sizeof(int32_t), 64);
}

static uint64_t rows_offset(const Kvpool__V1__PoolSpec *spec)
{
    return ALIGN_UP(HEADS_OFFSET + (uint64_t)spec->max_sequences * sizeof(struct kvp_table_head), 4096);
}

uint64_t core_table_bytes(const Kvpool__V1__PoolSpec *spec)
{
    return ALIGN_UP(rows_offset(spec) + row_stride(spec) * spec->max_sequences, 4096);
}

static void store32(uint32_t *word, uint32_t value)
{
    if (__atomic_load_n(word, __ATOMIC_RELAXED) != value)
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static void store64(uint64_t *word, uint64_t value)
{
    if (__atomic_load_n(word, __ATOMIC_RELAXED) != value)
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

void core_publish_header(struct kvp_core *core, struct pool_state *pool, enum kvp_table_state state)
{
    pool->rows_offset = rows_offset(pool->spec);
    pool->row_stride = row_stride(pool->spec);
    struct kvp_table_header *header = (struct kvp_table_header *)(void *)pool->table;
    struct kvp_pool_view view;
    CORE_ASSERT(kvp_pool_get(core->ledger, pool->id, &view) == KVP_OK);
    struct kvp_uuid instance = kvp_ledger_instance(core->ledger);
    uint64_t words[2];
    memcpy(words, instance.bytes, sizeof(words));
    for (int i = 0; i < 2; i++) {
        store64((uint64_t *)(void *)header->instance + i, words[i]);
        store64(&header->layout_digest[i], view.layout_digest[i]);
    }
    store64(&header->epoch, kvp_ledger_epoch(core->ledger));
    store32(&header->abi_version, KVP_ABI_VERSION);
    store32(&header->pool_slot, pool->id.slot);
    store32(&header->pool_generation, pool->id.generation);
    store32(&header->pages, pool->spec->pages);
    store32(&header->page_tokens, pool->spec->page_tokens);
    store32(&header->max_sequences, pool->spec->max_sequences);
    store32(&header->row_pages, core_row_pages(pool->spec));
    store64(&header->row_stride, pool->row_stride);
    store64(&header->heads_offset, HEADS_OFFSET);
    store64(&header->rows_offset, pool->rows_offset);
    store64(&header->bytes, core_table_bytes(pool->spec));
    store32(&header->state, state);
    store64(&header->magic, KVP_TABLE_MAGIC);
}

static struct kvp_table_head *head_at(const struct pool_state *pool, uint32_t slot)
{
    return (struct kvp_table_head *)(void *)(pool->table + HEADS_OFFSET) + slot;
}

static uint32_t *row_at(const struct pool_state *pool, uint32_t slot)
{
    return (uint32_t *)(void *)(pool->table + pool->rows_offset + pool->row_stride * slot);
}

static void publish_closed(struct kvp_table_head *head, uint32_t version)
{
    store32(&head->version, version - 1);
    store32(&head->generation, 0);
    store32(&head->row_pages, 0);
    store32(&head->length, 0);
    store32(&head->version, version);
}

/* @param trusted  this daemon published what stands there: under one version a row only grows, so that it is not compared */
static void publish_open(struct kvp_table_head *head, uint32_t *row, const struct kvp_seq_view *view,
                         const uint32_t *ids, bool trusted)
{
    uint32_t shown = head->row_pages < view->row_pages ? head->row_pages : view->row_pages;
    bool append = head->version == view->version && head->row_pages <= view->row_pages &&
                  (head->generation == view->id.generation || shown == 0) &&
                  (trusted || memcmp(row, ids, (size_t)shown * sizeof(*ids)) == 0);
    if (!append)
        store32(&head->version, view->version - 1);
    for (uint32_t i = append ? shown : 0; i < view->row_pages; i++)
        store32(&row[i], ids[i]);
    store32(&head->row_pages, view->row_pages);
    store32(&head->length, view->written);
    store32(&head->generation, view->id.generation);
    store32(&head->version, view->version);
}

static void publish(struct kvp_core *core, struct pool_state *pool, uint32_t slot, bool trusted)
{
    struct kvp_seq_view view;
    struct kvp_table_head *head = head_at(pool, slot);
    if (kvp_seq_at(core->ledger, pool->id, slot, &view) == KVP_OK && view.state == KVP_SEQ_OPEN)
        publish_open(head, row_at(pool, slot), &view, kvp_seq_row(core->ledger, pool->id, slot), trusted);
    else if (head->generation != 0)
        publish_closed(head, (head->version | 1) + 1);
}

void core_publish_seq(struct kvp_core *core, struct pool_state *pool, uint32_t slot)
{
    publish(core, pool, slot, true);
}

void core_publish_view(struct kvp_core *core, struct pool_state *pool, const struct kvp_seq_view *view)
{
    uint32_t slot = view->id.slot;
    publish_open(head_at(pool, slot), row_at(pool, slot), view, kvp_seq_row(core->ledger, pool->id, slot), true);
}

void core_publish_all(struct kvp_core *core, struct pool_state *pool)
{
    for (uint32_t slot = 0; slot < pool->spec->max_sequences; slot++)
        publish(core, pool, slot, false);
}
