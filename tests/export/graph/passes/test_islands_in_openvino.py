"""OpenVINO computes a bf16 graph as it is written: its fp32 islands in fp32, and the rest in bf16 where the CPU can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from conftest import need_openvino

from ditc.export.engine.ir import write_ir
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.parity.levels.executed import narrowed, narrowed_nodes
from ditc.runtime.bench.profile import ExecutedNode
from ditc.runtime.bench.profilers.openvino import executed_nodes
from ditc.runtime.cpu_features import BF16, cpu_features
from ditc.runtime.sessions import openvino as openvino_session
from ditc.runtime.sessions.openvino import OpenvinoSession, executed_types
from ditc.runtime.spec import Precision


@pytest.mark.parametrize("bf16_is_faster", [False, True])
def test_the_islands_of_a_bf16_step_are_executed_in_fp32(
    exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_is_faster: bool
) -> None:
    need_openvino()
    monkeypatch.setattr(openvino_session, "multiplies_bf16_faster", lambda: bf16_is_faster)
    stage, model = exported(Precision.BF16)
    ir.save(model, tmp_path / "step.onnx")
    report = write_ir(tmp_path / "step.onnx", tmp_path / "step.xml", spec=stage.spec)
    session = OpenvinoSession(report.model, stage.spec, threads=1)
    session.run(example_feeds(stage.spec, example_sizes(stage.spec)))
    assert narrowed_nodes(session, model) == []  # parity's check
    types = executed_types(session)
    # Softmax, norms (MVN, RMS), sines and cosines (Math), statistics (Reduce), and the products of linear attention.
    # Where attention is in fp32 as a whole, its softmax may be part of a larger kernel (Subgraph).
    has_bf16 = bool(BF16.intersection(cpu_features()))
    assert types["Softmax"] or not (bf16_is_faster and has_bf16)
    for kind in ("MVN", "RMS", "Math", "Reduce"):
        assert types[kind] and set(types[kind]) == {"f32"}, (kind, types[kind])
    assert set(types["Softmax"]) <= {"f32"}
    assert types["MatMul"].count("f32") >= 2
    linear = set(types["FullyConnected"]) | set(types["Convolution"])
    assert linear == ({"bf16"} if has_bf16 else {"f32"})


def test_an_island_that_is_executed_in_16_bits_is_found(exported, tmp_path: Path) -> None:
    """As OpenVINO does by default on CPUs with bf16: the same nodes, said to be in bf16."""
    need_openvino()
    stage, model = exported(Precision.BF16)
    ir.save(model, tmp_path / "step.onnx")
    report = write_ir(tmp_path / "step.onnx", tmp_path / "step.xml", spec=stage.spec)
    session = OpenvinoSession(report.model, stage.spec, threads=1)
    session.run(example_feeds(stage.spec, example_sizes(stage.spec)))
    lowered = [replace(node, type="bf16") for node in executed_nodes(session)]
    found = narrowed(lowered, model)
    assert any("(Math) in bf16" in each for each in found)  # sines of the timestep
    kept: list[ExecutedNode] = [replace(node, type="f32") for node in lowered]
    assert narrowed(kept, model) == []
