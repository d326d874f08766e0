/**
 * Memory for torch: kvp_torch_malloc and kvp_torch_free as torch calls them, on a host pool of a real daemon.
 *
 * An earlier process is played by a session of its own, which has detached: to the daemon that is the same.
 */
#include "client_house.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096u

/* A client with pool "p" attached, by owners. */
struct process {
    struct kvp_client *connected;
    struct kvp_owner *client, *pool;
    struct kvp_pool *mapped;
};

static struct process begin(void)
{
    struct process process;

    ck_ok(kvp_connect(daemon_.socket, NULL, &process.connected));
    ck_ok(kvp_attach(process.connected, "p", NULL, &process.mapped));
    ck_ok(kvp_owner_of_client(process.connected, &process.client));
    ck_ok(kvp_owner_of_pool(process.client, process.mapped, &process.pool));
    return process;
}

static void end(struct process *process)
{
    ck_ok(kvp_owner_release(process->pool));
    ck_ok(kvp_owner_release(process->client));
}

static unsigned char *take(size_t bytes)
{
    unsigned char *memory = kvp_torch_malloc(bytes, 0, NULL);

    ck_assert_msg(memory != NULL, "%s", kvp_error_text());
    return memory;
}

/* "name offset bytes mapped" a line */
static void assert_regions(const char *expected)
{
    struct kvp_region_info *regions;
    char found[1024] = "";
    uint64_t first = 0;
    size_t n, at = 0;

    ck_ok(kvp_region_list(client, "p", &regions, &n));
    first = kvp_pool_info(pool)->slab_bytes - REGION_BYTES;
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(found + at, sizeof(found) - at, "%s %llu %llu %u\n", regions[i].name,
                               (unsigned long long)(regions[i].offset - first), (unsigned long long)regions[i].bytes,
                               regions[i].mapped);
    free(regions);
    ck_assert_str_eq(found, expected);
}

static void drop_all(void)
{
    struct kvp_region_info *regions;
    size_t n;

    ck_ok(kvp_region_list(client, "p", &regions, &n));
    for (size_t i = 0; i < n; i++)
        ck_ok(kvp_region_unmap(pool, 0, regions[i].name, 0));
    free(regions);
}

static void house_close_empty(void)
{
    drop_all();
    house_close();
}

/* An earlier process that had "kv/0", "kv/1", … of these sizes, filled with their number + 1. */
static void earlier(const size_t *sizes, size_t n)
{
    struct process process = begin();
    unsigned char *memory[8];

    ck_ok(kvp_torch_use(process.pool, "kv", 0));
    for (size_t i = 0; i < n; i++) {
        memory[i] = take(sizes[i]);
        memset(memory[i], (int)i + 1, sizes[i]);
    }
    ck_ok(kvp_torch_end());
    for (size_t i = 0; i < n; i++)
        kvp_torch_free(memory[i], sizes[i], 0, NULL);
    end(&process);
}

