/**
 * GPU memory that crosses process borders.
 *
 *     slab, by fd          cuMemCreate ► export ► fd        lives as long as anyone holds the fd
 *     slab, legacy         cuMemAlloc  ► cuIpcGetMemHandle  lives and dies with this process
 *     adopted, imported    fd ► cuMemImportFromShareableHandle ► mapped
 *     legacy handle        64 bytes ► cuIpcOpenMemHandle, once a handle: the driver gives one mapping a process
 *     host buffer          memfd ► mapped in host memory; its bytes are copied
 *
 * A handle names an allocation, not a place in it, and of an fd's the driver maps all or nothing, nor does it tell the
 * size: so offset + bytes, rounded up to the driver's granularity, must be the whole allocation. Of what a client hands
 * over nothing is believed: kind, device and size are the driver's to confirm, and an error in it is the client's, never
 * taken for the loss of the device.
 */
#include "cuda_device.h"
#include "memory.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LEGACY_GRANULE (2ull << 20) /* smaller allocations share a block, and the handle would share that */

/* A legacy handle of another process, open here. */
struct kvp_cuda_opened {
    struct kvp_cuda_opened *next;
    unsigned char handle[KVP_EXEC_IPC_BYTES];
    CUdeviceptr at;
    uint64_t bytes;
    unsigned uses;
};

struct kvp_cuda_timelines {
    struct kvp_cuda_timelines *next;
    const unsigned char *at;
    uint64_t bytes;
    CUdeviceptr device;
};

enum kind { MAPPED, ALLOCATED, OPENED, HOST };

/* memory->owner */
struct owned {
    enum kind kind;
    CUdeviceptr base;  /* MAPPED, ALLOCATED */
    uint64_t reserved; /* MAPPED: bytes from base */
    struct kvp_cuda_opened *opened;
    struct kvp_exec_memory host; /* HOST: the mapping */
};

static bool round_up(uint64_t bytes, uint64_t granule, uint64_t *ret_bytes)
{
    if (bytes == 0 || bytes > INT64_MAX - granule)
        return false;
    *ret_bytes = (bytes + granule - 1) / granule * granule;
    return true;
}

static CUmemAllocationProp properties_of(const struct kvp_exec_device *device)
{
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                 .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                 .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device->number}};
}

/* Map an allocation's first `bytes` (a multiple of the granularity), readable and writable. */
static enum kvp_status map(struct kvp_exec_device *device, CUmemGenericAllocationHandle handle, uint64_t bytes,
                           CUdeviceptr *ret_at, struct kvp_exec_error *reterr)
{
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device->number},
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    enum kvp_status status;
    CUdeviceptr at;

    KVP_CUDA_CALL(done, cuMemAddressReserve, &at, bytes, 0, 0, 0);
    KVP_CUDA_CALL(free_addresses, cuMemMap, at, bytes, 0, handle, 0);
    KVP_CUDA_CALL(unmap, cuMemSetAccess, at, bytes, &access, 1);
    *ret_at = at;
    return KVP_OK;

unmap:
    kvp_cuda.cuMemUnmap(at, bytes);
free_addresses:
    kvp_cuda.cuMemAddressFree(at, bytes);
done:
    return status;
}

static void unmap(CUdeviceptr at, uint64_t bytes)
{
    kvp_cuda.cuMemUnmap(at, bytes);
    kvp_cuda.cuMemAddressFree(at, bytes);
}

static enum kvp_status zero(CUdeviceptr at, uint64_t bytes, struct kvp_exec_error *reterr)
{
    enum kvp_status status = KVP_OK;

    KVP_CUDA_CALL(done, cuMemsetD8Async, at, 0, bytes, CU_STREAM_LEGACY);
    KVP_CUDA_CALL(done, cuStreamSynchronize, CU_STREAM_LEGACY);
done:
    return status;
}

/* ---- slabs ------------------------------------------------------------------------------------------------------- */

static enum kvp_status create_shared(struct kvp_exec_device *device, uint64_t bytes, struct owned *owned, int *ret_fd,
                                     struct kvp_exec_error *reterr)
{
    CUmemAllocationProp properties = properties_of(device);
    CUmemGenericAllocationHandle handle;
    enum kvp_status status;
    int fd = -1;

