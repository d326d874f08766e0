/* The host's part of work.h. */
#include "work.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct {
    volatile uint64_t *at;
    uint64_t words;
    double until_s;
} scribbled;

static double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void *host_alloc(uint64_t bytes)
{
    return calloc(1, bytes);
}

static void *host_stream(void)
{
    return NULL;
}

static bool host_fill(void *at, uint64_t bytes, uint64_t salt)
{
    uint64_t *words = at;

    for (uint64_t i = 0; i < bytes / 8; i++)
        words[i] = KVP_WORK_MIX(salt + i);
    return true;
}

static bool host_sum(const void *base, uint64_t stride, uint64_t bytes, const int32_t *pages, uint32_t n,
                     uint64_t *ret_sum)
{
    uint64_t sum = 0;

    for (uint32_t p = 0; p < n; p++) {
        const uint64_t *words = (const void *)((const unsigned char *)base + (uint64_t)pages[p] * stride);

        for (uint64_t i = 0; i < bytes / 8; i++)
            sum += KVP_WORK_MIX(words[i] + p * bytes + i);
    }
    *ret_sum = sum;
    return true;
}

static void *scribble_on(void *arg)
{
    for (uint64_t value = 1; now_s() < scribbled.until_s; value++)
        for (uint64_t i = 0; i < scribbled.words; i++)
            __atomic_store_n(&scribbled.at[i], value, __ATOMIC_RELAXED);
    return arg;
}

static bool host_scribble(void *at, uint64_t bytes, double seconds)
{
    pthread_t thread;
    uint64_t before = __atomic_load_n((uint64_t *)at, __ATOMIC_RELAXED);

    scribbled.at = at;
    scribbled.words = bytes / 8;
    scribbled.until_s = now_s() + seconds;
    if (pthread_create(&thread, NULL, scribble_on, NULL) != 0)
        return false;
    pthread_detach(thread);
    while (__atomic_load_n((uint64_t *)at, __ATOMIC_RELAXED) == before)
        continue;
    return true;
}

static bool host_read(void *ret_host, const void *at, uint64_t bytes)
{
    memcpy(ret_host, at, bytes);
    return true;
}

static bool host_sync(void)
{
    return true;
}

static const char *host_error(void)
{
    return "no thread or memory";
}

const struct work work_host = {.alloc = host_alloc,
                               .stream = host_stream,
                               .fill = host_fill,
                               .sum = host_sum,
                               .scribble = host_scribble,
                               .read = host_read,
                               .sync = host_sync,
                               .error = host_error};
