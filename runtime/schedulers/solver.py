"""What a solver returns for the table of coefficients, and the arithmetic that several solvers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.schedulers.params import SchedulerParams, Steps
from ditc.runtime.step_contract import C0, C_IN, CX, A, B


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A solver's runs of the network, in float64, except values that diffusers rounds to float32.

    Attributes:
        timesteps: (N,) float32, before timestep_scale.
        sigmas: (N + 1,) float32, the noise levels before each run and after the last one.
        updates: for each run, coefficients by name. Coefficients that are not named are zero.
        init_noise_sigma: standard deviation of the starting latents.
        levels: (N + 1, 2), the weights of picture and noise in the latents at each of the sigmas; None for those of a
            flow, 1 - sigma and sigma.
    """

    timesteps: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    updates: Sequence[Mapping[str, float]]
    init_noise_sigma: float = 1.0
    levels: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """One row of the table of solvers.

    Attributes:
        upstream: the name of diffusers' class, for messages.
        solve: the schedule of the steps from begin_index on.
        history_length: how many earlier x0 the update reads, as a function of the parameters.
        takes: the names of the caller's own schedules that diffusers' set_timesteps accepts.
        timesteps_have_end: whether the caller's own timesteps are one more than the steps, with the end of the last.
        decodes_x0: whether diffusers' pipeline decodes the last prediction of x0 instead of the latents.
        draws_noise: whether every step adds fresh noise, as a function of the parameters.
        reads_earlier_latents: whether diffusers' scheduler keeps latents between steps, so that it drops those that a
            callback puts in their place. Here they follow from the history, which is one state less.
    """

    upstream: str
    solve: Callable[[SchedulerParams, Steps], Schedule]
    history_length: Callable[[SchedulerParams], int] = lambda params: 0
    takes: frozenset[str] = frozenset()
    timesteps_have_end: bool = False
    decodes_x0: bool = False
    draws_noise: Callable[[SchedulerParams], bool] = lambda params: params.stochastic
    reads_earlier_latents: bool = False


def velocity(sigma: float) -> dict[str, float]:
    """The coefficients of a velocity prediction: the network's input is x itself, and x0 = x - sigma * pred."""
    return {C_IN: 1.0, A: 1.0, B: -sigma}


def first_order_update(sigma: float, sigma_next: float) -> dict[str, float]:
    """The first-order step, which all solvers share.

    With alpha = 1 - sigma, DPM-Solver++'s  -alpha_next * (exp(-h) - 1)  equals  alpha_next - alpha * ratio = 1 - ratio.
    Without a logarithm, a last sigma of 0, where h is infinite, is not a special case.
    """
    if sigma_next == sigma:  # also where both are 0
        return {CX: 1.0, C0: 0.0}
    ratio = sigma_next / sigma if sigma else math.nan
    return {CX: ratio, C0: 1.0 - ratio}


def half_log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma), alpha = 1 - sigma."""
    if not 0 < sigma < 1:
        return math.inf if sigma == 0 else math.nan
    return math.log(1.0 - sigma) - math.log(sigma)
