/**
 * Threads for the length of one call: see parallel.h.
 *
 * The counter `next` hands out ranges of `step` units, about eight for each thread, so that one that is held up
 * (another process on its CPU) leaves its share to the others. The caller's thread works like the rest.
 */
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#define RANGES_PER_THREAD 8

struct call {
    kvp_host_work work;
    void *context;
    uint64_t units;
    uint64_t step;
    _Atomic uint64_t next;
};

static void *take_part(void *argument)
{
    struct call *call = argument;
    for (;;) {
        uint64_t first = atomic_fetch_add_explicit(&call->next, call->step, memory_order_relaxed);
        if (first >= call->units)
            return NULL;
        uint64_t left = call->units - first;
        call->work(call->context, first, first + (left < call->step ? left : call->step));
    }
}

static uint64_t cpus_to_run_on(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    /* a machine with more CPUs than the set holds makes this fail: it has more than we use */
    return sched_getaffinity(0, sizeof set, &set) == 0 ? (uint64_t)CPU_COUNT(&set) : KVP_HOST_THREADS_MAX;
}

static uint64_t threads_for(int threads, uint64_t bytes)
{
    uint64_t wanted = (uint64_t)threads;
    if (threads <= 0) {
        uint64_t worth = bytes / (KVP_HOST_SPLIT_BYTES / 2);
        uint64_t cpus = worth >= 2 ? cpus_to_run_on() : 1;
        wanted = worth < cpus ? worth : cpus;
    }
    return wanted < KVP_HOST_THREADS_MAX ? wanted : KVP_HOST_THREADS_MAX;
}

void kvp_host_parallel(int threads, uint64_t units, uint64_t grain, uint64_t bytes, kvp_host_work work, void *context)
{
    if (units == 0)
        return;
    uint64_t wanted = threads_for(threads, bytes);
    if (wanted <= 1 || units <= grain) {
        work(context, 0, units);
        return;
    }
    uint64_t step = units / (wanted * RANGES_PER_THREAD) / grain * grain;
    struct call call = {.work = work, .context = context, .units = units, .step = step > grain ? step : grain};
    atomic_init(&call.next, 0);

    pthread_t helpers[KVP_HOST_THREADS_MAX];
    uint64_t started = 0;
    sigset_t all, before;
    sigfillset(&all);
    int masked = pthread_sigmask(SIG_SETMASK, &all, &before) == 0;
    while (started + 1 < wanted && pthread_create(&helpers[started], NULL, take_part, &call) == 0)
        started++;
    if (masked)
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    take_part(&call);
    for (uint64_t i = 0; i < started; i++)
        (void)pthread_join(helpers[i], NULL);
}
