/** Plays the daemon for kvpool-exec; see exec_peer.h. */
#include "exec_peer.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define ANSWER_MS 60000

static const struct {
    uint16_t method;
    const ProtobufCMessageDescriptor *reply;
} replies[] = {
    {KVPOOL__V1__METHOD__METHOD_EXEC_HELLO, &kvpool__v1__exec_hello_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, &kvpool__v1__exec_slab_create_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT, &kvpool__v1__exec_slab_adopt_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_DROP, &kvpool__v1__exec_slab_drop_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT, &kvpool__v1__exec_buffer_import_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP, &kvpool__v1__exec_buffer_drop_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_JOB, &kvpool__v1__exec_job_reply__descriptor},
    {KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, &kvpool__v1__exec_processes_reply__descriptor},
};

uint64_t exec_random(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15ull; /* splitmix64 */

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

const struct exec_shape exec_plain = {
    "plain", 64, 16, 2, 4, 64, 64, KVP_DTYPE_F16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, false, false, false};

const struct exec_shape exec_shapes[] = {
    {"nhd by layer", 48, 16, 2, 4, 64, 64, KVP_DTYPE_F16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, false, false, false},
    {"hnd by layer", 48, 16, 2, 4, 64, 64, KVP_DTYPE_BF16, KVP_ORDER_HND, KVP_PLACEMENT_LAYER, false, false, false},
    {"nhd by page", 48, 8, 3, 2, 96, 96, KVP_DTYPE_F32, KVP_ORDER_NHD, KVP_PLACEMENT_PAGE, false, false, false},
    {"hnd by page", 48, 8, 3, 2, 32, 32, KVP_DTYPE_FP8_E4M3, KVP_ORDER_HND, KVP_PLACEMENT_PAGE, false, false, false},
    {"joined", 48, 16, 2, 4, 64, 64, KVP_DTYPE_F16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, true, false, false},
    {"v narrower", 48, 16, 2, 3, 96, 64, KVP_DTYPE_F16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, false, false, false},
    {"odd dims", 40, 5, 2, 3, 7, 13, KVP_DTYPE_U8, KVP_ORDER_HND, KVP_PLACEMENT_PAGE, false, false, false},
    {"one token a page", 64, 1, 1, 1, 8, 8, KVP_DTYPE_F16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, false, false, false},
    {"mla apart", 48, 16, 2, 1, 512, 64, KVP_DTYPE_BF16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, false, true, false},
    {"mla joined", 48, 16, 2, 1, 512, 64, KVP_DTYPE_BF16, KVP_ORDER_NHD, KVP_PLACEMENT_LAYER, true, true, false},
    {"mla by page", 48, 16, 3, 1, 160, 48, KVP_DTYPE_F16, KVP_ORDER_NHD, KVP_PLACEMENT_PAGE, false, true, false},
};
const unsigned exec_n_shapes = sizeof(exec_shapes) / sizeof(exec_shapes[0]);

/* ---- the process ------------------------------------------------------------------------------------------------- */

void exec_peer_start(struct exec_peer *peer, const char *backend)
{
    const char *folder = getenv("KVPOOL_BIN_DIR");
    char path[4096], number[16];
    int pair[2];

    snprintf(path, sizeof(path), "%s/kvpool-exec", folder != NULL ? folder : "../bin");
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    snprintf(number, sizeof(number), "%d", pair[1]);
    fflush(NULL);
    peer->pid = fork();
    ck_assert_int_ge(peer->pid, 0);
    if (peer->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves none behind */
        fcntl(pair[1], F_SETFD, 0);
        execl(path, path, "--socket-fd", number, "--backend", backend, (char *)NULL);
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        _exit(127);
    }
    close(pair[1]);
    peer->socket = pair[0];
    peer->tag = 0;
}

uint64_t exec_peer_send(struct exec_peer *peer, uint16_t method, const ProtobufCMessage *body, const int *fds,
                        unsigned n_fds)
{
    struct kvp_wire_packet packet;

    ck_assert_int_eq(kvp_wire_pack(method, 0, KVP_OK, ++peer->tag, body, &packet), KVP_OK);
    ck_assert_int_eq(kvp_wire_send(peer->socket, &packet, fds, n_fds), KVP_OK);
    kvp_wire_packet_free(&packet);
    return peer->tag;
}

static const ProtobufCMessageDescriptor *reply_type(const struct kvp_envelope *envelope)
{
    if (envelope->status != KVP_OK)
        return &kvpool__v1__error__descriptor;
    for (size_t i = 0; i < sizeof(replies) / sizeof(replies[0]); i++)
        if (replies[i].method == envelope->method)
            return replies[i].reply;
    ck_abort_msg("an answer of method %u", envelope->method);
}

struct exec_answer exec_peer_next(struct exec_peer *peer)
{
    struct pollfd fd = {.fd = peer->socket, .events = POLLIN};
    struct exec_answer answer = {.fd = -1};
    static struct kvp_wire_frame frame;
    enum kvp_status status;

    ck_assert_msg(poll(&fd, 1, ANSWER_MS) == 1, "no answer within %d ms", ANSWER_MS);
    status = kvp_wire_receive(peer->socket, false, &frame);
    if (status == KVP_EDISCONNECTED)
        return answer;
    ck_assert_int_eq(status, KVP_OK);
    ck_assert((frame.envelope.flags & KVP_ENVELOPE_REPLY) != 0);
    answer.tag = frame.envelope.tag;
    answer.status = frame.envelope.status;
    answer.body = protobuf_c_message_unpack(reply_type(&frame.envelope), NULL, frame.envelope.bytes, frame.bytes);
    ck_assert_ptr_nonnull(answer.body);
    if (frame.n_fds > 0) {
        answer.fd = frame.fds[0];
        frame.fds[0] = -1;
    }
    kvp_wire_release(&frame);
    return answer;
}

struct exec_answer exec_peer_call(struct exec_peer *peer, uint16_t method, const ProtobufCMessage *body, const int *fds,
                                  unsigned n_fds)
{
    uint64_t tag = exec_peer_send(peer, method, body, fds, n_fds);
    struct exec_answer answer = exec_peer_next(peer);

    ck_assert_ptr_nonnull(answer.body);
    ck_assert_uint_eq(answer.tag, tag);
    return answer;
}

enum kvp_status exec_peer_status(struct exec_peer *peer, uint16_t method, const ProtobufCMessage *body, const int *fds,
                                 unsigned n_fds)
{
    struct exec_answer answer = exec_peer_call(peer, method, body, fds, n_fds);
    enum kvp_status status = answer.status;

    if (status != KVP_OK) {
        const Kvpool__V1__Error *error = (const void *)answer.body;

        ck_assert_int_eq(error->status, status);
        ck_assert_msg(error->message[0] != 0, "a refusal says what was wrong");
        if (getenv("KVPOOL_TEST_VERBOSE") != NULL)
            fprintf(stderr, "%s: %s\n", kvp_status_name(status), error->message);
    }
    exec_answer_free(&answer);
    return status;
}

void exec_answer_free(struct exec_answer *answer)
{
    if (answer->body != NULL)
        protobuf_c_message_free_unpacked(answer->body, NULL);
    if (answer->fd >= 0)
        close(answer->fd);
}

bool exec_peer_quiet(struct exec_peer *peer)
{
    struct pollfd fd = {.fd = peer->socket, .events = POLLIN};

    return poll(&fd, 1, 0) == 0;
}

int exec_peer_end(struct exec_peer *peer)
{
    int status;

    close(peer->socket);
    ck_assert_int_eq(waitpid(peer->pid, &status, 0), peer->pid);
    return status;
}

void exec_peer_kill(struct exec_peer *peer)
{
    ck_assert_int_eq(kill(peer->pid, SIGKILL), 0);
    exec_peer_end(peer);
}

enum kvp_status exec_peer_hello(struct exec_peer *peer, const char *backend)
{
    Kvpool__V1__ExecHelloRequest hello = KVPOOL__V1__EXEC_HELLO_REQUEST__INIT;

    hello.abi_version = KVP_ABI_VERSION;
    hello.backend = (char *)backend;
    return exec_peer_status(peer, KVPOOL__V1__METHOD__METHOD_EXEC_HELLO, &hello.base, NULL, 0);
}

/* ---- a pool ------------------------------------------------------------------------------------------------------ */

int exec_memfd(uint64_t bytes, void **ret_at)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    *ret_at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(*ret_at, MAP_FAILED);
    return fd;
}

