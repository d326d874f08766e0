/**
 * The order of work: one queue a session, run by a few threads.
 *
 *                 main thread                                         worker threads
 *   submit ──► session's queue ──► (value reached?) ──► ready list ──► run ──► done list ──► take_done
 *                first in, first out      │ no: looked at again
 *                                         ▼ by pump, every few µs to 1 ms
 *
 * Tasks of one session run one behind the other; tasks of different sessions side by side. A task that waits for a
 * timeline value waits here, not on a stream: a stream that waits holds a hardware queue that the driver may share with
 * other streams, and what it holds could not be freed before the value comes. So a worker thread and the GPU only ever
 * see work that can run. The price is a look at memory instead of a wake-up, some 20 µs while the wait is young.
 *
 * All functions are called on the main thread; worker threads touch the ready and the done list alone. The first task
 * starts the threads. An eventfd tells the main thread that the done list is not empty.
 */
#ifndef KVP_EXEC_QUEUE_H
#define KVP_EXEC_QUEUE_H

#include "backend.h"

struct kvp_exec_task {
    /* filled in by who submits */
    struct kvp_exec_device *device;
    uint64_t session;                /* its queue */
    uint64_t pool;                   /* for cancelling */
    const struct kvp_timeline *wait; /* NULL: none */
    uint64_t wait_value;
    struct kvp_timeline *done; /* NULL: none; where the task fails it is said there, before the next one begins */
    uint64_t done_value;
    enum kvp_status (*run)(struct kvp_exec_task *task, struct kvp_exec_worker *worker, struct kvp_exec_error *reterr);
    /* what came of it */
    enum kvp_status status;
    struct kvp_exec_error error;
    /* the queue's own */
    struct kvp_exec_task *next;
    bool cancelled;
};

struct kvp_exec_queue;

/** Say on its timeline that a task failed. Any thread. */
void kvp_exec_task_failed(const struct kvp_exec_task *task, enum kvp_status status);

enum kvp_status kvp_exec_queue_create(const struct kvp_exec_backend *backend, struct kvp_exec_queue **ret_queue);
/** The fd that polls readable while tasks are done. */
int kvp_exec_queue_fd(const struct kvp_exec_queue *queue);

/** The task is the queue's until take_done returns it. @retval KVP_ENOMEM no thread or memory; the task stays the caller's */
enum kvp_status kvp_exec_queue_submit(struct kvp_exec_queue *queue, struct kvp_exec_task *task);

/** Look at the values that are waited for. @return ns until the next look is due; UINT64_MAX: nothing waits */
uint64_t kvp_exec_queue_pump(struct kvp_exec_queue *queue);

/** A list of tasks done, in the order of their ends, linked by `next`; NULL: none. */
struct kvp_exec_task *kvp_exec_queue_take_done(struct kvp_exec_queue *queue);

/** End the tasks of a pool that have not begun, with KVP_ELOST; they come out of take_done. */
void kvp_exec_queue_cancel(struct kvp_exec_queue *queue, uint64_t pool);

/** Let what runs end, and free the queue. @return the tasks it still had, linked by `next` */
struct kvp_exec_task *kvp_exec_queue_destroy(struct kvp_exec_queue *queue);

#endif
