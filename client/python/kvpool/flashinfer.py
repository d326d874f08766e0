"""FlashInfer's attention on kvpool's pages: the caches and the page tables as its wrappers take them.

    cache = kvpool.flashinfer.paged_kv_cache(pool, layer)                     # once
    wrapper.plan(**kvpool.flashinfer.decode_plan(pool, seqs, 32), q_data_type=torch.bfloat16)
    out = wrapper.run(q, cache)                                               # every layer

| for                                                    | plan                      | the cache                     |
|--------------------------------------------------------|---------------------------|-------------------------------|
| BatchDecodeWithPagedKVCacheWrapper                     | decode_plan               | paged_kv_cache                |
| BatchPrefillWithPagedKVCacheWrapper                    | prefill_plan              | paged_kv_cache                |
| BatchMLAPagedAttentionWrapper                          | mla_plan                  | paged_mla_cache               |
| trtllm_batch_decode_with_kv_cache, cudnn's             | block_tables              | paged_kv_cache                |
| trtllm_batch_decode_with_kv_cache_mla                  | block_tables              | joined_mla_cache              |

A wrapper is made with kv_layout=kv_layout(pool). Tables are read from shared memory, without a call: of the tokens that
are written or enqueued (`Sequence.length`), or of `tokens` of each sequence, so that what is reserved may be planned
before the step that appends it. A plan reads its arrays on the host and copies them to the device itself, so they are
host tensors where `device` does not say else. Needs torch, not FlashInfer.
"""
from __future__ import annotations

import array
import itertools
from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._arguments import integer
from .errors import InvalidArgument

if TYPE_CHECKING:
    from .plane import Plane
    from .pool import Pool
    from .sequence import Sequence


class PageTable(NamedTuple):
    """A CSR page table, int32."""

    kv_indptr: torch.Tensor
    """[batch + 1]"""
    kv_indices: torch.Tensor
    """[kv_indptr[batch]] page ids."""
    kv_last_page_len: torch.Tensor
    """[batch] tokens in the last page, 1..page_size; 0 of an empty sequence."""
    seq_lens: torch.Tensor
    """[batch] tokens."""


class BlockTables(NamedTuple):
    """A rectangular page table."""

    block_tables: torch.Tensor
    """[batch, pages of the longest] page ids, int32; 0 behind a sequence's last."""
    seq_lens: torch.Tensor
    """[batch] tokens, int32."""
    max_seq_len: int


# ---- caches --------------------------------------------------------------------------------------------------------


def kv_layout(pool: Pool) -> str:
    """The order of the pool's planes as the wrappers call it: "NHD" or "HND"."""
    return pool.info.spec.order


def _pair(pool: Pool, layer: int, names: tuple[str, str], rank: int) -> tuple[Plane, Plane]:
    planes = pool.layer(layer, rank)
    found = tuple(pool.planes[i].component for i in range(len(pool.planes)) if pool.planes[i].layer == layer)
    if found != names:
        raise InvalidArgument(f"layer {layer} of pool {pool.name} has {', '.join(found)}, not {' and '.join(names)}")
    return planes[0], planes[1]


def paged_kv_cache(pool: Pool, layer: int, *, joined: bool = False,
                   rank: int = 0) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """A layer's cache over the pool's own memory: the pair (k, v), each [pages, page_size, heads, dim] (NHD) or [pages,
    heads, page_size, dim] (HND); `joined`: both as one [pages, 2, ...]. Raises InvalidArgument of an MLA pool, and
    where K and V do not join."""
    pair = _pair(pool, layer, ("k", "v"), rank)
    if joined:
        return torch.from_dlpack(pool.joined_layer(layer, rank))
    return torch.from_dlpack(pair[0]), torch.from_dlpack(pair[1])


