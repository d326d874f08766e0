/**
 * The adaptive policy: which cached pages stay longer than their turn, as long as that is seen to pay.
 *
 * A page that is let go of gets a class: 0 leaves first; of the others, class c stays scale · weight(c) lookups longer
 * than its stamp says. With scale 0 and nothing in class 0 that is plain LRU, and so it begins.
 *
 *   class   1 a leaf never found again   2 no leaf, never found   3, 4, 5, 6, 7 found 1, 2, 3–4, 5–8, more times
 *   a page's class is never below that of the pages that extend it, so that chains still leave from their end
 *
 * Three things are measured, on all pages or on the sampled ones (one in SAMPLE, by their keys' bits):
 *
 *   again[c][age]  how many pages of a class were asked for again that many lookups after they were let go of; of those
 *                  evicted meanwhile, by ghosts: a table of the sampled keys evicted last
 *   superseded     a request left a chain where, so far, one other had gone on: that one's end is an older state of the
 *                  same conversation. How many of such pages were evicted, how many asked for again
 *   leaves         the same of class 1
 *
 * The scale is chosen anew with every half pool of pages let go of. For each candidate: if pages of class c stay L +
 * scale · weight(c) lookups unless they are asked for before, the pool is full of them when the lookups that they stay,
 * summed, are its pages times the lookups counted (Little's law); L is the largest that fits, and what is asked for
 * again within that life are the hits to expect. A scale is taken when it promises PROMISE more than LRU three times in
 * a row, and dropped at the first time that it does not, or when more samples were lost by it than gained: missed at
 * ages that they would not have reached with scale 0, or found beyond those. After that it has to promise twice as
 * often, and so on, before it is taken again. Superseded pages, and leaves, go to class 0 as long as nearly
 * none of them were asked for again, compared with what leaves in their place.
 *
 * All of it are hints: stored without the undo log, and any value of them is safe. No more than 8 bytes a page.
 */
#include "internal.h"

#include <limits.h>

#define SAMPLE        4u     /* a power of two */
#define AGE_MAX       65535u /* lookups; the last bin ends there */
#define SCALES        14u    /* candidates: 1, 2, 4 … lookups */
#define EVIDENCE_MIN  32u    /* evictions of a kind, before anything follows from them */
#define RARE          64u    /* one of so many asked for again is nearly none */
#define WORTH         4u     /* and so many times less often than other pages */
#define LEAF_LIFE_MIN 32u    /* lookups: with shorter lives, leaves are not told from what is about to be used */
#define LIFE_MIN      24u
#define PERSIST       3u
#define HORIZON       8u /* pools' worth of samples after which the older ones count half */
#define SAMPLES_MIN   500u
#define PROMISE(hits) ((hits) + (hits)*3 / 100 + 8)
#define LOST_MORE     8u   /* samples lost beyond those gained: not by chance */
#define LOST_HORIZON  256u /* samples gained or lost after which the older ones count half */
#define DOUBTS_MAX    6u

static const uint32_t weights[KVP_CLASSES] = {0, 0, 1, 2, 3, 4, 5, 6};

static void hint(struct kvp_ledger *ledger, const uint32_t *word, uint32_t value)
{
    put32_dead(ledger, word, value);
}

static void count(struct kvp_ledger *ledger, const uint32_t *word, uint32_t n)
{
    hint(ledger, word, *word + n);
}

static bool is_sampled(const struct block_entry *entry)
{
    return entry->key[1] % SAMPLE == 0;
}

/* ---- ages ----------------------------------------------------------------------------------------------------------
 */

/* Two bins a power of two. */
static uint32_t bin_of(uint32_t age)
{
    age = age < AGE_MAX ? age : AGE_MAX;
    if (age < 2)
        return age;
    uint32_t power = 31 - (uint32_t)__builtin_clz(age);
    return 2 * power + (age >> (power - 1) & 1);
}

static uint32_t bin_first(uint32_t bin)
{
    if (bin < 2)
        return bin;
    uint32_t power = bin / 2;
    return (1u << power) + (bin % 2 != 0 ? 1u << (power - 1) : 0);
}

/* The ages in a bin are a power of two: so the forecasts, of which there are thousands, need not divide by them. */
static uint32_t bin_ages_log2(uint32_t bin)
{
    return bin < 2 ? 0 : bin / 2 - 1;
}

