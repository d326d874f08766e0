/**
 * The floor of the gRPC door: a bare server over gRPC's C core that answers every call with the same bytes. Its thread
 * model is the door's: a thread in the completion queue hands over, the libuv loop answers, connections are accepted by
 * itself and given to gRPC. It checks nothing, knows nobody, unpacks nothing.
 */
#include "grpc_echo.h"

#include <fcntl.h>
#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <uv.h>

struct tag {
    void (*done)(struct tag *tag);
    struct call *call;
    bool ok;
    struct tag *next;
};

struct call {
    grpc_call *grpc;
    grpc_call_details details;
    grpc_metadata_array metadata;
    grpc_byte_buffer *request, *reply;
    int cancelled;
    struct tag arrived, received, closed, sent;
    unsigned tags;
};

static struct {
    grpc_server *server;
    grpc_completion_queue *cq;
    grpc_server_credentials *creds;
    _Atomic(struct tag *) queue;
    uv_loop_t loop;
    uv_async_t async;
    uv_poll_t poll;
    uv_thread_t thread;
    int listen_fd;
    grpc_slice reply;
} echo;

static void must(bool so, const char *what)
{
    if (!so) {
        fprintf(stderr, "echo: %s\n", what);
        exit(1);
    }
}

static void request_one(void);

static void home(struct call *call)
{
    if (--call->tags > 0)
        return;
    grpc_byte_buffer_destroy(call->request);
    grpc_byte_buffer_destroy(call->reply);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_unref(call->grpc);
    free(call);
}

static void on_home(struct tag *tag)
{
    home(tag->call);
}

static void start(struct call *call, const grpc_op *ops, size_t n, struct tag *tag)
{
    call->tags++;
    must(grpc_call_start_batch(call->grpc, ops, n, tag, NULL) == GRPC_CALL_OK, "batch");
}

static void on_received(struct tag *tag)
{
    struct call *call = tag->call;
    grpc_op ops[3] = {{.op = GRPC_OP_SEND_INITIAL_METADATA}, {.op = GRPC_OP_SEND_STATUS_FROM_SERVER},
                      {.op = GRPC_OP_SEND_MESSAGE}};

    if (call->request != NULL) {
        call->reply = grpc_raw_byte_buffer_create(&echo.reply, 1);
        ops[2].data.send_message.send_message = call->reply;
        start(call, ops, 3, &call->sent);
    }
    home(call);
}

static void on_arrived(struct tag *tag)
{
    struct call *call = tag->call;
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER}, receive = {.op = GRPC_OP_RECV_MESSAGE};

    if (!tag->ok)
        return;
    request_one();
    close.data.recv_close_on_server.cancelled = &call->cancelled;
    receive.data.recv_message.recv_message = &call->request;
    start(call, &close, 1, &call->closed);
    start(call, &receive, 1, &call->received);
}

static void request_one(void)
{
    struct call *call = calloc(1, sizeof(*call));

    must(call != NULL, "memory");
    call->arrived = (struct tag){.done = on_arrived, .call = call};
    call->received = (struct tag){.done = on_received, .call = call};
    call->closed = (struct tag){.done = on_home, .call = call};
    call->sent = (struct tag){.done = on_home, .call = call};
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    must(grpc_server_request_call(echo.server, &call->grpc, &call->details, &call->metadata, echo.cq, echo.cq,
                                  &call->arrived) == GRPC_CALL_OK,
         "request");
}

static void wait_for_events(void *arg)
{
    (void)arg;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(echo.cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        struct tag *tag = event.tag, *newest = atomic_load_explicit(&echo.queue, memory_order_relaxed);

        if (event.type != GRPC_OP_COMPLETE)
            continue;
        tag->ok = event.success != 0;
        do {
            tag->next = newest;
        } while (!atomic_compare_exchange_weak_explicit(&echo.queue, &newest, tag, memory_order_release,
                                                        memory_order_relaxed));
        if (newest == NULL)
            uv_async_send(&echo.async);
    }
}

static void events_ready(uv_async_t *async)
{
    struct tag *newest = atomic_exchange_explicit(&echo.queue, NULL, memory_order_acquire), *oldest = NULL;

    (void)async;
    while (newest != NULL) {
        struct tag *next = newest->next;

        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest != NULL) {
        struct tag *next = oldest->next;

        oldest->done(oldest);
        oldest = next;
    }
}

static void accept_ready(uv_poll_t *poll, int status, int events)
{
    int fd = accept4(echo.listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

    (void)poll;
    (void)status;
    (void)events;
    if (fd >= 0)
        grpc_server_add_channel_from_fd(echo.server, fd, echo.creds);
}

void grpc_echo_serve(int listen_fd, size_t reply_bytes)
{
    void *bytes = calloc(1, reply_bytes + 1);

    must(bytes != NULL, "memory");
    setenv("GRPC_POLL_STRATEGY", "epoll1", 1);
    grpc_init();
    echo.reply = grpc_slice_from_copied_buffer(bytes, reply_bytes);
    echo.listen_fd = listen_fd;
    echo.cq = grpc_completion_queue_create_for_next(NULL);
    echo.server = grpc_server_create(NULL, NULL);
    echo.creds = grpc_insecure_server_credentials_create();
    grpc_server_register_completion_queue(echo.server, echo.cq, NULL);
    grpc_server_start(echo.server);
    must(uv_loop_init(&echo.loop) == 0 && uv_async_init(&echo.loop, &echo.async, events_ready) == 0 &&
             uv_poll_init(&echo.loop, &echo.poll, listen_fd) == 0 &&
             uv_poll_start(&echo.poll, UV_READABLE, accept_ready) == 0,
         "loop");
    for (unsigned i = 0; i < 64; i++)
        request_one();
    must(uv_thread_create(&echo.thread, wait_for_events, NULL) == 0, "thread");
    uv_run(&echo.loop, UV_RUN_DEFAULT); /* until it is killed */
}
