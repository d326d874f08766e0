/**
 * kvpool-exec's life on the host backend: hello, slabs and buffers, malformed messages, a daemon that does not read, its
 * end at end-of-file, and its death in the middle of an append.
 */
#include "exec_peer.h"
#include "seed.h"

#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define HELLO   KVPOOL__V1__METHOD__METHOD_EXEC_HELLO
#define CREATE  KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE
#define IMPORT  KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_IMPORT
#define JOB     KVPOOL__V1__METHOD__METHOD_EXEC_JOB
#define SESSION 77

static struct exec_peer peer;
static uint64_t seed;

static void setup(void)
{
    seed = test_seed();
    printf("seed %" PRIu64 "\n", seed);
    exec_peer_start(&peer, "host");
}

static void ends_well(void)
{
    int status = exec_peer_end(&peer);

    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), 0);
}

START_TEST(hello_tells_pid_backend_and_device)
{
    Kvpool__V1__ExecHelloRequest hello = KVPOOL__V1__EXEC_HELLO_REQUEST__INIT;
    const Kvpool__V1__ExecHelloReply *reply;
    struct exec_answer answer;

    hello.abi_version = KVP_ABI_VERSION;
    hello.backend = "host";
    answer = exec_peer_call(&peer, HELLO, &hello.base, NULL, 0);
    ck_assert_int_eq(answer.status, KVP_OK);
    reply = (const void *)answer.body;
    ck_assert_uint_eq(reply->pid, (uint32_t)peer.pid);
    ck_assert_str_eq(reply->backend, "host");
    ck_assert_uint_eq(reply->abi_version, KVP_ABI_VERSION);
    ck_assert_uint_eq(reply->n_devices, 1);
    ck_assert_uint_eq(reply->n_device_bytes, 1);
    ck_assert_uint_eq(reply->n_device_names, 1);
    ck_assert_str_eq(reply->devices[0], "host");
    ck_assert_uint_gt(reply->device_bytes[0], 1 << 20);
    exec_answer_free(&answer);
    ends_well();
}
END_TEST

START_TEST(hello_of_another_version_or_backend_is_refused)
{
    Kvpool__V1__ExecHelloRequest hello = KVPOOL__V1__EXEC_HELLO_REQUEST__INIT;

    hello.abi_version = KVP_ABI_VERSION + 1;
    ck_assert_int_eq(exec_peer_status(&peer, HELLO, &hello.base, NULL, 0), KVP_EMISMATCH);
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_EMISMATCH);
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);
    ends_well();
}
END_TEST

START_TEST(a_slab_is_a_zeroed_private_sealed_memfd)
{
    struct exec_pool pool;
    struct stat st;

    exec_pool_make(&pool, 1, &exec_plain);
    exec_pool_create(&pool, &peer);
    ck_assert_int_eq(fstat(pool.slab_fd, &st), 0);
    ck_assert_uint_eq(st.st_mode & 07777, 0600);
    ck_assert_int_eq(st.st_size, (off_t)pool.slab_bytes);
    ck_assert_int_ge(st.st_blocks * 512, (off_t)pool.slab_bytes);
    ck_assert_int_eq(fcntl(pool.slab_fd, F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW), F_SEAL_SHRINK | F_SEAL_GROW);
    ck_assert_mem_eq(pool.slab, pool.want, pool.slab_bytes);
    exec_pool_free(&pool);
    ends_well();
}
END_TEST