def paged_mla_cache(pool: Pool, layer: int, *, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's cache of an MLA pool: (ckv [pages, page_size, ckv_dim], kpe [pages, page_size, kpe_dim]), slices of one
    where the pool is joined. Raises InvalidArgument of a pool of K and V."""
    ckv, kpe = _pair(pool, layer, ("ckv", "kpe"), rank)
    return torch.from_dlpack(ckv), torch.from_dlpack(kpe)


def joined_mla_cache(pool: Pool, layer: int, *, rank: int = 0) -> torch.Tensor:
    """A layer's cache of a joined MLA pool as one tensor, [pages, page_size, ckv_dim + kpe_dim]. Raises InvalidArgument
    where the pool is not joined."""
    _pair(pool, layer, ("ckv", "kpe"), rank)
    return torch.from_dlpack(pool.joined_layer(layer, rank))


# ---- tables --------------------------------------------------------------------------------------------------------


def _tensor(values: array.array[int], device: Any) -> torch.Tensor:
    made = torch.frombuffer(values, dtype=torch.int32) if len(values) else torch.empty(0, dtype=torch.int32)
    return made if device is None else made.to(device, non_blocking=True)


def page_table(pool: Pool, seqs: Listing[Sequence], tokens: Listing[int] | None = None, *,
               device: Any = None) -> PageTable:
    """The CSR page table over `tokens` of each sequence. Raises StaleHandle, TryAgain, and InvalidArgument where a row
    has not the pages."""
    lengths = pool.lengths(seqs) if tokens is None else list(tokens)
    values = (*pool.csr(seqs, lengths), array.array("i", lengths))
    return PageTable(*(_tensor(entry, device) for entry in values))


def block_tables(pool: Pool, seqs: Listing[Sequence], tokens: Listing[int] | None = None, *,
                 device: Any = None) -> BlockTables:
    """The same as a rectangle, on the pool's device where `device` does not say else."""
    lengths = pool.lengths(seqs) if tokens is None else list(tokens)
    indptr, indices, _ = pool.csr(seqs, lengths)
    width = max((after - before for before, after in itertools.pairwise(indptr)), default=0)
    rows: array.array[int] = array.array("i")
    rows.frombytes(bytes(4 * len(seqs) * width))
    for i, (before, after) in enumerate(itertools.pairwise(indptr)):
        rows[i * width : i * width + after - before] = indices[before:after]
    where = ("cuda" if pool.info.cuda else "cpu") if device is None else device
    return BlockTables(_tensor(rows, where).view(len(seqs), width), _tensor(array.array("i", lengths), where),
                       max(lengths, default=0))


# ---- plans ---------------------------------------------------------------------------------------------------------


def _dtype(pool: Pool, component: str, layer: int) -> torch.dtype:
    name = pool.planes[pool.plane_index(layer, component)].dtype
    made: torch.dtype = getattr(torch, name)
    return made


def _query_indptr(query_tokens: Listing[int], lengths: Listing[int], device: Any) -> torch.Tensor:
    if len(query_tokens) != len(lengths):
        raise InvalidArgument(f"{len(query_tokens)} query_tokens for {len(lengths)} sequences")
    indptr = array.array("i", [0])
    for i, (count, length) in enumerate(zip(query_tokens, lengths)):
        indptr.append(indptr[-1] + integer(f"query_tokens[{i}]", count, length))
    return _tensor(indptr, device)


def _query_heads(num_qo_heads: int, num_kv_heads: int) -> int:
    if integer("num_qo_heads", num_qo_heads, least=1) % num_kv_heads:
        raise InvalidArgument(f"num_qo_heads {num_qo_heads} is no multiple of the pool's {num_kv_heads} heads")
    return num_qo_heads


def decode_plan(pool: Pool, seqs: Listing[Sequence], num_qo_heads: int, *, tokens: Listing[int] | None = None,
                layer: int = 0, device: Any = None) -> dict[str, Any]:
    """The arguments of BatchDecodeWithPagedKVCacheWrapper.plan that the pool knows; `layer` is one of those that the
    plan is for. Raises as `page_table`."""
    key = pool.planes[pool.plane_index(layer, "k")]
    table = page_table(pool, seqs, tokens, device=device)
    return {"indptr": table.kv_indptr, "indices": table.kv_indices, "last_page_len": table.kv_last_page_len,
            "num_qo_heads": _query_heads(num_qo_heads, key.heads), "num_kv_heads": key.heads, "head_dim": key.dim,
            "page_size": pool.page_size, "kv_data_type": _dtype(pool, "k", layer)}


def prefill_plan(pool: Pool, seqs: Listing[Sequence], query_tokens: Listing[int], num_qo_heads: int, *,
                 tokens: Listing[int] | None = None, layer: int = 0, device: Any = None) -> dict[str, Any]:
    """The same of BatchPrefillWithPagedKVCacheWrapper.plan, for queries of query_tokens[i] tokens at the end of
    seqs[i]."""
    key, value = (pool.planes[pool.plane_index(layer, name)] for name in ("k", "v"))
    lengths = pool.lengths(seqs) if tokens is None else tokens
    table = page_table(pool, seqs, lengths, device=device)
    return {"qo_indptr": _query_indptr(query_tokens, lengths, device), "paged_kv_indptr": table.kv_indptr,
            "paged_kv_indices": table.kv_indices, "paged_kv_last_page_len": table.kv_last_page_len,
            "num_qo_heads": _query_heads(num_qo_heads, key.heads), "num_kv_heads": key.heads, "head_dim_qk": key.dim,
            "head_dim_vo": value.dim, "page_size": pool.page_size, "kv_data_type": _dtype(pool, "k", layer)}


def mla_plan(pool: Pool, seqs: Listing[Sequence], num_heads: int, *, query_tokens: Listing[int] | None = None,
             tokens: Listing[int] | None = None, layer: int = 0, device: Any = None) -> dict[str, Any]:
    """The same of BatchMLAPagedAttentionWrapper.plan; `query_tokens` None: one each (decode)."""
    ckv, kpe = (pool.planes[pool.plane_index(layer, name)] for name in ("ckv", "kpe"))
    lengths = pool.lengths(seqs) if tokens is None else tokens
    table = page_table(pool, seqs, lengths, device=device)
    if query_tokens is None:
        query_tokens, most = [1] * len(seqs), [1] * len(seqs)
    else:
        most = list(lengths)
    return {"qo_indptr": _query_indptr(query_tokens, most, device), "kv_indptr": table.kv_indptr,
            "kv_indices": table.kv_indices, "kv_len_arr": table.seq_lens,
            "num_heads": integer("num_heads", num_heads, least=1), "head_dim_ckv": ckv.dim, "head_dim_kpe": kpe.dim,
            "page_size": pool.page_size, "kv_data_type": _dtype(pool, "ckv", layer)}
