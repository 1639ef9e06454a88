"""ControlNets of all families: the specs of their stages, and the checks that they fit the denoiser."""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, D width, p patch size

from __future__ import annotations

from collections.abc import Mapping

from ditc.export.contract import StagePlan
from ditc.export.families.common.specs import DenoiserFacts
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import CONTROLNET, DENOISER, DType, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import (
    BATCH,
    COEFFICIENTS,
    CONTROL_LATENTS,
    CONTROL_RESIDUAL,
    CONTROL_SCALE,
    HEIGHT,
    LATENTS,
    ROW_OF,
    ROWS,
    TIMESTEP,
    WIDTH,
)

COMPONENT = "controlnet"


def residual_specs(count: int, *, width: int, patch: int, dtype: DType) -> tuple[TensorSpec, ...]:
    """Specs of a ControlNet's outputs.

    Args:
        width: D, which must be a multiple of patch squared, as tokens (R,N,D) are written as (R,H,W,D/p^2).
        dtype: of the denoiser's network.
    """
    shape = (ROWS, HEIGHT, WIDTH, width // patch**2)
    return tuple(TensorSpec(f"{CONTROL_RESIDUAL}{index}", dtype, shape) for index in range(count))


def controlnet_spec(
    facts: DenoiserFacts, conditioning: tuple[TensorSpec, ...], profile: Mapping[str, Range]
) -> StageSpec:
    """Spec of a ControlNet as the denoiser's step sees it (export/graph/control.py).

    Args:
        facts: of the denoiser, with the residuals.
        conditioning: the rows that the ControlNet takes.
        profile: the denoiser's.
    """
    image = (BATCH, facts.channels, HEIGHT, WIDTH)
    inputs = (
        TensorSpec(LATENTS, DType.FLOAT32, image),
        TensorSpec(ROW_OF, DType.INT64, (ROWS,)),
        TensorSpec(TIMESTEP, DType.FLOAT32, (BATCH,)),
        TensorSpec(COEFFICIENTS, DType.FLOAT32, (BATCH, len(facts.step.columns))),
        TensorSpec(CONTROL_LATENTS, DType.FLOAT32, image),
        TensorSpec(CONTROL_SCALE, DType.FLOAT32, (BATCH,)),
        *conditioning,
    )
    named = {size for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    return StageSpec(CONTROLNET, inputs, facts.residuals, {n: r for n, r in profile.items() if n in named})


def before_denoiser(
    control: Mapping[str, StagePlan], stages: Mapping[str, StagePlan]
) -> dict[str, StagePlan]:
    """All plans in the order in which drawing a picture runs them: the ControlNet's run before the denoiser."""
    ordered: dict[str, StagePlan] = {}
    for name, plan in stages.items():
        if name == DENOISER:
            ordered |= control
        ordered[name] = plan
    return ordered


def check_made_for(network: object, controlnet: object, settings: tuple[str, ...]) -> None:
    """Refuse a ControlNet that was made for another transformer.

    Args:
        network, controlnet: the configs of both.
        settings: the names of the settings that must be equal.

    Raises:
        CheckpointError: the message names the setting and both values; or tokens cannot be written as cells.
    """
    for name in settings:
        theirs, own = getattr(network, name), getattr(controlnet, name)
        if theirs != own:
            raise CheckpointError(
                f"{name} is {own} in the ControlNet's config.json, but {theirs} in the transformer's",
                hint="use a ControlNet that was trained for this transformer",
            )
