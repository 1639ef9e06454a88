"""lucidrains/mmdit 0.3.0 trunks as denoisers, with a Gemma-2 text encoder and a DC-AE. The only file that knows this.

Upstream is a trunk alone: no patches, time, positions, text, sampler or weights, and so no checkpoint layout. Ours is a
diffusers directory (docs/mmdit.md):

    model_index.json   _class_name LucidrainsMMDiTPipeline
    transformer/       config.json (export/models/mmdit_config.py), safetensors under the names of mmdit_denoiser.py
    text_encoder/, tokenizer/, vae/, scheduler/   as transformers and diffusers save them
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer as RustTokenizer

from ditc.export.adapters.specs import (
    STAGE_DTYPES,
    TORCH_DTYPES,
    DenoiserFacts,
    check_precision,
    companion_precision,
    denoiser_spec,
    history_length,
    latent_ranges,
    network_spec,
    vae_specs,
)
from ditc.export.checkpoint import Checkpoint
from ditc.export.models.dc_ae import DcAeConfig, load_decoder, load_encoder
from ditc.export.models.gemma2 import load_gemma2
from ditc.export.models.loading import weight_map
from ditc.export.models.mmdit_config import CLASS_NAME, MMDiTConfig
from ditc.export.models.mmdit_denoiser import load_mmdit
from ditc.export.scheduler_config import scheduler_params
from ditc.export.stages import BuildOptions, ModelPlan, StageModule, StagePlan
from ditc.export.step import wrap
from ditc.export.tokenizer import tokenizer_json
from ditc.runtime.errors import CheckpointError
from ditc.runtime.manifest import Defaults, LatentSpec
from ditc.runtime.spec import (
    CONDITIONER,
    DENOISER,
    NETWORK,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    DType,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.text import TextSpec

# Upstream has no pipeline: these are StableDiffusion3Pipeline's (diffusers 0.42.1), the length is Gemma's in Sana.
NUM_INFERENCE_STEPS = 28
GUIDANCE_SCALE = 7.0
MAX_SEQUENCE_LENGTH = 300
COMPONENTS = {
    TEXT_ENCODER: "text_encoder",
    CONDITIONER: "transformer",
    DENOISER: "transformer",
    NETWORK: "transformer",
    VAE_DECODER: "vae",
    VAE_ENCODER: "vae",
}


class LucidrainsMMDiTAdapter:
    """Plans and loads the five stages of such a checkpoint."""

    family = "mmdit"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer is ours around upstream's trunk."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.config.get("_class_name") == CLASS_NAME

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Everything that configs tell.

        Raises:
            CheckpointError: a config that these networks do not implement. UsageError: a precision that is refused.
        """
        check_precision(options, "lucidrains/mmdit")
        transformer = MMDiTConfig.from_json(checkpoint.component("transformer").config)
        vae = DcAeConfig.from_json(checkpoint.component("vae").config)
        _check_widths(checkpoint, transformer, vae)
        text = _text_spec(checkpoint)
        scheduler = scheduler_params(checkpoint.scheduler_config, timestep_scale=transformer.timestep_scale)
        defaults = _defaults(checkpoint.defaults, transformer.sample_size * vae.scale_factor, options)
        latents = LatentSpec(transformer.in_channels, vae.scale_factor, transformer.patch_size)
        sizes = latent_ranges(defaults, latents)
        facts = _facts(transformer, text, sizes, options)
        batch = options.max_batch
        specs = {
            TEXT_ENCODER: _text_encoder(transformer, text, batch),
            CONDITIONER: _conditioner(transformer, facts, batch),
            DENOISER: denoiser_spec(facts, history=history_length(scheduler), max_batch=batch),
            **vae_specs(latents, sizes, max_batch=batch),
        }
        if options.raw:
            specs[NETWORK] = network_spec(facts, dtype=STAGE_DTYPES[options.base], max_batch=batch)
        return ModelPlan(
            family=self.family,
            stages={name: _stage_plan(name, spec, options) for name, spec in specs.items()},
            text=(text,),
            scheduler=scheduler,
            latents=latents,
            defaults=defaults,
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """One stage with its weights."""
        spec, precision = plan.stages[stage].spec, plan.stages[stage].precision
        dtype, component = TORCH_DTYPES[precision], checkpoint.component(COMPONENTS[stage])
        integers: Mapping[str, int] = {}
        module: torch.nn.Module
        if stage == TEXT_ENCODER:
            module = load_gemma2(component.config, component.tensors, dtype)
            integers = {"input_ids": int(component.config["vocab_size"])}
        elif stage in (VAE_DECODER, VAE_ENCODER):
            load = load_decoder if stage == VAE_DECODER else load_encoder
            module = load(DcAeConfig.from_json(component.config), component.tensors, dtype)
        else:
            config = MMDiTConfig.from_json(component.config)
            conditioner, denoiser = load_mmdit(config, component.tensors, dtype)
            module = conditioner if stage == CONDITIONER else denoiser
            if stage == DENOISER:
                module = wrap(denoiser, dtype=dtype, history_length=history_length(plan.scheduler))
        return StageModule(
            spec=spec,
            precision=precision,
            module=module,
            weights=tuple(weight_map({stage: module}, component.tensors)),
            integers=integers,
        )


def _stage_plan(name: str, spec: StageSpec, options: BuildOptions) -> StagePlan:
    is_network = COMPONENTS[name] == "transformer"
    precision = options.base if is_network else companion_precision(options)
    return StagePlan(spec=spec, precision=precision, components=(COMPONENTS[name],))


def _check_widths(checkpoint: Checkpoint, transformer: MMDiTConfig, vae: DcAeConfig) -> None:
    """Components of different models each load, and fail at the first picture."""
    hidden = checkpoint.component("text_encoder").config.get("hidden_size")
    for what, found, wanted in (
        ("the text encoder's states have", hidden, transformer.caption_channels),
        ("the VAE's latents have", vae.latent_channels, transformer.in_channels),
        ("the prediction has", transformer.out_channels, transformer.in_channels),
    ):
        if found != wanted:
            raise CheckpointError(
                f"{what} {found} channels, the transformer's config asks for {wanted}",
                hint="the components belong to different models, or transformer/config.json is wrong",
            )


def _facts(
    transformer: MMDiTConfig, text: TextSpec, sizes: Mapping[str, Range], options: BuildOptions
) -> DenoiserFacts:
    rows, length = "rows", "text_length"
    return DenoiserFacts(
        channels=transformer.in_channels,
        out_channels=transformer.out_channels,
        conditioning=(
            TensorSpec("text_tokens", STAGE_DTYPES[options.base], (rows, length, transformer.dims[0])),
            TensorSpec("key_mask", DType.FLOAT32, (rows, length)),
        ),
        sizes=sizes,
        text={length: Range(1, text.length, text.length)},
    )


def _text_encoder(transformer: MMDiTConfig, text: TextSpec, max_batch: int) -> StageSpec:
    tokens = ("batch", "length")
    return StageSpec(
        TEXT_ENCODER,
        inputs=(
            TensorSpec("input_ids", DType.INT64, tokens),
            TensorSpec("attention_mask", DType.INT64, tokens),
        ),
        outputs=(TensorSpec("text_embeds", DType.FLOAT32, (*tokens, transformer.caption_channels)),),
        profile={"batch": Range(1, 1, max_batch), "length": Range(1, text.max_length, text.max_length)},
    )


def _conditioner(transformer: MMDiTConfig, facts: DenoiserFacts, max_batch: int) -> StageSpec:
    rows, length = "rows", "text_length"
    return StageSpec(
        CONDITIONER,
        inputs=(
            TensorSpec("text_embeds", DType.FLOAT32, (rows, length, transformer.caption_channels)),
            TensorSpec("text_mask", DType.INT64, (rows, length)),
        ),
        outputs=facts.conditioning,
        profile={rows: Range(1, 1, facts.rows_per_sample * max_batch), **facts.text},
    )


def _text_spec(checkpoint: Checkpoint) -> TextSpec:
    """The prompt as it is, cut and padded on the right to one length; padding is masked."""
    if "tokenizer" not in checkpoint.tokenizers:
        raise CheckpointError(f"{checkpoint.path} has no tokenizer", hint="save it into tokenizer/")
    tokenizer = RustTokenizer.from_str(tokenizer_json(checkpoint.tokenizers["tokenizer"]))
    pad_token_id = tokenizer.token_to_id("<pad>")
    if pad_token_id is None:
        raise CheckpointError("tokenizer.json has no <pad> token", hint="Gemma's tokenizers have one")
    length = int(checkpoint.defaults.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    return TextSpec(
        stage=TEXT_ENCODER,
        tokenizer="tokenizer/tokenizer.json",
        mask="text_mask",
        max_length=length,
        negative_max_length=length,
        length=length,
        pad_token_id=pad_token_id,
    )


def _defaults(given: Mapping[str, Any], native: int, options: BuildOptions) -> Defaults:
    side = options.resolution or native
    return Defaults(
        height=options.resolution or int(given.get("height", side)),
        width=options.resolution or int(given.get("width", side)),
        num_inference_steps=int(given.get("num_inference_steps", NUM_INFERENCE_STEPS)),
        guidance_scale=float(given.get("guidance_scale", GUIDANCE_SCALE)),
        bins=tuple((height, width) for height, width in given.get("resolution_bins") or ()),
    )
