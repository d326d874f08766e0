/**
 * The life of the gRPC door: start, the queue from gRPC's thread, stop; rpc.h has the picture.
 *
 * Stopping follows the one order that leaves nothing behind:
 *
 *      kvp_rpc_stop ─► shutdown_and_notify ─► (grace: while calls are in hand, or a moment) ─► cancel_all_calls, which
 *        ends connections too (they would stay until their clients answer) ─► notify tag, and no call in hand
 *        ─► cq_shutdown ─► the waiter drains it and ends ─► join ─► server, queue, credentials destroyed
 *        ─► grpc_shutdown_blocking ─► handles closed ─► `stopped`
 *
 * gRPC can not be polled from libuv, so a thread waits in its completion queue. Events go home on a list that needs no
 * lock: each tag is under way at most once and carries its own link.
 */
#include "door.h"

#include <grpc/grpc_security.h>
#include <stdlib.h>
#include <string.h>

#define SWEEP_MS 500
#define QUIET_MS 20 /* a stopping door without a call in hand: time for what is on its way */

/* ---- the queue --------------------------------------------------------------------------------------------------- */

static void push(struct kvp_rpc *rpc, struct kvp_rpc_tag *tag, bool ok)
{
    struct kvp_rpc_tag *newest = atomic_load_explicit(&rpc->queue, memory_order_relaxed);

    if (atomic_load_explicit(&rpc->handed, memory_order_acquire) == 0 || !tag->under_way)
        abort(); /* an event that nobody asked for */
    tag->under_way = false;
    tag->ok = ok;
    do {
        tag->next = newest;
    } while (!atomic_compare_exchange_weak_explicit(&rpc->queue, &newest, tag, memory_order_release,
                                                    memory_order_relaxed));
    if (newest == NULL) /* else the loop has been woken already and has not looked yet */
        uv_async_send(&rpc->async);
}

static void wait_for_events(void *arg)
{
    struct kvp_rpc *rpc = arg;

    for (;;) {
        grpc_event event = grpc_completion_queue_next(rpc->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);

        if (event.type == GRPC_QUEUE_SHUTDOWN)
            break;
        if (event.type == GRPC_OP_COMPLETE)
            push(rpc, event.tag, event.success != 0);
    }
    push(rpc, &rpc->waiter_ended, true);
}

static void events_ready(uv_async_t *async)
{
    struct kvp_rpc *rpc = async->data;
    struct kvp_rpc_tag *newest = atomic_exchange_explicit(&rpc->queue, NULL, memory_order_acquire), *oldest = NULL;

    while (newest != NULL) {
        struct kvp_rpc_tag *next = newest->next;

        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest != NULL) {
        struct kvp_rpc_tag *next = oldest->next;

        oldest->done(oldest, oldest->ok);
        oldest = next;
    }
    kvp_rpc_log_flush(rpc);
}

/* ---- stopping ---------------------------------------------------------------------------------------------------- */

void kvp_rpc_handle_closed(uv_handle_t *handle)
{
    struct kvp_rpc *rpc = handle->data;

    if (--rpc->handles > 0 || !rpc->ended)
        return;
    kvp_rpc_peers_free(&rpc->peers);
    if (rpc->stopped != NULL)
        rpc->stopped(rpc->stopped_arg);
    free(rpc);
}

static void close_handles(struct kvp_rpc *rpc)
{
    rpc->ended = true;
    kvp_rpc_listen_stop(rpc);
    uv_close((uv_handle_t *)&rpc->async, kvp_rpc_handle_closed);
    uv_close((uv_handle_t *)&rpc->sweep, kvp_rpc_handle_closed);
    uv_close((uv_handle_t *)&rpc->grace, kvp_rpc_handle_closed);
    uv_close((uv_handle_t *)&rpc->rest, kvp_rpc_handle_closed);
}

static void release_grpc(struct kvp_rpc *rpc)
{
    if (rpc->server != NULL)
        grpc_server_destroy(rpc->server);
    if (rpc->cq != NULL)
        grpc_completion_queue_destroy(rpc->cq);
    if (rpc->plain != NULL)
        grpc_server_credentials_release(rpc->plain);
    if (rpc->tls != NULL)
        grpc_server_credentials_release(rpc->tls);
    if (rpc->quota != NULL)
        grpc_resource_quota_unref(rpc->quota);
    grpc_shutdown_blocking();
    kvp_rpc_log_flush(rpc);
    kvp_rpc_log_detach();
}

