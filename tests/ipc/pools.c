/**
 * Pools over the session socket, with a real executor: what the daemon makes, hands out, loses and starts again.
 */
#include "daemon.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define METHOD(name) KVPOOL__V1__METHOD__METHOD_##name

static struct test_daemon server;
static int connection;

static void setup(void)
{
    test_daemon_start(&server, NULL, NULL);
    connection = test_connect(&server);
}

static void teardown(void)
{
    close(connection);
    ck_assert_int_eq(test_daemon_stop(&server), 0);
}

/* ---- calls ------------------------------------------------------------------------------------------------------------ */

#define PAGES       64
#define PAGE_TOKENS 16
#define DIM         8 /* one layer, one head, fp32: 32 bytes a token of K, as much of V */

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
        r->planes[i].dim = DIM;
        r->planes[i].dtype = KVPOOL__V1__DTYPE__DTYPE_F32;
        r->plane_pointers[i] = &r->planes[i];
    }
    r->spec.name = (char *)(uintptr_t)name;
    r->spec.pages = PAGES;
    r->spec.page_tokens = PAGE_TOKENS;
    r->spec.planes = r->plane_pointers;
    r->spec.n_planes = 2;
    r->request.spec = &r->spec;
}

static void create_pool(int socket, const char *name, enum kvp_status wanted, const char *text)
{
    struct pool_request r;
    struct test_reply reply;

    pool_request_init(&r, name);
    test_call(socket, METHOD(CREATE_POOL), &r.request.base, &kvpool__v1__create_pool_reply__descriptor, &reply);
    ck_assert_msg(reply.status == wanted, "%s: %s", kvp_status_name(reply.status), reply.text);
    ck_assert_msg(strstr(reply.text, text) != NULL, "%s", reply.text);
    test_reply_free(&reply);
}

static void attach(int socket, const char *pool, struct test_reply *ret_reply)
{
    Kvpool__V1__AttachRequest request = KVPOOL__V1__ATTACH_REQUEST__INIT;

    request.pool = (char *)(uintptr_t)pool;
    request.abi_version = KVP_ABI_VERSION;
    test_call(socket, METHOD(ATTACH), &request.base, &kvpool__v1__attach_reply__descriptor, ret_reply);
    ck_assert_msg(ret_reply->status == KVP_OK, "%s", ret_reply->text);
}

static uint64_t open_sequence(int socket, const char *pool, uint64_t key)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    struct test_reply reply;
    uint64_t seq;

    request.pool = (char *)(uintptr_t)pool;
    request.keys = &key;
    request.n_keys = 1;
    test_call(socket, METHOD(OPEN_SEQUENCES), &request.base, &kvpool__v1__open_sequences_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    seq = ((Kvpool__V1__OpenSequencesReply *)(void *)reply.body)->seqs[0];
    test_reply_free(&reply);
    return seq;
}

