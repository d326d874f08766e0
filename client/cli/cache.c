/**
 * kvpool cache show|match|pin|unpin|evict|list: the prefix cache of a pool; and how commands take blocks.
 *
 * A prefix is given as its token ids, or with --keys as an engine's block keys in hexadecimal, one a block: separated by
 * commas or white space, on the command line or in a file (@FILE).
 */
#include "cli.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIST_ENTRIES 1024

/* ---- a prefix ---------------------------------------------------------------------------------------------------- */

static char *text_of_file(const char *path)
{
    char *text = NULL;
    size_t room = 0;
    ssize_t bytes = -1;
    FILE *file = fopen(path, "r");
    bool empty;

    if (file != NULL)
        bytes = cli_getdelim(&text, &room, EOF, file);
    empty = file != NULL && bytes < 0 && feof(file) && !ferror(file);
    if (bytes < 0 && !empty && errno == EFBIG)
        fprintf(stderr, "kvpool: reading %s: it has more than %u bytes\n", path, CLI_READ_MAX);
    else if (bytes < 0 && !empty)
        fprintf(stderr, "kvpool: reading %s: %s\n", path, strerror(errno));
    else if (!empty && strlen(text) != (size_t)bytes)
        fprintf(stderr, "kvpool: reading %s: byte %zu is zero, so it is no text\n", path, strlen(text));
    if (empty || bytes < 0 || strlen(text) != (size_t)bytes) {
        free(text);
        text = empty ? strdup("") : NULL;
    }
    if (file != NULL)
        fclose(file);
    return text;
}

/* What an argument says, or the file that it names; NULL: said on stderr. */
static char *text_of(const char *argument)
{
    char *text;

    if (argument[0] == '@')
        return text_of_file(argument + 1);
    text = strdup(argument);
    if (text == NULL)
        cli_failed("reading the prefix", KVP_ENOMEM);
    return text;
}

static bool add_token(const struct cli *cli, struct cli_prefix *prefix, const char *word)
{
    uint64_t token;

    if (!cli_parse_number(cli, "a token", word, 0, UINT32_MAX, &token))
        return false;
    ((uint32_t *)prefix->memory)[prefix->count++] = (uint32_t)token;
    return true;
}

/* The first key says how many bytes they have. */
static bool add_key(const struct cli *cli, struct cli_prefix *prefix, const char *word)
{
    size_t digits = strlen(word), bytes = digits / 2;

    if (prefix->count == 0)
        prefix->blocks.key_bytes = (uint32_t)bytes;
    if (digits % 2 != 0 || strspn(word, "0123456789abcdefABCDEF") != digits || bytes != prefix->blocks.key_bytes) {
        cli_usage(cli, "`%s' is no block key: %u to %u bytes in hexadecimal are wanted, all of one size", word,
                  KVP_BLOCK_KEY_BYTES_MIN, KVP_BLOCK_KEY_BYTES_MAX);
        return false;
    }
    for (size_t i = 0; i < bytes; i++)
        sscanf(word + 2 * i, "%2hhx", &((uint8_t *)prefix->memory)[prefix->count * bytes + i]);
    prefix->count++;
    return true;
}

bool cli_parse_prefix(const struct cli *cli, const char *argument, struct cli_prefix *ret_prefix)
{
    struct cli_prefix *prefix = ret_prefix;
    const char *extra = cli_value(cli, CLI_EXTRA);
    bool keys = cli_value(cli, CLI_KEYS) != NULL, ok = true;
    char *rest = NULL, *text = text_of(argument);

    *prefix = (struct cli_prefix){.blocks = {.counts = &ret_prefix->count}};
    if (text == NULL)
        return false;
    prefix->memory = malloc(4 * (strlen(text) + 1)); /* a word is a digit at least, and a token 4 bytes */
    if (prefix->memory == NULL) {
        free(text);
        cli_failed("reading the prefix", KVP_ENOMEM);
        return false;
    }
    for (char *word = strtok_r(text, ", \t\r\n", &rest); word != NULL && ok; word = strtok_r(NULL, ", \t\r\n", &rest))
        ok = keys ? add_key(cli, prefix, word) : add_token(cli, prefix, word);
    free(text);
    if (!ok) {
        free(prefix->memory);
        return false;
    }
    prefix->blocks.tokens = keys ? NULL : prefix->memory;
    prefix->blocks.keys = keys ? prefix->memory : NULL;
    prefix->blocks.extra = extra;
    prefix->blocks.extra_bytes = extra != NULL ? strlen(extra) : 0;
    return true;
}

