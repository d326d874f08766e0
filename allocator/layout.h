/**
 * The structures in the block, and how to find them. Private to the allocator.
 *
 *   root    header 4096 B · log KVP_TXN_STORES_MAX × 16 B · sessions · outcomes · pools · buffers · regions · jobs
 *   extent  pages · index entries · index slots · followers · ghosts · policy · page digests · tenants · attachments ·
 *           sequences · key buckets · rows, each aligned to 64 B, the whole to 4096 B
 *
 * Everything is made of aligned 4- and 8-byte words, read as what they are and stored by store.h alone. A link is a
 * slot + 1, so that zeroed memory is empty lists; free pages alone link by their id. A word that is dead (a free slot,
 * a row beyond its count) may hold anything.
 *
 * The block is not trusted: kvp_ledger_open checks the header, the log and the pool records (map_pool relies on them);
 * every other index is checked where it is read, and every walk has a bound.
 */
#ifndef KVP_LAYOUT_H
#define KVP_LAYOUT_H

#include "kvp_ledger.h"

#include <assert.h>
#include <stdlib.h>

/* An invariant of the program, not of the block. Stays on in release builds. */
#define KVP_ASSERT(condition) ((condition) ? (void)0 : abort())

#define KVP_LEDGER_MAGIC 0x7265676465706b76ull
#define KVP_EXTENT_ALIGN 4096u
#define KVP_PART_ALIGN 64u

/* ---- root part --------------------------------------------------------------------------------------------------- */

struct block_header {
    uint64_t magic; /* stored last by kvp_ledger_format */
    uint32_t version;
    uint32_t txn_stores_max; /* of the program that made it: the root part's shape follows from it */
    uint64_t root_bytes;
    uint64_t bytes;
    uint64_t instance[2];
    uint64_t epoch;
    uint64_t unused[9];
    uint64_t log_count; /* entries in the log; 0: no transaction is open, or it is committed */
    uint64_t pad[495];
};

/* An undo entry: where (offset in the block, bit 0 set for an 8-byte word) and what was there. */
struct block_log_entry {
    uint64_t where;
    uint64_t old;
};

struct block_session {
    uint32_t state; /* enum kvp_session_state */
    uint32_t generation;
    uint32_t kind;
    uint32_t uid;
    uint32_t gid;
    uint32_t pid;
    uint32_t tenant;
    uint32_t lease_ms;
    uint64_t token[2];
    uint64_t resume_secret[2];
    uint64_t start_time;
    uint64_t name[4];
    uint32_t attachments; /* LIVE and DEAD: entries of attached[] */
    uint32_t outcomes;    /* put so far: the ring's next place */
    uint64_t pad[2];
    uint32_t attached[KVP_POOLS_MAX]; /* its attachment in each pool + 1 */
};

/* Valid while `generation` is its session's: so a session's start need not clear the ring. */
struct block_outcome {
    uint64_t call_id;
    uint32_t generation;
    uint32_t method;
    uint32_t status;
    uint32_t pad;
    uint64_t values[2];
};

/* In use while its session has that generation: so a session's end need not clear its buffers. */
struct block_buffer {
    uint32_t session_slot, session_generation; /* generation 0: unused */
    uint32_t number;                           /* 1..KVP_BUFFERS_MAX, once a session */
    uint32_t has_ipc;
    uint64_t bytes, offset;
    uint64_t device[8]; /* its name, terminated */
    uint64_t ipc[8];
    uint64_t pad[4];
};

struct block_pool {
    uint32_t state; /* enum kvp_pool_state */
    uint32_t generation;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t reserved_pages;
    uint32_t max_sequences;
    uint32_t row_pages;
    uint32_t needs_after;
    uint64_t layout_digest[2];
    uint64_t extent_offset;
    uint64_t extent_bytes;
    uint64_t name[8];

