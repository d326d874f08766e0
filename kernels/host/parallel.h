/**
 * Work split over threads for the length of one call.
 *
 * A call below KVP_HOST_SPLIT_BYTES runs on its caller's thread alone. A larger one starts helpers, shares its units
 * out by one atomic counter, and joins every helper before it returns: nothing outlives the call, so fork, exec and
 * exit find no thread, no lock and no state of this library. Starting a helper costs some 10 µs against 1 ms or more
 * of copying; a helper that can't be started is only missing, its share is done by the others. Helpers block all
 * signals: a worker's handlers run on threads of its own.
 */
#ifndef KVP_HOST_PARALLEL_H
#define KVP_HOST_PARALLEL_H

#include <stdint.h>

#define KVP_HOST_THREADS_MAX 64
#define KVP_HOST_SPLIT_BYTES (4u << 20) /* bytes moved by a call that is worth a second thread */

/** Do the units [first, last) of a call. Called by several threads at once, on ranges that never overlap. */
typedef void (*kvp_host_work)(void *context, uint64_t first, uint64_t last);

/**
 * Do all units [0, units).
 *
 * @param threads  as the caller of kvp_host_X gave it: the number of threads; ≤ 0: as many as `bytes` is worth and
 *                 this process may run on
 * @param units    what is shared out; 0 does nothing
 * @param grain    units that stay together (≥ 1): every range starts at a multiple of it
 * @param bytes    an estimate of what the whole call moves
 */
void kvp_host_parallel(int threads, uint64_t units, uint64_t grain, uint64_t bytes, kvp_host_work work, void *context);

#endif
