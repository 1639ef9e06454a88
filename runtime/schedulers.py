"""Samplers as data: the numbers that a denoiser engine needs for every step, from a scheduler's parameters.

The engine does one linear update a step, whatever the solver:

    pred = guided network output of (c_in * x)
    x0   = a * x + b * pred
    next = cx * x + c0 * x0 + sum_k h_k * history_k

where history_k is the x0 of k steps ago. A solver is therefore a table with one row a step, columns
[c_in, a, b, cx, c0, h_1 .. h_H], computed here once a request in float64 from sigmas that are rounded to
float32 where diffusers 0.42.1 rounds them.

Sources: DPM-Solver++ (arXiv 2211.01095, algorithms 1 and 2) with the flow-matching sigmas of diffusers'
DPMSolverMultistepScheduler(use_flow_sigmas=True); Euler for rectified flows (arXiv 2403.03206) with those of
diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.errors import UsageError

# c_in, a, b, cx, c0: the columns before the history's.
FIXED_COLUMNS = 5


class SchedulerKind(StrEnum):
    """The solvers."""

    DPMSOLVER = "flow_dpmsolver_multistep"
    EULER = "flow_match_euler"


class SolverType(StrEnum):
    """How DPM-Solver++ 2M weighs the difference of two predictions."""

    MIDPOINT = "midpoint"
    HEUN = "heun"


class FinalSigmas(StrEnum):
    """Where DPM-Solver++ ends: without noise, or at the smallest noise level of the training betas."""

    ZERO = "zero"
    SIGMA_MIN = "sigma_min"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerParams:
    """All that decides a schedule's numbers; JSON scalars only. Names are diffusers' where it has one.

    Attributes:
        kind: the solver.
        num_train_timesteps: the timestep that stands for sigma 1.
        shift: diffusers' flow_shift (DPM-Solver++) or shift (Euler).
        timestep_scale: factor on the timesteps that the network sees, from the transformer's config.
        sigma_min: DPM-Solver++: the last sigma when final_sigmas_type is "sigma_min". Euler: the smallest
            training sigma after the first shift. diffusers shifts in __init__ and again in set_timesteps: the
            values between the two freeze that into the bundle.
        sigma_max: Euler: the largest training sigma after the first shift.
        solver_order, solver_type, final_sigmas_type, lower_order_final, euler_at_final: DPM-Solver++ only.
    """

    kind: SchedulerKind
    num_train_timesteps: int = 1000
    shift: float = 1.0
    timestep_scale: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    solver_order: int = 2
    solver_type: SolverType = SolverType.MIDPOINT
    final_sigmas_type: FinalSigmas = FinalSigmas.ZERO
    lower_order_final: bool = True
    euler_at_final: bool = False

    @property
    def history_length(self) -> int:
        """How many past x0 the update reads."""
        return self.solver_order - 1 if self.kind == SchedulerKind.DPMSOLVER else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientTable:
    """A schedule, one row a step.

    Attributes:
        timesteps: (N,) float32, what the network sees.
        coefficients: (N, 5 + H) float32, columns [c_in, a, b, cx, c0, h_1 .. h_H].
        sigmas: (N + 1,) float32, noise levels before each step and after the last.
        init_noise_sigma: standard deviation of the starting latents.
    """

    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    init_noise_sigma: float

    def __len__(self) -> int:
        return len(self.timesteps)


def coefficient_table(
    params: SchedulerParams,
    num_inference_steps: int,
    begin_index: int = 0,
    *,
    history_length: int | None = None,
) -> CoefficientTable:
    """The schedule of `num_inference_steps` steps, from step `begin_index` on (image-to-image starts late).

    Args:
        history_length: H of the engine, when it is more than the solver needs: the extra columns are zero.

    Raises:
        UsageError: no steps, a begin_index outside them, an engine whose history is too short, or a schedule
            whose update is not finite.
    """
    _check_request(params, num_inference_steps, begin_index, history_length)
    if params.kind == SchedulerKind.DPMSOLVER:
        timesteps, sigmas = _dpmsolver_schedule(params, num_inference_steps)
    else:
        timesteps, sigmas = _euler_schedule(params, num_inference_steps)

    history = params.history_length if history_length is None else history_length
    table = np.zeros((num_inference_steps - begin_index, FIXED_COLUMNS + history))
    exact = sigmas.astype(np.float64)
    for row, step in zip(table, range(begin_index, num_inference_steps), strict=True):
        # Velocity prediction: the network sees x as it is, and x0 = x - sigma * pred.
        row[:3] = 1.0, 1.0, -exact[step]
        if step > begin_index and _is_second_order(params, step, num_inference_steps):
            row[3:6] = _second_order_update(params, exact[step - 1], exact[step], exact[step + 1])
        else:
            row[3:5] = _first_order_update(exact[step], exact[step + 1])
    if not np.isfinite(table).all():
        raise UsageError(
            f"{num_inference_steps} steps with shift {params.shift} give an update that is not finite",
            hint="take fewer steps: two neighbouring sigmas are equal in float32",
        )
    # What the network sees is one float32 product in diffusers: t * timestep_scale.
    seen = timesteps.astype(np.float32) * np.float32(params.timestep_scale)
    return CoefficientTable(
        timesteps=seen[begin_index:],
        coefficients=table.astype(np.float32),
        sigmas=sigmas[begin_index:],
        init_noise_sigma=1.0,
    )


def _check_request(
    params: SchedulerParams, num_inference_steps: int, begin_index: int, history_length: int | None
) -> None:
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
    if history_length is not None and history_length < params.history_length:
        raise UsageError(
            f"the engine keeps {history_length} past predictions, "
            f"{params.kind} of order {params.solver_order} needs {params.history_length}",
            hint="take solver_order 1, or export the denoiser with a longer history",
        )


def _shifted(sigmas: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Resolution-dependent shift of rectified-flow noise levels (arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _dpmsolver_schedule(
    params: SchedulerParams, num_inference_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Timesteps (N,), truncated to integers as diffusers does, and sigmas (N + 1,)."""
    alphas = np.linspace(1, 1 / params.num_train_timesteps, num_inference_steps + 1)
    sigmas = _shifted(1.0 - alphas, params.shift)[:0:-1]
    timesteps = np.trunc(sigmas * params.num_train_timesteps)
    last = params.sigma_min if params.final_sigmas_type == FinalSigmas.SIGMA_MIN else 0.0
    return timesteps.astype(np.float32), np.append(sigmas, last).astype(np.float32)


