"""The recipes of a build, one per stage: the denoiser's, which families list, and those of the other networks.

The other networks are shared by families, so their recipes are listed here, by the network's class in the checkpoint.
In a VAE's decoder nearly all arithmetic is in convolutions. Kept in high precision are the first one, which reads the
latents, the last, whose error goes directly into the picture, and the depthwise and grouped ones, which are little work
and not worth it (SANA-Video, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping

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
from ditc.runtime.spec import DENOISER, VAE_DECODER

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


NETWORK_RECIPES: Mapping[str, Recipe] = {
    **_decoder_recipes("dc-ae", "AutoencoderDC", (*FIRST_AND_LAST, *DEPTHWISE)),
    **_decoder_recipes("autoencoder-kl", "AutoencoderKL", FIRST_AND_LAST),
}


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
        if recipe.stage in recipes:
            raise UsageError(
                f"recipes {recipes[recipe.stage].name} and {recipe.name} are both for {recipe.stage}",
                hint="give one --recipe per stage",
            )
        _check_network(recipe, checkpoint, plan)
        recipes[recipe.stage] = recipe
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


def _check_network(recipe: Recipe, checkpoint: Checkpoint, plan: ModelPlan) -> None:
    if recipe.stage not in plan.stages:
        raise UsageError(
            f"recipe {recipe.name} is for {recipe.stage}, which this checkpoint does not have",
            hint=f"it has {', '.join(plan.stages)}",
        )
    component = plan.stages[recipe.stage].components[0]
    found = checkpoint.component(component).class_name
    if recipe.network is not None and found != recipe.network:
        fitting = [r.name for r in NETWORK_RECIPES.values() if (r.stage, r.network) == (recipe.stage, found)]
        raise UsageError(
            f"recipe {recipe.name} is for {recipe.network}, but this checkpoint's {component} is {found}",
            hint=f"use {' or '.join(fitting)}" if fitting else f"there is none for {found}: leave it out",
        )
