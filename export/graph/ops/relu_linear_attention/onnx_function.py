"""`ditc::ReluLinearAttention` for ONNX: a node, and a function of standard ops that any runtime can inline.

The op must not be called LinearAttention: the TensorRT parsers take that name in any domain (seen with
TensorRT-RTX 1.7.1), and ONNX's own LinearAttention (opset 27) is causal.
"""

# B batch, N tokens, H heads, D head dim, E = D + 1

from __future__ import annotations

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript import values

DOMAIN = "ditc"
OP_TYPE = "ReluLinearAttention"

# Transposes come before the casts, because in a 16-bit graph they then move half the bytes. diffusers' channel-major
# products are faster than token-major ones on ONNX Runtime 1.31's CPU provider (2x256 tokens, 36 heads of 32: 4.3 ms
# against 7.0 ms).
_BODY = """
<domain: "ditc", overload: "", opset_import: ["": 18]>
ReluLinearAttention <eps: float> (q, k, v) => (out)
{
    q_relu = Relu (q)
    k_relu = Relu (k)
    q_BHDN = Transpose <perm = [0, 2, 3, 1]> (q_relu)
    k_BHND = Transpose <perm = [0, 2, 1, 3]> (k_relu)
    v_BHDN = Transpose <perm = [0, 2, 3, 1]> (v)
    q_fp32 = Cast <to = 1> (q_BHDN)
    k_fp32 = Cast <to = 1> (k_BHND)
    v_fp32 = Cast <to = 1> (v_BHDN)
    row = Constant <value_ints = [0, 0, 0, 0, 0, 0, 1, 0]> ()
    one = Constant <value_float = 1.0> ()
    v1_BHEN = Pad (v_fp32, row, one)
    kv_BHED = MatMul (v1_BHEN, k_fp32)
    product_BHEN = MatMul (kv_BHED, q_fp32)
    axis = Constant <value_ints = [2]> ()
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    numerator = Slice (product_BHEN, first, last, axis)
    denominator = Slice (product_BHEN, last, end, axis)
    eps_fp32 = Constant <value_float: float = @eps> ()
    positive = Add (denominator, eps_fp32)
    ratio_BHDN = Div (numerator, positive)
    ratio_BNHD = Transpose <perm = [0, 3, 1, 2]> (ratio_BHDN)
    out = CastLike (ratio_BNHD, q)
}
"""


def function_proto() -> onnx.FunctionProto:
    """The op's body: q, k, v (B,N,H,D) of one float type -> (B,N,H,D) of that type, in fp32 after the ReLU."""
    return onnx.parser.parse_function(_BODY)


def translate(q: Any, k: Any, v: Any, eps: float) -> Any:
    """Put one ReluLinearAttention node into the graph that torch.onnx.export is building."""
    return _node(q, k, v, eps=eps)


def _schema() -> OpSchema:
    tensor = OpSchema.FormalParameter
    return OpSchema(
        OP_TYPE,
        DOMAIN,
        1,
        inputs=[tensor("q", "T"), tensor("k", "T"), tensor("v", "T")],
        outputs=[tensor("out", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[OpSchema.Attribute("eps", OpSchema.AttrType.FLOAT, "added to the denominator")],
    )


_node = values.Op(values.Opset(DOMAIN, 1), OP_TYPE, _schema())