START_TEST(a_slab_asked_for_again_is_the_same_one)
{
    Kvpool__V1__ExecSlabCreateRequest create = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    struct exec_answer answer;
    struct exec_pool pool;
    struct stat first, again;

    exec_pool_make(&pool, 1, &exec_plain);
    exec_pool_create(&pool, &peer);
    create.pool_id = pool.id;
    create.spec = &pool.spec;
    create.bytes = pool.slab_bytes;
    answer = exec_peer_call(&peer, CREATE, &create.base, NULL, 0);
    ck_assert_int_eq(answer.status, KVP_OK);
    ck_assert_int_eq(fstat(pool.slab_fd, &first), 0);
    ck_assert_int_eq(fstat(answer.fd, &again), 0);
    ck_assert_uint_eq(first.st_ino, again.st_ino);
    exec_answer_free(&answer);
    create.bytes += 4096;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EEXIST);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_OK); /* adopted already: stays */
    exec_pool_free(&pool);
    ends_well();
}
END_TEST

START_TEST(wrong_slabs_are_refused)
{
    Kvpool__V1__ExecSlabCreateRequest create = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    struct exec_pool pool;

    exec_pool_make(&pool, 1, &exec_plain);
    create.pool_id = 1;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EINVAL); /* no spec */
    create.spec = &pool.spec;
    create.bytes = pool.totals.slab_bytes - 1;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EINVAL);
    create.bytes = UINT64_MAX;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EINVAL);
    create.bytes = 1ull << 60;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_ENOMEM);
    create.bytes = pool.slab_bytes;
    create.device = "GPU-00000000-0000-0000-0000-000000000000";
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_ENODEV);
    create.device = "";
    create.rank = KVP_GPUS_MAX;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EINVAL);
    create.rank = 0;
    pool.spec.pages = 0;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EINVAL);
    pool.spec.pages = 64;
    pool.spec.memory = KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_EINVAL);
    pool.spec.memory = KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT;
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, false), KVP_ELOST); /* nobody made it */
    pool.slab_fd = memfd_create("short", MFD_CLOEXEC);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_EINVAL);
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);
    exec_pool_free(&pool);
    ends_well();
}
END_TEST

START_TEST(a_buffer_that_could_shrink_or_is_too_short_is_refused)
{
    Kvpool__V1__ExecBufferImportRequest import = KVPOOL__V1__EXEC_BUFFER_IMPORT_REQUEST__INIT;
    uint8_t handle[64] = {0};
    int unsealable = memfd_create("test", MFD_CLOEXEC),
        sealable = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert_int_eq(ftruncate(unsealable, 4096), 0);
    ck_assert_int_eq(ftruncate(sealable, 4096), 0);
    import.session_id = SESSION;
    import.buffer = 1;
    import.device = "host";
    import.bytes = 4096;
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &unsealable, 1), KVP_EINVAL);
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &sealable, 1), KVP_OK);
    ck_assert_int_ne(ftruncate(sealable, 0), 0); /* it is sealed now */
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, NULL, 0), KVP_EINVAL);
    import.offset = 1;
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &sealable, 1), KVP_EINVAL);
    import.offset = UINT64_MAX;
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &sealable, 1), KVP_EINVAL);
    import.offset = 0;
    import.bytes = 0;
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &sealable, 1), KVP_EINVAL);
    import.bytes = 4096;
    import.buffer = 0;
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &sealable, 1), KVP_EINVAL);
    import.buffer = 1;
    import.ipc_handle = (ProtobufCBinaryData){63, handle};
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, NULL, 0), KVP_EINVAL);
    import.ipc_handle.len = 64;
    ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, NULL, 0), KVP_ENODEV);
    close(unsealable);
    close(sealable);
    ends_well();
}
END_TEST

