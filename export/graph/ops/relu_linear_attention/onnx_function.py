"""`ditc::ReluLinearAttention` for ONNX: a node, and a function of standard ops that any runtime can inline.

The op must not be called LinearAttention: the TensorRT parsers take that name in any domain (seen with
TensorRT-RTX 1.7.1), and ONNX's own LinearAttention (opset 27) is causal.
"""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript import values

DOMAIN = "ditc"
OP_TYPE = "ReluLinearAttention"

# Token-major, with the denominator as a product of its own. With a row of ones in v, as in diffusers and torch_op.py,
# the transposes are slower and the result must be cut apart: 0.98 ms instead of 1.69 in OpenVINO 2026.4.1, and 1.93
# instead of 2.04 in ONNX Runtime 1.32 (2x256 tokens, 36 heads of 32, fp32, two cores of a Xeon with avx512).
# Transposes come before the casts, because in a 16-bit graph they then move half the bytes.
_BODY = """
<domain: "ditc", overload: "", opset_import: ["": 18]>
ReluLinearAttention <eps: float> (q, k, v) => (out)
{
    q_relu = Relu (q)
    k_relu = Relu (k)
    q_BHND = Transpose <perm = [0, 2, 1, 3]> (q_relu)
    k_BHDN = Transpose <perm = [0, 2, 3, 1]> (k_relu)
    v_BHND = Transpose <perm = [0, 2, 1, 3]> (v)
    q_fp32 = Cast <to = 1> (q_BHND)
    k_fp32 = Cast <to = 1> (k_BHDN)
    v_fp32 = Cast <to = 1> (v_BHND)
    tokens = Constant <value_ints = [3]> ()
    sum_BHD1 = ReduceSum (k_fp32, tokens)
    kv_BHDD = MatMul (k_fp32, v_fp32)
    numerator = MatMul (q_fp32, kv_BHDD)
    denominator = MatMul (q_fp32, sum_BHD1)
    eps_fp32 = Constant <value_float: float = @eps> ()
    positive = Add (denominator, eps_fp32)
    ratio_BHND = Div (numerator, positive)
    ratio_BNHD = Transpose <perm = [0, 2, 1, 3]> (ratio_BHND)
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
