/**
 * How connections come in. The Unix socket, and TCP without TLS, are accepted here: the kernel's word on the peer is
 * read, the number of connections is limited, and the socket goes to gRPC under an fd number of its own (peers.c). TCP
 * with TLS is gRPC's own listener, where the certificate is what limits who may come.
 *
 * A connection over the limit is closed at once: its client sees UNAVAILABLE. When fds run out, listening rests for
 * REST_MS and the queue of the socket holds the newcomers.
 */
#include "door.h"

#include <arpa/inet.h>
#include <errno.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <syslog.h>
#include <unistd.h>

#define ACCEPTS_A_TURN   16
#define REST_MS          100
#define PEM_BYTES_MAX    (1 << 20)
#define ADDRESS_BYTES_MAX 128

/* ---- accepting --------------------------------------------------------------------------------------------------- */

static enum kvp_status who(const struct kvp_rpc_listener *listener, int fd, struct kvp_caller *ret_caller)
{
    struct ucred peer;
    socklen_t n = sizeof(peer);

    if (listener->tcp) {
        int one = 1;

        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* slower without, not wrong */
        *ret_caller = (struct kvp_caller){.door = KVP_DOOR_TCP};
        return KVP_OK;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) != 0 || n != sizeof(peer))
        return KVP_EPERM;
    *ret_caller = (struct kvp_caller){.door = KVP_DOOR_GRPC,
                                      .known = true,
                                      .pid = (uint32_t)peer.pid,
                                      .uid = (uint32_t)peer.uid,
                                      .gid = (uint32_t)peer.gid};
    return KVP_OK;
}

static void turned_away(struct kvp_rpc *rpc, const char *why)
{
    rpc->stats.refused++;
    kvp_rpc_log(rpc, LOG_WARNING, "grpc: a connection was turned away: %s", why);
}

static void take(struct kvp_rpc_listener *listener, int fd)
{
    struct kvp_rpc *rpc = listener->rpc;
    uint64_t now_ms = uv_now(rpc->loop);
    struct kvp_caller caller;
    enum kvp_status status;
    int number;

    if (rpc->peers.open >= rpc->config.max_connections)
        kvp_rpc_peers_sweep(&rpc->peers, now_ms);
    if (rpc->peers.open >= rpc->config.max_connections || who(listener, fd, &caller) != KVP_OK) {
        close(fd);
        turned_away(rpc, rpc->peers.open >= rpc->config.max_connections ? "grpc.connections is reached"
                                                                        : "the kernel does not tell whose it is");
        return;
    }
    status = kvp_rpc_peers_add(&rpc->peers, fd, &caller, now_ms, &number);
    if (status != KVP_OK) {
        kvp_rpc_peers_sweep(&rpc->peers, now_ms);
        turned_away(rpc, status == KVP_ELIMIT ? "grpc.connections is reached"
                                              : "there is no file descriptor for it (LimitNOFILE=, ulimit -n)");
        return;
    }
    grpc_server_add_channel_from_fd(rpc->server, number, rpc->plain);
}

static void accept_ready(uv_poll_t *poll, int status, int events);

static void rested(uv_timer_t *timer)
{
    struct kvp_rpc *rpc = timer->data;
    struct kvp_rpc_listener *all[] = {&rpc->unix_listener, &rpc->tcp_listener};

    for (unsigned i = 0; i < 2; i++)
        if (all[i]->fd >= 0 && uv_poll_start(&all[i]->poll, UV_READABLE, accept_ready) != 0)
            kvp_rpc_log(rpc, LOG_ERR, "grpc: can not listen again");
}

static void accept_ready(uv_poll_t *poll, int status, int events)
{
    struct kvp_rpc_listener *listener = poll->data;

    (void)events;
    if (status < 0)
        return;
    for (unsigned i = 0; i < ACCEPTS_A_TURN; i++) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (fd >= 0) {
            take(listener, fd);
            continue;
        }
        if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) {
            kvp_rpc_log(listener->rpc, LOG_WARNING, "grpc: accept: %s; listening rests", strerror(errno));
            uv_poll_stop(poll);
            uv_timer_start(&listener->rpc->rest, rested, REST_MS, 0);
        }
        return;
    }
}

static enum kvp_status listen_on(struct kvp_rpc *rpc, struct kvp_rpc_listener *listener, int fd, bool tcp)
{
    if (uv_poll_init(rpc->loop, &listener->poll, fd) != 0) {
        if (tcp)
            close(fd);
        return KVP_ENODEV;
    }
    rpc->handles++;
    listener->poll.data = listener;
    listener->rpc = rpc;
    listener->fd = fd;
    listener->tcp = tcp;
    return uv_poll_start(&listener->poll, UV_READABLE, accept_ready) == 0 ? KVP_OK : KVP_ENOMEM;
}

static void listener_closed(uv_handle_t *handle)
{
    struct kvp_rpc_listener *listener = handle->data;
    struct kvp_rpc *rpc = listener->rpc;

    handle->data = rpc;
    kvp_rpc_handle_closed(handle);
}

void kvp_rpc_listen_stop(struct kvp_rpc *rpc)
{
    struct kvp_rpc_listener *all[] = {&rpc->unix_listener, &rpc->tcp_listener};

    for (unsigned i = 0; i < 2; i++) {
        if (all[i]->fd < 0)
            continue;
        uv_poll_stop(&all[i]->poll);
        if (all[i]->tcp)
            close(all[i]->fd);
        all[i]->fd = -1;
        uv_close((uv_handle_t *)&all[i]->poll, listener_closed);
    }
    uv_timer_stop(&rpc->rest);
}

