"""An ONNX file and the external data files that hold its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from ditc.runtime.atomic import scratch_file
from ditc.runtime.errors import BuildError


def graph_size_bytes(onnx_path: Path) -> int:
    """The size of an ONNX file together with its external data files.

    Raises:
        BuildError: the file is not ONNX, or its external data is missing, too short, or outside the file's folder.
    """
    ends = _external_ends(onnx_path)
    for name, end in ends.items():
        if Path(name).name != name:
            raise BuildError(
                f"{onnx_path} keeps weights in {name!r}, outside its folder", hint="export the stage again"
            )
        path = onnx_path.parent / name
        size_bytes = path.stat().st_size if path.is_file() else 0
        if size_bytes < end:
            raise BuildError(
                f"{onnx_path} needs {end} bytes of weights in {path}, which has {size_bytes}",
                hint="put the external data beside the .onnx file, or export the stage again",
            )
    return onnx_path.stat().st_size + sum((onnx_path.parent / name).stat().st_size for name in ends)


@contextmanager
def inlined(onnx_path: Path, change: Callable[[onnx.ModelProto], int] | None = None) -> Iterator[Path]:
    """A temporary copy of the graph in which every function call is replaced by the function's body.

    The copy lies beside the graph, so that it finds the external data. TensorRT-RTX 1.7.1 inlines functions by itself,
    but gives the nodes of all calls the same names: it warns, and their tensors cannot be told apart. A graph without
    functions is used without a copy.

    Args:
        change: changes the inlined graph in place, and returns how many things it changed.
    """
    model = onnx.load(onnx_path, load_external_data=False)
    calls = bool(model.functions)
    if calls:
        model = onnx.inliner.inline_local_functions(model)
    changes = 0 if change is None else change(model)
    if not calls and not changes:
        yield onnx_path
        return
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    with scratch_file(onnx_path, model.SerializeToString()) as copy:
        yield copy


def _external_ends(onnx_path: Path) -> dict[str, int]:
    """The name of each external data file, and the end of the last byte range that the graph reads from it."""
    try:
        model = onnx.load(onnx_path, load_external_data=False)
    except DecodeError as error:
        raise BuildError(
            f"{onnx_path} is not an ONNX file: {error}", hint="export the stage again"
        ) from error
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            end = int(facts.get("offset", 0)) + int(facts.get("length", 0))
            ends[facts["location"]] = max(ends.get(facts["location"], 0), end)
    return ends
