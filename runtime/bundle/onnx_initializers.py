"""The initializers of an ONNX graph: where each one's values are, read without the package `onnx`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.bundle.onnx_references import MAX_BYTES, external_entries
from ditc.runtime.bundle.protobuf import Span, fields
from ditc.runtime.errors import BundleError
from ditc.runtime.session import Array

# Numbers of fields in onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA = 1, 2, 8, 9, 13
# onnx.proto, TensorProto.DataType. Numbers of bf16 and FP8 (E4M3FN) are read as their bits (number_formats.py).
DTYPES: dict[int, Any] = {1: np.float32, 3: np.int8, 10: np.float16, 16: np.uint16, 17: np.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """Where the values of one initializer are.

    Attributes:
        file: the file with the values: the graph itself, or one beside it.
        offset, size_bytes: where in the file.
        dtype: NumPy's element type; None for a type that is not in DTYPES.
        inside: whether the values are in the graph's own file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    file: Path
    offset: int
    size_bytes: int
    inside: bool

    def read(self) -> Array:
        """The values, mapped from the file.

        Raises:
            BundleError: the file is too short, or the type is not in DTYPES.
        """
        if self.dtype is None or math.prod(self.shape) * np.dtype(self.dtype).itemsize != self.size_bytes:
            raise BundleError(
                f"{self.file}: {self.name} of shape {self.shape} has {self.size_bytes} bytes, "
                "or a type that ditc does not read",
                hint="build the bundle again",
            )
        try:
            mapped: Array = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as e:
            raise BundleError(
                f"{self.file} does not hold {self.name}: {e}", hint="build the bundle again"
            ) from e
        return mapped


def read_initializers(model: Path) -> dict[str, Initializer]:
    """The initializers of the graph, by name. Their values are not read.

    Raises:
        BundleError: the file is not an ONNX graph.
    """
    try:
        if model.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        data = model.read_bytes()
        found = {}
        for number, graph in fields(data, 0, len(data)):
            if number == MODEL_GRAPH and not isinstance(graph, int):
                for inner, tensor in fields(data, *graph):
                    if inner == GRAPH_INITIALIZER and not isinstance(tensor, int):
                        initializer = _initializer(model, data, tensor)
                        found[initializer.name] = initializer
    except (OSError, ValueError) as e:
        raise BundleError(
            f"{model} is not a graph that ditc opens: {e}", hint="do not use this bundle"
        ) from e
    return found


def _initializer(model: Path, data: bytes, tensor: Span) -> Initializer:
    shape: list[int] = []
    name, kind, raw = "", 0, (0, 0)
    for number, value in fields(data, *tensor):
        if number == DIMS:
            shape += [value] if isinstance(value, int) else _packed(data, value)
        elif isinstance(value, int):
            kind = value if number == DATA_TYPE else kind
        elif number == NAME:
            name = data[slice(*value)].decode()
        elif number == RAW_DATA:
            raw = value
    entries = external_entries(data, *tensor)[1]
    file, offset, size = model, raw[0], raw[1] - raw[0]
    if entries:
        file = model.parent / entries.get("location", "")
        offset = int(entries.get("offset", "0"))
        size = int(entries.get("length", "0"))
    return Initializer(
        name=name,
        shape=tuple(shape),
        dtype=DTYPES.get(kind),
        file=file,
        offset=offset,
        size_bytes=size,
        inside=not entries,
    )


def _packed(data: bytes, span: Span) -> list[int]:
    """The integers of a packed field: each is written as a varint, which `fields` reads behind a made-up tag."""
    start, end = span
    numbers = []
    while start < end:
        stop = next(at for at in range(start, end) if data[at] < 0x80) + 1
        numbers += [
            v for _, v in fields(b"\x08" + data[start:stop], 0, stop - start + 1) if isinstance(v, int)
        ]
        start = stop
    return numbers
