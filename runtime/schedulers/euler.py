"""Euler for rectified flows (arXiv 2403.03206), with the sigmas of diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

import numpy as np

from ditc.runtime.schedulers.params import SchedulerParams
from ditc.runtime.schedulers.solver import Schedule, Solver, first_order_update, shifted, velocity


def solve(params: SchedulerParams, num_inference_steps: int, begin_index: int) -> Schedule:
    """The schedule of diffusers 0.42.1. Timesteps are not truncated, and `shift` is the second of its two shifts."""
    train = params.num_train_timesteps
    timesteps = np.linspace(params.sigma_max * train, params.sigma_min * train, num_inference_steps)
    levels = shifted(timesteps / train, params.shift).astype(np.float32)
    sigmas = np.append(levels, np.float32(0))
    exact = sigmas.astype(np.float64).tolist()
    return Schedule(
        timesteps=levels * np.float32(train),
        sigmas=sigmas,
        updates=[
            {**velocity(exact[step]), **first_order_update(exact[step], exact[step + 1])}
            for step in range(begin_index, num_inference_steps)
        ],
    )


EULER = Solver(solve=solve)
