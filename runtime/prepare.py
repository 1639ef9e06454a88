"""Prepares a request: everything that is decided before the first step (sizes, guidance, noise, text rows, schedule).

`make_plan` fills in the bundle's defaults and refuses requests that the bundle cannot draw, before any work is done.
`first_states` then encodes the texts, draws the noise and computes the schedule.
"""

# B pictures (prompts x num_images_per_prompt, prompt-major), R rows, C latent channels

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ditc.runtime.arrays import given_array
from ditc.runtime.bundle.manifest import Manifest, PerturbedAttentionGuidance, SkipLayerGuidance, Tiling
from ditc.runtime.conditioning import Conditioning, stack_texts
from ditc.runtime.control import Control, decide_control, has_control
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.failure import Failure, check_failures, named
from ditc.runtime.guidance import (
    ALL_STEPS,
    check_guidance,
    decide_guidance_interval,
    decide_perturbed_attention_guidance,
    decide_skip_layer_guidance,
    guidance_feeds,
    is_guided,
    perturbed_attention_scales,
    skip_layer_scales,
)
from ditc.runtime.image_states import image_latents, noise_of_runs, with_control, with_image
from ditc.runtime.noise import Parts, Whole, noise_parts
from ditc.runtime.request import Request
from ditc.runtime.request_checks import checked
from ditc.runtime.rng import Generator
from ditc.runtime.schedulers import CoefficientTable, coefficient_table, number_of_steps
from ditc.runtime.session import Array, Session
from ditc.runtime.sizes import check_size, classify
from ditc.runtime.spec import StageSpec
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import BATCH, COEFFICIENTS, HELD, TIMESTEP, StepContract
from ditc.runtime.vae import check_tiles
from ditc.runtime.video import check_video_request, decide_frames

# diffusers' default in the pipelines that take an image.
STRENGTH = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawable:
    """What decides which requests a pipeline can draw: its manifest, and the specs of the sessions that it runs.

    Attributes:
        denoiser: the spec of what computes a step, which is the denoiser with the ControlNet, if there is one.
        decoder: the spec of the VAE's decoder.
        tiling: how the VAE works in tiles; None encodes and decodes in one piece.
        encoder: the VAE's encoder, for requests with an image; None if the bundle has none that can run here.
    """

    manifest: Manifest
    denoiser: StageSpec
    decoder: StageSpec
    conditioning: Conditioning
    tiling: Tiling | None
    encoder: Session | None = None

    @property
    def contract(self) -> StepContract:
        """The contract of the denoiser's step."""
        return self.manifest.step_contract(self.denoiser)

    @property
    def has_controlnet(self) -> bool:
        return has_control(self.denoiser)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request with every default filled in.

    Attributes:
        num_inference_steps: the number of steps, as diffusers counts them, of which an image leaves out the first.
        table: the schedule, with one row per run of the network.
        height, width: the size of the pictures, in pixels.
        drawn_height, drawn_width: the size that the network draws, in pixels, before it is resized to height and width.
        guided: whether there are unconditional rows, which use the negative prompt.
        seed: None if the caller gave a generator or latents instead of a seed.
        skip_layer_guidance, perturbed_attention_guidance: None if it is off. At most one of them is on.
        guidance_interval: the fractions of the steps between which guidance acts.
        at_once: how many pictures are drawn together, as the denoiser's batch allows.
        strength: how much of the image is replaced; None without an image, and for videos, which hold it.
        begin_index: the first step that is done. It is 0 without a strength.
        control: how the control picture acts; None without one.
        frames: the number of frames of each video; None for pictures.
    """

    request: Request
    num_inference_steps: int
    table: CoefficientTable
    guidance_scale: float
    guided: bool
    height: int
    width: int
    drawn_height: int
    drawn_width: int
    seed: int | None
    at_once: int
    skip_layer_guidance: SkipLayerGuidance | None = None
    perturbed_attention_guidance: PerturbedAttentionGuidance | None = None
    guidance_interval: tuple[float, float] = ALL_STEPS
    strength: float | None = None
    begin_index: int = 0
    control: Control | None = None
    frames: int | None = None

    @property
    def pictures(self) -> int:
        """The number of pictures."""
        return self.request.num_pictures

    @property
    def runs(self) -> int:
        """How often the network runs for all pictures together."""
        return -(-self.pictures // self.at_once) * len(self.table)

    @property
    def holds_first_frame(self) -> bool:
        """Whether the first latent frame is an image, and stays as it is in all steps (image-to-video)."""
        return self.frames is not None and self.request.image is not None

    @property
    def gated(self) -> bool:
        """Whether there are gated rows."""
        return self.skip_layer_guidance is not None or self.perturbed_attention_guidance is not None

    def guidance_feeds(self, contract: StepContract, batch: int) -> list[dict[str, Array]]:
        """The denoiser's inputs for guidance of `batch` pictures, for each run of the network."""
        runs, scales = len(self.table), [0.0] * len(self.table)
        if self.skip_layer_guidance is not None and is_guided(contract, self.guidance_scale):
            steps = self.num_inference_steps - self.begin_index
            scales = skip_layer_scales(self.skip_layer_guidance, steps, runs)
        if self.perturbed_attention_guidance is not None:
            timesteps = self.table.scheduler_timesteps.tolist()
            scales = perturbed_attention_scales(self.perturbed_attention_guidance, timesteps)
        return guidance_feeds(contract, batch, self.guidance_scale, scales, self.guidance_interval)