/* Append `tokens` of bytes `fill` to a sequence, at `at`, and wait until the timeline page says that it is done. */
static void append(int socket, const char *pool, uint64_t seq, uint32_t at, uint32_t tokens, unsigned char fill,
                   const struct kvp_timeline *timelines)
{
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    static unsigned char bytes[2 * DIM * 4 * PAGES * PAGE_TOKENS];
    uint64_t until = test_now_ms() + TEST_WAIT_MS, value;
    struct test_reply reply;
    uint32_t timeline;

    memset(bytes, fill, sizeof(bytes));
    request.pool = (char *)(uintptr_t)pool;
    request.seqs = &seq;
    request.at = &at;
    request.tokens = &tokens;
    request.n_seqs = request.n_at = request.n_tokens = 1;
    request.inline_.data = bytes;
    request.inline_.len = (size_t)2 * DIM * 4 * tokens;
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

static uint32_t executor_pid(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    uint32_t pid = stats->n_executors > 0 ? stats->executors[0]->pid : 0;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return pid;
}

static void expect_clean_audit(int socket)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    Kvpool__V1__AuditReply *audit;
    struct test_reply reply;

    test_call(socket, METHOD(AUDIT), &request.base, &kvpool__v1__audit_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    audit = (Kvpool__V1__AuditReply *)(void *)reply.body;
    ck_assert_msg(audit->clean, "%s", audit->n_violations > 0 ? audit->violations[0] : "?");
    test_reply_free(&reply);
}

/* A process's end, without being its parent. */
static void wait_for_end(int pidfd)
{
    struct pollfd ended = {.fd = pidfd, .events = POLLIN};

    ck_assert_int_eq(poll(&ended, 1, TEST_WAIT_MS), 1);
    close(pidfd);
}

static int pidfd_of(uint32_t pid)
{
    int pidfd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);

    ck_assert_msg(pidfd >= 0, "pid %u: %s", pid, strerror(errno));
    return pidfd;
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

/* ---- tests ------------------------------------------------------------------------------------------------------------- */

START_TEST(an_attached_process_gets_memory_that_can_not_be_cut_or_fault)
{
    struct test_reply reply;
    const Kvpool__V1__AttachReply *attached;
    const struct kvp_table_header *table;
    size_t bytes;

    create_pool(connection, "p", KVP_OK, "");
    attach(connection, "p", &reply);
    attached = (const Kvpool__V1__AttachReply *)(void *)reply.body;
    ck_assert_uint_eq(reply.n_fds, 4);
    for (unsigned i = 0; i < reply.n_fds; i++) {
        struct stat st;

        ck_assert_int_eq(fstat(reply.fds[i], &st), 0);
        ck_assert_uint_eq(st.st_mode & 0777, 0600);
        ck_assert_int_eq(fcntl(reply.fds[i], F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW),
                         F_SEAL_SHRINK | F_SEAL_GROW);
        ck_assert_int_ge(st.st_blocks * 512, st.st_size); /* all of it is backed */
        ck_assert_int_ne(ftruncate(reply.fds[i], 0), 0);
    }
    ck_assert_ptr_eq(mmap(NULL, 4096, PROT_WRITE, MAP_SHARED, reply.fds[attached->table_fd_index], 0), MAP_FAILED);
    ck_assert_int_eq(errno, EACCES);
    table = map_fd(&reply, attached->table_fd_index, PROT_READ, &bytes);
    ck_assert_uint_eq(table->magic, KVP_TABLE_MAGIC);
    ck_assert_uint_eq(table->state, KVP_TABLE_LIVE);
    ck_assert_uint_eq(table->bytes, bytes);
    ck_assert_uint_eq(table->pages, PAGES);
    munmap((void *)(uintptr_t)table, bytes);
    test_reply_free(&reply);
    expect_clean_audit(connection);
}
END_TEST

START_TEST(appended_bytes_are_written_by_the_executor_and_read_in_place)
{
    struct test_reply reply;
    const Kvpool__V1__AttachReply *attached;
    const struct kvp_timeline *timelines;
    const unsigned char *slab;
    size_t bytes, timelines_bytes, seen = 0;
    uint64_t seq;

    create_pool(connection, "p", KVP_OK, "");
    attach(connection, "p", &reply);
    attached = (const Kvpool__V1__AttachReply *)(void *)reply.body;
    slab = map_fd(&reply, attached->slabs[0]->fd_index, PROT_READ, &bytes);
    timelines = map_fd(&reply, attached->timelines_fd_index, PROT_READ | PROT_WRITE, &timelines_bytes);
    seq = open_sequence(connection, "p", 1);
    append(connection, "p", seq, 0, 20, 0xab, timelines);
    for (size_t i = 0; i < bytes; i++)
        seen += slab[i] == 0xab;
    ck_assert_uint_eq(seen, 20 * 2 * DIM * 4);
    ck_assert_uint_ne(executor_pid(connection), (uint32_t)server.pid);
    munmap((void *)(uintptr_t)slab, bytes);
    munmap((void *)(uintptr_t)timelines, timelines_bytes);
    test_reply_free(&reply);
    expect_clean_audit(connection);
}
END_TEST

START_TEST(a_killed_executor_is_replaced_and_the_pool_lives_on)
{
    struct test_reply reply;
    const struct kvp_timeline *timelines;
    const unsigned char *slab;
    size_t bytes, timelines_bytes, seen = 0;
    uint32_t first;
    uint64_t seq;
    int pidfd;

    create_pool(connection, "p", KVP_OK, "");
    attach(connection, "p", &reply);
    slab = map_fd(&reply, ((const Kvpool__V1__AttachReply *)(void *)reply.body)->slabs[0]->fd_index, PROT_READ, &bytes);
    timelines = map_fd(&reply, ((const Kvpool__V1__AttachReply *)(void *)reply.body)->timelines_fd_index,
                       PROT_READ | PROT_WRITE, &timelines_bytes);
    seq = open_sequence(connection, "p", 1);
    append(connection, "p", seq, 0, 20, 0xab, timelines);
    first = executor_pid(connection);
    pidfd = pidfd_of(first);
    kill((pid_t)first, SIGKILL);
    wait_for_end(pidfd);
    append(connection, "p", seq, 20, 20, 0xab, timelines);
    for (size_t i = 0; i < bytes; i++)
        seen += slab[i] == 0xab;
    ck_assert_uint_eq(seen, 40 * 2 * DIM * 4);
    ck_assert_uint_ne(executor_pid(connection), first);
    ck_assert_uint_ne(executor_pid(connection), 0);
    munmap((void *)(uintptr_t)slab, bytes);
    munmap((void *)(uintptr_t)timelines, timelines_bytes);
    test_reply_free(&reply);
    expect_clean_audit(connection);
}
END_TEST

START_TEST(an_executor_ends_with_its_daemon)
{
    uint32_t pid;
    int pidfd;

    create_pool(connection, "p", KVP_OK, "");
    pid = executor_pid(connection);
    pidfd = pidfd_of(pid);
    kill(server.pid, SIGKILL);
    wait_for_end(pidfd);
    ck_assert_int_eq(test_daemon_wait(&server), 128 + SIGKILL);
    test_daemon_start(&server, server.dir, NULL); /* for the teardown */
}
END_TEST

START_TEST(a_client_killed_while_its_call_waits_leaves_a_clean_ledger)
{
    for (int i = 0; i < 10; i++) {
        char name[16];
        pid_t pid;

        snprintf(name, sizeof(name), "p%d", i);
        pid = fork();
        ck_assert_int_ge(pid, 0);
        if (pid == 0) {
            struct pool_request r;
            int socket = test_connect(&server);

            pool_request_init(&r, name);
            test_send(socket, METHOD(CREATE_POOL), 1, &r.request.base, NULL, 0);
            kill(getpid(), SIGKILL);
        }
        ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
    }
    create_pool(connection, "last", KVP_OK, "");
    expect_clean_audit(connection);
}
END_TEST

START_TEST(a_pool_that_is_gone_leaves_no_fd_or_memory)
{
    Kvpool__V1__DeletePoolRequest request = KVPOOL__V1__DELETE_POOL_REQUEST__INIT;
    struct test_reply reply;
    unsigned before = 0;

    request.pool = (char *)"p";
    for (int i = 0; i < 5; i++) {
        create_pool(connection, "p", KVP_OK, "");
        test_call(connection, METHOD(DELETE_POOL), &request.base, &kvpool__v1__delete_pool_reply__descriptor, &reply);
        ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
        test_reply_free(&reply);
        if (i == 0)
            before = test_fd_count(server.pid); /* the executor runs from now on */
    }
    ck_assert_uint_eq(test_fd_count(server.pid), before);
    expect_clean_audit(connection);
}
END_TEST

/* ---- executors that do not work ---------------------------------------------------------------------------------------- */

static void refuse_with(const char *path, const char *start_ms, const char *text)
{
    char setting[300];
    const char *arguments[] = {"--set", setting, "--set", start_ms, NULL};

    snprintf(setting, sizeof(setting), "executor.path=%s", path);
    test_daemon_start(&server, NULL, arguments);
    connection = test_connect(&server);
    create_pool(connection, "p", KVP_ENODEV, text);
    kvpool__v1__get_stats_reply__free_unpacked(test_stats(connection), NULL);
    expect_clean_audit(connection);
    teardown();
}

START_TEST(a_missing_executor_is_said_and_the_daemon_serves_on)
{
    refuse_with("/nowhere/kvpool-exec", "executor.start_ms=20000", "");
}
END_TEST

START_TEST(an_executor_that_ends_at_once_is_said_and_the_daemon_serves_on)
{
    refuse_with("/bin/true", "executor.start_ms=20000", "ended");
}
END_TEST

START_TEST(an_executor_that_says_nothing_is_given_up_and_killed)
{
    char dir[200], path[256];
    FILE *script;

    test_folder(dir);
    snprintf(path, sizeof(path), "%s/silent", dir);
    script = fopen(path, "w");
    ck_assert_ptr_nonnull(script);
    fputs("#!/bin/sh\nexec sleep 1000\n", script);
    fclose(script);
    ck_assert_int_eq(chmod(path, 0700), 0);
    refuse_with(path, "executor.start_ms=300", "300 ms"); /* its stderr, the daemon's log, ends: so it was killed */
    unlink(path);
    rmdir(dir);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("pools");
    TCase *tests = tcase_create("with an executor");
    TCase *without = tcase_create("without one");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tests, 60);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, an_attached_process_gets_memory_that_can_not_be_cut_or_fault);
    tcase_add_test(tests, appended_bytes_are_written_by_the_executor_and_read_in_place);
    tcase_add_test(tests, a_killed_executor_is_replaced_and_the_pool_lives_on);
    tcase_add_test(tests, an_executor_ends_with_its_daemon);
    tcase_add_test(tests, a_client_killed_while_its_call_waits_leaves_a_clean_ledger);
    tcase_add_test(tests, a_pool_that_is_gone_leaves_no_fd_or_memory);
    suite_add_tcase(suite, tests);
    tcase_set_timeout(without, 60);
    tcase_add_test(without, a_missing_executor_is_said_and_the_daemon_serves_on);
    tcase_add_test(without, an_executor_that_ends_at_once_is_said_and_the_daemon_serves_on);
    tcase_add_test(without, an_executor_that_says_nothing_is_given_up_and_killed);
    suite_add_tcase(suite, without);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
