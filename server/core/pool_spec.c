/**
 * What a caller may ask for in a pool: every number of a PoolSpec is checked here, before anything uses it, and what it
 * leaves open is filled in. Where its bytes lie is kvp_layout.h's to say.
 *
 * The filled description is what the ledger keeps, packed; two whose fields pack to the same bytes are the same pool.
 */
#include "op.h"

#include <stdio.h>

#define MAX_SEQUENCES_DEFAULT       1024u
#define MAX_SEQUENCE_TOKENS_DEFAULT 131072u
#define LINGER_MS_MAX               (24u * 3600 * 1000)

uint32_t core_row_pages(const Kvpool__V1__PoolSpec *spec)
{
    return (spec->max_sequence_tokens + spec->page_tokens - 1) / spec->page_tokens;
}

void core_spec_free(Kvpool__V1__PoolSpec *spec)
{
    if (spec != NULL)
        kvpool__v1__pool_spec__free_unpacked(spec, NULL);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static bool name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || strchr("._-:/+@", c) != NULL;
}

enum kvp_status core_name_check(struct kvp_core *core, const char *name)
{
    size_t n = strlen(name);
    if (n == 0 || n > KVP_NAME_BYTES_MAX)
        return core_refuse(core, KVP_EINVAL, "name: %zu bytes, must be 1 to %d", n, KVP_NAME_BYTES_MAX);
    for (size_t i = 0; i < n; i++) {
        if (!name_char(name[i]))
            return core_refuse(core, KVP_EINVAL, "name: byte %zu is none of letters, digits and ._-:/+@", i);
    }
    return KVP_OK;
}

static enum kvp_status check_range(struct kvp_core *core, const char *what, uint64_t value, uint64_t low, uint64_t high)
{
    if (value >= low && value <= high)
        return KVP_OK;
    return core_refuse(core, KVP_EINVAL, "%s: %llu, must be %llu to %llu", what, (unsigned long long)value,
                       (unsigned long long)low, (unsigned long long)high);
}

static enum kvp_status check_devices(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec)
{
    if (spec->n_devices > KVP_GPUS_MAX)
        return core_refuse(core, KVP_EINVAL, "devices: %zu, at most %d", spec->n_devices, KVP_GPUS_MAX);
    for (size_t i = 0; i < spec->n_devices; i++) {
        const char *device = spec->devices[i];
        size_t n = strlen(device);
        if (n == 0 || n > KVP_DEVICE_BYTES_MAX)
            return core_refuse(core, KVP_EINVAL, "devices[%zu]: %zu bytes, must be 1 to %d", i, n,
                               KVP_DEVICE_BYTES_MAX);
        if (core->host != (strcmp(device, "host") == 0))
            return core_refuse(core, KVP_ENODEV, "devices[%zu]: \"%s\" is not served by the %s backend", i, device,
                               core->config.backend);
        for (size_t k = 0; k < i; k++) {
            if (strcmp(device, spec->devices[k]) == 0)
                return core_refuse(core, KVP_EINVAL, "devices[%zu]: \"%s\" stands twice", i, device);
        }
    }
    return KVP_OK;
}

static enum kvp_status check_tenants(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec)
{
    uint64_t guaranteed = 0;
    uint32_t pages = spec->pages - spec->reserved_pages;
    for (size_t i = 0; i < spec->n_tenants; i++) {
        const Kvpool__V1__TenantShare *share = spec->tenants[i];
        guaranteed += share->guaranteed_pages;
        if (share->quota_pages != 0 && share->guaranteed_pages > share->quota_pages)
            return core_refuse(core, KVP_EINVAL, "tenants[%zu]: %u pages guaranteed, more than its quota of %u", i,
                               share->guaranteed_pages, share->quota_pages);
        for (size_t k = 0; k < i; k++) {
            if (spec->tenants[k]->tenant == share->tenant)
                return core_refuse(core, KVP_EINVAL, "tenants[%zu]: %u stands twice", i, share->tenant);
        }
    }
    if (guaranteed > pages)
        return core_refuse(core, KVP_EINVAL, "tenants: %llu pages guaranteed in all, the pool has %u to give",
                           (unsigned long long)guaranteed, pages);
    return KVP_OK;
}

static enum kvp_status check_cache(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec)
{
    TRY(check_range(core, "policy", (uint64_t)spec->policy, KVPOOL__V1__POLICY__POLICY_ADAPTIVE,
                    KVPOOL__V1__POLICY__POLICY_LRU));
    TRY(check_range(core, "block_hash", (uint64_t)spec->block_hash, KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_KEYED,
                    KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3));
    TRY(check_range(core, "zero_on_reuse", (uint64_t)spec->zero_on_reuse,
                    KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_DEFAULT, KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_OFF));
    bool xxh3 = spec->block_hash == KVPOOL__V1__BLOCK_HASH__BLOCK_HASH_XXH3;
    TRY(check_range(core, xxh3 ? "tenants with block_hash XXH3" : "tenants", spec->n_tenants, 0,
                    xxh3 ? 1 : KVP_TENANTS_MAX));
    return check_tenants(core, spec);
}

