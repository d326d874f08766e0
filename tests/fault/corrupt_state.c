/**
 * What was kept is not as it was: a ledger with words changed, cut off or of another version, memory that is missing
 * or too small. kvpoold refuses it (exit 3, with the reason), or repairs it, or says that the pool is lost; it never
 * dies of a signal, hangs, or serves a ledger that its audit finds unsound.
 *
 *   corrupt_state [--mutations N] [--seed S]         200 mutations, seed 1
 *
 * A daemon under kvpool-keeper makes a small state; its memory is copied from the keeper, which then ends. The test is
 * the service manager from there on: for each mutation it makes the memory anew, spoils it, and starts kvpoold on it.
 */
#include "pool_calls.h"

#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK_BYTES 4096u
#define REFUSED     3 /* kvpoold's exit code */

enum object { LEDGER, TABLE, TIMELINES, SLAB, PROGRESS, OBJECTS };
static const char *const names[OBJECTS] = {"ledger", "t0", "l0", "s0.0", "p0.0"};
static const char *const made_as[OBJECTS] = {"kvpool-ledger", "kvpool-t0", "kvpool-l0", "kvp-slab", "kvpool-p0.0"};

/* A memory object: its size and those of its blocks that are not zero. */
struct image {
    uint64_t bytes;
    uint32_t n;
    uint32_t *index;
    unsigned char *blocks;
};

static struct image images[OBJECTS];
static unsigned mutations = 200;
static uint64_t seed = 1, state;

static uint32_t random_below(uint32_t below)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((state >> 32) * below >> 32);
}

/* ---- the state that is kept -------------------------------------------------------------------------------------- */

static void take_image(int fd, struct image *image)
{
    static const unsigned char zeros[BLOCK_BYTES];
    unsigned char block[BLOCK_BYTES];
    struct stat st;

    ck_assert_int_eq(fstat(fd, &st), 0);
    image->bytes = (uint64_t)st.st_size;
    for (off_t at = 0; (at = lseek(fd, at, SEEK_DATA)) >= 0; at += BLOCK_BYTES) {
        ssize_t n = pread(fd, block, BLOCK_BYTES, at);

        ck_assert_int_gt(n, 0);
        if (memcmp(block, zeros, (size_t)n) == 0)
            continue;
        image->index = realloc(image->index, (image->n + 1) * sizeof(uint32_t));
        image->blocks = realloc(image->blocks, (image->n + 1) * (size_t)BLOCK_BYTES);
        ck_assert(image->index != NULL && image->blocks != NULL);
        memset(image->blocks + image->n * (size_t)BLOCK_BYTES, 0, BLOCK_BYTES);
        memcpy(image->blocks + image->n * (size_t)BLOCK_BYTES, block, (size_t)n);
        image->index[image->n++] = (uint32_t)(at / BLOCK_BYTES);
    }
}

