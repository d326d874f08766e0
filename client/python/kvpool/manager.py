"""`PagedKVCacheManager`: a paged KV cache by request id, in one class.

By itself it owns a cache of its own, in the memory of what is first appended (numpy or torch, host or CUDA). With
`pool` it stands on a kvpool pool: the pages are the daemon's, and outlive this process as sequences do.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Protocol

from . import _views
from ._arguments import U64, integer
from .errors import InvalidArgument, OutOfPages
from .page import append_paged_kv_cache

if TYPE_CHECKING:
    from .pool import Pool
    from .sequence import Sequence


class _Store(Protocol):
    cache: Any

    def append(self, request_id: Hashable, k: Any, v: Any) -> None: ...
    def pages(self, request_id: Hashable) -> list[int] | None: ...
    def length(self, request_id: Hashable) -> int: ...
    def free(self, request_id: Hashable) -> None: ...
    def free_pages(self) -> int: ...


def _array(like: Any, values: list[int]) -> Any:
    if _views.is_torch(like):
        torch = sys.modules["torch"]
        return torch.tensor(values, dtype=torch.int32, device=like.device)
    import numpy

    return numpy.array(values, dtype="int32")


class _Own:
    """A cache of the manager's own, and a free list of its pages."""

    def __init__(self, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: Any, device: Any) -> None:
        self._shape = (pages, 2, page_size, kv_heads, head_dim)
        self._page_size = page_size
        self._dtype = dtype
        self._device = device
        self._free = list(range(pages - 1, -1, -1))
        self._requests: dict[Hashable, tuple[list[int], int]] = {}
        self.cache: Any = None

    def _make(self, like: Any) -> None:
        if _views.is_torch(like):
            torch = sys.modules["torch"]
            dtype = getattr(torch, self._dtype, None) if isinstance(self._dtype, str) else self._dtype or like.dtype
            if not isinstance(dtype, torch.dtype):
                raise InvalidArgument(f"torch has no dtype {self._dtype!r}")
            self.cache = torch.zeros(self._shape, dtype=dtype,
                                     device=like.device if self._device is None else self._device)
        else:
            import numpy

            if self._device not in (None, "cpu"):
                raise InvalidArgument(f"a numpy array can not be on {self._device}")
            self.cache = numpy.zeros(self._shape, dtype=self._dtype or like.dtype)

    def append(self, request_id: Hashable, k: Any, v: Any) -> None:
        if self.cache is None:
            self._make(k)
            try:
                self._write(request_id, k, v)
            except BaseException:
                self.cache = None  # the next first append says what it is to be
                raise
        else:
            self._write(request_id, k, v)

    def _write(self, request_id: Hashable, k: Any, v: Any) -> None:
        pages, length = self._requests.get(request_id, ([], 0))
        n = int(k.shape[0])
        short = -(-(length + n) // self._page_size) - len(pages)
        if short > len(self._free):
            error = OutOfPages(f"request {request_id!r} needs {short} pages; {len(self._free)} of "
                               f"{self._shape[0]} are free")
            error.missing = short - len(self._free)
            raise error
        taken = [*pages, *self._free[len(self._free) - short :][::-1]]
        append_paged_kv_cache(
            k, v, _array(k, [0] * n), _array(k, list(range(length, length + n))), self.cache, _array(k, taken),
            _array(k, [0, len(taken)]), None)
        del self._free[len(self._free) - short :]
        self._requests[request_id] = (taken, length + n)

    def pages(self, request_id: Hashable) -> list[int] | None:
        return self._requests[request_id][0] if request_id in self._requests else None

    def length(self, request_id: Hashable) -> int:
        return self._requests[request_id][1] if request_id in self._requests else 0

    def free(self, request_id: Hashable) -> None:
        pages, _ = self._requests.pop(request_id, ([], 0))
        self._free.extend(reversed(pages))

    def free_pages(self) -> int:
        return len(self._free)


def _key(request_id: Hashable) -> int | str:
    """A number or a text is the key itself; of another id nobody else has the key."""
    if isinstance(request_id, str):
        return request_id
    try:
        return integer("request_id", request_id, U64)
    except (TypeError, InvalidArgument):
        return int.from_bytes(os.urandom(8), "little")


class _OnPool:
    """The pages of a pool: a sequence a request."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._requests: dict[Hashable, Sequence] = {}
        self.cache: Any = pool.joined_layer(0)

    def append(self, request_id: Hashable, k: Any, v: Any) -> None:
        seq = self._requests.get(request_id)
        if seq is not None:
            seq.append(k, v)
            return
        seq = self._pool.open(_key(request_id))
        try:
            seq.append(k, v)
        except BaseException:
            if seq.length == 0:  # what it had when it was opened, it keeps
                seq.close()
            raise
        self._requests[request_id] = seq

    def pages(self, request_id: Hashable) -> list[int] | None:
        seq = self._requests.get(request_id)
        return None if seq is None else seq.pages[: -(-self.length(request_id) // self._pool.page_size)]

    def length(self, request_id: Hashable) -> int:
        seq = self._requests.get(request_id)
        return 0 if seq is None else seq.length

    def free(self, request_id: Hashable) -> None:
        seq = self._requests.pop(request_id, None)
        if seq is not None:
            seq.close()

    def free_pages(self) -> int:
        return self._pool.free_pages


class PagedKVCacheManager:
    """A paged KV cache of `max_num_pages` pages of `page_size` tokens, by request id.

    `kv_cache` is [max_num_pages, 2, page_size, num_kv_heads, head_dim]: torch or numpy, made at the first append of
    its kind, with its dtype, on its device, where `dtype` and `device` do not say other ones. With `pool` (of one
    layer and the same geometry) it is that pool's memory, and a request that is named by a number of 64 bits or a text
    is the sequence of that key. Threads: one at a time.
    """

    def __init__(self, max_num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, dtype: Any = None,
                 device: Any = None, pool: Pool | None = None) -> None:
        self.max_num_pages = max_num_pages = integer("max_num_pages", max_num_pages, least=1)
        self.page_size = page_size = integer("page_size", page_size, least=1)
        self.num_kv_heads = num_kv_heads = integer("num_kv_heads", num_kv_heads, least=1)
        self.head_dim = head_dim = integer("head_dim", head_dim, least=1)
        self._like: Any = None
        self._store: _Store
        if pool is None:
            self._store = _Own(max_num_pages, page_size, num_kv_heads, head_dim, dtype, device)
            return
        wanted = (max_num_pages, page_size, 1, {(num_kv_heads, head_dim)})
        if (pool.pages, pool.page_size, pool.layers, {(plane.heads, plane.dim) for plane in pool.planes}) != wanted:
            raise InvalidArgument(f"pool {pool.name} is not of one layer with {num_kv_heads} heads of {head_dim}, "
                                  f"{max_num_pages} pages of {page_size} tokens")
        self._store = _OnPool(pool)

    @property
    def kv_cache(self) -> Any:
        """The cache; None before the first append of a manager without a pool."""
        return self._store.cache

    @property
    def free_pages(self) -> int:
        """Pages that no request has."""
        return self._store.free_pages()

    def append(self, request_id: Hashable, k: Any, v: Any) -> None:
        """Store a token's K and V, [num_kv_heads, head_dim] each, or those of several, [tokens, ...], behind what the
        request has. All or nothing: raises OutOfPages, InvalidArgument."""
        shapes = [_views.view(given, what).shape for given, what in ((k, "k"), (v, "v"))]
        if len(shapes[0]) not in (2, 3) or any(
                shape[:-2] != shapes[0][:-2] or shape[-2:] != (self.num_kv_heads, self.head_dim) for shape in shapes):
            raise InvalidArgument(f"k and v are {list(shapes[0])} and {list(shapes[1])}; they must be of one token, "
                                  f"[{self.num_kv_heads}, {self.head_dim}], or of as many tokens before these")
        if len(shapes[0]) == 2:
            k, v = k[None], v[None]
        self._store.append(request_id, k, v)
        self._like = k[:0]

    def get_page_table(self, request_id: Hashable) -> Any:
        """The request's page ids, int32 [pages], where its K and V are; None of a request without tokens."""
        pages = self._store.pages(request_id)
        return _array(self._like, pages) if pages else None

    def get_seq_len(self, request_id: Hashable) -> int:
        """How many tokens the request has; 0 of an unknown one."""
        return self._store.length(request_id)

    def free(self, request_id: Hashable) -> None:
        """Give the request's pages back. One that is unknown is fine."""
        self._store.free(request_id)
