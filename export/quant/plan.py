"""Recipe + ranges + weights -> a plan: how each layer is quantized. The graph pass and the simulation follow it."""

# O output channels, I input channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ditc.export.quant.channels import channel_counts, output_error
from ditc.export.quant.estimators import Method, estimate_amax
from ditc.export.quant.formats import QUANTIZED_MAX, Format
from ditc.export.quant.layers import Layer
from ditc.export.quant.ranges import Ranges, Statistics
from ditc.export.quant.recipes import Recipe
from ditc.runtime.errors import UsageError
from ditc.runtime.session import Array

# SmoothQuant strengths that are tried. 0.5 and 0.8 are the defaults of SmoothQuant and ModelOpt; 1 moves all outliers
# into the weights.
ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Shares of the largest magnitude at which clipping a tensor is tried: steps of a quarter octave, down to an eighth.
CLIPS = tuple(2 ** (-i / 4) for i in range(13))
# Smoothing costs one multiplication of the activations, and what clipping removes may matter to a prompt that
# calibration has not seen. A gain of less than half a dB is not worth that.
WORTHWHILE = 10 ** (-0.5 / 10)


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """How the input of one or several layers is quantized.

    Attributes:
        amax: the magnitude that the largest quantized value stands for, after smoothing.
        smooth: (I,) factors by which the input is divided and the weights are multiplied; None for no smoothing.
        alpha: SmoothQuant's strength, which gave the factors.
        per_token: divide every token by its own largest magnitude first, and multiply the layer's result by it. amax
            is then 1.
    """

    amax: float
    smooth: Array | None = None
    alpha: float = 0.0
    per_token: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """One layer in 8 bits. input is None if only the weight is quantized."""

    name: str
    kind: Format
    input: Input | None


def with_token_scales(plan: LayerPlan) -> LayerPlan:
    """The same layer with a scale for each token in place of one for its whole input."""
    return replace(plan, input=Input(1.0, per_token=True))


@dataclass(frozen=True, slots=True, eq=False)
class QuantPlan:
    """The quantization of one stage.

    Attributes:
        layers: the layers in 8 bits, by name.
        kept_high_precision: the names of all other layers, and why each is not quantized.
    """

    recipe: Recipe
    layers: Mapping[str, LayerPlan]
    kept_high_precision: Mapping[str, str]


def make_plan(recipe: Recipe, ranges: Ranges | None, layers: Mapping[str, Layer]) -> QuantPlan:
    """Decide for every layer of a stage whether and how it is quantized.

    Args:
        ranges: needed if the recipe takes scales from them.

    Raises:
        UsageError: the recipe names no layer of the stage, the ranges are missing, lack a layer or have another
            number of channels, or a layer's input was always zero.
    """
    formats = check_fits(recipe, ranges, layers)
    inputs: dict[str, Input] = {}
    if recipe.needs_ranges and ranges is not None:
        inputs = _inputs(recipe, ranges, layers, formats)
    elif recipe.activations:
        inputs = dict.fromkeys(formats, Input(1.0, per_token=True))
    return QuantPlan(
        recipe=recipe,
        layers={name: LayerPlan(name, kind, inputs.get(name)) for name, kind in formats.items()},
        kept_high_precision={
            name: recipe.decide(name).why or "the recipe keeps it" for name in layers if name not in formats
        },
    )


def check_fits(recipe: Recipe, ranges: Ranges | None, layers: Mapping[str, Layer]) -> dict[str, Format]:
    """Check that recipe and ranges fit the layers of a stage, and return the formats of those in 8 bits.

    Raises:
        UsageError: as `make_plan`.
    """
    formats = recipe.formats(layers)
    if not formats:
        raise UsageError(
            f"recipe {recipe.name} names none of this network's {len(layers)} layers",
            hint=f"the recipe's rules name {', '.join(rule.layers for rule in recipe.rules if rule.kind)}",
        )
    for name in formats:
        if recipe.decide(name).per_token and layers[name].is_convolution:
            raise UsageError(
                f"recipe {recipe.name} gives every token of {name} a scale, but it is a convolution",
                hint="leave per_token out of the rule for it",
            )
    if not recipe.needs_ranges:
        return formats
    if ranges is None:
        raise UsageError(
            f"recipe {recipe.name} quantizes activations and needs ranges",
            hint="measure them: ditc calibrate CHECKPOINT -o ranges.safetensors; then build with --ranges",
        )
    for name in formats:
        statistics = ranges.of(name)
        if not statistics.amax.max() > 0:
            raise UsageError(
                f"the input of {name} was zero in every step of calibration: it has no range",
                hint="calibrate with more prompts, or keep the layer in high precision by a recipe of your own",
            )
        if statistics.channels != layers[name].channels:
            raise UsageError(
                f"the ranges have {statistics.channels} channels for the input of {name}, but the layer has "
                f"{layers[name].channels}",
                hint="the ranges are of another network: calibrate this checkpoint",
            )
    return formats


