/**
 * A call being carried out: what a handler is given, how it answers, how it waits. Private to server/core.
 *
 *   kvp_core_call ─► handler ─► KVP_OK      it has answered (core_answer)
 *                        │  └─► a status    refused: the text is in the core (core_refuse)
 *                        └────► KVP_WAIT    its op waits for one event; when that comes, the handler runs again from
 *                                           its start, and finds in the op what it has obtained so far
 *
 * An op lives from the first wait to the answer, or until the caller is gone; then `undo` gives back what it obtained.
 */
#ifndef KVP_CORE_OP_H
#define KVP_CORE_OP_H

#include "state.h"

enum wait_for {
    WAIT_NONE = 0,
    WAIT_EXECUTOR, /* key: slot; it is ready, or it is not to be had */
    WAIT_THING,    /* key: op serial; a thing that this op asked for */
    WAIT_REPLY,    /* key: op serial; an executor's answer */
    WAIT_JOB,      /* key: job slot; it ended */
    WAIT_SENT,     /* key: job slot; an executor has it, or it ended */
    WAIT_MAKER,    /* key: 0; no pool is being made */
    WAIT_RECLAIM,  /* key: pool slot; a slice of reclaim is done */
    WAIT_ADOPT,    /* key: 0; an earlier daemon's ledger is served */
    WAIT_AUDIT,    /* key: number; that audit is over */
    WAIT_DIGESTS,  /* key: number; that check of all digests is over */
};

/* A thing that an op asked for. */
struct op_thing {
    struct kvp_thing thing;
    bool ready;
    void *address;
    uint64_t bytes;
};

struct op {
    struct op *next, *prev;
    struct kvp_call *call;
    uint64_t serial;
    enum wait_for wait;
    uint64_t key;
    bool ready; /* what it waits for has come */
    /* what it has obtained */
    int stage;
    enum kvp_status result; /* of the last event */
    char text[256];
    uint32_t executor;     /* WAIT_REPLY: whose */
    struct kvp_job_id job; /* WAIT_JOB: its own job, and where that tells its end */
    uint32_t job_timeline;
    uint64_t job_value;
    bool zeroing;    /* its change is made; it waits, or has waited, for pages to be zeroed */
    uint64_t done;   /* of work in slices */
    void *own;                                          /* the handler's, malloc'ed */
    void (*undo)(struct kvp_core *core, struct op *op); /* give back what `own` names; NULL: nothing */
    void (*arrived)(struct kvp_core *core, struct op *op, struct kvp_message *message); /* WAIT_REPLY, with KVP_OK */
    /* what it asked the shell for; dropped with the op, unless they have become someone's (n_things = 0) */
    unsigned n_things, things_awaited;
    struct op_thing things[KVP_GPUS_MAX + 4];
};

/* One run of a handler. */
struct turn {
    struct kvp_call *call;
    struct op *op; /* NULL: it has not waited yet */
    uint16_t method;
    const ProtobufCMessage *body;
    bool has_session;
    struct kvp_session_view session;
    uint64_t call_id;
    bool repeated; /* this call was done before; here is what it came to */
    struct kvp_outcome outcome;
};

typedef enum kvp_status handler(struct kvp_core *core, struct turn *turn);

/* The first members of every request. */
struct request_head {
    ProtobufCMessage base;
    char *session;
    uint64_t call_id;
};

/* ---- op.c -------------------------------------------------------------------------------------------------------- */

