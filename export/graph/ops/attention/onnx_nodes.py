"""`ditc::attention` in a graph: plain nodes in any opset, or one standard Attention node from opset 23 on."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx.defs import OpSchema, get_schema
from onnxscript import opset20, values

# Any, because onnxscript types a result as a union of element types but refuses such a union as an operand.
op: Any = opset20

FP32 = int(ir.DataType.FLOAT)
STANDARD = "Attention"
STANDARD_FROM = 23  # the first opset that has it
FP16_LOWEST = -65504.0


def translate_plain(q: Any, k: Any, v: Any, scale: float, bias: Any = None, softcap: float = 0.0) -> Any:
    """Two products around an fp32 softmax. q is scaled first, because unscaled scores can exceed fp16's range."""
    q_BHND = op.Transpose(q, perm=[0, 2, 1, 3])
    k_BHDS = op.Transpose(k, perm=[0, 2, 3, 1])
    v_BHSD = op.Transpose(v, perm=[0, 2, 1, 3])
    scaled = op.Mul(q_BHND, op.CastLike(op.Constant(value_float=scale), q))
    scores_BHNS = op.Cast(op.MatMul(scaled, k_BHDS), to=FP32)
    if softcap:
        cap = op.Constant(value_float=softcap)
        scores_BHNS = op.Mul(op.Tanh(op.Div(scores_BHNS, cap)), cap)
    if bias is not None:
        scores_BHNS = op.Add(scores_BHNS, bias)
    weights_BHNS = op.Softmax(scores_BHNS, axis=-1)
    out_BHND = op.MatMul(op.CastLike(weights_BHNS, v), v_BHSD)
    return op.Transpose(out_BHND, perm=[0, 2, 1, 3])


def translate_standard(q: Any, k: Any, v: Any, scale: float, bias: Any = None, softcap: float = 0.0) -> Any:
    """One Attention node on (B,H,N,D) tensors, the layout that all its implementations take."""
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    attributes = {"scale": scale, "softmax_precision": FP32} | ({"softcap": softcap} if softcap else {})
    given = (q, k, v) if bias is None else (q, k, v, _mask(bias, q))
    return op.Transpose(_standard(*given, **attributes), perm=[0, 2, 1, 3])


def _mask(bias: Any, q_BHND: Any) -> Any:
    """The bias as attn_mask. The standard demands q's type, and ONNX Runtime 1.31 demands N rows.

    fp16 cannot hold MASKED: it would become -Inf, and a row of nothing but -Inf gives NaN. fp16's lowest number leaves
    a masked key no weight either.
    """
    queries = op.Shape(q_BHND, start=2, end=3)
    one = op.Constant(value_ints=[1])
    rows = op.Concat(one, one, queries, one, axis=0)
    return op.Expand(op.CastLike(op.Max(bias, op.Constant(value_float=FP16_LOWEST)), q_BHND), rows)


def _one_output() -> values.Op:
    """The standard op with its first output only.

    onnxscript 0.7.2 gives a node all outputs of its schema, but TensorRT's parser before 10.16 takes only one
    (NVIDIA/TensorRT #4738).
    """
    whole = get_schema(STANDARD, STANDARD_FROM)
    types = [
        (t.type_param_str, list(t.allowed_type_strs), t.description)
        for t in whole.type_constraints
        if t.type_param_str in ("T1", "T2", "U")
    ]
    schema = OpSchema(
        STANDARD,
        "",
        STANDARD_FROM,
        inputs=list(whole.inputs)[:4],
        outputs=list(whole.outputs)[:1],
        type_constraints=types,
        attributes=[whole.attributes[name] for name in ("scale", "softcap", "softmax_precision")],
    )
    return values.Op(values.Opset("", STANDARD_FROM), STANDARD, schema)


_standard = _one_output()
