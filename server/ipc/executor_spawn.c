/* Start kvpool-exec; see executor_spawn.h. */
#include "executor_spawn.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXECUTOR_NAME   "kvpool-exec"
#define EXECUTOR_SOCKET 3

/* What the service manager told the daemon is not the executor's. */
static const char *const private_variables[] = {"NOTIFY_SOCKET=", "WATCHDOG_PID=", "WATCHDOG_USEC=", "LISTEN_PID=",
                                                "LISTEN_FDS=",    "LISTEN_FDNAMES="};

static bool is_private(const char *variable)
{
    for (size_t i = 0; i < sizeof(private_variables) / sizeof(private_variables[0]); i++)
        if (strncmp(variable, private_variables[i], strlen(private_variables[i])) == 0)
            return true;
    return false;
}

/* The variables of `added` (which is cut into them) come last, and so over any of the same name: those are left out. */
static char **environment_with(char *added)
{
    size_t n = 0, n_added = 0, kept = 0;
    char **variables, *rest = added;

    while (environ[n] != NULL)
        n++;
    variables = calloc(n + strlen(added) / 2 + 2, sizeof(*variables));
    if (variables == NULL)
        return NULL;
    for (char *v = strtok_r(added, " ", &rest); v != NULL; v = strtok_r(NULL, " ", &rest))
        if (strchr(v, '=') != NULL)
            variables[n_added++] = v;
    for (size_t i = 0; i < n; i++) {
        bool hidden = is_private(environ[i]);

        for (size_t k = 0; k < n_added && !hidden; k++)
            hidden = strncmp(environ[i], variables[k], (size_t)(strchr(variables[k], '=') - variables[k]) + 1) == 0;
        if (!hidden)
            variables[n_added + kept++] = environ[i];
    }
    return variables;
}

static bool find_program(const char *path, char ret_path[PATH_MAX])
{
    ssize_t n;
    char *slash;

    if (path[0] != 0)
        return snprintf(ret_path, PATH_MAX, "%s", path) < PATH_MAX;
    n = readlink("/proc/self/exe", ret_path, PATH_MAX - 1);
    if (n <= 0)
        return false;
    ret_path[n] = 0;
    slash = strrchr(ret_path, '/');
    if (slash == NULL || (size_t)(slash - ret_path) + sizeof("/" EXECUTOR_NAME) > PATH_MAX)
        return false;
    strcpy(slash, "/" EXECUTOR_NAME);
    return true;
}

/* @return 0 or an errno */
static int spawn(const char *path, char *const argv[], char *const envp[], int socket, pid_t *ret_pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none, all;
    int error;

    error = posix_spawn_file_actions_init(&actions);
    if (error != 0)
        return error;
    error = posix_spawnattr_init(&attributes);
    if (error != 0)
        goto destroy_actions;
    sigemptyset(&none);
    sigfillset(&all);
    /* its own process group: an operator's ^C is the daemon's to handle */
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setpgroup(&attributes, 0);
    error = posix_spawn_file_actions_adddup2(&actions, socket, EXECUTOR_SOCKET);
    if (error == 0)
        error = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    if (error == 0)
        error = posix_spawn_file_actions_addclosefrom_np(&actions, EXECUTOR_SOCKET + 1);
    if (error == 0)
        error = posix_spawn(ret_pid, path, &actions, &attributes, argv, envp);
    posix_spawnattr_destroy(&attributes);
destroy_actions:
    posix_spawn_file_actions_destroy(&actions);
    return error;
}

enum kvp_status kvp_spawn_executor(const struct kvp_spawn_spec *spec, int socket, pid_t *ret_pid, int *ret_pidfd)
{
    char path[PATH_MAX] = "", number[12];
    char *argv[] = {path,       "--socket-fd", number, "--device", (char *)(uintptr_t)spec->device,
                    "--backend", (char *)(uintptr_t)spec->backend, NULL};
    char *added = strdup(spec->environment);
    char **envp = added != NULL ? environment_with(added) : NULL;
    int error = ENOMEM, pidfd;
    pid_t pid;

    snprintf(number, sizeof(number), "%d", EXECUTOR_SOCKET);
    if (envp != NULL)
        error = find_program(spec->path, path) ? spawn(path, argv, envp, socket, &pid) : ENOENT;
    free(envp);
    free(added);
    if (error != 0) {
        kvp_log(LOG_ERR, "%s can not be started: %s", path[0] != 0 ? path : EXECUTOR_NAME, strerror(error));
        return KVP_ENODEV;
    }
    pidfd = (int)syscall(SYS_pidfd_open, pid, 0); /* ours and not yet reaped: the number is its own */
    if (pidfd < 0) {
        kvp_log(LOG_ERR, "%s can not be watched: %s", path, strerror(errno));
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        return KVP_ENODEV;
    }
    *ret_pid = pid;
    *ret_pidfd = pidfd;
    return KVP_OK;
}
