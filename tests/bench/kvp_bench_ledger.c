/**
 * What the ledger costs, each operation in a transaction of its own as the daemon runs them.
 *
 *   page in order    the allocator's own part: take a page, drop it
 *   page shuffled    the same in a pool of --pages (10 M), half free, the free list in random order: take a page, drop
 *                    a random other one
 *   batch            by calls: one sequence reserves 1000 pages and is cut to none; per page
 *   call in order    by calls: one sequence reserves a page more and is cut by it
 *   call shuffled    by calls, in the large pool: a random one of 4096 sequences takes a page, a random one gives one back
 *   advance          256 sequences get room for one token more, in one transaction; one in 16 takes a page
 *   observe          the same 256 sequences are seen to be one token longer; one in 16 seals a page
 *
 * --pages N, --json: one object with the keys pages, page_in_order_ns, page_shuffled_ns, batch_ns, call_in_order_ns,
 * call_shuffled_ns, advance_256_us, observe_256_us.
 * Medians of 9 rounds. Nothing is asserted about the times; a status other than KVP_OK ends the program.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define ROUNDS    9
#define OWNERS    4096u
#define BATCH     256u
#define PER_ROUND 200000u

#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        enum kvp_status must = (call);                                                                                 \
        if (must != KVP_OK) {                                                                                          \
            fprintf(stderr, "%s: %s\n", #call, kvp_status_name(must));                                                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static const struct kvp_after none;

struct bench {
    struct kvp_ledger ledger;
    struct kvp_pool_id pool;
    uint32_t attachment;
    uint32_t pages;
    struct kvp_seq_id seqs[OWNERS];
    uint32_t held[OWNERS]; /* pages of each */
    uint32_t *taken;       /* of the pool whose pages are taken without rows */
    uint32_t taken_pages;
    uint64_t rng;
};

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static uint32_t random_below(struct bench *bench, uint32_t below)
{
    bench->rng = bench->rng * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((bench->rng >> 32) * below >> 32);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_of_rounds(struct bench *bench, double (*round)(struct bench *bench))
{
    double values[ROUNDS];
    round(bench);
    for (int i = 0; i < ROUNDS; i++)
        values[i] = round(bench);
    qsort(values, ROUNDS, sizeof(values[0]), by_value);
    return values[ROUNDS / 2];
}

/* One page is one token. */
static void make_pool(struct bench *bench, const char *name, struct kvp_pool_geometry geometry)
{
    struct kvp_session_spec session_spec = {.kind = KVP_SESSION_SOCKET};
    struct kvp_pool_spec spec = {.geometry = geometry, .name = name};
    struct kvp_session_id session;
    kvp_txn_begin(&bench->ledger);
    MUST(kvp_session_open(&bench->ledger, &session_spec, &session));
    MUST(kvp_pool_create(&bench->ledger, &spec, &bench->pool));
    MUST(kvp_attach(&bench->ledger, bench->pool, session, KVP_NONE, &bench->attachment));
    kvp_txn_commit(&bench->ledger);
    for (uint32_t i = 0; i < geometry.max_sequences; i++) {
        kvp_txn_begin(&bench->ledger);
        MUST(kvp_seq_open(&bench->ledger, bench->pool, bench->attachment, i, false, &bench->seqs[i]));
        kvp_txn_commit(&bench->ledger);
        bench->held[i] = 0;
    }
}

static void reserve(struct bench *bench, uint32_t owner, uint32_t pages)
{
    uint32_t short_pages;
    kvp_txn_begin(&bench->ledger);
    MUST(kvp_seq_reserve(&bench->ledger, bench->pool, bench->seqs[owner], pages, true, none, &short_pages));
    kvp_txn_commit(&bench->ledger);
    bench->held[owner] = pages;
}

/* ---- pages alone ---------------------------------------------------------------------------------------------------
 */

static void take_one(struct bench *bench, const struct pool_map *m)
{
    uint32_t short_pages;
    kvp_txn_begin(&bench->ledger);
    MUST(take_pages(&bench->ledger, m, 0, 0, 1, &short_pages));
    kvp_txn_commit(&bench->ledger);
}

static void drop_one(struct bench *bench, const struct pool_map *m, uint32_t page)
{
    kvp_txn_begin(&bench->ledger);
    struct page_drop drop = drop_begin(m);
    MUST(drop_page(&bench->ledger, m, &drop, page));
    drop_end(&bench->ledger, m, &drop);
    kvp_txn_commit(&bench->ledger);
}

static double page_in_order_round(struct bench *bench)
{
    const struct pool_map *m;
    MUST(map_pool(&bench->ledger, bench->pool, &m));
    double start = now_ns();
    for (uint32_t i = 0; i < PER_ROUND; i++) {
        take_one(bench, m);
        drop_one(bench, m, row_of(m, 0)[0]);
    }
    return (now_ns() - start) / PER_ROUND;
}

static double page_shuffled_round(struct bench *bench)
{
    const struct pool_map *m;
    MUST(map_pool(&bench->ledger, bench->pool, &m));
    double start = now_ns();
    for (uint32_t i = 0; i < PER_ROUND; i++) {
        uint32_t other = random_below(bench, bench->taken_pages);
        take_one(bench, m);
        drop_one(bench, m, bench->taken[other]);
        bench->taken[other] = row_of(m, 0)[0];
    }
    return (now_ns() - start) / PER_ROUND;
}

/* All pages are taken, and half of them dropped in random order. */
static void shuffle_pages(struct bench *bench)
{
    const struct pool_map *m;
    MUST(map_pool(&bench->ledger, bench->pool, &m));
    bench->taken = malloc(bench->pages * sizeof(uint32_t));
    if (bench->taken == NULL)
        exit(1);
    for (bench->taken_pages = 0; bench->taken_pages < bench->pages; bench->taken_pages++) {
        take_one(bench, m);
        bench->taken[bench->taken_pages] = row_of(m, 0)[0];
    }
    while (bench->taken_pages > bench->pages / 2) {
        uint32_t other = random_below(bench, bench->taken_pages);
        drop_one(bench, m, bench->taken[other]);
        bench->taken[other] = bench->taken[--bench->taken_pages];
    }
}

/* ---- by calls ------------------------------------------------------------------------------------------------------
 */

static double batch_round(struct bench *bench)
{
    double start = now_ns();
    for (uint32_t i = 0; i < PER_ROUND / 1000; i++) {
        reserve(bench, 0, 1000);
        reserve(bench, 0, 0);
    }
    return (now_ns() - start) / PER_ROUND;
}

static double call_in_order_round(struct bench *bench)
{
    double start = now_ns();
    for (uint32_t i = 0; i < PER_ROUND; i++) {
        reserve(bench, 0, 11);
        reserve(bench, 0, 10);
    }
    return (now_ns() - start) / PER_ROUND;
}

static void give_one(struct bench *bench)
{
    uint32_t owner = random_below(bench, OWNERS);
    while (bench->held[owner] == 0)
        owner = random_below(bench, OWNERS);
    reserve(bench, owner, bench->held[owner] - 1);
}

static double call_shuffled_round(struct bench *bench)
{
    uint32_t most = 2 * (bench->pages / OWNERS);
    double start = now_ns();
    for (uint32_t i = 0; i < PER_ROUND; i++) {
        uint32_t owner = random_below(bench, OWNERS);
        while (bench->held[owner] == most)
            owner = random_below(bench, OWNERS);
        reserve(bench, owner, bench->held[owner] + 1);
        give_one(bench);
    }
    return (now_ns() - start) / PER_ROUND;
}

/* Everybody takes a page in turn, until all are taken; then half are given back in random order. */
static void shuffle(struct bench *bench)
{
    uint32_t each = bench->pages / OWNERS;
    for (uint32_t i = 0; i < each; i++) {
        for (uint32_t owner = 0; owner < OWNERS; owner++)
            reserve(bench, owner, i + 1);
    }
    for (uint32_t i = 0; i < bench->pages / 2; i++)
        give_one(bench);
}

static double advance_round(struct bench *bench)
{
    uint32_t short_pages;
    double start = now_ns();
    for (uint32_t step = 0; step < 512; step++) {
        kvp_txn_begin(&bench->ledger);
        for (uint32_t i = 0; i < BATCH; i++) {
            uint32_t tokens = ++bench->held[i];
            MUST(kvp_seq_reserve(&bench->ledger, bench->pool, bench->seqs[i], tokens, false, none, &short_pages));
        }
        kvp_txn_commit(&bench->ledger);
    }
    return (now_ns() - start) / 512 / 1000;
}

static double observe_round(struct bench *bench)
{
    static uint32_t written;
    bool changed;
    double start = now_ns();
    for (uint32_t step = 0; step < 512; step++) {
        written++;
        kvp_txn_begin(&bench->ledger);
        for (uint32_t i = 0; i < BATCH; i++)
            MUST(kvp_seq_observe(&bench->ledger, bench->pool, bench->seqs[i], written, &changed));
        kvp_txn_commit(&bench->ledger);
    }
    return (now_ns() - start) / 512 / 1000;
}

static void print(const struct bench *bench, const double ns[5], const double us[2], bool json)
{
    static const char *const keys[] = {"page_in_order_ns", "page_shuffled_ns", "batch_ns",      "call_in_order_ns",
                                       "call_shuffled_ns", "advance_256_us",   "observe_256_us"};
    static const char *const texts[] = {"the allocator's part, in order",
                                        "the allocator's part, shuffled, large pool",
                                        "by calls, 1000 pages each",
                                        "by calls, in order",
                                        "by calls, shuffled, large pool",
                                        "reserve",
                                        "observe"};
    if (json)
        printf("{\"pages\": %u", bench->pages);
    else
        printf("the large pool has %u pages\n\n%-50s %10s\n", bench->pages, "allocate and free one page", "ns");
    for (int i = 0; i < 7; i++) {
        if (i == 5 && !json)
            printf("\n%-50s %10s\n", "one token more for 256 sequences", "us");
        printf(json ? ", \"%s\": %.2f" : "  %-48s %10.2f\n", json ? keys[i] : texts[i], i < 5 ? ns[i] : us[i - 5]);
    }
    if (json)
        printf("}\n");
}

int main(int argc, char **argv)
{
    static struct bench bench;
    bool json = false;
    bench.pages = 10000000;
    bench.rng = 1;
    for (int i = 1; i < argc; i++) {
        json |= strcmp(argv[i], "--json") == 0;
        if (strcmp(argv[i], "--pages") == 0 && i + 1 < argc)
            bench.pages = (uint32_t)strtoul(argv[++i], NULL, 0);
    }
    if (bench.pages < 2 * OWNERS || bench.pages > KVP_PAGES_MAX) {
        fprintf(stderr, "--pages: %u to %u\n", 2 * OWNERS, KVP_PAGES_MAX);
        return 2;
    }
    bench.pages -= bench.pages % OWNERS;
    size_t bytes = kvp_ledger_root_bytes() + (64ull << 20) + bench.pages * 192ull;
    void *block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    MUST(kvp_ledger_format(&bench.ledger, block, block, bytes & ~(size_t)4095, (struct kvp_uuid){{1}}));
    double ns[5], us[2];
    make_pool(&bench, "order", (struct kvp_pool_geometry){1u << 16, 1, 0, 1, 1u << 16, 0});
    ns[0] = median_of_rounds(&bench, page_in_order_round);
    ns[2] = median_of_rounds(&bench, batch_round);
    ns[3] = median_of_rounds(&bench, call_in_order_round);
    make_pool(&bench, "advance", (struct kvp_pool_geometry){1u << 17, 16, 0, BATCH, 512, 0});
    us[0] = median_of_rounds(&bench, advance_round);
    us[1] = median_of_rounds(&bench, observe_round);
    make_pool(&bench, "pages", (struct kvp_pool_geometry){bench.pages, 1, 0, 1, 1, 0});
    shuffle_pages(&bench);
    ns[1] = median_of_rounds(&bench, page_shuffled_round);
    make_pool(&bench, "calls", (struct kvp_pool_geometry){bench.pages, 1, 0, OWNERS, 2 * (bench.pages / OWNERS), 0});
    shuffle(&bench);
    ns[4] = median_of_rounds(&bench, call_shuffled_round);
    print(&bench, ns, us, json);
    free(bench.taken);
    return 0;
}
