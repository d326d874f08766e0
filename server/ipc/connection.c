/**
 * Requests and answers of a connection, and its end; see session_door.h.
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
#include "connection.h"
#include "kill_point.h"
#include "log.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void on_socket(uv_poll_t *poll, int status, int events);

/* ---- a connection's end ------------------------------------------------------------------------------------------ */

void kvp_connection_unreference(struct kvp_connection *connection)
{
    if (--connection->references == 0)
        free(connection);
}

void kvp_connection_handle_closed(uv_handle_t *handle)
{
    kvp_connection_unreference(handle->data);
}

/* The core has answered it, or was told that it is gone. */
static void release_call(struct kvp_connection *connection)
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

static void release_answer(struct kvp_connection *connection)
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

static void close_socket(struct kvp_connection *connection)
{
    release_answer(connection);
    release_call(connection);
    uv_close((uv_handle_t *)&connection->on_socket, kvp_connection_handle_closed);
    close(connection->socket);
    connection->socket = -1;
    connection->state = CONNECTION_DEAD;
    connection->door->open--;
    connection->door->dead++;
}

void kvp_connection_free(struct kvp_connection *connection)
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
    uv_close((uv_handle_t *)&connection->on_process, kvp_connection_handle_closed);
    close(connection->pidfd);
    connection->pidfd = -1;
    kvp_connection_unreference(connection);
}

static bool session_is_known(const struct kvp_connection *connection)
{
    struct kvp_session_view view;

    return kvp_session_get(connection->door->ledger, connection->session, &view) == KVP_OK;
}

/* The session loses its connection; its process may live on. */
static void disconnect(struct kvp_connection *connection)
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

static void forget(struct kvp_connection *connection)
{
    if (connection->pidfd_parked)
        kvp_fdstore_unpark(connection->door->store, connection->pidfd_name);
    kvp_connection_free(connection);
}

void kvp_connection_lost(struct kvp_connection *connection)
{
    disconnect(connection);
    if (!session_is_known(connection))
        forget(connection);
}

void kvp_connection_process_ended(uv_poll_t *poll, int status, int events)
{
    struct kvp_connection *connection = poll->data;
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

void kvp_connections_sweep(struct kvp_session_door *door)
{
    struct kvp_connection *connection = door->connections, *next;

    for (; connection != NULL; connection = next) {
        next = connection->next;
        if (connection->state == CONNECTION_DEAD && !session_is_known(connection))
            forget(connection);
    }
}

/* ---- answers ----------------------------------------------------------------------------------------------------- */

void kvp_connection_watch(struct kvp_connection *connection)
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
static enum kvp_status keep_answer(struct kvp_connection *connection, struct kvp_wire_packet *packet, const int *fds,
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
static enum kvp_status try_answer(struct kvp_connection *connection, enum kvp_status status, const ProtobufCMessage *body,
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
static void answer(struct kvp_connection *connection, enum kvp_status status, const ProtobufCMessage *body, const int *fds,
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
refuse(struct kvp_connection *connection, enum kvp_status status, const char *format, ...)
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
static void after_answer(struct kvp_connection *connection)
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
        kvp_connection_lost(connection);
    else
        kvp_connection_watch(connection);
}

void kvp_connection_turn(struct kvp_later *later)
{
    struct kvp_connection *connection = (struct kvp_connection *)((char *)later - offsetof(struct kvp_connection, later));

    kvp_clock_tell(connection->door->clock);
    if (connection->state != CONNECTION_DEAD)
        after_answer(connection);
}

static void send_kept(struct kvp_connection *connection)
{
    enum kvp_status sent = kvp_wire_send(connection->socket, &connection->answer, connection->answer_fds,
                                         connection->n_answer_fds);

    if (sent == KVP_EAGAIN)
        return;
    connection->broken = sent != KVP_OK;
    release_answer(connection);
    after_answer(connection);
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

/* The body of the request in the frame becomes the call's. @return false: it was refused */
static bool unpack_request(struct kvp_connection *connection, const struct kvp_method *method)
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
        refuse(connection, status,
               "the body of %u bytes is not a message of %s, or a string in it is not UTF-8 or has a NUL in it",
               frame->envelope.bytes, method->request->short_name);
    return false;
}

static void start_call(struct kvp_connection *connection)
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
    fds_max = envelope->method == KVPOOL__V1__METHOD__METHOD_REGISTER_BUFFER ? KVP_REQUEST_FDS_MAX : 0;
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

static void take_request(struct kvp_connection *connection)
{
    struct kvp_wire_frame *frame = &connection->door->frame;
    enum kvp_status status = kvp_wire_receive(connection->socket, true, frame);

    if (status == KVP_EAGAIN)
        return;
    if (status == KVP_EDISCONNECTED) {
        kvp_connection_lost(connection);
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
    struct kvp_connection *connection = poll->data;

    kvp_clock_tell(connection->door->clock);
    if (status < 0)
        kvp_connection_lost(connection);
    else if ((events & UV_READABLE) != 0 && connection->state == CONNECTION_READY)
        take_request(connection);
    else if ((events & UV_WRITABLE) != 0 && connection->state == CONNECTION_ANSWERING)
        send_kept(connection);
    else if ((events & UV_DISCONNECT) != 0)
        kvp_connection_lost(connection);
}
