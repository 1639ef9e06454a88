"""Samplers as data: a table of the coefficients that a denoiser takes in every step (runtime/step_contract.py).

A solver is a function from a scheduler's parameters to named coefficients for each step. They are computed once for
each request, in float64, from sigmas that are rounded to float32 where diffusers 0.42.1 rounds them. A new sampler is
one file here and one row below.
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
    """A schedule with one row for each step.

    Attributes:
        columns: the names of the K coefficients, in the denoiser's order.
        timesteps: (N,) float32, what the network sees.
        coefficients: (N, K) float32.
        sigmas: (N + 1,) float32, noise levels before each step and after the last.
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
    """How many past x0 the solver's update reads."""
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
        columns: the coefficients that the denoiser takes; None for those that the solver needs. Those that the solver
            does not use are zero.

    Raises:
        UsageError: no steps, a begin_index outside them, a denoiser that lacks a column which the solver needs, or a
            schedule whose update is not finite.
    """
    needed = coefficient_columns(history_length(params), draws_noise(params))
    names = needed if columns is None else tuple(columns)
    _check(params, num_inference_steps, begin_index, set(needed) - set(names))
    schedule = SOLVERS[params.kind].solve(params, num_inference_steps, begin_index)
    table = np.array([[update.get(name, 0.0) for name in names] for update in schedule.updates])
    if not np.isfinite(table).all():
        raise UsageError(
            f"{num_inference_steps} steps with shift {params.shift} give an update that is not finite",
            hint="take fewer steps: two neighbouring sigmas are equal in float32",
        )
    # What the network sees is one float32 product in diffusers: t * timestep_scale.
    seen = schedule.timesteps * np.float32(params.timestep_scale)
    return CoefficientTable(
        columns=names,
        timesteps=seen[begin_index:],
        coefficients=table.astype(np.float32),
        sigmas=schedule.sigmas[begin_index:],
        init_noise_sigma=schedule.init_noise_sigma,
    )


def _check(params: SchedulerParams, num_inference_steps: int, begin_index: int, lacking: set[str]) -> None:
    if num_inference_steps < 1:
        raise UsageError(
            f"num_inference_steps is {num_inference_steps}, a picture needs at least one step",
            hint="pass num_inference_steps >= 1",
        )
    if not 0 <= begin_index < num_inference_steps:
        raise UsageError(
            f"begin_index is {begin_index}, the schedule has steps 0 to {num_inference_steps - 1}",
            hint="pass a begin_index inside the schedule",
        )
    if lacking:
        raise UsageError(
            f"{params.kind} of order {params.solver_order} needs the coefficients {', '.join(sorted(lacking))}, "
            "which this denoiser's step does not have",
            hint="export the denoiser for this scheduler: its history and its noise are part of the graph",
        )
