/**
 * The gRPC door's own parts, shared by rpc.c (life and queue), listen.c and peers.c (connections), call.c and answer.c
 * (calls), health.c, log.c. Everything here is the loop's thread's, but for rpc.queue and .handed.
 */
#ifndef KVP_RPC_DOOR_H
#define KVP_RPC_DOOR_H

#include "kvp_wire.h"
#include "rpc.h"

#include <grpc/grpc.h>
#include <stdatomic.h>

/* Calls that gRPC may hand over before the loop's next turn. */
#define KVP_RPC_REQUESTED 64
/* What gRPC itself may hold of messages that are not complete. */
#define KVP_RPC_QUOTA_BYTES (1ull << 30)
/* A method's path is one of ours, or it is cut in what we say about it. */
#define KVP_RPC_PATH_BYTES_MAX 128
/* The failure text: a header, percent-encoded on its way; clients take 8 KiB of them. */
#define KVP_RPC_TEXT_BYTES_MAX 1000

/* ---- the queue from gRPC's thread -------------------------------------------------------------------------------- */

/* Something asked of gRPC; at most once under way, so that its own memory carries the event home. */
struct kvp_rpc_tag {
    void (*done)(struct kvp_rpc_tag *tag, bool ok);
    void *owner;
    bool ok;
    struct kvp_rpc_tag *next;
    bool under_way;
};

/* ---- connections ------------------------------------------------------------------------------------------------- */

/*
 * Who is behind the fd number that grpc_call_get_peer names. A number is taken again only when the connection is seen
 * closed, no call of it is in hand, and KVP_RPC_NUMBER_REST_MS have passed: a call that gRPC still holds back must not
 * be taken for one of a newcomer.
 */
#define KVP_RPC_NUMBER_REST_MS 2000
struct kvp_rpc_peer {
    enum { KVP_PEER_UNUSED, KVP_PEER_OPEN, KVP_PEER_CLOSED } state;
    uint32_t calls; /* in hand */
    uint64_t closed_ms;
    struct kvp_caller caller;
};

struct kvp_rpc_peers {
    struct kvp_rpc_peer *of; /* [n], of the numbers from `first` on */
    unsigned first, n, next;
    uint32_t open;
    struct kvp_rpc_peer tls; /* all callers over TLS */
};

enum kvp_status kvp_rpc_peers_init(struct kvp_rpc_peers *peers);
void kvp_rpc_peers_free(struct kvp_rpc_peers *peers);
/** Give a socket a number of its own; consumes fd in any case. @retval KVP_ELIMIT no number is to be had */
enum kvp_status kvp_rpc_peers_add(struct kvp_rpc_peers *peers, int fd, const struct kvp_caller *caller, uint64_t now_ms,
                                  int *ret_number);
/** See which connections have ended. */
void kvp_rpc_peers_sweep(struct kvp_rpc_peers *peers, uint64_t now_ms);
/** By what grpc_call_get_peer says; NULL: nobody we know. */
struct kvp_rpc_peer *kvp_rpc_peers_find(struct kvp_rpc_peers *peers, const char *name);

struct kvp_rpc_listener {
    struct kvp_rpc *rpc;
    uv_poll_t poll;
    int fd; /* -1: not in use */
    bool tcp; /* ours to close; else the Unix socket, which is the caller's */
};
/** Listen on what the configuration names. Before grpc_server_start. */
enum kvp_status kvp_rpc_listen(struct kvp_rpc *rpc);
void kvp_rpc_listen_stop(struct kvp_rpc *rpc);

/* ---- the door ---------------------------------------------------------------------------------------------------- */

struct kvp_rpc_call;

struct kvp_rpc {
    uv_loop_t *loop;
    struct kvp_core *core;
    struct kvp_rpc_config config;

    grpc_server *server;
    grpc_completion_queue *cq;
    grpc_server_credentials *plain, *tls;
    grpc_resource_quota *quota;
    uv_thread_t waiter;

