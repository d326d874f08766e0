"""A pool's memory in Python's hands: shapes, bytes, DLPack, and how long it lives."""
from __future__ import annotations

import ctypes
import gc
import os
import threading
import unittest

from support import HAS_NUMPY, PoolTest, needs_numpy, needs_torch, run

import kvpool

_CAPSULE_NAME = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


if HAS_NUMPY:
    import numpy

    NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])  # before 2.1 it takes no writable capsule


def mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


class Memory(PoolTest):
    def test_planes_have_the_shape_of_their_order(self) -> None:
        for order, shape in (("NHD", (32, 4, 2, 8)), ("HND", (32, 2, 4, 8))):
            for placement in ("layer", "page"):
                pool = self.pool(order=order, placement=placement, layers=3)
                self.assertEqual([plane.shape for i in range(3) for plane in pool.layer(i)], [shape] * 6)
                self.assertEqual(pool.joined_layer(1).shape, (32, 2, *shape[1:]))

    def test_mla_planes_have_no_heads_and_join(self) -> None:
        pool = self.pool(ckv_dim=512, kpe_dim=64, joined=True, dtype="bfloat16", layers=2)
        self.assertEqual([plane.shape for plane in pool.layer(1)], [(32, 4, 512), (32, 4, 64)])
        joined = pool.joined_layer(1)
        self.assertEqual((joined.shape, joined.strides[:2]), ((32, 4, 576), (4 * 576 * 2, 576 * 2)))

    def test_layers_that_do_not_join_are_refused(self) -> None:
        pool = self.pool(kv_heads=2, head_dim=8, v_head_dim=4)
        with self.assertRaises(kvpool.InvalidArgument):
            pool.joined_layer(0)

    def test_planes_out_of_range_are_refused(self) -> None:
        pool = self.pool()
        for call in (lambda: pool.plane(2), lambda: pool.plane(-1), lambda: pool.layer(1), lambda: pool.plane(0, 1)):
            with self.assertRaises(kvpool.InvalidArgument):
                call()

    def test_the_spec_comes_back_as_the_daemon_has_it(self) -> None:
        pool = self.pool(layers=2, model="m", reserved_pages=3, max_sequences=7, max_sequence_tokens=64)
        spec = self.client.describe(pool.name).spec
        self.assertEqual((spec.pages, spec.page_size, spec.layers, spec.model), (32, 4, 2, "m"))
        self.assertEqual((spec.reserved_pages, spec.max_sequences, spec.max_sequence_tokens), (3, 7, 64))
        self.assertEqual(spec.all_planes(), kvpool.PoolSpec("", 1, 1, 2, 2, 8).all_planes())
        self.assertIn(pool.name, self.client.pools())
        self.assertEqual(pool.free_pages, 29)

    def test_specs_that_are_wrong_are_refused_with_the_reason(self) -> None:
        for geometry in ({"pages": 0}, {"dtype": "int3"}, {"order": "DHN"}, {"placement": "x"}, {"pages": 1 << 40},
                         {"kv_heads": 2, "head_dim": 8, "ckv_dim": 4, "kpe_dim": 4}):
            with self.assertRaises(kvpool.InvalidArgument, msg=str(geometry)):
                self.client.create_pool(kvpool.PoolSpec(**{"name": "bad", "pages": 4, "page_size": 4, "kv_heads": 1,
                                                           "head_dim": 8, **geometry}))

    def test_another_pool_of_that_name_exists(self) -> None:
        pool = self.pool()
        with self.assertRaises(kvpool.AlreadyExists):
            self.client.create_pool(pool.info.spec._replace(pages=64))

    def test_an_attach_of_another_model_or_layout_is_a_LayoutMismatch(self) -> None:
        pool = self.pool(model="llama")
        pool.detach()
        for wanted in ({"model": "qwen"}, {"layout_digest": (1, 2)}):
            with self.assertRaises(kvpool.LayoutMismatch):
                self.client.attach(pool.name, **wanted)
        self.client.attach(pool.name, model="llama", layout_digest=pool.info.layout_digest)

    def test_a_detached_pool_says_so(self) -> None:
        pool = self.pool()
        seq = pool.open(1)
        pool.detach()
        self.assertTrue(seq.closed)
        with self.assertRaises(kvpool.SessionEnded):
            pool.open(1)
        with self.assertRaises(kvpool.SessionEnded):
            len(seq)

    def test_1000_attaches_and_detaches_leak_no_fd_and_no_mapping(self) -> None:
        pool = self.pool()
        pool.detach()
        for i in range(1000):
            with self.client.attach(pool.name) as again:
                plane = again.plane(0)
                plane.__dlpack__()
                plane.__dlpack__(max_version=(1, 0))
            if i == 10:
                gc.collect()
                before = len(os.listdir("/proc/self/fd")), mappings()
        del plane
        gc.collect()
        self.assertEqual(len(os.listdir("/proc/self/fd")), before[0])
        self.assertLessEqual(mappings(), before[1] + 4)


