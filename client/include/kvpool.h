/**
 * kvpool.h: the client library of kvpool, the KV cache that outlives its processes.
 *
 * A process connects to kvpoold, makes or finds a pool, attaches it (its pages are then mapped here), opens sequences,
 * reserves room for tokens, and writes and reads pages in place:
 *
 *     kvp_connect ─► kvp_pool_create ─► kvp_attach ─► kvp_seq_open ─► kvp_advance
 *     kvp_client     the pool's name    kvp_pool      kvp_seq         room for tokens
 *                                                                         │
 *                       kvp_progress ◄─ kvp_append ◄─ kvp_step_begin ◄────┘
 *                       lengths         bytes         indices
 *
 * By call, one round trip each: everything that changes what the daemon knows (kvp_seq_open, kvp_advance, kvp_fork, …).
 * Without a call: lengths, page ids and timelines, read in memory that the daemon publishes; and the kernels, which run
 * on the caller's own stream over the pool's own memory. So a decode step makes no call: room is reserved ahead, by a
 * kvp_advance_begin that overlaps the running step.
 *
 * Backends. Of a pool on the host backend, memory is mapped host memory, kernels run on the calling thread before the
 * call returns, and every `stream` is NULL. Of a CUDA pool, pointers are device pointers of the rank's GPU, `stream` is
 * a cudaStream_t or CUstream of its primary context, which is the one of the CUDA runtime; NULL is its default stream.
 *
 * The kernels themselves (kvp_kernels.h) are exported too, for caches and index arrays of the caller's own; those named
 * kvp_cuda_… by a library that was built with CUDA.
 *
 * Threads. Every function may be called from any thread at any time unless it says else; kvp_disconnect and kvp_detach
 * must be the last call on what they end. Calls of several threads on one client overlap on one connection.
 *
 * fork(). A child does not inherit the session: in the child every function answers KVP_ESESSION. Connect after fork,
 * and never fork once CUDA is in use.
 *
 * Loss. A daemon that restarts on its parked ledger is a pause: calls wait and go on. Where the connection itself is
 * lost, the library connects again for `reconnect_ms`. If the session is still there (a session by lease), what was
 * asked is asked again under the same call id, and is done once. If it is not, what was attached is over, and says so:
 * KVP_ESESSION (another session; the pool's bytes are still there for who attaches again) or KVP_ELOST (another ledger,
 * or the pool's memory is gone). Nothing is mapped again silently.
 *
 * Errors. Everything that can fail returns enum kvp_status (kvp_status.h groups them by what is lost), writes `ret_`
 * outputs on KVP_OK only and `reterr_` outputs on failure only, and leaves a sentence in kvp_error_text of the thread.
 *
 * Units: `tokens` and lengths are tokens, `_bytes` bytes, `_ms` milliseconds. [n] is an array of n elements.
 *
 * Environment: KVPOOL_ENDPOINT  the session socket where kvp_connect is given none (else /run/kvpool/kvpool.sock).
 */
#ifndef KVPOOL_H
#define KVPOOL_H

#include "kvp_abi.h"
#include "kvp_kernels.h"
#include "kvp_layout.h"
#include "kvp_limits.h"
#include "kvp_status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef KVP_API
#define KVP_API __attribute__((visibility("default")))
#endif

#define KVP_ENDPOINT_DEFAULT "/run/kvpool/kvpool.sock"

struct kvp_client;  /* a connection to the daemon, and its session */
struct kvp_pool;    /* a pool, attached and mapped */
struct kvp_advance; /* a kvp_advance under way */

/* A sequence: a line of the pool's page table, as long as its generation is current. All zero is none. */
struct kvp_seq {
    uint32_t slot, generation;
};

/* A point on a timeline of the pool. value 0 is reached from the start: "nothing to wait for". */
struct kvp_point {
    uint32_t timeline;
    uint64_t value;
};

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/** What a status means, in a few words: kvp_status_text as a function, for those who load the library at run time. */
KVP_API const char *kvp_strerror(enum kvp_status status);

/**
 * What the last failed call of this thread has to say: one sentence that names the value and the limit, from the
 * library or from the daemon. Never NULL; "" before the first failure. Valid until the thread's next failure.
 */
KVP_API const char *kvp_error_text(void);

/** "0.1.0" */
KVP_API const char *kvp_version(void);

/* ---- connection and session -------------------------------------------------------------------------------------- */

struct kvp_connect_options {
    uint32_t connect_ms;   /* kvp_connect tries for so long; 0: once */
    uint32_t reconnect_ms; /* a lost connection is tried again for so long; 0: 5 000 */
    uint32_t call_ms;      /* a call without an answer by then is KVP_ETIMEDOUT; 0: 60 000 */
    const char *session;   /* token of a session by lease to be, as kvp_session_open gave it; NULL: one of its own */
};

/**
 * Connect to the daemon. The session is this process's: it ends when the process ends or disconnects, and with it its
 * sequences, unless `options->session` names one by lease.
 *
 * @param endpoint  path of the session socket; NULL: $KVPOOL_ENDPOINT, else KVP_ENDPOINT_DEFAULT
 * @param options   NULL: all defaults
 *
 * @retval KVP_EDISCONNECTED  nobody listens there
 * @retval KVP_EPERM          the socket is not ours to use
 * @retval KVP_ESESSION       the token's session is unknown or has ended
 * @retval KVP_EINVAL         the path is longer than a socket address
 */
KVP_API enum kvp_status kvp_connect(const char *endpoint, const struct kvp_connect_options *options,
                                    struct kvp_client **ret_client);

/**
 * End the connection, and with it a session of its own. Pools that are still attached are unmapped; a session by lease
 * keeps them attached, and its sequences open. Steps must have been destroyed before. NULL is fine.
 */
KVP_API void kvp_disconnect(struct kvp_client *client);

struct kvp_session_info {
    uint64_t session_id;       /* public: names the session in kvp_transfer and in listings */
    uint64_t epoch;            /* counts the daemon's starts on its ledger */
    uint8_t instance[16];      /* uuid of the ledger */
    char token[96];            /* secret: its bearer is the session; "" of a connection's own */
    uint8_t resume_secret[64]; /* claims durable sequences after the session's death */
    uint32_t resume_secret_bytes;
    uint32_t lease_ms; /* until the lease ends; 0 of a connection's own */
    char version[32];  /* the daemon's, of kvp_session_open; else "" */
};

/** The session that this client's calls belong to. One round trip; keeps a lease alive. */
KVP_API enum kvp_status kvp_session_info(struct kvp_client *client, struct kvp_session_info *ret_info);

/**
 * Open a session by lease, for use by token: by one process after another, or through both doors. It ends unless a
 * call or kvp_session_info comes within the lease. The client itself stays in the session that it is in.
 *
 * @param lease_ms       KVP_LEASE_MS_MIN .. _MAX; 0: the daemon's default
 * @param name           for operators, shown in listings, at most 31 bytes; NULL: none
 * @param resume_secret  [resume_secret_bytes] claims the durable sequences of the dead session it was given to; or NULL
 * @retval KVP_ELIMIT    KVP_SESSIONS_MAX are open
 * @retval KVP_ENOENT    no dead session with that secret is remembered
 * @retval KVP_EBUSY     that session lives, or its process is not proven to be gone: try again
 * @retval KVP_EPERM     the secret was given to another user
 */
