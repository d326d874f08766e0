/**
 * Connections of the session socket; see session_door.h.
 *
 *   accept ─► PARKING ─► READY ──peek──► IN_HAND ──answer──► consume ─► READY
 *                │         │                │  └─ socket full ─► ANSWERING ─► consume ─► READY
 *                └─────────┴── end-of-file, hang-up ──┴─► DEAD (socket closed, pidfd watched) ─► freed
 *
 * The answer of a call can come inside kvp_core_call or in any later action; what follows it (taking the request off,
 * the next one) happens after kvp_core_call has returned, or in the loop's next turn.
 *
 * Memory: a connection is held by its handles and by the parkings under way, and freed with the last of them.
 */
#include "session_door.h"
#include "kill_point.h"
#include "kvp_wire.h"
#include "log.h"
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ACCEPTS_A_TURN   16  /* then the others get theirs */
#define ACCEPT_PAUSE_MS  100 /* when there are no fds left */
#define REQUEST_FDS_MAX  1   /* no method takes more */
#define DEAD_BEFORE_SWEEP 64

enum connection_state { CONNECTION_PARKING, CONNECTION_READY, CONNECTION_IN_HAND, CONNECTION_ANSWERING, CONNECTION_DEAD };

struct connection {
    struct kvp_session_door *door;
    struct connection *previous, *next;
    enum connection_state state;
    int socket, pidfd; /* -1: closed */
    uv_poll_t on_socket, on_process;
    int watched;         /* what on_socket is waiting for */
    unsigned references; /* handles open, parkings under way */
    unsigned parkings;
    bool socket_parked, pidfd_parked; /* or about to be */
    struct kvp_session_id session;
    char socket_name[KVP_FDSTORE_NAME_MAX], pidfd_name[KVP_FDSTORE_NAME_MAX];
    struct kvp_later later; /* -> after_answer */

    struct kvp_call call;
    struct kvp_wire_budget budget;
    uint64_t budget_bytes; /* what the call's body took of the door's */
    int fds[REQUEST_FDS_MAX];
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
    struct connection *connections;
    struct connection *by_slot[KVP_SESSIONS_MAX];
    unsigned open, dead; /* connections with a socket, without one */
    unsigned unsent;
    uint64_t unpack_left;
    struct kvp_wire_frame frame;
};

static void after_answer(struct connection *connection);
static void on_socket(uv_poll_t *poll, int status, int events);

/* ---- a connection's end ------------------------------------------------------------------------------------------------ */

static void unreference(struct connection *connection)
{
    if (--connection->references == 0)
        free(connection);
}

static void handle_closed(uv_handle_t *handle)
{
    unreference(handle->data);
}

/* The core has answered it, or was told that it is gone. */
static void release_call(struct connection *connection)
{
    struct kvp_message *message = &connection->call.message;

    if (message->body != NULL)
        protobuf_c_message_free_unpacked(message->body, &connection->budget.allocator);
    for (unsigned i = 0; i < message->n_fds; i++)
        if (message->fds[i] >= 0)
            close(message->fds[i]);
    connection->door->unpack_left += connection->budget_bytes;
    connection->budget_bytes = 0;
    connection->call = (struct kvp_call){.caller = connection->call.caller};
}

static void release_answer(struct connection *connection)
{
    if (!connection->has_answer)
        return;
    kvp_wire_packet_free(&connection->answer);
    for (unsigned i = 0; i < connection->n_answer_fds; i++)
        close(connection->answer_fds[i]);
    free(connection->answer_fds);
    connection->answer_fds = NULL;
    connection->n_answer_fds = 0;
    connection->has_answer = false;
    connection->door->unsent--;
}

static void close_socket(struct connection *connection)
{
    release_answer(connection);
    release_call(connection);
    uv_close((uv_handle_t *)&connection->on_socket, handle_closed);
    close(connection->socket);
    connection->socket = -1;
    connection->state = CONNECTION_DEAD;
    connection->door->open--;
    connection->door->dead++;
}

static void connection_free(struct connection *connection)
{
    struct kvp_session_door *door = connection->door;

    if (connection->state != CONNECTION_DEAD)
        close_socket(connection);
    door->dead--;
    if (connection->previous != NULL)
        connection->previous->next = connection->next;
    else
        door->connections = connection->next;
    if (connection->next != NULL)
        connection->next->previous = connection->previous;
    if (door->by_slot[connection->session.slot] == connection)
        door->by_slot[connection->session.slot] = NULL;
    kvp_later_cancel(door->later, &connection->later);
    uv_close((uv_handle_t *)&connection->on_process, handle_closed);
    close(connection->pidfd);
    connection->pidfd = -1;
    unreference(connection);
}

