/**
 * The audit of one pool: sequences and rows, lists, keys, attachments; then its pages (audit_cache.c).
 *
 * Rows are walked first (they count references), lists next, pages last (they compare).
 */
#include "pool_audit.h"

#include <string.h>

/* ---- sequences -----------------------------------------------------------------------------------------------------
 */

static void count_reference(struct pool_audit *a, uint32_t slot, uint32_t page)
{
    if (!is_used_page(&a->m, page))
        REPORT(a, "sequence", slot, "holds page %u, which was never handed out", page);
    else
        a->audit->page_marks[page]++;
}

static void audit_open_row(struct pool_audit *a, uint32_t slot)
{
    const struct block_pool *pool = a->m.pool;
    const struct block_seq *seq = &a->m.seqs[slot];
    const uint32_t *row = row_of(&a->m, slot);
    uint32_t sealed = seq->written / pool->page_tokens;
    for (uint32_t i = 0; i < seq->row_pages; i++) {
        if (!is_used_page(&a->m, row[i]))
            continue;
        if (PAGE_SEALED(a->m.pages[row[i]]) != (i < sealed))
            REPORT(a, "sequence", slot, "page %u is %s", row[i],
                   i < sealed ? "full and not sealed" : "sealed too early");
        if (i < sealed)
            continue;
        if (a->audit->page_marks[row[i]] & MARK_WRITABLE)
            REPORT(a, "sequence", slot, "page %u is another row's to write", row[i]);
        a->audit->page_marks[row[i]] |= MARK_WRITABLE;
    }
}

static void audit_keys(struct pool_audit *a, uint32_t slot)
{
    const struct block_seq *seq = &a->m.seqs[slot];
    if (seq->keyed > seq->row_pages || seq->keyed > seq->reserved / a->m.pool->page_tokens) {
        REPORT(a, "sequence", slot, "%u pages keyed, of %u", seq->keyed, seq->row_pages);
        return;
    }
    for (uint32_t i = 0; i < seq->keyed; i++) {
        uint32_t page = row_of(&a->m, slot)[i];
        if (is_used_page(&a->m, page) && !PAGE_KEYED(a->m.pages[page]))
            REPORT(a, "sequence", slot, "page %u has no key", page);
    }
}

static void audit_open(struct pool_audit *a, uint32_t slot)
{
    const struct block_pool *pool = a->m.pool;
    const struct block_seq *seq = &a->m.seqs[slot];
    uint64_t needed = ((uint64_t)seq->reserved + pool->page_tokens - 1) / pool->page_tokens;
    if (seq->generation == 0 || seq->version % 2 != 0)
        REPORT(a, "sequence", slot, "generation %u version %u can not be", seq->generation, seq->version);
    if (seq->written > seq->reserved || needed != seq->row_pages)
        REPORT(a, "sequence", slot, "written %u, reserved %u, %u pages", seq->written, seq->reserved, seq->row_pages);
    if (seq->pending_tokens == 0
            ? seq->after_value != 0
            : seq->after_value == 0 || seq->pending_tokens <= seq->written || seq->pending_tokens > seq->reserved)
        REPORT(a, "sequence", slot, "pending tokens %u can not be", seq->pending_tokens);
    if (seq->attachment >= KVP_ATTACHMENTS_MAX || a->m.attachments[seq->attachment].state == KVP_ATTACHMENT_FREE)
        REPORT(a, "sequence", slot, "its owner %u is not attached", seq->attachment);
    else if (find_key(a->audit->ledger, &a->m, seq->attachment, seq->key) != seq)
        REPORT(a, "sequence", slot, "is not the one found by its key");
    audit_open_row(a, slot);
    audit_keys(a, slot);
    struct kvp_page_copy copy;
    owed_copy(&a->m, seq, &copy);
    if (seq->copy_source != 0 && (copy.tokens == 0 || copy.source == copy.destination))
        REPORT(a, "sequence", slot, "owes a copy from page %u to nowhere", seq->copy_source - 1);
}

static void audit_job_of(struct pool_audit *a, uint32_t slot)
{
    const struct block_seq *seq = &a->m.seqs[slot];
    const struct block_job *jobs = jobs_of(a->audit->ledger);
    if (seq->job == 0)
        return;
    if (seq->state != KVP_SEQ_OPEN || seq->job > KVP_JOBS_MAX || !jobs[seq->job - 1].open ||
        jobs[seq->job - 1].pool_slot != a->m.slot || jobs[seq->job - 1].pool_generation != a->m.pool->generation) {
        REPORT(a, "sequence", slot, "waits for job %u, which is not its pool's", seq->job - 1);
        return;
    }
    if (seq->job_tokens > seq->reserved)
        REPORT(a, "sequence", slot, "its job writes %u tokens, over reserved", seq->job_tokens);
    a->audit->job_sequences[seq->job - 1]++;
}

