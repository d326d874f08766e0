/**
 * kvpoold: the daemon that owns the page pool. Options, configuration, and the shell's life.
 *
 * Exit codes: 0 ended by a signal, or what was asked for was printed; 1 the configuration or the start failed; 2 the
 * command line is not understood; 3 what an earlier daemon left can not be adopted (it stays where it is kept).
 */
#include "config.h"
#include "log.h"
#include "shell.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A service manager starts it again at once, and what fails now fails then: no faster than this. */
#define FAILED_MS 1000

enum command { COMMAND_SERVE, COMMAND_CHECK, COMMAND_PRINT, COMMAND_VERSION, COMMAND_HELP };

struct arguments {
    enum command command;
    const char *config_path; /* NULL: the default one, if it is there */
    char **settings;         /* [n_settings] section.key=value, in order */
    unsigned n_settings;
    bool discard_state;
};

static const char usage[] =
    "usage: kvpoold [OPTION]…\n"
    "Owns the paged KV cache of this machine, and serves it.\n"
    "\n"
    "  --config FILE               read FILE (" KVP_CONFIG_PATH ", where it is)\n"
    "  --set SECTION.KEY=VALUE     over what the file says; --print-config shows every key\n";
static const char usage_end[] =
    "  --discard-state             give up what an earlier daemon left with the service manager: every pool\n"
    "  --check-config              print the values in force, and exit: 0, or 1 if something is wrong\n"
    "  --print-config              print a documented file with every option at its default\n"
    "  --version                   print the version\n"
    "  --help                      print this\n";

static void print_help(void)
{
    fputs(usage, stdout);
    kvp_config_print_flags(stdout);
    fputs(usage_end, stdout);
}

static bool add_setting(struct arguments *arguments, const char *name, const char *value)
{
    char *setting = malloc(strlen(name) + strlen(value) + 2);

    if (setting == NULL)
        return false;
    sprintf(setting, "%s%s%s", name, name[0] != 0 ? "=" : "", value);
    arguments->settings[arguments->n_settings++] = setting;
    return true;
}

/* --flag VALUE and --flag=VALUE. @return false: not understood, said on stderr */
static bool parse(int argc, char **argv, struct arguments *ret_arguments)
{
    static const struct {
        const char *flag;
        enum command command;
    } commands[] = {{"--check-config", COMMAND_CHECK}, {"--print-config", COMMAND_PRINT},
                    {"--version", COMMAND_VERSION},    {"--help", COMMAND_HELP},
                    {"-h", COMMAND_HELP}};
    struct arguments *arguments = ret_arguments;

    for (int i = 1; i < argc; i++) {
        char flag[64];
        const char *equals = strchr(argv[i], '='), *option, *value;
        size_t k = 0;

        while (k < sizeof(commands) / sizeof(commands[0]) && strcmp(argv[i], commands[k].flag) != 0)
            k++;
        if (k < sizeof(commands) / sizeof(commands[0])) {
            arguments->command = commands[k].command;
            continue;
        }
        if (strcmp(argv[i], "--discard-state") == 0) {
            arguments->discard_state = true;
            continue;
        }
        snprintf(flag, sizeof(flag), "%.*s", equals != NULL ? (int)(equals - argv[i]) : (int)strlen(argv[i]), argv[i]);
        option = kvp_config_flag(flag);
        if (option == NULL && strcmp(flag, "--config") != 0 && strcmp(flag, "--set") != 0) {
            fprintf(stderr, "kvpoold: there is no option %s; see --help\n", argv[i]);
            return false;
        }
        value = equals != NULL ? equals + 1 : i + 1 < argc ? argv[++i] : NULL;
        if (value == NULL) {
            fprintf(stderr, "kvpoold: %s needs a value\n", flag);
            return false;
        }
        if (strcmp(flag, "--config") == 0)
            arguments->config_path = value;
        else if (!add_setting(arguments, option != NULL ? option : "", value))
            return false;
    }
    return true;
}

static bool configure(const struct arguments *arguments, struct kvp_config *ret_config)
{
    const char *path = arguments->config_path != NULL ? arguments->config_path : KVP_CONFIG_PATH;
    char text[KVP_CONFIG_ERROR_MAX];
    enum kvp_status status;

    kvp_config_defaults(ret_config);
    status = kvp_config_file(ret_config, path, text);
    if (status == KVP_ENOENT && arguments->config_path == NULL)
        status = KVP_OK;
    for (unsigned i = 0; status == KVP_OK && i < arguments->n_settings; i++)
        status = kvp_config_set(ret_config, arguments->settings[i], text);
    if (status == KVP_OK)
        status = kvp_config_check(ret_config, text);
    if (status != KVP_OK)
        kvp_log(LOG_ERR, "%s", text);
    return status == KVP_OK;
}

static int serve(const struct kvp_config *config, bool discard_state)
{
    struct kvp_shell *shell;
    enum kvp_status status;

    kvp_log_start((int)config->log.level);
    setenv("UV_THREADPOOL_SIZE", "1", 0); /* memory objects are made one by one */
    status = kvp_shell_open(config, discard_state, &shell);
    if (status == KVP_ECORRUPT || status == KVP_EMISMATCH)
        return 3;
    if (status != KVP_OK)
        return 1;
    kvp_shell_run(shell);
    kvp_shell_close(shell);
    kvp_log(LOG_INFO, "ended");
    return 0;
}

static int run(const struct arguments *arguments)
{
    static struct kvp_config config;

    switch (arguments->command) {
    case COMMAND_HELP:
        print_help();
        return 0;
    case COMMAND_VERSION:
        puts("kvpoold " KVPOOL_VERSION);
        return 0;
    case COMMAND_PRINT:
        kvp_config_defaults(&config);
        kvp_config_print(&config, true, stdout);
        return 0;
    case COMMAND_CHECK:
        if (!configure(arguments, &config))
            return 1;
        kvp_config_print(&config, false, stdout);
        return 0;
    case COMMAND_SERVE:
        break;
    }
    kvp_log_start(LOG_INFO);
    return configure(arguments, &config) ? serve(&config, arguments->discard_state) : 1;
}

/* Before main, and before the constructors of libraries: gRPC's opens an eventfd. */
__attribute__((section(".preinit_array"), used)) static void (*const before_libraries)(void) =
    kvp_log_open_standard_files;

int main(int argc, char **argv)
{
    struct arguments arguments = {.settings = calloc((size_t)argc, sizeof(char *))};
    int code = 2;

    if (arguments.settings != NULL && parse(argc, argv, &arguments))
        code = run(&arguments);
    for (unsigned i = 0; i < arguments.n_settings; i++)
        free(arguments.settings[i]);
    free(arguments.settings);
    if (fflush(stdout) != 0 || ferror(stdout)) { /* a file cut short on a full disk would be taken for the whole */
        fprintf(stderr, "kvpoold: standard output can not be written: %s\n", strerror(errno));
        code = 1;
    }
    if (code != 0 && getenv("NOTIFY_SOCKET") != NULL)
        poll(NULL, 0, FAILED_MS);
    return code;
}
