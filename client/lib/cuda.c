/**
 * cuda.h over the CUDA driver, which is loaded at run time: libcuda belongs to the machine, not to a package.
 *
 * Every driver call goes through DRIVER, which turns a failure into KVP_EDEVICE (KVP_ENOMEM for memory) and leaves the
 * call's own text. GPUs are found by UUID, since CUDA_VISIBLE_DEVICES numbers them anew. Contexts are the primary ones,
 * retained while the pool is attached; memory registered with one of them is registered portably, for all.
 */
#include "cuda.h"

#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define ROUTINES(X)                                                                                                    \
    X(cuInit)                                                                                                          \
    X(cuGetErrorString)                                                                                                \
    X(cuDeviceGetCount)                                                                                                \
    X(cuDeviceGet)                                                                                                     \
    X(cuDeviceGetUuid)                                                                                                 \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuDevicePrimaryCtxRelease)                                                                                       \
    X(cuCtxPushCurrent)                                                                                                \
    X(cuCtxPopCurrent)                                                                                                 \
    X(cuCtxGetCurrent)                                                                                                 \
    X(cuCtxSynchronize)                                                                                                \
    X(cuMemImportFromShareableHandle)                                                                                  \
    X(cuMemAddressReserve)                                                                                             \
    X(cuMemAddressFree)                                                                                                \
    X(cuMemMap)                                                                                                        \
    X(cuMemUnmap)                                                                                                      \
    X(cuMemSetAccess)                                                                                                  \
    X(cuMemRelease)                                                                                                    \
    X(cuIpcOpenMemHandle)                                                                                              \
    X(cuIpcCloseMemHandle)                                                                                             \
    X(cuMemHostRegister)                                                                                               \
    X(cuMemHostUnregister)                                                                                             \
    X(cuMemHostGetDevicePointer)                                                                                       \
    X(cuStreamWaitValue64)                                                                                             \
    X(cuStreamWriteValue64)                                                                                            \
    X(cuStreamSynchronize)                                                                                             \
    X(cuMemAlloc)                                                                                                      \
    X(cuMemFree)                                                                                                       \
    X(cuMemHostAlloc)                                                                                                  \
    X(cuMemFreeHost)                                                                                                   \
    X(cuMemsetD8)                                                                                                      \
    X(cuMemcpyHtoDAsync)                                                                                               \
    X(cuEventCreate)                                                                                                   \
    X(cuEventRecord)                                                                                                   \
    X(cuEventSynchronize)                                                                                              \
    X(cuEventDestroy)

/* cuda.h renames some of them to the version that it declares: the name is taken after that. */
#define NAME_(name)    #name
#define NAME(name)     NAME_(name)
#define POINTER_(name) call_##name
#define POINTER(name)  POINTER_(name)
#define DECLARE(name)  static __typeof__(name) *POINTER(name);
ROUTINES(DECLARE)

#define DRIVER(name, ...) check(#name, POINTER(name)(__VA_ARGS__))

struct kvp_cuda_pool {
    CUdevice devices[KVP_GPUS_MAX];
    CUcontext contexts[KVP_GPUS_MAX]; /* NULL: that rank is not mapped */
    struct {
        void *host;
        CUdeviceptr device;
    } shared[KVP_CUDA_SHARED];
};

const struct kvp_cuda_kernels kvp_cuda_kernels = {.append = kvp_cuda_append,
                                                  .index = kvp_cuda_index,
                                                  .progress = kvp_cuda_progress,
                                                  .page_copy = kvp_cuda_page_copy,
                                                  .page_gather = kvp_cuda_page_gather};

static enum kvp_status check(const char *call, CUresult result)
{
    const char *text = NULL;

    if (result == CUDA_SUCCESS)
        return KVP_OK;
    POINTER(cuGetErrorString)(result, &text);
    return kvp_fail(result == CUDA_ERROR_OUT_OF_MEMORY ? KVP_ENOMEM : KVP_EDEVICE, "%s: %s (%d)", call,
                    text != NULL ? text : "unknown error", (int)result);
}

/* ---- the driver -------------------------------------------------------------------------------------------------- */

static const char *missing = "libcuda.so.1"; /* NULL once all is found */