def make_plan(request: Request, drawable: Drawable) -> Plan:
    """Fill in the bundle's defaults.

    Raises:
        UsageError: the bundle cannot draw this. The message names the argument, its value and one that works.
    """
    request = checked(request)
    drawable.conditioning.check_request(request)
    manifest, contract = drawable.manifest, drawable.contract
    defaults, scale = manifest.defaults, manifest.latents.scale_factor
    height = defaults.height if request.height is None else request.height
    width = defaults.width if request.width is None else request.width
    drawn = (height, width)
    if defaults.bins and request.use_resolution_binning:
        drawn = classify(height, width, defaults.bins)
    check_guidance(request, contract)
    check_size(*drawn, manifest.latents, drawable.denoiser, defaults)
    frames = decide_frames(request, manifest, drawable.denoiser)
    if frames is not None:
        check_video_request(request, manifest.latents, contract, frames)
    elif request.image is not None and request.latents is not None:
        raise UsageError(
            "image and latents are both given",
            hint="pass either a picture to start from, or starting latents",
        )
    if request.output_type != "latent":
        cells = (drawn[0] // scale, drawn[1] // scale)
        check_tiles(*cells, drawable.decoder, drawable.tiling, scale=scale, default=defaults.tiling)
    request = _resized(request, *drawn)
    guidance = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    steps = number_of_steps(
        manifest.scheduler,
        request.num_inference_steps,
        defaults.num_inference_steps,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
    )
    control = decide_control(request, has_controlnet=drawable.has_controlnet)
    for name in ("image", "control_image"):
        _check_can_encode(request, name, drawable)
    strength = None
    if request.image is not None and frames is None:
        strength = STRENGTH if request.strength is None else request.strength
    begin_index = _begin_index(strength, steps)
    table = coefficient_table(
        manifest.scheduler,
        steps,
        begin_index,
        columns=contract.columns,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
        mu=request.mu,
        image_seq_len=manifest.latents.num_patches(*drawn),
        max_timesteps=request.max_timesteps,
        intermediate_timesteps=request.intermediate_timesteps,
    )
    # Given latents leave nothing to draw, unless the sampler adds noise.
    drawn_nothing = request.latents is not None and not contract.noise
    chosen = request.seed is not None or request.generator is not None or drawn_nothing
    guided = is_guided(contract, guidance)
    pag = decide_perturbed_attention_guidance(request, defaults, contract)
    return Plan(
        request=request,
        num_inference_steps=steps,
        table=table,
        guidance_scale=guidance,
        guided=guided,
        height=height,
        width=width,
        drawn_height=drawn[0],
        drawn_width=drawn[1],
        seed=request.seed if chosen else secrets.randbits(32),
        at_once=drawable.denoiser.profile[BATCH].max,
        skip_layer_guidance=decide_skip_layer_guidance(request, defaults, contract, guidance),
        perturbed_attention_guidance=pag,
        guidance_interval=decide_guidance_interval(request, contract, has_rows=guided or pag is not None),
        strength=strength,
        begin_index=begin_index,
        control=control,
        frames=frames,
    )


def _resized(request: Request, height: int, width: int) -> Request:
    """The request with its pictures at the drawn size."""
    given = {name: getattr(request, name) for name in ("image", "mask_image", "control_image")}
    return replace(
        request,
        **{
            name: pictures.resized(height, width, masks=name == "mask_image")
            for name, pictures in given.items()
            if pictures is not None
        },
    )


def _check_can_encode(request: Request, name: str, drawable: Drawable) -> None:
    """Raise UsageError if the request has such a picture and the bundle has no encoder for it."""
    if getattr(request, name) is not None and drawable.encoder is None:
        raise UsageError(
            f"{name} is given, but this bundle has no vae_encoder that can run here",
            hint="build the bundle again, for a backend of this machine: ditc build CHECKPOINT -o BUNDLE",
        )


def _begin_index(strength: float | None, steps: int) -> int:
    """The first step of a request with an image: get_timesteps of diffusers' image-to-image pipelines.

    Raises:
        UsageError: the strength leaves no step.
    """
    if strength is None:
        return 0
    begin = int(max(steps - min(steps * strength, steps), 0))
    if begin == steps:
        raise UsageError(
            f"strength {strength:g} of {steps} steps leaves no step",
            hint="pass a strength above 0: the smallest one still does the last step",
        )
    return begin


def first_states(plan: Plan, drawable: Drawable) -> Iterator[DenoiseState]:
    """The states before the first step: one, or several if there are more pictures than the denoiser's batch allows.

    Each is made when it is taken, so that memory holds the texts and the noise of one state only. A text for which an
    encoder returns NaN or Inf is a failure of its pictures. Their samples stay in the state, so that the others keep
    their noise, and are stepped along with the rows of another text. If no text of a state has rows, it has none.

    Raises:
        UsageError: latents or embeddings do not fit, or a text cannot be encoded.
        NumericsError: a text encoder returned NaN or Inf for every picture, or for one if the request is strict.
    """
    request, total = plan.request, plan.pictures
    generator = Generator(plan.seed or 0) if request.generator is None else request.generator
    shape = _latents_shape(plan, drawable.manifest)
    images = image_latents(plan, drawable, shape, request.image, generator)
    controls = image_latents(plan, drawable, shape, request.control_image, None)
    latents = _starting_latents(request, shape, generator)
    fresh = noise_of_runs(plan, drawable.contract.noise, shape, generator)
    if total > plan.at_once:  # otherwise all texts are encoded before anything is drawn
        drawable.conditioning.check_texts(request, negative=plan.guided)
    for first in range(0, total, plan.at_once):
        pictures = range(first, min(first + plan.at_once, total))
        failures: dict[int, Failure] = {}
        positive = _rows(drawable.conditioning, plan, pictures, failures, negative=False)
        negative = (
            _rows(drawable.conditioning, plan, pictures, failures, negative=True) if plan.guided else []
        )
        state = _first_state(
            plan,
            drawable,
            latents.take(len(pictures)),
            positive,
            negative,
            [{name: parts.take(len(pictures)) for name, parts in feeds.items()} for feeds in fresh],
        )
        if drawable.has_controlnet:
            state = with_control(state, plan, controls)
        if images is not None:
            state = with_image(state, plan, drawable, pictures, images)
        failed = [replace(failure, index=i - first) for i, failure in sorted(failures.items())]
        yield replace(state, failures=tuple(failed))


def _latents_shape(plan: Plan, manifest: Manifest) -> tuple[int, ...]:
    return (plan.pictures, *manifest.latents.shape(plan.drawn_height, plan.drawn_width, plan.frames))


def _starting_latents(
    request: Request, shape: tuple[int, ...], generator: Generator | Sequence[Generator]
) -> Parts:
    """The starting latents (B,C,H,W) fp32: those of the caller, or noise.

    Raises:
        UsageError: the caller's latents have the wrong shape, or hold NaN or Inf.
    """
    if request.latents is None:
        return noise_parts(shape, generator)
    given = given_array("latents", request.latents, hint=f"pass an array of shape {shape}")
    if given.shape != shape:
        raise UsageError(
            f"latents have shape {given.shape}, but this request needs {shape}",
            hint="pass an array (pictures, channels, [frames,] height, width), with the drawn size in latent cells",
        )
    return Whole(given)


def _first_state(
    plan: Plan,
    drawable: Drawable,
    latents: Array,
    positive: Sequence[Mapping[str, Array]],
    negative: Sequence[Mapping[str, Array]],
    noise: Sequence[Mapping[str, Array]],
) -> DenoiseState:
    """The state of B pictures, from one row of conditioning per picture and the noise of each run."""
    batch, contract, table = latents.shape[0], drawable.contract, plan.table
    padding = drawable.conditioning.padding
    rows = [*negative, *positive, *(positive if plan.gated else [])]  # the order of diffusers
    guidance = plan.guidance_feeds(contract, batch)
    held = {HELD: np.zeros((batch, latents.shape[2]), np.float32)} if contract.holds_frames else {}
    return DenoiseState(
        latents=latents * np.float32(table.init_noise_sigma),
        history=np.zeros((batch, contract.history_length, *latents.shape[1:]), np.float32),
        schedule=tuple(
            {
                TIMESTEP: np.repeat(timestep, batch),
                COEFFICIENTS: np.repeat(coefficients[None], batch, axis=0),
                **feeds,
                **held,
                **fresh,
            }
            for timestep, coefficients, feeds, fresh in zip(
                table.timesteps, table.coefficients, guidance, noise, strict=True
            )
        ),
        rows=Rows(
            row_of=np.tile(np.arange(batch, dtype=np.int64), len(rows) // batch),
            conditioning=stack_texts(rows, padding),
            conditional=len(negative),
            padding=padding,
        ),
        decodes_x0=table.decodes_x0,
    )


def _rows(
    conditioning: Conditioning, plan: Plan, pictures: range, failures: dict[int, Failure], *, negative: bool
) -> list[Mapping[str, Array]]:
    """One row of conditioning per picture, or none if every text failed.

    Adds the failures of texts to those that are known, by picture.
    """
    request, per_text = plan.request, plan.request.num_images_per_prompt
    texts = [index // per_text for index in pictures]
    found = conditioning.rows(request.of_prompts(texts[0], texts[-1] + 1), negative=negative)
    rows = [found[text - texts[0]] for text in texts]
    for index, row in zip(pictures, rows, strict=True):
        if isinstance(row, NumericsError):
            failures.setdefault(index, Failure(index=index, reason=str(row), hint=row.hint))
    lost = [named(failure, index, request) for index, failure in sorted(failures.items())]
    check_failures(lost, plan.pictures, strict=request.strict)
    good = next((row for row in rows if not isinstance(row, NumericsError)), None)
    if good is None:
        return []
    return [good if isinstance(row, NumericsError) else row for row in rows]
