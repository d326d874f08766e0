"""The batch behind a `KVPoolCache`: its sequences, and how a forward pass writes and reads them.

    update(layer 0) ─► room, indices ─► append, gather      update(layer i) ─► append, gather
                                                            the last one    ─► progress

In a forward pass the first layer reserves room for all of them (a call only where a page is missing) and makes the
indices; each layer's K and V are written by kvpool's append kernel, and all that the layer holds is gathered for
attention by one launch more; behind the last layer the tokens count as written. The first pass needs no gather: what it
brings is all there is. Of a layer with a window only what the pass may see is gathered, as DynamicCache would keep it:
window - 1 tokens and those that are new.

Gathering. A head of a token is a vector of `dim` elements, and a page of a plane is page_size · heads of them, one
behind the other: in the order (token, head) of NHD, (head, token) of HND. So the plane is taken as one of one head,
with so many tokens a page, and [batch, heads, length] numbers of vectors make the dense [batch, heads, length, dim]
that attention reads. The numbers are the same for all layers, and made anew each pass from the pages of the rows. A
page of more vectors than a page may have tokens is gathered by torch.
"""
from __future__ import annotations

import array
import ctypes
import secrets
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _abi, _views
from .._append import Step
from ..errors import Busy, InvalidArgument, KvpoolError, Mismatch, NotFound, NotServed, StaleHandle, check

if TYPE_CHECKING:
    from ..pool import Pool
    from ..sequence import Sequence

_living: weakref.WeakSet[Rows] = weakref.WeakSet()
_lock = threading.Lock()


class Handle(NamedTuple):
    """What another process needs to go on with a generation: plain values, to be sent by whatever means."""

    pool: str
    keys: tuple[int, ...]
    length: int | None = None
    """Tokens of each sequence; None: as many as all of them have, for who died in the middle of a pass."""


class _Planes:
    """The planes of a pool's layers, which are alike, and the arguments of their gather."""

    def __init__(self, pool: Pool) -> None:
        kinds = [pool.planes[i].component for i in range(2)]
        self.first = [pool.plane_index(layer, kinds[0]) for layer in range(pool.layers)]
        for layer, first in enumerate(self.first):
            if pool.plane_index(layer, kinds[1]) != first + 1:
                raise InvalidArgument(f"the planes of layer {layer} of pool {pool.name} are not side by side")
        views = [[pool.plane_view(first + i) for i in range(2)] for first in self.first]
        self.heads, self.dims = views[0][0].heads, (views[0][0].dim, views[0][1].dim)
        held = torch.from_dlpack(pool.plane(self.first[0]))
        self.dtype, self.device = held.dtype, held.device
        self._pool, self._held = pool, held  # a tensor holds the mapping
        size = held.element_size()
        self._vectors = [(_abi.PlaneView * 2)(*[
            _abi.PlaneView(base=view.base, page_stride=view.page_stride,
                           token_stride=view.token_stride if self.heads == 1 else dim * size, head_stride=dim * size,
                           heads=1, dim=dim, dtype=view.dtype)
            for view, dim in zip(pair, self.dims)]) for pair in views]
        self.vectors_at = [ctypes.addressof(pair) for pair in self._vectors]
        self.destinations = (_abi.TokenView * 2)(*[_abi.TokenView(0, dim * size, dim * size) for dim in self.dims])
        self.gather = _abi.GatherArgs(destinations=ctypes.addressof(self.destinations), n_planes=2, pages=pool.pages,
                                      page_tokens=pool.page_size * self.heads)
        self.gather.at.kind = _abi.ADDRESS_SLOTS
        self.gather.at.index_bits = 64
        self.gather_at = ctypes.addressof(self.gather)

    def widened(self, given: torch.Tensor) -> torch.Tensor:
        """What autocast made narrower than the other of K and V: as DynamicCache concatenates it."""
        return given.to(self.dtype) if torch.promote_types(given.dtype, self.dtype) == self.dtype else given

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's K and V, [page, token, head, element]."""
        k, v = (torch.from_dlpack(plane) for plane in self._pool.layer(layer))
        if k.ndim == 3:
            return k[:, :, None], v[:, :, None]
        return (k.transpose(1, 2), v.transpose(1, 2)) if self._pool.info.spec.order == "HND" else (k, v)


