/**
 * Descriptions of pools and lists of strings out of messages, for attach.c and operations.c.
 */
#ifndef KVP_CLIENT_POOLS_H
#define KVP_CLIENT_POOLS_H

#include "internal.h"

/** A checked copy. @retval KVP_EMISMATCH the daemon computes layouts by another rule @retval KVP_EPROTO, KVP_ENOMEM */
enum kvp_status kvp_pool_info_from(const Kvpool__V1__PoolInfo *from, struct kvp_pool_info **ret_info);

/** A copy of n strings in one block, pointers first. @retval KVP_ENOMEM */
enum kvp_status kvp_strings_from(char *const *strings, size_t n, char ***ret_strings);

#endif