def _inputs(
    recipe: Recipe, ranges: Ranges, layers: Mapping[str, Layer], formats: Mapping[str, Format]
) -> dict[str, Input]:
    """Layers that read one tensor in one format share one Input, so that they share the tensor's scale."""
    groups: dict[tuple[str, Format, bool], list[str]] = {}
    for name, kind in formats.items():
        groups.setdefault((ranges.site_of[name], kind, recipe.decide(name).per_token), []).append(name)
    inputs = {}
    for (site, kind, per_token), names in groups.items():
        if per_token:
            chosen = Input(1.0, per_token=True)
        else:
            flat = any(layers[name].is_convolution for name in names)  # their inputs are not smoothed
            rules = replace(recipe, smooth=False) if flat else recipe
            chosen = choose_input(rules, ranges.sites[site], [layers[name].weight() for name in names], kind)
        inputs.update(dict.fromkeys(names, chosen))
    return inputs


def choose_input(recipe: Recipe, statistics: Statistics, weights: Sequence[Array], kind: Format) -> Input:
    """Choose the range and smoothing of one tensor that give the layers that read it the least expected error.

    Args:
        weights: the (O,I) weight of each of these layers.
    """
    plain = Input(
        estimate_amax(
            statistics, recipe.method, kind, percentile=recipe.percentile, timesteps=recipe.timesteps
        )
    )
    if not recipe.smooth or kind is not Format.INT8:
        return plain
    search = _InputSearch(statistics, weights)
    if recipe.method is not Method.MSE:
        return search.choose(plain.amax, (1.0,))[0]
    largest = float(statistics.amax.max())
    return _worthwhile(search.choose(largest, CLIPS), search.choose(largest, (1.0,)))[0]


class _InputSearch:
    """Finds the smoothing and clipping of one tensor that give the layers that read it the least expected error."""

    def __init__(self, statistics: Statistics, weights: Sequence[Array]) -> None:
        self._channel_amax = statistics.channel_amax.max(axis=0).astype(np.float64)
        self._weights = weights
        self._counts = channel_counts(statistics)
        self._moments = statistics.channel_squares.sum(axis=0) / max(int(statistics.rows.sum()), 1)
        self._columns = np.sum([(w.astype(np.float64) ** 2).sum(axis=0) for w in weights], axis=0)

    def choose(self, largest: float, clips: Sequence[float]) -> tuple[Input, float]:
        """The smoothing (if one is worth it) and the clipping with the least expected error, and that error.

        Args:
            largest: the magnitude that the tensor is assumed never to exceed, before smoothing.
            clips: shares of the largest magnitude to try.
        """
        plain = self._clip(None, largest, clips)
        smoothed = []
        for alpha in ALPHAS:
            factors = smoothing(self._channel_amax, self._weights, alpha)
            smoothed.append(self._clip(factors, float((self._channel_amax / factors).max()), clips, alpha))
        return _worthwhile(min(smoothed, key=lambda pair: pair[1]), plain)

    def _clip(
        self, smooth: Array | None, largest: float, clips: Sequence[float], alpha: float = 0.0
    ) -> tuple[Input, float]:
        """The clipping with the least error, and that error. largest: the largest magnitude after smoothing."""
        factors = np.ones_like(self._channel_amax) if smooth is None else smooth
        tried = [largest * clip for clip in clips]
        errors = [output_error(self._counts, self._columns, factors, amax) for amax in tried]
        index = int(np.argmin(errors))
        kept = None if smooth is None else smooth.astype(np.float32)
        return Input(tried[index], kept, alpha), errors[index] + self._weight_noise(factors)

    def _weight_noise(self, smooth: Array) -> float:
        """Expected output error per row that comes from rounding the weights, with one step per output channel."""
        reach = float((self._moments / smooth**2).sum())
        steps = (np.abs(w * smooth).max(axis=1) / QUANTIZED_MAX[Format.INT8] for w in self._weights)
        return float(sum((step**2).sum() / 12 * reach for step in steps))


def _worthwhile(better: tuple[Input, float], simpler: tuple[Input, float]) -> tuple[Input, float]:
    return better if better[1] < simpler[1] * WORTHWHILE else simpler


def smoothing(channel_amax: Array, weights: Sequence[Array], alpha: float) -> Array:
    """SmoothQuant's factors (equation 4): amax(x)**alpha / amax(w)**(1 - alpha) per channel.

    They are scaled so that the mean of their logarithms is 0. A channel that was never used, or that no weight reads,
    gets the smallest factor of the others.
    """
    weight_amax = np.max([np.abs(w).max(axis=0) for w in weights], axis=0).astype(np.float64)
    used = (channel_amax > 0) & (weight_amax > 0)
    factors = np.ones_like(weight_amax)
    factors[used] = channel_amax[used].astype(np.float64) ** alpha / weight_amax[used] ** (1 - alpha)
    factors[~used] = factors[used].min() if used.any() else 1.0
    factors /= np.exp(np.log(factors).mean())
    return factors
