"""Eight-bit formats: scales, rounding, and weights stored in them.

Quantization is symmetric, with zero point 0: value = scale * quantized value. INT8 uses -127..127. FP8 is E4M3 without
infinities (arXiv 2209.05433), whose largest value is 448. Both round to nearest even, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

from enum import StrEnum

import ml_dtypes
import numpy as np

from ditc.runtime.session import Array


class Format(StrEnum):
    """The storage format of a quantized tensor."""

    INT8 = "int8"
    FP8 = "fp8"


QUANTIZED_MAX = {Format.INT8: 127.0, Format.FP8: 448.0}
# Positions of an FP8 scale within an octave that are tried, and how many weights of a channel they are tried on.
SHIFTS = tuple(2 ** (i / 8) for i in range(8))
SAMPLED = 256
STORAGE_DTYPE = {Format.INT8: np.dtype(np.int8), Format.FP8: np.dtype(ml_dtypes.float8_e4m3fn)}


def scale_of(amax: Array | float, kind: Format, dtype: np.dtype[np.generic] | None = None) -> Array:
    """The scale amax / 127 or amax / 448, as the graph will hold it. An amax of zero gives scale 1.

    Args:
        dtype: type of the graph's scales, fp32 by default. A scale that would be subnormal in it (in fp16 below
            6.1e-5) would lose bits, so it is raised to the smallest normal number. Quantize with the returned scale.
    """
    dtype = np.dtype(np.float32) if dtype is None else dtype
    amax = np.asarray(amax, np.float64)
    scale = np.where(amax > 0, amax / QUANTIZED_MAX[kind], 1.0)
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
    return np.maximum(scale, smallest).astype(dtype)


def quantize(values: Array, scale: Array, kind: Format) -> Array:
    """Round the values to 8 bits. Values outside the range saturate."""
    ratio = values.astype(np.float32) / scale.astype(np.float32)
    largest = QUANTIZED_MAX[kind]
    if kind is Format.INT8:
        ratio = np.rint(ratio)
    return np.clip(ratio, -largest, largest).astype(STORAGE_DTYPE[kind])


def dequantize(quantized: Array, scale: Array) -> Array:
    """The fp32 values that quantized values stand for."""
    return quantized.astype(np.float32) * scale.astype(np.float32)


def fake_quantize(values: Array, scale: Array, kind: Format) -> Array:
    """Quantize the values and dequantize them again."""
    return dequantize(quantize(values, scale, kind), scale)


def channel_amax(weight: Array, axis: int) -> Array:
    """The largest magnitude over all axes except `axis`, with their sizes kept as 1: (1,O) for (I,O) and axis 1."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    amax: Array = np.abs(weight.astype(np.float32)).max(axis=others, keepdims=True)
    return amax


def weight_amax(weight: Array, axis: int, kind: Format) -> Array:
    """The magnitude that the largest quantized value of each output channel stands for, shaped as by channel_amax.

    For INT8 it is the channel's largest magnitude. FP8's step doubles at powers of two, so its error depends on where
    a channel's values lie between them: of eight positions within an octave, the one with the least squared error is
    taken. The error is computed on up to 256 of a channel's weights.
    """
    amax = channel_amax(weight, axis)
    if kind is Format.INT8:
        return amax
    columns = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    columns = columns[:, :: -(-columns.shape[1] // SAMPLED)]
    flat = np.where(amax > 0, amax, 1.0).reshape(-1, 1)
    errors = [
        np.square(fake_quantize(columns, scale_of(flat * shift, kind), kind) - columns).sum(axis=1)
        for shift in SHIFTS
    ]
    best = np.array(SHIFTS, np.float32)[np.argmin(errors, axis=0)]
    shifted: Array = amax * best.reshape(amax.shape)
    return shifted
