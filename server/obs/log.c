/**
 * The log; see log.h.
 *
 * Two token buckets, one for errors and warnings and one for the rest, so that chatter can not hide a fault. What they
 * refuse is counted, and the count is written with the next line that gets through. Bytes that are no text (a client's
 * name may hold anything) are written as '?', so that nobody can forge a line.
 */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct bucket {
    uint64_t tokens_milli; /* lines that may be written now, in thousandths */
    uint64_t filled_ms;    /* when that was counted */
    uint64_t dropped;      /* lines refused since one got through */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int threshold = LOG_INFO;
static bool for_journal;
static struct bucket buckets[2] = {{.tokens_milli = KVP_LOG_BURST * 1000}, {.tokens_milli = KVP_LOG_BURST * 1000}};

/* Is stderr what systemd connected to the journal? The variable alone is inherited by every shell of a session. */
static bool is_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat st;

    return stream != NULL && sscanf(stream, "%llu:%llu", &device, &inode) == 2 && fstat(STDERR_FILENO, &st) == 0 &&
           st.st_dev == device && st.st_ino == inode;
}

void kvp_log_open_standard_files(void)
{
    int fd;

    do {
        fd = open("/dev/null", O_RDWR);
    } while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

void kvp_log_start(int level)
{
    pthread_mutex_lock(&lock);
    threshold = level;
    for_journal = is_journal();
    pthread_mutex_unlock(&lock);
}

static bool bucket_take(struct bucket *bucket)
{
    struct timespec now;
    uint64_t now_ms;

    clock_gettime(CLOCK_MONOTONIC, &now);
    now_ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    bucket->tokens_milli += (now_ms - bucket->filled_ms) * KVP_LOG_RATE;
    if (bucket->tokens_milli > KVP_LOG_BURST * 1000 || bucket->filled_ms == 0)
        bucket->tokens_milli = KVP_LOG_BURST * 1000;
    bucket->filled_ms = now_ms;
    if (bucket->tokens_milli < 1000) {
        bucket->dropped++;
        return false;
    }
    bucket->tokens_milli -= 1000;
    return true;
}

/* @return false: stderr would have to be waited for */
static bool write_line(int level, const char *text)
{
    struct pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT};
    char line[KVP_LOG_LINE_MAX + 64];
    int n;

    if (for_journal) {
        n = snprintf(line, sizeof(line), "<%d>%s\n", level, text);
    } else {
        static const char *const names[] = {"emergency", "alert", "critical", "error", "warning", "notice", "info", "debug"};
        struct timespec now;
        char stamp[32];
        struct tm tm;

        clock_gettime(CLOCK_REALTIME, &now);
        gmtime_r(&now.tv_sec, &tm);
        strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &tm);
        n = snprintf(line, sizeof(line), "%s.%03ldZ %s: %s\n", stamp, now.tv_nsec / 1000000, names[level & 7], text);
    }
    if (poll(&out, 1, 0) != 1 || (out.revents & POLLOUT) == 0)
        return false;
    while (write(STDERR_FILENO, line, (size_t)n) < 0)
        if (errno != EINTR)
            return false;
    return true;
}

void kvp_log(int level, const char *format, ...)
{
    struct bucket *bucket = &buckets[level > LOG_WARNING];
    char text[KVP_LOG_LINE_MAX];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    for (char *c = text; *c != 0; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';

    pthread_mutex_lock(&lock);
    if (level <= threshold && bucket_take(bucket)) {
        if (bucket->dropped > 0) {
            char note[64];

            snprintf(note, sizeof(note), "%llu lines were left out here", (unsigned long long)bucket->dropped);
            if (write_line(level, note))
                bucket->dropped = 0;
        }
        if (!write_line(level, text))
            bucket->dropped++;
    }
    pthread_mutex_unlock(&lock);
}
