"""The coefficient table, compared with diffusers' schedulers on the same deterministic network."""

from __future__ import annotations

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
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.schedulers import CoefficientTable, SchedulerParams, coefficient_table
from ditc.runtime.step_contract import CN, coefficient_columns

STEPS = (1, 2, 3, 14, 15, 20, 50)
SHAPE = (2, 4, 8, 8)
# Both sides keep the latents in float32 (6e-8 per step), and diffusers also its coefficients. The second-order update
# multiplies the rounding of x0 by the ratio of two steps in lambda, which is about 4 in the last steps, before further
# steps reduce it again. Measured over all cases below: at most 6e-7.
BOUND = 2e-6


def network(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth velocity field that depends on the latents, their neighbours and the timestep."""
    return (np.tanh(0.8 * np.roll(x, 1, axis=-1)) + 0.5 * x - 0.2 * np.cos(timestep / 250)).astype(np.float32)


def start() -> np.ndarray:
    return np.random.default_rng(7).standard_normal(SHAPE).astype(np.float32)


def run_table(table: CoefficientTable) -> np.ndarray:
    """The arithmetic of the denoiser's step, in numpy float32."""
    x, history = start(), [np.zeros(SHAPE, np.float32)] * (table.coefficients.shape[1] - 5)
    for t, (c_in, a, b, cx, c0, *past) in zip(table.timesteps, table.coefficients, strict=True):
        x0 = a * x + b * network(c_in * x, t)
        x = cx * x + c0 * x0
        for h, old in zip(past, history, strict=True):
            x = x + h * old
        history = [x0, *history][: len(history)]
    return x


def run_diffusers(scheduler: Any, steps: int, *, begin_index: int = 0) -> np.ndarray:
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(begin_index)
    x = torch.from_numpy(start())
    for t in scheduler.timesteps[begin_index:]:
        x = scheduler.step(torch.from_numpy(network(x.numpy(), float(t))), t, x, return_dict=False)[0]
    return x.numpy()


def config_of(scheduler: Any) -> dict[str, Any]:
    """The scheduler_config.json that diffusers writes."""
    return dict(json.loads(scheduler.to_json_string()))


def dpmsolver(**settings: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **settings)


def unipc(**settings: Any) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **settings)


def check_against_diffusers(scheduler: Any, steps: int) -> None:
    table = coefficient_table(scheduler_params(config_of(scheduler)), steps)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.float().numpy())
    np.testing.assert_array_equal(table.sigmas[:-1], scheduler.sigmas[:-1].numpy())
    # sigma_min is a float32 square root, and torch's is not always the nearest float.
    np.testing.assert_array_max_ulp(table.sigmas[-1], scheduler.sigmas[-1].numpy(), maxulp=1)
    assert table.init_noise_sigma == getattr(scheduler, "init_noise_sigma", 1.0)
    assert relative_l2(run_table(table), run_diffusers(scheduler, steps)) <= BOUND


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmsolver_table_computes_what_diffusers_computes(steps: int, shift: float, final: str) -> None:
    for solver_type, order, euler_at_final, lower_order_final in product(
        ("midpoint", "heun"), (1, 2), (False, True), (False, True)
    ):
        scheduler = dpmsolver(
            flow_shift=shift,
            final_sigmas_type=final,
            solver_type=solver_type,
            solver_order=order,
            euler_at_final=euler_at_final,
            lower_order_final=lower_order_final,
        )
        check_against_diffusers(scheduler, steps)


