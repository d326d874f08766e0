/**
 * The audit, from the top: header and log, sessions, pools (audit_pool.c), regions (region.c), jobs.
 *
 * It believes nothing: each index is checked before it is followed, each list is walked for as many steps as it can
 * have entries. It writes to its scratch memory alone, and costs a visit to every page record and row id in use.
 */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void audit_report(struct audit *audit, const char *format, ...)
{
    audit->violations++;
    if (audit->report == NULL)
        return;
    char text[192];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    audit->report(audit->arg, text);
}

static void audit_header(struct audit *audit)
{
    const struct block_header *header = header_of(audit->ledger);
    if (header->magic != KVP_LEDGER_MAGIC || header->version != KVP_LEDGER_VERSION ||
        header->root_bytes != ROOT_BYTES || header->bytes != audit->ledger->bytes || header->epoch == 0)
        audit_report(audit, "header: a constant is not what it was made with");
    if (audit->ledger->in_txn)
        audit_report(audit, "log: a transaction is open");
    else if (header->log_count != 0)
        audit_report(audit, "log: %llu entries outside a transaction", (unsigned long long)header->log_count);
}

/* Whether a session's entry for a pool is an attachment that names the session. */
static bool attachment_agrees(const struct kvp_ledger *ledger, uint32_t session_slot, uint32_t pool_slot)
{
    const struct block_session *session = &sessions_of(ledger)[session_slot];
    uint32_t link = session->attached[pool_slot];
    if (link > KVP_ATTACHMENTS_MAX || pools_of(ledger)[pool_slot].state == KVP_POOL_FREE ||
        check_pool_record(ledger, pool_slot) != NULL)
        return false;
    const struct pool_map *m = pool_at(ledger, pool_slot);
    const struct block_attachment *attachment = &m->attachments[link - 1];
    return attachment->state != KVP_ATTACHMENT_FREE && attachment->session_slot == session_slot &&
           attachment->session_generation == session->generation;
}

static void audit_session(struct audit *audit, uint32_t slot)
{
    const struct block_session *session = &sessions_of(audit->ledger)[slot];
    uint32_t entries = 0;
    for (uint32_t pool = 0; pool < KVP_POOLS_MAX; pool++) {
        if (session->attached[pool] == 0)
            continue;
        entries++;
        if (session->state == KVP_SESSION_FREE || !attachment_agrees(audit->ledger, slot, pool))
            audit_report(audit, "session %u: its attachment in pool %u is not its own", slot, pool);
    }
    if (session->state == KVP_SESSION_FREE)
        return;
    if (session->state > KVP_SESSION_ENDING || session->generation == 0)
        audit_report(audit, "session %u: state %u generation %u can not be", slot, session->state, session->generation);
    if (session->kind != KVP_SESSION_SOCKET && session->kind != KVP_SESSION_LEASE)
        audit_report(audit, "session %u: kind %u can not be", slot, session->kind);
    if (entries != session->attachments)
        audit_report(audit, "session %u: counts %u attachments, has %u", slot, session->attachments, entries);
    if (session->state == KVP_SESSION_ENDING && entries == 0)
        audit_report(audit, "session %u: ending, with nothing left to release", slot);
}

/* Each of a session's buffers has a number of its own, and a place that can be. */
static void audit_buffers(struct audit *audit)
{
    static_assert(KVP_BUFFERS_MAX <= 64, "a bit a buffer");
    uint64_t seen[KVP_SESSIONS_MAX] = {0};
    struct kvp_buffer_view buffer;
    for (uint32_t i = 0; i < KVP_BUFFERS_ALL_MAX; i++) {
        if (kvp_buffer_at(audit->ledger, i, &buffer) != KVP_OK)
            continue;
        if (buffer.number == 0 || buffer.number > KVP_BUFFERS_MAX || buffer.bytes == 0 ||
            buffer.offset > UINT64_MAX - buffer.bytes || buffers_of(audit->ledger)[i].device[7] >> 56 != 0) {
            audit_report(audit, "buffer record %u: number %u, or its place, can not be", i, buffer.number);
            continue;
        }
        if (seen[buffer.session.slot] >> (buffer.number - 1) & 1)
            audit_report(audit, "session %u: has two buffers %u", buffer.session.slot, buffer.number);
        seen[buffer.session.slot] |= 1ull << (buffer.number - 1);
    }
}