static void add_plane(struct exec_pool *pool, uint32_t layer, uint32_t component, uint32_t heads, uint32_t dim,
                      uint32_t dtype)
{
    size_t p = pool->spec.n_planes++;
    Kvpool__V1__Plane *plane = &pool->planes[p];

    ck_assert_uint_lt(p, EXEC_PLANES_MAX);
    kvpool__v1__plane__init(plane);
    plane->layer = layer;
    plane->component = (Kvpool__V1__Component)component;
    plane->heads = heads;
    plane->dim = dim;
    plane->dtype = (Kvpool__V1__DType)dtype;
    pool->plane_list[p] = plane;
    pool->plane_specs[p] = (struct kvp_plane_spec){layer, component, heads, dim, dtype};
}

void exec_pool_make(struct exec_pool *pool, uint64_t id, const struct exec_shape *shape)
{
    char why[256];
    void *at;

    memset(pool, 0, sizeof(*pool));
    kvpool__v1__pool_spec__init(&pool->spec);
    pool->id = id;
    pool->slab_fd = -1;
    pool->spec.name = "test";
    pool->spec.pages = shape->pages;
    pool->spec.page_tokens = shape->page_tokens;
    pool->spec.order = (Kvpool__V1__Order)shape->order;
    pool->spec.placement = (Kvpool__V1__Placement)shape->placement;
    pool->spec.joined = shape->joined;
    pool->spec.memory =
        shape->legacy ? KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC : KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT;
    pool->spec.planes = pool->plane_list;
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        uint32_t heads = shape->mla ? 1 : shape->heads;

        add_plane(pool, layer, shape->mla ? KVP_COMPONENT_CKV : KVP_COMPONENT_K, heads, shape->k_dim, shape->dtype);
        add_plane(pool, layer, shape->mla ? KVP_COMPONENT_KPE : KVP_COMPONENT_V, heads, shape->v_dim, shape->dtype);
    }
    pool->layout = (struct kvp_layout_spec){.pages = shape->pages,
                                            .page_tokens = shape->page_tokens,
                                            .n_planes = (uint32_t)pool->spec.n_planes,
                                            .order = shape->order,
                                            .placement = shape->placement,
                                            .joined = shape->joined,
                                            .planes = pool->plane_specs};
    ck_assert_msg(kvp_layout_compute(&pool->layout, pool->places, &pool->totals, why, sizeof(why)) == KVP_OK, "%s: %s",
                  shape->name, why);
    pool->slab_bytes = (pool->totals.slab_bytes + 8191) / 4096 * 4096; /* a page behind the planes must stay as it is */
    pool->timelines_fd = exec_memfd(sizeof(struct kvp_timeline) * KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX, &at);
    pool->timelines = at;
    pool->table_fd = exec_memfd(4096, &at);
    pool->table = at;
    pool->table->magic = KVP_TABLE_MAGIC;
    pool->table->state = KVP_TABLE_LIVE;
    pool->want = calloc(1, pool->slab_bytes);
    ck_assert_ptr_nonnull(pool->want);
}

