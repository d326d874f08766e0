/**
 * kvpool status, audit, quarantine release: what an operator asks first, and what only an operator can say.
 */
#include "cli.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- status ------------------------------------------------------------------------------------------------------ */

static json_t *pool_json(const struct kvp_pool_info *pool)
{
    return json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "name", pool->spec.name, "backend",
                     pool->cuda ? "cuda" : "host", "state",
                     pool->lost       ? "lost"
                     : pool->deleting ? "deleting"
                                      : "live",
                     "pages", (json_int_t)pool->spec.layout.pages, "free_pages", (json_int_t)pool->free_pages,
                     "page_bytes", (json_int_t)pool->page_bytes, "sequences", (json_int_t)pool->sequences,
                     "retiring_sequences", (json_int_t)pool->retiring_sequences, "quarantined_pages",
                     (json_int_t)pool->quarantined_pages, "attachments", (json_int_t)pool->attachments);
}

static json_t *session_json(const struct kvp_session_stats *session)
{
    char id[24];

    snprintf(id, sizeof(id), "%" PRIx64, session->session_id);
    return json_pack("{s:s, s:s, s:I, s:I, s:b, s:I, s:b, s:I, s:I}", "session_id", id, "name", session->name, "pid",
                     (json_int_t)session->pid, "uid", (json_int_t)session->uid, "lease", session->lease,
                     "lease_left_ms", (json_int_t)session->lease_left_ms, "ending", session->ending, "sequences",
                     (json_int_t)session->sequences, "attachments", (json_int_t)session->attachments);
}

static json_t *executor_json(const struct kvp_executor_stats *executor)
{
    return json_pack("{s:s, s:s, s:I, s:I, s:I, s:I}", "device", executor->device, "backend", executor->backend, "pid",
                     (json_int_t)executor->pid, "jobs", (json_int_t)executor->jobs, "jobs_done",
                     (json_int_t)executor->jobs_done, "starts", (json_int_t)executor->starts);
}

static const char *keeper_name(enum kvp_keeper keeper)
{
    return keeper == KVP_KEEPER_THERE ? "there" : keeper == KVP_KEEPER_GONE ? "gone" : "none";
}

static json_t *status_json(const struct kvp_stats *stats)
{
    json_t *pools = json_array(), *sessions = json_array(), *executors = json_array();
    char instance[33];

    for (uint32_t i = 0; i < stats->n_pools; i++)
        json_array_append_new(pools, pool_json(stats->pools[i]));
    for (uint32_t i = 0; i < stats->n_sessions; i++)
        json_array_append_new(sessions, session_json(&stats->sessions[i]));
    for (uint32_t i = 0; i < stats->n_executors; i++)
        json_array_append_new(executors, executor_json(&stats->executors[i]));
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o}", "version",
        stats->version, "keeper", keeper_name(stats->keeper), "backend", stats->backend, "instance",
        cli_hex(stats->instance, sizeof(stats->instance), instance), "epoch", (json_int_t)stats->epoch, "uptime_ms",
        (json_int_t)stats->uptime_ms, "calls", (json_int_t)stats->calls, "calls_failed",
        (json_int_t)stats->calls_failed, "adoptions", (json_int_t)stats->adoptions, "last_pause_us",
        (json_int_t)stats->last_pause_us, "last_pause_unix_ms", (json_int_t)stats->last_pause_unix_ms, "audits",
        (json_int_t)stats->audits, "last_audit_unix_ms", (json_int_t)stats->last_audit_unix_ms, "last_audit_ms",
        (json_int_t)stats->last_audit_ms, "last_audit_violations", (json_int_t)stats->last_audit_violations, "pools",
        pools, "sessions", sessions, "executors", executors);
}

static const char *time_text(uint64_t unix_ms, char text[32])
{
    time_t at = (time_t)(unix_ms / 1000);
    struct tm tm;

    if (gmtime_r(&at, &tm) == NULL || strftime(text, 32, "%Y-%m-%dT%H:%M:%SZ", &tm) == 0)
        return "?";
    return text;
}

static void print_pause(const struct kvp_stats *stats)
{
    char text[32];

    printf("adoptions: %u; the last pause was %" PRIu64 ".%" PRIu64 " ms, over at %s\n", stats->adoptions,
           stats->last_pause_us / 1000, stats->last_pause_us / 100 % 10, time_text(stats->last_pause_unix_ms, text));
}

static void print_audit(const struct kvp_stats *stats)
{
    char text[32];

    printf("audits: %" PRIu64 "; the last one, over at %s, took %u ms and found ", stats->audits,
           time_text(stats->last_audit_unix_ms, text), stats->last_audit_ms);
    if (stats->last_audit_violations == 0)
        printf("nothing wrong\n");
    else
        printf("%" PRIu64 " VIOLATIONS: see `kvpool audit'\n", stats->last_audit_violations);
}

