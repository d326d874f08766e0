/**
 * The ledger: all of kvpool's metadata, in one block of memory, safe against a kill at any instruction.
 *
 * It knows pages, the prefix index over them, tenants, sequences with their rows, sessions, attachments, regions, jobs,
 * the outcomes of calls, and nothing of bytes, sockets, time or GPUs. It allocates nothing, starts nothing, and waits for
 * nothing; one thread at a time uses it.
 *
 *   block  (the root part: all before the extents; registered buffers and regions lie between pools and jobs)
 *          ┌──────────────┬──────────┬──────────┬─────────┬──────┬─────────────────┬─────────────────┬───┐
 *          │ header, log  │ sessions │ outcomes │ pools   │ jobs │ extent of pool 0│ extent of pool 3│   │
 *          └──────────────┴──────────┴──────────┴─────────┴──────┴─────────────────┴─────────────────┴───┘
 *   extent ┌────────────┬──────────────────────────────┬─────────┬─────────────┬───────────┬─────────┬────────────┐
 *          │ pages[P]   │ prefix index: entries[P],    │ tenants │ attachments │ sequences │ key     │ rows[S][R] │
 *          │ 8 B        │ slots[2 P], eviction         │         │             │ [S]       │ buckets │            │
 *          └────────────┴──────────────────────────────┴─────────┴─────────────┴───────────┴─────────┴────────────┘
 *
 * The block is sparse: the root part and each pool's extent must be backed by memory before they are used (the caller
 * allocates them; kvp_pool_extent says where and how much). Everything is linked by index; there is no pointer in it.
 *
 * Transactions. Every change happens between kvp_txn_begin and kvp_txn_commit, by aligned 4- and 8-byte stores through
 * one function that first saves the old word to the undo log: entry, then count (release), then word, each behind a
 * signal fence. Commit empties the log. kvp_txn_abort, and recovery after a kill (kvp_ledger_open), restore the words
 * in reverse order; recovery can itself be killed anywhere. So a function that fails inside a transaction needs no
 * care: its caller aborts, and nothing has changed.
 *
 * Reading needs no transaction. Functions take the ledger, then ids, then inputs, then outputs; outputs (ret_) are
 * written on KVP_OK only, reterr_ on failure only. All check their ids: an id out of range or of another generation is
 * KVP_ESTALE (sequences), KVP_ESESSION (sessions) or KVP_ENOENT (pools, attachments, jobs); a DEAD attachment where a
 * LIVE one is needed is KVP_ESESSION; a LOST pool refuses with KVP_ELOST all but letting go. Every function that changes
 * the ledger also returns KVP_ELIMIT when the log has no room for it, and KVP_ECORRUPT when it meets what can not be; it
 * never crashes on that, nor hangs. Lists that a caller walks by first and next are closed where the audit is clean.
 */
#ifndef KVP_LEDGER_H
#define KVP_LEDGER_H

#include "kvp_limits.h"
#include "kvp_status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVP_LEDGER_VERSION 3u
#define KVP_NONE           0xffffffffu /* no slot, no page, no attachment */
#define KVP_TXN_STORES_MAX (1u << 20)  /* logged stores of one transaction; more: KVP_ELIMIT from the operation */

/* ids: {slot, generation}; generation 0 is never given out, so a zeroed id is none */
struct kvp_seq_id {
    uint32_t slot, generation;
};
struct kvp_session_id {
    uint32_t slot, generation;
};
struct kvp_pool_id {
    uint32_t slot, generation;
};
struct kvp_job_id {
    uint32_t slot, generation;
};

/* ---- the block --------------------------------------------------------------------------------------------------- */

/* Private: a pool's record and the addresses of its parts, which layout.h describes. */
struct pool_map {
    const struct block_pool *pool;
    uint32_t slot;
    uint32_t bucket_mask;
    uint32_t slot_count;   /* of the index */
    const uint64_t *pages; /* [pages] block_page */
    const struct block_entry *entries;
    const uint64_t *slots;     /* [slot_count] block_slot */
    const uint32_t *followers; /* [pages] the page + 1 that extended this one last: a hint */
    const uint32_t *ghosts;    /* see policy.c: hints */
    const struct block_policy *policy;
    const uint64_t *digests; /* [pages]; NULL: the pool keeps none; see digest.c */
    const struct block_tenant *tenants;
    const struct block_attachment *attachments;
    const struct block_seq *seqs;
    const uint32_t *buckets;
    const uint32_t *rows;
};

/*
 * A handle on a block. Two addresses of the same memory: reads go through `view`, stores through `store`. In a daemon
 * they are equal; test builds map the block twice and make the view read-only, so that a store that goes around the one
 * function faults.
 */
struct kvp_ledger {
    const unsigned char *view;
    unsigned char *store;
    size_t bytes;
    /* private: the open transaction, mirrored from the log */
    bool in_txn;
    uint32_t txn_stores;
    uint32_t txn_parks;      /* see KVP_PARKS_MAX */
    uint32_t txn_stores_end; /* KVP_TXN_STORES_MAX in a transaction, 0 outside: so one comparison sees to both */
    uint32_t txn_serial;
    /* counts since it was opened: who compares them sees whether anything happened */
    uint64_t changes; /* transactions that changed something */
    uint64_t seals;   /* pages sealed in pools that keep digests, in aborted transactions too */
    /* private: a snapshot under way */
    unsigned char *copy; /* NULL: none */
    uint64_t copied;     /* what is stored below this goes to the copy, too */
    bool copy_stale;
    /* private: where the pools lie, those that there are; others' are never asked for */
    struct pool_map maps[KVP_POOLS_MAX];
};

