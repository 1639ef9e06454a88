"""Heun's method for rectified flows, with the sigmas of diffusers' FlowMatchHeunDiscreteScheduler, 0.42.1.

Every step but the last runs the network twice: at its own level, and at the next one after an Euler step. Each run is
a row of the table. The second run averages the two slopes d = (x - x0) / sigma. On the line that the Euler step
follows, the first slope is also (x' - x0') / sigma', with x' and sigma' after it and x0' before it. Therefore

    next = x' + (sigma' - sigma) / 2 * (d2 - d1) = x' + (sigma' - sigma) / (2 sigma') * (x0' - x0)

needs no more than the x0 of the first run, which is history_1.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ditc.runtime.schedulers.euler import uniform_levels
from ditc.runtime.schedulers.params import SchedulerParams, Steps
from ditc.runtime.schedulers.solver import Schedule, Solver, first_order_update, velocity
from ditc.runtime.schedulers.spacing import shifted
from ditc.runtime.step_contract import C0, CX, history_column


def solve(params: SchedulerParams, steps: Steps) -> Schedule:
    """The schedule with 2N - 1 rows for N steps. begin_index counts steps."""
    levels = shifted(uniform_levels(params, steps.number), params.shift)
    levels = levels[steps.begin_index :].astype(np.float32)
    exact = [*levels.astype(np.float64).tolist(), 0.0]
    updates = []
    for sigma, sigma_next in pairwise(exact):
        updates.append({**velocity(sigma), **first_order_update(sigma, sigma_next)})
        if sigma_next:
            half = (sigma_next - sigma) / (2 * sigma_next)
            updates.append({**velocity(sigma_next), CX: 1.0, C0: -half, history_column(1): half})
    inner = np.repeat(levels[1:], 2)
    return Schedule(
        timesteps=np.append(levels[:1], inner) * np.float32(params.num_train_timesteps),
        sigmas=np.concatenate([levels[:1], inner, np.zeros(1, np.float32)]),
        updates=updates,
    )


HEUN = Solver(
    upstream="FlowMatchHeunDiscreteScheduler",
    solve=solve,
    history_length=lambda params: 1,
    reads_earlier_latents=True,
)
