"""Callers' numbers and texts on their way into C, where a number that is too large would wrap and a text would end at
its first zero byte. TypeError is raised for another type, InvalidArgument for a value out of range; both name it."""
from __future__ import annotations

import operator
from typing import Any

from .errors import InvalidArgument

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1


def integer(what: str, value: Any, most: int = U32, least: int = 0) -> int:
    """An integer from `least` to `most`."""
    whole: Any = None if getattr(value, "ndim", 0) else value  # an array of one number has an index, too
    try:
        number = operator.index(whole)
    except TypeError:
        raise TypeError(f"{what} is a {type(value).__name__}; it must be an integer") from None
    if not least <= number <= most:
        raise InvalidArgument(f"{what} {number} is not in {least}..{most}")
    return number


def text(what: str, value: Any) -> bytes:
    """A text as C takes it."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {type(value).__name__}; it must be a str")
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} {value!r} is no Unicode text") from None
    if b"\0" in encoded:
        raise InvalidArgument(f"{what} {value!r} has a zero byte")
    return encoded
