/**
 * What the commands of kvpool share: the table they are entries of, the options, the output.
 *
 * A command is one struct cli_command. Its options, usage, help and the keys of its --json document are fields of it,
 * so that parsing and help come from the same place. main.c finds the command by its words, lets argp parse its
 * options, connects if it needs the daemon, and runs it; the exit status is 0, 1 (it failed, and said so on stderr) or
 * 2 (usage).
 */
#ifndef KVPOOL_CLI_H
#define KVPOOL_CLI_H

#include "kvpool.h"

#include <argp.h>
#include <jansson.h>
#include <stdio.h>
#include <sys/types.h>

/* Options of all commands; each command lists those that it takes. Values beyond char: they have no short form. */
enum cli_key {
    CLI_KEY_FIRST = 300,
    CLI_JSON = CLI_KEY_FIRST,
    CLI_WAIT,
    CLI_SESSION,
    CLI_PAGES,
    CLI_PAGE_TOKENS,
    CLI_LAYERS,
    CLI_KV_HEADS,
    CLI_HEAD_DIM,
    CLI_DTYPE,
    CLI_MLA,
    CLI_ORDER,
    CLI_PLACEMENT,
    CLI_JOINED,
    CLI_RESERVED_PAGES,
    CLI_MAX_SEQUENCES,
    CLI_MAX_TOKENS,
    CLI_MODEL,
    CLI_DEVICES,
    CLI_LEGACY_IPC,
    CLI_LINGER_MS,
    CLI_REGION_BYTES,
    CLI_RANK,
    CLI_LEASE_MS,
    CLI_NAME,
    CLI_RESUME,
    CLI_DURABLE,
    CLI_TRUNCATE,
    CLI_TOKENS,
    CLI_AT,
    CLI_FILE,
    CLI_ALL,
    CLI_TRACE,
    CLI_SECONDS,
    CLI_PROMPT,
    CLI_KEYS,
    CLI_EXTRA,
    CLI_POLICY,
    CLI_BLOCK_HASH,
    CLI_ZERO_ON_REUSE,
    CLI_TENANT,
    CLI_PAGE_DIGESTS,
    CLI_DIGESTS,
    CLI_INJECT_FAULT,
    CLI_EMBEDDED,
    CLI_BLOCKS,
    CLI_PLOT,
    CLI_KEY_END,
};

struct cli_command;

/* One run of the program. */
struct cli {
    const struct cli_command *command;
    const char *endpoint;                            /* NULL: the library's default */
    const char *values[CLI_KEY_END - CLI_KEY_FIRST]; /* NULL: not given; "" of a flag */
    char *const *arguments;                          /* [n_arguments] behind the command's words */
    int n_arguments;
    struct kvp_client *client;
};

/* What --session and $KVPOOL_SESSION are to a command. */
enum cli_session {
    CLI_SESSION_UNUSED, /* nothing: it works though the token's session is over */
    CLI_SESSION_USED,   /* it works in that session, else in the connection's own */
    CLI_SESSION_NEEDED, /* the same, but what it makes would end with the connection's own */
};

struct cli_command {
    const char *words;     /* "pool create" */
    const char *arguments; /* for the usage line: "POOL SEQ..." */
    const char *help;      /* one sentence */
    const char *json;      /* the document that --json prints */
    const struct argp_option *options;
    int min_arguments, max_arguments;
    enum cli_session session;
    enum cli_key alone; /* with this option it needs no daemon; 0: there is none */
    bool hidden;
    uint32_t call_ms; /* an answer takes that long at most; 0: the library's default */
    int (*run)(struct cli *cli);
};

/* Each ends with an entry without words. */
extern const struct cli_command cli_status_commands[], cli_pool_commands[], cli_session_commands[],
    cli_sequence_commands[], cli_cache_commands[], cli_demo_commands[], cli_replay_commands[];

static inline const char *cli_value(const struct cli *cli, enum cli_key key)
{
    return cli->values[key - CLI_KEY_FIRST];
}

static inline bool cli_json(const struct cli *cli)
{
    return cli_value(cli, CLI_JSON) != NULL;
}

/** What to do where no daemon answers: a line on stderr. */
void cli_say_how_to_start(void);

/* ---- input.c ----------------------------------------------------------------------------------------------------- */

/** As getdelim(3); what has more than CLI_READ_MAX bytes is not read: EFBIG. */
#define CLI_READ_MAX (256u << 20)
ssize_t cli_getdelim(char **text, size_t *room, int delimiter, FILE *file);

/* ---- output.c ---------------------------------------------------------------------------------------------------- */

/** "kvpool: WHAT: the library's text (KVP_ENAME)" on stderr. @return 1, to be returned by the command */
int cli_failed(const char *what, enum kvp_status status);
/** "kvpool: TEXT" on stderr, with a word on --help. @return 2 */
int cli_usage(const struct cli *cli, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** Print a document and drop it. @return 0; 1 where stdout can not be written or the document could not be made */
int cli_print_json(json_t *document);

/** The number of an option; `fallback` where it is not given. @return false: said on stderr */
bool cli_number(const struct cli *cli, enum cli_key key, uint64_t fallback, uint64_t min, uint64_t max,
                uint64_t *ret_number);
bool cli_parse_number(const struct cli *cli, const char *what, const char *text, uint64_t min, uint64_t max,
                      uint64_t *ret_number);

/** Delete pools named PREFIX and the pid of a process that is gone, or of this one: runs that were killed leave theirs. */
void cli_delete_abandoned_pools(struct kvp_client *client, const char *prefix);

/** A handle as it is written: "SLOT.GENERATION". @return false: said on stderr */
bool cli_parse_seq(const struct cli *cli, const char *text, struct kvp_seq *ret_seq);
#define CLI_SEQ_BYTES 24
const char *cli_seq_text(struct kvp_seq seq, char text[CLI_SEQ_BYTES]);

/** "1.5 GiB" */
#define CLI_AMOUNT_BYTES 24
const char *cli_bytes_text(uint64_t bytes, char text[CLI_AMOUNT_BYTES]);

/** A text of somebody else's, as a terminal may be shown it: control characters are '?'. JSON escapes them itself. */
#define CLI_TEXT_BYTES 512
const char *cli_text(const char *theirs, char text[CLI_TEXT_BYTES]);

const char *cli_hex(const uint8_t *bytes, size_t n, char *text); /* text: 2 n + 1 */

/* ---- cache.c ----------------------------------------------------------------------------------------------------- */

/* A prefix of an argument: blocks of one sequence. */
struct cli_prefix {
    struct kvp_blocks blocks; /* its counts: `count` */
    uint32_t count;
    void *memory;
};
/** "1,2,3" or "@FILE", with --keys block keys; --extra. @return false: said on stderr */
bool cli_parse_prefix(const struct cli *cli, const char *argument, struct cli_prefix *ret_prefix);
void cli_prefix_free(struct cli_prefix *prefix);
json_t *cli_cache_json(const struct kvp_cache_info *cache);

#endif
