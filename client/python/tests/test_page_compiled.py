"""Decode steps that append by kvpool.page and then read the same cache by attention: what torch.compile makes of them,
in one graph, beside the steps themselves. test_page_gpu.py has the same on a GPU."""
from __future__ import annotations

import contextlib
import os
import tempfile
import unittest
import warnings
from typing import Any, NamedTuple
from unittest import mock

from support import HAS_NUMPY, HAS_TORCH, SEED, PoolTest, needs_torch

import kvpool

if HAS_TORCH and HAS_NUMPY:
    import torch

PAGES, PAGE, HEADS, DIM = 16, 4, 2, 8
HALF = DIM // 2
CACHE = (PAGES, PAGE, HEADS, DIM)


class Batch(NamedTuple):
    """A token for each of three sequences, in all the ways that say where it goes."""

    owners: Any
    positions: Any
    ids: Any
    indptr: Any
    last: Any
    table: Any
    before: Any
    append_indptr: Any

    @classmethod
    def on(cls, device: str) -> Batch:
        values = ([0, 1, 2], [0, 1, 6], [5, 2, 7, 3], [0, 1, 2, 4], [1, 2, 3], [[5, -1], [2, -1], [7, 3]], [0, 1, 2],
                  [0, 1, 2, 3])
        return cls(*(torch.tensor(value, dtype=torch.int32, device=device) for value in values))

    @property
    def csr(self) -> tuple[Any, Any, Any]:
        return self.ids, self.indptr, self.last


def attend(b: Batch, query, keys, values):
    """Over caches [pages, page_size, heads, dim], by their page table."""
    pages = b.table.clamp(min=0).long()
    keys, values = (cache[pages].flatten(1, 2).transpose(1, 2) for cache in (keys, values))
    there = torch.arange(keys.shape[2], device=query.device) <= b.positions[:, None]
    return torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values,
                                                            attn_mask=there[:, None, None])


def joined(b, k, v, cache):
    kvpool.append_paged_kv_cache(k, v, b.owners, b.positions, cache, *b.csr)
    return attend(b, k, cache[:, 0], cache[:, 1])


def pair(b, k, v, keys, values):
    kvpool.append_paged_kv_cache(k, v, b.owners, b.positions, (keys, values), *b.csr)
    return attend(b, k, keys, values)


def pair_of_views(b, k, v, cache):
    kvpool.append_paged_kv_cache(k, v, b.owners, b.positions, (cache[:, 0], cache[:, 1]), *b.csr)
    return attend(b, k, cache[:, 0], cache[:, 1])


def heads_first(b, k, v, cache):
    kvpool.append_paged_kv_cache(k, v, b.owners, b.positions, cache, *b.csr, kv_layout="HND")
    return attend(b, k, cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2))


def rows(b, k, v, cache):
    kvpool.append_paged_kv_cache(k, v, cache, b.table, b.before, PAGE)
    return attend(b, k, cache[:, 0], cache[:, 1])


def rows_of_a_pair(b, k, v, keys, values):
    kvpool.append_paged_kv_cache(k, v, (keys, values), b.table, b.before, PAGE, kv_layout="HND")
    return attend(b, k, keys.transpose(1, 2), values.transpose(1, 2))


def twice(b, k, v, cache):
    first = joined(b, k, v, cache)[:, :, 0]
    kvpool.append_paged_kv_cache(first, -first, cache, b.table, b.before + 1, PAGE)
    return first, attend(b, k, cache[:, 0], cache[:, 1])


def mla(b, k, v, cache):
    kvpool.append_paged_mla_kv_cache(k[:, 0, :HALF], v[:, 0, HALF:], b.owners, b.positions, cache[:, :, :HALF],
                                     cache[:, :, HALF:], *b.csr)
    return attend(b, k[:, :1], cache[:, :, None], cache[:, :, None, :HALF])


