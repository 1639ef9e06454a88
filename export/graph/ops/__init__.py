"""Custom ops, one folder each: a reference, a PyTorch op, an ONNX function or nodes.

An export takes two calls: torch.onnx.export(..., custom_translation_table=onnx_translations()) puts one node per op
into the graph, then add_functions(program.model) gives each op its body. The order matters, because optimising a model
(by torch's exporter or ditc's passes) and changing its opset inline every function that the model holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from ditc.export.options import OPSETS


def onnx_translations(opset: int = OPSETS[0]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The custom_translation_table for torch.onnx.export: PyTorch op -> a function that adds its ONNX nodes."""
    import torch

    from ditc.export.graph.ops.attention import onnx_nodes
    from ditc.export.graph.ops.attention import torch_op as attention_op  # noqa: F401  registers the op
    from ditc.export.graph.ops.relu_linear_attention import onnx_function, torch_op  # noqa: F401  registers the op
    from ditc.export.graph.ops.rotary_linear_attention import onnx_function as rotary
    from ditc.export.graph.ops.rotary_linear_attention import torch_op as rotary_op  # noqa: F401  registers the op
    from ditc.export.graph.ops.sinkhorn import onnx_function as sinkhorn
    from ditc.export.graph.ops.sinkhorn import torch_op as sinkhorn_op  # noqa: F401  registers the op

    has_standard = opset >= onnx_nodes.STANDARD_FROM
    return {
        torch.ops.ditc.relu_linear_attention.default: onnx_function.translate,
        torch.ops.ditc.rotary_linear_attention.default: rotary.translate,
        torch.ops.ditc.attention.default: onnx_nodes.translate_standard
        if has_standard
        else onnx_nodes.translate_plain,
        torch.ops.ditc.sinkhorn.default: sinkhorn.translate,
    }


def add_functions(model: ir.Model) -> None:
    """Add the function of every ditc op that the model calls, in place."""
    from ditc.export.graph.ops.relu_linear_attention import onnx_function as linear_attention
    from ditc.export.graph.ops.rotary_linear_attention import onnx_function as rotary
    from ditc.export.graph.ops.sinkhorn import onnx_function as sinkhorn

    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for module in (linear_attention, rotary, sinkhorn):
        function = ir.serde.deserialize_function(module.function_proto())
        if function.identifier() in used:
            function.opset_imports[""] = model.opset_imports[""]
            model.functions[function.identifier()] = function
            model.opset_imports[function.domain] = 1