class Capsules(PoolTest):
    def test_a_capsule_is_versioned_where_the_consumer_asks_for_it(self) -> None:
        plane = self.pool().plane(0)
        self.assertEqual(_CAPSULE_NAME(plane.__dlpack__()), b"dltensor")
        self.assertEqual(_CAPSULE_NAME(plane.__dlpack__(max_version=(1, 0))), b"dltensor_versioned")
        self.assertEqual(_CAPSULE_NAME(plane.__dlpack__(max_version=(0, 8))), b"dltensor")
        self.assertEqual(plane.__dlpack_device__(), (1, 0))

    def test_a_copy_or_another_device_is_a_BufferError(self) -> None:
        plane = self.pool().plane(0)
        for wish in ({"copy": True}, {"dl_device": (2, 0)}):
            with self.assertRaises(BufferError):
                plane.__dlpack__(**wish)

    def test_a_capsule_that_nobody_took_lets_go_of_the_pool(self) -> None:
        pool = self.pool()
        capsule = pool.plane(0).__dlpack__()
        pool.detach()
        gc.collect()
        self.assertEqual(self.client.describe(pool.name).attachments, 1)
        del capsule
        self.assertEqual(self.client.describe(pool.name).attachments, 0)

    def test_the_last_capsule_may_go_on_any_thread(self) -> None:
        pool = self.pool()
        held = [pool.plane(0).__dlpack__(max_version=(1, 0)) for _ in range(8)]
        pool.detach()
        gc.collect()
        threads = [threading.Thread(target=held.pop) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.client.describe(pool.name).attachments, 0)

    def test_the_interpreter_exits_cleanly_while_capsules_are_alive(self) -> None:
        done = run("import kvpool\n"
                   "client = kvpool.connect(backend='host')\n"
                   "spec = kvpool.PoolSpec('p', pages=4, page_size=4, kv_heads=1, head_dim=8)\n"
                   "pool = client.create_pool(spec)\n"
                   "held = [pool.plane(0).__dlpack__(), pool.plane(1)]\n"
                   "import builtins; builtins.held = held\n")
        self.assertEqual((done.returncode, done.stderr), (0, ""))


