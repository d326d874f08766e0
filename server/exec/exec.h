/**
 * kvpool-exec: everything of kvpool that touches a driver, as a program of its own that may die.
 *
 * It makes the slabs of one device, adopts those that another executor made, imports clients' buffers, and runs append,
 * index and copy work over them. It keeps nothing that matters: jobs are the daemon's ledger records, slabs outlive it
 * through the fds that the daemon holds. It speaks the envelopes of kvp_wire.h on a socket that it inherits, answers by
 * tag in the order in which things end, and ends at end-of-file.
 *
 *   main.c       options                    objects.c       slabs and buffers, by id
 *   loop.c       socket, outbox, poll       queue.c         order of work, worker threads
 *   calls.c      slabs, buffers, hello      memory.c        memfds
 *   job.c        a job checked, then run    backend_*.c     the device
 *   processes.c  which processes the GPU serves
 *
 * The main thread owns every struct here. A daemon started anew finds the executor as it was: it says hello again, adopts
 * again (which changes nothing), and asks again for its open jobs: one that still runs, or is among the last
 * KVP_EXEC_REMEMBERED done, is answered and not run again.
 */
#ifndef KVP_EXEC_H
#define KVP_EXEC_H

#include "backend.h"
#include "objects.h"
#include "queue.h"

#include "kvp_wire.h"
#include "kvpool.pb-c.h"

#define KVP_EXEC_JOBS_MAX   1024 /* open at once; the daemon's own limit, KVP_JOBS_MAX, is lower */
#define KVP_EXEC_REMEMBERED 512  /* outcomes of jobs kept */
#define KVP_EXEC_OUTBOX_MAX 4096 /* replies that wait for room; above, nothing more is read */

struct kvp_exec_outcome {
    uint64_t job;
    enum kvp_status status;
    char text[128];
};

/* A reply that found no room on the socket. */
struct kvp_exec_letter {
    struct kvp_exec_letter *next;
    struct kvp_wire_packet packet;
    int fd; /* goes along; -1: none */
};

struct kvp_exec_processes;

struct kvp_exec {
    int socket;
    const struct kvp_exec_backend *backend;
    const char *device_id;          /* as asked for on the command line */
    struct kvp_exec_device *device; /* NULL: not opened yet */
    struct kvp_exec_device_info info;
    struct kvp_exec_queue *queue;
    struct kvp_exec_objects slabs, buffers;
    struct kvp_exec_processes *processes;
    struct kvp_exec_job *jobs; /* open, linked by next_open */
    unsigned n_jobs;
    struct kvp_exec_outcome outcomes[KVP_EXEC_REMEMBERED]; /* a ring */
    unsigned next_outcome;
    struct kvp_exec_letter *outbox, **outbox_end;
    unsigned n_outbox;
    char fatal[256]; /* not empty: the device is lost, the program ends with this message */
    struct kvp_wire_frame frame;
};

/* A message in hand. A handler that sets `kept` owns it from then on. */
struct kvp_exec_request {
    uint16_t method;
    uint64_t tag;
    ProtobufCMessage *body;
    struct kvp_wire_budget budget;
    int fds[KVP_MESSAGE_FDS_MAX];
    unsigned n_fds;
    bool kept;
};

/* loop.c */
/** Serve until end-of-file. @retval KVP_OK end-of-file @retval KVP_EDEVICE the device is lost; see exec->fatal */
enum kvp_status kvp_exec_serve(struct kvp_exec *exec);
/** Answer. @param fd  goes along and stays the caller's; -1: none */
void kvp_exec_reply(struct kvp_exec *exec, uint16_t method, uint64_t tag, const ProtobufCMessage *body, int fd);
void kvp_exec_refuse(struct kvp_exec *exec, uint16_t method, uint64_t tag, enum kvp_status status, const char *text);
void kvp_exec_outbox_free(struct kvp_exec *exec);
void kvp_exec_request_free(struct kvp_exec_request *request);

/* calls.c */
void kvp_exec_hello(struct kvp_exec *exec, struct kvp_exec_request *request);
void kvp_exec_slab_create(struct kvp_exec *exec, struct kvp_exec_request *request);
void kvp_exec_slab_adopt(struct kvp_exec *exec, struct kvp_exec_request *request);
void kvp_exec_slab_drop(struct kvp_exec *exec, struct kvp_exec_request *request);
void kvp_exec_buffer_import(struct kvp_exec *exec, struct kvp_exec_request *request);
void kvp_exec_buffer_drop(struct kvp_exec *exec, struct kvp_exec_request *request);
/** Give back what objects hold; for the object tables. */
void kvp_exec_slab_free(struct kvp_exec_object *object, void *exec);
void kvp_exec_buffer_free(struct kvp_exec_object *object, void *exec);

/* job.c */
void kvp_exec_job(struct kvp_exec *exec, struct kvp_exec_request *request);

/* A task of ours: `ended` answers and frees it, on the main thread. */
struct kvp_exec_work_item {
    struct kvp_exec_task task; /* first */
    void (*ended)(struct kvp_exec *exec, struct kvp_exec_work_item *item);
    void (*forget)(struct kvp_exec *exec, struct kvp_exec_work_item *item); /* at the program's end: free, unanswered */
};

/* processes.c */
enum kvp_status kvp_exec_processes_create(const struct kvp_exec_backend *backend, struct kvp_exec_processes **ret);
void kvp_exec_processes_ask(struct kvp_exec *exec, struct kvp_exec_request *request);
int kvp_exec_processes_fd(const struct kvp_exec_processes *processes);
/** Answer what can be answered. @return ms until it is to be called again; -1: not before its fd is readable */
int kvp_exec_processes_turn(struct kvp_exec *exec);
/** A driver that hangs keeps its thread: that is left to the end of the process. */
void kvp_exec_processes_destroy(struct kvp_exec_processes *processes);

#endif
