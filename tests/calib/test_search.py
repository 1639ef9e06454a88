"""Sensitivity and search on the tiny checkpoint: budgets hold, and tighter ones keep more layers in high precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from ditc.calib.chart import curve_svg
from ditc.calib.collect import Settings, collect
from ditc.calib.search import MARGIN_DB, Budget, parse_budget, search
from ditc.calib.sensitivity import Effect, base_recipe, candidate_plans, flops_shares, measure_effects
from ditc.calib.trial import Fidelity, Trial
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import Input, LayerPlan, make_plan, with_token_scales
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
        search(trial, plans, effects, Budget(psnr=everything + more), base_recipe(Format.INT8, trial.family))
        for more in (-4, -1, 3)
    ]
    shares = [result.chosen.share for result in results]
    assert shares[0] == pytest.approx(max(p.share for p in results[0].curve))
    assert shares[0] >= shares[1] >= shares[2] > 0 and results[0].chosen != results[2].chosen
    for result, more in zip(results, (-4, -1, 3), strict=True):
        assert result.chosen.fidelity.psnr_db >= everything + more + MARGIN_DB
    recipe = load_recipe(save_recipe(results[1].recipe, tmp_path / "mixed.json"))
    planned = make_plan(recipe, ranges, trial.layers)
    assert len(planned.layers) == results[1].chosen.layers
    assert sum(p.input.per_token for p in planned.layers.values()) == results[1].chosen.per_token
    assert curve_svg(results[1]).count("<circle") == len(results[1].curve) + 1


BAD_BUDGETS = ["psnr", "psnr=x", "psnr=-3", "psnr=inf", "ssim=0.9", "=4", "psnr=40,", "psnr=40,psnr=41"]


@pytest.mark.parametrize("text", BAD_BUDGETS)
def test_a_text_that_is_not_a_budget_is_refused(text):
    with pytest.raises(UsageError, match="is not made of psnr=DB, worst=DB and rel_l2=SHARE"):
        parse_budget(text)


def test_budgets_are_read_and_written():
    assert parse_budget("psnr=40") == Budget(psnr=40.0)
    assert parse_budget("worst=32,rel_l2=0.05") == Budget(worst=32.0, rel_l2=0.05)
    for text in ("psnr=40", "rel_l2=0.05", "psnr=40,worst=32"):
        assert str(parse_budget(text)) == text


def test_a_budget_holds_for_the_mean_and_the_worst_picture():
    fidelity = Fidelity(psnr_db=41.0, worst_db=30.0, rel_l2=0.04)
    assert Budget(psnr=40).allows(fidelity) and Budget(psnr=40, worst=30, rel_l2=0.04).allows(fidelity)
    for broken in (Budget(psnr=42), Budget(psnr=40, worst=32), Budget(psnr=40, rel_l2=0.03)):
        assert not broken.allows(fidelity)


@dataclass
class Additive:
    """A trial whose pictures lose what the layers' errors add up to, so that the best assignment is known."""

    static: dict[str, float]
    token: dict[str, float]
    drawn: int = 0

    def fidelity(self, plans):
        self.drawn += 1
        errors = [(self.token if p.input.per_token else self.static)[name] for name, p in plans.items()]
        error = math.sqrt(sum(e**2 for e in errors))
        worst = -20 * math.log10(error) if error else math.inf
        return Fidelity(psnr_db=worst + 3, worst_db=worst, rel_l2=error)


@pytest.mark.parametrize(
    ("limit", "tokens", "high"),
    [
        (0.6, "", ""),  # 0.42 with one scale for each input; the search asks for 3 dB less than the limit
        (0.44, "d", ""),
        (0.17, "cd", ""),
        (0.1, "bcd", ""),
        (0.06, "bc", "d"),  # even with a scale for each token, d alone has an error of 0.05
    ],
)
def test_layers_first_get_scales_per_token_and_only_then_stay_in_high_precision(limit, tokens, high):
    static = {"a": 0.02, "b": 0.1, "c": 0.28, "d": 0.3}
    token = {"a": 0.02, "b": 0.02, "c": 0.03, "d": 0.05}
    effects = [
        Effect(layer=n, kind=Format.INT8, share=0.25, step_error=static[n], per_token_error=token[n])
        for n in static
    ]
    plans = {Format.INT8: {n: LayerPlan(n, Format.INT8, Input(1.0)) for n in static}}
    base = base_recipe(Format.INT8, "sana")
    result = search(Additive(static, token), plans, effects, Budget(rel_l2=limit), base)
    rules = {rule.layers: rule for rule in result.recipe.rules if rule.layers in static}
    assert {n for n, rule in rules.items() if rule.per_token} == set(tokens)
    assert {n for n, rule in rules.items() if rule.kind is None} == set(high)
    assert result.chosen.fidelity.rel_l2 <= limit * 0.708 and result.chosen.per_token == len(tokens)


def test_a_search_that_was_killed_measures_nothing_twice(found, tiny_checkpoint, tmp_path, caplog):
    _, _, plans, _ = found
    journal, planned = tmp_path / "search.unfinished", plans[Format.INT8]
    first = Trial(TorchModel(tiny_checkpoint), PROMPTS, seed=0, journal=journal)
    wanted = first.step_error(planned), first.fidelity(planned)
    again = Trial(TorchModel(tiny_checkpoint), PROMPTS, seed=0, journal=journal)
    again._session = None  # a measurement would fail
    assert (again.step_error(planned), again.fidelity(planned)) == wanted
    with pytest.raises(AttributeError):
        again.step_error({name: with_token_scales(plan) for name, plan in planned.items()})
    other = Trial(TorchModel(tiny_checkpoint), PROMPTS, seed=1, journal=journal)
    assert "begins anew" in caplog.text and other.fidelity(planned) != wanted[1]
