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
from ditc.export.ops.attention.torch_op import MASKED, attention

HEADS, DIM = 3, 16
SCALE = DIM**-0.5
# One rounding a product, with a few dozen terms each. Measured 2e-7.
FP32_BOUND = 1e-6
# Rounded inputs and output, weights rounded once. Measured 4e-4 and 3e-3.
BOUNDS_16_BIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Network(nn.Module):
    def __init__(self, softcap: float = 0.0) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = None if mask is None else (1 - mask[:, None, None]) * MASKED
        out: Tensor = attention(q, k, v, SCALE, bias, self.softcap)
        return out


def inputs(batch: int, queries: int, keys: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = (queries, keys, keys)
    return [scale * torch.randn(batch, size, HEADS, DIM, generator=generator) for size in sizes]


def key_mask(batch: int, keys: int) -> Tensor:
    """(B,S): the first sample whole, every second key of the next, and no key of the last."""
    mask = torch.ones(batch, keys)
    mask[1, 1::2], mask[-1] = 0, 0
    return mask


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def exported(opset: int, dtype: torch.dtype = torch.float32, *, masked: bool = False, softcap: float = 0.0):
    tokens = [Dim(name, min=1, max=99) for name in ("queries", "keys")]
    batch = Dim("batch", min=1, max=9)
    masks = (key_mask(2, 9),) if masked else ()
    program = torch.onnx.export(
        Network(softcap).eval(),
        (*(x.to(dtype) for x in inputs(2, 7, 9)), *masks),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(*({0: batch, 1: tokens[i]} for i in (0, 1, 1, 1)[: 3 + len(masks)]),),
        custom_translation_table=onnx_translations(opset),
        verbose=False,
    )
    assert program is not None
    return program


@pytest.mark.parametrize("size", [(2, 7, 7), (3, 5, 11), (1, 1, 1)])
def test_the_op_is_its_definition(size) -> None:
    values = inputs(*size)
    assert relative_l2(attention(*values, SCALE), attention_reference(*values, SCALE)) <= FP32_BOUND


CAP = 1.5  # scores of these inputs reach 4: it bends most of them


@pytest.mark.parametrize("dtype", [torch.float32, *BOUNDS_16_BIT])
@pytest.mark.parametrize("softcap", [0.0, CAP])
def test_the_soft_cap_comes_before_the_bias_and_a_row_of_masked_keys_is_finite(softcap, dtype) -> None:
    values, mask = [x.to(dtype) for x in inputs(3, 5, 11)], key_mask(3, 11)
    out = Network(softcap)(*values, mask)
    exact = attention_reference(*values, SCALE, (1 - mask[:, None, None]) * MASKED, softcap)
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


def test_products_beyond_fp16_before_the_scale_stay_finite() -> None:
    # |q.k| reaches 16 * 150^2 = 3.6e5; a quarter of it is no more than 9e4 at most, and 2e4 here.
    values = [x.half() for x in inputs(1, 8, 8, scale=40.0)]
    values[0][0, 0], values[1][0, 0] = 100.0, 50.0  # 16 * 5000 = 8e4: Inf in fp16
    assert attention(*values, SCALE).isfinite().all()


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(("masked", "softcap"), [(False, 0.0), (True, 0.0), (False, CAP), (True, CAP)])
def test_the_graph_computes_the_definition_at_another_shape(opset, masked, softcap) -> None:
    program = exported(opset, masked=masked, softcap=softcap)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    other, mask = inputs(3, 4, 6), key_mask(3, 6)
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, (np.asarray(x) for x in (*other, mask)), strict=False))
    out = torch.from_numpy(session.run(None, feeds)[0])
    assert out.isfinite().all()
    bias = (1 - mask[:, None, None]) * MASKED if masked else None
    kept = slice(0, 2 if masked else 3)  # what a sample without keys gives is the caller's to discard
    assert relative_l2(out[kept], attention_reference(*other, SCALE, bias, softcap)[kept]) <= FP32_BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_of_a_16_bit_graph_is_fp32_in_either_form(dtype) -> None:
    plain = {node.op_type: node for node in exported(20, dtype, masked=True, softcap=CAP).model.graph}
    assert {plain[name].inputs[0].dtype.name for name in ("Softmax", "Tanh", "Add")} == {"FLOAT"}
    assert plain["MatMul"].inputs[0].dtype.name in ("FLOAT16", "BFLOAT16")
    standard = {node.op_type: node for node in exported(23, dtype).model.graph}
    assert set(standard) == {"Transpose", "Attention"}
    assert standard["Attention"].attributes["softmax_precision"].as_int() == 1
    assert len(standard["Attention"].outputs) == 1


def test_mask_and_soft_cap_are_the_standard_ops_own_and_the_mask_has_the_type_of_the_query() -> None:
    nodes = [node.op_type for node in exported(23, masked=True, softcap=CAP).model.graph]
    assert nodes.count("Attention") == 1 and not {"Softmax", "Tanh", "MatMul"} & set(nodes)
    (node,) = [
        node
        for node in exported(23, torch.float16, masked=True, softcap=CAP).model.graph
        if node.op_type == "Attention"
    ]
    assert node.attributes["softcap"].as_float() == CAP
    assert node.inputs[3].dtype == node.inputs[0].dtype
