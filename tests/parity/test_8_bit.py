"""8-bit parity: a graph follows the recorded plan, and a single bad scale is found and its layer named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from planted import SETTINGS
from quant_helpers import ranges_of

from ditc.export.families.sana.recipe import RECIPES
from ditc.export.graph.onnx import to_onnx
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan, make_plan
from ditc.export.quant.recipes import Recipe, recipes_of
from ditc.export.quant.record import read_record, write_record
from ditc.parity.candidate import Candidate
from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Verdict
from ditc.parity.trace import Place, places_of, reciprocals_of
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import CONTROLNET, DENOISER, DType, Precision
from ditc.runtime.tolerances import Level

LAYER = "transformer_blocks.1.ff.conv_inverted"


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> TorchModel:
    return TorchModel(tiny_checkpoint)


@pytest.fixture(scope="module")
def quantize(
    reference: TorchModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Recipe], tuple[Path, QuantPlan]]:
    """A function that quantizes the denoiser by a recipe, and returns the graph and its plan."""
    folder, stage = tmp_path_factory.mktemp("8-bit"), reference.load(DENOISER)
    ranges, layers = ranges_of(stage), quantizable_layers(stage)
    to_onnx(stage, folder / "fp32.onnx", check=False)

    def build(recipe: Recipe) -> tuple[Path, QuantPlan]:
        plan, model = make_plan(recipe, ranges, layers), ir.load(folder / "fp32.onnx")
        ir.external_data.load_to_model(model)
        quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
        ir.save(model, folder / f"{recipe.name}.onnx")
        return folder / f"{recipe.name}.onnx", plan

    return build


@pytest.fixture(scope="module")
def int8(quantize) -> tuple[Path, QuantPlan]:
    return quantize(RECIPES["sana-int8"])


def context_of(
    reference: TorchModel,
    graph: Path,
    plan: QuantPlan | None,
    precision=Precision.INT8,
    budget=None,
    stage=DENOISER,
) -> Context:
    """A parity run whose candidate has one stage in 8 bits, the denoiser. All other stages are PyTorch's."""
    spec = reference.plan.stages[stage].spec
    session = OnnxRuntimeSession(graph, spec, precision=precision, provider=CPU, threads=1)
    candidate = Candidate(
        pipeline=reference.pipeline.with_sessions({stage: session}),
        graphs={stage: graph},
        precisions={stage: precision},
        plans={} if plan is None else {stage: dict(plan.layers)},
        budgets={stage: budget},
    )
    return Context(reference_or_none=reference, candidate=candidate, settings=SETTINGS, with_upstream=False)


def results(context: Context, level: Level) -> list:
    return [r for r in LEVELS[level](context) if r.stage == DENOISER]


def test_a_correct_graph_passes_every_level_without_a_given_budget(reference, int8) -> None:
    context = context_of(reference, *int8)
    for level in (Level.MODULE, Level.STAGE, Level.STEP, Level.TRAJECTORY):
        found = results(context, level)
        assert found and {r.verdict for r in found} <= {Verdict.PASS, Verdict.NOT_CHECKED}, level
        # Beside PyTorch with the same codes only fp32 rounding must show; beside fp32 the codes' own loss does.
        least = 0.0 if level is Level.MODULE else 1e-4
        assert any(r.verdict is Verdict.PASS and r.value > least for r in found), level
    assert not [r for r in LEVELS[Level.PICTURE](context) if r.verdict is Verdict.FAIL]


@pytest.mark.parametrize("sd3_control_checkpoint", ["image-only"], indirect=True)
def test_the_baseline_is_in_16_bits_where_the_bundle_is(sd3_control_checkpoint) -> None:
    """SD3's conditioner is fp32 in every bundle, so it does not tell what the denoiser is outside its 8-bit layers.

    A baseline whose denoiser read the ControlNet's bf16 as fp32 allowed an error of 1.4 in a step.
    """
    reference, stages = TorchModel(sd3_control_checkpoint), (DENOISER, CONTROLNET)
    candidate = Candidate(
        pipeline=reference.pipeline,
        precisions=dict.fromkeys(stages, Precision.INT8),
        plans={stage: {} for stage in stages},
        bases=dict.fromkeys(stages, Precision.BF16),
    )
    context = Context(
        reference_or_none=reference, candidate=candidate, settings=SETTINGS, with_upstream=False
    )
    baseline = context.precision_baseline()
    assert baseline is not None and baseline.plan.stages[DENOISER].precision is Precision.BF16
    made = {out.name: out.dtype for out in baseline.sessions[CONTROLNET].spec.outputs}
    read = {spec.name: spec.dtype for spec in baseline.sessions[DENOISER].spec.inputs if spec.name in made}
    assert made == read == dict.fromkeys(made, DType.BFLOAT16)


