/* Memory that may be taken; see available.h. */
#include "available.h"

#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* The files of a control group, and the lines of memory.stat that are page cache, of it and all below it. */
struct version {
    const char *mount, *limit, *used, *cache[2];
};
static const struct version versions[] = {
    {"/sys/fs/cgroup", "memory.max", "memory.current", {"inactive_file %" SCNu64, "active_file %" SCNu64}},
    {"/sys/fs/cgroup/memory",
     "memory.limit_in_bytes",
     "memory.usage_in_bytes",
     {"total_inactive_file %" SCNu64, "total_active_file %" SCNu64}},
};

/* The number of the first line that `format` fits. @return false: there is no such file or line */
static bool read_number(const char *path, const char *format, uint64_t *ret_number)
{
    FILE *file = fopen(path, "re");
    bool found = false;
    char line[PATH_MAX];

    if (file == NULL)
        return false;
    while (!found && fgets(line, sizeof(line), file) != NULL)
        found = sscanf(line, format, ret_number) == 1;
    fclose(file);
    return found;
}

/* What the group in this folder leaves; UINT64_MAX: it has no limit. */
static uint64_t room_of(const struct version *version, const char *folder)
{
    uint64_t limit, used, cache = 0, some;
    char path[PATH_MAX + 64];

    snprintf(path, sizeof(path), "%s/%s", folder, version->limit);
    if (!read_number(path, "%" SCNu64, &limit)) /* "max" is no number */
        return UINT64_MAX;
    snprintf(path, sizeof(path), "%s/%s", folder, version->used);
    if (!read_number(path, "%" SCNu64, &used))
        return UINT64_MAX;
    snprintf(path, sizeof(path), "%s/memory.stat", folder);
    for (int i = 0; i < 2; i++)
        if (read_number(path, version->cache[i], &some))
            cache += some;
    used = used > cache ? used - cache : 0;
    return limit > used ? limit - used : 0;
}

/* The path of this process's group: behind "0::", or behind the second colon of the line of the controller "memory". */
static bool group_of(const struct version *version, char ret_path[PATH_MAX])
{
    FILE *file = fopen("/proc/self/cgroup", "re");
    bool found = false;
    char line[PATH_MAX];

    if (file == NULL)
        return false;
    while (!found && fgets(line, sizeof(line), file) != NULL) {
        char *controllers = strchr(line, ':'), *path = controllers != NULL ? strchr(++controllers, ':') : NULL;

        if (path == NULL)
            continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        found = version == &versions[0] ? controllers[0] == 0 : strcmp(controllers, "memory") == 0;
        if (found) /* one outside of this container's root is not to be seen */
            snprintf(ret_path, PATH_MAX, "%s", strstr(path, "/..") == NULL ? path : "");
    }
    fclose(file);
    return found;
}

static uint64_t room_of_groups(const struct version *version)
{
    char path[PATH_MAX], folder[PATH_MAX + 32];
    uint64_t least = UINT64_MAX, room;
    char *slash = path;

    if (!group_of(version, path))
        return UINT64_MAX;
    while (slash != NULL) { /* up to the mount itself, which in a container may be the container's own group */
        snprintf(folder, sizeof(folder), "%s%s", version->mount, path);
        room = room_of(version, folder);
        least = room < least ? room : least;
        slash = strrchr(path, '/');
        if (slash != NULL)
            *slash = 0;
    }
    return least;
}

uint64_t kvp_available_bytes(const char **ret_where)
{
    uint64_t least = UINT64_MAX, kib;
    const char *where = "on this machine";

    if (read_number("/proc/meminfo", "MemAvailable: %" SCNu64, &kib))
        least = kib << 10;
    for (size_t i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
        uint64_t room = room_of_groups(&versions[i]);

        if (room >= least)
            continue;
        least = room;
        where = "under the memory limit of this control group";
    }
    if (ret_where != NULL)
        *ret_where = where;
    return least;
}
