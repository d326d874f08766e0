/**
 * kvpool-exec's slabs in the hands of other processes, its death, what it must refuse, and whom the GPU serves.
 */
#include "exec_gpu.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CREATE KVPOOL__V1__METHOD__METHOD_EXEC_SLAB_CREATE

/* ---- workers ----------------------------------------------------------------------------------------------------- */

/* As a worker appends: its own kernel, on its own stream, over the mapped slab. */
static void append_in_place(const struct exec_pool *pool, const struct exec_batch *batch, unsigned char *slab)
{
    uint32_t page_tokens = pool->layout.page_tokens;
    struct kvp_plane_view planes[EXEC_PLANES_MAX];
    struct kvp_token_view sources[EXEC_PLANES_MAX];
    int64_t *slots = gpu_pinned(sizeof(*slots) * batch->nnz);
    unsigned char *rows = gpu_pinned(batch->n_bytes);
    struct kvp_append_args args = {.planes = planes,
                                   .sources = sources,
                                   .n_planes = pool->layout.n_planes,
                                   .pages = pool->layout.pages,
                                   .page_tokens = page_tokens,
                                   .at = {.kind = KVP_ADDRESS_SLOTS, .index_bits = 64, .nnz = batch->nnz}};
    uint32_t j = 0;

    for (uint32_t b = 0; b < batch->batch; b++)
        for (uint32_t t = 0; t < batch->tokens[b]; t++) {
            uint32_t position = batch->start[b] + t;

            slots[j++] = (int64_t)batch->indices[(uint32_t)batch->indptr[b] + position / page_tokens] * page_tokens +
                         position % page_tokens;
        }
    memcpy(rows, batch->bytes, batch->n_bytes);
    args.at.slot_mapping = slots;
    for (uint32_t p = 0; p < args.n_planes; p++) {
        planes[p] = kvp_plane_view_of(&pool->layout, pool->places, p, slab);
        sources[p] = (struct kvp_token_view){rows + batch->offsets[p], (int64_t)batch->token_strides[p],
                                             (int64_t)batch->head_strides[p]};
    }
    ck_assert_int_eq(kvp_cuda_append(&args, gpu_stream()), KVP_OK);
    gpu_sync();
}

static void worker_writes(void *arg)
{
    for (unsigned i = 0; i < LAYOUTS; i++) {
        unsigned char *slab = attach(&pools[i]);

        gpu_fill(slab, 0xa5, pools[i].slab_bytes); /* so that a byte stored where it does not belong shows anywhere */
        append_in_place(&pools[i], &batches[i], slab);
    }
    ck_assert_int_eq(send(*(int *)arg, "w", 1, 0), 1);
    pause(); /* killed here: the memory must not care */
}

static void worker_reads(void *arg)
{
    char byte;

    ck_assert_int_eq(recv(*(int *)arg, &byte, 1, 0), 1);
    for (unsigned i = 0; i < LAYOUTS; i++)
        check_slab(&pools[i], attach(&pools[i]), name_of(i));
}

START_TEST(what_one_worker_writes_by_its_own_kernel_another_reads_in_place_guards_included)
{
    pid_t writer, reader;
    int pair[2];

    make_all();
    for (unsigned i = 0; i < LAYOUTS; i++) {
        make_batch(&batches[i], &pools[i], 1, 4, 1);
        memset(pools[i].want, 0xa5, pools[i].slab_bytes);
        exec_batch_want(&batches[i], &pools[i], batches[i].bytes);
    }
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    reader = process(worker_reads, &pair[1]);
    writer = process(worker_writes, &pair[0]);
    ends_well(reader);
    kill(writer, SIGKILL);
    waitpid(writer, NULL, 0);
    ck_assert_int_eq(send(pair[0], "w", 1, 0), 1); /* and a newcomer, after the writer's death */
    ends_well(process(worker_reads, &pair[1]));
    free_all();
}
END_TEST

static void reads_by_64_bytes(void *arg)
{
    const struct exec_pool *pool = arg;

    close(pool->timelines_fd);
    close(pool->table_fd); /* nothing but the bytes of the message is left to it */
    ck_assert_int_lt(pool->slab_fd, 0);
    check_slab(pool, gpu_map_ipc(pool->ipc), "by the legacy handle");
}

