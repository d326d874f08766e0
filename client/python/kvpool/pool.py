"""An attached pool: its memory as arrays, its sequences, and its page table, which is read without a call."""
from __future__ import annotations

import array
import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listing
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _abi, _views
from ._append import Source, Steps, sources_of
from ._arguments import U64, integer, text
from ._blocks import CachedPage, Tokens, blocks_of
from .client import Owner
from .errors import Busy, Disconnected, InvalidArgument, KvpoolError, PoolLost, SessionEnded, StaleHandle, check, fail
from .plane import Plane
from .region import Region, RegionInfo, map_region
from .sequence import Point, Sequence, SequenceInfo
from .spec import PlaneSpec, PoolInfo, info_from_c

if TYPE_CHECKING:
    from .client import Client

_LIST_ENTRIES = 1024
_TIMELINE = 1
_ROW_GUESS = 64


def key_of(key: int | str) -> int:
    """A sequence's 64-bit key: of a text its BLAKE2b digest. Raises InvalidArgument for a number that is none."""
    if isinstance(key, str):
        import hashlib

        encoded = key.encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
    return integer("key", key, U64)


def _array(typecode: str, n: int) -> array.array[int]:
    made: array.array[int] = array.array(typecode)
    made.frombytes(bytes(n * made.itemsize))
    return made


def _u32s(what: str, values: Listing[int], n: int) -> array.array[int]:
    if len(values) != n:
        raise InvalidArgument(f"{len(values)} {what} for {n} sequences")
    if isinstance(values, (bytes, bytearray)):  # an array takes them for what is in its memory
        values = list(values)
    try:
        return array.array("I", values)
    except (OverflowError, TypeError):
        return array.array("I", [integer(f"{what}[{i}]", value) for i, value in enumerate(values)])


def _point(point: Point) -> _abi.Point:
    try:
        timeline, value = point
    except (TypeError, ValueError):
        raise TypeError(f"a point is a kvpool.Point, not {point!r}") from None
    return _abi.Point(integer("timeline", timeline), integer("value", value, U64))


class Advance:
    """An `advance` under way; `wait` ends it, once.

    Ctrl-C may come wherever Python makes a call. So it is there before the library is asked, which leaves the pointer
    in it, and between taking the pointer and handing it back no call is made.
    """

    def __init__(self, pool: Pool, seqs: list[Sequence], reserved: array.array[int], truncate: bool) -> None:
        self._pointer = ctypes.c_void_p()  # before all else: __del__ comes even where this is interrupted
        self._pool = pool
        self._seqs = seqs
        self._reserved = reserved
        self._truncate = truncate

    def wait(self, *, stream: Any = None) -> None:
        """Wait for the answer, and carry out on `stream` the copies that the sequences owe.

        Raises OutOfPages (`.missing` pages; nothing changed), StaleHandle, InvalidArgument.
        """
        if not self._pointer:
            raise InvalidArgument("this advance has been waited for")
        owner = self._pool.pointer  # until the answer is there; or it raises
        none = ctypes.c_void_p()
        copies = (_abi.PageCopy * len(self._seqs))()
        n = ctypes.c_uint32()
        missing = ctypes.c_uint32()
        call, outputs = _abi.library().kvp_advance_wait, (copies, ctypes.byref(n), ctypes.byref(missing))
        before = [seq._reserved for seq in self._seqs]
        try:
            self._have(self._reserved)  # while the daemon works; mostly it agrees
            pointer, self._pointer = self._pointer, none
            status = call(pointer, *outputs)
            if status == 0:
                self._cut()
                if n.value:
                    self._pool._settle(self._seqs, copies[: n.value], stream)
            else:
                self._have(before)
        except BaseException:  # done or not: what room there is, and what is owed, is asked for when it matters
            self._cut()
            self._have([None] * len(self._seqs))
            raise
        finally:
            del owner
        if status != 0:
            fail(status, missing=missing.value)

    def _have(self, reserved: Iterable[int | None]) -> None:
        for seq, tokens in zip(self._seqs, reserved):
            seq._reserved = tokens

    def _cut(self) -> None:
        if self._truncate:
            for seq, tokens in zip(self._seqs, self._reserved):
                seq._copied = None
                seq._enqueued = min(seq._enqueued, tokens)

    def __del__(self) -> None:
        """The answer of one that nobody waited for is taken all the same: the library must know what there is room
        for."""
        if getattr(self, "_pointer", None) and self._pool._owner is not None and not sys.is_finalizing():
            with contextlib.suppress(KvpoolError):
                self.wait()


