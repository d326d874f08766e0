/**
 * A shell for the core's tests: it plays the doors, the memory objects, the clock and the executors, without a socket,
 * a process or a second thread.
 *
 * Actions are recorded and become events in a queue; shell_pump hands the events to the core until none is left, so a
 * test decides what happens in which order. Things have real memory, and the executors do their jobs on it, so that
 * bytes can be compared. Calls are packed and unpacked on their way in, replies on their way out, as doors do.
 *
 * Every check here aborts the test (ck_assert); shell_end audits the ledger and checks that nothing is left over.
 */
#ifndef KVP_CORE_SHELL_H
#define KVP_CORE_SHELL_H

#include "core.h"

#include "kvp_layout.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>

#define SHELL_THINGS_MAX 2048
#define SHELL_EVENTS_MAX 4096
#define SHELL_JOBS_MAX   512
#define SHELL_SLABS_MAX  64
#define SHELL_PIDS_MAX   64

struct shell_memory {
    unsigned char *bytes;
    uint64_t size;
    unsigned holders; /* things and executors that have it */
};

struct shell_thing {
    bool used, ready;
    struct kvp_thing thing;
    struct shell_memory *memory;
};

enum shell_event_kind { EVENT_THING = 1, EVENT_UP, EVENT_REPLY, EVENT_GONE, EVENT_AUDITED };

struct shell_event {
    enum shell_event_kind kind;
    struct kvp_thing thing;
    enum kvp_status status;
    uint32_t executor, start;
    uint16_t method;
    uint64_t tag;
    ProtobufCMessage *body; /* owned */
    struct shell_memory *fd;
};

struct shell_slab {
    bool used;
    uint64_t pool;
    uint32_t rank;
    struct shell_memory *memory;
    struct shell_memory *timelines;
    Kvpool__V1__PoolSpec *spec;
};

struct shell_buffer {
    bool used;
    uint64_t session;
    uint32_t buffer;
    uint64_t offset, bytes;
    struct shell_memory *memory;
};

struct shell_job {
    uint64_t tag;
    Kvpool__V1__ExecJobRequest *request;
};

struct shell_executor {
    bool running;
    uint32_t starts, pid;
    char device[64];
    struct shell_slab slabs[SHELL_SLABS_MAX];
    struct shell_buffer buffers[256];
    struct shell_job jobs[SHELL_JOBS_MAX];
    unsigned n_jobs;
    unsigned jobs_done;
    struct {
        uint64_t job;
        enum kvp_status status;
    } remembered[SHELL_JOBS_MAX]; /* a ring, by jobs_done */
};

/* A call as a client has it. */
struct shell_call {
    struct kvp_call call; /* first */
    struct shell_call *next;
    bool answered;
    enum kvp_status status;
    ProtobufCMessage *reply; /* or an Error */
    struct kvp_thing things[KVP_GPUS_MAX + 4];
    unsigned n_things;
    int fds[1];
};

struct shell {
    struct kvp_core *core;
    struct kvp_core_config config;
    struct kvp_ledger ledger;
    unsigned char *block;
    size_t block_bytes;
    uint64_t now_ms, wake_ms;
    struct shell_thing things[SHELL_THINGS_MAX];
    struct shell_event events[SHELL_EVENTS_MAX];
    unsigned n_events;
    struct shell_executor executors[KVP_GPUS_MAX];
    struct shell_memory *fds[64]; /* fd numbers that messages carry */
    struct shell_call *calls;
    uint64_t random;
    struct kvp_session_id hung_up;
    unsigned log_lines;
    char log_last[512];              /* the last of them */
    struct kvp_audit_report audited; /* what an EVENT_AUDITED tells */
    unsigned snapshots, audits;      /* made; over */
    bool snapshot_out;               /* with the core */
    bool print_log;
    /* knobs */
    bool hold_jobs;                /* jobs stay with the executor until shell_jobs_run */
    bool hold_things;              /* things stay in the making until it is cleared, and shell_pump */
    bool refuse_start;             /* an executor that is started ends before it says hello */
    enum kvp_status fail_job;      /* the next job fails with this */
    enum kvp_status fail_thing;    /* the next thing fails with this */
    enum kvp_status fail_back;     /* the ledger can not be backed */
    enum kvp_status fail_slab;     /* the next slab can not be made */
    bool fail_snapshot;            /* there is no memory for one */
    bool spoiled;                  /* an audit may find violations */
    bool listing_known;            /* NVML answers … */
    uint32_t pids[SHELL_PIDS_MAX]; /* … with these */
    unsigned n_pids;
};

