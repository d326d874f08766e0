/**
 * What the core keeps beside the ledger: everything here can be lost with the process, and is made again from the
 * ledger, the things, and what the shell tells. Private to server/core.
 *
 *   pool_state        a pool of the ledger: its description unpacked, its mapped things, its slabs, its attachments
 *   session_state     a session of the ledger: what is known of its process, its lease, its buffers
 *   executor          a process that works for us, or could
 *   job_state         a job of the ledger: the request, kept so that another executor can be given it
 *   audit_state       the audit under way, and what came of the last one
 *   op                a call in hand that waits (op.h)
 *
 * Arrays are indexed by the slots of the ledger; `generation` tells whether what stands there is still of that object.
 * One thread.
 */
#ifndef KVP_CORE_STATE_H
#define KVP_CORE_STATE_H

#include "core.h"

#include "kvp_layout.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define KVP_DEVICE_BYTES_MAX 63 /* of a device's name, without the terminator */
#define KVP_IPC_HANDLE_BYTES 64 /* cudaIpcMemHandle_t */
#define KVP_EXEC_ATTEMPTS    3  /* starts that fail in a row before an executor is given up for a while */
#define KVP_JOB_ATTEMPTS     3  /* executors that may die over one job before it is failed */
#define KVP_PIDS_MAX         4096
#define KVP_UID_UNKNOWN      0xffffffffu /* of a caller over TCP: its sessions are not those of any user here */

/* An invariant of the program. Stays on in release builds. */
#define CORE_ASSERT(condition) ((condition) ? (void)0 : abort())

#define NEVER UINT64_MAX

/* Handed back by a handler in place of a status: the call is not answered yet, its op waits. */
#define KVP_WAIT ((enum kvp_status)1)

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        enum kvp_status try_status = (call);                                                                           \
        if (try_status != KVP_OK)                                                                                      \
            return try_status;                                                                                         \
    } while (0)

struct buffer_state {
    bool used;
    bool parked; /* its fd is a thing */
    bool has_ipc;
    unsigned char ipc[KVP_IPC_HANDLE_BYTES];
    char device[KVP_DEVICE_BYTES_MAX + 1];
    uint64_t bytes, offset;
    uint32_t imported[KVP_GPUS_MAX]; /* the start of each executor that has it; 0: it has not */
};

struct session_state {
    uint32_t generation;
    bool connected;     /* a socket session's connection is there */
    bool process_ended; /* its pidfd fired */
    uint64_t listing;   /* the first listing of processes that can prove that its GPU work is over */
    uint64_t lease_until_ms;
    struct buffer_state *buffers; /* [KVP_BUFFERS_MAX + 1], by number; NULL: it never had one */
};

struct slab_state {
    char device[KVP_DEVICE_BYTES_MAX + 1];
    uint32_t executor;
    uint32_t held;    /* the start of the executor that has the slab; 0: none */
    uint32_t adopted; /* … and the pool's timelines and table */
    uint64_t bytes;
    bool has_ipc;
    unsigned char ipc[KVP_IPC_HANDLE_BYTES];
};

struct attachment_state {
    bool mapped;              /* its process was handed slabs, so that it may write */
    bool forced;              /* an operator said that nothing writes any more */
    bool silenced;            /* its own timelines are ended: work that waits for them ends too */
    bool released;            /* its last words are said: timelines ended, words folded */
    uint64_t *progress;       /* its progress page; NULL: none */
    uint64_t linger_until_ms; /* its durable sequences wait until then; 0: not yet known */
    uint64_t ask_nvml_ms;     /* when to ask whether NVML lists its process; NEVER: known, or of no use */
    uint32_t nvml_asks;
    bool quarantine_said;    /* that it lasts, in the log */
    uint64_t quarantined_ms; /* since when a dead process's pages are known to wait; 0: they do not */
};

