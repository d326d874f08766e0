/** The slabs and buffers that this executor holds; see objects.h. */
#include "objects.h"

#include <assert.h>

static unsigned bucket_of(uint64_t a)
{
    return (unsigned)((a * 0x9e3779b97f4a7c15ull) >> 54); /* Fibonacci hashing, the upper 10 bits */
}

static_assert(KVP_EXEC_BUCKETS == 1u << 10, "bucket_of gives 10 bits");

void kvp_exec_object_put(struct kvp_exec_objects *objects, struct kvp_exec_object *object)
{
    struct kvp_exec_object **bucket = &objects->buckets[bucket_of(object->a)];

    object->next = *bucket;
    *bucket = object;
}

struct kvp_exec_object *kvp_exec_object_get(const struct kvp_exec_objects *objects, uint64_t a, uint32_t b)
{
    for (struct kvp_exec_object *o = objects->buckets[bucket_of(a)]; o != NULL; o = o->next)
        if (o->a == a && o->b == b)
            return o;
    return NULL;
}

static void unlink_at(struct kvp_exec_objects *objects, struct kvp_exec_object **at)
{
    struct kvp_exec_object *object = *at;

    *at = object->next;
    object->next = NULL;
    object->dropped = true;
    if (object->uses == 0)
        objects->free(object, objects->arg);
}

void kvp_exec_object_drop(struct kvp_exec_objects *objects, struct kvp_exec_object *object)
{
    for (struct kvp_exec_object **at = &objects->buckets[bucket_of(object->a)]; *at != NULL; at = &(*at)->next)
        if (*at == object) {
            unlink_at(objects, at);
            return;
        }
}

void kvp_exec_objects_drop(struct kvp_exec_objects *objects, uint64_t a)
{
    struct kvp_exec_object **at = &objects->buckets[bucket_of(a)];

    while (*at != NULL) {
        if ((*at)->a != a) {
            at = &(*at)->next;
            continue;
        }
        unlink_at(objects, at);
    }
}

void kvp_exec_objects_drop_all(struct kvp_exec_objects *objects)
{
    for (unsigned i = 0; i < KVP_EXEC_BUCKETS; i++)
        while (objects->buckets[i] != NULL)
            unlink_at(objects, &objects->buckets[i]);
}

void kvp_exec_object_use(struct kvp_exec_object *object)
{
    object->uses++;
}

void kvp_exec_object_release(struct kvp_exec_objects *objects, struct kvp_exec_object *object)
{
    if (--object->uses == 0 && object->dropped)
        objects->free(object, objects->arg);
}
