"""A plane of a mapped pool as an array for numpy, torch and whatever speaks DLPack.

A `Plane` holds the mapping: so does every tensor made of it, until it is gone, whatever happens to the pool object.
The deleter of a DLPack tensor is a C function of libkvpool.
"""
from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from . import _abi, _views
from .errors import check

if TYPE_CHECKING:
    from .client import Owner

_NEW_CAPSULE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class Plane:
    """A strided array over a pool's own memory: what is written to it is in the pool.

    Shapes: standard planes [pages, page_size, heads, dim] (order NHD) or [pages, heads, page_size, dim] (HND); MLA
    planes [pages, page_size, dim]; K and V of a joined layer [pages, 2, ...].

    `torch.from_dlpack(plane)`, `numpy.from_dlpack(plane)` and `numpy.asarray(plane)` (host pools) make arrays of it.
    numpy before 2.1 makes read-only arrays of DLPack; those of `numpy.asarray` and `plane.numpy()` are writable.
    Neither library knows every dtype: numpy has no bfloat16 and no fp8, and consumers that ask for an unversioned
    capsule know no fp8 either, and are handed uint8. `plane.bytes` is the same memory as uint8, for all of them.
    """

    __slots__ = ("_device", "_dtype", "_kvpool_view", "_owner", "shape", "strides")

    def __init__(self, owner: Owner, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: int,
                 cuda: bool) -> None:
        self._owner = owner.share()
        self._dtype = dtype
        self._device = (_views.CUDA, _views.cuda_ordinal(pointer)) if cuda else (_views.HOST, 0)
        self.shape = shape
        self.strides = strides
        """Bytes."""
        name, size, _, _ = _abi.DTYPES[dtype]
        self._kvpool_view = _views.View(pointer, shape, strides, size, name, self._device)

    @property
    def dtype(self) -> str:
        """The name of its dtype, as torch calls it."""
        return _abi.DTYPES[self._dtype][0]

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def pointer(self) -> int:
        """The address of its first element, host or device."""
        return self._kvpool_view.pointer

    @property
    def bytes(self) -> Plane:
        """The same memory as uint8: the last dimension is dim · itemsize."""
        size = self._kvpool_view.itemsize
        return Plane(self._owner, self.pointer, (*self.shape[:-1], self.shape[-1] * size), (*self.strides[:-1], 1),
                     _abi.DTYPE_CODES["uint8"], self._device[0] == _views.CUDA)

    def __repr__(self) -> str:
        where = f"cuda:{self._device[1]}" if self._device[0] == _views.CUDA else "host"
        return f"<kvpool.Plane {list(self.shape)} {self.dtype} {where}>"

    def numpy(self) -> Any:
        """A numpy array of it. Raises TypeError for a dtype that numpy has not, or memory of a GPU."""
        import numpy

        return numpy.asarray(self)

    def torch(self) -> Any:
        """A torch tensor of it."""
        import torch

        return torch.from_dlpack(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        typestr = _abi.DTYPES[self._dtype][3]
        if self._device[0] != _views.HOST:
            raise TypeError("the pool is in GPU memory, where numpy can not reach; use torch.from_dlpack")
        if not typestr:
            raise TypeError(f"numpy has no {self.dtype}; use plane.bytes, or torch.from_dlpack(plane)")
        return {"version": 3, "shape": self.shape, "strides": self.strides, "typestr": typestr,
                "data": (self.pointer, False)}

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """A capsule over a DLManagedTensorVersioned where `max_version` is 1.0 or more, else over a DLManagedTensor.

        No work of ours is pending on the memory, so `stream` needs no wait. Raises BufferError for a copy, or another
        device.
        """
        if dl_device is not None and tuple(dl_device) != self._device:
            raise BufferError(f"the plane is on device {self._device}, not {tuple(dl_device)}")
        if copy:
            raise BufferError("a plane is the pool's own memory; it is not copied")
        versioned = max_version is not None and max_version[0] >= 1
        size = self._kvpool_view.itemsize
        code, bits = _abi.DTYPES[self._dtype][2]
        if code in (10, 12) and not versioned:
            code, bits = 1, 8
        tensor = _abi.DlpackTensor(data=self.pointer, device_type=self._device[0], device_id=self._device[1],
                                   ndim=len(self.shape), code=code, bits=bits)
        tensor.shape[: len(self.shape)] = self.shape
        tensor.strides[: len(self.shape)] = [stride // size for stride in self.strides]
        managed = ctypes.c_void_p()
        library = _abi.library()
        check(library.kvp_dlpack_export(self._owner.pointer, ctypes.byref(tensor), versioned, ctypes.byref(managed)))
        end = ctypes.cast(library.kvp_dlpack_capsule_end, ctypes.c_void_p)
        return _NEW_CAPSULE(managed, b"dltensor_versioned" if versioned else b"dltensor", end)
