/* The runtime folder and the listening sockets; see listen.h. */
#include "listen.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#define SESSION_NAME "kvpool.sock"
#define GRPC_NAME    "grpc.sock"
#define LOCK_NAME    "kvpool.lock"
#define BACKLOG      1024

static enum kvp_status failed(char *reterr_text, enum kvp_status status, const char *what, const char *why)
{
    snprintf(reterr_text, KVP_LISTEN_ERROR_MAX, "%.300s: %.150s", what, why);
    return status;
}

/* The file is removed by who holds it, so what was locked may be no file's any more: then again. */
static enum kvp_status lock_folder(const char *runtime_dir, int *ret_lock, char *reterr_text)
{
    char path[256];
    struct stat locked, named;
    int fd;

    if (mkdir(runtime_dir, 0755) != 0 && errno != EEXIST)
        return failed(reterr_text, KVP_EINVAL, runtime_dir, strerror(errno));
    snprintf(path, sizeof(path), "%s/%s", runtime_dir, LOCK_NAME);
    for (;;) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0 && errno == EACCES) {
            snprintf(reterr_text, KVP_LISTEN_ERROR_MAX,
                     "%.300s: Permission denied: the folder must be of user %u (systemd-tmpfiles --create makes it so)",
                     path, getuid());
            return KVP_EINVAL;
        }
        if (fd < 0)
            return failed(reterr_text, KVP_EINVAL, path, strerror(errno));
        if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
            enum kvp_status status = errno == EWOULDBLOCK ? KVP_EEXIST : KVP_EINVAL;

            failed(reterr_text, status, path,
                   status == KVP_EEXIST ? "another kvpoold has this folder" : strerror(errno));
            close(fd);
            return status;
        }
        if (fstat(fd, &locked) == 0 && stat(path, &named) == 0 && locked.st_ino == named.st_ino)
            break;
        close(fd);
    }
    *ret_lock = fd;
    return KVP_OK;
}

/* fchmod and fchown do not work on a bound socket: its file is meant, before anybody can connect to it. */
static enum kvp_status set_access(const char *path, const struct kvp_place_spec *spec, char *reterr_text)
{
    if (spec->group[0] != 0) {
        const struct group *group = getgrnam(spec->group);

        if (group == NULL)
            return failed(reterr_text, KVP_EINVAL, spec->group, "there is no such group");
        if (chown(path, (uid_t)-1, group->gr_gid) != 0)
            return failed(reterr_text, KVP_EINVAL, path, strerror(errno));
    }
    if (chmod(path, spec->mode) != 0)
        return failed(reterr_text, KVP_EINVAL, path, strerror(errno));
    return KVP_OK;
}

/* A socket's file is in the place of ours. We have the lock, so that no daemon is there; but systemd may listen, or a
 * keeper for its next daemon, and would go on on a socket that nobody finds any more. */
static bool is_listened_on(const struct sockaddr_un *address, int type)
{
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool dead =
        fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof(*address)) != 0 && errno == ECONNREFUSED;

    if (fd >= 0)
        close(fd);
    return !dead;
}

/* Bound with no permission for anyone, opened up, then listening. */
static enum kvp_status bind_socket(const struct kvp_place_spec *spec, const char *name, int type, int *ret_fd,
                                   char *reterr_text)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    enum kvp_status status;
    struct stat st;
    mode_t mask;
    int fd, bound;

    if ((size_t)snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", spec->runtime_dir, name) >=
        sizeof(address.sun_path))
        return failed(reterr_text, KVP_EINVAL, spec->runtime_dir, "the path is too long for a socket");
    if (lstat(address.sun_path, &st) != 0)
        st.st_mode = 0;
    if (S_ISSOCK(st.st_mode) && is_listened_on(&address, type))
        return failed(reterr_text, KVP_EEXIST, address.sun_path,
                      "somebody listens there: systemd (kvpoold.socket), or a kvpool-keeper of another daemon");
    if (st.st_mode != 0 && (!S_ISSOCK(st.st_mode) || unlink(address.sun_path) != 0))
        return failed(reterr_text, KVP_EINVAL, address.sun_path, "is there and can not be replaced by a socket");
    fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return failed(reterr_text, KVP_ENOMEM, name, strerror(errno));
    mask = umask(0777);
    bound = bind(fd, (struct sockaddr *)&address, sizeof(address));
    umask(mask);
    if (bound != 0) {
        status = failed(reterr_text, KVP_EINVAL, address.sun_path, strerror(errno));
        goto close_fd;
    }
    status = set_access(address.sun_path, spec, reterr_text);
    if (status == KVP_OK && listen(fd, BACKLOG) != 0)
        status = failed(reterr_text, KVP_EINVAL, address.sun_path, strerror(errno));
    if (status != KVP_OK)
        goto unlink_path;
    *ret_fd = fd;
    return KVP_OK;

