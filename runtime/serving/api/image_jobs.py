"""Asynchronous jobs: drawings that go on without a connection, and whose pictures are fetched later.

They are what OpenAI's video jobs are: created, polled with progress, fetched, deleted. A job belongs to the key that
created it, and for other keys it does not exist. Jobs are kept in memory: they end with the server.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from time import time
from typing import Literal

from ditc.runtime.serving.api.answers import Details, JobAnswer, JobError
from ditc.runtime.serving.api.bodies import usage_of
from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.api.ongoing import Ongoing
from ditc.runtime.serving.api.results import Result
from ditc.runtime.serving.refusals import Invalid, Refusal

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


@dataclass(eq=False, slots=True, kw_only=True)
class ImageJob:
    """One job.

    Attributes:
        number: increases with every job, which orders those of one second.
        count: the number of pictures.
        ongoing: None when it has ended.
        progress: percent of the steps.
        outcome: its result, or why there is none; None while it is in work.
        ended, expires: seconds since 1970; None while it is in work.
    """

    id: str
    number: int
    created: int
    count: int
    details: Details
    ongoing: Ongoing | None
    progress: int = 0
    outcome: Result | Refusal | None = None
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

    def answer(self) -> JobAnswer:
        """What a client is told about it."""
        self.note_progress()
        result = self.outcome if isinstance(self.outcome, Result) else None
        refusal = self.outcome if isinstance(self.outcome, Refusal) else None
        return JobAnswer(
            id=self.id,
            created_at=self.created,
            completed_at=self.ended if result is not None else None,
            expires_at=self.expires,
            model=self.details.model,
            status=self.status,
            progress=self.progress,
            size=f"{self.details.width}x{self.details.height}",
            n=self.count,
            error=None
            if refusal is None or self.status == "cancelled"
            else JobError(code=refusal.code, message=str(refusal), param=refusal.param),
            usage=None if result is None else usage_of(result),
            ditc=self.details if result is None else result.details,
        )

    def note_progress(self) -> None:
        """Read how far the drawing is. Up to the end it is below 100, because the last step is not the last work."""
        drawing = None if self.ongoing is None else self.ongoing.drawing
        if drawing is not None:
            self.progress = min(99, 100 * drawing.job.steps_done // drawing.job.plan.runs)


class ImageJobs:
    """The jobs of all keys. Used on the event loop only."""

    def __init__(self, kept: Kept[ImageJob]) -> None:
        self._kept, self._numbers = kept, itertools.count()

    def check_room(self, owner: str) -> None:
        """Raise Overloaded if this owner has the most jobs in work."""
        self._kept.check_room(owner)

    def add(self, owner: str, ongoing: Ongoing) -> ImageJob:
        """Keep an accepted drawing as a job.

        Raises:
            Overloaded: the owner has too many jobs in work. The drawing is cancelled.
        """
        drawing = ongoing.drawing
        job = ImageJob(
            id=job_id(ongoing),
            number=next(self._numbers),
            created=int(time()),
            count=1 if drawing is None else drawing.job.plan.pictures,
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

    def find(self, owner: str, id: str) -> ImageJob:
        """The job. Raises Invalid (404) if this owner has none with this id."""
        job = self._kept.get(owner, id)
        if job is None:
            raise Invalid(
                f"there is no job {id!r:.80}",
                hint="it may have expired; jobs are known only to the key that created them",
                param="id",
                status=404,
                code="job_not_found",
            )
        return job

    def remove(self, owner: str, job: ImageJob) -> bool:
        """Cancel a job in work, or remove one that has ended. Returns whether it is removed."""
        if job.outcome is not None:
            self._kept.remove(owner, job.id)
            return True
        if job.ongoing is not None:
            job.ongoing.cancel()
        return False

    def page(
        self, owner: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[ImageJob], bool]:
        """Some jobs of an owner by the time of their creation, and whether there are more.

        Args:
            after: the id of the last job of the page before.

        Raises:
            Invalid: there is no job with that id (404).
        """
        jobs = sorted(self._kept.of(owner), key=lambda job: job.number, reverse=newest_first)
        if after is not None:
            jobs = jobs[jobs.index(self.find(owner, after)) + 1 :]
        return jobs[:limit], len(jobs) > limit

    def _settle(self, owner: str, job: ImageJob, result: asyncio.Task[Result]) -> None:
        error = None if result.cancelled() else result.exception()
        if result.cancelled() or isinstance(error, Refusal):
            job.outcome = (
                error if isinstance(error, Refusal) else Refusal("it was cancelled", code="cancelled")
            )
        elif error is not None:
            job.outcome = Refusal("the server has failed")
        else:
            job.outcome, job.progress = result.result(), 100
        size = job.outcome.size_bytes if isinstance(job.outcome, Result) else 0
        job.ongoing, job.ended = None, int(time())
        job.expires = int(job.ended + self._kept.seconds)
        self._kept.settle(owner, job.id, size)


def job_id(ongoing: Ongoing) -> str:
    """The id of the job that this drawing is or will be."""
    return f"imgjob_{ongoing.details.id}"
