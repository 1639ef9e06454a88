"""The op against its fp64 definition and hyper-connections: in PyTorch, in ONNX, and in TensorRT-RTX's parser."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.inliner import inline_local_functions
from torch import Tensor

from ditc.export.graph.ops.sinkhorn.onnx_function import DOMAIN, OP_TYPE, function_proto
from ditc.export.graph.ops.sinkhorn.reference import sinkhorn_reference
from ditc.export.graph.ops.sinkhorn.torch_op import sinkhorn

# fp32 rounding of 40 divisions by sums of four positive terms. Measured 1e-7.
FP32_BOUND = 1e-6


def logits(*shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape or (2, 33, 4, 4), generator=torch.Generator().manual_seed(0))


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def onnx_model(iterations: int) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "{DOMAIN}" : 1]>
        graph (float[B,N,S,S] logits) => (float[B,N,S,S] out)
        {{ out = {DOMAIN}.{OP_TYPE} <iterations = {iterations}> (logits) }}"""
    )
    function = function_proto()
    function.opset_import[0].version = 20
    model.functions.append(function)
    return model


def run(model: onnx.ModelProto, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"logits": x.numpy()})[0])


@pytest.mark.parametrize("shape", [(2, 33, 4, 4), (1, 1, 2, 2), (3, 5, 7, 7)])
def test_the_torch_op_computes_the_fp64_definition(shape: tuple[int, ...]) -> None:
    x = logits(*shape)
    assert relative_l2(sinkhorn(x, 20), sinkhorn_reference(x, 20)) <= FP32_BOUND


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])  # at 60 some rows have a sum below the smallest of 1e-12
def test_the_torch_op_computes_what_upstream_computes(scale: float) -> None:
    upstream = pytest.importorskip("hyper_connections.mHCv2")
    x = logits(scale=scale)
    assert relative_l2(sinkhorn(x, 20), upstream.sinkhorn_knopps(x, iters=20)) <= FP32_BOUND


@pytest.mark.parametrize("iterations", [1, 20])
def test_the_onnx_function_computes_the_fp64_definition_at_any_shape(iterations: int) -> None:
    model = onnx_model(iterations)
    onnx.checker.check_model(model, full_check=True)
    for shape in ((2, 33, 4, 4), (1, 3, 2, 2)):
        x = logits(*shape)
        assert relative_l2(run(model, x), sinkhorn_reference(x, iterations)) <= FP32_BOUND


def test_iterations_matter_in_the_definition() -> None:
    x = logits()
    assert relative_l2(sinkhorn_reference(x, 1), sinkhorn_reference(x, 20)) > 100 * FP32_BOUND


def test_rows_and_columns_sum_to_one() -> None:
    out = sinkhorn(logits(scale=1.0), 20)
    for dim in (-1, -2):
        np.testing.assert_allclose(out.sum(dim).numpy(), 1.0, atol=1e-3)  # what 20 iterations reach


def test_the_torch_op_keeps_the_contracts_of_torch_library() -> None:
    torch.library.opcheck(
        torch.ops.ditc.sinkhorn.default, (logits(), 20), test_utils=("test_schema", "test_faketensor")
    )


def test_an_inlined_call_is_a_few_nodes_and_one_small_loop() -> None:
    inlined = inline_local_functions(onnx_model(20))
    (loop,) = [node for node in inlined.graph.node if node.op_type == "Loop"]
    assert len(inlined.graph.node) <= 12 and len(loop.attribute[0].g.node) <= 8


def test_the_tensorrt_rtx_parser_takes_the_loop() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    data = inline_local_functions(onnx_model(20)).SerializeToString()
    assert parser.parse(data), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.num_layers <= 40
