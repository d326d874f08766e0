/**
 * The memory that the ledger lies in: a private memfd of a fixed, large size, of which only the parts in use are backed.
 *
 * Mode 0600, sealed against shrinking and growing, mapped once. Nobody but the daemon ever gets this fd, and whoever
 * parks it: it holds the sessions' secrets. What is not backed is not touched: a store there could find no memory.
 */
#ifndef KVP_LEDGER_BLOCK_H
#define KVP_LEDGER_BLOCK_H

#include "kvp_status.h"

#include <stdint.h>

#define KVP_LEDGER_NAME "ledger" /* in the fd store */

struct kvp_ledger_block {
    int fd;
    unsigned char *address;
    uint64_t bytes;
};

/** @param root_bytes  backed from the start */
enum kvp_status kvp_ledger_block_make(uint64_t bytes, uint64_t root_bytes, struct kvp_ledger_block *ret_block);
/** Zeroed memory there, whatever it held; KVP_ENOMEM: it can't be had. */
/**
 * Map a block that an earlier daemon made.
 * @param fd  the block's on success, the caller's still on failure
 * @retval KVP_ECORRUPT  it is no sealed memfd of a size that a ledger may have
 */
enum kvp_status kvp_ledger_block_adopt(int fd, uint64_t root_bytes, struct kvp_ledger_block *ret_block);
enum kvp_status kvp_ledger_block_back(struct kvp_ledger_block *block, uint64_t offset, uint64_t bytes);
void kvp_ledger_block_unback(struct kvp_ledger_block *block, uint64_t offset, uint64_t bytes);
void kvp_ledger_block_close(struct kvp_ledger_block *block);

#endif
