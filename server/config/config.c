/**
 * The table of options, and all that reads it; see config.h.
 *
 * To add an option: a field in struct kvp_config, a line in `options`. Everything else follows from the table, and a
 * test compares the sample file in deploy/systemd with what it prints.
 */
#include "config.h"
#include "kvp_limits.h"

#include <ctype.h>
#include <arpa/inet.h>
#include <errno.h>
#include <grp.h>
#include <ini.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum option_type {
    TYPE_TEXT,   /* anything of up to `max` bytes */
    TYPE_PATH,   /* empty, or absolute */
    TYPE_BOOL,   /* yes, no */
    TYPE_COUNT,  /* a number; `unit` says of what */
    TYPE_BYTES,  /* a number, with K, M or G (1024, 1024², 1024³) if wanted */
    TYPE_MODE,   /* file permissions, octal */
    TYPE_CHOICE, /* one of the words in `choices`; its value is its place there, plus `min` */
};

struct option {
    const char *section, *key;
    enum option_type type;
    size_t offset; /* in struct kvp_config */
    const char *initial;
    uint64_t min, max;
    const char *unit;    /* of a count */
    const char *choices; /* of a choice */
    const char *flag;    /* --flag on the command line */
    const char *help;    /* lines of up to 110 columns */
};

#define AT(section, key) #section, #key
#define FIELD(section, key) .offset = offsetof(struct kvp_config, section.key)

