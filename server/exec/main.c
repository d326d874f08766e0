/**
 * kvpool-exec --socket-fd N --backend host|cuda [--device ID]: options, the program's state, its end.
 *
 * The daemon starts it and nobody else: the socket that it inherits is its role. It ends with 0 at end-of-file, with 1
 * when its device is lost, with 2 when its options are wrong. At its end the driver may hang: an alarm ends that.
 */
#include "exec.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define END_SECONDS 10 /* to let what runs end, and to give memory back */

static const char usage[] = "usage: kvpool-exec --socket-fd N --backend host|cuda [--device ID]\n"
                            "\n"
                            "The part of kvpool that touches a driver. kvpoold starts it; it is not for use by hand.\n"
                            "\n"
                            "  --socket-fd N    the socket to the daemon, inherited\n"
                            "  --backend NAME   host or cuda\n"
                            "  --device ID      UUID of the GPU, or \"host\"; by default the first\n"
                            "  --version        print the version\n"
                            "  --help           print this\n";

static const struct kvp_exec_backend *backend_by_name(const char *name)
{
#ifdef KVPOOL_HAVE_CUDA
    if (strcmp(name, kvp_exec_cuda.name) == 0)
        return &kvp_exec_cuda;
#endif
    return strcmp(name, kvp_exec_host.name) == 0 ? &kvp_exec_host : NULL;
}

static bool socket_number(const char *text, int *ret_fd)
{
    char *end;
    int type;
    socklen_t bytes = sizeof(type);
    long fd;

    errno = 0;
    fd = strtol(text, &end, 10);
    if (errno != 0 || *end != 0 || end == text || fd < 0 || fd > INT32_MAX)
        return false;
    if (getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &bytes) != 0 || type != SOCK_SEQPACKET)
        return false;
    *ret_fd = (int)fd;
    return true;
}

/* @return -1: go on; else the exit status */
static int read_options(struct kvp_exec *exec, int argc, char **argv)
{
    static const struct option options[] = {
        {"socket-fd", required_argument, NULL, 's'},
        {"backend", required_argument, NULL, 'b'},
        {"device", required_argument, NULL, 'd'},
        {"version", no_argument, NULL, 'v'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (option) {
        case 's':
            if (!socket_number(optarg, &exec->socket)) {
                kvp_log(LOG_ERR, "kvpool-exec: --socket-fd %s is no SEQPACKET socket", optarg);
                return 2;
            }
            break;
        case 'b':
            exec->backend = backend_by_name(optarg);
            if (exec->backend == NULL) {
                kvp_log(LOG_ERR, "kvpool-exec: backend %s is not in this build", optarg);
                return 2;
            }
            break;
        case 'd':
            exec->device_id = optarg;
            break;
        case 'v':
            puts("kvpool-exec " KVPOOL_VERSION);
            return 0;
        case 'h':
            fputs(usage, stdout);
            return 0;
        default:
            return 2;
        }
    if (optind == argc && exec->socket >= 0 && exec->backend != NULL)
        return -1;
    fputs(usage, stderr);
    return 2;
}

static void forget_all(struct kvp_exec *exec, struct kvp_exec_task *tasks)
{
    while (tasks != NULL) {
        struct kvp_exec_work_item *item = (struct kvp_exec_work_item *)tasks;

        tasks = tasks->next;
        item->forget(exec, item);
    }
}

static void end(struct kvp_exec *exec)
{
    alarm(END_SECONDS);
    forget_all(exec, kvp_exec_queue_destroy(exec->queue));
    kvp_exec_objects_drop_all(&exec->buffers);
    kvp_exec_objects_drop_all(&exec->slabs);
    kvp_exec_processes_destroy(exec->processes);
    kvp_exec_outbox_free(exec);
    if (exec->device != NULL)
        exec->backend->close(exec->device);
    close(exec->socket);
    free(exec);
}

int main(int argc, char **argv)
{
    struct kvp_exec *exec = calloc(1, sizeof(*exec));
    enum kvp_status status;
    int code;

    if (exec == NULL)
        return 1;
    kvp_log_start(LOG_INFO);
    exec->socket = -1;
    exec->device_id = "";
    exec->outbox_end = &exec->outbox;
    exec->slabs.free = kvp_exec_slab_free;
    exec->buffers.free = kvp_exec_buffer_free;
    exec->slabs.arg = exec->buffers.arg = exec;
    code = read_options(exec, argc, argv);
    if (code >= 0)
        goto free_exec;
    code = 1;
    /* the loop must never wait in a send; and its short sleeps are to be as short as they say */
    if (fcntl(exec->socket, F_SETFL, O_NONBLOCK) != 0 || fcntl(exec->socket, F_SETFD, FD_CLOEXEC) != 0 ||
        prctl(PR_SET_TIMERSLACK, 1000ul) != 0 || signal(SIGPIPE, SIG_IGN) == SIG_ERR) {
        kvp_log(LOG_ERR, "kvpool-exec: %s", strerror(errno));
        goto free_exec;
    }
    if (kvp_exec_processes_create(exec->backend, &exec->processes) != KVP_OK)
        goto free_exec;
    if (kvp_exec_queue_create(exec->backend, &exec->queue) != KVP_OK) {
        kvp_exec_processes_destroy(exec->processes);
        goto free_exec;
    }
    status = kvp_exec_serve(exec);
    if (status == KVP_EDEVICE) {
        /* the context is lost and its memory with it: the driver takes it back at exit; a clean-up could only hang */
        kvp_log(LOG_ERR, "kvpool-exec: the device is lost to this process: %s", exec->fatal);
        _exit(1);
    }
    end(exec);
    return status == KVP_OK ? 0 : 1;

free_exec:
    free(exec);
    return code;
}
