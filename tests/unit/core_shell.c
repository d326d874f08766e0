/**
 * The shell of core_shell.h: actions, events, calls, time. The executors' side is core_shell_exec.c, the requests are
 * in core_shell_calls.c.
 */
#include "core_shell.h"
#include "core_shell_exec.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define BLOCK_BYTES (256ull << 20)

/* ---- memory and things ------------------------------------------------------------------------------------------- */

struct shell_memory *shell_memory(uint64_t bytes)
{
    struct shell_memory *memory = calloc(1, sizeof(*memory));
    ck_assert_ptr_nonnull(memory);
    memory->bytes = calloc(1, bytes);
    ck_assert_ptr_nonnull(memory->bytes);
    memory->size = bytes;
    memory->holders = 1;
    return memory;
}

void shell_memory_release(struct shell_memory *memory)
{
    if (memory == NULL || --memory->holders != 0)
        return;
    free(memory->bytes);
    free(memory);
}

struct shell_thing *shell_find_thing(struct shell *shell, struct kvp_thing thing)
{
    for (unsigned i = 0; i < SHELL_THINGS_MAX; i++) {
        struct shell_thing *t = &shell->things[i];
        if (t->used && t->thing.kind == thing.kind && t->thing.a == thing.a && t->thing.b == thing.b)
            return t;
    }
    return NULL;
}

unsigned char *shell_thing(struct shell *shell, struct kvp_thing thing)
{
    struct shell_thing *t = shell_find_thing(shell, thing);
    return t == NULL ? NULL : t->memory->bytes;
}

unsigned shell_thing_count(const struct shell *shell, enum kvp_thing_kind kind)
{
    unsigned n = 0;
    for (unsigned i = 0; i < SHELL_THINGS_MAX; i++)
        n += shell->things[i].used && shell->things[i].thing.kind == kind;
    return n;
}

void shell_event(struct shell *shell, const struct shell_event *event)
{
    ck_assert_uint_lt(shell->n_events, SHELL_EVENTS_MAX);
    shell->events[shell->n_events++] = *event;
}

static void thing_add(struct shell *shell, struct kvp_thing thing, struct shell_memory *memory)
{
    unsigned i = 0;
    ck_assert_msg(shell_find_thing(shell, thing) == NULL, "thing %c.%u.%u is made twice", thing.kind, thing.a, thing.b);
    while (shell->things[i].used)
        i++;
    ck_assert_uint_lt(i, SHELL_THINGS_MAX);
    shell->things[i] = (struct shell_thing){.used = true, .thing = thing, .memory = memory};
    struct shell_event event = {.kind = EVENT_THING, .thing = thing, .status = shell->fail_thing};
    shell->fail_thing = KVP_OK;
    shell_event(shell, &event);
}

static void act_thing_make(void *ctx, struct kvp_thing thing, uint64_t bytes)
{
    thing_add(ctx, thing, shell_memory(bytes));
}

static void act_thing_keep(void *ctx, struct kvp_thing thing, struct kvp_message *from, unsigned index)
{
    struct shell *shell = ctx;
    ck_assert_uint_lt(index, from->n_fds);
    struct shell_memory *memory = shell->fds[from->fds[index]];
    ck_assert_ptr_nonnull(memory);
    memory->holders++;
    thing_add(shell, thing, memory);
}

/* No event comes of a thing that was dropped. */
static void act_thing_drop(void *ctx, struct kvp_thing thing)
{
    struct shell *shell = ctx;
    struct shell_thing *t = shell_find_thing(shell, thing);
    ck_assert_msg(t != NULL, "thing %c.%u.%u is dropped, but is not there", thing.kind, thing.a, thing.b);
    for (unsigned i = 0; i < shell->n_events;) {
        struct shell_event *e = &shell->events[i];
        if (e->kind == EVENT_THING && e->thing.kind == thing.kind && e->thing.a == thing.a && e->thing.b == thing.b)
            memmove(e, e + 1, (--shell->n_events - i) * sizeof(*e));
        else
            i++;
    }
    shell_memory_release(t->memory);
    memset(t, 0, sizeof(*t));
}

/* ---- other actions ----------------------------------------------------------------------------------------------- */

