"""Recipes: named rules over module names that say which layers become 8 bits. The build then decides ranges and scales.

Each family lists its layers in its `recipe.py`. This module says what a recipe is, how one is found, and which rules
families share. Those rules keep these layers in high precision, for which the sources are:
    modulation, time and text embedding, patch embedding, final layer   FP8 on every Linear gives noise, but not if
        these are left out (vllm-omni #2728); NVIDIA's diffusers presets exclude them too
    norms, linear attention                                             SANA, arXiv 2410.10629 section 4
    depthwise convolution                                               SANA-Video section 5; nunchaku's Sana
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ditc.export.families import family_of
from ditc.export.quant.estimators import Method
from ditc.export.quant.formats import Format
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import Mismatch, check_numbers, from_json, to_json
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import CONTROLNET, DENOISER, Precision

NO_RULE = "no rule of the recipe names it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A pattern over module paths, and what happens to the layers that it matches.

    Attributes:
        layers: an fnmatch pattern, in which * also matches dots.
        kind: the layers' format; None keeps them in high precision.
        per_token: give every token's input a scale of its own: its largest magnitude is measured when the graph runs.
            This costs two passes over the input, and needs no range.
        why: the reason, which a build reports.
    """

    layers: str
    kind: Format | None = None
    per_token: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The first rule that matches a layer decides. A layer that no rule matches stays in high precision.

    Attributes:
        activations: whether inputs are quantized too, or only weights.
        method, percentile, timesteps: how a range is estimated, see estimators.estimate_amax.
        smooth: move outliers from activations into weights where that is worth it (SmoothQuant, arXiv 2211.10438).
            The strength is chosen for each input. INT8 only: FP8's relative error does not depend on the scale.
        budget: the fidelity budget of the search that wrote the recipe, such as "psnr=40,worst=32". Parity checks
            builds against it.
        stage: the stage whose layers the rules name.
        network: the class of the stage's network in the checkpoint; None for any network.
    """

    name: str
    rules: tuple[Rule, ...]
    activations: bool = True
    method: Method = Method.MSE
    percentile: float = 99.99
    timesteps: float = 100.0
    smooth: bool = True
    budget: str | None = None
    stage: str = DENOISER
    network: str | None = None

    @property
    def precision(self) -> Precision:
        """The precision of a stage with this recipe: FP8 if any layer is, because fewer targets have it."""
        kinds = {rule.kind for rule in self.rules}
        eight = Precision.INT8_DYNAMIC if self.activations and not self.needs_ranges else Precision.INT8
        return Precision.FP8 if Format.FP8 in kinds else eight

    @property
    def needs_ranges(self) -> bool:
        """Whether the scale of any input comes from calibrated ranges."""
        return self.activations and any(rule.kind is not None and not rule.per_token for rule in self.rules)

    def decide(self, layer: str) -> Rule:
        """The rule that decides for the layer."""
        return next(
            (rule for rule in self.rules if fnmatchcase(layer, rule.layers)), Rule(layers="*", why=NO_RULE)
        )

    def formats(self, layers: Iterable[str]) -> dict[str, Format]:
        """The layers that become 8 bits, with their formats."""
        kinds = {layer: self.decide(layer).kind for layer in layers}
        return {layer: kind for layer, kind in kinds.items() if kind is not None}


NEVER_QUANTIZED = (
    Rule(layers="*time_embed*", why="time embedding and adaLN modulation: every layer depends on them"),
    Rule(layers="*guidance_embed*", why="guidance embedding: every layer depends on it"),
    Rule(layers="*patch_embed*", why="patch embedding: it reads the latents themselves"),
    Rule(layers="*caption_projection*", why="text embedding: it runs only once per prompt"),
    Rule(layers="proj_out", why="final layer: its error goes directly into the picture"),
    Rule(layers="*conv_depth", why="depthwise convolution: it is not a GEMM, and it is sensitive"),
)
ENDS_OF_CONTROLNET = (
    Rule(
        layers="controlnet_blocks.*",
        why="last layers of a ControlNet: their error goes into the denoiser's tokens",
    ),
    Rule(layers="input_block", why="first layer of a ControlNet: it reads the control picture"),
    Rule(layers="pos_embed_input.*", why="first layer of a ControlNet: it reads the control picture"),
)
# The layers that spoil a joint-attention transformer if they are in FP8 (vllm-omni #2728 and #2795).
NEVER_QUANTIZED_JOINT = (
    Rule(layers="*time_text_embed*", why="time and pooled text embedding: every layer depends on it"),
    Rule(layers="pos_embed.proj", why="patch embedding: it reads the latents themselves"),
    Rule(layers="*context_embedder", why="text embedding: every block depends on it"),
    Rule(layers="*norm1.linear", why="adaLN modulation: it scales every token"),
    Rule(layers="*norm1_context.linear", why="adaLN modulation: it scales every token"),
    Rule(layers="norm_out.linear", why="final modulation: its error goes directly into the picture"),
)


def int8_and_fp8(
    family: str, layers: tuple[str, ...], *, kept_high_precision: tuple[Rule, ...]
) -> dict[str, Recipe]:
    """A family's INT8 and FP8 recipes by name. Both quantize the same layers.

    Args:
        layers: patterns of the layers that become 8 bits.
        kept_high_precision: rules for layers that stay in high precision, which come before the patterns.
    """
    recipes = {}
    for kind in Format:
        rules = (*kept_high_precision, *(Rule(layers=pattern, kind=kind) for pattern in layers))
        name = f"{family}-{kind.value}"
        recipes[name] = Recipe(name=name, rules=rules, smooth=kind is Format.INT8)
    return recipes


def controlnet_recipes(
    family: str, network: str, layers: tuple[str, ...], *, kept_high_precision: tuple[Rule, ...]
) -> dict[str, Recipe]:
    """The recipes of a family's ControlNet by name: FAMILY-controlnet-int8, -fp8 and -int8-dynamic.

    They quantize the same layers of its blocks as the family's own recipes do of the transformer's.

    Args:
        network: the class of the ControlNet in the checkpoint.
        layers, kept_high_precision: as of `int8_and_fp8`.
    """
    name = f"{family}-controlnet"
    of_transformer = int8_and_fp8(
        name, layers, kept_high_precision=(*ENDS_OF_CONTROLNET, *kept_high_precision)
    )
    recipes = {
        name: replace(recipe, stage=CONTROLNET, network=network) for name, recipe in of_transformer.items()
    }
    per_token = replace(dynamic(recipes[f"{name}-int8"]), name=f"{name}-int8-dynamic")
    return {**recipes, per_token.name: per_token}


def recipes_of(family: str) -> dict[str, Recipe]:
    """The family's recipes by name: its own, and for each format one that quantizes only the same layers' weights."""
    own = dict(family_of(family).recipes)
    alone = [
        replace(own[name], name=f"{kind.value}-weight-only", activations=False, smooth=False)
        for kind in Format
        if (name := f"{family}-{kind.value}") in own
    ]
    return own | {recipe.name: recipe for recipe in alone}


def default_recipe(family: str, precision: Precision) -> str:
    """Name of the recipe that a family's build takes by default in that precision."""
    return f"{family}-{format_of(precision).value}"


