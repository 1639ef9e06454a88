"""Recipes name the right layers, and a plan chooses the ranges and the smoothing that lose least."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from quant_helpers import ORIGIN, signal_to_noise_db, statistics
from torch import nn

from ditc.calib.sensitivity import base_recipe
from ditc.export.families.sana.recipe import RECIPES
from ditc.export.quant.formats import Format, channel_amax, fake_quantize, scale_of
from ditc.export.quant.layers import Layer
from ditc.export.quant.plan import choose_input, make_plan
from ditc.export.quant.ranges import Ranges
from ditc.export.quant.recipes import (
    NO_RULE,
    Recipe,
    Rule,
    find_recipe,
    load_recipe,
    own_recipe,
    recipes_of,
    save_recipe,
)
from ditc.export.quant.simulate import quantized
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import Precision

BLOCK = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.conv_inverted",
    "ff.conv_depth",
    "ff.conv_point",
)
OTHERS = (
    "patch_embed.proj",
    "time_embed.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2",
    "time_embed.linear",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
    "proj_out",
)
SANA = (*OTHERS, *(f"transformer_blocks.{i}.{layer}" for i in (0, 11) for layer in BLOCK))
KEPT = {"attn2.to_k", "attn2.to_v", "ff.conv_depth"}
# Each recipe quantizes all GEMMs of a Sana block except cross-attention's K and V.
EXPECTED = [f"transformer_blocks.{i}.{layer}" for i in (0, 11) for layer in BLOCK if layer not in KEPT]


# Layer names of an SD3 network, and of both kinds of lucidrains trunk.
SD3_BLOCK = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
SD3_OTHERS = (
    *("pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.{a}_embedder.linear_{b}" for a in ("timestep", "text") for b in (1, 2)),
    *(f"transformer_blocks.{i}.{norm}.linear" for i in (0, 23) for norm in ("norm1", "norm1_context")),
)
MMDIT_BLOCK = (
    *("joint_attn.to_qkv.0", "joint_attn.to_qkv.1", "joint_attn.to_out.0", "joint_attn.to_out.1"),
    *(
        "image_ff.ff.0.0",
        "image_ff.ff.2",
        "text_ff.ff.0.proj",
        "feedforwards.1.ff.0.0",
        "feedforwards.1.ff.2",
    ),
)
MMDIT_OTHERS = (
    *("patch_embed.proj", "time_embed.linear_1", "time_embed.linear_2", "context_embedder", "proj_out"),
    *("trunk.blocks.0.to_cond.2", "trunk.blocks.0.to_post_branch_gammas.2", "trunk.pool.to_attn_logits"),
    *("trunk.blocks.1.attn_layernorms.0.to_cond.2", "trunk.blocks.1.ff_layernorms.1.to_cond.2"),
)
JOINT = {
    "sd3": (SD3_OTHERS, [f"transformer_blocks.{i}.{layer}" for i in (0, 23) for layer in SD3_BLOCK]),
    "mmdit": (MMDIT_OTHERS, [f"trunk.blocks.{i}.{layer}" for i in (0, 1) for layer in MMDIT_BLOCK]),
}


@pytest.mark.parametrize("kind", list(Format))
@pytest.mark.parametrize("family", JOINT)
def test_recipes_of_joint_attention_quantize_the_layers_that_are_listed_here(family, kind):
    others, expected = JOINT[family]
    recipe = find_recipe(None, Precision(kind.value), family)
    assert recipe.name == f"{family}-{kind.value}" and recipe.activations
    assert recipe.formats([*others, *expected]) == dict.fromkeys(expected, kind)
    assert all(recipe.decide(layer).why not in ("", NO_RULE) for layer in others)
    alone = find_recipe(f"{kind.value}-weight-only", Precision(kind.value), family)
    assert not alone.activations and alone.formats([*others, *expected]) == dict.fromkeys(expected, kind)


@pytest.mark.parametrize("family", ["sana", *JOINT])
def test_a_search_starts_from_the_recipe_of_the_family(family):
    expected = EXPECTED if family == "sana" else JOINT[family][1]
    for kind in Format:
        base = base_recipe(kind, family)
        assert base.name == f"{family}-{kind.value}"
        assert base.formats(expected) == dict.fromkeys(expected, kind)


def test_a_recipe_of_another_family_is_unknown_and_the_hint_lists_the_familys_own():
    with pytest.raises(UsageError, match="'sd3-int8' is unknown") as caught:
        find_recipe("sd3-int8", Precision.INT8, "sana")
    names = (
        "sana-int8",
        "sana-fp8",
        "sana-sprint-int8",
        "sana-sprint-fp8",
        "sana-video-int8",
        "sana-video-fp8",
        "int8-weight-only",
        "fp8-weight-only",
    )
    assert f"choose one of {', '.join(names)}, or a .json file" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "kind", "activations"),
    [
        ("sana-int8", Format.INT8, True),
        ("sana-fp8", Format.FP8, True),
        ("int8-weight-only", Format.INT8, False),
        ("fp8-weight-only", Format.FP8, False),
    ],
)
def test_each_recipe_quantizes_the_layers_that_are_listed_here(name, kind, activations):
    recipe = find_recipe(name, Precision(kind.value), "sana")
    assert recipe.formats(SANA) == dict.fromkeys(EXPECTED, kind)
    assert recipe.activations is activations
    assert all(recipe.decide(layer).why for layer in SANA if layer not in EXPECTED)


def test_the_default_recipe_is_found_and_recipes_that_do_not_fit_are_refused():
    assert find_recipe(None, Precision.INT8, "sana").name == "sana-int8"
    with pytest.raises(UsageError, match="unknown"):
        find_recipe("sana-int4", Precision.INT8, "sana")
    with pytest.raises(UsageError, match="has no fp8 layer"):
        find_recipe("sana-int8", Precision.FP8, "sana")
    with pytest.raises(UsageError, match="has FP8 layers"):
        find_recipe("sana-fp8", Precision.INT8, "sana")


def test_a_recipe_is_the_same_after_its_file_and_a_bad_file_is_refused(tmp_path):
    recipe = RECIPES["sana-int8"]
    assert load_recipe(save_recipe(recipe, tmp_path / "r.json")) == recipe
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(UsageError, match="is not a recipe"):
        load_recipe(tmp_path / "bad.json")


def test_a_checkpoint_may_bring_its_own_recipe_for_one_precision(tmp_path):
    assert own_recipe(tmp_path, Precision.INT8) is None
    save_recipe(RECIPES["sana-int8"], tmp_path / "recipe.int8.json")
    assert own_recipe(tmp_path, Precision.INT8) == str(tmp_path / "recipe.int8.json")
    assert own_recipe(tmp_path, Precision.FP8) is None


def linear(weight: np.ndarray, name: str = "transformer_blocks.0.attn1.to_q") -> dict[str, Layer]:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    return {name: Layer(name, name, module)}


def ranges_for(layers: dict[str, Layer], x: np.ndarray) -> Ranges:
    origin = replace(ORIGIN, buckets=1)
    names = list(layers)
    return Ranges(
        origin=origin, sites={names[0]: statistics(x)}, site_of=dict.fromkeys(names, names[0]), prompts=()
    )


@pytest.fixture(scope="module")
def outlier_channel() -> tuple[np.ndarray, np.ndarray]:
    """Inputs with one channel a hundred times as large, and weights of the same size for all channels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 32)).astype(np.float32)
    x[:, 5] *= 100
    return x, rng.standard_normal((16, 32)).astype(np.float32)


