/** The CUDA driver, loaded at run time; see cuda_driver.h. */
#include "cuda_driver.h"

#include <dlfcn.h>

struct kvp_cuda_driver kvp_cuda;

#define NAME_OF(name) TEXT_OF(name) /* expands the macro by which cuda.h versions an entry */
#define TEXT_OF(name) #name

static const struct {
    const char *name;
    void **at;
} entries[] = {
#define ENTRY(name) {NAME_OF(name), (void **)&kvp_cuda.name},
    KVP_CUDA_ENTRIES(ENTRY)
#undef ENTRY
};

enum kvp_status kvp_cuda_driver_load(struct kvp_exec_error *reterr)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    CUresult result;

    if (library == NULL)
        return kvp_exec_fail(reterr, KVP_ENODEV, "no CUDA driver: %s", dlerror());
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        *entries[i].at = dlsym(library, entries[i].name);
        if (*entries[i].at == NULL) {
            kvp_exec_fail(reterr, KVP_ENODEV, "the CUDA driver has no %s: it is too old", entries[i].name);
            dlclose(library);
            return KVP_ENODEV;
        }
    }
    result = kvp_cuda.cuInit(0);
    if (result == CUDA_SUCCESS)
        return KVP_OK; /* the library stays loaded to the end of the process */
    kvp_cuda_fail(reterr, "cuInit", result);
    dlclose(library);
    return KVP_ENODEV;
}

/* Errors that a context never recovers from: cuda.h says of each that the process must be started again. */
static bool context_lost(CUresult result)
{
    switch (result) {
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_SYSTEM_NOT_READY:
    case CUDA_ERROR_MPS_CONNECTION_FAILED:
    case CUDA_ERROR_MPS_RPC_FAILURE:
    case CUDA_ERROR_MPS_SERVER_NOT_READY:
    case CUDA_ERROR_MPS_CLIENT_TERMINATED:
    case CUDA_ERROR_EXTERNAL_DEVICE:
    case CUDA_ERROR_UNKNOWN:
        return true;
    default:
        return false;
    }
}

enum kvp_status kvp_cuda_fail(struct kvp_exec_error *reterr, const char *call, CUresult result)
{
    const char *name = NULL;
    enum kvp_status status = KVP_EDEVICE;

    if (kvp_cuda.cuGetErrorName(result, &name) != CUDA_SUCCESS || name == NULL)
        name = "an unknown error";
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        status = KVP_ENOMEM;
    else if (result == CUDA_ERROR_INVALID_VALUE || result == CUDA_ERROR_INVALID_HANDLE)
        status = KVP_EINVAL;
    else if (result == CUDA_ERROR_NO_DEVICE || result == CUDA_ERROR_INVALID_DEVICE)
        status = KVP_ENODEV;
    reterr->fatal = context_lost(result);
    return kvp_exec_fail(reterr, status, "%s: %s (%d)", call, name, (int)result);
}
