"""The recipes of a build, one per stage: the denoiser's, which families list, and those of the other networks.

The other networks are shared by families, so their recipes are listed here, by the network's class in the checkpoint.
In a VAE's decoder nearly all arithmetic is in convolutions. Kept in high precision are the first one, which reads the
latents, the last, whose error goes directly into the picture, and the depthwise and grouped ones, which are little work
and not worth it (SANA-Video, section 5).

A text encoder has two recipes, which need no ranges. NETWORK-int8-weights stores its Linears' weights in 8 bits, one
scale per output channel, and computes as before. NETWORK-int8-dynamic also quantizes their inputs, one scale per token,
except those of the last Linear of an MLP: in released language models a few of its input channels are a thousand times
larger than all others (massive activations, arXiv 2402.17762; transformers keeps T5's `wo` in fp32 for that reason).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.quant.formats import Format
from ditc.export.quant.recipes import (
    Recipe,
    Rule,
    default_recipe,
    find_recipe,
    load_named,
    own_recipe,
    recipes_of,
)
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import DENOISER, TEXT_ENCODER, VAE_DECODER

FIRST_AND_LAST = (
    Rule(layers="decoder.conv_in", why="first convolution: it reads the latents themselves"),
    Rule(layers="decoder.conv_out*", why="last convolution: its error goes directly into the picture"),
)
DEPTHWISE = (
    Rule(layers="*.conv_depth", why="depthwise convolution: it is little work, and it is sensitive"),
    Rule(layers="*.to_qkv_multiscale.*", why="depthwise and grouped convolutions: they are little work"),
)


def _decoder_recipes(name: str, network: str, kept: tuple[Rule, ...]) -> dict[str, Recipe]:
    """INT8 and FP8 recipes of a VAE's decoder, by name: every layer but those that are kept in high precision."""
    recipes = {}
    for kind in Format:
        rules = (*kept, Rule(layers="decoder.*", kind=kind))
        full = f"{name}-{kind.value}"
        recipes[full] = Recipe(name=full, rules=rules, smooth=False, stage=VAE_DECODER, network=network)
    return recipes


def _text_recipes(name: str, network: str, layers: tuple[str, ...], last: str) -> dict[str, Recipe]:
    """The two INT8 recipes of a text encoder, by name.

    Args:
        layers: patterns of its Linears.
        last: pattern of the last Linear of an MLP.
    """
    common = {"smooth": False, "stage": TEXT_ENCODER, "network": network}
    weights = Recipe(
        name=f"{name}-int8-weights",
        rules=tuple(Rule(layers=pattern, kind=Format.INT8) for pattern in layers),
        activations=False,
        **common,  # type: ignore[arg-type]
    )
    high = Rule(layers=last, why="last Linear of an MLP: few input channels are far larger than the others")
    dynamic = tuple(Rule(layers=pattern, kind=Format.INT8, per_token=True) for pattern in layers)
    inputs_too = Recipe(name=f"{name}-int8-dynamic", rules=(high, *dynamic), **common)  # type: ignore[arg-type]
    return {recipe.name: recipe for recipe in (weights, inputs_too)}


NETWORK_RECIPES: Mapping[str, Recipe] = {
    **_decoder_recipes("dc-ae", "AutoencoderDC", (*FIRST_AND_LAST, *DEPTHWISE)),
    **_decoder_recipes("autoencoder-kl", "AutoencoderKL", FIRST_AND_LAST),
    **_text_recipes("gemma2", "Gemma2Model", ("*_proj",), "*.down_proj"),
    **_text_recipes("t5", "T5EncoderModel", ("encoder.block.*",), "*.wo"),
    **_text_recipes("clip", "CLIPTextModelWithProjection", ("*.self_attn.*", "*.mlp.*"), "*.fc2"),
}
# Classes that hold the same network, with a head that no stage runs.
WITHOUT_HEAD = {"Gemma2ForCausalLM": "Gemma2Model"}


def recipe_of_network(network: str, kind: Format) -> Recipe:
    """The recipe of a network of this class in this format. Raises UsageError if there is none."""
    for recipe in NETWORK_RECIPES.values():
        if recipe.network == network and recipe.precision.value == kind.value:
            return recipe
    networks = dict.fromkeys(recipe.network for recipe in NETWORK_RECIPES.values() if recipe.network)
    raise UsageError(
        f"there is no {kind.value} recipe for {network}", hint=f"there are recipes for {', '.join(networks)}"
    )


def find_recipes(options: BuildOptions, checkpoint: Checkpoint, plan: ModelPlan) -> dict[str, Recipe]:
    """The recipe of every stage that the options put into 8 bits, by the stage's name.

    Raises:
        UsageError: a recipe is unknown, or two are for one stage, or one is for a stage or network that the checkpoint
            does not have, or the denoiser's contradicts its precision.
    """
    known = {**recipes_of(plan.family), **NETWORK_RECIPES}
    recipes: dict[str, Recipe] = {}
    for name in options.recipes:
        recipe = load_named(name, known)
        for stage in _stages(recipe, checkpoint, plan):
            if stage in recipes:
                raise UsageError(
                    f"recipes {recipes[stage].name} and {recipe.name} are both for {stage}",
                    hint="give one --recipe per stage",
                )
            recipes[stage] = replace(recipe, stage=stage)
    if options.quantized:
        given = next((n for n in options.recipes if load_named(n, known).stage == DENOISER), None)
        own = own_recipe(checkpoint.path, options.precision)
        usual = own or default_recipe(plan.recipes or plan.family, options.precision)
        recipes[DENOISER] = find_recipe(given or usual, options.precision, plan.family)
    elif DENOISER in recipes:
        raise UsageError(
            f"--recipe {recipes[DENOISER].name} belongs to an 8-bit build, but this one is {options.precision.value}",
            hint="add --precision int8 or --precision fp8",
        )
    return recipes


def _stages(recipe: Recipe, checkpoint: Checkpoint, plan: ModelPlan) -> list[str]:
    """The stages that the recipe is for: one, or every text encoder of the recipe's network.

    Raises:
        UsageError: the checkpoint has no such stage, or its network is another one.
    """

    def network(stage: str) -> str:
        found = checkpoint.component(plan.stages[stage].components[0]).class_name
        return WITHOUT_HEAD.get(found, found)

    # Encoders are numbered (text_encoder, text_encoder_2), and which of them is a CLIP depends on the family.
    kind = recipe.stage if recipe.network is not None and recipe.stage == TEXT_ENCODER else None
    stages = [name for name in plan.stages if (name.startswith(kind) if kind else name == recipe.stage)]
    if not stages:
        raise UsageError(
            f"recipe {recipe.name} is for {recipe.stage}, which this checkpoint does not have",
            hint=f"it has {', '.join(plan.stages)}",
        )
    fitting = [stage for stage in stages if recipe.network in (None, network(stage))]
    if not fitting:
        networks = list(dict.fromkeys(map(network, stages)))
        names = [
            r.name for r in NETWORK_RECIPES.values() if (r.stage == recipe.stage and r.network in networks)
        ]
        found = " and ".join(networks)
        component = plan.stages[stages[0]].components[0]
        raise UsageError(
            f"recipe {recipe.name} is for {recipe.network}, but this checkpoint's {component} is {found}",
            hint=f"use {' or '.join(names)}" if names else f"there is none for {found}: leave it out",
        )
    return fitting
