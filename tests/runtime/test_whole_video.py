"""Videos that are decoded as a whole, with LTX-2's autoencoder, compared with unmodified SanaVideoPipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaImageToVideoPipeline, SanaVideoPipeline
from PIL import Image

from ditc.export.build.builder import build_bundle
from ditc.export.options import BuildOptions
from ditc.runtime import denoise
from ditc.runtime.bundle.jsondata import digest_of, serialize
from ditc.runtime.bundle.manifest import Tiling, load_manifest
from ditc.runtime.cli import main
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.api.byte_room import video_need
from ditc.runtime.serving.scheduling.videos import VideoDecoding
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import VAE_DECODER
from ditc.runtime.video import decoded_chunks

LATENTS_BOUND = 1e-4  # fp32 on both sides; measured: below 1e-6 after four steps
FRAME_DB = 45.0  # frames that differ in the last of 8 bits have about 48 dB


@pytest.fixture(scope="module")
def video(whole_video_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(whole_video_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def upstream(whole_video_checkpoint: Path) -> SanaVideoPipeline:
    pipeline = SanaVideoPipeline.from_pretrained(whole_video_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
    (90, 70)
)
NINE: dict[str, Any] = {
    "height": 32,
    "width": 64,
    "frames": 9,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
}


@pytest.mark.parametrize(
    ("prompt", "image", "settings"),
    [
        ("a red cat", None, {}),
        (["a red cat", "dogs"], None, {"height": 64, "width": 32, "frames": 17, "num_inference_steps": 2}),
        ("a cat", None, {"frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}),
        ("a red cat", PICTURE, {"num_inference_steps": 2}),
    ],
    ids=["nine-frames", "two-tall-seventeen", "one-frame-unguided", "from-a-picture"],
)
def test_videos_equal_diffusers(
    video: Pipeline,
    upstream: SanaVideoPipeline,
    prompt: Any,
    image: Image.Image | None,
    settings: dict[str, Any],
) -> None:
    settings = {**NINE, **settings}
    latents: list[Array] = []

    def keep(_: Any, index: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"].numpy().copy())
        return {}

    theirs, given = upstream, {}
    if image is not None:
        theirs, given = SanaImageToVideoPipeline(**upstream.components), {"image": image}
        theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt=prompt,
        generator=torch.Generator("cpu").manual_seed(7),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=12,
        output_type="np",
        callback_on_step_end=keep,
        **given,
        **settings,
    ).frames
    plan = video.plan(Request(prompt=prompt, image=image, seed=7, output_type="np", **settings))
    (state,) = video.start(plan)
    errors = []
    for wanted in latents:
        (state,) = denoise.step(video.stepper, [state])
        errors.append(relative_l2(to_numpy(state.latents), wanted))
    frames = video.decode([state], plan)
    assert frames.shape == expected.shape
    decibels = [
        psnr(one, other)
        for ours, others in zip(frames, expected, strict=True)
        for one, other in zip(ours, others, strict=True)
    ]
    assert max(errors) <= LATENTS_BOUND, errors
    assert min(decibels) >= FRAME_DB, decibels


def test_a_server_decodes_the_video_in_one_piece(video: Pipeline) -> None:
    plan = video.plan(Request(prompt="a red cat", seed=7, output_type="pil", **NINE))
    (state,) = video.start(plan)
    while not state.done:
        (state,) = denoise.step(video.stepper, [state])
    decoding = VideoDecoding(video, state, plan)
    assert decoding.advance() == 9
    assert decoding.done
    (expected,) = video.decode([state], plan)
    assert [frame.tobytes() for frame in decoding.frames] == [frame.tobytes() for frame in expected]


def test_the_memory_of_decoding_is_that_of_the_decoders_output_and_is_counted(video: Pipeline) -> None:
    plan = video.plan(Request(prompt="a red cat", **NINE))
    pixels = 9 * plan.drawn_height * plan.drawn_width
    need = video_need(plan, video.manifest, "clips")
    assert (need.size, need.passing) == (3 * 9 * plan.height * plan.width, 12 * pixels)
    chunks = video.manifest.latents.shape(plan.drawn_height, plan.drawn_width, plan.frames)
    latents = np.zeros((1, *chunks), np.float32)
    decoded = list(decoded_chunks(video.sessions[VAE_DECODER], None, latents))
    # Each frame becomes 8-bit by itself, so the copies on the way are those of one frame.
    assert [len(frames) for frames in decoded] == [1] * 9
    assert sum(frames.nbytes for frames in decoded) == need.passing


def test_tiles_are_refused_before_any_step(video: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "tiling", Tiling(tile=32, stride=16))
    with pytest.raises(UsageError, match="vae_decoder decodes a video as a whole"):
        video.plan(Request(prompt="a red cat", **NINE))


def test_a_build_for_tiles_is_refused(whole_video_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole_video_checkpoint, tmp_path / "checkpoint"))
    values = json.loads((checkpoint / "ditc.json").read_text())
    values["tiling"] = {"tile": 32, "stride": 16}
    (checkpoint / "ditc.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="AutoencoderKLLTX2Video decodes a video as a whole"):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions())


def test_the_bundle_has_one_stage_for_decoding_and_passes_at_every_level(
    whole_video_bundle: Path, whole_video_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(whole_video_bundle, tmp_path / "bundle"))
    assert "vae_decoder_next" not in load_manifest(bundle).stages
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    case = ("--seeds", "0", "--threads", "1", "--steps", "2", "--prompts", str(prompts))
    assert main(["parity", str(bundle), "--against", str(whole_video_checkpoint), *case]) == 0
    assert main(["verify", str(bundle)]) == 0


def test_a_manifest_with_tiles_is_refused(whole_video_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(whole_video_bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "manifest.json").read_text())
    data["defaults"]["tiling"] = {"tile": 32, "stride": 16}
    data["digest"] = digest_of({**data, "digest": ""})
    (bundle / "manifest.json").write_bytes(serialize(data))
    with pytest.raises(BundleError, match="a video decoded as a whole has no tiles"):
        load_manifest(bundle)
