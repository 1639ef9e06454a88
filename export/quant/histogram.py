"""Count magnitudes in bins that do not depend on the data, so that counts of any runs and machines can be added.

A bin is one value of fp32's exponent and first five mantissa bits: 32 bins per octave, each 2 to 3 % wide, from 2**-24
to 2**24. The first bin takes everything smaller, the last everything larger; the exact amax is kept separately.
Channels have four bins per octave, which is enough to tell what a clipped or smoothed channel loses.
"""

from __future__ import annotations

import numpy as np

from ditc.runtime.session import Array

DROPPED_BITS = 18  # of fp32's 23 mantissa bits, which leaves 5
PER_OCTAVE = 2 ** (23 - DROPPED_BITS)
SMALLEST, LARGEST = -24, 24  # exponents of two
BINS = (LARGEST - SMALLEST) * PER_OCTAVE
# The upper bits of 2**SMALLEST as a number. The exponent of fp32 is biased by 127.
FIRST = (SMALLEST + 127) * PER_OCTAVE
CHANNEL_DROPPED_BITS = 21  # for channels, which keep two mantissa bits
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
