"""The op against its fp64 definition: in eager PyTorch, in ONNX, and as the TensorRT-RTX parser reads it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.inliner import inline_local_functions
from torch import Tensor

from ditc.export.graph.ops import add_functions, onnx_translations
from ditc.export.graph.ops.relu_linear_attention.onnx_function import DOMAIN, OP_TYPE, function_proto
from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference
from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention

ONNX_TYPES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# fp32 sums of positive terms, whose rounding grows with the square root of a few hundred terms. Measured 2e-7.
FP32_BOUND = 1e-6
# The result is rounded once, to 8 (bf16) or 11 (fp16) significand bits. The relative L2 error is below half an ulp.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def qkv(dtype: torch.dtype = torch.float32, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape or (2, 50, 3, 32), generator=generator).to(dtype) for _ in range(3))
    return q, k, v


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def onnx_model(dtype: torch.dtype, eps: float = DIFFUSERS_EPS) -> onnx.ModelProto:
    """A model with one ReluLinearAttention node and its function."""
    t = ONNX_TYPES[dtype]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "{DOMAIN}" : 1]>
        graph ({t}[B,N,H,D] q, {t}[B,N,H,D] k, {t}[B,N,H,D] v) => ({t}[B,N,H,D] out)
        {{ out = {DOMAIN}.{OP_TYPE} <eps = {eps:.9e}> (q, k, v) }}"""
    )
    function = function_proto()
    function.opset_import[0].version = 20
    model.functions.append(function)
    return model


def run(model: onnx.ModelProto, *feeds: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in feeds), strict=True)))[0])


@pytest.mark.parametrize("shape", [(2, 50, 3, 32), (1, 7, 5, 72), (3, 1, 1, 8)])
def test_the_torch_op_computes_the_fp64_definition(shape: tuple[int, ...]) -> None:
    inputs = qkv(torch.float32, *shape)
    expected = relu_linear_attention_reference(*inputs, DIFFUSERS_EPS)
    assert relative_l2(relu_linear_attention(*inputs, DIFFUSERS_EPS), expected) <= FP32_BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_lose_no_more_than_the_rounding_of_the_result(dtype: torch.dtype) -> None:
    inputs = qkv(dtype)
    out = relu_linear_attention(*inputs, DIFFUSERS_EPS)
    assert out.dtype == dtype
    assert relative_l2(out, relu_linear_attention_reference(*inputs, DIFFUSERS_EPS)) <= ROUNDING[dtype]


def test_sums_beyond_the_range_of_fp16_stay_finite_and_right() -> None:
    q, k, v = (60 * x for x in qkv(torch.float16, 1, 512, 2, 32))
    scores = q.float().relu().transpose(1, 2) @ k.float().relu().permute(0, 2, 3, 1)
    assert scores.sum(-1).max() > torch.finfo(torch.float16).max  # otherwise this test shows nothing
    out = relu_linear_attention(q, k, v, DIFFUSERS_EPS)
    assert (
        relative_l2(out, relu_linear_attention_reference(q, k, v, DIFFUSERS_EPS)) <= ROUNDING[torch.float16]
    )


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
def test_a_query_without_positive_values_gives_zeros_not_nan(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    assert relu_linear_attention(-q.abs(), k, v, DIFFUSERS_EPS).count_nonzero() == 0


def test_the_torch_op_keeps_the_contracts_of_torch_library() -> None:
    torch.library.opcheck(
        torch.ops.ditc.relu_linear_attention.default,
        (*qkv(), DIFFUSERS_EPS),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("eps", [DIFFUSERS_EPS, 1.0])
def test_the_onnx_function_computes_the_fp64_definition(eps: float) -> None:
    model = onnx_model(torch.float32, eps)
    onnx.checker.check_model(model, full_check=True)
    inputs = qkv()
    assert relative_l2(run(model, *inputs), relu_linear_attention_reference(*inputs, eps)) <= FP32_BOUND


def test_eps_matters_in_the_definition() -> None:
    inputs = qkv()
    one, tiny = (relu_linear_attention_reference(*inputs, eps) for eps in (1.0, DIFFUSERS_EPS))
    assert relative_l2(one, tiny) > 1e3 * FP32_BOUND  # so the test above notices an attribute that is ignored


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
def test_the_onnx_function_computes_in_fp32_for_every_input_type(dtype: torch.dtype) -> None:
    inlined = inline_local_functions(onnx_model(dtype))
    graph = onnx.shape_inference.infer_shapes(inlined, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    island = [node for node in graph.node if node.op_type in ("MatMul", "Add", "Div", "ReduceSum")]
    assert len(island) == 6
    assert {types[node.output[0]] for node in island} == {onnx.TensorProto.FLOAT}


def test_the_onnx_function_takes_fp16_through_onnx_runtime() -> None:
    inputs = qkv(torch.float16)
    out = run(onnx_model(torch.float16), *inputs)
    assert (
        relative_l2(out, relu_linear_attention_reference(*inputs, DIFFUSERS_EPS)) <= ROUNDING[torch.float16]
    )


class Attention(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, 2, 16)).unbind(2)
        return relu_linear_attention(q, k, v, DIFFUSERS_EPS)


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
def test_an_exported_graph_holds_one_node_and_one_function(dtype: torch.dtype) -> None:
    batch, tokens = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("tokens", min=1, max=64)
    program = torch.onnx.export(
        Attention().eval(),
        (torch.randn(2, 9, 96, dtype=dtype),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: batch, 1: tokens},),
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    assert program is not None
    add_functions(program.model)
    nodes = [node.op_type for node in program.model.graph if node.domain == DOMAIN]
    assert nodes == [OP_TYPE]
    assert list(program.model.functions) == [(DOMAIN, OP_TYPE, "")]
    onnx.checker.check_model(program.model_proto)
    if dtype == torch.float32:  # at another shape; ONNX Runtime's CPU provider has no bf16
        x = torch.randn(3, 20, 96)
        assert relative_l2(run(program.model_proto, x), Attention()(x)) <= FP32_BOUND


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
def test_the_tensorrt_rtx_parser_reads_the_function_with_an_fp32_island(dtype: torch.dtype) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(onnx_model(dtype).SerializeToString()), parser.get_error(0)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    ratio = [layer for layer in layers if "ratio" in layer.name and layer.type == trt.LayerType.ELEMENTWISE]
    assert len(products) == 3 and len(ratio) == 1
    assert {layer.get_output(0).dtype for layer in products + ratio} == {trt.float32}
    expected = {torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16}[dtype]
    assert network.get_output(0).dtype == expected


def test_the_definition_agrees_with_diffusers() -> None:
    attention = pytest.importorskip("diffusers.models.attention_processor")
    q, k, v = qkv()
    identity = attention.Attention(96, heads=3, dim_head=32, processor=attention.SanaLinearAttnProcessor2_0())
    for layer, value in ((identity.to_q, q), (identity.to_k, k), (identity.to_v, v)):
        layer.forward = lambda _, value=value: value.flatten(2)
    identity.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with torch.no_grad():
        out = identity(torch.zeros(2, 50, 96)).unflatten(2, (3, 32))
    assert relative_l2(out, relu_linear_attention_reference(q, k, v, DIFFUSERS_EPS)) <= FP32_BOUND
    assert np.isfinite(out.numpy()).all()
