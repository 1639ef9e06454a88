"""A 16-bit graph's arithmetic in fp32 operations: what 16 bits cost, shown by a backend that has no 16-bit kernels.

ONNX Runtime's CPU provider computes fp16 graphs in fp32 and has no bf16 arithmetic (1.31), so that running a 16-bit
graph there shows neither rounding nor overflow. `round_to` takes the deployment graph itself, not the fp32 one: its
Casts say where the fp32 islands begin and end, its weights are already rounded, and its guards (the fp16 clamp) are
in it. Every tensor that is 16-bit there becomes an fp32 tensor that holds 16-bit values: each operation computes in
fp32 and its result is rounded by a pair of Casts, as a GPU's kernels accumulate in fp32 and store 16 bits. Beyond
fp16's range that gives Inf, as there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from ditc.export.graph.passes.typed_copy import typed_copy
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import DType, StageSpec, TensorSpec

# Results that are values of an input, or exact in its type: nothing to round.
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
    """A new model with the 16-bit graph's rounding and fp32 operations; its 16-bit inputs and outputs are fp32 too.

    Raises:
        BuildError: the graph has no tensor of that type, or has some inside control flow.
    """
    low = SIXTEEN_BITS[dtype]
    rounded = typed_copy(model)
    graph = rounded.graph
    if any(value.dtype in (low, None) for value in _inner_values(graph)):
        raise BuildError(
            f"round_to does not go into the branches of If and Loop, which hold {dtype.value} here"
        )
    values = _values_of(graph, low)
    if not values:
        raise BuildError(
            f"the graph has no {dtype.value} tensor to round", hint="export the stage in that precision"
        )
    for value in values:
        value.type = ir.TensorType(
            ir.DataType.FLOAT
        )  # a new one: the original's value shares its type object
    for value in values & set(graph.initializers.values()):
        value.const_value = _widened(value)
    for value in values & set(graph.inputs):
        _round(graph, value, low, at_start=True)
    for node in list(graph):
        _rewrite(graph, node, values, low)
    return rounded


def rounded_spec(spec: StageSpec) -> StageSpec:
    """The spec of the rounded graph: 16-bit inputs and outputs travel as fp32."""

    def widen(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, dtype=DType.FLOAT32) if tensor.dtype in SIXTEEN_BITS else tensor

    return replace(spec, inputs=tuple(map(widen, spec.inputs)), outputs=tuple(map(widen, spec.outputs)))


def _rewrite(graph: ir.Graph, node: ir.Node, values: set[ir.Value], low: ir.DataType) -> None:
    """One node of the 16-bit graph in fp32, its 16-bit results rounded."""
    results = [value for value in node.outputs if value in values]
    if node.op_type == "Cast" and not node.domain and results:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    if node.op_type == "ConstantOfShape" and results:
        raise BuildError(f"round_to cannot widen {node.op_type} {node.name}")
    if node.op_type not in EXACT:
        for value in results:
            _round(graph, value, low)


def _round(graph: ir.Graph, value: ir.Value, low: ir.DataType, *, at_start: bool = False) -> None:
    """Let everything that reads the value read Cast(Cast(value, low), FLOAT) instead."""
    down = ir.node("Cast", [value], {"to": low}, name=f"{value.name}_to_{low.name.lower()}")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{value.name}_rounded")
    for cast, dtype in ((down, low), (up, ir.DataType.FLOAT)):
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


def _values_of(graph: ir.Graph, low: ir.DataType) -> set[ir.Value]:
    values = {
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs),
    }
    return {value for value in values if value.dtype == low}


def _inner_values(graph: ir.Graph) -> set[ir.Value]:
    """What nodes inside If and Loop make: in fp32 islands, such as Sinkhorn's, there is nothing to round."""
    outer = {value for node in graph for value in node.outputs}
    return {value for node in graph.all_nodes() for value in node.outputs} - outer


def _widened(value: ir.Value) -> ir.TensorProtocol:
    """The initializer in fp32, made when it is written."""
    tensor = value.const_value
    assert tensor is not None

    def widen(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(
        partial(widen, tensor), dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )
