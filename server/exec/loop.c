/**
 * The executor's loop: requests in, replies out, ends of tasks in between.
 *
 *     socket ──► request ──► handler ──► reply, or a task ──► queue ──► workers
 *       ▲                                                                  │
 *       └────────── outbox (while the socket is full) ◄─── ended ◄─────────┘
 *
 * Nothing here waits but poll. While the daemon is away its socket's other end is parked, so replies pile up in the
 * socket and then in the outbox; when that is full, no more is read. A message that can not be read is answered with
 * KVP_EPROTO where it has an envelope; the socket lives on. Main thread only.
 */
#include "exec.h"
#include "log.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct method {
    uint16_t number;
    const ProtobufCMessageDescriptor *request;
    void (*handle)(struct kvp_exec *exec, struct kvp_exec_request *request);
};

static const struct method methods[] = {
    {KVPOOL__V1__METHOD__METHOD_EXEC_HELLO, &kvpool__v1__exec_hello_request__descriptor, kvp_exec_hello},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, &kvpool__v1__exec_slab_create_request__descriptor,
     kvp_exec_slab_create},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT, &kvpool__v1__exec_slab_adopt_request__descriptor, kvp_exec_slab_adopt},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP, &kvpool__v1__exec_slab_drop_request__descriptor, kvp_exec_slab_drop},
    {KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT, &kvpool__v1__exec_buffer_import_request__descriptor,
     kvp_exec_buffer_import},
    {KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP, &kvpool__v1__exec_buffer_drop_request__descriptor,
     kvp_exec_buffer_drop},
    {KVPOOL__V1__METHOD__METHOD_EXEC_JOB, &kvpool__v1__exec_job_request__descriptor, kvp_exec_job},
    {KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, &kvpool__v1__exec_processes_request__descriptor,
     kvp_exec_processes_ask},
};

/* ---- out --------------------------------------------------------------------------------------------------------- */

static enum kvp_status send_letter(struct kvp_exec *exec, const struct kvp_wire_packet *packet, int fd)
{
    return kvp_wire_send(exec->socket, packet, &fd, fd >= 0);
}

static void letter_free(struct kvp_exec_letter *letter)
{
    kvp_wire_packet_free(&letter->packet);
    if (letter->fd >= 0)
        close(letter->fd);
    free(letter);
}

/* A reply that can not even be kept is lost: the daemon's own time-out, or the end of this program, answers the call. */
static void post(struct kvp_exec *exec, struct kvp_wire_packet *packet, int fd)
{
    struct kvp_exec_letter *letter;

    if (exec->outbox == NULL && send_letter(exec, packet, fd) != KVP_EAGAIN) {
        kvp_wire_packet_free(packet);
        return;
    }
    letter = malloc(sizeof(*letter));
    if (letter == NULL)
        goto free_packet;
    *letter = (struct kvp_exec_letter){.packet = *packet, .fd = fd >= 0 ? dup(fd) : -1};
    if (fd >= 0 && letter->fd < 0) {
        free(letter);
        goto free_packet;
    }
    *exec->outbox_end = letter;
    exec->outbox_end = &letter->next;
    exec->n_outbox++;
    return;

free_packet:
    kvp_log(LOG_ERR, "kvpool-exec: out of memory, a reply is lost");
    kvp_wire_packet_free(packet);
}

static void drain_outbox(struct kvp_exec *exec)
{
    while (exec->outbox != NULL) {
        struct kvp_exec_letter *letter = exec->outbox;

        if (send_letter(exec, &letter->packet, letter->fd) == KVP_EAGAIN)
            return;
        exec->outbox = letter->next;
        if (exec->outbox == NULL)
            exec->outbox_end = &exec->outbox;
        exec->n_outbox--;
        letter_free(letter);
    }
}

void kvp_exec_outbox_free(struct kvp_exec *exec)
{
    while (exec->outbox != NULL) {
        struct kvp_exec_letter *letter = exec->outbox;

        exec->outbox = letter->next;
        letter_free(letter);
    }
}

void kvp_exec_reply(struct kvp_exec *exec, uint16_t method, uint64_t tag, const ProtobufCMessage *body, int fd)
{
    struct kvp_wire_packet packet;
    enum kvp_status status = kvp_wire_pack(method, KVP_ENVELOPE_REPLY, KVP_OK, tag, body, &packet);

    if (status == KVP_OK)
        post(exec, &packet, fd);
    else
        kvp_exec_refuse(exec, method, tag, status, "the reply could not be packed");
}

void kvp_exec_refuse(struct kvp_exec *exec, uint16_t method, uint64_t tag, enum kvp_status status, const char *text)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    struct kvp_wire_packet packet;

    error.status = status;
    error.message = (char *)text;
    if (kvp_wire_pack(method, KVP_ENVELOPE_REPLY, status, tag, &error.base, &packet) == KVP_OK)
        post(exec, &packet, -1);
    else
        kvp_log(LOG_ERR, "kvpool-exec: out of memory, a reply is lost: %s", text);
}

/* ---- in ---------------------------------------------------------------------------------------------------------- */