static const struct option options[] = {
    {AT(daemon, runtime_dir), TYPE_PATH, FIELD(daemon, runtime_dir), .initial = "/run/kvpool",
     .max = sizeof(((struct sockaddr_un *)0)->sun_path) - sizeof("/kvpool.sock"), .flag = "--runtime-dir",
     .help = "Where the sockets are: kvpool.sock (session socket) and grpc.sock. One daemon a folder."},
    {AT(daemon, backend), TYPE_CHOICE, FIELD(daemon, backend), .initial = "auto", .choices = "auto host cuda",
     .flag = "--backend",
     .help = "Where pages are: cuda (GPU memory), host (shared memory of this machine), or auto: cuda where a GPU is."},
    {AT(daemon, socket_mode), TYPE_MODE, FIELD(daemon, socket_mode), .initial = "0660", .max = 0777,
     .help = "Permissions of both sockets. Who may connect may map every pool. Not used for sockets that systemd made."},
    {AT(daemon, socket_group), TYPE_TEXT, FIELD(daemon, socket_group), .initial = "", .max = 64,
     .help = "Group of both sockets; empty: the daemon's own. Not used for sockets that systemd made."},
    {AT(daemon, stop_ms), TYPE_COUNT, FIELD(daemon, stop_ms), .initial = "5000", .max = 600000, .unit = "ms",
     .help = "How long SIGTERM waits for the calls in hand."},

    {AT(grpc, enabled), TYPE_BOOL, FIELD(grpc, enabled), .initial = "yes",
     .help = "Serve gRPC on grpc.sock."},
    {AT(grpc, listen), TYPE_TEXT, FIELD(grpc, listen), .initial = "", .max = 255,
     .help = "Serve gRPC on this TCP address too, e.g. 127.0.0.1:7410 or [::1]:7410; empty: no TCP. Port 0: any that is\n"
             "free; the log names it."},
    {AT(grpc, tls_cert), TYPE_PATH, FIELD(grpc, tls_cert), .initial = "", .max = KVP_CONFIG_TEXT_MAX - 1,
     .help = "TLS for TCP: certificate chain of the daemon, PEM. Without it TCP is served on loopback addresses only."},
    {AT(grpc, tls_key), TYPE_PATH, FIELD(grpc, tls_key), .initial = "", .max = KVP_CONFIG_TEXT_MAX - 1,
     .help = "Its private key, PEM."},
    {AT(grpc, tls_ca), TYPE_PATH, FIELD(grpc, tls_ca), .initial = "", .max = KVP_CONFIG_TEXT_MAX - 1,
     .help = "Certificates of who signs clients, PEM: every client must show one."},
    {AT(grpc, message_bytes), TYPE_BYTES, FIELD(grpc, message_bytes), .initial = "64M", .min = 65536,
     .max = KVP_MESSAGE_BYTES_MAX, .help = "The largest request."},
    {AT(grpc, streams), TYPE_COUNT, FIELD(grpc, streams), .initial = "64", .min = 1, .max = 4096,
     .unit = "calls", .help = "Calls open at once on one connection."},
    {AT(grpc, connections), TYPE_COUNT, FIELD(grpc, connections), .initial = "256", .min = 1, .max = 16384,
     .unit = "connections", .help = "Connections open at once."},

    {AT(limits, lease_ms), TYPE_COUNT, FIELD(limits, lease_ms), .initial = "30000", .min = KVP_LEASE_MS_MIN,
     .max = KVP_LEASE_MS_MAX, .unit = "ms", .help = "The lease of a session that asks for none in particular."},
    {AT(limits, connections), TYPE_COUNT, FIELD(limits, connections), .initial = "1024", .min = 1,
     .max = KVP_SESSIONS_MAX, .unit = "connections", .help = "Processes connected at once to the session socket."},
    {AT(limits, unpack_bytes), TYPE_BYTES, FIELD(limits, unpack_bytes), .initial = "512M", .min = 16u << 20,
     .max = 64ull << 30, .help = "What all requests in hand on the session socket may take, unpacked."},

    {AT(ledger, bytes), TYPE_BYTES, FIELD(ledger, bytes), .initial = "16G", .min = 64u << 20,
     .max = KVP_LEDGER_BYTES_MAX,
     .help = "Address space of the ledger. It takes memory only for pools that are there: 8 bytes a page, and 4 bytes\n"
             "for each page that a sequence may have."},
    {AT(ledger, audit_s), TYPE_COUNT, FIELD(ledger, audit_s), .initial = "60", .max = 86400, .unit = "s",
     .help = "How often the ledger is audited while it is served, if it has changed. 0: only by `kvpool audit'. An audit\n"
             "copies what is in use of the ledger, and reads the copy on a thread of its own."},

    {AT(executor, path), TYPE_PATH, FIELD(executor, path), .initial = "", .max = KVP_CONFIG_TEXT_MAX - 1,
     .help = "The program kvpool-exec; empty: the one beside kvpoold."},
    {AT(executor, start_ms), TYPE_COUNT, FIELD(executor, start_ms), .initial = "20000", .min = 100, .max = 600000,
     .unit = "ms", .help = "How long an executor may take to start before it is given up."},
    {AT(executor, environment), TYPE_TEXT, FIELD(executor, environment), .initial = "", .max = KVP_CONFIG_TEXT_MAX - 1,
     .help = "Variables added to its environment, with a space between them, e.g. to run it under MPS:\n"
             "CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps"},

    {AT(log, level), TYPE_CHOICE, FIELD(log, level), .initial = "info", .min = 3,
     .choices = "error warning notice info debug", .help = "The least urgent lines that are written."},
};
#define OPTIONS (sizeof(options) / sizeof(options[0]))

static const char *const section_help[][2] = {
    {"daemon", "The daemon itself"},
    {"grpc", "The gRPC door"},
    {"limits", "Limits; those that no one needs to change stand in kvp_limits.h"},
    {"ledger", "The metadata"},
    {"executor", "kvpool-exec, the process that touches the GPU driver; started when there is work"},
    {"log", "The log, on stderr"},
};
#define SECTIONS (sizeof(section_help) / sizeof(section_help[0]))

static bool is_text(const struct option *option)
{
    return option->type == TYPE_TEXT || option->type == TYPE_PATH;
}

static char *text_of(const struct kvp_config *config, const struct option *option)
{
    return (char *)(uintptr_t)config + option->offset;
}