static void load_driver(void)
{
    static const struct {
        const char *name;
        void *pointer;
    } routines[] = {
#define ENTRY(name) {NAME(name), &POINTER(name)},
        ROUTINES(ENTRY)
#undef ENTRY
    };
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);

    if (library == NULL)
        return;
    for (size_t i = 0; i < sizeof(routines) / sizeof(routines[0]); i++) {
        void *found = dlsym(library, routines[i].name);

        if (found == NULL) {
            missing = routines[i].name;
            return;
        }
        memcpy(routines[i].pointer, &found, sizeof(found));
    }
    missing = NULL;
}

enum kvp_status kvp_cuda_open(struct kvp_cuda_pool **ret_cuda)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct kvp_cuda_pool *cuda;
    CUresult result;

    pthread_once(&once, load_driver);
    if (missing != NULL)
        return kvp_fail(KVP_ENODEV, "a pool on a GPU: the CUDA driver is not here (%s)", missing);
    result = POINTER(cuInit)(0);
    if (result != CUDA_SUCCESS) {
        check("cuInit", result);
        return KVP_ENODEV;
    }
    cuda = calloc(1, sizeof(*cuda));
    if (cuda == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for a pool");
    *ret_cuda = cuda;
    return KVP_OK;
}

void kvp_cuda_close(struct kvp_cuda_pool *cuda)
{
    uint32_t first = 0;

    while (first < KVP_GPUS_MAX && cuda->contexts[first] == NULL)
        first++;
    if (first < KVP_GPUS_MAX && kvp_cuda_enter(cuda, first) == KVP_OK) {
        for (int i = 0; i < KVP_CUDA_SHARED; i++)
            if (cuda->shared[i].host != NULL)
                DRIVER(cuMemHostUnregister, cuda->shared[i].host);
        kvp_cuda_leave(cuda);
    }
    for (uint32_t rank = 0; rank < KVP_GPUS_MAX; rank++)
        if (cuda->contexts[rank] != NULL)
            DRIVER(cuDevicePrimaryCtxRelease, cuda->devices[rank]);
    free(cuda);
}

/* ---- slabs ------------------------------------------------------------------------------------------------------- */