struct kvp_uuid {
    uint8_t bytes[16];
};

/** Bytes of the root part, which must be backed by zeroed memory before kvp_ledger_format. */
size_t kvp_ledger_root_bytes(void);

/**
 * Make an empty ledger in zeroed memory.
 * @retval KVP_EINVAL  bytes is less than the root part or over KVP_LEDGER_BYTES_MAX, or an address is unaligned (64)
 */
enum kvp_status kvp_ledger_format(struct kvp_ledger *ledger, const unsigned char *view, unsigned char *store,
                                  size_t bytes, struct kvp_uuid instance);

/**
 * Adopt a block that an earlier process left: check it, roll back the open transaction, count the epoch up.
 * @param reterr_why  what is wrong with it, static text
 * @retval KVP_EMISMATCH  another format version or size
 * @retval KVP_ECORRUPT   no ledger, or its header or log can not be
 */
enum kvp_status kvp_ledger_open(struct kvp_ledger *ledger, const unsigned char *view, unsigned char *store,
                                size_t bytes, const char **reterr_why);

struct kvp_uuid kvp_ledger_instance(const struct kvp_ledger *ledger);
uint64_t kvp_ledger_epoch(const struct kvp_ledger *ledger); /* starts at 1 */

/* ---- transactions ------------------------------------------------------------------------------------------------ */

void kvp_txn_begin(struct kvp_ledger *ledger);
void kvp_txn_commit(struct kvp_ledger *ledger);
void kvp_txn_abort(struct kvp_ledger *ledger);

#ifdef KVPOOL_TEST_HOOKS
/* Called before every store to the block (log entries included); a test leaves by longjmp, as a kill would. */
extern void (*kvp_store_hook)(void *arg);
extern void *kvp_store_hook_arg;
#endif

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

enum kvp_session_state {
    KVP_SESSION_FREE = 0,
    KVP_SESSION_OPEN = 1,
    KVP_SESSION_ENDING = 2, /* its connection or lease ended; its attachments are DEAD and not yet all released */
};
enum kvp_session_kind {
    KVP_SESSION_SOCKET = 1, /* lives as long as its process */
    KVP_SESSION_LEASE = 2,
};

struct kvp_session_spec {
    enum kvp_session_kind kind;
    uint32_t uid, gid, pid;
    uint32_t tenant;
    uint32_t lease_ms;         /* of a session by lease */
    uint64_t token[2];         /* secret: the bearer is the session (lease) */
    uint64_t resume_secret[2]; /* secret: its bearer may claim durable sequences */
    uint64_t start_time;       /* of the process, clock ticks since boot: tells a pid from its next user */
    char name[32];
};

struct kvp_session_view {
    struct kvp_session_id id;
    enum kvp_session_state state;
    struct kvp_session_spec spec;
    uint32_t attachments; /* LIVE and DEAD */
};

/** @retval KVP_ELIMIT  KVP_SESSIONS_MAX are open */
enum kvp_status kvp_session_open(struct kvp_ledger *ledger, const struct kvp_session_spec *spec,
                                 struct kvp_session_id *ret_session);
enum kvp_status kvp_session_get(const struct kvp_ledger *ledger, struct kvp_session_id session,
                                struct kvp_session_view *ret_view);
/** The session in a slot, open or ending; KVP_ENOENT: the slot is free. For walking: 0..KVP_SESSIONS_MAX-1. */
enum kvp_status kvp_session_at(const struct kvp_ledger *ledger, uint32_t slot, struct kvp_session_view *ret_view);
/** The open session by lease with this token; KVP_ESESSION: none. Compares in constant time. */
enum kvp_status kvp_session_by_token(const struct kvp_ledger *ledger, const uint64_t token[2],
                                     struct kvp_session_id *ret_session);
/**
 * Its process or lease ended: OPEN -> ENDING; its attachments turn DEAD, which freezes their sequences and quarantines
 * their pages. O(attachments). The session's slot is free when its last attachment is released.
 */
enum kvp_status kvp_session_end(struct kvp_ledger *ledger, struct kvp_session_id session);

/* What a call came to, kept under its call id: the last one of a socket session, the last KVP_OUTCOMES_MAX by lease. */
struct kvp_outcome {
    uint64_t call_id; /* never 0 */
    uint32_t method;
    int32_t status; /* enum kvp_status */
    uint64_t values[2];
};
enum kvp_status kvp_outcome_put(struct kvp_ledger *ledger, struct kvp_session_id session,
                                const struct kvp_outcome *outcome);
/** @retval KVP_ENOENT  no such call is remembered */
enum kvp_status kvp_outcome_get(const struct kvp_ledger *ledger, struct kvp_session_id session, uint64_t call_id,
                                struct kvp_outcome *ret_outcome);

/* ---- pools ------------------------------------------------------------------------------------------------------- */

enum kvp_pool_state {
    KVP_POOL_FREE = 0,
    KVP_POOL_LIVE = 1,
    KVP_POOL_LOST = 2, /* its bytes are gone; nothing but deleting it is possible */
};