class _Vectors:
    """The numbers of a batch's vectors, [batch, heads, length], and what they are made of."""

    def __init__(self, pool: Pool, heads: int, device: torch.device) -> None:
        self._page, self._heads, self._device = pool.page_size, heads, device
        self._order = pool.info.spec.order
        self._page_of = self._in_page = torch.empty(0, dtype=torch.int64)
        self._first: torch.Tensor | None = None

    def _grow(self, length: int) -> None:
        position = torch.arange(max(length, 2 * len(self._page_of)), device=self._device)
        head = torch.arange(self._heads, device=self._device)[:, None]
        self._page_of, offset = position // self._page, position % self._page
        self._in_page = offset * self._heads + head if self._order == "NHD" else head * self._page + offset

    def take_pages(self, table: list[list[int]]) -> None:
        """The rows have these pages."""
        ids = torch.tensor(table, dtype=torch.int64) * (self._page * self._heads)
        self._first = ids.to(self._device, non_blocking=True)

    def numbers(self, first: int, length: int) -> torch.Tensor:
        """Of the tokens from `first` to `length` of each row."""
        if length > len(self._page_of):
            self._grow(length)
        assert self._first is not None
        return (self._first.index_select(1, self._page_of[first:length])[:, None]
                + self._in_page[:, first:length])

    def places(self, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as page ids and offsets, [batch, length - first]."""
        position = torch.arange(first, length, device=self._device)
        assert self._first is not None
        ids = self._first // (self._page * self._heads)
        return ids[:, position // self._page], (position % self._page).expand(len(ids), -1)


class _Read(torch.autograd.Function):  # type: ignore[misc]
    """What was read from the pool, as a result of what the pass brought: no gradient gets lost without a word."""

    @staticmethod
    def forward(ctx: Any, keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotServed("keys and values that are read from a pool carry no gradient: train without a KVPoolCache, or "
                        "with all tokens in its first pass")


class Rows:
    """The batch: its sequences, the planes, and the forward pass under way. `windows`: of each layer, how many tokens
    its attention sees; 0: all."""

    def __init__(self, pool: Pool, durable: bool, windows: list[int]) -> None:
        self.seqs: list[Sequence] = []
        self.pool = pool
        self.layers = pool.layers
        self.windows = windows
        self._durable = durable
        self.lengths = [0] * pool.layers
        self._planes: _Planes | None = None
        self._vectors: _Vectors | None = None
        self._step = Step()
        self._sources = (_abi.TokenView * 2)()
        self._gather: Any = None  # the library's function, where it can gather by vectors
        self._appended = pool.layers  # of the pass under way; all: none is
        self._tokens = self._start = 0
        self._pass: tuple[Any, ...] = ()  # what the first layer brought, and all must
        self._strides: tuple[Any, ...] = ()  # those that self._sources were made of
        self._room = self._pages = 0  # of every row: tokens reserved, pages that self._vectors has
        self._numbers: dict[int, torch.Tensor] = {}  # of this pass, by the first token that is gathered
        self._gathered = -1  # the one of them that the arguments of the gather have
        self._ended = False
        with _lock:
            _living.add(self)

    def __del__(self) -> None:
        """Who lets a cache go without a close means one. But this may run within any call: the next pass closes."""
        seqs: list[Sequence] = getattr(self, "seqs", [])
        if seqs and not self._durable and not sys.is_finalizing():
            planes, cuda = self._planes, self.pool.info.cuda
            self.pool.dropped.append((seqs, self._stream(planes.device) if cuda and planes is not None else None))

    def _close_dropped(self) -> None:
        while self.pool.dropped:
            try:
                seqs, stream = self.pool.dropped.pop()
            except IndexError:  # another thread was here
                return
            self.pool.close_sequences(seqs, stream=stream)
            if stream is not None:  # their pages are back when the GPU gets there
                check(_abi.library().kvp_stream_sync(self.pool.pointer, 0, stream))

    def open(self, batch: int) -> None:
        self._close_dropped()
        self.seqs = self.pool.open_many([secrets.randbits(64) for _ in range(batch)], durable=self._durable)

    def fork(self) -> Rows:
        """Others of the same tokens."""
        self.whole()
        twin = Rows(self.pool, self._durable, self.windows)
        twin._ended = self._ended
        if self.seqs:
            twin.seqs = self._children(self.seqs)
            twin.lengths = list(self.lengths)
        return twin

    def _children(self, parents: list[Sequence]) -> list[Sequence]:
        children = self.pool.fork(parents, [secrets.randbits(64) for _ in parents])
        for child in children:
            child.note_enqueued(self.lengths[0])
        return children

    def _stream(self, device: torch.device) -> int:
        """As torch's generated code asks for it: torch.cuda.current_stream makes an object, for 20 µs a layer."""
        return torch._C._cuda_getCurrentRawStream(device.index) if self.pool.info.cuda else 0

    # ---- a forward pass ------------------------------------------------------------------------------------------

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        planes = self._planes or self._take_planes()
        if keys.dtype != values.dtype:
            keys, values = planes.widened(keys), planes.widened(values)
        brought = (keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device)
        if layer == 0 or layer != self._appended or brought != self._pass:
            self._check(planes, layer, keys, values)
        stream = self._stream(planes.device)
        if layer == 0:
            self._begin(keys, stream)
            self._pass = brought
        self._append(planes.first[layer], keys, values, stream)
        self.lengths[layer] = self._start + self._tokens
        self._appended = layer + 1
        if self._appended == self.layers:
            check(_abi.library().kvp_progress(self._step.pointer, stream))
            for seq in self.seqs:
                seq.note_enqueued(self.lengths[0])
        if self._start == 0:
            return keys.contiguous(), values.contiguous()
        k, v = self._read(planes, layer, keys, stream)
        if (keys.requires_grad or values.requires_grad) and torch.is_grad_enabled():
            k, v = _Read.apply(keys, values, k, v)
        return k, v

    def _take_planes(self) -> _Planes:
        if self._ended:
            raise StaleHandle("this cache is closed: make another")
        planes = self._planes = _Planes(self.pool)
        self._vectors = _Vectors(self.pool, planes.heads, planes.device)
        if self.pool.page_size * planes.heads <= _abi.PAGE_TOKENS_MAX:
            library = _abi.library()
            self._gather = library.kvp_cuda_gather if self.pool.info.cuda else library.kvp_host_gather
        return planes

    def _check(self, planes: _Planes, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer >= self.layers:
            raise InvalidArgument(f"layer {layer} is none of the {self.layers} of pool {self.pool.name}")
        batch, tokens = keys.shape[0], keys.shape[2]
        if layer and (layer != self._appended or tokens != self._tokens):
            raise Mismatch(
                f"layer {layer} brings {tokens} tokens, where layer {self._appended % self.layers} of {self.layers} is "
                f"next, in a pass of {self._tokens}: a model must bring those of every layer, in their order")
        for given, dim, what in ((keys, planes.dims[0], "keys"), (values, planes.dims[1], "values")):
            if (given.shape != (batch, planes.heads, tokens, dim) or given.dtype != planes.dtype
                    or given.device != planes.device):
                raise InvalidArgument(
                    f"{what} are {list(given.shape)} of {given.dtype} on {given.device}; pool {self.pool.name} holds "
                    f"[batch, {planes.heads}, tokens, {dim}] of {planes.dtype} on {planes.device}")
        if self.lengths[0] and batch != len(self.seqs):
            raise InvalidArgument(f"a batch of {batch}; the cache holds {len(self.seqs)} sequences")

    def _begin(self, keys: torch.Tensor, stream: int) -> None:
        """Room and indices for a pass, over all layers."""
        if self._appended != self.layers:
            raise self._broken("a pass begins behind one that")
        if len(self.seqs) != keys.shape[0]:  # none are there, or some of no tokens
            self.reset()
            self.open(keys.shape[0])
        n, start, tokens, page = len(self.seqs), self.lengths[0], keys.shape[2], self.pool.page_size
        if start + tokens > self._room:
            self._close_dropped()
            self.pool.make_room(self.seqs, [start + tokens] * n)
            self._room = min(seq.reserved for seq in self.seqs)
        pages = -(-(start + tokens) // page)
        self._take_pages(pages)
        pointer = self._step.fit(self.pool, n, max(n * tokens, 1), max(n * pages, 1))
        wires = array.array("Q", [seq.wire for seq in self.seqs])
        counts, starts = array.array("I", [tokens] * n), array.array("I", [start] * n)
        check(_abi.library().kvp_step_begin(pointer, n, _views.address(wires), _views.address(counts),
                                            _views.address(starts), stream))
        self._numbers, self._gathered = {}, -1
        self._start, self._tokens, self._appended = start, tokens, 0

    def _broken(self, what: str) -> Mismatch:
        return Mismatch(f"{what} ended at layer {self._appended} of {self.layers}: crop(0) goes back to before it, "
                        "reset() empties the cache")

    def _take_pages(self, pages: int) -> None:
        if pages > self._pages:
            assert self._vectors is not None
            table = [seq.page_ids() for seq in self.seqs]
            self._pages = min(len(row) for row in table)
            self._vectors.take_pages([list(row[: self._pages]) for row in table])

    def _take_numbers(self, planes: _Planes, first: int, length: int) -> None:
        """Of what layers with one window gather in this pass."""
        assert self._vectors is not None
        if first not in self._numbers:
            self._numbers[first] = self._vectors.numbers(first, length)
        numbers = self._numbers[first]
        planes.gather.at.nnz, planes.gather.at.slot_mapping = numbers.numel(), numbers.data_ptr()
        self._gathered = first

    def seen_from(self, layer: int, length: int) -> int:
        """The first token that a pass behind `length` tokens may see in a layer."""
        window = self.windows[layer]
        return max(length - window + 1, 0) if window else 0

    def _append(self, first: int, keys: torch.Tensor, values: torch.Tensor, stream: int) -> None:
        strides = (keys.shape, keys.stride(), values.shape, values.stride())
        if strides != self._strides:
            self._strides = strides
            given = [self._describe(source, tensor) for source, tensor in zip(self._sources, (keys, values))]
            if given[0] is not keys or given[1] is not values:
                self._strides = ()  # a copy was made, and will be again
            keys, values = given  # copies live until the append is enqueued
        self._sources[0].base, self._sources[1].base = keys.data_ptr(), values.data_ptr()
        if self._tokens:
            check(_abi.library().kvp_append(self._step.pointer, first, 2, ctypes.addressof(self._sources), stream))

    @staticmethod
    def _describe(source: _abi.TokenView, given: torch.Tensor) -> torch.Tensor:
        """Say the strides of [batch, heads, tokens, dim], or of a copy of it that can be said."""
        batch, heads, tokens, dim = given.stride()
        size, n = given.element_size(), given.shape[2]
        if dim != 1 or (n > 1 and given.shape[0] > 1 and batch != n * tokens):
            given = given.transpose(1, 2).contiguous()
            batch, tokens, heads, dim = given.stride()
        source.head_stride = heads * size
        source.token_stride = (tokens if n > 1 else batch) * size
        return given

    # ---- reading -------------------------------------------------------------------------------------------------

    def _read(self, planes: _Planes, layer: int, like: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a layer holds, or its window: K and V, [batch, heads, length, dim], dense."""
        first, length = self.seen_from(layer, self._start), self._start + self._tokens
        if self._gather is None:
            return self._read_by_torch(planes, layer, first, length)
        if first != self._gathered:
            self._take_numbers(planes, first, length)
        shape, (k_dim, v_dim) = (len(self.seqs), planes.heads, length - first), planes.dims
        if k_dim == v_dim:
            k, v = like.new_empty((2, *shape, k_dim)).unbind()
        else:
            k, v = like.new_empty((*shape, k_dim)), like.new_empty((*shape, v_dim))
        planes.destinations[0].base, planes.destinations[1].base = k.data_ptr(), v.data_ptr()
        planes.gather.planes = planes.vectors_at[layer]
        if not self.pool.info.cuda or torch.cuda.current_device() == planes.device.index:
            check(self._gather(planes.gather_at, stream))
        else:
            with torch.cuda.device(planes.device):
                check(self._gather(planes.gather_at, stream))
        return k, v

    def _read_by_torch(self, planes: _Planes, layer: int, first: int, length: int
                       ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._vectors is not None
        pages, offsets = self._vectors.places(first, length)
        k, v = (plane[pages, offsets].transpose(1, 2).contiguous() for plane in planes.of(layer))
        return k, v

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer holds, or its window, between passes: as `update` returns it."""
        planes, length = self._planes or self._take_planes(), self.lengths[layer]
        self._take_pages(max(-(-length // self.pool.page_size), 1))
        return self._read_by_torch(planes, layer, self.seen_from(layer, length), length)

    # ---- between passes ------------------------------------------------------------------------------------------

    def whole(self) -> None:
        """Between passes, and all of it written: calls of the daemon's may count on the lengths."""
        if self._appended != self.layers:
            raise self._broken("a pass has")
        self._sync()

    def _sync(self) -> None:
        if self.pool.info.cuda and self._planes is not None:
            check(_abi.library().kvp_stream_sync(self.pool.pointer, 0, self._stream(self._planes.device)))

    def go_back(self) -> None:
        """Behind a pass or a crop that did not end: to what all layers of all sequences have."""
        if self._appended != self.layers:
            self._sync()
            self._cut(min([seq.written for seq in self.seqs], default=0))

    def crop(self, length: int) -> None:
        self.whole()
        self._cut(length)

    def _cut(self, length: int) -> None:
        before = self._appended
        self._appended = 0  # as in a pass that did not end: behind Ctrl-C it is open how long the sequences are
        try:
            self.pool.advance(self.seqs, [length] * len(self.seqs), truncate=True)
        except KvpoolError:
            self._appended = before  # nothing changed
            raise
        self.lengths = [length] * self.layers
        self._forget_pages()
        self._appended = self.layers

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] is: kept where it is used once, forked where it is used again, else given
        up. Raises InvalidArgument of a row that is none."""
        if not self.seqs or rows == list(range(len(self.seqs))):
            return
        for row in rows:
            if not 0 <= row < len(self.seqs):
                raise InvalidArgument(f"row {row} is none of the {len(self.seqs)} of the batch")
        self.whole()
        first: dict[int, int] = {}
        again = [i for i, row in enumerate(rows) if first.setdefault(row, i) != i]
        unused = [seq for row, seq in enumerate(self.seqs) if row not in first]
        chosen = [self.seqs[row] for row in rows]
        if again:
            for i, child in zip(again, self._children([chosen[i] for i in again])):
                chosen[i] = child
        self.pool.close_sequences(unused)
        if chosen:
            self.seqs = chosen
            self._forget_pages()
        else:
            self._forget()

    def take(self, handle: Handle) -> None:
        here = {found.key for found in self.pool.sequences() if found.state in ("open", "busy")}
        for key in handle.keys:
            if key not in here:  # to open it would be in the way of the one that comes
                raise NotFound(f"this session has no sequence of key {key} in pool {self.pool.name}: an export hands "
                               "it over, a claim takes it over")
        if not handle.keys or len(set(handle.keys)) != len(handle.keys):
            raise InvalidArgument(f"a handle has a key a sequence; this one {list(handle.keys)}")
        seqs = self.pool.open_many(handle.keys, durable=self._durable)
        with _lock:
            others = [rows for rows in _living if rows is not self]
        for seq in seqs:
            if any(seq in rows.seqs for rows in others):
                raise Busy(f"sequence {seq.slot}.{seq.generation} is another KVPoolCache's of this process")
        written = [seq.written for seq in seqs]
        length = min(written) if handle.length is None else handle.length
        for seq, tokens in zip(seqs, written):
            if handle.length is not None and tokens != length:
                raise Mismatch(f"sequence {seq.slot}.{seq.generation} has {tokens} tokens, not {length}")
        self.seqs, self.lengths = seqs, [length] * self.layers
        if any(tokens != length for tokens in written):
            self.crop(length)

    def handle(self) -> Handle:
        return Handle(self.pool.name, tuple(seq.key for seq in self.seqs))

    def give(self, to: int) -> Handle:
        self.whole()
        if not self.seqs:
            raise InvalidArgument("the cache is empty: there is nothing to hand over")
        handle = self.handle()._replace(length=self.lengths[0])
        self.pool.transfer(self.seqs, to)
        self._forget()
        return handle

    def _forget_pages(self) -> None:
        self._room = self._pages = 0

    def _forget(self) -> None:
        self.seqs = []
        self.lengths = [0] * self.layers
        self._appended = self.layers
        self._numbers = {}
        self._forget_pages()

    def reset(self) -> None:
        self.pool.close_sequences(self.seqs)
        self._forget()

    def end(self) -> None:
        self.reset()
        self._planes = None
        self._vectors = None
        self._gather = None
        self._step.end()
        self._ended = True