START_TEST(a_dropped_buffer_is_known_no_more)
{
    Kvpool__V1__ExecBufferImportRequest import = KVPOOL__V1__EXEC_BUFFER_IMPORT_REQUEST__INIT;
    Kvpool__V1__ExecBufferDropRequest drop = KVPOOL__V1__EXEC_BUFFER_DROP_REQUEST__INIT;
    static struct exec_batch batch;
    struct exec_pool pool;
    void *at;
    int fd = exec_memfd(1 << 20, &at);

    exec_pool_make(&pool, 1, &exec_plain);
    exec_pool_create(&pool, &peer);
    do {
        exec_batch_make(&batch, &pool, 0, SESSION, 1, &seed);
    } while (batch.nnz == 0 || batch.n_bytes > 1 << 20);
    batch.job.inline_.len = 0;
    batch.job.buffer = 2;
    import.session_id = drop.session_id = SESSION;
    import.device = "host";
    import.bytes = 1 << 20;
    for (import.buffer = 1; import.buffer <= 3; import.buffer++)
        ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, &fd, 1), KVP_OK);
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &batch.job.base, NULL, 0), KVP_OK);
    drop.buffer = 2;
    ck_assert_int_eq(exec_peer_status(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP, &drop.base, NULL, 0), KVP_OK);
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &batch.job.base, NULL, 0), KVP_ENOENT);
    batch.job.buffer = 1;
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &batch.job.base, NULL, 0), KVP_OK);
    drop.buffer = 0; /* all that are left */
    ck_assert_int_eq(exec_peer_status(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_BUFFER_DROP, &drop.base, NULL, 0), KVP_OK);
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &batch.job.base, NULL, 0), KVP_ENOENT);
    munmap(at, 1 << 20);
    close(fd);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
    ends_well();
}
END_TEST

START_TEST(garbage_on_the_socket_is_survived_and_an_envelope_is_answered)
{
    struct kvp_envelope envelope = {.magic = KVP_ENVELOPE_MAGIC, .method = JOB, .bytes = 3, .tag = 5};
    unsigned char bytes[512];
    struct exec_answer answer;

    for (unsigned i = 0; i < 2000; i++) {
        size_t n = 1 + exec_random(&seed) % sizeof(bytes);

        for (size_t b = 0; b < n; b++)
            bytes[b] = (unsigned char)exec_random(&seed);
        ck_assert_int_eq(send(peer.socket, bytes, n, 0), (ssize_t)n);
    }
    memcpy(bytes, &envelope, sizeof(envelope));
    memset(bytes + sizeof(envelope), 0xff, 3); /* no protobuf */
    ck_assert_int_gt(send(peer.socket, bytes, sizeof(envelope) + 3, 0), 0);
    answer = exec_peer_next(&peer);
    ck_assert_int_eq(answer.status, KVP_EPROTO);
    ck_assert_uint_eq(answer.tag, 5);
    exec_answer_free(&answer);
    ck_assert_int_gt(send(peer.socket, bytes, sizeof(envelope) + 2, 0), 0); /* shorter than its envelope says */
    answer = exec_peer_next(&peer);
    ck_assert_int_eq(answer.status, KVP_EPROTO);
    exec_answer_free(&answer);
    envelope = (struct kvp_envelope){.magic = KVP_ENVELOPE_MAGIC, .method = 12, .tag = 6};
    ck_assert_int_gt(send(peer.socket, &envelope, sizeof(envelope), 0), 0); /* a method of the service, not of this */
    answer = exec_peer_next(&peer);
    ck_assert_int_eq(answer.status, KVP_ENOSYS);
    exec_answer_free(&answer);
    peer.tag = 6;
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);
    ends_well();
}
END_TEST

#ifndef __SANITIZE_THREAD__
static unsigned answered, overrun; /* answers to spoiled messages; those that only said "too many" */

static struct exec_answer next_answer(void)
{
    struct exec_answer answer = exec_peer_next(&peer);

    ck_assert_ptr_nonnull(answer.body);
    answered++;
    overrun += answer.status == KVP_ELIMIT;
    return answer;
}

