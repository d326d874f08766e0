"""Regions: named ranges of a pool's slab that outlive the processes that use them, as arrays of the caller's shapes."""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _abi
from ._arguments import U64, integer, text
from .errors import InvalidArgument, check
from .plane import Plane
from .spec import dtype_code

if TYPE_CHECKING:
    from .client import Owner
    from .pool import Pool


_EXTENT_MAX = (1 << 63) - 1


class RegionInfo(NamedTuple):
    """A region as the daemon lists it."""

    name: str
    rank: int
    """Whose slab it is in."""
    offset: int
    """Bytes from the start of the slab."""
    nbytes: int
    tenant: int
    """Whose it is: a uid."""
    mapped: int
    """Sessions that have it mapped; dead ones, too, until they are proven gone."""


class Region:
    """A range of the slab, mapped here by `Pool.region`. It holds the mapping, as every array made of it does."""

    __slots__ = ("_cuda", "_owner", "_pool", "existed", "name", "nbytes", "offset", "pointer", "rank")

    def __init__(self, pool: Pool, owner: Owner, name: str, rank: int, found: _abi.Region) -> None:
        self._pool = pool
        self._owner = owner.share()
        self._cuda = pool.info.cuda
        self.name = name
        self.rank = rank
        self.nbytes: int = found.bytes
        self.offset: int = found.offset
        """Bytes from the start of the slab."""
        self.pointer: int = found.address
        """A host address, or a device address of that rank's GPU."""
        self.existed = bool(found.existed)
        """It was there already: its bytes are those that were left."""

    def __repr__(self) -> str:
        return f"<kvpool.Region {self.name}: {self.nbytes} bytes at {self.offset} of pool {self._pool.name}>"

    def array(self, shape: Sequence[int], dtype: str = "uint8", offset: int = 0) -> Plane:
        """Its bytes from `offset` on as a dense array, for `torch.from_dlpack`, `numpy.asarray` and their like. Raises
        InvalidArgument where the array is not within the region."""
        code = dtype_code(dtype)
        size, strides = _abi.DTYPES[code][1], []
        count = size
        shape = extents_of(shape)
        for extent in reversed(shape):
            strides.append(count)
            count *= extent
        offset = integer("offset", offset, U64)
        if offset % size or offset + count > self.nbytes:
            raise InvalidArgument(f"{list(shape)} of {dtype} at {offset} are {count} bytes, not within the "
                                  f"{self.nbytes} of region {self.name}")
        return Plane(self._owner, self.pointer + offset, tuple(shape), tuple(reversed(strides)), code, self._cuda)

    def unmap(self) -> None:
        """Have it mapped no more; it stays, with its bytes, for who maps it next. The GPU must be done with it."""
        check(_abi.library().kvp_region_unmap(self._pool.pointer, self.rank, text("name", self.name), _abi.REGION_KEEP))

    def drop(self) -> None:
        """Give it up, as `Pool.drop_region`. Arrays of it stay readable, and are another's to write."""
        self._pool.drop_region(self.name, rank=self.rank)


def extents_of(shape: Sequence[int]) -> list[int]:
    """A shape's extents. Raises InvalidArgument, TypeError."""
    extents = [integer(f"shape[{i}]", extent, _EXTENT_MAX) for i, extent in enumerate(shape)]
    if len(extents) == 0 or len(extents) > _abi.DLPACK_DIMS_MAX:
        raise InvalidArgument(f"an array of {len(extents)} dimensions, must be 1 to {_abi.DLPACK_DIMS_MAX}")
    return extents


def map_region(pool: Pool, name: str, nbytes: int, rank: int, exclusive: bool) -> Region:
    """`Pool.region`."""
    found: Any = _abi.Region()
    check(_abi.library().kvp_region_map(pool.pointer, integer("rank", rank), text("name", name),
                                        integer("nbytes", nbytes, U64),
                                        _abi.REGION_EXCLUSIVE if exclusive else 0, ctypes.byref(found)))
    return Region(pool, pool.pointer, name, rank, found)
