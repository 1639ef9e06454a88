"""The cases that both sides draw, and the results of one side."""

# N steps, B samples, C latent channels, H/W size of the latents or, in pixels, of a picture; those of videos have F too

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ditc.parity.edits import OF_PICTURES, OF_VIDEOS, STEPS, STRENGTH, Edit, example_mask
from ditc.runtime import denoise
from ditc.runtime.bundle.jsondata import LEFT_OUT_IF_NONE
from ditc.runtime.control import example_picture
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator, randn_latents
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import C0, COEFFICIENTS, coefficient_columns

# One prompt is short and one is long, so that text masks matter. The demo model knows all of their words, so that
# the report on it shows real pictures.
DEFAULT_PROMPTS = ("a red heart, flat style", "smiling face with sunglasses, 3d style")
DEFAULT_SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class Case:
    """One picture to draw: a prompt and a seed.

    Attributes:
        edit: what is done with the example picture; None draws from noise alone.
    """

    prompt: str
    seed: int
    edit: Edit | None = field(default=None, metadata=LEFT_OUT_IF_NONE)

    def __str__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 32 else f"{self.prompt[:31]}\u2026"
        return f"{prompt!r} seed {self.seed}" + (f", {self.edit}" if self.edit else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The cases and the settings that both sides draw them with. Sizes are in pixels.

    Cases that start from a picture come last, and have a number of steps of their own (`edits.STEPS`).
    """

    cases: tuple[Case, ...]
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CaseRun:
    """One case drawn by one side, from noise to picture.

    Attributes:
        noise: (B,C,H,W), of standard deviation 1.
        latents: (N+1,B,C,H,W), before the first step and after every step. Upstream's first ones are the noise.
        x0: (N,B,C,H,W), the prediction of x0 in every step; None for upstream, which does not expose it.
        start: the state before the first step; None for upstream, which has no such state.
        picture: (H,W,3) floats in [0,1], of the first sample, or (F,H,W,3) of a video; None if nothing was decoded.
        mask: (B,1,H,W), 1 where inpainting draws anew; None without inpainting.
        problem: why the run ended early; "" if it did not.
    """

    case: Case
    noise: Array
    latents: Array
    x0: Array | None = None
    start: DenoiseState | None = None
    picture: Array | None = None
    mask: Array | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StageCase:
    """One run of one stage.

    Attributes:
        what: the sizes of the inputs or where they come from, for reports.
        outputs: what the reference computes from `feeds`.
        baseline_errors: relative L2 of the precision baseline's outputs against `outputs`, by name, or None.
    """

    stage: str
    what: str
    feeds: dict[str, Array]
    outputs: dict[str, Array]
    baseline_errors: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineErrors:
    """How far PyTorch in the deployment precision is from PyTorch fp32 over one case.

    Attributes:
        steps: relative L2 after each step, when every step starts from the fp32 latents.
        trajectory: relative L2 of the last latents, when the loop runs freely.
        psnr: PSNR of the picture in dB.
    """

    steps: list[float]
    trajectory: float
    psnr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReference:
    """Reference results from a file, usually made on another machine.

    Attributes:
        origin: the checkpoint, the hash of its weights and the machine, as saved.
        runs: every case in PyTorch fp32.
        upstream: every case in unmodified upstream; empty if upstream was left out.
        baseline_errors: by case; empty for an fp32 bundle, and without the cases in which PyTorch itself overflows.
        precision: the denoiser's precision that `baseline_errors` were measured in.
    """

    settings: Settings
    origin: dict[str, str]
    runs: dict[Case, CaseRun]
    upstream: dict[Case, CaseRun]
    stages: list[StageCase]
    baseline_errors: dict[Case, BaselineErrors]
    precision: str


def edit_cases(cases: tuple[Case, ...], *, videos: bool = False) -> tuple[Case, ...]:
    """One case for each edit of what the bundle draws, with the prompt and the seed of the first case."""
    return tuple(replace(cases[0], edit=edit) for edit in (OF_VIDEOS if videos else OF_PICTURES))


def step_noise_seed(case: Case) -> int:
    """The seed of the noise that a sampler adds in each step, which is not the noise that the case starts from."""
    return case.seed + 1


def request_of(
    case: Case, settings: Settings, latents: Array | None = None, *, control: bool = False
) -> Request:
    """The request for a case. With `latents`, both sides start from that noise instead of the case's seed.

    A case that edits a picture starts from the case's seed in any case, and without control: a picture leaves no place
    for given latents, and diffusers has no pipelines for edits with a ControlNet or with skip-layer guidance. In a
    video, the picture takes the place of the first latent frame alone.

    Args:
        control: whether a ControlNet reads the example picture. diffusers 0.42.1 has no pipeline with a ControlNet and
            skip-layer guidance, so such cases are drawn without the latter.
    """
    if case.edit in OF_PICTURES:
        return Request(
            image=example_picture(),
            mask_image=example_mask() if case.edit is Edit.INPAINTING else None,
            strength=STRENGTH,
            skip_layer_guidance_scale=0.0,
            prompt=case.prompt,
            num_inference_steps=STEPS,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            seed=case.seed,
            output_type="np",
            allow_uniform=True,
        )
    return Request(
        control_image=example_picture() if control else None,
        skip_layer_guidance_scale=0.0 if control else None,
        image=example_picture() if case.edit in OF_VIDEOS else None,
        prompt=case.prompt,
        num_inference_steps=STEPS if case.edit else settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        seed=case.seed if latents is None else step_noise_seed(case),
        latents=latents,
        output_type="np",
        allow_uniform=True,
    )


def starting_noise(pipeline: Pipeline, case: Case, settings: Settings) -> Array:
    """The noise (1,C,H,W) that the case's seed gives, at the size that the network draws at."""
    plan = pipeline.plan(request_of(case, settings))
    shape = pipeline.manifest.latents.shape(plan.drawn_height, plan.drawn_width, plan.frames)
    return randn_latents((1, *shape), Generator(case.seed))


def start_case(pipeline: Pipeline, case: Case, settings: Settings, noise: Array) -> tuple[Plan, DenoiseState]:
    """The plan of one case, and its state before the first step."""
    control = pipeline.drawable.has_controlnet
    plan = pipeline.plan(request_of(case, settings, noise, control=control))
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
    """Draw one case and keep the latents of every step. NaN or Inf ends the run with a `problem`, without raising."""
    plan, state = start_case(pipeline, case, settings, noise)
    start, latents, x0 = state, [to_numpy(state.latents)], []
    problem = ""
    while not state.done and not problem:
        (state,) = denoise.step(pipeline.stepper, [state])
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
        case=case,
        noise=noise,
        latents=np.stack(latents),
        x0=np.stack(x0),
        start=start,
        picture=image,
        mask=None if start.kept is None else start.kept.mask,
        problem=problem,
    )


def forced_state(run: CaseRun, start: DenoiseState, step: int) -> DenoiseState:
    """The state before step `step` with the latents and history of `run`, for teacher forcing.

    Everything else, such as schedule and conditioning, stays that of `start`.
    """
    assert run.x0 is not None
    length = to_numpy(start.history).shape[1]
    history = np.zeros_like(to_numpy(start.history))
    for k in range(min(length, step)):
        history[:, k] = run.x0[step - 1 - k]
    return replace(start, latents=run.latents[step], history=history, step_index=step)


def finished_state(run: CaseRun, start: DenoiseState) -> DenoiseState:
    """The state after the last step of `run`, whose result a decoder takes. The schedule is that of `start`."""
    latents, x0 = run.latents[-1], None if run.x0 is None else run.x0[-1]
    if x0 is None and start.decodes_x0:
        # Upstream shows no x0. A last step that adds no noise leaves a multiple of it.
        column = coefficient_columns(0, noise=False).index(C0)
        x0 = latents / start.schedule[-1][COEFFICIENTS][:, column].reshape(-1, *(1,) * (latents.ndim - 1))
    return replace(start, latents=latents, x0=x0, step_index=len(start.schedule))