KVP_API enum kvp_status kvp_session_open(struct kvp_client *client, uint32_t lease_ms, const char *name,
                                         const uint8_t *resume_secret, size_t resume_secret_bytes,
                                         struct kvp_session_info *ret_info);

/** End a session by lease. @retval KVP_ESESSION  there is none of that token */
KVP_API enum kvp_status kvp_session_close(struct kvp_client *client, const char *token);

/* ---- pools ------------------------------------------------------------------------------------------------------- */

/* Which cached page leaves first; of the prefix cache, see there. */
enum kvp_cache_policy {
    KVP_POLICY_ADAPTIVE = 0, /* learns from what is asked for */
    KVP_POLICY_LRU = 1,      /* the least recently used that no cached page extends */
};
enum kvp_block_hash {
    KVP_BLOCK_HASH_KEYED = 0, /* AES, with keys that only the daemon has */
    KVP_BLOCK_HASH_XXH3 = 1,  /* XXH3-128, faster; who may choose tokens can make two blocks look alike */
};
enum kvp_zero_on_reuse {
    KVP_ZERO_DEFAULT = 0, /* on */
    KVP_ZERO_ON = 1,      /* a page that comes to another tenant is zeroed first */
    KVP_ZERO_OFF = 2,
};
/* A tenant is a user: its uid. */
struct kvp_tenant_share {
    uint32_t tenant;
    uint32_t quota_pages;      /* it has no more, cached pages included; 0: no limit */
    uint32_t guaranteed_pages; /* others evict none of its pages when it has no more */
};

/* What a pool is to be. Zero means the default where one is named. Copied by who takes it. */
struct kvp_pool_spec {
    const char *name;              /* 1..KVP_NAME_BYTES_MAX bytes */
    const char *model;             /* identity of the model, checked by kvp_attach; NULL: none */
    struct kvp_layout_spec layout; /* pages, page_tokens, planes, …; order 0: NHD, placement 0: LAYER */
    uint32_t reserved_pages;       /* pages 0..n-1 are never handed out */
    uint32_t max_sequences;        /* rows; 0: 1024 */
    uint32_t max_sequence_tokens;  /* 0: what the pool holds, at most 131 072 */
    const char *const *devices; /* [n_devices] UUIDs of the GPUs, one slab on each; none: the first GPU, or the host */
    uint32_t n_devices;
    bool legacy_ipc;        /* memory of cudaMalloc for cudaIpcMemHandle_t: dies with its executor */
    uint64_t region_bytes;  /* room for regions behind the pages of each slab; rounded up to 4 KiB, on a GPU 2 MiB */
    uint32_t linger_ms;     /* how long durable sequences of a dead session wait for a claim */
    uint32_t policy;        /* enum kvp_cache_policy */
    uint32_t block_hash;    /* enum kvp_block_hash; with XXH3 the pool is one tenant's alone */
    uint32_t zero_on_reuse; /* enum kvp_zero_on_reuse */
    const struct kvp_tenant_share *tenants; /* [n_tenants], at most KVP_TENANTS_MAX; others have no bounds */
    uint32_t n_tenants;
    bool page_digests; /* a digest of each sealed page's bytes is kept: see kvp_audit_pages */
};

/* The prefix cache of a pool; totals count from its making. */
struct kvp_tenant_use {
    uint32_t tenant; /* uid */
    uint32_t pages;  /* in use, cached ones included */
    uint32_t cached_pages;
    uint32_t quota_pages; /* 0: no limit */
    uint32_t guaranteed_pages;
};
struct kvp_cache_info {
    uint32_t published_pages; /* known by a block key */
    uint32_t cached_pages;    /* … of these, held by nobody: they leave when pages are needed */
    uint32_t dirty_pages;     /* came from another tenant, and are about to be zeroed */
    uint32_t pins;
    uint64_t lookup_blocks; /* asked for by kvp_seq_open_blocks … */
    uint64_t hit_blocks;    /* … and found */
    uint64_t publishes, evictions;
    const struct kvp_tenant_use *tenants; /* [n_tenants] who ever attached, or has a share */
    uint32_t n_tenants;
};

/* A pool as the daemon describes it. One block of memory: what it points to lives and ends with it. */
struct kvp_pool_info {
    struct kvp_pool_spec spec;             /* with every default filled in */
    const struct kvp_plane_layout *planes; /* [spec.layout.n_planes] where their bytes lie in a slab */
    uint64_t layout_digest[2];
    uint32_t slabs;      /* one a rank */
    uint64_t slab_bytes; /* of one */
    uint64_t page_bytes; /* of one page, all planes */
    uint64_t pool_id;
    uint32_t row_pages; /* pages that one sequence may have */
    uint32_t free_pages;
    uint32_t sequences;             /* open */
    uint32_t retiring_sequences;    /* given up, their pages not back yet */
    uint32_t quarantined_sequences; /* of dead writers */
    uint32_t attachments;
    uint64_t quarantined_pages;
    bool cuda; /* backend: CUDA, else host */
    bool lost; /* its memory is gone; only deleting it is possible */
    bool deleting;
    struct kvp_cache_info cache;
};

/**
 * Make a pool. State, not change: a pool of that name and the same spec is answered as made.
 *
 * @param ret_info  how it is, to be freed by kvp_pool_info_free; may be NULL
 * @retval KVP_EINVAL  the spec is out of a limit, which the text names
 * @retval KVP_EEXIST  there is one of that name, and it is another
 * @retval KVP_ENOMEM, KVP_ENODEV, KVP_EDEVICE  the memory, or the device for it, is not to be had
 */
KVP_API enum kvp_status kvp_pool_create(struct kvp_client *client, const struct kvp_pool_spec *spec,
                                        struct kvp_pool_info **ret_info);
/** @retval KVP_ENOENT  there is none of that name */
KVP_API enum kvp_status kvp_pool_describe(struct kvp_client *client, const char *name, struct kvp_pool_info **ret_info);
KVP_API void kvp_pool_info_free(struct kvp_pool_info *info);

/** The names of all pools: [ret_n], to be freed by one free() of *ret_names. */
KVP_API enum kvp_status kvp_pool_list(struct kvp_client *client, char ***ret_names, size_t *ret_n);

/** @retval KVP_ENOENT  there is none @retval KVP_EBUSY  sessions are attached, pages retire, or regions are there */
KVP_API enum kvp_status kvp_pool_delete(struct kvp_client *client, const char *name);

/* ---- attaching: the pool's memory, mapped here ------------------------------------------------------------------- */

