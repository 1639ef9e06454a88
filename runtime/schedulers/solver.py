"""What a solver returns for the table of coefficients, and the arithmetic that several solvers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.schedulers.params import SchedulerParams
from ditc.runtime.step_contract import C0, C_IN, CX, A, B


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A solver's steps, in float64, except values that diffusers rounds to float32.

    Attributes:
        timesteps: (N,) float32, before timestep_scale.
        sigmas: (N + 1,) float32, the noise levels before each step and after the last one.
        updates: for each step from begin_index on, coefficients by name. Coefficients that are not named are zero.
        init_noise_sigma: standard deviation of the starting latents.
    """

    timesteps: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    updates: Sequence[Mapping[str, float]]
    init_noise_sigma: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """One row of the table of solvers.

    Attributes:
        solve: (params, num_inference_steps, begin_index) -> Schedule.
        history_length: how many earlier x0 the update reads, as a function of the parameters.
        draws_noise: whether each step adds fresh noise, scaled by the coefficient "cn".
    """

    solve: Callable[[SchedulerParams, int, int], Schedule]
    history_length: Callable[[SchedulerParams], int] = lambda params: 0
    draws_noise: bool = False


def shifted(sigmas: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Resolution-dependent shift of rectified-flow noise levels (arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def velocity(sigma: float) -> dict[str, float]:
    """The coefficients of a velocity prediction: the network's input is x itself, and x0 = x - sigma * pred."""
    return {C_IN: 1.0, A: 1.0, B: -sigma}


def first_order_update(sigma: float, sigma_next: float) -> dict[str, float]:
    """The first-order step, which Euler and DPM-Solver++ 1 share.

    With alpha = 1 - sigma, DPM-Solver++'s  -alpha_next * (exp(-h) - 1)  equals  alpha_next - alpha * ratio = 1 - ratio.
    Without a logarithm, a last sigma of 0, where h is infinite, is not a special case.
    """
    ratio = sigma_next / sigma
    return {CX: ratio, C0: 1.0 - ratio}
