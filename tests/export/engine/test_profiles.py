"""Optimisation profiles: every bin fits into one, and none covers the longest height and the longest width together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditc.export.engine.profiles import orientation_profiles
from ditc.runtime.bundle.manifest import Defaults, Tiling
from ditc.runtime.spec import DENOISER, VAE_DECODER, Backend, DType, Range, StageSpec, TensorSpec

BINS = ((1024, 1024), (832, 1216), (1216, 832))
LATENTS = TensorSpec("latents", DType.FLOAT32, ("batch", 4, "height", "width"))
SPEC = StageSpec(
    DENOISER,
    (LATENTS,),
    (),
    {"batch": Range(1, 1, 1), "height": Range(26, 32, 38), "width": Range(26, 32, 38)},
)


def defaults(bins: tuple[tuple[int, int], ...]) -> Defaults:
    return Defaults(height=1024, width=1024, num_inference_steps=20, guidance_scale=4.5, bins=bins)


@pytest.mark.parametrize(("backend", "count"), [(Backend.TENSORRT_RTX, 2), (Backend.TENSORRT, 3)])
def test_every_bin_has_a_profile_and_no_profile_spans_both_long_sides(backend: Backend, count: int) -> None:
    profiles = orientation_profiles(SPEC, defaults(BINS), backend)
    assert len(profiles) == count
    for height, width in BINS:
        assert any(height // 32 in p["height"] and width // 32 in p["width"] for p in profiles), (
            height,
            width,
        )
    assert all(p["height"].max * p["width"].max <= 32 * 38 for p in profiles)
    assert all((p["height"].opt, p["width"].opt) == (32, 32) for p in profiles)


def test_tiles_have_no_orientation() -> None:
    vae = replace(SPEC, name=VAE_DECODER)
    tiled = replace(defaults(BINS), tiling=Tiling(tile=512, stride=448))
    assert len(orientation_profiles(vae, defaults(BINS), Backend.TENSORRT_RTX)) == 2
    assert orientation_profiles(vae, tiled, Backend.TENSORRT_RTX) == ({},)


def test_without_bins_one_profile_is_enough() -> None:
    assert orientation_profiles(SPEC, defaults(()), Backend.TENSORRT_RTX) == ({},)