def mla_apart(b, k, v, ckv, kpe):
    kvpool.append_paged_mla_kv_cache(k[:, 0], None, b.owners, b.positions, ckv, None, *b.csr)
    kvpool.append_paged_mla_kv_cache(None, v[:, 0], b.owners, b.positions, None, kpe, *b.csr)
    return attend(b, k[:, :1], (ckv + kpe)[:, :, None], ckv[:, :, None])


def mla_rows(b, k, v, cache):
    kvpool.append_paged_mla_kv_cache(k, v, cache, b.table, b.before, PAGE)
    return attend(b, k, cache[..., :DIM], cache[..., DIM:])


def indices(b, k, v, cache):
    lens = kvpool.get_seq_lens(b.indptr, b.last, PAGE)
    owners, positions = kvpool.get_batch_indices_positions(b.append_indptr, lens, 3)
    kvpool.append_paged_kv_cache(k, v, owners, positions, cache, *b.csr)
    before = kvpool.get_seq_lens(b.table, b.before, PAGE)
    return attend(b, k, cache[:, 0], cache[:, 1]), lens + 1, before, kvpool.get_seq_lens(b.indptr, b.last.long(), PAGE)


def given_outputs(b, k, v, cache, owners, positions):
    returned = kvpool.get_batch_indices_positions(b.append_indptr, b.positions + 1, 3, owners, positions)
    kvpool.append_paged_kv_cache(k, v, *returned, cache, *b.csr)
    return attend(b, k, cache[:, 0], cache[:, 1]), positions + owners


def one_given_output(b, k, v, cache, positions):
    owners, _ = kvpool.get_batch_indices_positions(b.append_indptr, b.positions + 1, 3, positions=positions)
    kvpool.append_paged_kv_cache(k, v, owners, positions, cache, *b.csr)
    return attend(b, k, cache[:, 0], cache[:, 1])


# Each step with the shapes of what it changes; () stands for an output of get_batch_indices_positions.
FORMS: dict[Any, list[tuple[int, ...]]] = {
    joined: [(PAGES, 2, *CACHE[1:])],
    pair: [CACHE, CACHE],
    pair_of_views: [(PAGES, 2, *CACHE[1:])],
    heads_first: [(PAGES, 2, HEADS, PAGE, DIM)],
    rows: [(PAGES, 2, *CACHE[1:])],
    rows_of_a_pair: [(PAGES, HEADS, PAGE, DIM)] * 2,
    twice: [(PAGES, 2, *CACHE[1:])],
    mla: [(PAGES, PAGE, DIM)],
    mla_apart: [(PAGES, PAGE, DIM)] * 2,
    mla_rows: [(PAGES, PAGE, HEADS, 2 * DIM)],
    indices: [(PAGES, 2, *CACHE[1:])],
    given_outputs: [(PAGES, 2, *CACHE[1:]), (), ()],
    one_given_output: [(PAGES, 2, *CACHE[1:]), ()],
}


