/**
 * The naive ledger: what the allocator should do, written as plainly as possible, and random programs for both.
 *
 * struct naive_state is all that the public functions show of a small pool: read from a ledger by naive_read, kept by
 * the model in plain arrays, and compared byte for byte. References are recounted, never updated. Which free slot or
 * page is taken is the allocator's choice: the model takes it over after checking that it was free.
 *
 * An operation is a value (struct naive_op), so that a crash test can run the same ones again on a copy.
 */
#ifndef LEDGER_NAIVE_H
#define LEDGER_NAIVE_H

#include "kvp_ledger.h"

#define NAIVE_SESSIONS    5
#define NAIVE_ATTACHMENTS 6
#define NAIVE_SEQS        12
#define NAIVE_PAGES       48
#define NAIVE_ROW         10
#define NAIVE_JOBS        3
#define NAIVE_CALLS       6 /* call ids 1.. */
#define NAIVE_TENANTS     3 /* of ids NAIVE_TENANT_ID.. */
#define NAIVE_TENANT_ID   100
#define NAIVE_STORIES     4 /* what sequences say: story s has its first s blocks in common with story 0 */
#define NAIVE_REGIONS     6 /* names */
#define NAIVE_RANKS       2
#define NAIVE_DIGEST_FIRST 1000 /* no mark is as large */

struct naive_session {
    uint32_t state, generation, kind, attachments, tenant;
    uint32_t outcomes[NAIVE_CALLS]; /* values[0] of the outcome kept for each call id, 0: none */
};

struct naive_attachment {
    uint32_t state, session_slot, session_generation, leader, sequences, nvml_seen;
};

struct naive_seq {
    uint32_t state, generation, key, attachment, durable, reserved, written, version, row_pages, job, job_tokens;
    uint32_t timeline, value, pending, copy_source, copy_destination, copy_tokens;
    uint32_t listed;    /* found by its attachment's or the retiring list */
    uint32_t found_key; /* found by its key */
    uint32_t row[NAIVE_ROW];
    uint32_t keyed;
    uint32_t keys[NAIVE_ROW]; /* as naive_code */
};

struct naive_page {
    uint32_t state, references;
    uint32_t tenant; /* index + 1 of who has it or had it last */
    uint32_t dirty;
    uint32_t published, key, parent, children, hits, age; /* as the index shows it; parent + 1 */
    uint32_t digest; /* or mark; 0: none */
};

struct naive_tenant {
    uint32_t id, pages, cached, quota, guaranteed;
};

struct naive_job {
    uint32_t open, generation, sequences;
    uint32_t slots[NAIVE_SEQS];
};

struct naive_region {
    uint32_t used, name, rank, tenant, offset, bytes;
    uint32_t mapped; /* a bit an attachment */
    uint32_t listed; /* found by its pool's list */
};

struct naive_state {
    struct naive_session sessions[NAIVE_SESSIONS];
    struct naive_attachment attachments[NAIVE_ATTACHMENTS];
    struct naive_seq seqs[NAIVE_SEQS];
    struct naive_page pages[NAIVE_PAGES];
    struct naive_tenant tenants[NAIVE_TENANTS]; /* by index */
    struct naive_job jobs[NAIVE_JOBS];
    struct naive_region regions[NAIVE_REGIONS * NAIVE_RANKS];
    uint32_t free_pages, open_sequences, retiring_sequences, attached, n_regions;
    uint32_t cached, published, dirty, pins, lookups, hits, evictions;
    uint32_t matches[NAIVE_TENANTS][NAIVE_STORIES]; /* blocks that the tenant of that id finds of a story */
};

struct naive {
    struct kvp_pool_id pool;
    struct kvp_pool_geometry geometry;
    bool needs_after;
    uint32_t region_bytes;
    struct naive_state state;
    /* what the functions do not show */
    uint32_t session_generations[NAIVE_SESSIONS], seq_generations[NAIVE_SEQS], seq_versions[NAIVE_SEQS];
    uint32_t job_generations[NAIVE_JOBS];
    uint32_t held[NAIVE_SEQS]; /* page + 1 that a given-up row holds for a copy it owed */
    bool sealed[NAIVE_PAGES];
    bool zero_on_reuse;
    bool adaptive; /* then hits are what the policy makes of them */
    uint32_t tick;
    uint32_t keys[NAIVE_PAGES]; /* of keyed pages, published or not; 0: none */
    uint32_t stamps[NAIVE_PAGES];
};

enum naive_kind {
    NAIVE_SESSION_OPEN,
    NAIVE_SESSION_END,
    NAIVE_ATTACH,
    NAIVE_DETACH,
    NAIVE_OUTCOME,
    NAIVE_OPEN,
    NAIVE_RESERVE,
    NAIVE_OBSERVE,
    NAIVE_PENDING,
    NAIVE_FORK,
    NAIVE_TRANSFER,
    NAIVE_CLOSE,
    NAIVE_RETIRED,
    NAIVE_RECLAIM,
    NAIVE_RELEASE,
    NAIVE_JOB_OPEN,
    NAIVE_JOB_ADD,
    NAIVE_JOB_CLOSE,
    NAIVE_REGION_MAKE,
    NAIVE_REGION_MAP,
    NAIVE_REGION_UNMAP,
    NAIVE_REGION_DROP,
    NAIVE_MARK,        /* of `page`, by `call` */
    NAIVE_DIGEST,      /* … is `tokens` */
    NAIVE_OPEN_CACHED, /* from here on: the prefix cache */
    NAIVE_SET_KEYS,
    NAIVE_PIN,
    NAIVE_UNPIN,
    NAIVE_EVICT,
    NAIVE_EVICT_PREFIX,
    NAIVE_CLEANED,
    NAIVE_SHARE,
    NAIVE_KINDS
};

