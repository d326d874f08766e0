/**
 * libkvpool against a real daemon: every call once, right and wrong, and the bytes that two sessions see.
 */
#include "client_house.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- pools and sessions ------------------------------------------------------------------------------------------ */

START_TEST(a_pool_is_described_as_it_was_made)
{
    struct kvp_plane_spec planes[2] = {{0, KVP_COMPONENT_CKV, 1, 512, KVP_DTYPE_BF16},
                                       {0, KVP_COMPONENT_KPE, 1, 64, KVP_DTYPE_BF16}};
    struct kvp_pool_spec spec = {.name = "mla",
                                 .model = "of tests",
                                 .layout = {.pages = 8, .page_tokens = 4, .n_planes = 2, .planes = planes, .joined = 1},
                                 .reserved_pages = 1,
                                 .max_sequences = 3};
    struct kvp_pool_info *made, *described;

    ck_ok(kvp_pool_create(client, &spec, &made));
    ck_ok(kvp_pool_describe(client, "mla", &described));
    ck_assert_str_eq(described->spec.model, "of tests");
    ck_assert_uint_eq(described->spec.layout.order, KVP_ORDER_NHD);
    ck_assert_uint_eq(described->spec.layout.planes[1].dim, 64);
    ck_assert_uint_eq(described->planes[1].offset, 512 * 2);
    ck_assert_uint_eq(described->page_bytes, 4 * 576 * 2);
    ck_assert_uint_eq(described->free_pages, 7);
    ck_assert_uint_eq(described->spec.max_sequence_tokens, 8 * 4);
    ck_assert_uint_eq(described->layout_digest[0], made->layout_digest[0]);
    kvp_pool_info_free(made);
    kvp_pool_info_free(described);
    ck_ok(kvp_pool_delete(client, "mla"));
    ck_assert_int_eq(kvp_pool_describe(client, "mla", &described), KVP_ENOENT);
}
END_TEST

START_TEST(attach_refuses_another_model_or_layout)
{
    uint64_t digest[2] = {1, 2};
    struct kvp_attach_options options = {.model = "another"};
    struct kvp_pool *again;

    ck_assert_int_eq(kvp_attach(client, "p", &options, &again), KVP_EMISMATCH);
    options = (struct kvp_attach_options){.layout_digest = digest};
    ck_assert_int_eq(kvp_attach(client, "p", &options, &again), KVP_EMISMATCH);
    ck_assert_int_eq(kvp_attach(client, "nowhere", NULL, &again), KVP_ENOENT);
    options.layout_digest = kvp_pool_info(pool)->layout_digest;
    ck_ok(kvp_attach(client, "p", &options, &again));
    ck_ok(kvp_detach(again));
}
END_TEST