static uint32_t bin_last(uint32_t bin)
{
    uint32_t first = bin_first(bin);
    uint32_t next = bin + 1 < KVP_POLICY_BINS ? bin_first(bin + 1) : AGE_MAX + 1;
    return next > first ? next - 1 : first;
}

/* ---- ghosts: sampled keys that were evicted ------------------------------------------------------------------------
 *
 *   31 … 21      20 … 18                                17 … 14  13 … 0
 *   fingerprint  class, or kind where the page had one  hits     stamp / SAMPLE; 0 in all: empty
 */

static uint32_t fingerprint(const struct block_entry *entry)
{
    uint32_t bits = (uint32_t)(entry->key[1] >> 8) & 0x7ffu;
    return bits != 0 ? bits : 1;
}

static uint32_t ghost_age(const struct pool_map *m, uint32_t ghost)
{
    return ((m->pool->tick / SAMPLE - ghost) & 0x3fffu) * SAMPLE;
}

static void ghost_put(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_entry *entry)
{
    const uint32_t *set = ghost_set(m, entry), *oldest = set;
    if (!is_sampled(entry))
        return;
    for (uint32_t i = 0; i < KVP_GHOST_WAYS && *oldest != 0; i++) {
        if (set[i] == 0 || ghost_age(m, set[i]) > ghost_age(m, *oldest))
            oldest = &set[i];
    }
    enum use_kind kind = USE_KIND(entry->use);
    uint32_t class = kind == USE_SUPERSEDED ? 0 : kind == USE_LEAF ? 1 : USE_CLASS(entry->use);
    hint(ledger, oldest,
         fingerprint(entry) << 21 | class << 18 | USE_HITS(entry->use) << 14 |
             (USE_STAMP(entry->use) / SAMPLE & 0x3fffu));
}

/* The ghost of a key, taken out; 0: there is none. */
static uint32_t ghost_take(struct kvp_ledger *ledger, const struct pool_map *m, const struct block_entry *entry)
{
    const uint32_t *set = ghost_set(m, entry);
    for (uint32_t i = 0; is_sampled(entry) && i < KVP_GHOST_WAYS; i++) {
        uint32_t ghost = set[i];
        if (ghost == 0 || ghost >> 21 != fingerprint(entry))
            continue;
        hint(ledger, &set[i], 0);
        return ghost;
    }
    return 0;
}

/* ---- evidence ------------------------------------------------------------------------------------------------------
 */

/* Whether of that many evicted pages of a kind so few were asked for again that they may leave before all others. */
static bool is_rare(const struct block_policy *policy, uint32_t evicted, uint32_t back)
{
    return evicted >= EVIDENCE_MIN && (uint64_t)back * RARE <= evicted &&
           (uint64_t)back * WORTH * policy->evictions <= 8ull * policy->missed * evicted;
}

static void came_back(struct kvp_ledger *ledger, const struct block_policy *policy, enum use_kind kind, uint32_t n)
{
    if (kind == USE_SUPERSEDED)
        count(ledger, &policy->superseded_back, n);
    else if (kind == USE_LEAF)
        count(ledger, &policy->leaves_back, n);
}

void policy_found(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const struct block_entry *entry = &m->entries[page];
    if (!is_adaptive(m))
        return;
    if (is_sampled(entry)) {
        uint32_t age = m->pool->tick - USE_STAMP(entry->use);
        count(ledger, &m->policy->again[USE_CLASS(entry->use)][bin_of(age)], 1);
        if (m->policy->scale != 0 && age > m->policy->plain_life)
            count(ledger, &m->policy->gained, 1);
    }
    came_back(ledger, m->policy, USE_KIND(entry->use), 1);
}

uint32_t policy_published(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page, uint32_t parent)
{
    const struct block_policy *policy = m->policy;
    if (!is_adaptive(m))
        return 0;
    hint(ledger, &m->followers[page], 0);
    if (parent != KVP_NONE)
        hint(ledger, &m->followers[parent], (page + 1) | (m->followers[parent] != 0 ? FOLLOWER_BRANCHED : 0));
    uint32_t ghost = ghost_take(ledger, m, &m->entries[page]);
    if (ghost == 0)
        return 0;
    uint32_t class = ghost >> 18 & 7u, hits = ghost >> 14 & 15u, age = ghost_age(m, ghost);
    count(ledger, &policy->again[class][bin_of(age)], 1);
    if (policy->scale != 0 && age <= policy->plain_life)
        count(ledger, &policy->lost, 1);
    if (class > 1 && age <= policy->life + policy->life / 8 + 1)
        count(ledger, &policy->missed, SAMPLE);
    came_back(ledger, policy, class == 0 ? USE_SUPERSEDED : class == 1 ? USE_LEAF : USE_PLAIN, SAMPLE);
    return hits < USE_HITS_MAX ? hits + 1 : USE_HITS_MAX;
}

