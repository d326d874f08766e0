"""kvpool.flashinfer's tables, plans and caches beside naive ones, on the host backend. test_flashinfer_gpu.py has
FlashInfer itself run on them."""
from __future__ import annotations

import functools
import random
import unittest

from support import PoolTest, needs_torch

import kvpool


def fragmented(pool: kvpool.Pool, lengths: list[int]) -> list[kvpool.Sequence]:
    """Sequences of these lengths whose pages lie in no order. Their tokens are written, with no bytes to speak of."""
    import torch

    pool.advance(pool.open_many(list(range(900, 906))), [pool.page_size] * 6)
    for key in (901, 904, 900):
        pool.open(key).close()
    seqs = pool.open_many(list(range(len(lengths))))
    names = {plane.component: plane for plane in pool.planes}
    for seq, length in zip(seqs, lengths):
        if length:
            seq.append(*[torch.zeros(pool.layers, length, plane.heads, plane.dim, dtype=getattr(torch, plane.dtype))
                         for plane in names.values()])
    return seqs


@needs_torch
class Tables(PoolTest):
    def test_a_page_table_is_that_of_a_naive_walk(self) -> None:
        import torch

        from kvpool import flashinfer

        for page_size in (1, 4, 16):
            pool = self.pool(page_size=page_size, pages=128)
            rng = random.Random(page_size)
            lengths = [0, 1, page_size, page_size + 1, *[rng.randrange(1, 20) for _ in range(4)]]
            seqs = fragmented(pool, lengths)
            table = flashinfer.page_table(pool, seqs)
            indptr, indices, last = [0], [], []
            for seq, length in zip(seqs, lengths):
                pages = seq.pages[: -(-length // page_size)]
                indices += pages
                indptr.append(len(indices))
                last.append(length - (len(pages) - 1) * page_size if pages else 0)
            self.assertEqual([part.tolist() for part in table], [indptr, indices, last, lengths])
            self.assertEqual({part.dtype for part in table}, {torch.int32})
            self.assertEqual(kvpool.get_seq_lens(table.kv_indptr, table.kv_last_page_len, page_size).tolist(), lengths)

    def test_block_tables_are_the_rows_padded_to_the_longest(self) -> None:
        from kvpool import flashinfer

        pool = self.pool()
        seqs = fragmented(pool, [9, 0, 4])
        blocks, lens, longest = flashinfer.block_tables(pool, seqs)
        self.assertEqual(blocks.tolist(), [seqs[0].pages[:3], [0, 0, 0], [seqs[2].pages[0], 0, 0]])
        self.assertEqual((lens.tolist(), longest), ([9, 0, 4], 9))
        self.assertEqual(flashinfer.block_tables(pool, []).block_tables.shape, (0, 0))

    def test_tokens_say_what_is_reserved_and_not_written_yet(self) -> None:
        from kvpool import flashinfer

        pool = self.pool()
        seqs = fragmented(pool, [3, 4])
        pool.advance(seqs, [8, 12])
        table = flashinfer.page_table(pool, seqs, [4, 9])
        self.assertEqual((table.kv_indptr.tolist(), table.kv_last_page_len.tolist()), ([0, 1, 4], [4, 1]))
        self.assertEqual(table.kv_indices.tolist(), seqs[0].pages[:1] + seqs[1].pages)
        for wrong in ([4, 13], [4]):
            with self.assertRaises(kvpool.InvalidArgument):
                flashinfer.page_table(pool, seqs, wrong)

    def test_plans_name_the_arguments_of_the_wrappers(self) -> None:
        import torch

        from kvpool import flashinfer

        pool = self.pool(kv_heads=2, head_dim=16, v_head_dim=8, dtype="bfloat16")
        seqs = fragmented(pool, [5, 8])
        table = flashinfer.page_table(pool, seqs)
        plan = flashinfer.decode_plan(pool, seqs, 8)
        self.assertTrue(torch.equal(plan["indptr"], table.kv_indptr) and torch.equal(plan["indices"], table.kv_indices))
        self.assertTrue(torch.equal(plan["last_page_len"], table.kv_last_page_len))
        self.assertEqual((plan["num_qo_heads"], plan["num_kv_heads"], plan["head_dim"], plan["page_size"],
                          plan["kv_data_type"]), (8, 2, 16, 4, torch.bfloat16))
        plan = flashinfer.prefill_plan(pool, seqs, [5, 2], 8)
        self.assertEqual(plan["qo_indptr"].tolist(), [0, 5, 7])
        self.assertEqual((plan["head_dim_qk"], plan["head_dim_vo"]), (16, 8))
        self.assertTrue(torch.equal(plan["paged_kv_indices"], table.kv_indices))
        decode, prefill = (functools.partial(make, pool, seqs) for make in (flashinfer.decode_plan,
                                                                            flashinfer.prefill_plan))
        for text, call in (("1 query_tokens for 2", lambda: prefill([5], 8)),
                           (r"query_tokens\[1\] 9 is not in 0..8", lambda: prefill([5, 9], 8)),
                           (r"query_tokens\[0\] -1 is not in", lambda: prefill([-1, 2], 8)),
                           ("num_qo_heads 0 is not in 1..", lambda: decode(0)),
                           ("num_qo_heads 7 is no multiple of .* 2", lambda: decode(7)),
                           ("no ckv of layer 0", lambda: flashinfer.mla_plan(pool, seqs, 8))):
            with self.subTest(text), self.assertRaisesRegex(kvpool.InvalidArgument, text):
                call()

    def test_an_mla_plan_has_lengths_in_the_place_of_last_pages(self) -> None:
        from kvpool import flashinfer

        pool = self.pool(ckv_dim=32, kpe_dim=8, joined=True, dtype="float32")
        seqs = fragmented(pool, [5, 8])
        plan = flashinfer.mla_plan(pool, seqs, 16)
        self.assertEqual((plan["qo_indptr"].tolist(), plan["kv_len_arr"].tolist(), plan["kv_indptr"].tolist()),
                         ([0, 1, 2], [5, 8], [0, 2, 4]))
        self.assertEqual((plan["num_heads"], plan["head_dim_ckv"], plan["head_dim_kpe"], plan["page_size"]),
                         (16, 32, 8, 4))
        self.assertEqual(flashinfer.mla_plan(pool, seqs, 16, query_tokens=[5, 3])["qo_indptr"].tolist(), [0, 5, 8])
        with self.assertRaises(kvpool.InvalidArgument):
            flashinfer.decode_plan(pool, seqs, 8)


@needs_torch
class Caches(PoolTest):
    def attend(self, q, k, v):
        import torch

        weights = torch.softmax(torch.einsum("hd,thd->ht", q, k) / q.shape[-1] ** 0.5, -1)
        return torch.einsum("ht,thd->hd", weights, v)

    def test_attention_by_table_and_cache_is_that_over_contiguous_tokens(self) -> None:
        import torch

        from kvpool import flashinfer

        for order in ("NHD", "HND"):
            for placement in ("layer", "page"):
                pool = self.pool(order=order, placement=placement, layers=2, dtype="float32")
                seqs = fragmented(pool, [0, 0, 0])
                k, v = torch.randn(2, 18, 2, 8), torch.randn(2, 18, 2, 8)
                pool.append(seqs, k, v, tokens=[1, 8, 9])
                self.assertEqual(flashinfer.kv_layout(pool), order)
                table = flashinfer.page_table(pool, seqs)
                both = flashinfer.paged_kv_cache(pool, 1, joined=True)
                pair = flashinfer.paged_kv_cache(pool, 1)
                self.assertEqual(both.shape[:2], (32, 2))
                for half, other in zip(pair, both.unbind(1)):
                    self.assertEqual((half.data_ptr(), half.shape, half.stride()),
                                     (other.data_ptr(), other.shape, other.stride()))
                q, at = torch.randn(2, 8), 0
                for i, count in enumerate((1, 8, 9)):
                    pages = table.kv_indices[table.kv_indptr[i] : table.kv_indptr[i + 1]]
                    paged = [(part if order == "NHD" else part.transpose(1, 2))[pages].flatten(0, 1)[:count]
                             for part in pair]
                    expected = self.attend(q, k[1, at : at + count], v[1, at : at + count])
                    self.assertTrue(torch.equal(self.attend(q, *paged), expected))
                    at += count
                del both, pair, half, other, paged

    def test_mla_caches_are_apart_or_joined_over_the_same_bytes(self) -> None:
        import torch

        from kvpool import flashinfer

        pool = self.pool(ckv_dim=32, kpe_dim=8, joined=True, dtype="float32", layers=2)
        seq = fragmented(pool, [0])[0]
        ckv, kpe = torch.randn(2, 7, 32), torch.randn(2, 7, 8)
        seq.append(ckv, kpe)
        parts, joined = flashinfer.paged_mla_cache(pool, 1), flashinfer.joined_mla_cache(pool, 1)
        self.assertEqual(joined.shape, (32, 4, 40))
        for part, other, given in zip(parts, joined.split([32, 8], 2), (ckv, kpe)):
            self.assertEqual((part.data_ptr(), part.stride()), (other.data_ptr(), other.stride()))
            self.assertTrue(torch.equal(part[seq.pages].flatten(0, 1)[:7], given[1]))
        apart = self.pool(ckv_dim=32, kpe_dim=8)
        self.assertEqual([part.shape for part in flashinfer.paged_mla_cache(apart, 0)], [(32, 4, 32), (32, 4, 8)])
        for call in (lambda: flashinfer.joined_mla_cache(apart, 0), lambda: flashinfer.paged_kv_cache(apart, 0),
                     lambda: flashinfer.paged_mla_cache(self.pool(), 0)):
            with self.assertRaises(kvpool.InvalidArgument):
                call()
        del parts, joined, part, other


if __name__ == "__main__":
    unittest.main()
