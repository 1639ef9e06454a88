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
from diffusers import SanaVideoPipeline

from ditc.runtime import denoise
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.errors import BundleError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import to_numpy

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


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("a red cat", {"height": 32, "width": 64, "frames": 9, "num_inference_steps": 4}),
        (["a red cat", "dogs"], {"height": 64, "width": 32, "frames": 17, "num_inference_steps": 2}),
        ("a cat", {"height": 32, "width": 64, "frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}),
    ],
    ids=["nine-frames", "two-tall-seventeen", "one-frame-unguided"],
)
def test_videos_equal_diffusers(
    video: Pipeline, upstream: SanaVideoPipeline, prompt: Any, settings: dict[str, Any]
) -> None:
    settings = {"guidance_scale": 3.0, **settings}
    latents: list[np.ndarray[Any, Any]] = []

    def keep(_: Any, index: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"].numpy().copy())
        return {}

    expected = upstream(
        prompt,
        generator=torch.Generator("cpu").manual_seed(7),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=12,
        output_type="np",
        callback_on_step_end=keep,
        **settings,
    ).frames
    plan = video.plan(Request(prompt=prompt, seed=7, output_type="np", **settings))
    (state,) = video.start(plan)
    for index, wanted in enumerate(latents):
        (state,) = denoise.step(video.stepper, [state])
        error = relative_l2(to_numpy(state.latents), wanted)
        assert error <= LATENTS_BOUND, f"step {index}: {error:.2g}"
    frames = video.decode([state], plan)
    assert frames.shape == expected.shape
    for ours, theirs in zip(frames, expected, strict=True):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert psnr(one, other) >= FRAME_DB, index


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


def test_a_bundle_that_has_lost_a_stage_is_refused(video_bundle: Path, tmp_path: Path) -> None:
    from ditc.runtime.bundle.jsondata import digest_of, serialize

    bundle = Path(shutil.copytree(video_bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "manifest.json").read_text())
    del data["stages"]["vae_decoder_next"]
    data["digest"] = digest_of({**data, "digest": ""})
    (bundle / "manifest.json").write_bytes(serialize(data))
    with pytest.raises(BundleError, match="there is no vae_decoder_next"):
        load_manifest(bundle)
