/**
 * One call at the gRPC door, from gRPC's event to its last.
 *
 *      REQUESTED ──arrived──► RECEIVING ──received──► SERVED ──kvp_rpc_reply──► ANSWERED ──► released
 *          │                      │  refused, malformed   │ cancelled, timed out      ▲
 *          └ the door stops:      └───────────────────────┼──────────────────────────►┘ (timed out: answered)
 *            released                                     └──► GONE ──► released
 *
 * While the call is SERVED the core has it; it leaves that state by an answer or by kvp_core_call_gone, and by nothing
 * else. It is released when no event of it is under way any more, which is never before its `closed` event: so never
 * inside kvp_core_call, nor inside kvp_rpc_reply.
 *
 * All methods come through grpc_server_request_call: with methods registered, a call of another one would hang.
 */
#include "door.h"

#include <grpc/byte_buffer_reader.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

#define SERVICE_PATH "/kvpool.v1.KvPool/"

/* ---- its end ----------------------------------------------------------------------------------------------------- */

static void unlink_call(struct kvp_rpc_call *call)
{
    struct kvp_rpc *rpc = call->rpc;

    if (call->previous != NULL)
        call->previous->next = call->next;
    else
        rpc->calls = call->next;
    if (call->next != NULL)
        call->next->previous = call->previous;
    rpc->stats.calls--;
    rpc->stats.held_bytes -= call->held_bytes;
    if (call->peer != NULL)
        call->peer->calls--;
}

static void release(struct kvp_rpc_call *call)
{
    struct kvp_rpc *rpc = call->rpc;

    if (call->state != KVP_CALL_REQUESTED)
        unlink_call(call);
    if (call->call.message.body != NULL)
        protobuf_c_message_free_unpacked(call->call.message.body, &call->budget.allocator);
    grpc_byte_buffer_destroy(call->request);
    grpc_byte_buffer_destroy(call->reply);
    grpc_slice_unref(call->text);
    grpc_slice_unref(call->trailing.value);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    if (call->grpc != NULL)
        grpc_call_unref(call->grpc);
    free(call);
    kvp_rpc_quiet(rpc);
}

static void tag_home(struct kvp_rpc_call *call)
{
    if (--call->tags == 0 && (call->state == KVP_CALL_ANSWERED || call->state == KVP_CALL_GONE))
        release(call);
}

void kvp_rpc_call_withdraw(struct kvp_rpc_call *call)
{
    enum kvp_rpc_call_state before = call->state;

    if (before == KVP_CALL_ANSWERED)
        return;
    call->state = KVP_CALL_GONE;
    if (before == KVP_CALL_SERVED)
        kvp_core_call_gone(call->rpc->core, &call->call);
}

static void closed(struct kvp_rpc_tag *tag, bool ok)
{
    struct kvp_rpc_call *call = tag->owner;

    (void)ok;
    if (call->cancelled)
        kvp_rpc_call_withdraw(call);
    tag_home(call);
}

static void sent(struct kvp_rpc_tag *tag, bool ok)
{
    (void)ok; /* a client that did not wait for its answer: `closed` says so */
    tag_home(tag->owner);
}

void kvp_rpc_calls_sweep(struct kvp_rpc *rpc, uint64_t now_ms)
{
    struct kvp_rpc_call *next;

    for (struct kvp_rpc_call *call = rpc->calls; call != NULL; call = next) {
        next = call->next;
        if (now_ms < call->call.deadline_ms)
            continue;
        if (call->state == KVP_CALL_RECEIVING || call->state == KVP_CALL_SERVED) {
            kvp_rpc_call_withdraw(call);
            kvp_rpc_refuse(call, KVP_ETIMEDOUT, "the call was not done within its deadline");
        } else {
            grpc_call_cancel(call->grpc, NULL); /* it does not take its answer */
        }
    }
}

/* ---- the message ------------------------------------------------------------------------------------------------- */

/* @return false: the door holds too much already */
static bool hold(struct kvp_rpc_call *call, uint64_t bytes)
{
    struct kvp_rpc *rpc = call->rpc;

    if (bytes > rpc->config.max_held_bytes || rpc->stats.held_bytes > rpc->config.max_held_bytes - bytes)
        return false;
    rpc->stats.held_bytes += bytes;
    call->held_bytes += bytes;
    return true;
}

