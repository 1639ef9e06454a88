"""Matrix products get optional inputs for LoRAs; without them, nothing changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ditc.export.graph.passes.lora_inputs import add_lora_inputs, lora_inputs_of
from ditc.runtime.weight_map import LoraInputs

# A MatMul, a Gemm with a transposed weight, a weight that two products read, one that is not only multiplied by, and
# one of a convolution.
TEXT = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N, 3] x) => (float[N, 3] y, float[N, 3] z)
<float[3,2] a = {1,2,3,4,5,6}, float[3,2] b = {3,1,4,1,5,9}, float[3] bias = {1,1,1},
 float[3,3] c = {2,0,0,0,3,0,0,0,4}, float[3,3] d = {1,0,0,0,1,0,0,0,1}, float[1,1,1,1] e = {1}>
{
    h = MatMul (x, a)
    i = Gemm <transB = 1> (h, b, bias)
    j = MatMul (i, c)
    k = MatMul (x, c)
    l = Add (j, k)
    y = MatMul (l, d)
    z = Add (y, d)
}
"""
ALL = ("a", "b", "c", "d", "e", "bias")


@pytest.fixture
def graph(tmp_path: Path) -> ir.Model:
    return ir.from_onnx_text(TEXT)


def session(model: ir.Model, path: Path) -> ort.InferenceSession:
    ir.save(model, path)
    return ort.InferenceSession(path)


def test_products_alone_get_inputs_that_can_be_left_out(graph: ir.Model, tmp_path: Path) -> None:
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    before = session(graph, tmp_path / "before.onnx").run(None, {"x": x})
    add_lora_inputs(graph, ALL)
    initializers = graph.graph.initializers
    found = {name: lora_inputs_of(initializers[name], graph) for name in ALL}
    has = {name: LoraInputs(down=f"{name}.lora_down", up=f"{name}.lora_up") for name in "abc"}
    assert found == dict.fromkeys(ALL) | has
    after = session(graph, tmp_path / "after.onnx")
    assert [i.name for i in after.get_inputs()] == ["x"]
    for one, other in zip(before, after.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_inputs_change_the_products_as_changed_weights_would(graph: ir.Model, tmp_path: Path) -> None:
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (2, 3), "c": (3, 3)}  # as x is multiplied by them
    feeds, changed = {"x": x}, ir.from_onnx_text(TEXT)
    for name, (inputs, outputs) in shapes.items():
        down, up = rng.normal(size=(inputs, 4)), rng.normal(size=(4, outputs))
        feeds |= {f"{name}.lora_down": down.astype("f4"), f"{name}.lora_up": up.astype("f4")}
        value = changed.graph.initializers[name]
        product = down @ up
        new = value.const_value.numpy() + (product.T if name == "b" else product)
        value.const_value = ir.tensor(new.astype(np.float32), name=name)
    wanted = session(changed, tmp_path / "changed.onnx").run(None, {"x": x})
    add_lora_inputs(graph, ALL)
    got = session(graph, tmp_path / "inputs.onnx").run(None, feeds)
    for one, other in zip(wanted, got, strict=True):
        # fp32 sums of up to seven terms, in another order.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())
