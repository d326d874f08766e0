/**
 * The session socket: how connections begin, and the door itself; see session_door.h. What happens on one is in
 * connection.c.
 */
#include "connection.h"
#include "log.h"
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ACCEPTS_A_TURN    16  /* then the others get theirs */
#define ACCEPT_PAUSE_MS   100 /* when there are no fds left */
#define SAY_MS            5000 /* from one line about connections that are not taken to the next */
#define DEAD_BEFORE_SWEEP 64  /* connections without a socket */

/* ---- a connection's beginning ------------------------------------------------------------------------------------ */

static void parked(void *arg, enum kvp_status status)
{
    struct kvp_connection *connection = arg;

    connection->parkings--;
    if (connection->state == CONNECTION_PARKING) {
        if (status != KVP_OK) {
            kvp_connection_lost(connection);
        } else if (connection->parkings == 0) {
            connection->state = CONNECTION_READY;
            kvp_connection_watch(connection);
        }
    }
    kvp_connection_unreference(connection);
}

/* The connection and its process are kept for the next daemon before any request is carried out. */
static enum kvp_status park(struct kvp_connection *connection)
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

/* Clients that try again and again do not fill the log. */
static void say_not_taken(struct kvp_session_door *door, int level, const char *what, const char *why)
{
    uint64_t now_ms = uv_now(door->loop);

    if (door->said_ms != 0 && now_ms - door->said_ms < SAY_MS) {
        door->unsaid++;
        return;
    }
    if (door->unsaid > 0)
        kvp_log(level, "%s: %s; %u more since the last such line", what, why, door->unsaid);
    else
        kvp_log(level, "%s: %s", what, why);
    door->said_ms = now_ms > 0 ? now_ms : 1;
    door->unsaid = 0;
}

static void turn_away(struct kvp_session_door *door, int socket, enum kvp_status status, const char *why)
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
    say_not_taken(door, LOG_WARNING, "a connection was turned away", why);
}

/**
 * socket and pidfd become the connection's.
 * @param socket  -1: it is DEAD from the start
 * @return NULL: out of memory; they are the caller's still
 */
static struct kvp_connection *connection_new(struct kvp_session_door *door, int socket, int pidfd)
{
    struct kvp_connection *connection = calloc(1, sizeof(*connection));

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
    connection->later.run = kvp_connection_turn;
    connection->state = socket >= 0 ? CONNECTION_PARKING : CONNECTION_DEAD;
    *(socket >= 0 ? &door->open : &door->dead) += 1;
    connection->next = door->connections;
    if (door->connections != NULL)
        door->connections->previous = connection;
    door->connections = connection;
    return connection;

close_on_process:
    connection->references = 1;
    uv_close((uv_handle_t *)&connection->on_process, kvp_connection_handle_closed);
    return NULL;
free_connection:
    free(connection);
    return NULL;
}

/* It is this session's from now on. */
static void connection_join(struct kvp_connection *connection, struct kvp_session_id session)
{
    connection->session = connection->call.caller.session = session;
    connection->door->by_slot[session.slot] = connection;
    snprintf(connection->socket_name, KVP_FDSTORE_NAME_MAX, "c%u.%u", session.slot, session.generation);
    snprintf(connection->pidfd_name, KVP_FDSTORE_NAME_MAX, "q%u.%u", session.slot, session.generation);
    uv_poll_start(&connection->on_process, UV_READABLE, kvp_connection_process_ended);
}

static struct kvp_caller caller_of(const struct kvp_peer *peer)
{
    return (struct kvp_caller){
        .door = KVP_DOOR_SOCKET, .known = true, .pid = peer->pid, .uid = peer->uid, .gid = peer->gid};
}

