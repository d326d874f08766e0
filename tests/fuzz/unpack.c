/**
 * Fuzz target: the bytes of a message, as any message of kvpool.v1. The first byte picks the type and how tight the
 * budget is.
 *
 * Holds: unpacking ends in a message or a refusal, takes no more than its budget, a refusal for want of budget is told
 * from a malformed message, and what was unpacked (without unknown fields) packs and unpacks to the same again.
 */
#include "kvp_wire.h"

#include "kvpool.pb-c.h"

#include <stdlib.h>
#include <string.h>

static const ProtobufCMessageDescriptor *const types[] = {
    &kvpool__v1__open_session_request__descriptor,    &kvpool__v1__open_session_reply__descriptor,
    &kvpool__v1__keep_alive_request__descriptor,      &kvpool__v1__create_pool_request__descriptor,
    &kvpool__v1__create_pool_reply__descriptor,       &kvpool__v1__list_pools_reply__descriptor,
    &kvpool__v1__attach_request__descriptor,          &kvpool__v1__attach_reply__descriptor,
    &kvpool__v1__register_buffer_request__descriptor, &kvpool__v1__open_sequences_request__descriptor,
    &kvpool__v1__list_sequences_reply__descriptor,    &kvpool__v1__advance_request__descriptor,
    &kvpool__v1__append_request__descriptor,          &kvpool__v1__fork_request__descriptor,
    &kvpool__v1__transfer_request__descriptor,        &kvpool__v1__close_sequences_request__descriptor,
    &kvpool__v1__get_page_table_reply__descriptor,    &kvpool__v1__get_batch_indices_request__descriptor,
    &kvpool__v1__get_batch_indices_reply__descriptor, &kvpool__v1__get_stats_reply__descriptor,
    &kvpool__v1__audit_reply__descriptor,             &kvpool__v1__error__descriptor,
    &kvpool__v1__exec_hello_reply__descriptor,        &kvpool__v1__exec_slab_create_request__descriptor,
    &kvpool__v1__exec_job_request__descriptor,        &kvpool__v1__exec_processes_reply__descriptor,
    &kvpool__v1__match_request__descriptor,           &kvpool__v1__match_reply__descriptor,
    &kvpool__v1__pin_request__descriptor,             &kvpool__v1__pin_reply__descriptor,
    &kvpool__v1__evict_request__descriptor,           &kvpool__v1__list_cache_reply__descriptor,
};
#define TYPES (sizeof(types) / sizeof(types[0]))

static void check(bool holds)
{
    if (!holds)
        abort();
}

/* Fields that the type does not have come back as they were given, numbered 0 or in more bytes than needed. */
static bool has_unknown(const ProtobufCMessage *message)
{
    if (message->n_unknown_fields > 0)
        return true;
    for (unsigned f = 0; f < message->descriptor->n_fields; f++) {
        const ProtobufCFieldDescriptor *field = &message->descriptor->fields[f];
        const char *at = (const char *)message + field->offset;
        size_t n = 1;

        if (field->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        if (field->label == PROTOBUF_C_LABEL_REPEATED) {
            n = *(const size_t *)(const void *)((const char *)message + field->quantifier_offset);
            at = *(const char *const *)(const void *)at;
        }
        for (size_t i = 0; i < n; i++) {
            const ProtobufCMessage *inner = ((const ProtobufCMessage *const *)(const void *)at)[i];

            if (inner != NULL && has_unknown(inner))
                return true;
        }
    }
    return false;
}

static void pack_again(const ProtobufCMessageDescriptor *type, const ProtobufCMessage *body)
{
    size_t n = protobuf_c_message_get_packed_size(body), again_n;
    uint8_t *bytes = malloc(n + 1), *again_bytes = malloc(n + 1);
    struct kvp_wire_budget budget;
    ProtobufCMessage *again;

    check(bytes != NULL && again_bytes != NULL);
    check(protobuf_c_message_pack(body, bytes) == n);
    kvp_wire_budget_init(&budget, 256u << 20);
    check(kvp_wire_unpack(type, bytes, n, &budget, &again) == KVP_OK);
    again_n = protobuf_c_message_get_packed_size(again);
    check(again_n == n && protobuf_c_message_pack(again, again_bytes) == n && memcmp(bytes, again_bytes, n) == 0);
    protobuf_c_message_free_unpacked(again, &budget.allocator);
    free(bytes);
    free(again_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const ProtobufCMessageDescriptor *type;
    struct kvp_wire_budget budget;
    ProtobufCMessage *body = NULL;
    enum kvp_status status;
    size_t cap;

    if (size == 0)
        return 0;
    type = types[data[0] % TYPES];
    cap = data[0] / TYPES % 2 == 0 ? 64u << 20 : 4096;
    kvp_wire_budget_init(&budget, cap);
    status = kvp_wire_unpack(type, data + 1, size - 1, &budget, &body);
    check(status == KVP_OK || status == KVP_EPROTO || status == KVP_ENOMEM);
    check(budget.left <= cap);
    check((status == KVP_OK) == (body != NULL));
    check(status != KVP_ENOMEM || budget.refused);
    if (body != NULL) {
        if (!has_unknown(body))
            pack_again(type, body);
        protobuf_c_message_free_unpacked(body, &budget.allocator);
    }
    return 0;
}
