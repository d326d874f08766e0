/* Taking over from an earlier daemon; see adoption.h. */
#include "adoption.h"
#include "ledger_block.h"
#include "log.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

void kvp_adopt_things(struct kvp_inherited *inherited, struct kvp_things *things, struct kvp_core *core)
{
    for (unsigned i = 0; i < inherited->n; i++) {
        struct kvp_inherited_fd *item = &inherited->fds[i];
        struct kvp_thing thing;
        void *address = NULL;
        uint64_t bytes = 0;
        enum kvp_status status;

        if (item->fd < 0 || !kvp_thing_parse(item->name, &thing))
            continue;
        status = kvp_things_adopt(things, thing, item->fd, &address, &bytes);
        item->fd = -1;
        if (status == KVP_OK)
            kvp_core_thing_ready(core, thing, KVP_OK, address, bytes);
        else
            kvp_log(LOG_ERR, "%s was kept and can not be adopted: %s", item->name, kvp_status_text(status));
    }
}

void kvp_adopt_sessions(const struct kvp_inherited *inherited, const struct kvp_ledger *ledger, struct kvp_core *core)
{
    for (unsigned i = 0; i < inherited->n; i++) {
        struct kvp_session_id session;
        struct kvp_session_view view;

        if (inherited->fds[i].fd >= 0 && kvp_session_parse(inherited->fds[i].name, 'c', &session) &&
            kvp_session_get(ledger, session, &view) == KVP_OK)
            kvp_core_session_adopted(core, session);
    }
}

/* One that lacks its pidfd, or is a second of its slot, stays among the rest: its end-of-file comes when that is closed. */
void kvp_adopt_executors(struct kvp_inherited *inherited, struct kvp_executors *executors, struct kvp_core *core)
{
    for (unsigned i = 0; i < inherited->n; i++) {
        struct kvp_inherited_fd *item = &inherited->fds[i];
        char name[KVP_FDSTORE_NAME_MAX];
        uint32_t slot, pid;
        int pidfd;

        if (item->fd < 0 || !kvp_executor_parse(item->name, 'e', &slot, &pid))
            continue;
        snprintf(name, sizeof(name), "x%u.%u", slot, pid);
        pidfd = kvp_inherited_take(inherited, name);
        if (pidfd < 0)
            continue;
        if (kvp_executors_adopt(executors, slot, pid, item->fd, pidfd) != KVP_OK) {
            close(pidfd);
            continue;
        }
        item->fd = -1;
        kvp_core_exec_adopted(core, slot);
    }
}

static int take(struct kvp_inherited *inherited, char letter, struct kvp_session_id session)
{
    char name[KVP_FDSTORE_NAME_MAX];

    snprintf(name, sizeof(name), "%c%u.%u", letter, session.slot, session.generation);
    return kvp_inherited_take(inherited, name);
}

static void give_up(struct kvp_fdstore *store, char letter, struct kvp_session_id session)
{
    char name[KVP_FDSTORE_NAME_MAX];

    snprintf(name, sizeof(name), "%c%u.%u", letter, session.slot, session.generation);
    kvp_fdstore_unpark(store, name);
}

unsigned kvp_adopt_connections(struct kvp_inherited *inherited, const struct kvp_ledger *ledger, struct kvp_core *core,
                               struct kvp_session_door *door, struct kvp_fdstore *store)
{
    unsigned connections = 0;

    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++) {
        struct kvp_session_view view;
        enum kvp_status status;
        int socket, pidfd;
        bool kept_socket, kept_pidfd;

        if (kvp_session_at(ledger, slot, &view) != KVP_OK || view.spec.kind != KVP_SESSION_SOCKET)
            continue;
        /* of a session that is ENDING only the process is of interest: its connection stays among the rest */
        socket = view.state == KVP_SESSION_OPEN ? take(inherited, 'c', view.id) : -1;
        pidfd = take(inherited, 'q', view.id);
        kept_socket = socket >= 0;
        kept_pidfd = pidfd >= 0;
        status = kvp_session_door_adopt(door, view.id, socket, pidfd);
        if (status == KVP_OK) {
            connections += kept_socket;
            continue;
        }
        if (kept_socket)
            give_up(store, 'c', view.id);
        if (kept_pidfd)
            give_up(store, 'q', view.id);
        if (status == KVP_EDISCONNECTED)
            kvp_core_process_ended(core, view.id);
        else
            kvp_log(LOG_WARNING, "the process of session %llx (pid %u) can not be watched: %s",
                    (unsigned long long)view.id.generation << 32 | view.id.slot, view.spec.pid,
                    kvp_status_text(status));
        if (status != KVP_EDISCONNECTED && kept_socket)
            kvp_core_disconnected(core, view.id);
    }
    return connections;
}

void kvp_adopt_nothing_else(struct kvp_inherited *inherited, struct kvp_fdstore *store)
{
    for (unsigned i = 0; i < inherited->n; i++) {
        struct kvp_inherited_fd *item = &inherited->fds[i];
        struct kvp_session_id session;
        struct kvp_thing thing;
        uint32_t slot, pid;

        if (item->fd < 0)
            continue;
        if (kvp_executor_parse(item->name, 'e', &slot, &pid) || kvp_executor_parse(item->name, 'x', &slot, &pid) ||
            kvp_thing_parse(item->name, &thing) || kvp_session_parse(item->name, 'c', &session) ||
            kvp_session_parse(item->name, 'q', &session) || strcmp(item->name, KVP_LEDGER_NAME) == 0 ||
            strcmp(item->name, KVP_SESSION_DOOR_NAME) == 0 || strcmp(item->name, KVP_GRPC_DOOR_NAME) == 0)
            kvp_fdstore_unpark(store, item->name);
        kvp_log(LOG_INFO, "%s was kept and is not needed: closed", item->name[0] != 0 ? item->name : "an fd");
    }
    kvp_inherited_free(inherited);
}