struct kvp_pool_geometry {
    uint32_t pages;          /* 1..KVP_PAGES_MAX */
    uint32_t page_tokens;    /* 1..KVP_PAGE_TOKENS_MAX */
    uint32_t reserved_pages; /* < pages; ids 0..reserved_pages-1 are never handed out */
    uint32_t max_sequences;  /* 1..KVP_SEQUENCES_MAX */
    uint32_t row_pages;      /* pages that one sequence may have */
    uint32_t page_digests;   /* 1: with room for a digest of each page's bytes; else 0 */
};

#define KVP_POOL_BLOB_BYTES 49152 /* the packed kvpool.v1.PoolSpec: the ledger keeps it and does not read it */

/* Which cached page leaves first; see evict.c. */
enum kvp_policy {
    KVP_POLICY_ADAPTIVE = 0, /* leaves that were used again stay longer, as long as that pays */
    KVP_POLICY_LRU = 1,      /* the least recently used leaf */
};

/* The prefix cache of a pool. Totals count from the pool's making. */
struct kvp_cache_view {
    enum kvp_policy policy;
    bool zero_on_reuse;
    uint64_t hash_key[2];  /* secret: keys the hash of block keys */
    uint32_t hash;         /* kvpool.v1.BlockHash: the ledger keeps it and does not read it */
    uint32_t published;    /* pages that the index knows */
    uint32_t cached_pages; /* … of these, held by no row: CACHED */
    uint32_t dirty_pages;  /* to be zeroed before use; see kvp_page_cleaned */
    uint32_t pins;
    uint64_t lookup_blocks, hit_blocks; /* asked for by opening sequences, and found */
    uint64_t publishes, evictions;
};

struct kvp_pool_view {
    struct kvp_pool_id id;
    enum kvp_pool_state state;
    bool needs_after; /* CUDA: giving pages up needs a timeline value */
    struct kvp_cache_view cache;
    struct kvp_pool_geometry geometry;
    uint64_t layout_digest[2];
    const char *name; /* in the ledger; valid while the pool is */
    const void *blob;
    uint32_t blob_bytes;
    uint64_t extent_offset, extent_bytes;
    uint32_t free_pages;
    uint32_t open_sequences; /* those of DEAD attachments included */
    uint32_t retiring_sequences;
    uint32_t attachments;
    uint32_t regions;
    uint64_t region_bytes; /* room for them in each slab */
};

struct kvp_pool_spec {
    struct kvp_pool_geometry geometry;
    bool needs_after;
    enum kvp_policy policy;
    bool zero_on_reuse; /* a page that comes to another tenant is dirty first */
    uint64_t hash_key[2];
    uint32_t hash;
    uint64_t layout_digest[2];
    const char *name; /* 1..KVP_NAME_BYTES_MAX bytes, unique */
    const void *blob;
    uint32_t blob_bytes;   /* at most KVP_POOL_BLOB_BYTES */
    uint64_t region_bytes; /* room for regions in each slab, at most KVP_REGION_BYTES_MAX */
};

/**
 * Where the extent of a new pool would lie. The caller backs that range with zeroed memory, then calls kvp_pool_create
 * with the same geometry and no other create in between.
 * @retval KVP_ELIMIT  no slot, or no room in the block
 */
enum kvp_status kvp_pool_extent(const struct kvp_ledger *ledger, const struct kvp_pool_geometry *geometry,
                                uint64_t *ret_offset, uint64_t *ret_bytes);
/** The id that the next kvp_pool_create gives. @retval KVP_ELIMIT  no slot is free */
enum kvp_status kvp_pool_next_id(const struct kvp_ledger *ledger, struct kvp_pool_id *ret_pool);
/** O(1) in pages. @retval KVP_EEXIST  the name is taken */
enum kvp_status kvp_pool_create(struct kvp_ledger *ledger, const struct kvp_pool_spec *spec,
                                struct kvp_pool_id *ret_pool);
/**
 * Its slot and its place are the next kvp_pool_create's, in a later transaction.
 * @retval KVP_EBUSY  attachments, sequences, retiring pages or open jobs are there; or regions, of a LIVE pool
 */
enum kvp_status kvp_pool_delete(struct kvp_ledger *ledger, struct kvp_pool_id pool);
enum kvp_status kvp_pool_set_lost(struct kvp_ledger *ledger, struct kvp_pool_id pool);
/** @retval KVP_ELOST  it is there, and not LIVE */
enum kvp_status kvp_pool_live(const struct kvp_ledger *ledger, struct kvp_pool_id pool);
enum kvp_status kvp_pool_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_pool_view *ret_view);
enum kvp_status kvp_pool_at(const struct kvp_ledger *ledger, uint32_t slot, struct kvp_pool_view *ret_view);
enum kvp_status kvp_pool_by_name(const struct kvp_ledger *ledger, const char *name, struct kvp_pool_id *ret_pool);

/* ---- tenants of a pool ------------------------------------------------------------------------------------------- */

/*
 * Who pays for a page: the tenant of the session that took it, from then until the page is free. A session's tenant gets
 * its place in the pool with the first attachment, and keeps it as long as the pool is there: free pages remember whose
 * bytes they hold.
 */
