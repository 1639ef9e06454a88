"""bf16 and FP8 numbers, which NumPy does not have, as unsigned integers of their bits.

A bf16 number is the upper half of an fp32 one. FP8 is E4M3 without infinities (arXiv 2209.05433): a sign, four bits of
an exponent with the bias 7, three bits of a fraction, and 448 as the largest number.
"""

from __future__ import annotations

import numpy as np

from ditc.runtime.session import Array

BF16_BITS, FP8_BITS = np.dtype(np.uint16), np.dtype(np.uint8)
FP8_MAX = 448.0
# The smallest normal number of E4M3, and how many of its steps below are one.
FP8_SMALLEST_NORMAL, FP8_STEPS_OF_ONE = 2.0**-6, 2.0**9


def widened(stored: Array) -> Array:
    """The numbers in fp32, from floats or integers of their own type, or from the bits of bf16 or FP8."""
    if stored.dtype == BF16_BITS:
        wide: Array = (np.asarray(stored, np.uint32) << 16).view(np.float32)
        return wide
    return FP8_VALUES[stored] if stored.dtype == FP8_BITS else np.asarray(stored, np.float32)


def rounded_as(values: Array, like: np.dtype[np.generic]) -> Array:
    """Finite fp32 values in a float type, or as the bits of bf16: the nearest number, of two the even one."""
    if like != BF16_BITS:
        return values.astype(like, copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def fp8_bits(values: Array) -> Array:
    """The bits of fp32 values, rounded to the nearest FP8 number, of two to the even one. Larger values saturate."""
    magnitude = np.minimum(np.abs(values, dtype=np.float32), np.float32(FP8_MAX))
    bits = np.ascontiguousarray(magnitude).view(np.uint32)
    # The exponent and the first three bits of the fraction, with the bias of fp32 (127) in place of E4M3's.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).astype(np.int32) - ((127 - 7) << 3)
    small = np.rint(magnitude * np.float32(FP8_STEPS_OF_ONE)).astype(np.int32)
    code = np.where(magnitude < FP8_SMALLEST_NORMAL, small, normal)
    signed: Array = (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
    return signed


def _fp8_values() -> Array:
    """What each of the 256 bit patterns stands for; 0x7f and 0xff are NaN."""
    code = np.arange(128)
    exponent, fraction = code >> 3, code & 7
    normal = (8 + fraction) * 2.0 ** (exponent - 10)
    positive = np.where(exponent > 0, normal, fraction / FP8_STEPS_OF_ONE)
    positive[127] = np.nan
    values: Array = np.concatenate([positive, -positive]).astype(np.float32)
    return values


FP8_VALUES = _fp8_values()