static uint64_t *number_of(const struct kvp_config *config, const struct option *option)
{
    return (uint64_t *)(void *)text_of(config, option);
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static enum kvp_status complain(char *reterr_text, const struct option *option, const char *value, const char *wanted)
{
    snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%s.%s = %.80s: %s", option->section, option->key,
             value[0] != 0 ? value : "(nothing)", wanted);
    return KVP_EINVAL;
}

static enum kvp_status set_text(struct kvp_config *config, const struct option *option, const char *value,
                                char *reterr_text)
{
    char wanted[96];

    if (strlen(value) > option->max) {
        snprintf(wanted, sizeof(wanted), "is %zu bytes long; the limit is %llu", strlen(value),
                 (unsigned long long)option->max);
        return complain(reterr_text, option, value, wanted);
    }
    if (option->type == TYPE_PATH && value[0] != '/' && (value[0] != 0 || option->initial[0] != 0))
        return complain(reterr_text, option, value, "must be an absolute path");
    for (const char *c = value; *c != 0; c++)
        if (iscntrl((unsigned char)*c))
            return complain(reterr_text, option, value, "holds a control character");
    strcpy(text_of(config, option), value); /* `max` is less than the field; kvp_config_defaults asserts it */
    return KVP_OK;
}

/* The place of a word in a list with spaces between, -1 if it is not there. */
static int choice_index(const char *choices, const char *word)
{
    int index = 0;

    for (const char *c = choices; *c != 0; index++) {
        size_t n = strcspn(c, " ");

        if (strlen(word) == n && strncmp(c, word, n) == 0)
            return index;
        c += n + (c[n] == ' ');
    }
    return -1;
}

static void choice_word(const char *choices, uint64_t index, char *ret_word, size_t size)
{
    while (index-- > 0)
        choices += strcspn(choices, " ") + 1;
    snprintf(ret_word, size, "%.*s", (int)strcspn(choices, " "), choices);
}

static void format_number(const struct option *option, uint64_t value, char *ret_text, size_t size)
{
    unsigned long long n = value;

    if (option->type == TYPE_BOOL)
        snprintf(ret_text, size, "%s", n != 0 ? "yes" : "no");
    else if (option->type == TYPE_CHOICE)
        choice_word(option->choices, value - option->min, ret_text, size);
    else if (option->type == TYPE_MODE)
        snprintf(ret_text, size, "0%llo", n);
    else if (option->type == TYPE_BYTES && n != 0 && n % (1u << 30) == 0)
        snprintf(ret_text, size, "%lluG", n >> 30);
    else if (option->type == TYPE_BYTES && n != 0 && n % (1u << 20) == 0)
        snprintf(ret_text, size, "%lluM", n >> 20);
    else if (option->type == TYPE_BYTES && n != 0 && n % (1u << 10) == 0)
        snprintf(ret_text, size, "%lluK", n >> 10);
    else
        snprintf(ret_text, size, "%llu", n);
}

/* Digits, then for bytes a suffix. @return false: it is not that, or it is over 2^64 */
static bool parse_number(const struct option *option, const char *value, uint64_t *ret_number)
{
    unsigned shift = 0;
    unsigned long long n;
    char *end;

    if (!isdigit((unsigned char)value[0]))
        return false;
    errno = 0;
    n = strtoull(value, &end, option->type == TYPE_MODE ? 8 : 10);
    if (errno != 0)
        return false;
    if (option->type == TYPE_BYTES && *end != 0) {
        switch (toupper((unsigned char)*end++)) {
        case 'K':
            shift = 10;
            break;
        case 'M':
            shift = 20;
            break;
        case 'G':
            shift = 30;
            break;
        default:
            return false;
        }
    }
    if (*end != 0 || n > UINT64_MAX >> shift)
        return false;
    *ret_number = n << shift;
    return true;
}

