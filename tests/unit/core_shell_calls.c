/**
 * Requests of the test shell, as tests write them. See core_shell.h.
 */
#include "core_shell.h"

#include <string.h>

#define PLANES_MAX 64

struct shell_call *shell_create_pool(struct shell *shell, struct kvp_caller caller, const struct pool_of *pool)
{
    Kvpool__V1__CreatePoolRequest request = KVPOOL__V1__CREATE_POOL_REQUEST__INIT;
    Kvpool__V1__PoolSpec spec = KVPOOL__V1__POOL_SPEC__INIT;
    Kvpool__V1__Plane planes[PLANES_MAX], *list[PLANES_MAX];
    ck_assert_uint_le(2 * pool->layers, PLANES_MAX);
    for (uint32_t i = 0; i < 2 * pool->layers; i++) {
        kvpool__v1__plane__init(&planes[i]);
        planes[i].layer = i / 2;
        planes[i].component = i % 2 == 0 ? KVPOOL__V1__COMPONENT__COMPONENT_K : KVPOOL__V1__COMPONENT__COMPONENT_V;
        planes[i].heads = 2;
        planes[i].dim = 4;
        planes[i].dtype = KVPOOL__V1__DTYPE__DTYPE_F16;
        list[i] = &planes[i];
    }
    spec.name = (char *)pool->name;
    spec.model = (char *)"model";
    spec.pages = pool->pages;
    spec.page_tokens = pool->page_tokens;
    spec.n_planes = 2 * pool->layers;
    spec.planes = list;
    spec.max_sequences = pool->max_sequences;
    spec.max_sequence_tokens = pool->max_sequence_tokens;
    spec.linger_ms = pool->linger_ms;
    spec.reserved_pages = pool->reserved_pages;
    spec.policy = pool->policy;
    spec.block_hash = pool->block_hash;
    spec.zero_on_reuse = pool->zero_on_reuse;
    spec.tenants = (Kvpool__V1__TenantShare **)pool->tenants;
    spec.devices = (char **)pool->devices;
    while (spec.n_tenants < 2 && spec.tenants[spec.n_tenants] != NULL)
        spec.n_tenants++;
    while (spec.n_devices < 2 && spec.devices[spec.n_devices] != NULL)
        spec.n_devices++;
    spec.memory = pool->legacy ? KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC : KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT;
    spec.region_bytes = pool->region_bytes;
    spec.page_digests = pool->page_digests;
    request.spec = &spec;
    return shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_CREATE_POOL, &request.base);
}

void shell_make_pool(struct shell *shell, struct kvp_caller caller, const struct pool_of *pool)
{
    struct shell_call *call = shell_create_pool(shell, caller, pool);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    shell_call_free(shell, call);
}

/* The status of a call; an error is shown where the log is. */
static enum kvp_status done(struct shell *shell, struct shell_call *call)
{
    enum kvp_status status = call->status;
    if (status != KVP_OK && shell->print_log)
        fprintf(stderr, "%s: %s\n", kvp_status_name(status), shell_error(call));
    shell_call_free(shell, call);
    return status;
}

enum kvp_status shell_delete_pool(struct shell *shell, struct kvp_caller caller, const char *name)
{
    Kvpool__V1__DeletePoolRequest request = KVPOOL__V1__DELETE_POOL_REQUEST__INIT;
    request.pool = (char *)name;
    return done(shell, shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_DELETE_POOL, &request.base));
}

uint32_t shell_attach(struct shell *shell, struct kvp_caller caller, const char *pool)
{
    Kvpool__V1__AttachRequest request = KVPOOL__V1__ATTACH_REQUEST__INIT;
    request.pool = (char *)pool;
    request.abi_version = KVP_ABI_VERSION;
    struct shell_call *call = shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_ATTACH, &request.base);
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    uint32_t attachment = ((const Kvpool__V1__AttachReply *)call->reply)->attachment;
    shell_call_free(shell, call);
    return attachment;
}

uint64_t *shell_progress(struct shell *shell, uint32_t attachment)
{
    unsigned char *page = shell_thing(shell, (struct kvp_thing){KVP_THING_PROGRESS, 0, attachment});
    ck_assert_ptr_nonnull(page);
    return (uint64_t *)(void *)page;
}

struct kvp_timeline *shell_timelines(struct shell *shell)
{
    unsigned char *page = shell_thing(shell, (struct kvp_thing){KVP_THING_TIMELINES, 0, 0});
    ck_assert_ptr_nonnull(page);
    return (struct kvp_timeline *)(void *)page;
}

enum kvp_status shell_open(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t key, bool durable,
                           uint64_t *ret_seq)
{
    Kvpool__V1__OpenSequencesRequest request = KVPOOL__V1__OPEN_SEQUENCES_REQUEST__INIT;
    request.pool = (char *)pool;
    request.n_keys = 1;
    request.keys = &key;
    request.durable = durable;
    struct shell_call *call = shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_OPEN_SEQUENCES, &request.base);
    if (call->status == KVP_OK)
        *ret_seq = ((const Kvpool__V1__OpenSequencesReply *)call->reply)->seqs[0];
    return done(shell, call);
}

enum kvp_status shell_advance(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t seq,
                              uint32_t reserved, uint32_t written)
{
    Kvpool__V1__AdvanceRequest request = KVPOOL__V1__ADVANCE_REQUEST__INIT;
    request.pool = (char *)pool;
    request.n_seqs = request.n_reserved = 1;
    request.seqs = &seq;
    request.reserved = &reserved;
    request.n_written = written != 0;
    request.written = &written;
    return done(shell, shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_ADVANCE, &request.base));
}

enum kvp_status shell_close(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t seq)
{
    Kvpool__V1__CloseSequencesRequest request = KVPOOL__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    request.pool = (char *)pool;
    request.n_seqs = 1;
    request.seqs = &seq;
    return done(shell, shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_CLOSE_SEQUENCES, &request.base));
}

uint32_t shell_length(struct shell *shell, struct kvp_caller caller, const char *pool, uint64_t seq)
{
    Kvpool__V1__GetSeqLensRequest request = KVPOOL__V1__GET_SEQ_LENS_REQUEST__INIT;
    request.pool = (char *)pool;
    request.n_seqs = 1;
    request.seqs = &seq;
    struct shell_call *call = shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_GET_SEQ_LENS, &request.base);
    ck_assert_int_eq(call->status, KVP_OK);
    uint32_t length = ((const Kvpool__V1__GetSeqLensReply *)call->reply)->lengths[0];
    shell_call_free(shell, call);
    return length;
}

uint32_t shell_free_pages(struct shell *shell, const char *pool)
{
    struct kvp_pool_id id;
    struct kvp_pool_view view;
    ck_assert_int_eq(kvp_pool_by_name(&shell->ledger, pool, &id), KVP_OK);
    ck_assert_int_eq(kvp_pool_get(&shell->ledger, id, &view), KVP_OK);
    return view.free_pages;
}
