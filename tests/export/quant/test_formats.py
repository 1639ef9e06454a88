"""Scales and quantized values equal their formulas on tensors made by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ditc.export.quant.formats import (
    Format,
    channel_amax,
    dequantize,
    fake_quantize,
    quantize,
    scale_of,
    weight_amax,
)


def test_a_scale_is_amax_over_the_largest_quantized_value():
    amax = np.array([127.0, 1.0, 448.0])
    np.testing.assert_array_equal(scale_of(amax, Format.INT8), np.float32(amax / 127))
    np.testing.assert_array_equal(scale_of(amax, Format.FP8), np.float32(amax / 448))


def test_quantized_values_of_a_hand_made_tensor():
    values = np.float32([0.0, 0.4, 0.6, -1.0, 127.0, 200.0, -200.0])
    int8 = quantize(values, np.float32(1.0), Format.INT8)
    assert int8.tolist() == [0, 0, 1, -1, 127, 127, -127]
    fp8 = quantize(np.float32([0.0, 1.0, 17.0, 448.0, 1000.0, -1000.0]), np.float32(1.0), Format.FP8)
    # 17 lies between 16 and 18, its neighbours in E4M3, and rounds to the even one, 16.
    assert fp8.astype(np.float32).tolist() == [0.0, 1.0, 16.0, 448.0, 448.0, -448.0]


def test_a_channel_of_zeros_has_scale_one_and_stays_zero():
    weight = np.float32([[0.0, 0.0], [1.0, -2.0]])
    scale = scale_of(channel_amax(weight, axis=0), Format.INT8)
    assert scale.ravel().tolist() == [1.0, np.float32(2 / 127)]
    np.testing.assert_array_equal(fake_quantize(weight, scale, Format.INT8)[0], 0)


def test_a_scale_too_small_for_fp16_is_raised_and_values_are_quantized_with_it():
    scale = scale_of(1e-4, Format.INT8, np.dtype(np.float16))
    assert scale == np.finfo(np.float16).smallest_normal
    value = np.float32([1e-4])
    assert dequantize(quantize(value, scale, Format.INT8), scale) == pytest.approx(1e-4, abs=float(scale) / 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_scales_have_the_type_that_was_asked_for(dtype):
    assert scale_of(3.0, Format.FP8, np.dtype(dtype)).dtype == dtype


def test_an_fp8_weights_scale_is_chosen_to_lose_least():
    weight = np.random.default_rng(0).standard_normal((32, 300)).astype(np.float32)

    def error(amax):
        return ((fake_quantize(weight, scale_of(amax, Format.FP8), Format.FP8) - weight) ** 2).sum(axis=1)

    plain, moved = channel_amax(weight, 0), weight_amax(weight, 0, Format.FP8)
    assert ((moved >= plain) & (moved < 2 * plain)).all()  # nothing is clipped
    assert error(moved).sum() < 0.97 * error(plain).sum()
    np.testing.assert_array_equal(weight_amax(weight.T, 1, Format.FP8), moved.T)
    np.testing.assert_array_equal(weight_amax(weight, 0, Format.INT8), plain)
    assert weight_amax(np.zeros((2, 3), np.float32), 0, Format.FP8).tolist() == [[0], [0]]
