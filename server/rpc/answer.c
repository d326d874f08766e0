/**
 * What goes back over gRPC. Done: the reply. Failed: gRPC's code for the status (kvp_status.h has the table), the text
 * "KVP_ENAME: what was wrong", and the trailing metadata kvp-status-bin, a packed kvpool.v1.Error for programs.
 *
 * Texts are cut to KVP_RPC_TEXT_BYTES_MAX, never inside a character: they travel in headers, which clients limit.
 */
#include "door.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <syslog.h>

static grpc_status_code code_of(enum kvp_status status)
{
    switch (status) {
#define CODE(name, value, grpc, text) \
    case name:                        \
        return (grpc_status_code)(grpc);
        KVP_STATUS_TABLE(CODE)
#undef CODE
    }
    return GRPC_STATUS_UNKNOWN;
}

/* Pack into a slice; empty where memory fails. */
static grpc_slice pack(const ProtobufCMessage *message)
{
    size_t n = protobuf_c_message_get_packed_size(message);
    grpc_slice slice = grpc_slice_malloc(n);

    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

/* Bytes of the UTF-8 character at `at`; 0: there is none. */
static size_t character_bytes(const char *at)
{
    unsigned char first = (unsigned char)*at;
    size_t n = first < 0x80 ? 1 : first >= 0xc2 && first <= 0xdf ? 2 : (first & 0xf0) == 0xe0 ? 3 : 4;

    if (first > 0xf4 || (first >= 0x80 && first < 0xc2))
        return 0;
    for (size_t i = 1; i < n; i++)
        if (((unsigned char)at[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

/* Copy at most n-1 bytes, whole characters; a byte of none (a name that was cut) becomes '?': clients must read it. */
static void copy_text(char *to, size_t n, const char *from)
{
    size_t end = 0, step;

    for (; *from != 0; from += step) {
        size_t bytes = character_bytes(from);

        step = bytes != 0 ? bytes : 1;
        if (end + step > n - 1)
            break;
        if (bytes != 0)
            memcpy(to + end, from, bytes);
        else
            to[end] = '?';
        end += step;
    }
    to[end] = 0;
}

static void set_failure(struct kvp_rpc_call *call, enum kvp_status status, const Kvpool__V1__Error *error)
{
    Kvpool__V1__Error sent = KVPOOL__V1__ERROR__INIT;
    char what[KVP_RPC_TEXT_BYTES_MAX], text[KVP_RPC_TEXT_BYTES_MAX + 32];

    copy_text(what, sizeof(what), error != NULL && error->message[0] != 0 ? error->message : kvp_status_text(status));
    snprintf(text, sizeof(text), "%s: %s", kvp_status_name(status), what);
    sent.status = status;
    sent.message = what;
    sent.missing = error != NULL ? error->missing : 0;
    call->text = grpc_slice_from_copied_string(text);
    call->trailing.key = grpc_slice_from_static_string("kvp-status-bin");
    call->trailing.value = pack(&sent.base);
}

static void set_reply(struct kvp_rpc_call *call, const ProtobufCMessage *reply)
{
    grpc_slice slice = pack(reply);
    size_t n = GRPC_SLICE_LENGTH(slice);

    call->reply = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    call->held_bytes += n;
    call->rpc->stats.held_bytes += n;
}

void kvp_rpc_answer(struct kvp_rpc_call *call, enum kvp_status status, const ProtobufCMessage *reply)
{
    grpc_op ops[3] = {{.op = GRPC_OP_SEND_INITIAL_METADATA}, {.op = GRPC_OP_SEND_STATUS_FROM_SERVER},
                      {.op = GRPC_OP_SEND_MESSAGE}};
    size_t n_ops = 2;

    if (status == KVP_OK && protobuf_c_message_get_packed_size(reply) > KVP_MESSAGE_BYTES_MAX) {
        kvp_rpc_refuse(call, KVP_ELIMIT, "the reply would be over %d bytes; ask for less", KVP_MESSAGE_BYTES_MAX);
        return;
    }
    call->state = KVP_CALL_ANSWERED;
    if (status == KVP_OK) {
        set_reply(call, reply);
        ops[2].data.send_message.send_message = call->reply;
        n_ops = 3;
    } else {
        set_failure(call, status, (const Kvpool__V1__Error *)(const void *)reply);
        ops[1].data.send_status_from_server.trailing_metadata_count = 1;
        ops[1].data.send_status_from_server.trailing_metadata = &call->trailing;
        ops[1].data.send_status_from_server.status_details = &call->text;
    }
    ops[1].data.send_status_from_server.status = code_of(status);
    call->tags++;
    kvp_rpc_tag_out(call->rpc, &call->sent);
    if (grpc_call_start_batch(call->grpc, ops, n_ops, &call->sent, NULL) != GRPC_CALL_OK) {
        call->tags--; /* `closed` is still to come and releases the call */
        grpc_call_cancel(call->grpc, NULL);
        kvp_rpc_log(call->rpc, LOG_ERR, "grpc: an answer could not be sent");
    }
}

void kvp_rpc_refuse(struct kvp_rpc_call *call, enum kvp_status status, const char *format, ...)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    char text[256];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    error.message = text;
    kvp_rpc_answer(call, status, &error.base);
}

void kvp_rpc_reply(struct kvp_rpc *rpc, struct kvp_call *core_call, enum kvp_status status,
                   const ProtobufCMessage *reply)
{
    struct kvp_rpc_call *call = core_call->door;

    if (call->state != KVP_CALL_SERVED) {
        kvp_rpc_log(rpc, LOG_ERR, "grpc: the core answers a call that it does not have");
        return;
    }
    if (status == KVP_OK && reply == NULL) {
        kvp_rpc_refuse(call, KVP_EINTERNAL, "the core answers without a reply");
        return;
    }
    if (status != KVP_OK && reply != NULL && reply->descriptor != &kvpool__v1__error__descriptor)
        reply = NULL;
    kvp_rpc_answer(call, status, reply);
}
