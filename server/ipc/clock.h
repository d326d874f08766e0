/**
 * The core's clock: every event is at the time that the core was last told (core.h), so whoever brings one tells the
 * time first. Cheap: the core hears it once a millisecond at most.
 */
#ifndef KVP_CLOCK_H
#define KVP_CLOCK_H

#include "core.h"

#include <uv.h>

struct kvp_clock {
    uv_loop_t *loop;
    struct kvp_core *core;
    uint64_t told_ms;
};

static inline void kvp_clock_tell(struct kvp_clock *clock)
{
    uint64_t now_ms = uv_now(clock->loop);

    if (now_ms != clock->told_ms) {
        clock->told_ms = now_ms;
        kvp_core_tick(clock->core, now_ms);
    }
}

#endif
