/**
 * The gRPC door: serves kvpool.v1.KvPool to any client that speaks gRPC, over a Unix socket whose connections we accept
 * ourselves (for the kernel's word on who calls), and over TCP where that is configured.
 *
 * A thread of its own waits in gRPC's completion queue and does nothing but hand over; every function here, every call
 * into the core and everything the door remembers is on the loop's thread.
 *
 *      client ══HTTP/2══► gRPC ──event──► queue ──uv_async──► loop: door ──kvp_core_call──► core
 *                                                                    ▲                        │
 *                                            answer ◄── kvp_rpc_reply ┴────── actions.reply ◄──┘
 *
 * Limits (0 in the configuration takes the default): see struct kvp_rpc_config.
 */
#ifndef KVP_RPC_H
#define KVP_RPC_H

#include "core.h"

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#define KVP_RPC_FDS_MIN 64u /* RLIMIT_NOFILE, for gRPC's own and a few connections */

struct kvp_rpc;

struct kvp_rpc_config {
    int unix_listen_fd;      /* a listening SOCK_STREAM Unix socket, which stays the caller's; -1: none */
    const char *tcp_address; /* "127.0.0.1:7070", "[::1]:7070", numbers only, port 0 for any; NULL: none */

    /* TCP: files in PEM, all three or none. With them a client needs a certificate that tls_ca has signed. */
    const char *tls_cert, *tls_key, *tls_ca;
    bool tcp_plain_anywhere; /* without TLS: other addresses than loopback too */

    uint32_t max_message_bytes;   /* of one request; default KVP_MESSAGE_BYTES_MAX */
    uint32_t max_metadata_bytes;  /* of one request; default 8192 */
    uint32_t max_streams;         /* calls at once on one connection; default 64 */
    uint32_t max_connections;     /* accepted by ourselves: Unix socket and TCP without TLS; default 256 */
    uint32_t max_calls;           /* calls at once; default 4096 */
    uint64_t max_held_bytes;      /* requests in hand, packed and unpacked, all together; default 512 MiB */
    uint32_t handshake_ms;        /* TLS and HTTP/2; default 10 000 */
    uint32_t idle_ms;             /* a connection without a call ends after; default 600 000 */
    uint32_t keepalive_ms;        /* a silent peer is asked after, and given up after as long again; default 60 000 */
    uint32_t default_deadline_ms; /* of a call that names none; default 60 000 */
    uint32_t grace_ms;            /* for calls in hand at kvp_rpc_stop; default 200 */

    void (*log)(void *ctx, int level, const char *line); /* on the loop's thread, few lines; NULL: none */
    void (*tell_time)(void *ctx); /* before an event reaches the core, whose clock it may set; NULL: none */
    void *ctx;                    /* of both */
};

/**
 * Open the door. Calls arrive at kvp_core_call from the loop's next turn on, their callers KVP_DOOR_GRPC or
 * KVP_DOOR_TCP.
 *
 * @param config  copied, except for what ctx points at
 * @retval KVP_EINVAL   an address that can't be read, TLS files that are not all there, or plaintext beyond loopback
 * @retval KVP_ENODEV   the TCP address can't be bound, or a TLS file can't be read
 * @retval KVP_ENOMEM   out of memory, fds or threads
 */
enum kvp_status kvp_rpc_start(uv_loop_t *loop, struct kvp_core *core, const struct kvp_rpc_config *config,
                              struct kvp_rpc **ret_rpc);

/** The TCP port in use; 0: none. */
unsigned kvp_rpc_tcp_port(const struct kvp_rpc *rpc);

/**
 * The core's reply action, for calls whose caller.door is KVP_DOOR_GRPC or KVP_DOOR_TCP. Copies what it needs.
 *
 * @param reply  the method's reply, or with a status other than KVP_OK a Kvpool__V1__Error, or NULL
 */
void kvp_rpc_reply(struct kvp_rpc *rpc, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply);

struct kvp_rpc_stats {
    uint32_t connections;   /* open, of those we accepted */
    uint32_t calls;         /* in hand */
    uint64_t held_bytes;    /* of requests in hand */
    uint64_t refused;       /* connections over the limit */
    uint64_t unknown;       /* calls of methods that there are none of */
    uint64_t malformed;     /* messages that could not be read */
};
struct kvp_rpc_stats kvp_rpc_stats(struct kvp_rpc *rpc);

/**
 * Close the door: no new connection or call; calls in hand get grace_ms, then are cancelled (kvp_core_call_gone); then
 * `stopped` is called from the loop, and rpc is gone. The core must live until then.
 */
void kvp_rpc_stop(struct kvp_rpc *rpc, void (*stopped)(void *arg), void *arg);

#endif
