"""Guidance as data: the rows that a step runs on, and the weight of each row.

    pred[b] = sum_r weights[b,r] * network(row r)

A sample has up to three rows, in this order: unconditional (u), conditional (c), and conditional and gated (k). In a
gated row a part of the network is skipped, which is fixed in the graph: layers (skip-layer guidance), or the
self-attention of layers (perturbed-attention guidance). Without classifier-free guidance there is no u. The gated row
comes last because not every step uses it: a step with R weights runs on the first R rows. A step outside the request's
guidance interval runs on c alone.

Sources: classifier-free guidance is arXiv 2207.12598, with diffusers' guidance_scale. With a gated row of scale s,
diffusers 0.42.1 computes u + g*(c - u) + s*(c - k), or c + s*(c - k) without classifier-free guidance. This gives the
rows the weights (1 - g, g + s, -s), or (1 + s, -s).
"""

# B samples, R rows

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ditc.runtime.bundle.manifest import Defaults, PerturbedAttentionGuidance, SkipLayerGuidance
from ditc.runtime.errors import UsageError
from ditc.runtime.request import Request
from ditc.runtime.session import Array
from ditc.runtime.step_contract import GUIDANCE, GUIDANCE_WEIGHTS, SKIP_GATE, GuidanceMode, StepContract

log = logging.getLogger(__name__)

# The scale in diffusers' pipelines if only skip_guidance_layers are given.
SKIP_LAYER_GUIDANCE_SCALE = 2.8

# diffusers' timesteps begin here, and the adaptive scale of perturbed-attention guidance counts down from it.
FIRST_TIMESTEP = 1000

# The guidance interval of a request without one.
ALL_STEPS = (0.0, 1.0)


def is_guided(contract: StepContract, guidance_scale: float) -> bool:
    """Whether a request has unconditional rows, which use its negative prompt.

    The rule guidance_scale > 1 is that of diffusers' `do_classifier_free_guidance`.
    """
    return contract.guidance is GuidanceMode.CFG and guidance_scale > 1


def check_guidance(request: Request, contract: StepContract) -> None:
    """Refuse a guidance_scale that this bundle's denoiser would ignore; warn if it would ignore a negative prompt.

    In diffusers, the pipelines of such networks have no argument negative_prompt.

    Raises:
        UsageError: the request asks for guidance, but the network takes none.
    """
    if contract.guidance is GuidanceMode.CFG:
        return
    if contract.guidance is GuidanceMode.NONE and (request.guidance_scale or 0) > 1:
        raise UsageError(
            f"guidance_scale is {request.guidance_scale}, but this bundle's denoiser takes no guidance",
            hint="leave guidance_scale out",
        )
    negative = [*request.negative_prompts, *request.embeds(negative=True)]
    if any(negative):
        log.warning("negative prompts have no effect: this bundle's denoiser has no unconditional rows")


