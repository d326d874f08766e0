/**
 * Every limit of kvpool, in one place.
 *
 * What a peer sends is checked against these before it is used; a refusal names the value and the limit. Each has its
 * unit at the end of its name where it has one. Plain C, no dependency: it is installed beside kvpool.h.
 */
#ifndef KVP_LIMITS_H
#define KVP_LIMITS_H

/* the daemon */
#define KVP_POOLS_MAX       64
#define KVP_SESSIONS_MAX    1024
#define KVP_GPUS_MAX        16  /* slabs of one pool, one a GPU */
#define KVP_JOBS_MAX        256 /* jobs open at the executor */

/* a pool */
#define KVP_NAME_BYTES_MAX      63  /* without the terminator */
#define KVP_MODEL_BYTES_MAX     255 /* without the terminator */
#define KVP_PAGES_MAX           (1u << 25)
#define KVP_PAGE_TOKENS_MAX     4096
#define KVP_PLANES_MAX          1024
#define KVP_HEADS_MAX           1024
#define KVP_DIM_MAX             65536
#define KVP_SEQUENCES_MAX       65536 /* rows of one pool, those that retire included */
#define KVP_SEQUENCE_TOKENS_MAX (1u << 24)
#define KVP_ATTACHMENTS_MAX     256 /* sessions attached to one pool */
#define KVP_TENANTS_MAX         64  /* that ever attached to it */
#define KVP_PINS_MAX            1024
#define KVP_BLOCK_KEY_BYTES_MIN 8   /* block keys of the caller's */
#define KVP_BLOCK_KEY_BYTES_MAX 32
#define KVP_BLOCK_EXTRA_BYTES_MAX 4096 /* what else blocks depend on, of one call */
#define KVP_LEDGER_BYTES_MAX    (1ull << 36)
#define KVP_REGIONS_MAX         4096         /* regions of all pools */
#define KVP_REGION_BYTES_MAX    (1ull << 46) /* room for regions in one slab */

/* a session */
#define KVP_BUFFERS_MAX   64 /* registered buffers of one session */
#define KVP_BUFFERS_ALL_MAX 4096 /* … of all sessions; each is a parked fd, too */
#define KVP_TIMELINES_MAX 16 /* timelines of one attachment; the first is written by the executor */
#define KVP_OUTCOMES_MAX  64 /* outcomes kept of a session by lease; of a socket session, one */
#define KVP_LEASE_MS_MIN  100
#define KVP_LEASE_MS_MAX  (24 * 3600 * 1000)

/* a call */
#define KVP_BATCH_MAX          1024      /* sequences in one call */
#define KVP_CALL_PAGES_MAX     (1u << 17) /* pages that one call takes or shares */
#define KVP_CALL_TOKENS_MAX    (1u << 20) /* tokens of one Append or one index reply */
#define KVP_DATAGRAM_BYTES_MAX 65536     /* a message on the session socket; a larger one travels in a memfd */
#define KVP_MESSAGE_BYTES_MAX  (64 << 20) /* any message, at either door */
#define KVP_MESSAGE_FDS_MAX    64
#define KVP_UNPACK_BYTES_MAX   (256 << 20) /* what unpacking one message may allocate */
#define KVP_LIST_MAX           4096      /* entries in one page of a listing */

#endif
