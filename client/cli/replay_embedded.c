/**
 * `kvpool replay --embedded`: a core over a ledger, in this process. No daemon, no socket, no bytes of pages.
 *
 * The core is the daemon's own, and so are its calls; this file stands in for what is around it. Things are plain memory,
 * the slab is none at all, and the executor is one that makes slabs of nothing. What an action sets off is a note in a
 * queue, which is handed to the core when the call has returned.
 *
 * The only file of the client's that knows the server's: all of it is linked into one object, of which only
 * replay_embedded() is seen, since names of the ledger and of libkvpool's are the same.
 */
#include "replay.h"

#include "core.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define POOL                 "replay"
#define NOTES_MAX            64
#define THINGS_MAX           64
#define EXECUTOR_PID         1
#define ROWS                 4u            /* one that is open, and what was closed and is being let go of */
#define LEDGER_SPARE         (64ull << 20) /* beside the root and what pages and rows need */
#define PAGE_BYTES_OF_LEDGER 128u          /* at least what a page needs there */

enum note_kind { NOTE_THING, NOTE_EXECUTOR_UP, NOTE_EXECUTOR_REPLY };

struct note {
    enum note_kind kind;
    struct kvp_thing thing;
    uint32_t executor;
    uint16_t method;
    uint64_t tag, bytes;
};

struct memory_thing {
    bool used;
    struct kvp_thing thing;
    void *memory; /* NULL: the slab */
    uint64_t bytes;
};

struct embedded {
    struct kvp_core *core;
    struct kvp_ledger ledger;
    unsigned char *block;
    size_t block_bytes;
    struct note notes[NOTES_MAX];
    unsigned first_note, n_notes;
    struct memory_thing things[THINGS_MAX];
    uint64_t random, wake_ms, now_ms;
    struct kvp_call call;
    bool answered;
    enum kvp_status status;
    struct replay_error error;
    /* what the last answer said */
    uint64_t seq;
    uint32_t cached;
    uint64_t evictions;
};

/* ---- what the core asks for -------------------------------------------------------------------------------------- */

static void note(struct embedded *e, const struct note *n)
{
    if (e->n_notes == NOTES_MAX)
        abort(); /* one call sets off a few */
    e->notes[(e->first_note + e->n_notes++) % NOTES_MAX] = *n;
}

static struct memory_thing *find_thing(struct embedded *e, struct kvp_thing thing)
{
    for (unsigned i = 0; i < THINGS_MAX; i++) {
        struct memory_thing *t = &e->things[i];

        if (t->used && t->thing.kind == thing.kind && t->thing.a == thing.a && t->thing.b == thing.b)
            return t;
    }
    return NULL;
}

static void add_thing(struct embedded *e, struct kvp_thing thing, uint64_t bytes)
{
    unsigned i = 0;

    while (i < THINGS_MAX && e->things[i].used)
        i++;
    if (i < THINGS_MAX)
        e->things[i] = (struct memory_thing){
            .used = true, .thing = thing, .memory = bytes > 0 ? calloc(1, bytes) : NULL, .bytes = bytes};
    note(e, &(struct note){.kind = NOTE_THING, .thing = thing});
}

static void act_thing_make(void *ctx, struct kvp_thing thing, uint64_t bytes)
{
    add_thing(ctx, thing, bytes);
}

static void act_thing_keep(void *ctx, struct kvp_thing thing, struct kvp_message *from, unsigned index)
{
    (void)from, (void)index;
    add_thing(ctx, thing, 0);
}

static void act_thing_drop(void *ctx, struct kvp_thing thing)
{
    struct memory_thing *t = find_thing(ctx, thing);

    if (t != NULL) {
        free(t->memory);
        *t = (struct memory_thing){0};
    }
}

static enum kvp_status act_ledger_back(void *ctx, uint64_t offset, uint64_t bytes)
{
    struct embedded *e = ctx;

    if (offset > e->block_bytes || bytes > e->block_bytes - offset)
        return KVP_ENOMEM;
    madvise(e->block + offset, bytes, MADV_POPULATE_WRITE); /* as the daemon does; a kernel before 5.14 can not */
    return KVP_OK;
}

static void act_ledger_unback(void *ctx, uint64_t offset, uint64_t bytes)
{
    (void)ctx, (void)offset, (void)bytes;
}

static unsigned char *act_snapshot_make(void *ctx, uint64_t used)
{
    (void)ctx, (void)used;
    return NULL;
}

static void act_snapshot_drop(void *ctx, unsigned char *memory)
{
    (void)ctx, (void)memory;
}

