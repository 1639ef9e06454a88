"""Companions are the text encoder and the VAE of a denoiser; this is what families with one text encoder share.

The plans and defaults fit any such text encoder and any VAE. `load_companion` loads Gemma-2 and DC-AE; a family that
takes other kinds loads those itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ditc.export.checkpoint.open import Component
from ditc.export.contract import JsonValue, StageModule, StagePlan
from ditc.export.families.common.specs import (
    STAGE_DTYPES,
    TORCH_DTYPES,
    DenoiserFacts,
    companion_precision,
    denoiser_spec,
    network_spec,
    vae_specs,
)
from ditc.export.networks.dc_ae import DcAeConfig, load_decoder, load_encoder
from ditc.export.networks.gemma2 import load_gemma2
from ditc.export.networks.loading import weight_map
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import Defaults, LatentSpec, PerturbedAttentionGuidance, Tiling
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import (
    CONDITIONER,
    CONTROL_CONDITIONER,
    CONTROLNET,
    DENOISER,
    NETWORK,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_DECODER_NEXT,
    VAE_ENCODER,
    DType,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.step_contract import BATCH, ROWS, TEXT_LENGTH
from ditc.runtime.text import LENGTH_STEP, TextSpec

COMPONENTS = {
    TEXT_ENCODER: "text_encoder",
    CONDITIONER: "transformer",
    DENOISER: "transformer",
    NETWORK: "transformer",
    VAE_DECODER: "vae",
    VAE_DECODER_NEXT: "vae",
    VAE_ENCODER: "vae",
    CONTROL_CONDITIONER: "controlnet",
    CONTROLNET: "controlnet",
}


def stage_plans(
    text: TextSpec,
    caption_channels: int,
    facts: DenoiserFacts,
    latents: LatentSpec,
    options: BuildOptions,
    *,
    tiling: Tiling | None = None,
    posterior: bool = False,
    gate: Mapping[str, JsonValue] | None = None,
    vae: Mapping[str, StageSpec] | None = None,
) -> dict[str, StagePlan]:
    """Plan all stages, in the order in which drawing a picture runs them.

    Gemma overflows in fp16 (NVlabs/Sana's README: bf16 or fp32), and so does DC-AE. Both therefore have the precision
    of companions, not the denoiser's.

    Args:
        posterior: whether the VAE's encoder has a posterior that is sampled.
        gate: what the denoiser's gate does; None if it has none.
        vae: specs of the VAE's stages; None for those of a VAE of pictures.
    """
    batch = options.max_batch
    specs = {
        TEXT_ENCODER: _text_encoder(text, caption_channels, batch),
        CONDITIONER: _conditioner(caption_channels, facts, batch),
        DENOISER: denoiser_spec(facts, max_batch=batch),
        **(vae or vae_specs(latents, facts.sizes, max_batch=batch, tiling=tiling, posterior=posterior)),
    }
    if options.raw:
        specs[NETWORK] = network_spec(facts, dtype=STAGE_DTYPES[options.base], max_batch=batch)
    others = companion_precision(options)
    return {
        name: StagePlan(
            spec=spec,
            precision=options.base if COMPONENTS[name] == "transformer" else others,
            components=(COMPONENTS[name],),
            facts=gate if gate and name in (DENOISER, NETWORK) else {},
        )
        for name, spec in specs.items()
    }


def load_companion(component: Component, plan: StagePlan) -> nn.Module:
    """Load the text encoder, or one half of the VAE, with its weights.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    dtype = TORCH_DTYPES[plan.precision]
    if plan.spec.name == TEXT_ENCODER:
        return load_gemma2(component.config, component.tensors, dtype)
    load = load_decoder if plan.spec.name == VAE_DECODER else load_encoder
    return load(DcAeConfig.from_json(component.config), component.tensors, dtype)


def stage_module(module: nn.Module, component: Component, plan: StagePlan) -> StageModule:
    """Describe a loaded module for the exporter."""
    name = plan.spec.name
    return StageModule(
        spec=plan.spec,
        precision=plan.precision,
        module=module,
        weights=tuple(weight_map({name: module}, component.tensors)),
        integers={"input_ids": vocabulary(module)} if name == TEXT_ENCODER else {},
    )


def vocabulary(text_encoder: nn.Module) -> int:
    """The size of a loaded text encoder's vocabulary."""
    size = text_encoder.vocab_size
    assert isinstance(size, int)
    return size


def check_widths(*, states: int, caption_channels: int, latent_channels: int, in_channels: int) -> None:
    """Refuse components of different models, each of which would load.

    Args:
        states: channels of the text encoder's states.
        caption_channels, in_channels: channels of the text and of the latents that the transformer takes.
        latent_channels: the VAE's.

    Raises:
        CheckpointError: two of the numbers differ that must be equal.
    """
    for what, found, wanted in (
        ("the text encoder's states have", states, caption_channels),
        ("the VAE's latents have", latent_channels, in_channels),
    ):
        if found != wanted:
            raise CheckpointError(
                f"{what} {found} channels, but the transformer's config asks for {wanted}",
                hint="the components belong to different models, or transformer/config.json is wrong",
            )


def text_range(text: TextSpec) -> dict[str, Range]:
    """The range of TEXT_LENGTH, the number of tokens that reach the denoiser."""
    return {TEXT_LENGTH: Range(1, text.length, text.length, varies=_varies(text))}


def _varies(text: TextSpec) -> bool | None:
    """Whether texts have different numbers of tokens, because padding is left out. None stands for no, as in Range."""
    return True if text.padding is not None and text.length > LENGTH_STEP else None


def defaults_of(
    given: Mapping[str, Any],
    native: int,
    options: BuildOptions,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    bins: Sequence[Sequence[int]] = (),
    tiling: Tiling | None = None,
    perturbed_attention_guidance: PerturbedAttentionGuidance | None = None,
) -> Defaults:
    """Choose the inference defaults: from the build's options first, then from ditc.json, then the family's.

    Args:
        given: the content of ditc.json.
        native: side of a picture in pixels, for a build whose options and ditc.json state no size.
        num_inference_steps, guidance_scale: the family's.
    """
    side = options.resolution or native
    return Defaults(
        height=options.resolution or int(given.get("height", side)),
        width=options.resolution or int(given.get("width", side)),
        num_inference_steps=int(given.get("num_inference_steps", num_inference_steps)),
        guidance_scale=float(given.get("guidance_scale", guidance_scale)),
        bins=tuple((height, width) for height, width in bins),
        tiling=tiling,
        perturbed_attention_guidance=perturbed_attention_guidance,
    )


def _text_encoder(text: TextSpec, caption_channels: int, max_batch: int) -> StageSpec:
    tokens = (BATCH, "length")
    longest = max(text.max_length, text.negative_max_length)
    return StageSpec(
        TEXT_ENCODER,
        inputs=(
            TensorSpec("input_ids", DType.INT64, tokens),
            TensorSpec("attention_mask", DType.INT64, tokens),
        ),
        outputs=(TensorSpec("text_embeds", DType.FLOAT32, (*tokens, caption_channels)),),
        profile={
            BATCH: Range(1, 1, max_batch),
            "length": Range(1, text.max_length, longest, varies=_varies(text)),
        },
    )


def _conditioner(caption_channels: int, facts: DenoiserFacts, max_batch: int) -> StageSpec:
    rows, length = ROWS, TEXT_LENGTH
    return StageSpec(
        CONDITIONER,
        inputs=(
            TensorSpec("text_embeds", DType.FLOAT32, (rows, length, caption_channels)),
            TensorSpec("text_mask", DType.INT64, (rows, length)),
        ),
        outputs=facts.conditioning,
        profile={rows: Range(1, 1, facts.step.rows_per_sample * max_batch), **facts.text},
    )
