"""The state before the first step: noise, rows of conditioning, and the whole schedule as data."""

# B samples, R rows

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ditc.runtime import denoise
from ditc.runtime.conditioning import stack_texts
from ditc.runtime.denoise import DenoiseState, Rows
from ditc.runtime.guidance import guidance_feeds
from ditc.runtime.plan import Plan
from ditc.runtime.rng import Generator
from ditc.runtime.schedulers import SchedulerParams, coefficient_table
from ditc.runtime.session import Array
from ditc.runtime.spec import StageSpec


def first_state(
    plan: Plan,
    scheduler: SchedulerParams,
    denoiser: StageSpec,
    latents: Array,
    positive: Sequence[Mapping[str, Array]],
    negative: Sequence[Mapping[str, Array]],
    generator: Generator | Sequence[Generator],
) -> DenoiseState:
    """The state of as many pictures as there are latents.

    Args:
        positive, negative: a row of conditioning a picture; no negative ones where nothing is guided.
        generator: what samplers that draw noise on every step go on with.
    """
    batch, history = latents.shape[0], _history_length(denoiser)
    rows = [*negative, *positive]  # diffusers' order
    if plan.skip_layer_guidance is not None:
        rows += positive
    table = coefficient_table(scheduler, plan.num_inference_steps, history_length=history)
    schedule = tuple(
        {
            denoise.TIMESTEP: np.repeat(timestep, batch),
            denoise.COEFFICIENTS: np.repeat(coefficients[None], batch, axis=0),
            **guidance,
        }
        for timestep, coefficients, guidance in zip(
            table.timesteps, table.coefficients, _guidance(plan, denoiser, batch, bool(negative)), strict=True
        )
    )
    return DenoiseState(
        latents=latents * np.float32(table.init_noise_sigma),
        history=np.zeros((batch, history, *latents.shape[1:]), np.float32),
        schedule=schedule,
        rows=Rows(
            row_of=np.tile(np.arange(batch, dtype=np.int64), len(rows) // batch),
            conditioning=stack_texts(rows),
        ),
        generator=generator,
    )


def _guidance(plan: Plan, denoiser: StageSpec, batch: int, guided: bool) -> list[dict[str, Array]]:
    scale, steps = plan.guidance_scale if guided else 1.0, plan.num_inference_steps
    gated = any(tensor.name == denoise.SKIP_GATE for tensor in denoiser.inputs)
    return guidance_feeds(batch, scale, plan.skip_layer_guidance, steps, gated=gated)


def _history_length(denoiser: StageSpec) -> int:
    length = denoiser.input(denoise.HISTORY).shape[1]
    assert isinstance(length, int)
    return length
