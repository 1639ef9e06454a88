"""The defaults of a request to SD3: size, steps and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditc.export.families.sd3.config import Sd3Config
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import Defaults, LatentSpec, SkipLayerGuidance
from ditc.runtime.errors import UsageError

# StableDiffusion3Pipeline.__call__'s defaults, diffusers 0.42.1.
NUM_INFERENCE_STEPS = 28
GUIDANCE_SCALE = 7.0
SKIP_SCALE, SKIP_START, SKIP_STOP = 2.8, 0.01, 0.2
# Stability's recommendation for SD3.5-medium, the family's one model with dual attention layers.
SKIP_LAYERS = (7, 8, 9)


def make_defaults(
    given: Mapping[str, Any], transformer: Sd3Config, latents: LatentSpec, options: BuildOptions
) -> Defaults:
    """Choose the defaults: from the build's options first, then from ditc.json, then the pipeline's.

    Args:
        given: the content of ditc.json.

    Raises:
        UsageError: the position embedding does not cover the size, or a skip layer is not a block.
    """
    native = transformer.sample_size * latents.scale_factor
    height = options.resolution or int(given.get("height", native))
    width = options.resolution or int(given.get("width", native))
    largest = transformer.largest_side * latents.scale_factor
    for side in (height, width):
        if side > largest:
            raise UsageError(
                f"{side} pixels are more than the position embedding covers: {largest} pixels per side "
                f"({transformer.pos_embed_max_size} patches)",
                hint=f"choose a resolution of at most {largest}",
            )
    return Defaults(
        height=height,
        width=width,
        num_inference_steps=int(given.get("num_inference_steps", NUM_INFERENCE_STEPS)),
        guidance_scale=float(given.get("guidance_scale", GUIDANCE_SCALE)),
        skip_layer_guidance=_skip_layer_guidance(given, transformer),
    )


def _skip_layer_guidance(given: Mapping[str, Any], transformer: Sd3Config) -> SkipLayerGuidance | None:
    """Skip-layer guidance of a checkpoint, or None for one that cannot skip layers.

    It is on by default where ditc.json names layers, as in diffusers. For networks like SD3.5-medium's it is available
    but off.
    """
    named = given.get("skip_guidance_layers")
    layers = tuple(named or ())
    if named is None and transformer.dual_attention_layers and max(SKIP_LAYERS) < transformer.num_layers:
        layers = SKIP_LAYERS
    transformer.check_skip_layers(layers)
    if not layers:
        return None
    return SkipLayerGuidance(
        layers=layers,
        scale=float(given.get("skip_layer_guidance_scale", SKIP_SCALE)) if named else 0.0,
        start=float(given.get("skip_layer_guidance_start", SKIP_START)),
        stop=float(given.get("skip_layer_guidance_stop", SKIP_STOP)),
    )