@needs_numpy
class Numpy(PoolTest):
    def test_arrays_are_the_pools_own_memory(self) -> None:
        for order in ("NHD", "HND"):
            for placement in ("layer", "page"):
                pool = self.pool(order=order, placement=placement, layers=2, dtype="float32")
                by_dlpack, array = numpy.from_dlpack(pool.layer(1)[1]), numpy.asarray(pool.layer(1)[1])
                array[5, 1, 1, 7] = 42
                self.assertEqual(by_dlpack[5, 1, 1, 7], 42)
                self.assertEqual(by_dlpack.flags.writeable, NUMPY >= (2, 1))
                both = pool.joined_layer(1).numpy()
                self.assertEqual(both[5, 1, 1, 1, 7], 42)
                self.assertEqual(numpy.count_nonzero(both), 1)
                self.assertEqual(sum(numpy.count_nonzero(pool.plane(i).numpy()) for i in range(4)), 1)

    def test_dtypes_that_numpy_has_not_are_said_and_there_as_bytes(self) -> None:
        for dtype, size in (("bfloat16", 2), ("float8_e4m3fn", 1), ("float8_e5m2", 1)):
            plane = self.pool(dtype=dtype).plane(0)
            with self.assertRaises(TypeError):
                numpy.asarray(plane)
            self.assertEqual((plane.bytes.numpy().shape, plane.bytes.dtype), ((32, 4, 2, 8 * size), "uint8"))

    def test_arrays_outlive_the_pool_and_the_client(self) -> None:
        pool = self.pool(dtype="float32")
        by_dlpack, by_interface = numpy.from_dlpack(pool.plane(0)), pool.plane(0).numpy()
        by_interface[3] = 7
        pool.detach()
        self.client.close()
        del pool
        gc.collect()
        self.assertTrue((by_dlpack[3] == 7).all() and (by_interface[3] == 7).all())
        with kvpool.connect(backend="host") as other:
            self.assertEqual(other.describe(self.made[0]).attachments, 1)
            del by_dlpack, by_interface
            gc.collect()
            self.assertEqual(other.describe(self.made[0]).attachments, 0)

    def test_a_plane_alone_holds_the_memory(self) -> None:
        pool = self.pool(dtype="float32")
        array = pool.plane(0).numpy()
        array[3] = 7
        pool.detach()
        self.client.close()
        self.assertTrue((array[3] == 7).all())

    def test_two_processes_see_the_same_bytes(self) -> None:
        pool = self.pool(dtype="float32")
        pool.plane(1).numpy()[7] = 3
        done = run("import sys, kvpool\n"
                   "with kvpool.connect(sys.argv[1]) as client, client.attach(sys.argv[2]) as pool:\n"
                   "    array = pool.plane(1).numpy()\n"
                   "    print(array[7].min(), array[6].max())\n"
                   "    array[6] = 4\n", self.client.endpoint, pool.name)
        self.assertEqual(done.stdout.split(), ["3.0", "0.0"], done.stderr)
        self.assertTrue((pool.plane(1).numpy()[6] == 4).all())


@needs_torch
class Torch(PoolTest):
    def test_the_interpreter_exits_cleanly_while_tensors_are_alive(self) -> None:
        done = run("import kvpool, torch\n"
                   "client = kvpool.connect(backend='host')\n"
                   "pool = client.create_pool(kvpool.PoolSpec('p', pages=4, page_size=4, kv_heads=1, head_dim=8))\n"
                   "import builtins; builtins.held = [torch.from_dlpack(pool.plane(0)), pool.plane(1).torch()[1:]]\n"
                   "builtins.held.append(builtins.held); builtins.held[1][:] = 3\n")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_tensors_are_the_pools_own_memory_in_every_dtype(self) -> None:
        import torch

        for dtype in ("float32", "float16", "bfloat16", "uint8", "float8_e4m3fn", "float8_e5m2"):
            pool = self.pool(dtype=dtype, order="HND", placement="page")
            tensor, raw = torch.from_dlpack(pool.plane(1)), torch.from_dlpack(pool.plane(1).bytes)
            self.assertEqual(str(tensor.dtype), f"torch.{dtype}")
            raw[9, 1, 2] = 0x38
            self.assertTrue(torch.equal(tensor.view(torch.uint8)[9, 1, 2], raw[9, 1, 2]))
            self.assertEqual(tensor.shape, (32, 2, 4, 8))

    def test_tensors_outlive_the_pool(self) -> None:
        pool = self.pool(dtype="bfloat16")
        tensor = pool.plane(0).torch()
        tensor[:] = 2
        pool.detach()
        gc.collect()
        self.assertEqual(tensor.float().sum().item(), 2 * 32 * 4 * 2 * 8)
        self.assertEqual(self.client.describe(self.made[0]).attachments, 1)
        del tensor
        gc.collect()
        self.assertEqual(self.client.describe(self.made[0]).attachments, 0)


if __name__ == "__main__":
    unittest.main()