/* Of what the keeper holds, by the names that the memory was made with. */
static void take_images(pid_t keeper)
{
    char folder[64], path[PATH_MAX], link[PATH_MAX];
    DIR *dir;

    snprintf(folder, sizeof(folder), "/proc/%d/fd", (int)keeper);
    dir = opendir(folder);
    ck_assert_ptr_nonnull(dir);
    for (const struct dirent *entry = readdir(dir); entry != NULL; entry = readdir(dir)) {
        ssize_t n;

        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        n = readlink(path, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = 0;
        for (int i = 0; i < OBJECTS; i++) {
            int fd;

            if (strncmp(link, "/memfd:", 7) != 0 || strncmp(link + 7, made_as[i], strlen(made_as[i])) != 0)
                continue;
            fd = open(path, O_RDONLY | O_CLOEXEC);
            ck_assert_int_ge(fd, 0);
            take_image(fd, &images[i]);
            close(fd);
        }
    }
    closedir(dir);
    for (int i = 0; i < OBJECTS; i++)
        ck_assert_msg(images[i].bytes > 0, "the keeper does not hold %s", made_as[i]);
}

static void lease_session(int socket, char token[33])
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    struct test_reply reply;

    request.lease_ms = KVP_LEASE_MS_MAX;
    test_call(socket, METHOD(OPEN_SESSION), &request.base, &kvpool__v1__open_session_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    snprintf(token, 33, "%s", ((Kvpool__V1__OpenSessionReply *)(void *)reply.body)->session);
    test_reply_free(&reply);
}

static enum kvp_status open_and_write(int socket, char *token, uint64_t key, bool durable, uint32_t tokens,
                                       uint64_t *ret_seq)
{
    Kvpool__V1__OpenSequencesRequest open = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    Kvpool__V1__AdvanceRequest advance = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    struct test_reply reply;
    enum kvp_status status;

    open.session = token;
    open.pool = (char *)(uintptr_t)"p";
    open.keys = &key;
    open.n_keys = 1;
    open.durable = durable;
    test_call(socket, METHOD(OPEN_SEQUENCES), &open.base, &kvpool__v1__open_sequences_reply__descriptor, &reply);
    status = reply.status;
    *ret_seq = status == KVP_OK ? ((Kvpool__V1__OpenSequencesReply *)(void *)reply.body)->seqs[0] : 0;
    test_reply_free(&reply);
    if (status != KVP_OK)
        return status;
    advance.session = token;
    advance.pool = open.pool;
    advance.seqs = ret_seq;
    advance.reserved = &tokens;
    advance.written = &tokens;
    advance.n_seqs = advance.n_reserved = 1;
    advance.n_written = *token != 0;
    test_call(socket, METHOD(ADVANCE), &advance.base, &kvpool__v1__advance_reply__descriptor, &reply);
    status = reply.status;
    test_reply_free(&reply);
    return status;
}

static void fork_sequence(int socket, char *token, uint64_t parent, uint64_t key)
{
    Kvpool__V1__ForkRequest request = KVPOOL__V1__FORK_REQUEST__INIT;
    struct test_reply reply;

    request.session = token;
    request.pool = (char *)(uintptr_t)"p";
    request.parents = &parent;
    request.keys = &key;
    request.n_parents = request.n_keys = 1;
    test_call(socket, METHOD(FORK), &request.base, &kvpool__v1__fork_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    test_reply_free(&reply);
}

static void close_sequence(int socket, char *token, uint64_t seq)
{
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    struct test_reply reply;

    request.session = token;
    request.pool = (char *)(uintptr_t)"p";
    request.seqs = &seq;
    request.n_seqs = 1;
    test_call(socket, METHOD(CLOSE_SEQUENCES), &request.base, &kvpool__v1__close_sequences_reply__descriptor, &reply);
    ck_assert_msg(reply.status == KVP_OK, "%s", reply.text);
    test_reply_free(&reply);
}

/* A session by lease and one of a connection, with sequences that were written, forked, cut short and closed. */
static void make_state(void)
{
    struct test_daemon keeper;
    struct test_pool pool;
    uint64_t seqs[8];
    char token[33];
    int socket, pidfd;
    pid_t daemon;

    test_keeper_start(&keeper, NULL);
    socket = test_connect(&keeper);
    test_create_pool(socket, "p", KVP_OK, "");
    test_map_pool(socket, "p", &pool);
    lease_session(socket, token);
    for (uint64_t i = 0; i < 8; i++)
        ck_assert_int_eq(open_and_write(socket, i % 2 == 0 ? token : (char *)(uintptr_t)"", i + 1, i % 4 < 2,
                                        10 + 15 * (uint32_t)i, &seqs[i]),
                         KVP_OK);
    fork_sequence(socket, token, seqs[4], 100);
    fork_sequence(socket, token, seqs[4], 101);
    close_sequence(socket, token, seqs[4]);
    close_sequence(socket, (char *)(uintptr_t)"", seqs[3]);
    kill(keeper.pid, SIGSTOP);
    daemon = test_keeper_child(&keeper);
    pidfd = test_pidfd((uint32_t)daemon);
    kill(daemon, SIGKILL);
    test_wait_for_end(pidfd);
    take_images(keeper.pid);
    kill(keeper.pid, SIGCONT);
    test_unmap_pool(&pool);
    test_expect_clean_audit(socket); /* of the successor */
    close(socket);
    ck_assert_int_eq(test_keeper_stop(&keeper), 0);
}

/* ---- the daemon on it -------------------------------------------------------------------------------------------- */

/* @param bytes  of it: less than the image has cuts it off */
static int make_object(const struct image *image, uint64_t bytes)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    for (uint32_t i = 0; i < image->n; i++) {
        uint64_t at = (uint64_t)image->index[i] * BLOCK_BYTES;
        uint64_t left = at < bytes ? bytes - at : 0;

        if (left > 0)
            ck_assert_int_gt(pwrite(fd, image->blocks + (size_t)i * BLOCK_BYTES,
                                    left < BLOCK_BYTES ? left : BLOCK_BYTES, (off_t)at),
                             0);
    }
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
    return fd;
}

static void become_daemon(const char *dir, const int fds[OBJECTS], int log)
{
    char program[PATH_MAX], text[32], list[128] = "";
    const char *bin = getenv("KVPOOL_BIN_DIR");
    unsigned n = 0;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(log, STDERR_FILENO);
    for (int i = 0; i < OBJECTS; i++) {
        if (fds[i] < 0)
            continue;
        if (dup2(fds[i], 3 + (int)n) < 0) /* those of the test lie above */
            _exit(126);
        snprintf(list + strlen(list), sizeof(list) - strlen(list), "%s%s", n++ > 0 ? ":" : "", names[i]);
    }
    snprintf(text, sizeof(text), "%d", (int)getpid());
    setenv("LISTEN_PID", text, 1);
    snprintf(text, sizeof(text), "%u", n);
    setenv("LISTEN_FDS", text, 1);
    setenv("LISTEN_FDNAMES", list, 1);
    snprintf(program, sizeof(program), "%.4000s/kvpoold", bin != NULL ? bin : "../bin");
    execl(program, program, "--backend", "host", "--runtime-dir", dir, "--set", "grpc.enabled=no", (char *)NULL);
    _exit(127);
}

struct run {
    pid_t pid;
    int log;
    char text[16384]; /* what it said */
    size_t n;
};

static void start(struct run *run, const char *dir, const int fds[OBJECTS])
{
    int log[2];

    ck_assert_int_eq(pipe2(log, O_CLOEXEC), 0);
    *run = (struct run){.pid = fork(), .log = log[0]};
    ck_assert_int_ge(run->pid, 0);
    if (run->pid == 0)
        become_daemon(dir, fds, log[1]);
    close(log[1]);
}

/* @return whether it serves; false: it has ended */
static bool serves(struct run *run)
{
    uint64_t until = test_now_ms() + TEST_WAIT_MS;

    for (;;) {
        struct pollfd ready = {.fd = run->log, .events = POLLIN};
        uint64_t now = test_now_ms();
        ssize_t n;

        ck_assert_msg(now < until, "the daemon hangs, saying: %s", run->text);
        if (poll(&ready, 1, (int)(until - now)) != 1)
            continue;
        n = read(run->log, run->text + run->n, sizeof(run->text) - 1 - run->n);
        if (n <= 0)
            return false;
        run->n += (size_t)n;
        run->text[run->n] = 0;
        if (strstr(run->text, " serves in ") != NULL)
            return true;
    }
}

static void expect_end(struct run *run, int code, const char *what)
{
    int status;

    ck_assert_int_eq(waitpid(run->pid, &status, 0), run->pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == code, "%s: it ended with status %#x, saying: %s", what,
                  status, run->text);
    close(run->log);
}

static void kill_daemon(struct run *run)
{
    kill(run->pid, SIGKILL);
    ck_assert_int_eq(waitpid(run->pid, NULL, 0), run->pid);
    close(run->log);
}

/* It answers, and its ledger is sound before and after it is changed. */
static bool pool_is_lost(int socket)
{
    Kvpool__V1__GetStatsReply *stats = test_stats(socket);
    bool lost = stats->n_pools == 0 || stats->pools[0]->state == KVPOOL__V1__POOL_STATE__POOL_LOST;

    kvpool__v1__get_stats_reply__free_unpacked(stats, NULL);
    return lost;
}

static void use(const char *dir, const char *what, bool expect_lost)
{
    struct test_daemon daemon;
    uint64_t seq;
    int socket;

    snprintf(daemon.socket, sizeof(daemon.socket), "%s/kvpool.sock", dir);
    socket = test_connect(&daemon);
    test_expect_clean_audit(socket);
    if (expect_lost)
        ck_assert_msg(pool_is_lost(socket), "%s: the pool is not lost", what);
    if (open_and_write(socket, (char *)(uintptr_t)"", 1000, false, 100, &seq) == KVP_OK)
        close_sequence(socket, (char *)(uintptr_t)"", seq);
    else
        ck_assert_int_eq(open_and_write(socket, (char *)(uintptr_t)"", 1000, false, 100, &seq) < 0, 1);
    test_expect_clean_audit(socket);
    close(socket);
}

/* ---- what is done to it ------------------------------------------------------------------------------------------ */

/* A word among those that are not zero, or near them. */
static uint64_t *any_word(unsigned char *ledger)
{
    const struct image *image = &images[LEDGER];
    uint64_t block = image->index[random_below(image->n)];

    for (int tries = 0; tries < 64; tries++) {
        uint64_t *word = (uint64_t *)(void *)(ledger + block * BLOCK_BYTES) + random_below(BLOCK_BYTES / 8);

        if (*word != 0)
            return word;
    }
    return (uint64_t *)(void *)(ledger + block * BLOCK_BYTES) + random_below(BLOCK_BYTES / 8);
}

static void spoil_word(unsigned char *ledger, char what[200])
{
    static const uint32_t values[] = {0, 1, 2, 3, 255, 256, 0x7fffffff, 0xfffffffe, 0xffffffff};
    uint64_t *word = any_word(ledger), was = *word;
    uint32_t *half = (uint32_t *)word + random_below(2);

    switch (random_below(4)) {
    case 0:
        *word ^= 1ull << random_below(64);
        break;
    case 1:
        *half = values[random_below(sizeof(values) / sizeof(values[0]))];
        break;
    case 2:
        *half += 1 - 2 * random_below(2);
        break;
    default:
        *word = *any_word(ledger);
        break;
    }
    snprintf(what, 200, "seed %llu: the word at %#llx was %#llx, is %#llx", (unsigned long long)seed,
             (unsigned long long)((unsigned char *)word - ledger), (unsigned long long)was, (unsigned long long)*word);
}

/* The log's count: entries of transactions long over are undone. */
static void spoil_log(unsigned char *ledger, char what[200])
{
    uint64_t *count = (uint64_t *)(void *)(ledger + 128);

    *count = 1 + random_below(40);
    snprintf(what, 200, "seed %llu: the log counts %llu entries", (unsigned long long)seed, (unsigned long long)*count);
}

/* Nothing from there on. */
static void spoil_end(unsigned char *ledger, char what[200])
{
    const struct image *image = &images[LEDGER];
    uint64_t from = (uint64_t)image->index[random_below(image->n)] * BLOCK_BYTES + 8 * random_below(BLOCK_BYTES / 8);

    for (uint32_t i = 0; i < image->n; i++) {
        uint64_t at = (uint64_t)image->index[i] * BLOCK_BYTES;

        if (at + BLOCK_BYTES > from)
            memset(ledger + (at > from ? at : from), 0, at > from ? BLOCK_BYTES : BLOCK_BYTES - (from - at));
    }
    snprintf(what, 200, "seed %llu: zeros from %#llx on", (unsigned long long)seed, (unsigned long long)from);
}

static void spoil(int fd, char what[200])
{
    unsigned char *ledger = mmap(NULL, images[LEDGER].bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    uint32_t kind = random_below(16);

    ck_assert_ptr_ne(ledger, MAP_FAILED);
    if (kind == 0)
        spoil_end(ledger, what);
    else if (kind == 1)
        spoil_log(ledger, what);
    else
        for (uint32_t n = kind == 2 ? 20 : 1; n > 0; n--)
            spoil_word(ledger, what);
    munmap(ledger, images[LEDGER].bytes);
}

static void make_objects(int fds[OBJECTS])
{
    for (int i = 0; i < OBJECTS; i++) {
        int low = make_object(&images[i], images[i].bytes);

        fds[i] = fcntl(low, F_DUPFD_CLOEXEC, 100);
        ck_assert_int_ge(fds[i], 0);
        close(low);
    }
}

static void close_objects(int fds[OBJECTS])
{
    for (int i = 0; i < OBJECTS; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static void remove_folder(const char *dir)
{
    char path[300];

    snprintf(path, sizeof(path), "%s/kvpool.sock", dir);
    unlink(path);
    snprintf(path, sizeof(path), "%s/kvpool.lock", dir);
    unlink(path);
    ck_assert_int_eq(rmdir(dir), 0);
}

/* ---- tests ------------------------------------------------------------------------------------------------------- */

START_TEST(what_was_kept_whole_is_served)
{
    char dir[200];
    int fds[OBJECTS];
    struct run run;

    test_folder(dir);
    for (int i = 0; i < 3; i++) {
        make_objects(fds);
        start(&run, dir, fds);
        ck_assert_msg(serves(&run), "%s", run.text);
        use(dir, "whole", false);
        kill_daemon(&run);
        close_objects(fds);
    }
    remove_folder(dir);
}
END_TEST

START_TEST(a_pool_without_its_memory_is_lost_and_said_to_be)
{
    char dir[200];
    int fds[OBJECTS];
    struct run run;

    test_folder(dir);
    for (int missing = TABLE; missing <= SLAB; missing++) {
        for (int cut = 0; cut < 2; cut++) {
            make_objects(fds);
            close(fds[missing]);
            fds[missing] = -1;
            if (cut == 1) {
                int low = make_object(&images[missing], images[missing].bytes / 2 & ~4095ull);

                fds[missing] = fcntl(low, F_DUPFD_CLOEXEC, 100);
                close(low);
            }
            start(&run, dir, fds);
            ck_assert_msg(serves(&run), "without %s: %s", names[missing], run.text);
            ck_assert_msg(strstr(run.text, "pool p is lost") != NULL, "%s", run.text);
            use(dir, names[missing], true);
            kill_daemon(&run);
            close_objects(fds);
        }
    }
    remove_folder(dir);
}
END_TEST

START_TEST(a_ledger_of_another_version_or_size_is_refused_and_kept)
{
    static const uint64_t at[] = {0, 8, 12, 16, 24}; /* magic, version, log, root, size */
    char dir[200];
    int fds[OBJECTS];
    struct run run;

    test_folder(dir);
    for (size_t i = 0; i <= sizeof(at) / sizeof(at[0]); i++) {
        uint32_t wrong = 77;

        make_objects(fds);
        if (i < sizeof(at) / sizeof(at[0])) {
            ck_assert_int_eq(pwrite(fds[LEDGER], &wrong, 4, (off_t)at[i]), 4);
        } else {
            close(fds[LEDGER]);
            fds[LEDGER] = make_object(&images[LEDGER], images[LEDGER].bytes / 2);
        }
        start(&run, dir, fds);
        ck_assert(!serves(&run));
        ck_assert_ptr_nonnull(strstr(run.text, "can not be adopted"));
        ck_assert_ptr_nonnull(strstr(run.text, "--discard-state"));
        ck_assert_ptr_null(strstr(run.text, "closed")); /* nothing was given up */
        expect_end(&run, REFUSED, "a wrong header");
        close_objects(fds);
    }
    remove_folder(dir);
}
END_TEST

START_TEST(a_spoiled_ledger_is_refused_or_served_soundly)
{
    unsigned refused = 0;
    char dir[200], what[200];
    int fds[OBJECTS];
    struct run run;

    test_folder(dir);
    state = seed;
    for (unsigned i = 0; i < mutations; i++) {
        make_objects(fds);
        spoil(fds[LEDGER], what);
        for (int again = random_below(4) == 0; again >= 0; again--) {
            start(&run, dir, fds);
            if (!serves(&run)) {
                refused++;
                ck_assert_msg(strstr(run.text, "can not be adopted") != NULL, "%s: %s", what, run.text);
                expect_end(&run, REFUSED, what);
                break;
            }
            use(dir, what, false);
            kill_daemon(&run);
        }
        close_objects(fds);
    }
    printf("%u mutations, seed %llu: %u refused\n", mutations, (unsigned long long)seed, refused);
    remove_folder(dir);
}
END_TEST

int main(int argc, char **argv)
{
    Suite *suite = suite_create("corrupt_state");
    TCase *tests = tcase_create("what was kept");
    SRunner *runner;
    int failed;

    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--mutations") == 0)
            mutations = (unsigned)strtoul(argv[i + 1], NULL, 10);
        if (strcmp(argv[i], "--seed") == 0)
            seed = strtoull(argv[i + 1], NULL, 10);
    }
    tcase_set_timeout(tests, 300 + 3 * mutations);
    tcase_add_unchecked_fixture(tests, make_state, NULL);
    tcase_add_test(tests, what_was_kept_whole_is_served);
    tcase_add_test(tests, a_pool_without_its_memory_is_lost_and_said_to_be);
    tcase_add_test(tests, a_ledger_of_another_version_or_size_is_refused_and_kept);
    tcase_add_test(tests, a_spoiled_ledger_is_refused_or_served_soundly);
    suite_add_tcase(suite, tests);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
