/**
 * Sessions by lease, and what operators ask for: statistics, the audit, quarantine.
 *
 * Statistics are one block of memory but for the descriptions of pools, which are blocks of their own.
 */
#include "internal.h"
#include "pools.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

static void take_bytes(const ProtobufCBinaryData *from, uint8_t *to, size_t room, uint32_t *ret_bytes)
{
    size_t n = from->len < room ? from->len : room;

    if (n > 0)
        memcpy(to, from->data, n);
    *ret_bytes = (uint32_t)n;
}

enum kvp_status kvp_session_info(struct kvp_client *client, struct kvp_session_info *ret_info)
{
    Kvpool__V1__KeepAliveRequest request = KVPOOL__V1__KEEP_ALIVE_REQUEST__INIT;
    const Kvpool__V1__KeepAliveReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;
    uint32_t bytes;

    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_KEEP_ALIVE, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__KeepAliveReply *)rpc.reply;
        *ret_info = (struct kvp_session_info){
            .session_id = reply->session_id, .epoch = reply->epoch, .lease_ms = reply->lease_ms};
        take_bytes(&reply->instance, ret_info->instance, sizeof(ret_info->instance), &bytes);
        take_bytes(&reply->resume_secret, ret_info->resume_secret, sizeof(ret_info->resume_secret),
                   &ret_info->resume_secret_bytes);
        snprintf(ret_info->token, sizeof(ret_info->token), "%s", client->token);
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_session_open(struct kvp_client *client, uint32_t lease_ms, const char *name,
                                 const uint8_t *resume_secret, size_t resume_secret_bytes,
                                 struct kvp_session_info *ret_info)
{
    Kvpool__V1__OpenSessionRequest request = KVPOOL__V1__OPEN_SESSION_REQUEST__INIT;
    const Kvpool__V1__OpenSessionReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;
    uint32_t bytes;

    request.lease_ms = lease_ms;
    request.name = (char *)(name != NULL ? name : "");
    request.resume_secret = (ProtobufCBinaryData){resume_secret_bytes, (uint8_t *)resume_secret};
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_OPEN_SESSION, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__OpenSessionReply *)rpc.reply;
        *ret_info = (struct kvp_session_info){
            .session_id = reply->session_id, .epoch = reply->epoch, .lease_ms = reply->lease_ms};
        take_bytes(&reply->instance, ret_info->instance, sizeof(ret_info->instance), &bytes);
        take_bytes(&reply->resume_secret, ret_info->resume_secret, sizeof(ret_info->resume_secret),
                   &ret_info->resume_secret_bytes);
        if (strlen(reply->session) >= sizeof(ret_info->token))
            status =
                kvp_fail(KVP_EPROTO, "a token of %zu bytes is longer than this library knows", strlen(reply->session));
        snprintf(ret_info->token, sizeof(ret_info->token), "%s", reply->session);
        snprintf(ret_info->version, sizeof(ret_info->version), "%s", reply->version);
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_session_close(struct kvp_client *client, const char *token)
{
    Kvpool__V1__CloseSessionRequest request = KVPOOL__V1__CLOSE_SESSION_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    if (token == NULL || token[0] == 0)
        return kvp_fail(KVP_EINVAL, "kvp_session_close wants a token; a session without one ends by kvp_disconnect");
    request.session = (char *)token;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_CLOSE_SESSION, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}

/* ---- statistics -------------------------------------------------------------------------------------------------- */

static size_t stats_bytes(const Kvpool__V1__GetStatsReply *from)
{
    size_t bytes = sizeof(struct kvp_stats) + from->n_pools * sizeof(struct kvp_pool_info *) +
                   from->n_sessions * sizeof(struct kvp_session_stats) +
                   from->n_executors * sizeof(struct kvp_executor_stats) + strlen(from->version) +
                   strlen(from->backend) + 2;

    for (size_t i = 0; i < from->n_sessions; i++)
        bytes += strlen(from->sessions[i]->name) + 1;
    for (size_t i = 0; i < from->n_executors; i++)
        bytes += strlen(from->executors[i]->device) + strlen(from->executors[i]->backend) + 2;
    return bytes;
}