static void assert_filled(const unsigned char *memory, size_t bytes, unsigned char value)
{
    for (size_t i = 0; i < bytes; i++)
        ck_assert_uint_eq(memory[i], value);
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

START_TEST(allocations_are_regions_of_their_tag_by_number)
{
    struct process process = begin();
    unsigned char *slab = kvp_slab(process.mapped, 0), *memory[4];
    size_t first = kvp_pool_info(pool)->slab_bytes - REGION_BYTES;

    ck_ok(kvp_torch_use(process.pool, "kv", 0));
    memory[0] = take(PAGE);
    memory[1] = take(2 * PAGE);
    ck_ok(kvp_torch_use(process.pool, "other", 0));
    memory[2] = take(100);
    ck_ok(kvp_torch_end());
    memory[3] = take(PAGE);
    ck_ok(kvp_torch_end());
    ck_assert_ptr_eq(memory[0], slab + first);
    ck_assert_ptr_eq(memory[3], slab + first + 4 * PAGE);
    assert_regions("kv/0 0 4096 1\nkv/1 4096 8192 1\nother/0 12288 100 1\nkv/2 16384 4096 1\n");
    ck_assert(!kvp_torch_came_back(memory[0]) && !kvp_torch_came_back(slab));
    for (int i = 0; i < 4; i++)
        kvp_torch_free(memory[i], 0, 0, NULL);
    assert_regions("kv/0 0 4096 0\nkv/1 4096 8192 0\nother/0 12288 100 0\nkv/2 16384 4096 0\n");
    kvp_torch_free(memory[0], 0, 0, NULL);
    kvp_torch_free(NULL, 0, 0, NULL);
    end(&process);
}
END_TEST

START_TEST(a_freed_number_is_given_out_again_and_made_anew_where_the_size_differs)
{
    struct process process = begin();
    unsigned char *first, *second, *again;

    ck_ok(kvp_torch_use(process.pool, "kv", KVP_TORCH_PRESERVE));
    first = take(PAGE);
    second = take(PAGE);
    kvp_torch_free(first, PAGE, 0, NULL);
    again = take(PAGE);
    ck_assert_ptr_eq(again, first);
    ck_assert(!kvp_torch_came_back(again));
    kvp_torch_free(again, PAGE, 0, NULL);
    again = take(3 * PAGE);
    assert_regions("kv/1 4096 4096 1\nkv/0 8192 12288 1\n");
    kvp_torch_free(again, 0, 0, NULL);
    kvp_torch_free(second, 0, 0, NULL);
    ck_ok(kvp_torch_end());
    end(&process);
}
END_TEST

START_TEST(where_room_is_short_what_was_freed_is_given_up)
{
    struct process process = begin();
    unsigned char *memory[4];

    ck_ok(kvp_torch_use(process.pool, "kv", 0));
    for (int i = 0; i < 4; i++)
        memory[i] = take(4 * PAGE);
    ck_assert_ptr_null(kvp_torch_malloc(PAGE, 0, NULL));
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "bytes: 4096 for region \"kv/4\""));
    for (int i = 0; i < 3; i++)
        kvp_torch_free(memory[i], 0, 0, NULL);
    memory[0] = take(12 * PAGE);
    assert_regions("kv/0 0 49152 1\nkv/3 49152 16384 1\n");
    ck_ok(kvp_torch_end()); /* the last one succeeded */
    kvp_torch_free(memory[0], 0, 0, NULL);
    kvp_torch_free(memory[3], 0, 0, NULL);
    end(&process);
}
END_TEST

/* ---- earlier processes ------------------------------------------------------------------------------------------- */

START_TEST(with_preserve_the_bytes_of_an_earlier_process_come_back)
{
    const size_t sizes[] = {PAGE, 5 * PAGE, 100};
    struct process process;
    unsigned char *memory[4];

    earlier(sizes, 3);
    process = begin();
    ck_ok(kvp_torch_use(process.pool, "kv", KVP_TORCH_PRESERVE));
    for (size_t i = 0; i < 3; i++) {
        memory[i] = take(sizes[i]);
        assert_filled(memory[i], sizes[i], (unsigned char)(i + 1));
    }
    memory[3] = take(PAGE);
    ck_ok(kvp_torch_end());
    ck_assert(kvp_torch_came_back(memory[1] + sizes[1] - 1) && !kvp_torch_came_back(memory[1]));
    ck_assert(kvp_torch_came_back(memory[0]) && !kvp_torch_came_back(memory[3]));
    for (int i = 0; i < 4; i++)
        kvp_torch_free(memory[i], 0, 0, NULL);
    end(&process);
}
END_TEST

START_TEST(with_preserve_another_size_is_refused_with_both)
{
    const size_t sizes[] = {PAGE, 2 * PAGE};
    struct process process;
    unsigned char *memory;

    earlier(sizes, 2);
    process = begin();
    ck_ok(kvp_torch_use(process.pool, "kv", KVP_TORCH_PRESERVE));
    memory = take(PAGE);
    ck_assert_ptr_null(kvp_torch_malloc(3 * PAGE, 0, NULL));
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "bytes: 12288, region \"kv/1\" of pool \"p\" has 8192"));
    ck_assert_int_eq(kvp_torch_end(), KVP_EMISMATCH);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "bytes: 12288, region \"kv/1\" of pool \"p\" has 8192"));
    assert_regions("kv/0 0 4096 1\nkv/1 4096 8192 0\n");
    kvp_torch_free(memory, 0, 0, NULL);
    end(&process);
}
END_TEST

