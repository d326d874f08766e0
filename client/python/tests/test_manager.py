"""PagedKVCacheManager, on its own and on a pool, beside a dictionary of lists."""
from __future__ import annotations

import random
import unittest

from support import SEED, PoolTest, needs_numpy, needs_torch

import kvpool


@needs_numpy
class Manager(PoolTest):
    def managers(self, pages: int = 12, page_size: int = 4) -> list[kvpool.PagedKVCacheManager]:
        pool = self.pool(pages=pages, page_size=page_size, dtype="float32")
        return [kvpool.PagedKVCacheManager(pages, page_size, 2, 8),
                kvpool.PagedKVCacheManager(pages, page_size, 2, 8, pool=pool)]

    def give(self, array):
        return array

    def take(self, array):
        import numpy

        return numpy.asarray(array)

    def test_random_requests_keep_their_tokens(self) -> None:
        for manager in self.managers():
            with self.subTest(seed=SEED):
                self.random_requests(manager)

    def random_requests(self, manager: kvpool.PagedKVCacheManager) -> None:
        import numpy

        rng, values = random.Random(SEED), numpy.random.default_rng(SEED)
        model: dict[int, list] = {}
        refused = 0
        for _ in range(300):
            request = rng.randrange(6)
            if rng.random() < 0.1:
                manager.free(request)
                model.pop(request, None)
                continue
            n = rng.choice([1, 1, 1, 3, 7])
            k = values.standard_normal((n, 2, 8)).astype("float32")
            given = (k[0], -k[0]) if n == 1 else (k, -k)
            try:
                manager.append(request, *map(self.give, given))
            except kvpool.OutOfPages as error:
                self.assertGreater(error.missing, 0)
                refused += 1
                continue
            model.setdefault(request, []).extend(k)
        self.assertGreater(refused, 0)
        pages = [page for request in model for page in self.take(manager.get_page_table(request))]
        self.assertEqual(len(pages), len(set(pages)))
        self.assertEqual(manager.free_pages, manager.max_num_pages - len(pages))
        cache = self.take(manager.kv_cache)
        for request, tokens in model.items():
            self.assertEqual(manager.get_seq_len(request), len(tokens))
            held = cache[self.take(manager.get_page_table(request))]
            self.assertTrue((held[:, 0].reshape(-1, 2, 8)[: len(tokens)] == tokens).all())
            self.assertTrue((-held[:, 1].reshape(-1, 2, 8)[: len(tokens)] == tokens).all())
            manager.free(request)
        self.assertEqual(manager.free_pages, manager.max_num_pages)

    def test_a_request_without_tokens_has_no_table(self) -> None:
        for manager in self.managers():
            self.assertIsNone(manager.get_page_table("who"))
            self.assertEqual(manager.get_seq_len("who"), 0)
            manager.free("who")

    def test_page_borders_take_no_page_too_many(self) -> None:
        import numpy

        for manager in self.managers():
            k = self.give(numpy.zeros((2, 8), "float32"))
            for length in range(1, 10):
                manager.append("a", k, k)
                self.assertEqual((manager.get_seq_len("a"), len(manager.get_page_table("a"))),
                                 (length, -(-length // 4)))
                self.assertEqual(manager.free_pages, 12 - -(-length // 4))
            manager.free("a")

    def test_requests_of_any_name_are_apart(self) -> None:
        import numpy

        k = self.give(numpy.zeros((3, 2, 8), "float32"))
        for manager in self.managers():
            names = [(1, 2), "(1, 2)", -1, 1 << 64, None, "None", 1.5, 7]
            for n, name in enumerate(names):
                manager.append(name, k[: n % 3 + 1], k[: n % 3 + 1])
            self.assertEqual([manager.get_seq_len(name) for name in names], [n % 3 + 1 for n in range(len(names))])
            for name in names:
                manager.free(name)
            self.assertEqual(manager.free_pages, 12)

    def test_what_does_not_fit_changes_nothing(self) -> None:
        import numpy

        k = self.give(numpy.zeros((2, 8), "float32"))
        for manager in self.managers():
            manager.append(1, k, k)
            table = manager.get_page_table(1)
            for wrong in (k[0], k[:, :4], k[:, 0], k[None, None]):
                for given in ((wrong, wrong), (k, wrong), (wrong, k)):
                    with self.assertRaisesRegex(kvpool.InvalidArgument, r"must be of one token, \[2, 8\]"):
                        manager.append(1, *given)
            with self.assertRaises(kvpool.InvalidArgument):
                manager.append(1, numpy.zeros((2, 8)), numpy.zeros((2, 8)))
            self.assertEqual((manager.get_seq_len(1), type(manager.get_page_table(1))), (1, type(table)))
            manager.append(2, k[None][:0], k[None][:0])
            self.assertEqual((manager.get_seq_len(2), manager.get_page_table(2)), (0, None))
            manager.free(1)

    def test_a_sequence_that_was_there_survives_an_append_that_fails(self) -> None:
        import numpy

        _, on_pool = self.managers()
        k = self.give(numpy.ones((3, 2, 8), "float32"))
        on_pool.append(1, k, k)
        again = kvpool.PagedKVCacheManager(12, 4, 2, 8, pool=on_pool._store._pool)
        many = self.give(numpy.ones((46, 2, 8), "float32"))
        with self.assertRaises(kvpool.KvpoolError):
            again.append(1, many, many)
        self.assertEqual(on_pool.get_seq_len(1), 3)
        on_pool.free(1)

    def test_a_pool_of_another_geometry_is_refused(self) -> None:
        with self.assertRaises(kvpool.InvalidArgument):
            kvpool.PagedKVCacheManager(12, 4, 2, 16, pool=self.pool(pages=12))
        with self.assertRaises(kvpool.InvalidArgument):
            kvpool.PagedKVCacheManager(0, 4, 2, 16)


@needs_torch
class TorchManager(Manager):
    device = "cpu"

    def give(self, array):
        import torch

        return torch.from_numpy(array.copy()).to(self.device)

    def take(self, array):
        import torch

        return torch.from_dlpack(array).cpu().numpy() if isinstance(array, kvpool.Plane) else array.cpu().numpy()

    def test_the_document_s_use_gives_its_answer(self) -> None:
        import torch

        manager = kvpool.PagedKVCacheManager(max_num_pages=256, page_size=16, num_kv_heads=32, head_dim=128)
        k = torch.randn(32, 128).half().to(self.device)
        manager.append(0, k, k)
        self.assertEqual(manager.get_seq_len(0), 1)
        self.assertEqual(manager.get_page_table(0).dtype, torch.int32)
        self.assertEqual(manager.kv_cache.shape, (256, 2, 16, 32, 128))


if __name__ == "__main__":
    unittest.main()