struct kvp_tenant_view {
    uint32_t id;    /* as in struct kvp_session_spec */
    uint32_t pages; /* held, sealed or cached */
    uint32_t cached_pages;
    uint32_t quota_pages;      /* of `pages`, at most; 0: no limit */
    uint32_t guaranteed_pages; /* others evict none of its pages when it has no more than these */
};
/**
 * Set a tenant's share. What it has over its quota stays; it gets no more.
 * @retval KVP_EINVAL  the guaranteed shares of all tenants are more than the pool has pages, or more than the quota
 * @retval KVP_ELIMIT  KVP_TENANTS_MAX are there
 */
enum kvp_status kvp_tenant_set(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t id, uint32_t quota_pages,
                               uint32_t guaranteed_pages);
/** For walking: 0..KVP_TENANTS_MAX-1. KVP_ENOENT: nothing is there */
enum kvp_status kvp_tenant_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t index,
                              struct kvp_tenant_view *ret_view);

/* ---- attachments: a session in a pool ---------------------------------------------------------------------------- */

enum kvp_attachment_state {
    KVP_ATTACHMENT_FREE = 0,
    KVP_ATTACHMENT_LIVE = 1,
    KVP_ATTACHMENT_DEAD = 2, /* its process ended, or may have: its sequences' pages are quarantined */
};

struct kvp_attachment_view {
    enum kvp_attachment_state state;
    struct kvp_session_id session;
    uint32_t leader;    /* the attachment whose group it joined; itself, if none */
    uint32_t sequences; /* owned */
    bool nvml_seen;     /* NVML listed its process while it lived */
    uint32_t lacking;   /* ranks that left the group it leads, and in whose place none has joined */
};

/**
 * @param join  KVP_NONE, or the LIVE attachment whose group it joins: `written` is the least of a group's words
 * @retval KVP_EEXIST  the session is attached to that pool
 * @retval KVP_ELIMIT  KVP_ATTACHMENTS_MAX are there, or KVP_TENANTS_MAX and its tenant is another one
 */
enum kvp_status kvp_attach(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_session_id session,
                           uint32_t join, uint32_t *ret_attachment);
/** @retval KVP_EBUSY  it owns sequences, rows that wait for its timelines retire, or others joined it */
enum kvp_status kvp_detach(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment);
enum kvp_status kvp_attachment_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                                   struct kvp_attachment_view *ret_view);
/** The session's attachment in the pool; KVP_ENOENT: none. O(attachments). */
enum kvp_status kvp_attachment_of(const struct kvp_ledger *ledger, struct kvp_pool_id pool,
                                  struct kvp_session_id session, uint32_t *ret_attachment);
enum kvp_status kvp_attachment_set_nvml_seen(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment);
/**
 * Nothing writes for a DEAD attachment any more (its process is gone, its GPU work over): move up to `budget` of its
 * sequences from quarantine to reclaim; when none is left, free the attachment, and with the last one its session.
 * Durable ones stay (and keep the attachment DEAD) unless `with_durable`. Sequences with a job open stay until it ends.
 * Rows that wait for its timelines are reclaimed too, within the budget. Who joined its group then stands alone.
 * @param ret_left   sequences still owned, of those that are to go, and rows still retiring
 * @retval KVP_EBUSY  it is LIVE
 */
enum kvp_status kvp_attachment_release(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                                       bool with_durable, uint32_t budget, uint32_t *ret_left);

/* ---- sequences --------------------------------------------------------------------------------------------------- */

enum kvp_seq_state {
    KVP_SEQ_FREE = 0,
    KVP_SEQ_OPEN = 1,     /* of a DEAD attachment: frozen, its pages in quarantine */
    KVP_SEQ_RETIRING = 2, /* given up; pages return when its `after` is reached */
    KVP_SEQ_RECLAIM = 3,  /* given up; pages return as kvp_pool_reclaim comes to it */
    KVP_SEQ_PIN = 4,      /* a pin: holds a prefix, is nobody's sequence; see kvp_pin */
};

struct kvp_after {
    uint32_t timeline;
    uint64_t value; /* 0: nothing to wait for */
};

struct kvp_page_copy {
    uint32_t source, destination; /* page ids */
    uint32_t tokens;              /* the first of the page; 0: no copy */
};

struct kvp_seq_view {
    struct kvp_seq_id id;
    enum kvp_seq_state state;
    uint64_t key;
    uint32_t attachment; /* owner */
    bool durable;
    uint32_t reserved, written; /* tokens; of OPEN ones */
    uint32_t version;           /* of the row: even; moves by 2 on open, truncate, transfer */
    uint32_t row_pages;         /* ids in the row */
    uint32_t keyed;             /* its first pages, which have block keys */
    uint32_t job;               /* slot of the open job, or KVP_NONE */
    uint32_t job_tokens;        /* what `written` will be when it is done */
    struct kvp_after after;     /* RETIRING: waits for; OPEN: see pending */
    uint32_t pending_tokens;    /* OPEN: `written` when `after` is reached (a transfer under way), or 0 */
    struct kvp_page_copy copy;  /* owed */
};

/**
 * Make a sequence, empty. @retval KVP_EEXIST  that key is open in this attachment (find it by kvp_seq_by_key)
 * @retval KVP_ELIMIT  max_sequences rows are in use, retiring ones included
 */
enum kvp_status kvp_seq_open(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment, uint64_t key,
                             bool durable, struct kvp_seq_id *ret_seq);
