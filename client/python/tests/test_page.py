"""kvpool.page beside naive loops, over numpy arrays and torch tensors on the host. test_page_gpu.py has the same on a
GPU."""
from __future__ import annotations

import os
import unittest

from support import HAS_NUMPY, HAS_TORCH, SEED, needs_numpy, run

import kvpool

if HAS_NUMPY:
    import numpy


class Forms:
    """The tests; `self.give` makes the library's array of a numpy one, `self.take` a numpy array of the library's."""

    raises_for_bad_indices = True

    def setUp(self) -> None:
        self.rng = numpy.random.default_rng(SEED)

    def give(self, array):
        raise NotImplementedError

    def take(self, array):
        raise NotImplementedError

    def ints(self, values, dtype="int32"):
        return self.give(numpy.array(values, dtype=dtype))

    def case(self, page: int, batch: int, pages: int = 64):
        """A random batch: lengths before and after, page ids, and what is appended to whom and where."""
        before = self.rng.integers(0, 3 * page, batch)
        counts = self.rng.integers(0, 2 * page + 1, batch)
        after = before + counts
        n_pages = -(-after // page)
        ids = self.rng.permutation(pages)[: n_pages.sum()]
        indptr = numpy.concatenate([[0], n_pages.cumsum()])
        last = numpy.where(after > 0, (after - 1) % page + 1, 0)
        append_indptr = numpy.concatenate([[0], counts.cumsum()])
        return after, ids, indptr, last, append_indptr

    def test_a_batch_is_appended_as_by_a_loop(self) -> None:
        for layout in ("NHD", "HND"):
            for joined in (True, False):
                for page, heads, dim, v_dim, dtype in ((1, 1, 1, 1, "float32"), (4, 3, 5, 5, "float16"),
                                                       (16, 2, 128, 128, "float16"), (5, 4, 64, 32, "float32")):
                    v_dim = dim if joined else v_dim
                    for bits in ("int32", "int64"):
                        with self.subTest(seed=SEED, layout=layout, joined=joined, page=page, bits=bits):
                            self.append_case(layout, joined, page, heads, dim, v_dim, dtype, bits)

    def append_case(self, layout, joined, page, heads, dim, v_dim, dtype, bits) -> None:
        after, ids, indptr, last, append_indptr = self.case(page, 6)
        nnz = int(append_indptr[-1])
        k = self.rng.standard_normal((nnz, heads, dim)).astype(dtype)
        v = self.rng.standard_normal((nnz, heads, v_dim)).astype(dtype)
        caches = [self.rng.standard_normal((64, page, heads, d)).astype(dtype) for d in (dim, v_dim)]
        expected = [cache.copy() for cache in caches]
        batch_indices, positions = [], []
        for b in range(6):
            for j in range(append_indptr[b], append_indptr[b + 1]):
                position = after[b] - append_indptr[b + 1] + j
                batch_indices.append(b)
                positions.append(position)
                place = ids[indptr[b] + position // page], position % page
                expected[0][place], expected[1][place] = k[j], v[j]
        if layout == "HND":
            caches = [cache.swapaxes(1, 2) for cache in caches]
        given = self.give(numpy.stack(caches, 1)) if joined else tuple(self.give(cache) for cache in caches)
        got_batch, got_positions = kvpool.get_batch_indices_positions(
            self.ints(append_indptr, bits), self.ints(after, bits), nnz)
        self.assertEqual((list(self.take(got_batch)), list(self.take(got_positions))), (batch_indices, positions))
        self.assertEqual(list(self.take(kvpool.get_seq_lens(self.ints(indptr, bits), self.ints(last, bits), page))),
                         list(after))
        kvpool.append_paged_kv_cache(self.give(k), self.give(v), got_batch, got_positions, given, self.ints(ids, bits),
                                     self.ints(indptr, bits), self.ints(last, bits), layout)
        for i in range(2):
            result = self.take(given)[:, i] if joined else self.take(given[i])
            result = result.swapaxes(1, 2) if layout == "HND" else result
            self.assertTrue(numpy.array_equal(result, expected[i]))

    def test_mla_is_appended_into_two_caches_or_slices_of_one(self) -> None:
        for ckv, kpe in ((512, 64), (16, 4)):
            after, ids, indptr, last, append_indptr = self.case(8, 5)
            nnz = int(append_indptr[-1])
            c, p = (self.rng.standard_normal((nnz, d)).astype("float32") for d in (ckv, kpe))
            batch, positions = kvpool.get_batch_indices_positions(self.ints(append_indptr), self.ints(after), nnz)
            table = (self.ints(ids), self.ints(indptr), self.ints(last))
            joined = self.give(numpy.zeros((64, 8, ckv + kpe), "float32"))
            apart = [self.give(numpy.zeros((64, 8, d), "float32")) for d in (ckv, kpe)]
            kvpool.append_paged_mla_kv_cache(self.give(c), self.give(p), batch, positions, joined[:, :, :ckv],
                                             joined[:, :, ckv:], *table)
            kvpool.append_paged_mla_kv_cache(self.give(c), None, batch, positions, apart[0], None, *table)
            kvpool.append_paged_mla_kv_cache(None, self.give(p), batch, positions, None, apart[1], *table)
            expected = numpy.zeros((64, 8, ckv + kpe), "float32")
            for j, (b, position) in enumerate(zip(self.take(batch), self.take(positions))):
                expected[ids[indptr[b] + position // 8], position % 8] = numpy.concatenate([c[j], p[j]])
            self.assertTrue(numpy.array_equal(self.take(joined), expected))
            self.assertTrue(numpy.array_equal(numpy.concatenate([self.take(a) for a in apart], 2), expected))

    def test_shapes_and_sizes_that_make_no_sense_are_told(self) -> None:
        k, cache = self.give(numpy.zeros((2, 1, 4), "float32")), self.give(numpy.zeros((3, 2, 4, 1, 4), "float32"))
        ends, lens = self.ints([0, 2]), self.ints([3])

        def csr(owners=(0, 0), ids=(0,), indptr=(0, 1), cache=cache):
            return lambda: kvpool.append_paged_kv_cache(k, k, self.ints(owners), self.ints([0, 1]), cache,
                                                        self.ints(ids), None if indptr is None else self.ints(indptr),
                                                        None)

        def rows(page_size):
            table = self.ints([[0], [1]]), self.ints([0, 0])
            return lambda: kvpool.append_paged_kv_cache(k, k, cache, *table, page_size)

        for kind, text, call in (
                (kvpool.InvalidArgument, r"batch_indices is \[2, 1\]", csr(owners=[[0], [0]])),
                (kvpool.InvalidArgument, r"kv_indices is \[1, 1\]", csr(ids=[[0]])),
                (kvpool.InvalidArgument, "kv_indptr is empty", csr(indptr=[])),
                (TypeError, "page_size, or kv_indices without kv_indptr", csr(indptr=None)),
                (kvpool.InvalidArgument, "no dimension may be 0", csr(cache=cache[:0])),
                (TypeError, "page_size.* is a float", rows(4.0)),
                (kvpool.InvalidArgument, "page_size 5; the cache has pages of 4", rows(5)),
                (kvpool.InvalidArgument, "page_size 0 is not in 1..4096", lambda: kvpool.get_seq_lens(ends, lens, 0)),
                (TypeError, "page_size is a float", lambda: kvpool.get_seq_lens(ends, lens, 4.0)),
                (kvpool.InvalidArgument, "nnz -1", lambda: kvpool.get_batch_indices_positions(ends, lens, -1)),
                (TypeError, "nnz is a str", lambda: kvpool.get_batch_indices_positions(ends, lens, "2"))):
            with self.subTest(text), self.assertRaisesRegex(kind, text):
                call()
        rows(numpy.int64(4))()
        if self.raises_for_bad_indices:
            with self.assertRaisesRegex(kvpool.InvalidArgument, "goes up to 9; kv_indices has 1"):
                csr(indptr=[0, 9])()
            with self.assertRaisesRegex(kvpool.InvalidArgument, "8589934592 is not in"):
                kvpool.get_batch_indices_positions(self.ints([0, 1 << 33], "int64"), self.ints([1 << 33], "int64"), 2)

    def test_a_half_of_an_mla_pair_alone_is_refused(self) -> None:
        c, cache = self.give(numpy.zeros((1, 4), "float32")), self.give(numpy.zeros((2, 4, 4), "float32"))
        where = (self.ints([0]), self.ints([0]))
        table = (self.ints([1]), self.ints([0, 1]), self.ints([1]))
        for values, caches, told in (((c, c), (cache, None), "of kpe there is only what is appended"),
                                     ((None, c), (cache, cache), "of ckv there is only the cache"),
                                     ((None, None), (None, None), "no cache")):
            with self.assertRaisesRegex(kvpool.InvalidArgument, told):
                kvpool.append_paged_mla_kv_cache(*values, *where, *caches, *table)

    def test_rows_of_pages_are_taken_as_the_document_means_them(self) -> None:
        page, heads, dim = 4, 2, 8
        rows = numpy.array([[5, 2, -1], [0, -1, -1], [7, 9, 3], [-1, -1, -1]])
        last = numpy.array([1, 3, 0, 0])
        held = numpy.array([5, 3, 8, 0])
        table, lens = self.ints(rows), self.ints(last)
        self.assertEqual(list(self.take(kvpool.get_seq_lens(table, lens, page))), list(held))
        batch, positions = kvpool.get_batch_indices_positions(table, lens, page)
        self.assertEqual(list(self.take(batch)), [b for b in range(4) for _ in range(held[b])])
        self.assertEqual(list(self.take(positions)), [i for b in range(4) for i in range(held[b])])
        k, v = (self.rng.standard_normal((3, heads, dim)).astype("float16") for _ in range(2))
        cache = self.give(numpy.zeros((10, 2, page, heads, dim), "float16"))
        kvpool.append_paged_kv_cache(self.give(k), self.give(v), cache, self.ints(rows[:3]), self.ints(last[:3]), page)
        both = self.give(numpy.zeros((10, page, heads, 2 * dim), "float16"))
        kvpool.append_paged_mla_kv_cache(self.give(k), self.give(v), both, self.ints(rows[:3]), self.ints(last[:3]),
                                         page)
        expected = numpy.zeros((10, 2, page, heads, dim), "float16")
        for b, place in enumerate(((2, 1), (0, 3), (3, 0))):
            expected[place[0], 0, place[1]], expected[place[0], 1, place[1]] = k[b], v[b]
        self.assertTrue(numpy.array_equal(self.take(cache), expected))
        self.assertTrue(numpy.array_equal(self.take(both), numpy.concatenate([expected[:, 0], expected[:, 1]], -1)))

    def test_padding_is_skipped_and_behind_the_last_token(self) -> None:
        batch, positions = kvpool.get_batch_indices_positions(self.ints([0, 2, 3]), self.ints([5, 1]), 6)
        self.assertEqual(list(self.take(batch)), [0, 0, 1, -1, -1, -1])
        self.assertEqual(list(self.take(positions)), [3, 4, 0, 0, 0, 0])
        k = self.rng.standard_normal((6, 1, 4)).astype("float32")
        cache = self.give(numpy.zeros((3, 2, 4, 1, 4), "float32"))
        kvpool.append_paged_kv_cache(self.give(k), self.give(k), batch, positions, cache, self.ints([2, 0, 1]),
                                     self.ints([0, 2, 3]), self.ints([1, 1]))
        result = self.take(cache)
        self.assertEqual(numpy.count_nonzero(result), 3 * 4 * 2)
        self.assertTrue(numpy.array_equal(result[1, 0, 0], k[2]))

    def test_outputs_may_be_given(self) -> None:
        batch, positions = self.ints([9] * 3), self.ints([9] * 3)
        kvpool.get_batch_indices_positions(self.ints([0, 1, 3]), self.ints([4, 2]), 3, batch, positions)
        self.assertEqual((list(self.take(batch)), list(self.take(positions))), ([0, 1, 1], [3, 0, 1]))
        with self.assertRaises(kvpool.InvalidArgument):
            kvpool.get_batch_indices_positions(self.ints([0, 1, 3]), self.ints([4, 2]), 4, batch, positions)

    def test_batches_over_one_launch_are_indexed_as_those_in_one(self) -> None:
        counts = self.rng.integers(0, 4, 5000)
        indptr, lens = numpy.concatenate([[0], counts.cumsum()]), counts + self.rng.integers(0, 9, 5000)
        nnz = int(indptr[-1]) + 3
        batch, positions = kvpool.get_batch_indices_positions(self.ints(indptr), self.ints(lens), nnz)
        owner = numpy.repeat(numpy.arange(5000), counts)
        expected = numpy.arange(nnz - 3) + lens[owner] - indptr[owner + 1]
        self.assertTrue(numpy.array_equal(self.take(batch), [*owner, -1, -1, -1]))
        self.assertTrue(numpy.array_equal(self.take(positions), [*expected, 0, 0, 0]))
        last = numpy.where(counts > 0, 2, 0)
        for n in (4096, 5000):
            got = self.take(kvpool.get_seq_lens(self.ints(indptr[: n + 1]), self.ints(last[:n]), 4))
            self.assertTrue(numpy.array_equal(got, numpy.where(counts > 0, (counts - 1) * 4 + 2, 0)[:n]))

    def test_nothing_to_append_is_fine(self) -> None:
        none = self.give(numpy.zeros((0, 1, 4), "float32"))
        cache = self.give(numpy.zeros((3, 2, 4, 1, 4), "float32"))
        kvpool.append_paged_kv_cache(none, none, self.ints([]), self.ints([]), cache, self.ints([]), self.ints([0]),
                                     self.ints([]))
        batch, positions = kvpool.get_batch_indices_positions(self.ints([0, 0]), self.ints([3]), 0)
        self.assertEqual((len(batch), len(positions)), (0, 0))

    def test_bad_indices_write_nothing_outside_and_are_told_on_the_host(self) -> None:
        k = self.rng.standard_normal((3, 1, 4)).astype("float32")
        for ids, batch, positions in (([0, 99], [0, 0, 0], [0, 4, 1]), ([0, 1], [0, 7, 0], [0, 1, 1]),
                                      ([0, 1], [0, 0, 0], [0, 800, 1])):
            whole = self.give(numpy.zeros((5, 2, 4, 1, 4), "float32"))
            cache = whole[1:3]
            call = (self.give(k), self.give(k), self.ints(batch), self.ints(positions), cache, self.ints(ids),
                    self.ints([0, 2]), self.ints([4]))
            if self.raises_for_bad_indices:
                with self.assertRaises(kvpool.BadIndex):
                    kvpool.append_paged_kv_cache(*call)
            else:
                kvpool.append_paged_kv_cache(*call)
            result = self.take(whole)
            self.assertEqual(numpy.count_nonzero(result), 2 * 2 * 4)
            self.assertTrue(numpy.array_equal(result[1, 1, :2], k[[0, 2]]))

    def test_rows_that_can_not_take_a_token_are_skipped(self) -> None:
        k = self.rng.standard_normal((4, 1, 4)).astype("float32")
        cache = self.give(numpy.zeros((5, 2, 4, 1, 4), "float32"))
        call = (self.give(k), self.give(k), cache, self.ints([[0, 1], [2, -1], [-1, -1], [3, -1]]),
                self.ints([4, 4, 0, 2]), 4)
        if self.raises_for_bad_indices:
            with self.assertRaises(kvpool.BadIndex):
                kvpool.append_paged_kv_cache(*call)
        else:
            kvpool.append_paged_kv_cache(*call)
        self.assertEqual(numpy.count_nonzero(self.take(cache)), 2 * 4)
        self.assertTrue(numpy.array_equal(self.take(cache)[3, 1, 2], k[3]))

    def test_arguments_that_do_not_agree_are_refused(self) -> None:
        def call(**change):
            given = {"append_key": self.give(numpy.zeros((2, 1, 4), "float32")),
                     "append_value": self.give(numpy.zeros((2, 1, 4), "float32")), "batch_indices": self.ints([0, 0]),
                     "positions": self.ints([0, 1]),
                     "paged_kv_cache": self.give(numpy.zeros((3, 2, 4, 1, 4), "float32")),
                     "kv_indices": self.ints([0]), "kv_indptr": self.ints([0, 1]), "kv_last_page_len": self.ints([2])}
            kvpool.append_paged_kv_cache(**{**given, **change})

        call()
        for change in ({"append_key": self.give(numpy.zeros((2, 1, 5), "float32"))},
                       {"append_key": self.give(numpy.zeros((3, 1, 4), "float32"))},
                       {"append_value": self.give(numpy.zeros((2, 1, 4), "float16"))}, {"positions": self.ints([0])},
                       {"paged_kv_cache": self.give(numpy.zeros((3, 4, 1, 4), "float32"))}, {"kv_layout": "DHN"}):
            with self.assertRaises(kvpool.InvalidArgument, msg=str(change)):
                call(**change)
        with self.assertRaises(TypeError):
            call(positions=self.give(numpy.zeros(2, "float32")))


@needs_numpy
class Numpy(Forms, unittest.TestCase):
    def give(self, array):
        return array.copy()

    def take(self, array):
        return array

    def test_bytes_that_are_no_numbers_of_this_machine_are_not_moved(self) -> None:
        k, cache = numpy.ones((1, 1, 4), "float32"), numpy.zeros((3, 2, 4, 1, 4), "float32")
        table = (self.ints([0]), self.ints([0, 1]), None)
        for kind, text, given, into in (
                (TypeError, ">f4", k.astype(">f4"), cache), (TypeError, ">f4", k, cache.astype(">f4")),
                (TypeError, "O", k.astype(object), cache.astype(object)),
                (kvpool.InvalidArgument, "read-only", k, numpy.broadcast_to(cache, cache.shape)),
                (kvpool.InvalidArgument, "strides .* must be positive", k, cache[::-1])):
            with self.subTest(text), self.assertRaisesRegex(kind, text):
                kvpool.append_paged_kv_cache(given, given, self.ints([0]), self.ints([0]), into, *table)
        self.assertEqual(numpy.count_nonzero(cache), 0)

    def test_a_pools_planes_are_a_cache_too(self) -> None:
        k = self.rng.standard_normal((3, 2, 8)).astype("float32")
        with kvpool.connect(backend="host") as client:
            spec = kvpool.PoolSpec(f"page-{os.getpid()}", 8, 4, kv_heads=2, head_dim=8, dtype="float32")
            with client.create_pool(spec) as pool:
                kvpool.append_paged_kv_cache(k, k, self.ints([0, 0, 0]), self.ints([3, 4, 5]), pool.layer(0),
                                             self.ints([6, 1]), self.ints([0, 2]), self.ints([2]))
                keys = pool.plane(0).numpy()
                self.assertTrue((keys[6, 3] == k[0]).all() and (keys[1, :2] == k[1:]).all())
                del keys  # it holds the pool
            client.delete_pool(spec.name)

    def test_no_daemon_is_needed(self) -> None:
        done = run("import numpy, kvpool; from kvpool import _embedded\n"
                   "print(kvpool.get_seq_lens(numpy.array([0, 2], 'int32'), numpy.array([3], 'int32'), 16), "
                   "_embedded._running)", env={**os.environ, "KVPOOL_BIN_DIR": "/nowhere", "PATH": "/nowhere"})
        self.assertEqual(done.stdout.split(), ["[19]", "{}"], done.stderr)


@unittest.skipUnless(HAS_NUMPY and HAS_TORCH, "torch is not installed")
class TorchHost(Forms, unittest.TestCase):
    device = "cpu"

    def give(self, array):
        import torch

        return torch.from_numpy(array.copy()).to(self.device)

    def take(self, array):
        return array.cpu().numpy()

    def test_a_tensor_whose_memory_was_freed_is_told(self) -> None:
        import torch

        cache, k = torch.zeros(4, 2, 4, 2, 8), torch.ones(1, 2, 8)
        k.untyped_storage().resize_(0)
        where = (torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        with self.assertRaisesRegex(kvpool.InvalidArgument, "the appended K has no memory"):
            kvpool.append_paged_kv_cache(k, k, *where, cache, where[0], torch.tensor([0, 1], dtype=torch.int32), None)

    def test_what_a_view_negates_is_not_moved_as_it_lies(self) -> None:
        import torch

        k = torch.zeros(1, 1, 4, dtype=torch.complex64).conj().imag
        with self.assertRaisesRegex(TypeError, "negates"):
            kvpool.append_paged_kv_cache(k, k, self.ints([0]), self.ints([0]), torch.zeros(3, 2, 4, 1, 4),
                                         self.ints([0]), self.ints([0, 1]), None)

    def test_bfloat16_and_fp8_are_moved_as_they_are(self) -> None:
        import torch

        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float64):
            k = torch.randn(2, 1, 4).to(dtype).to(self.device)
            cache = torch.zeros(3, 2, 4, 1, 4, device=self.device).to(dtype)
            kvpool.append_paged_kv_cache(k, k, self.ints([0, 0]), self.ints([0, 1]), cache, self.ints([2]),
                                         self.ints([0, 1]), self.ints([2]))
            self.assertTrue(torch.equal(cache[2, 1, :2].view(torch.uint8), k.view(torch.uint8)))


if __name__ == "__main__":
    unittest.main()