static void audit_sequence(struct pool_audit *a, uint32_t slot)
{
    const struct block_pool *pool = a->m.pool;
    const struct block_seq *seq = &a->m.seqs[slot];
    if (seq->state > KVP_SEQ_PIN || seq->row_pages > pool->row_pages) {
        REPORT(a, "sequence", slot, "state %u with %u pages can not be", seq->state, seq->row_pages);
        return;
    }
    a->states[seq->state]++;
    for (uint32_t i = 0; i < seq->row_pages; i++)
        count_reference(a, slot, row_of(&a->m, slot)[i]);
    if (seq->copy_source != 0)
        count_reference(a, slot, seq->copy_source - 1);
    audit_job_of(a, slot);
    if (seq->state == KVP_SEQ_OPEN)
        audit_open(a, slot);
    if (seq->state == KVP_SEQ_FREE && (seq->row_pages != 0 || seq->copy_source != 0))
        REPORT(a, "sequence", slot, "free, and holds pages");
    if ((seq->state == KVP_SEQ_RECLAIM || seq->state == KVP_SEQ_PIN) && seq->attachment != KVP_NONE)
        REPORT(a, "sequence", slot, "to be reclaimed or a pin, and has an owner");
    if (seq->state == KVP_SEQ_RETIRING) {
        if (seq->after_value == 0 || seq->attachment >= KVP_ATTACHMENTS_MAX)
            REPORT(a, "sequence", slot, "retires, and waits for nothing");
        else
            a->retiring[seq->attachment]++;
    }
}

/* ---- lists ---------------------------------------------------------------------------------------------------------
 */

/* Walk a list: each entry in that state (and of that owner), in no other list, its back link right. The entries found.
 */
static uint32_t audit_list(struct pool_audit *a, const char *name, uint32_t link, enum kvp_seq_state state,
                           uint32_t owner)
{
    uint32_t found = 0, prev = 0;
    while (link != 0) {
        uint32_t slot = linked_slot(&a->m, link);
        if (slot == KVP_NONE || slot >= a->m.pool->sequences_used) {
            audit_report(a->audit, "pool %u %s list: link %u leads nowhere", a->m.slot, name, link);
            break;
        }
        const struct block_seq *seq = &a->m.seqs[slot];
        if (a->audit->seq_marks[slot]) {
            REPORT(a, "sequence", slot, "is in the %s list and in another, or twice", name);
            break;
        }
        a->audit->seq_marks[slot] = 1;
        if (seq->state != (uint32_t)state || (owner != KVP_NONE && seq->attachment != owner))
            REPORT(a, "sequence", slot, "does not belong in the %s list", name);
        if (state != KVP_SEQ_FREE && seq->prev != prev)
            REPORT(a, "sequence", slot, "its back link in the %s list is wrong", name);
        prev = link;
        link = seq->next;
        found++;
    }
    return found;
}

static void audit_lists(struct pool_audit *a)
{
    const struct block_pool *pool = a->m.pool;
    audit_list(a, "free", pool->sequences_free, KVP_SEQ_FREE, KVP_NONE);
    audit_list(a, "retiring", pool->retiring, KVP_SEQ_RETIRING, KVP_NONE);
    audit_list(a, "reclaim", pool->reclaim, KVP_SEQ_RECLAIM, KVP_NONE);
    uint32_t pins = audit_list(a, "pins", pool->pins, KVP_SEQ_PIN, KVP_NONE);
    if (pins != pool->pin_count || pins > KVP_PINS_MAX)
        audit_report(a->audit, "pool %u: counts %u pins, has %u", a->m.slot, pool->pin_count, pins);
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        const struct block_attachment *attachment = &a->m.attachments[i];
        if (attachment->state == KVP_ATTACHMENT_FREE)
            continue;
        uint32_t found = audit_list(a, "attachment's", attachment->first, KVP_SEQ_OPEN, i);
        if (found != attachment->sequences)
            REPORT(a, "attachment", i, "counts %u sequences, has %u", attachment->sequences, found);
    }
    for (uint32_t slot = 0; slot < pool->sequences_used; slot++) {
        if (!a->audit->seq_marks[slot])
            REPORT(a, "sequence", slot, "is in no list");
    }
    for (uint32_t slot = pool->sequences_used; slot < pool->max_sequences; slot++) {
        if (a->m.seqs[slot].state != KVP_SEQ_FREE || a->m.seqs[slot].generation != 0)
            REPORT(a, "sequence", slot, "is beyond the watermark, and was used");
    }
    if (pool->open_count != a->states[KVP_SEQ_OPEN])
        audit_report(a->audit, "pool %u: counts %u open sequences, has %u", a->m.slot, pool->open_count,
                     a->states[KVP_SEQ_OPEN]);
    if (pool->retiring_count != a->states[KVP_SEQ_RETIRING] + a->states[KVP_SEQ_RECLAIM])
        audit_report(a->audit, "pool %u: counts %u retiring sequences, has %u", a->m.slot, pool->retiring_count,
                     a->states[KVP_SEQ_RETIRING] + a->states[KVP_SEQ_RECLAIM]);
}

