/**
 * What an operator can set: one table of options (config.c), from which come the file's parser, --set, --help,
 * --check-config and the documented sample (deploy/systemd/kvpoold.conf is what --print-config prints).
 *
 * A value comes from, each over the one before: the table's default, the file, the command line in its order. Nothing
 * is taken that is not understood: an unknown section or key, a value out of its range or of the wrong kind is an error
 * that names the value, the limit and where it stands.
 */
#ifndef KVP_CONFIG_H
#define KVP_CONFIG_H

#include "kvp_status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define KVP_CONFIG_TEXT_MAX  512 /* bytes of a value, the terminator included */
#define KVP_CONFIG_ERROR_MAX 1024
/* KVP_CONFIG_PATH, the file that is read where none is named, is where the build installs the sample: /etc/kvpool/, if it
 * was not told another CMAKE_INSTALL_SYSCONFDIR. */

enum kvp_backend { KVP_BACKEND_AUTO = 0, KVP_BACKEND_HOST = 1, KVP_BACKEND_CUDA = 2 };

/* Each field is an option of the same section and name. Text is an array; everything else is a uint64_t. */
struct kvp_config {
    struct {
        char runtime_dir[KVP_CONFIG_TEXT_MAX];
        uint64_t backend; /* enum kvp_backend */
        uint64_t socket_mode;
        char socket_group[KVP_CONFIG_TEXT_MAX];
        uint64_t stop_ms;
    } daemon;
    struct {
        uint64_t enabled;
        char listen[KVP_CONFIG_TEXT_MAX];
        char tls_cert[KVP_CONFIG_TEXT_MAX];
        char tls_key[KVP_CONFIG_TEXT_MAX];
        char tls_ca[KVP_CONFIG_TEXT_MAX];
        uint64_t message_bytes;
        uint64_t streams;
        uint64_t connections;
    } grpc;
    struct {
        uint64_t lease_ms;
        uint64_t connections;
        uint64_t unpack_bytes;
    } limits;
    struct {
        uint64_t bytes;
        uint64_t audit_s;
    } ledger;
    struct {
        char path[KVP_CONFIG_TEXT_MAX];
        uint64_t start_ms;
        char environment[KVP_CONFIG_TEXT_MAX];
    } executor;
    struct {
        uint64_t level; /* as in syslog(3) */
    } log;
};

void kvp_config_defaults(struct kvp_config *ret_config);

/**
 * Take a file's values over those that are there.
 * @param reterr_text  [KVP_CONFIG_ERROR_MAX] what is wrong, with file and line
 * @retval KVP_ENOENT  there is no such file
 * @retval KVP_EINVAL  it can not be read, or something in it is not right
 */
enum kvp_status kvp_config_file(struct kvp_config *config, const char *path, char *reterr_text);

/** Take one "section.key=value". @param reterr_text  as above, without a place */
enum kvp_status kvp_config_set(struct kvp_config *config, const char *assignment, char *reterr_text);

/**
 * What no option can see alone: options that go together, and whether this machine has what they name (the group, the
 * executor's program). Called once, when all have been taken.
 */
enum kvp_status kvp_config_check(const struct kvp_config *config, char *reterr_text);

/** The values as they are, in the file's form, each under its help text if `documented`. */
void kvp_config_print(const struct kvp_config *config, bool documented, FILE *out);

/** One line for each option that has a flag of its own on the command line. */
void kvp_config_print_flags(FILE *out);

/** The "section.key" that a flag such as "--backend" stands for, or NULL. */
const char *kvp_config_flag(const char *flag);

#endif
