/**
 * Start kvpool-exec: one fd, a clean environment, no signal of ours.
 */
#ifndef KVP_EXECUTOR_SPAWN_H
#define KVP_EXECUTOR_SPAWN_H

#include "kvp_status.h"

#include <sys/types.h>

struct kvp_spawn_spec {
    const char *path;        /* "": kvpool-exec beside this program */
    const char *device;      /* "host", a UUID, or "": the first GPU */
    const char *backend;     /* "host" or "cuda" */
    const char *environment; /* NAME=VALUE, with spaces between */
};

/**
 * @param socket     becomes its fd 3; it inherits no other but stdout and stderr
 * @param ret_pidfd  close-on-exec
 * @retval KVP_ENODEV  the program can not be started; it is logged why
 */
enum kvp_status kvp_spawn_executor(const struct kvp_spawn_spec *spec, int socket, pid_t *ret_pid, int *ret_pidfd);

#endif
