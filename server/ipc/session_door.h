/**
 * The session socket: connected processes, their requests, and their deaths.
 *
 * A request is looked at (MSG_PEEK), carried out, answered, and only then taken off the socket: a daemon killed in
 * between leaves it there for the next one, which sees from its call id whether it took effect. One request of a
 * connection is in hand at a time; while its answer can not be sent, nothing more is read, so that a peer that never
 * reads costs one answer's memory and hurts nobody.
 *
 * A process has gone when its pidfd says so; its connection has when end-of-file says so. Either ends the session; the
 * pidfd is watched until the ledger has nothing of that session left (a forked child can hold the socket open, and a
 * process can live on without it).
 *
 * One thread: all functions on the loop's. No function here calls the core from inside one of the core's actions.
 */
#ifndef KVP_SESSION_DOOR_H
#define KVP_SESSION_DOOR_H

#include "clock.h"
#include "core.h"
#include "fdstore.h"

#include <uv.h>

struct kvp_session_door;

struct kvp_session_door_config {
    int listen_fd;         /* stays the caller's */
    uint32_t connections;  /* at once */
    uint64_t unpack_bytes; /* what all requests in hand may take, unpacked */
};

enum kvp_status kvp_session_door_open(uv_loop_t *loop, struct kvp_clock *clock, struct kvp_core *core,
                                      const struct kvp_ledger *ledger, struct kvp_fdstore *store,
                                      struct kvp_later_queue *later, const struct kvp_session_door_config *config,
                                      struct kvp_session_door **ret_door);

/**
 * A connection, or only the process, of a session that the ledger knows, as an earlier daemon parked them. Before the
 * loop runs; the core knows of the connection already (kvp_core_session_adopted).
 * @param socket  -1: there is only the process
 * @param pidfd   -1: it was not kept, and is found anew; both fds are taken over
 * @retval KVP_EDISCONNECTED  the process has ended
 * @retval KVP_ENODEV         it can not be found, so that its end will not be seen
 */
enum kvp_status kvp_session_door_adopt(struct kvp_session_door *door, struct kvp_session_id session, int socket,
                                       int pidfd);

/** The core's reply action for calls of KVP_DOOR_SOCKET. @param fds  [n_fds] to go along; they stay the caller's */
void kvp_session_door_reply(struct kvp_session_door *door, struct kvp_call *call, enum kvp_status status,
                            const ProtobufCMessage *reply, const int *fds, unsigned n_fds);

/** The core's session_hangup action: the connection ends when its answer under way is out. */
void kvp_session_door_hangup(struct kvp_session_door *door, struct kvp_session_id session);

/** Take no new connection or request: they stay where they are, for the next daemon. */
void kvp_session_door_drain(struct kvp_session_door *door);
/** Answers that have not been sent yet. */
unsigned kvp_session_door_unsent(const struct kvp_session_door *door);

/** Close all connections without a word to the core, which must be idle or gone. What is parked stays parked. */
void kvp_session_door_close(struct kvp_session_door *door);

#endif
