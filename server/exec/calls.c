/**
 * The executor's calls but jobs: hello, slabs, buffers.
 *
 * Each says the state that is wanted, so that a daemon started anew may say all of it again: making a slab that is here
 * answers with its fd, adopting one that is here keeps its mapping, importing a buffer again replaces it. What a message
 * says is checked before it is used. Making a slab can take long (its memory is zeroed), so it is a task of the pool's
 * own queue; the rest is done at once, so that a job may follow in the next message. Main thread only.
 */
#include "exec.h"
#include "memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void refuse(struct kvp_exec *exec, const struct kvp_exec_request *request, enum kvp_status status,
                   const struct kvp_exec_error *error)
{
    if (error->fatal && exec->fatal[0] == 0)
        snprintf(exec->fatal, sizeof(exec->fatal), "%s", error->text);
    kvp_exec_refuse(exec, request->method, request->tag, status, error->text);
}

/* The device is opened when it is first needed: hello, or a slab before it. */
static enum kvp_status need_device(struct kvp_exec *exec, struct kvp_exec_error *reterr)
{
    if (exec->device != NULL)
        return KVP_OK;
    return exec->backend->open(exec->device_id, &exec->device, &exec->info, reterr);
}

void kvp_exec_hello(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    const Kvpool__V1__ExecHelloRequest *hello = (const void *)request->body;
    Kvpool__V1__ExecHelloReply reply = KVPOOL__V1__EXEC_HELLO_REPLY__INIT;
    struct kvp_exec_error error = {0};
    enum kvp_status status;
    char *devices[1] = {exec->info.id}, *names[1] = {exec->info.name};

    if (hello->abi_version != KVP_ABI_VERSION) {
        status = kvp_exec_fail(&error, KVP_EMISMATCH, "the daemon speaks version %" PRIu32 ", this executor %u",
                               hello->abi_version, KVP_ABI_VERSION);
        refuse(exec, request, status, &error);
        return;
    }
    if (hello->backend[0] != 0 && strcmp(hello->backend, exec->backend->name) != 0) {
        status = kvp_exec_fail(&error, KVP_EMISMATCH, "backend %.16s is wanted, this executor is of %s", hello->backend,
                               exec->backend->name);
        refuse(exec, request, status, &error);
        return;
    }
    status = need_device(exec, &error);
    if (status != KVP_OK) {
        refuse(exec, request, status, &error);
        return;
    }
    reply.pid = (uint32_t)getpid();
    reply.backend = (char *)exec->backend->name;
    reply.n_devices = reply.n_device_bytes = reply.n_device_names = 1;
    reply.devices = devices;
    reply.device_bytes = &exec->info.bytes;
    reply.device_names = names;
    reply.abi_version = KVP_ABI_VERSION;
    kvp_exec_reply(exec, request->method, request->tag, &reply.base, -1);
}

/* ---- geometry ---------------------------------------------------------------------------------------------------- */

static enum kvp_status geometry_of(const Kvpool__V1__PoolSpec *spec, struct kvp_exec_geometry **ret_geometry,
                                   struct kvp_exec_error *reterr)
{
    struct kvp_exec_geometry *g;
    struct kvp_layout_totals totals;
    enum kvp_status status;