/* ---- TCP --------------------------------------------------------------------------------------------------------- */

static enum kvp_status resolve(const char *address, struct addrinfo **ret_found)
{
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICHOST | AI_NUMERICSERV};
    char host[ADDRESS_BYTES_MAX];
    char *colon, *name = host;

    if (strlen(address) >= sizeof(host))
        return KVP_EINVAL;
    strcpy(host, address);
    colon = strrchr(host, ':');
    if (colon == NULL || colon == host)
        return KVP_EINVAL;
    *colon = 0;
    if (name[0] == '[' && colon[-1] == ']') {
        name++;
        colon[-1] = 0;
    }
    return getaddrinfo(name, colon + 1, &hints, ret_found) == 0 ? KVP_OK : KVP_EINVAL;
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr) >> 24 == 127;
    return address->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr);
}

static enum kvp_status bind_plain(struct kvp_rpc *rpc, const struct addrinfo *where, int *ret_fd)
{
    int fd = socket(where->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_storage bound;
    socklen_t n = sizeof(bound);

    if (fd < 0)
        return KVP_ENOMEM;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) != 0 ||
        bind(fd, where->ai_addr, where->ai_addrlen) != 0 || listen(fd, SOMAXCONN) != 0 ||
        getsockname(fd, (struct sockaddr *)&bound, &n) != 0) {
        kvp_rpc_log(rpc, LOG_ERR, "grpc: %s: %s", rpc->config.tcp_address, strerror(errno));
        close(fd);
        return KVP_ENODEV;
    }
    rpc->tcp_port = ntohs(bound.ss_family == AF_INET ? ((struct sockaddr_in *)&bound)->sin_port
                                                     : ((struct sockaddr_in6 *)&bound)->sin6_port);
    *ret_fd = fd;
    return KVP_OK;
}

static char *read_pem(struct kvp_rpc *rpc, const char *path)
{
    FILE *file = fopen(path, "re");
    char *text = NULL;
    size_t n;

    if (file == NULL) {
        kvp_rpc_log(rpc, LOG_ERR, "grpc: %s: %s", path, strerror(errno));
        return NULL;
    }
    text = malloc(PEM_BYTES_MAX);
    if (text == NULL)
        goto close_file;
    n = fread(text, 1, PEM_BYTES_MAX, file);
    if (n == 0 || n == PEM_BYTES_MAX || ferror(file)) {
        kvp_rpc_log(rpc, LOG_ERR, "grpc: %s: empty, over %d bytes, or not to be read", path, PEM_BYTES_MAX);
        free(text);
        text = NULL;
        goto close_file;
    }
    text[n] = 0;
close_file:
    fclose(file);
    return text;
}

static void forget(char *secret)
{
    if (secret != NULL)
        explicit_bzero(secret, strlen(secret));
    free(secret);
}

static enum kvp_status bind_tls(struct kvp_rpc *rpc)
{
    const struct kvp_rpc_config *config = &rpc->config;
    char *cert = read_pem(rpc, config->tls_cert), *key = read_pem(rpc, config->tls_key),
         *ca = read_pem(rpc, config->tls_ca);
    enum kvp_status status = KVP_ENODEV;
    int port = 0;

    if (cert != NULL && key != NULL && ca != NULL) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};

        rpc->tls = grpc_ssl_server_credentials_create_ex(
            ca, &pair, 1, GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY, NULL);
        if (rpc->tls != NULL)
            port = grpc_server_add_http2_port(rpc->server, config->tcp_address, rpc->tls);
    }
    if (port > 0) {
        rpc->tcp_port = (unsigned)port;
        status = KVP_OK;
    } else {
        kvp_rpc_log(rpc, LOG_ERR, "grpc: %s: no TLS there: address or certificate", config->tcp_address);
    }
    forget(cert);
    forget(key);
    forget(ca);
    return status;
}

static enum kvp_status listen_tcp(struct kvp_rpc *rpc)
{
    const struct kvp_rpc_config *config = &rpc->config;
    unsigned files = (config->tls_cert != NULL) + (config->tls_key != NULL) + (config->tls_ca != NULL);
    struct addrinfo *found;
    enum kvp_status status;
    int fd;

    if (files != 0 && files != 3)
        return KVP_EINVAL;
    status = resolve(config->tcp_address, &found);
    if (status != KVP_OK)
        return status;
    if (files == 3) {
        status = bind_tls(rpc);
    } else if (!config->tcp_plain_anywhere && !is_loopback(found->ai_addr)) {
        kvp_rpc_log(rpc, LOG_ERR, "grpc: %s: without TLS only loopback addresses are served", config->tcp_address);
        status = KVP_EINVAL;
    } else {
        status = bind_plain(rpc, found, &fd);
        if (status == KVP_OK)
            status = listen_on(rpc, &rpc->tcp_listener, fd, true);
    }
    freeaddrinfo(found);
    return status;
}

enum kvp_status kvp_rpc_listen(struct kvp_rpc *rpc)
{
    enum kvp_status status = KVP_OK;

    if (rpc->config.unix_listen_fd >= 0)
        status = listen_on(rpc, &rpc->unix_listener, rpc->config.unix_listen_fd, false);
    if (status == KVP_OK && rpc->config.tcp_address != NULL)
        status = listen_tcp(rpc);
    return status;
}