/* A message of `method` whose body has a few wrong bytes, or ends early. */
static void send_spoiled(uint16_t method, const ProtobufCMessage *good, uint64_t tag, const int *fds, unsigned n_fds)
{
    static unsigned char body[49152];
    struct kvp_wire_packet packet = {.memfd = -1};
    struct kvp_envelope envelope = {.magic = KVP_ENVELOPE_MAGIC, .method = method, .tag = tag};
    static unsigned char message[sizeof(envelope) + sizeof(body)];
    size_t n = protobuf_c_message_get_packed_size(good);
    enum kvp_status status;

    ck_assert_uint_lt(n, sizeof(body));
    protobuf_c_message_pack(good, body);
    for (uint64_t i = 1 + exec_random(&seed) % 4; i > 0 && n > 0; i--)
        switch (exec_random(&seed) % 3) {
        case 0:
            body[exec_random(&seed) % n] = (unsigned char)exec_random(&seed);
            break;
        case 1: /* numbers at their ends */
            body[exec_random(&seed) % n] = exec_random(&seed) % 2 != 0 ? 0xff : 0;
            break;
        default:
            n -= exec_random(&seed) % (n / 8 + 1);
        }
    envelope.bytes = (uint32_t)n;
    memcpy(message, &envelope, sizeof(envelope));
    memcpy(message + sizeof(envelope), body, n);
    packet.bytes = message;
    packet.n = sizeof(envelope) + n;
    while ((status = kvp_wire_send(peer.socket, &packet, fds, n_fds)) == KVP_EAGAIN) {
        struct exec_answer answer = next_answer();

        exec_answer_free(&answer);
    }
    ck_assert_int_eq(status, KVP_OK);
}

START_TEST(spoiled_jobs_slabs_and_buffers_end_nothing)
{
    Kvpool__V1__ExecSlabAdoptRequest adopt = KVPOOL__V1__EXEC_SLAB_ADOPT_REQUEST__INIT;
    Kvpool__V1__ExecBufferImportRequest import = KVPOOL__V1__EXEC_BUFFER_IMPORT_REQUEST__INIT;
    Kvpool__V1__ExecHelloRequest hello = KVPOOL__V1__EXEC_HELLO_REQUEST__INIT;
    uint32_t copies[] = {1, 2, 3}, others[] = {4, 5, 6}, tokens[] = {16, 5, 0};
    uint64_t outputs[7] = {0, 8192, 16384, 32768, 40960, 49152, 57344};
    struct exec_shape shape = exec_plain;
    static struct exec_batch batch;
    struct exec_answer answer;
    struct exec_pool pool;
    int fds[3];
    void *at;

    shape.pages = 32;
    shape.heads = 1;
    shape.k_dim = shape.v_dim = 8;
    exec_pool_make(&pool, 1, &shape);
    exec_pool_create(&pool, &peer);
    fds[0] = exec_memfd(1 << 16, &at);
    import.buffer = 1;
    import.device = "host";
    import.bytes = 1 << 16;
    for (import.session_id = SESSION; import.session_id < SESSION + 60; import.session_id++)
        ck_assert_int_eq(exec_peer_status(&peer, IMPORT, &import.base, fds, 1), KVP_OK);
    import.session_id = SESSION;
    adopt.pool_id = pool.id;
    adopt.spec = &pool.spec;
    adopt.bytes = pool.slab_bytes;
    adopt.has_slab_fd = true;
    ck_assert_int_eq(fcntl(peer.socket, F_SETFL, O_NONBLOCK), 0);
    for (unsigned i = 0; i < 6000; i++) {
        exec_batch_make(&batch, &pool, 0, 1000 + i, 1 + i % 7, &seed); /* a session each: a wait holds up one */
        batch.job.n_copy_sources = batch.job.n_copy_destinations = batch.job.n_copy_tokens = i % 4;
        batch.job.copy_sources = copies;
        batch.job.copy_destinations = others;
        batch.job.copy_tokens = tokens;
        batch.job.done_timeline = 16;
        batch.job.done_value = 1;
        if (i % 3 == 0) {
            batch.job.kind = KVPOOL__V1__JOB_KIND__JOB_INDEX;
            batch.job.session_id = SESSION + i % 60;
            batch.job.inline_.len = 0;
            batch.job.buffer = 1;
            batch.job.n_output_offsets = 7;
            batch.job.output_offsets = outputs;
            batch.job.wanted = 127;
        }
        send_spoiled(JOB, &batch.job.base, 1000000 + i, NULL, 0);
        if (i % 8 == 0)
            send_spoiled(IMPORT, &import.base, 2000000 + i, fds, 1);
        if (i % 16 == 0) {
            int slab[3] = {pool.slab_fd, pool.timelines_fd, pool.table_fd};

            send_spoiled(KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_ADOPT, &adopt.base, 3000000 + i, slab, 3);
        }
    }
    peer.tag = 4000000;
    ck_assert_int_eq(fcntl(peer.socket, F_SETFL, 0), 0);
    hello.abi_version = KVP_ABI_VERSION;
    exec_peer_send(&peer, HELLO, &hello.base, NULL, 0);
    do { /* answers to what was spoiled, in any number; the last that matters is hello's */
        answer = next_answer();
        exec_answer_free(&answer);
    } while (answer.tag != peer.tag);
    ck_assert_msg(answered > 5000 && overrun < answered / 10, "%u answers, %u of them \"too many\"", answered, overrun);
    ck_assert_int_eq(answer.status, KVP_OK);
    for (uint64_t i = pool.totals.slab_bytes; i < pool.slab_bytes; i++)
        ck_assert_uint_eq(pool.slab[i], 0); /* nothing behind the planes was stored to */
    munmap(at, 1 << 16);
    close(fds[0]);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
    ends_well();
}
END_TEST
#endif

