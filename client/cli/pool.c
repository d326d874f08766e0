/**
 * kvpool pool create|list|show|delete, and region delete.
 *
 * A pool is described by its model's shape: so many layers of K and V with equal heads, or of MLA's CKV and KPE. What
 * is not uniform over the layers is made by the library or over gRPC.
 */
#include "cli.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- names of values --------------------------------------------------------------------------------------------- */

struct word {
    const char *text;
    uint32_t value;
};
static const struct word dtypes[] = {{"fp32", KVP_DTYPE_F32},
                                     {"fp16", KVP_DTYPE_F16},
                                     {"bf16", KVP_DTYPE_BF16},
                                     {"fp8_e4m3", KVP_DTYPE_FP8_E4M3},
                                     {"fp8_e5m2", KVP_DTYPE_FP8_E5M2},
                                     {"u8", KVP_DTYPE_U8},
                                     {0}};
static const struct word orders[] = {{"nhd", KVP_ORDER_NHD}, {"hnd", KVP_ORDER_HND}, {0}};
static const struct word placements[] = {{"layer", KVP_PLACEMENT_LAYER}, {"page", KVP_PLACEMENT_PAGE}, {0}};
static const struct word components[] = {
    {"k", KVP_COMPONENT_K}, {"v", KVP_COMPONENT_V}, {"ckv", KVP_COMPONENT_CKV}, {"kpe", KVP_COMPONENT_KPE}, {0}};

static const struct word policies[] = {{"adaptive", KVP_POLICY_ADAPTIVE}, {"lru", KVP_POLICY_LRU}, {0}};
static const struct word hashes[] = {{"keyed", KVP_BLOCK_HASH_KEYED}, {"xxh3", KVP_BLOCK_HASH_XXH3}, {0}};
static const struct word zeroing[] = {{"on", KVP_ZERO_ON}, {"off", KVP_ZERO_OFF}, {0}};

static const char *word_of(const struct word *words, uint32_t value)
{
    for (; words->text != NULL; words++)
        if (words->value == value)
            return words->text;
    return "?";
}

