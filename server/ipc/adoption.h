/**
 * Taking over from an earlier daemon: what it parked finds its place again, in this order:
 *
 *   ledger opened ─► core made ─► things, connections, executors announced ─► the core's first tick ─► door opened
 *   ─► connections and processes watched ─► the rest given up
 *
 * Nothing of a client is read before its end. What the ledger does not name was parked ahead of a transaction that did
 * not come, or is of a ledger that was given up: it is taken out of the store and closed.
 */
#ifndef KVP_ADOPTION_H
#define KVP_ADOPTION_H

#include "executor.h"
#include "inherit.h"
#include "session_door.h"
#include "things.h"

/** Things to the core; before its first tick. */
void kvp_adopt_things(struct kvp_inherited *inherited, struct kvp_things *things, struct kvp_core *core);

/** Tell the core which sessions still have their connection; before its first tick. */
void kvp_adopt_sessions(const struct kvp_inherited *inherited, const struct kvp_ledger *ledger, struct kvp_core *core);

/** Executors that go on; before the core's first tick. */
void kvp_adopt_executors(struct kvp_inherited *inherited, struct kvp_executors *executors, struct kvp_core *core);

/** Connections and processes to the door; the core is told of processes that have ended. @return connections */
unsigned kvp_adopt_connections(struct kvp_inherited *inherited, const struct kvp_ledger *ledger, struct kvp_core *core,
                               struct kvp_session_door *door, struct kvp_fdstore *store);

/** Take what is left and is one of ours out of the store, and close everything. */
void kvp_adopt_nothing_else(struct kvp_inherited *inherited, struct kvp_fdstore *store);

#endif
