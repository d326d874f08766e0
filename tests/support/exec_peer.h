/**
 * Plays the daemon for kvpool-exec: starts it over a socket pair, asks, and waits for answers by tag.
 *
 * And a pool as a daemon would hold it: its spec, its layout, timelines, table, slab, and `want`, the bytes that the
 * whole slab must have by the naive reference in exec_peer.c (one element at a time, from strides alone). Everything
 * that must not fail here ends the test by ck_assert.
 */
#ifndef KVP_EXEC_PEER_H
#define KVP_EXEC_PEER_H

#include "kvp_kernels.h"
#include "kvp_layout.h"
#include "kvp_wire.h"
#include "kvpool.pb-c.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define EXEC_PLANES_MAX 16

struct exec_peer {
    pid_t pid;
    int socket;
    uint64_t tag; /* of the last message sent */
};

/* An answer; free it by exec_answer_free. */
struct exec_answer {
    uint64_t tag;
    enum kvp_status status;
    ProtobufCMessage *body; /* of the method, or an Error; NULL: the executor is gone */
    int fd;                 /* that came along, or -1 */
};

void exec_peer_start(struct exec_peer *peer, const char *backend);
/** @return the tag */
uint64_t exec_peer_send(struct exec_peer *peer, uint16_t method, const ProtobufCMessage *body, const int *fds,
                        unsigned n_fds);
/** Wait for the next answer, whichever it is; 30 s at most. */
struct exec_answer exec_peer_next(struct exec_peer *peer);
/** Send, and wait for the answer to it; others that come first fail the test. */
struct exec_answer exec_peer_call(struct exec_peer *peer, uint16_t method, const ProtobufCMessage *body, const int *fds,
                                  unsigned n_fds);
/** The same, where only the status matters. */
enum kvp_status exec_peer_status(struct exec_peer *peer, uint16_t method, const ProtobufCMessage *body, const int *fds,
                                 unsigned n_fds);
void exec_answer_free(struct exec_answer *answer);
bool exec_peer_quiet(struct exec_peer *peer); /* no answer is there at the moment */
/** Close the socket, wait for its end. @return its wait status */
int exec_peer_end(struct exec_peer *peer);
void exec_peer_kill(struct exec_peer *peer); /* SIGKILL, and wait */
enum kvp_status exec_peer_hello(struct exec_peer *peer, const char *backend);

/* ---- a pool ------------------------------------------------------------------------------------------------------ */

struct exec_pool {
    uint64_t id;
    Kvpool__V1__PoolSpec spec;
    Kvpool__V1__Plane planes[EXEC_PLANES_MAX];
    Kvpool__V1__Plane *plane_list[EXEC_PLANES_MAX];
    struct kvp_plane_spec plane_specs[EXEC_PLANES_MAX];
    struct kvp_layout_spec layout;
    struct kvp_plane_layout places[EXEC_PLANES_MAX];
    struct kvp_layout_totals totals;
    struct kvp_timeline *timelines;
    int timelines_fd, table_fd, slab_fd;
    struct kvp_table_header *table;
    unsigned char *slab;   /* on the host: mapped; else NULL */
    uint64_t slab_bytes;   /* asked for */
    uint64_t driver_bytes; /* as the driver rounded them up */
    unsigned char ipc[64]; /* of a pool for legacy handles */
    unsigned char *want;
};

/* A shape: planes of `layers` layers, K and V (or CKV and KPE with mla). */
struct exec_shape {
    const char *name;
    uint32_t pages, page_tokens, layers, heads, k_dim, v_dim, dtype;
    uint32_t order, placement;
    bool joined, mla, legacy;
};

extern const struct exec_shape exec_plain, exec_shapes[]; /* one of each kind of layout */
extern const unsigned exec_n_shapes;

void exec_pool_make(struct exec_pool *pool, uint64_t id, const struct exec_shape *shape);
/** Ask for the slab and adopt it; on the host backend it is mapped here too. */
void exec_pool_create(struct exec_pool *pool, struct exec_peer *peer);
enum kvp_status exec_pool_adopt(struct exec_pool *pool, struct exec_peer *peer, bool with_slab);
void exec_pool_free(struct exec_pool *pool);
/** Map a slab that is a memfd. */
void exec_pool_map(struct exec_pool *pool);

/* The naive reference: on `want`. */
void exec_pool_want_token(struct exec_pool *pool, uint32_t p, uint32_t page, uint32_t offset, uint32_t head,
                          const void *bytes);
void exec_pool_want_copy(struct exec_pool *pool, uint32_t source, uint32_t destination, uint32_t tokens);
void exec_pool_want_zero(struct exec_pool *pool, uint32_t page);
/** The executor's digests of all its pages are those of `want`. */
void exec_pool_check_digests(struct exec_pool *pool, struct exec_peer *peer, const char *what);
/** A mapped slab has the bytes of `want`, to the last one. */
void exec_pool_check(const struct exec_pool *pool, const char *what);

/* ---- a batch to append ------------------------------------------------------------------------------------------- */

struct exec_batch {
    Kvpool__V1__ExecJobRequest job;
    uint32_t batch, nnz;
    int32_t indptr[65];
    int32_t indices[4096];
    uint32_t start[64], tokens[64];
    unsigned char *bytes; /* inline source: planes one behind the other */
    uint64_t n_bytes;
    uint64_t offsets[EXEC_PLANES_MAX], token_strides[EXEC_PLANES_MAX], head_strides[EXEC_PLANES_MAX];
};

/** A random batch over pages that no two of its sequences share; `seed` moves on. Source bytes are random and packed.
 * @param batch  all zero, or one made before */
void exec_batch_make(struct exec_batch *batch, const struct exec_pool *pool, uint64_t job, uint64_t session,
                     uint32_t sequences, uint64_t *seed);
/** Carry it out on `want`, from `source` by the batch's offsets and strides. */
void exec_batch_want(const struct exec_batch *batch, struct exec_pool *pool, const unsigned char *source);
/** Offsets and strides for a source that is a slice of larger rows: all planes of a token together, `gap` bytes apart. */
uint64_t exec_batch_interleave(struct exec_batch *batch, const struct exec_pool *pool, uint64_t gap);
void exec_batch_free(struct exec_batch *batch);

uint64_t exec_random(uint64_t *seed);
/** A memfd as a client would make it. */
int exec_memfd(uint64_t bytes, void **ret_at);

#endif