struct pool_state {
    struct kvp_pool_id id; /* generation 0: none */
    Kvpool__V1__PoolSpec *spec;
    struct kvp_plane_layout *planes; /* [spec->n_planes] */
    uint64_t slab_bytes, page_bytes;
    uint64_t region_offset, region_bytes, region_align; /* the room for regions in each slab */
    uint64_t digest[2];                                 /* of its layout */
    bool host;   /* backend "host" */
    bool legacy; /* memory of cudaMalloc, owned by the executor */
    uint32_t n_slabs;
    struct slab_state slabs[KVP_GPUS_MAX];
    unsigned char *table;
    uint64_t table_bytes, rows_offset, row_stride; /* see publish.c */
    struct kvp_timeline *timelines;
    void *stand_in_table, *stand_in_timelines; /* of a lost pool that lacks them (adopt.c); else NULL */
    struct attachment_state *attachments;      /* [KVP_ATTACHMENTS_MAX] */
    uint32_t joined;   /* attachments that joined another's group, or lack one that did: when none, a word is looked up
                          at once */
    bool reclaim_due;  /* rows may be in RECLAIM */
    struct block_hasher *hasher; /* NULL: no block was named yet */
    uint64_t *pin_until_ms;      /* [max_sequences] when the lease of the pin in a slot ends */
    uint64_t pins_check_ms;      /* no pin's lease ends before */
    uint32_t *pending; /* [max_sequences] slots of transfers under way; stale entries are dropped when met */
    uint32_t n_pending;
    uint32_t *named; /* [max_sequences] slots of rows with named pages that are not all written; stale entries too */
    bool *is_named;  /* [max_sequences] whether a slot is among them */
    uint32_t n_named, named_next; /* how many there are, and which is looked at next */
    uint64_t digests_next_ms; /* when the next pass may begin */
    uint32_t digests_cursor;
};

enum executor_state {
    EXECUTOR_IDLE = 0, /* not running */
    EXECUTOR_STARTING, /* exec_start was called */
    EXECUTOR_HELLO,    /* it runs; its hello is awaited */
    EXECUTOR_READY,
    EXECUTOR_STOPPING, /* it said no hello in time: its end is awaited */
};

struct executor {
    enum executor_state state;
    bool used;
    bool first;                            /* asked for as "", the first device */
    char device[KVP_DEVICE_BYTES_MAX + 1]; /* as asked for; once known, the name of the device */
    char backend[16];
    uint32_t pid;
    uint32_t starts;   /* counts starts: what an earlier one was given is gone */
    uint32_t failures; /* in a row, before hello */
    uint64_t retry_ms; /* not started again before; 0: at once */
    uint64_t deadline_ms;
    uint64_t jobs_done;
    char why[200]; /* of the last failure */
    /* which processes its device serves, as it said last */
    uint64_t listing_next_ms; /* not asked again before */
    uint64_t listing_asked;   /* number of the listing asked for and not answered; 0: none */
    uint64_t listing;         /* number of the listing held; 0: none */
    bool listing_known;
    uint32_t n_pids;
    uint32_t pids[KVP_PIDS_MAX];
};

struct job_state {
    struct kvp_job_id id; /* generation 0: none */
    struct kvp_session_id session;
    struct kvp_pool_id pool;
    uint32_t executor, rank, buffer;
    bool every_rank; /* done on each slab, one behind the other; `rank` is the one in hand */
    uint32_t sent; /* the start of the executor that has it; 0: not sent */
    uint32_t attempts;
    uint32_t asked; /* executors that may have it, a bit each: of an earlier daemon's */
    uint32_t timeline;
    uint64_t value;
    uint8_t *packed; /* ExecJobRequest; NULL: an earlier daemon had it */
    size_t packed_bytes;
};

/* A job that failed: the value that its caller awaits is written when no job of that timeline is open any more. */
struct late_value {
    struct kvp_pool_id pool; /* generation 0: none */
    uint32_t timeline;
    uint64_t value;
};

enum audit_phase {
    AUDIT_IDLE = 0,
    AUDIT_COPYING, /* a snapshot is being taken, a slice a tick */
    AUDIT_READING, /* another thread has it */
};

struct audit_state {
    enum audit_phase phase;
    uint64_t wanted; /* the audit of that number, counted from 1, is waited for */
    uint64_t taken;  /* snapshots taken, or not to be had */
    uint64_t done;   /* audits over */
    uint64_t changes;               /* of the ledger, at the last snapshot */
    uint64_t began_ms, over_ms;     /* of the last one, on the core's clock */
    unsigned char *memory;          /* of the snapshot being taken */
    struct kvp_audit_report report; /* of the last one */
};

enum digest_work { DIGEST_NONE = 0, DIGEST_TAKE, DIGEST_CHECK };
#define DIGEST_BATCH_MAX   256u
#define DIGEST_DAMAGED_MAX 1024u /* pages that are told */

