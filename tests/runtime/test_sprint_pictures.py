"""Whole pictures of SANA-Sprint against SanaSprintPipeline of unmodified diffusers, from the same seed or generator."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.sana import pipeline_sana_sprint
from pictures import Reference, assert_same, draw
from PIL import Image

from ditc.runtime.cli import main
from ditc.runtime.errors import UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.rng import Generator

SMALL = {"height": 32, "width": 32}
EVEN: dict[str, Any] = {"intermediate_timesteps": None}


@pytest.fixture(scope="module")
def sprint(sprint_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sprint_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs(sprint_checkpoint: Path) -> Reference:
    return Reference(sprint_checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_inference_steps": 2},
        {"num_inference_steps": 1, **EVEN},
        {"num_inference_steps": 4, **EVEN, "guidance_scale": 1.0},
        {"num_inference_steps": 2, **EVEN, "max_timesteps": 1.4},
        {"num_inference_steps": 2, "intermediate_timesteps": 1.0, "guidance_scale": 9.0},
    ],
    ids=["2", "1", "4", "even", "own middle"],
)
@pytest.mark.parametrize(
    ("prompt", "size"),
    [("red cat", SMALL), (["a small green house", "dog", "blue"], {"height": 32, "width": 96})],
    ids=["one", "three wide"],
)
def test_pictures_equal_diffusers(
    sprint: Pipeline, theirs: Reference, prompt: Any, size: dict[str, int], settings: dict[str, Any]
) -> None:
    assert_same(
        draw(sprint, prompt, **size, **settings, seed=3), theirs.draw(prompt, **size, **settings, seed=3)
    )


def test_a_prompt_alone_draws_what_diffusers_draws_by_default(sprint: Pipeline, theirs: Reference) -> None:
    (state,) = sprint.start(sprint.plan(sprint_request := sprint_default()))
    assert len(state.schedule) == 2 and state.schedule[0]["guidance"].tolist() == [4.5]
    ours = sprint.draw(sprint_request).images
    np.testing.assert_allclose(ours, theirs.draw("red cat", seed=1, height=64, width=64).pictures, atol=1e-4)


def sprint_default() -> Any:
    from ditc.runtime.request import Request

    return Request(prompt="red cat", seed=1, output_type="np")


def test_the_latents_that_are_returned_are_those_that_diffusers_returns(
    sprint: Pipeline, theirs: Reference
) -> None:
    ours = sprint("red cat", seed=2, output_type="latent", **SMALL).images
    expected = theirs.draw("red cat", seed=2, output_type="latent", **SMALL).pictures
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_own_timesteps_draw_what_the_scheduler_draws(
    sprint: Pipeline, theirs: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SanaSprintPipeline of diffusers 0.42.1 fails on timesteps: it does not give their number to its scheduler."""
    own = {"timesteps": [1.5, 1.1, 0.4], "max_timesteps": None, "intermediate_timesteps": None}
    with pytest.raises(TypeError, match="num_inference_steps"):
        theirs.draw("red cat", seed=4, num_inference_steps=2, **SMALL, **own)

    def mended(scheduler: Any, steps: int, device: Any, timesteps: Any, sigmas: Any, **given: Any) -> Any:
        scheduler.set_timesteps(steps, timesteps=timesteps, device=device, **given)
        return scheduler.timesteps, steps

    monkeypatch.setattr(pipeline_sana_sprint, "retrieve_timesteps", mended)
    expected = theirs.draw("red cat", seed=4, num_inference_steps=2, **SMALL, **own)
    assert_same(draw(sprint, "red cat", seed=4, **SMALL, timesteps=own["timesteps"]), expected)


def test_the_noise_of_every_step_is_drawn_for_all_pictures_as_in_diffusers(
    sprint: Pipeline, theirs: Reference
) -> None:
    """Six pictures are drawn in two parts. A list of generators draws each picture's noise alone."""
    settings = {**SMALL, "num_images_per_prompt": 6}
    ours = sprint("red cat", seed=5, output_type="np", **settings).images
    np.testing.assert_allclose(ours, theirs.draw("red cat", seed=5, **settings).pictures, atol=1e-4)
    ours = sprint("red cat", generator=[Generator(s) for s in range(6)], output_type="np", **settings).images
    generators = [torch.Generator().manual_seed(s) for s in range(6)]
    other = theirs.draw("red cat", generator=generators, **settings).pictures
    np.testing.assert_allclose(ours, other, atol=1e-4)


def test_a_generator_is_advanced_as_diffusers_advances_it(sprint: Pipeline, theirs: Reference) -> None:
    """The last step adds no noise, but draws it."""
    ours, other = (torch.Generator().manual_seed(6) for _ in range(2))
    for _ in range(2):
        drawn = draw(sprint, "dog", generator=ours, num_inference_steps=1, **SMALL)
        assert_same(drawn, theirs.draw("dog", generator=other, num_inference_steps=1, **EVEN, **SMALL))


def test_own_latents_are_scaled_as_in_diffusers(sprint: Pipeline, theirs: Reference) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32)
    ours = draw(sprint, "cat", latents=latents, seed=7, **SMALL)
    assert_same(ours, theirs.draw("cat", latents=torch.from_numpy(latents), seed=7, **SMALL))


def test_a_callback_may_change_latents_or_end_the_loop_as_in_diffusers(
    sprint: Pipeline, theirs: Reference
) -> None:
    """What it returns after the last step has no effect there either, because the prediction of x0 is decoded."""
    settings = {**SMALL, "num_inference_steps": 2, "output_type": "latent"}

    def halved(_: Any, index: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] / 2 + index}

    def ended(pipe: Any, index: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return given

    for callback in (halved, ended):
        ours = sprint("cat", seed=8, callback_on_step_end=callback, **settings).images
        generator = torch.Generator().manual_seed(8)
        fixed = {**theirs._fixed, **settings, "generator": generator, "callback_on_step_end": callback}
        np.testing.assert_allclose(ours, theirs.pipeline("cat", **fixed).images.numpy(), atol=1e-5)


def test_a_negative_prompt_is_ignored_with_a_warning(
    sprint: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    plain = sprint("cat", seed=9, output_type="np", **SMALL).images
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(
            sprint("cat", negative_prompt="grey", seed=9, output_type="np", **SMALL).images, plain
        )
    assert "negative prompts have no effect" in caplog.text


def test_a_value_that_is_no_angle_is_refused(sprint: Pipeline) -> None:
    for value in ("1.3", float("nan"), [1.3]):
        with pytest.raises(UsageError, match="intermediate_timesteps is"):
            sprint("cat", intermediate_timesteps=value)
    with pytest.raises(UsageError, match="max_timesteps is 'x'"):
        sprint("cat", max_timesteps="x")


def test_the_command_takes_the_schedule_and_writes_it_into_the_picture(
    sprint_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cat.png"
    run = ["run", str(sprint_bundle), "cat", "-o", str(out), "--height=32", "--width=32", "--threads=1"]
    assert main([*run, "--timesteps", "1.5683,1.3,1.1,0.6,0"]) == 0
    settings = json.loads(Image.open(out).info["settings"])
    assert (settings["num_inference_steps"], len(settings["timesteps"])) == (4, 5)
    assert main([*run, "--max-timesteps", "1.4", "--intermediate-timesteps", "none"]) == 0
    settings = json.loads(Image.open(out).info["settings"])
    assert (settings["max_timesteps"], settings["intermediate_timesteps"]) == (1.4, False)
    assert main([*run, "--steps", "4", "--intermediate-timesteps", "1.3"]) == 2
    assert "only a schedule of 2 steps" in capsys.readouterr().err
