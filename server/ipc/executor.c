/**
 * The executors; see executor.h.
 *
 *   start ─► STARTING ─(parked: up)─► UP ─ end-of-file, process ended, nonsense: gone ─► ENDING ─ reaped ─► freed
 *                │                     └─ stop: gone ──────────────────────────────────────►│
 *                └─ can not be started: gone (next turn) ─► freed                           └ grace over: SIGKILL
 *
 * The core is told of the end of an executor once, behind the last of its replies, whoever brought the end about.
 */
#include "executor.h"
#include "kvp_wire.h"
#include "log.h"
#include "executor_spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef P_PIDFD
#define P_PIDFD 3
#endif
#define REPLIES_A_TURN 16

enum link_state { LINK_STARTING, LINK_UP, LINK_ENDING };

/* A message that waits for the socket to take it. */
struct outgoing {
    struct outgoing *next;
    struct kvp_wire_packet packet;
    unsigned n_fds;
    int fds[]; /* its own */
};

struct link {
    struct kvp_executors *executors;
    struct link *next;
    enum link_state state;
    uint32_t slot;
    pid_t pid;         /* 0: it could not be started */
    int socket, pidfd; /* -1: closed */
    uv_poll_t on_socket, on_process;
    uv_timer_t grace;
    unsigned references; /* handles open, parkings under way, and the list's */
    unsigned parkings;
    char socket_name[KVP_FDSTORE_NAME_MAX], pidfd_name[KVP_FDSTORE_NAME_MAX]; /* "": not parked */
    int watched;
    bool wanted;                    /* the core counts on it */
    struct kvp_later later;         /* -> up, gone, or the rest of a stop */
    struct outgoing *first, *last;
};

/* A message that could not be packed is answered by why, as if the executor had. */
struct refusal {
    struct kvp_later later;
    struct link *link;
    enum kvp_status status;
    uint16_t method;
    uint64_t tag;
};

struct kvp_executors {
    uv_loop_t *loop;
    struct kvp_clock *clock;
    struct kvp_fdstore *store;
    struct kvp_later_queue *later;
    struct kvp_executors_config config;
    struct link *slots[KVP_GPUS_MAX]; /* those the core counts on */
    struct link *links;
    struct kvp_wire_frame frame;
};

static const struct {
    uint16_t method;
    const ProtobufCMessageDescriptor *reply;
} replies[] = {
    {KVPOOL__V1__METHOD__METHOD_EXEC_HELLO, &kvpool__v1__exec_hello_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, &kvpool__v1__exec_slab_create_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT, &kvpool__v1__exec_slab_adopt_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP, &kvpool__v1__exec_slab_drop_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT, &kvpool__v1__exec_buffer_import_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP, &kvpool__v1__exec_buffer_drop_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_JOB, &kvpool__v1__exec_job_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, &kvpool__v1__exec_processes_reply__descriptor},
};

static void on_socket(uv_poll_t *poll, int status, int events);

/* ---- the end of one ---------------------------------------------------------------------------------------------- */

static void unreference(struct link *link)
{
    if (--link->references == 0)
        free(link);
}

static void handle_closed(uv_handle_t *handle)
{
    unreference(handle->data);
}

static void outgoing_free(struct outgoing *outgoing)
{
    kvp_wire_packet_free(&outgoing->packet);
    for (unsigned i = 0; i < outgoing->n_fds; i++)
        close(outgoing->fds[i]);
    free(outgoing);
}

static void close_socket(struct link *link)
{
    if (link->socket < 0)
        return;
    uv_close((uv_handle_t *)&link->on_socket, handle_closed);
    close(link->socket); /* end-of-file, for the executor */
    link->socket = -1;
    while (link->first != NULL) {
        struct outgoing *outgoing = link->first;

        link->first = outgoing->next;
        outgoing_free(outgoing);
    }
    link->last = NULL;
}

static void link_free(struct link *link)
{
    struct kvp_executors *executors = link->executors;
    struct link **at = &executors->links;

    while (*at != link)
        at = &(*at)->next;
    *at = link->next;
    if (executors->slots[link->slot] == link)
        executors->slots[link->slot] = NULL;
    kvp_later_cancel(executors->later, &link->later);
    close_socket(link);
    if (link->pidfd >= 0) {
        uv_close((uv_handle_t *)&link->on_process, handle_closed);
        close(link->pidfd);
        link->pidfd = -1;
    }
    uv_close((uv_handle_t *)&link->grace, handle_closed);
    unreference(link);
}

