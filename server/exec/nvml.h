/** Which processes a GPU serves, by NVML, which is loaded at run time. */
#ifndef KVP_EXEC_NVML_H
#define KVP_EXEC_NVML_H

#include "kvp_status.h"

#include <stdint.h>

/**
 * The pids with a compute context on a GPU; it needs no context itself, and may take as long as the driver likes.
 * @param uuid  "GPU-…"
 * @retval KVP_EAGAIN  not known: no NVML, or it does not answer; one thread at a time
 */
enum kvp_status kvp_nvml_processes(const char *uuid, uint32_t *ret_pids, unsigned room, unsigned *ret_n);

#endif
