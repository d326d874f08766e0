/**
 * What the files of libkvpool share: the client, its calls, the mapped pool. Nothing here is exported.
 *
 *   kvp_client  connection, session, the calls under way (rpc.c, connection.c)
 *      │
 *      └─ kvp_pool  one attachment: mappings, layout, own `reserved` of each slot
 *                   (attach.c, table.c, step.c, timeline.c)
 *
 * Locks: client->lock guards the connection, the list of calls and the list of pools. It is not held while a thread
 * waits on the socket: one waiting thread at a time is the reader, and hands every reply to the call with its tag.
 * A pool's mappings do not change between kvp_attach and kvp_detach, so reading them takes no lock.
 */
#ifndef KVP_CLIENT_INTERNAL_H
#define KVP_CLIENT_INTERNAL_H

#include "kvpool.h"

#include "kvp_wire.h"
#include "kvpool.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>

/* ---- error.c ----------------------------------------------------------------------------------------------------- */

/** Leave a sentence for kvp_error_text; hands the status back. */
enum kvp_status kvp_fail(enum kvp_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- fork.c ------------------------------------------------------------------------------------------------------ */

/* Moves in a forked child. What was made under another value belongs to the parent. */
extern unsigned kvp_fork_generation;

/** Clients are known by name to the fork handlers, which close their sockets in the child. */
void kvp_fork_watch(struct kvp_client *client);
void kvp_fork_unwatch(struct kvp_client *client);

/* ---- rpc.c: calls on the connection ------------------------------------------------------------------------------ */

/* What every request message begins with; rpc.c fills it. */
struct kvp_request {
    ProtobufCMessage base;
    char *session;
    uint64_t call_id;
};

enum kvp_rpc_state {
    KVP_RPC_SENT = 1, /* an answer may come */
    KVP_RPC_DONE = 2, /* status, reply and fds are there */
    KVP_RPC_LOST = 3, /* the connection went before an answer came */
};

/* A call under way: on the caller's stack, or in a kvp_advance. */
struct kvp_rpc {
    const struct kvp_rpc_method *method;
    struct kvp_pool *pool; /* whose attachment it is about, or NULL */
    struct kvp_wire_packet packet;
    const int *fds;
    unsigned n_fds;
    uint64_t tag;
    uint64_t deadline_ns;
    enum kvp_rpc_state state;
    bool repeated;
    struct kvp_rpc *next;
    /* the answer */
    enum kvp_status status;
    uint64_t missing; /* of an Error */
    char text[256];   /* of an Error */
    ProtobufCMessage *reply;
    struct kvp_wire_budget budget;
    int reply_fds[KVP_MESSAGE_FDS_MAX];
    unsigned n_reply_fds;
};

/**
 * Make a call and wait for its answer.
 * @param pool     the attachment it is about: fails as that does once its session is gone; NULL: of no attachment
 * @param request  its session and call id are filled in here
 * @param fds      [n_fds] to go along; they stay the caller's
 * @param rpc      the answer, on KVP_OK; to be released by kvp_rpc_release in any case
 */
enum kvp_status kvp_rpc_call(struct kvp_client *client, struct kvp_pool *pool, uint16_t method,
                             ProtobufCMessage *request, const int *fds, unsigned n_fds, struct kvp_rpc *rpc);
/** The two halves of it. kvp_rpc_begin failing leaves nothing to wait for or release. */
enum kvp_status kvp_rpc_begin(struct kvp_client *client, struct kvp_pool *pool, uint16_t method,
                              ProtobufCMessage *request, const int *fds, unsigned n_fds, struct kvp_rpc *rpc);
enum kvp_status kvp_rpc_wait(struct kvp_client *client, struct kvp_rpc *rpc);
void kvp_rpc_release(struct kvp_rpc *rpc);

/** An fd of the answer by its index, now the caller's; -1 if there is none. */
int kvp_rpc_take_fd(struct kvp_rpc *rpc, int index);

/** The reply must list `expected` entries in each of the arrays it should. @return KVP_EPROTO with a text otherwise */
enum kvp_status kvp_rpc_check_count(const char *what, size_t got, size_t expected);

/* ---- connection.c ------------------------------------------------------------------------------------------------ */

struct kvp_client {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a call was answered, the reader's place is free, the connection is back */
    char *endpoint;
    char *token; /* "" of a session of its own */
    struct kvp_connect_options options;
    unsigned fork_generation;

    int socket; /* -1: lost */
    bool reading;
    bool connecting;
    uint64_t next_tag;
    uint64_t next_call_id;
    struct kvp_rpc *calls;
    struct kvp_wire_frame *frame; /* the reader's */

    uint64_t session_id, epoch;
    uint8_t instance[16];

    struct kvp_pool *pools;
    struct kvp_client *next; /* fork.c */
};

/** Connect client->socket again, within `reconnect_ms`, and learn which session it is. Holds the lock on return. */
enum kvp_status kvp_reconnect(struct kvp_client *client);

uint64_t kvp_now_ns(void);

/* ---- attach.c ---------------------------------------------------------------------------------------------------- */

struct kvp_mapping {
    void *address;
    size_t bytes;
};

/* One rank's slab. */
struct kvp_slab {
    char device[48]; /* UUID, or "host" */
    unsigned char *address;
    uint64_t bytes;
    bool legacy; /* mapped by its legacy handle (CUDA) */
};

struct kvp_pool {
    struct kvp_client *client;
    struct kvp_pool *next;
    struct kvp_pool_info *info;
    uint64_t session_id;
    uint8_t instance[16];
    uint32_t attachment;
    _Atomic int gone; /* enum kvp_status once the session or the memory is lost, else KVP_OK */

    struct kvp_mapping table, progress, timelines;
    const struct kvp_table_header *header; /* = table.address */
    const struct kvp_table_head *heads;
    const unsigned char *rows;
    _Atomic uint64_t *words; /* = progress.address; NULL: attached for metadata alone */
    struct kvp_timeline *lines;

    /* of each slot, version << 32 | reserved, as this session last heard; 0: it never did */
    _Atomic uint64_t *own;

    struct kvp_slab *slabs;     /* [info->slabs] */
    struct kvp_cuda_pool *cuda; /* NULL on the host backend */
};

/** Unmap and free, without a word to the daemon; the pool is not in the client's list. */
void kvp_pool_free(struct kvp_pool *pool);

/** KVP_OK, or why the pool can not be used (with the text left). */
enum kvp_status kvp_pool_usable(const struct kvp_pool *pool);
/** The connection has another session than the pool was attached by: mark it. The client's lock is held. */
void kvp_pool_session_lost(struct kvp_pool *pool, const uint8_t instance[16]);

/* ---- dlpack.c ---------------------------------------------------------------------------------------------------- */

/** The pool that an owner is of; NULL: it is a client's. */
struct kvp_pool *kvp_owner_pool(const struct kvp_owner *owner);
/** kvp_owner_forever was called. */
bool kvp_owner_is_forever(void);

/* ---- table.c ----------------------------------------------------------------------------------------------------- */

/* kvp_row from the id `first` on: ret_pages [max], *ret_n of the whole row. */
enum kvp_status kvp_table_ids(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t first, uint32_t max,
                              int32_t *ret_pages, uint32_t *ret_n);

/** A row's version and how many ids it has, as one state. @retval KVP_ESTALE, KVP_EAGAIN as kvp_seq_len */
enum kvp_status kvp_table_row_head(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t *ret_version,
                                   uint32_t *ret_row_pages);
/** What this session has reserved under that version of the row; UINT32_MAX where it does not know. */
uint32_t kvp_table_reserved(const struct kvp_pool *pool, uint32_t slot, uint32_t version);

/* ---- cache.c ----------------------------------------------------------------------------------------------------- */

/** Blocks of n sequences as a message, which points to their arrays; NULL where there are none. */
Kvpool__V1__Blocks *kvp_blocks_to_wire(uint32_t n, const struct kvp_blocks *blocks, Kvpool__V1__Blocks *wire);

/* ---- sequences.c ------------------------------------------------------------------------------------------------- */

/** @retval KVP_EINVAL  n is none of 1..KVP_BATCH_MAX */
enum kvp_status kvp_check_batch(const char *call, uint32_t n);
void kvp_seqs_to_wire(uint32_t n, const struct kvp_seq *seqs, uint64_t *wire);

static inline uint64_t kvp_seq_to_wire(struct kvp_seq seq)
{
    return (uint64_t)seq.generation << 32 | seq.slot;
}

static inline struct kvp_seq kvp_seq_from_wire(uint64_t seq)
{
    return (struct kvp_seq){.slot = (uint32_t)seq, .generation = (uint32_t)(seq >> 32)};
}

#endif
