/**
 * kvpool seq open|advance|append|fork|close|list|show, seqlens, page-table.
 *
 * What changes sequences works in a session by lease (--session), which keeps the pool attached from one command to the
 * next; what only reads needs none. Pools are attached for their metadata alone: no command maps a slab.
 */
#include "cli.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIST_ENTRIES   256
#define APPEND_WAIT_MS 60000

/* ---- what the commands begin with -------------------------------------------------------------------------------- */

static int attach(struct cli *cli, struct kvp_pool **ret_pool)
{
    const struct kvp_attach_options options = {.metadata_only = true};
    enum kvp_status status = kvp_attach(cli->client, cli->arguments[0], &options, ret_pool);

    return status == KVP_OK ? 0 : cli_failed("attaching the pool", status);
}

/* On a GPU, pages are given up behind a timeline value. No work of this process can be on it, so that it is reached. */
static enum kvp_status point_passed(struct kvp_pool *pool, struct kvp_point *ret_point)
{
    enum kvp_status status = kvp_timeline_id(pool, 1, &ret_point->timeline);

    if (status == KVP_OK)
        status = kvp_timeline_value(pool, ret_point->timeline, &ret_point->value);
    ret_point->value++;
    return status == KVP_OK ? kvp_timeline_signal(pool, *ret_point, NULL) : status;
}

/* The handles among the arguments, from the second on. */
static bool parse_seqs(const struct cli *cli, struct kvp_seq *seqs, uint32_t *ret_n)
{
    int n = cli->n_arguments - 1;

    if (n > KVP_BATCH_MAX) {
        cli_usage(cli, "%d sequences are more than the %d of one call", n, KVP_BATCH_MAX);
        return false;
    }
    for (int i = 0; i < n; i++)
        if (!cli_parse_seq(cli, cli->arguments[i + 1], &seqs[i]))
            return false;
    *ret_n = (uint32_t)n;
    return true;
}

static json_t *info_json(const struct kvp_seq_info *info)
{
    static const char *const states[] = {"free", "open", "retiring", "quarantined", "lingering", "busy"};
    char seq[CLI_SEQ_BYTES], session[24], key[24];

    snprintf(session, sizeof(session), "%" PRIx64, info->session_id);
    snprintf(key, sizeof(key), "%" PRIu64, info->key);
    return json_pack("{s:s, s:s, s:I, s:I, s:s, s:s}", "seq", cli_seq_text(info->seq, seq), "key", key, "reserved",
                     (json_int_t)info->reserved, "written", (json_int_t)info->written, "state",
                     (unsigned)info->state < sizeof(states) / sizeof(states[0]) ? states[info->state] : "?",
                     "session_id", session);
}

/* ---- open, advance, append, fork, close -------------------------------------------------------------------------- */

#define PROMPT_OPTIONS(help)                                                                                           \
    {"prompt", CLI_PROMPT, "PREFIX", 0, help, 0},                                                                      \
        {"keys", CLI_KEYS, NULL, 0, "The prompt is block keys in hexadecimal, one a block, not tokens", 0},            \
    {                                                                                                                  \
        "extra", CLI_EXTRA, "TEXT", 0, "What else its blocks depend on", 0                                             \
    }

/* --prompt, where it is given. @return false: said on stderr */
static bool parse_prompt(const struct cli *cli, struct cli_prefix *prompt, const struct kvp_blocks **ret_blocks)
{
    const char *text = cli_value(cli, CLI_PROMPT);

    *prompt = (struct cli_prefix){.memory = NULL};
    *ret_blocks = NULL;
    if (text == NULL && (cli_value(cli, CLI_KEYS) != NULL || cli_value(cli, CLI_EXTRA) != NULL)) {
        cli_usage(cli, "--keys and --extra are of --prompt");
        return false;
    }
    if (text == NULL)
        return true;
    *ret_blocks = &prompt->blocks;
    return cli_parse_prefix(cli, text, prompt);
}

static const struct argp_option open_options[] = {
    {"durable", CLI_DURABLE, NULL, 0, "Outlives its session by the pool's linger time", 0},
    PROMPT_OPTIONS("Token ids, as 1,2,3 or @FILE: take along what is cached of them (one key)"),
    {0}};

