"""Draws the requests of many clients together, with one loop per bundle and device.

Between any two steps, requests may join, leave, finish or be cancelled. `policy.py` says which pictures are stepped;
this module owns them and does the work:

    submit -> texts are encoded -> [ step, step, ... ] -> picture is decoded -> the job's listener gets it

Steps run on a thread of their own. Texts and pictures are encoded and decoded on a second one where stages can run side
by side. On a CPU, where the stages would only take each other's cores, the first thread does all of it, in the order of
the due times.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np

from ditc.runtime.batch import padded_sizes
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.failure import Failure
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.admission import Admission, work_of
from ditc.runtime.serving.batches import Batches
from ditc.runtime.serving.job import (
    Cancelled,
    Event,
    Finished,
    Job,
    Picture,
    Preview,
    Progress,
    Refused,
    picture_only,
    preview_steps,
)
from ditc.runtime.serving.observer import UNOBSERVED, Observer
from ditc.runtime.serving.policy import BatchKey, Waiting, choose, due_time
from ditc.runtime.serving.refusals import Broken, Invalid, Refusal, TooLate, Unavailable
from ditc.runtime.serving.settings import SchedulerOptions
from ditc.runtime.serving.step_times import TEXT, StepTimes
from ditc.runtime.sessions.residency import OnDemandSession
from ditc.runtime.spec import DENOISER, VAE_DECODER
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import BATCH, ROWS

log = logging.getLogger(__name__)

# Seconds between attempts to open a bundle again whose session has failed.
REOPEN_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
# How many pictures may be ready for a step, in multiples of the largest batch. Their texts are in memory.
READY_BATCHES = 2


DEFAULTS = SchedulerOptions()


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A piece of work beside the steps: a text to encode, a preview, or a picture to decode.

    Attributes:
        makes_ready: whether it makes a picture ready for its first step.
    """

    due: float
    number: int
    job: Job
    action: Callable[[], None]
    makes_ready: bool


@dataclass(frozen=True, slots=True)
class _Begun:
    """The states of a job that are still to be made, and the pipeline whose sessions make them."""

    pipeline: Pipeline
    states: Iterator[DenoiseState]


