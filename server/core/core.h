/**
 * The core: what kvpoold decides. A state machine over the ledger: events come in as function calls, actions go out
 * through one table of functions. It opens no file, reads no clock, owns no socket and no thread; the shell around it
 * (server/kvpoold.c, ipc/, rpc/) does all of that, and unit tests stand in for the shell.
 *
 *      doors (ipc, rpc)       executor link           clock, pidfds
 *            │ call               │ up, reply, gone       │ tick, ended
 *            ▼                    ▼                       ▼
 *      ┌──────────────────────── core ────────────────────────────┐
 *      │ method table ─► handler ─► ledger transaction ─► publish │──► actions: reply, thing_make, exec_send, …
 *      └──────────────────────────────────────────────────────────┘
 *
 * Calls. A handler checks everything, and either answers in the same turn or asks for what it lacks (an executor, a
 * memory object, a job's end) and waits: when that comes, the handler runs again from its start, so that whatever has
 * changed meanwhile is seen by the same checks. A call is answered exactly once, unless the caller is gone first.
 *
 * Things are the file descriptors that outlive the daemon, named by what they are for. The shell makes or takes them,
 * maps them where the core reads or writes them, and parks them (fd store) before it says kvp_core_thing_ready; only
 * then does the ledger name what they hold.
 *
 * One thread. No function is called back into: an action never calls the core before it has returned.
 */
#ifndef KVP_CORE_H
#define KVP_CORE_H

#include "kvp_abi.h"
#include "kvp_ledger.h"
#include "kvp_limits.h"
#include "kvp_status.h"

#include "kvpool.pb-c.h"

struct kvp_core;
struct kvp_call;

/* ---- things ------------------------------------------------------------------------------------------------------ */

enum kvp_thing_kind {
    KVP_THING_TABLE = 't',     /* {pool slot}: mapped */
    KVP_THING_TIMELINES = 'l', /* {pool slot}: mapped */
    KVP_THING_PROGRESS = 'p',  /* {pool slot, attachment}: mapped */
    KVP_THING_SLAB = 's',      /* {pool slot, rank}: not mapped */
    KVP_THING_BUFFER = 'b',    /* {session slot, buffer}: not mapped */
};

struct kvp_thing {
    enum kvp_thing_kind kind;
    uint32_t a, b;
};

/* ---- calls ------------------------------------------------------------------------------------------------------- */

enum kvp_door { KVP_DOOR_SOCKET = 1, KVP_DOOR_GRPC = 2, KVP_DOOR_TCP = 3 };

/* Who calls, as the door knows it; nothing in it comes from the message. */
struct kvp_caller {
    enum kvp_door door;
    bool known;                    /* pid, uid, gid are the kernel's word (not over TCP) */
    uint32_t pid, uid, gid;
    struct kvp_session_id session; /* the connection's own session (session socket); else zero */
};

/*
 * A message with fds, on its way in: a call from a door, or a reply from an executor. The shell owns it and its fds;
 * fds that the core wants to keep it names to thing_keep.
 */
struct kvp_message {
    uint16_t method; /* Kvpool__V1__Method */
    uint64_t tag;
    ProtobufCMessage *body;
    int *fds;
    unsigned n_fds;
};

/* A call in hand. The door allocates it, fills the upper part, and frees it after `reply` or kvp_core_call_gone. */
struct kvp_call {
    struct kvp_caller caller;
    struct kvp_message message;
    uint64_t deadline_ms; /* 0: none; on the clock of kvp_core_tick */
    void *door;           /* the door's own */
    void *op;             /* the core's own; zero at first */
};

/* What both doors know of a call: one table, in the order of Kvpool__V1__Method. */
struct kvp_method {
    uint16_t number;
    const char *name; /* as in the service: "OpenSession" */
    const ProtobufCMessageDescriptor *request, *reply;
    bool changes;     /* it carries a call id; its outcome is remembered */
    bool over_tcp;    /* served to TCP callers */
};
extern const struct kvp_method kvp_methods[];
extern const unsigned kvp_method_count;
const struct kvp_method *kvp_method_by_number(uint16_t number);       /* NULL: there is none */
const struct kvp_method *kvp_method_by_name(const char *service_name); /* "OpenSession"; NULL: there is none */

