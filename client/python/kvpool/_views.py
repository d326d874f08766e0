"""Arrays of the caller's, whatever library they are of: where their bytes are, and arrays like them to return.

numpy and torch are used where the caller brought their arrays; neither is imported for this.
"""
from __future__ import annotations

import array
import ctypes
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from .errors import InvalidArgument

HOST = 1
CUDA = 2
_torch_names: dict[Any, str] = {}  # of dtypes: to name one takes longer than all else that a view does
_numpy_names: dict[Any, str] = {}


class View(NamedTuple):
    """An array's memory. `strides` in bytes."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    device: tuple[int, int]
    """DLPack's (type, id): (1, 0) the host, (2, i) GPU i."""

    def at(self, index: int) -> View:
        """The array [index] along the first dimension."""
        return self._replace(
            pointer=self.pointer + index * self.strides[0], shape=self.shape[1:], strides=self.strides[1:]
        )


def is_torch(value: Any) -> bool:
    """A torch.Tensor?"""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_numpy(value: Any) -> bool:
    """A numpy.ndarray?"""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def torch_name(dtype: Any) -> str:
    """A torch.dtype's name, without "torch."."""
    return _torch_names.get(dtype) or _torch_names.setdefault(dtype, str(dtype)[6:])


def numpy_name(dtype: Any) -> str:
    """A numpy.dtype's name. Raises TypeError where the bytes are no numbers as this machine has them."""
    if dtype.hasobject or not dtype.isnative:
        raise TypeError(f"an array of {dtype.str} is not one of numbers in this machine's byte order")
    return _numpy_names.setdefault(dtype, dtype.name)


def view(value: Any, what: str) -> View:
    """Where a tensor's or an array's bytes are. Raises TypeError for anything else."""
    if is_torch(value):
        size, place = value.element_size(), value.device
        if place.type not in ("cpu", "cuda"):
            raise TypeError(f"{what} is on {place}; it must be on the host or a CUDA device")
        if value.is_neg() or value.is_conj():
            raise TypeError(f"{what} is a view that negates or conjugates; resolve_neg and resolve_conj copy it")
        device = (CUDA, place.index) if place.type == "cuda" else (HOST, 0)
        strides, pointer = tuple([stride * size for stride in value.stride()]), value.data_ptr()
        if pointer == 0 and value.numel() > 0:
            raise InvalidArgument(f"{what} has no memory: its storage was freed, or it stands for other tensors")
        return View(pointer, tuple(value.shape), strides, size, torch_name(value.dtype), device)
    if is_numpy(value):
        dtype = value.dtype
        name = _numpy_names.get(dtype) or numpy_name(dtype)
        return View(value.ctypes.data, value.shape, value.strides, value.itemsize, name, (HOST, 0))
    own = getattr(value, "_kvpool_view", None)
    if isinstance(own, View):
        return own
    raise TypeError(f"{what} is a {type(value).__name__}; it must be a torch tensor or a numpy array")


def target(value: Any, what: str) -> View:
    """The view of what is written to. Raises InvalidArgument where it is read-only."""
    seen = view(value, what)
    if is_numpy(value) and not value.flags.writeable:
        raise InvalidArgument(f"{what} is read-only")
    return seen


def dense(value: Any, what: str) -> tuple[View, Any]:
    """The view of an array whose last dimension is dense and whose strides are not negative, copied where it is not;
    and what must live as long as it."""
    seen = view(value, what)
    if seen.shape and (
        (seen.shape[-1] > 1 and seen.strides[-1] != seen.itemsize)
        or any(stride < 0 for extent, stride in zip(seen.shape, seen.strides) if extent > 1)
    ):
        value = value.contiguous() if is_torch(value) else value.copy(order="C")
        seen = view(value, what)
    return seen, value


def indices(values: Iterable[tuple[str, Any]], *, table: bool = False) -> tuple[int, list[View], list[Any]]:
    """Index arrays of one width, contiguous: (bits, views, what must live as long as they). Those of int32 stay so
    where all are; else all become int64. They have one dimension, the first of a `table` two. Raises TypeError for what
    is no integer array, InvalidArgument for other dimensions."""
    kept: list[Any] = []
    names = [what for what, _ in values]
    views: list[View] = []
    for what, value in values:
        seen = view(value, what)
        if seen.dtype not in ("int32", "int64", "uint8", "int8", "int16", "uint16", "uint32"):
            raise TypeError(f"{what} is of {seen.dtype}; indices are integers")
        if len(seen.shape) != 1 + (table and not views):
            raise InvalidArgument(f"{what} is {list(seen.shape)}; it must have {1 + (table and not views)} dimensions")
        views.append(seen)
        kept.append(value)
    wanted = "int32" if all(seen.dtype == "int32" for seen in views) else "int64"
    for i, what in enumerate(names):
        value = kept[i]
        if is_torch(value):
            if views[i].dtype != wanted:
                value = value.to(getattr(sys.modules["torch"], wanted))
            value = value.contiguous()
        elif views[i].dtype != wanted or not value.flags.c_contiguous:
            value = value.astype(wanted, order="C")
        if value is not kept[i]:
            kept[i], views[i] = value, view(value, what)
    return (32 if wanted == "int32" else 64), views, kept


def empty(like: Any, shape: int, dtype: str) -> Any:
    """A new one-dimensional array of the kind and on the device of `like`."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return sys.modules["numpy"].empty(shape, dtype=dtype)


def integers(values: array.array[int]) -> Any:
    """What is returned of the table: a numpy array where numpy is installed, else the `array.array` itself."""
    try:
        import numpy
    except ImportError:
        return values
    return numpy.frombuffer(values, dtype=f"i{values.itemsize}") if len(values) else numpy.empty(0, values.typecode)


def address(values: array.array[int]) -> int:
    """Of the first element."""
    return values.buffer_info()[0]


def same_device(views: Iterable[View]) -> tuple[int, int]:
    """The device of all of them. Raises InvalidArgument where they are on several."""
    devices = {seen.device for seen in views}
    if len(devices) != 1:
        raise InvalidArgument(f"the arrays are on {len(devices)} devices")
    return devices.pop()


def current_stream(device: int | None = None) -> int:
    """torch's current CUDA stream where torch is in use, else the default stream."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)


def stream_of(stream: Any) -> int:
    """A stream as a number: of an int, of an object with `cuda_stream` (torch), None: the current one."""
    if stream is None:
        return current_stream()
    return int(getattr(stream, "cuda_stream", stream))


def cuda_ordinal(pointer: int) -> int:
    """Which CUDA device a device pointer is of, as the driver numbers them in this process."""
    driver = ctypes.CDLL("libcuda.so.1")
    ordinal = ctypes.c_int()
    status = driver.cuPointerGetAttribute(ctypes.byref(ordinal), 9, ctypes.c_uint64(pointer))
    if status != 0:
        raise OSError(f"the driver does not know the pointer {pointer:#x} (CUDA error {status})")
    return ordinal.value