/* "GPU-" and the UUID in the usual groups; the prefix may be missing. */
static bool uuid_equals(const CUuuid *uuid, const char *name)
{
    const unsigned char *b = (const unsigned char *)uuid->bytes;
    char text[40];

    snprintf(text, sizeof(text), "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
             b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
    return strcasecmp(text, strncmp(name, "GPU-", 4) == 0 ? name + 4 : name) == 0;
}

static enum kvp_status open_device(struct kvp_cuda_pool *cuda, uint32_t rank, const char *name)
{
    enum kvp_status status;
    CUdevice device;
    CUuuid uuid;
    int count;

    status = DRIVER(cuDeviceGetCount, &count);
    for (int i = 0; i < count && status == KVP_OK; i++) {
        status = DRIVER(cuDeviceGet, &device, i);
        if (status == KVP_OK)
            status = DRIVER(cuDeviceGetUuid, &uuid, device);
        if (status != KVP_OK || !uuid_equals(&uuid, name))
            continue;
        status = DRIVER(cuDevicePrimaryCtxRetain, &cuda->contexts[rank], device);
        cuda->devices[rank] = device;
        return status;
    }
    return status != KVP_OK ? status
                            : kvp_fail(KVP_ENODEV, "GPU %s is none of the %d that this process sees", name, count);
}

static enum kvp_status import_fd(CUdevice device, struct kvp_slab *slab, int fd)
{
    const CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                                    .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle;
    enum kvp_status status;
    CUdeviceptr address;

    status = DRIVER(cuMemImportFromShareableHandle, &handle, (void *)(uintptr_t)fd,
                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (status != KVP_OK)
        return status;
    status = DRIVER(cuMemAddressReserve, &address, slab->bytes, 0, 0, 0);
    if (status != KVP_OK)
        goto release_handle;
    status = DRIVER(cuMemMap, address, slab->bytes, 0, handle, 0);
    if (status != KVP_OK)
        goto free_address;
    status = DRIVER(cuMemSetAccess, address, slab->bytes, &access, 1);
    if (status != KVP_OK)
        goto unmap;
    slab->address = (unsigned char *)(uintptr_t)address;
    DRIVER(cuMemRelease, handle); /* the mapping keeps the memory */
    return KVP_OK;

unmap:
    POINTER(cuMemUnmap)(address, slab->bytes);
free_address:
    POINTER(cuMemAddressFree)(address, slab->bytes);
release_handle:
    POINTER(cuMemRelease)(handle);
    return status;
}

static enum kvp_status import_legacy(struct kvp_slab *slab, const void *ipc_handle)
{
    enum kvp_status status;
    CUipcMemHandle handle;
    CUdeviceptr address;

    _Static_assert(sizeof(handle) == 64, "a legacy handle is 64 bytes");
    memcpy(&handle, ipc_handle, sizeof(handle));
    status = DRIVER(cuIpcOpenMemHandle, &address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (status == KVP_OK) {
        slab->address = (unsigned char *)(uintptr_t)address;
        slab->legacy = true;
    }
    return status;
}

enum kvp_status kvp_cuda_import(struct kvp_cuda_pool *cuda, uint32_t rank, struct kvp_slab *slab, int fd,
                                const void *ipc_handle)
{
    enum kvp_status status = open_device(cuda, rank, slab->device);

    if (status == KVP_OK)
        status = kvp_cuda_enter(cuda, rank);
    if (status != KVP_OK)
        return status;
    status = fd >= 0 ? import_fd(cuda->devices[rank], slab, fd) : import_legacy(slab, ipc_handle);
    kvp_cuda_leave(cuda);
    return status;
}

void kvp_cuda_release(struct kvp_cuda_pool *cuda, uint32_t rank, struct kvp_slab *slab)
{
    CUdeviceptr address = (CUdeviceptr)(uintptr_t)slab->address;

    if (kvp_cuda_enter(cuda, rank) != KVP_OK)
        return;
    DRIVER(cuCtxSynchronize); /* kernels enqueued earlier may still be in the slab */
    if (slab->legacy) {
        DRIVER(cuIpcCloseMemHandle, address);
    } else {
        DRIVER(cuMemUnmap, address, slab->bytes);
        DRIVER(cuMemAddressFree, address, slab->bytes);
    }
    kvp_cuda_leave(cuda);
    slab->address = NULL;
}

int kvp_cuda_device(const struct kvp_cuda_pool *cuda, uint32_t rank)
{
    return cuda->contexts[rank] != NULL ? (int)cuda->devices[rank] : -1;
}

void kvp_cuda_settle(struct kvp_cuda_pool *cuda, uint32_t rank)
{
    if (kvp_cuda_enter(cuda, rank) != KVP_OK)
        return;
    DRIVER(cuCtxSynchronize);
    kvp_cuda_leave(cuda);
}

/* ---- host memory that GPUs reach --------------------------------------------------------------------------------- */

/* The context of any rank that is mapped: registered and pinned memory is portable, for all of them. */
static enum kvp_status enter_any(struct kvp_cuda_pool *cuda)
{
    for (uint32_t rank = 0; rank < KVP_GPUS_MAX; rank++)
        if (cuda->contexts[rank] != NULL)
            return kvp_cuda_enter(cuda, rank);
    return kvp_fail(KVP_EINVAL, "no slab of the pool is mapped");
}

enum kvp_status kvp_cuda_share(struct kvp_cuda_pool *cuda, enum kvp_cuda_shared which,
                               const struct kvp_mapping *mapping)
{
    unsigned flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
    enum kvp_status status;
    CUdeviceptr device;

    if (cuda->shared[which].host != NULL)
        return KVP_OK;
    if (which == KVP_CUDA_TABLE) /* mapped read-only: without this flag the driver refuses it */
        flags |= CU_MEMHOSTREGISTER_READ_ONLY;
    status = enter_any(cuda);
    if (status != KVP_OK)
        return status;
    status = DRIVER(cuMemHostRegister, mapping->address, mapping->bytes, flags);
    if (status == KVP_OK) {
        status = DRIVER(cuMemHostGetDevicePointer, &device, mapping->address, 0);
        if (status == KVP_OK) {
            cuda->shared[which].host = mapping->address;
            cuda->shared[which].device = device;
        } else {
            POINTER(cuMemHostUnregister)(mapping->address);
        }
    }
    kvp_cuda_leave(cuda);
    return status;
}

uint64_t kvp_cuda_address(const struct kvp_cuda_pool *cuda, enum kvp_cuda_shared which)
{
    return cuda->shared[which].device;
}

/* A stream memory operation belongs to the caller's context, where it has one. */
static enum kvp_status enter_for_stream(struct kvp_cuda_pool *cuda)
{
    CUcontext current = NULL;
    enum kvp_status status = DRIVER(cuCtxGetCurrent, &current);

    if (status != KVP_OK || current == NULL)
        return status != KVP_OK ? status : enter_any(cuda);
    return DRIVER(cuCtxPushCurrent, current);
}

enum kvp_status kvp_cuda_wait_value(struct kvp_cuda_pool *cuda, uint64_t address, uint64_t value, void *stream)
{
    enum kvp_status status = enter_for_stream(cuda);

    if (status != KVP_OK)
        return status;
    status = DRIVER(cuStreamWaitValue64, stream, address, value, CU_STREAM_WAIT_VALUE_GEQ);
    kvp_cuda_leave(cuda);
    return status;
}

enum kvp_status kvp_cuda_write_value(struct kvp_cuda_pool *cuda, uint64_t address, uint64_t value, void *stream)
{
    enum kvp_status status = enter_for_stream(cuda);

    if (status != KVP_OK)
        return status;
    status = DRIVER(cuStreamWriteValue64, stream, address, value, CU_STREAM_WRITE_VALUE_DEFAULT);
    kvp_cuda_leave(cuda);
    return status;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

enum kvp_status kvp_cuda_alloc(struct kvp_cuda_pool *cuda, uint32_t rank, size_t bytes, void **ret_memory)
{
    enum kvp_status status = kvp_cuda_enter(cuda, rank);
    CUdeviceptr address;

    if (status != KVP_OK)
        return status;
    status = DRIVER(cuMemAlloc, &address, bytes);
    if (status == KVP_OK) {
        status = DRIVER(cuMemsetD8, address, 0, bytes);
        if (status == KVP_OK)
            *ret_memory = (void *)(uintptr_t)address;
        else
            POINTER(cuMemFree)(address);
    }
    kvp_cuda_leave(cuda);
    return status;
}

void kvp_cuda_free(struct kvp_cuda_pool *cuda, uint32_t rank, void *memory)
{
    if (kvp_cuda_enter(cuda, rank) != KVP_OK)
        return;
    DRIVER(cuMemFree, (CUdeviceptr)(uintptr_t)memory);
    kvp_cuda_leave(cuda);
}

enum kvp_status kvp_cuda_alloc_pinned(struct kvp_cuda_pool *cuda, size_t bytes, void **ret_memory)
{
    enum kvp_status status = enter_any(cuda);
    void *memory;

    if (status != KVP_OK)
        return status;
    status =
        DRIVER(cuMemHostAlloc, &memory, bytes > 0 ? bytes : 1, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    kvp_cuda_leave(cuda);
    if (status == KVP_OK)
        *ret_memory = memset(memory, 0, bytes);
    return status;
}

void kvp_cuda_free_pinned(struct kvp_cuda_pool *cuda, void *memory)
{
    if (memory == NULL || enter_any(cuda) != KVP_OK)
        return;
    DRIVER(cuMemFreeHost, memory);
    kvp_cuda_leave(cuda);
}

/* ---- in a rank's context ----------------------------------------------------------------------------------------- */

enum kvp_status kvp_cuda_enter(struct kvp_cuda_pool *cuda, uint32_t rank)
{
    if (rank >= KVP_GPUS_MAX || cuda->contexts[rank] == NULL)
        return kvp_fail(KVP_EINVAL, "rank %u is not mapped", rank);
    return DRIVER(cuCtxPushCurrent, cuda->contexts[rank]);
}

void kvp_cuda_leave(struct kvp_cuda_pool *cuda)
{
    CUcontext popped;

    (void)cuda;
    POINTER(cuCtxPopCurrent)(&popped);
}

enum kvp_status kvp_cuda_copy_in(void *device, const void *host, size_t bytes, void *stream)
{
    return bytes == 0 ? KVP_OK : DRIVER(cuMemcpyHtoDAsync, (CUdeviceptr)(uintptr_t)device, host, bytes, stream);
}

enum kvp_status kvp_cuda_sync(void *stream)
{
    return DRIVER(cuStreamSynchronize, stream);
}

enum kvp_status kvp_cuda_event_make(void **ret_event)
{
    CUevent event;
    enum kvp_status status = DRIVER(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);

    if (status == KVP_OK)
        *ret_event = event;
    return status;
}

enum kvp_status kvp_cuda_event_record(void *event, void *stream)
{
    return DRIVER(cuEventRecord, event, stream);
}

enum kvp_status kvp_cuda_event_wait(void *event)
{
    return DRIVER(cuEventSynchronize, event);
}

void kvp_cuda_event_free(void *event)
{
    DRIVER(cuEventDestroy, event);
}