struct kvp_attach_options {
    const uint64_t *layout_digest; /* [2] what the layout must be; NULL: whatever it is */
    const char *model;             /* what the model must be; NULL: whatever it is */
    uint64_t join; /* session_id whose group this rank joins (tensor parallelism); 0: none. Of a group, tokens count as
                      written when all its ranks say so; when one has left, none do until another joins in its
                      place. Points that the owner gives as `after` speak for all ranks */
    uint32_t ranks;                /* bit r: map rank r's slab; 0: all of them */
    bool metadata_only;            /* map table and timelines, no slab: a session that ends needs no proof of its end */
};

/**
 * Map a pool: its slabs, one a rank, its table (read-only), this session's progress page, and its timelines.
 *
 * A session attaches once: a pool that it has attached already is mapped again, as by another process of a session by
 * lease. Cost: a mapping each, and on CUDA pools about 1 ms a GiB for access rights. No page is touched.
 *
 * @param options  NULL: all defaults
 *
 * @retval KVP_ENOENT     there is no pool of that name
 * @retval KVP_EMISMATCH  layout digest, model or ABI version differ
 * @retval KVP_ELIMIT     KVP_ATTACHMENTS_MAX sessions have
 * @retval KVP_ELOST      its memory is gone
 * @retval KVP_ENODEV     a CUDA pool, and no driver or no GPU of that UUID is here
 */
KVP_API enum kvp_status kvp_attach(struct kvp_client *client, const char *name,
                                   const struct kvp_attach_options *options, struct kvp_pool **ret_pool);

/**
 * Unmap a pool, and tell the daemon. Pointers into it are dead after. The sequences must have been closed, unless this
 * client has the pool attached once more: it stays attached then.
 *
 * @retval KVP_EBUSY  sequences of this session are open in it; it stays attached
 */
KVP_API enum kvp_status kvp_detach(struct kvp_pool *pool);

/** How the pool was when it was attached (its counts are of that moment). Valid until kvp_detach. */
KVP_API const struct kvp_pool_info *kvp_pool_info(const struct kvp_pool *pool);

/** KVP_OK; KVP_ESESSION or KVP_ELOST once the session or the memory is gone, as the table or the connection told. */
KVP_API enum kvp_status kvp_pool_state(const struct kvp_pool *pool);

/** Where a rank's slab is mapped: a host address, or a device address of that GPU. NULL: rank out of range, or no slab.
 */
KVP_API void *kvp_slab(const struct kvp_pool *pool, uint32_t rank);

/**
 * A plane as a strided tensor [page, token, head, element] in the mapped slab, as the kernels take it.
 * @param plane  index into spec.layout.planes
 * @retval KVP_EINVAL  rank or plane is out of range, or no slab is mapped
 */
KVP_API enum kvp_status kvp_pool_plane(const struct kvp_pool *pool, uint32_t rank, uint32_t plane,
                                       struct kvp_plane_view *ret_view);

/* ---- regions: named ranges of a slab, for tensors that the caller shapes ----------------------------------------- */

/*
 * A region lies in a rank's slab, behind the pages. It belongs to the user who made it, and stays, with its bytes, until
 * it is given up: its maker may die, and the daemon be killed. kvpool never writes into one: a new region holds what
 * the last user of its range left there (zeros, where none was).
 */
enum kvp_region_flags {
    KVP_REGION_EXCLUSIVE = 1u << 0, /* of kvp_region_map: while no other session has it mapped */
    KVP_REGION_KEEP = 1u << 1,      /* of kvp_region_unmap: it stays for who maps it next */
};

struct kvp_region {
    void *address;   /* as kvp_slab's: a host address, or a device address of that rank's GPU */
    uint64_t offset; /* from the start of the slab */
    uint64_t bytes;
    bool existed; /* it was there already: its bytes are those that were left */
};

/**
 * Find a region by its name, or make it. This session has it mapped until kvp_region_unmap, kvp_detach or its end.
 *
 * @param name   1..KVP_NAME_BYTES_MAX letters, digits and ._-:/+@, unique in the rank's slab
 * @param bytes  of one that is there, what it has; 0: whatever it has, and none is made
 * @param flags  0 or KVP_REGION_EXCLUSIVE
 *
 * @retval KVP_EMISMATCH  it is there, and has another size; the text names both
 * @retval KVP_ENOENT     bytes is 0, and it is not there
 * @retval KVP_ELIMIT     no gap between the regions of the slab is large enough, or KVP_REGIONS_MAX are there
 * @retval KVP_EINVAL     more than the pool has for regions, or rank or name can not be
 * @retval KVP_EPERM      it is another user's
 * @retval KVP_EBUSY      another session has it mapped (KVP_REGION_EXCLUSIVE)
 * @retval KVP_EAGAIN     … and that one is dead, but not proven gone: try again
 */
KVP_API enum kvp_status kvp_region_map(struct kvp_pool *pool, uint32_t rank, const char *name, uint64_t bytes,
                                       unsigned flags, struct kvp_region *ret_region);

/**
 * Have a region mapped no more and, without KVP_REGION_KEEP, give its range up. One that is not there is fine. The
 * caller's GPU must be done with it.
 *
 * @param flags  0 or KVP_REGION_KEEP
 * @retval KVP_EBUSY   another session has it mapped; KVP_EAGAIN as in kvp_region_map
 * @retval KVP_EPERM   it is another user's
 */
KVP_API enum kvp_status kvp_region_unmap(struct kvp_pool *pool, uint32_t rank, const char *name, unsigned flags);

struct kvp_region_info {
    const char *name;
    uint32_t rank;
    uint32_t tenant; /* whose: a uid */
    uint32_t mapped; /* sessions that have it mapped; dead ones, too, until they are proven gone */
    uint64_t offset; /* from the start of the slab */
    uint64_t bytes;
};

/** The regions of a pool by rank and offset: [ret_n], to be freed by one free() of *ret_regions. */
KVP_API enum kvp_status kvp_region_list(struct kvp_client *client, const char *pool,
                                        struct kvp_region_info **ret_regions, size_t *ret_n);

/* ---- sequences --------------------------------------------------------------------------------------------------- */

enum kvp_seq_flags {
    KVP_DURABLE = 1u << 0,  /* of kvp_seq_open: outlives its session by the pool's linger_ms */
    KVP_TRUNCATE = 1u << 1, /* of kvp_advance: reserved (and written) may shrink */
};

/**
 * Open sequences by key, empty. A key that is open in this session returns its handle, so that a repeat changes nothing
 * and a sequence that was transferred here is found.
 *
 * @param n         1..KVP_BATCH_MAX
 * @param keys      [n] the caller's request ids
 * @param flags     0 or KVP_DURABLE
 * @param ret_seqs  [n]
 * @retval KVP_ELIMIT  max_sequences rows of the pool are in use; nothing changed
 */
KVP_API enum kvp_status kvp_seq_open(struct kvp_pool *pool, uint32_t n, const uint64_t *keys, unsigned flags,
                                     struct kvp_seq *ret_seqs);

