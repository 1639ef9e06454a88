"""Guidance as data: the rows that a step runs on, and the weight of each row.

    pred[b] = sum_r weights[b,r] * network(row r)

A sample has up to three rows, in this order: unconditional (u), conditional (c), and conditional with some of the
network's layers skipped (k). Without classifier-free guidance there is only the conditional row. The third row comes
last because only some steps use it: a step with R weights runs on the first R rows.

Sources: classifier-free guidance is arXiv 2207.12598, with diffusers' guidance_scale. Skip-layer guidance is what
diffusers 0.42.1 computes: u + g*(c - u) + s*(c - k), which gives the rows the weights (1 - g, g + s, -s).
"""

# B samples, R rows

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ditc.runtime.bundle.manifest import Defaults, SkipLayerGuidance
from ditc.runtime.errors import UsageError
from ditc.runtime.request import Request
from ditc.runtime.session import Array
from ditc.runtime.step_contract import GUIDANCE, GUIDANCE_WEIGHTS, SKIP_GATE, GuidanceMode, StepContract

log = logging.getLogger(__name__)

# The scale in diffusers' pipelines if only skip_guidance_layers are given.
SKIP_LAYER_GUIDANCE_SCALE = 2.8


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


def guidance_feeds(
    contract: StepContract,
    batch: int,
    guidance_scale: float,
    skip: SkipLayerGuidance | None,
    num_inference_steps: int,
    runs: int | None = None,
) -> list[dict[str, Array]]:
    """The denoiser's inputs for guidance, for each step.

    Args:
        guidance_scale: with classifier-free guidance, 1 or less turns off both kinds of guidance.
        skip: None if skip-layer guidance is off.
        runs: how often the network runs; None for once in each step. Where it runs twice, diffusers still counts runs
            to see whether skip-layer guidance acts, and steps for its range.
    """
    guided = is_guided(contract, guidance_scale)
    fixed = {GUIDANCE: np.full(batch, guidance_scale, np.float32)} if contract.embeds_guidance else {}
    steps = []
    for index in range(num_inference_steps if runs is None else runs):
        skip_scale = _skip_scale(skip, index, num_inference_steps)
        weights = (
            guidance_weights(batch, guidance_scale, skip_scale) if guided else np.eye(batch, dtype=np.float32)
        )
        gate = {SKIP_GATE: skip_gate(weights)} if contract.skip_gate else {}
        steps.append({GUIDANCE_WEIGHTS: weights, **gate, **fixed})
    return steps


def guidance_weights(batch: int, guidance_scale: float, skip_scale: float | None = None) -> Array:
    """The weights (B,R) fp32 of one guided step, with R = 2B or, with skip-layer guidance, 3B.

    Args:
        skip_scale: the scale of skip-layer guidance in this step; None if it is off.
    """
    one = np.eye(batch, dtype=np.float32)
    g = np.float32(guidance_scale)
    if skip_scale is None:
        return np.concatenate([(1 - g) * one, g * one], axis=1)
    s = np.float32(skip_scale)
    return np.concatenate([(1 - g) * one, (g + s) * one, -s * one], axis=1)


def skip_gate(weights: Array) -> Array:
    """The gate (R,) fp32: 1 for the rows that skip layers, which are the third row of each sample."""
    batch, rows = weights.shape
    gate = np.zeros(rows, np.float32)
    gate[2 * batch :] = 1
    return gate


def _skip_scale(skip: SkipLayerGuidance | None, index: int, steps: int) -> float | None:
    """The scale in step `index`, or None outside the range from start to stop; both ends are outside."""
    if skip is None or not steps * skip.start < index < steps * skip.stop:
        return None
    return skip.scale
