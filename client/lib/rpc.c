/**
 * Calls on the session socket: packed, sent, and matched with their answers by tag.
 *
 *            begin            reply with the tag
 *   (none) ────────► SENT ─────────────────────────► DONE
 *                     │ ▲
 *       end-of-file   ▼ │ connected again: the same packet, the same call id
 *                    LOST ──► failed: no daemon within reconnect_ms, or the attachment's session is gone
 *
 * Sending and numbering happen under the client's lock, so that call ids rise in the order of the socket. Receiving
 * does not: of the threads that wait, one is the reader; it takes the next message off the socket without the lock,
 * hands it to its call under the lock, and wakes the others. The socket blocks for RECEIVE_MS at most, after which
 * deadlines are looked at; a full socket blocks a sender for SEND_MS, who then reads before it tries again, since the
 * daemon does not read on while its answers are not taken.
 *
 * A failed send is not treated by itself: answers that came before the end are still read, and then the end-of-file.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WAIT_NS 250000000ull /* a waiting thread looks at its deadline this often */

struct kvp_rpc_method {
    uint16_t number;
    const char *name;
    const ProtobufCMessageDescriptor *request, *reply;
    bool changes;                 /* it carries a call id */
    enum kvp_status done_already; /* what a repeat may say when the first took effect; KVP_OK: none */
};

#define METHOD(NUMBER, name_, prefix, changes_, done_already_)                                                         \
    {                                                                                                                  \
        .number = KVPOOL__V1__METHOD__METHOD_##NUMBER, .name = name_,                                                  \
        .request = &kvpool__v1__##prefix##_request__descriptor, .reply = &kvpool__v1__##prefix##_reply__descriptor,    \
        .changes = changes_, .done_already = done_already_                                                             \
    }

static const struct kvp_rpc_method methods[] = {
    METHOD(OPEN_SESSION, "OpenSession", open_session, false, KVP_OK),
    METHOD(KEEP_ALIVE, "KeepAlive", keep_alive, false, KVP_OK),
    METHOD(CLOSE_SESSION, "CloseSession", close_session, true, KVP_ESESSION),
    METHOD(CREATE_POOL, "CreatePool", create_pool, true, KVP_OK),
    METHOD(DESCRIBE_POOL, "DescribePool", describe_pool, false, KVP_OK),
    METHOD(LIST_POOLS, "ListPools", list_pools, false, KVP_OK),
    METHOD(DELETE_POOL, "DeletePool", delete_pool, true, KVP_ENOENT),
    METHOD(ATTACH, "Attach", attach, true, KVP_OK),
    METHOD(DETACH, "Detach", detach, true, KVP_ENOENT),
    METHOD(REGISTER_BUFFER, "RegisterBuffer", register_buffer, true, KVP_OK),
    METHOD(UNREGISTER_BUFFER, "UnregisterBuffer", unregister_buffer, true, KVP_ENOENT),
    METHOD(OPEN_SEQUENCES, "OpenSequences", open_sequences, true, KVP_OK),
    METHOD(LIST_SEQUENCES, "ListSequences", list_sequences, false, KVP_OK),
    METHOD(ADVANCE, "Advance", advance, true, KVP_OK),
    METHOD(APPEND, "Append", append, true, KVP_OK),
    METHOD(FORK, "Fork", fork, true, KVP_OK),
    METHOD(TRANSFER, "Transfer", transfer, true, KVP_OK),
    METHOD(CLOSE_SEQUENCES, "CloseSequences", close_sequences, true, KVP_OK),
    METHOD(GET_SEQ_LENS, "GetSeqLens", get_seq_lens, false, KVP_OK),
    METHOD(GET_PAGE_TABLE, "GetPageTable", get_page_table, false, KVP_OK),
    METHOD(GET_BATCH_INDICES, "GetBatchIndices", get_batch_indices, false, KVP_OK),
    METHOD(GET_STATS, "GetStats", get_stats, false, KVP_OK),
    METHOD(AUDIT, "Audit", audit, false, KVP_OK),
    METHOD(RELEASE_QUARANTINE, "ReleaseQuarantine", release_quarantine, true, KVP_OK),
    METHOD(MATCH, "Match", match, false, KVP_OK),
    METHOD(PIN, "Pin", pin, true, KVP_OK),
    METHOD(EVICT, "Evict", evict, true, KVP_OK),
    METHOD(LIST_CACHE, "ListCache", list_cache, false, KVP_OK),
    METHOD(MAP_REGION, "MapRegion", map_region, true, KVP_OK),
    METHOD(UNMAP_REGION, "UnmapRegion", unmap_region, true, KVP_OK),
};

static const struct kvp_rpc_method *find_method(uint16_t number)
{
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
        if (methods[i].number == number)
            return &methods[i];
    return NULL;
}

uint64_t kvp_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* ---- the list of calls; the lock is held ------------------------------------------------------------------------- */

static void link_call(struct kvp_client *client, struct kvp_rpc *rpc)
{
    rpc->next = client->calls;
    client->calls = rpc;
}

