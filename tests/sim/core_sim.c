/**
 * The core under simulated sessions of two tenants: random calls, wrong ones included, writers in place and on request,
 * prompts that the cache knows, deaths of sessions, executors and the daemon itself, completions that come late; against
 * a model that keeps the bytes of every token.
 *
 *   core_sim [SEED [STEPS]]
 *
 * After each step the ledger is audited, and what the core says of a sequence is what the model knows, and so is what the
 * prefix cache has; at every hundredth each written token of every sequence is looked up in the slab: a token that counts
 * and is not there ends the run. At the end all sessions end, and every page must be back. The same seed does the same.
 */
#include "sim.h"

struct client clients[SESSIONS];
unsigned long counts[DONE_KINDS], step_number;
uint64_t rng;
static struct kvp_session_id dead[4096]; /* whose process has ended: an adopting shell finds that out again */
static unsigned n_dead;
static uint32_t next_pid = 100;

uint32_t below(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 32) % n;
}

struct kvp_pool_id pool_id(void)
{
    struct kvp_pool_id id;
    ck_assert_int_eq(kvp_pool_by_name(&shell->ledger, POOL, &id), KVP_OK);
    return id;
}

struct client *any_client(void)
{
    struct client *c = &clients[below(SESSIONS)];
    return c->open ? c : NULL;
}

/* ---- steps: sessions --------------------------------------------------------------------------------------------- */

static void open_client(unsigned n)
{
    struct client *c = &clients[n];
    drop_sequences(n);
    *c = (struct client){.open = true, .lease = below(3) == 0, .pid = next_pid++, .tenant = below(TENANTS)};
    uint32_t uid = TENANT + c->tenant * TENANT;
    if (c->lease) {
        Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
        c->caller = shell_grpc(uid, c->pid);
        request.lease_ms = 3600000;
        struct shell_call *call = CLIENT_CALL(c, OPEN_SESSION, request);
        ck_assert_int_eq(call->status, KVP_OK);
        const Kvpool__V1__OpenSessionReply *reply = (const Kvpool__V1__OpenSessionReply *)call->reply;
        snprintf(c->token, sizeof(c->token), "%s", reply->session);
        c->id = reply->session_id;
        shell_call_free(shell, call);
        return;
    }
    c->caller = shell_connect(shell, uid, c->pid);
    c->id = (uint64_t)c->caller.session.generation << 32 | c->caller.session.slot;
    if (below(4) != 0) {
        c->attachment = shell_attach(shell, c->caller, POOL);
        c->attached = true;
    }
}

static void end_client(unsigned n)
{
    struct client *c = &clients[n];
    counts[DONE_DEATH]++;
    if (c->lease) {
        Kvpool__V1__CloseSessionRequest request = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
        request.session = c->token;
        ck_assert_int_eq(finish(CLIENT_CALL(c, CLOSE_SESSION, request)), KVP_OK);
        c->open = false;
    } else if (!c->eof && below(2) == 0) {
        kvp_core_disconnected(shell->core, c->caller.session);
        c->open = false;
        c->eof = true;
    } else {
        kvp_core_process_ended(shell->core, c->caller.session);
        dead[n_dead++ % 4096] = c->caller.session;
        c->open = c->eof = false;
    }
}

static void step_session(void)
{
    unsigned n = below(SESSIONS);
    if (!clients[n].open && !clients[n].eof)
        open_client(n);
    else if (clients[n].eof || below(6) == 0)
        end_client(n);
}

/* ---- steps: time, executors, the daemon -------------------------------------------------------------------------- */

static void collect_waiting(void)
{
    for (unsigned i = 0; i < WAITING_MAX; i++) {
        if (waiting[i] == NULL)
            continue;
        if (waiting[i]->answered)
            shell_call_free(shell, waiting[i]);
        else if (below(20) == 0)
            shell_call_gone(shell, waiting[i]);
        else
            continue;
        waiting[i] = NULL;
    }
}

static void step_executor(void)
{
    switch (below(8)) {
    case 0:
        shell_executor_kill(shell, 0);
        counts[DONE_EXECUTOR]++;
        break;
    case 1:
        shell->fail_job = KVP_EDEVICE;
        break;
    default:
        shell_jobs_run(shell, 1 + below(4));
        break;
    }
    for (unsigned i = below(6); i > 0; i--)
        shell_step(shell);
}

static void step_restart(void)
{
    struct kvp_session_id sessions[SESSIONS];
    unsigned n = 0;
    for (unsigned i = 0; i < SESSIONS; i++) {
        if (clients[i].open && !clients[i].lease)
            sessions[n++] = clients[i].caller.session;
    }
    memset(waiting, 0, sizeof(waiting));
    renew_pins(shell->now_ms);
    shell_restart(shell, sessions, n);
    for (unsigned i = 0; i < n_dead && i < 4096; i++)
        kvp_core_process_ended(shell->core, dead[i]);
    counts[DONE_RESTART]++;
}

static void step_time(void)
{
    shell_run_ms(shell, below(20));
    check_pins_ended();
}

/* What is done, and of a thousand steps in how many. */
static const struct {
    void (*step)(void);
    uint32_t share;
} kinds[] = {{step_session, 50},  {step_open, 130}, {step_advance, 230}, {step_append, 120}, {step_fork, 70},
             {step_transfer, 40}, {step_close, 90}, {step_wrong, 40},    {step_match, 40},   {step_pin, 40},
             {step_evict, 15},    {step_list, 10},  {step_executor, 75}, {step_time, 45},    {step_restart, 5}};

static void step(void)
{
    uint32_t what = below(1000);
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        if (what < kinds[i].share) {
            kinds[i].step();
            break;
        }
        what -= kinds[i].share;
    }
    collect_waiting();
    check_lengths();
    check_cache();
    shell_audit(shell);
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

