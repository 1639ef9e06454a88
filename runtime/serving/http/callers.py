"""Who sends a request, and what they use: rates and numbers per key, counted exactly."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from ditc.runtime.serving.http.keys import KeyLimits
from ditc.runtime.serving.refusals import Overloaded, Refusal

UNLIMITED = KeyLimits()
# A concurrent request ends at an unknown time.
RETRY_CONCURRENT = 1.0


class Rate:
    """An allowance that refills evenly: `per_minute` at once, and as much again in each minute. None is endless."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float]) -> None:
        self.per_minute = math.inf if per_minute is None else float(per_minute)
        self._clock = clock
        self._left, self._when = self.per_minute, clock()

    def take(self, amount: float) -> float:
        """Take so much. Returns 0, or else the seconds after which there is enough, and nothing was taken."""
        now = self._clock()
        if self.per_minute == math.inf:
            return 0.0
        self._left = min(self.per_minute, self._left + (now - self._when) * self.per_minute / 60)
        self._when = now
        if self._left >= amount:
            self._left -= amount
            return 0.0
        return (amount - self._left) * 60 / self.per_minute

    def give_back(self, amount: float) -> None:
        """What was taken for nothing."""
        self._left = min(self.per_minute, self._left + amount)


class Caller:
    """The owner of a key, or whoever uses a server without keys. Threads can share it."""

    def __init__(
        self,
        name: str,
        *,
        admin: bool = False,
        limits: KeyLimits = UNLIMITED,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.name, self.admin, self.limits = name, admin, limits
        self._lock = threading.Lock()
        self._requests, self._work = (
            Rate(limits.requests_per_minute, clock),
            Rate(limits.pixel_steps_per_minute, clock),
        )
        self._answering = self._drawing = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is answered.

        Raises:
            Overloaded: one more is too many.
        """
        with self._lock:
            self._check_concurrent(self._answering, "requests")
            wait = self._requests.take(1)
            if wait:
                raise _too_fast(f"{self.limits.requests_per_minute} requests", wait)
            self._answering += 1
        try:
            yield
        finally:
            with self._lock:
                self._answering -= 1

    @contextmanager
    def drawing(self, pixel_steps: int) -> Iterator[None]:
        """From the acceptance of a drawing to its end. If it is refused inside the block, its work does not count.

        Raises:
            Overloaded: it is too much work. What would not fit into an empty minute has no retry time.
        """
        most = self.limits.pixel_steps_per_minute
        if most is not None and pixel_steps > most:
            raise Overloaded(
                f"this request is {pixel_steps} pixel-steps of work, and this key may begin {most} per minute",
                hint="ask for fewer or smaller pictures or frames, or fewer steps",
                status=400,
                code="too_much_work",
            )
        with self._lock:
            self._check_concurrent(self._drawing, "drawings")
            wait = self._work.take(pixel_steps)
            if wait:
                raise _too_fast(f"{most} pixel-steps", wait)
            self._drawing += 1
        try:
            yield
        except Refusal:
            with self._lock:
                self._work.give_back(pixel_steps)
            raise
        finally:
            with self._lock:
                self._drawing -= 1

    def _check_concurrent(self, running: int, what: str) -> None:
        most = self.limits.concurrent_requests
        if most is not None and running >= most:
            raise Overloaded(
                f"this key has {running} {what} in work, and may have {most}",
                hint="wait for one of them",
                code="too_many_concurrent_requests",
                retry_after=RETRY_CONCURRENT,
            )


def _too_fast(allowance: str, wait: float) -> Overloaded:
    return Overloaded(
        f"this key may use {allowance} per minute",
        hint="come back later",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