static void act_snapshot_audit(void *ctx, const struct kvp_ledger *snapshot)
{
    (void)ctx, (void)snapshot;
}

static void act_exec_start(void *ctx, uint32_t executor, const char *device)
{
    (void)device;
    note(ctx, &(struct note){.kind = NOTE_EXECUTOR_UP, .executor = executor});
}

static void act_exec_send(void *ctx, uint32_t executor, uint16_t method, uint64_t tag, const ProtobufCMessage *body,
                          const struct kvp_thing *things, unsigned n_things)
{
    struct note n = {.kind = NOTE_EXECUTOR_REPLY, .executor = executor, .method = method, .tag = tag};

    (void)things, (void)n_things;
    if (method == KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE)
        n.bytes = ((const Kvpool__V1__ExecSlabCreateRequest *)body)->bytes;
    note(ctx, &n);
}

static void act_exec_stop(void *ctx, uint32_t executor)
{
    (void)ctx, (void)executor;
}

static void act_session_hangup(void *ctx, struct kvp_session_id session)
{
    (void)ctx, (void)session;
}

static void act_wake_at(void *ctx, uint64_t at_ms)
{
    ((struct embedded *)ctx)->wake_ms = at_ms;
}

static void act_log(void *ctx, int level, const char *line)
{
    (void)ctx;
    if (level <= 4)
        fprintf(stderr, "kvpool: replay: %s\n", line);
}

static void act_since_start(void *ctx, uint64_t *ret_us, uint64_t *ret_unix_ms)
{
    (void)ctx;
    *ret_us = *ret_unix_ms = 0;
}

/* The same each time, so that a run can be repeated. */
static bool act_random(void *ctx, void *ret_bytes, size_t n)
{
    struct embedded *e = ctx;

    for (size_t i = 0; i < n; i++) {
        e->random = e->random * 6364136223846793005ull + 1442695040888963407ull;
        ((unsigned char *)ret_bytes)[i] = (unsigned char)(e->random >> 56);
    }
    return true;
}

static void act_reply(void *ctx, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                      const struct kvp_thing *things, unsigned n_things)
{
    struct embedded *e = ctx;

    (void)things, (void)n_things;
    e->answered = true;
    e->status = status;
    if (status != KVP_OK) {
        snprintf(e->error.text, sizeof(e->error.text), "%s", ((const Kvpool__V1__Error *)reply)->message);
    } else if (call->message.method == KVPOOL__V1__METHOD__METHOD_OPEN_SEQUENCES) {
        const Kvpool__V1__OpenSequencesReply *opened = (const Kvpool__V1__OpenSequencesReply *)reply;

        e->seq = opened->seqs[0];
        e->cached = opened->n_cached > 0 ? opened->cached[0] : 0;
    } else if (call->message.method == KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL) {
        e->evictions = ((const Kvpool__V1__DescribePoolReply *)reply)->pool->cache->evictions;
    }
}

static const struct kvp_actions actions = {
    .reply = act_reply,
    .thing_make = act_thing_make,
    .thing_keep = act_thing_keep,
    .thing_drop = act_thing_drop,
    .ledger_back = act_ledger_back,
    .ledger_unback = act_ledger_unback,
    .snapshot_make = act_snapshot_make,
    .snapshot_drop = act_snapshot_drop,
    .snapshot_audit = act_snapshot_audit,
    .exec_start = act_exec_start,
    .exec_send = act_exec_send,
    .exec_stop = act_exec_stop,
    .session_hangup = act_session_hangup,
    .wake_at = act_wake_at,
    .log = act_log,
    .since_start = act_since_start,
    .random = act_random,
};

/* ---- what the core is told --------------------------------------------------------------------------------------- */

static void executor_answers(struct embedded *e, const struct note *n)
{
    Kvpool__V1__ExecHelloReply hello = KVPOOL__V1__EXEC_HELLO_REPLY__INIT;
    Kvpool__V1__ExecSlabCreateReply slab = KVPOOL__V1__EXEC_SLAB_CREATE_REPLY__INIT;
    char *devices[] = {(char *)"host"};
    int fds[] = {-1}; /* never looked at: the slab is kept by act_thing_keep */
    struct kvp_message message = {.method = n->method, .tag = n->tag};

    if (n->method == KVPOOL__V1__METHOD__METHOD_EXEC_HELLO) {
        hello.pid = EXECUTOR_PID;
        hello.backend = (char *)"host";
        hello.n_devices = 1;
        hello.devices = devices;
        hello.abi_version = KVP_ABI_VERSION;
        message.body = &hello.base;
    } else if (n->method == KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE) {
        slab.device = devices[0];
        slab.has_fd = true;
        slab.bytes = n->bytes;
        message.body = &slab.base;
        message.fds = fds;
        message.n_fds = 1;
    } else {
        return;
    }
    kvp_core_exec_reply(e->core, n->executor, KVP_OK, &message);
}