@pytest.mark.parametrize("steps", [*STEPS, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_euler_table_computes_what_diffusers_computes_with_its_double_shift(steps: int, shift: float) -> None:
    check_against_diffusers(FlowMatchEulerDiscreteScheduler(shift=shift), steps)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("beta_start", [0.0001, 0.00085])
def test_sigma_min_comes_from_the_training_betas(schedule: str, beta_start: float) -> None:
    settings = {"final_sigmas_type": "sigma_min", "beta_schedule": schedule, "beta_start": beta_start}
    check_against_diffusers(dpmsolver(flow_shift=3.0, **settings), 20)


@pytest.mark.parametrize("begin_index", [1, 6, 19])
@pytest.mark.parametrize("make", [dpmsolver, FlowMatchEulerDiscreteScheduler])
def test_a_late_start_begins_with_a_first_order_step(make: Any, begin_index: int) -> None:
    scheduler = make()
    table = coefficient_table(scheduler_params(config_of(scheduler)), 20, begin_index)
    assert len(table) == 20 - begin_index
    assert not table.coefficients[0, 5:].any()
    reference = run_diffusers(scheduler, 20, begin_index=begin_index)
    assert relative_l2(run_table(table), reference) <= BOUND


def test_euler_on_an_engine_with_history_gives_the_same_latents() -> None:
    params = scheduler_params({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    padded = coefficient_table(params, 8, columns=coefficient_columns(1, False))
    assert padded.coefficients.shape == (8, 6)
    np.testing.assert_array_equal(run_table(padded), run_table(coefficient_table(params, 8)))


def test_the_noise_coefficient_is_zero_for_a_sampler_that_draws_no_noise() -> None:
    params = scheduler_params(config_of(dpmsolver(flow_shift=3.0)))
    columns = coefficient_columns(2, True)
    table, plain = coefficient_table(params, 8, columns=columns), coefficient_table(params, 8)
    assert table.columns == columns
    assert not table.coefficients[:, columns.index(CN)].any()
    for index, name in enumerate(plain.columns):
        np.testing.assert_array_equal(
            table.coefficients[:, columns.index(name)], plain.coefficients[:, index]
        )


def test_timestep_scale_is_applied_to_what_the_network_sees() -> None:
    scheduler = dpmsolver(flow_shift=3.0)
    table = coefficient_table(scheduler_params(config_of(scheduler), timestep_scale=0.001), 20)
    scheduler.set_timesteps(20)
    np.testing.assert_array_equal(table.timesteps, (scheduler.timesteps * 0.001).numpy())


REFUSED_BY_DPMSOLVER = {
    "solver_order": 4,
    "thresholding": True,
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "algorithm_type": "dpmsolver",
    "prediction_type": "v_prediction",
    "use_flow_sigmas": False,
    "solver_type": "bh3",
    "final_sigmas_type": "one",
    "flow_shift": -1.0,
    "num_train_timesteps": 0,
    "a_setting_of_next_year": True,
}
REFUSED_BY_UNIPC = {
    "solver_order": 4,
    "thresholding": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "prediction_type": "epsilon",
    "use_flow_sigmas": False,
    "predict_x0": False,
    "solver_p": {"_class_name": "DDIMScheduler"},
    "disable_corrector": ["first"],
    "use_dynamic_shifting": True,  # no mu
}
REFUSED_BY_EULER = {
    "use_dynamic_shifting": True,  # no mu
    "shift_terminal": -0.1,
    "use_karras_sigmas": 1,
    "time_shift_type": "cubic",
    "shift": "3.0",
}


@pytest.mark.parametrize(
    ("scheduler", "setting", "value"),
    [
        *((dpmsolver(), setting, value) for setting, value in REFUSED_BY_DPMSOLVER.items()),
        *((unipc(), setting, value) for setting, value in REFUSED_BY_UNIPC.items()),
        *((FlowMatchEulerDiscreteScheduler(), setting, value) for setting, value in REFUSED_BY_EULER.items()),
        (FlowMatchLCMScheduler(), "scale_factors", [0.5]),
        (FlowMatchHeunDiscreteScheduler(), "use_dynamic_shifting", True),
    ],
)
def test_a_setting_that_changes_the_numbers_is_refused_by_name(
    scheduler: Any, setting: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=setting):
        scheduler_params({**config_of(scheduler), setting: value})


def test_every_switch_of_diffusers_is_either_supported_or_refused() -> None:
    """This fails if a newer diffusers adds a switch, so that the switch is not silently ignored."""
    supported = {"use_flow_sigmas", "euler_at_final", "variance_type", "upscale_mode", "trained_betas"}
    supported |= {"rescale_betas_zero_snr", "invert_sigmas", "stochastic_sampling", "sigma_min", "sigma_max"}
    spacings = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    for scheduler, served in (
        (dpmsolver(final_sigmas_type="sigma_min"), {"use_dynamic_shifting"}),
        (unipc(), {"use_karras_sigmas"}),
        (FlowMatchEulerDiscreteScheduler(), spacings),
        (FlowMatchLCMScheduler(), spacings),
        (FlowMatchHeunDiscreteScheduler(), set()),
    ):
        config = config_of(scheduler)
        switches = {key for key, value in config.items() if value is None or value is False}
        for setting in switches - supported - served:
            with pytest.raises(CheckpointError, match=setting):
                scheduler_params({**config, setting: True})


def test_another_scheduler_is_refused_by_name_and_the_hint_says_that_it_draws_other_pictures() -> None:
    with pytest.raises(CheckpointError, match="DDIMScheduler") as caught:
        scheduler_params({"_class_name": "DDIMScheduler"})
    assert "other pictures" in str(caught.value.hint)


@pytest.mark.parametrize(
    "settings",
    [{"solver_type": "bh1"}, {"lower_order_final": False}, {"solver_order": 3, "lower_order_final": False}],
)
def test_settings_with_which_diffusers_computes_nan_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        scheduler_params(config_of(unipc(**settings)))


@pytest.mark.parametrize(("steps", "begin_index"), [(0, 0), (-1, 0), (4, 4), (4, -1)])
def test_a_schedule_without_steps_is_refused(steps: int, begin_index: int) -> None:
    with pytest.raises(UsageError):
        coefficient_table(scheduler_params(config_of(dpmsolver())), steps, begin_index)


def test_an_engine_with_too_little_history_is_refused() -> None:
    columns = coefficient_columns(0, False)
    with pytest.raises(UsageError, match="needs the coefficients h1"):
        coefficient_table(scheduler_params(config_of(dpmsolver())), 4, columns=columns)


def test_the_manifest_of_an_older_bundle_gives_the_same_schedule() -> None:
    """Settings that older manifests lack have the values that were the only ones then."""
    params = scheduler_params(config_of(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    older = {"kind": "flow_match_euler", "num_train_timesteps": 1000, "shift": 3.0, "timestep_scale": 1.0}
    older |= {"sigma_min": params.sigma_min, "sigma_max": params.sigma_max, "solver_order": 2}
    older |= {"solver_type": "midpoint", "final_sigmas_type": "zero", "lower_order_final": True}
    assert from_json(SchedulerParams, {**older, "euler_at_final": False}) == params


@pytest.mark.parametrize(
    "scheduler",
    [
        dpmsolver(solver_type="heun"),
        unipc(disable_corrector=[0, 1], use_karras_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_beta_sigmas=False, shift_terminal=0.1),
        FlowMatchLCMScheduler(),
    ],
)
def test_parameters_survive_the_manifest(scheduler: Any) -> None:
    params = scheduler_params(config_of(scheduler), timestep_scale=0.5)
    assert from_json(SchedulerParams, json.loads(json.dumps(to_json(params)))) == params


def test_a_schedule_with_equal_timesteps_has_all_its_steps() -> None:
    """diffusers 0.42.1 takes the second of two equal timesteps for the first step, and runs out of sigmas."""
    scheduler = dpmsolver(flow_shift=6.0)
    table = coefficient_table(scheduler_params(config_of(scheduler)), 1000)
    assert table.timesteps[0] == table.timesteps[1]
    assert np.isfinite(run_table(table)).all()
    with pytest.raises(IndexError):
        scheduler.set_timesteps(1000)
        x = torch.zeros(1)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x, return_dict=False)[0]
