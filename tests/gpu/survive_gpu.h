/**
 * The parts of survive_gpu: what its parent process and its workers share, and the workers' roles.
 *
 * The parent never touches CUDA; each worker is this program again, in a role (--role), with a memory object that all of
 * them map. What a worker finds wrong it says in its slot; the parent looks there.
 */
#ifndef SURVIVE_GPU_H
#define SURVIVE_GPU_H

#include "kvpool.h"
#include "work.h"

#include <stdatomic.h>

#define SLOTS     8
#define SEQS_MAX  16
#define TEXT_MAX  256
#define WAIT_MS   60000 /* for what must happen */
#define LIVE_KEY  1000  /* of the sequence that a computing worker decodes into */
#define LIVE_MOST 4096  /* its tokens */

/* The pools: "big" of the whole plan, "small" of the same pages. */
struct plan {
    bool cuda;
    uint32_t layers, heads, dim, page_tokens;
    uint32_t big_pages, small_pages;
    uint32_t fill_seqs;   /* of a computing worker … */
    uint32_t fill_tokens; /* … and of each of them; full pages */
    uint32_t step_tokens; /* appended at once */
    uint32_t request_tokens;
};

enum command { COMMAND_NONE, COMMAND_DIE_BUSY, COMMAND_STOP };

struct slot {
    atomic_uint ready, finished, failed;
    atomic_uint command; /* enum command, to the worker */
    char text[TEXT_MAX]; /* why it failed */
    atomic_ullong iterations, tokens, wrong;
    atomic_uint in_call; /* an append on request is under way */
    atomic_int page;     /* that is scribbled on, + 1 */
    atomic_int child;    /* pid of a forked child */
    atomic_ullong changed_ns, looked_ns;
    uint8_t secret[64];
    uint32_t secret_bytes;
    uint64_t sums[SEQS_MAX];
};

struct shared {
    struct plan plan;
    struct slot slots[SLOTS];
};

/* ---- survive_workers.c ------------------------------------------------------------------------------------------- */

/** Become the worker of a role in a slot. @return exit status */
int survive_worker(const char *role, struct shared *shared, unsigned index, const char *endpoint);

struct kvp_pool_spec survive_spec(const struct plan *plan, bool big, struct kvp_plane_spec *planes);
uint64_t now_ns(void);

#endif