/**
 * Set how many tokens each sequence has room for.
 *
 * State, not change: a repeat after a lost reply succeeds and does nothing. All or nothing over the batch.
 *
 * @param n             number of sequences, 1..KVP_BATCH_MAX
 * @param seqs          [n] handles; each owned by this session
 * @param reserved      [n] tokens there is to be room for; less than now needs KVP_TRUNCATE
 * @param after         [n] points after which given-up pages are unread; needed with KVP_TRUNCATE on CUDA; else NULL
 * @param flags         0 or KVP_TRUNCATE
 * @param ret_copies    [n] all page copies these sequences still owe, at most one each; NULL with ret_n_copies where
 *                      none came by kvp_fork or was truncated, here or by the session that transferred it: what is
 *                      owed must be done (kvp_copy_owed) before the sequence is appended to
 * @param reterr_short  pages missing, with KVP_ENOPAGES; may be NULL
 *
 * @retval KVP_OK        the pool holds what was asked
 * @retval KVP_ENOPAGES  the pool is short of *reterr_short pages; nothing changed
 * @retval KVP_ESTALE    a handle's generation is not current; nothing changed
 * @retval KVP_EINVAL    reserved is over the pool's limit, or less than now without KVP_TRUNCATE; nothing changed
 * @retval KVP_EPERM     a sequence is another session's; nothing changed
 * @retval KVP_EBUSY     an append on request of one is under way; or it is to shrink, and its giver's stream still writes
 *                       it; nothing changed
 *
 * Thread-safe. Blocks for one round trip on the session socket; kvp_advance_begin does not.
 */
KVP_API enum kvp_status kvp_advance(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                    const uint32_t *reserved, const struct kvp_point *after, unsigned flags,
                                    struct kvp_page_copy *ret_copies, uint32_t *ret_n_copies, uint32_t *reterr_short);

/**
 * The two halves of kvp_advance, so that the round trip overlaps the running step. The arrays are read before
 * kvp_advance_begin returns. Every begun advance must be waited for, once, before its pool is detached.
 *
 * kvp_advance_begin blocks only while the socket is full or the connection is being made again.
 * kvp_advance_wait ends *advance, whatever it returns; its ret_copies has room for the n of its begin.
 */
KVP_API enum kvp_status kvp_advance_begin(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                          const uint32_t *reserved, const struct kvp_point *after, unsigned flags,
                                          struct kvp_advance **ret_advance);
KVP_API enum kvp_status kvp_advance_wait(struct kvp_advance *advance, struct kvp_page_copy *ret_copies,
                                         uint32_t *ret_n_copies, uint32_t *reterr_short);

/**
 * Make children that share their parents' pages: metadata only. Full pages are shared; of a page that is not full the
 * child owes a copy. The parents may be of another session of the same user: holding a child keeps what one reads. A
 * child of a durable sequence of this session is durable.
 *
 * @param parents     [n]
 * @param keys        [n] the children's
 * @param tokens      [n] how many tokens of each parent; NULL: all that is written
 * @param ret_seqs    [n] the children
 * @param ret_copies  [n], as in kvp_advance
 * @retval KVP_EEXIST    a key is open in this session; nothing changed
 * @retval KVP_EINVAL    tokens is over what the parent has written; nothing changed
 * @retval KVP_ENOPAGES  the pool is short of *reterr_short pages; nothing changed
 * @retval KVP_ESTALE    a parent is not open; nothing changed
 * @retval KVP_EPERM     a parent is another user's; nothing changed
 * @retval KVP_ELIMIT    max_sequences rows of the pool are in use; nothing changed
 */
KVP_API enum kvp_status kvp_fork(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *parents, const uint64_t *keys,
                                 const uint32_t *tokens, struct kvp_seq *ret_seqs, struct kvp_page_copy *ret_copies,
                                 uint32_t *ret_n_copies, uint32_t *reterr_short);

/**
 * Hand sequences to another session that has the pool attached: zero copy. Its owner finds them by kvp_seq_open with
 * their keys. Until `when` is reached the giver's stream writes their pages: the new owner can neither append on request
 * nor cut nor close them (KVP_EBUSY), and waits for the point before it writes behind them. If the giver dies before it,
 * what was written is what there is.
 *
 * @param to      session_id of the receiver
 * @param when    the point at which the giver's stream has written `tokens`; NULL: what is written is written
 * @param tokens  [n] what will be written then; NULL: what is written now
 * @retval KVP_ENOENT  no such session is attached to the pool
 * @retval KVP_EEXIST  the receiver has a sequence of that key open; nothing changed
 * @retval KVP_EPERM   a sequence, or the receiver, is another's: of another session, or another user; nothing changed
 * @retval KVP_EBUSY   an append of one of the sequences is under way; nothing changed
 */
KVP_API enum kvp_status kvp_transfer(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs, uint64_t to,
                                     const struct kvp_point *when, const uint32_t *tokens);

/**
 * Give sequences up. One that is closed already is fine. Their pages are free at once (host), or when `after` is
 * reached.
 *
 * @param after  [n] points after which the caller's GPU neither reads nor writes their pages; needed on CUDA; else NULL
 * @retval KVP_EPERM  a sequence is another session's; nothing changed
 * @retval KVP_EBUSY  an append on request of one is under way, or its giver's stream still writes it; nothing changed
 */
KVP_API enum kvp_status kvp_seq_close(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                      const struct kvp_point *after);

enum kvp_seq_state {
    KVP_SEQ_OPEN = 1,
    KVP_SEQ_RETIRING = 2,    /* given up; its pages return when its point is reached */
    KVP_SEQ_QUARANTINED = 3, /* its writer died */
    KVP_SEQ_LINGERING = 4,   /* durable; waits for a claim */
    KVP_SEQ_BUSY = 5,        /* open, with an append on request under way */
};
struct kvp_seq_info {
    struct kvp_seq seq;
    uint64_t key;
    uint64_t session_id;
    uint32_t reserved, written; /* tokens */
    uint32_t version;           /* of the row */
    enum kvp_seq_state state;
};

/**
 * The pool's sequences in the order of their slots, from slot *from_slot on, at most `max` of them.
 *
 * @param all           of every session; else this one's
 * @param from_slot     where to start, 0 at first; on return where to go on, 0: that was all
 * @param ret_infos     [max]
 */
KVP_API enum kvp_status kvp_seq_list(struct kvp_pool *pool, bool all, uint32_t max, uint32_t *from_slot,
                                     struct kvp_seq_info *ret_infos, uint32_t *ret_n);

/* ---- the prefix cache -------------------------------------------------------------------------------------------- */

/*
 * What full pages hold, or are to hold, of each sequence of a batch. A block is the tokens of one page; equal blocks
 * behind equal blocks are the same K and V. A page whose block is named is found by any session of the tenant (the user)
 * once it is full and written and the daemon has seen so (by the next call on the sequence, or its close); it stays in
 * the cache when its sequences are closed, until its room is needed.
 *
 * Either token ids, of which kvpool makes the keys, or keys that the engine makes, one a block; a key stands for its block
 * *and all before it*. Tokens that fill no page at the end are left out of account: give a prompt as it is. What was named
 * by tokens is found by tokens, what by keys by keys of the same size.
 */
