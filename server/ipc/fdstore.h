/**
 * The service manager: what the daemon tells it, and the file descriptors it keeps for the daemon's next life.
 *
 * Speaks sd_notify's protocol with whoever listens at $NOTIFY_SOCKET: systemd, or kvpool-keeper. Nothing here waits:
 * messages that the manager does not take at once are queued, and a parking is done when its barrier comes back.
 * Without $NOTIFY_SOCKET nothing is kept, and parking is done in the loop's next turn. So it is when the manager is
 * gone: its socket refuses what is sent. That is tried when the parent process ends, which is the manager most often, and
 * seen at the latest with the next word to the watchdog.
 *
 * One thread. Names are short (the names handed back share one environment string), letters, digits and '.' only.
 */
#ifndef KVP_FDSTORE_H
#define KVP_FDSTORE_H

#include "kvp_status.h"
#include "later.h"

#include <stdbool.h>
#include <uv.h>

#define KVP_FDSTORE_NAME_MAX   24   /* bytes, the terminator included */
#define KVP_FDSTORE_TIMEOUT_MS 5000 /* a manager that has not answered a barrier by then does not keep anything */

#define KVP_FDSTORE_MAX        8000 /* kept at once, by our count: the units say 8192, and a full store drops silently */

struct kvp_fdstore;

/** @param gone  called once if the manager dies, from the loop or from any function here */
enum kvp_status kvp_fdstore_open(uv_loop_t *loop, struct kvp_later_queue *later, void (*gone)(void *arg), void *arg,
                                 struct kvp_fdstore **ret_store);
/** What is queued is sent if that needs no waiting; parkings under way end as KVP_EDISCONNECTED. */
void kvp_fdstore_close(struct kvp_fdstore *store);

/** Whether anybody keeps what is parked. */
bool kvp_fdstore_keeps(const struct kvp_fdstore *store);

/** Send lines of "NAME=value", e.g. "READY=1\nSTATUS=serving". */
void kvp_fdstore_notify(struct kvp_fdstore *store, const char *lines);

/**
 * Have an fd kept under a name. The fd stays the caller's.
 * @param done  called once, from the loop: KVP_OK when it is kept (or nobody keeps anything); else KVP_ETIMEDOUT
 * @retval KVP_ENOMEM  it can not be sent; `done` is not called
 * @retval KVP_ELIMIT  KVP_FDSTORE_MAX are kept; `done` is not called
 */
enum kvp_status kvp_fdstore_park(struct kvp_fdstore *store, const char *name, int fd,
                                 void (*done)(void *arg, enum kvp_status status), void *arg);
/** What was parked under that name, by this daemon or an earlier one, is given up. */
void kvp_fdstore_unpark(struct kvp_fdstore *store, const char *name);
/** So many were parked by earlier daemons. */
void kvp_fdstore_count(struct kvp_fdstore *store, unsigned n);

#endif
