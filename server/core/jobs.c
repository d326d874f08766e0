/**
 * Jobs in hand: ledger records of work, the requests that go with them, and how they end.
 *
 *   taken ──► sent ──► done     its sequences have their tokens
 *     ▲         │ └──► failed   they stay as they were; the timeline says that its value is lost
 *     └─────────┘ its executor died: sent to the next one, KVP_JOB_ATTEMPTS times
 *
 * Jobs of one attachment tell their ends on one timeline, in rising order. An executor keeps the order of what it was
 * given; so a job waits while an earlier one of its timeline is with another executor. The value of a failed job is
 * written when none of its timeline is open any more: an earlier one must not seem done by it. An executor that fails one
 * sets the timeline's error word before it begins a later one; so a value without an error says of each job that it was
 * done, also where the answer died with its executor. Whoever saw the value has the tokens, and may have changed the
 * buffer that they came from: such a job is not done again.
 */
#include "op.h"

#include <stdio.h>

static struct pool_state *pool_of(struct kvp_core *core, const struct job_state *job)
{
    struct pool_state *pool = &core->pools[job->pool.slot];
    return pool->id.generation == job->pool.generation ? pool : NULL;
}

static bool same_timeline(const struct job_state *job, struct kvp_pool_id pool, uint32_t timeline)
{
    return job->id.generation != 0 && job->pool.slot == pool.slot && job->pool.generation == pool.generation &&
           job->timeline == timeline;
}

static bool timeline_busy(const struct kvp_core *core, struct kvp_pool_id pool, uint32_t timeline)
{
    for (uint32_t i = 0; i < KVP_JOBS_MAX; i++) {
        if (same_timeline(&core->jobs[i], pool, timeline))
            return true;
    }
    return false;
}

uint64_t core_job_next_value(struct kvp_core *core, struct pool_state *pool, uint32_t attachment)
{
    uint32_t timeline = attachment * KVP_TIMELINES_MAX;
    uint64_t value = __atomic_load_n(&pool->timelines[timeline].value, __ATOMIC_ACQUIRE);
    if (core->open_jobs == 0 || !timeline_busy(core, pool->id, timeline))
        __atomic_store_n(&pool->timelines[timeline].error, 0, __ATOMIC_RELEASE);
    for (uint32_t i = 0; core->open_jobs != 0 && i < KVP_JOBS_MAX; i++) {
        if (same_timeline(&core->jobs[i], pool->id, timeline) && core->jobs[i].value > value)
            value = core->jobs[i].value;
    }
    for (uint32_t i = 0; i < core->n_late; i++) {
        const struct late_value *late = &core->late[i];
        if (late->pool.slot == pool->id.slot && late->timeline == timeline && late->value > value)
            value = late->value;
    }
    return value + 1;
}

bool core_job_sent(const struct kvp_core *core, struct kvp_job_id id)
{
    const struct job_state *job = &core->jobs[id.slot];
    return job->id.generation != id.generation || job->sent != 0;
}

bool core_job_about_to_end(const struct kvp_core *core, uint32_t slot)
{
    const struct job_state *job = &core->jobs[slot];
    const struct pool_state *pool = &core->pools[job->pool.slot];
    return job->id.generation != 0 && pool->id.generation == job->pool.generation &&
           core_timeline_reached(pool, (struct kvp_after){job->timeline, job->value});
}

bool core_job_zeroes(const struct kvp_core *core, uint32_t slot)
{
    struct kvp_job_view view;
    return kvp_job_at(core->ledger, slot, &view) == KVP_OK && view.spec.kind == KVPOOL__V1__JOB_KIND__JOB_ZERO;
}

bool core_session_has_jobs(const struct kvp_core *core, struct kvp_session_id session)
{
    for (uint32_t i = 0; core->open_jobs != 0 && i < KVP_JOBS_MAX; i++) {
        if (core->jobs[i].id.generation != 0 && same_session(core->jobs[i].session, session))
            return true;
    }
    return false;
}

/* ---- taking ------------------------------------------------------------------------------------------------------ */

