"""Text to picture over sessions: written once, for every backend and every model family.

    Request -> texts -> rows of conditioning (cached) -> DenoiseState -> step() x N -> vae_decoder -> pictures

Progress, previews, cancel, timing and parity are what callers do with `steps(request)`, a generator.
"""

# B samples (prompts x num_images_per_prompt, prompt-major), R rows, C latent channels, H/W latent size

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np
from PIL import Image

from ditc.runtime import denoise
from ditc.runtime.bins import classify
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.denoise import DenoiseState, Rows, check_stats
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.images import is_uniform, preview, resize_and_crop, to_pil, to_uint8, to_unit_range
from ditc.runtime.manifest import Manifest, Tiling
from ditc.runtime.request import Request, check_request, check_size
from ditc.runtime.rng import Generator, randn_latents
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.session import Array, Session, to_numpy
from ditc.runtime.spec import DENOISER, VAE_DECODER
from ditc.runtime.vae import decode_tiled

log = logging.getLogger(__name__)

StepCallback = Callable[["Pipeline", int, float, dict[str, Array]], Mapping[str, Array] | None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request with every default filled in. drawn_* is the size the network draws at."""

    request: Request
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    drawn_height: int
    drawn_width: int
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """What `steps` yields after each step: 0-based index of total, and the state reached.

    Pictures that exceed the denoiser's batch are drawn in chunks, one after the other.
    """

    index: int
    total: int
    chunk: int
    timestep: float
    state: DenoiseState
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Output:
    """Pictures and how they were made. images: PIL pictures, (B,H,W,3) floats in [0,1], or (B,C,h,w) latents."""

    images: Any
    seed: int | None
    seconds: dict[str, float]
    plan: Plan


class Pipeline:
    """Runs one bundle. Holds sessions and the text cache, no request: any number may be interleaved."""

    def __init__(
        self,
        manifest: Manifest,
        sessions: Mapping[str, Session],
        conditioning: Conditioning,
        *,
        chosen: str = "",
    ) -> None:
        self.manifest = manifest
        self.sessions = dict(sessions)
        self.conditioning = conditioning
        self.chosen = chosen
        self.uncertified = ""  # why parity does not vouch for these artifacts on this machine; "" if it does
        # Set it to another Tiling, or to None to decode in one piece.
        self.tiling: Tiling | None = manifest.defaults.tiling

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "auto",
        precision: str | None = None,
        threads: int = 0,
        require_signature: Path | None = None,
        require_certificate: bool = False,
        self_test: bool = True,
    ) -> Self:
        """Open a bundle: check every file it will read, then make the sessions.

        Args:
            backend: "auto" picks what this machine runs best, and says why in the log.
            precision: of the denoiser; None for what fits the backend best.
            threads: for CPU backends; 0 lets the backend choose.
            require_signature: ed25519 public key (PEM) whose owner must have signed the bundle.
            require_certificate: refuse artifacts that parity has not proven, or not on this machine.
            self_test: run the golden inputs when an engine is first used on a GPU.

        Raises:
            BundleError, SessionError, UsageError. NumericsError: the self-test failed.
        """
        from ditc.runtime.certificate import check_standing
        from ditc.runtime.loader import load_parts
        from ditc.runtime.selftest import first_use

        parts = load_parts(
            Path(bundle),
            backend=backend,
            precision=precision,
            threads=threads,
            require_signature=require_signature,
        )
        pipeline = cls(parts.manifest, parts.sessions, parts.conditioning, chosen=parts.chosen)
        if self_test:
            first_use(Path(bundle), parts.manifest, parts.sessions, parts.artifacts)
        pipeline.uncertified = check_standing(
            Path(bundle), parts.manifest, parts.artifacts, required=require_certificate
        )
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        **arguments: Any,
    ) -> Output:
        """Draw pictures. Arguments are the fields of `Request`.

        Args:
            callback_on_step_end: called as (pipeline, index, timestep, {"latents": ...}); latents that it returns
                replace the loop's.

        Raises:
            UsageError: before any work. NumericsError: NaN, Inf or a picture of one colour.
        """
        return self.draw(Request(prompt=prompt, **arguments), callback_on_step_end=callback_on_step_end)

    def draw(
        self,
        request: Request,
        *,
        on_step: Callable[[Step], None] = lambda step: None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Output:
        """A whole request: text, loop, decoding. `on_step` watches; `callback_on_step_end` may interfere."""
        plan = self.plan(request)
        clock = _Clock()
        states = list(self.start(plan))
        clock.lap("text")
        for step in self.run(states, callback_on_step_end):
            states[step.chunk] = step.state
            on_step(step)
        clock.lap("denoise")
        images = self.decode(states, plan)
        clock.lap("decode")
        return Output(images=images, seed=plan.seed, seconds=clock.laps, plan=plan)

    def steps(self, request: Request) -> Iterator[Step]:
        """The request's denoising loop as a generator; closing it cancels, and nothing is left behind."""
        return self.run(self.start(self.plan(request)))

    def plan(self, request: Request) -> Plan:
        """Fill in the defaults and refuse what cannot be served.

        Raises:
            UsageError: naming the argument, its value and the nearest that works.
        """
        check_request(request)
        defaults, bins = self.manifest.defaults, self.manifest.defaults.bins
        height = defaults.height if request.height is None else request.height
        width = defaults.width if request.width is None else request.width
        drawn = (height, width)
        if bins and request.use_resolution_binning:
            drawn = classify(height, width, bins)
        check_size(*drawn, self.manifest.latents, self.sessions[DENOISER].spec, defaults)
        chosen = request.seed is not None or request.generator is not None or request.latents is not None
        return Plan(
            request=request,
            num_inference_steps=request.num_inference_steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale
            if request.guidance_scale is None
            else request.guidance_scale,
            height=height,
            width=width,
            drawn_height=drawn[0],
            drawn_width=drawn[1],
            seed=request.seed if chosen else secrets.randbits(32),
        )

    def start(self, plan: Plan) -> tuple[DenoiseState, ...]:
        """The states before the first step: one, or several where the pictures exceed the denoiser's batch."""
        request, spec = plan.request, self.sessions[DENOISER].spec
        samples = request.num_prompts * request.num_images_per_prompt
        # Samplers that draw noise on every step go on with the stream that drew the starting latents.
        generator = Generator(plan.seed or 0) if request.generator is None else request.generator
        latents = self._starting_latents(plan, samples, generator)
        guided = plan.guidance_scale > 1
        positive = self._rows(request, samples, negative=False)
        negative = self._rows(request, samples, negative=True) if guided else []
        largest = spec.profile["batch"].max
        states = []
        for i in range(0, samples, largest):
            chunk = slice(i, i + largest)
            stream = generator if isinstance(generator, Generator) else generator[chunk]
            states.append(self._state(plan, latents[chunk], positive[chunk], negative[chunk], stream))
        return tuple(states)

    def run(self, states: Sequence[DenoiseState], callback: StepCallback | None = None) -> Iterator[Step]:
        """Step every state to its end, one state after the other, and yield after each step."""
        total = sum(len(state.schedule) - state.step_index for state in states)
        index = 0
        for chunk, state in enumerate(states):
            while not state.done:
                before = perf_counter()
                timestep = float(state.schedule[state.step_index][denoise.TIMESTEP][0])
                (state,) = denoise.step(self.sessions[DENOISER], [state])
                if (
                    isinstance(state.stats, np.ndarray) or state.done
                ):  # on a device, reading stats would wait for it
                    check_stats(state, DENOISER)
                seconds = perf_counter() - before
                if callback is not None:
                    state = self._called_back(callback, state, timestep)
                yield Step(
                    index=index, total=total, chunk=chunk, timestep=timestep, state=state, seconds=seconds
                )
                index += 1

    def decode(self, states: Sequence[DenoiseState], plan: Plan) -> Any:
        """The finished states as pictures in the form that the request asked for.

        Raises:
            NumericsError: the decoder left NaN or Inf, or a picture of one colour.
        """
        if plan.request.output_type == "latent":
            return np.concatenate([to_numpy(state.latents) for state in states])
        pictures = [self._picture(sample, plan) for state in states for sample in to_numpy(state.latents)]
        for index, picture in enumerate(pictures):
            if is_uniform(to_uint8(picture)):
                _complain(f"picture {index} has one colour only", allowed=plan.request.allow_uniform)
        if plan.request.output_type == "np":
            return np.concatenate([to_unit_range(picture) for picture in pictures])
        return [image for picture in pictures for image in to_pil(to_uint8(picture))]

    def preview(self, state: DenoiseState) -> list[Image.Image]:
        """What the current x0 looks like, through the matrix fitted at build: quick and rough, one per sample."""
        if not self.manifest.latents.rgb:
            raise UsageError(
                "this bundle has no latent-to-RGB matrix", hint="previews need one built with a vae_encoder"
            )
        matrix = np.asarray(self.manifest.latents.rgb, np.float32)
        x0 = to_numpy(state.x0 if state.x0 is not None else state.latents)
        return [preview(sample[None], matrix[:, :-1], matrix[:, -1]) for sample in x0]

    def close(self) -> None:
        """Release all sessions."""
        for session in self.sessions.values():
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _starting_latents(
        self, plan: Plan, samples: int, generator: Generator | Sequence[Generator]
    ) -> Array:
        latent = self.manifest.latents
        cells = (plan.drawn_height // latent.scale_factor, plan.drawn_width // latent.scale_factor)
        shape = (samples, latent.channels, *cells)
        given = plan.request.latents
        if given is not None:
            given = np.asarray(given, np.float32)
            if given.shape != shape:
                raise UsageError(
                    f"latents are {given.shape}, this request needs {shape}",
                    hint="pass (pictures, channels, height, width) in latent cells of the drawn size",
                )
            return given
        return randn_latents(shape, generator)

    def _rows(self, request: Request, samples: int, *, negative: bool) -> list[Mapping[str, Array]]:
        """One row of conditioning a sample."""
        embeds = request.negative_prompt_embeds if negative else request.prompt_embeds
        mask = request.negative_prompt_attention_mask if negative else request.prompt_attention_mask
        if embeds is not None and mask is not None:
            rows = [self.conditioning.of_embeds(e, m) for e, m in zip(embeds, mask, strict=True)]
        else:
            texts = request.negative_prompts if negative else request.prompts
            rows = [self.conditioning.of_text(text, negative=negative) for text in texts]
        return [row for row in rows for _ in range(samples // len(rows))]

    def _state(
        self,
        plan: Plan,
        latents: Array,
        positive: Sequence[Mapping[str, Array]],
        negative: Sequence[Mapping[str, Array]],
        generator: Generator | Sequence[Generator],
    ) -> DenoiseState:
        batch, history = latents.shape[0], self._history_length()
        rows = [*negative, *positive]  # diffusers' order
        weights = np.eye(batch, dtype=np.float32)
        if negative:
            g = np.float32(plan.guidance_scale)
            weights = np.concatenate([(1 - g) * weights, g * weights], axis=1)
        table = coefficient_table(self.manifest.scheduler, plan.num_inference_steps, history_length=history)
        schedule = tuple(
            {
                denoise.TIMESTEP: np.repeat(timestep, batch),
                denoise.COEFFICIENTS: np.repeat(coefficients[None], batch, axis=0),
                denoise.GUIDANCE_WEIGHTS: weights,
            }
            for timestep, coefficients in zip(table.timesteps, table.coefficients, strict=True)
        )
        return DenoiseState(
            latents=latents * np.float32(table.init_noise_sigma),
            history=np.zeros((batch, history, *latents.shape[1:]), np.float32),
            schedule=schedule,
            rows=Rows(
                row_of=np.tile(np.arange(batch, dtype=np.int64), len(rows) // batch),
                conditioning=_stack_rows(rows),
            ),
            generator=generator,
        )

    def _history_length(self) -> int:
        length = self.sessions[DENOISER].spec.input(denoise.HISTORY).shape[1]
        assert isinstance(length, int)
        return length

    def _called_back(self, callback: StepCallback, state: DenoiseState, timestep: float) -> DenoiseState:
        given = {denoise.LATENTS: to_numpy(state.latents)}
        returned = callback(self, state.step_index - 1, timestep, given) or {}
        if unknown := returned.keys() - given.keys():
            raise UsageError(
                f"callback_on_step_end returned {sorted(unknown)}", hint='only "latents" can be replaced'
            )
        if not returned:
            return state
        latents = np.asarray(returned[denoise.LATENTS], np.float32)
        if latents.shape != tuple(state.latents.shape):
            raise UsageError(
                f"callback_on_step_end returned latents {latents.shape}, the loop's are {state.latents.shape}",
                hint="return an array of the same shape",
            )
        return replace(state, latents=latents)

    def _picture(self, latents_CHW: Array, plan: Plan) -> Array:
        """One picture (1,3,H,W), nominal range [-1,1], at the asked size."""
        session, spec = self.sessions[VAE_DECODER], self.sessions[VAE_DECODER].spec

        def decode_one(latents: Array) -> Array:
            (image,) = session.run({spec.inputs[0].name: latents}).values()
            return to_numpy(image)

        latents = latents_CHW[None]
        if self.tiling is None:
            image = decode_one(latents)
        else:
            image = decode_tiled(
                decode_one,
                latents,
                tile=self.tiling.tile,
                stride=self.tiling.stride,
                scale=self.manifest.latents.scale_factor,
            )
        if not np.isfinite(image).all():
            raise NumericsError(
                f"{VAE_DECODER}: the picture has NaN or Inf", hint="rebuild this stage in bf16 or fp32"
            )
        if image.shape[2:] != (plan.height, plan.width):
            image = resize_and_crop(image, plan.height, plan.width)
        return image


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        now = perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _stack_rows(rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    lengths = {name: {row[name].shape[1:] for row in rows} for name in rows[0]}
    for name, shapes in lengths.items():
        if len(shapes) > 1:
            raise UsageError(
                f"prompts and negative prompts have different lengths: {name} is {sorted(shapes)}",
                hint="pad prompt_embeds and negative_prompt_embeds to one number of tokens",
            )
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _complain(message: str, *, allowed: bool) -> None:
    if not allowed:
        raise NumericsError(
            message, hint="a picture of one colour is almost always a defect; allow_uniform=True keeps it"
        )
    log.warning("%s", message)
