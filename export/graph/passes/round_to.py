"""Write a 16-bit graph's rounding into fp32 operations, to see 16-bit errors on a backend without 16-bit kernels.

ONNX Runtime's CPU provider computes fp16 graphs in fp32 and has no bf16 arithmetic (1.31). A 16-bit graph therefore
shows neither rounding nor overflow there. `round_to` takes the 16-bit graph that is deployed, not the fp32 one: its
Casts say where the fp32 islands begin and end, its weights are already rounded, and its guards (the fp16 clamp) are
in it. Every 16-bit tensor becomes an fp32 tensor that holds 16-bit values. Each operation computes in fp32, and a
pair of Casts rounds its result, as a GPU's kernels accumulate in fp32 and store 16 bits. A value beyond fp16's range
becomes Inf, as on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from ditc.export.graph.passes.typed_copy import typed_copy
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import DType, StageSpec, TensorSpec

# Operations whose results are values of an input, or exact in the input's type. They need no rounding.
# fmt: off
EXACT = frozenset((
    "Abs", "Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape",
    "Sign", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    "Where",
))
# fmt: on
SIXTEEN_BITS = {DType.FLOAT16: ir.DataType.FLOAT16, DType.BFLOAT16: ir.DataType.BFLOAT16}


def round_to(model: ir.Model, dtype: DType) -> ir.Model:
    """A new model with fp32 operations that rounds as the 16-bit graph does.

    Inputs and outputs that are 16-bit in the graph are fp32 in the new model.

    Args:
        dtype: the graph's 16-bit type.

    Raises:
        BuildError: the graph has no tensor of that type, or has one inside If or Loop.
    """
    narrow = SIXTEEN_BITS[dtype]
    rounded = typed_copy(model)
    graph = rounded.graph
    if any(value.dtype in (narrow, None) for value in _inner_values(graph)):
        raise BuildError(
            f"round_to cannot round inside the branches of If and Loop, which hold {dtype.value} tensors here",
            hint="compute the loop in fp32, in the PyTorch network",
        )
    values = _values_of(graph, narrow)
    if not values:
        raise BuildError(
            f"the graph has no {dtype.value} tensor to round", hint="export the stage in that precision"
        )
    for value in values:
        # The type object is replaced, not changed, because the original graph's value shares it.
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in values & set(graph.initializers.values()):
        value.const_value = _widened(value)
    for value in values & set(graph.inputs):
        _round(graph, value, narrow, at_start=True)
    for node in list(graph):
        _rewrite(graph, node, values, narrow)
    return rounded


def rounded_spec(spec: StageSpec) -> StageSpec:
    """The spec of the rounded graph, whose 16-bit inputs and outputs are fp32."""

    def widen(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, dtype=DType.FLOAT32) if tensor.dtype in SIXTEEN_BITS else tensor

    return replace(spec, inputs=tuple(map(widen, spec.inputs)), outputs=tuple(map(widen, spec.outputs)))


def _rewrite(graph: ir.Graph, node: ir.Node, values: set[ir.Value], narrow: ir.DataType) -> None:
    """Make one node compute in fp32, and round its 16-bit results."""
    results = [value for value in node.outputs if value in values]
    if node.op_type == "Cast" and not node.domain and results:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    if node.op_type == "ConstantOfShape" and results:
        raise BuildError(
            f"round_to cannot widen {node.op_type} {node.name}",
            hint="build without simulated 16-bit rounding, or write the network without that op",
        )
    if node.op_type not in EXACT:
        for value in results:
            _round(graph, value, narrow)


def _round(graph: ir.Graph, value: ir.Value, narrow: ir.DataType, *, at_start: bool = False) -> None:
    """Let the readers of the value read Cast(Cast(value, narrow), FLOAT) instead."""
    down = ir.node("Cast", [value], {"to": narrow}, name=f"{value.name}_to_{narrow.name.lower()}")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{value.name}_rounded")
    for cast, dtype in ((down, narrow), (up, ir.DataType.FLOAT)):
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(dtype)
        cast.outputs[0].name = cast.name
    producer = value.producer()
    if producer is not None:
        up.metadata_props.update(producer.metadata_props)
        down.metadata_props.update(producer.metadata_props)
    readers = [use for use in value.uses() if use.node is not down]
    for reader in readers:
        reader.node.replace_input_with(reader.idx, up.outputs[0])
    if value.is_graph_output() and not at_start:
        index = list(graph.outputs).index(value)
        name, value.name = value.name, f"{value.name}_exact"
        up.outputs[0].name = name
        graph.outputs[index] = up.outputs[0]
    if at_start:
        first = next(iter(graph))
        graph.insert_before(first, [down, up])
    else:
        assert producer is not None
        graph.insert_after(producer, [down, up])


def _values_of(graph: ir.Graph, narrow: ir.DataType) -> set[ir.Value]:
    values = {
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs),
    }
    return {value for value in values if value.dtype == narrow}


def _inner_values(graph: ir.Graph) -> set[ir.Value]:
    """The results of nodes inside If and Loop. A loop that is an fp32 island, such as Sinkhorn's, needs no rounding."""
    outer = {value for node in graph for value in node.outputs}
    return {value for node in graph.all_nodes() for value in node.outputs} - outer


def _widened(value: ir.Value) -> ir.TensorProtocol:
    """The initializer in fp32, converted when the file is written."""
    tensor = value.const_value
    assert tensor is not None

    def widen(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(
        partial(widen, tensor), dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )
