/**
 * The gRPC door by itself, for its tests: the real door and a real client over real sockets, and in the core's place a
 * few lines that answer, fail or keep a call, and count what they see.
 *
 * The loop runs in the test's own thread, the client in another one; the client's end stops the door and the loop.
 */
#ifndef KVP_TEST_RPC_HARNESS_H
#define KVP_TEST_RPC_HARNESS_H

#include "rpc.h"
#include "rpc_client.h"

#include <check.h>
#include <stdatomic.h>

#define CALL_MS 60000 /* the deadline of a call that must be answered */

/* The core: GetSeqLens answers with the handles, DescribePool fails, Append is kept and never answered. */
struct fake_core {
    struct kvp_rpc *rpc;
    _Atomic unsigned calls, gone, kept;
    struct kvp_caller caller; /* of the last call */
    _Atomic uint64_t deadline_ms;
};
extern struct fake_core core;

struct door {
    char folder[64], path[96], target[112];
    int listen_fd;
    uv_loop_t loop;
    uv_async_t done;
    uv_timer_t look;
    bool at_once; /* stop though calls are in hand */
    unsigned looks;
    struct kvp_rpc_config config;
    struct kvp_rpc_stats stats;
    bool stopped;
    void (*client)(void);
};
extern struct door door;

/* A folder with a listening socket; the configuration names it, and can be changed before `serve`. */
void open_folder(void);
void close_folder(void);
/* Run the client, in a thread of its own, against a door of door.config; returns when the door has stopped. */
void serve(void (*client)(void));

/* A GetSeqLens request of n handles, packed. */
size_t pack_lengths(unsigned n, unsigned char *to);
void lengths_are_answered(struct rpc_client *client);
/* A call that must fail: its code, a piece of its text, and its status in kvp-status-bin. */
void call_fails(struct rpc_client *client, const char *path, const void *bytes, size_t n, const char *encoding,
                grpc_status_code code, const char *text, enum kvp_status status);
/* Wait until the core has counted so far. */
void until(_Atomic unsigned *count, unsigned n);

/* Run the suite; with --keep-calling TARGET, be the client that a test kills. */
int rpc_tests_main(int argc, char **argv, Suite *suite);

#endif