static void unlink_call(struct kvp_client *client, struct kvp_rpc *rpc)
{
    for (struct kvp_rpc **at = &client->calls; *at != NULL; at = &(*at)->next) {
        if (*at == rpc) {
            *at = rpc->next;
            return;
        }
    }
}

/* ---- answers ----------------------------------------------------------------------------------------------------- */

static void take_error(struct kvp_rpc *rpc, const struct kvp_wire_frame *frame)
{
    ProtobufCMessage *body;
    Kvpool__V1__Error *error;

    snprintf(rpc->text, sizeof(rpc->text), "%s", kvp_status_text(rpc->status));
    if (kvp_wire_unpack(&kvpool__v1__error__descriptor, frame->bytes, frame->envelope.bytes, &rpc->budget, &body) !=
        KVP_OK)
        return;
    error = (Kvpool__V1__Error *)body;
    if (error->message[0] != 0)
        snprintf(rpc->text, sizeof(rpc->text), "%s", error->message);
    rpc->missing = error->missing;
    protobuf_c_message_free_unpacked(body, &rpc->budget.allocator);
}

/* The frame answers the call: unpack it, and take its fds over. */
static void take_answer(struct kvp_rpc *rpc, struct kvp_wire_frame *frame)
{
    rpc->state = KVP_RPC_DONE;
    rpc->status = frame->envelope.status;
    kvp_wire_budget_init(&rpc->budget, KVP_UNPACK_BYTES_MAX);
    if (rpc->status != KVP_OK) {
        take_error(rpc, frame);
        return;
    }
    rpc->status = kvp_wire_unpack(rpc->method->reply, frame->bytes, frame->envelope.bytes, &rpc->budget, &rpc->reply);
    if (rpc->status != KVP_OK) {
        snprintf(rpc->text, sizeof(rpc->text), "the reply of %s can not be read", rpc->method->name);
        return;
    }
    rpc->n_reply_fds = frame->n_fds;
    for (unsigned i = 0; i < frame->n_fds; i++) {
        rpc->reply_fds[i] = frame->fds[i];
        frame->fds[i] = -1;
    }
}

/* Whoever no longer waits gets nothing: releasing the frame closes its fds. */
static void hand_out(struct kvp_client *client, struct kvp_wire_frame *frame)
{
    for (struct kvp_rpc *rpc = client->calls; rpc != NULL; rpc = rpc->next) {
        if (rpc->tag != frame->envelope.tag || rpc->state != KVP_RPC_SENT)
            continue;
        unlink_call(client, rpc);
        take_answer(rpc, frame);
        break;
    }
    kvp_wire_release(frame);
}

static void connection_lost(struct kvp_client *client)
{
    close(client->socket);
    client->socket = -1;
    while (client->calls != NULL) {
        client->calls->state = KVP_RPC_LOST;
        client->calls = client->calls->next;
    }
}

/* One step of waiting, the lock held before and after: read a message as the reader, or wait for the one who does. */
static void pump(struct kvp_client *client)
{
    enum kvp_status status;
    int socket = client->socket;

    if (client->reading || socket < 0) {
        uint64_t until = kvp_now_ns() + WAIT_NS;
        struct timespec at = {(time_t)(until / 1000000000ull), (long)(until % 1000000000ull)};

        pthread_cond_timedwait(&client->changed, &client->lock, &at);
        return;
    }
    client->reading = true;
    pthread_mutex_unlock(&client->lock);
    status = kvp_wire_receive(socket, false, client->frame);
    pthread_mutex_lock(&client->lock);
    client->reading = false;
    if (status == KVP_OK)
        hand_out(client, client->frame);
    else if (status != KVP_EAGAIN)
        connection_lost(client);
    pthread_cond_broadcast(&client->changed);
}

/* ---- sending; the lock is held ----------------------------------------------------------------------------------- */

static enum kvp_status send_call(struct kvp_client *client, struct kvp_rpc *rpc)
{
    for (;;) {
        enum kvp_status status;

        if (client->socket < 0) {
            rpc->state = KVP_RPC_LOST;
            return KVP_OK;
        }
        status = kvp_wire_send(client->socket, &rpc->packet, rpc->fds, rpc->n_fds);
        if (status == KVP_OK || status == KVP_EDISCONNECTED) {
            rpc->state = KVP_RPC_SENT;
            link_call(client, rpc);
            return KVP_OK;
        }
        if (status != KVP_EAGAIN)
            return kvp_fail(status, "%s can not be sent: %s", rpc->method->name, kvp_status_text(status));
        if (kvp_now_ns() >= rpc->deadline_ns)
            return kvp_fail(KVP_ETIMEDOUT, "%s could not be sent within %u ms", rpc->method->name,
                            client->options.call_ms);
        pump(client);
    }
}

static enum kvp_status check_usable(const struct kvp_client *client, const struct kvp_pool *pool)
{
    if (client->fork_generation != kvp_fork_generation)
        return kvp_fail(KVP_ESESSION,
                        "the session belongs to the process that forked this one; connect again after fork()");
    return pool != NULL ? kvp_pool_usable(pool) : KVP_OK;
}

