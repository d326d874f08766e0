/* Backing a memfd with memory; see backing.h. */
#include "backing.h"
#include "available.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>

#define CHECK_FROM_BYTES (1ull << 20) /* less is always to be had, and not worth a look */

enum kvp_status kvp_back(int fd, uint64_t offset, uint64_t bytes)
{
    uint64_t available = bytes >= CHECK_FROM_BYTES ? kvp_available_bytes(NULL) : UINT64_MAX;
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
