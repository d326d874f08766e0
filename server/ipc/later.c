/* Work for the loop's next turn; see later.h. */
#include "later.h"

#include <stddef.h>

static void run_all(uv_idle_t *idle)
{
    struct kvp_later_queue *queue = idle->data;
    struct kvp_later *stop = queue->last; /* what is added meanwhile runs in the next turn */

    while (queue->first != NULL) {
        struct kvp_later *later = queue->first;
        bool last = later == stop;

        queue->first = later->next;
        if (queue->first == NULL)
            queue->last = NULL;
        later->queued = false;
        later->run(later);
        if (last)
            break;
    }
    if (queue->first == NULL)
        uv_idle_stop(idle);
}

void kvp_later_open(struct kvp_later_queue *queue, uv_loop_t *loop)
{
    *queue = (struct kvp_later_queue){.first = NULL};
    uv_idle_init(loop, &queue->idle);
    queue->idle.data = queue;
}

void kvp_later_add(struct kvp_later_queue *queue, struct kvp_later *later)
{
    if (later->queued)
        return;
    later->queued = true;
    later->next = NULL;
    if (queue->last != NULL)
        queue->last->next = later;
    else
        queue->first = later;
    queue->last = later;
    uv_idle_start(&queue->idle, run_all);
}

void kvp_later_cancel(struct kvp_later_queue *queue, struct kvp_later *later)
{
    struct kvp_later *before = NULL;

    if (!later->queued)
        return;
    later->queued = false;
    for (struct kvp_later **at = &queue->first; *at != NULL; before = *at, at = &(*at)->next) {
        if (*at != later)
            continue;
        *at = later->next;
        if (queue->last == later)
            queue->last = before;
        return;
    }
}

void kvp_later_close(struct kvp_later_queue *queue)
{
    queue->first = queue->last = NULL;
    uv_close((uv_handle_t *)&queue->idle, NULL);
}
