"""kvpool.torch on a GPU: an engine's tensors lie in regions, and come back after engine and daemon were killed.

Needs a GPU and torch. The engines are processes of torch_worker.py.
"""
from __future__ import annotations

import gc
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import unittest

from support import Kept, has_gpu

import kvpool

WORKER = pathlib.Path(__file__).with_name("torch_worker.py")
MIB = 1 << 20
ROOM = 1 << 30


@unittest.skipUnless(has_gpu(), "torch and a GPU are not here")
class Engines(unittest.TestCase):
    """One engine after another, each killed with SIGKILL; the daemon lives under a keeper."""

    def setUp(self) -> None:
        self.daemon = Kept("cuda")
        self.addCleanup(self.daemon.__exit__)
        with kvpool.connect(self.daemon.endpoint, connect_ms=20000) as client:
            client.create_pool(kvpool.PoolSpec("p", pages=8, page_size=16, kv_heads=1, head_dim=64, region_bytes=ROOM))

    def engine(self, **options) -> dict:
        """What an engine reports; it is killed then. Where nothing proves here that the work of a killed one is over,
        an operator's word does."""
        for _ in range(2):
            with subprocess.Popen([sys.executable, str(WORKER), self.daemon.endpoint, "p", "kv", json.dumps(options)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                line = process.stdout.readline()
                process.kill()
            self.assertTrue(line, "the engine died by itself")
            found = json.loads(line)
            if found.get("error") != "TryAgain":
                return found
            print(f"{found['text']}: its quarantine is released by hand", file=sys.stderr)
            subprocess.run([os.path.join(os.environ["KVPOOL_BIN_DIR"], "kvpool"), "-e", self.daemon.endpoint,
                            "quarantine", "release", "p"], check=True)
        return found

    def assert_clean(self) -> None:
        with kvpool.connect(self.daemon.endpoint, connect_ms=20000) as client:
            self.assertEqual(client.audit(), [])

    def test_tensors_come_back_with_their_bytes(self) -> None:
        first = self.engine(preserve=False, write=1)
        n = len(first["digests"])
        self.assertEqual(n, 36)
        self.assertEqual(first["inside"], [True] * n)
        self.assertEqual(first["outside"], [False, False])
        self.assertEqual(*first["room"])
        zeros = [hashlib.sha256(bytes(2 * -(-size // 2))).hexdigest() for size in
                 [12 * MIB] * 32 + [64 * 1024, 3 * MIB, 1, 10 * MIB + 2]]
        self.assertEqual(first["digests"], zeros)
        for how in ("zeros", "full", "zero_", "empty"):
            again = self.engine(preserve=True, make=how)
            self.assertEqual(again["digests"], first["written"], how)
            self.assertEqual(again["inside"], [True] * n)
        self.daemon.kill_daemon()
        again = self.engine(preserve=True, write=2)
        self.assertEqual(again["digests"], first["written"])
        self.assertEqual(self.engine(preserve=True)["digests"], again["written"])
        self.assertEqual(self.engine(preserve=False)["digests"], zeros)
        self.assertEqual(self.engine(preserve=True)["digests"], zeros)
        self.assert_clean()

    def test_another_size_or_too_little_room_is_said(self) -> None:
        self.engine(preserve=False, sizes=[12 * MIB, 12 * MIB], write=1)
        found = self.engine(preserve=True, sizes=[12 * MIB, 14 * MIB])
        self.assertEqual((found["error"], found["cause"]), ("Mismatch", "OutOfMemoryError"))
        self.assertIn(f'bytes: {14 * MIB}, region "kv/1" of pool "p" has {12 * MIB}', found["text"])
        found = self.engine(preserve=True, sizes=[12 * MIB, 12 * MIB, ROOM])
        self.assertEqual((found["error"], found["cause"]), ("LimitReached", "OutOfMemoryError"))
        self.assertIn("are missing", found["text"])
        self.assertTrue(all(self.engine(preserve=True, sizes=[12 * MIB, 12 * MIB])["inside"]))
        self.assert_clean()


@unittest.skipUnless(has_gpu(), "torch and a GPU are not here")
class Process(unittest.TestCase):
    """Within one process, on an embedded daemon."""

    number = 0

    def setUp(self) -> None:
        import torch

        from kvpool import torch as kv

        self.torch, self.kv = torch, kv
        self.client = kvpool.connect(backend="cuda")
        Process.number += 1
        self.spec = kvpool.PoolSpec(f"torch-{os.getpid()}-{Process.number}", pages=8, page_size=16, layers=2,
                                    kv_heads=1, head_dim=64, dtype="bfloat16", region_bytes=64 * MIB)
        self.pool = self.client.create_pool(self.spec)

    def tearDown(self) -> None:
        self.torch.cuda.synchronize()
        self.pool.detach()
        self.client.close()
        gc.collect()
        self.torch.cuda.empty_cache()
        with kvpool.connect(backend="cuda") as last:
            self.assertEqual(last.audit(), [])
            with last.attach(self.spec.name) as pool:
                for region in pool.regions():
                    pool.drop_region(region.name)
            last.delete_pool(self.spec.name)

    def take(self, *sizes: int, tag: str = "kv"):
        with self.kv.use_pool(self.pool, tag):
            return [self.torch.ones(size, dtype=self.torch.uint8, device="cuda") for size in sizes]

    def listed(self) -> list[tuple[str, int, int]]:
        return [(region.name, region.nbytes // MIB, region.mapped) for region in self.pool.regions()]

    def test_the_planes_are_tensors_on_the_gpu(self) -> None:
        layers = self.kv.tensors(self.pool)
        self.assertEqual([[list(plane.shape) for plane in layer] for layer in layers], [[[8, 16, 1, 64]] * 2] * 2)
        layers[1][0].fill_(3)
        self.assertTrue(bool((self.pool.plane(2).torch() == 3).all()) and layers[1][0].is_cuda)

    def test_what_torch_frees_is_given_back_and_its_numbers_too(self) -> None:
        first, second = self.take(12 * MIB, 16 * MIB)
        self.assertEqual(self.listed(), [("kv/0", 12, 1), ("kv/1", 16, 1)])
        del first
        again, = self.take(12 * MIB)  # torch hands its own cached memory out, without a call
        self.assertEqual(self.listed(), [("kv/0", 12, 1), ("kv/1", 16, 1)])
        with self.assertRaisesRegex(kvpool.Busy, "kv/. .* is mapped by 1 sessions"):
            self.kv.drop(self.pool, "kv")
        self.assertTrue(bool((second == 1).all()))
        del again, second
        gc.collect()
        self.torch.cuda.empty_cache()
        self.kv.drop(self.pool, "kv")
        self.assertEqual(self.listed(), [])
        third, = self.take(20 * MIB)
        self.assertEqual(self.listed(), [("kv/0", 20, 1)])
        self.assertTrue(bool((third == 1).all()))

    def test_a_tensor_outlives_its_pool_and_client(self) -> None:
        tensor, = self.take(12 * MIB)
        self.pool.detach()
        self.client.close()
        gc.collect()
        self.assertTrue(bool((tensor.add_(1) == 2).all()))

    def test_threads_have_tags_of_their_own(self) -> None:
        found: dict[str, list] = {}

        def work(tag: str, value: int) -> None:
            found[tag] = self.take(10 * MIB, 10 * MIB, tag=tag)
            for tensor in found[tag]:
                tensor.fill_(value)

        threads = [threading.Thread(target=work, args=(tag, value)) for tag, value in (("a", 3), ("b", 4))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.torch.cuda.synchronize()
        for tag, value in (("a", 3), ("b", 4)):
            self.assertTrue(all(bool((tensor == value).all()) for tensor in found[tag]))
        self.assertEqual(sorted(name for name, _, _ in self.listed()), ["a/0", "a/1", "b/0", "b/1"])

    def test_another_session_reads_the_tensor_by_its_regions_name(self) -> None:
        tensor, = self.take(12 * MIB)
        tensor.copy_(self.torch.arange(12 * MIB, device="cuda") % 251)
        self.torch.cuda.synchronize()
        with kvpool.connect(backend="cuda") as other, other.attach(self.spec.name) as pool:
            theirs = self.kv.region(pool, "kv/0", (12 * MIB,))
            self.assertTrue(self.torch.equal(theirs, tensor))
            with self.assertRaisesRegex(kvpool.Busy, "is mapped by session"), self.kv.use_pool(pool, "kv", True):
                self.torch.empty(12 * MIB, dtype=self.torch.uint8, device="cuda")
            del theirs

    def test_an_error_of_the_blocks_own_is_passed_on(self) -> None:
        with self.assertRaises(ZeroDivisionError), self.kv.use_pool(self.pool, "kv", True):
            1 // 0  # noqa: B018
        with self.assertRaises(kvpool.InvalidArgument), self.kv.use_pool(self.pool, "no tag"):
            self.torch.empty(1, device="cuda")
        with self.assertRaises(kvpool.InvalidArgument), self.kv.use_pool(self.pool, "t" * 60):
            pass
        self.take(12 * MIB)


if __name__ == "__main__":
    unittest.main()