static enum kvp_status set_number(struct kvp_config *config, const struct option *option, const char *value,
                                  char *reterr_text)
{
    char wanted[160], low[32], high[32];
    uint64_t number;
    int index;

    if (option->type == TYPE_BOOL || option->type == TYPE_CHOICE) {
        const char *choices = option->type == TYPE_BOOL ? "no yes" : option->choices;

        index = choice_index(choices, value);
        if (index < 0) {
            snprintf(wanted, sizeof(wanted), "must be one of: %s", choices);
            return complain(reterr_text, option, value, wanted);
        }
        *number_of(config, option) = (uint64_t)index + option->min;
        return KVP_OK;
    }
    if (!parse_number(option, value, &number) || number < option->min || number > option->max) {
        format_number(option, option->min, low, sizeof(low));
        format_number(option, option->max, high, sizeof(high));
        snprintf(wanted, sizeof(wanted), "must be %s from %s to %s%s%s",
                 option->type == TYPE_MODE ? "an octal number" : "a number", low, high, option->unit != NULL ? " " : "",
                 option->unit != NULL ? option->unit : "");
        return complain(reterr_text, option, value, wanted);
    }
    *number_of(config, option) = number;
    return KVP_OK;
}

static enum kvp_status set_option(struct kvp_config *config, const char *section, const char *key, const char *value,
                                  char *reterr_text)
{
    for (size_t i = 0; i < OPTIONS; i++) {
        if (strcmp(options[i].section, section) != 0 || strcmp(options[i].key, key) != 0)
            continue;
        return is_text(&options[i]) ? set_text(config, &options[i], value, reterr_text)
                                    : set_number(config, &options[i], value, reterr_text);
    }
    snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%.64s.%.64s: there is no such option", section, key);
    return KVP_EINVAL;
}

void kvp_config_defaults(struct kvp_config *config)
{
    char text[KVP_CONFIG_ERROR_MAX];

    memset(config, 0, sizeof(*config));
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option *option = &options[i];

        if ((is_text(option) && option->max >= KVP_CONFIG_TEXT_MAX) ||
            set_option(config, option->section, option->key, option->initial, text) != KVP_OK)
            abort(); /* the table itself is wrong: every test sees it */
    }
}

/* ---- the file ---------------------------------------------------------------------------------------------------- */

struct reading {
    struct kvp_config *config;
    FILE *file;
    int line;         /* being read */
    int failed_line;  /* 0: none */
    char *text;       /* of the first failure */
};

static void reading_failed(struct reading *reading, const char *format, const char *what)
{
    if (reading->failed_line != 0)
        return;
    reading->failed_line = reading->line;
    snprintf(reading->text, KVP_CONFIG_ERROR_MAX, format, what);
}

/* inih asks for each line here, so that what it would let pass is seen: long, indented and NUL-holding lines, sections
 * that do not exist. */
static char *read_line(char *buffer, int size, void *arg)
{
    struct reading *reading = arg;
    char name[64];
    size_t n;

    if (reading->failed_line != 0 || fgets(buffer, size, reading->file) == NULL)
        return NULL;
    reading->line++;
    n = strlen(buffer);
    if (n == 0 || (buffer[n - 1] != '\n' && !feof(reading->file)))
        reading_failed(reading, "the line %s", n == 0 ? "holds a NUL" : "is too long");
    else if (isspace((unsigned char)buffer[0]) && buffer[strspn(buffer, " \t\r\n")] != 0)
        reading_failed(reading, "%s", "the line is indented: values stand on the line of their key");
    else if (sscanf(buffer, "[%63[^]\n]", name) == 1) {
        size_t i = 0;

        while (i < SECTIONS && strcmp(section_help[i][0], name) != 0)
            i++;
        if (i == SECTIONS)
            reading_failed(reading, "[%s]: there is no such section", name);
    }
    return reading->failed_line != 0 ? NULL : buffer;
}

static int take_value(void *arg, const char *section, const char *key, const char *value)
{
    struct reading *reading = arg;
    char text[KVP_CONFIG_ERROR_MAX];

    if (reading->failed_line == 0 && set_option(reading->config, section, key, value, text) != KVP_OK)
        reading_failed(reading, "%s", text);
    return reading->failed_line == 0;
}

