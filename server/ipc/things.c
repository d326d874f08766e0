/* Things; see things.h. */
#include "things.h"
#include "backing.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BUCKETS 1024u
#define SEALS   (F_SEAL_SHRINK | F_SEAL_GROW)

enum entry_state { ENTRY_MAKING, ENTRY_PARKING, ENTRY_READY };

struct entry {
    struct kvp_things *things;
    struct entry *next; /* in its bucket */
    struct kvp_thing thing;
    enum entry_state state;
    bool parked;  /* or about to be */
    bool dropped; /* out of its bucket; freed when what is under way comes back */
    enum kvp_status status;
    int error; /* errno of a failed making */
    int fd, fd_out; /* -1: none */
    void *address;
    uint64_t bytes;
    uv_work_t work;
    struct kvp_later later;
};

struct kvp_things {
    uv_loop_t *loop;
    struct kvp_fdstore *store;
    struct kvp_later_queue *later;
    kvp_thing_ready ready;
    void *ctx;
    bool closed;
    unsigned under_way; /* entries in the thread pool */
    struct entry *buckets[BUCKETS];
};

/* ---- the table of them ------------------------------------------------------------------------------------------- */

static struct entry **bucket_of(const struct kvp_things *things, struct kvp_thing thing)
{
    uint64_t h = ((uint64_t)thing.kind << 56 ^ (uint64_t)thing.a << 32 ^ thing.b) * 0x9e3779b97f4a7c15ull;

    return (struct entry **)&things->buckets[h >> 54];
}

static struct entry *find(const struct kvp_things *things, struct kvp_thing thing)
{
    struct entry *entry = *bucket_of(things, thing);

    while (entry != NULL &&
           (entry->thing.kind != thing.kind || entry->thing.a != thing.a || entry->thing.b != thing.b))
        entry = entry->next;
    return entry;
}

static void take_out(struct entry *entry)
{
    struct entry **at = bucket_of(entry->things, entry->thing);

    while (*at != entry)
        at = &(*at)->next;
    *at = entry->next;
    entry->dropped = true;
}

static void entry_free(struct entry *entry)
{
    if (entry->address != NULL)
        munmap(entry->address, entry->bytes);
    if (entry->fd_out >= 0)
        close(entry->fd_out);
    if (entry->fd >= 0)
        close(entry->fd);
    free(entry);
}

void kvp_thing_name(struct kvp_thing thing, char ret_name[KVP_FDSTORE_NAME_MAX])
{
    bool one = thing.kind == KVP_THING_TABLE || thing.kind == KVP_THING_TIMELINES;

    snprintf(ret_name, KVP_FDSTORE_NAME_MAX, one ? "%c%" PRIu32 : "%c%" PRIu32 ".%" PRIu32, thing.kind, thing.a,
             thing.b);
}

/* ---- making ------------------------------------------------------------------------------------------------------ */

/* Map it, and for a table get the fd to send out. @return false: errno says why */
static bool map_memory(struct entry *entry)
{
    char path[40];

    entry->address = mmap(NULL, entry->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, entry->fd, 0);
    if (entry->address == MAP_FAILED) {
        entry->address = NULL;
        return false;
    }
    madvise(entry->address, entry->bytes, MADV_DONTDUMP); /* a dump would hold the restart up; as of the ledger */
    if (entry->thing.kind != KVP_THING_TABLE)
        return true;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", entry->fd);
    entry->fd_out = open(path, O_RDONLY | O_CLOEXEC);
    return entry->fd_out >= 0;
}

/* In the thread pool, so that allocating a large table does not hold the loop up. Touches its entry alone. */
static void make_memory(uv_work_t *work)
{
    struct entry *entry = work->data;
    char name[KVP_FDSTORE_NAME_MAX + 8] = "kvpool-";

    kvp_thing_name(entry->thing, name + strlen(name));
    entry->fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (entry->fd < 0 || fchmod(entry->fd, 0600) != 0 || kvp_back(entry->fd, 0, entry->bytes) != KVP_OK)
        goto failed;
    if (fcntl(entry->fd, F_ADD_SEALS, SEALS | F_SEAL_SEAL) != 0 || !map_memory(entry))
        goto failed;
    return;

failed:
    entry->error = errno;
}

/* ---- parking, and the end of it ---------------------------------------------------------------------------------- */

/* Tell the core, and forget what failed. */
static void settle(struct entry *entry)
{
    struct kvp_things *things = entry->things;
    struct kvp_thing thing = entry->thing;
    enum kvp_status status = entry->status;
    char name[KVP_FDSTORE_NAME_MAX];

    if (entry->dropped) {
        entry_free(entry);
        return;
    }
    if (status == KVP_OK) {
        entry->state = ENTRY_READY;
        things->ready(things->ctx, thing, KVP_OK, entry->address, entry->bytes);
        return;
    }
    kvp_thing_name(thing, name);
    kvp_log(LOG_ERR, "%s (%" PRIu64 " bytes) can not be had: %s%s%s", name, entry->bytes, kvp_status_text(status),
            entry->error != 0 ? ": " : "", entry->error != 0 ? strerror(entry->error) : "");
    if (entry->parked)
        kvp_fdstore_unpark(things->store, name);
    take_out(entry);
    entry_free(entry);
    things->ready(things->ctx, thing, status, NULL, 0);
}

static void settle_later(struct kvp_later *later)
{
    settle((struct entry *)((char *)later - offsetof(struct entry, later)));
}

static void parked(void *arg, enum kvp_status status)
{
    struct entry *entry = arg;

    entry->status = status;
    settle(entry);
}

