"""Videos from texts, compared step by step and frame by frame with unmodified SanaVideoPipeline from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaVideoPipeline

from ditc.runtime import denoise
from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request, make_request
from ditc.runtime.serving.api.byte_room import video_need
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import VAE_DECODER_NEXT
from ditc.runtime.step_contract import KEPT
from ditc.runtime.video import decoded_chunks

LATENTS_BOUND = 1e-4  # fp32 on both sides; measured: below 1e-6 after four steps
FRAME_DB = 45.0  # frames that differ in the last of 8 bits have about 48 dB


@pytest.fixture(scope="module")
def upstream(video_checkpoint: Path) -> SanaVideoPipeline:
    pipeline = SanaVideoPipeline.from_pretrained(video_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_diffusers(
    upstream: SanaVideoPipeline, prompt: Any, **settings: Any
) -> tuple[Array, list[Array]]:
    """The frames (B,F,H,W,3), and the latents after every step."""
    latents: list[Array] = []

    def keep(_: Any, index: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"].numpy().copy())
        return {}

    frames = upstream(
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


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("a red cat", {"height": 32, "width": 64, "frames": 9, "num_inference_steps": 4}),
        (["a red cat", "dogs"], {"height": 64, "width": 32, "frames": 13, "num_inference_steps": 3}),
        ("a cat", {"height": 32, "width": 64, "frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}),
    ],
    ids=["nine-frames", "two-tall-thirteen", "one-frame-unguided"],
)
def test_videos_equal_diffusers(
    video: Pipeline, upstream: SanaVideoPipeline, prompt: Any, settings: dict[str, Any]
) -> None:
    settings = {"guidance_scale": 3.0, **settings}
    expected, wanted = drawn_by_diffusers(upstream, prompt, **settings)
    request = Request(prompt=prompt, seed=7, output_type="np", **settings)
    plan = video.plan(request)
    (state,) = video.start(plan)
    for index, latents in enumerate(wanted):
        (state,) = denoise.step(video.stepper, [state])
        error = relative_l2(to_numpy(state.latents), latents)
        assert error <= LATENTS_BOUND, f"step {index}: {error:.2g}"
    assert state.done
    frames = video.decode([state], plan)
    assert frames.shape == expected.shape
    for sample, (ours, theirs) in enumerate(zip(frames, expected, strict=True)):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert psnr(one, other) >= FRAME_DB, f"video {sample}, frame {index}"


def test_pil_frames_latents_and_tuples_have_the_forms_of_diffusers(video: Pipeline) -> None:
    output = video("a cat", num_inference_steps=1, frames=5, seed=1, num_videos_per_prompt=2)
    assert [len(frames) for frames in output.frames] == [5, 5]
    assert output.frames[0][0].size == (64, 32) and output["frames"] is output[0] is output.frames
    arrays = video(
        "a cat", num_inference_steps=1, frames=5, seed=1, num_videos_per_prompt=2, output_type="np"
    )
    assert np.array_equal(
        np.asarray(output.frames[1][4]), (arrays.frames[1, 4] * 255).round().astype(np.uint8)
    )
    (latents,) = video(
        "a cat", num_inference_steps=1, frames=5, seed=1, output_type="latent", return_dict=False
    )
    assert latents.shape == (1, 16, 2, 8, 16)


def test_another_size_is_resized_and_cropped_as_diffusers_does(video: Pipeline) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 16, 2, 8, 16)).astype(np.float32)
    first, following = video.sessions["vae_decoder"], video.sessions[VAE_DECODER_NEXT]
    whole = np.concatenate(list(decoded_chunks(first, following, latents)))
    from diffusers.video_processor import VideoProcessor

    from ditc.runtime.video import decode_video

    video_BCFHW = torch.from_numpy(whole.transpose(1, 0, 2, 3)[None])
    expected = VideoProcessor.resize_and_crop_tensor(video_BCFHW, 40, 30)
    expected = VideoProcessor(vae_scale_factor=4).postprocess_video(expected, output_type="np")
    ours, uniform = decode_video(first, following, latents, height=30, width=40, as_pil=False)
    assert not uniform and np.abs(np.asarray(ours) - expected).max() <= 1e-6


def test_a_decoder_of_one_latent_frame_at_a_time_needs_nothing_in_passing(video: Pipeline) -> None:
    plan = video.plan(Request(prompt="a cat", frames=5))
    need = video_need(plan, video.manifest, "clips")
    assert (need.size, need.passing) == (3 * 5 * plan.height * plan.width, 0)


def test_a_decoder_that_forgets_what_it_kept_is_noticed(video: Pipeline) -> None:
    """So the comparison with diffusers shows that every kept tensor is handed on."""
    latents = np.random.default_rng(0).standard_normal((1, 16, 3, 8, 16)).astype(np.float32)
    first, following = video.sessions["vae_decoder"], video.sessions[VAE_DECODER_NEXT]
    right = list(decoded_chunks(first, following, latents))

    class Forgets:
        spec, device = following.spec, following.device

        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            return following.run({n: np.zeros_like(x) if n == f"{KEPT}0" else x for n, x in feeds.items()})

    wrong = list(decoded_chunks(first, Forgets(), latents))  # type: ignore[arg-type]
    assert np.array_equal(right[0], wrong[0]) and relative_l2(wrong[1], right[1]) > 1e-3


def test_a_motion_score_is_put_after_the_prompt_alone(video: Pipeline) -> None:
    (encoder,) = video.conditioning.encoders
    settings: dict[str, Any] = {"num_inference_steps": 1, "frames": 1, "seed": 0, "output_type": "latent"}
    scored = video("Hi", motion_score=3, negative_prompt="no", max_sequence_length=12, **settings)
    written = video("Hi motion score: 3.", negative_prompt="no", max_sequence_length=12, **settings)
    plain = video("Hi", negative_prompt="no", **settings)
    assert np.array_equal(scored.frames, written.frames) and not np.array_equal(scored.frames, plain.frames)
    assert encoder.spec.motion == " motion score: {motion_score}." and encoder.spec.suffix is None


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"frames": 10}, "frames is 10, but this bundle draws 1 to 21 frames", "use 9 frames"),
        ({"frames": 25}, "frames is 25", "use 21 frames"),
        ({"frames": 0}, "frames is 0", "pass 1 to"),
        ({"frames": 2.5}, "frames is 2.5", "whole number"),
        ({"num_frames": 9}, "there is no argument num_frames", "did you mean frames"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    video: Pipeline, arguments: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        video.plan(make_request(prompt="a cat", **arguments))
    assert hint in str(error.value.hint)


def test_a_bundle_of_pictures_refuses_frames_and_motion_scores(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="frames is 9, but this bundle draws pictures"):
        pipeline.plan(Request(prompt="a cat", frames=9))
    with pytest.raises(UsageError, match="was not trained with one"):
        pipeline.plan(Request(prompt="a cat", motion_score=30))
    with pytest.raises(AttributeError, match="read `images`"):
        _ = pipeline("a cat", num_inference_steps=1).frames


def test_a_preview_is_of_the_middle_latent_frame(video: Pipeline) -> None:
    (state,) = video.start(video.plan(Request(prompt="a cat", frames=9, seed=0)))
    (picture,) = video.preview(state)
    assert picture.size == (16, 8)