static int run_open(struct cli *cli)
{
    struct kvp_seq seqs[KVP_BATCH_MAX];
    uint64_t keys[KVP_BATCH_MAX];
    uint32_t n = (uint32_t)cli->n_arguments - 1, cached = 0;
    const struct kvp_blocks *blocks;
    struct cli_prefix prompt;
    char text[CLI_SEQ_BYTES];
    struct kvp_pool *pool;
    enum kvp_status status;
    json_t *list;
    int result;

    if (n > 1 && cli_value(cli, CLI_PROMPT) != NULL)
        return cli_usage(cli, "--prompt is of one sequence, not of %u", n);
    if (n > KVP_BATCH_MAX)
        return cli_usage(cli, "%u sequences are more than the %d of one call", n, KVP_BATCH_MAX);
    for (uint32_t i = 0; i < n; i++)
        if (!cli_parse_number(cli, "a key", cli->arguments[i + 1], 0, UINT64_MAX, &keys[i]))
            return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    if (!parse_prompt(cli, &prompt, &blocks))
        return 2;
    status = kvp_seq_open_blocks(pool, n, keys, cli_value(cli, CLI_DURABLE) != NULL ? KVP_DURABLE : 0, blocks, seqs,
                                 n == 1 ? &cached : NULL);
    cli_prefix_free(&prompt);
    if (status != KVP_OK)
        return cli_failed("opening sequences", status);
    list = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(list, json_string(cli_seq_text(seqs[i], text)));
        if (!cli_json(cli))
            puts(text);
    }
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:o, s:I}", "seqs", list, "cached_tokens", (json_int_t)cached));
    json_decref(list);
    if (blocks != NULL)
        fprintf(stderr, "%u tokens taken along\n", cached);
    return 0;
}

static const struct argp_option advance_options[] = {
    {"truncate", CLI_TRUNCATE, NULL, 0, "Let it shrink, and what is written with it", 0},
    PROMPT_OPTIONS("Token ids of its pages from the first on, as 1,2,3 or @FILE: by them they are found"),
    {0}};

static json_t *copies_json(const struct kvp_page_copy *copies, uint32_t n)
{
    json_t *list = json_array();

    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(list,
                              json_pack("{s:I, s:I, s:I}", "source", (json_int_t)copies[i].source, "destination",
                                        (json_int_t)copies[i].destination, "tokens", (json_int_t)copies[i].tokens));
    return list;
}

static int run_advance(struct cli *cli)
{
    struct kvp_page_copy copy = {0};
    uint32_t n_copies = 0, missing = 0, reserved;
    struct kvp_point after = {0};
    const struct kvp_blocks *blocks;
    struct cli_prefix prompt;
    struct kvp_pool *pool;
    enum kvp_status status;
    char text[CLI_SEQ_BYTES];
    struct kvp_seq seq;
    uint64_t tokens;
    int result;

    if (!cli_parse_seq(cli, cli->arguments[1], &seq) ||
        !cli_parse_number(cli, "TOKENS", cli->arguments[2], 0, KVP_SEQUENCE_TOKENS_MAX, &tokens))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    if (!parse_prompt(cli, &prompt, &blocks))
        return 2;
    reserved = (uint32_t)tokens;
    status = point_passed(pool, &after);
    if (status == KVP_OK)
        status =
            kvp_advance_blocks(pool, 1, &seq, &reserved, blocks, &after,
                               cli_value(cli, CLI_TRUNCATE) != NULL ? KVP_TRUNCATE : 0, &copy, &n_copies, &missing);
    cli_prefix_free(&prompt);
    if (status != KVP_OK)
        return cli_failed("advancing", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s, s:I, s:o}", "seq", cli_seq_text(seq, text), "reserved",
                                        (json_int_t)reserved, "copies", copies_json(&copy, n_copies)));
    printf("%s has room for %u tokens\n", cli_seq_text(seq, text), reserved);
    if (n_copies > 0)
        printf("owed: the first %u tokens of page %d to page %d\n", copy.tokens, copy.source, copy.destination);
    return 0;
}

