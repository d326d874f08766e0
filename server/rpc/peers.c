/**
 * Who is behind a connection. gRPC names the peer of a call only by the number of the fd that the connection came in
 * on, so each connection gets a number of its own, high above what else the process opens, and the numbers go round:
 *
 *      0 … first-1    the process's other fds (the kernel hands out the lowest free number)
 *      first …        UNUSED ──add──► OPEN ──sweep sees it closed──► CLOSED ──rest, no calls──► may be taken again
 *
 * gRPC owns the fd from the moment it has it and closes it by itself; nothing here uses it as a socket again. Whether
 * it is still open is read by F_GETFD, which touches no more than the table of fds.
 */
#include "door.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define NUMBERS_FIRST_MAX 32768u
#define NUMBERS_MAX       65536u

enum kvp_status kvp_rpc_peers_init(struct kvp_rpc_peers *peers)
{
    struct rlimit limit;
    rlim_t numbers;

    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < KVP_RPC_FDS_MIN)
        return KVP_ENOMEM;
    numbers = limit.rlim_cur;
    peers->first = numbers / 2 > NUMBERS_FIRST_MAX ? NUMBERS_FIRST_MAX : (unsigned)(numbers / 2);
    peers->n = numbers - peers->first > NUMBERS_MAX ? NUMBERS_MAX : (unsigned)(numbers - peers->first);
    peers->of = calloc(peers->n, sizeof(*peers->of));
    if (peers->of == NULL)
        return KVP_ENOMEM;
    peers->tls = (struct kvp_rpc_peer){.state = KVP_PEER_OPEN, .caller = {.door = KVP_DOOR_TCP}};
    return KVP_OK;
}

void kvp_rpc_peers_free(struct kvp_rpc_peers *peers)
{
    free(peers->of);
    peers->of = NULL;
}

static bool may_take(const struct kvp_rpc_peer *peer, uint64_t now_ms)
{
    return peer->state == KVP_PEER_UNUSED ||
           (peer->state == KVP_PEER_CLOSED && peer->calls == 0 && now_ms - peer->closed_ms >= KVP_RPC_NUMBER_REST_MS);
}

enum kvp_status kvp_rpc_peers_add(struct kvp_rpc_peers *peers, int fd, const struct kvp_caller *caller, uint64_t now_ms,
                                  int *ret_number)
{
    enum kvp_status status = KVP_ELIMIT;

    for (unsigned tried = 0; tried < peers->n; tried++) {
        unsigned i = peers->next;
        int number;

        peers->next = (i + 1) % peers->n;
        if (!may_take(&peers->of[i], now_ms))
            continue;
        number = fcntl(fd, F_DUPFD_CLOEXEC, (int)(peers->first + i));
        if (number < 0) {
            status = KVP_ENOMEM;
            break;
        }
        if (number != (int)(peers->first + i)) { /* someone else has that number */
            close(number);
            continue;
        }
        close(fd);
        peers->of[i] = (struct kvp_rpc_peer){.state = KVP_PEER_OPEN, .caller = *caller};
        peers->open++;
        *ret_number = number;
        return KVP_OK;
    }
    close(fd);
    return status;
}

void kvp_rpc_peers_sweep(struct kvp_rpc_peers *peers, uint64_t now_ms)
{
    uint32_t left = peers->open;

    for (unsigned i = 0; i < peers->n && left > 0; i++) {
        struct kvp_rpc_peer *peer = &peers->of[i];

        if (peer->state != KVP_PEER_OPEN)
            continue;
        left--;
        if (fcntl((int)(peers->first + i), F_GETFD) >= 0 || errno != EBADF)
            continue;
        peer->state = KVP_PEER_CLOSED;
        peer->closed_ms = now_ms;
        peers->open--;
    }
}

struct kvp_rpc_peer *kvp_rpc_peers_find(struct kvp_rpc_peers *peers, const char *name)
{
    unsigned long number;
    char *end;

    if (strncmp(name, "ipv4:", 5) == 0 || strncmp(name, "ipv6:", 5) == 0)
        return &peers->tls;
    if (strncmp(name, "fd:", 3) != 0)
        return NULL;
    errno = 0;
    number = strtoul(name + 3, &end, 10);
    if (errno != 0 || *end != 0 || number < peers->first || number - peers->first >= peers->n)
        return NULL;
    return peers->of[number - peers->first].state == KVP_PEER_UNUSED ? NULL : &peers->of[number - peers->first];
}
