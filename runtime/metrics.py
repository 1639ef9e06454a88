"""How far a tensor or a picture is from its reference: pure functions of two arrays, computed in fp64."""

from __future__ import annotations

import math

import numpy as np

from ditc.runtime.session import Array

# SSIM's window and constants: Wang et al. 2004 (IEEE TIP 13(4)), section III.B: 11x11 Gaussian, sigma 1.5, K1, K2.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def relative_l2(value: Array, reference: Array) -> float:
    """|value - reference| / |reference|; NaN anywhere gives NaN, and a zero reference compares absolutely."""
    wide = reference.astype(np.float64).ravel()
    difference = float(np.linalg.norm(value.astype(np.float64).ravel() - wide))
    scale = float(np.linalg.norm(wide))
    return difference / scale if scale else difference


def psnr(picture: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0,1]; equal pictures give infinity."""
    mse = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else -10 * math.log10(mse) if mse == mse else math.nan


def ssim(picture_HWC: Array, reference_HWC: Array) -> float:
    """Mean structural similarity of pictures in [0,1], mean over channels; small pictures take a smaller window."""
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
    """A stage tensor as floats: bf16 travels as its uint16 bits, the rest as itself."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def is_flat(array: Array) -> bool:
    """Whether a tensor of several values holds one value only: two sides that agree on that prove nothing."""
    return array.size > 1 and bool((array == array.flat[0]).all())
