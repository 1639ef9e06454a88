"""A started scheduler with short calls for tests, and a listener that keeps what it hears."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from ditc.runtime.request import Request
from ditc.runtime.serving.scheduling.job import Event, Finished, Progress
from ditc.runtime.serving.scheduling.scheduler import Scheduler

SETTINGS = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 3, "output_type": "pil"}
# Far more than anything takes, so that only a fault ends a wait.
PATIENCE = 120.0


class Heard:
    """What a listener heard. `wait` returns the end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()
        self._first = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._first.set()
        if hasattr(event, "images") or type(event).__name__ in ("Refused", "Cancelled"):
            self._ended.set()

    def wait(self) -> Any:
        assert self._ended.wait(PATIENCE), f"no end among {self.events}"
        return self.events[-1]

    def wait_for_anything(self) -> None:
        assert self._first.wait(PATIENCE)

    @property
    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, Progress)]


class Server:
    """A scheduler, started, with short calls for tests."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._ids = itertools.count()

    def submit(self, prompt: str = "red cat", *, then: Callable[[Event], None] | None = None, **changes: Any):
        """Submit a request; returns its job and what its listener hears."""
        options = {name: changes.pop(name) for name in ("timeout", "previews") if name in changes}
        plan = self.scheduler.pipeline.plan(Request(**{"prompt": prompt, **SETTINGS, **changes}))
        heard = Heard()

        def listen(event: Event) -> None:
            heard(event)
            if then is not None:
                then(event)

        return self.scheduler.submit(plan, listen, id=str(next(self._ids)), **options), heard

    def draw(self, prompt: str = "red cat", **changes: Any) -> Finished:
        _, heard = self.submit(prompt, **changes)
        end = heard.wait()
        assert isinstance(end, Finished), end
        return end


Serve = Callable[..., Server]
