/**
 * Host memory that crosses process borders: memfds made here, and fds of others mapped here.
 *
 * What is mapped must not shrink, or a store into it would end the process: a memfd of ours is sealed and its room is
 * allocated; one of a client's is sealed by us, or refused where that can not be. Thread-safe.
 */
#ifndef KVP_EXEC_MEMORY_H
#define KVP_EXEC_MEMORY_H

#include "backend.h"

/** A zeroed memfd of our own, mode 0600, allocated, sealed against shrinking and growing. */
enum kvp_status kvp_exec_memfd(const char *name, uint64_t bytes, int *ret_fd, struct kvp_exec_error *reterr);

enum kvp_exec_map_flags {
    KVP_EXEC_MAP_SEALED = 1, /* refuse what can not be sealed against shrinking */
    KVP_EXEC_MAP_READ = 2,   /* a mapping to read from is enough, where the fd gives no other */
};

/**
 * Map the first `bytes` of a shared file.
 * @retval KVP_EINVAL  it is shorter, or no such file, or (with KVP_EXEC_MAP_SEALED) could shrink
 */
enum kvp_status kvp_exec_map(int fd, uint64_t bytes, unsigned flags, void **ret_at, bool *ret_writable,
                             struct kvp_exec_error *reterr);

/** The same as memory of a slab or buffer: `bytes` at `offset`; the fd stays the caller's. */
enum kvp_status kvp_exec_map_at(int fd, uint64_t offset, uint64_t bytes, unsigned flags,
                                struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr);
/** Unmap what was mapped so, or as a whole at its beginning. */
void kvp_exec_unmap(const struct kvp_exec_memory *memory);

#endif
