"""Check the fp32 islands of a 16-bit graph: the regions that must never be computed in 16 bits.

A rule is data: the operations that make an island, and how far it reaches towards the graph's inputs. The rules know
operations and the step around the network, not model families. Casts are the borders of islands and are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ditc.export.graph.passes.scopes import module_path, scopes_of
from ditc.export.graph.passes.typed_copy import FUNCTION, typed_copy
from ditc.runtime import step_contract
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import StageSpec

# export/graph/step.py holds the network under this name. All other nodes belong to the step around it.
NETWORK = "network"
BORDERS = frozenset({"Cast", "Shape"})  # an island begins or ends at a Cast, and a Shape reads no values
SHOWN = 3
# Operations that take 16-bit tensors and compute their island inside, and the attribute that says so.
INNER_TYPE = {"Attention": "softmax_precision", "RMSNormalization": "stash_type"}


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandRule:
    """Every floating-point tensor at the nodes of this island must be fp32.

    Attributes:
        roots: operations at the core of the island.
        function: if given, only roots that come from the body of this ditc function count.
        reach: operations that belong to the island if their result goes to a root, possibly through Casts and other
            operations of the reach.
        border: operations of the reach at which the island ends, seen from the root.
    """

    name: str
    roots: frozenset[str]
    function: str | None = None
    reach: frozenset[str] = frozenset()
    border: frozenset[str] = frozenset()


RULES = (
    IslandRule(
        name="linear attention",
        roots=frozenset({"ReduceSum", "MatMul", "Add", "Div"}),
        function="ReluLinearAttention",
    ),
    IslandRule(
        name="linear attention",
        roots=frozenset({"Slice", "Mul", "Sub", "Concat", "ReduceSum", "MatMul", "Add", "Div"}),
        function="RotaryLinearAttention",
    ),
    IslandRule(
        name="softmax", roots=frozenset({"Softmax", "Attention"}), reach=frozenset({"Add", "Sub", "Where"})
    ),
    IslandRule(
        name="norm",
        roots=frozenset(
            {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization"}
        ),
    ),
    # x / sqrt(mean(x^2) + eps), or with rsqrt as Sqrt and Reciprocal. The island reaches back to the square.
    IslandRule(
        name="norm statistics",
        roots=frozenset({"Sqrt"}),
        reach=frozenset({"Add", "ReduceMean", "ReduceSum", "Div", "Pow", "Mul"}),
        border=frozenset({"Pow", "Mul"}),
    ),
    IslandRule(name="sinusoid", roots=frozenset({"Sin", "Cos"}), reach=frozenset({"Mul", "Div"})),
)


def check_islands(model: ir.Model, spec: StageSpec) -> None:
    """Check that every tensor of every island is fp32 in the finished graph.

    Raises:
        BuildError: a tensor is not. The message names the island, node, module, tensor and type.
    """
    graph = typed_copy(model).graph
    found = [
        f"{island}: {node.op_type} {node.name} ({module_path(node) or 'outside the network'}) has {value.name} in "
        f"{value.dtype.name.lower() if value.dtype is not None else 'an unknown type'}"
        for island, node in _island_nodes(graph, spec)
        for value in _narrowed(node)
    ]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise BuildError(
            f"{spec.name}: fp32 islands hold narrower tensors: {'; '.join(found[:SHOWN])}{more}",
            hint="cast to fp32 before the island and back after it, in the PyTorch network",
        )


def _island_nodes(graph: ir.Graph, spec: StageSpec) -> Iterator[tuple[str, ir.Node]]:
    is_step = any(tensor.name == step_contract.GUIDANCE_WEIGHTS for tensor in spec.inputs)
    for node in graph:
        if is_step and node.op_type not in BORDERS and NETWORK not in (scopes_of(node) or [NETWORK]):
            yield "step (guidance, solver, statistics)", node
        for rule in RULES:
            in_function = rule.function is None or node.metadata_props.get(FUNCTION) == rule.function
            if node.op_type in rule.roots and in_function:
                yield rule.name, node
                yield from ((rule.name, member) for member in _reached(node, rule))


def _reached(root: ir.Node, rule: IslandRule) -> Iterator[ir.Node]:
    """The nodes of the rule's reach whose results go to the root."""
    pending, seen = [root], {root}
    while pending:
        for value in pending.pop().inputs:
            producer = value.producer() if value is not None else None
            while producer is not None and producer.op_type == "Cast":
                source = producer.inputs[0]
                producer = source.producer() if source is not None else None
            if producer is None or producer in seen or producer.op_type not in rule.reach:
                continue
            seen.add(producer)
            yield producer
            if producer.op_type not in rule.border:
                pending.append(producer)


def _narrowed(node: ir.Node) -> list[ir.Value]:
    """The node's tensors of a floating-point type narrower than fp32, or of unknown type."""
    inner = node.attributes.get(INNER_TYPE.get(node.op_type, ""))
    if inner is not None and inner.as_int() == ir.DataType.FLOAT:
        return []
    values = dict.fromkeys(value for value in (*node.inputs, *node.outputs) if value is not None)
    return [value for value in values if value.dtype is None or _is_narrow(value.dtype)]


def _is_narrow(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point() and dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