static const struct argp_option append_options[] = {
    {"tokens", CLI_TOKENS, "N", 0, "How many tokens to append (1)", 0},
    {"at", CLI_AT, "LENGTH", 0, "Only if that is the length now (whatever it is)", 0},
    {"file", CLI_FILE, "FILE", 0, "Their bytes, the planes one behind the other, packed; `-' is standard input (zeros)",
     0},
    {0}};

/* Exactly `bytes` of the file, or zeros without one. NULL: said on stderr. */
static unsigned char *read_bytes(const struct cli *cli, size_t bytes)
{
    const char *name = cli_value(cli, CLI_FILE);
    unsigned char *memory = calloc(1, bytes + 1);
    size_t got;
    FILE *file;
    int error;

    if (memory == NULL)
        cli_failed("reading the bytes", KVP_ENOMEM);
    if (memory == NULL || name == NULL)
        return memory;
    file = strcmp(name, "-") == 0 ? stdin : fopen(name, "rb");
    if (file == NULL) {
        fprintf(stderr, "kvpool: reading %s: %s\n", name, strerror(errno));
        free(memory);
        return NULL;
    }
    got = fread(memory, 1, bytes + 1, file);
    error = ferror(file) ? errno : 0;
    if (file != stdin)
        fclose(file);
    if (error != 0) {
        fprintf(stderr, "kvpool: reading %s: %s\n", name, error == EISDIR ? "it is a folder" : strerror(error));
        free(memory);
        return NULL;
    }
    if (got != bytes) {
        fprintf(stderr, "kvpool: %s has %s than the %zu bytes of these tokens\n", name, got < bytes ? "less" : "more",
                bytes);
        free(memory);
        return NULL;
    }
    return memory;
}

static int append(struct cli *cli, struct kvp_pool *pool, struct kvp_seq seq, uint32_t at, uint32_t tokens)
{
    const struct kvp_layout_spec *layout = &kvp_pool_info(pool)->spec.layout;
    struct kvp_append_request request = {.n = 1, .seqs = &seq, .at = &at, .tokens = &tokens};
    size_t token_bytes = 0;
    struct kvp_point done;
    uint32_t missing;
    char text[CLI_SEQ_BYTES];
    enum kvp_status status;
    unsigned char *bytes;

    for (uint32_t i = 0; i < layout->n_planes; i++)
        token_bytes +=
            (size_t)layout->planes[i].heads * layout->planes[i].dim * kvp_dtype_bytes(layout->planes[i].dtype);
    if (tokens * token_bytes > KVP_MESSAGE_BYTES_MAX - 4096)
        return cli_usage(cli, "%u tokens of %zu bytes are more than a message holds", tokens, token_bytes);
    bytes = read_bytes(cli, tokens * token_bytes);
    if (bytes == NULL)
        return 1;
    request.bytes = bytes;
    request.bytes_n = tokens * token_bytes;
    status = kvp_append_on_request(pool, &request, &done, &missing);
    free(bytes);
    if (status == KVP_OK)
        status = kvp_timeline_wait(pool, done, APPEND_WAIT_MS);
    if (status != KVP_OK)
        return cli_failed("appending", status);
    if (cli_json(cli))
        return cli_print_json(
            json_pack("{s:s, s:I}", "seq", cli_seq_text(seq, text), "written", (json_int_t)at + tokens));
    printf("%s has %u tokens\n", cli_seq_text(seq, text), at + tokens);
    return 0;
}

static int run_append(struct cli *cli)
{
    struct kvp_pool *pool;
    enum kvp_status status;
    struct kvp_seq seq;
    uint64_t tokens, at;
    uint32_t length;
    int result;

    if (!cli_parse_seq(cli, cli->arguments[1], &seq) ||
        !cli_number(cli, CLI_TOKENS, 1, 1, KVP_CALL_TOKENS_MAX, &tokens) ||
        !cli_number(cli, CLI_AT, 0, 0, KVP_SEQUENCE_TOKENS_MAX, &at))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    length = (uint32_t)at;
    if (cli_value(cli, CLI_AT) == NULL) {
        status = kvp_get_seq_lens(pool, 1, &seq, &length);
        if (status != KVP_OK)
            return cli_failed("asking for the length", status);
    }
    return append(cli, pool, seq, length, (uint32_t)tokens);
}