static bool session_is_known(const struct connection *connection)
{
    struct kvp_session_view view;

    return kvp_session_get(connection->door->ledger, connection->session, &view) == KVP_OK;
}

/* The session loses its connection; its process may live on. */
static void disconnect(struct connection *connection)
{
    struct kvp_session_door *door = connection->door;

    if (connection->state == CONNECTION_IN_HAND && !connection->answered)
        kvp_core_call_gone(door->core, &connection->call);
    close_socket(connection);
    if (session_is_known(connection))
        kvp_core_disconnected(door->core, connection->session);
    if (connection->socket_parked) /* after the ledger: the next daemon tells by it that the session has not ended */
        kvp_fdstore_unpark(door->store, connection->socket_name);
}

static void forget(struct connection *connection)
{
    if (connection->pidfd_parked)
        kvp_fdstore_unpark(connection->door->store, connection->pidfd_name);
    connection_free(connection);
}

/* End-of-file, a broken socket, a hang-up. The process is watched on only if the ledger still has something of it. */
static void connection_lost(struct connection *connection)
{
    disconnect(connection);
    if (!session_is_known(connection))
        forget(connection);
}

static void on_process(uv_poll_t *poll, int status, int events)
{
    struct connection *connection = poll->data;
    struct kvp_session_door *door = connection->door;

    (void)status; /* a pidfd tells one thing only */
    (void)events;
    kvp_clock_tell(door->clock);
    if (connection->state != CONNECTION_DEAD)
        disconnect(connection);
    if (session_is_known(connection))
        kvp_core_process_ended(door->core, connection->session);
    forget(connection);
}

/* Sessions can end for good while their process lives on without a connection: those need no watching any more. */
static void sweep_dead(struct kvp_session_door *door)
{
    struct connection *connection = door->connections, *next;

    for (; connection != NULL; connection = next) {
        next = connection->next;
        if (connection->state == CONNECTION_DEAD && !session_is_known(connection))
            forget(connection);
    }
}

/* ---- answers ----------------------------------------------------------------------------------------------------------- */

static void watch(struct connection *connection)
{
    int events = UV_DISCONNECT;

    if (connection->state == CONNECTION_READY && !connection->door->draining)
        events |= UV_READABLE;
    if (connection->state == CONNECTION_ANSWERING)
        events |= UV_WRITABLE;
    if (events == connection->watched)
        return;
    connection->watched = events;
    uv_poll_start(&connection->on_socket, events, on_socket);
}

/* The socket is full: keep the packet, with fds of its own, since things can go before it is sent. */
static enum kvp_status keep_answer(struct connection *connection, struct kvp_wire_packet *packet, const int *fds,
                                   unsigned n_fds)
{
    int *copies = n_fds > 0 ? malloc(sizeof(int) * n_fds) : NULL;
    unsigned n = 0;

    if (n_fds > 0 && copies == NULL)
        return KVP_ENOMEM;
    for (; n < n_fds; n++) {
        copies[n] = fcntl(fds[n], F_DUPFD_CLOEXEC, 3);
        if (copies[n] < 0)
            goto close_copies;
    }
    connection->answer = *packet;
    connection->answer_fds = copies;
    connection->n_answer_fds = n_fds;
    connection->has_answer = true;
    connection->door->unsent++;
    return KVP_OK;

close_copies:
    while (n > 0)
        close(copies[--n]);
    free(copies);
    return KVP_ENOMEM;
}

/* Send, or keep what can not be sent at once. */
static enum kvp_status try_answer(struct connection *connection, enum kvp_status status, const ProtobufCMessage *body,
                                  const int *fds, unsigned n_fds)
{
    struct kvp_wire_packet packet;
    const struct kvp_message *request = &connection->call.message;
    enum kvp_status sent =
        kvp_wire_pack(request->method, KVP_ENVELOPE_REPLY, status, request->tag, body, &packet);

    if (sent != KVP_OK)
        return sent;
    kvp_kill_point(KVP_KILL_BEFORE_REPLY);
    sent = kvp_wire_send(connection->socket, &packet, fds, n_fds);
    kvp_kill_point(KVP_KILL_AFTER_REPLY);
    if (sent == KVP_EAGAIN && keep_answer(connection, &packet, fds, n_fds) == KVP_OK)
        return KVP_OK;
    kvp_wire_packet_free(&packet);
    return sent == KVP_EAGAIN ? KVP_ENOMEM : sent;
}

