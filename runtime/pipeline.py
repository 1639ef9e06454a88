"""Text to picture, written once for all backends and all model families.

    Request -> texts -> rows of conditioning (cached) -> DenoiseState -> step() x N -> vae_decoder -> pictures

The loop is the generator `steps(request)`. Callers implement progress, previews, cancelling, timing and parity with it.
"""

# B samples (prompts x num_images_per_prompt, prompt-major), R rows, C latent channels, H/W latent size

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import numpy as np
from PIL import Image

from ditc.runtime.bundle.manifest import Manifest, Tiling
from ditc.runtime.callback import FIXED, OF_ONE_RUN, StepCallback, check_callback
from ditc.runtime.compile_ahead import compile_ahead
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.control import step_session
from ditc.runtime.decode import Decoded, decode_state, join
from ditc.runtime.drawing import draw_parts
from ditc.runtime.errors import SessionError, UsageError
from ditc.runtime.failure import Tally, check_failures
from ditc.runtime.images import preview
from ditc.runtime.load_options import DEFAULTS, LoadKeywords, LoadOptions
from ditc.runtime.loop import Step, run_states
from ditc.runtime.lora.pipeline_methods import LoraMethods
from ditc.runtime.output import Drawn, Output
from ditc.runtime.prepare import Drawable, Plan, first_states, make_plan
from ditc.runtime.request import Request, make_request
from ditc.runtime.session import Session, to_numpy
from ditc.runtime.spec import DENOISER, VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER
from ditc.runtime.state import DenoiseState

if TYPE_CHECKING:
    from ditc.runtime.sessions.device import Device

__all__ = ["Pipeline", "Step"]

log = logging.getLogger(__name__)


