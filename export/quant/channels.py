"""Predict the error of a tensor in INT8 from its channels' counts, for any smoothing and clipping."""

# C channels, B bins in use

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditc.export.quant.formats import QUANTIZED_MAX, Format
from ditc.export.quant.histogram import CHANNEL_PER_OCTAVE, edges
from ditc.export.quant.ranges import Statistics
from ditc.runtime.session import Array


@dataclass(frozen=True, slots=True, eq=False)
class ChannelCounts:
    """Histograms of each channel's magnitudes, which count as evenly spread within a bin.

    Attributes:
        lower, upper: (C,B) ends of the bins; no upper end lies above the channel's largest magnitude.
        share: (C,B) share of the channel's values in each bin.
    """

    lower: Array
    upper: Array
    share: Array

    def error(self, step: Array, clip: Array) -> Array:
        """(C,) mean squared error of clipping at `clip` (C,) and rounding to multiples of `step` (C,)."""
        square = (self.lower**2 + self.lower * self.upper + self.upper**2) / 3
        # A value below half a step becomes zero, so its error is the value itself.
        rounding = np.minimum(step[:, None] ** 2 / 12, square)
        over_lower = np.maximum(self.lower - clip[:, None], 0)
        over_upper = np.maximum(self.upper - clip[:, None], 0)
        width = np.maximum(self.upper - self.lower, 1e-30)
        clipping = (over_upper**3 - over_lower**3) / (3 * width)
        return ((rounding + clipping) * self.share).sum(axis=1)


def channel_counts(statistics: Statistics) -> ChannelCounts:
    """The counts of a tensor's channels, over the whole schedule."""
    counts = statistics.channel_histogram
    used = np.flatnonzero(counts.any(axis=0))
    points = edges(CHANNEL_PER_OCTAVE)
    points[0] = 0.0
    amax = statistics.channel_amax.max(axis=0).astype(np.float64)[:, None]
    lower = np.minimum(points[used], amax)
    upper = np.minimum(points[used + 1], amax)
    return ChannelCounts(lower, upper, counts[:, used] / np.maximum(counts.sum(axis=1), 1)[:, None])


def output_error(counts: ChannelCounts, columns: Array, smooth: Array, amax: float) -> float:
    """Expected squared error of one row of x W^T that comes from rounding x.

    Args:
        columns: (C,) sums of squares of the weights that read each channel.
        smooth: (C,) factors by which x is divided before it is rounded.
        amax: the magnitude of x / smooth that the largest quantized value stands for.
    """
    return float((counts.error(amax / QUANTIZED_MAX[Format.INT8] * smooth, amax * smooth) * columns).sum())