struct kvp_blocks {
    const uint32_t *counts; /* [n] of each sequence: how many tokens, or keys */
    const uint32_t *first; /* [n] the page that the first of them is of; NULL: page 0, as all but kvp_advance want it */
    const uint32_t *tokens; /* [sum of counts], or NULL and … */
    const void *keys;       /* … [sum of counts · key_bytes] */
    const void *extra;      /* [extra_bytes] what else K and V depend on (LoRA, images); goes into every block */
    size_t extra_bytes;     /* at most KVP_BLOCK_EXTRA_BYTES_MAX */
    uint32_t key_bytes;     /* KVP_BLOCK_KEY_BYTES_MIN … _MAX */
};

/**
 * kvp_seq_open, and take the longest cached prefix along: the sequence starts with those pages, written and reserved.
 *
 * @param blocks      one entry a key
 * @param ret_cached  [n] tokens taken along; of a key that was open: of the leading blocks asked for, those that its row
 *                    begins with; may be NULL
 */
KVP_API enum kvp_status kvp_seq_open_blocks(struct kvp_pool *pool, uint32_t n, const uint64_t *keys, unsigned flags,
                                            const struct kvp_blocks *blocks, struct kvp_seq *ret_seqs,
                                            uint32_t *ret_cached);

/**
 * kvp_advance and kvp_advance_begin, with what the pages hold: of a prompt, or of pages that decode will fill or has
 * filled. All in one: the pages of [first, first + blocks) must lie within what is reserved.
 *
 * @param blocks  one entry a sequence; an entry of 0 names nothing
 * @retval KVP_EMISMATCH  a page is known to hold another block; nothing changed
 * @retval KVP_EINVAL     first is behind pages without keys; nothing changed
 */
KVP_API enum kvp_status kvp_advance_blocks(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                           const uint32_t *reserved, const struct kvp_blocks *blocks,
                                           const struct kvp_point *after, unsigned flags,
                                           struct kvp_page_copy *ret_copies, uint32_t *ret_n_copies,
                                           uint32_t *reterr_short);
KVP_API enum kvp_status kvp_advance_blocks_begin(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                                 const uint32_t *reserved, const struct kvp_blocks *blocks,
                                                 const struct kvp_point *after, unsigned flags,
                                                 struct kvp_advance **ret_advance);

/**
 * How much of each prefix is cached now: asked only. It may be gone by the time that a sequence is opened.
 *
 * @param n            prefixes, 1..KVP_BATCH_MAX
 * @param ret_cached   [n] tokens
 * @param ret_pages    [max_pages] the page ids, one prefix behind the other: of each ret_cached / page_tokens; or NULL
 * @retval KVP_ELIMIT  the pages are more than max_pages
 */
KVP_API enum kvp_status kvp_match(struct kvp_client *client, const char *pool, uint32_t n,
                                  const struct kvp_blocks *blocks, uint32_t *ret_cached, uint32_t max_pages,
                                  int32_t *ret_pages);

/**
 * Keep whole prefixes in the cache for lease_ms from now, whoever asks for them; 0: no longer, where they are kept. The
 * pin is the tenant's, and outlives session, process and daemon.
 *
 * @param ret_pinned  [n] tokens; with lease_ms 0: that were pinned until now; may be NULL
 * @retval KVP_ENOENT  not all blocks of a prefix are cached; nothing changed
 * @retval KVP_ELIMIT  KVP_PINS_MAX pins are there, or all rows of the pool are in use; nothing changed
 */
KVP_API enum kvp_status kvp_pin(struct kvp_client *client, const char *pool, uint32_t n,
                                const struct kvp_blocks *blocks, uint32_t lease_ms, uint32_t *ret_pinned);

/**
 * Let cached pages go that nobody holds, of this user.
 *
 * @param pages       with n 0: how many, in the order of the pool's policy; 0: all
 * @param n, blocks   of these prefixes, from their ends on, up to what is held or extended; else 0 and NULL
 * @param all         every tenant's, with n 0; for root and the daemon's own user
 * @param ret_pages   how many went; may be NULL
 * @retval KVP_EPERM  all, by another user
 */
KVP_API enum kvp_status kvp_evict(struct kvp_client *client, const char *pool, uint32_t pages, uint32_t n,
                                  const struct kvp_blocks *blocks, bool all, uint64_t *ret_pages);

/* What the prefix index knows of a page. */
struct kvp_cached_page {
    uint8_t key[16]; /* as the daemon made it */
    int32_t page;
    int32_t parent;      /* page of the block before it; -1: it is a first block */
    uint32_t children;   /* published blocks that extend it */
    uint32_t references; /* rows and pins that hold it; 0: it is cached */
    uint32_t tenant;     /* uid */
    uint32_t hits;
    uint32_t age; /* lookups since it was let go of */
};

/**
 * The pages that the index knows, in the order of their ids, from *from_page on, at most `max` of them.
 *
 * @param from_page    where to start, 0 at first; on return where to go on, 0: that was all
 * @param ret_pages    [max]; may be less, and none, though there are more
 */
KVP_API enum kvp_status kvp_list_cache(struct kvp_client *client, const char *pool, uint32_t max, uint32_t *from_page,
                                       struct kvp_cached_page *ret_pages, uint32_t *ret_n);

/* ---- reading without a call -------------------------------------------------------------------------------------- */

/**
 * How many tokens of the sequence are written: of a sequence of this session the newer of the table's count and what
 * was reported by kvp_progress, of any other what the daemon last saw. No call, no lock; about 10 ns.
 *
 * @retval KVP_ESTALE  the handle's generation is not current
 * @retval KVP_EAGAIN  the row was being changed each time it was looked at; kvp_get_seq_lens asks by call
 */
KVP_API enum kvp_status kvp_seq_len(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t *ret_tokens);

/**
 * The sequence's page ids, as one state. No call, no lock.
 *
 * @param max        room in ret_pages; 0 with NULL to learn the count
 * @param ret_pages  [max] the first of them
 * @param ret_n      how many the row has, which may be more than max
 */
KVP_API enum kvp_status kvp_row(const struct kvp_pool *pool, struct kvp_seq seq, uint32_t max, int32_t *ret_pages,
                                uint32_t *ret_n);

/*
 * The index functions over a batch of any size: as kvp_get_seq_lens, kvp_get_page_table and kvp_get_batch_indices, which
 * ask by call; outputs that may be NULL there may be NULL here. On failure the outputs hold a part.
 *
 * @retval KVP_ESTALE, KVP_EAGAIN  as kvp_seq_len
 * @retval KVP_EINVAL              a row has not the pages for so many tokens
 * @retval KVP_ELIMIT              kvp_page_table: *reterr_indices ids have no room; reterr_indices may be NULL
 */
