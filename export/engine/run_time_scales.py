"""Leave the quantization of activations to OpenVINO: take the scale of every token out of a graph.

ONNX has no product that quantizes its input when it runs, so `passes/qdq.py` writes the nodes of one. OpenVINO has such
a product: if it is told to, it quantizes what products with weights in 8 bits read (`runtime/sessions/openvino.py`).
That takes fewer passes over the tensor (docs/calibration.md).

    x -> Div scale -> QuantizeLinear -> DequantizeLinear -> MatMul -> Mul scale      becomes      x -> MatMul
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx


def leave_tokens_to_library(model: onnx.ModelProto) -> int:
    """Remove the scales of tokens from the graph in place, and return of how many products.

    Nodes whose results nothing reads then remain.
    """
    nodes = model.graph.node
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    removed = []
    for gemm in nodes:
        if gemm.op_type not in ("MatMul", "Gemm"):
            continue
        quotient = _quotient(gemm, makers)
        times = readers.get(gemm.output[0], [])
        if quotient is None or [node.op_type for node in times] != ["Mul"]:
            continue
        (product,) = times
        x, scale = quotient.input
        if scale not in product.input:
            continue
        gemm.input[0], gemm.output[0] = x, product.output[0]
        removed.append(product)
    for product in removed:
        nodes.remove(product)
    return len(removed)


def _quotient(gemm: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The Div behind the Q/DQ pair that the GEMM reads; None if there is none."""
    node: onnx.NodeProto | None = gemm
    for op_type in ("DequantizeLinear", "QuantizeLinear", "Div"):
        node = None if node is None else makers.get(node.input[0])
        if node is None or node.op_type != op_type:
            return None
    return node
