/**
 * What the tests of libkvpool stand on: a daemon, a client, and a small pool "p" that is attached, for each test anew.
 * At its end the pool must be free again, the audit clean, and the daemon must leave nothing.
 */
#ifndef KVP_TEST_CLIENT_HOUSE_H
#define KVP_TEST_CLIENT_HOUSE_H

#include "daemon.h"
#include "kvpool.h"

#include <check.h>

#define PAGES       32u
#define PAGE_TOKENS 4u
#define REGION_BYTES 65536u
#define PLANES      4u              /* two layers of K and V */
#define ROW_BYTES   (2u * 16u * 2u) /* 2 heads of 16, fp16 */

extern struct test_daemon daemon_;
extern struct kvp_client *client;
extern struct kvp_pool *pool;

void house_open(void);
void house_close(void);

#define ck_ok(call)                                                                                                    \
    do {                                                                                                               \
        enum kvp_status status_ = (call);                                                                              \
        ck_assert_msg(status_ == KVP_OK, "%s: %s (%s)", #call, kvp_error_text(), kvp_status_name(status_));            \
    } while (0)

/** The spec of pool "p". */
struct kvp_pool_spec house_spec(void);

struct kvp_seq open_one(struct kvp_pool *in, uint64_t key);

/** Bytes of tokens: of a plane and a position, told apart by a salt. */
unsigned char token_byte(unsigned salt, uint32_t plane, uint32_t position);
void fill_row(unsigned char *row, unsigned salt, uint32_t plane, uint32_t position);

/** Advance, step, append, progress: n tokens behind `start`. */
void write_tokens(struct kvp_pool *in, struct kvp_seq seq, uint32_t start, uint32_t n, unsigned salt);
/** They lie in the mapped slab, in every plane. */
void check_tokens(struct kvp_pool *in, struct kvp_seq seq, uint32_t start, uint32_t n, unsigned salt);

/** The fd of the client's connection, found among this process's. */
int connection_fd(void);

#endif
