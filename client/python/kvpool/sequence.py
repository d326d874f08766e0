"""A sequence of a pool: its room, its tokens, and what becomes of it."""
from __future__ import annotations

import ctypes
from collections.abc import Sequence as Listing
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _abi
from ._arguments import integer
from .errors import StaleHandle, check

if TYPE_CHECKING:
    import array

    from .pool import Pool


class Point(NamedTuple):
    """A point on a timeline of a pool. Value 0 is reached from the start."""

    timeline: int
    value: int


class SequenceInfo(NamedTuple):
    """A sequence as the daemon lists it."""

    slot: int
    generation: int
    key: int
    session_id: int
    reserved: int
    written: int
    state: str
    """"open", "retiring", "quarantined", "lingering" or "busy"."""


class Sequence:
    """A line of the pool's page table. Made by `Pool.open` and `Sequence.fork`.

    `reserved` tokens there is room for, `written` tokens are there (`len(sequence)`). A context manager: closed at
    the end of its block.
    """

    __slots__ = ("_copied", "_enqueued", "_reserved", "cached", "generation", "key", "open_in", "pool", "slot",
                 "wire")

    def __init__(self, pool: Pool, wire: int, key: int) -> None:
        self.pool = pool
        self.wire = wire
        """The handle as one number: generation << 32 | slot."""
        self.slot = wire & 0xFFFFFFFF
        self.generation = wire >> 32
        self.key = key
        self.cached = 0
        """Tokens that were taken along from the prefix cache when it was opened."""
        self.open_in: Pool | None = pool
        """Its pool; None once it was closed, or transferred, by this object."""
        self._reserved: int | None = None  # and whether it owes a copy: not known before an advance of this object's
        self._copied: tuple[int, int, int] | None = None
        self._enqueued = 0

    def __repr__(self) -> str:
        return f"<kvpool.Sequence {self.slot}.{self.generation} key={self.key}{' closed' if self.closed else ''}>"

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return self.written

    def __bool__(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        """Whether it was closed, or transferred, by this object."""
        return self.open_in is None

    def handle(self) -> _abi.Seq:
        """struct kvp_seq. Raises StaleHandle once it is closed here."""
        if self.closed:
            raise StaleHandle(f"sequence {self.slot}.{self.generation} is closed")
        return _abi.Seq(self.slot, self.generation)

    @property
    def written(self) -> int:
        """Tokens that are there. No call. Raises StaleHandle, TryAgain."""
        tokens = ctypes.c_uint32()
        check(_abi.library().kvp_seq_len(self.pool.pointer, self.handle(), ctypes.byref(tokens)))
        return tokens.value

    @property
    def length(self) -> int:
        """Tokens that are there or that this object has enqueued (CUDA: they are written when the stream gets
        there). No call. Raises StaleHandle, TryAgain."""
        return max(self.written, self._enqueued)

    def note_enqueued(self, tokens: int) -> None:
        """For those who write by libkvpool themselves: `tokens` tokens are enqueued, and reported as written behind
        that."""
        self._enqueued = tokens

    @property
    def reserved(self) -> int:
        """Tokens that there is room for: known here, else one call. Raises StaleHandle."""
        if self._reserved is not None:
            return self._reserved
        return self.info().reserved if len(self.page_ids()) else 0

    @property
    def pages(self) -> list[int]:
        """Its page ids, in order. No call. Raises StaleHandle, TryAgain."""
        return list(self.page_ids())

    def page_ids(self) -> array.array[int]:
        """The same as an `array.array` of int32."""
        return self.pool.row(self)

    def info(self) -> SequenceInfo:
        """The sequence as the daemon has it: one call. Raises StaleHandle."""
        for entry in self.pool.sequences(all_sessions=True, from_slot=self.slot, limit=1):
            if (entry.slot, entry.generation) == (self.slot, self.generation):
                return entry
        raise StaleHandle(f"sequence {self.slot}.{self.generation} is closed")

    def reserve(self, tokens: int, *, stream: Any = None) -> None:
        """Have room for at least `tokens` tokens: a call where there is less. Copies that it owes are carried out on
        `stream`. Raises OutOfPages, StaleHandle, InvalidArgument."""
        if integer("tokens", tokens) > self.reserved:
            self.pool.advance([self], [tokens], stream=stream)

    def publish(self, tokens: Any = None, *, blocks: Listing[bytes] | None = None, first: int = 0,
                extra: bytes = b"") -> None:
        """Say what its pages hold, or will hold, from page `first` on: by token ids, or by block keys of the engine's,
        one a page. Once such a page is full and written and the daemon has seen so (by the next call on the sequence,
        or its close), any sequence of this user takes it along (`Pool.open`). Tokens that fill no page at the end are
        left out of account; what is named must lie within `reserved`. Raises InvalidArgument; Mismatch where a page is
        known to hold something else."""
        self.pool.advance([self], [self.reserved], tokens=None if tokens is None else [tokens],
                          blocks=None if blocks is None else [blocks], first=[first], extra=extra)

    def append(self, *components: Any, stream: Any = None) -> int:
        """Write tokens behind those written, in this process: k and v, or ckv and kpe. Returns the length after.

        Each component is [tokens, heads, dim] for a pool of one layer, or one such array a layer ([layers, tokens,
        heads, dim], or a list of arrays); [heads, dim] is one token; of one head, the heads' dimension may be left
        out. Dtypes are the planes'. Host pools take host arrays, CUDA pools CUDA tensors, enqueued on `stream` (None:
        torch's current one). Room is reserved by whole pages, so most appends make no call.

        Raises OutOfPages, StaleHandle, InvalidArgument.
        """
        return self.pool.append([self], *components, stream=stream)[0]

    def truncate(self, tokens: int, *, after: Point | None = None, stream: Any = None) -> None:
        """Keep the first `tokens` tokens and give up the room behind them. On CUDA pools pages return when `after` is
        reached (None: when `stream` gets there). Raises StaleHandle, InvalidArgument."""
        self.pool.advance([self], [tokens], truncate=True, after=after, stream=stream)

    def fork(self, key: int | str, tokens: int | None = None, *, stream: Any = None) -> Sequence:
        """A child by `key` that shares the first `tokens` tokens (None: all written): full pages are shared, a page
        that is not full is copied on `stream`. The child of a durable sequence is durable. Raises AlreadyExists,
        OutOfPages, StaleHandle, InvalidArgument."""
        return self.pool.fork([self], [key], None if tokens is None else [tokens], stream=stream)[0]

    def transfer(self, to: int, *, when: Point | None = None, tokens: int | None = None) -> None:
        """Hand it to another session (`client.session.session_id`) that has the pool attached; it opens the key.

        `when`: the point at which `tokens` tokens will be written; None: what is written is written. Zero copy.
        Raises NotFound, StaleHandle, InvalidArgument.
        """
        self.pool.transfer([self], to, when=when, tokens=None if tokens is None else [tokens])

    def close(self, *, after: Point | None = None, stream: Any = None) -> None:
        """Give it up; closing what is closed is fine. On CUDA pools its pages return when `after` is reached (None:
        when `stream` gets there)."""
        if not self.closed:
            self.pool.close_sequences([self], after=after, stream=stream)
