"""Sana (NVlabs): linear DiT, DC-AE, Gemma-2. The only file that knows the family.

Sources: arXiv 2410.10629 (Sana), 2501.18427 (SANA-1.5); diffusers 0.42.1 pipelines/sana/pipeline_sana.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ditc.export.models.sana import load_sana
from ditc.export.models.sana_config import SanaConfig
from ditc.export.resolution_bins import resolution_bins
from ditc.export.scheduler_config import scheduler_params
from ditc.export.stages import BuildOptions, ModelPlan, StageModule, StagePlan
from ditc.export.step import wrap
from ditc.export.tokenizer import tokenizer_json
from ditc.runtime.errors import CheckpointError
from ditc.runtime.manifest import Defaults, LatentSpec, Tiling
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
from ditc.runtime.text import Select, TextSpec

# SanaPipeline.__call__'s defaults, diffusers 0.42.1.
MAX_SEQUENCE_LENGTH = 300
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 4.5
COMPLEX_HUMAN_INSTRUCTION = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image"
    " generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial"
    " relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping"
    " peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street"
    " lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass"
    " skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary"
    " or evaluations:",
    "User Prompt: ",
)
COMPONENTS = {
    TEXT_ENCODER: "text_encoder",
    CONDITIONER: "transformer",
    DENOISER: "transformer",
    NETWORK: "transformer",
    VAE_DECODER: "vae",
    VAE_ENCODER: "vae",
}
# The pipeline picks its table of aspect ratios by the transformer's sample_size.
BINS_BY_SAMPLE_SIZE = {16: 512, 32: 1024, 64: 2048, 128: 4096}


class SanaAdapter:
    """Plans and loads the five stages of a Sana checkpoint in diffusers layout."""

    family = "sana"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer is diffusers' SanaTransformer2DModel."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.config.get("_class_name") == "SanaTransformer2DModel"

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Everything that configs tell.

        Raises:
            CheckpointError: a config that these networks do not implement. UsageError: a precision that is refused.
        """
        transformer = SanaConfig.from_json(checkpoint.component("transformer").config)
        vae = DcAeConfig.from_json(checkpoint.component("vae").config)
        check_precision(options, "Sana")
        text = _text_spec(checkpoint)
        scheduler = scheduler_params(checkpoint.scheduler_config, timestep_scale=transformer.timestep_scale)
        defaults = _defaults(checkpoint, transformer, vae, options)
        latents = LatentSpec(transformer.in_channels, vae.scale_factor, transformer.patch_size)
        shapes = _Shapes(transformer, text, latent_ranges(defaults, latents), options)
        return ModelPlan(
            family=self.family,
            stages=shapes.stages(latents, history_length(scheduler), tiled=defaults.tiling is not None),
            text=(text,),
            scheduler=scheduler,
            latents=latents,
            defaults=defaults,
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """One stage with its weights."""
        spec, precision = plan.stages[stage].spec, plan.stages[stage].precision
        dtype = TORCH_DTYPES[precision]
        integers: Mapping[str, int] = {}
        module: torch.nn.Module
        if stage == TEXT_ENCODER:
            component = checkpoint.component("text_encoder")
            module = load_gemma2(component.config, component.tensors, dtype)
            integers = {"input_ids": int(component.config["vocab_size"])}
        elif stage in (CONDITIONER, DENOISER, NETWORK):
            component = checkpoint.component("transformer")
            config = SanaConfig.from_json(component.config)
            conditioner, denoiser = load_sana(config, component.tensors, dtype)
            module = conditioner if stage == CONDITIONER else denoiser
            if stage == DENOISER:
                module = wrap(denoiser, dtype=dtype, history_length=history_length(plan.scheduler))
        else:
            component = checkpoint.component("vae")
            vae = DcAeConfig.from_json(component.config)
            load = load_decoder if stage == VAE_DECODER else load_encoder
            module = load(vae, component.tensors, dtype)
        return StageModule(
            spec=spec,
            precision=precision,
            module=module,
            weights=tuple(weight_map({stage: module}, component.tensors)),
            integers=integers,
        )


class _Shapes:
    """The specs of the stages: names, element types and ranges."""

    def __init__(
        self, transformer: SanaConfig, text: TextSpec, sizes: dict[str, Range], options: BuildOptions
    ) -> None:
        self.transformer, self.text, self.sizes, self.options = transformer, text, sizes, options

    def stages(self, latents: LatentSpec, history: int, *, tiled: bool) -> dict[str, StagePlan]:
        """All plans, in the order in which a picture needs them."""
        denoiser, batch = self.options.base, self.options.max_batch
        # Gemma overflows in fp16 (NVlabs' README: bf16 or fp32), and so does DC-AE.
        others = companion_precision(self.options)
        facts = self._denoiser()
        specs = {
            TEXT_ENCODER: self._text_encoder(),
            CONDITIONER: self._conditioner(),
            DENOISER: denoiser_spec(facts, history=history, max_batch=batch),
            **vae_specs(latents, self.sizes, max_batch=batch, tiled=tiled),
        }
        if self.options.raw:
            specs[NETWORK] = network_spec(facts, dtype=STAGE_DTYPES[denoiser], max_batch=batch)
        return {
            name: StagePlan(
                spec=spec,
                precision=denoiser if COMPONENTS[name] == "transformer" else others,
                components=(COMPONENTS[name],),
            )
            for name, spec in specs.items()
        }

    def _text_encoder(self) -> StageSpec:
        length = max(self.text.max_length, self.text.negative_max_length)
        return StageSpec(
            TEXT_ENCODER,
            inputs=(
                TensorSpec("input_ids", DType.INT64, ("batch", "length")),
                TensorSpec("attention_mask", DType.INT64, ("batch", "length")),
            ),
            outputs=(
                TensorSpec(
                    "text_embeds", DType.FLOAT32, ("batch", "length", self.transformer.caption_channels)
                ),
            ),
            profile={
                "batch": Range(1, 1, self.options.max_batch),
                "length": Range(1, self.text.max_length, length),
            },
        )

    def _conditioner(self) -> StageSpec:
        rows, text = "rows", "text_length"
        return StageSpec(
            CONDITIONER,
            inputs=(
                TensorSpec("text_embeds", DType.FLOAT32, (rows, text, self.transformer.caption_channels)),
                TensorSpec("text_mask", DType.INT64, (rows, text)),
            ),
            outputs=self._conditioning(),
            profile={rows: Range(1, 1, 2 * self.options.max_batch), **self._text_range()},
        )

    def _conditioning(self) -> tuple[TensorSpec, ...]:
        config = self.transformer
        kv = ("rows", config.num_layers, 2, "text_length", config.cross_width)
        return (
            TensorSpec("cross_kv", STAGE_DTYPES[self.options.base], kv),
            TensorSpec("text_bias", DType.FLOAT32, ("rows", "text_length")),
        )

    def _denoiser(self) -> DenoiserFacts:
        return DenoiserFacts(
            channels=self.transformer.in_channels,
            out_channels=self.transformer.out_channels,
            conditioning=self._conditioning(),
            sizes=self.sizes,
            text=self._text_range(),
        )

    def _text_range(self) -> dict[str, Range]:
        return {"text_length": Range(1, self.text.length, self.text.length)}


def _text_spec(checkpoint: Checkpoint) -> TextSpec:
    """SanaPipeline.encode_prompt (diffusers 0.42.1) as data.

    With the complex human instruction, 1 and length - 1 positions are kept: <bos>, and the prompt without the
    instruction before it (SANA, arXiv 2410.10629, section 3.1).
    """
    directory = checkpoint.tokenizers["tokenizer"]
    length = int(checkpoint.defaults.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    lines = checkpoint.defaults.get("complex_human_instruction", COMPLEX_HUMAN_INSTRUCTION)
    prefix = "\n".join(lines) if lines else ""
    tokenizer = RustTokenizer.from_str(tokenizer_json(directory))
    # The instruction is counted with its <bos>, hence 2 less: <bos> and one token of slack, as upstream has it.
    longest = len(tokenizer.encode(prefix).ids) + length - 2 if prefix else length
    return TextSpec(
        stage=TEXT_ENCODER,
        tokenizer="tokenizer/tokenizer.json",
        mask="text_mask",
        max_length=longest,
        negative_max_length=length,
        prefix=prefix,
        length=length,
        lower=True,
        strip=True,
        pad_token_id=_pad_token(tokenizer),
        select=Select(first=1, last=length - 1) if prefix else None,
    )


def _pad_token(tokenizer: RustTokenizer) -> int:
    token: int | None = tokenizer.token_to_id("<pad>")
    if token is None:
        raise CheckpointError("tokenizer.json has no <pad> token", hint="Gemma's tokenizers have one")
    return token


def _defaults(
    checkpoint: Checkpoint, transformer: SanaConfig, vae: DcAeConfig, options: BuildOptions
) -> Defaults:
    given: dict[str, Any] = checkpoint.defaults
    native = transformer.sample_size * vae.scale_factor
    side = options.resolution or native
    bins: Sequence[Sequence[int]] = ()
    if "resolution_bins" in given:
        bins = given["resolution_bins"] or ()
    elif side == BINS_BY_SAMPLE_SIZE.get(transformer.sample_size):
        bins = resolution_bins(side)
    return Defaults(
        height=options.resolution or int(given.get("height", side)),
        width=options.resolution or int(given.get("width", side)),
        num_inference_steps=int(given.get("num_inference_steps", NUM_INFERENCE_STEPS)),
        guidance_scale=float(given.get("guidance_scale", GUIDANCE_SCALE)),
        bins=tuple((height, width) for height, width in bins),
        # enable_tiling's defaults in AutoencoderDC, diffusers 0.42.1; needed from 2K on (upstream README: 4K).
        tiling=Tiling(tile=512, stride=448) if native >= 4096 else None,
    )
