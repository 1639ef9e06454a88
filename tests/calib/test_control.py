"""Calibration of a checkpoint with a ControlNet: with control pictures, and of the ControlNet's own layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ditc.calib.collect import Settings, collect
from ditc.calib.control_pattern import PATTERN, control_of, outlines
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.export.quant.apply import check_layers, prepare, with_base_precisions
from ditc.export.quant.ranges import load_ranges, merge_ranges
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import CONTROLNET, DENOISER, Precision

PROMPTS = ["a red heart", "blue cat"]
SETTINGS = Settings(num_inference_steps=2)
SITE = "transformer_blocks.2.attn1.to_q"  # behind the residuals of both blocks of the ControlNet


def test_outlines_are_the_same_for_a_seed_mostly_black_and_others_for_another() -> None:
    first, again, other = (np.asarray(outlines(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    shares = [(np.asarray(outlines(seed)) > 127).mean() for seed in range(50)]
    assert min(shares) > 0.001 and max(shares) < 0.3


def test_every_second_prompt_is_drawn_with_control_whatever_the_shards(
    control_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []
    monkeypatch.setattr(
        "ditc.calib.collect.control_of",
        lambda number, seed, always: numbers.append(number) or control_of(number, seed, always=always),
    )
    whole = collect(control_checkpoint, PROMPTS, tmp_path / "r.safetensors", SETTINGS)
    assert load_ranges(tmp_path / "r.safetensors").origin.control == whole.origin.control == PATTERN
    shards = [
        collect(
            control_checkpoint,
            PROMPTS,
            tmp_path / f"{index}.safetensors",
            replace(SETTINGS, shard=(index, 2)),
        )
        for index in (0, 1)
    ]
    assert numbers == [0, 1, 0, 1]
    merged = merge_ranges(shards)
    np.testing.assert_array_equal(merged.sites[SITE].histogram, whole.sites[SITE].histogram)
    monkeypatch.setattr("ditc.calib.collect.control_of", lambda number, seed, always: None)
    without = collect(control_checkpoint, PROMPTS, tmp_path / "w.safetensors", SETTINGS)
    assert (without.sites[SITE].histogram != whole.sites[SITE].histogram).any()


def test_a_checkpoint_without_a_controlnet_has_ranges_as_before(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ranges = collect(
        tiny_checkpoint, PROMPTS[:1], tmp_path / "r.safetensors", Settings(num_inference_steps=1)
    )
    assert ranges.origin.control is None
    assert b"control" not in (tmp_path / "r.safetensors").read_bytes()
    with pytest.raises(UsageError, match="has no controlnet to measure") as caught:
        collect(tiny_checkpoint, PROMPTS, tmp_path / "c.safetensors", replace(SETTINGS, stage=CONTROLNET))
    assert "--controlnet DIR" in str(caught.value.hint)


def test_the_layers_of_the_controlnet_have_ranges_and_recipes_of_their_own(
    control_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    ranges = collect(control_checkpoint, PROMPTS, path, replace(SETTINGS, stage=CONTROLNET))
    assert (ranges.origin.stage, ranges.origin.network, ranges.origin.buckets) == (CONTROLNET, CONTROLNET, 2)
    # Both prompts, in every step two rows of 32 x 32 tokens at the default of 64 x 64 pixels, because the VAE halves it
    # and a token is one latent cell. The second prompt is controlled too, or else there would be half as many.
    rows = ranges.sites["transformer_blocks.0.attn1.to_q"].rows
    assert rows.tolist() == [len(PROMPTS) * 2 * 32 * 32] * 2
    checkpoint = open_checkpoint(control_checkpoint)
    adapter = find_adapter(checkpoint)
    for name, precision, files in (
        ("sana-controlnet-int8", Precision.INT8, (path,)),
        ("sana-controlnet-int8-dynamic", Precision.INT8_DYNAMIC, ()),
    ):
        options = BuildOptions(precision=Precision.INT8_DYNAMIC, recipes=(name,), ranges=files)
        plan = adapter.plan(checkpoint, options)
        found = prepare(options, checkpoint, plan)
        assert {stage: one.precision for stage, one in found.items()} == {
            DENOISER: Precision.INT8_DYNAMIC,
            CONTROLNET: precision,
        }
        check_layers(found, adapter, checkpoint, plan, options)
        based = with_base_precisions(plan, found, adapter, checkpoint, options)
        assert based.stages[CONTROLNET].precision is plan.stages[CONTROLNET].precision is Precision.FP32
        formats = found[CONTROLNET].recipe.formats(ranges.site_of)
        assert len(formats) == 2 * 6 + 2 * 2  # of each block attn1's four, attn2's two, and the MLP's two
        assert all(layer.startswith("transformer_blocks.") for layer in formats)
    with pytest.raises(
        UsageError, match="sana-controlnet-int8 quantizes activations and needs --ranges"
    ) as caught:
        options = BuildOptions(recipes=("sana-controlnet-int8",))
        prepare(options, checkpoint, adapter.plan(checkpoint, options))
    assert "--stage controlnet" in str(caught.value.hint)


def test_a_controlnets_recipe_needs_a_controlnet(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    options = BuildOptions(recipes=("sana-controlnet-int8-dynamic",))
    with pytest.raises(UsageError, match="is for controlnet, which this checkpoint does not have"):
        prepare(options, checkpoint, find_adapter(checkpoint).plan(checkpoint, options))