static void kill_it(uv_timer_t *timer)
{
    struct link *link = timer->data;

    kvp_log(LOG_WARNING, "executor %u (pid %d) did not end in %d ms: killed", link->slot, (int)link->pid,
            KVP_EXECUTOR_GRACE_MS);
    syscall(SYS_pidfd_send_signal, link->pidfd, SIGKILL, NULL, 0);
}

static void unpark(struct kvp_fdstore *store, char *name)
{
    if (name[0] != 0)
        kvp_fdstore_unpark(store, name);
    name[0] = 0;
}

/* No more talk with it; its process has the grace to end. */
static void link_end(struct link *link)
{
    struct kvp_executors *executors = link->executors;
    bool tell = link->wanted;

    link->state = LINK_ENDING;
    link->wanted = false;
    kvp_later_cancel(executors->later, &link->later);
    if (executors->slots[link->slot] == link)
        executors->slots[link->slot] = NULL;
    close_socket(link);
    unpark(executors->store, link->socket_name);
    unpark(executors->store, link->pidfd_name);
    if (link->pidfd >= 0)
        uv_timer_start(&link->grace, kill_it, KVP_EXECUTOR_GRACE_MS, 0);
    if (tell)
        kvp_core_exec_gone(executors->clock->core, link->slot);
}

/* ---- to it ------------------------------------------------------------------------------------------------------- */

static void watch(struct link *link)
{
    int events = UV_READABLE | (link->first != NULL ? UV_WRITABLE : 0);

    if (events == link->watched)
        return;
    link->watched = events;
    uv_poll_start(&link->on_socket, events, on_socket);
}

static void send_queued(struct link *link)
{
    while (link->first != NULL) {
        struct outgoing *outgoing = link->first;
        enum kvp_status sent = kvp_wire_send(link->socket, &outgoing->packet, outgoing->fds, outgoing->n_fds);

        if (sent == KVP_EAGAIN)
            break;
        if (sent != KVP_OK) {
            kvp_log(LOG_ERR, "executor %u: a message can not be sent: %s", link->slot, kvp_status_text(sent));
            link_end(link);
            return;
        }
        link->first = outgoing->next;
        outgoing_free(outgoing);
    }
    if (link->first == NULL)
        link->last = NULL;
    watch(link);
}

/* The packet and copies of the fds, at the end of the queue. */
static enum kvp_status enqueue(struct link *link, struct kvp_wire_packet *packet, const int *fds, unsigned n_fds)
{
    struct outgoing *outgoing = malloc(sizeof(*outgoing) + sizeof(int) * n_fds);

    if (outgoing == NULL)
        return KVP_ENOMEM;
    *outgoing = (struct outgoing){.packet = {.memfd = -1}};
    for (; outgoing->n_fds < n_fds; outgoing->n_fds++) {
        outgoing->fds[outgoing->n_fds] = fcntl(fds[outgoing->n_fds], F_DUPFD_CLOEXEC, 3);
        if (outgoing->fds[outgoing->n_fds] < 0) {
            outgoing_free(outgoing);
            return KVP_ENOMEM;
        }
    }
    outgoing->packet = *packet;
    if (link->last != NULL)
        link->last->next = outgoing;
    else
        link->first = outgoing;
    link->last = outgoing;
    watch(link);
    return KVP_OK;
}

static void refuse_later(struct kvp_later *later)
{
    struct refusal *refusal = (struct refusal *)((char *)later - offsetof(struct refusal, later));
    struct kvp_message message = {.method = refusal->method, .tag = refusal->tag};

    kvp_clock_tell(refusal->link->executors->clock);
    if (refusal->link->wanted)
        kvp_core_exec_reply(refusal->link->executors->clock->core, refusal->link->slot, refusal->status, &message);
    unreference(refusal->link);
    free(refusal);
}

