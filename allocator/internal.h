/**
 * What the allocator's files offer each other: stores, page references, sequence lists, look-ups. Private.
 *
 * Functions that return a status may leave the ledger half changed on failure: they run in a transaction, and their
 * caller's caller aborts it. A function that a public call names first asks txn_room for the most stores that the call
 * can make; so the log can not fill in the middle.
 */
#ifndef KVP_INTERNAL_H
#define KVP_INTERNAL_H

#include "store.h"

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        enum kvp_status try_status = (call);                                                                           \
        if (try_status != KVP_OK)                                                                                      \
            return try_status;                                                                                         \
    } while (0)

#define ROOM_SMALL 96u /* more than any function stores that does not loop */

/* For a function that does nothing but prefetch: gcc 12 finds that it has no effect, and drops each call that it did not
 * have to inline. */
#define PREFETCHER inline __attribute__((always_inline))

/* ---- session.c -----------------------------------------------------------------------------------------------------
 */

/* The session of that id, open or ending; KVP_ESESSION. */
enum kvp_status find_session(const struct kvp_ledger *ledger, struct kvp_session_id session,
                             const struct block_session **ret_session);
/* An attachment of it is gone: frees the session with the last one, if it is ending. */
void session_detached(struct kvp_ledger *ledger, const struct block_session *session, uint32_t pool_slot);

/* ---- pool.c --------------------------------------------------------------------------------------------------------
 */

/* Where the parts lie; KVP_EINVAL: a number is out of its range. Does not look at the block. */
enum kvp_status shape_extent(const struct kvp_pool_geometry *geometry, struct extent_shape *ret_shape);
/* The pool of that id, in any state but FREE; KVP_ENOENT. */
enum kvp_status find_pool(const struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct block_pool **ret_pool);
/* The same, mapped. */
enum kvp_status map_pool(const struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct pool_map **ret_map);
/* The same, LIVE; KVP_ELOST. */
enum kvp_status map_live_pool(const struct kvp_ledger *ledger, struct kvp_pool_id pool,
                              const struct pool_map **ret_map);
/* Of a slot that is not FREE. */
static inline const struct pool_map *pool_at(const struct kvp_ledger *ledger, uint32_t slot)
{
    return &ledger->maps[slot];
}
/* See where the pools lie: those whose records can be. */
void map_pools(struct kvp_ledger *ledger);
/* What is wrong with a pool's record; NULL: nothing. Called before the pool is mapped by an adopter. */
const char *check_pool_record(const struct kvp_ledger *ledger, uint32_t slot);

/* ---- attachment.c --------------------------------------------------------------------------------------------------
 */

/* A LIVE attachment; KVP_ENOENT: none there, KVP_ESESSION: DEAD. */
enum kvp_status find_live_attachment(const struct pool_map *m, uint32_t attachment);

/* ---- page.c --------------------------------------------------------------------------------------------------------
 */

#define PAGE_SEALED_BIT    (1ull << 63)
#define PAGE_KEYED_BIT     (1ull << 62)
#define PAGE_PUBLISHED_BIT (1ull << 61)
#define PAGE_DIRTY         (1ull << 60)
#define PAGE_ONE_REF       (1ull << 32)
#define PAGE_REFS_MAX      0x1fffffu

#define PAGE_LINK(record)      ((uint32_t)(record))
#define PAGE_REFS(record)      ((uint32_t)((record) >> 32) & PAGE_REFS_MAX)
#define PAGE_TENANT(record)    ((uint32_t)((record) >> 53) & 0x7fu) /* index + 1; 0: nobody's yet */
#define PAGE_SEALED(record)    (((record)&PAGE_SEALED_BIT) != 0)
#define PAGE_KEYED(record)     (((record)&PAGE_KEYED_BIT) != 0)
#define PAGE_PUBLISHED(record) (((record)&PAGE_PUBLISHED_BIT) != 0)
/* Of a page that is not sealed, by the tenant's index. */
#define PAGE_RECORD(tenant, refs, link) ((uint64_t)((tenant) + 1) << 53 | (uint64_t)(refs) << 32 | (link))

static_assert(2 * KVP_SEQUENCES_MAX + KVP_SEQUENCES_MAX <= PAGE_REFS_MAX, "rows, owed copies and pins of one page");
static_assert(KVP_TENANTS_MAX < 0x7f, "a tenant's index fits into a page record");

