"""Defects in the bundle's own graphs, patched in memory. The graph, op and stage levels find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from planted import SETTINGS, context_of, failures

from ditc.parity.candidate import Candidate, open_candidate
from ditc.parity.levels import LEVELS
from ditc.parity.results import Verdict
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER
from ditc.runtime.tolerances import Level

TO_Q = "network.transformer_blocks.1.attn1.to_q.weight"


@pytest.fixture
def patched(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Candidate]:
    """The bundle with one stage's graph changed."""

    def patch(change: Callable[[ir.Model], object], stage: str = DENOISER, *, run: bool = True) -> Candidate:
        candidate = open_candidate(tiny_bundle, LoadOptions(threads=1))
        model = candidate.graph(stage)
        assert model is not None
        ir.external_data.load_to_model(model)
        change(model)
        candidate.graphs[stage] = model
        if run:
            path = tmp_path / f"{stage}.onnx"
            ir.save(model, path)
            spec = candidate.sessions[stage].spec
            candidate.sessions[stage] = OnnxRuntimeSession(path, spec, provider=CPU, threads=1)
        return candidate

    return patch


def test_the_bundle_without_a_defect_passes_every_level(tiny_bundle, tiny_checkpoint) -> None:
    context = context_of(tiny_checkpoint, open_candidate(tiny_bundle, LoadOptions(threads=1)))
    for level in Level:
        results = list(LEVELS[level](context))
        assert not [r for r in results if r.verdict is Verdict.FAIL]
        assert any(r.verdict is Verdict.PASS for r in results), level


def test_linear_attention_without_eps_is_caught_by_a_query_of_zeros(patched, tiny_checkpoint) -> None:
    """1e-15 is 0 in fp16, so a cast of the eps to fp16 loses it."""

    def lose_eps(model: ir.Model) -> None:
        for node in model.graph.all_nodes():
            if node.op_type == "ReluLinearAttention":
                node.attributes["eps"] = ir.AttrFloat32("eps", float(np.float16(1e-15)))

    found = failures(context_of(tiny_checkpoint, patched(lose_eps, run=False)), Level.OP)
    assert [r.what for r in found] == ["an all-zero query"]
    assert found[0].culprit.module == "network.transformer_blocks.0.attn1"
    assert "eps of the denominator is 0" in found[0].causes[0]


def test_linear_attention_with_a_wrong_denominator_is_caught(patched, tiny_checkpoint) -> None:
    def average_keys(model: ir.Model) -> None:
        (function,) = (f for f in model.functions.values() if f.name == "ReluLinearAttention")
        next(node for node in function if node.op_type == "ReduceSum").op_type = "ReduceMean"

    context = context_of(tiny_checkpoint, patched(average_keys))
    found = failures(context, Level.OP)
    assert {r.stage for r in found} == {DENOISER}
    assert "sum of the keys" in found[0].causes[0]
    in_stage = failures(context, Level.STAGE)
    assert in_stage[0].culprit.module == "network.transformer_blocks.0.attn1"


def test_a_16_bit_softmax_in_an_fp32_island_is_caught_by_its_type(patched, tiny_checkpoint) -> None:
    def narrow(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type == "Softmax")
        down = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT16}, name="down")
        up = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT}, name="up")
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        ir.convenience.replace_all_uses_with(node.outputs[0], up.outputs[0])
        up.replace_input_with(0, node.outputs[0])
        node.replace_input_with(0, down.outputs[0])
        model.graph.insert_before(node, down)
        model.graph.insert_after(node, up)

    (found,) = failures(context_of(tiny_checkpoint, patched(narrow, run=False)), Level.GRAPH)
    assert (found.stage, found.what) == (DENOISER, "fp32 islands")
    assert "softmax" in found.detail
    assert "attn2" in found.detail


@pytest.mark.parametrize(
    ("change", "words"),
    [(np.transpose, "is transposed"), (np.zeros_like, "is all zeros"), (lambda a: a + 1e-3, "differs in")],
    ids=["transposed", "zeroed", "nudged"],
)
def test_a_weight_that_is_not_the_checkpoints_is_named(change, words, patched, tiny_checkpoint) -> None:
    def spoil(model: ir.Model) -> None:
        value = model.graph.initializers[TO_Q]
        array = np.array(value.const_value.numpy())
        value.const_value = ir.tensor(np.ascontiguousarray(change(array)), name=TO_Q)

    context = context_of(tiny_checkpoint, patched(spoil))
    (found,) = failures(context, Level.GRAPH)
    assert found.detail == f"{TO_Q} {words}" or found.detail.startswith(f"{TO_Q} {words}")
    assert found.culprit.module == TO_Q.removesuffix(".weight")
    (real, *_) = [r for r in failures(context, Level.STAGE) if r.stage == DENOISER]
    assert real.culprit.module == TO_Q.removesuffix(".weight")


def test_a_convolution_whose_padding_was_lost_fails_its_stage_and_not_the_run(
    patched, tiny_checkpoint
) -> None:
    def unpad(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type == "Conv" and n.attributes.get_int("group", 1) > 1)
        node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])

    found = failures(context_of(tiny_checkpoint, patched(unpad)), Level.STAGE)
    assert {r.stage for r in found} == {DENOISER}


def test_a_stale_artifact_of_another_checkpoint_is_caught(tiny_bundle, other_checkpoint) -> None:
    context = context_of(other_checkpoint, open_candidate(tiny_bundle, LoadOptions(threads=1)))
    found = failures(context, Level.GRAPH)
    assert {r.stage for r in found} >= {CONDITIONER, DENOISER, VAE_DECODER}
    assert all("stale artifact" in r.causes[0] for r in found if r.what.endswith("weights"))
    assert {r.stage for r in failures(context, Level.STAGE)} >= {CONDITIONER, DENOISER, VAE_DECODER}


def test_scheduler_numbers_that_differ_from_diffusers_are_caught(tiny_bundle, tiny_checkpoint) -> None:
    candidate = open_candidate(tiny_bundle, LoadOptions(threads=1))
    manifest = candidate.pipeline.manifest
    shifted = replace(manifest.scheduler, shift=1.5)
    candidate.pipeline.manifest = replace(manifest, scheduler=shifted)
    context = context_of(tiny_checkpoint, candidate, SETTINGS, with_upstream=True)
    (found,) = (r for r in failures(context, Level.GRAPH) if r.stage == "scheduler")
    assert found.against == "diffusers DPMSolverMultistepScheduler"
    assert "flow shift is 0.5 times" in found.causes[0]
