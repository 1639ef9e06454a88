"""Asynchronous jobs: drawings that go on without a connection, and whose results are fetched later.

They are what OpenAI's video jobs are: created, polled with progress, fetched, deleted. A job belongs to the key that
created it, and for other keys it does not exist. Jobs are kept in memory: they end with the server.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from time import time
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel

from ditc.runtime.serving.api.answers import Details, JobError
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.api.ongoing import Ongoing
from ditc.runtime.serving.api.results import Result
from ditc.runtime.serving.http.errors import body_of, log_failure
from ditc.runtime.serving.refusals import Invalid, Refusal

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


@dataclass(eq=False, slots=True, kw_only=True)
class AsyncJob(ABC):
    """One job.

    Attributes:
        prefix: of the ids of jobs of this kind.
        number: increases with every job, which orders those of one second.
        count: the number of pictures or videos.
        ongoing: None when it has ended.
        progress: percent of the work: of the steps and, of a video, of its latent frames, each of which counts as a
            step.
        steps_done, frames_done: the number of steps that are done, and of decoded frames of videos.
        outcome: its result, or why there is none; None while it is in work.
        unwanted: whether it was cancelled when only its encoding was left, which goes on for nobody.
        ended, expires: seconds since 1970; None while it is in work.
    """

    prefix: ClassVar[str] = ""

    id: str
    number: int
    created: int
    count: int
    asked: Asked
    details: Details
    ongoing: Ongoing | None
    progress: int = 0
    steps_done: int = 0
    frames_done: int = 0
    outcome: Result | Refusal | None = None
    unwanted: bool = False
    ended: int | None = None
    expires: int | None = None

    @property
    def status(self) -> Status:
        if isinstance(self.outcome, Result):
            return "completed"
        if self.outcome is not None:
            return "cancelled" if self.outcome.code == "cancelled" else "failed"
        drawing = None if self.ongoing is None else self.ongoing.drawing
        return "queued" if drawing is not None and drawing.job.began is None else "in_progress"

    @property
    def result(self) -> Result | None:
        """Its result; None if there is none, or not yet."""
        return self.outcome if isinstance(self.outcome, Result) else None

    @property
    def error(self) -> JobError | None:
        """Why it has failed; None if it has not."""
        refusal = self.outcome
        if not isinstance(refusal, Refusal) or self.status == "cancelled":
            return None
        said = body_of(refusal)["error"]
        return JobError(code=refusal.code, message=said["message"], param=refusal.param)

    def no_content(self, what: str) -> Invalid:
        """Why there is nothing to fetch (404), while it is in work or without a result.

        Args:
            what: such as "pictures".
        """
        return Invalid(
            f"the job is {self.status.replace('_', ' ')}, so it has no {what}",
            hint="ask for it until it is completed",
            status=404,
            code="no_content",
        )

    @abstractmethod
    def answer(self) -> BaseModel:
        """What a client is told about it."""

    def note_progress(self) -> None:
        """Read how far the drawing is. Up to the end it is below 100, because the last step is not the last work."""
        drawing = None if self.ongoing is None else self.ongoing.drawing
        if drawing is None:
            return
        job, plan = drawing.job, drawing.job.plan
        done, total = job.steps_done, plan.runs
        self.steps_done, self.frames_done = job.steps_done, job.frames_done
        per_cell = drawing.model.pipeline.manifest.latents.frames_per_cell
        if plan.frames is not None and per_cell is not None:
            done += -(-job.frames_done // per_cell)
            total += plan.pictures * -(-plan.frames // per_cell)
        self.progress = min(99, 100 * done // total)


J = TypeVar("J", bound=AsyncJob)


class Jobs(Generic[J]):
    """The jobs of one kind, of all keys. Used on the event loop only.

    Args:
        kept: jobs of all kinds, which share its bounds.
    """

    def __init__(self, kind: type[J], kept: Kept[Any]) -> None:
        self._kind, self._kept, self._numbers = kind, kept, itertools.count()

    def check_room(self, owner: str) -> None:
        """Raise Overloaded if this owner has the most jobs in work."""
        self._kept.check_room(owner)

    def id_of(self, ongoing: Ongoing) -> str:
        """The id of the job that this drawing is or will be."""
        return f"{self._kind.prefix}{ongoing.details.id}"

    def add(self, owner: str, ongoing: Ongoing) -> J:
        """Keep an accepted drawing as a job.

        Raises:
            Overloaded: the owner has too many jobs in work. The drawing is cancelled.
        """
        drawing = ongoing.drawing
        job = self._kind(
            id=self.id_of(ongoing),
            number=next(self._numbers),
            created=int(time()),
            count=1 if drawing is None else drawing.job.plan.pictures,
            asked=ongoing.asked,
            details=ongoing.details,
            ongoing=ongoing,
        )
        try:
            self._kept.add(owner, job.id, job)
        except Refusal:
            ongoing.cancel()
            raise
        if drawing is not None:
            drawing.events.when_ended(job.note_progress)
        ongoing.when_done(lambda result: self._settle(owner, job, result))
        return job

    def known(self, owner: str, id: str) -> J | None:
        """The job; None if this owner has none with this id."""
        job = self._kept.get(owner, id)
        return job if isinstance(job, self._kind) else None

    def find(self, owner: str, id: str) -> J:
        """The job. Raises Invalid (404) if this owner has none with this id."""
        job = self.known(owner, id)
        if job is None:
            raise Invalid(
                f"there is no job {id!r:.80}",
                hint="it may have expired; jobs are known only to the key that created them",
                param="id",
                status=404,
                code="job_not_found",
            )
        return job

    def cancel(self, job: J) -> None:
        """End a job in work before its next step. It stays known, as cancelled."""
        if job.ongoing is not None:
            job.unwanted = not job.ongoing.cancel()

    def remove(self, owner: str, job: J) -> None:
        """Forget a job. If it is in work, it is also cancelled."""
        self.cancel(job)
        self._kept.remove(owner, job.id)

    def page(self, owner: str, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[J], bool]:
        """Some jobs of an owner by the time of their creation, and whether there are more.

        Args:
            after: the id of the last job of the page before.

        Raises:
            Invalid: there is no job with that id (404).
        """
        mine = (job for job in self._kept.of(owner) if isinstance(job, self._kind))
        jobs = sorted(mine, key=lambda job: job.number, reverse=newest_first)
        if after is not None:
            jobs = jobs[jobs.index(self.find(owner, after)) + 1 :]
        return jobs[:limit], len(jobs) > limit

    def _settle(self, owner: str, job: J, result: asyncio.Task[Result]) -> None:
        error = None if result.cancelled() else result.exception()
        if result.cancelled() or (error is None and job.unwanted):
            job.outcome = Refusal("it was cancelled", code="cancelled")
        elif isinstance(error, Refusal):
            job.outcome = copy(error)  # without its traceback, whose frames hold the drawing
        elif isinstance(error, Exception):
            log_failure(error, f"of the job {job.id}")
            job.outcome = Refusal("the server has failed")
        else:
            job.outcome, job.progress = result.result(), 100
        size = job.outcome.size_bytes if isinstance(job.outcome, Result) else 0
        job.ongoing, job.ended = None, int(time())
        job.expires = int(job.ended + self._kept.seconds)
        self._kept.settle(owner, job.id, size)
