/**
 * What the files of core_sim share: the clients and sequences that the model knows, and the steps over them.
 *
 *   core_sim.c       sessions, time, executors, the daemon; the run
 *   sim_sequences.c  what sequences say and how it is written; the calls on them
 *   sim_cache.c      the prefix cache: calls on it, and what of it must be there after each step
 *
 * A sequence says a story, which others of any tenant say too, or what nobody else says. Every token of a tenant's story
 * has 8 bytes of its own, so that the bytes of a page tell which block it is.
 */
#ifndef KVP_CORE_SIM_H
#define KVP_CORE_SIM_H

#include "core_cache_calls.h"

#include <string.h>

#define SESSIONS    6
#define SEQUENCES   48
#define SEQ_TOKENS  64
#define PAGES       96
#define PAGE        T
#define ROW         (SEQ_TOKENS / PAGE)
#define ROWS        40 /* max_sequences */
#define POOL        "p"
#define TENANTS     2
#define TENANT      1000 /* user of the first; the next is this much more */
#define QUOTA       72   /* pages of the first tenant */
#define GUARANTEED  36   /* of the second */
#define STORIES     6
#define WAITING_MAX 8
#define SLICE       8 /* pages that the core reclaims or evicts at a time */

struct client {
    bool open, attached, lease, eof;
    struct kvp_caller caller;
    char token[40];
    uint64_t id;
    uint32_t attachment;
    uint64_t call_id;
    uint32_t pid;
    unsigned tenant; /* 0.. */
};

/* Blocks by token ids and by an engine's keys are not the same blocks. */
struct story {
    unsigned number;
    bool opaque;
};

enum known { KNOWN_NOT, KNOWN_OWN, KNOWN_BY_ANOTHER, KNOWN_LOST };

struct sequence {
    bool used;
    uint64_t handle, key;
    unsigned owner;
    uint32_t reserved, written, version;
    uint32_t busy_to; /* an Append under way ends there; 0: none */
    bool tells;       /* a story; else what nobody else says */
    struct story story;
    uint32_t named;             /* pages whose blocks it has told */
    unsigned char known[ROW];   /* enum known, of the pages that are named and full */
    uint64_t token[SEQ_TOKENS]; /* the bytes of each */
};

enum done {
    DONE_ADVANCE,
    DONE_APPEND,
    DONE_FORK,
    DONE_TRANSFER,
    DONE_CLOSE,
    DONE_WRONG,
    DONE_DEATH,
    DONE_EXECUTOR,
    DONE_RESTART,
    DONE_HIT, /* blocks */
    DONE_MATCH,
    DONE_PIN,
    DONE_UNPIN,
    DONE_EVICT, /* pages */
    DONE_LIST,
    DONE_MADE_ROOM, /* pages evicted for others */
    DONE_ZEROED,    /* tokens */
    DONE_KINDS
};

extern struct client clients[SESSIONS];
extern struct sequence sequences[SEQUENCES];
extern struct shell_call *waiting[WAITING_MAX];
extern unsigned long counts[DONE_KINDS], step_number;
extern uint64_t rng;

/* Without Check's record of every check that holds, which is a write to a file. */
#define MUST(holds, ...)                                                                                               \
    do {                                                                                                               \
        if (!(holds)) {                                                                                                \
            printf("in step %lu\n", step_number);                                                                      \
            fflush(stdout);                                                                                            \
            ck_abort_msg(__VA_ARGS__);                                                                                 \
        }                                                                                                              \
    } while (0)

#define CLIENT_CALL(client, NAME, request) CALL((client)->caller, NAME, request)

uint32_t below(uint32_t n);
struct kvp_pool_id pool_id(void);
/* A client that is there, any; NULL: not now. */
struct client *any_client(void);

/* ---- sim_sequences.c --------------------------------------------------------------------------------------------- */

enum kvp_status look(const struct sequence *s, struct kvp_seq_view *ret_view);
/* Token t of a page, 8 bytes. */
uint64_t token_in(uint32_t page, uint32_t t);
void drop_sequences(unsigned owner);
/* What the core says of every sequence is what the model knows. */
void check_lengths(void);
/* Every written token is in the slab. */
void check_tokens(void);
void step_open(void);
void step_advance(void);
void step_append(void);
void step_fork(void);
void step_transfer(void);
void step_close(void);
void step_wrong(void);

/* ---- sim_cache.c ------------------------------------------------------------------------------------------------- */

struct story any_story(void);
/* Blocks that two stories begin with alike. */
uint32_t story_shares(unsigned a, unsigned b);
uint64_t story_token(unsigned tenant, struct story story, uint32_t at);
/* Blocks [first, first + n) of a story, as a call names them; valid until the next. */
Kvpool__V1__Blocks *story_blocks(struct story story, uint32_t first, uint32_t n);
/* Of n blocks, how many leading ones the tenant finds. */
uint32_t known_blocks(unsigned tenant, struct story story, uint32_t n);
/* A tenant wrote tokens [from, to) of a sequence. */
void note_written(unsigned tenant, const uint32_t *row, const uint64_t *token, uint32_t from, uint32_t to);
/* No byte of another tenant is where this sequence has room. */
void check_zeroed(const struct sequence *s);
/* A call of that tenant's may evict until the next check. */
void note_actor(unsigned tenant);
/* Take over what the index knows. */
void refresh_cache(void);
/* What the index knows, what it must know, and what it may have let go. */
void check_cache(void);
/* No time has passed since the core looked at the leases. */
void check_pins_ended(void);
/* The daemon was started again at that time: leases begin anew. */
void renew_pins(uint64_t now_ms);
void step_match(void);
void step_pin(void);
void step_evict(void);
void step_list(void);

#endif