static void print_status(const struct kvp_stats *stats)
{
    printf("kvpoold %s, %s backend, up %" PRIu64 ".%03u s, epoch %" PRIu64 ", %" PRIu64 " calls answered, %" PRIu64
           " of them with a failure\n",
           stats->version, stats->backend, stats->uptime_ms / 1000, (unsigned)(stats->uptime_ms % 1000), stats->epoch,
           stats->calls, stats->calls_failed);
    if (stats->keeper != KVP_KEEPER_THERE)
        printf("nobody keeps the memory: a restart would lose it%s\n",
               stats->keeper == KVP_KEEPER_GONE ? "; its keeper has DIED"
                                                : " (kvpool-keeper or systemd would keep it)");
    if (stats->adoptions > 0)
        print_pause(stats);
    if (stats->last_audit_unix_ms != 0)
        print_audit(stats);
    printf("pools: %u\n", stats->n_pools);
    for (uint32_t i = 0; i < stats->n_pools; i++) {
        const struct kvp_pool_info *pool = stats->pools[i];

        printf("  %-24s %s, %u of %u pages free, %u sequences, %u sessions attached%s\n", pool->spec.name,
               pool->cuda ? "cuda" : "host", pool->free_pages, pool->spec.layout.pages, pool->sequences,
               pool->attachments, pool->lost ? ", its memory is LOST" : "");
        if (pool->quarantined_pages > 0)
            printf("  %-24s %" PRIu64 " pages in quarantine\n", "", pool->quarantined_pages);
    }
    printf("sessions: %u\n", stats->n_sessions);
    for (uint32_t i = 0; i < stats->n_sessions; i++) {
        const struct kvp_session_stats *session = &stats->sessions[i];
        char name[CLI_TEXT_BYTES];

        printf("  %-16" PRIx64 " pid %u, uid %u, %u sequences%s%s%s%s\n", session->session_id, session->pid,
               session->uid, session->sequences, session->lease ? ", by lease" : "", session->ending ? ", ending" : "",
               session->name[0] != 0 ? ", name " : "", cli_text(session->name, name));
    }
    printf("executors: %u\n", stats->n_executors);
    for (uint32_t i = 0; i < stats->n_executors; i++)
        printf("  %-24s pid %u, %u jobs open, %" PRIu64 " done, started %u times\n", stats->executors[i].device,
               stats->executors[i].pid, stats->executors[i].jobs, stats->executors[i].jobs_done,
               stats->executors[i].starts);
}

static int run_status(struct cli *cli)
{
    struct kvp_stats *stats;
    enum kvp_status status = kvp_get_stats(cli->client, &stats);
    int result = 0;

    if (status != KVP_OK)
        return cli_failed("status", status);
    if (cli_json(cli))
        result = cli_print_json(status_json(stats));
    else
        print_status(stats);
    kvp_stats_free(stats);
    return result;
}

/* ---- audit ------------------------------------------------------------------------------------------------------- */

static void print_texts(const char *const *texts, size_t n)
{
    for (size_t i = 0; i < n; i++)
        printf("%s\n", texts[i]);
}

static json_t *texts_json(const char *const *texts, size_t n)
{
    json_t *list = json_array();

    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, json_string(texts[i]));
    return list;
}

static int run_ledger_audit(struct cli *cli)
{
    uint32_t count;
    size_t n_texts;
    char **texts;
    enum kvp_status status = kvp_audit(cli->client, &count, &texts, &n_texts);
    int result = 0;

    if (status != KVP_OK)
        return cli_failed("audit", status);
    if (cli_json(cli)) {
        result = cli_print_json(json_pack("{s:b, s:I, s:o}", "clean", count == 0, "count", (json_int_t)count,
                                          "violations", texts_json((const char *const *)texts, n_texts)));
    } else {
        print_texts((const char *const *)texts, n_texts);
        if (count == 0)
            printf("the ledger is clean\n");
        else
            printf("%u violations\n", count);
    }
    free(texts);
    return count != 0 ? 1 : result;
}

static json_t *page_audit_json(const struct kvp_page_audit *audit)
{
    json_t *damaged = json_array();

    for (uint32_t i = 0; i < audit->n_damaged; i++)
        json_array_append_new(damaged, json_pack("{s:s, s:I}", "pool", audit->damaged_pools[i], "page",
                                                 (json_int_t)audit->damaged_pages[i]));
    return json_pack("{s:b, s:I, s:o, s:I, s:I, s:I, s:o}", "clean", audit->violations == 0, "count",
                     (json_int_t)audit->violations, "violations", texts_json(audit->texts, audit->n_texts),
                     "pages_checked", (json_int_t)audit->pages_checked, "pages_without_digest",
                     (json_int_t)audit->pages_without_digest, "pages_damaged", (json_int_t)audit->pages_damaged,
                     "damaged", damaged);
}