enum kvp_status kvp_config_file(struct kvp_config *config, const char *path, char *reterr_text)
{
    char text[KVP_CONFIG_ERROR_MAX];
    struct kvp_config with = *config;
    struct reading reading = {.config = &with, .text = text};
    int bad_line;

    reading.file = fopen(path, "re");
    if (reading.file == NULL) {
        snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%s: %s", path, strerror(errno));
        return errno == ENOENT ? KVP_ENOENT : KVP_EINVAL;
    }
    bad_line = ini_parse_stream(read_line, &reading, take_value, &reading);
    if (ferror(reading.file)) {
        reading.line++;
        reading_failed(&reading, "%s", "reading failed");
    }
    fclose(reading.file);
    if (bad_line != 0 && (reading.failed_line == 0 || bad_line < reading.failed_line)) {
        snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%.300s:%d: neither [section] nor key = value", path, bad_line);
        return KVP_EINVAL;
    }
    if (reading.failed_line != 0) {
        snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%.300s:%d: %.700s", path, reading.failed_line, text);
        return KVP_EINVAL;
    }
    *config = with;
    return KVP_OK;
}

/* ---- the command line -------------------------------------------------------------------------------------------- */

enum kvp_status kvp_config_set(struct kvp_config *config, const char *assignment, char *reterr_text)
{
    const char *equals = strchr(assignment, '=');
    const char *dot = strchr(assignment, '.');
    char section[64], key[64];

    if (equals == NULL || dot == NULL || dot > equals || (size_t)(dot - assignment) >= sizeof(section) ||
        (size_t)(equals - dot) > sizeof(key)) {
        snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%.100s: must be section.key=value", assignment);
        return KVP_EINVAL;
    }
    snprintf(section, sizeof(section), "%.*s", (int)(dot - assignment), assignment);
    snprintf(key, sizeof(key), "%.*s", (int)(equals - dot - 1), dot + 1);
    return set_option(config, section, key, equals + 1, reterr_text);
}

const char *kvp_config_flag(const char *flag)
{
    static char name[64];

    for (size_t i = 0; i < OPTIONS; i++) {
        if (options[i].flag == NULL || strcmp(options[i].flag, flag) != 0)
            continue;
        snprintf(name, sizeof(name), "%s.%s", options[i].section, options[i].key);
        return name;
    }
    return NULL;
}

/* ---- all together ------------------------------------------------------------------------------------------------ */

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr) >> 24 == 127;
    return address->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr);
}

static bool is_port(const char *text)
{
    size_t digits = strspn(text, "0123456789");

    return digits > 0 && digits <= 5 && text[digits] == 0 && strtoul(text, NULL, 10) <= UINT16_MAX;
}

/* @return what is wrong with grpc.listen, or NULL */
static const char *check_listen(const char *listen, bool with_tls)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST}, *found;
    const char *colon = strrchr(listen, ':');
    char host[KVP_CONFIG_TEXT_MAX];
    size_t n;
    bool loopback;

    if (colon == NULL || colon == listen)
        return "must be address:port";
    if (!is_port(colon + 1))
        return "the port must be a number from 1 to 65535, or 0 for any that is free";
    n = (size_t)(colon - listen);
    if (listen[0] == '[' && colon[-1] == ']')
        snprintf(host, sizeof(host), "%.*s", (int)n - 2, listen + 1);
    else
        snprintf(host, sizeof(host), "%.*s", (int)n, listen);
    if (getaddrinfo(host, NULL, &hints, &found) != 0)
        return "the address must be a number, such as 127.0.0.1 or [::1]";
    loopback = is_loopback(found->ai_addr);
    freeaddrinfo(found);
    return loopback || with_tls ? NULL : "is not a loopback address: it needs grpc.tls_cert, tls_key and tls_ca";
}

static const char *check_program(const char *path)
{
    struct stat st;

    if (stat(path, &st) != 0)
        return strerror(errno);
    return S_ISREG(st.st_mode) && access(path, X_OK) == 0 ? NULL : "is no program that can be executed";
}