uint32_t free_pages(const struct pool_map *m);
/* Whether an id can stand in a row: never a reserved page, never one that was not handed out. */
static inline bool is_used_page(const struct pool_map *m, uint32_t page)
{
    return page >= m->pool->reserved_pages && page < m->pool->pages_used;
}
/* Take n free pages, evicting when there are too few, each with one reference, into ids [first, first + n) of a slot's
 * row; the slot has an owner. At most n + 4 logged stores beside the row's and those of eviction, which looks for room
 * itself. */
enum kvp_status take_pages(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t seq_slot, uint32_t first,
                           uint32_t n, uint32_t *reterr_short);
enum kvp_status share_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page);

/* Neighbours taken out of a list: what they leave is joined when the run ends. */
struct list_cut {
    const uint64_t *list; /* NULL: there is none */
    uint32_t prev, next;  /* page + 1 of those to be joined; 0: the list ends there */
};
/* Pages put to the front of a list one after the other: the list's head, and the first one's links, are stored at the end
 * of the run. */
struct list_run {
    const uint64_t *list;       /* NULL: there is none */
    uint32_t first, next, last; /* page + 1: of the list, and the one behind the first */
};

/* References given up one after the other, or pages evicted: what is in common is stored once, at the end. */
struct page_drop {
    uint64_t free_list;
    bool changed;
    bool stuck; /* eviction met more pages that others extend than a transaction passes over */
    uint32_t tenant, freed, cached, evicted; /* not yet counted, of one tenant; those evicted are freed, too */
    struct list_cut cut;
    struct list_run run;
};
#define STORES_DROP 7u /* of one page, at most */
struct page_drop drop_begin(const struct pool_map *m);
enum kvp_status drop_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop, uint32_t page);
/* A page without references, in no list and not published, to the free ones. */
enum kvp_status free_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop, uint32_t page);
/* Store the counts so far. */
void drop_counts(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop);
void drop_end(struct kvp_ledger *ledger, const struct pool_map *m, struct page_drop *drop);

/* ---- prefix.c ------------------------------------------------------------------------------------------------------
 */

#define ENTRY_PARENT(family)   ((uint32_t)(family)) /* page + 1 */
#define ENTRY_CHILDREN(family) ((uint32_t)((family) >> 32))

#define KEY_TAG(words) ((uint32_t)((words)[0] >> 32)) /* of a key, what its slot has of it */
/* Where the search for a key begins. */
static inline uint32_t home_of(const struct pool_map *m, uint32_t tag)
{
    return (uint32_t)((uint64_t)tag * m->slot_count >> 32);
}
/* The published page of a key, if it is that tenant's (id); else KVP_NONE. */
uint32_t find_block(const struct pool_map *m, uint32_t tenant, const struct kvp_block_key *key);
/* Pages published one after the other: what is in common, and what the last is related to, is stored at the end. */
struct publish_run {
    uint32_t published; /* not yet counted */
    uint32_t last;
    uint64_t family; /* of the last, not yet stored */
};
/* Seal a page of a row, and publish it if it has a key. At most STORES_SEAL logged stores, unless those before it in the
 * row have to be published too: that looks for room itself. */
enum kvp_status seal_page(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run,
                          const uint32_t *row, uint32_t index);
void publish_end(struct kvp_ledger *ledger, const struct pool_map *m, struct publish_run *run);
#define STORES_SEAL 7u
/* Take a page out of the index; counting it is the caller's. @param ret_parent  the page that it extended, or KVP_NONE */
enum kvp_status unpublish(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint32_t *ret_parent);
/* What is known of a page, which can lie in two lines. */
static PREFETCHER void prefetch_page(const struct pool_map *m, uint32_t page)
{
    __builtin_prefetch(&m->entries[page].key);
    __builtin_prefetch(&m->entries[page].use);
    __builtin_prefetch(&m->pages[page]);
}
/* The pages of the longest known prefix, with a reference each, into the empty row of a slot. */
enum kvp_status take_known(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                           uint32_t tenant, size_t n, const struct kvp_block_key *keys, uint32_t *ret_pages);

/* ---- policy.c ------------------------------------------------------------------------------------------------------
 */

/* The word `use` of a page that the index knows; kept while it is held. */
enum use_kind {
    USE_PLAIN = 0,
    USE_SUPERSEDED = 1, /* an older end of a conversation */
    USE_LEAF = 2,       /* never found, and nothing extends it */
};
#define USE_STAMP(use) ((uint32_t)(use)) /* the pool's tick when it was let go of */
#define USE_CLASS(use) ((uint32_t)((use) >> 32) & 7u)
#define USE_HITS(use)  ((uint32_t)((use) >> 35) & USE_HITS_MAX)
#define USE_HITS_MAX   15u
#define USE_KIND(use)  ((enum use_kind)((uint32_t)((use) >> 39) & 3u))
#define USE_PARKED     (1ull << 41) /* evict.c */
#define USE_WORD(stamp, class, hits, kind)                                                                             \
    ((uint64_t)(kind) << 39 | (uint64_t)(hits) << 35 | (uint64_t)(class) << 32 | (stamp))