START_TEST(without_preserve_the_tags_old_regions_are_given_up)
{
    const size_t sizes[] = {PAGE, 5 * PAGE, 100};
    struct process process;
    struct kvp_region kept;
    unsigned char *memory;

    earlier(sizes, 3);
    ck_ok(kvp_region_map(pool, 0, "kv", 1, 0, &kept));
    ck_ok(kvp_region_map(pool, 0, "kv/x", 1, 0, &kept));
    ck_ok(kvp_region_map(pool, 0, "kv/1/0", 1, 0, &kept));
    process = begin();
    ck_ok(kvp_torch_use(process.pool, "kv", 0));
    assert_regions(
        "kv/0 0 4096 0\nkv/1 4096 20480 0\nkv/2 24576 100 0\nkv 28672 1 1\nkv/x 32768 1 1\nkv/1/0 36864 1 1\n");
    memory = take(2 * PAGE);
    assert_regions("kv/0 0 8192 1\nkv 28672 1 1\nkv/x 32768 1 1\nkv/1/0 36864 1 1\n");
    ck_ok(kvp_torch_end());
    kvp_torch_free(memory, 0, 0, NULL);
    end(&process);
}
END_TEST

START_TEST(memory_that_another_process_has_is_not_handed_out)
{
    struct process one = begin(), other = begin();
    unsigned char *memory;

    ck_ok(kvp_torch_use(one.pool, "kv", 0));
    memory = take(PAGE);
    ck_ok(kvp_torch_end());
    for (unsigned flags = 0; flags <= KVP_TORCH_PRESERVE; flags++) {
        ck_ok(kvp_torch_use(other.pool, "kv", flags));
        ck_assert_ptr_null(kvp_torch_malloc(PAGE, 0, NULL));
        ck_assert_int_eq(kvp_torch_end(), KVP_EBUSY);
        ck_assert_ptr_nonnull(strstr(kvp_error_text(), "region \"kv/0\" is mapped by session"));
    }
    kvp_torch_free(memory, 0, 0, NULL);
    ck_ok(kvp_torch_use(other.pool, "kv", 0));
    memory = take(PAGE);
    ck_ok(kvp_torch_end());
    kvp_torch_free(memory, 0, 0, NULL);
    end(&one);
    end(&other);
}
END_TEST

/* ---- one process ------------------------------------------------------------------------------------------------- */

START_TEST(two_attachments_of_a_session_share_a_tags_numbers)
{
    struct process process = begin();
    struct kvp_owner *again;
    struct kvp_pool *mapped;
    unsigned char *first, *second;

    ck_ok(kvp_attach(process.connected, "p", NULL, &mapped));
    ck_ok(kvp_owner_of_pool(process.client, mapped, &again));
    ck_ok(kvp_torch_use(process.pool, "kv", 0));
    first = take(PAGE);
    ck_ok(kvp_torch_use(again, "kv", 0));
    second = take(PAGE);
    ck_ok(kvp_torch_end());
    ck_ok(kvp_torch_end());
    ck_assert_ptr_eq(second, first + PAGE);
    kvp_torch_free(first, 0, 0, NULL);
    kvp_torch_free(second, 0, 0, NULL);
    end(&process);
    ck_ok(kvp_owner_release(again));
}
END_TEST

#define THREADS 4
#define EACH    3

static void *allocate_and_free(void *arg)
{
    const struct process *process = arg;
    unsigned char *memory[EACH];

    for (int round = 0; round < 5; round++) {
        ck_ok(kvp_torch_use(process->pool, "kv", 0));
        for (int i = 0; i < EACH; i++) {
            memory[i] = take(PAGE);
            memset(memory[i], (int)(uintptr_t)&memory % 251 + i, PAGE);
        }
        ck_ok(kvp_torch_end());
        for (int i = 0; i < EACH; i++) {
            assert_filled(memory[i], PAGE, (unsigned char)((int)(uintptr_t)&memory % 251 + i));
            kvp_torch_free(memory[i], PAGE, 0, NULL);
        }
    }
    return NULL;
}

