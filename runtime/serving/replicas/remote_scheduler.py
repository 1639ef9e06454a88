"""A scheduler whose replicas draw: it accepts requests by the exact counts of the server, and ends each once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.request import Request
from ditc.runtime.serving.refusals import Refusal, TooLate, Unavailable
from ditc.runtime.serving.replicas.messages import Opened, Version
from ditc.runtime.serving.replicas.seat import Task
from ditc.runtime.serving.scheduling.admission import Admission, work_of
from ditc.runtime.serving.scheduling.job import End, Event, Finished, Job, Refused
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.scheduling.policy import due_time
from ditc.runtime.serving.scheduling.predictions import Predictions
from ditc.runtime.serving.scheduling.scheduler import READY_BATCHES
from ditc.runtime.serving.scheduling.step_times import StepTimes

if TYPE_CHECKING:
    from ditc.runtime.serving.replicas.pool import Pool


class RemoteScheduler:
    """Draws with one version of a bundle that is open in replicas. Threads can share it.

    Args:
        pipeline: plans requests; see described.py.
        opened: what a replica has opened.
    """

    def __init__(
        self,
        pool: Pool,
        version: Version,
        pipeline: Pipeline,
        opened: Opened,
        *,
        admission: Admission,
        observer: Observer,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.version, self.pipeline, self.observer = version, pipeline, observer
        self.max_batch = opened.max_batch
        self.pictures_ahead = READY_BATCHES * opened.max_batch  # how many pictures a replica gets at one time
        self.times = StepTimes(opened.max_batch, opened.sizes)
        self.times.take_over(opened.times)
        self.stopped = False  # a lost replica is replaced by the pool
        self._pool, self._admission, self._clock = pool, admission, clock
        self._predictions = Predictions(pipeline.manifest.latents, self.times)
        self._lock = threading.Lock()
        self._jobs: dict[Job, int] = {}  # with their work
        self._closing = False

    # --- what the server calls, on any thread; see Scheduler

    @property
    def problem(self) -> str:
        """Why it cannot draw at the moment, in words for clients; "" if it can."""
        if self._closing:
            return "it is closing"
        return "" if self._pool.serving(self.version) else "no replica can draw at the moment"

    @property
    def counts(self) -> tuple[int, int]:
        """How many accepted requests wait in the front, and how many are in replicas."""
        with self._lock:
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
        """Accept a request, as `Scheduler.submit`. It raises the same refusals."""
        now, alone = self._clock(), self._predictions.alone_seconds(plan)
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
            work = self._accept(job, alone, timeout)
        except Refusal as refusal:
            self.observer.rejected(refusal)
            raise
        self.observer.accepted(job)
        self._pool.add(Task(job=job, scheduler=self, work=work))
        return job

    def cancel(self, job: Job) -> None:
        """End a job before its next step. Nothing happens if it has ended."""
        job.cancelled = True
        if job.end is None:
            self._pool.cancel(job)

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, end those in work, and close the version in all replicas."""
        with self._lock:
            self._closing = True
            jobs = list(self._jobs)
        for job in jobs:
            self.finish(
                job, Refused(Unavailable("the model was closed", hint="come back later", retry_after=1.0))
            )
        self._pool.close_version(self.version)
        return True

    # --- what the dispatcher calls

    def finish(self, job: Job, end: End) -> None:
        """End a job once, and give back what it took."""
        with self._lock:
            work = self._jobs.pop(job, None)
        if work is not None:
            self._admission.give_back(work)
            self.observer.ended(job, end)
            job.finish(end)

    def seeded(self, plan: Plan) -> Request:
        """The request with the seed that was chosen for it, so that every replica draws the same picture."""
        return replace(plan.request, seed=plan.seed)

    def timed(self, job: Job, finished: Finished) -> Finished:
        """The end with the times that the client sees: since the request came to the front."""
        seconds = dict(finished.seconds)
        seconds["total"] = self._clock() - job.arrived
        seconds["wait"] = seconds.get("wait", 0.0) + ((job.began or job.arrived) - job.arrived)
        return replace(finished, seconds=seconds)

    def too_late(self, job: Job) -> Refused | None:
        """The end of a job that waits and cannot be done in time; None if it can."""
        if self._predictions.is_hopeless(job, self._clock()):
            return Refused(TooLate("the deadline passed before the pictures were done"))
        return None

    def _accept(self, job: Job, alone: float, timeout: float | None) -> int:
        """Count a job. Returns its work."""
        work, replicas = work_of(job.plan), max(1, self._pool.serving(self.version))
        with self._lock:
            if self._closing:
                raise Unavailable("the model is closing", hint="come back later", retry_after=1.0)
            left = self._predictions.seconds_left(self._jobs) / replicas
            self._admission.take(work, seconds_of_all=left)
            earlier = [other for other in self._jobs if other.due <= job.due]
            job.predicted = alone + self._predictions.seconds_left(earlier) / replicas
            if timeout is not None and alone > timeout:
                self._admission.give_back(work)
                raise TooLate(
                    f"the request takes about {alone:.1f} s, and its timeout is {timeout:g} s",
                    hint="allow more time, or ask for fewer steps or pictures",
                )
            self._jobs[job] = work
        return work