static enum kvp_status unpack(struct kvp_rpc_call *call, const ProtobufCMessageDescriptor *type)
{
    struct kvp_rpc *rpc = call->rpc;
    uint64_t left = rpc->config.max_held_bytes - rpc->stats.held_bytes;
    size_t budget = left > KVP_UNPACK_BYTES_MAX ? KVP_UNPACK_BYTES_MAX : (size_t)left;
    grpc_byte_buffer_reader reader;
    enum kvp_status status;
    grpc_slice bytes;

    if (!grpc_byte_buffer_reader_init(&reader, call->request))
        return KVP_EPROTO;
    bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    kvp_wire_budget_init(&call->budget, budget);
    status = kvp_wire_unpack(type, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes), &call->budget,
                             &call->call.message.body);
    grpc_slice_unref(bytes);
    if (status == KVP_OK)
        (void)hold(call, budget - call->budget.left);
    return status;
}

/* @return whether the message is there, unpacked; else the call is refused */
static bool read_request(struct kvp_rpc_call *call)
{
    struct kvp_rpc *rpc = call->rpc;
    const ProtobufCMessageDescriptor *type = call->health ? kvp_rpc_health_request() : call->method->request;
    enum kvp_status status = KVP_EPROTO;
    size_t n;

    if (call->request == NULL) {
        kvp_rpc_refuse(call, KVP_EPROTO, "the call carries no message, or one over %u bytes",
                       rpc->config.max_message_bytes);
        return false;
    }
    if (call->request->type == GRPC_BB_RAW && call->request->data.raw.compression != GRPC_COMPRESS_NONE) {
        kvp_rpc_refuse(call, KVP_ENOSYS, "compressed messages are not served");
        return false;
    }
    n = grpc_byte_buffer_length(call->request);
    if (!hold(call, n)) {
        kvp_rpc_refuse(call, KVP_EAGAIN, "requests of %llu bytes are in hand, at most %llu are taken at once",
                       (unsigned long long)rpc->stats.held_bytes, (unsigned long long)rpc->config.max_held_bytes);
        return false;
    }
    status = unpack(call, type);
    grpc_byte_buffer_destroy(call->request); /* what was unpacked holds copies */
    call->request = NULL;
    rpc->stats.held_bytes -= n;
    call->held_bytes -= n;
    if (status == KVP_OK)
        return true;
    rpc->stats.malformed++;
    if (status == KVP_ENOMEM)
        kvp_rpc_refuse(call, status, "a message of %zu bytes takes too much memory to unpack", n);
    else
        kvp_rpc_refuse(call, status, "the %zu bytes are no %s, or a string in them is not UTF-8 or has a NUL in it", n,
                       type->name);
    return false;
}

static void received(struct kvp_rpc_tag *tag, bool ok)
{
    struct kvp_rpc_call *call = tag->owner;

    (void)ok; /* the message is there or it is not */
    if (call->state == KVP_CALL_RECEIVING && read_request(call)) {
        call->state = KVP_CALL_SERVED;
        if (call->rpc->config.tell_time != NULL)
            call->rpc->config.tell_time(call->rpc->config.ctx);
        if (call->health)
            kvp_rpc_health_serve(call);
        else
            kvp_core_call(call->rpc->core, &call->call);
    }
    tag_home(call);
}

/* ---- its beginning ----------------------------------------------------------------------------------------------- */

/* @return false: gRPC refuses; no event will come */
static bool start_one(struct kvp_rpc_call *call, grpc_op op, struct kvp_rpc_tag *tag)
{
    kvp_rpc_tag_out(call->rpc, tag);
    if (grpc_call_start_batch(call->grpc, &op, 1, tag, NULL) != GRPC_CALL_OK)
        return false;
    call->tags++;
    return true;
}

static bool start_closed(struct kvp_rpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};

    op.data.recv_close_on_server.cancelled = &call->cancelled;
    return start_one(call, op, &call->closed);
}

static bool start_received(struct kvp_rpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};

    op.data.recv_message.recv_message = &call->request;
    return start_one(call, op, &call->received);
}

static uint64_t deadline_of(const struct kvp_rpc_call *call)
{
    gpr_timespec deadline = call->details.deadline;
    uint64_t now_ms = uv_now(call->rpc->loop);
    gpr_timespec left;

    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0)
        return now_ms + call->rpc->config.default_deadline_ms;
    left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
    if (left.tv_sec < 0)
        return now_ms + 1;
    if (left.tv_sec > INT32_MAX / 1000)
        return now_ms + INT32_MAX;
    return now_ms + (uint64_t)left.tv_sec * 1000 + (uint64_t)left.tv_nsec / 1000000 + 1;
}

