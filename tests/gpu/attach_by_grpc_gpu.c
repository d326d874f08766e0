/**
 * A worker that has gRPC alone: it makes a pool for legacy handles, appends to a sequence, attaches by the 64 bytes in
 * the message, and reads what it appended in place, on the GPU. Against a real kvpoold; no fd ever reaches it.
 *
 * Without a GPU its one test is listed as skipped, by name, and the exit status is 77.
 */
#include "daemon.h"
#include "gpu_memory.h"
#include "rpc_client.h"

#include <check.h>
#include <sys/wait.h>
#include <unistd.h>

#define SKIPPED 77
#define TOKENS  100
#define LAYERS  3
#define PLANES  (2 * LAYERS)
#define HEADS   4
#define DIM     64
#define ROW     (HEADS * DIM * 2) /* bytes of one token in one plane, fp16 */

static struct rpc_client client;
static char *session = "";
static uint64_t calls;

/* One call of the service; its reply is unpacked, and lives as long as the process. */
static void *call(const char *name, const ProtobufCMessage *body, const ProtobufCMessageDescriptor *type)
{
    size_t n = protobuf_c_message_get_packed_size(body);
    unsigned char *bytes = malloc(n + 1);
    struct rpc_answer answer;
    char path[64];
    void *reply;

    ck_assert_ptr_nonnull(bytes);
    protobuf_c_message_pack(body, bytes);
    snprintf(path, sizeof(path), "/kvpool.v1.KvPool/%s", name);
    rpc_client_call(&client, path, bytes, n, 60000, NULL, &answer);
    ck_assert_msg(answer.code == GRPC_STATUS_OK, "%s: %d %s", name, answer.code, answer.text);
    reply = protobuf_c_message_unpack(type, NULL, answer.reply_bytes, answer.reply);
    ck_assert_ptr_nonnull(reply);
    free(answer.reply);
    free(bytes);
    return reply;
}

