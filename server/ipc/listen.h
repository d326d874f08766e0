/**
 * The daemon's place: its runtime folder, the lock on it, and its two listening sockets, or those that it was handed.
 *
 * The lock (RUNTIME_DIR/kvpool.lock, flock) is held as long as the process lives: two daemons on one folder are told
 * apart by it, and a socket file found under the lock is a dead daemon's and is replaced.
 */
#ifndef KVP_LISTEN_H
#define KVP_LISTEN_H

#include "inherit.h"
#include "kvp_status.h"

#include <stdbool.h>

#define KVP_LISTEN_ERROR_MAX 512

struct kvp_place {
    int lock;
    int session;          /* listening, SOCK_SEQPACKET */
    int grpc;             /* listening, SOCK_STREAM, though it may not be wanted; -1: none */
    bool session_is_ours; /* bound by a daemon, not by systemd: the file goes when the daemon ends */
    bool grpc_is_ours;
    bool session_is_new; /* bound now */
    bool grpc_is_new;
};

struct kvp_place_spec {
    const char *runtime_dir;
    unsigned mode;
    const char *group; /* "": the daemon's own */
    bool with_grpc;    /* bind it, if none was handed over */
};

/**
 * Lock the folder (made if it is not there), take the listening sockets that were handed over, bind the rest.
 * @param inherited    what it takes is gone from there
 * @param ret_place    its fds are all close-on-exec and non-blocking
 * @param reterr_text  [KVP_LISTEN_ERROR_MAX] what is in the way
 * @retval KVP_EEXIST  another daemon has the folder, or somebody listens on a socket there
 * @retval KVP_EINVAL  the folder, the group or a path is not right
 */
enum kvp_status kvp_place_take(const struct kvp_place_spec *spec, struct kvp_inherited *inherited,
                               struct kvp_place *ret_place, char *reterr_text);

/** Close all; remove the socket files bound here, unless they are parked and serve on. */
void kvp_place_leave(struct kvp_place *place, const char *runtime_dir, bool keep_files);

#endif
