"""The adapter for Sana (NVlabs): a linear DiT with a Gemma-2 text encoder and a DC-AE, or SANA-Video (video_plan.py).

Sources: arXiv 2410.10629 (Sana), 2501.18427 (SANA-1.5), 2503.09641 (SANA-Sprint); diffusers 0.42.1
pipelines/sana/pipeline_sana.py and pipeline_sana_sprint.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ditc.export.checkpoint.model_index import pipeline_class
from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint, Component
from ditc.export.checkpoint.scheduler_config import SCHEDULER_FILE, scheduler_params
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
from ditc.export.families.common.control import (
    COMPONENT,
    before_denoiser,
    check_made_for,
    controlnet_spec,
    residual_specs,
)
from ditc.export.families.common.pipeline import check_pipeline, choose_pipeline
from ditc.export.families.common.specs import (
    STAGE_DTYPES,
    TORCH_DTYPES,
    DenoiserFacts,
    check_precision,
    latent_ranges,
    step_contract,
    tiling_of,
)
from ditc.export.families.sana.config import SanaConfig
from ditc.export.families.sana.controlnet import control_config, load_control
from ditc.export.families.sana.network import load_sana
from ditc.export.families.sana.perturbed_attention import read_perturbed_attention
from ditc.export.families.sana.pipeline import CONTROLNET, PAG_CLASS, PIPELINE, SPRINT
from ditc.export.families.sana.recipe import SPRINT as SPRINT_RECIPES
from ditc.export.families.sana.resolution_bins import resolution_bins
from ditc.export.families.sana.text import COMPLEX_HUMAN_INSTRUCTION, CONTROL_PADDING, PADDING, text_spec
from ditc.export.families.sana.video_plan import TRANSFORMER as VIDEO
from ditc.export.families.sana.video_plan import load_video, plan_video, without_unused
from ditc.export.graph.control import wrap_control
from ditc.export.graph.step import wrap
from ditc.export.networks.dc_ae import DcAeConfig
from ditc.export.networks.gemma2 import gemma2_config
from ditc.runtime.bundle.manifest import Defaults, LatentSpec, Tiling
from ditc.runtime.errors import CheckpointError
from ditc.runtime.schedulers import SchedulerParams
from ditc.runtime.spec import (
    CONDITIONER,
    CONTROL_CONDITIONER,
    DENOISER,
    DType,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.step_contract import CONTROL_RESIDUAL, ROWS, TEXT_LENGTH, GuidanceMode, StepContract
from ditc.runtime.text import TextSpec

# The defaults of SanaPipeline.__call__ and SanaSprintPipeline.__call__, diffusers 0.42.1.
NUM_INFERENCE_STEPS = 20
SPRINT_STEPS = 2
GUIDANCE_SCALE = 4.5
# The side in pixels of the resolution bins that SanaPipeline picks by the transformer's sample_size.
BINS_BY_SAMPLE_SIZE = {16: 512, 32: 1024, 64: 2048, 128: 4096}


class SanaAdapter:
    """Plans and loads the stages of a Sana checkpoint in diffusers layout: five, and two more of a ControlNet."""

    family = "sana"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer is diffusers' SanaTransformer2DModel or SanaVideoTransformer3DModel."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.class_name in ("SanaTransformer2DModel", VIDEO)

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Plan the bundle from the checkpoint's configs.

        Raises:
            CheckpointError: the pipeline is another one, a component is missing or of another model, or the networks
                here do not implement a config.
            UsageError: the precision or the resolution is not available.
        """
        if checkpoint.component("transformer").class_name == VIDEO:
            return plan_video(checkpoint, options)
        transformer = checkpoint.component("transformer").read_config(SanaConfig.from_json)
        served = SPRINT if transformer.guidance_embeds else choose_pipeline(checkpoint, PIPELINE, CONTROLNET)
        check_pipeline(checkpoint, served)
        control = _control_config(checkpoint, transformer) if served is CONTROLNET else None
        vae = checkpoint.component("vae").read_config(DcAeConfig.from_json)
        _check_components(checkpoint, transformer, vae)
        check_precision(options, "Sana")
        padding = CONTROL_PADDING if control is not None else PADDING
        text = text_spec(checkpoint, COMPLEX_HUMAN_INSTRUCTION, padding=padding)
        with naming(checkpoint.path / SCHEDULER_FILE):
            scheduler = _scheduler(checkpoint, transformer, controlled=control is not None)
        defaults = _defaults(checkpoint, transformer, vae, options)
        latents = LatentSpec(transformer.in_channels, vae.scale_factor, transformer.patch_size)
        sizes = latent_ranges(defaults, latents)
        guidance = GuidanceMode.EMBEDDED if transformer.guidance_embeds else GuidanceMode.CFG
        pag = defaults.perturbed_attention_guidance
        step = step_contract(scheduler, guidance=guidance, skip_gate=pag is not None)
        facts = _facts(transformer, text, sizes, step, options, control)
        stages = stage_plans(
            text,
            transformer.caption_channels,
            facts,
            latents,
            options,
            tiling=defaults.tiling,
            gate={"pag_layers": list(pag.layers)} if pag else None,
        )
        if control is not None:
            stages = before_denoiser(_control_plans(control, facts, stages, options), stages)
        return ModelPlan(
            family=self.family,
            stages=stages,
            text=(text,),
            scheduler=scheduler,
            latents=latents,
            defaults=defaults,
            step=facts.step,
            recipes=SPRINT_RECIPES if transformer.guidance_embeds else "",
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """Load one stage with its weights."""
        stage_plan = plan.stages[stage]
        component = checkpoint.component(COMPONENTS[stage])
        video = checkpoint.component("transformer").class_name == VIDEO
        with naming(component.place):
            module = load_video(component, plan, stage) if video else _load(component, plan, stage)
        if video:
            return without_unused(stage_module(module, component, stage_plan))
        return stage_module(module, component, stage_plan)


ADAPTER: Adapter = SanaAdapter()


def _load(component: Component, plan: ModelPlan, stage: str) -> nn.Module:
    """Load the stage's module with the component's weights."""
    stage_plan = plan.stages[stage]
    if COMPONENTS[stage] == COMPONENT:
        return _load_control(component, plan, stage)
    if COMPONENTS[stage] != "transformer":
        return load_companion(component, stage_plan)
    dtype = TORCH_DTYPES[stage_plan.precision]
    pag = plan.defaults.perturbed_attention_guidance
    conditioner, denoiser = load_sana(
        SanaConfig.from_json(component.config),
        component.tensors,
        dtype,
        pag_layers=pag.layers if pag else (),
        residuals=sum(tensor.name.startswith(CONTROL_RESIDUAL) for tensor in stage_plan.spec.inputs),
    )
    if stage == DENOISER:
        return wrap(denoiser, dtype=dtype, contract=plan.step)
    return conditioner if stage == CONDITIONER else denoiser


def _load_control(component: Component, plan: ModelPlan, stage: str) -> nn.Module:
    """Load the ControlNet, or the part of it that depends on the text alone, with the component's weights."""
    dtype = TORCH_DTYPES[plan.stages[stage].precision]
    conditioner, controlnet = load_control(control_config(component.config), component.tensors, dtype)
    if stage == CONTROL_CONDITIONER:
        return conditioner
    return wrap_control(controlnet, dtype=dtype, contract=plan.step)


def _control_config(checkpoint: Checkpoint, transformer: SanaConfig) -> SanaConfig:
    """The ControlNet's settings. Raises CheckpointError if it belongs to another transformer."""
    control = checkpoint.component(COMPONENT).read_config(control_config)
    with naming(checkpoint.component(COMPONENT).folder):
        check_made_for(transformer, control, ("in_channels", "patch_size", "width", "caption_channels"))
        most = transformer.num_layers - 1
        if control.num_layers > most:
            raise CheckpointError(
                f"the ControlNet has {control.num_layers} layers, but the transformer adds at most {most} residuals",
                hint="use a ControlNet that was trained for this transformer",
            )
    return control


def _control_plans(
    control: SanaConfig, facts: DenoiserFacts, stages: Mapping[str, StagePlan], options: BuildOptions
) -> dict[str, StagePlan]:
    """Plans of the ControlNet's two stages, made from those of the transformer."""
    texts, step = stages[CONDITIONER].spec, stages[DENOISER].spec
    shape = (ROWS, control.num_layers, 2, TEXT_LENGTH, control.cross_width)
    control_kv = TensorSpec("control_kv", STAGE_DTYPES[options.base], shape)
    conditioner = StageSpec(CONTROL_CONDITIONER, (texts.input("text_embeds"),), (control_kv,), texts.profile)
    controlnet = controlnet_spec(facts, (control_kv, step.input("text_bias")), step.profile)
    return {
        spec.name: StagePlan(spec=spec, precision=options.base, components=(COMPONENT,))
        for spec in (conditioner, controlnet)
    }


def _check_components(checkpoint: Checkpoint, transformer: SanaConfig, vae: DcAeConfig) -> None:
    """Refuse components of different models."""
    with naming(checkpoint.path):
        check_widths(
            states=checkpoint.component("text_encoder").read_config(gemma2_config).hidden_size,
            caption_channels=transformer.caption_channels,
            latent_channels=vae.latent_channels,
            in_channels=transformer.in_channels,
        )


def _scheduler(checkpoint: Checkpoint, transformer: SanaConfig, *, controlled: bool) -> SchedulerParams:
    """The scheduler's parameters. SanaSprintPipeline and SanaControlNetPipeline do not apply timestep_scale."""
    if not transformer.guidance_embeds:
        scale = 1.0 if controlled else transformer.timestep_scale
        return scheduler_params(checkpoint.scheduler_config, timestep_scale=scale)
    given = {
        name: checkpoint.defaults[name]
        for name in ("max_timesteps", "intermediate_timesteps")
        if name in checkpoint.defaults
    }
    return replace(scheduler_params(checkpoint.scheduler_config, trigflow=True), **given)


def _facts(
    transformer: SanaConfig,
    text: TextSpec,
    sizes: Mapping[str, Range],
    step: StepContract,
    options: BuildOptions,
    control: SanaConfig | None = None,
) -> DenoiserFacts:
    kv = (ROWS, transformer.num_layers, 2, TEXT_LENGTH, transformer.cross_width)
    return DenoiserFacts(
        channels=transformer.in_channels,
        out_channels=transformer.out_channels,
        conditioning=(
            TensorSpec("cross_kv", STAGE_DTYPES[options.base], kv),
            TensorSpec("text_bias", DType.FLOAT32, (ROWS, TEXT_LENGTH)),
        ),
        sizes=sizes,
        text=text_range(text),
        step=step,
        residuals=residual_specs(
            control.num_layers,
            width=transformer.width,
            patch=transformer.patch_size,
            dtype=STAGE_DTYPES[options.base],
        )
        if control is not None
        else (),
    )


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
    return defaults_of(
        given,
        native,
        options,
        num_inference_steps=SPRINT_STEPS if transformer.guidance_embeds else NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        bins=bins,
        # The defaults of AutoencoderDC.enable_tiling, diffusers 0.42.1. Upstream's README asks for tiling at 4K.
        tiling=tiling_of(given, vae.scale_factor, Tiling(tile=512, stride=448) if side >= 4096 else None),
        perturbed_attention_guidance=read_perturbed_attention(
            given,
            transformer,
            is_pag_pipeline=pipeline_class(checkpoint.path, checkpoint.model_index) == PAG_CLASS,
        ),
    )