@pytest.mark.parametrize("sd3_control_checkpoint", ["image-only"], indirect=True)
def test_the_result_of_a_smoothed_adaptive_norm_is_compared_as_it_was(
    sd3_control_checkpoint, tmp_path
) -> None:
    """In SD3's blocks, the norm and its modulation are one module, whose result has been divided in the graph."""
    reference, norm = TorchModel(sd3_control_checkpoint), "network.transformer_blocks.0.norm1"
    stage = reference.load(CONTROLNET)
    layers, graph = quantizable_layers(stage), tmp_path / "int8.onnx"
    to_onnx(stage, tmp_path / "fp32.onnx", check=False)
    model = ir.load(tmp_path / "fp32.onnx")
    ir.external_data.load_to_model(model)
    plan = make_plan(recipes_of("sd3")["sd3-controlnet-int8"], ranges_of(stage), layers)
    quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
    ir.save(model, graph)
    leaving = places_of(model)[Place(norm, "out")]
    assert reciprocals_of(model).keys() & {value.name for value in leaving}
    context = context_of(reference, graph, plan, stage=CONTROLNET)
    (found,) = [r for r in LEVELS[Level.MODULE](context) if r.stage == CONTROLNET]
    assert found.verdict is Verdict.PASS, found


def test_an_fp8_graph_follows_its_plan_too(reference, quantize) -> None:
    context = context_of(reference, *quantize(RECIPES["sana-fp8"]), precision=Precision.FP8)
    found = [r for level in (Level.MODULE, Level.STEP) for r in results(context, level)]
    assert {r.verdict for r in found if r.against.startswith("PyTorch")} == {Verdict.PASS}


@pytest.mark.parametrize("factor", [12, 1 / 12])
@pytest.mark.parametrize("where", ["input", "channel"])
def test_one_bad_scale_is_found_and_its_layer_named(where, factor, reference, int8, tmp_path) -> None:
    graph, plan = int8
    context = context_of(reference, _with_bad_scale(graph, where, factor, tmp_path), plan)
    for level, name in ((Level.MODULE, f"network.{LAYER}"), (Level.GRAPH, LAYER)):
        (broken,) = [r for r in results(context, level) if r.verdict is Verdict.FAIL]
        assert broken.culprit.module == name


def test_a_weight_with_bad_scales_breaks_the_step_and_is_named(reference, int8, tmp_path) -> None:
    graph, plan = int8
    (broken,) = results(
        context_of(reference, _with_bad_scale(graph, "weight", 100, tmp_path), plan), Level.STEP
    )
    assert broken.verdict is Verdict.FAIL
    assert broken.culprit.module == f"network.{LAYER}"


def test_without_a_recorded_plan_nothing_is_checked_unless_a_budget_is_given(reference, int8) -> None:
    context = context_of(reference, int8[0], None)
    found = results(context, Level.STAGE)
    assert {r.verdict for r in found} == {Verdict.NOT_CHECKED}
    assert "--budget" in found[0].detail
    assert {r.verdict for r in results(replace(context, eight_bit_budget=0.5), Level.STAGE)} == {Verdict.PASS}
    assert {r.verdict for r in results(replace(context, eight_bit_budget=1e-4), Level.STEP)} == {Verdict.FAIL}


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        ("psnr=5", Verdict.PASS),
        ("psnr=200", Verdict.FAIL),
        ("rel_l2=0.9", Verdict.PASS),
        ("rel_l2=1e-6", Verdict.FAIL),
    ],
)
def test_a_searched_recipe_is_held_to_its_budget(budget, verdict, reference, int8) -> None:
    (found,) = [
        r for r in LEVELS[Level.PICTURE](context_of(reference, *int8, budget=budget)) if "budget" in r.what
    ]
    assert found.verdict is verdict
    assert found.bound == float(budget.partition("=")[2])


def test_the_record_gives_the_plan_back(reference, int8) -> None:
    graph, plan = int8
    record = read_record(write_record(graph, plan, reference.plan.stages[DENOISER].spec, "0" * 64, None))
    again = record.plans()
    assert again.keys() == plan.layers.keys()
    for name, planned in plan.layers.items():
        assert again[name].kind is planned.kind
        assert again[name].input.amax == planned.input.amax
        np.testing.assert_array_equal(again[name].input.smooth, planned.input.smooth)
    assert set(record.smoothed) == {n for n, p in plan.layers.items() if p.input.alpha}


def _with_bad_scale(graph: Path, where: str, factor: float, folder: Path) -> Path:
    """A copy of the graph in which one GEMM's input, its weight, or one channel of the weight has a wrong scale."""
    model = ir.load(graph)
    ir.external_data.load_to_model(model)
    gemm, weight = next(
        (node, node.inputs[1].producer())
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm")
        and node.inputs[1].producer() is not None
        and node.inputs[1].producer().inputs[0].name.endswith(f"{LAYER}.weight")
    )
    if where != "input":
        _scale(model, weight, factor, only=3 if where == "channel" else None)
    else:
        dequantize = gemm.inputs[0].producer()
        for node in (dequantize, dequantize.inputs[0].producer()):
            _scale(model, node, factor)
    ir.save(model, folder / "bad.onnx")
    return folder / "bad.onnx"


def _scale(model: ir.Model, node: ir.Node, factor: float, only: int | None = None) -> None:
    scale = np.array(node.inputs[1].const_value.numpy())
    scale[... if only is None else only] *= factor
    value = ir.Value(
        name=f"{node.name}_bad_scale", const_value=ir.tensor(scale, name=f"{node.name}_bad_scale")
    )
    model.graph.initializers[value.name] = value
    node.replace_input_with(1, value)
