"""The op as TensorRT's quickly deployable plugin, as in relu_linear_attention/qdp.py. It was never executed either."""

# TensorRT reads the annotations of the functions below as objects. They are set by hand, because the library is
# imported only when it is used.

from typing import Any

from ditc.export.graph.ops.relu_linear_attention.onnx_function import DOMAIN
from ditc.export.graph.ops.relu_linear_attention.qdp import fused_launch, register_as
from ditc.export.graph.ops.rotary_linear_attention.onnx_function import OP_TYPE
from ditc.export.graph.ops.rotary_linear_attention.ptx import compile_fused

ID = f"{DOMAIN}::{OP_TYPE}"


def register_qdp(trt: Any) -> None:
    """Register the plugin with `tensorrt`, once per process."""

    def describe(q, k, v, cos, sin, eps):  # type: ignore[no-untyped-def]
        return q.like()

    def compiled(q, k, v, cos, sin, eps, outputs, tactic):  # type: ignore[no-untyped-def]
        return fused_launch(trt, q, eps, compile_fused)

    register_as(ID, ("q", "k", "v", "cos", "sin"), describe, compiled)
