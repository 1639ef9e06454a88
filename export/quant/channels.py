"""What a tensor loses in INT8 channel by channel, from counts: for every smoothing and clipping that is considered."""

# C channels, B bins in use

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditc.export.quant.formats import LARGEST_CODE, Format
from ditc.export.quant.histogram import CHANNEL_PER_OCTAVE, edges
from ditc.export.quant.ranges import Statistics
from ditc.runtime.session import Array


@dataclass(frozen=True, slots=True, eq=False)
class ChannelCounts:
    """Magnitudes of each channel, even within a bin.

    Attributes:
        lower, upper: (C,B) ends of the bins; no upper end lies above the channel's largest magnitude.
        share: (C,B) of the channel's values that a bin holds.
    """

    lower: Array
    upper: Array
    share: Array

    def error(self, step: Array, clip: Array) -> Array:
        """(C,) mean squared error of rounding to multiples of `step` (C,) what is clipped at `clip` (C,)."""
        square = (self.lower**2 + self.lower * self.upper + self.upper**2) / 3
        # A value below half a step becomes zero: its error is the value, not the step's.
        rounding = np.minimum(step[:, None] ** 2 / 12, square)
        over_lower = np.maximum(self.lower - clip[:, None], 0)
        over_upper = np.maximum(self.upper - clip[:, None], 0)
        width = np.maximum(self.upper - self.lower, 1e-30)
        clipping = (over_upper**3 - over_lower**3) / (3 * width)
        return ((rounding + clipping) * self.share).sum(axis=1)


def channel_counts(statistics: Statistics) -> ChannelCounts:
    """The counts of a tensor's channels, over all of the schedule."""
    counts = statistics.channel_histogram
    used = np.flatnonzero(counts.any(axis=0))
    points = edges(CHANNEL_PER_OCTAVE)
    points[0] = 0.0
    amax = statistics.channel_amax.max(axis=0).astype(np.float64)[:, None]
    lower = np.minimum(points[used], amax)
    upper = np.minimum(points[used + 1], amax)
    return ChannelCounts(lower, upper, counts[:, used] / np.maximum(counts.sum(axis=1), 1)[:, None])


def output_error(counts: ChannelCounts, columns: Array, smooth: Array, amax: float) -> float:
    """Squared error of a row of x W^T that comes from rounding x.

    Args:
        columns: (C,) sums of squares of the weights that read each channel.
        smooth: (C,) factors by which x is divided before it is rounded.
        amax: what the largest code stands for, after that.
    """
    return float((counts.error(amax / LARGEST_CODE[Format.INT8] * smooth, amax * smooth) * columns).sum())
