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

struct naive_session {
    uint32_t state, generation, kind, attachments;
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
};

struct naive_job {
    uint32_t open, generation, sequences;
    uint32_t slots[NAIVE_SEQS];
};

struct naive_state {
    struct naive_session sessions[NAIVE_SESSIONS];
    struct naive_attachment attachments[NAIVE_ATTACHMENTS];
    struct naive_seq seqs[NAIVE_SEQS];
    struct {
        uint32_t state, references;
    } pages[NAIVE_PAGES];
    struct naive_job jobs[NAIVE_JOBS];
    uint32_t free_pages, open_sequences, retiring_sequences, attached;
};

struct naive {
    struct kvp_pool_id pool;
    struct kvp_pool_geometry geometry;
    bool needs_after;
    struct naive_state state;
    /* what the functions do not show */
    uint32_t session_generations[NAIVE_SESSIONS], seq_generations[NAIVE_SEQS], seq_versions[NAIVE_SEQS];
    uint32_t job_generations[NAIVE_JOBS];
    uint32_t held[NAIVE_SEQS]; /* page + 1 that a given-up row holds for a copy it owed */
    bool sealed[NAIVE_PAGES];
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
    bool flag; /* durable, truncate, with_durable, written */
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
struct naive_transaction naive_transact(struct naive *naive, struct kvp_ledger *ledger, uint32_t commits, uint64_t *rng);
/* Run it again, on the ledger alone. */
void naive_transact_again(struct kvp_ledger *ledger, struct kvp_pool_id pool,
                          const struct naive_transaction *transaction);

void naive_read(const struct kvp_ledger *ledger, struct kvp_pool_id pool, struct naive_state *ret_state);
/* Whether two states are the same; if not, and `print`, where they differ. */
bool naive_same(const struct naive_state *a, const struct naive_state *b, bool print);

#endif
