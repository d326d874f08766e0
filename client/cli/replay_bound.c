/**
 * What a replay is measured by: how many different blocks there are (with room for all of them, each is missed once), and
 * the most that any policy can hit with less room.
 *
 * The bound is Belady's for prefixes: of all blocks that are there when a request's have been added, those leave that are
 * needed again last, and of one request those that come last in it; but the request's own, as many as there is room for,
 * stay while it is served. Since whoever needs a block needs all before it, what is left is always whole prefixes.
 */
#include "replay.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NONE  UINT32_MAX
#define NEVER UINT32_MAX

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* From id to number, and what stands before it: open addressing, at most half full. */
struct id_table {
    struct id_entry {
        uint64_t id;
        uint32_t number; /* NONE: free */
        uint32_t parent; /* NONE: it is a first block */
        size_t request;  /* the last one that had it, + 1 */
    } * entries;
    size_t mask;
};

static struct id_entry *find_id(const struct id_table *table, uint64_t id)
{
    size_t at = (size_t)((id + 1) * 0x9e3779b97f4a7c15ull >> 20) & table->mask;

    while (table->entries[at].number != NONE && table->entries[at].id != id)
        at = (at + 1) & table->mask;
    return &table->entries[at];
}

/* @return NULL, or what is wrong with the block */
static const char *number_block(const struct id_table *table, uint64_t id, size_t request, uint32_t parent,
                                struct replay_numbers *numbers, uint32_t *ret_number)
{
    struct id_entry *entry = find_id(table, id);

    if (entry->number == NONE)
        *entry = (struct id_entry){.id = id, .number = numbers->n_unique++, .parent = parent};
    if (entry->request == request + 1)
        return "stands twice in it";
    if (entry->parent != parent)
        return "stands behind another block than before";
    entry->request = request + 1;
    *ret_number = entry->number;
    return NULL;
}

static bool number_all(const struct trace *trace, const char *path, const struct id_table *table,
                       struct replay_numbers *numbers)
{
    size_t at = 0;

    for (size_t i = 0; i < trace->n; i++) {
        const uint64_t *ids = trace_blocks(trace, i);
        uint32_t parent = NONE;

        numbers->first[i] = at;
        for (uint32_t k = 0; k < trace->requests[i].n_blocks; k++) {
            const char *wrong = number_block(table, ids[k], i, parent, numbers, &numbers->blocks[at]);

            if (wrong != NULL) {
                fprintf(stderr, "kvpool: trace %s, line %zu: id %" PRIu64 " %s; it must stand for all before it, too\n",
                        path, trace->requests[i].line, ids[k], wrong);
                return false;
            }
            parent = numbers->blocks[at++];
        }
    }
    numbers->first[trace->n] = at;
    return true;
}

bool replay_number(const struct trace *trace, const char *path, struct replay_numbers *ret_numbers)
{
    struct replay_numbers numbers = {.blocks = calloc(trace->n_blocks + 1, sizeof(*numbers.blocks)),
                                     .first = calloc(trace->n + 1, sizeof(*numbers.first))};
    struct id_table table;
    size_t room = 1024;
    bool good = false;

    while (room < 2 * trace->n_blocks)
        room *= 2;
    table = (struct id_table){malloc(room * sizeof(*table.entries)), room - 1};
    if (numbers.blocks == NULL || numbers.first == NULL || table.entries == NULL) {
        fprintf(stderr, "kvpool: trace %s: out of memory\n", path);
    } else {
        for (size_t i = 0; i < room; i++)
            table.entries[i].number = NONE;
        for (size_t i = 0; i < room; i++)
            table.entries[i].request = 0;
        good = number_all(trace, path, &table, &numbers);
    }
    free(table.entries);
    if (good)
        *ret_numbers = numbers;
    else
        replay_numbers_free(&numbers);
    return good;
}

void replay_numbers_free(struct replay_numbers *numbers)
{
    free(numbers->blocks);
    free(numbers->first);
    *numbers = (struct replay_numbers){0};
}

/* ---- the bound --------------------------------------------------------------------------------------------------- */

/* A cached block as it stood when it was put into the heap; out of date once its rank is another. */
struct candidate {
    uint64_t rank; /* the next request that needs it, then its place there */
    uint32_t block;
};

