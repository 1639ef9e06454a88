"""A video drawn with engine sessions on a fake GPU: what the decoder keeps stays on the device, frame after frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_pipeline import Gpu
from fake_gpu import FakeCuda

from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import to_numpy
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT
from ditc.runtime.step_contract import KEPT
from ditc.runtime.video import decoded_chunks

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def gpu(video_bundle: Path) -> Iterator[Gpu]:
    gpu = Gpu(video_bundle)
    yield gpu
    gpu.pipeline.close()
    assert gpu.cuda.used() == 0


@pytest.mark.parametrize("changes", [{"frames": 9}, {"frames": 1}, {"frames": 13, "height": 64, "width": 32}])
def test_frames_equal_those_of_onnx_runtime(gpu: Gpu, video: Pipeline, changes: dict[str, Any]) -> None:
    request = Request(prompt="a cat", **{**SETTINGS, **changes})
    assert np.array_equal(gpu.pipeline.draw(request).frames, video.draw(request).frames)


def test_two_videos_and_tiles_are_the_same_too(gpu: Gpu, video: Pipeline) -> None:
    for tiling in (None, Tiling(tile=48, stride=32)):
        ours, theirs = gpu.pipeline.with_sessions({}), video.with_sessions({})
        ours.tiling = theirs.tiling = tiling
        request = Request(prompt=["a cat", "a dog"], frames=9, **SETTINGS)
        assert np.array_equal(ours.draw(request).frames, theirs.draw(request).frames)


def test_what_the_decoder_keeps_is_never_copied_to_the_host(gpu: Gpu) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 16, 1, 8, 16)).astype(np.float32)
    first, following = gpu.pipeline.sessions[VAE_DECODER], gpu.pipeline.sessions[VAE_DECODER_NEXT]
    outputs = first.run({"latents": latents})
    used = []
    for _ in range(4):
        gpu.cuda.calls.clear()
        kept = {f"{KEPT}{i}": outputs[name] for i, name in enumerate([*outputs][1:])}
        outputs = following.run({"latents": latents, **kept})
        to_numpy(outputs["frames"])
        assert gpu.cuda.calls.count("download") == 1, "only the frames come to the host"
        assert "copy" not in gpu.cuda.calls
        used.append(gpu.cuda.used())
    assert used[1] == used[3], "every latent frame takes more memory"


def test_tiles_do_not_take_buffers_of_whole_frames(video_bundle: Path) -> None:
    """Each tile has what the decoder keeps of it, so with buffers of the largest frame they took as many times more."""
    cuda = FakeCuda()
    pipeline = Gpu(video_bundle, cuda).pipeline
    sessions = (pipeline.sessions[VAE_DECODER], pipeline.sessions[VAE_DECODER_NEXT])
    profile = sessions[0].spec.profile
    rows, columns = profile["height"], profile["width"]
    latents = np.zeros((1, 16, 3, rows.max, columns.max), np.float32)
    side = 4 * max(rows.min, columns.min)  # pixels, of which a cell has 4
    tiling = Tiling(tile=side, stride=side)
    used = []
    for chosen in (tiling, None):
        before = cuda.used()
        for _ in decoded_chunks(*sessions, latents, tiling=chosen, scale=4):
            pass
        used.append(cuda.used() - before)
    pipeline.close()
    # Together the tiles are as large as a frame. They took 117 MB, with buffers of a frame for each of them.
    assert used[0] <= used[1]
