"""The rotary op against its fp64 definition: in eager PyTorch, in ONNX, and as the TensorRT-RTX parser reads it."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx.inliner import inline_local_functions
from torch import Tensor

from ditc.export.graph.ops import add_functions, onnx_translations
from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS
from ditc.export.graph.ops.rotary_linear_attention.onnx_function import DOMAIN, OP_TYPE, function_proto
from ditc.export.graph.ops.rotary_linear_attention.reference import rotary_linear_attention_reference
from ditc.export.graph.ops.rotary_linear_attention.torch_op import rotary_linear_attention
from tests.export.graph.ops.test_relu_linear_attention import (
    FP32_BOUND,
    ONNX_TYPES,
    ROUNDING,
    qkv,
    relative_l2,
    run,
)

SHAPE = (2, 50, 3, 32)


def inputs(dtype: torch.dtype = torch.float32, *shape: int) -> tuple[Tensor, ...]:
    """q, k, v and the tables of positions up to a thousand."""
    _, tokens, _, dim = shape or SHAPE
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 2) / (dim // 2))
    angles = torch.linspace(0, 1000, tokens)[:, None] * frequencies
    return (*qkv(dtype, *(shape or SHAPE)), angles.cos(), angles.sin())


def onnx_model(dtype: torch.dtype, eps: float = DIFFUSERS_EPS) -> onnx.ModelProto:
    """A model with one RotaryLinearAttention node and its function."""
    t = ONNX_TYPES[dtype]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "{DOMAIN}" : 1]>
        graph ({t}[B,N,H,D] q, {t}[B,N,H,D] k, {t}[B,N,H,D] v, float[N,E] cos, float[N,E] sin)
            => ({t}[B,N,H,D] out)
        {{ out = {DOMAIN}.{OP_TYPE} <eps = {eps:.9e}> (q, k, v, cos, sin) }}"""
    )
    function = function_proto()
    function.opset_import[0].version = 20
    model.functions.append(function)
    return model


@pytest.mark.parametrize("shape", [SHAPE, (1, 7, 5, 112), (3, 1, 1, 8)])
def test_the_torch_op_computes_the_fp64_definition(shape: tuple[int, ...]) -> None:
    values = inputs(torch.float32, *shape)
    expected = rotary_linear_attention_reference(*values, DIFFUSERS_EPS)
    assert relative_l2(rotary_linear_attention(*values, DIFFUSERS_EPS), expected) <= FP32_BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_lose_no_more_than_the_rounding_of_the_result(dtype: torch.dtype) -> None:
    values = inputs(dtype)
    out = rotary_linear_attention(*values, DIFFUSERS_EPS)
    assert out.dtype == dtype
    assert relative_l2(out, rotary_linear_attention_reference(*values, DIFFUSERS_EPS)) <= ROUNDING[dtype]


def test_without_rotation_it_is_the_op_without_positions() -> None:
    from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference

    q, k, v, cos, sin = inputs()
    still = rotary_linear_attention_reference(q, k, v, torch.ones_like(cos), torch.zeros_like(sin), 1e-3)
    assert relative_l2(still, relu_linear_attention_reference(q, k, v, 1e-3)) <= FP32_BOUND


def test_a_query_without_positive_values_gives_zeros_not_nan() -> None:
    q, k, v, cos, sin = inputs()
    assert rotary_linear_attention(-q.abs(), k, v, cos, sin, DIFFUSERS_EPS).count_nonzero() == 0