enum kvp_status kvp_seq_by_key(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                               uint64_t key, struct kvp_seq_id *ret_seq);
/** An OPEN sequence. @retval KVP_ESTALE  the generation is not current, or it was closed */
enum kvp_status kvp_seq_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                            struct kvp_seq_view *ret_view);
/** Whatever sequence is in a slot, in any state but FREE (KVP_ENOENT, for a pin too). For walking: 0..max_sequences-1. */
enum kvp_status kvp_seq_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot,
                           struct kvp_seq_view *ret_view);
/** The row: page ids [row_pages], in the ledger, valid until the next change. */
const uint32_t *kvp_seq_row(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot);
/** First and next OPEN sequence of an attachment by slot, KVP_NONE at the end. */
uint32_t kvp_attachment_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment);
uint32_t kvp_attachment_next(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot);

/**
 * Set how many tokens there is room for. Grows the row by free pages, CACHED ones evicted when they do not suffice, or
 * with `truncate` cuts it; `written` falls to
 * `reserved` when that is less, and the version moves with every cut (so that an older progress word can't count later).
 * The same as now does nothing.
 *
 * A cut into the middle of a page that others hold too, or that is sealed, takes a fresh page and owes the copy of the
 * part kept. Pages cut off go back when `after` is reached: on a needs_after pool, or when more than
 * KVP_RECLAIM_SLICE of them, they move to a row of their own that retires.
 *
 * @param after         of a truncation, on a needs_after pool: value must not be 0 (KVP_EINVAL), unless no page leaves
 * @param reterr_short  with KVP_ENOPAGES: how many pages are missing
 * @retval KVP_EINVAL   over the pool's limit, or less than now without truncate
 * @retval KVP_EBUSY    a job is open on it, or its owner is DEAD
 * @retval KVP_EAGAIN   eviction met more pages that others extend than one transaction passes over: after the abort,
 *                      kvp_cache_park, and again. So from whatever takes pages.
 */
enum kvp_status kvp_seq_reserve(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                uint32_t reserved, bool truncate, struct kvp_after after, uint32_t *reterr_short);
#define KVP_RECLAIM_SLICE 1024u

/**
 * Bytes of tokens up to `tokens` were seen to be there: raise `written` (never lowers; clamped to `reserved`), seal the
 * pages that are full by it, and forget the owed copy once `written` is past it. Allowed for a DEAD owner too. Goes as
 * far as the log has room for seals; the next call goes on.
 * @param ret_changed  whether anything did
 */
enum kvp_status kvp_seq_observe(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                uint32_t tokens, bool *ret_changed);

/**
 * `written` will be `tokens` when `after` is reached; the caller watches and observes. Forgotten when `written` gets
 * there, or a cut goes below it.
 * @retval KVP_EINVAL  after.value is 0, or tokens is over `reserved`
 * @retval KVP_EBUSY   a job is open on it, or its owner is DEAD
 */
enum kvp_status kvp_seq_set_pending(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                    uint32_t tokens, struct kvp_after after);
/** Forget it: the value will not come. Whoever owns it, dead or alive, and whatever job is open. */
enum kvp_status kvp_seq_end_pending(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq);

/**
 * A child with the first `tokens` of the parent: full pages shared, and for a part of a page a fresh page and an owed
 * copy. The source of an owed copy is held by it, whatever its owner does. Durable, as a durable parent of the same
 * attachment is.
 * @param attachment  the child's owner
 * The child starts with `tokens` written and reserved; its copy is settled when its `written` rises above that.
 * @retval KVP_EINVAL  tokens is over the parent's `written`
 * @retval KVP_EEXIST  that key is open in this attachment
 */
enum kvp_status kvp_seq_fork(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id parent,
                             uint32_t attachment, uint64_t key, uint32_t tokens, struct kvp_seq_id *ret_child,
                             uint32_t *reterr_short);

/**
 * Hand an OPEN sequence to another attachment, LIVE or (a claim) from a DEAD one to a LIVE one; the version moves. To
 * the one that has it: nothing happens.
 * @retval KVP_EEXIST  that key is open there
 * @retval KVP_EBUSY   a job is open on it
 */
enum kvp_status kvp_seq_transfer(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                 uint32_t to_attachment);

/**
 * Give up: OPEN -> RETIRING (`after.value` not 0) or RECLAIM. On a needs_after pool a value is required if it has pages.
 * @retval KVP_EBUSY  a job is open on it, or its owner is DEAD
 */
enum kvp_status kvp_seq_close(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                              struct kvp_after after);

/** First and next RETIRING slot of a pool, KVP_NONE at the end; and: its value was reached, so it may be reclaimed. */
uint32_t kvp_retiring_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool);
uint32_t kvp_retiring_next(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot);
enum kvp_status kvp_seq_retired(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot);

/** Drop up to `budget` page references of RECLAIM rows; frees pages and, when a row is empty, its slot. */
enum kvp_status kvp_pool_reclaim(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t budget, bool *ret_more);

/* ---- pages ------------------------------------------------------------------------------------------------------- */

enum kvp_page_state {
    KVP_PAGE_FREE = 0,
    KVP_PAGE_HELD = 1,     /* one row's, writable by its owner */
    KVP_PAGE_SEALED = 2,   /* full and observed to be written; immutable */
    KVP_PAGE_RESERVED = 3, /* never handed out */
    KVP_PAGE_CACHED = 4,   /* sealed, in no row, known to the prefix index */
};
struct kvp_page_view {
    enum kvp_page_state state;
    uint32_t references; /* by rows, pins and owed copies */
    uint32_t tenant;     /* index (kvp_tenant_at) of who has it, or had it last; KVP_NONE: nobody ever had it */
    bool dirty;          /* holds another tenant's bytes, and must be zeroed before it is used */
};
/** @retval KVP_EINVAL  no such page */
enum kvp_status kvp_page_get(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page,
                             struct kvp_page_view *ret_view);