static int run_page_audit(struct cli *cli)
{
    struct kvp_page_audit *audit;
    enum kvp_status status = kvp_audit_pages(cli->client, &audit);
    int result = 0;

    if (status != KVP_OK)
        return cli_failed("audit", status);
    if (cli_json(cli)) {
        result = cli_print_json(page_audit_json(audit));
    } else {
        print_texts(audit->texts, audit->n_texts);
        if (audit->violations == 0)
            printf("the ledger is clean\n");
        else
            printf("%u violations\n", audit->violations);
        printf("%" PRIu64 " sealed pages compared, %" PRIu64 " damaged, %" PRIu64 " without a digest yet\n",
               audit->pages_checked, audit->pages_damaged, audit->pages_without_digest);
    }
    if (audit->violations != 0)
        result = 1;
    free(audit);
    return result;
}

static int run_audit(struct cli *cli)
{
    return cli_value(cli, CLI_DIGESTS) != NULL ? run_page_audit(cli) : run_ledger_audit(cli);
}

/* ---- quarantine release ------------------------------------------------------------------------------------------ */

/* As status prints it. */
static bool parse_session_id(const struct cli *cli, const char *text, uint64_t *ret_session_id)
{
    int used = -1;

    if (strspn(text, "0123456789abcdefABCDEF") == strlen(text) && strlen(text) <= 16 &&
        sscanf(text, "%16" SCNx64 "%n", ret_session_id, &used) == 1 && text[used] == 0 && *ret_session_id != 0)
        return true;
    cli_usage(cli, "`%s' is no session: its id in hexadecimal is wanted, as `kvpool status' prints it", text);
    return false;
}

static uint64_t quarantined_pages(const struct cli *cli)
{
    struct kvp_pool_info *info;
    uint64_t pages;

    if (kvp_pool_describe(cli->client, cli->arguments[0], &info) != KVP_OK)
        return 0;
    pages = info->quarantined_pages;
    kvp_pool_info_free(info);
    return pages;
}

static int run_release(struct cli *cli)
{
    uint64_t session_id = 0, pages, before;
    enum kvp_status status;

    if (cli->n_arguments > 1 && !parse_session_id(cli, cli->arguments[1], &session_id))
        return 2;
    before = quarantined_pages(cli);
    status = kvp_release_quarantine(cli->client, cli->arguments[0], session_id, &pages);
    if (status != KVP_OK)
        return cli_failed("releasing from quarantine", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s, s:I}", "pool", cli->arguments[0], "released_pages", (json_int_t)pages));
    printf("%" PRIu64 " pages released", pages);
    if (session_id == 0 && before > pages) /* without a session, those whose process's end is not known */
        printf("; %" PRIu64 " stay in quarantine, of sessions that are to be named: see `kvpool status'",
               before - pages);
    putchar('\n');
    return 0;
}

static const struct argp_option audit_options[] = {
    {"digests", CLI_DIGESTS, NULL, 0,
     "Compare the bytes of all sealed pages, of pools made with --page-digests, with what they were", 0},
    {0}};

const struct cli_command cli_status_commands[] = {
    {.words = "status",
     .arguments = "",
     .help = "Show the daemon, its pools, sessions and executors.",
     .json = "version, keeper, backend, instance, epoch, uptime_ms, calls, calls_failed, adoptions, last_pause_us, "
             "last_pause_unix_ms, audits, last_audit_unix_ms, last_audit_ms, last_audit_violations, pools[name, "
             "backend, state, pages, free_pages, page_bytes, sequences, "
             "retiring_sequences, quarantined_pages, attachments], sessions[session_id, name, pid, uid, lease, "
             "lease_left_ms, ending, sequences, attachments], "
             "executors[device, backend, pid, jobs, jobs_done, starts].",
     .run = run_status},
    {.words = "audit",
     .arguments = "",
     .help = "Walk the whole ledger and name each violation; exits 0 when it is clean, else 1.",
     .json = "clean, count, violations[]; with --digests: pages_checked, pages_without_digest, pages_damaged, "
             "damaged[pool, page].",
     .options = audit_options,
     .call_ms = 3600 * 1000,
     .run = run_audit},
    {.words = "quarantine release",
     .arguments = "POOL [SESSION_ID]",
     .help = "Give back the pages of dead sessions (or of one): your word that their GPU work is over.",
     .json = "pool, released_pages.",
     .min_arguments = 1,
     .max_arguments = 2,
     .run = run_release},
    {0}};