static void hand_note(struct embedded *e)
{
    struct note n = e->notes[e->first_note];
    struct memory_thing *t;

    e->first_note = (e->first_note + 1) % NOTES_MAX;
    e->n_notes--;
    switch (n.kind) {
    case NOTE_THING:
        t = find_thing(e, n.thing);
        if (t == NULL || (t->bytes > 0 && t->memory == NULL))
            kvp_core_thing_ready(e->core, n.thing, KVP_ENOMEM, NULL, 0);
        else
            kvp_core_thing_ready(e->core, n.thing, KVP_OK, t->memory, t->bytes);
        break;
    case NOTE_EXECUTOR_UP:
        kvp_core_exec_up(e->core, n.executor, EXECUTOR_PID);
        break;
    case NOTE_EXECUTOR_REPLY:
        executor_answers(e, &n);
        break;
    }
}

/* Time passes only where something waits for it. */
static enum kvp_status call(struct embedded *e, const char *what, uint16_t method, ProtobufCMessage *body)
{
    e->call.message = (struct kvp_message){.method = method, .body = body};
    e->answered = false;
    kvp_core_call(e->core, &e->call);
    while (!e->answered) {
        if (e->n_notes > 0) {
            hand_note(e);
        } else if (e->wake_ms == UINT64_MAX) {
            snprintf(e->error.text, sizeof(e->error.text), "it waits, and nothing is due");
            e->status = KVP_EINTERNAL;
            e->answered = true;
        } else {
            if (e->wake_ms > e->now_ms)
                e->now_ms = e->wake_ms;
            kvp_core_tick(e->core, e->now_ms);
        }
    }
    e->error.what = what;
    return e->status;
}

/* ---- the calls of a run ------------------------------------------------------------------------------------------ */

static enum kvp_status make_pool(struct embedded *e, const struct replay *replay)
{
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    Kvpool__V1__Plane plane = KVPOOL__V1__PLANE__INIT, *planes[] = {&plane};

    plane.component = KVPOOL__V1__COMPONENT__COMPONENT_K;
    plane.heads = plane.dim = 1;
    plane.dtype = KVPOOL__V1__DTYPE__DTYPE_FP8_E4M3;
    spec.name = (char *)POOL;
    spec.model = (char *)"";
    spec.pages = replay->pages;
    spec.page_tokens = 1;
    spec.n_planes = 1;
    spec.planes = planes;
    spec.max_sequences = ROWS;
    spec.max_sequence_tokens = replay->longest;
    spec.policy = replay->policy == REPLAY_LRU ? KVPOOL__V1__POLICY__POLICY_LRU : KVPOOL__V1__POLICY__POLICY_ADAPTIVE;
    request.spec = &spec;
    return call(e, "making the pool", KVPOOL__V1__METHOD__METHOD_CREATE_POOL, &request.base);
}

static uint32_t ns_between(const struct timespec *from, const struct timespec *to)
{
    int64_t ns = (int64_t)(to->tv_sec - from->tv_sec) * 1000000000 + (to->tv_nsec - from->tv_nsec);

    return ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

static enum kvp_status open_one(struct embedded *e, uint64_t key, const uint64_t *blocks, uint32_t n,
                                uint32_t *ret_open_ns)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__Blocks named = KVPOOL__V1__BLOCKS__INIT;
    struct timespec before, after;
    enum kvp_status status;

    named.n_counts = 1;
    named.counts = &n;
    named.keys = (ProtobufCBinaryData){n * REPLAY_KEY_BYTES, (uint8_t *)(uintptr_t)blocks};
    named.key_bytes = REPLAY_KEY_BYTES;
    request.pool = (char *)POOL;
    request.n_keys = 1;
    request.keys = &key;
    request.blocks = n > 0 ? &named : NULL;
    clock_gettime(CLOCK_MONOTONIC, &before);
    status = call(e, "OpenSequences", KVPOOL__V1__METHOD__METHOD_OPEN_SEQUENCES, &request.base);
    clock_gettime(CLOCK_MONOTONIC, &after);
    *ret_open_ns = ns_between(&before, &after);
    return status;
}

