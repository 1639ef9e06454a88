"""Calibration and 8-bit recipes of a few-step checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ditc.calib.collect import Settings, collect
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.export.quant.apply import prepare
from ditc.export.quant.recipes import recipes_of
from ditc.runtime.spec import DENOISER, Precision


def test_every_step_is_a_bucket_and_the_recipe_is_sprints_own(
    sprint_checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ranges = collect(sprint_checkpoint, ["red cat", "blue dog"], tmp_path / "r.safetensors", Settings())
    assert (ranges.origin.buckets, ranges.origin.num_inference_steps) == (2, 2)
    statistics = ranges.sites["transformer_blocks.0.attn1.to_q"]
    assert (statistics.rows > 0).all() and statistics.amax[0] != statistics.amax[1]
    assert "time_embed.guidance_embedder.linear_1" in ranges.site_of
    checkpoint = open_checkpoint(sprint_checkpoint)
    options = BuildOptions(precision=Precision.INT8, ranges=(tmp_path / "r.safetensors",))
    plan = find_adapter(checkpoint).plan(checkpoint, options)
    for precision in (Precision.INT8, Precision.FP8):
        prepared = prepare(replace(options, precision=precision), checkpoint, plan)
        recipe = prepared[DENOISER].recipe
        assert recipe.name == f"sana-sprint-{precision.value}"
        assert not {layer for layer in recipe.formats(ranges.site_of) if "embed" in layer}
    sana = find_adapter(open_checkpoint(tiny_checkpoint)).plan(
        open_checkpoint(tiny_checkpoint), BuildOptions()
    )
    assert not sana.recipes


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_sprints_recipes_quantize_the_layers_of_sanas(kind: str) -> None:
    known = recipes_of("sana")
    assert known[f"sana-sprint-{kind}"].rules == known[f"sana-{kind}"].rules