def decide_skip_layer_guidance(
    request: Request, defaults: Defaults, contract: StepContract, guidance_scale: float
) -> SkipLayerGuidance | None:
    """The skip-layer guidance of a request: the bundle's, changed by what the request gives. None if it is off.

    Raises:
        UsageError: the bundle's denoiser cannot skip these layers, or the range of steps is empty.
    """
    layers = request.skip_guidance_layers
    if layers is not None:
        _check_layers(layers, defaults.skip_layer_guidance if contract.skip_gate else None)
        if not layers:
            return None
    asked = {
        "scale": request.skip_layer_guidance_scale,
        "start": request.skip_layer_guidance_start,
        "stop": request.skip_layer_guidance_stop,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if defaults.skip_layer_guidance is None or not contract.skip_gate:
        for name, value in given.items():
            if name != "scale" or value != 0:
                raise UsageError(
                    f"skip_layer_guidance_{name} is {value}, but this bundle's denoiser cannot skip layers",
                    hint="leave it out, or build with skip_guidance_layers in the checkpoint's ditc.json",
                )
        return None
    default = defaults.skip_layer_guidance
    if layers and not default.scale:
        default = replace(default, scale=SKIP_LAYER_GUIDANCE_SCALE)
    skip = replace(
        default,
        scale=given.get("scale", default.scale),
        start=given.get("start", default.start),
        stop=given.get("stop", default.stop),
    )
    if not skip.scale:
        if given.keys() & {"start", "stop"}:
            log.warning("skip-layer guidance is off in this bundle: skip_layer_guidance_scale turns it on")
        return None
    if skip.start >= skip.stop:
        raise UsageError(
            f"skip-layer guidance starts at {skip.start} of the steps and stops at {skip.stop}",
            hint="let it start before it stops, or turn it off with skip_layer_guidance_scale 0",
        )
    if not is_guided(contract, guidance_scale):
        if "scale" in given or layers:
            log.warning(
                "skip-layer guidance stays off: it needs guidance_scale above 1, but that is %g",
                guidance_scale,
            )
        return None
    return skip


def _check_layers(layers: Sequence[int], bundles: SkipLayerGuidance | None) -> None:
    if not layers or (bundles is not None and set(layers) == set(bundles.layers)):
        return
    skipped = "cannot skip layers" if bundles is None else f"is compiled to skip {list(bundles.layers)}"
    raise UsageError(
        f"skip_guidance_layers is {list(layers)}, but this bundle's denoiser {skipped}",
        hint="a model that can skip layers is built for them: write "
        f'"skip_guidance_layers": {list(layers)} into its ditc.json',
    )


def decide_perturbed_attention_guidance(
    request: Request, defaults: Defaults, contract: StepContract
) -> PerturbedAttentionGuidance | None:
    """The perturbed-attention guidance of a request: the bundle's, changed by what the request gives; None if off.

    As in diffusers, it needs no classifier-free guidance, and a pag_scale of 0 or less turns it off.

    Raises:
        UsageError: the bundle's denoiser cannot perturb its attention.
    """
    default = defaults.perturbed_attention_guidance
    if default is None or not contract.skip_gate:
        for name in ("pag_scale", "pag_adaptive_scale"):
            if value := getattr(request, name):
                raise UsageError(
                    f"{name} is {value}, but this bundle's denoiser has no layers for perturbed-attention guidance",
                    hint="leave it out: guidance is a part of this network, which was distilled with it"
                    if contract.embeds_guidance
                    else "leave it out, or build with pag_applied_layers in the checkpoint's ditc.json",
                )
        return None
    pag = replace(
        default,
        scale=default.scale if request.pag_scale is None else request.pag_scale,
        adaptive_scale=default.adaptive_scale
        if request.pag_adaptive_scale is None
        else request.pag_adaptive_scale,
    )
    return pag if pag.scale > 0 else None


def decide_guidance_interval(
    request: Request, contract: StepContract, *, has_rows: bool
) -> tuple[float, float]:
    """The fractions of the steps between which guidance acts.

    Args:
        has_rows: whether the request has rows that only guidance needs.

    Raises:
        UsageError: the network embeds its guidance, so no step can be without.
    """
    interval = request.guidance_interval
    if interval is None:
        return ALL_STEPS
    start, stop = interval
    if contract.embeds_guidance and (start, stop) != ALL_STEPS:
        raise UsageError(
            f"guidance_interval is {start:g}, {stop:g}, but guidance is a part of this bundle's network",
            hint="leave guidance_interval out",
        )
    if not has_rows and (start, stop) != ALL_STEPS:
        log.warning("guidance_interval has no effect: this request has no guidance")
    return start, stop


def skip_layer_scales(skip: SkipLayerGuidance, num_inference_steps: int, runs: int) -> list[float]:
    """The scale of skip-layer guidance in each run of the network; 0 where it is off.

    Both ends of its range are outside. Where the network runs twice in a step, diffusers still counts runs to see
    whether skip-layer guidance acts, and steps for its range.
    """
    first, last = num_inference_steps * skip.start, num_inference_steps * skip.stop
    return [skip.scale if first < run < last else 0.0 for run in range(runs)]


def perturbed_attention_scales(pag: PerturbedAttentionGuidance, timesteps: Sequence[float]) -> list[float]:
    """The scale of perturbed-attention guidance in each run of the network: diffusers' PAGMixin._get_pag_scale.

    Args:
        timesteps: those of the scheduler, from 1000 to 0.
    """
    if pag.adaptive_scale <= 0:
        return [pag.scale] * len(timesteps)
    return [
        max(pag.scale - pag.adaptive_scale * (FIRST_TIMESTEP - float(timestep)), 0.0)
        for timestep in timesteps
    ]


def guidance_feeds(
    contract: StepContract,
    batch: int,
    guidance_scale: float,
    gated_scales: Sequence[float],
    interval: tuple[float, float] = ALL_STEPS,
) -> list[dict[str, Array]]:
    """The denoiser's inputs for guidance, for each run of the network.

    Args:
        guidance_scale: 1 or less turns off classifier-free guidance.
        gated_scales: how strongly each run guides away from the gated rows. Where it is 0, they are not run.
        interval: the fractions of the runs from which on, and up to which, guidance acts. Other runs have only
            conditional rows.
    """
    runs, guided = len(gated_scales), is_guided(contract, guidance_scale)
    fixed = {GUIDANCE: np.full(batch, guidance_scale, np.float32)} if contract.embeds_guidance else {}
    feeds = []
    for run, gated_scale in enumerate(gated_scales):
        if not _is_inside(interval, run, runs):
            weights = np.eye(batch, dtype=np.float32)
            gated_scale = 0.0
        else:
            weights = guidance_weights(batch, guidance_scale, gated_scale, guided=guided)
        gate = {SKIP_GATE: skip_gate(weights, gated=gated_scale != 0)} if contract.skip_gate else {}
        feeds.append({GUIDANCE_WEIGHTS: weights, **gate, **fixed})
    return feeds


def guidance_weights(
    batch: int, guidance_scale: float, gated_scale: float = 0.0, *, guided: bool = True
) -> Array:
    """The weights (B,R) fp32 of one step, with one row per sample of each kind that the step has.

    Args:
        gated_scale: how strongly to guide away from the gated rows; 0 if there are none.
        guided: whether there are unconditional rows. Without them, guidance_scale counts nothing.
    """
    one = np.eye(batch, dtype=np.float32)
    g, s = np.float32(guidance_scale if guided else 1), np.float32(gated_scale)
    unconditional = [(1 - g) * one] if guided else []
    gated = [-s * one] if s else []
    return np.concatenate([*unconditional, (g + s) * one, *gated], axis=1)


def skip_gate(weights: Array, *, gated: bool) -> Array:
    """The gate (R,) fp32: 1 for the gated rows, which are the last row of each sample if there are any."""
    batch, rows = weights.shape
    gate = np.zeros(rows, np.float32)
    if gated:
        gate[rows - batch :] = 1
    return gate


def _is_inside(interval: tuple[float, float], run: int, runs: int) -> bool:
    """Whether guidance acts in a run, by the rule of diffusers 0.42.1's guiders, such as ClassifierFreeGuidance."""
    start, stop = interval
    return int(start * runs) <= run < int(stop * runs)
