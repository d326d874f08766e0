/**
 * Jobs: work that an executor has in hand, and the sequences that wait for it.
 *
 *   FREE ──open──► OPEN ──add …──► OPEN ──close──► FREE
 *
 * A sequence waits for one job at a time and can't be changed, closed or transferred meanwhile; its job outlives its
 * session. A job seals at most KVP_CALL_PAGES_MAX pages of at most KVP_BATCH_MAX sequences, so that its end fits into
 * one transaction.
 */
#include "internal.h"

static enum kvp_status find_job(const struct kvp_ledger *ledger, struct kvp_job_id job,
                                const struct block_job **ret_job)
{
    if (job.slot >= KVP_JOBS_MAX || job.generation == 0)
        return KVP_ENOENT;
    const struct block_job *found = &jobs_of(ledger)[job.slot];
    if (!found->open || found->generation != job.generation)
        return KVP_ENOENT;
    *ret_job = found;
    return KVP_OK;
}

static struct kvp_pool_id pool_of(const struct block_job *job)
{
    return (struct kvp_pool_id){job->pool_slot, job->pool_generation};
}

enum kvp_status kvp_job_open(struct kvp_ledger *ledger, const struct kvp_job_spec *spec, struct kvp_job_id *ret_job)
{
    const struct block_session *session;
    const struct pool_map *m;
    if (spec->session.generation != 0)
        TRY(find_session(ledger, spec->session, &session));
    if (spec->pool.generation != 0)
        TRY(map_live_pool(ledger, spec->pool, &m));
    const struct block_job *jobs = jobs_of(ledger);
    uint32_t slot = 0;
    while (slot < KVP_JOBS_MAX && jobs[slot].open)
        slot++;
    if (slot == KVP_JOBS_MAX)
        return KVP_ELIMIT;
    TRY(txn_room(ledger, ROOM_SMALL));
    const struct block_job *job = &jobs[slot];
    uint32_t generation = next_generation(job->generation);
    put32(ledger, &job->generation, generation);
    put32(ledger, &job->kind, spec->kind);
    put32(ledger, &job->timeline, spec->timeline);
    put32(ledger, &job->session_slot, spec->session.slot);
    put32(ledger, &job->session_generation, spec->session.generation);
    put32(ledger, &job->pool_slot, spec->pool.slot);
    put32(ledger, &job->pool_generation, spec->pool.generation);
    put64(ledger, &job->call_id, spec->call_id);
    put64(ledger, &job->value, spec->value);
    put32(ledger, &job->first, 0);
    put32(ledger, &job->last, 0);
    put32(ledger, &job->sequences, 0);
    put32(ledger, &job->seal_pages, 0);
    put32(ledger, &job->open, 1);
    *ret_job = (struct kvp_job_id){slot, generation};
    return KVP_OK;
}

enum kvp_status kvp_job_add(struct kvp_ledger *ledger, struct kvp_job_id job, struct kvp_seq_id seq, uint32_t tokens)
{
    const struct block_job *record;
    const struct block_seq *found;
    const struct pool_map *m;
    TRY(find_job(ledger, job, &record));
    TRY(map_live_pool(ledger, pool_of(record), &m));
    TRY(find_seq(m, seq, &found));
    TRY(seq_changeable(m, found));
    if (tokens < found->written || tokens > found->reserved)
        return KVP_EINVAL;
    uint32_t seals = tokens / m->pool->page_tokens - found->written / m->pool->page_tokens;
    if (record->sequences >= KVP_BATCH_MAX || seals > KVP_CALL_PAGES_MAX ||
        record->seal_pages > KVP_CALL_PAGES_MAX - seals)
        return KVP_ELIMIT;
    TRY(txn_room(ledger, ROOM_SMALL));
    uint32_t last = linked_slot(m, record->last);
    put32(ledger, last == KVP_NONE ? &record->first : &m->seqs[last].job_next, seq.slot + 1);
    put32(ledger, &record->last, seq.slot + 1);
    put32(ledger, &record->sequences, record->sequences + 1);
    put32(ledger, &record->seal_pages, record->seal_pages + seals);
    put32(ledger, &found->job, job.slot + 1);
    put32(ledger, &found->job_next, 0);
    put32(ledger, &found->job_tokens, tokens);
    return KVP_OK;
}

