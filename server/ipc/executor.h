/**
 * The executors: kvpool-exec processes, one a device, each over a socket pair of its own.
 *
 * Started when the core asks, with the other end of the pair as fd 3 and a process group of its own. Messages to it are
 * queued while its socket is full. Its replies are looked at, told to the core, and only then taken off the socket, as
 * requests are (session_door.h). It ends at the end-of-file of its socket; if it does not within a grace, it is killed.
 * Where there is a service manager its socket and pidfd are parked, "e0.4711" and "x0.4711" (slot and pid), and it
 * outlives the daemon.
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
enum kvp_status kvp_executors_open(uv_loop_t *loop, struct kvp_clock *clock, struct kvp_fdstore *store,
                                   struct kvp_later_queue *later, const struct kvp_executors_config *config,
                                   struct kvp_executors **ret_executors);

/**
 * One that an earlier daemon started; the caller tells the core (kvp_core_exec_adopted).
 * @param socket, pidfd  taken over on success
 * @retval KVP_EEXIST  there is one in that slot
 */
enum kvp_status kvp_executors_adopt(struct kvp_executors *executors, uint32_t slot, uint32_t pid, int socket, int pidfd);

void kvp_executors_start(struct kvp_executors *executors, uint32_t slot, const char *device);
void kvp_executors_send(struct kvp_executors *executors, uint32_t slot, uint16_t method, uint64_t tag,
                        const ProtobufCMessage *body, const int *fds, unsigned n_fds);
void kvp_executors_stop(struct kvp_executors *executors, uint32_t slot);

/** End-of-file to those that nobody keeps, without a word to the core. */
void kvp_executors_stop_all(struct kvp_executors *executors);
/** How many are to end and have not. */
unsigned kvp_executors_ending(const struct kvp_executors *executors);
/** Close what is left; those that were to end and have not are killed. */
void kvp_executors_close(struct kvp_executors *executors);

#endif
