"""DPM-Solver++ (arXiv 2211.01095, algorithms 1 and 2) with flow-matching sigmas.

The schedule is that of diffusers' DPMSolverMultistepScheduler(use_flow_sigmas=True), 0.42.1.
"""

from __future__ import annotations

import math

import numpy as np

from ditc.runtime.schedulers.params import FinalSigmas, SchedulerParams, SolverType
from ditc.runtime.schedulers.solver import Schedule, Solver, first_order_update, shifted, velocity
from ditc.runtime.step_contract import C0, CX, history_column


def solve(params: SchedulerParams, num_inference_steps: int, begin_index: int) -> Schedule:
    """The schedule, with timesteps truncated to integers as in diffusers."""
    alphas = np.linspace(1, 1 / params.num_train_timesteps, num_inference_steps + 1)
    levels = shifted(1.0 - alphas, params.shift)[:0:-1]
    last = params.sigma_min if params.final_sigmas_type == FinalSigmas.SIGMA_MIN else 0.0
    sigmas = np.append(levels, last).astype(np.float32)
    exact = sigmas.astype(np.float64).tolist()
    updates = []
    for step in range(begin_index, num_inference_steps):
        # After a late start there is no earlier x0, so the first step is of first order.
        if step > begin_index and _is_second_order(params, step, num_inference_steps):
            update = _second_order_update(params, *exact[step - 1 : step + 2])
        else:
            update = first_order_update(exact[step], exact[step + 1])
        updates.append({**velocity(exact[step]), **update})
    timesteps = np.trunc(levels * params.num_train_timesteps).astype(np.float32)
    return Schedule(timesteps=timesteps, sigmas=sigmas, updates=updates)


def _is_second_order(params: SchedulerParams, step: int, num_inference_steps: int) -> bool:
    """Whether a step is of second order, by the rule of diffusers (DPMSolverMultistepScheduler.step)."""
    if params.solver_order == 1:
        return False
    is_last = step == num_inference_steps - 1
    falls_back = (
        params.euler_at_final
        # diffusers considers a high-order last step unstable below 15 steps.
        or (params.lower_order_final and num_inference_steps < 15)
        or params.final_sigmas_type == FinalSigmas.ZERO
    )
    return not (is_last and falls_back)


def _second_order_update(
    params: SchedulerParams, sigma_before: float, sigma: float, sigma_next: float
) -> dict[str, float]:
    """DPM-Solver++ 2M, with D1 = (x0 - history_1) / r0 (arXiv 2211.01095, algorithm 2)."""
    first = first_order_update(sigma, sigma_next)
    cx, c0 = first[CX], first[C0]
    h = _half_log_snr(sigma_next) - _half_log_snr(sigma)
    h_before = _half_log_snr(sigma) - _half_log_snr(sigma_before)
    if h == 0 or h_before == 0:
        slope = math.nan
    else:
        d1 = 0.5 * c0 if params.solver_type == SolverType.MIDPOINT else (1.0 - sigma_next) - c0 / h
        slope = d1 * h / h_before
    return {CX: cx, C0: c0 + slope, history_column(1): -slope}


def _half_log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma), alpha = 1 - sigma."""
    if not 0 < sigma < 1:
        return math.nan
    return math.log(1.0 - sigma) - math.log(sigma)


DPMSOLVER = Solver(solve=solve, history_length=lambda params: params.solver_order - 1)
