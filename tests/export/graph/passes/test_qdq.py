"""Quantized graphs compute what the plan says, share scales, store 8-bit weights, and fuse in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import need_openvino
from quant_helpers import feeds_of, ranges_of, signal_to_noise_db

from ditc.export.families.sana.recipe import RECIPES
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.formats import QUANTIZED_MAX, Format
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan, make_plan
from ditc.export.quant.ranges import load_ranges, save_ranges
from ditc.export.quant.recipes import recipes_of
from ditc.export.quant.simulate import quantized
from ditc.export.quant.verify import check_scales
from ditc.runtime.errors import BuildError
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import Precision

BLOCK = "transformer_blocks.0"
PER_TOKEN = replace(
    RECIPES["sana-int8"],
    name="int8-per-token",
    rules=tuple(replace(rule, per_token=rule.kind is not None) for rule in RECIPES["sana-int8"].rules),
)
ALL = {**recipes_of("sana"), PER_TOKEN.name: PER_TOKEN}


@pytest.fixture(scope="module")
def make(exported):
    """A function that quantizes a copy of the exported step by a recipe, and returns stage, plan and graph."""
    stage, graph = exported(Precision.FP32)
    ranges = ranges_of(stage)

    def build(recipe):
        layers = quantizable_layers(stage)
        plan = make_plan(recipe, ranges, layers)
        model = graph.clone()
        quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
        return stage, plan, model

    return build


@pytest.mark.parametrize("name", ALL)
def test_the_graph_computes_what_the_simulation_computes(make, run, name):
    stage, plan, model = make(ALL[name])
    feeds, layers = feeds_of(stage, seed=9), quantizable_layers(stage)
    session = TorchSession(stage.module, stage.spec)
    exact = session.run(feeds)["x0"]
    with quantized(layers, plan.layers):
        simulated = session.run(feeds)["x0"]
    got = replace(run, optimize=False)(model, feeds)["x0"]
    # Sums in another order move a few values over a rounding boundary, which costs far less than the rounding itself.
    assert signal_to_noise_db(got, simulated) > signal_to_noise_db(got, exact) + 10
    assert signal_to_noise_db(got, exact) > 20


def test_layers_that_read_one_tensor_share_its_scale(make):
    _, plan, model = make(RECIPES["sana-int8"])
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    # q, k and v read one tensor, so 8 layers read 6 tensors.
    assert len(plan.layers) == len(quantizers) == 8
    assert len({node.inputs[0] for node in quantizers}) == len({node.inputs[1] for node in quantizers}) == 6


def test_weights_are_stored_in_8_bits_with_one_scale_per_output_channel(make):
    stage, _, model = make(replace(RECIPES["sana-int8"], smooth=False))
    layer = quantizable_layers(stage)[f"{BLOCK}.attn1.to_q"]
    stored = model.graph.initializers[layer.parameter].const_value
    scale = model.graph.initializers[layer.parameter + "_scale"].const_value.numpy()
    weight = layer.weight()
    assert stored.dtype == ir.DataType.INT8
    np.testing.assert_array_equal(scale, (np.abs(weight).max(axis=1) / 127).astype(np.float32))
    np.testing.assert_allclose(stored.numpy() * scale, weight.T, atol=scale.max() / 2 * 1.0001)


def test_smoothing_is_merged_into_the_modulation_of_an_adaptive_norm(make):
    _, plan, model = make(RECIPES["sana-int8"])
    smoothed = plan.layers[f"{BLOCK}.attn1.to_q"].input.smooth
    assert smoothed is not None
    quantizer = next(n for n in model.graph if n.name == f"network.{BLOCK}.attn1.to_q.input.quantize")
    assert quantizer.inputs[0].producer().op_type == "Add"  # no multiplication of all tokens comes between


def test_layers_with_per_token_scales_share_one_division(make):
    _, _, model = make(PER_TOKEN)
    sources = {node.inputs[0] for node in model.graph if node.op_type == "QuantizeLinear"}
    assert len(sources) == 6 and {source.producer().op_type for source in sources} == {"Div"}


def test_a_graph_without_its_per_token_scales_is_refused(make):
    stage, plan, model = make(PER_TOKEN)
    layers = quantizable_layers(stage)
    check_scales(model, plan.layers, layers)
    scaled = next(n for n in model.graph if n.name == f"network.{BLOCK}.ff.conv_point.output.multiply")
    scaled.outputs[0].replace_all_uses_with(scaled.inputs[0])
    for user in list(scaled.inputs[0].uses()):
        if user.node is scaled:
            scaled.replace_input_with(0, scaled.inputs[1])
    with pytest.raises(BuildError, match=r"ff\.conv_point: its tokens have no scales of their own"):
        check_scales(model, plan.layers, layers)


def test_operations_in_high_precision_have_no_quantizer(make):
    _, _, model = make(RECIPES["sana-int8"])
    for node in model.graph:
        if node.op_type in ("ReluLinearAttention", "Softmax", "Conv", "LayerNormalization"):
            makers = [value.producer() for value in node.inputs if value is not None]
            assert not any(maker and maker.op_type == "DequantizeLinear" for maker in makers), node.name


@pytest.mark.parametrize("name", ["sana-int8", PER_TOKEN.name])
def test_every_planned_gemm_becomes_an_integer_kernel(make, tmp_path, name):
    _, plan, model = make(ALL[name])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("MatMulIntegerToFloat") == len(plan.layers)
    assert "DequantizeLinear" not in nodes


@pytest.mark.parametrize("name", ALL)
def test_the_runtimes_own_session_runs_the_graph(make, run, tmp_path, name):
    stage, _, model = make(ALL[name])
    feeds = feeds_of(stage, seed=9)
    precision = Precision.FP8 if "fp8" in name else Precision.INT8
    session = OnnxRuntimeSession(
        _save(model, tmp_path / "step.onnx"), stage.spec, precision=precision, provider=CPU
    )
    plain = replace(run, optimize=False)(model, feeds)["x0"]
    # Integer kernels sum exactly and fp32 kernels round. A saturation or a wrong scale would differ by far more.
    assert signal_to_noise_db(session.run(feeds)["x0"], plain) > 40


@pytest.mark.parametrize("name", ["sana-int8", PER_TOKEN.name])
def test_openvino_runs_the_graph_in_integer_kernels(make, run, tmp_path, name):
    need_openvino()
    from ditc.export.engine.ir import write_ir
    from ditc.runtime.cpu_features import int8_products_saturate
    from ditc.runtime.sessions.openvino import OpenvinoSession, executed_types

    stage, plan, model = make(ALL[name])
    files = write_ir(_save(model, tmp_path / "step.onnx"), tmp_path / "step.xml", spec=stage.spec)
    session, feeds = OpenvinoSession(files.model, stage.spec, threads=1), feeds_of(stage, seed=9)
    plain = replace(run, optimize=False)(model, feeds)["x0"]
    assert signal_to_noise_db(session.run(feeds)["x0"], plain) > 40
    if not int8_products_saturate():  # elsewhere OpenVINO multiplies in fp32, which this list does not tell
        in_8_bits = sum(kind in ("i8", "u8") for kind in executed_types(session)["FullyConnected"])
        assert in_8_bits == len(plan.layers)


def test_saved_ranges_give_the_same_graph_byte_for_byte(exported, tmp_path):
    stage, graph = exported(Precision.FP32)
    ranges, layers = ranges_of(stage), quantizable_layers(stage)
    loaded = load_ranges(save_ranges(ranges, tmp_path / "ranges.safetensors"))
    written = []
    for source in (ranges, loaded):
        model = graph.clone()
        plan = make_plan(RECIPES["sana-int8"], source, layers)
        quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
        written.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert written[0] == written[1]


def _save(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def _spoil(model: ir.Model, name: str, change) -> None:
    value = model.graph.initializers[name]
    value.const_value = ir.Tensor(change(value.const_value.numpy().copy()), name=name)


def _one_channel(scale):
    scale[3] *= 12
    return scale


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("input_scale", lambda s: s * np.float32(12)),
        ("input_scale", lambda s: s / np.float32(12)),
        ("weight_scale", lambda s: s * np.float32(12)),
        ("weight_scale", lambda s: s / np.float32(12)),
        ("weight_scale", _one_channel),
    ],
)
def test_a_planted_bad_scale_is_caught_by_name(make, tmp_path, what, change):
    stage, plan, model = make(replace(RECIPES["sana-int8"], smooth=False))
    layers = quantizable_layers(stage)
    check_scales(ir.load(_save(model, tmp_path / "good.onnx")), plan.layers, layers)
    parameter = f"network.{BLOCK}.ff.conv_point.weight"
    name = (
        f"{parameter}_scale" if what == "weight_scale" else parameter.removesuffix(".weight") + ".input_scale"
    )
    _spoil(model, name, change)
    with pytest.raises(BuildError, match=r"ff\.conv_point"):
        check_scales(ir.load(_save(model, tmp_path / "bad.onnx")), plan.layers, layers)


def test_a_weight_that_the_graph_does_not_use_is_refused(exported):
    stage, graph = exported(Precision.FP32)
    plan = make_plan(RECIPES["sana-int8"], ranges_of(stage), quantizable_layers(stage))
    names = dict.fromkeys(plan.layers, "network.nothing.weight")
    with pytest.raises(BuildError, match="second input of one MatMul"):
        quantize_graph(graph.clone(), plan, names)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_scales_have_the_type_of_the_graph(exported, precision):
    stage, graph = exported(precision)
    layers, model = quantizable_layers(stage), graph.clone()
    plan: QuantPlan = make_plan(RECIPES["sana-fp8"], ranges_of(stage), layers)
    quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
    scale = model.graph.initializers[f"network.{BLOCK}.ff.conv_point.input_scale"].const_value
    wanted = ir.DataType.FLOAT16 if precision is Precision.FP16 else ir.DataType.BFLOAT16
    amax = plan.layers[f"{BLOCK}.ff.conv_point"].input.amax
    assert scale.dtype == wanted
    assert float(scale.numpy()) == pytest.approx(amax / QUANTIZED_MAX[Format.FP8], rel=2**-7)
    check_scales(model, plan.layers, layers)


@pytest.mark.parametrize(
    ("name", "target"), [("sana-int8", "sm86"), ("sana-fp8", "sm89"), (PER_TOKEN.name, "sm86")]
)
def test_tensorrt_rtx_builds_the_graph_ahead_of_time(exported, tmp_path, name, target):
    pytest.importorskip("tensorrt_rtx")
    from ditc.export.engine.build import build_engine
    from ditc.export.graph import ops
    from ditc.runtime.spec import Backend

    stage, graph = exported(Precision.FP16)
    layers, model = quantizable_layers(stage), graph.clone()
    plan = make_plan(ALL[name], ranges_of(stage), layers)
    quantize_graph(model, plan, {n: layer.parameter for n, layer in layers.items()})
    ops.add_functions(model)
    report = build_engine(
        _save(model, tmp_path / "step.onnx"),
        tmp_path / "step.engine",
        spec=stage.spec,
        backend=Backend.TENSORRT_RTX,
        targets=(target,),
    )
    assert report.size_bytes > 0
    if name == "sana-fp8":
        with pytest.raises(BuildError, match="sm86 cannot run fp8"):
            build_engine(
                tmp_path / "step.onnx",
                tmp_path / "old.engine",
                spec=stage.spec,
                backend=Backend.TENSORRT_RTX,
                targets=("sm86",),
            )


@pytest.mark.parametrize("name", ["sana-int8", "sana-fp8"])
def test_weights_can_be_rebuilt_from_their_quantized_values(make, tmp_path, name):
    from ditc.export.build.weights import rebuild, weights_of

    stage, plan, model = make(RECIPES[name])
    path = _save(model, tmp_path / "step.onnx")
    rebuilt = dict(rebuild(weights_of(stage.weights, model), {stage.spec.name: path}))
    for layer in plan.layers:
        original = quantizable_layers(stage)[layer].weight()
        got = rebuilt[f"{layer}.weight"].reshape(original.shape).numpy()
        # Rounding alone: an INT8 error is 40 dB below the channel's largest value, an E4M3 error 30 dB below a value.
        assert signal_to_noise_db(got, original) > 25
