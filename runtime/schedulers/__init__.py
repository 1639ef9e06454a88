"""Samplers as data: a table with the coefficients of a denoiser for every step (runtime/step_contract.py).

A solver is a function from a scheduler's parameters to the named coefficients of each step. They are computed once per
request, in float64, from sigmas that are rounded to float32 where diffusers 0.42.1 rounds them. A new sampler is one
file in this folder and one row in SOLVERS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.errors import UsageError
from ditc.runtime.schedulers.dpmsolver import DPMSOLVER
from ditc.runtime.schedulers.euler import EULER
from ditc.runtime.schedulers.heun import HEUN
from ditc.runtime.schedulers.params import (
    FinalSigmas,
    SchedulerKind,
    SchedulerParams,
    SolverType,
    Spacing,
    Steps,
    TimeShift,
)
from ditc.runtime.schedulers.scm import SCM
from ditc.runtime.schedulers.solver import Solver
from ditc.runtime.schedulers.spacing import dynamic_mu
from ditc.runtime.schedulers.unipc import UNIPC
from ditc.runtime.step_contract import coefficient_columns

__all__ = [
    "SOLVERS",
    "CoefficientTable",
    "FinalSigmas",
    "SchedulerKind",
    "SchedulerParams",
    "SolverType",
    "Spacing",
    "TimeShift",
    "coefficient_table",
    "draws_noise",
    "dynamic_mu",
    "history_length",
    "number_of_steps",
    "reads_earlier_latents",
]

# exp(mu) multiplies the odds of a noise level. Beyond this, all levels are 0 or 1 in float32.
_MAX_MU = 80

SOLVERS = {
    SchedulerKind.DPMSOLVER: DPMSOLVER,
    SchedulerKind.EULER: EULER,
    SchedulerKind.HEUN: HEUN,
    SchedulerKind.SCM: SCM,
    SchedulerKind.UNIPC: UNIPC,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientTable:
    """A schedule with one row per run of the network: one per step, except that Heun's method has 2N - 1 for N steps.

    Attributes:
        columns: the names of the K coefficients, in the denoiser's order.
        timesteps: (N,) float32, as the network sees them.
        coefficients: (N, K) float32.
        sigmas: (N + 1,) float32, the noise levels before each step and after the last one.
        init_noise_sigma: standard deviation of the starting latents.
        decodes_x0: whether the picture is the last prediction of x0 instead of the last latents.
        levels: (N + 1, 2) float32, the weights of picture and noise in the latents at each of the sigmas.
        timestep_scale: factor from the scheduler's timesteps to those that the network sees.
    """

    columns: tuple[str, ...]
    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    init_noise_sigma: float
    levels: NDArray[np.float32]
    decodes_x0: bool = False
    timestep_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def scheduler_timesteps(self) -> NDArray[np.float32]:
        """(N,) float32, before timestep_scale."""
        return self.timesteps / np.float32(self.timestep_scale)


def history_length(params: SchedulerParams) -> int:
    """How many earlier x0 the solver's update reads."""
    return SOLVERS[params.kind].history_length(params)


def draws_noise(params: SchedulerParams) -> bool:
    """Whether the solver adds fresh noise in every step."""
    return SOLVERS[params.kind].draws_noise(params)


def reads_earlier_latents(params: SchedulerParams) -> bool:
    """Whether diffusers' scheduler goes on from latents that it kept, and so drops those that a callback returns."""
    return SOLVERS[params.kind].reads_earlier_latents


