"""`ditc::attention` in a graph: plain nodes in any opset, or one standard Attention from opset 23 on."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx.defs import OpSchema, get_schema
from onnxscript import opset20 as op
from onnxscript import values

FP32 = int(ir.DataType.FLOAT)
STANDARD = "Attention"
STANDARD_FROM = 23  # the opset that brought it


def translate_plain(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Two products around a softmax in fp32. q is scaled first: unscaled scores can pass fp16's range."""
    q_BHND = op.Transpose(q, perm=[0, 2, 1, 3])
    k_BHDS = op.Transpose(k, perm=[0, 2, 3, 1])
    v_BHSD = op.Transpose(v, perm=[0, 2, 1, 3])
    scaled = op.Mul(q_BHND, op.CastLike(op.Constant(value_float=scale), q))
    weights_BHNS = op.Softmax(op.Cast(op.MatMul(scaled, k_BHDS), to=FP32), axis=-1)
    out_BHND = op.MatMul(op.CastLike(weights_BHNS, v), v_BHSD)
    return op.Transpose(out_BHND, perm=[0, 2, 1, 3])


def translate_standard(q: Any, k: Any, v: Any, scale: float) -> Any:
    """One Attention node on (B,H,N,D), the form that all its implementations take."""
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    return op.Transpose(_standard(q, k, v, scale=scale, softmax_precision=FP32), perm=[0, 2, 1, 3])


def _one_output() -> values.Op:
    """The standard op with its first output alone.

    onnxscript 0.7.2 gives a node all outputs of its schema, and TensorRT's parser before 10.16 takes one only
    (NVIDIA/TensorRT #4738).
    """
    whole = get_schema(STANDARD, STANDARD_FROM)
    types = [
        (t.type_param_str, list(t.allowed_type_strs), t.description)
        for t in whole.type_constraints
        if t.type_param_str in ("T1", "T2")
    ]
    schema = OpSchema(
        STANDARD,
        "",
        STANDARD_FROM,
        inputs=list(whole.inputs)[:3],
        outputs=list(whole.outputs)[:1],
        type_constraints=types,
        attributes=[whole.attributes[name] for name in ("scale", "softmax_precision")],
    )
    return values.Op(values.Opset("", STANDARD_FROM), STANDARD, schema)


_standard = _one_output()
