/* The shell around the core; see shell.h. */
#include "shell.h"

#include "adoption.h"
#include "auditor.h"
#include "core.h"
#include "executor.h"
#include "fdstore.h"
#include "inherit.h"
#include "ledger_block.h"
#include "listen.h"
#include "log.h"
#include "peer.h"
#include "rpc.h"
#include "session_door.h"
#include "things.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

#define END_MS 2000 /* for executors to end, and what is left of gRPC */

enum phase { PHASE_SERVING, PHASE_DRAINING, PHASE_ENDING };

struct kvp_shell {
    const struct kvp_config *config;
    const char *backend;
    uv_loop_t loop;
    struct kvp_clock clock;
    struct kvp_later_queue later;
    struct kvp_inherited inherited; /* from the service manager; empty once all has found its place */
    struct kvp_fdstore *store;
    struct kvp_place place;
    struct kvp_ledger_block block;
    struct kvp_ledger ledger;
    struct kvp_auditor *auditor;
    struct kvp_core *core;
    struct kvp_things *things;
    struct kvp_executors *executors;
    struct kvp_session_door *door;
    struct kvp_rpc *rpc; /* NULL: not served, or stopped */
    uv_timer_t wake, watchdog, limit;
    uv_signal_t on_term, on_int;
    uv_check_t after_events; /* active while stopping */
    uv_poll_t unwanted;      /* a gRPC socket that is not to be served */
    enum phase phase;
    unsigned connections_adopted;
    bool complained; /* an error was logged: what went wrong at the start has been said */
};

#define COMPLAIN(shell, ...) ((shell)->complained = true, kvp_log(LOG_ERR, __VA_ARGS__))

/* ---- actions: what the core asks for ----------------------------------------------------------------------------- */

/* @return false: one of them is not there (the core asked for what it had not made: a fault of ours) */
static bool fds_of(struct kvp_shell *shell, const struct kvp_thing *things, unsigned n, int *ret_fds)
{
    for (unsigned i = 0; i < n; i++) {
        int fd = i < KVP_MESSAGE_FDS_MAX ? kvp_things_fd(shell->things, things[i]) : -1;

        if (fd < 0) {
            kvp_log(LOG_CRIT, "thing %c%u.%u is to be sent and is not there", things[i].kind, things[i].a, things[i].b);
            return false;
        }
        ret_fds[i] = fd;
    }
    return true;
}

static void act_reply(void *ctx, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                      const struct kvp_thing *things, unsigned n_things)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    struct kvp_shell *shell = ctx;
    int fds[KVP_MESSAGE_FDS_MAX];

    if (call->caller.door != KVP_DOOR_SOCKET) {
        kvp_rpc_reply(shell->rpc, call, status, reply);
        return;
    }
    if (fds_of(shell, things, n_things, fds)) {
        kvp_session_door_reply(shell->door, call, status, reply, fds, n_things);
        return;
    }
    error.status = KVP_EINTERNAL;
    error.message = (char *)"a file descriptor of the reply is not there";
    kvp_session_door_reply(shell->door, call, KVP_EINTERNAL, &error.base, NULL, 0);
}

static void act_thing_make(void *ctx, struct kvp_thing thing, uint64_t bytes)
{
    kvp_things_make(((struct kvp_shell *)ctx)->things, thing, bytes);
}

static void act_thing_keep(void *ctx, struct kvp_thing thing, struct kvp_message *from, unsigned index)
{
    int fd = index < from->n_fds ? from->fds[index] : -1;

    if (fd >= 0)
        from->fds[index] = -1;
    kvp_things_keep(((struct kvp_shell *)ctx)->things, thing, fd);
}

static void act_thing_drop(void *ctx, struct kvp_thing thing)
{
    kvp_things_drop(((struct kvp_shell *)ctx)->things, thing);
}

static enum kvp_status act_ledger_back(void *ctx, uint64_t offset, uint64_t bytes)
{
    return kvp_ledger_block_back(&((struct kvp_shell *)ctx)->block, offset, bytes);
}

