/**
 * Checking another worker's pages: held by Fork, read where they lie, compared byte by byte.
 *
 * On host pools the rows are compared in the mapped slab itself. On CUDA pools this process's own kernel reads the
 * pages through its own mapping into pinned memory, READ_PAGES at a time, where they are compared.
 */
#include "demo.h"

#include <stdlib.h>

#define READ_PAGES 8u
#define TIMELINE   2u /* of this session: where the checker's reads end */

struct demo_checker {
    struct kvp_pool *pool;
    struct kvp_step *step;
    uint32_t n_planes;
    struct kvp_plane_view planes[2 * DEMO_LAYERS_MAX];
    int32_t *row; /* page ids of the fork */
    uint32_t row_pages;
    unsigned char *bytes; /* CUDA: READ_PAGES pages, each its planes as dense [page_tokens, heads, dim] */
    size_t page_bytes;
    struct kvp_point done;
};

enum kvp_status demo_checker_create(struct kvp_pool *pool, struct kvp_step *step, struct demo_checker **ret_checker)
{
    const struct kvp_pool_info *info = kvp_pool_info(pool);
    struct demo_checker *checker = calloc(1, sizeof(*checker));
    enum kvp_status status = KVP_OK;

    if (checker == NULL)
        return KVP_ENOMEM;
    checker->pool = pool;
    checker->step = step;
    checker->n_planes = info->spec.layout.n_planes;
    checker->row_pages = info->row_pages;
    checker->row = calloc(info->row_pages + 1, sizeof(*checker->row));
    if (checker->row == NULL || checker->n_planes > 2 * DEMO_LAYERS_MAX)
        status = KVP_ENOMEM;
    for (uint32_t p = 0; p < checker->n_planes && status == KVP_OK; p++)
        status = kvp_pool_plane(pool, 0, p, &checker->planes[p]);
    if (status == KVP_OK)
        status = kvp_timeline_id(pool, TIMELINE, &checker->done.timeline);
    if (status == KVP_OK)
        status = kvp_timeline_value(pool, checker->done.timeline, &checker->done.value);
    if (status == KVP_OK && info->cuda) {
        void *bytes;

        checker->page_bytes = (size_t)checker->n_planes * DEMO_PAGE_TOKENS * DEMO_ROW_BYTES;
        status = kvp_host_alloc(pool, READ_PAGES * checker->page_bytes, &bytes);
        if (status == KVP_OK)
            checker->bytes = bytes;
    }
    if (status != KVP_OK) {
        demo_checker_destroy(checker);
        return status;
    }
    *ret_checker = checker;
    return KVP_OK;
}

void demo_checker_destroy(struct demo_checker *checker)
{
    if (checker == NULL)
        return;
    if (checker->bytes != NULL)
        kvp_host_free(checker->pool, checker->bytes);
    free(checker->row);
    free(checker);
}

/* One page of the row: pages index `at`, its tokens up to `to`. `read` is where it was read to, or NULL: in place. */
static uint64_t count_bad(const struct demo_checker *checker, uint32_t at, const unsigned char *read,
                          const struct demo_trace *trace, size_t request, uint32_t to)
{
    uint32_t first = at * DEMO_PAGE_TOKENS;
    uint32_t n = to - first < DEMO_PAGE_TOKENS ? to - first : DEMO_PAGE_TOKENS;
    uint64_t keys[DEMO_PAGE_TOKENS], bad = 0;

    for (uint32_t t = 0; t < n; t++)
        keys[t] = demo_content_key(trace, request, first + t);
    for (uint32_t p = 0; p < checker->n_planes; p++) {
        const struct kvp_plane_view *plane = &checker->planes[p];
        const unsigned char *in_place = (const unsigned char *)plane->base + checker->row[at] * plane->page_stride;

        for (uint32_t t = 0; t < n; t++) {
            const unsigned char *token = read != NULL ? read + ((size_t)p * DEMO_PAGE_TOKENS + t) * DEMO_ROW_BYTES
                                                      : in_place + t * plane->token_stride;

            bad += demo_count_bad(token, keys[t], p, first + t);
        }
    }
    return bad;
}

static enum kvp_status check_pages(struct demo_checker *checker, const struct demo_trace *trace, size_t request,
                                   uint32_t from, uint32_t to, uint64_t *ret_pages, uint64_t *ret_bad)
{
    uint32_t end = (to + DEMO_PAGE_TOKENS - 1) / DEMO_PAGE_TOKENS;
    uint64_t bad = 0;

    *ret_pages = 0;
    for (uint32_t at = from / DEMO_PAGE_TOKENS; at < end;) {
        uint32_t n = end - at < READ_PAGES ? end - at : READ_PAGES;

        if (checker->bytes != NULL) {
            enum kvp_status status = kvp_read_pages(checker->step, n, checker->row + at, checker->bytes, NULL);

            if (status != KVP_OK)
                return status;
        }
        for (uint32_t i = 0; i < n; i++)
            bad += count_bad(checker, at + i, checker->bytes != NULL ? checker->bytes + i * checker->page_bytes : NULL,
                             trace, request, to);
        *ret_pages += n;
        at += n;
    }
    *ret_bad = bad;
    return KVP_OK;
}

enum kvp_status demo_check(struct demo_checker *checker, struct kvp_seq seq, uint64_t key,
                           const struct demo_trace *trace, size_t request, uint32_t from, uint32_t to,
                           uint64_t *ret_pages, uint64_t *ret_bad)
{
    struct kvp_page_copy copy;
    uint32_t n_copies, n;
    enum kvp_status status;
    struct kvp_seq held;

    status = kvp_fork(checker->pool, 1, &seq, &key, &to, &held, &copy, &n_copies, NULL);
    if (status != KVP_OK)
        return status;
    status = kvp_copy_owed(checker->step, n_copies, &copy, NULL);
    if (status == KVP_OK)
        status = kvp_row(checker->pool, held, checker->row_pages, checker->row, &n);
    if (status == KVP_OK)
        status = check_pages(checker, trace, request, from, to, ret_pages, ret_bad);
    checker->done.value++;
    if (status == KVP_OK)
        status = kvp_timeline_signal(checker->pool, checker->done, NULL);
    if (status == KVP_OK)
        status = kvp_seq_close(checker->pool, 1, &held, &checker->done);
    return status;
}