START_TEST(a_pool_with_open_sequences_stays_attached)
{
    struct kvp_seq seq = open_one(pool, 1);

    ck_assert_int_eq(kvp_detach(pool), KVP_EBUSY);
    ck_assert_int_eq(kvp_pool_delete(client, "p"), KVP_EBUSY);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(a_session_by_lease_is_used_by_one_client_after_another)
{
    struct kvp_connect_options options = {0};
    struct kvp_session_info opened, seen;
    struct kvp_client *first, *second;
    struct kvp_seq seq, found;
    struct kvp_pool *p;

    ck_ok(kvp_session_open(client, 60000, "tests", NULL, 0, &opened));
    ck_assert_uint_eq(opened.lease_ms, 60000);
    ck_assert_uint_gt(opened.resume_secret_bytes, 0);
    options.session = opened.token;
    ck_ok(kvp_connect(daemon_.socket, &options, &first));
    ck_ok(kvp_attach(first, "p", NULL, &p));
    seq = open_one(p, 77);
    kvp_disconnect(first);

    ck_ok(kvp_connect(daemon_.socket, &options, &second));
    ck_ok(kvp_session_info(second, &seen));
    ck_assert_uint_eq(seen.session_id, opened.session_id);
    ck_ok(kvp_attach(second, "p", NULL, &p));
    found = open_one(p, 77);
    ck_assert_uint_eq(found.slot, seq.slot);
    ck_assert_uint_eq(found.generation, seq.generation);
    ck_ok(kvp_seq_close(p, 1, &seq, NULL));
    ck_ok(kvp_detach(p));
    ck_ok(kvp_session_close(second, opened.token));
    ck_assert_int_eq(kvp_session_info(second, &seen), KVP_ESESSION);
    kvp_disconnect(second);
}
END_TEST

/* ---- regions ----------------------------------------------------------------------------------------------------- */

START_TEST(a_region_and_its_bytes_are_found_again_after_its_makers_session)
{
    struct kvp_region_info *regions;
    struct kvp_region made, found;
    struct kvp_client *other;
    struct kvp_pool *theirs;
    size_t n;

    ck_ok(kvp_connect(daemon_.socket, NULL, &other));
    ck_ok(kvp_attach(other, "p", NULL, &theirs));
    ck_ok(kvp_region_map(theirs, 0, "kv/0", 5000, KVP_REGION_EXCLUSIVE, &made));
    ck_assert(!made.existed && made.bytes == 5000);
    ck_assert_ptr_eq(made.address, (unsigned char *)kvp_slab(theirs, 0) + made.offset);
    memset(made.address, 0x5a, made.bytes);
    ck_assert_int_eq(kvp_region_map(pool, 0, "kv/0", 5000, KVP_REGION_EXCLUSIVE, &found), KVP_EBUSY);
    ck_ok(kvp_detach(theirs));
    kvp_disconnect(other);

    ck_ok(kvp_region_map(pool, 0, "kv/0", 0, KVP_REGION_EXCLUSIVE, &found));
    ck_assert(found.existed && found.bytes == 5000 && found.offset == made.offset);
    for (size_t i = 0; i < found.bytes; i++)
        ck_assert_uint_eq(((unsigned char *)found.address)[i], 0x5a);
    ck_ok(kvp_region_map(pool, 0, "kv/1", 1, 0, &made));
    ck_ok(kvp_region_list(client, "p", &regions, &n));
    ck_assert_uint_eq(n, 2);
    ck_assert_str_eq(regions[0].name, "kv/0");
    ck_assert(regions[0].offset == found.offset && regions[0].bytes == 5000 && regions[0].mapped == 1);
    ck_assert(regions[0].tenant == getuid() && regions[0].rank == 0);
    ck_assert_str_eq(regions[1].name, "kv/1");
    free(regions);
    ck_assert_int_eq(kvp_pool_delete(client, "p"), KVP_EBUSY);
    ck_ok(kvp_region_unmap(pool, 0, "kv/0", KVP_REGION_KEEP));
    ck_ok(kvp_region_unmap(pool, 0, "kv/0", 0));
    ck_ok(kvp_region_unmap(pool, 0, "kv/1", 0));
    ck_ok(kvp_region_list(client, "p", &regions, &n));
    ck_assert_uint_eq(n, 0);
    free(regions);
}
END_TEST

START_TEST(a_region_that_can_not_be_is_refused_with_the_values)
{
    struct kvp_attach_options metadata = {.metadata_only = true};
    struct kvp_region_info *regions;
    struct kvp_region region;
    struct kvp_client *other;
    struct kvp_pool *theirs;
    size_t n;

    ck_ok(kvp_region_map(pool, 0, "kv", 4096, 0, &region));
    ck_assert_int_eq(kvp_region_map(pool, 0, "kv", 8192, 0, &region), KVP_EMISMATCH);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "bytes: 8192, region \"kv\" of pool \"p\" has 4096"));
    ck_assert_int_eq(kvp_region_map(pool, 0, "more", REGION_BYTES, 0, &region), KVP_ELIMIT);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "is of 61440, 4096 are missing"));
    ck_assert_int_eq(kvp_region_map(pool, 0, "more", REGION_BYTES + 1, 0, &region), KVP_EINVAL);
    ck_assert_int_eq(kvp_region_map(pool, 0, "nowhere", 0, 0, &region), KVP_ENOENT);
    ck_assert_int_eq(kvp_region_map(pool, 0, NULL, 1, 0, &region), KVP_EINVAL);
    ck_assert_int_eq(kvp_region_map(pool, 1, "kv", 4096, 0, &region), KVP_EINVAL);
    ck_assert_ptr_nonnull(strstr(kvp_error_text(), "rank 1 of pool p is not mapped"));
    ck_assert_int_eq(kvp_region_map(pool, 0, "kv", 4096, KVP_REGION_KEEP, &region), KVP_EINVAL);
    ck_assert_int_eq(kvp_region_unmap(pool, 0, "kv", KVP_REGION_EXCLUSIVE), KVP_EINVAL);
    ck_assert_int_eq(kvp_region_unmap(pool, 9, "kv", 0), KVP_EINVAL);
    ck_assert_int_eq(kvp_region_list(client, "nowhere", &regions, &n), KVP_ENOENT);
    ck_ok(kvp_connect(daemon_.socket, NULL, &other));
    ck_ok(kvp_attach(other, "p", &metadata, &theirs));
    ck_assert_int_eq(kvp_region_map(theirs, 0, "kv", 4096, 0, &region), KVP_EINVAL);
    ck_assert_int_eq(kvp_region_unmap(theirs, 0, "kv", 0), KVP_EBUSY);
    ck_ok(kvp_region_unmap(pool, 0, "kv", KVP_REGION_KEEP));
    ck_ok(kvp_region_unmap(theirs, 0, "kv", 0));
    ck_ok(kvp_region_unmap(theirs, 0, "kv", 0));
    kvp_disconnect(other);
}
END_TEST

