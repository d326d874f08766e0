"""The batch behind a `KVPoolCache`: its sequences, and how a forward pass writes and reads them.

    update(layer 0) ─► room, indices ─► append, gather      update(layer i) ─► append, gather
                                                            the last one    ─► progress

In a forward pass the first layer reserves room for all of them (a call only where a page is missing) and makes the
indices; each layer's K and V are written by kvpool's append kernel, and all that the layer holds is gathered for
attention by one launch more; behind the last layer the tokens count as written. The first pass needs no gather: what it
brings is all there is.

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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _abi, _views
from .._append import Step
from ..errors import InvalidArgument, Mismatch, check

if TYPE_CHECKING:
    from ..pool import Pool
    from ..sequence import Sequence


class Handle(NamedTuple):
    """What another process needs to go on with a generation: plain values, to be sent by whatever means."""

    pool: str
    keys: tuple[int, ...]
    length: int | None = None
    """Tokens of each sequence; None: as many as all of them have, for who died in the middle of a pass."""


class _Layer:
    """What does not change of a layer: its planes, and the arguments of its gather."""

    def __init__(self, pool: Pool, layer: int, order: str) -> None:
        self.first = pool.plane_index(layer, pool.planes[0].component)
        if {plane.layer for plane in pool.planes[self.first : self.first + 2]} != {layer}:
            raise InvalidArgument(f"the planes of layer {layer} of pool {pool.name} are not side by side")
        k, v = (torch.from_dlpack(plane) for plane in pool.layer(layer))
        if k.ndim == 3:
            k, v = k[:, :, None], v[:, :, None]
        elif order == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.planes = (k, v)
        """[page, token, head, element]"""
        self.dtype, self.device = k.dtype, k.device
        self.heads, self.dims = k.shape[2], (k.shape[3], v.shape[3])
        size = k.element_size()
        self._vectors = (_abi.PlaneView * 2)(*[
            _abi.PlaneView(base=plane.data_ptr(), page_stride=plane.stride(0) * size,
                           token_stride=(plane.stride(1) if self.heads == 1 else dim) * size, head_stride=dim * size,
                           heads=1, dim=dim, dtype=_abi.DTYPE_CODES[str(k.dtype)[6:]])
            for plane, dim in zip(self.planes, self.dims)])
        self.destinations = (_abi.TokenView * 2)(*[_abi.TokenView(0, dim * size, dim * size) for dim in self.dims])
        self.gather = _abi.GatherArgs(
            planes=ctypes.addressof(self._vectors), destinations=ctypes.addressof(self.destinations), n_planes=2,
            pages=pool.pages, page_tokens=pool.page_size * self.heads)
        self.gather.at.kind = _abi.ADDRESS_SLOTS
        self.gather.at.index_bits = 64
        self.gather_at = ctypes.addressof(self.gather)


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

    def numbers(self, length: int) -> torch.Tensor:
        """Of the first `length` tokens of each row."""
        if length > len(self._page_of):
            self._grow(length)
        assert self._first is not None
        return self._first.index_select(1, self._page_of[:length])[:, None] + self._in_page[:, :length]

    def places(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as page ids and offsets, [batch, length]."""
        position = torch.arange(length, device=self._device)
        assert self._first is not None
        ids = self._first // (self._page * self._heads)
        return ids[:, position // self._page], (position % self._page).expand(len(ids), -1)


class Rows:
    """The batch: its sequences, the planes, and the forward pass under way."""

    def __init__(self, pool: Pool, durable: bool) -> None:
        self.pool = pool
        self.layers = pool.layers
        self._durable = durable
        self.seqs: list[Sequence] = []
        self.lengths = [0] * pool.layers
        self._layers: list[_Layer] = []
        self._vectors: _Vectors | None = None
        self._step = Step()
        self._sources = (_abi.TokenView * 2)()
        self._gather: Any = None  # the library's function, where it can gather by vectors
        self._appended = pool.layers  # of the pass under way; all: none is
        self._tokens = self._start = 0
        self._room = self._pages = 0  # of every row: tokens reserved, pages that self._vectors has
        self._numbers: torch.Tensor | None = None

    def open(self, batch: int) -> None:
        self.seqs = self.pool.open_many([secrets.randbits(64) for _ in range(batch)], durable=self._durable)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._layers[0].device).cuda_stream) if self.pool.info.cuda else 0

    # ---- a forward pass ------------------------------------------------------------------------------------------

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._layers:
            self._take_layers()
        stream = self._stream()
        self._check(layer, keys, values)
        if layer == 0:
            self._begin(keys, stream)
        mine = self._layers[layer]
        self._append(mine, keys, values, stream)
        self.lengths[layer] = self._start + self._tokens
        self._appended = layer + 1
        if self._appended == self.layers:
            check(_abi.library().kvp_progress(self._step.pointer, stream))
            for seq in self.seqs:
                seq.note_enqueued(self.lengths[0])
        if self._start == 0:
            return keys.contiguous(), values.contiguous()
        return self._read(mine, keys, stream)

    def _take_layers(self) -> None:
        spec = self.pool.info.spec
        self._layers = [_Layer(self.pool, layer, spec.order) for layer in range(self.layers)]
        first = self._layers[0]
        self._vectors = _Vectors(self.pool, first.heads, first.device)
        same = all(layer.heads == first.heads for layer in self._layers)
        if same and self.pool.page_size * first.heads <= _abi.PAGE_TOKENS_MAX:
            library = _abi.library()
            self._gather = library.kvp_cuda_gather if self.pool.info.cuda else library.kvp_host_gather

    def _check(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer >= self.layers:
            raise InvalidArgument(f"layer {layer} is none of the {self.layers} of pool {self.pool.name}")
        mine, batch, tokens = self._layers[layer], keys.shape[0], keys.shape[2]
        if layer and (layer != self._appended or tokens != self._tokens):
            raise Mismatch(f"layer {layer} is updated behind {self._appended}, in a pass of {self._tokens} tokens")
        for given, dim, what in ((keys, mine.dims[0], "keys"), (values, mine.dims[1], "values")):
            if (given.shape != (batch, mine.heads, tokens, dim) or given.dtype != mine.dtype
                    or given.device != mine.device):
                raise InvalidArgument(
                    f"{what} are {list(given.shape)} of {given.dtype} on {given.device}; pool {self.pool.name} holds "
                    f"[batch, {mine.heads}, tokens, {dim}] of {mine.dtype} on {mine.device}")
        if self.seqs and batch != len(self.seqs):
            raise InvalidArgument(f"a batch of {batch}; the cache holds {len(self.seqs)} sequences")

    def _begin(self, keys: torch.Tensor, stream: int) -> None:
        """Room and indices for a pass, over all layers."""
        if self._appended != self.layers:
            raise Mismatch(f"a pass begins behind one that ended at layer {self._appended} of {self.layers}")
        if not self.seqs:
            self.open(keys.shape[0])
        n, start, tokens, page = len(self.seqs), self.lengths[0], keys.shape[2], self.pool.page_size
        if start + tokens > self._room:
            self.pool.make_room(self.seqs, [start + tokens] * n)
            self._room = min(seq.reserved for seq in self.seqs)
        pages = -(-(start + tokens) // page)
        self._take_pages(pages)
        pointer = self._step.fit(self.pool, n, max(n * tokens, 1), max(n * pages, 1))
        wires = array.array("Q", [seq.wire for seq in self.seqs])
        counts, starts = array.array("I", [tokens] * n), array.array("I", [start] * n)
        check(_abi.library().kvp_step_begin(pointer, n, _views.address(wires), _views.address(counts),
                                            _views.address(starts), stream))
        assert self._vectors is not None
        self._numbers = self._vectors.numbers(start + tokens) if start and self._gather is not None else None
        self._start, self._tokens, self._appended = start, tokens, 0

    def _take_pages(self, pages: int) -> None:
        if pages > self._pages:
            assert self._vectors is not None
            table = [seq.page_ids() for seq in self.seqs]
            self._pages = min(len(row) for row in table)
            self._vectors.take_pages([list(row[: self._pages]) for row in table])

    def _append(self, mine: _Layer, keys: torch.Tensor, values: torch.Tensor, stream: int) -> None:
        kept = []  # until the append is enqueued
        for given, source in zip((keys, values), self._sources):
            batch, heads, tokens, dim = given.stride()
            size, n = given.element_size(), given.shape[2]
            if dim != 1 or (n > 1 and given.shape[0] > 1 and batch != n * tokens):
                given = given.transpose(1, 2).contiguous()
                batch, tokens, heads, dim = given.stride()
            kept.append(given)
            source.base, source.head_stride = given.data_ptr(), heads * size
            source.token_stride = (tokens if n > 1 else batch) * size
        if self._tokens:
            check(_abi.library().kvp_append(self._step.pointer, mine.first, 2, ctypes.addressof(self._sources), stream))

    # ---- reading -------------------------------------------------------------------------------------------------

    def _read(self, mine: _Layer, like: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a layer holds: K and V, [batch, heads, length, dim], dense."""
        length = self._start + self._tokens
        if self._gather is None:
            return self._read_by_torch(mine, length)
        numbers = self._numbers
        assert numbers is not None
        made = []
        for dim, destination in zip(mine.dims, mine.destinations):
            out = like.new_empty((len(self.seqs), mine.heads, length, dim))
            destination.base = out.data_ptr()
            made.append(out)
        mine.gather.at.nnz, mine.gather.at.slot_mapping = numbers.numel(), numbers.data_ptr()
        if not self.pool.info.cuda:
            check(self._gather(mine.gather_at, 0))
        elif torch.cuda.current_device() == mine.device.index:
            check(self._gather(mine.gather_at, stream))
        else:
            with torch.cuda.device(mine.device):
                check(self._gather(mine.gather_at, stream))
        return made[0], made[1]

    def _read_by_torch(self, mine: _Layer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._vectors is not None
        pages, offsets = self._vectors.places(length)
        k, v = (plane[pages, offsets].transpose(1, 2).contiguous() for plane in mine.planes)
        return k, v

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer holds, between passes: as `update` returns it."""
        if not self._layers:
            self._take_layers()
        self._take_pages(-(-self.lengths[layer] // self.pool.page_size))
        return self._read_by_torch(self._layers[layer], self.lengths[layer])

    # ---- between passes ------------------------------------------------------------------------------------------

    def whole(self) -> None:
        """Between passes, and all of it written: calls of the daemon's may count on the lengths."""
        if self._appended != self.layers:
            raise Mismatch(f"a pass has ended at layer {self._appended} of {self.layers}")
        if self.pool.info.cuda and self._layers:
            check(_abi.library().kvp_stream_sync(self.pool.pointer, 0, self._stream()))

    def crop(self, length: int) -> None:
        self.whole()
        self.pool.advance(self.seqs, [length] * len(self.seqs), truncate=True)
        self.lengths = [length] * self.layers
        self._forget_pages()

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] is: kept where it is used once, forked where it is used again, else given
        up."""
        if not self.seqs or rows == list(range(len(self.seqs))):
            return
        self.whole()
        first: dict[int, int] = {}
        again = [i for i, row in enumerate(rows) if first.setdefault(row, i) != i]
        unused = [seq for row, seq in enumerate(self.seqs) if row not in first]
        chosen = [self.seqs[row] for row in rows]
        if again:
            children = self.pool.fork([chosen[i] for i in again], [secrets.randbits(64) for _ in again])
            for i, child in zip(again, children):
                child.note_enqueued(self.lengths[0])
                chosen[i] = child
        self.pool.close_sequences(unused)
        self.seqs = chosen
        self._forget_pages()

    def take(self, handle: Handle) -> None:
        self.seqs = self.pool.open_many(handle.keys, durable=self._durable)
        written = [seq.written for seq in self.seqs]
        length = min(written, default=0) if handle.length is None else handle.length
        for seq, tokens in zip(self.seqs, written):
            if handle.length is not None and tokens != length:
                raise Mismatch(f"sequence {seq.slot}.{seq.generation} has {tokens} tokens, not {length}")
        self.lengths = [length] * self.layers
        if any(tokens != length for tokens in written):
            self.crop(length)

    def handle(self) -> Handle:
        return Handle(self.pool.name, tuple(seq.key for seq in self.seqs))

    def give(self, to: int) -> Handle:
        self.whole()
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
        self._numbers = None
        self._forget_pages()

    def reset(self) -> None:
        self.pool.close_sequences(self.seqs)
        self._forget()

    def end(self) -> None:
        self.reset()
        self._layers = []
        self._vectors = None
        self._gather = None
        self._step.end()
