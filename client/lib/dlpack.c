/**
 * The pool's memory in the hands of other libraries: shared ownership of an attachment, and DLPack tensors that hold it.
 *
 *   kvp_owner of a client  ◄── one reference each ── kvp_owner of its pools ◄── one reference each ── exported tensors
 *        at 0: kvp_disconnect                             at 0: kvp_detach                             their deleters
 *
 * So a pool is unmapped when whoever attached it has let go and the last tensor over it is gone, in any order, on any
 * thread. Deleters are plain C and touch no interpreter: one may run without its lock, or when it is half gone. Of
 * Python only the capsule's destructor asks, for the capsule's name; it finds those two functions in the process, so
 * that this library does not link Python.
 *
 * The structs are those of DLPack 1.1, of which no header is needed: they are a binary interface, and do not change.
 */
#include "internal.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* ---- shared ownership -------------------------------------------------------------------------------------------- */

struct kvp_owner {
    _Atomic uint32_t references;
    struct kvp_client *client; /* of a client's owner, else NULL */
    struct kvp_pool *pool;     /* of a pool's owner, else NULL */
    struct kvp_owner *parent;  /* of a pool's owner: its client's */
};

static _Atomic bool forever;

static enum kvp_status new_owner(struct kvp_client *client, struct kvp_pool *pool, struct kvp_owner *parent,
                                 struct kvp_owner **ret_owner)
{
    struct kvp_owner *owner = calloc(1, sizeof(*owner));

    if (owner == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for an owner");
    atomic_init(&owner->references, 1);
    owner->client = client;
    owner->pool = pool;
    owner->parent = parent;
    if (parent != NULL)
        kvp_owner_retain(parent);
    *ret_owner = owner;
    return KVP_OK;
}

enum kvp_status kvp_owner_of_client(struct kvp_client *client, struct kvp_owner **ret_owner)
{
    return new_owner(client, NULL, NULL, ret_owner);
}

enum kvp_status kvp_owner_of_pool(struct kvp_owner *client, struct kvp_pool *pool, struct kvp_owner **ret_owner)
{
    if (client->client == NULL || client->client != pool->client)
        return kvp_fail(KVP_EINVAL, "pool %s is not attached by that client", pool->info->spec.name);
    return new_owner(NULL, pool, client, ret_owner);
}

void kvp_owner_retain(struct kvp_owner *owner)
{
    atomic_fetch_add_explicit(&owner->references, 1, memory_order_relaxed);
}

enum kvp_status kvp_owner_release(struct kvp_owner *owner)
{
    enum kvp_status status = KVP_OK;

    while (owner != NULL && !kvp_owner_is_forever() &&
           atomic_fetch_sub_explicit(&owner->references, 1, memory_order_acq_rel) == 1) {
        struct kvp_owner *parent = owner->parent;

        if (owner->pool != NULL)
            status = kvp_detach(owner->pool);
        else
            kvp_disconnect(owner->client);
        free(owner);
        owner = parent;
    }
    return status;
}

void kvp_owner_forever(void)
{
    atomic_store_explicit(&forever, true, memory_order_release);
}

bool kvp_owner_is_forever(void)
{
    return atomic_load_explicit(&forever, memory_order_acquire);
}

struct kvp_pool *kvp_owner_pool(const struct kvp_owner *owner)
{
    return owner->pool;
}

/* ---- DLPack ------------------------------------------------------------------------------------------------------ */

struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct dl_managed { /* in a capsule "dltensor" */
    struct dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
};

struct dl_managed_versioned { /* in a capsule "dltensor_versioned" */
    struct {
        uint32_t major, minor;
    } version;
    void *context;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    struct dl_tensor tensor;
};

/* One block: either form, and what its tensor points to. */
struct exported {
    union {
        struct dl_managed plain;
        struct dl_managed_versioned versioned;
    } managed;
    struct kvp_owner *owner;
    int64_t shape[KVP_DLPACK_DIMS_MAX], strides[KVP_DLPACK_DIMS_MAX];
};

static void end_export(void *context)
{
    struct exported *exported = context;
    struct kvp_owner *owner = exported->owner;

    free(exported);
    kvp_owner_release(owner);
}

static void delete_plain(struct dl_managed *self)
{
    end_export(self->context);
}

static void delete_versioned(struct dl_managed_versioned *self)
{
    end_export(self->context);
}

static void fill(const struct kvp_dlpack_tensor *from, struct exported *exported, struct dl_tensor *tensor)
{
    memcpy(exported->shape, from->shape, sizeof(exported->shape));
    memcpy(exported->strides, from->strides, sizeof(exported->strides));
    *tensor = (struct dl_tensor){.data = from->data,
                                 .device = {from->device_type, from->device_id},
                                 .ndim = (int32_t)from->ndim,
                                 .dtype = {from->code, from->bits, 1},
                                 .shape = exported->shape,
                                 .strides = exported->strides};
}

enum kvp_status kvp_dlpack_export(struct kvp_owner *pool, const struct kvp_dlpack_tensor *tensor, bool versioned,
                                  void **ret_managed)
{
    struct exported *exported;

    if (tensor->ndim > KVP_DLPACK_DIMS_MAX)
        return kvp_fail(KVP_EINVAL, "a tensor of %u dimensions; at most %d", tensor->ndim, KVP_DLPACK_DIMS_MAX);
    exported = calloc(1, sizeof(*exported));
    if (exported == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a tensor");
    kvp_owner_retain(pool);
    exported->owner = pool;
    if (versioned) {
        struct dl_managed_versioned *managed = &exported->managed.versioned;

        managed->version.major = 1;
        managed->version.minor = 1;
        managed->context = exported;
        managed->deleter = delete_versioned;
        fill(tensor, exported, &managed->tensor);
    } else {
        struct dl_managed *managed = &exported->managed.plain;

        managed->context = exported;
        managed->deleter = delete_plain;
        fill(tensor, exported, &managed->tensor);
    }
    *ret_managed = &exported->managed;
    return KVP_OK;
}

void kvp_dlpack_capsule_end(void *capsule)
{
    int (*is_valid)(void *, const char *);
    void *(*pointer)(void *, const char *);
    void *found[2] = {dlsym(RTLD_DEFAULT, "PyCapsule_IsValid"), dlsym(RTLD_DEFAULT, "PyCapsule_GetPointer")};

    if (found[0] == NULL || found[1] == NULL)
        return;
    memcpy(&is_valid, &found[0], sizeof(is_valid));
    memcpy(&pointer, &found[1], sizeof(pointer));
    if (is_valid(capsule, "dltensor")) {
        struct dl_managed *managed = pointer(capsule, "dltensor");

        managed->deleter(managed);
    } else if (is_valid(capsule, "dltensor_versioned")) {
        struct dl_managed_versioned *managed = pointer(capsule, "dltensor_versioned");

        managed->deleter(managed);
    }
}