static bool parse_word(const struct cli *cli, const struct word *words, enum cli_key key, uint32_t fallback,
                       uint32_t *ret_value)
{
    const char *text = cli_value(cli, key);
    char all[128] = "";

    *ret_value = fallback;
    if (text == NULL)
        return true;
    for (const struct word *w = words; w->text != NULL; w++) {
        if (strcmp(w->text, text) == 0) {
            *ret_value = w->value;
            return true;
        }
        snprintf(all + strlen(all), sizeof(all) - strlen(all), "%s%s", w == words ? "" : ", ", w->text);
    }
    cli_usage(cli, "`%s' is none of %s", text, all);
    return false;
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

static const struct argp_option create_options[] = {
    {"pages", CLI_PAGES, "N", 0, "Pages in the pool (needed)", 0},
    {"page-tokens", CLI_PAGE_TOKENS, "N", 0, "Tokens in a page (16)", 0},
    {"layers", CLI_LAYERS, "N", 0, "Layers of the model (32)", 0},
    {"kv-heads", CLI_KV_HEADS, "N", 0, "K and V heads of a layer (8)", 0},
    {"head-dim", CLI_HEAD_DIM, "N", 0, "Elements of a head (128)", 0},
    {"mla", CLI_MLA, "CKV,KPE", 0, "MLA of these widths, as 512,64, in place of K and V", 0},
    {"dtype", CLI_DTYPE, "TYPE", 0, "fp32, fp16 (default), bf16, fp8_e4m3, fp8_e5m2, u8", 0},
    {"order", CLI_ORDER, "ORDER", 0, "In a page: nhd (default) or hnd", 0},
    {"placement", CLI_PLACEMENT, "WHERE", 0, "layer: each plane a tensor (default); page: a page's planes together", 0},
    {"joined", CLI_JOINED, NULL, 0, "K and V of a layer in one tensor (placement layer)", 0},
    {"reserved-pages", CLI_RESERVED_PAGES, "N", 0, "Pages at the front that are never handed out (0)", 0},
    {"max-sequences", CLI_MAX_SEQUENCES, "N", 0, "Sequences at a time (1024)", 0},
    {"max-tokens", CLI_MAX_TOKENS, "N", 0, "Tokens of a sequence (what the pool holds, at most 131072)", 0},
    {"model", CLI_MODEL, "NAME", 0, "Identity of the model, checked at attach", 0},
    {"devices", CLI_DEVICES, "UUID[,UUID...]", 0, "GPUs, one slab on each (the first GPU)", 0},
    {"legacy-ipc", CLI_LEGACY_IPC, NULL, 0,
     "Memory of cudaMalloc, shared by cudaIpcMemHandle_t; ends with its executor", 0},
    {"region-bytes", CLI_REGION_BYTES, "N", 0, "Room for regions behind the pages of each slab (0)", 0},
    {"linger-ms", CLI_LINGER_MS, "MS", 0, "How long a dead session's durable sequences wait for a claim (0)", 0},
    {"page-digests", CLI_PAGE_DIGESTS, NULL, 0, "Keep a digest of each full page's bytes, for `audit --digests'", 0},
    {"policy", CLI_POLICY, "POLICY", 0, "Which cached page leaves first: adaptive (default) or lru", 0},
    {"block-hash", CLI_BLOCK_HASH, "HASH", 0, "Of blocks' tokens: keyed (default), or xxh3, for one user alone", 0},
    {"zero-on-reuse", CLI_ZERO_ON_REUSE, "HOW", 0, "Zero a page that comes to another user: on (default) or off", 0},
    {"tenant", CLI_TENANT, "UID:QUOTA:GUARANTEED[,...]", 0,
     "Pages that a user may have at most (0: no limit), and that others leave it", 0},
    {0}};

/* What the strings and planes of a spec point to. */
struct made_spec {
    struct kvp_pool_spec spec;
    struct kvp_plane_spec planes[KVP_PLANES_MAX];
    const char *devices[KVP_GPUS_MAX];
    char device_text[1024];
    struct kvp_tenant_share tenants[KVP_TENANTS_MAX];
};

static bool make_planes(const struct cli *cli, struct made_spec *made)
{
    const char *mla = cli_value(cli, CLI_MLA);
    uint64_t layers, heads, dim;
    unsigned ckv = 0, kpe = 0;
    uint32_t dtype;
    int used = -1;

    if (!cli_number(cli, CLI_LAYERS, 32, 1, KVP_PLANES_MAX / 2, &layers) ||
        !cli_number(cli, CLI_KV_HEADS, 8, 1, KVP_HEADS_MAX, &heads) ||
        !cli_number(cli, CLI_HEAD_DIM, 128, 1, KVP_DIM_MAX, &dim) ||
        !parse_word(cli, dtypes, CLI_DTYPE, KVP_DTYPE_F16, &dtype))
        return false;
    if (mla != NULL && (cli_value(cli, CLI_KV_HEADS) != NULL || cli_value(cli, CLI_HEAD_DIM) != NULL)) {
        cli_usage(cli, "--mla has one head of each width: --kv-heads and --head-dim are of K and V");
        return false;
    }
    if (mla != NULL && (sscanf(mla, "%6u,%6u%n", &ckv, &kpe, &used) != 2 || used < 0 || mla[used] != 0)) {
        cli_usage(cli, "--mla is `%s': two widths are wanted, as 512,64", mla);
        return false;
    }
    for (uint32_t i = 0; i < 2 * layers; i++)
        made->planes[i] =
            (struct kvp_plane_spec){.layer = i / 2,
                                    .component = mla == NULL ? KVP_COMPONENT_K + i % 2 : KVP_COMPONENT_CKV + i % 2,
                                    .heads = mla == NULL ? (uint32_t)heads : 1,
                                    .dim = mla == NULL  ? (uint32_t)dim
                                           : i % 2 == 0 ? ckv
                                                        : kpe,
                                    .dtype = dtype};
    made->spec.layout.planes = made->planes;
    made->spec.layout.n_planes = (uint32_t)(2 * layers);
    return true;
}

static bool make_devices(const struct cli *cli, struct made_spec *made)
{
    const char *list = cli_value(cli, CLI_DEVICES);
    char *rest = NULL;

    if (list == NULL)
        return true;
    if (strlen(list) >= sizeof(made->device_text)) {
        cli_usage(cli, "--devices is too long");
        return false;
    }
    strcpy(made->device_text, list);
    for (char *one = strtok_r(made->device_text, ",", &rest); one != NULL; one = strtok_r(NULL, ",", &rest)) {
        if (made->spec.n_devices == KVP_GPUS_MAX) {
            cli_usage(cli, "--devices names more than %d GPUs", KVP_GPUS_MAX);
            return false;
        }
        made->devices[made->spec.n_devices++] = one;
    }
    made->spec.devices = made->devices;
    return true;
}

static bool make_tenants(const struct cli *cli, struct made_spec *made)
{
    const char *at = cli_value(cli, CLI_TENANT);

    made->spec.tenants = made->tenants;
    while (at != NULL) {
        struct kvp_tenant_share *share = &made->tenants[made->spec.n_tenants];
        int used = -1;

        if (made->spec.n_tenants == KVP_TENANTS_MAX) {
            cli_usage(cli, "--tenant names more than %d users", KVP_TENANTS_MAX);
            return false;
        }
        if (at[0] < '0' || at[0] > '9' ||
            sscanf(at, "%9u:%9u:%9u%n", &share->tenant, &share->quota_pages, &share->guaranteed_pages, &used) != 3 ||
            (at[used] != 0 && at[used] != ',')) {
            cli_usage(cli, "--tenant is `%s': UID:QUOTA:GUARANTEED is wanted, as 1000:500:100", at);
            return false;
        }
        made->spec.n_tenants++;
        at = at[used] == ',' ? at + used + 1 : NULL;
    }
    return true;
}

static bool make_spec(const struct cli *cli, struct made_spec *made)
{
    uint64_t pages, page_tokens, reserved, sequences, tokens, linger, regions;
    struct kvp_pool_spec *spec = &made->spec;

    if (cli_value(cli, CLI_PAGES) == NULL) {
        cli_usage(cli, "--pages is wanted");
        return false;
    }
    if (!make_planes(cli, made) || !make_devices(cli, made) ||
        !cli_number(cli, CLI_PAGES, 0, 1, KVP_PAGES_MAX, &pages) ||
        !cli_number(cli, CLI_PAGE_TOKENS, 16, 1, KVP_PAGE_TOKENS_MAX, &page_tokens) ||
        !cli_number(cli, CLI_RESERVED_PAGES, 0, 0, KVP_PAGES_MAX, &reserved) ||
        !cli_number(cli, CLI_MAX_SEQUENCES, 0, 0, KVP_SEQUENCES_MAX, &sequences) ||
        !cli_number(cli, CLI_MAX_TOKENS, 0, 0, KVP_SEQUENCE_TOKENS_MAX, &tokens) ||
        !cli_number(cli, CLI_LINGER_MS, 0, 0, UINT32_MAX, &linger) ||
        !cli_number(cli, CLI_REGION_BYTES, 0, 0, KVP_REGION_BYTES_MAX, &regions) ||
        !parse_word(cli, orders, CLI_ORDER, KVP_ORDER_NHD, &spec->layout.order) ||
        !parse_word(cli, placements, CLI_PLACEMENT, KVP_PLACEMENT_LAYER, &spec->layout.placement) ||
        !parse_word(cli, policies, CLI_POLICY, KVP_POLICY_ADAPTIVE, &spec->policy) ||
        !parse_word(cli, hashes, CLI_BLOCK_HASH, KVP_BLOCK_HASH_KEYED, &spec->block_hash) ||
        !parse_word(cli, zeroing, CLI_ZERO_ON_REUSE, KVP_ZERO_DEFAULT, &spec->zero_on_reuse) ||
        !make_tenants(cli, made))
        return false;
    spec->name = cli->arguments[0];
    spec->model = cli_value(cli, CLI_MODEL);
    spec->layout.pages = (uint32_t)pages;
    spec->layout.page_tokens = (uint32_t)page_tokens;
    spec->layout.joined = cli_value(cli, CLI_JOINED) != NULL;
    spec->reserved_pages = (uint32_t)reserved;
    spec->max_sequences = (uint32_t)sequences;
    spec->max_sequence_tokens = (uint32_t)tokens;
    spec->legacy_ipc = cli_value(cli, CLI_LEGACY_IPC) != NULL;
    spec->linger_ms = (uint32_t)linger;
    spec->page_digests = cli_value(cli, CLI_PAGE_DIGESTS) != NULL;
    spec->region_bytes = regions;
    return true;
}

/* ---- showing ----------------------------------------------------------------------------------------------------- */

/* The regions of a pool, as its description goes with them. */
struct regions {
    struct kvp_region_info *list;
    size_t n;
};

static json_t *regions_json(const struct regions *regions)
{
    json_t *list = json_array();

    for (size_t i = 0; i < regions->n; i++) {
        const struct kvp_region_info *r = &regions->list[i];

        json_array_append_new(list,
                              json_pack("{s:s, s:I, s:I, s:I, s:I, s:I}", "name", r->name, "rank", (json_int_t)r->rank,
                                        "offset", (json_int_t)r->offset, "bytes", (json_int_t)r->bytes, "tenant",
                                        (json_int_t)r->tenant, "mapped", (json_int_t)r->mapped));
    }
    return list;
}

static json_t *info_json(const struct kvp_pool_info *info, const struct regions *regions)
{
    const struct kvp_pool_spec *spec = &info->spec;
    json_t *planes = json_array(), *devices = json_array();
    char digest[33];

    for (uint32_t i = 0; i < spec->layout.n_planes; i++) {
        const struct kvp_plane_spec *p = &spec->layout.planes[i];

        json_array_append_new(planes, json_pack("{s:I, s:s, s:I, s:I, s:s, s:I, s:I, s:I, s:I}", "layer",
                                                (json_int_t)p->layer, "component", word_of(components, p->component),
                                                "heads", (json_int_t)p->heads, "dim", (json_int_t)p->dim, "dtype",
                                                word_of(dtypes, p->dtype), "offset", (json_int_t)info->planes[i].offset,
                                                "page_stride", (json_int_t)info->planes[i].page_stride, "token_stride",
                                                (json_int_t)info->planes[i].token_stride, "head_stride",
                                                (json_int_t)info->planes[i].head_stride));
    }
    for (uint32_t i = 0; i < spec->n_devices; i++)
        json_array_append_new(devices, json_string(spec->devices[i]));
    snprintf(digest, sizeof(digest), "%016" PRIx64 "%016" PRIx64, info->layout_digest[0], info->layout_digest[1]);
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:s, s:s, s:b, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, "
        "s:b, s:b, s:I, s:I, s:s, s:s, s:s, s:o, s:s, s:o, s:o, s:o}",
        "name", spec->name, "model", spec->model, "backend", info->cuda ? "cuda" : "host", "state",
        info->lost       ? "lost"
        : info->deleting ? "deleting"
                         : "live",
        "pages", (json_int_t)spec->layout.pages, "page_tokens", (json_int_t)spec->layout.page_tokens, "free_pages",
        (json_int_t)info->free_pages, "reserved_pages", (json_int_t)spec->reserved_pages, "order",
        word_of(orders, spec->layout.order), "placement", word_of(placements, spec->layout.placement), "joined",
        (int)spec->layout.joined, "page_bytes", (json_int_t)info->page_bytes, "slab_bytes",
        (json_int_t)info->slab_bytes, "max_sequences", (json_int_t)spec->max_sequences, "max_sequence_tokens",
        (json_int_t)spec->max_sequence_tokens, "sequences", (json_int_t)info->sequences, "retiring_sequences",
        (json_int_t)info->retiring_sequences, "quarantined_pages", (json_int_t)info->quarantined_pages, "attachments",
        (json_int_t)info->attachments, "legacy_ipc", (int)spec->legacy_ipc, "page_digests", (int)spec->page_digests,
        "linger_ms", (json_int_t)spec->linger_ms, "region_bytes", (json_int_t)spec->region_bytes, "policy",
        word_of(policies, spec->policy), "block_hash", word_of(hashes, spec->block_hash), "zero_on_reuse",
        word_of(zeroing, spec->zero_on_reuse), "cache", cli_cache_json(&info->cache), "layout_digest", digest,
        "devices", devices, "planes", planes, "regions", regions_json(regions));
}