static void make_pool(void)
{
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    Kvpool__V1__Plane plane = KVPOOL__V1__PLANE__INIT, *planes[1] = {&plane};
    Kvpool__V1__TenantShare share[TENANTS], *shares[TENANTS];
    for (unsigned i = 0; i < TENANTS; i++) {
        shares[i] = &share[i];
        kvpool__v1__tenant_share__init(shares[i]);
        share[i].tenant = TENANT + i * TENANT;
    }
    share[0].quota_pages = QUOTA;
    share[1].guaranteed_pages = GUARANTEED;
    plane.component = KVPOOL__V1__COMPONENT__COMPONENT_CKV;
    plane.heads = 1;
    plane.dim = 8;
    plane.dtype = KVPOOL__V1__DTYPE__DTYPE_U8;
    spec.name = (char *)POOL;
    spec.pages = PAGES;
    spec.page_tokens = PAGE;
    spec.n_planes = 1;
    spec.planes = planes;
    spec.max_sequences = ROWS;
    spec.max_sequence_tokens = SEQ_TOKENS;
    spec.n_tenants = TENANTS;
    spec.tenants = shares;
    spec.page_digests = true;
    request.spec = &spec;
    ck_assert_int_eq(
        finish(shell_call(shell, shell_grpc(1000, 1), KVPOOL__V1__METHOD__METHOD_CREATE_POOL, &request.base)), KVP_OK);
}

/* No page's bytes are others than those that were sealed. @return pages that were looked at */
static uint64_t check_digests(void)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    request.digests = true;
    shell->fail_job = KVP_OK;
    struct shell_call *call = shell_call(shell, shell_grpc(1000, 1), KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base);
    const Kvpool__V1__AuditReply *reply = (const Kvpool__V1__AuditReply *)call->reply;
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    ck_assert_msg(reply->clean, "%s", reply->n_violations != 0 ? reply->violations[0] : "?");
    uint64_t checked = reply->pages_checked;
    shell_call_free(shell, call);
    return checked;
}

static void end_all(void)
{
    shell->hold_jobs = false;
    shell_jobs_run(shell, SHELL_JOBS_MAX);
    shell_run_ms(shell, 100);
    for (unsigned i = 0; i < SESSIONS; i++) {
        for (int k = 0; k < 3 && (clients[i].open || clients[i].eof); k++)
            end_client(i);
    }
    shell_run_ms(shell, 3700000);
    Kvpool__V1__EvictRequest request = KVPOOL__V1__EVICT_REQUEST__INIT;
    request.pool = (char *)POOL;
    request.all = true;
    ck_assert_int_eq(finish(CALL(shell_grpc(0, 1), EVICT, request)), KVP_OK);
    ck_assert_uint_eq(shell_free_pages(shell, POOL), PAGES);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_PROGRESS), 0);
    ck_assert_int_eq(shell_delete_pool(shell, shell_grpc(1000, 1), POOL), KVP_OK);
    ck_assert_uint_eq(shell_thing_count(shell, KVP_THING_SLAB), 0);
}

static uint64_t seed = 1;
static unsigned long steps = 4000;

START_TEST(the_core_and_a_naive_model_agree)
{
    rng = seed * 0x9e3779b97f4a7c15ull | 1;
    shell = shell_begin_sliced("host", SLICE);
    shell->hold_jobs = true;
    shell->config.audit_ms = 30; /* from the first restart on, again and again, of whatever is there */
    uint64_t digests = 0;
    make_pool();
    for (unsigned long i = 1; i <= steps; i++) {
        step_number = i;
        step();
        if (i % 100 == 0)
            check_tokens();
        if (i % 500 == 0) {
            digests += check_digests();
            check_lengths();
            check_cache();
        }
    }
    end_all();
    unsigned audits = shell->audits;
    ck_assert_uint_gt(audits, 0);
    ck_assert_uint_gt(digests, 0);
    shell_end(shell);
    for (unsigned i = 0; i < DONE_KINDS && steps >= 1000; i++)
        ck_assert_msg(counts[i] != 0, "nothing of kind %u was done", i);
    printf(
        "%lu steps: %lu in place, %lu appends, %lu forks, %lu transfers, %lu closes, %lu wrong calls, "
        "%lu deaths, %lu executors killed, %lu restarts, %u audits, %llu pages compared\n"
        "%lu blocks hit, %lu matches, %lu pins, %lu unpinned, %lu pages evicted on request, %lu in all, %lu listings, "
        "%lu tokens zeroed\n",
        steps, counts[DONE_ADVANCE], counts[DONE_APPEND], counts[DONE_FORK], counts[DONE_TRANSFER], counts[DONE_CLOSE],
        counts[DONE_WRONG], counts[DONE_DEATH], counts[DONE_EXECUTOR], counts[DONE_RESTART], audits,
        (unsigned long long)digests, counts[DONE_HIT], counts[DONE_MATCH], counts[DONE_PIN], counts[DONE_UNPIN],
        counts[DONE_EVICT], counts[DONE_MADE_ROOM], counts[DONE_LIST], counts[DONE_ZEROED]);
}
END_TEST

int main(int argc, char **argv)
{
    if (argc > 1)
        seed = strtoull(argv[1], NULL, 10);
    if (argc > 2)
        steps = strtoul(argv[2], NULL, 10);
    printf("seed %llu, steps %lu\n", (unsigned long long)seed, steps);
    fflush(stdout);
    Suite *suite = suite_create("core_sim");
    TCase *t = tcase_create("sim");
    tcase_set_timeout(t, 0);
    tcase_add_test(t, the_core_and_a_naive_model_agree);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
