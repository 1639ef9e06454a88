"""Videos from pictures, compared step by step and frame by frame with unmodified SanaImageToVideoPipeline."""

from __future__ import annotations

import json
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
    SanaImageToVideoPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime import denoise
from ditc.runtime.batch import Batch
from ditc.runtime.cli import main
from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request, make_request
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.step_contract import HELD

LATENTS_BOUND = 1e-4  # fp32 on both sides; measured: below 1e-6 after four steps
FRAME_DB = 45.0  # frames that differ in the last of 8 bits have about 48 dB


def _picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((90, 70), Image.Resampling.BICUBIC)


PICTURE, OTHER = _picture(1), _picture(2)


@pytest.fixture(scope="module")
def video(video_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(video_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def upstream(video_checkpoint: Path) -> SanaImageToVideoPipeline:
    """It opens a checkpoint of SanaVideoPipeline, as diffusers' own example does."""
    pipeline = SanaImageToVideoPipeline.from_pretrained(video_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_diffusers(
    upstream: SanaImageToVideoPipeline, prompt: Any, image: Any = PICTURE, **settings: Any
) -> tuple[Array, list[Array]]:
    """The frames (B,F,H,W,3), and the latents after every step."""
    latents: list[Array] = []

    def keep(_: Any, index: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"].numpy().copy())
        return {}

    frames = upstream(
        image,
        prompt,
        generator=torch.Generator("cpu").manual_seed(7),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=12,
        output_type="np",
        callback_on_step_end=keep,
        **settings,
    ).frames
    return frames, latents


def assert_same(pipeline: Pipeline, request: Request, expected: Array, wanted: list[Array]) -> None:
    """Check the latents after every step, and every frame."""
    plan = pipeline.plan(request)
    (state,) = pipeline.start(plan)
    errors = []
    for latents in wanted:
        (state,) = denoise.step(pipeline.stepper, [state])
        errors.append(relative_l2(to_numpy(state.latents), latents))
    assert state.done
    frames = pipeline.decode([state], plan)
    assert frames.shape == expected.shape
    decibels = [
        psnr(one, other)
        for ours, theirs in zip(frames, expected, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    assert max(errors) <= LATENTS_BOUND, errors
    assert min(decibels) >= FRAME_DB, decibels


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("a red cat", {"height": 32, "width": 64, "frames": 9, "num_inference_steps": 4}),
        (["a red cat", "dogs"], {"height": 64, "width": 32, "frames": 13, "num_inference_steps": 3}),
        ("a cat", {"height": 32, "width": 64, "frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}),
    ],
    ids=["nine-frames", "two-tall-thirteen", "five-frames-unguided"],
)
def test_videos_from_a_picture_equal_diffusers(
    video: Pipeline,
    upstream: SanaImageToVideoPipeline,
    prompt: Any,
    settings: dict[str, Any],
) -> None:
    settings = {"guidance_scale": 3.0, **settings}
    expected, wanted = drawn_by_diffusers(upstream, prompt, **settings)
    request = Request(prompt=prompt, image=PICTURE, seed=7, output_type="np", **settings)
    assert_same(video, request, expected, wanted)


SETTINGS: dict[str, Any] = {
    "height": 32,
    "width": 64,
    "frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
}


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=8.0),  # the one that SanaImageToVideoPipeline names
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        DPMSolverMultistepScheduler(  # it draws noise in every step, for the frames alone that it steps
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=8.0,
            algorithm_type="sde-dpmsolver++",
        ),
    ],
    ids=["euler", "unipc", "sde"],
)
def test_other_samplers_step_the_other_frames_as_diffusers_does(
    video_checkpoint: Path, upstream: SanaImageToVideoPipeline, scheduler: Any, tmp_path: Path
) -> None:
    """In PyTorch, because a sampler with another history or with noise is another graph."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for part in video_checkpoint.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            (checkpoint / part.name).symlink_to(part)
    scheduler.save_pretrained(checkpoint / "scheduler")
    index = json.loads((video_checkpoint / "model_index.json").read_text())
    index |= {
        "_class_name": "SanaImageToVideoPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    model = TorchModel(checkpoint)
    theirs = SanaImageToVideoPipeline(**upstream.components | {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    expected, wanted = drawn_by_diffusers(theirs, "a red cat", **SETTINGS)
    request = Request(prompt="a red cat", image=PICTURE, seed=7, output_type="np", **SETTINGS)
    assert_same(model.pipeline, request, expected, wanted)


def test_given_latents_are_taken_for_the_frames_after_the_first(
    video: Pipeline, upstream: SanaImageToVideoPipeline
) -> None:
    latents = np.random.default_rng(3).standard_normal((1, 16, 3, 8, 16)).astype(np.float32)
    expected, wanted = drawn_by_diffusers(
        upstream, "a red cat", latents=torch.from_numpy(latents.copy()), **SETTINGS
    )
    request = Request(prompt="a red cat", image=PICTURE, latents=latents, output_type="np", **SETTINGS)
    assert_same(video, request, expected, wanted)


def latents_of(pipeline: Pipeline, **arguments: Any) -> Array:
    output = pipeline(**{**SETTINGS, "prompt": "a red cat", "seed": 5, "output_type": "latent", **arguments})
    found: Array = output.frames
    return found


def test_the_first_frame_is_the_picture_and_stays_as_it_is(video: Pipeline) -> None:
    (state,) = video.start(video.plan(Request(prompt="a red cat", image=PICTURE, seed=5, **SETTINGS)))
    drawn, other = latents_of(video, image=PICTURE), latents_of(video, image=PICTURE, seed=6)
    first = to_numpy(state.latents)[:, :, 0]
    assert np.array_equal(drawn[:, :, 0], first) and np.array_equal(other[:, :, 0], first)
    assert relative_l2(drawn[:, :, 1:], other[:, :, 1:]) > 0.1
    without = latents_of(video)
    # The picture acts on the other frames; two equal runs differ by nothing.
    assert relative_l2(drawn[:, :, 1:], without[:, :, 1:]) > 1e-4
    assert relative_l2(drawn[:, :, 1:], latents_of(video, image=OTHER)[:, :, 1:]) > 1e-4


def test_one_picture_per_prompt_and_several_videos_per_prompt(video: Pipeline) -> None:
    both = latents_of(video, prompt=["a red cat", "dogs"], image=[PICTURE, OTHER], num_videos_per_prompt=2)
    alone = [latents_of(video, image=picture)[0, :, 0] for picture in (PICTURE, OTHER)]
    for index in range(4):
        assert np.array_equal(both[index, :, 0], alone[index // 2]), index


def test_requests_with_and_without_a_picture_share_a_batch(video: Pipeline) -> None:
    requests = [
        Request(prompt="a red cat", image=PICTURE, seed=5, **SETTINGS),
        Request(prompt="dogs", seed=6, **SETTINGS),
    ]
    states = [video.start(video.plan(request))[0] for request in requests]
    batch, together, alone = Batch(video.stepper), states, states
    while not together[0].done:
        together = batch.step(together)
        alone = [denoise.step(video.stepper, [state])[0] for state in alone]
    for one, other in zip(together, alone, strict=True):
        # Other sizes of a product sum in another order.
        assert relative_l2(to_numpy(one.latents), to_numpy(other.latents)) <= 1e-5
    first = to_numpy(together[0].latents)[:, :, 0]
    assert np.array_equal(first, to_numpy(states[0].latents)[:, :, 0])


def _upright_and_opaque() -> tuple[Image.Image, Image.Image]:
    """A picture that EXIF turns and whose upper half is transparent, and how it is meant to be seen."""
    shown = PICTURE.convert("RGBA")
    alpha = Image.new("L", shown.size, 255)
    alpha.paste(0, (0, 0, shown.width, shown.height // 2))
    shown.putalpha(alpha)
    stored = shown.transpose(Image.Transpose.ROTATE_90)  # orientation 6: turn it by 270 degrees to see it
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.info["exif"] = exif.tobytes()
    opaque = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return stored, opaque


def test_the_command_line_draws_a_video_from_a_file(
    video_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The EXIF orientation and transparency of the file count, as for pictures."""
    stored, opaque = _upright_and_opaque()
    stored.save(tmp_path / "stored.png", exif=stored.info["exif"])
    opaque.save(tmp_path / "opaque.png")
    drawn = {}
    for name in ("stored", "opaque"):
        arguments = ["--image", str(tmp_path / f"{name}.png"), "-o", str(tmp_path / name), "--seed", "5"]
        run = ["run", str(video_bundle), "a red cat", *arguments, "--frames", "5", "--steps", "1"]
        assert main([*run, "--threads", "1"]) == 0
        drawn[name] = [np.asarray(Image.open(f)) for f in sorted((tmp_path / name).iterdir())]
    assert len(drawn["stored"]) == 5
    assert all(np.array_equal(a, b) for a, b in zip(*drawn.values(), strict=True))
    settings = json.loads(Image.open(min((tmp_path / "stored").iterdir())).info["settings"])
    assert settings["image"] is True and "strength" not in settings and settings["frames"] == 5
    capsys.readouterr()
    mp4 = ["-o", str(tmp_path / "out.webp"), "--image", str(tmp_path / "opaque.png"), "--strength", "0.5"]
    assert main(["run", str(video_bundle), "a red cat", *mp4]) == 2
    assert "strength is given, but this bundle draws videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"mask_image": PICTURE.convert("L")}, "mask_image is given, but this bundle draws videos", "leave"),
        ({"strength": 0.5}, "strength is given, but this bundle draws videos", "leave strength out"),
        ({"control_image": OTHER}, "control_image is given, but this bundle draws videos", "leave"),
        ({"frames": 1}, "a video of 1 frame has no other one to draw", "use 5 frames or more"),
        ({"image": [PICTURE, OTHER]}, "image holds 2 pictures for 1 prompts", "one per prompt"),
        ({"image": "first.png"}, "image is 'first.png', which is no picture", "Pillow"),
        ({"width": 50}, "width 50 is not a multiple of 8", "use width 48"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    video: Pipeline, arguments: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        video.plan(make_request(**{"prompt": "a cat", "image": PICTURE, **arguments}))
    assert hint in str(error.value.hint)


def test_an_older_bundle_says_that_it_cannot_hold_a_frame(video: Pipeline) -> None:
    drawable = video.drawable
    inputs = tuple(tensor for tensor in drawable.denoiser.inputs if tensor.name != HELD)
    older = replace(drawable, denoiser=replace(drawable.denoiser, inputs=inputs))
    from ditc.runtime.prepare import make_plan

    assert make_plan(Request(prompt="a cat"), older).frames == 9
    with pytest.raises(UsageError, match="built for videos from texts alone") as error:
        make_plan(Request(prompt="a cat", image=PICTURE), older)
    assert "ditc build" in str(error.value.hint)
