"""A changed weight in 8 bits: new codes and new scales, so that no value is cut off.

The rules are those of a build (export/quant/formats.py): value = scale * code, one scale per output channel, zero
point 0. INT8 gets the scale largest magnitude / 127. FP8's scale stays, for a build chooses among several, and is
raised where a value would exceed 448.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ditc.runtime.errors import BundleError
from ditc.runtime.lora.lora import Change, changed
from ditc.runtime.number_formats import FP8_BITS, FP8_MAX, fp8_bits, rounded_as, widened
from ditc.runtime.session import Array
from ditc.runtime.weight_map import LOSSLESS, Weight, apply, invert

INT8_MAX = 127.0


def requantized(
    weight: Weight,
    stored: Mapping[str, Array],
    changes: Sequence[Change],
    original: Array | None = None,
) -> dict[str, Array]:
    """The new codes of a weight, and its new scales, by the names of their initializers.

    Args:
        stored: the initializers of the weight: its codes, its scales and, with smoothing, the reciprocals of its
            factors. Codes of FP8, and numbers of bf16, as unsigned integers of their bits.
        original: the weight's values before they were quantized, in the checkpoint's shape. Without them, the sum is
            made from the dequantized values, and so is rounded twice.

    Raises:
        BundleError: the map does not say how the values were quantized.
    """
    how = weight.codes
    if how is None:
        raise BundleError(
            f"the weight map does not say how {weight.initializer} was quantized",
            hint="build the bundle again",
        )
    wide = {name: widened(array) for name, array in stored.items()}
    own = invert(weight, wide[weight.initializer], wide) if original is None else original
    lossless = tuple(t for t in weight.transforms if t in LOSSLESS)
    plain = replace(weight, transforms=lossless, codes=None)
    matrix = apply(plain, changed(own, changes), stored_shape=stored[weight.initializer].shape)
    if how.reciprocals is not None:
        matrix = matrix / np.expand_dims(wide[how.reciprocals], how.axis)
    is_fp8 = stored[weight.initializer].dtype == FP8_BITS
    scales = _scales(matrix, how.axis, wide[how.scale], stored[how.scale].dtype, is_fp8=is_fp8)
    ratio = matrix / np.expand_dims(widened(scales), [a for a in range(matrix.ndim) if a != how.axis])
    codes = fp8_bits(ratio) if is_fp8 else np.clip(np.rint(ratio), -INT8_MAX, INT8_MAX).astype(np.int8)
    return {weight.initializer: np.ascontiguousarray(codes), how.scale: np.ascontiguousarray(scales)}


def _scales(matrix: Array, axis: int, recorded: Array, dtype: np.dtype[np.generic], *, is_fp8: bool) -> Array:
    """One scale per output channel, in the type of the graph's scales, in which none is subnormal."""
    amax = np.abs(matrix).max(axis=tuple(a for a in range(matrix.ndim) if a != axis))
    if is_fp8:
        needed = np.maximum(recorded.reshape(-1), amax / np.float32(FP8_MAX))
    else:
        needed = np.where(amax > 0, amax / np.float32(INT8_MAX), np.float32(1))
    # The exponents of bf16 are those of fp32.
    smallest = np.finfo(np.float16 if dtype == np.float16 else np.float32).smallest_normal
    return rounded_as(np.maximum(needed, np.float32(smallest)).astype(np.float32), dtype)