START_TEST(a_daemon_that_does_not_read_loses_no_answer)
{
    enum { CALLS = 3000 };
    Kvpool__V1__ExecHelloRequest hello = KVPOOL__V1__EXEC_HELLO_REQUEST__INIT;
    struct kvp_wire_packet packet;
    unsigned sent = 0, got = 0;

    hello.abi_version = KVP_ABI_VERSION;
    ck_assert_int_eq(fcntl(peer.socket, F_SETFL, O_NONBLOCK), 0);
    while (got < CALLS) { /* as many as fit, then one answer, and so on: the sockets stay full */
        enum kvp_status status = KVP_EAGAIN;

        if (sent < CALLS) {
            ck_assert_int_eq(kvp_wire_pack(HELLO, 0, KVP_OK, sent + 1, &hello.base, &packet), KVP_OK);
            status = kvp_wire_send(peer.socket, &packet, NULL, 0);
            kvp_wire_packet_free(&packet);
            sent += status == KVP_OK;
        }
        if (status == KVP_EAGAIN) {
            struct exec_answer answer = exec_peer_next(&peer);

            ck_assert_uint_eq(answer.tag, ++got);
            ck_assert_int_eq(answer.status, KVP_OK);
            exec_answer_free(&answer);
        }
    }
    ends_well();
}
END_TEST

START_TEST(no_process_is_listed_where_there_is_no_gpu)
{
    Kvpool__V1__ExecProcessesRequest request = KVPOOL__V1__EXEC_PROCESSES_REQUEST__INIT;
    struct exec_answer answer =
        exec_peer_call(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, &request.base, NULL, 0);

    ck_assert_int_eq(answer.status, KVP_OK);
    ck_assert(((const Kvpool__V1__ExecProcessesReply *)answer.body)->known);
    ck_assert_uint_eq(((const Kvpool__V1__ExecProcessesReply *)answer.body)->n_pids, 0);
    exec_answer_free(&answer);
    ends_well();
}
END_TEST

START_TEST(end_of_file_ends_it_with_jobs_open)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_pool pool;

    exec_pool_make(&pool, 1, &exec_plain);
    exec_pool_create(&pool, &peer);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.pool_id = pool.id;
    job.wait_value = 1; /* for ever */
    for (job.job = 1; job.job <= 8; job.job++) {
        job.session_id = job.job / 2;
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    }
    ends_well();
    exec_pool_free(&pool);
}
END_TEST