/* ---- audits ------------------------------------------------------------------------------------------------------ */

/** What an operator can do about a ledger that is refused: it stays with the service manager, which starts us again. */
#define KVP_GIVING_UP_TEXT                                                                                             \
    "Stopping the service (`systemctl stop kvpoold') gives it up, with all pools; so does --discard-state"

#define KVP_VIOLATIONS_SHOWN    64
#define KVP_VIOLATION_BYTES_MAX 256

/* What came of the audit of a snapshot of the ledger. */
struct kvp_audit_report {
    enum kvp_status status; /* KVP_ENOMEM: there was no memory for it */
    uint64_t unix_ms;       /* when it was over */
    uint64_t violations;
    unsigned n_texts; /* of the first violations */
    char texts[KVP_VIOLATIONS_SHOWN][KVP_VIOLATION_BYTES_MAX];
};

/* ---- actions ----------------------------------------------------------------------------------------------------- */

/* The shell's part. All return at once; what takes time is told by an event. ctx is what kvp_core_create was given. */
struct kvp_actions {
    /* Answer. `reply` (or an Error, when status is not KVP_OK) and the things' fds are valid during the call only. */
    void (*reply)(void *ctx, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                  const struct kvp_thing *things, unsigned n_things);

    /* Make a zeroed memory object, map it, park it; then kvp_core_thing_ready. */
    void (*thing_make)(void *ctx, struct kvp_thing thing, uint64_t bytes);
    /* Take over fd `index` of a message as this thing and park it; then kvp_core_thing_ready. */
    void (*thing_keep)(void *ctx, struct kvp_thing thing, struct kvp_message *from, unsigned index);
    /* Unpark, unmap, close. No event. */
    void (*thing_drop)(void *ctx, struct kvp_thing thing);

    /* Back a range of the ledger's block by memory (zeroed where it was not backed); give one back. */
    enum kvp_status (*ledger_back)(void *ctx, uint64_t offset, uint64_t bytes);
    void (*ledger_unback)(void *ctx, uint64_t offset, uint64_t bytes);

    /* As many zeroed bytes as the ledger has, the first `used` of them writable. NULL: not to be had. */
    unsigned char *(*snapshot_make)(void *ctx, uint64_t used);
    void (*snapshot_drop)(void *ctx, unsigned char *memory);
    /* Audit a snapshot on another thread and drop its memory; then kvp_core_audited. One at a time. */
    void (*snapshot_audit)(void *ctx, const struct kvp_ledger *snapshot);

    /* Start the executor of a slot (0..KVP_GPUS_MAX-1) for a device ("host", "" for the first GPU, or a UUID). */
    void (*exec_start)(void *ctx, uint32_t executor, const char *device);
    /* Send it a message; the fds of the things go along, in their order. A reply comes by tag. */
    void (*exec_send)(void *ctx, uint32_t executor, uint16_t method, uint64_t tag, const ProtobufCMessage *body,
                      const struct kvp_thing *things, unsigned n_things);
    void (*exec_stop)(void *ctx, uint32_t executor);

    /* End the connection of a socket session. */
    void (*session_hangup)(void *ctx, struct kvp_session_id session);

    /* Call kvp_core_tick no later than at_ms (UINT64_MAX: nothing is due). The last call counts. */
    void (*wake_at)(void *ctx, uint64_t at_ms);

    /* One line for the journal; level as in syslog(3). */
    void (*log)(void *ctx, int level, const char *line);

    /* How long ago this daemon's process was started, and what time it is. Asked once, when what was adopted is served:
     * that ends the pause that callers can have seen. */
    void (*since_start)(void *ctx, uint64_t *ret_us, uint64_t *ret_unix_ms);