/* ---- the main path ----------------------------------------------------------------------------------------------- */

START_TEST(tokens_written_here_are_read_in_place_by_another_session)
{
    struct kvp_client *other;
    struct kvp_pool *theirs;
    struct kvp_seq seq = open_one(pool, 1), held;
    uint64_t key = 9;
    uint32_t length, n_copies, n;
    struct kvp_page_copy copy;
    struct kvp_step *step;
    int32_t pages[8];

    write_tokens(pool, seq, 0, 21, 100);
    ck_ok(kvp_seq_len(pool, seq, &length));
    ck_assert_uint_eq(length, 21);

    ck_ok(kvp_connect(daemon_.socket, NULL, &other));
    ck_ok(kvp_attach(other, "p", NULL, &theirs));
    ck_ok(kvp_fork(theirs, 1, &seq, &key, NULL, &held, &copy, &n_copies, NULL));
    ck_assert_uint_eq(n_copies, 1);
    ck_assert_uint_eq(copy.tokens, 21 % PAGE_TOKENS);
    ck_ok(kvp_step_create(theirs, 0, 4, 64, 64, &step));
    ck_ok(kvp_copy_owed(step, n_copies, &copy, NULL));
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL)); /* what is held stays */
    ck_ok(kvp_seq_len(theirs, held, &length));
    ck_assert_uint_eq(length, 21);
    ck_ok(kvp_row(theirs, held, 8, pages, &n));
    ck_assert_uint_eq(n, 6);
    ck_assert_int_eq(pages[5], copy.destination);
    check_tokens(theirs, held, 0, 21, 100);
    kvp_step_destroy(step);
    ck_ok(kvp_seq_close(theirs, 1, &held, NULL));
    ck_ok(kvp_detach(theirs));
    kvp_disconnect(other);
}
END_TEST

START_TEST(a_step_computes_what_the_calls_answer)
{
    struct kvp_seq seqs[2] = {open_one(pool, 1), open_one(pool, 2)};
    uint32_t tokens[2] = {5, 3}, start[2] = {6, 0}, reserved[2] = {11, 3}, after[2] = {11, 3};
    int32_t batch[8], positions[8], indptr[3], indices[16], last[2];
    struct kvp_step_view view;
    struct kvp_step *step;
    int64_t slots[8];

    write_tokens(pool, seqs[0], 0, 6, 1);
    ck_ok(kvp_advance(pool, 2, seqs, reserved, NULL, 0, NULL, NULL, NULL));
    ck_ok(kvp_step_create(pool, 0, 2, 8, 16, &step));
    ck_ok(kvp_step_begin(step, 2, seqs, tokens, start, NULL));
    kvp_step_view(step, &view);
    ck_ok(kvp_get_batch_indices(pool, 2, seqs, tokens, NULL, batch, positions, slots));
    ck_ok(kvp_get_page_table(pool, 2, seqs, after, 16, indptr, indices, last, NULL));
    ck_assert_uint_eq(view.nnz, 8);
    ck_assert_mem_eq(view.batch_indices, batch, sizeof(batch));
    ck_assert_mem_eq(view.positions, positions, sizeof(positions));
    ck_assert_mem_eq(view.slot_mapping, slots, sizeof(slots));
    ck_assert_mem_eq(view.kv_indptr, indptr, sizeof(indptr));
    ck_assert_mem_eq(view.kv_indices, indices, (size_t)indptr[2] * sizeof(int32_t));
    ck_assert_mem_eq(view.kv_last_page_len, last, sizeof(last));
    ck_assert_mem_eq(view.seq_lens, after, sizeof(after));
    ck_ok(kvp_step_begin(step, 2, seqs, tokens, NULL, NULL)); /* start as reported so far: the same */
    ck_assert_mem_eq(view.slot_mapping, slots, sizeof(slots));
    ck_assert_uint_eq(kvp_step_errors(step, NULL), 0);
    kvp_step_destroy(step);
    ck_ok(kvp_seq_close(pool, 2, seqs, NULL));
}
END_TEST

