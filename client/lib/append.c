/**
 * Append on request, and the buffers that it takes its tokens from: the executor does the work, the library says what.
 */
#include "internal.h"

#include <string.h>

enum kvp_status kvp_append_on_request(struct kvp_pool *pool, const struct kvp_append_request *from,
                                      struct kvp_point *ret_done, uint32_t *reterr_short)
{
    Kvpool__V1__AppendRequest request = KVPOOL__V1__APPEND_REQUEST__INIT;
    uint32_t planes = pool->info->spec.layout.n_planes;
    uint64_t wire[KVP_BATCH_MAX];
    enum kvp_status status = kvp_check_batch("kvp_append_on_request", from->n);
    struct kvp_rpc rpc;

    if (status != KVP_OK)
        return status;
    kvp_seqs_to_wire(from->n, from->seqs, wire);
    request.pool = (char *)pool->info->spec.name;
    request.n_seqs = request.n_at = request.n_tokens = from->n;
    request.seqs = wire;
    request.at = (uint32_t *)from->at;
    request.tokens = (uint32_t *)from->tokens;
    if (from->bytes != NULL)
        request.inline_ = (ProtobufCBinaryData){from->bytes_n, (uint8_t *)from->bytes};
    request.buffer = from->buffer;
    request.n_plane_offsets = from->plane_offsets != NULL ? planes : 0;
    request.plane_offsets = (uint64_t *)from->plane_offsets;
    request.n_token_strides = from->token_strides != NULL ? planes : 0;
    request.token_strides = (uint64_t *)from->token_strides;
    request.n_head_strides = from->head_strides != NULL ? planes : 0;
    request.head_strides = (uint64_t *)from->head_strides;
    request.wait_timeline = from->wait.timeline;
    request.wait_value = from->wait.value;
    request.rank = from->rank;
    status = kvp_rpc_call(pool->client, pool, KVPOOL__V1__METHOD__METHOD_APPEND, &request.base, NULL, 0, &rpc);
    if (status == KVP_ENOPAGES && reterr_short != NULL)
        *reterr_short = (uint32_t)rpc.missing;
    if (status == KVP_OK && ret_done != NULL) {
        const Kvpool__V1__AppendReply *reply = (const Kvpool__V1__AppendReply *)rpc.reply;

        *ret_done = (struct kvp_point){.timeline = reply->timeline, .value = reply->value};
    }
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_buffer_register(struct kvp_client *client, const char *device, int fd, const void *ipc_handle,
                                    uint64_t offset, uint64_t bytes, uint32_t *ret_buffer)
{
    Kvpool__V1__RegisterBufferRequest request = KVPOOL__V1__REGISTER_BUFFER_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    if ((fd < 0) == (ipc_handle == NULL))
        return kvp_fail(KVP_EINVAL, "a buffer is shared by an fd or by a handle, one of them");
    request.device = (char *)device;
    request.bytes = bytes;
    request.offset = offset;
    if (ipc_handle != NULL)
        request.ipc_handle = (ProtobufCBinaryData){64, (uint8_t *)ipc_handle};
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_REGISTER_BUFFER, &request.base, &fd, fd >= 0 ? 1 : 0,
                          &rpc);
    if (status == KVP_OK)
        *ret_buffer = ((Kvpool__V1__RegisterBufferReply *)rpc.reply)->buffer;
    kvp_rpc_release(&rpc);
    return status;
}

enum kvp_status kvp_buffer_unregister(struct kvp_client *client, uint32_t buffer)
{
    Kvpool__V1__UnregisterBufferRequest request = KVPOOL__V1__UNREGISTER_BUFFER_REQUEST__INIT;
    enum kvp_status status;
    struct kvp_rpc rpc;

    request.buffer = buffer;
    status = kvp_rpc_call(client, NULL, KVPOOL__V1__METHOD__METHOD_UNREGISTER_BUFFER, &request.base, NULL, 0, &rpc);
    kvp_rpc_release(&rpc);
    return status;
}