static void waiter_ended(struct kvp_rpc_tag *tag, bool ok)
{
    struct kvp_rpc *rpc = tag->owner;

    (void)ok;
    uv_thread_join(&rpc->waiter);
    release_grpc(rpc);
    close_handles(rpc);
}

static void grace_over(uv_timer_t *timer)
{
    struct kvp_rpc *rpc = timer->data;

    grpc_server_cancel_all_calls(rpc->server);
}

void kvp_rpc_quiet(struct kvp_rpc *rpc)
{
    if (rpc->calls != NULL || !rpc->stopping)
        return;
    if (rpc->shut_down) {
        rpc->shut_down = false;
        grpc_completion_queue_shutdown(rpc->cq);
    } else if (uv_is_active((uv_handle_t *)&rpc->grace) && uv_timer_get_due_in(&rpc->grace) > QUIET_MS) {
        uv_timer_start(&rpc->grace, grace_over, QUIET_MS, 0);
    }
}

static void shut(struct kvp_rpc_tag *tag, bool ok)
{
    struct kvp_rpc *rpc = tag->owner;

    (void)ok;
    uv_timer_stop(&rpc->grace);
    rpc->shut_down = true;
    kvp_rpc_quiet(rpc);
}

void kvp_rpc_stop(struct kvp_rpc *rpc, void (*stopped)(void *arg), void *arg)
{
    rpc->stopping = true;
    rpc->stopped = stopped;
    rpc->stopped_arg = arg;
    kvp_rpc_listen_stop(rpc);
    kvp_rpc_tag_out(rpc, &rpc->shut);
    grpc_server_shutdown_and_notify(rpc->server, rpc->cq, &rpc->shut);
    uv_timer_start(&rpc->grace, grace_over, rpc->config.grace_ms, 0);
    kvp_rpc_quiet(rpc);
}

