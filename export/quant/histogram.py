"""Counts of magnitudes in bins that depend on no data: runs in any order, on any machine, add up to the same counts.

A bin is a value of fp32's exponent and first five mantissa bits: 32 bins an octave, each 2 to 3 % wide, over
2**-24 .. 2**24. The first bin takes everything smaller, the last everything larger; the exact amax is kept beside.
Of each channel four bins an octave are counted: enough to say what a clipped or smoothed channel loses.
"""

from __future__ import annotations

import numpy as np

from ditc.runtime.session import Array

DROPPED_BITS = 18  # of fp32's 23 mantissa bits, which leaves 5
PER_OCTAVE = 2 ** (23 - DROPPED_BITS)
SMALLEST, LARGEST = -24, 24  # exponents of two
BINS = (LARGEST - SMALLEST) * PER_OCTAVE
# The number that a magnitude's upper bits hold for 2**SMALLEST; fp32's exponent is biased by 127.
FIRST = (SMALLEST + 127) * PER_OCTAVE
CHANNEL_DROPPED_BITS = 21  # the same for a channel: two mantissa bits
CHANNEL_PER_OCTAVE = 2 ** (23 - CHANNEL_DROPPED_BITS)
CHANNEL_BINS = (LARGEST - SMALLEST) * CHANNEL_PER_OCTAVE
CHANNEL_FIRST = (SMALLEST + 127) * CHANNEL_PER_OCTAVE


def bin_of(magnitudes: Array) -> Array:
    """Index of the bin of each non-negative fp32 value."""
    bits = np.ascontiguousarray(magnitudes, np.float32).view(np.int32) >> DROPPED_BITS
    return np.clip(bits - FIRST, 0, BINS - 1)


def edges(per_octave: int = PER_OCTAVE) -> Array:
    """(BINS+1,) fp64: the lower edges of all bins and the upper edge of the last."""
    index = np.arange((LARGEST - SMALLEST) * per_octave + 1)
    return np.exp2(SMALLEST + index // per_octave) * (1 + (index % per_octave) / per_octave)
