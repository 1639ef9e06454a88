"""Exact counts of the accepted work, and its bounds.

A request is accepted or refused as a whole, under one lock, and gives back what it took exactly once, when it ends. So
there are never more requests, or more work, than the bounds say.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ditc.runtime.errors import UsageError
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.refusals import Overloaded

# A client that is told to come back must be able to. Estimates of the first moments may be far too long or short.
SHORTEST_RETRY, LONGEST_RETRY = 1.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much accepted work there may be at one time.

    Attributes:
        requests: requests that wait or are drawn.
        pixel_steps: their width x height x steps, over all their pictures. 2**33 is 8 pictures of 1024x1024 pixels
            with 1,024 steps, or 400 with 20.

    Raises:
        UsageError: a bound is not positive.
    """

    requests: int = 64
    pixel_steps: int = 2**33

    def __post_init__(self) -> None:
        for name, bound in (("requests", self.requests), ("pixel_steps", self.pixel_steps)):
            if bound < 1:
                raise UsageError(f"the bound of {name} is {bound}", hint="choose 1 or more")


def work_of(plan: Plan) -> int:
    """The work of a request in pixel-steps."""
    return plan.drawn_height * plan.drawn_width * len(plan.table) * plan.pictures


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
                    hint="ask for fewer or smaller pictures, or fewer steps",
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
