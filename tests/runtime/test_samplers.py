"""Every sampler against diffusers' own scheduler on the same network, in float64, so that rounding hides nothing.

diffusers keeps its sigmas in float32 and computes its coefficients from them. With the sigmas widened, it computes all
in float64, while the table's coefficients are rounded to float32 once.
"""

from __future__ import annotations

import inspect
import json
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from ditc.export.checkpoint.scheduler_config import scheduler_params
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.rng import Generator
from ditc.runtime.schedulers import SOLVERS, Steps, coefficient_table, dynamic_mu
from ditc.runtime.schedulers.spacing import beta_quantile
from ditc.runtime.session import Array
from ditc.runtime.step_contract import coefficient_columns

BOUND = 1e-6  # measured over all cases: at most 5.6e-7
STEPS = (1, 2, 3, 4, 8, 14, 15, 20, 50)
SHAPE = (1, 4, 6, 6)
START = np.random.default_rng(7).standard_normal(SHAPE).astype(np.float32)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PATCHES = 1024


def network(x: Array, timestep: float) -> Array:
    """A smooth velocity field that depends on the latents, their neighbours and the timestep."""
    return np.asarray(np.tanh(0.8 * np.roll(x, 1, axis=-1)) + 0.5 * x - 0.2 * np.cos(timestep / 250))


def run_rows(timesteps: Array, rows: list[dict[str, float]], dtype: type) -> Array:
    """The arithmetic of the denoiser's step (runtime/step_contract.py)."""
    x, history, stream = START.astype(dtype), [np.zeros(SHAPE, dtype)] * 3, Generator(5)
    for t, c in zip(timesteps, rows, strict=True):
        x0 = c["a"] * x + c["b"] * network(c["c_in"] * x, t).astype(dtype)
        x = c["cx"] * x + c["c0"] * x0
        for k, old in enumerate(history):
            x = x + c.get(f"h{k + 1}", 0.0) * old
        if "cn" in c:
            x = x + c["cn"] * stream.randn(SHAPE)
        history = [x0, *history[:-1]]
    return x.astype(dtype)


def run_diffusers(scheduler: Any, dtype: type, **settings: Any) -> Array:
    scheduler.set_timesteps(**settings)
    if dtype is np.float64:
        scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    given = {"generator": torch.Generator().manual_seed(5)} if draws else {}
    x = torch.from_numpy(START.astype(dtype))
    for t in scheduler.timesteps:
        pred = torch.from_numpy(network(x.numpy(), float(t)).astype(dtype))
        x = scheduler.step(pred, t, x, return_dict=False, **given)[0]
    return np.asarray(x)


def check(scheduler: Any, *, dtype: type = np.float64, steps: tuple[int, ...] = STEPS, **own: Any) -> None:
    """Compare timesteps, sigmas and the last latents; `own` are the caller's sigmas, timesteps or mu."""
    params = scheduler_params(json.loads(scheduler.to_json_string()), passes_mu=True)
    mu = {"mu": dynamic_mu(params, PATCHES)} if params.use_dynamic_shifting else {}
    counted = not ({"sigmas", "timesteps"} & own.keys())
    for number in steps:
        table = coefficient_table(params, number, image_seq_len=PATCHES, **own)
        settings = {**mu, **own, **({"num_inference_steps": number} if counted else {})}
        theirs = run_diffusers(scheduler, dtype, **settings)
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.float().numpy())
        np.testing.assert_allclose(table.sigmas, scheduler.sigmas.numpy(), rtol=1.2e-7)  # one float32 step
        rows = [dict(zip(table.columns, map(float, row), strict=True)) for row in table.coefficients]
        assert relative_l2(run_rows(table.timesteps, rows, dtype), theirs) <= BOUND, number


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmsolver_of_every_order_also_with_fresh_noise(order: int, algorithm: str) -> None:
    for solver_type, (final, lower) in product(
        ("midpoint", "heun"), (("zero", True), ("sigma_min", False), ("sigma_min", True))
    ):
        check(
            DPMSolverMultistepScheduler(
                **FLOW,
                flow_shift=3.0,
                solver_order=order,
                algorithm_type=algorithm,
                solver_type=solver_type,
                final_sigmas_type=final,
                lower_order_final=lower,
            )
        )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("disabled", [[], [0, 2]])
def test_unipc_corrects_from_the_history_alone(order: int, disabled: list[int]) -> None:
    for solver_type, final, lower in (
        ("bh2", "zero", True),
        ("bh1", "sigma_min", True),
        ("bh2", "sigma_min", order == 3),
    ):
        check(
            UniPCMultistepScheduler(
                **FLOW,
                flow_shift=3.0,
                solver_order=order,
                solver_type=solver_type,
                final_sigmas_type=final,
                lower_order_final=lower,
                disable_corrector=disabled,
            )
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": np.linspace(0.001, 0.03, 1000).tolist()},
        {"sigma_min": 0.01, "sigma_max": 80.0, "final_sigmas_type": "sigma_min"},
    ],
)
def test_karras_sigmas_of_unipc_lie_between_those_of_the_training_betas(settings: dict[str, Any]) -> None:
    check(UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True, **settings), steps=(1, 4, 20))


