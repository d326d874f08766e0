/**
 * Which processes a GPU serves; see nvml.h.
 *
 * The declarations are NVML's own (its header is no part of a driver's install), of the versioned entry point that has
 * been there since driver 510; the library promises to keep versioned structures as they are.
 */
#include "nvml.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>

#define NVML_SUCCESS 0

struct nvml_process { /* nvmlProcessInfo_v2_t */
    unsigned pid;
    unsigned long long used_bytes;
    unsigned gpu_instance, compute_instance;
};

static struct {
    bool tried;
    int (*init)(void);
    int (*by_uuid)(const char *uuid, void **ret_device);
    int (*processes)(void *device, unsigned *count, struct nvml_process *ret_processes);
} nvml;

static enum kvp_status load(void)
{
    void *library;

    if (nvml.tried)
        return nvml.processes != NULL ? KVP_OK : KVP_EAGAIN;
    nvml.tried = true;
    library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return KVP_EAGAIN;
    *(void **)&nvml.init = dlsym(library, "nvmlInit_v2");
    *(void **)&nvml.by_uuid = dlsym(library, "nvmlDeviceGetHandleByUUID");
    *(void **)&nvml.processes = dlsym(library, "nvmlDeviceGetComputeRunningProcesses_v3");
    if (nvml.init == NULL || nvml.by_uuid == NULL || nvml.processes == NULL || nvml.init() != NVML_SUCCESS) {
        nvml.processes = NULL;
        dlclose(library);
        return KVP_EAGAIN;
    }
    return KVP_OK;
}

enum kvp_status kvp_nvml_processes(const char *uuid, uint32_t *ret_pids, unsigned room, unsigned *ret_n)
{
    struct nvml_process *found;
    unsigned n = room;
    void *device;
    int result;

    if (load() != KVP_OK || nvml.by_uuid(uuid, &device) != NVML_SUCCESS)
        return KVP_EAGAIN;
    found = calloc(room, sizeof(*found));
    if (found == NULL)
        return KVP_EAGAIN;
    result = nvml.processes(device, &n, found);
    if (result == NVML_SUCCESS) { /* more than `room` is an error: part of a list says nothing */
        for (unsigned i = 0; i < n; i++)
            ret_pids[i] = found[i].pid;
        *ret_n = n;
    }
    free(found);
    return result == NVML_SUCCESS ? KVP_OK : KVP_EAGAIN;
}
