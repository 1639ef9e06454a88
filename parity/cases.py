"""What is drawn on both sides, and what one side made of it."""

# N steps, B samples, R rows, C latent channels, H/W latent size, P history length

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ditc.runtime import denoise
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator, randn_latents
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState

# Short and long, so that masks matter; words that the demo model knows, so that its page shows pictures.
DEFAULT_PROMPTS = ("a red heart, flat style", "smiling face with sunglasses, 3d style")
DEFAULT_SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class Case:
    """One picture to draw."""

    prompt: str
    seed: int

    def __str__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 32 else f"{self.prompt[:31]}\u2026"
        return f"{prompt!r} seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What both sides must agree on."""

    cases: tuple[Case, ...]
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CaseRun:
    """One case from noise to picture.

    Attributes:
        latents: (N+1,B,C,H,W), before each step and after the last. x0: (N,B,C,H,W); None where the side has none.
        start: the state before the first step; None for a side that has no such state.
        picture: (H,W,3) floats in [0,1], of the first sample; None if it was not asked for.
        problem: why the run ended early: NaN, or a session that refused.
    """

    case: Case
    latents: Array
    x0: Array | None = None
    start: DenoiseState | None = None
    picture: Array | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StageCase:
    """One run of one stage: what it is fed, what the reference makes of it, and what PyTorch loses in 16 bits."""

    stage: str
    what: str
    feeds: dict[str, Array]
    outputs: dict[str, Array]
    pytorch: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What PyTorch itself loses in the deployment precision over one case: every step, at the end, in the picture."""

    steps: list[float]
    trajectory: float
    psnr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Reference results of another machine.

    Attributes:
        origin: checkpoint, hash of its weights and machine, as saved.
        losses: by case; empty where the file was saved beside an fp32 bundle. precision: what they were measured in.
    """

    settings: Settings
    origin: dict[str, str]
    runs: dict[Case, CaseRun]
    upstream: dict[Case, CaseRun]
    stages: list[StageCase]
    losses: dict[Case, Losses]
    precision: str


def request_of(case: Case, settings: Settings, latents: Array | None = None) -> Request:
    """The request that both sides serve; they start from the same noise."""
    return Request(
        prompt=case.prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        seed=None if latents is not None else case.seed,
        latents=latents,
        output_type="np",
        allow_uniform=True,
    )


def starting_noise(pipeline: Pipeline, case: Case, settings: Settings) -> Array:
    """(1,C,H,W) of the case's seed, at the size that the network draws at."""
    plan = pipeline.plan(request_of(case, settings))
    latent = pipeline.manifest.latents
    cells = (plan.drawn_height // latent.scale_factor, plan.drawn_width // latent.scale_factor)
    return randn_latents((1, latent.channels, *cells), Generator(case.seed))


def start_case(pipeline: Pipeline, case: Case, settings: Settings, noise: Array) -> tuple[Plan, DenoiseState]:
    """The plan of one case and its state before the first step."""
    plan = pipeline.plan(request_of(case, settings, noise))
    (state,) = pipeline.start(plan)
    return plan, state


def run_case(
    pipeline: Pipeline,
    case: Case,
    settings: Settings,
    noise: Array,
    *,
    picture: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> CaseRun:
    """Draw one case freely, keeping the latents of every step. NaN ends the run and is told, not raised."""
    plan, state = start_case(pipeline, case, settings, noise)
    start, latents, x0 = state, [to_numpy(state.latents)], []
    problem = ""
    while not state.done and not problem:
        (state,) = denoise.step(pipeline.sessions[DENOISER], [state])
        assert state.x0 is not None
        latents.append(to_numpy(state.latents))
        x0.append(to_numpy(state.x0))
        if not np.isfinite(latents[-1]).all():
            problem = f"step {state.step_index} of {len(state.schedule)} left NaN or Inf in the latents"
        on_step()
    image = None
    if picture and not problem:
        image = pipeline.decode([state], plan)[0]
    return CaseRun(
        case=case, latents=np.stack(latents), x0=np.stack(x0), start=start, picture=image, problem=problem
    )


def forced_state(run: CaseRun, start: DenoiseState, step: int) -> DenoiseState:
    """`start` moved to step `step` of `run`: the run's latents and history, everything else the start's own."""
    assert run.x0 is not None
    length = to_numpy(start.history).shape[1]
    history = np.zeros_like(to_numpy(start.history))
    for k in range(min(length, step)):
        history[:, k] = run.x0[step - 1 - k]
    return replace(start, latents=run.latents[step], history=history, step_index=step)