/* Every OPEN sequence is found by its key (audit_open); so the chains hold nothing else if they hold as many. */
static void audit_buckets(struct pool_audit *a)
{
    uint32_t entries = 0;
    for (uint32_t i = 0; i <= a->m.bucket_mask; i++) {
        uint32_t link = a->m.buckets[i];
        while (link != 0) {
            uint32_t slot = linked_slot(&a->m, link);
            if (slot == KVP_NONE || a->m.seqs[slot].state != KVP_SEQ_OPEN || entries == a->m.pool->max_sequences) {
                audit_report(a->audit, "pool %u bucket %u: link %u leads to no open sequence", a->m.slot, i, link);
                return;
            }
            entries++;
            link = a->m.seqs[slot].bucket_next;
        }
    }
    if (entries != a->states[KVP_SEQ_OPEN])
        audit_report(a->audit, "pool %u buckets: %u entries, %u open sequences", a->m.slot, entries,
                     a->states[KVP_SEQ_OPEN]);
}

/* ---- attachments ---------------------------------------------------------------------------------------------------
 */

static void audit_attachments(struct pool_audit *a)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < KVP_ATTACHMENTS_MAX; i++) {
        const struct block_attachment *attachment = &a->m.attachments[i];
        if (attachment->state == KVP_ATTACHMENT_FREE) {
            if (a->retiring[i] != 0)
                REPORT(a, "attachment", i, "free, and %u rows wait for its timelines", a->retiring[i]);
            continue;
        }
        found++;
        const struct block_session *session;
        struct kvp_session_id id = {attachment->session_slot, attachment->session_generation};
        if (attachment->state > KVP_ATTACHMENT_DEAD || find_session(a->audit->ledger, id, &session) != KVP_OK ||
            session->attached[a->m.slot] != i + 1)
            REPORT(a, "attachment", i, "its session %u does not know it", attachment->session_slot);
        else if ((session->state == KVP_SESSION_OPEN) != (attachment->state == KVP_ATTACHMENT_LIVE))
            REPORT(a, "attachment", i, "state %u of a session in state %u", attachment->state, session->state);
        else if (attachment->tenant >= KVP_TENANTS_MAX || !a->m.tenants[attachment->tenant].used ||
                 a->m.tenants[attachment->tenant].id != session->tenant)
            REPORT(a, "attachment", i, "its place %u is not its tenant's", attachment->tenant);
        uint32_t leader = attachment->leader;
        if (leader >= KVP_ATTACHMENTS_MAX || a->m.attachments[leader].state == KVP_ATTACHMENT_FREE ||
            a->m.attachments[leader].leader != leader)
            REPORT(a, "attachment", i, "its leader %u leads no group", leader);
        else if (leader != i && attachment->lacking != 0)
            REPORT(a, "attachment", i, "leads no group, and lacks %u ranks", attachment->lacking);
        if (attachment->retiring != a->retiring[i])
            REPORT(a, "attachment", i, "counts %u retiring rows, has %u", attachment->retiring, a->retiring[i]);
    }
    if (found != a->m.pool->attachments)
        audit_report(a->audit, "pool %u: counts %u attachments, has %u", a->m.slot, a->m.pool->attachments, found);
}

void audit_pool(struct audit *audit, uint32_t slot)
{
    struct pool_audit a = {.audit = audit, .m = *pool_at(audit->ledger, slot)};
    memset(audit->page_marks, 0, a.m.pool->pages * sizeof(uint32_t));
    memset(audit->page_children, 0, a.m.pool->pages * sizeof(uint32_t));
    memset(audit->seq_marks, 0, a.m.pool->max_sequences);
    for (uint32_t i = 0; i < a.m.pool->sequences_used; i++)
        audit_sequence(&a, i);
    audit_lists(&a);
    audit_buckets(&a);
    audit_attachments(&a);
    audit_pages(&a);
}