static const char *put_string(char **at, const char *string)
{
    char *put = strcpy(*at, string);

    *at += strlen(put) + 1;
    return put;
}

static void fill_stats(const Kvpool__V1__GetStatsReply *from, struct kvp_stats *stats)
{
    struct kvp_session_stats *sessions = (void *)(stats->pools + from->n_pools);
    struct kvp_executor_stats *executors = (void *)(sessions + from->n_sessions);
    char *at = (char *)(executors + from->n_executors);
    uint32_t bytes;

    stats->sessions = sessions;
    stats->executors = executors;
    stats->version = put_string(&at, from->version);
    stats->backend = put_string(&at, from->backend);
    take_bytes(&from->instance, stats->instance, sizeof(stats->instance), &bytes);
    stats->epoch = from->epoch;
    stats->uptime_ms = from->uptime_ms;
    stats->calls = from->calls;
    stats->calls_failed = from->calls_failed;
    stats->adoptions = from->adoptions;
    stats->last_pause_us = from->last_pause_us;
    stats->last_pause_unix_ms = from->last_pause_unix_ms;
    stats->keeper = (enum kvp_keeper)from->keeper;
    stats->audits = from->audits;
    stats->last_audit_unix_ms = from->last_audit_unix_ms;
    stats->last_audit_violations = from->last_audit_violations;
    stats->last_audit_ms = from->last_audit_ms;
    stats->n_sessions = (uint32_t)from->n_sessions;
    stats->n_executors = (uint32_t)from->n_executors;
    for (size_t i = 0; i < from->n_sessions; i++) {
        const Kvpool__V1__SessionInfo *s = from->sessions[i];

        sessions[i] = (struct kvp_session_stats){.session_id = s->session_id,
                                                 .name = put_string(&at, s->name),
                                                 .pid = s->pid,
                                                 .uid = s->uid,
                                                 .sequences = s->sequences,
                                                 .attachments = s->attachments,
                                                 .lease_left_ms = s->lease_left_ms,
                                                 .lease = s->lease,
                                                 .ending = s->ending};
    }
    for (size_t i = 0; i < from->n_executors; i++) {
        const Kvpool__V1__ExecutorInfo *e = from->executors[i];

        executors[i] = (struct kvp_executor_stats){.device = put_string(&at, e->device),
                                                   .backend = put_string(&at, e->backend),
                                                   .pid = e->pid,
                                                   .jobs = e->jobs,
                                                   .starts = e->starts,
                                                   .jobs_done = e->jobs_done};
    }
}

enum kvp_status kvp_get_stats(struct kvp_client *client, struct kvp_stats **ret_stats)
{
    Kvpool__V1__GetStatsRequest request = KVPOOL__V1__GET_STATS_REQUEST__INIT;
    const Kvpool__V1__GetStatsReply *reply;
    struct kvp_stats *stats = NULL;
    enum kvp_status status;
    struct kvp_rpc rpc;

    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_GET_STATS, &request.base, NULL, 0, &rpc);
    if (status != KVP_OK)
        goto release;
    reply = (const Kvpool__V1__GetStatsReply *)rpc.reply;
    stats = calloc(1, stats_bytes(reply));
    if (stats == NULL) {
        status = kvp_fail(KVP_ENOMEM, "no memory for statistics");
        goto release;
    }
    stats->pools = (void *)(stats + 1);
    fill_stats(reply, stats);
    for (size_t i = 0; i < reply->n_pools && status == KVP_OK; i++) {
        status = kvp_pool_info_from(reply->pools[i], &stats->pools[i]);
        if (status == KVP_OK)
            stats->n_pools++;
    }
    if (status == KVP_OK)
        *ret_stats = stats;
    else
        kvp_stats_free(stats);

release:
    kvp_rpc_release(&rpc);
    return status;
}

void kvp_stats_free(struct kvp_stats *stats)
{
    if (stats == NULL)
        return;
    for (uint32_t i = 0; i < stats->n_pools; i++)
        kvp_pool_info_free(stats->pools[i]);
    free(stats);
}

