"""What the front knows of a replica, and of a request on its way to one. Only the pool's event loop changes them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ditc.runtime.errors import DitcError
from ditc.runtime.serving.replicas.handle import Handle
from ditc.runtime.serving.replicas.messages import Message, Version
from ditc.runtime.serving.scheduling.job import Job

if TYPE_CHECKING:
    from ditc.runtime.serving.replicas.remote_scheduler import RemoteScheduler


@dataclass(eq=False, kw_only=True)
class Task:
    """An accepted request.

    Attributes:
        work: in pixel-steps.
        tries: how many replicas have begun it.
        shown: the previews that the client has.
        drawing: what listens to its replica; None while it waits.
    """

    job: Job
    scheduler: RemoteScheduler
    work: int
    tries: int = 0
    shown: set[tuple[int, int]] = field(default_factory=set)
    drawing: asyncio.Task[None] | None = None

    @property
    def version(self) -> Version:
        return self.scheduler.version

    @property
    def left(self) -> float:
        """The pixel-steps that are still to be done."""
        return self.work * (1 - self.job.steps_done / self.job.plan.runs)


@dataclass(eq=False, kw_only=True)
class Seat:
    """A replica.

    Attributes:
        told: what it has told of itself; {} until it has begun.
        cpus: those that it runs on; () if it may use all.
        versions: those that it has opened.
        left_over: those that it had opened for an earlier front, and that this one has not asked for.
        failed: why it could not open others.
        attempts, open_again: how often it has tried those again in vain, and when it does next.
        tasks: what it draws.
        ready: whether it may get requests.
        ending: whether it gets none any more.
        gone: whether it is lost.
    """

    handle: Handle
    told: Message = field(default_factory=dict)
    cpus: tuple[int, ...] = ()
    versions: set[Version] = field(default_factory=set)
    left_over: set[Version] = field(default_factory=set)
    failed: dict[Version, DitcError] = field(default_factory=dict)
    attempts: int = 0
    open_again: float = 0.0
    tasks: set[Task] = field(default_factory=set)
    ready: bool = False
    ending: bool = False
    gone: bool = False
    checking: bool = False
    next_check: float = 0.0

    @property
    def name(self) -> str:
        return self.handle.name

    @property
    def left(self) -> float:
        """The pixel-steps that it still has to do."""
        return sum(task.left for task in self.tasks)

    def has_room(self, task: Task) -> bool:
        """Whether a request may go there now, or better waits in the front, where any replica can take it."""
        if not self.ready or self.ending or self.gone or task.version not in self.versions:
            return False
        pictures = sum(other.job.plan.pictures for other in self.tasks)
        return not self.tasks or pictures + task.job.plan.pictures <= task.scheduler.pictures_ahead
