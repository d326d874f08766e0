/* The auditor; see auditor.h. */
#include "auditor.h"
#include "log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

struct kvp_auditor {
    uv_loop_t *loop;
    size_t bytes; /* of a snapshot's memory */
    void (*done)(void *arg, const struct kvp_audit_report *report);
    void *arg;
    bool closed;
    uv_work_t work;
    bool runs;
    struct kvp_ledger snapshot;
    struct kvp_audit_report report;
};

enum kvp_status kvp_auditor_open(uv_loop_t *loop, uint64_t ledger_bytes,
                                 void (*done)(void *arg, const struct kvp_audit_report *report), void *arg,
                                 struct kvp_auditor **ret_auditor)
{
    struct kvp_auditor *auditor = calloc(1, sizeof(*auditor));

    if (auditor == NULL)
        return KVP_ENOMEM;
    auditor->loop = loop;
    auditor->bytes = ledger_bytes;
    auditor->done = done;
    auditor->arg = arg;
    auditor->work.data = auditor;
    *ret_auditor = auditor;
    return KVP_OK;
}

/* Memory that can only be read is not accounted for; huge pages would be cleared whole while the loop waits. */
unsigned char *kvp_auditor_memory(struct kvp_auditor *auditor, uint64_t used)
{
    void *at = mmap(NULL, auditor->bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        return NULL;
    madvise(at, auditor->bytes, MADV_NOHUGEPAGE);
    madvise(at, auditor->bytes, MADV_DONTDUMP); /* as the ledger itself */
    if (mprotect(at, used, PROT_READ | PROT_WRITE) == 0)
        return at;
    kvp_log(LOG_ERR, "no memory for a copy of %llu bytes of the ledger: %s", (unsigned long long)used, strerror(errno));
    munmap(at, auditor->bytes);
    return NULL;
}

void kvp_auditor_drop(struct kvp_auditor *auditor, unsigned char *memory)
{
    munmap(memory, auditor->bytes);
}

/* ---- a run ------------------------------------------------------------------------------------------------------- */

static void note_violation(void *arg, const char *violation)
{
    struct kvp_audit_report *report = arg;

    if (report->n_texts < KVP_VIOLATIONS_SHOWN)
        snprintf(report->texts[report->n_texts++], KVP_VIOLATION_BYTES_MAX, "%s", violation);
}

/* On a thread of libuv's. */
static void walk(uv_work_t *work)
{
    struct kvp_auditor *auditor = work->data;
    struct kvp_audit_report *report = &auditor->report;
    void *scratch = malloc(kvp_audit_scratch_bytes(&auditor->snapshot));
    struct timespec now;

    report->n_texts = 0;
    report->status = scratch != NULL ? KVP_OK : KVP_ENOMEM;
    report->violations = scratch != NULL ? kvp_audit(&auditor->snapshot, scratch, note_violation, report) : 0;
    free(scratch);
    kvp_auditor_drop(auditor, (unsigned char *)(uintptr_t)auditor->snapshot.view);
    clock_gettime(CLOCK_REALTIME, &now);
    report->unix_ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void walked(uv_work_t *work, int status)
{
    struct kvp_auditor *auditor = work->data;

    auditor->runs = false;
    if (status != 0) /* cancelled: it is closed */
        kvp_auditor_drop(auditor, (unsigned char *)(uintptr_t)auditor->snapshot.view);
    if (auditor->closed)
        free(auditor);
    else
        auditor->done(auditor->arg, &auditor->report);
}

void kvp_auditor_run(struct kvp_auditor *auditor, const struct kvp_ledger *snapshot)
{
    auditor->snapshot = *snapshot;
    auditor->runs = true;
    uv_queue_work(auditor->loop, &auditor->work, walk, walked); /* fails for a NULL function only */
}

void kvp_auditor_close(struct kvp_auditor *auditor)
{
    auditor->closed = true;
    if (auditor->runs)
        uv_cancel((uv_req_t *)&auditor->work);
    else
        free(auditor);
}
