/**
 * A worker of the demo: a process that serves its share of the requests (demo_serve.c) and checks the other's pages.
 *
 *   attach, ready ──go──► turns: answer the other worker, serve ──all served or stop──► BYE
 *                                                                                          │ the other's checks
 *                                                                     detached, ended ◄────┘ until its BYE, or its end
 *
 * The two talk over a socket pair: CHECK (this sequence, these tokens), CHECKED, BYE (no more checks of mine). The other
 * one's death ends the run: what it was to check stays unchecked, and is not counted.
 */
#include "cli.h"
#include "demo_worker.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define IDLE_MS 20

/* ---- the other worker -------------------------------------------------------------------------------------------- */

void demo_send(struct worker *w, const struct message *message)
{
    if (!w->peer_gone && send(w->peer, message, sizeof(*message), MSG_NOSIGNAL) != (ssize_t)sizeof(*message))
        w->peer_gone = true;
}

static bool peer_hung_up(const struct worker *w)
{
    struct pollfd at = {.fd = w->peer, .events = POLLIN};

    return poll(&at, 1, 0) == 1 && (at.revents & POLLHUP) != 0;
}

static enum kvp_status answer_check(struct worker *w, const struct message *message)
{
    struct message answer = {.kind = MESSAGE_CHECKED, .job = message->job};
    uint64_t pages, bad;
    enum kvp_status status;

    if (message->request >= w->trace.n || message->from > message->to)
        return KVP_EPROTO;
    status = demo_check(w->checker, message->seq, CHECK_KEY | w->next_key++, &w->trace, message->request, message->from,
                        message->to, &pages, &bad);
    if (status != KVP_OK) { /* its sequences may be gone because it is */
        w->peer_gone = w->peer_gone || peer_hung_up(w);
        return w->peer_gone ? KVP_OK : status;
    }
    atomic_fetch_add(&w->me->checked_pages, pages);
    atomic_fetch_add(&w->me->corrupt_bytes, bad);
    demo_send(w, &answer);
    return KVP_OK;
}

static enum kvp_status take_message(struct worker *w, const struct message *message)
{
    struct job *job;

    switch (message->kind) {
    case MESSAGE_CHECK:
        return answer_check(w, message);
    case MESSAGE_CHECKED:
        if (message->job >= JOBS_MAX || w->jobs[message->job].state != JOB_CHECKING)
            return KVP_EPROTO;
        job = &w->jobs[message->job];
        atomic_fetch_add(&w->me->requests, 1);
        return demo_close_job(w, job);
    case MESSAGE_BYE:
        w->peer_bye = true;
        return KVP_OK;
    default:
        return KVP_EPROTO;
    }
}

/* Take what is there; wait for it up to timeout_ms. Once the other is gone, what it was to check stays unchecked. */
static enum kvp_status serve_peer(struct worker *w, int timeout_ms)
{
    struct pollfd at = {.fd = w->peer, .events = POLLIN};
    enum kvp_status status = KVP_OK;

    while (!w->peer_gone && status == KVP_OK && poll(&at, 1, timeout_ms) == 1) {
        struct message message;
        ssize_t got = recv(w->peer, &message, sizeof(message), 0);

        timeout_ms = 0;
        if (got == (ssize_t)sizeof(message))
            status = take_message(w, &message);
        else if (got >= 0 || errno != EINTR)
            w->peer_gone = true;
    }
    for (unsigned i = 0; w->peer_gone && i < JOBS_MAX && status == KVP_OK; i++)
        if (w->jobs[i].state == JOB_CHECKING)
            status = demo_close_job(w, &w->jobs[i]);
    return status;
}

/* ---- the loop ---------------------------------------------------------------------------------------------------- */

static enum kvp_status work(struct worker *w)
{
    const struct message bye = {.kind = MESSAGE_BYE};
    enum kvp_status status = KVP_OK;
    bool idle = false;

    while (status == KVP_OK) {
        bool done = !demo_more_requests(w) && demo_count_jobs(w, JOB_PREFILL) + demo_count_jobs(w, JOB_DECODE) == 0;

        if (done && demo_count_jobs(w, JOB_CHECKING) == 0)
            break;
        status = serve_peer(w, done || idle ? IDLE_MS : 0);
        if (status == KVP_OK && !done)
            status = demo_serve_turn(w, &idle);
    }
    if (status != KVP_OK)
        return status;
    if (kvp_step_errors(w->step, NULL) != 0) {
        fprintf(stderr, "kvpool: demo worker %u: its kernels had to skip tokens\n", w->index);
        return KVP_EMISMATCH;
    }
    demo_send(w, &bye);
    while (status == KVP_OK && !w->peer_bye && !w->peer_gone)
        status = serve_peer(w, 1000);
    return status;
}

/* ---- start and end ----------------------------------------------------------------------------------------------- */

