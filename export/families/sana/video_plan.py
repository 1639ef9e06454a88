"""SANA-Video (arXiv 2509.24695): what a bundle of one has, and how its networks are loaded.

It has Sana's text encoder and conditioner, a transformer whose latents have frames, and an autoencoder of videos
(video_vae.py). Each bundle draws from texts alone, or from a picture as the first frame: the networks and weights are
the same, as is the released checkpoint that diffusers' examples of both pipelines name. Source: diffusers 0.42.1,
pipelines/sana_video/pipeline_sana_video.py and pipeline_sana_video_i2v.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint, Component
from ditc.export.checkpoint.scheduler_config import SCHEDULER_FILE, scheduler_params
from ditc.export.contract import BuildOptions, ModelPlan, StageModule
from ditc.export.families.common.companions import (
    COMPONENTS,
    check_widths,
    load_companion,
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
    tiling_of,
)
from ditc.export.families.sana.pipeline import VIDEO
from ditc.export.families.sana.recipe import VIDEO as VIDEO_RECIPES
from ditc.export.families.sana.resolution_bins import video_bins
from ditc.export.families.sana.text import MOTION, VIDEO_INSTRUCTION, text_spec
from ditc.export.families.sana.video_config import SanaVideoConfig
from ditc.export.families.sana.video_network import load_sana_video
from ditc.export.families.sana.video_vae import latent_channels, load_vae, read_vae, vae_stages
from ditc.export.graph.step import wrap
from ditc.export.networks.gemma2 import gemma2_config
from ditc.runtime.bundle.manifest import Defaults, LatentSpec
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import (
    CONDITIONER,
    DENOISER,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    DType,
    Range,
    TensorSpec,
)
from ditc.runtime.step_contract import FRAMES, ROWS, TEXT_LENGTH, StepContract

TRANSFORMER = "SanaVideoTransformer3DModel"
# The defaults of SanaVideoPipeline.__call__, and the fps at which its example saves a video (diffusers 0.42.1).
NUM_INFERENCE_STEPS = 50
GUIDANCE_SCALE = 6.0
SIZES = {30: (480, 832), 22: (704, 1280)}  # (height, width) in pixels by sample_size
NUM_FRAMES = 81
FPS = 16
# Layers that a run over the first frame alone never reaches: they resample frames in time.
ONLY_LATER = ".time_conv."


def plan_video(checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
    """Plan the bundle of a SANA-Video checkpoint from its configs.

    Raises:
        CheckpointError: the pipeline is another one, a component is missing or of another model, or the networks here
            do not implement a config.
        UsageError: the precision, the size or the number of frames is not available.
    """
    transformer = checkpoint.component("transformer").read_config(SanaVideoConfig.from_json)
    check_pipeline(checkpoint, VIDEO)
    vae = read_vae(checkpoint.component("vae"))
    with naming(checkpoint.path):
        check_widths(
            states=checkpoint.component("text_encoder").read_config(gemma2_config).hidden_size,
            caption_channels=transformer.caption_channels,
            latent_channels=latent_channels(vae),
            in_channels=transformer.in_channels,
        )
    check_precision(options, "SANA-Video")
    text = text_spec(checkpoint, VIDEO_INSTRUCTION, MOTION)
    with naming(checkpoint.path / SCHEDULER_FILE):
        scheduler = scheduler_params(checkpoint.scheduler_config)
    latents = LatentSpec(
        transformer.in_channels,
        vae.pixels_per_latent,
        transformer.patch_side,
        frames_per_cell=vae.frames_per_latent,
    )
    defaults = _defaults(checkpoint, transformer, latents, options)
    sizes = {FRAMES: _frame_range(defaults, latents), **latent_ranges(defaults, latents)}
    step = step_contract(scheduler, holds_frames=True)
    facts = _facts(transformer, {TEXT_LENGTH: text_range(text)[TEXT_LENGTH]}, sizes, step, latents, options)
    specs = vae_stages(vae, latents, sizes, defaults.tiling, options)
    return ModelPlan(
        family="sana",
        stages=stage_plans(text, transformer.caption_channels, facts, latents, options, vae=specs),
        text=(text,),
        scheduler=scheduler,
        latents=latents,
        defaults=defaults,
        step=step,
        recipes=VIDEO_RECIPES,
    )


def load_video(component: Component, plan: ModelPlan, stage: str) -> nn.Module:
    """Load a stage's module with the component's weights.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    stage_plan = plan.stages[stage]
    dtype = TORCH_DTYPES[stage_plan.precision]
    if stage == TEXT_ENCODER:
        return load_companion(component, stage_plan)
    if COMPONENTS[stage] == "vae":
        return load_vae(component, stage, stage_plan.precision)
    config = SanaVideoConfig.from_json(component.config)
    conditioner, denoiser = load_sana_video(config, component.tensors, dtype)
    if stage == DENOISER:
        return wrap(denoiser, dtype=dtype, contract=plan.step)
    return conditioner if stage == CONDITIONER else denoiser


def without_unused(stage: StageModule) -> StageModule:
    """The stage without the weights that its graph never reads: those of layers between frames."""
    if stage.spec.name not in (VAE_DECODER, VAE_ENCODER):
        return stage
    used = tuple(source for source in stage.weights if ONLY_LATER not in source.checkpoint)
    return replace(stage, weights=used)


def _facts(
    transformer: SanaVideoConfig,
    text: dict[str, Range],
    sizes: dict[str, Range],
    step: StepContract,
    latents: LatentSpec,
    options: BuildOptions,
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
        text=text,
        step=step,
        axes=latents.axes,
    )


def _defaults(
    checkpoint: Checkpoint, transformer: SanaVideoConfig, latents: LatentSpec, options: BuildOptions
) -> Defaults:
    """The defaults of the build's options first, then of ditc.json, then of the pipeline.

    As in diffusers, frames are decoded in one piece unless somebody asks for tiles.
    """
    given: dict[str, Any] = checkpoint.defaults
    height, width = SIZES.get(transformer.sample_size, SIZES[30])
    bins = video_bins(transformer.sample_size)
    if "resolution_bins" in given:
        bins = tuple((one[0], one[1]) for one in given["resolution_bins"] or ())
    elif options.resolution is not None:
        bins = ()
    return Defaults(
        height=options.resolution or int(given.get("height", height)),
        width=options.resolution or int(given.get("width", width)),
        num_inference_steps=int(given.get("num_inference_steps", NUM_INFERENCE_STEPS)),
        guidance_scale=float(given.get("guidance_scale", GUIDANCE_SCALE)),
        bins=bins,
        tiling=tiling_of(given, latents.scale_factor),
        frames=int(given.get("frames", NUM_FRAMES)),
        fps=int(given.get("fps", FPS)),
    )


def _frame_range(defaults: Defaults, latents: LatentSpec) -> Range:
    """The range of latent frames: from one, which is a picture, to twice the default."""
    frames, per_cell = defaults.frames or 1, latents.frames_per_cell or 1
    if (frames - 1) % per_cell:
        raise UsageError(
            f"frames is {frames}, but a video has 1 more than a multiple of {per_cell}",
            hint=f"use {1 + round((frames - 1) / per_cell) * per_cell} in the checkpoint's ditc.json",
        )
    cells = (frames - 1) // per_cell + 1
    return Range(1, cells, 2 * cells)