static void welcome(struct kvp_session_door *door, int socket)
{
    struct kvp_connection *connection;
    struct kvp_session_id session;
    struct kvp_peer peer;
    enum kvp_status status;

    if (door->open >= door->config.connections) {
        turn_away(door, socket, KVP_ELIMIT, "limits.connections is reached");
        return;
    }
    status = kvp_peer_identify(socket, &peer);
    if (status != KVP_OK) {
        turn_away(door, socket, status,
                  status == KVP_ENODEV   ? "its process can not be watched from here (SO_PEERPIDFD is missing)"
                  : status == KVP_ENOMEM ? "no file descriptor is left, or no memory"
                                         : kvp_status_text(status));
        return;
    }
    connection = connection_new(door, socket, peer.pidfd);
    if (connection == NULL) {
        close(peer.pidfd);
        turn_away(door, socket, KVP_ENOMEM, "out of memory");
        return;
    }
    connection->call.caller = caller_of(&peer);
    status = kvp_core_connect(door->core, &connection->call.caller, peer.start_time, &session);
    if (status != KVP_OK) {
        int copy = fcntl(socket, F_DUPFD_CLOEXEC, 3);

        kvp_connection_free(connection);
        if (copy >= 0)
            turn_away(door, copy, status, "there is no room for another session, or the daemon is stopping");
        return;
    }
    connection_join(connection, session);
    if (park(connection) != KVP_OK)
        kvp_connection_lost(connection);
    else
        kvp_connection_watch(connection);
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
    struct kvp_connection *connection;
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
        kvp_connection_watch(connection);
    }
    return KVP_OK;
}

static void on_listen(uv_poll_t *poll, int status, int events);

static int open_spare(void)
{
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

static void accept_again(uv_timer_t *timer)
{
    struct kvp_session_door *door = timer->data;

    if (door->spare_fd < 0)
        door->spare_fd = open_spare();

    if (!door->draining)
        uv_poll_start(&door->on_listen, UV_READABLE, on_listen);
}

/**
 * accept4 wants an fd before it looks whether anybody waits, and there is none: with the spare one, who waits is taken
 * and told so.
 * @return 0, or the errno of not having taken one: EAGAIN where nobody waits
 */
static int refuse_with_spare(struct kvp_session_door *door)
{
    int socket, error;

    if (door->spare_fd < 0)
        return EMFILE;
    close(door->spare_fd);
    socket = accept4(door->config.listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    error = socket >= 0 ? 0 : errno;
    if (socket >= 0)
        turn_away(door, socket, KVP_ENOMEM, "no file descriptor is left for it (LimitNOFILE=)");
    door->spare_fd = open_spare();
    return error;
}

static void on_listen(uv_poll_t *poll, int status, int events)
{
    struct kvp_session_door *door = poll->data;

    (void)status; /* accept4 says what is wrong */
    (void)events;
    kvp_clock_tell(door->clock);
    if (door->dead >= DEAD_BEFORE_SWEEP)
        kvp_connections_sweep(door);
    for (unsigned i = 0; i < ACCEPTS_A_TURN; i++) {
        int socket = accept4(door->config.listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), error;

        if (socket >= 0) {
            welcome(door, socket);
            continue;
        }
        error = errno == EMFILE || errno == ENFILE ? refuse_with_spare(door) : errno;
        if (error == EAGAIN)
            return;
        if (error != 0 && error != EINTR && error != ECONNABORTED) {
            say_not_taken(door, LOG_ERR, "no connection can be accepted", strerror(error));
            uv_poll_stop(&door->on_listen);
            uv_timer_start(&door->pause, accept_again, ACCEPT_PAUSE_MS, 0);
            return;
        }
    }
}

/* ---- the door ---------------------------------------------------------------------------------------------------- */

void kvp_session_door_hangup(struct kvp_session_door *door, struct kvp_session_id session)
{
    struct kvp_connection *connection = session.slot < KVP_SESSIONS_MAX ? door->by_slot[session.slot] : NULL;

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
    for (struct kvp_connection *c = door->connections; c != NULL; c = c->next)
        if (c->state == CONNECTION_READY)
            kvp_connection_watch(c);
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
    door->spare_fd = open_spare();
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
        kvp_connection_free(door->connections);
    if (door->spare_fd >= 0)
        close(door->spare_fd);
    uv_close((uv_handle_t *)&door->pause, door_handle_closed);
    uv_close((uv_handle_t *)&door->on_listen, door_handle_closed);
}
