"""Videos decoded in tiles, compared with AutoencoderKLWan.enable_tiling of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER, Range
from ditc.runtime.video import decoded_chunks

SCALE = 4  # pixels per latent cell of the tests' autoencoder
# Both compute in fp32, where single values of norms of almost nothing are off by 1e-5. A wrong blend is off by 1e-2.
SAME = 1e-5


@pytest.fixture(scope="module")
def vae(video_checkpoint: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(video_checkpoint / "vae").eval()


@pytest.mark.parametrize(("tile", "stride"), [(24, 16), (32, 24), (40, 40)])
def test_frames_of_tiles_equal_those_of_diffusers(
    video: Pipeline, vae: AutoencoderKLWan, tile: int, stride: int
) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 16, 3, 12, 10)).astype(np.float32)
    sessions = (video.sessions[VAE_DECODER], video.sessions[VAE_DECODER_NEXT])
    whole = np.concatenate(list(decoded_chunks(*sessions, latents)))
    chunks = list(decoded_chunks(*sessions, latents, tiling=Tiling(tile=tile, stride=stride), scale=SCALE))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    ours = np.concatenate(chunks)
    vae.enable_tiling(tile, tile, stride, stride)
    try:
        with torch.no_grad():
            theirs = vae.decode(_as_the_vae_takes_them(vae, latents)).sample[0].transpose(0, 1).numpy()
    finally:
        vae.disable_tiling()
    assert relative_l2(ours, theirs) <= SAME
    assert relative_l2(ours, whole) > 100 * SAME or stride == tile, "tiles did not change the frames"


def _as_the_vae_takes_them(vae: AutoencoderKLWan, latents: np.ndarray) -> torch.Tensor:
    """The latents times the deviation plus the mean, as SanaVideoPipeline passes them (diffusers 0.42.1)."""
    mean, std = (
        torch.tensor(x)[:, None, None, None] for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return torch.from_numpy(latents) * std + mean


def test_a_pipeline_decodes_in_tiles_when_it_is_told_to(video: Pipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 1, "frames": 5, "seed": 1, "output_type": "np"}
    tiled = video.with_sessions({})
    tiled.tiling = Tiling(tile=48, stride=32)
    whole, frames = video("a cat", **settings).frames, tiled("a cat", **settings).frames
    assert frames.shape == whole.shape and not np.array_equal(frames, whole)
    tiled.tiling = Tiling(tile=64, stride=48)  # the video is one tile
    assert np.array_equal(tiled("a cat", **settings).frames, whole)


def test_tiles_that_no_stage_was_built_for_are_refused_before_any_step(video: Pipeline) -> None:
    tiled = video.with_sessions({})
    tiled.tiling = Tiling(
        tile=32, stride=24
    )  # the last column would be 16 pixels wide, and the last row 8 high
    with pytest.raises(UsageError, match="has pieces of 8x16"):
        tiled.plan(Request(prompt="a cat"))


def test_ditc_json_builds_the_decoder_for_tiles_alone(video_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(video_checkpoint))
    checkpoint.defaults["tiling"] = {"tile": 32, "stride": 24}
    plan = find_adapter(checkpoint).plan(checkpoint, BuildOptions())
    assert plan.defaults.tiling == Tiling(tile=32, stride=24)
    for stage in (VAE_DECODER, VAE_DECODER_NEXT):
        assert plan.stages[stage].spec.profile["height"] == Range(1, 8, 8)
    assert plan.stages[VAE_ENCODER].spec.profile["image_width"] == Range(4, 32, 32, 4)
    checkpoint.defaults["tiling"] = {"tile": 30, "stride": 24}
    with pytest.raises(UsageError, match="tile 30 and stride 24 do not fit cells of 4 pixels"):
        find_adapter(checkpoint).plan(checkpoint, BuildOptions())


@pytest.mark.parametrize("wrong", [{"tile": 32}, {"tile": 0, "stride": 8}, 32])
def test_a_tiling_that_is_none_is_refused(tmp_path: Path, wrong: object) -> None:
    import json

    from ditc.export.checkpoint.defaults import read_defaults

    (tmp_path / "ditc.json").write_text(json.dumps({"tiling": wrong}))
    with pytest.raises(CheckpointError, match='must be an object with "tile" and "stride"'):
        read_defaults(tmp_path / "ditc.json")