static void link_end_later(struct kvp_later *later)
{
    struct link *link = (struct link *)((char *)later - offsetof(struct link, later));

    kvp_clock_tell(link->executors->clock);
    if (link->state != LINK_ENDING)
        link_end(link);
    if (link->pid == 0)
        link_free(link);
}

void kvp_executors_send(struct kvp_executors *executors, uint32_t slot, uint16_t method, uint64_t tag,
                        const ProtobufCMessage *body, const int *fds, unsigned n_fds)
{
    struct link *link = executors->slots[slot];
    struct kvp_wire_packet packet;
    struct refusal *refusal;
    enum kvp_status status;

    if (link == NULL || link->state != LINK_UP)
        return; /* it has ended, which the core is about to hear */
    status = kvp_wire_pack(method, 0, KVP_OK, tag, body, &packet);
    if (status == KVP_OK) {
        status = link->first == NULL ? kvp_wire_send(link->socket, &packet, fds, n_fds) : KVP_EAGAIN;
        if (status == KVP_EAGAIN) {
            status = enqueue(link, &packet, fds, n_fds);
            if (status == KVP_OK)
                return;
        }
        kvp_wire_packet_free(&packet);
        if (status == KVP_OK || status == KVP_EDISCONNECTED) /* its end-of-file comes by itself */
            return;
    }
    refusal = malloc(sizeof(*refusal));
    if (refusal == NULL) {
        link->later.run = link_end_later;
        kvp_later_add(executors->later, &link->later);
        return;
    }
    *refusal = (struct refusal){
        .later.run = refuse_later, .link = link, .status = status, .method = method, .tag = tag};
    link->references++;
    kvp_later_add(executors->later, &refusal->later);
}

/* ---- from it ----------------------------------------------------------------------------------------------------- */

static const ProtobufCMessageDescriptor *reply_type(const struct kvp_envelope *envelope)
{
    if (envelope->status != KVP_OK)
        return &kvpool__v1__error__descriptor;
    for (size_t i = 0; i < sizeof(replies) / sizeof(replies[0]); i++)
        if (replies[i].method == envelope->method)
            return replies[i].reply;
    return NULL;
}

/** @retval KVP_EPROTO  what it says is nonsense */
static enum kvp_status take_reply(struct link *link)
{
    struct kvp_executors *executors = link->executors;
    struct kvp_wire_frame *frame = &executors->frame;
    const ProtobufCMessageDescriptor *type;
    struct kvp_message message = {.n_fds = 0};
    struct kvp_wire_budget budget;
    enum kvp_status status = kvp_wire_receive(link->socket, true, frame);

    if (status != KVP_OK)
        return status;
    type = (frame->envelope.flags & KVP_ENVELOPE_REPLY) != 0 ? reply_type(&frame->envelope) : NULL;
    kvp_wire_budget_init(&budget, KVP_UNPACK_BYTES_MAX);
    status = type != NULL ? kvp_wire_unpack(type, frame->bytes, frame->envelope.bytes, &budget, &message.body)
                          : KVP_EPROTO;
    if (status == KVP_OK) {
        message.method = frame->envelope.method;
        message.tag = frame->envelope.tag;
        message.fds = frame->fds;
        message.n_fds = frame->n_fds;
        kvp_core_exec_reply(executors->clock->core, link->slot, frame->envelope.status, &message);
        protobuf_c_message_free_unpacked(message.body, &budget.allocator);
        kvp_wire_consume(link->socket);
    }
    kvp_wire_release(frame);
    return status;
}

/* @param all  to the end of what is there, since no more will come; else its share of a turn */
static void take_replies(struct link *link, bool all)
{
    enum kvp_status status = KVP_OK;

    for (unsigned i = 0; status == KVP_OK && link->wanted && (all || i < REPLIES_A_TURN); i++)
        status = take_reply(link);
    if (status == KVP_OK || status == KVP_EAGAIN)
        return;
    if (status != KVP_EDISCONNECTED)
        kvp_log(LOG_ERR, "executor %u (pid %d): its message can not be read: %s", link->slot, (int)link->pid,
                kvp_status_text(status));
    if (link->state != LINK_ENDING)
        link_end(link);
}