static void print_info(const struct kvp_pool_info *info, const struct regions *regions)
{
    const struct kvp_layout_spec *layout = &info->spec.layout;
    const struct kvp_plane_spec *first = &layout->planes[0];
    char page[CLI_AMOUNT_BYTES], slab[CLI_AMOUNT_BYTES], text[CLI_TEXT_BYTES];

    printf("pool        %s (%s, %s)\n", info->spec.name, info->cuda ? "cuda" : "host",
           info->lost       ? "lost"
           : info->deleting ? "deleting"
                            : "live");
    if (info->spec.model[0] != 0)
        printf("model       %s\n", cli_text(info->spec.model, text));
    printf("pages       %u of %u tokens, %s each, %u free\n", layout->pages, layout->page_tokens,
           cli_bytes_text(info->page_bytes, page), info->free_pages);
    printf("memory      %u slab%s of %s\n", info->slabs, info->slabs == 1 ? "" : "s",
           cli_bytes_text(info->slab_bytes, slab));
    printf("layout      %u planes, the first %s [%u heads of %u] %s; %s, placement %s%s\n", layout->n_planes,
           word_of(components, first->component), first->heads, first->dim, word_of(dtypes, first->dtype),
           word_of(orders, layout->order), word_of(placements, layout->placement), layout->joined ? ", joined" : "");
    printf("sequences   %u open of %u, of %u tokens at most; %u retire, %u in quarantine (%" PRIu64 " pages)\n",
           info->sequences, info->spec.max_sequences, info->spec.max_sequence_tokens, info->retiring_sequences,
           info->quarantined_sequences, info->quarantined_pages);
    printf("attached    %u sessions\n", info->attachments);
    printf("cache       %u pages cached, %u published; policy %s, block hash %s, zero on reuse %s\n",
           info->cache.cached_pages, info->cache.published_pages, word_of(policies, info->spec.policy),
           word_of(hashes, info->spec.block_hash), word_of(zeroing, info->spec.zero_on_reuse));
    for (uint32_t i = 0; i < info->spec.n_devices; i++)
        printf("device      %s\n", info->spec.devices[i]);
    for (size_t i = 0; i < regions->n; i++) {
        const struct kvp_region_info *r = &regions->list[i];

        printf("region      %s: %s at %" PRIu64 " of slab %u, of user %u, mapped by %u\n", cli_text(r->name, text),
               cli_bytes_text(r->bytes, page), r->offset, r->rank, r->tenant, r->mapped);
    }
}