    uint64_t free_list;      /* first page (KVP_NONE: none) | count << 32, so that a pop stores one word */
    uint32_t pages_used;     /* watermark: pages from here on were never handed out, and are free too */
    uint32_t sequences_used; /* watermark of slots */
    uint32_t sequences_free; /* list of FREE slots below the watermark, by `next` */
    uint32_t retiring;       /* list of RETIRING slots */
    uint32_t reclaim;        /* list of RECLAIM slots */
    uint32_t open_count;
    uint32_t retiring_count; /* RETIRING and RECLAIM slots */
    uint32_t attachments;    /* LIVE and DEAD */
    uint32_t blob_bytes;

    uint32_t policy; /* enum kvp_policy */
    uint32_t zero_on_reuse;
    uint32_t hash;
    uint32_t tick;      /* counts lookups: the clock of eviction */
    uint32_t published; /* pages in the index */
    uint32_t cached;    /* … that no row holds */
    uint32_t dirty;     /* pages in rows that are to be zeroed */
    uint32_t pins;      /* list of PIN slots */
    uint32_t pin_count;
    uint64_t hash_key[2];
    uint64_t lookup_blocks, hit_blocks, evictions;

    uint64_t region_bytes; /* room for regions in each slab */
    uint32_t regions;      /* list, by rank and offset; see region.c */
    uint32_t region_count; /* in it */
    uint32_t page_digests; /* whether there is room for them */
    uint32_t pad2;
    uint64_t pad[6];
    uint64_t blob[KVP_POOL_BLOB_BYTES / 8];
};

struct block_region {
    uint32_t pool_slot, pool_generation; /* generation 0: unused */
    uint32_t rank;
    uint32_t tenant;
    uint32_t next; /* in its pool's list */
    uint32_t pad;
    uint64_t offset, bytes; /* in the room for regions of that rank's slab */
    uint64_t name[8];
    uint64_t mapped[KVP_ATTACHMENTS_MAX / 64]; /* a bit an attachment */
};

struct block_job {
    uint32_t open;
    uint32_t generation;
    uint32_t kind;
    uint32_t timeline;
    uint32_t session_slot, session_generation;
    uint32_t pool_slot, pool_generation;
    uint64_t call_id;
    uint64_t value;
    uint32_t first, last; /* list of its sequences, by `job_next`, in the order in which they were added */
    uint32_t sequences;   /* in that list */
    uint32_t seal_pages;  /* pages that its close may seal: bounded, so that one transaction holds it */
};

/* ---- a pool's extent --------------------------------------------------------------------------------------------- */

/* A page record is one 8-byte word; see page.c. */
typedef uint64_t block_page;

/* What the prefix index knows of a page; see prefix.c, and evict.c for links and use. Meaning only while it is keyed. */
struct block_entry {
    uint64_t key[2];
    uint64_t family; /* parent page + 1 (0: a first block) | children << 32 */
    uint64_t links;  /* next page + 1 | previous page + 1 << 32, in its eviction list */
    uint64_t use;    /* stamp | class, hits, kind and whether it is parked << 32 */
};

/* A slot of the index's hash table: page + 1 | the key's upper bits << 32; 0: empty. */
typedef uint64_t block_slot;

#define KVP_CLASSES     8u /* eviction lists of a tenant */
#define KVP_POLICY_BINS 32u

/* What the adaptive policy counts: hints, see policy.c. */
struct block_policy {
    uint32_t scale;    /* lookups that a page stays longer a step of its class's weight */
    uint32_t wanted;   /* times in a row in which another scale than 0 promised more */
    uint32_t released; /* pages let go of since the scale was chosen */
    uint32_t lookups;
    uint32_t evictions, missed;           /* and of these, about how many were asked for soon after */
    uint32_t superseded, superseded_back; /* evicted; asked for again, evicted or not */
    uint32_t leaves, leaves_back;
    uint32_t life;         /* lookups that the page evicted last had been there */
    uint32_t plain_life;   /* … that pages would be there with scale 0, when the scale was chosen */
    uint32_t gained, lost; /* samples found, and missed, only because of the scale */
    uint32_t doubts;       /* times that more were lost than gained, less those that it went well */
    uint32_t cached[KVP_CLASSES];                 /* samples: let go of */
    uint32_t again[KVP_CLASSES][KVP_POLICY_BINS]; /* … and asked for again, by age */
};
#define FOLLOWER_BRANCHED (1u << 31) /* in a page's follower: another page extended it before */