struct bound {
    struct candidate *heap; /* the largest rank first */
    size_t n;
    uint64_t *ranks;    /* [n_unique] */
    uint8_t *cached;    /* [n_unique] */
    uint32_t *request;  /* [n_unique] the last one that pinned it, + 1 */
    uint32_t *next;     /* [n_blocks] the next request that holds the block of this place */
    uint32_t *upcoming; /* [n_unique] */
    struct candidate *aside;
    uint32_t used;
};

static void sift_up(struct candidate *heap, size_t at)
{
    struct candidate moved = heap[at];

    for (; at > 0 && heap[(at - 1) / 2].rank < moved.rank; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = moved;
}

static void heap_put(struct bound *b, struct candidate c)
{
    b->heap[b->n++] = c;
    sift_up(b->heap, b->n - 1);
}

static struct candidate heap_take(struct bound *b)
{
    struct candidate top = b->heap[0], moved = b->heap[--b->n];
    size_t at = 0, child;

    while ((child = 2 * at + 1) < b->n) {
        if (child + 1 < b->n && b->heap[child + 1].rank > b->heap[child].rank)
            child++;
        if (b->heap[child].rank <= moved.rank)
            break;
        b->heap[at] = b->heap[child];
        at = child;
    }
    b->heap[at] = moved;
    return top;
}

static uint32_t serve(struct bound *b, const uint32_t *blocks, const uint32_t *next, uint32_t n, uint32_t pages,
                      uint32_t request)
{
    uint32_t hits = 0;
    size_t n_aside = 0;

    while (hits < n && b->cached[blocks[hits]])
        hits++;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t block = blocks[i];

        b->used += !b->cached[block];
        b->cached[block] = 1;
        b->ranks[block] = (uint64_t)next[i] << 32 | i;
        if (i < pages)
            b->request[block] = request + 1;
        heap_put(b, (struct candidate){b->ranks[block], block});
    }
    while (b->used > pages) {
        struct candidate c = heap_take(b);

        if (!b->cached[c.block] || b->ranks[c.block] != c.rank)
            continue;
        if (b->request[c.block] == request + 1) {
            b->aside[n_aside++] = c;
            continue;
        }
        b->cached[c.block] = 0;
        b->used--;
    }
    while (n_aside > 0)
        heap_put(b, b->aside[--n_aside]);
    return hits;
}

static void look_ahead(const struct trace *trace, const struct replay_numbers *numbers, struct bound *b)
{
    memset(b->upcoming, 0xff, numbers->n_unique * sizeof(*b->upcoming));
    for (size_t i = trace->n; i-- > 0;) {
        for (size_t k = numbers->first[i]; k < numbers->first[i + 1]; k++) {
            b->next[k] = b->upcoming[numbers->blocks[k]];
            b->upcoming[numbers->blocks[k]] = (uint32_t)i;
        }
    }
}

bool replay_bound(const struct trace *trace, const struct replay_numbers *numbers, uint32_t pages, uint64_t *ret_hits)
{
    size_t n_blocks = numbers->first[trace->n] + 1, n_unique = numbers->n_unique + 1;
    struct bound b = {.heap = malloc(n_blocks * sizeof(*b.heap)),
                      .ranks = calloc(n_unique, sizeof(*b.ranks)),
                      .cached = calloc(n_unique, 1),
                      .request = calloc(n_unique, sizeof(*b.request)),
                      .next = calloc(n_blocks, sizeof(*b.next)),
                      .upcoming = calloc(n_unique, sizeof(*b.upcoming)),
                      .aside = malloc(n_unique * sizeof(*b.aside))};
    bool good = b.heap != NULL && b.ranks != NULL && b.cached != NULL && b.request != NULL && b.next != NULL &&
                b.upcoming != NULL && b.aside != NULL;
    uint64_t hits = 0;

    if (good)
        look_ahead(trace, numbers, &b);
    for (size_t i = 0; good && i < trace->n; i++) {
        size_t at = numbers->first[i];

        hits += serve(&b, numbers->blocks + at, b.next + at, trace->requests[i].n_blocks, pages, (uint32_t)i);
    }
    free(b.heap);
    free(b.ranks);
    free(b.cached);
    free(b.request);
    free(b.next);
    free(b.upcoming);
    free(b.aside);
    if (good)
        *ret_hits = hits;
    return good;
}
