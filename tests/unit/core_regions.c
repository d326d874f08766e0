/**
 * Regions in the core: where they lie, who finds them again, who may have them for himself or give them up, and what
 * is said of those that can not be.
 */
#include "core_shell.h"

#include <string.h>

#define MIB (1ull << 20)

static const struct pool_of host_pool = {
    .name = "p", .pages = 5, .page_tokens = 4, .layers = 1, .max_sequences = 4, .region_bytes = 40000};
static const struct pool_of gpu_pool = {.name = "p",
                                        .pages = 5,
                                        .page_tokens = 4,
                                        .layers = 1,
                                        .max_sequences = 4,
                                        .region_bytes = 5 * MIB,
                                        .devices = {"GPU-00000000-0000-0000-0000-000000000001",
                                                    "GPU-00000000-0000-0000-0000-000000000002"}};
static struct shell *shell;
static struct kvp_caller a, b, other_tenant;

static void begin_on(const char *backend, const struct pool_of *pool)
{
    shell = shell_begin(backend);
    a = shell_connect(shell, 1000, 41);
    b = shell_connect(shell, 1000, 42);
    other_tenant = shell_connect(shell, 1001, 43);
    shell_make_pool(shell, a, pool);
    shell_attach(shell, a, "p");
}

static void begin(void)
{
    begin_on("host", &host_pool);
}

static void begin_cuda(void)
{
    begin_on("cuda", &gpu_pool);
}

static void end(void)
{
    shell_end(shell);
}

static enum kvp_status finish(struct shell_call *call)
{
    enum kvp_status status = call->status;
    shell_call_free(shell, call);
    return status;
}

/* ---- calls as tests write them ----------------------------------------------------------------------------------- */

static Kvpool__V1__MapRegionRequest region(const char *name, uint64_t bytes)
{
    Kvpool__V1__MapRegionRequest request = KVPOOL__V1__MAP_REGION_REQUEST__INIT;
    request.pool = (char *)"p";
    request.name = (char *)name;
    request.bytes = bytes;
    return request;
}

static struct shell_call *send(struct kvp_caller caller, Kvpool__V1__MapRegionRequest request)
{
    return shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base);
}

static struct shell_call *send_map(struct kvp_caller caller, const char *name, uint64_t bytes)
{
    return send(caller, region(name, bytes));
}

static struct shell_call *send_map_alone(struct kvp_caller caller, const char *name, uint64_t bytes)
{
    Kvpool__V1__MapRegionRequest request = region(name, bytes);
    request.exclusive = true;
    return send(caller, request);
}

/* The reply, or the test fails. */
static Kvpool__V1__MapRegionReply taken(struct shell_call *call)
{
    ck_assert_msg(call->status == KVP_OK, "%s", call->status == KVP_OK ? "" : shell_error(call));
    Kvpool__V1__MapRegionReply reply = *(const Kvpool__V1__MapRegionReply *)call->reply;
    shell_call_free(shell, call);
    return reply;
}

static Kvpool__V1__MapRegionReply mapped(struct kvp_caller caller, const char *name, uint64_t bytes)
{
    return taken(send_map(caller, name, bytes));
}

static Kvpool__V1__MapRegionReply mapped_alone(struct kvp_caller caller, const char *name, uint64_t bytes)
{
    return taken(send_map_alone(caller, name, bytes));
}

static struct shell_call *send_unmap(struct kvp_caller caller, const char *name, bool keep, uint64_t call_id)
{
    Kvpool__V1__UnmapRegionRequest request = KVPOOL__V1__UNMAP_REGION_REQUEST__INIT;
    request.call_id = call_id;
    request.pool = (char *)"p";
    request.name = (char *)name;
    request.keep = keep;
    return shell_call(shell, caller, KVPOOL__V1__METHOD__METHOD_UNMAP_REGION, &request.base);
}

static enum kvp_status unmap(struct kvp_caller caller, const char *name, bool keep)
{
    return finish(send_unmap(caller, name, keep, 0));
}

static void assert_refused(struct shell_call *call, enum kvp_status status, const char *text)
{
    ck_assert_int_eq(call->status, status);
    ck_assert_msg(strstr(shell_error(call), text) != NULL, "%s", shell_error(call));
    shell_call_free(shell, call);
}