def format_of(precision: Precision) -> Format:
    """The format of the layers of an 8-bit precision."""
    return Format.FP8 if precision is Precision.FP8 else Format.INT8


def dynamic(recipe: Recipe) -> Recipe:
    """The recipe with a scale of its own for every token: the same layers in 8 bits, and no ranges.

    Raises:
        UsageError: the recipe quantizes only weights.
    """
    if not recipe.activations:
        raise UsageError(
            f"recipe {recipe.name} leaves activations as they are, but {Precision.INT8_DYNAMIC.value} quantizes them",
            hint=f"leave --recipe out, or build it with --precision {Precision.INT8.value}",
        )
    rules = tuple(replace(rule, per_token=rule.kind is not None) for rule in recipe.rules)
    return replace(recipe, rules=rules, smooth=False)


def find_recipe(name: str | None, precision: Precision, family: str) -> Recipe:
    """Find a denoiser's recipe by name, or read it from a .json file as the search writes it.

    Args:
        name: None for the family's default.
        family: a label of the table in families/.

    Raises:
        UsageError: the name is unknown, the file is not a recipe, or the recipe does not fit the precision.
    """
    default = default_recipe(family, precision)
    known = {name: recipe for name, recipe in recipes_of(family).items() if recipe.stage == DENOISER}
    recipe = load_named(default if name is None else name, known)
    kinds = {rule.kind.value for rule in recipe.rules if rule.kind is not None}
    if precision is not Precision.FP8 and Format.FP8.value in kinds:
        raise UsageError(
            f"recipe {recipe.name} has FP8 layers, but an {precision.value} build also serves targets without FP8",
            hint="build it with --precision fp8",
        )
    if format_of(precision).value not in kinds:
        raise UsageError(
            f"recipe {recipe.name} has no {format_of(precision).value} layer",
            hint=f"the default is {default}",
        )
    return dynamic(recipe) if precision is Precision.INT8_DYNAMIC else recipe


def load_named(name: str, known: Mapping[str, Recipe]) -> Recipe:
    """The recipe of this name, or in this .json file. Raises UsageError if there is none."""
    recipe = load_recipe(Path(name)) if name.endswith(".json") else known.get(name)
    if recipe is None:
        raise UsageError(
            f"recipe {name!r} is unknown",
            hint=f"choose one of {', '.join(known)}, or a .json file from ditc calibrate --budget",
        )
    return recipe


def own_recipe(checkpoint: Path, precision: Precision) -> str | None:
    """The checkpoint's own recipe for this precision: recipe.PRECISION.json in its folder. None if there is none."""
    path = checkpoint / f"recipe.{precision.value}.json"
    return str(path) if path.is_file() else None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from its JSON file. Raises UsageError if the file is missing or is not a recipe."""
    try:
        data = json.loads(path.read_bytes())
        check_numbers(data)
        recipe = from_json(Recipe, data)
        if not 0 < recipe.percentile <= 100:
            raise Mismatch(f"$.percentile: {recipe.percentile} is not between 0 and 100")
        return recipe
    except (OSError, ValueError, RecursionError) as e:  # Mismatch is a ValueError
        raise UsageError(f"{path} is not a recipe: {e}", hint="ditc calibrate --budget ... writes one") from e


def save_recipe(recipe: Recipe, path: Path) -> Path:
    """Write the recipe as JSON; the file appears complete or not at all."""
    return write_atomic(path, json.dumps(to_json(recipe), indent=1) + "\n")
