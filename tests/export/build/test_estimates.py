"""The estimate of a build's memory counts what a stage loads, copies, checks and draws, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ditc.export.build.estimates import (
    FIXED_BYTES,
    StageSize,
    build_bytes,
    export_bytes,
    golden_bytes,
    stage_size,
)
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.checkpoint.release_memory import MAPS, free_copies
from ditc.export.checkpoint.tensors import TensorSource, read_safetensors
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import MOST_CHECKED_SIDE, check_sizes
from ditc.export.networks.loading import WeightSource, load_strict
from ditc.runtime.spec import VAE_DECODER, VAE_ENCODER, Range

GB = 10**9
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
# A bf16 stage of a billion parameters.
STAGE = StageSize(
    weight_bytes=2 * GB,
    parameters=GB,
    checked=False,
    encoder=False,
    denoiser=False,
    check_pixels=0,
    golden_pixels=0,
)


def test_the_golden_file_of_a_16_bit_stage_needs_its_weights_in_fp32():
    assert build_bytes(STAGE) == FIXED_BYTES + 4 * GB


def test_a_check_adds_onnx_runtimes_copy_to_the_weights():
    fp32 = replace(STAGE, weight_bytes=4 * GB)
    assert golden_bytes(fp32) == FIXED_BYTES + 4 * GB
    assert build_bytes(replace(fp32, checked=True)) >= FIXED_BYTES + 2 * 4 * GB


def test_pictures_count_by_their_pixels():
    assert build_bytes(replace(STAGE, golden_pixels=1024**2)) > build_bytes(STAGE) + GB


@pytest.fixture(scope="module")
def vae(tiny_checkpoint):
    """The sizes of the tiny checkpoint's decoder and encoder, and the parameters of both halves together."""
    checkpoint, options = open_checkpoint(tiny_checkpoint), BuildOptions()
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    stages = {name: adapter.load(checkpoint, plan, name, options) for name in (VAE_DECODER, VAE_ENCODER)}
    sizes = {name: stage_size(stage, plan.latents.scale_factor) for name, stage in stages.items()}
    tensors = checkpoint.component("vae").tensors
    return stages, sizes, sum(tensors[name].numel() for name in tensors)


def test_only_the_half_of_the_autoencoder_that_is_built_counts(vae):
    _, sizes, both = vae
    assert sizes[VAE_DECODER].parameters + sizes[VAE_ENCODER].parameters == both


def test_decoder_and_encoder_are_checked_with_pictures_of_one_size(vae):
    _, sizes, _ = vae
    assert sizes[VAE_DECODER].check_pixels > 0 and sizes[VAE_DECODER].golden_pixels > 0
    assert sizes[VAE_DECODER].golden_pixels == sizes[VAE_ENCODER].golden_pixels


def test_the_check_of_a_large_picture_runs_at_a_small_size(vae):
    spec = vae[0][VAE_DECODER].spec
    large = {**spec.profile, "height": Range(26, 32, 38), "width": Range(26, 32, 38)}
    first, second = check_sizes(replace(spec, profile=large))
    assert first["height"] == first["width"] == MOST_CHECKED_SIDE
    assert second["height"] != second["width"] and max(second.values()) < 26


def test_copies_in_another_type_are_freed_and_the_checkpoints_own_memory_is_not():
    module = nn.Linear(4, 4).requires_grad_(False)
    sources = [
        WeightSource(checkpoint=name, stage="a", parameter=name, transform="identity", shape=(), dtype=dtype)
        for name, dtype in (("weight", torch.float16), ("bias", torch.float32))
    ]
    free_copies(module, sources)
    assert module.weight.untyped_storage().nbytes() == 0 < module.bias.untyped_storage().nbytes()


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells where a file is mapped")
def test_a_checkpoint_in_another_type_is_not_in_memory_twice(tmp_path):
    save_file({"weight": torch.ones(2**22, dtype=torch.float16)}, tmp_path / "a.safetensors")
    tensors = TensorSource(read_safetensors(tmp_path / "a.safetensors"))
    module = nn.ParameterDict({"weight": torch.empty(2**22, device="meta")})
    before = mapped_bytes(tmp_path / "a.safetensors")
    load_strict({"a": module}, tensors, torch.float32)
    assert mapped_bytes(tmp_path / "a.safetensors") - before < 2**22
    assert bool((module["weight"] == 1).all()) and bool((tensors["weight"] == 1).all())


def mapped_bytes(file: Path) -> int:
    """Bytes of the file that are in this process's memory now."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(file))]
    sizes = [next(line for line in lines[i:] if line.startswith("Rss:")) for i in starts]
    return sum(int(size.split()[1]) * 1024 for size in sizes)


def test_what_a_decoder_keeps_from_chunk_to_chunk_takes_no_memory_when_it_is_exported():
    (newest, *_) = sorted(RESULTS.glob("build_scale_wan_vae_next-*.json"), reverse=True)
    found = json.loads(newest.read_text())["results"]["wan-vae-next"]
    assert 1 <= found["export_estimated_bytes"] / found["export_peak_bytes"] <= 1.25


def test_the_estimates_bound_the_measured_peaks_of_released_sizes():
    (newest, *_) = sorted(RESULTS.glob("build_memory-*.json"), reverse=True)
    measured = [
        found for found in json.loads(newest.read_text())["results"].values() if "peak_bytes" in found
    ]
    assert len(measured) >= 9
    for found in measured:
        size = StageSize(**{field: found[field] for field in StageSize.__slots__})
        for estimate, peaks in (
            (export_bytes(size), found["export_peak_bytes"]),
            (golden_bytes(size), found["golden_peak_bytes"]),
        ):
            assert all(peak <= estimate <= 1.25 * peak for peak in peaks), (found["stage"], estimate, peaks)
