"""`ditc::attention` in a graph: plain nodes in any opset, or one standard Attention from opset 23 on."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset20, opset23

FP32 = int(ir.DataType.FLOAT)
STANDARD_FROM = 23  # the opset that brought Attention


def translate_plain(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Two products around a softmax in fp32. q is scaled first: unscaled scores can pass fp16's range."""
    op = opset20
    q_BHND = op.Transpose(q, perm=[0, 2, 1, 3])
    k_BHDS = op.Transpose(k, perm=[0, 2, 3, 1])
    v_BHSD = op.Transpose(v, perm=[0, 2, 1, 3])
    scaled = op.Mul(q_BHND, op.CastLike(op.Constant(value_float=scale), q))
    weights_BHNS = op.Softmax(op.Cast(op.MatMul(scaled, k_BHDS), to=FP32), axis=-1)
    out_BHND = op.MatMul(op.CastLike(weights_BHNS, v), v_BHSD)
    return op.Transpose(out_BHND, perm=[0, 2, 1, 3])


def translate_standard(q: Any, k: Any, v: Any, scale: float) -> Any:
    """One Attention node on (B,H,N,D), the form that all its implementations take."""
    op = opset23
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    out_BHND = op.Attention(q, k, v, scale=scale, softmax_precision=FP32)
    return op.Transpose(out_BHND, perm=[0, 2, 1, 3])
