"""Measure what each layer costs in fidelity when it is the only one in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from ditc.calib.trial import Trial
from ditc.export.quant.formats import Format
from ditc.export.quant.layers import Layer
from ditc.export.quant.plan import LayerPlan, make_plan, with_token_scales
from ditc.export.quant.ranges import Ranges
from ditc.export.quant.recipes import Recipe, Rule, find_recipe
from ditc.export.quant.stage_recipes import recipe_of_network
from ditc.runtime.spec import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one layer in one format costs while all others stay in high precision.

    Attributes:
        share: the layer's share of the FLOPs of all GEMMs with weights.
        step_error: relative L2 error of the x0 of steps that begin at the reference's states.
        per_token_error: `step_error` if every token has an input scale of its own. A convolution cannot have such
            scales, so its is the same.
        picture_db: PSNR of the final pictures in dB; None if there was no time left to draw them.
    """

    layer: str
    kind: Format
    share: float
    step_error: float
    per_token_error: float
    picture_db: float | None = None

    @property
    def best_error(self) -> float:
        """The smaller of the two errors."""
        return min(self.step_error, self.per_token_error)


def flops_shares(layers: Mapping[str, Layer], ranges: Ranges) -> dict[str, float]:
    """Each layer's share of the FLOPs of all GEMMs with weights, for the numbers of rows that calibration counted."""
    flops = {
        name: int(ranges.of(name).rows.sum()) * layer.linear.weight.numel() for name, layer in layers.items()
    }
    total = sum(flops.values())
    return {name: value / total for name, value in flops.items()}


def base_recipe(kind: Format, family: str, network: str | None = None) -> Recipe:
    """The recipe that a search begins with: the family's default for the format, or that of a decoder's network."""
    if network is None:
        return find_recipe(None, Precision(kind.value), family)
    return recipe_of_network(network, kind)


def candidate_plans(
    trial: Trial, ranges: Ranges, formats: Sequence[Format]
) -> dict[Format, Mapping[str, LayerPlan]]:
    """For each format, the plans of all layers that the format's base recipe quantizes."""
    return {
        kind: make_plan(base_recipe(kind, trial.family, trial.network), ranges, trial.layers).layers
        for kind in formats
    }


def measure_effects(
    trial: Trial,
    plans: Mapping[Format, Mapping[str, LayerPlan]],
    shares: Mapping[str, float],
    *,
    picture_seconds: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Effect]:
    """Measure the effects of all layers in all formats. The largest step error comes first.

    Args:
        picture_seconds: the time for drawing final pictures. Layers with the largest step errors are drawn first.
        on_progress: called with two numbers: the measurements that are done, and all that are planned.
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
                per_token_error=trial.step_error(
                    only if trial.layers[plan.name].is_convolution else {plan.name: with_token_scales(plan)}
                ),
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


def as_recipe(
    chosen: Mapping[str, Format],
    per_token: Collection[str],
    kept_high_precision: Mapping[str, str],
    base: Recipe,
) -> Recipe:
    """Turn an assignment of formats into a recipe that a build accepts.

    Args:
        chosen: the format of each layer in 8 bits.
        per_token: those of them that have a scale for each token.
        kept_high_precision: for each layer that stays in high precision, the reason.
        base: the recipe that provides all other settings.
    """
    rules = [rule for rule in base.rules if rule.kind is None]
    rules += [Rule(layers=name, why=why) for name, why in kept_high_precision.items()]
    rules += [Rule(layers=name, kind=kind, per_token=name in per_token) for name, kind in chosen.items()]
    return replace(base, name="mixed", rules=tuple(rules))