    KVP_CUDA_CALL(done, cuMemCreate, &handle, bytes, &properties, 0);
    KVP_CUDA_CALL(release, cuMemExportToShareableHandle, &fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    status = map(device, handle, bytes, &owned->base, reterr);
    if (status != KVP_OK)
        goto close_fd;
    owned->kind = MAPPED;
    owned->reserved = bytes;
    status = zero(owned->base, bytes, reterr);
    if (status != KVP_OK)
        goto unmap_all;
    *ret_fd = fd;
    kvp_cuda.cuMemRelease(handle); /* mapping and fd hold the memory */
    return KVP_OK;

unmap_all:
    unmap(owned->base, bytes);
close_fd:
    close(fd);
release:
    kvp_cuda.cuMemRelease(handle);
done:
    return status;
}

static enum kvp_status create_legacy(uint64_t bytes, struct owned *owned, unsigned char *ret_handle,
                                     struct kvp_exec_error *reterr)
{
    enum kvp_status status;
    CUipcMemHandle handle;

    _Static_assert(sizeof(handle) == KVP_EXEC_IPC_BYTES, "the bytes of a legacy handle");
    KVP_CUDA_CALL(done, cuMemAlloc, &owned->base, bytes);
    KVP_CUDA_CALL(free_memory, cuIpcGetMemHandle, &handle, owned->base);
    status = zero(owned->base, bytes, reterr);
    if (status != KVP_OK)
        goto free_memory;
    owned->kind = ALLOCATED;
    memcpy(ret_handle, &handle, sizeof(handle));
    return KVP_OK;

free_memory:
    kvp_cuda.cuMemFree(owned->base);
done:
    return status;
}

enum kvp_status kvp_cuda_slab_create(struct kvp_exec_device *device, uint64_t bytes, bool legacy_ipc,
                                     struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr)
{
    struct kvp_exec_memory memory = {.fd = -1, .writable = true, .has_ipc = legacy_ipc};
    struct owned *owned;
    enum kvp_status status;

    if (!round_up(bytes, legacy_ipc ? LEGACY_GRANULE : device->granularity, &memory.bytes))
        return kvp_exec_fail(reterr, KVP_EINVAL, "a slab of %llu bytes can not be", (unsigned long long)bytes);
    owned = calloc(1, sizeof(*owned));
    if (owned == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a slab");
    status = legacy_ipc ? create_legacy(memory.bytes, owned, memory.ipc, reterr)
                        : create_shared(device, memory.bytes, owned, &memory.fd, reterr);
    if (status != KVP_OK) {
        free(owned);
        return status;
    }
    memory.device = owned->base;
    memory.owner = owned;
    *ret_memory = memory;
    return KVP_OK;
}

/* ---- what others hand over --------------------------------------------------------------------------------------- */

/* An error in what was handed over, not of this process or its context. */
static enum kvp_status not_ours(struct kvp_exec_error *reterr, enum kvp_status status, const char *what)
{
    char text[sizeof(reterr->text)];

    if (status == KVP_ENOMEM)
        return status;
    memcpy(text, reterr->text, sizeof(text));
    reterr->fatal = false;
    return kvp_exec_fail(reterr, KVP_EINVAL, "%s (%.120s)", what, text);
}

/* Map offset + bytes of what the fd shares. */
static enum kvp_status import(struct kvp_exec_device *device, int fd, uint64_t offset, uint64_t bytes,
                              struct owned *owned, struct kvp_exec_error *reterr)
{
    const char *what = "the fd is no memory of a GPU";
    CUmemAllocationProp properties;
    CUmemGenericAllocationHandle handle;
    enum kvp_status status;

    if (bytes == 0 || offset > INT64_MAX || bytes > INT64_MAX - offset ||
        !round_up(offset + bytes, device->granularity, &owned->reserved))
        return kvp_exec_fail(reterr, KVP_EINVAL, "offset and bytes of the memory are out of range");
    KVP_CUDA_CALL(wrong, cuMemImportFromShareableHandle, &handle, (void *)(uintptr_t)fd,
                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    KVP_CUDA_CALL(release, cuMemGetAllocationPropertiesFromHandle, &properties, handle);
    if (properties.location.type != CU_MEM_LOCATION_TYPE_DEVICE || properties.location.id != device->number) {
        kvp_cuda.cuMemRelease(handle);
        return kvp_exec_fail(reterr, KVP_ENODEV, "the memory behind the fd is not this GPU's");
    }
    what = "offset and bytes, rounded up to the driver's granularity, are not all of the fd's allocation";
    status = map(device, handle, owned->reserved, &owned->base, reterr);
    if (status != KVP_OK)
        goto release;
    owned->kind = MAPPED;
    kvp_cuda.cuMemRelease(handle);
    return KVP_OK;

release:
    kvp_cuda.cuMemRelease(handle);
wrong:
    return not_ours(reterr, status, what);
}

/* One mapping a handle and process: counted. */
static enum kvp_status open_legacy(struct kvp_exec_device *device, const unsigned char *bytes,
                                   struct kvp_cuda_opened **ret_opened, struct kvp_exec_error *reterr)
{
    struct kvp_cuda_opened *opened;
    CUipcMemHandle handle;
    enum kvp_status status;
    CUdeviceptr base;
    size_t size;

    for (opened = device->opened; opened != NULL; opened = opened->next)
        if (memcmp(opened->handle, bytes, KVP_EXEC_IPC_BYTES) == 0) {
            opened->uses++;
            *ret_opened = opened;
            return KVP_OK;
        }
    opened = calloc(1, sizeof(*opened));
    if (opened == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a legacy handle");
    memcpy(opened->handle, bytes, KVP_EXEC_IPC_BYTES);
    memcpy(&handle, bytes, sizeof(handle));
    KVP_CUDA_CALL(free_opened, cuIpcOpenMemHandle, &opened->at, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    KVP_CUDA_CALL(close_handle, cuMemGetAddressRange, &base, &size, opened->at);
    opened->bytes = base + size - opened->at;
    opened->uses = 1;
    opened->next = device->opened;
    device->opened = opened;
    *ret_opened = opened;
    return KVP_OK;

close_handle:
    kvp_cuda.cuIpcCloseMemHandle(opened->at);
free_opened:
    free(opened);
    return not_ours(reterr, status, "the legacy handle opens no memory");
}

static void close_legacy(struct kvp_exec_device *device, struct kvp_cuda_opened *opened)
{
    struct kvp_cuda_opened **at = &device->opened;

    if (--opened->uses > 0)
        return;
    while (*at != opened)
        at = &(*at)->next;
    *at = opened->next;
    kvp_cuda.cuIpcCloseMemHandle(opened->at);
    free(opened);
}

static enum kvp_status take_legacy(struct kvp_exec_device *device, const unsigned char *ipc, uint64_t offset,
                                   uint64_t bytes, struct owned *owned, struct kvp_exec_error *reterr)
{
    enum kvp_status status = open_legacy(device, ipc, &owned->opened, reterr);

    if (status != KVP_OK)
        return status;
    owned->kind = OPENED;
    owned->base = owned->opened->at;
    if (bytes > 0 && offset <= owned->opened->bytes && bytes <= owned->opened->bytes - offset)
        return KVP_OK;
    status =
        kvp_exec_fail(reterr, KVP_EINVAL, "the handle shares %llu bytes, %llu at %llu are named",
                      (unsigned long long)owned->opened->bytes, (unsigned long long)bytes, (unsigned long long)offset);
    close_legacy(device, owned->opened);
    return status;
}

enum kvp_status kvp_cuda_buffer_import(struct kvp_exec_device *device, bool on_host, int fd, const unsigned char *ipc,
                                       uint64_t offset, uint64_t bytes, struct kvp_exec_memory *ret_memory,
                                       struct kvp_exec_error *reterr)
{
    struct kvp_exec_memory memory = {.bytes = bytes, .fd = -1, .writable = true};
    struct owned *owned = calloc(1, sizeof(*owned));
    enum kvp_status status;

    if (owned == NULL)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "no memory for a buffer");
    if (on_host) {
        owned->kind = HOST;
        status =
            ipc != NULL
                ? kvp_exec_fail(reterr, KVP_EINVAL, "legacy handles are of GPU memory, the buffer is the host's")
                : kvp_exec_map_at(fd, offset, bytes, KVP_EXEC_MAP_SEALED | KVP_EXEC_MAP_READ, &owned->host, reterr);
        memory.host = owned->host.host;
        memory.writable = owned->host.writable;
    } else {
        status = ipc != NULL ? take_legacy(device, ipc, offset, bytes, owned, reterr)
                             : import(device, fd, offset, bytes, owned, reterr);
        memory.device = owned->base + offset;
    }
    if (status != KVP_OK) {
        free(owned);
        return status;
    }
    memory.owner = owned;
    *ret_memory = memory;
    return KVP_OK;
}

enum kvp_status kvp_cuda_slab_adopt(struct kvp_exec_device *device, int fd, uint64_t bytes,
                                    struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr)
{
    return kvp_cuda_buffer_import(device, false, fd, NULL, 0, bytes, ret_memory, reterr);
}

void kvp_cuda_memory_drop(struct kvp_exec_device *device, struct kvp_exec_memory *memory)
{
    struct owned *owned = memory->owner;

    switch (owned->kind) {
    case MAPPED:
        unmap(owned->base, owned->reserved);
        break;
    case ALLOCATED:
        kvp_cuda.cuMemFree(owned->base);
        break;
    case OPENED:
        close_legacy(device, owned->opened);
        break;
    case HOST:
        kvp_exec_unmap(&owned->host);
        break;
    }
    if (memory->fd >= 0)
        close(memory->fd);
    free(owned);
}

/* ---- timelines --------------------------------------------------------------------------------------------------- */

/* Failure is no error: what is not registered is stored by the CPU when the work has ended. */
void kvp_cuda_timelines_adopt(struct kvp_exec_device *device, void *at, uint64_t bytes)
{
    struct kvp_cuda_timelines *timelines = device->stream_writes ? calloc(1, sizeof(*timelines)) : NULL;

    if (timelines == NULL)
        return;
    if (kvp_cuda.cuMemHostRegister(at, bytes, CU_MEMHOSTREGISTER_DEVICEMAP | CU_MEMHOSTREGISTER_PORTABLE) !=
        CUDA_SUCCESS)
        goto free_timelines;
    if (kvp_cuda.cuMemHostGetDevicePointer(&timelines->device, at, 0) != CUDA_SUCCESS)
        goto unregister;
    timelines->at = at;
    timelines->bytes = bytes;
    pthread_mutex_lock(&device->lock);
    timelines->next = device->timelines;
    device->timelines = timelines;
    pthread_mutex_unlock(&device->lock);
    return;

unregister:
    kvp_cuda.cuMemHostUnregister(at);
free_timelines:
    free(timelines);
}

void kvp_cuda_timelines_drop(struct kvp_exec_device *device, void *at)
{
    struct kvp_cuda_timelines **link = &device->timelines, *timelines;

    pthread_mutex_lock(&device->lock);
    while ((timelines = *link) != NULL && timelines->at != at)
        link = &timelines->next;
    if (timelines != NULL)
        *link = timelines->next;
    pthread_mutex_unlock(&device->lock);
    if (timelines == NULL)
        return;
    kvp_cuda.cuMemHostUnregister(at);
    free(timelines);
}

CUdeviceptr kvp_cuda_timeline(struct kvp_exec_device *device, const struct kvp_timeline *timeline)
{
    const unsigned char *at = (const unsigned char *)&timeline->value;
    CUdeviceptr found = 0;

    pthread_mutex_lock(&device->lock);
    for (const struct kvp_cuda_timelines *t = device->timelines; t != NULL && found == 0; t = t->next)
        if (at >= t->at && at < t->at + t->bytes)
            found = t->device + (CUdeviceptr)(at - t->at);
    pthread_mutex_unlock(&device->lock);
    return found;
}