struct block_tenant {
    uint32_t id;
    uint32_t used;
    uint32_t pages; /* with references, or cached */
    uint32_t cached;
    uint32_t quota;
    uint32_t guaranteed;
    uint32_t pad[2];
    uint64_t lists[KVP_CLASSES]; /* first page + 1 (most recent) | last page + 1 << 32 */
};

struct block_attachment {
    uint32_t state; /* enum kvp_attachment_state */
    uint32_t session_slot, session_generation;
    uint32_t leader;    /* index */
    uint32_t sequences; /* OPEN ones that it owns */
    uint32_t first;     /* list of them, by `next` */
    uint32_t retiring;  /* RETIRING ones that it owned */
    uint32_t nvml_seen;
    uint32_t tenant;  /* index */
    uint32_t lacking; /* of a leader: ranks that left its group, and in whose place none has joined */
    uint64_t pad2[3];
};

struct block_seq {
    uint32_t state; /* enum kvp_seq_state */
    uint32_t generation;
    uint64_t key;
    uint32_t attachment; /* owner; of RETIRING ones the former owner, of RECLAIM ones and pins KVP_NONE */
    uint32_t durable;
    uint32_t reserved; /* tokens */
    uint32_t written;  /* tokens */
    uint32_t version;
    uint32_t row_pages;
    uint32_t copy_source; /* page + 1; the copy's destination and length follow from `written`: see row.c */
    uint32_t pending_tokens;
    uint64_t after_value; /* of a pin: its lease in ms */
    uint32_t after_timeline;
    uint32_t job;      /* slot + 1 */
    uint32_t job_next; /* in its job's list */
    uint32_t job_tokens;
    uint32_t next, prev;  /* in the list of its state: its attachment's, the pool's retiring or reclaim, or free */
    uint32_t bucket_next; /* in its key's bucket */
    uint32_t keyed;       /* its first pages, which have block keys */
    uint64_t shrunk;      /* transaction | row pages << 32: ids below that count must survive its rollback; see row.c */
    uint64_t pad2[4];
};

static_assert(sizeof(struct block_header) == 4096, "the header fills its page");
static_assert(offsetof(struct block_header, log_count) == 128, "the log's count has a cache line of its own");
static_assert(sizeof(struct block_log_entry) == 16, "log entry");
static_assert(sizeof(struct block_session) == 384, "session");
static_assert(offsetof(struct block_session, attached) == 128, "session");
static_assert(sizeof(struct block_outcome) == 40, "outcome");
static_assert(sizeof(struct block_buffer) == 192 && offsetof(struct block_buffer, ipc) == 96, "buffer");
static_assert(offsetof(struct block_pool, free_list) == 128 && offsetof(struct block_pool, region_bytes) == 248,
              "pool");
static_assert(offsetof(struct block_pool, blob) == 320 && sizeof(struct block_pool) == 320 + KVP_POOL_BLOB_BYTES,
              "pool");
static_assert(sizeof(struct block_region) == 136 && offsetof(struct block_region, name) == 40, "region");
static_assert(sizeof(struct block_job) == 64, "job");
static_assert(sizeof(block_page) == 8, "page");
static_assert(sizeof(struct block_entry) == 40, "index entry");
static_assert(sizeof(struct block_tenant) == 96, "tenant");
static_assert(sizeof(struct block_attachment) == 64, "attachment");
static_assert(sizeof(struct block_seq) == 128, "sequence");
static_assert(offsetof(struct block_seq, after_value) == 48 && offsetof(struct block_seq, shrunk) == 88, "sequence");