void kvp_exec_request_free(struct kvp_exec_request *request)
{
    for (unsigned i = 0; i < request->n_fds; i++)
        if (request->fds[i] >= 0)
            close(request->fds[i]);
    if (request->body != NULL)
        protobuf_c_message_free_unpacked(request->body, &request->budget.allocator);
    free(request);
}

static const struct method *method_by_number(uint16_t number)
{
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
        if (methods[i].number == number)
            return &methods[i];
    return NULL;
}

static void handle(struct kvp_exec *exec)
{
    struct kvp_wire_frame *frame = &exec->frame;
    const struct kvp_envelope *envelope = &frame->envelope;
    const struct method *method = method_by_number(envelope->method);
    struct kvp_exec_request *request;
    enum kvp_status status;

    if (method == NULL) {
        kvp_exec_refuse(exec, envelope->method, envelope->tag, KVP_ENOSYS, "an executor serves no such method");
        return;
    }
    request = calloc(1, sizeof(*request));
    if (request == NULL) {
        kvp_exec_refuse(exec, envelope->method, envelope->tag, KVP_ENOMEM, "no memory for the request");
        return;
    }
    request->method = envelope->method;
    request->tag = envelope->tag;
    kvp_wire_budget_init(&request->budget, KVP_UNPACK_BYTES_MAX);
    status = kvp_wire_unpack(method->request, frame->bytes, envelope->bytes, &request->budget, &request->body);
    if (status != KVP_OK) {
        kvp_exec_refuse(exec, request->method, request->tag, status, "the message can not be unpacked");
        kvp_exec_request_free(request);
        return;
    }
    for (; request->n_fds < frame->n_fds; request->n_fds++) {
        request->fds[request->n_fds] = frame->fds[request->n_fds];
        frame->fds[request->n_fds] = -1;
    }
    method->handle(exec, request);
    if (!request->kept)
        kvp_exec_request_free(request);
}

/* @retval KVP_EDISCONNECTED  end-of-file */
static enum kvp_status receive(struct kvp_exec *exec)
{
    enum kvp_status status = kvp_wire_receive(exec->socket, false, &exec->frame);
    const struct kvp_envelope *envelope = &exec->frame.envelope;

    if (status == KVP_EAGAIN || status == KVP_EDISCONNECTED)
        return status;
    if (envelope->magic == KVP_ENVELOPE_MAGIC && (envelope->flags & KVP_ENVELOPE_REPLY) == 0) {
        if (status == KVP_OK)
            handle(exec);
        else
            kvp_exec_refuse(exec, envelope->method, envelope->tag, status, "the envelope and its message do not fit");
    }
    if (status == KVP_OK)
        kvp_wire_release(&exec->frame);
    return KVP_OK;
}

/* ---- the loop ---------------------------------------------------------------------------------------------------- */

static void take_ended(struct kvp_exec *exec)
{
    struct kvp_exec_task *task = kvp_exec_queue_take_done(exec->queue);

    while (task != NULL) {
        struct kvp_exec_task *next = task->next;
        struct kvp_exec_work_item *item = (struct kvp_exec_work_item *)task;

        if (task->status != KVP_OK && task->error.fatal && exec->fatal[0] == 0)
            snprintf(exec->fatal, sizeof(exec->fatal), "%s", task->error.text);
        item->ended(exec, item);
        task = next;
    }
}

static struct timespec *timeout_of(uint64_t look_ns, int processes_ms, struct timespec *time)
{
    uint64_t ns = processes_ms >= 0 ? (uint64_t)processes_ms * 1000000 : UINT64_MAX;

    if (look_ns < ns)
        ns = look_ns;
    if (ns == UINT64_MAX)
        return NULL;
    *time = (struct timespec){(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    return time;
}

enum kvp_status kvp_exec_serve(struct kvp_exec *exec)
{
    enum { SOCKET, DONE, PROCESSES, FDS };
    struct pollfd fds[FDS] = {[SOCKET] = {.fd = exec->socket},
                              [DONE] = {.fd = kvp_exec_queue_fd(exec->queue), .events = POLLIN},
                              [PROCESSES] = {.fd = kvp_exec_processes_fd(exec->processes), .events = POLLIN}};

    for (;;) {
        struct timespec time;
        uint64_t look_ns = kvp_exec_queue_pump(exec->queue);
        struct timespec *timeout = timeout_of(look_ns, kvp_exec_processes_turn(exec), &time);

        if (exec->fatal[0] != 0)
            return KVP_EDEVICE;
        fds[SOCKET].events =
            (short)((exec->n_outbox < KVP_EXEC_OUTBOX_MAX ? POLLIN : 0) | (exec->outbox != NULL ? POLLOUT : 0));
        if (ppoll(fds, FDS, timeout, NULL) < 0) {
            if (errno == EINTR)
                continue;
            return KVP_EINTERNAL;
        }
        if ((fds[SOCKET].revents & POLLOUT) != 0)
            drain_outbox(exec);
        if ((fds[DONE].revents & POLLIN) != 0)
            take_ended(exec);
        if ((fds[SOCKET].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && receive(exec) == KVP_EDISCONNECTED)
            return KVP_OK;
    }
}
