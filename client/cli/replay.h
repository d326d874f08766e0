/**
 * What the files of `kvpool replay` share.
 *
 *   replay.c           the command: what to replay, and the report
 *   replay_daemon.c    a run against a daemon, by libkvpool
 *   replay_embedded.c  a run on a core and a ledger in this process
 *   replay_bound.c     what no policy can exceed, computed
 *   replay_plot.c      hit rate over capacity, drawn by gnuplot
 *
 * A run opens a sequence for each request in turn, with its blocks' keys, so that what is cached is taken along; gives
 * it room for the rest, names what that holds, says it is written; and closes it. A block of the trace is a page.
 */
#ifndef KVPOOL_REPLAY_H
#define KVPOOL_REPLAY_H

#include "trace.h"

#include "kvp_limits.h"
#include "kvp_status.h"

enum replay_policy { REPLAY_ADAPTIVE, REPLAY_LRU };

#define REPLAY_KEY_BYTES  8 /* an id, as it is in memory */
#define REPLAY_TEXT_BYTES 256

struct replay {
    const struct trace *trace;
    uint32_t pages; /* of the pool */
    enum replay_policy policy;
    uint32_t longest; /* blocks of the longest request */
    /* Now and then, with the requests that were served. @return false: it is to end, with KVP_ETIMEDOUT */
    bool (*progress)(const struct replay *replay, size_t n_requests);
};

/* Of each request. */
struct replay_times {
    uint32_t *hits;    /* [trace->n] leading blocks that were cached */
    uint32_t *open_ns; /* [trace->n] how long OpenSequences took */
};

struct replay_result {
    struct replay_times times; /* the arrays are the caller's */
    uint64_t evictions;
    double seconds; /* from the first call to the last */
};

#define REPLAY_PROGRESS_EVERY 256

/* What was refused, for the user. */
struct replay_error {
    const char *what;
    char text[REPLAY_TEXT_BYTES];
};

enum kvp_status replay_embedded(const struct replay *replay, struct replay_result *result,
                                struct replay_error *reterr_why);

struct kvp_client;
enum kvp_status replay_daemon(const struct replay *replay, struct kvp_client *client, struct replay_result *result,
                              struct replay_error *reterr_why);

/* ---- replay_bound.c ---------------------------------------------------------------------------------------------- */

/* A trace whose ids are numbered 0, 1, … as they come up. */
struct replay_numbers {
    uint32_t *blocks; /* [trace->n_blocks] in the order in which requests are served */
    size_t *first;    /* [trace->n + 1] where each request's begin */
    uint32_t n_unique;
};
/**
 * Number a trace's blocks.
 * @return false: it is no trace of prefixes (an id stands twice in a request, or behind two different blocks), or there is
 *         no memory; said on stderr
 */
bool replay_number(const struct trace *trace, const char *path, struct replay_numbers *ret_numbers);
void replay_numbers_free(struct replay_numbers *numbers);

/**
 * The most blocks that a policy can hit which knows the future, and keeps what a request inserts while it is served.
 * @return false: no memory
 */
bool replay_bound(const struct trace *trace, const struct replay_numbers *numbers, uint32_t pages, uint64_t *ret_hits);

/* ---- replay_plot.c ----------------------------------------------------------------------------------------------- */

#define REPLAY_PLOT_POINTS 10

/* Rates of one capacity. */
struct replay_point {
    uint32_t pages;
    double lru, adaptive, bound;
};

/** Can FILE be drawn: is it .png or .svg, can it be written, and is there a gnuplot? @return false: said on stderr */
bool replay_plot_check(const char *file);
/** @return false: gnuplot failed; said on stderr */
bool replay_plot(const char *file, const char *title, double infinite, const struct replay_point *points, unsigned n);

#endif
