"""FlashInfer's own attention over kvpool's pages, beside attention over contiguous K and V.

Needs a GPU, torch and the flashinfer-python wheel, which compiles its kernels at their first use."""
from __future__ import annotations

import importlib.util
import os
import unittest

from support import HAS_TORCH, has_gpu

import kvpool

HAS_FLASHINFER = HAS_TORCH and importlib.util.find_spec("flashinfer") is not None
HEADS, KV_HEADS, DIM = 8, 2, 128
CKV, KPE = 512, 64
LENGTHS = [1, 15, 16, 17, 333, 1]
WORKSPACE_BYTES = 128 << 20


@unittest.skipUnless(HAS_FLASHINFER and has_gpu(), "torch, flashinfer and a GPU are not here")
class Attention(unittest.TestCase):
    """Both run the same kernel on the same values: over the pool's scattered pages, and over a cache where the tokens
    of a sequence lie one behind the other; the results must be equal to the last bit. That they are right is shown by
    torch over contiguous tokens, in fp32."""

    number = 0

    def setUp(self) -> None:
        import torch

        torch.manual_seed(3)
        self.torch = torch
        self.client = kvpool.connect(backend="cuda")
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self.made: list[str] = []

    def tearDown(self) -> None:
        self.torch.cuda.synchronize()
        self.client.close()

    def pool(self, **geometry) -> kvpool.Pool:
        Attention.number += 1
        spec = kvpool.PoolSpec(f"fi-{os.getpid()}-{Attention.number}", pages=256, page_size=16, layers=2,
                               dtype="bfloat16", **geometry)
        return self.client.create_pool(spec)

    def random(self, *shape: int):
        return self.torch.randn(shape, dtype=self.torch.bfloat16, device="cuda")

    def fill(self, pool: kvpool.Pool, *components) -> list[kvpool.Sequence]:
        """Sequences of LENGTHS with these tokens, their pages out of order."""
        holes = pool.open_many(range(100, 120))
        pool.advance(holes, [pool.page_size] * 20)
        for hole in holes[::3]:
            hole.close()
        seqs = pool.open_many(range(len(LENGTHS)))
        pool.append(seqs, *components, tokens=LENGTHS)
        return seqs

    def dense(self, flat, page: int):
        """The same tokens in a cache of its own, [pages, page, ...]: indptr, indices, the cache."""
        torch = self.torch
        counts = [-(-length // page) for length in LENGTHS]
        cache = torch.zeros(sum(counts) * page, *flat.shape[1:], dtype=flat.dtype, device="cuda")
        at = 0
        for i, length in enumerate(LENGTHS):
            begin = sum(counts[:i]) * page
            cache[begin : begin + length] = flat[at : at + length]
            at += length
        indptr = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
        return indptr, torch.arange(sum(counts), dtype=torch.int32), cache.view(-1, page, *flat.shape[1:])

    def expected(self, q, k, v, scale: float, query_tokens: list[int]):
        """Attention in fp32, each query at the end of its sequence."""
        torch = self.torch
        out, at, done = [], 0, 0
        for length, n in zip(LENGTHS, query_tokens):
            key, value = (part[at : at + length].float().repeat_interleave(q.shape[1] // part.shape[1], 1)
                          for part in (k, v))
            logits = torch.einsum("qhd,khd->hqk", q[done : done + n].float(), key) * scale
            behind = torch.arange(length, device="cuda") > torch.arange(length - n, length, device="cuda")[:, None]
            weights = logits.masked_fill(behind, float("-inf")).softmax(-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, value))
            at, done = at + length, done + n
        return torch.cat(out)

    def assert_right(self, got, expected) -> None:
        self.torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)

    def layouts(self):
        for order in ("NHD", "HND"):
            for placement in ("layer", "page"):
                yield self.pool(kv_heads=KV_HEADS, head_dim=DIM, order=order, placement=placement)

    def caches(self, pool: kvpool.Pool):
        """K and V of layer 1, filled: (k, v, sequences)."""
        n = sum(LENGTHS)
        k, v = self.random(2, n, KV_HEADS, DIM), self.random(2, n, KV_HEADS, DIM)
        return k[1], v[1], self.fill(pool, k, v)

    def test_decode_over_the_pool_is_decode_over_contiguous_tokens(self) -> None:
        import flashinfer as fi

        from kvpool import flashinfer

        wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD")
        for pool in self.layouts():
            k, v, seqs = self.caches(pool)
            q = self.random(len(LENGTHS), HEADS, DIM)
            ours = fi.BatchDecodeWithPagedKVCacheWrapper(self.workspace, flashinfer.kv_layout(pool))
            ours.plan(**flashinfer.decode_plan(pool, seqs, HEADS), q_data_type=q.dtype)
            pair, both = flashinfer.paged_kv_cache(pool, 1), flashinfer.paged_kv_cache(pool, 1, joined=True)
            got = ours.run(q, pair)
            self.assertTrue(self.torch.equal(ours.run(q, both), got))
            indptr, indices, keys = self.dense(k, 16)
            last = self.torch.tensor([(length - 1) % 16 + 1 for length in LENGTHS], dtype=self.torch.int32)
            wrapper.plan(indptr, indices, last, HEADS, KV_HEADS, DIM, 16, q_data_type=q.dtype, kv_data_type=q.dtype)
            self.assertTrue(self.torch.equal(wrapper.run(q, (keys, self.dense(v, 16)[2])), got))
            self.assert_right(got, self.expected(q, k, v, DIM**-0.5, [1] * len(LENGTHS)))
            del pair, both

    def test_prefill_over_the_pool_is_prefill_over_contiguous_tokens(self) -> None:
        import flashinfer as fi

        from kvpool import flashinfer

        queries = [min(length, 20) for length in LENGTHS]
        for pool in self.layouts():
            k, v, seqs = self.caches(pool)
            q = self.random(sum(queries), HEADS, DIM)
            wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(self.workspace, flashinfer.kv_layout(pool), backend="fa2")
            plan = flashinfer.prefill_plan(pool, seqs, queries, HEADS)
            wrapper.plan(**plan, causal=True, q_data_type=q.dtype)
            pair = flashinfer.paged_kv_cache(pool, 1)
            got = wrapper.run(q, pair)
            self.assert_right(got, self.expected(q, k, v, DIM**-0.5, queries))
            indptr, indices, keys = self.dense(k, 16)
            dense = fi.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend="fa2")
            dense.plan(**{**plan, "paged_kv_indptr": indptr, "paged_kv_indices": indices}, causal=True,
                       q_data_type=q.dtype)
            self.assertTrue(self.torch.equal(dense.run(q, (keys, self.dense(v, 16)[2])), got))
            del pair

    def test_mla_over_the_pool_is_mla_over_contiguous_tokens(self) -> None:
        import flashinfer as fi

        from kvpool import flashinfer

        n = sum(LENGTHS)
        ckv, kpe = self.random(2, n, CKV), self.random(2, n, KPE)
        q_nope, q_pe = self.random(len(LENGTHS), 16, CKV), self.random(len(LENGTHS), 16, KPE)
        scale = (128 + KPE) ** -0.5
        results = []
        for geometry in ({"joined": True}, {"joined": False}, {"placement": "page"}):
            pool = self.pool(ckv_dim=CKV, kpe_dim=KPE, **geometry)
            seqs = self.fill(pool, ckv, kpe)
            wrapper = fi.BatchMLAPagedAttentionWrapper(self.workspace, backend="fa2")
            wrapper.plan(**flashinfer.mla_plan(pool, seqs, 16), causal=False, sm_scale=scale, q_data_type=q_nope.dtype)
            cache = flashinfer.paged_mla_cache(pool, 1)
            results.append(wrapper.run(q_nope, q_pe, *cache))
            del cache
        indptr, indices, dense = self.dense(ckv[1], 16)
        wrapper = fi.BatchMLAPagedAttentionWrapper(self.workspace, backend="fa2")
        wrapper.plan(**{**flashinfer.mla_plan(pool, seqs, 16), "kv_indptr": indptr, "kv_indices": indices},
                     causal=False, sm_scale=scale, q_data_type=q_nope.dtype)
        results.append(wrapper.run(q_nope, q_pe, dense, self.dense(kpe[1], 16)[2]))
        for result in results[1:]:
            self.assertTrue(self.torch.equal(result, results[0]))
        key = self.torch.cat([ckv[1], kpe[1]], -1)[:, None]
        expected = self.expected(self.torch.cat([q_nope, q_pe], -1), key, ckv[1][:, None], scale, [1] * len(LENGTHS))
        self.assert_right(results[0], expected)

    def test_decode_by_block_tables_is_right(self) -> None:
        import flashinfer as fi

        from kvpool import flashinfer

        for pool in self.layouts():
            k, v, seqs = self.caches(pool)
            q = self.random(len(LENGTHS), HEADS, DIM)
            tables = flashinfer.block_tables(pool, seqs)
            cache = flashinfer.paged_kv_cache(pool, 1)
            got = fi.decode.trtllm_batch_decode_with_kv_cache(
                q, cache, self.torch.zeros_like(self.workspace), *tables, bmm1_scale=DIM**-0.5, bmm2_scale=1.0,
                kv_layout=flashinfer.kv_layout(pool))
            self.assert_right(got, self.expected(q, k, v, DIM**-0.5, [1] * len(LENGTHS)))
            del cache

    def test_a_decode_step_in_a_graph_appends_and_attends_over_the_pool(self) -> None:
        """kvpool.page's append and FlashInfer's run, captured once, replayed with other values in the same tensors."""
        import flashinfer as fi

        from kvpool import flashinfer

        torch = self.torch
        pool = self.pool(kv_heads=KV_HEADS, head_dim=DIM)
        k, v, seqs = self.caches(pool)
        after = [length + 1 for length in LENGTHS]
        pool.advance(seqs, [-(-length // pool.page_size) * pool.page_size for length in after])
        table = flashinfer.page_table(pool, seqs, after)
        batch = len(LENGTHS)
        wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_cuda_graph=True,
            paged_kv_indptr_buffer=torch.zeros(batch + 1, dtype=torch.int32, device="cuda"),
            paged_kv_indices_buffer=torch.zeros(pool.pages, dtype=torch.int32, device="cuda"),
            paged_kv_last_page_len_buffer=torch.zeros(batch, dtype=torch.int32, device="cuda"))
        wrapper.plan(**flashinfer.decode_plan(pool, seqs, HEADS, tokens=after), q_data_type=torch.bfloat16)
        on_device = [part.cuda() for part in table]
        rows = torch.arange(batch, dtype=torch.int32, device="cuda")
        positions = on_device[3] - 1
        pair = flashinfer.paged_kv_cache(pool, 1)
        new_k, new_v, q = self.random(batch, KV_HEADS, DIM), self.random(batch, KV_HEADS, DIM), self.random(
            batch, HEADS, DIM)

        def step():
            kvpool.append_paged_kv_cache(new_k, new_v, rows, positions, pair, on_device[1], on_device[0], on_device[2])
            return wrapper.run(q, pair)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = step()
        for tensor in (new_k, new_v, q):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        torch.cuda.synchronize()
        got = out.clone()
        self.assertTrue(torch.equal(got, step()))
        ends = torch.tensor(after).cumsum(0) - 1
        whole = []
        for old, new in ((k, new_k), (v, new_v)):
            both, at = [], 0
            for i, length in enumerate(LENGTHS):
                both += [old[at : at + length], new[i : i + 1]]
                at += length
            whole.append(torch.cat(both))
        expected = []
        for i, end in enumerate(ends.tolist()):
            key, value = (part[end + 1 - after[i] : end + 1].float().repeat_interleave(HEADS // KV_HEADS, 1)
                          for part in whole)
            weights = (torch.einsum("hd,khd->hk", q[i].float(), key) * DIM**-0.5).softmax(-1)
            expected.append(torch.einsum("hk,khd->hd", weights, value))
        self.assert_right(got, torch.stack(expected))


if __name__ == "__main__":
    unittest.main()
