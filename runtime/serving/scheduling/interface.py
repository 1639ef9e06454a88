"""What the server needs of whatever draws a bundle's requests: a `Scheduler` here, or one that asks replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.scheduling.job import Event, Job
from ditc.runtime.serving.scheduling.step_times import StepTimes


class Schedules(Protocol):
    """Draws requests with one version of a bundle. `Scheduler` says what each of its parts means."""

    times: StepTimes
    max_batch: int

    @property
    def pipeline(self) -> Pipeline: ...

    @property
    def problem(self) -> str: ...

    @property
    def stopped(self) -> bool: ...

    @property
    def counts(self) -> tuple[int, int]: ...

    def submit(
        self,
        plan: Plan,
        listener: Callable[[Event], None],
        *,
        id: str,
        timeout: float | None = None,
        previews: int = 0,
    ) -> Job: ...

    def cancel(self, job: Job) -> None: ...

    def close(self, timeout: float | None = None) -> bool: ...
