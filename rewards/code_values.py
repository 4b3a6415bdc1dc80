"""Plain Python values in JSON, and messages on a socket: the language between the two sandboxed processes of `code_exec`.

Exact builtin types cross as they are, subclasses as the builtin type below them (a Counter as a dict, a namedtuple as a tuple), anything
else as the number of an object that stays where it is. Reading builds builtin values only, whatever the other side wrote: no class,
no method and no code crosses. A message is its length in 4 bytes and JSON. Runs inside the sandboxes too: standard library alone.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

MESSAGE_MAX = 16 << 20  # bytes
TEXT_MAX = 500  # characters of an exception's text
_DEPTH_MAX = 100
_SMALL = 1 << 63  # a larger int crosses in hexadecimal: decimal has a limit of digits


class TooLarge(Exception):
    """A value that is too large or too deep to cross."""


class Foreign(Exception):
    """A value of a type that cannot cross."""


class Gone(Exception):
    """The other side has ended, or what it said is no answer."""


def encode(value: Any, other: Callable[[Any], Any], depth: int = 0) -> Any:
    """JSON for `value`: exact types as they are, subclasses as the builtin type below them, `other(value)` for every other object."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"i": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"f": repr(value)}
    if depth > _DEPTH_MAX:
        raise TooLarge(f"a value is nested more than {_DEPTH_MAX} deep")
    inner = depth + 1
    if kind is list:
        return [encode(v, other, inner) for v in value]
    if kind in (tuple, set, frozenset):
        return {{tuple: "t", set: "s", frozenset: "z"}[kind]: [encode(v, other, inner) for v in value]}
    if kind is dict:
        return {"d": [[encode(k, other, inner), encode(v, other, inner)] for k, v in value.items()]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind is complex:
        return {"c": [encode(value.real, other), encode(value.imag, other)]}
    if kind is range:
        return {"r": [encode(n, other) for n in (value.start, value.stop, value.step)]}
    name = (kind.__module__, kind.__name__)
    if name in _TEXTUAL and getattr(sys.modules.get(name[0]), name[1], None) is kind:
        return {"o": [name[1], _TEXTUAL[name](value)]}
    return _encode_subclass(value, kind, other, depth)


def _encode_subclass(value: Any, kind: type, other: Callable[[Any], Any], depth: int) -> Any:
    """By the methods of the builtin type: what the subclass defines is not asked (a Counter is a dict, a namedtuple a tuple)."""
    for base in kind.__mro__:
        match base:
            case builtins.int | builtins.float:
                return encode(getattr(base, f"__{base.__name__}__")(value), other, depth)
            case builtins.str:
                return str.__str__(value)
            case builtins.bytes | builtins.bytearray:
                return {"b": bytes(memoryview(value)).hex()}
            case builtins.list | builtins.tuple | builtins.set | builtins.frozenset:
                return encode(base(base.__iter__(value)), other, depth)
            case builtins.dict:
                return encode(dict(dict.items(value)), other, depth)
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), other, depth + 1)
    return other(value)


_TEXTUAL: dict[tuple[str, str], Callable[[Any], str]] = {
    ("decimal", "Decimal"): str,
    ("fractions", "Fraction"): str,
    ("datetime", "date"): lambda v: v.isoformat(),
    ("datetime", "time"): lambda v: v.isoformat(),
    ("datetime", "datetime"): lambda v: v.isoformat(),
    ("datetime", "timedelta"): lambda v: f"{v.days} {v.seconds} {v.microseconds}",
}


def decode(data: Any, handle: Callable[[Any], Any], depth: int = 0) -> Any:
    """The value behind JSON. Raises ValueError, TypeError or LookupError for what `encode` does not write."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if depth > _DEPTH_MAX:
        raise ValueError("nested too deep")
    inner = depth + 1
    if type(data) is list:
        return [decode(v, handle, inner) for v in data]
    ((tag, body),) = data.items()
    match tag:
        case "t" | "s" | "z":
            return {"t": tuple, "s": set, "z": frozenset}[tag](decode(v, handle, inner) for v in body)
        case "d":
            return {decode(k, handle, inner): decode(v, handle, inner) for k, v in body}
        case "i":
            return int(body, 16)
        case "f":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[body]
        case "b":
            return bytes.fromhex(body)
        case "c":
            return complex(*(float(decode(v, handle)) for v in body))
        case "r":
            return range(*(decode(v, handle) for v in body))
        case "o":
            return _decode_textual(*body)
        case "h" | "g":
            return handle(data)
    raise ValueError(f"no such tag: {tag!r}")


def _decode_textual(name: str, text: str) -> Any:
    import datetime
    import decimal
    import fractions

    match name:
        case "Decimal":
            return decimal.Decimal(text)
        case "Fraction":
            top, _, bottom = text.partition("/")
            return fractions.Fraction(int(top), int(bottom or 1))
        case "timedelta":
            return datetime.timedelta(*map(int, text.split()))
        case "date" | "time" | "datetime":
            return getattr(datetime, name).fromisoformat(text)
    raise ValueError(f"no such type: {name!r}")


# ---------------------------------------------------------------- messages

def send(peer: int, message: Any) -> None:
    body = json.dumps(message).encode()
    if len(body) > MESSAGE_MAX:
        raise TooLarge(f"a value of more than {MESSAGE_MAX >> 20} MB")
    data = memoryview(len(body).to_bytes(4, "big") + body)
    while data:
        data = data[os.write(peer, data) :]


def receive(peer: int) -> Any:
    """Raises Gone at the end of the stream, ValueError or RecursionError for what is no message."""
    size = int.from_bytes(_exactly(peer, 4), "big")
    if size > MESSAGE_MAX:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(_exactly(peer, size))


def _exactly(peer: int, size: int) -> bytes:
    parts = []
    while size:
        try:
            part = os.read(peer, min(size, 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            raise Gone("the program ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def text_of(error: BaseException) -> str:
    try:
        return str(error)[:TEXT_MAX]
    except BaseException:  # of a class of the program
        return ""