static struct kvp_rpc_peer *peer_of(struct kvp_rpc_call *call)
{
    char *name = grpc_call_get_peer(call->grpc);
    struct kvp_rpc_peer *peer = name != NULL ? kvp_rpc_peers_find(&call->rpc->peers, name) : NULL;

    gpr_free(name);
    return peer;
}

/* What is called. @return false: there is none of that name; the call is refused */
static bool find_method(struct kvp_rpc_call *call)
{
    size_t n = GRPC_SLICE_LENGTH(call->details.method);
    char path[KVP_RPC_PATH_BYTES_MAX + 1];

    if (n > KVP_RPC_PATH_BYTES_MAX)
        n = KVP_RPC_PATH_BYTES_MAX;
    for (size_t i = 0; i < n; i++) { /* what is not ASCII is none of our methods, and must not get into a text */
        unsigned char c = GRPC_SLICE_START_PTR(call->details.method)[i];

        path[i] = c >= 0x20 && c < 0x7f ? (char)c : '?';
    }
    path[n] = 0;
    if (strncmp(path, SERVICE_PATH, strlen(SERVICE_PATH)) == 0)
        call->method = kvp_method_by_name(path + strlen(SERVICE_PATH));
    call->health = kvp_rpc_health_path(path);
    if (call->method == NULL && !call->health) {
        call->rpc->stats.unknown++;
        kvp_rpc_refuse(call, KVP_ENOSYS, "there is no method %s", path);
        return false;
    }
    if (call->method != NULL)
        call->call.message.method = call->method->number;
    return true;
}

static void admit(struct kvp_rpc_call *call)
{
    struct kvp_rpc *rpc = call->rpc;

    if (call->peer == NULL) {
        kvp_rpc_refuse(call, KVP_EPERM, "the door does not know who calls");
    } else if (rpc->stopping) {
        kvp_rpc_refuse(call, KVP_EAGAIN, "the daemon is stopping");
    } else if (rpc->stats.calls > rpc->config.max_calls) {
        kvp_rpc_refuse(call, KVP_EAGAIN, "%u calls are in hand, at most %u are served at once", rpc->stats.calls - 1,
                       rpc->config.max_calls);
    } else if (find_method(call)) {
        call->call.caller = call->peer->caller;
        if (!start_received(call))
            kvp_rpc_refuse(call, KVP_EINTERNAL, "gRPC does not read the message");
    }
}

static void arrived(struct kvp_rpc_tag *tag, bool ok)
{
    struct kvp_rpc_call *call = tag->owner;
    struct kvp_rpc *rpc = call->rpc;

    call->tags--;
    rpc->requested--;
    if (!ok) { /* the door stops */
        release(call);
        return;
    }
    kvp_rpc_calls_request(rpc);
    call->state = KVP_CALL_RECEIVING;
    call->next = rpc->calls;
    if (rpc->calls != NULL)
        rpc->calls->previous = call;
    rpc->calls = call;
    rpc->stats.calls++;
    call->peer = peer_of(call);
    if (call->peer != NULL)
        call->peer->calls++;
    call->call.deadline_ms = deadline_of(call);
    if (!start_closed(call)) { /* nothing has been started: there is no event to wait for */
        call->state = KVP_CALL_GONE;
        grpc_call_cancel(call->grpc, NULL);
        release(call);
        return;
    }
    kvp_rpc_sweep_start(rpc);
    admit(call);
}

static bool request_one(struct kvp_rpc *rpc)
{
    struct kvp_rpc_call *call = calloc(1, sizeof(*call));

    if (call == NULL)
        return false;
    call->rpc = rpc;
    call->call.door = call;
    call->arrived = (struct kvp_rpc_tag){.done = arrived, .owner = call};
    call->received = (struct kvp_rpc_tag){.done = received, .owner = call};
    call->closed = (struct kvp_rpc_tag){.done = closed, .owner = call};
    call->sent = (struct kvp_rpc_tag){.done = sent, .owner = call};
    call->text = grpc_empty_slice();
    call->trailing.value = grpc_empty_slice();
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    call->tags = 1;
    kvp_rpc_tag_out(rpc, &call->arrived);
    if (grpc_server_request_call(rpc->server, &call->grpc, &call->details, &call->metadata, rpc->cq, rpc->cq,
                                 &call->arrived) != GRPC_CALL_OK) {
        release(call);
        return false;
    }
    return true;
}

void kvp_rpc_calls_request(struct kvp_rpc *rpc)
{
    while (!rpc->stopping && rpc->requested < KVP_RPC_REQUESTED && request_one(rpc))
        rpc->requested++;
}
