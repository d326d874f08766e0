/**
 * The connection to the daemon: made, lost, and made again; and which session it stands for.
 *
 *   kvp_connect ──► open ──end-of-file──► lost ──a call is made or waits──► connecting ──► open
 *                                          ▲                                   │
 *                                          └──── nobody there in reconnect_ms ─┘
 *
 * Each new connection begins with KeepAlive, which answers the session, the ledger's uuid and the epoch. If the session
 * is another one than before, every pool attached by the old one is marked (kvp_pool_session_lost) before any call is
 * sent on the new connection, so that none can reach a session which it was not meant for.
 *
 * One thread connects at a time, without the lock; others wait for it.
 */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define RECONNECT_MS_DEFAULT 5000u
#define CALL_MS_DEFAULT      60000u
#define HELLO_MS             10000u /* a daemon that takes the connection answers within */
#define RECEIVE_MS           250u   /* see rpc.c */
#define SEND_MS              20u
#define RETRY_MS_MAX         50u

/* ---- one try ----------------------------------------------------------------------------------------------------- */

static enum kvp_status set_timeouts(int fd)
{
    struct timeval receive = {.tv_usec = RECEIVE_MS * 1000}, send = {.tv_usec = SEND_MS * 1000};

    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &receive, sizeof(receive)) != 0 ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &send, sizeof(send)) != 0)
        return kvp_fail(KVP_EINTERNAL, "a socket refuses its time limits: %s", strerror(errno));
    return KVP_OK;
}

static enum kvp_status open_socket(const char *endpoint, int *ret_socket)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    enum kvp_status status;
    int fd;

    if (strlen(endpoint) >= sizeof(address.sun_path))
        return kvp_fail(KVP_EINVAL, "the endpoint has %zu bytes; a socket's path has at most %zu", strlen(endpoint),
                        sizeof(address.sun_path) - 1);
    memcpy(address.sun_path, endpoint, strlen(endpoint));
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return kvp_fail(KVP_ENOMEM, "no socket can be made: %s", strerror(errno));
    status = set_timeouts(fd);
    if (status == KVP_OK && connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        status = errno == EACCES || errno == EPERM ? KVP_EPERM : KVP_EDISCONNECTED;
        kvp_fail(status, "no connection to kvpoold at %s: %s", endpoint, strerror(errno));
    }
    if (status != KVP_OK) {
        close(fd);
        return status;
    }
    *ret_socket = fd;
    return KVP_OK;
}

struct hello {
    uint64_t session_id, epoch;
    uint8_t instance[16];
};

static enum kvp_status read_hello(const struct kvp_wire_frame *frame, struct hello *ret_hello)
{
    struct kvp_wire_budget budget;
    Kvpool__V1__KeepAliveReply *reply;
    ProtobufCMessage *body;
    enum kvp_status status = frame->envelope.status;

    kvp_wire_budget_init(&budget, KVP_UNPACK_BYTES_MAX);
    if (status != KVP_OK) {
        if (kvp_wire_unpack(&kvpool__v1__error__descriptor, frame->bytes, frame->envelope.bytes, &budget, &body) !=
            KVP_OK)
            return kvp_fail(status, "%s", kvp_status_text(status));
        kvp_fail(status, "%s", ((Kvpool__V1__Error *)body)->message);
        protobuf_c_message_free_unpacked(body, &budget.allocator);
        return status;
    }
    status =
        kvp_wire_unpack(&kvpool__v1__keep_alive_reply__descriptor, frame->bytes, frame->envelope.bytes, &budget, &body);
    if (status != KVP_OK)
        return kvp_fail(status, "what answers is no kvpoold");
    reply = (Kvpool__V1__KeepAliveReply *)body;
    *ret_hello = (struct hello){.session_id = reply->session_id, .epoch = reply->epoch};
    if (reply->instance.len == sizeof(ret_hello->instance))
        memcpy(ret_hello->instance, reply->instance.data, sizeof(ret_hello->instance));
    protobuf_c_message_free_unpacked(body, &budget.allocator);
    return KVP_OK;
}

