"""An ONNX file and the external data files that hold its weights."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ditc.runtime.errors import BuildError


def graph_size_bytes(onnx_path: Path) -> int:
    """Size of an ONNX file together with its external data files.

    Raises:
        BuildError: not ONNX, or external data that is missing, too short, or outside the file's folder.
    """
    ends = _external_ends(onnx_path)
    for name, end in ends.items():
        if Path(name).name != name:
            raise BuildError(f"{onnx_path} keeps weights in {name!r}, outside its folder")
        path = onnx_path.parent / name
        size_bytes = path.stat().st_size if path.is_file() else 0
        if size_bytes < end:
            raise BuildError(
                f"{onnx_path} needs {end} bytes of weights in {path}, which has {size_bytes}",
                hint="external data must lie beside the .onnx file; export the stage again",
            )
    return onnx_path.stat().st_size + sum((onnx_path.parent / name).stat().st_size for name in ends)


def _external_ends(onnx_path: Path) -> dict[str, int]:
    """Name of each external data file -> the byte behind the last that the graph reads."""
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
