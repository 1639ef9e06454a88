"""A request with every default filled in, and the refusal of what this bundle cannot serve."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ditc.runtime import denoise
from ditc.runtime.bins import classify
from ditc.runtime.bundle.manifest import LatentSpec, Manifest, SkipLayerGuidance
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.errors import UsageError
from ditc.runtime.request import Request, check_request, check_size
from ditc.runtime.rng import Generator, randn_latents
from ditc.runtime.session import Array
from ditc.runtime.spec import StageSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request with every default filled in. drawn_* is the size the network draws at.

    skip_layer_guidance is None where it is off.
    """

    request: Request
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    drawn_height: int
    drawn_width: int
    seed: int | None
    skip_layer_guidance: SkipLayerGuidance | None = None


def make_plan(request: Request, manifest: Manifest, denoiser: StageSpec, conditioning: Conditioning) -> Plan:
    """Fill in the bundle's defaults.

    Raises:
        UsageError: naming the argument, its value and the nearest that works.
    """
    check_request(request)
    conditioning.check_request(request)
    defaults, bins = manifest.defaults, manifest.defaults.bins
    height = defaults.height if request.height is None else request.height
    width = defaults.width if request.width is None else request.width
    drawn = (height, width)
    if bins and request.use_resolution_binning:
        drawn = classify(height, width, bins)
    check_size(*drawn, manifest.latents, denoiser, defaults)
    chosen = request.seed is not None or request.generator is not None or request.latents is not None
    guidance = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return Plan(
        request=request,
        num_inference_steps=request.num_inference_steps or defaults.num_inference_steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        drawn_height=drawn[0],
        drawn_width=drawn[1],
        seed=request.seed if chosen else secrets.randbits(32),
        skip_layer_guidance=_skip_layer_guidance(request, manifest, denoiser, guidance),
    )


def starting_latents(
    plan: Plan, latent: LatentSpec, samples: int, generator: Generator | Sequence[Generator]
) -> Array:
    """(samples,C,H,W) fp32: the caller's own, else noise.

    Raises:
        UsageError: the caller's are of another shape, or no finite numbers.
    """
    cells = (plan.drawn_height // latent.scale_factor, plan.drawn_width // latent.scale_factor)
    shape = (samples, latent.channels, *cells)
    if plan.request.latents is None:
        return randn_latents(shape, generator)
    try:
        given = np.asarray(plan.request.latents, np.float32)
    except (TypeError, ValueError) as e:
        raise UsageError(f"latents are no array: {e}", hint=f"pass an array of {shape}") from e
    if given.shape != shape:
        raise UsageError(
            f"latents are {given.shape}, this request needs {shape}",
            hint="pass (pictures, channels, height, width) in latent cells of the drawn size",
        )
    if not np.isfinite(given).all():
        raise UsageError(
            f"latents have {np.count_nonzero(~np.isfinite(given))} values that are NaN or Inf",
            hint="pass finite ones, or a seed",
        )
    return given


def _skip_layer_guidance(
    request: Request, manifest: Manifest, denoiser: StageSpec, guidance_scale: float
) -> SkipLayerGuidance | None:
    """The bundle's, with what the request says; None where it is off."""
    skip = manifest.defaults.skip_layer_guidance
    scale, start, stop = (
        getattr(request, f"skip_layer_guidance_{name}") for name in ("scale", "start", "stop")
    )
    if skip is None or all(tensor.name != denoise.SKIP_GATE for tensor in denoiser.inputs):
        for name, value in (("scale", scale), ("start", start), ("stop", stop)):
            off = name == "scale" and value == 0
            if value is not None and not off:
                raise UsageError(
                    f"skip_layer_guidance_{name} is {value}, but this bundle's denoiser cannot skip layers",
                    hint="leave it out, or build with skip_guidance_layers in the checkpoint's ditc.json",
                )
        return None
    skip = replace(
        skip,
        scale=skip.scale if scale is None else scale,
        start=skip.start if start is None else start,
        stop=skip.stop if stop is None else stop,
    )
    if skip.scale and skip.start >= skip.stop:
        raise UsageError(
            f"skip-layer guidance starts at {skip.start} of the steps and stops at {skip.stop}",
            hint="let it start before it stops; skip_layer_guidance_scale 0 turns it off",
        )
    if skip.scale and guidance_scale <= 1:
        if scale:
            log.warning(
                "skip-layer guidance needs guidance_scale above 1, it is %g: it stays off", guidance_scale
            )
        return None
    if not skip.scale and (start is not None or stop is not None):
        log.warning("skip-layer guidance is off in this bundle: skip_layer_guidance_scale turns it on")
    return skip if skip.scale else None
