/**
 * Things: the memory objects and fds that outlive the daemon (core.h says which). Made or taken here, mapped where the
 * core reads or writes them, parked in the fd store before the core is told that they are ready.
 *
 *   make ──► MAKING (thread pool: memfd, all of it backed, mapped, sealed) ──► PARKING ──► READY
 *   keep ──────────────────────────────────────────────────────────────────────┘           │ drop: unparked,
 *                                                                                          ▼ unmapped, closed
 *
 * A memfd's pages are all allocated when it is made: a page fault can then never fail in the daemon or in a worker.
 * It is sealed against shrinking and growing, mode 0600. Tables are sent out by a second, read-only fd.
 *
 * One thread. `ready` is called from the loop, never from inside these functions.
 */
#ifndef KVP_THINGS_H
#define KVP_THINGS_H

#include "core.h"
#include "fdstore.h"

#include <stdint.h>
#include <uv.h>

struct kvp_things;

typedef void (*kvp_thing_ready)(void *ctx, struct kvp_thing thing, enum kvp_status status, void *address,
                                uint64_t bytes);

enum kvp_status kvp_things_open(uv_loop_t *loop, struct kvp_fdstore *store, struct kvp_later_queue *later,
                                kvp_thing_ready ready, void *ctx, struct kvp_things **ret_things);
/** What is parked stays parked; all is unmapped and closed here. Before kvp_fdstore_close. */
void kvp_things_close(struct kvp_things *things);

void kvp_things_make(struct kvp_things *things, struct kvp_thing thing, uint64_t bytes);
/** @param fd  taken over; -1 (there was none to take) is told as KVP_EINVAL */
void kvp_things_keep(struct kvp_things *things, struct kvp_thing thing, int fd);
/**
 * Take over one that an earlier daemon parked, mapped where the core wants it so; the core is told by the caller.
 * @param fd  taken over, whatever comes of it
 * @retval KVP_EEXIST    one of that name was taken over before
 * @retval KVP_ECORRUPT  it is not of the kind that such a thing is; it is no longer parked
 */
enum kvp_status kvp_things_adopt(struct kvp_things *things, struct kvp_thing thing, int fd, void **ret_address,
                                 uint64_t *ret_bytes);
void kvp_things_drop(struct kvp_things *things, struct kvp_thing thing);

/** The fd to send out for a thing that is ready; -1: there is no such thing. */
int kvp_things_fd(const struct kvp_things *things, struct kvp_thing thing);

/** The name a thing is parked under: its kind and numbers, "p3.12". */
void kvp_thing_name(struct kvp_thing thing, char ret_name[KVP_FDSTORE_NAME_MAX]);

#endif
