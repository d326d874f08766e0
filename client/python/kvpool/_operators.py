"""kvpool.page's functions as operators of torch, "kvpool::append_csr" and so on: what is in a graph that torch.compile
makes. `page._run` takes them while torch.compile reads a caller; each does what the function of `page` does that it is
named for.

An operator's schema says what it changes: so torch keeps behind an append what reads that cache. For that, torch hands
an operator the tensor that a view is of, and makes the view again, which it can get wrong (an offset or strides that
are lost, where the cache is no dense tensor or its sizes are symbols). Hence two operators for an append:

    append_csr(caches)  ── torch takes it apart ──►  append_csr_at(bases, where in them the caches are)

torch keeps graphs for other processes by the names of what is in them: an operator that comes to mean something else
takes another name. They are registered with the dispatcher itself; by `torch.library.custom_op`, a call would take
twice as long.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from . import _views, page
from .errors import InvalidArgument

_library = torch.library.Library("kvpool", "DEF")  # they are there as long as it


class _Cache:
    """A cache in its base."""

    def __init__(self, view: _views.View) -> None:
        self._kvpool_view = view


def _returns_nothing(*_: Any) -> None:
    """What the operators that only change their arguments do of fake tensors."""


def _define(name: str, schema: str) -> Any:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.kvpool, name).default


def _operator(name: str, schema: str, work: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    made = _define(name, schema)
    for place in ("CPU", "CUDA"):
        _library.impl(name, work, place)
    torch.library.register_fake(f"kvpool::{name}", fake, lib=_library)
    return made


def _apart(caches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any], list[str]]:
    """The tensors that caches are views of; of each cache which of them that is, its dimensions, its base's, its offset
    there in bytes, its shape and strides, its base's strides; and its dtype."""
    bases: list[torch.Tensor] = []
    numbers: list[Any] = []
    for cache in caches:
        base = cache._base if cache._base is not None else cache
        at = next((i for i, known in enumerate(bases) if known is base), len(bases))
        if at == len(bases):
            bases.append(base)
        offset = cache.storage_offset() * cache.itemsize - base.storage_offset() * base.itemsize
        numbers += [at, cache.dim(), base.dim(), offset, *cache.shape, *cache.stride(), *base.stride()]
    return bases, numbers, [_views.torch_name(cache.dtype) for cache in caches]


def _together(bases: list[torch.Tensor], numbers: list[int], dtypes: list[str]) -> list[_Cache]:
    """The caches of `_apart`. Raises InvalidArgument where a base is not laid out as it was."""
    caches, rest = [], iter(numbers)
    for dtype in dtypes:
        at, dims, base_dims, offset = itertools.islice(rest, 4)
        shape, strides, base_strides = (tuple(itertools.islice(rest, n)) for n in (dims, dims, base_dims))
        if bases[at].stride() != base_strides:
            raise InvalidArgument(f"the graph has a cache of strides {list(bases[at].stride())}; it was traced with "
                                  f"{list(base_strides)}")
        size, seen = getattr(torch, dtype).itemsize, _views.view(bases[at], "the cache")
        caches.append(_Cache(seen._replace(
            pointer=seen.pointer + offset, shape=shape, strides=tuple([stride * size for stride in strides]),
            itemsize=size, dtype=dtype)))
    return caches


def _append(work: Callable[..., Any], before: str, behind: str) -> Any:
    """An append by its function's arguments before its caches and behind them."""
    name, caches_at = work.__name__.lstrip("_"), before.count(",") + 1

    def take_apart(*args: Any) -> None:
        at(*args[:caches_at], *_apart(args[caches_at]), *args[caches_at + 1 :])

    def run(*args: Any) -> None:
        work(*args[:caches_at], _together(*args[caches_at : caches_at + 3]), *args[caches_at + 3 :])

    at = _operator(f"{name}_at", f"({before}, Tensor(a!)[] bases, SymInt[] numbers, str[] dtypes, {behind}) -> ()",
                   run, _returns_nothing)
    made = _define(name, f"({before}, Tensor(a!)[] caches, {behind}) -> ()")
    _library.impl(name, take_apart, "CompositeImplicitAutograd")
    return made


def _like_lengths(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    both = kv_indptr.dtype == kv_last_page_len.dtype == torch.int32
    return kv_last_page_len.new_empty(kv_last_page_len.shape, dtype=torch.int32 if both else torch.int64)


def _batch_indices() -> Any:
    """Into tensors of torch's choice, and from there into those that are given."""
    def like(append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
        return append_indptr.new_empty(nnz, dtype=torch.int32), append_indptr.new_empty(nnz, dtype=torch.int32)

    def run(append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = like(append_indptr, seq_lens, nnz)
        page._batch_indices(append_indptr, seq_lens, nnz, *made)
        return made

    def take_apart(append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int, *outputs: torch.Tensor) -> None:
        for given, what in zip(outputs, ("batch_indices", "positions")):
            page._check_output(tuple(given.shape), _views.torch_name(given.dtype), given.is_contiguous(), nnz, what)
        for given, made in zip(outputs, apart(append_indptr, seq_lens, nnz)):
            given.copy_(made)

    apart = _operator("batch_indices_made", "(Tensor append_indptr, Tensor seq_lens, SymInt nnz) -> (Tensor, Tensor)",
                      run, like)
    made = _define("batch_indices", "(Tensor append_indptr, Tensor seq_lens, SymInt nnz, Tensor(a!) batch_indices, "
                   "Tensor(b!) positions) -> ()")
    _library.impl("batch_indices", take_apart, "CompositeImplicitAutograd")
    return made


_CSR = "Tensor batch_indices, Tensor positions, Tensor kv_indices, Tensor kv_indptr"
_ROWS = "Tensor page_table, Tensor last_page_len, SymInt page_size"

append_csr = _append(page._append_csr, "Tensor key, Tensor value", f"{_CSR}, str kv_layout")
append_rows = _append(page._append_rows, "Tensor key, Tensor value", f"{_ROWS}, str kv_layout")
append_mla_csr = _append(page._append_mla_csr, "Tensor? ckv, Tensor? kpe", _CSR)
append_mla_rows = _append(page._append_mla_rows, "Tensor key, Tensor value", _ROWS)
batch_indices = _batch_indices()
seq_lens = _operator("seq_lens", "(Tensor kv_indptr, Tensor kv_last_page_len, SymInt page_size) -> Tensor",
                     page._seq_lens, _like_lengths)
