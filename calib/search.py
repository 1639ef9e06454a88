"""Search for the assignment of formats to layers that has the most FLOPs in 8 bits and keeps pictures within a budget.

A layer in 8 bits has one scale for its whole input, which is the fastest, or a scale for each token; else it stays in
high precision. Errors of independent roundings add in squares, so layers are sorted by squared step errors, and drawing
pictures shows where to cut:

1. With a scale for each token in all layers, those with the largest error per FLOP stay in high precision, as many as
   the budget asks for. Some of them are tried in 8 bits again, one by one, those with the smallest errors first.
2. Of the layers in 8 bits, those that gain most by a scale for each token have one, as many as the budget asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ditc.calib.sensitivity import Effect, as_recipe
from ditc.calib.trial import Fidelity, Trial
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import LayerPlan, with_token_scales
from ditc.export.quant.recipes import Recipe
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.errors import UsageError

CURVE_POINTS = 5
# The search asks its own pictures for 3 dB more than the budget, so that others keep it too: the mean PSNR of 16
# pictures of the demo model has a standard error of 2 dB.
MARGIN_DB = 3.0
RETRIES = 6  # layers behind the cut that are tried in 8 bits again
Plans = Mapping[Format, Mapping[str, LayerPlan]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What pictures may lose. A limit that is None is not checked.

    Attributes:
        psnr: the least mean PSNR of the pictures in dB.
        worst: the least PSNR of any picture in dB.
        rel_l2: the largest relative L2 error of the final latents.
    """

    psnr: float | None = None
    worst: float | None = None
    rel_l2: float | None = None

    def __str__(self) -> str:
        limits = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ",".join(f"{name}={limit:g}" for name, limit in limits if limit is not None)

    def allows(self, fidelity: Fidelity, *, margin_db: float = 0.0) -> bool:
        """Whether the pictures are within the budget, with this much to spare."""
        return (
            (self.psnr is None or fidelity.psnr_db >= self.psnr + margin_db)
            and (self.worst is None or fidelity.worst_db >= self.worst + margin_db)
            and (self.rel_l2 is None or fidelity.rel_l2 <= self.rel_l2 * 10 ** (-margin_db / 20))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One assignment: the number of layers in 8 bits, their share of all GEMM FLOPs, and the fidelity of pictures.

    Attributes:
        per_token: how many of the layers have a scale for each token.
    """

    layers: int
    per_token: int
    share: float
    fidelity: Fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the search found. `curve` has all assignments that were tried, from no layer in 8 bits to all of them."""

    budget: str
    chosen: Point
    effects: tuple[Effect, ...]
    curve: tuple[Point, ...]
    recipe: Recipe


def parse_budget(text: str) -> Budget:
    """Parse a budget such as "psnr=40,worst=32" (dB) or "rel_l2=0.05".

    Raises:
        UsageError: a part of the text is none of these, is there twice, or has a number that is not positive.
    """
    limits: dict[str, float] = {}
    names = [field.name for field in fields(Budget)]
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = float("nan")
        if name not in names or name in limits or not 0 < limit < float("inf"):
            raise UsageError(
                f"budget {text!r} is not made of psnr=DB, worst=DB and rel_l2=SHARE, each at most once",
                hint="use for example --budget psnr=40 or --budget psnr=40,worst=32",
            )
        limits[name] = limit
    return Budget(**limits)


def search(
    trial: Trial,
    plans: Plans,
    effects: Sequence[Effect],
    budget: Budget,
    base: Recipe,
    *,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Result:
    """Find the assignment with the most FLOPs in 8 bits, and then the fewest scales per token, that keeps the budget.

    Args:
        effects: what each layer costs in each format.
        base: the recipe that provides all other settings.
        on_point: called after each assignment that was drawn.

    Returns:
        A result whose chosen assignment has no layer in 8 bits if even the least sensitive layer breaks the budget.
    """
    effects_of = _best_format(effects)
    order = sorted(effects_of.values(), key=lambda effect: effect.best_error**2 / effect.share)
    tried: dict[tuple[frozenset[str], frozenset[str]], Point] = {}

    def point(layers: Sequence[Effect], per_token: Sequence[Effect] = ()) -> Point:
        tokens = frozenset(effect.layer for effect in per_token)
        key = frozenset(effect.layer for effect in layers), tokens
        if key not in tried:
            planned = {e.layer: plans[e.kind][e.layer] for e in layers}
            planned |= {layer: with_token_scales(planned[layer]) for layer in tokens}
            fidelity = trial.fidelity(planned)
            share = sum(e.share for e in layers)
            tried[key] = Point(layers=len(layers), per_token=len(tokens), share=share, fidelity=fidelity)
            on_point(tried[key])
        return tried[key]

    def allows(layers: Sequence[Effect], per_token: Sequence[Effect] = ()) -> bool:
        return budget.allows(point(layers, per_token).fidelity, margin_db=MARGIN_DB)

    for i in range(CURVE_POINTS):
        point(order[: round(i * len(order) / (CURVE_POINTS - 1))])
    kept, tokens = order, list[Effect]()
    if not allows(kept):
        kept = order[: _most(len(order), lambda count: allows(order[:count], _gaining(order[:count])))]
        for effect in order[len(kept) : len(kept) + RETRIES]:
            if allows([*kept, effect], _gaining([*kept, effect])):
                kept = [*kept, effect]
        gaining = _gaining(kept)
        spared = _most(len(gaining), lambda count: allows(kept, gaining[: len(gaining) - count]))
        tokens = gaining[: len(gaining) - spared]
    names = {effect.layer for effect in kept}
    kept_high_precision = {
        e.layer: f"in 8 bits it puts pictures outside the budget {budget} (step error alone: {e.best_error:.2g})"
        for e in order
        if e.layer not in names
    }
    recipe = as_recipe({e.layer: e.kind for e in kept}, {e.layer for e in tokens}, kept_high_precision, base)
    return Result(
        budget=str(budget),
        chosen=point(kept, tokens),
        effects=tuple(effects),
        curve=tuple(sorted(tried.values(), key=lambda p: (p.share, p.layers, p.per_token))),
        recipe=replace(recipe, budget=str(budget)),
    )


def save_result(result: Result, path: Path) -> Path:
    """Write the whole result, table and curve included, as JSON."""
    return write_atomic(path, json.dumps(to_json(result), indent=1) + "\n")


def _best_format(effects: Sequence[Effect]) -> dict[str, Effect]:
    """Each layer in the format with the smallest error. If both are equal, it is INT8."""
    best: dict[str, Effect] = {}
    for effect in sorted(effects, key=lambda e: (e.layer, e.kind != Format.INT8)):
        if effect.layer not in best or effect.best_error < best[effect.layer].best_error:
            best[effect.layer] = effect
    return best


def _gaining(effects: Sequence[Effect]) -> list[Effect]:
    """The layers that gain by a scale for each token. Those that gain most come first."""
    gains = {e.layer: e.step_error**2 - e.per_token_error**2 for e in effects}
    return sorted((e for e in effects if gains[e.layer] > 0), key=lambda e: -gains[e.layer])


def _most(count: int, allowed: Callable[[int], bool]) -> int:
    """The largest number up to `count` that is allowed; 0 is not tried. Numbers close to `count` are tried first."""
    if allowed(count):
        return count
    low, high, step = count - 1, count, 1
    while low > 0 and not allowed(low):
        step *= 2
        low, high = max(low - step, 0), low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