/* The call in hand is answered, and if that can not be sent, by why: what it did stands, and a repeat is recognised. */
static void answer(struct connection *connection, enum kvp_status status, const ProtobufCMessage *body, const int *fds,
                   unsigned n_fds)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    enum kvp_status sent = try_answer(connection, status, body, fds, n_fds);

    connection->answered = true;
    if (sent == KVP_ELIMIT || sent == KVP_ENOMEM) {
        error.status = sent;
        error.message = sent == KVP_ELIMIT ? (char *)"the reply is over the limit of a message: ask for less"
                                           : (char *)"out of memory or file descriptors for the reply";
        sent = try_answer(connection, sent, &error.base, NULL, 0);
    }
    connection->broken = sent != KVP_OK;
    if (!connection->calling)
        kvp_later_add(connection->door->later, &connection->later);
}

static void __attribute__((format(printf, 3, 4)))
refuse(struct connection *connection, enum kvp_status status, const char *format, ...)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    char text[256];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    error.status = status;
    error.message = text;
    answer(connection, status, &error.base, NULL, 0);
}

void kvp_session_door_reply(struct kvp_session_door *door, struct kvp_call *call, enum kvp_status status,
                            const ProtobufCMessage *reply, const int *fds, unsigned n_fds)
{
    (void)door;
    answer(call->door, status, reply, fds, n_fds);
}

/* What follows an answer, or a call that waits for one. A request is taken off before the socket is closed: else the
 * peer would see a reset before it sees its answer. */
static void after_answer(struct connection *connection)
{
    if (connection->state == CONNECTION_IN_HAND && connection->answered) {
        release_call(connection);
        connection->state = CONNECTION_ANSWERING;
    }
    if (connection->state == CONNECTION_ANSWERING && !connection->has_answer && !connection->broken) {
        connection->broken = kvp_wire_consume(connection->socket) != KVP_OK;
        connection->state = CONNECTION_READY;
    }
    if (connection->broken || (connection->hangup && !connection->has_answer))
        connection_lost(connection);
    else
        watch(connection);
}

static void after_answer_later(struct kvp_later *later)
{
    struct connection *connection = (struct connection *)((char *)later - offsetof(struct connection, later));

    kvp_clock_tell(connection->door->clock);
    if (connection->state != CONNECTION_DEAD)
        after_answer(connection);
}

static void send_kept(struct connection *connection)
{
    enum kvp_status sent = kvp_wire_send(connection->socket, &connection->answer, connection->answer_fds,
                                         connection->n_answer_fds);

    if (sent == KVP_EAGAIN)
        return;
    connection->broken = sent != KVP_OK;
    release_answer(connection);
    after_answer(connection);
}

/* ---- requests ---------------------------------------------------------------------------------------------------------- */

/* The body of the request in the frame becomes the call's. @return false: it was refused */
static bool unpack_request(struct connection *connection, const struct kvp_method *method)
{
    struct kvp_session_door *door = connection->door;
    const struct kvp_wire_frame *frame = &door->frame;
    size_t budget = door->unpack_left < KVP_UNPACK_BYTES_MAX ? door->unpack_left : KVP_UNPACK_BYTES_MAX;
    enum kvp_status status;

    kvp_wire_budget_init(&connection->budget, budget);
    status = kvp_wire_unpack(method->request, frame->bytes, frame->envelope.bytes, &connection->budget,
                             &connection->call.message.body);
    if (status == KVP_OK) {
        connection->budget_bytes = budget - connection->budget.left;
        door->unpack_left -= connection->budget_bytes;
        return true;
    }
    if (status == KVP_ENOMEM)
        refuse(connection, status, "%s: the message takes over %zu bytes unpacked; that is all there is for it",
               method->name, budget);
    else
        refuse(connection, status, "the body of %u bytes is not a message of %s, or a string in it is not UTF-8",
               frame->envelope.bytes, method->request->short_name);
    return false;
}