class Pipeline(LoraMethods):
    """Runs one bundle. It holds sessions and the text cache, but no request, so requests can be interleaved."""

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
        self.device: Device | None = None  # the GPU that the engines share; None without engines
        self.backend = self.precision = ""  # of the denoiser that was loaded; "" without the loader
        self.uncertified = ""  # why parity has not certified these artifacts on this machine; "" if it has
        # Largest number of steps in one launch, for sessions that can run several (engines: as one CUDA graph). None
        # means all steps. With a callback it is always one. Only between two launches can requests be cancelled and
        # previews be drawn.
        self.steps_per_launch: int | None = None
        # May be set to another Tiling, or to None to decode in one piece.
        self.tiling: Tiling | None = manifest.defaults.tiling
        self.adapters = None
        self._closed = False
        self._borrowed: frozenset[str] = frozenset()  # stages whose sessions another pipeline closes

    @property
    def stepper(self) -> Session:
        """What computes a step: the denoiser, with the ControlNet before it if the bundle has one."""
        return step_session(self.sessions)

    @property
    def drawable(self) -> Drawable:
        """What decides which requests can be drawn."""
        return Drawable(
            manifest=self.manifest,
            denoiser=self.stepper.spec,
            decoder=self.sessions[VAE_DECODER].spec,
            conditioning=self.conditioning,
            tiling=self.tiling,
            encoder=self.sessions.get(VAE_ENCODER),
        )

    @classmethod
    def load(
        cls, bundle: str | Path, *, options: LoadOptions = DEFAULTS, **changes: Unpack[LoadKeywords]
    ) -> Self:
        """Open a bundle: check every file that will be read, then open the sessions.

            Pipeline.load("bundle/", backend="onnxruntime", threads=4)

        Args:
            bundle: its directory, or its id on the Hugging Face hub (org/name or org/name@revision), from where the
                hub's cache gets what it lacks.
            options: how to load it.
            changes: fields of `LoadOptions`, which replace those of `options`. `LoadOptions` documents them.

        Raises:
            BundleError: the bundle is damaged, or not certified although the options require it.
            SessionError: a stage cannot run on this machine.
            UsageError: an option is wrong.
            NumericsError: the self-test failed.
        """
        from ditc.runtime.opening import opened

        return opened(cls, bundle, replace(options, **changes) if changes else options)

    def with_sessions(
        self, sessions: Mapping[str, Session], *, owned: bool = False, chosen: str | None = None
    ) -> Self:
        """The same pipeline with other sessions for some stages, which may be text encoders or the conditioner.

        Args:
            sessions: by stage. A stage that is not named keeps this pipeline's session.
            owned: whether `close` of the new pipeline closes them. It never closes the sessions of this pipeline.
            chosen: describes the sessions in words; None keeps this pipeline's text.

        Raises:
            UsageError: this pipeline does not have one of the stages.
        """
        if unknown := sessions.keys() - self.sessions.keys():
            raise UsageError(
                f"the pipeline has no stage {', '.join(sorted(unknown))}",
                hint=f"use one of {', '.join(sorted(self.sessions))}",
            )
        other = type(self)(
            self.manifest,
            {**self.sessions, **sessions},
            self.conditioning.with_sessions(sessions),
            chosen=self.chosen if chosen is None else chosen,
        )
        other.uncertified = "its sessions are not the bundle's" if sessions else self.uncertified
        other.backend, other.precision = self.backend, self.precision
        other.steps_per_launch, other.tiling = self.steps_per_launch, self.tiling
        other._borrowed = frozenset(other.sessions.keys() - (sessions.keys() if owned else ()))
        return other

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *positional: object,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        return_dict: Literal[True] = True,
        **arguments: Any,
    ) -> Output: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *positional: object,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        return_dict: bool,
        **arguments: Any,
    ) -> Output | tuple[Any]: ...

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *positional: object,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Output | tuple[Any]:
        """Draw pictures. The arguments are the fields of `Request`, and those of diffusers that ask for nothing else.

        A picture with NaN, Inf or one colour only has failed. The others are drawn all the same: `failures` of the
        result names those that are missing, and each is logged as a warning.

        Args:
            positional: refused. diffusers' pipelines differ in their order, so arguments are given by name.
            callback_on_step_end: called as (pipeline, index, timestep, {"latents": ...}) after each step. Latents that
                it returns replace those of the loop. It may set `_guidance_scale` and the scales of other guidance of
                its pipeline for the next steps, or `_interrupt` to end the loop and decode what there is. To get no
                picture, raise an exception.
            callback_on_step_end_tensor_inputs: only ["latents"].
            return_dict: False returns the tuple (images,), or (frames,) of a bundle that draws videos.

        Raises:
            UsageError: the request is wrong. It is checked before any work is done.
            NumericsError: every picture failed, or one has and the request is strict.
        """
        if positional:
            raise UsageError(
                f"{positional[0]!r:.80} is given without a name", hint="give all arguments but prompt by name"
            )
        if not isinstance(return_dict, bool | int | np.bool_ | None):
            raise UsageError(f"return_dict is {return_dict!r:.80}", hint="pass True or False")
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        request = make_request(prompt=prompt, **arguments)
        output = self.draw(request, callback_on_step_end=callback_on_step_end)
        for failure in output.failures:
            log.warning("%s", failure)
        return output if return_dict else output.to_tuple()

    def draw(
        self,
        request: Request,
        *,
        on_step: Callable[[Step], None] = lambda step: None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Output:
        """Draw a whole request. `on_step` only observes each step; `callback_on_step_end` may replace the latents.

        Raises:
            NumericsError: as `__call__`.
        """
        plan = self.plan(request)
        drawn = list(self.draw_each(plan, on_step=on_step, callback_on_step_end=callback_on_step_end))
        return Output(
            images=join([picture for part in drawn for picture in part.pictures], plan),
            seed=plan.seed,
            seconds={name: sum(part.seconds[name] for part in drawn) for name in drawn[0].seconds},
            plan=plan,
            failures=tuple(failure for part in drawn for failure in part.failures),
        )

    def draw_each(
        self,
        plan: Plan,
        *,
        on_step: Callable[[Step], None] = lambda step: None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Iterator[Drawn]:
        """Draw a request part by part: as many pictures together as the denoiser's batch holds.

        Nothing is kept of a part that was taken, so memory does not depend on the number of pictures.

            for part in pipeline.draw_each(pipeline.plan(Request(prompt=texts))):
                save(part.pictures)

        Args:
            on_step, callback_on_step_end: as in `draw`.

        Raises:
            NumericsError: every picture has failed, or one has and the request is strict.
        """
        return draw_parts(self, plan, on_step, callback_on_step_end)

    def steps(self, request: Request) -> Iterator[Step]:
        """The request's denoising loop as a generator. Closing it cancels the request and leaves nothing behind.

        Raises:
            NumericsError: every picture failed, or one has and the request is strict. Otherwise `failures` of each
                step's state names those that have failed.
        """
        plan = self.plan(request)
        return run_states(self.stepper, self.states(plan), Tally(plan.pictures, request), total=plan.runs)

    def plan(self, request: Request) -> Plan:
        """Fill in the defaults, and refuse requests that this pipeline cannot draw.

        Raises:
            UsageError: the message names the argument, its value and one that works.
            SessionError: the pipeline is closed.
        """
        if self._closed:
            raise SessionError("the pipeline is closed", hint="load the bundle again")
        return make_plan(request, self.drawable)

    def states(self, plan: Plan) -> Iterator[DenoiseState]:
        """The states before the first step, each made when it is taken.

        There are several if the denoiser's batch is too small for all pictures.
        """
        return first_states(plan, self.drawable)

    def start(self, plan: Plan) -> tuple[DenoiseState, ...]:
        """All states before the first step. They hold the texts and the noise of all pictures in memory.

        Raises:
            NumericsError: a text encoder returned NaN or Inf for every picture, or for one if the request is strict.
        """
        states, tally = tuple(self.states(plan)), Tally(plan.pictures, plan.request)
        for state in states:
            tally.add_state(state)
        return states

    def run(
        self,
        states: Sequence[DenoiseState],
        *,
        steps_per_launch: int = 1,
        request: Request | None = None,
    ) -> Iterator[Step]:
        """Run the states to their ends, one state after the other, and yield after each launch.

        A state whose pictures have all failed ends early.

        Args:
            steps_per_launch: more than 1 skips the states in between. Sessions that cannot run a loop, such as those on
                a CPU, run one step in any case.
            request: the request of the states. It says whether to be strict, and names the pictures in errors.

        Raises:
            NumericsError: the pictures of all states have failed, or one has and the request is strict.
        """
        tally = Tally(sum(state.latents.shape[0] for state in states), request)
        total = sum(len(state.schedule) - state.step_index for state in states)
        return run_states(self.stepper, states, tally, total=total, steps_per_launch=steps_per_launch)

    def decode(self, states: Sequence[DenoiseState], plan: Plan) -> Any:
        """The pictures of the finished states, in the form that the request asked for.

        Raises:
            NumericsError: a picture has failed, in the loop or here. `draw` returns the others.
        """
        pictures: list[Any] = []
        for state in states:
            decoded = self.decode_state(state, plan, len(pictures))
            check_failures(decoded.failures, plan.pictures, strict=True)
            pictures += decoded.pictures
        return join(pictures, plan)

    def decode_state(self, state: DenoiseState, plan: Plan, first: int = 0) -> Decoded:
        """The pictures of one finished state, and those that failed. `first` is the index of its first picture."""
        decoder, scale = self.sessions[VAE_DECODER], self.manifest.latents.scale_factor
        return decode_state(
            decoder,
            state,
            plan,
            first=first,
            scale=scale,
            tiling=self.tiling,
            following=self.sessions.get(VAE_DECODER_NEXT),
        )

    def compile_ahead(self, plan: Plan) -> None:
        """Let the denoiser and the decoder begin to compile for the plan's pictures, if they need it."""
        compile_ahead(plan, self.drawable, self.sessions[DENOISER], self.sessions[VAE_DECODER])

    def preview(self, state: DenoiseState) -> list[Image.Image]:
        """A quick, rough picture of each sample's current x0, from the matrix that was fitted at build.

        A video's is that of its middle latent frame.
        """
        if not self.manifest.latents.rgb:
            raise UsageError(
                "this bundle has no latent-to-RGB matrix",
                hint="previews need a bundle that was built with a vae_encoder",
            )
        matrix = np.asarray(self.manifest.latents.rgb, np.float32)
        # A sample that has failed holds NaN, which no 8-bit picture can show.
        x0 = np.nan_to_num(to_numpy(state.x0 if state.x0 is not None else state.latents))
        if self.manifest.latents.has_frames:
            x0 = x0[:, :, x0.shape[2] // 2]
        return [preview(sample[None], matrix[:, :-1], matrix[:, -1]) for sample in x0]

    def close(self) -> None:
        """Close all sessions that belong to this pipeline, and release its device."""
        self._closed = True
        for name in self.sessions.keys() - self._borrowed:
            self.sessions[name].close()
        device, self.device = self.device, None
        if device is not None:
            device.leave()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_ONE_RUN:
            raise UsageError(
                f"{name} belongs to one run, and a Pipeline holds no request",
                hint="set it in callback_on_step_end, on the pipeline that is its first argument",
            )
        if name in FIXED:
            raise UsageError(
                f"{name} cannot be replaced: it is compiled into the bundle",
                hint="save the checkpoint with it, and build that",
            )
        super().__setattr__(name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
