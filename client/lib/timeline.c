/**
 * Timelines: 64-bit counters in memory that all sessions of a pool share, by which GPU work and processes wait for
 * each other.
 *
 * A value only rises. The host side loads it with acquire and stores it with release; streams write and wait by stream
 * memory operations of the driver on the same word (cuda.c). When a timeline's owner is proven dead, the daemon moves
 * the value past those that are still awaited, and says of them that they were not reached: so a wait ends, with why.
 *
 * A thread's wait looks often at first, then sleeps a little longer each time: the writer may be a GPU, which wakes
 * nobody.
 */
#include "cuda.h"
#include "internal.h"

#include <time.h>

#define SPINS        2000
#define SLEEP_NS_MIN 20000ull
#define SLEEP_NS_MAX 1000000ull

static enum kvp_status find(const struct kvp_pool *pool, uint32_t timeline, struct kvp_timeline **ret_line)
{
    enum kvp_status status = kvp_pool_usable(pool);

    if (status != KVP_OK)
        return status;
    if (timeline >= KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX)
        return kvp_fail(KVP_EINVAL, "timeline %u is none; a pool has %u", timeline,
                        KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX);
    *ret_line = &pool->lines[timeline];
    return KVP_OK;
}

static uint64_t device_word(const struct kvp_pool *pool, uint32_t timeline)
{
    return kvp_cuda_address(pool->cuda, KVP_CUDA_TIMELINES) + timeline * sizeof(struct kvp_timeline) +
           offsetof(struct kvp_timeline, value);
}

enum kvp_status kvp_timeline_id(const struct kvp_pool *pool, uint32_t k, uint32_t *ret_timeline)
{
    if (k == 0 || k >= KVP_TIMELINES_MAX)
        return kvp_fail(KVP_EINVAL, "timeline %u of a session is none of 1..%u", k, KVP_TIMELINES_MAX - 1);
    *ret_timeline = pool->attachment * KVP_TIMELINES_MAX + k;
    return KVP_OK;
}

enum kvp_status kvp_timeline_address(const struct kvp_pool *pool, uint32_t timeline, uint64_t **ret_host,
                                     uint64_t *ret_device)
{
    struct kvp_timeline *line = NULL;
    enum kvp_status status = find(pool, timeline, &line);

    if (status != KVP_OK)
        return status;
    *ret_host = &line->value;
    if (ret_device != NULL)
        *ret_device = pool->cuda != NULL ? device_word(pool, timeline) : 0;
    return KVP_OK;
}

enum kvp_status kvp_timeline_value(const struct kvp_pool *pool, uint32_t timeline, uint64_t *ret_value)
{
    struct kvp_timeline *line = NULL;
    enum kvp_status status = find(pool, timeline, &line);

    if (status == KVP_OK)
        *ret_value = __atomic_load_n(&line->value, __ATOMIC_ACQUIRE);
    return status;
}

/* Tells the core that this is a spin, where there is such an instruction. */
static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool reached(const struct kvp_timeline *line, uint64_t value)
{
    return __atomic_load_n(&line->value, __ATOMIC_ACQUIRE) >= value;
}

static enum kvp_status outcome(const struct kvp_timeline *line, uint64_t value)
{
    uint64_t error = kvp_timeline_lost(line, value);

    if (error == 0)
        return KVP_OK;
    return kvp_fail((enum kvp_status) - (int)error, "the timeline's work was ended before it was done: %s",
                    kvp_status_text((enum kvp_status) - (int)error));
}

enum kvp_status kvp_timeline_wait(const struct kvp_pool *pool, struct kvp_point point, uint32_t timeout_ms)
{
    uint64_t sleep_ns = SLEEP_NS_MIN, deadline_ns;
    struct kvp_timeline *line = NULL;
    enum kvp_status status;

    if (point.value == 0)
        return KVP_OK;
    status = find(pool, point.timeline, &line);
    if (status != KVP_OK)
        return status;
    if (timeout_ms > 0)
        for (int i = 0; i < SPINS && !reached(line, point.value); i++)
            relax();
    deadline_ns = kvp_now_ns() + timeout_ms * 1000000ull;
    while (!reached(line, point.value)) {
        struct timespec nap = {0, (long)sleep_ns};

        status = kvp_pool_usable(pool);
        if (status != KVP_OK)
            return status;
        if (kvp_now_ns() >= deadline_ns)
            return kvp_fail(KVP_ETIMEDOUT, "timeline %u has not reached %llu in %u ms", point.timeline,
                            (unsigned long long)point.value, timeout_ms);
        nanosleep(&nap, NULL);
        sleep_ns = sleep_ns * 2 < SLEEP_NS_MAX ? sleep_ns * 2 : SLEEP_NS_MAX;
    }
    return outcome(line, point.value);
}

enum kvp_status kvp_timeline_wait_on(const struct kvp_pool *pool, struct kvp_point point, void *stream)
{
    struct kvp_timeline *line = NULL;
    enum kvp_status status = find(pool, point.timeline, &line);

    if (status != KVP_OK || point.value == 0)
        return status;
    if (pool->cuda != NULL)
        return kvp_cuda_wait_value(pool->cuda, device_word(pool, point.timeline), point.value, stream);
    do {
        status = kvp_timeline_wait(pool, point, 1000);
    } while (status == KVP_ETIMEDOUT);
    return status;
}

enum kvp_status kvp_timeline_signal(const struct kvp_pool *pool, struct kvp_point point, void *stream)
{
    struct kvp_timeline *line = NULL;
    enum kvp_status status = find(pool, point.timeline, &line);

    if (status != KVP_OK)
        return status;
    if (point.timeline / KVP_TIMELINES_MAX != pool->attachment || point.timeline % KVP_TIMELINES_MAX == 0)
        return kvp_fail(KVP_EPERM, "timeline %u is not this session's to signal", point.timeline);
    if (pool->cuda != NULL)
        return kvp_cuda_write_value(pool->cuda, device_word(pool, point.timeline), point.value, stream);
    if (reached(line, point.value))
        return KVP_OK;
    __atomic_store_n(&line->value, point.value, __ATOMIC_RELEASE);
    return KVP_OK;
}
