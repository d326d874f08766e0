/**
 * What the files of `kvpool demo` share.
 *
 *   kvpool demo (demo.c)                     makes the pool and the board, starts the workers, watches, judges
 *      │ board: one memfd, all counters           │ exec, PR_SET_PDEATHSIG
 *      ▼                                          ▼
 *   kvpool demo-worker 0 (demo_worker.c) ◄── socket pair ──► kvpool demo-worker 1
 *      prefill, decode of its own requests      "check this"     forks the other's sequence, reads its pages in place
 *      (demo_trace.c: which, how long)          "so many bad"    (demo_check.c, against demo_bytes.c)
 *
 * Three processes, each with a session of its own; none has a thread beside its first. What a worker has to say stands
 * on the board, so that it is there when the worker is killed.
 */
#ifndef KVPOOL_DEMO_H
#define KVPOOL_DEMO_H

#include "kvpool.h"

#include <stdatomic.h>

#define DEMO_WORKERS     2
#define DEMO_PAGE_TOKENS 16
#define DEMO_LAYERS_MAX  32
#define DEMO_KV_HEADS    8
#define DEMO_HEAD_DIM    128
#define DEMO_ROW_BYTES   (DEMO_KV_HEADS * DEMO_HEAD_DIM * 2) /* fp16: one token in one plane */
#define DEMO_ACTIVE_MAX  16                                  /* requests that a worker has in hand */
#define DEMO_SAMPLES_MAX (1u << 16)                          /* times of Advance that a worker keeps */

/* ---- the board --------------------------------------------------------------------------------------------------- */

enum demo_fault { DEMO_FAULT_NONE = 0, DEMO_FAULT_INJECT = 1 };

struct demo_worker_board {
    _Atomic uint32_t ready;    /* it has attached and read the trace */
    _Atomic uint32_t finished; /* it has no more to do */
    _Atomic uint64_t requests, tokens, bytes;
    _Atomic uint64_t checked_pages, corrupt_bytes;
    _Atomic uint64_t hit_tokens; /* of prompts, found in the cache */
    _Atomic uint64_t samples;
    _Atomic uint32_t advance_ns[DEMO_SAMPLES_MAX]; /* round trips of Advance */
};

struct demo_board {
    _Atomic uint32_t go;   /* start */
    _Atomic uint32_t stop; /* take no more requests, end those in hand */
    uint32_t inject_fault;
    uint32_t quota_pages; /* of each worker */
    uint32_t layers;
    char pool[KVP_NAME_BYTES_MAX + 1];
    struct demo_worker_board workers[DEMO_WORKERS];
};

/* ---- demo_trace.c ------------------------------------------------------------------------------------------------ */

/* One request, in the Mooncake format: hash_ids[i] stands for the i-th block of the prompt and all before it. */
struct demo_request {
    uint32_t input_length, output_length; /* tokens */
    uint32_t n_blocks;
    const uint64_t *blocks; /* [n_blocks] */
    uint32_t worker;        /* who serves it */
};
struct demo_trace {
    struct demo_request *requests;
    size_t n;
    uint32_t block_tokens;
    uint32_t longest; /* tokens of the longest request, input and output */
    void *memory;     /* of the blocks */
};

/** Read a trace. @return false: what is wrong, with the line, is said on stderr */
bool demo_trace_read(const char *path, struct demo_trace *ret_trace);
/** The built-in workload: conversations of growing turns over a few shared system prompts. @return false: no memory */
bool demo_trace_chat(struct demo_trace *ret_trace);
void demo_trace_free(struct demo_trace *trace);

/** The key of a token's content: of the block that it is in, or of the request's own output. */
uint64_t demo_content_key(const struct demo_trace *trace, size_t request, uint32_t position);

/* ---- demo_bytes.c ------------------------------------------------------------------------------------------------ */

/** The bytes of a token in a plane, DEMO_ROW_BYTES of them, from what they belong to. */
void demo_fill(void *row, uint64_t key, uint32_t plane, uint32_t position);
/** How many bytes of it are not what they should be. */
uint64_t demo_count_bad(const void *row, uint64_t key, uint32_t plane, uint32_t position);

/* ---- demo_check.c ------------------------------------------------------------------------------------------------ */

struct demo_checker;

/** What reading needs: on host pools nothing but the mapping, on CUDA pools memory to read pages into. */
enum kvp_status demo_checker_create(struct kvp_pool *pool, struct kvp_step *step, struct demo_checker **ret_checker);
void demo_checker_destroy(struct demo_checker *checker);

/**
 * Check tokens [from, to) of a sequence of another session: fork it, so that its pages are held, read them in place,
 * compare every byte of every plane, and close the fork.
 * @param key  of the fork
 */
enum kvp_status demo_check(struct demo_checker *checker, struct kvp_seq seq, uint64_t key,
                           const struct demo_trace *trace, size_t request, uint32_t from, uint32_t to,
                           uint64_t *ret_pages, uint64_t *ret_bad);

/* ---- demo_worker.c ----------------------------------------------------------------------------------------------- */

struct cli;
/** The hidden command that demo.c starts: INDEX BOARD_FD PEER_FD, and the trace's options. */
int demo_worker_run(struct cli *cli);

#endif
