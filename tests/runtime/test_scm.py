"""SCM's schedule against diffusers' SCMScheduler and the arithmetic of SanaSprintPipeline, in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SCMScheduler

from ditc.export.checkpoint.scheduler_config import scheduler_params
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.rng import Generator
from ditc.runtime.schedulers import SchedulerParams, coefficient_table, number_of_steps
from ditc.runtime.session import Array

BOUND = 1e-6  # as in test_samplers.py; the table's coefficients are rounded to float32 once
SHAPE = (1, 4, 6, 6)
START = np.random.default_rng(7).standard_normal(SHAPE).astype(np.float32)
PAPER = [1.5683, 1.3, 1.1, 0.6, 0.0]  # the four steps of arXiv 2503.09641


def network(x: Array, level: float) -> Array:
    """A smooth velocity field that depends on the latents, their neighbours and the level."""
    return np.asarray(np.tanh(0.8 * np.roll(x, 1, axis=-1)) + 0.5 * x - 0.2 * np.cos(4 * level))


def params_of(scheduler: SCMScheduler) -> SchedulerParams:
    return scheduler_params(json.loads(scheduler.to_json_string()), trigflow=True)


def run_table(table: Any) -> tuple[list[Array], Array]:
    """The latents after every step, and the last x0."""
    x, latents, stream = START.astype(np.float64) * table.init_noise_sigma, [], Generator(5)
    for t, row in zip(table.timesteps, table.coefficients, strict=True):
        c = dict(zip(table.columns, map(float, row), strict=True))
        x0 = c["a"] * x + c["b"] * network(c["c_in"] * x, float(t))
        x = c["cx"] * x + c["c0"] * x0 + c["cn"] * stream.randn(SHAPE)
        latents.append(x)
    return latents, x0


def run_diffusers(scheduler: SCMScheduler, angles: list[float]) -> tuple[list[Array], Array]:
    """The loop of SanaSprintPipeline.__call__ (diffusers 0.42.1) in float64: the latents, and what is decoded."""
    scheduler.set_timesteps(
        len(angles) - 1, timesteps=angles, max_timesteps=None, intermediate_timesteps=None
    )
    scheduler.set_begin_index(0)
    timesteps = scheduler.timesteps = scheduler.timesteps.double()
    sigma_data, generator = scheduler.config.sigma_data, torch.Generator().manual_seed(5)
    latents, seen = torch.from_numpy(START.astype(np.float64)) * sigma_data, []
    for t in timesteps[:-1]:
        s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        scaled = latents / sigma_data * torch.sqrt(s**2 + (1 - s) ** 2)
        pred = torch.from_numpy(network(scaled.numpy(), float(s)))
        pred = ((1 - 2 * s) * scaled + (1 - 2 * s + 2 * s**2) * pred) / torch.sqrt(s**2 + (1 - s) ** 2)
        latents, denoised = scheduler.step(pred * sigma_data, t, latents, generator, return_dict=False)
        seen.append(latents.numpy())
    return seen, (denoised / sigma_data).numpy()


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_every_step_and_the_decoded_latents_equal_diffusers(steps: int, sigma_data: float) -> None:
    scheduler = SCMScheduler(sigma_data=sigma_data)
    table = coefficient_table(params_of(scheduler), steps)
    scheduler.set_timesteps(steps, **({} if steps == 2 else {"intermediate_timesteps": None}))
    np.testing.assert_allclose(table.sigmas, scheduler.timesteps.numpy(), rtol=1.2e-7)  # one float32 step
    (ours, x0), (theirs, decoded) = run_table(table), run_diffusers(scheduler, table.sigmas.tolist())
    assert max(relative_l2(a, b) for a, b in zip(ours, theirs, strict=True)) <= BOUND
    assert relative_l2(x0, decoded) <= BOUND and table.decodes_x0


@pytest.mark.parametrize("angles", [PAPER, [1.4, 0.7, 0.2], [1.0, 0.0]])
def test_own_timesteps_have_one_number_more_than_there_are_steps(angles: list[float]) -> None:
    scheduler = SCMScheduler()
    table = coefficient_table(params_of(scheduler), 1, timesteps=angles)
    assert len(table) == len(angles) - 1 == number_of_steps(params_of(scheduler), None, 2, timesteps=angles)
    (ours, x0), (theirs, decoded) = run_table(table), run_diffusers(scheduler, angles)
    assert max(relative_l2(a, b) for a, b in zip(ours, theirs, strict=True)) <= BOUND
    assert relative_l2(x0, decoded) <= BOUND, (
        "an end above 0 adds noise to the latents, but not to the picture"
    )


def test_the_settings_choose_the_angles_as_in_diffusers() -> None:
    params = params_of(SCMScheduler())
    for steps, given, angles in (
        (2, {}, [1.5708, 1.3, 0]),
        (2, {"intermediate_timesteps": 1.1}, [1.5708, 1.1, 0]),
        (2, {"intermediate_timesteps": False}, [1.5708, 0.7854, 0]),
        (1, {"max_timesteps": 1.2}, [1.2, 0]),
        (4, {"intermediate_timesteps": False}, [1.5708, 1.1781, 0.7854, 0.3927, 0]),
    ):
        np.testing.assert_allclose(coefficient_table(params, steps, **given).sigmas, angles, rtol=1e-6)
    late = coefficient_table(params, 4, begin_index=2)
    assert len(late) == 2 and late.sigmas[0] == pytest.approx(0.7854)


@pytest.mark.parametrize(
    ("steps", "given", "message"),
    [
        (1, {"intermediate_timesteps": 1.3}, "only a schedule of 2 steps"),
        (4, {"intermediate_timesteps": 1.3}, "only a schedule of 2 steps"),
        (2, {"timesteps": PAPER, "max_timesteps": 1.5}, "max_timesteps is 1.5, but timesteps are given too"),
        (2, {"timesteps": [1.5]}, "one more than there are steps"),
        (2, {"timesteps": [1.0, 1.2, 0.0]}, "noise falls"),
        (2, {"max_timesteps": 1000.0}, "noise falls"),
        (2, {"intermediate_timesteps": -0.5}, "noise falls"),
        (2, {"sigmas": [1.0, 0.5]}, "SCMScheduler, takes none"),
        (2, {"mu": 1.0}, "no dynamic shifting"),
        (1001, {}, "1000 timesteps"),
    ],
)
def test_what_diffusers_refuses_is_one_clear_error(steps: int, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        coefficient_table(params_of(SCMScheduler()), steps, **given)
    assert caught.value.hint


def test_a_number_of_steps_beside_own_timesteps_must_fit() -> None:
    params = params_of(SCMScheduler())
    assert number_of_steps(params, 4, 2, timesteps=PAPER) == 4
    with pytest.raises(UsageError, match="5 numbers for num_inference_steps 2"):
        number_of_steps(params, 2, 2, timesteps=PAPER)


def test_other_schedulers_have_no_such_settings() -> None:
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    for name in ("max_timesteps", "intermediate_timesteps"):
        with pytest.raises(UsageError, match=f"{name} is 1.3, but the bundle's scheduler"):
            coefficient_table(scheduler_params(euler), 2, **{name: 1.3})
    assert len(coefficient_table(scheduler_params(euler), 2, intermediate_timesteps=False)) == 2


def test_a_scheduler_that_does_not_fit_its_pipeline_is_refused() -> None:
    for name, trigflow in (("SCMScheduler", False), ("FlowMatchEulerDiscreteScheduler", True)):
        with pytest.raises(CheckpointError, match=name):
            scheduler_params({"_class_name": name}, trigflow=trigflow)
    with pytest.raises(CheckpointError, match="prediction_type = 'v_prediction'"):
        scheduler_params({"_class_name": "SCMScheduler", "prediction_type": "v_prediction"}, trigflow=True)
