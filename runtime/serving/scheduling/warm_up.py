"""Runs a pipeline before it is served: kernels are compiled, memory is allocated, and its times are measured."""

from __future__ import annotations

import logging
from dataclasses import replace
from time import monotonic

from ditc.runtime.batch import STEADY_RUN, Batch
from ditc.runtime.bundle.bench_record import Measured
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.request import Request
from ditc.runtime.serving.scheduling.job import batch_key
from ditc.runtime.serving.scheduling.step_times import TEXT, StepTimes
from ditc.runtime.serving.scheduling.videos import VideoDecoding
from ditc.runtime.spec import CONTROLNET, DENOISER, VAE_DECODER
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import ROWS

log = logging.getLogger(__name__)


def begin_with(pipeline: Pipeline, times: StepTimes, recorded: Measured | None) -> None:
    """Take the times of sizes and batches that were measured earlier. What is measured from now on corrects them.

    Args:
        times: gets the times.
        recorded: of this bundle's artifacts, on a machine of this kind.
    """
    for case in () if recorded is None else recorded.cases:
        step, decoding = case.stages.get(DENOISER), case.stages.get(VAE_DECODER)
        texts = [
            spread.median_s
            for name, spread in case.stages.items()
            if name not in (DENOISER, CONTROLNET, VAE_DECODER)
        ]
        request = Request(
            prompt="warm-up",
            seed=0,
            height=case.height,
            width=case.width,
            num_inference_steps=case.steps,
            use_resolution_binning=False,
        )
        (state,) = pipeline.states(replace(pipeline.plan(request), at_once=1))
        if step is not None and case.batch <= times.max_batch:
            times.record(batch_key(state), case.batch, step.median_s)
        times.record_stage(TEXT, case.batch, sum(texts))
        if decoding is not None:
            times.record_stage(VAE_DECODER, case.batch * case.height * case.width, decoding.median_s)


def warm_up(pipeline: Pipeline, times: StepTimes, *, seconds: float) -> None:
    """Draw a picture of the default size, and step batches of growing size, until the time is up or they do not pay.

    Args:
        times: gets the measurements.
        seconds: no larger batch is begun after so many seconds. The single picture is drawn in any case.
    """
    begin = monotonic()
    request = Request(prompt="warm-up", seed=0, allow_uniform=True)
    plan = replace(pipeline.plan(request), at_once=1)
    denoiser = pipeline.stepper
    rows = denoiser.spec.profile[ROWS].max if ROWS in denoiser.spec.profile else None
    before = monotonic()
    (state,) = pipeline.states(plan)
    times.record_stage(TEXT, 1, monotonic() - before)
    key, without_gain = batch_key(state), 0
    size = 1
    while size <= times.max_batch and (rows is None or size * key.rows <= rows):
        many = replace(plan, request=replace(request, num_images_per_prompt=size))
        states, batch = list(pipeline.states(many)), Batch(denoiser, read_stats=True)  # waits for the device
        for _ in range(min(STEADY_RUN, len(state.schedule))):
            before = monotonic()
            states = batch.step(states)
            took = monotonic() - before
        times.record(key, size, took)
        without_gain = 0 if times.best_size(key, size) == size else without_gain + 1
        if monotonic() - begin > seconds or without_gain == 2:
            break
        size *= 2
    pixels, took = _decoding(pipeline, state, plan)
    times.record_stage(VAE_DECODER, pixels, took)
    log.info("batches of %d are fastest", times.best_size(key, times.max_batch))


# The stage that decodes the later latent frames of a video has run once, and once more with the time taken.
WARM_CHUNKS = 3


def _decoding(pipeline: Pipeline, state: DenoiseState, plan: Plan) -> tuple[int, float]:
    """So many pixels, and the seconds in which they are decoded. Of a video only the first latent frames are."""
    pixels = plan.drawn_height * plan.drawn_width
    if plan.frames is None:
        before = monotonic()
        pipeline.decode_state(state, plan)
        pipeline.decode_state(state, plan)
        return pixels, (monotonic() - before) / 2
    decoding, count, took = VideoDecoding(pipeline, state, plan), 1, 0.0
    for _ in range(WARM_CHUNKS):
        if not decoding.done:
            before = monotonic()
            count = decoding.advance()
            took = monotonic() - before
    return pixels * count, took