static int show(const struct cli *cli, struct kvp_pool_info *info)
{
    struct regions regions = {0};
    enum kvp_status status = kvp_region_list(cli->client, info->spec.name, &regions.list, &regions.n);
    int result = 0;

    if (status != KVP_OK)
        result = cli_failed("listing the pool's regions", status);
    else if (cli_json(cli))
        result = cli_print_json(info_json(info, &regions));
    else
        print_info(info, &regions);
    free(regions.list);
    kvp_pool_info_free(info);
    return result;
}

/* ---- the commands ------------------------------------------------------------------------------------------------ */

static int run_create(struct cli *cli)
{
    struct made_spec *made = calloc(1, sizeof(*made));
    struct kvp_pool_info *info;
    enum kvp_status status;

    if (made == NULL)
        return cli_failed("making a spec", KVP_ENOMEM);
    if (!make_spec(cli, made)) {
        free(made);
        return 2;
    }
    status = kvp_pool_create(cli->client, &made->spec, &info);
    free(made);
    return status == KVP_OK ? show(cli, info) : cli_failed("creating the pool", status);
}

static int run_show(struct cli *cli)
{
    struct kvp_pool_info *info;
    enum kvp_status status = kvp_pool_describe(cli->client, cli->arguments[0], &info);

    return status == KVP_OK ? show(cli, info) : cli_failed("showing the pool", status);
}

