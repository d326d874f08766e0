/* See client_house.h. */
#include "client_house.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct test_daemon daemon_;
struct kvp_client *client;
struct kvp_pool *pool;

struct kvp_pool_spec house_spec(void)
{
    static const struct kvp_plane_spec planes[PLANES] = {{0, KVP_COMPONENT_K, 2, 16, KVP_DTYPE_F16},
                                                         {0, KVP_COMPONENT_V, 2, 16, KVP_DTYPE_F16},
                                                         {1, KVP_COMPONENT_K, 2, 16, KVP_DTYPE_F16},
                                                         {1, KVP_COMPONENT_V, 2, 16, KVP_DTYPE_F16}};

    return (struct kvp_pool_spec){
        .name = "p",
        .model = "of the house",
        .layout = {.pages = PAGES, .page_tokens = PAGE_TOKENS, .n_planes = PLANES, .planes = planes},
        .max_sequences = 16,
        .region_bytes = REGION_BYTES};
}

void house_open(void)
{
    const char *const arguments[] = {"--backend", "host", NULL};
    struct kvp_pool_spec spec = house_spec();

    test_daemon_start(&daemon_, NULL, arguments);
    ck_ok(kvp_connect(daemon_.socket, NULL, &client));
    ck_ok(kvp_pool_create(client, &spec, NULL));
    ck_ok(kvp_attach(client, "p", NULL, &pool));
}

/* Nobody holds a page any more: the daemon gives them back in its own time, so it is asked until it has. */
static void await_free_pages(void)
{
    uint64_t deadline_ms = test_now_ms() + TEST_WAIT_MS;
    struct kvp_pool_info *info;
    uint32_t free_pages;

    do {
        ck_ok(kvp_pool_describe(client, "p", &info));
        free_pages = info->free_pages;
        kvp_pool_info_free(info);
    } while (free_pages != PAGES && test_now_ms() < deadline_ms);
    ck_assert_uint_eq(free_pages, PAGES);
}

void house_close(void)
{
    uint32_t violations;
    char **texts;
    size_t n;

    await_free_pages();
    ck_ok(kvp_audit(client, &violations, &texts, &n));
    ck_assert_uint_eq(violations, 0);
    free(texts);
    kvp_disconnect(client);
    ck_assert_int_eq(test_daemon_stop(&daemon_), 0);
}

struct kvp_seq open_one(struct kvp_pool *in, uint64_t key)
{
    struct kvp_seq seq;

    ck_ok(kvp_seq_open(in, 1, &key, 0, &seq));
    return seq;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

unsigned char token_byte(unsigned salt, uint32_t plane, uint32_t position)
{
    return (unsigned char)(salt + 31 * plane + 7 * position);
}

void fill_row(unsigned char *row, unsigned salt, uint32_t plane, uint32_t position)
{
    for (uint32_t i = 0; i < ROW_BYTES; i++)
        row[i] = (unsigned char)(token_byte(salt, plane, position) + i);
}

void write_tokens(struct kvp_pool *in, struct kvp_seq seq, uint32_t start, uint32_t n, unsigned salt)
{
    struct kvp_token_view sources[PLANES];
    uint32_t reserved = start + n;
    struct kvp_page_copy copy;
    unsigned char *bytes;
    uint32_t n_copies;
    struct kvp_step *step;
    void *memory;

    ck_ok(kvp_advance(in, 1, &seq, &reserved, NULL, 0, &copy, &n_copies, NULL));
    ck_ok(kvp_step_create(in, 0, 1, n, PAGES, &step));
    ck_ok(kvp_copy_owed(step, n_copies, &copy, NULL));
    ck_ok(kvp_host_alloc(in, (size_t)PLANES * n * ROW_BYTES, &memory));
    bytes = memory;
    for (uint32_t p = 0; p < PLANES; p++) {
        sources[p] = (struct kvp_token_view){bytes + (size_t)p * n * ROW_BYTES, ROW_BYTES, ROW_BYTES / 2};
        for (uint32_t t = 0; t < n; t++)
            fill_row(bytes + ((size_t)p * n + t) * ROW_BYTES, salt, p, start + t);
    }
    ck_ok(kvp_step_begin(step, 1, &seq, &n, &start, NULL));
    ck_ok(kvp_append(step, 0, PLANES, sources, NULL));
    ck_ok(kvp_progress(step, NULL));
    ck_ok(kvp_stream_sync(in, 0, NULL));
    ck_assert_uint_eq(kvp_step_errors(step, NULL), 0);
    kvp_host_free(in, memory);
    kvp_step_destroy(step);
}

void check_tokens(struct kvp_pool *in, struct kvp_seq seq, uint32_t start, uint32_t n, unsigned salt)
{
    unsigned char expected[ROW_BYTES];
    int32_t pages[PAGES];
    uint32_t n_pages;

    ck_ok(kvp_row(in, seq, PAGES, pages, &n_pages));
    ck_assert_uint_le(start + n, n_pages * PAGE_TOKENS);
    for (uint32_t p = 0; p < PLANES; p++) {
        struct kvp_plane_view plane;

        ck_ok(kvp_pool_plane(in, 0, p, &plane));
        for (uint32_t t = start; t < start + n; t++) {
            const unsigned char *row = (const unsigned char *)plane.base + pages[t / PAGE_TOKENS] * plane.page_stride +
                                       t % PAGE_TOKENS * plane.token_stride;

            fill_row(expected, salt, p, t);
            ck_assert_mem_eq(row, expected, ROW_BYTES);
        }
    }
}

int connection_fd(void)
{
    int found = -1;

    for (int fd = 3; fd < 256; fd++) {
        struct sockaddr_un address = {0};
        socklen_t bytes = sizeof(address);

        if (getpeername(fd, (struct sockaddr *)&address, &bytes) != 0 || address.sun_family != AF_UNIX)
            continue;
        if (strcmp(address.sun_path, daemon_.socket) == 0)
            found = fd;
    }
    ck_assert_int_ge(found, 0);
    return found;
}
