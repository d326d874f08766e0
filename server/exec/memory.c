/** Host memory that crosses process borders; see memory.h. */
#include "memory.h"
#include "available.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ALLOCATE_STEP  (256ull << 20)
#define ALLOCATE_SPARE (64ull << 20) /* left to everyone else */

enum kvp_status kvp_exec_fail(struct kvp_exec_error *reterr, enum kvp_status status, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(reterr->text, sizeof(reterr->text), format, args);
    va_end(args);
    return status;
}

/* No step is taken that what is available does not cover: see available.h. */
static enum kvp_status allocate(int fd, uint64_t bytes, struct kvp_exec_error *reterr)
{
    for (uint64_t at = 0; at < bytes;) {
        const char *where;
        uint64_t step = bytes - at < ALLOCATE_STEP ? bytes - at : ALLOCATE_STEP, room = kvp_available_bytes(&where);
        uint64_t needed = at == 0 ? bytes : step;

        if (room < ALLOCATE_SPARE || room - ALLOCATE_SPARE < needed)
            return kvp_exec_fail(reterr, KVP_ENOMEM, "%llu bytes of shared memory are asked for, %llu are available %s",
                                 (unsigned long long)bytes, (unsigned long long)room, where);
        if (fallocate(fd, 0, (off_t)at, (off_t)step) == 0)
            at += step;
        else if (errno != EINTR)
            return kvp_exec_fail(reterr, KVP_ENOMEM, "no %llu bytes of shared memory: %s", (unsigned long long)bytes,
                                 strerror(errno));
    }
    return KVP_OK;
}

enum kvp_status kvp_exec_memfd(const char *name, uint64_t bytes, int *ret_fd, struct kvp_exec_error *reterr)
{
    enum kvp_status status = KVP_ENOMEM;
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0)
        return kvp_exec_fail(reterr, KVP_ENOMEM, "memfd_create: %s", strerror(errno));
    if (fchmod(fd, 0600) != 0 || ftruncate(fd, (off_t)bytes) != 0) {
        kvp_exec_fail(reterr, status, "a memfd of %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
        goto close_fd;
    }
    status = allocate(fd, bytes, reterr);
    if (status != KVP_OK)
        goto close_fd;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
        status = kvp_exec_fail(reterr, KVP_EINTERNAL, "sealing a memfd: %s", strerror(errno));
        goto close_fd;
    }
    *ret_fd = fd;
    return KVP_OK;

close_fd:
    close(fd);
    return status;
}

static bool sealed_against_shrinking(int fd)
{
    int seals = fcntl(fd, F_GET_SEALS);

    if (seals >= 0 && (seals & F_SEAL_SHRINK) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0)
        seals |= F_SEAL_SHRINK;
    return seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
}

enum kvp_status kvp_exec_map(int fd, uint64_t bytes, unsigned flags, void **ret_at, bool *ret_writable,
                             struct kvp_exec_error *reterr)
{
    bool writable = true;
    struct stat st;
    void *at;

    if (bytes == 0 || bytes > INT64_MAX)
        return kvp_exec_fail(reterr, KVP_EINVAL, "%llu bytes can not be mapped", (unsigned long long)bytes);
    if ((flags & KVP_EXEC_MAP_SEALED) != 0 && !sealed_against_shrinking(fd))
        return kvp_exec_fail(reterr, KVP_EINVAL,
                             "host memory must be a memfd sealed against shrinking (or made with MFD_ALLOW_SEALING)");
    if (fstat(fd, &st) != 0)
        return kvp_exec_fail(reterr, KVP_EINVAL, "fstat: %s", strerror(errno));
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < bytes)
        return kvp_exec_fail(reterr, KVP_EINVAL, "the memory shared has %lld bytes, %llu are named",
                             (long long)st.st_size, (unsigned long long)bytes);
    at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED && (flags & KVP_EXEC_MAP_READ) != 0) {
        writable = false;
        at = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    }
    if (at == MAP_FAILED)
        return kvp_exec_fail(reterr, errno == ENOMEM ? KVP_ENOMEM : KVP_EINVAL, "mmap: %s", strerror(errno));
    madvise(at, bytes, MADV_DONTDUMP); /* whose memory it is decides about dumps of it; it outlives us anyway */
    *ret_at = at;
    *ret_writable = writable;
    return KVP_OK;
}

enum kvp_status kvp_exec_map_at(int fd, uint64_t offset, uint64_t bytes, unsigned flags,
                                struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr)
{
    struct kvp_exec_memory memory = {.bytes = bytes, .fd = -1};
    enum kvp_status status;
    void *at;

    if (fd < 0)
        return kvp_exec_fail(reterr, KVP_EINVAL, "host memory is shared as an fd; the message has none");
    if (bytes == 0 || offset > INT64_MAX || bytes > INT64_MAX - offset)
        return kvp_exec_fail(reterr, KVP_EINVAL, "offset and bytes of the memory are out of range");
    status = kvp_exec_map(fd, offset + bytes, flags, &at, &memory.writable, reterr);
    if (status != KVP_OK)
        return status;
    memory.host = (unsigned char *)at + offset;
    memory.owner = at;
    *ret_memory = memory;
    return KVP_OK;
}

void kvp_exec_unmap(const struct kvp_exec_memory *memory)
{
    unsigned char *base = memory->owner != NULL ? memory->owner : memory->host;

    munmap(base, (size_t)(memory->host - base) + memory->bytes);
}
