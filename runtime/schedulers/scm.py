"""SCM, the sampler of consistency models in TrigFlow (arXiv 2410.11081), over a flow model (arXiv 2503.09641).

Time is an angle t from 0 to pi/2, and noisy latents are x = sigma_data * (cos(t) * picture + sin(t) * noise). A step
predicts the picture and mixes it with new noise at the next angle. The network is a flow model, which predicts the
velocity v from x_in at the flow's level s:

    s = sin(t) / (cos(t) + sin(t))    r = sqrt(s^2 + (1 - s)^2) = 1 / (cos(t) + sin(t))    x_in = r * x / sigma_data

In diffusers 0.42.1, the pipeline turns v into TrigFlow's prediction F, and SCMScheduler steps with that:

    F = ((1 - 2s) * x_in + r^2 * v) / r    x0 = cos(t) * x - sin(t) * sigma_data * F
    next = cos(t') * x0 + sin(t') * sigma_data * noise

Since cos(t) - (1 - 2s) * sin(t) = r and r * sin(t) = s, both together are  x0 = r * x - s * sigma_data * v. Here x0 is
divided by sigma_data, because that is what the VAE decodes. The pipeline decodes it instead of the last latents.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.errors import UsageError
from ditc.runtime.schedulers.params import SchedulerParams, Steps
from ditc.runtime.schedulers.solver import Schedule, Solver
from ditc.runtime.step_contract import C0, C_IN, CN, A, B

# The angle of pure noise, pi/2. diffusers' default, 1.5708, is above it, so what rounds to 1.58 passes too.
_LARGEST = 1.58


def solve(params: SchedulerParams, steps: Steps) -> Schedule:
    """The schedule. Its sigmas are the angles before each step and after the last one, its timesteps the levels s.

    Raises:
        UsageError: there are more steps than training timesteps, or the angles are not those of falling noise.
    """
    angles = _angles(params, steps)[steps.begin_index :]
    exact = angles.astype(np.float64).tolist()
    rows = [_row(params.sigma_data, here, there) for here, there in pairwise(exact)]
    return Schedule(
        timesteps=np.array([-row[B] for row in rows], np.float32),
        sigmas=angles,
        updates=rows,
        init_noise_sigma=params.sigma_data,
        levels=np.float32(params.sigma_data) * np.stack([np.cos(angles), np.sin(angles)], axis=1),
    )


def _row(sigma_data: float, here: float, there: float) -> dict[str, float]:
    r = 1.0 / (math.cos(here) + math.sin(here))
    scaled = r / sigma_data
    mixed = {C0: sigma_data * math.cos(there), CN: sigma_data * math.sin(there)}
    return {C_IN: scaled, A: scaled, B: -r * math.sin(here), **mixed}


def _angles(params: SchedulerParams, steps: Steps) -> NDArray[np.float32]:
    """The angles (N+1,), rounded to float32 as SCMScheduler.set_timesteps rounds them."""
    if steps.number > params.num_train_timesteps:
        raise UsageError(
            f"num_inference_steps is {steps.number}, but the scheduler has {params.num_train_timesteps} timesteps",
            hint=f"pass at most {params.num_train_timesteps}; a distilled model needs 1 to 4",
        )
    if steps.timesteps is not None:
        return _checked(np.array(steps.timesteps, np.float64), "timesteps")
    first = params.max_timesteps if steps.max_timesteps is None else steps.max_timesteps
    middle = steps.intermediate_timesteps
    if middle is None and steps.number == 2:
        middle = params.intermediate_timesteps
    if middle is None or middle is False:
        return _checked(np.linspace(first, 0, steps.number + 1), "max_timesteps")
    return _checked(np.array([first, middle, 0.0]), "intermediate_timesteps")


def _checked(angles: NDArray[np.float64], argument: str) -> NDArray[np.float32]:
    if angles[0] > _LARGEST or angles[-1] < 0 or (np.diff(angles) > 0).any():
        raise UsageError(
            f"{argument} gives the angles {', '.join(f'{a:g}' for a in angles)}, but noise falls from pi/2 to 0",
            hint="pass angles in radians that fall from at most 1.5708 to 0, such as 1.5708, 1.3, 0",
        )
    return angles.astype(np.float32)


SCM = Solver(
    upstream="SCMScheduler",
    solve=solve,
    takes=frozenset({"timesteps", "max_timesteps", "intermediate_timesteps"}),
    timesteps_have_end=True,
    decodes_x0=True,
    draws_noise=lambda params: True,
)