    if (spec == NULL || spec->n_planes == 0 || spec->n_planes > KVP_PLANES_MAX)
        return kvp_exec_fail(reterr, KVP_EINVAL, "a pool has 1 to %d planes", KVP_PLANES_MAX);
    g = calloc(1, sizeof(*g));
    if (g == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a pool's layout");
    for (size_t p = 0; p < spec->n_planes; p++)
        g->plane_specs[p] = (struct kvp_plane_spec){.layer = spec->planes[p]->layer,
                                                    .component = spec->planes[p]->component,
                                                    .heads = spec->planes[p]->heads,
                                                    .dim = spec->planes[p]->dim,
                                                    .dtype = spec->planes[p]->dtype};
    g->spec = (struct kvp_layout_spec){
        .pages = spec->pages,
        .page_tokens = spec->page_tokens,
        .n_planes = (uint32_t)spec->n_planes,
        .order = spec->order == KVPOOL__V1__ORDER__ORDER_NONE ? (uint32_t)KVP_ORDER_NHD : (uint32_t)spec->order,
        .placement = spec->placement == KVPOOL__V1__PLACEMENT__PLACEMENT_NONE ? (uint32_t)KVP_PLACEMENT_LAYER
                                                                              : (uint32_t)spec->placement,
        .joined = spec->joined,
        .planes = g->plane_specs};
    status = kvp_layout_compute(&g->spec, g->planes, &totals, reterr->text, sizeof(reterr->text));
    if (status != KVP_OK) {
        free(g);
        return status;
    }
    g->slab_bytes = totals.slab_bytes;
    *ret_geometry = g;
    return KVP_OK;
}

static bool same_geometry(const struct kvp_exec_geometry *a, const struct kvp_exec_geometry *b)
{
    return a->spec.pages == b->spec.pages && a->spec.page_tokens == b->spec.page_tokens &&
           a->spec.n_planes == b->spec.n_planes && a->slab_bytes == b->slab_bytes &&
           memcmp(a->plane_specs, b->plane_specs, sizeof(a->plane_specs[0]) * a->spec.n_planes) == 0 &&
           memcmp(a->planes, b->planes, sizeof(a->planes[0]) * a->spec.n_planes) == 0;
}

/* What a slab message says, checked: the device is this one, the layout computes, the bytes hold it. */
static enum kvp_status check_slab(struct kvp_exec *exec, const char *device, const Kvpool__V1__PoolSpec *spec,
                                  uint64_t bytes, uint32_t rank, struct kvp_exec_geometry **ret_geometry,
                                  struct kvp_exec_error *reterr)
{
    enum kvp_status status = need_device(exec, reterr);

    if (status != KVP_OK)
        return status;
    if (device[0] != 0 && strcmp(device, exec->info.id) != 0)
        return kvp_exec_fail(reterr, KVP_ENODEV, "device %.48s is not this executor's, %s", device, exec->info.id);
    if (rank >= KVP_GPUS_MAX)
        return kvp_exec_fail(reterr, KVP_EINVAL, "rank %" PRIu32 " is over %d", rank, KVP_GPUS_MAX - 1);
    status = geometry_of(spec, ret_geometry, reterr);
    if (status != KVP_OK)
        return status;
    if (bytes >= (*ret_geometry)->slab_bytes && bytes <= INT64_MAX)
        return KVP_OK;
    status = kvp_exec_fail(reterr, KVP_EINVAL, "a slab of %" PRIu64 " bytes does not hold the planes' %" PRIu64, bytes,
                           (*ret_geometry)->slab_bytes);
    free(*ret_geometry);
    return status;
}

static struct kvp_exec_slab *slab_get(const struct kvp_exec *exec, uint64_t pool, uint32_t rank)
{
    return (struct kvp_exec_slab *)kvp_exec_object_get(&exec->slabs, pool, rank);
}

static struct kvp_exec_slab *slab_new(uint64_t pool, uint32_t rank, struct kvp_exec_geometry *geometry,
                                      uint64_t asked_bytes, bool legacy_ipc)
{
    struct kvp_exec_slab *slab = calloc(1, sizeof(*slab));

    if (slab == NULL)
        return NULL;
    slab->object.a = pool;
    slab->object.b = rank;
    slab->object.memory.fd = -1;
    slab->geometry = geometry;
    slab->asked_bytes = asked_bytes;
    slab->legacy_ipc = legacy_ipc;
    return slab;
}

void kvp_exec_slab_free(struct kvp_exec_object *object, void *arg)
{
    struct kvp_exec_slab *slab = (struct kvp_exec_slab *)object;
    struct kvp_exec *exec = arg;

    if (slab->timelines != NULL) {
        exec->backend->timelines_drop(exec->device, slab->timelines);
        munmap(slab->timelines, KVP_EXEC_TIMELINES_BYTES);
    }
    if (slab->table != NULL)
        munmap((void *)slab->table, sizeof(*slab->table));
    if (object->memory.bytes > 0)
        exec->backend->memory_drop(exec->device, &object->memory);
    free(slab->geometry);
    free(slab);
}

static bool same_slab(const struct kvp_exec_slab *slab, const struct kvp_exec_geometry *geometry, uint64_t bytes,
                      bool legacy_ipc)
{
    return same_geometry(slab->geometry, geometry) && slab->asked_bytes == bytes && slab->legacy_ipc == legacy_ipc;
}

/* ---- making a slab ----------------------------------------------------------------------------------------------- */

struct slab_task {
    struct kvp_exec_work_item item; /* first */
    struct kvp_exec *exec;
    uint64_t tag;
    struct kvp_exec_slab *slab;
};

static void reply_slab(struct kvp_exec *exec, uint64_t tag, const struct kvp_exec_slab *slab)
{
    const struct kvp_exec_memory *memory = &slab->object.memory;
    Kvpool__V1__ExecSlabCreateReply reply = KVPOOL__V1__EXEC_SLAB_CREATE_REPLY__INIT;

    reply.device = exec->info.id;
    reply.bytes = memory->bytes;
    reply.has_fd = memory->fd >= 0;
    if (memory->has_ipc)
        reply.ipc_handle = (ProtobufCBinaryData){KVP_EXEC_IPC_BYTES, (uint8_t *)memory->ipc};
    kvp_exec_reply(exec, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, tag, &reply.base, memory->fd);
}

static enum kvp_status slab_run(struct kvp_exec_task *task, struct kvp_exec_worker *worker,
                                struct kvp_exec_error *reterr)
{
    struct slab_task *t = (struct slab_task *)task;
    struct kvp_exec *exec = t->exec;