void exec_pool_map(struct exec_pool *pool)
{
    pool->slab = mmap(NULL, pool->slab_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, pool->slab_fd, 0);
    ck_assert_ptr_ne(pool->slab, MAP_FAILED);
}

void exec_pool_create(struct exec_pool *pool, struct exec_peer *peer)
{
    Kvpool__V1__ExecSlabCreateRequest create = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    const Kvpool__V1__ExecSlabCreateReply *reply;
    struct exec_answer answer;

    create.pool_id = pool->id;
    create.spec = &pool->spec;
    create.bytes = pool->slab_bytes;
    answer = exec_peer_call(peer, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE, &create.base, NULL, 0);
    ck_assert_msg(answer.status == KVP_OK, "%s", ((const Kvpool__V1__Error *)answer.body)->message);
    reply = (const void *)answer.body;
    ck_assert_uint_ge(reply->bytes, pool->slab_bytes);
    pool->driver_bytes = reply->bytes;
    ck_assert_int_eq(reply->has_fd, answer.fd >= 0);
    ck_assert_int_eq(reply->has_fd, pool->spec.memory == KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT);
    pool->slab_fd = answer.fd;
    answer.fd = -1;
    if (!reply->has_fd) {
        ck_assert_uint_eq(reply->ipc_handle.len, sizeof(pool->ipc));
        memcpy(pool->ipc, reply->ipc_handle.data, sizeof(pool->ipc));
    }
    if (strcmp(reply->device, "host") == 0)
        exec_pool_map(pool);
    exec_answer_free(&answer);
    ck_assert_int_eq(exec_pool_adopt(pool, peer, false), KVP_OK);
}

enum kvp_status exec_pool_adopt(struct exec_pool *pool, struct exec_peer *peer, bool with_slab)
{
    Kvpool__V1__ExecSlabAdoptRequest adopt = KVPOOL__V1__EXEC_SLAB_ADOPT_REQUEST__INIT;
    int fds[3] = {pool->slab_fd, pool->timelines_fd, pool->table_fd};

    adopt.pool_id = pool->id;
    adopt.spec = &pool->spec;
    adopt.bytes = pool->slab_bytes;
    adopt.has_slab_fd = with_slab;
    return exec_peer_status(peer, KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT, &adopt.base, with_slab ? fds : fds + 1,
                            with_slab ? 3 : 2);
}

