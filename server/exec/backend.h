/**
 * What the executor needs of a backend: one table of functions, with two makers, backend_host.c and backend_cuda.c.
 *
 *        objects, tasks, calls                 know no CUDA
 *   ─────────── struct kvp_exec_backend ───────────────────────
 *     backend_host.c      backend_cuda.c       know no messages
 *
 * `device` is one opened device, made once for the program. All functions but `run` are called on the main thread,
 * except slab_create, which may also be called on a worker's. A worker (one thread's own state: on CUDA a stream and
 * scratch memory) is made, used and freed by its own thread. What a job names has been checked before `run` sees it:
 * page ids, counts and strides are in range, the memory is there and stays there until `run` returns.
 *
 * Failure: a status, and in the error a text that names what failed; `fatal` says that the device is lost to this
 * process (a sticky CUDA error), so that the program must end.
 */
#ifndef KVP_EXEC_BACKEND_H
#define KVP_EXEC_BACKEND_H

#include "kvp_abi.h"
#include "kvp_kernels.h"
#include "kvp_layout.h"
#include "kvp_limits.h"
#include "kvp_status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVP_EXEC_IPC_BYTES    64 /* cudaIpcMemHandle_t */
#define KVP_EXEC_OUTPUTS      7  /* of an index job, in the order of GetBatchIndicesRequest */
#define KVP_EXEC_DEVICE_BYTES 64 /* "host", or "GPU-" and a UUID */

struct kvp_exec_error {
    char text[256];
    bool fatal;
};

/** Fill in an error's text, as printf does. @return status, so that a caller can return at once */
enum kvp_status kvp_exec_fail(struct kvp_exec_error *reterr, enum kvp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Bytes of a slab or a buffer, as this process has them. On CUDA a host buffer has no device address: it is copied. */
struct kvp_exec_memory {
    unsigned char *host; /* mapped here; NULL: memory of a GPU */
    uint64_t device;     /* address on the GPU; 0: host memory */
    uint64_t bytes;      /* from there */
    bool writable;
    int fd; /* of a slab: what is handed on; else -1 */
    bool has_ipc;
    unsigned char ipc[KVP_EXEC_IPC_BYTES];
    void *owner; /* the backend's own */
};

/* Where the rows of an append come from: plane p's token t, head h at offset + t · token_stride + h · head_stride. */
struct kvp_exec_source {
    const unsigned char *host; /* inline bytes, or a buffer's; NULL: … */
    uint64_t device;           /* … on the GPU */
    const uint64_t *offsets;   /* [planes] */
    const uint64_t *token_strides;
    const uint64_t *head_strides;
};

/* The index step of a batch; the lengths are those after the append. */
struct kvp_exec_index {
    uint32_t batch, pages, nnz;
    const int32_t *kv_indptr;     /* [batch + 1] */
    const int32_t *kv_indices;    /* [pages] */
    const int32_t *last_page_len; /* [batch] */
    const int32_t *tokens;        /* [batch] of them appended */
    const struct kvp_exec_memory *target;
    uint32_t wanted;                    /* bits of the outputs */
    uint64_t offsets[KVP_EXEC_OUTPUTS]; /* in the target */
    uint64_t bytes[KVP_EXEC_OUTPUTS];
};

/* One piece of work; its parts are done in this order. Arrays are host memory. */
struct kvp_exec_work {
    const struct kvp_layout_spec *spec;
    const struct kvp_plane_layout *planes;
    const struct kvp_exec_memory *slab;
    /* pages to be zeroed */
    uint32_t n_zero;
    const int32_t *zero_pages; /* [n_zero] */
    /* copies of pages' first tokens; in one group no page is both source and destination */
    const struct kvp_page_copy *copies;
    uint32_t n_groups;
    const uint32_t *group_ends; /* [n_groups] */
    /* an append; nnz 0: none */
    uint32_t nnz;
    const int64_t *slots; /* [nnz] page · page_tokens + offset */
    struct kvp_exec_source source;
    const struct kvp_exec_index *index; /* NULL: none */
    /* pages whose digests are wanted */
    uint32_t n_digests;
    const int32_t *digest_pages; /* [n_digests] */
    struct kvp_digest *digests;  /* [n_digests] written when it is done */
    /* stored when all of it is done, by the device itself where it can; NULL: none */
    struct kvp_timeline *done;
    uint64_t done_value;
};

struct kvp_exec_device;
struct kvp_exec_worker;

struct kvp_exec_device_info {
    char id[KVP_EXEC_DEVICE_BYTES];
    char name[128];
    uint64_t bytes;
};

struct kvp_exec_backend {
    const char *name; /* "host" or "cuda" */
    unsigned workers; /* threads that run tasks */

    /** Open the device with this id; "" is the first. @retval KVP_ENODEV there is none such */
    enum kvp_status (*open)(const char *id, struct kvp_exec_device **ret_device, struct kvp_exec_device_info *ret_info,
                            struct kvp_exec_error *reterr);
    void (*close)(struct kvp_exec_device *device);

    /* Zeroed memory. ret_memory->bytes may be more than asked for. */
    enum kvp_status (*slab_create)(struct kvp_exec_device *device, uint64_t bytes, bool legacy_ipc,
                                   struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr);
    /* The slab that another executor made. The fd stays the caller's. */
    enum kvp_status (*slab_adopt)(struct kvp_exec_device *device, int fd, uint64_t bytes,
                                  struct kvp_exec_memory *ret_memory, struct kvp_exec_error *reterr);
    /* A client's memory, `bytes` at `offset` of what fd or ipc shares (fd -1: ipc). The fd stays the caller's. */
    enum kvp_status (*buffer_import)(struct kvp_exec_device *device, bool on_host, int fd, const unsigned char *ipc,
                                     uint64_t offset, uint64_t bytes, struct kvp_exec_memory *ret_memory,
                                     struct kvp_exec_error *reterr);
    void (*memory_drop)(struct kvp_exec_device *device, struct kvp_exec_memory *memory);

    /* Timelines are host memory that the device is to store to. What the device can not reach, `run` stores itself. */
    void (*timelines_adopt)(struct kvp_exec_device *device, void *at, uint64_t bytes);
    void (*timelines_drop)(struct kvp_exec_device *device, void *at);

    enum kvp_status (*worker_open)(struct kvp_exec_device *device, struct kvp_exec_worker **ret_worker,
                                   struct kvp_exec_error *reterr);
    void (*worker_close)(struct kvp_exec_worker *worker);
    /* Do it, and return when it is done. */
    enum kvp_status (*run)(struct kvp_exec_worker *worker, const struct kvp_exec_work *work,
                           struct kvp_exec_error *reterr);

    /* Processes that the device serves. @retval KVP_EAGAIN not known. May take as long as the driver likes: any thread */
    enum kvp_status (*processes)(const struct kvp_exec_device_info *info, uint32_t *ret_pids, unsigned room,
                                 unsigned *ret_n);
};

extern const struct kvp_exec_backend kvp_exec_host;
#ifdef KVPOOL_HAVE_CUDA
extern const struct kvp_exec_backend kvp_exec_cuda;
#endif

#endif
