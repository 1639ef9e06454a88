"""What an ONNX graph says about its nodes: the PyTorch module of each, and the sizes that its tensors have.

Read from the file's protobuf message without the package `onnx`. The exporter writes the module path of every node
(`pkg.torch.onnx.name_scopes`) and the shape of every tensor, in which dynamic dimensions are expressions over the named
dimensions of the stage, such as "2*height".
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ditc.runtime.bundle.onnx_references import MAX_BYTES
from ditc.runtime.bundle.protobuf import Span, fields
from ditc.runtime.errors import BundleError

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
# The module that torch.export writes for an operation which it adds outside of all modules, a size for example (2.13).
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
# Numbers of fields in onnx.proto.
MODEL_GRAPH, MODEL_FUNCTION = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE = 1, 5, 11, 12, 13
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE, NODE_DOMAIN, NODE_METADATA = 1, 2, 3, 4, 5, 7, 9
ATTRIBUTE_NAME, ATTRIBUTE_INTEGER = 1, 3
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE, DIM_NAME = 1, 2, 1, 2, 1, 1, 2
TENSOR_DIMS, TENSOR_NAME = 1, 8
ENTRY_KEY, ENTRY_VALUE = 1, 2
FUNCTION_NAME, FUNCTION_NODE = 1, 7

Dim = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of a graph.

    Attributes:
        scopes: the paths of its modules, from the root to the innermost; () if the graph does not say.
        integers: its attributes that are one integer.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scopes: tuple[str, ...] = ()
    integers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The nodes of a graph in order, the shapes of its tensors, and the op types in the bodies of its functions."""

    nodes: tuple[Node, ...]
    shapes: dict[str, tuple[Dim, ...]]
    functions: dict[str, tuple[str, ...]]


def read_graph(model: Path) -> Graph:
    """Read an .onnx file.

    Raises:
        BundleError: it is not an ONNX graph.
    """
    if model.stat().st_size > MAX_BYTES:
        raise BundleError(f"{model} is too large for an ONNX graph", hint="do not use this bundle")
    try:
        return _Reader(model.read_bytes()).graph()
    except (ValueError, SyntaxError) as e:  # UnicodeDecodeError too
        raise BundleError(f"{model} is not an ONNX graph: {e}", hint="do not use this bundle") from e


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def graph(self) -> Graph:
        nodes: list[Node] = []
        shapes: dict[str, tuple[Dim, ...]] = {}
        functions: dict[str, tuple[str, ...]] = {}
        for number, span in self._spans((0, len(self._data))):
            if number == MODEL_FUNCTION:
                name = self._text(span, FUNCTION_NAME)
                bodies = [s for n, s in self._spans(span) if n == FUNCTION_NODE]
                functions[name] = tuple(self._text(body, NODE_OP) for body in bodies)
            if number != MODEL_GRAPH:
                continue
            for kind, inner in self._spans(span):
                if kind == GRAPH_NODE:
                    nodes.append(self._node(inner))
                elif kind == GRAPH_INITIALIZER:
                    shapes[self._text(inner, TENSOR_NAME)] = tuple(self._integers(inner, TENSOR_DIMS))
                elif kind in (GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE):
                    shapes.setdefault(self._text(inner, VALUE_NAME), tuple(self._shape(inner)))
        return Graph(nodes=tuple(nodes), shapes=shapes, functions=functions)

    def _node(self, span: Span) -> Node:
        texts: dict[int, list[str]] = {}
        integers: dict[str, int] = {}
        scopes: tuple[str, ...] = ()
        for number, inner in self._spans(span):
            if number == NODE_ATTRIBUTE:
                values = list(self._integers(inner, ATTRIBUTE_INTEGER))
                if values:
                    integers[self._text(inner, ATTRIBUTE_NAME)] = values[0]
            elif number == NODE_METADATA:
                if self._text(inner, ENTRY_KEY) == NAME_SCOPES:
                    scopes = _modules(self._text(inner, ENTRY_VALUE))
            elif number in (NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP):
                texts.setdefault(number, []).append(self._decoded(inner))
        return Node(
            name=texts.get(NODE_NAME, [""])[0],
            op=texts.get(NODE_OP, [""])[0],
            inputs=tuple(texts.get(NODE_INPUT, ())),
            outputs=tuple(texts.get(NODE_OUTPUT, ())),
            scopes=scopes,
            integers=integers,
        )

    def _shape(self, span: Span) -> Iterator[Dim]:
        for wanted in (VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE):
            inner = next((s for n, s in self._spans(span) if n == wanted), None)
            if inner is None:
                return
            span = inner
        for number, dim in self._spans(span):
            if number == SHAPE_DIM:
                yield next(self._integers(dim, DIM_VALUE), self._text(dim, DIM_NAME))

    def _spans(self, span: Span) -> Iterator[tuple[int, Span]]:
        for number, value in fields(self._data, *span):
            if not isinstance(value, int):
                yield number, value

    def _integers(self, span: Span, wanted: int) -> Iterator[int]:
        for number, value in fields(self._data, *span):
            if number == wanted and isinstance(value, int):
                yield value

    def _text(self, span: Span, wanted: int) -> str:
        return next((self._decoded(s) for n, s in self._spans(span) if n == wanted), "")

    def _decoded(self, span: Span) -> str:
        return self._data[span[0] : span[1]].decode()


def _modules(text: str) -> tuple[str, ...]:
    """The module paths from the root on; () outside of all. The last entry of the exporter's list is the operation."""
    paths = ast.literal_eval(text)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError("the modules of a node are not a list of names")
    return () if paths[:1] == [NO_MODULE] else tuple(paths[:-1])