static const char *check_environment(const char *variables)
{
    for (const char *v = variables + strspn(variables, " "); *v != 0; v += strspn(v, " ")) {
        size_t n = strcspn(v, " "), name = strcspn(v, "=");

        if (name == 0 || name >= n)
            return "must be NAME=VALUE, with a space between two of them";
        v += n;
    }
    return NULL;
}

enum kvp_status kvp_config_check(const struct kvp_config *config, char *reterr_text)
{
    const struct {
        const char *name, *value, *wrong;
    } checks[] = {
        {"grpc.listen", config->grpc.listen,
         config->grpc.listen[0] != 0 ? check_listen(config->grpc.listen, config->grpc.tls_ca[0] != 0) : NULL},
        {"daemon.socket_group", config->daemon.socket_group,
         config->daemon.socket_group[0] != 0 && getgrnam(config->daemon.socket_group) == NULL ? "there is no such group"
                                                                                               : NULL},
        {"executor.path", config->executor.path,
         config->executor.path[0] != 0 ? check_program(config->executor.path) : NULL},
        {"executor.environment", config->executor.environment, check_environment(config->executor.environment)},
    };

    if ((config->grpc.tls_cert[0] == 0) != (config->grpc.tls_key[0] == 0) ||
        (config->grpc.tls_cert[0] == 0) != (config->grpc.tls_ca[0] == 0)) {
        snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%s",
                 "grpc.tls_cert, grpc.tls_key and grpc.tls_ca go together: all three, or none");
        return KVP_EINVAL;
    }
    for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
        if (checks[i].wrong == NULL)
            continue;
        snprintf(reterr_text, KVP_CONFIG_ERROR_MAX, "%s = %.300s: %s", checks[i].name, checks[i].value,
                 checks[i].wrong);
        return KVP_EINVAL;
    }
    return KVP_OK;
}

/* ---- printing ---------------------------------------------------------------------------------------------------- */

static void print_help(const struct option *option, FILE *out)
{
    char low[32], high[32];

    fputs("\n# ", out);
    for (const char *c = option->help; *c != 0; c++)
        fputs(*c == '\n' ? "\n# " : (char[2]){*c, 0}, out);
    if (option->type == TYPE_COUNT || option->type == TYPE_BYTES) {
        format_number(option, option->min, low, sizeof(low));
        format_number(option, option->max, high, sizeof(high));
        fprintf(out, "\n# From %s to %s%s%s.", low, high, option->unit != NULL ? " " : "",
                option->unit != NULL ? option->unit : "");
    } else if (option->type == TYPE_CHOICE || option->type == TYPE_BOOL) {
        fprintf(out, "\n# One of: %s.", option->type == TYPE_BOOL ? "no yes" : option->choices);
    }
    fputc('\n', out);
}

void kvp_config_print(const struct kvp_config *config, bool documented, FILE *out)
{
    char value[32];

    for (size_t s = 0; s < SECTIONS; s++) {
        fprintf(out, "%s[%s]\n", s > 0 ? "\n" : "", section_help[s][0]);
        if (documented)
            fprintf(out, "# %s.\n", section_help[s][1]);
        for (size_t i = 0; i < OPTIONS; i++) {
            const struct option *option = &options[i];

            if (strcmp(option->section, section_help[s][0]) != 0)
                continue;
            if (documented)
                print_help(option, out);
            if (!is_text(option))
                format_number(option, *number_of(config, option), value, sizeof(value));
            fprintf(out, "%s =%s%s\n", option->key, is_text(option) && text_of(config, option)[0] == 0 ? "" : " ",
                    is_text(option) ? text_of(config, option) : value);
        }
    }
}

void kvp_config_print_flags(FILE *out)
{
    for (size_t i = 0; i < OPTIONS; i++) {
        if (options[i].flag != NULL)
            fprintf(out, "  %-27s the same as --set %s.%s=VALUE\n", options[i].flag, options[i].section,
                    options[i].key);
    }
}