@contextlib.contextmanager
def inductor():
    """Its files go, and it compiles in this process."""
    from torch._inductor import config

    with tempfile.TemporaryDirectory() as folder, config.patch(compile_threads=1), mock.patch.dict(
            os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        yield


class Compared(unittest.TestCase):
    device = "cpu"

    def setUp(self) -> None:
        torch.manual_seed(SEED)
        torch.compiler.reset()
        self.addCleanup(torch.compiler.reset)
        self.batch = Batch.on(self.device)

    def tensors(self, form) -> list[Any]:
        return [torch.randn(shape, device=self.device) if shape
                else torch.full((3,), 9, dtype=torch.int32, device=self.device) for shape in FORMS[form]]

    def compare(self, form, compiled, changed=None) -> None:
        """Twice: a graph can be right at its first run and not at its second."""
        for _ in range(2):
            given = self.tensors(form) if changed is None else changed
            mine = [tensor.clone() for tensor in given]
            k, v = torch.randn(2, 3, HEADS, DIM, device=self.device)
            got, expected = compiled(self.batch, k, v, *given), form(self.batch, k, v, *mine)
            with self.subTest(form=form.__name__, seed=SEED):
                torch.testing.assert_close(got, expected)
                torch.testing.assert_close(given, mine, rtol=0, atol=0)


@needs_torch
class Compiled(Compared):
    def test_every_form_is_one_graph_that_appends_before_it_reads(self) -> None:
        for form in FORMS:
            self.compare(form, torch.compile(form, fullgraph=True, backend="aot_eager"))

    def test_inductor_appends_in_place(self) -> None:
        """As the profiler sees it: nothing as large as the cache is allocated. The step is of calls alone: no compiler
        is needed for it."""
        def step(b, k, v, cache):
            kvpool.append_paged_kv_cache(k, v, b.owners, b.positions, cache, *b.csr)
            return k.flatten(1) @ cache.view(-1, HEADS * DIM).T

        cache, mine = torch.randn(2, 128, 2, *CACHE[1:])
        mine.copy_(cache)
        with inductor():
            compiled = torch.compile(step, fullgraph=True)
            for _ in range(2):
                k, v = torch.randn(2, 3, HEADS, DIM)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
                    got = compiled(self.batch, k, v, cache)
                torch.testing.assert_close(got, step(self.batch, k, v, mine))
                self.assertTrue(torch.equal(cache, mine), SEED)
        allocated = max(event.self_cpu_memory_usage for event in p.events())
        self.assertTrue(0 < allocated < cache.nbytes, allocated)

    def test_views_made_in_the_graph_are_appended_to_where_they_are(self) -> None:
        """Of caches that are no dense tensors and whose sizes are symbols, too: torch can lose what a view is then."""
        def step(b, k, v, cache, lora):
            kvpool.append_paged_kv_cache(k, v, b.owners, b.positions, (cache[:, 0], cache[:, 1]), *b.csr)
            kvpool.append_paged_mla_kv_cache(k[:, 0, :HALF], v[:, 0, HALF:], b.owners, b.positions,
                                             lora[:, :, :HALF], lora[:, :, HALF:], *b.csr)
            return k.flatten(1) @ v.flatten(1).T

        def made():
            return [torch.randn(3, 2 * shape[0], *shape[1:])[1, 1::2] for shape, in (FORMS[joined], FORMS[mla])]

        with inductor():
            for backend in ("aot_eager", "inductor"):
                for dynamic in (False, True):
                    torch.compiler.reset()
                    self.compare(step, torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic), made())

    def test_a_graph_takes_batches_of_other_sizes(self) -> None:
        """And of outputs that lie anywhere in a buffer."""
        def step(k, v, cache, ids, indptr, last, buffer):
            lens = kvpool.get_seq_lens(indptr, last, PAGE)
            owners, positions = kvpool.get_batch_indices_positions(indptr, lens, k.shape[0], buffer[: k.shape[0]],
                                                                   buffer[k.shape[0] : 2 * k.shape[0]])
            kvpool.append_paged_kv_cache(k, v, owners, positions, cache, ids, indptr, last)
            return cache[ids.long()].sum(), lens

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (3, 5, 9):
            (k, v), cache = torch.randn(2, n, HEADS, DIM), torch.randn(FORMS[joined][0])
            table = (torch.randperm(PAGES, dtype=torch.int32)[:n], torch.arange(n + 1, dtype=torch.int32),
                     torch.full((n,), 1, dtype=torch.int32))
            mine, (got, expected) = cache.clone(), torch.full((2, 20), 9, dtype=torch.int32)
            torch.testing.assert_close(compiled(k, v, cache, *table, got), step(k, v, mine, *table, expected))
            self.assertTrue(torch.equal(cache, mine) and torch.equal(got, expected), SEED)

    def test_what_is_wrong_is_told_when_the_graph_runs(self) -> None:
        compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
        k, v = torch.randn(2, 3, HEADS, DIM)
        cache, = self.tensors(joined)
        before = cache.clone()
        with self.assertRaisesRegex(kvpool.InvalidArgument, "float16.*float32"):
            compiled(self.batch, k, v.half(), cache)
        self.assertTrue(torch.equal(cache, before))
        with self.assertRaisesRegex(kvpool.BadIndex, "page id 99"):
            compiled(self.batch._replace(ids=self.batch.ids * 0 + 99), k, v, cache)

    def test_arrays_that_are_not_torchs_are_appended_outside_of_the_graph(self) -> None:
        import numpy

        cache = numpy.zeros((PAGES, 2, *CACHE[1:]), "float32")
        k = numpy.ones((3, HEADS, DIM), "float32")
        where = [part.numpy() for part in self.batch]

        def step(x):
            y = x * 2
            kvpool.append_paged_kv_cache(k, k, where[0], where[1], cache, *where[2:5])
            return y + 1

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, that it can not look into ctypes
            self.assertEqual(torch.compile(step, backend="eager")(torch.ones(1)).item(), 3)
        self.assertEqual(numpy.count_nonzero(cache), 2 * k.size)

    def test_the_operators_are_what_their_schemas_say(self) -> None:
        from kvpool import _operators

        b, (k, v) = self.batch, torch.randn(2, 3, HEADS, DIM)
        whole, apart, slices = (self.tensors(form) for form in (joined, pair, mla))
        ckv, kpe = slices[0][..., :HALF], slices[0][..., HALF:]
        kv, lora, csr, rows = (k, v), (k[:, 0, :HALF], v[:, 0, HALF:]), b[:4], (b.table, b.before, PAGE)
        operators, at = torch.ops.kvpool, _operators._apart
        for operator, arguments in (
                (operators.append_csr_at, (*kv, *at(whole), *csr, "NHD")),
                (operators.append_csr_at, (*kv, *at(apart), b.owners.long(), *csr[1:], "NHD")),
                (operators.append_rows_at, (*kv, *at(whole), *rows, "NHD")),
                (operators.append_mla_csr_at, (*lora, *at([ckv, kpe]), *csr)),
                (operators.append_mla_csr_at, (None, lora[1], *at([kpe]), *csr)),
                (operators.append_mla_rows_at, (*kv, *at(self.tensors(mla_rows)), *rows)),
                (operators.batch_indices_made, (b.append_indptr, b.positions + 1, 5)),
                (operators.seq_lens, (b.indptr, b.last, PAGE)), (operators.seq_lens, (b.table, b.before.long(), PAGE))):
            with self.subTest(str(operator)):
                torch.library.opcheck(operator.default, arguments)


