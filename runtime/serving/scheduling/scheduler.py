"""Draws the requests of many clients together, with one loop per bundle and device.

Between any two steps, requests may join, leave, finish or be cancelled. `policy.py` says which pictures are stepped;
this module owns them and does the work:

    submit -> texts are encoded -> [ step, step, ... ] -> picture is decoded -> the job's listener gets it

Steps run on a thread of their own. Texts and pictures are encoded and decoded on a second one where stages can run side
by side. On a CPU, where the stages would only take each other's cores, the first thread does all of it, in the order of
the due times.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic

import numpy as np

from ditc.runtime.batch import padded_sizes
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.log_text import where_raised
from ditc.runtime.serving.refusals import Broken, Refusal, TooLate, Unavailable
from ditc.runtime.serving.scheduling.admission import Admission, work_of
from ditc.runtime.serving.scheduling.job import Cancelled, End, Event, Job, Refused
from ditc.runtime.serving.scheduling.observer import UNOBSERVED, Observer
from ditc.runtime.serving.scheduling.policy import BatchKey, choose, due_time
from ditc.runtime.serving.scheduling.predictions import Predictions
from ditc.runtime.serving.scheduling.queue import Queue
from ditc.runtime.serving.scheduling.step_times import StepTimes
from ditc.runtime.serving.scheduling.work import Work
from ditc.runtime.serving.settings import SchedulerOptions
from ditc.runtime.sessions.residency import OnDemandSession
from ditc.runtime.spec import DENOISER
from ditc.runtime.step_contract import BATCH, ROWS

log = logging.getLogger(__name__)

# Seconds between attempts to open a bundle again whose session has failed.
REOPEN_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
# How many pictures may be ready for a step, in multiples of the largest batch. Their texts are in memory.
READY_BATCHES = 2


DEFAULTS = SchedulerOptions()


class Scheduler:
    """Owns a pipeline and draws with it until it is closed. Threads can share it.

    Args:
        pipeline: the scheduler closes it.
        admission: counts and bounds the accepted work; several schedulers may share one.
        reopen: opens the bundle again after a session has failed.
        variants: makes pipelines that share a pipeline's sessions, by the names under which `submit` knows them.
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
        variants: Callable[[Pipeline], Mapping[str, Pipeline]] = lambda pipeline: {},
    ) -> None:
        self.admission, self.observer = admission, observer
        self._reopen, self._options, self._clock = reopen, options, clock
        self._variants_of = variants
        denoiser = pipeline.sessions[DENOISER]
        most = denoiser.spec.profile[BATCH].max
        self.max_batch = min(options.max_batch or most, most)
        self.times = StepTimes(self.max_batch, padded_sizes(pipeline.stepper))
        # Where only one stage is in memory, two threads would make the stages replace each other all the time.
        self.overlaps = denoiser.device.kind != "cpu" and not isinstance(denoiser, OnDemandSession)
        self._queue = Queue(admission, READY_BATCHES * self.max_batch)
        self._wake = self._queue.wake
        self._work = Work(
            pipeline,
            self._queue,
            self.times,
            observer=observer,
            clock=clock,
            variants=variants(pipeline),
            finish=self._finish,
            crashed=self._session_crashed,
        )
        self._predictions = Predictions(pipeline.manifest.latents, self.times)
        self._in_stages = 0  # how many tasks the second thread is at
        self._started = self._closing = self._dead = False
        self._crashed = ""  # why a session failed, until the bundle is open again
        self._attempts, self._open_at = 0, 0.0  # failed attempts to open it, and when to try it next
        loops = [(self._run_steps, "ditc-steps")] + (
            [(self._run_stages, "ditc-stages")] if self.overlaps else []
        )
        self._threads = [
            threading.Thread(target=self._until_closed, args=(loop,), name=name, daemon=True)
            for loop, name in loops
        ]

    # --- what other threads call

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that is in use. It is another one after the bundle was opened again."""
        return self._work.pipeline

    @property
    def variants(self) -> Collection[str]:
        """The names of the variants that can be drawn."""
        return self._work.variants.keys()

    def pipeline_of(self, variant: str) -> Pipeline:
        """The pipeline of a variant. Raises Unavailable if there is none at the moment."""
        return self._work.pipeline_of(variant)

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
            begun = sum(job.began is not None for job in self._queue.jobs)
            return len(self._queue.jobs) - begun, begun

    def submit(
        self,
        plan: Plan,
        listener: Callable[[Event], None],
        *,
        id: str,
        timeout: float | None = None,
        previews: int = 0,
        variant: str = "",
    ) -> Job:
        """Accept a request. Its listener gets progress, previews and exactly one end.

        Args:
            plan: of this scheduler's pipeline.
            timeout: seconds from now after which the client does not want the pictures any more.
            previews: how many previews of each picture to make.
            variant: which variant draws it; "" for the pipeline itself.

        Raises:
            Overloaded: there is too much work already.
            TooLate: the timeout cannot be met.
            Unavailable: the scheduler is closing.
        """
        now = self._clock()
        alone = self._predictions.alone_seconds(plan)
        deadline = None if timeout is None else now + timeout
        job = Job(
            id=id,
            plan=replace(plan, at_once=1),
            listener=listener,
            arrived=now,
            due=due_time(now, alone, deadline),
            deadline=deadline,
            previews=previews,
            variant=variant,
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
        return not self._queue.jobs

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
        self._work.batches.keep(())
        self.pipeline.close()
        return True

    def _accept(self, job: Job, alone: float, timeout: float | None) -> None:
        """Put a job into the queue. Raises Refusal as `submit`."""
        work = work_of(job.plan)
        with self._wake:
            if self._closing or self._dead:
                raise Unavailable("the model is closing", hint="come back later", retry_after=1.0)
            self.admission.take(work, seconds_of_all=self._predictions.seconds_left(self._queue.jobs))
            earlier = [other for other in self._queue.jobs if other.due <= job.due]
            job.predicted = alone + self._predictions.seconds_left(earlier)
            if timeout is not None and alone > timeout:
                self.admission.give_back(work)
                raise TooLate(
                    f"the request takes about {alone:.1f} s, and its timeout is {timeout:g} s",
                    hint="allow more time, or ask for fewer steps or pictures",
                )
            self._queue.add_job(job)
            self._queue.add_task(job, lambda: self._work.encode(job), makes_ready=True)

    # --- the threads

    def _until_closed(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop. If it ends otherwise than by `close`, no client may wait for ever."""
        try:
            loop()
        except BaseException as e:
            log.error("a thread of the scheduler has died:\n%s", where_raised(e))
        if not self._closing:
            with self._wake:
                self._dead = True
            self._end_all(Broken("the scheduler has stopped", retry_after=5.0))

    def _end_all(self, refusal: Refusal) -> None:
        """End all jobs. No new ones are accepted any more."""
        for job in list(self._queue.jobs):
            self._finish(job, Cancelled() if job.cancelled else Refused(refusal))

    def _run_steps(self) -> None:
        while True:
            with self._wake:
                action, until = self._next()
                if action is None:
                    if self._closing:
                        return
                    if not self._queue.pictures:
                        self._work.batches.keep(())
                    self._wake.wait(None if until is None else max(0.0, until - self._clock()))
                    continue
            self._do(action)

    def _run_stages(self) -> None:
        while True:
            with self._wake:
                if self._closing:
                    return
                task = None if self._crashed else self._queue.take_task(self._best_size)
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
        except Exception as e:  # the thread must not end: it serves all clients
            log.error("the scheduler failed outside of a job:\n%s", where_raised(e))

    def _next(self) -> tuple[Callable[[], None] | None, float | None]:
        """What to do now, or until when to wait. The caller holds the lock."""
        if ended := self._ended():
            return lambda: self._finish_all(ended), None
        if self._closing:
            return None, None
        if self._crashed:
            due = self._clock() >= self._open_at
            return (self._open_again, None) if due else (None, self._earliest(self._open_at))
        waiting = self._queue.waiting()
        if not self.overlaps and (task := self._queue.take_task(self._best_size, waiting)):
            return task.action, None
        choice = choose(waiting, self._clock(), self._best_size, window=self._options.window)
        if not choice.ids:
            return None, self._earliest(choice.wait_until)
        chosen = self._queue.take_pictures(choice.ids)
        return lambda: self._work.step(chosen), None

    def _best_size(self, key: BatchKey, most: int) -> int:
        spec = self.pipeline.sessions[DENOISER].spec
        fits = spec.profile[ROWS].max // key.rows if ROWS in spec.profile else most
        return self.times.best_size(key, max(1, min(most, fits)))

    def _earliest(self, until: float | None) -> float | None:
        """When to look again without being woken: at this time, or at the next deadline if that is earlier."""
        times = (until, self._queue.earliest_deadline())
        return min((time for time in times if time is not None), default=None)

    def _ended(self) -> list[tuple[Job, Cancelled | Refused]]:
        """The jobs that were cancelled or are past their deadlines. The caller holds the lock.

        They are ended without it: a job tells its listener under a lock of its own, and the listener may call `cancel`.
        """
        now, ended = self._clock(), list[tuple[Job, Cancelled | Refused]]()
        for job in self._queue.jobs:
            if job.cancelled:
                ended.append((job, Cancelled()))
            elif self._predictions.is_hopeless(job, now):
                ended.append((job, Refused(TooLate("the deadline passed before the pictures were done"))))
        return ended

    def _finish_all(self, ended: Sequence[tuple[Job, Cancelled | Refused]]) -> None:
        for job, end in ended:
            self._finish(job, end)

    def _finish(self, job: Job, end: End) -> None:
        """End a job once, and take what it has out of the queue."""
        if self._queue.remove_job(job):
            self.observer.ended(
                job, end
            )  # before its client knows, so that who has an answer finds it counted
            job.finish(end)

    # --- sessions that fail

    def _session_crashed(self, error: Exception, jobs: Sequence[Job]) -> None:
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
            try:
                variants = self._variants_of(pipeline)
            except BaseException:
                pipeline.close()
                raise
        except Exception:
            pause = REOPEN_PAUSES[min(self._attempts, len(REOPEN_PAUSES) - 1)]
            log.exception("the bundle cannot be opened again; the next attempt is in %g s", pause)
            self._attempts, self._open_at = self._attempts + 1, self._clock() + pause
            return
        self._attempts, self._open_at = 0, 0.0
        # States on a device went with it. Those on the host, as all are before their first step and when they wait for
        # the decoder, are values and go on, unless the bundle was built again: no picture is drawn by two versions.
        with self._wake:
            lost = [
                p.job for p in self._queue.pictures.values() if not isinstance(p.state.latents, np.ndarray)
            ]
            lost += self._queue.jobs if pipeline.manifest.digest != version else ()
        for job in lost:
            self._finish(job, Refused(Broken("a stage failed", retry_after=1.0)))
        with self._wake:
            self._work.use(pipeline, variants)
            self._crashed = ""
            self._wake.notify_all()
        log.warning("the bundle is open again")
