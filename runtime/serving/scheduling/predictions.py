"""How long requests will take, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable

from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.scheduling.job import Job
from ditc.runtime.serving.scheduling.policy import BatchKey
from ditc.runtime.serving.scheduling.step_times import TEXT, StepTimes
from ditc.runtime.spec import VAE_DECODER


class Predictions:
    """Estimates of a bundle's requests. Threads can share it.

    Args:
        latents: of the bundle.
        times: the measurements.
    """

    def __init__(self, latents: LatentSpec, times: StepTimes) -> None:
        self._latents, self._times = latents, times

    def alone_seconds(self, plan: Plan) -> float:
        """How long a request takes if nothing else runs."""
        latents, times = self._latents, self._times
        shape = latents.shape(plan.drawn_height, plan.drawn_width, plan.frames)
        rows = 1 + plan.guided + plan.gated
        steps = times.seconds(BatchKey(latents=shape, rows=rows)) * len(plan.table)
        pixels = plan.drawn_height * plan.drawn_width * (plan.frames or 1)
        decoding = times.stage_seconds(VAE_DECODER, pixels)
        return plan.pictures * (times.stage_seconds(TEXT, 1) + steps + decoding)

    def seconds_left(self, jobs: Iterable[Job]) -> float:
        """How long the rest of these requests takes, one after the other."""
        return sum(self.alone_seconds(job.plan) * (1 - job.steps_done / job.plan.runs) for job in jobs)

    def is_hopeless(self, job: Job, now: float) -> bool:
        """Whether a job's deadline has passed or, if it has not begun, cannot be met any more."""
        if job.deadline is None:
            return False
        needed = self.alone_seconds(job.plan) if job.began is None else 0.0
        return now + needed > job.deadline
