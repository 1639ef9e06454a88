"""Function bodies are inlined before an engine is built, so that the tensors of each call have distinct names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx.inliner
import pytest

from ditc.export.engine.graph_files import inlined

GRAPH = """
<ir_version: 10, opset_import: ["": 20, "ditc": 1]>
agraph (float[2, 2] x) => (float[2, 2] y) {
    a = ditc.Twice (x)
    y = ditc.Twice (a)
}
<domain: "ditc", opset_import: ["": 20]>
Twice (x) => (y) { r = Relu (x)  y = Add (r, r) }
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "twice.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    return path


def test_calls_are_replaced_by_bodies_whose_nodes_and_tensors_are_distinct(graph: Path) -> None:
    with inlined(graph) as path:
        assert path.parent == graph.parent, "external data lies beside the graph"
        model = onnx.load(path)
        onnx.checker.check_model(model)
    assert not path.exists() and not model.functions
    assert [node.op_type for node in model.graph.node] == ["Relu", "Add", "Relu", "Add"]
    for names in ([n.name for n in model.graph.node], [o for n in model.graph.node for o in n.output]):
        assert max(Counter(names).values()) == 1 and all(names)


def test_the_parser_has_no_complaint_about_names(graph: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from ditc.export.engine.tensorrt import Compiler
    from ditc.runtime.spec import Backend

    compiler = Compiler(Backend.TENSORRT_RTX)
    with inlined(graph) as path:
        assert compiler.parse(path) is None
    assert not [text for text in compiler.warnings() if "already exists" in text]


def test_a_graph_without_functions_is_not_copied(graph: Path) -> None:
    model = onnx.inliner.inline_local_functions(onnx.load(graph))
    onnx.save(model, graph)
    with inlined(graph) as path:
        assert path == graph
    assert graph.exists()
