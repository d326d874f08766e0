/**
 * The auditor: walks a snapshot of the ledger on one of libuv's threads, so that the loop does not wait for it.
 *
 * A snapshot's memory is address space of the ledger's size: what lies behind the part that was asked for is zeros that
 * nobody pays for, so that a place in it that a spoiled record names can be read like any other. It is given back by the
 * thread that walked it: giving back takes time, too.
 *
 * All functions are called on the loop's thread; at most one snapshot is with the auditor.
 */
#ifndef KVP_AUDITOR_H
#define KVP_AUDITOR_H

#include "core.h"

#include <uv.h>

struct kvp_auditor;

/** @param done  called on the loop's thread, once for each run that ends before kvp_auditor_close */
enum kvp_status kvp_auditor_open(uv_loop_t *loop, uint64_t ledger_bytes,
                                 void (*done)(void *arg, const struct kvp_audit_report *report), void *arg,
                                 struct kvp_auditor **ret_auditor);

/** Memory for a snapshot, of which the first `used` bytes can be written. NULL: there is none. */
unsigned char *kvp_auditor_memory(struct kvp_auditor *auditor, uint64_t used);
void kvp_auditor_drop(struct kvp_auditor *auditor, unsigned char *memory);

/** Audit a snapshot in such memory, and give that back. */
void kvp_auditor_run(struct kvp_auditor *auditor, const struct kvp_ledger *snapshot);

/** Nothing is told any more. A run under way ends in the loop's last turns, and with it the auditor. */
void kvp_auditor_close(struct kvp_auditor *auditor);

#endif