/**
 * The first exchange on a new connection, before anybody else may use it.
 *
 * A daemon that turns a connection away says why and closes it, perhaps before the hello is sent, or with the hello
 * unread. Then the first thing that the socket tells is that (EPIPE, ECONNRESET), once; what was said is still there.
 */
static enum kvp_status say_hello(int socket, char *token, struct kvp_wire_frame *frame, struct hello *ret_hello)
{
    Kvpool__V1__KeepAliveRequest request = KVPOOL__V1__KEEP_ALIVE_REQUEST__INIT;
    uint64_t deadline_ns = kvp_now_ns() + HELLO_MS * 1000000ull;
    unsigned ends = 0;
    struct kvp_wire_packet packet;
    enum kvp_status status;

    request.session = token;
    status = kvp_wire_pack(KVPOOL__V1__METHOD__METHOD_KEEP_ALIVE, 0, KVP_OK, 0, &request.base, &packet);
    if (status != KVP_OK)
        return kvp_fail(status, "no memory for a message");
    status = kvp_wire_send(socket, &packet, NULL, 0);
    kvp_wire_packet_free(&packet);
    if (status == KVP_EDISCONNECTED)
        status = KVP_OK;
    while (status == KVP_OK) {
        status = kvp_wire_receive(socket, false, frame);
        if (status == KVP_OK) {
            status = read_hello(frame, ret_hello);
            kvp_wire_release(frame);
            return status;
        }
        if ((status == KVP_EAGAIN && kvp_now_ns() < deadline_ns) || (status == KVP_EDISCONNECTED && ends++ == 0))
            status = KVP_OK;
    }
    return kvp_fail(status == KVP_EAGAIN ? KVP_ETIMEDOUT : KVP_EDISCONNECTED,
                    status == KVP_EAGAIN ? "kvpoold took the connection and does not answer"
                                         : "kvpoold closed the connection at once");
}

static void pause_ms(uint64_t ms)
{
    struct timespec time = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};

    while (nanosleep(&time, &time) != 0 && errno == EINTR)
        ;
}

/* Try until it works, or `limit_ms` have passed, or trying again is of no use. */
static enum kvp_status connect_within(struct kvp_client *client, uint32_t limit_ms, int *ret_socket,
                                      struct hello *ret_hello)
{
    uint64_t deadline_ns = kvp_now_ns() + limit_ms * 1000000ull;

    for (uint64_t retry_ms = 1;; retry_ms = retry_ms * 2 < RETRY_MS_MAX ? retry_ms * 2 : RETRY_MS_MAX) {
        int fd = -1;
        enum kvp_status status = open_socket(client->endpoint, &fd);

        if (status == KVP_OK) {
            status = say_hello(fd, client->token, client->frame, ret_hello);
            if (status == KVP_OK) {
                *ret_socket = fd;
                return KVP_OK;
            }
            close(fd);
        }
        if ((status != KVP_EDISCONNECTED && status != KVP_EAGAIN) || kvp_now_ns() >= deadline_ns)
            return status;
        pause_ms(retry_ms);
    }
}

/* ---- again ------------------------------------------------------------------------------------------------------- */

static void adopt(struct kvp_client *client, int socket, const struct hello *hello)
{
    client->socket = socket;
    client->epoch = hello->epoch;
    if (hello->session_id != client->session_id ||
        memcmp(hello->instance, client->instance, sizeof(client->instance)) != 0)
        for (struct kvp_pool *pool = client->pools; pool != NULL; pool = pool->next)
            kvp_pool_session_lost(pool, hello->instance);
    client->session_id = hello->session_id;
    memcpy(client->instance, hello->instance, sizeof(client->instance));
}

/* A session by lease that is not there any more: it is over for good, and so is what it had attached. */
static void session_over(struct kvp_client *client)
{
    for (struct kvp_pool *pool = client->pools; pool != NULL; pool = pool->next)
        kvp_pool_session_lost(pool, client->instance);
}

enum kvp_status kvp_reconnect(struct kvp_client *client)
{
    struct hello hello;
    enum kvp_status status;
    int socket;

