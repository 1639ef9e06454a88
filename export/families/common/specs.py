"""Specs of the stages that have the same form in every family: the denoiser's step, its network alone, and the VAE.

A family supplies what differs: channels, conditioning, extra inputs of its network, and ranges of sizes.
"""

# B samples, R network rows, C latent channels, H/W latent size, P history length, K coefficient columns

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import Defaults, LatentSpec, Tiling
from ditc.runtime.errors import UsageError
from ditc.runtime.schedulers import SchedulerParams, draws_noise, history_length
from ditc.runtime.spec import (
    DENOISER,
    NETWORK,
    VAE_DECODER,
    VAE_ENCODER,
    DType,
    Precision,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.step_contract import (
    BATCH,
    HEIGHT,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LATENTS,
    LATENTS_STD,
    PICTURE_AXES,
    PREDICTION,
    ROWS,
    WIDTH,
    GuidanceMode,
    StepContract,
)
from ditc.runtime.vae import check_tiling

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
STAGE_DTYPES = {Precision.FP32: DType.FLOAT32, Precision.FP16: DType.FLOAT16, Precision.BF16: DType.BFLOAT16}

IN_PIXELS = {HEIGHT: IMAGE_HEIGHT, WIDTH: IMAGE_WIDTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserFacts:
    """What a family states about its denoiser.

    Attributes:
        channels, out_channels: number of channels of the latents, and of the prediction.
        conditioning: specs of the conditioner's outputs, whose first dimension is "rows".
        sizes: ranges of "height" and "width" in latent cells.
        text: ranges of the other named dimensions of the conditioning.
        step: the step's contract, which states what the solver needs and how guidance reaches the network.
        axes: those of the latents, as LatentSpec.axes says. `sizes` has a range for each.
        residuals: what a ControlNet adds to the tokens, in the order in which the network takes them; () without one.
    """

    channels: int
    out_channels: int
    conditioning: tuple[TensorSpec, ...]
    sizes: Mapping[str, Range]
    text: Mapping[str, Range]
    step: StepContract
    axes: tuple[str, ...] = PICTURE_AXES
    residuals: tuple[TensorSpec, ...] = ()


def denoiser_spec(facts: DenoiserFacts, *, max_batch: int) -> StageSpec:
    """Spec of the denoiser as a whole step (export/graph/step.py)."""
    return StageSpec(
        DENOISER,
        inputs=(*facts.step.inputs(facts.channels, facts.conditioning, facts.axes), *facts.residuals),
        outputs=facts.step.outputs(facts.channels, facts.axes),
        profile={
            BATCH: Range(1, 1, max_batch),
            ROWS: _rows(facts, max_batch),
            **facts.sizes,
            **facts.text,
        },
    )


def network_spec(facts: DenoiserFacts, *, dtype: DType, max_batch: int) -> StageSpec:
    """Spec of the denoiser's network without the step around it.

    Parity uses it, and so can callers whose guidance is not a weighted sum of predictions.
    """
    latents = TensorSpec(LATENTS, dtype, (ROWS, facts.channels, *facts.axes))
    return StageSpec(
        NETWORK,
        inputs=(latents, *facts.step.network_inputs(facts.conditioning), *facts.residuals),
        outputs=(TensorSpec(PREDICTION, dtype, (ROWS, facts.out_channels, *facts.axes)),),
        profile={ROWS: _rows(facts, max_batch), **facts.sizes, **facts.text},
    )


def vae_specs(
    latents: LatentSpec,
    sizes: Mapping[str, Range],
    *,
    max_batch: int,
    tiling: Tiling | None = None,
    posterior: bool = False,
) -> dict[str, StageSpec]:
    """Specs of the VAE's decoder and encoder.

    Sizes are any whole number of latent cells, because only the denoiser works on patches. With tiling, the largest
    input is one tile, and tiles at the edges are as small as one cell.

    Args:
        posterior: whether the encoder also returns the standard deviation of a posterior that is sampled.
    """
    scale, cells = latents.scale_factor, tiled_ranges(sizes, tiling, latents)
    pixels = {
        IN_PIXELS[name]: Range(r.min * scale, r.opt * scale, r.max * scale, scale)
        for name, r in cells.items()
    }
    batch = {BATCH: Range(1, 1, max_batch)}
    picture = TensorSpec("image", DType.FLOAT32, (BATCH, 3, IMAGE_HEIGHT, IMAGE_WIDTH))
    latent = TensorSpec(LATENTS, DType.FLOAT32, (BATCH, latents.channels, HEIGHT, WIDTH))
    encoded = (latent, *((replace(latent, name=LATENTS_STD),) if posterior else ()))
    return {
        VAE_DECODER: StageSpec(VAE_DECODER, (latent,), (picture,), {**batch, **cells}),
        VAE_ENCODER: StageSpec(VAE_ENCODER, (picture,), encoded, {**batch, **pixels}),
    }


def tiling_of(given: Mapping[str, Any], scale: int, usual: Tiling | None = None) -> Tiling | None:
    """The tiling of a VAE: that of ditc.json, or else the family's usual one.

    Args:
        given: the content of ditc.json.
        scale: pixels per latent cell.

    Raises:
        UsageError: the tiles of ditc.json are no whole number of latent cells, or farther apart than they are wide.
    """
    if "tiling" not in given:
        return usual
    if given["tiling"] is None:
        return None
    tiling = Tiling(**given["tiling"])
    check_tiling(tiling.tile, tiling.stride, scale)
    return tiling


def tiled_ranges(sizes: Mapping[str, Range], tiling: Tiling | None, latents: LatentSpec) -> dict[str, Range]:
    """The sizes that a VAE takes at once, in latent cells: any whole number up to the largest picture or tile.

    Only the denoiser works on patches. Tiles at the edges of a picture are as small as one cell.
    """
    if tiling is None:
        return {name: Range(r.min, r.opt, r.max) for name, r in sizes.items()}
    cells = tiling.tile // latents.scale_factor
    return dict.fromkeys(sizes, Range(1, cells, cells))


def latent_ranges(defaults: Defaults, latents: LatentSpec, *, largest: int | None = None) -> dict[str, Range]:
    """Ranges of the latent height and width: those of the resolution bins, or else half to twice the default.

    Args:
        largest: largest side in latent cells that the network can draw; None where it has no limit.

    Raises:
        UsageError: a default side does not divide into latent cells and patches.
    """
    scale, step, ranges = latents.scale_factor, latents.patch_size, {}
    for axis, (name, default) in enumerate(((HEIGHT, defaults.height), (WIDTH, defaults.width))):
        if default % (scale * step):
            raise UsageError(
                f"resolution {default} is not a multiple of {scale * step}",
                hint=f"choose a multiple: a latent cell is {scale} pixels wide, and a patch is {step} cells wide",
            )
        sides = [size[axis] for size in defaults.bins] or [default // 2, default * 2]
        low, high = min(sides) // scale // step * step, max(sides) // scale // step * step
        ranges[name] = Range(max(step, low), default // scale, min(high, largest or high), step)
    return ranges


def step_contract(
    scheduler: SchedulerParams,
    *,
    guidance: GuidanceMode = GuidanceMode.CFG,
    skip_gate: bool = False,
    holds_frames: bool = False,
) -> StepContract:
    """The contract of a step for the checkpoint's sampler.

    The history has at least one entry even for Euler, whose coefficient for it is zero, so that every engine can run
    both single-step and multistep samplers.
    """
    return StepContract(
        history_length=max(1, history_length(scheduler)),
        noise=draws_noise(scheduler),
        guidance=guidance,
        skip_gate=skip_gate,
        holds_frames=holds_frames,
    )


def companion_precision(options: BuildOptions) -> Precision:
    """Precision of the text encoders and VAEs, which overflow in fp16.

    With a 16-bit denoiser they are bf16 in engines and in OpenVINO. In ONNX Runtime they stay fp32, because its CPU
    provider has no bf16.
    """
    exact = options.base is Precision.FP32 or not (options.builds_engines or options.converts_graphs)
    return Precision.FP32 if exact else Precision.BF16


def check_precision(options: BuildOptions, family: str) -> None:
    """Refuse a precision that the networks cannot be exported in. Raises UsageError."""
    if options.base not in TORCH_DTYPES:
        raise UsageError(
            f"precision {options.base.value} is not available for {family}",
            hint=f"choose one of {', '.join(p.value for p in TORCH_DTYPES)}",
        )


def _rows(facts: DenoiserFacts, max_batch: int) -> Range:
    most = facts.step.rows_per_sample * max_batch
    return Range(1, min(2, most), most)
