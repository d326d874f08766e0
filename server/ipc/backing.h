/**
 * Backing a memfd with memory: all of a range at once, so that no store to it can fail later.
 */
#ifndef KVP_BACKING_H
#define KVP_BACKING_H

#include "kvp_status.h"

#include <stdint.h>

#define KVP_BACKING_SPARE_BYTES (64ull << 20) /* of the machine's memory, that is never taken */

/**
 * Allocates the range (zeroed where it was not there). What the machine, or a control group's limit, does not have is
 * refused before it is asked for: see available.h. Thread-safe.
 * @retval KVP_ENOMEM  not to be had; errno says why
 */
enum kvp_status kvp_back(int fd, uint64_t offset, uint64_t bytes);

#endif
