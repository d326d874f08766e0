"""Appending in this process: what the caller brought, plane by plane, and the steps that libkvpool runs it with.

A kvp_step is a batch's working memory, used by one thread on one stream. Here each stream has one, made as large as
was needed and made anew when more is; its lock is held from the begin to the progress.
"""
from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _abi, _views
from .errors import InvalidArgument, check

if TYPE_CHECKING:
    import array

    from .client import Owner
    from .pool import Pool


class Source(NamedTuple):
    """The tokens for one plane."""

    tokens: int
    view: _abi.TokenView
    kept: Any
    """What must live until the append is enqueued."""


def _by_layer(layers: int, value: Any, what: str) -> tuple[list[_views.View], list[Any]]:
    """One view a layer: of a list of arrays, of an array with a dimension of layers, or of a single layer's."""
    if isinstance(value, (list, tuple)):
        pairs = [_views.dense(entry, what) for entry in value]
        views = [seen for seen, _ in pairs]
        kept = [entry for _, entry in pairs]
    else:
        seen, array_ = _views.dense(value, what)
        kept = [array_]
        if layers == 1 and len(seen.shape) < 4:
            views = [seen]
        elif not seen.shape:
            raise InvalidArgument(f"{what} has no dimension")
        else:
            views = [seen.at(i) for i in range(seen.shape[0])]
    if len(views) != layers:
        raise InvalidArgument(f"{what} has {len(views)} layers; the pool has {layers}")
    return views, kept


def _as_tokens(seen: _views.View, heads: int, dim: int, what: str) -> tuple[int, _abi.TokenView]:
    """[tokens, heads, dim], or what is left of it where there is one token or one head."""
    shape, strides = seen.shape, seen.strides
    if heads == 1 and len(shape) in (1, 2) and shape[-1] == dim:
        shape = (*shape[:-1], 1, dim)
        strides = (*strides[:-1], 0, strides[-1])
    if len(shape) == 2:
        shape, strides = (1, *shape), (0, *strides)
    if len(shape) != 3 or shape[1:] != (heads, dim):
        raise InvalidArgument(f"{what} of a layer is {list(seen.shape)}; it must be [tokens, {heads}, {dim}]")
    return shape[0], _abi.TokenView(seen.pointer, strides[0], strides[1])


def _dtype_fits(given: str, wanted: str) -> bool:
    return given == wanted or (given == "uint8" and wanted.startswith("float8")) or (
        wanted == "uint8" and given.startswith("float8"))


def sources_of(pool: Pool, components: Listing[Any]) -> list[Source]:
    """The caller's components as one source a plane, in the order of the planes. Raises InvalidArgument."""
    names = [name for name in _abi.COMPONENT_CODES if any(plane.component == name for plane in pool.planes)]
    if len(components) != len(names):
        raise InvalidArgument(f"{len(components)} components; pool {pool.name} has {', '.join(names)}")
    if len(pool.planes) != pool.layers * len(names):
        raise InvalidArgument(f"the layers of pool {pool.name} differ in their planes; append by libkvpool")
    found = {name: _by_layer(pool.layers, value, name) for name, value in zip(names, components)}
    sources = []
    for plane in pool.planes:
        views, kept = found[plane.component]
        seen = views[plane.layer]
        if not _dtype_fits(seen.dtype, plane.dtype):
            raise InvalidArgument(f"{plane.component} is of {seen.dtype}; pool {pool.name} holds {plane.dtype}")
        if (seen.device[0] == _views.CUDA) != pool.info.cuda:
            raise InvalidArgument(f"{plane.component} is not in {pool.backend} memory, where pool {pool.name} is")
        tokens, view = _as_tokens(seen, plane.heads, plane.dim, plane.component)
        sources.append(Source(tokens, view, kept))
    if len({source.tokens for source in sources}) != 1:
        raise InvalidArgument("the components differ in their number of tokens")
    return sources


def _grown(now: int, needed: int) -> int:
    return max(now, 1 << max(needed - 1, 0).bit_length())


class Step:
    """A kvp_step and what it was made for. It has the pool, and ends with this object."""

    pointer: int | None = None  # Ctrl-C may come into __init__, and then __del__

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sizes = (0, 0, 0)
        self._owner: Owner | None = None
        self._pid = os.getpid()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.end()

    def fit(self, pool: Pool, batch: int, tokens: int, pages: int) -> int:
        """The kvp_step, made anew where it is too small. Waits then for what is enqueued with it."""
        if self.pointer is None or batch > self.sizes[0] or tokens > self.sizes[1] or pages > self.sizes[2]:
            self.end()
            self.sizes = (min(_grown(self.sizes[0], batch), _abi.INDEX_BATCH_MAX), _grown(self.sizes[1], tokens),
                          _grown(self.sizes[2], pages))
            self._owner, made = pool.pointer, ctypes.c_void_p()
            check(_abi.library().kvp_step_create(self._owner, 0, *self.sizes, ctypes.byref(made)))
            self.pointer = made.value
        assert self.pointer is not None
        return self.pointer

    def end(self) -> None:
        """Free it, when what is enqueued with it is done. Not where its pool is gone, of a cycle that the garbage
        collector finalizes in its own order; nor in a forked child: a thread of the parent may have been in the middle
        of it."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None and self._owner and self._pid == os.getpid():
            _abi.library().kvp_step_destroy(pointer)
        self._owner = None


class Steps:
    """The steps of a pool, one a stream."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._steps: dict[int, Step] = {}

    def _of(self, stream: int) -> Step:
        with self._lock:
            if stream not in self._steps:
                self._steps[stream] = Step()
            return self._steps[stream]

    def append(self, wires: array.array[int], tokens: array.array[int], start: array.array[int], after: list[int],
               sources: list[Source], stream: int) -> None:
        """Index, append and progress. Raises Mismatch where a row has no room."""
        library = _abi.library()
        page = self._pool.page_size
        views = (_abi.TokenView * len(sources))(*[source.view for source in sources])
        step = self._of(stream)
        with step.lock:
            pointer = step.fit(self._pool, len(wires), max(sources[0].tokens, 1),
                               max(sum(-(-length // page) for length in after), 1))
            check(library.kvp_step_begin(pointer, len(wires), _views.address(wires), _views.address(tokens),
                                         _views.address(start), stream))
            if sources[0].tokens > 0:
                check(library.kvp_append(pointer, 0, len(sources), views, stream))
            check(library.kvp_progress(pointer, stream))

    def copy(self, copies: list[_abi.PageCopy], stream: int) -> None:
        """Carry out owed copies, in all planes."""
        array_ = (_abi.PageCopy * len(copies))(*copies)
        step = self._of(stream)
        with step.lock:
            pointer = step.fit(self._pool, len(copies), 1, 1)
            check(_abi.library().kvp_copy_owed(pointer, len(copies), array_, stream))

    def end(self) -> None:
        """Free them all, when what is enqueued with them is done. Of a forked child's, nobody would give the locks
        back."""
        if self._pid != os.getpid():
            self._steps = {}
            return
        with self._lock:
            for step in self._steps.values():
                with step.lock:
                    step.end()
            self._steps.clear()