static enum kvp_status check_spec(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec)
{
    TRY(core_name_check(core, spec->name));
    TRY(check_range(core, "model bytes", strlen(spec->model), 0, KVP_MODEL_BYTES_MAX));
    TRY(check_range(core, "pages", spec->pages, 1, KVP_PAGES_MAX));
    TRY(check_range(core, "page_tokens", spec->page_tokens, 1, KVP_PAGE_TOKENS_MAX));
    TRY(check_range(core, "reserved_pages", spec->reserved_pages, 0, spec->pages - 1));
    TRY(check_range(core, "max_sequences", spec->max_sequences, 1, KVP_SEQUENCES_MAX));
    TRY(check_range(core, "max_sequence_tokens", spec->max_sequence_tokens, 1, KVP_SEQUENCE_TOKENS_MAX));
    TRY(check_range(core, "linger_ms", spec->linger_ms, 0, LINGER_MS_MAX));
    TRY(check_range(core, "region_bytes", spec->region_bytes, 0, KVP_REGION_BYTES_MAX));
    TRY(check_range(core, "memory", (uint64_t)spec->memory, KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT,
                    KVPOOL__V1__MEMORY_KIND__MEMORY_LEGACY_IPC));
    TRY(check_cache(core, spec));
    if (core->host && spec->memory != KVPOOL__V1__MEMORY_KIND__MEMORY_DEFAULT)
        return core_refuse(core, KVP_ENODEV, "memory: the host backend has no cudaIpcMemHandle");
    return check_devices(core, spec);
}

/* ---- defaults ---------------------------------------------------------------------------------------------------- */

static void fill_defaults(Kvpool__V1__PoolSpec *spec)
{
    if (spec->order == KVPOOL__V1__ORDER__ORDER_NONE)
        spec->order = KVPOOL__V1__ORDER__ORDER_NHD;
    if (spec->placement == KVPOOL__V1__PLACEMENT__PLACEMENT_NONE)
        spec->placement = KVPOOL__V1__PLACEMENT__PLACEMENT_LAYER;
    if (spec->zero_on_reuse == KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_DEFAULT)
        spec->zero_on_reuse = KVPOOL__V1__ZERO_ON_REUSE__ZERO_ON_REUSE_ON;
    if (spec->max_sequences == 0)
        spec->max_sequences = MAX_SEQUENCES_DEFAULT;
    if (spec->max_sequence_tokens == 0) {
        uint64_t tokens = (uint64_t)spec->pages * spec->page_tokens;
        spec->max_sequence_tokens =
            tokens < MAX_SEQUENCE_TOKENS_DEFAULT ? (uint32_t)tokens : MAX_SEQUENCE_TOKENS_DEFAULT;
    }
}

static Kvpool__V1__PoolSpec *copy_spec(const Kvpool__V1__PoolSpec *spec)
{
    size_t n = kvpool__v1__pool_spec__get_packed_size(spec);
    uint8_t *packed = malloc(n + 1);
    if (packed == NULL)
        return NULL;
    kvpool__v1__pool_spec__pack(spec, packed);
    Kvpool__V1__PoolSpec *copy = kvpool__v1__pool_spec__unpack(NULL, n, packed);
    free(packed);
    return copy;
}

enum kvp_status core_spec_fill(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec,
                               Kvpool__V1__PoolSpec **ret_filled)
{
    if (spec == NULL)
        return core_refuse(core, KVP_EINVAL, "spec: missing");
    if (spec->n_planes == 0 || spec->n_planes > KVP_PLANES_MAX)
        return core_refuse(core, KVP_EINVAL, "planes: %zu, must be 1 to %d", spec->n_planes, KVP_PLANES_MAX);
    Kvpool__V1__PoolSpec *filled = copy_spec(spec);
    if (filled == NULL)
        return core_refuse(core, KVP_ENOMEM, "no memory for the pool's description");
    fill_defaults(filled);
    enum kvp_status status = check_spec(core, filled);
    if (status == KVP_OK && kvpool__v1__pool_spec__get_packed_size(filled) > KVP_POOL_BLOB_BYTES)
        status = core_refuse(core, KVP_EINVAL, "spec: %zu bytes when packed, at most %d",
                             kvpool__v1__pool_spec__get_packed_size(filled), KVP_POOL_BLOB_BYTES);
    if (status != KVP_OK) {
        core_spec_free(filled);
        return status;
    }
    *ret_filled = filled;
    return KVP_OK;
}

/* ---- layout ------------------------------------------------------------------------------------------------------ */