static struct shell_call *describe(void)
{
    Kvpool__V1__DescribePoolRequest request = KVPOOL__V1__DESCRIBE_POOL_REQUEST__INIT;
    request.pool = (char *)"p";
    struct shell_call *call = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_DESCRIBE_POOL, &request.base);
    ck_assert_int_eq(call->status, KVP_OK);
    return call;
}

static void kill_process(struct kvp_caller caller)
{
    kvp_core_disconnected(shell->core, caller.session);
    kvp_core_process_ended(shell->core, caller.session);
    shell_run_ms(shell, 10);
}

/* ---- places ------------------------------------------------------------------------------------------------------ */

START_TEST(a_region_lies_behind_the_pages_and_is_found_again_by_its_name)
{
    struct shell_call *call = describe();
    const Kvpool__V1__PoolInfo *info = ((const Kvpool__V1__DescribePoolReply *)call->reply)->pool;
    uint64_t pages_end = info->spec->pages * info->page_bytes;
    ck_assert_uint_eq(info->slab_bytes, 4096 + 40960); /* the pages' 320 bytes, and the regions' room, rounded up */
    ck_assert_uint_lt(pages_end, 4096);
    shell_call_free(shell, call);
    Kvpool__V1__MapRegionReply first = mapped(a, "kv/0", 5000), second = mapped(a, "kv/1", 4096);
    ck_assert(first.offset == 4096 && first.bytes == 5000 && !first.existed);
    ck_assert(second.offset == 3 * 4096 && second.bytes == 4096 && !second.existed);
    Kvpool__V1__MapRegionReply again = mapped(a, "kv/0", 5000), by_name = mapped(b, "kv/1", 0);
    ck_assert(again.offset == first.offset && again.existed);
    ck_assert(by_name.offset == second.offset && by_name.bytes == 4096 && by_name.existed);
    call = describe();
    const Kvpool__V1__DescribePoolReply *reply = (const Kvpool__V1__DescribePoolReply *)call->reply;
    ck_assert_uint_eq(reply->n_regions, 2);
    ck_assert_str_eq(reply->regions[0]->name, "kv/0");
    ck_assert_uint_eq(reply->regions[0]->tenant, 1000);
    ck_assert_uint_eq(reply->regions[0]->mapped, 1);
    ck_assert(reply->regions[1]->offset == second.offset && reply->regions[1]->bytes == 4096);
    ck_assert_uint_eq(reply->regions[1]->mapped, 2);
    shell_call_free(shell, call);
}
END_TEST

START_TEST(a_region_and_its_bytes_survive_their_maker_and_the_daemon)
{
    Kvpool__V1__MapRegionReply made = mapped(a, "kv", 4096);
    unsigned char *slab = shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, 0});
    memset(slab + made.offset, 0x5a, 4096);
    kill_process(a);
    struct kvp_session_id alive[] = {b.session, other_tenant.session};
    shell_restart(shell, alive, 2);
    slab = shell_thing(shell, (struct kvp_thing){KVP_THING_SLAB, 0, 0});
    Kvpool__V1__MapRegionReply found = mapped_alone(b, "kv", 4096);
    ck_assert(found.existed && found.offset == made.offset);
    for (int i = 0; i < 4096; i++)
        ck_assert_uint_eq(slab[found.offset + (uint64_t)i], 0x5a);
    ck_assert_int_eq(finish(send_map(other_tenant, "kv", 4096)), KVP_EPERM);
    shell_audit(shell);
}
END_TEST

START_TEST(each_slab_of_a_pool_has_room_for_regions_of_its_own)
{
    Kvpool__V1__MapRegionRequest request = region("kv", 3 * MIB);
    Kvpool__V1__MapRegionReply first = taken(send(a, request));
    request.rank = 1;
    Kvpool__V1__MapRegionReply second = taken(send(a, request));
    ck_assert(first.offset == 2 * MIB && second.offset == 2 * MIB && !second.existed);
    assert_refused(send_map(a, "more", 3 * MIB), KVP_ELIMIT, "are missing");
    ck_assert_uint_eq(mapped(a, "more", 2 * MIB).offset, 6 * MIB); /* 5 MiB are rounded up to 6 */
    request.rank = 2;
    assert_refused(send(a, request), KVP_EINVAL, "rank: 2, pool \"p\" has 2 slabs");
}
END_TEST