@needs_torch
class CompiledOnAPool(PoolTest):
    def test_two_layers_of_a_pools_planes_are_appended_to_in_one_graph(self) -> None:
        from kvpool import torch as kv

        torch.compiler.reset()
        self.addCleanup(torch.compiler.reset)
        batch = Batch.on("cpu")
        for geometry in ({"joined": True}, {"placement": "page"}, {"order": "HND"}):
            pool = self.pool(pages=PAGES, page_size=PAGE, layers=2, kv_heads=HEADS, head_dim=DIM, dtype="float32",
                             **geometry)
            order = pool.info.spec.order

            def step(x, planes, order=order):
                for keys, values in planes:
                    kvpool.append_paged_kv_cache(x * 2, x + 1, batch.owners, batch.positions, (keys, values),
                                                 *batch.csr, kv_layout=order)
                    if order == "HND":
                        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
                    x = attend(batch, x, keys, values)[:, :, 0]
                return x

            planes, x = kv.tensors(pool), torch.randn(3, HEADS, DIM)
            expected = step(x, planes)
            left = [[plane.clone() for plane in layer] for layer in planes]
            for layer in planes:
                for plane in layer:
                    plane.zero_()
            with self.subTest(geometry, seed=SEED):
                got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, planes)
                torch.testing.assert_close(got, expected)
                for layer, before in zip(planes, left):
                    self.assertTrue(all(map(torch.equal, layer, before)))
            del planes, layer, plane


if __name__ == "__main__":
    unittest.main()