static void park(struct entry *entry)
{
    char name[KVP_FDSTORE_NAME_MAX];

    entry->state = ENTRY_PARKING;
    kvp_thing_name(entry->thing, name);
    entry->status = entry->status == KVP_OK
                        ? kvp_fdstore_park(entry->things->store, name, entry->fd, parked, entry)
                        : entry->status;
    entry->parked = entry->status == KVP_OK;
    if (!entry->parked)
        kvp_later_add(entry->things->later, &entry->later);
}

static void made(uv_work_t *work, int status)
{
    struct entry *entry = work->data;
    struct kvp_things *things = entry->things;

    (void)status; /* nothing cancels work */
    things->under_way--;
    if (entry->dropped) {
        entry_free(entry);
        if (things->closed && things->under_way == 0)
            free(things);
        return;
    }
    entry->status = entry->error == 0 ? KVP_OK : KVP_ENOMEM;
    park(entry);
}

/* ---- what the core asks for -------------------------------------------------------------------------------------- */

static struct entry *entry_new(struct kvp_things *things, struct kvp_thing thing)
{
    struct entry *entry = find(things, thing) == NULL ? calloc(1, sizeof(*entry)) : NULL;
    struct entry **bucket = bucket_of(things, thing);

    if (entry == NULL) {
        kvp_log(LOG_CRIT, "out of memory, or a thing made twice: %c%u.%u", thing.kind, thing.a, thing.b);
        abort(); /* the core could never be told; the next daemon starts from what is parked */
    }
    *entry = (struct entry){.things = things, .next = *bucket, .thing = thing, .fd = -1, .fd_out = -1,
                            .later.run = settle_later};
    entry->work.data = entry;
    *bucket = entry;
    return entry;
}

void kvp_things_make(struct kvp_things *things, struct kvp_thing thing, uint64_t bytes)
{
    struct entry *entry = entry_new(things, thing);

    entry->state = ENTRY_MAKING;
    entry->bytes = bytes;
    if (uv_queue_work(things->loop, &entry->work, make_memory, made) == 0) {
        things->under_way++;
        return;
    }
    entry->status = KVP_ENOMEM;
    park(entry);
}

void kvp_things_keep(struct kvp_things *things, struct kvp_thing thing, int fd)
{
    struct entry *entry = entry_new(things, thing);
    struct stat st;

    entry->fd = fd;
    entry->status = fd >= 0 && fstat(fd, &st) == 0 ? KVP_OK : KVP_EINVAL;
    entry->bytes = entry->status == KVP_OK && st.st_size > 0 ? (uint64_t)st.st_size : 0;
    park(entry);
}

enum kvp_status kvp_things_adopt(struct kvp_things *things, struct kvp_thing thing, int fd, void **ret_address,
                                 uint64_t *ret_bytes)
{
    bool mapped = thing.kind != KVP_THING_SLAB && thing.kind != KVP_THING_BUFFER;
    struct entry *entry;
    struct stat st;
    int seals;

    if (find(things, thing) != NULL) {
        close(fd);
        return KVP_EEXIST;
    }
    entry = entry_new(things, thing);
    entry->fd = fd;
    entry->state = ENTRY_READY;
    entry->parked = true;
    if (fstat(fd, &st) != 0 || st.st_size < 0)
        goto forget;
    entry->bytes = (uint64_t)st.st_size;
    seals = mapped ? fcntl(fd, F_GET_SEALS) : SEALS;
    if (seals < 0 || (seals & SEALS) != SEALS || (mapped && (entry->bytes == 0 || !map_memory(entry))))
        goto forget;
    *ret_address = entry->address;
    *ret_bytes = entry->bytes;
    return KVP_OK;

forget:
    kvp_things_drop(things, thing);
    return KVP_ECORRUPT;
}

/* Whether the thread pool or the fd store still holds on to the entry. */
static bool is_under_way(const struct entry *entry)
{
    return entry->state == ENTRY_MAKING || (entry->state == ENTRY_PARKING && !entry->later.queued);
}

void kvp_things_drop(struct kvp_things *things, struct kvp_thing thing)
{
    struct entry *entry = find(things, thing);
    char name[KVP_FDSTORE_NAME_MAX];

    if (entry == NULL)
        return;
    take_out(entry);
    kvp_thing_name(thing, name);
    if (entry->parked)
        kvp_fdstore_unpark(things->store, name);
    if (!is_under_way(entry)) {
        kvp_later_cancel(things->later, &entry->later);
        entry_free(entry);
    }
}

int kvp_things_fd(const struct kvp_things *things, struct kvp_thing thing)
{
    const struct entry *entry = find(things, thing);

    if (entry == NULL || entry->state != ENTRY_READY)
        return -1;
    return entry->fd_out >= 0 ? entry->fd_out : entry->fd;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_things_open(uv_loop_t *loop, struct kvp_fdstore *store, struct kvp_later_queue *later,
                                kvp_thing_ready ready, void *ctx, struct kvp_things **ret_things)
{
    struct kvp_things *things = calloc(1, sizeof(*things));

    if (things == NULL)
        return KVP_ENOMEM;
    things->loop = loop;
    things->store = store;
    things->later = later;
    things->ready = ready;
    things->ctx = ctx;
    *ret_things = things;
    return KVP_OK;
}

void kvp_things_close(struct kvp_things *things)
{
    for (unsigned i = 0; i < BUCKETS; i++) {
        while (things->buckets[i] != NULL) {
            struct entry *entry = things->buckets[i];

            take_out(entry);
            if (!is_under_way(entry)) {
                kvp_later_cancel(things->later, &entry->later);
                entry_free(entry);
            }
        }
    }
    things->closed = true;
    if (things->under_way == 0)
        free(things);
}
