"""The adapter for Stable Diffusion 3 and 3.5 (Stability AI): an MMDiT with two CLIPs, T5 and a 16-channel VAE.

Sources: arXiv 2403.03206; diffusers 0.42.1, StableDiffusion3Pipeline; Stability-AI/sd3.5 (skip-layer guidance).
SD3-medium, SD3.5-medium (MMDiT-X), SD3.5-large and its turbo differ in their configs alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint, Component
from ditc.export.checkpoint.scheduler_config import SCHEDULER_FILE, scheduler_params
from ditc.export.contract import Adapter, BuildOptions, ModelPlan, StageModule
from ditc.export.families.common.companions import vocabulary
from ditc.export.families.common.control import before_denoiser
from ditc.export.families.common.pipeline import check_pipeline, choose_pipeline
from ditc.export.families.common.specs import TORCH_DTYPES, check_precision, latent_ranges, step_contract
from ditc.export.families.sd3.config import Sd3Config
from ditc.export.families.sd3.control_plan import (
    CONTROL_OFFSET,
    control_plans,
    control_residuals,
    read_control,
)
from ditc.export.families.sd3.controlnet import ControlConfig, control_tensors, load_control
from ditc.export.families.sd3.defaults import make_defaults
from ditc.export.families.sd3.network import load_sd3
from ditc.export.families.sd3.pipeline import CONTROLNET, PIPELINE
from ditc.export.families.sd3.stages import ZERO_TOKENS, check_widths, denoiser_facts, stage_plans
from ditc.export.families.sd3.text_encoders import T5, TOKENIZERS, read_text_encoders
from ditc.export.graph.control import wrap_control
from ditc.export.graph.step import wrap
from ditc.export.networks.autoencoder_kl import AutoencoderKlConfig, load_kl_decoder, load_kl_encoder
from ditc.export.networks.clip import load_clip
from ditc.export.networks.joint_text import JointText
from ditc.export.networks.loading import weight_map
from ditc.export.networks.t5 import load_t5
from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.conditioning import TEXT_EMBEDS
from ditc.runtime.spec import CONDITIONER, DENOISER, NETWORK, VAE_DECODER
from ditc.runtime.spec import CONTROLNET as CONTROLNET_STAGE
from ditc.runtime.step_contract import CONTROL_RESIDUAL


class Sd3Adapter:
    """Plans and loads the stages of an SD3 or SD3.5 checkpoint in diffusers layout."""

    family = "sd3"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer is diffusers' SD3Transformer2DModel."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.class_name == "SD3Transformer2DModel"

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Plan the bundle from the checkpoint's configs.

        Raises:
            CheckpointError: the pipeline is another one, a component is missing, the networks here do not implement a
                config, or the components belong to different models.
            UsageError: the precision, the size or a skip layer is not available for this model.
        """
        served = choose_pipeline(checkpoint, PIPELINE, CONTROLNET)
        check_pipeline(checkpoint, served)
        check_precision(options, "SD3")
        transformer = checkpoint.component("transformer").read_config(Sd3Config.from_json)
        vae = checkpoint.component("vae").read_config(AutoencoderKlConfig.from_json)
        encoders = read_text_encoders(checkpoint)
        with naming(checkpoint.path):
            check_widths(transformer, encoders, vae.latent_channels)
        with naming(checkpoint.path / SCHEDULER_FILE):
            scheduler = scheduler_params(checkpoint.scheduler_config, passes_mu=True)
        latents = LatentSpec(transformer.in_channels, vae.scale_factor, transformer.patch_size)
        defaults = make_defaults(checkpoint.defaults, transformer, latents, options)
        sizes = latent_ranges(defaults, latents, largest=transformer.largest_side)
        skip = defaults.skip_layer_guidance
        step = step_contract(scheduler, skip_gate=skip is not None)
        control = None
        if served is CONTROLNET:
            control = read_control(checkpoint, transformer)
        residuals = () if control is None else control_residuals(control, options)
        facts = denoiser_facts(transformer, encoders, sizes, step, residuals)
        stages = stage_plans(encoders, facts, skip, latents, options)
        if control is not None:
            stages = before_denoiser(control_plans(control, facts, stages, vae, options), stages)
        return ModelPlan(
            family=self.family,
            stages=stages,
            text=encoders.text,
            scheduler=scheduler,
            latents=latents,
            defaults=defaults,
            step=step,
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """Load one stage with its weights."""
        spec, precision = plan.stages[stage].spec, plan.stages[stage].precision
        if stage == CONDITIONER:
            return StageModule(spec=spec, precision=precision, module=_joint_text(plan), weights=())
        component = checkpoint.component(plan.stages[stage].components[0])
        tensors: Mapping[str, Tensor] = component.tensors
        with naming(component.place):
            if stage == CONTROLNET_STAGE:
                transformer = checkpoint.component("transformer")
                config = ControlConfig.from_json(component.config)
                config = config.beside(Sd3Config.from_json(transformer.config))
                tensors = control_tensors(config, tensors, transformer.tensors)
                module: nn.Module = _load_control(config, tensors, plan)
            else:
                module = _load(component, plan, stage)
        integers: Mapping[str, int] = {}
        if stage in TOKENIZERS:
            integers = {"input_ids": vocabulary(module)}
        return StageModule(
            spec=spec,
            precision=precision,
            module=module,
            weights=tuple(weight_map({stage: module}, tensors)),
            integers=integers,
        )


ADAPTER: Adapter = Sd3Adapter()


def _load(component: Component, plan: ModelPlan, stage: str) -> nn.Module:
    """Load the stage's module with the component's weights."""
    config, tensors, dtype = component.config, component.tensors, TORCH_DTYPES[plan.stages[stage].precision]
    if stage in TOKENIZERS:
        return (load_t5 if stage == T5 else load_clip)(config, tensors, dtype)
    if stage not in (DENOISER, NETWORK):
        load = load_kl_decoder if stage == VAE_DECODER else load_kl_encoder
        return load(AutoencoderKlConfig.from_json(config), tensors, dtype)
    skip = plan.defaults.skip_layer_guidance
    layers = skip.layers if skip else ()
    residuals = sum(t.name.startswith(CONTROL_RESIDUAL) for t in plan.stages[stage].spec.inputs)
    network = load_sd3(
        Sd3Config.from_json(config), tensors, dtype, skip_layers=layers, residuals=residuals, stage=stage
    )
    if stage == NETWORK:
        return network
    return wrap(network, dtype=dtype, contract=plan.step)


def _load_control(config: ControlConfig, tensors: Mapping[str, Tensor], plan: ModelPlan) -> nn.Module:
    stage = plan.stages[CONTROLNET_STAGE]
    dtype, offset = TORCH_DTYPES[stage.precision], stage.facts[CONTROL_OFFSET]
    assert isinstance(offset, float)
    return wrap_control(load_control(config, tensors, dtype), dtype=dtype, contract=plan.step, offset=offset)


def _joint_text(plan: ModelPlan) -> JointText:
    zero_tokens = plan.stages[CONDITIONER].facts[ZERO_TOKENS]
    assert isinstance(zero_tokens, int)
    width = plan.stages[CONDITIONER].spec.output(TEXT_EMBEDS).shape[2]
    assert isinstance(width, int)
    return JointText(width, zero_tokens)