START_TEST(a_region_given_up_leaves_its_place_to_the_next)
{
    uint64_t offset = mapped(a, "kv", 8192).offset;
    ck_assert_uint_gt(mapped(a, "behind", 4096).offset, offset);
    ck_assert_int_eq(unmap(a, "kv", true), KVP_OK);
    ck_assert(mapped(a, "kv", 8192).existed);
    ck_assert_int_eq(unmap(a, "kv", false), KVP_OK);
    ck_assert_int_eq(unmap(a, "kv", false), KVP_OK);
    Kvpool__V1__MapRegionReply next = mapped(a, "next", 100);
    ck_assert(next.offset == offset && !next.existed);
}
END_TEST

/* ---- what can not be --------------------------------------------------------------------------------------------- */

START_TEST(another_size_is_refused_with_both_sizes)
{
    mapped(a, "kv", 4096);
    assert_refused(send_map(b, "kv", 8192), KVP_EMISMATCH, "bytes: 8192, region \"kv\" of pool \"p\" has 4096");
    ck_assert_uint_eq(mapped(b, "kv", 0).bytes, 4096);
}
END_TEST

START_TEST(what_a_region_lacks_is_said)
{
    char long_name[KVP_NAME_BYTES_MAX + 2] = {0};
    memset(long_name, 'n', sizeof(long_name) - 1);
    assert_refused(send_map(a, "kv", 40961), KVP_EINVAL, "bytes: 40961, pool \"p\" has 40960");
    assert_refused(send_map(a, "kv", 0), KVP_ENOENT, "has no region \"kv\" in slab 0");
    assert_refused(send_map(a, "", 1), KVP_EINVAL, "name: 0 bytes");
    assert_refused(send_map(a, "a b", 1), KVP_EINVAL, "name: byte 1");
    assert_refused(send_map(a, long_name, 1), KVP_EINVAL, "name: 64 bytes, must be 1 to 63");
    assert_refused(send_unmap(a, "", false, 0), KVP_EINVAL, "name: 0 bytes");
    mapped(a, "kv", 20000);
    struct shell_call *call = send_map(a, "more", 30000);
    ck_assert_uint_eq(shell_missing(call), 30000 - (40960 - 20480));
    assert_refused(call, KVP_ELIMIT, "is of 20480, 9520 are missing");
    Kvpool__V1__MapRegionRequest request = KVPOOL__V1__MAP_REGION_REQUEST__INIT;
    request.pool = (char *)"q";
    request.name = (char *)"kv";
    call = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base);
    assert_refused(call, KVP_ENOENT, "there is no \"q\"");
    request.pool = (char *)"p";
    call = shell_call(shell, shell_grpc(1000, 7), KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base);
    assert_refused(call, KVP_ESESSION, "MapRegion needs a session");
    call = shell_call(shell, shell_tcp(), KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base);
    assert_refused(call, KVP_EPERM, "MapRegion is not served over TCP");
    shell_audit(shell);
}
END_TEST

START_TEST(regions_are_refused_beyond_the_limit_of_all_pools)
{
    struct pool_of large = host_pool;
    char name[16];
    large.name = "large";
    large.region_bytes = (KVP_REGIONS_MAX + 1) * 4096ull;
    shell_make_pool(shell, a, &large);
    Kvpool__V1__MapRegionRequest request = KVPOOL__V1__MAP_REGION_REQUEST__INIT;
    request.pool = (char *)"large";
    request.name = name;
    request.bytes = 1;
    struct shell_call *call = NULL;
    for (uint32_t i = 0; i <= KVP_REGIONS_MAX; i++) {
        snprintf(name, sizeof(name), "r%u", i);
        call = shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base);
        if (i < KVP_REGIONS_MAX)
            ck_assert_int_eq(finish(call), KVP_OK);
    }
    assert_refused(call, KVP_ELIMIT, "regions: 4096 exist, the most there may be");
    shell_audit(shell);
}
END_TEST

START_TEST(another_tenant_neither_maps_nor_frees_a_region)
{
    mapped(a, "kv", 4096);
    assert_refused(send_map(other_tenant, "kv", 4096), KVP_EPERM, "region \"kv\" belongs to another tenant, 1000");
    ck_assert_int_eq(unmap(other_tenant, "kv", false), KVP_EPERM);
    ck_assert_int_eq(unmap(other_tenant, "kv", true), KVP_EPERM);
    mapped(other_tenant, "theirs", 4096);
    ck_assert_int_eq(finish(send_map(a, "theirs", 4096)), KVP_EPERM);
}
END_TEST

/* ---- who has it mapped ------------------------------------------------------------------------------------------- */

