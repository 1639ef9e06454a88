"""Euler for rectified flows (arXiv 2403.03206), also with fresh noise in every step, as few-step models are sampled.

The sigmas are those of diffusers' FlowMatchEulerDiscreteScheduler, 0.42.1, which FlowMatchLCMScheduler shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.schedulers.params import SchedulerParams, Steps
from ditc.runtime.schedulers.solver import Schedule, Solver, first_order_update, velocity
from ditc.runtime.schedulers.spacing import Levels, shifted_by, spaced
from ditc.runtime.step_contract import C0, C_IN, CN, CX, A, B


def solve(params: SchedulerParams, steps: Steps) -> Schedule:
    """The schedule. Timesteps are not truncated, and `shift` is the second of diffusers' two shifts."""
    timesteps, sigmas = _grid(params, steps)
    exact = sigmas.astype(np.float64).tolist()
    levels = np.stack([sigmas, 1 - sigmas], axis=1)[steps.begin_index :] if params.invert_sigmas else None
    update = _noisy_update if params.stochastic else _inverted_update if params.invert_sigmas else _update
    return Schedule(
        timesteps=timesteps[steps.begin_index :],
        sigmas=sigmas[steps.begin_index :],
        updates=[update(exact[i], exact[i + 1]) for i in range(steps.begin_index, steps.number)],
        levels=levels,
    )


def uniform_levels(params: SchedulerParams, number: int) -> NDArray[np.float64]:
    """Levels before the second shift, with equal distances between the largest and the smallest training sigma."""
    train = params.num_train_timesteps
    return np.linspace(params.sigma_max * train, params.sigma_min * train, number) / train


def _grid(params: SchedulerParams, steps: Steps) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The timesteps (N,) and sigmas (N+1,)."""
    train, own = params.num_train_timesteps, None
    if steps.sigmas is not None:
        levels: Levels = np.asarray(steps.sigmas, np.float32)
    elif steps.timesteps is not None:
        # The network sees them as they are given; only the sigmas that follow from them are shifted.
        own = np.asarray(steps.timesteps, np.float32)
        levels = own / train
    else:
        levels = uniform_levels(params, steps.number)
    levels = spaced(params, shifted_by(params, levels, steps.mu)).astype(np.float32)
    if params.invert_sigmas:
        levels, own = 1 - levels, None
    timesteps = levels * np.float32(train) if own is None else own
    return timesteps, np.append(levels, np.float32(params.invert_sigmas))


def _update(sigma: float, sigma_next: float) -> dict[str, float]:
    return {**velocity(sigma), **first_order_update(sigma, sigma_next)}


def _noisy_update(sigma: float, sigma_next: float) -> dict[str, float]:
    """x0 with as much fresh noise as the next level has."""
    return {**velocity(sigma), C0: 1.0 - sigma_next, CN: sigma_next}


def _inverted_update(time: float, time_next: float) -> dict[str, float]:
    """Where sigma is a time from noise at 0 to the picture at 1, x0 = x + (1 - time) * pred."""
    left = 1.0 - time
    share = (time_next - time) / left if left else 0.0
    return {C_IN: 1.0, A: 1.0, B: left, CX: 1.0 - share, C0: share}


EULER = Solver(
    upstream="FlowMatchEulerDiscreteScheduler", solve=solve, takes=frozenset({"timesteps", "sigmas"})
)
