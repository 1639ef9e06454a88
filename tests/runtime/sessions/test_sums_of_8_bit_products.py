"""Sums of 8-bit products are exact on this CPU, also those that do not fit in 16 bits in pairs.

On x86 without VNNI, the common kernels of both libraries add pairs of products in 16 bits and saturate: the decoder of
the tests' checkpoint then had a signal-to-noise ratio of 7 instead of 29 dB in OpenVINO.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import need_openvino

from ditc.runtime import cpu_features
from ditc.runtime.session import Array, Session
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.sessions.openvino import OpenvinoSession, settings
from ditc.runtime.spec import DType, Precision, StageSpec, TensorSpec

# Two products of 255 (127 and the offset of 128) by 127 are 64,770, and 16 bits hold 32,767.
ROWS, CHANNELS, OUTPUTS, SIDE = 8, 64, 32, 6


def product() -> tuple[onnx.GraphProto, list[int]]:
    text = f"""
g (float[{ROWS}, {CHANNELS}] x) => (float[{ROWS}, {OUTPUTS}] y) {{
    q = QuantizeLinear (x, scale, zero)
    d = DequantizeLinear (q, scale, zero)
    w = DequantizeLinear <axis = 1> (weight, weight_scale, weight_zero)
    y = MatMul (d, w)
}}"""
    return onnx.parser.parse_graph(text), [CHANNELS, OUTPUTS]


def convolution() -> tuple[onnx.GraphProto, list[int]]:
    text = f"""
g (float[1, {CHANNELS}, {SIDE}, {SIDE}] x) => (float[1, {OUTPUTS}, {SIDE}, {SIDE}] y) {{
    q = QuantizeLinear (x, scale, zero)
    d = DequantizeLinear (q, scale, zero)
    w = DequantizeLinear <axis = 0> (weight, weight_scale, weight_zero)
    y = Conv <pads = [1, 1, 1, 1]> (d, w)
}}"""
    return onnx.parser.parse_graph(text), [OUTPUTS, CHANNELS, 3, 3]


def open_onnxruntime(path: Path, spec: StageSpec, precision: Precision) -> Session:
    return OnnxRuntimeSession(path, spec, precision=precision, provider=CPU, threads=1)


def open_openvino(path: Path, spec: StageSpec, precision: Precision) -> Session:
    need_openvino()
    from ditc.export.engine.ir import write_ir

    files = write_ir(path, path.with_suffix(".xml"), spec=spec, precision=precision)
    return OpenvinoSession(files.model, spec, precision=precision, threads=1)


# The graphs that ONNX Runtime gets in int8-dynamic have the same nodes between a division and a multiplication.
WAYS = [
    (open_onnxruntime, Precision.INT8),
    (open_onnxruntime, Precision.INT8_DYNAMIC),
    (open_openvino, Precision.INT8),
]


@pytest.mark.parametrize("make", [product, convolution])
@pytest.mark.parametrize(("open_it", "precision"), WAYS)
def test_large_sums_are_exact(
    make: Callable[[], tuple[onnx.GraphProto, list[int]]],
    open_it: Callable[[Path, StageSpec, Precision], Session],
    precision: Precision,
    tmp_path: Path,
) -> None:
    graph, shape = make()
    rng = np.random.default_rng(0)
    weight = rng.choice(np.array([-127, 120, 127], np.int8), shape)
    weight_scale = np.full(OUTPUTS, 0.25, np.float32)
    values = {
        "scale": np.array(0.5, np.float32),
        "zero": np.array(0, np.int8),
        "weight": weight,
        "weight_scale": weight_scale,
        "weight_zero": np.zeros(OUTPUTS, np.int8),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in values.items())
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "stage.onnx")
    sizes = {
        name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for name, value in {"x": graph.input[0], "y": graph.output[0]}.items()
    }
    inputs, outputs = ((TensorSpec(name, DType.FLOAT32, sizes[name]),) for name in sizes)
    spec = StageSpec("stage", inputs, outputs, {})
    # Every value is a multiple of the scale, so that nothing depends on how a half is rounded.
    x = (rng.choice([-128, 100, 127], sizes["x"]) * 0.5).astype(np.float32)
    session = open_it(tmp_path / "stage.onnx", spec, precision)
    got = np.asarray(session.run({"x": x})["y"])
    expected = exact(x, weight * 0.25)
    # fp32 holds these sums of multiples of 1/8 below 2^21 exactly; the bound leaves room for a scale that is applied
    # in another order. Saturated sums are off by more than a tenth of the largest one.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def exact(x: Array, weight: Array) -> Array:
    """The product, or the convolution with a margin of one zero, in float64."""
    if x.ndim == 2:
        return x.astype(np.float64) @ weight.astype(np.float64)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("ncyxij,ocij->noyx", windows, weight.astype(np.float64))


@pytest.mark.parametrize(
    ("machine", "features", "saturates"),
    [
        ("x86_64", ("avx2",), True),
        ("AMD64", (), True),
        ("x86_64", ("avx2", "avx512f"), True),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("x86_64", ("avx2", "avx512f", "avx512_vnni"), False),
        ("aarch64", ("asimddp",), False),
    ],
)
def test_the_setting_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: tuple[str, ...], saturates: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(cpu_features, "cpu_features", lambda: features)
    assert cpu_features.int8_products_saturate() is saturates
    assert ("LP_TRANSFORMS_MODE" in settings("CPU", 1)) is saturates
    assert "LP_TRANSFORMS_MODE" not in settings("GPU", 1)
