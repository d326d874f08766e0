/**
 * kvpool [-e ENDPOINT] [--json] COMMAND: finds the command in the tables, parses its options, connects, runs it.
 *
 *   argv ── program's options ──► words of the command ──► argp: the command's options, and the program's ──► run
 *
 * Options of the program may stand before or behind the command. Nothing of a command is here but its place in
 * `groups`.
 */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct cli_command *const groups[] = {cli_status_commands,   cli_pool_commands,  cli_session_commands,
                                                   cli_sequence_commands, cli_cache_commands, cli_demo_commands,
                                                   cli_replay_commands};
#define GROUPS (sizeof(groups) / sizeof(groups[0]))

static const struct argp_option common_options[] = {
    {"endpoint", 'e', "PATH", 0, "Session socket of the daemon; else $KVPOOL_ENDPOINT, else " KVP_ENDPOINT_DEFAULT, 0},
    {"json", CLI_JSON, NULL, 0, "Print one JSON document", 0},
    {"session", CLI_SESSION, "TOKEN", 0, "Session by lease that sequences belong to; else $KVPOOL_SESSION", 0},
    {"wait", CLI_WAIT, "SECONDS", 0, "Wait for the daemon for so long; else it must be there", 0},
    {0}};

static error_t parse_common(int key, char *argument, struct argp_state *state)
{
    struct cli *cli = state->input;

    switch (key) {
    case 'e':
        cli->endpoint = argument;
        return 0;
    case CLI_JSON:
    case CLI_SESSION:
    case CLI_WAIT:
        cli->values[key - CLI_KEY_FIRST] = argument != NULL ? argument : "";
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp common_argp = {.options = common_options, .parser = parse_common};
static const struct argp_child common_child[] = {{&common_argp, 0, "Of every command:", 90}, {0}};

/* ---- which command ----------------------------------------------------------------------------------------------- */

/* The first word that is no option ends the program's own part; it is left in cli->n_arguments. */
static error_t parse_program(int key, char *argument, struct argp_state *state)
{
    struct cli *cli = state->input;

    (void)argument;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = cli;
        return 0;
    case ARGP_KEY_ARG:
        cli->n_arguments = state->next - 1;
        state->next = state->argc;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "a command is wanted");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

#define LIST_INDENT 31 /* where the help of a command starts … */
#define LIST_WIDTH  78 /* … and the lines end: argp would break longer ones */

/* Words behind what stands in the line, each further line indented. */
static void put_words(FILE *to, const char *text, size_t column)
{
    while (*text != 0) {
        size_t word = strcspn(text, " ");

        if (column + 1 + word > LIST_WIDTH) {
            fprintf(to, "\n%*s", LIST_INDENT, "");
            column = LIST_INDENT;
        }
        fprintf(to, " %.*s", (int)word, text);
        column += 1 + word;
        text += word + strspn(text + word, " ");
    }
    fputc('\n', to);
}

/* Those whose first word is `group`; NULL: all. @return how many */
static unsigned put_commands(FILE *to, const char *group)
{
    unsigned n = 0;

    for (size_t g = 0; g < GROUPS; g++) {
        for (const struct cli_command *c = groups[g]; c->words != NULL; c++) {
            char usage[128];

            if (c->hidden)
                continue;
            if (group != NULL && (strncmp(c->words, group, strlen(group)) != 0 || c->words[strlen(group)] != ' '))
                continue;
            if (n++ == 0)
                fputs("Commands:\n", to);
            snprintf(usage, sizeof(usage), "%s %s", c->words, c->arguments);
            if (strlen(usage) > LIST_INDENT - 2)
                fprintf(to, "  %s\n%*s", usage, LIST_INDENT, "");
            else
                fprintf(to, "  %-*s", LIST_INDENT - 2, usage);
            put_words(to, c->help, LIST_INDENT);
        }
    }
    return n;
}

static char *list_commands(int key, const char *text, void *input)
{
    char *list = NULL;
    size_t bytes;
    FILE *to;

    (void)input;
    if (key != ARGP_KEY_HELP_POST_DOC)
        return (char *)text;
    to = open_memstream(&list, &bytes);
    if (to == NULL)
        return NULL;
    put_commands(to, NULL);
    return fclose(to) == 0 ? list : NULL;
}

/* The command whose words stand at argv[at]. @param ret_words  how many they are */
static const struct cli_command *find_command(int argc, char **argv, int at, int *ret_words)
{
    for (size_t g = 0; g < GROUPS; g++) {
        for (const struct cli_command *c = groups[g]; c->words != NULL; c++) {
            const char *space = strchr(c->words, ' ');
            size_t first = space != NULL ? (size_t)(space - c->words) : strlen(c->words);

            if (strlen(argv[at]) != first || strncmp(argv[at], c->words, first) != 0)
                continue;
            if (space != NULL && (at + 1 >= argc || strcmp(argv[at + 1], space + 1) != 0))
                continue;
            *ret_words = space != NULL ? 2 : 1;
            return c;
        }
    }
    return NULL;
}

/* ---- its options ------------------------------------------------------------------------------------------------- */

static error_t parse_command(int key, char *argument, struct argp_state *state)
{
    struct cli *cli = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = cli;
        return 0;
    case ARGP_KEY_ARGS:
        cli->arguments = state->argv + state->next;
        cli->n_arguments = state->argc - state->next;
        state->next = state->argc;
        return 0;
    case ARGP_KEY_END:
        if (cli->n_arguments < cli->command->min_arguments)
            argp_error(state, "%s is wanted", cli->command->arguments);
        if (cli->n_arguments > cli->command->max_arguments)
            argp_error(state, "too many arguments: `%s'", cli->arguments[cli->command->max_arguments]);
        return 0;
    default:
        if (key < CLI_KEY_FIRST || key >= CLI_KEY_END)
            return ARGP_ERR_UNKNOWN;
        cli->values[key - CLI_KEY_FIRST] = argument != NULL ? argument : "";
        return 0;
    }
}

static void parse_options(struct cli *cli, int argc, char **argv)
{
    static const struct argp_option none[] = {{0}};
    static char name[64];
    const struct cli_command *command = cli->command;
    char doc[2048];
    const struct argp argp = {.options = command->options != NULL ? command->options : none,
                              .parser = parse_command,
                              .args_doc = command->arguments,
                              .doc = doc,
                              .children = common_child};

    snprintf(name, sizeof(name), "kvpool %s", command->words);
    snprintf(doc, sizeof(doc), "%s\v%s%s", command->help, command->json != NULL ? "With --json: " : "",
             command->json != NULL ? command->json : "");
    argv[0] = name;
    cli->n_arguments = 0;
    argp_parse(&argp, argc, argv, 0, NULL, cli);
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

void cli_say_how_to_start(void)
{
    fputs("kvpool: is the daemon running? `systemctl start kvpoold' starts the service;\n"
          "        `kvpoold --runtime-dir DIR' one of your own, which `kvpool -e DIR/kvpool.sock' talks to\n",
          stderr);
}

/* Of an empty token nothing else can be meant than that there is none. @return false: said on stderr */
static bool choose_session(struct cli *cli)
{
    const char **token = &cli->values[CLI_SESSION - CLI_KEY_FIRST];

    if (*token == NULL)
        *token = getenv("KVPOOL_SESSION");
    if (*token != NULL && (*token)[0] == 0)
        *token = NULL;
    if (cli->command->session != CLI_SESSION_NEEDED || *token != NULL)
        return true;
    cli_usage(cli, "a session is wanted, which keeps sequences from one command to the next:\n"
                   "        export KVPOOL_SESSION=$(kvpool session open)");
    return false;
}

static int connect_and_run(struct cli *cli)
{
    struct kvp_connect_options options = {0};
    enum kvp_status status;
    uint64_t wait_s;
    int result;

    if (cli->command->alone != 0 && cli_value(cli, cli->command->alone) != NULL)
        return cli->command->run(cli);
    if (!cli_number(cli, CLI_WAIT, 0, 0, 86400, &wait_s) || !choose_session(cli))
        return 2;
    options.connect_ms = (uint32_t)(wait_s * 1000);
    options.call_ms = cli->command->call_ms;
    options.session = cli->command->session != CLI_SESSION_UNUSED ? cli_value(cli, CLI_SESSION) : NULL;
    status = kvp_connect(cli->endpoint, &options, &cli->client);
    if (status != KVP_OK) {
        cli_failed("connecting", status);
        if (status == KVP_EDISCONNECTED)
            cli_say_how_to_start();
        if (status == KVP_EPERM)
            fputs("kvpool: who is in the group of that socket may connect; the service's: `usermod -aG kvpool USER'\n",
                  stderr);
        if (status == KVP_ESESSION)
            fputs("kvpool: the token of --session or $KVPOOL_SESSION is good no more; another:\n"
                  "        export KVPOOL_SESSION=$(kvpool session open)\n",
                  stderr);
        return 1;
    }
    result = cli->command->run(cli);
    kvp_disconnect(cli->client);
    return result;
}

/* Started without one of them, the session's socket would come to lie in its place, and the output go to the daemon:
 * what stands there instead can not be written. */
static void open_standard_files(void)
{
    int fd;

    do {
        fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    } while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

/* At the end, of --help too: what was printed must have come out. */
static void check_output(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return;
    fprintf(stderr, "kvpool: standard output can not be written: %s\n", strerror(errno));
    _exit(1);
}

/* Words that are no command: those of its group are listed, if there is one. @return the exit status */
static int no_command(int argc, char **argv, int at)
{
    const char *group = argv[at], *next = at + 1 < argc ? argv[at + 1] : NULL;

    if (next != NULL && (strcmp(next, "--help") == 0 || strcmp(next, "-?") == 0) && put_commands(stdout, group) > 0)
        return 0;
    fprintf(stderr, "kvpool: `%s%s%s' is no command\n", group, next != NULL ? " " : "", next != NULL ? next : "");
    put_commands(stderr, group);
    fputs("Try `kvpool --help'.\n", stderr);
    return 2;
}

int main(int argc, char **argv)
{
    const struct argp argp = {.parser = parse_program,
                              .args_doc = "COMMAND [ARGUMENT...]",
                              .doc = "Work with kvpool, the KV cache that outlives its processes.\v",
                              .children = common_child,
                              .help_filter = list_commands};
    struct cli cli = {0};
    int at, words = 0;

    open_standard_files();
    atexit(check_output);
    argp_program_version = "kvpool " KVPOOL_VERSION;
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, ARGP_IN_ORDER, NULL, &cli);
    at = cli.n_arguments;
    cli.command = find_command(argc, argv, at, &words);
    if (cli.command == NULL)
        return no_command(argc, argv, at);
    parse_options(&cli, argc - at - words + 1, argv + at + words - 1);
    return connect_and_run(&cli);
}