/* ---- audit and quarantine ---------------------------------------------------------------------------------------- */

enum kvp_status kvp_audit(struct kvp_client *client, uint32_t *ret_count, char ***ret_texts, size_t *ret_n_texts)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    const Kvpool__V1__AuditReply *reply;
    enum kvp_status status;
    struct kvp_rpc rpc;

    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK) {
        reply = (const Kvpool__V1__AuditReply *)rpc.reply;
        if (reply->clean != (reply->count == 0))
            status = kvp_fail(KVP_EPROTO, "the audit's reply contradicts itself");
        else if (ret_texts != NULL)
            status = kvp_strings_from(reply->violations, reply->n_violations, ret_texts);
        if (status == KVP_OK) {
            *ret_count = reply->count;
            if (ret_n_texts != NULL)
                *ret_n_texts = reply->n_violations;
        }
    }
    kvp_rpc_release(&rpc);
    return status;
}

static size_t page_audit_bytes(const Kvpool__V1__AuditReply *from)
{
    size_t bytes = sizeof(struct kvp_page_audit) + (from->n_violations + from->n_damaged_pools) * sizeof(char *) +
                   from->n_damaged_pages * sizeof(uint32_t);

    for (size_t i = 0; i < from->n_violations; i++)
        bytes += strlen(from->violations[i]) + 1;
    for (size_t i = 0; i < from->n_damaged_pools; i++)
        bytes += strlen(from->damaged_pools[i]) + 1;
    return bytes;
}

static enum kvp_status page_audit_from(const Kvpool__V1__AuditReply *from, struct kvp_page_audit **ret_audit)
{
    struct kvp_page_audit *audit;
    uint32_t *pages;
    char *at;

    if (from->clean != (from->count == 0) || from->n_damaged_pools != from->n_damaged_pages)
        return kvp_fail(KVP_EPROTO, "the audit's reply contradicts itself");
    audit = calloc(1, page_audit_bytes(from));
    if (audit == NULL)
        return kvp_fail(KVP_ENOMEM, "no memory for an audit's findings");
    audit->texts = (const char **)(audit + 1);
    audit->damaged_pools = audit->texts + from->n_violations;
    pages = (uint32_t *)(audit->damaged_pools + from->n_damaged_pools);
    audit->damaged_pages = pages;
    at = (char *)(pages + from->n_damaged_pages);
    audit->violations = from->count;
    audit->pages_checked = from->pages_checked;
    audit->pages_without_digest = from->pages_without_digest;
    audit->pages_damaged = from->pages_damaged;
    audit->n_texts = (uint32_t)from->n_violations;
    audit->n_damaged = (uint32_t)from->n_damaged_pages;
    for (size_t i = 0; i < from->n_violations; i++)
        audit->texts[i] = put_string(&at, from->violations[i]);
    for (size_t i = 0; i < from->n_damaged_pools; i++)
        audit->damaged_pools[i] = put_string(&at, from->damaged_pools[i]);
    if (from->n_damaged_pages > 0)
        memcpy(pages, from->damaged_pages, from->n_damaged_pages * sizeof(*pages));
    *ret_audit = audit;
    return KVP_OK;
}

enum kvp_status kvp_audit_pages(struct kvp_client *client, struct kvp_page_audit **ret_audit)
{
    Kvpool__V1__AuditRequest request = KVPOOL__V1__AUDIT_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.digests = true;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_AUDIT, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK)
        status = page_audit_from((const Kvpool__V1__AuditReply *)rpc.reply, ret_audit);
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_release_quarantine(struct kvp_client *client, const char *pool, uint64_t session_id,
                                       uint64_t *ret_pages)
{
    Kvpool__V1__ReleaseQuarantineRequest request = KVPOOL__V1__RELEASE_QUARANTINE_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.pool = (char *)pool;
    request.session_id = session_id;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_RELEASE_QUARANTINE, &request.base, NULL, 0, &rpc);
    if (status == KVP_OK)
        *ret_pages = ((Kvpool__V1__ReleaseQuarantineReply *)rpc.reply)->pages;
    kvp_rpc_release(&rpc);
    return status;
}
