/**
 * The executors: kvpool-exec processes, one a device, each over a socket pair of its own.
 *
 * Started when the core asks, with the other end of the pair as fd 3 and a process group of its own. Messages to it are
 * queued while its socket is full. Its replies are looked at, told to the core, and only then taken off the socket, as
 * requests are (session_door.h). It ends at the end-of-file of its socket; if it does not within a grace, it is killed.
 *
 * One thread. Events come from the loop, never from inside these functions.
 */
#ifndef KVP_EXECUTOR_H
#define KVP_EXECUTOR_H

#include "clock.h"
#include "core.h"
#include "fdstore.h"

#include <uv.h>

#define KVP_EXECUTOR_GRACE_MS 5000 /* from end-of-file to SIGKILL: a kill in mid-kernel can hurt others under MPS */

struct kvp_executors;

struct kvp_executors_config {
    const char *path;        /* of the program; "": beside our own */
    const char *backend;     /* "host" or "cuda" */
    const char *environment; /* NAME=VALUE, with spaces between; "": nothing is added */
};

/**
 * @param clock   its core may be set later, but before the loop runs
 * @param config  its strings must live as long as the executors
 */
enum kvp_status kvp_executors_open(uv_loop_t *loop, struct kvp_clock *clock, struct kvp_later_queue *later,
                                   const struct kvp_executors_config *config, struct kvp_executors **ret_executors);

void kvp_executors_start(struct kvp_executors *executors, uint32_t slot, const char *device);
void kvp_executors_send(struct kvp_executors *executors, uint32_t slot, uint16_t method, uint64_t tag,
                        const ProtobufCMessage *body, const int *fds, unsigned n_fds);
void kvp_executors_stop(struct kvp_executors *executors, uint32_t slot);

/** End-of-file to all of them, without a word to the core. @return how many processes have not ended */
unsigned kvp_executors_stop_all(struct kvp_executors *executors);
unsigned kvp_executors_running(const struct kvp_executors *executors);
/** Close what is left; processes that have not ended since kvp_executors_stop_all are killed. */
void kvp_executors_close(struct kvp_executors *executors);

#endif
