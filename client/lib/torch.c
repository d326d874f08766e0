/**
 * Memory for torch's CUDAPluggableAllocator: each allocation is a region of the pool and the tag in use on its thread.
 *
 *   kvp_torch_use ─► kvp_torch_malloc … ─► kvp_torch_end        kvp_torch_free, on any thread, at any time
 *   pool, tag        region "tag/n"                             n is free; the region stays
 *
 * n is the lowest number that no allocation of the tag has in this process. So an engine that allocates in the same
 * order after a restart is handed the same regions; and one that frees and allocates in between does not grow. Of the
 * first to take a number the region's bytes are those of an earlier process: with KVP_TORCH_PRESERVE its size must be
 * the same, and kvp_torch_came_back says so; without, the tag's regions in that slab are given up before the first is
 * made. A number that this process had before holds nothing of anybody: its region is made anew where the size differs.
 *
 * A tag lives as long as somebody uses it or has memory of it, and holds the pool's owner so long. `lock` guards the
 * lists; it is not held over a call. `mapping` is held over a whole kvp_torch_malloc, so that no region is given up that
 * another thread just mapped; it is taken first.
 */
#include "cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NUMBER_BYTES 11             /* "/4294967295" without the terminator */
#define WAIT_NS      10000000000ull /* for a dead process's proven end */
#define WAIT_STEP_NS 5000000

struct tag {
    struct tag *next;
    struct kvp_owner *owner;
    char name[KVP_NAME_BYTES_MAX + 1 - NUMBER_BYTES];
    uint32_t users; /* entries of threads' stacks, and allocations */
    struct {
        uint32_t had; /* numbers 0..had-1 were this process's before */
        bool begun;
    } ranks[KVP_GPUS_MAX];
};

struct allocation {
    struct allocation *next;
    struct tag *tag;
    uint32_t rank, number;
    unsigned char *address; /* NULL: it is being mapped */
    uint64_t bytes;
    bool came_back; /* its bytes are an earlier process's, and nobody was told yet */
};

/* What a thread's allocations are made for: a stack. */
struct use {
    struct use *outer;
    struct tag *tag;
    bool preserve;
    enum kvp_status status; /* of the last kvp_torch_malloc */
    char text[512];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t mapping = PTHREAD_MUTEX_INITIALIZER;
static struct tag *tags;
static struct allocation *allocations;
static _Thread_local struct use *current;

/* ---- tags -------------------------------------------------------------------------------------------------------- */

/* Two attachments of a session to a pool are one to the daemon. */
static bool same_pool(const struct kvp_pool *a, const struct kvp_pool *b)
{
    return a->client == b->client && a->session_id == b->session_id && a->info->pool_id == b->info->pool_id;
}

static enum kvp_status tag_take(struct kvp_owner *owner, const char *name, struct tag **ret_tag)
{
    enum kvp_status status = KVP_OK;
    struct tag *tag;