static const struct argp_option fork_options[] = {
    {"tokens", CLI_TOKENS, "N", 0, "How many of the parent's tokens (all that are written)", 0}, {0}};

static int run_fork(struct cli *cli)
{
    uint32_t n_copies = 0, missing = 0, tokens32;
    struct kvp_page_copy copy = {0};
    struct kvp_seq parent, child;
    struct kvp_pool *pool;
    enum kvp_status status;
    uint64_t key, tokens;
    char text[CLI_SEQ_BYTES];
    int result;

    if (!cli_parse_seq(cli, cli->arguments[1], &parent) ||
        !cli_parse_number(cli, "a key", cli->arguments[2], 0, UINT64_MAX, &key) ||
        !cli_number(cli, CLI_TOKENS, 0, 0, KVP_SEQUENCE_TOKENS_MAX, &tokens))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    tokens32 = (uint32_t)tokens;
    status = kvp_fork(pool, 1, &parent, &key, cli_value(cli, CLI_TOKENS) != NULL ? &tokens32 : NULL, &child, &copy,
                      &n_copies, &missing);
    if (status != KVP_OK)
        return cli_failed("forking", status);
    if (cli_json(cli))
        return cli_print_json(
            json_pack("{s:s, s:o}", "seq", cli_seq_text(child, text), "copies", copies_json(&copy, n_copies)));
    puts(cli_seq_text(child, text));
    if (n_copies > 0)
        fprintf(stderr, "owed: the first %u tokens of page %d to page %d\n", copy.tokens, copy.source,
                copy.destination);
    return 0;
}

static int run_close(struct cli *cli)
{
    struct kvp_point after[KVP_BATCH_MAX] = {0};
    struct kvp_seq seqs[KVP_BATCH_MAX];
    struct kvp_pool *pool;
    enum kvp_status status;
    uint32_t n;
    int result;

    if (!parse_seqs(cli, seqs, &n))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    status = point_passed(pool, &after[0]);
    for (uint32_t i = 1; i < n; i++)
        after[i] = after[0];
    if (status == KVP_OK)
        status = kvp_seq_close(pool, n, seqs, after);
    if (status != KVP_OK)
        return cli_failed("closing sequences", status);
    return cli_json(cli) ? cli_print_json(json_pack("{s:I}", "closed", (json_int_t)n)) : 0;
}

/* ---- list, show -------------------------------------------------------------------------------------------------- */

static const struct argp_option list_options[] = {
    {"all", CLI_ALL, NULL, 0, "Those of every session (without --session that is so anyway)", 0}, {0}};

static void print_info(const struct kvp_seq_info *info)
{
    json_t *json = info_json(info);

    printf("%-14s key %-20s %8u written of %8u reserved  %s  session %s\n",
           json_string_value(json_object_get(json, "seq")), json_string_value(json_object_get(json, "key")),
           info->written, info->reserved, json_string_value(json_object_get(json, "state")),
           json_string_value(json_object_get(json, "session_id")));
    json_decref(json);
}

static int run_list(struct cli *cli)
{
    bool all = cli_value(cli, CLI_ALL) != NULL || cli_value(cli, CLI_SESSION) == NULL;
    struct kvp_seq_info infos[LIST_ENTRIES];
    uint32_t from = 0, n;
    struct kvp_pool *pool;
    enum kvp_status status;
    json_t *list;
    int result = attach(cli, &pool);

    if (result != 0)
        return result;
    list = json_array();
    do {
        status = kvp_seq_list(pool, all, LIST_ENTRIES, &from, infos, &n);
        if (status != KVP_OK) {
            json_decref(list);
            return cli_failed("listing sequences", status);
        }
        for (uint32_t i = 0; i < n; i++) {
            if (cli_json(cli))
                json_array_append_new(list, info_json(&infos[i]));
            else
                print_info(&infos[i]);
        }
    } while (from != 0);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:o}", "sequences", list));
    json_decref(list);
    return 0;
}

