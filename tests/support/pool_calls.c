/* Calls on pools over a raw session socket; see pool_calls.h. */
#include "pool_calls.h"

#include <check.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct pool_request {
    Kvpool__V1__CreatePoolRequest request;
    Kvpool__V1__PoolSpec spec;
    Kvpool__V1__Plane planes[2], *plane_pointers[2];
};

static void pool_request_init(struct pool_request *r, const char *name)
{
    kvpool__v1__create_pool_request__init(&r->request);
    kvpool__v1__pool_spec__init(&r->spec);
    for (unsigned i = 0; i < 2; i++) {
        kvpool__v1__plane__init(&r->planes[i]);
        r->planes[i].component = i == 0 ? KVPOOL__V1__COMPONENT__COMPONENT_K : KVPOOL__V1__COMPONENT__COMPONENT_V;
        r->planes[i].heads = 1;
        r->planes[i].dim = TEST_DIM;
        r->planes[i].dtype = KVPOOL__V1__DTYPE__DTYPE_F32;
        r->plane_pointers[i] = &r->planes[i];
    }
    r->spec.name = (char *)(uintptr_t)name;
    r->spec.pages = TEST_PAGES;
    r->spec.page_tokens = TEST_PAGE_TOKENS;
    r->spec.planes = r->plane_pointers;
    r->spec.n_planes = 2;
    r->request.spec = &r->spec;
}

void test_send_create_pool(int socket, const char *name, uint64_t tag)
{
    struct pool_request r;

    pool_request_init(&r, name);
    test_send(socket, METHOD(CREATE_POOL), tag, &r.request.base, NULL, 0);
}

void test_create_pool(int socket, const char *name, enum kvp_status wanted, const char *text)
{
    struct pool_request r;
    struct test_reply reply;

    pool_request_init(&r, name);
    test_call(socket, METHOD(CREATE_POOL), &r.request.base, &kvpool__v1__create_pool_reply__descriptor, &reply);
    ck_assert_msg(reply.status == wanted, "%s: %s", kvp_status_name(reply.status), reply.text);
    ck_assert_msg(strstr(reply.text, text) != NULL, "%s", reply.text);
    test_reply_free(&reply);
}

