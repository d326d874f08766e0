"""Regions of a pool: found again by name, refused where they can not be, as arrays of any shape."""
from __future__ import annotations

import ctypes
import gc
import os
import threading
import unittest

from support import PoolTest, needs_numpy, needs_torch

import kvpool


class Regions(PoolTest):
    def tearDown(self) -> None:
        self.doCleanups()
        self.client.close()
        gc.collect()
        with kvpool.connect(backend="host") as last:
            for name in self.made:
                with last.attach(name) as pool:
                    for region in pool.regions():
                        pool.drop_region(region.name)
        super().tearDown()

    def other(self, pool: kvpool.Pool) -> kvpool.Pool:
        client = kvpool.connect(backend="host")
        self.addCleanup(client.close)
        return client.attach(pool.name)

    def test_a_region_is_found_again_with_its_bytes(self) -> None:
        pool = self.pool(region_bytes=1 << 20)
        made = pool.region("kv/0", 5000)
        self.assertFalse(made.existed)
        ctypes.memset(made.pointer, 0x5A, made.nbytes)
        found = self.other(pool).region("kv/0")
        self.assertEqual((found.existed, found.nbytes, found.offset, found.name), (True, 5000, made.offset, "kv/0"))
        self.assertEqual(ctypes.string_at(found.pointer, 5000), b"\x5a" * 5000)
        self.assertEqual(pool.regions(), [kvpool.RegionInfo("kv/0", 0, made.offset, 5000, os.getuid(), 2)])
        self.assertGreaterEqual(made.offset, pool.pages * pool.info.page_bytes)

    def test_what_can_not_be_is_refused(self) -> None:
        pool = self.pool(region_bytes=65536)
        pool.region("kv", 4096)
        with self.assertRaisesRegex(kvpool.Mismatch, 'bytes: 8192, region "kv" of pool ".*" has 4096'):
            pool.region("kv", 8192)
        with self.assertRaisesRegex(kvpool.LimitReached, "4096 are missing"):
            pool.region("more", 65536)
        for arguments in (("more", 65537), ("more", -1), ("more", 1 << 64), ("a b", 1), ("", 1)):
            with self.assertRaises(kvpool.InvalidArgument):
                pool.region(*arguments)
        with self.assertRaises(kvpool.InvalidArgument):
            pool.region("kv", 4096, rank=1)
        with self.assertRaises(kvpool.NotFound):
            pool.region("nowhere")
        with self.assertRaises(kvpool.Busy):
            self.client.delete_pool(pool.name)
        pool.detach()
        with self.assertRaises(kvpool.SessionEnded):
            pool.region("kv")
        with self.assertRaisesRegex(kvpool.Busy, "1 regions"):
            self.client.delete_pool(pool.name)

    def test_who_has_a_region_keeps_it_from_others(self) -> None:
        pool = self.pool(region_bytes=65536)
        other = self.other(pool)
        mine = pool.region("kv", 4096, exclusive=True)
        with self.assertRaisesRegex(kvpool.Busy, "is mapped by session"):
            other.region("kv", exclusive=True)
        self.assertTrue(other.region("kv").existed)
        with self.assertRaises(kvpool.Busy):
            mine.drop()
        other.detach()
        mine.unmap()
        third = self.other(pool).region("kv", exclusive=True)
        third.drop()
        pool.drop_region("kv")
        self.assertEqual(pool.regions(), [])

    def test_threads_that_map_the_same_name_find_the_same_place(self) -> None:
        pool = self.pool(region_bytes=1 << 20)
        found: list[tuple[int, int]] = []

        def take() -> None:
            for i in range(20):
                found.append((i, pool.region(f"kv/{i}", 4096).offset))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(found), 80)
        self.assertEqual(len(set(found)), 20)

    @needs_numpy
    def test_arrays_of_any_shape_lie_in_the_region(self) -> None:
        import numpy

        pool = self.pool(region_bytes=1 << 20)
        region = pool.region("kv", 3 * 5 * 7 * 4 + 8)
        array = region.array((3, 5, 7), "float32", offset=8).numpy()
        array[:] = numpy.arange(105, dtype="float32").reshape(3, 5, 7)
        self.assertEqual(array.ctypes.data, region.pointer + 8)
        self.assertTrue(numpy.array_equal(numpy.from_dlpack(region.array((105,), "float32", offset=8)),
                                          numpy.arange(105)))
        self.assertEqual(region.array((428,)).numpy()[8:].tobytes(), array.tobytes())
        for shape, dtype, offset in (((106,), "float32", 8), ((2,), "float32", 2), ((1,), "float32", -4),
                                     ((-1,), "uint8", 0), ((), "uint8", 0), ((1,) * 9, "uint8", 0),
                                     ((1,), "int4", 0)):
            with self.assertRaises(kvpool.InvalidArgument):
                region.array(shape, dtype, offset)
        self.assertEqual(region.array((0,), "float32", offset=428).shape, (0,))

    @needs_numpy
    def test_an_array_outlives_its_pool_and_client(self) -> None:
        client = kvpool.connect(backend="host")
        pool = client.attach(self.pool(region_bytes=65536).name)
        array = pool.region("kv", 4096).array((4096,)).numpy()
        array[:] = 7
        client.close()
        del pool, client
        gc.collect()
        self.assertEqual(int(array.sum()), 7 * 4096)

    @needs_torch
    def test_torch_tensors_lie_in_the_region(self) -> None:
        import torch

        region = self.pool(region_bytes=65536).region("kv", 4096)
        tensor = region.array((32, 64), "bfloat16").torch()
        tensor.fill_(3)
        self.assertEqual((tensor.data_ptr(), tensor.dtype), (region.pointer, torch.bfloat16))
        self.assertTrue(bool((region.array((2048,), "bfloat16").torch() == 3).all()))


if __name__ == "__main__":
    unittest.main()