static struct kvp_job_view view_of(const struct block_job *job, uint32_t slot)
{
    return (struct kvp_job_view){
        .id = {slot, job->generation},
        .spec = {.kind = job->kind,
                 .session = {job->session_slot, job->session_generation},
                 .pool = pool_of(job),
                 .call_id = job->call_id,
                 .timeline = job->timeline,
                 .value = job->value},
    };
}

enum kvp_status kvp_job_get(const struct kvp_ledger *ledger, struct kvp_job_id job, struct kvp_job_view *ret_view)
{
    const struct block_job *record;
    TRY(find_job(ledger, job, &record));
    *ret_view = view_of(record, job.slot);
    return KVP_OK;
}

enum kvp_status kvp_job_at(const struct kvp_ledger *ledger, uint32_t slot, struct kvp_job_view *ret_view)
{
    if (slot >= KVP_JOBS_MAX || !jobs_of(ledger)[slot].open)
        return KVP_ENOENT;
    *ret_view = view_of(&jobs_of(ledger)[slot], slot);
    return KVP_OK;
}

/* The slot of a link, if that sequence waits for the job. */
static uint32_t waiting_slot(const struct pool_map *m, uint32_t job_slot, uint32_t link)
{
    uint32_t slot = linked_slot(m, link);
    bool waits = slot != KVP_NONE && m->seqs[slot].state == KVP_SEQ_OPEN && m->seqs[slot].job == job_slot + 1;
    return waits ? slot : KVP_NONE;
}

uint32_t kvp_job_first(const struct kvp_ledger *ledger, struct kvp_job_id job)
{
    const struct block_job *record;
    const struct pool_map *m;
    if (find_job(ledger, job, &record) != KVP_OK || map_pool(ledger, pool_of(record), &m) != KVP_OK)
        return KVP_NONE;
    return waiting_slot(m, job.slot, record->first);
}

uint32_t kvp_job_next(const struct kvp_ledger *ledger, struct kvp_job_id job, uint32_t slot)
{
    const struct block_job *record;
    const struct pool_map *m;
    if (find_job(ledger, job, &record) != KVP_OK || map_pool(ledger, pool_of(record), &m) != KVP_OK ||
        slot >= m->pool->max_sequences || m->seqs[slot].job != job.slot + 1)
        return KVP_NONE;
    return waiting_slot(m, job.slot, m->seqs[slot].job_next);
}

enum kvp_status kvp_job_close(struct kvp_ledger *ledger, struct kvp_job_id job, bool written)
{
    const struct block_job *record;
    const struct pool_map *m;
    TRY(find_job(ledger, job, &record));
    if (record->sequences > KVP_BATCH_MAX || record->seal_pages > KVP_CALL_PAGES_MAX)
        return KVP_ECORRUPT;
    TRY(txn_room(ledger,
                 2 * ROOM_SMALL + STORES_SEAL * (uint64_t)record->seal_pages + 32 * (uint64_t)record->sequences));
    if (record->sequences != 0 && map_pool(ledger, pool_of(record), &m) != KVP_OK)
        return KVP_ECORRUPT;
    uint32_t link = record->first;
    for (uint32_t i = 0; i < record->sequences; i++) {
        uint32_t slot = waiting_slot(m, job.slot, link);
        if (slot == KVP_NONE || m->seqs[slot].row_pages > m->pool->row_pages)
            return KVP_ECORRUPT;
        const struct block_seq *seq = &m->seqs[slot];
        bool changed;
        if (written && m->pool->state == KVP_POOL_LIVE)
            TRY(observe_seq(ledger, m, seq, seq->job_tokens, &changed));
        link = seq->job_next;
        put32(ledger, &seq->job, 0);
        put32(ledger, &seq->job_next, 0);
        put32(ledger, &seq->job_tokens, 0);
    }
    put32(ledger, &record->open, 0);
    return KVP_OK;
}
