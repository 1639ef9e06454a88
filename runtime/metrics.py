"""Measures of the difference between a tensor or picture and its reference: pure functions, computed in fp64."""

from __future__ import annotations

import math

import numpy as np

from ditc.runtime.session import Array

# SSIM's 11x11 Gaussian window, sigma, K1 and K2 are those of Wang et al. 2004 (IEEE TIP 13(4)), section III.B.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def relative_l2(value: Array, reference: Array) -> float:
    """|value - reference| / |reference|, or |value| if the reference is all zeros. NaN in either gives NaN."""
    wide = reference.astype(np.float64).ravel()
    difference = float(np.linalg.norm(value.astype(np.float64).ravel() - wide))
    scale = float(np.linalg.norm(wide))
    return difference / scale if scale else difference


def psnr(picture: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0,1]. Equal pictures give infinity, NaN gives NaN."""
    mse = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else -10 * math.log10(mse) if mse == mse else math.nan


def ssim(picture_HWC: Array, reference_HWC: Array) -> float:
    """Structural similarity of pictures in [0,1], as the mean over pixels and channels.

    Pictures that are smaller than the window get a smaller, odd window.
    """
    height, width = picture_HWC.shape[:2]
    size = min(_WINDOW, height - (height + 1) % 2, width - (width + 1) % 2)
    kernel = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()

    def blur(x: Array) -> Array:
        for axis in (0, 1):
            windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=axis)
            x = windows @ kernel
        return x

    x, y = picture_HWC.astype(np.float64), reference_HWC.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def widened(array: Array) -> Array:
    """A stage's tensor as floats: bf16, which is stored as uint16, becomes fp32. Other types are unchanged."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def is_flat(array: Array) -> bool:
    """Whether a tensor has several values and all are equal. That two such tensors agree proves nothing."""
    return array.size > 1 and bool((array == array.flat[0]).all())
