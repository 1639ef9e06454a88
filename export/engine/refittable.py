"""Which weights of an engine a LoRA can change when the bundle is loaded: what the builder keeps replaceable."""

from __future__ import annotations

from pathlib import Path

import onnx

from ditc.runtime.weight_map import is_lossless, read_weight_map, weight_map_path

PRODUCTS = ("MatMul", "Gemm", "Conv")


def refittable_weights(onnx_path: Path) -> tuple[str, ...]:
    """The initializers that hold a matrix or kernel of the checkpoint, by which a node multiplies.

    Args:
        onnx_path: a graph with its weight map beside it; its values are not read.

    Raises:
        BundleError: the weight map is missing or damaged.
    """
    model = onnx.load(str(onnx_path), load_external_data=False)
    factors = {node.input[1] for node in model.graph.node if node.op_type in PRODUCTS}
    weights = read_weight_map(weight_map_path(onnx_path))
    return tuple(w.initializer for w in weights if w.initializer in factors and is_lossless(w))
