"""kvpool.torch on the host: tensors over planes and regions, and what keeps zeros from bytes that came back. What it
does on a GPU is in test_torch_gpu.py."""
from __future__ import annotations

import ctypes
import gc
import unittest

from support import PoolTest, needs_torch

import kvpool

MIB = 1 << 20


@needs_torch
class Host(PoolTest):
    def tearDown(self) -> None:
        self.client.close()
        gc.collect()
        with kvpool.connect(backend="host") as last:
            for name in self.made:
                with last.attach(name) as pool:
                    for region in pool.regions():
                        pool.drop_region(region.name)
        super().tearDown()

    def test_tensors_are_the_pools_layers(self) -> None:
        import torch

        from kvpool import torch as kv

        pool = self.pool(layers=3, dtype="bfloat16")
        layers = kv.tensors(pool)
        self.assertEqual([[list(plane.shape) for plane in layer] for layer in layers], [[[32, 4, 2, 8]] * 2] * 3)
        layers[2][1].fill_(3)
        self.assertTrue(bool((pool.plane(5).torch() == 3).all()) and layers[0][0].dtype == torch.bfloat16)
        ckv, kpe = kv.tensors(self.pool(ckv_dim=16, kpe_dim=4))[0]
        self.assertEqual((list(ckv.shape), list(kpe.shape)), ([32, 4, 16], [32, 4, 4]))

    def test_a_region_is_a_tensor_with_the_bytes_that_were_left(self) -> None:
        import torch

        from kvpool import torch as kv

        pool = self.pool(region_bytes=MIB)
        kv.region(pool, "kv", (3, 100), torch.bfloat16).copy_(torch.arange(300).view(3, 100))
        with kvpool.connect(backend="host") as other:
            again = kv.region(other.attach(pool.name), "kv", (300,), torch.bfloat16)
            self.assertTrue(torch.equal(again, torch.arange(300).bfloat16()))
            del again
        with self.assertRaises(kvpool.Mismatch):
            kv.region(pool, "kv", (301,), torch.bfloat16)
        with self.assertRaises(kvpool.InvalidArgument):
            kv.region(pool, "kv", (2,), torch.complex64)

    def test_a_shape_that_is_none_is_refused_before_there_is_a_region(self) -> None:
        import torch

        from kvpool import torch as kv

        pool = self.pool(region_bytes=MIB)
        for shape, text in (((), "0 dimensions"), ((-1, -4), r"shape\[0\] -1 "), ((0, 4), r"of \[0, 4\] has no bytes")):
            with self.assertRaisesRegex(kvpool.InvalidArgument, text):
                kv.region(pool, "kv", shape, torch.float32)
        self.assertEqual(pool.regions(), [])

    def test_drop_gives_up_the_regions_of_a_tag_that_nobody_has(self) -> None:
        from kvpool import torch as kv

        pool = self.pool(region_bytes=MIB)
        for name in ("kv/0", "kv/1", "kv/x", "other/0", "kv/1/0"):
            pool.region(name, 4096).unmap()
        held = pool.region("kv/7", 1)
        with self.assertRaisesRegex(kvpool.Busy, "kv/7 .* is mapped by 1 sessions"):
            kv.drop(pool, "kv")
        held.unmap()
        kv.drop(pool, "kv")
        self.assertEqual(sorted(region.name for region in pool.regions()), ["kv/1/0", "kv/x", "other/0"])

    def test_use_pool_refuses_a_pool_in_host_memory(self) -> None:
        from kvpool import torch as kv

        with self.assertRaisesRegex(kvpool.InvalidArgument, "is in host memory"), kv.use_pool(self.pool(), "kv"):
            pass


@needs_torch
class Room(unittest.TestCase):
    def test_it_is_the_segments_that_torch_asks_for(self) -> None:
        from kvpool import torch as kv

        self.assertEqual(kv.room([1, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 10 * MIB + 1, 0]),
                         (2 + 2 + 20 + 20 + 10 + 12) * MIB)


@needs_torch
class Keeping(unittest.TestCase):
    """`Keep`, with any tensor's memory in the part of what came back: it holds fives as soon as that is asked, once."""

    n = 1024

    def setUp(self) -> None:
        import torch

        self.torch = torch
        self.told: set[int] = set()
        self.back = True

    def came_back(self, pointer: int) -> bool:
        fresh = self.back and pointer != 0 and pointer not in self.told
        self.told.add(pointer)
        if fresh:
            fives = (ctypes.c_float * self.n)(*[5.0] * self.n)
            ctypes.memmove(pointer, fives, ctypes.sizeof(fives))
        return fresh

    def keep(self):
        from kvpool.torch import Keep

        self.told.clear()
        return Keep(self.came_back)

    def test_filled_tensors_over_old_bytes_are_not_filled(self) -> None:
        torch, n = self.torch, self.n
        like = torch.zeros(n)
        for make in (lambda: torch.zeros(n), lambda: torch.ones(n), lambda: torch.full((n,), 7.0),
                     lambda: torch.zeros_like(like), lambda: torch.ones_like(like), lambda: torch.full_like(like, 7),
                     lambda: like.new_zeros(n), lambda: like.new_ones(n), lambda: like.new_full((n,), 7.0),
                     lambda: torch.empty(n).zero_(), lambda: torch.empty(n).fill_(7),
                     lambda: torch.empty(n).view(2, -1).zero_().view(-1),
                     lambda: torch.nn.init.zeros_(torch.empty(n))):
            with self.keep():
                made = make()
            self.assertTrue(bool((made == 5).all()))

    def test_what_is_used_is_filled_as_ever(self) -> None:
        torch, n = self.torch, self.n

        def written():
            tensor = torch.empty(n)
            tensor[7] = 1
            return tensor.zero_()

        def twice():
            return torch.zeros(n).zero_()

        def computed():
            return (torch.zeros(n) + 1).zero_()

        for make in (written, twice, computed):
            with self.keep():
                made = make()
            self.assertTrue(bool((made == 0).all()))

    def test_new_memory_is_filled_with_the_values_and_dtypes_of_torch(self) -> None:
        torch = self.torch
        self.back = False
        base = torch.empty(2, 3, dtype=torch.int16)

        def made():
            return [torch.zeros(2, 3), torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 7), torch.full((2,), True),
                    torch.full((2,), 1.5), torch.full((), 2, dtype=torch.float16), torch.zeros_like(base),
                    torch.ones_like(base, dtype=torch.int8), torch.full_like(base, 9), base.new_zeros(4),
                    base.new_ones((1, 2)), base.new_full((3,), 4), torch.empty(3).zero_(), torch.empty(3).fill_(2),
                    torch.zeros(0), torch.zeros(3, device="meta").shape]

        expected = made()
        with self.keep():
            found = made()
        for one, other in zip(found[:-1], expected[:-1]):
            self.assertTrue(torch.equal(one, other))
            self.assertEqual((one.dtype, one.stride()), (other.dtype, other.stride()))
        self.assertEqual(found[-1], expected[-1])


if __name__ == "__main__":
    unittest.main()
