"""Exact counts of the accepted work, and its bounds.

A request is accepted or refused as a whole, under one lock, and gives back what it took exactly once, when it ends. So
there are never more requests, or more work, than the bounds say.
"""

from __future__ import annotations

import threading

from ditc.runtime.prepare import Plan
from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.serving.settings import Bounds

# A client that is told to come back must be able to. Estimates of the first moments may be far too long or short.
SHORTEST_RETRY, LONGEST_RETRY = 1.0, 300.0


def work_of(plan: Plan) -> int:
    """The work of a request in pixel-steps. Each frame of a video counts as a picture."""
    return plan.drawn_height * plan.drawn_width * (plan.frames or 1) * len(plan.table) * plan.pictures


class Admission:
    """Counts what is accepted. Threads can share it."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.requests = 0
        self.pixel_steps = 0
        self._lock = threading.Lock()

    def take(self, work: int, *, seconds_of_all: float) -> None:
        """Accept a request of so many pixel-steps.

        Args:
            seconds_of_all: an estimate of how long all accepted work takes. It gives the time after which to come back.

        Raises:
            Overloaded: it does not fit. A request that would not fit into an empty queue has no retry time.
        """
        bounds = self.bounds
        with self._lock:
            if work > bounds.pixel_steps:
                raise Overloaded(
                    f"this request is {work} pixel-steps of work, and the server takes at most {bounds.pixel_steps}",
                    hint="ask for fewer or smaller pictures or frames, or fewer steps",
                    status=400,
                    code="too_much_work",
                )
            if self.requests >= bounds.requests:
                raise Overloaded(
                    f"the queue is full: {self.requests} requests",
                    hint="come back later",
                    retry_after=_bounded(seconds_of_all / self.requests),
                )
            if self.pixel_steps + work > bounds.pixel_steps:
                missing = self.pixel_steps + work - bounds.pixel_steps
                raise Overloaded(
                    f"the queue holds {self.pixel_steps} of at most {bounds.pixel_steps} pixel-steps of work, and this "
                    f"request needs {work}",
                    hint="come back later",
                    retry_after=_bounded(seconds_of_all * missing / self.pixel_steps),
                )
            self.requests += 1
            self.pixel_steps += work

    def give_back(self, work: int) -> None:
        """What an accepted request took, at its end."""
        with self._lock:
            self.requests -= 1
            self.pixel_steps -= work


def _bounded(seconds: float) -> float:
    return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)
