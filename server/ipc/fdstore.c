/**
 * The service manager; see fdstore.h.
 *
 *   park ──► queue ──► FDSTORE=1 + fd, BARRIER=1 + pipe end ──► manager closes the pipe end ──► done
 *
 * The manager takes messages in order, so that the closing of the barrier's pipe says that the fd before it is kept.
 * FDPOLL=0: else an fd that reports a hang-up (a socket whose peer died while the daemon was away) would be dropped,
 * and with it the news.
 */
#include "fdstore.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

/* A message that waits for the socket to take it. */
struct note {
    struct note *next;
    int fd; /* sent along, our own; -1: none */
    size_t n;
    char text[];
};

/* A parking that waits for its barrier, or, with nobody to park with, for the loop's next turn. */
struct parking {
    struct kvp_fdstore *store;
    struct parking *next;
    struct kvp_later later;
    void (*done)(void *arg, enum kvp_status status);
    void *arg;
    uint64_t deadline_ms;
    int barrier; /* reading end of the pipe, -1: none */
    uv_poll_t poll;
};

struct kvp_fdstore {
    uv_loop_t *loop;
    struct kvp_later_queue *later;
    int socket; /* connected to the manager, -1: there is none */
    bool refused; /* the manager is gone */
    void (*gone)(void *arg);
    void *arg;
    uv_poll_t writable;
    int parent; /* pidfd of the parent process, -1: there is none */
    uv_poll_t parent_ended;
    uv_timer_t timeout;
    struct note *first_note, *last_note;
    struct parking *parkings; /* in no order */
    unsigned kept;            /* by the manager, if it did as it was told */
    unsigned open_handles;
};

/* ---- messages ---------------------------------------------------------------------------------------------------- */

/* @return 0, or an errno */
static int send_note(int socket, const struct note *note)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {(char *)(uintptr_t)note->text, note->n};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t n;

    if (note->fd >= 0) {
        memset(&control, 0, sizeof(control));
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof(control.bytes);
        *CMSG_FIRSTHDR(&message) =
            (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &note->fd, sizeof(int));
    }
    do {
        n = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? errno : 0;
}

static void note_free(struct note *note)
{
    if (note->fd >= 0)
        close(note->fd);
    free(note);
}

/* @return false: the socket takes it later */
static bool sent(struct kvp_fdstore *store, const struct note *note)
{
    int error = send_note(store->socket, note);

    if (error == EAGAIN || error == ENOBUFS)
        return false;
    if (error == ECONNREFUSED && !store->refused) {
        store->refused = true;
        store->gone(store->arg);
    }
    return true;
}

static void send_queued(uv_poll_t *poll, int status, int events)
{
    struct kvp_fdstore *store = poll->data;

    (void)status;
    (void)events;
    while (store->first_note != NULL) {
        struct note *note = store->first_note;

        if (!sent(store, note))
            return;
        store->first_note = note->next;
        note_free(note);
    }
    store->last_note = NULL;
    uv_poll_stop(&store->writable);
}

/** @param fd  sent along and closed; -1: none. A message that there is no memory for is lost. */
static void post(struct kvp_fdstore *store, const char *text, int fd)
{
    struct note *note = kvp_fdstore_keeps(store) ? malloc(sizeof(*note) + strlen(text)) : NULL;

    if (note == NULL) {
        if (fd >= 0)
            close(fd);
        return;
    }
    *note = (struct note){.fd = fd, .n = strlen(text)};
    memcpy(note->text, text, note->n);
    if (store->first_note == NULL) {
        if (sent(store, note)) {
            note_free(note);
            return;
        }
        uv_poll_start(&store->writable, UV_WRITABLE, send_queued);
        store->first_note = note;
    } else {
        store->last_note->next = note;
    }
    store->last_note = note;
}

/* ---- parking ----------------------------------------------------------------------------------------------------- */