/* The connection was lost with the call on it: connect again and send it again, if it still means the same there. */
static enum kvp_status send_again(struct kvp_client *client, struct kvp_rpc *rpc)
{
    enum kvp_status status = kvp_reconnect(client);

    if (status == KVP_OK)
        status = check_usable(client, rpc->pool);
    if (status != KVP_OK)
        return status;
    rpc->repeated = true;
    return send_call(client, rpc);
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

enum kvp_status kvp_rpc_begin(struct kvp_client *client, struct kvp_pool *pool, uint16_t method,
                              ProtobufCMessage *request, const int *fds, unsigned n_fds, struct kvp_rpc *rpc)
{
    struct kvp_request *head = (struct kvp_request *)request;
    enum kvp_status status = check_usable(client, pool);

    *rpc = (struct kvp_rpc){
        .pool = pool, .fds = fds, .n_fds = n_fds, .packet = {.memfd = -1}, .method = find_method(method)};
    if (status != KVP_OK)
        return status;
    if (rpc->method == NULL || rpc->method->request != request->descriptor)
        return kvp_fail(KVP_EINTERNAL, "method %u is not sent with a %s", method, request->descriptor->name);
    pthread_mutex_lock(&client->lock);
    rpc->deadline_ns = kvp_now_ns() + (uint64_t)client->options.call_ms * 1000000ull;
    if (client->socket < 0)
        status = kvp_reconnect(client);
    if (status == KVP_OK)
        status = check_usable(client, pool);
    if (status != KVP_OK)
        goto unlock;
    rpc->tag = client->next_tag++;
    if (head->session == NULL || head->session[0] == 0)
        head->session = client->token;
    head->call_id = rpc->method->changes ? client->next_call_id++ : 0;
    status = kvp_wire_pack(method, 0, KVP_OK, rpc->tag, request, &rpc->packet);
    if (status == KVP_ELIMIT)
        kvp_fail(status, "%s of %zu bytes does not fit a message, of %d at most", rpc->method->name,
                 protobuf_c_message_get_packed_size(request), KVP_MESSAGE_BYTES_MAX);
    else if (status != KVP_OK)
        kvp_fail(status, "no memory for %s", rpc->method->name);
    if (status != KVP_OK)
        goto unlock;
    status = send_call(client, rpc);
    if (status != KVP_OK)
        kvp_wire_packet_free(&rpc->packet);

unlock:
    pthread_mutex_unlock(&client->lock);
    return status;
}

enum kvp_status kvp_rpc_wait(struct kvp_client *client, struct kvp_rpc *rpc)
{
    enum kvp_status status = check_usable(client, NULL);

    if (status != KVP_OK)
        return status;
    pthread_mutex_lock(&client->lock);
    while (status == KVP_OK && rpc->state != KVP_RPC_DONE) {
        if (kvp_now_ns() >= rpc->deadline_ns) {
            unlink_call(client, rpc);
            status =
                kvp_fail(KVP_ETIMEDOUT, "%s was not answered within %u ms", rpc->method->name, client->options.call_ms);
        } else if (rpc->state == KVP_RPC_LOST) {
            status = send_again(client, rpc);
        } else {
            pump(client);
        }
    }
    pthread_mutex_unlock(&client->lock);
    if (status != KVP_OK)
        return status;
    if (rpc->status != KVP_OK && rpc->repeated && rpc->status == rpc->method->done_already)
        rpc->status = KVP_OK;
    return rpc->status == KVP_OK ? KVP_OK : kvp_fail(rpc->status, "%s", rpc->text);
}

enum kvp_status kvp_rpc_call(struct kvp_client *client, struct kvp_pool *pool, uint16_t method,
                             ProtobufCMessage *request, const int *fds, unsigned n_fds, struct kvp_rpc *rpc)
{
    enum kvp_status status = kvp_rpc_begin(client, pool, method, request, fds, n_fds, rpc);

    return status == KVP_OK ? kvp_rpc_wait(client, rpc) : status;
}

void kvp_rpc_release(struct kvp_rpc *rpc)
{
    kvp_wire_packet_free(&rpc->packet);
    if (rpc->reply != NULL)
        protobuf_c_message_free_unpacked(rpc->reply, &rpc->budget.allocator);
    rpc->reply = NULL;
    for (unsigned i = 0; i < rpc->n_reply_fds; i++)
        if (rpc->reply_fds[i] >= 0)
            close(rpc->reply_fds[i]);
    rpc->n_reply_fds = 0;
}

int kvp_rpc_take_fd(struct kvp_rpc *rpc, int index)
{
    int fd;

    if (index < 0 || (unsigned)index >= rpc->n_reply_fds)
        return -1;
    fd = rpc->reply_fds[index];
    rpc->reply_fds[index] = -1;
    return fd;
}

enum kvp_status kvp_rpc_check_count(const char *what, size_t got, size_t expected)
{
    return got == expected ? KVP_OK : kvp_fail(KVP_EPROTO, "the reply lists %zu %s, not %zu", got, what, expected);
}
