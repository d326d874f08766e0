/**
 * How kvpool says things: failures, documents, numbers, handles.
 */
#include "cli.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REAL_DIGITS 6 /* of measured times: what a double has beyond them is noise */

int cli_failed(const char *what, enum kvp_status status)
{
    const char *text = kvp_error_text();

    fprintf(stderr, "kvpool: %s: %s (%s)\n", what, text[0] != 0 ? text : kvp_strerror(status), kvp_status_name(status));
    return 1;
}

int cli_usage(const struct cli *cli, const char *format, ...)
{
    va_list args;

    fputs("kvpool: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\nTry `kvpool %s --help'.\n", cli->command->words);
    return 2;
}

int cli_print_json(json_t *document)
{
    int failed = document == NULL ||
                 json_dumpf(document, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(REAL_DIGITS)) != 0 ||
                 putchar('\n') == EOF || fflush(stdout) != 0;

    if (failed)
        fprintf(stderr, "kvpool: the document can not be printed: %s\n",
                document == NULL ? "out of memory" : strerror(errno));
    json_decref(document);
    return failed;
}

bool cli_parse_number(const struct cli *cli, const char *what, const char *text, uint64_t min, uint64_t max,
                      uint64_t *ret_number)
{
    unsigned long long number;
    char *end;

    errno = 0;
    number = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != 0 || errno != 0 || number < min || number > max) {
        cli_usage(cli, "%s is `%s': a number %" PRIu64 "..%" PRIu64 " is wanted", what, text, min, max);
        return false;
    }
    *ret_number = number;
    return true;
}

bool cli_number(const struct cli *cli, enum cli_key key, uint64_t fallback, uint64_t min, uint64_t max,
                uint64_t *ret_number)
{
    const char *text = cli_value(cli, key);
    char name[32] = "an option";

    if (text == NULL) {
        *ret_number = fallback;
        return true;
    }
    if (key == CLI_WAIT)
        snprintf(name, sizeof(name), "--wait");
    for (const struct argp_option *option = cli->command->options; option != NULL && option->name != NULL; option++)
        if (option->key == (int)key)
            snprintf(name, sizeof(name), "--%s", option->name);
    return cli_parse_number(cli, name, text, min, max, ret_number);
}

bool cli_parse_seq(const struct cli *cli, const char *text, struct kvp_seq *ret_seq)
{
    unsigned slot, generation;
    int used = -1;

    if (text[0] < '0' || text[0] > '9' || sscanf(text, "%10u.%10u%n", &slot, &generation, &used) != 2 || used < 0 ||
        text[used] != 0 || generation == 0) {
        cli_usage(cli, "`%s' is no sequence: SLOT.GENERATION is wanted, as `kvpool seq open' prints it", text);
        return false;
    }
    *ret_seq = (struct kvp_seq){slot, generation};
    return true;
}

const char *cli_seq_text(struct kvp_seq seq, char text[CLI_SEQ_BYTES])
{
    snprintf(text, CLI_SEQ_BYTES, "%u.%u", seq.slot, seq.generation);
    return text;
}

const char *cli_bytes_text(uint64_t bytes, char text[CLI_AMOUNT_BYTES])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double amount = (double)bytes;
    size_t unit = 0;

    while (amount >= 1024 && unit + 1 < sizeof(units) / sizeof(units[0])) {
        amount /= 1024;
        unit++;
    }
    snprintf(text, CLI_AMOUNT_BYTES, unit == 0 ? "%.0f %s" : "%.1f %s", amount, units[unit]);
    return text;
}

const char *cli_text(const char *theirs, char text[CLI_TEXT_BYTES])
{
    snprintf(text, CLI_TEXT_BYTES, "%s", theirs);
    for (unsigned char *c = (unsigned char *)text; *c != 0; c++) {
        if (*c < 0x20 || *c == 0x7f)
            *c = '?';
        else if (*c == 0xc2 && c[1] >= 0x80 && c[1] <= 0x9f) /* the other controls, U+0080 to U+009F */
            c[0] = c[1] = '?';
    }
    return text;
}

const char *cli_hex(const uint8_t *bytes, size_t n, char *text)
{
    text[0] = 0;
    for (size_t i = 0; i < n; i++)
        sprintf(text + 2 * i, "%02x", bytes[i]);
    return text;
}