START_TEST(a_process_that_has_only_the_64_bytes_attaches_and_reads)
{
    static struct exec_batch batch;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, true);
    make_batch(&batch, &pool, 1, 3, 1);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    ends_well(process(reads_by_64_bytes, &pool));
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

/* ---- its death --------------------------------------------------------------------------------------------------- */

START_TEST(killed_in_mid_append_its_slab_lives_and_the_next_one_does_it_again)
{
    struct exec_shape shape = exec_plain;
    static struct exec_batch batch;
    struct exec_pool pool;

    shape.pages = 2048;
    make_pool(&pool, &shape, false);
    make_batch(&batch, &pool, 1, 1, 20000);
    batch.job.done_timeline = 16;
    batch.job.done_value = 7;
    exec_peer_send(&peer, JOB, &batch.job.base, NULL, 0);
    /* at each run at another moment of it: while it unpacks, prepares, copies, or has just ended */
    for (uint64_t spins = exec_random(&seed) % 20000; spins > 0 && exec_peer_quiet(&peer); spins--)
        ;
    exec_peer_kill(&peer);
    ck_assert(pool.timelines[16].value == 0 || pool.timelines[16].value == 7);
    pool.timelines[16].value = 0;
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_OK);
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    ck_assert_uint_eq(pool.timelines[16].value, 7);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, attach(&pool), "done again by the next one");
    exec_batch_free(&batch);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_slab_outlives_every_process_that_has_cuda_open)
{
    static struct exec_batch first, second;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, false);
    make_batch(&first, &pool, 1, 2, 1);
    ck_assert_int_eq(do_job(&first.job), KVP_OK);
    exec_batch_want(&first, &pool, first.bytes);
    ck_assert_int_eq(exec_peer_end(&peer), 0); /* now the fd alone holds it, in a process that never called CUDA */
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, true), KVP_OK);
    make_batch(&second, &pool, 2, 2, 1);
    ck_assert_int_eq(do_job(&second.job), KVP_OK);
    exec_batch_want(&second, &pool, second.bytes);
    check_slab(&pool, attach(&pool), "after its maker's end");
    exec_batch_free(&first);
    exec_batch_free(&second);
    exec_pool_free(&pool);
}
END_TEST

START_TEST(a_slab_for_legacy_handles_dies_with_its_executor_and_that_is_said)
{
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, true);
    exec_peer_kill(&peer);
    exec_peer_start(&peer, "cuda");
    ck_assert_int_eq(exec_peer_hello(&peer, "cuda"), KVP_OK);
    ck_assert_int_eq(exec_pool_adopt(&pool, &peer, false), KVP_ELOST);
    exec_pool_free(&pool);
}
END_TEST

/* ---- what must be refused, and is survived ----------------------------------------------------------------------- */

START_TEST(what_is_no_memory_of_this_gpu_is_refused_and_the_executor_lives)
{
    Kvpool__V1__ExecSlabCreateRequest create = KVPOOL__V1__EXEC_SLAB_CREATE_REQUEST__INIT;
    static struct exec_batch batch;
    unsigned char garbage[64], handle[64];
    struct exec_pool pool, none;
    char device[64];
    void *at;
    int memfd = exec_memfd(4 << 20, &at), fd;

    make_pool(&pool, &exec_plain, false);
    gpu_first(device);
    random_bytes(garbage, sizeof(garbage));
    gpu_shared_by_fd(4 << 20, &fd);
    gpu_shared_by_ipc(4 << 20, handle);
    ck_assert_int_eq(import(&peer, 1, device, memfd, NULL, 0, 1 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, peer.socket, NULL, 0, 1 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, -1, garbage, 0, 1 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, 64 << 20), KVP_EINVAL); /* more than there is */
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 64 << 20, 1), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, 1 << 20),
                     KVP_EINVAL); /* less: the driver maps all or nothing */
    ck_assert_int_eq(import(&peer, 1, device, -1, handle, 0, 64 << 20), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, device, -1, handle, UINT64_MAX - 3, 8), KVP_EINVAL);
    ck_assert_int_eq(import(&peer, 1, "GPU-00000000-0000-0000-0000-000000000000", fd, NULL, 0, 4096), KVP_ENODEV);
    ck_assert_int_eq(import(&peer, 1, device, fd, NULL, 0, 4 << 20), KVP_OK);
    ck_assert_int_eq(import(&peer, 2, device, fd, NULL, 1 << 20, 3 << 20), KVP_OK); /* the same again, and its end */
    ck_assert_int_eq(import(&peer, 3, device, -1, handle, 1 << 20, 3 << 20), KVP_OK);
    ck_assert_int_eq(import(&peer, 4, device, -1, handle, 0, 1 << 20), KVP_OK);

    exec_pool_make(&none, 9, &exec_plain);
    create.pool_id = 9;
    create.spec = &none.spec;
    create.bytes = 1ull << 45; /* more than any GPU has */
    ck_assert_int_eq(exec_peer_status(&peer, CREATE, &create.base, NULL, 0), KVP_ENOMEM);
    make_batch(&batch, &pool, 1, 2, 1); /* and it works as before */
    ck_assert_int_eq(do_job(&batch.job), KVP_OK);
    exec_batch_want(&batch, &pool, batch.bytes);
    check_slab(&pool, attach(&pool), "after all that");
    munmap(at, 4 << 20);
    exec_batch_free(&batch);
    exec_pool_free(&pool);
    exec_pool_free(&none);
}
END_TEST

