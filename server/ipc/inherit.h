/**
 * What the service manager hands to a new daemon: listening sockets, and the fds that earlier daemons parked, by name.
 *
 *   ledger        the ledger's memory           c5.9   the connection of session {slot 5, generation 9}
 *   t3 l3         a pool's table, timelines     q5.9   the pidfd of its process
 *   p3.12 s3.0    a progress page, a slab       door   the listening session socket, bound by a daemon itself
 *   b5.2          a registered buffer           grpc   the one of gRPC, likewise
 *   e0.4711       the socket of the executor in slot 0, whose pid is 4711; x0.4711: its pidfd
 *
 * Anything else is told by what it is (a listening socket that systemd made), or closed.
 */
#ifndef KVP_INHERIT_H
#define KVP_INHERIT_H

#include "core.h"
#include "fdstore.h"

#define KVP_SESSION_DOOR_NAME "door"
#define KVP_GRPC_DOOR_NAME    "grpc"

struct kvp_inherited_fd {
    char name[KVP_FDSTORE_NAME_MAX]; /* "": it has one that is too long to be ours */
    int fd;                          /* -1: taken */
};

struct kvp_inherited {
    unsigned n;
    struct kvp_inherited_fd *fds;
};

/** Read the environment; every fd is made close-on-exec. Free with kvp_inherited_free, which closes what is left. */
enum kvp_status kvp_inherit(struct kvp_inherited *ret_inherited);
void kvp_inherited_free(struct kvp_inherited *inherited);

/** Take the first of that name. @return -1: there is none */
int kvp_inherited_take(struct kvp_inherited *inherited, const char *name);

/** Read "p3.12", "t3". @return false: it is no thing's name */
bool kvp_thing_parse(const char *name, struct kvp_thing *ret_thing);
/** Read "c5.9". @return false: it does not start with `letter`, or is none */
bool kvp_session_parse(const char *name, char letter, struct kvp_session_id *ret_session);
/** Read "e0.4711". */
bool kvp_executor_parse(const char *name, char letter, uint32_t *ret_slot, uint32_t *ret_pid);

#endif