def test_the_torch_op_keeps_the_contracts_of_torch_library() -> None:
    torch.library.opcheck(
        torch.ops.ditc.rotary_linear_attention.default,
        (*inputs(), DIFFUSERS_EPS),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("eps", [DIFFUSERS_EPS, 1.0])
def test_the_onnx_function_computes_the_fp64_definition(eps: float) -> None:
    model = onnx_model(torch.float32, eps)
    onnx.checker.check_model(model, full_check=True)
    values = inputs()
    assert relative_l2(run(model, *values), rotary_linear_attention_reference(*values, eps)) <= FP32_BOUND


def test_rotation_and_eps_matter_in_the_definition() -> None:
    """So the tests notice a rotation of the denominator, a missing one, and an attribute that is ignored."""
    q, k, v, cos, sin = inputs()
    right = rotary_linear_attention_reference(q, k, v, cos, sin, DIFFUSERS_EPS)
    for other in (
        rotary_linear_attention_reference(q, k, v, cos, sin, 1.0),
        rotary_linear_attention_reference(q, k, v, cos, -sin.flip(0), DIFFUSERS_EPS),
    ):
        assert relative_l2(other, right) > 1e3 * FP32_BOUND


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
def test_the_onnx_function_computes_in_fp32_for_every_input_type(dtype: torch.dtype) -> None:
    inlined = inline_local_functions(onnx_model(dtype))
    graph = onnx.shape_inference.infer_shapes(inlined, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    kinds = ("MatMul", "Add", "Sub", "Mul", "Div", "ReduceSum", "Slice", "Concat")
    island = [node for node in graph.node if node.op_type in kinds]
    assert len(island) == 25
    assert {types[node.output[0]] for node in island} == {onnx.TensorProto.FLOAT}


def test_the_onnx_function_takes_fp16_through_onnx_runtime() -> None:
    values = inputs(torch.float16)
    out = run(onnx_model(torch.float16), *values)
    expected = rotary_linear_attention_reference(*values, DIFFUSERS_EPS)
    assert relative_l2(out, expected) <= ROUNDING[torch.float16]


class Attention(torch.nn.Module):
    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, 2, 16)).unbind(2)
        return rotary_linear_attention(q, k, v, cos, sin, DIFFUSERS_EPS)


def test_an_exported_graph_holds_one_node_and_one_function() -> None:
    batch, tokens = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("tokens", min=1, max=64)
    program = torch.onnx.export(
        Attention().eval(),
        (torch.randn(2, 9, 96), torch.randn(9, 8), torch.randn(9, 8)),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: batch, 1: tokens}, {0: tokens}, {0: tokens}),
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    assert program is not None
    add_functions(program.model)
    assert [node.op_type for node in program.model.graph if node.domain == DOMAIN] == [OP_TYPE]
    assert list(program.model.functions) == [(DOMAIN, OP_TYPE, "")]
    onnx.checker.check_model(program.model_proto)
    x, angles = torch.randn(3, 20, 96), torch.randn(20, 8)  # another shape
    values = (x, angles.cos(), angles.sin())
    assert relative_l2(run(program.model_proto, *values), Attention()(*values)) <= FP32_BOUND


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
def test_the_tensorrt_rtx_parser_reads_the_function_with_an_fp32_island(dtype: torch.dtype) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(onnx_model(dtype).SerializeToString()), parser.get_error(0)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    turned = [
        layer for layer in layers if layer.type == trt.LayerType.CONCATENATION and "turned" in layer.name
    ]
    assert len(products) == 2 and len(turned) == 2
    assert {layer.get_output(0).dtype for layer in products + turned} == {trt.float32}
    expected = {torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16}[dtype]
    assert network.get_output(0).dtype == expected


def test_the_definition_agrees_with_diffusers() -> None:
    attention = pytest.importorskip("diffusers.models.attention_processor")
    video = pytest.importorskip("diffusers.models.transformers.transformer_sana_video")
    q, k, v, cos, sin = inputs()
    identity = attention.Attention(96, heads=3, dim_head=32, processor=video.SanaLinearAttnProcessor3_0())
    for layer, value in ((identity.to_q, q), (identity.to_k, k), (identity.to_v, v)):
        layer.forward = lambda _, value=value: value.flatten(2)
    identity.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    tables = [x.repeat_interleave(2, dim=1)[None, :, None] for x in (cos, sin)]
    with torch.no_grad():
        out = identity(torch.zeros(2, 50, 96), rotary_emb=tables).unflatten(2, (3, 32))
    expected = rotary_linear_attention_reference(q, k, v, cos, sin, DIFFUSERS_EPS)
    assert relative_l2(out, expected) <= FP32_BOUND
