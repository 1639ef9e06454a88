"""Callbacks in the form of diffusers: what they are given after each step, and what they may change.

    callback(pipeline, index, timestep, {"latents": latents}) -> {"latents": latents} or None

diffusers' loop reads some attributes of its pipeline before every step, and callbacks set them: `_guidance_scale` to
change or end guidance, `_interrupt` to end the loop. Here they are attributes of a view, because a Pipeline holds no
request.
"""

# B samples

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ditc.runtime.arrays import given_array
from ditc.runtime.errors import UsageError
from ditc.runtime.guidance import is_guided
from ditc.runtime.schedulers import SchedulerParams, reads_earlier_latents
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import LATENTS, GuidanceMode, StepContract

if TYPE_CHECKING:
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan

StepCallback = Callable[[Any, int, float, dict[str, Array]], Mapping[str, Any] | None]

# Attributes that a callback may set for the steps that follow.
SCALES = ("_guidance_scale", "_skip_layer_guidance_scale", "_pag_scale", "_pag_adaptive_scale")
OF_ONE_RUN = (*SCALES, "_interrupt")
READ_ONLY = ("guidance_scale", "do_classifier_free_guidance", "num_timesteps", "interrupt")
# Attributes of diffusers' pipelines whose counterparts are compiled into a bundle.
FIXED = (
    *("scheduler", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3", "_attention_kwargs", "_joint_attention_kwargs"),
)


class RunningPipeline:
    """The pipeline as a callback sees it: with the attributes of diffusers' pipelines that belong to one run.

    All other attributes are the pipeline's own.
    """

    def __init__(self, pipeline: Pipeline, plan: Plan) -> None:
        skip, pag = plan.skip_layer_guidance, plan.perturbed_attention_guidance
        self.__dict__.update(
            _pipeline=pipeline,
            _guidance_scale=plan.guidance_scale,
            _skip_layer_guidance_scale=skip.scale if skip else 0.0,
            _pag_scale=pag.scale if pag else 0.0,
            _pag_adaptive_scale=pag.adaptive_scale if pag else 0.0,
            _interrupt=False,
            _num_timesteps=len(plan.table),
        )

    @property
    def guidance_scale(self) -> float:
        return float(self._guidance_scale)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return int(self._num_timesteps)

    @property
    def interrupt(self) -> bool:
        return bool(self._interrupt)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pipeline"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*FIXED, *READ_ONLY):
            raise UsageError(
                f"callback_on_step_end sets {name}, which has no effect",
                hint=f"between steps, {', '.join(OF_ONE_RUN)} and the latents can be changed",
            )
        if name in SCALES and not _is_finite(value):
            raise UsageError(f"callback_on_step_end sets {name} to {value!r:.80}", hint="set a finite number")
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self._pipeline, name, value)