/* The row as it is in the table; all of the pages, or none. */
static enum kvp_status read_row(struct kvp_pool *pool, struct kvp_seq seq, int32_t **ret_pages, uint32_t *ret_n)
{
    uint32_t room = kvp_pool_info(pool)->row_pages;
    int32_t *pages = calloc(room + 1, sizeof(*pages));
    enum kvp_status status;

    if (pages == NULL)
        return KVP_ENOMEM;
    status = kvp_row(pool, seq, room, pages, ret_n);
    if (status != KVP_OK) {
        free(pages);
        return status;
    }
    *ret_pages = pages;
    return KVP_OK;
}

static int show(const struct cli *cli, struct kvp_pool *pool, const struct kvp_seq_info *info)
{
    json_t *json, *list = json_array();
    enum kvp_status status;
    int32_t *pages;
    uint32_t n;

    status = read_row(pool, info->seq, &pages, &n);
    if (status != KVP_OK) {
        json_decref(list);
        return cli_failed("reading the row", status);
    }
    if (!cli_json(cli)) {
        print_info(info);
        printf("pages:");
        for (uint32_t i = 0; i < n; i++)
            printf(" %d", pages[i]);
        putchar('\n');
    }
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(list, json_integer(pages[i]));
    free(pages);
    if (!cli_json(cli)) {
        json_decref(list);
        return 0;
    }
    json = info_json(info);
    json_object_set_new(json, "pages", list);
    return cli_print_json(json);
}

static int run_show(struct cli *cli)
{
    struct kvp_seq_info info;
    struct kvp_pool *pool;
    enum kvp_status status;
    struct kvp_seq seq;
    uint32_t from, n;
    int result;

    if (!cli_parse_seq(cli, cli->arguments[1], &seq))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    from = seq.slot;
    status = kvp_seq_list(pool, true, 1, &from, &info, &n);
    if (status != KVP_OK)
        return cli_failed("showing the sequence", status);
    if (n == 0 || info.seq.slot != seq.slot || info.seq.generation != seq.generation) {
        fprintf(stderr, "kvpool: showing the sequence: %s is not open in pool %s (%s)\n", cli->arguments[1],
                cli->arguments[0], kvp_status_name(KVP_ESTALE));
        return 1;
    }
    return show(cli, pool, &info);
}

/* ---- seqlens, page-table ----------------------------------------------------------------------------------------- */

static int run_seqlens(struct cli *cli)
{
    struct kvp_seq seqs[KVP_BATCH_MAX];
    uint32_t tokens[KVP_BATCH_MAX], n;
    struct kvp_pool *pool;
    enum kvp_status status;
    json_t *list;
    int result;

    if (!parse_seqs(cli, seqs, &n))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    status = kvp_get_seq_lens(pool, n, seqs, tokens);
    if (status != KVP_OK)
        return cli_failed("asking for lengths", status);
    list = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(list, json_integer(tokens[i]));
        if (!cli_json(cli))
            printf("%u\n", tokens[i]);
    }
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:o}", "lengths", list));
    json_decref(list);
    return 0;
}

static json_t *int_array(const int32_t *values, size_t n)
{
    json_t *list = json_array();

    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, json_integer(values[i]));
    return list;
}

