"""Lets LoRAs be inputs of a graph: y = x @ W becomes y = x @ W + (x @ A) @ B, where A and B can be left out.

A and B are initializers that are inputs too. ONNX then takes the initializer's values if none are given (IR.md,
"Graphs", from IR version 4 on). They have rank 0, whose product is exactly zero, so a graph without LoRA computes what
it did. Optimizers may not fold such initializers, and W stays as it is.
"""

# I input channels, O output channels

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ditc.runtime.weight_map import LORA_DOWN as DOWN
from ditc.runtime.weight_map import LORA_UP as UP
from ditc.runtime.weight_map import LoraInputs


def add_lora_inputs(model: ir.Model, parameters: Collection[str]) -> None:
    """Add the inputs A (I, rank) and B (rank, O) for each of these initializers that only matrix products multiply by.

    Others, such as those of convolutions with a kernel, are left as they are. It is done in place.
    """
    for name in parameters:
        weight = model.graph.initializers[name]
        uses = list(weight.uses())
        is_matrix = weight.shape is not None and len(weight.shape) == 2
        if uses and is_matrix and all(use.idx == 1 and _is_product(use.node) for use in uses):
            _add(model.graph, weight, [use.node for use in uses])


def lora_inputs_of(weight: ir.Value, model: ir.Model) -> LoraInputs | None:
    """The inputs of a graph for the LoRA of an initializer; None if it has none."""
    inputs = {value.name for value in model.graph.inputs}
    names = LoraInputs(down=f"{weight.name}{DOWN}", up=f"{weight.name}{UP}")
    return names if {names.down, names.up} <= inputs else None


def _is_product(node: ir.Node) -> bool:
    """Whether a node is x @ W, or a Gemm that is x @ W or x @ W.T and a bias."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(name == "transB" or plain.get(name) == value.value for name, value in node.attributes.items())


def _add(graph: ir.Graph, weight: ir.Value, products: list[ir.Node]) -> None:
    assert weight.shape is not None and weight.dtype is not None
    swapped = {node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1 for node in products}
    if len(swapped) > 1:
        return
    inputs, outputs = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    if swapped == {True}:
        inputs, outputs = outputs, inputs
    rank = f"{weight.name}.lora_rank"
    down = _optional(graph, f"{weight.name}{DOWN}", (inputs, 0), (inputs, rank), weight.dtype)
    up = _optional(graph, f"{weight.name}{UP}", (0, outputs), (rank, outputs), weight.dtype)
    for place, node in enumerate(products):
        x, y = node.inputs[0], node.outputs[0]
        end = f"{place}" if place else ""
        low = ir.node("MatMul", [x, down], name=f"{weight.name}{DOWN}{end}")
        change = ir.node("MatMul", [low.outputs[0], up], name=f"{weight.name}{UP}{end}")
        total = ir.node("Add", [y, change.outputs[0]], name=f"{weight.name}.lora_sum{end}")
        for new in (low, change, total):
            new.metadata_props.update(node.metadata_props)
            new.outputs[0].type = y.type
        total.outputs[0].shape = change.outputs[0].shape = y.shape
        y.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        total.replace_input_with(0, y)
        graph.insert_after(node, [low, change, total])


def _optional(
    graph: ir.Graph, name: str, shape: tuple[int, int], given: tuple[int | str, int | str], dtype: ir.DataType
) -> ir.Value:
    """An input with a default of rank 0."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(given),
        type=ir.TensorType(dtype),
        const_value=ir.tensor(np.zeros(shape, dtype.numpy()), dtype=dtype, name=name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
