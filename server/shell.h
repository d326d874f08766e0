/**
 * The shell around the core: everything of kvpoold that touches the world, put together.
 *
 * It owns the loop and all that runs on it, and is the core's `actions`. The core decides; the shell does.
 *
 *   kvp_shell_open   what was kept (adoption.h) ─► place (folder, sockets) ─► ledger ─► core ─► doors
 *   kvp_shell_run    SERVING ─ SIGTERM, SIGINT ─► DRAINING ─ calls answered, or stop_ms ─► ENDING ─ executors gone ─►
 *   kvp_shell_close  everything in the opposite order; what is parked stays parked
 *
 * One thread, but for libuv's pool (which makes large memory objects) and gRPC's own.
 */
#ifndef KVP_SHELL_H
#define KVP_SHELL_H

#include "config.h"

#include <stdbool.h>

struct kvp_shell;

/**
 * @param config         must live as long as the shell
 * @param discard_state  give up what earlier daemons parked, instead of adopting it
 * @retval KVP_EINVAL and others: it is logged what was in the way
 */
enum kvp_status kvp_shell_open(const struct kvp_config *config, bool discard_state, struct kvp_shell **ret_shell);
/** Serve until a signal ends it. */
void kvp_shell_run(struct kvp_shell *shell);
void kvp_shell_close(struct kvp_shell *shell);

#endif