class Callback:
    """Calls a callback after every step of one state, and applies what it changed to the steps that follow.

    Args:
        contract: that of the denoiser's step.
    """

    def __init__(
        self, function: StepCallback, pipeline: Pipeline, plan: Plan, contract: StepContract
    ) -> None:
        self._function, self._plan, self._contract = function, plan, contract
        self._view = RunningPipeline(pipeline, plan)
        self._scales = self._read_scales()
        self._all_rows: Rows | None = None

    def __call__(self, state: DenoiseState, timestep: float) -> DenoiseState:
        """The state from which the loop goes on.

        Raises:
            UsageError: the callback returned or set something that cannot be used.
        """
        returned = self._function(
            self._view, state.step_index - 1, timestep, {LATENTS: to_numpy(state.latents)}
        )
        state = _with_latents(state, returned, self._view.manifest.scheduler)
        if self._view.interrupt:
            return replace(state, schedule=state.schedule[: state.step_index])
        if self._read_scales() != self._scales:
            self._scales = self._read_scales()
            return self._rescaled(state, *self._scales)
        return state

    def _read_scales(self) -> tuple[float, ...]:
        return tuple(float(getattr(self._view, name)) for name in SCALES)

    def _rescaled(
        self,
        state: DenoiseState,
        guidance_scale: float,
        skip_scale: float,
        pag_scale: float,
        pag_adaptive_scale: float,
    ) -> DenoiseState:
        """The state with other weights for the remaining steps, and with the rows that these need."""
        plan, skip, pag = self._plan, self._plan.skip_layer_guidance, self._plan.perturbed_attention_guidance
        guided, batch = is_guided(self._contract, guidance_scale), state.latents.shape[0]
        if self._contract.guidance is not GuidanceMode.CFG or (guided and not plan.guided):
            raise UsageError(
                f"callback_on_step_end sets _guidance_scale to {guidance_scale:g}, but this run has no unconditional "
                "rows",
                hint="begin with guidance_scale above 1, if the bundle takes it",
            )
        if skip is None and skip_scale:
            raise UsageError(
                f"callback_on_step_end sets _skip_layer_guidance_scale to {skip_scale:g}, but this run skips no layers",
                hint="begin with skip_layer_guidance_scale, if the bundle takes it",
            )
        if pag is None and (pag_scale or pag_adaptive_scale):
            raise UsageError(
                f"callback_on_step_end sets _pag_scale to {pag_scale:g} and _pag_adaptive_scale to "
                f"{pag_adaptive_scale:g}, but this run perturbs no attention",
                hint="begin with pag_scale, if the bundle takes it",
            )
        changed = replace(
            plan,
            guidance_scale=guidance_scale,
            skip_layer_guidance=skip and replace(skip, scale=skip_scale),
            perturbed_attention_guidance=pag
            and replace(pag, scale=max(pag_scale, 0.0), adaptive_scale=pag_adaptive_scale),
        )
        feeds = changed.guidance_feeds(self._contract, batch)
        schedule = [{**old, **new} for old, new in zip(state.schedule, feeds, strict=True)]
        self._all_rows = self._all_rows or state.rows
        rows = self._all_rows
        if not guided:
            rows = rows.part(rows.conditional, len(rows.row_of))
        return replace(
            state, schedule=(*state.schedule[: state.step_index], *schedule[state.step_index :]), rows=rows
        )


def check_callback(callback: object, tensor_inputs: object) -> None:
    """Refuse a callback that cannot be called, or that wants tensors that a compiled step does not have.

    Raises:
        UsageError: the message names them.
    """
    if callback is not None and not callable(callback):
        raise UsageError(f"callback_on_step_end is {callback!r:.80}", hint="pass a function")
    wanted = getattr(callback, "tensor_inputs", tensor_inputs)  # diffusers' own callbacks bring their list
    if wanted is None:
        return
    names = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [None]
    if not all(isinstance(name, str) and name == LATENTS for name in names):
        raise UsageError(
            f"callback_on_step_end_tensor_inputs is {wanted!r:.80}, but a callback gets only latents",
            hint='leave it out or pass ["latents"]; to end guidance, set pipeline._guidance_scale = 0 in the callback: '
            "the embeddings follow by themselves",
        )


def _with_latents(state: DenoiseState, returned: object, scheduler: SchedulerParams) -> DenoiseState:
    if returned is None:
        return state
    if not isinstance(returned, Mapping):
        raise UsageError(
            f"callback_on_step_end returned {returned!r:.80}", hint='return {"latents": latents}, or None'
        )
    if unknown := returned.keys() - {LATENTS}:
        raise UsageError(
            f"callback_on_step_end returned {sorted(map(str, unknown))}",
            hint='only "latents" can be replaced',
        )
    if LATENTS not in returned:
        return state
    hint = "return an array of the loop's shape"
    # NaN passes: the latents of a picture that has failed hold NaN, and the next step names the others that do.
    latents = given_array("latents of callback_on_step_end", returned[LATENTS], hint=hint, finite=False)
    if latents.shape != tuple(state.latents.shape):
        raise UsageError(
            f"callback_on_step_end returned latents {latents.shape}, but the loop's are {tuple(state.latents.shape)}",
            hint=hint,
        )
    if reads_earlier_latents(scheduler):
        if not np.array_equal(latents, to_numpy(state.latents), equal_nan=True):
            raise UsageError(
                f"callback_on_step_end returned other latents, but {scheduler.kind} goes on from those of an earlier "
                "step: in diffusers they would have no effect",
                hint="leave the latents as they are; Euler and DPM-Solver take them, but draw other pictures",
            )
        return state
    return replace(state, latents=latents)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False