def test_the_last_sigma_of_dpmsolver_comes_from_every_kind_of_betas() -> None:
    for settings in ({"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}):
        check(DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min", **settings), steps=(1, 20))


SHIFTS = ({}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"})


@pytest.mark.parametrize("spacing", [None, "karras", "exponential"])
def test_euler_with_every_shift_and_spacing(spacing: str | None) -> None:
    for shift, terminal, inverted in product(SHIFTS, (None, 0.1), (False, True)):
        settings = {**shift, "shift_terminal": terminal, "invert_sigmas": inverted}
        if spacing:
            settings[f"use_{spacing}_sigmas"] = True
        # A single level of 1 cannot be stretched: diffusers divides by zero.
        steps = (2, 3, 20) if terminal else (1, 3, 20)
        check(FlowMatchEulerDiscreteScheduler(shift=3.0, **settings), steps=steps)
        noisy = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True, **settings)
        for sampler in (noisy, FlowMatchLCMScheduler(shift=3.0, **settings)):
            check(sampler, dtype=np.float32, steps=steps)  # its noise has the type of the latents


def test_dynamic_shifting_of_the_multistep_solvers() -> None:
    check(DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True))
    for kind in ("exponential", "linear"):
        settings = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.1}
        check(UniPCMultistepScheduler(**FLOW, **settings), steps=(2, 4, 20))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_runs_the_network_twice_in_every_step_but_the_last(shift: float) -> None:
    """The coefficients stay in float64, because the last steps multiply rounding by up to 1 / sigma = 1000."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    params = scheduler_params(json.loads(scheduler.to_json_string()))
    for number in STEPS:
        schedule = SOLVERS[params.kind].solve(params, Steps(number=number))
        theirs = run_diffusers(scheduler, np.float64, num_inference_steps=number)
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
        np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
        rows = [dict(update) for update in schedule.updates]
        assert relative_l2(run_rows(schedule.timesteps, rows, np.float64), theirs) <= BOUND
        assert len(coefficient_table(params, number)) == 2 * number - 1


OWN = [1.0, 0.8, 0.45, 0.2]


@pytest.mark.parametrize(
    ("scheduler", "own"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": OWN}),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.0, 0.5, 0.0]}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"timesteps": [999, 700.5, 300]}),
        (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {"sigmas": OWN}),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {"sigmas": OWN, "mu": 0.9}),
        (UniPCMultistepScheduler(**FLOW, flow_shift=3.0), {"sigmas": np.array(OWN)}),
    ],
)
def test_own_schedules_are_taken_as_diffusers_takes_them(scheduler: Any, own: dict[str, Any]) -> None:
    check(scheduler, steps=(7,), **own)


@pytest.mark.parametrize(
    ("scheduler", "own", "named"),
    [
        (DPMSolverMultistepScheduler(**FLOW), {"sigmas": OWN}, "DPMSolverMultistepScheduler"),
        (DPMSolverMultistepScheduler(**FLOW), {"timesteps": [900, 500]}, "DPMSolverMultistepScheduler"),
        (UniPCMultistepScheduler(**FLOW), {"timesteps": [900, 500]}, "pass sigmas"),
        (FlowMatchHeunDiscreteScheduler(), {"sigmas": OWN}, "FlowMatchHeunDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": OWN, "timesteps": OWN}, "only one"),
        (FlowMatchEulerDiscreteScheduler(), {"mu": 0.5}, "no dynamic shifting"),
        (UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True), {"sigmas": OWN}, "karras"),
        (UniPCMultistepScheduler(**FLOW), {"sigmas": [1.0, 0.5, 0.5, 0.2]}, "not finite"),
    ],
)
def test_own_schedules_that_diffusers_refuses_are_refused(
    scheduler: Any, own: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        coefficient_table(scheduler_params(json.loads(scheduler.to_json_string())), 4, **own)
    assert named in f"{caught.value} {caught.value.hint}"


def test_beta_quantiles_equal_those_of_scipy() -> None:
    """Recorded with scipy 1.17.1: stats.beta.ppf(q, 0.6, 0.6)."""
    shares = np.array([0.0, 1e-3, 0.1, 1 / 3, 0.5, 0.75, 0.95, 1.0])
    wanted = [
        0.0,
        1.855873851745199e-05,
        0.03958440558878085,
        0.2754132907776234,
        0.5000000000000001,
        0.824319621347305,
        0.9874455431263885,
        1.0,
    ]
    np.testing.assert_allclose(beta_quantile(shares), wanted, rtol=1e-13)


def test_beta_sigmas_equal_diffusers_where_scipy_is_installed() -> None:
    pytest.importorskip("scipy", reason="diffusers computes beta sigmas with scipy")
    check(FlowMatchEulerDiscreteScheduler(shift=3.0, use_beta_sigmas=True))


def test_two_spacings_at_once_are_refused_as_in_diffusers() -> None:
    config = json.loads(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).to_json_string())
    with pytest.raises(CheckpointError, match="karras and exponential"):
        scheduler_params({**config, "use_exponential_sigmas": True})


def test_columns_that_a_sampler_does_not_use_change_nothing() -> None:
    params = scheduler_params(json.loads(FlowMatchHeunDiscreteScheduler().to_json_string()))
    padded = coefficient_table(params, 4, columns=coefficient_columns(3, True))
    np.testing.assert_array_equal(padded.coefficients[:, :6], coefficient_table(params, 4).coefficients)
    assert not padded.coefficients[:, 6:].any()
