"""Samplers as data: a table with the coefficients of a denoiser for every step (runtime/step_contract.py).

A solver is a function from a scheduler's parameters to the named coefficients of each step. They are computed once per
request, in float64, from sigmas that are rounded to float32 where diffusers 0.42.1 rounds them. A new sampler is one
file in this folder and one row in SOLVERS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.errors import UsageError
from ditc.runtime.schedulers.dpmsolver import DPMSOLVER
from ditc.runtime.schedulers.euler import EULER
from ditc.runtime.schedulers.params import FinalSigmas, SchedulerKind, SchedulerParams, SolverType
from ditc.runtime.step_contract import coefficient_columns

__all__ = [
    "SOLVERS",
    "CoefficientTable",
    "FinalSigmas",
    "SchedulerKind",
    "SchedulerParams",
    "SolverType",
    "coefficient_table",
    "draws_noise",
    "history_length",
]

SOLVERS = {SchedulerKind.DPMSOLVER: DPMSOLVER, SchedulerKind.EULER: EULER}


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientTable:
    """A schedule with one row per step.

    Attributes:
        columns: the names of the K coefficients, in the denoiser's order.
        timesteps: (N,) float32, as the network sees them.
        coefficients: (N, K) float32.
        sigmas: (N + 1,) float32, the noise levels before each step and after the last one.
        init_noise_sigma: standard deviation of the starting latents.
    """

    columns: tuple[str, ...]
    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    init_noise_sigma: float

    def __len__(self) -> int:
        return len(self.timesteps)


def history_length(params: SchedulerParams) -> int:
    """How many earlier x0 the solver's update reads."""
    return SOLVERS[params.kind].history_length(params)


def draws_noise(params: SchedulerParams) -> bool:
    """Whether the solver adds fresh noise in every step."""
    return SOLVERS[params.kind].draws_noise


def coefficient_table(
    params: SchedulerParams,
    num_inference_steps: int,
    begin_index: int = 0,
    *,
    columns: Sequence[str] | None = None,
) -> CoefficientTable:
    """The schedule of `num_inference_steps` steps, from step `begin_index` on (image-to-image starts late).

    Args:
        columns: the coefficients that the denoiser takes; None for exactly those that the solver needs. Columns that
            the solver does not use are zero.

    Raises:
        UsageError: there are no steps, begin_index is outside them, the denoiser lacks a column that the solver needs,
            or a coefficient is not finite.
    """
    needed = coefficient_columns(history_length(params), draws_noise(params))
    names = needed if columns is None else tuple(columns)
    _check(params, num_inference_steps, begin_index, set(needed) - set(names))
    schedule = SOLVERS[params.kind].solve(params, num_inference_steps, begin_index)
    table = np.array([[update.get(name, 0.0) for name in names] for update in schedule.updates])
    if not np.isfinite(table).all():
        raise UsageError(
            f"{num_inference_steps} steps with shift {params.shift} give coefficients that are not finite",
            hint="use fewer steps: two neighbouring sigmas are equal in float32",
        )
    # diffusers computes this product in float32 too.
    scaled = schedule.timesteps * np.float32(params.timestep_scale)
    return CoefficientTable(
        columns=names,
        timesteps=scaled[begin_index:],
        coefficients=table.astype(np.float32),
        sigmas=schedule.sigmas[begin_index:],
        init_noise_sigma=schedule.init_noise_sigma,
    )


def _check(params: SchedulerParams, num_inference_steps: int, begin_index: int, lacking: set[str]) -> None:
    if num_inference_steps < 1:
        raise UsageError(
            f"num_inference_steps is {num_inference_steps}, but a picture needs at least one step",
            hint="pass num_inference_steps >= 1",
        )
    if not 0 <= begin_index < num_inference_steps:
        raise UsageError(
            f"begin_index is {begin_index}, but the schedule has steps 0 to {num_inference_steps - 1}",
            hint="pass a begin_index inside the schedule",
        )
    if lacking:
        raise UsageError(
            f"{params.kind} of order {params.solver_order} needs the coefficients {', '.join(sorted(lacking))}, "
            "which this denoiser does not have",
            hint="build the bundle for this scheduler: history and noise are part of the denoiser's graph",
        )
