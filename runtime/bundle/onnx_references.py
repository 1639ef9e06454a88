"""The files that an ONNX graph refers to, read from the bytes of its protobuf message without the package `onnx`.

A tensor may keep its values in another file ("external data" in onnx.proto). Tensors are in initializers, also sparse
ones and those of training, in attributes of nodes, in the subgraphs of control flow, and in functions. A tensor counts
if it has an entry of external data at all, whatever else it says. Bytes that libraries may read in two ways are refused
instead of guessed at: what this reader skips, a library must skip too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ditc.runtime.bundle.protobuf import fields
from ditc.runtime.bundle.references import Reference
from ditc.runtime.errors import BundleError

# The messages of onnx.proto that lead to tensors: the number of a field -> the message that it holds.
MESSAGES = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
NODE_OP_TYPE, TENSOR_NAME, TENSOR_EXTERNAL_DATA, ENTRY_KEY, ENTRY_VALUE = 4, 8, 13, 1, 2
# A node with this type holds what an execution provider compiled, or the name of a file with it (ONNX Runtime, "EP
# context design"). The provider opens that file, so no other check would see it.
COMPILED = b"EPContext"
# Protobuf's own limit (C++ runtime): a message of less than 2 GiB.
MAX_BYTES = 2**31 - 1


def onnx_references(model: Path) -> list[Reference]:
    """Every reference of an .onnx file, in no particular order.

    Raises:
        BundleError: the file is not an ONNX graph, or one of its references cannot be read.
    """
    size_bytes = model.stat().st_size
    if size_bytes > MAX_BYTES:
        raise _not_onnx(model, f"it has {size_bytes} bytes, and a graph can have {MAX_BYTES}")
    data = model.read_bytes()
    found: list[Reference] = []
    open_messages = [("Model", 0, len(data))]
    try:
        while open_messages:
            kind, start, end = open_messages.pop()
            if kind == "Tensor":
                found.extend(_of_tensor(data, start, end))
                continue
            inner = MESSAGES[kind]
            for number, first, last in _fields(data, start, end):
                if number in inner:
                    open_messages.append((inner[number], first, last))
                elif kind == "Node" and number == NODE_OP_TYPE and data[first:last] == COMPILED:
                    raise ValueError("it holds what another program compiled (EPContext)")
    except ValueError as e:  # UnicodeDecodeError too
        raise _not_onnx(model, str(e)) from e
    return found


def _not_onnx(model: Path, why: str) -> BundleError:
    return BundleError(f"{model} is not a graph that ditc opens: {why}", hint="do not use this bundle")


def external_entries(data: bytes, start: int, end: int) -> tuple[str, dict[str, str]]:
    """The name of a tensor, and its entries of external data; there are none if it holds its values itself.

    Raises:
        ValueError: the bytes are no tensor.
    """
    entries: dict[str, str] = {}
    name = ""
    for number, first, last in _fields(data, start, end):
        if number == TENSOR_NAME:
            name = data[first:last].decode(errors="replace")
        elif number == TENSOR_EXTERNAL_DATA:
            entry = {n: data[a:b].decode() for n, a, b in _fields(data, first, last)}
            key = entry.get(ENTRY_KEY, "")
            if key in entries:
                raise ValueError(f"the tensor {name!r} gives {key!r} twice")
            entries[key] = entry.get(ENTRY_VALUE, "")
    return name, entries


def _of_tensor(data: bytes, start: int, end: int) -> Iterator[Reference]:
    name, entries = external_entries(data, start, end)
    if entries:
        yield Reference(
            owner=f"the tensor {name!r}",
            location=entries.get("location", ""),
            offset=_number(entries, "offset") or 0,
            length=_number(entries, "length"),
        )


def _number(entries: dict[str, str], key: str) -> int | None:
    text = entries.get(key)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{key} {text[:40]!r} is not a number of bytes")
    return None if text is None else int(text)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that hold bytes: the number, and where the bytes begin and end. Others are skipped."""
    for number, value in fields(data, start, end):
        if not isinstance(value, int):
            yield number, *value
