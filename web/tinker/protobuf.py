"""The wire format of protobuf, as far as this protocol needs it. Pure, and without a schema compiler: the few
messages are spelled out where they are read and written (`datums`, `outputs`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

_VARINT, _DOUBLE, _BLOCK, _FLOAT = 0, 1, 2, 5
_FIXED = {_DOUBLE: 8, _FLOAT: 4}


class Malformed(ValueError):
    """These bytes are no protobuf message."""


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field of a message, in order: a varint as an int, all else as its bytes.

    Raises Malformed.
    """
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BLOCK:
            size, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise Malformed(f"field {number} has the unknown wire type {kind}")
        if size > end - at:
            raise Malformed(f"field {number} is longer than the message")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Malformed("a varint has no end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def block_of(value: int | memoryview) -> memoryview:
    """A field that must be text, bytes or a message. Raises Malformed."""
    if isinstance(value, int):
        raise Malformed("a block of bytes is needed where a varint is")
    return value


def text_of(value: int | memoryview) -> str:
    """A text. Raises Malformed."""
    try:
        return bytes(block_of(value)).decode()
    except UnicodeDecodeError as error:
        raise Malformed("a text is not UTF-8") from error


def double_of(value: int | memoryview) -> float:
    """A double. Raises Malformed."""
    data = block_of(value)
    if len(data) != 8:
        raise Malformed("a double has 8 bytes")
    return float(struct.unpack("<d", data)[0])


def int_of(value: int | memoryview, bits: int = 64) -> int:
    """A signed integer. Raises Malformed."""
    if not isinstance(value, int):
        raise Malformed("a varint is needed where a block of bytes is")
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def ints_of(value: int | memoryview) -> list[int]:
    """Of a repeated integer one entry, or all of them packed. Raises Malformed."""
    if isinstance(value, int):
        return [int_of(value)]
    found, at = [], 0
    while at < len(value):
        one, at = _varint(value, at)
        found.append(int_of(one))
    return found


def put_int(number: int, value: int) -> bytes:
    """A varint field."""
    return _packed(number << 3 | _VARINT) + _packed(value)


def put_block(number: int, data: bytes) -> bytes:
    """A field of bytes, or of a message that was written already."""
    return _packed(number << 3 | _BLOCK) + _packed(len(data)) + data


def put_text(number: int, text: str) -> bytes:
    """A text field."""
    return put_block(number, text.encode())


def put_double(number: int, value: float) -> bytes:
    """A double field."""
    return _packed(number << 3 | _DOUBLE) + struct.pack("<d", value)


def put_ints(number: int, values: Iterable[int]) -> bytes:
    """A repeated integer, packed."""
    return put_block(number, b"".join(map(_packed, values)))


def _packed(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