START_TEST(a_step_over_what_is_reserved_or_made_is_refused)
{
    struct kvp_seq seq = open_one(pool, 1);
    uint32_t tokens = 3, start = 0, reserved = 2, length;
    struct kvp_step *step;

    ck_ok(kvp_advance(pool, 1, &seq, &reserved, NULL, 0, NULL, NULL, NULL));
    ck_ok(kvp_step_create(pool, 0, 1, 4, 4, &step));
    ck_assert_int_eq(kvp_step_begin(step, 1, &seq, &tokens, &start, NULL), KVP_EMISMATCH);
    tokens = 2;
    ck_ok(kvp_step_begin(step, 1, &seq, &tokens, &start, NULL));
    tokens = 3;
    ck_assert_int_eq(kvp_step_begin(step, 1, &seq, &tokens, &start, NULL), KVP_EMISMATCH);
    ck_ok(kvp_progress(step, NULL)); /* nothing is begun, nor what was begun before */
    ck_ok(kvp_seq_len(pool, seq, &length));
    ck_assert_uint_eq(length, 0);
    tokens = 5;
    ck_assert_int_eq(kvp_step_begin(step, 1, &seq, &tokens, &start, NULL), KVP_EINVAL);
    ck_assert_int_eq(kvp_step_begin(step, 2, &seq, &tokens, &start, NULL), KVP_EINVAL);
    ck_assert_int_eq(kvp_append(step, PLANES, 1, NULL, NULL), KVP_EINVAL);
    ck_assert_int_eq(kvp_step_create(pool, 1, 1, 4, 4, &step), KVP_EINVAL);
    ck_assert_int_eq(kvp_step_create(pool, 0, 0, 4, 4, &step), KVP_EINVAL);
    kvp_step_destroy(step);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(pages_are_read_into_a_dense_buffer)
{
    struct kvp_seq seq = open_one(pool, 1);
    unsigned char bytes[2 * PLANES * PAGE_TOKENS * ROW_BYTES];
    struct kvp_step *step;
    int32_t pages[2];
    uint32_t n;

    write_tokens(pool, seq, 0, 8, 50);
    ck_ok(kvp_row(pool, seq, 2, pages, &n));
    ck_assert_uint_eq(n, 2);
    ck_ok(kvp_step_create(pool, 0, 1, 4, 4, &step));
    ck_ok(kvp_read_pages(step, 2, pages, bytes, NULL));
    for (uint32_t i = 0; i < 8; i++)
        for (uint32_t p = 0; p < PLANES; p++)
            ck_assert_uint_eq(bytes[((i / PAGE_TOKENS * PLANES + p) * PAGE_TOKENS + i % PAGE_TOKENS) * ROW_BYTES],
                              token_byte(50, p, i));
    ck_assert_int_eq(kvp_read_pages(step, 5, pages, bytes, NULL), KVP_EINVAL);
    kvp_step_destroy(step);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

/* ---- sequences --------------------------------------------------------------------------------------------------- */

START_TEST(advance_is_all_or_nothing_and_says_how_many_pages_are_missing)
{
    struct kvp_seq seqs[2] = {open_one(pool, 1), open_one(pool, 2)};
    uint32_t reserved[2] = {PAGE_TOKENS, PAGES * PAGE_TOKENS}, missing = 0, n;

    ck_assert_int_eq(kvp_advance(pool, 2, seqs, reserved, NULL, 0, NULL, NULL, &missing), KVP_ENOPAGES);
    ck_assert_uint_eq(missing, 1);
    ck_ok(kvp_row(pool, seqs[0], 0, NULL, &n));
    ck_assert_uint_eq(n, 0);
    reserved[1] = 1;
    ck_ok(kvp_advance(pool, 2, seqs, reserved, NULL, 0, NULL, NULL, NULL));
    reserved[0] = 0;
    ck_assert_int_eq(kvp_advance(pool, 2, seqs, reserved, NULL, 0, NULL, NULL, NULL), KVP_EINVAL);
    ck_ok(kvp_advance(pool, 2, seqs, reserved, NULL, KVP_TRUNCATE, NULL, NULL, NULL));
    ck_ok(kvp_seq_close(pool, 1, seqs, NULL));
    ck_assert_int_eq(kvp_advance(pool, 2, seqs, reserved, NULL, 0, NULL, NULL, NULL), KVP_ESTALE);
    ck_ok(kvp_seq_close(pool, 2, seqs, NULL));
}
END_TEST

START_TEST(advances_overlap_with_other_calls_and_each_other)
{
    struct kvp_seq seqs[3] = {open_one(pool, 1), open_one(pool, 2), open_one(pool, 3)};
    struct kvp_advance *advances[3];
    uint32_t reserved[3] = {4, 8, 12}, tokens[3], n;

    for (int i = 0; i < 3; i++)
        ck_ok(kvp_advance_begin(pool, 1, &seqs[i], &reserved[i], NULL, 0, &advances[i]));
    ck_ok(kvp_get_seq_lens(pool, 3, seqs, tokens));
    for (int i = 2; i >= 0; i--)
        ck_ok(kvp_advance_wait(advances[i], NULL, NULL, NULL));
    for (uint32_t i = 0; i < 3; i++) {
        ck_ok(kvp_row(pool, seqs[i], 0, NULL, &n));
        ck_assert_uint_eq(n, i + 1);
    }
    ck_ok(kvp_seq_close(pool, 3, seqs, NULL));
}
END_TEST

START_TEST(advances_of_one_sequence_may_be_waited_for_in_any_order)
{
    struct kvp_seq seq = open_one(pool, 1);
    uint32_t first = 4, second = 12, tokens = 12, start = 0, length;
    struct kvp_advance *advances[2];
    struct kvp_step *step;

    ck_ok(kvp_advance_begin(pool, 1, &seq, &first, NULL, 0, &advances[0]));
    ck_ok(kvp_advance_begin(pool, 1, &seq, &second, NULL, 0, &advances[1]));
    ck_ok(kvp_advance_wait(advances[1], NULL, NULL, NULL));
    ck_ok(kvp_advance_wait(advances[0], NULL, NULL, NULL));
    ck_ok(kvp_step_create(pool, 0, 1, tokens, PAGES, &step));
    ck_ok(kvp_step_begin(step, 1, &seq, &tokens, &start, NULL));
    ck_ok(kvp_progress(step, NULL));
    ck_ok(kvp_seq_len(pool, seq, &length));
    ck_assert_uint_eq(length, 12);
    kvp_step_destroy(step);

    second = 6; /* a cut is the later state, though it reserves less */
    first = 16;
    ck_ok(kvp_advance_begin(pool, 1, &seq, &first, NULL, 0, &advances[0]));
    ck_ok(kvp_advance_begin(pool, 1, &seq, &second, NULL, KVP_TRUNCATE, &advances[1]));
    ck_ok(kvp_advance_wait(advances[1], NULL, NULL, NULL));
    ck_ok(kvp_advance_wait(advances[0], NULL, NULL, NULL));
    tokens = 1;
    ck_ok(kvp_step_create(pool, 0, 1, tokens, PAGES, &step));
    ck_assert_int_eq(kvp_step_begin(step, 1, &seq, &tokens, NULL, NULL), KVP_EMISMATCH);
    kvp_step_destroy(step);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(a_pool_attached_twice_stays_attached_until_both_are_detached)
{
    struct kvp_pool *again;
    struct kvp_seq seq;
    uint32_t length;

    ck_ok(kvp_attach(client, "p", NULL, &again));
    seq = open_one(again, 1);
    ck_ok(kvp_detach(again));
    write_tokens(pool, seq, 0, 6, 1);
    ck_ok(kvp_get_seq_lens(pool, 1, &seq, &length));
    ck_assert_uint_eq(length, 6);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));

    ck_ok(kvp_attach(client, "p", NULL, &again));
    ck_ok(kvp_detach(again));
    seq = open_one(pool, 2);
    write_tokens(pool, seq, 0, 5, 2);
    ck_ok(kvp_get_seq_lens(pool, 1, &seq, &length));
    ck_assert_uint_eq(length, 5);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(a_transferred_sequence_is_found_by_its_key)
{
    struct kvp_seq seq = open_one(pool, 5), found;
    struct kvp_session_info receiver;
    struct kvp_client *other;
    struct kvp_pool *theirs;
    uint32_t length;

    write_tokens(pool, seq, 0, 7, 3);
    ck_ok(kvp_connect(daemon_.socket, NULL, &other));
    ck_ok(kvp_session_info(other, &receiver));
    ck_assert_int_eq(kvp_transfer(pool, 1, &seq, receiver.session_id, NULL, NULL), KVP_ENOENT);
    ck_ok(kvp_attach(other, "p", NULL, &theirs));
    ck_ok(kvp_transfer(pool, 1, &seq, receiver.session_id, NULL, NULL));
    found = open_one(theirs, 5);
    ck_assert_uint_eq(found.slot, seq.slot);
    ck_ok(kvp_seq_len(theirs, found, &length));
    ck_assert_uint_eq(length, 7);
    write_tokens(theirs, found, 7, 4, 3);
    check_tokens(pool, found, 0, 11, 3);
    ck_assert_int_eq(kvp_seq_close(pool, 1, &seq, NULL), KVP_EPERM);
    ck_ok(kvp_seq_close(theirs, 1, &found, NULL));
    ck_ok(kvp_detach(theirs));
    kvp_disconnect(other);
}
END_TEST

START_TEST(sequences_are_listed_from_slot_to_slot)
{
    struct kvp_seq seqs[5];
    struct kvp_seq_info infos[2];
    uint64_t keys[5] = {10, 11, 12, 13, 14};
    uint32_t from = 0, n, seen = 0;

    ck_ok(kvp_seq_open(pool, 5, keys, 0, seqs));
    do {
        ck_ok(kvp_seq_list(pool, false, 2, &from, infos, &n));
        for (uint32_t i = 0; i < n; i++, seen++) {
            ck_assert_uint_eq(infos[i].key, 10 + seen);
            ck_assert_int_eq(infos[i].state, KVP_SEQ_OPEN);
        }
    } while (from != 0);
    ck_assert_uint_eq(seen, 5);
    ck_ok(kvp_seq_close(pool, 5, seqs, NULL));
}
END_TEST

/* ---- on request -------------------------------------------------------------------------------------------------- */

START_TEST(an_append_on_request_writes_the_same_bytes)
{
    struct kvp_seq seq = open_one(pool, 1);
    uint32_t at = 0, tokens = 10, length;
    unsigned char bytes[PLANES * 10 * ROW_BYTES];
    struct kvp_append_request request = {
        .n = 1, .seqs = &seq, .at = &at, .tokens = &tokens, .bytes = bytes, .bytes_n = sizeof(bytes)};
    struct kvp_point done;

    for (uint32_t p = 0; p < PLANES; p++)
        for (uint32_t t = 0; t < 10; t++)
            fill_row(bytes + (p * 10 + t) * ROW_BYTES, 60, p, t);
    ck_ok(kvp_append_on_request(pool, &request, &done, NULL));
    ck_ok(kvp_timeline_wait(pool, done, TEST_WAIT_MS));
    ck_ok(kvp_get_seq_lens(pool, 1, &seq, &length));
    ck_assert_uint_eq(length, 10);
    check_tokens(pool, seq, 0, 10, 60);
    ck_assert_int_eq(kvp_append_on_request(pool, &request, &done, NULL), KVP_EMISMATCH);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

START_TEST(index_results_come_into_a_registered_buffer)
{
    struct kvp_index_outputs outputs = {.batch_indices = UINT64_MAX,
                                        .positions = 0,
                                        .slots = 64,
                                        .kv_indptr = UINT64_MAX,
                                        .kv_indices = UINT64_MAX,
                                        .kv_last_page_len = UINT64_MAX,
                                        .seq_lens = 256};
    struct kvp_seq seq = open_one(pool, 1);
    uint32_t tokens = 6, reserved = 6, buffer;
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int32_t positions[6];
    struct kvp_point done;
    unsigned char *at;
    int64_t slots[6];

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, 4096), 0);
    at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(at, MAP_FAILED);
    ck_assert_int_eq(kvp_buffer_register(client, "host", -1, NULL, 0, 4096, &buffer), KVP_EINVAL);
    ck_ok(kvp_buffer_register(client, "host", fd, NULL, 0, 4096, &buffer));
    ck_ok(kvp_advance(pool, 1, &seq, &reserved, NULL, 0, NULL, NULL, NULL));
    ck_ok(kvp_get_batch_indices_into(pool, 1, &seq, &tokens, NULL, buffer, &outputs, &done));
    ck_ok(kvp_timeline_wait(pool, done, TEST_WAIT_MS));
    ck_ok(kvp_get_batch_indices(pool, 1, &seq, &tokens, NULL, NULL, positions, slots));
    ck_assert_mem_eq(at, positions, sizeof(positions));
    ck_assert_mem_eq(at + 64, slots, sizeof(slots));
    ck_assert_mem_eq(at + 256, &tokens, sizeof(tokens));
    ck_ok(kvp_buffer_unregister(client, buffer));
    munmap(at, 4096);
    close(fd);
    ck_ok(kvp_seq_close(pool, 1, &seq, NULL));
}
END_TEST

/* ---- timelines, operations --------------------------------------------------------------------------------------- */

START_TEST(a_timeline_is_signalled_by_its_owner_and_waited_for_by_anybody)
{
    struct kvp_client *other;
    struct kvp_pool *theirs;
    struct kvp_point point;
    uint64_t *word;

    ck_ok(kvp_timeline_id(pool, 3, &point.timeline));
    ck_ok(kvp_timeline_value(pool, point.timeline, &point.value));
    point.value++;
    ck_assert_int_eq(kvp_timeline_wait(pool, point, 0), KVP_ETIMEDOUT);
    ck_ok(kvp_connect(daemon_.socket, NULL, &other));
    ck_ok(kvp_attach(other, "p", NULL, &theirs));
    ck_assert_int_eq(kvp_timeline_signal(theirs, point, NULL), KVP_EPERM);
    ck_ok(kvp_timeline_signal(pool, point, NULL));
    ck_ok(kvp_timeline_wait(theirs, point, TEST_WAIT_MS));
    ck_ok(kvp_timeline_wait_on(theirs, point, NULL));
    ck_ok(kvp_timeline_address(theirs, point.timeline, &word, NULL));
    ck_assert_uint_eq(*word, point.value);
    ck_assert_int_eq(kvp_timeline_id(pool, 0, &point.timeline), KVP_EINVAL);
    ck_assert_int_eq(kvp_timeline_value(pool, UINT32_MAX, &point.value), KVP_EINVAL);
    ck_ok(kvp_detach(theirs));
    kvp_disconnect(other);
}
END_TEST

/* Reach a point of a timeline of a session of its own, tell which, and end. */
static void reach_and_end(int told)
{
    struct kvp_client *own;
    struct kvp_pool *its;
    struct kvp_point point;

    if (kvp_connect(daemon_.socket, NULL, &own) != KVP_OK || kvp_attach(own, "p", NULL, &its) != KVP_OK ||
        kvp_timeline_id(its, 1, &point.timeline) != KVP_OK ||
        kvp_timeline_value(its, point.timeline, &point.value) != KVP_OK)
        _exit(1);
    point.value++;
    if (kvp_timeline_signal(its, point, NULL) != KVP_OK || write(told, &point, sizeof(point)) != sizeof(point))
        _exit(1);
    _exit(0);
}

START_TEST(a_point_that_was_reached_stays_so_when_its_owner_ends_and_what_was_not_is_never_taken_for_it)
{
    struct kvp_point reached, never;
    struct kvp_client *next;
    struct kvp_pool *theirs;
    int told[2], ended;
    uint32_t timeline;
    pid_t child;

    ck_assert_int_eq(pipe(told), 0);
    child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0)
        reach_and_end(told[1]);
    ck_assert_int_eq(read(told[0], &reached, sizeof(reached)), sizeof(reached));
    ck_assert_int_eq(waitpid(child, &ended, 0), child);
    never = (struct kvp_point){reached.timeline, reached.value + 1};
    ck_assert_int_eq(kvp_timeline_wait(pool, never, TEST_WAIT_MS), KVP_ESESSION);
    ck_ok(kvp_timeline_wait(pool, reached, 0));

    ck_ok(kvp_connect(daemon_.socket, NULL, &next)); /* in the dead one's place */
    ck_ok(kvp_attach(next, "p", NULL, &theirs));
    ck_ok(kvp_timeline_id(theirs, 1, &timeline));
    ck_assert_uint_eq(timeline, reached.timeline);
    ck_assert_int_eq(kvp_timeline_wait(pool, never, 0), KVP_ESESSION);
    ck_ok(kvp_timeline_wait(pool, reached, 0));
    ck_ok(kvp_detach(theirs));
    kvp_disconnect(next);
    close(told[0]);
    close(told[1]);
}
END_TEST

