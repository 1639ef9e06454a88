"""Search for the assignment of formats to layers that has the most FLOPs in 8 bits and keeps pictures within a budget.

The layers are sorted by squared step error per FLOP, because errors of independent roundings add in squares. Those with
the largest values are kept in high precision. Drawing pictures shows how many of them must be. Finally, some of them
are tried in 8 bits again, one by one, those with the smallest values first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ditc.calib.sensitivity import Effect, as_recipe
from ditc.calib.trial import Fidelity, Trial
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.recipes import Recipe
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.errors import UsageError

CURVE_POINTS = 9
RETRIES = 6  # layers behind the cut that are tried in 8 bits again
Plans = Mapping[Format, Mapping[str, LayerPlan]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What pictures may lose: PSNR must be at least `limit` dB, or relative L2 of the latents at most `limit`."""

    metric: Literal["psnr", "rel_l2"]
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}={self.limit:g}"

    def allows(self, fidelity: Fidelity) -> bool:
        """Whether the pictures are within the budget."""
        return fidelity.psnr_db >= self.limit if self.metric == "psnr" else fidelity.rel_l2 <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One assignment: the number of layers in 8 bits, their share of all GEMM FLOPs, and the fidelity of pictures."""

    layers: int
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
    """Parse a budget such as "psnr=40" (dB) or "rel_l2=0.05".

    Raises:
        UsageError: the text is neither of the two, or its number is not positive.
    """
    metric, _, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = float("nan")
    if metric not in ("psnr", "rel_l2") or not limit > 0:
        raise UsageError(
            f"budget {text!r} is neither psnr=DB nor rel_l2=SHARE", hint="use for example --budget psnr=40"
        )
    return Budget("psnr" if metric == "psnr" else "rel_l2", limit)


def search(
    trial: Trial,
    plans: Plans,
    effects: Sequence[Effect],
    budget: Budget,
    base: Recipe,
    *,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Result:
    """Find the assignment with the most FLOPs in 8 bits that keeps the budget.

    Args:
        effects: what each layer costs in each format.
        base: the recipe that provides all other settings.
        on_point: called after each assignment that was drawn.

    Returns:
        A result whose chosen assignment has no layer in 8 bits if even the least sensitive layer breaks the budget.
    """
    best = _best_format(effects)
    order = sorted(best.values(), key=lambda effect: effect.step_error**2 / effect.share)
    tried: dict[frozenset[str], Point] = {}

    def point(layers: Sequence[Effect]) -> Point:
        key = frozenset(effect.layer for effect in layers)
        if key not in tried:
            fidelity = trial.fidelity({e.layer: plans[e.kind][e.layer] for e in layers})
            tried[key] = Point(layers=len(key), share=sum(e.share for e in layers), fidelity=fidelity)
            on_point(tried[key])
        return tried[key]

    counts = {round(i * len(order) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)}
    for count in sorted(counts):
        point(order[:count])
    kept = _largest(order, lambda layers: budget.allows(point(layers).fidelity))
    for effect in order[len(kept) : len(kept) + RETRIES]:
        if budget.allows(point([*kept, effect]).fidelity):
            kept = [*kept, effect]
    names = {effect.layer for effect in kept}
    kept_high_precision = {
        e.layer: f"in 8 bits it puts pictures outside the budget {budget} (step error alone: {e.step_error:.2g})"
        for e in order
        if e.layer not in names
    }
    return Result(
        budget=str(budget),
        chosen=point(kept),
        effects=tuple(effects),
        curve=tuple(sorted(tried.values(), key=lambda p: (p.share, p.layers))),
        recipe=replace(
            as_recipe({e.layer: e.kind for e in kept}, kept_high_precision, base), budget=str(budget)
        ),
    )


def save_result(result: Result, path: Path) -> Path:
    """Write the whole result, table and curve included, as JSON."""
    return write_atomic(path, json.dumps(to_json(result), indent=1) + "\n")


def _best_format(effects: Sequence[Effect]) -> dict[str, Effect]:
    """Each layer in the format with the smallest step error. If both are equal, it is INT8."""
    best: dict[str, Effect] = {}
    for effect in sorted(effects, key=lambda e: (e.layer, e.kind != Format.INT8)):
        if effect.layer not in best or effect.step_error < best[effect.layer].step_error:
            best[effect.layer] = effect
    return best


def _largest(order: Sequence[Effect], allowed: Callable[[Sequence[Effect]], bool]) -> list[Effect]:
    """The longest prefix that is allowed. Bisection finds it, since more layers in 8 bits do not improve pictures."""
    if allowed(order):
        return list(order)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(order[:middle]) else (low, middle)
    return list(order[:low])
