"""RMS norms as the standard RMSNormalization, which opset 23 brought: nine nodes become one, statistics stay fp32.

What `models/layers.RMSNorm` exports on tokens, x / sqrt(mean(x^2) + eps) in fp32, cast back, times the weight, is what
ONNX defines RMSNormalization to be with stash_type fp32. A norm over another dimension than the last stays as it is.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewritePass, pattern

STANDARD_FROM = 23
FP32 = int(ir.DataType.FLOAT)


def fuse_rms_norms(model: ir.Model) -> None:
    """Replace every RMS norm over the last dimension, in place; graphs of older opsets are left as they are."""
    if model.opset_imports[""] >= STANDARD_FROM:
        RewritePass(RULES)(model)


class _RmsNorm(pattern.RewriteRuleClassBase):
    """A norm of fp32 tokens, or of 16-bit ones between two Casts."""

    def __init__(self, name: str, *, is_cast: bool) -> None:
        super().__init__(name)
        self.is_cast = is_cast

    def pattern(self, op: Any, x: Any, weight: Any, two: Any, axes: Any, epsilon: Any, low: Any) -> Any:
        wide = op.Cast(x, to=FP32) if self.is_cast else x
        mean = op.ReduceMean(op.Pow(wide, two), axes, _allow_other_attributes=True)
        normed = op.Div(wide, op.Sqrt(op.Add(mean, epsilon)))
        return op.Mul(op.Cast(normed, to=low) if self.is_cast else normed, weight)

    # onnxscript types the result as MatchResult; its own examples return a bool, which it takes.
    def check(  # type: ignore[override]
        self, context: Any, x: Any, weight: Any, two: Any, axes: Any, epsilon: Any, **_: Any
    ) -> bool:
        return (
            _constant(two) == 2
            and _constant(axes) in (-1, None if x.shape is None else len(x.shape) - 1)
            and _constant(epsilon) is not None
            and weight.shape is not None
            and len(weight.shape) == 1
        )

    def rewrite(self, op: Any, x: Any, weight: Any, epsilon: Any, **_: Any) -> Any:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=_constant(epsilon), stash_type=FP32)


def _constant(value: ir.Value | None) -> float | None:
    """The value of a constant of one element."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


# onnxscript 0.7.2 left `rule` untyped.
RULES = (
    _RmsNorm.rule("rms_norm", is_cast=False),  # type: ignore[no-untyped-call]
    _RmsNorm.rule("rms_norm_16_bit", is_cast=True),  # type: ignore[no-untyped-call]
)
