"""Frozen dataclasses to JSON and back. Unknown, missing and wrongly typed fields are refused with their path.

A file that carries a digest of its own has it in the field "digest": the hash of all other fields, with this one empty.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, Union

T = TypeVar("T")

# Larger integers are not exact as floats, and none of ours comes near.
MAX_INTEGER = 2**53


# The metadata of a field that is not written while it is None. So files that do not need the field stay as they were,
# byte for byte, and versions of ditc that do not know it can read them.
LEFT_OUT_IF_NONE = {"left_out_if_none": True}


class Mismatch(ValueError):
    """The data does not have the form of the class. The message starts with the path of the field, such as $.name."""


def to_json(value: Any) -> Any:
    """Convert a dataclass to plain dicts, lists, strings and numbers. Fields keep their order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {
            f.name: to_json(item)
            for f, item in items
            if item is not None or not f.metadata.get("left_out_if_none", False)
        }
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, str) else value  # members of string enums become plain strings


def from_json(kind: type[T], data: Any, path: str = "$") -> T:
    """Make an instance of the dataclass `kind` from parsed JSON.

    Raises:
        Mismatch: a field is unknown, missing or of another type.
    """
    return typing.cast(T, _decode(kind, data, path))


def serialize(data: object) -> bytes:
    """The bytes of a JSON file as ditc writes it. One with a digest must have exactly these."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def digest_of(data: object) -> str:
    """The hash of parsed JSON, whatever its spaces and the order of its fields."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def serialize_with_digest(data: dict[str, Any]) -> bytes:
    """The bytes of a file that carries the digest of its own content, which reveals damage and careless edits."""
    return serialize({**data, "digest": digest_of({**data, "digest": ""})})


def digest_fits(data: Any, content: bytes) -> bool:
    """Whether the data are those that `serialize_with_digest` wrote, and the bytes too."""
    digest = digest_of({**data, "digest": ""})
    return bool(data.get("digest") == digest and serialize(data) == content)


def read_bounded(path: Path, most_bytes: int) -> tuple[Any, bytes]:
    """The JSON in a file, and its bytes.

    Raises:
        ValueError: the file is larger, or is no JSON.
        OSError: it cannot be read.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB")
    content = path.read_bytes()
    return json.loads(content), content


def check_numbers(data: Any, path: str = "$") -> None:
    """Refuse NaN, infinity, which JSON in Python may hold, and integers beyond 2**53, anywhere in parsed JSON.

    Raises:
        Mismatch: the message names the field.
    """
    if isinstance(data, dict):
        for key, item in data.items():
            check_numbers(item, f"{path}.{key}")
    elif isinstance(data, list):
        for i, item in enumerate(data):
            check_numbers(item, f"{path}[{i}]")
    elif isinstance(data, float) and not math.isfinite(data):
        raise Mismatch(f"{path}: {data} is not a finite number")
    elif isinstance(data, int) and abs(data) > MAX_INTEGER:
        raise Mismatch(f"{path}: an integer of {data.bit_length()} bits is too large")


def _decode(kind: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _decode_union(kind, data, path)
    if origin is tuple:
        return _decode_tuple(kind, data, path)
    if origin is dict:
        if not isinstance(data, dict):
            raise Mismatch(f"{path}: expected an object, got {data!r:.60}")
        value_kind = typing.get_args(kind)[1]
        return {key: _decode(value_kind, item, f"{path}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, path)
    return _decode_scalar(kind, data, path)


def _decode_union(kind: Any, data: Any, path: str) -> Any:
    problems = []
    for option in typing.get_args(kind):
        try:
            return _decode(option, data, path)
        except Mismatch as problem:
            problems.append(problem)
    raise problems[0]


def _decode_tuple(kind: Any, data: Any, path: str) -> tuple[Any, ...]:
    arguments = typing.get_args(kind)
    if not isinstance(data, list):
        raise Mismatch(f"{path}: expected a list, got {data!r:.60}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if len(data) != len(arguments):
        raise Mismatch(f"{path}: expected {len(arguments)} items, got {len(data)}")
    return tuple(
        _decode(k, item, f"{path}[{i}]") for i, (k, item) in enumerate(zip(arguments, data, strict=True))
    )


def _decode_dataclass(kind: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise Mismatch(f"{path}: expected an object, got {data!r:.60}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(data.keys() - fields.keys()):
        raise Mismatch(f"{path}: unknown field {unknown[0]!r}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - data.keys()):
        raise Mismatch(f"{path}: field {missing[0]!r} is missing")
    try:
        return kind(**{name: _decode(hints[name], item, f"{path}.{name}") for name, item in data.items()})
    except Mismatch:
        raise
    except (TypeError, ValueError) as e:
        raise Mismatch(f"{path}: {e}") from e


def _decode_scalar(kind: Any, data: Any, path: str) -> Any:
    if kind is type(None) or kind is None:
        if data is not None:
            raise Mismatch(f"{path}: expected null, got {data!r:.60}")
        return None
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError as e:
            raise Mismatch(f"{path}: an integer of {data.bit_length()} bits is too large") from e
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(data)
        except ValueError as e:
            raise Mismatch(f"{path}: {data!r:.60} is not one of {[m.value for m in kind]}") from e
    if isinstance(data, str) and isinstance(kind, type) and issubclass(kind, str) and kind is not str:
        try:
            return kind(data)  # a subclass of str that checks its value, such as Backend
        except ValueError as e:
            raise Mismatch(f"{path}: {e}") from e
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise Mismatch(f"{path}: expected {kind.__name__}, got {data!r:.60}")
    return data
