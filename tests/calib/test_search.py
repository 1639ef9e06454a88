"""Sensitivity and search on the tiny checkpoint: budgets hold, and tighter ones keep more layers in high precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ditc.calib.chart import curve_svg
from ditc.calib.collect import Settings, collect
from ditc.calib.search import Budget, parse_budget, search
from ditc.calib.sensitivity import base_recipe, candidate_plans, flops_shares, measure_effects
from ditc.calib.trial import Trial
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import Input, LayerPlan, make_plan
from ditc.export.quant.recipes import load_recipe, save_recipe
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.errors import UsageError

PROMPTS = ["a red heart", "blue cat"]


@pytest.fixture(scope="module")
def found(tiny_checkpoint, tmp_path_factory):
    """Trial, ranges, plans and effects of the tiny checkpoint."""
    out = tmp_path_factory.mktemp("search") / "r.safetensors"
    ranges = collect(tiny_checkpoint, PROMPTS, out, Settings(num_inference_steps=4))
    trial = Trial(TorchModel(tiny_checkpoint), PROMPTS, seed=0)
    plans = candidate_plans(trial, ranges, [Format.INT8])
    effects = measure_effects(trial, plans, flops_shares(trial.layers, ranges), picture_seconds=0.0)
    return trial, ranges, plans, effects


def test_every_layer_of_the_recipe_has_an_effect(found):
    _, _, plans, effects = found
    assert {effect.layer for effect in effects} == set(plans[Format.INT8])
    assert all(0 < effect.step_error < 0.1 and effect.picture_db is None for effect in effects)
    assert effects == sorted(effects, key=lambda effect: -effect.step_error)


def test_no_layer_in_8_bits_is_the_reference_itself(found):
    trial, *_ = found
    assert trial.step_error({}) == 0
    assert trial.fidelity({}).psnr_db == math.inf


def test_reference_steps_cover_all_batches_and_the_whole_schedule(tiny_checkpoint):
    trial = Trial(TorchModel(tiny_checkpoint), ["cat", "dog", "red", "sun", "tea", "owl"], seed=0)
    sizes = [int(feeds["latents"].shape[0]) for feeds, _ in trial.reference_steps]
    times = [float(np.asarray(feeds["timestep"]).ravel()[0]) for feeds, _ in trial.reference_steps]
    assert sizes == [4, 2, 4, 2]  # two batches; the checkpoint's own number of steps is four
    assert times == sorted(times, reverse=True) and len(set(times)) == 4
    assert trial.fidelity({}).psnr_db == math.inf


def test_a_bad_scale_moves_a_step_by_far_more_than_the_right_one(found):
    trial, _, plans, _ = found
    right = plans[Format.INT8]["transformer_blocks.1.ff.conv_point"]
    errors = {
        factor: trial.step_error(
            {
                right.name: LayerPlan(
                    right.name, right.kind, Input(right.input.amax * factor, right.input.smooth)
                )
            }
        )
        for factor in (1, 12, 1 / 12)
    }
    assert errors[12] > 4 * errors[1] and errors[1 / 12] > 4 * errors[1]


def test_the_search_keeps_its_budget_and_a_tighter_one_keeps_more_layers_in_high_precision(found, tmp_path):
    trial, ranges, plans, effects = found
    everything = trial.fidelity(plans[Format.INT8]).psnr_db
    results = [
        search(
            trial, plans, effects, Budget("psnr", everything + more), base_recipe(Format.INT8, trial.family)
        )
        for more in (-1, 2, 6)
    ]
    shares = [result.chosen.share for result in results]
    assert shares[0] == pytest.approx(max(p.share for p in results[0].curve))
    assert shares[0] > shares[1] >= shares[2] > 0
    for result, more in zip(results, (-1, 2, 6), strict=True):
        assert result.chosen.fidelity.psnr_db >= everything + more
    recipe = load_recipe(save_recipe(results[1].recipe, tmp_path / "mixed.json"))
    planned = make_plan(recipe, ranges, trial.layers)
    assert len(planned.layers) == results[1].chosen.layers
    assert any("outside the budget" in why for why in planned.kept_high_precision.values())
    assert curve_svg(results[1]).count("<circle") == len(results[1].curve) + 1


@pytest.mark.parametrize("text", ["psnr", "psnr=x", "psnr=-3", "ssim=0.9", "=4"])
def test_a_text_that_is_not_a_budget_is_refused(text):
    with pytest.raises(UsageError, match="neither psnr=DB nor rel_l2=SHARE"):
        parse_budget(text)


def test_budgets_are_read():
    assert parse_budget("psnr=40") == Budget("psnr", 40.0)
    assert parse_budget("rel_l2=0.05") == Budget("rel_l2", 0.05)
