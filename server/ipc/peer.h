/**
 * Who is at the other end of a Unix socket: the kernel's word on its process, and a pidfd that tells of its end.
 */
#ifndef KVP_PEER_H
#define KVP_PEER_H

#include "kvp_status.h"

#include <stdint.h>

struct kvp_peer {
    uint32_t pid; /* 0: it is in a pid namespace that is not visible from here */
    uint32_t uid, gid;
    uint64_t start_time; /* of the process, clock ticks since boot; 0: unknown */
    int pidfd;           /* close-on-exec; the caller's to close */
};

/**
 * @retval KVP_EDISCONNECTED  the process has ended already
 * @retval KVP_ENODEV         it can not be watched: not visible, and the kernel has no SO_PEERPIDFD (6.5)
 * @retval KVP_ENOMEM         out of fds
 */
enum kvp_status kvp_peer_identify(int socket, struct kvp_peer *ret_peer);

/** When a process started, in clock ticks since boot. @return 0: unknown */
uint64_t kvp_process_start_time(uint32_t pid);

/**
 * A pidfd of the process of that number, if it is the one that started then.
 * @retval KVP_EDISCONNECTED  it has ended
 * @retval KVP_ENODEV         it has no number here
 * @retval KVP_ENOMEM         out of fds
 */
enum kvp_status kvp_peer_process(uint32_t pid, uint64_t start_time, int *ret_pidfd);

#endif