void exec_pool_free(struct exec_pool *pool)
{
    munmap(pool->timelines, sizeof(struct kvp_timeline) * KVP_ATTACHMENTS_MAX * KVP_TIMELINES_MAX);
    munmap(pool->table, 4096);
    if (pool->slab != NULL)
        munmap(pool->slab, pool->slab_bytes);
    close(pool->timelines_fd);
    close(pool->table_fd);
    if (pool->slab_fd >= 0)
        close(pool->slab_fd);
    free(pool->want);
}

/* ---- the naive reference ----------------------------------------------------------------------------------------- */

static unsigned char *want_at(struct exec_pool *pool, uint32_t p, uint32_t page, uint32_t offset, uint32_t head)
{
    const struct kvp_plane_layout *place = &pool->places[p];

    return pool->want + place->offset + page * place->page_stride + offset * place->token_stride +
           head * place->head_stride;
}

static uint64_t head_bytes(const struct exec_pool *pool, uint32_t p)
{
    return (uint64_t)pool->plane_specs[p].dim * kvp_dtype_bytes(pool->plane_specs[p].dtype);
}

void exec_pool_want_token(struct exec_pool *pool, uint32_t p, uint32_t page, uint32_t offset, uint32_t head,
                          const void *bytes)
{
    memcpy(want_at(pool, p, page, offset, head), bytes, head_bytes(pool, p));
}

void exec_pool_want_copy(struct exec_pool *pool, uint32_t source, uint32_t destination, uint32_t tokens)
{
    for (uint32_t p = 0; p < pool->layout.n_planes; p++)
        for (uint32_t t = 0; t < tokens; t++)
            for (uint32_t h = 0; h < pool->plane_specs[p].heads; h++)
                exec_pool_want_token(pool, p, destination, t, h, want_at(pool, p, source, t, h));
}

void exec_pool_want_zero(struct exec_pool *pool, uint32_t page)
{
    static const unsigned char zeros[KVP_DIM_MAX * 4];

    for (uint32_t p = 0; p < pool->layout.n_planes; p++)
        for (uint32_t t = 0; t < pool->layout.page_tokens; t++)
            for (uint32_t h = 0; h < pool->plane_specs[p].heads; h++)
                exec_pool_want_token(pool, p, page, t, h, zeros);
}

void exec_pool_check_digests(struct exec_pool *pool, struct exec_peer *peer, const char *what)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    uint32_t n = pool->layout.pages < KVP_BATCH_MAX ? pool->layout.pages : KVP_BATCH_MAX;
    struct kvp_plane_view planes[EXEC_PLANES_MAX];
    struct kvp_digest *digests = calloc(n, sizeof(*digests));
    uint32_t *ids = calloc(n, sizeof(*ids));
    struct kvp_page_digest_args args = {.planes = planes,
                                        .n_planes = pool->layout.n_planes,
                                        .pages = pool->layout.pages,
                                        .page_tokens = pool->layout.page_tokens,
                                        .n = n,
                                        .page_ids = (const int32_t *)ids,
                                        .ret_digests = digests};
    const Kvpool__V1__ExecJobReply *reply;
    struct exec_answer answer;

    ck_assert(digests != NULL && ids != NULL);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = n - 1 - i; /* in an order that is not theirs */
    for (uint32_t p = 0; p < args.n_planes; p++)
        planes[p] = kvp_plane_view_of(&pool->layout, pool->places, p, pool->want);
    ck_assert_int_eq(kvp_host_page_digest(&args, 1), KVP_OK);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_DIGEST;
    job.pool_id = pool->id;
    job.digest_pages = ids;
    job.n_digest_pages = n;
    answer = exec_peer_call(peer, KVPOOL__V1__METHOD__METHOD_EXEC_JOB, &job.base, NULL, 0);
    ck_assert_int_eq(answer.status, KVP_OK);
    reply = (const void *)answer.body;
    ck_assert_uint_eq(reply->n_digests, n);
    for (uint32_t i = 0; i < n; i++)
        ck_assert_msg(reply->digests[i] == digests[i].word[0], "%s: the digest of page %u is not that of its bytes",
                      what, ids[i]);
    exec_answer_free(&answer);
    free(digests);
    free(ids);
}

void exec_pool_check(const struct exec_pool *pool, const char *what)
{
    if (memcmp(pool->slab, pool->want, pool->slab_bytes) == 0)
        return;
    for (uint64_t i = 0; i < pool->slab_bytes; i++) /* which it is */
        ck_assert_msg(pool->slab[i] == pool->want[i], "%s: byte %llu of the slab is not what it must be", what,
                      (unsigned long long)i);
}