/* Say why. @return status, so that a handler can return at once */
enum kvp_status core_refuse(struct kvp_core *core, enum kvp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* What failed inside the ledger and has no better text. */
enum kvp_status core_refuse_plain(struct kvp_core *core, enum kvp_status status, const char *what);
enum kvp_status core_answer(struct kvp_core *core, struct turn *turn, const ProtobufCMessage *reply,
                            const struct kvp_thing *things, unsigned n_things);
/* The op of this call, made when it has none. KVP_ENOMEM. */
enum kvp_status core_op(struct kvp_core *core, struct turn *turn, struct op **ret_op);
/* @return KVP_WAIT, or KVP_ENOMEM */
enum kvp_status core_wait(struct kvp_core *core, struct turn *turn, enum wait_for wait, uint64_t key);
void core_wake(struct kvp_core *core, enum wait_for wait, uint64_t key);
/* The answers that ops await of an executor will not come. */
void core_ops_executor_gone(struct kvp_core *core, uint32_t executor, const char *why);
struct op *core_op_by_serial(struct kvp_core *core, uint64_t serial);
/* Run what is ready, until nothing is. */
void core_ops_run(struct kvp_core *core);
void core_ops_tick(struct kvp_core *core);
void core_ops_drop(struct kvp_core *core);

/* Ask for a memory object, or keep an fd, for this op. */
void core_op_make(struct kvp_core *core, struct op *op, struct kvp_thing thing, uint64_t bytes);
void core_op_keep(struct kvp_core *core, struct op *op, struct kvp_thing thing, struct kvp_message *from,
                  unsigned index);
/* The op that asked for a thing is told. @return false: none did */
bool core_op_thing_ready(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                         uint64_t bytes);
/* A thing that this op has; NULL: it has not. */
const struct op_thing *core_op_thing(const struct op *op, struct kvp_thing thing);

/*
 * A job of this call is in the ledger. KVP_OK: it may be answered; KVP_WAIT: not yet, and when the handler runs again its
 * op names the job. On the session socket the caller waits for the timeline itself: it is answered as soon as an executor
 * has the job, which then outlives this process. gRPC is answered when the job is over.
 */
enum kvp_status core_job_await(struct kvp_core *core, struct turn *turn, struct kvp_job_id id, uint32_t timeline,
                               uint64_t value);

/* ---- transactions of a call -------------------------------------------------------------------------------------- */

/* Remember the outcome, then commit. On failure nothing has changed. */
enum kvp_status core_commit(struct kvp_core *core, struct turn *turn, uint64_t value0, uint64_t value1);
/* Abort. @return status */
enum kvp_status core_abort(struct kvp_core *core, enum kvp_status status);
/* The same of a transaction that takes pages. Where eviction is stuck, a slice of what is in its way is parked, and the
 * call runs again: KVP_WAIT. */
enum kvp_status core_abort_taking(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                  enum kvp_status status);

/* ---- batch.c: sequences that a call names ------------------------------------------------------------------------ */

enum batch_flags {
    BATCH_OWNED = 1u << 0,    /* each is the caller's */
    BATCH_TENANT = 1u << 1,   /* each is of the caller's tenant */
    BATCH_DISTINCT = 1u << 2, /* no sequence twice */
    BATCH_FREE = 1u << 3,     /* none has a job open */
};

/* Check n handles, fold their words, and look at them. Views are the call's memory. KVP_WAIT: a job is about to end. */
enum kvp_status core_batch(struct kvp_core *core, struct turn *turn, struct pool_state *pool, const char *what,
                           size_t n, const uint64_t *handles, unsigned flags, struct kvp_seq_view **ret_views);
/* Whether another sequence, pin or cut could get a row. */
bool core_rows_left(const struct kvp_core *core, const struct pool_state *pool);
/* KVP_EBUSY: sequence i was given here ahead of its giver's stream, which writes its pages until its value is reached. */
enum kvp_status core_given_check(struct kvp_core *core, size_t i, const struct kvp_seq_view *view);
/* KVP_ESTALE: what a repeated call was to make is there no more, and is not made again. */
enum kvp_status core_made_and_closed(struct kvp_core *core, size_t i, uint64_t key);
/* Why the ledger refused a change of sequence i. */
enum kvp_status core_seq_refuse(struct kvp_core *core, const struct pool_state *pool, enum kvp_status status,
                                const char *what, size_t i, uint64_t handle);
/* The same, or KVP_WAIT where rows given up hold what the call lacks. */
enum kvp_status core_refuse_or_wait(struct kvp_core *core, struct turn *turn, const struct pool_state *pool,
                                    enum kvp_status status, const char *what, size_t i, uint64_t handle);
/* core->error_missing pages are missing: KVP_WAIT, or KVP_ENOPAGES, with a text that says of what.
 * @param wanted  pages that were asked for when it was found */
enum kvp_status core_short(struct kvp_core *core, struct turn *turn, const struct pool_state *pool, uint32_t wanted);
/* Rows given up, and not released yet, come first. KVP_WAIT until they have. */
enum kvp_status core_reclaimed(struct kvp_core *core, struct turn *turn, struct pool_state *pool);
/* The same where the free pages are too few: before cached ones go for them, those of such rows come back. */
enum kvp_status core_reclaimed_for(struct kvp_core *core, struct turn *turn, struct pool_state *pool, uint64_t pages);
enum kvp_status core_length_check(struct kvp_core *core, const char *what, size_t n, size_t expected);
/* The caller's attachment, LIVE. With `make`, one that maps nothing is made (in the open transaction). */
enum kvp_status core_attachment(struct kvp_core *core, struct turn *turn, struct pool_state *pool, bool make,
                                uint32_t *ret_attachment);
/* May a session of this tenant attach? KVP_EPERM, with its text. */
enum kvp_status core_tenant_check(struct kvp_core *core, const struct turn *turn, const struct pool_state *pool);
/* none, one, or n pairs; on host pools always none. */
enum kvp_status core_after(struct kvp_core *core, const struct pool_state *pool, uint32_t attachment, size_t n,
                           size_t n_timelines, const uint32_t *timelines, size_t n_values, const uint64_t *values,
                           struct kvp_after **ret_after);
/* The caller's session, which must be there. KVP_ESESSION, with a text that says how to get one. */
enum kvp_status core_need_session(struct kvp_core *core, const struct turn *turn);

/* Publish what a committed call changed, and look at it as it is now. */
enum kvp_status core_publish_views(struct kvp_core *core, struct pool_state *pool, struct kvp_seq_view *views,
                                   size_t n);

/* The arrays that most replies have. In the call's memory. */
struct columns {
    uint64_t *seqs;
    uint32_t *reserved, *written, *versions;
};
enum kvp_status core_columns(struct kvp_core *core, const struct kvp_seq_view *views, size_t n,
                             struct columns *ret_columns);

/* Owed copies of sequences, as replies list them. In the call's memory. */
struct copies {
    size_t n;
    uint64_t *seqs;
    uint32_t *sources, *destinations, *tokens;
};
enum kvp_status core_copies(struct kvp_core *core, const struct kvp_seq_view *views, size_t n,
                            struct copies *ret_copies);

/* ---- zero.c: pages that came from another tenant ------------------------------------------------------------------- */

/* Are there any in use that are not zeroed yet? */
bool core_zero_due(const struct kvp_core *core, const struct pool_state *pool);
/* Have those of n committed sequences zeroed. KVP_OK: there are none; KVP_WAIT: it is under way. */
enum kvp_status core_zero(struct kvp_core *core, struct turn *turn, struct pool_state *pool, uint32_t attachment,
                          const struct kvp_seq_view *views, size_t n);
/* At the start of a handler that may have waited for that: how it came out. */
enum kvp_status core_zero_ended(struct kvp_core *core, struct turn *turn);
/* In the transaction that ends such a job: what it zeroed is clean. */
enum kvp_status core_zero_clean(struct kvp_core *core, const struct pool_state *pool, struct kvp_job_id id);

/* ---- the calls --------------------------------------------------------------------------------------------------- */

handler call_open_session, call_keep_alive, call_close_session;
handler call_create_pool, call_describe_pool, call_list_pools, call_delete_pool;
handler call_attach, call_detach, call_register_buffer, call_unregister_buffer;
handler call_map_region, call_unmap_region;
handler call_open_sequences, call_list_sequences, call_advance, call_append, call_fork, call_transfer;
handler call_close_sequences, call_get_seq_lens, call_get_page_table, call_get_batch_indices;
handler call_get_stats, call_audit, call_release_quarantine;
handler call_match, call_pin, call_evict, call_list_cache;

handler *core_handler(uint16_t method);
/* Who calls: the session is found and renewed, a repeat recognised. */
enum kvp_status core_turn_begin(struct kvp_core *core, struct turn *turn);

#endif
