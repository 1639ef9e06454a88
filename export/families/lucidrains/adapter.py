"""The adapter for lucidrains/mmdit 0.3.0: upstream's trunks as denoisers.

Upstream publishes only the trunk: it has no patches, time or position embedding, text encoder, sampler or weights, and
therefore no checkpoint layout. ditc defines one, which is a diffusers directory (docs/mmdit.md):

    model_index.json   _class_name LucidrainsMMDiTPipeline
    transformer/       config.json (see config.py), and safetensors with the parameter names of network.py
    text_encoder/, tokenizer/   Gemma-2 or T5, as transformers saves them
    vae/, scheduler/            AutoencoderDC or AutoencoderKL, as diffusers saves them
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint, Component
from ditc.export.checkpoint.scheduler_config import SCHEDULER_FILE, scheduler_params
from ditc.export.checkpoint.tokenizer import read_tokenizer
from ditc.export.checkpoint.tokenizer_fit import check_fits
from ditc.export.contract import Adapter, BuildOptions, ModelPlan, StageModule, StagePlan
from ditc.export.families.common.companions import (
    COMPONENTS,
    check_widths,
    defaults_of,
    load_companion,
    stage_module,
    stage_plans,
    text_range,
)
from ditc.export.families.common.pipeline import check_pipeline
from ditc.export.families.common.specs import (
    STAGE_DTYPES,
    TORCH_DTYPES,
    DenoiserFacts,
    check_precision,
    latent_ranges,
    step_contract,
)
from ditc.export.families.lucidrains.config import CLASS_NAME, MMDiTConfig
from ditc.export.families.lucidrains.network import load_mmdit
from ditc.export.families.lucidrains.pipeline import PIPELINE
from ditc.export.graph.step import wrap
from ditc.export.networks.autoencoder_kl import AutoencoderKlConfig, load_kl_decoder, load_kl_encoder
from ditc.export.networks.dc_ae import DcAeConfig
from ditc.export.networks.gemma2 import gemma2_config
from ditc.export.networks.t5 import load_t5, t5_config
from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.spec import (
    CONDITIONER,
    DENOISER,
    TEXT_ENCODER,
    VAE_DECODER,
    DType,
    Range,
    TensorSpec,
)
from ditc.runtime.step_contract import ROWS, TEXT_LENGTH, StepContract
from ditc.runtime.text import TextSpec

# Upstream has no pipeline. Steps and scale are StableDiffusion3Pipeline's defaults (diffusers 0.42.1), and the length
# is the one that SanaPipeline gives Gemma.
NUM_INFERENCE_STEPS = 28
GUIDANCE_SCALE = 7.0
MAX_SEQUENCE_LENGTH = 300

AUTOENCODER_KL, T5_CLASS = "AutoencoderKL", "T5EncoderModel"


class LucidrainsMMDiTAdapter:
    """Plans and loads the five stages of a checkpoint around a lucidrains/mmdit trunk."""

    family = "mmdit"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer's config names ditc's class for upstream's trunks."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.class_name == CLASS_NAME

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Plan the bundle from the checkpoint's configs.

        Raises:
            CheckpointError: a component is missing, the networks here do not implement a config, or the components do
                not fit together.
            UsageError: the precision or the resolution is not available.
        """
        check_pipeline(checkpoint, PIPELINE)
        check_precision(options, "lucidrains/mmdit")
        transformer = checkpoint.component("transformer").read_config(MMDiTConfig.from_json)
        vae = _autoencoder(checkpoint.component("vae"))
        with naming(checkpoint.path):
            check_widths(
                states=_states(checkpoint.component("text_encoder")),
                caption_channels=transformer.caption_channels,
                latent_channels=vae.latent_channels,
                in_channels=transformer.in_channels,
            )
        text = _text_spec(checkpoint)
        with naming(checkpoint.path / SCHEDULER_FILE):
            scheduler = scheduler_params(
                checkpoint.scheduler_config, timestep_scale=transformer.timestep_scale
            )
        defaults = defaults_of(
            checkpoint.defaults,
            transformer.sample_size * vae.scale_factor,
            options,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            bins=checkpoint.defaults.get("resolution_bins") or (),
        )
        latents = LatentSpec(transformer.in_channels, vae.scale_factor, transformer.patch_size)
        sizes = latent_ranges(defaults, latents)
        facts = _facts(transformer, text, sizes, step_contract(scheduler), options)
        return ModelPlan(
            family=self.family,
            stages=stage_plans(
                text,
                transformer.caption_channels,
                facts,
                latents,
                options,
                posterior=isinstance(vae, AutoencoderKlConfig),
            ),
            text=(text,),
            scheduler=scheduler,
            latents=latents,
            defaults=defaults,
            step=facts.step,
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """Load one stage with its weights."""
        stage_plan = plan.stages[stage]
        component = checkpoint.component(COMPONENTS[stage])
        with naming(component.place):
            module = _load(component, plan, stage)
        return stage_module(module, component, stage_plan)


ADAPTER: Adapter = LucidrainsMMDiTAdapter()


def _load(component: Component, plan: ModelPlan, stage: str) -> nn.Module:
    """Load the stage's module with the component's weights."""
    stage_plan = plan.stages[stage]
    if COMPONENTS[stage] != "transformer":
        return _load_companion(component, stage_plan)
    dtype = TORCH_DTYPES[stage_plan.precision]
    config = MMDiTConfig.from_json(component.config)
    conditioner, denoiser = load_mmdit(config, component.tensors, dtype)
    if stage == DENOISER:
        return wrap(denoiser, dtype=dtype, contract=plan.step)
    return conditioner if stage == CONDITIONER else denoiser


def _autoencoder(component: Component) -> DcAeConfig | AutoencoderKlConfig:
    """The settings of the autoencoder's class."""
    if component.class_name == AUTOENCODER_KL:
        return component.read_config(AutoencoderKlConfig.from_json)
    return component.read_config(DcAeConfig.from_json)


def _load_companion(component: Component, plan: StagePlan) -> nn.Module:
    """Load the text encoder, or one half of the VAE, of the kind that its config names."""
    dtype = TORCH_DTYPES[plan.precision]
    if plan.spec.name == TEXT_ENCODER and component.class_name == T5_CLASS:
        return load_t5(component.config, component.tensors, dtype)
    if plan.spec.name != TEXT_ENCODER:
        config = _autoencoder(component)
        if isinstance(config, AutoencoderKlConfig):
            load = load_kl_decoder if plan.spec.name == VAE_DECODER else load_kl_encoder
            return load(config, component.tensors, dtype)
    return load_companion(component, plan)


def _states(component: Component) -> int:
    """Channels of the text encoder's states."""
    if component.class_name == T5_CLASS:
        return int(component.read_config(t5_config).d_model)
    return int(component.read_config(gemma2_config).hidden_size)


def _facts(
    transformer: MMDiTConfig,
    text: TextSpec,
    sizes: Mapping[str, Range],
    step: StepContract,
    options: BuildOptions,
) -> DenoiserFacts:
    return DenoiserFacts(
        channels=transformer.in_channels,
        out_channels=transformer.out_channels,
        conditioning=(
            TensorSpec("text_tokens", STAGE_DTYPES[options.base], (ROWS, TEXT_LENGTH, transformer.dims[0])),
            TensorSpec("key_mask", DType.FLOAT32, (ROWS, TEXT_LENGTH)),
        ),
        sizes=sizes,
        text=text_range(text),
        step=step,
    )


def _text_spec(checkpoint: Checkpoint) -> TextSpec:
    """How a prompt becomes tokens: its text is not changed, and its tokens are cut or padded on the right.

    The padding is masked.
    """
    tokenizer = read_tokenizer(checkpoint, "tokenizer")
    length = int(checkpoint.defaults.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    return TextSpec(
        stage=TEXT_ENCODER,
        tokenizer="tokenizer/tokenizer.json",
        mask="text_mask",
        max_length=length,
        negative_max_length=length,
        length=length,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=check_fits(tokenizer, checkpoint.component("text_encoder")),
    )