static int run_list(struct cli *cli)
{
    char **names;
    size_t n;
    enum kvp_status status = kvp_pool_list(cli->client, &names, &n);
    json_t *list;
    int result = 0;

    if (status != KVP_OK)
        return cli_failed("listing pools", status);
    if (cli_json(cli)) {
        list = json_array();
        for (size_t i = 0; i < n; i++)
            json_array_append_new(list, json_string(names[i]));
        result = cli_print_json(json_pack("{s:o}", "pools", list));
    } else {
        for (size_t i = 0; i < n; i++)
            puts(names[i]);
    }
    free(names);
    return result;
}

static int run_delete(struct cli *cli)
{
    enum kvp_status status = kvp_pool_delete(cli->client, cli->arguments[0]);

    if (status != KVP_OK)
        return cli_failed("deleting the pool", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s}", "deleted", cli->arguments[0]));
    printf("deleted %s\n", cli->arguments[0]);
    return 0;
}

/* The daemon refuses to delete a pool that anyone has attached; that one, and one with pages still to come back, stays. */
void cli_delete_abandoned_pools(struct kvp_client *client, const char *prefix)
{
    char **names;
    size_t n;

    if (kvp_pool_list(client, &names, &n) != KVP_OK)
        return;
    for (size_t i = 0; i < n; i++) {
        int pid = 0, used = -1;

        if (strncmp(names[i], prefix, strlen(prefix)) != 0)
            continue;
        if (sscanf(names[i] + strlen(prefix), "%d%n", &pid, &used) != 1 ||
            names[i][strlen(prefix) + (size_t)used] != 0 || pid <= 0)
            continue;
        if (pid == (int)getpid() || (kill(pid, 0) != 0 && errno == ESRCH))
            kvp_pool_delete(client, names[i]);
    }
    free(names);
}

