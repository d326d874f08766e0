/**
 * A worker of the demo, as its two files see it: demo_worker.c (its life, and the other worker), demo_serve.c (requests).
 */
#ifndef KVPOOL_DEMO_WORKER_H
#define KVPOOL_DEMO_WORKER_H

#include "demo.h"

#define JOBS_MAX         256
#define CHUNK_TOKENS     128u                                      /* of a prompt in one step */
#define LOOKAHEAD_TOKENS 32u                                       /* room ahead of a request that decodes */
#define KEYS_OF_ADVANCE  (2 * CHUNK_TOKENS / DEMO_PAGE_TOKENS + 2) /* of one sequence, at most */
#define STEP_TOKENS      (CHUNK_TOKENS + DEMO_ACTIVE_MAX)
#define TIMELINE         1u /* of this session: where its appends end */
#define WAIT_MS          30000u
#define CHECK_KEY        (1ull << 62) /* keys of forks for checking */

enum job_state { JOB_FREE, JOB_PREFILL, JOB_DECODE, JOB_CHECKING };

/* What a page of a prompt is known by: its block of the trace, and its place in the prompt. */
struct page_key {
    uint64_t block, page;
};

struct job {
    enum job_state state;
    struct kvp_seq seq;
    size_t request;
    uint32_t from;              /* tokens that were cached */
    uint32_t named;             /* pages that have their keys */
    uint32_t written, reserved; /* tokens */
    uint32_t total;             /* tokens when it is done */
    uint32_t pages;             /* that it can come to have */
};

enum message_kind { MESSAGE_CHECK = 1, MESSAGE_CHECKED = 2, MESSAGE_BYE = 3 };
struct message {
    uint32_t kind, job;
    struct kvp_seq seq;
    uint64_t request;
    uint32_t from, to;
};

struct worker {
    uint32_t index;
    struct demo_board *board;
    struct demo_worker_board *me;
    struct demo_trace trace;
    int peer;
    bool peer_bye;  /* it will ask for no more checks */
    bool peer_gone; /* it is dead: the run ends */
    bool fault_due;
    struct kvp_client *client;
    struct kvp_pool *pool;
    struct kvp_step *step;
    struct demo_checker *checker;
    struct kvp_point done; /* of the last step */
    struct {
        unsigned char *bytes;
        struct kvp_point free_at;
    } sources[2];
    unsigned next_source;
    size_t layer_stride; /* between layers in sources; 0: each layer is appended before the next is made (host) */
    struct job jobs[JOBS_MAX];
    struct page_key *keys; /* of the call at hand */
    size_t next;           /* request to look at */
    uint64_t next_key;
};

/* ---- demo_worker.c ----------------------------------------------------------------------------------------------- */

/** The other one being gone is no failure of this one: the run ends. */
void demo_send(struct worker *w, const struct message *message);

/** No more requests are to be taken: the time is over, or the other worker is dead. */
static inline bool demo_stopped(const struct worker *w)
{
    return atomic_load_explicit(&w->board->stop, memory_order_relaxed) != 0 || w->peer_gone;
}

/* ---- demo_serve.c ------------------------------------------------------------------------------------------------ */

/** One turn of serving: admit, advance, step, hand over. @param ret_idle  there was nothing to write */
enum kvp_status demo_serve_turn(struct worker *w, bool *ret_idle);
/** Whether a request of this worker's is still to be taken. */
bool demo_more_requests(struct worker *w);
unsigned demo_count_jobs(const struct worker *w, enum job_state state);
/** Close a job's sequence; what is known by keys stays cached. */
enum kvp_status demo_close_job(struct worker *w, struct job *job);

#endif