static void act_ledger_unback(void *ctx, uint64_t offset, uint64_t bytes)
{
    kvp_ledger_block_unback(&((struct kvp_shell *)ctx)->block, offset, bytes);
}

static unsigned char *act_snapshot_make(void *ctx, uint64_t used)
{
    return kvp_auditor_memory(((struct kvp_shell *)ctx)->auditor, used);
}

static void act_snapshot_drop(void *ctx, unsigned char *memory)
{
    kvp_auditor_drop(((struct kvp_shell *)ctx)->auditor, memory);
}

static void act_snapshot_audit(void *ctx, const struct kvp_ledger *snapshot)
{
    kvp_auditor_run(((struct kvp_shell *)ctx)->auditor, snapshot);
}

static void act_exec_start(void *ctx, uint32_t executor, const char *device)
{
    kvp_executors_start(((struct kvp_shell *)ctx)->executors, executor, device);
}

static void act_exec_send(void *ctx, uint32_t executor, uint16_t method, uint64_t tag, const ProtobufCMessage *body,
                          const struct kvp_thing *things, unsigned n_things)
{
    struct kvp_shell *shell = ctx;
    int fds[KVP_MESSAGE_FDS_MAX];

    if (!fds_of(shell, things, n_things, fds))
        n_things = 0; /* the executor refuses it: fds are missing */
    kvp_executors_send(shell->executors, executor, method, tag, body, fds, n_things);
}

static void act_exec_stop(void *ctx, uint32_t executor)
{
    kvp_executors_stop(((struct kvp_shell *)ctx)->executors, executor);
}

static void act_session_hangup(void *ctx, struct kvp_session_id session)
{
    struct kvp_shell *shell = ctx;

    if (shell->door != NULL)
        kvp_session_door_hangup(shell->door, session);
}

static void on_wake(uv_timer_t *timer)
{
    struct kvp_shell *shell = timer->data;

    shell->clock.told_ms = uv_now(&shell->loop);
    kvp_core_tick(shell->core, shell->clock.told_ms);
}

static void act_wake_at(void *ctx, uint64_t at_ms)
{
    struct kvp_shell *shell = ctx;
    uint64_t now_ms = uv_now(&shell->loop);

    if (at_ms == UINT64_MAX)
        uv_timer_stop(&shell->wake);
    else
        uv_timer_start(&shell->wake, on_wake, at_ms > now_ms ? at_ms - now_ms : 0, 0);
}

static void act_log(void *ctx, int level, const char *line)
{
    ((struct kvp_shell *)ctx)->complained |= level <= LOG_ERR;
    kvp_log(level, "%s", line);
}

/* The kernel keeps a process's start in clock ticks: what is told is up to one tick (10 ms) too long, never too short. */
static void act_since_start(void *ctx, uint64_t *ret_us, uint64_t *ret_unix_ms)
{
    uint64_t ticks = kvp_process_start_time((uint32_t)getpid()), ticks_s = (uint64_t)sysconf(_SC_CLK_TCK), start_us;
    struct timespec boot, real;

    (void)ctx;
    clock_gettime(CLOCK_BOOTTIME, &boot);
    clock_gettime(CLOCK_REALTIME, &real);
    *ret_us = (uint64_t)boot.tv_sec * 1000000 + (uint64_t)boot.tv_nsec / 1000;
    start_us = ticks * 1000000 / ticks_s;
    *ret_us = *ret_us > start_us ? *ret_us - start_us : 0;
    *ret_unix_ms = (uint64_t)real.tv_sec * 1000 + (uint64_t)real.tv_nsec / 1000000;
}

