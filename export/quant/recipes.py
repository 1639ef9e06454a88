"""Recipes: named rules over module names that say what becomes 8 bits. Formats, ranges and scales follow at build.

Each family states its layers in its `recipe.py`; here is what a recipe is, how one is found, and the rules that
families share. What those rules keep in high precision, and who found that out:
    modulation, time and text embedding, patch embed, final layer   FP8 on every Linear gives noise, without these
        it does not (vllm-omni #2728); NVIDIA's diffusers presets exclude them too
    norms, linear attention                                         SANA, arXiv 2410.10629 section 4
    depthwise convolution                                           SANA-Video section 5; nunchaku's Sana
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ditc.export.families import family_of
from ditc.export.quant.estimators import Method
from ditc.export.quant.formats import Format
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import Mismatch, from_json, to_json
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import Precision

NO_RULE = "no rule of the recipe names it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Layers by a pattern over module paths (fnmatch: * crosses dots), and their format; None keeps them high."""

    layers: str
    kind: Format | None = None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The first rule that names a layer decides; a layer that no rule names stays high.

    Attributes:
        activations: False quantizes weights alone.
        method, percentile, timesteps: how a range is estimated, see estimators.estimate_amax.
        smooth: move outliers from activations into weights where that is worth it (SmoothQuant, arXiv 2211.10438);
            the strength is chosen for each layer. INT8 only: the relative error of FP8 does not depend on scale.
        budget: what the search that wrote the recipe kept to, psnr=DB or rel_l2=SHARE; parity holds builds to it.
    """

    name: str
    rules: tuple[Rule, ...]
    activations: bool = True
    method: Method = Method.MSE
    percentile: float = 99.99
    timesteps: float = 100.0
    smooth: bool = True
    budget: str | None = None

    def decide(self, layer: str) -> Rule:
        """The rule for the layer."""
        return next(
            (rule for rule in self.rules if fnmatchcase(layer, rule.layers)), Rule(layers="*", why=NO_RULE)
        )

    def formats(self, layers: Iterable[str]) -> dict[str, Format]:
        """The layers that become 8 bits, and in which format."""
        kinds = {layer: self.decide(layer).kind for layer in layers}
        return {layer: kind for layer, kind in kinds.items() if kind is not None}


NEVER = (
    Rule(layers="*time_embed*", why="time embedding and adaLN modulation: every layer depends on them"),
    Rule(layers="*guidance_embed*", why="guidance embedding: every layer depends on it"),
    Rule(layers="*patch_embed*", why="patch embedding: sees the latents themselves"),
    Rule(layers="*caption_projection*", why="text embedding: runs once a prompt"),
    Rule(layers="proj_out", why="final layer: its error is the picture's"),
    Rule(layers="*conv_depth", why="depthwise convolution: no GEMM, and sensitive"),
)
# What FP8 on every Linear spoils in a joint-attention transformer (vllm-omni #2728 and #2795).
NEVER_JOINT = (
    Rule(layers="*time_text_embed*", why="time and pooled text embedding: every layer depends on it"),
    Rule(layers="pos_embed.proj", why="patch embedding: sees the latents themselves"),
    Rule(layers="*context_embedder", why="text embedding: every block depends on it"),
    Rule(layers="*norm1.linear", why="adaLN modulation: scales every token"),
    Rule(layers="*norm1_context.linear", why="adaLN modulation: scales every token"),
    Rule(layers="norm_out.linear", why="final modulation: its error is the picture's"),
)


def int8_and_fp8(family: str, layers: tuple[str, ...], *, high: tuple[Rule, ...]) -> dict[str, Recipe]:
    """A family's two recipes by name, with the same layers in 8 bits.

    Args:
        layers: patterns of what becomes 8 bits.
        high: rules that are asked first, of what stays in high precision.
    """
    recipes = {}
    for kind in Format:
        rules = (*high, *(Rule(layers=pattern, kind=kind) for pattern in layers))
        name = f"{family}-{kind.value}"
        recipes[name] = Recipe(name=name, rules=rules, smooth=kind is Format.INT8)
    return recipes


def recipes_of(family: str) -> dict[str, Recipe]:
    """The family's recipes by name: its own, and for each format the one that quantizes the same weights alone."""
    own = dict(family_of(family).recipes)
    alone = [
        replace(own[name], name=f"{kind.value}-weight-only", activations=False, smooth=False)
        for kind in Format
        if (name := f"{family}-{kind.value}") in own
    ]
    return own | {recipe.name: recipe for recipe in alone}


def default_recipe(family: str, precision: Precision) -> str:
    """The name of the recipe for a family's networks."""
    return f"{family}-{precision.value}"


def find_recipe(name: str | None, precision: Precision, family: str) -> Recipe:
    """A recipe by name, or from a .json file as the search writes it; None is the family's default.

    Args:
        family: a label of the table in families/.

    Raises:
        UsageError: an unknown name, a file that is not a recipe, or one without a layer in that precision's format.
    """
    default, known = default_recipe(family, precision), recipes_of(family)
    name = default if name is None else name
    recipe = load_recipe(Path(name)) if name.endswith(".json") else known.get(name)
    if recipe is None:
        raise UsageError(
            f"recipe {name!r} is unknown",
            hint=f"take one of {', '.join(known)}, or a .json that the search wrote",
        )
    kinds = {rule.kind.value for rule in recipe.rules if rule.kind is not None}
    if precision is Precision.INT8 and Format.FP8.value in kinds:
        raise UsageError(
            f"recipe {recipe.name} has FP8 layers, which INT8 targets lack",
            hint="build it with --precision fp8",
        )
    if precision.value not in kinds:
        raise UsageError(
            f"recipe {recipe.name} has no {precision.value} layer",
            hint=f"the default is {default}",
        )
    return recipe


def load_recipe(path: Path) -> Recipe:
    """A recipe from its JSON form. Raises UsageError."""
    try:
        return from_json(Recipe, json.loads(path.read_bytes()))
    except (OSError, ValueError, Mismatch) as e:
        raise UsageError(f"{path} is no recipe: {e}", hint="ditc calibrate --budget ... writes one") from e


def save_recipe(recipe: Recipe, path: Path) -> Path:
    """Write the recipe in its JSON form."""
    return write_atomic(path, json.dumps(to_json(recipe), indent=1) + "\n")
