/**
 * The core's life: made over a ledger, told of events, ticked while something is due.
 *
 * Every event ends in core_settle: what became ready is run, jobs are handed out, and the shell is told when to call
 * kvp_core_tick next. A tick does all that is due, each part in a slice, and each part says anew when it is due next
 * (core_due): so when nothing waits, nothing is due, and the daemon sleeps.
 */
#include "op.h"

#include <stdio.h>

#define EXECUTOR_START_MS_DEFAULT 20000u
#define LEASE_MS_DEFAULT          30000u

void core_due(struct kvp_core *core, uint64_t at_ms)
{
    if (at_ms < core->due_ms)
        core->due_ms = at_ms;
}

void core_log(struct kvp_core *core, int level, const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    core->act->log(core->ctx, level, line);
}

/* Nobody waits any more for what was adopted: from here on a call takes as long as it takes. */
static void end_pause(struct kvp_core *core)
{
    if (core->pause_unix_ms == 0 && core->opened && core->adopting == ADOPT_DONE && kvp_ledger_epoch(core->ledger) > 1)
        core->act->since_start(core->ctx, &core->pause_us, &core->pause_unix_ms);
}

void core_settle(struct kvp_core *core)
{
    if (core->adopting != ADOPT_DONE && core->announced)
        core_adopt_step(core);
    end_pause(core);
    core_ops_run(core);
    if (core->unsent_jobs != 0 && core->adopting == ADOPT_DONE) {
        core_jobs_pump(core);
        core_ops_run(core);
    }
    while (core_digests_settle(core))
        core_ops_run(core);
    core_audit_settle(core);
    if (core->due_ms != core->told_ms) {
        core->told_ms = core->due_ms;
        core->act->wake_at(core->ctx, core->due_ms);
    }
}

/* ---- memory of the call at hand ---------------------------------------------------------------------------------- */

#define ARENA_HEAD ((sizeof(struct arena_block) + 15) / 16 * 16)

/* Most calls need little, and find it in the core itself. */
void *core_alloc(struct kvp_core *core, size_t n, size_t size)
{
    if (n > (SIZE_MAX / 2 - ARENA_HEAD) / size)
        return NULL;
    size_t rounded = (n * size + 15) / 16 * 16;
    if (rounded <= sizeof(core->scratch) - core->scratch_used) {
        void *memory = memset(core->scratch + core->scratch_used, 0, rounded);
        core->scratch_used += rounded;
        return memory;
    }
    struct arena_block *block = calloc(1, ARENA_HEAD + n * size);
    if (block == NULL)
        return NULL;
    block->next = core->arena;
    core->arena = block;
    return (unsigned char *)block + ARENA_HEAD;
}

void core_alloc_reset(struct kvp_core *core)
{
    core->scratch_used = 0;
    while (core->arena != NULL) {
        struct arena_block *next = core->arena->next;
        free(core->arena);
        core->arena = next;
    }
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_core_create(const struct kvp_core_config *config, const struct kvp_actions *actions, void *ctx,
                                struct kvp_ledger *ledger, uint64_t now_ms, struct kvp_core **ret_core)
{
    struct kvp_core *core = calloc(1, sizeof(*core));
    if (core == NULL)
        return KVP_ENOMEM;
    core->config = *config;
    if (core->config.reclaim_slice == 0)
        core->config.reclaim_slice = KVP_RECLAIM_SLICE;
    if (core->config.executor_start_ms == 0)
        core->config.executor_start_ms = EXECUTOR_START_MS_DEFAULT;
    if (core->config.lease_default_ms == 0)
        core->config.lease_default_ms = LEASE_MS_DEFAULT;
    core->act = actions;
    core->ctx = ctx;
    core->ledger = ledger;
    core->now_ms = core->started_ms = core->audit.began_ms = core->audit.over_ms = now_ms;
    core->digests.seals = UINT64_MAX; /* there may be sealed pages that an earlier daemon did not get to */
    core->due_ms = core->told_ms = NEVER;
    core->lease_check_ms = NEVER;
    core->host = strcmp(config->backend, "host") == 0;
    enum kvp_status status = core_adopt(core);
    if (status != KVP_OK) {
        core_log(core, 3, "what was kept can not be adopted: %s. " KVP_GIVING_UP_TEXT,
                 core->error_text[0] != '\0' ? core->error_text : kvp_status_text(status));
        kvp_core_destroy(core);
        return status;
    }
    core_alloc_reset(core);
    core_settle(core);
    *ret_core = core;
    return KVP_OK;
}

void kvp_core_destroy(struct kvp_core *core)
{
    core_ops_drop(core);
    core_audit_end(core);
    core_alloc_reset(core);
    for (uint32_t i = 0; i < KVP_POOLS_MAX; i++)
        core_pool_unload(core, i);
    for (uint32_t i = 0; i < KVP_SESSIONS_MAX; i++)
        free(core->sessions[i].buffers);
    for (uint32_t i = 0; i < KVP_JOBS_MAX; i++)
        free(core->jobs[i].packed);
    free(core);
}

void kvp_core_opened(struct kvp_core *core)
{
    core->opened = true;
    core_settle(core);
}

void kvp_core_keeper(struct kvp_core *core, Kvpool__V1__Keeper keeper)
{
    core->keeper = keeper;
}

void kvp_core_tick(struct kvp_core *core, uint64_t now_ms)
{
    core->now_ms = now_ms;
    core->due_ms = NEVER;
    core->told_ms = 0; /* that wake may be used up: what is due is told anew, be it the same time */
    core_adopt_tick(core);
    core_exec_tick(core);
    if (core->adopting == ADOPT_DONE) {
        core_sessions_tick(core);
        for (uint32_t i = 0; i < KVP_POOLS_MAX; i++) {
            if (core->pools[i].id.generation != 0 && core->pools[i].table != NULL)
                core_pool_tick(core, &core->pools[i]);
        }
        core_audit_tick(core);
        core_digests_tick(core);
    }
    core_ops_tick(core);
    core_settle(core);
}

void kvp_core_thing_ready(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                          uint64_t bytes)
{
    if (!core_op_thing_ready(core, thing, status, address, bytes))
        core_adopt_thing(core, thing, status, address, bytes);
    core_settle(core);
}

unsigned kvp_core_drain(struct kvp_core *core)
{
    core->draining = true;
    return core->n_ops;
}

struct kvp_core_counts kvp_core_counts(const struct kvp_core *core)
{
    return core->counts;
}