void policy_evicted(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const struct block_policy *policy = m->policy;
    const struct block_entry *entry = &m->entries[page];
    if (!is_adaptive(m))
        return;
    ghost_put(ledger, m, entry);
    count(ledger, &policy->evictions, 1);
    if (USE_KIND(entry->use) == USE_SUPERSEDED)
        count(ledger, &policy->superseded, 1);
    else if (USE_KIND(entry->use) == USE_LEAF)
        count(ledger, &policy->leaves, 1);
    else
        hint(ledger, &policy->life, m->pool->tick - USE_STAMP(entry->use));
    if (policy->evictions <= 8ull * m->pool->pages + 1000)
        return;
    const uint32_t *counts[] = {&policy->evictions,       &policy->missed, &policy->superseded,
                                &policy->superseded_back, &policy->leaves, &policy->leaves_back};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++)
        hint(ledger, counts[i], *counts[i] / 2);
}

/* ---- classes -------------------------------------------------------------------------------------------------------
 */

/* The page that was the last to extend this one, as long as it does. */
static uint32_t follower_of(const struct pool_map *m, uint32_t page)
{
    uint32_t follower = (m->followers[page] & ~FOLLOWER_BRANCHED) - 1;
    bool known = is_used_page(m, follower) && PAGE_PUBLISHED(m->pages[follower]) &&
                 ENTRY_PARENT(m->entries[follower].family) == page + 1;
    return known ? follower : KVP_NONE;
}

uint64_t policy_cached(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    const struct block_entry *entry = &m->entries[page];
    uint32_t hits = USE_HITS(entry->use), before = USE_CLASS(entry->use), class, above = 0;
    if (!is_adaptive(m))
        return USE_WORD(m->pool->tick, 0, hits, USE_PLAIN);
    uint32_t children = ENTRY_CHILDREN(entry->family), follower = children != 0 ? follower_of(m, page) : KVP_NONE;
    if (follower != KVP_NONE) {
        hits = USE_HITS(m->entries[follower].use) > hits ? USE_HITS(m->entries[follower].use) : hits;
        above = is_cached(m, follower) ? USE_CLASS(m->entries[follower].use) : 0;
    }
    if (hits == 0)
        class = children == 0 ? 1 : 2;
    else
        class = hits < 3 ? 2 + hits : hits < 5 ? 5 : hits < 9 ? 6 : 7;
    if (children != 0 && before > class)
        class = before;
    class = class > above ? class : above;
    enum use_kind kind = class == 1 ? USE_LEAF : USE_PLAIN;
    if (class == 1 && m->policy->life >= LEAF_LIFE_MIN && is_rare(m->policy, m->policy->leaves, m->policy->leaves_back))
        class = 0;
    if (is_sampled(entry))
        count(ledger, &m->policy->cached[class], 1);
    return USE_WORD(m->pool->tick, class, hits, kind);
}

int64_t policy_stays(const struct pool_map *m, uint32_t page)
{
    uint64_t use = m->entries[page].use;
    uint32_t age = m->pool->tick - USE_STAMP(use), class = USE_CLASS(use);
    if (!is_adaptive(m))
        return -(int64_t)age;
    return class == 0 ? INT64_MIN + UINT32_MAX - age : (int64_t)m->policy->scale * weights[class] - age;
}

/* ---- superseded chains ---------------------------------------------------------------------------------------------
 */

/* The chain of cached pages from `page` on, each the only one to extend the one before; its end, if it is a leaf. */
static uint32_t chain_end(const struct pool_map *m, uint32_t page, uint32_t *ret_pages)
{
    uint32_t n = 0;
    while (page != KVP_NONE && is_cached(m, page) && n < m->pool->pages) {
        n++;
        *ret_pages = n;
        if (ENTRY_CHILDREN(m->entries[page].family) == 0)
            return page;
        if (ENTRY_CHILDREN(m->entries[page].family) != 1)
            return KVP_NONE;
        page = follower_of(m, page);
    }
    return KVP_NONE;
}