void cli_prefix_free(struct cli_prefix *prefix)
{
    free(prefix->memory);
}

/* ---- show -------------------------------------------------------------------------------------------------------- */

json_t *cli_cache_json(const struct kvp_cache_info *cache)
{
    json_t *tenants = json_array();

    for (uint32_t i = 0; i < cache->n_tenants; i++) {
        const struct kvp_tenant_use *use = &cache->tenants[i];

        json_array_append_new(
            tenants, json_pack("{s:I, s:I, s:I, s:I, s:I}", "tenant", (json_int_t)use->tenant, "pages",
                               (json_int_t)use->pages, "cached_pages", (json_int_t)use->cached_pages, "quota_pages",
                               (json_int_t)use->quota_pages, "guaranteed_pages", (json_int_t)use->guaranteed_pages));
    }
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "published_pages",
                     (json_int_t)cache->published_pages, "cached_pages", (json_int_t)cache->cached_pages, "dirty_pages",
                     (json_int_t)cache->dirty_pages, "pins", (json_int_t)cache->pins, "lookup_blocks",
                     (json_int_t)cache->lookup_blocks, "hit_blocks", (json_int_t)cache->hit_blocks, "publishes",
                     (json_int_t)cache->publishes, "evictions", (json_int_t)cache->evictions, "tenants", tenants);
}

static void print_cache(const struct kvp_pool_info *info)
{
    const struct kvp_cache_info *cache = &info->cache;
    double hits = cache->lookup_blocks > 0 ? 100.0 * (double)cache->hit_blocks / (double)cache->lookup_blocks : 0;

    printf("cached      %u pages that nobody holds, of %u published; the pool has %u, %u free\n", cache->cached_pages,
           cache->published_pages, info->spec.layout.pages, info->free_pages);
    printf("found       %" PRIu64 " of %" PRIu64 " blocks asked for (%.1f %%)\n", cache->hit_blocks,
           cache->lookup_blocks, hits);
    printf("came, went  %" PRIu64 " published, %" PRIu64 " evicted; policy %s\n", cache->publishes, cache->evictions,
           info->spec.policy == KVP_POLICY_LRU ? "lru" : "adaptive");
    printf("pins        %u\n", cache->pins);
    for (uint32_t i = 0; i < cache->n_tenants; i++) {
        const struct kvp_tenant_use *use = &cache->tenants[i];

        printf("tenant      %u: %u pages, %u of them cached", use->tenant, use->pages, use->cached_pages);
        if (use->quota_pages > 0)
            printf("; quota %u", use->quota_pages);
        if (use->guaranteed_pages > 0)
            printf("; guaranteed %u", use->guaranteed_pages);
        putchar('\n');
    }
}

static int run_show(struct cli *cli)
{
    struct kvp_pool_info *info;
    enum kvp_status status = kvp_pool_describe(cli->client, cli->arguments[0], &info);
    int result = 0;

    if (status != KVP_OK)
        return cli_failed("showing the cache", status);
    if (cli_json(cli)) {
        json_t *document = cli_cache_json(&info->cache);

        json_object_set_new(document, "pool", json_string(info->spec.name));
        json_object_set_new(document, "policy", json_string(info->spec.policy == KVP_POLICY_LRU ? "lru" : "adaptive"));
        result = cli_print_json(document);
    } else {
        print_cache(info);
    }
    kvp_pool_info_free(info);
    return result;
}

/* ---- match, pin, unpin, evict ------------------------------------------------------------------------------------ */

static const struct argp_option prefix_options[] = {
    {"keys", CLI_KEYS, NULL, 0, "The prefix is block keys in hexadecimal, one a block, not tokens", 0},
    {"extra", CLI_EXTRA, "TEXT", 0, "What else its blocks depend on, as they were named with it", 0},
    {0}};

