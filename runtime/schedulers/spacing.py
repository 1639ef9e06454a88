"""The noise levels of a flow's steps: shifts, and the spacings between the largest and the smallest level.

The arrays keep their element type, because diffusers 0.42.1 computes the caller's own sigmas in float32 and its own in
float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.schedulers.params import SchedulerParams, Spacing, TimeShift

Levels = NDArray[np.floating[Any]]

_RHO = 7.0  # arXiv 2206.00364, section 3
_BETA = 0.6  # both parameters of the beta distribution, arXiv 2407.12173


def dynamic_mu(params: SchedulerParams, image_seq_len: int) -> float:
    """mu for a picture of `image_seq_len` patches: linear between base_shift and max_shift, and beyond."""
    slope = (params.max_shift - params.base_shift) / (params.max_image_seq_len - params.base_image_seq_len)
    offset = params.base_shift - slope * params.base_image_seq_len
    return image_seq_len * slope + offset


def shifted(levels: Levels, shift: float) -> Levels:
    """Resolution-dependent shift of rectified-flow noise levels (arXiv 2403.03206, section 5.3.2)."""
    return shift * levels / (1 + (shift - 1) * levels)


def shifted_by(params: SchedulerParams, levels: Levels, mu: float | None) -> Levels:
    """The levels after the scheduler's shift: the dynamic one with `mu`, or else the fixed one; then the stretch."""
    if mu is None:
        levels = shifted(levels, params.shift)
    else:
        factor = math.exp(mu) if params.time_shift_type is TimeShift.EXPONENTIAL else mu
        with np.errstate(divide="ignore"):  # a level of 0 stays 0
            levels = factor / (factor + (1 / levels - 1))
    if params.shift_terminal:
        levels = _stretched(levels, params.shift_terminal)
    return levels


def _stretched(levels: Levels, terminal: float) -> Levels:
    """The levels with their distances from 1 scaled, so that the last one becomes `terminal`."""
    below = 1 - levels
    with np.errstate(invalid="ignore"):  # a single level of 1 gives NaN, which the table refuses
        return 1 - below / (below[-1] / (1 - terminal))


def spaced(params: SchedulerParams, levels: Levels) -> Levels:
    """As many levels as `levels` has, in the spacing of the parameters between its ends or theirs."""
    if params.spacing is Spacing.UNIFORM:
        return levels
    low = float(levels[-1]) if params.spacing_min is None else params.spacing_min
    high = float(levels[0]) if params.spacing_max is None else params.spacing_max
    steps = np.linspace(0, 1, len(levels))
    if params.spacing is Spacing.KARRAS:
        return karras(low, high, len(levels))
    if params.spacing is Spacing.EXPONENTIAL:
        return np.exp(np.linspace(math.log(high), math.log(low), len(levels)))
    return low + beta_quantile(1 - steps) * (high - low)


def karras(low: float, high: float, number: int) -> NDArray[np.float64]:
    """`number` levels from high to low, evenly spaced in their seventh roots (arXiv 2206.00364, equation 5)."""
    start, end = high ** (1 / _RHO), low ** (1 / _RHO)
    return (start + np.linspace(0, 1, number) * (end - start)) ** _RHO


def beta_quantile(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quantiles of the beta distribution with both parameters 0.6, which is symmetric about 1/2.

    The share below x <= 1/2 is a power series in x. Bisection inverts it to the last bit of a float64.
    """
    lower = np.minimum(shares, 1 - shares)
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_share(middle) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantile = np.where(lower == 0, 0.0, (low + high) / 2)
    return np.where(shares <= 0.5, quantile, 1 - quantile)


def _beta_share(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of the distribution below x <= 1/2: the integral of t^(b-1) (1-t)^(b-1), by expanding (1-t)^(b-1)."""
    total = math.gamma(_BETA) ** 2 / math.gamma(2 * _BETA)
    series, factor = np.zeros_like(x), 1.0
    for n in range(60):  # 2^-60 is below the last bit
        series += factor * x**n / (_BETA + n)
        factor *= (n + 1 - _BETA) / (n + 1)
    return x**_BETA * series / total
