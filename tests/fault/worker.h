/**
 * A worker for the fault tests: a process that works on a pool at random, from a seed, and checks every byte.
 *
 * It opens, advances, appends (its own kernels, and on request), forks, truncates, transfers to its neighbour, verifies
 * and closes sequences, with a model of each of its own: the stamp of every token, from which the token's bytes in every
 * plane follow. What it may assume is exactly what was acknowledged. It writes a line to its log before each call and
 * after it, so that a judge can say afterwards what the daemon must hold.
 *
 * Workers and parent share one mapping (struct fault_shared): counters, mailboxes for transfers, and the word to stop.
 */
#ifndef FAULT_WORKER_H
#define FAULT_WORKER_H

#include "kvpool.h"

#include <stdatomic.h>

#define FAULT_WORKERS    8
#define FAULT_PAGES      8192u
#define FAULT_TOKENS     16u /* a page */
#define FAULT_LAYERS     2u
#define FAULT_PLANES     (2 * FAULT_LAYERS)
#define FAULT_HEADS      2u
#define FAULT_DIM        16u
#define FAULT_ROW_BYTES  (FAULT_HEADS * FAULT_DIM * 2u) /* of one token in one plane, fp16 */
#define FAULT_LENGTH_MAX 400u                           /* tokens of a sequence */
#define FAULT_OWN_MAX    12u                            /* sequences of a worker */
#define FAULT_POOL       "fault"

/* A sequence on its way from one worker to the next: full when `full` is 1. */
struct fault_mail {
    atomic_int full;
    uint64_t key;
    uint32_t written, reserved;
    uint64_t stamps[FAULT_LENGTH_MAX];
};

struct fault_stats {
    atomic_ullong calls, failed, corrupt_bytes, tokens, verified_tokens;
    atomic_ullong session_id;
    atomic_int ready, finished;
};

struct fault_shared {
    atomic_int go;   /* the pool is made */
    atomic_int stop; /* 1: finish, 2: end */
    struct fault_stats workers[FAULT_WORKERS];
    struct fault_mail mail[FAULT_WORKERS]; /* [i]: to worker i */
};

struct fault_job {
    struct fault_shared *shared;
    const char *endpoint;
    const char *log_path; /* NULL: no log */
    unsigned index;
    uint64_t seed;
    bool transfers;   /* the neighbours live as long as this one */
    bool keep_at_end; /* leave the sequences open for the judge, and exit when stop is 2 */
};

/** Make the pool; exits with a text on failure. */
void fault_make_pool(struct kvp_client *client);

/** The worker's whole life. @return its exit code: 0; 1 for what should not have happened, told on stderr */
int fault_worker(const struct fault_job *job);

/* splitmix64: the tests' one generator. */
uint64_t fault_random(uint64_t *state);

#endif
