/* The memory that the ledger lies in; see ledger_block.h. */
#include "ledger_block.h"
#include "backing.h"
#include "kvp_limits.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)

/* A core dump leaves it out: it holds secrets, has not gone with the process, and would keep a daemon that crashed from
 * its end, and so from its restart, while gigabytes of address space are written. */
static void *map_block(int fd, uint64_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

    if (at == MAP_FAILED)
        return NULL;
    madvise(at, bytes, MADV_DONTDUMP);
    return at;
}

enum kvp_status kvp_ledger_block_make(uint64_t bytes, uint64_t root_bytes, struct kvp_ledger_block *ret_block)
{
    struct kvp_ledger_block block = {.bytes = bytes};

    block.fd = memfd_create("kvpool-ledger", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (block.fd < 0)
        return KVP_ENOMEM;
    if (fchmod(block.fd, 0600) != 0 || ftruncate(block.fd, (off_t)bytes) != 0 ||
        fcntl(block.fd, F_ADD_SEALS, SEALS | F_SEAL_SEAL) != 0 ||
        kvp_ledger_block_back(&block, 0, root_bytes) != KVP_OK)
        goto close_fd;
    block.address = map_block(block.fd, bytes);
    if (block.address == NULL)
        goto close_fd;
    *ret_block = block;
    return KVP_OK;

close_fd:
    kvp_log(LOG_ERR, "no memory for the ledger: %s", strerror(errno));
    close(block.fd);
    return KVP_ENOMEM;
}

enum kvp_status kvp_ledger_block_adopt(int fd, uint64_t root_bytes, struct kvp_ledger_block *ret_block)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct stat st;
    void *at;

    if (seals < 0 || (seals & SEALS) != SEALS || fstat(fd, &st) != 0 || (uint64_t)st.st_size < root_bytes ||
        (uint64_t)st.st_size > KVP_LEDGER_BYTES_MAX)
        return KVP_ECORRUPT;
    at = map_block(fd, (uint64_t)st.st_size);
    if (at == NULL)
        return KVP_ENOMEM;
    *ret_block = (struct kvp_ledger_block){.fd = fd, .address = at, .bytes = (uint64_t)st.st_size};
    return KVP_OK;
}

enum kvp_status kvp_ledger_block_back(struct kvp_ledger_block *block, uint64_t offset, uint64_t bytes)
{
    if (offset > block->bytes || bytes > block->bytes - offset)
        return KVP_EINVAL;
    /* The ledger needs zeroed memory here, and who used it before may have died before giving it back. */
    if (fallocate(block->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) != 0)
        return KVP_ENOMEM;
    if (kvp_back(block->fd, offset, bytes) != KVP_OK)
        return KVP_ENOMEM;
    /* Mapped now, rather than a page at a time in the middle of calls. A kernel before 5.14 can not: then it is so. */
    if (block->address != NULL)
        madvise((unsigned char *)block->address + offset, bytes, MADV_POPULATE_WRITE);
    return KVP_OK;
}

void kvp_ledger_block_unback(struct kvp_ledger_block *block, uint64_t offset, uint64_t bytes)
{
    if (fallocate(block->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) != 0)
        kvp_log(LOG_ERR, "the ledger's memory at %#llx can not be given back: %s", (unsigned long long)offset,
                strerror(errno));
}

void kvp_ledger_block_close(struct kvp_ledger_block *block)
{
    if (block->address != NULL)
        munmap(block->address, block->bytes);
    if (block->fd >= 0)
        close(block->fd);
    *block = (struct kvp_ledger_block){.fd = -1};
}