static void parking_closed(uv_handle_t *handle)
{
    struct parking *parking = handle->data;

    close(parking->barrier);
    free(parking);
}

static void parking_remove(struct parking *parking)
{
    struct parking **at = &parking->store->parkings;

    while (*at != parking)
        at = &(*at)->next;
    *at = parking->next;
}

static void parking_free(struct parking *parking)
{
    kvp_later_cancel(parking->store->later, &parking->later);
    if (parking->barrier >= 0)
        uv_close((uv_handle_t *)&parking->poll, parking_closed);
    else
        free(parking);
}

static void parking_done(struct parking *parking, enum kvp_status status)
{
    void (*done)(void *arg, enum kvp_status status) = parking->done;
    void *arg = parking->arg;

    parking_remove(parking);
    if (parking->store->parkings == NULL)
        uv_timer_stop(&parking->store->timeout);
    parking_free(parking);
    done(arg, status);
}

static void barrier_back(uv_poll_t *poll, int status, int events)
{
    (void)status; /* an error on the pipe is its other end's closing as well */
    (void)events;
    parking_done(poll->data, KVP_OK);
}

static void done_later(struct kvp_later *later)
{
    struct parking *parking = (struct parking *)((char *)later - offsetof(struct parking, later));

    parking_done(parking, KVP_OK);
}

static void timed_out(uv_timer_t *timer)
{
    struct kvp_fdstore *store = timer->data;
    struct parking *parking = store->parkings, *next;

    for (; parking != NULL; parking = next) {
        next = parking->next;
        if (parking->deadline_ms <= uv_now(store->loop))
            parking_done(parking, KVP_ETIMEDOUT);
    }
}

/* Make the barrier: its reading end is watched. @return the writing end, -1 if there is none to be had */
static int parking_raise_barrier(struct parking *parking)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0)
        return -1;
    if (uv_poll_init(parking->store->loop, &parking->poll, ends[0]) != 0) {
        close(ends[0]);
        close(ends[1]);
        return -1;
    }
    parking->barrier = ends[0];
    parking->poll.data = parking;
    uv_poll_start(&parking->poll, UV_READABLE | UV_DISCONNECT, barrier_back);
    return ends[1];
}

enum kvp_status kvp_fdstore_park(struct kvp_fdstore *store, const char *name, int fd,
                                 void (*done)(void *arg, enum kvp_status status), void *arg)
{
    struct parking *parking;
    char text[64 + KVP_FDSTORE_NAME_MAX];
    int copy, barrier;

    if (kvp_fdstore_keeps(store) && store->kept >= KVP_FDSTORE_MAX)
        return KVP_ELIMIT;
    parking = calloc(1, sizeof(*parking));
    if (parking == NULL)
        return KVP_ENOMEM;
    *parking = (struct parking){.store = store, .done = done, .arg = arg, .barrier = -1, .later.run = done_later,
                                .deadline_ms = uv_now(store->loop) + KVP_FDSTORE_TIMEOUT_MS};
    if (!kvp_fdstore_keeps(store)) {
        kvp_later_add(store->later, &parking->later);
    } else {
        copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        barrier = copy >= 0 ? parking_raise_barrier(parking) : -1;
        if (barrier < 0)
            goto close_copy;
        snprintf(text, sizeof(text), "FDSTORE=1\nFDPOLL=0\nFDNAME=%s", name);
        post(store, text, copy);
        post(store, "BARRIER=1", barrier);
        if (!uv_is_active((uv_handle_t *)&store->timeout))
            uv_timer_start(&store->timeout, timed_out, KVP_FDSTORE_TIMEOUT_MS, KVP_FDSTORE_TIMEOUT_MS / 10);
        store->kept++;
    }
    parking->next = store->parkings;
    store->parkings = parking;
    return KVP_OK;

close_copy:
    if (copy >= 0)
        close(copy);
    free(parking);
    return KVP_ENOMEM;
}