static void start_call(struct connection *connection)
{
    struct kvp_wire_frame *frame = &connection->door->frame;
    const struct kvp_envelope *envelope = &frame->envelope;
    const struct kvp_method *method = kvp_method_by_number(envelope->method);
    struct kvp_message *message = &connection->call.message;
    unsigned fds_max;

    if ((envelope->flags & ~(unsigned)KVP_ENVELOPE_MEMFD) != 0 || envelope->status != 0) {
        refuse(connection, KVP_EPROTO, "flags %#x, status %d: not a request", envelope->flags, envelope->status);
        return;
    }
    if (method == NULL) {
        refuse(connection, KVP_ENOSYS, "there is no method %u", envelope->method);
        return;
    }
    fds_max = envelope->method == KVPOOL__V1__METHOD__METHOD_REGISTER_BUFFER ? REQUEST_FDS_MAX : 0;
    if (frame->n_fds > fds_max) {
        refuse(connection, KVP_EPROTO, "%s takes %u file descriptors; %u came", method->name, fds_max, frame->n_fds);
        return;
    }
    if (!unpack_request(connection, method))
        return;
    message->fds = connection->fds;
    message->n_fds = frame->n_fds;
    memcpy(connection->fds, frame->fds, sizeof(int) * frame->n_fds);
    frame->n_fds = 0;
    kvp_kill_point(KVP_KILL_AFTER_PEEK);
    kvp_core_call(connection->door->core, &connection->call);
}

static void take_request(struct connection *connection)
{
    struct kvp_wire_frame *frame = &connection->door->frame;
    enum kvp_status status = kvp_wire_receive(connection->socket, true, frame);

    if (status == KVP_EAGAIN)
        return;
    if (status == KVP_EDISCONNECTED) {
        connection_lost(connection);
        return;
    }
    connection->state = CONNECTION_IN_HAND;
    connection->answered = false;
    connection->calling = true;
    connection->call.door = connection;
    if (frame->envelope.magic == KVP_ENVELOPE_MAGIC) {
        connection->call.message.method = frame->envelope.method;
        connection->call.message.tag = frame->envelope.tag;
    }
    if (status == KVP_OK) {
        start_call(connection);
        kvp_wire_release(frame);
    } else {
        refuse(connection, status, "%s",
               status == KVP_ENOMEM ? "out of memory for the message"
                                    : "not a message: its magic, its sizes or its memfd's seals are not right");
    }
    connection->calling = false;
    after_answer(connection);
}

static void on_socket(uv_poll_t *poll, int status, int events)
{
    struct connection *connection = poll->data;

    kvp_clock_tell(connection->door->clock);
    if (status < 0)
        connection_lost(connection);
    else if ((events & UV_READABLE) != 0 && connection->state == CONNECTION_READY)
        take_request(connection);
    else if ((events & UV_WRITABLE) != 0 && connection->state == CONNECTION_ANSWERING)
        send_kept(connection);
    else if ((events & UV_DISCONNECT) != 0)
        connection_lost(connection);
}

/* ---- a connection's beginning -------------------------------------------------------------------------------------------- */

static void parked(void *arg, enum kvp_status status)
{
    struct connection *connection = arg;

    connection->parkings--;
    if (connection->state == CONNECTION_PARKING) {
        if (status != KVP_OK) {
            connection_lost(connection);
        } else if (connection->parkings == 0) {
            connection->state = CONNECTION_READY;
            watch(connection);
        }
    }
    unreference(connection);
}

/* The connection and its process are kept for the next daemon before any request is carried out. */
static enum kvp_status park(struct connection *connection)
{
    struct kvp_fdstore *store = connection->door->store;
    enum kvp_status status;

    if (!kvp_fdstore_keeps(store)) {
        connection->state = CONNECTION_READY;
        return KVP_OK;
    }
    status = kvp_fdstore_park(store, connection->socket_name, connection->socket, parked, connection);
    if (status != KVP_OK)
        return status;
    connection->socket_parked = true;
    connection->parkings++;
    connection->references++;
    status = kvp_fdstore_park(store, connection->pidfd_name, connection->pidfd, parked, connection);
    if (status != KVP_OK)
        return status;
    connection->pidfd_parked = true;
    connection->parkings++;
    connection->references++;
    return KVP_OK;
}

static void turn_away(int socket, enum kvp_status status, const char *why)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    struct kvp_wire_packet packet;

    error.status = status;
    error.message = (char *)(uintptr_t)why;
    if (kvp_wire_pack(0, KVP_ENVELOPE_REPLY, status, 0, &error.base, &packet) == KVP_OK) {
        kvp_wire_send(socket, &packet, NULL, 0);
        kvp_wire_packet_free(&packet);
    }
    close(socket);
    kvp_log(LOG_WARNING, "a connection was turned away: %s", why);
}

