"""Reads small safetensors files into numpy arrays. Every number in a header is checked before it is used.

The format (huggingface/safetensors, README "Format"): 8 bytes with the length of a JSON header, little-endian; the
header; the bytes of the tensors. Large files are read only by the exporter, with the safetensors package.
"""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.errors import BundleError
from ditc.runtime.session import Array

MAX_HEADER_BYTES = 2**20
DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "BOOL": np.bool_,
    "U8": np.uint8,
}


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the tensors, by name, and the metadata. bf16 tensors become uint16 arrays of their bits.

    Raises:
        BundleError: the file is missing or truncated, or its header does not match its content.
    """
    try:
        return parse_safetensors(path.read_bytes())
    except (OSError, ValueError) as e:
        raise BundleError(f"{path} is not a safetensors file: {e}", hint="rebuild the bundle") from e


def parse_safetensors(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors, which share the memory of the bytes, and the metadata of a file's content.

    Raises:
        ValueError: the content is truncated, or its header does not match it.
    """
    try:
        header, body = _split(data)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not all text")
        tensors = {name: _tensor(entry, body) for name, entry in header.items()}
        _check_covered(header, len(body))
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise ValueError(str(e)) from e
    return tensors, metadata


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"the header has {length} bytes, but the file has {len(data)}")
    return json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]


def _tensor(entry: dict[str, Any], body: memoryview) -> Array:
    dtype = np.dtype(DTYPES[entry["dtype"]])
    shape = [operator.index(size) for size in entry["shape"]]
    begin, end = map(operator.index, entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= len(body):
        raise ValueError(
            f"a tensor of shape {shape} is at bytes {begin} to {end}, but the data has {len(body)}"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a {dtype} tensor of shape {shape} has {end - begin} bytes")
    return np.frombuffer(body[begin:end], dtype).reshape(shape)


def _check_covered(header: dict[str, Any], size: int) -> None:
    """Refuse bytes that belong to no tensor or to two, as the safetensors package does: nobody would see them."""
    place = 0
    for begin, end in sorted(entry["data_offsets"] for entry in header.values()):
        if begin != place:
            raise ValueError(
                f"a tensor begins at byte {begin} of the data, but the one before it ends at {place}"
            )
        place = end
    if place != size:
        raise ValueError(f"the tensors end at byte {place} of the data, which has {size}")
