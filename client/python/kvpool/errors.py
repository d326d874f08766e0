"""What can go wrong, as classes: one a status of kvp_status.h, grouped there by the largest thing that is lost.

Every error carries `.status` and the sentence of the library or the daemon, which names the value and the limit.
Where Python has a built-in class for the case, ours is one of those too (`OutOfMemory` is a `MemoryError`).
"""
from __future__ import annotations

import enum
from typing import ClassVar, NoReturn

from . import _abi


class Status(enum.IntEnum):
    """enum kvp_status."""

    OK = 0
    EINVAL = -1
    ENOENT = -2
    EEXIST = -3
    EPERM = -4
    EBUSY = -5
    ENOPAGES = -6
    ELIMIT = -7
    ENOMEM = -8
    EMISMATCH = -9
    ETIMEDOUT = -10
    EAGAIN = -11
    ENOSYS = -12
    ENODEV = -13
    EDEVICE = -14
    EPROTO = -15
    ESTALE = -20
    ESESSION = -30
    EDISCONNECTED = -31
    ELOST = -40
    ECORRUPT = -50
    EINTERNAL = -51


class KvpoolError(Exception):
    """Any failure of kvpool."""

    status: ClassVar[Status] = Status.EINTERNAL

    @property
    def text(self) -> str:
        """The sentence that says what went wrong."""
        return str(self.args[0]) if self.args else ""


class InvalidArgument(KvpoolError, ValueError):
    """An argument is out of its range; nothing changed."""

    status = Status.EINVAL


class NotFound(KvpoolError, LookupError):
    """No such thing."""

    status = Status.ENOENT


class AlreadyExists(KvpoolError):
    """It exists already, and is another."""

    status = Status.EEXIST


class NotPermitted(KvpoolError, PermissionError):
    """Not allowed to this caller."""

    status = Status.EPERM


class Busy(KvpoolError):
    """It is in use; try again when it is not."""

    status = Status.EBUSY


class OutOfPages(KvpoolError):
    """The pool is short of `missing` pages; nothing changed."""

    status = Status.ENOPAGES
    missing: int = 0


class LimitReached(KvpoolError):
    """A limit is reached."""

    status = Status.ELIMIT


class OutOfMemory(KvpoolError, MemoryError):
    """Out of memory."""

    status = Status.ENOMEM


class Mismatch(KvpoolError):
    """The state is not the one that the caller expects; nothing changed."""

    status = Status.EMISMATCH


class LayoutMismatch(Mismatch):
    """The pool's layout, model or ABI is not the one asked for."""


class BadIndex(KvpoolError, IndexError):
    """A page id, position or batch index out of range, found by a host kernel: that token is skipped, the others are
    done."""

    status = Status.EMISMATCH


class TimedOut(KvpoolError, TimeoutError):
    """Not done in time."""

    status = Status.ETIMEDOUT


class TryAgain(KvpoolError):
    """Not served at the moment."""

    status = Status.EAGAIN


class NotServed(KvpoolError, NotImplementedError):
    """This version does not serve that call."""

    status = Status.ENOSYS


class NoDevice(KvpoolError):
    """The device it needs is not here."""

    status = Status.ENODEV


class DeviceError(KvpoolError):
    """A device or driver call failed."""

    status = Status.EDEVICE


class ProtocolError(KvpoolError):
    """A message can not be read."""

    status = Status.EPROTO


class StaleHandle(KvpoolError):
    """The sequence is closed, or its slot belongs to another: open it again."""

    status = Status.ESTALE


class SessionEnded(KvpoolError):
    """The session has ended, or belongs to the process that forked this one: connect again."""

    status = Status.ESESSION


class Disconnected(KvpoolError, ConnectionError):
    """The connection to the daemon is lost, or nobody listens there."""

    status = Status.EDISCONNECTED


class PoolLost(KvpoolError):
    """The pool's memory is gone: make it again."""

    status = Status.ELOST


class LedgerCorrupt(KvpoolError):
    """The ledger does not pass its audit: an operator must look."""

    status = Status.ECORRUPT


class InternalError(KvpoolError):
    """An internal fault."""

    status = Status.EINTERNAL


_CLASSES: dict[int, type[KvpoolError]] = {
    cls.status: cls
    for cls in KvpoolError.__subclasses__()
    if cls is not BadIndex
}


def fail(status: int, *, layout: bool = False, missing: int = 0) -> NoReturn:
    """Raise what `status` of a libkvpool function means, with the text that it left in this thread."""
    library = _abi.library()
    text = library.kvp_error_text().decode(errors="replace") or library.kvp_strerror(status).decode()
    cls = _CLASSES.get(status, InternalError)
    if cls is Mismatch and layout:
        cls = LayoutMismatch
    error = cls(text)
    if isinstance(error, OutOfPages):
        error.missing = missing
    raise error


def check(status: int) -> None:
    """Raise unless `status` is KVP_OK."""
    if status != 0:
        fail(status)