#define KVP_GHOST_WAYS 4u

static inline bool is_adaptive(const struct pool_map *m)
{
    return m->pool->policy == KVP_POLICY_ADAPTIVE;
}
/* The ghosts among which a key's would be, if it is sampled. */
static inline const uint32_t *ghost_set(const struct pool_map *m, const struct block_entry *entry)
{
    uint32_t sets = m->pool->pages / KVP_GHOST_WAYS != 0 ? m->pool->pages / KVP_GHOST_WAYS : 1;
    return m->ghosts + KVP_GHOST_WAYS * (size_t)((entry->key[1] >> 32) * sets >> 32);
}
/* What publishing or evicting a page will need beside its entry, which is near already. */
static PREFETCHER void prefetch_index(const struct pool_map *m, uint32_t page)
{
    const struct block_entry *entry = &m->entries[page];
    __builtin_prefetch(&m->slots[home_of(m, KEY_TAG(entry->key))], 1);
    if (is_adaptive(m))
        __builtin_prefetch(ghost_set(m, entry), 1);
}

/* A cached page was found by its key; `use` is still as it was. */
void policy_found(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page);
/* A page was published behind `parent` (or KVP_NONE). @return the hits that it starts with */
uint32_t policy_published(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint32_t parent);
/* A page is about to leave. */
void policy_evicted(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page);
/* The word `use` of a page that is let go of now. */
uint64_t policy_cached(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page);
/* Of two cached pages, the one with less leaves first. */
int64_t policy_stays(const struct pool_map *m, uint32_t page);
/* A sequence was opened: of the blocks asked for, the first `found` are known, and taken along. */
enum kvp_status policy_opened(struct kvp_ledger *ledger, const struct pool_map *m, size_t asked, uint32_t found,
                              const uint32_t *pages);
/* So many pages were let go of. */
void policy_released(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t pages);

/* ---- evict.c -------------------------------------------------------------------------------------------------------
 */

/* Whose pages may go: those of `taker` (an index; KVP_TENANTS_MAX: nobody's), and unless `own`, others' above their
 * guaranteed share; all of them, if `forced`. */
struct evict_scope {
    uint32_t taker;
    bool own, forced;
};
/* Free up to n pages; fewer: no more may go, unless it is stuck (KVP_PARKS_MAX). Leaves room for `room_after` stores, or
 * fails with KVP_ELIMIT. */
enum kvp_status evict_pages(struct kvp_ledger *ledger, const struct pool_map *m, struct evict_scope scope, uint32_t n,
                            uint64_t room_after, uint32_t *ret_evicted, bool *ret_stuck);
/* Whether a page is CACHED. */
static inline bool is_cached(const struct pool_map *m, uint32_t page)
{
    return is_used_page(m, page) && PAGE_REFS(m->pages[page]) == 0 && PAGE_PUBLISHED(m->pages[page]) &&
           PAGE_TENANT(m->pages[page]) - 1 < KVP_TENANTS_MAX;
}
/* The last reference of a published page of a tenant (its index) was dropped. At most 5 logged stores. */
enum kvp_status cache_page(struct kvp_ledger *ledger, const struct pool_map *m, struct list_run *run, uint32_t tenant,
                           uint32_t page);
void list_run_end(struct kvp_ledger *ledger, const struct pool_map *m, struct list_run *run);
void list_cut_end(struct kvp_ledger *ledger, const struct pool_map *m, struct list_cut *cut);
/* Published pages found by their keys, one after the other: one more reference each. */
struct page_find {
    struct list_cut cut;
    uint32_t tenant, found; /* not yet counted, of one tenant */
};
enum kvp_status find_page(struct kvp_ledger *ledger, const struct pool_map *m, struct page_find *find, uint32_t page);
void find_end(struct kvp_ledger *ledger, const struct pool_map *m, struct page_find *find);
/* Store the word `use` of a cached page; of another class, it goes to that list's front. */
enum kvp_status relist_page(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint64_t use);

/* ---- tenant.c ------------------------------------------------------------------------------------------------------
 */

