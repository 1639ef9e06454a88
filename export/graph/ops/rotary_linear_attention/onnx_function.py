"""`ditc::RotaryLinearAttention` for ONNX: a node, and a function of standard ops that any runtime can inline."""

# B batch, N tokens, H heads, D head dim, E = D/2 pairs

from __future__ import annotations

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript import values

from ditc.export.graph.ops.relu_linear_attention.onnx_function import DOMAIN

OP_TYPE = "RotaryLinearAttention"

# Rotated q and k have the first members of all pairs before the second ones. Their product does not depend on the
# order of channels, so no step interleaves them again. Rotation is token-major, where the tables need no transpose.
_BODY = """
<domain: "ditc", overload: "", opset_import: ["": 18]>
RotaryLinearAttention <eps: float> (q, k, v, cos, sin) => (out)
{
    q_relu = Relu (q)
    k_relu = Relu (k)
    q_BNHD = Cast <to = 1> (q_relu)
    k_BNHD = Cast <to = 1> (k_relu)
    heads = Constant <value_ints = [1]> ()
    cos_N1E = Unsqueeze (cos, heads)
    sin_N1E = Unsqueeze (sin, heads)
    even = Constant <value_ints = [0]> ()
    odd = Constant <value_ints = [1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    channels = Constant <value_ints = [3]> ()
    two = Constant <value_ints = [2]> ()
    q_first = Slice (q_BNHD, even, end, channels, two)
    q_second = Slice (q_BNHD, odd, end, channels, two)
    q_first_cos = Mul (q_first, cos_N1E)
    q_second_sin = Mul (q_second, sin_N1E)
    q_first_sin = Mul (q_first, sin_N1E)
    q_second_cos = Mul (q_second, cos_N1E)
    q_real = Sub (q_first_cos, q_second_sin)
    q_imaginary = Add (q_first_sin, q_second_cos)
    q_turned = Concat <axis = 3> (q_real, q_imaginary)
    k_first = Slice (k_BNHD, even, end, channels, two)
    k_second = Slice (k_BNHD, odd, end, channels, two)
    k_first_cos = Mul (k_first, cos_N1E)
    k_second_sin = Mul (k_second, sin_N1E)
    k_first_sin = Mul (k_first, sin_N1E)
    k_second_cos = Mul (k_second, cos_N1E)
    k_real = Sub (k_first_cos, k_second_sin)
    k_imaginary = Add (k_first_sin, k_second_cos)
    k_turned = Concat <axis = 3> (k_real, k_imaginary)
    q_BHND = Transpose <perm = [0, 2, 1, 3]> (q_turned)
    k_BHDN = Transpose <perm = [0, 2, 3, 1]> (k_turned)
    v_BHND = Transpose <perm = [0, 2, 1, 3]> (v)
    v_fp32 = Cast <to = 1> (v_BHND)
    kv_BHDD = MatMul (k_BHDN, v_fp32)
    numerator_BHND = MatMul (q_BHND, kv_BHDD)
    numerator = Transpose <perm = [0, 2, 1, 3]> (numerator_BHND)
    tokens = Constant <value_ints = [1]> ()
    sum_B1HD = ReduceSum (k_BNHD, tokens)
    q_by_sum = Mul (q_BNHD, sum_B1HD)
    denominator = ReduceSum (q_by_sum, channels)
    eps_fp32 = Constant <value_float: float = @eps> ()
    positive = Add (denominator, eps_fp32)
    ratio = Div (numerator, positive)
    out = CastLike (ratio, q)
}
"""


def function_proto() -> onnx.FunctionProto:
    """The op's body: q, k, v (B,N,H,D) of one float type, cos and sin (N,D/2) fp32 -> (B,N,H,D) of q's type."""
    return onnx.parser.parse_function(_BODY)


def translate(q: Any, k: Any, v: Any, cos: Any, sin: Any, eps: float) -> Any:
    """Put one RotaryLinearAttention node into the graph that torch.onnx.export is building."""
    return _node(q, k, v, cos, sin, eps=eps)


def _schema() -> OpSchema:
    tensor = OpSchema.FormalParameter
    return OpSchema(
        OP_TYPE,
        DOMAIN,
        1,
        inputs=[
            *(tensor(name, "T") for name in ("q", "k", "v")),
            *(tensor(name, "tensor(float)") for name in ("cos", "sin")),
        ],
        outputs=[tensor("out", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[OpSchema.Attribute("eps", OpSchema.AttrType.FLOAT, "added to the denominator")],
    )


_node = values.Op(values.Opset(DOMAIN, 1), OP_TYPE, _schema())