enum kvp_status core_spec_layout(struct kvp_core *core, const Kvpool__V1__PoolSpec *spec,
                                 struct kvp_plane_layout **ret_planes, struct kvp_layout_totals *ret_totals,
                                 uint64_t ret_digest[2])
{
    struct kvp_plane_spec *specs = core_alloc(core, spec->n_planes, sizeof(*specs));
    struct kvp_plane_layout *planes = calloc(spec->n_planes, sizeof(*planes));
    if (specs == NULL || planes == NULL) {
        free(planes);
        return core_refuse(core, KVP_ENOMEM, "no memory for the pool's layout");
    }
    for (size_t i = 0; i < spec->n_planes; i++) {
        const Kvpool__V1__Plane *plane = spec->planes[i];
        specs[i] = (struct kvp_plane_spec){.layer = plane->layer,
                                           .component = (uint32_t)plane->component,
                                           .heads = plane->heads,
                                           .dim = plane->dim,
                                           .dtype = (uint32_t)plane->dtype};
    }
    struct kvp_layout_spec layout = {.pages = spec->pages,
                                     .page_tokens = spec->page_tokens,
                                     .n_planes = (uint32_t)spec->n_planes,
                                     .order = (uint32_t)spec->order,
                                     .placement = (uint32_t)spec->placement,
                                     .joined = spec->joined != 0,
                                     .planes = specs};
    char text[200] = "";
    enum kvp_status status = kvp_layout_compute(&layout, planes, ret_totals, text, sizeof(text));
    if (status != KVP_OK) {
        free(planes);
        return core_refuse(core, status, "spec: %s", text);
    }
    kvp_layout_digest(&layout, ret_digest);
    *ret_planes = planes;
    return KVP_OK;
}

/* ---- the same pool? ---------------------------------------------------------------------------------------------- */

/* The bytes of a field of a message: a repeated one's are its pointer, and its count lies elsewhere. */
static size_t field_bytes(const ProtobufCFieldDescriptor *field)
{
    if (field->label == PROTOBUF_C_LABEL_REPEATED || field->type == PROTOBUF_C_TYPE_STRING)
        return sizeof(void *);
    return field->type == PROTOBUF_C_TYPE_FIXED64 ? sizeof(uint64_t) : sizeof(uint32_t);
}

/* A description of that field alone, packed. `ret_packed` is malloc'ed. */
static enum kvp_status pack_field(const Kvpool__V1__PoolSpec *spec, const ProtobufCFieldDescriptor *field,
                                  uint8_t **ret_packed, size_t *ret_bytes)
{
    Kvpool__V1__PoolSpec alone = KVPOOL__V1__POOL_SPEC__INIT;
    unsigned char *to = (unsigned char *)&alone;
    const unsigned char *from = (const unsigned char *)spec;
    memcpy(to + field->offset, from + field->offset, field_bytes(field));
    if (field->label == PROTOBUF_C_LABEL_REPEATED)
        memcpy(to + field->quantifier_offset, from + field->quantifier_offset, sizeof(size_t));
    *ret_packed = malloc(kvpool__v1__pool_spec__get_packed_size(&alone) + 1);
    if (*ret_packed == NULL)
        return KVP_ENOMEM;
    *ret_bytes = kvpool__v1__pool_spec__pack(&alone, *ret_packed);
    return KVP_OK;
}

static enum kvp_status same_field(const Kvpool__V1__PoolSpec *a, const Kvpool__V1__PoolSpec *b,
                                  const ProtobufCFieldDescriptor *field, bool *ret_same)
{
    uint8_t *packed[2] = {NULL, NULL};
    size_t bytes[2] = {0, 0};
    enum kvp_status status = pack_field(a, field, &packed[0], &bytes[0]);
    if (status == KVP_OK)
        status = pack_field(b, field, &packed[1], &bytes[1]);
    *ret_same = status == KVP_OK && bytes[0] == bytes[1] && memcmp(packed[0], packed[1], bytes[0]) == 0;
    free(packed[0]);
    free(packed[1]);
    return status;
}

enum kvp_status core_spec_compare(const Kvpool__V1__PoolSpec *filled, const Kvpool__V1__PoolSpec *stored, size_t n,
                                  char *ret_differing)
{
    const ProtobufCMessageDescriptor *fields = &kvpool__v1__pool_spec__descriptor;
    Kvpool__V1__PoolSpec asked = *filled;
    size_t used = 0;
    if (asked.n_devices == 0 && stored->n_devices == 1) {
        asked.n_devices = 1;
        asked.devices = stored->devices;
    }
    ret_differing[0] = 0;
    for (unsigned i = 0; i < fields->n_fields; i++) {
        bool same;
        TRY(same_field(&asked, stored, &fields->fields[i], &same));
        if (!same && used < n)
            used +=
                (size_t)snprintf(ret_differing + used, n - used, "%s%s", used > 0 ? ", " : "", fields->fields[i].name);
    }
    return KVP_OK;
}