KVP_API enum kvp_status kvp_seq_lens(const struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                     uint32_t *ret_tokens);
KVP_API enum kvp_status kvp_page_table(const struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                       const uint32_t *tokens, uint32_t max_indices, int32_t *ret_kv_indptr,
                                       int32_t *ret_kv_indices, int32_t *ret_kv_last_page_len,
                                       uint32_t *reterr_indices);
KVP_API enum kvp_status kvp_batch_indices(const struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                          const uint32_t *tokens, const uint32_t *start, int32_t *ret_batch_indices,
                                          int32_t *ret_positions, int64_t *ret_slots);

/* ---- writing without a call: the kernels on the caller's stream -------------------------------------------------- */

/*
 * A step's working memory: the index arrays of a batch, where the pool's kernels find them. Made once, used by one
 * thread on one stream, step after step:
 *
 *     kvp_step_begin      which sequences, how many tokens each ─► indices        one launch
 *     kvp_append          a layer's K and V, or all planes       ─► bytes          one launch a call
 *     kvp_progress        behind them                            ─► lengths        one launch
 *
 * On CUDA none of them waits for the GPU, except kvp_step_begin for the step KVP_STEPS_AHEAD before it.
 */
struct kvp_step;
#define KVP_STEPS_AHEAD 4

/**
 * @param max_batch   sequences in a step, at most KVP_INDEX_BATCH_MAX
 * @param max_tokens  tokens that a step appends
 * @param max_pages   page ids over all sequences of a step
 */
KVP_API enum kvp_status kvp_step_create(struct kvp_pool *pool, uint32_t rank, uint32_t max_batch, uint32_t max_tokens,
                                        uint32_t max_pages, struct kvp_step **ret_step);
/** Waits for what is enqueued with it. Before kvp_detach. NULL is fine. */
KVP_API void kvp_step_destroy(struct kvp_step *step);

/**
 * Begin a step: tokens[i] tokens behind the first start[i] of seqs[i], into rows that have room for them. One that is
 * refused is a step of no tokens.
 *
 * @param n       sequences, 0..max_batch
 * @param tokens  [n]
 * @param start   [n]; NULL: what kvp_progress has reported of each up to this place on the stream, else what the table
 *                says (a sequence that is also appended to on request must say its start)
 *
 * @retval KVP_EINVAL    over what the step was made for
 * @retval KVP_ESTALE    a handle's generation is not current
 * @retval KVP_EMISMATCH host pools: a row has no room, or changed; the tokens are not written (CUDA: kvp_step_errors)
 */
KVP_API enum kvp_status kvp_step_begin(struct kvp_step *step, uint32_t n, const struct kvp_seq *seqs,
                                       const uint32_t *tokens, const uint32_t *start, void *stream);

/* What kvp_step_begin computes, in memory of the pool's device (host pools: host), there when the stream gets there. */
struct kvp_step_view {
    uint32_t n, nnz;                 /* sequences, tokens */
    const int32_t *seq_lens;         /* [n] after the append */
    const int32_t *kv_indptr;        /* [n + 1] */
    const int32_t *kv_indices;       /* [kv_indptr[n]] page ids */
    const int32_t *kv_last_page_len; /* [n] */
    const int32_t *append_indptr;    /* [n + 1] */
    const int32_t *batch_indices;    /* [nnz] */
    const int32_t *positions;        /* [nnz] */
    const int64_t *slot_mapping;     /* [nnz] page · page_tokens + offset */
};
KVP_API void kvp_step_view(const struct kvp_step *step, struct kvp_step_view *ret_view);

/**
 * Store the step's tokens into planes first_plane … first_plane + n_planes - 1.
 *
 * @param sources  [n_planes] each nnz tokens, in the batch's order; in memory that the device reaches (kvp_host_alloc)
 */
KVP_API enum kvp_status kvp_append(struct kvp_step *step, uint32_t first_plane, uint32_t n_planes,
                                   const struct kvp_token_view *sources, void *stream);

/** Report the step's tokens as written, behind all that is enqueued: the lengths of seq_lens, to every reader. */
KVP_API enum kvp_status kvp_progress(struct kvp_step *step, void *stream);

/** Carry out owed copies (kvp_advance, kvp_fork) in all planes. @param n  at most max_batch */
KVP_API enum kvp_status kvp_copy_owed(struct kvp_step *step, uint32_t n, const struct kvp_page_copy *copies,
                                      void *stream);

/**
 * Read pages into host memory: page i at bytes + i · page_bytes as the planes one behind the other, each a dense
 * [page_tokens, heads, dim], whatever the layout. Waits for the stream.
 *
 * @param n          at most max_pages
 * @param ret_bytes  [n · kvp_flat_page_bytes] of CUDA pools memory from kvp_host_alloc
 */
KVP_API enum kvp_status kvp_read_pages(struct kvp_step *step, uint32_t n, const int32_t *pages, void *ret_bytes,
                                       void *stream);

/** What the kernels had to skip since the step was made: how often, and the first of it. Synchronise the stream before.
 */
KVP_API uint64_t kvp_step_errors(const struct kvp_step *step, struct kvp_error_record *ret_first);

/** Host memory that the pool's device reaches, zeroed: pinned for CUDA pools. */
KVP_API enum kvp_status kvp_host_alloc(struct kvp_pool *pool, size_t bytes, void **ret_memory);
KVP_API void kvp_host_free(struct kvp_pool *pool, void *memory);

/** Wait until a stream of the rank's GPU has done what is enqueued (host pools: nothing to wait for). */
KVP_API enum kvp_status kvp_stream_sync(struct kvp_pool *pool, uint32_t rank, void *stream);

/* ---- the index functions by call --------------------------------------------------------------------------------- */

/** Lengths: [n] written tokens. @retval KVP_ESTALE  a handle is not current */
KVP_API enum kvp_status kvp_get_seq_lens(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                         uint32_t *ret_tokens);

/**
 * The CSR page table over `tokens` of each sequence.
 *
 * @param tokens                [n] at most what is reserved; NULL: what is written
 * @param max_indices           room in ret_kv_indices
 * @param ret_kv_indptr         [n + 1]
 * @param ret_kv_indices        [ret_kv_indptr[n]] page ids
 * @param ret_kv_last_page_len  [n] tokens in the last page, 0 for none
 * @param reterr_indices        with KVP_ELIMIT: the room that is needed; may be NULL
 */
KVP_API enum kvp_status kvp_get_page_table(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                           const uint32_t *tokens, uint32_t max_indices, int32_t *ret_kv_indptr,
                                           int32_t *ret_kv_indices, int32_t *ret_kv_last_page_len,
                                           uint32_t *reterr_indices);

/**
 * Of an append of tokens[i] behind start[i]: for each token its sequence's index in the batch, its position there,
 * and its slot, page · page_tokens + offset. nnz = sum(tokens).
 *
 * @param start  [n]; NULL: what is written
 * @param ret_batch_indices, ret_positions, ret_slots  [nnz]; any may be NULL
 */
