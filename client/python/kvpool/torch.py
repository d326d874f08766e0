"""torch on kvpool's memory: a pool's planes as tensors, and an engine's own tensors in named regions that outlive it.

    with kvpool.torch.use_pool(pool, "kv", preserve=True):
        cache = [torch.zeros(2, blocks, block_size, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in layers]

What is allocated on the GPU in the block lies in regions "kv/0", "kv/1", … of the pool, which the daemon owns. Killed
and started again, an engine that allocates the same tensors in the same order is handed the same bytes; with `preserve`
the zeroing that engines do at their start is kept from them.

torch asks for whole segments: 2 MiB for a tensor of up to 1 MiB, 20 MiB below 10 MiB, above that a multiple of 2 MiB.
`room` adds them up for `PoolSpec.region_bytes`.
"""
from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import _abi
from ._arguments import text
from .errors import Busy, InvalidArgument, KvpoolError, NotServed, check, fail
from .region import extents_of

if TYPE_CHECKING:
    from .pool import Pool
    from .region import RegionInfo

_MIB = 1 << 20
_NAMES = {getattr(torch, name): name for name in _abi.DTYPE_CODES}
_lock = threading.Lock()
_allocator: Any = None


def tensors(pool: Pool, rank: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """The pool's memory as tensors, a tuple a layer: (k, v), or (ckv, kpe) of MLA, shaped as `Plane` says."""
    return [tuple(torch.from_dlpack(plane) for plane in pool.layer(layer, rank)) for layer in range(pool.layers)]


def region(pool: Pool, name: str, shape: Sequence[int], dtype: torch.dtype = torch.uint8, *, rank: int = 0,
           exclusive: bool = False) -> torch.Tensor:
    """A tensor that is a region of the pool, found by its name or made; of host pools, too. Its bytes are those that
    were left there. Raises what `Pool.region` raises: Mismatch where the region has another size."""
    if dtype not in _NAMES:
        raise InvalidArgument(f"dtype {dtype} is none of {', '.join(_NAMES.values())}")
    extents = extents_of(shape)  # before there is a region for it
    count = dtype.itemsize * math.prod(extents)
    if count == 0:
        raise InvalidArgument(f"a tensor of {extents} has no bytes: it can be no region")
    found = pool.region(name, count, rank=rank, exclusive=exclusive)
    return torch.from_dlpack(found.array(extents, _NAMES[dtype]))


def room(sizes: Iterable[int]) -> int:
    """The region_bytes that tensors of these sizes, in bytes, take in `use_pool`."""
    def segment(size: int) -> int:
        return 2 * _MIB if size <= _MIB else 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB

    return sum(segment(-(-size // 512) * 512) for size in sizes if size)


def drop(pool: Pool, tag: str) -> None:
    """Give up the regions of a tag, with their bytes. Raises Busy where anybody has one: a tensor of this process, or
    another session, a dead one included until it is proven gone."""
    with _lock:
        for key in [key for key in pool.torch_memory if key[0] == tag]:
            del pool.torch_memory[key]
    for found in _of_tag(pool, tag):
        if found.mapped:
            raise Busy(f"region {found.name} of pool {pool.name} is mapped by {found.mapped} sessions")
        pool.drop_region(found.name, rank=found.rank)


def _of_tag(pool: Pool, tag: str) -> Iterator[RegionInfo]:
    for found in pool.regions():
        head, _, number = found.name.rpartition("/")
        if head == tag and number.isdecimal():
            yield found


@contextlib.contextmanager
def use_pool(pool: Pool, tag: str, preserve: bool = False, *,
             device: torch.device | int | None = None) -> Iterator[None]:
    """Let this thread's CUDA allocations in the block lie in regions of a pool on the GPU: "tag/0", "tag/1", … in their
    order, one a tensor.

    `preserve`: what an earlier process allocated in that order comes back with its bytes; the sizes must be the same.
    In the block, torch.zeros, ones and full over such bytes, and zero_ and fill_ of a tensor that was just made over
    them, leave them as they are; everything else writes as ever. Without `preserve`, the tag's regions of earlier
    processes are given up before the first allocation. `device`: the GPU, one of the pool's (None: the current one).

    Where torch would raise OutOfMemoryError, what the daemon said is raised: LimitReached where the pool has no room
    for another region, Mismatch where a size is not that of the earlier process, Busy where another process has the
    region, TryAgain where that one died and is not proven gone within 10 s, NoDevice where the pool is not on that GPU.
    Raises InvalidArgument for a pool in host memory.

    The tensors hold the pool's mapping. When one is freed, torch keeps its memory for the tag until the pool is
    detached; the region stays for who uses the tag next, and `drop` gives it up.
    """
    if not pool.info.cuda:
        raise InvalidArgument(f"pool {pool.name} is in host memory: use_pool is for pools on a GPU, "
                              "kvpool.torch.region for both")
    index = torch.device(f"cuda:{device}" if isinstance(device, int) else device or "cuda").index
    place = torch.cuda.current_device() if index is None else index
    memory, whole = _memory(pool, tag, place)
    if preserve and not whole:
        raise NotServed(f"torch {torch.__version__} has no MemPool(no_split=True): tensors would share regions, and "
                        "could not be told apart")
    library = _abi.library()
    check(library.kvp_torch_use(pool.pointer.pointer, text("tag", tag), _abi.TORCH_PRESERVE if preserve else 0))
    failed: torch.OutOfMemoryError | None = None
    try:
        with torch.cuda.use_mem_pool(memory, place), (Keep(_came_back) if preserve else contextlib.nullcontext()):
            yield
    except torch.OutOfMemoryError as error:
        failed = error
        raise
    finally:
        status = library.kvp_torch_end()
        if failed is not None and status != 0:
            _say(status, failed)


def _say(status: int, failed: BaseException) -> None:
    try:
        fail(status)
    except KvpoolError as error:
        raise error from failed


def _memory(pool: Pool, tag: str, device: int) -> tuple[Any, bool]:
    """torch's memory pool of a tag, and whether it gives each tensor a segment of its own."""
    global _allocator
    assert pool.pointer
    with _lock:
        if _allocator is None:
            _allocator = torch.cuda.memory.CUDAPluggableAllocator(
                _abi.library()._name, "kvp_torch_malloc", "kvp_torch_free")
        if (tag, device) not in pool.torch_memory:
            with torch.cuda.device(device):
                try:
                    made = torch.cuda.MemPool(_allocator.allocator(), no_split=True), True
                except TypeError:
                    made = torch.cuda.MemPool(_allocator.allocator()), False
            pool.torch_memory[tag, device] = made
        found: tuple[Any, bool] = pool.torch_memory[tag, device]
        return found


def _came_back(pointer: int) -> bool:
    return bool(_abi.library().kvp_torch_came_back(pointer))


_aten = torch.ops.aten
# Makers of filled tensors: the maker of an empty one of the same arguments, and the fill value or where it stands.
_FILLED: dict[Any, tuple[Any, int | None, float]] = {
    _aten.zeros.default: (_aten.empty.memory_format, None, 0),
    _aten.ones.default: (_aten.empty.memory_format, None, 1),
    _aten.full.default: (_aten.empty.memory_format, 1, 0),
    _aten.new_zeros.default: (_aten.new_empty.default, None, 0),
    _aten.new_ones.default: (_aten.new_empty.default, None, 1),
    _aten.new_full.default: (_aten.new_empty.default, 2, 0),
    _aten.zeros_like.default: (_aten.empty_like.default, None, 0),
    _aten.ones_like.default: (_aten.empty_like.default, None, 1),
    _aten.full_like.default: (_aten.empty_like.default, 1, 0),
}
_EMPTY = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_permuted.default,
          _aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default}
_FILL = {_aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor}


class Keep(TorchDispatchMode):  # type: ignore[misc]
    """Keeps the filling of new tensors from bytes that came back.

        zeros, ones, full ──► not filled
        empty ──► untouched ──► zero_, fill_: not done
                      └───────► any other use: touched, and written as ever

    `came_back(pointer)`: whether the bytes there are an earlier process's, said once of a tensor's memory.
    """

    def __init__(self, came_back: Callable[[int], bool]) -> None:
        super().__init__()
        self._came_back = came_back
        self._untouched: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLED:
            return self._filled(func, args, kwargs)
        if func in _FILL and _storage(args[0]) in self._untouched:
            return args[0]
        made = func(*args, **kwargs)
        if func in _EMPTY:
            if self._came_back(_storage(made)):
                self._untouched.add(_storage(made))
        elif not func.is_view:
            self._untouched.difference_update(map(_storage, tree_leaves((args, kwargs))))
            for value in tree_leaves(made):
                self._came_back(_storage(value))
        return made

    def _filled(self, func: Any, args: Any, kwargs: Any) -> Any:
        empty, at, value = _FILLED[func]
        if at is not None:
            value, args = args[at], (*args[:at], *args[at + 1 :])
            if func is _aten.full.default and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.full((), value).dtype}
        made = empty(*args, **kwargs)
        return made if self._came_back(_storage(made)) else made.fill_(value)


def _storage(value: Any) -> int:
    """The address of a tensor's memory; 0 of what has none."""
    if not isinstance(value, torch.Tensor) or value.device.type == "meta" or value.layout is not torch.strided:
        return 0
    return int(value.untyped_storage().data_ptr())
