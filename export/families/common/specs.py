"""Specs of the stages whose form no family changes: the step around a denoiser, its network alone, a VAE.

A family brings what differs: channels, conditioning, extra inputs of its network, and the ranges.
"""

# B samples, R network rows, C latent channels, H/W latent size, P history length, K coefficient columns

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    Backend,
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
    PREDICTION,
    ROWS,
    WIDTH,
    GuidanceMode,
    StepContract,
)

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
STAGE_DTYPES = {Precision.FP32: DType.FLOAT32, Precision.FP16: DType.FLOAT16, Precision.BF16: DType.BFLOAT16}

IN_PIXELS = {HEIGHT: IMAGE_HEIGHT, WIDTH: IMAGE_WIDTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserFacts:
    """What a family says of its denoiser.

    Attributes:
        channels, out_channels: of the latents, and of the prediction.
        conditioning: the conditioner's outputs, with "rows" first.
        sizes: ranges of "height" and "width". text: ranges of the dimensions of the conditioning.
        step: the solver's needs and how guidance comes in.
    """

    channels: int
    out_channels: int
    conditioning: tuple[TensorSpec, ...]
    sizes: Mapping[str, Range]
    text: Mapping[str, Range]
    step: StepContract


def denoiser_spec(facts: DenoiserFacts, *, max_batch: int) -> StageSpec:
    """A whole step (export/graph/step.py)."""
    return StageSpec(
        DENOISER,
        inputs=facts.step.inputs(facts.channels, facts.conditioning),
        outputs=facts.step.outputs(facts.channels),
        profile={
            BATCH: Range(1, 1, max_batch),
            ROWS: _rows(facts, max_batch),
            **facts.sizes,
            **facts.text,
        },
    )


def network_spec(facts: DenoiserFacts, *, dtype: DType, max_batch: int) -> StageSpec:
    """The denoiser without the step around it: for parity, and for guidance that is not a weighted sum."""
    latents = TensorSpec(LATENTS, dtype, (ROWS, facts.channels, HEIGHT, WIDTH))
    return StageSpec(
        NETWORK,
        inputs=(latents, *facts.step.network_inputs(facts.conditioning)),
        outputs=(TensorSpec(PREDICTION, dtype, (ROWS, facts.out_channels, HEIGHT, WIDTH)),),
        profile={ROWS: _rows(facts, max_batch), **facts.sizes, **facts.text},
    )


def vae_specs(
    latents: LatentSpec, sizes: Mapping[str, Range], *, max_batch: int, tiling: Tiling | None = None
) -> dict[str, StageSpec]:
    """Decoder and encoder: any whole number of cells, for a VAE knows no patches.

    Where they run on tiles, no piece is larger than one, and those at the edges are as small as one cell.
    """
    scale = latents.scale_factor
    cells = {name: Range(r.min, r.opt, r.max) for name, r in sizes.items()}
    if tiling is not None:
        cells = dict.fromkeys(cells, Range(1, tiling.tile // scale, tiling.tile // scale))
    pixels = {
        IN_PIXELS[name]: Range(r.min * scale, r.opt * scale, r.max * scale, scale)
        for name, r in cells.items()
    }
    batch = {BATCH: Range(1, 1, max_batch)}
    picture = TensorSpec("image", DType.FLOAT32, (BATCH, 3, IMAGE_HEIGHT, IMAGE_WIDTH))
    latent = TensorSpec(LATENTS, DType.FLOAT32, (BATCH, latents.channels, HEIGHT, WIDTH))
    return {
        VAE_DECODER: StageSpec(VAE_DECODER, (latent,), (picture,), {**batch, **cells}),
        VAE_ENCODER: StageSpec(VAE_ENCODER, (picture,), (latent,), {**batch, **pixels}),
    }


def latent_ranges(defaults: Defaults, latents: LatentSpec, *, largest: int | None = None) -> dict[str, Range]:
    """Latent height and width: what the bins span, else from half to twice the default.

    Args:
        largest: most cells a side that the network can draw; None where it has no limit.

    Raises:
        UsageError: a default that patches do not divide.
    """
    cells, step, ranges = latents.scale_factor, latents.patch_size, {}
    for axis, (name, default) in enumerate(((HEIGHT, defaults.height), (WIDTH, defaults.width))):
        if default % (cells * step):
            raise UsageError(
                f"resolution {default} is not a multiple of {cells * step}",
                hint="take a multiple: the VAE and the patches divide the picture",
            )
        sides = [size[axis] for size in defaults.bins] or [default // 2, default * 2]
        low, high = min(sides) // cells // step * step, max(sides) // cells // step * step
        ranges[name] = Range(max(step, low), default // cells, min(high, largest or high), step)
    return ranges


def step_contract(
    scheduler: SchedulerParams, *, guidance: GuidanceMode = GuidanceMode.CFG, skip_gate: bool = False
) -> StepContract:
    """The contract of a step for the checkpoint's sampler.

    The history is of length one even for Euler, whose column is zero: every engine then takes both kinds of sampler.
    """
    return StepContract(
        history_length=max(1, history_length(scheduler)),
        noise=draws_noise(scheduler),
        guidance=guidance,
        skip_gate=skip_gate,
    )


def companion_precision(options: BuildOptions) -> Precision:
    """Of stages that overflow in fp16 (text encoders, VAEs) beside the denoiser.

    ONNX Runtime's CPU provider has no bf16: beside a 16-bit ONNX denoiser they stay fp32.
    """
    on_engines = options.backend is not Backend.ONNXRUNTIME
    return Precision.BF16 if on_engines and options.base is not Precision.FP32 else Precision.FP32


def check_precision(options: BuildOptions, family: str) -> None:
    """Refuse a denoiser in a type that the networks are not built in. Raises UsageError."""
    if options.base not in TORCH_DTYPES:
        raise UsageError(
            f"precision {options.base.value} is not built for {family}",
            hint=f"take one of {', '.join(p.value for p in TORCH_DTYPES)}",
        )


def _rows(facts: DenoiserFacts, max_batch: int) -> Range:
    most = facts.step.rows_per_sample * max_batch
    return Range(1, min(2, most), most)
