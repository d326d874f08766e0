"""What test_page.py, test_page_compiled.py and test_manager.py show on the host, on a GPU."""
from __future__ import annotations

import contextlib
import pathlib
import shutil
import sysconfig
import unittest

import test_manager
import test_page
import test_page_compiled as compiled
from support import HAS_NUMPY, has_gpu

import kvpool


def has_compiler() -> bool:
    """What triton launches its kernels by is compiled against this Python."""
    headers = pathlib.Path(sysconfig.get_paths()["include"])
    return any(map(shutil.which, ("cc", "gcc", "clang"))) and (headers / "Python.h").exists()


@unittest.skipUnless(HAS_NUMPY and has_gpu(), "torch with a GPU is not here")
class Page(test_page.TorchHost):
    device = "cuda"
    raises_for_bad_indices = False

    def test_an_append_is_captured_into_a_graph(self) -> None:
        import torch

        k = torch.zeros(2, 1, 4, device="cuda")
        cache = torch.zeros(3, 2, 4, 1, 4, device="cuda")
        call = (k, k, self.ints([0, 0]), self.ints([0, 1]), cache, self.ints([2]), self.ints([0, 1]), self.ints([2]))
        kvpool.append_paged_kv_cache(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kvpool.append_paged_kv_cache(*call)
        k.fill_(3)
        graph.replay()
        self.assertTrue((cache[2, :, :2] == 3).all().item())


@unittest.skipUnless(HAS_NUMPY and has_gpu(), "torch with a GPU is not here")
@unittest.skipUnless(has_compiler(), "no C compiler, or no Python.h, which triton needs")
class Compiled(compiled.Compared):
    device = "cuda"

    def setUp(self) -> None:
        super().setUp()
        stack = contextlib.ExitStack()
        stack.enter_context(compiled.inductor())
        self.addCleanup(stack.close)

    def test_every_form_is_one_graph_that_appends_before_it_reads(self) -> None:
        import torch

        for form in compiled.FORMS:
            self.compare(form, torch.compile(form, fullgraph=True))

    def large(self):
        """A cache of 256 MiB, several times cuBLAS's workspaces, and its copy."""
        import torch

        cache = torch.randn(1 << 19, 2, *compiled.CACHE[1:], device="cuda")
        return cache, cache.clone()

    def steps(self, take, cache, mine) -> None:
        """Some steps by `take` beside the same without a graph, on other tokens each, and nothing as large as the cache
        is allocated."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            k, v = torch.randn(2, 3, compiled.HEADS, compiled.DIM, device="cuda")
            torch.testing.assert_close(take(k, v), compiled.joined(self.batch, k, v, mine))
        self.assertLess(torch.cuda.max_memory_allocated() - before, cache.nbytes)
        self.assertTrue(torch.equal(cache, mine), compiled.SEED)

    def test_reduce_overhead_records_the_step_and_replays_it(self) -> None:
        import torch
        from torch._dynamo.utils import counters

        cache, mine = self.large()
        torch._dynamo.mark_static_address(cache)
        counters.clear()
        step = torch.compile(compiled.joined, fullgraph=True, mode="reduce-overhead")
        with torch.no_grad():
            self.steps(lambda k, v: step(self.batch, k, v, cache).clone(), cache, mine)
        self.assertEqual(counters["inductor"]["cudagraph_skips"], 0)

    def test_a_compiled_step_is_captured_into_a_graph(self) -> None:
        import torch

        cache, mine = self.large()
        k, v = torch.zeros(2, 3, compiled.HEADS, compiled.DIM, device="cuda")
        step = torch.compile(compiled.joined, fullgraph=True)
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            step(self.batch, k, v, cache)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
            out = step(self.batch, k, v, cache)

        def replay(now_k, now_v):
            k.copy_(now_k)
            v.copy_(now_v)
            graph.replay()
            return out

        self.steps(replay, cache, mine)


@unittest.skipUnless(HAS_NUMPY and has_gpu(), "torch with a GPU is not here")
class Manager(test_manager.TorchManager):
    backend = device = "cuda"


if __name__ == "__main__":
    unittest.main()