static enum kvp_status set_up(struct worker *w)
{
    enum kvp_status status = kvp_attach(w->client, w->board->pool, NULL, &w->pool);
    const struct kvp_pool_info *info;
    size_t layer_bytes = (size_t)2 * STEP_TOKENS * DEMO_ROW_BYTES;

    if (status != KVP_OK)
        return status;
    info = kvp_pool_info(w->pool);
    w->layer_stride = info->cuda ? layer_bytes : 0;
    for (int i = 0; i < 2 && status == KVP_OK; i++) {
        void *bytes;

        status = kvp_host_alloc(w->pool, info->cuda ? w->board->layers * layer_bytes : layer_bytes, &bytes);
        if (status == KVP_OK)
            w->sources[i].bytes = bytes;
    }
    if (status == KVP_OK)
        status = kvp_step_create(w->pool, 0, DEMO_ACTIVE_MAX, STEP_TOKENS, DEMO_ACTIVE_MAX * info->row_pages, &w->step);
    if (status == KVP_OK)
        status = demo_checker_create(w->pool, w->step, &w->checker);
    if (status == KVP_OK)
        status = kvp_timeline_id(w->pool, TIMELINE, &w->done.timeline);
    if (status == KVP_OK)
        status = kvp_timeline_value(w->pool, w->done.timeline, &w->done.value);
    w->keys = calloc(w->trace.longest / DEMO_PAGE_TOKENS + 1 + DEMO_ACTIVE_MAX * KEYS_OF_ADVANCE, sizeof(*w->keys));
    if (w->keys == NULL)
        return KVP_ENOMEM;
    w->next_key = 1;
    w->fault_due = w->board->inject_fault != 0 && w->index == 0;
    return status;
}

/* After a failure the pool stays attached, to be cleaned up by the daemon when this process ends. */
static enum kvp_status tear_down(struct worker *w, bool detach)
{
    free(w->keys);
    demo_checker_destroy(w->checker);
    kvp_step_destroy(w->step);
    for (int i = 0; i < 2 && w->pool != NULL; i++)
        if (w->sources[i].bytes != NULL)
            kvp_host_free(w->pool, w->sources[i].bytes);
    return detach ? kvp_detach(w->pool) : KVP_OK;
}

static bool parse_fd(const struct cli *cli, const char *text, int *ret_fd)
{
    uint64_t number;

    if (!cli_parse_number(cli, "an fd", text, 0, 1 << 20, &number))
        return false;
    *ret_fd = (int)number;
    return true;
}

static enum kvp_status run(struct worker *w)
{
    enum kvp_status status = set_up(w), ended;

    if (status == KVP_OK) {
        atomic_store(&w->me->ready, 1);
        while (atomic_load(&w->board->go) == 0 && !demo_stopped(w) && status == KVP_OK)
            status = serve_peer(w, IDLE_MS);
        if (status == KVP_OK)
            status = work(w);
    }
    if (status != KVP_OK)
        fprintf(stderr, "kvpool: demo worker %u: %s (%s)\n", w->index, kvp_error_text(), kvp_status_name(status));
    ended = tear_down(w, status == KVP_OK);
    if (ended != KVP_OK)
        fprintf(stderr, "kvpool: demo worker %u: detaching: %s (%s)\n", w->index, kvp_error_text(),
                kvp_status_name(ended));
    return status != KVP_OK ? status : ended;
}

int demo_worker_run(struct cli *cli)
{
    static struct worker worker;
    struct worker *w = &worker;
    enum kvp_status status;
    uint64_t index;
    int board_fd;

    if (!cli_parse_number(cli, "the worker's number", cli->arguments[0], 0, DEMO_WORKERS - 1, &index) ||
        !parse_fd(cli, cli->arguments[1], &board_fd) || !parse_fd(cli, cli->arguments[2], &w->peer))
        return 2;
    w->index = (uint32_t)index;
    w->client = cli->client;
    w->board = mmap(NULL, sizeof(*w->board), PROT_READ | PROT_WRITE, MAP_SHARED, board_fd, 0);
    close(board_fd);
    if (w->board == MAP_FAILED) {
        fprintf(stderr, "kvpool: demo worker %u: mapping the board: %s\n", w->index, strerror(errno));
        return 1;
    }
    w->me = &w->board->workers[index];
    if (cli_value(cli, CLI_TRACE) != NULL ? !demo_trace_read(cli_value(cli, CLI_TRACE), &w->trace)
                                          : !demo_trace_chat(&w->trace))
        return 1;
    status = run(w);
    demo_trace_free(&w->trace);
    close(w->peer);
    if (status == KVP_OK)
        atomic_store(&w->me->finished, 1);
    munmap(w->board, sizeof(*w->board));
    return status == KVP_OK ? 0 : 1;
}
