"""ditc::attention: the op, its plain nodes and the standard op are one function, with an fp32 softmax."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.graph.ops import onnx_translations
from ditc.export.graph.ops.attention.reference import attention_reference
from ditc.export.graph.ops.attention.torch_op import MASKED, attention

HEADS, DIM = 3, 16
SCALE = DIM**-0.5
# Each product rounds once and has a few dozen terms. Measured 2e-7.
FP32_BOUND = 1e-6
# Inputs and output are rounded, and the weights once. Measured 4e-4 and 3e-3.
BOUNDS_16_BIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


CAP = 1.5  # scores of these inputs reach 4, so the cap changes most of them
KINDS = [(False, 0.0), (True, 0.0), (False, CAP), (True, CAP)]  # masked, soft cap


class Network(nn.Module):
    """Attention with and without a mask and a soft cap."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        bias = bias_of(mask)
        return tuple(attention(q, k, v, SCALE, bias if masked else None, cap) for masked, cap in KINDS)


def bias_of(mask: Tensor) -> Tensor:
    return (1 - mask[:, None, None]) * MASKED


def inputs(batch: int, queries: int, keys: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = (queries, keys, keys)
    return [scale * torch.randn(batch, size, HEADS, DIM, generator=generator) for size in sizes]


def key_mask(batch: int, keys: int) -> Tensor:
    """(B,S): all keys of the first sample, every second key of the next, and no key of the last."""
    mask = torch.ones(batch, keys)
    mask[1, 1::2], mask[-1] = 0, 0
    return mask


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def exported(opset: int, dtype: torch.dtype = torch.float32):
    batch, queries, keys = (Dim(name, min=1, max=most) for name, most in (("b", 9), ("n", 99), ("s", 99)))
    program = torch.onnx.export(
        Network().eval(),
        (*(x.to(dtype) for x in inputs(2, 7, 9)), key_mask(2, 9)),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: batch, 1: queries}, *({0: batch, 1: keys} for _ in range(3))),
        custom_translation_table=onnx_translations(opset),
        verbose=False,
    )
    assert program is not None
    return program


@pytest.mark.parametrize("size", [(2, 7, 7), (3, 5, 11), (1, 1, 1)])
def test_the_op_computes_its_definition(size) -> None:
    values = inputs(*size)
    assert relative_l2(attention(*values, SCALE), attention_reference(*values, SCALE)) <= FP32_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, *BOUNDS_16_BIT])
@pytest.mark.parametrize("softcap", [0.0, CAP])
def test_the_soft_cap_comes_before_the_bias_and_a_row_of_masked_keys_is_finite(softcap, dtype) -> None:
    values, mask = [x.to(dtype) for x in inputs(3, 5, 11)], key_mask(3, 11)
    out = attention(*values, SCALE, bias_of(mask), softcap)
    exact = attention_reference(*values, SCALE, bias_of(mask), softcap)
    assert relative_l2(out, exact) <= BOUNDS_16_BIT.get(dtype, FP32_BOUND)
    alone = [
        values[0][1:2],
        *(x[1:2, ::2] for x in values[1:]),
    ]  # the second sample with the keys that it has
    assert relative_l2(out[1:2], attention_reference(*alone, SCALE, None, softcap)) <= BOUNDS_16_BIT.get(
        dtype, FP32_BOUND
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", list(BOUNDS_16_BIT))
def test_16_bit_inputs_give_16_bit_outputs_close_to_the_definition(dtype) -> None:
    values = [x.to(dtype) for x in inputs(2, 33, 65)]
    out = attention(*values, SCALE)
    assert out.dtype == dtype
    assert relative_l2(out, attention_reference(*values, SCALE)) <= BOUNDS_16_BIT[dtype]


def test_unscaled_scores_beyond_fp16_give_finite_results() -> None:
    # |q.k| could reach 16 * 150^2 = 3.6e5. Scaled by a quarter that is at most 9e4, and 2e4 for these values.
    values = [x.half() for x in inputs(1, 8, 8, scale=40.0)]
    values[0][0, 0], values[1][0, 0] = 100.0, 50.0  # 16 * 5000 = 8e4: Inf in fp16
    assert attention(*values, SCALE).isfinite().all()


@pytest.mark.parametrize("opset", [20, 23])
def test_the_graph_computes_the_definition_at_another_shape(opset) -> None:
    session = onnxruntime.InferenceSession(exported(opset).model_proto.SerializeToString())
    other, mask = inputs(3, 4, 6), key_mask(3, 6)
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, (np.asarray(x) for x in (*other, mask)), strict=True))
    for (masked, softcap), result in zip(KINDS, session.run(None, feeds), strict=True):
        out = torch.from_numpy(result)
        assert out.isfinite().all()
        exact = attention_reference(*other, SCALE, bias_of(mask) if masked else None, softcap)
        kept = slice(0, 2 if masked else 3)  # the result of a sample without keys means nothing
        assert relative_l2(out[kept], exact[kept]) <= FP32_BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_soft_cap_and_mask_of_a_16_bit_graph_are_fp32_in_plain_nodes(dtype) -> None:
    nodes = list(exported(20, dtype).model.graph)
    # The masked and the unmasked form with a cap share their capped scores.
    for name, count in (("Softmax", 4), ("Tanh", 1), ("Add", 2)):
        found = [node for node in nodes if node.op_type == name]
        assert len(found) == count
        assert {value.dtype.name for node in found for value in node.inputs} == {"FLOAT"}
    products = [node for node in nodes if node.op_type == "MatMul"]
    assert {value.dtype.name for node in products for value in node.inputs} <= {"FLOAT16", "BFLOAT16"}


def test_the_standard_op_has_an_fp32_softmax_its_own_soft_cap_and_a_mask_of_the_querys_type() -> None:
    nodes = list(exported(23, torch.float16).model.graph)
    assert not {"Softmax", "Tanh", "MatMul"} & {node.op_type for node in nodes}
    found = [node for node in nodes if node.op_type == "Attention"]
    for (masked, softcap), node in zip(KINDS, found, strict=True):
        assert node.attributes["softmax_precision"].as_int() == 1
        assert node.attributes["softcap"].as_float() == softcap
        assert len(node.outputs) == 1 and len(node.inputs) == (4 if masked else 3)
        assert {value.dtype.name for value in node.inputs} == {"FLOAT16"}