class Pool:
    """A pool, mapped into this process. Made by `Client.attach` and `Client.create_pool`.

    A context manager: detached at the end of its block. Threads may share it; a sequence is one thread's at a time.
    """

    def __init__(self, client: Client, client_owner: Owner, pointer: int) -> None:
        library = _abi.library()
        owner = ctypes.c_void_p()
        check(library.kvp_owner_of_pool(client_owner.pointer, pointer, ctypes.byref(owner)))
        assert owner.value is not None
        self.client = client
        self._owner: Owner | None = Owner(pointer, owner.value)
        self._lock = threading.Lock()
        self._sequences: dict[int, Sequence] = {}
        self._durable: set[int] = set()
        self._batch: tuple[Listing[Sequence], array.array[int]] = ([], array.array("Q"))  # the last, and its handles
        self._signalled = 0
        info = _abi.PoolInfo.from_address(library.kvp_pool_info(pointer))
        self.info: PoolInfo = info_from_c(info)
        """How it was when it was attached."""
        self.name: str = self.info.spec.name
        self.page_size: int = self.info.spec.page_size
        self.pages: int = self.info.spec.pages
        self.planes: tuple[PlaneSpec, ...] = self.info.spec.planes
        self.layers: int = self.info.spec.layers
        self._index = {(plane.layer, plane.component): i for i, plane in enumerate(self.planes)}
        self._steps = Steps(self)
        self.torch_memory: dict[tuple[str, int], Any] = {}
        """kvpool.torch's memory pools by tag and device: they keep what torch has freed as long as this is attached."""
        self.dropped: list[tuple[list[Sequence], Any]] = []
        """Sequences that kvpool.hf's caches left open when they went, and the stream that they were used on."""

    def __repr__(self) -> str:
        state = self.backend if self._owner is not None else "detached"
        return f"<kvpool.Pool {self.name}: {self.pages} pages of {self.page_size} tokens, {state}>"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with contextlib.nullcontext() if error is None else contextlib.suppress(Busy):  # or it would hide the error
            self.detach()

    @property
    def pointer(self) -> Owner:
        """The kvp_pool, for calls of libkvpool that this package does not wrap. Raises SessionEnded when detached."""
        owner = self._owner
        if not owner:
            raise SessionEnded(f"pool {self.name} is detached")
        return owner

    @property
    def backend(self) -> str:
        """"host" or "cuda": where its memory is."""
        return "cuda" if self.info.cuda else "host"

    @property
    def free_pages(self) -> int:
        """How many pages are free now: one call."""
        return self.client.describe(self.name).free_pages

    def check(self) -> None:
        """Raises SessionEnded or PoolLost once the session or the memory is gone. No call."""
        check(_abi.library().kvp_pool_state(self.pointer))

    @property
    def alive(self) -> bool:
        """Whether it is attached, and neither the session nor the memory is gone. No call."""
        owner = self._owner
        return bool(owner) and not _abi.library().kvp_pool_state(owner)

    def detach(self) -> None:
        """Close the sequences that were opened here, and let go. The memory is unmapped when the last tensor made of
        it is gone. Raises Busy where durable sequences, or some that were transferred here, are open: close those, or
        close the client, which leaves durable ones for a claim."""
        if self._owner is None:
            return
        left = 0
        try:
            ours = [seq for wire, seq in list(self._sequences.items()) if wire not in self._durable]
            for at in range(0, len(ours), _abi.BATCH_MAX):
                self.close_sequences(ours[at : at + _abi.BATCH_MAX])
            left = sum(1 for entry in self.sequences() if entry.state in ("open", "busy"))
        except (Disconnected, PoolLost, SessionEnded):
            pass  # what there was to end is over
        if left:
            raise Busy(f"{left} sequences of this session are open in pool {self.name}")
        self.abandon()

    def abandon(self) -> None:
        """Let go of it without a word about its sequences: they end with the session."""
        self.torch_memory.clear()
        owner, self._owner = self._owner, None
        self._steps.end()
        for seq in list(self._sequences.values()):
            seq.open_in = None
        self._sequences.clear()
        self._batch = [], array.array("Q")
        self.client._forget(self)
        del owner  # behind the steps, which are of it

    # ---- memory ------------------------------------------------------------------------------------------------

    def plane(self, index: int, rank: int = 0) -> Plane:
        """A plane by its index in `planes`: [pages, page_size, heads, dim], or as `Plane` says. Raises
        InvalidArgument."""
        seen = self.plane_view(index, rank)
        shape, strides = self._shape(index, seen)
        return Plane(self.pointer, seen.base, shape, strides, seen.dtype, self.info.cuda)

    def layer(self, layer: int, rank: int = 0) -> tuple[Plane, ...]:
        """A layer's planes: (k, v), or (ckv, kpe) of MLA. Raises InvalidArgument."""
        return tuple(self.plane(i, rank) for i in self._layer(layer))

    def joined_layer(self, layer: int, rank: int = 0) -> Plane:
        """K and V of a layer as one array [pages, 2, page_size, heads, dim] (HND: [pages, 2, heads, page_size, dim]);
        of MLA in a joined pool [pages, page_size, ckv + kpe]. Raises InvalidArgument where their shapes do not
        allow it."""
        index = self._layer(layer)
        if len(index) != 2:
            raise InvalidArgument(f"layer {layer} has {len(index)} planes, not two")
        first, second = (self.plane_view(i, rank) for i in index)
        shape, strides = self._shape(index[0], first)
        other_shape, other_strides = self._shape(index[1], second)
        apart = second.base - first.base
        if len(shape) == 3 and apart == shape[2] * strides[2] and strides[:2] == other_strides[:2]:
            shape = (shape[0], shape[1], shape[2] + other_shape[2])
        elif len(shape) == 4 and (shape, strides, first.dtype) == (other_shape, other_strides, second.dtype) and (
                apart > 0):
            shape, strides = (shape[0], 2, *shape[1:]), (strides[0], apart, *strides[1:])
        else:
            raise InvalidArgument(f"the planes of layer {layer} of pool {self.name} do not join")
        return Plane(self.pointer, first.base, shape, strides, first.dtype, self.info.cuda)

    def plane_view(self, index: int, rank: int = 0) -> _abi.PlaneView:
        """A plane by its index, as libkvpool describes it: for calls of its that this package does not wrap."""
        if not 0 <= integer("plane", index, U64) < len(self.planes):
            raise InvalidArgument(f"plane {index} of rank {rank} is none of the {len(self.planes)} of {self.name}")
        seen = _abi.PlaneView()
        check(_abi.library().kvp_pool_plane(self.pointer, integer("rank", rank), index, ctypes.byref(seen)))
        return seen

    def _shape(self, index: int, seen: _abi.PlaneView) -> tuple[tuple[int, ...], tuple[int, ...]]:
        size = _abi.DTYPES[seen.dtype][1]
        if self.planes[index].component in ("ckv", "kpe") and seen.heads == 1:
            return (self.pages, self.page_size, seen.dim), (seen.page_stride, seen.token_stride, size)
        token, head = (self.page_size, seen.token_stride), (seen.heads, seen.head_stride)
        first, second = (head, token) if self.info.spec.order == "HND" else (token, head)
        return (self.pages, first[0], second[0], seen.dim), (seen.page_stride, first[1], second[1], size)

    def plane_index(self, layer: int, component: str) -> int:
        """The index of a layer's component ("k", "v", "ckv", "kpe") in `planes`. Raises InvalidArgument."""
        index = self._index.get((layer, component))
        if index is None:
            raise InvalidArgument(f"pool {self.name} has no {component} of layer {layer}")
        return index

    def _layer(self, layer: int) -> list[int]:
        index = [self._index[layer, name] for name in _abi.COMPONENT_CODES if (layer, name) in self._index]
        if not index:
            raise InvalidArgument(f"layer {layer} is none of the {self.layers} of pool {self.name}")
        return index

    # ---- regions -------------------------------------------------------------------------------------------------

    def region(self, name: str, nbytes: int = 0, *, rank: int = 0, exclusive: bool = False) -> Region:
        """Find a named range of the slab behind the pages, or make it: for arrays of the caller's own shapes.

        It stays, with its bytes, until it is dropped: this process may die, and the daemon be killed. `nbytes`: of one
        that is there, what it has; 0: whatever it has, and none is made. `exclusive`: while no other session has it.
        kvpool never writes into it: what a new one holds is what the last user of its range left (zeros, at first).

        Raises Mismatch where it has another size, NotFound where nbytes is 0 and it is not there, LimitReached where
        no gap is large enough, InvalidArgument, NotPermitted where it is another user's, Busy where another session
        has it (`exclusive`), TryAgain where that one died and is not proven gone.
        """
        return map_region(self, name, nbytes, rank, exclusive)

    def drop_region(self, name: str, *, rank: int = 0) -> None:
        """Give a region up; one that is not there is fine. The GPU must be done with it. Raises Busy where another
        session has it, TryAgain where that one died and is not proven gone, NotPermitted."""
        check(_abi.library().kvp_region_unmap(self.pointer, integer("rank", rank), text("name", name), 0))

    def regions(self) -> list[RegionInfo]:
        """The regions of the pool, by rank and offset: one call."""
        found = ctypes.POINTER(_abi.RegionInfo)()
        n = ctypes.c_size_t()
        check(_abi.library().kvp_region_list(self.client.pointer, self.name.encode(), ctypes.byref(found),
                                             ctypes.byref(n)))
        listed = [RegionInfo(one.name.decode(), one.rank, one.offset, one.bytes, one.tenant, one.mapped)
                  for one in found[: n.value]]
        _abi.libc().free(ctypes.cast(found, ctypes.c_void_p))
        return listed

    # ---- sequences -----------------------------------------------------------------------------------------------

    def open(self, key: int | str, *, durable: bool = False, tokens: Tokens = None,
             blocks: Listing[bytes] | None = None, extra: bytes = b"") -> Sequence:
        """A sequence by key, empty; or the one of that key that is open in this session. `durable`: it outlives its
        session by the pool's linger_ms. Raises LimitReached where all rows are in use.

        With `tokens` (ids of the prompt), or `blocks` (block keys of the engine's, 8 to 32 bytes, one a page; each
        stands for its page *and all before it*), the longest prefix that is cached is taken along: the sequence
        begins with those tokens written, `Sequence.cached` of them. `extra`: what else their bytes depend on (a LoRA,
        an image). What is written behind them is found by others once it is named: `Sequence.publish`.
        """
        return self.open_many([key], durable=durable, tokens=None if tokens is None else [tokens],
                              blocks=None if blocks is None else [blocks], extra=extra)[0]

    def open_many(self, keys: Listing[int | str], *, durable: bool = False, tokens: Listing[Tokens] | None = None,
                  blocks: Listing[Listing[bytes]] | None = None, extra: bytes = b"") -> list[Sequence]:
        """The same for up to 1024 keys in one call, all or nothing; `tokens` or `blocks` has an entry for each."""
        numbers = array.array("Q", [key_of(key) for key in keys])
        wires, cached = array.array("Q", bytes(8 * len(numbers))), array.array("I", bytes(4 * len(numbers)))
        named, _kept = blocks_of(len(numbers), tokens, blocks, None, extra)
        check(_abi.library().kvp_seq_open_blocks(
            self.pointer, len(numbers), _views.address(numbers), _abi.DURABLE if durable else 0, named,
            _views.address(wires), _views.address(cached)))
        if durable:
            self._durable.update(wires)
        opened = [self._known(wire, key) for wire, key in zip(wires, numbers)]
        for seq, found in zip(opened, cached):
            seq.cached = found
            if seq._reserved is None and len(self.row(seq)) * self.page_size == found:
                seq._reserved = found
        return opened

    def _known(self, wire: int, key: int) -> Sequence:
        with self._lock:
            seq = self._sequences.get(wire)
            if seq is None:
                seq = self._sequences[wire] = Sequence(self, wire, key)
            return seq

    def _handles(self, seqs: Listing[Sequence]) -> array.array[int]:
        """Of a batch, to be read only: steps that follow one another mostly have the same."""
        known, wires_known = self._batch
        with contextlib.suppress(Exception):  # what is no sequence may compare as it likes
            if seqs == known:
                return wires_known
        try:
            wires = [seq.wire for seq in seqs if seq.open_in is self]
        except AttributeError:
            wrong = next(seq for seq in seqs if not isinstance(seq, Sequence))
            raise TypeError(f"a {type(wrong).__name__} stands among the sequences of a batch") from None
        if len(wires) != len(seqs):
            for seq in seqs:
                if seq.closed:
                    raise StaleHandle(f"sequence {seq.slot}.{seq.generation} is closed")
                if seq.pool is not self:
                    raise InvalidArgument(f"sequence {seq.slot}.{seq.generation} is of pool {seq.pool.name} of "
                                          f"{seq.pool.client!r}; this is pool {self.name} of {self.client!r}")
        found = array.array("Q", wires)
        self._batch = list(seqs), found
        return found

    def _gone(self, seqs: Listing[Sequence]) -> None:
        with self._lock:
            self._batch = [], array.array("Q")
            for seq in seqs:
                seq.open_in = None
                self._sequences.pop(seq.wire, None)
                self._durable.discard(seq.wire)

    def advance(self, seqs: Listing[Sequence], reserved: Listing[int], *, truncate: bool = False,
                after: Point | None = None, stream: Any = None, tokens: Listing[Tokens] | None = None,
                blocks: Listing[Listing[bytes]] | None = None, first: Listing[int] | None = None,
                extra: bytes = b"") -> None:
        """Set how many tokens each sequence has room for: one call, all or nothing, up to 1024 sequences.

        State, not change: a repeat does nothing. Less than now needs `truncate`, which on CUDA pools gives pages back
        when `after` is reached (None: when `stream` gets there). Copies that the sequences owe are carried out on
        `stream`. `tokens` or `blocks` say what pages hold, or will hold, from page first[i] of seqs[i] on: as
        `Sequence.publish`. Raises OutOfPages (`.missing`), StaleHandle, InvalidArgument, Mismatch; nothing changed
        then.
        """
        self.advance_begin(seqs, reserved, truncate=truncate, after=after, stream=stream, tokens=tokens, blocks=blocks,
                           first=first, extra=extra).wait(stream=stream)

    def advance_begin(self, seqs: Listing[Sequence], reserved: Listing[int], *, truncate: bool = False,
                      after: Point | None = None, stream: Any = None, tokens: Listing[Tokens] | None = None,
                      blocks: Listing[Listing[bytes]] | None = None, first: Listing[int] | None = None,
                      extra: bytes = b"") -> Advance:
        """The first half of `advance`: the round trip overlaps what is done until `Advance.wait`, which must come."""
        kept = list(seqs)
        wires = self._handles(kept)
        room = _u32s("reserved", reserved, len(kept))
        points = self._points(after, len(kept), stream) if truncate else None
        named, _arrays = blocks_of(len(kept), tokens, blocks, first, extra)
        begun = Advance(self, kept, room, truncate)
        check(_abi.library().kvp_advance_blocks_begin(
            self.pointer, len(kept), _views.address(wires), _views.address(room), named, points,
            _abi.TRUNCATE if truncate else 0, ctypes.byref(begun._pointer)))
        return begun

    def _settle(self, seqs: Listing[Sequence], copies: Listing[_abi.PageCopy], stream: Any) -> None:
        """Carry out owed copies, each once: a later reply lists one until the daemon has seen the tokens behind it."""
        done = {seq._copied for seq in seqs}
        fresh = [copy for copy in copies if (copy.source, copy.destination, copy.tokens) not in done]
        if not fresh:
            return
        self._steps.copy(fresh, _views.stream_of(stream) if self.info.cuda else 0)
        for seq in seqs:
            pages = set(self.row(seq)) if len(fresh) > 1 or len(seqs) > 1 else None
            for copy in fresh:
                if pages is None or copy.destination in pages:
                    seq._copied = (copy.source, copy.destination, copy.tokens)

    def append(self, seqs: Listing[Sequence], *components: Any, tokens: Listing[int] | None = None,
               stream: Any = None) -> list[int]:
        """Write tokens behind those of each sequence, in this process: `Sequence.append` for a batch.

        Each component is [sum(tokens), heads, dim] in the batch's order, a layer or one array a layer; `tokens` how
        many are each sequence's (None: one each; of a single sequence, all). Room is reserved where there is none, in
        one call. Returns the lengths after. Raises OutOfPages, StaleHandle, InvalidArgument; nothing is written then.
        """
        kept = list(seqs)
        wires = self._handles(kept)
        found: list[Source] = sources_of(self, components)
        nnz = found[0].tokens
        if tokens is None:
            tokens = [nnz] if len(kept) == 1 else [1] * len(kept)
        counts = _u32s("tokens", tokens, len(kept))
        if len(set(wires)) != len(wires):
            raise InvalidArgument("a sequence stands twice in the batch")
        if sum(counts) != nnz:
            raise InvalidArgument(f"{nnz} tokens for sequences that take {sum(counts)}")
        start = self.lengths(kept)
        after = [at + count for at, count in zip(start, counts)]
        self.make_room(kept, after, stream)
        self._steps.append(wires, counts, _u32s("starts", start, len(kept)), after, found,
                           _views.stream_of(stream) if self.info.cuda else 0)
        for seq, length in zip(kept, after):
            seq.note_enqueued(length)
        return after

    def make_room(self, seqs: Listing[Sequence], lengths: Listing[int], stream: Any = None) -> None:
        """Room for at least lengths[i] tokens of seqs[i], in whole pages, so that the appends that fill them make no
        call: one call where any has less. Raises OutOfPages, StaleHandle, InvalidArgument."""
        short = [(seq, length) for seq, length in zip(seqs, lengths)
                 if seq._reserved is None or length > seq._reserved]
        if not short:
            return
        limit, page = self.info.spec.max_sequence_tokens, self.page_size
        room = [max(length, seq.reserved, min(-(-length // page) * page, limit)) for seq, length in short]
        self.advance([seq for seq, _ in short], room, stream=stream)

    def fork(self, parents: Listing[Sequence], keys: Listing[int | str], tokens: Listing[int] | None = None, *,
             stream: Any = None) -> list[Sequence]:
        """Children that share their parents' first `tokens` tokens: one call, all or nothing. As `Sequence.fork`."""
        wires = self._handles(parents)
        n = len(parents)
        if len(keys) != n:
            raise InvalidArgument(f"{len(keys)} keys for {n} parents")
        numbers = array.array("Q", [key_of(key) for key in keys])
        limits = _u32s("tokens", tokens, n) if tokens is not None else None
        made = array.array("Q", bytes(8 * n))
        copies = (_abi.PageCopy * max(n, 1))()
        count = ctypes.c_uint32()
        missing = ctypes.c_uint32()
        status = _abi.library().kvp_fork(
            self.pointer, n, _views.address(wires), _views.address(numbers),
            _views.address(limits) if limits is not None else None, _views.address(made), copies,
            ctypes.byref(count), ctypes.byref(missing))
        if status != 0:
            fail(status, missing=missing.value)
        self._durable.update(child for child, parent in zip(made, wires) if parent in self._durable)
        children = [self._known(wire, key) for wire, key in zip(made, numbers)]
        self._settle(children, copies[: count.value], stream)
        return children

    def transfer(self, seqs: Listing[Sequence], to: int, *, when: Point | None = None,
                 tokens: Listing[int] | None = None) -> None:
        """Hand sequences to another session: one call, all or nothing. As `Sequence.transfer`."""
        wires = self._handles(seqs)
        limits = _u32s("tokens", tokens, len(seqs)) if tokens is not None else None
        point = ctypes.byref(_point(when)) if when is not None else None
        check(_abi.library().kvp_transfer(self.pointer, len(seqs), _views.address(wires),
                                          integer("session id", to, U64), point,
                                          _views.address(limits) if limits is not None else None))
        self._gone(seqs)

    def transfer_all(self, to: int) -> None:
        """Hand every sequence of this session to another, written as it is: a call for every 1024."""
        seqs = [self._known(entry.generation << 32 | entry.slot, entry.key) for entry in self.sequences()]
        for at in range(0, len(seqs), _abi.BATCH_MAX):
            self.transfer(seqs[at : at + _abi.BATCH_MAX], to)

    def close_sequences(self, seqs: Listing[Sequence], *, after: Point | None = None, stream: Any = None) -> None:
        """Give sequences up: one call. As `Sequence.close`."""
        kept = [seq for seq in seqs if not seq.closed]
        if not kept:
            return
        wires = self._handles(kept)
        points = self._points(after, len(kept), stream)
        check(_abi.library().kvp_seq_close(self.pointer, len(kept), _views.address(wires), points))
        self._gone(kept)

    def sequences(self, *, all_sessions: bool = False, from_slot: int = 0,
                  limit: int | None = None) -> Iterator[SequenceInfo]:
        """The pool's sequences as the daemon lists them, in the order of their slots: of this session, or of all. A
        call for every 1024."""
        if limit is not None and integer("limit", limit) == 0:
            return
        entries = (_abi.SeqInfo * min(_LIST_ENTRIES, limit or _LIST_ENTRIES))()
        at = ctypes.c_uint32(integer("from_slot", from_slot))
        n = ctypes.c_uint32()
        while True:
            check(_abi.library().kvp_seq_list(self.pointer, all_sessions, len(entries), ctypes.byref(at), entries,
                                              ctypes.byref(n)))
            for entry in entries[: n.value]:
                yield SequenceInfo(entry.seq.slot, entry.seq.generation, entry.key, entry.session_id, entry.reserved,
                                   entry.written, _abi.SEQUENCE_STATES.get(entry.state, str(entry.state)))
                if limit is not None:
                    limit -= 1
                    if limit == 0:
                        return
            if at.value == 0:
                return

    # ---- the prefix cache ----------------------------------------------------------------------------------------

    def match(self, tokens: Tokens = None, *, blocks: Listing[bytes] | None = None, extra: bytes = b"") -> int:
        """How many of these tokens, or of the tokens of these blocks, are cached now: one call, which promises
        nothing. `open` takes them along."""
        cached = ctypes.c_uint32()
        named, _kept = self._prefix(tokens, blocks, extra)
        check(_abi.library().kvp_match(self.client.pointer, self.name.encode(), 1, named, ctypes.byref(cached), 0,
                                       None))
        return cached.value

    def pin(self, tokens: Tokens = None, *, blocks: Listing[bytes] | None = None, extra: bytes = b"",
            lease_ms: int = 60_000) -> int:
        """Keep a whole prefix in the cache for `lease_ms` from now, whoever asks for it; again gives it the new lease.
        The pin is the user's and outlives process and daemon. Returns its tokens. Raises NotFound where not all of it
        is cached, LimitReached."""
        return self._pin(tokens, blocks, extra, integer("lease_ms", lease_ms, least=1))

    def unpin(self, tokens: Tokens = None, *, blocks: Listing[bytes] | None = None, extra: bytes = b"") -> int:
        """End the pin of exactly this prefix. Returns its tokens; 0: it was not pinned."""
        return self._pin(tokens, blocks, extra, 0)

    def _pin(self, tokens: Tokens, blocks: Listing[bytes] | None, extra: bytes, lease_ms: int) -> int:
        pinned = ctypes.c_uint32()
        named, _kept = self._prefix(tokens, blocks, extra)
        check(_abi.library().kvp_pin(self.client.pointer, self.name.encode(), 1, named, lease_ms,
                                     ctypes.byref(pinned)))
        return pinned.value

    def evict(self, pages: int | None = None, *, tokens: Tokens = None, blocks: Listing[bytes] | None = None,
              extra: bytes = b"", all_tenants: bool = False) -> int:
        """Let cached pages go that nobody holds: so many `pages`, in the order of the pool's policy, those of a prefix
        from its end on, or (neither) all of this user's, or of every user's. Returns how many went. Raises
        NotPermitted: all_tenants is for root and the daemon's own user."""
        if pages is not None and (tokens is not None or blocks is not None):
            raise InvalidArgument("evict takes a number of pages, or a prefix")
        if pages is not None:
            pages = integer("pages", pages, least=1)
        evicted = ctypes.c_uint64()
        named, _kept = blocks_of(1, None if tokens is None else [tokens], None if blocks is None else [blocks], None,
                                 extra)
        check(_abi.library().kvp_evict(self.client.pointer, self.name.encode(), pages or 0, named is not None, named,
                                       all_tenants, ctypes.byref(evicted)))
        return evicted.value

    def list_cache(self) -> Iterator[CachedPage]:
        """The pages that are found by their blocks, in the order of their ids. A call for every 1024."""
        entries = (_abi.CachedPage * _LIST_ENTRIES)()
        at, n = ctypes.c_uint32(0), ctypes.c_uint32()
        while True:
            check(_abi.library().kvp_list_cache(self.client.pointer, self.name.encode(), len(entries), ctypes.byref(at),
                                                entries, ctypes.byref(n)))
            for entry in entries[: n.value]:
                yield CachedPage(entry.page, bytes(entry.key), entry.parent, entry.children, entry.references,
                                 entry.tenant, entry.hits, entry.age)
            if at.value == 0:
                return

    def _prefix(self, tokens: Tokens, blocks: Listing[bytes] | None, extra: bytes) -> tuple[Any, Any]:
        if tokens is None and blocks is None:
            raise InvalidArgument("a prefix is tokens or blocks")
        return blocks_of(1, None if tokens is None else [tokens], None if blocks is None else [blocks], None, extra)

    # ---- the table, read without a call --------------------------------------------------------------------------

    def row(self, seq: Sequence) -> array.array[int]:
        """A sequence's page ids. No call. Raises StaleHandle, TryAgain."""
        handle, n = seq.handle(), ctypes.c_uint32()
        pages = _array("i", _ROW_GUESS)
        while True:
            check(_abi.library().kvp_row(self.pointer, handle, len(pages), _views.address(pages), ctypes.byref(n)))
            if n.value <= len(pages):
                return pages[: n.value]
            pages = _array("i", n.value)

    def lengths(self, seqs: Listing[Sequence]) -> list[int]:
        """`Sequence.length` of each: what is written, or enqueued. No call. Raises StaleHandle, TryAgain."""
        return [max(written, seq._enqueued) for written, seq in zip(self._written(seqs), seqs)]

    def _written(self, seqs: Listing[Sequence]) -> array.array[int]:
        wires, tokens = self._handles(seqs), _array("I", len(seqs))
        check(_abi.library().kvp_seq_lens(self.pointer, len(seqs), _views.address(wires), _views.address(tokens)))
        return tokens

    def seq_lens(self, seqs: Listing[Sequence]) -> Any:
        """How many tokens of each are written: int32 [n], a numpy array where numpy is installed. No call. Raises
        StaleHandle, TryAgain."""
        return _views.integers(array.array("i", self._written(seqs)))

    def page_table(self, seqs: Listing[Sequence], tokens: Listing[int] | None = None) -> tuple[Any, Any, Any]:
        """The CSR page table over `tokens` of each sequence (None: what is written): kv_indptr [n + 1], kv_indices
        [kv_indptr[n]], kv_last_page_len [n], int32. No call. Raises StaleHandle, TryAgain, InvalidArgument."""
        indptr, indices, last = self.csr(seqs, tokens)
        return _views.integers(indptr), _views.integers(indices), _views.integers(last)

    def csr(self, seqs: Listing[Sequence], tokens: Listing[int] | None = None
            ) -> tuple[array.array[int], array.array[int], array.array[int]]:
        """The same as `array.array`s."""
        n, wires = len(seqs), self._handles(seqs)
        lengths = self._written(seqs) if tokens is None else self._lengths("tokens", tokens, n)
        indptr, last = _array("i", n + 1), _array("i", n)
        indices = _array("i", sum([-(-length // self.page_size) for length in lengths]))
        check(_abi.library().kvp_page_table(
            self.pointer, n, _views.address(wires), _views.address(lengths), len(indices), _views.address(indptr),
            _views.address(indices), _views.address(last), None))
        return indptr, indices, last

    def _lengths(self, what: str, values: Listing[int], n: int) -> array.array[int]:
        """Of sequences, before there is memory for as many entries."""
        lengths, most = _u32s(what, values, n), self.info.spec.max_sequence_tokens
        for i, length in enumerate(lengths if max(lengths, default=0) > most else ()):
            integer(f"{what}[{i}]", length, most)
        return lengths

    def batch_indices(self, seqs: Listing[Sequence], tokens: Listing[int],
                      start: Listing[int] | None = None) -> tuple[Any, Any, Any]:
        """Of an append of tokens[i] behind start[i] (None: what is written): batch_indices and positions, int32
        [nnz], and the slots page · page_size + offset, int64 [nnz]. No call. Raises StaleHandle, TryAgain,
        InvalidArgument where a row has no room."""
        n, wires = len(seqs), self._handles(seqs)
        counts = self._lengths("tokens", tokens, n)
        first = _u32s("starts", start, n) if start is not None else None
        nnz = sum(counts)
        batch, positions, slots = _array("i", nnz), _array("i", nnz), _array("q", nnz)
        check(_abi.library().kvp_batch_indices(
            self.pointer, n, _views.address(wires), _views.address(counts),
            _views.address(first) if first is not None else None, _views.address(batch), _views.address(positions),
            _views.address(slots)))
        return _views.integers(batch), _views.integers(positions), _views.integers(slots)

    # ---- timelines -----------------------------------------------------------------------------------------------

    def signal(self, stream: Any = None) -> Point:
        """A point that is reached when `stream` gets there (host pools: now)."""
        library = _abi.library()
        timeline = ctypes.c_uint32()
        check(library.kvp_timeline_id(self.pointer, _TIMELINE, ctypes.byref(timeline)))
        with self._lock:
            self._signalled += 1
            point = Point(timeline.value, self._signalled)
            check(library.kvp_timeline_signal(self.pointer, _abi.Point(*point),
                                              _views.stream_of(stream) if self.info.cuda else None))
        return point

    def wait(self, point: Point, timeout_ms: int = 60_000) -> None:
        """Wait on this thread until a point is reached. Raises TimedOut, or what its owner's death cost."""
        check(_abi.library().kvp_timeline_wait(self.pointer, _point(point), integer("timeout_ms", timeout_ms)))

    def wait_on(self, point: Point, stream: Any = None) -> None:
        """Let `stream` wait for a point before what is enqueued next (host pools: waits on this thread)."""
        check(_abi.library().kvp_timeline_wait_on(self.pointer, _point(point),
                                                  _views.stream_of(stream) if self.info.cuda else None))

    def _points(self, after: Point | None, n: int, stream: Any) -> Any:
        if after is None:
            if not self.info.cuda:
                return None
            after = self.signal(stream)
        return (_abi.Point * n)(*[_point(after)] * n)
