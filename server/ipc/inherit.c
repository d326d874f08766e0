/* What the service manager hands over; see inherit.h. */
#include "inherit.h"
#include "things.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

enum kvp_status kvp_inherit(struct kvp_inherited *ret_inherited)
{
    struct kvp_inherited inherited = {.n = 0};
    char **names = NULL;
    int n = sd_listen_fds(0);

    if (n > 0) /* no names for no fds would be an error */
        n = sd_listen_fds_with_names(1, &names);
    if (n < 0)
        return KVP_EINVAL;
    inherited.fds = calloc((size_t)n + 1, sizeof(*inherited.fds));
    for (int i = 0; i < n; i++) {
        if (inherited.fds != NULL) {
            inherited.fds[i].fd = SD_LISTEN_FDS_START + i;
            if (strlen(names[i]) < KVP_FDSTORE_NAME_MAX)
                strcpy(inherited.fds[i].name, names[i]);
        }
        free(names[i]);
    }
    free(names);
    if (inherited.fds == NULL)
        return KVP_ENOMEM;
    inherited.n = (unsigned)n;
    *ret_inherited = inherited;
    return KVP_OK;
}

void kvp_inherited_free(struct kvp_inherited *inherited)
{
    for (unsigned i = 0; i < inherited->n; i++)
        if (inherited->fds[i].fd >= 0)
            close(inherited->fds[i].fd);
    free(inherited->fds);
    *inherited = (struct kvp_inherited){.n = 0};
}

int kvp_inherited_take(struct kvp_inherited *inherited, const char *name)
{
    for (unsigned i = 0; i < inherited->n; i++) {
        struct kvp_inherited_fd *item = &inherited->fds[i];
        int fd = item->fd;

        if (fd < 0 || strcmp(item->name, name) != 0)
            continue;
        item->fd = -1;
        return fd;
    }
    return -1;
}

/* Digits, without a sign or a leading zero. @return NULL: there are none, or they are over 32 bits */
static const char *parse_u32(const char *text, uint32_t *ret_number)
{
    uint64_t number = 0;
    size_t digits = strspn(text, "0123456789");

    if (digits == 0 || digits > 10 || (text[0] == '0' && digits > 1))
        return NULL;
    for (size_t i = 0; i < digits; i++)
        number = number * 10 + (uint64_t)(text[i] - '0');
    if (number > UINT32_MAX)
        return NULL;
    *ret_number = (uint32_t)number;
    return text + digits;
}

bool kvp_thing_parse(const char *name, struct kvp_thing *ret_thing)
{
    struct kvp_thing thing = {.kind = (enum kvp_thing_kind)name[0]};
    char again[KVP_FDSTORE_NAME_MAX];
    const char *rest;

    if (name[0] == 0 || strchr("tlpsb", name[0]) == NULL)
        return false;
    rest = parse_u32(name + 1, &thing.a);
    if (rest != NULL && *rest == '.')
        rest = parse_u32(rest + 1, &thing.b);
    if (rest == NULL || *rest != 0)
        return false;
    kvp_thing_name(thing, again);
    if (strcmp(again, name) != 0)
        return false;
    *ret_thing = thing;
    return true;
}

/* A letter, a number, a dot, a number that is not 0. */
static bool parse_pair(const char *name, char letter, uint32_t *ret_a, uint32_t *ret_b)
{
    uint32_t a, b;
    const char *rest = name[0] == letter ? parse_u32(name + 1, &a) : NULL;

    rest = rest != NULL && *rest == '.' ? parse_u32(rest + 1, &b) : NULL;
    if (rest == NULL || *rest != 0 || b == 0)
        return false;
    *ret_a = a;
    *ret_b = b;
    return true;
}

bool kvp_session_parse(const char *name, char letter, struct kvp_session_id *ret_session)
{
    struct kvp_session_id session;

    if (!parse_pair(name, letter, &session.slot, &session.generation) || session.slot >= KVP_SESSIONS_MAX)
        return false;
    *ret_session = session;
    return true;
}

bool kvp_executor_parse(const char *name, char letter, uint32_t *ret_slot, uint32_t *ret_pid)
{
    return parse_pair(name, letter, ret_slot, ret_pid) && *ret_slot < KVP_GPUS_MAX;
}