/** A dirty page was zeroed. One that is not dirty: nothing happens. @retval KVP_EINVAL  no such page, or a free one */
enum kvp_status kvp_page_cleaned(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page);

/* ---- page digests ------------------------------------------------------------------------------------------------ */

/*
 * Of the bytes of a sealed page, in pools that have room for it: taken once, by whoever can read them, and compared when
 * somebody asks. A page's digest ends with its life, so that none is ever compared with another life's bytes; and so that
 * none is kept that was taken of an earlier life's, the taker first leaves his mark on the page: see digest.c.
 */
#define KVP_DIGEST_BIT (1ull << 63) /* set in a digest, clear in a mark; a mark is not 0 */

/**
 * Look for sealed pages with a digest, or without one.
 * @param cursor     in: where to start, 0 at first; out: where to go on, the pool's pages at the end
 * @param looks      at so many pages at most
 * @param room       of the outputs; it ends when they are full
 * @param ret_words  their digests; NULL: pages without one are looked for
 * @retval KVP_ENOENT  the pool is not there or keeps none
 */
enum kvp_status kvp_digest_scan(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t *cursor,
                                uint32_t looks, uint32_t room, uint32_t *ret_pages, uint64_t *ret_words,
                                uint32_t *ret_n);
/** A digest of these pages, sealed and without one, is being taken. @retval KVP_EINVAL  one is not so */
enum kvp_status kvp_digest_begin(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t n, const uint32_t *pages,
                                 uint64_t mark);
/** It was taken: kept for each page that still has that mark. */
enum kvp_status kvp_digest_put(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t n, const uint32_t *pages,
                               uint64_t mark, const uint64_t *digests);
/** The digest or mark of a page; 0: none. */
uint64_t kvp_digest_of(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page);

/* ---- the prefix cache -------------------------------------------------------------------------------------------- */

/*
 * A block is the tokens of one full page; its key stands for them *and all before them*. Whoever makes keys makes them
 * by a hash: the index takes their bits as evenly spread. {0, 0} is no key.
 */
struct kvp_block_key {
    uint64_t word[2];
};

/**
 * How many of the first keys' blocks are known to the index, up to the first that is not. Changes nothing.
 * @param tenant  id of the tenant who asks: others' pages are no match
 * @param ret_pages  [n] their pages, or NULL
 */
enum kvp_status kvp_cache_match(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                                const struct kvp_block_key *keys, size_t *ret_blocks, uint32_t *ret_pages);
/**
 * kvp_seq_open, and take the longest known prefix along: the row starts with those pages, `reserved` and `written` with
 * their tokens. As many as the row and the log have room for.
 * @param ret_blocks  how many of the keys' blocks those are
 */
enum kvp_status kvp_seq_open_cached(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t attachment,
                                    uint64_t key, bool durable, size_t n, const struct kvp_block_key *keys,
                                    struct kvp_seq_id *ret_seq, size_t *ret_blocks);
/**
 * The blocks of pages [first, first + n) of a row have these keys. A page is published as soon as it is sealed and has a
 * key, unless another page is known by it: then that one stays, and this one is freed when its rows let go of it.
 * Keys that are there already are compared.
 * @param reterr_block  with KVP_EMISMATCH and KVP_EINVAL: the index of the key that failed
 * @retval KVP_EINVAL     first is over `keyed`; a page is not wholly within `reserved`; or a key is {0, 0}
 * @retval KVP_EMISMATCH  a page has another key
 * @retval KVP_EBUSY      its owner is DEAD
 */
enum kvp_status kvp_seq_set_keys(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                 uint32_t first, size_t n, const struct kvp_block_key *keys, size_t *reterr_block);
/** The key of a page of a row. @retval KVP_ENOENT  block is not below `keyed` */
enum kvp_status kvp_seq_block_key(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id seq,
                                  uint32_t block, struct kvp_block_key *ret_key);

/**
 * Free up to n CACHED pages, in the order in which the policy would.
 * @param tenant       only pages of the tenant of that id; KVP_NONE: of all, guaranteed shares included
 * @param ret_evicted  how many; less than n: there are no more that nothing extends, or the transaction is full (ret_more)
 */
enum kvp_status kvp_cache_evict(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, uint32_t n,
                                uint32_t *ret_evicted, bool *ret_more);
/**
 * Pass over pages that would be next but for what extends them, KVP_PARKS_MAX at most.
 * @param ret_parked  how many; 0: none stands in the way
 */
enum kvp_status kvp_cache_park(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t *ret_parked);
#define KVP_PARKS_MAX 16384u
/** Free the blocks of this prefix from its last one on, up to the first that is held, or extended by another. */
enum kvp_status kvp_cache_evict_prefix(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                                       const struct kvp_block_key *keys, uint32_t *ret_evicted);

