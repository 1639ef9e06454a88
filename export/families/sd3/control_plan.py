"""The plan of SD3's ControlNet: whether it fits the transformer, what it takes, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import BuildOptions, StagePlan
from ditc.export.families.common.control import COMPONENT, check_made_for, controlnet_spec, residual_specs
from ditc.export.families.common.specs import STAGE_DTYPES, DenoiserFacts
from ditc.export.families.sd3.config import Sd3Config
from ditc.export.families.sd3.controlnet import ControlConfig
from ditc.export.families.sd3.network import residual_of_blocks
from ditc.export.networks.autoencoder_kl import AutoencoderKlConfig
from ditc.runtime.conditioning import POOLED, TEXT_EMBEDS
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import CONTROLNET, DENOISER, TensorSpec

# The name of a fact of the ControlNet: what is added to the encoded control picture to undo the VAE's shift.
CONTROL_OFFSET = "control_offset"


def read_control(checkpoint: Checkpoint, transformer: Sd3Config) -> ControlConfig:
    """The ControlNet's settings.

    Raises:
        CheckpointError: a setting is not implemented, or the ControlNet belongs to another transformer.
    """
    control = checkpoint.component(COMPONENT).read_config(ControlConfig.from_json)
    network = control.network
    settings = ["in_channels", "patch_size", "width", "pooled_projection_dim"]
    with naming(checkpoint.component(COMPONENT).folder):
        check_made_for(
            transformer, network, (*settings, *(["joint_attention_dim"] if control.reads_text else []))
        )
        added = set(residual_of_blocks(transformer.num_layers, network.num_layers))
        if len(added) < network.num_layers:
            raise CheckpointError(
                f"the ControlNet has {network.num_layers} layers, but the transformer's {transformer.num_layers} "
                f"blocks add only {len(added)} residuals",
                hint="use a ControlNet that was trained for this transformer",
            )
        if control.own_position and network.largest_side < transformer.largest_side:
            raise CheckpointError(
                f"the ControlNet's position embedding covers {network.largest_side} latent cells, but the "
                f"transformer's {transformer.largest_side}",
                hint="use a ControlNet that was trained for this transformer",
            )
    return control


def control_residuals(control: ControlConfig, options: BuildOptions) -> tuple[TensorSpec, ...]:
    """Specs of what the ControlNet returns."""
    network = control.network
    return residual_specs(
        network.num_layers, width=network.width, patch=network.patch_size, dtype=STAGE_DTYPES[options.base]
    )


def control_plans(
    control: ControlConfig,
    facts: DenoiserFacts,
    stages: Mapping[str, StagePlan],
    vae: AutoencoderKlConfig,
    options: BuildOptions,
) -> dict[str, StagePlan]:
    """The plan of the ControlNet's stage, made from the denoiser's."""
    step = stages[DENOISER].spec
    texts = [TEXT_EMBEDS] * control.reads_text + [POOLED] * control.reads_pooled
    shift = 0.0 if control.reads_pooled else (vae.shift_factor or 0.0) * vae.scaling_factor
    spec = controlnet_spec(facts, tuple(map(step.input, texts)), step.profile)
    components = (COMPONENT,) if control.own_position else (COMPONENT, "transformer")
    plan = StagePlan(
        spec=spec, precision=options.base, components=components, facts={CONTROL_OFFSET: float(shift)}
    )
    return {CONTROLNET: plan}