START_TEST(a_region_is_not_given_up_while_another_session_has_it_mapped)
{
    mapped(a, "kv", 4096);
    mapped(b, "kv", 4096);
    assert_refused(send_unmap(a, "kv", false, 0), KVP_EBUSY, "region \"kv\" is mapped by session");
    ck_assert(mapped(a, "kv", 4096).existed);
    ck_assert_int_eq(unmap(b, "kv", true), KVP_OK);
    ck_assert_int_eq(unmap(a, "kv", true), KVP_OK);
    ck_assert_int_eq(unmap(b, "kv", false), KVP_OK); /* who has it not mapped may, too: the tenant is the same */
    ck_assert_int_eq(finish(send_map(a, "kv", 0)), KVP_ENOENT);
}
END_TEST

START_TEST(an_exclusive_mapping_waits_for_the_last_mappers_proven_end)
{
    mapped(a, "kv", 4096);
    ck_assert(mapped_alone(a, "kv", 4096).existed);
    assert_refused(send_map_alone(b, "kv", 4096), KVP_EBUSY, "of process 41");
    kvp_core_disconnected(shell->core, a.session);
    shell_run_ms(shell, 10);
    assert_refused(send_map_alone(b, "kv", 4096), KVP_EAGAIN, "of process 41, which died and is not proven gone");
    assert_refused(send_unmap(b, "kv", false, 0), KVP_EAGAIN, "not proven gone");
    kvp_core_process_ended(shell->core, a.session);
    shell_run_ms(shell, 10);
    ck_assert(mapped_alone(b, "kv", 4096).existed);
    ck_assert_int_eq(unmap(b, "kv", false), KVP_OK);
}
END_TEST

START_TEST(a_dead_mapper_that_lingers_for_its_durable_sequences_is_not_waited_for)
{
    struct pool_of lingering = host_pool;
    uint64_t seq;
    Kvpool__V1__MapRegionRequest request = KVPOOL__V1__MAP_REGION_REQUEST__INIT;
    lingering.name = "lingers";
    lingering.linger_ms = 60000;
    shell_make_pool(shell, a, &lingering);
    ck_assert_int_eq(shell_open(shell, a, "lingers", 1, true, &seq), KVP_OK);
    ck_assert_int_eq(shell_advance(shell, a, "lingers", seq, 8, 5), KVP_OK);
    request.pool = (char *)"lingers";
    request.name = (char *)"kv";
    request.bytes = 4096;
    request.exclusive = true;
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base)), KVP_OK);
    kill_process(a);
    ck_assert_uint_eq(shell_length(shell, b, "lingers", seq), 5);
    ck_assert_int_eq(finish(shell_call(shell, b, KVPOOL__V1__METHOD__METHOD_MAP_REGION, &request.base)), KVP_OK);
    shell_audit(shell);
}
END_TEST

START_TEST(on_a_gpu_the_driver_must_list_the_dead_mapper_no_more)
{
    shell->listing_known = true;
    shell->pids[0] = 41;
    shell->n_pids = 1;
    shell_run_ms(shell, 2000);
    mapped(a, "kv", MIB);
    kill_process(a);
    ck_assert_int_eq(finish(send_map_alone(b, "kv", MIB)), KVP_EAGAIN);
    shell->n_pids = 0;
    shell_run_ms(shell, 2000);
    ck_assert(mapped_alone(b, "kv", MIB).existed);
}
END_TEST

START_TEST(a_detached_session_has_no_region_mapped)
{
    Kvpool__V1__DetachRequest request = KVPOOL__V1__DETACH_REQUEST__INIT;
    mapped(a, "kv", 4096);
    request.pool = (char *)"p";
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_DETACH, &request.base)), KVP_OK);
    ck_assert(mapped_alone(b, "kv", 4096).existed);
}
END_TEST

START_TEST(a_call_repeated_is_answered_and_not_done_again)
{
    Kvpool__V1__MapRegionRequest request = region("kv", 4096);
    request.call_id = 5;
    Kvpool__V1__MapRegionReply first = taken(send(a, request)), again = taken(send(a, request));
    ck_assert(!first.existed && !again.existed && again.offset == first.offset);
    request.call_id = 6;
    ck_assert(taken(send(a, request)).existed);
    ck_assert_int_eq(finish(send_unmap(a, "kv", false, 7)), KVP_OK);
    mapped(b, "kv", 8192);
    ck_assert_int_eq(finish(send_unmap(a, "kv", false, 7)), KVP_OK);
    ck_assert_uint_eq(mapped(b, "kv", 0).bytes, 8192);
}
END_TEST