START_TEST(statistics_name_pools_sessions_and_executors)
{
    struct kvp_session_info me;
    struct kvp_stats *stats;
    bool found = false;

    ck_ok(kvp_session_info(client, &me));
    ck_ok(kvp_get_stats(client, &stats));
    ck_assert_str_eq(stats->backend, "host");
    ck_assert_uint_eq(stats->n_pools, 1);
    ck_assert_str_eq(stats->pools[0]->spec.name, "p");
    for (uint32_t i = 0; i < stats->n_sessions; i++)
        found =
            found || (stats->sessions[i].session_id == me.session_id && stats->sessions[i].pid == (uint32_t)getpid());
    ck_assert(found);
    ck_assert_uint_ge(stats->n_executors, 1);
    kvp_stats_free(stats);
}
END_TEST

/* Mappings of kvpool's memory over a page (a table's header) that a core dump would hold. @param ret_all  of them all */
static unsigned count_dumped(pid_t pid, unsigned *ret_all)
{
    char path[40], line[512];
    unsigned dumped = 0;
    bool ours = false;
    FILE *smaps;

    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
    smaps = fopen(path, "re");
    ck_assert_ptr_nonnull(smaps);
    *ret_all = 0;
    while (fgets(line, sizeof(line), smaps) != NULL) {
        unsigned long from, to;

        if (sscanf(line, "%lx-%lx ", &from, &to) == 2) {
            ours = strstr(line, "/memfd:kvp") != NULL && to - from > (unsigned long)sysconf(_SC_PAGESIZE);
            *ret_all += ours;
        } else if (ours && strncmp(line, "VmFlags:", 8) == 0) {
            dumped += strstr(line, " dd") == NULL;
        }
    }
    fclose(smaps);
    return dumped;
}

