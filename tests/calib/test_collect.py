"""Ranges of the tiny checkpoint: they are complete, repeatable, resumable, mergeable, and tied to the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ditc.calib.collect import Settings, collect
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.quant.ranges import Statistics, checkpoint_identity, load_ranges, merge_ranges
from ditc.runtime.errors import UsageError

PROMPTS = ["a red heart", "blue cat", "green dog", "an apple"]
SETTINGS = Settings(num_inference_steps=2)
SITE = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tmp_path_factory):
    """The ranges and the file of one run over all prompts."""
    out = tmp_path_factory.mktemp("ranges") / "whole.safetensors"
    return collect(tiny_checkpoint, PROMPTS, out, SETTINGS), out


def equal(one, other, squares: float = 0.0) -> bool:
    """Compare two ranges: counts and amax exactly, sums of squares to a relative difference of `squares`."""
    assert one.site_of == other.site_of
    for site in one.sites:
        for field in Statistics.__slots__:
            a, b = getattr(one.sites[site], field), getattr(other.sites[site], field)
            np.testing.assert_allclose(a, b, rtol=squares if field == "channel_squares" else 0, atol=0)
    return True


def test_every_linear_is_seen_and_readers_of_one_tensor_share_a_site(whole):
    ranges, _ = whole
    assert len(ranges.site_of) == 2 * 8 + 5
    assert {ranges.site_of[f"transformer_blocks.0.attn1.to_{x}"] for x in "qkv"} == {SITE}
    statistics = ranges.sites[SITE]
    assert statistics.buckets == SETTINGS.num_inference_steps, "with few steps, every step has its own bucket"
    assert (statistics.histogram.sum(axis=1) == statistics.rows * statistics.channels).all()
    np.testing.assert_array_equal(statistics.amax, statistics.channel_amax.max(axis=1))


def test_a_run_with_one_seed_is_repeatable(whole, tiny_checkpoint, tmp_path):
    again = collect(tiny_checkpoint, PROMPTS, tmp_path / "again.safetensors", SETTINGS)
    assert equal(whole[0], again)
    assert (tmp_path / "again.safetensors").read_bytes() == whole[1].read_bytes()


def test_a_killed_run_is_resumed_to_the_same_result(whole, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ditc.calib.collect.SAVE_EVERY_S", 0.0)
    out, steps = tmp_path / "r.safetensors", []

    def kill(progress):
        steps.append(progress)
        if progress.done == 5:  # in the middle of the third prompt
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tiny_checkpoint, PROMPTS, out, SETTINGS, on_progress=kill)
    assert not out.exists()
    rest = []
    resumed = collect(tiny_checkpoint, PROMPTS, out, SETTINGS, on_progress=rest.append)
    assert len(rest) == 4  # two prompts were saved, two remained
    assert equal(whole[0], resumed)
    assert out.read_bytes() == whole[1].read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_shards_merge_to_the_single_run(whole, tiny_checkpoint, tmp_path):
    parts = [
        collect(tiny_checkpoint, PROMPTS, tmp_path / f"{i}.safetensors", replace(SETTINGS, shard=(i, 2)))
        for i in range(2)
    ]
    # Sums of squares are added in another order, so fp64 rounding differs.
    assert equal(whole[0], merge_ranges(parts), squares=1e-12)


def test_a_finished_file_is_not_measured_again(whole, tiny_checkpoint):
    steps = []
    collect(tiny_checkpoint, PROMPTS, whole[1], SETTINGS, on_progress=steps.append)
    assert not steps


def test_ranges_of_other_weights_are_refused_by_a_build(whole, tiny_checkpoint, tmp_path):
    from shutil import copytree

    from ditc.export.build.builder import build_bundle
    from ditc.runtime.spec import Precision

    other = copytree(tiny_checkpoint, tmp_path / "other")
    path = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["proj_out.bias"] += 1
    save_file(tensors, path)
    options = BuildOptions(precision=Precision.INT8, ranges=(whole[1],))
    with pytest.raises(UsageError, match="measured on other weights"):
        build_bundle(other, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_the_identity_follows_weights_and_config(tiny_checkpoint, whole):
    identity = checkpoint_identity(open_checkpoint(tiny_checkpoint), "transformer")
    assert load_ranges(whole[1], identity=identity).origin.identity == identity


def test_an_empty_shard_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="shard 3/4 of 2 prompts is empty"):
        collect(tiny_checkpoint, PROMPTS[:2], tmp_path / "r.safetensors", replace(SETTINGS, shard=(3, 4)))
