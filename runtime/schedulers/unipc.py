"""UniPC (arXiv 2302.04867, algorithms 1 to 3, the B(h) version) with flow-matching sigmas.

The schedule is that of diffusers' UniPCMultistepScheduler(use_flow_sigmas=True), 0.42.1. A step first corrects the
latents that the step before it predicted, now that their x0 is known, and then predicts the next ones. Both start from
the corrected latents of the step before, with the same factor sigma / sigma_before. So the correction is what the
corrector adds to the predictor: a sum over the x0 of this step and of the earlier ones. No other state is needed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.schedulers.params import FinalSigmas, SchedulerParams, SolverType, Spacing, Steps
from ditc.runtime.schedulers.solver import Schedule, Solver, first_order_update, half_log_snr, velocity
from ditc.runtime.schedulers.spacing import karras, shifted_by
from ditc.runtime.step_contract import C0, CX, history_column

# A sigma of 1 has no logarithm of 1 - sigma, so diffusers lowers the first one by as much as this.
_EPSILON = 1e-6

# The weight of each x0 in a sum: of this step at 0, of the step before at 1, and so on.
Weights = NDArray[np.float64]


def solve(params: SchedulerParams, steps: Steps) -> Schedule:
    """The schedule, with timesteps truncated to integers as in diffusers."""
    levels = _levels(params, steps)
    last = float(levels[-1]) if params.final_sigmas_type is FinalSigmas.SIGMA_MIN else 0.0
    sigmas = np.append(levels, last).astype(np.float32)
    exact = sigmas.astype(np.float64).tolist()
    updates = []
    for step in range(steps.begin_index, steps.number):
        predicted = _predicted(params, exact, step, _order(params, step, steps))
        ratio = first_order_update(exact[step], exact[step + 1])[CX]
        corrected = np.zeros(params.solver_order + 1)
        if step > steps.begin_index and step - 1 not in params.disable_corrector:
            corrected = _correction(params, exact, step, _order(params, step - 1, steps))
        weights = predicted + ratio * corrected
        history = {history_column(k): float(w) for k, w in enumerate(weights) if k}
        updates.append({**velocity(exact[step]), CX: ratio, C0: float(weights[0]), **history})
    timesteps = np.trunc(levels * params.num_train_timesteps).astype(np.float32)
    return Schedule(
        timesteps=timesteps[steps.begin_index :], sigmas=sigmas[steps.begin_index :], updates=updates
    )


def _levels(params: SchedulerParams, steps: Steps) -> NDArray[np.float64]:
    if params.spacing is Spacing.KARRAS:
        assert params.spacing_min is not None and params.spacing_max is not None
        spread = karras(params.spacing_min, params.spacing_max, steps.number)
        return spread / (spread + 1)  # from a variance-exploding level to a flow's
    levels = np.linspace(1, 1 / params.num_train_timesteps, steps.number + 1)[:-1]
    if steps.sigmas is not None:
        levels = np.array(steps.sigmas, np.float64)
    levels = np.array(shifted_by(params, levels, steps.mu), np.float64)
    if abs(levels[0] - 1) < _EPSILON:
        levels[0] -= _EPSILON
    return levels


def _order(params: SchedulerParams, step: int, steps: Steps) -> int:
    """The order of a step: it grows from 1 at the start, and falls to 1 at the end if lower_order_final is set."""
    left = steps.number - step if params.lower_order_final else params.solver_order
    return min(params.solver_order, left, step - steps.begin_index + 1)


def _predicted(params: SchedulerParams, sigmas: list[float], step: int, order: int) -> Weights:
    """The weights of the predictor (UniP) from sigmas[step] to sigmas[step + 1]."""
    weights = np.zeros(params.solver_order + 1)
    sigma, sigma_next = sigmas[step : step + 2]
    weights[0] = first_order_update(sigma, sigma_next)[C0]
    if not sigma_next and (order > 1 or params.solver_type is SolverType.BH1):
        weights[0] = math.nan  # as in diffusers, where h and B(h) are infinite
    elif sigma == sigma_next and order < 3:
        weights[0] = 0.0
    elif order > 1:
        differences = _Differences(params, sigmas, step, order)
        weights[:order] += differences.weights([*differences.predictor(), 0.0])[1:]
    return weights


def _correction(params: SchedulerParams, sigmas: list[float], step: int, order: int) -> Weights:
    """The weights of what the corrector (UniC) adds at sigmas[step] to the predictor that led there."""
    weights = np.zeros(params.solver_order + 1)
    differences = _Differences(params, sigmas, step - 1, order)
    added = differences.corrector()
    added[:-1] -= differences.predictor()
    weights[: order + 1] = differences.weights(added)
    return weights


class _Differences:
    """The differences between predictions of x0 that a step from sigmas[step] of one order is made of.

    Args:
        step: the index of the level that the step starts from. Its x0 is the base of all differences.
        order: 1 or more.
    """

    def __init__(self, params: SchedulerParams, sigmas: list[float], step: int, order: int) -> None:
        here, there = half_log_snr(sigmas[step]), half_log_snr(sigmas[step + 1])
        self.order, self.h = order, there - here or math.nan
        earlier = [half_log_snr(sigmas[step - k]) for k in range(1, order)]
        # A difference per earlier step, and one with the prediction at the next level.
        self.ratios = np.array([*((level - here) / self.h for level in earlier), 1.0])
        b_of_h = -self.h if params.solver_type is SolverType.BH1 else math.expm1(-self.h)
        self.scale = -(1.0 - sigmas[step + 1]) * b_of_h
        phi, factorial, self.right = math.expm1(-self.h) / -self.h - 1.0, 1.0, []
        for k in range(1, order + 1):
            self.right.append(phi * factorial / b_of_h)
            factorial *= k + 1
            phi = phi / -self.h - 1.0 / factorial
        self.powers = np.vander(self.ratios, order, increasing=True).T

    def predictor(self) -> NDArray[np.float64]:
        """The coefficients of the differences with earlier steps. The second order is simplified, as upstream."""
        if self.order == 2:
            return np.array([0.5])
        return _solved(self.powers[:-1, :-1], self.right[:-1])

    def corrector(self) -> NDArray[np.float64]:
        """The coefficients of all differences, that with the next level last. The first order is simplified."""
        return np.array([0.5]) if self.order == 1 else _solved(self.powers, self.right)

    def weights(self, coefficients: NDArray[np.float64] | list[float]) -> Weights:
        """The weights of the x0 at the next level, at this one, and at the earlier ones, in the sum."""
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = self.scale * np.asarray(coefficients) / self.ratios
        terms[~np.isfinite(terms)] = math.nan  # equal levels; the table refuses NaN
        return np.array([terms[-1], -terms.sum(), *terms[:-1]])


def _solved(matrix: NDArray[np.float64], right: list[float]) -> NDArray[np.float64]:
    try:
        return np.linalg.solve(matrix, np.array(right))
    except np.linalg.LinAlgError:  # equal levels too
        return np.full(len(right), math.nan)


UNIPC = Solver(
    upstream="UniPCMultistepScheduler",
    solve=solve,
    history_length=lambda params: params.solver_order,
    takes=frozenset({"sigmas"}),
    reads_earlier_latents=True,
)