    (void)worker;
    return exec->backend->slab_create(exec->device, t->slab->asked_bytes, t->slab->legacy_ipc, &t->slab->object.memory,
                                      reterr);
}

static void slab_ended(struct kvp_exec *exec, struct kvp_exec_work_item *item)
{
    struct slab_task *t = (struct slab_task *)item;
    enum kvp_status status = item->task.status;
    const struct kvp_exec_slab *before = slab_get(exec, t->slab->object.a, t->slab->object.b);

    if (before != NULL) { /* asked for twice while it was being made */
        if (same_slab(before, t->slab->geometry, t->slab->asked_bytes, t->slab->legacy_ipc))
            reply_slab(exec, t->tag, before);
        else
            kvp_exec_refuse(exec, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, t->tag, KVP_EEXIST,
                            "the pool has another slab here");
        kvp_exec_slab_free(&t->slab->object, exec);
    } else if (status == KVP_OK) {
        kvp_exec_object_put(&exec->slabs, &t->slab->object);
        reply_slab(exec, t->tag, t->slab);
    } else {
        kvp_exec_refuse(exec, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, t->tag, status, item->task.error.text);
        kvp_exec_slab_free(&t->slab->object, exec);
    }
    free(t);
}

static void slab_forget(struct kvp_exec *exec, struct kvp_exec_work_item *item)
{
    struct slab_task *t = (struct slab_task *)item;

    kvp_exec_slab_free(&t->slab->object, exec);
    free(t);
}

void kvp_exec_slab_create(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    const Kvpool__V1__ExecSlabCreateRequest *create = (const void *)request->body;
    struct kvp_exec_slab *slab = slab_get(exec, create->pool_id, create->rank);
    bool legacy = create->spec != NULL && create->spec->memory == KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    struct kvp_exec_geometry *geometry = NULL;
    struct kvp_exec_error error = {0};
    struct slab_task *t;
    enum kvp_status status =
        check_slab(exec, create->device, create->spec, create->bytes, create->rank, &geometry, &error);

    if (status != KVP_OK) {
        refuse(exec, request, status, &error);
        return;
    }
    if (slab != NULL) {
        if (same_slab(slab, geometry, create->bytes, legacy))
            reply_slab(exec, request->tag, slab);
        else
            kvp_exec_refuse(exec, request->method, request->tag, KVP_EEXIST, "the pool has another slab here");
        free(geometry);
        return;
    }
    t = calloc(1, sizeof(*t));
    slab = slab_new(create->pool_id, create->rank, geometry, create->bytes, legacy);
    if (t == NULL || slab == NULL)
        goto free_all;
    *t = (struct slab_task){
        .item = {.task = {.device = exec->device, .session = create->pool_id, .pool = create->pool_id, .run = slab_run},
                 .ended = slab_ended,
                 .forget = slab_forget},
        .exec = exec,
        .tag = request->tag,
        .slab = slab};
    if (kvp_exec_queue_submit(exec->queue, &t->item.task) == KVP_OK)
        return;

free_all:
    free(t);
    free(slab);
    free(geometry);
    kvp_exec_refuse(exec, request->method, request->tag, KVP_ENOMEM, "no memory to make a slab with");
}

/* ---- adopting one ------------------------------------------------------------------------------------------------ */

/* The timelines and, read-only, the table; both files are the daemon's. */
static enum kvp_status map_pages_of_daemon(struct kvp_exec *exec, struct kvp_exec_slab *slab, int timelines_fd,
                                           int table_fd, struct kvp_exec_error *reterr)
{
    enum kvp_status status;
    struct stat st;
    bool writable;
    void *at;

    void *table;

    if (fstat(table_fd, &st) != 0 || st.st_size < (off_t)sizeof(struct kvp_table_header))
        return kvp_exec_fail(reterr, KVP_EINVAL, "the last fd is no table");
    table = mmap(NULL, sizeof(struct kvp_table_header), PROT_READ, MAP_SHARED, table_fd, 0);
    if (table == MAP_FAILED)
        return kvp_exec_fail(reterr, KVP_EINVAL, "the table can not be mapped");
    status = kvp_exec_map(timelines_fd, KVP_EXEC_TIMELINES_BYTES, 0, &at, &writable, reterr);
    if (status != KVP_OK) {
        munmap(table, sizeof(struct kvp_table_header));
        return status;
    }
    slab->table = table;
    slab->timelines = at;
    exec->backend->timelines_adopt(exec->device, at, KVP_EXEC_TIMELINES_BYTES);
    return KVP_OK;
}

static enum kvp_status adopt(struct kvp_exec *exec, struct kvp_exec_request *request, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecSlabAdoptRequest *wanted = (const void *)request->body;
    struct kvp_exec_slab *slab = slab_get(exec, wanted->pool_id, wanted->rank);
    bool legacy = wanted->spec != NULL && wanted->spec->memory == KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    unsigned first = wanted->has_slab_fd ? 1 : 0;
    struct kvp_exec_geometry *geometry = NULL;
    bool is_new = slab == NULL;
    enum kvp_status status;

    if (request->n_fds != first + 2)
        return kvp_exec_fail(reterr, KVP_EINVAL, "%u fds came along, not %u", request->n_fds, first + 2);
    status = check_slab(exec, wanted->device, wanted->spec, wanted->bytes, wanted->rank, &geometry, reterr);
    if (status != KVP_OK)
        return status;
    if (!is_new) {
        bool same = same_geometry(slab->geometry, geometry) && slab->legacy_ipc == legacy &&
                    wanted->bytes <= slab->object.memory.bytes;

        free(geometry);
        if (!same)
            return kvp_exec_fail(reterr, KVP_EEXIST, "the pool has another slab here");
        return slab->timelines != NULL
                   ? KVP_OK
                   : map_pages_of_daemon(exec, slab, request->fds[first], request->fds[first + 1], reterr);
    }
    if (!wanted->has_slab_fd) {
        free(geometry);
        return kvp_exec_fail(reterr, KVP_ELOST, "this executor did not make the slab, and no fd of it came along");
    }
    slab = slab_new(wanted->pool_id, wanted->rank, geometry, wanted->bytes, legacy);
    if (slab == NULL) {
        free(geometry);
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a slab");
    }
    status = exec->backend->slab_adopt(exec->device, request->fds[0], wanted->bytes, &slab->object.memory, reterr);
    if (status == KVP_OK)
        status = map_pages_of_daemon(exec, slab, request->fds[first], request->fds[first + 1], reterr);
    if (status != KVP_OK) {
        kvp_exec_slab_free(&slab->object, exec);
        return status;
    }
    kvp_exec_object_put(&exec->slabs, &slab->object);
    return KVP_OK;
}

void kvp_exec_slab_adopt(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    Kvpool__V1__ExecSlabAdoptReply reply = KVPOOL__V1__EXEC_SLAB_ADOPT_REPLY__INIT;
    struct kvp_exec_error error = {0};
    enum kvp_status status = adopt(exec, request, &error);

    if (status == KVP_OK)
        kvp_exec_reply(exec, request->method, request->tag, &reply.base, -1);
    else
        refuse(exec, request, status, &error);
}

void kvp_exec_slab_drop(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    const Kvpool__V1__ExecSlabDropRequest *drop = (const void *)request->body;
    Kvpool__V1__ExecSlabDropReply reply = KVPOOL__V1__EXEC_SLAB_DROP_REPLY__INIT;

    kvp_exec_queue_cancel(exec->queue, drop->pool_id);
    kvp_exec_objects_drop(&exec->slabs, drop->pool_id);
    kvp_exec_reply(exec, request->method, request->tag, &reply.base, -1);
}

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

void kvp_exec_buffer_free(struct kvp_exec_object *object, void *arg)
{
    struct kvp_exec *exec = arg;

    exec->backend->memory_drop(exec->device, &object->memory);
    free(object);
}

static enum kvp_status import(struct kvp_exec *exec, struct kvp_exec_request *request, struct kvp_exec_error *reterr)
{
    const Kvpool__V1__ExecBufferImportRequest *wanted = (const void *)request->body;
    bool on_host = strcmp(wanted->device, "host") == 0 ||
                   (wanted->device[0] == 0 && wanted->ipc_handle.len == 0 && strcmp(exec->backend->name, "host") == 0);
    const unsigned char *ipc = wanted->ipc_handle.len > 0 ? wanted->ipc_handle.data : NULL;
    struct kvp_exec_object *object, *before;
    enum kvp_status status = need_device(exec, reterr);