/* Pages whose bytes executors read; see digests.c. */
struct digest_batch {
    enum digest_work work;
    struct kvp_pool_id pool;
    uint32_t serial;             /* of the last one; never 0 */
    uint32_t left;               /* ranks that have not answered, a bit each */
    uint32_t sent[KVP_GPUS_MAX]; /* the start of the executor that was asked; 0: it was not */
    uint32_t attempts;
    uint32_t n;
    uint32_t pages[DIGEST_BATCH_MAX];
    uint64_t words[DIGEST_BATCH_MAX]; /* DIGEST_CHECK: what was kept */
    uint64_t sums[DIGEST_BATCH_MAX];  /* of the ranks' digests */
};

struct damaged_page {
    struct kvp_pool_id pool;
    uint32_t page;
};

struct digest_check {
    bool active;
    uint64_t wanted, begun, done; /* numbers, from 1 */
    uint32_t slot, cursor;        /* pool and page at hand */
    enum kvp_status status;       /* of the last one; with its text */
    char text[256];
    uint64_t checked, missing, damaged;
    struct damaged_page pages[DIGEST_DAMAGED_MAX]; /* the first that are damaged */
};

struct digests {
    uint64_t pools, wanted, pass; /* a bit a pool: keeps digests; a pass is to be made; one is under way */
    uint64_t seals;               /* of the ledger, as seen last */
    bool pass_is_next;            /* the check had its slice */
    struct digest_batch batch;
    struct digest_check check;
};

enum adopt_state { ADOPT_DONE = 0, ADOPT_MEETING, ADOPT_ASKING }; /* adopt.c */

struct op;
struct arena_block {
    struct arena_block *next;
};

struct kvp_core {
    struct kvp_core_config config;
    const struct kvp_actions *act;
    void *ctx;
    struct kvp_ledger *ledger;
    uint64_t now_ms, started_ms;
    uint64_t due_ms;  /* the earliest time at which something is due */
    uint64_t told_ms; /* … as the shell was told since the last tick; 0: it was not */
    bool host;        /* backend "host" */
    bool draining;
    enum adopt_state adopting;
    struct audit_state audit;
    struct digests digests;
    bool announced; /* the first tick came: the shell has said what was kept */
    struct kvp_core_counts counts;
    bool opened;                      /* the doors are open */
    Kvpool__V1__Keeper keeper;
    uint64_t pause_us, pause_unix_ms; /* from this daemon's start until it served what it adopted, and when that was */

    struct pool_state pools[KVP_POOLS_MAX];
    struct session_state sessions[KVP_SESSIONS_MAX];
    struct executor executors[KVP_GPUS_MAX];
    struct job_state jobs[KVP_JOBS_MAX];
    struct late_value late[KVP_JOBS_MAX];
    uint32_t open_jobs, unsent_jobs, n_late;
    uint64_t listings;       /* numbers listings of processes */
    uint64_t lease_check_ms; /* no lease ends before */
    uint32_t ending;         /* sessions that are ENDING, at most */

    struct op *ops;        /* all that wait */
    struct op *pool_maker; /* the CreatePool under way */
    uint64_t op_serial;
    uint32_t n_ops;

    /* of the call being carried out */
    char error_text[512];
    uint64_t error_missing;
    struct arena_block *arena;
    size_t scratch_used;
    _Alignas(16) unsigned char scratch[16384];
    uint32_t mark[KVP_SEQUENCES_MAX]; /* which batch named a slot last: finds repetitions */
    uint32_t mark_serial;
};

/* ---- ids ------------------------------------------------------------------------------------------------------------
 */

#define ID_WORD(id) ((uint64_t)(id).generation << 32 | (id).slot)

static inline struct kvp_seq_id seq_id(uint64_t word)
{
    return (struct kvp_seq_id){(uint32_t)word, (uint32_t)(word >> 32)};
}

static inline struct kvp_session_id session_id(uint64_t word)
{
    return (struct kvp_session_id){(uint32_t)word, (uint32_t)(word >> 32)};
}

static inline bool same_session(struct kvp_session_id a, struct kvp_session_id b)
{
    return a.slot == b.slot && a.generation == b.generation;
}

/* ---- core.c ---------------------------------------------------------------------------------------------------------
 */

