/**
 * Work for the loop's next turn: the core must not be called from inside one of its own actions, so what an action
 * brings about is told to it from here. First in, first out; one thread.
 */
#ifndef KVP_LATER_H
#define KVP_LATER_H

#include <stdbool.h>
#include <uv.h>

/* Embedded in what the work is about; zeroed at first. */
struct kvp_later {
    void (*run)(struct kvp_later *later);
    struct kvp_later *next;
    bool queued;
};

struct kvp_later_queue {
    uv_idle_t idle; /* active while something is queued, so that the loop does not sleep */
    struct kvp_later *first, *last;
};

void kvp_later_open(struct kvp_later_queue *queue, uv_loop_t *loop);
void kvp_later_add(struct kvp_later_queue *queue, struct kvp_later *later); /* queued already: stays where it is */
void kvp_later_cancel(struct kvp_later_queue *queue, struct kvp_later *later);
void kvp_later_close(struct kvp_later_queue *queue); /* what is queued is forgotten */

#endif