/* The place of a tenant by its id; KVP_ENOENT. */
enum kvp_status tenant_index(const struct pool_map *m, uint32_t id, uint32_t *ret_index);
/* The same; made if it has none. */
enum kvp_status tenant_place(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t id, uint32_t *ret_index);

/* ---- digest.c ------------------------------------------------------------------------------------------------------
 */

/* The page is free, of a pool that keeps digests: what its bytes were is of no interest any more. */
void forget_digest(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page);

/* ---- seq.c: slots, keys, lists --------------------------------------------------------------------------------------
 */

/* An OPEN sequence; KVP_ESTALE. */
enum kvp_status find_seq(const struct pool_map *m, struct kvp_seq_id seq, const struct block_seq **ret_seq);
/* KVP_EBUSY: a job is open on it, or its owner is DEAD. */
enum kvp_status seq_changeable(const struct pool_map *m, const struct block_seq *seq);
/* Take a FREE slot, linked nowhere, its words zero but state, generation, version, shrunk. */
enum kvp_status take_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq **ret_seq);
void free_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq);
/* The OPEN sequence of an attachment with that key, or NULL. */
const struct block_seq *find_key(const struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment,
                                 uint64_t key);
/* OPEN a slot from take_slot for an attachment that has no such key. */
void open_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t attachment,
               uint64_t key, bool durable);
/* Put a slot that is in no list among the RETIRING (value not 0) or the RECLAIM. */
void retire_slot(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t attachment,
                 struct kvp_after after);
/* OPEN -> RETIRING or RECLAIM. */
enum kvp_status retire_open(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                            struct kvp_after after);
/* RETIRING -> RECLAIM */
enum kvp_status reclaim_retired(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq);
/* Take a slot out of the list whose head is at `head`. */
enum kvp_status list_remove(struct kvp_ledger *ledger, const struct pool_map *m, const uint32_t *head,
                            const struct block_seq *seq);
void list_push(struct kvp_ledger *ledger, const struct pool_map *m, const uint32_t *head, const struct block_seq *seq);
/* An OPEN sequence waits for no value any more. */
void clear_pending(struct kvp_ledger *ledger, const struct block_seq *seq);
/* The slot of a link (slot + 1); KVP_NONE at the end, and where the link can not be. */
uint32_t linked_slot(const struct pool_map *m, uint32_t link);

/* ---- row.c ---------------------------------------------------------------------------------------------------------
 */

/* Store a row's id; logged if a rollback could need the old one. */
void put_row(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq, uint32_t index,
             uint32_t page);
/* Cut the count of a row's ids. */
void shrink_row(struct kvp_ledger *ledger, const struct block_seq *seq, uint32_t row_pages);
/* The copy that a sequence owes, if it is OPEN; tokens 0: none. */
void owed_copy(const struct pool_map *m, const struct block_seq *seq, struct kvp_page_copy *ret_copy);
/* kvp_seq_observe on a mapped pool. */
enum kvp_status observe_seq(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_seq *seq,
                            uint32_t tokens, bool *ret_changed);

/* ---- region.c ------------------------------------------------------------------------------------------------------
 */

/* An attachment is freed: it has no region mapped any more. At most KVP_REGIONS_MAX stores. */
enum kvp_status regions_unmap(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t attachment);
/* The pool goes, and its regions with it. At most KVP_REGIONS_MAX stores, and two. */
enum kvp_status regions_forget(struct kvp_ledger *ledger, const struct pool_map *m);

/* ---- audit_pool.c --------------------------------------------------------------------------------------------------
 */

struct audit {
    const struct kvp_ledger *ledger;
    void (*report)(void *arg, const char *violation);
    void *arg;
    uint64_t violations;
    uint32_t *job_sequences; /* [KVP_JOBS_MAX] sequences that name the job */
    uint32_t *page_marks;    /* [pages] of the pool at hand */
    uint32_t *page_children; /* [pages] of the pool at hand */
    uint8_t *seq_marks;      /* [max_sequences] of the pool at hand */
    uint32_t *region_names;  /* [AUDIT_NAMES] hash table of the regions found, slot + 1 */
    uint8_t *region_marks;   /* [KVP_REGIONS_MAX] found in its pool's list */
};
#define AUDIT_NAMES (2 * KVP_REGIONS_MAX) /* a power of two */
void audit_report(struct audit *audit, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A pool whose record passed check_pool_record. */
void audit_pool(struct audit *audit, uint32_t slot);
/* region.c: the list of a pool whose record passed check_pool_record; then all records. */
void audit_pool_regions(struct audit *audit, uint32_t pool_slot);
void audit_regions(struct audit *audit);

#endif
