/**
 * The slabs and buffers that this executor holds: found by id, kept while a task uses them.
 *
 *     none ── put ──► held ── drop ──► dropped, while uses > 0 ── last release ──► freed
 *                       └──────────────── uses = 0 ─────────────────────────────────▲
 *
 * A dropped object is found no more; its memory goes when the last task that uses it ends. All on the main thread.
 * Limits: KVP_POOLS_MAX · KVP_GPUS_MAX slabs, KVP_SESSIONS_MAX · KVP_BUFFERS_MAX buffers.
 */
#ifndef KVP_EXEC_OBJECTS_H
#define KVP_EXEC_OBJECTS_H

#include "backend.h"

struct kvp_exec_object {
    struct kvp_exec_object *next; /* in its bucket */
    uint64_t a;                   /* pool, or session */
    uint32_t b;                   /* rank, or buffer */
    unsigned uses;
    bool dropped;
    struct kvp_exec_memory memory;
};

/* What a PoolSpec says of a slab. */
struct kvp_exec_geometry {
    struct kvp_layout_spec spec;
    uint64_t slab_bytes; /* of the planes: a slab has at least these */
    struct kvp_plane_spec plane_specs[KVP_PLANES_MAX];
    struct kvp_plane_layout planes[KVP_PLANES_MAX];
};

struct kvp_exec_slab {
    struct kvp_exec_object object; /* first */
    struct kvp_exec_geometry *geometry;
    uint64_t asked_bytes; /* of the slab, as it was asked for: the driver rounds up */
    bool legacy_ipc;
    struct kvp_timeline *timelines;       /* [KVP_ATTACHMENTS_MAX · KVP_TIMELINES_MAX]; NULL until adopted */
    const struct kvp_table_header *table; /* read-only; its header alone */
};

struct kvp_exec_buffer {
    struct kvp_exec_object object; /* first */
};

#define KVP_EXEC_BUCKETS         1024
#define KVP_EXEC_TIMELINES       (KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX)
#define KVP_EXEC_TIMELINES_BYTES (KVP_EXEC_TIMELINES * sizeof(struct kvp_timeline))

/* One kind of object. `free` gives back what the object holds, and the object. */
struct kvp_exec_objects {
    struct kvp_exec_object *buckets[KVP_EXEC_BUCKETS];
    void (*free)(struct kvp_exec_object *object, void *arg);
    void *arg;
};

void kvp_exec_object_put(struct kvp_exec_objects *objects, struct kvp_exec_object *object);
/** @return NULL: there is none */
struct kvp_exec_object *kvp_exec_object_get(const struct kvp_exec_objects *objects, uint64_t a, uint32_t b);
void kvp_exec_object_drop(struct kvp_exec_objects *objects, struct kvp_exec_object *object);
/** Drop all that have this `a`. */
void kvp_exec_objects_drop(struct kvp_exec_objects *objects, uint64_t a);
void kvp_exec_objects_drop_all(struct kvp_exec_objects *objects);

void kvp_exec_object_use(struct kvp_exec_object *object);
void kvp_exec_object_release(struct kvp_exec_objects *objects, struct kvp_exec_object *object);

#endif
