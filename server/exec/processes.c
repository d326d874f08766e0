/**
 * Which processes the device still serves. The question goes to a thread of its own, since the driver may hang; an
 * answer that is not there within ANSWER_MS is "not known", and so is every further one until the thread is back.
 *
 *     IDLE ── ask ──► ASKED ── thread ──► ANSWERED ── turn ──► IDLE
 *                       └── ANSWER_MS over: the askers get "not known"; the thread stays with the driver
 *
 * All functions are called on the main thread.
 */
#include "exec.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define ANSWER_MS  2000
#define PIDS_MAX   4096
#define ASKERS_MAX 64

enum state { IDLE, ASKED, ANSWERED };

struct kvp_exec_processes {
    const struct kvp_exec_backend *backend;
    int fd;
    bool started;
    pthread_t thread;
    uint64_t asked_ms;
    uint64_t askers[ASKERS_MAX]; /* tags */
    unsigned n_askers;
    /* shared with the thread, under the lock */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    enum state state;
    bool stop;
    struct kvp_exec_device_info info;
    enum kvp_status status;
    uint32_t pids[PIDS_MAX];
    unsigned n;
};

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void *answer(void *arg)
{
    struct kvp_exec_processes *p = arg;
    uint64_t one = 1;

    pthread_mutex_lock(&p->lock);
    for (;;) {
        struct kvp_exec_device_info info;
        enum kvp_status status;
        unsigned n = 0;

        while (p->state != ASKED && !p->stop)
            pthread_cond_wait(&p->wake, &p->lock);
        if (p->stop)
            break;
        info = p->info;
        pthread_mutex_unlock(&p->lock);
        status = p->backend->processes(&info, p->pids, PIDS_MAX, &n); /* pids are the thread's while it is ASKED */
        pthread_mutex_lock(&p->lock);
        p->status = status;
        p->n = n;
        p->state = ANSWERED;
        while (write(p->fd, &one, sizeof(one)) < 0) /* EINTR alone: the counter can not be full */
            ;
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

enum kvp_status kvp_exec_processes_create(const struct kvp_exec_backend *backend, struct kvp_exec_processes **ret)
{
    struct kvp_exec_processes *p = calloc(1, sizeof(*p));

    if (p == NULL)
        return KVP_ENOMEM;
    p->backend = backend;
    p->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->fd < 0)
        goto free_processes;
    if (pthread_mutex_init(&p->lock, NULL) != 0)
        goto close_fd;
    if (pthread_cond_init(&p->wake, NULL) != 0)
        goto destroy_lock;
    *ret = p;
    return KVP_OK;

destroy_lock:
    pthread_mutex_destroy(&p->lock);
close_fd:
    close(p->fd);
free_processes:
    free(p);
    return KVP_ENOMEM;
}

int kvp_exec_processes_fd(const struct kvp_exec_processes *processes)
{
    return processes->fd;
}

static void tell(struct kvp_exec *exec, bool known, size_t n)
{
    struct kvp_exec_processes *p = exec->processes;
    Kvpool__V1__ExecProcessesReply reply = KVPOOL__V1__EXEC_PROCESSES_REPLY__INIT;

    reply.known = known;
    reply.pids = known ? p->pids : NULL;
    reply.n_pids = known ? n : 0;
    for (unsigned i = 0; i < p->n_askers; i++)
        kvp_exec_reply(exec, KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, p->askers[i], &reply.base, -1);
    p->n_askers = 0;
}

void kvp_exec_processes_ask(struct kvp_exec *exec, struct kvp_exec_request *request)
{
    struct kvp_exec_processes *p = exec->processes;

    if (!p->started && pthread_create(&p->thread, NULL, answer, p) != 0) {
        kvp_exec_refuse(exec, request->method, request->tag, KVP_ENOMEM, "no thread to ask the driver with");
        return;
    }
    p->started = true;
    if (p->n_askers == ASKERS_MAX) {
        kvp_exec_refuse(exec, request->method, request->tag, KVP_ELIMIT, "64 questions are open");
        return;
    }
    p->askers[p->n_askers++] = request->tag;
    pthread_mutex_lock(&p->lock);
    if (p->state == IDLE) {
        p->info = exec->info;
        p->state = ASKED;
        p->asked_ms = now_ms();
        pthread_cond_signal(&p->wake);
    }
    pthread_mutex_unlock(&p->lock);
}

int kvp_exec_processes_turn(struct kvp_exec *exec)
{
    struct kvp_exec_processes *p = exec->processes;
    enum state state;
    uint64_t count, waited;

    if (!p->started)
        return -1;
    if (read(p->fd, &count, sizeof(count)) < 0) /* before the state: what comes later sets it again */
        count = 0;
    pthread_mutex_lock(&p->lock);
    state = p->state;
    if (state == ANSWERED)
        p->state = IDLE; /* the thread touches the answer no more until it is asked again */
    pthread_mutex_unlock(&p->lock);
    if (state == ANSWERED) {
        tell(exec, p->status == KVP_OK, p->n);
        return -1;
    }
    if (p->n_askers == 0)
        return -1;
    waited = now_ms() - p->asked_ms;
    if (waited < ANSWER_MS)
        return (int)(ANSWER_MS - waited);
    tell(exec, false, 0);
    return -1;
}

void kvp_exec_processes_destroy(struct kvp_exec_processes *p)
{
    bool away;

    pthread_mutex_lock(&p->lock);
    away = p->state == ASKED;
    p->stop = true;
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
    if (away) { /* it may never come back, and it uses what would be freed */
        pthread_detach(p->thread);
        return;
    }
    if (p->started)
        pthread_join(p->thread, NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    close(p->fd);
    free(p);
}
