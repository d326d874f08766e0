"""What test_page.py and test_manager.py show on the host, on a GPU."""
from __future__ import annotations

import unittest

import test_manager
import test_page
from support import HAS_NUMPY, has_gpu

import kvpool


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
class Manager(test_manager.TorchManager):
    device = "cuda"

    def managers(self, pages: int = 12, page_size: int = 4) -> list[kvpool.PagedKVCacheManager]:
        return [kvpool.PagedKVCacheManager(pages, page_size, 2, 8)]


if __name__ == "__main__":
    unittest.main()
