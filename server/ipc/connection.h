/**
 * A connection of the session socket, and the door that it came through. Private to session_door.c (how connections
 * begin, the door itself) and connection.c (requests, answers, how connections end).
 */
#ifndef KVP_CONNECTION_H
#define KVP_CONNECTION_H

#include "kvp_wire.h"
#include "session_door.h"

#define KVP_REQUEST_FDS_MAX 1 /* no method takes more */

enum kvp_connection_state {
    CONNECTION_PARKING,
    CONNECTION_READY,
    CONNECTION_IN_HAND,
    CONNECTION_ANSWERING,
    CONNECTION_DEAD,
};

struct kvp_connection {
    struct kvp_session_door *door;
    struct kvp_connection *previous, *next;
    enum kvp_connection_state state;
    int socket, pidfd; /* -1: closed */
    uv_poll_t on_socket, on_process;
    int watched;         /* what on_socket is waiting for */
    unsigned references; /* handles open, parkings under way, and the list's */
    unsigned parkings;
    bool socket_parked, pidfd_parked; /* or about to be */
    struct kvp_session_id session;
    char socket_name[KVP_FDSTORE_NAME_MAX], pidfd_name[KVP_FDSTORE_NAME_MAX];
    struct kvp_later later; /* -> kvp_connection_turn */

    struct kvp_call call;
    struct kvp_wire_budget budget;
    uint64_t budget_bytes; /* what the call's body took of the door's */
    int fds[KVP_REQUEST_FDS_MAX];
    bool calling;  /* kvp_core_call is on the stack */
    bool answered; /* the call in hand was */
    bool broken;   /* the socket did not take its answer */
    bool hangup;   /* to be closed once the answer is out */

    struct kvp_wire_packet answer; /* of ANSWERING, with its own copies of the fds */
    int *answer_fds;
    unsigned n_answer_fds;
    bool has_answer;
};

struct kvp_session_door {
    struct kvp_clock *clock;
    struct kvp_core *core;
    const struct kvp_ledger *ledger;
    struct kvp_fdstore *store;
    struct kvp_later_queue *later;
    uv_loop_t *loop;
    struct kvp_session_door_config config;
    uv_poll_t on_listen;
    uv_timer_t pause;
    unsigned open_handles;
    bool draining;
    int spare_fd;         /* given up for a moment to turn a connection away when there is no other; -1: none */
    uint64_t said_ms;     /* the loop's time of the last line about connections not taken; 0: never */
    unsigned unsaid;      /* connections not taken since */
    struct kvp_connection *connections;
    struct kvp_connection *by_slot[KVP_SESSIONS_MAX];
    unsigned open, dead; /* connections with a socket, without one */
    unsigned unsent;
    uint64_t unpack_left;
    struct kvp_wire_frame frame;
};

/** Ask the loop for what the connection waits for now. */
void kvp_connection_watch(struct kvp_connection *connection);
/** End-of-file, a broken socket, a hang-up. The process is watched on only if the ledger still has something of it. */
void kvp_connection_lost(struct kvp_connection *connection);
/** Its process has ended: the pidfd's callback. */
void kvp_connection_process_ended(uv_poll_t *poll, int status, int events);
/** The rest of a call that was answered, or of a hang-up, in a turn of its own. */
void kvp_connection_turn(struct kvp_later *later);
/** Close what is open and free it; the core is not told, and what is parked stays parked. */
void kvp_connection_free(struct kvp_connection *connection);
/** A handle of it is closed; a reference is given back. */
void kvp_connection_handle_closed(uv_handle_t *handle);
void kvp_connection_unreference(struct kvp_connection *connection);
/** Sessions can end for good while their process lives on without a connection: those need no watching any more. */
void kvp_connections_sweep(struct kvp_session_door *door);

#endif
