/* Backing a memfd with memory; see backing.h. */
#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>

#define CHECK_FROM_BYTES (1ull << 20) /* less is always to be had, and not worth a look */

/* MemAvailable, in bytes; UINT64_MAX: the kernel does not say. */
static uint64_t available_bytes(void)
{
    FILE *file = fopen("/proc/meminfo", "re");
    uint64_t kib = UINT64_MAX >> 10;
    char line[128];

    if (file == NULL)
        return UINT64_MAX;
    while (fgets(line, sizeof(line), file) != NULL)
        if (sscanf(line, "MemAvailable: %" SCNu64, &kib) == 1)
            break;
    fclose(file);
    return kib << 10;
}

enum kvp_status kvp_back(int fd, uint64_t offset, uint64_t bytes)
{
    uint64_t available = bytes >= CHECK_FROM_BYTES ? available_bytes() : UINT64_MAX;
    int error;

    if (available < KVP_BACKING_SPARE_BYTES || bytes > available - KVP_BACKING_SPARE_BYTES) {
        errno = ENOMEM;
        return KVP_ENOMEM;
    }
    do {
        error = posix_fallocate(fd, (off_t)offset, (off_t)bytes);
    } while (error == EINTR);
    errno = error;
    return error == 0 ? KVP_OK : KVP_ENOMEM;
}
