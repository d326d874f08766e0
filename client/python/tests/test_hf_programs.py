"""Random programs over KVPoolCaches, each beside plain tensors: passes, crops, rows chosen, copies, and what was cut
off."""
from __future__ import annotations

import copy
import random
import unittest

from support import HAS_HF, SEED, PoolTest

import kvpool

PROGRAMS, STEPS = 8, 40


class Naive:
    """What a cache holds: K and V of each layer, [batch, heads, length, dim]."""

    def __init__(self, held: list) -> None:
        self.held = held

    @property
    def length(self) -> int:
        return 0 if self.held[0][0] is None else self.held[0][0].shape[2]

    @property
    def batch(self) -> int:
        return len(self.held[0][0]) if self.length else 0

    def each(self, change) -> None:
        self.held = [tuple(change(part) for part in pair) for pair in self.held]


@unittest.skipUnless(HAS_HF, "torch and transformers are not installed")
class Programs(PoolTest):
    def begin(self, seed: int) -> None:
        import torch
        import transformers

        self.torch, self.random = torch, random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        pick = self.random.choice
        self.heads, self.dim, layers = pick((1, 2, 3)), pick((4, 8)), pick((1, 2, 3))
        self.window = pick((2, 3, 5, 8))
        kinds = [pick(("full_attention", "sliding_attention")) for _ in range(layers)]
        self.windows = [self.window if kind == "sliding_attention" else 0 for kind in kinds]
        self.config = transformers.Gemma2Config(
            hidden_size=48, num_hidden_layers=layers, num_attention_heads=self.heads, head_dim=self.dim,
            num_key_value_heads=self.heads, layer_types=kinds, sliding_window=self.window)
        self.shared = self.pool(layers=layers, kv_heads=self.heads, head_dim=self.dim, pages=400, dtype="float32",
                                page_size=pick((1, 2, 3, 4, 7, 16)), order=pick(("NHD", "HND")),
                                placement=pick(("layer", "page")))

    def new(self) -> list:
        from kvpool import hf

        return [hf.KVPoolCache(self.config, self.shared), Naive([(None, None)] * self.shared.layers)]

    def brought(self, batch: int, tokens: int) -> tuple:
        shape = batch, tokens, self.heads, self.dim  # as a projection makes them: the heads of a token side by side
        return tuple(self.torch.randn(shape, generator=self.numbers).transpose(1, 2) for _ in range(2))

    def seen(self, layer: int, length: int) -> int:
        return max(length - self.windows[layer] + 1, 0) if self.windows[layer] else 0

    def update(self, cache, naive: Naive) -> None:
        length, tokens = naive.length, self.random.choice((1, 1, 2, 5, 9))
        batch = naive.batch or self.random.choice((1, 2, 3))
        for layer, old in enumerate(naive.held):
            new = self.brought(batch, tokens)
            first = self.seen(layer, length)
            self.assertEqual(cache.get_mask_sizes(tokens, layer), (length + tokens - first, first))
            naive.held[layer] = tuple(part if length == 0 else self.torch.cat([before, part], 2)
                                      for before, part in zip(old, new))
            for got, whole in zip(cache.update(*new, layer), naive.held[layer]):
                self.assertTrue(self.torch.equal(got, whole[:, :, first:]))

    def crop(self, cache, naive: Naive) -> None:
        removed = self.random.randrange(naive.length + 2)
        cache.crop(-removed)
        kept = max(naive.length - removed, 0)
        naive.each(lambda part: part[:, :, :kept] if kept else None)

    def select(self, cache, naive: Naive) -> None:
        rows = [self.random.randrange(naive.batch) for _ in range(self.random.randrange(1, 5))]
        self.random.choice((cache.batch_select_indices, cache.reorder_cache))(self.torch.tensor(rows))
        naive.each(lambda part: part[rows])

    def repeat(self, cache, naive: Naive) -> None:
        cache.batch_repeat_interleave(2)
        naive.each(lambda part: part.repeat_interleave(2, 0))

    def cut_off(self, cache, naive: Naive) -> None:
        """A pass that ends before its last layer."""
        if self.shared.layers > 1:
            cache.update(*self.brought(naive.batch, 3), 0)
            with self.assertRaises(kvpool.Mismatch):
                cache.batch_repeat_interleave(2)
            cache.crop(0)

    def step(self, caches: list) -> None:
        at = self.random.randrange(len(caches))
        cache, naive = caches[at]
        what = self.random.choice((*[self.update] * 5, self.crop, self.select, self.repeat, self.cut_off, "copy",
                                   "new"))
        if what == "new":
            caches[at] = self.new()  # nobody closes the one before
        elif what == "copy" and len(caches) < 4:
            caches.append([copy.deepcopy(cache), Naive(list(naive.held))])
        elif (what == self.update and naive.length < 60) or (callable(what) and 0 < naive.batch < 5):
            what(cache, naive)
        self.agree(*caches[at])

    def agree(self, cache, naive: Naive) -> None:
        length = naive.length
        self.assertEqual(cache.get_seq_length(), length)
        for layer, pair in enumerate(naive.held if length else ()):
            held = cache.layers[layer]
            for got, whole in zip((held.keys, held.values), pair):
                self.assertTrue(self.torch.equal(got, whole[:, :, self.seen(layer, length) :]))

    def test_random_programs_agree_with_tensors(self) -> None:
        for seed in range(SEED, SEED + PROGRAMS):
            with self.subTest(seed=seed):
                self.begin(seed)
                caches = [self.new()]
                for _ in range(STEPS):
                    self.step(caches)
                self.assertEqual(self.client.audit(), [])
                for cache, naive in caches:
                    self.agree(cache, naive)
                    cache.close()
                last, _ = self.new()
                last.update(*self.brought(1, 1), 0)  # closes those that were let go
                last.close()
                self.assertEqual(self.shared.free_pages, self.shared.pages)


if __name__ == "__main__":
    unittest.main()