enum kvp_status core_job_take(struct kvp_core *core, struct kvp_job_id id, const Kvpool__V1__ExecJobRequest *request)
{
    struct job_state *job = &core->jobs[id.slot];
    struct pool_state *pool = &core->pools[(uint32_t)request->pool_id];
    CORE_ASSERT(job->id.generation == 0);
    size_t n = kvpool__v1__exec_job_request__get_packed_size(request);
    uint8_t *packed = malloc(n + 1);
    if (packed == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for a job of %zu bytes", n);
    kvpool__v1__exec_job_request__pack(request, packed);
    *job = (struct job_state){
        .id = id,
        .session = session_id(request->session_id),
        .pool = pool->id,
        .executor = pool->slabs[request->rank].executor,
        .rank = request->rank,
        .buffer = request->buffer,
        .timeline = request->done_timeline,
        .value = request->done_value,
        .every_rank = request->kind == KVPOOL__V1__JOB_KIND__JOB_ZERO,
        .packed = packed,
        .packed_bytes = n,
    };
    core->open_jobs++;
    core->unsent_jobs++;
    return KVP_OK;
}

void core_job_forget(struct kvp_core *core, struct kvp_job_id id)
{
    struct job_state *job = &core->jobs[id.slot];
    CORE_ASSERT(job->id.generation == id.generation && job->sent == 0);
    free(job->packed);
    memset(job, 0, sizeof(*job));
    core->open_jobs--;
    core->unsent_jobs--;
}

/* ---- ends -------------------------------------------------------------------------------------------------------- */

/* Only where no executor writes any more. */
static void write_late(struct kvp_core *core)
{
    for (uint32_t i = 0; i < core->n_late;) {
        struct late_value *late = &core->late[i];
        struct pool_state *pool = &core->pools[late->pool.slot];
        bool there = pool->id.generation == late->pool.generation;
        if (there && timeline_busy(core, late->pool, late->timeline)) {
            i++;
            continue;
        }
        if (there && __atomic_load_n(&pool->timelines[late->timeline].value, __ATOMIC_ACQUIRE) < late->value)
            __atomic_store_n(&pool->timelines[late->timeline].value, late->value, __ATOMIC_RELEASE);
        *late = core->late[--core->n_late];
    }
}

static void late_add(struct kvp_core *core, struct pool_state *pool, const struct job_state *job,
                     enum kvp_status status)
{
    kvp_timeline_lose(&pool->timelines[job->timeline], job->value - 1, job->value, (uint64_t)-status);
    for (uint32_t i = 0; i < core->n_late; i++) {
        struct late_value *late = &core->late[i];
        if (late->pool.slot == job->pool.slot && late->timeline == job->timeline) {
            late->value = late->value > job->value ? late->value : job->value;
            return;
        }
    }
    CORE_ASSERT(core->n_late < KVP_JOBS_MAX); /* one a timeline that has a job open or just ended */
    core->late[core->n_late++] = (struct late_value){job->pool, job->timeline, job->value};
}

static void tell_ops(struct kvp_core *core, struct kvp_job_id id, enum kvp_status status, const char *text)
{
    for (struct op *op = core->ops; op != NULL; op = op->next) {
        if (op->job.slot != id.slot || op->job.generation != id.generation)
            continue;
        op->result = status;
        snprintf(op->text, sizeof(op->text), "%s", text);
    }
    core_wake(core, WAIT_JOB, id.slot);
    core_wake(core, WAIT_SENT, id.slot);
}

/* Did it zero pages, on every slab? Of what an earlier daemon gave an executor it is not known which slab that was. */
static bool zeroed_all(const struct kvp_core *core, const struct pool_state *pool, const struct job_state *job)
{
    bool last = job->packed != NULL ? job->rank + 1 == pool->n_slabs : pool->n_slabs == 1;
    return last && core_job_zeroes(core, job->id.slot);
}

static void end(struct kvp_core *core, struct job_state *job, enum kvp_status status, const char *text)
{
    uint32_t slots[KVP_BATCH_MAX], n = 0;
    struct pool_state *pool = pool_of(core, job);
    struct kvp_job_id id = job->id;
    uint32_t slot = kvp_job_first(core->ledger, id);
    for (; slot != KVP_NONE && n < KVP_BATCH_MAX; slot = kvp_job_next(core->ledger, id, slot))
        slots[n++] = slot;
    kvp_txn_begin(core->ledger);
    enum kvp_status closed = KVP_OK;
    if (status == KVP_OK && pool != NULL && zeroed_all(core, pool, job))
        closed = core_zero_clean(core, pool, id);
    if (closed == KVP_OK)
        closed = kvp_job_close(core->ledger, id, status == KVP_OK);
    if (closed == KVP_OK)
        kvp_txn_commit(core->ledger);
    else
        kvp_txn_abort(core->ledger);
    CORE_ASSERT(closed == KVP_OK);
    for (uint32_t i = 0; pool != NULL && i < n; i++)
        core_publish_seq(core, pool, slots[i]);
    struct job_state ended = *job;
    core->open_jobs--;
    core->unsent_jobs -= job->sent == 0;
    core->executors[job->executor].jobs_done++;
    memset(job, 0, sizeof(*job));
    if (status != KVP_OK && pool != NULL)
        late_add(core, pool, &ended, status);
    write_late(core);
    free(ended.packed);
    if (status != KVP_OK)
        core_log(core, 4, "a job of session %llx failed: %s", (unsigned long long)ID_WORD(ended.session), text);
    tell_ops(core, id, status, text);
    if (core->ending != 0)
        core_due(core, core->now_ms);
}

/* A job of every slab goes on with the next one. @return false: that was the last */
static bool next_rank(struct kvp_core *core, struct job_state *job)
{
    const struct pool_state *pool = pool_of(core, job);
    if (!job->every_rank || pool == NULL || job->rank + 1 >= pool->n_slabs)
        return false;
    job->rank++;
    job->executor = pool->slabs[job->rank].executor;
    job->sent = 0;
    core->unsent_jobs++;
    return true;
}

/* Zeroing is never taken for done: only the last slab's part of it has a value, and it can be done again. */
static bool done_by_value(struct kvp_core *core, const struct job_state *job)
{
    const struct pool_state *pool = pool_of(core, job);
    return pool != NULL && job->value != 0 && !core_job_zeroes(core, job->id.slot) &&
           core_timeline_reached(pool, (struct kvp_after){job->timeline, job->value}) &&
           __atomic_load_n(&pool->timelines[job->timeline].error, __ATOMIC_ACQUIRE) == 0;
}

/* A job of an earlier daemon that no executor knows. */
static void end_unknown(struct kvp_core *core, struct job_state *job)
{
    end(core, job, done_by_value(core, job) ? KVP_OK : KVP_EDEVICE,
        "the daemon was killed before an executor had this work");
}

/* An answer to core_jobs_ask. */
static void answered(struct kvp_core *core, struct job_state *job, uint32_t executor, enum kvp_status status,
                     const char *text)
{
    if ((job->asked & 1u << executor) == 0)
        return;
    if (status == KVP_ENOENT)
        job->asked &= ~(1u << executor);
    else
        end(core, job, status, text);
}

void core_job_reply(struct kvp_core *core, uint32_t executor, uint64_t low, enum kvp_status status, const char *text)
{
    uint32_t slot = (uint32_t)low & 0xffff;
    if (slot >= KVP_JOBS_MAX)
        return;
    struct job_state *job = &core->jobs[slot];
    if (job->id.generation == (uint32_t)(low >> 16) && job->asked != 0) {
        answered(core, job, executor, status, text);
        return;
    }
    if (job->id.generation != (uint32_t)(low >> 16) || job->executor != executor ||
        job->sent != core->executors[executor].starts)
        return;
    if (status == KVP_OK && next_rank(core, job))
        return;
    if (status == KVP_ENOENT && job->packed == NULL) /* said late: it was taken for the one that has it */
        end_unknown(core, job);
    else
        end(core, job, status, text);
}

void core_jobs_fail_pool(struct kvp_core *core, struct kvp_pool_id pool, enum kvp_status status, const char *why)
{
    for (uint32_t i = 0; i < KVP_JOBS_MAX; i++) {
        struct job_state *job = &core->jobs[i];
        if (job->id.generation != 0 && job->pool.slot == pool.slot && job->pool.generation == pool.generation)
            end(core, job, status, why);
    }
}

void core_jobs_executor_gone(struct kvp_core *core, uint32_t executor)
{
    for (uint32_t i = 0; i < KVP_JOBS_MAX; i++) {
        struct job_state *job = &core->jobs[i];
        job->asked &= ~(1u << executor);
        if (job->id.generation == 0 || job->executor != executor || job->sent == 0)
            continue;
        job->sent = 0;
        core->unsent_jobs++;
        if (done_by_value(core, job))
            end(core, job, KVP_OK, "");
        else if (job->packed == NULL)
            end(core, job, KVP_EDEVICE, "the executor died over work that an earlier daemon gave it");
        else if (++job->attempts >= KVP_JOB_ATTEMPTS)
            end(core, job, KVP_EDEVICE, "the executor died over this job again and again");
    }
}

/* ---- an earlier daemon's ----------------------------------------------------------------------------------------- */

bool core_jobs_ask(struct kvp_core *core)
{
    bool any = false;
    for (uint32_t slot = 0; slot < KVP_JOBS_MAX; slot++) {
        struct kvp_job_view view;
        struct job_state *job = &core->jobs[slot];
        if (kvp_job_at(core->ledger, slot, &view) != KVP_OK)
            continue;
        *job = (struct job_state){.id = view.id,
                                  .session = view.spec.session,
                                  .pool = view.spec.pool,
                                  .timeline = view.spec.timeline,
                                  .value = view.spec.value};
        core->open_jobs++;
        core->unsent_jobs++;
        const struct pool_state *pool = pool_of(core, job);
        for (uint32_t rank = 0; pool != NULL && rank < pool->n_slabs; rank++) {
            uint32_t executor = pool->slabs[rank].executor;
            if (core->executors[executor].state != EXECUTOR_READY || (job->asked & 1u << executor) != 0)
                continue;
            Kvpool__V1__ExecJobRequest question = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
            question.job = ID_WORD(job->id);
            job->asked |= 1u << executor;
            any = true;
            core_exec_send(core, executor, KVPOOL__V1__METHOD__METHOD_EXEC_JOB,
                           EXEC_TAG(TAG_JOB, (uint64_t)job->id.generation << 16 | job->id.slot), &question.base, NULL,
                           0);
        }
    }
    return any;
}

void core_jobs_asked(struct kvp_core *core)
{
    for (uint32_t slot = 0; slot < KVP_JOBS_MAX; slot++) {
        struct job_state *job = &core->jobs[slot];
        if (job->id.generation == 0 || job->packed != NULL || job->sent != 0)
            continue;
        if (job->asked == 0) {
            end_unknown(core, job);
            continue;
        }
        job->executor = (uint32_t)__builtin_ctz(job->asked); /* who has not said no has it */
        job->asked = 0;
        job->sent = core->executors[job->executor].starts;
        core->unsent_jobs--;
    }
}

/* ---- sending ----------------------------------------------------------------------------------------------------- */

/* An earlier job of the same timeline must be with the same executor, or ended. */
static bool its_turn(const struct kvp_core *core, const struct job_state *job)
{
    for (uint32_t i = 0; i < KVP_JOBS_MAX; i++) {
        const struct job_state *other = &core->jobs[i];
        if (same_timeline(other, job->pool, job->timeline) && other->value < job->value &&
            (other->sent == 0 || other->executor != job->executor))
            return false;
    }
    return true;
}

static enum kvp_status send_job(struct kvp_core *core, struct job_state *job)
{
    struct pool_state *pool = pool_of(core, job);
    if (pool == NULL || core_exec_adopt(core, pool, job->rank) != KVP_OK)
        return core_refuse(core, KVP_ELOST, "the pool's memory is lost");
    struct executor *executor = &core->executors[job->executor];
    if (job->buffer != 0) {
        struct buffer_state *buffer;
        TRY(core_buffer(core, job->session, job->buffer, &buffer));
        if (buffer->imported[job->executor] != executor->starts)
            core_buffer_import(core, job->executor, job->session, job->buffer, buffer, EXEC_TAG(TAG_IMPORT, 0));
    }
    Kvpool__V1__ExecJobRequest *request = kvpool__v1__exec_job_request__unpack(NULL, job->packed_bytes, job->packed);
    if (request == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory to send a job of %zu bytes", job->packed_bytes);
    request->rank = job->rank;
    bool more_ranks = job->every_rank && job->rank + 1 < pool->n_slabs;
    /* an executor may have died between the value and its answer, and later values may be there: it must not fall */
    if (more_ranks || core_timeline_reached(pool, (struct kvp_after){job->timeline, job->value}))
        request->done_value = 0;
    job->sent = executor->starts;
    core->unsent_jobs--;
    core_exec_send(core, job->executor, KVPOOL__V1__METHOD__METHOD_EXEC_JOB,
                   EXEC_TAG(TAG_JOB, (uint64_t)job->id.generation << 16 | job->id.slot), &request->base, NULL, 0);
    kvpool__v1__exec_job_request__free_unpacked(request, NULL);
    core_wake(core, WAIT_SENT, job->id.slot);
    return KVP_OK;
}

/* One round over the jobs that are not sent. @return whether another one may find more to do */
static bool pump_once(struct kvp_core *core)
{
    bool again = false;
    for (uint32_t i = 0; i < KVP_JOBS_MAX && core->unsent_jobs != 0; i++) {
        struct job_state *job = &core->jobs[i];
        uint32_t executor;
        if (job->id.generation == 0 || job->sent != 0)
            continue;
        enum kvp_status status = core_exec_need(core, core->executors[job->executor].device, &executor);
        if (status == KVP_WAIT)
            continue;
        if (status == KVP_OK && !its_turn(core, job))
            continue;
        if (status == KVP_OK)
            status = send_job(core, job);
        if (status != KVP_OK)
            end(core, job, status, core->error_text);
        again = true;
    }
    return again;
}

void core_jobs_pump(struct kvp_core *core)
{
    while (core->unsent_jobs != 0 && pump_once(core))
        ;
}

enum kvp_status core_job_await(struct kvp_core *core, struct turn *turn, struct kvp_job_id id, uint32_t timeline,
                               uint64_t value)
{
    bool at_intent = turn->call->caller.door == KVP_DOOR_SOCKET;
    struct op *op;
    if (at_intent) {
        core_jobs_pump(core);
        if (core_job_sent(core, id))
            return KVP_OK;
    }
    TRY(core_op(core, turn, &op));
    op->job = id;
    op->job_timeline = timeline;
    op->job_value = value;
    op->result = KVP_OK;
    return core_wait(core, turn, at_intent ? WAIT_SENT : WAIT_JOB, id.slot);
}