void test_delete_pool(int socket, const char *name)
{
    Kvpool__V1__DeletePoolRequest request = KVPOOL__V1__DELETE_POOL_REQUEST__INIT;
    struct test_reply reply;

    request.pool = (char *)(uintptr_t)name;
    test_call(socket, METHOD(DELETE_POOL), &request.base, &kvpool__v1__delete_pool_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    test_reply_free(&reply);
}

/* ---- mapping ----------------------------------------------------------------------------------------------------- */

void test_attach(int socket, const char *name, struct test_reply *ret_reply)
{
    Kvpool__V1__AttachRequest request = KVPOOL__V1__ATTACH_REQUEST__INIT;

    request.pool = (char *)(uintptr_t)name;
    request.abi_version = KVP_ABI_VERSION;
    test_call(socket, METHOD(ATTACH), &request.base, &kvpool__v1__attach_reply__descriptor, ret_reply);
    ck_assert_msg(ret_reply->status == KVP_OK, "%s", ret_reply->text);
}

static void *map_fd(const struct test_reply *reply, int32_t index, int protection, size_t *ret_bytes)
{
    struct stat st;
    void *at;

    ck_assert_int_ge(index, 0);
    ck_assert_uint_lt((unsigned)index, reply->n_fds);
    ck_assert_int_eq(fstat(reply->fds[index], &st), 0);
    at = mmap(NULL, (size_t)st.st_size, protection, MAP_SHARED, reply->fds[index], 0);
    ck_assert_ptr_ne(at, MAP_FAILED);
    *ret_bytes = (size_t)st.st_size;
    return at;
}

void test_map_pool(int socket, const char *name, struct test_pool *pool)
{
    const Kvpool__V1__AttachReply *attached;
    struct test_reply reply;

    test_attach(socket, name, &reply);
    attached = (const Kvpool__V1__AttachReply *)(void *)reply.body;
    pool->session_id = attached->session_id;
    pool->table = map_fd(&reply, attached->table_fd_index, PROT_READ, &pool->table_bytes);
    pool->timelines =
        map_fd(&reply, attached->timelines_fd_index, PROT_READ | PROT_WRITE, &pool->timelines_bytes);
    pool->progress = map_fd(&reply, attached->progress_fd_index, PROT_READ | PROT_WRITE, &pool->progress_bytes);
    pool->slab = map_fd(&reply, attached->slabs[0]->fd_index, PROT_READ, &pool->slab_bytes);
    test_reply_free(&reply);
}

void test_unmap_pool(struct test_pool *pool)
{
    munmap((void *)(uintptr_t)pool->table, pool->table_bytes);
    munmap(pool->timelines, pool->timelines_bytes);
    munmap(pool->progress, pool->progress_bytes);
    munmap((void *)(uintptr_t)pool->slab, pool->slab_bytes);
}

/* ---- sequences --------------------------------------------------------------------------------------------------- */

uint64_t test_open_sequence(int socket, const char *name, uint64_t key)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    struct test_reply reply;
    uint64_t seq;

    request.pool = (char *)(uintptr_t)name;
    request.keys = &key;
    request.n_keys = 1;
    test_call(socket, METHOD(OPEN_SEQUENCES), &request.base, &kvpool__v1__open_sequences_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    seq = ((Kvpool__V1__OpenSequencesReply *)(void *)reply.body)->seqs[0];
    test_reply_free(&reply);
    return seq;
}

/* The source is in the request. */
static void append(int socket, const char *name, uint64_t seq, uint32_t at, uint32_t tokens,
                   Kvpool__V1__AppendRequest request, const struct kvp_timeline *timelines)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS, value;
    struct test_reply reply;
    uint32_t timeline;

    request.pool = (char *)(uintptr_t)name;
    request.seqs = &seq;
    request.at = &at;
    request.tokens = &tokens;
    request.n_seqs = request.n_at = request.n_tokens = 1;
    test_call(socket, METHOD(APPEND), &request.base, &kvpool__v1__append_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    timeline = ((Kvpool__V1__AppendReply *)(void *)reply.body)->timeline;
    value = ((Kvpool__V1__AppendReply *)(void *)reply.body)->value;
    test_reply_free(&reply);
    while (__atomic_load_n(&timelines[timeline].value, __ATOMIC_ACQUIRE) < value) {
        ck_assert_msg(test_now_ms() < until, "the append does not end");
        sched_yield();
    }
    ck_assert_uint_eq(timelines[timeline].error, 0);
}

void test_append(int socket, const char *name, uint64_t seq, uint32_t at, uint32_t tokens, unsigned char fill,
                 const struct kvp_timeline *timelines)
{
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    static unsigned char bytes[TEST_TOKEN_BYTES * TEST_PAGES * TEST_PAGE_TOKENS];

    memset(bytes, fill, sizeof(bytes));
    request.inline_.data = bytes;
    request.inline_.len = (size_t)TEST_TOKEN_BYTES * tokens;
    append(socket, name, seq, at, tokens, request, timelines);
}

void test_append_buffer(int socket, const char *name, uint64_t seq, uint32_t at, uint32_t tokens, uint32_t buffer,
                        const struct kvp_timeline *timelines)
{
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;

    request.buffer = buffer;
    append(socket, name, seq, at, tokens, request, timelines);
}

uint32_t test_length(int socket, const char *name, uint64_t seq)
{
    Kvpool__V1__GetSeqLensRequest request = KVPOOL__V1__GET_SEQ_LENS_REQUEST__INIT;
    struct test_reply reply;
    uint32_t length;

    request.pool = (char *)(uintptr_t)name;
    request.seqs = &seq;
    request.n_seqs = 1;
    test_call(socket, METHOD(GET_SEQ_LENS), &request.base, &kvpool__v1__get_seq_lens_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    length = ((Kvpool__V1__GetSeqLensReply *)(void *)reply.body)->lengths[0];
    test_reply_free(&reply);
    return length;
}

size_t test_count_bytes(const struct test_pool *pool, unsigned char value)
{
    size_t n = 0;

    for (size_t i = 0; i < pool->slab_bytes; i++)
        n += pool->slab[i] == value;
    return n;
}

/* ---- the daemon -------------------------------------------------------------------------------------------------- */

uint32_t test_executor_pid(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    uint32_t pid = stats->n_executors > 0 ? stats->executors[0]->pid : 0;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return pid;
}

void test_expect_clean_audit(int socket)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    const Kvpool__V1__AuditReply *audit;
    struct test_reply reply;

    test_call(socket, METHOD(AUDIT), &request.base, &kvpool__v1__audit_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    audit = (const Kvpool__V1__AuditReply *)(void *)reply.body;
    ck_assert_msg(audit->clean, "%s", audit->n_violations > 0 ? audit->violations[0] : "?");
    test_reply_free(&reply);
}

int test_pidfd(uint32_t pid)
{
    int pidfd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);

    ck_assert_msg(pidfd >= 0, "pid %u: %s", pid, strerror(errno));
    return pidfd;
}

void test_wait_for_end(int pidfd)
{
    struct pollfd ended = {.fd = pidfd, .events = POLLIN};

    ck_assert_int_eq(poll(&ended, 1, TEST_WAIT_MS), 1);
    close(pidfd);
}