/* Whether two pages were found as often, but that the first was found once more just now. */
static bool same_hits(uint32_t found_now, uint32_t hits)
{
    return found_now == hits + 1 || (found_now == USE_HITS_MAX && hits == USE_HITS_MAX);
}

/* A request, which found `page`, goes on from it in another way than the one before. */
static enum kvp_status supersede(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t page)
{
    uint32_t first = follower_of(m, page), n = 0;
    if (first == KVP_NONE || (m->followers[page] & FOLLOWER_BRANCHED) || !is_cached(m, first) ||
        !same_hits(USE_HITS(m->entries[page].use), USE_HITS(m->entries[first].use)) ||
        USE_KIND(m->entries[first].use) == USE_SUPERSEDED)
        return KVP_OK;
    uint32_t end = chain_end(m, first, &n);
    if (end == KVP_NONE || txn_room(ledger, 2 * ROOM_SMALL + 8 * (uint64_t)n) != KVP_OK)
        return KVP_OK;
    bool leaves = is_rare(m->policy, m->policy->superseded, m->policy->superseded_back);
    for (uint32_t at = end; n > 0; n--) {
        uint64_t use = m->entries[at].use;
        uint32_t class = leaves ? 0 : USE_CLASS(use);
        TRY(relist_page(ledger, m, at, USE_WORD(USE_STAMP(use), class, USE_HITS(use), USE_SUPERSEDED)));
        at = ENTRY_PARENT(m->entries[at].family) - 1;
        if (n > 1 && !is_cached(m, at))
            return KVP_ECORRUPT;
    }
    return KVP_OK;
}

enum kvp_status policy_opened(struct kvp_ledger *ledger, const struct pool_map *m, size_t asked, uint32_t found,
                              const uint32_t *pages)
{
    if (!is_adaptive(m))
        return KVP_OK;
    count(ledger, &m->policy->lookups, 1);
    if (found == 0)
        return KVP_OK;
    if (found < asked)
        TRY(supersede(ledger, m, pages[found - 1]));
    for (uint32_t i = 0; i + 1 < found; i++) {
        uint32_t branched = m->followers[pages[i]] & FOLLOWER_BRANCHED;
        if (m->followers[pages[i]] != ((pages[i + 1] + 1) | branched))
            hint(ledger, &m->followers[pages[i]], (pages[i + 1] + 1) | branched);
    }
    return KVP_OK;
}

/* ---- the scale -----------------------------------------------------------------------------------------------------
 */

/* Of each class, up to each bin: pages asked for again, and the lookups that they stayed until then. */
struct forecast {
    uint64_t again[KVP_CLASSES][KVP_POLICY_BINS + 1], stayed[KVP_CLASSES][KVP_POLICY_BINS + 1];
};

/* Pages asked for again, and lookups stayed, if those of each class stay `life` + scale · weight. */
static uint64_t expect(const struct block_policy *policy, const struct forecast *sums, uint32_t scale, int64_t life,
                       uint64_t *ret_stayed)
{
    uint64_t hits = 0, stayed = 0;
    for (uint32_t c = 1; c < KVP_CLASSES; c++) {
        int64_t wanted = life + (int64_t)scale * weights[c];
        uint32_t stays = wanted < 0 ? 0 : wanted > AGE_MAX ? AGE_MAX : (uint32_t)wanted;
        uint32_t bin = bin_of(stays), first = bin_first(bin);
        uint64_t part = (uint64_t)policy->again[c][bin] * (stays - first + 1) >> bin_ages_log2(bin);
        uint64_t in = sums->again[c][bin] + part;
        hits += in;
        stayed += sums->stayed[c][bin] + part * (first + stays) / 2;
        if (policy->cached[c] > in)
            stayed += (policy->cached[c] - in) * stays;
    }
    *ret_stayed = stayed;
    return hits;
}

/* The hits to expect with a scale: with the longest life for which the pool has room. */
static uint64_t forecast(const struct pool_map *m, const struct forecast *sums, uint32_t scale, int64_t *ret_life)
{
    int64_t low = -(int64_t)scale * weights[KVP_CLASSES - 1], high = AGE_MAX;
    uint64_t hits = 0, room = (uint64_t)m->pool->pages * m->policy->lookups / SAMPLE;
    while (low < high) {
        int64_t life = low + (high - low + 1) / 2;
        uint64_t stayed, some = expect(m->policy, sums, scale, life, &stayed);
        if (stayed <= room) {
            low = life;
            hits = some;
        } else {
            high = life - 1;
        }
    }
    *ret_life = low;
    return hits;
}