def number_of_steps(
    params: SchedulerParams,
    num_inference_steps: int | None,
    default: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> int:
    """How many steps a request asks for: the length of its own schedule, or its number, or the default.

    Raises:
        UsageError: the timesteps have an end, and their number is not one more than that of the steps.
    """
    if sigmas is not None:
        return len(sigmas)
    if timesteps is None:
        return default if num_inference_steps is None else num_inference_steps
    if not SOLVERS[params.kind].timesteps_have_end:
        return len(timesteps)
    steps = len(timesteps) - 1
    if steps < 1 or num_inference_steps not in (None, steps):
        raise UsageError(
            f"timesteps has {len(timesteps)} numbers"
            + ("" if num_inference_steps is None else f" for num_inference_steps {num_inference_steps}")
            + ", but this scheduler needs one more than there are steps: the last is where the last step ends",
            hint="pass falling numbers such as 1.5708, 1.3, 0 for two steps",
        )
    return steps


def coefficient_table(
    params: SchedulerParams,
    num_inference_steps: int,
    begin_index: int = 0,
    *,
    columns: Sequence[str] | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    image_seq_len: int | None = None,
    max_timesteps: float | None = None,
    intermediate_timesteps: float | Literal[False] | None = None,
) -> CoefficientTable:
    """The schedule of `num_inference_steps` steps, from step `begin_index` on (image-to-image starts late).

    Args:
        columns: the coefficients that the denoiser takes; None for exactly those that the solver needs. Columns that
            the solver does not use are zero.
        timesteps, sigmas: the caller's own schedule, whose length is then the number of steps.
        mu: the exponent of dynamic shifting, in place of the one that follows from image_seq_len.
        image_seq_len: the number of the network's patches in a picture, which dynamic shifting needs.
        max_timesteps, intermediate_timesteps: for SCM, in place of the defaults in `params`, see `Steps`.

    Raises:
        UsageError: there are no steps, begin_index is outside them, the denoiser lacks a column that the solver needs,
            the solver does not take such a schedule, or a coefficient is not finite.
    """
    needed = coefficient_columns(history_length(params), draws_noise(params))
    names = needed if columns is None else tuple(columns)
    own = sigmas if sigmas is not None else timesteps
    settings = {"max_timesteps": max_timesteps, "intermediate_timesteps": intermediate_timesteps}
    number = number_of_steps(params, None, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
    _check(params, number, begin_index, set(needed) - set(names))
    _check_own(params, number, timesteps, sigmas, mu, settings)
    steps = Steps(
        number=number,
        begin_index=begin_index,
        timesteps=None if timesteps is None else tuple(map(float, timesteps)),
        sigmas=None if sigmas is None else tuple(map(float, sigmas)),
        mu=_mu(params, mu, image_seq_len),
        max_timesteps=max_timesteps,
        intermediate_timesteps=intermediate_timesteps,
    )
    schedule = SOLVERS[params.kind].solve(params, steps)
    table = np.array([[update.get(name, 0.0) for name in names] for update in schedule.updates])
    if not np.isfinite(table).all():
        raise UsageError(
            f"{number} steps with shift {params.shift} give coefficients that are not finite",
            hint="two neighbouring sigmas are equal in float32, or a sigma has no logarithm: use fewer steps"
            if own is None
            else "pass falling values between 1 and 0, no two of them equal",
        )
    # diffusers computes this product in float32 too.
    return CoefficientTable(
        columns=names,
        timesteps=schedule.timesteps * np.float32(params.timestep_scale),
        coefficients=table.astype(np.float32),
        sigmas=schedule.sigmas,
        init_noise_sigma=schedule.init_noise_sigma,
        decodes_x0=SOLVERS[params.kind].decodes_x0,
        levels=np.stack([1 - schedule.sigmas, schedule.sigmas], axis=1)
        if schedule.levels is None
        else schedule.levels,
        timestep_scale=params.timestep_scale,
    )


def _mu(params: SchedulerParams, mu: float | None, image_seq_len: int | None) -> float | None:
    if not params.use_dynamic_shifting:
        return mu
    if mu is None and image_seq_len is None:
        raise UsageError(
            "dynamic shifting depends on the size of the picture, which is not given",
            hint="pass image_seq_len",
        )
    if mu is None:
        assert image_seq_len is not None
        mu = dynamic_mu(params, image_seq_len)
    if not abs(mu) <= _MAX_MU:
        raise UsageError(
            f"mu is {mu:g}, of which exp has no meaning for a schedule",
            hint=f"pass mu from {-_MAX_MU} to {_MAX_MU}; models use {params.base_shift} to {params.max_shift}",
        )
    return mu


def _check_own(
    params: SchedulerParams,
    number: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
    settings: Mapping[str, float | None],
) -> None:
    """Refuse a schedule of the caller's own that diffusers' scheduler refuses or fails on."""
    solver = SOLVERS[params.kind]
    if timesteps is not None and sigmas is not None:
        raise UsageError("timesteps and sigmas are both given", hint="pass only one of them, as in diffusers")
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is None:
            continue
        if name not in solver.takes:
            others = " or ".join(sorted(solver.takes))
            raise UsageError(
                f"{name} are given, but the bundle's scheduler, {solver.upstream}, takes none for flow models",
                hint=f"pass {others or 'num_inference_steps'} instead",
            )
        if params.kind is SchedulerKind.UNIPC and params.spacing is not Spacing.UNIFORM:
            raise UsageError(
                f"{name} are given, but the bundle's scheduler spaces its own ({params.spacing} sigmas)",
                hint="pass num_inference_steps instead",
            )
    _check_settings(solver, number, timesteps, settings)
    if mu is not None and not params.use_dynamic_shifting:
        raise UsageError(
            f"mu is {mu}, but the bundle's scheduler has no dynamic shifting", hint="leave mu out"
        )


def _check_settings(
    solver: Solver, number: int, timesteps: Sequence[float] | None, settings: Mapping[str, float | None]
) -> None:
    """Refuse max_timesteps and intermediate_timesteps where SCMScheduler.set_timesteps refuses them."""
    for name, value in settings.items():
        if value is None or value is False:
            continue
        if name not in solver.takes:
            raise UsageError(
                f"{name} is {value:g}, but the bundle's scheduler, {solver.upstream}, has no such setting",
                hint=f"leave {name} out",
            )
        if timesteps is not None:
            raise UsageError(
                f"{name} is {value:g}, but timesteps are given too",
                hint="pass only one of them, as in diffusers",
            )
    middle = settings["intermediate_timesteps"]
    if middle is not None and middle is not False and number != 2:
        raise UsageError(
            f"intermediate_timesteps is {middle:g}, but only a schedule of 2 steps has it, and this one has {number}",
            hint="leave it out, which spaces the steps evenly, or pass timesteps",
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
