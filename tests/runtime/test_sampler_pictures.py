"""Pictures of every sampler from one bundle, compared with SanaPipeline and that scheduler from the same seed.

The bundle is built for stochastic DPM-Solver++ of third order, so that its graph has two earlier x0 and noise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
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
from pictures import Reference, assert_same, draw
from PIL import Image

from ditc.export.checkpoint.scheduler_config import scheduler_params
from ditc.parity.levels import LEVELS
from ditc.runtime.cli import main
from ditc.runtime.errors import UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.rng import Generator

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
STOCHASTIC = DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++", solver_order=3)
LCM = FlowMatchLCMScheduler(shift=3.0)
EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
SMALL = {"guidance_scale": 3.0, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def loaded(stochastic_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(stochastic_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs(stochastic_checkpoint: Path) -> Reference:
    return Reference(stochastic_checkpoint)


def use(pipeline: Pipeline, reference: Reference, scheduler: Any) -> None:
    """Let both sides sample with `scheduler`."""
    config = json.loads(scheduler.to_json_string())
    pipeline.manifest = replace(pipeline.manifest, scheduler=scheduler_params(config))
    reference.pipeline.scheduler = scheduler


@pytest.mark.parametrize(
    "scheduler",
    [
        STOCHASTIC,
        LCM,
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True, use_karras_sigmas=True),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, solver_order=3),
    ],
    ids=["sde", "lcm", "stochastic karras", "heun", "unipc", "dpmsolver 3"],
)
def test_pictures_of_every_sampler_equal_diffusers(
    loaded: Pipeline, theirs: Reference, scheduler: Any
) -> None:
    use(loaded, theirs, scheduler)
    settings = {**SMALL, "num_inference_steps": 4, "seed": 3}
    assert_same(draw(loaded, "red cat", **settings), theirs.draw("red cat", **settings))


@pytest.mark.parametrize("own", [{"sigmas": [1.0, 0.6, 0.3]}, {"timesteps": [900, 600, 200]}])
def test_pictures_of_own_schedules_equal_diffusers(
    loaded: Pipeline, theirs: Reference, own: dict[str, Any]
) -> None:
    use(loaded, theirs, EULER)
    settings = {**SMALL, **own, "seed": 4}
    assert_same(draw(loaded, "blue dog", **settings), theirs.draw("blue dog", **settings))


def test_the_noise_of_every_step_is_drawn_for_all_pictures_as_in_diffusers(
    loaded: Pipeline, theirs: Reference
) -> None:
    """Six pictures are drawn in two chunks, but one generator draws their noise together; a list draws each alone."""
    use(loaded, theirs, LCM)
    settings = {**SMALL, "num_inference_steps": 2, "num_images_per_prompt": 6}
    ours = loaded("red cat", seed=5, output_type="np", **settings).images
    np.testing.assert_allclose(ours, theirs.draw("red cat", seed=5, **settings).pictures, atol=1e-4)
    seeds = range(6)
    ours = loaded("red cat", generator=[Generator(s) for s in seeds], output_type="np", **settings).images
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    other = theirs.draw("red cat", generator=generators, **settings).pictures
    np.testing.assert_allclose(ours, other, atol=1e-4)


def test_own_latents_leave_the_seed_for_the_noise_of_the_steps(loaded: Pipeline, theirs: Reference) -> None:
    use(loaded, theirs, LCM)
    latents = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32)
    settings = {**SMALL, "num_inference_steps": 2, "seed": 6}
    ours = draw(loaded, "cat", latents=latents, **settings)
    assert_same(ours, theirs.draw("cat", latents=torch.from_numpy(latents), **settings))
    unseeded = loaded("cat", latents=latents, num_inference_steps=1, height=32, width=32)
    assert unseeded.seed is not None, "the picture could not be drawn again"


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler(), UniPCMultistepScheduler(**FLOW)])
def test_a_callback_cannot_replace_latents_that_diffusers_would_drop(
    loaded: Pipeline, theirs: Reference, scheduler: Any
) -> None:
    use(loaded, theirs, scheduler)
    settings = {**SMALL, "num_inference_steps": 2, "output_type": "latent"}
    kept = loaded("cat", callback_on_step_end=lambda p, i, t, given: given, seed=1, **settings).images
    np.testing.assert_array_equal(kept, loaded("cat", seed=1, **settings).images)
    with pytest.raises(UsageError, match="earlier step"):
        loaded(
            "cat", callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"] * 0}, **settings
        )


def test_parity_holds_for_a_sampler_that_draws_noise(
    stochastic_bundle: Path, stochastic_checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(stochastic_bundle, tmp_path / "bundle")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    levels = [f"--level={level}" for level in ("graph", "step", "trajectory", "picture") if level in LEVELS]
    arguments = [*levels, "--seeds", "0", "--prompts", str(prompts), "--steps", "3", "--threads", "1"]
    assert main(["parity", str(copy), "--against", str(stochastic_checkpoint), *arguments]) == 0


def test_the_command_takes_own_sigmas_and_writes_them_into_the_picture(
    euler_report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cat.png"
    size = ["--height", "32", "--width", "32", "--threads", "1"]
    run = ["run", str(euler_report.bundle), "cat", "-o", str(out), *size]
    assert main([*run, "--sigmas", "1,0.5"]) == 0
    settings = json.loads(Image.open(out).info["settings"])
    assert (settings["num_inference_steps"], settings["sigmas"]) == (2, [1.0, 0.5])
    assert main([*run, "--timesteps", "900,100", "--sigmas", "1,0.5"]) == 2
    assert "only one of them" in capsys.readouterr().err
    assert main([*run, "--sigmas", "1;0.5"]) == 2
    assert "commas" in capsys.readouterr().err
