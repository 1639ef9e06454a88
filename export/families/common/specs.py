"""Specs of the stages whose form no family changes: the step around a denoiser, its network alone, a VAE.

A family brings what differs: channels, conditioning, extra inputs of its network, and the ranges.
"""

# B samples, R network rows, C latent channels, H/W latent size, P history length, K coefficient columns

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ditc.export.graph.step import STATS
from ditc.export.options import BuildOptions
from ditc.runtime import denoise
from ditc.runtime.bundle.manifest import Defaults, LatentSpec, Tiling
from ditc.runtime.errors import UsageError
from ditc.runtime.schedulers import SchedulerParams
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

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
STAGE_DTYPES = {Precision.FP32: DType.FLOAT32, Precision.FP16: DType.FLOAT16, Precision.BF16: DType.BFLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserFacts:
    """What a family says of its denoiser.

    Attributes:
        channels, out_channels: of the latents, and of the prediction.
        conditioning: the conditioner's outputs, with "rows" first. extra: further inputs of the network, per row.
        sizes: ranges of "height" and "width". text: ranges of the dimensions of the conditioning.
        rows_per_sample: most rows that guidance gives a sample.
    """

    channels: int
    out_channels: int
    conditioning: tuple[TensorSpec, ...]
    sizes: Mapping[str, Range]
    text: Mapping[str, Range]
    extra: tuple[TensorSpec, ...] = ()
    rows_per_sample: int = 2


def denoiser_spec(facts: DenoiserFacts, *, history: int, max_batch: int) -> StageSpec:
    """A whole step (export/graph/step.py)."""
    image = ("batch", facts.channels, "height", "width")
    past = ("batch", history, facts.channels, "height", "width")
    columns = len(denoise.coefficient_columns(history, noise=False))
    return StageSpec(
        DENOISER,
        inputs=(
            TensorSpec(denoise.LATENTS, DType.FLOAT32, image),
            TensorSpec(denoise.ROW_OF, DType.INT64, ("rows",)),
            TensorSpec(denoise.TIMESTEP, DType.FLOAT32, ("batch",)),
            TensorSpec(denoise.GUIDANCE_WEIGHTS, DType.FLOAT32, ("batch", "rows")),
            TensorSpec(denoise.COEFFICIENTS, DType.FLOAT32, ("batch", columns)),
            TensorSpec(denoise.HISTORY, DType.FLOAT32, past),
            *facts.conditioning,
            *facts.extra,
        ),
        outputs=(
            TensorSpec(denoise.NEXT_LATENTS, DType.FLOAT32, image),
            TensorSpec(denoise.X0, DType.FLOAT32, image),
            TensorSpec(denoise.NEXT_HISTORY, DType.FLOAT32, past),
            TensorSpec(denoise.STATS, DType.FLOAT32, ("batch", STATS)),
        ),
        profile={
            "batch": Range(1, 1, max_batch),
            "rows": _rows(facts, max_batch),
            **facts.sizes,
            **facts.text,
        },
    )


def network_spec(facts: DenoiserFacts, *, dtype: DType, max_batch: int) -> StageSpec:
    """The denoiser without the step around it: for parity, and for guidance that is not a weighted sum."""
    return StageSpec(
        NETWORK,
        inputs=(
            TensorSpec(denoise.LATENTS, dtype, ("rows", facts.channels, "height", "width")),
            TensorSpec(denoise.TIMESTEP, DType.FLOAT32, ("rows",)),
            *facts.conditioning,
            *facts.extra,
        ),
        outputs=(TensorSpec("prediction", dtype, ("rows", facts.out_channels, "height", "width")),),
        profile={"rows": _rows(facts, max_batch), **facts.sizes, **facts.text},
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
        f"image_{name}": Range(r.min * scale, r.opt * scale, r.max * scale, scale)
        for name, r in cells.items()
    }
    batch = {"batch": Range(1, 1, max_batch)}
    picture = TensorSpec("image", DType.FLOAT32, ("batch", 3, "image_height", "image_width"))
    latent = TensorSpec("latents", DType.FLOAT32, ("batch", latents.channels, "height", "width"))
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
    for axis, (name, default) in enumerate((("height", defaults.height), ("width", defaults.width))):
        if default % (cells * step):
            raise UsageError(
                f"resolution {default} is not a multiple of {cells * step}",
                hint="take a multiple: the VAE and the patches divide the picture",
            )
        sides = [size[axis] for size in defaults.bins] or [default // 2, default * 2]
        low, high = min(sides) // cells // step * step, max(sides) // cells // step * step
        ranges[name] = Range(max(step, low), default // cells, min(high, largest or high), step)
    return ranges


def history_length(scheduler: SchedulerParams) -> int:
    """One even for Euler, whose column is zero: every engine then takes both kinds of sampler."""
    return max(1, scheduler.history_length)


def companion_precision(options: BuildOptions) -> Precision:
    """Of stages that overflow in fp16 (text encoders, VAEs) beside the denoiser.

    ONNX Runtime's CPU provider has no bf16: beside a 16-bit ONNX denoiser they stay fp32.
    """
    exact = options.base is Precision.FP32 or not options.builds_engines
    return Precision.FP32 if exact else Precision.BF16


def check_precision(options: BuildOptions, family: str) -> None:
    """Refuse a denoiser in a type that the networks are not built in. Raises UsageError."""
    if options.base not in TORCH_DTYPES:
        raise UsageError(
            f"precision {options.base.value} is not built for {family}",
            hint=f"take one of {', '.join(p.value for p in TORCH_DTYPES)}",
        )


def _rows(facts: DenoiserFacts, max_batch: int) -> Range:
    return Range(1, 2, facts.rows_per_sample * max_batch)
