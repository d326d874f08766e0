/**
 * The CUDA driver, loaded at run time: no program of kvpool links libcuda, so that all of them start where there is none.
 *
 * One table of entry points, filled once by kvp_cuda_driver_load; every call goes through it, and every result through
 * kvp_cuda_fail, which names the call. Thread-safe after loading.
 */
#ifndef KVP_EXEC_CUDA_DRIVER_H
#define KVP_EXEC_CUDA_DRIVER_H

#include "backend.h"

#include <cuda.h>

/* The names as cuda.h versions them: each is looked up under what its macro expands to. */
#define KVP_CUDA_ENTRIES(X)                                                                                            \
    X(cuInit)                                                                                                          \
    X(cuGetErrorName)                                                                                                  \
    X(cuDeviceGetCount)                                                                                                \
    X(cuDeviceGet)                                                                                                     \
    X(cuDeviceGetUuid)                                                                                                 \
    X(cuDeviceGetName)                                                                                                 \
    X(cuDeviceTotalMem)                                                                                                \
    X(cuDeviceGetAttribute)                                                                                            \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuDevicePrimaryCtxRelease)                                                                                       \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuMemGetAllocationGranularity)                                                                                   \
    X(cuMemGetAllocationPropertiesFromHandle)                                                                          \
    X(cuMemCreate)                                                                                                     \
    X(cuMemRelease)                                                                                                    \
    X(cuMemExportToShareableHandle)                                                                                    \
    X(cuMemImportFromShareableHandle)                                                                                  \
    X(cuMemAddressReserve)                                                                                             \
    X(cuMemAddressFree)                                                                                                \
    X(cuMemMap)                                                                                                        \
    X(cuMemUnmap)                                                                                                      \
    X(cuMemSetAccess)                                                                                                  \
    X(cuMemAlloc)                                                                                                      \
    X(cuMemFree)                                                                                                       \
    X(cuMemAllocHost)                                                                                                  \
    X(cuMemFreeHost)                                                                                                   \
    X(cuMemGetAddressRange)                                                                                            \
    X(cuMemsetD8Async)                                                                                                 \
    X(cuMemcpyHtoDAsync)                                                                                               \
    X(cuMemcpyDtoHAsync)                                                                                               \
    X(cuIpcGetMemHandle)                                                                                               \
    X(cuIpcOpenMemHandle)                                                                                              \
    X(cuIpcCloseMemHandle)                                                                                             \
    X(cuMemHostRegister)                                                                                               \
    X(cuMemHostUnregister)                                                                                             \
    X(cuMemHostGetDevicePointer)                                                                                       \
    X(cuStreamCreate)                                                                                                  \
    X(cuStreamDestroy)                                                                                                 \
    X(cuStreamSynchronize)                                                                                             \
    X(cuStreamWriteValue64)                                                                                            \
    X(cuEventCreate)                                                                                                   \
    X(cuEventDestroy)                                                                                                  \
    X(cuEventRecord)                                                                                                   \
    X(cuEventSynchronize)

struct kvp_cuda_driver {
#define KVP_CUDA_MEMBER(name) __typeof__(&name) name;
    KVP_CUDA_ENTRIES(KVP_CUDA_MEMBER)
#undef KVP_CUDA_MEMBER
};

extern struct kvp_cuda_driver kvp_cuda;

/** Load the driver and initialise it. Once, from one thread. @retval KVP_ENODEV there is no driver, or no GPU for it */
enum kvp_status kvp_cuda_driver_load(struct kvp_exec_error *reterr);

/** The status and text of a failed call: KVP_ENOMEM, KVP_EINVAL or KVP_EDEVICE; fatal where the context is lost. */
enum kvp_status kvp_cuda_fail(struct kvp_exec_error *reterr, const char *call, CUresult result);

/* A driver call whose failure ends the function it stands in at `label`, with `status` set. */
#define KVP_CUDA_CALL(label, name, ...)                                                                                \
    do {                                                                                                               \
        CUresult kvp_result = kvp_cuda.name(__VA_ARGS__);                                                              \
        if (kvp_result != CUDA_SUCCESS) {                                                                              \
            status = kvp_cuda_fail(reterr, #name, kvp_result);                                                         \
            goto label;                                                                                                \
        }                                                                                                              \
    } while (0)

#endif