static void act_reply(void *ctx, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                      const struct kvp_thing *things, unsigned n_things)
{
    struct shell *shell = ctx;
    struct shell_call *mine = (struct shell_call *)call;
    ck_assert_msg(!mine->answered, "method %u is answered twice", call->message.method);
    const ProtobufCMessageDescriptor *type =
        status == KVP_OK ? kvp_method_by_number(call->message.method)->reply : &kvpool__v1__error__descriptor;
    ck_assert_ptr_eq(reply->descriptor, type);
    size_t n = protobuf_c_message_get_packed_size(reply);
    uint8_t *packed = malloc(n + 1);
    ck_assert_ptr_nonnull(packed);
    protobuf_c_message_pack(reply, packed);
    mine->reply = protobuf_c_message_unpack(type, NULL, n, packed);
    free(packed);
    ck_assert_msg(mine->reply != NULL, "the reply to method %u can not be unpacked", call->message.method);
    ck_assert_uint_le(n_things, KVP_GPUS_MAX + 4);
    for (unsigned i = 0; i < n_things; i++) {
        struct shell_thing *thing = shell_find_thing(shell, things[i]);
        ck_assert_msg(thing != NULL && thing->ready, "a reply names a thing that is not there");
        mine->things[i] = things[i];
    }
    mine->n_things = n_things;
    mine->status = status;
    mine->answered = true;
}

static enum kvp_status act_ledger_back(void *ctx, uint64_t offset, uint64_t bytes)
{
    struct shell *shell = ctx;
    enum kvp_status status = shell->fail_back;
    shell->fail_back = KVP_OK;
    if (status == KVP_OK && (offset > shell->block_bytes || bytes > shell->block_bytes - offset))
        return KVP_ELIMIT;
    return status;
}

static void act_ledger_unback(void *ctx, uint64_t offset, uint64_t bytes)
{
    struct shell *shell = ctx;
    ck_assert_int_eq(madvise(shell->block + offset, bytes, MADV_DONTNEED), 0);
}

