"""DPM-Solver++ (arXiv 2211.01095, algorithms 1 and 2, and the third-order multistep of arXiv 2206.00927) for flows.

The schedule is that of diffusers' DPMSolverMultistepScheduler(use_flow_sigmas=True), 0.42.1. The stochastic variant is
its algorithm "sde-dpmsolver++".
"""

from __future__ import annotations

import math

import numpy as np

from ditc.runtime.schedulers.params import FinalSigmas, SchedulerParams, SolverType, Steps
from ditc.runtime.schedulers.solver import (
    Schedule,
    Solver,
    first_order_update,
    half_log_snr,
    velocity,
)
from ditc.runtime.schedulers.spacing import shifted
from ditc.runtime.step_contract import C0, CN, CX, history_column


def solve(params: SchedulerParams, steps: Steps) -> Schedule:
    """The schedule, with timesteps truncated to integers as in diffusers."""
    shift = params.shift if steps.mu is None else math.exp(steps.mu)
    alphas = np.linspace(1, 1 / params.num_train_timesteps, steps.number + 1)
    levels = shifted(1.0 - alphas, shift)[:0:-1]
    last = params.sigma_min if params.final_sigmas_type == FinalSigmas.SIGMA_MIN else 0.0
    sigmas = np.append(levels, last).astype(np.float32)
    exact = sigmas.astype(np.float64).tolist()
    updates = []
    for step in range(steps.begin_index, steps.number):
        order = _order(params, step, steps)
        known = exact[step - order + 1 : step + 2]
        updates.append({**velocity(exact[step]), **_update(params, known)})
    timesteps = np.trunc(levels * params.num_train_timesteps).astype(np.float32)
    return Schedule(
        timesteps=timesteps[steps.begin_index :], sigmas=sigmas[steps.begin_index :], updates=updates
    )


def _order(params: SchedulerParams, step: int, steps: Steps) -> int:
    """The order of a step, by the rule of diffusers (DPMSolverMultistepScheduler.step)."""
    # diffusers considers high-order last steps unstable below 15 steps.
    lowered = params.lower_order_final and steps.number < 15
    left = steps.number - step
    if left == 1 and (params.euler_at_final or lowered or params.final_sigmas_type == FinalSigmas.ZERO):
        return 1
    most = 2 if left == 2 and lowered else params.solver_order
    # After a late start there is no earlier x0, so the first step is of first order.
    return min(params.solver_order, most, step - steps.begin_index + 1)


def _update(params: SchedulerParams, sigmas: list[float]) -> dict[str, float]:
    """One step from sigmas[-2] to sigmas[-1]. The order is the number of sigmas before the last one."""
    sigma, sigma_next = sigmas[-2:]
    update = first_order_update(sigma, sigma_next)
    alpha = 1.0 - sigma_next
    if params.stochastic:
        decay = update[CX] * (1.0 - sigma) / alpha  # exp(-h)
        update = {
            CX: update[CX] * decay,
            C0: alpha * (1.0 - decay**2),
            CN: sigma_next * math.sqrt(max(0.0, 1.0 - decay**2)),
        }
    if len(sigmas) == 2:
        return update
    lambdas = [half_log_snr(level) for level in sigmas]
    sizes = np.diff(lambdas)[::-1]  # h of this step, of the one before, and so on
    if not (np.isfinite(sizes).all() and sizes.all()):
        return {C0: math.nan}
    h = float(sizes[0])
    # The weights of the derivatives D1 and D2 of x0 over this step.
    weight, doubled = update[C0], h * (2 if params.stochastic else 1)
    first = alpha - weight / doubled
    if len(sigmas) == 3:
        if params.solver_type is SolverType.MIDPOINT:
            first = 0.5 * weight
        slope = first * h / float(sizes[1])
        return {**update, C0: weight + slope, history_column(1): -slope}
    # The sign of the last term is diffusers'.
    second = (weight - alpha * doubled) / doubled**2 + alpha * (-0.5 if params.stochastic else 0.5)
    r0, r1 = float(sizes[1]) / h, float(sizes[2]) / h
    newer = (first * (2 * r0 + r1) + second) / (r0 + r1) / r0
    older = (first * r0 + second) / (r0 + r1) / r1
    return {
        **update,
        C0: weight + newer,
        history_column(1): -newer - older,
        history_column(2): older,
    }


DPMSOLVER = Solver(
    upstream="DPMSolverMultistepScheduler",
    solve=solve,
    history_length=lambda params: params.solver_order - 1,
)
