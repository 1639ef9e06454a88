"""ControlNet, compared step by step with unmodified diffusers from the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline, StableDiffusion3ControlNetPipeline
from pictures import PICTURE_DB, Drawn, Reference, assert_same, draw
from PIL import Image
from tiny_sd3 import T5_TOKENS

from ditc.runtime import denoise
from ditc.runtime.cli import main
from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import Array
from ditc.runtime.spec import CONTROLNET


def _picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((90, 70), Image.Resampling.BICUBIC)


PICTURE, OTHER = _picture(1), _picture(2)


@pytest.fixture(scope="module")
def sana(control_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(control_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sana_reference(control_checkpoint: Path) -> Reference:
    return Reference(control_checkpoint)


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ("a red cat", {"num_inference_steps": 4}),
        (
            ["a red cat", "a dog"],
            {"num_inference_steps": 3, "height": 32, "width": 64, "controlnet_conditioning_scale": 0.7},
        ),
        ("a red cat", {"num_inference_steps": 2, "guidance_scale": 1.0, "num_images_per_prompt": 2}),
    ],
    ids=["one", "two-wide", "two-of-one-unguided"],
)
def test_sana_equals_diffusers(
    sana: Pipeline, sana_reference: Reference, prompt: Any, arguments: dict[str, Any]
) -> None:
    settings = {"height": 64, "width": 64, "guidance_scale": 3.0, **arguments}
    theirs = sana_reference.draw(prompt, control_image=PICTURE, seed=5, **settings)
    ours = draw(sana, prompt, control_image=PICTURE, seed=5, **settings)
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def sd3(sd3_control_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd3_control_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sd3_reference(sd3_control_checkpoint: Path) -> StableDiffusion3ControlNetPipeline:
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(sd3_control_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ("a red cat", {"num_inference_steps": 4}),
        (
            ["a red cat", "a dog"],
            {"num_inference_steps": 5, "height": 64, "width": 32, "controlnet_conditioning_scale": 0.7}
            | {"control_guidance_start": 0.2, "control_guidance_end": 0.8},
        ),
        ("a red cat", {"num_inference_steps": 2, "guidance_scale": 1.0, "num_images_per_prompt": 2}),
    ],
    ids=["one", "two-narrow-within-a-range", "two-of-one-unguided"],
)
def test_sd3_equals_diffusers(
    sd3: Pipeline,
    sd3_reference: StableDiffusion3ControlNetPipeline,
    prompt: Any,
    arguments: dict[str, Any],
) -> None:
    settings = {"height": 64, "width": 64, "guidance_scale": 3.0, **arguments}
    latents: list[Array] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].numpy().copy())
        return tensors

    pictures = sd3_reference(
        prompt,
        control_image=PICTURE,
        generator=torch.Generator().manual_seed(5),
        callback_on_step_end=keep,
        output_type="np",
        max_sequence_length=T5_TOKENS,
        **settings,
    ).images
    # diffusers' pipeline with a ControlNet has no skip-layer guidance, which this bundle has by default.
    ours = draw(sd3, prompt, control_image=PICTURE, seed=5, skip_layer_guidance_scale=0, **settings)
    assert_same(ours, Drawn(latents, pictures))


SETTINGS = {"seed": 3, "height": 64, "width": 64, "num_inference_steps": 4}
LATENT = {**SETTINGS, "output_type": "latent"}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"control_image": PICTURE, "controlnet_conditioning_scale": 0.0}],
    ids=["none", "scale-0"],
)
def test_without_control_it_draws_what_the_pipeline_without_a_controlnet_draws(
    sana: Pipeline, sana_reference: Reference, arguments: dict[str, Any]
) -> None:
    parts = {name: part for name, part in sana_reference.pipeline.components.items() if name != "controlnet"}
    plain = SanaPipeline(**parts)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        "cat",
        generator=torch.Generator().manual_seed(3),
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
        use_resolution_binning=False,
        max_sequence_length=12,
        complex_human_instruction=None,
    ).images
    ours = sana("cat", guidance_scale=3.0, output_type="np", **SETTINGS, **arguments).images
    assert psnr(ours, theirs) >= PICTURE_DB


class Counting:
    """A session that counts its runs."""

    def __init__(self, session: Any) -> None:
        self.session, self.spec, self.device, self.runs = session, session.spec, session.device, 0

    def run(self, feeds: Any) -> Any:
        self.runs += 1
        return self.session.run(feeds)

    def close(self) -> None:
        """The session belongs to the pipeline."""


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        ({}, 0),
        ({"control_image": PICTURE}, 4),
        ({"control_image": PICTURE, "control_guidance_start": 0.3, "control_guidance_end": 0.8}, 1),
        ({"control_image": PICTURE, "control_guidance_end": 0.5}, 2),
        ({"control_image": PICTURE, "image": OTHER, "strength": 0.5}, 2),
    ],
)
def test_the_controlnet_runs_only_in_steps_that_it_acts_in(
    sana: Pipeline, arguments: dict[str, Any], runs: int
) -> None:
    counting = Counting(sana.sessions[CONTROLNET])
    sana.with_sessions({CONTROLNET: counting})("cat", **LATENT, **arguments)
    assert counting.runs == runs


def test_strangers_with_and_without_control_share_a_batch(sana: Pipeline) -> None:
    requests = [
        Request(prompt="cat", control_image=PICTURE, **LATENT),
        Request(prompt="dog", **LATENT),
        Request(prompt="cow", control_image=OTHER, controlnet_conditioning_scale=0.5, **LATENT),
        Request(prompt="owl", control_image=OTHER, control_guidance_end=0.5, **LATENT),
    ]
    alone = [sana.draw(request).images for request in requests]
    states = [sana.start(sana.plan(request))[0] for request in requests]
    while not states[0].done:
        states = denoise.step(sana.stepper, states)
    for state, expected in zip(states, alone, strict=True):
        # A batch multiplies larger matrices, whose sums have another order.
        np.testing.assert_allclose(np.asarray(state.latents), expected, atol=1e-5)


def test_a_controlnet_that_overflows_spoils_only_the_pictures_that_it_controls(sana: Pipeline) -> None:
    class Overflowing(Counting):
        def run(self, feeds: Any) -> Any:
            controlled = np.asarray(feeds["control_scale"])[np.asarray(feeds["row_of"])] != 0
            outputs = self.session.run(feeds)
            return {
                name: np.where(controlled[:, None, None, None], np.nan, np.asarray(residual)).astype(
                    np.float32
                )
                for name, residual in outputs.items()
            }

    pipeline = sana.with_sessions({CONTROLNET: Overflowing(sana.sessions[CONTROLNET])})
    requests = [Request(prompt="dog", **LATENT), Request(prompt="cat", control_image=PICTURE, **LATENT)]
    states = [pipeline.start(pipeline.plan(request))[0] for request in requests]
    first, second = denoise.step(pipeline.stepper, states)
    assert np.isfinite(first.latents).all()
    assert np.isnan(second.latents).all()


def test_every_prompt_may_have_its_own_control_picture(sana: Pipeline) -> None:
    prompts = ["cat", "dog"]
    both = sana(prompts, control_image=[PICTURE, OTHER], num_images_per_prompt=2, **LATENT).images
    only = sana(prompts, control_image=OTHER, num_images_per_prompt=2, **LATENT).images
    np.testing.assert_allclose(both[2:], only[2:], atol=1e-5)
    assert relative_l2(both[:2], only[:2]) > 0.01


def test_pictures_beyond_the_batch_keep_their_control_pictures(sana: Pipeline) -> None:
    most = sana.drawable.denoiser.profile["batch"].max
    prompts = [f"cat {i}" for i in range(most + 1)]
    images = [PICTURE, *[OTHER] * most]
    found: Array = sana(prompts, control_image=images, **LATENT).images
    swapped: Array = sana(prompts, control_image=[*images[:-1], PICTURE], **LATENT).images
    np.testing.assert_array_equal(found[:-1], swapped[:-1])
    assert relative_l2(found[-1], swapped[-1]) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"controlnet_conditioning_scale": 0.5},
            "controlnet_conditioning_scale is given without a control_image",
        ),
        ({"control_guidance_end": 0.5}, "control_guidance_end is given without a control_image"),
        ({"control_image": PICTURE, "controlnet_conditioning_scale": float("nan")}, "scale is nan"),
        (
            {"control_image": PICTURE, "control_guidance_start": 0.5, "control_guidance_end": 0.5},
            "start is 0.5",
        ),
        ({"control_image": PICTURE, "control_guidance_end": 1.5}, "control_guidance_end is 1.5"),
        ({"control_image": [PICTURE] * 3}, "control_image holds 3 pictures for 1 prompts"),
        ({"control_image": "edges.png"}, "which is no picture"),
        ({"control_image": PICTURE, "height": 63}, "63"),
    ],
)
def test_control_that_cannot_be_used_is_refused_before_any_work(
    sana: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sana.plan(Request(prompt="cat", **arguments))
    assert caught.value.hint


def test_a_bundle_without_a_controlnet_says_so(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="this bundle has no ControlNet") as caught:
        pipeline.plan(Request(prompt="cat", control_image=PICTURE))
    assert caught.value.hint


def test_the_command_line_takes_a_control_picture(
    control_bundle: Path, sana: Pipeline, tmp_path: Path
) -> None:
    PICTURE.save(tmp_path / "edges.png")
    out = tmp_path / "out.png"
    options = ["--controlnet-conditioning-scale", "0.8", "--control-guidance-end", "0.8"]
    size = ["--height", "64", "--width", "64", "--steps", "4", "--seed", "3", "-o", str(out)]
    files = ["--control-image", str(tmp_path / "edges.png")]
    assert main(["run", str(control_bundle), "cat", *files, *options, *size, "--allow-uniform"]) == 0
    arguments = {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.8, "allow_uniform": True}
    expected = sana("cat", control_image=PICTURE, **SETTINGS, **arguments).images[0]
    assert np.abs(np.asarray(Image.open(out), int) - np.asarray(expected, int)).max() <= 1