KVP_API enum kvp_status kvp_get_batch_indices(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                              const uint32_t *tokens, const uint32_t *start, int32_t *ret_batch_indices,
                                              int32_t *ret_positions, int64_t *ret_slots);

/* Where each output lies in a registered buffer, bytes from its start; UINT64_MAX: not wanted. */
struct kvp_index_outputs {
    uint64_t batch_indices;    /* int32 [nnz] */
    uint64_t positions;        /* int32 [nnz] */
    uint64_t slots;            /* int64 [nnz] */
    uint64_t kv_indptr;        /* int32 [n + 1], of the lengths after the append */
    uint64_t kv_indices;       /* int32 [kv_indptr[n]] */
    uint64_t kv_last_page_len; /* int32 [n] */
    uint64_t seq_lens;         /* int32 [n], after the append */
};

/** The same into a registered buffer, by the executor's kernel. @param ret_done  where the results are there */
KVP_API enum kvp_status kvp_get_batch_indices_into(struct kvp_pool *pool, uint32_t n, const struct kvp_seq *seqs,
                                                   const uint32_t *tokens, const uint32_t *start, uint32_t buffer,
                                                   const struct kvp_index_outputs *outputs, struct kvp_point *ret_done);

/* ---- append on request: the executor writes ---------------------------------------------------------------------- */

/* Tokens for a batch. Source of plane p: nnz rows of [heads, dim] in sequence order; nnz = sum(tokens). */
struct kvp_append_request {
    uint32_t n;
    const struct kvp_seq *seqs;
    const uint32_t *at;     /* [n] the length expected; another one is KVP_EMISMATCH */
    const uint32_t *tokens; /* [n] how many to append */
    const void *bytes;      /* [bytes_n] the planes one behind the other, packed; or … */
    size_t bytes_n;
    uint32_t buffer;               /* … a registered buffer (bytes NULL) */
    const uint64_t *plane_offsets; /* [planes] in the buffer; NULL: one behind the other */
    const uint64_t *token_strides; /* [planes] bytes; NULL: packed */
    const uint64_t *head_strides;  /* [planes] bytes; NULL: packed */
    struct kvp_point wait;         /* the source is there when it is reached */
    uint32_t rank;
};

/**
 * Reserve, write and count tokens, all of it in the daemon and its executor.
 *
 * @param ret_done  reached when the bytes are there and the lengths count them; may be NULL
 * @retval KVP_EMISMATCH  a length is not the one expected; nothing changed
 * @retval KVP_EBUSY      an append of one of the sequences is under way, or it was given here and its giver's stream
 *                        still writes it; nothing changed
 * @retval KVP_ENOPAGES   the pool is short of *reterr_short pages; nothing changed
 *
 * Answers when the work is recorded, not when it is done: kvp_timeline_wait(pool, *ret_done, …).
 */
KVP_API enum kvp_status kvp_append_on_request(struct kvp_pool *pool, const struct kvp_append_request *request,
                                              struct kvp_point *ret_done, uint32_t *reterr_short);

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

/**
 * Share memory with the executor, for kvp_append_on_request and kvp_get_batch_indices_into.
 *
 * @param device      UUID of the GPU that the memory is on, or "host" (a memfd made with MFD_ALLOW_SEALING)
 * @param fd          of the memory, which stays the caller's; -1: ipc_handle names it
 * @param ipc_handle  [64] cudaIpcMemHandle_t; NULL: fd names it
 * @param offset      bytes from the start of what is shared. The driver maps an fd's GPU memory as a whole or not at all:
 *                    offset + bytes, rounded up to its granularity (2 MiB), must reach the allocation's end
 * @retval KVP_ELIMIT  KVP_BUFFERS_MAX are registered
 */
KVP_API enum kvp_status kvp_buffer_register(struct kvp_client *client, const char *device, int fd,
                                            const void *ipc_handle, uint64_t offset, uint64_t bytes,
                                            uint32_t *ret_buffer);
KVP_API enum kvp_status kvp_buffer_unregister(struct kvp_client *client, uint32_t buffer);

/* ---- timelines --------------------------------------------------------------------------------------------------- */

/** The id of this session's timeline k, 1..KVP_TIMELINES_MAX-1; 0 is the executor's. */
KVP_API enum kvp_status kvp_timeline_id(const struct kvp_pool *pool, uint32_t k, uint32_t *ret_timeline);

/**
 * Where a timeline's value is: written by aligned 8-byte stores only.
 * @param ret_device  the same for kernels and stream memory operations of the pool's GPU; 0 on host pools; may be NULL
 */
KVP_API enum kvp_status kvp_timeline_address(const struct kvp_pool *pool, uint32_t timeline, uint64_t **ret_host,
                                             uint64_t *ret_device);

KVP_API enum kvp_status kvp_timeline_value(const struct kvp_pool *pool, uint32_t timeline, uint64_t *ret_value);

/**
 * Wait on the calling thread until a point is reached.
 * @retval KVP_ETIMEDOUT  not within timeout_ms (0: only look)
 * @retval other          it will not be: the timeline's owner died before it, or the work that was to reach it failed
 */
KVP_API enum kvp_status kvp_timeline_wait(const struct kvp_pool *pool, struct kvp_point point, uint32_t timeout_ms);

/** Let a stream wait for a point before what is enqueued next. Host pools: waits on the thread, without a limit. */
KVP_API enum kvp_status kvp_timeline_wait_on(const struct kvp_pool *pool, struct kvp_point point, void *stream);

/** Reach a point of a timeline of this session when the stream gets there (host pools: now). Values only rise. */
KVP_API enum kvp_status kvp_timeline_signal(const struct kvp_pool *pool, struct kvp_point point, void *stream);

/* ---- the pool's memory in other libraries' hands: DLPack --------------------------------------------------------- */

/*
 * Shared ownership of a client or an attached pool: its end comes when the last reference is released. What has an
 * owner must not be ended by kvp_disconnect or kvp_detach. A pool's owner holds its client's; an exported tensor holds
 * its pool's, so that a mapping outlives every tensor over it.
 */
struct kvp_owner;

/** An owner with one reference, the caller's. */
KVP_API enum kvp_status kvp_owner_of_client(struct kvp_client *client, struct kvp_owner **ret_owner);
/** @param client  of the client that attached the pool */
KVP_API enum kvp_status kvp_owner_of_pool(struct kvp_owner *client, struct kvp_pool *pool,
                                          struct kvp_owner **ret_owner);
KVP_API void kvp_owner_retain(struct kvp_owner *owner);
/**
 * Give a reference up. The last one detaches or disconnects; on CUDA the work on the pool must be over by then.
 * @retval KVP_EBUSY  the last one, of a pool with open sequences: unmapped only with its client. Else what kvp_detach
 *                    says
 */
KVP_API enum kvp_status kvp_owner_release(struct kvp_owner *owner);
/** The process is about to end: releases keep everything from now on, and wait for nobody. */
KVP_API void kvp_owner_forever(void);

#define KVP_DLPACK_DIMS_MAX 8

