"""A pool on a GPU in torch's hands: its memory, its sequences on torch's streams, and hand-over to another process."""
from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import unittest

from support import HAS_NUMPY, has_gpu, run

import kvpool

NUMBERS = itertools.count()
RECEIVER = """
import sys, torch, kvpool
with kvpool.connect(sys.argv[1]) as client, client.attach(sys.argv[2]) as pool:
    print(client.session.session_id, flush=True)
    sys.stdin.readline()
    seq = pool.open(77)
    keys = torch.from_dlpack(pool.plane(2))[seq.pages].flatten(0, 1)
    seq.append(keys[None, :3].expand(2, -1, -1, -1), keys[None, :3].expand(2, -1, -1, -1))
    torch.cuda.synchronize()
    keys = torch.from_dlpack(pool.plane(2))[seq.pages].flatten(0, 1)[: len(seq)]
    print(len(seq), keys.double().sum().item())
    del keys
"""


@unittest.skipUnless(HAS_NUMPY and has_gpu(), "torch with a GPU is not here")
class OnTheGpu(unittest.TestCase):
    def setUp(self) -> None:
        import torch

        torch.manual_seed(3)
        self.torch = torch
        self.client = kvpool.connect(backend="cuda")

    def tearDown(self) -> None:
        self.torch.cuda.synchronize()
        gc.collect()
        self.assertEqual(self.client.audit(), [])
        self.client.close()

    def pool(self, **geometry) -> kvpool.Pool:
        spec = {"pages": 32, "page_size": 4, "layers": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16",
                **geometry}
        return self.client.create_pool(kvpool.PoolSpec(f"gpu-{os.getpid()}-{next(NUMBERS)}", **spec))

    def tokens(self, n: int):
        return self.torch.randn(2, n, 2, 64, dtype=self.torch.bfloat16, device="cuda")

    def held(self, seq: kvpool.Sequence, component: int, layer: int = 1):
        plane = seq.pool.layer(layer)[component].torch()
        if seq.pool.info.spec.order == "HND":
            plane = plane.transpose(1, 2)
        return plane[seq.pages].flatten(0, 1)[: seq.length]

    def test_tensors_are_the_pools_own_memory_in_every_dtype(self) -> None:
        torch = self.torch
        for dtype in ("float32", "float16", "bfloat16", "uint8", "float8_e4m3fn", "float8_e5m2"):
            pool = self.pool(dtype=dtype, order="HND", placement="page")
            tensor, raw = torch.from_dlpack(pool.plane(1)), torch.from_dlpack(pool.plane(1).bytes)
            self.assertEqual((str(tensor.dtype), tensor.device.type), (f"torch.{dtype}", "cuda"))
            raw[9, 1, 2] = 0x38
            self.assertTrue(torch.equal(tensor.view(torch.uint8)[9, 1, 2], raw[9, 1, 2]))
            with self.assertRaises(TypeError):
                pool.plane(1).numpy()

    def test_appended_tokens_are_in_their_pages_and_children_own_their_tails(self) -> None:
        torch = self.torch
        for order in ("NHD", "HND"):
            for placement in ("layer", "page"):
                pool = self.pool(order=order, placement=placement)
                parent = pool.open("parent")
                k, v, more = self.tokens(10), self.tokens(10), self.tokens(2)
                self.assertEqual(parent.append(k[:, :6], v[:, :6]), 6)
                self.assertEqual(parent.append(list(k[:, 6:]), v[:, 6:]), 10)
                torch.cuda.synchronize()
                child = parent.fork("child", 9)
                child.append(more, more)
                parent.append(-more, -more)
                torch.cuda.synchronize()
                self.assertEqual((len(parent), len(child), child.pages[:2]), (12, 11, parent.pages[:2]))
                for component, given in enumerate((k, v)):
                    self.assertTrue(torch.equal(self.held(parent, component), torch.cat([given[1], -more[1]])))
                    self.assertTrue(torch.equal(self.held(child, component), torch.cat([given[1, :9], more[1]])))

    def test_work_on_another_stream_is_waited_for_by_a_point(self) -> None:
        torch = self.torch
        pool = self.pool()
        seq, k = pool.open(1), self.tokens(7)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
        seq.append(k, k, stream=side)
        self.assertEqual(seq.length, 7)
        point = pool.signal(side)
        pool.wait_on(point)  # the current stream waits, this thread does not
        held = self.held(seq, 0).clone()
        pool.wait(point)
        self.assertEqual(len(seq), 7)
        self.assertTrue(torch.equal(held, k[1]))
        seq.close(stream=side)

    def test_a_sequence_is_handed_to_another_process_with_its_bytes(self) -> None:
        pool = self.pool()
        seq, k = pool.open(77), self.tokens(10)
        seq.append(k, k)
        with subprocess.Popen([sys.executable, "-c", RECEIVER, self.client.endpoint, pool.name], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as receiver:
            to = int(receiver.stdout.readline())
            self.torch.cuda.synchronize()
            seq.transfer(to)
            output, _ = receiver.communicate("go\n", timeout=120)
        length, total = output.split()
        self.assertEqual(int(length), 13)
        self.assertAlmostEqual(float(total), (k[1].double().sum() + k[1, :3].double().sum()).item(), places=3)

    def test_the_interpreter_exits_cleanly_while_tensors_are_alive(self) -> None:
        done = run("import kvpool, torch\n"
                   "client = kvpool.connect(backend='cuda')\n"
                   "pool = client.create_pool(kvpool.PoolSpec('p', pages=4, page_size=4, kv_heads=1, head_dim=8))\n"
                   "import builtins; builtins.held = [torch.from_dlpack(pool.plane(0)), pool.plane(1).torch()[1:]]\n"
                   "builtins.held.append(builtins.held); builtins.held[1][:] = 3\n")
        self.assertEqual((done.returncode, done.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main()
