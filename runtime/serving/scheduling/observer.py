"""What a scheduler reports to whoever measures it. This one measures nothing; `metrics.py` fills in Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditc.runtime.serving.refusals import Refusal
    from ditc.runtime.serving.scheduling.job import End, Job
    from ditc.runtime.serving.scheduling.policy import BatchKey


class Observer:
    """Of one model. Most methods are called on the scheduler's threads, so every one must be quick."""

    def accepted(self, job: Job) -> None:
        """A request was accepted."""

    def rejected(self, refusal: Refusal) -> None:
        """A request was valid, and not accepted."""

    def stage(self, name: str, seconds: float) -> None:
        """Texts were encoded, or a picture was decoded."""

    def stepped(self, key: BatchKey, size: int, seconds: float) -> None:
        """The denoiser has run for so many pictures."""

    def ended(self, job: Job, end: End) -> None:
        """A request has ended."""

    def crashed(self) -> None:
        """A session has failed, and the bundle is opened again."""


UNOBSERVED = Observer()
