/** The order of work; see queue.h. */
#include "queue.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define LOOK_NS_MIN   20000ull   /* between two looks at a value just asked for */
#define LOOK_NS_MAX   1000000ull /* at one that does not come */
#define SESSIONS_BITS 8
#define WORKERS_MAX   16

struct list {
    struct kvp_exec_task *first, **end;
};

/* A session that has tasks; freed with its last. */
struct session {
    struct session *next; /* in its bucket */
    uint64_t id;
    struct list tasks; /* not begun */
    bool runs;         /* a task of it is with the workers; it is not in `tasks` */
    bool waits;        /* the first of `tasks` waits for a value */
};

struct kvp_exec_queue {
    const struct kvp_exec_backend *backend;
    struct session *sessions[1u << SESSIONS_BITS];
    unsigned waiting; /* sessions whose first task waits */
    uint64_t look_ns;
    int done_fd;
    pthread_t threads[WORKERS_MAX];
    unsigned n_threads;
    /* shared with the workers, under the lock */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct list ready, done;
    bool stop;
};

static void list_init(struct list *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static void list_add(struct list *list, struct kvp_exec_task *task)
{
    task->next = NULL;
    *list->end = task;
    list->end = &task->next;
}

static struct kvp_exec_task *list_take(struct list *list)
{
    struct kvp_exec_task *task = list->first;

    if (task != NULL && (list->first = task->next) == NULL)
        list->end = &list->first;
    return task;
}

/* ---- workers ----------------------------------------------------------------------------------------------------- */

static void tell_done(struct kvp_exec_queue *queue, struct kvp_exec_task *task)
{
    uint64_t one = 1;

    pthread_mutex_lock(&queue->lock);
    list_add(&queue->done, task);
    pthread_mutex_unlock(&queue->lock);
    while (write(queue->done_fd, &one, sizeof(one)) < 0) /* EINTR alone: the counter can not be full */
        ;
}

/* A value that its owner did not reach says nothing of a source: the task ends unrun. */
static enum kvp_status wait_outcome(struct kvp_exec_task *task)
{
    uint64_t error = task->wait != NULL ? kvp_timeline_lost(task->wait, task->wait_value) : 0;

    if (error == 0)
        return KVP_OK;
    return kvp_exec_fail(&task->error, KVP_ESESSION, "the timeline that the source waits for was ended by status -%llu",
                         (unsigned long long)error);
}

void kvp_exec_task_failed(const struct kvp_exec_task *task, enum kvp_status status)
{
    if (task->done != NULL)
        kvp_timeline_lose(task->done, task->done_value - 1, task->done_value, (uint64_t)-status);
}

static void *work(void *arg)
{
    struct kvp_exec_queue *queue = arg;
    struct kvp_exec_worker *worker = NULL;
    struct kvp_exec_task *task;

    for (;;) {
        pthread_mutex_lock(&queue->lock);
        while (queue->ready.first == NULL && !queue->stop)
            pthread_cond_wait(&queue->wake, &queue->lock);
        task = queue->stop ? NULL : list_take(&queue->ready);
        pthread_mutex_unlock(&queue->lock);
        if (task == NULL)
            break;
        task->status = wait_outcome(task);
        if (task->status == KVP_OK && worker == NULL)
            task->status = queue->backend->worker_open(task->device, &worker, &task->error);
        if (task->status == KVP_OK)
            task->status = task->run(task, worker, &task->error);
        if (task->status != KVP_OK)
            kvp_exec_task_failed(task, task->status);
        tell_done(queue, task);
    }
    if (worker != NULL)
        queue->backend->worker_close(worker);
    return NULL;
}

static enum kvp_status start_threads(struct kvp_exec_queue *queue)
{
    unsigned n = queue->backend->workers < WORKERS_MAX ? queue->backend->workers : WORKERS_MAX;

    while (queue->n_threads < n) {
        if (pthread_create(&queue->threads[queue->n_threads], NULL, work, queue) != 0)
            break;
        queue->n_threads++;
    }
    return queue->n_threads > 0 ? KVP_OK : KVP_ENOMEM;
}

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

static struct session **session_at(struct kvp_exec_queue *queue, uint64_t id)
{
    struct session **at = &queue->sessions[(id * 0x9e3779b97f4a7c15ull) >> (64 - SESSIONS_BITS)];

    while (*at != NULL && (*at)->id != id)
        at = &(*at)->next;
    return at;
}

static bool value_reached(const struct kvp_exec_task *task)
{
    return task->wait == NULL || __atomic_load_n(&task->wait->value, __ATOMIC_ACQUIRE) >= task->wait_value;
}

/* Hand the session's first task to the workers, or note that it waits. */
static void start_first(struct kvp_exec_queue *queue, struct session *session)
{
    struct kvp_exec_task *task = session->tasks.first;
    bool waits = !value_reached(task);

    queue->waiting += waits - session->waits;
    session->waits = waits;
    if (waits)
        return;
    list_take(&session->tasks);
    session->runs = true;
    pthread_mutex_lock(&queue->lock);
    list_add(&queue->ready, task);
    pthread_cond_signal(&queue->wake);
    pthread_mutex_unlock(&queue->lock);
}

enum kvp_status kvp_exec_queue_submit(struct kvp_exec_queue *queue, struct kvp_exec_task *task)
{
    struct session **at = session_at(queue, task->session);
    struct session *session = *at;

    if (queue->n_threads == 0 && start_threads(queue) != KVP_OK)
        return KVP_ENOMEM;
    if (session == NULL) {
        session = calloc(1, sizeof(*session));
        if (session == NULL)
            return KVP_ENOMEM;
        session->id = task->session;
        list_init(&session->tasks);
        *at = session;
    }
    list_add(&session->tasks, task);
    if (!session->runs && session->tasks.first == task) {
        queue->look_ns = LOOK_NS_MIN;
        start_first(queue, session);
    }
    return KVP_OK;
}

uint64_t kvp_exec_queue_pump(struct kvp_exec_queue *queue)
{
    unsigned before = queue->waiting;

    if (before == 0)
        return UINT64_MAX;
    for (unsigned i = 0; i < 1u << SESSIONS_BITS; i++)
        for (struct session *s = queue->sessions[i]; s != NULL; s = s->next)
            if (s->waits)
                start_first(queue, s);
    if (queue->waiting == 0)
        return UINT64_MAX;
    if (queue->waiting == before && queue->look_ns < LOOK_NS_MAX)
        queue->look_ns += queue->look_ns / 4;
    return queue->look_ns;
}

/* Its task has ended: the next one's turn, or the session's end. */
static void task_ended(struct kvp_exec_queue *queue, struct kvp_exec_task *task)
{
    struct session **at = session_at(queue, task->session), *session = *at;

    session->runs = false;
    if (session->tasks.first != NULL) {
        queue->look_ns = LOOK_NS_MIN;
        start_first(queue, session);
        return;
    }
    *at = session->next;
    free(session);
}

struct kvp_exec_task *kvp_exec_queue_take_done(struct kvp_exec_queue *queue)
{
    struct kvp_exec_task *tasks;
    uint64_t count;

    if (read(queue->done_fd, &count, sizeof(count)) < 0) /* before the list: what comes later sets it again */
        count = 0;
    pthread_mutex_lock(&queue->lock);
    tasks = queue->done.first;
    list_init(&queue->done);
    pthread_mutex_unlock(&queue->lock);
    for (struct kvp_exec_task *t = tasks; t != NULL; t = t->next)
        if (!t->cancelled)
            task_ended(queue, t);
    return tasks;
}

/* Take the pool's tasks out of one session's queue. */
static void cancel_in(struct kvp_exec_queue *queue, struct session *session, uint64_t pool)
{
    struct list kept;
    struct kvp_exec_task *task;

    list_init(&kept);
    while ((task = list_take(&session->tasks)) != NULL) {
        if (task->pool != pool) {
            list_add(&kept, task);
            continue;
        }
        task->cancelled = true;
        task->status = kvp_exec_fail(&task->error, KVP_ELOST, "the pool was dropped before the work began");
        tell_done(queue, task);
    }
    session->tasks = kept;
    if (kept.first == NULL)
        session->tasks.end = &session->tasks.first;
}

void kvp_exec_queue_cancel(struct kvp_exec_queue *queue, uint64_t pool)
{
    for (unsigned i = 0; i < 1u << SESSIONS_BITS; i++) {
        struct session **at = &queue->sessions[i];

        while (*at != NULL) {
            struct session *session = *at;

            cancel_in(queue, session, pool);
            queue->waiting -= session->waits;
            session->waits = false;
            if (session->tasks.first == NULL && !session->runs) {
                *at = session->next;
                free(session);
                continue;
            }
            if (!session->runs)
                start_first(queue, session);
            at = &session->next;
        }
    }
}

/* ---- its life ---------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_exec_queue_create(const struct kvp_exec_backend *backend, struct kvp_exec_queue **ret_queue)
{
    struct kvp_exec_queue *queue = calloc(1, sizeof(*queue));

    if (queue == NULL)
        return KVP_ENOMEM;
    queue->backend = backend;
    queue->look_ns = LOOK_NS_MIN;
    list_init(&queue->ready);
    list_init(&queue->done);
    queue->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (queue->done_fd < 0)
        goto free_queue;
    if (pthread_mutex_init(&queue->lock, NULL) != 0)
        goto close_fd;
    if (pthread_cond_init(&queue->wake, NULL) != 0)
        goto destroy_lock;
    *ret_queue = queue;
    return KVP_OK;

destroy_lock:
    pthread_mutex_destroy(&queue->lock);
close_fd:
    close(queue->done_fd);
free_queue:
    free(queue);
    return KVP_ENOMEM;
}

int kvp_exec_queue_fd(const struct kvp_exec_queue *queue)
{
    return queue->done_fd;
}

struct kvp_exec_task *kvp_exec_queue_destroy(struct kvp_exec_queue *queue)
{
    struct list left;
    struct kvp_exec_task *task;

    pthread_mutex_lock(&queue->lock);
    queue->stop = true;
    pthread_cond_broadcast(&queue->wake);
    pthread_mutex_unlock(&queue->lock);
    for (unsigned i = 0; i < queue->n_threads; i++)
        pthread_join(queue->threads[i], NULL);
    list_init(&left);
    while ((task = list_take(&queue->done)) != NULL || (task = list_take(&queue->ready)) != NULL)
        list_add(&left, task);
    for (unsigned i = 0; i < 1u << SESSIONS_BITS; i++)
        while (queue->sessions[i] != NULL) {
            struct session *session = queue->sessions[i];

            while ((task = list_take(&session->tasks)) != NULL)
                list_add(&left, task);
            queue->sessions[i] = session->next;
            free(session);
        }
    pthread_cond_destroy(&queue->wake);
    pthread_mutex_destroy(&queue->lock);
    close(queue->done_fd);
    task = left.first;
    free(queue);
    return task;
}
