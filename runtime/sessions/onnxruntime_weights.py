"""Other values for some initializers of a graph that ONNX Runtime opens.

ONNX Runtime 1.32 has two functions for this. `add_initializer` gives values to kernels alone: a node that the optimizer
computes in advance, such as a transposition of the weight, still uses the file's. `add_external_initializers` puts the
values into the graph before it is optimized, but only for tensors whose values are in another file; small ones, which
are inside the graph, are replaced in its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.bundle.onnx_initializers import read_initializers
from ditc.runtime.session import Array

# onnx.proto, TensorProto.DataType, of numbers that are given as their bits: bf16, and FP8 (E4M3FN).
ONNX_TYPES = {np.dtype(np.uint16): 16, np.dtype(np.uint8): 17}


def replace_weights(options: Any, model: Path, weights: Mapping[str, Array]) -> str | bytes:
    """Add the values to the options of a session, and return what the session is opened from.

    Args:
        options: an ort.SessionOptions.
        weights: values of the initializers' shapes and types; numbers of bf16 and FP8 as the bits of them, in uint16
            and uint8 arrays.
    """
    import onnxruntime as ort

    def value(array: Array) -> Any:
        if array.dtype in ONNX_TYPES:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[array.dtype])
        return ort.OrtValue.ortvalue_from_numpy(array)

    initializers = read_initializers(model)
    inside = {name: array for name, array in weights.items() if initializers[name].inside}
    outside = {name: array for name, array in weights.items() if name not in inside}
    if outside:
        options.add_external_initializers(list(outside), [value(array) for array in outside.values()])
    if not inside:
        return str(model)
    content = bytearray(model.read_bytes())
    for name, array in inside.items():
        place = initializers[name]
        content[place.offset : place.offset + place.size_bytes] = array.tobytes()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(model.parent)
    )
    return bytes(content)
