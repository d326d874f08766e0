/**
 * How much memory this process may still take: of the machine, and of the control groups that it is in.
 *
 * A memfd has no size limit of its own: asked for more than there is, the kernel takes what it finds and then ends
 * processes, anyone's on the machine, this daemon's own in a control group. So nothing large is taken without a look here.
 */
#ifndef KVP_AVAILABLE_H
#define KVP_AVAILABLE_H

#include <stdint.h>

/**
 * The least of MemAvailable and of what is left under the memory limits of the control groups (version 2 and 1, where
 * they are mounted as usual), from this process's own to the root. Page cache counts as available.
 * @param ret_where  whose room that is, behind "… are available"; NULL: of no interest
 * @return bytes; UINT64_MAX: nobody says
 */
uint64_t kvp_available_bytes(const char **ret_where);

#endif
