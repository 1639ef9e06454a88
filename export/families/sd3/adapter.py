"""Stable Diffusion 3 and 3.5 (Stability AI): MMDiT, two CLIPs, T5, a 16-channel VAE. The only file that knows it.

Sources: arXiv 2403.03206; diffusers 0.42.1, StableDiffusion3Pipeline; Stability-AI/sd3.5 (skip-layer guidance).
SD3-medium, SD3.5-medium (MMDiT-X), SD3.5-large and its turbo differ in their configs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.scheduler_config import scheduler_params
from ditc.export.checkpoint.tokenizer import tokenizer_facts
from ditc.export.contract import BuildOptions, JsonValue, ModelPlan, StageModule, StagePlan
from ditc.export.families.common.specs import (
    STAGE_DTYPES,
    TORCH_DTYPES,
    DenoiserFacts,
    check_precision,
    companion_precision,
    denoiser_spec,
    latent_ranges,
    network_spec,
    step_contract,
    vae_specs,
)
from ditc.export.families.sd3.config import Sd3Config
from ditc.export.families.sd3.network import load_sd3
from ditc.export.graph.step import wrap
from ditc.export.networks.autoencoder_kl import AutoencoderKlConfig, load_kl_decoder, load_kl_encoder
from ditc.export.networks.clip import load_clip
from ditc.export.networks.joint_text import JointText
from ditc.export.networks.loading import weight_map
from ditc.export.networks.t5 import load_t5
from ditc.runtime.bundle.manifest import Defaults, LatentSpec, SkipLayerGuidance
from ditc.runtime.conditioning import POOLED, TEXT_EMBEDS
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.spec import (
    CONDITIONER,
    DENOISER,
    NETWORK,
    TEXT_ENCODER,
    VAE_DECODER,
    DType,
    Precision,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.step_contract import BATCH, ROWS, TEXT_LENGTH
from ditc.runtime.text import TextSpec

CLIP_L, CLIP_G, T5 = TEXT_ENCODER, f"{TEXT_ENCODER}_2", f"{TEXT_ENCODER}_3"
TOKENIZERS = {CLIP_L: "tokenizer", CLIP_G: "tokenizer_2", T5: "tokenizer_3"}
ENCODER_CLASS = {
    CLIP_L: "CLIPTextModelWithProjection",
    CLIP_G: "CLIPTextModelWithProjection",
    T5: "T5EncoderModel",
}

# StableDiffusion3Pipeline.__call__'s defaults and limit, diffusers 0.42.1.
MAX_SEQUENCE_LENGTH = 256
LONGEST_SEQUENCE = 512
NUM_INFERENCE_STEPS = 28
GUIDANCE_SCALE = 7.0
SKIP_SCALE, SKIP_START, SKIP_STOP = 2.8, 0.01, 0.2
# Stability's recommendation for SD3.5-medium, the family's one model with dual attention layers.
SKIP_LAYERS = (7, 8, 9)


class Sd3Adapter:
    """Plans and loads the stages of an SD3 or SD3.5 checkpoint in diffusers layout."""

    family = "sd3"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer is diffusers' SD3Transformer2DModel."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.config.get("_class_name") == "SD3Transformer2DModel"

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Everything that configs tell.

        Raises:
            CheckpointError: a text encoder is missing, or components of different models.
            UsageError: a precision or a size that this model does not draw.
        """
        facts = _Facts(checkpoint, options)
        return ModelPlan(
            family=self.family,
            stages=facts.stages(),
            text=facts.text,
            scheduler=facts.scheduler,
            latents=facts.latents,
            defaults=facts.defaults,
            step=facts.step,
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """One stage with its weights."""
        spec, precision = plan.stages[stage].spec, plan.stages[stage].precision
        if stage == CONDITIONER:
            module: nn.Module = _joint_text(plan)
            return StageModule(spec=spec, precision=precision, module=module, weights=())
        dtype = TORCH_DTYPES[precision]
        component = checkpoint.component(plan.stages[stage].components[0])
        integers: Mapping[str, int] = {}
        if stage in TOKENIZERS:
            module = (load_t5 if stage == T5 else load_clip)(component.config, component.tensors, dtype)
            integers = {"input_ids": int(component.config["vocab_size"])}
        elif stage in (DENOISER, NETWORK):
            skip = plan.defaults.skip_layer_guidance
            network = load_sd3(
                Sd3Config.from_json(component.config),
                component.tensors,
                dtype,
                skip_layers=skip.layers if skip else (),
                stage=stage,
            )
            module = network
            if stage == DENOISER:
                module = wrap(network, dtype=dtype, contract=plan.step)
        else:
            load = load_kl_decoder if stage == VAE_DECODER else load_kl_encoder
            module = load(AutoencoderKlConfig.from_json(component.config), component.tensors, dtype)
        return StageModule(
            spec=spec,
            precision=precision,
            module=module,
            weights=tuple(weight_map({stage: module}, component.tensors)),
            integers=integers,
        )


class _Facts:
    """What the configs of one checkpoint say, read and held against each other once."""

    def __init__(self, checkpoint: Checkpoint, options: BuildOptions) -> None:
        check_precision(options, "SD3")
        self.options = options
        self.transformer = Sd3Config.from_json(checkpoint.component("transformer").config)
        vae = AutoencoderKlConfig.from_json(checkpoint.component("vae").config)
        self.encoders = _encoders(checkpoint)
        _check_widths(self.transformer, self.encoders, vae.latent_channels)
        self.latents = LatentSpec(self.transformer.in_channels, vae.scale_factor, self.transformer.patch_size)
        self.scheduler = scheduler_params(checkpoint.scheduler_config)
        self.sequence_length = _sequence_length(checkpoint.defaults)
        self.defaults = _defaults(checkpoint.defaults, self.transformer, self.latents, options)
        gated = self.defaults.skip_layer_guidance is not None
        self.step = step_contract(self.scheduler, skip_gate=gated)
        self.sizes = latent_ranges(self.defaults, self.latents, largest=self.transformer.largest_side)
        self.text = tuple(self._text(checkpoint, stage) for stage in self.encoders)

    def stages(self) -> dict[str, StagePlan]:
        """All plans, in the order in which a picture needs them."""
        batch, base, others = self.options.max_batch, self.options.base, companion_precision(self.options)
        facts, skip = self._denoiser(), self.defaults.skip_layer_guidance
        gate: dict[str, JsonValue] = {"skip_layers": list(skip.layers)} if skip else {}
        plans = {
            stage: StagePlan(spec=self._encoder(stage), precision=others, components=(stage,))
            for stage in self.encoders
        }
        plans[CONDITIONER] = StagePlan(
            spec=self._conditioner(),
            precision=Precision.FP32,  # it only lays tensors side by side
            components=(),
            facts={"zero_tokens": 0 if T5 in self.encoders else self.sequence_length},
        )
        specs = {DENOISER: denoiser_spec(facts, max_batch=batch)}
        if self.options.raw:
            specs[NETWORK] = network_spec(facts, dtype=STAGE_DTYPES[base], max_batch=batch)
        for stage, spec in specs.items():
            plans[stage] = StagePlan(spec=spec, precision=base, components=("transformer",), facts=gate)
        for stage, spec in vae_specs(self.latents, self.sizes, max_batch=batch).items():
            plans[stage] = StagePlan(spec=spec, precision=others, components=("vae",))
        return plans

    def _text(self, checkpoint: Checkpoint, stage: str) -> TextSpec:
        """CLIP's tokens are 77 (the first tokenizer's limit), T5's max_sequence_length; there is no mask anywhere."""
        facts = tokenizer_facts(checkpoint.tokenizers[TOKENIZERS[stage]])
        length = self.sequence_length
        if stage != T5:
            length = tokenizer_facts(checkpoint.tokenizers[TOKENIZERS[CLIP_L]]).model_max_length
            longest = int(self.encoders[stage]["max_position_embeddings"])
            if length > longest:
                raise CheckpointError(
                    f"{TOKENIZERS[CLIP_L]} gives {length} tokens, {stage} has positions for {longest}",
                    hint="set model_max_length in tokenizer_config.json: CLIP's is 77",
                )
        return TextSpec(
            stage=stage,
            tokenizer=f"{TOKENIZERS[stage]}/tokenizer.json",
            length=length,
            max_length=length,
            negative_max_length=length,
            pad_token_id=facts.pad_token_id,
        )

    def _encoder(self, stage: str) -> StageSpec:
        """T5's length is dynamic, so that a build with another max_sequence_length reuses it; CLIP's is its own."""
        length = next(text.length for text in self.text if text.stage == stage)
        tokens: str | int = "length" if stage == T5 else length
        profile = {BATCH: Range(1, 1, self.options.max_batch)}
        if stage == T5:
            profile["length"] = Range(1, length, max(length, LONGEST_SEQUENCE))
        return StageSpec(
            stage,
            inputs=(TensorSpec("input_ids", DType.INT64, (BATCH, tokens)),),
            outputs=self._states(stage, BATCH, tokens),
            profile=profile,
        )

    def _states(self, stage: str, rows: str, tokens: str | int) -> tuple[TensorSpec, ...]:
        """What an encoder gives, which the conditioner takes under the same names."""
        config, name = self.encoders[stage], stage.removeprefix(f"{TEXT_ENCODER}")
        if stage == T5:
            return (TensorSpec(f"states{name}", DType.FLOAT32, (rows, tokens, int(config["d_model"]))),)
        return (
            TensorSpec(f"states{name}", DType.FLOAT32, (rows, tokens, int(config["hidden_size"]))),
            TensorSpec(f"pooled{name}", DType.FLOAT32, (rows, int(config["projection_dim"]))),
        )

    def _conditioner(self) -> StageSpec:
        inputs: list[TensorSpec] = []
        for text in self.text:
            inputs += self._states(text.stage, ROWS, "length" if text.stage == T5 else text.length)
        profile = {ROWS: Range(1, 1, 2 * self.options.max_batch)}
        if T5 in self.encoders:
            profile["length"] = Range(1, self.sequence_length, max(self.sequence_length, LONGEST_SEQUENCE))
        return StageSpec(
            CONDITIONER,
            inputs=tuple(inputs),
            outputs=self._conditioning(),
            profile={**profile, **self._text_range()},
        )

    def _conditioning(self) -> tuple[TensorSpec, ...]:
        config = self.transformer
        return (
            TensorSpec(TEXT_EMBEDS, DType.FLOAT32, (ROWS, TEXT_LENGTH, config.joint_attention_dim)),
            TensorSpec(POOLED, DType.FLOAT32, (ROWS, config.pooled_projection_dim)),
        )

    def _denoiser(self) -> DenoiserFacts:
        return DenoiserFacts(
            channels=self.transformer.in_channels,
            out_channels=self.transformer.out_channels,
            conditioning=self._conditioning(),
            sizes=self.sizes,
            text=self._text_range(),
            step=self.step,
        )

    def _text_range(self) -> dict[str, Range]:
        """From embeddings of one token that users bring, to CLIP's tokens and the longest T5 text."""
        clip = self.text[0].length
        usual = clip + self.sequence_length
        return {TEXT_LENGTH: Range(1, usual, max(usual, clip + LONGEST_SEQUENCE))}


def _encoders(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Configs of the text encoders there are, by stage. T5 may be left out, as users do for its size."""
    found = {}
    for stage, wanted in ENCODER_CLASS.items():
        component = checkpoint.components.get(stage)
        if component is None and stage == T5:
            continue
        if component is None or TOKENIZERS[stage] not in checkpoint.tokenizers:
            missing = stage if component is None else TOKENIZERS[stage]
            raise CheckpointError(
                f"{checkpoint.path} has no {missing}, a {wanted if component is None else 'tokenizer'}",
                hint=f"of the three text encoders only {T5} (T5) can be left out: null in model_index.json",
            )
        classes = component.config.get("architectures") or [wanted]
        if wanted not in classes:
            raise CheckpointError(
                f"{checkpoint.path / stage} is a {classes[0]}, not a {wanted}",
                hint="take the text encoders that the checkpoint was published with",
            )
        found[stage] = component.config
    return found


def _check_widths(transformer: Sd3Config, encoders: Mapping[str, Mapping[str, Any]], channels: int) -> None:
    """Refuse a checkpoint put together from parts of different models."""
    clips = (CLIP_L, CLIP_G)
    pooled = sum(int(encoders[stage]["projection_dim"]) for stage in clips)
    states = sum(int(encoders[stage]["hidden_size"]) for stage in clips)
    wide = transformer.joint_attention_dim
    for wrong, what in (
        (pooled != transformer.pooled_projection_dim, f"the CLIPs give {pooled} pooled channels together"),
        (states > wide, f"the CLIPs' states have {states} channels together"),
        (
            T5 in encoders and encoders[T5]["d_model"] != wide,
            f"{T5} gives {encoders.get(T5, {}).get('d_model')}",
        ),
        (channels != transformer.in_channels, f"the VAE has {channels} latent channels"),
    ):
        if wrong:
            raise CheckpointError(
                f"{what}, the transformer takes {transformer.pooled_projection_dim} pooled channels, text of {wide} "
                f"and {transformer.in_channels} latent channels",
                hint="the components are of different models",
            )


def _sequence_length(given: Mapping[str, Any]) -> int:
    length = int(given.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    if length > LONGEST_SEQUENCE:
        raise CheckpointError(
            f"ditc.json: max_sequence_length is {length}",
            hint=f"T5 reads up to {LONGEST_SEQUENCE} tokens here",
        )
    return length


def _defaults(
    given: Mapping[str, Any], transformer: Sd3Config, latents: LatentSpec, options: BuildOptions
) -> Defaults:
    native = transformer.sample_size * latents.scale_factor
    height = options.resolution or int(given.get("height", native))
    width = options.resolution or int(given.get("width", native))
    largest = transformer.largest_side * latents.scale_factor
    for side in (height, width):
        if side > largest:
            raise UsageError(
                f"{side} pixels are more than the position embedding covers: {largest} a side "
                f"({transformer.pos_embed_max_size} patches)",
                hint=f"take a resolution of at most {largest}",
            )
    return Defaults(
        height=height,
        width=width,
        num_inference_steps=int(given.get("num_inference_steps", NUM_INFERENCE_STEPS)),
        guidance_scale=float(given.get("guidance_scale", GUIDANCE_SCALE)),
        skip_layer_guidance=_skip_layer_guidance(given, transformer),
    )


def _skip_layer_guidance(given: Mapping[str, Any], transformer: Sd3Config) -> SkipLayerGuidance | None:
    """On by default where the checkpoint names layers, as in diffusers; ready but off for SD3.5-medium's form."""
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


def _joint_text(plan: ModelPlan) -> JointText:
    zero_tokens = plan.stages[CONDITIONER].facts["zero_tokens"]
    assert isinstance(zero_tokens, int)
    width = plan.stages[CONDITIONER].spec.output(TEXT_EMBEDS).shape[2]
    assert isinstance(width, int)
    return JointText(width, zero_tokens)