void kvp_fdstore_unpark(struct kvp_fdstore *store, const char *name)
{
    char text[64 + KVP_FDSTORE_NAME_MAX];

    if (store->kept > 0)
        store->kept--;
    snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=%s", name);
    post(store, text, -1);
}

void kvp_fdstore_count(struct kvp_fdstore *store, unsigned n)
{
    store->kept += n;
}

void kvp_fdstore_notify(struct kvp_fdstore *store, const char *lines)
{
    post(store, lines, -1);
}

bool kvp_fdstore_keeps(const struct kvp_fdstore *store)
{
    return store->socket >= 0 && !store->refused;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

/* @return the connected socket, -1: there is no manager, or it can not be reached */
static int connect_manager(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = getenv("NOTIFY_SOCKET");
    size_t n = path != NULL ? strlen(path) : 0;
    int fd;

    if (n < 2 || n >= sizeof(address.sun_path) || (path[0] != '/' && path[0] != '@'))
        return -1;
    memcpy(address.sun_path, path, n);
    if (path[0] == '@')
        address.sun_path[0] = 0; /* the abstract namespace */
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 &&
        connect(fd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n)) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Was it the manager? A word that means nothing more than it has to tells. */
static void parent_ended(uv_poll_t *poll, int status, int events)
{
    struct kvp_fdstore *store = poll->data;

    (void)status;
    (void)events;
    uv_poll_stop(poll);
    kvp_fdstore_notify(store, "WATCHDOG=1");
}

static void watch_parent(struct kvp_fdstore *store)
{
    store->parent = (int)syscall(SYS_pidfd_open, getppid(), 0);
    if (store->parent < 0)
        return;
    if (uv_poll_init(store->loop, &store->parent_ended, store->parent) != 0) {
        close(store->parent);
        store->parent = -1;
        return;
    }
    store->parent_ended.data = store;
    store->open_handles++;
    uv_poll_start(&store->parent_ended, UV_READABLE, parent_ended);
}

enum kvp_status kvp_fdstore_open(uv_loop_t *loop, struct kvp_later_queue *later, void (*gone)(void *arg), void *arg,
                                 struct kvp_fdstore **ret_store)
{
    struct kvp_fdstore *store = calloc(1, sizeof(*store));

    if (store == NULL)
        return KVP_ENOMEM;
    store->loop = loop;
    store->later = later;
    store->gone = gone;
    store->arg = arg;
    store->parent = -1;
    store->socket = connect_manager();
    if (store->socket >= 0 && uv_poll_init(loop, &store->writable, store->socket) != 0) {
        close(store->socket);
        free(store);
        return KVP_ENOMEM;
    }
    store->writable.data = store;
    store->open_handles = store->socket >= 0 ? 2 : 1;
    uv_timer_init(loop, &store->timeout);
    store->timeout.data = store;
    if (store->socket >= 0)
        watch_parent(store);
    *ret_store = store;
    return KVP_OK;
}

static void handle_closed(uv_handle_t *handle)
{
    struct kvp_fdstore *store = handle->data;

    if (--store->open_handles > 0)
        return;
    if (store->parent >= 0)
        close(store->parent);
    if (store->socket >= 0)
        close(store->socket);
    free(store);
}

void kvp_fdstore_close(struct kvp_fdstore *store)
{
    while (store->parkings != NULL)
        parking_done(store->parkings, KVP_EDISCONNECTED);
    while (store->first_note != NULL) {
        struct note *note = store->first_note;

        send_note(store->socket, note);
        store->first_note = note->next;
        note_free(note);
    }
    uv_close((uv_handle_t *)&store->timeout, handle_closed);
    if (store->parent >= 0)
        uv_close((uv_handle_t *)&store->parent_ended, handle_closed);
    if (store->socket >= 0)
        uv_close((uv_handle_t *)&store->writable, handle_closed);
}