    /* Secrets: n random bytes. @return false: none to be had */
    bool (*random)(void *ctx, void *ret_bytes, size_t n);
};

/* ---- the core's life --------------------------------------------------------------------------------------------- */

struct kvp_core_config {
    const char *version;
    const char *backend;         /* "host" or "cuda" */
    uint32_t uid;                /* of the daemon: what is allowed to root is allowed to it */
    uint32_t lease_default_ms;
    uint32_t reclaim_slice;      /* page references dropped in one tick; 0: KVP_RECLAIM_SLICE */
    uint32_t executor_start_ms;  /* an executor that does not say hello within is given up; 0: 20 000 */
    uint32_t audit_ms;           /* after an audit, and when the ledger has changed since, until the next; 0: only when asked */
};

enum kvp_status kvp_core_create(const struct kvp_core_config *config, const struct kvp_actions *actions, void *ctx,
                                struct kvp_ledger *ledger, uint64_t now_ms, struct kvp_core **ret_core);
void kvp_core_destroy(struct kvp_core *core); /* open calls are dropped unanswered; the ledger stays as it is */

/*
 * A ledger that is not empty is adopted: kvp_core_create reads it, the shell announces what was kept (thing_ready,
 * session_adopted, exec_adopted), then ticks. Calls that come before it is served wait.
 */

/** The doors are open: what callers sent meanwhile is seen to from now on. */
void kvp_core_opened(struct kvp_core *core);
/** Does anybody keep the memory? Told at the start, and when that changes. */
void kvp_core_keeper(struct kvp_core *core, Kvpool__V1__Keeper keeper);

/* The clock, monotonic, in ms: every other event is at the time last told. Does what is due; slices long work. */
void kvp_core_tick(struct kvp_core *core, uint64_t now_ms);

/* ---- events ------------------------------------------------------------------------------------------------------ */

void kvp_core_thing_ready(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                          uint64_t bytes);

/** A process connected to the session socket. @param start_time  of the process, clock ticks since boot; 0 unknown */
enum kvp_status kvp_core_connect(struct kvp_core *core, const struct kvp_caller *caller, uint64_t start_time,
                                 struct kvp_session_id *ret_session);
/** A socket session of the ledger whose connection was kept; before the first tick. Others have ended by then. */
void kvp_core_session_adopted(struct kvp_core *core, struct kvp_session_id session);
void kvp_core_disconnected(struct kvp_core *core, struct kvp_session_id session);  /* end-of-file, or CloseSession */
void kvp_core_process_ended(struct kvp_core *core, struct kvp_session_id session); /* its pidfd fired */

void kvp_core_call(struct kvp_core *core, struct kvp_call *call);      /* `reply` may come before it returns */
void kvp_core_call_gone(struct kvp_core *core, struct kvp_call *call); /* cancelled: no reply will be asked for */

void kvp_core_exec_up(struct kvp_core *core, uint32_t executor, uint32_t pid); /* started; the core says hello */
/** An executor that an earlier daemon started, whose socket was kept; before the first tick. It is said hello to. */
void kvp_core_exec_adopted(struct kvp_core *core, uint32_t executor);
void kvp_core_exec_reply(struct kvp_core *core, uint32_t executor, enum kvp_status status,
                         struct kvp_message *message); /* status not KVP_OK: body is an Error, or NULL */
void kvp_core_exec_gone(struct kvp_core *core, uint32_t executor);

void kvp_core_audited(struct kvp_core *core, const struct kvp_audit_report *report);

/** SIGTERM: no new calls are taken (KVP_EAGAIN). @return how many are still in hand */
unsigned kvp_core_drain(struct kvp_core *core);

/* For doors that count: answered, failed. */
struct kvp_core_counts {
    uint64_t calls, calls_failed;
};
struct kvp_core_counts kvp_core_counts(const struct kvp_core *core);

#endif