class Scheduler:
    """Owns a pipeline and draws with it until it is closed. Threads can share it.

    Args:
        pipeline: the scheduler closes it.
        admission: counts and bounds the accepted work; several schedulers may share one.
        reopen: opens the bundle again after a session has failed.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        admission: Admission,
        reopen: Callable[[], Pipeline],
        options: SchedulerOptions = DEFAULTS,
        observer: Observer = UNOBSERVED,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.pipeline, self.admission, self.observer = pipeline, admission, observer
        self._reopen, self._options, self._clock = reopen, options, clock
        denoiser = pipeline.sessions[DENOISER]
        most = denoiser.spec.profile[BATCH].max
        self.max_batch = min(options.max_batch or most, most)
        self.times = StepTimes(self.max_batch, padded_sizes(denoiser))
        # Where only one stage is in memory, two threads would make the stages replace each other all the time.
        self.overlaps = denoiser.device.kind != "cpu" and not isinstance(denoiser, OnDemandSession)
        self._wake = threading.Condition()
        self._jobs: dict[Job, None] = {}  # in the order of their arrival
        self._pictures: dict[int, Picture] = {}  # those that are ready for a step
        self._tasks: list[_Task] = []  # work beside the steps
        self._in_stages = 0  # how many tasks the second thread is at
        self._numbers = itertools.count()
        self._batches = Batches(denoiser)
        self._started = self._closing = self._dead = False
        self._crashed = ""  # why a session failed, until the bundle is open again
        self._attempts, self._open_at = 0, 0.0  # failed attempts to open it, and when to try it next
        loops = [(self._work, "ditc-steps")] + ([(self._work_stages, "ditc-stages")] if self.overlaps else [])
        self._threads = [
            threading.Thread(target=self._until_closed, args=(loop,), name=name, daemon=True)
            for loop, name in loops
        ]

    # --- what other threads call

    def start(self) -> None:
        """Begin to draw."""
        self._started = True
        for thread in self._threads:
            thread.start()

    @property
    def problem(self) -> str:
        """Why it cannot draw at the moment, in words for clients; "" if it can."""
        if self._crashed:
            return "a session has failed and is being opened again"
        if self.stopped:
            return "the scheduler has stopped"
        return "it is closing" if self._closing else ""

    @property
    def stopped(self) -> bool:
        """Whether one of its threads has died, which only a defect of ditc can cause."""
        dead = self._started and not all(thread.is_alive() for thread in self._threads)
        return self._dead or (dead and not self._closing)

    @property
    def counts(self) -> tuple[int, int]:
        """How many accepted requests wait for their work to begin, and how many are drawn."""
        with self._wake:
            begun = sum(job.began is not None for job in self._jobs)
            return len(self._jobs) - begun, begun

    def submit(
        self,
        plan: Plan,
        listener: Callable[[Event], None],
        *,
        id: str,
        timeout: float | None = None,
        previews: int = 0,
    ) -> Job:
        """Accept a request. Its listener gets progress, previews and exactly one end.

        Args:
            plan: of this scheduler's pipeline.
            timeout: seconds from now after which the client does not want the pictures any more.
            previews: how many previews of each picture to make.

        Raises:
            Overloaded: there is too much work already.
            TooLate: the timeout cannot be met.
            Unavailable: the scheduler is closing.
        """
        now = self._clock()
        alone = self._alone_seconds(plan)
        deadline = None if timeout is None else now + timeout
        job = Job(
            id=id,
            plan=replace(plan, at_once=1),
            listener=listener,
            arrived=now,
            due=due_time(now, alone, deadline),
            deadline=deadline,
            previews=previews,
        )
        try:
            self._accept(job, alone, timeout)
        except Refusal as refusal:
            self.observer.rejected(refusal)
            raise
        self.observer.accepted(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a job before its next step. Nothing happens if it has ended."""
        job.cancelled = True
        with self._wake:
            self._wake.notify_all()

    @property
    def idle(self) -> bool:
        """Whether no job is in work."""
        return not self._jobs

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, end those in work, and close the pipeline.

        Args:
            timeout: how many seconds to wait for the step that is running. If it takes longer, the pipeline stays open.

        Returns:
            whether the pipeline is closed.
        """
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._end_all(Unavailable("the model was closed", hint="come back later", retry_after=1.0))
        end = None if timeout is None else monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive():
                thread.join(None if end is None else max(0.0, end - monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._batches.keep(())
        self.pipeline.close()
        return True

    def _accept(self, job: Job, alone: float, timeout: float | None) -> None:
        """Put a job into the queue. Raises Refusal as `submit`."""
        work = work_of(job.plan)
        with self._wake:
            if self._closing or self._dead:
                raise Unavailable("the model is closing", hint="come back later", retry_after=1.0)
            self.admission.take(work, seconds_of_all=self._seconds_of_all())
            job.predicted = alone + self._seconds_before(job.due)
            if timeout is not None and alone > timeout:
                self.admission.give_back(work)
                raise TooLate(
                    f"the request takes about {alone:.1f} s, and its timeout is {timeout:g} s",
                    hint="allow more time, or ask for fewer steps or pictures",
                )
            self._jobs[job] = None
            self._add_task(job, lambda: self._encode(job), makes_ready=True)

    # --- estimates

    def _alone_seconds(self, plan: Plan) -> float:
        """How long a request takes if nothing else runs, from what was measured."""
        latents = self.pipeline.manifest.latents
        cells = (plan.drawn_height // latents.scale_factor, plan.drawn_width // latents.scale_factor)
        rows = 1 + plan.guided + (plan.skip_layer_guidance is not None)
        key = BatchKey(latents=(latents.channels, *cells), rows=rows)
        step, times = self.times.seconds(key), self.times
        picture = step * len(plan.table) + times.stage_seconds(
            VAE_DECODER, plan.drawn_height * plan.drawn_width
        )
        return plan.pictures * (picture + times.stage_seconds(TEXT, 1))

    def _seconds_left(self, job: Job) -> float:
        return self._alone_seconds(job.plan) * (1 - job.steps_done / job.plan.runs)

    def _seconds_of_all(self) -> float:
        return sum(self._seconds_left(job) for job in self._jobs)

    def _seconds_before(self, due: float) -> float:
        return sum(self._seconds_left(job) for job in self._jobs if job.due <= due)

    # --- the threads

    def _until_closed(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop. If it ends otherwise than by `close`, no client may wait for ever."""
        try:
            loop()
        except BaseException:
            log.exception("a thread of the scheduler has died")
        if not self._closing:
            with self._wake:
                self._dead = True
            self._end_all(Broken("the scheduler has stopped", retry_after=5.0))

    def _end_all(self, refusal: Refusal) -> None:
        """End all jobs. No new ones are accepted any more."""
        for job in list(self._jobs):
            self._finish(job, Cancelled() if job.cancelled else Refused(refusal))

    def _work(self) -> None:
        while True:
            with self._wake:
                action, until = self._next()
                if action is None:
                    if self._closing:
                        return
                    if not self._pictures:
                        self._batches.keep(())
                    self._wake.wait(None if until is None else max(0.0, until - self._clock()))
                    continue
            self._do(action)

    def _work_stages(self) -> None:
        while True:
            with self._wake:
                if self._closing:
                    return
                task = None if self._crashed else self._take_task()
                if task is None:
                    self._wake.wait()
                    continue
                self._in_stages += 1
            self._do(task.action)
            with self._wake:
                self._in_stages -= 1
                self._wake.notify_all()

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # the thread must not end: it serves all clients
            log.exception("the scheduler failed outside of a job")

    def _next(self) -> tuple[Callable[[], None] | None, float | None]:
        """What to do now, or until when to wait. The caller holds the lock."""
        if ended := self._ended():
            return lambda: self._finish_all(ended), None
        if self._closing:
            return None, None
        if self._crashed:
            due = self._clock() >= self._open_at
            return (self._open_again, None) if due else (None, self._earliest(self._open_at))
        waiting = [
            Waiting(id=p.number, key=p.key, due=p.job.due, since=p.since, started=p.started)
            for p in self._pictures.values()
        ]
        if not self.overlaps and (task := self._take_task(before_steps_of=waiting)):
            return task.action, None
        choice = choose(waiting, self._clock(), self._best_size, window=self._options.window)
        if not choice.ids:
            return None, self._earliest(choice.wait_until)
        chosen = [self._pictures.pop(id) for id in choice.ids]
        return lambda: self._step(chosen), None

    def _take_task(self, before_steps_of: Sequence[Waiting] = ()) -> _Task | None:
        """Take the task that is due first, or none. The caller holds the lock.

        A text is encoded only while few pictures are ready for a step, or if it is due before one of those.

        Args:
            before_steps_of: where one thread does everything, the pictures that a task must be due before, unless it
                makes ready a picture that the next batch has room for.
        """
        latest = max((p.job.due for p in self._pictures.values()), default=0.0)
        full = len(self._pictures) >= READY_BATCHES * self.max_batch
        allowed = [task for task in self._tasks if not (task.makes_ready and full and task.due >= latest)]
        task = min(allowed, key=lambda task: (task.due, task.number), default=None)
        if task is not None and before_steps_of:
            head = min(before_steps_of, key=lambda one: one.due)
            group = sum(one.key == head.key for one in before_steps_of)
            has_room = task.makes_ready and self._best_size(head.key, group + 1) > group
            if task.due > head.due and not has_room:
                return None
        if task is not None:
            self._tasks.remove(task)
        return task

    def _best_size(self, key: BatchKey, most: int) -> int:
        spec = self.pipeline.sessions[DENOISER].spec
        fits = spec.profile[ROWS].max // key.rows if ROWS in spec.profile else most
        return self.times.best_size(key, max(1, min(most, fits)))

    def _earliest(self, until: float | None) -> float | None:
        """When to look again without being woken: at this time, or at the next deadline if that is earlier."""
        times = [job.deadline for job in self._jobs if job.deadline is not None]
        if until is not None:
            times.append(until)
        return min(times, default=None)

    def _ended(self) -> list[tuple[Job, Cancelled | Refused]]:
        """The jobs that were cancelled or are past their deadlines. The caller holds the lock.

        They are ended without it: a job tells its listener under a lock of its own, and the listener may call `cancel`.
        """
        now, ended = self._clock(), list[tuple[Job, Cancelled | Refused]]()
        for job in self._jobs:
            if job.cancelled:
                ended.append((job, Cancelled()))
            elif job.deadline is not None and self._hopeless(job, now):
                late = TooLate("the deadline passed before the pictures were done")
                ended.append((job, Refused(late)))
        return ended

    def _finish_all(self, ended: Sequence[tuple[Job, Cancelled | Refused]]) -> None:
        for job, end in ended:
            self._finish(job, end)

    def _hopeless(self, job: Job, now: float) -> bool:
        """Whether the deadline has passed or, for a job that has not begun, cannot be met any more."""
        assert job.deadline is not None
        needed = self._alone_seconds(job.plan) if job.began is None else 0.0
        return now + needed > job.deadline

    # --- the work

    def _add_task(self, job: Job, action: Callable[[], None], *, makes_ready: bool = False) -> None:
        with self._wake:
            if job in self._jobs:
                self._tasks.append(_Task(job.due, next(self._numbers), job, action, makes_ready))
                self._wake.notify_all()

    def _encode(self, job: Job, begun: _Begun | None = None, index: int = 0) -> None:
        """Make the first state of a picture (text rows, noise, schedule), and leave the next picture for later."""
        if job.end is not None or job.cancelled:
            return
        pipeline = self.pipeline
        if begun is None or begun.pipeline is not pipeline:  # the bundle may have been opened again
            begun = _Begun(pipeline, itertools.islice(pipeline.states(job.plan), index, None))
        begin = self._clock()
        if job.began is None:
            job.began = begin
            job.spend("wait", begin - job.arrived)
        with self._faults([job]):
            state = next(begun.states)
            seconds = self._clock() - begin
            job.spend("text", seconds)
            self.times.record_stage(TEXT, 1, seconds)
            self.observer.stage(TEXT, seconds)
            picture = Picture(
                number=next(self._numbers), job=job, index=index, state=state, since=self._clock()
            )
            if state.lost:  # its text could not be encoded
                picture.state = picture_only(state)
                self._add_task(job, lambda: self._decode(picture))
            else:
                self._queue(picture)
            if index + 1 < job.plan.pictures:
                self._add_task(job, lambda: self._encode(job, begun, index + 1), makes_ready=True)

    def _queue(self, picture: Picture) -> None:
        """Let a picture wait for its next step, unless its job has ended meanwhile."""
        with self._wake:
            if picture.job in self._jobs:
                self._pictures[picture.number] = picture
                self._wake.notify_all()

    def _step(self, pictures: Sequence[Picture]) -> None:
        """One run of the denoiser for these pictures, which are out of the queue meanwhile."""
        key, begin = pictures[0].key, self._clock()
        jobs = list({id(p.job): p.job for p in pictures}.values())
        with self._faults(jobs):
            states = self._batches.step(key, [p.state for p in pictures])
            seconds = self._clock() - begin
            if self._batches.steady(key, len(pictures)):
                self.times.record(key, len(pictures), seconds)
            self.observer.stepped(key, len(pictures), seconds)
            for job in jobs:
                job.spend("denoise", seconds)
            for picture, state in zip(pictures, states, strict=True):
                self._advance(picture, picture.guard.watch(state))
            for job in jobs:
                job.report(Progress(step=job.steps_done, total=job.plan.runs))
        if any(picture.state.done or picture.state.lost for picture in pictures):
            self._forget_texts()

    def _forget_texts(self) -> None:
        with self._wake:
            keys = {picture.key for picture in self._pictures.values()}
        self._batches.keep(keys)

    def _advance(self, picture: Picture, state: DenoiseState) -> None:
        """Put a picture back into the queue, or hand it on to be decoded."""
        job = picture.job
        picture.advance(state)
        job.steps_done += 1
        if job.end is not None:
            return
        if state.done or state.lost:
            picture.state = picture_only(state)
            self._add_task(job, lambda: self._decode(picture))
            return
        number = (
            preview_steps(len(state.schedule), job.previews).get(state.step_index) if job.previews else None
        )
        if number is not None:
            shown, step = picture_only(state, predicted=True), state.step_index
            self._add_task(job, lambda: self._preview(picture, shown, number, step))
        self._queue(picture)

    def _preview(self, picture: Picture, state: DenoiseState, number: int, step: int) -> None:
        job = picture.job
        if job.end is None:
            with suppress(UsageError):  # a bundle without a latent-to-RGB matrix
                (image,) = self.pipeline.preview(state)
                job.report(Preview(index=picture.index, number=number, step=step, image=image))

    def _decode(self, picture: Picture) -> None:
        job, begin = picture.job, self._clock()
        if job.end is not None:
            return
        with self._faults([job]):
            decoded = self.pipeline.decode_state(picture.state, job.plan, picture.index)
            seconds = self._clock() - begin
            job.spend("decode", seconds)
            self.times.record_stage(VAE_DECODER, job.plan.drawn_height * job.plan.drawn_width, seconds)
            self.observer.stage(VAE_DECODER, seconds)
            job.images[picture.index] = decoded.pictures[0]
            job.failures += decoded.failures
            if len(job.images) == job.plan.pictures:
                self._complete(job)

    def _complete(self, job: Job) -> None:
        """End a job whose pictures are all decoded or lost."""
        if len(job.failures) == job.plan.pictures or (job.failures and job.plan.request.strict):
            self._finish(job, Refused(_broken(job.failures)))
            return
        job.seconds["total"] = self._clock() - job.arrived
        images = tuple(job.images[index] for index in sorted(job.images))
        failures = tuple(sorted(job.failures, key=lambda failure: failure.index))
        self._finish(job, Finished(images=images, failures=failures, seconds=dict(job.seconds)))

    def _finish(self, job: Job, end: Finished | Refused | Cancelled) -> None:
        """End a job once, and take its pictures out of the queue."""
        with self._wake:
            for number in [n for n, p in self._pictures.items() if p.job is job]:
                del self._pictures[number]
            self._tasks = [task for task in self._tasks if task.job is not job]
            if job not in self._jobs:
                return
            del self._jobs[job]
            self.admission.give_back(work_of(job.plan))
            self._wake.notify_all()
        job.finish(end)
        self.observer.ended(job, end)

    def _faults(self, jobs: Sequence[Job]) -> _Faults:
        return _Faults(self, jobs)

    def crashed(self, error: Exception, jobs: Sequence[Job]) -> None:
        """A session has failed: end these jobs, and let the bundle be opened again before the next step."""
        # As text: a log that keeps the error would keep its frames, and so the tensors of the failed batch.
        log.error("a session failed: %s: %s", type(error).__name__, str(error))
        with self._wake:
            self._crashed = f"{type(error).__name__}: {error}"
            self._wake.notify_all()
        for job in jobs:
            self._finish(job, Refused(Broken("a stage failed while it drew this request", retry_after=1.0)))
        self.observer.crashed()

    def _open_again(self) -> None:
        """Close the pipeline and try once to open the bundle again. If that fails, `_next` tries it later."""
        with self._wake:  # the other thread may be in a session
            self._wake.wait_for(lambda: not self._in_stages)
        version = self.pipeline.manifest.digest
        with suppress(Exception):
            self.pipeline.close()
        try:
            pipeline = self._reopen()
        except Exception:
            pause = REOPEN_PAUSES[min(self._attempts, len(REOPEN_PAUSES) - 1)]
            log.exception("the bundle cannot be opened again; the next attempt is in %g s", pause)
            self._attempts, self._open_at = self._attempts + 1, self._clock() + pause
            return
        self._attempts, self._open_at = 0, 0.0
        self._batches = Batches(pipeline.sessions[DENOISER])
        # States on a device went with it. Those on the host, as all are before their first step and when they wait for
        # the decoder, are values and go on, unless the bundle was built again: no picture is drawn by two versions.
        with self._wake:
            lost = [p.job for p in self._pictures.values() if not isinstance(p.state.latents, np.ndarray)]
            lost += self._jobs if pipeline.manifest.digest != version else ()
        for job in lost:
            self._finish(job, Refused(Broken("a stage failed", retry_after=1.0)))
        with self._wake:
            self.pipeline, self._crashed = pipeline, ""
            self._wake.notify_all()
        log.warning("the bundle is open again")


class _Faults:
    """Turns errors of a piece of work into the ends of its jobs."""

    def __init__(self, scheduler: Scheduler, jobs: Sequence[Job]) -> None:
        self._scheduler, self._jobs = scheduler, jobs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, Refusal):
            refusal: Refusal = error
        elif isinstance(error, UsageError):
            refusal = Invalid(str(error), hint=error.hint)
        elif isinstance(error, NumericsError):
            refusal = Broken(str(error))
        else:
            self._scheduler.crashed(error, self._jobs)
            return True
        for job in self._jobs:
            self._scheduler._finish(job, Refused(refusal))
        return True


def _broken(failures: Sequence[Failure]) -> Broken:
    first = failures[0]
    more = f"; {len(failures)} pictures failed" if len(failures) > 1 else ""
    return Broken(f"{first.reason}{more}", hint=None, code="bad_picture")
