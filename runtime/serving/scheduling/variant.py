"""The requests for one of a scheduler's LoRAs: they share its sessions and its queue, and never a run with others."""

from __future__ import annotations

from collections.abc import Callable

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.scheduling.job import Event, Job
from ditc.runtime.serving.scheduling.scheduler import Scheduler


class Variant:
    """One of a scheduler's variants, as a scheduler. Threads can share it.

    Args:
        name: the variant's.
    """

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self._scheduler, self._name = scheduler, name
        self.times, self.max_batch = scheduler.times, scheduler.max_batch

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline with the LoRA. Raises Unavailable if the LoRA could not be read when the bundle was opened."""
        return self._scheduler.pipeline_of(self._name)

    @property
    def is_lost(self) -> bool:
        """Whether the LoRA could not be read when the bundle was opened."""
        return self._name not in self._scheduler.variants

    @property
    def problem(self) -> str:
        return self._scheduler.problem

    @property
    def stopped(self) -> bool:
        return self._scheduler.stopped

    @property
    def counts(self) -> tuple[int, int]:
        """Those of all requests of the scheduler."""
        return self._scheduler.counts

    def submit(
        self,
        plan: Plan,
        listener: Callable[[Event], None],
        *,
        id: str,
        timeout: float | None = None,
        previews: int = 0,
    ) -> Job:
        """See `Scheduler.submit`."""
        return self._scheduler.submit(
            plan, listener, id=id, timeout=timeout, previews=previews, variant=self._name
        )

    def cancel(self, job: Job) -> None:
        """See `Scheduler.cancel`."""
        self._scheduler.cancel(job)

    def close(self, timeout: float | None = None) -> bool:
        """Close the scheduler with all of its variants."""
        return self._scheduler.close(timeout)