unlink_path:
    unlink(address.sun_path);
close_fd:
    close(fd);
    return status;
}

/* Listening sockets that were handed over, told by their type; what is left stays with `inherited`. */
static void take_passed(struct kvp_place *place, struct kvp_inherited *inherited)
{
    for (unsigned i = 0; i < inherited->n; i++) {
        struct kvp_inherited_fd *item = &inherited->fds[i];
        bool session = item->fd >= 0 && sd_is_socket(item->fd, AF_UNIX, SOCK_SEQPACKET, 1) > 0;
        bool grpc = item->fd >= 0 && sd_is_socket(item->fd, AF_UNIX, SOCK_STREAM, 1) > 0;
        int *slot = session ? &place->session : &place->grpc;

        if ((!session && !grpc) || *slot >= 0 || fcntl(item->fd, F_SETFL, O_RDWR | O_NONBLOCK) != 0)
            continue;
        *slot = item->fd;
        item->fd = -1;
        if (session)
            place->session_is_ours = strcmp(item->name, KVP_SESSION_DOOR_NAME) == 0;
        else
            place->grpc_is_ours = strcmp(item->name, KVP_GRPC_DOOR_NAME) == 0;
    }
}

enum kvp_status kvp_place_take(const struct kvp_place_spec *spec, struct kvp_inherited *inherited,
                               struct kvp_place *ret_place, char *reterr_text)
{
    struct kvp_place place = {.lock = -1, .session = -1, .grpc = -1};
    enum kvp_status status = lock_folder(spec->runtime_dir, &place.lock, reterr_text);

    if (status != KVP_OK)
        return status;
    take_passed(&place, inherited);
    if (place.session < 0) {
        status = bind_socket(spec, SESSION_NAME, SOCK_SEQPACKET, &place.session, reterr_text);
        if (status != KVP_OK)
            goto leave;
        place.session_is_ours = place.session_is_new = true;
    }
    if (place.grpc < 0 && spec->with_grpc) {
        status = bind_socket(spec, GRPC_NAME, SOCK_STREAM, &place.grpc, reterr_text);
        if (status != KVP_OK)
            goto leave;
        place.grpc_is_ours = place.grpc_is_new = true;
    }
    *ret_place = place;
    return KVP_OK;

leave:
    kvp_place_leave(&place, spec->runtime_dir, false);
    return status;
}

static void close_file(int *fd, const char *runtime_dir, const char *name, bool unlink_it)
{
    char path[256];

    if (*fd < 0)
        return;
    if (unlink_it && (size_t)snprintf(path, sizeof(path), "%s/%s", runtime_dir, name) < sizeof(path))
        unlink(path);
    close(*fd);
    *fd = -1;
}

void kvp_place_leave(struct kvp_place *place, const char *runtime_dir, bool keep_files)
{
    close_file(&place->session, runtime_dir, SESSION_NAME, place->session_is_ours && !keep_files);
    close_file(&place->grpc, runtime_dir, GRPC_NAME, place->grpc_is_ours && !keep_files);
    close_file(&place->lock, runtime_dir, LOCK_NAME, true);
}