/* What the index knows of a page. */
struct kvp_cache_entry {
    uint32_t page;
    struct kvp_block_key key;
    uint32_t parent;     /* page of the block before it; KVP_NONE: it is a first block */
    uint32_t children;   /* known blocks that extend it */
    uint32_t references; /* 0: CACHED */
    uint32_t tenant;     /* id */
    uint32_t hits;       /* times it was found, as far as they are counted */
    uint32_t age;        /* lookups since it was let go of; 0 while it is held */
};
/** For walking: 0..pages-1. @retval KVP_ENOENT  the index does not know that page */
enum kvp_status kvp_cache_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t page,
                             struct kvp_cache_entry *ret_entry);

/*
 * A pin holds the pages of a prefix, as a row does, until it is ended; it takes a sequence's slot. The ledger keeps its
 * lease and does not watch it.
 */
struct kvp_pin_view {
    struct kvp_seq_id id;
    uint32_t tenant; /* id */
    uint32_t lease_ms;
    uint32_t blocks;
};
/**
 * Pin the whole of a prefix; one that is pinned gets the new lease.
 * @param ret_blocks  of the pin; with KVP_ENOENT how many of the first blocks are known
 * @retval KVP_ENOENT  not all of the blocks are known
 * @retval KVP_ELIMIT  KVP_PINS_MAX pins are there, all rows are in use, or the prefix is longer than a row
 */
enum kvp_status kvp_pin(struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                        const struct kvp_block_key *keys, uint32_t lease_ms, struct kvp_seq_id *ret_pin,
                        size_t *ret_blocks);
/** The pin of exactly this prefix. @retval KVP_ENOENT  there is none */
enum kvp_status kvp_pin_find(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t tenant, size_t n,
                             const struct kvp_block_key *keys, struct kvp_seq_id *ret_pin);
/** Its pages go back as kvp_pool_reclaim comes to it. @retval KVP_ESTALE  no such pin */
enum kvp_status kvp_pin_end(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct kvp_seq_id pin);
/** First and next pin's slot, KVP_NONE at the end. */
uint32_t kvp_pin_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool);
uint32_t kvp_pin_next(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot);
enum kvp_status kvp_pin_at(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t slot,
                           struct kvp_pin_view *ret_view);

/* ---- regions: named ranges of bytes in a pool's slabs ------------------------------------------------------------ */

struct kvp_region_spec {
    const char *name; /* 1..KVP_NAME_BYTES_MAX bytes, unique in a rank's slab */
    uint32_t rank;    /* whose slab, 0..KVP_GPUS_MAX-1 */
    uint32_t tenant;
    uint64_t bytes;
    uint64_t align; /* of the offset; a power of two */
};
struct kvp_region_view {
    struct kvp_pool_id pool;
    const char *name; /* in the ledger; valid while the region is */
    uint32_t rank, tenant;
    uint64_t offset, bytes; /* in the slab's room for regions */
    uint32_t mapped;        /* attachments that have it mapped, DEAD ones included */
};

/**
 * Make a region, at the first place with room for it. Nobody has it mapped; it stays until it is dropped.
 * @param reterr_missing  with KVP_ELIMIT: bytes that the largest gap lacks; 0: KVP_REGIONS_MAX are there
 * @retval KVP_EINVAL  name, rank, bytes or align can not be
 * @retval KVP_EEXIST  that rank's slab has one of that name
 */
enum kvp_status kvp_region_make(struct kvp_ledger *ledger, struct kvp_pool_id pool, const struct kvp_region_spec *spec,
                                uint32_t *ret_region, uint64_t *reterr_missing);
/** @retval KVP_ENOENT  there is none of that name in that rank's slab */
enum kvp_status kvp_region_find(const struct kvp_ledger *ledger, struct kvp_pool_id pool, uint32_t rank,
                                const char *name, uint32_t *ret_region);
/** @retval KVP_ENOENT  there is none in that slot */
enum kvp_status kvp_region_get(const struct kvp_ledger *ledger, uint32_t region, struct kvp_region_view *ret_view);
/** First and next region of a pool, by rank and offset; KVP_NONE at the end. */
uint32_t kvp_region_first(const struct kvp_ledger *ledger, struct kvp_pool_id pool);
uint32_t kvp_region_next(const struct kvp_ledger *ledger, uint32_t region);
/** Whether that attachment has it mapped. */
bool kvp_region_mapped_by(const struct kvp_ledger *ledger, uint32_t region, uint32_t attachment);
/** A LIVE attachment has it mapped from now on, until it unmaps it or is freed. */
enum kvp_status kvp_region_map(struct kvp_ledger *ledger, uint32_t region, uint32_t attachment);
/** … has it mapped no more, if it had. */
enum kvp_status kvp_region_unmap(struct kvp_ledger *ledger, uint32_t region, uint32_t attachment);
/** Give its range up. @retval KVP_EBUSY  an attachment has it mapped */
enum kvp_status kvp_region_drop(struct kvp_ledger *ledger, uint32_t region);

/* ---- buffers: memory that sessions registered -------------------------------------------------------------------- */

struct kvp_buffer_view {
    struct kvp_session_id session;
    uint32_t number; /* 1..KVP_BUFFERS_MAX */
    uint64_t bytes, offset;
    char device[64]; /* terminated */
    bool has_ipc;
    unsigned char ipc[64]; /* a cudaIpcMemHandle_t */
};

/**
 * Remember a buffer; its session's end forgets it.
 * @retval KVP_EINVAL  the number is out of range, or the device's name is not terminated
 * @retval KVP_EEXIST  the session has one of that number
 * @retval KVP_ELIMIT  KVP_BUFFERS_ALL_MAX are registered
 */