/* Something is to be done at that time, or before. */
void core_due(struct kvp_core *core, uint64_t at_ms);
void core_log(struct kvp_core *core, int level, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The end of every event: run what became ready, hand out jobs, tell the shell when to wake us. */
void core_settle(struct kvp_core *core);

/* Memory until the call at hand is answered. NULL: there is none. Zeroed. */
void *core_alloc(struct kvp_core *core, size_t n, size_t size);
void core_alloc_reset(struct kvp_core *core);

/* ---- audit.c: the ledger is audited while it is served ----------------------------------------------------------- */

/* The number of the next audit whose snapshot is taken from now on; it will be made. Ops wait for it by WAIT_AUDIT. */
uint64_t core_audit_ask(struct kvp_core *core);
void core_audit_tick(struct kvp_core *core);
/* The end of every event: when is the next audit due? */
void core_audit_settle(struct kvp_core *core);
void core_audit_end(struct kvp_core *core);

/* ---- digests.c: what pages' bytes were, and are ------------------------------------------------------------------- */

/* The number of the next check of all digests that begins; it will be made. Ops wait for it by WAIT_DIGESTS. */
uint64_t core_digests_ask(struct kvp_core *core);
void core_digests_tick(struct kvp_core *core);
/* The end of every event: ask what executors came up, and say when the next slice is due. @return whether a check ended
 * by that */
bool core_digests_settle(struct kvp_core *core);
void core_digests_reply(struct kvp_core *core, uint32_t executor, uint64_t low, enum kvp_status status,
                        const struct kvp_message *message, const char *text);
void core_digests_executor_gone(struct kvp_core *core, uint32_t executor);

/* ---- adopt.c: a ledger that an earlier daemon left --------------------------------------------------------------- */

enum kvp_status core_adopt(struct kvp_core *core);
/* A thing that was parked is there. */
void core_adopt_thing(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                      uint64_t bytes);
/* A tick: what was kept has been announced. */
void core_adopt_tick(struct kvp_core *core);
/* Further, as far as it goes. */
void core_adopt_step(struct kvp_core *core);

/* ---- pool_state.c: pools as the core knows them ------------------------------------------------------------------ */

enum kvp_status core_pool_load(struct kvp_core *core, struct kvp_pool_id id, Kvpool__V1__PoolSpec *take_spec);
void core_pool_unload(struct kvp_core *core, uint32_t slot);
/* The state of a pool of that name. KVP_ENOENT, with its text. */
enum kvp_status core_pool_by_name(struct kvp_core *core, const char *name, struct pool_state **ret_pool);
/* The same, LIVE. KVP_ELOST, with its text. */
enum kvp_status core_pool_live(struct kvp_core *core, const char *name, struct pool_state **ret_pool);
/* What DescribePool says; in the call's memory. */
enum kvp_status core_pool_info(struct kvp_core *core, struct pool_state *pool, Kvpool__V1__PoolInfo *ret_info);
uint32_t core_row_pages(const Kvpool__V1__PoolSpec *spec);
/* How many pages hold that many tokens. */
static inline uint32_t core_pages_for(const struct pool_state *pool, uint32_t tokens)
{
    return tokens / pool->spec->page_tokens + (tokens % pool->spec->page_tokens != 0);
}

/* ---- pool_spec.c: what a caller may ask for ---------------------------------------------------------------------- */

/* Check a description and fill in what it leaves open, but devices. The result is a copy; free it by
 * kvpool__v1__pool_spec__free_unpacked. */
enum kvp_status core_spec_fill(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec,
                               Kvpool__V1__PoolSpec **ret_filled);
/* A name as pools and regions have it. KVP_EINVAL, with its text. */
enum kvp_status core_name_check(struct kvp_core *core, const char *name);
/* Lay a checked description out. `ret_planes` is malloc'ed. */
enum kvp_status core_spec_layout(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec,
                                 struct kvp_plane_layout **ret_planes, struct kvp_layout_totals *ret_totals,
                                 uint64_t ret_digest[2]);
/* The names of the fields in which two descriptions differ, parted by commas; "": they are the same pool's. KVP_ENOMEM. */
enum kvp_status core_spec_compare(const Kvpool__V1__PoolSpec *filled, const Kvpool__V1__PoolSpec *stored, size_t n,
                                  char *ret_differing);
void core_spec_free(Kvpool__V1__PoolSpec *spec);

/* ---- calls_region.c: regions, as DescribePool lists them --------------------------------------------------------- */

/* In the call's memory. */
enum kvp_status core_region_list(struct kvp_core *core, const struct pool_state *pool, size_t *ret_n,
                                 Kvpool__V1__RegionInfo ***ret_regions);

/* ---- publish.c: the table ---------------------------------------------------------------------------------------- */

uint64_t core_table_bytes(const Kvpool__V1__PoolSpec *spec);
void core_publish_header(struct kvp_core *core, struct pool_state *pool, enum kvp_table_state state);
void core_publish_seq(struct kvp_core *core, struct pool_state *pool, uint32_t slot);
/* An OPEN sequence, of which the caller has a view that is current. */
void core_publish_view(struct kvp_core *core, struct pool_state *pool, const struct kvp_seq_view *view);
/* Everything, compared with what another daemon left there. */
void core_publish_all(struct kvp_core *core, struct pool_state *pool);

/* ---- fold.c: what streams report --------------------------------------------------------------------------------- */

bool core_timeline_reached(const struct pool_state *pool, struct kvp_after after);
/* What may be observed of a sequence now; its written tokens at least. */
uint32_t core_fold_tokens(const struct kvp_core *core, const struct pool_state *pool, const struct kvp_seq_view *view);
/* Fold the words of n sequences into the ledger, and publish what moved. Views are read anew. */
enum kvp_status core_fold(struct kvp_core *core, struct pool_state *pool, struct kvp_seq_view *views, uint32_t n);
/* The same of all that an attachment owns. */
void core_fold_attachment(struct kvp_core *core, struct pool_state *pool, uint32_t attachment);
void core_pending_add(struct kvp_core *core, struct pool_state *pool, uint32_t slot);
/* A row was given names: if they are of pages that are not written yet, its words are looked at by core_see_named. */
void core_named_add(struct pool_state *pool, const struct kvp_seq_view *view);
/* Fold the words of rows with such pages: what they hold is found from then on. KVP_BATCH_MAX rows at most, in turn. */
enum kvp_status core_see_named(struct kvp_core *core, struct pool_state *pool);
/* Transfers and retired rows whose value is reached; ends slices of reclaim. */
void core_pool_tick(struct kvp_core *core, struct pool_state *pool);
/* Drop page references of rows given up, one slice. */
void core_reclaim_slice(struct kvp_core *core, struct pool_state *pool);
/* Move n of an attachment's timelines past what others wait for, as not reached. */
void core_timelines_end(struct kvp_core *core, struct pool_state *pool, uint32_t attachment, uint32_t first,
                        uint32_t n);

/* ---- calls_cache.c: pins ------------------------------------------------------------------------------------------- */

/* Pins that an earlier daemon left: their leases start anew, in full. */
void core_pins_adopt(struct kvp_core *core, struct pool_state *pool);
/* End those whose lease is over. */
void core_pins_tick(struct kvp_core *core, struct pool_state *pool);

/* ---- ending.c: sessions' ends ------------------------------------------------------------------------------------ */

void core_session_end(struct kvp_core *core, struct kvp_session_id session);
void core_sessions_tick(struct kvp_core *core);
/* Does nothing write for a DEAD attachment any more, for all that is known? */
bool core_attachment_quiet(struct kvp_core *core, struct pool_state *pool, uint32_t attachment);
/* Pages that its sequences hold. */
uint64_t core_attachment_pages(const struct kvp_core *core, const struct pool_state *pool, uint32_t attachment);
void core_lease_renew(struct kvp_core *core, const struct kvp_session_view *session);
/* Count the attachments that joined another's group, and the groups that lack one. */
void core_joined_count(struct kvp_core *core, struct pool_state *pool);
/* Fold what an attachment that is about to go has reported, and those whose group it is in. */
void core_fold_last_words(struct kvp_core *core, struct pool_state *pool, uint32_t attachment);
/* The ledger has let it go: so does everything here. */
void core_attachment_gone(struct kvp_core *core, struct pool_state *pool, uint32_t attachment);
/* An executor said which processes its device serves. */
void core_listing_arrived(struct kvp_core *core, uint32_t executor);
/* The lease of a session, in ms from now. */
uint32_t core_lease_left(const struct kvp_core *core, uint32_t slot);

/* ---- executors.c ------------------------------------------------------------------------------------------------- */

/* The executor for a device ("": the first), ready. KVP_WAIT: it is being started; KVP_ENODEV, with its text. */
enum kvp_status core_exec_need(struct kvp_core *core, const char *device, uint32_t *ret_executor);
/* The slot that serves, or would serve, a device. KVP_ELIMIT, with its text. */
enum kvp_status core_exec_slot(struct kvp_core *core, const char *device, uint32_t *ret_executor);
void core_exec_send(struct kvp_core *core, uint32_t executor, uint16_t method, uint64_t tag,
                    const ProtobufCMessage *body, const struct kvp_thing *things, unsigned n_things);
void core_exec_tick(struct kvp_core *core);
void core_exec_ask_listing(struct kvp_core *core, uint32_t executor);
/* Let executors forget a session's buffer; 0: all of them. */
void core_exec_drop_buffer(struct kvp_core *core, struct kvp_session_id session, uint32_t buffer);
/* Have it say again the legacy handle of a slab that it holds. */
void core_exec_recall_slab(struct kvp_core *core, struct pool_state *pool, uint32_t rank);
void core_exec_drop_slabs(struct kvp_core *core, const struct pool_state *pool);
/* Make sure that the executor of a rank has the pool's slab, timelines and table. KVP_ELOST: it can't have the slab. */
enum kvp_status core_exec_adopt(struct kvp_core *core, struct pool_state *pool, uint32_t rank);

/* Tags of what is sent to executors: what it is, and of whom. */
enum exec_tag {
    TAG_HELLO = 1,
    TAG_CREATE,  /* op serial */
    TAG_ADOPT,   /* pool slot, rank */
    TAG_IMPORT,  /* op serial; 0: an import ahead of a job */
    TAG_JOB,     /* generation << 16 | slot */
    TAG_LISTING, /* number */
    TAG_RECALL,  /* pool slot, rank: the handle of a slab that it holds */
    TAG_FORGET,  /* no answer is of interest */
    TAG_DIGEST,  /* epoch << 40 | serial << 8 | rank: an earlier daemon's batch may be answered to this one */
};
#define EXEC_TAG(kind, low) ((uint64_t)(kind) << 56 | ((uint64_t)(low)&0xffffffffffffffull))
#define EXEC_TAG_KIND(tag)  ((enum exec_tag)((tag) >> 56))
#define EXEC_TAG_LOW(tag)   ((tag)&0xffffffffffffffull)

/* ---- jobs.c ------------------------------------------------------------------------------------------------------ */

/* Take a job of the ledger in hand, after its commit; the request is copied. */
enum kvp_status core_job_take(struct kvp_core *core, struct kvp_job_id id, const Kvpool__V1__ExecJobRequest *request);
/* Undo core_job_take: the transaction was not committed. */
void core_job_forget(struct kvp_core *core, struct kvp_job_id id);
/* Has the job in a slot written its value? It ends as soon as its executor's answer is read, or the next one's where it
 * died over that: who saw the value waits for it, and is not refused. */
bool core_job_about_to_end(const struct kvp_core *core, uint32_t slot);
/* Is the job in a slot of the ledger one that zeroes pages? Calls wait for it, and are not refused. */
bool core_job_zeroes(const struct kvp_core *core, uint32_t slot);
/* Is it with an executor, or over? */
bool core_job_sent(const struct kvp_core *core, struct kvp_job_id id);
/* Hand out what can be handed out. */
void core_jobs_pump(struct kvp_core *core);
void core_job_reply(struct kvp_core *core, uint32_t executor, uint64_t low, enum kvp_status status, const char *text);
void core_jobs_executor_gone(struct kvp_core *core, uint32_t executor);
/* The next value of the timeline that executors write for an attachment. When nothing is under way there, its error
 * word is cleared. */
uint64_t core_job_next_value(struct kvp_core *core, struct pool_state *pool, uint32_t attachment);
bool core_session_has_jobs(const struct kvp_core *core, struct kvp_session_id session);
/* Jobs that an earlier daemon left: ask for them. @return whether anybody was asked */
bool core_jobs_ask(struct kvp_core *core);
/* Everybody has answered: jobs that no executor has in hand have failed. */
void core_jobs_asked(struct kvp_core *core);
/* Fail what can't be done any more: jobs of a pool. */
void core_jobs_fail_pool(struct kvp_core *core, struct kvp_pool_id pool, enum kvp_status status, const char *why);

/* ---- calls_map.c: buffers, as others use them -------------------------------------------------------------------- */

/* A registered buffer of a session; KVP_ENOENT, with its text. */
enum kvp_status core_buffer(struct kvp_core *core, struct kvp_session_id session, uint32_t buffer,
                            struct buffer_state **ret_buffer);
void core_buffer_import(struct kvp_core *core, uint32_t executor, struct kvp_session_id session, uint32_t number,
                        struct buffer_state *buffer, uint64_t tag);
/* A buffer of the ledger; its fd is announced later. */
enum kvp_status core_buffer_adopt(struct kvp_core *core, const struct kvp_buffer_view *view);
/* … and was not. */
void core_buffer_lost(struct kvp_core *core, const struct kvp_buffer_view *view);
void core_buffers_drop(struct kvp_core *core, struct kvp_session_id session);

#endif
