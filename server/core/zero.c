/**
 * Pages that came to another tenant are zeroed before anybody is told of them.
 *
 *   a call takes pages ─► committed; some are dirty, by the ledger ─► JOB_ZERO: an executor zeroes them on every slab
 *                                                                              │ its end: they are clean, by the ledger
 *                                                     the call is answered ◄───┘
 *
 * Until then the sequences have the job open, so that their rows stay as they are. Nothing else is remembered: the dirty
 * pages of a job are those that the rows of its sequences hold, and a daemon that finds such rows zeroes them when their
 * call is repeated, or the next one comes. The tokens that are counted as written are not touched: a dirty page has none.
 *
 * A job zeroes the first KVP_CALL_PAGES_MAX of them, in the order of its sequences and of their rows; more take another.
 */
#include "op.h"

/* Dirty pages of a row, the first `room` of them. @param ret_pages  NULL: they are counted */
static uint32_t dirty_of(const struct kvp_core *core, const struct pool_state *pool, uint32_t slot, uint32_t room,
                         uint32_t *ret_pages)
{
    struct kvp_seq_view view;
    struct kvp_page_view page;
    uint32_t n = 0;
    if (kvp_seq_at(core->ledger, pool->id, slot, &view) != KVP_OK)
        return 0;
    const uint32_t *row = kvp_seq_row(core->ledger, pool->id, slot);
    for (uint32_t i = 0; i < view.row_pages && n < room; i++) {
        if (kvp_page_get(core->ledger, pool->id, row[i], &page) != KVP_OK || !page.dirty)
            continue;
        if (ret_pages != NULL)
            ret_pages[n] = row[i];
        n++;
    }
    return n;
}

bool core_zero_due(const struct kvp_core *core, const struct pool_state *pool)
{
    struct kvp_pool_view view;
    return kvp_pool_get(core->ledger, pool->id, &view) == KVP_OK && view.cache.dirty_pages != 0;
}

enum kvp_status core_zero_clean(struct kvp_core *core, const struct pool_state *pool, struct kvp_job_id id)
{
    uint32_t room = KVP_CALL_PAGES_MAX, slot = kvp_job_first(core->ledger, id);
    for (; slot != KVP_NONE && room != 0; slot = kvp_job_next(core->ledger, id, slot)) {
        struct kvp_seq_view view;
        struct kvp_page_view page;
        TRY(kvp_seq_at(core->ledger, pool->id, slot, &view));
        const uint32_t *row = kvp_seq_row(core->ledger, pool->id, slot);
        for (uint32_t i = 0; i < view.row_pages && room != 0; i++) {
            TRY(kvp_page_get(core->ledger, pool->id, row[i], &page));
            if (!page.dirty)
                continue;
            TRY(kvp_page_cleaned(core->ledger, pool->id, row[i]));
            room--;
        }
    }
    return KVP_OK;
}

/* ---- the job ----------------------------------------------------------------------------------------------------- */

/* In the transaction that opens it: the sequences that have dirty pages, and those. KVP_ENOENT: there are none. */
static enum kvp_status add_dirty(struct kvp_core *core, const struct pool_state *pool, struct kvp_job_id id,
                                 const struct kvp_seq_view *views, size_t n, Kvpool__V1__ExecJobRequest *job)
{
    uint32_t total = 0;
    for (size_t i = 0; i < n && total < KVP_CALL_PAGES_MAX; i++)
        total += dirty_of(core, pool, views[i].id.slot, KVP_CALL_PAGES_MAX - total, NULL);
    if (total == 0)
        return KVP_ENOENT;
    job->zero_pages = core_alloc(core, total, sizeof(uint32_t));
    if (job->zero_pages == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the job");
    for (size_t i = 0; i < n && job->n_zero_pages < total; i++) {
        uint32_t pages = dirty_of(core, pool, views[i].id.slot, total - (uint32_t)job->n_zero_pages,
                                  job->zero_pages + job->n_zero_pages);
        if (pages == 0)
            continue;
        enum kvp_status status = kvp_job_add(core->ledger, id, views[i].id, views[i].written);
        if (status != KVP_OK)
            return core_seq_refuse(core, pool, status, "seqs", i, ID_WORD(views[i].id));
        job->n_zero_pages += pages;
    }
    return KVP_OK;
}

static enum kvp_status open_job(struct kvp_core *core, const struct turn *turn, struct pool_state *pool,
                                uint32_t attachment, const struct kvp_seq_view *views, size_t n,
                                struct kvp_job_id *ret_job)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct kvp_job_spec spec = {.kind = KVPOOL__V1__JOB_KIND__JOB_ZERO,
                                .session = turn->session.id,
                                .pool = pool->id,
                                .call_id = turn->call_id,
                                .timeline = attachment * KVP_TIMELINES_MAX,
                                .value = core_job_next_value(core, pool, attachment)};
    enum kvp_status status = kvp_job_open(core->ledger, &spec, ret_job);
    if (status == KVP_ELIMIT)
        return core_refuse(core, KVP_EAGAIN, "jobs: %d are under way, the most there may be", KVP_JOBS_MAX);
    TRY(status);
    TRY(add_dirty(core, pool, *ret_job, views, n, &job));
    job.job = ID_WORD(*ret_job);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_ZERO;
    job.session_id = ID_WORD(turn->session.id);
    job.pool_id = ID_WORD(pool->id);
    job.done_timeline = spec.timeline;
    job.done_value = spec.value;
    return core_job_take(core, *ret_job, &job);
}

enum kvp_status core_zero(struct kvp_core *core, struct turn *turn, struct pool_state *pool, uint32_t attachment,
                          const struct kvp_seq_view *views, size_t n)
{
    struct kvp_job_id id;
    struct op *op;
    if (!core_zero_due(core, pool))
        return KVP_OK;
    TRY(core_op(core, turn, &op));
    op->zeroing = true;
    for (size_t i = 0; i < n; i++) {
        if (views[i].job != KVP_NONE && core_job_zeroes(core, views[i].job))
            return core_wait(core, turn, WAIT_JOB, views[i].job);
    }
    kvp_txn_begin(core->ledger);
    enum kvp_status status = open_job(core, turn, pool, attachment, views, n, &id);
    if (status != KVP_OK) {
        core_abort(core, status);
        return status == KVP_ENOENT ? KVP_OK : status;
    }
    kvp_txn_commit(core->ledger);
    op->job = id;
    op->result = KVP_OK;
    return core_wait(core, turn, WAIT_JOB, id.slot);
}

enum kvp_status core_zero_ended(struct kvp_core *core, struct turn *turn)
{
    struct op *op = turn->op;
    if (op == NULL || !op->zeroing || op->job.generation == 0)
        return KVP_OK;
    op->job = (struct kvp_job_id){0, 0};
    if (op->result != KVP_OK)
        return core_refuse(core, op->result, "pages of another tenant could not be zeroed: %s", op->text);
    return KVP_OK;
}