/* A start that failed: nothing has been served, no thread runs. */
static void abandon(struct kvp_rpc *rpc)
{
    if (rpc->server != NULL) {
        grpc_server_shutdown_and_notify(rpc->server, rpc->cq, &rpc->shut);
        grpc_server_cancel_all_calls(rpc->server);
    }
    if (rpc->cq != NULL) {
        grpc_completion_queue_shutdown(rpc->cq);
        while (grpc_completion_queue_next(rpc->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
               GRPC_QUEUE_SHUTDOWN)
            continue;
    }
    release_grpc(rpc);
    close_handles(rpc);
}

/* ---- starting ---------------------------------------------------------------------------------------------------- */

static void set_default(uint32_t *option, uint32_t value)
{
    if (*option == 0)
        *option = value;
}

static void set_defaults(struct kvp_rpc_config *config)
{
    set_default(&config->max_message_bytes, KVP_MESSAGE_BYTES_MAX);
    set_default(&config->max_metadata_bytes, 8192);
    set_default(&config->max_streams, 64);
    set_default(&config->max_connections, 256);
    set_default(&config->max_calls, 4096);
    set_default(&config->handshake_ms, 10000);
    set_default(&config->idle_ms, 600000);
    set_default(&config->keepalive_ms, 60000);
    set_default(&config->default_deadline_ms, 60000);
    set_default(&config->grace_ms, 200);
    if (config->max_held_bytes == 0)
        config->max_held_bytes = 512ull << 20;
}

static grpc_arg integer(const char *key, uint32_t value)
{
    grpc_arg arg = {.type = GRPC_ARG_INTEGER, .key = (char *)key};

    arg.value.integer = value > INT32_MAX ? INT32_MAX : (int)value;
    return arg;
}

static enum kvp_status create_server(struct kvp_rpc *rpc)
{
    const struct kvp_rpc_config *config = &rpc->config;

    rpc->quota = grpc_resource_quota_create("kvpool");
    if (rpc->quota == NULL)
        return KVP_ENOMEM;
    grpc_resource_quota_resize(rpc->quota, KVP_RPC_QUOTA_BYTES);

    /* Compressed requests are refused: gRPC limits a message's size before it unpacks it, and not after. */
    grpc_arg args[] = {
        integer(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, config->max_message_bytes),
        integer(GRPC_ARG_MAX_METADATA_SIZE, config->max_metadata_bytes),
        integer(GRPC_ARG_MAX_CONCURRENT_STREAMS, config->max_streams),
        integer(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, config->handshake_ms),
        integer(GRPC_ARG_MAX_CONNECTION_IDLE_MS, config->idle_ms),
        integer(GRPC_ARG_KEEPALIVE_TIME_MS, config->keepalive_ms),
        integer(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, config->keepalive_ms),
        integer(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        integer(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        integer(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1u << GRPC_COMPRESS_NONE),
        integer(GRPC_ARG_ALLOW_REUSEPORT, 0),
        {.type = GRPC_ARG_POINTER, .key = (char *)GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {.p = rpc->quota, .vtable = grpc_resource_quota_arg_vtable()}},
    };
    grpc_channel_args channel_args = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};

    rpc->cq = grpc_completion_queue_create_for_next(NULL);
    rpc->server = grpc_server_create(&channel_args, NULL);
    rpc->plain = grpc_insecure_server_credentials_create();
    if (rpc->cq == NULL || rpc->server == NULL || rpc->plain == NULL)
        return KVP_ENOMEM;
    grpc_server_register_completion_queue(rpc->server, rpc->cq, NULL);
    return KVP_OK;
}

static void sweep_due(uv_timer_t *timer)
{
    struct kvp_rpc *rpc = timer->data;

    kvp_rpc_calls_sweep(rpc, uv_now(rpc->loop));
    if (rpc->calls == NULL)
        uv_timer_stop(timer);
}

void kvp_rpc_sweep_start(struct kvp_rpc *rpc)
{
    if (!uv_is_active((uv_handle_t *)&rpc->sweep))
        uv_timer_start(&rpc->sweep, sweep_due, SWEEP_MS, SWEEP_MS);
}

enum kvp_status kvp_rpc_start(uv_loop_t *loop, struct kvp_core *core, const struct kvp_rpc_config *config,
                              struct kvp_rpc **ret_rpc)
{
    struct kvp_rpc *rpc = calloc(1, sizeof(*rpc));
    enum kvp_status status;

    if (rpc == NULL)
        return KVP_ENOMEM;
    rpc->loop = loop;
    rpc->core = core;
    rpc->config = *config;
    set_defaults(&rpc->config);
    rpc->shut = (struct kvp_rpc_tag){.done = shut, .owner = rpc};
    rpc->waiter_ended = (struct kvp_rpc_tag){.done = waiter_ended, .owner = rpc};
    rpc->unix_listener.fd = rpc->tcp_listener.fd = -1;
    rpc->async.data = rpc->sweep.data = rpc->grace.data = rpc->rest.data = rpc;
    if (uv_async_init(loop, &rpc->async, events_ready) != 0) {
        free(rpc);
        return KVP_ENOMEM;
    }
    uv_timer_init(loop, &rpc->sweep);
    uv_timer_init(loop, &rpc->grace);
    uv_timer_init(loop, &rpc->rest);
    rpc->handles = 4;

    /* gRPC aborts on a strategy that it does not know, and its fork handlers have no part in how we start programs. */
    setenv("GRPC_POLL_STRATEGY", "epoll1", 1);
    setenv("GRPC_ENABLE_FORK_SUPPORT", "0", 1);
    grpc_init();
    kvp_rpc_log_attach(rpc);
    status = kvp_rpc_peers_init(&rpc->peers);
    if (status == KVP_OK)
        status = create_server(rpc);
    if (status == KVP_OK)
        status = kvp_rpc_listen(rpc);
    kvp_rpc_tag_out(rpc, &rpc->waiter_ended);
    if (status == KVP_OK && uv_thread_create(&rpc->waiter, wait_for_events, rpc) != 0)
        status = KVP_ENOMEM;
    if (status != KVP_OK) {
        abandon(rpc);
        return status;
    }
    grpc_server_start(rpc->server);
    kvp_rpc_calls_request(rpc);
    *ret_rpc = rpc;
    return KVP_OK;
}

unsigned kvp_rpc_tcp_port(const struct kvp_rpc *rpc)
{
    return rpc->tcp_port;
}

struct kvp_rpc_stats kvp_rpc_stats(struct kvp_rpc *rpc)
{
    kvp_rpc_peers_sweep(&rpc->peers, uv_now(rpc->loop));
    rpc->stats.connections = rpc->peers.open;
    return rpc->stats;
}
