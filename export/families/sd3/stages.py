"""Plans of an SD3 checkpoint's stages, made from configs alone: specs, precisions, and facts that shape graphs."""

from __future__ import annotations

from collections.abc import Mapping

from ditc.export.contract import BuildOptions, JsonValue, StagePlan
from ditc.export.families.common.specs import (
    STAGE_DTYPES,
    DenoiserFacts,
    companion_precision,
    denoiser_spec,
    network_spec,
    vae_specs,
)
from ditc.export.families.sd3.config import Sd3Config
from ditc.export.families.sd3.text_encoders import CLIP_G, CLIP_L, T5, TextEncoders
from ditc.runtime.bundle.manifest import LatentSpec, SkipLayerGuidance
from ditc.runtime.conditioning import POOLED, TEXT_EMBEDS
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import CONDITIONER, DENOISER, NETWORK, DType, Precision, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import ROWS, TEXT_LENGTH, StepContract

# The name of a fact of the conditioner: how many tokens of zeros replace the tokens of a T5 that is left out.
ZERO_TOKENS = "zero_tokens"


def denoiser_facts(
    transformer: Sd3Config,
    encoders: TextEncoders,
    sizes: Mapping[str, Range],
    step: StepContract,
    residuals: tuple[TensorSpec, ...] = (),
) -> DenoiserFacts:
    """The facts of SD3's denoiser: its channels, its conditioning, the ranges of its dimensions, and residuals."""
    return DenoiserFacts(
        channels=transformer.in_channels,
        out_channels=transformer.out_channels,
        conditioning=(
            TensorSpec(TEXT_EMBEDS, DType.FLOAT32, (ROWS, TEXT_LENGTH, transformer.joint_attention_dim)),
            TensorSpec(POOLED, DType.FLOAT32, (ROWS, transformer.pooled_projection_dim)),
        ),
        sizes=sizes,
        text=encoders.text_range(),
        step=step,
        residuals=residuals,
    )


def stage_plans(
    encoders: TextEncoders,
    facts: DenoiserFacts,
    skip: SkipLayerGuidance | None,
    latents: LatentSpec,
    options: BuildOptions,
) -> dict[str, StagePlan]:
    """Plan all stages, in the order in which drawing a picture runs them."""
    batch, base, others = options.max_batch, options.base, companion_precision(options)
    plans = {
        stage: StagePlan(spec=encoders.spec(stage, batch), precision=others, components=(stage,))
        for stage in encoders.configs
    }
    plans[CONDITIONER] = StagePlan(
        spec=_conditioner(encoders, facts, batch),
        precision=Precision.FP32,  # it only concatenates tensors
        components=(),
        facts={ZERO_TOKENS: 0 if encoders.has_t5 else encoders.sequence_length},
    )
    specs = {DENOISER: denoiser_spec(facts, max_batch=batch)}
    if options.raw:
        specs[NETWORK] = network_spec(facts, dtype=STAGE_DTYPES[base], max_batch=batch)
    gate: dict[str, JsonValue] = {"skip_layers": list(skip.layers)} if skip else {}
    for stage, spec in specs.items():
        plans[stage] = StagePlan(spec=spec, precision=base, components=("transformer",), facts=gate)
    for stage, spec in vae_specs(latents, facts.sizes, max_batch=batch, posterior=True).items():
        plans[stage] = StagePlan(spec=spec, precision=others, components=("vae",))
    return plans


def check_widths(transformer: Sd3Config, encoders: TextEncoders, latent_channels: int) -> None:
    """Refuse a checkpoint whose components belong to different models. Raises CheckpointError."""
    configs, clips = encoders.configs, (CLIP_L, CLIP_G)
    pooled = sum(int(configs[stage].projection_dim) for stage in clips)
    states = sum(int(configs[stage].hidden_size) for stage in clips)
    wide, t5 = transformer.joint_attention_dim, configs[T5].d_model if encoders.has_t5 else None
    for wrong, what in (
        (pooled != transformer.pooled_projection_dim, f"the CLIPs give {pooled} pooled channels together"),
        (states > wide, f"the CLIPs' states have {states} channels together"),
        (t5 not in (None, wide), f"{T5}'s states have {t5} channels"),
        (latent_channels != transformer.in_channels, f"the VAE has {latent_channels} latent channels"),
    ):
        if wrong:
            raise CheckpointError(
                f"{what}, but the transformer takes {transformer.pooled_projection_dim} pooled channels, text states "
                f"of {wide} channels and {transformer.in_channels} latent channels",
                hint="the components belong to different models: use those that were published together",
            )


def _conditioner(encoders: TextEncoders, facts: DenoiserFacts, max_batch: int) -> StageSpec:
    profile = {ROWS: Range(1, 1, 2 * max_batch)}
    if encoders.has_t5:
        profile["length"] = encoders.t5_range()
    return StageSpec(
        CONDITIONER,
        inputs=tuple(spec for stage in encoders.configs for spec in encoders.states(stage, ROWS)),
        outputs=facts.conditioning,
        profile={**profile, **facts.text},
    )
