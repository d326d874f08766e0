"""transformers' continuous batching with its paged cache in regions of a pool, beside its own."""
from __future__ import annotations

import itertools
import os
import unittest

import hf_models
from support import HAS_HF, has_gpu
from test_continuous import has_continuous

import kvpool

LENGTHS = (1, 5, 16, 17, 40, 100)
NUMBERS = itertools.count()


@unittest.skipUnless(HAS_HF and has_gpu() and has_continuous(),
                     "transformers with continuous batching and a GPU are not here")
class OnTheGpu(unittest.TestCase):
    def setUp(self) -> None:
        self.client = kvpool.connect(backend="cuda")
        self.addCleanup(self.client.close)
        self.spec = kvpool.PoolSpec(f"continuous-{os.getpid()}-{next(NUMBERS)}", pages=4, page_size=16,
                                    kv_heads=1, head_dim=64, region_bytes=256 << 20)

    def tokens(self, model) -> list[list[int]]:
        import torch
        from transformers import ContinuousBatchingConfig, GenerationConfig

        generator = torch.Generator().manual_seed(5)
        inputs = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in LENGTHS]
        settings = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(
            inputs, generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, block_size=16, max_batch_tokens=128))
        found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [found[tuple(ids)] for ids in inputs]

    def noting(self, cache: type) -> list[int]:
        """Where the tensors of the caches of that class lie, once they are made."""
        import torch

        found: list[int] = []
        init = cache.__init__

        def made(self, *args, **kwargs) -> None:
            init(self, *args, **kwargs)
            for value in vars(self).values():
                for tensor in value if isinstance(value, list) else [value]:
                    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                        found.append(tensor.data_ptr())

        cache.__init__ = made
        return found

    def test_the_tokens_are_those_of_its_own_cache_and_the_tensors_lie_in_the_pool(self) -> None:
        from kvpool.hf import continuous

        pool = self.client.create_pool(self.spec)
        module = continuous._module()
        stock = module.PagedAttentionCache
        made = []
        for dtype in ("float32", "bfloat16"):
            model = hf_models.make(device="cuda", dtype=dtype)
            model.set_attn_implementation("paged|sdpa")
            expected = self.tokens(model)
            self.assertEqual([len(tokens) for tokens in expected], [24] * len(LENGTHS))
            with continuous.install(pool) as installed:
                ours = module.PagedAttentionCache
                self.assertTrue(issubclass(ours, stock) and ours is not stock)
                made.append(self.noting(ours))
                self.assertEqual(self.tokens(model), expected)
            self.assertIs(module.PagedAttentionCache, stock)
            installed.remove()
        ranges = [(region.pointer, region.pointer + region.nbytes) for region in (
            pool.region(found.name, found.nbytes) for found in pool.regions())]
        for pointers in made:
            self.assertTrue(pointers)
            for pointer in pointers:
                self.assertTrue(any(begin <= pointer < end for begin, end in ranges))

    def test_a_cache_that_is_larger_than_all_regions_is_refused(self) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from kvpool.hf import continuous

        pool = self.client.create_pool(self.spec._replace(region_bytes=2 << 20))
        model = hf_models.make(device="cuda")
        model.set_attn_implementation("paged|sdpa")
        with continuous.install(pool), self.assertRaisesRegex(kvpool.InvalidArgument, "for regions"):
            model.generate_batch(
                [[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(num_blocks=8192, block_size=16,
                                                                    max_batch_tokens=128))


if __name__ == "__main__":
    unittest.main()