    pthread_mutex_lock(&lock);
    for (tag = tags; tag != NULL; tag = tag->next)
        if (same_pool(kvp_owner_pool(tag->owner), kvp_owner_pool(owner)) && strcmp(tag->name, name) == 0)
            break;
    if (tag == NULL) {
        tag = calloc(1, sizeof(*tag));
        if (tag != NULL) {
            kvp_owner_retain(owner);
            tag->owner = owner;
            strcpy(tag->name, name);
            tag->next = tags;
            tags = tag;
        }
    }
    if (tag != NULL)
        tag->users++;
    else
        status = kvp_fail(KVP_ENOMEM, "no memory for tag %s", name);
    pthread_mutex_unlock(&lock);
    if (status == KVP_OK)
        *ret_tag = tag;
    return status;
}

static void tag_release(struct tag *tag)
{
    bool last;

    pthread_mutex_lock(&lock);
    last = --tag->users == 0;
    for (struct tag **at = &tags; last && *at != NULL; at = &(*at)->next) {
        if (*at == tag) {
            *at = tag->next;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    if (!last)
        return;
    kvp_owner_release(tag->owner);
    free(tag);
}

/* ---- use --------------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_torch_use(struct kvp_owner *pool, const char *tag, unsigned flags)
{
    size_t bytes = tag != NULL ? strlen(tag) : 0;
    enum kvp_status status;
    struct use *use;

    if (kvp_owner_pool(pool) == NULL)
        return kvp_fail(KVP_EINVAL, "kvp_torch_use wants the owner of a pool, not of a client");
    if (bytes == 0 || bytes > KVP_NAME_BYTES_MAX - NUMBER_BYTES)
        return kvp_fail(KVP_EINVAL, "a tag of %zu bytes, must be 1 to %d", bytes, KVP_NAME_BYTES_MAX - NUMBER_BYTES);
    if ((flags & ~KVP_TORCH_PRESERVE) != 0)
        return kvp_fail(KVP_EINVAL, "flags %#x are none of kvp_torch_use", flags);
    status = kvp_pool_usable(kvp_owner_pool(pool));
    if (status != KVP_OK)
        return status;
    use = calloc(1, sizeof(*use));
    if (use == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for tag %s", tag);
    status = tag_take(pool, tag, &use->tag);
    if (status != KVP_OK) {
        free(use);
        return status;
    }
    use->preserve = (flags & KVP_TORCH_PRESERVE) != 0;
    use->outer = current;
    current = use;
    return KVP_OK;
}

enum kvp_status kvp_torch_end(void)
{
    struct use *use = current;
    enum kvp_status status;

    if (use == NULL)
        return kvp_fail(KVP_EINVAL, "kvp_torch_end without kvp_torch_use on this thread");
    current = use->outer;
    tag_release(use->tag);
    status = use->status;
    if (status != KVP_OK)
        kvp_fail(status, "%s", use->text);
    free(use);
    return status;
}

/* ---- regions ----------------------------------------------------------------------------------------------------- */

static enum kvp_status rank_of(const struct kvp_pool *pool, int device, uint32_t *ret_rank)
{
    for (uint32_t rank = 0; rank < pool->info->slabs; rank++) {
        if (kvp_slab(pool, rank) == NULL || (pool->cuda != NULL && kvp_cuda_device(pool->cuda, rank) != device))
            continue;
        *ret_rank = rank;
        return KVP_OK;
    }
    return kvp_fail(KVP_ENODEV, "no slab of pool %s is on device %d", pool->info->spec.name, device);
}

/* Whether to try again: the region is a dead process's that is not proven gone yet. */
static bool wait_for_end(enum kvp_status status, uint64_t *deadline_ns)
{
    if (status != KVP_EAGAIN)
        return false;
    if (*deadline_ns == 0)
        *deadline_ns = kvp_now_ns() + WAIT_NS;
    if (kvp_now_ns() > *deadline_ns)
        return false;
    nanosleep(&(struct timespec){0, WAIT_STEP_NS}, NULL);
    return true;
}

static enum kvp_status drop_region(struct kvp_pool *pool, uint32_t rank, const char *name)
{
    uint64_t deadline_ns = 0;
    enum kvp_status status;

    do
        status = kvp_region_unmap(pool, rank, name, 0);
    while (wait_for_end(status, &deadline_ns));
    return status;
}

/* "tag/n"? */
static bool is_of_tag(const char *region, const char *tag)
{
    size_t n = strlen(tag);

    return strncmp(region, tag, n) == 0 && region[n] == '/' && region[n + 1] != 0 &&
           strspn(region + n + 1, "0123456789") == strlen(region + n + 1);
}

/* Give up the regions that earlier processes left under the tag. */
static enum kvp_status clear_tag(const struct tag *tag, struct kvp_pool *pool, uint32_t rank)
{
    struct kvp_region_info *regions;
    enum kvp_status status;
    size_t n;

    status = kvp_region_list(pool->client, pool->info->spec.name, &regions, &n);
    if (status != KVP_OK)
        return status;
    for (size_t i = 0; i < n && status == KVP_OK; i++)
        if (regions[i].rank == rank && is_of_tag(regions[i].name, tag->name))
            status = drop_region(pool, rank, regions[i].name);
    free(regions);
    return status;
}

/* The first allocation of a tag in a slab decides what becomes of what is there. */
static enum kvp_status begin_tag(struct tag *tag, struct kvp_pool *pool, uint32_t rank, bool preserve)
{
    enum kvp_status status = KVP_OK;

    if (tag->ranks[rank].begun)
        return KVP_OK;
    if (!preserve)
        status = clear_tag(tag, pool, rank);
    tag->ranks[rank].begun = status == KVP_OK;
    return status;
}

/* ---- allocations ------------------------------------------------------------------------------------------------- */

static bool number_taken(const struct tag *tag, uint32_t rank, uint32_t number)
{
    for (const struct allocation *a = allocations; a != NULL; a = a->next)
        if (a->tag == tag && a->rank == rank && a->number == number)
            return true;
    return false;
}

/* An allocation without memory yet, so that its number is nobody else's. */
static enum kvp_status take_number(struct tag *tag, uint32_t rank, struct allocation **ret_allocation, bool *ret_had)
{
    struct allocation *allocation = calloc(1, sizeof(*allocation));

    if (allocation == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for an allocation");
    pthread_mutex_lock(&lock);
    while (number_taken(tag, rank, allocation->number))
        allocation->number++;
    allocation->tag = tag;
    allocation->rank = rank;
    allocation->next = allocations;
    allocations = allocation;
    tag->users++;
    *ret_had = allocation->number < tag->ranks[rank].had;
    pthread_mutex_unlock(&lock);
    *ret_allocation = allocation;
    return KVP_OK;
}

static void give_number(struct allocation *allocation)
{
    pthread_mutex_lock(&lock);
    for (struct allocation **at = &allocations; *at != NULL; at = &(*at)->next) {
        if (*at == allocation) {
            *at = allocation->next;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    tag_release(allocation->tag);
    free(allocation);
}

static void region_name(const struct tag *tag, uint32_t number, char name[KVP_NAME_BYTES_MAX + 1])
{
    snprintf(name, KVP_NAME_BYTES_MAX + 1, "%s/%u", tag->name, number);
}

/* Room is short: give up the regions of what this process has freed. */
static enum kvp_status drop_freed(struct kvp_pool *pool, struct tag *tag, uint32_t rank)
{
    char name[KVP_NAME_BYTES_MAX + 1];
    enum kvp_status status = KVP_OK;
    bool free;

    for (uint32_t number = 0; number < tag->ranks[rank].had && status == KVP_OK; number++) {
        pthread_mutex_lock(&lock);
        free = !number_taken(tag, rank, number);
        pthread_mutex_unlock(&lock);
        region_name(tag, number, name);
        if (free)
            status = kvp_region_unmap(pool, rank, name, 0);
    }
    return status;
}

static enum kvp_status map_alone(struct kvp_pool *pool, const struct allocation *allocation, uint64_t bytes,
                                 struct kvp_region *ret_region)
{
    char name[KVP_NAME_BYTES_MAX + 1];
    uint64_t deadline_ns = 0;
    enum kvp_status status;

    region_name(allocation->tag, allocation->number, name);
    do
        status = kvp_region_map(pool, allocation->rank, name, bytes, KVP_REGION_EXCLUSIVE, ret_region);
    while (wait_for_end(status, &deadline_ns));
    return status;
}

/* Of a number that was had before, a region of another size is this process's to replace. */
static enum kvp_status map(struct kvp_pool *pool, const struct allocation *allocation, uint64_t bytes, bool had,
                           struct kvp_region *ret_region)
{
    char name[KVP_NAME_BYTES_MAX + 1];
    enum kvp_status status = map_alone(pool, allocation, bytes, ret_region);

    if (status == KVP_EMISMATCH && had) {
        region_name(allocation->tag, allocation->number, name);
        status = drop_region(pool, allocation->rank, name);
        if (status == KVP_OK)
            status = map_alone(pool, allocation, bytes, ret_region);
    }
    if (status == KVP_ELIMIT && drop_freed(pool, allocation->tag, allocation->rank) == KVP_OK)
        status = map_alone(pool, allocation, bytes, ret_region);
    return status;
}

static enum kvp_status allocate(const struct use *use, size_t bytes, int device, void **ret_address)
{
    struct kvp_pool *pool = kvp_owner_pool(use->tag->owner);
    struct allocation *allocation = NULL;
    struct kvp_region region;
    enum kvp_status status;
    uint32_t rank = 0;
    bool had = false;

    if (bytes == 0)
        return kvp_fail(KVP_EINVAL, "kvp_torch_malloc of 0 bytes");
    status = rank_of(pool, device, &rank);
    if (status == KVP_OK)
        status = begin_tag(use->tag, pool, rank, use->preserve);
    if (status == KVP_OK)
        status = take_number(use->tag, rank, &allocation, &had);
    if (status != KVP_OK)
        return status;
    status = map(pool, allocation, bytes, had, &region);
    if (status != KVP_OK) {
        give_number(allocation);
        return status;
    }
    pthread_mutex_lock(&lock);
    if (!had)
        use->tag->ranks[rank].had = allocation->number + 1;
    allocation->bytes = bytes;
    allocation->came_back = region.existed && use->preserve && !had;
    allocation->address = region.address;
    pthread_mutex_unlock(&lock);
    *ret_address = region.address;
    return KVP_OK;
}

void *kvp_torch_malloc(size_t bytes, int device, void *stream)
{
    struct use *use = current;
    void *address = NULL;

    (void)stream;
    if (use == NULL) {
        kvp_fail(KVP_EINVAL, "kvp_torch_malloc without kvp_torch_use on this thread");
        return NULL;
    }
    use->status = kvp_pool_usable(kvp_owner_pool(use->tag->owner)); /* the lock may be one that a fork left taken */
    if (use->status == KVP_OK) {
        pthread_mutex_lock(&mapping);
        use->status = allocate(use, bytes, device, &address);
        pthread_mutex_unlock(&mapping);
    }
    if (use->status != KVP_OK)
        snprintf(use->text, sizeof(use->text), "%s", kvp_error_text());
    return address;
}

/* The allocation with that address in it. The lock is held. */
static struct allocation *find(const void *address)
{
    uintptr_t at = (uintptr_t)address;

    for (struct allocation *a = allocations; a != NULL; a = a->next)
        if (a->address != NULL && at >= (uintptr_t)a->address && at - (uintptr_t)a->address < a->bytes)
            return a;
    return NULL;
}

void kvp_torch_free(void *memory, size_t bytes, int device, void *stream)
{
    char name[KVP_NAME_BYTES_MAX + 1];
    struct allocation *allocation;
    struct kvp_pool *pool;

    (void)bytes, (void)device, (void)stream;
    if (kvp_owner_is_forever())
        return;
    pthread_mutex_lock(&lock);
    allocation = find(memory);
    if (allocation != NULL)
        allocation->address = NULL;
    pthread_mutex_unlock(&lock);
    if (allocation == NULL)
        return;
    pool = kvp_owner_pool(allocation->tag->owner);
    if (kvp_pool_usable(pool) == KVP_OK) {
        if (pool->cuda != NULL)
            kvp_cuda_settle(pool->cuda, allocation->rank); /* as cudaFree does: the next user may be another process */
        region_name(allocation->tag, allocation->number, name);
        kvp_region_unmap(pool, allocation->rank, name, KVP_REGION_KEEP); /* where this fails, the session is over */
    }
    give_number(allocation);
}

bool kvp_torch_came_back(const void *address)
{
    struct allocation *allocation;
    bool came_back = false;

    pthread_mutex_lock(&lock);
    allocation = find(address);
    if (allocation != NULL) {
        came_back = allocation->came_back;
        allocation->came_back = false;
    }
    pthread_mutex_unlock(&lock);
    return came_back;
}