/* Runs after the pools: job_sequences is counted. */
static void audit_job(struct audit *audit, uint32_t slot)
{
    const struct block_job *job = &jobs_of(audit->ledger)[slot];
    if (!job->open) {
        if (audit->job_sequences[slot] != 0)
            audit_report(audit, "job %u: not open, but %u sequences wait for it", slot, audit->job_sequences[slot]);
        return;
    }
    if (job->generation == 0 || job->seal_pages > KVP_CALL_PAGES_MAX || job->sequences > KVP_BATCH_MAX)
        audit_report(audit, "job %u: a count can not be", slot);
    if (job->sequences != audit->job_sequences[slot])
        audit_report(audit, "job %u: counts %u sequences, %u wait for it", slot, job->sequences,
                     audit->job_sequences[slot]);
    const struct pool_map *m;
    struct kvp_pool_id pool = {job->pool_slot, job->pool_generation};
    if (pool.generation == 0 && job->sequences == 0)
        return;
    if (map_pool(audit->ledger, pool, &m) != KVP_OK || check_pool_record(audit->ledger, pool.slot) != NULL) {
        audit_report(audit, "job %u: its pool is not there", slot);
        return;
    }
    uint32_t link = job->first, last = 0, steps = 0;
    for (; steps < job->sequences && linked_slot(m, link) != KVP_NONE; steps++) {
        const struct block_seq *seq = &m->seqs[linked_slot(m, link)];
        if (seq->state != KVP_SEQ_OPEN || seq->job != slot + 1)
            audit_report(audit, "job %u: sequence %u of its list does not wait for it", slot, link - 1);
        last = link;
        link = seq->job_next;
    }
    if (steps != job->sequences || link != 0 || last != job->last)
        audit_report(audit, "job %u: its list is not closed after %u sequences", slot, job->sequences);
}

size_t kvp_audit_scratch_bytes(const struct kvp_ledger *ledger)
{
    uint64_t pages = 0, sequences = 0;
    const struct block_pool *pools = pools_of(ledger);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        if (pools[slot].state == KVP_POOL_FREE || check_pool_record(ledger, slot) != NULL)
            continue;
        pages = pools[slot].pages > pages ? pools[slot].pages : pages;
        sequences = pools[slot].max_sequences > sequences ? pools[slot].max_sequences : sequences;
    }
    return (KVP_JOBS_MAX + AUDIT_NAMES) * sizeof(uint32_t) + KVP_REGIONS_MAX +
           2 * ALIGN_UP(pages * sizeof(uint32_t), 8) + ALIGN_UP(sequences, 8);
}

uint64_t kvp_audit(const struct kvp_ledger *ledger, void *scratch, void (*report)(void *arg, const char *violation),
                   void *arg)
{
    struct audit audit = {.ledger = ledger, .report = report, .arg = arg, .job_sequences = scratch};
    audit.region_names = audit.job_sequences + KVP_JOBS_MAX;
    audit.region_marks = (uint8_t *)(audit.region_names + AUDIT_NAMES);
    memset(audit.job_sequences, 0, (KVP_JOBS_MAX + AUDIT_NAMES) * sizeof(uint32_t) + KVP_REGIONS_MAX);
    audit_header(&audit);
    for (uint32_t slot = 0; slot < KVP_SESSIONS_MAX; slot++)
        audit_session(&audit, slot);
    audit_buffers(&audit);
    for (uint32_t slot = 0; slot < KVP_POOLS_MAX; slot++) {
        const struct block_pool *pool = &pools_of(ledger)[slot];
        const char *why = check_pool_record(ledger, slot);
        if (why != NULL)
            audit_report(&audit, "pool %u: %s", slot, why);
        if (why != NULL || pool->state == KVP_POOL_FREE)
            continue;
        audit.page_marks = (uint32_t *)(void *)(audit.region_marks + KVP_REGIONS_MAX);
        audit.page_children = audit.page_marks + ALIGN_UP(pool->pages * sizeof(uint32_t), 8) / sizeof(uint32_t);
        audit.seq_marks = (uint8_t *)audit.page_children + ALIGN_UP(pool->pages * sizeof(uint32_t), 8);
        audit_pool(&audit, slot);
        audit_pool_regions(&audit, slot);
    }
    audit_regions(&audit);
    for (uint32_t slot = 0; slot < KVP_JOBS_MAX; slot++)
        audit_job(&audit, slot);
    return audit.violations;
}
