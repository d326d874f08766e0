/** GPU memory as a worker of kvpool has it; see gpu_memory.h. */
#include "gpu_memory.h"

#include <check.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(cudaError_t error, const char *what)
{
    ck_assert_msg(error == cudaSuccess, "%s: %s", what, cudaGetErrorString(error));
}

static void *driver(const char *name)
{
    enum cudaDriverEntryPointQueryResult result;
    void *at = NULL;

    must(cudaGetDriverEntryPointByVersion(name, &at, 12000, cudaEnableDefault, &result), name);
    ck_assert_msg(result == cudaDriverEntryPointSuccess && at != NULL, "the driver has no %s", name);
    return at;
}

/* A function of the driver, by its plain name: the runtime finds the version that the type is of. */
#define CALL(name, ...)                                                                                                \
    do {                                                                                                               \
        CUresult call_result = ((__typeof__(&name))driver(#name))(__VA_ARGS__);                                        \
        ck_assert_msg(call_result == CUDA_SUCCESS, "%s: error %d", #name, call_result);                                \
    } while (0)

bool gpu_present(void)
{
    int status;
    pid_t pid;

    fflush(NULL);
    pid = fork();
    if (pid == 0) {
        int n = 0;

        _exit(cudaGetDeviceCount(&n) == cudaSuccess && n > 0 ? 0 : 1);
    }
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void gpu_first(char ret_id[64])
{
    struct cudaDeviceProp properties;
    const unsigned char *b = (const unsigned char *)properties.uuid.bytes;

    must(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    snprintf(ret_id, 64, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2],
             b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
}

static CUmemAllocationProp properties(void)
{
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                 .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                 .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}};
}

static uint64_t rounded(uint64_t bytes)
{
    CUmemAllocationProp p = properties();
    size_t granularity;

    must(cudaFree(NULL), "the context");
    CALL(cuMemGetAllocationGranularity, &granularity, &p, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    return (bytes + granularity - 1) / granularity * granularity;
}

static void *map(CUmemGenericAllocationHandle handle, uint64_t bytes)
{
    CUmemAccessDesc access = {.location = properties().location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr at;

    CALL(cuMemAddressReserve, &at, bytes, 0, 0, 0);
    CALL(cuMemMap, at, bytes, 0, handle, 0);
    CALL(cuMemSetAccess, at, bytes, &access, 1);
    CALL(cuMemRelease, handle);
    return (void *)at;
}

void *gpu_map_fd(int fd, uint64_t bytes)
{
    CUmemGenericAllocationHandle handle;

    bytes = rounded(bytes);
    CALL(cuMemImportFromShareableHandle, &handle, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    return map(handle, bytes);
}

void *gpu_shared_by_fd(uint64_t bytes, int *ret_fd)
{
    CUmemAllocationProp p = properties();
    CUmemGenericAllocationHandle handle;
    void *at;

    bytes = rounded(bytes);
    CALL(cuMemCreate, &handle, bytes, &p, 0);
    CALL(cuMemExportToShareableHandle, ret_fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    at = map(handle, bytes);
    gpu_fill(at, 0, bytes);
    return at;
}

void *gpu_map_ipc(const unsigned char handle[64])
{
    cudaIpcMemHandle_t h;
    void *at;

    memcpy(&h, handle, sizeof(h));
    must(cudaIpcOpenMemHandle(&at, h, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    return at;
}

void *gpu_shared_by_ipc(uint64_t bytes, unsigned char ret_handle[64])
{
    cudaIpcMemHandle_t h;
    void *at;

    must(cudaMalloc(&at, rounded(bytes)), "cudaMalloc");
    gpu_fill(at, 0, bytes);
    must(cudaIpcGetMemHandle(&h, at), "cudaIpcGetMemHandle");
    memcpy(ret_handle, &h, sizeof(h));
    return at;
}

void gpu_write(void *device, const void *host, uint64_t bytes)
{
    must(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the GPU");
    gpu_sync();
}

void gpu_read(void *host, const void *device, uint64_t bytes)
{
    must(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy from the GPU");
}

void gpu_fill(void *device, int byte, uint64_t bytes)
{
    must(cudaMemset(device, byte, bytes), "cudaMemset");
    gpu_sync();
}

void gpu_sync(void)
{
    must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void *gpu_stream(void)
{
    cudaStream_t stream;

    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return stream;
}

void *gpu_pinned(uint64_t bytes)
{
    void *at;

    must(cudaMallocHost(&at, bytes), "cudaMallocHost");
    return at;
}

uint64_t gpu_register(void *at, uint64_t bytes)
{
    void *device;

    must(cudaHostRegister(at, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable), "cudaHostRegister");
    must(cudaHostGetDevicePointer(&device, at, 0), "cudaHostGetDevicePointer");
    return (uint64_t)(uintptr_t)device;
}

void gpu_stream_write(void *stream, uint64_t address, uint64_t value)
{
    CALL(cuStreamWriteValue64, stream, address, value, CU_STREAM_WRITE_VALUE_DEFAULT);
}

void gpu_stream_wait(void *stream, uint64_t address, uint64_t value)
{
    CALL(cuStreamWaitValue64, stream, address, value, CU_STREAM_WAIT_VALUE_GEQ);
}

void gpu_read_behind(void *host, const void *device, uint64_t bytes, void *stream)
{
    must(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
    must(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

void gpu_write_behind(void *device, const void *pinned, uint64_t bytes, void *stream)
{
    must(cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
}