static enum kvp_status advance_one(struct embedded *e, const uint64_t *blocks, uint32_t first, uint32_t n)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    Kvpool__V1__Blocks named = KVPOOL__V1__BLOCKS__INIT;
    uint32_t count = n - first;

    named.n_counts = named.n_first = 1;
    named.counts = &count;
    named.first = &first;
    named.keys = (ProtobufCBinaryData){count * REPLAY_KEY_BYTES, (uint8_t *)(uintptr_t)(blocks + first)};
    named.key_bytes = REPLAY_KEY_BYTES;
    request.pool = (char *)POOL;
    request.n_seqs = request.n_reserved = request.n_written = 1;
    request.seqs = &e->seq;
    request.reserved = request.written = &n;
    request.blocks = &named;
    return call(e, "Advance", KVPOOL__V1__METHOD__METHOD_ADVANCE, &request.base);
}

static enum kvp_status close_one(struct embedded *e)
{
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;

    request.pool = (char *)POOL;
    request.n_seqs = 1;
    request.seqs = &e->seq;
    return call(e, "CloseSequences", KVPOOL__V1__METHOD__METHOD_CLOSE_SEQUENCES, &request.base);
}

static enum kvp_status serve(struct embedded *e, const struct replay *replay, size_t i, struct replay_times *times)
{
    const uint64_t *blocks = trace_blocks(replay->trace, i);
    uint32_t n = replay->trace->requests[i].n_blocks, kept = n < replay->pages ? n : replay->pages;
    enum kvp_status status = open_one(e, i + 1, blocks, n, &times->open_ns[i]);

    if (status == KVP_OK) {
        times->hits[i] = e->cached;
        if (e->cached < kept)
            status = advance_one(e, blocks, e->cached, kept);
    }
    if (status == KVP_OK)
        status = close_one(e);
    return status;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static enum kvp_status begin(struct embedded *e, const struct replay *replay)
{
    struct kvp_core_config config = {.version = KVPOOL_VERSION, .backend = "host"};
    struct kvp_uuid instance = {{1}};
    enum kvp_status status;

    e->error.what = "starting a core";
    e->random = 1;
    e->wake_ms = UINT64_MAX;
    e->now_ms = 1;
    e->block_bytes = kvp_ledger_root_bytes() + LEDGER_SPARE + (size_t)replay->pages * PAGE_BYTES_OF_LEDGER +
                     (size_t)ROWS * replay->longest * sizeof(uint64_t);
    e->block_bytes = (e->block_bytes + 4095) / 4096 * 4096;
    e->block = mmap(NULL, e->block_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (e->block == MAP_FAILED)
        return KVP_ENOMEM;
    status = kvp_ledger_format(&e->ledger, e->block, e->block, e->block_bytes, instance);
    if (status == KVP_OK)
        status = kvp_core_create(&config, &actions, e, &e->ledger, e->now_ms, &e->core);
    if (status == KVP_OK) {
        e->call.caller = (struct kvp_caller){.door = KVP_DOOR_SOCKET, .known = true, .pid = EXECUTOR_PID};
        status = kvp_core_connect(e->core, &e->call.caller, 1, &e->call.caller.session);
    }
    return status;
}

static void end(struct embedded *e)
{
    if (e->core != NULL)
        kvp_core_destroy(e->core);
    for (unsigned i = 0; i < THINGS_MAX; i++)
        free(e->things[i].memory);
    if (e->block != NULL && e->block != MAP_FAILED)
        munmap(e->block, e->block_bytes);
    free(e);
}

static enum kvp_status count_evictions(struct embedded *e)
{
    Kvpool__V1__DescribePoolRequest request = KVPOOL__V1__DESCRIBE_POOL_REQUEST__INIT;

    request.pool = (char *)POOL;
    return call(e, "DescribePool", KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, &request.base);
}

enum kvp_status replay_embedded(const struct replay *replay, struct replay_result *result,
                                struct replay_error *reterr_why)
{
    struct embedded *e = calloc(1, sizeof(*e));
    struct timespec start, stop;
    enum kvp_status status;

    if (e == NULL)
        return KVP_ENOMEM;
    status = begin(e, replay);
    if (status == KVP_OK)
        status = make_pool(e, replay);
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (size_t i = 0; status == KVP_OK && i < replay->trace->n; i++) {
        status = i % REPLAY_PROGRESS_EVERY == 0 && !replay->progress(replay, i) ? KVP_ETIMEDOUT
                                                                                : serve(e, replay, i, &result->times);
    }
    clock_gettime(CLOCK_MONOTONIC, &stop);
    result->seconds = (double)(stop.tv_sec - start.tv_sec) + (double)(stop.tv_nsec - start.tv_nsec) / 1e9;
    if (status == KVP_OK)
        status = count_evictions(e);
    result->evictions = e->evictions;
    if (status != KVP_OK)
        *reterr_why = e->error;
    end(e);
    return status;
}