START_TEST(killed_in_mid_append_its_slab_lives_and_the_next_one_does_it_again)
{
    struct exec_shape shape = exec_plain;
    static struct exec_batch batch;
    struct exec_answer answer;
    struct exec_pool pool;

    shape.pages = 1024;
    exec_pool_make(&pool, 1, &shape);
    exec_pool_create(&pool, &peer);
    do {
        exec_batch_make(&batch, &pool, 1, SESSION, 1, &seed);
    } while (batch.nnz < 8192);
    batch.job.done_timeline = 16;
    batch.job.done_value = 7;
    exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0);
    for (unsigned round = 0;; round++) { /* the first byte of the append shows that it has begun */
        uint32_t page = (uint32_t)batch.indices[batch.start[0] / 16], offset = batch.start[0] % 16;
        volatile unsigned char *first = pool.slab + pool.places[0].offset + page * pool.places[0].page_stride +
                                        offset * pool.places[0].token_stride;

        if (memcmp((void *)first, batch.bytes, 16) == 0 || !exec_peer_quiet(&peer))
            break;
        (void)round;
    }
    exec_peer_kill(&peer);
    exec_peer_start(&peer, "host");
    ck_assert_int_eq(exec_peer_hello(&peer, "host"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_OK);
    answer = exec_peer_call(&peer, JOB, &batch.job.base, NULL, 0);
    ck_assert_int_eq(answer.status, KVP_OK);
    exec_answer_free(&answer);
    ck_assert_uint_eq(pool.timelines[16].value, 7);
    exec_batch_want(&batch, &pool, batch.bytes);
    ck_assert_mem_eq(pool.slab, pool.want, pool.slab_bytes);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
    ends_well();
}
END_TEST

START_TEST(a_job_without_the_pools_timelines_is_refused)
{
    Kvpool__V1__ExecSlabCreateRequest create = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_pool pool;

    exec_pool_make(&pool, 1, &exec_plain);
    create.pool_id = job.pool_id = pool.id;
    create.spec = &pool.spec;
    create.bytes = pool.slab_bytes;
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_OK);
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &job.base, NULL, 0), KVP_EMISMATCH);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, false), KVP_OK);
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &job.base, NULL, 0), KVP_OK);
    pool.table->state = KVP_TABLE_LOST;
    ck_assert_int_eq(exec_peer_status(&peer, JOB, &job.base, NULL, 0), KVP_ELOST);
    exec_pool_free(&pool);
    ends_well();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("kvpool-exec: life");
    TCase *life = tcase_create("life");
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(life, setup, NULL);
    tcase_set_timeout(life, 60);
    tcase_add_test(life, hello_tells_pid_backend_and_device);
    tcase_add_test(life, hello_of_another_version_or_backend_is_refused);
    tcase_add_test(life, a_slab_is_a_zeroed_private_sealed_memfd);
    tcase_add_test(life, a_slab_asked_for_again_is_the_same_one);
    tcase_add_test(life, wrong_slabs_are_refused);
    tcase_add_test(life, a_buffer_that_could_shrink_or_is_too_short_is_refused);
    tcase_add_test(life, a_dropped_buffer_is_known_no_more);
    tcase_add_test(life, garbage_on_the_socket_is_survived_and_an_envelope_is_answered);
#ifndef __SANITIZE_THREAD__ /* its sessions store to the same pages at once: a race, and the test's own */
    tcase_add_test(life, spoiled_jobs_slabs_and_buffers_end_nothing);
#endif
    tcase_add_test(life, a_daemon_that_does_not_read_loses_no_answer);
    tcase_add_test(life, no_process_is_listed_where_there_is_no_gpu);
    tcase_add_test(life, end_of_file_ends_it_with_jobs_open);
    tcase_add_test(life, killed_in_mid_append_its_slab_lives_and_the_next_one_does_it_again);
    tcase_add_test(life, a_job_without_the_pools_timelines_is_refused);
    suite_add_tcase(suite, life);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