START_TEST(end_of_file_ends_it_with_jobs_open)
{
    Kvpool__V1__ExecJobRequest job = KVPOOL__V1__EXEC_JOB_REQUEST__INIT;
    struct exec_pool pool;

    make_pool(&pool, &exec_plain, false);
    job.kind = KVPOOL__V1__JOB_KIND__JOB_COPY;
    job.pool_id = pool.id;
    job.wait_value = 1; /* for ever */
    for (job.job = 1; job.job <= 8; job.job++) {
        job.session_id = job.job / 2;
        exec_peer_send(&peer, JOB, &job.base, NULL, 0);
    }
    exec_pool_free(&pool);
} /* teardown closes the socket, and it must end with 0 */
END_TEST

/* ---- whom the GPU serves ----------------------------------------------------------------------------------------- */

static bool listed(pid_t pid)
{
    Kvpool__V1__ExecProcessesRequest request = KVPOOL__V1__EXEC_PROCESSES_REQUEST__INIT;
    struct exec_answer answer =
        exec_peer_call(&peer, KVPOOL__V1__METHOD__METHOD_EXEC_PROCESSES, &request.base, NULL, 0);
    const Kvpool__V1__ExecProcessesReply *reply = (const void *)answer.body;
    bool found = false;

    ck_assert_int_eq(answer.status, KVP_OK);
    ck_assert_msg(reply->known, "NVML does not answer");
    for (size_t i = 0; i < reply->n_pids; i++)
        found |= reply->pids[i] == (uint32_t)pid;
    exec_answer_free(&answer);
    return found;
}

static void has_a_context(void *arg)
{
    gpu_sync();
    ck_assert_int_eq(send(*(int *)arg, "c", 1, 0), 1);
    pause();
}

START_TEST(a_process_with_a_context_is_listed_until_it_is_gone)
{
    int pair[2];
    char byte;
    pid_t pid;

    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    pid = process(has_a_context, &pair[1]);
    ck_assert(!listed(1));
    ck_assert_int_eq(recv(pair[0], &byte, 1, 0), 1);
    ck_assert(listed(pid));
    ck_assert(listed(peer.pid));
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    while (listed(pid)) /* the test's time limit ends it otherwise */
        ;
}
END_TEST

#define ADD(name, n) add(#name, name, n)

void exec_gpu_workers(exec_gpu_add *add)
{
    ADD(what_one_worker_writes_by_its_own_kernel_another_reads_in_place_guards_included, 1);
    ADD(a_process_that_has_only_the_64_bytes_attaches_and_reads, 1);
    ADD(killed_in_mid_append_its_slab_lives_and_the_next_one_does_it_again, 5);
    ADD(a_slab_outlives_every_process_that_has_cuda_open, 1);
    ADD(a_slab_for_legacy_handles_dies_with_its_executor_and_that_is_said, 1);
    ADD(what_is_no_memory_of_this_gpu_is_refused_and_the_executor_lives, 1);
    ADD(end_of_file_ends_it_with_jobs_open, 1);
    ADD(a_process_with_a_context_is_listed_until_it_is_gone, 1);
}
