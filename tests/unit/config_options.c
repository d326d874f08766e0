/**
 * The table of options, as an operator meets it: defaults, file, command line, errors, and the sample that is installed.
 */
#include "config.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct kvp_config config;
static char text[KVP_CONFIG_ERROR_MAX];
static char path[256];

static void setup(void)
{
    int fd;

    kvp_config_defaults(&config);
    strcpy(text, "");
    snprintf(path, sizeof(path), "%s/kvpool-config.XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : "/tmp");
    fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static void teardown(void)
{
    unlink(path);
}

static enum kvp_status take(const char *content, size_t n)
{
    FILE *file = fopen(path, "w");

    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(content, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
    return kvp_config_file(&config, path, text);
}

/* The file is refused, the text names the place and holds `wanted`, and nothing of the file was taken. */
static void refuses(const char *content, int line, const char *wanted)
{
    struct kvp_config before = config;
    char place[280];

    snprintf(place, sizeof(place), "%s:%d: ", path, line);
    ck_assert_int_eq(take(content, strlen(content)), KVP_EINVAL);
    ck_assert_msg(strncmp(text, place, strlen(place)) == 0, "%s", text);
    ck_assert_msg(strstr(text, wanted) != NULL, "%s", text);
    ck_assert_mem_eq(&before, &config, sizeof(config));
}

START_TEST(a_file_sets_every_kind_of_value)
{
    static const char content[] = "# comment\n[daemon]\nruntime_dir = /tmp/here\nbackend = host ; why\nsocket_mode = 600\n"
                                  "[grpc]\nenabled = no\n[ledger]\nbytes = 128m\n[log]\nlevel = debug\n"
                                  "[limits]\nlease_ms = 1000\n";

    ck_assert_int_eq(take(content, strlen(content)), KVP_OK);
    ck_assert_str_eq(config.daemon.runtime_dir, "/tmp/here");
    ck_assert_uint_eq(config.daemon.backend, KVP_BACKEND_HOST);
    ck_assert_uint_eq(config.daemon.socket_mode, 0600);
    ck_assert_uint_eq(config.grpc.enabled, 0);
    ck_assert_uint_eq(config.ledger.bytes, 128u << 20);
    ck_assert_uint_eq(config.log.level, 7);
    ck_assert_uint_eq(config.limits.lease_ms, 1000);
}
END_TEST

START_TEST(a_wrong_file_is_refused_whole_with_the_line_and_the_limit)
{
    refuses("[daemon]\nbackend = gpu\n", 2, "auto host cuda");
    refuses("[log]\nlevel = debug\n[daemon]\n\nbackend =\n", 5, "daemon.backend = (nothing)");
    refuses("[deamon]\n", 1, "[deamon]: there is no such section");
    refuses("[daemon]\nbackends = host\n", 2, "daemon.backends: there is no such option");
    refuses("[daemon]\n\nbackend host\n", 3, "neither [section] nor key = value");
    refuses("[daemon]\n  backend = host\n", 2, "indented");
    refuses("[daemon]\nruntime_dir = tmp\n", 2, "must be an absolute path");
    refuses("[daemon]\nruntime_dir =\n", 2, "must be an absolute path");
    refuses("[daemon]\nsocket_mode = 0888\n", 2, "from 00 to 0777");
    refuses("[ledger]\nbytes = 65G\n", 2, "from 64M to 64G");
    refuses("[ledger]\nbytes = 1T\n", 2, "from 64M to 64G");
    refuses("[ledger]\nbytes = 18446744073709551616\n", 2, "from 64M to 64G");
    refuses("[ledger]\nbytes = -1\n", 2, "from 64M to 64G");
    refuses("[limits]\nlease_ms = 99\n", 2, "from 100 to 86400000 ms");
    refuses("[limits]\nlease_ms = 100 ms\n", 2, "from 100 to 86400000 ms");
    refuses("[grpc]\nenabled = maybe\n", 2, "no yes");
}
END_TEST

START_TEST(a_long_line_or_a_nul_is_refused_and_not_cut)
{
    char content[4096];
    int n = snprintf(content, sizeof(content), "[executor]\nenvironment = ");

    memset(content + n, 'x', 3000);
    content[n + 3000] = 0;
    refuses(content, 2, "too long");
    ck_assert_int_eq(take("[daemon]\n\0backend = host\n", 25), KVP_EINVAL);
    ck_assert_msg(strstr(text, ":2: the line holds a NUL") != NULL, "%s", text);
}
END_TEST

START_TEST(a_missing_file_is_told_from_a_wrong_one)
{
    ck_assert_int_eq(kvp_config_file(&config, "/nowhere/kvpoold.conf", text), KVP_ENOENT);
    ck_assert_int_eq(kvp_config_file(&config, "/", text), KVP_EINVAL);
}
END_TEST

START_TEST(the_command_line_sets_one_value)
{
    ck_assert_int_eq(kvp_config_set(&config, "executor.environment=A=1 B=2", text), KVP_OK);
    ck_assert_str_eq(config.executor.environment, "A=1 B=2");
    ck_assert_int_eq(kvp_config_set(&config, "daemon.backend", text), KVP_EINVAL);
    ck_assert_int_eq(kvp_config_set(&config, "backend=host", text), KVP_EINVAL);
    ck_assert_int_eq(kvp_config_set(&config, "a=b.c", text), KVP_EINVAL);
    ck_assert_int_eq(kvp_config_set(&config, "daemon.socket_group=a\nb", text), KVP_EINVAL);
    ck_assert_str_eq(config.daemon.socket_group, "");
    ck_assert_str_eq(kvp_config_flag("--backend"), "daemon.backend");
    ck_assert_ptr_null(kvp_config_flag("--nothing"));
}
END_TEST

START_TEST(tcp_beyond_loopback_needs_tls_with_client_certificates)
{
    ck_assert_int_eq(kvp_config_set(&config, "grpc.listen=0.0.0.0:7410", text), KVP_OK);
    ck_assert_int_eq(kvp_config_check(&config, text), KVP_EINVAL);
    ck_assert_int_eq(kvp_config_set(&config, "grpc.tls_cert=/c", text), KVP_OK);
    ck_assert_int_eq(kvp_config_set(&config, "grpc.tls_key=/k", text), KVP_OK);
    ck_assert_int_eq(kvp_config_check(&config, text), KVP_EINVAL);
    ck_assert_int_eq(kvp_config_set(&config, "grpc.tls_ca=/a", text), KVP_OK);
    ck_assert_int_eq(kvp_config_check(&config, text), KVP_OK);
    kvp_config_defaults(&config);
    ck_assert_int_eq(kvp_config_set(&config, "grpc.listen=127.0.0.1:0", text), KVP_OK);
    ck_assert_int_eq(kvp_config_check(&config, text), KVP_OK);
}
END_TEST

static void check_refuses(const char *setting, const char *wanted)
{
    kvp_config_defaults(&config);
    ck_assert_msg(kvp_config_set(&config, setting, text) == KVP_OK, "%s", text);
    ck_assert_msg(kvp_config_check(&config, text) == KVP_EINVAL, "%s", setting);
    ck_assert_msg(strncmp(text, setting, strcspn(setting, "=")) == 0 && strstr(text, wanted) != NULL, "%s", text);
}

START_TEST(what_can_not_be_served_is_refused_before_it_is_tried)
{
    static const char *const ports[] = {"99999", "65536", "", "-1", "+1", "1x", " 1", "0x10", "4294967297"};
    char setting[300];

    for (size_t i = 0; i < sizeof(ports) / sizeof(ports[0]); i++) {
        snprintf(setting, sizeof(setting), "grpc.listen=127.0.0.1:%s", ports[i]);
        check_refuses(setting, "port");
    }
    check_refuses("grpc.listen=7410", "address:port");
    check_refuses("grpc.listen=:7410", "address:port");
    check_refuses("grpc.listen=localhost:7410", "must be a number");
    check_refuses("grpc.listen=127.0.0.300:7410", "must be a number");
    check_refuses("grpc.listen=[::]:7410", "not a loopback address");
    check_refuses("daemon.socket_group=no-such-group", "no such group");
    check_refuses("executor.path=/nowhere/kvpool-exec", "No such file");
    check_refuses("executor.path=/", "can be executed");
    snprintf(setting, sizeof(setting), "executor.path=%s", path); /* a file of mode 0600 */
    check_refuses(setting, "can be executed");
    check_refuses("executor.environment=A=1 B", "NAME=VALUE");
    check_refuses("executor.environment=B A=1", "NAME=VALUE");
    check_refuses("executor.environment==1", "NAME=VALUE");
}
END_TEST

START_TEST(what_can_be_served_passes_the_check)
{
    static const char *const right[] = {"grpc.listen=127.0.0.1:65535", "grpc.listen=[::1]:1", "executor.path=/bin/sh",
                                        "executor.environment= A=1  B=  C=x=y ", "daemon.socket_group=root"};

    for (size_t i = 0; i < sizeof(right) / sizeof(right[0]); i++) {
        kvp_config_defaults(&config);
        ck_assert_int_eq(kvp_config_set(&config, right[i], text), KVP_OK);
        ck_assert_msg(kvp_config_check(&config, text) == KVP_OK, "%s", text);
    }
}
END_TEST

START_TEST(what_is_printed_is_read_back_as_the_same)
{
    struct kvp_config before;
    FILE *file;

    ck_assert_int_eq(kvp_config_set(&config, "ledger.bytes=1048577K", text), KVP_OK);
    ck_assert_int_eq(kvp_config_set(&config, "log.level=warning", text), KVP_OK);
    ck_assert_int_eq(kvp_config_set(&config, "daemon.socket_mode=0600", text), KVP_OK);
    before = config;
    for (int documented = 0; documented < 2; documented++) {
        file = fopen(path, "w");
        ck_assert_ptr_nonnull(file);
        kvp_config_print(&config, documented, file);
        ck_assert_int_eq(fclose(file), 0);
        kvp_config_defaults(&config);
        ck_assert_msg(kvp_config_file(&config, path, text) == KVP_OK, "%s", text);
        ck_assert_mem_eq(&before, &config, sizeof(config));
    }
}
END_TEST

START_TEST(the_installed_sample_is_what_the_table_prints)
{
    static char printed[32768], sample[32768];
    FILE *file = fmemopen(printed, sizeof(printed), "w");

    ck_assert_ptr_nonnull(file);
    kvp_config_print(&config, true, file);
    ck_assert_int_eq(fclose(file), 0);
    file = fopen(KVPOOL_SAMPLE_CONFIG, "r");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_lt(fread(sample, 1, sizeof(sample), file), sizeof(sample));
    fclose(file);
    ck_assert_str_eq(printed, sample);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("config");
    TCase *tests = tcase_create("options");
    SRunner *runner;
    int failed;

    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, a_file_sets_every_kind_of_value);
    tcase_add_test(tests, a_wrong_file_is_refused_whole_with_the_line_and_the_limit);
    tcase_add_test(tests, a_long_line_or_a_nul_is_refused_and_not_cut);
    tcase_add_test(tests, a_missing_file_is_told_from_a_wrong_one);
    tcase_add_test(tests, the_command_line_sets_one_value);
    tcase_add_test(tests, tcp_beyond_loopback_needs_tls_with_client_certificates);
    tcase_add_test(tests, what_can_not_be_served_is_refused_before_it_is_tried);
    tcase_add_test(tests, what_can_be_served_passes_the_check);
    tcase_add_test(tests, what_is_printed_is_read_back_as_the_same);
    tcase_add_test(tests, the_installed_sample_is_what_the_table_prints);
    suite_add_tcase(suite, tests);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
