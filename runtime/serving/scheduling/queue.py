"""What a scheduler has accepted: jobs, their pictures that are ready for a step, and the work beside the steps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ditc.runtime.serving.scheduling.admission import Admission, work_of
from ditc.runtime.serving.scheduling.job import Job, Picture
from ditc.runtime.serving.scheduling.policy import BatchKey, Waiting


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A piece of work beside the steps: a text to encode, a preview, or a picture to decode.

    Attributes:
        makes_ready: whether it makes a picture ready for its first step.
    """

    due: float
    number: int
    job: Job
    action: Callable[[], None]
    makes_ready: bool


class Queue:
    """Shared by the threads of a scheduler. Every change wakes those that wait on `wake`, whose lock guards everything.

    Args:
        admission: gets back what a job took when the job is removed.
        most_ready: how many pictures may be ready for a step. Their texts are in memory.

    Attributes:
        jobs: in the order of their arrival. They are compared by identity.
        pictures: those that are ready for a step, by their numbers.
    """

    def __init__(self, admission: Admission, most_ready: int) -> None:
        self.wake = threading.Condition()
        self.jobs: dict[Job, None] = {}
        self.pictures: dict[int, Picture] = {}
        self.tasks: list[Task] = []
        self._admission, self._most_ready = admission, most_ready
        self._numbers = itertools.count()

    def add_job(self, job: Job) -> None:
        """Add an accepted job."""
        with self.wake:
            self.jobs[job] = None
            self.wake.notify_all()

    def remove_job(self, job: Job) -> bool:
        """Remove a job with its pictures and tasks. False if it is not here any more."""
        with self.wake:
            for number in [number for number, picture in self.pictures.items() if picture.job is job]:
                del self.pictures[number]
            self.tasks = [task for task in self.tasks if task.job is not job]
            if job not in self.jobs:
                return False
            del self.jobs[job]
            self._admission.give_back(work_of(job.plan))
            self.wake.notify_all()
            return True

    def add_task(self, job: Job, action: Callable[[], None], *, makes_ready: bool = False) -> None:
        """Let a piece of work wait, unless its job has ended meanwhile."""
        with self.wake:
            if job in self.jobs:
                self.tasks.append(Task(job.due, next(self._numbers), job, action, makes_ready))
                self.wake.notify_all()

    def add_picture(self, picture: Picture) -> None:
        """Let a picture wait for its next step, unless its job has ended meanwhile."""
        with self.wake:
            if picture.job in self.jobs:
                self.pictures[picture.number] = picture
                self.wake.notify_all()

    def take_pictures(self, numbers: Sequence[int]) -> list[Picture]:
        """Take pictures out for a step. The caller holds the lock."""
        return [self.pictures.pop(number) for number in numbers]

    def take_task(
        self, best_size: Callable[[BatchKey, int], int], before_steps_of: Sequence[Waiting] = ()
    ) -> Task | None:
        """Take the task that is due first, or none. The caller holds the lock.

        A text is encoded only while few pictures are ready for a step, or if it is due before one of those.

        Args:
            best_size: as in `policy.choose`.
            before_steps_of: where one thread does everything, the pictures that a task must be due before, unless it
                makes ready a picture that the next batch has room for.
        """
        latest = max((picture.job.due for picture in self.pictures.values()), default=0.0)
        full = len(self.pictures) >= self._most_ready
        allowed = [task for task in self.tasks if not (task.makes_ready and full and task.due >= latest)]
        task = min(allowed, key=lambda task: (task.due, task.number), default=None)
        if task is not None and before_steps_of:
            head = min(before_steps_of, key=lambda one: one.due)
            group = sum(one.key == head.key for one in before_steps_of)
            has_room = task.makes_ready and best_size(head.key, group + 1) > group
            if task.due > head.due and not has_room:
                return None
        if task is not None:
            self.tasks.remove(task)
        return task

    def waiting(self) -> list[Waiting]:
        """The pictures that are ready for a step, as the policy sees them. The caller holds the lock."""
        return [
            Waiting(id=p.number, key=p.key, due=p.job.due, since=p.since, started=p.started)
            for p in self.pictures.values()
        ]

    def keys(self) -> Collection[BatchKey]:
        """What the pictures that are ready for a step have in common with others."""
        with self.wake:
            return {picture.key for picture in self.pictures.values()}

    def earliest_deadline(self) -> float | None:
        """The next deadline of a job. The caller holds the lock."""
        return min((job.deadline for job in self.jobs if job.deadline is not None), default=None)

    def next_number(self) -> int:
        """A number for a new picture. It is larger than those before, so equal due times keep their order."""
        return next(self._numbers)
