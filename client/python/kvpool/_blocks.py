"""Blocks of sequences as libkvpool takes them: token ids, or an engine's own block keys."""
from __future__ import annotations

import array
import ctypes
from collections.abc import Sequence as Listing
from typing import Any, NamedTuple

from . import _abi, _views
from ._arguments import integer
from .errors import InvalidArgument

Tokens = Any
"""Token ids: a list, a numpy array or a torch tensor of integers."""


class CachedPage(NamedTuple):
    """A page that is found by its block."""

    page: int
    key: bytes
    """16 bytes, as the daemon made them."""
    parent: int
    """Page of the block before it; -1: it is a first block."""
    children: int
    """Published blocks that extend it."""
    references: int
    """Sequences and pins that hold it; 0: it is cached."""
    tenant: int
    """uid"""
    hits: int
    age: int
    """Lookups since it was let go of."""


def _numbers(what: str, values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _of_tokens(tokens: Listing[Tokens], made: _abi.Blocks, counts: array.array[int]) -> Any:
    flat = array.array("I")
    for entry in tokens:
        before = len(flat)
        try:
            flat.extend(_numbers("tokens", entry))
        except (OverflowError, TypeError):
            raise InvalidArgument(f"tokens are integers 0..{(1 << 32) - 1}") from None
        counts.append(len(flat) - before)
    made.tokens = _views.address(flat)
    return flat


def _of_keys(blocks: Listing[Listing[bytes]], made: _abi.Blocks, counts: array.array[int]) -> Any:
    for key in (key for entry in blocks for key in entry):
        if not isinstance(key, (bytes, bytearray, memoryview)):
            raise TypeError(f"a block key is a {type(key).__name__}; it must be bytes")
    sizes = {len(key) for entry in blocks for key in entry}
    if len(sizes) > 1:
        raise InvalidArgument(f"block keys of {', '.join(map(str, sorted(sizes)))} bytes: all have one size")
    flat = ctypes.create_string_buffer(b"".join(bytes(key) for entry in blocks for key in entry))
    counts.extend(len(entry) for entry in blocks)
    made.keys = ctypes.addressof(flat)
    made.key_bytes = sizes.pop() if sizes else 0
    return flat


def blocks_of(n: int, tokens: Listing[Tokens] | None, blocks: Listing[Listing[bytes]] | None,
              first: Listing[int] | None, extra: bytes) -> tuple[Any, Any]:
    """A pointer to struct kvp_blocks of n sequences, or None, and what must live as long as it. Raises
    InvalidArgument."""
    if tokens is None and blocks is None:
        if first is not None or extra:
            raise InvalidArgument("first and extra are of tokens or blocks")
        return None, None
    if tokens is not None and blocks is not None:
        raise InvalidArgument("blocks are named by tokens or by keys, not by both")
    named = tokens if tokens is not None else blocks
    assert named is not None
    if len(named) != n or (first is not None and len(first) != n):
        raise InvalidArgument(f"blocks of {len(named if len(named) != n else first or ())} sequences for {n}")
    if not isinstance(extra, (bytes, bytearray, memoryview)):
        raise TypeError(f"extra is a {type(extra).__name__}; it must be bytes")
    made, counts = _abi.Blocks(), array.array("I")
    flat = _of_tokens(tokens, made, counts) if tokens is not None else _of_keys(blocks or [], made, counts)
    starts = array.array("I", [integer("first", page) for page in first]) if first is not None else None
    kept = ctypes.create_string_buffer(bytes(extra), len(extra)) if extra else None
    made.counts = _views.address(counts)
    made.first = _views.address(starts) if starts is not None else None
    made.extra = ctypes.addressof(kept) if kept is not None else None
    made.extra_bytes = len(extra)
    return ctypes.byref(made), (made, counts, flat, starts, kept)
