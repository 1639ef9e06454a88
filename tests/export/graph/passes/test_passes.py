"""Every pass does its work and leaves the outputs of a real step unchanged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import common

from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.graph.onnx import trace
from ditc.export.graph.passes import PASSES, fold_transposes, gather_rows, restore_scopes, simplify
from ditc.export.graph.passes.check_interface import check_interface
from ditc.export.graph.passes.parameters import transforms_of
from ditc.export.graph.passes.scopes import NAME_SCOPES, module_path
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import DType, Precision


@pytest.fixture(scope="module")
def traced(denoiser_stage) -> ir.Model:
    """The step as torch.onnx.export leaves it.

    The custom op gets its body only before a run, as in to_model. Otherwise the passes would inline the body, and
    their add-zero rule would take its eps of 1e-15 for zero.
    """
    return trace(denoiser_stage(Precision.FP32))


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_each_pass_in_turn_leaves_a_steps_outputs_unchanged(traced, denoiser_stage, unchanged) -> None:
    spec = denoiser_stage(Precision.FP32).spec
    feeds = [example_feeds(spec, example_sizes(spec, second=second), seed=3) for second in (False, True)]
    model = traced
    for step in PASSES:
        model = unchanged(step, model, feeds)
    check_interface(model, spec)
    left = count(model)
    assert not left.keys() & {"Constant", "Identity", "GatherND", "SequenceAt", "Expand"}
    assert all(module_path(node) is not None for node in model.graph)
    parameters = denoiser_stage(Precision.FP32).module.state_dict()
    assert parameters.keys() <= model.graph.initializers.keys()
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].is_initializer():
            assert transforms_of(node.inputs[1]) == ("transpose",)


def test_simplify_keeps_equal_parameters_apart_and_a_zero_bias_in_place(unchanged) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20]>
    g (float[N, 3] x) => (float[N, 3] y)
    <float[3,3] a.weight = {1,0,0,0,1,0,0,0,1}, float[3] a.bias = {0,0,0}, float[3] b.bias = {0,0,0}, float s = {1}>
    {
        h = Gemm <transB = 1> (x, a.weight, a.bias)
        one = Constant <value_float = 1.0> ()
        uno = Constant <value_float = 1.0> ()
        left = Add (h, one)
        right = Add (h, uno)
        sum = Mul (left, right)
        kept = Mul (sum, s)
        gone = Mul (kept, one)
        y = Add (gone, b.bias)
    }
    """.replace("a.", "a_").replace("b.", "b_")
    before = ir.from_onnx_text(text)
    after = unchanged(simplify, before, [{"x": np.random.default_rng(0).standard_normal((2, 3), np.float32)}])
    assert before.graph.initializers.keys() <= after.graph.initializers.keys()
    # The multiplication by a parameter is kept, although its value is 1.
    assert count(after) == {"Gemm": 1, "Add": 2, "Mul": 2}


def test_fold_transposes_stores_the_weight_as_the_product_reads_it(unchanged) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20]>
    g (float[N, 2] x) => (float[N, 3] y, float[3, 2] z)
    <float[3,2] w = {1,2,3,4,5,6}, float[3,2] shared = {1,2,3,4,5,6}>
    { t = Transpose <perm = [1, 0]> (w)  m = MatMul (x, t)  u = Transpose (shared)  y = MatMul (x, u)
      k = Identity (m)  z = Mul (shared, shared) }
    """
    before = ir.from_onnx_text(text.replace("y = MatMul (x, u)", "n = MatMul (x, u)  y = Add (n, m)"))
    after = unchanged(fold_transposes, before, [{"x": np.ones((2, 2), np.float32)}])
    assert count(after)["Transpose"] == 1  # the other matrix is also read without a Transpose
    weight = after.graph.initializers["w"]
    assert transforms_of(weight) == ("transpose",)
    assert weight.const_value.numpy().tolist() == [[1, 3, 5], [2, 4, 6]]
    assert list(weight.shape) == [2, 3]


def test_a_transposed_weight_is_a_view_of_the_parameters_memory() -> None:
    from onnx_ir.tensor_adapters import TorchTensor

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        parameter = torch.arange(6).reshape(3, 2).to(dtype)
        text = """
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2,2] x) => (float[2,3] y) { t = Transpose (w) y = MatMul (x, t) }
        """
        model = ir.from_onnx_text(text.replace("g (float[2,2] x)", "g (float[2,2] x, float[3,2] w)"))
        weight = model.graph.inputs.pop()
        weight.const_value = TorchTensor(parameter, name="w")
        weight.dtype = weight.const_value.dtype
        model.graph.register_initializer(weight)
        fold_transposes(model)
        stored = weight.const_value.numpy()
        assert stored.__array_interface__["data"][0] == parameter.data_ptr()
        assert weight.const_value.tobytes() == parameter.t().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("axis", [-1, 1])
def test_gather_rows_takes_rows_with_one_gather(axis, unchanged) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["": 20]>
    g (float[B, 3, 2] x, int64[R] rows) => (float[R, 3, 2] y) <int64[1] axes = {{{axis}}}>
    {{ i = Unsqueeze (rows, axes)  y = GatherND (x, i) }}
    """
    feeds = {
        "x": np.random.default_rng(0).standard_normal((2, 3, 2), np.float32),
        "rows": np.array([1, 0, -1, 1]),
    }
    assert count(unchanged(gather_rows, ir.from_onnx_text(text), [feeds])) == {"Gather": 1}


def test_gather_rows_leaves_other_gathers_alone(unchanged) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20]>
    g (float[B, 3] x, int64[R] rows) => (float[1, R] y) <int64[1] axes = {0}>
    { i = Unsqueeze (rows, axes)  y = GatherND <batch_dims = 0> (x, i) }
    """.replace("float[1, R] y", "float[1] y")
    feeds = {"x": np.ones((2, 3), np.float32), "rows": np.array([1, 2])}  # one index with two coordinates
    assert count(unchanged(gather_rows, ir.from_onnx_text(text), [feeds]))["GatherND"] == 1


def test_restore_scopes_finds_the_module_that_holds_all_neighbours() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2] x) => (float[2] z) { a = Relu (x) b = Neg (a) z = Abs (b) }
        """
    )
    first, middle, last = model.graph
    first.metadata_props[NAME_SCOPES] = str(["", "block", "block.conv", "relu"])
    last.metadata_props[NAME_SCOPES] = str(["", "block", "abs"])
    restore_scopes(model)
    assert module_path(middle) == "block"


def test_an_output_of_another_type_than_the_spec_is_refused_by_name(traced, denoiser_stage) -> None:
    from dataclasses import replace

    spec = denoiser_stage(Precision.FP32).spec
    other = replace(spec, outputs=(*spec.outputs[:-1], replace(spec.outputs[-1], dtype=DType.FLOAT16)))
    model = traced.clone()
    common.OutputFixPass()(model)
    with pytest.raises(BuildError, match="stats is float in the exported graph, but float16 in the spec"):
        check_interface(model, other)
