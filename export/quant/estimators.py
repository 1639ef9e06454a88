"""Choose one clipping value from a tensor's counts: max, percentile, least squared error, least divergence.

Every method works on the counts of histogram.py, so ranges are measured once and can be estimated by several methods.
"""

from __future__ import annotations

from enum import StrEnum

import ml_dtypes
import numpy as np

from ditc.export.quant.formats import QUANTIZED_MAX, Format
from ditc.export.quant.histogram import BINS, bin_of, edges
from ditc.export.quant.ranges import Statistics
from ditc.runtime.session import Array

# Candidates for the clipping value, as shares of amax. INT8: 32 steps of 1/16 octave, down to a quarter of amax. FP8
# gains little by clipping, but may gain when its values move between the powers of two: up to an octave either way.
CLIPS = {Format.INT8: np.exp2(-np.arange(33) / 16), Format.FP8: np.exp2(np.arange(16, -17, -1) / 16)}
SAMPLES = 8  # points per bin at which the error is taken; more points change no choice on Sana's tensors
ENTROPY_BINS = 2048  # linear bins, and 128 levels, as in TensorRT's entropy calibrator (GTC 2017, S7310)
LEVELS = 128


class Method(StrEnum):
    """How amax is estimated. MAX never clips."""

    MAX = "max"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


def estimate_amax(
    statistics: Statistics,
    method: Method,
    kind: Format,
    *,
    percentile: float = 99.99,
    timesteps: float = 100.0,
) -> float:
    """Estimate the magnitude that the largest quantized value stands for.

    It never exceeds the largest magnitude that was seen, except for FP8 with Method.MSE.

    Args:
        percentile: for Method.PERCENTILE, the percentage of magnitudes that is not clipped.
        timesteps: percentile over the buckets of the schedule. Buckets whose amax lies above it are left out, so that
            a few extreme steps do not cost all others their resolution. 100 keeps all buckets.
    """
    limit = np.percentile(statistics.amax, timesteps) * (
        1 + 1e-7
    )  # keeps the bucket at the percentile itself
    kept = statistics.amax <= limit
    amax = float(statistics.amax[kept].max())
    counts = statistics.histogram[kept].sum(axis=0)
    if method is Method.MAX or amax == 0:
        return amax
    if method is Method.PERCENTILE:
        return min(amax, _percentile(counts, percentile))
    if method is Method.MSE:
        return least_error_amax(counts, amax, kind)
    return min(amax, _entropy(counts, amax))


def least_error_amax(counts: Array, largest: float, kind: Format) -> float:
    """The clipping value with the least squared error, of those that CLIPS tries below the largest magnitude."""
    errors = [squared_error(counts, largest * clip, kind) for clip in CLIPS[kind]]
    return float(largest * CLIPS[kind][int(np.argmin(errors))])


def squared_error(counts: Array, amax: float, kind: Format) -> float:
    """Mean squared error of the counted magnitudes when they are quantized with this amax."""
    lower, upper = edges()[:-1], edges()[1:]
    used = np.flatnonzero(counts)
    lower[0] = 0.0
    points = lower[used, None] + (upper - lower)[used, None] * ((np.arange(SAMPLES) + 0.5) / SAMPLES)
    scale = amax / QUANTIZED_MAX[kind]
    ratio = np.minimum(points / scale, QUANTIZED_MAX[kind])
    rounded = (
        np.rint(ratio) if kind is Format.INT8 else ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    )
    error = ((points - rounded * scale) ** 2).mean(axis=1)
    return float((error * counts[used]).sum() / counts.sum())


def _percentile(counts: Array, percentile: float) -> float:
    """Upper edge of the bin in which that percentage of magnitudes is reached."""
    cumulative = np.cumsum(counts)
    index = int(np.searchsorted(cumulative, percentile / 100 * cumulative[-1]))
    return float(edges()[min(index + 1, BINS)])


def _entropy(counts: Array, amax: float) -> float:
    """The clipping value whose 128 levels lose the least information (Kullback-Leibler divergence)."""
    linear = _linear(counts, amax)
    best, best_divergence = ENTROPY_BINS, np.inf
    for stop in range(LEVELS, ENTROPY_BINS + 1, LEVELS // 4):
        divergence = _divergence(linear, stop)
        if divergence < best_divergence:
            best, best_divergence = stop, divergence
    return amax * best / ENTROPY_BINS


def _linear(counts: Array, amax: float) -> Array:
    """Counts over equal bins from 0 to amax. A bin of the histogram is spread evenly over those that it covers."""
    points = edges().copy()
    points[0] = 0.0
    last = int(bin_of(np.float32(amax).reshape(1))[0])
    points = np.minimum(points[: last + 2], amax)
    cumulative = np.concatenate([[0.0], np.cumsum(counts[: last + 1])])
    return np.diff(np.interp(np.linspace(0, amax, ENTROPY_BINS + 1), points, cumulative))


def _divergence(linear: Array, stop: int) -> float:
    reference = linear[:stop].copy()
    reference[-1] += linear[stop:].sum()
    groups = np.arange(stop) * LEVELS // stop
    filled = linear[:stop] > 0
    sums = np.bincount(groups, linear[:stop], LEVELS)
    members = np.bincount(groups, filled, LEVELS)
    candidate = np.where(filled, (sums / np.maximum(members, 1))[groups], 0.0)
    p, q = reference / reference.sum(), candidate / max(candidate.sum(), 1.0)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())