    if (status != KVP_OK)
        return status;
    if (wanted->buffer == 0)
        return kvp_exec_fail(reterr, KVP_EINVAL, "a buffer's number is not 0");
    if (ipc != NULL && wanted->ipc_handle.len != KVP_EXEC_IPC_BYTES)
        return kvp_exec_fail(reterr, KVP_EINVAL, "a legacy handle has %d bytes, not %zu", KVP_EXEC_IPC_BYTES,
                             wanted->ipc_handle.len);
    if (request->n_fds != (ipc == NULL))
        return kvp_exec_fail(reterr, KVP_EINVAL, "a buffer comes as one fd or one handle; %u fds are here",
                             request->n_fds);
    if (!on_host && wanted->device[0] != 0 && strcmp(wanted->device, exec->info.id) != 0)
        return kvp_exec_fail(reterr, KVP_ENODEV, "device %.48s is not this executor's, %s", wanted->device,
                             exec->info.id);
    object = calloc(1, sizeof(struct kvp_exec_buffer));
    if (object == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a buffer");
    object->a = wanted->session_id;
    object->b = wanted->buffer;
    status = exec->backend->buffer_import(exec->device, on_host, ipc == NULL ? request->fds[0] : -1, ipc,
                                          wanted->offset, wanted->bytes, &object->memory, reterr);
    if (status != KVP_OK) {
        free(object);
        return status;
    }
    before = kvp_exec_object_get(&exec->buffers, wanted->session_id, wanted->buffer);
    if (before != NULL)
        kvp_exec_object_drop(&exec->buffers, before);
    kvp_exec_object_put(&exec->buffers, object);
    return KVP_OK;
}

void kvp_exec_buffer_import(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    Kvpool__V1__ExecBufferImportReply reply = KVPOOL__V1__EXEC_BUFFER_IMPORT_REPLY__INIT;
    struct kvp_exec_error error = {0};
    enum kvp_status status = import(exec, request, &error);

    if (status == KVP_OK)
        kvp_exec_reply(exec, request->method, request->tag, &reply.base, -1);
    else
        refuse(exec, request, status, &error);
}

void kvp_exec_buffer_drop(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    const Kvpool__V1__ExecBufferDropRequest *drop = (const void *)request->body;
    Kvpool__V1__ExecBufferDropReply reply = KVPOOL__V1__EXEC_BUFFER_DROP_REPLY__INIT;
    struct kvp_exec_object *object = kvp_exec_object_get(&exec->buffers, drop->session_id, drop->buffer);

    if (drop->buffer == 0)
        kvp_exec_objects_drop(&exec->buffers, drop->session_id);
    else if (object != NULL)
        kvp_exec_object_drop(&exec->buffers, object);
    kvp_exec_reply(exec, request->method, request->tag, &reply.base, -1);
}
