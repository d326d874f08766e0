#include <kvpool.h>
#include <stdio.h>

#define TRY(call) if ((call) != KVP_OK) return fprintf(stderr, "%s: %s\n", #call, kvp_error_text()), 1

int main(void)
{
    struct kvp_plane_spec planes[] = {{0, KVP_COMPONENT_K, 8, 128, KVP_DTYPE_F16}, /* one layer's K and V */
                                      {0, KVP_COMPONENT_V, 8, 128, KVP_DTYPE_F16}};
    struct kvp_pool_spec spec = {.name = "example",
                                 .layout = {.pages = 256, .page_tokens = 16, .n_planes = 2, .planes = planes}};
    struct kvp_client *client; struct kvp_pool *pool; struct kvp_step *step; struct kvp_seq seq;
    uint64_t key = 42; uint32_t tokens = 20, start = 0, length; void *kv;

    TRY(kvp_connect(NULL, NULL, &client));               /* $KVPOOL_ENDPOINT, or the running service */
    TRY(kvp_pool_create(client, &spec, NULL));           /* one of that name and shape is found */
    TRY(kvp_attach(client, "example", NULL, &pool));     /* its pages are mapped here */
    TRY(kvp_step_create(pool, 0, 8, 64, 64, &step));     /* for up to 8 sequences, 64 tokens, 64 pages */
    TRY(kvp_host_alloc(pool, 20 * 2048, &kv));           /* 20 tokens of K or V: what a model computes */
    struct kvp_token_view source = {kv, 2048, 256}, sources[] = {source, source};
    TRY(kvp_seq_open(pool, 1, &key, 0, &seq));
    TRY(kvp_advance(pool, 1, &seq, &tokens, NULL, 0, NULL, NULL, NULL)); /* room for 20 tokens */
    TRY(kvp_step_begin(step, 1, &seq, &tokens, &start, NULL)); /* no call from here on: where the tokens go, */
    TRY(kvp_append(step, 0, 2, sources, NULL));          /* K and V into the pages, by this process's kernel, */
    TRY(kvp_progress(step, NULL));                       /* and the word that they are written */
    TRY(kvp_stream_sync(pool, 0, NULL));
    TRY(kvp_seq_len(pool, seq, &length));                /* read from shared memory */
    printf("sequence 42 has %u tokens\n", length);
    kvp_step_destroy(step); kvp_host_free(pool, kv); kvp_disconnect(client);
}
