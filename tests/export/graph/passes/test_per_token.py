"""int8-dynamic: every token has its own scale, in integer kernels of ONNX Runtime and in OpenVINO's own form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import need_openvino
from quant_helpers import feeds_of, signal_to_noise_db

from ditc.export.engine.run_time_scales import leave_tokens_to_library
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.formats import Format
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import Input, LayerPlan, QuantPlan, make_plan
from ditc.export.quant.recipes import find_recipe
from ditc.export.quant.simulate import quantized
from ditc.runtime.cpu_features import VNNI, cpu_features
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import DType, Precision, Range, StageSpec, TensorSpec

RECIPE = find_recipe(None, Precision.INT8_DYNAMIC, "sana")


@pytest.fixture(scope="module")
def dynamic(exported):
    """The exported step in fp32, the plan of the default recipe, and a function that gives the quantized graph."""
    stage, graph = exported(Precision.FP32)
    layers = quantizable_layers(stage)
    plan = make_plan(RECIPE, None, layers)

    def make() -> ir.Model:
        model = graph.clone()
        quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
        return model

    return stage, plan, make


def test_the_graph_computes_what_the_simulation_computes_and_no_range_is_needed(dynamic, run):
    stage, plan, make = dynamic
    feeds, layers = feeds_of(stage, seed=9), quantizable_layers(stage)
    session = TorchSession(stage.module, stage.spec)
    exact = session.run(feeds)["x0"]
    with quantized(layers, plan.layers):
        simulated = session.run(feeds)["x0"]
    got = replace(run, optimize=False)(make(), feeds)["x0"]
    # Sums in another order move a few values over a rounding boundary, which costs far less than the rounding itself.
    assert signal_to_noise_db(got, simulated) > signal_to_noise_db(got, exact) + 10
    assert signal_to_noise_db(got, exact) > 30


def test_onnxruntime_runs_every_product_in_an_integer_kernel(dynamic, run, tmp_path):
    stage, plan, make = dynamic
    model = make()
    ir.save(model, tmp_path / "step.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), options)
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("MatMulIntegerToFloat") == len(plan.layers)
    assert "DequantizeLinear" not in nodes
    feeds = feeds_of(stage, seed=9)
    plain = replace(run, optimize=False)(model, feeds)["x0"]
    session = OnnxRuntimeSession(
        tmp_path / "step.onnx", stage.spec, precision=Precision.INT8_DYNAMIC, provider=CPU
    )
    # Integer kernels sum exactly and fp32 kernels round. A saturation or a wrong scale would differ by far more.
    assert signal_to_noise_db(session.run(feeds)["x0"], plain) > 40


def test_layers_that_read_one_tensor_share_its_scale(dynamic):
    _, plan, make = dynamic
    nodes = list(make().graph)
    # q, k and v of self-attention read one tensor: six inputs of eight layers.
    assert sum(node.name.endswith(".input.amax") for node in nodes) == len(plan.layers) * 6 / 8
    assert [node.op_type for node in nodes].count("QuantizeLinear") == len(plan.layers)


def test_openvino_quantizes_the_tokens_by_itself(dynamic, run, tmp_path):
    need_openvino()
    from ditc.export.engine.ir import write_ir
    from ditc.runtime.sessions.openvino import OpenvinoSession

    stage, plan, make = dynamic
    model = make()
    ir.save(model, tmp_path / "step.onnx")
    files = write_ir(
        tmp_path / "step.onnx", tmp_path / "step.xml", spec=stage.spec, precision=Precision.INT8_DYNAMIC
    )
    assert ".input.amax" not in files.model.read_text()
    feeds = feeds_of(stage, seed=9)
    session = OpenvinoSession(files.model, stage.spec, threads=1, precision=Precision.INT8_DYNAMIC)
    got, plain = session.run(feeds)["x0"], replace(run, optimize=False)(model, feeds)["x0"]
    # OpenVINO's scales are finer (one per token and group of channels), so both have their own rounding errors.
    assert signal_to_noise_db(got, plain) > 28
    layers = session.last_compiled().get_runtime_model().get_ordered_ops()
    products = [
        layer.get_rt_info()["runtimePrecision"].astype(str)
        for layer in layers
        if layer.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    assert products.count("i8") + products.count("u8") == len(plan.layers)


@pytest.mark.parametrize("channels", [64, 192, 480])
def test_openvino_rounds_small_values_beside_large_ones(tmp_path, channels):
    """The names of OpenVINO's kernels are the same with and without quantized inputs, but not what they compute."""
    need_openvino()
    from ditc.export.engine.ir import write_ir
    from ditc.runtime.sessions.openvino import DYNAMIC_GROUP, OpenvinoSession

    model, spec, x = _product(channels)
    path = tmp_path / "product.onnx"
    ir.save(model, path)
    files = write_ir(path, tmp_path / "product.xml", spec=spec, precision=Precision.INT8_DYNAMIC)
    found = {}
    for precision in (Precision.FP32, Precision.INT8_DYNAMIC):
        session = OpenvinoSession(files.model, spec, threads=1, precision=precision)
        found[precision] = np.asarray(session.run({"x": x})["y"])[0, :, 0]
        session.close()
    # In the first 128 channels of every token, 1000 stands beside 1: with a step of 1000/127 the ones are lost. Layers
    # with fewer channels than a group are computed in fp32.
    np.testing.assert_allclose(found[Precision.FP32], 1000 + channels - 1, rtol=1e-3)
    if not VNNI.intersection(cpu_features()):
        pytest.skip("not checked: this CPU has no INT8 dot products, without which OpenVINO computes in fp32")
    lost = DYNAMIC_GROUP - 1 if channels >= DYNAMIC_GROUP else 0
    np.testing.assert_allclose(found[Precision.INT8_DYNAMIC], 1000 + channels - 1 - lost, rtol=1e-3)


def test_a_graph_without_scales_of_tokens_is_left_as_it_is(exported):
    _, graph = exported(Precision.FP32)
    before = ir.to_proto(graph)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    assert leave_tokens_to_library(after) == 0
    assert after == before


def _product(channels: int) -> tuple[ir.Model, StageSpec, np.ndarray]:
    """x @ ones, quantized per token; its spec; and tokens of one 1000 and ones."""
    text = f"""<ir_version: 9, opset_import: ["" : 20]> g (float[B,N,{channels}] x) => (float[B,N,64] y) {{
        p = MatMul (x, weight) y = Identity (p) }}"""
    model = ir.from_onnx_text(text)
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "weight")
    value.const_value = ir.tensor(np.ones((channels, 64), np.float32), name="weight")
    value.shape, value.type = ir.Shape((channels, 64)), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(value)
    plan = LayerPlan("layer", Format.INT8, Input(1.0, per_token=True))
    quantize_graph(model, QuantPlan(RECIPE, {"layer": plan}, {}), {"layer": "weight"})
    spec = StageSpec(
        "product",
        (TensorSpec("x", DType.FLOAT32, ("batch", "tokens", channels)),),
        (TensorSpec("y", DType.FLOAT32, ("batch", "tokens", 64)),),
        {"batch": Range(1, 1, 4), "tokens": Range(1, 32, 64)},
    )
    x = np.ones((1, 32, channels), np.float32)
    x[:, :, 0] = 1000
    return model, spec, x