START_TEST(no_core_dump_of_any_process_holds_the_ledger_or_the_pages)
{
    unsigned mapped;
    struct kvp_stats *stats;
    pid_t executor;

    ck_ok(kvp_get_stats(client, &stats));
    ck_assert_uint_eq(stats->n_executors, 1);
    executor = (pid_t)stats->executors[0].pid;
    kvp_stats_free(stats);
    for (int i = 0; i < 3; i++) {
        pid_t pid = i == 0 ? daemon_.pid : i == 1 ? executor : getpid();

        ck_assert_uint_eq(count_dumped(pid, &mapped), 0);
        ck_assert_uint_gt(mapped, 0);
    }
}
END_TEST

/* Whether the daemon closes before or behind the client's first message is chance: both come up in so many tries. */
START_TEST(a_client_over_the_limit_learns_why_and_not_only_that_it_is_closed)
{
    static const char *const arguments[] = {"--backend", "host", "--set", "limits.connections=1", NULL};
    struct kvp_client *only, *other;

    test_daemon_start(&daemon_, NULL, arguments);
    ck_ok(kvp_connect(daemon_.socket, NULL, &only));
    for (int i = 0; i < 200; i++) {
        ck_assert_str_eq(kvp_status_name(kvp_connect(daemon_.socket, NULL, &other)), "KVP_ELIMIT");
        ck_assert_str_eq(kvp_error_text(), "limits.connections is reached");
    }
    kvp_disconnect(only);
    ck_assert_int_eq(test_daemon_stop(&daemon_), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_calls");
    TCase *tcase = tcase_create("calls");
    SRunner *runner = srunner_create(suite);
    int failed;

    tcase_add_checked_fixture(tcase, house_open, house_close);
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, a_pool_is_described_as_it_was_made);
    tcase_add_test(tcase, attach_refuses_another_model_or_layout);
    tcase_add_test(tcase, a_pool_with_open_sequences_stays_attached);
    tcase_add_test(tcase, a_session_by_lease_is_used_by_one_client_after_another);
    tcase_add_test(tcase, a_region_and_its_bytes_are_found_again_after_its_makers_session);
    tcase_add_test(tcase, a_region_that_can_not_be_is_refused_with_the_values);
    tcase_add_test(tcase, tokens_written_here_are_read_in_place_by_another_session);
    tcase_add_test(tcase, a_step_computes_what_the_calls_answer);
    tcase_add_test(tcase, a_step_over_what_is_reserved_or_made_is_refused);
    tcase_add_test(tcase, pages_are_read_into_a_dense_buffer);
    tcase_add_test(tcase, advance_is_all_or_nothing_and_says_how_many_pages_are_missing);
    tcase_add_test(tcase, advances_overlap_with_other_calls_and_each_other);
    tcase_add_test(tcase, advances_of_one_sequence_may_be_waited_for_in_any_order);
    tcase_add_test(tcase, a_pool_attached_twice_stays_attached_until_both_are_detached);
    tcase_add_test(tcase, a_transferred_sequence_is_found_by_its_key);
    tcase_add_test(tcase, sequences_are_listed_from_slot_to_slot);
    tcase_add_test(tcase, an_append_on_request_writes_the_same_bytes);
    tcase_add_test(tcase, index_results_come_into_a_registered_buffer);
    tcase_add_test(tcase, a_timeline_is_signalled_by_its_owner_and_waited_for_by_anybody);
    tcase_add_test(tcase, a_point_that_was_reached_stays_so_when_its_owner_ends_and_what_was_not_is_never_taken_for_it);
    tcase_add_test(tcase, statistics_name_pools_sessions_and_executors);
    tcase_add_test(tcase, no_core_dump_of_any_process_holds_the_ledger_or_the_pages);
    suite_add_tcase(suite, tcase);
    tcase = tcase_create("at a daemon of its own");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, a_client_over_the_limit_learns_why_and_not_only_that_it_is_closed);
    suite_add_tcase(suite, tcase);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
