/**
 * Calls on pools over a raw session socket, for tests of the daemon: one small pool shape, and what is done with it.
 * Functions fail the test where something is not as it must be.
 */
#ifndef KVP_TEST_POOL_CALLS_H
#define KVP_TEST_POOL_CALLS_H

#include "daemon.h"

#define TEST_PAGES       64
#define TEST_PAGE_TOKENS 16
#define TEST_DIM         8 /* one layer, one head, fp32 */
#define TEST_TOKEN_BYTES (2 * TEST_DIM * 4) /* K and V */

#define METHOD(name) KVPOOL__V1__METHOD__METHOD_##name

/* A pool, attached and mapped. */
struct test_pool {
    uint64_t session_id;
    const struct kvp_table_header *table;
    struct kvp_timeline *timelines;
    uint64_t *progress;
    const unsigned char *slab;
    size_t table_bytes, timelines_bytes, progress_bytes, slab_bytes;
};

/* Send CreatePool and do not wait. */
void test_send_create_pool(int socket, const char *name, uint64_t tag);
/* CreatePool, answered with that status and a text that holds `text`. */
void test_create_pool(int socket, const char *name, enum kvp_status wanted, const char *text);
void test_delete_pool(int socket, const char *name);
/* Attach, the reply as it came. */
void test_attach(int socket, const char *name, struct test_reply *ret_reply);
/* Attach and map everything. */
void test_map_pool(int socket, const char *name, struct test_pool *ret_pool);
void test_unmap_pool(struct test_pool *pool);

uint64_t test_open_sequence(int socket, const char *name, uint64_t key);
/* Append tokens of bytes `fill` to a sequence of length `at`, and wait until the timeline says that it is done. */
void test_append(int socket, const char *name, uint64_t seq, uint32_t at, uint32_t tokens, unsigned char fill,
                 const struct kvp_timeline *timelines);
/* The same from a registered buffer. */
void test_append_buffer(int socket, const char *name, uint64_t seq, uint32_t at, uint32_t tokens, uint32_t buffer,
                        const struct kvp_timeline *timelines);
uint32_t test_length(int socket, const char *name, uint64_t seq);
/* Bytes of that value in the slab. */
size_t test_count_bytes(const struct test_pool *pool, unsigned char value);

uint32_t test_executor_pid(int socket); /* 0: none runs */
void test_expect_clean_audit(int socket);

/* A process's end, without being its parent. */
int test_pidfd(uint32_t pid);
void test_wait_for_end(int pidfd); /* closes it */

#endif