def snr_of(plan, x, weight):
    smooth = 1.0 if plan.smooth is None else plan.smooth
    quantized_x = fake_quantize(x / smooth, scale_of(plan.amax, Format.INT8), Format.INT8)
    scaled = weight * smooth
    quantized_w = fake_quantize(scaled, scale_of(channel_amax(scaled, 0), Format.INT8), Format.INT8)
    return signal_to_noise_db(quantized_x @ quantized_w.T, x @ weight.T)


def test_smoothing_is_chosen_for_an_outlier_channel_and_helps(outlier_channel):
    x, weight = outlier_channel
    smooth = choose_input(RECIPES["sana-int8"], statistics(x), [weight], Format.INT8)
    plain = choose_input(replace(RECIPES["sana-int8"], smooth=False), statistics(x), [weight], Format.INT8)
    assert smooth.alpha > 0 and plain.smooth is None
    # Measured on the signal of the other channels, because the outlier's own would hide it.
    others = x.copy()
    others[:, 5] = 0
    assert snr_of(smooth, others, weight) > snr_of(plain, others, weight) + 6


def test_channels_of_equal_size_are_not_smoothed():
    rng = np.random.default_rng(0)
    x, weight = (rng.uniform(-1, 1, (rows, 32)).astype(np.float32) for rows in (500, 400))
    x[0], weight[0] = 1, 1  # every channel of both has the same amax
    assert choose_input(RECIPES["sana-int8"], statistics(x), [weight], Format.INT8).smooth is None


def test_an_input_that_was_always_zero_is_refused():
    layers = linear(np.ones((4, 8), np.float32))
    with pytest.raises(UsageError, match="was zero in every step"):
        make_plan(RECIPES["sana-int8"], ranges_for(layers, np.zeros((3, 8), np.float32)), layers)


def test_ranges_of_a_narrower_network_are_refused():
    layers = linear(np.ones((4, 8), np.float32))
    with pytest.raises(UsageError, match="6 channels"):
        make_plan(RECIPES["sana-int8"], ranges_for(layers, np.ones((3, 6), np.float32)), layers)


def test_quantized_activations_need_ranges_and_quantized_weights_do_not():
    layers = linear(np.ones((4, 8), np.float32))
    with pytest.raises(UsageError, match="needs ranges"):
        make_plan(RECIPES["sana-int8"], None, layers)
    assert (
        next(iter(make_plan(recipes_of("sana")["int8-weight-only"], None, layers).layers.values())).input
        is None
    )


def test_a_recipe_for_another_network_is_refused():
    layers = linear(np.ones((4, 8), np.float32), name="layers.0.mlp.up")
    with pytest.raises(UsageError, match="names none of this network's 1 layers"):
        make_plan(recipes_of("sana")["int8-weight-only"], None, layers)


def test_a_token_with_large_values_does_not_cost_the_others_their_resolution():
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    values[3], values[4] = values[3] * 1000, 0
    linear = nn.Linear(32, 16, bias=False)
    layers = {"x": Layer("x", "x", linear)}
    ranges = Ranges(origin=ORIGIN, sites={"x": statistics(values, values)}, site_of={"x": "x"}, prompts=())
    rule = Rule(layers="x", kind=Format.INT8)
    exact = linear(torch.from_numpy(values)).detach().numpy()
    others = np.delete(np.arange(64), 3)
    found = {}
    for per_token in (False, True):
        recipe = Recipe(name="one", rules=(replace(rule, per_token=per_token),))
        with quantized(layers, make_plan(recipe, ranges, layers).layers):
            got = linear(torch.from_numpy(values)).detach().numpy()
        found[per_token] = signal_to_noise_db(got[others], exact[others])
    assert found[False] < 10 and found[True] > 35
