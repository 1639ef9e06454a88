"""Graph level, for OpenVINO: the types in which it executes a stage, read back from its executed graph.

OpenVINO may compute in bf16 what the graph has in fp32: its default on many CPUs. ditc's session forbids it. This check
shows that it does not happen, node for node, whatever the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from ditc.runtime.bench.profile import ExecutedNode, graph_names
from ditc.runtime.bench.profilers.openvino import executed_nodes
from ditc.runtime.sessions.openvino import OpenvinoSession

NARROW = ("bf16", "f16")


def narrowed_nodes(session: OpenvinoSession, model: ir.Model) -> list[str]:
    """The executed nodes that OpenVINO computes in 16 bits, though all that they are made of is fp32 in the graph.

    Args:
        session: has run, so that the stage is compiled.
        model: the ONNX graph that the stage was made from.
    """
    return narrowed(executed_nodes(session), model)


def narrowed(executed: Iterable[ExecutedNode], model: ir.Model) -> list[str]:
    """The same for nodes that have been read. Nodes that are not in the graph say nothing, and are left out."""
    wide = {name: _is_wide(node) for node in model.graph for name in _names(node)}
    found = []
    for node in executed:
        origins = [wide[name] for name in graph_names(node) if name in wide]
        if node.type in NARROW and origins and all(origins):
            found.append(f"{node.name} ({node.kind}) in {node.type}")
    return found


def _names(node: ir.Node) -> list[str]:
    return [name for name in (node.name, *(value.name for value in node.outputs)) if name]


def _is_wide(node: ir.Node) -> bool:
    """Whether a node of the graph reads and writes fp32 alone, as far as it computes with fractions."""
    types = {
        value.dtype
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.dtype is not None
    }
    return types & _FRACTIONS == {ir.DataType.FLOAT}


_FRACTIONS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
