"""The fields of a protobuf message, read from its bytes: enough for ONNX graphs, without the package `onnx`."""

from __future__ import annotations

from collections.abc import Iterator

# Protobuf's own limit: tags fit into 32 bits.
MAX_TAG = 2**32 - 1
VARINT, BITS_64, BYTES, BITS_32 = 0, 1, 2, 5

# Where the bytes of a field begin and end.
Span = tuple[int, int]


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int | Span]]:
    """The fields of a message: the number, and its value if that is an integer, else where its bytes are.

    Numbers of 32 and 64 bits are skipped.

    Raises:
        ValueError: the bytes are no message.
    """
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if tag > MAX_TAG or number == 0:
            raise ValueError(f"it has a field with the tag {tag}")
        if wire == VARINT:
            value, at = _varint(data, at, end)
            yield number, value
        elif wire == BYTES:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise ValueError(f"a field of {length} bytes goes beyond its message")
            yield number, (at, at + length)
            at += length
        elif wire in (BITS_64, BITS_32):
            at += 8 if wire == BITS_64 else 4
        else:  # groups, which onnx.proto does not have
            raise ValueError(f"it has a field of the wire type {wire}")
    if at != end:
        raise ValueError("a field goes beyond its message")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins at a place, and the place after it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number goes beyond its message")