START_TEST(threads_are_handed_memory_of_their_own)
{
    struct process process = begin();
    pthread_t threads[THREADS];

    for (int i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, allocate_and_free, &process), 0);
    for (int i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
    ck_assert_ptr_null(kvp_torch_malloc(PAGE, 0, NULL));
    end(&process);
}
END_TEST

START_TEST(memory_outlives_the_owner_that_it_was_taken_by)
{
    struct process process = begin();
    struct kvp_pool_info *info;
    unsigned char *memory;

    ck_ok(kvp_torch_use(process.pool, "kv", 0));
    memory = take(PAGE);
    ck_ok(kvp_torch_end());
    end(&process);
    memset(memory, 7, PAGE);
    ck_ok(kvp_pool_describe(client, "p", &info));
    ck_assert_uint_eq(info->attachments, 2);
    kvp_pool_info_free(info);
    kvp_torch_free(memory, PAGE, 0, NULL);
    ck_ok(kvp_pool_describe(client, "p", &info));
    ck_assert_uint_eq(info->attachments, 1);
    kvp_pool_info_free(info);
}
END_TEST

START_TEST(what_is_no_use_is_refused)
{
    struct process process = begin();
    char tag[KVP_NAME_BYTES_MAX + 1];

    memset(tag, 't', sizeof(tag));
    ck_assert_int_eq(kvp_torch_end(), KVP_EINVAL);
    ck_assert_ptr_null(kvp_torch_malloc(PAGE, 0, NULL));
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "without kvp_torch_use on this thread"));
    ck_assert_int_eq(kvp_torch_use(process.client, "kv", 0), KVP_EINVAL);
    ck_assert_int_eq(kvp_torch_use(process.pool, "kv", 2), KVP_EINVAL);
    ck_assert_int_eq(kvp_torch_use(process.pool, "", 0), KVP_EINVAL);
    ck_assert_int_eq(kvp_torch_use(process.pool, NULL, 0), KVP_EINVAL);
    tag[KVP_NAME_BYTES_MAX - 10] = 0;
    ck_assert_int_eq(kvp_torch_use(process.pool, tag, 0), KVP_EINVAL);
    tag[KVP_NAME_BYTES_MAX - 11] = 0;
    ck_ok(kvp_torch_use(process.pool, tag, 0));
    ck_assert_ptr_null(kvp_torch_malloc(0, 0, NULL));
    ck_assert_int_eq(kvp_torch_end(), KVP_EINVAL);
    ck_ok(kvp_torch_use(process.pool, "no tag", 0));
    ck_assert_ptr_null(kvp_torch_malloc(PAGE, 0, NULL));
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "name: byte 2 is none of letters"));
    ck_assert_int_eq(kvp_torch_end(), KVP_EINVAL);
    end(&process);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_torch");
    TCase *tcase = tcase_create("torch");
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(tcase, house_open, house_close_empty);
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, allocations_are_regions_of_their_tag_by_number);
    tcase_add_test(tcase, a_freed_number_is_given_out_again_and_made_anew_where_the_size_differs);
    tcase_add_test(tcase, where_room_is_short_what_was_freed_is_given_up);
    tcase_add_test(tcase, with_preserve_the_bytes_of_an_earlier_process_come_back);
    tcase_add_test(tcase, with_preserve_another_size_is_refused_with_both);
    tcase_add_test(tcase, without_preserve_the_tags_old_regions_are_given_up);
    tcase_add_test(tcase, memory_that_another_process_has_is_not_handed_out);
    tcase_add_test(tcase, two_attachments_of_a_session_share_a_tags_numbers);
    tcase_add_test(tcase, threads_are_handed_memory_of_their_own);
    tcase_add_test(tcase, memory_outlives_the_owner_that_it_was_taken_by);
    tcase_add_test(tcase, what_is_no_use_is_refused);
    suite_add_tcase(suite, tcase);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