/**
 * socket and pidfd become the connection's.
 * @param socket  -1: it is DEAD from the start
 * @return NULL: out of memory; they are the caller's still
 */
static struct connection *connection_new(struct kvp_session_door *door, int socket, int pidfd)
{
    struct connection *connection = calloc(1, sizeof(*connection));

    if (connection == NULL || uv_poll_init(door->loop, &connection->on_process, pidfd) != 0)
        goto free_connection;
    connection->on_process.data = connection;
    if (socket >= 0 && uv_poll_init(door->loop, &connection->on_socket, socket) != 0)
        goto close_on_process;
    connection->on_socket.data = connection;
    connection->references = socket >= 0 ? 3 : 2; /* the handles, and the list */
    connection->door = door;
    connection->socket = socket;
    connection->pidfd = pidfd;
    connection->later.run = after_answer_later;
    connection->state = socket >= 0 ? CONNECTION_PARKING : CONNECTION_DEAD;
    *(socket >= 0 ? &door->open : &door->dead) += 1;
    connection->next = door->connections;
    if (door->connections != NULL)
        door->connections->previous = connection;
    door->connections = connection;
    return connection;

close_on_process:
    connection->references = 1;
    uv_close((uv_handle_t *)&connection->on_process, handle_closed);
    return NULL;
free_connection:
    free(connection);
    return NULL;
}

/* It is this session's from now on. */
static void connection_join(struct connection *connection, struct kvp_session_id session)
{
    connection->session = connection->call.caller.session = session;
    connection->door->by_slot[session.slot] = connection;
    snprintf(connection->socket_name, KVP_FDSTORE_NAME_MAX, "c%u.%u", session.slot, session.generation);
    snprintf(connection->pidfd_name, KVP_FDSTORE_NAME_MAX, "q%u.%u", session.slot, session.generation);
    uv_poll_start(&connection->on_process, UV_READABLE, on_process);
}

static struct kvp_caller caller_of(const struct kvp_peer *peer)
{
    return (struct kvp_caller){
        .door = KVP_DOOR_SOCKET, .known = true, .pid = peer->pid, .uid = peer->uid, .gid = peer->gid};
}

static void welcome(struct kvp_session_door *door, int socket)
{
    struct connection *connection;
    struct kvp_session_id session;
    struct kvp_peer peer;
    enum kvp_status status;

    if (door->open >= door->config.connections) {
        turn_away(socket, KVP_ELIMIT, "limits.connections is reached");
        return;
    }
    status = kvp_peer_identify(socket, &peer);
    if (status != KVP_OK) {
        turn_away(socket, status, status == KVP_ENODEV ? "its process can not be watched from here (SO_PEERPIDFD is missing)"
                                                       : kvp_status_text(status));
        return;
    }
    connection = connection_new(door, socket, peer.pidfd);
    if (connection == NULL) {
        close(peer.pidfd);
        turn_away(socket, KVP_ENOMEM, "out of memory");
        return;
    }
    connection->call.caller = caller_of(&peer);
    status = kvp_core_connect(door->core, &connection->call.caller, peer.start_time, &session);
    if (status != KVP_OK) {
        int copy = fcntl(socket, F_DUPFD_CLOEXEC, 3);

        connection_free(connection);
        if (copy >= 0)
            turn_away(copy, status, "there is no room for another session, or the daemon is stopping");
        return;
    }
    connection_join(connection, session);
    if (park(connection) != KVP_OK)
        connection_lost(connection);
    else
        watch(connection);
}

/* Without a pidfd that was kept, a process is found by its connection, or by number and start time. */
static enum kvp_status find_process(const struct kvp_session_view *view, int socket, int *ret_pidfd)
{
    struct kvp_peer peer;
    enum kvp_status status;

    if (socket < 0)
        return kvp_peer_process(view->spec.pid, view->spec.start_time, ret_pidfd);
    status = kvp_peer_identify(socket, &peer);
    if (status == KVP_OK)
        *ret_pidfd = peer.pidfd;
    return status;
}