struct naive_op {
    enum naive_kind kind;
    struct kvp_session_id session;
    uint32_t session_kind;
    uint32_t attachment; /* join, owner, target */
    struct kvp_seq_id seq;
    struct kvp_job_id job;
    uint32_t key, tokens, budget, call;
    uint32_t tenant;         /* id; KVP_NONE: all */
    uint32_t story, keys_of; /* a story, and the id of the tenant whose keys are given */
    uint32_t first, blocks, page;
    bool flag;       /* durable, truncate, with_durable, written */
    uint32_t region; /* slot */
    uint32_t name, rank, bytes, align;
    struct kvp_after after;
    /* what the ledger answered */
    uint32_t ret_slot, ret_short, ret_left;
    bool ret_flag;
};

/* A random shape, a pool of it (named "p") made in the ledger and committed, and the model of that. */
void naive_start(struct naive *naive, struct kvp_ledger *ledger, uint64_t *rng);
uint32_t naive_random(uint64_t *rng, uint32_t below);

/* A random operation, most often one that should succeed. */
struct naive_op naive_choose(const struct naive *naive, uint64_t *rng);
/* Do it to the ledger, in the open transaction. */
enum kvp_status naive_run(struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_op *op);
/* What the ledger should answer. */
enum kvp_status naive_expect(const struct naive *naive, const struct naive_op *op);
/* Do it to the model, after it succeeded on the ledger; choices are taken over from `now`. */
void naive_apply(struct naive *naive, const struct naive_op *op, const struct naive_state *now);

/* A transaction of a random program. */
#define NAIVE_OPS_MAX 3
struct naive_transaction {
    struct naive_op ops[NAIVE_OPS_MAX];
    uint32_t n;
    bool aborts;
};

/* Choose one, and run it on the ledger beside the model; one of 1 + `commits` is aborted although it could commit. */
struct naive_transaction naive_transact(struct naive *naive, struct kvp_ledger *ledger, uint32_t commits,
                                        uint64_t *rng);
/* Run it again, on the ledger alone. */
void naive_transact_again(struct kvp_ledger *ledger, struct kvp_pool_id pool,
                          const struct naive_transaction *transaction);

/* ---- naive_cache.c: tenants, the prefix index, eviction ---------------------------------------------------------- */

/* What a block of a story is known by, for a tenant; never 0. */
uint32_t naive_code(uint32_t tenant, uint32_t story, uint32_t block);
/* The same as a key. Some of them have their home in the index in a few places. */
struct kvp_block_key naive_key(uint32_t code);
void naive_keys(uint32_t tenant, uint32_t story, uint32_t first, uint32_t n, struct kvp_block_key *ret_keys);
/* The index of an attachment's tenant. */
uint32_t naive_tenant_of(const struct naive *naive, uint32_t attachment);
uint32_t naive_tenant_place(struct naive *naive, uint32_t id);
/* Whether `need` pages can be had for a tenant (index) by evicting; else how many are missing. */
enum kvp_status naive_room(const struct naive *naive, uint32_t tenant, uint32_t need, uint32_t *reterr_short);
/* Take over which pages were evicted for that: as many as needed, leaves first, of those that may go. */
void naive_make_room(struct naive *naive, uint32_t tenant, uint32_t need, const struct naive_state *now);
/* A page was taken by a tenant. */
void naive_taken(struct naive *naive, uint32_t page, uint32_t tenant);
/* A page of a row is full. */
void naive_seal(struct naive *naive, const struct naive_seq *seq, uint32_t index);
enum kvp_status naive_expect_cache(const struct naive *naive, const struct naive_op *op);
void naive_apply_cache(struct naive *naive, const struct naive_op *op, const struct naive_state *now);
/* What pages, tenants and index show; references are counted, `before` are those that were. */
void naive_settle_cache(struct naive *naive, const uint32_t before[NAIVE_PAGES]);
/* ledger_naive.c: a fresh slot for op->ret_slot. */
struct naive_seq *naive_take(struct naive *naive, uint32_t slot);
enum kvp_status naive_expect_open(const struct naive *naive, const struct naive_op *op);
struct naive_seq *naive_open(struct naive *naive, const struct naive_op *op);
bool naive_slot_left(const struct naive *naive);
void naive_settle(struct naive *naive);

void naive_read(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_state *ret_state);
/* Whether two states are the same; if not, and `print`, where they differ. */
bool naive_same(const struct naive_state *a, const struct naive_state *b, bool print);

#endif