struct shell *shell_begin(const char *backend);
struct shell *shell_begin_sliced(const char *backend, uint32_t reclaim_slice);
/* Audit, end everything, audit again; all things and all memory must be gone with the pools deleted. */
void shell_end(struct shell *shell);
/*
 * The daemon is killed and started again: the core is forgotten, with the calls in hand; ledger, things, executors and
 * connections are kept, and announced to a new core. Pools are served when it returns.
 * @param sessions  [n] connections that are still there
 */
void shell_restart(struct shell *shell, const struct kvp_session_id *sessions, unsigned n);
void shell_audit(struct shell *shell);

/* Hand out events until none is left. */
void shell_pump(struct shell *shell);
/* One event. @return false: there is none */
bool shell_step(struct shell *shell);
/* Let time pass, with ticks when they are due. */
void shell_run_ms(struct shell *shell, uint64_t ms);
void shell_tick(struct shell *shell);

struct kvp_caller shell_connect(struct shell *shell, uint32_t uid, uint32_t pid);
struct kvp_caller shell_grpc(uint32_t uid, uint32_t pid);
struct kvp_caller shell_tcp(void);

/* Send a call; it may be answered at once, or with a later event. */
struct shell_call *shell_send(struct shell *shell, struct kvp_caller caller, uint16_t method,
                              const ProtobufCMessage *body, struct shell_memory *fd);
/* Send, pump, tick until it is answered. */
struct shell_call *shell_call(struct shell *shell, struct kvp_caller caller, uint16_t method,
                              const ProtobufCMessage *body);
void shell_call_free(struct shell *shell, struct shell_call *call);
/* The caller goes before the answer. */
void shell_call_gone(struct shell *shell, struct shell_call *call);
const char *shell_error(const struct shell_call *call);
uint64_t shell_missing(const struct shell_call *call);

struct shell_memory *shell_memory(uint64_t bytes);
/* Memory of a thing; NULL: there is no such thing. */
unsigned char *shell_thing(struct shell *shell, struct kvp_thing thing);
unsigned shell_thing_count(const struct shell *shell, enum kvp_thing_kind kind);

/* Run jobs that are held, n of each executor. */
void shell_jobs_run(struct shell *shell, unsigned n);
void shell_executor_kill(struct shell *shell, uint32_t executor);

/* ---- requests, as tests write them ------------------------------------------------------------------------------- */

/* A pool of small pages: K and V of `layers` layers, heads 2, dim 4, fp16. */
struct pool_of {
    const char *name;
    uint32_t pages, page_tokens, layers, max_sequences, max_sequence_tokens, linger_ms;
    bool legacy;
    uint32_t reserved_pages;
    Kvpool__V1__Policy policy;
    Kvpool__V1__BlockHash block_hash;
    Kvpool__V1__ZeroOnReuse zero_on_reuse;
    Kvpool__V1__TenantShare *tenants[2]; /* NULL: none */
    const char *devices[2];              /* NULL: the first one */
    uint64_t region_bytes;
    bool page_digests;
};
/* @return the answer; free it */
struct shell_call *shell_create_pool(struct shell *shell, struct kvp_caller caller, const struct pool_of *pool);
void shell_make_pool(struct shell *shell, struct kvp_caller caller, const struct pool_of *pool);
enum kvp_status shell_delete_pool(struct shell *shell, struct kvp_caller caller, const char *name);

/* Attach over the session socket. @return the attachment */
uint32_t shell_attach(struct shell *shell, struct kvp_caller caller, const char *pool);
uint64_t *shell_progress(struct shell *shell, uint32_t attachment);
struct kvp_timeline *shell_timelines(struct shell *shell);

enum kvp_status shell_open(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t key, bool durable,
                           uint64_t *ret_seq);
enum kvp_status shell_advance(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t seq,
                              uint32_t reserved, uint32_t written);
enum kvp_status shell_close(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t seq);
uint32_t shell_length(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t seq);
uint32_t shell_free_pages(struct shell *shell, const char *pool);

#endif