static bool act_random(void *ctx, void *ret_bytes, size_t n)
{
    unsigned char *at = ret_bytes;

    (void)ctx;
    while (n > 0) {
        ssize_t got = getrandom(at, n, 0);

        if (got < 0 && errno != EINTR)
            return false;
        if (got > 0) {
            at += got;
            n -= (size_t)got;
        }
    }
    return true;
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

static void thing_ready(void *ctx, struct kvp_thing thing, enum kvp_status status, void *address, uint64_t bytes)
{
    struct kvp_shell *shell = ctx;

    kvp_clock_tell(&shell->clock);
    kvp_core_thing_ready(shell->core, thing, status, address, bytes);
}

static void audited(void *arg, const struct kvp_audit_report *report)
{
    struct kvp_shell *shell = arg;

    kvp_clock_tell(&shell->clock);
    kvp_core_audited(shell->core, report);
}

/* It may be heard of in the middle of anything: nothing is done but to say it. */
static void keeper_gone(void *arg)
{
    struct kvp_shell *shell = arg;

    kvp_log(LOG_CRIT, "the service manager has died: nobody keeps the memory, and a restart of this daemon would lose it");
    if (shell->core != NULL)
        kvp_core_keeper(shell->core, KVPOOL__V1__KEEPER__KEEPER_GONE);
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

static void limit_reached(uv_timer_t *timer)
{
    (void)timer; /* on_check sees that it is not active any more */
}

/* Further, as far as it goes. */
static void end_step(struct kvp_shell *shell)
{
    bool expired = !uv_is_active((uv_handle_t *)&shell->limit);

    if (shell->phase == PHASE_DRAINING) {
        unsigned calls = kvp_core_drain(shell->core);

        if (!expired && (calls > 0 || shell->rpc != NULL || kvp_session_door_unsent(shell->door) > 0))
            return;
        if (calls > 0)
            kvp_log(LOG_WARNING, "stopping with %u calls in hand: daemon.stop_ms is over", calls);
        shell->phase = PHASE_ENDING;
        kvp_executors_stop_all(shell->executors);
        uv_timer_start(&shell->limit, limit_reached, END_MS, 0);
        expired = false;
    }
    if (expired || (kvp_executors_ending(shell->executors) == 0 && shell->rpc == NULL))
        uv_stop(&shell->loop);
}

static void on_check(uv_check_t *check)
{
    end_step(check->data);
}

static void rpc_stopped(void *arg)
{
    struct kvp_shell *shell = arg;

    shell->rpc = NULL;
    end_step(shell); /* this comes behind the loop's checks, which would be the last event for a while */
}

static void on_signal(uv_signal_t *signal, int number)
{
    struct kvp_shell *shell = signal->data;

    if (shell->phase != PHASE_SERVING) {
        kvp_log(LOG_NOTICE, "signal %d again: ending at once", number);
        uv_timer_stop(&shell->limit);
        return;
    }
    kvp_log(LOG_INFO, "signal %d: finishing the calls in hand", number);
    kvp_fdstore_notify(shell->store, "STOPPING=1\nSTATUS=stopping");
    shell->phase = PHASE_DRAINING;
    kvp_clock_tell(&shell->clock);
    kvp_core_drain(shell->core);
    kvp_session_door_drain(shell->door);
    if (shell->rpc != NULL)
        kvp_rpc_stop(shell->rpc, rpc_stopped, shell);
    uv_timer_start(&shell->limit, limit_reached, shell->config->daemon.stop_ms, 0);
    uv_check_start(&shell->after_events, on_check);
}

/* ---- the beginning ----------------------------------------------------------------------------------------------- */

static bool has_gpu(void)
{
    char path[24];

    if (access("/dev/nvidiactl", F_OK) != 0)
        return false;
    for (int i = 0; i < KVP_GPUS_MAX; i++) {
        snprintf(path, sizeof(path), "/dev/nvidia%d", i);
        if (access(path, F_OK) == 0)
            return true;
    }
    return false;
}

static enum kvp_status choose_backend(struct kvp_shell *shell)
{
    uint64_t wanted = shell->config->daemon.backend;

    if (wanted == KVP_BACKEND_CUDA && !KVPOOL_HAVE_CUDA) {
        COMPLAIN(shell, "daemon.backend = cuda: this kvpool was built without CUDA");
        return KVP_ENODEV;
    }
    if (wanted == KVP_BACKEND_CUDA && !has_gpu()) {
        COMPLAIN(shell, "daemon.backend = cuda: there is no NVIDIA GPU here (/dev/nvidiactl, /dev/nvidia0)");
        return KVP_ENODEV;
    }
    shell->backend = wanted != KVP_BACKEND_HOST && KVPOOL_HAVE_CUDA && has_gpu() ? "cuda" : "host";
    return KVP_OK;
}

static void on_watchdog(uv_timer_t *timer)
{
    kvp_fdstore_notify(((struct kvp_shell *)timer->data)->store, "WATCHDOG=1");
}

static void open_handles(struct kvp_shell *shell)
{
    uv_timer_t *timers[] = {&shell->wake, &shell->watchdog, &shell->limit};
    uv_signal_t *signals[] = {&shell->on_term, &shell->on_int};

    for (size_t i = 0; i < sizeof(timers) / sizeof(timers[0]); i++) {
        uv_timer_init(&shell->loop, timers[i]);
        timers[i]->data = shell;
    }
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) {
        uv_signal_init(&shell->loop, signals[i]);
        signals[i]->data = shell;
    }
    uv_check_init(&shell->loop, &shell->after_events);
    shell->after_events.data = shell;
    shell->clock.loop = &shell->loop;
    kvp_later_open(&shell->later, &shell->loop);
}

static enum kvp_status open_place(struct kvp_shell *shell)
{
    const struct kvp_config *config = shell->config;
    struct kvp_place_spec spec = {.runtime_dir = config->daemon.runtime_dir,
                                  .mode = (unsigned)config->daemon.socket_mode,
                                  .group = config->daemon.socket_group,
                                  .with_grpc = config->grpc.enabled};
    char text[KVP_LISTEN_ERROR_MAX];
    enum kvp_status status = kvp_place_take(&spec, &shell->inherited, &shell->place, text);

    if (status != KVP_OK)
        COMPLAIN(shell, "%s", text);
    return status;
}

/* ---- the ledger -------------------------------------------------------------------------------------------------- */

struct waiting {
    bool done;
    enum kvp_status status;
};

static void park_done(void *arg, enum kvp_status status)
{
    *(struct waiting *)arg = (struct waiting){.done = true, .status = status};
}

/* Before anything is served the loop may be run for one purpose. */
static enum kvp_status park_and_wait(struct kvp_shell *shell, const char *name, int fd)
{
    struct waiting waiting = {.done = false};
    enum kvp_status status;

    if (!kvp_fdstore_keeps(shell->store))
        return KVP_OK;
    status = kvp_fdstore_park(shell->store, name, fd, park_done, &waiting);
    while (status == KVP_OK && !waiting.done)
        uv_run(&shell->loop, UV_RUN_ONCE);
    if (status == KVP_OK)
        status = waiting.status;
    if (status != KVP_OK)
        COMPLAIN(shell, "the service manager does not keep %s: %s", name, kvp_status_text(status));
    return status;
}

static enum kvp_status make_ledger(struct kvp_shell *shell)
{
    struct kvp_uuid instance;
    enum kvp_status status =
        kvp_ledger_block_make(shell->config->ledger.bytes, kvp_ledger_root_bytes(), &shell->block);

    if (status != KVP_OK)
        return status;
    if (!act_random(shell, instance.bytes, sizeof(instance.bytes)))
        return KVP_EINTERNAL;
    status = kvp_ledger_format(&shell->ledger, shell->block.address, shell->block.address, shell->block.bytes, instance);
    return status == KVP_OK ? park_and_wait(shell, KVP_LEDGER_NAME, shell->block.fd) : status;
}

#define VIOLATIONS_LOGGED 8

static void log_violation(void *arg, const char *violation)
{
    unsigned *n = arg;

    if ((*n)++ < VIOLATIONS_LOGGED)
        kvp_log(LOG_ERR, "the ledger that was kept: %s", violation);
}

/* All of it, before anything is served: 0.4 ms for 32 768 pages in use, 30 ms for a million. */
static enum kvp_status audit_ledger(const struct kvp_ledger *ledger, const char **reterr_why)
{
    void *scratch = malloc(kvp_audit_scratch_bytes(ledger));
    uint64_t start_ns = uv_hrtime(), violations;
    unsigned logged = 0;

    if (scratch == NULL) {
        *reterr_why = "there is no memory to audit it";
        return KVP_ENOMEM;
    }
    violations = kvp_audit(ledger, scratch, log_violation, &logged);
    free(scratch);
    if (violations == 0) {
        kvp_log(LOG_INFO, "the ledger that was kept is clean: audited in %llu us",
                (unsigned long long)((uv_hrtime() - start_ns) / 1000));
        return KVP_OK;
    }
    *reterr_why = "it is not sound";
    return KVP_ECORRUPT;
}

static enum kvp_status adopt_ledger(struct kvp_shell *shell, int fd)
{
    const char *why = "it is not a ledger's memory";
    enum kvp_status status = kvp_ledger_block_adopt(fd, kvp_ledger_root_bytes(), &shell->block);

    if (status == KVP_OK)
        status = kvp_ledger_open(&shell->ledger, shell->block.address, shell->block.address, shell->block.bytes, &why);
    else
        close(fd);
    if (status == KVP_OK)
        status = audit_ledger(&shell->ledger, &why);
    if (status != KVP_OK)
        COMPLAIN(shell, "the ledger that was kept can not be adopted: %s. " KVP_GIVING_UP_TEXT, why);
    return status;
}

static enum kvp_status open_ledger(struct kvp_shell *shell, bool discard_state)
{
    int fd = discard_state ? -1 : kvp_inherited_take(&shell->inherited, KVP_LEDGER_NAME);

    kvp_fdstore_count(shell->store, shell->inherited.n);
    if (shell->place.session_is_new)
        park_and_wait(shell, KVP_SESSION_DOOR_NAME, shell->place.session);
    if (shell->place.grpc_is_new)
        park_and_wait(shell, KVP_GRPC_DOOR_NAME, shell->place.grpc);
    if (discard_state)
        kvp_adopt_nothing_else(&shell->inherited, shell->store);
    return fd >= 0 ? adopt_ledger(shell, fd) : make_ledger(shell);
}

static enum kvp_status open_core(struct kvp_shell *shell)
{
    const struct kvp_config *config = shell->config;
    struct kvp_core_config core_config = {.version = KVPOOL_VERSION,
                                          .backend = shell->backend,
                                          .uid = getuid(),
                                          .lease_default_ms = (uint32_t)config->limits.lease_ms,
                                          .executor_start_ms = (uint32_t)config->executor.start_ms,
                                          .audit_ms = (uint32_t)config->ledger.audit_s * 1000};
    struct kvp_executors_config exec_config = {.path = config->executor.path,
                                               .backend = shell->backend,
                                               .environment = config->executor.environment};
    enum kvp_status status;

    status = kvp_things_open(&shell->loop, shell->store, &shell->later, thing_ready, shell, &shell->things);
    if (status != KVP_OK)
        return status;
    status = kvp_executors_open(&shell->loop, &shell->clock, shell->store, &shell->later, &exec_config,
                                &shell->executors);
    if (status != KVP_OK)
        return status;
    status = kvp_auditor_open(&shell->loop, shell->block.bytes, audited, shell, &shell->auditor);
    if (status != KVP_OK)
        return status;
    uv_update_time(&shell->loop);
    shell->clock.told_ms = uv_now(&shell->loop);
    status = kvp_core_create(&core_config, &actions, shell, &shell->ledger, shell->clock.told_ms, &shell->core);
    if (status != KVP_OK)
        return status;
    shell->clock.core = shell->core;
    if (kvp_fdstore_keeps(shell->store))
        kvp_core_keeper(shell->core, KVPOOL__V1__KEEPER__KEEPER_THERE);
    kvp_adopt_things(&shell->inherited, shell->things, shell->core);
    kvp_adopt_sessions(&shell->inherited, &shell->ledger, shell->core);
    kvp_adopt_executors(&shell->inherited, shell->executors, shell->core);
    kvp_core_tick(shell->core, shell->clock.told_ms);
    return KVP_OK;
}

/* ---- the doors --------------------------------------------------------------------------------------------------- */

static void rpc_log(void *ctx, int level, const char *line)
{
    act_log(ctx, level, line);
}

static void rpc_tell_time(void *ctx)
{
    kvp_clock_tell(&((struct kvp_shell *)ctx)->clock);
}

static void turn_away(uv_poll_t *poll, int status, int events)
{
    struct kvp_shell *shell = poll->data;
    int fd;

    (void)events;
    while (status == 0 && (fd = accept4(shell->place.grpc, NULL, NULL, SOCK_CLOEXEC)) >= 0)
        close(fd);
    if (status != 0 || errno != EAGAIN)
        uv_poll_stop(poll); /* there is no fd to be had: it would be asked again and again */
}

/* systemd made its socket, and listens on: who connects would wait for good. */
static enum kvp_status refuse_grpc(struct kvp_shell *shell)
{
    if (shell->place.grpc < 0)
        return KVP_OK;
    if (uv_poll_init(&shell->loop, &shell->unwanted, shell->place.grpc) != 0)
        return KVP_ENOMEM;
    shell->unwanted.data = shell;
    kvp_log(LOG_NOTICE, "grpc.enabled = no, but a socket for gRPC was handed over: who connects is turned away");
    return uv_poll_start(&shell->unwanted, UV_READABLE, turn_away) == 0 ? KVP_OK : KVP_ENOMEM;
}

static enum kvp_status open_doors(struct kvp_shell *shell)
{
    const struct kvp_config *config = shell->config;
    struct kvp_session_door_config door = {.listen_fd = shell->place.session,
                                           .connections = (uint32_t)config->limits.connections,
                                           .unpack_bytes = config->limits.unpack_bytes};
    struct kvp_rpc_config rpc = {.unix_listen_fd = shell->place.grpc,
                                 .max_message_bytes = (uint32_t)config->grpc.message_bytes,
                                 .max_streams = (uint32_t)config->grpc.streams,
                                 .max_connections = (uint32_t)config->grpc.connections,
                                 .grace_ms = (uint32_t)config->daemon.stop_ms,
                                 .log = rpc_log,
                                 .tell_time = rpc_tell_time,
                                 .ctx = shell};
    enum kvp_status status;

    status = kvp_session_door_open(&shell->loop, &shell->clock, shell->core, &shell->ledger, shell->store,
                                   &shell->later, &door, &shell->door);
    if (status != KVP_OK)
        return status;
    shell->connections_adopted = kvp_adopt_connections(&shell->inherited, &shell->ledger, shell->core, shell->door,
                                                       shell->store);
    kvp_adopt_nothing_else(&shell->inherited, shell->store);
    if (!config->grpc.enabled)
        return refuse_grpc(shell);
    if (config->grpc.listen[0] != 0)
        rpc.tcp_address = config->grpc.listen;
    if (config->grpc.tls_cert[0] != 0) {
        rpc.tls_cert = config->grpc.tls_cert;
        rpc.tls_key = config->grpc.tls_key;
        rpc.tls_ca = config->grpc.tls_ca;
    }
    status = kvp_rpc_start(&shell->loop, shell->core, &rpc, &shell->rpc);
    if (status != KVP_OK && !shell->complained)
        COMPLAIN(shell, "gRPC can not be served: %s", kvp_status_text(status));
    return status;
}

static void ready(struct kvp_shell *shell)
{
    uint64_t watchdog_us = 0;
    char text[160];

    kvp_core_opened(shell->core);
    uv_signal_start(&shell->on_term, on_signal, SIGTERM);
    uv_signal_start(&shell->on_int, on_signal, SIGINT);
    if (sd_watchdog_enabled(0, &watchdog_us) > 0)
        uv_timer_start(&shell->watchdog, on_watchdog, watchdog_us / 2000, watchdog_us / 2000);
    snprintf(text, sizeof(text), "READY=1\nSTATUS=serving on the %s backend, epoch %llu", shell->backend,
             (unsigned long long)kvp_ledger_epoch(&shell->ledger));
    if (kvp_ledger_epoch(&shell->ledger) > 1)
        kvp_log(LOG_NOTICE, "adopted the ledger of an earlier daemon, and %u connections: epoch %llu",
                shell->connections_adopted, (unsigned long long)kvp_ledger_epoch(&shell->ledger));
    kvp_log(LOG_INFO, "kvpoold " KVPOOL_VERSION " serves in %s on the %s backend", shell->config->daemon.runtime_dir,
            shell->backend);
    if (shell->rpc != NULL && kvp_rpc_tcp_port(shell->rpc) != 0)
        kvp_log(LOG_INFO, "gRPC over TCP: %s, port %u", shell->config->grpc.listen, kvp_rpc_tcp_port(shell->rpc));
    kvp_fdstore_notify(shell->store, text); /* who waits for this finds the lines above */
}

/* Every session holds fds: as many as the system allows. KVP_ELIMIT: these are too few for the doors themselves. */
static enum kvp_status raise_fd_limit(struct kvp_shell *shell)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return KVP_OK;
    if (limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (limit.rlim_cur >= KVP_RPC_FDS_MIN)
        return KVP_OK;
    COMPLAIN(shell, "%llu file descriptors are allowed (LimitNOFILE=, ulimit -n): the least is %u",
             (unsigned long long)limit.rlim_cur, KVP_RPC_FDS_MIN);
    return KVP_ELIMIT;
}

enum kvp_status kvp_shell_open(const struct kvp_config *config, bool discard_state, struct kvp_shell **ret_shell)
{
    struct kvp_shell *shell = calloc(1, sizeof(*shell));
    enum kvp_status status;

    if (shell == NULL)
        return KVP_ENOMEM;
    shell->config = config;
    shell->place = (struct kvp_place){.lock = -1, .session = -1, .grpc = -1};
    shell->block.fd = -1;
    signal(SIGPIPE, SIG_IGN);
    if (uv_loop_init(&shell->loop) != 0) {
        free(shell);
        return KVP_ENOMEM;
    }
    open_handles(shell);
    status = raise_fd_limit(shell);
    if (status == KVP_OK)
        status = kvp_inherit(&shell->inherited);
    if (status == KVP_OK)
        status = choose_backend(shell);
    if (status == KVP_OK)
        status = open_place(shell);
    if (status == KVP_OK)
        status = kvp_fdstore_open(&shell->loop, &shell->later, keeper_gone, shell, &shell->store);
    if (status == KVP_OK)
        status = open_ledger(shell, discard_state);
    if (status == KVP_OK)
        status = open_core(shell);
    if (status == KVP_OK)
        status = open_doors(shell);
    if (status != KVP_OK) {
        if (shell->complained)
            kvp_log(LOG_ERR, "kvpoold does not start");
        else
            kvp_log(LOG_ERR, "kvpoold does not start: %s", kvp_status_text(status));
        kvp_shell_close(shell);
        return status;
    }
    ready(shell);
    *ret_shell = shell;
    return KVP_OK;
}

void kvp_shell_run(struct kvp_shell *shell)
{
    uv_run(&shell->loop, UV_RUN_DEFAULT);
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    (void)arg;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

void kvp_shell_close(struct kvp_shell *shell)
{
    bool whole = shell->rpc == NULL, keep_files = shell->store != NULL && kvp_fdstore_keeps(shell->store);

    uv_check_stop(&shell->after_events);
    if (whole && shell->core != NULL)
        kvp_core_destroy(shell->core);
    if (shell->door != NULL)
        kvp_session_door_close(shell->door);
    if (shell->executors != NULL)
        kvp_executors_close(shell->executors);
    if (shell->things != NULL)
        kvp_things_close(shell->things);
    if (shell->store != NULL)
        kvp_fdstore_close(shell->store);
    if (shell->auditor != NULL)
        kvp_auditor_close(shell->auditor);
    kvp_inherited_free(&shell->inherited);
    kvp_place_leave(&shell->place, shell->config->daemon.runtime_dir, keep_files);
    if (!whole) {
        kvp_log(LOG_WARNING, "gRPC did not stop in time: leaving it");
        _exit(0);
    }
    kvp_later_close(&shell->later);
    uv_walk(&shell->loop, close_handle, NULL);
    uv_run(&shell->loop, UV_RUN_DEFAULT);
    uv_loop_close(&shell->loop);
    kvp_ledger_block_close(&shell->block);
    free(shell);
}
