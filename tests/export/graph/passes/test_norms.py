"""From opset 23 on, RMS norms over the last dimension become one standard operation; other norms stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from ditc.export.graph.onnx import check_export, to_model
from ditc.export.graph.passes.norms import fuse_rms_norms
from ditc.runtime.spec import Precision

NORM = """
<ir_version: 10, opset_import: ["": OPSET]>
g (TYPE[N, 3, 8] x) => (TYPE[N, 3, 8] y)
<float[8] w = {0.5, 1, 2, -1, 0.5, 1, 2, -1}, float two = {2}, int64[1] axes = {AXIS}, float eps = {1e-5}>
{
    UP
    q = Pow (f, two)
    m = ReduceMean <keepdims = 1> (q, axes)
    e = Add (m, eps)
    d = Sqrt (e)
    n = Div (f, d)
    DOWN
    y = Mul (c, w)
}
"""
# The same values in fp16, which the text syntax takes as bits.
HALF = "{14336, 15360, 16384, 48128, 14336, 15360, 16384, 48128}"
CASTS = {
    "float": ("f = Identity (x)", "c = Identity (n)"),
    "float16": ("f = Cast <to = 1> (x)", "c = Cast <to = 10> (n)"),
}


def norm(kind: str = "float", axis: int = -1, opset: int = 23) -> ir.Model:
    up, down = CASTS[kind]
    text = (
        NORM.replace("UP", up).replace("DOWN", down).replace("OPSET", str(opset)).replace("AXIS", str(axis))
    )
    text = text.replace("TYPE", kind)
    if kind == "float":
        text = text.replace(up, "").replace(down, "").replace("(f,", "(x,").replace("(c,", "(n,")
    else:
        text = text.replace("float[8] w", "float16[8] w").replace("{0.5, 1, 2, -1, 0.5, 1, 2, -1}", HALF)
    return ir.from_onnx_text(text)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("kind", list(CASTS))
def test_a_norm_of_tokens_becomes_one_operation_with_fp32_statistics(kind, axis, unchanged) -> None:
    x = 3 * np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)
    feeds = [{"x": x.astype({"float": np.float32, "float16": np.float16}[kind])}]
    after = unchanged(fuse_rms_norms, norm(kind, axis), feeds)
    assert operators(after) == {"RMSNormalization": 1}
    (node,) = after.graph
    assert node.attributes["stash_type"].as_int() == ir.DataType.FLOAT
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert node.inputs[1].name == "w"


def test_other_dimensions_and_older_opsets_stay_as_they_are() -> None:
    for model in (norm(axis=1), norm(opset=20)):
        before = operators(model)
        fuse_rms_norms(model)
        assert operators(model) == before


def test_a_step_in_opset_23_has_fused_norms_and_computes_the_same(denoiser_stage, tmp_path) -> None:
    stage = denoiser_stage(Precision.FP32)
    model = to_model(stage, 23)
    assert model.opset_imports[""] == 23
    # norm_q of self- and cross-attention, and norm_k of self-attention. The conditioner has cross-attention's norm_k.
    assert operators(model)["RMSNormalization"] == 3 and "ReduceMean" not in operators(model)
    ir.save(model, tmp_path / "step.onnx")
    check_export(stage, tmp_path / "step.onnx")


def test_a_16_bit_step_in_opset_23_keeps_its_islands(denoiser_stage) -> None:
    model = to_model(denoiser_stage(Precision.FP16), 23)  # it checks the islands
    assert operators(model)["RMSNormalization"] == 3