static int run_page_table(struct cli *cli)
{
    int32_t indptr[KVP_BATCH_MAX + 1], last[KVP_BATCH_MAX], *indices;
    struct kvp_seq seqs[KVP_BATCH_MAX];
    struct kvp_pool *pool;
    enum kvp_status status;
    uint32_t n;
    int result;

    if (!parse_seqs(cli, seqs, &n))
        return 2;
    result = attach(cli, &pool);
    if (result != 0)
        return result;
    indices = calloc(KVP_CALL_PAGES_MAX, sizeof(*indices));
    if (indices == NULL)
        return cli_failed("asking for the page table", KVP_ENOMEM);
    status = kvp_get_page_table(pool, n, seqs, NULL, KVP_CALL_PAGES_MAX, indptr, indices, last, NULL);
    if (status != KVP_OK) {
        result = cli_failed("asking for the page table", status);
    } else if (cli_json(cli)) {
        result =
            cli_print_json(json_pack("{s:o, s:o, s:o}", "kv_indptr", int_array(indptr, n + 1), "kv_indices",
                                     int_array(indices, (size_t)indptr[n]), "kv_last_page_len", int_array(last, n)));
    } else {
        for (uint32_t i = 0; i < n; i++) {
            if (indptr[i] == indptr[i + 1])
                printf("%s: no pages", cli->arguments[i + 1]);
            else
                printf("%s: %d tokens in the last of", cli->arguments[i + 1], last[i]);
            for (int32_t k = indptr[i]; k < indptr[i + 1]; k++)
                printf(" %d", indices[k]);
            putchar('\n');
        }
    }
    free(indices);
    return result;
}

#define MANY       (KVP_BATCH_MAX + 1)
#define ENTRY_KEYS "seq, key, reserved, written, state, session_id"

const struct cli_command cli_sequence_commands[] = {
    {.words = "seq open",
     .arguments = "POOL KEY...",
     .help = "Open sequences by key and print their handles; a key that is open prints its own.",
     .json = "seqs[], cached_tokens.",
     .options = open_options,
     .min_arguments = 2,
     .max_arguments = MANY,
     .session = CLI_SESSION_NEEDED,
     .run = run_open},
    {.words = "seq advance",
     .arguments = "POOL SEQ TOKENS",
     .help = "Set how many tokens a sequence has room for.",
     .json = "seq, reserved, copies[source, destination, tokens].",
     .options = advance_options,
     .min_arguments = 3,
     .max_arguments = 3,
     .session = CLI_SESSION_NEEDED,
     .run = run_advance},
    {.words = "seq append",
     .arguments = "POOL SEQ",
     .help = "Append tokens: the executor writes their bytes.",
     .json = "seq, written.",
     .options = append_options,
     .min_arguments = 2,
     .max_arguments = 2,
     .session = CLI_SESSION_NEEDED,
     .run = run_append},
    {.words = "seq fork",
     .arguments = "POOL SEQ KEY",
     .help = "Make a child that shares a sequence's pages.",
     .json = "seq, copies[source, destination, tokens].",
     .options = fork_options,
     .min_arguments = 3,
     .max_arguments = 3,
     .session = CLI_SESSION_NEEDED,
     .run = run_fork},
    {.words = "seq close",
     .arguments = "POOL SEQ...",
     .help = "Give sequences up; what is closed already is fine.",
     .json = "closed.",
     .min_arguments = 2,
     .max_arguments = MANY,
     .session = CLI_SESSION_NEEDED,
     .run = run_close},
    {.words = "seq list",
     .arguments = "POOL",
     .help = "List sequences.",
     .json = "sequences[" ENTRY_KEYS "].",
     .options = list_options,
     .min_arguments = 1,
     .max_arguments = 1,
     .session = CLI_SESSION_USED,
     .run = run_list},
    {.words = "seq show",
     .arguments = "POOL SEQ",
     .help = "Show a sequence and its pages.",
     .json = ENTRY_KEYS ", pages[].",
     .min_arguments = 2,
     .max_arguments = 2,
     .session = CLI_SESSION_USED,
     .run = run_show},
    {.words = "seqlens",
     .arguments = "POOL SEQ...",
     .help = "Print how many tokens of each sequence are written.",
     .json = "lengths[].",
     .min_arguments = 2,
     .max_arguments = MANY,
     .session = CLI_SESSION_USED,
     .run = run_seqlens},
    {.words = "page-table",
     .arguments = "POOL SEQ...",
     .help = "Print the page table of sequences, as CSR.",
     .json = "kv_indptr[], kv_indices[], kv_last_page_len[].",
     .min_arguments = 2,
     .max_arguments = MANY,
     .session = CLI_SESSION_USED,
     .run = run_page_table},
    {0}};