static void on_socket(uv_poll_t *poll, int status, int events)
{
    struct link *link = poll->data;

    kvp_clock_tell(link->executors->clock);
    if (status < 0) {
        link_end(link);
        return;
    }
    if ((events & UV_WRITABLE) != 0)
        send_queued(link);
    if ((events & UV_READABLE) != 0 && link->state == LINK_UP)
        take_replies(link, false);
}

static void log_end(const struct link *link)
{
    siginfo_t info = {.si_pid = 0};

    if (waitid((idtype_t)P_PIDFD, (id_t)link->pidfd, &info, WEXITED | WNOHANG) != 0 || info.si_pid == 0)
        return; /* another's child: an earlier daemon started it */
    if (info.si_code == CLD_EXITED && info.si_status == 0)
        kvp_log(LOG_DEBUG, "executor %u (pid %d) ended", link->slot, (int)link->pid);
    else
        kvp_log(LOG_WARNING, "executor %u (pid %d) %s %d", link->slot, (int)link->pid,
                info.si_code == CLD_EXITED ? "exited with" : "died of signal", info.si_status);
}

static void on_process(uv_poll_t *poll, int status, int events)
{
    struct link *link = poll->data;

    (void)status; /* a pidfd tells one thing only */
    (void)events;
    kvp_clock_tell(link->executors->clock);
    log_end(link);
    if (link->state == LINK_UP)
        take_replies(link, true);
    if (link->state != LINK_ENDING)
        link_end(link);
    link_free(link);
}

/* ---- its beginning ----------------------------------------------------------------------------------------------- */

static void up(struct link *link)
{
    link->state = LINK_UP;
    watch(link);
    kvp_core_exec_up(link->executors->clock->core, link->slot, (uint32_t)link->pid);
}

static void up_later(struct kvp_later *later)
{
    struct link *link = (struct link *)((char *)later - offsetof(struct link, later));

    kvp_clock_tell(link->executors->clock);
    if (link->pid != 0) {
        up(link);
        return;
    }
    link_end(link);
    link_free(link);
}

static void parked(void *arg, enum kvp_status status)
{
    struct link *link = arg;

    link->parkings--;
    if (link->state == LINK_STARTING && (status != KVP_OK || link->parkings == 0)) {
        kvp_clock_tell(link->executors->clock);
        if (status == KVP_OK)
            up(link);
        else
            link_end(link);
    }
    unreference(link);
}

static bool park_fd(struct link *link, char letter, int fd, char ret_name[KVP_FDSTORE_NAME_MAX])
{
    snprintf(ret_name, KVP_FDSTORE_NAME_MAX, "%c%u.%d", letter, link->slot, (int)link->pid);
    if (kvp_fdstore_park(link->executors->store, ret_name, fd, parked, link) != KVP_OK) {
        ret_name[0] = 0;
        return false;
    }
    link->parkings++;
    link->references++;
    return true;
}

/* It is kept before it is given work, since its work may outlive the daemon. */
static void park_then_up(struct link *link)
{
    struct kvp_executors *executors = link->executors;

    if (link->pid != 0 && kvp_fdstore_keeps(executors->store)) {
        if (park_fd(link, 'e', link->socket, link->socket_name) && park_fd(link, 'x', link->pidfd, link->pidfd_name))
            return;
        link->later.run = link_end_later;
    }
    kvp_later_add(executors->later, &link->later);
}

static void link_watch(struct link *link)
{
    if (uv_poll_init(link->executors->loop, &link->on_socket, link->socket) != 0 ||
        uv_poll_init(link->executors->loop, &link->on_process, link->pidfd) != 0)
        abort(); /* epoll takes sockets and pidfds alike; what else failed is memory */
    link->references += 2;
    uv_poll_start(&link->on_process, UV_READABLE, on_process);
}

/* If it fails, the link has no pid, which is told in the next turn. */
static void launch(struct link *link, const char *device)
{
    const struct kvp_executors_config *config = &link->executors->config;
    struct kvp_spawn_spec spec = {
        .path = config->path, .device = device, .backend = config->backend, .environment = config->environment};
    int ends[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
        kvp_log(LOG_ERR, "no socket for executor %u: %s", link->slot, strerror(errno));
        return;
    }
    if (fcntl(ends[0], F_SETFL, O_RDWR | O_NONBLOCK) != 0 ||
        kvp_spawn_executor(&spec, ends[1], &link->pid, &link->pidfd) != KVP_OK) {
        close(ends[0]);
        close(ends[1]);
        return;
    }
    close(ends[1]);
    link->socket = ends[0];
    link_watch(link);
    kvp_log(LOG_DEBUG, "executor %u started for %s: pid %d", link->slot, device[0] != 0 ? device : "the first GPU",
            (int)link->pid);
}

