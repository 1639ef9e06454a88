"""bf16 and FP8 in NumPy agree with ml_dtypes, which the runtime does not have."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ditc.runtime.number_formats import FP8_MAX, fp8_bits, rounded_as, widened


def values() -> np.ndarray:
    """Magnitudes of the whole range, every number of FP8, and the places halfway between two of them."""
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    random = np.exp2(np.random.default_rng(0).uniform(-12, 8.8, 4000)).astype(np.float32)
    positive = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, random])
    return np.concatenate([positive, -positive])


def test_fp8_is_rounded_and_read_as_ml_dtypes_does() -> None:
    wanted = np.clip(values(), -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    bits = fp8_bits(values())
    np.testing.assert_array_equal(bits, wanted.view(np.uint8))
    np.testing.assert_array_equal(widened(bits), wanted.astype(np.float32))
    assert fp8_bits(np.array([1e9, -1e9], np.float32)).tolist() == [0x7E, 0xFE]


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_bf16_is_rounded_and_read_as_ml_dtypes_does(scale: float) -> None:
    wanted = (values() * np.float32(scale)).astype(ml_dtypes.bfloat16)
    bits = rounded_as(values() * np.float32(scale), np.dtype(np.uint16))
    np.testing.assert_array_equal(bits, wanted.view(np.uint16))
    np.testing.assert_array_equal(widened(bits), wanted.astype(np.float32))