static const struct argp_option region_options[] = {{"rank", CLI_RANK, "N", 0, "Of which of the pool's slabs (0)", 0},
                                                    {0}};

/* The library has nothing to say of a region that is not there; an operator may have mistyped it. */
static enum kvp_status find_region(const struct cli *cli, uint64_t rank, const char *name, bool *ret_there)
{
    struct regions regions;
    enum kvp_status status = kvp_region_list(cli->client, cli->arguments[0], &regions.list, &regions.n);

    if (status != KVP_OK)
        return status;
    *ret_there = false;
    for (size_t i = 0; i < regions.n; i++)
        *ret_there |= regions.list[i].rank == rank && strcmp(regions.list[i].name, name) == 0;
    free(regions.list);
    return KVP_OK;
}

static int run_region_delete(struct cli *cli)
{
    const char *name = cli->arguments[1];
    struct kvp_pool *pool;
    enum kvp_status status;
    uint64_t rank;
    bool there;

    if (!cli_number(cli, CLI_RANK, 0, 0, KVP_GPUS_MAX - 1, &rank))
        return 2;
    status = find_region(cli, rank, name, &there);
    if (status != KVP_OK)
        return cli_failed("deleting the region", status);
    if (!there) {
        fprintf(stderr, "kvpool: deleting the region: pool %s has no %s in slab %" PRIu64 " (%s)\n", cli->arguments[0],
                name, rank, kvp_status_name(KVP_ENOENT));
        return 1;
    }
    status = kvp_attach(cli->client, cli->arguments[0], &(struct kvp_attach_options){.metadata_only = true}, &pool);
    if (status == KVP_OK) {
        status = kvp_region_unmap(pool, (uint32_t)rank, name, 0);
        if (status == KVP_OK)
            status = kvp_detach(pool);
    }
    if (status != KVP_OK)
        return cli_failed("deleting the region", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s}", "deleted", name));
    printf("deleted %s\n", name);
    return 0;
}

#define INFO_KEYS                                                                                                      \
    "name, model, backend, state, pages, page_tokens, free_pages, reserved_pages, order, placement, joined, "          \
    "page_bytes, slab_bytes, max_sequences, max_sequence_tokens, sequences, retiring_sequences, quarantined_pages, "   \
    "attachments, legacy_ipc, page_digests, linger_ms, region_bytes, policy, block_hash, zero_on_reuse, "              \
    "cache[published_pages, "                                                                                          \
    "cached_pages, dirty_pages, pins, lookup_blocks, hit_blocks, publishes, evictions, tenants[tenant, pages, "        \
    "cached_pages, quota_pages, guaranteed_pages]], layout_digest, devices[], planes[layer, component, heads, "        \
    "dim, dtype, offset, page_stride, token_stride, head_stride], regions[name, rank, offset, bytes, tenant, mapped]."

const struct cli_command cli_pool_commands[] = {
    {.words = "pool create",
     .arguments = "NAME",
     .help = "Make a pool of pages; one of that name and shape is shown as it is.",
     .json = INFO_KEYS,
     .options = create_options,
     .min_arguments = 1,
     .max_arguments = 1,
     .run = run_create},
    {.words = "pool list", .arguments = "", .help = "List the pools.", .json = "pools[].", .run = run_list},
    {.words = "pool show",
     .arguments = "NAME",
     .help = "Show a pool.",
     .json = INFO_KEYS,
     .min_arguments = 1,
     .max_arguments = 1,
     .run = run_show},
    {.words = "pool delete",
     .arguments = "NAME",
     .help = "Delete a pool that nobody has attached.",
     .json = "deleted.",
     .min_arguments = 1,
     .max_arguments = 1,
     .run = run_delete},
    {.words = "region delete",
     .arguments = "POOL NAME",
     .help = "Give up a region that nobody has mapped.",
     .json = "deleted.",
     .options = region_options,
     .min_arguments = 2,
     .max_arguments = 2,
     .run = run_region_delete},
    {0}};
