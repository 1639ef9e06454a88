"""Metrics at their edges: NaN, zero references, equal and small pictures."""

from __future__ import annotations

import math

import numpy as np

from ditc.runtime.metrics import is_flat, psnr, relative_l2, ssim


def test_relative_l2_of_nan_is_nan_and_of_a_zero_reference_is_absolute() -> None:
    assert np.isnan(relative_l2(np.array([np.nan]), np.ones(1)))
    assert relative_l2(np.array([3.0, 4.0]), np.zeros(2)) == 5.0


def test_relative_l2_does_not_overflow_in_fp16() -> None:
    reference = np.full(4, 60000, np.float16)
    assert relative_l2(reference / 2, reference) == 0.5


def test_psnr_of_equal_pictures_is_infinite_and_of_nan_is_nan() -> None:
    picture = np.random.default_rng(0).random((8, 9, 3))
    assert psnr(picture, picture) == math.inf
    assert math.isnan(psnr(np.full_like(picture, np.nan), picture))
    assert abs(psnr(picture + 0.1, picture) - 20) < 1e-9


def test_ssim_works_on_pictures_smaller_than_its_window() -> None:
    picture = np.random.default_rng(0).random((7, 6, 3))
    assert abs(ssim(picture, picture) - 1) < 1e-12
    assert ssim(picture[::-1], picture) < 0.9


def test_a_tensor_of_equal_values_is_flat() -> None:
    assert is_flat(np.ones((2, 2)))
    assert not is_flat(np.arange(4))
    assert not is_flat(np.ones(1))
