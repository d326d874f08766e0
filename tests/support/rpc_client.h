/**
 * A gRPC client of few words, over the C core: unary calls on a Unix socket or TCP address, one after the other, each
 * with all that comes back. For tests and benches; one thread.
 */
#ifndef KVP_TEST_RPC_CLIENT_H
#define KVP_TEST_RPC_CLIENT_H

#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct rpc_client {
    grpc_completion_queue *cq;
    grpc_channel *channel;
};

struct rpc_answer {
    grpc_status_code code;
    char text[2048];
    unsigned char error[4096]; /* kvp-status-bin */
    size_t error_bytes;
    unsigned char *reply; /* NULL: none */
    size_t reply_bytes;
};

static inline void rpc_client_open(struct rpc_client *client, const char *target, grpc_channel_credentials *given)
{
    grpc_channel_credentials *creds = given != NULL ? given : grpc_insecure_credentials_create();
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER, .key = (char *)"grpc.max_receive_message_length", .value.integer = -1},
        {.type = GRPC_ARG_INTEGER, .key = (char *)"grpc.enable_retries", .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)"grpc.use_local_subchannel_pool", .value.integer = 1},
    };
    grpc_channel_args channel_args = {.num_args = 3, .args = args};

    client->cq = grpc_completion_queue_create_for_pluck(NULL);
    client->channel = grpc_channel_create(target, creds, &channel_args);
    grpc_channel_credentials_release(creds);
}

static inline void rpc_client_close(struct rpc_client *client)
{
    grpc_channel_destroy(client->channel);
    grpc_completion_queue_shutdown(client->cq);
    while (grpc_completion_queue_pluck(client->cq, NULL, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        continue;
    grpc_completion_queue_destroy(client->cq);
}

static inline void rpc_answer_read(struct rpc_answer *answer, grpc_byte_buffer *reply, grpc_slice text,
                                   const grpc_metadata_array *trailing)
{
    size_t n = GRPC_SLICE_LENGTH(text);

    if (n > sizeof(answer->text) - 1)
        n = sizeof(answer->text) - 1;
    memcpy(answer->text, GRPC_SLICE_START_PTR(text), n);
    answer->text[n] = 0;
    for (size_t i = 0; i < trailing->count; i++) {
        const grpc_metadata *m = &trailing->metadata[i];

        if (grpc_slice_str_cmp(m->key, "kvp-status-bin") != 0 || GRPC_SLICE_LENGTH(m->value) > sizeof(answer->error))
            continue;
        answer->error_bytes = GRPC_SLICE_LENGTH(m->value);
        memcpy(answer->error, GRPC_SLICE_START_PTR(m->value), answer->error_bytes);
    }
    if (reply != NULL) {
        grpc_byte_buffer_reader reader;
        grpc_slice all;

        if (!grpc_byte_buffer_reader_init(&reader, reply))
            abort();
        all = grpc_byte_buffer_reader_readall(&reader);
        answer->reply_bytes = GRPC_SLICE_LENGTH(all);
        answer->reply = malloc(answer->reply_bytes + 1);
        if (answer->reply == NULL)
            abort();
        memcpy(answer->reply, GRPC_SLICE_START_PTR(all), answer->reply_bytes);
        grpc_slice_unref(all);
        grpc_byte_buffer_reader_destroy(&reader);
    }
}

/* One unary call; free ret_answer->reply. @param deadline_ms  0: none  @param encoding  "gzip" or NULL */
static inline void rpc_client_call(struct rpc_client *client, const char *path, const void *bytes, size_t n,
                                   unsigned deadline_ms, const char *encoding, struct rpc_answer *ret_answer)
{
    gpr_timespec deadline = deadline_ms == 0 ? gpr_inf_future(GPR_CLOCK_REALTIME)
                                             : gpr_time_add(gpr_now(GPR_CLOCK_REALTIME),
                                                            gpr_time_from_millis(deadline_ms, GPR_TIMESPAN));
    grpc_slice method = grpc_slice_from_copied_string(path), body = grpc_slice_from_copied_buffer(bytes, n), text;
    grpc_call *call = grpc_channel_create_call(client->channel, NULL, GRPC_PROPAGATE_DEFAULTS, client->cq, method,
                                               NULL, deadline, NULL);
    grpc_byte_buffer *request = grpc_raw_byte_buffer_create(&body, 1), *reply = NULL;
    grpc_metadata compress = {.key = grpc_slice_from_static_string("grpc-internal-encoding-request"),
                              .value = grpc_slice_from_static_string(encoding != NULL ? encoding : "identity")};
    grpc_metadata_array initial, trailing;
    grpc_op ops[6] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},  {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, {.op = GRPC_OP_RECV_INITIAL_METADATA},
                      {.op = GRPC_OP_RECV_MESSAGE},           {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};

    *ret_answer = (struct rpc_answer){.code = GRPC_STATUS_UNKNOWN};
    text = grpc_empty_slice();
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    if (encoding != NULL) {
        ops[0].data.send_initial_metadata.count = 1;
        ops[0].data.send_initial_metadata.metadata = &compress;
    }
    ops[1].data.send_message.send_message = request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &initial;
    ops[4].data.recv_message.recv_message = &reply;
    ops[5].data.recv_status_on_client.trailing_metadata = &trailing;
    ops[5].data.recv_status_on_client.status = &ret_answer->code;
    ops[5].data.recv_status_on_client.status_details = &text;
    if (grpc_call_start_batch(call, ops, 6, call, NULL) != GRPC_CALL_OK)
        abort();
    (void)grpc_completion_queue_pluck(client->cq, call, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    rpc_answer_read(ret_answer, reply, text, &trailing);
    grpc_slice_unref(text);
    grpc_slice_unref(method);
    grpc_slice_unref(body);
    grpc_byte_buffer_destroy(request);
    grpc_byte_buffer_destroy(reply);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_call_unref(call);
}

#endif
