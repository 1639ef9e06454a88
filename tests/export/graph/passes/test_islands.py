"""The check of fp32 islands: real 16-bit steps pass it, and a planted 16-bit softmax, norm or guidance is named."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from ditc.export.graph.ops.relu_linear_attention.onnx_function import function_proto
from ditc.export.graph.passes import islands
from ditc.export.graph.passes.islands import check_islands
from ditc.export.graph.passes.scopes import NAME_SCOPES
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import CONDITIONER, DType, Precision, Range, StageSpec, TensorSpec

HEADER = '<ir_version: 10, opset_import: ["": 20, "ditc": 1]>'
SPEC = StageSpec(CONDITIONER, (), (), {})
STEP = StageSpec(
    "denoiser",
    (TensorSpec("guidance_weights", DType.FLOAT32, ("batch", "rows")),),
    (),
    {"batch": Range(1, 1, 1)},
)


def graph(
    body: str, inputs: str = "float16[N, 4] x, float[N, 4] bias", scope: str = "network", opset: int = 20
) -> ir.Model:
    """A graph in which every node belongs to one module."""
    header = HEADER.replace("20", str(opset))
    model = ir.from_onnx_text(f"{header} g ({inputs}) => (float16[N, 4] y) {{ {body} }}")
    for node in model.graph:
        node.metadata_props[NAME_SCOPES] = str(["", scope, node.op_type] if scope else ["", node.op_type])
    return model


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_a_real_16_bit_step_keeps_its_islands_and_computes_the_rest_in_16_bits(exported, precision) -> None:
    stage, model = exported(
        precision
    )  # to_model has checked it; it is checked again so that this test can fail
    check_islands(model, stage.spec)
    typed = islands.typed_copy(model)
    narrow = {Precision.FP16: ir.DataType.FLOAT16, Precision.BF16: ir.DataType.BFLOAT16}[precision]
    products = [node.outputs[0].dtype for node in typed.graph if node.op_type in ("MatMul", "Conv", "Gemm")]
    assert products.count(narrow) >= 10
    assert products.count(ir.DataType.FLOAT) == 3  # those of the linear attention
    checked = {island for island, _ in islands._island_nodes(typed.graph, stage.spec)}
    assert checked == {rule.name for rule in islands.RULES} | {"step (guidance, solver, statistics)"}


GOOD = [
    # scores in 16 bits, mask and softmax in fp32
    "s = MatMul (x, x) f = Cast <to = 1> (s) m = Add (f, bias) p = Softmax (m) y = Cast <to = 10> (p)",
    # RMS norm of a 16-bit sum
    "a = Add (x, x) f = Cast <to = 1> (a) two = Constant <value_float = 2.0> () q = Pow (f, two) "
    "axes = Constant <value_ints = [1]> () r = ReduceMean (q, axes) e = Add (r, bias) d = Sqrt (e) n = Div (f, d) "
    "y = Cast <to = 10> (n)",
    # a mean that is not part of a norm: DC-AE averages channels in its shortcut
    "axes = Constant <value_ints = [1]> () r = ReduceMean (x, axes) y = Add (x, r)",
]
BAD = {
    "softmax: Softmax": ("p = Softmax (x) y = Relu (p)", "x in float16"),
    "softmax: Add": (
        "b = Cast <to = 10> (bias) m = Add (x, b) f = Cast <to = 1> (m) p = Softmax (f) y = Cast <to = 10> (p)",
        "x in float16",
    ),
    "norm: LayerNormalization": (
        "one = Constant <value_floats = [1.0, 1.0, 1.0, 1.0]> () g = Cast <to = 10> (one) "
        "y = LayerNormalization (x, g)",
        "x in float16",
    ),
    "norm statistics: Pow": (
        "two = Constant <value_float = 2.0> () h = Cast <to = 10> (two) q = Pow (x, h) f = Cast <to = 1> (q) "
        "axes = Constant <value_ints = [1]> () r = ReduceMean (f, axes) d = Sqrt (r) c = Cast <to = 10> (d) "
        "y = Div (x, c)",
        "x in float16",
    ),
    "norm statistics: ReduceMean": (
        "f = Cast <to = 1> (x) q = Mul (f, f) c = Cast <to = 10> (q) axes = Constant <value_ints = [1]> () "
        "r = ReduceMean (c, axes) w = Cast <to = 1> (r) d = Sqrt (w) y = Cast <to = 10> (d)",
        "c in float16",
    ),
    "sinusoid: Mul": (
        "a = Mul (x, x) f = Cast <to = 1> (a) s = Sin (f) y = Cast <to = 10> (s)",
        "x in float16",
    ),
    "sinusoid: Cos": ("y = Cos (x)", "x in float16"),
}


@pytest.mark.parametrize("body", GOOD)
def test_fp32_islands_in_a_16_bit_graph_pass(body) -> None:
    check_islands(graph(body), SPEC)


@pytest.mark.parametrize("place", BAD)
def test_an_island_in_16_bits_is_caught_by_name(place) -> None:
    body, tensor = BAD[place]
    with pytest.raises(
        BuildError,
        match=rf"conditioner: fp32 islands hold narrower tensors: .*{place} .*\(network\) has {tensor}",
    ):
        check_islands(graph(body), SPEC)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("softmax_precision = 1", "scale = 0.5", "softmax: Attention"),
        ("softmax_precision = 1", "softmax_precision = 10", "softmax: Attention"),
    ],
)
def test_an_attention_must_say_that_its_softmax_is_fp32(good, bad, message) -> None:
    body = "z = Attention <{}> (x4, x4, x4) y = Squeeze (z)"
    inputs = "float16[1, 1, N, 4] x4"
    check_islands(graph(body.format(good), inputs, opset=23), SPEC)
    with pytest.raises(BuildError, match=message):
        check_islands(graph(body.format(bad), inputs, opset=23), SPEC)


def test_guidance_in_16_bits_is_caught_outside_the_network_and_allowed_inside() -> None:
    body = "w = Cast <to = 10> (guidance_weights) y = Mul (x, w)"
    inputs = "float16[N, 4] x, float[N, 4] guidance_weights"
    check_islands(graph(body, inputs), STEP)
    with pytest.raises(BuildError, match=r"step .*: Mul .*\(outside the network\) has x in float16"):
        check_islands(graph(body, inputs, scope=""), STEP)


def attention(change: Callable[[str], str]) -> ir.Model:
    """A graph that calls ReluLinearAttention on 16-bit tensors, with a changed function body."""
    model = ir.from_onnx_text(
        f"{HEADER} g (float16[N, 4, 2, 3] x) => (float16[N, 4, 2, 3] y) "
        "{ y = ditc.ReluLinearAttention <eps = 1e-15> (x, x, x) }"
    )
    function = ir.from_proto(onnx.parser.parse_function(change(onnx.printer.to_text(function_proto()))))
    function.opset_imports[""] = 20
    model.functions[function.identifier()] = function
    return model


def test_linear_attention_is_fp32_inside_and_a_16_bit_product_is_caught() -> None:
    check_islands(attention(lambda body: body), SPEC)
    with pytest.raises(BuildError, match=r"linear attention: ReduceSum .* has k_fp32\w* in float16"):
        check_islands(
            attention(
                lambda body: body.replace("to: int = 1", "to: int = 10").replace("to = 1>", "to = 10>")
            ),
            SPEC,
        )


def test_a_tensor_of_unknown_type_does_not_pass_the_check() -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (x) => (y) {{ u = other.Mystery (x) y = Softmax (u) }}".replace("ditc", "other")
    )
    with pytest.raises(BuildError, match="has u in an unknown type"):
        check_islands(model, SPEC)
