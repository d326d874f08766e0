/**
 * The shared memory that kvpoold publishes and its clients map: table, progress page, timelines; and the envelope of
 * the session socket.
 *
 * All values are in the machine's byte order (both sides run on one machine), naturally aligned, and written by
 * aligned 4- and 8-byte stores only. KVP_ABI_VERSION moves with any change; a mismatch is refused at Attach.
 *
 *   table memfd (mapped read-only)                 progress memfd (read-write, its owner's alone)
 *   ┌────────────────────────────┐ 0               ┌──────────────────────────────────┐ 0
 *   │ struct kvp_table_header    │                 │ uint64 word[max_sequences]       │ version << 32 | tokens
 *   ├────────────────────────────┤ heads_offset    └──────────────────────────────────┘
 *   │ struct kvp_table_head      │                 timeline memfd (read-write, the pool's sessions')
 *   │        [max_sequences]     │                 ┌──────────────────────────────────┐ 0
 *   ├────────────────────────────┤ rows_offset     │ struct kvp_timeline              │ timeline id =
 *   │ int32 ids[row_pages]       │ row_stride      │  [KVP_ATTACHMENTS_MAX            │  attachment ·
 *   │        [max_sequences]     │                 │   · KVP_TIMELINES_MAX]           │  KVP_TIMELINES_MAX + k
 *   └────────────────────────────┘                 └──────────────────────────────────┘
 *
 * Reading a row. Rows are append-only under one version: the ids are stored first, then the count with release. To
 * truncate, transfer or reuse a row the daemon stores an odd version, changes, and stores the next even one, each with
 * release. A reader loads the version (acquire; odd: try again), the count (acquire), the ids, then the version again:
 * equal and even means that what it read is one state. After a few tries it asks by GetPageTable instead: the daemon
 * may have been killed between the two stores, and the next one repairs the row.
 *
 * Plain C, no dependency: it is installed beside kvpool.h, and CUDA code may include it.
 */
#ifndef KVP_ABI_H
#define KVP_ABI_H

#include <stdint.h>

#define KVP_ABI_VERSION 2u
#define KVP_TABLE_MAGIC 0x656c626174707630ull

enum kvp_table_state {
    KVP_TABLE_LIVE = 1,
    KVP_TABLE_LOST = 2,    /* the pool's bytes are gone */
    KVP_TABLE_DELETED = 3, /* the pool was deleted */
};

struct kvp_table_header {
    uint64_t magic;
    uint32_t abi_version;
    uint32_t state;       /* enum kvp_table_state */
    uint8_t instance[16]; /* uuid of the ledger; another one means that what was mapped is lost */
    uint64_t epoch;       /* counts the starts of the daemon on this ledger */
    uint64_t layout_digest[2];
    uint32_t pool_slot;
    uint32_t pool_generation;
    uint32_t pages;
    uint32_t page_tokens;
    uint32_t max_sequences;
    uint32_t row_pages;    /* ids in a row */
    uint64_t row_stride;   /* bytes from row to row */
    uint64_t heads_offset; /* bytes from the start of the table */
    uint64_t rows_offset;
    uint64_t bytes; /* of the whole table */
};

/* A sequence as any attached process sees it, at [slot]. 16 bytes, so that a GPU reads it in one load. */
struct kvp_table_head {
    uint32_t version;    /* even: stable; odd: being changed; see "Reading a row" */
    uint32_t row_pages;  /* ids that are valid in the row */
    uint32_t length;     /* written tokens, as last folded into the ledger */
    uint32_t generation; /* of the handle; 0: the slot is not open */
};

/* The progress word of a sequence: one aligned 8-byte store, system scope, behind the append that it reports. */
#define KVP_PROGRESS_WORD(version, tokens) ((uint64_t)(version) << 32 | (uint32_t)(tokens))
#define KVP_PROGRESS_VERSION(word)         ((uint32_t)((word) >> 32))
#define KVP_PROGRESS_TOKENS(word)          ((uint32_t)(word))

/*
 * A counter that only rises. Streams write it and wait for it; 0 is reached from the start. Who attaches goes on from the
 * values that it finds in its timelines: an earlier owner may have left them, and others may still wait for its values.
 */
struct kvp_timeline {
    uint64_t value;
    uint64_t error;      /* minus the status of the last failure; 0: none since the timeline was taken up anew */
    uint64_t lost_after; /* values above it … */
    uint64_t lost_to;    /* … up to this were not reached by who was to: the value went past them, … */
    uint64_t lost_error; /* … and this is why */
    uint64_t reserved[3];
};

/* Why a value that the timeline is at, or past, was not reached by who was to reach it; 0: it was. */
static inline uint64_t kvp_timeline_lost(const struct kvp_timeline *timeline, uint64_t value)
{
    uint64_t to = __atomic_load_n(&timeline->lost_to, __ATOMIC_ACQUIRE);
    uint64_t after = __atomic_load_n(&timeline->lost_after, __ATOMIC_ACQUIRE);
    return value > after && value <= to ? __atomic_load_n(&timeline->lost_error, __ATOMIC_ACQUIRE) : 0;
}

/*
 * The values above `after`, up to `to`, will not be reached. To be said before the value goes past them, by daemon and
 * executor alone, one at a time. One range is kept: it spans all failures until `error` is cleared, and what is between.
 */
static inline void kvp_timeline_lose(struct kvp_timeline *timeline, uint64_t after, uint64_t to, uint64_t error)
{
    int spans = __atomic_load_n(&timeline->error, __ATOMIC_ACQUIRE) != 0;
    __atomic_store_n(&timeline->lost_error, error, __ATOMIC_RELEASE);
    if (!spans || after < timeline->lost_after)
        __atomic_store_n(&timeline->lost_after, after, __ATOMIC_RELEASE);
    if (!spans || to > timeline->lost_to)
        __atomic_store_n(&timeline->lost_to, to, __ATOMIC_RELEASE);
    __atomic_store_n(&timeline->error, error, __ATOMIC_RELEASE);
}

/* ---- the session socket ------------------------------------------------------------------------------------------ */

#define KVP_ENVELOPE_MAGIC 0x4b565031u /* "KVP1" */

enum kvp_envelope_flags {
    KVP_ENVELOPE_REPLY = 1u << 0,
    KVP_ENVELOPE_MEMFD = 1u << 1, /* the message lies in the first fd, a sealed memfd, not behind the envelope */
};

/*
 * One SEQPACKET datagram: this, then `bytes` of protobuf (unless KVP_ENVELOPE_MEMFD), with fds as SCM_RIGHTS.
 * A reply with a status other than KVP_OK carries a kvpool.v1.Error.
 */
struct kvp_envelope {
    uint32_t magic;
    uint16_t method; /* kvpool.v1.Method */
    uint16_t flags;  /* enum kvp_envelope_flags */
    int32_t status;  /* of a reply: enum kvp_status; of a request 0 */
    uint32_t bytes;  /* of the protobuf message */
    uint64_t tag;    /* the caller's; a reply repeats it */
};

#endif