#define CALL(name, lower, request)                                                                                     \
    ((request).session = session, (request).call_id = session[0] != 0 ? ++calls : 0,                                   \
     call(#name, &(request).base, &kvpool__v1__##lower##_reply__descriptor))

static void open_session(void)
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    Kvpool__V1__OpenSessionReply *reply = CALL(OpenSession, open_session, request);

    session = reply->session;
}

static Kvpool__V1__PoolInfo *create_pool(void)
{
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    static Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    static Kvpool__V1__Plane planes[PLANES], *list[PLANES];
    Kvpool__V1__CreatePoolReply *reply;

    for (unsigned p = 0; p < PLANES; p++) {
        kvpool__v1__plane__init(&planes[p]);
        planes[p].layer = p / 2;
        planes[p].component = p % 2 == 0 ? KVPOOL__V1__COMPONENT__COMPONENT_K : KVPOOL__V1__COMPONENT__COMPONENT_V;
        planes[p].heads = HEADS;
        planes[p].dim = DIM;
        planes[p].dtype = KVPOOL__V1__DTYPE__DTYPE_F16;
        list[p] = &planes[p];
    }
    spec.name = "by-grpc";
    spec.pages = 64;
    spec.page_tokens = 16;
    spec.n_planes = PLANES;
    spec.planes = list;
    spec.memory = KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    request.spec = &spec;
    reply = CALL(CreatePool, create_pool, request);
    ck_assert_str_eq(reply->pool->backend, "cuda");
    return reply->pool;
}

static uint64_t open_and_append(unsigned char *bytes, size_t n)
{
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__AppendRequest append = KVPOOL__V1__APPEND_REQUEST__INIT;
    uint32_t at = 0, tokens = TOKENS;
    Kvpool__V1__OpenSequencesReply *opened;
    Kvpool__V1__AppendReply *appended;
    uint64_t key = 11;

    open.pool = append.pool = "by-grpc";
    open.n_keys = 1;
    open.keys = &key;
    opened = CALL(OpenSequences, open_sequences, open);
    append.n_seqs = append.n_at = append.n_tokens = 1;
    append.seqs = opened->seqs;
    append.at = &at;
    append.tokens = &tokens;
    append.inline_ = (ProtobufCBinaryData){n, bytes};
    appended = CALL(Append, append, append);
    ck_assert_uint_eq(appended->written[0], TOKENS);
    return opened->seqs[0];
}

/* Every token in every plane, through the page table that the daemon answers. */
static void compare(const unsigned char *slab, const Kvpool__V1__PoolInfo *pool, uint64_t seq,
                    const unsigned char *want)
{
    Kvpool__V1__GetPageTableRequest request = KVPOOL__V1__GET_PAGE_TABLE_REQUEST__INIT;
    Kvpool__V1__GetPageTableReply *rows;

    request.pool = "by-grpc";
    request.n_seqs = 1;
    request.seqs = &seq;
    rows = CALL(GetPageTable, get_page_table, request);
    ck_assert_uint_eq(rows->lengths[0], TOKENS);
    ck_assert_uint_eq(rows->n_kv_indices, (TOKENS + 15) / 16);
    for (unsigned p = 0; p < PLANES; p++)
        for (unsigned t = 0; t < TOKENS; t++)
            ck_assert_msg(memcmp(slab + pool->layout[p]->offset +
                                     (uint64_t)rows->kv_indices[t / 16] * pool->layout[p]->page_stride +
                                     t % 16 * pool->layout[p]->token_stride,
                                 want + ((size_t)p * TOKENS + t) * ROW, ROW) == 0,
                          "token %u of plane %u is not what was appended", t, p);
}

static void work(const char *target)
{
    static unsigned char bytes[PLANES * TOKENS * ROW];
    Kvpool__V1__AttachRequest attach = KVPOOL__V1__ATTACH_REQUEST__INIT;
    Kvpool__V1__CloseSessionRequest close_session = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
    Kvpool__V1__AuditRequest audit = KVPOOL__V1__AUDIT_REQUEST__INIT;
    Kvpool__V1__AttachReply *attached;
    Kvpool__V1__AuditReply *audited;
    Kvpool__V1__PoolInfo *pool;
    unsigned char *slab;
    char device[64];
    uint64_t seq;

    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (unsigned char)(i * 2654435761u >> 13);
    rpc_client_open(&client, target, NULL);
    open_session();
    pool = create_pool();
    attach.pool = "by-grpc";
    attached = CALL(Attach, attach, attach);
    ck_assert_uint_eq(attached->n_slabs, 1);
    ck_assert_int_eq(attached->table_fd_index, -1);
    ck_assert_uint_eq(attached->slabs[0]->ipc_handle.len, 64);
    gpu_first(device);
    ck_assert_str_eq(attached->slabs[0]->device, device);
    seq = open_and_append(bytes, sizeof(bytes));
    slab = malloc(attached->slabs[0]->bytes);
    ck_assert_ptr_nonnull(slab);
    gpu_read(slab, gpu_map_ipc(attached->slabs[0]->ipc_handle.data), attached->slabs[0]->bytes);
    compare(slab, pool, seq, bytes);
    free(slab);
    audited = CALL(Audit, audit, audit);
    ck_assert(audited->clean);
    CALL(CloseSession, close_session, close_session);
    rpc_client_close(&client);
}

START_TEST(a_worker_that_has_only_grpc_attaches_by_the_64_bytes_and_reads_in_place)
{
    const char *const arguments[] = {"--backend", "cuda", NULL};
    struct test_daemon daemon;
    char target[256];
    int status;
    pid_t pid;

    test_daemon_start(&daemon, NULL, arguments);
    snprintf(target, sizeof(target), "unix:%s/grpc.sock", daemon.dir);
    fflush(NULL);
    pid = fork(); /* its CUDA is its own: it ends before the daemon does */
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        grpc_init();
        work(target);
        grpc_shutdown_blocking();
        _exit(0);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the worker ended with wait status %#x", status);
    ck_assert_int_eq(test_daemon_stop(&daemon), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("attach by gRPC alone");
    TCase *tests = tcase_create("gpu");
    SRunner *runner = srunner_create(suite);
    bool present = gpu_present();
    int failed;

    suite_add_tcase(suite, tests);
    tcase_set_timeout(tests, 100);
    if (present)
        tcase_add_test(tests, a_worker_that_has_only_grpc_attaches_by_the_64_bytes_and_reads_in_place);
    else
        puts("skipped a_worker_that_has_only_grpc_attaches_by_the_64_bytes_and_reads_in_place: there is no GPU");
    srunner_run_all(runner, CK_VERBOSE);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    if (failed > 0)
        return 1;
    return present ? 0 : SKIPPED;
}