static struct link *link_new(struct kvp_executors *executors, uint32_t slot)
{
    struct link *link = slot < KVP_GPUS_MAX && executors->slots[slot] == NULL ? calloc(1, sizeof(*link)) : NULL;

    if (link == NULL)
        return NULL;
    *link = (struct link){.executors = executors, .next = executors->links, .slot = slot, .socket = -1, .pidfd = -1,
                          .references = 2, .wanted = true, .later.run = up_later};
    uv_timer_init(executors->loop, &link->grace);
    link->on_socket.data = link->on_process.data = link->grace.data = link;
    executors->links = link;
    executors->slots[slot] = link;
    return link;
}

void kvp_executors_start(struct kvp_executors *executors, uint32_t slot, const char *device)
{
    struct link *link = link_new(executors, slot);

    if (link == NULL) {
        kvp_log(LOG_CRIT, "out of memory, or executor %u started twice", slot);
        abort(); /* the core could never be told; the next daemon starts from what is parked */
    }
    launch(link, device);
    park_then_up(link);
}

enum kvp_status kvp_executors_adopt(struct kvp_executors *executors, uint32_t slot, uint32_t pid, int socket, int pidfd)
{
    struct link *link = fcntl(socket, F_SETFL, O_RDWR | O_NONBLOCK) == 0 ? link_new(executors, slot) : NULL;

    if (link == NULL)
        return KVP_EEXIST;
    link->pid = (pid_t)pid;
    link->socket = socket;
    link->pidfd = pidfd;
    link->state = LINK_UP;
    snprintf(link->socket_name, KVP_FDSTORE_NAME_MAX, "e%u.%u", slot, pid);
    snprintf(link->pidfd_name, KVP_FDSTORE_NAME_MAX, "x%u.%u", slot, pid);
    link_watch(link);
    watch(link);
    return KVP_OK;
}

void kvp_executors_stop(struct kvp_executors *executors, uint32_t slot)
{
    struct link *link = slot < KVP_GPUS_MAX ? executors->slots[slot] : NULL;

    if (link == NULL)
        return;
    kvp_later_cancel(executors->later, &link->later);
    link->later.run = link_end_later;
    kvp_later_add(executors->later, &link->later);
}

/* ---- all of them ------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_executors_open(uv_loop_t *loop, struct kvp_clock *clock, struct kvp_fdstore *store,
                                   struct kvp_later_queue *later, const struct kvp_executors_config *config,
                                   struct kvp_executors **ret_executors)
{
    struct kvp_executors *executors = calloc(1, sizeof(*executors));

    if (executors == NULL)
        return KVP_ENOMEM;
    executors->loop = loop;
    executors->clock = clock;
    executors->store = store;
    executors->later = later;
    executors->config = *config;
    *ret_executors = executors;
    return KVP_OK;
}

unsigned kvp_executors_ending(const struct kvp_executors *executors)
{
    unsigned n = 0;

    for (const struct link *link = executors->links; link != NULL; link = link->next)
        n += link->pid != 0 && link->state == LINK_ENDING;
    return n;
}

void kvp_executors_stop_all(struct kvp_executors *executors)
{
    for (struct link *link = executors->links; link != NULL; link = link->next) {
        if (link->state == LINK_ENDING || link->socket_name[0] != 0)
            continue;
        link->wanted = false;
        link_end(link);
    }
}

void kvp_executors_close(struct kvp_executors *executors)
{
    while (executors->links != NULL) {
        struct link *link = executors->links;

        if (link->pidfd >= 0 && link->state == LINK_ENDING)
            syscall(SYS_pidfd_send_signal, link->pidfd, SIGKILL, NULL, 0);
        link_free(link);
    }
    free(executors);
}
