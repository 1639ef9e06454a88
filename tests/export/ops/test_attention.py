"""ditc::attention: the op, its plain nodes and the standard op are one function, with an fp32 softmax."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.ops import onnx_translations
from ditc.export.ops.attention.reference import attention_reference
from ditc.export.ops.attention.torch_op import attention

HEADS, DIM = 3, 16
SCALE = DIM**-0.5
# One rounding a product, with a few dozen terms each. Measured 2e-7.
FP32_BOUND = 1e-6
# Rounded inputs and output, weights rounded once. Measured 4e-4 and 3e-3.
BOUNDS_16_BIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Network(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(q, k, v, SCALE)
        return out


def inputs(batch: int, queries: int, keys: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = (queries, keys, keys)
    return [scale * torch.randn(batch, size, HEADS, DIM, generator=generator) for size in sizes]


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def exported(opset: int, dtype: torch.dtype = torch.float32):
    tokens = [Dim(name, min=1, max=99) for name in ("queries", "keys")]
    batch = Dim("batch", min=1, max=9)
    program = torch.onnx.export(
        Network().eval(),
        tuple(x.to(dtype) for x in inputs(2, 7, 9)),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=tuple({0: batch, 1: tokens[i]} for i in (0, 1, 1)),
        custom_translation_table=onnx_translations(opset),
        verbose=False,
    )
    assert program is not None
    return program


@pytest.mark.parametrize("size", [(2, 7, 7), (3, 5, 11), (1, 1, 1)])
def test_the_op_is_its_definition(size) -> None:
    values = inputs(*size)
    assert relative_l2(attention(*values, SCALE), attention_reference(*values, SCALE)) <= FP32_BOUND


@pytest.mark.parametrize("dtype", list(BOUNDS_16_BIT))
def test_16_bit_inputs_give_16_bit_outputs_close_to_the_definition(dtype) -> None:
    values = [x.to(dtype) for x in inputs(2, 33, 65)]
    out = attention(*values, SCALE)
    assert out.dtype == dtype
    assert relative_l2(out, attention_reference(*values, SCALE)) <= BOUNDS_16_BIT[dtype]


def test_products_beyond_fp16_before_the_scale_stay_finite() -> None:
    # |q.k| reaches 16 * 150^2 = 3.6e5; a quarter of it is no more than 9e4 at most, and 2e4 here.
    values = [x.half() for x in inputs(1, 8, 8, scale=40.0)]
    values[0][0, 0], values[1][0, 0] = 100.0, 50.0  # 16 * 5000 = 8e4: Inf in fp16
    assert attention(*values, SCALE).isfinite().all()


@pytest.mark.parametrize("opset", [20, 23])
def test_the_graph_computes_the_definition_at_another_shape(opset) -> None:
    program = exported(opset)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    other = inputs(3, 4, 6)
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, (np.asarray(x) for x in other), strict=True))
    out = torch.from_numpy(session.run(None, feeds)[0])
    assert relative_l2(out, attention_reference(*other, SCALE)) <= FP32_BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_of_a_16_bit_graph_is_fp32_in_either_form(dtype) -> None:
    plain = {node.op_type: node for node in exported(20, dtype).model.graph}
    assert plain["Softmax"].inputs[0].dtype.name == "FLOAT"
    assert plain["MatMul"].inputs[0].dtype.name in ("FLOAT16", "BFLOAT16")
    standard = {node.op_type: node for node in exported(23, dtype).model.graph}
    assert set(standard) == {"Transpose", "Attention"}
    assert standard["Attention"].attributes["softmax_precision"].as_int() == 1
    assert len(standard["Attention"].outputs) == 1
