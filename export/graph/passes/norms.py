"""Write RMS norms as RMSNormalization, which is standard since opset 23: nine nodes become one, statistics stay fp32.

On tokens `networks/layers.RMSNorm` exports x / sqrt(mean(x^2) + eps) in fp32, cast back and multiplied by the weight.
ONNX defines RMSNormalization with stash_type fp32 as the same. A norm over a dimension other than the last stays.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewritePass, pattern

STANDARD_FROM = 23
FP32 = int(ir.DataType.FLOAT)


def fuse_rms_norms(model: ir.Model) -> None:
    """Replace every RMS norm over the last dimension, in place. A graph of an older opset stays as it is."""
    if model.opset_imports[""] >= STANDARD_FROM:
        RewritePass(RULES)(model)


class _RmsNorm(pattern.RewriteRuleClassBase):
    """A norm of fp32 tokens, or of 16-bit tokens between two Casts."""

    def __init__(self, name: str, *, is_cast: bool) -> None:
        super().__init__(name)
        self.is_cast = is_cast

    def pattern(self, op: Any, x: Any, weight: Any, two: Any, axes: Any, epsilon: Any, narrow: Any) -> Any:
        wide = op.Cast(x, to=FP32) if self.is_cast else x
        mean = op.ReduceMean(op.Pow(wide, two), axes, _allow_other_attributes=True)
        normed = op.Div(wide, op.Sqrt(op.Add(mean, epsilon)))
        return op.Mul(op.Cast(normed, to=narrow) if self.is_cast else normed, weight)

    # onnxscript types the result as MatchResult, but it takes a bool too, as its own examples return.
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
    """The value of a constant with one element; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


# onnxscript 0.7.2 left `rule` untyped.
RULES = (
    _RmsNorm.rule("rms_norm", is_cast=False),  # type: ignore[no-untyped-call]
    _RmsNorm.rule("rms_norm_16_bit", is_cast=True),  # type: ignore[no-untyped-call]
)