enum kvp_status kvp_buffer_put(struct kvp_ledger *ledger, const struct kvp_buffer_view *buffer);
/** @retval KVP_ENOENT  the session has none of that number */
enum kvp_status kvp_buffer_remove(struct kvp_ledger *ledger, struct kvp_session_id session, uint32_t number);
enum kvp_status kvp_buffer_get(const struct kvp_ledger *ledger, struct kvp_session_id session, uint32_t number,
                               struct kvp_buffer_view *ret_view);
/** For walking: 0..KVP_BUFFERS_ALL_MAX-1. KVP_ENOENT: nothing is there */
enum kvp_status kvp_buffer_at(const struct kvp_ledger *ledger, uint32_t index, struct kvp_buffer_view *ret_view);

/* ---- jobs: work that an executor has in hand --------------------------------------------------------------------- */

struct kvp_job_spec {
    uint32_t kind;                 /* kvpool.v1.JobKind */
    struct kvp_session_id session; /* whose stream; may end while the job runs */
    struct kvp_pool_id pool;
    uint64_t call_id;
    uint32_t timeline; /* done is told there … */
    uint64_t value;    /* … by this */
};
struct kvp_job_view {
    struct kvp_job_id id;
    struct kvp_job_spec spec;
};
/** A session or pool of generation 0 is none. @retval KVP_ELIMIT  KVP_JOBS_MAX are open */
enum kvp_status kvp_job_open(struct kvp_ledger *ledger, const struct kvp_job_spec *spec, struct kvp_job_id *ret_job);
/**
 * The sequence waits for the job, and will then have `tokens` written.
 * @retval KVP_EINVAL  tokens is less than `written`, or over `reserved`
 * @retval KVP_EBUSY   it has one, or its owner is DEAD
 * @retval KVP_ELIMIT  the job has KVP_BATCH_MAX sequences, or is to fill more than KVP_CALL_PAGES_MAX pages
 */
enum kvp_status kvp_job_add(struct kvp_ledger *ledger, struct kvp_job_id job, struct kvp_seq_id seq, uint32_t tokens);
enum kvp_status kvp_job_get(const struct kvp_ledger *ledger, struct kvp_job_id job, struct kvp_job_view *ret_view);
enum kvp_status kvp_job_at(const struct kvp_ledger *ledger, uint32_t slot, struct kvp_job_view *ret_view);
/** First and next sequence slot (of the job's pool) that waits for it, in the order of adding; KVP_NONE at the end. */
uint32_t kvp_job_first(const struct kvp_ledger *ledger, struct kvp_job_id job);
uint32_t kvp_job_next(const struct kvp_ledger *ledger, struct kvp_job_id job, uint32_t slot);
/** The job is over: with `written`, its sequences have their tokens; without, they stay as they were. */
enum kvp_status kvp_job_close(struct kvp_ledger *ledger, struct kvp_job_id job, bool written);

/* ---- snapshots ---------------------------------------------------------------------------------------------------- */

/*
 * A copy of the ledger as it is at one moment, taken in slices while transactions go on between them: what is stored into
 * the part copied so far is stored into the copy as well. So when all of it is copied, the copy is the ledger as it is
 * then; see snapshot.c. Holes of the block are not copied, nor what is dead in rows.
 */

/**
 * Begin; one that is under way is given up. Outside a transaction, as kvp_snapshot_step.
 * @param memory  as many bytes as the block has, zeroed; only the first kvp_snapshot_bytes are stored to. Untouched after
 *                the snapshot is taken or given up
 */
void kvp_snapshot_begin(struct kvp_ledger *ledger, unsigned char *memory);
/** The bytes up to the end of the last pool's extent. */
size_t kvp_snapshot_bytes(const struct kvp_ledger *ledger);
/**
 * Copy the next `budget` bytes, or somewhat more.
 * @param ret_taken     all is copied: the snapshot is taken, and the ledger is done with its memory
 * @param ret_snapshot  written then: a ledger to read, by any thread; a store to it faults
 * @retval KVP_EAGAIN  a pool was made meanwhile, and the snapshot is given up: begin again, in memory that is zeroed
 */
enum kvp_status kvp_snapshot_step(struct kvp_ledger *ledger, size_t budget, bool *ret_taken,
                                  struct kvp_ledger *ret_snapshot);
void kvp_snapshot_give_up(struct kvp_ledger *ledger);

/* ---- audit ------------------------------------------------------------------------------------------------------- */

/** Bytes of scratch memory that kvp_audit needs for this ledger now. */
size_t kvp_audit_scratch_bytes(const struct kvp_ledger *ledger);

/**
 * Walk all of it and name each violation: every list is closed and counted, every page's references are those that
 * rows and owed copies hold, every free page is on the free list once, every row is within bounds, keys are found by
 * their buckets, published pages by their block keys, cached ones in one eviction list, what is counted for each tenant
 * is there, regions lie apart and within bounds, jobs and their sequences agree, the log is empty.
 *
 * @param scratch  kvp_audit_scratch_bytes, aligned to 8; the only memory it writes
 * @param report   called once a violation, with a text that names what and where; may be NULL
 * @return the number of violations
 */
uint64_t kvp_audit(const struct kvp_ledger *ledger, void *scratch, void (*report)(void *arg, const char *violation),
                   void *arg);

#endif