static int run_match(struct cli *cli)
{
    struct cli_prefix prefix;
    enum kvp_status status;
    uint32_t cached;

    if (!cli_parse_prefix(cli, cli->arguments[1], &prefix))
        return 2;
    status = kvp_match(cli->client, cli->arguments[0], 1, &prefix.blocks, &cached, 0, NULL);
    cli_prefix_free(&prefix);
    if (status != KVP_OK)
        return cli_failed("asking for the prefix", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s, s:I}", "pool", cli->arguments[0], "cached_tokens", (json_int_t)cached));
    printf("%u tokens are cached\n", cached);
    return 0;
}

static const struct argp_option pin_options[] = {
    {"keys", CLI_KEYS, NULL, 0, "The prefix is block keys in hexadecimal, one a block, not tokens", 0},
    {"extra", CLI_EXTRA, "TEXT", 0, "What else its blocks depend on, as they were named with it", 0},
    {"lease-ms", CLI_LEASE_MS, "MS", 0, "For how long, from now (60000)", 0},
    {0}};

static int pin(struct cli *cli, uint32_t lease_ms)
{
    struct cli_prefix prefix;
    enum kvp_status status;
    uint32_t pinned;

    if (!cli_parse_prefix(cli, cli->arguments[1], &prefix))
        return 2;
    status = kvp_pin(cli->client, cli->arguments[0], 1, &prefix.blocks, lease_ms, &pinned);
    cli_prefix_free(&prefix);
    if (status != KVP_OK)
        return cli_failed(lease_ms > 0 ? "pinning" : "unpinning", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s, s:I, s:I}", "pool", cli->arguments[0],
                                        lease_ms > 0 ? "pinned_tokens" : "unpinned_tokens", (json_int_t)pinned,
                                        "lease_ms", (json_int_t)lease_ms));
    if (lease_ms > 0)
        printf("%u tokens are pinned for %u ms\n", pinned, lease_ms);
    else
        printf("%u tokens were pinned, and are no longer\n", pinned);
    return 0;
}

static int run_pin(struct cli *cli)
{
    uint64_t lease_ms;

    if (!cli_number(cli, CLI_LEASE_MS, 60000, KVP_LEASE_MS_MIN, KVP_LEASE_MS_MAX, &lease_ms))
        return 2;
    return pin(cli, (uint32_t)lease_ms);
}

static int run_unpin(struct cli *cli)
{
    return pin(cli, 0);
}

static const struct argp_option evict_options[] = {
    {"pages", CLI_PAGES, "N", 0, "So many, in the order of the pool's policy (all that nobody holds)", 0},
    {"all", CLI_ALL, NULL, 0, "Those of every user, which root and the daemon's user may", 0},
    {"keys", CLI_KEYS, NULL, 0, "The prefix is block keys in hexadecimal, one a block, not tokens", 0},
    {"extra", CLI_EXTRA, "TEXT", 0, "What else its blocks depend on, as they were named with it", 0},
    {0}};

static int run_evict(struct cli *cli)
{
    bool named = cli->n_arguments > 1, all = cli_value(cli, CLI_ALL) != NULL;
    struct cli_prefix prefix = {0};
    uint64_t pages, evicted;
    enum kvp_status status;

    if (!cli_number(cli, CLI_PAGES, 0, 1, KVP_PAGES_MAX, &pages))
        return 2;
    if (named && (pages != 0 || all))
        return cli_usage(cli, "--pages and --all are without a prefix");
    if (named && !cli_parse_prefix(cli, cli->arguments[1], &prefix))
        return 2;
    status = kvp_evict(cli->client, cli->arguments[0], (uint32_t)pages, named ? 1 : 0, named ? &prefix.blocks : NULL,
                       all, &evicted);
    cli_prefix_free(&prefix);
    if (status != KVP_OK)
        return cli_failed("evicting", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s, s:I}", "pool", cli->arguments[0], "evicted_pages", (json_int_t)evicted));
    printf("%" PRIu64 " pages evicted\n", evicted);
    return 0;
}