enum kvp_status kvp_session_door_adopt(struct kvp_session_door *door, struct kvp_session_id session, int socket,
                                       int pidfd)
{
    struct kvp_session_view view;
    struct connection *connection;
    enum kvp_status status = kvp_session_get(door->ledger, session, &view);
    bool socket_kept = socket >= 0, pidfd_kept = pidfd >= 0;

    if (status == KVP_OK && !pidfd_kept)
        status = find_process(&view, socket, &pidfd);
    if (status == KVP_OK && socket_kept && fcntl(socket, F_SETFL, O_RDWR | O_NONBLOCK) != 0)
        status = KVP_EINVAL;
    connection = status == KVP_OK ? connection_new(door, socket, pidfd) : NULL;
    if (connection == NULL) {
        if (socket_kept)
            close(socket);
        if (pidfd >= 0)
            close(pidfd);
        return status == KVP_OK ? KVP_ENOMEM : status;
    }
    connection->call.caller = (struct kvp_caller){.door = KVP_DOOR_SOCKET, .known = true, .pid = view.spec.pid,
                                                  .uid = view.spec.uid, .gid = view.spec.gid};
    connection_join(connection, session);
    connection->socket_parked = socket_kept;
    connection->pidfd_parked = pidfd_kept;
    if (socket_kept) {
        connection->state = CONNECTION_READY;
        watch(connection);
    }
    return KVP_OK;
}

static void on_listen(uv_poll_t *poll, int status, int events);

static void accept_again(uv_timer_t *timer)
{
    struct kvp_session_door *door = timer->data;

    if (!door->draining)
        uv_poll_start(&door->on_listen, UV_READABLE, on_listen);
}

static void on_listen(uv_poll_t *poll, int status, int events)
{
    struct kvp_session_door *door = poll->data;

    (void)status; /* accept4 says what is wrong */
    (void)events;
    kvp_clock_tell(door->clock);
    if (door->dead >= DEAD_BEFORE_SWEEP)
        sweep_dead(door);
    for (unsigned i = 0; i < ACCEPTS_A_TURN; i++) {
        int socket = accept4(door->config.listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (socket >= 0) {
            welcome(door, socket);
        } else if (errno != EINTR && errno != ECONNABORTED) {
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                return;
            kvp_log(LOG_ERR, "no connection can be accepted: %s", strerror(errno));
            uv_poll_stop(&door->on_listen);
            uv_timer_start(&door->pause, accept_again, ACCEPT_PAUSE_MS, 0);
            return;
        }
    }
}

/* ---- the door ------------------------------------------------------------------------------------------------------------ */

void kvp_session_door_hangup(struct kvp_session_door *door, struct kvp_session_id session)
{
    struct connection *connection = session.slot < KVP_SESSIONS_MAX ? door->by_slot[session.slot] : NULL;

    if (connection == NULL || connection->session.generation != session.generation ||
        connection->state == CONNECTION_DEAD)
        return;
    connection->hangup = true;
    if (!connection->calling)
        kvp_later_add(door->later, &connection->later);
}

void kvp_session_door_drain(struct kvp_session_door *door)
{
    door->draining = true;
    uv_poll_stop(&door->on_listen);
    for (struct connection *c = door->connections; c != NULL; c = c->next)
        if (c->state == CONNECTION_READY)
            watch(c);
}

unsigned kvp_session_door_unsent(const struct kvp_session_door *door)
{
    return door->unsent;
}

enum kvp_status kvp_session_door_open(uv_loop_t *loop, struct kvp_clock *clock, struct kvp_core *core,
                                      const struct kvp_ledger *ledger, struct kvp_fdstore *store,
                                      struct kvp_later_queue *later, const struct kvp_session_door_config *config,
                                      struct kvp_session_door **ret_door)
{
    struct kvp_session_door *door = calloc(1, sizeof(*door));

    if (door == NULL)
        return KVP_ENOMEM;
    door->loop = loop;
    door->clock = clock;
    door->core = core;
    door->ledger = ledger;
    door->store = store;
    door->later = later;
    door->config = *config;
    door->unpack_left = config->unpack_bytes;
    if (uv_poll_init(loop, &door->on_listen, config->listen_fd) != 0) {
        free(door);
        return KVP_ENOMEM;
    }
    door->on_listen.data = door;
    uv_timer_init(loop, &door->pause);
    door->pause.data = door;
    door->open_handles = 2;
    uv_poll_start(&door->on_listen, UV_READABLE, on_listen);
    *ret_door = door;
    return KVP_OK;
}

static void door_handle_closed(uv_handle_t *handle)
{
    struct kvp_session_door *door = handle->data;

    if (--door->open_handles == 0)
        free(door);
}

void kvp_session_door_close(struct kvp_session_door *door)
{
    while (door->connections != NULL)
        connection_free(door->connections);
    uv_close((uv_handle_t *)&door->pause, door_handle_closed);
    uv_close((uv_handle_t *)&door->on_listen, door_handle_closed);
}
