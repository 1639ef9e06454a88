"""Ranges of a checkpoint that draws videos, and the 8-bit bundle that is built from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.calib.collect import Settings, collect
from ditc.export.build.builder import build_bundle
from ditc.export.options import BuildOptions
from ditc.export.quant.ranges import load_ranges
from ditc.export.quant.record import quant_record_path, read_record
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import DENOISER, VAE_DECODER, Precision

PROMPTS = ["a red cat", "dogs run", "a bird", "the sea"]
STEPS = 2
SETTINGS: dict[str, Any] = {"num_inference_steps": STEPS, "frames": 9, "seed": 5, "output_type": "np"}
# With 8 prompts and 4 steps, the worst of 4 videos had 44 dB. A bundle that drew in fp32 all the same has above 90 dB.
LEAST_DB, SAME_DB = 30.0, 90.0


@pytest.fixture(scope="module")
def ranges(video_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("video-ranges") / "ranges.safetensors"
    collect(video_checkpoint, PROMPTS, out, Settings(num_inference_steps=STEPS))
    return out


def test_every_linear_of_a_video_network_is_seen_over_all_frames(ranges: Path) -> None:
    found = load_ranges(ranges)
    sites = found.site_of
    assert {f"transformer_blocks.{block}.attn2.to_out.0" for block in (0, 1)} <= set(sites)
    assert not any("conv_temp" in name for name in sites)
    # 3 latent frames of 4x8 patches, for two rows of guidance, in each of the steps of each prompt.
    site = found.sites[sites["transformer_blocks.0.ff.conv_inverted"]]
    assert site.rows.sum() == 3 * 4 * 8 * 2 * STEPS * len(PROMPTS)


def test_the_decoder_of_videos_is_refused_before_anything_is_measured(
    video_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ranges.safetensors"
    with pytest.raises(UsageError, match="there is no int8 recipe for AutoencoderKLWan"):
        collect(video_checkpoint, PROMPTS, out, Settings(num_inference_steps=1, stage=VAE_DECODER))
    assert not out.exists()


@pytest.mark.slow  # exports the denoiser once more
def test_a_video_in_8_bits_is_close_to_fp32_and_keeps_what_the_paper_keeps(
    video_checkpoint: Path, video_bundle: Path, ranges: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(video_bundle, tmp_path / "bundle"))
    build_bundle(video_checkpoint, bundle, BuildOptions(precision=Precision.INT8, ranges=(ranges,)))
    artifacts = load_manifest(bundle).stages[DENOISER].artifacts
    artifact = next(a for a in artifacts if a.precision is Precision.INT8)
    record = read_record(quant_record_path(bundle / artifact.file.path))
    assert record.recipe.name == "sana-video-int8"
    assert len(record.layers) == 2 * 8 and not any("conv_temp" in name for name in record.layers)
    drawn = {}
    for name in ("fp32", "int8"):
        with Pipeline.load(bundle, precision=name, threads=1) as pipeline:
            drawn[name] = np.asarray(pipeline("a red cat", **SETTINGS).frames)[0]
    by_frame = [psnr(one, other) for one, other in zip(drawn["int8"], drawn["fp32"], strict=True)]
    assert LEAST_DB <= min(by_frame) < SAME_DB