def _euler_schedule(
    params: SchedulerParams, num_inference_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Timesteps (N,), not truncated, and sigmas (N + 1,). The shift here is the second one."""
    train = params.num_train_timesteps
    timesteps = np.linspace(params.sigma_max * train, params.sigma_min * train, num_inference_steps)
    sigmas = _shifted(timesteps / train, params.shift).astype(np.float32)
    return sigmas * np.float32(train), np.append(sigmas, np.float32(0))


def _is_second_order(params: SchedulerParams, step: int, num_inference_steps: int) -> bool:
    """diffusers' rule (DPMSolverMultistepScheduler.step): when the last step falls back to first order."""
    if params.history_length == 0:
        return False
    is_last = step == num_inference_steps - 1
    falls_back = (
        params.euler_at_final
        # 15: below it diffusers holds that a high-order last step is unstable.
        or (params.lower_order_final and num_inference_steps < 15)
        or params.final_sigmas_type == FinalSigmas.ZERO
    )
    return not (is_last and falls_back)


def _first_order_update(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(cx, c0) of the first-order step, which Euler and DPM-Solver++ 1 share.

    With alpha = 1 - sigma, DPM-Solver++'s  -alpha_next * (exp(-h) - 1)  is  alpha_next - alpha * ratio
    = 1 - ratio: no logarithm is left, so a last sigma of 0 (h infinite) needs no case of its own.
    """
    ratio = sigma_next / sigma
    return ratio, 1.0 - ratio


def _second_order_update(
    params: SchedulerParams, sigma_before: float, sigma: float, sigma_next: float
) -> tuple[float, float, float]:
    """(cx, c0, h_1) of DPM-Solver++ 2M, with D1 = (x0 - history_1) / r0 (arXiv 2211.01095, algorithm 2)."""
    cx, c0 = _first_order_update(sigma, sigma_next)
    h = _half_log_snr(sigma_next) - _half_log_snr(sigma)
    h_before = _half_log_snr(sigma) - _half_log_snr(sigma_before)
    if h == 0 or h_before == 0:
        return cx, math.nan, math.nan
    d1 = 0.5 * c0 if params.solver_type == SolverType.MIDPOINT else (1.0 - sigma_next) - c0 / h
    slope = d1 * h / h_before
    return cx, c0 + slope, -slope


def _half_log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma), alpha = 1 - sigma."""
    if not 0 < sigma < 1:
        return math.nan
    return math.log(1.0 - sigma) - math.log(sigma)
