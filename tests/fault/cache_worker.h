/**
 * A worker for the prefix cache's fault test: it asks for prompts at random, from a seed, and checks every hit's bytes.
 *
 * Prompts are paths in a small tree, so that they share prefixes. The bytes of a token's K and V follow from all tokens
 * up to it and from the user, as a model's would: a page that is found for a prefix must hold exactly those, whoever
 * wrote it and whatever was killed meanwhile. Every row of bytes begins with its user's tag, by which a page that comes
 * from another user and was not zeroed is known.
 */
#ifndef CACHE_WORKER_H
#define CACHE_WORKER_H

#include "kvpool.h"

#include <stdatomic.h>

#define CACHE_POOL   "cache"
#define CACHE_PAGES  160u
#define CACHE_TOKENS 16u /* a page */
#define CACHE_PLANES 4u  /* two layers of K and V */
#define CACHE_HEADS  2u
#define CACHE_DIM    16u

struct cache_shared {
    atomic_int go, stop;
    atomic_ullong opens, hits, hit_tokens, written_tokens, corrupt_bytes, foreign_rows, failed;
};

struct cache_job {
    struct cache_shared *shared;
    const char *endpoint;
    uint64_t seed;
    unsigned uid;     /* to become; 0: who it is */
    unsigned lookups; /* end after so many prompts, which are only read; 0: work until told to stop */
};

/** Make the pool; exits with a text on failure. */
void cache_make_pool(struct kvp_client *client);

/** The worker's whole life. @return its exit code: 0; 1 for what should not have happened, told on stderr */
int cache_worker(const struct cache_job *job);

/* splitmix64 */
uint64_t cache_random(uint64_t *state);

#endif