struct kvp_dlpack_tensor {
    void *data;          /* of its first element */
    int32_t device_type; /* DLPack's: 1 host, 2 CUDA */
    int32_t device_id;
    uint32_t ndim;
    uint8_t code, bits; /* DLPack's type code, and bits of an element */
    uint16_t reserved;  /* 0 */
    int64_t shape[KVP_DLPACK_DIMS_MAX];
    int64_t strides[KVP_DLPACK_DIMS_MAX]; /* elements */
};

/**
 * A tensor over a pool's memory for who speaks DLPack. Its deleter may be called on any thread.
 *
 * @param pool         owner of the pool, held until the deleter is called
 * @param versioned    a DLManagedTensorVersioned (1.1), else a DLManagedTensor
 * @param ret_managed  the one or the other
 */
KVP_API enum kvp_status kvp_dlpack_export(struct kvp_owner *pool, const struct kvp_dlpack_tensor *tensor,
                                          bool versioned, void **ret_managed);

/** The destructor of a PyCapsule over ret_managed: calls its deleter, unless a consumer has renamed the capsule. */
KVP_API void kvp_dlpack_capsule_end(void *capsule);

/* ---- memory for torch -------------------------------------------------------------------------------------------- */

/*
 * A CUDAPluggableAllocator's two functions, for torch.cuda.MemPool: what is allocated lies in regions "tag/0", "tag/1", …
 * of a pool, in the slab on the device that is asked for (of a host pool, in its slab). Numbers are given out from the
 * lowest free one on, so that a process that allocates as an earlier one did is handed the same memory. It is another
 * process's to have when it is freed, or this one is gone; its bytes stay until the region is given up.
 */
enum kvp_torch_flags {
    KVP_TORCH_PRESERVE = 1u << 0, /* earlier processes' bytes come back; sizes must be theirs. Else their regions of the
                                     tag are given up before the first allocation */
};

/**
 * On this thread, until kvp_torch_end, kvp_torch_malloc serves from a pool under a tag. Uses nest.
 *
 * @param tag  1..KVP_NAME_BYTES_MAX - 11 letters, digits and ._-:/+@
 */
KVP_API enum kvp_status kvp_torch_use(struct kvp_owner *pool, const char *tag, unsigned flags);

/** Ends it. @return what the last kvp_torch_malloc of it came to, as kvp_region_map says; with its text */
KVP_API enum kvp_status kvp_torch_end(void);

/**
 * A region, which no other process has. Waits up to 10 s for the proven end of a dead one that had it.
 * @return NULL  it failed: kvp_error_text, and kvp_torch_end, say why
 */
KVP_API void *kvp_torch_malloc(size_t bytes, int device, void *stream);
/** Waits for the GPU, and lets the region be another's; it stays. What is none of kvp_torch_malloc's is ignored. */
KVP_API void kvp_torch_free(void *memory, size_t bytes, int device, void *stream);

/** Whether `address` is in memory of kvp_torch_malloc that holds an earlier process's bytes: said once of an allocation.
 */
KVP_API bool kvp_torch_came_back(const void *address);

/* ---- operations -------------------------------------------------------------------------------------------------- */

struct kvp_session_stats {
    uint64_t session_id;
    const char *name;
    uint32_t pid, uid;
    uint32_t sequences, attachments;
    uint32_t lease_left_ms;
    bool lease, ending;
};
struct kvp_executor_stats {
    const char *device; /* UUID, or "host" */
    const char *backend;
    uint32_t pid; /* 0: not running */
    uint32_t jobs, starts;
    uint64_t jobs_done;
};
enum kvp_keeper {
    KVP_KEEPER_NONE = 0,  /* nobody keeps the memory when the daemon ends: a restart loses it */
    KVP_KEEPER_THERE = 1, /* systemd or kvpool-keeper does */
    KVP_KEEPER_GONE = 2,  /* it did, and has died: a restart loses it */
};
/* One block of memory: what it points to lives and ends with it. */
struct kvp_stats {
    const char *version, *backend;
    uint64_t epoch, uptime_ms;
    uint8_t instance[16];
    uint64_t calls, calls_failed;
    uint32_t adoptions;                         /* restarts that this ledger has seen */
    uint64_t last_pause_us, last_pause_unix_ms; /* until what was adopted was served, and when it was; 0: none was */
    enum kvp_keeper keeper;
    uint64_t audits;                                    /* of the ledger, since the daemon's start */
    uint64_t last_audit_unix_ms, last_audit_violations; /* when it was over, 0: there was none; what it found */
    uint32_t last_audit_ms;                             /* how long it took */
    uint32_t n_pools, n_sessions, n_executors;
    struct kvp_pool_info **pools;         /* [n_pools] */
    struct kvp_session_stats *sessions;   /* [n_sessions] */
    struct kvp_executor_stats *executors; /* [n_executors] */
};
/** @param ret_stats  to be freed by kvp_stats_free */
KVP_API enum kvp_status kvp_get_stats(struct kvp_client *client, struct kvp_stats **ret_stats);
KVP_API void kvp_stats_free(struct kvp_stats *stats);

/**
 * Walk the ledger, as it is after this call came, and name each violation of its invariants. Others' calls go on
 * meanwhile.
 * @param ret_count  how many there are; 0 is clean
 * @param ret_texts  [ret_n_texts] the first of them, to be freed by one free() of *ret_texts; both may be NULL
 */
KVP_API enum kvp_status kvp_audit(struct kvp_client *client, uint32_t *ret_count, char ***ret_texts,
                                  size_t *ret_n_texts);

/* What an audit of the ledger and of pages' bytes found. One block of memory, to be freed by free(). */
struct kvp_page_audit {
    uint32_t violations;           /* of the ledger, and damaged pages */
    uint64_t pages_checked;        /* sealed ones of pools with page_digests, whose bytes were compared */
    uint64_t pages_without_digest; /* sealed ones whose digest is not taken yet: a moment later it is */
    uint64_t pages_damaged;        /* of those checked: their bytes are not those that were sealed */
    uint32_t n_texts, n_damaged;
    const char **texts;            /* [n_texts] the first violations */
    const char **damaged_pools;    /* [n_damaged] the first 1024: pool … */
    const uint32_t *damaged_pages; /* … and page */
};
/**
 * kvp_audit, and compare the bytes of all sealed pages with what they were when they were sealed, in pools that keep
 * digests. Executors read them, beside others' work: as fast as memory is, so set kvp_connect_options.call_ms to it.
 */
KVP_API enum kvp_status kvp_audit_pages(struct kvp_client *client, struct kvp_page_audit **ret_audit);

/**
 * Give back the pages of dead sessions whose GPU work nobody can prove to be over: an operator's word that it is.
 * @param session_id  the dead session; 0: every one whose process has ended
 */
KVP_API enum kvp_status kvp_release_quarantine(struct kvp_client *client, const char *pool, uint64_t session_id,
                                               uint64_t *ret_pages);

#ifdef __cplusplus
}
#endif

#endif
