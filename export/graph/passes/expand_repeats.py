"""Replace the Repeat nodes of trace_repeats.py by copies of the block that was traced, each with its own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from ditc.export.graph.passes.scopes import NAME_SCOPES, scopes_of
from ditc.runtime.errors import BuildError

DOMAIN = "ditc.blocks"
ENTER, LEAVE, REPEAT = "Enter", "Leave", "Repeat"
# Attributes of the nodes: the block's module path, and for a Repeat the path of the block that was traced.
BLOCK, TEMPLATE = "block", "template"


@dataclass(frozen=True, slots=True)
class _Template:
    """A block that was traced, between its Enter and its Leave node.

    Attributes:
        path: the block's module path.
        nodes: the nodes that depend on the block's inputs or weights, in the graph's order.
    """

    path: str
    enter: ir.Node
    leave: ir.Node
    nodes: tuple[ir.Node, ...]


def expand_repeats(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Replace Repeat nodes by copies of the traced blocks, and remove Enter and Leave nodes, in place.

    Args:
        weights: all weights of the network, by name. The trace lacks those of blocks that only left a Repeat node.

    Raises:
        BuildError: a block to copy holds a node with a subgraph.
    """
    marks: dict[str, dict[str, ir.Node]] = {ENTER: {}, LEAVE: {}, REPEAT: {}}
    for node in model.graph:
        if node.domain == DOMAIN:
            marks[node.op_type][node.attributes[BLOCK].as_string()] = node
    templates = {
        path: _template(model.graph, path, enter, marks[LEAVE][path]) for path, enter in marks[ENTER].items()
    }
    for path, node in marks[REPEAT].items():
        _expand(model.graph, node, path, templates[node.attributes[TEMPLATE].as_string()], weights)
    for node in (*marks[ENTER].values(), *marks[LEAVE].values()):
        _replace(model.graph, node, node.inputs)
    model.opset_imports.pop(DOMAIN, None)


def _template(graph: ir.Graph, path: str, enter: ir.Node, leave: ir.Node) -> _Template:
    """Collect the nodes of a block. Constants and sizes that come from outside are not copied but shared."""
    ancestors, open_ends = set[ir.Node](), list(leave.inputs)
    while open_ends:
        value = open_ends.pop()
        node = None if value is None else value.producer()
        if node is not None and node is not enter and node not in ancestors:
            ancestors.add(node)
            open_ends += node.inputs
    own = set(enter.outputs) | {value for name, value in graph.initializers.items() if _is_in(name, path)}
    nodes = []
    for node in graph:
        if node in ancestors and not own.isdisjoint(node.inputs):
            own.update(node.outputs)
            nodes.append(node)
    return _Template(path, enter, leave, tuple(nodes))


def _expand(
    graph: ir.Graph, repeat: ir.Node, path: str, template: _Template, weights: Mapping[str, Tensor]
) -> None:
    """Insert the copy in place of the Repeat node."""
    values: dict[ir.Value, ir.Value | None] = dict(zip(template.enter.outputs, repeat.inputs, strict=True))

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in values:
            return None if value is None else values[value]
        if value.is_initializer() and _is_in(value.name or "", template.path):
            return _initializer(graph, _renamed(value.name or "", template.path, path), weights)
        return value

    copies = []
    for node in template.nodes:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise BuildError(
                f"{template.path} holds a {node.op_type} with a subgraph, which cannot be copied to {path}",
                hint="write the block without control flow",
            )
        copies.append(_copy(node, [copied(value) for value in node.inputs], path, template.path))
        values.update(zip(node.outputs, copies[-1].outputs, strict=True))
    graph.insert_before(repeat, copies)
    _replace(graph, repeat, [copied(value) for value in template.leave.inputs])


def _copy(node: ir.Node, inputs: list[ir.Value | None], path: str, template: str) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        tuple(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{path}.{node.name}",
        metadata_props=dict(node.metadata_props),
    )
    scopes = scopes_of(node)
    if scopes is not None:
        copy.metadata_props[NAME_SCOPES] = str([_renamed(scope, template, path) for scope in scopes])
    for new, old in zip(copy.outputs, node.outputs, strict=True):
        new.name, new.type, new.shape = f"{path}.{old.name}", old.type, old.shape
    return copy


def _initializer(graph: ir.Graph, name: str, weights: Mapping[str, Tensor]) -> ir.Value:
    if name not in graph.initializers:
        tensor = TorchTensor(weights[name].detach(), name)
        graph.register_initializer(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
    """Let the readers of the node's outputs read `values` instead, and remove the node."""
    for old, new in zip(node.outputs, values, strict=True):
        assert new is not None, f"{node.name}: no value replaces {old.name}"
        if old.is_graph_output():
            new.name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if _is_in(name, old) else name
