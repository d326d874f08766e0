/**
 * The part of kvp_cuda_gather that moves bytes as they are: private to the .cu files here. Arguments are
 * checked already.
 */
#ifndef KVP_GATHER_BYTES_H
#define KVP_GATHER_BYTES_H

#include "kvp_kernels.h"

enum kvp_status kvp_cuda_gather_bytes(const struct kvp_gather_args *args, void *stream);

#endif