static unsigned char *act_snapshot_make(void *ctx, uint64_t used)
{
    struct shell *shell = ctx;
    ck_assert_msg(!shell->snapshot_out, "there is a snapshot already");
    ck_assert_uint_le(used, shell->block_bytes);
    if (shell->fail_snapshot)
        return NULL;
    void *at =
        mmap(NULL, shell->block_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ck_assert_ptr_ne(at, MAP_FAILED);
    shell->snapshot_out = true;
    shell->snapshots++;
    return at;
}

static void act_snapshot_drop(void *ctx, unsigned char *memory)
{
    struct shell *shell = ctx;
    ck_assert(shell->snapshot_out);
    shell->snapshot_out = false;
    ck_assert_int_eq(munmap(memory, shell->block_bytes), 0);
}

static void note_violation(void *arg, const char *violation)
{
    struct kvp_audit_report *report = arg;
    if (report->n_texts < KVP_VIOLATIONS_SHOWN)
        snprintf(report->texts[report->n_texts++], KVP_VIOLATION_BYTES_MAX, "%s", violation);
}

static void act_snapshot_audit(void *ctx, const struct kvp_ledger *snapshot)
{
    struct shell *shell = ctx;
    struct shell_event event = {.kind = EVENT_AUDITED};
    void *scratch = malloc(kvp_audit_scratch_bytes(snapshot));
    ck_assert_ptr_nonnull(scratch);
    shell->audited = (struct kvp_audit_report){.unix_ms = shell->now_ms};
    shell->audited.violations = kvp_audit(snapshot, scratch, note_violation, &shell->audited);
    free(scratch);
    act_snapshot_drop(shell, (unsigned char *)(uintptr_t)snapshot->view);
    shell_event(shell, &event);
}

static void act_session_hangup(void *ctx, struct kvp_session_id session)
{
    ((struct shell *)ctx)->hung_up = session;
}

static void act_wake_at(void *ctx, uint64_t at_ms)
{
    ((struct shell *)ctx)->wake_ms = at_ms;
}

static void act_log(void *ctx, int level, const char *line)
{
    struct shell *shell = ctx;
    shell->log_lines++;
    snprintf(shell->log_last, sizeof(shell->log_last), "<%d>%s", level, line);
    if (shell->print_log)
        fprintf(stderr, "<%d>%s\n", level, line);
}

static bool act_random(void *ctx, void *ret_bytes, size_t n)
{
    struct shell *shell = ctx;
    for (size_t i = 0; i < n; i++) {
        shell->random = shell->random * 6364136223846793005ull + 1442695040888963407ull;
        ((unsigned char *)ret_bytes)[i] = (unsigned char)(shell->random >> 56);
    }
    return true;
}

static void act_since_start(void *ctx, uint64_t *ret_us, uint64_t *ret_unix_ms)
{
    struct shell *shell = ctx;
    *ret_us = shell->now_ms * 1000 + 1;
    *ret_unix_ms = 1;
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
    .exec_start = shell_exec_start,
    .exec_send = shell_exec_send,
    .exec_stop = shell_exec_stop,
    .session_hangup = act_session_hangup,
    .wake_at = act_wake_at,
    .log = act_log,
    .since_start = act_since_start,
    .random = act_random,
};

/* ---- events ------------------------------------------------------------------------------------------------------ */

static void hand_reply(struct shell *shell, struct shell_event *event)
{
    int fds[1] = {0};
    struct kvp_message message = {.method = event->method, .tag = event->tag, .body = event->body, .fds = fds};
    if (event->fd != NULL) {
        while (shell->fds[fds[0]] != NULL)
            fds[0]++;
        shell->fds[fds[0]] = event->fd;
        message.n_fds = 1;
    }
    if (shell->executors[event->executor].running && shell->executors[event->executor].starts == event->start)
        kvp_core_exec_reply(shell->core, event->executor, event->status, &message);
    if (event->fd != NULL) {
        shell->fds[fds[0]] = NULL;
        shell_memory_release(event->fd);
    }
    if (event->body != NULL)
        protobuf_c_message_free_unpacked(event->body, NULL);
}

static void hand_thing(struct shell *shell, const struct shell_event *event)
{
    struct shell_thing *t = shell_find_thing(shell, event->thing);
    ck_assert_ptr_nonnull(t);
    bool mapped = event->thing.kind != KVP_THING_SLAB && event->thing.kind != KVP_THING_BUFFER;
    t->ready = event->status == KVP_OK;
    kvp_core_thing_ready(shell->core, event->thing, event->status, mapped ? t->memory->bytes : NULL, t->memory->size);
}

bool shell_step(struct shell *shell)
{
    unsigned i = 0;
    while (i < shell->n_events && shell->events[i].kind == EVENT_THING && shell->hold_things)
        i++;
    if (i == shell->n_events)
        return false;
    struct shell_event event = shell->events[i];
    memmove(&shell->events[i], &shell->events[i + 1], (--shell->n_events - i) * sizeof(event));
    switch (event.kind) {
    case EVENT_THING:
        hand_thing(shell, &event);
        break;
    case EVENT_UP:
        if (shell->executors[event.executor].running && shell->executors[event.executor].starts == event.start)
            kvp_core_exec_up(shell->core, event.executor, shell->executors[event.executor].pid);
        break;
    case EVENT_REPLY:
        hand_reply(shell, &event);
        break;
    case EVENT_GONE:
        kvp_core_exec_gone(shell->core, event.executor);
        break;
    case EVENT_AUDITED:
        ck_assert_msg(shell->spoiled || shell->audited.violations == 0, "an audit found: %s", shell->audited.texts[0]);
        shell->audits++;
        kvp_core_audited(shell->core, &shell->audited);
        break;
    }
    return true;
}

void shell_pump(struct shell *shell)
{
    unsigned steps = 0;
    while (shell_step(shell))
        ck_assert_uint_lt(steps++, 1000000);
}

/* As a timer does: what the core asked to be woken at is used up. */
void shell_tick(struct shell *shell)
{
    if (shell->wake_ms <= shell->now_ms)
        shell->wake_ms = UINT64_MAX;
    kvp_core_tick(shell->core, shell->now_ms);
}

void shell_run_ms(struct shell *shell, uint64_t ms)
{
    uint64_t until = shell->now_ms + ms;
    unsigned ticks = 0;
    shell_pump(shell);
    while (shell->wake_ms <= until) {
        if (shell->wake_ms > shell->now_ms)
            shell->now_ms = shell->wake_ms;
        shell_tick(shell);
        shell_pump(shell);
        ck_assert_msg(ticks++ < 1000000, "the core is never idle");
    }
    shell->now_ms = until;
    shell_tick(shell);
    shell_pump(shell);
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

struct kvp_caller shell_connect(struct shell *shell, uint32_t uid, uint32_t pid)
{
    struct kvp_caller caller = {.door = KVP_DOOR_SOCKET, .known = true, .pid = pid, .uid = uid, .gid = uid};
    ck_assert_int_eq(kvp_core_connect(shell->core, &caller, 1, &caller.session), KVP_OK);
    return caller;
}

struct kvp_caller shell_grpc(uint32_t uid, uint32_t pid)
{
    return (struct kvp_caller){.door = KVP_DOOR_GRPC, .known = true, .pid = pid, .uid = uid, .gid = uid};
}

struct kvp_caller shell_tcp(void)
{
    return (struct kvp_caller){.door = KVP_DOOR_TCP};
}

struct shell_call *shell_send(struct shell *shell, struct kvp_caller caller, uint16_t method,
                              const ProtobufCMessage *body, struct shell_memory *fd)
{
    struct shell_call *call = calloc(1, sizeof(*call));
    ck_assert_ptr_nonnull(call);
    size_t n = protobuf_c_message_get_packed_size(body);
    uint8_t *packed = malloc(n + 1);
    ck_assert_ptr_nonnull(packed);
    protobuf_c_message_pack(body, packed);
    call->call.caller = caller;
    call->call.message.method = method;
    call->call.message.body = protobuf_c_message_unpack(body->descriptor, NULL, n, packed);
    ck_assert_ptr_nonnull(call->call.message.body);
    free(packed);
    if (fd != NULL) {
        while (shell->fds[call->fds[0]] != NULL)
            call->fds[0]++;
        shell->fds[call->fds[0]] = fd;
        call->call.message.fds = call->fds;
        call->call.message.n_fds = 1;
    }
    call->next = shell->calls;
    shell->calls = call;
    kvp_core_call(shell->core, &call->call);
    return call;
}

struct shell_call *shell_call(struct shell *shell, struct kvp_caller caller, uint16_t method,
                              const ProtobufCMessage *body)
{
    struct shell_call *call = shell_send(shell, caller, method, body, NULL);
    for (unsigned i = 0; !call->answered; i++) {
        ck_assert_msg(i < 10000, "method %u is never answered", method);
        if (!shell_step(shell)) {
            shell_jobs_run(shell, 1); /* it may wait for one that is held */
            if (shell->n_events != 0)
                continue;
            ck_assert_msg(shell->wake_ms != UINT64_MAX, "method %u waits, and nothing is due", method);
            if (shell->wake_ms > shell->now_ms)
                shell->now_ms = shell->wake_ms;
            shell_tick(shell);
        }
    }
    return call;
}

static void call_unlink(struct shell *shell, struct shell_call *call)
{
    struct shell_call **link = &shell->calls;
    while (*link != call)
        link = &(*link)->next;
    *link = call->next;
    if (call->call.message.n_fds != 0)
        shell->fds[call->fds[0]] = NULL;
    protobuf_c_message_free_unpacked(call->call.message.body, NULL);
    if (call->reply != NULL)
        protobuf_c_message_free_unpacked(call->reply, NULL);
    free(call);
}

void shell_call_free(struct shell *shell, struct shell_call *call)
{
    ck_assert_msg(call->answered, "method %u is not answered", call->call.message.method);
    call_unlink(shell, call);
}

void shell_call_gone(struct shell *shell, struct shell_call *call)
{
    ck_assert(!call->answered);
    kvp_core_call_gone(shell->core, &call->call);
    call_unlink(shell, call);
}

const char *shell_error(const struct shell_call *call)
{
    ck_assert(call->answered && call->status != KVP_OK);
    return ((const Kvpool__V1__Error *)call->reply)->message;
}

uint64_t shell_missing(const struct shell_call *call)
{
    ck_assert(call->answered && call->status != KVP_OK);
    return ((const Kvpool__V1__Error *)call->reply)->missing;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

struct shell *shell_begin(const char *backend)
{
    return shell_begin_sliced(backend, 0);
}

struct shell *shell_begin_sliced(const char *backend, uint32_t reclaim_slice)
{
    struct shell *shell = calloc(1, sizeof(*shell));
    ck_assert_ptr_nonnull(shell);
    shell->block_bytes = BLOCK_BYTES;
    shell->block = mmap(NULL, BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ck_assert_ptr_ne(shell->block, MAP_FAILED);
    struct kvp_uuid instance = {{1, 2, 3, 4, 5, 6, 7, 8}};
    ck_assert_int_eq(kvp_ledger_format(&shell->ledger, shell->block, shell->block, BLOCK_BYTES, instance), KVP_OK);
    shell->config = (struct kvp_core_config){
        .version = "test", .backend = backend, .lease_default_ms = 30000, .reclaim_slice = reclaim_slice};
    shell->now_ms = 1000;
    shell->wake_ms = UINT64_MAX;
    shell->random = 1;
    shell->print_log = getenv("KVP_TEST_LOG") != NULL;
    ck_assert_int_eq(kvp_core_create(&shell->config, &actions, shell, &shell->ledger, shell->now_ms, &shell->core),
                     KVP_OK);
    return shell;
}

static void report(void *arg, const char *violation)
{
    (void)arg;
    fprintf(stderr, "audit: %s\n", violation);
}

void shell_audit(struct shell *shell)
{
    void *scratch = malloc(kvp_audit_scratch_bytes(&shell->ledger));
    ck_assert_ptr_nonnull(scratch);
    uint64_t violations = kvp_audit(&shell->ledger, scratch, report, NULL);
    free(scratch);
    ck_assert_uint_eq(violations, 0);
}

/* What was parked; what was not is gone with the daemon. Answers of executors stay on their sockets. */
static void announce_things(struct shell *shell)
{
    for (unsigned i = 0; i < shell->n_events;) {
        if (shell->events[i].kind == EVENT_THING || shell->events[i].kind == EVENT_AUDITED)
            memmove(&shell->events[i], &shell->events[i + 1], (--shell->n_events - i) * sizeof(shell->events[0]));
        else
            i++;
    }
    for (unsigned i = 0; i < SHELL_THINGS_MAX; i++) {
        struct shell_thing *t = &shell->things[i];
        struct shell_event event = {.kind = EVENT_THING, .thing = t->thing};
        if (t->used && t->ready) {
            hand_thing(shell, &event);
        } else if (t->used) {
            shell_memory_release(t->memory);
            memset(t, 0, sizeof(*t));
        }
    }
}

void shell_restart(struct shell *shell, const struct kvp_session_id *sessions, unsigned n)
{
    const char *why = "";
    kvp_core_destroy(shell->core);
    while (shell->calls != NULL)
        call_unlink(shell, shell->calls);
    shell->wake_ms = UINT64_MAX;
    ck_assert_msg(kvp_ledger_open(&shell->ledger, shell->block, shell->block, shell->block_bytes, &why) == KVP_OK,
                  "the ledger is refused: %s", why);
    ck_assert_int_eq(kvp_core_create(&shell->config, &actions, shell, &shell->ledger, shell->now_ms, &shell->core),
                     KVP_OK);
    announce_things(shell);
    for (unsigned i = 0; i < n; i++)
        kvp_core_session_adopted(shell->core, sessions[i]);
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        if (shell->executors[i].running)
            kvp_core_exec_adopted(shell->core, i);
    }
    kvp_core_opened(shell->core);
    shell_run_ms(shell, 0);
}

void shell_end(struct shell *shell)
{
    shell_pump(shell);
    shell_audit(shell);
    kvp_core_destroy(shell->core);
    while (shell->calls != NULL)
        call_unlink(shell, shell->calls);
    for (unsigned i = 0; i < shell->n_events; i++) {
        if (shell->events[i].body != NULL)
            protobuf_c_message_free_unpacked(shell->events[i].body, NULL);
        shell_memory_release(shell->events[i].fd);
    }
    for (unsigned i = 0; i < KVP_GPUS_MAX; i++)
        shell_exec_clear(&shell->executors[i]);
    for (unsigned i = 0; i < SHELL_THINGS_MAX; i++) {
        if (shell->things[i].used)
            shell_memory_release(shell->things[i].memory);
    }
    ck_assert(!shell->snapshot_out);
    munmap(shell->block, shell->block_bytes);
    free(shell);
}