    _Atomic(struct kvp_rpc_tag *) queue; /* newest first */
    atomic_uint handed;                  /* tags given to gRPC */
    uv_async_t async;
    uv_timer_t sweep; /* deadlines, while calls are in hand */
    uv_timer_t grace;
    uv_timer_t rest; /* listening pauses: out of fds */
    unsigned handles; /* open ones */

    struct kvp_rpc_peers peers;
    struct kvp_rpc_listener unix_listener, tcp_listener;
    unsigned tcp_port;

    struct kvp_rpc_call *calls; /* in hand, doubly linked */
    unsigned requested;
    struct kvp_rpc_stats stats;
    struct kvp_rpc_log_window {
        uint64_t from_ms;
        unsigned lines, left_out;
    } log_window;
    bool stopping, shut_down, ended;
    struct kvp_rpc_tag shut, waiter_ended;
    void (*stopped)(void *arg);
    void *stopped_arg;
};

/* Before a tag is given to gRPC: what was written so far is seen by the thread that brings it home. */
static inline void kvp_rpc_tag_out(struct kvp_rpc *rpc, struct kvp_rpc_tag *tag)
{
    tag->under_way = true;
    atomic_fetch_add_explicit(&rpc->handed, 1, memory_order_release);
}
void kvp_rpc_handle_closed(uv_handle_t *handle); /* for uv_close of each of the door's handles; data is the door */
void kvp_rpc_sweep_start(struct kvp_rpc *rpc);   /* a call is in hand: look after its deadline */
void kvp_rpc_quiet(struct kvp_rpc *rpc);         /* a call has ended: go on with a stop, if one is under way */

/* A line for the journal: a few in ten seconds, the others are counted. */
void kvp_rpc_log(struct kvp_rpc *rpc, int level, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* gRPC's own error lines, from any of its threads: the latest is kept, the async woken, the loop logs it. */
void kvp_rpc_log_attach(struct kvp_rpc *rpc);
void kvp_rpc_log_detach(void);
void kvp_rpc_log_flush(struct kvp_rpc *rpc);

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* See call.c for the states. */
enum kvp_rpc_call_state { KVP_CALL_REQUESTED, KVP_CALL_RECEIVING, KVP_CALL_SERVED, KVP_CALL_ANSWERED, KVP_CALL_GONE };

struct kvp_rpc_call {
    struct kvp_call call;
    struct kvp_rpc *rpc;
    struct kvp_rpc_call *previous, *next;
    enum kvp_rpc_call_state state;
    struct kvp_rpc_peer *peer;
    const struct kvp_method *method;
    bool health; /* a call of grpc.health.v1 */

    grpc_call *grpc;
    grpc_call_details details;
    grpc_metadata_array metadata;
    grpc_byte_buffer *request, *reply;
    int cancelled;
    struct kvp_rpc_tag arrived, received, closed, sent;
    unsigned tags; /* under way */

    struct kvp_wire_budget budget;
    uint64_t held_bytes;
    grpc_slice text;         /* of the failure */
    grpc_metadata trailing;  /* kvp-status-bin */
};

/** Keep KVP_RPC_REQUESTED calls asked of gRPC. */
void kvp_rpc_calls_request(struct kvp_rpc *rpc);
/** End the calls whose time is up. */
void kvp_rpc_calls_sweep(struct kvp_rpc *rpc, uint64_t now_ms);
/** The caller is gone or given up: tell the core, if it has the call. */
void kvp_rpc_call_withdraw(struct kvp_rpc_call *call);

/** Send the reply, or the failure as status, text and kvp-status-bin. The call becomes ANSWERED. */
void kvp_rpc_answer(struct kvp_rpc_call *call, enum kvp_status status, const ProtobufCMessage *reply);
/** A failure that the door itself finds. */
void kvp_rpc_refuse(struct kvp_rpc_call *call, enum kvp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** The standard health service: is this path its Check? What it takes, and the answer. */
bool kvp_rpc_health_path(const char *path);
const ProtobufCMessageDescriptor *kvp_rpc_health_request(void);
void kvp_rpc_health_serve(struct kvp_rpc_call *call);

#endif