#define ALIGN_UP(value, align) (((uint64_t)(value) + (align)-1) & ~((uint64_t)(align)-1))

#define LOG_OFFSET      ((uint64_t)sizeof(struct block_header))
#define SESSIONS_OFFSET (LOG_OFFSET + (uint64_t)KVP_TXN_STORES_MAX * sizeof(struct block_log_entry))
#define OUTCOMES_OFFSET (SESSIONS_OFFSET + (uint64_t)KVP_SESSIONS_MAX * sizeof(struct block_session))
#define POOLS_OFFSET    (OUTCOMES_OFFSET + (uint64_t)KVP_SESSIONS_MAX * KVP_OUTCOMES_MAX * sizeof(struct block_outcome))
#define BUFFERS_OFFSET  (POOLS_OFFSET + (uint64_t)KVP_POOLS_MAX * sizeof(struct block_pool))
#define REGIONS_OFFSET  (BUFFERS_OFFSET + (uint64_t)KVP_BUFFERS_ALL_MAX * sizeof(struct block_buffer))
#define JOBS_OFFSET     (REGIONS_OFFSET + (uint64_t)KVP_REGIONS_MAX * sizeof(struct block_region))
#define ROOT_BYTES      ALIGN_UP(JOBS_OFFSET + (uint64_t)KVP_JOBS_MAX * sizeof(struct block_job), KVP_EXTENT_ALIGN)

static inline const struct block_header *header_of(const struct kvp_ledger *ledger)
{
    return (const struct block_header *)(const void *)ledger->view;
}

static inline const struct block_log_entry *log_of(const struct kvp_ledger *ledger)
{
    return (const struct block_log_entry *)(const void *)(ledger->view + LOG_OFFSET);
}

static inline const struct block_session *sessions_of(const struct kvp_ledger *ledger)
{
    return (const struct block_session *)(const void *)(ledger->view + SESSIONS_OFFSET);
}

/* The ring of one session. */
static inline const struct block_outcome *outcomes_of(const struct kvp_ledger *ledger, uint32_t session_slot)
{
    return (const struct block_outcome *)(const void *)(ledger->view + OUTCOMES_OFFSET) +
           (size_t)session_slot * KVP_OUTCOMES_MAX;
}

static inline const struct block_pool *pools_of(const struct kvp_ledger *ledger)
{
    return (const struct block_pool *)(const void *)(ledger->view + POOLS_OFFSET);
}

static inline const struct block_buffer *buffers_of(const struct kvp_ledger *ledger)
{
    return (const struct block_buffer *)(const void *)(ledger->view + BUFFERS_OFFSET);
}

static inline const struct block_region *regions_of(const struct kvp_ledger *ledger)
{
    return (const struct block_region *)(const void *)(ledger->view + REGIONS_OFFSET);
}

static inline const struct block_job *jobs_of(const struct kvp_ledger *ledger)
{
    return (const struct block_job *)(const void *)(ledger->view + JOBS_OFFSET);
}

/* ---- a pool, mapped ------------------------------------------------------------------------------------------------
 */

/* The offsets of the parts of a pool's extent; see pool.c. */
struct extent_shape {
    uint64_t entries, slots, followers, ghosts, policy, digests, tenants, attachments, sequences, buckets, rows, bytes;
    uint32_t bucket_count; /* a power of two */
};

static inline const uint32_t *row_of(const struct pool_map *m, uint32_t seq_slot)
{
    return m->rows + (size_t)seq_slot * m->pool->row_pages;
}

static inline uint32_t slot_of(const struct pool_map *m, const struct block_seq *seq)
{
    return (uint32_t)(seq - m->seqs);
}

/* The next generation of a slot; 0 is never given out. */
static inline uint32_t next_generation(uint32_t generation)
{
    return generation + 1 == 0 ? 1 : generation + 1;
}

#endif
