"""The work of drawing: texts to first states, steps, previews, and finished latents to pictures.

Errors of a piece of work end the jobs that it was for, and nothing else.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ditc.runtime.decode import check_colours
from ditc.runtime.errors import LoraError, NumericsError, UsageError
from ditc.runtime.failure import Failure, named
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.refusals import Broken, Invalid, Refusal, Unavailable
from ditc.runtime.serving.scheduling.batches import Batches
from ditc.runtime.serving.scheduling.job import (
    End,
    Finished,
    Job,
    Picture,
    Preview,
    Refused,
    picture_only,
    preview_steps,
)
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.scheduling.queue import Queue
from ditc.runtime.serving.scheduling.step_times import TEXT, StepTimes
from ditc.runtime.serving.scheduling.videos import VideoDecoding
from ditc.runtime.spec import VAE_DECODER
from ditc.runtime.state import DenoiseState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Begun:
    """The states of a job that are still to be made, and the pipeline whose sessions make them."""

    pipeline: Pipeline
    states: Iterator[DenoiseState]


class Work:
    """Does what a scheduler's threads have taken from its queue, and puts what comes next into it.

    Args:
        variants: pipelines that share the sessions of the pipeline, by the names that jobs know them under.
        finish: ends a job.
        crashed: told when a session has failed, with the jobs that it drew.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        queue: Queue,
        times: StepTimes,
        *,
        observer: Observer,
        clock: Callable[[], float],
        variants: Mapping[str, Pipeline],
        finish: Callable[[Job, End], None],
        crashed: Callable[[Exception, Sequence[Job]], None],
    ) -> None:
        self._queue, self._times, self._observer, self._clock = queue, times, observer, clock
        self._finish, self._crashed = finish, crashed
        self.use(pipeline, variants)

    def use(self, pipeline: Pipeline, variants: Mapping[str, Pipeline]) -> None:
        """Work with this pipeline, and those that share its sessions, from now on."""
        self.pipeline, self.variants = pipeline, dict(variants)
        steppers = {name: variant.stepper for name, variant in self.variants.items()}
        self.batches = Batches(pipeline.stepper, steppers)

    def pipeline_of(self, variant: str) -> Pipeline:
        """The pipeline that draws jobs of a variant. Raises Unavailable if its LoRA could not be read."""
        found = self.variants.get(variant) if variant else self.pipeline
        if found is None:
            raise Unavailable(
                f"the model {variant} cannot be drawn now: its LoRA could not be read", hint="come back later"
            )
        return found

    def encode(self, job: Job, begun: _Begun | None = None, index: int = 0) -> None:
        """Make the first state of a picture (text rows, noise, schedule), and leave the next picture for later."""
        if job.end is not None or job.cancelled:
            return
        begin = self._clock()
        if job.began is None:
            job.began = begin
            job.spend("wait", begin - job.arrived)
        with self._faults([job]):
            pipeline = self.pipeline_of(job.variant)
            if begun is None or begun.pipeline is not pipeline:  # the bundle may have been opened again
                begun = _Begun(pipeline, itertools.islice(pipeline.states(job.plan), index, None))
            going_on = begun
            state = next(begun.states)
            self._spent(job, "text", TEXT, 1, begin)
            picture = Picture(
                number=self._queue.next_number(), job=job, index=index, state=state, since=self._clock()
            )
            if state.lost:  # its text could not be encoded
                picture.state = picture_only(state)
                self._queue.add_task(job, lambda: self.decode(picture))
            else:
                self._queue.add_picture(picture)
            if index + 1 < job.plan.pictures:
                self._queue.add_task(job, lambda: self.encode(job, going_on, index + 1), makes_ready=True)

    def step(self, pictures: Sequence[Picture]) -> None:
        """One run of the denoiser for these pictures, which are out of the queue meanwhile."""
        key, begin = pictures[0].key, self._clock()
        jobs = list({id(picture.job): picture.job for picture in pictures}.values())
        with self._faults(jobs):
            self.pipeline_of(key.variant)  # it may be gone since the bundle was opened again
            states = self.batches.step(key, [picture.state for picture in pictures])
            seconds = self._clock() - begin
            if self.batches.steady(key, len(pictures)):
                self._times.record(key, len(pictures), seconds)
            self._observer.stepped(key, len(pictures), seconds)
            for job in jobs:
                job.spend("denoise", seconds)
            for picture, state in zip(pictures, states, strict=True):
                self._advance(picture, picture.guard.watch(state))
            for job in jobs:
                job.report(job.progress)
        if any(picture.state.done or picture.state.lost for picture in pictures):
            self.batches.keep(self._queue.keys())

    def decode(self, picture: Picture) -> None:
        """Make a finished picture, and end its job if that was the last one."""
        job, begin = picture.job, self._clock()
        if job.end is not None:
            return
        if job.plan.frames is not None and not picture.state.failures:
            self._decode_frames(picture)
            return
        with self._faults([job]):
            decoded = self.pipeline.decode_state(picture.state, job.plan, picture.index)
            self._spent(job, "decode", VAE_DECODER, job.plan.drawn_height * job.plan.drawn_width, begin)
            job.images[picture.index] = decoded.pictures[0]
            job.failures += decoded.failures
            self._complete(job)

    def _decode_frames(self, picture: Picture, decoding: VideoDecoding | None = None) -> None:
        """Decode a latent frame of a video, and leave the next one for later."""
        job, index, begin = picture.job, picture.index, self._clock()
        if job.end is not None or job.cancelled:
            return
        if decoding is None or decoding.pipeline is not self.pipeline:  # it may have been opened again
            decoding = VideoDecoding(self.pipeline, picture.state, job.plan)
            job.decoded[index] = 0
        going_on = decoding
        with self._faults([job]):
            try:
                count = decoding.advance()
                pixels = job.plan.drawn_height * job.plan.drawn_width
                self._spent(job, "decode", VAE_DECODER, pixels * count, begin)
                job.decoded[index] += count
                job.report(job.progress)
                if not decoding.done:
                    self._queue.add_task(job, lambda: self._decode_frames(picture, going_on))
                    return
                check_colours(decoding.uniform, index, job.plan)
                job.videos[index] = decoding.frames
            except NumericsError as error:
                failure = Failure(index=index, reason=str(error), hint=error.hint)
                job.videos[index] = None
                job.failures.append(named(failure, index, job.plan.request))
            self._complete(job)

    def _advance(self, picture: Picture, state: DenoiseState) -> None:
        """Put a picture back into the queue, or hand it on to be decoded."""
        job = picture.job
        picture.advance(state)
        job.steps_done += 1
        if job.end is not None:
            return
        if state.done or state.lost:
            picture.state = picture_only(state)
            self._queue.add_task(job, lambda: self.decode(picture))
            return
        number = (
            preview_steps(len(state.schedule), job.previews).get(state.step_index) if job.previews else None
        )
        if number is not None:
            shown, step = picture_only(state, predicted=True), state.step_index
            self._queue.add_task(job, lambda: self._preview(picture, shown, number, step))
        self._queue.add_picture(picture)

    def _preview(self, picture: Picture, state: DenoiseState, number: int, step: int) -> None:
        job = picture.job
        if job.end is None:
            with suppress(UsageError):  # a bundle without a latent-to-RGB matrix
                (image,) = self.pipeline.preview(state)
                job.report(Preview(index=picture.index, number=number, step=step, image=image))

    def _complete(self, job: Job) -> None:
        """End a job if its pictures are all decoded or lost."""
        if len(job.images) + len(job.videos) < job.plan.pictures:
            return
        if len(job.failures) == job.plan.pictures or (job.failures and job.plan.request.strict):
            self._finish(job, Refused(_broken(job.failures)))
            return
        job.seconds["total"] = self._clock() - job.arrived
        indices, is_video = range(job.plan.pictures), job.plan.frames is not None
        images = () if is_video else tuple(job.images[index] for index in indices)
        videos = tuple(job.videos.get(index) for index in indices) if is_video else ()
        failures = tuple(sorted(job.failures, key=lambda failure: failure.index))
        seconds = dict(job.seconds)
        self._finish(job, Finished(images=images, failures=failures, seconds=seconds, videos=videos))

    def _spent(self, job: Job, part: str, stage: str, size: int, begin: float) -> None:
        """Note the time of a stage, for the job, for predictions and for metrics."""
        seconds = self._clock() - begin
        job.spend(part, seconds)
        self._times.record_stage(stage, size, seconds)
        self._observer.stage(stage, seconds)

    @contextmanager
    def _faults(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Turn errors of a piece of work into the ends of its jobs."""
        try:
            yield
        except Refusal as refusal:
            self._end(jobs, refusal)
        except UsageError as error:
            self._end(jobs, Invalid(str(error), hint=error.hint))
        except NumericsError as error:
            self._end(jobs, Broken(str(error)))
        except LoraError as error:  # of one variant; its message names files
            log.error("%s: %s", jobs[0].variant, error)
            self._end(jobs, Broken("the LoRA of this model cannot be read any more"))
        except Exception as error:
            self._crashed(error, jobs)

    def _end(self, jobs: Sequence[Job], refusal: Refusal) -> None:
        for job in jobs:
            self._finish(job, Refused(refusal))


def _broken(failures: Sequence[Failure]) -> Broken:
    first = failures[0]
    more = f"; {len(failures)} pictures failed" if len(failures) > 1 else ""
    return Broken(f"{first.reason}{more}", hint=None, code="bad_picture")