/* @return how many samples there are */
static uint64_t sum_up(const struct block_policy *policy, struct forecast *ret_sums)
{
    uint64_t samples = 0;
    for (uint32_t c = 0; c < KVP_CLASSES; c++) {
        samples += c == 0 ? 0 : policy->cached[c];
        ret_sums->again[c][0] = ret_sums->stayed[c][0] = 0;
        for (uint32_t b = 0; b < KVP_POLICY_BINS; b++) {
            uint64_t middle = (bin_first(b) + bin_last(b)) / 2;
            ret_sums->again[c][b + 1] = ret_sums->again[c][b] + policy->again[c][b];
            ret_sums->stayed[c][b + 1] = ret_sums->stayed[c][b] + policy->again[c][b] * middle;
        }
    }
    return samples;
}

static void forget_half(struct kvp_ledger *ledger, const struct block_policy *policy)
{
    for (uint32_t c = 0; c < KVP_CLASSES; c++) {
        hint(ledger, &policy->cached[c], policy->cached[c] / 2);
        for (uint32_t b = 0; b < KVP_POLICY_BINS; b++)
            hint(ledger, &policy->again[c][b], policy->again[c][b] / 2);
    }
    hint(ledger, &policy->lookups, policy->lookups / 2 + 1);
}

/* Whether the scale in use lost more than it gained. */
static bool is_doubtful(struct kvp_ledger *ledger, const struct block_policy *policy)
{
    uint32_t gained = policy->gained, lost = policy->lost;
    if (policy->scale == 0)
        return false;
    if (lost > (uint64_t)gained + LOST_MORE) {
        hint(ledger, &policy->doubts, policy->doubts < DOUBTS_MAX ? policy->doubts + 1 : DOUBTS_MAX);
        hint(ledger, &policy->gained, 0);
        hint(ledger, &policy->lost, 0);
        return true;
    }
    if ((uint64_t)gained + lost > LOST_HORIZON) {
        if (policy->doubts != 0 && gained > 2ull * lost)
            hint(ledger, &policy->doubts, policy->doubts - 1);
        hint(ledger, &policy->gained, gained / 2);
        hint(ledger, &policy->lost, lost / 2);
    }
    return false;
}

static void choose_scale(struct kvp_ledger *ledger, const struct pool_map *m)
{
    const struct block_policy *policy = m->policy;
    struct forecast sums;
    uint64_t samples = sum_up(policy, &sums);
    if (samples * SAMPLE < 2ull * m->pool->pages || samples < SAMPLES_MIN)
        return;
    int64_t life, unused;
    uint32_t best = 0;
    uint64_t plain = forecast(m, &sums, 0, &life), best_hits = PROMISE(plain), now_hits = plain;
    for (uint32_t k = 0; life >= LIFE_MIN && k < SCALES; k++) {
        uint64_t hits = forecast(m, &sums, 1u << k, &unused);
        if (1u << k == policy->scale)
            now_hits = hits;
        if (hits > best_hits) {
            best_hits = hits;
            best = 1u << k;
        }
    }
    if (best != 0 && policy->scale != 0 && best_hits < now_hits + now_hits / 100)
        best = policy->scale;
    hint(ledger, &policy->plain_life, life > 0 ? (uint32_t)life : 0);
    if (is_doubtful(ledger, policy))
        best = 0;
    hint(ledger, &policy->wanted, best != 0 ? policy->wanted + 1 : 0);
    if (best == 0 || best == policy->scale || policy->wanted >= PERSIST << (policy->doubts & 7u))
        hint(ledger, &policy->scale, best);
    if (samples * SAMPLE > (uint64_t)HORIZON * m->pool->pages && samples > 2 * SAMPLES_MIN)
        forget_half(ledger, policy);
}

void policy_released(struct kvp_ledger *ledger, const struct pool_map *m, uint32_t pages)
{
    if (!is_adaptive(m) || pages == 0)
        return;
    count(ledger, &m->policy->released, pages);
    if (m->policy->released < m->pool->pages / 2)
        return;
    hint(ledger, &m->policy->released, 0);
    choose_scale(ledger, m);
}