/* ---- the pool's end ---------------------------------------------------------------------------------------------- */

START_TEST(a_pool_with_regions_is_not_deleted_and_says_how_many_there_are)
{
    Kvpool__V1__DeletePoolRequest request = KVPOOL__V1__DELETE_POOL_REQUEST__INIT;
    mapped(a, "kv/0", 4096);
    mapped(a, "kv/1", 4096);
    kill_process(a);
    request.pool = (char *)"p";
    assert_refused(shell_call(shell, b, KVPOOL__V1__METHOD__METHOD_DELETE_POOL, &request.base), KVP_EBUSY,
                   "has 0 sessions attached, 0 sequences open, 0 whose pages are not back yet, 2 regions");
    ck_assert_int_eq(unmap(b, "kv/0", false), KVP_OK);
    ck_assert_int_eq(unmap(b, "kv/1", false), KVP_OK);
    ck_assert_int_eq(shell_delete_pool(shell, b, "p"), KVP_OK);
}
END_TEST

START_TEST(a_lost_pool_maps_no_region_and_goes_with_those_it_has)
{
    struct pool_of legacy = {.name = "old", .pages = 5, .page_tokens = 4, .layers = 1, .region_bytes = 4 * MIB};
    Kvpool__V1__MapRegionRequest request = region("kv", MIB);
    Kvpool__V1__UnmapRegionRequest give_up = KVPOOL__V1__UNMAP_REGION_REQUEST__INIT;
    legacy.legacy = true;
    shell_make_pool(shell, b, &legacy);
    request.pool = give_up.pool = (char *)"old";
    taken(send(a, request));
    request.name = give_up.name = (char *)"other";
    taken(send(a, request));
    for (uint32_t i = 0; i < KVP_GPUS_MAX; i++) {
        if (shell->executors[i].running)
            shell_executor_kill(shell, i);
    }
    shell_pump(shell);
    ck_assert_int_eq(finish(send(a, request)), KVP_ELOST);
    ck_assert_int_eq(finish(shell_call(shell, a, KVPOOL__V1__METHOD__METHOD_UNMAP_REGION, &give_up.base)), KVP_OK);
    ck_assert_int_eq(shell_delete_pool(shell, b, "old"), KVP_EBUSY);
    kill_process(a);
    ck_assert_int_eq(shell_delete_pool(shell, b, "old"), KVP_OK);
    shell_audit(shell);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("core_regions");
    TCase *host = tcase_create("host"), *cuda = tcase_create("cuda");
    tcase_add_checked_fixture(host, begin, end);
    tcase_add_test(host, a_region_lies_behind_the_pages_and_is_found_again_by_its_name);
    tcase_add_test(host, a_region_and_its_bytes_survive_their_maker_and_the_daemon);
    tcase_add_test(host, a_region_given_up_leaves_its_place_to_the_next);
    tcase_add_test(host, another_size_is_refused_with_both_sizes);
    tcase_add_test(host, what_a_region_lacks_is_said);
    tcase_add_test(host, regions_are_refused_beyond_the_limit_of_all_pools);
    tcase_add_test(host, another_tenant_neither_maps_nor_frees_a_region);
    tcase_add_test(host, a_region_is_not_given_up_while_another_session_has_it_mapped);
    tcase_add_test(host, an_exclusive_mapping_waits_for_the_last_mappers_proven_end);
    tcase_add_test(host, a_dead_mapper_that_lingers_for_its_durable_sequences_is_not_waited_for);
    tcase_add_test(host, a_detached_session_has_no_region_mapped);
    tcase_add_test(host, a_call_repeated_is_answered_and_not_done_again);
    tcase_add_test(host, a_pool_with_regions_is_not_deleted_and_says_how_many_there_are);
    tcase_add_checked_fixture(cuda, begin_cuda, end);
    tcase_add_test(cuda, each_slab_of_a_pool_has_room_for_regions_of_its_own);
    tcase_add_test(cuda, a_lost_pool_maps_no_region_and_goes_with_those_it_has);
    tcase_add_test(cuda, on_a_gpu_the_driver_must_list_the_dead_mapper_no_more);
    suite_add_tcase(suite, host);
    suite_add_tcase(suite, cuda);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