    while (client->connecting || (client->socket < 0 && client->reading))
        pthread_cond_wait(&client->changed, &client->lock);
    if (client->socket >= 0)
        return KVP_OK;
    client->connecting = true;
    pthread_mutex_unlock(&client->lock);
    status = connect_within(client, client->options.reconnect_ms, &socket, &hello);
    pthread_mutex_lock(&client->lock);
    client->connecting = false;
    if (status == KVP_OK)
        adopt(client, socket, &hello);
    else if (status == KVP_ESESSION)
        session_over(client);
    pthread_cond_broadcast(&client->changed);
    return status;
}

/* ---- the public pair --------------------------------------------------------------------------------------------- */

static enum kvp_status init_locks(struct kvp_client *client)
{
    pthread_condattr_t attributes;

    if (pthread_mutex_init(&client->lock, NULL) != 0)
        return KVP_ENOMEM;
    if (pthread_condattr_init(&attributes) != 0)
        goto destroy_lock;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (pthread_cond_init(&client->changed, &attributes) != 0)
        goto destroy_attributes;
    pthread_condattr_destroy(&attributes);
    return KVP_OK;

destroy_attributes:
    pthread_condattr_destroy(&attributes);
destroy_lock:
    pthread_mutex_destroy(&client->lock);
    return KVP_ENOMEM;
}

static void free_client(struct kvp_client *client)
{
    free(client->endpoint);
    free(client->token);
    free(client->frame);
    free(client);
}

static struct kvp_client *new_client(const char *endpoint, const struct kvp_connect_options *options)
{
    struct kvp_client *client = calloc(1, sizeof(*client));
    struct timespec now;

    if (client == NULL)
        return NULL;
    if (options != NULL)
        client->options = *options;
    if (client->options.reconnect_ms == 0)
        client->options.reconnect_ms = RECONNECT_MS_DEFAULT;
    if (client->options.call_ms == 0)
        client->options.call_ms = CALL_MS_DEFAULT;
    client->socket = -1;
    client->endpoint = strdup(endpoint);
    client->token = strdup(client->options.session != NULL ? client->options.session : "");
    client->options.session = client->token;
    client->frame = malloc(sizeof(*client->frame));
    client->next_tag = 1;
    /* Rising over the processes that use one session by lease, which have nothing but the clock in common. */
    clock_gettime(CLOCK_REALTIME, &now);
    client->next_call_id = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
    if (client->endpoint == NULL || client->token == NULL || client->frame == NULL || init_locks(client) != KVP_OK) {
        free_client(client);
        return NULL;
    }
    return client;
}

enum kvp_status kvp_connect(const char *endpoint, const struct kvp_connect_options *options,
                            struct kvp_client **ret_client)
{
    struct kvp_client *client;
    enum kvp_status status;
    struct hello hello;
    int socket;

    if (endpoint == NULL)
        endpoint = getenv("KVPOOL_ENDPOINT");
    if (endpoint == NULL || endpoint[0] == 0)
        endpoint = KVP_ENDPOINT_DEFAULT;
    client = new_client(endpoint, options);
    if (client == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a client");
    status = connect_within(client, client->options.connect_ms, &socket, &hello);
    if (status != KVP_OK) {
        pthread_cond_destroy(&client->changed);
        pthread_mutex_destroy(&client->lock);
        free_client(client);
        return status;
    }
    adopt(client, socket, &hello);
    kvp_fork_watch(client);
    *ret_client = client;
    return KVP_OK;
}

void kvp_disconnect(struct kvp_client *client)
{
    if (client == NULL)
        return;
    kvp_fork_unwatch(client);
    while (client->pools != NULL) {
        struct kvp_pool *pool = client->pools;

        client->pools = pool->next;
        kvp_pool_free(pool);
    }
    if (client->socket >= 0)
        close(client->socket);
    if (client->fork_generation == kvp_fork_generation) {
        pthread_cond_destroy(&client->changed);
        pthread_mutex_destroy(&client->lock);
    }
    free_client(client);
}