/* ---- list -------------------------------------------------------------------------------------------------------- */

static json_t *page_json(const struct kvp_cached_page *page)
{
    char key[2 * sizeof(page->key) + 1];

    return json_pack("{s:I, s:s, s:I, s:I, s:I, s:I, s:I, s:I}", "page", (json_int_t)page->page, "key",
                     cli_hex(page->key, sizeof(page->key), key), "parent", (json_int_t)page->parent, "children",
                     (json_int_t)page->children, "references", (json_int_t)page->references, "tenant",
                     (json_int_t)page->tenant, "hits", (json_int_t)page->hits, "age", (json_int_t)page->age);
}

static void print_page(const struct kvp_cached_page *page)
{
    char key[2 * sizeof(page->key) + 1], parent[16] = "-";

    if (page->parent >= 0)
        snprintf(parent, sizeof(parent), "%d", page->parent);
    printf("page %-9d %s  behind %-9s %4u children  %4u references  tenant %u  %u hits  age %u\n", page->page,
           cli_hex(page->key, sizeof(page->key), key), parent, page->children, page->references, page->tenant,
           page->hits, page->age);
}

static int run_list(struct cli *cli)
{
    struct kvp_cached_page pages[LIST_ENTRIES];
    uint32_t from = 0, n;
    enum kvp_status status;
    json_t *list = json_array();

    do {
        status = kvp_list_cache(cli->client, cli->arguments[0], LIST_ENTRIES, &from, pages, &n);
        if (status != KVP_OK) {
            json_decref(list);
            return cli_failed("listing the cache", status);
        }
        for (uint32_t i = 0; i < n; i++) {
            if (cli_json(cli))
                json_array_append_new(list, page_json(&pages[i]));
            else
                print_page(&pages[i]);
        }
    } while (from != 0);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s, s:o}", "pool", cli->arguments[0], "pages", list));
    json_decref(list);
    return 0;
}

#define PREFIX_HELP " The prefix is token ids, as 1,2,3 or @FILE."

const struct cli_command cli_cache_commands[] = {
    {.words = "cache show",
     .arguments = "POOL",
     .help = "Show the prefix cache of a pool: what is in it, what was found, who has how much.",
     .json = "pool, policy, published_pages, cached_pages, dirty_pages, pins, lookup_blocks, hit_blocks, publishes, "
             "evictions, tenants[tenant, pages, cached_pages, quota_pages, guaranteed_pages].",
     .min_arguments = 1,
     .max_arguments = 1,
     .run = run_show},
    {.words = "cache match",
     .arguments = "POOL PREFIX",
     .help = "Ask how many tokens of a prefix are cached." PREFIX_HELP,
     .json = "pool, cached_tokens.",
     .options = prefix_options,
     .min_arguments = 2,
     .max_arguments = 2,
     .run = run_match},
    {.words = "cache pin",
     .arguments = "POOL PREFIX",
     .help = "Keep a prefix in the cache for a while.",
     .json = "pool, pinned_tokens, lease_ms.",
     .options = pin_options,
     .min_arguments = 2,
     .max_arguments = 2,
     .run = run_pin},
    {.words = "cache unpin",
     .arguments = "POOL PREFIX",
     .help = "Keep it no longer.",
     .json = "pool, unpinned_tokens, lease_ms.",
     .options = prefix_options,
     .min_arguments = 2,
     .max_arguments = 2,
     .run = run_unpin},
    {.words = "cache evict",
     .arguments = "POOL [PREFIX]",
     .help = "Let cached pages go: all of this user, so many, or those of a prefix.",
     .json = "pool, evicted_pages.",
     .options = evict_options,
     .min_arguments = 1,
     .max_arguments = 2,
     .run = run_evict},
    {.words = "cache list",
     .arguments = "POOL",
     .help = "List the pages that are found by their blocks.",
     .json = "pool, pages[page, key, parent, children, references, tenant, hits, age].",
     .min_arguments = 1,
     .max_arguments = 1,
     .run = run_list},
    {0}};
