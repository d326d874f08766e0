/**
 * kvpool session open|close: sessions by lease, which live from one command to the next.
 */
#include "cli.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct argp_option open_options[] = {
    {"lease-ms", CLI_LEASE_MS, "MS", 0, "The session ends unless a command works in it within; 0: the daemon's default",
     0},
    {"name", CLI_NAME, "NAME", 0, "For operators: shown by status", 0},
    {"resume", CLI_RESUME, "SECRET", 0, "Claim the durable sequences of the dead session that printed this secret", 0},
    {0}};

/* @param ret_lease_ms  0: the daemon's default */
static bool parse_lease(const struct cli *cli, uint64_t *ret_lease_ms)
{
    const char *text = cli_value(cli, CLI_LEASE_MS);
    char *end;

    *ret_lease_ms = 0;
    if (text == NULL || strcmp(text, "0") == 0)
        return true;
    errno = 0;
    *ret_lease_ms = strtoull(text, &end, 10);
    if (text[0] >= '0' && text[0] <= '9' && *end == 0 && errno == 0 && *ret_lease_ms >= KVP_LEASE_MS_MIN &&
        *ret_lease_ms <= KVP_LEASE_MS_MAX)
        return true;
    cli_usage(cli, "--lease-ms is `%s': 0 (the daemon's default) or %d..%d is wanted", text, KVP_LEASE_MS_MIN,
              KVP_LEASE_MS_MAX);
    return false;
}

/* Hexadecimal, as session open prints it. */
static bool parse_secret(const struct cli *cli, uint8_t *secret, size_t room, size_t *ret_bytes)
{
    const char *text = cli_value(cli, CLI_RESUME);
    size_t n = text != NULL ? strlen(text) : 0;

    *ret_bytes = n / 2;
    if (n % 2 != 0 || n / 2 > room || (text != NULL && n == 0)) {
        cli_usage(cli, "--resume is no secret that `kvpool session open' printed");
        return false;
    }
    for (size_t i = 0; i < n / 2; i++) {
        unsigned byte;
        int used = -1;

        if (sscanf(text + 2 * i, "%2x%n", &byte, &used) != 1 || used != 2) {
            cli_usage(cli, "--resume is no secret that `kvpool session open' printed");
            return false;
        }
        secret[i] = (uint8_t)byte;
    }
    return true;
}

static int run_open(struct cli *cli)
{
    struct kvp_session_info info;
    char secret_text[2 * sizeof(info.resume_secret) + 1], id[24];
    uint8_t secret[sizeof(info.resume_secret)];
    enum kvp_status status;
    uint64_t lease_ms;
    size_t bytes;

    if (!parse_lease(cli, &lease_ms) || !parse_secret(cli, secret, sizeof(secret), &bytes))
        return 2;
    status = kvp_session_open(cli->client, (uint32_t)lease_ms, cli_value(cli, CLI_NAME), secret, bytes, &info);
    if (status != KVP_OK)
        return cli_failed("opening a session", status);
    if (!cli_json(cli)) {
        puts(info.token);
        return 0;
    }
    snprintf(id, sizeof(id), "%" PRIx64, info.session_id);
    return cli_print_json(json_pack("{s:s, s:s, s:I, s:s}", "session", info.token, "session_id", id, "lease_ms",
                                    (json_int_t)info.lease_ms, "resume_secret",
                                    cli_hex(info.resume_secret, info.resume_secret_bytes, secret_text)));
}

static int run_close(struct cli *cli)
{
    const char *token = cli->n_arguments > 0 ? cli->arguments[0] : cli_value(cli, CLI_SESSION);
    enum kvp_status status;

    if (token == NULL || token[0] == 0)
        return cli_usage(cli, "a token is wanted: as argument, by --session or in $KVPOOL_SESSION");
    status = kvp_session_close(cli->client, token);
    if (status != KVP_OK)
        return cli_failed("closing the session", status);
    if (cli_json(cli))
        return cli_print_json(json_pack("{s:s}", "closed", token));
    return 0;
}

const struct cli_command cli_session_commands[] = {
    {.words = "session open",
     .arguments = "",
     .help = "Open a session by lease and print its token, a secret, for --session or $KVPOOL_SESSION.",
     .json = "session, session_id, lease_ms, resume_secret.",
     .options = open_options,
     .run = run_open},
    {.words = "session close",
     .arguments = "[TOKEN]",
     .help = "End a session by lease, and with it its sequences that are not durable.",
     .json = "closed.",
     .max_arguments = 1,
     .run = run_close},
    {0}};
