"""round_to shows 16-bit errors on ONNX Runtime's CPU provider, which alone would hide them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.graph.passes.round_to import round_to, rounded_spec
from ditc.export.graph.torch_session import TorchSession, from_torch
from ditc.runtime.errors import BuildError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.spec import DType, Precision

HEADER = '<ir_version: 10, opset_import: ["": 20]>'
NARROW = {
    Precision.FP16: (DType.FLOAT16, torch.float16, "float16"),
    Precision.BF16: (DType.BFLOAT16, torch.bfloat16, "bfloat16"),
}


def bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).float().numpy()


@pytest.mark.parametrize("precision", list(NARROW))
def test_the_rounded_step_has_as_large_an_error_as_torch_in_16_bits(
    precision, exported, denoiser_stage, run
) -> None:
    dtype, torch_dtype, _ = NARROW[precision]
    stage, model = exported(precision)
    wide = denoiser_stage(Precision.FP32)
    feeds = example_feeds(wide.spec, example_sizes(wide.spec), seed=7)
    narrow_feeds = feeds | {"cross_kv": from_torch(torch.from_numpy(feeds["cross_kv"]).to(torch_dtype))}
    exact = TorchSession(wide.module, wide.spec).run(feeds)
    in_torch = TorchSession(stage.module, stage.spec).run(narrow_feeds)
    rounded = run(round_to(model, dtype), feeds)
    assert [tensor.dtype for tensor in rounded_spec(stage.spec).inputs].count(DType.FLOAT32) == 7
    for name in ("next_latents", "x0"):
        expected, got = relative_l2(in_torch[name], exact[name]), relative_l2(rounded[name], exact[name])
        # Both round the same operations, but in different places: torch rounds a Linear once, the graph rounds its
        # product and its sum. So the errors have the same size, not the same value.
        assert 0.5 <= got / expected <= 2, f"{name}: {got:.3g} against torch's {expected:.3g}"


def test_without_round_to_an_fp16_graph_on_a_cpu_shows_less_error_than_fp16_has(
    exported, denoiser_stage, run
) -> None:
    _, model = exported(Precision.FP16)
    wide = denoiser_stage(Precision.FP32)
    feeds = example_feeds(wide.spec, example_sizes(wide.spec), seed=7)
    exact = TorchSession(wide.module, wide.spec).run(feeds)
    plain = run(model, feeds | {"cross_kv": feeds["cross_kv"].astype(np.float16)})
    rounded = run(round_to(model, DType.FLOAT16), feeds)
    assert relative_l2(plain["x0"], exact["x0"]) < relative_l2(rounded["x0"], exact["x0"])


@pytest.mark.parametrize("precision", list(NARROW))
def test_onnx_runtime_keeps_the_cast_pairs_and_rounds_as_torch_does(precision, run) -> None:
    dtype, torch_dtype, onnx_type = NARROW[precision]
    model = ir.from_onnx_text(
        f"{HEADER} g ({onnx_type}[N] x, {onnx_type}[N] y) => ({onnx_type}[N] z) "
        "{ p = Mul (x, y) s = Add (p, x) z = Relu (s) }"
    )
    x, y = np.random.default_rng(0).standard_normal((2, 4096), np.float32)
    got = run(round_to(model, dtype), {"x": x, "y": y})["z"]
    a, b = torch.from_numpy(x).to(torch_dtype), torch.from_numpy(y).to(torch_dtype)
    expected = (a * b + a).relu().float().numpy()
    assert np.array_equal(got, expected)
    unrounded = np.maximum(bits(x, torch_dtype) * bits(y, torch_dtype) + bits(x, torch_dtype), 0)
    assert not np.array_equal(got, unrounded)  # a runtime that removes the pairs would give this


def test_fp16_overflow_shows_as_inf_and_an_island_does_not_overflow(run) -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (float16[N] x) => (float16[N] plain, float16[N] island) "
        "{ q = Mul (x, x) plain = Sqrt (q) f = Cast <to = 1> (x) r = Mul (f, f) s = Sqrt (r) "
        "island = Cast <to = 10> (s) }"
    )
    got = run(round_to(model, DType.FLOAT16), {"x": np.array([300.0, 2.0], np.float32)})
    assert got["plain"].tolist() == [np.inf, 2.0]
    assert got["island"].tolist() == [300.0, 2.0]


def test_a_graph_without_16_bit_tensors_is_refused() -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float[N] x) => (float[N] y) {{ y = Relu (x) }}")
    with pytest.raises(BuildError, match="no float16 tensor to round"):
        round_to(model, DType.FLOAT16)


def test_the_original_graph_is_not_changed() -> None:
    text = f"{HEADER} g (float16[N] x) => (float16[N] y) <float16 w = {{3}}> {{ y = Mul (x, w) }}"
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    round_to(model, DType.FLOAT16)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
