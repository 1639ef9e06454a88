"""How many floating-point operations the matrix products and convolutions of a graph take at given sizes."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping, Sequence

from ditc.runtime.bench.graph import Dim, Graph, Node
from ditc.runtime.plugins.linear_attention import NAMES
from ditc.runtime.weight_map import LORA_DOWN, LORA_UP

# Products of two matrices, by the place of their first factor among the node's inputs.
PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"})
# Convolutions, by the place of their weight among the node's inputs.
CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
LINEAR_ATTENTION = frozenset(NAMES)
SAME_SHAPE = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Unknown(ValueError):
    """The graph does not say enough to count."""


def count_flops(graph: Graph, inputs: Mapping[str, Sequence[int]]) -> int:
    """The operations of one run, each multiplication and each addition as one. Element-wise nodes do not count.

    Args:
        inputs: the shapes of the graph's inputs, by name.

    Raises:
        Unknown: a shape is not in the graph, or a function of the graph holds products that this version cannot count.
    """
    shapes = _Shapes(graph, inputs)
    return sum(_of_node(node, graph, shapes) for node in graph.nodes)


def _of_node(node: Node, graph: Graph, shapes: _Shapes) -> int:
    if node.op in PRODUCTS:
        if node.inputs[-1].endswith((LORA_DOWN, LORA_UP)):
            return 0  # a LoRA's, which has rank 0 where none is given
        inner = shapes[node.inputs[0]][0 if node.integers.get("transA") else -1]
        return 2 * math.prod(shapes[node.outputs[0]]) * inner
    if node.op in CONVOLUTIONS:
        weight = shapes[node.inputs[CONVOLUTIONS[node.op]]]
        over = node.inputs[0] if node.op == "ConvTranspose" else node.outputs[0]
        return 2 * math.prod(shapes[over]) * math.prod(weight[1:])
    if node.op in LINEAR_ATTENTION:
        rows, tokens, heads, width = shapes[node.inputs[0]]
        return (
            4 * rows * tokens * heads * width * (width + 1)
        )  # keys by values and a row of ones, then by queries
    counted = PRODUCTS | CONVOLUTIONS.keys()
    if any(op in counted or op in graph.functions for op in graph.functions.get(node.op, ())):
        raise Unknown(f"{node.op} is a function with products that this version of ditc cannot count")
    return 0


class _Shapes:
    """The shapes of a graph's tensors in numbers."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Sequence[int]]) -> None:
        self._graph = graph
        self._source = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op in SAME_SHAPE}
        self._sizes: dict[str, int] = {}
        for name, shape in inputs.items():
            for dim, size in zip(graph.shapes.get(name, ()), shape, strict=False):
                self._solve((dim,), size)
        for node in graph.nodes:
            if node.op == "Reshape":  # keeps the number of elements
                self._solve_reshape(node)

    def __getitem__(self, tensor: str) -> tuple[int, ...]:
        while tensor not in self._graph.shapes and tensor in self._source:
            tensor = self._source[tensor]
        try:
            return tuple(_size(dim, self._sizes) for dim in self._graph.shapes[tensor])
        except KeyError as e:
            raise Unknown(f"the graph does not say the shape of {tensor}") from e

    def _solve_reshape(self, node: Node) -> None:
        before, after = (self._graph.shapes.get(tensor) for tensor in (node.inputs[0], node.outputs[0]))
        if before is not None and after is not None and not self._unknown(before):
            self._solve(after, _count(before, self._sizes))

    def _solve(self, shape: Sequence[Dim], count: int) -> None:
        """Find the size of a dimension that the exporter named, from the number of elements of a shape that has it."""
        unknown = self._unknown(shape)
        if len(unknown) == 1 and "" not in unknown:
            (name,) = unknown
            unit = _count(shape, {**self._sizes, name: 1})
            if unit:
                self._sizes[name] = count // unit

    def _unknown(self, shape: Sequence[Dim]) -> set[str]:
        return {name for dim in shape for name in _names(dim) if name not in self._sizes}


def _count(shape: Sequence[Dim], sizes: Mapping[str, int]) -> int:
    return math.prod(_size(dim, sizes) for dim in shape)


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The value of an expression such as "2*height". Raises KeyError for a name without a size."""
    if isinstance(dim, int):
        return dim
    return _value(_parsed(dim), sizes) if dim else sizes[dim]


def _names(dim: Dim) -> set[str]:
    """The names in an expression. A dimension without any name is one of its own, which stays unknown."""
    if isinstance(dim, int) or not dim:
        return set() if isinstance(dim, int) else {dim}
    return {node.id for node in ast.walk(_parsed(dim)) if isinstance(node, ast.Name)}


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, ValueError, MemoryError) as e:
        raise Unknown(f"a dimension is {text!r:.40}") from e


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        try:
            result: int = _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
        except ZeroDivisionError as e:
            raise Unknown("a dimension divides by 0") from e
        return result
    raise Unknown(f"a dimension is {ast.unparse(node)!r:.40}")
