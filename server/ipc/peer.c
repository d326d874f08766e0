/* Who is at the other end; see peer.h. */
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

/* Field 22 of /proc/PID/stat; the name in the second field may hold spaces and brackets, so count from the last one. */
uint64_t kvp_process_start_time(uint32_t pid)
{
    char path[32], text[1024], *at;
    ssize_t n;
    int fd;

    snprintf(path, sizeof(path), "/proc/%u/stat", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    n = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    at = strrchr(text, ')');
    for (int field = 2; at != NULL && field < 22; field++) {
        at = strchr(at, ' ');
        if (at != NULL)
            at++;
    }
    return at != NULL ? strtoull(at, NULL, 10) : 0;
}

/* SO_PEERPIDFD names the very process that connected. pidfd_open goes by number, which is the same process as long as
 * it has not been reaped. */
static int peer_pidfd(int socket, uint32_t pid)
{
    socklen_t n = sizeof(int);
    int fd;

    if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &n) == 0)
        return fd;
    if (errno != ENOPROTOOPT && errno != EINVAL)
        return -1;
    if (pid == 0) {
        errno = ENOPROTOOPT;
        return -1;
    }
    return (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
}

enum kvp_status kvp_peer_identify(int socket, struct kvp_peer *ret_peer)
{
    struct ucred who;
    socklen_t n = sizeof(who);
    int pidfd;

    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &who, &n) != 0)
        return KVP_EDISCONNECTED;
    pidfd = peer_pidfd(socket, (uint32_t)who.pid);
    if (pidfd < 0)
        return errno == ESRCH || errno == ENODATA ? KVP_EDISCONNECTED
               : errno == EMFILE || errno == ENFILE || errno == ENOMEM ? KVP_ENOMEM
                                                                      : KVP_ENODEV;
    *ret_peer = (struct kvp_peer){.pid = (uint32_t)who.pid,
                                  .uid = who.uid,
                                  .gid = who.gid,
                                  .start_time = who.pid > 0 ? kvp_process_start_time((uint32_t)who.pid) : 0,
                                  .pidfd = pidfd};
    return KVP_OK;
}

enum kvp_status kvp_peer_process(uint32_t pid, uint64_t start_time, int *ret_pidfd)
{
    int pidfd;

    if (pid == 0 || start_time == 0)
        return KVP_ENODEV;
    pidfd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
    if (pidfd < 0)
        return errno == ESRCH ? KVP_EDISCONNECTED : KVP_ENOMEM;
    /* the number is held by the pidfd's process only from here on, so the start time is read behind it */
    if (kvp_process_start_time(pid) != start_time) {
        close(pidfd);
        return KVP_EDISCONNECTED;
    }
    *ret_pidfd = pidfd;
    return KVP_OK;
}