/* ---- a batch ----------------------------------------------------------------------------------------------------- */

void exec_batch_make(struct exec_batch *batch, const struct exec_pool *pool, uint64_t job, uint64_t session,
                     uint32_t sequences, uint64_t *seed)
{
    uint32_t page_tokens = pool->layout.page_tokens, pages = pool->layout.pages, share = pages / sequences;
    Kvpool__V1__ExecJobRequest *r = &batch->job;
    uint64_t bytes = 0;

    free(batch->bytes);
    memset(batch, 0, sizeof(*batch));
    kvpool__v1__exec_job_request__init(r);
    ck_assert_uint_ge(share, 1);
    batch->batch = sequences;
    for (uint32_t b = 0; b < sequences; b++) {
        uint32_t n = 1 + (uint32_t)(exec_random(seed) % share), step = (uint32_t)(exec_random(seed) % share);

        batch->tokens[b] = (uint32_t)(exec_random(seed) % (n * page_tokens + 1));
        batch->start[b] = (uint32_t)(exec_random(seed) % (n * page_tokens - batch->tokens[b] + 1));
        for (uint32_t i = 0; i < n; i++) /* a rotation of its own share: scattered, and none twice */
            batch->indices[batch->indptr[b] + (int32_t)i] = (int32_t)(b + sequences * ((i + step) % share));
        batch->indptr[b + 1] = batch->indptr[b] + (int32_t)n;
        batch->nnz += batch->tokens[b];
    }
    for (uint32_t p = 0; p < pool->layout.n_planes; p++) {
        batch->head_strides[p] = head_bytes(pool, p);
        batch->token_strides[p] = pool->plane_specs[p].heads * batch->head_strides[p];
        batch->offsets[p] = bytes;
        bytes += batch->nnz * batch->token_strides[p];
    }
    batch->n_bytes = bytes;
    batch->bytes = malloc(bytes + 8);
    ck_assert_ptr_nonnull(batch->bytes);
    for (uint64_t i = 0; i < bytes; i += 8) {
        uint64_t word = exec_random(seed);

        memcpy(batch->bytes + i, &word, 8);
    }
    r->job = job;
    r->kind = KVPOOL__V1__JOB_KIND__JOB_APPEND;
    r->session_id = session;
    r->pool_id = pool->id;
    r->n_kv_indptr = sequences + 1;
    r->kv_indptr = batch->indptr;
    r->n_kv_indices = (size_t)batch->indptr[sequences];
    r->kv_indices = batch->indices;
    r->n_start = r->n_tokens = sequences;
    r->start = batch->start;
    r->tokens = batch->tokens;
    r->inline_.data = batch->bytes;
    r->inline_.len = bytes;
}

uint64_t exec_batch_interleave(struct exec_batch *batch, const struct exec_pool *pool, uint64_t gap)
{
    uint64_t row = 0;

    for (uint32_t p = 0; p < pool->layout.n_planes; p++) {
        batch->offsets[p] = row + gap;
        row += pool->plane_specs[p].heads * head_bytes(pool, p) + gap;
    }
    for (uint32_t p = 0; p < pool->layout.n_planes; p++)
        batch->token_strides[p] = row;
    batch->job.n_plane_offsets = batch->job.n_token_strides = batch->job.n_head_strides = pool->layout.n_planes;
    batch->job.plane_offsets = batch->offsets;
    batch->job.token_strides = batch->token_strides;
    batch->job.head_strides = batch->head_strides;
    return row * batch->nnz + gap;
}

void exec_batch_want(const struct exec_batch *batch, struct exec_pool *pool, const unsigned char *source)
{
    uint32_t page_tokens = pool->layout.page_tokens;

    for (uint32_t p = 0; p < pool->layout.n_planes; p++) {
        uint64_t j = 0;

        for (uint32_t b = 0; b < batch->batch; b++)
            for (uint32_t t = 0; t < batch->tokens[b]; t++, j++) {
                uint32_t position = batch->start[b] + t;
                uint32_t page = (uint32_t)batch->indices[(uint32_t)batch->indptr[b] + position / page_tokens];

                for (uint32_t h = 0; h < pool->plane_specs[p].heads; h++)
                    exec_pool_want_token(pool, p, page, position % page_tokens, h,
                                         source + batch->offsets[p] + j * batch->token_strides[p] +
                                             h * batch->head_strides[p]);
            }
    }
}

void exec_batch_free(struct exec_batch *batch)
{
    free(batch->bytes);
    batch->bytes = NULL;
}
