"""What each layer costs in fidelity when it alone is in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from ditc.calib.trial import Trial
from ditc.export.quant.formats import Format
from ditc.export.quant.layers import Layer
from ditc.export.quant.plan import LayerPlan, make_plan
from ditc.export.quant.ranges import Ranges
from ditc.export.quant.recipes import Recipe, Rule, find_recipe
from ditc.runtime.spec import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One layer in one format, all others high.

    Attributes:
        share: of the FLOPs of all GEMMs with weights.
        step_error: relative L2 of a step's x0 from reference states.
        per_token_error: the same if every token's input had a scale of its own (simulated only).
        picture_db: PSNR of the final pictures; None where time ran out.
    """

    layer: str
    kind: Format
    share: float
    step_error: float
    per_token_error: float
    picture_db: float | None = None


def flops_shares(layers: Mapping[str, Layer], ranges: Ranges) -> dict[str, float]:
    """Each layer's share of the FLOPs of all the stage's GEMMs with weights, by the rows that calibration saw."""
    flops = {
        name: int(ranges.of(name).rows.sum()) * layer.linear.in_features * layer.linear.out_features
        for name, layer in layers.items()
    }
    total = sum(flops.values())
    return {name: value / total for name, value in flops.items()}


def base_recipe(kind: Format, family: str) -> Recipe:
    """The recipe that a search begins with: the family's own in the format."""
    return find_recipe(None, Precision(kind.value), family)


def candidate_plans(
    trial: Trial, ranges: Ranges, formats: Sequence[Format]
) -> dict[Format, Mapping[str, LayerPlan]]:
    """For each format, what every layer that its recipe names would get."""
    return {kind: make_plan(base_recipe(kind, trial.family), ranges, trial.layers).layers for kind in formats}


def measure_effects(
    trial: Trial,
    plans: Mapping[Format, Mapping[str, LayerPlan]],
    shares: Mapping[str, float],
    *,
    picture_seconds: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Effect]:
    """Effects of all layers in all formats, worst first.

    Args:
        picture_seconds: how long final pictures may be drawn, beginning with the layers of the largest step error.
    """
    pairs = [(kind, plan) for kind, named in plans.items() for plan in named.values()]
    effects = []
    for done, (kind, plan) in enumerate(pairs):
        only = {plan.name: plan}
        effects.append(
            Effect(
                layer=plan.name,
                kind=kind,
                share=shares[plan.name],
                step_error=trial.step_error(only),
                per_token_error=trial.step_error(only, per_token=True),
            )
        )
        on_progress(done + 1, 2 * len(pairs))
    effects.sort(key=lambda effect: -effect.step_error)
    stop = monotonic() + picture_seconds
    for index, effect in enumerate(effects):
        if monotonic() > stop:
            break
        only = {effect.layer: plans[effect.kind][effect.layer]}
        effects[index] = replace(effect, picture_db=trial.fidelity(only).psnr_db)
        on_progress(len(pairs) + index + 1, 2 * len(pairs))
    return effects


def as_recipe(chosen: Mapping[str, Format], kept: Mapping[str, str], base: Recipe) -> Recipe:
    """An assignment by layer as a recipe that a build takes. kept: layers that stay high, and why."""
    rules = [rule for rule in base.rules if rule.kind is None]
    rules += [Rule(layers=name, why=why) for name, why in kept.items()]
    rules += [Rule(layers=name, kind=kind) for name, kind in chosen.items()]
    return replace(base, name="mixed", rules=tuple(rules))
