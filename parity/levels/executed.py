"""Graph level, for OpenVINO: the types in which it executes a stage, read back from its executed graph.

OpenVINO may compute in bf16 what the graph has in fp32: its default on many CPUs. ditc's session forbids it. This check
shows that it does not happen, node for node, whatever the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.parity.candidate import graph_of
from ditc.parity.context import Context
from ditc.parity.results import Result, judged, not_checked
from ditc.runtime.bench.profile import ExecutedNode, graph_names
from ditc.runtime.bench.profilers.openvino import executed_nodes
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.sessions.openvino import OpenvinoSession
from ditc.runtime.spec import Precision
from ditc.runtime.tolerances import Level, Metric, limit

NARROW = ("bf16", "f16")
SMALL = 4  # multiples of each dimension's step: types do not depend on the size
SHOWN = 3  # wrong nodes that are named in a result
WHAT = "executed types"


def check(context: Context) -> Iterator[Result]:
    """Run every stage that OpenVINO runs on small inputs, and compare what it executed with the stage's ONNX graph."""
    candidate = context.candidate
    for stage, artifact in candidate.artifacts.items():
        opened = candidate.native.get(stage, candidate.sessions[stage])
        session = opened.base if isinstance(opened, WithLoras) else opened
        if not isinstance(session, OpenvinoSession):
            continue
        context.tick(f"graph, {stage}")
        graph = graph_of(candidate.manifest, stage, artifact)
        if graph is None or candidate.bundle is None:
            why = f"the bundle has no graph of {stage} in {artifact.precision.value}"
            yield not_checked(Level.GRAPH, stage, WHAT, why, metric=Metric.COUNT)
            continue
        opened.run(example_feeds(session.spec, example_sizes(session.spec, max_multiple=SMALL)))
        wrong = narrowed_nodes(session, ir.load(candidate.bundle / graph.file.path))
        yield judged(
            Level.GRAPH,
            stage,
            WHAT,
            Metric.COUNT,
            float(len(wrong)),
            limit(Level.GRAPH, Metric.COUNT, Precision.FP32),
            detail="; ".join(wrong[:SHOWN]),
            causes=("OpenVINO narrowed a part of the graph to 16 bits",) if wrong else (),
            against="the types in the graph",
        )


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
